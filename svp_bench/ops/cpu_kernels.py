"""The CPU kernels of the scan and the convolution, compiled by numba at the first call and kept on disk.

Each kernel is one C function of one argument, the address of a block of int64: a task counter, sizes, and addresses of
tensors. Threads that run it take tasks from the counter until none is left; what a task computes does not depend on
who runs it, and all sums are added up in a fixed order, so reruns agree to the last bit.

Layout: channels last, float32. A *tile* is 16 neighbouring channels, one cache line; a *half* of it is one vector.
Letters as in reference.py: B batch, L length, E channels (a multiple of 16), N states (padded to NP, a multiple of 8),
K directions. Addresses are in bytes; strides are in bytes too.
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
    exp2,
    fma,
    load,
    load_float,
    load_int,
    mul,
    sigmoid,
    softplus,
    splat,
    store,
    store_float,
    sub,
    sums,
    take,
)

TILE = 2 * LANES
CHUNK = 16  # steps between two saved states; the states and decays of a chunk fit the first-level cache
_LINE = 4 * TILE  # bytes of a tile
_VEC = 4 * LANES  # bytes of a half
LN2 = np.float32(0.6931471805599453)
HALF = np.float32(0.5)
ONE = np.float32(1.0)
ZERO = np.float32(0.0)

# A block begins with the shared fields; then come the fields of each direction.
SHARED = ("counter", "tasks", "batch", "length", "channels", "states", "directions", "softplus", "groups", "chunks")
SHARED += ("z", "z_batch", "z_row", "out", "dout", "dout_batch", "dout_row", "dz", "need_A")
DIRECTION = ("reverse", "u", "u_batch", "u_row", "delta", "delta_batch", "delta_row", "A", "B", "B_batch", "B_row")
DIRECTION += ("C", "C_batch", "C_row", "D", "bias", "saved", "du", "ddelta", "dB", "dC", "dA", "dD")

_COUNTER, _TASKS, _BATCH, _LENGTH, _CHANNELS, _STATES, _DIRECTIONS, _SOFTPLUS, _GROUPS, _CHUNKS = range(0, 80, 8)
_Z, _Z_BATCH, _Z_ROW, _OUT, _DOUT, _DOUT_BATCH, _DOUT_ROW, _DZ, _NEED_A = range(80, 152, 8)
_FIRST = 8 * len(SHARED)
_NEXT = 8 * len(DIRECTION)
_REVERSE, _U, _U_BATCH, _U_ROW, _DELTA, _DELTA_BATCH, _DELTA_ROW, _A, _B, _B_BATCH, _B_ROW = range(0, 88, 8)
_C, _C_BATCH, _C_ROW, _D, _BIAS, _SAVED, _DU, _DDELTA, _DB, _DC, _DA, _DD = range(88, 184, 8)


def scan_forward(block):
    """y = mean over the directions of their scans, times SiLU(z); a task is one picture × one tile.

    `saved`, if not 0, receives the state before each chunk, (B, tiles, chunks, NP, 16).
    """
    length = load_int(block + _LENGTH)
    channels = load_int(block + _CHANNELS)
    states = load_int(block + _STATES)
    padded = (states + 7) // 8 * 8
    directions = load_int(block + _DIRECTIONS)
    plus = load_int(block + _SOFTPLUS)
    chunks = load_int(block + _CHUNKS)
    tasks = load_int(block + _TASKS)
    tiles = channels // TILE
    h_array = np.empty(padded * TILE, np.float32)
    y_array = np.empty(length * TILE, np.float32)
    h, y = h_array.ctypes.data, y_array.ctypes.data
    scale = splat(np.float32(1.0 / directions))
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, tile = task // tiles, task % tiles
        for k in range(directions):
            mine = block + _FIRST + k * _NEXT
            reverse = load_int(mine + _REVERSE)
            u = load_int(mine + _U) + b * load_int(mine + _U_BATCH) + tile * _LINE
            delta = load_int(mine + _DELTA) + b * load_int(mine + _DELTA_BATCH) + tile * _LINE
            B = load_int(mine + _B) + b * load_int(mine + _B_BATCH)
            C = load_int(mine + _C) + b * load_int(mine + _C_BATCH)
            u_row, delta_row = load_int(mine + _U_ROW), load_int(mine + _DELTA_ROW)
            B_row, C_row = load_int(mine + _B_ROW), load_int(mine + _C_ROW)
            A = load_int(mine + _A) + tile * padded * _LINE
            saved = load_int(mine + _SAVED)
            D0 = load(load_int(mine + _D) + tile * _LINE)
            D1 = load(load_int(mine + _D) + tile * _LINE + _VEC)
            bias0 = load(load_int(mine + _BIAS) + tile * _LINE)
            bias1 = load(load_int(mine + _BIAS) + tile * _LINE + _VEC)
            for n in range(padded * 2):
                store(h + n * _VEC, splat(ZERO))
            for s in range(length):
                t = length - 1 - s if reverse else s
                if saved and s % CHUNK == 0:
                    place = saved + ((b * tiles + tile) * chunks + s // CHUNK) * padded * _LINE
                    for n in range(padded * 2):
                        store(place + n * _VEC, load(h + n * _VEC))
                dt0 = add(load(delta + t * delta_row), bias0)
                dt1 = add(load(delta + t * delta_row + _VEC), bias1)
                if plus:
                    dt0, dt1 = softplus(dt0), softplus(dt1)
                u0, u1 = load(u + t * u_row), load(u + t * u_row + _VEC)
                w0, w1 = mul(dt0, u0), mul(dt1, u1)
                y0, y1 = mul(D0, u0), mul(D1, u1)
                for n in range(states):
                    Bn = broadcast(B + t * B_row + 4 * n)
                    Cn = broadcast(C + t * C_row + 4 * n)
                    at = n * _LINE
                    h0 = fma(exp2(mul(dt0, load(A + at))), load(h + at), mul(w0, Bn))
                    h1 = fma(exp2(mul(dt1, load(A + at + _VEC))), load(h + at + _VEC), mul(w1, Bn))
                    store(h + at, h0)
                    store(h + at + _VEC, h1)
                    y0, y1 = fma(h0, Cn, y0), fma(h1, Cn, y1)
                place = y + t * _LINE
                if k > 0:
                    y0, y1 = add(y0, load(place)), add(y1, load(place + _VEC))
                store(place, y0)
                store(place + _VEC, y1)
        z = load_int(block + _Z)
        out = load_int(block + _OUT) + (b * length * channels + tile * TILE) * 4
        for t in range(length):
            for half in range(2):
                value = mul(load(y + t * _LINE + half * _VEC), scale)
                if z:
                    gate = load(
                        z + b * load_int(block + _Z_BATCH) + t * load_int(block + _Z_ROW) + tile * _LINE + half * _VEC
                    )
                    value = mul(value, mul(gate, sigmoid(gate)))
                store(out + t * channels * 4 + half * _VEC, value)


def scan_backward(block):
    """Gradients of `scan_forward`; a task is one picture × one group of tiles.

    dB and dC are summed over the channels of a group, (groups, B, L, NP); dA, (B, tiles, NP, 16), and dD, (B, E), over
    the steps of a picture. The caller adds up the rest.
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
    tiles = channels // TILE
    z, dz, dout = load_int(block + _Z), load_int(block + _DZ), load_int(block + _DOUT)
    z_batch, z_row = load_int(block + _Z_BATCH), load_int(block + _Z_ROW)
    dout_batch, dout_row = load_int(block + _DOUT_BATCH), load_int(block + _DOUT_ROW)
    line = padded * _VEC  # bytes of the states of one half at one step
    h_array = np.empty((CHUNK + 1) * padded * LANES, np.float32)
    decay_array = np.empty(CHUNK * padded * LANES, np.float32)
    g_array = np.empty(2 * padded * LANES, np.float32)
    dt_array = np.empty(CHUNK * LANES, np.float32)
    b_array = np.empty(LANES * LANES, np.float32)
    c_array = np.empty(LANES * LANES, np.float32)
    y_array = np.empty(length * TILE, np.float32)
    dA_array = np.empty(2 * padded * LANES, np.float32)
    h, decay, g, dts = h_array.ctypes.data, decay_array.ctypes.data, g_array.ctypes.data, dt_array.ctypes.data
    for_B, for_C, y, dA_sum = b_array.ctypes.data, c_array.ctypes.data, y_array.ctypes.data, dA_array.ctypes.data
    scale = splat(np.float32(1.0 / directions))
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, group = task // groups, task % groups
        for k in range(directions):
            mine = block + _FIRST + k * _NEXT
            size = length * padded * 4
            for place in (load_int(mine + _DB), load_int(mine + _DC)):
                for n in range(length * padded // LANES):
                    store(place + (group * batch + b) * size + n * _VEC, splat(ZERO))
        for tile in range(group * tiles // groups, (group + 1) * tiles // groups):
            for k in range(directions):
                mine = block + _FIRST + k * _NEXT
                reverse = load_int(mine + _REVERSE)
                u = load_int(mine + _U) + b * load_int(mine + _U_BATCH) + tile * _LINE
                delta = load_int(mine + _DELTA) + b * load_int(mine + _DELTA_BATCH) + tile * _LINE
                B = load_int(mine + _B) + b * load_int(mine + _B_BATCH)
                C = load_int(mine + _C) + b * load_int(mine + _C_BATCH)
                u_row, delta_row = load_int(mine + _U_ROW), load_int(mine + _DELTA_ROW)
                B_row, C_row = load_int(mine + _B_ROW), load_int(mine + _C_ROW)
                A = load_int(mine + _A) + tile * padded * _LINE
                dB = load_int(mine + _DB) + (group * batch + b) * length * padded * 4
                dC = load_int(mine + _DC) + (group * batch + b) * length * padded * 4
                du = load_int(mine + _DU) + (b * length * channels + tile * TILE) * 4
                ddelta = load_int(mine + _DDELTA) + (b * length * channels + tile * TILE) * 4
                row = channels * 4
                saved = load_int(mine + _SAVED) + (b * tiles + tile) * chunks * padded * _LINE
                dD0, dD1 = splat(ZERO), splat(ZERO)
                for n in range(2 * padded):
                    store(g + n * _VEC, splat(ZERO))
                    store(dA_sum + n * _VEC, splat(ZERO))
                for chunk in range(chunks - 1, -1, -1):
                    first = chunk * CHUNK
                    steps = min(CHUNK, length - first)
                    for half in range(2):
                        D = load(load_int(mine + _D) + tile * _LINE + half * _VEC)
                        bias = load(load_int(mine + _BIAS) + tile * _LINE + half * _VEC)
                        own_g = g + half * line
                        # forward again through the chunk, keeping its states and decays
                        for n in range(padded):
                            store(h + n * _VEC, load(saved + chunk * padded * _LINE + n * _LINE + half * _VEC))
                        for i in range(steps):
                            s = first + i
                            t = length - 1 - s if reverse else s
                            dt = add(load(delta + t * delta_row + half * _VEC), bias)
                            if plus:
                                dt = softplus(dt)
                            store(dts + i * _VEC, dt)
                            ut = load(u + t * u_row + half * _VEC)
                            w = mul(dt, ut)
                            yt = mul(D, ut)
                            now = h + i * line
                            for n in range(states):
                                a = exp2(mul(dt, load(A + n * _LINE + half * _VEC)))
                                store(decay + i * line + n * _VEC, a)
                                state = fma(a, load(now + n * _VEC), mul(w, broadcast(B + t * B_row + 4 * n)))
                                store(now + line + n * _VEC, state)
                                if dz:
                                    yt = fma(state, broadcast(C + t * C_row + 4 * n), yt)
                            for n in range(states, padded):
                                store(decay + i * line + n * _VEC, splat(ONE))
                                store(now + line + n * _VEC, splat(ZERO))
                            if dz:
                                place = y + t * _LINE + half * _VEC
                                store(place, yt if k == 0 else add(yt, load(place)))
                        # and back
                        for i in range(steps - 1, -1, -1):
                            s = first + i
                            t = length - 1 - s if reverse else s
                            dy = mul(load(dout + b * dout_batch + t * dout_row + tile * _LINE + half * _VEC), scale)
                            if z:
                                gate = load(z + b * z_batch + t * z_row + tile * _LINE + half * _VEC)
                                dy = mul(dy, mul(gate, sigmoid(gate)))
                            dt = load(dts + i * _VEC)
                            ut = load(u + t * u_row + half * _VEC)
                            w = mul(dt, ut)
                            drive, rate = splat(ZERO), splat(ZERO)
                            for start in range(0, padded, LANES):
                                for j in range(LANES):
                                    n = start + j
                                    at = i * line + n * _VEC
                                    a = load(decay + at)
                                    gn = fma(dy, broadcast(C + t * C_row + 4 * n), load(own_g + n * _VEC))
                                    store(for_C + j * _VEC, mul(dy, load(h + line + at)))
                                    store(for_B + j * _VEC, mul(gn, w))
                                    drive = fma(gn, broadcast(B + t * B_row + 4 * n), drive)
                                    gn = mul(gn, a)
                                    store(own_g + n * _VEC, gn)
                                    turn = mul(gn, load(h + at))  # gradient of Δ A
                                    rate = fma(turn, load(A + n * _LINE + half * _VEC), rate)
                                    if need_A:
                                        place = dA_sum + half * line + n * _VEC
                                        store(place, fma(turn, dt, load(place)))
                                place = dB + (t * padded + start) * 4
                                store(place, add(load(place), _across(for_B)))
                                place = dC + (t * padded + start) * 4
                                store(place, add(load(place), _across(for_C)))
                            store(du + t * row + half * _VEC, fma(drive, dt, mul(dy, D)))
                            ddt = fma(drive, ut, mul(rate, splat(LN2)))
                            if plus:
                                ddt = mul(ddt, sigmoid(add(load(delta + t * delta_row + half * _VEC), bias)))
                            store(ddelta + t * row + half * _VEC, ddt)
                            if need_A:
                                if half == 0:
                                    dD0 = fma(dy, ut, dD0)
                                else:
                                    dD1 = fma(dy, ut, dD1)
                if need_A:
                    place = load_int(mine + _DA) + (b * tiles + tile) * padded * _LINE
                    for n in range(padded):
                        store(place + n * _LINE, load(dA_sum + n * _VEC))
                        store(place + n * _LINE + _VEC, load(dA_sum + line + n * _VEC))
                    place = load_int(mine + _DD) + (b * channels + tile * TILE) * 4
                    store(place, dD0)
                    store(place + _VEC, dD1)
            if dz:
                for t in range(length):
                    for half in range(2):
                        at = tile * _LINE + half * _VEC
                        gate = load(z + b * z_batch + t * z_row + at)
                        s = sigmoid(gate)
                        slope = mul(s, fma(gate, sub(splat(ONE), s), splat(ONE)))
                        value = mul(load(dout + b * dout_batch + t * dout_row + at), mul(slope, scale))
                        value = mul(value, load(y + t * _LINE + half * _VEC))
                        store(dz + (b * length + t) * channels * 4 + at, value)


# The block of a convolution: shared fields, then those of each direction. Weights are (W, E).
CONV_SHARED = ("counter", "tasks", "length", "channels", "directions", "silu", "width", "x", "x_batch", "x_row", "dx")
CONV_DIRECTION = ("reverse", "weight", "bias", "out", "dout", "dout_batch", "dout_row", "dweight", "dbias")
(_CV_LENGTH, _CV_CHANNELS, _CV_DIRECTIONS, _CV_SILU, _CV_WIDTH, _CV_X, _CV_X_BATCH, _CV_X_ROW, _CV_DX) = range(
    16, 88, 8
)
_CV_FIRST, _CV_NEXT = 8 * len(CONV_SHARED), 8 * len(CONV_DIRECTION)
(_CV_REVERSE, _CV_WEIGHT, _CV_BIAS, _CV_OUT, _CV_DOUT, _CV_DOUT_BATCH, _CV_DOUT_ROW) = range(0, 56, 8)
_CV_DWEIGHT, _CV_DBIAS = 56, 64


@njit
def _taps(x, x_row, t, length, reverse, weight, row, width, bias):
    """Bias plus the taps of the convolution at step t, one half."""
    value = bias
    for back in range(width):
        source = t + back if reverse else t - back
        if 0 <= source < length:
            value = fma(load(weight + (width - 1 - back) * row), load(x + source * x_row), value)
    return value


def conv_forward(block):
    """Depth-wise causal convolution (and SiLU) of one input in each direction; a task is one picture × one tile."""
    length, channels = load_int(block + _CV_LENGTH), load_int(block + _CV_CHANNELS)
    directions, silu = load_int(block + _CV_DIRECTIONS), load_int(block + _CV_SILU)
    width, tasks, tiles = load_int(block + _CV_WIDTH), load_int(block + _TASKS), channels // TILE
    x_row, row = load_int(block + _CV_X_ROW), channels * 4
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, tile = task // tiles, task % tiles
        for k in range(directions):
            mine = block + _CV_FIRST + k * _CV_NEXT
            reverse = load_int(mine + _CV_REVERSE)
            for half in range(2):
                at = tile * _LINE + half * _VEC
                x = load_int(block + _CV_X) + b * load_int(block + _CV_X_BATCH) + at
                weight = load_int(mine + _CV_WEIGHT) + at
                bias = load(load_int(mine + _CV_BIAS) + at)
                out = load_int(mine + _CV_OUT) + b * length * row + at
                for t in range(length):
                    value = _taps(x, x_row, t, length, reverse, weight, row, width, bias)
                    if silu:
                        value = mul(value, sigmoid(value))
                    store(out + t * row, value)


def conv_backward(block):
    """Gradients of `conv_forward`; those of weight, (B, W, E), and bias, (B, E), if asked for, for each picture."""
    length, channels = load_int(block + _CV_LENGTH), load_int(block + _CV_CHANNELS)
    directions, silu = load_int(block + _CV_DIRECTIONS), load_int(block + _CV_SILU)
    width, tasks, tiles = load_int(block + _CV_WIDTH), load_int(block + _TASKS), channels // TILE
    x_row, row, dx = load_int(block + _CV_X_ROW), channels * 4, load_int(block + _CV_DX)
    g_array = np.empty(directions * length * LANES, np.float32)
    g = g_array.ctypes.data
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        b, tile = task // tiles, task % tiles
        for half in range(2):
            at = tile * _LINE + half * _VEC
            x = load_int(block + _CV_X) + b * load_int(block + _CV_X_BATCH) + at
            for k in range(directions):
                mine = block + _CV_FIRST + k * _CV_NEXT
                reverse = load_int(mine + _CV_REVERSE)
                weight = load_int(mine + _CV_WEIGHT) + at
                bias = load(load_int(mine + _CV_BIAS) + at)
                dout = load_int(mine + _CV_DOUT) + b * load_int(mine + _CV_DOUT_BATCH) + at
                dout_row = load_int(mine + _CV_DOUT_ROW)
                for t in range(length):
                    value = load(dout + t * dout_row)
                    if silu:
                        pre = _taps(x, x_row, t, length, reverse, weight, row, width, bias)
                        s = sigmoid(pre)
                        value = mul(value, mul(s, fma(pre, sub(splat(ONE), s), splat(ONE))))
                    store(g + (k * length + t) * _VEC, value)
                dweight, dbias = load_int(mine + _CV_DWEIGHT), load_int(mine + _CV_DBIAS)
                if dweight:
                    for back in range(width):
                        total = splat(ZERO)
                        for t in range(length):
                            source = t + back if reverse else t - back
                            if 0 <= source < length:
                                total = fma(load(g + (k * length + t) * _VEC), load(x + source * x_row), total)
                        store(dweight + (b * width + width - 1 - back) * row + at, total)
                if dbias:
                    total = splat(ZERO)
                    for t in range(length):
                        total = add(total, load(g + (k * length + t) * _VEC))
                    store(dbias + b * row + at, total)
            if dx:
                for t in range(length):
                    total = splat(ZERO)
                    for k in range(directions):
                        mine = block + _CV_FIRST + k * _CV_NEXT
                        reverse = load_int(mine + _CV_REVERSE)
                        weight = load_int(mine + _CV_WEIGHT) + at
                        # the taps run the other way: step t was read by the steps after it
                        place = g + k * length * _VEC
                        total = _taps(place, _VEC, t, length, not reverse, weight, row, width, total)
                    store(dx + (b * length + t) * row + at, total)


# The block of add + norm: rows of D channels (a multiple of 8); a task is `ROWS` of them.
ROWS = 32
NORM = ("counter", "tasks", "rows", "width", "eps", "hidden", "residual", "weight", "total", "normed", "scales")
NORM += ("dnormed", "dtotal", "dhidden", "dweight")
(_NM_ROWS, _NM_WIDTH, _NM_EPS, _NM_HIDDEN, _NM_RESIDUAL, _NM_WEIGHT, _NM_TOTAL, _NM_NORMED) = range(16, 80, 8)
_NM_SCALES, _NM_DNORMED, _NM_DTOTAL, _NM_DHIDDEN, _NM_DWEIGHT = range(80, 120, 8)


@njit
def _total(value, place):
    """Sum over the lanes of a vector, through a scratch place of eight floats."""
    store(place, value)
    total = ZERO
    for j in range(LANES):
        total += load_float(place + 4 * j)
    return total


def norm_forward(block):
    """total = residual + hidden; normed = RMSNorm(total); keeps 1 / rms of each row."""
    rows, width, tasks = load_int(block + _NM_ROWS), load_int(block + _NM_WIDTH), load_int(block + _TASKS)
    hidden, residual = load_int(block + _NM_HIDDEN), load_int(block + _NM_RESIDUAL)
    weight, total, normed = load_int(block + _NM_WEIGHT), load_int(block + _NM_TOTAL), load_int(block + _NM_NORMED)
    scales, eps = load_int(block + _NM_SCALES), load_float(load_int(block + _NM_EPS))
    scratch_array = np.empty(LANES, np.float32)
    scratch = scratch_array.ctypes.data
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            at = r * width * 4
            squares = splat(ZERO)
            for c in range(0, width * 4, _VEC):
                value = load(hidden + at + c)
                if residual:
                    value = add(value, load(residual + at + c))
                store(total + at + c, value)
                squares = fma(value, value, squares)
            scale = ONE / np.sqrt(_total(squares, scratch) / np.float32(width) + eps)
            store_float(scales + 4 * r, scale)
            factor = splat(scale)
            for c in range(0, width * 4, _VEC):
                store(normed + at + c, mul(mul(load(total + at + c), factor), load(weight + c)))


def norm_backward(block):
    """Gradient of hidden (and residual: it is the same), and of the weight for each task, (tasks, D), if asked for."""
    rows, width, tasks = load_int(block + _NM_ROWS), load_int(block + _NM_WIDTH), load_int(block + _TASKS)
    weight, total, scales = load_int(block + _NM_WEIGHT), load_int(block + _NM_TOTAL), load_int(block + _NM_SCALES)
    dnormed, dtotal = load_int(block + _NM_DNORMED), load_int(block + _NM_DTOTAL)
    dhidden, dweight = load_int(block + _NM_DHIDDEN), load_int(block + _NM_DWEIGHT)
    scratch_array = np.empty(LANES, np.float32)
    scratch = scratch_array.ctypes.data
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        if dweight:
            for c in range(0, width * 4, _VEC):
                store(dweight + task * width * 4 + c, splat(ZERO))
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            at = r * width * 4
            factor = splat(load_float(scales + 4 * r))
            along = splat(ZERO)
            for c in range(0, width * 4, _VEC):
                slope = mul(load(dnormed + at + c), mul(load(total + at + c), factor))
                along = fma(slope, load(weight + c), along)
                if dweight:
                    place = dweight + task * width * 4 + c
                    store(place, add(load(place), slope))
            mean = splat(_total(along, scratch) / np.float32(width))
            for c in range(0, width * 4, _VEC):
                value = mul(load(dnormed + at + c), load(weight + c))
                value = sub(value, mul(mul(load(total + at + c), factor), mean))
                value = mul(value, factor)
                if dtotal:
                    value = add(value, load(dtotal + at + c))
                store(dhidden + at + c, value)


# The block of prompts: out = x + Σ scale ⊙ SiLU(pre) over one or two terms, but for the token at `spared`.
PROMPT = ("counter", "tasks", "rows", "width", "length", "spared", "terms", "x", "out", "dout")
PROMPT_TERM = ("pre", "scale", "dpre", "dscale")
_PR_ROWS, _PR_WIDTH, _PR_LENGTH, _PR_SPARED, _PR_TERMS, _PR_X, _PR_OUT, _PR_DOUT = range(16, 80, 8)
_PR_FIRST, _PR_NEXT = 8 * len(PROMPT), 8 * len(PROMPT_TERM)
_PR_PRE, _PR_SCALE, _PR_DPRE, _PR_DSCALE = range(0, 32, 8)


def prompt_forward(block):
    """Add the prompts; a task is `ROWS` tokens."""
    rows, width, tasks = load_int(block + _PR_ROWS), load_int(block + _PR_WIDTH), load_int(block + _TASKS)
    length, spared, terms = load_int(block + _PR_LENGTH), load_int(block + _PR_SPARED), load_int(block + _PR_TERMS)
    x, out = load_int(block + _PR_X), load_int(block + _PR_OUT)
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
            at = r * width * 4
            prompted = r % length != spared
            for c in range(0, width * 4, _VEC):
                value = load(x + at + c)
                if prompted:
                    for k in range(terms):
                        mine = block + _PR_FIRST + k * _PR_NEXT
                        pre = load(load_int(mine + _PR_PRE) + at + c)
                        value = fma(load(load_int(mine + _PR_SCALE) + c), mul(pre, sigmoid(pre)), value)
                store(out + at + c, value)


def prompt_backward(block):
    """Gradients of the terms, and of the scales for each task, (tasks, D). That of x is that of the output."""
    rows, width, tasks = load_int(block + _PR_ROWS), load_int(block + _PR_WIDTH), load_int(block + _TASKS)
    length, spared, terms = load_int(block + _PR_LENGTH), load_int(block + _PR_SPARED), load_int(block + _PR_TERMS)
    dout = load_int(block + _PR_DOUT)
    while True:
        task = take(block + _COUNTER)
        if task >= tasks:
            break
        for k in range(terms):
            mine = block + _PR_FIRST + k * _PR_NEXT
            scale, pre, dpre = load_int(mine + _PR_SCALE), load_int(mine + _PR_PRE), load_int(mine + _PR_DPRE)
            dscale = load_int(mine + _PR_DSCALE) + task * width * 4
            for c in range(0, width * 4, _VEC):
                total = splat(ZERO)
                factor = load(scale + c)
                for r in range(task * ROWS, min(rows, (task + 1) * ROWS)):
                    at = r * width * 4 + c
                    if r % length != spared:
                        value = load(pre + at)
                        s = sigmoid(value)
                        g = load(dout + at)
                        total = fma(g, mul(value, s), total)
                        slope = mul(s, fma(value, sub(splat(ONE), s), splat(ONE)))
                        store(dpre + at, mul(mul(g, factor), slope))
                    else:
                        store(dpre + at, splat(ZERO))
                store(dscale + c, total)


@njit
def _across(place):
    return sums(
        load(place),
        load(place + _VEC),
        load(place + 2 * _VEC),
        load(place + 3 * _VEC),
        load(place + 4 * _VEC),
        load(place + 5 * _VEC),
        load(place + 6 * _VEC),
        load(place + 7 * _VEC),
    )


KERNEL = types.void(types.int64)
