"""Run a C kernel on PyTorch's threads.

PyTorch's Linux builds carry GNU OpenMP. A parallel region of that library runs the kernels on the threads of PyTorch's
operators, so that two pools do not compete for the cores. Elsewhere a Python thread pool joins the calling thread
(ctypes releases the interpreter's lock).
"""

from __future__ import annotations

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import torch

_KERNEL = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@cache
def _gomp() -> ctypes.CDLL | str:
    """Return PyTorch's GNU OpenMP, or the reason why it cannot be used."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return "this PyTorch is built without OpenMP"
    for path in sorted(Path(torch.__file__).parent.glob("lib/libgomp*.so*")):
        try:
            library = ctypes.CDLL(str(path))
            parallel = library.GOMP_parallel
        except (OSError, AttributeError) as error:  # e.g. built for another libc
            return f"{path.name} of PyTorch cannot be used: {error}"
        parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
        parallel.restype = None
        return library
    return "this PyTorch carries no GNU OpenMP"


@cache
def _executor(process: int, threads: int) -> ThreadPoolExecutor:  # one per process: threads do not survive a fork
    return ThreadPoolExecutor(threads, thread_name_prefix="svp-bench")


_alone = False


def _after_fork() -> None:
    """Use one thread in a forked process: it has no threads of the pool, and would wait for them forever."""
    global _alone
    _alone = True
    torch.set_num_threads(1)  # for PyTorch's operators too


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def pool_name() -> str:
    """Return the thread pool of the kernels, for `svp-bench doctor`; if it is not PyTorch's, with the reason."""
    library = _gomp()
    return f"a thread pool of their own ({library})" if isinstance(library, str) else "PyTorch's OpenMP threads"


def run_kernel(kernel: int, block: int, tasks: int) -> None:
    """Run a kernel that takes its tasks from a counter in its block, on PyTorch's number of threads.

    Args:
        kernel: Address of the C function, `void kernel(int64_t block)`.
        block: Its argument.
        tasks: Number of tasks, the largest number of threads.
    """
    threads = 1 if _alone else min(torch.get_num_threads(), tasks)
    if threads <= 1:
        _KERNEL(kernel)(block)
        return
    library = _gomp()
    if not isinstance(library, str):
        library.GOMP_parallel(kernel, block, threads, 0)
        return
    others = [_executor(os.getpid(), threads - 1).submit(_KERNEL(kernel), block) for _ in range(threads - 1)]
    _KERNEL(kernel)(block)
    for other in others:
        other.result()
