"""Sources of data: from a hub, an archive, a builder or a folder to the folder that a task's reader reads.

A source is a class in a module of its own, registered by name in `SOURCES`. `prepare` runs it: the source fills a
partial folder, the task's own reader checks it, every image is decoded once, and the folder is renamed into place with
its manifest.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svp_bench.core.errors import DataError, UsageError
from svp_bench.core.registry import Registry
from svp_bench.data.locate import data_root
from svp_bench.data.manifest import Manifest, read_manifest, sums_digest
from svp_bench.data.reading import joined_names
from svp_bench.data.sources import DataReport, Note, Source, inspect, open_source
from svp_bench.prepare.checks import content_digests, examine, leaks, remarks
from svp_bench.prepare.stage import RefusedError, Stage, describe, staged, sums_below
from svp_bench.prepare.verdict import Verdict, save_verdict
from svp_bench.tasks.cards import SuiteCard, TaskCard, list_tasks, load_protocol, load_suite, load_task

SOURCES = Registry("source", listing="svp-bench data prepare --help")
SOURCES.add(
    "torchvision", "svp_bench.prepare.torchvision_source:TorchvisionSource", "archives of torchvision's classes"
)
SOURCES.add("tfds", "svp_bench.prepare.tfds_source:TfdsSource", "TensorFlow Datasets, from which VTAB was made")
SOURCES.add("folder", "svp_bench.prepare.file_sources:FolderSource", "a folder with lists and images")
SOURCES.add("zip", "svp_bench.prepare.file_sources:ZipSource", "a zip or tar archive with the folders of tasks")
SOURCES.add("hub", "svp_bench.prepare.hub_source:HubSource", "parquet files of the Hugging Face hub, or of a folder")
SOURCES.add("native", "svp_bench.prepare.native_source:NativeSource", "a set's own archives, and the lists of a split")


@dataclass(frozen=True)
class Request:
    """What the user asks of a source.

    Attributes:
        location: Path or address of the data (`--from`); None for the place that the source knows.
        revision: Revision of a repository; None for the pinned one, else the newest, which the manifest records.
        offline: Use no network.
        mirrors: Addresses to try if the first fails.
        workers: Downloads and decoders that run at a time.
        downloads: Folder for archives that are needed once; they stay there, so that an interrupted build continues.
        note: Called with lines about the progress.
    """

    location: str | None
    revision: str | None
    offline: bool
    mirrors: tuple[str, ...]
    workers: int
    downloads: Path
    note: Note


@dataclass(frozen=True)
class Built:
    """What a source wrote.

    Attributes:
        variant: Name of the data variant: the source's own name where its pixels differ from the card's; None where
            they are the card's, or those of its variant with the same counts.
        origin: Facts for finding the same data again; the plan is added to them.
        notes: Differences from the card that the task's reader cannot see.
    """

    variant: str | None
    origin: Mapping[str, str]
    notes: tuple[str, ...] = ()


class DataSource(ABC):
    """A place where the data of tasks come from."""

    @abstractmethod
    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """Return everything that decides the content of the folder, e.g. the revision; read no images.

        Raises:
            UsageError: If this source has no data of the task; names the sources that have.
            DataError: If the data cannot be reached.
        """

    @abstractmethod
    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """Return one line about the data that are there, e.g. splits, counts and size.

        Raises:
            UsageError: As `plan`.
            DataError: If there are none, or they cannot be reached.
        """

    @abstractmethod
    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """Fill the partial folder; skip files that are there (`stage.has`).

        Raises:
            DataError: If the data are missing, malformed or hostile.
        """


def get_source(name: str) -> DataSource:
    """Return a source by name; UsageError if there is none."""
    source: DataSource = SOURCES.get(name)()
    return source


def refuse_shared(card: TaskCard, suite: SuiteCard) -> None:
    """Refuse to prepare a task whose folder is that of a task of another suite; names that task and the command."""
    shared = [
        name
        for name in list_tasks()
        if name != card.name
        and load_task(name).folder == card.folder
        and load_suite(name.partition("/")[0]).folder in suite.other_folders
    ]
    if shared:
        raise UsageError(
            f"{card.name} shares folder and images with {joined_names(shared)} and needs no copy; prepare that: "
            f"`svp-bench data prepare {shared[0]} --source native`"
        )


def target_folder(card: TaskCard, suite: SuiteCard, root: Path | None) -> Path:
    """Return the canonical folder of a task: `<root>/<suite folder>/<task folder>`."""
    return data_root(root)[0] / suite.folder / card.folder


def prepare(
    card: TaskCard, suite: SuiteCard, source: str, request: Request, root: Path | None = None, *, replace: bool = False
) -> tuple[Manifest, tuple[str, ...]]:
    """Build the canonical folder of one task.

    A folder that was built of the same plan stays as it is, so that an interrupted suite continues.

    Args:
        card: The task's card.
        suite: The card of its suite.
        source: Name of the source.
        request: What to build from.
        root: The data root; see `data_root`.
        replace: Replace a folder that exists.

    Returns:
        The manifest, and the differences from the card, one line each.

    Raises:
        UsageError: If the source is unknown or has no data of the task, or another folder exists.
        DataError: If the data are missing, malformed or hostile, have an image that cannot be decoded, or cannot be
            written. Nothing is then in place.
    """
    builder = get_source(source)
    plan = builder.plan(card, suite, request)
    target = target_folder(card, suite, root)
    stated = {
        key: value if isinstance(value, str) else json.dumps(value, sort_keys=True) for key, value in plan.items()
    }
    if not replace and (known := _known(target, card, source, stated)) is not None:
        if sums_digest(sums_below(target)) != known.digest:
            raise UsageError(
                f"{target} was built from the same data, and its files have changed: `svp-bench data verify` names "
                "them, --replace builds it again"
            )
        request.note(f"{card.name}: {target} is built from the same data already; --replace builds it again")
        return known, _report(card, suite, target)[1].notes
    with staged(target, {"task": card.name, "source": source, **plan}, replace=replace) as stage:
        built = builder.build(card, suite, request, plan, stage)
        try:
            found, report = _report(card, suite, stage.folder)
            examined = examine(found, request.note)
        except DataError as error:  # the partial folder is deleted: its path would help nobody
            raise RefusedError(str(error).replace(f"{stage.folder}{os.sep}", "")) from None
        leaked = leaks(found, examined, load_protocol(suite.protocol))
        noted = [*built.notes, *report.notes, *leaked, *remarks(card, found, examined)]
        notes = tuple(note.replace(str(stage.folder), str(target)) for note in noted)
        manifest, sums = describe(
            stage.folder,
            card,
            source=source,
            variant=built.variant or report.variant,
            origin={**stated, **built.origin},
            splits=report.counts,
            content=content_digests(examined),
        )
        stage.finish(manifest, sums)
    read = open_source(card, root, suite=suite).folder
    if read is not None and read.resolve() != target.resolve():
        notes = (f"runs with this root read {read}, which goes first; move it away to use {target}", *notes)
    verdict = Verdict(
        task=card.name,
        status="different" if built.notes or report.notes or leaked else "verified",
        notes=notes,
        counts=report.counts,
        variant=manifest.variant,
        folder=str(target),
        manifest_digest=manifest.digest,
        time=manifest.created,
    )
    save_verdict(verdict, root)
    return manifest, notes


def _known(target: Path, card: TaskCard, source: str, plan: Mapping[str, str]) -> Manifest | None:
    """Return the manifest of a folder that was built of this plan."""
    manifest = read_manifest(target) if target.is_dir() else None
    if manifest is None or (manifest.task, manifest.source) != (card.name, source):
        return None
    return manifest if plan.items() <= manifest.origin.items() else None  # not one that `verify --accept` wrote


def _report(card: TaskCard, suite: SuiteCard, folder: Path) -> tuple[Source, DataReport]:
    """Return the splits that the task's reader finds in a folder, and how they compare with the card."""
    found = open_source(card, folder, suite=suite)
    return found, inspect(card, found, [*card.counts])
