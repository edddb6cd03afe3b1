"""CPU kernels of scan, convolution and norm, compiled by numba at the first call and cached on disk.

Each kernel is a C function of one argument, the address of a block of int64: a task counter, sizes, and addresses of
tensors. Threads take tasks from the counter until none is left. A task's result does not depend on its thread, and all
sums are added in a fixed order, so reruns are bit-equal.

Layout: channels last, float32. A *tile* is one vector of T neighbouring channels: 16 with AVX-512, else 8, so that four
vectors side by side fit the registers.
Letters as in reference.py: B batch, L length, E channels (a multiple of 16), N states (padded to NP, a multiple of 8),
K directions. Addresses and strides are in bytes.

Scratch memory is an array used by its address only. numba frees an array after its last use, so each kernel uses it
once more at its end. Work is done on four vectors at a time (four states, or four steps), see simd.py. A reversed
direction has negative strides. Missing steps in the last four of a pass repeat its last step.
"""

# mypy: ignore-errors
# numba's decorators and our vector intrinsics are untyped.

from __future__ import annotations

import numpy as np
from numba import njit, types

from svp_bench.ops.simd import (
    LANES,
    add,
    broadcast,
    exp2_4,
    exp2_bounded_4,
    fma,
    gather,
    larger,
    load,
    load_float,
    load_int,
    mul,
    prefetch,
    silu,
    silu_4,
    silu_slope,
    silu_slope_4,
    softplus_4,
    softplus_slope_4,
    splat,
    store,
    store_float,
    store_sums,
    sub,
    take,
    within,
)

TILE = LANES
UNIT = 16  # channels of a task: a cache line, which two threads must not share
HALVES = UNIT // TILE
CHUNK = 16  # steps between two saved states
BLOCK = 12 * HALVES  # tiles whose steps of a chunk fit in the second-level cache
PAD = HALVES  # lines between the tiles of a block, so that they do not all fall into one set of the cache
_LINE = 4 * TILE  # bytes of a tile
LN2 = np.float32(0.6931471805599453)
LOG2E = np.float32(1.4426950408889634)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)
BOUND = np.float32(126.0)  # exponents of two up to here need no bounds

# A block begins with the shared fields; then come the fields of each direction.
SHARED = ("counter", "tasks", "batch", "length", "channels", "states", "directions", "softplus", "groups", "chunks")
SHARED += ("z", "z_batch", "z_row", "out", "dout", "dout_batch", "dout_row", "dz", "need_A")
DIRECTION = ("reverse", "u", "u_batch", "u_row", "delta", "delta_batch", "delta_row", "A", "A_row", "B", "B_batch")
DIRECTION += ("B_row", "C", "C_batch", "C_row", "D", "bias", "saved", "du", "ddelta", "dB", "dC", "dA", "dD")

_COUNTER, _TASKS, _BATCH, _LENGTH, _CHANNELS, _STATES, _DIRECTIONS, _SOFTPLUS, _GROUPS, _CHUNKS = range(0, 80, 8)
_Z, _Z_BATCH, _Z_ROW, _OUT, _DOUT, _DOUT_BATCH, _DOUT_ROW, _DZ, _NEED_A = range(80, 152, 8)
_FIRST = 8 * len(SHARED)
_NEXT = 8 * len(DIRECTION)
_REVERSE, _U, _U_BATCH, _U_ROW, _DELTA, _DELTA_BATCH, _DELTA_ROW, _A, _A_ROW, _B, _B_BATCH = range(0, 88, 8)
_B_ROW, _C, _C_BATCH, _C_ROW, _D, _BIAS, _SAVED, _DU, _DDELTA, _DB, _DC, _DA, _DD = range(88, 192, 8)


@njit
def _put(place, v0, v1, v2, v3):
    store(place, v0)
    store(place + _LINE, v1)
    store(place + 2 * _LINE, v2)
    store(place + 3 * _LINE, v3)


@njit
def _clear(place, lines):
    for i in range(lines):
        store(place + i * _LINE, splat(ZERO))


@njit
def _turn(A, A_row, states, padded, place):
    """Write log2(e) A of a tile, (T, N), as lines of one state each, zeros for those beyond N; return max |·|."""
    largest = splat(ZERO)
    for n in range(states):
        value = mul(gather(A + 4 * n, A_row), splat(LOG2E))
        store(place + n * _LINE, value)
        largest = larger(largest, value)
    _clear(place + states * _LINE, padded - states)
    return largest


def _forward_states(decays):
    @njit
    def run(h, A, dts, B, B_step, C, C_step, y, y_step, steps):
        """Advance four states through a chunk: h is read and written, C · h added to y."""
        a0, a1, a2, a3 = load(A), load(A + _LINE), load(A + 2 * _LINE), load(A + 3 * _LINE)
        h0, h1, h2, h3 = load(h), load(h + _LINE), load(h + 2 * _LINE), load(h + 3 * _LINE)
        for _i in range(steps):
            dt, w, total = load(dts), load(dts + CHUNK * _LINE), load(y)
            e0, e1, e2, e3 = decays(mul(dt, a0), mul(dt, a1), mul(dt, a2), mul(dt, a3))
            w0, w1, w2, w3 = (
                mul(w, broadcast(B)),
                mul(w, broadcast(B + 4)),
                mul(w, broadcast(B + 8)),
                mul(w, broadcast(B + 12)),
            )
            h0, h1, h2, h3 = fma(e0, h0, w0), fma(e1, h1, w1), fma(e2, h2, w2), fma(e3, h3, w3)
            total = fma(h1, broadcast(C + 4), fma(h0, broadcast(C), total))
            store(y, fma(h3, broadcast(C + 12), fma(h2, broadcast(C + 8), total)))
            dts += _LINE
            B += B_step
            C += C_step
            y += y_step
        store(h, h0)
        store(h + _LINE, h1)
        store(h + 2 * _LINE, h2)
        store(h + 3 * _LINE, h3)

    return run


_forward_states_any = _forward_states(exp2_4)
_forward_states_bounded = _forward_states(exp2_bounded_4)


