"""Reader: own images, a folder of images for each class.

Two layouts:

- `ROOT/train/<class>/…` and `ROOT/test/<class>/…`, and `ROOT/val/<class>/…` if there is one (in any case of letters;
  also `training`, `testing`, `valid`, `validation`);
- `ROOT/<class>/…`, which is split: of each class a fifth (at least one image) for test, a fifth for val, the rest
  for train.

Which image goes where follows from the SHA-256 of its path below the root, so it is the same on every machine, and a
image that is added later moves few others. Without a `val` folder, val is a fifth of each class of train.

What tells an image from all others is its content: two data sets with the same names are two, and an image that is
there twice, under any names, is refused: it could be trained on and tested on.

Images are identified by content, not by name (`svp_bench.data.decode.FORMATS`). Other files are skipped, counted
and named; a file whose name ends like an image's and which is none is a broken image, and stops a run.

Names of classes are compared as Unicode NFC: one class may be spelled in two ways in train and test.
"""

from __future__ import annotations

import hashlib
import os
import stat
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import numpy as np

from svp_bench.core.atomic import open_regular
from svp_bench.core.errors import DataError, plural, printable
from svp_bench.core.yaml import did_you_mean
from svp_bench.data.decode import identify
from svp_bench.data.locate import ROOT_VARIABLE
from svp_bench.data.reading import NoOptions, reader_options
from svp_bench.data.sources import FileImages, Source, in_threads
from svp_bench.data.split_files import ImageList
from svp_bench.tasks.cards import SuiteCard, TaskCard

__all__ = ["open_class_folders", "other_kind"]

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")  # in any case of letters
# Raw photos and documents whose content passes for TIFF: what Pillow would read of them is a small preview.
_NOT_READ = (".arw", ".cr2", ".dng", ".nef", ".orf", ".pef", ".rw2", ".svs", ".ndpi", ".psd")
_PARTS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
_SHARE = 0.2  # of a class, for val and for test
_LISTS = ("train", "val", "trainval", "test")
_LAYOUTS = "own images lie in DIR/<class>/, or in DIR/train/<class>/ and DIR/test/<class>/"

Classes = dict[str, list[str]]  # name of a class → paths below the root, sorted
Skipped = dict[str, list[str]]  # kind of file → paths below the root


