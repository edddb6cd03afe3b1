"""Sources: from a task's card to splits of images and labels, with the checks that come before any training.

A reader is a function `(card, suite, root) -> Source`, registered by name in `READERS`; the card (or its suite) names
its reader. It finds the folder (`locate`), reads the entries of each split, and returns their images; `open_source`
checks the splits for leaks, `inspect` compares them with the card. Imports no torch.
"""

from __future__ import annotations

import hashlib
import os
import time
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.core.errors import CardError, DataError, SvpBenchError, plural, printable, unknown_name
from svp_bench.core.registry import Registry
from svp_bench.data.decode import Decoded, Depth, UnreadableImageError, convert, read_image
from svp_bench.data.inspection import MISSING, Examined, load_examined, save_examined
from svp_bench.data.locate import locate
from svp_bench.data.manifest import MANIFEST, read_manifest
from svp_bench.data.reading import SYNTHETIC_MARK, NoOptions, Positions, is_synthetic, reader_options
from svp_bench.data.split_files import ImageList, combined_digest, read_list, split_digest
from svp_bench.tasks.cards import (
    OTHER_PIXELS,
    ProtocolCard,
    SuiteCard,
    TaskCard,
    load_protocol,
    load_suite,
    load_task,
)

READERS = Registry("reader")
for _name, _target in (
    ("split_files", "sources:open_split_files"),  # text files of `path label` lines
    ("json_split", "json_split:open_json_split"),  # train.json, val.json and test.json, else the data set's own files
    ("torchvision", "torchvision_sets:open_torchvision"),
    ("digits", "digits:open_digits"),
    ("class_folders", "class_folders:open_class_folders"),
    ("synthetic", "synthetic_tasks:open_synthetic"),
):
    READERS.add(_name, f"svp_bench.data.{_target}")

Note = Callable[[str], None]
Keep = Callable[[int, Decoded], None]
_WORTH_CACHING = 1000  # images of an array, which take no decoding
_NAMED = 20  # unreadable images in a message
_T = TypeVar("_T")


# --- images ----------------------------------------------------------------------------------------------------------


class Images(ABC):
    """The images of one split.

    Attributes:
        name: Name of the split, e.g. "train800".
        labels: int64 (N,).
        digest: "sha256:…" of what defines the split.
        listing: The file or description that lists the images, for messages.
        depth: Bits that deep images use; None until all images of the data set were examined.
    """

    name: str
    labels: npt.NDArray[np.int64]
    digest: str
    listing: str
    depth: Depth | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def keys(self) -> Sequence[str]:
        """Return a key of each image that is unique in its source, in any split: its path or number."""
        return [self.where(index) for index in range(len(self))]

    @abstractmethod
    def load(self, index: int) -> Image.Image:
        """Return one image in RGB at its own size.

        Raises:
            DataError: If it cannot be decoded; names it.
        """

    @abstractmethod
    def where(self, index: int) -> str:
        """Return the name of one image for messages."""

    def state(self) -> str | None:
        """Return a digest that changes if an image may have changed; None if decoded images are not to be cached."""
        return None

    def examine(self, note: Note | None = None, keep: Keep | None = None) -> Examined:
        """Decode all images once.

        Args:
            note: Called with lines about the progress.
            keep: Called with the position of each image that can be decoded and the image, in several threads.

        Returns:
            The findings.
        """

        def one(index: int) -> Decoded | str:
            found = self._decoded(index)
            if isinstance(found, str):
                return found
            if keep is not None:
                keep(index, found)
            return found.without_pixels()

        return Examined.of(in_threads(one, len(self), f"checking the images of {self.name}", note))

    def _decoded(self, index: int) -> Decoded | str:
        """Return an image, or the reason why it cannot be decoded."""
        try:
            return convert(self.load(index))
        except DataError as error:
            return str(error)

    def hint(self, index: int) -> str:
        """Return the similar file next to a missing image, for the message; "" if there is none."""
        return ""

    def verify(self) -> None:
        """Check that all images can be decoded; DataError if not (`need_readable`)."""
        need_readable([(self, self.examine())])


