"""Synthetic tasks: complete folders of split files and images, to try and test everything without data.

The images are learnable: a class sets hue, direction and width of the stripes; noise, brightness, phase, size vary.
Every folder carries a mark (`SYNTHETIC.txt`), by which readers, records and tables tell its numbers from real ones.
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

from svp_bench.core.errors import DataError, UsageError, unknown_name
from svp_bench.data.reading import SYNTHETIC_MARK
from svp_bench.tasks.cards import TaskCard

DEFAULT_SIZE = 48
_GREY_EVERY = 10  # the images whose number ends in 7 are stored in grey
_KINDS = ("split_files", "json_split", "torchvision")  # readers of files; all read a marked folder as split files


def draw_task(
    card: TaskCard,
    root: Path,
    *,
    counts: Mapping[str, int] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Path:
    """Draw a whole task folder: a split file for each split, and its images as `images/<split>/NNNNNN.jpg`.

    A split that holds others (`train800val200`, `trainval`, `refit`) has copies of their images, as in the community's
    `vtab-1k` archive. The same arguments draw the same folder (to the byte, with the same numpy and Pillow).

    Args:
        card: A task that is read from files.
        root: The data root to draw below; created if missing.
        counts: Split → number of images, for some or all splits; by default a tenth of the card's, 8 to 100.
        size: Mean height and width in pixels; both vary by a quarter.
        seed: Another seed draws other images and labels.

    Returns:
        The new folder, `root/<card.folder>`. It appears whole or not at all.

    Raises:
        UsageError: If the task is not read from files, or a count, size or seed does not fit.
        DataError: If the folder exists and is not empty, or cannot be written.
    """
    if card.reader.kind not in _KINDS:
        raise UsageError(f"{card.name} is read by {card.reader.kind!r}, not from files; it needs no synthetic images")
    size = DEFAULT_SIZE if size is None else size
    if seed < 0:
        raise UsageError(f"seed {seed} is out of range; a seed is 0 or above")
    if size < 8:
        raise UsageError(f"synthetic images need a size of at least 8, not {size}")
    wanted = _counts(card, counts or {})
    target = root / card.folder
    try:
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise DataError(f"{target} exists already and is not empty; give another folder")
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{card.folder}.", suffix=".part", dir=root) as aside:
            folder = Path(aside) / card.folder
            folder.mkdir()
            _draw_splits(card, folder, wanted, size, seed)
            mark = f"Created by svp-bench for {card.name} (seed {seed}): these images are not real data.\n"
            (folder / SYNTHETIC_MARK).write_text(mark, encoding="utf-8", newline="\n")
            if target.is_dir():
                target.rmdir()
            os.replace(folder, target)
    except OSError as error:
        raise DataError(f"{target} cannot be written ({error.strerror or error}); give another folder") from None
    return target


def _parts(card: TaskCard, name: str) -> tuple[str, ...]:
    """Return the splits that make up a split of the card; none if it has images of its own."""
    if name == "refit" and "refit" in card.reader.options:
        return ("train",) if card.reader.options["refit"] == "train" else ("train", "val")
    heads = [first for first in card.counts if name.startswith(first) and name.removeprefix(first) in card.counts]
    return (heads[0], name.removeprefix(heads[0])) if heads else ()


def _counts(card: TaskCard, given: Mapping[str, int]) -> dict[str, int]:
    for name, count in given.items():
        if name not in card.counts:
            raise unknown_name(f"split of {card.name}", name, card.counts)
        if count < 1:
            raise UsageError(f"count {count} of {name!r} is out of range; a split holds at least one image")
    counts = {name: given.get(name, min(full, max(8, full // 10), 100)) for name, full in card.counts.items()}
    for name in counts:
        if parts := _parts(card, name):
            total = sum(counts[part] for part in parts)
            if given.get(name, total) != total:
                raise UsageError(f"count {given[name]} of {name!r} does not fit: {' + '.join(parts)} make {total}")
            counts[name] = total
    return counts


def _draw_splits(card: TaskCard, folder: Path, counts: Mapping[str, int], size: int, seed: int) -> None:
    lines: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(counts, key=lambda name: bool(_parts(card, name))):  # those that copy others come last
        (folder / "images" / name).mkdir(parents=True)
        if parts := _parts(card, name):
            labels = []
            for number, (path, label) in enumerate(entry for part in parts for entry in lines[part]):
                shutil.copyfile(folder / path, folder / f"images/{name}/{number:06d}.jpg")
                labels.append(label)
        else:
            digest = hashlib.sha256(f"{card.name} {name}".encode()).digest()
            rng = np.random.Generator(np.random.PCG64([seed, int.from_bytes(digest[:8], "big")]))
            labels = rng.permutation(np.arange(counts[name]) % card.classes).tolist()
            for number, label in enumerate(labels):
                image = Image.fromarray(draw_image(label, card.classes, rng, size))
                if number % _GREY_EVERY == 7:
                    image = image.convert("L")
                image.save(folder / f"images/{name}/{number:06d}.jpg")
        lines[name] = [(f"images/{name}/{number:06d}.jpg", label) for number, label in enumerate(labels)]
        text = "".join(f"{path} {label}\n" for path, label in lines[name])
        (folder / f"{name}.txt").write_text(text, encoding="utf-8", newline="\n")


def draw_image(label: int, classes: int, rng: np.random.Generator, size: int) -> npt.NDArray[np.uint8]:
    """Draw one image: uint8 (height, width, 3), both sides within a quarter of `size`.

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
    image = wave[..., None] * colour + rng.normal(0, 0.1, size=(height, width, 3))
    return np.asarray(np.rint(image.clip(0, 1) * 255), dtype=np.uint8)
