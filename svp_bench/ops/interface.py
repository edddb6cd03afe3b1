"""The front functions: argument checks, choice of a backend, and the layouts that callers know.

Letters: B batch, L length (tokens), E channels (mamba's `dim`), N state size, W convolution width.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from svp_bench.core.errors import UnavailableError
from svp_bench.ops import traceable
from svp_bench.ops.backends import BACKENDS
from svp_bench.ops.types import BackendChoice, Direction, PromptTerms, Recompute

__all__ = [
    "BackendChoice",
    "Direction",
    "PromptTerms",
    "Recompute",
    "add_norm",
    "add_prompts",
    "bidirectional_conv",
    "bidirectional_scan",
    "causal_conv1d",
    "choose",
    "is_tracing",
    "selective_scan",
]


_LOADED: dict[str, ModuleType] = {}


@cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(BACKENDS.entry(name).target.split(":")[0])


@cache
def _choose(name: str, device: str, dtype: torch.dtype) -> BackendChoice:
    if name != "auto":
        module = _module(name)
        reason = module.unavailable() or module.unsupported(device, dtype)
        if reason:
            raise UnavailableError(f"the scan backend {name!r} was asked for and cannot run here: {reason}")
        return BackendChoice(name, "asked for by name")
    skipped: list[str] = []
    for entry in BACKENDS:
        module = _module(entry.name)
        reason = module.unavailable() or module.unsupported(device, dtype)
        if reason is None:
            why = f"auto: the first that runs on {device} with {str(dtype).removeprefix('torch.')}"
            return BackendChoice(entry.name, "; ".join([why, *skipped]))
        skipped.append(f"{entry.name}: {reason}")
    raise UnavailableError("no scan backend can run here: " + "; ".join(skipped))


def choose(backend: str, device: torch.device | str, dtype: torch.dtype) -> BackendChoice:
    """Return the backend that `backend` ("auto" or a name) stands for on this device and dtype, and the reason.

    While torch.export or torch.jit.trace records a model, plain operations stand in for `auto` and `reference`.

    Raises:
        UsageError: If no backend has that name; names the nearest.
        UnavailableError: If the backend asked for by name cannot run here; gives the reason.
    """
    if backend != "auto":
        BACKENDS.entry(backend)
    return _choose(backend, torch.device(device).type, dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen(name: str, device: str, dtype: torch.dtype) -> str:
    """The backend that `choose` takes, its module loaded. torch.compile looking inside would break the graph."""
    chosen = choose(name, device, dtype).name
    for needed in (chosen, "reference"):
        _LOADED[needed] = _module(needed)
    return chosen


_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def is_tracing() -> bool:
    """Whether torch.jit.trace or torch.export records the operations that run now."""
    return torch._C._get_tracing_state() is not None or _is_exporting()  # the first: torch.jit.trace


def _backend(name: str, like: Tensor) -> ModuleType:
    if is_tracing():
        if name in ("auto", "reference"):
            _chosen("reference", like.device.type, like.dtype)  # its operations between the mixers are plain
            return traceable
        if name != "triton":  # whose kernels are operators that a graph may hold
            raise UnavailableError(
                f"the scan backend {name!r} was asked for, and torch.export and torch.jit.trace cannot record it; "
                "model.set_scan_backend('auto') takes plain operations while a model is recorded"
            )
    return _LOADED[_chosen(name, like.device.type, like.dtype)]


def _no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """The operations choose their own precision (float32 accumulation): autocast must not reach into them."""
    kind = like.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], letters: str) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {letters} = {shape}, not {tuple(tensor.shape)}")


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    *,
    backend: str = "auto",
) -> Tensor:
    """Selective scan of Mamba (Gu & Dao 2023, Algorithm 2), in mamba_ssm's layout.

    With Δ = softplus(delta + delta_bias) and h₀ = 0, for each step t:
    hₜ = exp(Δₜ A) ⊙ hₜ₋₁ + Δₜ Bₜ uₜ,  yₜ = Cₜ · hₜ + D uₜ,  and the result is y ⊙ SiLU(z).

    Args:
        u: (B, E, L).
        delta: (B, E, L).
        A: (E, N), real.
        B: (B, N, L).
        C: (B, N, L).
        D: (E,) or None for no skip.
        z: (B, E, L) or None for no gate.
        delta_bias: (E,) or None.
        delta_softplus: Apply the softplus to delta + delta_bias.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        (B, E, L) in the dtype of `u`. Half-precision inputs are accumulated in float32.

    Raises:
        ValueError: If a shape does not fit.
        UsageError: If the backend is unknown.
        UnavailableError: If the backend asked for cannot run here.
    """
    if u.ndim != 3:
        raise ValueError(f"u must be (batch, dim, length), not {tuple(u.shape)}")
    if A.ndim != 2:
        raise ValueError(f"A must be (dim, state), not {tuple(A.shape)}")
    batch, dim, length = u.shape
    state = A.shape[1]
    _check("delta", delta, (batch, dim, length), "(batch, dim, length)")
    _check("A", A, (dim, state), "(dim, state)")
    _check("B", B, (batch, state, length), "(batch, state, length)")
    _check("C", C, (batch, state, length), "(batch, state, length)")
    _check("D", D, (dim,), "(dim,)")
    _check("z", z, (batch, dim, length), "(batch, dim, length)")
    _check("delta_bias", delta_bias, (dim,), "(dim,)")
    direction = Direction(u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias)
    module = _backend(backend, u)
    with _no_autocast(u):
        y: Tensor = module.scan((direction,), (False,), None if z is None else z.mT, delta_softplus)
    return y.mT


def bidirectional_scan(
    forward: Direction,
    backward: Direction,
    z: Tensor,
    *,
    recompute: Recompute | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean of a scan over the tokens and one over the tokens in reversed order, gated by SiLU(z) (Vim, Algorithm 1).

    `backward` is given in the natural token order as well: the scan runs from its last token to its first. Softplus is
    applied to delta + delta_bias.

    Args:
        forward: What the forward scan reads.
        backward: What the backward scan reads.
        z: Gate, (B, L, E).
        recompute: How to compute both `u` again. If given, a backend need not keep them for the backward pass.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        (B, L, E).

    Raises:
        ValueError: If a shape does not fit.
    """
    batch, length, dim = z.shape
    state = forward.A.shape[-1]
    for direction in (forward, backward):
        for name, shape, letters in (
            ("u", (batch, length, dim), "(batch, length, dim)"),
            ("delta", (batch, length, dim), "(batch, length, dim)"),
            ("A", (dim, state), "(dim, state)"),
            ("B", (batch, length, state), "(batch, length, state)"),
            ("C", (batch, length, state), "(batch, length, state)"),
            ("D", (dim,), "(dim,)"),
            ("delta_bias", (dim,), "(dim,)"),
        ):
            _check(name, getattr(direction, name), shape, letters)
    module = _backend(backend, z)
    with _no_autocast(z):
        y: Tensor = module.scan((forward, backward), (False, True), z, True, recompute)
    return y


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: Literal["silu", "swish"] | None = None,
    *,
    backend: str = "auto",
) -> Tensor:
    """Depth-wise causal convolution, in causal-conv1d's layout.

    Args:
        x: (B, E, L).
        weight: (E, W).
        bias: (E,) or None.
        activation: "silu" (or its other name, "swish"), or None.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        (B, E, L): step t reads steps t - W + 1 … t, zeros before the first.

    Raises:
        ValueError: If a shape or the activation does not fit.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', not {activation!r}")
    if x.ndim != 3:
        raise ValueError(f"x must be (batch, dim, length), not {tuple(x.shape)}")
    _check("weight", weight, (x.shape[1], weight.shape[-1]), "(dim, width)")
    _check("bias", bias, (x.shape[1],), "(dim,)")
    module = _backend(backend, x)
    with _no_autocast(x):
        (y,) = module.conv(x.mT, (weight,), (bias,), (False,), activation is not None)
    out: Tensor = y.mT
    return out


def bidirectional_conv(
    x: Tensor,
    forward: tuple[Tensor, Tensor | None],
    backward: tuple[Tensor, Tensor | None],
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """SiLU of the causal convolution over the tokens, and of the one over the tokens in reversed order.

    Args:
        x: (B, L, E); may be a strided view.
        forward: Weight (E, W) and bias (E,) of the forward direction.
        backward: The same for the backward direction; its step t reads tokens t … t + W - 1.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        Two tensors (B, L, E), both in the natural token order.
    """
    for weight, bias in (forward, backward):
        _check("weight", weight, (x.shape[-1], forward[0].shape[-1]), "(dim, width)")
        _check("bias", bias, (x.shape[-1],), "(dim,)")
    module = _backend(backend, x)
    with _no_autocast(x):
        u, u_b = module.conv(x, (forward[0], backward[0]), (forward[1], backward[1]), (False, True), True)
    return u, u_b


def add_norm(
    hidden: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float,
    prompts: PromptTerms | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Add a branch (and prompts) to the residual stream and norm it, in one pass where the backend can.

    Args:
        hidden: The branch, (B, L, D).
        residual: The stream, (B, L, D) in float32 or wider, or None.
        weight: Of the RMSNorm, (D,).
        eps: Of the RMSNorm.
        prompts: What `add_prompts` would add to the branch, or None.
        backend: "auto" or a name of `list_backends()`; those without a kernel of their own use PyTorch's operators.

    Returns:
        (stream, normed stream): the first in float32 or wider, the second in the dtype of `hidden`.
    """
    _check("residual", residual, tuple(hidden.shape), "that of hidden")
    _check("weight", weight, (hidden.shape[-1],), "(width,)")
    if prompts is not None:
        _check_prompts(hidden, prompts.terms, prompts.excluded)
    result: tuple[Tensor, Tensor] = _function("add_norm", backend, hidden)(hidden, residual, weight, eps, prompts)
    return result


def add_prompts(
    x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None, *, backend: str = "auto"
) -> Tensor:
    """x + Σ scale ⊙ SiLU(pre) at every token but the excluded one, in one pass where the backend can.

    Args:
        x: (B, L, D).
        terms: Pairs of a scale (D,) and what goes into SiLU, (B, L, D).
        excluded: The token that stays as it is, or None.
        backend: As for `add_norm`.

    Returns:
        (B, L, D) in the dtype of `x`.
    """
    _check_prompts(x, terms, excluded)
    result: Tensor = _function("add_prompts", backend, x)(x, terms, excluded)
    return result


def _check_prompts(x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None) -> None:
    for scale, pre in terms:
        _check("scale", scale, (x.shape[-1],), "(width,)")
        _check("pre", pre, tuple(x.shape), "that of the tokens")
    if excluded is not None and not 0 <= excluded < x.shape[1]:
        raise ValueError(f"excluded must be a token of 0..{x.shape[1] - 1}, not {excluded}")


def _function(name: str, backend: str, like: Tensor) -> Any:
    module = _backend(backend, like)
    return getattr(module, name, None) or getattr(_LOADED["reference"], name)
