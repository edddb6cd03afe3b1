"""The reference backend: the recurrences in plain PyTorch, on any device. Tests compare every other backend with it.

For the backward pass it saves one state per chunk of steps and recomputes the others, so autograd holds little more
than the inputs. The batch is processed in slices, which allows long chunks in little memory.

Letters: B batch, L length, E channels, N state size, K directions (1 or 2), T steps of a chunk, W width.
Internal tensors are time first, (L, B, K, E), with reversed directions flipped.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_bench.ops.autograd import FIELDS, conv_function, scan_function
from svp_bench.ops.types import Flags, PromptTerms, Tensors

_CHUNK_BYTES = 8 * 2**20  # states of one chunk of steps; small enough for caches
_CHUNK_STEPS = 64  # steps per chunk; slices of the batch are small enough for them


def unavailable() -> str | None:
    """Return None: this backend always runs."""
    return None


def unsupported(device: str, dtype: torch.dtype) -> str | None:
    """Return why this backend cannot take such tensors, or None if it can."""
    return None if dtype.is_floating_point else f"it takes floating-point tensors, not {dtype}"


class _Inputs:
    """Inputs of all directions, time first, in the dtype of the accumulation."""

    def __init__(self, reverse: Flags, softplus: bool, flat: Tensors, steps: int) -> None:
        u, delta, A, B, C, D, bias = (list(flat[i::FIELDS]) for i in range(FIELDS))
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

    def over_time(self, tensors: Tensors) -> Tensor:
        """(B, L, X) of each direction → (L, B, K, X), reversed directions flipped."""
        rows = [t.to(self.dtype) for t in tensors if t is not None]
        return torch.stack([t.flip(1) if r else t for t, r in zip(rows, self.reverse, strict=True)], dim=2).transpose(
            0, 1
        )

    def per_channel(self, tensors: Tensors) -> Tensor:
        """(E, …) of each direction → (K, E, …); zeros for a direction that has none."""
        one = next(t for t in tensors if t is not None)
        return torch.stack(
            [torch.zeros_like(one, dtype=self.dtype) if t is None else t.to(self.dtype) for t in tensors]
        )

    def chunks(self) -> list[slice]:
        length = len(self.u)
        return [slice(start, min(start + self.chunk, length)) for start in range(0, length, self.chunk)]

    def states(self, part: slice, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return decay exp(Δ A) and state h of each step of a chunk, both (T, B, K, E, N), from the state before it."""
        dt = self.dt[part]
        decay = torch.exp(dt.unsqueeze(-1) * self.A)
        states = (dt * self.u[part]).unsqueeze(-1) * self.B[part].unsqueeze(-2)
        for state, factor in zip(states.unbind(), decay.unbind(), strict=True):
            h = torch.addcmul(state, factor, h, out=state)
        return decay, states

    def output(self, part: slice, states: Tensor) -> Tensor:
        """Return C · h + D u of each step of a chunk, (T, B, K, E)."""
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


