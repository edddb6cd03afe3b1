"""What outlives a run in a process that makes many: decoded images, and what examining them found.

Off unless a process asks for it (`cache_between_runs`). The cache is keyed by where the images lie, the digest of
their list, and the transform; a process that lives no longer than a sweep takes it that nobody changes images under it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import numpy.typing as npt

from svp_bench.data.inspection import Examined
from svp_bench.data.sources import Images, Note

__all__ = ["cache_between_runs", "cached", "examined"]

Array = npt.NDArray[np.uint8]


class _Cache:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.arrays: OrderedDict[Hashable, Array] = OrderedDict()
        self.examined: dict[Hashable, Examined] = {}

    def get(self, key: Hashable, make: Callable[[], Array]) -> Array:
        if key in self.arrays:
            self.arrays.move_to_end(key)
            return self.arrays[key]
        array = make()
        while self.arrays and sum(a.nbytes for a in self.arrays.values()) + array.nbytes > self.limit:
            self.arrays.popitem(last=False)  # what was not used for longest
        if array.nbytes <= self.limit:
            self.arrays[key] = array
        return array


_cache: _Cache | None = None


def cache_between_runs(limit: int = 2 * 2**30) -> None:
    """Keep decoded images, of at most `limit` bytes in all, until the process ends."""
    global _cache
    _cache = _Cache(limit)


def _name(images: Images) -> Hashable:
    place = images.where(0) if len(images) else ""
    return type(images).__name__, images.name, images.digest, place


def cached(images: Images, transform: Hashable, make: Callable[[], Array]) -> Array:
    """Return the decoded images of a list, uint8 (N, 3, H, W): those of an earlier run, or what `make` returns."""
    return make() if _cache is None else _cache.get((_name(images), images.depth, transform), make)


def examined(images: Images, note: Note | None = None) -> Examined:
    """Return what examining the images of a split finds, or found in an earlier run of this process."""
    if _cache is None:
        return images.examine(note)
    if (name := _name(images)) not in _cache.examined:
        found = images.examine(note)
        if found.problems:
            return found
        _cache.examined[name] = found
    return _cache.examined[name]
