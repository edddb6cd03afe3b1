"""Register the scan backends and report whether each can run here. Imports no torch until a backend is probed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cache
from types import ModuleType

from svp_bench.core.errors import UnavailableError
from svp_bench.core.registry import Registry

BACKENDS = Registry("scan backend", listing="svp-bench doctor")
# In the order in which `auto` tries them. A backend module provides `unavailable()`, `unsupported(device, dtype)`,
# `scan` and `conv`; svp_bench/ops/reference.py is the model.
BACKENDS.add("cpu", "svp_bench.ops.cpu:scan", "fused vector kernels for CPUs, compiled by numba at the first call")
BACKENDS.add(
    "triton",
    "svp_bench.ops.triton:scan",
    "fused kernels for CUDA, both directions in one, compiled by Triton at the first call",
)
BACKENDS.add("mamba_ssm", "svp_bench.ops.mamba_ssm:scan", "the compiled CUDA packages mamba-ssm and causal-conv1d")
BACKENDS.add("reference", "svp_bench.ops.reference:scan", "plain PyTorch, any device; right rather than fast")


@dataclass(frozen=True)
class BackendStatus:
    """Availability of a backend on this machine.

    Attributes:
        name: The backend's name.
        summary: One line about it.
        reason: Why it cannot run here and how to fix that, or None if it can.
    """

    name: str
    summary: str
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether the backend can run here."""
        return self.reason is None


@cache
def backend_module(name: str) -> ModuleType:
    """Import the module of a backend."""
    return importlib.import_module(BACKENDS.entry(name).target.split(":")[0])


def list_backends() -> list[str]:
    """Return the names of all scan backends, in the order in which `auto` tries them."""
    return BACKENDS.names()


def require(name: str) -> None:
    """Check that a backend ("auto" always passes) exists and can run on this machine.

    Raises:
        UsageError: If the name is unknown; names the nearest.
        UnavailableError: If it cannot run here; gives the reason.
    """
    if name != "auto" and (reason := backend_module(name).unavailable()):
        raise UnavailableError(f"the scan backend {name!r} was asked for and cannot run here: {reason}")


def backend_statuses() -> list[BackendStatus]:
    """Return the availability of every scan backend, in the order in which `auto` tries them."""
    return [BackendStatus(e.name, e.summary, backend_module(e.name).unavailable()) for e in BACKENDS]
