"""What made a number: versions, commit, device."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from svp_bench.resources import checkout_root

__all__ = ["commit_and_dirty", "device_name", "library_versions"]

_LIBRARIES = ("torch", "lightning", "timm", "torchmetrics", "numpy", "pillow", "jsonargparse")
_WHAT_COUNTS = ("svp_bench", "tasks", "configs")  # a changed README does not make a number dirty


def library_versions() -> dict[str, str]:
    """Return Python's version and those of the libraries that a number depends on."""
    versions = {name: metadata.version(name) for name in _LIBRARIES}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["numba"] = metadata.version("numba")  # it compiles the CPU kernels
    return {"python": platform.python_version(), **versions, "torch": str(torch.__version__)}  # with its build: +cu126


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout and whether code, cards or configs differ from it; (None, None) for a wheel."""
    root = checkout_root()
    if root is None:
        return None, None
    git = ["git", "-C", str(root)]
    try:
        top = subprocess.run([*git, "rev-parse", "--show-toplevel", "HEAD"], capture_output=True, text=True, timeout=20)
        if top.returncode or Path(top.stdout.split("\n")[0]) != root:  # inside somebody else's repository
            return None, None
        status = subprocess.run(
            [*git, "status", "--porcelain", "--", *_WHAT_COUNTS], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    return top.stdout.split("\n")[1], bool(status.stdout.strip()) if status.returncode == 0 else None


def device_name(device: torch.device) -> str:
    """Return the device's name, e.g. "NVIDIA H100 80GB HBM3", or "CPU (x86_64, 2 threads)"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type
