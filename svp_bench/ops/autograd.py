"""Autograd of scan and convolution, shared by the backends that compute their gradients themselves.

`tensors` are z and the seven fields of each direction; `wanted` states for each whether its gradient is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svp_bench.ops.types import Direction, Flags, Recompute, Tensors

FIELDS = 7  # tensors of a Direction


def scan_function(
    run_forward: Callable[[Tensors, Flags, bool, bool], tuple[Tensor, Sequence[Tensor]]],
    run_backward: Callable[[Tensor, Tensors, Sequence[Tensor], Flags, bool, Flags], Tensors],
) -> Callable[..., Tensor]:
    """Build the `scan` of a backend.

    Args:
        run_forward: (tensors, reverse, softplus, save) → the output and the states to save for the backward pass.
        run_backward: (gradient, tensors, states, reverse, softplus, wanted) → the gradients of the tensors.
    """

    class Scan(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            reverse: tuple[bool, ...],
            softplus: bool,
            recompute: Recompute | None,
            z: Tensor | None,
            *flat: Tensor | None,
        ) -> Tensor:
            out, states = run_forward([z, *flat], reverse, softplus, any(ctx.needs_input_grad))
            saved = list(flat)
            if recompute is not None:
                saved = [*(None if i % FIELDS == 0 else t for i, t in enumerate(flat)), *recompute.inputs]
            ctx.settings = (reverse, softplus, None if recompute is None else recompute.function, len(saved))
            ctx.save_for_backward(z, *saved, *states)
            return out

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            reverse, softplus, function, count = ctx.settings
            z, *saved = ctx.saved_tensors  # read once, as gradient checkpointing requires
            states, flat, inputs = saved[count:], saved[: FIELDS * len(reverse)], saved[FIELDS * len(reverse) : count]
            if function is not None:
                flat[::FIELDS] = [u.detach() for u in function(*inputs)]
            wanted = ctx.needs_input_grad[3:]
            return (None, None, None, *run_backward(grad, [z, *flat], states, reverse, softplus, wanted))

    def scan(
        directions: Sequence[Direction],
        reverse: Flags,
        z: Tensor | None,
        softplus: bool,
        recompute: Recompute | None = None,
    ) -> Tensor:
        """Return the mean over K directions of their selective scans, gated by SiLU(z).

        Args:
            directions: K directions, each in the natural token order.
            reverse: Whether each runs from the last token to the first.
            z: Gate (B, L, E), or None.
            softplus: Apply the softplus to delta + delta_bias.
            recompute: How to compute the `u` of all directions again; if given they are not saved.

        Returns:
            (B, L, E) in the dtype of the first `u`.
        """
        flat = [tensor for direction in directions for tensor in direction]
        y: Tensor = Scan.apply(tuple(reverse), softplus, recompute, z, *flat)
        return y

    return scan


def conv_function(
    run_forward: Callable[[Tensor, Tensors, Flags, bool], Sequence[Tensor]],
    run_backward: Callable[[Sequence[Tensor], Tensor, Tensors, Flags, bool, Flags], Tensors],
) -> Callable[..., tuple[Tensor, ...]]:
    """Build the `conv` of a backend. It saves its input only and recomputes the rest in the backward pass.

    Args:
        run_forward: (x, weights and biases, reverse, silu) → one output per direction.
        run_backward: (gradients, x, weights and biases, reverse, silu, wanted) → the gradients of x and the parameters.
    """

    class Conv(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, reverse: tuple[bool, ...], silu: bool, *parameters: Tensor | None
        ) -> tuple[Tensor, ...]:
            ctx.settings = (reverse, silu)
            ctx.save_for_backward(x, *parameters)
            outs = run_forward(x, parameters, reverse, silu)
            need_x, need, count = ctx.needs_input_grad[0], ctx.needs_input_grad[3:], len(reverse)
            ctx.mark_non_differentiable(*[o for i, o in enumerate(outs) if not (need_x or need[i] or need[count + i])])
            return tuple(outs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            reverse, silu = ctx.settings
            x, *parameters = ctx.saved_tensors
            wanted = [ctx.needs_input_grad[0], *ctx.needs_input_grad[3:]]
            dx, *rest = run_backward(grads, x, parameters, reverse, silu, wanted)
            return (dx, None, None, *rest)

    def conv(x: Tensor, weights: Sequence[Tensor], biases: Tensors, reverse: Flags, silu: bool) -> tuple[Tensor, ...]:
        """Return the depth-wise causal convolution of the same input in each direction, with SiLU if `silu`.

        Args:
            x: (B, L, E).
            weights: K weights (E, W).
            biases: K biases (E,), or None.
            reverse: Whether each direction runs from the last token to the first.
            silu: Apply SiLU.

        Returns:
            K tensors (B, L, E).
        """
        outs: tuple[Tensor, ...] = Conv.apply(x, tuple(reverse), silu, *weights, *biases)
        return outs

    return conv
