"""Synthetic images with dense targets: a pure function of (seed, index).

Five families, each with one figure on a ground:

- `strokes`: one to three connected pen strokes, each a curve of random curvature;
- `contours`: a closed smooth curve in polar form, filled or as an outline;
- `polygons`: a star-shaped polygon with unequal corners and a smaller one next to it, filled or as an outline;
- `fractals`: the attractor of an iterated function system of three affine maps (Barnsley 1988; pre-training on such:
  Kataoka et al., "Pre-training without Natural Images", ACCV 2020, arXiv:2101.08515; our code and parameters);
- `gratings`: a smooth region whose waves differ from those of the ground in direction or length, not in mean colour.

Figure and ground have independent colours, waves and clouds; blur and noise are added. An image holds one figure, so
that nothing can be counted or compared. There are no digits, letters or fonts.

Coordinates: x to the right, y down, both in [-1, 1] over the image. Letters for shapes: B images, S = 64 pixels a
side, G = 8 patches a side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

VERSION = 1  # increased by every change of the images, beyond rounding
SIZE = 64
GRID = 8
CENTRED = 16
BLANKED_SHARE = 0.3  # of the patches, in half of the images

FAMILIES: dict[str, float] = {"strokes": 0.40, "contours": 0.20, "polygons": 0.18, "fractals": 0.12, "gratings": 0.10}

# Moments of the figure's mask, defined for every family and smooth: centre of mass; root mean square distance from it;
# anisotropy (a vector at twice the angle of the long axis); the third-order moments, at one and three times the angle.
POSE = ("x", "y", "scale", "stretch_cos", "stretch_sin", "skew_cos", "skew_sin", "triple_cos", "triple_sin", "area")

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Words = npt.NDArray[np.uint64]
Bytes = npt.NDArray[np.uint8]

_GAMMA = 0x9E3779B97F4A7C15  # of SplitMix64 (Steele, Lea, Flood, OOPSLA 2014)
_PIXEL = 2 / SIZE
_AXIS = ((np.arange(SIZE) + 0.5) * _PIXEL - 1).astype(np.float32)
_ANGLES = 1024  # entries of a table over the full circle
_SIGMAS = np.concatenate([[0.0], np.linspace(0.35, 1.3, 15)])  # of the blur, in pixels


class SyntheticBatch(NamedTuple):
    """A batch of synthetic images and their targets.

    Attributes:
        images: uint8 (B, 3, S, S).
        mask: Coverage of each pixel by the figure, without noise and blur: uint8 (B, S, S), 255 = all.
        centred: The same mask brought to a common centre and scale (not turned): uint8 (B, 16, 16). It spans 2.2 times
            the figure's `scale` on each side of the centre.
        pose: The entries of `POSE`, each scaled to about zero mean and unit spread and clipped at 3: float32 (B, 10).
        blanked: Patches that a training step hides: bool (B, G, G).
        family: Index in `FAMILIES`: int64 (B,).
    """

    images: Bytes
    mask: Bytes
    centred: Bytes
    pose: Floats
    blanked: npt.NDArray[np.bool_]
    family: npt.NDArray[np.int64]


def _mix(words: Words) -> Words:
    """Apply the finaliser of SplitMix64."""
    words = words ^ (words >> np.uint64(30))
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


class Chance:
    """Counter-based random numbers per image: the n-th number of image i depends on (seed, i, n) alone.

    Args:
        seed: Of the whole data set.
        index: Numbers of the images, (B,).
    """

    def __init__(self, seed: int, index: npt.NDArray[np.int64]) -> None:
        root = _mix(np.array([(seed + 1) * _GAMMA % 2**64], dtype=np.uint64))
        self._keys = _mix(_mix(root + index.astype(np.uint64) * np.uint64(_GAMMA)) ^ root)
        self._used = 0

    def __len__(self) -> int:
        return len(self._keys)

    def words(self, count: int) -> Words:
        """Return the next `count` words of each image: uint64 (B, count)."""
        steps = np.arange(self._used + 1, self._used + count + 1, dtype=np.uint64) * np.uint64(_GAMMA)
        self._used += count
        return _mix(self._keys[:, None] + steps)

    def uniform(self, low: float = 0.0, high: float = 1.0, shape: Sequence[int] = ()) -> Floats:
        """Return uniform numbers in [low, high): (B, *shape)."""
        words = self.words(math.prod(shape)).reshape(len(self), *shape)
        unit = (words >> np.uint64(40)).astype(np.float32) * np.float32(2**-24)
        return unit * np.float32(high - low) + np.float32(low)

    def normal(self, shape: Sequence[int] = ()) -> Floats:
        """Return standard normal numbers (Box and Muller): (B, *shape)."""
        radius = np.sqrt(-2 * np.log(1 - self.uniform(shape=shape)))
        normal: Floats = radius * np.cos(self.uniform(0, 2 * np.pi, shape))
        return normal

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> npt.NDArray[np.int64]:
        """Return integers in low..high, both included: (B, *shape)."""
        return (self.uniform(shape=shape) * (high - low + 1)).astype(np.int64) + low

    def happens(self, share: float, shape: Sequence[int] = ()) -> npt.NDArray[np.bool_]:
        """Return True in a share of the cases: (B, *shape)."""
        return self.uniform(shape=shape) < share


def family_of(seed: int, index: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the family of each image, an index into `FAMILIES`: (B,)."""
    bounds = np.cumsum(list(FAMILIES.values()))[:-1]
    return np.searchsorted(bounds, Chance(seed, index).uniform(), side="right").astype(np.int64)