@njit
def _turn_group(mine, start, stop, states, padded, As):
    """Apply `_turn` to each tile of a group; the largest value of a tile follows its states."""
    A, A_row = load_int(mine + _A), load_int(mine + _A_ROW)
    for tile in range(start, stop):
        place = As + (tile - start) * (padded + 1) * _LINE
        store(place + padded * _LINE, _turn(A + tile * TILE * A_row, A_row, states, padded, place))


def scan_forward(block):
    """Compute y = SiLU(z) times the mean of the scans of all directions; a task is one image × one unit.

    `saved`, if not 0, receives the state before each chunk, (B, tiles, chunks, NP, T).
    """
    length = load_int(block + _LENGTH)
    channels = load_int(block + _CHANNELS)
    states = load_int(block + _STATES)
    padded = (states + 7) // 8 * 8
    directions = load_int(block + _DIRECTIONS)
    plus = load_int(block + _SOFTPLUS)
    chunks = load_int(block + _CHUNKS)
    tasks = load_int(block + _TASKS)
    tiles, units = channels // TILE, channels // UNIT
    scratch = np.empty((2 * padded + length + 2 * CHUNK + 1) * TILE, np.float32)
    h = (scratch.ctypes.data + _LINE - 1) // _LINE * _LINE
    A = h + padded * _LINE
    dts = A + padded * _LINE  # Δ of a chunk's steps, then Δ u
    y = dts + 2 * CHUNK * _LINE
    scale = splat(np.float32(1.0 / directions))
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, first_tile = task // units, task % units * HALVES
        for tile in range(first_tile, first_tile + HALVES):
            for k in range(directions):
                mine = block + _FIRST + k * _NEXT
                u_step, delta_step = load_int(mine + _U_ROW), load_int(mine + _DELTA_ROW)
                B_step, C_step, y_step = load_int(mine + _B_ROW), load_int(mine + _C_ROW), _LINE
                u = load_int(mine + _U) + b * load_int(mine + _U_BATCH) + tile * _LINE
                delta = load_int(mine + _DELTA) + b * load_int(mine + _DELTA_BATCH) + tile * _LINE
                B = load_int(mine + _B) + b * load_int(mine + _B_BATCH)
                C = load_int(mine + _C) + b * load_int(mine + _C_BATCH)
                y_k = y
                if load_int(mine + _REVERSE):
                    last = length - 1
                    u, delta, B, C = u + last * u_step, delta + last * delta_step, B + last * B_step, C + last * C_step
                    y_k = y + last * _LINE
                    u_step, delta_step, B_step, C_step, y_step = -u_step, -delta_step, -B_step, -C_step, -y_step
                A_row = load_int(mine + _A_ROW)
                largest = _turn(load_int(mine + _A) + tile * TILE * A_row, A_row, states, padded, A)
                saved = load_int(mine + _SAVED)
                D = load(load_int(mine + _D) + tile * _LINE)
                bias = load(load_int(mine + _BIAS) + tile * _LINE)
                _clear(h, padded)
                for chunk in range(chunks):
                    first = chunk * CHUNK
                    steps = min(CHUNK, length - first)
                    if saved:
                        place = saved + ((b * tiles + tile) * chunks + chunk) * padded * _LINE
                        for n in range(padded):
                            store(place + n * _LINE, load(h + n * _LINE))
                    for s in range(first + CHUNK, min(first + 2 * CHUNK, length)):
                        prefetch(delta + s * delta_step)
                        prefetch(u + s * u_step)
                    top = splat(ZERO)
                    for i in range(0, steps, 4):
                        s0, s1 = first + i, first + min(i + 1, steps - 1)
                        s2, s3 = first + min(i + 2, steps - 1), first + min(i + 3, steps - 1)
                        dt0, dt1 = add(load(delta + s0 * delta_step), bias), add(load(delta + s1 * delta_step), bias)
                        dt2, dt3 = add(load(delta + s2 * delta_step), bias), add(load(delta + s3 * delta_step), bias)
                        if plus:
                            dt0, dt1, dt2, dt3 = softplus_4(dt0, dt1, dt2, dt3)
                        u0, u1, u2, u3 = (
                            load(u + s0 * u_step),
                            load(u + s1 * u_step),
                            load(u + s2 * u_step),
                            load(u + s3 * u_step),
                        )
                        top = larger(larger(larger(larger(top, dt0), dt1), dt2), dt3)
                        place = dts + i * _LINE
                        _put(place, dt0, dt1, dt2, dt3)
                        _put(place + CHUNK * _LINE, mul(dt0, u0), mul(dt1, u1), mul(dt2, u2), mul(dt3, u3))
                        p0, p1, p2, p3 = y_k + s0 * y_step, y_k + s1 * y_step, y_k + s2 * y_step, y_k + s3 * y_step
                        y0, y1, y2, y3 = mul(D, u0), mul(D, u1), mul(D, u2), mul(D, u3)
                        if k > 0:
                            y0, y1, y2, y3 = add(y0, load(p0)), add(y1, load(p1)), add(y2, load(p2)), add(y3, load(p3))
                        store(p0, y0)
                        store(p1, y1)
                        store(p2, y2)
                        store(p3, y3)
                    B_at, C_at, y_at = B + first * B_step, C + first * C_step, y_k + first * y_step
                    if within(mul(top, largest), BOUND):
                        for n in range(0, padded, 4):
                            _forward_states_bounded(
                                *(h + n * _LINE, A + n * _LINE, dts, B_at + 4 * n, B_step, C_at + 4 * n, C_step),
                                *(y_at, y_step, steps),
                            )
                    else:
                        for n in range(0, padded, 4):
                            _forward_states_any(
                                *(h + n * _LINE, A + n * _LINE, dts, B_at + 4 * n, B_step, C_at + 4 * n, C_step),
                                *(y_at, y_step, steps),
                            )
            z = load_int(block + _Z)
            out = load_int(block + _OUT) + (b * length * channels + tile * TILE) * 4
            z_row, row = load_int(block + _Z_ROW), channels * 4
            if z:
                z += b * load_int(block + _Z_BATCH) + tile * _LINE
            for t0 in range(0, length, 4):
                t1, t2, t3 = min(t0 + 1, length - 1), min(t0 + 2, length - 1), min(t0 + 3, length - 1)
                y0, y1 = mul(load(y + t0 * _LINE), scale), mul(load(y + t1 * _LINE), scale)
                y2, y3 = mul(load(y + t2 * _LINE), scale), mul(load(y + t3 * _LINE), scale)
                if z:
                    z0, z1, z2, z3 = silu_4(
                        load(z + t0 * z_row), load(z + t1 * z_row), load(z + t2 * z_row), load(z + t3 * z_row)
                    )
                    y0, y1, y2, y3 = mul(y0, z0), mul(y1, z1), mul(y2, z2), mul(y3, z3)
                store(out + t0 * row, y0)
                store(out + t1 * row, y1)
                store(out + t2 * row, y2)
                store(out + t3 * row, y3)
    scratch[0] = ZERO  # keeps the array alive until here


