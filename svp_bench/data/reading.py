"""What the readers share: the card's options, optional packages, folders by their content, checked values."""

from __future__ import annotations

import importlib
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from svp_bench.core.atomic import open_regular, read_regular
from svp_bench.core.errors import CardError, DataError, SvpBenchError, UnavailableError, unknown_name
from svp_bench.data.split_files import MAX_SPLIT_BYTES
from svp_bench.tasks.cards import TaskCard

__all__ = [
    "LISTS",
    "SYNTHETIC_MARK",
    "all_of",
    "any_of",
    "foreign_errors",
    "joined_names",
    "list_names",
    "need_regular",
    "optional_import",
    "reader_options",
    "show",
    "synthetic_notes",
    "text_lines",
    "whole_numbers",
]

SYNTHETIC_MARK = "SYNTHETIC.txt"  # in task folders of synthetic images, to mark their numbers

LISTS = ("train", "val", "trainval", "test", "refit")  # of the readers of published splits
_REFITS = ("train", "trainval")


def optional_import(module: str, package: str, what: str) -> Any:
    """Import a module that not every installation has.

    Args:
        module: Its name.
        package: What to install for it.
        what: What needs it, for the message.

    Raises:
        UnavailableError: If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"{what} needs {package} ({reason}); install it: pip install {package}") from None


# --- the card --------------------------------------------------------------------------------------------------------


def reader_options(card: TaskCard, known: Mapping[str, type]) -> Mapping[str, int | str | float | bool]:
    """Return the card's reader options, checked against the `known` names and types.

    Raises:
        CardError: If one is unknown or of another type.
    """
    reader = card.reader
    for name, value in reader.options.items():
        if name not in known:
            if not known:
                raise CardError(f"{card.path}:1: the reader {reader.kind!r} has no options, the card gives {name!r}")
            raise unknown_name(
                f"option of the reader {reader.kind!r}", name, known, where=f"{card.path}:1", error=CardError
            )
        if type(value) is not known[name]:
            raise CardError(f"{card.path}:1: option {name!r} must be of type {known[name].__name__}, not {value!r}")
    return reader.options


def list_names(card: TaskCard, options: Mapping[str, Any]) -> str:
    """Check the names of a card's lists, which must be of `LISTS`, and its option `refit`; return what that stands for.

    - `train`, `val`, `test`;
    - `trainval`: train and val together;
    - `refit`: the training list of stage final where it is not `trainval` on every card of a suite. The card's option
      `refit` names `train` or `trainval`.

    Raises:
        CardError: If one is unknown, or the option is given without such a list.
    """
    reader = card.reader.kind
    for name in card.counts:
        if name not in LISTS:
            raise unknown_name(f"list of the reader {reader!r}", name, LISTS, where=f"{card.path}:1", error=CardError)
    refit = options.get("refit", "trainval")
    if refit not in _REFITS:
        raise unknown_name("list to refit on", refit, _REFITS, where=f"{card.path}:1", error=CardError)
    if "refit" in options and "refit" not in card.counts:
        raise CardError(f"{card.path}:1: the option 'refit' is given, but counts has no list 'refit'")
    return str(refit)


# --- folders and files -----------------------------------------------------------------------------------------------


def synthetic_notes(folder: Path) -> tuple[str, ...]:
    """Return the note about synthetic images, if the folder has their mark."""
    return (f"the images in {folder} are synthetic, not real",) if (folder / SYNTHETIC_MARK).exists() else ()


def all_of(names: Iterable[str]) -> Callable[[Path], bool]:
    """Return the test whether a folder has all of some files."""
    return lambda place: all((place / name).exists() for name in names)


def any_of(names: Iterable[str]) -> Callable[[Path], bool]:
    """Return the test whether a folder has any of some files."""
    return lambda place: any((place / name).exists() for name in names)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of a text file, blanks around a line and empty lines left out. A byte-order mark is fine.

    Raises:
        DataError: If it cannot be read, or is not UTF-8.
    """
    try:
        text = read_regular(path, MAX_SPLIT_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason})") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, line.strip()


def need_regular(path: Path) -> None:
    """Check that a file which a library will open is an ordinary one.

    Raises:
        DataError: If it cannot be opened, or is a folder, FIFO, socket or device.
    """
    try:
        open_regular(path).close()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


@contextmanager
def foreign_errors(path: Path, remedy: str = "get the file again") -> Iterator[None]:
    """Turn any error of a library that reads `path` into one line that names it (scipy raises a dozen kinds).

    Only a library's own calls belong into it: of our code, such a line would hide a mistake.
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
        DataError: If any is no whole number; the text begins with `what`.
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


def show(value: object) -> str:
    """Return a value for a message, cut short."""
    shown = reprlib.Repr()
    shown.maxstring = 80
    return shown.repr(value)


def joined_names(names: Iterable[str]) -> str:
    """Return "a, b and c"."""
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last
