"""Split files: one image a line, `<path relative to the task's folder><blanks><integer label>`, no header.

This is the form of the community's `vtab-1k` folders (written by NOAH's get_vtab1k.py). The label is the last field, so
paths may hold blanks.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import numpy.typing as npt

from svp_bench.core.atomic import read_regular
from svp_bench.core.errors import DataError, plural, show
from svp_bench.data.reading import readable

MAX_SPLIT_BYTES = 256 * 2**20  # of a file that lists the images of a split: some ten million lines
# Label of at most 18 digits: fits int64, and keeps `int` away from texts that it refuses for their length.
_LINE = re.compile(r"(?P<path>.*[^ \t])[ \t]+(?P<label>-?[0-9]{1,18})")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")


@dataclass(frozen=True)
class ImageList:
    """The images of one split, in the order of their file.

    Attributes:
        paths: Paths relative to the task's folder, in their plain spelling: no "./", no "//".
        labels: int64 (N,), each in 0..classes-1.
    """

    paths: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a UTF-8 text file, without blanks around a line and empty lines.

    Raises:
        DataError: If it cannot be read, or is not UTF-8.
    """
    with readable(path):
        raw = read_regular(path, MAX_SPLIT_BYTES)
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None
    for number, line_of_text in enumerate(text.split("\n"), 1):
        if stripped := line_of_text.strip(" \t\r"):
            yield number, stripped


def read_list(path: Path, classes: int, *, task: str | None = None) -> ImageList:
    """Read one split file; a byte-order mark, CRLF line ends and blank lines are allowed.

    Args:
        path: The file.
        classes: Number of classes; labels run from 0 to classes - 1.
        task: Name of the task for messages, e.g. "vtab/caltech101".

    Raises:
        DataError: If the file is missing, unreadable, not UTF-8 or empty, a line is malformed, a path leaves the
            folder, or a label is out of range. The text begins with "file:line:" where there is a line.
    """
    paths: list[str] = []
    labels: list[int] = []
    for number, line in text_lines(path):
        match = _LINE.fullmatch(line)
        if match is None or _CONTROL.search(line):
            raise DataError(
                f"{path}:{number}: found {show(line)}, expected `path label`: a relative path, blanks, an integer label"
            )
        label = int(match["label"])
        if not 0 <= label < classes:
            has = f"the card of {task} has {plural(classes, 'class')}" if task else "allowed"
            raise DataError(f"{path}:{number}: label {label} is out of range, {has} (0..{classes - 1})")
        paths.append(plain_path(match["path"], f"{path}:{number}"))
        labels.append(label)
    if not paths:
        raise DataError(
            f"{path}: the list is empty; expected lines `path label`, e.g. `images/{path.stem}/000000.jpg 0`"
        )
    return ImageList(tuple(paths), np.array(labels, dtype=np.int64))


def plain_path(image: str, where: str) -> str:
    """Return the one spelling of a listed path: "./a//b.jpg" and "a/b.jpg" are the same image.

    Args:
        image: The path as listed.
        where: The file that lists it, for the message.

    Raises:
        DataError: If it names no file, is not relative, leaves the folder that it is relative to, or holds control
            characters or half of a surrogate pair.
    """

    def refused(reason: str) -> DataError:
        return DataError(f"{where}: {show(image)} {reason}")

    if _CONTROL.search(image):
        raise refused("holds control characters")
    try:
        image.encode()
    except UnicodeEncodeError:
        raise refused("is not Unicode text (half of a surrogate pair)") from None
    posix, windows = PurePosixPath(image), PureWindowsPath(image)  # a list may have been written on either
    if posix.is_absolute() or windows.root or windows.drive:
        raise refused("is an absolute path; paths are relative to the task's folder")
    if ".." in (*posix.parts, *windows.parts):
        raise refused("leads out of the task's folder; '..' is not allowed")
    if not posix.name:
        raise refused("names no image")
    return str(posix)


def split_digest(name: str, images: ImageList) -> str:
    """Return "sha256:…" over the split's name and its lines, each normalised to `path label`."""
    lines = [f"{path} {label}\n" for path, label in zip(images.paths, images.labels.tolist(), strict=True)]
    return "sha256:" + hashlib.sha256("".join([f"{name}\n", *lines]).encode()).hexdigest()


def combined_digest(digests: Mapping[str, str]) -> str:
    """Return one "sha256:…" over the digests of several splits, in the order of their names."""
    text = "".join(f"{name} {digests[name]}\n" for name in sorted(digests))
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