class FileImages(Images):
    """Images in files below a folder.

    Args:
        folder: The task's folder, which the paths are relative to.
        name: Name of the split.
        images: Paths and labels.
        listing: The file or description that lists them, for messages; by default `<name>.txt` in the folder.
    """

    def __init__(self, folder: Path, name: str, images: ImageList, listing: str | None = None) -> None:
        Image.init()  # all formats, before threads race for the rarer ones: the loser would not know its file's format
        self.folder = folder
        self.name = name
        self.listing = listing or str(folder / f"{name}.txt")
        self.paths = images.paths
        self.labels = images.labels
        self.digest = split_digest(name, images)

    def keys(self) -> Sequence[str]:
        """Return the paths, which have one spelling each."""
        return self.paths

    def where(self, index: int) -> str:
        """Return the path of one image."""
        return str(self.folder / self.paths[index])

    def load(self, index: int) -> Image.Image:
        """Decode one image; DataError if its file is missing or cannot be decoded."""
        try:
            return read_image(self.folder / self.paths[index], self.depth).image
        except (OSError, UnreadableImageError) as error:
            reason = getattr(error, "strerror", None) or error
            raise DataError(f"{self.where(index)}: cannot be decoded ({reason}); get the file again") from None

    def examine(self, note: Note | None = None, keep: Keep | None = None) -> Examined:
        """Decode all images once. The findings are cached until a file has another size or time (see `state`)."""
        key = self.state()
        if key is not None and keep is None and (known := load_examined(key)) is not None:
            return known
        found = super().examine(note, keep)
        if key is not None and not found.problems and self.state() == key:  # else a file changed meanwhile
            save_examined(key, found)
        return found

    def state(self) -> str | None:
        """Return a digest of path, size, and times of the content and of any change; None if a file is missing."""
        folder = os.path.abspath(self.folder)
        sha = hashlib.sha256(folder.encode(errors="surrogateescape"))
        for path in self.paths:
            try:
                status = os.stat(f"{folder}/{path}")
            except OSError:
                return None
            sha.update(f"{path} {status.st_size} {status.st_mtime_ns} {status.st_ctime_ns}\n".encode())
        return sha.hexdigest()

    def _decoded(self, index: int) -> Decoded | str:
        try:
            return read_image(self.folder / self.paths[index])
        except (FileNotFoundError, NotADirectoryError):
            return MISSING
        except UnreadableImageError as error:
            return str(error)

    def hint(self, index: int) -> str:
        """Return the file next to a missing image whose name differs in case, or in how accents are spelled."""
        path = self.paths[index]
        head, dot, suffix = path.rpartition(".")
        others = {f"{head}{dot}{suffix.swapcase()}": "in other case"}
        others |= {unicodedata.normalize(form, path): f"with accents as Unicode {form}" for form in ("NFC", "NFD")}
        found = [(name, how) for name, how in others.items() if name != path and (self.folder / name).is_file()]
        return f" (there is {Path(found[0][0]).name}, {found[0][1]})" if found else ""


class ArrayImages(Images):
    """Some of the images of an array; `where` counts in the whole array.

    Args:
        name: Name of the split.
        pixels: uint8 (N, H, W), grey, or (N, H, W, 3), of the whole array.
        labels: int64 (N,) of the whole array.
        positions: int64, those in the split.
        what: The name of an image in messages, before its number.
    """

    def __init__(
        self,
        name: str,
        pixels: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int64],
        positions: Positions,
        what: str = "digit",
    ) -> None:
        self.name = name
        self.listing = f"the split {name!r}"
        self._what = what
        self.labels = labels[positions]
        self._pixels = pixels[positions]
        self._positions = positions
        content = [name.encode(), self._pixels.tobytes(), self.labels.astype("<i8").tobytes()]
        self.digest = "sha256:" + hashlib.sha256(b"\n".join(content)).hexdigest()

    def where(self, index: int) -> str:
        """Return the image's number in the whole array."""
        return f"{self._what} {self._positions[index]}"

    def state(self) -> str | None:
        """Return the digest of a large array; None for a small one, which is quickly resized."""
        return self.digest if len(self) >= _WORTH_CACHING else None

    def load(self, index: int) -> Image.Image:
        """Return one image."""
        return Image.fromarray(self._pixels[index]).convert("RGB")


