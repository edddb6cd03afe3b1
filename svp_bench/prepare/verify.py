"""Verify the data of a task: every image, every split, every file; write the manifest that records cite.

Two images whose decoded pixels are equal are the same image. Near-duplicates are found by a perceptual hash and only
reported: whether two are too close is the reader's decision.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from PIL import Image

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.errors import DataError, plural, printable
from svp_bench.data.content import overlap, two_labels
from svp_bench.data.inspection import Examined
from svp_bench.data.locate import data_root
from svp_bench.data.manifest import MANIFEST, SUMS, parse_sums, read_manifest, write_manifest
from svp_bench.data.sources import READERS, Images, Note, Source, in_threads, inspect, need_readable, open_source
from svp_bench.prepare.sources import each_image_once
from svp_bench.prepare.stage import describe
from svp_bench.prepare.verdict import Verdict, now, save_verdict
from svp_bench.tasks.cards import ProtocolCard, SuiteCard, TaskCard, load_protocol

_NAMED = 5  # files or classes in a note
_BLOCK = 4096  # images of a split whose hashes are compared at a time
_MAX_BYTES = 2**28
NEAR = 4
"""Bits of 64 in which the perceptual hashes of two near-duplicates differ, at most."""


def verify(
    card: TaskCard, suite: SuiteCard, root: Path | None = None, *, accept: bool = False, note: Note | None = None
) -> tuple[Verdict, Source]:
    """Decode every image of a task, check its splits, and compare its files with the manifest or write one.

    Args:
        card: The task's card, with its counts (`measured`).
        suite: The card of its suite.
        root: The data root; see `data_root`.
        accept: Replace a manifest that other files belong to.
        note: Called with lines about the progress.

    Returns:
        The verdict, which is also cached for `data status`, and the data.

    Raises:
        DataError: If the data are missing or malformed, or images cannot be decoded; names the first twenty.
    """
    if accept:
        _delete_broken_manifest(READERS.get(card.reader.kind)(card, suite, root).folder)
    source = open_source(card, root, suite=suite)
    report = inspect(card, source, sorted(source.splits))
    found = _examined(source, note)
    notes = [*report.notes, *_split_notes(card, source, found, load_protocol(suite.protocol))]
    status: Literal["verified", "different", "changed"] = "different" if report.status == "different" else "verified"
    digest, folder = None, source.folder
    if folder is not None and not source.synthetic:
        digest, changes, written = _manifest(card, source, report.variant, suite, root, accept)
        notes += written
        if changes:
            status, notes = "changed", [*changes, *notes]
    verdict = Verdict(
        task=card.name,
        status=status,
        notes=tuple(notes),
        counts=report.counts,
        variant=report.variant,
        folder=_place(source),
        manifest_digest=digest,
        time=now(),
        classes=source.class_names or () if card.as_found else (),
    )
    save_verdict(verdict, root)
    return verdict, source


def _delete_broken_manifest(folder: Path | None) -> None:
    if folder is None:
        return
    try:
        read_manifest(folder)
    except DataError:
        (folder / MANIFEST).unlink(missing_ok=True)


def _examined(source: Source, note: Note | None) -> dict[str, Examined]:
    """Decode every image once, without the cache of earlier findings; return split → findings.

    Raises:
        DataError: If images are missing or cannot be decoded.
    """
    once = each_image_once(source)
    found = {images.name: Images.examine(images, note) for images in once}
    need_readable([(images, found[images.name]) for images in once])
    digests = {key: row for images in once for key, row in zip(images.keys(), found[images.name].digests, strict=True)}
    for name, images in source.splits.items():
        if name not in found:
            rows = [*map(digests.__getitem__, images.keys())]
            found[name] = Examined(np.stack(rows) if rows else np.zeros((0, 16), np.uint8), (), {})
    return found


def _split_notes(card: TaskCard, source: Source, found: Mapping[str, Examined], protocol: ProtocolCard) -> list[str]:
    """Return notes about classes without images, and about equal images within and across splits."""
    notes = []
    for name, images in source.splits.items():
        absent = sorted({*range(card.classes)} - {*images.labels.tolist()})
        if absent and len(images) >= card.classes:
            some = ", ".join(map(str, absent[:_NAMED])) + (" …" if len(absent) > _NAMED else "")
            notes.append(f"{name} has no image of {plural(len(absent), 'class')} ({some})")
        again = len(images) - len({*found[name].keys()})
        if again:
            notes.append(f"{name} has {plural(again, 'image')} with the pixels of another of its images")
        if pairs := two_labels((images, found[name])):
            one, other = pairs[0]
            notes.append(
                f"{name} has {plural(len(pairs), 'image')} with the pixels of another and another label, the first is "
                f"{images.where(one)} = {images.where(other)}"
            )
    for held, seen in held_out_pairs(source, protocol):
        count, text = overlap((held, found[held.name]), (seen, found[seen.name]))
        if count:
            notes.append(text)
    return [printable(note) for note in notes]


def held_out_pairs(source: Source, protocol: ProtocolCard) -> list[tuple[Images, Images]]:
    """Return (held-out split, split that must not have its images): test and all others, a stage's val and train."""
    stages = protocol.stages.values()
    tests = {roles["test"] for roles in stages if "test" in roles}
    pairs = [(test, name) for test in sorted(tests) for name in source.splits if name not in tests]
    pairs += [(roles["val"], roles["train"]) for roles in stages if "val" in roles]
    return [(source.splits[a], source.splits[b]) for a, b in pairs if a in source.splits and b in source.splits]


