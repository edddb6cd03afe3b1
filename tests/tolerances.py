"""How near is near enough: one table for all comparisons of numbers, each entry with its reason.

Errors are relative to the largest entry of the expected tensor: max|a - b| / max|b|. A sum of many terms loses digits
against its largest terms, so small entries cannot be asked to be right to their own last digit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    """Largest relative error of results and of gradients."""

    forward: float
    backward: float


# The ops against a naive float64 recurrence on the same (already rounded) inputs.
OPS = {
    # 53 bits, up to 200 steps: 1e-14 is usual; the rest allows another order of summation.
    torch.float64: Tolerance(1e-12, 1e-12),
    # Unit roundoff 6e-8. A state passes through up to 197 multiplications, which costs some tens of units; gradients of
    # A, D and the bias sum over batch and length on top of that.
    torch.float32: Tolerance(2e-6, 5e-6),
    # Everything between is float32, so what is left is one rounding to 8 bits: at most 2^-8 of the largest entry, and
    # another order is not allowed.
    torch.bfloat16: Tolerance(2**-8, 2**-8),
}

# A whole float32 backbone, with or without prompts, against float64. Some hundred roundings deep; a norm eps of 1e-6 in
# place of 1e-5 exceeds these bounds by far (test_vim.py shows it).
BACKBONE = Tolerance(2e-5, 5e-5)

# The same float32 maths in another order: other chunks, other batches, another class of the same formula.
SAME_MATHS = 1e-5


def relative_error(given: Tensor, expected: Tensor) -> float:
    """max|given - expected| / max|expected|, in float64; NaN or infinity in either is an infinite error."""
    assert given.shape == expected.shape, f"shape {tuple(given.shape)}, expected {tuple(expected.shape)}"
    if expected.numel() == 0:
        return 0.0
    given, expected = given.detach().double(), expected.detach().double()
    if not (given.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    difference, scale = (given - expected).abs().max().item(), expected.abs().max().item()
    if scale == 0.0:
        return 0.0 if difference == 0.0 else float("inf")
    return difference / scale
