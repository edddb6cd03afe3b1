"""Drawn tasks: complete folders in the form of `vtab-1k`, made from a card, to try and test everything without data.

The pictures are learnable: a class sets hue, direction and width of the stripes; noise, brightness, phase, size vary.
Every folder carries a mark (`DRAWN.txt`), by which records and tables tell its numbers from real ones.

    from pathlib import Path
    from svp_bench.cards import load_task
    from svp_bench.data import draw_task

    draw_task(load_task("vtab/caltech101"), Path("drawn"), counts={"train800": 40, "val200": 10, "test": 30})
"""

from __future__ import annotations

import colorsys
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.cards import TaskCard
from svp_bench.data.locate import list_file
from svp_bench.data.sources import DRAWN_MARK
from svp_bench.errors import DataError, UsageError, unknown_name

__all__ = ["DEFAULT_SIZE", "draw_picture", "draw_task"]

DEFAULT_SIZE = 48
_GREY_EVERY = 10  # the pictures whose number ends in 7 are stored in grey


def draw_task(
    card: TaskCard,
    root: Path,
    *,
    counts: Mapping[str, int] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Path:
    """Draw a whole task folder: each list, and its pictures as `images/<list>/NNNNNN.jpg`, numbered anew in each list.

    A list whose name joins those of two others (`train800val200`) holds the pictures of both, stored a second time, as
    in the community's archive. The same arguments draw the same folder (to the byte, with the same numpy and Pillow).

    Args:
        card: A task that is read from lists.
        root: The data root to draw below; made if need be.
        counts: List → number of pictures, for some or all lists; by default a tenth of the card's, 8 to 100.
        size: Mean height and width in pixels; both vary by a quarter.
        seed: Another seed draws other pictures and labels.

    Returns:
        The new folder, `root/<card.folder>`. It appears whole or not at all.

    Raises:
        UsageError: If the task is not read from lists, or a count, size or seed does not fit.
        DataError: If the folder exists and is not empty, or cannot be written.
    """
    if card.reader.kind != "lists":
        raise UsageError(
            f"{card.name} is read by {card.reader.kind!r}, not from lists of files; it needs no drawn pictures"
        )
    size = DEFAULT_SIZE if size is None else size
    if seed < 0:
        raise UsageError(f"seed {seed} is out of range; a seed is 0 or above")
    if size < 8:
        raise UsageError(f"drawn pictures of size {size} would show nothing; give at least 8")
    wanted = _counts(card, counts or {})
    target = root / card.folder
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target} exists already and is not empty; nothing is drawn over it, give another folder")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{card.folder}.", suffix=".part", dir=root) as aside:
            drawn = Path(aside) / card.folder
            _draw(card, drawn, wanted, size, seed)
            if target.is_dir():
                target.rmdir()
            os.replace(drawn, target)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error}); give another folder") from None
    return target


def _joined(card: TaskCard, name: str) -> tuple[str, str] | None:
    """Return the two lists of the card whose names, joined, are `name`."""
    for first in card.counts:
        if name.startswith(first) and name.removeprefix(first) in card.counts:
            return first, name.removeprefix(first)
    return None


def _counts(card: TaskCard, given: Mapping[str, int]) -> dict[str, int]:
    for name, count in given.items():
        if name not in card.counts:
            raise unknown_name(f"list of {card.name}", name, card.counts)
        if count < 1:
            raise UsageError(f"count {count} of {name!r} is out of range; a list holds at least one picture")
    counts = {name: given.get(name, min(full, max(8, full // 10), 100)) for name, full in card.counts.items()}
    for name in counts:
        if parts := _joined(card, name):
            total = sum(counts[part] for part in parts)
            if given.get(name, total) != total:
                raise UsageError(f"count {given[name]} of {name!r} does not fit: {' + '.join(parts)} make {total}")
            counts[name] = total
    return counts


def _draw(card: TaskCard, folder: Path, counts: Mapping[str, int], size: int, seed: int) -> None:
    lines: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(counts, key=lambda name: _joined(card, name) is not None):  # joined lists copy what is drawn
        images = folder / "images" / name
        images.mkdir(parents=True)
        if parts := _joined(card, name):
            labels = []
            for number, (path, label) in enumerate(entry for part in parts for entry in lines[part]):
                shutil.copyfile(folder / path, images / f"{number:06d}.jpg")
                labels.append(label)
        else:
            rng = _generator(seed, card.name, name)
            labels = rng.permutation(np.arange(counts[name]) % card.classes).tolist()
            for number, label in enumerate(labels):
                picture = draw_picture(label, card.classes, rng, size)
                image = Image.fromarray(picture)
                if number % _GREY_EVERY == 7:
                    image = image.convert("L")
                image.save(images / f"{number:06d}.jpg")
        lines[name] = [(f"images/{name}/{number:06d}.jpg", label) for number, label in enumerate(labels)]
    for name, entries in lines.items():
        _write(list_file(folder, name), "".join(f"{path} {label}\n" for path, label in entries))
    _write(
        folder / DRAWN_MARK, f"Drawn by svp-bench for {card.name} (seed {seed}): these pictures are not real data.\n"
    )


def draw_picture(label: int, classes: int, rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """Draw one picture: uint8 (height, width, 3), both sides within a quarter of `size`.

    Args:
        label: The class, 0..classes-1: it sets hue, direction and width of the stripes.
        classes: Number of classes.
        rng: Source of all that varies within a class.
        size: Mean height and width in pixels.
    """
    height, width = rng.integers(size - size // 4, size + size // 4, size=2, endpoint=True)
    angle = np.pi * label / classes
    cycles = 3 + 2 * (label % 3)
    y, x = np.mgrid[0:height, 0:width] / size
    phase = rng.uniform(0, 2 * np.pi)
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * cycles * (x * np.cos(angle) + y * np.sin(angle)) + phase)
    colour = np.array(colorsys.hsv_to_rgb(label / classes, 0.8, rng.uniform(0.7, 1.0)))
    picture = wave[..., None] * colour + rng.normal(0, 0.1, size=(height, width, 3))
    return np.asarray(np.rint(picture.clip(0, 1) * 255), dtype=np.uint8)


def _generator(seed: int, task: str, name: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{task} {name}".encode()).digest()
    return np.random.Generator(np.random.PCG64([seed, int.from_bytes(digest[:8], "big")]))


def _write(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