def _place(source: Source) -> str | None:
    """Return the folder that the images lie in; None if the package holds or computes them."""
    folder = source.folder or Path(source.origin)
    return str(folder) if folder.is_dir() else None


# --- the manifest ----------------------------------------------------------------------------------------------------


def _manifest(
    card: TaskCard, source: Source, variant: str, suite: SuiteCard, root: Path | None, accept: bool
) -> tuple[str | None, list[str], list[str]]:
    """Compare the files with the manifest, or write one.

    Returns:
        The digest of the set, the files that differ from the manifest, and remarks.
    """
    folder = source.folder
    assert folder is not None
    base = data_root(root)[0]
    shared = {base, *(base / name for name in (suite.folder, *suite.other_folders))}
    if folder in shared and folder.name not in (card.folder, *card.other_folders):
        return None, [], [f"{folder} holds other data too, so no manifest was written; move these into a folder"]
    before = read_manifest(folder)
    origin: Mapping[str, str] = before.origin if before is not None else {}
    manifest, sums = describe(
        folder,
        card,
        source=before.source if before is not None else "folder",
        variant=before.variant if before is not None else variant,
        origin=origin,
        splits=source.counts,
    )
    if before is not None and before.digest == manifest.digest:
        return before.digest, [], []
    if before is not None and not accept:
        old = parse_sums(read_regular(folder / SUMS, _MAX_BYTES), folder / SUMS)
        return before.digest, _changes(old, parse_sums(sums, folder / SUMS), folder), []
    try:
        with FileLock(folder.parent / f".{folder.name}.lock"):
            write_manifest(folder, manifest, sums)
    except OSError as error:
        return None, [], [f"{folder}: no manifest could be written ({error.strerror or error}); records will cite none"]
    return manifest.digest, [], [] if before is None else ["the manifest was replaced by one of the present files"]


def _changes(old: Mapping[str, str], new: Mapping[str, str], folder: Path) -> list[str]:
    """Return a line each for files that are changed, missing and new."""
    groups = {
        "changed": [path for path in old if path in new and old[path] != new[path]],
        "missing": [path for path in old if path not in new],
        "new": [path for path in new if path not in old],
    }
    return [
        printable(
            f"{plural(len(paths), 'file')} of {folder} {'are' if len(paths) > 1 else 'is'} {kind}: "
            f"{', '.join(paths[:_NAMED])}{' …' if len(paths) > _NAMED else ''}; get the data again, or accept them "
            "with `svp-bench data verify --accept`"
        )
        for kind, paths in groups.items()
        if paths
    ]


# --- near-duplicates -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NearDuplicate:
    """Two images of different splits that look alike.

    Attributes:
        held: Split and name of the image that is held out, and its label.
        seen: The same of the other image.
        distance: Bits of 64 in which their perceptual hashes differ.
    """

    held: tuple[str, str, int]
    seen: tuple[str, str, int]
    distance: int


def perceptual_hash(image: Image.Image) -> npt.NDArray[np.bool_]:
    """Return 64 bits of an image: the signs of its lowest frequencies, without the mean, around their median.

    The image in grey at 32×32 pixels, a discrete cosine transform, the 8×8 lowest frequencies (pHash: Zauner,
    "Implementation and benchmarking of perceptual image hash functions", 2010).
    """
    from scipy.fft import dctn  # type: ignore[import-untyped]  # slow to import

    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.BILINEAR), dtype=np.float32)
    low = dctn(grey, norm="ortho")[:8, :8].ravel()
    bits: npt.NDArray[np.bool_] = low > np.median(low[1:])
    return bits


def near_duplicates(
    source: Source, protocol: ProtocolCard, limit: int = NEAR, note: Note | None = None
) -> list[NearDuplicate]:
    """Return the images of test and val that look like an image of another split; their exact copies too.

    Args:
        source: The data.
        protocol: Defines which splits are held out.
        limit: Bits in which two hashes may differ.
        note: Called with lines about the progress.
    """
    hashes: dict[str, npt.NDArray[np.float32]] = {}

    def signs(images: Images) -> npt.NDArray[np.float32]:
        if images.name not in hashes:
            bits = in_threads(
                lambda index: perceptual_hash(images.load(index)), len(images), f"hashing {images.name}", note
            )
            hashes[images.name] = np.where(np.stack(bits), np.float32(1), np.float32(-1))
        return hashes[images.name]

    found = []
    for held, seen in held_out_pairs(source, protocol):
        ours, theirs = signs(held), signs(seen)
        for start in range(0, len(held), _BLOCK):  # 64 - 2 × distance is the product of the signs
            distances = (64 - ours[start : start + _BLOCK] @ theirs.T) / 2
            for row, column in np.argwhere(distances <= limit).tolist():
                one, distance = start + row, int(distances[row, column])
                found.append(NearDuplicate(_of(held, one), _of(seen, column), distance))
    return found


def _of(images: Images, index: int) -> tuple[str, str, int]:
    return images.name, images.where(index), int(images.labels[index])


def write_near_duplicates(path: Path, pairs: Sequence[NearDuplicate]) -> None:
    """Write pairs as CSV, the closest first; DataError if the file cannot be written."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(("distance", "split", "image", "label", "other_split", "other_image", "other_label"))
    for pair in sorted(pairs, key=lambda pair: pair.distance):
        table.writerow((pair.distance, *pair.held, *pair.seen))
    try:
        with replacing(path) as file:
            file.write(text.getvalue().encode("utf-8", "surrogateescape"))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
