"""Reader: the synthetic tasks of the demo suite, the same bytes on every machine.

What each asks is in `KINDS`. An image is a pure function of (generator version, kind, seed, number). To be the same
everywhere it is made of whole numbers from Philox's raw words (a stream that NumPy guarantees) and of single additions,
products, quotients, floors and comparisons in float64, which IEEE 754 fixes; directions come from a table rounded to
1/4096. There is no sine, exponential or sum of an array in it, whose last bits depend on the processor.

It shares no code with the images of `pretraining/`. What that asked for, a figure's pose, is what `location`,
`orientation` and `size` read out; `count` and `textures` are unlike it, but for waves that look like the stripes here.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from msgspec import Meta

from svp_bench.core.errors import CardError, plural
from svp_bench.data.reading import reader_options, split_positions
from svp_bench.data.sources import Source, array_splits
from svp_bench.tasks.cards import SuiteCard, TaskCard

VERSION = 1  # increases with every change of the images
SIZE = 64  # pixels a side

_FINE = 2  # samples of a pixel, along each side
_AXIS = (np.arange(SIZE * _FINE) + 0.5) / _FINE  # in pixels
_STEPS = 4096  # of the table of directions
_COSINE = tuple(round(math.cos(math.radians(degrees)) * _STEPS) / _STEPS for degrees in range(360))
_NOISE = 12  # grey values, at most

Plane = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Frame(NamedTuple):
    """Coordinates of an object: u along its direction, v to the right of it, in units of its size."""

    u: Plane
    v: Plane


def _frame(x: float, y: float, size: float, degrees: int) -> Frame:
    cosine, sine = _COSINE[degrees % 360], _COSINE[(degrees - 90) % 360]
    right, down = _AXIS[None, :] - x, _AXIS[:, None] - y
    return Frame((right * cosine + down * sine) / size, (down * cosine - right * sine) / size)


# --- shapes: all within a circle of radius 1 -------------------------------------------------------------------------


def _disc(at: Frame) -> Mask:
    return at.u * at.u + at.v * at.v <= 0.8


def _square(at: Frame) -> Mask:
    return (np.abs(at.u) <= 0.7) & (np.abs(at.v) <= 0.7)


def _triangle(at: Frame) -> Mask:
    return (at.u >= -0.5) & (np.abs(at.v) <= (1.0 - at.u) * 0.577)


def _cross(at: Frame) -> Mask:
    across, along = np.abs(at.v), np.abs(at.u)
    return ((across <= 0.3) & (along <= 0.95)) | ((along <= 0.3) & (across <= 0.95))


def _key(at: Frame, side: int) -> Mask:
    """A bow in front, a shaft behind it, a bit on one side of its end: no two directions look alike."""
    bow = (at.u - 0.5) * (at.u - 0.5) + at.v * at.v <= 0.22
    shaft = (np.abs(at.v) <= 0.13) & (at.u >= -0.95) & (at.u <= 0.5)
    bit = (at.u >= -0.95) & (at.u <= -0.6) & (at.v * side >= 0) & (at.v * side <= 0.45)
    return bow | shaft | bit


Shape = Callable[[Frame], Mask]
_SHAPES: tuple[Shape, ...] = (_disc, _square, _triangle, _cross)


# --- patterns: masks that repeat, of the whole plane -----------------------------------------------------------------


def _within(values: Plane) -> Plane:
    return values - np.floor(values)


def _middle(values: Plane) -> Plane:
    return np.abs(_within(values) - 0.5)


def _shifted(at: Frame) -> Plane:
    """Return u, every second row moved by half a period."""
    return at.u + (np.floor(at.v) % 2) * 0.5


def _around(u: Plane, v: Plane) -> Plane:
    return _middle(u) * _middle(u) + _middle(v) * _middle(v)


_PATTERNS: dict[str, Callable[[Frame, float], Mask]] = {  # `part` in [0, 1): how heavy
    "stripes": lambda at, part: _within(at.u) < 0.35 + 0.3 * part,
    "checks": lambda at, part: (np.floor(at.u * 1.6) + np.floor(at.v * 1.6)) % 2 == 0,
    "dots": lambda at, part: _around(_shifted(at), at.v) < 0.06 + 0.08 * part,
    "rings": lambda at, part: (
        (_around(at.u * 0.8, at.v * 0.8) < 0.2) & (_around(at.u * 0.8, at.v * 0.8) > 0.06 + 0.05 * part)
    ),
    "bricks": lambda at, part: (
        (_within(_shifted(Frame(at.u * 0.6, at.v))) < 0.1 + 0.04 * part) | (_within(at.v) < 0.16 + 0.08 * part)
    ),
    "crosses": lambda at, part: (
        ((_middle(at.u) < 0.1 + 0.04 * part) & (_middle(at.v) < 0.38))
        | ((_middle(at.v) < 0.1 + 0.04 * part) & (_middle(at.u) < 0.38))
    ),
    "triangles": lambda at, part: _middle(at.u) * 2 < _within(at.v) * (0.8 + 0.2 * part),
    "zigzag": lambda at, part: _within(at.v + _middle(at.u) * 1.4) < 0.35 + 0.3 * part,
}


# --- painting --------------------------------------------------------------------------------------------------------


class Canvas:
    """An image in the making: random numbers, a ground, then objects on it.

    Args:
        words: Text that identifies the image.
    """

    def __init__(self, words: str) -> None:
        key = int.from_bytes(hashlib.sha256(words.encode()).digest()[:16], "little")
        self._stream = np.random.Philox(key=key)
        self._light = self.below(2) == 1  # dark objects on a light ground, or the other way round
        low, high = (150, 230) if self._light else (20, 100)
        across, down = self.between(-0.4, 0.4), self.between(-0.4, 0.4)
        slope = (_AXIS[None, :] - SIZE / 2) * across + (_AXIS[:, None] - SIZE / 2) * down
        self._pixels = np.stack([slope + self.between(low, high) for _ in range(3)])  # in grey values

    def below(self, bound: int) -> int:
        """Return a whole number of 0 … bound - 1."""
        return int(self._stream.random_raw()) % bound

    def between(self, low: float, high: float) -> float:
        """Return a number in [low, high)."""
        return low + (high - low) * ((int(self._stream.random_raw()) >> 11) * 2.0**-53)

    def shape(self) -> Shape:
        """Return one of the shapes."""
        return _SHAPES[self.below(len(_SHAPES))]

    def paint(self, mask: Mask) -> None:
        """Give what a mask covers a colour that stands out from the ground."""
        low, high = (0, 110) if self._light else (140, 255)
        for plane, value in zip(self._pixels, [self.between(low, high) for _ in range(3)], strict=True):
            plane[mask] = value

    def sprite(self, shape: Shape, x: float, y: float, size: float) -> None:
        """Paint a shape in a random direction and colour."""
        self.paint(shape(_frame(x, y, size, self.below(360))))

    def specks(self) -> None:
        """Paint up to eight small dots, which mean nothing."""
        for _ in range(self.below(9)):
            x, y = self.between(2, SIZE - 2), self.between(2, SIZE - 2)
            self.paint(_disc(_frame(x, y, 1.5, 0)))

    def finish(self) -> npt.NDArray[np.uint8]:
        """Return uint8 (SIZE, SIZE, 3): samples averaged, noise added."""
        fine = self._pixels
        mean = (fine[:, ::2, ::2] + fine[:, ::2, 1::2] + fine[:, 1::2, ::2] + fine[:, 1::2, 1::2]) * 0.25
        words = self._stream.random_raw(3 * SIZE * SIZE // 8).astype("<u8")
        noise = np.frombuffer(words.tobytes(), dtype=np.uint8).reshape(3, SIZE, SIZE) % (2 * _NOISE + 1)
        grey = np.clip(np.floor(mean) + noise - float(_NOISE), 0, 255).astype(np.uint8)
        return np.ascontiguousarray(grey.transpose(1, 2, 0))


# --- the kinds -------------------------------------------------------------------------------------------------------


def _textures(canvas: Canvas, label: int) -> None:
    x, y = canvas.between(0, SIZE), canvas.between(0, SIZE)
    at = _frame(x, y, canvas.between(7, 14), canvas.below(360))
    canvas.paint(tuple(_PATTERNS.values())[label](at, canvas.between(0, 1)))


_CELLS = 4  # a side
_MARGIN = 8  # pixels, between the image's border and the outer cells
_CELL = (SIZE - 2 * _MARGIN) / _CELLS


def _location(canvas: Canvas, label: int) -> None:
    canvas.specks()
    row, column = divmod(label, _CELLS)
    x = _MARGIN + _CELL * (column + canvas.between(0.1, 0.9))
    y = _MARGIN + _CELL * (row + canvas.between(0.1, 0.9))
    canvas.sprite(canvas.shape(), x, y, canvas.between(4, 8))


def _orientation(canvas: Canvas, label: int) -> None:
    canvas.specks()
    size = canvas.between(11, 22)
    x, y = canvas.between(size, SIZE - size), canvas.between(size, SIZE - size)
    at = _frame(x, y, size, 45 * label - 15 + canvas.below(31))
    canvas.paint(_key(at, 2 * canvas.below(2) - 1))


def _count(canvas: Canvas, label: int) -> None:
    typical = canvas.between(4, 9)  # of the image, so that the area painted is weakly related to the number
    placed: list[tuple[float, float, float]] = []
    tries = 0
    while len(placed) <= label:
        tries += 1
        if tries % 100 == 0:
            typical *= 0.9
            placed.clear()
        size = typical * canvas.between(0.75, 1.25)
        x, y = canvas.between(size, SIZE - size), canvas.between(size, SIZE - size)
        if all((x - ox) * (x - ox) + (y - oy) * (y - oy) > (size + o + 1) * (size + o + 1) for ox, oy, o in placed):
            placed.append((x, y, size))
    for x, y, size in placed:
        canvas.sprite(canvas.shape(), x, y, size)


def _size(canvas: Canvas, label: int) -> None:
    large = canvas.between(7, 12)
    small = large / canvas.between(1.12, 1.5)
    apart = large + small + canvas.between(1, 8)
    degrees = (0, 180, 90, 270)[label] - 30 + canvas.below(61)  # from the small one to the large one
    across, down = apart * _COSINE[degrees % 360], apart * _COSINE[(degrees - 90) % 360]
    x = canvas.between(max(small, large - across), min(SIZE - small, SIZE - large - across))
    y = canvas.between(max(small, large - down), min(SIZE - small, SIZE - large - down))
    shape = canvas.shape()  # one for both: a disc and a triangle have no sizes to compare
    canvas.sprite(shape, x, y, small)
    canvas.sprite(shape, x + across, y + down, large)


class Kind(NamedTuple):
    """A synthetic task: the names of its classes, and what paints the image of a label onto a ground."""

    classes: tuple[str, ...]
    paint: Callable[[Canvas, int], None]


_ROWS_AND_COLUMNS = tuple(f"row {row}, column {column}" for row in range(1, 5) for column in range(1, 5))
_DIRECTIONS = ("right", "lower right", "down", "lower left", "left", "upper left", "up", "upper right")
KINDS = {
    "textures": Kind(tuple(_PATTERNS), _textures),
    "location": Kind(_ROWS_AND_COLUMNS, _location),
    "orientation": Kind(_DIRECTIONS, _orientation),
    "count": Kind(("one", "two", "three", "four", "five", "six"), _count),
    "size": Kind(("larger on the right", "larger on the left", "larger below", "larger above"), _size),
}


def draw_numbered(kind: str, seed: int, number: int) -> tuple[npt.NDArray[np.uint8], int]:
    """Draw one image.

    Args:
        kind: Of `KINDS`.
        seed: Another seed draws other images.
        number: Of the image; its label is the number modulo the number of classes.

    Returns:
        uint8 (SIZE, SIZE, 3), and the label.
    """
    what = KINDS[kind]
    label = number % len(what.classes)
    canvas = Canvas(f"svp-bench drawn {VERSION} {kind} {seed} {number}")
    what.paint(canvas, label)
    return canvas.finish(), label


@dataclass(frozen=True)
class _Options:
    kind: Literal["textures", "location", "orientation", "count", "size"]
    seed: int
    generator: Annotated[int, Meta(ge=VERSION, le=VERSION, description=f"{VERSION}, the version of the generator")]


def open_synthetic(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Draw a task: its `train`, then `val`, then `test`, numbered through; `trainval` is the first two.

    Options: `kind` (of `KINDS`), `seed`, `generator` (must be `VERSION`). `root` is not used.

    Raises:
        CardError: If an option or split is unknown or missing, or the number of classes or of images wrong.
    """
    options = reader_options(card, _Options, ("train", "val", "trainval", "test"))
    where = f"{card.path}:1"
    names = KINDS[options.kind].classes
    if card.classes != len(names):
        raise CardError(f"{where}: {options.kind!r} has {plural(len(names), 'class')}, the card states {card.classes}")
    train, val, test = (card.counts.get(name, 0) for name in ("train", "val", "test"))
    if card.counts.get("trainval", train + val) != train + val:
        raise CardError(f"{where}: trainval is train and val together, {train + val}, not {card.counts['trainval']}")
    generated = [draw_numbered(options.kind, options.seed, number) for number in range(train + val + test)]
    pixels = np.stack([image for image, _ in generated])
    labels = np.asarray([label for _, label in generated], dtype=np.int64)
    first, second, third = np.split(np.arange(train + val + test), [train, train + val])
    images = array_splits(card, pixels, labels, split_positions(first, second, third), "image")
    return Source(f"synthetic {options.kind}, seed {options.seed}", images, class_names=names)
