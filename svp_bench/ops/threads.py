"""Run a C kernel on PyTorch's own threads.

PyTorch's Linux builds carry GNU OpenMP. Entering a parallel region of that very library runs our kernels on the threads
that PyTorch's operators use, so there is one pool and no two pools that fight for the cores. Elsewhere the calling
thread is joined by a pool of Python's (ctypes lets go of the interpreter's lock while a kernel runs).
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

__all__ = ["pool_name", "run_kernel"]

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _gomp() -> ctypes.CDLL | None:
    """PyTorch's own GNU OpenMP, or None if it has none."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        library = ctypes.CDLL(str(path))
        library.GOMP_parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        library.GOMP_parallel.restype = None
        return library
    return None


@cache
def _executor(process: int, threads: int) -> ThreadPoolExecutor:  # one a process: threads do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="svp-bench")


_alone = False


def _after_fork() -> None:
    """A forked process has the pool's books but not its threads: waiting for them would never end."""
    global _alone
    _alone = True
    torch.set_num_threads(1)  # PyTorch's operators would wait for them just so


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def pool_name() -> str:
    """Return which threads run the kernels, for `svp-bench doctor`."""
    return "PyTorch's OpenMP threads" if _gomp() is not None else "a thread pool of their own"


def run_kernel(kernel: int, block: int, tasks: int) -> None:
    """Run a kernel that takes its tasks from a counter in its block, on as many threads as PyTorch uses.

    In a forked process it is one thread.

    Args:
        kernel: Address of the C function, `void kernel(int64_t block)`.
        block: Its argument.
        tasks: How many tasks there are; no more threads than that are used.
    """
    threads = 1 if _alone else min(torch.get_num_threads(), tasks)
    if threads <= 1:
        _KERNEL(kernel)(block)
        return
    library = _gomp()
    if library is not None:
        library.GOMP_parallel(kernel, block, threads, 0)
        return
    others = [_executor(os.getpid(), threads - 1).submit(_KERNEL(kernel), block) for _ in range(threads - 1)]
    _KERNEL(kernel)(block)
    for other in others:
        other.result()