def array_splits(
    card: TaskCard,
    pixels: npt.NDArray[np.uint8],
    labels: npt.NDArray[np.int64],
    positions: Mapping[str, Positions],
    what: str,
) -> dict[str, Images]:
    """Return the splits of a card as images of one array (see `ArrayImages`)."""
    return {name: ArrayImages(name, pixels, labels, positions[name], what) for name in card.counts}


def need_readable(examined: Sequence[tuple[Images, Examined]]) -> None:
    """Refuse splits with images that are missing or cannot be decoded.

    Raises:
        DataError: Names the first twenty of them, and how many more there are.
    """
    missing: list[str] = []
    broken: dict[str, None] = {}  # a file may be in several splits
    for images, found in examined:
        gone = [index for index, reason in found.problems if reason == MISSING]
        if gone:
            names = [f"{images.where(index)}{images.hint(index)}" for index in gone[:_NAMED]]
            missing.append(
                f"{len(gone)} of the {len(images)} images of {images.listing} are missing, "
                f"the first is {_first_of(names, len(gone))}"
            )
        for index, reason in found.problems:
            if reason != MISSING:
                broken[f"{images.where(index)}: not a readable image: {reason}"] = None
    shown = _first_of([*broken][:_NAMED], len(broken))
    if missing:
        raise DataError(f"{'; '.join(missing)}{f'; and {shown}' if broken else ''}; get the data again, whole")
    if broken:
        raise DataError(f"{shown}; get the {'file' if len(broken) == 1 else 'files'} again")


def _first_of(names: Sequence[str], total: int) -> str:
    return "; ".join(names) + (f" (and {total - len(names)} more)" if total > len(names) else "")


