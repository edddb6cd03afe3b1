"""Readers: from a task's card to lists of pictures and labels, and the checks that come before any training.

A reader is a function `(card, suite, root) -> Source`, registered by name in `READERS`; the card (or its suite) says
which one reads it. No torch here: `svp-bench data` verbs start at once.
"""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from svp_bench.cards import SuiteCard, TaskCard, load_suite
from svp_bench.data.lists import PictureList, combined_digest, list_digest, read_list
from svp_bench.data.locate import list_file, locate
from svp_bench.data.transforms import to_rgb
from svp_bench.errors import CardError, DataError, unknown_name
from svp_bench.registry import Registry

__all__ = [
    "DRAWN_MARK",
    "READERS",
    "ArrayPictures",
    "DataReport",
    "FilePictures",
    "Note",
    "Pictures",
    "Source",
    "cpu_count",
    "in_threads",
    "inspect",
    "open_digits",
    "open_lists",
    "open_source",
    "reader_options",
]

READERS = Registry("reader")
READERS.add("lists", "svp_bench.data.sources:open_lists", "a folder of picture files and lists of `path label` lines")
READERS.add(
    "json_split",
    "svp_bench.data.readers:open_json_split",
    "train.json, val.json and test.json (path to class id), else the files that the data set itself has",
)
READERS.add("torchvision", "svp_bench.data.readers:open_torchvision", "a data set that torchvision reads")
READERS.add("digits", "svp_bench.data.sources:open_digits", "scikit-learn's handwritten digits, 8 x 8, which it ships")

DRAWN_MARK = "DRAWN.txt"  # lies in task folders that hold drawn pictures, so that no number on them passes for real

Note = Callable[[str], None]
_T = TypeVar("_T")


