"""Compare every available backend with the reference on a small problem, for `svp-bench doctor`."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import Tensor

from svp_bench.ops.backends import backend_module, backend_statuses
from svp_bench.ops.interface import add_norm, bidirectional_conv, bidirectional_scan
from svp_bench.ops.types import Direction, PromptTerms

_TOLERANCE = 1e-5  # relative to the largest value of each tensor, float32 against float64


class SelfTest(NamedTuple):
    """Result of one backend on one device.

    Attributes:
        name: The backend.
        device: "cpu" or "cuda".
        error: Largest relative error of the outputs and all gradients.
        seconds: Of the second call; the first may compile.
        first: Seconds of the first call.
    """

    name: str
    device: str
    error: float
    seconds: float
    first: float

    @property
    def passed(self) -> bool:
        """Whether the error is within float32's rounding."""
        return self.error < _TOLERANCE


def self_test() -> list[SelfTest]:
    """Run every available backend on a small problem, forward and backward, against the reference in float64."""
    exact = _run("reference", "cpu", torch.float64)
    devices = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    results = []
    for name in (status.name for status in backend_statuses() if status.available):
        for device in devices:
            if backend_module(name).unsupported(device, torch.float32) is not None:
                continue
            times = []
            for _ in range(2):
                start = time.perf_counter()
                found = _run(name, device, torch.float32)
                times.append(time.perf_counter() - start)
            error = max(_error(a, b) for a, b in zip(found, exact, strict=True))
            results.append(SelfTest(name, device, error, times[1], times[0]))
    return results


def _error(found: Tensor, exact: Tensor) -> float:
    found = found.cpu().double()
    return float((found - exact).abs().max() / exact.abs().max()) if torch.isfinite(found).all() else float("inf")


def _run(backend: str, device: str, dtype: torch.dtype) -> list[Tensor]:
    """Return outputs and gradients of the operations of the model."""
    batch, length, channels, states, width = 2, 61, 48, 16, 4
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, shift: float = 0.0) -> Tensor:
        values = torch.randn(*shape, generator=generator, dtype=torch.float64) + shift
        return values.to(device=device, dtype=dtype).requires_grad_()

    def direction(u: Tensor) -> Direction:
        A = (-torch.arange(1.0, states + 1).repeat(channels, 1)).to(device=device, dtype=dtype).requires_grad_()
        delta = draw(batch, length, channels, shift=-3.0)
        B, C = draw(batch, length, states), draw(batch, length, states)
        return Direction(u, delta, A, B, C, draw(channels), draw(channels))

    x, z = draw(batch, length, channels), draw(batch, length, channels)
    weights = [(draw(channels, width), draw(channels)) for _ in range(2)]
    u, u_b = bidirectional_conv(x, weights[0], weights[1], backend=backend)
    forward, backward = direction(u), direction(u_b)
    y = bidirectional_scan(forward, backward, z, backend=backend)
    leaves = [x, z, *weights[0], *weights[1], *forward[1:], *backward[1:]]
    gradients = torch.autograd.grad(y.square().sum(), [t for t in leaves if t is not None])
    branch, stream, weight = draw(batch, length, channels), draw(batch, length, channels), draw(channels)
    terms = [(draw(channels), draw(batch, length, channels)) for _ in range(2)]
    total, normed = add_norm(branch, stream, weight, 1e-5, PromptTerms(terms, length // 2), backend=backend)
    rows = [branch, stream, weight, *(t for term in terms for t in term)]
    slopes = torch.autograd.grad(total.square().sum() + normed.square().sum() + normed.sum(), rows)
    results = [u, u_b, y, total, normed]
    return [*(t.detach() for t in results), *gradients, *slopes]