def open_class_folders(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read own images. `root` is their folder; it must be given (or $SVP_BENCH_DATA).

    Files that are not images are skipped and listed in `Source.skipped`; folders within a class are its own.

    Raises:
        CardError: If the card gives options, or lists by other names than train, val, trainval and test.
        DataError: If there are no class folders or only one, a class has too few images, val or test has a class that
            train lacks, an image is there twice, a file is of a format that is not read, or a folder cannot be.
    """
    reader_options(card, NoOptions, _LISTS)
    folder = _folder(root)
    given = _part_folders(folder)
    skipped: Skipped = {}
    parts = _given(folder, given, skipped) if given else _split(folder, skipped)
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
    lists = {name: _OwnImages(folder, name, _listed(parts[name], names), contents) for name in _LISTS}
    there = {kind: tuple(sorted(found)) for kind, found in sorted(skipped.items())}
    return Source(str(folder), lists, class_names=names, skipped=there)


class _OwnImages(FileImages):
    """Images that their content tells apart.

    Args:
        folder: What the paths are relative to.
        name: Name of the list.
        images: Paths and labels.
        contents: Path → SHA-256 of the file, for all lists.
    """

    def __init__(self, folder: Path, name: str, images: ImageList, contents: Mapping[str, str]) -> None:
        super().__init__(folder, name, images, str(folder))
        lines = [name, *(f"{contents[p]} {label}" for p, label in zip(images.paths, images.labels, strict=True))]
        self.digest = "sha256:" + hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _folder(root: Path | None) -> Path:
    given, source = (root, "--data.root") if root is not None else (os.environ.get(ROOT_VARIABLE), f"${ROOT_VARIABLE}")
    if not given:
        raise DataError("own images: where are they? Give their folder with --data.root DIR (DIR/<class>/*.jpg)")
    folder = Path(os.path.abspath(Path(given).expanduser()))
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder ({source}); {_LAYOUTS}")
    return folder


# --- the two layouts -------------------------------------------------------------------------------------------------


def _part_folders(folder: Path) -> dict[str, str]:
    """Return part → its folder's name, if the root holds parts: folders called so that hold folders (a class may be
    called "train" too).
    """
    found: dict[str, str] = {}
    for name in _folders(folder):
        part = _PARTS.get(name.lower())
        if part is None or not _folders(folder / name):
            continue
        if part in found:
            raise DataError(f"{folder} has both {found[part]} and {name}; keep one of them")
        found[part] = name
    return found


def _given(folder: Path, given: Mapping[str, str], skipped: Skipped) -> dict[str, Classes]:
    """Read train, val and test folders; take val from train if there is none."""
    for part in ("train", "test"):
        if part not in given:
            has = ", ".join(given.values())
            raise DataError(
                f"{folder} has {has} and no folder called {part}; add one, or put all images into class folders side "
                "by side, to have them split"
            )
    parts = {part: _classes(folder, name, skipped) for part, name in given.items()}
    train = folder / given["train"]
    for part, classes in parts.items():
        for name in classes:
            if name not in parts["train"]:
                hint = did_you_mean(name, parts["train"])
                raise DataError(f"{folder / given[part]}: the class {name!r} is not in {train}{hint}")
    if "val" not in parts:
        cut = {name: _fifth(paths, train / name, 2) for name, paths in parts["train"].items()}
        parts["val"] = {name: sorted(val) for name, (val, _) in cut.items()}
        parts["train"] = {name: sorted(rest) for name, (_, rest) in cut.items()}
    return parts


def _split(folder: Path, skipped: Skipped) -> dict[str, Classes]:
    """Split class folders."""
    parts: dict[str, Classes] = {"train": {}, "val": {}, "test": {}}
    for name, paths in _classes(folder, "", skipped).items():
        test, rest = _fifth(paths, folder / name, 3)
        parts["test"][name] = sorted(test)
        parts["val"][name], parts["train"][name] = sorted(rest[: len(test)]), sorted(rest[len(test) :])
    return parts


def _fifth(paths: list[str], place: Path, least: int) -> tuple[list[str], list[str]]:
    """Return a fifth of a class, at least one, and the rest; both in the order of their digests."""
    if len(paths) < least:
        images = "image" if len(paths) == 1 else "images"
        raise DataError(f"{place} has {len(paths)} {images}; to be split, a class needs at least {least}")

    def digest(path: str) -> bytes:  # file systems spell accents in two ways
        return hashlib.sha256(unicodedata.normalize("NFC", path).encode()).digest()

    ordered = sorted(paths, key=digest)
    count = max(1, round(_SHARE * len(paths)))
    return ordered[:count], ordered[count:]


def _listed(classes: Classes, names: Sequence[str]) -> ImageList:
    paths = [path for name in names for path in classes.get(name, ())]
    labels = [label for label, name in enumerate(names) for _ in classes.get(name, ())]
    return ImageList(tuple(paths), np.asarray(labels, dtype=np.int64))


# --- folders and files -----------------------------------------------------------------------------------------------


@contextmanager
def _readable(place: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"{place}: cannot be read ({error.strerror or type(error).__name__})") from None


def _folders(place: Path) -> list[str]:
    with _readable(place), os.scandir(place) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))


def _classes(folder: Path, part: str, skipped: Skipped) -> Classes:
    """Return the classes of a folder, by name (NFC), each with at least one image."""
    place = folder / part if part else folder
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
        classes[shown] = sorted(_images(folder, f"{part}/{name}" if part else name, (), skipped))
    if not any(classes.values()):
        raise DataError(
            f"{place} holds no folder with images{_listed_kinds(skipped)}; {_LAYOUTS}, as {', '.join(ENDINGS)}"
        )
    for name, paths in classes.items():
        if not paths:
            raise DataError(
                f"{place / name} holds no image ({', '.join(ENDINGS)}){_listed_kinds(skipped)}; "
                "take the folder away, or fill it"
            )
    return dict(sorted(classes.items()))


def _listed_kinds(skipped: Skipped) -> str:
    kinds = ", ".join(f"{len(paths)} {kind}" for kind, paths in sorted(skipped.items()))
    return f" (skipped: {kinds})" if kinds else ""


def _images(folder: Path, below: str, above: tuple[str, ...], skipped: Skipped) -> Iterator[str]:
    """Yield the paths of all images in a folder and its folders, relative to `folder`, with forward slashes."""
    place = folder / below
    real = os.path.realpath(place)
    if real in above or len(above) > 50:
        raise DataError(f"{place}: this link leads back to a folder that it is in; take it away")
    with _readable(place), os.scandir(place) as entries:
        found = [(entry.name, entry.is_dir()) for entry in entries]
    for name, is_folder in sorted(found):
        path = f"{below}/{name}"
        if is_folder and name.startswith("."):
            continue
        if is_folder:
            yield from _images(folder, path, (*above, real), skipped)
        elif kind := other_kind(folder / path):
            skipped.setdefault(kind, []).append(path)
        else:
            try:
                path.encode()
            except UnicodeEncodeError:
                encoding = sys.getfilesystemencoding()
                remedy = (
                    "rename the file" if encoding == "utf-8" else f"Python reads names as {encoding}: set PYTHONUTF8=1"
                )
                raise DataError(f"{folder}: the name {path!r} is not {encoding}; {remedy}") from None
            yield path


def other_kind(path: Path) -> str | None:
    """Return what kind of file this is if it is not an image, e.g. ".svg"; None for an image.

    A file with the ending of an image counts as one: whether it can be decoded is seen later.

    Raises:
        DataError: If it cannot be opened.
    """
    if path.name.startswith("."):
        return "hidden file"
    ending = path.suffix.lower()
    with _readable(path):
        status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if ending in ENDINGS:
        return None
    shown = printable(ending)[:12] or "no ending"
    with _readable(path):
        is_image = ending not in _NOT_READ and _format(str(path), status.st_size, status.st_mtime_ns) is not None
    return None if is_image else shown


@lru_cache(maxsize=200_000)
def _format(place: str, size: int, modified: int) -> str | None:
    return identify(place)


def _contents(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """Return path → SHA-256 of each file.

    Raises:
        DataError: If two are the same, or one cannot be read.
    """

    def digest(index: int) -> str:
        place = folder / paths[index]
        with _readable(place):
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
