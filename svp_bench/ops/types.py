"""Argument and result types of the operations. Letters: B batch, L length, E channels, N state size, D width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

Tensors = Sequence[Tensor | None]
Flags = Sequence[bool]


class BackendChoice(NamedTuple):
    """A scan backend and the reason it was selected."""

    name: str
    reason: str


class Direction(NamedTuple):
    """Inputs of one direction of the scan, channels last.

    Attributes:
        u: Input after the convolution, (B, L, E).
        delta: Step sizes before bias and softplus, (B, L, E).
        A: State matrix, (E, N), negative.
        B: Input matrix, (B, L, N).
        C: Output matrix, (B, L, N).
        D: Skip weight, (E,).
        delta_bias: Added to `delta` before the softplus, (E,).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    delta_bias: Tensor | None


class Recompute(NamedTuple):
    """How to compute the `u` of all directions again in the backward pass.

    Attributes:
        function: inputs → the `u` of all directions; builds no graph.
        inputs: Its arguments, weights included. Autograd saves them, so it detects changes in place, and saved-tensor
            hooks (gradient checkpointing, offloading) see them.
    """

    function: Callable[..., Sequence[Tensor]]
    inputs: tuple[Tensor | None, ...]


class PromptTerms(NamedTuple):
    """Prompts that are not added yet: Σ scale ⊙ SiLU(pre).

    Attributes:
        terms: Pairs of a scale (D,) and the pre-activation (B, L, D).
        excluded: The token without a prompt, or None.
    """

    terms: Sequence[tuple[Tensor, Tensor]]
    excluded: int | None
