"""Reader: custom images, a folder of images for each class.

Two layouts:

- `ROOT/train/<class>/…` and `ROOT/test/<class>/…`, and `ROOT/val/<class>/…` if there is one (in any case of letters;
  also `training`, `testing`, `valid`, `validation`). Without a `val` folder, val is a fifth of each class of train;
- `ROOT/<class>/…`, which is split: of each class a fifth (at least one image) for test, a fifth for val, the rest
  for train.

The split follows from the SHA-256 of each image's path below the root, so it is the same on every machine, and an
image that is added later moves few others. The digest of a split is over contents and labels, not names, and an image
that is there twice, under any names, is refused: it could be trained on and tested on.

Images are identified by content (`svp_bench.data.decode.FORMATS`). Other files are skipped, counted and named; a file
whose name ends like an image's but is not one is a broken image, and stops a run. Names of classes are compared as
Unicode NFC: one class may be spelled in two ways in train and test.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from svp_bench.core.atomic import open_regular
from svp_bench.core.errors import DataError, plural, printable, unknown_name
from svp_bench.data.decode import identify
from svp_bench.data.locate import ROOT_VARIABLE, MissingDataError, data_root
from svp_bench.data.reading import NoOptions, readable, reader_options
from svp_bench.data.sources import FileImages, Source, in_threads
from svp_bench.data.split_files import ImageList
from svp_bench.tasks.cards import SuiteCard, TaskCard

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # in any case of letters
# Raw photos and documents whose content passes for TIFF: what Pillow would read of them is a small preview.
_NOT_READ = (".arw", ".cr2", ".dng", ".nef", ".orf", ".pef", ".rw2", ".svs", ".ndpi", ".psd")
_PARTS = {
    name: part
    for part, names in (("train", "train training"), ("val", "val valid validation"), ("test", "test testing"))
    for name in names.split()
}
_SHARE = 0.2  # of a class, for val and for test
_SPLITS = ("train", "val", "trainval", "test")
_LAYOUTS = "own images lie in DIR/<class>/, or in DIR/train/<class>/ and DIR/test/<class>/"

Classes = dict[str, list[str]]  # name of a class → paths below the root, sorted
Skipped = dict[str, list[str]]  # kind of a file that is not an image → paths below the root


def open_class_folders(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read custom images. `root` is their folder; it must be given (or $SVP_BENCH_DATA).

    Files that are not images are skipped and listed in `Source.skipped`; folders within a class belong to it.

    Raises:
        CardError: If the card gives options, or splits by other names than train, val, trainval and test.
        DataError: If there are no class folders or only one, a class has too few images, val or test has a class that
            train lacks, an image is there twice, a file is of a format that is not read, or a folder cannot be.
    """
    reader_options(card, NoOptions, _SPLITS)
    if root is None and not os.environ.get(ROOT_VARIABLE):
        raise MissingDataError("own images: where are they? Give their folder with --data.root DIR (DIR/<class>/*.jpg)")
    folder, origin = data_root(root)
    if not folder.is_dir():
        raise MissingDataError(f"{folder} is not a folder ({origin}); {_LAYOUTS}", [folder])
    kinds: Skipped = {}
    parts = _parts(folder, kinds)
    names = tuple(parts["train"])
    if len(names) < 2:
        raise DataError(
            f"{folder} holds one class only, {names[0]!r}; a folder for each class is needed (one level too high?)"
        )
    parts["trainval"] = {name: sorted([*parts["train"][name], *parts["val"].get(name, [])]) for name in names}
    if not card.as_found and card.classes != len(names):
        raise DataError(
            f"{folder} has {plural(len(names), 'class')} now, it had {card.classes}; do not change it during a run"
        )
    paths = sorted(path for name in ("trainval", "test") for of in parts[name].values() for path in of)
    contents = _contents(folder, paths)
    splits = {name: _ContentImages(folder, name, _listed(parts[name], names), contents) for name in _SPLITS}
    skipped = {kind: tuple(sorted(found)) for kind, found in sorted(kinds.items())}
    return Source(str(folder), splits, class_names=names, skipped=skipped)


class _ContentImages(FileImages):
    """Images whose split has a digest over contents; `contents` is path → SHA-256 of the file, for all splits."""

    def __init__(self, folder: Path, name: str, images: ImageList, contents: Mapping[str, str]) -> None:
        super().__init__(folder, name, images, str(folder))
        lines = [name, *(f"{contents[p]} {label}" for p, label in zip(images.paths, images.labels, strict=True))]
        self.digest = "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _listed(classes: Classes, names: Sequence[str]) -> ImageList:
    entries = [(path, label) for label, name in enumerate(names) for path in classes.get(name, ())]
    return ImageList(tuple(path for path, _ in entries), np.array([label for _, label in entries], dtype=np.int64))


def _divide(paths: list[str], place: Path, held: int) -> list[list[str]]:
    """Return a fifth of a class, at least one image, `held` times, and the rest, in the order of their digests."""
    if len(paths) <= held:
        raise DataError(f"{place} has {plural(len(paths), 'image')}; to be split, a class needs at least {held + 1}")

    def digest(path: str) -> bytes:  # file systems spell accents in two ways
        return hashlib.sha256(unicodedata.normalize("NFC", path).encode()).digest()

    ordered, count = sorted(paths, key=digest), max(1, round(_SHARE * len(paths)))
    parts = [ordered[number * count : (number + 1) * count] for number in range(held)]
    return [sorted(part) for part in (*parts, ordered[held * count :])]


