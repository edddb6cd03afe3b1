"""Kernels of the triton backend around a block: prompts, residual addition and norm, one pass forward and backward.

A program takes whole rows (tokens), so the sums of a norm stay inside it. The backward pass recomputes the scale of the
norm from the stream. As in triton_kernels.py, None arguments are compiled out, and sums over rows are partial sums.
"""

from __future__ import annotations

import triton
import triton.language as tl

from svp_bench.ops.triton_kernels import _sigmoid, _silu_and_slope

__all__ = ["norm_backward", "norm_forward"]


@triton.jit
def _read(pointer: tl.tensor, row: tl.tensor, width: tl.tensor, e: tl.tensor, mask: tl.tensor) -> tl.tensor:
    return tl.load(pointer + row * width + e, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _write(
    pointer: tl.tensor, row: tl.tensor, width: tl.tensor, e: tl.tensor, mask: tl.tensor, value: tl.tensor
) -> None:
    tl.store(pointer + row * width + e, value.to(pointer.dtype.element_ty), mask=mask)


@triton.jit
def _prompt(
    scale: tl.tensor, pre: tl.tensor, row: tl.tensor, width: tl.tensor, e: tl.tensor, mask: tl.tensor
) -> tl.tensor:
    x = _read(pre, row, width, e, mask)
    return _read(scale, 0, width, e, mask) * x * _sigmoid(x)


@triton.jit(do_not_specialize=["excluded"])
def norm_forward(
    hidden: tl.tensor,  # all tensors are (rows, width), contiguous
    residual: tl.tensor,
    scale0: tl.tensor,
    pre0: tl.tensor,
    scale1: tl.tensor,
    pre1: tl.tensor,
    weight: tl.tensor,  # (width,), or None for no norm
    total: tl.tensor,
    normed: tl.tensor,
    length: tl.tensor,
    width: tl.tensor,
    excluded: tl.tensor,  # the token without prompts, or -1
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Compute total = hidden + Σ scale ⊙ SiLU(pre) + residual and its RMSNorm. One program per row."""
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    mask = e < width
    x = _read(hidden, row, width, e, mask)
    if pre0 is not None:
        prompts = _prompt(scale0, pre0, row, width, e, mask)
        if pre1 is not None:
            prompts += _prompt(scale1, pre1, row, width, e, mask)
        x += tl.where(row % length == excluded, 0.0, prompts)
    if residual is not None:
        x += _read(residual, row, width, e, mask)
    _write(total, row, width, e, mask, x)
    if weight is not None:
        scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
        _write(normed, row, width, e, mask, x * scale * _read(weight, 0, width, e, mask))


@triton.jit
def _prompt_back(
    d: tl.tensor,
    scale: tl.tensor,
    pre: tl.tensor,
    dpre: tl.tensor,
    row: tl.tensor,
    width: tl.tensor,
    e: tl.tensor,
    mask: tl.tensor,
) -> tl.tensor:
    """Write the gradient of `pre`; return this row's contribution to that of `scale`."""
    x = _read(pre, row, width, e, mask)
    silu, slope = _silu_and_slope(x)
    if dpre is not None:
        _write(dpre, row, width, e, mask, d * _read(scale, 0, width, e, mask) * slope)
    return d * silu


@triton.jit(do_not_specialize=["excluded"])
def norm_backward(
    total: tl.tensor,  # all tensors are (rows, width), contiguous
    weight: tl.tensor,
    dtotal: tl.tensor,
    dnormed: tl.tensor,
    scale0: tl.tensor,
    pre0: tl.tensor,
    dscale0: tl.tensor,  # (programs, width) float32
    dpre0: tl.tensor,
    scale1: tl.tensor,
    pre1: tl.tensor,
    dscale1: tl.tensor,
    dpre1: tl.tensor,
    dhidden: tl.tensor,
    dresidual: tl.tensor,
    dweight: tl.tensor,  # (programs, width) float32
    rows: tl.tensor,
    each: tl.tensor,  # rows of a program
    length: tl.tensor,
    width: tl.tensor,
    excluded: tl.tensor,
    eps: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Compute the gradients of `norm_forward` that are not None; `dtotal` or `dnormed` None is zero."""
    program = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    fits = e < width
    sum_scale0 = tl.zeros([BLOCK], tl.float32)
    sum_scale1 = tl.zeros([BLOCK], tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    first = program * each
    for row in range(first, tl.minimum(first + each, rows)):
        d = tl.zeros([BLOCK], tl.float32)
        if dnormed is not None:
            x = _read(total, row, width, e, fits)
            g = _read(dnormed, row, width, e, fits)
            scale = tl.rsqrt(tl.sum(x * x, axis=0) / width + eps)
            x *= scale
            if dweight is not None:
                sum_weight += g * x
            g *= _read(weight, 0, width, e, fits)
            d = scale * (g - x * (tl.sum(g * x, axis=0) / width))
        if dtotal is not None:
            d += _read(dtotal, row, width, e, fits)
        if dresidual is not None:
            _write(dresidual, row, width, e, fits, d)
        if dhidden is not None:
            _write(dhidden, row, width, e, fits, d)
        if pre0 is not None:
            d = tl.where(row % length == excluded, 0.0, d)
            sum_scale0 += _prompt_back(d, scale0, pre0, dpre0, row, width, e, fits)
            if pre1 is not None:
                sum_scale1 += _prompt_back(d, scale1, pre1, dpre1, row, width, e, fits)
    if dscale0 is not None:
        _write(dscale0, program, width, e, fits, sum_scale0)
    if dscale1 is not None:
        _write(dscale1, program, width, e, fits, sum_scale1)
    if dweight is not None:
        _write(dweight, program, width, e, fits, sum_weight)
