"""Keep freed memory in the process, so that layers do not request fresh pages from the system each time.

A training step frees tensors of some MB hundreds of times. glibc returns them to the system at once, and fresh pages
cost page faults and zero-filling: a tenth of a training step of Vim-S. In return, memory stays with the process.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache

SWITCH = "SVP_BENCH_KEEP_MEMORY"
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_NEVER = -1
_LARGE, _LARGE_OLD = 1 << 30, 1 << 25  # bytes; older versions of glibc accept the second


@cache
def keep_freed_memory() -> str:
    """Let glibc keep freed memory, unless SVP_BENCH_KEEP_MEMORY=0; return the setting, for `svp-bench doctor`."""
    if os.environ.get(SWITCH) == "0":
        return f"returned to the system ({SWITCH}=0)"
    library = ctypes.CDLL(None) if sys.platform == "linux" else None
    if library is None or not hasattr(library, "gnu_get_libc_version"):
        return "left to the system's allocator, which is not glibc's"
    done = library.mallopt(_TRIM_THRESHOLD, _NEVER)
    done &= library.mallopt(_MMAP_THRESHOLD, _LARGE) or library.mallopt(_MMAP_THRESHOLD, _LARGE_OLD)
    return f"cached by the process ({SWITCH}=0 to return it)" if done else "left to glibc, which refused to cache it"
