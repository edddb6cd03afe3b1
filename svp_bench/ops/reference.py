"""The reference backend: the recurrences in plain PyTorch, on any device, right rather than fast.

Every other backend is tested against this file. It keeps no state for the backward pass but one per chunk of steps:
states are recomputed there, so that what autograd holds stays of the size of the inputs. The batch is worked through in
slices, so that chunks can be long (few states are kept) and yet small in memory.

Letters: B batch, L length, E channels, N state size, K directions (1 or 2), T steps of a chunk, W width.
Inside, tensors are time first, (L, B, K, E), with the reversed directions already flipped.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from svp_bench.ops.types import Direction, PromptTerms, Recompute

__all__ = ["add_norm", "add_prompts", "conv", "scan", "unavailable", "unsupported"]

_CHUNK_BYTES = 8 * 2**20  # states of one chunk of steps; small enough for caches
_CHUNK_STEPS = 64  # steps that a chunk should have: the batch is worked through in slices so small that they fit
_FIELDS = 7  # tensors of a Direction


def unavailable() -> str | None:
    """Return why this backend cannot run on this machine: it always can."""
    return None


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot take such tensors, or None if it can."""
    return None if dtype.is_floating_point else f"it takes floating-point tensors, not {dtype}"


def scan(
    directions: Sequence[Direction],
    reverse: Sequence[bool],
    z: Tensor | None,
    softplus: bool,
    recompute: Recompute | None = None,
) -> Tensor:
    """Mean over the directions of their selective scans, gated by SiLU(z).

    Args:
        directions: K directions, each in the natural token order.
        reverse: Whether each runs from the last token to the first.
        z: Gate (B, L, E), or None.
        softplus: Apply the softplus to delta + delta_bias.
        recompute: How to compute the `u` of all directions again; if given they are not kept for the backward pass.

    Returns:
        (B, L, E) in the dtype of the first `u`.
    """
    flat = [tensor for direction in directions for tensor in direction]
    y: Tensor = _Scan.apply(tuple(reverse), softplus, recompute, z, *flat)
    return y


def forget(flat: Sequence[Tensor | None], recompute: Recompute | None) -> list[Tensor | None]:
    """What to save: the fields of all directions, and last what each `u` is made from, if it is made again."""
    if recompute is None:
        return list(flat)
    return [*(None if i % _FIELDS == 0 else t for i, t in enumerate(flat)), *recompute.inputs]


def recall(
    saved: Sequence[Tensor | None], directions: int, make: Callable[..., Sequence[Tensor]] | None
) -> list[Tensor | None]:
    """The inverse of `forget`."""
    full, inputs = list(saved[: _FIELDS * directions]), saved[_FIELDS * directions :]
    if make is not None:
        full[::_FIELDS] = [u.detach() for u in make(*inputs)]
    return full


