"""What a table is made of: cells, rows, sections. `tables.build_table` makes them, all renderings read them.

Every number leads back to its records: a cell holds the records of its seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from svp_bench.core.errors import plural
from svp_bench.records.published import PublishedRow
from svp_bench.records.record import Record
from svp_bench.records.store import Problem
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    from svp_bench.stats.estimates import Estimate, Ranks

__all__ = [
    "CARD",
    "PROVENANCE",
    "SYNTHETIC",
    "Cell",
    "Comparison",
    "Contrast",
    "Intervals",
    "LeftOut",
    "Row",
    "Section",
    "Table",
    "Track",
    "track_of",
]

CARD = "card"
"""The data variant that follows the task card itself."""

SYNTHETIC = "synthetic"
"""The data variant of synthetic images."""


@dataclass(frozen=True, order=True)
class Track:
    """How the settings of a row's runs were selected. Rows of different tracks are never in one ranking.

    Attributes:
        kind: "default" (the record names no search) or "searched" (by a declared search on val).
        name: Of the search or the table; "" for the default track.
        budget: K of the search: settings that each method might try on each task; else 0.
        sampler: Of the search; else "".
        selected_on: The split that chose, e.g. "val200", or its folds; it may differ between tasks. Else "".
        digest: Of the search's declaration; else "".
    """

    kind: str
    name: str = ""
    budget: int = 0
    sampler: str = ""
    selected_on: str = field(default="", compare=False)
    digest: str = ""

    @property
    def title(self) -> str:
        """Two or three words: "default" or "searched (default, K = 12)"."""
        return f"searched ({self.name}, K = {self.budget})" if self.kind == "searched" else "default"

    @property
    def words(self) -> str:
        """What the track is, in a phrase."""
        if self.kind == "searched":
            return (
                f"searched: {self.name}, K = {plural(self.budget, 'setting')} per method and task "
                f"({self.sampler}), chosen on "
                f"{self.selected_on}"
            )
        # A record cannot prove when or why a value was fixed, so no track claims it; `Row.overrides` shows what it can
        return "default: no search is recorded"


def track_of(record: Record) -> Track:
    """Return the track of a record."""
    search = record.search
    if search is None:
        return Track("default")
    return Track("searched", search.name, search.budget, search.sampler, search.selected_on, search.declaration)


PROVENANCE: Mapping[str, Callable[[Record], Hashable]] = {
    "commit": lambda run: (run.package_version, run.commit, run.dirty),
    "libraries": lambda run: tuple(sorted(run.libraries.items())),
    "device": lambda run: (run.device, run.device_count),
    "scan backend": lambda run: run.scan_backend,
    "precision": lambda run: run.precision,
}
"""What a run was made with, outside of its config: numbers of one cell may differ by it as well as by their seeds. A
commit with uncommitted changes, and a release of the package without a commit, count as code of their own."""


@dataclass(frozen=True)
class Cell:
    """One task of a row, on the same data and with the same config: the mean of its seeds.

    Attributes:
        task: Full name.
        task_version: Version of its card.
        variant: Data variant: "card", a variant's name, or "synthetic".
        data_digest: Of the lists that the runs read.
        config_digest: Of the runs' config.
        mean: Mean accuracy in percent.
        std: Sample standard deviation over the seeds (n - 1), None for one seed.
        seeds: Sorted.
        different: Did the data of any of the runs differ from the card?
        adapter: Trainable parameters outside the head: the smallest and the largest count of the runs.
        records: Of its runs, in the order of `seeds`; one a seed.
    """

    task: str
    task_version: int
    variant: str
    data_digest: str | None
    config_digest: str
    mean: float
    std: float | None
    seeds: tuple[int, ...]
    different: bool
    adapter: tuple[int, int]
    records: tuple[Record, ...]

    @property
    def synthetic(self) -> bool:
        """Whether the data are synthetic."""
        return self.variant == SYNTHETIC

    @property
    def mixed(self) -> tuple[str, ...]:
        """What is not the same for all of its seeds: "commit", "libraries", "device" ...; see `PROVENANCE`."""
        return tuple(name for name, fact in PROVENANCE.items() if len({fact(run) for run in self.records}) > 1)

    @property
    def scores(self) -> dict[int, float]:
        """Seed → top-1 accuracy in percent."""
        return {run.seed: run.metrics.top1 for run in self.records if run.metrics is not None}

    @property
    def run_ids(self) -> dict[int, str]:
        """Seed → run id."""
        return {run.seed: run.run_id for run in self.records}

    @property
    def images(self) -> int:
        """Test images that each of its runs was scored on; the smallest number, where they differ."""
        return min(run.metrics.count for run in self.records if run.metrics is not None)

    @property
    def majority(self) -> float | None:
        """Accuracy in percent of always answering the most frequent class of the test split; None if not recorded."""
        counted = [run.metrics.per_class.count for run in self.records if run.metrics and run.metrics.per_class]
        return 100 * max(counted[0]) / sum(counted[0]) if counted else None

    @property
    def paths(self) -> dict[int, str]:
        """Seed → path of the record, relative to the results root, with forward slashes."""
        return {run.seed: f"records/{run.task}/{run.run_id}.json" for run in self.records}


@dataclass(frozen=True)
class Intervals:
    """Intervals of a row's means, within 0 and 100; None where a result is missing.

    An `Estimate` whose `low` is None has a value and no interval: the variance of some cell is unknown (one seed), or
    the interval would hold every possible value.

    Attributes:
        groups: Group → its mean, over new seeds on these tasks.
        task_mean: Mean over all tasks, over new seeds on these tasks.
        group_mean: Mean over the group means, over new seeds on these tasks.
        new_tasks: Mean over all tasks, over new tasks: the suite's independent sources of images are the sample.
        present: Mean over the tasks that the row has, all or not, over new seeds.
        images: The same mean, over new test images; for these runs, so that one seed is enough.
        group_images: Group → its mean, over new test images.
        group_mean_images: Mean over the group means, over new test images.
    """

    groups: Mapping[str, Estimate | None]
    task_mean: Estimate | None
    group_mean: Estimate | None
    new_tasks: Estimate | None
    present: Estimate
    images: Estimate
    group_images: Mapping[str, Estimate | None]
    group_mean_images: Estimate | None


@dataclass(frozen=True)
class Row:
    """One method with one setting.

    Attributes:
        method: Registered name.
        label: The name, with what tells its settings apart if there are several.
        setting_digest: `row_digest` of its records.
        cells: Task → the cell that is shown; a missing result has no entry.
        apart: Further cells, on other data (or another selected config) of tasks that have a cell; they are in the
            long CSV and in a line each below the table.
        groups: Group → mean of its tasks, None if one of them is missing.
        task_mean: Mean over all tasks, or None.
        group_mean: Mean over the group means, or None.
        intervals: Of these means.
        rank: 1 is best; None for incomplete rows, for rows with a synthetic cell, and for random weights.
        overrides: "model.learning_rate 0.123, not 0.001" → the tasks whose runs override the shipped settings
            (protocol card, task, recipe); values that a search selected are not overrides.
        shipped: Is there a shipped recipe of the method to compare with?
    """

    method: str
    label: str
    setting_digest: str
    cells: Mapping[str, Cell]
    apart: tuple[Cell, ...]
    groups: Mapping[str, float | None]
    task_mean: float | None
    group_mean: float | None
    intervals: Intervals
    rank: int | None = None
    overrides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shipped: bool = True

    @property
    def synthetic(self) -> bool:
        """Whether any cell is on synthetic data."""
        return any(cell.synthetic for cell in self.cells.values())

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """The cells that are shown, then the others."""
        return (*self.cells.values(), *self.apart)

    @property
    def present_mean(self) -> float:
        """Mean over the tasks that it has; `task_mean`, if it has all."""
        return math.fsum(cell.mean for cell in self.cells.values()) / len(self.cells)

    @property
    def seeds(self) -> tuple[int, int]:
        """Smallest and largest number of seeds of a cell."""
        counts = [len(cell.seeds) for cell in self.cells.values()]
        return min(counts), max(counts)

    @property
    def adapter(self) -> tuple[int, int]:
        """Smallest and largest number of trainable parameters outside the head."""
        counts = [count for cell in self.cells.values() for count in cell.adapter]
        return min(counts), max(counts)

    @property
    def trials(self) -> tuple[int, int] | None:
        """Smallest and largest number of settings that were tried for a cell; None outside the searched tracks."""
        counts = [run.search.trials for cell in self.cells.values() for run in cell.records if run.search is not None]
        return (min(counts), max(counts)) if counts else None


@dataclass(frozen=True)
class Contrast:
    """A row against the control: row - control, in points of accuracy.

    Attributes:
        row: Label of the row.
        setting_digest: Of the row.
        tasks: Tasks that both have on the same data; the mean is over these.
        seeds: Smallest and largest number of shared seeds of a task.
        these_tasks: Mean difference, with the interval over new seeds on these tasks.
        new_tasks: The same difference, with the interval over new tasks.
        images: The same difference, with the interval over new test images, from the records' bits of these runs; None
            if the bits of a task are not of one split.
        p: Two-sided sign flip over the independent sources of images, each task weighing the same as in the mean; None
            where no outcome could fall below 1 - level (`least`).
        holm: p, adjusted by Holm over the complete rows of the section; None where p is, and for a row that is compared
            on fewer tasks than the suite has: its difference is another quantity, and its p stands raw.
        least: The smallest p that any outcome could give, after the adjustment.
        sources: Independent sources of images among the tasks.
        verdicts: Task → "better", "worse", "tie", or "too few" (fewer than six shared seeds).
    """

    row: str
    setting_digest: str
    tasks: tuple[str, ...]
    seeds: tuple[int, int]
    these_tasks: Estimate
    new_tasks: Estimate
    images: Estimate | None
    p: float | None
    holm: float | None
    least: float
    sources: int
    verdicts: Mapping[str, str]


@dataclass(frozen=True)
class Comparison:
    """The rows of a section against one declared control.

    Attributes:
        control: Label of the control; None if there is none.
        missing: One line: why there is no control, and how to name one; None if there is one.
        contrasts: In the order of the rows.
        incomparable: Label → one line: why this row is not compared.
    """

    control: str | None
    missing: str | None
    contrasts: tuple[Contrast, ...]
    incomparable: Mapping[str, str]


@dataclass(frozen=True)
class Section:
    """Rows that compare: of one protocol, backbone, checkpoint and track.

    Attributes:
        protocol: Its name.
        protocol_version: Its version.
        selection: The protocol's rule, in words; None if the card is missing or of another version.
        backbone: Model name.
        checkpoint: Where the weights came from, e.g. "hub".
        checkpoint_digest: None for random weights.
        track: How the settings were selected.
        precisions: Of its runs, sorted.
        rows: Ranked ones first.
        records: Number of records in it.
        dirty: How many of them were made with uncommitted changes.
        comparison: Against the control; None for fewer than two complete rows and for random weights.
        ranks: Mean ranks of the ranked rows, by label, and which of them are not separated; None for fewer than two
            rows, or fewer sources of tasks than `stats.FEWEST_SOURCES`.
        data: Name of a custom data set: its folder, number of classes and the first digits of its digest; "" for the
            tasks of a benchmark, whose cards say what the data are.
    """

    protocol: str
    protocol_version: int
    selection: str | None
    backbone: str
    checkpoint: str
    checkpoint_digest: str | None
    track: Track
    precisions: tuple[str, ...]
    rows: tuple[Row, ...]
    records: int
    dirty: int
    comparison: Comparison | None = None
    ranks: Ranks | None = None
    data: str = ""

    @property
    def majorities(self) -> dict[str, float]:
        """Task → accuracy of always answering the most frequent class; tasks without, or with several, are left out."""
        found: dict[str, set[float | None]] = {}
        for row in self.rows:
            for task, cell in row.cells.items():
                found.setdefault(task, set()).add(cell.majority)
        known = {task: next(iter(values - {None}), None) for task, values in found.items() if len(values - {None}) == 1}
        return {task: value for task, value in known.items() if value is not None}

    @property
    def random(self) -> bool:
        """Are the weights random?"""
        return self.checkpoint_digest is None


@dataclass(frozen=True)
class LeftOut:
    """A record that is not in the table.

    Attributes:
        record: The record.
        why: One word or two, by which they are counted: "truncated", "selection", "superseded" ...
        detail: One line.
    """

    record: Record
    why: str
    detail: str


@dataclass(frozen=True)
class Table:
    """All that is known of a suite.

    Attributes:
        suite: Its card.
        sections: Pre-trained weights first.
        left_out: Records that do not enter, sorted.
        problems: Files that are no records, sorted.
        published: Quoted numbers, in the order of their files.
        level: Of all intervals, e.g. 0.95.
    """

    suite: SuiteCard
    sections: tuple[Section, ...]
    left_out: tuple[LeftOut, ...]
    problems: tuple[Problem, ...]
    published: tuple[PublishedRow, ...]
    level: float = 0.95
