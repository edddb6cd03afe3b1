"""Compile the CPU kernels at their first call and cache them in a folder of the user."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import Any

from svp_bench.core.resources import cache_dir
from svp_bench.ops.memory import keep_freed_memory

_SOURCES = ("simd.py", "cpu_kernels.py")
_lock = threading.RLock()
_addresses: dict[str, int] = {}
_alive: list[Any] = []  # compiled functions must not be collected


def cache_folder() -> Path:
    """Return the folder of compiled kernels."""
    return cache_dir("kernels")


@cache
def _source_digest() -> str:
    """Return the digest of all kernel sources, the cache key; numba itself looks at one file only."""
    here = Path(__file__).parent
    return hashlib.sha256(b"".join((here / name).read_bytes() for name in _SOURCES)).hexdigest()[:12]


def kernel(name: str) -> int:
    """Return the address of a kernel, at the first call compiled or read from the cache."""
    if name not in _addresses:
        with _lock:
            if name not in _addresses:
                _addresses[name] = _load(name)
    return _addresses[name]


def _load(name: str) -> int:
    import numba

    keep_freed_memory()

    from svp_bench.ops import cpu_kernels

    folder = cache_folder() / _source_digest()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        cache_it = os.access(folder, os.W_OK)
    except OSError:
        cache_it = False
    before = numba.config.CACHE_DIR
    start = time.perf_counter()
    try:
        numba.config.CACHE_DIR = str(folder)  # read when a function is declared; restored below
        function = numba.cfunc(cpu_kernels.KERNEL, cache=cache_it, error_model="numpy")(getattr(cpu_kernels, name))
    finally:
        numba.config.CACHE_DIR = before
    if not function.cache_hits:
        where = f"cached in {folder}" if cache_it else f"not cached: {folder} cannot be written"
        seconds = time.perf_counter() - start
        sys.stderr.write(f"Compiled the CPU kernel {name} in {seconds:.1f} s ({where}).\n")
    _alive.append(function)
    address: int = function.address
    return address
