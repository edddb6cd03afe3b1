"""Share work between the runs of one process: decoded images, frozen features, and the result of examining images.

Off unless a process asks for it (`cache_between_runs`). Entries are keyed by where the images lie, the digest of their
split, and the transform; a process that lives no longer than a sweep assumes that nobody changes images under it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol, TypeVar

from svp_bench.data.sources import Images


class Sized(Protocol):
    """A value of known size."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


T = TypeVar("T", bound=Sized)
_limit = 0  # bytes
_values: OrderedDict[Hashable, Any] = OrderedDict()


def cache_between_runs(limit: int = 2 * 2**30) -> None:
    """Cache decoded images and features, of less than `limit` bytes in all, until the process ends."""
    global _limit
    _limit = limit
    _values.clear()


def cached(images: Images, key: Hashable, compute: Callable[[], T]) -> T:
    """Return a value computed from the images of a split: that of an earlier run of this process, or a new one.

    Args:
        images: The images.
        key: Everything else that the value depends on.
        compute: Computes it.
    """
    place = images.where(0) if len(images) else ""
    name = type(images).__name__, images.name, images.digest, place, images.depth, key
    if name in _values:
        _values.move_to_end(name)
        found: T = _values[name]
        return found
    value = compute()
    if value.nbytes < _limit:
        _values[name] = value
        while sum(one.nbytes for one in _values.values()) >= _limit:
            _values.popitem(last=False)  # least recently used
    return value