def _again_states(decays):
    @njit
    def run(h, decay, A, dts, B, B_step, C, C_step, y, steps):
        """Advance four states through a chunk; store states and decays, add C · h to y if y is not 0."""
        a0, a1, a2, a3 = load(A), load(A + _LINE), load(A + 2 * _LINE), load(A + 3 * _LINE)
        h0, h1, h2, h3 = load(h), load(h + _LINE), load(h + 2 * _LINE), load(h + 3 * _LINE)
        for _i in range(steps):
            h += 4 * _LINE
            dt, w = load(dts), load(dts + CHUNK * _LINE)
            e0, e1, e2, e3 = decays(mul(dt, a0), mul(dt, a1), mul(dt, a2), mul(dt, a3))
            w0, w1, w2, w3 = (
                mul(w, broadcast(B)),
                mul(w, broadcast(B + 4)),
                mul(w, broadcast(B + 8)),
                mul(w, broadcast(B + 12)),
            )
            h0, h1, h2, h3 = fma(e0, h0, w0), fma(e1, h1, w1), fma(e2, h2, w2), fma(e3, h3, w3)
            store(decay, e0)
            store(decay + _LINE, e1)
            store(decay + 2 * _LINE, e2)
            store(decay + 3 * _LINE, e3)
            store(h, h0)
            store(h + _LINE, h1)
            store(h + 2 * _LINE, h2)
            store(h + 3 * _LINE, h3)
            if y:
                total = fma(h1, broadcast(C + 4), fma(h0, broadcast(C), load(y)))
                store(y, fma(h3, broadcast(C + 12), fma(h2, broadcast(C + 8), total)))
                y += _LINE
            dts += _LINE
            decay += 4 * _LINE
            B += B_step
            C += C_step

    return run


_again_states_any = _again_states(exp2_4)
_again_states_bounded = _again_states(exp2_bounded_4)


def _back_states(need_A):
    @njit
    def run(g, h, decay, A, dA, dts, B, B_step, C, C_step, for_B, for_C, steps):
        """Backward pass of four states through a chunk. `dts` holds CHUNK lines each of Δ, Δ u, the gradient of y, and
        two sums over the states."""
        a0, a1, a2, a3 = load(A), load(A + _LINE), load(A + 2 * _LINE), load(A + 3 * _LINE)
        g0, g1, g2, g3 = load(g), load(g + _LINE), load(g + 2 * _LINE), load(g + 3 * _LINE)
        if need_A:
            d0, d1, d2, d3 = load(dA), load(dA + _LINE), load(dA + 2 * _LINE), load(dA + 3 * _LINE)
        last = steps - 1
        dts += last * _LINE
        B, C = B + last * B_step, C + last * C_step
        h += steps * 4 * _LINE
        decay += last * 4 * _LINE
        for_B, for_C = for_B + last * 4 * _LINE, for_C + last * 4 * _LINE
        h0, h1, h2, h3 = load(h), load(h + _LINE), load(h + 2 * _LINE), load(h + 3 * _LINE)
        for _i in range(steps):
            h -= 4 * _LINE
            w, dy = load(dts + CHUNK * _LINE), load(dts + 2 * CHUNK * _LINE)
            drive, rate = load(dts + 3 * CHUNK * _LINE), load(dts + 4 * CHUNK * _LINE)
            g0, g1 = fma(dy, broadcast(C), g0), fma(dy, broadcast(C + 4), g1)
            g2, g3 = fma(dy, broadcast(C + 8), g2), fma(dy, broadcast(C + 12), g3)
            store(for_C, fma(dy, h0, load(for_C)))
            store(for_C + _LINE, fma(dy, h1, load(for_C + _LINE)))
            store(for_C + 2 * _LINE, fma(dy, h2, load(for_C + 2 * _LINE)))
            store(for_C + 3 * _LINE, fma(dy, h3, load(for_C + 3 * _LINE)))
            store(for_B, fma(w, g0, load(for_B)))
            store(for_B + _LINE, fma(w, g1, load(for_B + _LINE)))
            store(for_B + 2 * _LINE, fma(w, g2, load(for_B + 2 * _LINE)))
            store(for_B + 3 * _LINE, fma(w, g3, load(for_B + 3 * _LINE)))
            drive = fma(g1, broadcast(B + 4), fma(g0, broadcast(B), drive))
            drive = fma(g3, broadcast(B + 12), fma(g2, broadcast(B + 8), drive))
            store(dts + 3 * CHUNK * _LINE, drive)
            g0, g1 = mul(g0, load(decay)), mul(g1, load(decay + _LINE))
            g2, g3 = mul(g2, load(decay + 2 * _LINE)), mul(g3, load(decay + 3 * _LINE))
            h0, h1, h2, h3 = load(h), load(h + _LINE), load(h + 2 * _LINE), load(h + 3 * _LINE)
            t0, t1, t2, t3 = mul(g0, h0), mul(g1, h1), mul(g2, h2), mul(g3, h3)  # gradients of Δ A
            rate = fma(t3, a3, fma(t2, a2, fma(t1, a1, fma(t0, a0, rate))))
            store(dts + 4 * CHUNK * _LINE, rate)
            if need_A:
                dt = load(dts)
                d0, d1, d2, d3 = fma(t0, dt, d0), fma(t1, dt, d1), fma(t2, dt, d2), fma(t3, dt, d3)
            dts -= _LINE
            decay -= 4 * _LINE
            for_B -= 4 * _LINE
            for_C -= 4 * _LINE
            B -= B_step
            C -= C_step
        store(g, g0)
        store(g + _LINE, g1)
        store(g + 2 * _LINE, g2)
        store(g + 3 * _LINE, g3)
        if need_A:
            store(dA, d0)
            store(dA + _LINE, d1)
            store(dA + 2 * _LINE, d2)
            store(dA + 3 * _LINE, d3)

    return run


