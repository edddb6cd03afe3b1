"""Kernels of the triton backend for scan and convolution; reference.py has the equations. Imports triton.

A program computes one block of channels of one image, direction after direction. A reversed direction counts its
tokens from the end. Steps are processed in tiles of T in the order of the scan; the states of a tile are one block
(T, N1, BE, N2), state n = n1 · N2 + n2. Triton spreads threads from the last axis on, so each thread holds all T steps
of its channels, and reading or replacing row i (a sum or a selection over the first axis) moves no data. The recurrence
is one multiply-add after another, without cancellation.

Addresses of states are multiplied by `one`, unknown to the compiler: if it saw that states are adjacent in memory, it
would give four to a thread for the access and move them through shared memory.

No atomics: sums over channels or images are written as one partial sum per program, and added afterwards.
A step past the end has Δ = 0, so the state passes through it. A None argument is a compile-time constant.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["conv_backward", "conv_forward", "scan_backward", "scan_forward"]

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x: tl.tensor) -> tl.tensor:
    small = tl.exp(-tl.abs(x))  # never overflows
    return tl.where(x >= 0, 1.0, small) / (1.0 + small)


@triton.jit
def _sigmoids(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return sigmoid(x) and sigmoid(-x); 1 - sigmoid(x) has no correct digit left at x = 20."""
    small = tl.exp(-tl.abs(x))
    large = 1.0 / (1.0 + small)
    return tl.where(x >= 0, large, small * large), tl.where(x >= 0, small * large, large)