class _Inputs:
    """The directions side by side, time first, in the dtype of the accumulation."""

    def __init__(self, reverse: tuple[bool, ...], softplus: bool, flat: Sequence[Tensor | None], steps: int) -> None:
        u, delta, A, B, C, D, bias = (list(flat[i::_FIELDS]) for i in range(_FIELDS))
        first = u[0]
        assert first is not None
        self.dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        self.reverse = reverse
        self.softplus = softplus
        self.u = self.over_time(u)
        self.A = self.per_channel(A)  # (K, E, N)
        self.B = self.over_time(B)  # (L, B, K, N)
        self.C = self.over_time(C)
        self.D = None if all(d is None for d in D) else self.per_channel(D)  # (K, E)
        raw = self.over_time(delta)
        self.raw = raw if all(b is None for b in bias) else raw + self.per_channel(bias)
        self.dt = F.softplus(self.raw) if softplus else self.raw  # (L, B, K, E)
        self.chunk = steps

    def over_time(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """(B, L, X) of each direction → (L, B, K, X), reversed directions flipped."""
        rows = [t.to(self.dtype) for t in tensors if t is not None]
        return torch.stack([t.flip(1) if r else t for t, r in zip(rows, self.reverse, strict=True)], dim=2).transpose(
            0, 1
        )

    def per_channel(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """(E, …) of each direction → (K, E, …); zeros for a direction that has none."""
        one = next(t for t in tensors if t is not None)
        return torch.stack(
            [torch.zeros_like(one, dtype=self.dtype) if t is None else t.to(self.dtype) for t in tensors]
        )

    def chunks(self) -> list[slice]:
        length = len(self.u)
        return [slice(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]

    def states(self, part: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        """Decay exp(Δ A) and state h of each step of a chunk, both (T, B, K, E, N), from the state before it."""
        dt = self.dt[part]
        decay = torch.exp(dt.unsqueeze(-1) * self.A)
        states = (dt * self.u[part]).unsqueeze(-1) * self.B[part].unsqueeze(-2)
        for state, factor in zip(states.unbind(), decay.unbind(), strict=True):
            h = torch.addcmul(state, factor, h, out=state)
        return decay, states

    def output(self, part: slice, states: Tensor) -> Tensor:
        """C · h + D u of each step of a chunk, (T, B, K, E)."""
        y = torch.matmul(states, self.C[part].unsqueeze(-1)).squeeze(-1)
        return y if self.D is None else y + self.D * self.u[part]

    def zero_state(self) -> Tensor:
        return self.u.new_zeros(*self.u.shape[1:], self.A.shape[-1])

    def natural(self, steps: Tensor, direction: int) -> Tensor:
        """(L, B, K, X) → (B, L, X) of one direction, in the natural token order."""
        part = steps[:, :, direction].transpose(0, 1)
        return part.flip(1) if self.reverse[direction] else part

    def mean(self, steps: Tensor) -> Tensor:
        """(L, B, K, X) → (B, L, X), the mean over the directions in the natural token order."""
        total = self.natural(steps, 0)
        for direction in range(1, len(self.reverse)):
            total = total + self.natural(steps, direction)
        return total / len(self.reverse)


def _plan(flat: Sequence[Tensor | None]) -> tuple[int, int]:
    """Images of a slice of the batch, and steps of a chunk, such that `_CHUNK_STEPS` states of a slice fit."""
    u, A = flat[0], flat[2]
    assert u is not None
    assert A is not None
    length = max(u.shape[1], 1)
    state = max(1, len(flat) // _FIELDS * A.numel() * max(u.element_size(), 4))  # bytes, of one image
    images = max(1, min(len(u), _CHUNK_BYTES // (state * min(length, _CHUNK_STEPS))))
    # one state a chunk is saved for the backward pass: not more than √L of them
    return images, max(math.isqrt(length) + 1, _CHUNK_BYTES // (state * images))


def _slices(batch: int, images: int) -> list[slice]:
    return [slice(start, min(start + images, batch)) for start in range(0, batch, images)]


def _rows(flat: Sequence[Tensor | None], rows: slice) -> list[Tensor | None]:
    """A slice of the batch: of the activations, which have three axes; weights stay whole."""
    return [t[rows] if t is not None and t.ndim == 3 else t for t in flat]


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        reverse: tuple[bool, ...],
        softplus: bool,
        recompute: Recompute | None,
        z: Tensor | None,
        *flat: Tensor | None,
    ) -> Tensor:
        u, A = flat[0], flat[2]
        assert u is not None
        assert A is not None
        batch, length, channels = u.shape
        images, steps = _plan(flat)
        wide = torch.float64 if u.dtype == torch.float64 else torch.float32
        out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        # The state before each chunk but the first, which starts from zero. One tensor, allocated first: small ones,
        # kept among large ones that go, would leave holes in the heap.
        kept = max(0, -(-length // steps) - 1)
        before = torch.empty(batch, kept, len(reverse), channels, A.shape[-1], dtype=wide, device=u.device)
        for rows in _slices(batch, images):
            inputs = _Inputs(reverse, softplus, _rows(flat, rows), steps)
            h = inputs.zero_state()
            y = torch.empty_like(inputs.u)
            for number, part in enumerate(inputs.chunks()):
                if number > 0:
                    before[rows, number - 1] = h
                _, states = inputs.states(part, h)
                y[part] = inputs.output(part, states)
                h = states[-1].clone()
            mean = inputs.mean(y)
            out[rows] = mean if z is None else mean * F.silu(z[rows].to(mean.dtype))
        ctx.settings = (reverse, softplus, recompute.function if recompute else None)
        ctx.save_for_backward(before, z, *forget(flat, recompute))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        reverse, softplus, make = ctx.settings
        before, z, *kept = ctx.saved_tensors
        flat: list[Any] = recall(kept, len(reverse), make)
        need_z = ctx.needs_input_grad[3]
        wanted = ctx.needs_input_grad[4:]
        need = [any(wanted[i::_FIELDS]) for i in range(_FIELDS)]
        grad_z = torch.empty_like(z) if need_z else None
        # Of activations, each slice writes its own part; of weights, the sum over the slices, rounded once at the end.
        wide = torch.float64 if flat[0].dtype == torch.float64 else torch.float32
        grads: list[Tensor | None] = [None] * len(flat)
        for i, t in enumerate(flat):
            if wanted[i]:
                grads[i] = torch.empty_like(t) if t.ndim == 3 else torch.zeros_like(t, dtype=wide)
        images, steps = _plan(flat)
        for rows in _slices(len(grad), images):
            inputs = _Inputs(reverse, softplus, _rows(flat, rows), steps)
            dy_token = grad[rows].to(inputs.dtype) / len(reverse)
            z_wide = None if z is None else z[rows].to(inputs.dtype)
            y = torch.empty_like(inputs.u) if need_z else None
            dy = inputs.over_time([dy_token if z_wide is None else dy_token * F.silu(z_wide)] * len(reverse))
            starts = [inputs.zero_state(), *before[rows].unbind(dim=1)]
            fields = _sweep_back(inputs, dy, starts, need, y)
            if y is not None and z_wide is not None and grad_z is not None:
                sigmoid = torch.sigmoid(z_wide)
                grad_z[rows] = grad[rows] * inputs.mean(y) * sigmoid * (1 + z_wide * (1 - sigmoid))
            for i, total in enumerate(grads):
                direction, field = divmod(i, _FIELDS)
                if total is not None and total.ndim == 3:
                    total[rows] = inputs.natural(fields[field], direction)
                elif total is not None:
                    total += fields[field][direction]
        return (
            None,
            None,
            None,
            grad_z,
            *(None if g is None else g.to(t.dtype) for g, t in zip(grads, flat, strict=True)),
        )


def _sweep_back(
    inputs: _Inputs, dy: Tensor, before: Sequence[Tensor], need: list[bool], y: Tensor | None
) -> tuple[Any, ...]:
    """Gradients of the seven fields, from the last chunk to the first; None where nobody asked.

    Per step, with g the gradient of the state: gₜ = dyₜ Cₜ + decayₜ₊₁ ⊙ gₜ₊₁.
    """
    need_u, need_delta, need_A, need_B, need_C, need_D, need_bias = need
    need_dt = need_delta or need_bias
    du = torch.empty_like(inputs.u) if need_u else None
    ddt = torch.empty_like(inputs.u) if need_dt else None
    dB = torch.empty_like(inputs.B) if need_B else None
    dC = torch.empty_like(inputs.C) if need_C else None
    dA = torch.zeros_like(inputs.A) if need_A else None
    dD = (dy * inputs.u).sum(dim=(0, 1)) if need_D else None
    carry = inputs.zero_state()  # decayₜ₊₁ ⊙ gₜ₊₁ of the step after the chunk
    for part, h in zip(reversed(inputs.chunks()), reversed(before), strict=True):
        decay, states = inputs.states(part, h)
        if y is not None:
            y[part] = inputs.output(part, states)
        u, dt, B, C = inputs.u[part], inputs.dt[part], inputs.B[part], inputs.C[part]
        if dC is not None:
            dC[part] = torch.einsum("tbke,tbken->tbkn", dy[part], states)
        g = dy[part].unsqueeze(-1) * C.unsqueeze(-2)
        for row, factor in zip(reversed(g.unbind()), reversed(decay.unbind()), strict=True):
            row += carry
            carry = row * factor
        if dB is not None:
            dB[part] = torch.einsum("tbken,tbke->tbkn", g, dt * u)
        drive = torch.matmul(g, B.unsqueeze(-1)).squeeze(-1) if need_u or need_dt else None  # gradient of Δ u
        if du is not None and drive is not None:
            du[part] = drive * dt if inputs.D is None else drive * dt + dy[part] * inputs.D
        if need_dt or need_A:
            previous = torch.cat([h.unsqueeze(0), states[:-1]])
            gate = g.mul_(previous).mul_(decay)  # gradient of Δ A
            if ddt is not None and drive is not None:
                ddt[part] = drive * u + (gate * inputs.A).sum(dim=-1)
            if dA is not None:
                dA += (gate * dt.unsqueeze(-1)).sum(dim=(0, 1))
    if ddt is not None and inputs.softplus:
        # F.softplus is the identity above its threshold of 20, as in mamba_ssm
        ddt = torch.where(inputs.raw > 20, ddt, ddt * torch.sigmoid(inputs.raw))
    dbias = ddt.sum(dim=(0, 1)) if need_bias and ddt is not None else None
    return du, ddt if need_delta else None, dA, dB, dC, dD, dbias


def conv(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], reverse: Sequence[bool], silu: bool
) -> tuple[Tensor, ...]:
    """Depth-wise causal convolution of the same input in each direction, with SiLU if `silu`.

    Args:
        x: (B, L, E).
        weights: K weights (E, W).
        biases: K biases (E,), or None.
        reverse: Whether each direction runs from the last token to the first.
        silu: Apply SiLU.

    Returns:
        K tensors (B, L, E).
    """
    out: tuple[Tensor, ...] = _Conv.apply(x, tuple(reverse), silu, *weights, *biases)
    return out


def _taps(weight: Tensor, length: int, reverse: bool) -> list[tuple[Tensor, slice, slice]]:
    """For each tap its weight (E,), the steps that it writes and the steps that it reads."""
    taps = []
    for back, tap in enumerate(weight.flip(-1).unbind(dim=-1)):  # back: how many steps before (after, if reversed)
        if back < length:
            ahead, behind = slice(back, length), slice(0, length - back)
            taps.append((tap, behind, ahead) if reverse else (tap, ahead, behind))
    return taps


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    out = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    for tap, write, read in _taps(weight, x.shape[1], reverse):
        out[:, write].addcmul_(x[:, read], tap)
    return out


class _Conv(torch.autograd.Function):
    """Saves its input only; what SiLU needs is computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, reverse: tuple[bool, ...], silu: bool, *parameters: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *parameters)
        ctx.settings = (reverse, silu)
        wide = torch.promote_types(x.dtype, torch.float32)
        x_wide, outs = x.to(wide), []
        for weight, bias, back in _Conv.each(parameters, reverse, wide):
            out = _convolve(x_wide, weight, bias, back)
            outs.append((F.silu(out, inplace=True) if silu else out).to(x.dtype))
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        count = len(reverse)
        ctx.mark_non_differentiable(*[o for i, o in enumerate(outs) if not (need_x or need[i] or need[count + i])])
        return tuple(outs)

    @staticmethod
    def each(
        parameters: Sequence[Tensor | None], reverse: Sequence[bool], wide: torch.dtype
    ) -> list[tuple[Tensor, Tensor | None, bool]]:
        """Weight and bias of each direction in float32 or wider, and which way it runs."""
        count, rows = len(reverse), []
        for weight, bias, back in zip(parameters[:count], parameters[count:], reverse, strict=True):
            assert weight is not None
            rows.append((weight.to(wide), None if bias is None else bias.to(wide), back))
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        reverse, silu = ctx.settings
        need_x, need = ctx.needs_input_grad[0], ctx.needs_input_grad[3:]
        count, wide = len(reverse), torch.promote_types(x.dtype, torch.float32)
        x_wide = x.to(wide)
        grad_x = torch.zeros_like(x_wide) if need_x else None  # of all directions, rounded once
        grad_parameters: list[Tensor | None] = [None] * (2 * count)
        for i, (weight, bias, back) in enumerate(_Conv.each(parameters, reverse, wide)):
            if not (need_x or need[i] or need[count + i]):
                continue
            grad = grads[i].to(wide)
            if silu:
                before = _convolve(x_wide, weight, bias, back)
                sigmoid = torch.sigmoid(before)
                grad = grad * sigmoid * (1 + before * (1 - sigmoid))
            taps = _taps(weight, x.shape[1], back)
            if grad_x is not None:
                for tap, write, read in taps:
                    grad_x[:, read].addcmul_(grad[:, write], tap)
            if need[i]:
                grad_weight = torch.zeros_like(weight)
                for age, (_, write, read) in enumerate(taps):
                    grad_weight[:, -1 - age] = (grad[:, write] * x_wide[:, read]).sum(dim=(0, 1))
                grad_parameters[i] = grad_weight.to(parameters[i].dtype)
            if need[count + i]:
                grad_parameters[count + i] = grad.sum(dim=(0, 1)).to(parameters[count + i].dtype)
        return (None if grad_x is None else grad_x.to(x.dtype), None, None, *grad_parameters)


def add_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, prompts: PromptTerms | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch (and prompts) to the residual stream and norm it.

    Args:
        hidden: The branch, (B, L, D).
        residual: The stream, (B, L, D) in float32 or wider, or None.
        weight: Of the RMSNorm, (D,).
        eps: Of the RMSNorm.
        prompts: What `add_prompts` is to add to the branch before, or None.

    Returns:
        (stream, normed stream): the first in float32 or wider, the second in the dtype of `hidden`.
    """
    if prompts is not None:
        hidden = add_prompts(hidden, *prompts)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.to(wide) if residual is None else residual + hidden
    return total, F.rms_norm(total, weight.shape, weight.to(total.dtype), eps).to(hidden.dtype)


def add_prompts(x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None) -> Tensor:
    """x + Σ scale ⊙ SiLU(pre) at every token but the excluded one.

    Args:
        x: (B, L, D).
        terms: Pairs of a scale (D,) and what goes into SiLU, (B, L, D).
        excluded: The token that stays as it is, or None.

    Returns:
        (B, L, D) in the dtype of `x`.
    """
    prompts = sum(scale * F.silu(pre) for scale, pre in terms)
    assert isinstance(prompts, Tensor)
    if excluded is None:
        return x + prompts.to(x.dtype)
    prompted = torch.ones(x.shape[1], 1, dtype=x.dtype, device=x.device)
    prompted[excluded] = 0
    return torch.addcmul(x, prompts.to(x.dtype), prompted)
