"""Synthetic tasks: complete folders in the form that a card's reader reads, to try and test everything without data.

The forms: `vtab-1k` (lists of files), JSON splits, and the folders and archives that torchvision reads.

The images are learnable: a class sets hue, direction and width of the stripes; noise, brightness, phase, size vary.
Every folder carries a mark (`SYNTHETIC.txt`), by which records and tables tell its numbers from real ones.

    from pathlib import Path
    from svp_bench.tasks.cards import load_task
    from svp_bench.data import draw_task

    draw_task(load_task("vtab/caltech101"), Path("synthetic"), counts={"train800": 40, "val200": 10, "test": 30})
"""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import json
import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import savemat  # type: ignore[import-untyped]

from svp_bench.core.errors import DataError, UsageError, unknown_name
from svp_bench.data.native import NATIVE_FORMS
from svp_bench.data.reading import SYNTHETIC_MARK
from svp_bench.tasks.cards import TaskCard, class_names

__all__ = ["DEFAULT_SIZE", "draw_image", "draw_task"]

DEFAULT_SIZE = 48
_GREY_EVERY = 10  # the images whose number ends in 7 are stored in grey

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class _Drawing:
    """A task folder in the making: `counts` and `size` of its images, and the seed."""

    card: TaskCard
    folder: Path
    counts: Mapping[str, int]
    size: int
    seed: int

    def generator(self, name: str) -> np.random.Generator:
        """Return the random numbers of a split."""
        digest = hashlib.sha256(f"{self.card.name} {name}".encode()).digest()
        return np.random.Generator(np.random.PCG64([self.seed, int.from_bytes(digest[:8], "big")]))

    def labels(self, rng: np.random.Generator, count: int) -> list[int]:
        """Return balanced labels in random order."""
        labels: list[int] = rng.permutation(np.arange(count) % self.card.classes).tolist()
        return labels

    def image(self, label: int, rng: np.random.Generator) -> Pixels:
        """Draw an image."""
        return draw_image(label, self.card.classes, rng, self.size)


