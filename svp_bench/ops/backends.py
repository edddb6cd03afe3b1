"""Which scan backends exist, and whether each can run here. No torch until a backend is probed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from svp_bench.core.errors import UnavailableError
from svp_bench.core.registry import Registry

__all__ = ["BACKENDS", "BackendStatus", "backend_statuses", "list_backends", "require"]

BACKENDS = Registry("scan backend", listing="svp-bench doctor")
# In the order in which `auto` tries them. A backend module offers `unavailable()`, `unsupported(device, dtype)`,
# `scan` and `conv`; svp_bench/ops/reference.py is the model to follow.
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
    """Whether a backend can run on this machine.

    Attributes:
        name: The backend's name.
        summary: One line about it.
        reason: Why it cannot run here and what would mend that, or None if it can.
    """

    name: str
    summary: str
    reason: str | None

    @property
    def available(self) -> bool:
        """Whether the backend can run here."""
        return self.reason is None


def list_backends() -> list[str]:
    """Return the names of all scan backends, in the order in which `auto` tries them."""
    return BACKENDS.names()


def require(name: str) -> None:
    """Check that a backend asked for by name ("auto" is always fine) exists and can run on this machine.

    Raises:
        UsageError: If there is none of that name; names the nearest.
        UnavailableError: If it cannot run here; gives the reason.
    """
    if name != "auto":
        module = importlib.import_module(BACKENDS.entry(name).target.split(":")[0])
        if reason := module.unavailable():
            raise UnavailableError(f"the scan backend {name!r} was asked for and cannot run here: {reason}")


def backend_statuses() -> list[BackendStatus]:
    """Return every scan backend with its availability on this machine, in the order in which `auto` tries them."""
    rows = []
    for entry in BACKENDS:
        module = importlib.import_module(entry.target.split(":")[0])
        rows.append(BackendStatus(entry.name, entry.summary, module.unavailable()))
    return rows
