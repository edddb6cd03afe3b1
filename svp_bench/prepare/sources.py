"""Sources of data: from a hub, an archive, a builder or a folder to the folder that a task's reader reads.

A source is a class in a module of its own, registered by name in `SOURCES`. `prepare` runs it: the source fills a
partial folder, the task's own reader checks it, and the folder is renamed into place with its manifest.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from svp_bench.core.registry import Registry
from svp_bench.data.locate import data_root
from svp_bench.data.manifest import Manifest
from svp_bench.data.sources import Note, inspect, open_source
from svp_bench.prepare.stage import Stage, finish, staged
from svp_bench.tasks.cards import SuiteCard, TaskCard

SOURCES = Registry("source", listing="svp-bench data prepare --help")


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
        variant: Name of the data variant: "card", or the source's own name where its pixels differ from the card's.
        origin: Facts for finding the same data again.
    """

    variant: str
    origin: Mapping[str, str]


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


def target_folder(card: TaskCard, suite: SuiteCard, root: Path | None) -> Path:
    """Return the canonical folder of a task: `<root>/<suite folder>/<task folder>`."""
    return data_root(root)[0] / suite.folder / card.folder


def prepare(
    card: TaskCard, suite: SuiteCard, source: str, request: Request, root: Path | None = None, *, replace: bool = False
) -> tuple[Manifest, tuple[str, ...]]:
    """Build the canonical folder of one task.

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
        UsageError: If the source is unknown or has no data of the task, or the folder exists.
        DataError: If the data are missing, malformed or hostile, or cannot be written. Nothing is then in place.
    """
    builder = get_source(source)
    plan = builder.plan(card, suite, request)
    target = target_folder(card, suite, root)
    with staged(target, {"task": card.name, "source": source, **plan}, replace=replace) as stage:
        built = builder.build(card, suite, request, plan, stage)
        found = open_source(card, stage.folder, suite=suite)
        report = inspect(card, found, sorted(found.splits))
        manifest = finish(stage, card, source=source, variant=built.variant, origin=built.origin, splits=report.counts)
    return manifest, report.notes