_back_states_A = _back_states(True)
_back_states_frozen = _back_states(False)


@njit
def _store_row_sums(row, sums, padded, i):
    """Write the sums over the lanes of `sums`, (NP / 4, CHUNK, 4, T), at step i, one float a state."""
    for n in range(0, padded, 8):
        left = sums + (n // 4 * CHUNK + i) * 4 * _LINE
        right = left + 4 * CHUNK * _LINE
        store_sums(
            row + 4 * n,
            *(load(left), load(left + _LINE), load(left + 2 * _LINE), load(left + 3 * _LINE)),
            *(load(right), load(right + _LINE), load(right + 2 * _LINE), load(right + 3 * _LINE)),
        )


def scan_backward(block):
    """Compute the gradients of `scan_forward`; a task is one image × one group of tiles.

    dB and dC are summed over the channels of a group, (groups, B, L, NP); dA, (B, tiles, NP, T), and dD, (B, E), over
    the steps of an image. The caller adds the rest. From the last chunk on, a block of tiles at a time: read the steps
    row by row, recompute the states of each tile and iterate backwards. Sums over channels stay vectors in a chunk.
    """
    length = load_int(block + _LENGTH)
    channels = load_int(block + _CHANNELS)
    states = load_int(block + _STATES)
    padded = (states + 7) // 8 * 8
    batch = load_int(block + _BATCH)
    directions = load_int(block + _DIRECTIONS)
    plus = load_int(block + _SOFTPLUS)
    chunks = load_int(block + _CHUNKS)
    groups = load_int(block + _GROUPS)
    tasks = load_int(block + _TASKS)
    need_A = load_int(block + _NEED_A)
    tiles, units = channels // TILE, channels // UNIT
    most = (units // groups + 1) * HALVES
    z, dz, dout = load_int(block + _Z), load_int(block + _DZ), load_int(block + _DOUT)
    z_row, dout_row, row = load_int(block + _Z_ROW), load_int(block + _DOUT_ROW), channels * 4
    own = (8 * CHUNK + PAD) * _LINE  # of a tile: Δ, Δ u, gradient of y, two sums, slopes of Δ and the gate, y
    count = most * (2 * padded + 1) + BLOCK * (1 + PAD + 8 * CHUNK) + CHUNK * (2 * padded + 8) + 4 + 1
    scratch = np.empty(count * TILE, np.float32)
    g = (scratch.ctypes.data + _LINE - 1) // _LINE * _LINE
    As = g + most * padded * _LINE
    tops = As + most * (padded + 1) * _LINE
    lines = tops + BLOCK * _LINE
    for_B = lines + BLOCK * own
    for_C = for_B + CHUNK * padded * _LINE
    decay = for_C + CHUNK * padded * _LINE
    h = decay + 4 * CHUNK * _LINE
    part = CHUNK * _LINE
    scale = splat(np.float32(1.0 / directions))
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, group = task // groups, task % groups
        start, stop = group * units // groups * HALVES, (group + 1) * units // groups * HALVES
        dout_at = dout + b * load_int(block + _DOUT_BATCH)
        z_at, dz_at = z + b * load_int(block + _Z_BATCH), dz + b * length * row
        for k in range(directions):
            mine = block + _FIRST + k * _NEXT
            u_step, delta_step = load_int(mine + _U_ROW), load_int(mine + _DELTA_ROW)
            B_step, C_step = load_int(mine + _B_ROW), load_int(mine + _C_ROW)
            u = load_int(mine + _U) + b * load_int(mine + _U_BATCH)
            delta = load_int(mine + _DELTA) + b * load_int(mine + _DELTA_BATCH)
            B = load_int(mine + _B) + b * load_int(mine + _B_BATCH)
            C = load_int(mine + _C) + b * load_int(mine + _C_BATCH)
            D_at, bias_at = load_int(mine + _D), load_int(mine + _BIAS)
            du, ddelta = load_int(mine + _DU) + b * length * row, load_int(mine + _DDELTA) + b * length * row
            dB = load_int(mine + _DB) + (group * batch + b) * length * padded * 4
            dC = load_int(mine + _DC) + (group * batch + b) * length * padded * 4
            origin, sign = 0, 1  # step s is token origin + sign · s
            if load_int(mine + _REVERSE):
                origin, sign = length - 1, -1
            _clear(g, (stop - start) * padded)
            _turn_group(mine, start, stop, states, padded, As)
            if need_A:
                _clear(load_int(mine + _DA) + (b * tiles + start) * padded * _LINE, (stop - start) * padded)
                _clear(load_int(mine + _DD) + b * row + start * _LINE, stop - start)
            for chunk in range(chunks - 1, -1, -1):
                first = chunk * CHUNK
                steps = min(CHUNK, length - first)
                t_first = origin + sign * first
                B_at, C_at = B + t_first * B_step, C + t_first * C_step
                _clear(for_B, 2 * CHUNK * padded)
                for left in range(start, stop, BLOCK):
                    right = min(left + BLOCK, stop)
                    _clear(tops, right - left)
                    for i in range(0, steps, 4):
                        t0, t1 = t_first + sign * i, t_first + sign * min(i + 1, steps - 1)
                        t2, t3 = t_first + sign * min(i + 2, steps - 1), t_first + sign * min(i + 3, steps - 1)
                        for tile in range(left, right):
                            at, line = tile * _LINE, lines + (tile - left) * own + i * _LINE
                            bias, D, place = load(bias_at + at), load(D_at + at), delta + at
                            v0, v1 = add(load(place + t0 * delta_step), bias), add(load(place + t1 * delta_step), bias)
                            v2, v3 = add(load(place + t2 * delta_step), bias), add(load(place + t3 * delta_step), bias)
                            if plus:
                                v0, v1, v2, v3, s0, s1, s2, s3 = softplus_slope_4(v0, v1, v2, v3)
                                _put(line + 5 * part, s0, s1, s2, s3)
                            place = tops + (tile - left) * _LINE
                            store(place, larger(larger(larger(larger(load(place), v0), v1), v2), v3))
                            _put(line, v0, v1, v2, v3)
                            place = u + at
                            u0, u1 = load(place + t0 * u_step), load(place + t1 * u_step)
                            u2, u3 = load(place + t2 * u_step), load(place + t3 * u_step)
                            _put(line + part, mul(v0, u0), mul(v1, u1), mul(v2, u2), mul(v3, u3))
                            _put(line + 7 * part, mul(D, u0), mul(D, u1), mul(D, u2), mul(D, u3))
                            place = dout_at + at
                            v0, v1 = mul(load(place + t0 * dout_row), scale), mul(load(place + t1 * dout_row), scale)
                            v2, v3 = mul(load(place + t2 * dout_row), scale), mul(load(place + t3 * dout_row), scale)
                            if z:
                                place = z_at + at
                                u0, u1, u2, u3, s0, s1, s2, s3 = silu_slope_4(
                                    *(load(place + t0 * z_row), load(place + t1 * z_row)),
                                    *(load(place + t2 * z_row), load(place + t3 * z_row)),
                                )
                                _put(line + 6 * part, mul(v0, s0), mul(v1, s1), mul(v2, s2), mul(v3, s3))
                                v0, v1, v2, v3 = mul(v0, u0), mul(v1, u1), mul(v2, u2), mul(v3, u3)
                            _put(line + 2 * part, v0, v1, v2, v3)
                            _put(line + 3 * part, splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO))
                            _put(line + 4 * part, splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO))
                    for tile in range(left, right):
                        A, line = As + (tile - start) * (padded + 1) * _LINE, lines + (tile - left) * own
                        dA = load_int(mine + _DA) + (b * tiles + tile) * padded * _LINE
                        saved = load_int(mine + _SAVED) + ((b * tiles + tile) * chunks + chunk) * padded * _LINE
                        bounded = within(mul(load(tops + (tile - left) * _LINE), load(A + padded * _LINE)), BOUND)
                        y = line + 7 * part if dz else 0
                        for n in range(0, padded, 4):
                            place = saved + n * _LINE
                            _put(h, load(place), load(place + _LINE), load(place + 2 * _LINE), load(place + 3 * _LINE))
                            again = (
                                *(
                                    h,
                                    decay,
                                    A + n * _LINE,
                                    line,
                                    B_at + 4 * n,
                                    sign * B_step,
                                    C_at + 4 * n,
                                    sign * C_step,
                                ),
                                *(y, steps),
                            )
                            if bounded:
                                _again_states_bounded(*again)
                            else:
                                _again_states_any(*again)
                            back = (
                                *(
                                    g + ((tile - start) * padded + n) * _LINE,
                                    h,
                                    decay,
                                    A + n * _LINE,
                                    dA + n * _LINE,
                                    line,
                                ),
                                *(B_at + 4 * n, sign * B_step, C_at + 4 * n, sign * C_step),
                                *(for_B + n * CHUNK * _LINE, for_C + n * CHUNK * _LINE, steps),
                            )
                            if need_A:
                                _back_states_A(*back)
                            else:
                                _back_states_frozen(*back)
                    for i in range(steps):
                        t = t_first + sign * i
                        for tile in range(left, right):
                            at, line = tile * _LINE, lines + (tile - left) * own + i * _LINE
                            ut, driven, force = load(u + t * u_step + at), load(line + 3 * part), load(line + 2 * part)
                            store(du + t * row + at, fma(driven, load(line), mul(force, load(D_at + at))))
                            v = fma(driven, ut, mul(load(line + 4 * part), splat(LN2)))
                            if plus:
                                v = mul(v, load(line + 5 * part))
                            store(ddelta + t * row + at, v)
                            if dz:
                                v, place = load(line + 7 * part), dz_at + t * row + at
                                # dz holds this direction's y until the last direction
                                v = add(v, load(place)) if k > 0 else v
                                store(place, mul(v, load(line + 6 * part)) if k == directions - 1 else v)
                            if need_A:
                                place = load_int(mine + _DD) + b * row + at
                                store(place, fma(force, ut, load(place)))
                for i in range(steps):
                    t = t_first + sign * i
                    _store_row_sums(dB + t * padded * 4, for_B, padded, i)
                    _store_row_sums(dC + t * padded * 4, for_C, padded, i)
    scratch[0] = ZERO  # keeps the array alive until here