def _plan(flat: Tensors) -> tuple[int, int]:
    """Return images per slice and steps per chunk, such that the states of a chunk fit into `_CHUNK_BYTES`."""
    u, A = flat[0], flat[2]
    assert u is not None
    assert A is not None
    length = max(u.shape[1], 1)
    state = max(1, len(flat) // FIELDS * A.numel() * max(u.element_size(), 4))  # bytes, of one image
    images = max(1, min(len(u), _CHUNK_BYTES // (state * min(length, _CHUNK_STEPS))))
    # one state per chunk is saved: at most √L of them
    return images, max(math.isqrt(length) + 1, _CHUNK_BYTES // (state * images))


def _slices(batch: int, images: int) -> list[slice]:
    return [slice(start, min(start + images, batch)) for start in range(0, batch, images)]


def _rows(flat: Tensors, rows: slice) -> list[Tensor | None]:
    """Return a slice of the batch: of activations (three axes); weights are not sliced."""
    return [t[rows] if t is not None and t.ndim == 3 else t for t in flat]


def _scan_forward(tensors: Tensors, reverse: Flags, softplus: bool, save: bool) -> tuple[Tensor, list[Tensor]]:
    z, *flat = tensors
    u, A = flat[0], flat[2]
    assert u is not None
    assert A is not None
    batch, length, channels = u.shape
    images, steps = _plan(flat)
    wide = torch.float64 if u.dtype == torch.float64 else torch.float32
    out = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    # The state before each chunk but the first. One tensor, allocated first, so that the heap is not fragmented.
    count = max(0, -(-length // steps) - 1) if save else 0
    before = torch.empty(batch, count, len(reverse), channels, A.shape[-1], dtype=wide, device=u.device)
    for rows in _slices(batch, images):
        inputs = _Inputs(reverse, softplus, _rows(flat, rows), steps)
        h = inputs.zero_state()
        y = torch.empty_like(inputs.u)
        for number, part in enumerate(inputs.chunks()):
            if number > 0 and save:
                before[rows, number - 1] = h
            _, states = inputs.states(part, h)
            y[part] = inputs.output(part, states)
            h = states[-1].clone()
        mean = inputs.mean(y)
        out[rows] = mean if z is None else mean * F.silu(z[rows].to(mean.dtype))
    return out, [before]


def _scan_backward(
    grad: Tensor, tensors: Tensors, saved: Sequence[Tensor], reverse: Flags, softplus: bool, wanted: Flags
) -> list[Tensor | None]:
    z, *flat = tensors
    (before,), (need_z, *need_flat) = saved, wanted
    need = [any(need_flat[i::FIELDS]) for i in range(FIELDS)]
    grad_z = torch.empty_like(z) if need_z and z is not None else None
    # Each slice writes its part of the gradients of activations; those of weights are summed, and rounded at the end.
    wide = torch.promote_types(grad.dtype, torch.float32)
    grads: list[Tensor | None] = [None] * len(flat)
    for i, t in enumerate(flat):
        if need_flat[i] and t is not None:
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
            direction, field = divmod(i, FIELDS)
            if total is not None and total.ndim == 3:
                total[rows] = inputs.natural(fields[field], direction)
            elif total is not None:
                total += fields[field][direction]
    return [grad_z, *(g if g is None or t is None else g.to(t.dtype) for g, t in zip(grads, flat, strict=True))]


def _sweep_back(
    inputs: _Inputs, dy: Tensor, before: Sequence[Tensor], need: list[bool], y: Tensor | None
) -> tuple[Any, ...]:
    """Return the gradients of the seven fields, computed from the last chunk to the first; None if not needed.

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


def _taps(weight: Tensor, length: int, reverse: bool) -> list[tuple[Tensor, slice, slice]]:
    """Return for each tap its weight (E,), the steps that it writes and the steps that it reads."""
    taps = []
    for back, tap in enumerate(weight.flip(-1).unbind(dim=-1)):  # steps before (after, if reversed)
        if back < length:
            ahead, behind = slice(back, length), slice(0, length - back)
            taps.append((tap, behind, ahead) if reverse else (tap, ahead, behind))
    return taps


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    out = torch.zeros_like(x) if bias is None else bias.expand_as(x).clone()
    for tap, write, read in _taps(weight, x.shape[1], reverse):
        out[:, write].addcmul_(x[:, read], tap)
    return out


def _conv_forward(x: Tensor, parameters: Tensors, reverse: Flags, silu: bool) -> list[Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    outs = [_convolve(x_wide, *row) for row in _conv_rows(parameters, reverse, wide)]
    return [(F.silu(out, inplace=True) if silu else out).to(x.dtype) for out in outs]


def _conv_rows(parameters: Tensors, reverse: Flags, wide: torch.dtype) -> list[tuple[Tensor, Tensor | None, bool]]:
    """Return weight and bias of each direction in float32 or wider, and whether it is reversed."""
    count, rows = len(reverse), []
    for weight, bias, back in zip(parameters[:count], parameters[count:], reverse, strict=True):
        assert weight is not None
        rows.append((weight.to(wide), None if bias is None else bias.to(wide), back))
    return rows


def _conv_backward(
    grads: Sequence[Tensor], x: Tensor, parameters: Tensors, reverse: Flags, silu: bool, wanted: Flags
) -> list[Tensor | None]:
    need_x, *need = wanted
    count, wide = len(reverse), torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    grad_x = torch.zeros_like(x_wide) if need_x else None  # of all directions, rounded once
    found: list[Tensor | None] = [None] * (2 * count)
    for i, (weight, bias, back) in enumerate(_conv_rows(parameters, reverse, wide)):
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
            found[i] = grad_weight = torch.zeros_like(weight)
            for age, (_, write, read) in enumerate(taps):
                grad_weight[:, -1 - age] = (grad[:, write] * x_wide[:, read]).sum(dim=(0, 1))
        if need[count + i]:
            found[count + i] = grad.sum(dim=(0, 1))
    found = [g if g is None or t is None else g.to(t.dtype) for g, t in zip(found, parameters, strict=True)]
    return [None if grad_x is None else grad_x.to(x.dtype), *found]


scan = scan_function(_scan_forward, _scan_backward)
conv = conv_function(_conv_forward, _conv_backward)


def add_norm(
    hidden: Tensor, residual: Tensor | None, weight: Tensor, eps: float, prompts: PromptTerms | None = None
) -> tuple[Tensor, Tensor]:
    """Add a branch and prompts to the residual stream and norm it.

    Args:
        hidden: The branch, (B, L, D).
        residual: The stream, (B, L, D) in float32 or wider, or None.
        weight: Of the RMSNorm, (D,).
        eps: Of the RMSNorm.
        prompts: Added to the branch, or None.

    Returns:
        (stream, normed stream): the first in float32 or wider, the second in the dtype of `hidden`.
    """
    if prompts is not None:
        hidden = add_prompts(hidden, *prompts)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = hidden.to(wide) if residual is None else residual + hidden
    return total, F.rms_norm(total, weight.shape, weight.to(total.dtype), eps).to(hidden.dtype)


def add_prompts(x: Tensor, terms: Sequence[tuple[Tensor, Tensor]], excluded: int | None) -> Tensor:
    """Return x + Σ scale ⊙ SiLU(pre) at every token but the excluded one.

    Args:
        x: (B, L, D).
        terms: Pairs of a scale (D,) and a pre-activation (B, L, D).
        excluded: The unchanged token, or None.

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
