"""The backend of the compiled CUDA packages: mamba-ssm's scan and causal-conv1d's convolution.

They compute one direction, channels first, so this backend flips and transposes. It is not the fused path of Vim's fork
of mamba-ssm, which is in no package index.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_bench.ops.types import Direction, Flags, Recompute, Tensors


@cache
def _functions() -> tuple[Callable[..., Any], Callable[..., Any]] | str:
    """Return the two functions, or why they are not available."""
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_cuda, selective_scan_fn
    except Exception as error:  # these packages import CUDA code at the top, which raises many kinds
        return (
            f"mamba_ssm cannot be imported ({type(error).__name__}: {error}); on a machine with CUDA: "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation 'svp-bench[cuda]'"
        )
    if selective_scan_cuda is None:
        return (
            "mamba_ssm has no Mamba-1 kernel, which 2.3 and later build only on request: "
            "MAMBA_KEEP_CUDA_BUILD=TRUE pip install --no-build-isolation --force-reinstall --no-deps mamba-ssm"
        )
    try:
        from causal_conv1d import causal_conv1d_fn
    except Exception as error:
        return (
            f"causal_conv1d cannot be imported ({type(error).__name__}: {error}); on a machine with CUDA: "
            "pip install --no-build-isolation causal-conv1d"
        )
    return selective_scan_fn, causal_conv1d_fn


def unavailable() -> str | None:
    """Return why the packages cannot be used on this machine, or None if they can."""
    found = _functions()
    if isinstance(found, str):
        return found
    return None if torch.cuda.is_available() else "it needs a CUDA device, and torch sees none"


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Return why the packages cannot take such tensors, or None if they can."""
    if device != "cuda":
        return f"it runs on CUDA devices, not on {device}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"it takes float32, float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
    return None


def scan(
    directions: Sequence[Direction],
    reverse: Flags,
    z: Tensor | None,
    softplus: bool,
    recompute: Recompute | None = None,  # unused: its kernel decides what is saved
) -> Tensor:
    """Return the mean over the directions of their selective scans, gated by SiLU(z); see autograd.py."""
    found = _functions()
    assert not isinstance(found, str)
    total: Tensor | None = None
    for direction, back in zip(directions, reverse, strict=True):
        u, delta, A, B, C, D, bias = direction
        rows = [(t.flip(1) if back else t).mT.contiguous() for t in (u, delta, B, C)]
        wide = [None if t is None else t.float() for t in (A, D, bias)]
        y = found[0](rows[0], rows[1], wide[0], rows[2], rows[3], wide[1], None, wide[2], softplus).mT
        y = y.flip(1) if back else y
        total = y if total is None else total + y
    assert total is not None
    mean = total / len(directions)
    return mean if z is None else mean * F.silu(z)


def conv(x: Tensor, weights: Sequence[Tensor], biases: Tensors, reverse: Flags, silu: bool) -> tuple[Tensor, ...]:
    """Return the depth-wise causal convolution of the same input in each direction; see autograd.py."""
    found = _functions()
    assert not isinstance(found, str)
    outs = []
    for weight, bias, back in zip(weights, biases, reverse, strict=True):
        row = (x.flip(1) if back else x).mT.contiguous()
        y = found[1](
            row, weight.to(x.dtype), None if bias is None else bias.to(x.dtype), activation="silu" if silu else None
        ).mT
        outs.append(y.flip(1) if back else y)
    return tuple(outs)
