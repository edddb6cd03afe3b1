"""Which scan backends exist, and whether each can run here. No torch until a backend is probed."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

from svp_bench.registry import Registry

__all__ = ["BACKENDS", "BackendStatus", "list_backends"]

BACKENDS = Registry("scan backend", listing="svp-bench doctor")
# In the order in which `auto` tries them. A backend module offers `unavailable()`, `unsupported(device, dtype)`,
# `scan` and `conv`; svp_bench/ops/reference.py is the model to follow.
BACKENDS.add("cpu", "svp_bench.ops.cpu:scan", "fused vector kernels for CPUs, compiled by numba at the first call")
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


def list_backends() -> list[BackendStatus]:
    """Return every scan backend with its availability on this machine, in the order in which `auto` tries them."""
    rows = []
    for entry in BACKENDS:
        module = importlib.import_module(entry.target.split(":")[0])
        rows.append(BackendStatus(entry.name, entry.summary, module.unavailable()))
    return rows
