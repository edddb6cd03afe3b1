"""Share work between the runs of one process: decoded images, frozen features, and the result of examining images.

Off unless a process asks for it (`cache_between_runs`). Entries are keyed by where the images lie, the digest of their
split, and the transform; a process that lives no longer than a sweep assumes that nobody changes images under it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from svp_bench.data.inspection import Examined
from svp_bench.data.sources import Images, Note

__all__ = ["cache_between_runs", "cached", "examined"]


class Sized(Protocol):
    """A value of known size."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


T = TypeVar("T", bound=Sized)


class _Cache:
    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.values: OrderedDict[Hashable, Any] = OrderedDict()
        self.examined: dict[Hashable, Examined] = {}

    def get(self, key: Hashable, compute: Callable[[], T]) -> T:
        if key in self.values:
            self.values.move_to_end(key)
            found: T = self.values[key]
            return found
        value = compute()
        while self.values and sum(v.nbytes for v in self.values.values()) + value.nbytes > self.limit:
            self.values.popitem(last=False)  # least recently used
        if value.nbytes <= self.limit:
            self.values[key] = value
        return value


_cache: _Cache | None = None


def cache_between_runs(limit: int = 2 * 2**30) -> None:
    """Cache decoded images and features, of at most `limit` bytes in all, until the process ends."""
    global _cache
    _cache = _Cache(limit)


def _name(images: Images) -> Hashable:
    place = images.where(0) if len(images) else ""
    return type(images).__name__, images.name, images.digest, place


def cached(images: Images, key: Hashable, compute: Callable[[], T]) -> T:
    """Return a value computed from the images of a split: that of an earlier run of this process, or a new one.

    Args:
        images: The images.
        key: Everything else that the value depends on.
        compute: Computes it.
    """
    return compute() if _cache is None else _cache.get((_name(images), images.depth, key), compute)


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
