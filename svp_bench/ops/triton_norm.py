"""The Triton backend around a block: prompts, residual addition and norm, in one kernel forward and one backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from svp_bench.ops import reference, triton_launch
from svp_bench.ops.triton_launch import DTYPES, power_of_two, spread, written

if TYPE_CHECKING:
    from svp_bench.ops.types import PromptTerms

__all__ = ["add_norm", "add_prompts"]

_TERMS = 2  # at most: SVP has one of each path

# No sizes follow from a measurement yet.
NORM = {"forward": 512, "backward": 256, "programs": 4096}  # elements of a row to a warp; programs of a backward pass
# Of a thread; left alone, the compiler spilled some for sm_100.
_REGISTERS: dict[str, dict[str, int]] = {"forward": {}, "backward": {"maxnreg": 128}}
_WIDEST = 16 * NORM["backward"]  # 512 threads can have 128 registers each


def _fits(*tensors: Tensor | None) -> bool:
    """Whether the kernels can take these rows; others use PyTorch's operators."""
    return all(t is None or (t.dtype in DTYPES and 0 < t.shape[-1] <= _WIDEST and t.numel() > 0) for t in tensors)


def add_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, prompts: PromptTerms | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch (and prompts) to the residual stream and norm it, in one pass; see reference.py."""
    terms = () if prompts is None else tuple(prompts.terms)
    excluded = None if prompts is None else prompts.excluded
    if len(terms) > _TERMS or not _fits(hidden, residual, weight, *(t for term in terms for t in term)):
        return reference.add_norm(hidden, residual, weight, eps, prompts)
    if residual is not None and residual.dtype != torch.float32:
        return reference.add_norm(hidden, residual, weight, eps, prompts)
    total, normed = _AddNorm.apply(hidden, residual, weight, eps, excluded, *(t for term in terms for t in term))
    return total, normed


def add_prompts(x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None) -> Tensor:
    """x + Σ scale ⊙ SiLU(pre) at every token but the excluded one, in one pass; see reference.py."""
    if len(terms) > _TERMS or not _fits(x, *(t for term in terms for t in term)):
        return reference.add_prompts(x, terms, excluded)
    out: Tensor = _AddPrompts.apply(x, excluded, *(t for term in terms for t in term))
    return out


class _AddNorm(torch.autograd.Function):
    """Keeps the stream, which the next block's branch is added to anyway, and what went into SiLU."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        excluded: int | None,
        *terms: Tensor,
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        total, normed = torch.ops.svp_bench.triton_norm(hidden, residual, weight, eps, terms, excluded)
        ctx.save_for_backward(total, weight, *terms)
        ctx.settings = (eps, excluded, hidden.dtype)
        return total, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: Tensor | None, dnormed: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, *terms = ctx.saved_tensors
        eps, excluded, dtype = ctx.settings
        wanted = [*ctx.needs_input_grad[:3], *ctx.needs_input_grad[5:]]
        dhidden, dresidual, dweight, *rest = _backward(
            dtotal, dnormed, total, weight, eps, terms, excluded, dtype, wanted
        )
        return (dhidden, dresidual, dweight, None, None, *rest)


class _AddPrompts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, excluded: int | None, *terms: Tensor) -> Tensor:
        (out,) = torch.ops.svp_bench.triton_norm(x, None, None, 0.0, terms, excluded)
        ctx.save_for_backward(*terms)
        ctx.excluded = excluded
        result: Tensor = out
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        wanted = [False, False, False, *ctx.needs_input_grad[2:]]
        _, _, _, *rest = _backward(dout, None, None, None, 0.0, ctx.saved_tensors, ctx.excluded, dout.dtype, wanted)
        return (dout if ctx.needs_input_grad[0] else None, None, *rest)


def _backward(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
    dtype: torch.dtype,
    wanted: list[bool],
) -> list[Tensor | None]:
    """The gradients of hidden (in its dtype), residual, weight and all terms, those that are wanted."""
    shared = wanted[0] and wanted[1] and dtype == torch.float32  # branch and stream get the same gradient
    asked = [wanted[0] and not shared, *wanted[1:]]
    if not any(asked):
        return [None for _ in asked]
    found = torch.ops.svp_bench.triton_norm_backward(
        dtotal, dnormed, total, weight, eps, terms, -1 if excluded is None else excluded, dtype, asked
    )
    grads = spread(found, asked)
    if shared:
        grads[0] = grads[1]
    return grads


# ---- the operators


def _kinds(hidden: Tensor, weight: Tensor | None) -> list[torch.dtype]:
    """The dtypes of the stream and the normed stream, or of the prompted tokens alone."""
    return [hidden.dtype] if weight is None else [torch.float32, hidden.dtype]


@torch.library.custom_op(
    "svp_bench::triton_norm",
    mutates_args=(),
    schema="(Tensor hidden, Tensor? residual, Tensor? weight, float eps, Tensor[] terms, int? excluded) -> Tensor[]",
)
def _norm_op(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
) -> list[Tensor]:
    """`terms`: scale and pre of each."""
    kinds = _kinds(hidden, weight)
    found = [hidden.new_empty(hidden.shape, dtype=written(kind)) for kind in kinds]
    forward(hidden, residual, weight, eps, terms, excluded, found)
    return [out.to(kind) for out, kind in zip(found, kinds, strict=True)]


@_norm_op.register_fake
def _(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int | None,
) -> list[Tensor]:
    return [hidden.new_empty(hidden.shape, dtype=kind) for kind in _kinds(hidden, weight)]


@torch.library.custom_op(
    "svp_bench::triton_norm_backward",
    mutates_args=(),
    schema=(
        "(Tensor? dtotal, Tensor? dnormed, Tensor? total, Tensor? weight, float eps, Tensor[] terms, int excluded, "
        "ScalarType dtype, bool[] wanted) -> Tensor[]"
    ),
)
def _norm_backward_op(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor]:
    """`wanted`: of hidden, residual, weight, then of each scale and pre."""
    return backward(dtotal, dnormed, total, weight, eps, terms, excluded, dtype, wanted)


@_norm_backward_op.register_fake
def _(
    dtotal: Tensor | None,
    dnormed: Tensor | None,
    total: Tensor | None,
    weight: Tensor | None,
    eps: float,
    terms: Sequence[Tensor],
    excluded: int,
    dtype: torch.dtype,
    wanted: Sequence[bool],
) -> list[Tensor]:
    like = _given(dtotal, dnormed)
    forms = [(like.shape, dtype), (like.shape, torch.float32)]
    forms += [(t.shape, t.dtype) for t in ([like[0, 0] if weight is None else weight, *terms])]
    return [like.new_empty(shape, dtype=kind) for (shape, kind), want in zip(forms, wanted, strict=True) if want]


# ---- the launches


def _given(*tensors: Tensor | None) -> Tensor:
    return next(t for t in tensors if t is not None)


def _shared(way: str, like: Tensor, terms: Sequence[Tensor], excluded: int | None, eps: float) -> dict[str, Any]:
    """The arguments that both kernels share."""
    width = like.shape[-1]
    block = power_of_two(width)
    arguments: dict[str, Any] = {
        "length": like.shape[1],
        "width": width,
        "excluded": -1 if excluded is None else excluded,
        "eps": eps,
        "BLOCK": block,
        "num_warps": max(1, block // NORM[way]),
        **_REGISTERS[way],
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
    wanted: Sequence[bool],
) -> list[Tensor]:
    """Launch the backward kernel and return the gradients that are wanted; see `_norm_backward_op`."""
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