def draw(seed: int, index: Sequence[int] | npt.NDArray[np.int64]) -> SyntheticBatch:
    """Draw images.

    Args:
        seed: Of the data set, 0 or more.
        index: Numbers of the images, 0 or more. Each image depends on its number and the seed alone.
    """
    index = np.asarray(index, dtype=np.int64)
    family = family_of(seed, index)
    count = len(index)
    images = np.empty((count, 3, SIZE, SIZE), dtype=np.uint8)
    cover = np.empty((count, SIZE, SIZE), dtype=np.float32)
    centred = np.empty((count, CENTRED, CENTRED), dtype=np.float32)
    pose = np.empty((count, len(POSE)), dtype=np.float32)
    blanked = np.empty((count, GRID, GRID), dtype=np.bool_)
    for number, name in enumerate(FAMILIES):
        (rows,) = np.nonzero(family == number)
        # a few at a time, to fit in the second-level cache
        for start in range(0, len(rows), 8):
            some = rows[start : start + 8]
            chance = Chance(seed, index[some])
            chance.words(1)  # used by `family_of`
            cover[some] = mask = _FIGURES[name](chance)
            images[some] = _paint(chance, mask, textured=name == "gratings")
            hidden = chance.uniform(shape=(GRID * GRID,)).argsort(axis=1) < round(BLANKED_SHARE * GRID * GRID)
            blanked[some] = (hidden & chance.happens(0.5)[:, None]).reshape(-1, GRID, GRID)
            pose[some], centred[some] = _describe(mask)
    return SyntheticBatch(images, _to_bytes(cover), _to_bytes(centred), pose, blanked, family)


