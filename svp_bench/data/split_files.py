"""List files: one image a line, `<path relative to the task's folder><blanks><integer label>`, no header.

This is the form of the community's `vtab-1k` folders (written by NOAH's get_vtab1k.py). Released loaders split a line
at its first blank, or want exactly two fields; here the label is the last field, so that paths may hold blanks.
"""

from __future__ import annotations

import hashlib
import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import numpy.typing as npt

from svp_bench.core.atomic import read_regular
from svp_bench.core.errors import DataError, plural

__all__ = ["MAX_SPLIT_BYTES", "ImageList", "combined_digest", "plain_path", "read_list", "split_digest"]

MAX_SPLIT_BYTES = 256 * 2**20  # of a file that lists the images of a split: some ten million lines
# Label of at most 18 digits: fits int64, and keeps `int` away from texts that it refuses for their length.
_LINE = re.compile(r"(?P<path>.*[^ \t])[ \t]+(?P<label>-?[0-9]{1,18})")
_SHOW = reprlib.Repr()
_SHOW.maxstring = 80
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True)
class ImageList:
    """The lines of one list, in file order.

    Attributes:
        paths: Paths relative to the task's folder, in their plain spelling: no "./", no "//".
        labels: int64 (N,), each in 0..classes-1.
    """

    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


def read_list(path: Path, classes: int, *, task: str | None = None) -> ImageList:
    """Read one list file.

    A byte-order mark, CRLF line ends and blank lines are fine; everything else that is not a path and a label stops.

    Args:
        path: The list file.
        classes: Number of classes; labels run from 0 to classes - 1.
        task: Name of the task for messages, e.g. "vtab/caltech101".

    Raises:
        DataError: If the file is missing, unreadable, not UTF-8 or empty, a line is malformed, a path leaves the
            folder, or a label is out of range. The text begins with "file:line:" where there is a line.
    """
    try:
        raw = read_regular(path, MAX_SPLIT_BYTES)
    except OSError as error:
        raise DataError(f"{path}: the list cannot be read ({error.strerror})") from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; a list holds lines `path label`, saved as UTF-8") from None

    paths: list[str] = []
    labels: list[int] = []
    for number, full_line in enumerate(text.split("\n"), 1):
        entry = full_line.removesuffix("\r").strip(" \t")
        if not entry:
            continue
        image, label = _parse(entry, f"{path}:{number}")
        if not 0 <= label < classes:
            has = (
                f"the card of {task} has {plural(classes, 'class')} (0..{classes - 1})"
                if task
                else f"allowed: 0..{classes - 1}"
            )
            raise DataError(f"{path}:{number}: label {label} is out of range, {has}")
        paths.append(image)
        labels.append(label)
    if not paths:
        raise DataError(
            f"{path}: the list is empty; expected lines `path label`, e.g. `images/{path.stem}/000000.jpg 0`"
        )
    return ImageList(tuple(paths), np.array(labels, dtype=np.int64))


def _parse(entry: str, where: str) -> tuple[str, int]:
    match = _LINE.fullmatch(entry)
    if match is None or _CONTROL.search(entry):
        raise DataError(
            f"{where}: found {_SHOW.repr(entry)}, expected `path label`: a relative path, blanks, an integer label"
        )
    return plain_path(match["path"], where), int(match["label"])


def plain_path(image: str, where: str) -> str:
    """Return the one spelling of a listed path: "./a//b.jpg" and "a/b.jpg" are the same image.

    Args:
        image: The path as listed.
        where: What lists it, for the message: "file:line".

    Raises:
        DataError: If it names no file, is not relative, leaves the folder that it is relative to, or holds what no
            file name should: control characters, or half of a surrogate pair.
    """
    if _CONTROL.search(image):
        raise DataError(f"{where}: {_SHOW.repr(image)} holds control characters")
    try:
        image.encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: {_SHOW.repr(image)} is not Unicode text (half of a surrogate pair)") from None
    posix, windows = PurePosixPath(image), PureWindowsPath(image)  # a list may have been written on either
    if posix.is_absolute() or windows.root or windows.drive:
        raise DataError(f"{where}: {_SHOW.repr(image)} is an absolute path; paths are relative to the task's folder")
    if ".." in (*posix.parts, *windows.parts):
        raise DataError(f"{where}: {_SHOW.repr(image)} leads out of the task's folder; '..' is not allowed")
    if not posix.name:
        raise DataError(f"{where}: {_SHOW.repr(image)} names no image")
    return str(posix)


def split_digest(name: str, images: ImageList) -> str:
    """Return "sha256:…" over the list's name and its lines, each normalised to `path label`.

    Line ends, blank lines, a byte-order mark and the kind and number of blanks before the label do not change it.
    """
    lines = [f"{path} {label}\n" for path, label in zip(images.paths, images.labels.tolist(), strict=True)]
    return "sha256:" + hashlib.sha256("".join([f"{name}\n", *lines]).encode()).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return one "sha256:…" over the digests of several lists, in the order of their names."""
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
