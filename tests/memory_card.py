"""A device of any size, simulated on a CPU: it counts the live tensors and raises CUDA's error above a limit."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Card(TorchDispatchMode):
    """Raise what CUDA's allocator raises once the tensors created under it take more than `limit` bytes.

    Attributes:
        live: Bytes now.
        peak: The most bytes so far.
        refused: Allocations that failed.
    """

    def __init__(self, limit: float = 2.0**50) -> None:
        super().__init__()
        self.limit = limit
        self.live = self.peak = self.refused = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            if isinstance(part, Tensor):
                self._count(part.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        if size and self.live + size > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has …")
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
