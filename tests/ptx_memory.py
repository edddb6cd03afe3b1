"""Memory of the machine of ptx.py: whose it is, who touched it and since which barrier, and what an access costs."""

from __future__ import annotations

import ctypes
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
WARP = 32


class Fault(Exception):
    """What a GPU would do wrong, or would be free to."""


class Watch:
    """Who touched a granule of memory last, and since which barrier. Threads are numbered over the whole launch."""

    def __init__(self, size: int) -> None:
        self.writer = np.zeros(size, np.int64)  # thread + 1
        self.written = np.zeros(size, np.int32)  # barriers passed then
        self.reader = np.zeros(size, np.int64)
        self.read = np.zeros(size, np.int32)
        self.shared_since = np.full(size, -1, np.int32)  # read by several threads since this barrier
        self.programs = np.zeros(size, bool)  # read by several programs
        self.alike = np.full(size, -1, np.int32)  # written the same by several threads since this barrier

    def reads(self, where: Array, thread: Array, epoch: int, threads: int, what: str) -> None:
        writer = self.writer[where]
        other = (writer != 0) & (writer != thread + 1)
        same = (writer - 1) // threads == thread // threads
        if (other & (~same | (self.written[where] == epoch))).any() or (self.alike[where] == epoch).any():
            raise Fault(f"race: {what} is read by one thread and written by another, with no barrier between")
        before = self.reader[where]
        seen = before != 0
        self.programs[where[seen & ((before - 1) // threads != thread // threads)]] = True
        now = seen & (before != thread + 1) & (self.read[where] == epoch)
        self.shared_since[where[now]] = epoch
        self.reader[where] = thread + 1
        self.read[where] = epoch
        apart = self.reader[where] != thread + 1  # several lanes of this very instruction
        self.shared_since[where[apart]] = epoch
        self.programs[where[apart & ((self.reader[where] - 1) // threads != thread // threads)]] = True

    def writes(self, where: Array, thread: Array, epoch: int, threads: int, what: str) -> None:
        """Several threads of a program may write the same by one instruction; `as_stored` sees whether it is."""
        writer, reader = self.writer[where], self.reader[where]
        other = (writer != 0) & (writer != thread + 1)
        same = (writer - 1) // threads == thread // threads
        wrong = other & (~same | (self.written[where] == epoch))
        other = (reader != 0) & (reader != thread + 1)
        same = (reader - 1) // threads == thread // threads
        wrong |= other & (~same | (self.read[where] == epoch))
        wrong |= (self.shared_since[where] == epoch) | (self.alike[where] == epoch) | self.programs[where]
        if wrong.any():
            raise Fault(f"race: {what} is written while another thread uses it, with no barrier between")
        self.writer[where] = thread + 1
        self.written[where] = epoch
        apart = self.writer[where] != thread + 1
        if ((self.writer[where] - 1) // threads != thread // threads).any():
            raise Fault(f"race: two programs write {what}")
        self.alike[where[apart]] = epoch


def as_stored(found: Array, given: Array, text: str) -> None:
    """Fault where an instruction stored other than its last thread for an address."""
    if (found != given).any():
        raise Fault(f"race: two threads write one address by one instruction, and not the same: {text}")


GRANULE = 2  # bytes of global memory that are watched together; no kernel touches single bytes


class _Buffer(NamedTuple):
    name: str
    base: int
    data: Array  # its bytes
    allowed: Array  # which granules belong to the tensors given
    watch: Watch


class Memory:
    """The tensors of a launch, at their own addresses."""

    def __init__(self) -> None:
        self.buffers: list[_Buffer] = []

    def add(self, name: str, base: int, size: int, offsets: Array) -> None:
        """Give the machine a storage of `size` bytes at `base`, of which a tensor holds the granules `offsets`."""
        for buffer in self.buffers:
            if buffer.base == base:
                buffer.allowed[offsets] = True
                return
        data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(base))
        allowed = np.zeros(size // GRANULE, bool)
        allowed[offsets] = True
        self.buffers.append(_Buffer(name, base, data, allowed, Watch(size // GRANULE)))

    def spans(self, address: Array, size: int, text: str) -> list[tuple[_Buffer, Array]]:
        """The buffers that these accesses of `size` bytes fall into, each with the numbers of its accesses."""
        if (address % np.uint64(size)).any():
            raise Fault(f"misaligned access of {size} bytes: {text}")
        found, left = [], len(address)
        for buffer in self.buffers:
            inside = (address >= np.uint64(buffer.base)) & (
                address + np.uint64(size) <= np.uint64(buffer.base + len(buffer.data))
            )
            if count := int(inside.sum()):
                found.append((buffer, np.flatnonzero(inside)))
                left -= count
            if not left:
                return found
        raise Fault(f"an address outside all tensors: {text}")


@dataclass
class Counts:
    """What was executed: instructions of warps by name; and what memory had to do for them."""

    instructions: Counter[str] = field(default_factory=Counter)
    global_bytes: Counter[str] = field(default_factory=Counter)  # asked for, by ld and st
    sectors: Counter[str] = field(default_factory=Counter)  # of 32 bytes, touched by an instruction of a warp
    wavefronts: int = 0  # passes of shared memory
    conflicts: int = 0  # of these, more than the bytes need

    def of_global(self, name: str, thread: Array, address: Array, size: int) -> None:
        """Note an access of `size` bytes at each thread's address."""
        self.global_bytes[name] += len(thread) * size
        ends = np.concatenate([address // np.uint64(32), (address + np.uint64(size - 1)) // np.uint64(32)])
        warps = np.tile(thread // WARP, 2)
        self.sectors[name] += len(np.unique(np.stack([warps, ends.astype(np.int64)]), axis=1).T)

    def of_shared(self, thread: Array, place: Array, size: int) -> None:
        """The same in shared memory. Lanes are served 32, 16 or 8 at a time, for at most 128 bytes; in each pass, a
        bank gives one word."""
        group = thread // (WARP // max(size // 4, 1))
        words = (place[:, None] + np.arange(0, size, 4)[None, :]).reshape(-1) // 4
        pairs = np.unique(np.stack([np.repeat(group, len(words) // len(group)), words]), axis=1)
        banks, passes = np.unique(pairs[0] * 32 + pairs[1] % 32, return_counts=True)
        worst: dict[int, int] = {}
        for key, n in zip(banks // 32, passes, strict=True):
            worst[int(key)] = max(worst.get(int(key), 0), int(n))
        self.wavefronts += sum(worst.values())
        self.conflicts += sum(worst.values()) - len(worst)