class Pictures(ABC):
    """The pictures of one list.

    Attributes:
        name: Name of the list, e.g. "train800".
        labels: int64 (N,).
        digest: "sha256:…" of what defines the list.
    """

    name: str
    labels: npt.NDArray[np.int64]
    digest: str

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Return one picture in RGB at its own size.

        Raises:
            DataError: If it cannot be decoded; names it.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Return what names one picture in a message."""

    def verify(self, note: Note | None = None) -> None:
        """Check that all pictures can be read, without decoding them where that is not needed.

        Args:
            note: Called with a line about the progress if it takes long.

        Nothing to do, unless a reader knows of something that can be broken.

        Raises:
            DataError: If any cannot; names the first.
        """
        return


@dataclass(frozen=True)
class Source:
    """A task's data, as its reader found them.

    Attributes:
        origin: Where they are, for messages.
        lists: Name → pictures, for the lists that are there.
        notes: What sets these data apart from what the card means, beyond what their counts and digest show.
        drawn: Are they a drawn stand-in, not the data set?
        variant: "card" or the card's variant that they are, where the reader knows; None leaves it to the counts.
    """

    origin: str
    lists: Mapping[str, Pictures]
    notes: tuple[str, ...] = ()
    drawn: bool = False
    variant: str | None = None

    def get(self, name: str) -> Pictures:
        """Return the pictures of one list.

        Raises:
            DataError: If it is not there.
        """
        try:
            return self.lists[name]
        except KeyError:
            has = ", ".join(self.lists) or "none"
            raise DataError(
                f"{self.origin} has no list {name!r} ({name}.txt); it has: {has}; get the data again, whole"
            ) from None

    @property
    def digest(self) -> str:
        """One "sha256:…" over the digests of all lists: the number that a card pins."""
        return combined_digest({name: pictures.digest for name, pictures in self.lists.items()})


@dataclass(frozen=True)
class DataReport:
    """How the data found compare with the card.

    Attributes:
        variant: "card", the name of the card's variant whose counts they have, or "drawn" for a drawn stand-in.
        status: "as_card" (also for a variant) or "different".
        notes: One line for each difference.
        digest: "sha256:…" over the lists that were named as used: what a record stores, so that a list which a stage
            does not read makes no difference. Over all lists of the card, it is the number that a card pins.
        counts: Name of each list found → its number of pictures.
    """

    variant: str
    status: str
    notes: tuple[str, ...]
    digest: str
    counts: Mapping[str, int]


def open_source(card: TaskCard, root: Path | None = None, *, suite: SuiteCard | None = None) -> Source:
    """Find and read a task's lists; no picture is opened yet.

    Args:
        card: The task's card.
        root: The data root, for readers that have one; see `locate`.
        suite: The card of its suite; looked up by default.

    Raises:
        CardError: If the card's reader or one of its options is unknown.
        DataError: If the data are missing, or a list is malformed.
    """
    kind = card.reader.kind
    if kind not in READERS:
        raise unknown_name("reader", kind, READERS.names(), where=f"{card.path}:1", error=CardError)
    read = READERS.get(kind)
    source: Source = read(card, suite or load_suite(card.suite), root)
    return source


def inspect(card: TaskCard, source: Source, lists: Sequence[str]) -> DataReport:
    """Compare what a reader found with the card, then with each of its variants. Differences are reported, not raised.

    Args:
        card: The task's card.
        source: What its reader returned.
        lists: Names of the lists that will be used; `DataReport.digest` is over these.

    Raises:
        DataError: If a list that will be used is not there.
    """
    digest = combined_digest({name: source.get(name).digest for name in lists})
    counts = {name: len(pictures) for name, pictures in source.lists.items()}
    notes = list(source.notes)
    missing = [name for name in card.counts if name not in counts]
    if missing:
        notes.append(f"{source.origin} lacks {', '.join(missing)} (not needed in this stage)")

    forms = {"card": card.counts, **card.variants}
    possible = forms if source.variant is None else {source.variant: forms[source.variant]}
    meant = forms[source.variant or "card"]
    others = card.variants if source.variant is None else {}
    variant = source.variant or "card"
    for known, expected in possible.items():
        if all(counts[name] == expected[name] for name in counts):
            variant = known
            break
    else:
        for name, count in counts.items():
            if count != meant[name]:
                also = [f"{known} {full[name]}" for known, full in others.items() if full[name] != meant[name]]
                known_as = f" (variant {', '.join(also)})" if also else ""
                says = "the card says" if variant == "card" else f"the card's variant {variant} says"
                notes.append(f"{name} has {count} pictures, {says} {meant[name]}{known_as}")

    # A card pins the digest of its own counts; a variant, or a part of the lists, has another by nature.
    same_lists = variant == "card" and counts == dict(card.counts)
    if same_lists and card.digest is not None and source.digest != card.digest:
        notes.append(f"the digest is {source.digest}, the card says {card.digest}")
    if source.drawn:
        variant = "drawn"
    return DataReport(variant, "different" if notes else "as_card", tuple(notes), digest, counts)


# --- lists of picture files ------------------------------------------------------------------------------------------


def open_lists(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read a folder in the form of `vtab-1k`: `<list>.txt` files beside the pictures that they name.

    Raises:
        CardError: If the card gives options; this reader has none.
        DataError: If no folder is found, or a list is malformed.
    """
    reader_options(card, {})
    folder = locate(card, suite, root)
    Image.init()  # all formats, before threads race for the rarer ones: the loser would not know its file's format
    lists: dict[str, Pictures] = {}
    for name in card.counts:
        path = list_file(folder, name)
        if path.exists():
            lists[name] = FilePictures(folder, name, read_list(path, card.classes, task=card.name))
    drawn = (folder / DRAWN_MARK).exists()
    return Source(str(folder), lists, (f"the pictures in {folder} are drawn, not real",) if drawn else (), drawn)