def _each(left: Iterable[npt.NDArray[Any]], right: Iterable[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Multiply matrices, one image after the other: (B, …, rows, columns).

    NumPy may pass a stack to BLAS as one product, and BLAS rounds by shape: an image would then depend on its batch.
    """
    return np.stack([np.matmul(a, b) for a, b in zip(left, right, strict=False)])


def _to_bytes(unit: Floats) -> Bytes:
    return (unit * np.float32(255) + np.float32(0.5)).astype(np.uint8)


# figures: each returns the cover of every pixel, float32 (B, S, S) in [0, 1]


def _place(chance: Chance) -> tuple[Floats, Floats, Floats]:
    """Draw the half size of a figure and a centre that keeps most of it inside: (B,) each."""
    half = chance.uniform(0.3, 0.95)
    margin = np.maximum(1.02 - half, 0.05)
    return half, chance.uniform(-1, 1) * margin, chance.uniform(-1, 1) * margin


def _strokes(chance: Chance) -> Floats:
    strokes, points = 3, 64
    batch = len(chance)
    t = np.linspace(0, 1, points, dtype=np.float32)
    # Heading along a stroke: a turn (up to a bit more than a full one), a slow swing, and sometimes a corner
    turn = (
        chance.uniform(-2.2, 2.2, (strokes, 1))
        * np.pi
        * chance.happens(0.75, (strokes, 1))
        * chance.uniform(0, 1, (strokes, 1))
    )
    swing = chance.uniform(-1.6, 1.6, (strokes, 1)) * chance.happens(0.5, (strokes, 1))
    corner = chance.uniform(-2.6, 2.6, (strokes, 1)) * chance.happens(0.4, (strokes, 1))
    heading = chance.uniform(-np.pi, np.pi, (strokes, 1)) + turn * t
    heading = heading + swing * np.sin(2 * np.pi * t * chance.uniform(0.5, 1.5, (strokes, 1)))
    heading = heading + corner * (t > chance.uniform(0.2, 0.8, (strokes, 1)))
    length = chance.uniform(0.5, 1.6, (strokes, 1))
    x = np.cumsum(np.cos(heading) * length, axis=2)
    y = np.cumsum(np.sin(heading) * length, axis=2)
    there = np.ones((batch, strokes), dtype=np.bool_)
    there[:, 1:] = np.logical_and.accumulate(chance.happens(0.65, (strokes - 1,)), axis=1)  # no third without a second
    join = chance.integers(0, points - 1, (strokes - 1,))
    own = chance.integers(0, points - 1, (strokes - 1,)) * chance.happens(0.4, (strokes - 1,))  # else it begins there
    row = np.arange(batch)
    for stroke in range(1, strokes):  # each begins, or passes, at a point of the one before
        at, mine = join[:, stroke - 1], own[:, stroke - 1]
        x[:, stroke] += (x[row, stroke - 1, at] - x[row, stroke, mine])[:, None]
        y[:, stroke] += (y[row, stroke - 1, at] - y[row, stroke, mine])[:, None]
    slant, squeeze = chance.uniform(-0.3, 0.3), chance.uniform(0.6, 1.0)
    x = x * squeeze[:, None, None] + y * slant[:, None, None]
    x, y = x.reshape(batch, -1), y.reshape(batch, -1)
    seen = np.repeat(there, points, axis=1)
    low = [np.where(seen, v, np.inf).min(axis=1) for v in (x, y)]
    high = [np.where(seen, v, -np.inf).max(axis=1) for v in (x, y)]
    half, cx, cy = _place(chance)
    zoom = 2 * half / np.maximum(np.maximum(high[0] - low[0], high[1] - low[1]), 1e-3)
    x = (x - (low[0] + high[0])[:, None] / 2) * zoom[:, None] + cx[:, None]
    y = (y - (low[1] + high[1])[:, None] / 2) * zoom[:, None] + cy[:, None]
    pen = np.clip(chance.uniform(0.06, 0.34) * half, 1.4 * _PIXEL, 7 * _PIXEL)
    swell = 1 + 0.5 * chance.uniform(0, 1)[:, None] * np.sin(
        2 * np.pi * (chance.uniform(0.2, 1.2)[:, None] * np.tile(t, strokes) + chance.uniform()[:, None])
    )
    width = pen[:, None] * swell
    step = (zoom[:, None] * length[:, :, 0]).repeat(points, axis=1)
    return _ink(x, y, width.astype(np.float32), step * seen)


def _ink(x: Floats, y: Floats, width: Floats, step: Floats) -> Floats:
    """Cover of pens of these widths at curve points (x, y) that are `step` apart (0: no ink): all (B, points).

    The curve is spread by a Gaussian, which is a matrix product: along a line the sum at distance d is
    exp(-d²/2σ²), so the distance can be read off it. Where curves meet, the sum is larger: ink runs together a little.
    """
    sigma = np.maximum(0.4 * width, 1.0 * _PIXEL)
    sharp = 1 / (math.sqrt(2) * sigma)
    across = np.exp(-np.square((x[:, :, None] - _AXIS) * sharp[:, :, None]))
    down = np.exp(-np.square((y[:, :, None] - _AXIS) * sharp[:, :, None]))
    # at the pen's edge, d = width / 2, the weighted sum is 1 for every width
    edge = np.exp(np.square(width / 2 * sharp))
    across *= (step / (math.sqrt(2 * math.pi) * sigma) * edge)[:, :, None]
    field = _each(down.transpose(0, 2, 1), across)
    # log(field) = ((width/2)² - d²) / 2σ²; its slope at the edge is width / 2σ², taken as the mean over the points
    inked = step > 0
    slope = (np.where(inked, width / (2 * np.square(sigma)), 0).sum(axis=1) / inked.sum(axis=1)).astype(np.float32)
    np.maximum(field, np.float32(1e-12), out=field)
    inside = np.log(field) / (slope * np.float32(_PIXEL))[:, None, None]  # in pixels, from the edge inwards
    cover: Floats = np.clip(inside + np.float32(0.5), 0, 1)
    return cover


def _polar(cx: Floats, cy: Floats) -> tuple[Floats, npt.NDArray[np.int64], Floats, Floats]:
    """Offsets from a centre, (B, S) each, the entry of an angle table and the radius: (B, S, S) each."""
    dx, dy = _AXIS - cx[:, None], _AXIS - cy[:, None]
    angle = np.arctan2(dy[:, :, None], dx[:, None, :])
    entry = (angle * np.float32(_ANGLES / (2 * np.pi)) + np.float32(_ANGLES)).astype(np.int64) % _ANGLES
    return dx, entry, dy, np.sqrt(np.square(dy)[:, :, None] + np.square(dx)[:, None, :])


_TABLE_ANGLES = (np.arange(_ANGLES) + 0.5) * (2 * np.pi / _ANGLES)
_HARMONICS = np.arange(1, 7)
_WAVES = np.concatenate([f(_HARMONICS[:, None] * _TABLE_ANGLES) for f in (np.cos, np.sin)]).astype(np.float32)
_SLOPES = np.concatenate([-_HARMONICS[:, None] * _WAVES[6:], _HARMONICS[:, None] * _WAVES[:6]]).astype(np.float32)


def _look_up(table: Floats, entry: npt.NDArray[np.int64]) -> Floats:
    """Entries of one table an image: (B, angles) at (B, S, S)."""
    flat = entry + (np.arange(len(table)) * _ANGLES)[:, None, None]
    return table.reshape(-1).take(flat)


def _blob(chance: Chance, half: Floats, cx: Floats, cy: Floats) -> Floats:
    """Signed distance to a smooth closed curve, in pixels, positive inside: (B, S, S)."""
    decay = np.tile(_HARMONICS, 2) ** -chance.uniform(0.8, 2.0)[:, None]
    waves = chance.normal((12,)) * decay * chance.uniform(0.08, 0.34)[:, None]
    radius = 1 + _each(waves.astype(np.float32), repeat(_WAVES))
    radius = np.maximum(radius, np.float32(0.2))
    slope = _each(waves.astype(np.float32), repeat(_SLOPES)) / radius
    radius *= (half / radius.max(axis=1))[:, None]
    _, entry, _, rho = _polar(cx, cy)
    shrink = 1 / np.sqrt(1 + np.square(slope))  # the curve is not square to the radius: the distance is shorter
    return (_look_up(radius, entry) - rho) * _look_up((shrink / np.float32(_PIXEL)).astype(np.float32), entry)


def _cover(chance: Chance, inside: Floats, outline: float) -> Floats:
    """Cover from signed distances in pixels: filled, or in a share of cases as an outline of some width."""
    lines = chance.happens(outline)
    width = np.where(lines, chance.uniform(1.4, 6.0), np.float32(1e4)).astype(np.float32)[:, None, None]
    cover: Floats = np.clip(np.minimum(inside, width - inside) + np.float32(0.5), 0, 1)
    return cover


def _contours(chance: Chance) -> Floats:
    half, cx, cy = _place(chance)
    return _cover(chance, _blob(chance, half, cx, cy), outline=0.6)


def _gratings(chance: Chance) -> Floats:
    half, cx, cy = _place(chance)
    return _cover(chance, _blob(chance, np.maximum(half, 0.45), cx, cy), outline=0.0)


def _star(corners: Floats, radii: Floats, there: npt.NDArray[np.bool_], cx: Floats, cy: Floats) -> Floats:
    """Signed distance in pixels to the edges of star-shaped polygons, positive inside: (B, S, S).

    Args:
        corners: Angles of the corners, rising, in [0, 2 π): (B, V).
        radii: Their distances from the centre: (B, V).
        there: Which of them are used; the first always is.
        cx: Centre: (B,).
        cy: Centre: (B,).
    """
    batch, most = corners.shape
    order = np.argsort(~there, axis=1, kind="stable")  # those used, then the others
    rows = np.arange(batch)[:, None]
    used = there.sum(axis=1)
    angle, radius = corners[rows, order], radii[rows, order]
    following = (np.arange(most) + 1) % used[:, None]
    px, py = radius * np.cos(angle), radius * np.sin(angle)
    qx, qy = px[rows, following], py[rows, following]
    # the line through p and q: a x + b y = c with unit (a, b) pointing outwards
    a, b = qy - py, px - qx
    norm = np.maximum(np.hypot(a, b), 1e-6)
    a, b = a / norm, b / norm
    c = a * px + b * py
    # which edge a direction meets: the last corner before it
    before = angle[:, :, None] <= _TABLE_ANGLES.astype(np.float32)
    edge = ((before & (np.arange(most) < used[:, None])[:, :, None]).sum(axis=1) - 1) % used[:, None]
    dx, entry, dy, _ = _polar(cx, cy)
    line = [_look_up((v[rows, edge] / _PIXEL).astype(np.float32), entry) for v in (a, b, c)]
    inside: Floats = line[2] - line[0] * dx[:, None, :] - line[1] * dy[:, :, None]
    return inside


def _polygons(chance: Chance) -> Floats:
    half, cx, cy = _place(chance)
    turn = chance.uniform(0, 2 * np.pi)
    parts = []
    for part, most in enumerate((7, 4)):
        there = np.arange(most) < np.maximum(chance.integers(3, most), 3)[:, None]
        gaps = np.where(there, chance.uniform(0.6, 1.4, (most,)), 0)
        start = chance.uniform(0, 1)[:, None] * gaps[:, -1:] if part else np.zeros((len(chance), 1), np.float32)
        corners = (np.cumsum(gaps, axis=1) - gaps[:, :1] + start) / (gaps.sum(axis=1, keepdims=True) + start)
        corners = (corners * np.float32(2 * np.pi * 0.999)).astype(np.float32)
        size = half * (1.0 if part == 0 else chance.uniform(0.3, 0.55))
        radii = size[:, None] * chance.uniform(0.35 if part == 0 else 0.7, 1.0, (most,))
        if part == 0:
            x, y = cx, cy
        else:  # where the main part ends, in a direction of chance
            reach = half * chance.uniform(0.5, 0.9)
            x, y = cx + reach * np.cos(turn), cy + reach * np.sin(turn)
        parts.append(_star(corners, radii, there, x, y))
    second = chance.happens(0.6)[:, None, None]
    inside = np.where(second, np.maximum(parts[0], parts[1]), parts[0])
    return _cover(chance, inside, outline=0.3)


_WORDS_LEVELS = 7


def _fractals(chance: Chance) -> Floats:
    """3^7 points of the attractor of three affine maps: all words of seven letters, applied to one point."""
    batch = len(chance)
    angles = chance.uniform(-np.pi, np.pi, (3, 2))
    strengths = np.stack([chance.uniform(0.5, 0.85, (3,)), chance.uniform(0.2, 0.6, (3,))], axis=2)
    cos, sin = np.cos(angles), np.sin(angles)
    turn = np.stack([np.stack([cos, -sin], -1), np.stack([sin, cos], -1)], -2)  # (B, 3, 2 turns, 2, 2)
    maps = _each(turn[:, :, 0] * strengths[:, :, None, :], turn[:, :, 1])  # singular values below one: it contracts
    shifts = chance.uniform(-1, 1, (3, 2))
    points = np.zeros((batch, 1, 2), dtype=np.float32)
    for _ in range(_WORDS_LEVELS):
        moved = _each(points[:, None], maps.transpose(0, 1, 3, 2)) + shifts[:, :, None, :]
        points = moved.reshape(batch, -1, 2)
    low, high = points.min(axis=1), points.max(axis=1)
    half, cx, cy = _place(chance)
    zoom = 2 * half / np.maximum((high - low).max(axis=1), 1e-3)
    points = (points - ((low + high) / 2)[:, None]) * zoom[:, None, None] + np.stack([cx, cy], 1)[:, None]
    cell = np.floor((points + 1) * np.float32(SIZE / 2)).astype(np.int64)
    inside = ((cell >= 0) & (cell < SIZE)).all(axis=2)
    flat = cell[:, :, 1] * SIZE + cell[:, :, 0] + np.arange(batch)[:, None] * SIZE**2
    count = np.bincount(flat[inside], minlength=batch * SIZE**2).reshape(batch, SIZE, SIZE).astype(np.float32)
    spread = _BLURS[chance.integers(5, 10)]  # a dot has a width
    return np.clip(_each(_each(spread, count), spread.transpose(0, 2, 1)) * np.float32(3), 0, 1)


_FIGURES: dict[str, Callable[[Chance], Floats]] = {
    "strokes": _strokes,
    "contours": _contours,
    "polygons": _polygons,
    "fractals": _fractals,
    "gratings": _gratings,
}


# paint


def _blur_matrices() -> Floats:
    """One matrix for each of `_SIGMAS`: K @ image @ K' blurs; rows sum to one."""
    distance = np.arange(SIZE)[:, None] - np.arange(SIZE)
    kernels = [np.exp(-(distance**2) / (2 * max(sigma, 1e-2) ** 2)) for sigma in _SIGMAS]
    return np.stack([kernel / kernel.sum(axis=1, keepdims=True) for kernel in kernels]).astype(np.float32)


_BLURS = _blur_matrices()
_CLOUDS = 6  # knots a side of a cloud
_HATS = np.maximum(0, 1 - abs((_AXIS[:, None] + 1) / 2 * (_CLOUDS - 1) - np.arange(_CLOUDS))).astype(np.float32)


def _wave(cycles: Floats, angle: Floats, phase: Floats, gain: Floats) -> Floats:
    """Waves in [-1, 1] over the image, (B, S, S): `cycles` an image's side, made square by a gain above 1."""
    fx, fy = np.pi * cycles * np.cos(angle), np.pi * cycles * np.sin(angle)
    # sin(u + v) from sin and cos along each axis: two products of vectors instead of a sine for every pixel
    u, v = fx[:, None] * _AXIS + phase[:, None], fy[:, None] * _AXIS
    wave: Floats = np.cos(v)[:, :, None] * np.sin(u)[:, None, :]
    wave += np.sin(v)[:, :, None] * np.cos(u)[:, None, :]
    wave *= gain[:, None, None]
    np.clip(wave, -1, 1, out=wave)
    return wave


def _colours(chance: Chance, textured: bool) -> tuple[Floats, Floats]:
    """Colours of ground and figure in [0, 1], (B, 3) each: apart in brightness, or (textured) the same."""
    light = chance.uniform(0.05, 0.95)
    margin = np.where(chance.happens(0.5), 1.0, -1.0) * chance.uniform(0.2, 0.9)
    other = light + margin
    other = np.where((other < 0.02) | (other > 0.98), light - margin, other)
    other = np.clip(other, 0.02, 0.98)
    # too near after clipping: go to the far end
    other = np.where(abs(other - light) < 0.2, np.where(light > 0.5, light - 0.4, light + 0.4), other)
    if textured:
        light = other = chance.uniform(0.25, 0.75)
    hue = chance.normal((2, 3)) * (chance.uniform(0.0, 0.3) * chance.happens(0.65))[:, None, None]
    hue -= hue.mean(axis=2, keepdims=True)  # changes the hue, not the brightness
    if textured:
        hue[:, 1] = hue[:, 0]
    return light[:, None].astype(np.float32) + hue[:, 0], other[:, None].astype(np.float32) + hue[:, 1]


def _paint(chance: Chance, cover: Floats, textured: bool) -> Bytes:
    """Give a figure and its ground colours, waves, clouds, blur and noise: uint8 (B, 3, S, S)."""
    batch = len(chance)
    ground, figure = _colours(chance, textured)
    # cycles, angle, phase, gain, strength of the waves of the ground (0) and the figure (1)
    cycles = np.exp(chance.uniform(np.log(1.0), np.log(11.0), (2,)))
    angle = chance.uniform(0, np.pi, (2,))
    phase = chance.uniform(0, 2 * np.pi, (2,))
    gain = np.where(chance.happens(0.5, (2,)), 1.0, 6.0).astype(np.float32)
    strength = chance.uniform(0.03, 0.18, (2,)) * chance.happens(0.35, (2,))
    if textured:
        cycles = np.exp(chance.uniform(np.log(4.0), np.log(12.0), (2,)))
        apart = np.where(chance.happens(0.7), chance.uniform(0.35, 1.0) * np.pi / 2, 0)
        angle[:, 1] = angle[:, 0] + np.where(chance.happens(0.5), apart, -apart)
        # the same direction: another length, by a factor of 1.8 or more
        cycles[:, 1] = np.where(
            apart == 0, np.where(cycles[:, 0] > 7, cycles[:, 0] / 2, cycles[:, 0] * 1.8), cycles[:, 1]
        )
        gain[:, 1] = gain[:, 0]
        strength = np.repeat(chance.uniform(0.12, 0.4)[:, None], 2, axis=1)
    cloud = chance.normal((_CLOUDS, _CLOUDS)) * (chance.uniform(0.02, 0.14) * chance.happens(0.4))[:, None, None]
    tone = _each(_each(repeat(_HATS), cloud), repeat(_HATS.T))
    layers = []
    for number in (0, 1):
        wave = _wave(cycles[:, number], angle[:, number], phase[:, number], gain[:, number])
        wave *= strength[:, number].astype(np.float32)[:, None, None]
        layers.append(wave)
    layers[1] -= layers[0]
    layers[1] *= cover
    tone += layers[0]
    tone += layers[1]
    image = cover[:, None] * (figure - ground).astype(np.float32)[:, :, None, None]
    image += ground.astype(np.float32)[:, :, None, None]
    image += tone[:, None]
    blur = _BLURS[np.where(chance.happens(0.5), chance.integers(1, len(_SIGMAS) - 1), 0)][:, None]
    image = _each(_each(blur, image), blur.transpose(0, 1, 3, 2))
    # noise: the sum of two bytes, which is triangular, with a spread of 104.5
    level = chance.uniform(0.0, 0.11) * chance.happens(0.6)
    grey = chance.happens(0.4)
    pixels = 3 * SIZE**2
    two = chance.words(pixels // 4).view(np.uint8).reshape(batch, 2, 3, SIZE, SIZE)
    noise = two[:, 0].astype(np.float32)
    noise += two[:, 1]
    noise -= np.float32(255)
    noise[grey] = noise[grey][:, :1]
    noise *= (level * np.float32(255 / 104.5))[:, None, None, None]
    image *= np.float32(255)
    image += noise
    image += np.float32(0.5)
    return np.clip(image, 0, 255, out=image).astype(np.uint8)


# targets

_POWERS = np.stack([_AXIS.astype(np.float64) ** power for power in range(4)], axis=1)
# approximate mean and spread of each entry of POSE
_POSE_MEAN = np.array([0.0, 0.0, 0.39, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -2.4])
_POSE_SPREAD = np.array([0.27, 0.27, 0.14, 0.37, 0.37, 0.15, 0.15, 0.3, 0.3, 0.8])


def _describe(cover: Floats) -> tuple[Floats, Floats]:
    """Pose by moments, (B, 10), and the mask at a common centre and scale, (B, 16, 16)."""
    raw = _each(repeat(_POWERS.T), _each(cover.astype(np.float64), repeat(_POWERS)))  # [y power, x power]
    raw[:, 0, 0] += 1e-9
    m = raw / raw[:, :1, :1]
    x, y = m[:, 0, 1], m[:, 1, 0]
    xx, yy, xy = m[:, 0, 2] - x * x, m[:, 2, 0] - y * y, m[:, 1, 1] - x * y
    xxx = m[:, 0, 3] - 3 * x * m[:, 0, 2] + 2 * x**3
    yyy = m[:, 3, 0] - 3 * y * m[:, 2, 0] + 2 * y**3
    xxy = m[:, 1, 2] - 2 * x * m[:, 1, 1] - y * m[:, 0, 2] + 2 * x * x * y
    xyy = m[:, 2, 1] - 2 * y * m[:, 1, 1] - x * m[:, 2, 0] + 2 * y * y * x
    square = np.maximum(xx + yy, 1e-6)
    cube = square**1.5
    scale = np.sqrt(square)
    pose = [x, y, scale, (xx - yy) / square, 2 * xy / square, (xxx + xyy) / cube, (xxy + yyy) / cube]
    pose += [(xxx - 3 * xyy) / cube, (3 * xxy - yyy) / cube, np.log(raw[:, 0, 0] / SIZE**2 + 1e-3)]
    standard = (np.stack(pose, axis=1) - _POSE_MEAN) / _POSE_SPREAD
    return np.clip(standard, -3, 3).astype(np.float32), _centre(cover, x, y, scale)


_WIDE_AXIS = (np.arange(-SIZE, 2 * SIZE) + 0.5) * _PIXEL - 1  # the image and as much on each side of it


def _centre(cover: Floats, x: Doubles, y: Doubles, scale: Doubles) -> Floats:
    """Resample masks by area: 16 cells a side over 2.2 `scale` on each side of the centre; nothing is outside."""
    knots = (np.arange(CENTRED) + 0.5) * (2 / CENTRED) - 1
    reach = 2.2 * scale
    wide = np.maximum(reach * (2 / CENTRED), _PIXEL)[:, None, None]

    def weights(centre: Doubles) -> Floats:
        at = centre[:, None] + reach[:, None] * knots
        hats = np.maximum(0, 1 - abs(at[:, :, None] - _WIDE_AXIS) / wide)
        total = np.maximum(hats.sum(axis=2, keepdims=True), 1e-6)
        inside: Floats = (hats[:, :, SIZE : 2 * SIZE] / total).astype(np.float32)
        return inside

    centred = _each(_each(weights(y), cover), weights(x).transpose(0, 2, 1))
    return centred.clip(0, 1)