# The block of a convolution: shared fields, then those of each direction. Weights are (E, W).
CONV_SHARED = ("counter", "tasks", "length", "channels", "directions", "silu", "width", "x", "x_batch", "x_row", "dx")
CONV_DIRECTION = ("reverse", "weight", "bias", "out", "dout", "dout_batch", "dout_row", "dweight", "dbias")
(_CV_LENGTH, _CV_CHANNELS, _CV_DIRECTIONS, _CV_SILU, _CV_WIDTH, _CV_X, _CV_X_BATCH, _CV_X_ROW, _CV_DX) = range(
    16, 88, 8
)
_CV_FIRST, _CV_NEXT = 8 * len(CONV_SHARED), 8 * len(CONV_DIRECTION)
(_CV_REVERSE, _CV_WEIGHT, _CV_BIAS, _CV_OUT, _CV_DOUT, _CV_DOUT_BATCH, _CV_DOUT_ROW) = range(0, 56, 8)
_CV_DWEIGHT, _CV_DBIAS = 56, 64


@njit
def _turn_taps(weight, width, place):
    """Write the weights of a tile, (T, W), as lines of one tap each, that of the step itself first."""
    for back in range(width):
        store(place + back * _LINE, gather(weight + (width - 1 - back) * 4, width * 4))