# --- folders and files -----------------------------------------------------------------------------------------------


def _parts(root: Path, skipped: Skipped) -> dict[str, Classes]:
    """Return the classes of train, val and test."""
    given: dict[str, str] = {}  # part → name of its folder
    for name in _folders(root):
        part = _PARTS.get(name.lower())
        if part is None or not _folders(root / name):  # a class may be called "train" too
            continue
        if part in given:
            raise DataError(f"{root} has both {given[part]} and {name}; keep one of them")
        given[part] = name
    parts: dict[str, Classes] = {"train": {}, "val": {}, "test": {}}
    if not given:
        for name, paths in _classes(root, "", skipped).items():
            parts["test"][name], parts["val"][name], parts["train"][name] = _divide(paths, root / name, 2)
        return parts
    if lacking := [part for part in ("train", "test") if part not in given]:
        raise DataError(
            f"{root} has {', '.join(given.values())} and no folder called {lacking[0]}; add one, or put all images "
            "into class folders side by side, to have them split"
        )
    parts |= {part: _classes(root, name, skipped) for part, name in given.items()}
    train = root / given["train"]
    for part in given:
        for name in parts[part]:
            if name not in parts["train"]:
                where = str(root / given[part])
                raise unknown_name(f"class (not in {train})", name, parts["train"], where=where, error=DataError)
    if "val" not in given:
        for name, paths in parts["train"].items():
            parts["val"][name], parts["train"][name] = _divide(paths, train / name, 1)
    return parts


def _folders(place: Path) -> list[str]:
    with readable(place), os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _classes(root: Path, part: str, skipped: Skipped) -> Classes:
    """Return the classes of a folder, by name (NFC), each with at least one image."""
    place = root / part
    classes: Classes = {}
    spelled: dict[str, str] = {}
    for name in _folders(place):
        shown = unicodedata.normalize("NFC", name)
        before = spelled.setdefault(shown.casefold(), name)
        if before != name:
            raise DataError(
                f"{place} has two folders whose names differ only in case or in how accents are spelled: "
                f"{before!a} and {name!a}; rename one, or put both into one"
            )
        classes[shown] = sorted(_images(root, f"{part}/{name}" if part else name, (), skipped))
    empty = [name for name, paths in classes.items() if not paths]
    if empty or not classes:
        kinds = ", ".join(f"{len(paths)} {kind}" for kind, paths in sorted(skipped.items()))
        found = f"({', '.join(ENDINGS)}){f' (skipped: {kinds})' if kinds else ''}"
        if len(empty) == len(classes):
            raise DataError(f"{place} holds no folder with images {found}; {_LAYOUTS}")
        raise DataError(f"{place / empty[0]} holds no image {found}; take the folder away, or fill it")
    return dict(sorted(classes.items()))


def _images(root: Path, below: str, above: tuple[str, ...], skipped: Skipped) -> Iterator[str]:
    """Yield the paths of all images in a folder and its folders, relative to the root, with forward slashes."""
    place = root / below
    real = os.path.realpath(place)
    if real in above or len(above) > 50:
        raise DataError(f"{place}: this link leads back to a folder that it is in; take it away")
    with readable(place), os.scandir(place) as entries:
        found = sorted((entry.name, entry.is_dir()) for entry in entries)
    for name, is_folder in found:
        path = f"{below}/{name}"
        if is_folder:
            yield from () if name.startswith(".") else _images(root, path, (*above, real), skipped)
        elif kind := other_kind(root / path):
            skipped.setdefault(kind, []).append(path)
        elif path.encode(errors="replace").decode() == path:
            yield path
        else:
            encoding = sys.getfilesystemencoding()
            raise DataError(f"{root}: the name {path!r} is not {encoding}; rename the file, or set PYTHONUTF8=1")


def other_kind(path: Path) -> str | None:
    """Return the kind of a file that is not an image, e.g. ".svg"; None for an image.

    A file with the ending of an image counts as one, whether or not it can be decoded.

    Raises:
        DataError: If it cannot be opened.
    """
    if path.name.startswith("."):
        return "hidden file"
    ending = path.suffix.lower()
    with readable(path):
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            return "not a regular file"
        is_image = ending in ENDINGS or (
            ending not in _NOT_READ and _format(str(path), status.st_size, status.st_mtime_ns) is not None
        )
    return None if is_image else printable(ending)[:12] or "no ending"


@lru_cache(maxsize=200_000)
def _format(place: str, size: int, modified: int) -> str | None:
    return identify(place)


def _contents(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """Return path → SHA-256 of each file; DataError if two are the same, or one cannot be read."""

    def digest(index: int) -> str:
        place = folder / paths[index]
        with readable(place):
            status = place.stat()
            return _digest(str(place), status.st_size, status.st_mtime_ns)

    digests = in_threads(digest, len(paths), "reading the images")
    first: dict[str, str] = {}
    for path, one in zip(paths, digests, strict=True):
        other = first.setdefault(one, path)
        if other != path:
            raise DataError(f"{folder}: {other} and {path} are the same image; keep one of them")
    return dict(zip(paths, digests, strict=True))


@lru_cache(maxsize=200_000)
def _digest(place: str, size: int, modified: int) -> str:
    """Hash a file; one of the same size and time is not read again."""
    sha = hashlib.sha256()
    with open_regular(place) as file:
        while block := file.read(2**20):
            sha.update(block)
    return sha.hexdigest()
