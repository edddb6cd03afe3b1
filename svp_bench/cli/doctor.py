"""The subcommand `doctor`: report which scan backends run on this machine."""

from __future__ import annotations

from collections.abc import Iterator

from svp_bench.core.errors import plural
from svp_bench.core.registry import importing_torch


def doctor() -> int:
    """Report which scan backends run here, or why not; test them; compile their kernels.

    Exit status: 0 if every backend passes its self-test, else 1.
    """
    import os
    import platform

    with importing_torch():
        import torch

    from svp_bench._version import __version__
    from svp_bench.ops import backend_statuses, choose
    from svp_bench.ops.compiled import cache_folder
    from svp_bench.ops.memory import keep_freed_memory
    from svp_bench.ops.selftest import self_test
    from svp_bench.ops.threads import pool_name

    packages = _versions("numba", "llvmlite", "triton", "mamba-ssm", "causal-conv1d", "lightning", "timm")
    cores = plural(os.cpu_count() or 1, "core")
    print(f"svp-bench {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(f"CPU       {cores}; torch uses {torch.get_num_threads()} threads; kernels run on {pool_name()}")
    print(f"memory    freed: {keep_freed_memory()}")
    print(f"packages  {', '.join(packages)}")
    print(f"GPU       {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none that torch sees'}")
    print(f"kernels   compiled ones are cached in {cache_folder()}")
    print("\nScan backends, in the order in which `auto` tries them:")
    for backend in backend_statuses():
        print(f"  {backend.name:<10} {'available' if backend.available else 'not here':<10} {backend.summary}")
        if backend.reason:
            print(f"  {'':<10} {'':<10} {backend.reason}")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        print(f"  auto on {device}: {choose('auto', device, torch.float32).name}")
    print("\nSelf-test against the reference in float64 (outputs and all gradients):")
    results = self_test()
    for r in results:
        verdict = "good" if r.passed else "WRONG: do not use it; please report"
        times = f"first call {r.first:.2f} s, then {r.seconds:.3f} s"
        print(f"  {r.name:<10} {r.device:<5} error {r.error:.1e}  {times}  {verdict}")
    return 0 if all(r.passed for r in results) else 1


def _versions(*names: str) -> Iterator[str]:
    from importlib.metadata import PackageNotFoundError, version

    for name in names:
        try:
            yield f"{name} {version(name)}"
        except PackageNotFoundError:
            yield f"no {name}"