@njit
def _taps_4(place, step, taps, width, v0, v1, v2, v3):
    """Add the taps of four neighbouring steps; the tap of `back` steps before reads `back · step` bytes further."""
    for back in range(width):
        tap = load(taps + back * _LINE)
        v0, v1 = fma(tap, load(place), v0), fma(tap, load(place + _LINE), v1)
        v2, v3 = fma(tap, load(place + 2 * _LINE), v2), fma(tap, load(place + 3 * _LINE), v3)
        place += step
    return v0, v1, v2, v3


def conv_forward(block):
    """Compute the depth-wise causal convolution (and SiLU) in each direction; a task is one image × one unit.

    The tile is copied to a scratch place between zeros, so that no tap has to look where it reads.
    """
    length, channels = load_int(block + _CV_LENGTH), load_int(block + _CV_CHANNELS)
    directions, silu_after = load_int(block + _CV_DIRECTIONS), load_int(block + _CV_SILU)
    width, tasks, units = load_int(block + _CV_WIDTH), load_int(block + _TASKS), channels // UNIT
    x_row, row = load_int(block + _CV_X_ROW), channels * 4
    margin = width + 2
    scratch = np.zeros((2 * margin + length + width + 1) * TILE, np.float32)
    copy = (scratch.ctypes.data + _LINE - 1) // _LINE * _LINE + margin * _LINE
    taps = copy + (length + margin) * _LINE
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, first_tile = task // units, task % units * HALVES
        for tile in range(first_tile, first_tile + HALVES):
            at = tile * _LINE
            x = load_int(block + _CV_X) + b * load_int(block + _CV_X_BATCH) + at
            for t in range(length):
                store(copy + t * _LINE, load(x + t * x_row))
            for k in range(directions):
                mine = block + _CV_FIRST + k * _CV_NEXT
                step = _LINE if load_int(mine + _CV_REVERSE) else -_LINE
                _turn_taps(load_int(mine + _CV_WEIGHT) + at * width, width, taps)
                bias = load(load_int(mine + _CV_BIAS) + at)
                out = load_int(mine + _CV_OUT) + b * length * row + at
                for t in range(0, length, 4):
                    v0, v1, v2, v3 = _taps_4(copy + t * _LINE, step, taps, width, bias, bias, bias, bias)
                    if silu_after:
                        v0, v1, v2, v3 = silu_4(v0, v1, v2, v3)
                    store(out + t * row, v0)
                    if t + 1 < length:
                        store(out + (t + 1) * row, v1)
                    if t + 2 < length:
                        store(out + (t + 2) * row, v2)
                    if t + 3 < length:
                        store(out + (t + 3) * row, v3)
    scratch[0] = ZERO  # keeps the array alive until here


def conv_backward(block):
    """Compute the gradients of `conv_forward`; of weight, (B, W, E), and bias, (B, E), per image and if not 0."""
    length, channels = load_int(block + _CV_LENGTH), load_int(block + _CV_CHANNELS)
    directions, silu_after = load_int(block + _CV_DIRECTIONS), load_int(block + _CV_SILU)
    width, tasks, units = load_int(block + _CV_WIDTH), load_int(block + _TASKS), channels // UNIT
    x_row, row, dx = load_int(block + _CV_X_ROW), channels * 4, load_int(block + _CV_DX)
    margin = width + 2
    size = (2 * margin + length) * _LINE
    scratch = np.zeros(((directions + 1) * (2 * margin + length) + directions * width + 1) * TILE, np.float32)
    copy = (scratch.ctypes.data + _LINE - 1) // _LINE * _LINE + margin * _LINE
    g = copy + size  # gradients before the SiLU, for each direction, between zeros as well
    taps = g + directions * size - margin * _LINE
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, first_tile = task // units, task % units * HALVES
        for tile in range(first_tile, first_tile + HALVES):
            at = tile * _LINE
            x = load_int(block + _CV_X) + b * load_int(block + _CV_X_BATCH) + at
            for t in range(length):
                store(copy + t * _LINE, load(x + t * x_row))
            for k in range(directions):
                mine = block + _CV_FIRST + k * _CV_NEXT
                step = _LINE if load_int(mine + _CV_REVERSE) else -_LINE
                taps_k = taps + k * width * _LINE
                _turn_taps(load_int(mine + _CV_WEIGHT) + at * width, width, taps_k)
                bias = load(load_int(mine + _CV_BIAS) + at)
                dout = load_int(mine + _CV_DOUT) + b * load_int(mine + _CV_DOUT_BATCH) + at
                dout_row = load_int(mine + _CV_DOUT_ROW)
                own = g + k * size
                for t in range(0, length, 4):
                    t1, t2, t3 = min(t + 1, length - 1), min(t + 2, length - 1), min(t + 3, length - 1)
                    v0, v1, v2, v3 = (
                        load(dout + t * dout_row),
                        load(dout + t1 * dout_row),
                        load(dout + t2 * dout_row),
                        load(dout + t3 * dout_row),
                    )
                    if silu_after:
                        s0, s1, s2, s3 = _taps_4(copy + t * _LINE, step, taps_k, width, bias, bias, bias, bias)
                        s0, s1, s2, s3 = silu_slope_4(s0, s1, s2, s3)[4:]
                        v0, v1, v2, v3 = mul(v0, s0), mul(v1, s1), mul(v2, s2), mul(v3, s3)
                    store(own + t * _LINE, v0)
                    if t + 1 < length:
                        store(own + (t + 1) * _LINE, v1)
                    if t + 2 < length:
                        store(own + (t + 2) * _LINE, v2)
                    if t + 3 < length:
                        store(own + (t + 3) * _LINE, v3)
                dweight, dbias = load_int(mine + _CV_DWEIGHT), load_int(mine + _CV_DBIAS)
                if dweight:
                    for back in range(width):
                        even, odd = splat(ZERO), splat(ZERO)
                        place = copy + back * step
                        for t in range(0, length - 1, 2):
                            even = fma(load(own + t * _LINE), load(place + t * _LINE), even)
                            odd = fma(load(own + (t + 1) * _LINE), load(place + (t + 1) * _LINE), odd)
                        if length % 2:
                            even = fma(load(own + (length - 1) * _LINE), load(place + (length - 1) * _LINE), even)
                        store(dweight + (b * width + width - 1 - back) * row + at, add(even, odd))
                if dbias:
                    total = splat(ZERO)
                    for t in range(length):
                        total = add(total, load(own + t * _LINE))
                    store(dbias + b * row + at, total)
            if dx:
                for t in range(0, length, 4):
                    v0, v1, v2, v3 = splat(ZERO), splat(ZERO), splat(ZERO), splat(ZERO)
                    for k in range(directions):
                        mine = block + _CV_FIRST + k * _CV_NEXT
                        # the taps run the other way: step t was read by the steps after it
                        step = -_LINE if load_int(mine + _CV_REVERSE) else _LINE
                        taps_k = taps + k * width * _LINE
                        v0, v1, v2, v3 = _taps_4(g + k * size + t * _LINE, step, taps_k, width, v0, v1, v2, v3)
                    place = dx + (b * length + t) * row + at
                    store(place, v0)
                    if t + 1 < length:
                        store(place + row, v1)
                    if t + 2 < length:
                        store(place + 2 * row, v2)
                    if t + 3 < length:
                        store(place + 3 * row, v3)
    scratch[0] = ZERO  # keeps the array alive until here