@triton.jit
def _silu_and_slope(x: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Return SiLU(x) and its derivative."""
    sigmoid, rest = _sigmoids(x)
    return x * sigmoid, sigmoid * (1.0 + x * rest)


@triton.jit
def _softplus(x: tl.tensor) -> tl.tensor:
    """Return softplus(x), x above 20. log(1 + e) = 2 artanh(e / (2 + e)): its series is accurate for tiny e."""
    small = tl.exp(-tl.abs(x))
    s = small / (2.0 + small)  # at most 1/3: the first term left out is below 2e-9
    q = s * s
    series = 1 / 9 + q * (1 / 11 + q * (1 / 13 + q * (1 / 15)))
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * series)))
    return tl.where(x > 20.0, x, tl.maximum(x, 0.0) + 2.0 * s * series)


@triton.jit
def _row(tile: tl.tensor, i: tl.constexpr, T: tl.constexpr) -> tl.tensor:
    """Return row i of a tile, (1, …). Summed as integers, because -0.0 + 0.0 is 0.0."""
    index = tl.arange(0, T)[:, None, None, None]
    bits = tl.where(index == i, tile.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, axis=0, keep_dims=True).to(tl.float32, bitcast=True)


@triton.jit
def _with_row(tile: tl.tensor, i: tl.constexpr, row: tl.tensor, T: tl.constexpr) -> tl.tensor:
    """Return the tile with another row i."""
    index = tl.arange(0, T)[:, None, None, None]
    return tl.where(index == i, row, tile)


@triton.jit
def _place(program: tl.tensor, channels: tl.tensor, BE: tl.constexpr) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return a program's image, its channels, and which of them exist. Programs: images × blocks of channels."""
    blocks = tl.cdiv(channels, BE)
    e = program % blocks * BE + tl.arange(0, BE)
    return (program // blocks).to(tl.int64), e, e < channels


@triton.jit
def _tokens(
    tile: tl.tensor, length: tl.tensor, T: tl.constexpr, REVERSE: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """Return the token of a tile's first step, the offsets of its steps, and which of them exist."""
    step = tl.arange(0, T)
    first = tile * T
    inside = step < length - first
    if REVERSE:
        first = length - 1 - first
        step = -step
    return first, step, inside


@triton.jit
def _at(pointer: tl.tensor, first: tl.tensor, stride: tl.tensor) -> tl.tensor:
    """Return the row of a tile's first step: 64 bits once per tile, so that offsets from it fit in 32."""
    return pointer + tl.cast(first, tl.int64) * stride


@triton.jit
def _channels(
    pointer: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    stride: tl.tensor,
    e: tl.tensor,
    inside: tl.tensor,
    fits: tl.tensor,
) -> tl.tensor:
    """Return rows of channels as float32, (T, BE); zeros outside."""
    where = step[:, None] * stride + e[None, :]
    return tl.load(_at(pointer, first, stride) + where, mask=inside[:, None] & fits[None, :], other=0.0).to(tl.float32)


@triton.jit
def _put(
    pointer: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    width: tl.tensor,
    e: tl.tensor,
    inside: tl.tensor,
    fits: tl.tensor,
    value: tl.tensor,
) -> None:
    where = step[:, None] * width + e[None, :]
    tl.store(
        _at(pointer, first, width) + where, value.to(pointer.dtype.element_ty), mask=inside[:, None] & fits[None, :]
    )


@triton.jit
def _per_channel(pointer: tl.tensor, e: tl.tensor, fits: tl.tensor) -> tl.tensor:
    return tl.load(pointer + e, mask=fits, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _states(
    pointer: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    stride: tl.tensor,
    inside: tl.tensor,
    states: tl.tensor,
    T: tl.constexpr,
    BE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> tl.tensor:
    """Return rows of B or C as float32, (T, N1, BE, N2), the same for every channel; zeros outside."""
    n = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    where = step[:, None, None] * stride + n[None, :, :]
    mask = inside[:, None, None] & (n < states)[None, :, :]
    rows = tl.load(_at(pointer, first, stride) + where, mask=mask, other=0.0).to(tl.float32)
    return tl.broadcast_to(rows[:, :, None, :], [T, N1, BE, N2])


@triton.jit
def _matrix(
    pointer: tl.tensor,
    stride: tl.tensor,
    e: tl.tensor,
    fits: tl.tensor,
    states: tl.tensor,
    one: tl.tensor,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> tl.tensor:
    """Return A as float32, (1, N1, BE, N2); zeros outside."""
    n = tl.arange(0, N1)[:, None, None] * N2 + tl.arange(0, N2)[None, None, :]
    mask = fits[None, :, None] & (n < states)
    rows = tl.load(pointer + e[None, :, None] * stride + n * one, mask=mask, other=0.0).to(tl.float32)
    return rows[None, :, :, :]


@triton.jit
def _spread(tile: tl.tensor, T: tl.constexpr, BE: tl.constexpr, N2: tl.constexpr) -> tl.tensor:
    """(T, BE) → (T, 1, BE, N2), the same for every state of a channel."""
    return tl.broadcast_to(tile[:, None, :, None], [T, 1, BE, N2])


@triton.jit
def _over_states(tile: tl.tensor) -> tl.tensor:
    """(T, N1, BE, N2) → (T, BE), summed, first within a thread."""
    return tl.sum(tl.sum(tile, axis=1), axis=2)


@triton.jit
def _sum_of_states(row: tl.tensor) -> tl.tensor:
    """(1, N1, BE, N2) → (1, 1, BE, 1)."""
    return tl.sum(tl.sum(row, axis=1, keep_dims=True), axis=3, keep_dims=True)


@triton.jit
def _raw_steps(
    delta: tl.tensor,
    bias: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    stride: tl.tensor,
    e: tl.tensor,
    inside: tl.tensor,
    fits: tl.tensor,
) -> tl.tensor:
    raw = _channels(delta, first, step, stride, e, inside, fits)
    if bias is not None:
        raw += _per_channel(bias, e, fits)
    return raw


@triton.jit
def _step_sizes(raw: tl.tensor, inside: tl.tensor, SOFTPLUS: tl.constexpr) -> tl.tensor:
    if SOFTPLUS:
        raw = _softplus(raw)
    return tl.where(inside[:, None], raw, 0.0)


@triton.jit
def _forward_direction(
    u: tl.tensor,
    delta: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    bias: tl.tensor,
    u_row: tl.tensor,
    delta_row: tl.tensor,
    A_row: tl.tensor,
    B_row: tl.tensor,
    C_row: tl.tensor,
    z: tl.tensor,
    z_row: tl.tensor,
    out: tl.tensor,
    partial: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    one: tl.tensor,
    e: tl.tensor,
    fits: tl.tensor,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    T: tl.constexpr,
    BE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> None:
    decay_rate = _matrix(A, A_row, e, fits, states, one, N1, N2) * _LOG2E
    h = tl.zeros([1, N1, BE, N2], tl.float32)
    for tile in range(tl.cdiv(length, T)):
        first, step, inside = _tokens(tile, length, T, REVERSE)
        inputs = _channels(u, first, step, u_row, e, inside, fits)
        dt = _step_sizes(_raw_steps(delta, bias, first, step, delta_row, e, inside, fits), inside, SOFTPLUS)
        decay = tl.exp2(_spread(dt, T, BE, N2) * decay_rate)
        drive = _spread(dt * inputs, T, BE, N2) * _states(B, first, step, B_row, inside, states, T, BE, N1, N2)
        all_states = drive
        for i in tl.static_range(T):
            h = _row(decay, i, T) * h + _row(drive, i, T)
            all_states = _with_row(all_states, i, h, T)
        y = _over_states(all_states * _states(C, first, step, C_row, inside, states, T, BE, N1, N2))
        if D is not None:
            y += _per_channel(D, e, fits) * inputs
        if not FIRST:
            y += _channels(partial, first, step, channels, e, inside, fits)
        if LAST:
            if not FIRST:
                y *= 0.5
            if z is not None:
                gate = _channels(z, first, step, z_row, e, inside, fits)
                y *= gate * _sigmoid(gate)
            _put(out, first, step, channels, e, inside, fits, y)
        else:
            _put(partial, first, step, channels, e, inside, fits, y)


@triton.jit(do_not_specialize=["one"])
def scan_forward(
    u0: tl.tensor,
    delta0: tl.tensor,
    A0: tl.tensor,
    B0: tl.tensor,
    C0: tl.tensor,
    D0: tl.tensor,
    bias0: tl.tensor,
    u1: tl.tensor,
    delta1: tl.tensor,
    A1: tl.tensor,
    B1: tl.tensor,
    C1: tl.tensor,
    D1: tl.tensor,
    bias1: tl.tensor,
    z: tl.tensor,
    out: tl.tensor,  # (B, L, E) contiguous, as all outputs
    partial: tl.tensor,  # (B, L, E) float32: the first direction's y; each program reads only what it wrote
    u0_image: tl.tensor,
    u0_row: tl.tensor,
    delta0_image: tl.tensor,
    delta0_row: tl.tensor,
    A0_row: tl.tensor,
    B0_image: tl.tensor,
    B0_row: tl.tensor,
    C0_image: tl.tensor,
    C0_row: tl.tensor,
    u1_image: tl.tensor,
    u1_row: tl.tensor,
    delta1_image: tl.tensor,
    delta1_row: tl.tensor,
    A1_row: tl.tensor,
    B1_image: tl.tensor,
    B1_row: tl.tensor,
    C1_image: tl.tensor,
    C1_row: tl.tensor,
    z_image: tl.tensor,
    z_row: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    one: tl.tensor,  # 1, unknown to the compiler
    SOFTPLUS: tl.constexpr,
    K: tl.constexpr,
    REVERSE0: tl.constexpr,
    REVERSE1: tl.constexpr,
    T: tl.constexpr,
    BE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> None:
    """Compute the gated mean of the scans of K directions. Programs: images × blocks of channels."""
    image, e, fits = _place(tl.program_id(0), channels, BE)
    out += image * length * channels
    if z is not None:
        z += image * z_image
    if K == 2:
        partial += image * length * channels
    _forward_direction(
        u0 + image * u0_image,
        delta0 + image * delta0_image,
        A0,
        B0 + image * B0_image,
        C0 + image * C0_image,
        D0,
        bias0,
        u0_row,
        delta0_row,
        A0_row,
        B0_row,
        C0_row,
        z,
        z_row,
        out,
        partial,
        length,
        channels,
        states,
        one,
        e,
        fits,
        SOFTPLUS,
        REVERSE0,
        True,
        K == 1,
        T,
        BE,
        N1,
        N2,
    )
    if K == 2:
        tl.debug_barrier()  # other threads of this program read these values
        _forward_direction(
            u1 + image * u1_image,
            delta1 + image * delta1_image,
            A1,
            B1 + image * B1_image,
            C1 + image * C1_image,
            D1,
            bias1,
            u1_row,
            delta1_row,
            A1_row,
            B1_row,
            C1_row,
            z,
            z_row,
            out,
            partial,
            length,
            channels,
            states,
            one,
            e,
            fits,
            SOFTPLUS,
            REVERSE1,
            False,
            True,
            T,
            BE,
            N1,
            N2,
        )


@triton.jit
def _spots(one: tl.tensor, BE: tl.constexpr, N1: tl.constexpr, N2: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Return the offsets of a tile's saved states, (N1, BE, N2), in two summands, the second constant in a thread."""
    c = tl.arange(0, BE)[None, None, :, None]
    spot = c * N2 + tl.arange(0, N2)[None, None, None, :] * one
    return spot, tl.arange(0, N1)[None, :, None, None] * (BE * N2)


@triton.jit
def _ahead(
    u: tl.tensor,
    delta: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    bias: tl.tensor,
    u_image: tl.tensor,
    u_row: tl.tensor,
    delta_image: tl.tensor,
    delta_row: tl.tensor,
    A_row: tl.tensor,
    B_image: tl.tensor,
    B_row: tl.tensor,
    C_image: tl.tensor,
    C_row: tl.tensor,
    z: tl.tensor,
    z_image: tl.tensor,
    z_row: tl.tensor,
    grad: tl.tensor,
    grad_image: tl.tensor,
    grad_row: tl.tensor,
    dC: tl.tensor,
    dD: tl.tensor,
    dz: tl.tensor,
    partial: tl.tensor,
    before: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    one: tl.tensor,
    program: tl.tensor,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    KEEP: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> None:
    """Recompute the states; write dC, dz, dD and, if KEEP, the state before each tile."""
    OF_STATES: tl.constexpr = (dC is not None) or (dz is not None)
    image, e, fits = _place(program, channels, BE)
    rows = image * length * channels
    own = program.to(tl.int64)
    tiles = tl.cdiv(length, T)
    u += image * u_image
    delta += image * delta_image
    B += image * B_image
    C += image * C_image
    z = _shift(z, image * z_image)
    grad += image * grad_image
    dC = _shift(dC, own * length * states)
    dD = _shift(dD, image * channels)
    dz = _shift(dz, rows)
    partial = _shift(partial, rows)
    before = _shift(before, own * tiles * (N1 * BE * N2))
    decay_rate = _matrix(A, A_row, e, fits, states, one, N1, N2) * _LOG2E
    spot, plane = _spots(one, BE, N1, N2)
    sum_D = tl.zeros([T, BE], tl.float32)
    h = tl.zeros([1, N1, BE, N2], tl.float32)
    for tile in range(tiles):
        first, step, inside = _tokens(tile, length, T, REVERSE)
        inputs = _channels(u, first, step, u_row, e, inside, fits)
        if KEEP or OF_STATES:
            if KEEP:
                tl.store(_at(before, tile, N1 * BE * N2) + spot + plane, h)
            dt = _step_sizes(_raw_steps(delta, bias, first, step, delta_row, e, inside, fits), inside, SOFTPLUS)
            decay = tl.exp2(_spread(dt, T, BE, N2) * decay_rate)
            drive = _spread(dt * inputs, T, BE, N2) * _states(B, first, step, B_row, inside, states, T, BE, N1, N2)
            all_states = drive
            for i in tl.static_range(T):
                h = _row(decay, i, T) * h + _row(drive, i, T)
                all_states = _with_row(all_states, i, h, T)
        if OF_STATES or (dD is not None):
            dout = _channels(grad, first, step, grad_row, e, inside, fits)
            dy = dout
            if z is not None:
                gate = _channels(z, first, step, z_row, e, inside, fits)
                silu, slope = _silu_and_slope(gate)
                dy = dout * silu
            if K == 2:
                dy *= 0.5
            if dD is not None:
                sum_D += dy * inputs
            if dC is not None:
                of_C = tl.sum(all_states * _spread(dy, T, BE, N2), axis=2)
                _put_states(dC, of_C, first, step, inside, states, T, N1, N2)
            if dz is not None:
                y = _over_states(all_states * _states(C, first, step, C_row, inside, states, T, BE, N1, N2))
                if D is not None:
                    y += _per_channel(D, e, fits) * inputs
                if not FIRST:
                    y += _channels(partial, first, step, channels, e, inside, fits)
                if LAST:
                    if K == 2:
                        y *= 0.5
                    _put(dz, first, step, channels, e, inside, fits, dout * y * slope)
                else:
                    _put(partial, first, step, channels, e, inside, fits, y)
    if dD is not None:
        tl.store(dD + e, tl.sum(sum_D, axis=0), mask=fits)


@triton.jit
def _back(
    u: tl.tensor,
    delta: tl.tensor,
    A: tl.tensor,
    B: tl.tensor,
    C: tl.tensor,
    D: tl.tensor,
    bias: tl.tensor,
    u_image: tl.tensor,
    u_row: tl.tensor,
    delta_image: tl.tensor,
    delta_row: tl.tensor,
    A_row: tl.tensor,
    B_image: tl.tensor,
    B_row: tl.tensor,
    C_image: tl.tensor,
    C_row: tl.tensor,
    z: tl.tensor,
    z_image: tl.tensor,
    z_row: tl.tensor,
    grad: tl.tensor,
    grad_image: tl.tensor,
    grad_row: tl.tensor,
    du: tl.tensor,
    ddelta: tl.tensor,
    dA: tl.tensor,
    dB: tl.tensor,
    dbias: tl.tensor,
    before: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    one: tl.tensor,
    program: tl.tensor,
    SOFTPLUS: tl.constexpr,
    REVERSE: tl.constexpr,
    K: tl.constexpr,
    T: tl.constexpr,
    BE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> None:
    """Compute the gradients of the states and the rest, from the last tile to the first."""
    NEED_DT: tl.constexpr = (ddelta is not None) or (dbias is not None)
    NEED_GATE: tl.constexpr = NEED_DT or (dA is not None)  # the gradient of Δ A
    image, e, fits = _place(program, channels, BE)
    rows = image * length * channels
    own = program.to(tl.int64)
    tiles = tl.cdiv(length, T)
    u += image * u_image
    delta += image * delta_image
    B += image * B_image
    C += image * C_image
    z = _shift(z, image * z_image)
    grad += image * grad_image
    du = _shift(du, rows)
    ddelta = _shift(ddelta, rows)
    dA = _shift(dA, image * channels * states)
    dB = _shift(dB, own * length * states)
    dbias = _shift(dbias, image * channels)
    before = _shift(before, own * tiles * (N1 * BE * N2))
    decay_rate = _matrix(A, A_row, e, fits, states, one, N1, N2) * _LOG2E
    spot, plane = _spots(one, BE, N1, N2)
    sum_A = tl.zeros([1, N1, BE, N2], tl.float32)
    sum_bias = tl.zeros([BE], tl.float32)
    carry = tl.zeros([1, N1, BE, N2], tl.float32)  # decay ⊙ g of the step after the tile
    for back in range(tiles):
        tile = tiles - 1 - back
        first, step, inside = _tokens(tile, length, T, REVERSE)
        inputs = _channels(u, first, step, u_row, e, inside, fits)
        raw = _raw_steps(delta, bias, first, step, delta_row, e, inside, fits)
        dt = _step_sizes(raw, inside, SOFTPLUS)
        dy = _channels(grad, first, step, grad_row, e, inside, fits)
        if z is not None:
            gate = _channels(z, first, step, z_row, e, inside, fits)
            dy *= gate * _sigmoid(gate)
        if K == 2:
            dy *= 0.5
        decay = tl.exp2(_spread(dt, T, BE, N2) * decay_rate)
        driven = _spread(dt * inputs, T, BE, N2)
        rows_B = _states(B, first, step, B_row, inside, states, T, BE, N1, N2)
        earlier = decay  # the states before each step
        if NEED_GATE:
            drive = driven * rows_B
            h = tl.load(_at(before, tile, N1 * BE * N2) + spot + plane)
            for i in tl.static_range(T):
                earlier = _with_row(earlier, i, h, T)
                h = _row(decay, i, T) * h + _row(drive, i, T)
        rows_C = _states(C, first, step, C_row, inside, states, T, BE, N1, N2)
        cotangents = _spread(dy, T, BE, N2)
        # finish a step before the next, to hold few products at a time
        of_B = tl.zeros([T, N1, 1, N2], tl.float32)
        along = tl.zeros([T, 1, BE, 1], tl.float32)  # gradient of Δ u
        against = tl.zeros([T, 1, BE, 1], tl.float32)  # gradient of Δ, through the decay
        for j in tl.static_range(T):
            g = _row(cotangents, T - 1 - j, T) * _row(rows_C, T - 1 - j, T) + carry
            carry = _row(decay, T - 1 - j, T) * g
            if dB is not None:
                of_B = _with_row(of_B, T - 1 - j, tl.sum(g * _row(driven, T - 1 - j, T), axis=2, keep_dims=True), T)
            along = _with_row(along, T - 1 - j, _sum_of_states(g * _row(rows_B, T - 1 - j, T)), T)
            if NEED_GATE:
                of_exponent = carry * _row(earlier, T - 1 - j, T)
                if dA is not None:
                    sum_A += of_exponent * _row(_spread(dt, T, BE, N2), T - 1 - j, T)
                if NEED_DT:
                    against = _with_row(against, T - 1 - j, _sum_of_states(of_exponent * decay_rate), T)
        if dB is not None:
            _put_states(dB, tl.sum(of_B, axis=2), first, step, inside, states, T, N1, N2)
        along = _over_states(along)
        if du is not None:
            value = along * dt
            if D is not None:
                value += dy * _per_channel(D, e, fits)
            _put(du, first, step, channels, e, inside, fits, value)
        if NEED_DT:
            slope = along * inputs + _over_states(against) * _LN2
            if SOFTPLUS:
                slope = tl.where(raw > 20.0, slope, slope * _sigmoid(raw))
            if ddelta is not None:
                _put(ddelta, first, step, channels, e, inside, fits, slope)
            if dbias is not None:
                sum_bias += tl.sum(tl.where(inside[:, None], slope, 0.0), axis=0)
    if dA is not None:
        n = tl.arange(0, N1)[:, None, None] * N2 + tl.arange(0, N2)[None, None, :]
        mask = (n < states) & fits[None, :, None]
        where = e[None, :, None] * states + n * one
        tl.store(dA + where[None, :, :, :], sum_A, mask=mask[None, :, :, :])
    if dbias is not None:
        tl.store(dbias + e, sum_bias, mask=fits)


@triton.jit
def _put_states(
    pointer: tl.tensor,
    value: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    inside: tl.tensor,
    states: tl.tensor,
    T: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> None:
    """Write (T, N1, N2) to rows of N states."""
    n = tl.arange(0, N1)[:, None] * N2 + tl.arange(0, N2)[None, :]
    where = step[:, None, None] * states + n[None, :, :]
    tl.store(_at(pointer, first, states) + where, value, mask=inside[:, None, None] & (n < states)[None, :, :])


@triton.jit
def _shift(pointer: tl.tensor, by: tl.tensor) -> tl.tensor:
    """Return None for None."""
    if pointer is not None:
        pointer += by
    return pointer


@triton.jit(do_not_specialize=["one"])
def scan_backward(
    u0: tl.tensor,
    delta0: tl.tensor,
    A0: tl.tensor,
    B0: tl.tensor,
    C0: tl.tensor,
    D0: tl.tensor,
    bias0: tl.tensor,
    u1: tl.tensor,
    delta1: tl.tensor,
    A1: tl.tensor,
    B1: tl.tensor,
    C1: tl.tensor,
    D1: tl.tensor,
    bias1: tl.tensor,
    z: tl.tensor,
    grad: tl.tensor,
    du0: tl.tensor,  # (B, L, E), as ddelta and dz
    ddelta0: tl.tensor,
    dA0: tl.tensor,  # (B, E, N) float32
    dB0: tl.tensor,  # (B, blocks of channels, L, N) float32, as dC
    dC0: tl.tensor,
    dD0: tl.tensor,  # (B, E) float32, as dbias
    dbias0: tl.tensor,
    du1: tl.tensor,
    ddelta1: tl.tensor,
    dA1: tl.tensor,
    dB1: tl.tensor,
    dC1: tl.tensor,
    dD1: tl.tensor,
    dbias1: tl.tensor,
    dz: tl.tensor,
    partial: tl.tensor,  # (B, L, E) float32: the first direction's y
    before: tl.tensor,  # (B, blocks of channels, tiles, N1 · BE · N2) float32: the state before each tile
    u0_image: tl.tensor,
    u0_row: tl.tensor,
    delta0_image: tl.tensor,
    delta0_row: tl.tensor,
    A0_row: tl.tensor,
    B0_image: tl.tensor,
    B0_row: tl.tensor,
    C0_image: tl.tensor,
    C0_row: tl.tensor,
    u1_image: tl.tensor,
    u1_row: tl.tensor,
    delta1_image: tl.tensor,
    delta1_row: tl.tensor,
    A1_row: tl.tensor,
    B1_image: tl.tensor,
    B1_row: tl.tensor,
    C1_image: tl.tensor,
    C1_row: tl.tensor,
    z_image: tl.tensor,
    z_row: tl.tensor,
    grad_image: tl.tensor,
    grad_row: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    states: tl.tensor,
    one: tl.tensor,  # 1, unknown to the compiler
    SOFTPLUS: tl.constexpr,
    K: tl.constexpr,
    REVERSE0: tl.constexpr,
    REVERSE1: tl.constexpr,
    ASKED0: tl.constexpr,
    ASKED1: tl.constexpr,
    T: tl.constexpr,
    BE: tl.constexpr,
    N1: tl.constexpr,
    N2: tl.constexpr,
) -> None:
    """Compute the gradients of `scan_forward` that are not None. Programs as there.

    Program ids 1 and 2 are 0, unknown to the compiler: each part recomputes its addresses instead of holding registers.
    """
    GATE0: tl.constexpr = (ddelta0 is not None) or (dbias0 is not None) or (dA0 is not None)
    if GATE0 or (dC0 is not None) or (dz is not None and ASKED0) or (dD0 is not None):
        _ahead(
            u0,
            delta0,
            A0,
            B0,
            C0,
            D0,
            bias0,
            u0_image,
            u0_row,
            delta0_image,
            delta0_row,
            A0_row,
            B0_image,
            B0_row,
            C0_image,
            C0_row,
            z,
            z_image,
            z_row,
            grad,
            grad_image,
            grad_row,
            dC0,
            dD0,
            dz,
            partial,
            before,
            length,
            channels,
            states,
            one,
            tl.program_id(0),
            SOFTPLUS,
            REVERSE0,
            True,
            K == 1,
            GATE0,
            K,
            T,
            BE,
            N1,
            N2,
        )
        tl.debug_barrier()  # other threads read `before`; `partial` or `before` is rewritten
    if GATE0 or (du0 is not None) or (dB0 is not None):
        _back(
            u0,
            delta0,
            A0,
            B0,
            C0,
            D0,
            bias0,
            u0_image,
            u0_row,
            delta0_image,
            delta0_row,
            A0_row,
            B0_image,
            B0_row,
            C0_image,
            C0_row,
            z,
            z_image,
            z_row,
            grad,
            grad_image,
            grad_row,
            du0,
            ddelta0,
            dA0,
            dB0,
            dbias0,
            before,
            length,
            channels,
            states,
            one,
            tl.program_id(0) + tl.program_id(1),
            SOFTPLUS,
            REVERSE0,
            K,
            T,
            BE,
            N1,
            N2,
        )
        tl.debug_barrier()
    GATE1: tl.constexpr = (ddelta1 is not None) or (dbias1 is not None) or (dA1 is not None)
    if GATE1 or (dC1 is not None) or (dz is not None and ASKED1) or (dD1 is not None):
        _ahead(
            u1,
            delta1,
            A1,
            B1,
            C1,
            D1,
            bias1,
            u1_image,
            u1_row,
            delta1_image,
            delta1_row,
            A1_row,
            B1_image,
            B1_row,
            C1_image,
            C1_row,
            z,
            z_image,
            z_row,
            grad,
            grad_image,
            grad_row,
            dC1,
            dD1,
            dz,
            partial,
            before,
            length,
            channels,
            states,
            one,
            tl.program_id(0) + tl.program_id(2),
            SOFTPLUS,
            REVERSE1,
            False,
            True,
            GATE1,
            K,
            T,
            BE,
            N1,
            N2,
        )
        tl.debug_barrier()  # other threads read `before`; `partial` or `before` is rewritten
    if GATE1 or (du1 is not None) or (dB1 is not None):
        _back(
            u1,
            delta1,
            A1,
            B1,
            C1,
            D1,
            bias1,
            u1_image,
            u1_row,
            delta1_image,
            delta1_row,
            A1_row,
            B1_image,
            B1_row,
            C1_image,
            C1_row,
            z,
            z_image,
            z_row,
            grad,
            grad_image,
            grad_row,
            du1,
            ddelta1,
            dA1,
            dB1,
            dbias1,
            before,
            length,
            channels,
            states,
            one,
            tl.program_id(0) + tl.program_id(1) + tl.program_id(2),
            SOFTPLUS,
            REVERSE1,
            K,
            T,
            BE,
            N1,
            N2,
        )
        tl.debug_barrier()


@triton.jit
def _at_distance(
    pointer: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    distance: tl.constexpr,
    stride: tl.tensor,
    length: tl.tensor,
    e: tl.tensor,
    fits: tl.tensor,
) -> tl.tensor:
    """Return the rows `distance` tokens away, zeros outside."""
    there = first + distance + step
    return _channels(pointer, first + distance, step, stride, e, (there >= 0) & (there < length), fits)


@triton.jit
def _convolved(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    x_row: tl.tensor,
    weight_row: tl.tensor,
    length: tl.tensor,
    e: tl.tensor,
    fits: tl.tensor,
    AWAY: tl.constexpr,
    SIGN: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
) -> tl.tensor:
    """Return the input of SiLU at the tokens AWAY from these; the tap of age a reads the token a steps before."""
    total = tl.zeros([BL, BE], tl.float32)
    if bias is not None:
        total += _per_channel(bias, e, fits)
    for k in tl.static_range(W):
        tap = tl.load(weight + e * weight_row + k, mask=fits, other=0.0).to(tl.float32)[None, :]
        total += tap * _at_distance(x, first, step, AWAY - SIGN * (W - 1 - k), x_row, length, e, fits)
    return total


@triton.jit
def _convolve(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    x_row: tl.tensor,
    weight_row: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    e: tl.tensor,
    fits: tl.tensor,
    SILU: tl.constexpr,
    SIGN: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    y = _convolved(x, weight, bias, first, step, x_row, weight_row, length, e, fits, 0, SIGN, W, BL, BE)
    if SILU:
        y *= _sigmoid(y)
    _put(out, first, step, channels, e, first + step < length, fits, y)


@triton.jit
def conv_forward(
    x: tl.tensor,
    weight0: tl.tensor,
    bias0: tl.tensor,
    out0: tl.tensor,  # (B, L, E) contiguous
    weight1: tl.tensor,
    bias1: tl.tensor,
    out1: tl.tensor,
    x_image: tl.tensor,
    x_row: tl.tensor,
    weight0_row: tl.tensor,
    weight1_row: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    SILU: tl.constexpr,
    K: tl.constexpr,
    SIGN0: tl.constexpr,  # 1, or -1 for a reversed direction
    SIGN1: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    """Compute depth-wise convolutions of one input. Programs: images × blocks of tokens × blocks of channels."""
    blocks = tl.cdiv(channels, BE)
    parts = tl.cdiv(length, BL)
    share = tl.program_id(0) // blocks
    image = (share // parts).to(tl.int64)
    e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    fits = e < channels
    first = share % parts * BL
    step = tl.arange(0, BL)
    x += image * x_image
    rows = image * length * channels
    _convolve(
        x,
        weight0,
        bias0,
        out0 + rows,
        first,
        step,
        x_row,
        weight0_row,
        length,
        channels,
        e,
        fits,
        SILU,
        SIGN0,
        W,
        BL,
        BE,
    )
    if K == 2:
        _convolve(
            x,
            weight1,
            bias1,
            out1 + rows,
            first,
            step,
            x_row,
            weight1_row,
            length,
            channels,
            e,
            fits,
            SILU,
            SIGN1,
            W,
            BL,
            BE,
        )


@triton.jit
def _convolve_back(
    x: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    grad: tl.tensor,
    dweight: tl.tensor,
    dbias: tl.tensor,
    dx: tl.tensor,
    first: tl.tensor,
    step: tl.tensor,
    x_row: tl.tensor,
    weight_row: tl.tensor,
    grad_row: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    e: tl.tensor,
    fits: tl.tensor,
    NEED_X: tl.constexpr,
    SILU: tl.constexpr,
    SIGN: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
) -> tl.tensor:
    """Write the partial sums of one direction; return dx with its contribution added."""
    AHEAD: tl.constexpr = W if NEED_X else 1
    for age in tl.static_range(AHEAD):  # the outputs that read these tokens
        g = _at_distance(grad, first, step, SIGN * age, grad_row, length, e, fits)
        if SILU:
            y = _convolved(
                x, weight, bias, first, step, x_row, weight_row, length, e, fits, SIGN * age, SIGN, W, BL, BE
            )
            _, slope = _silu_and_slope(y)
            g *= slope
        if NEED_X:
            tap = tl.load(weight + e * weight_row + (W - 1 - age), mask=fits, other=0.0).to(tl.float32)[None, :]
            dx += tap * g
        if age == 0:
            if dbias is not None:
                tl.store(dbias + e, tl.sum(g, axis=0), mask=fits)
            if dweight is not None:
                for k in tl.static_range(W):
                    read = _at_distance(x, first, step, -SIGN * (W - 1 - k), x_row, length, e, fits)
                    tl.store(dweight + k * channels + e, tl.sum(g * read, axis=0), mask=fits)
    return dx


@triton.jit
def conv_backward(
    x: tl.tensor,
    weight0: tl.tensor,
    bias0: tl.tensor,
    grad0: tl.tensor,
    dweight0: tl.tensor,  # (blocks of tokens · B, W, E) float32
    dbias0: tl.tensor,  # (blocks of tokens · B, E) float32
    weight1: tl.tensor,
    bias1: tl.tensor,
    grad1: tl.tensor,
    dweight1: tl.tensor,
    dbias1: tl.tensor,
    dx: tl.tensor,  # (B, L, E) contiguous, or None
    x_image: tl.tensor,
    x_row: tl.tensor,
    weight0_row: tl.tensor,
    grad0_image: tl.tensor,
    grad0_row: tl.tensor,
    weight1_row: tl.tensor,
    grad1_image: tl.tensor,
    grad1_row: tl.tensor,
    length: tl.tensor,
    channels: tl.tensor,
    ASKED0: tl.constexpr,
    ASKED1: tl.constexpr,
    SILU: tl.constexpr,
    SIGN0: tl.constexpr,
    SIGN1: tl.constexpr,
    W: tl.constexpr,
    BL: tl.constexpr,
    BE: tl.constexpr,
) -> None:
    """Compute the gradients of `conv_forward` that are not None. Programs as there."""
    blocks = tl.cdiv(channels, BE)
    parts = tl.cdiv(length, BL)
    share = (tl.program_id(0) // blocks).to(tl.int64)
    image = share // parts
    e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    fits = e < channels
    first = (share % parts).to(tl.int32) * BL
    step = tl.arange(0, BL)
    x += image * x_image
    NEED_X: tl.constexpr = dx is not None
    total = tl.zeros([BL, BE], tl.float32)
    if ASKED0:
        total = _convolve_back(
            x,
            weight0,
            bias0,
            grad0 + image * grad0_image,
            _shift(dweight0, share * W * channels),
            _shift(dbias0, share * channels),
            total,
            first,
            step,
            x_row,
            weight0_row,
            grad0_row,
            length,
            channels,
            e,
            fits,
            NEED_X,
            SILU,
            SIGN0,
            W,
            BL,
            BE,
        )
    if ASKED1:
        total = _convolve_back(
            x,
            weight1,
            bias1,
            grad1 + image * grad1_image,
            _shift(dweight1, share * W * channels),
            _shift(dbias1, share * channels),
            total,
            first,
            step,
            x_row,
            weight1_row,
            grad1_row,
            length,
            channels,
            e,
            fits,
            NEED_X,
            SILU,
            SIGN1,
            W,
            BL,
            BE,
        )
    if NEED_X:
        _put(dx + image * length * channels, first, step, channels, e, first + step < length, fits, total)
