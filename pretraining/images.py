"""Loss curve and contact sheet of a pre-training run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from pretraining.drawing import FAMILIES, SIZE, SyntheticBatch, draw, family_of

_COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207))


def contact_sheet(seed: int, columns: int = 12) -> Image.Image:
    """Return the first images of each family, each row followed by its clean masks and its centred masks."""
    of = family_of(seed, np.arange(100 * columns))
    sheet = Image.new("RGB", (90 + columns * SIZE, len(FAMILIES) * 3 * SIZE), "white")
    pen = ImageDraw.Draw(sheet)
    for number, name in enumerate(FAMILIES):
        batch = draw(seed, np.nonzero(of == number)[0][:columns])
        top = number * 3 * SIZE
        for row, label in enumerate((name, "mask", "centred mask")):
            pen.text((4, top + row * SIZE + SIZE // 2 - 6), label, fill="black")
            sheet.paste(Image.fromarray(_row(batch, row)), (90, top + row * SIZE))
    return sheet.quantize(256)  # half the bytes


def _row(batch: SyntheticBatch, which: int) -> npt.NDArray[np.uint8]:
    if which == 0:
        return np.concatenate(list(batch.images.transpose(0, 2, 3, 1)), axis=1)
    masks = batch.mask if which == 1 else batch.centred.repeat(4, axis=1).repeat(4, axis=2)
    return np.stack([np.concatenate(list(masks), axis=1)] * 3, axis=2)


def loss_curve(curves: Mapping[str, Sequence[tuple[float, float]]], title: str) -> Image.Image:
    """Return curves over views on a logarithmic axis; a name that begins with "held-out" gets dots.

    Args:
        curves: Points (views, loss) by name; values that are not positive are left out.
        title: Title above the curves.
    """
    width, height, left, right, top, bottom = 900, 480, 70, 190, 34, 40
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((left, 10), title, fill="black")
    points = {name: [(v, x) for v, x in line if x > 0 and math.isfinite(x)] for name, line in curves.items()}
    everything = [point for line in points.values() for point in line]
    if not everything:
        return image
    most = max(v for v, _ in everything)
    low, high = min(x for _, x in everything) * 0.95, max(x for _, x in everything) * 1.05

    def place(views: float, loss: float) -> tuple[float, float]:
        across = left + (width - left - right) * views / most
        down = top + (height - top - bottom) * (math.log(high) - math.log(loss)) / (math.log(high) - math.log(low))
        return across, down

    for decade in range(-4, 4):
        for digit in (1, 2, 5):
            value = digit * 10.0**decade
            if low <= value <= high:
                y = place(0, value)[1]
                pen.line([(left, y), (width - right, y)], fill=(225, 225, 225))
                pen.text((left - 40, y - 6), f"{value:g}", fill="black")
    for part in range(5):
        x = place(most * part / 4, high)[0]
        pen.line([(x, top), (x, height - bottom)], fill=(235, 235, 235))
        pen.text((x - 18, height - bottom + 6), f"{most * part / 4000:.0f} k", fill="black")
    pen.text(((left + width - right) / 2 - 30, height - 18), "views", fill="black")
    for number, (name, line) in enumerate(points.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        spots = [place(*point) for point in line]
        if name.startswith("held-out"):
            for x, y in spots:
                pen.ellipse([x - 4, y - 4, x + 4, y + 4], outline=colour, width=2)
        elif len(spots) > 1:
            pen.line(spots, fill=colour, width=2)
        pen.text((width - right + 12, top + 18 * number), name, fill=colour)
    return image
