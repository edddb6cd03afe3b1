"""Helpers of the readers: options of the card, splits by position, files that a library reads, checked values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import numpy.typing as npt

from svp_bench.core.atomic import open_regular
from svp_bench.core.errors import CardError, DataError, SvpBenchError, show, unknown_name
from svp_bench.core.validate import convert
from svp_bench.tasks.cards import TaskCard

SYNTHETIC_MARK = "SYNTHETIC.txt"  # in task folders of synthetic images, to mark their numbers
Refit = Literal["train", "trainval"]  # the split that "refit" stands for
Positions = npt.NDArray[np.int64]
_SPLITS = ("train", "val", "trainval", "test", "refit")
_T = TypeVar("_T")


# --- the card --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NoOptions:
    """Options of a reader that has none."""


def reader_options(card: TaskCard, kind: type[_T], splits: Iterable[str] = _SPLITS) -> _T:
    """Return the reader options of a card as an object of the dataclass `kind`.

    Args:
        card: The task's card.
        kind: Has a field for each option.
        splits: The names of splits that the reader knows.

    Raises:
        CardError: If an option or the name of a split is unknown, or a value is not allowed.
    """
    where = f"{card.path}:1: reader {card.reader.kind!r}"
    for name in card.counts:
        if name not in splits:
            raise unknown_name("split", name, splits, where=where, error=CardError)
    return convert(card.reader.options, kind, where, CardError, "reader")


def split_positions(
    train: Positions, val: Positions, test: Positions, refit: Refit = "trainval"
) -> dict[str, Positions]:
    """Return the positions of all splits in the images of a data set; `trainval` is train and val together, sorted."""
    splits = {"train": train, "val": val, "trainval": np.sort(np.concatenate([train, val])), "test": test}
    return {**splits, "refit": splits[refit]}


# --- folders and files -----------------------------------------------------------------------------------------------


def is_synthetic(folder: Path) -> bool:
    """Return whether a task's folder has the mark of synthetic images; these are read as split files."""
    return (folder / SYNTHETIC_MARK).exists()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn an OSError inside into a DataError of one line that names the file or folder."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None


def need_regular(path: Path) -> None:
    """Check that a file which a library will open is a regular one; DataError if not."""
    with readable(path):
        open_regular(path).close()


@contextmanager
def foreign_errors(path: Path, remedy: str = "get the file again") -> Iterator[None]:
    """Turn any error of a library that reads `path` into one line that names it (scipy raises a dozen kinds).

    Only calls of a library belong into it: it would hide a mistake of our own code.
    """
    try:
        yield
    except SvpBenchError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: cannot be read ({type(error).__name__}: {reason}); {remedy}") from None


# --- values ----------------------------------------------------------------------------------------------------------


def whole_numbers(values: Any, what: str) -> npt.NDArray[np.int64]:
    """Return numbers as int64, in one row; none is rounded.

    Raises:
        DataError: If any is not a whole number; the text begins with `what`.
    """
    try:
        array = np.ravel(np.asarray(values))
    except ValueError:  # rows of several lengths
        raise DataError(f"{what} {show(values)}, expected whole numbers") from None
    if not array.size:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind == "f":
        odd = array[~np.isfinite(array) | (array != np.rint(array)) | (np.abs(array) >= 2**53)]
    elif array.dtype.kind in "iu":
        odd = array[array > np.iinfo(np.int64).max] if array.dtype == np.uint64 else array[:0]
    else:
        odd = array[:1]
    if odd.size:
        raise DataError(f"{what} {show(odd[0].item() if hasattr(odd[0], 'item') else odd[0])}, expected whole numbers")
    return array.astype(np.int64)


def joined_names(names: Iterable[str], word: str = "and") -> str:
    """Return "a, b and c"."""
    *some, last = names
    return f"{', '.join(some)} {word} {last}" if some else last
