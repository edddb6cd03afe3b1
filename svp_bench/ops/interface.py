"""Public operations: check arguments, select a backend, convert layouts.

Letters: B batch, L length (tokens), E channels (mamba's `dim`), N state size, W convolution width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

from svp_bench.core.errors import UnavailableError
from svp_bench.ops import macs, traceable
from svp_bench.ops.backends import BACKENDS, backend_module
from svp_bench.ops.types import BackendChoice, Direction, PromptTerms, Recompute

_LOADED: dict[str, ModuleType] = {}
_is_exporting: Callable[[], bool] = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


@cache
def _choose(name: str, device: str, dtype: torch.dtype) -> BackendChoice:
    skipped: list[str] = []
    for entry in BACKENDS if name == "auto" else [BACKENDS.entry(name)]:
        module = backend_module(entry.name)
        reason = module.unavailable() or module.unsupported(device, dtype)
        if reason is None and name != "auto":
            return BackendChoice(name, "asked for by name")
        if reason is None:
            why = f"auto: the first that runs on {device} with {str(dtype).removeprefix('torch.')}"
            return BackendChoice(entry.name, "; ".join([why, *skipped]))
        if name != "auto":
            raise UnavailableError(f"the scan backend {name!r} was asked for and cannot run here: {reason}")
        skipped.append(f"{entry.name}: {reason}")
    raise UnavailableError("no scan backend can run here: " + "; ".join(skipped))


def choose(backend: str, device: torch.device | str, dtype: torch.dtype) -> BackendChoice:
    """Return the backend that runs for `backend` ("auto" or a name) on this device and dtype, and the reason.

    Raises:
        UsageError: If the name is unknown; names the nearest.
        UnavailableError: If the backend asked for by name cannot run here; gives the reason.
    """
    return _choose(backend, torch.device(device).type, dtype)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _chosen(name: str, device: str, dtype: torch.dtype) -> str:
    """Return the name of the backend of `choose`, its module loaded. torch.compile cannot trace the inside."""
    chosen = choose(name, device, dtype).name
    for needed in (chosen, "reference"):
        _LOADED[needed] = backend_module(needed)
    return chosen


def is_tracing() -> bool:
    """Whether torch.jit.trace or torch.export records the operations that run now."""
    return torch._C._get_tracing_state() is not None or _is_exporting()  # the first: torch.jit.trace


def _backend(name: str, like: Tensor) -> ModuleType:
    if is_tracing():
        if name in ("auto", "reference"):
            _chosen("reference", like.device.type, like.dtype)  # for add_norm and add_prompts
            return traceable
        if name != "triton":  # its kernels are operators, which a graph can hold
            raise UnavailableError(
                f"the scan backend {name!r} was asked for, and torch.export and torch.jit.trace cannot record it; "
                "model.set_scan_backend('auto') takes plain operations while a model is recorded"
            )
    return _LOADED[_chosen(name, like.device.type, like.dtype)]


def no_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast: the operations choose their own precision (float32 accumulation)."""
    kind = like.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, enabled=False)


def _check(sizes: dict[str, int], *tensors: tuple[str, Tensor | None, str]) -> None:
    """Check the shapes of (name, tensor, axes), e.g. ("A", A, "dim state"); ValueError if one differs."""
    for name, tensor, axes in tensors:
        letters = axes.split()
        shape = tuple(sizes[axis] for axis in letters)
        if tensor is not None and tuple(tensor.shape) != shape:
            label = f"({letters[0]},)" if len(letters) == 1 else f"({', '.join(letters)})"
            raise ValueError(f"{name} must be {label} = {shape}, not {tuple(tensor.shape)}")