def draw_task(
    card: TaskCard,
    root: Path,
    *,
    counts: Mapping[str, int] | None = None,
    size: int | None = None,
    seed: int = 0,
) -> Path:
    """Draw a whole task folder in the form that the card's reader reads.

    Of a task that is read from split files: each of them, and its images as `images/<split>/NNNNNN.jpg`, numbered anew
    in each. A split whose name joins those of two others (`train800val200`) holds the images of both, stored a second
    time, as in the community's archive. The same arguments draw the same folder (to the byte, with the same numpy and
    Pillow).

    Args:
        card: A task that is read from files.
        root: The data root to draw below; created if missing.
        counts: Split → number of images, for some or all splits; by default a tenth of the card's, 8 to 100. Where the
            reader takes val from the training images by a rule, their sum counts, and the rule decides.
        size: Mean height and width in pixels; both vary by a quarter. (CIFAR and SVHN are always 32 × 32.)
        seed: Another seed draws other images and labels.

    Returns:
        The new folder, `root/<card.folder>`. It appears whole or not at all.

    Raises:
        UsageError: If the task is not read from files, or a count, size or seed does not fit.
        DataError: If the folder exists and is not empty, or cannot be written.
    """
    kind = card.reader.kind
    if kind not in _DRAWERS:
        raise UsageError(f"{card.name} is read by {kind!r}, not from split files; it needs no synthetic images")
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
            _DRAWERS[kind](_Drawing(card, folder, wanted, size, seed))
            mark = f"Created by svp-bench for {card.name} (seed {seed}): these images are not real data.\n"
            _write(folder / SYNTHETIC_MARK, mark)
            if target.is_dir():
                target.rmdir()
            os.replace(folder, target)
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
            raise UsageError(f"count {count} of {name!r} is out of range; a list holds at least one image")
    counts = {name: given.get(name, min(full, max(8, full // 10), 100)) for name, full in card.counts.items()}
    for name in counts:
        parts: Sequence[str] | None = _joined(card, name)
        if name == "refit" and "refit" in card.reader.options:
            parts = ("train",) if card.reader.options["refit"] == "train" else ("train", "val")
        if parts:
            total = sum(counts[part] for part in parts)
            if given.get(name, total) != total:
                raise UsageError(f"count {given[name]} of {name!r} does not fit: {' + '.join(parts)} make {total}")
            counts[name] = total
    return counts


def _draw_split_files(drawing: _Drawing) -> None:
    card, folder = drawing.card, drawing.folder
    lines: dict[str, list[tuple[str, int]]] = {}
    for name in sorted(drawing.counts, key=lambda name: _joined(card, name) is not None):  # joined ones copy the others
        images = folder / "images" / name
        images.mkdir(parents=True)
        if parts := _joined(card, name):
            labels = []
            for number, (path, label) in enumerate(entry for part in parts for entry in lines[part]):
                shutil.copyfile(folder / path, images / f"{number:06d}.jpg")
                labels.append(label)
        else:
            rng = drawing.generator(name)
            labels = drawing.labels(rng, drawing.counts[name])
            for number, label in enumerate(labels):
                image = Image.fromarray(drawing.image(label, rng))
                if number % _GREY_EVERY == 7:
                    image = image.convert("L")
                image.save(images / f"{number:06d}.jpg")
        lines[name] = [(f"images/{name}/{number:06d}.jpg", label) for number, label in enumerate(labels)]
    for name, entries in lines.items():
        _write(folder / f"{name}.txt", "".join(f"{path} {label}\n" for path, label in entries))


def _draw_json_split(drawing: _Drawing) -> None:
    options = drawing.card.reader.options
    form = NATIVE_FORMS[str(options.get("native", "text_files"))]
    parts: dict[str, dict[str, int]] = {}  # split -> path -> class id
    number = 0
    known: list[int] = []
    for name in ("train", "val", "test"):
        rng = drawing.generator(name)
        if name == "train":
            labels = drawing.labels(rng, drawing.counts[name])
            known = sorted(set(labels))
        else:  # classes that train has
            order = rng.permutation(np.arange(drawing.counts[name]) % len(known))
            labels = [known[index] for index in order.tolist()]
        parts[name] = {}
        for label in labels:
            number += 1
            class_id = label + int(options["first_id"]) if "first_id" in options else 3 * label + 5  # with gaps
            path = form.path.format(number=number, class_id=class_id)
            _save_all(drawing.folder / form.images, [path], [drawing.image(label, rng)])
            parts[name][path] = class_id
    for name, ids in parts.items():
        _write(drawing.folder / f"{name}.json", json.dumps(ids))


# --- the files that torchvision reads --------------------------------------------------------------------------------


def _draw_torchvision(drawing: _Drawing) -> None:
    card, sizes = drawing.card, {name: drawing.counts[name] for name in ("train", "val", "test")}
    if card.reader.options["val"] != "official":
        sizes["train"] += sizes.pop("val")
    names = class_names(card) or [f"{label:05d}" for label in range(card.classes)]
    labels: dict[str, list[int]] = {}
    images: dict[str, list[Pixels]] = {}
    for split, count in sizes.items():
        rng = drawing.generator(split)
        labels[split] = drawing.labels(rng, count)
        images[split] = [drawing.image(label, rng) for label in labels[split]]
    _TORCHVISION_WRITERS[str(card.reader.options["set"])](drawing.folder, names, labels, images)


_Labels = Mapping[str, list[int]]  # split -> label of each image
_Drawings = Mapping[str, list[Pixels]]


def _thumbnails(images: list[Pixels]) -> Pixels:
    """Return them as uint8 (N, 32, 32, 3)."""
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in images])


def _write_cifar(folder: Path, key: str, batches: Mapping[str, Any], meta: tuple[str, str, list[str]]) -> None:
    folder.mkdir()
    for file, (images, labels) in batches.items():
        rows = _thumbnails(images).transpose(0, 3, 1, 2).reshape(len(labels), -1) if images else None
        data = np.zeros((0, 3072), dtype=np.uint8) if rows is None else np.ascontiguousarray(rows)
        (folder / file).write_bytes(pickle.dumps({"data": data, key: labels}))
    (folder / meta[0]).write_bytes(pickle.dumps({meta[1]: meta[2]}))


def _write_cifar10(folder: Path, names: list[str], labels: _Labels, images: _Drawings) -> None:
    batches: dict[str, Any] = {"test_batch": (images["test"], labels["test"])}
    bounds = np.linspace(0, len(labels["train"]), 6).astype(int).tolist()  # five files
    for number, (start, stop) in enumerate(itertools.pairwise(bounds), 1):
        batches[f"data_batch_{number}"] = (images["train"][start:stop], labels["train"][start:stop])
    _write_cifar(folder / "cifar-10-batches-py", "labels", batches, ("batches.meta", "label_names", names))


def _write_cifar100(folder: Path, names: list[str], labels: _Labels, images: _Drawings) -> None:
    batches = {split: (images[split], labels[split]) for split in labels}
    _write_cifar(folder / "cifar-100-python", "fine_labels", batches, ("meta", "fine_label_names", names))


def _write_svhn(folder: Path, names: list[str], labels: _Labels, images: _Drawings) -> None:
    for split in labels:
        digits = np.array([[label or 10 for label in labels[split]]], dtype=np.uint8).T  # 10 stands for the digit 0
        pixels = np.ascontiguousarray(_thumbnails(images[split]).transpose(1, 2, 3, 0))
        savemat(folder / f"{split}_32x32.mat", {"X": pixels, "y": digits})


def _write_dtd(folder: Path, names: list[str], labels: _Labels, images: _Drawings) -> None:
    (folder / "dtd" / "dtd" / "labels").mkdir(parents=True)
    for split in labels:
        paths = [f"{names[label]}/{names[label]}_{split}{n:04d}.jpg" for n, label in enumerate(labels[split])]
        _save_all(folder / "dtd" / "dtd" / "images", paths, images[split])
        _write(folder / "dtd" / "dtd" / "labels" / f"{split}1.txt", "".join(f"{path}\n" for path in paths))


def _write_food101(folder: Path, names: list[str], labels: _Labels, images: _Drawings) -> None:
    (folder / "food-101" / "meta").mkdir(parents=True)
    offset = 1000
    for split in labels:
        listed: dict[str, list[str]] = {name: [] for name in names}
        for number, label in enumerate(labels[split], offset):
            listed[names[label]].append(f"{names[label]}/{number}")
        paths = [f"{names[label]}/{number}.jpg" for number, label in enumerate(labels[split], offset)]
        offset += len(paths)
        _save_all(folder / "food-101" / "images", paths, images[split])
        _write(folder / "food-101" / "meta" / f"{split}.json", json.dumps(listed))


def _write_gtsrb(folder: Path, names: list[str], labels: _Labels, images: _Drawings) -> None:
    base = folder / "gtsrb" / "GTSRB"
    if len({*labels["train"]}) < len(names):
        raise UsageError(
            f"torchvision numbers the class folders that it finds: draw at least {len(names)} for training"
        )
    seen = [0] * len(names)
    paths = []
    for label in labels["train"]:
        paths.append(f"{label:05d}/{seen[label] // 3:05d}_{seen[label] % 3:05d}.ppm")  # tracks of three
        seen[label] += 1
    _save_all(base / "Training", paths, images["train"])
    paths = [f"{number:05d}.ppm" for number in range(len(labels["test"]))]
    _save_all(base / "Final_Test" / "Images", paths, images["test"])
    rows = [f"{path};{label}\n" for path, label in zip(paths, labels["test"], strict=True)]
    _write(folder / "gtsrb" / "GT-final_test.csv", "".join(["Filename;ClassId\n", *rows]))


_TORCHVISION_WRITERS: Mapping[str, Callable[[Path, list[str], _Labels, _Drawings], None]] = {
    "CIFAR10": _write_cifar10,
    "CIFAR100": _write_cifar100,
    "DTD": _write_dtd,
    "Food101": _write_food101,
    "GTSRB": _write_gtsrb,
    "SVHN": _write_svhn,
}


def _save_all(folder: Path, paths: list[str], images: list[Pixels]) -> None:
    for path, image in zip(paths, images, strict=True):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)


_DRAWERS: Mapping[str, Callable[[_Drawing], None]] = {
    "split_files": _draw_split_files,
    "json_split": _draw_json_split,
    "torchvision": _draw_torchvision,
}


def draw_image(label: int, classes: int, rng: np.random.Generator, size: int) -> Pixels:
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


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")
