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
from svp_bench.data.locate import data_root
from svp_bench.data.manifest import MANIFEST, SUMS, parse_sums, read_manifest, write_manifest
from svp_bench.data.sources import READERS, Images, Note, Source, in_threads, inspect, open_source
from svp_bench.prepare.checks import content_digests, examine, held_out_pairs, leaks, remarks
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
    found = examine(source, note)
    leaked = leaks(source, found, load_protocol(suite.protocol))
    notes = [*report.notes, *leaked, *remarks(card, source, found)]
    different = report.status == "different" or leaked
    status: Literal["verified", "different", "changed"] = "different" if different else "verified"
    digest, folder = None, source.folder
    if folder is not None and not source.synthetic:
        digest, changes, written = _manifest(card, source, report.variant, content_digests(found), suite, root, accept)
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


def _place(source: Source) -> str | None:
    """Return the folder that the images lie in; None if the package holds or computes them."""
    folder = source.folder or Path(source.origin)
    return str(folder) if folder.is_dir() else None


# --- the manifest ----------------------------------------------------------------------------------------------------


def _manifest(
    card: TaskCard,
    source: Source,
    variant: str,
    content: Mapping[str, str],
    suite: SuiteCard,
    root: Path | None,
    accept: bool,
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
    # Files that were changed are no longer those of the source; their variant stays, so that no cell mixes them.
    origin = {} if before is None else {"changed_from": before.digest, "changed_from_source": before.source}
    variant = before.variant if before is not None else variant
    manifest, sums = describe(
        folder, card, source="folder", variant=variant, origin=origin, splits=source.counts, content=content
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