def _check_axes(name: str, tensor: Tensor, axes: str) -> None:
    if tensor.ndim != len(axes.split()):
        raise ValueError(f"{name} must be ({', '.join(axes.split())}), not {tuple(tensor.shape)}")


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
    """Compute the selective scan of Mamba (Gu & Dao 2023, Algorithm 2), in mamba_ssm's layout.

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
    tokens, states = "batch dim length", "batch state length"
    _check_axes("u", u, tokens)
    _check_axes("A", A, "dim state")
    sizes = {"batch": u.shape[0], "dim": u.shape[1], "length": u.shape[2], "state": A.shape[1]}
    _check(sizes, ("delta", delta, tokens), ("A", A, "dim state"), ("B", B, states), ("C", C, states))
    _check(sizes, ("D", D, "dim"), ("z", z, tokens), ("delta_bias", delta_bias, "dim"))
    direction = Direction(u.mT, delta.mT, A, B.mT, C.mT, D, delta_bias)
    if (counter := macs.active()) is not None:
        return counter.scan((direction,), None if z is None else z.mT).mT
    module = _backend(backend, u)
    with no_autocast(u):
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
    """Compute the mean of a scan over the tokens and one in reversed order, gated by SiLU(z) (Vim, Algorithm 1).

    `backward` is in the natural token order too; its scan runs from the last token to the first. Softplus is applied to
    delta + delta_bias.

    Args:
        forward: Inputs of the forward scan.
        backward: Inputs of the backward scan.
        z: Gate, (B, L, E).
        recompute: How to compute both `u` again; a backend need not save them then.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        (B, L, E).

    Raises:
        ValueError: If a shape does not fit.
    """
    sizes = {"batch": z.shape[0], "length": z.shape[1], "dim": z.shape[2], "state": forward.A.shape[-1]}
    tokens, states = "batch length dim", "batch length state"
    for direction in (forward, backward):
        u, delta, A, B, C, D, bias = direction
        _check(sizes, ("u", u, tokens), ("delta", delta, tokens), ("A", A, "dim state"), ("B", B, states))
        _check(sizes, ("C", C, states), ("D", D, "dim"), ("delta_bias", bias, "dim"))
    if (counter := macs.active()) is not None:
        return counter.scan((forward, backward), z)
    module = _backend(backend, z)
    with no_autocast(z):
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
    """Compute the depth-wise causal convolution, in causal-conv1d's layout.

    Args:
        x: (B, E, L).
        weight: (E, W).
        bias: (E,) or None.
        activation: "silu", its other name "swish", or None.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        (B, E, L): step t reads steps t - W + 1 … t, zeros before the first.

    Raises:
        ValueError: If a shape or the activation does not fit.
    """
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"activation must be None, 'silu' or 'swish', not {activation!r}")
    _check_axes("x", x, "batch dim length")
    sizes = {"dim": x.shape[1], "width": weight.shape[-1]}
    _check(sizes, ("weight", weight, "dim width"), ("bias", bias, "dim"))
    if (counter := macs.active()) is not None:
        return counter.conv(x.mT, (weight,), (bias,))[0].mT
    module = _backend(backend, x)
    with no_autocast(x):
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
    """Compute SiLU of the causal convolution over the tokens, and of the one in reversed order.

    Args:
        x: (B, L, E); may be a strided view.
        forward: Weight (E, W) and bias (E,) of the forward direction.
        backward: The same for the backward direction; its step t reads tokens t … t + W - 1.
        backend: "auto" or a name of `list_backends()`.

    Returns:
        Two tensors (B, L, E), both in the natural token order.
    """
    sizes = {"dim": x.shape[-1], "width": forward[0].shape[-1]}
    for weight, bias in (forward, backward):
        _check(sizes, ("weight", weight, "dim width"), ("bias", bias, "dim"))
    if (counter := macs.active()) is not None:
        u, u_b = counter.conv(x, (forward[0], backward[0]), (forward[1], backward[1]))
        return u, u_b
    module = _backend(backend, x)
    with no_autocast(x):
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
    """Add a branch and prompts to the residual stream and norm it, in one pass where the backend can.

    Args:
        hidden: The branch, (B, L, D).
        residual: The stream, (B, L, D) in float32 or wider, or None.
        weight: Of the RMSNorm, (D,).
        eps: Of the RMSNorm.
        prompts: Added to the branch as by `add_prompts`, or None.
        backend: "auto" or a name of `list_backends()`; backends without a kernel use PyTorch's operators.

    Returns:
        (stream, normed stream): the first in float32 or wider, the second in the dtype of `hidden`.
    """
    sizes = _token_sizes(hidden)
    _check(sizes, ("residual", residual, "batch length width"), ("weight", weight, "width"))
    if prompts is not None:
        _check_prompts(sizes, *prompts)
    result: tuple[Tensor, Tensor] = _function("add_norm", backend, hidden)(hidden, residual, weight, eps, prompts)
    return result


def add_prompts(
    x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None, *, backend: str = "auto"
) -> Tensor:
    """Return x + Σ scale ⊙ SiLU(pre) at every token but the excluded one, in one pass where the backend can.

    Args:
        x: (B, L, D).
        terms: Pairs of a scale (D,) and a pre-activation (B, L, D).
        excluded: The unchanged token, or None.
        backend: As for `add_norm`.

    Returns:
        (B, L, D) in the dtype of `x`.
    """
    _check_prompts(_token_sizes(x), terms, excluded)
    result: Tensor = _function("add_prompts", backend, x)(x, terms, excluded)
    return result


def _token_sizes(x: Tensor) -> dict[str, int]:
    return {"batch": x.shape[0], "length": x.shape[1], "width": x.shape[2]}


def _check_prompts(sizes: dict[str, int], terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None) -> None:
    for scale, pre in terms:
        _check(sizes, ("scale", scale, "width"), ("pre", pre, "batch length width"))
    if excluded is not None and not 0 <= excluded < sizes["length"]:
        raise ValueError(f"excluded must be a token of 0..{sizes['length'] - 1}, not {excluded}")


def _function(name: str, backend: str, like: Tensor) -> Any:
    module = _backend("reference" if macs.active() is not None else backend, like)
    return getattr(module, name, None) or getattr(_LOADED["reference"], name)
