"""Reader: own pictures, a folder of pictures for each class.

Two layouts, told apart by what is there:

- `ROOT/train/<class>/…` and `ROOT/test/<class>/…`, and `ROOT/val/<class>/…` (or `valid`, `validation`) if there is one;
- `ROOT/<class>/…`, which is split: of each class a fifth (at least one picture) for test, a fifth for val, the rest
  for train.

Which picture goes where follows from the SHA-256 of its path below the root, so it is the same on every machine, and a
picture that is added later moves few others. Without a `val` folder, val is a fifth of each class of train.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from svp_bench.cards import SuiteCard, TaskCard
from svp_bench.data.lists import PictureList
from svp_bench.data.locate import ROOT_VARIABLE
from svp_bench.data.reading import reader_options
from svp_bench.data.sources import FilePictures, Source
from svp_bench.errors import CardError, DataError
from svp_bench.plain_yaml import did_you_mean

__all__ = ["open_class_folders"]

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # in any case of letters
_VALS = ("val", "valid", "validation")
_SHARE = 0.2  # of a class, for val and for test
_LISTS = ("train", "val", "trainval", "test")

Classes = Mapping[str, list[str]]  # name of a class → paths below the root, sorted


def open_class_folders(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read own pictures. `root` is their folder; it must be given (or $SVP_BENCH_DATA).

    Files whose names begin with a dot or do not end like a picture's are left out; folders within a class are its own.

    Raises:
        CardError: If the card gives options, or lists by other names than train, val, trainval and test.
        DataError: If there are no class folders, a class has too few pictures, or val or test has a class that train
            lacks.
    """
    reader_options(card, {})
    for name in card.counts:
        if name not in _LISTS:
            raise CardError(f"{card.path}:1: unknown list {name!r}; allowed: {', '.join(_LISTS)}")
    folder = _folder(root)
    parts = _given(folder) if (folder / "train").is_dir() else _split(folder)
    names = tuple(parts["train"])
    parts["trainval"] = {name: sorted([*parts["train"][name], *parts["val"].get(name, [])]) for name in names}
    if not card.as_found and card.classes != len(names):
        raise DataError(
            f"{folder} has {len(names)} classes, it had {card.classes}; leave it as it is while a run is on"
        )
    lists = {name: FilePictures(folder, name, _listed(parts[name], names), str(folder)) for name in _LISTS}
    return Source(str(folder), lists, class_names=names)


def _folder(root: Path | None) -> Path:
    given, source = (root, "--data.root") if root is not None else (os.environ.get(ROOT_VARIABLE), f"${ROOT_VARIABLE}")
    if not given:
        raise DataError("own pictures: where are they? Give their folder with --data.root DIR (DIR/<class>/*.jpg)")
    folder = Path(os.path.abspath(Path(given).expanduser()))
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder ({source}); own pictures lie in DIR/<class>/, or in DIR/train/<class>/")
    return folder


def _given(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Read train, val and test folders; take val from train if there is none."""
    if not (folder / "test").is_dir():
        raise DataError(
            f"{folder} has a folder train and none called test; rename the one to test on, or put all pictures into "
            "class folders side by side, to have them split"
        )
    parts = {"train": _classes(folder, "train"), "test": _classes(folder, "test")}
    vals = [name for name in _VALS if (folder / name).is_dir()]
    if len(vals) > 1:
        raise DataError(f"{folder} has both {vals[0]} and {vals[1]}; keep one of them")
    if vals:
        parts["val"] = _classes(folder, vals[0])
    for part, classes in parts.items():
        for name in classes:
            if name not in parts["train"]:
                hint = did_you_mean(name, parts["train"])
                raise DataError(f"{folder / part}: the class {name!r} is not in {folder / 'train'}{hint}")
    if not vals:
        cut = {name: _fifth(paths, folder / "train" / name, 2) for name, paths in parts["train"].items()}
        parts["val"] = {name: val for name, (val, _) in cut.items()}
        parts["train"] = {name: rest for name, (_, rest) in cut.items()}
    return parts


def _split(folder: Path) -> dict[str, dict[str, list[str]]]:
    """Split class folders."""
    parts: dict[str, dict[str, list[str]]] = {"train": {}, "val": {}, "test": {}}
    for name, paths in _classes(folder, "").items():
        parts["test"][name], rest = _fifth(paths, folder / name, 3)
        count = len(parts["test"][name])
        parts["val"][name], parts["train"][name] = rest[:count], rest[count:]
    return {part: {name: sorted(paths) for name, paths in classes.items()} for part, classes in parts.items()}


def _fifth(paths: list[str], place: Path, least: int) -> tuple[list[str], list[str]]:
    """Return a fifth of a class, at least one, and the rest; both in the order of their digests."""
    if len(paths) < least:
        pictures = "picture" if len(paths) == 1 else "pictures"
        raise DataError(f"{place} has {len(paths)} {pictures}; to be split, a class needs at least {least}")
    ordered = sorted(paths, key=lambda path: hashlib.sha256(path.encode()).digest())
    count = max(1, round(_SHARE * len(paths)))
    return ordered[:count], ordered[count:]


def _classes(folder: Path, part: str) -> dict[str, list[str]]:
    """Return the classes of a folder, by name, each with at least one picture."""
    place = folder / part if part else folder
    names = sorted(entry.name for entry in os.scandir(place) if entry.is_dir() and not entry.name.startswith("."))
    classes = {name: sorted(_pictures(folder, f"{part}/{name}" if part else name)) for name in names}
    if not any(classes.values()):
        raise DataError(
            f"{place} holds no folder with pictures; own pictures lie in DIR/<class>/, or in DIR/train/<class>/ and "
            f"DIR/test/<class>/, as {', '.join(ENDINGS)}"
        )
    for name, paths in classes.items():
        if not paths:
            raise DataError(f"{place / name} holds no picture ({', '.join(ENDINGS)}); take the folder away, or fill it")
    return classes


def _pictures(folder: Path, below: str) -> Iterator[str]:
    """Yield the paths of all pictures in a folder and its folders, relative to `folder`, with forward slashes."""
    for entry in os.scandir(folder / below):
        path = f"{below}/{entry.name}"
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _pictures(folder, path)
        elif entry.name.lower().endswith(ENDINGS):
            try:
                path.encode()
            except UnicodeEncodeError:
                raise DataError(f"{folder}: the name {path!r} is not UTF-8; rename the file") from None
            yield path


def _listed(classes: Classes, names: tuple[str, ...]) -> PictureList:
    paths = [path for name in names for path in classes.get(name, ())]
    labels = [label for label, name in enumerate(names) for _ in classes.get(name, ())]
    return PictureList(tuple(paths), np.asarray(labels, dtype=np.int64))
