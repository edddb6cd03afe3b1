"""Keep freed memory in the process, so that each layer does not ask the system for fresh pages again.

A training step allocates and frees tensors of some MB hundreds of times. glibc gives such memory back to the system at
once, and every page of the next tensor then costs a fault and is filled with zeros: measured, a tenth of a step of
Vim-S. The price: memory that a process once had stays its own until it ends.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

__all__ = ["SWITCH", "keep_freed_memory"]

SWITCH = "SVP_BENCH_KEEP_MEMORY"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_NEVER = -1
_LARGE, _LARGE_OLD = 1 << 30, 1 << 25  # bytes; older versions of glibc take no more than the second


@cache
def keep_freed_memory() -> str:
    """Tell glibc to keep what is freed; once a process.

    The environment variable SVP_BENCH_KEEP_MEMORY=0 leaves the allocator alone.

    Returns:
        What was done, for `svp-bench doctor`.
    """
    if os.environ.get(SWITCH) == "0":
        return f"given back at once ({SWITCH}=0)"
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return "left to the system's allocator, which is not glibc's"
    kept = library.mallopt(_TRIM_THRESHOLD, _NEVER)
    kept &= library.mallopt(_MMAP_THRESHOLD, _LARGE) or library.mallopt(_MMAP_THRESHOLD, _LARGE_OLD)
    return f"kept by the process ({SWITCH}=0 to give it back)" if kept else "left to glibc, which refused to keep it"
