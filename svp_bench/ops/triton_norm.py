"""The Triton backend around a block: prompts, residual addition and norm, one kernel forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from svp_bench.ops import triton_launch
from svp_bench.ops.norm import norm_functions
from svp_bench.ops.triton_launch import DTYPES, operator, power_of_two, spread, written
from svp_bench.ops.types import Flags, Tensors

_TERMS = 2  # at most: SVP has one of each path

NORM = {"forward": 512, "backward": 256, "programs": 4096}  # elements of a row per warp; programs of a backward pass
# Registers per thread; without the limit the compiler spilled for sm_100.
_REGISTERS: dict[str, dict[str, int]] = {"forward": {}, "backward": {"maxnreg": 128}}
_WIDEST = 16 * NORM["backward"]  # 512 threads can have 128 registers each


def _supported(hidden: Tensor, residual: Tensor | None, weight: Tensor | None, *terms: Tensor) -> bool:
    """Whether the kernels support these rows."""
    if len(terms) > 2 * _TERMS or (residual is not None and residual.dtype != torch.float32):
        return False
    tensors = (hidden, residual, weight, *terms)
    return all(t is None or (t.dtype in DTYPES and 0 < t.shape[-1] <= _WIDEST and t.numel() > 0) for t in tensors)


def _norm_forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
) -> tuple[Sequence[Tensor], list[Tensor]]:
    outs = torch.ops.svp_bench.triton_norm(hidden, residual, weight, eps, terms, excluded)
    return outs, [] if weight is None else [outs[0], weight]


def _norm_backward(
    grads: Tensors,
    saved: Sequence[Tensor],
    terms: Sequence[Tensor],
    eps: float,
    excluded: int | None,
    dtype: torch.dtype,
    wanted: Flags,
) -> list[Tensor | None]:
    total, weight = saved or (None, None)
    dtotal, dnormed = grads if saved else (grads[0], None)
    # gradients of branch and stream are equal, and that of prompted tokens equals the gradient of the output
    equal = wanted[0] and (len(saved) == 0 or (wanted[1] and dtype == torch.float32))
    needed = [wanted[0] and not equal, *wanted[1:]]
    found: list[Tensor | None] = [None for _ in needed]
    if any(needed):
        place = -1 if excluded is None else excluded
        operation = torch.ops.svp_bench.triton_norm_backward
        found = spread(operation(dtotal, dnormed, total, weight, eps, terms, place, dtype, needed), needed)
    if equal:
        found[0] = found[1] if saved else dtotal
    return found


add_norm, add_prompts = norm_functions(_supported, _norm_forward, _norm_backward)


def _kinds(hidden: Tensor, weight: Tensor | None) -> list[torch.dtype]:
    """Return the dtypes of the stream and the normed stream, or of the prompted tokens alone."""
    return [hidden.dtype] if weight is None else [torch.float32, hidden.dtype]


def _norm_op(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
) -> list[Tensor]:
    kinds = _kinds(hidden, weight)
    found = [hidden.new_empty(hidden.shape, dtype=written(kind)) for kind in kinds]
    forward(hidden, residual, weight, eps, terms, excluded, found)
    return [out.to(kind) for out, kind in zip(found, kinds, strict=True)]


def _given(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None)


def _norm_backward_shapes(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int,
    dtype: torch.dtype,
    wanted: Flags,
) -> list[Tensor]:
    like = _given(dtotal, dnormed)
    forms = [(like.shape, dtype), (like.shape, torch.float32)]
    forms += [(t.shape, t.dtype) for t in ([like[0, 0] if weight is None else weight, *terms])]
    return [like.new_empty(shape, dtype=kind) for (shape, kind), want in zip(forms, wanted, strict=True) if want]


def _shared(kind: str, like: Tensor, terms: Sequence[Tensor], excluded: int | None, eps: float) -> dict[str, Any]:
    """Return the arguments of both kernels."""
    width = like.shape[-1]
    block = power_of_two(width)
    arguments: dict[str, Any] = {
        "length": like.shape[1],
        "width": width,
        "excluded": -1 if excluded is None else excluded,
        "eps": eps,
        "BLOCK": block,
        "num_warps": max(1, block // NORM[kind]),
        **_REGISTERS[kind],
    }
    for k in range(_TERMS):
        own = terms[2 * k : 2 * k + 2] or (None, None)
        arguments |= {f"{name}{k}": _whole(t) for name, t in zip(("scale", "pre"), own, strict=True)}
    return arguments


def _whole(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def forward(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
    outs: Sequence[Tensor],
) -> None:
    """Launch the forward kernel; `outs` are the stream and the normed stream, or the prompted tokens alone."""
    own = {"hidden": _whole(hidden), "residual": _whole(residual), "weight": _whole(weight), "total": outs[0]}
    own["normed"] = None if weight is None else outs[1]
    rows = hidden.shape[0] * hidden.shape[1]
    triton_launch.launch("norm_forward", rows, {**_shared("forward", hidden, terms, excluded, eps), **own})


def backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int,
    dtype: torch.dtype,
    wanted: Flags,
) -> list[Tensor]:
    """Launch the backward kernel; return the wanted gradients, of hidden, residual, weight and terms."""
    like = _given(dtotal, dnormed)
    rows, width = like.shape[0] * like.shape[1], like.shape[-1]
    each = -(-rows // NORM["programs"])
    programs = -(-rows // each)
    own: dict[str, Any] = {"dtotal": _whole(dtotal), "dnormed": _whole(dnormed), "rows": rows, "each": each}
    own |= {"total": _whole(total), "weight": _whole(weight)}
    names = ["dhidden", "dresidual", "dweight", *(f"{n}{k}" for k in range(_TERMS) for n in ("dscale", "dpre"))]
    kinds = [dtype, torch.float32, None if weight is None else weight.dtype, *(t.dtype for t in terms)]
    for place, name in enumerate(names):
        if place >= len(wanted) or not wanted[place]:
            own[name] = None
        elif name == "dweight" or name.startswith("dscale"):
            own[name] = like.new_empty(programs, width, dtype=torch.float32)
        else:
            kind = kinds[place]
            assert kind is not None
            own[name] = like.new_empty(like.shape, dtype=written(kind))
    triton_launch.launch("norm_backward", programs, {**_shared("backward", like, terms, excluded, eps), **own})
    found = []
    for name, kind, want in zip(names, kinds, wanted, strict=False):
        if want:
            value: Tensor = own[name]
            found.append((value.sum(dim=0) if value.ndim == 2 else value).to(kind))
    return found


operator(
    "triton_norm(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] terms, int? excluded)"
    " -> Tensor[]",
    _norm_op,
    lambda hidden, residual, weight, *rest: [hidden.new_empty(hidden.shape, dtype=d) for d in _kinds(hidden, weight)],
)
operator(
    "triton_norm_backward(Tensor? dtotal, Tensor? dnormed, Tensor? total, Tensor? weight, float eps, Tensor[] terms, "
    "int excluded, ScalarType dtype, bool[] wanted) -> Tensor[]",
    backward,
    _norm_backward_shapes,
)
