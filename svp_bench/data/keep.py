"""What outlives a run in a process that makes many: decoded pictures, and which lists were verified.

Off unless a process asks for it (`keep_between_runs`). What is kept is known by where the pictures lie, the digest of
their list, and the view; a process that lives no longer than a sweep takes it that nobody changes pictures under it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
import numpy.typing as npt

from svp_bench.data.sources import Pictures

__all__ = ["keep_between_runs", "kept", "verified"]

Array = npt.NDArray[np.uint8]


class _Keeper:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.arrays: OrderedDict[Hashable, Array] = OrderedDict()
        self.verified: set[Hashable] = set()

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


_keeper: _Keeper | None = None


def keep_between_runs(limit: int = 2 * 2**30) -> None:
    """Keep decoded pictures, of at most `limit` bytes in all, until the process ends."""
    global _keeper
    _keeper = _Keeper(limit)


def _name(pictures: Pictures) -> Hashable:
    place = pictures.where(0) if len(pictures) else ""
    return type(pictures).__name__, pictures.name, pictures.digest, place


def kept(pictures: Pictures, view: Hashable, make: Callable[[], Array]) -> Array:
    """Return the decoded pictures of a list, uint8 (N, 3, H, W): those of an earlier run, or what `make` returns."""
    return make() if _keeper is None else _keeper.get((_name(pictures), view), make)


def verified(pictures: Pictures, verify: Callable[[], None]) -> None:
    """Call `verify` unless an earlier run of this process did, and found nothing wrong."""
    if _keeper is None:
        verify()
        return
    if (name := _name(pictures)) not in _keeper.verified:
        verify()
        _keeper.verified.add(name)