# --- sources ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A task's data, as its reader found them.

    Attributes:
        origin: Their place, for messages.
        splits: Name → images, for the splits that exist.
        notes: Differences from the card beyond counts and digest.
        synthetic: Whether the images are synthetic, not the data set's.
        variant: "card" or the card's variant that they are, where the reader knows, or the variant that the manifest
            states (`OTHER_PIXELS`); None leaves it to the counts.
        class_names: The data's own names of the classes, in the order of the labels; None leaves it to the card.
        skipped: Kind of file that is not an image → such files that lie among the images.
        folder: The data folder, if it may have a manifest.
        manifest_digest: Digest of the set that its manifest states; None without one.
        manifest_content: Split → digest of the decoded pixels that its manifest states.
    """

    origin: str
    splits: Mapping[str, Images]
    notes: tuple[str, ...] = ()
    synthetic: bool = False
    variant: str | None = None
    class_names: tuple[str, ...] | None = None
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    folder: Path | None = None
    manifest_digest: str | None = None
    manifest_content: Mapping[str, str] = field(default_factory=dict)

    def get(self, name: str) -> Images:
        """Return the images of one split; DataError if it is not there."""
        if name in self.splits:
            return self.splits[name]
        has = ", ".join(self.splits) or "none"
        raise DataError(f"{self.origin} has no list {name!r} ({name}.txt); it has: {has}; get the data again, whole")

    @property
    def counts(self) -> dict[str, int]:
        """Split → number of images."""
        return {name: len(images) for name, images in self.splits.items()}

    @property
    def digest(self) -> str:
        """One "sha256:…" over the digests of all splits: the number that a card pins."""
        return combined_digest({name: images.digest for name, images in self.splits.items()})

    def checked(self, stages: Mapping[str, Mapping[str, str]]) -> Source:
        """Refuse splits that leak into each other or contradict each other.

        Args:
            stages: Stage → role → split, as on a protocol card. No image of a test split may be in any other split, nor
                an image of a stage's val in its train.

        Returns:
            The source, with a note for each split that holds an image more than once.

        Raises:
            DataError: If splits leak, or an image has two labels; names the first.
        """
        keys = {name: images.keys() for name, images in self.splits.items()}
        seen: dict[str, tuple[int, str]] = {}
        notes = []
        for name, images in self.splits.items():
            first: dict[str, int] = {}
            again = [key for index, key in enumerate(keys[name]) if first.setdefault(key, index) != index]
            if again:
                where = images.where(first[again[0]])
                notes.append(f"{images.listing} repeats {plural(len(again), 'image')}, the first is {where}")
            for index, (key, label) in enumerate(zip(keys[name], images.labels.tolist(), strict=True)):
                before, other = seen.setdefault(key, (label, name))
                if before != label:
                    elsewhere = "the same list" if other == name else self.splits[other].listing
                    raise DataError(
                        f"{images.listing}: {images.where(index)} has label {label}, in {elsewhere} it has "
                        f"{before}; get the lists again"
                    )
        pairs = [(roles["val"], roles["train"]) for roles in stages.values() if "val" in roles]
        for test in {roles["test"]: None for roles in stages.values() if "test" in roles}:
            pairs += [(test, name) for name in keys if name != test]
        for apart, other in pairs:
            listed = {*keys.get(other, ())}
            if leaked := [index for index, key in enumerate(keys.get(apart, ())) if key in listed]:
                images, into = self.splits[apart], self.splits[other]
                raise DataError(
                    f"{images.listing}: {len(leaked)} of its images are also in {into.listing}, which must not see "
                    f"them; the first is {images.where(leaked[0])}; get the lists again"
                )
        return replace(self, notes=(*self.notes, *notes))

    def described(self, card: TaskCard) -> Source:
        """Return the source with what the manifest of its folder states, if it has one.

        Raises:
            DataError: If the manifest is malformed, or that of a task whose data lie in another folder.
        """
        manifest = read_manifest(self.folder) if self.folder is not None and not self.synthetic else None
        if manifest is None:
            return self
        if manifest.task != card.name and _folder_of(manifest.task) != card.folder:
            raise DataError(
                f"{self.folder}: {MANIFEST} states the task {printable(manifest.task)}, not {card.name}; "
                f"move the folder to its place, or prepare the data again"
            )
        if manifest.variant not in (known := ("card", *card.variants, *OTHER_PIXELS)):
            where = f"{self.folder}: {MANIFEST}"
            raise unknown_name("data variant", manifest.variant, known, where=where, error=DataError)
        variant = self.variant if manifest.variant == "card" else manifest.variant
        return replace(
            self,
            variant=variant,
            manifest_digest=manifest.digest,
            manifest_content=manifest.content if manifest.task == card.name else {},
        )


def _folder_of(task: str) -> str | None:
    """Return the folder of a task: suites that share their data share it. None if there is no such task."""
    try:
        return load_task(task).folder
    except SvpBenchError:
        return None


@dataclass(frozen=True)
class DataReport:
    """Comparison of the data found with the card.

    Attributes:
        variant: "card", the name of the card's variant whose counts they have, the variant that the manifest states, or
            "synthetic" for synthetic data.
        status: "as_card" (also for a variant) or "different".
        notes: One line for each difference.
        digest: "sha256:…" over the splits in use, which a record stores. Over all splits of the card, it is the number
            that a card pins.
        counts: Split → number of images.
        manifest_digest: Digest of the set that the folder's manifest states; None without one.
    """

    variant: str
    status: Literal["as_card", "different"]
    notes: tuple[str, ...]
    digest: str
    counts: Mapping[str, int]
    manifest_digest: str | None = None


def open_source(
    card: TaskCard,
    root: Path | None = None,
    *,
    suite: SuiteCard | None = None,
    protocol: ProtocolCard | None = None,
) -> Source:
    """Find, read and check a task's splits; no image is opened yet.

    Args:
        card: The task's card.
        root: The data root, for readers that have one; see `locate`.
        suite: The card of its suite; looked up by default.
        protocol: Defines which splits must be disjoint; the suite's by default.

    Raises:
        CardError: If the card's reader or one of its options is unknown.
        DataError: If the data are missing, a split is malformed, or splits leak (`Source.checked`).
    """
    kind = card.reader.kind
    if kind not in READERS:
        raise unknown_name("reader", kind, READERS.names(), where=f"{card.path}:1", error=CardError)
    suite = suite or load_suite(card.suite)
    source: Source = READERS.get(kind)(card, suite, root)
    return source.described(card).checked((protocol or load_protocol(suite.protocol)).stages)


def measured(card: TaskCard, root: Path | None = None) -> TaskCard:
    """Return a card whose classes and counts are as found, filled in from the data; any other card as it is.

    Raises:
        CardError: If its reader does not define the classes.
        DataError: If the data are missing or malformed.
    """
    if not card.as_found:
        return card
    source = open_source(card, root)
    if source.class_names is None:
        raise CardError(f"{card.path}:1: the reader {card.reader.kind!r} finds no classes; the card must state them")
    return replace(card, classes=len(source.class_names), counts=source.counts)


def inspect(card: TaskCard, source: Source, lists: Sequence[str]) -> DataReport:
    """Compare the data with the card, then with each of its variants. Differences are reported, not raised.

    Args:
        card: The task's card.
        source: Its data.
        lists: Names of the splits that will be used; `DataReport.digest` is over these.

    Raises:
        DataError: If a split that will be used is not there, or is empty.
    """
    digest = combined_digest({name: source.get(name).digest for name in lists})
    for name in lists:
        if not len(source.get(name)):
            raise DataError(f"{source.origin} has no image for the list {name!r}; get the data again, whole")
    counts, notes = source.counts, [*source.notes]
    if missing := [name for name in card.counts if name not in counts]:
        notes.append(f"{source.origin} lacks {', '.join(missing)} (not needed in this stage)")

    forms = {"card": card.counts, **card.variants}
    possible = [source.variant] if source.variant in forms else [*forms]
    variant = next((form for form in possible if counts.items() <= forms[form].items()), None)
    if variant is None:
        variant = possible[0]
        stated = "the card states" if variant == "card" else f"the card's variant {variant} states"
        for name, count in counts.items():
            if count != (meant := forms[variant][name]):
                also = [f"{form} {forms[form][name]}" for form in possible[1:] if forms[form][name] != meant]
                known_as = f" (variant {', '.join(also)})" if also else ""
                notes.append(f"{name} has {plural(count, 'image')}, {stated} {meant}{known_as}")

    # A card pins the digest of its own counts; a variant, or a part of the splits, has another by nature.
    other_pixels = source.variant in OTHER_PIXELS
    same_lists = variant == "card" and not other_pixels and counts == dict(card.counts)
    if same_lists and card.digest is not None and source.digest != card.digest:
        notes.append(f"the digest is {source.digest}, the card states {card.digest}")
    variant = "synthetic" if source.synthetic else str(source.variant) if other_pixels else variant
    status: Literal["as_card", "different"] = "different" if notes else "as_card"
    return DataReport(variant, status, tuple(notes), digest, counts, source.manifest_digest)


# --- the reader of split files ---------------------------------------------------------------------------------------


def open_split_files(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read a folder in the form of `vtab-1k`: `<split>.txt` files next to the images that they name.

    Raises:
        CardError: If the card gives options; this reader has none.
        DataError: If no folder is found, or a split file is malformed.
    """
    reader_options(card, NoOptions, card.counts)
    return read_split_files(card, locate(card, suite, root))


def read_split_files(card: TaskCard, folder: Path) -> Source:
    """Return the splits of a task from the split files that its folder has."""
    files = {name: folder / f"{name}.txt" for name in card.counts}
    splits = {
        name: FileImages(folder, name, read_list(path, card.classes, task=card.name))
        for name, path in files.items()
        if path.exists()
    }
    synthetic = is_synthetic(folder)
    if synthetic and not splits:
        mark = folder / SYNTHETIC_MARK
        raise DataError(
            f"{mark} marks synthetic images, and there are no split files; draw them again with `svp-bench data draw "
            f"{card.name}` into another folder, or delete the mark if the data are real"
        )
    notes = (f"the images in {folder} are synthetic, not real",) if synthetic else ()
    return Source(str(folder), splits, notes, synthetic, folder=folder)


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
        what: The work in words, for notes: "decoding the images of train800".
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
