"""Multiplications of the operations of this package, for counting the cost of a model without computing it.

A multiplication with or without an addition counts as one MAC; sums, exponentials and divisions do not count, nor what
a backend computes again in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svp_bench.ops.types import Direction


def scan_macs(length: int, channels: int, states: int, *, backward: bool = False, trains_a: bool = False) -> int:
    """Return the MACs of a selective scan over one sequence in one direction, without its gate.

    Forward, per step and channel: Δ A, exp(Δ A) h, (Δ u) B and C h for each state, then Δ u and D u: 4 N + 2.
    Backward, for each state: the gradient of h from y and from the next step, of C, of exp(Δ A), of Δ A, of Δ by way of
    A, of B, of Δ u, and of A if it trains; then of Δ and u by way of Δ u, and of D and u by way of D u: 8 N + 4, and N.
    """
    per_step = (8 + trains_a) * states + 4 if backward else 4 * states + 2
    return length * channels * per_step


class MacCounter:
    """Count of MACs of scans and convolutions in `counting`.

    Attributes:
        macs: So far, backward passes included.
    """

    def __init__(self) -> None:
        self.macs = 0

    def scan(self, directions: Sequence[Direction], z: Tensor | None) -> Tensor:
        """Count a scan, and return a tensor of its output's shape whose gradient reaches all inputs."""
        batch, length, channels = directions[0].u.shape
        sizes = batch * length, channels, directions[0].A.shape[-1]
        trains_a = any(direction.A.requires_grad for direction in directions)
        gate = 0 if z is None else batch * length * channels
        forward = len(directions) * scan_macs(*sizes) + gate
        backward = len(directions) * scan_macs(*sizes, backward=True, trains_a=trains_a) + 2 * gate
        inputs = [tensor for direction in directions for tensor in direction if tensor is not None]
        (y,) = self._call((directions[0].u.shape,), forward, backward, [*inputs, *([] if z is None else [z])])
        return y

    def conv(self, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """Count causal convolutions of x (B, L, E), one a weight (E, W); see `scan`."""
        forward = sum(x.numel() * weight.shape[-1] for weight in weights)
        backward = sum(x.numel() * weight.shape[-1] * (1 + weight.requires_grad) for weight in weights)
        inputs = [x, *weights, *(bias for bias in biases if bias is not None)]
        return self._call((x.shape,) * len(weights), forward, backward, inputs)

    def _call(
        self, shapes: Sequence[torch.Size], forward: int, backward: int, inputs: list[Tensor]
    ) -> tuple[Tensor, ...]:
        self.macs += forward
        made: tuple[Tensor, ...] = _Counted.apply(self, shapes, backward, *inputs)
        return made


class _Counted(torch.autograd.Function):
    """An operation that computes nothing: outputs of given shapes, and gradients of zero for all inputs."""

    @staticmethod
    def forward(ctx: Any, counter: MacCounter, shapes: Sequence[torch.Size], backward: int, *inputs: Tensor) -> Any:
        ctx.counter, ctx.backward_macs = counter, backward
        ctx.save_for_backward(*inputs)
        return tuple(inputs[0].new_zeros(shape) for shape in shapes)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        ctx.counter.macs += ctx.backward_macs
        needed = ctx.needs_input_grad[3:]
        zeros = (torch.zeros_like(x) if wanted else None for x, wanted in zip(ctx.saved_tensors, needed, strict=True))
        return None, None, None, *zeros


_ACTIVE: list[MacCounter] = []


@contextmanager
def counting() -> Iterator[MacCounter]:
    """Count the MACs of scans and convolutions in the block instead of computing them; their values are zeros."""
    counter = MacCounter()
    _ACTIVE.append(counter)
    try:
        yield counter
    finally:
        _ACTIVE.remove(counter)


def active() -> MacCounter | None:
    """Return the counter of the innermost `counting` block, or None."""
    return _ACTIVE[-1] if _ACTIVE else None
