"""Scan and convolution as plain tensor operations that torch.export and torch.jit.trace can record, for any batch.

The scan runs √L steps in √L chunks in parallel, then carries the state over the chunks: about 8 √L operations in the
graph per direction.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from svp_bench.ops.types import Direction, Flags, Recompute, Tensors


def scan(
    directions: Sequence[Direction],
    reverse: Flags,
    z: Tensor | None,
    softplus: bool,
    recompute: Recompute | None = None,  # unused
) -> Tensor:
    """Return the mean over the directions of their selective scans, gated by SiLU(z); see autograd.py."""
    outs = [_scan_one(direction, back, softplus) for direction, back in zip(directions, reverse, strict=True)]
    mean = torch.stack(outs).mean(dim=0)
    return (mean if z is None else mean * F.silu(z.to(mean.dtype))).to(directions[0].u.dtype)


def _scan_one(direction: Direction, reverse: bool, softplus: bool) -> Tensor:
    wide = torch.promote_types(direction.u.dtype, torch.float32)
    tokens = [t.to(wide) for t in (direction.u, direction.delta, direction.B, direction.C)]
    u, dt, B, C = [t.flip(1) for t in tokens] if reverse else tokens
    if direction.delta_bias is not None:
        dt = dt + direction.delta_bias.to(wide)
    if softplus:
        dt = F.softplus(dt)
    length = int(u.shape[1])
    steps = max(1, math.isqrt(length))
    chunks = -(-length // steps)
    pad = chunks * steps - length
    decay = torch.exp(dt.unsqueeze(-1) * direction.A.to(wide))  # (B, L, E, N)
    drive = (dt * u).unsqueeze(-1) * B.unsqueeze(2)
    decay = torch.unflatten(F.pad(decay, (0, 0, 0, 0, 0, pad), value=1.0), 1, (chunks, steps))
    drive = torch.unflatten(F.pad(drive, (0, 0, 0, 0, 0, pad)), 1, (chunks, steps))
    h, product = drive[:, :, 0], decay[:, :, 0]  # of all chunks at once, each from a state of zero
    states, products = [h], [product]
    for t in range(1, steps):
        h, product = drive[:, :, t] + decay[:, :, t] * h, product * decay[:, :, t]
        states.append(h)
        products.append(product)
    carry = torch.zeros_like(h[:, 0])
    carries = [carry]  # the state before each chunk
    for k in range(chunks - 1):
        carry = h[:, k] + product[:, k] * carry
        carries.append(carry)
    all_states = torch.stack(states, dim=2) + torch.stack(products, dim=2) * torch.stack(carries, dim=1).unsqueeze(2)
    y = torch.matmul(all_states.flatten(1, 2)[:, :length], C.unsqueeze(-1)).squeeze(-1)
    if direction.D is not None:
        y = y + direction.D.to(wide) * u
    return y.flip(1) if reverse else y


def conv(x: Tensor, weights: Sequence[Tensor], biases: Tensors, reverse: Flags, silu: bool) -> tuple[Tensor, ...]:
    """Return the depth-wise causal convolution of the same input in each direction; see autograd.py."""
    wide, length = torch.promote_types(x.dtype, torch.float32), int(x.shape[1])
    outs = []
    for weight, bias, back in zip(weights, biases, reverse, strict=True):
        row = (x.flip(1) if back else x).mT.to(wide)
        channels, width = map(int, weight.shape)
        taps, offset = weight.unsqueeze(1).to(wide), None if bias is None else bias.to(wide)
        y = F.conv1d(row, taps, offset, padding=width - 1, groups=channels)[..., :length].mT
        y = F.silu(y) if silu else y
        outs.append((y.flip(1) if back else y).to(x.dtype))
    return tuple(outs)
