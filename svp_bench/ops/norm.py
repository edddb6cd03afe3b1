"""Autograd of prompts, residual addition and norm, shared by the backends with kernels for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svp_bench.ops import reference
from svp_bench.ops.types import Flags, PromptTerms, Tensors

_Forward = Callable[
    [Tensor, Tensor | None, Tensor | None, float, Sequence[Tensor], int | None],
    tuple[Sequence[Tensor], Sequence[Tensor]],
]
_Backward = Callable[
    [Tensors, Sequence[Tensor], Sequence[Tensor], float, int | None, torch.dtype, Flags],
    Tensors,
]


def norm_functions(
    supported: Callable[..., bool], run_forward: _Forward, run_backward: _Backward
) -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    """Build the `add_norm` and `add_prompts` of a backend. Terms are the scale and pre-activation of each prompt.

    Args:
        supported: (hidden, residual, weight, *terms) → whether the kernels take them; else the reference runs.
        run_forward: (hidden, residual, weight, eps, terms, excluded) → the outputs and the tensors to save. The outputs
            are stream and normed stream, or, if the weight is None, the prompted tokens, with nothing to save.
        run_backward: (gradients, saved, terms, eps, excluded, dtype of hidden, wanted) → the gradients of hidden,
            residual, weight and terms. The gradient of an unused output is None.
    """

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            hidden: Tensor,
            residual: Tensor | None,
            weight: Tensor | None,
            eps: float,
            excluded: int | None,
            *terms: Tensor,
        ) -> tuple[Tensor, ...]:
            ctx.set_materialize_grads(False)
            outs, saved = run_forward(hidden, residual, weight, eps, terms, excluded)
            ctx.settings = (eps, excluded, hidden.dtype, len(saved))
            ctx.save_for_backward(*saved, *terms)
            return tuple(outs)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            eps, excluded, dtype, count = ctx.settings
            tensors = ctx.saved_tensors
            wanted = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:]]
            dhidden, dresidual, dweight, *dterms = run_backward(
                grads, tensors[:count], tensors[count:], eps, excluded, dtype, wanted
            )
            return (dhidden, dresidual, dweight, None, None, *dterms)

    def add_norm(
        hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, prompts: PromptTerms | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add a branch and prompts to the residual stream and norm it, in one pass; see reference.py."""
        pairs, excluded = prompts or ((), None)
        terms = [t for pair in pairs for t in pair]
        if not supported(hidden, residual, weight, *terms):
            return reference.add_norm(hidden, residual, weight, eps, prompts)
        total, normed = Norm.apply(hidden, residual, weight, eps, excluded, *terms)
        return total, normed

    def add_prompts(x: Tensor, pairs: Sequence[tuple[Tensor, Tensor]], excluded: int | None) -> Tensor:
        """Return x + Σ scale ⊙ SiLU(pre) at every token but the excluded one, in one pass; see reference.py."""
        terms = [t for pair in pairs for t in pair]
        if not supported(x, None, None, *terms):
            return reference.add_prompts(x, pairs, excluded)
        (out,) = Norm.apply(x, None, None, 0.0, excluded, *terms)
        result: Tensor = out
        return result

    return add_norm, add_prompts