# The blocks of the row kernels: rows of D channels (a multiple of 16); a task is `ROWS` of them. After the shared
# fields come those of the prompts, Σ scale ⊙ SiLU(pre), which are added at every token but the one at `excluded`.
ROWS = 32
NORM = ("counter", "tasks", "rows", "width", "length", "excluded", "terms", "eps", "hidden", "residual", "weight")
NORM += ("total", "normed", "scales", "dnormed", "dtotal", "dhidden", "dweight")
PROMPT = ("counter", "tasks", "rows", "width", "length", "excluded", "terms", "x", "out", "dout")
PROMPT_TERM = ("pre", "scale", "dpre", "dscale")
_RW_ROWS, _RW_WIDTH, _RW_LENGTH, _RW_EXCLUDED, _RW_TERMS = range(16, 56, 8)
_NM_EPS, _NM_HIDDEN, _NM_RESIDUAL, _NM_WEIGHT, _NM_TOTAL, _NM_NORMED, _NM_SCALES = range(56, 112, 8)
_NM_DNORMED, _NM_DTOTAL, _NM_DHIDDEN, _NM_DWEIGHT = range(112, 144, 8)
_PR_X, _PR_OUT, _PR_DOUT = range(56, 80, 8)
_NM_FIRST, _PR_FIRST, _PR_NEXT = 8 * len(NORM), 8 * len(PROMPT), 8 * len(PROMPT_TERM)
_PR_PRE, _PR_SCALE, _PR_DPRE, _PR_DSCALE = range(0, 32, 8)


@njit
def _total(value, place):
    """Return the sum over the lanes of a vector, through scratch memory."""
    store(place, value)
    total = ZERO
    for j in range(LANES):
        total += load_float(place + 4 * j)
    return total


@njit
def _add_prompts(first, terms, x, at, row, out):
    """Compute out = x + prompts for one row of `row` bytes; `at` is the offset of the row in each `pre`."""
    whole = row // (4 * _LINE) * 4 * _LINE
    for c in range(0, whole, 4 * _LINE):
        v0, v1 = load(x + c), load(x + c + _LINE)
        v2, v3 = load(x + c + 2 * _LINE), load(x + c + 3 * _LINE)
        for k in range(terms):
            mine = first + k * _PR_NEXT
            pre, scale = load_int(mine + _PR_PRE) + at + c, load_int(mine + _PR_SCALE) + c
            p0, p1, p2, p3 = silu_4(load(pre), load(pre + _LINE), load(pre + 2 * _LINE), load(pre + 3 * _LINE))
            v0, v1 = fma(load(scale), p0, v0), fma(load(scale + _LINE), p1, v1)
            v2, v3 = fma(load(scale + 2 * _LINE), p2, v2), fma(load(scale + 3 * _LINE), p3, v3)
        _put(out + c, v0, v1, v2, v3)
    for c in range(whole, row, _LINE):
        value = load(x + c)
        for k in range(terms):
            mine = first + k * _PR_NEXT
            value = fma(load(load_int(mine + _PR_SCALE) + c), silu(load(load_int(mine + _PR_PRE) + at + c)), value)
        store(out + c, value)


