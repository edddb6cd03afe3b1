"""Readers: from a task's card to lists of pictures and labels, and the checks that come before any training.

A reader is a function `(card, suite, root) -> Source`, registered by name in `READERS`; the card (or its suite) says
which one reads it. What it returns is checked for leaks, whichever it was. No torch here: `svp-bench data` verbs start
at once.
"""

from __future__ import annotations

import hashlib
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from svp_bench.cards import ProtocolCard, SuiteCard, TaskCard, load_protocol, load_suite
from svp_bench.data.lists import PictureList, combined_digest, list_digest, read_list
from svp_bench.data.locate import list_file, locate
from svp_bench.data.reading import DRAWN_MARK, drawn_notes, reader_options
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
    "measured",
    "open_lists",
    "open_source",
]

READERS = Registry("reader")
READERS.add("lists", "svp_bench.data.sources:open_lists", "a folder of picture files and lists of `path label` lines")
READERS.add(
    "json_split",
    "svp_bench.data.json_split:open_json_split",
    "train.json, val.json and test.json (path to class id), else the files that the data set itself has",
)
READERS.add("torchvision", "svp_bench.data.torchvision_sets:open_torchvision", "a data set that torchvision reads")
READERS.add("digits", "svp_bench.data.digits:open_digits", "scikit-learn's handwritten digits, 8 x 8, which it ships")
READERS.add(
    "class_folders",
    "svp_bench.data.class_folders:open_class_folders",
    "own pictures, a folder for each class",
)
READERS.add("drawn", "svp_bench.data.drawn:open_drawn", "pictures drawn anew, the same on every machine")

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

    @property
    def listing(self) -> str:
        """What lists the pictures, for messages: a file, or a description."""
        return f"the list {self.name!r}"

    def keys(self) -> Sequence[str]:
        """Return what tells each picture from all others of its source, whatever the list: its path, its number."""
        return [self.where(index) for index in range(len(self))]

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
        class_names: What the data themselves call the classes, in the order of the labels; None leaves it to the card.
    """

    origin: str
    lists: Mapping[str, Pictures]
    notes: tuple[str, ...] = ()
    drawn: bool = False
    variant: str | None = None
    class_names: tuple[str, ...] | None = None

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

    def checked(self, stages: Mapping[str, Mapping[str, str]]) -> Source:
        """Refuse lists that leak into each other or contradict each other; note pictures that a list repeats.

        Args:
            stages: Stage → role → list, as on a protocol card. No picture of a test list may be in any other list, nor
                a picture of a stage's val in its train.

        Returns:
            The source, with a note for each list that holds a picture more than once.

        Raises:
            DataError: If lists leak, or a picture has two labels; names the first.
        """
        keys = {name: pictures.keys() for name, pictures in self.lists.items()}
        self._need_one_label(keys)
        pairs = [(roles["val"], roles["train"]) for roles in stages.values() if "val" in roles]
        for test in {roles["test"]: None for roles in stages.values() if "test" in roles}:
            pairs += [(test, name) for name in keys if name != test]
        for apart, other in pairs:
            if apart in keys and other in keys:
                self._need_apart(apart, other, keys)
        notes = []
        for name, of in keys.items():
            first: dict[str, int] = {}
            again = [key for index, key in enumerate(of) if first.setdefault(key, index) != index]
            if again:
                where = self.lists[name].where(first[again[0]])
                notes.append(f"{self.lists[name].listing} repeats {len(again)} pictures, the first is {where}")
        return replace(self, notes=(*self.notes, *notes)) if notes else self

    def _need_one_label(self, keys: Mapping[str, Sequence[str]]) -> None:
        seen: dict[str, tuple[int, str]] = {}
        for name, pictures in self.lists.items():
            for index, (key, label) in enumerate(zip(keys[name], pictures.labels.tolist(), strict=True)):
                before, other = seen.setdefault(key, (label, name))
                if before != label:
                    elsewhere = "the same list" if other == name else self.lists[other].listing
                    raise DataError(
                        f"{pictures.listing}: {pictures.where(index)} has label {label}, in {elsewhere} it has "
                        f"{before}; get the lists again"
                    )

    def _need_apart(self, apart: str, other: str, keys: Mapping[str, Sequence[str]]) -> None:
        listed = {*keys[other]}
        leaked = [index for index, key in enumerate(keys[apart]) if key in listed]
        if leaked:
            pictures, into = self.lists[apart], self.lists[other]
            raise DataError(
                f"{pictures.listing}: {len(leaked)} of its pictures are also in {into.listing}, which must not see "
                f"them; the first is {pictures.where(leaked[0])}; get the lists again"
            )


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


def open_source(
    card: TaskCard,
    root: Path | None = None,
    *,
    suite: SuiteCard | None = None,
    protocol: ProtocolCard | None = None,
) -> Source:
    """Find, read and check a task's lists; no picture is opened yet.

    Args:
        card: The task's card.
        root: The data root, for readers that have one; see `locate`.
        suite: The card of its suite; looked up by default.
        protocol: Says which lists must be apart; the suite's by default.

    Raises:
        CardError: If the card's reader or one of its options is unknown.
        DataError: If the data are missing, a list is malformed, or lists leak (`Source.checked`).
    """
    kind = card.reader.kind
    if kind not in READERS:
        raise unknown_name("reader", kind, READERS.names(), where=f"{card.path}:1", error=CardError)
    read = READERS.get(kind)
    suite = suite or load_suite(card.suite)
    source: Source = read(card, suite, root)
    return source.checked((protocol or load_protocol(suite.protocol)).stages)


def measured(card: TaskCard, root: Path | None = None) -> TaskCard:
    """Return a card whose classes and counts are as found, filled in from the data; any other card as it is.

    Raises:
        CardError: If its reader cannot say what the classes are.
        DataError: If the data are missing or malformed.
    """
    if not card.as_found:
        return card
    source = open_source(card, root)
    if source.class_names is None:
        raise CardError(f"{card.path}:1: the reader {card.reader.kind!r} finds no classes; the card must say them")
    counts = {name: len(pictures) for name, pictures in source.lists.items()}
    return replace(card, classes=len(source.class_names), counts=counts)


def inspect(card: TaskCard, source: Source, lists: Sequence[str]) -> DataReport:
    """Compare what a reader found with the card, then with each of its variants. Differences are reported, not raised.

    Args:
        card: The task's card.
        source: What its reader returned.
        lists: Names of the lists that will be used; `DataReport.digest` is over these.

    Raises:
        DataError: If a list that will be used is not there, or is empty.
    """
    digest = combined_digest({name: source.get(name).digest for name in lists})
    for name in lists:
        if not len(source.get(name)):
            raise DataError(f"{source.origin} has no picture for the list {name!r}; get the data again, whole")
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
    notes = drawn_notes(folder)
    return Source(str(folder), lists, notes, drawn=bool(notes))


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

    @property
    def listing(self) -> str:
        """What lists the pictures: the file of the list, unless something else does."""
        return self._listing

    def keys(self) -> Sequence[str]:
        """Return the paths, which have one spelling each."""
        return self.paths

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
