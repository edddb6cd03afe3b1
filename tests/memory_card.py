"""A card of any size, on a CPU: it counts the tensors that live and has no memory left above a limit."""

from __future__ import annotations

import pytest
import torch

from svp_bench.train import memory
from svp_bench.train.memory import Counted, Room

__all__ = ["Card"]


class Card(Counted):
    """Raises what CUDA's allocator raises once the tensors made under it take more than `limit` bytes.

    Inserted, it is what runs on the CPU measure.
    """

    def __init__(self, limit: float = 2.0**50, name: str = "a toy card") -> None:
        super().__init__()
        self.limit = limit
        self.name = name
        self.refused = 0

    def room(self) -> Room:
        return Room(self.name, int(self.limit), int(self.limit - self.live))

    def insert(self, patch: pytest.MonkeyPatch) -> None:
        """Take the place of the machine's memory."""
        patch.setattr(memory, "host_room", self.room)
        patch.setattr(memory.HostGauge, "share", memory.CudaGauge.share)

    def _count(self, storage: torch.UntypedStorage) -> None:
        size = 0 if storage._cdata in self._known else storage.nbytes()
        if size and self.live + size > self.limit:
            self.refused += 1
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU 0 has …")
        super()._count(storage)