@njit
def _back_prompts(first, terms, dout, at, row, task, prompted):
    """Compute the gradients of `pre` for one row, and add those of `scale` to the row of this task, (tasks, D)."""
    whole = row // (4 * _LINE) * 4 * _LINE
    if not prompted:
        for k in range(terms):
            _clear(load_int(first + k * _PR_NEXT + _PR_DPRE) + at, row // _LINE)
        return
    for k in range(terms):
        mine = first + k * _PR_NEXT
        pre, scale = load_int(mine + _PR_PRE) + at, load_int(mine + _PR_SCALE)
        dpre, dscale = load_int(mine + _PR_DPRE) + at, load_int(mine + _PR_DSCALE) + task * row
        for c in range(0, whole, 4 * _LINE):
            g0, g1 = load(dout + c), load(dout + c + _LINE)
            g2, g3 = load(dout + c + 2 * _LINE), load(dout + c + 3 * _LINE)
            p0, p1, p2, p3, s0, s1, s2, s3 = silu_slope_4(
                *(load(pre + c), load(pre + c + _LINE), load(pre + c + 2 * _LINE), load(pre + c + 3 * _LINE))
            )
            place = dscale + c
            p0, p1 = fma(g0, p0, load(place)), fma(g1, p1, load(place + _LINE))
            p2, p3 = fma(g2, p2, load(place + 2 * _LINE)), fma(g3, p3, load(place + 3 * _LINE))
            _put(place, p0, p1, p2, p3)
            place = scale + c
            g0, g1 = mul(g0, load(place)), mul(g1, load(place + _LINE))
            g2, g3 = mul(g2, load(place + 2 * _LINE)), mul(g3, load(place + 3 * _LINE))
            _put(dpre + c, mul(g0, s0), mul(g1, s1), mul(g2, s2), mul(g3, s3))
        for c in range(whole, row, _LINE):
            value, g = load(pre + c), load(dout + c)
            store(dscale + c, fma(g, silu(value), load(dscale + c)))
            store(dpre + c, mul(mul(g, load(scale + c)), silu_slope(value)))


@njit
def _clear_scales(first, terms, task, row):
    for k in range(terms):
        _clear(load_int(first + k * _PR_NEXT + _PR_DSCALE) + task * row, row // _LINE)


def prompt_forward(block):
    """Compute out = x + prompts."""
    rows, row, tasks = load_int(block + _RW_ROWS), load_int(block + _RW_WIDTH) * 4, load_int(block + _TASKS)
    length, excluded, terms = load_int(block + _RW_LENGTH), load_int(block + _RW_EXCLUDED), load_int(block + _RW_TERMS)
    x, out, first = load_int(block + _PR_X), load_int(block + _PR_OUT), block + _PR_FIRST
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            there = terms if r % length != excluded else 0
            _add_prompts(first, there, x + r * row, r * row, row, out + r * row)


def prompt_backward(block):
    """Compute the gradients of the terms; the gradient of x equals that of the output."""
    rows, row, tasks = load_int(block + _RW_ROWS), load_int(block + _RW_WIDTH) * 4, load_int(block + _TASKS)
    length, excluded, terms = load_int(block + _RW_LENGTH), load_int(block + _RW_EXCLUDED), load_int(block + _RW_TERMS)
    dout, first = load_int(block + _PR_DOUT), block + _PR_FIRST
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        _clear_scales(first, terms, task, row)
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            _back_prompts(first, terms, dout + r * row, r * row, row, task, r % length != excluded)


def norm_forward(block):
    """Compute total = residual + hidden + prompts and its RMSNorm; store 1 / rms of each row."""
    rows, row, tasks = load_int(block + _RW_ROWS), load_int(block + _RW_WIDTH) * 4, load_int(block + _TASKS)
    length, excluded, terms = load_int(block + _RW_LENGTH), load_int(block + _RW_EXCLUDED), load_int(block + _RW_TERMS)
    hidden, residual, first = load_int(block + _NM_HIDDEN), load_int(block + _NM_RESIDUAL), block + _NM_FIRST
    weight, total, normed = load_int(block + _NM_WEIGHT), load_int(block + _NM_TOTAL), load_int(block + _NM_NORMED)
    scales, eps, width = load_int(block + _NM_SCALES), load_float(load_int(block + _NM_EPS)), np.float32(row // 4)
    scratch_array = np.empty(LANES, np.float32)
    scratch = scratch_array.ctypes.data
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            at = r * row
            source = hidden + at
            if terms and r % length != excluded:
                _add_prompts(first, terms, source, at, row, total + at)
                source = total + at
            squares = splat(ZERO)
            for c in range(0, row, _LINE):
                value = load(source + c)
                if residual:
                    value = add(value, load(residual + at + c))
                store(total + at + c, value)
                squares = fma(value, value, squares)
            scale = ONE / np.sqrt(_total(squares, scratch) / width + eps)
            store_float(scales + 4 * r, scale)
            factor = splat(scale)
            for c in range(0, row, _LINE):
                store(normed + at + c, mul(mul(load(total + at + c), factor), load(weight + c)))
    scratch_array[0] = ZERO  # keeps the array alive until here


def norm_backward(block):
    """Compute the gradients of hidden (equal to residual's), of the terms, and, if not 0, of the weight, (tasks, D)."""
    rows, row, tasks = load_int(block + _RW_ROWS), load_int(block + _RW_WIDTH) * 4, load_int(block + _TASKS)
    length, excluded, terms = load_int(block + _RW_LENGTH), load_int(block + _RW_EXCLUDED), load_int(block + _RW_TERMS)
    weight, total, scales = load_int(block + _NM_WEIGHT), load_int(block + _NM_TOTAL), load_int(block + _NM_SCALES)
    dnormed, dtotal = load_int(block + _NM_DNORMED), load_int(block + _NM_DTOTAL)
    dhidden, dweight = load_int(block + _NM_DHIDDEN), load_int(block + _NM_DWEIGHT)
    first, width = block + _NM_FIRST, np.float32(row // 4)
    scratch_array = np.empty(LANES, np.float32)
    scratch = scratch_array.ctypes.data
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        if dweight:
            _clear(dweight + task * row, row // _LINE)
        _clear_scales(first, terms, task, row)
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            at = r * row
            factor = splat(load_float(scales + 4 * r))
            along = splat(ZERO)
            for c in range(0, row, _LINE):
                slope = mul(load(dnormed + at + c), mul(load(total + at + c), factor))
                along = fma(slope, load(weight + c), along)
                if dweight:
                    place = dweight + task * row + c
                    store(place, add(load(place), slope))
            mean = splat(_total(along, scratch) / width)
            for c in range(0, row, _LINE):
                value = mul(load(dnormed + at + c), load(weight + c))
                value = sub(value, mul(mul(load(total + at + c), factor), mean))
                value = mul(value, factor)
                if dtotal:
                    value = add(value, load(dtotal + at + c))
                store(dhidden + at + c, value)
            _back_prompts(first, terms, dhidden + at, at, row, task, r % length != excluded)
    scratch_array[0] = ZERO  # keeps the array alive until here


KERNEL = types.void(types.int64)