class FilePictures(Pictures):
    """The pictures of one list file.

    Args:
        folder: The task's folder, which the paths are relative to.
        name: Name of the list.
        pictures: Its lines.
        listing: What lists them, for messages; by default the list's own file.
    """

    def __init__(self, folder: Path, name: str, pictures: PictureList, listing: str | None = None) -> None:
        self.folder = folder
        self.name = name
        self._listing = listing or str(list_file(folder, name))
        self.paths = pictures.paths
        self.labels = pictures.labels
        self.digest = list_digest(name, pictures)

    def where(self, index: int) -> str:
        """Return the path of one picture."""
        return str(self.folder / self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Decode one picture.

        Raises:
            DataError: If its file is missing or cannot be decoded; names it.
        """
        try:
            with Image.open(self.folder / self.paths[index]) as image:
                return to_rgb(image)
        except Exception as error:  # Pillow's decoders raise a dozen kinds for broken files
            raise DataError(f"{self.where(index)}: cannot be decoded ({_reason(error)}); get the file again") from None

    def verify(self, note: Note | None = None) -> None:
        """Check each file: it is there, Pillow knows its header, and the mark at its end is there.

        That finds missing, empty, truncated and foreign files for the price of two small reads. JPEG and PNG files
        without the mark, and all files of other formats, are decoded, and then that decides.

        Raises:
            DataError: If any is missing (all are counted, the first named) or unreadable (likewise).
        """
        problems = in_threads(self._problem, len(self), f"checking the pictures of {self.name}", note)
        found = [(index, problem) for index, problem in enumerate(problems) if problem is not None]
        missing = [index for index, problem in found if problem == _MISSING]
        if missing:
            raise DataError(
                f"{len(missing)} of the {len(self)} pictures of {self._listing} are missing, "
                f"the first is {self.where(missing[0])}{self._other_case(missing[0])}; get the data again, whole"
            )
        if found:
            index, problem = found[0]
            more = f" (and {len(found) - 1} more of {Path(self._listing).name})" if len(found) > 1 else ""
            raise DataError(f"{self.where(index)}: not a readable picture: {problem}{more}; get the file again")

    def _other_case(self, index: int) -> str:
        path = self.folder / self.paths[index]
        other = path.with_suffix(path.suffix.swapcase())
        return f" (there is {other.name}, in other case)" if other != path and other.is_file() else ""

    def _problem(self, index: int) -> str | None:
        try:
            with open(self.folder / self.paths[index], "rb") as file:
                if os.fstat(file.fileno()).st_size == 0:
                    return "an empty file"
                image = Image.open(file)
                if not _is_ended(file, image.format):
                    to_rgb(image)
        except (FileNotFoundError, NotADirectoryError):
            return _MISSING
        except Exception as error:  # Pillow's decoders raise a dozen kinds for broken files
            return _reason(error)
        return None


_MISSING = "missing"
_END_MARKS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


def _is_ended(file: BinaryIO, picture_format: str | None) -> bool:
    mark = _END_MARKS.get(picture_format or "")
    if mark is None:
        return False
    position = file.tell()  # Pillow decodes from where it stopped reading the header
    file.seek(-len(mark), os.SEEK_END)
    ended = file.read() == mark
    file.seek(position)
    return ended


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known picture format"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__


# --- scikit-learn's digits -------------------------------------------------------------------------------------------

_DIGITS_TRAINING = 1000  # of 1,797; the others are the test list
_DIGITS_TRAIN = 800
_DIGITS_FEWEST = 3  # the fewest per class of which a fifth is still one


def open_digits(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read the handwritten digits that scikit-learn ships: 1,797 grey pictures of 8 × 8 pixels, 10 classes.

    Lists, all in file order: `train` the first 800, `val` the next 200, `trainval` both, `test` the last 797. With the
    option `per_class: k`, `trainval` holds the first k of each class among the first 1,000, and the first round(0.8 k)
    of each of these are `train`, the others `val`. `root` is not used.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository (its test part).

    Raises:
        CardError: If an option or list is unknown, `per_class` out of range, or the number of classes wrong.
    """
    option = reader_options(card, {"per_class": int}).get("per_class")
    per_class = None if option is None else int(option)
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    labels = np.asarray(digits.target, dtype=np.int64)
    pixels = np.rint(np.asarray(digits.images) * (255 / 16)).astype(np.uint8)  # 17 grey values, 0..16

    if card.classes != len(digits.target_names):
        raise CardError(
            f"{card.path}:1: the digits have {len(digits.target_names)} classes, the card says {card.classes}"
        )
    first = labels[:_DIGITS_TRAINING]
    if per_class is None:
        train, val = np.arange(_DIGITS_TRAIN), np.arange(_DIGITS_TRAIN, _DIGITS_TRAINING)
    else:
        most = int(np.bincount(first).min())
        if not _DIGITS_FEWEST <= per_class <= most:
            raise CardError(
                f"{card.path}:1: per_class {per_class} is out of range, allowed: {_DIGITS_FEWEST}..{most} "
                f"(of the first {_DIGITS_TRAINING:,} digits, with at least one of each class for val)"
            )
        of_class = [np.flatnonzero(first == digit)[:per_class] for digit in range(card.classes)]
        cut = round(0.8 * per_class)
        train = np.sort(np.concatenate([chosen[:cut] for chosen in of_class]))
        val = np.sort(np.concatenate([chosen[cut:] for chosen in of_class]))
    positions = {
        "train": train,
        "val": val,
        "trainval": np.sort(np.concatenate([train, val])),
        "test": np.arange(_DIGITS_TRAINING, len(labels)),
    }
    unknown = [name for name in card.counts if name not in positions]
    if unknown:
        raise unknown_name(
            "list of the reader 'digits'", unknown[0], positions, where=f"{card.path}:1", error=CardError
        )
    lists = {name: ArrayPictures(name, pixels, labels, positions[name]) for name in card.counts}
    return Source("scikit-learn's digits", lists)


class ArrayPictures(Pictures):
    """Some of the pictures of an array; `where` counts in the whole array.

    Args:
        name: Name of the list.
        pixels: uint8 (N, H, W), grey, or (N, H, W, 3), of the whole array.
        labels: int64 (N,) of the whole array.
        positions: int64, which of them are in the list.
        what: What one is called in a message, before its number.
    """

    def __init__(
        self,
        name: str,
        pixels: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        what: str = "digit",
    ) -> None:
        self.name = name
        self._what = what
        self.labels = labels[positions]
        self._pixels = pixels[positions]
        self._positions = positions
        content = [name.encode(), self._pixels.tobytes(), self.labels.astype("<i8").tobytes()]
        self.digest = "sha256:" + hashlib.sha256(b"\n".join(content)).hexdigest()

    def where(self, index: int) -> str:
        """Return the picture's number in the whole array."""
        return f"{self._what} {self._positions[index]}"

    def load(self, index: int) -> Image.Image:
        """Return one picture."""
        return Image.fromarray(self._pixels[index]).convert("RGB")


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


# --- threads ---------------------------------------------------------------------------------------------------------

_CHUNK = 64
_PATIENCE_S = 5.0  # before the first note about progress, and between two


def cpu_count() -> int:
    """Return the number of cores that this process may use (a container may have fewer than the machine)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def in_threads(work: Callable[[int], _T], count: int, what: str, note: Note | None = None) -> list[_T]:
    """Return [work(0), …, work(count - 1)], computed by a few threads (Pillow decodes outside Python's lock).

    Args:
        work: Called once for each index; its first error (by index) is raised, and what has not begun is dropped.
        count: Number of calls.
        what: The work in words, for notes: "decoding the pictures of train800".
        note: Called with "<what>: 4,096 of 73,728" every few seconds.
    """

    def chunk(start: int) -> list[_T]:
        return [work(index) for index in range(start, min(start + _CHUNK, count))]

    results: list[_T] = []
    last = time.monotonic()
    with ThreadPoolExecutor(max_workers=min(8, cpu_count())) as pool:
        for part in pool.map(chunk, range(0, count, _CHUNK)):  # after an error, map cancels what has not begun
            results += part
            now = time.monotonic()
            if note is not None and now - last >= _PATIENCE_S and len(results) < count:
                last = now
                note(f"{what}: {len(results):,} of {count:,}")
    return results
