"""Cells, rows and sections of a table. `tables.build` derives them from records; all renderers read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from svp_bench.core.errors import plural
from svp_bench.records.published import PublishedRow, mean_names
from svp_bench.records.record import Record
from svp_bench.records.store import Problem
from svp_bench.stats.inference import group_weights
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    from svp_bench.records.costs import CostFile
    from svp_bench.stats.estimates import Estimate, Ranks
    from svp_bench.tables.plan import PlanResult

CARD = "card"
"""The data variant that follows the task card itself."""

IMAGES = "*"
"""Behind an interval that is over test images, because one seed shows no spread over seeds."""

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
        """The track in a phrase."""
        if self.kind == "searched":
            settings = plural(self.budget, "setting")
            return (
                f"searched: {self.name}, K = {settings} per method and task ({self.sampler}), chosen on "
                f"{self.selected_on}"
            )
        # A record cannot prove when or why a value was fixed, so no track claims it; `Row.overrides` shows what it can
        return "default: no search is recorded"


_DEFAULT = Track("default")


def track_of(record: Record) -> Track:
    """Return the track of a record."""
    search = record.search
    if search is None:
        return _DEFAULT
    return Track("searched", search.name, search.budget, search.sampler, search.selected_on, search.declaration)


class Column(NamedTuple):
    """A column of scores: its name, and the weights of the tasks whose scores are in it."""

    name: str
    weights: Mapping[str, float]


def columns_of(suite: SuiteCard) -> list[Column]:
    """Return the columns: tasks in suite order, groups, the mean of all tasks, the mean of the groups."""
    groups = {group: tuple(map(suite.full, tasks)) for group, tasks in suite.groups.items()}
    tasks, of_groups = mean_names(suite)
    return [
        *(Column(task.partition("/")[2], {task: 1.0}) for task in suite.tasks),
        *(Column(group, dict.fromkeys(members, 1.0)) for group, members in groups.items()),
        Column(tasks, dict.fromkeys(suite.tasks, 1.0)),
        Column(of_groups, group_weights(groups)),
    ]


PROVENANCE: Mapping[str, Callable[[Record], Hashable]] = {
    "commit": lambda run: (run.package_version, run.commit, run.dirty),
    "libraries": lambda run: tuple(sorted(run.libraries.items())),
    "device": lambda run: (run.device, run.device_count),
    "scan backend": lambda run: run.scan_backend,
    "precision": lambda run: run.precision,
}
"""Facts of a run outside of its config: numbers of one cell may differ by them as well as by their seeds. A commit with
uncommitted changes, and a release of the package without a commit, count as code of their own."""


def content_of(run: Record) -> str:
    """Return a text for the decoded pixels of the splits of a run; "" for older records, which do not state them."""
    return " ".join(f"{name} {digest}" for name, digest in sorted((run.content_digests or {}).items()))


@dataclass(frozen=True)
class Cell:
    """One task of a row, on the same data and with the same config: its records, one a seed, in the order of seeds."""

    records: tuple[Record, ...]

    @property
    def task(self) -> str:
        """Full name."""
        return self.records[0].task

    @property
    def variant(self) -> str:
        """Data variant: "card", the name of a variant, or "synthetic"."""
        return self.records[0].data_variant

    @property
    def data(self) -> tuple[str, str | None, int, str]:
        """Variant, digest, card version and pixels of the data: cells with the same compare."""
        first = self.records[0]
        return self.variant, first.data_digest, first.task_version, content_of(first)

    @cached_property
    def scores(self) -> dict[int, float]:
        """Seed → top-1 accuracy in percent."""
        return {run.seed: run.metrics.top1 for run in self.records if run.metrics is not None}

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """Its seeds, sorted."""
        return tuple(self.scores)

    @cached_property
    def mean(self) -> float:
        """Mean accuracy in percent."""
        return math.fsum(self.scores.values()) / len(self.scores)  # fsum: the order must not reach the last digit

    @cached_property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds (n - 1), None for one seed, whose spread is unknown."""
        squares = math.fsum((x - self.mean) ** 2 for x in self.scores.values())
        return math.sqrt(squares / (len(self.scores) - 1)) if len(self.scores) > 1 else None

    @cached_property
    def different(self) -> bool:
        """Whether the data of any of the runs differed from the card."""
        return any(run.data_status == "different" for run in self.records)

    @property
    def synthetic(self) -> bool:
        """Whether the data are synthetic."""
        return self.variant == SYNTHETIC

    @cached_property
    def mixed(self) -> tuple[str, ...]:
        """The names in `PROVENANCE` that differ between its seeds."""
        return tuple(name for name, fact in PROVENANCE.items() if len({fact(run) for run in self.records}) > 1)

    @cached_property
    def images(self) -> int:
        """Test images that each of its runs was scored on; the smallest number, where they differ."""
        return min(run.metrics.count for run in self.records if run.metrics is not None)

    @cached_property
    def majority(self) -> float | None:
        """Accuracy in percent of always answering the most frequent class of the test split; None if not recorded."""
        counted = [run.metrics.per_class.count for run in self.records if run.metrics and run.metrics.per_class]
        return 100 * max(counted[0]) / sum(counted[0]) if counted else None


@dataclass(frozen=True)
class Mean:
    """A mean of cells, with intervals within 0 and 100: over new seeds on these tasks, and over new test images.

    There is no interval over seeds if the variance of some cell is unknown (one seed), or if it would hold every value.
    """

    value: float
    seeds: Estimate
    images: Estimate
    synthetic: bool

    @property
    def behind(self) -> str:
        """ "± 1.25", half the interval over new seeds, or with a star that over test images where the first is unknown.

        "[97.50, 100.00]" where ± would leave 0 to 100; nothing without an interval.
        """
        for estimate, star in ((self.seeds, ""), (self.images, IMAGES)):
            if estimate.low is not None and estimate.high is not None:
                half = (estimate.high - estimate.low) / 2
                inside = estimate.value - half >= 0 and estimate.value + half <= 100
                return f"± {half:.2f}{star}" if inside else f"[{estimate.low:.2f}, {estimate.high:.2f}]{star}"
        return ""


@dataclass(frozen=True)
class Cost:
    """The cost of a row that does not depend on the machine; pairs are the smallest and the largest of its records.

    Attributes:
        head: Trained parameters of the head.
        stored_bytes: Of the trained tensors, head included.
        inference_macs: Of one image; None if not counted.
        training_macs: Of one image; None if not counted.
        mergeable: Whether the adapter can be folded into the backbone's weights.
    """

    head: tuple[int, int]
    stored_bytes: tuple[int, int]
    inference_macs: tuple[int, int] | None
    training_macs: tuple[int, int] | None
    mergeable: bool


@dataclass(frozen=True)
class Row:
    """One method with one setting.

    Attributes:
        method: Registered name.
        label: The name, with the values that tell its settings apart if there are several.
        setting_digest: `row_digest` of its records.
        suite: The suite.
        cells: Task → the cell that is shown; a missing result has no entry.
        apart: Further cells, on other data (or another selected config) of tasks that have a cell; they are in the
            long CSV and in a line each below the table.
        means: Of the groups, of all tasks, and of the group means; None if a result is missing.
        present: Over the tasks that it has.
        new_tasks: Interval of the mean over all tasks for new tasks: the suite's independent sources of images are the
            sample. None if a result is missing.
        rank: 1 is best; None for incomplete rows, for rows with a synthetic cell, and for random weights.
        overrides: "model.learning_rate 0.123, not 0.001" → the tasks whose runs override the shipped settings
            (protocol card, task, recipe); values that a search selected are not overrides.
        shipped: Is there a shipped recipe of the method to compare with?
    """

    method: str
    label: str
    setting_digest: str
    suite: SuiteCard
    cells: Mapping[str, Cell]
    apart: tuple[Cell, ...]
    means: tuple[Mean | None, ...]
    present: Mean
    new_tasks: Estimate | None
    rank: int | None = None
    overrides: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    shipped: bool = True

    @property
    def task_mean(self) -> float | None:
        """Mean over all tasks, or None."""
        whole = self.means[-2]
        return None if whole is None else whole.value

    @property
    def scores(self) -> list[float | None]:
        """The scores, in the order of `columns_of`."""
        tasks = [self.cells[task].mean if task in self.cells else None for task in self.suite.tasks]
        return [*tasks, *(None if mean is None else mean.value for mean in self.means)]

    @property
    def shown_means(self) -> list[Mean | None]:
        """As `means`, with `present` for the mean over all tasks."""
        return [*self.means[:-2], self.present, self.means[-1]]

    @property
    def partial(self) -> str:
        """ "3/8" for a row with 3 of 8 tasks, or nothing for a complete one."""
        return "" if self.task_mean is not None else self.done

    @property
    def done(self) -> str:
        """ "8/8": tasks that it has, of all."""
        return f"{len(self.cells)}/{len(self.suite.tasks)}"

    @property
    def synthetic(self) -> bool:
        """Whether any cell is on synthetic data."""
        return self.present.synthetic

    @property
    def all_cells(self) -> tuple[Cell, ...]:
        """The cells that are shown, then the others."""
        return (*self.cells.values(), *self.apart)

    @cached_property
    def records(self) -> list[Record]:
        """The records of the cells that are shown."""
        return [run for cell in self.cells.values() for run in cell.records]

    @cached_property
    def seeds(self) -> tuple[int, int]:
        """Smallest and largest number of seeds of a cell."""
        counts = [len(cell.seeds) for cell in self.cells.values()]
        return min(counts), max(counts)

    @cached_property
    def adapter(self) -> tuple[int, int]:
        """Smallest and largest number of trainable parameters outside the head."""
        counts = [run.parameters.adapter for run in self.records]
        return min(counts), max(counts)

    @cached_property
    def cost(self) -> Cost | None:
        """The cost that does not depend on the machine; None if a record does not state it."""
        found = [(run.efficiency, run.parameters) for run in self.records]
        known = [(stated, counts) for stated, counts in found if stated is not None]
        if len(known) < len(found) or not known:
            return None

        def span(values: Iterable[int | None]) -> tuple[int, int] | None:
            numbers = [value for value in values if value is not None]
            return (min(numbers), max(numbers)) if len(numbers) == len(known) else None

        return Cost(
            head=span(counts.head for _, counts in known) or (0, 0),
            stored_bytes=span(stated.stored_bytes for stated, _ in known) or (0, 0),
            inference_macs=span(stated.inference_macs for stated, _ in known),
            training_macs=span(stated.training_macs for stated, _ in known),
            mergeable=all(stated.mergeable for stated, _ in known),
        )

    @property
    def trials(self) -> tuple[int, int] | None:
        """Smallest and largest number of settings that were tried for a cell; None outside the searched tracks."""
        counts = [run.search.trials for run in self.records if run.search is not None]
        return (min(counts), max(counts)) if counts else None


@dataclass(frozen=True)
class CellContrast:
    """One task of two rows.

    Attributes:
        seeds: Mean of the paired differences of the shared seeds, with their t interval; `n` is their number.
        images: The same over new test images, of the seeds whose bits are of one split; None if there are none.
        verdict: See `stats.cell_verdict`.
    """

    seeds: Estimate
    images: Estimate | None
    verdict: str


@dataclass(frozen=True)
class Contrast:
    """A row against the control: row - control, in points of accuracy.

    Attributes:
        row: Label of the row.
        tasks: The tasks that both have on the same data, in suite order; the mean is over these.
        these_tasks: Mean difference, with the interval over new seeds on these tasks.
        new_tasks: The same, over new tasks.
        images: The same, over new test images; None if the bits of a task are not of one split.
        p: Two-sided sign flip over the independent sources of images, each task weighing the same as in the mean; None
            where no outcome could fall below 1 - level (`least`).
        holm: p, adjusted by Holm over the complete rows of the section; None where p is, and for a row that is compared
            on fewer tasks than the suite has: its difference is another quantity, and its p stands raw.
        least: The smallest p that any outcome could give, after the adjustment.
        sources: Independent sources of images among the tasks.
    """

    row: str
    tasks: Mapping[str, CellContrast]
    these_tasks: Estimate
    new_tasks: Estimate
    images: Estimate | None
    p: float | None
    holm: float | None
    least: float
    sources: int

    @cached_property
    def seeds(self) -> tuple[int, int]:
        """Smallest and largest number of shared seeds of a task."""
        counts = [cell.seeds.n for cell in self.tasks.values()]
        return min(counts), max(counts)


@dataclass(frozen=True)
class Comparison:
    """The rows of a section against one declared control.

    Attributes:
        control: Label of the control; None if there is none.
        contrasts: In the order of the rows.
        remarks: Why there is no control, and how to name one; or which rows are not compared, and why.
    """

    control: str | None
    contrasts: tuple[Contrast, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """Rows that compare: of one protocol, backbone, checkpoint and track.

    Attributes:
        suite: The suite.
        level: Of all intervals, e.g. 0.95.
        selection: The protocol's selection rule, in words; None if its card is missing or of another version.
        rows: Ranked ones first.
        data: Name of a custom data set: its folder, number of classes and the first digits of its digest; "" for the
            tasks of a benchmark, whose cards describe the data.
        comparison: Against the control; None for fewer than two complete rows and for random weights.
        ranks: Mean ranks of the ranked rows, by label, and which of them are not separated; None for fewer than two
            rows, or fewer sources of tasks than `stats.FEWEST_SOURCES`.
    """

    suite: SuiteCard
    level: float
    selection: str | None
    rows: tuple[Row, ...]
    data: str = ""
    comparison: Comparison | None = None
    ranks: Ranks | None = None

    @cached_property
    def members(self) -> list[Record]:
        """The records of its rows."""
        return [run for row in self.rows for cell in row.all_cells for run in cell.records]

    @property
    def first(self) -> Record:
        """One of them: they have the protocol, the backbone and the checkpoint in common."""
        return self.members[0]

    @cached_property
    def checkpoint(self) -> str:
        """Where the weights came from, e.g. "hub"."""
        return ", ".join(sorted({record.checkpoint for record in self.members}))

    @property
    def random(self) -> bool:
        """Are the weights random?"""
        return self.first.checkpoint_digest is None

    @cached_property
    def track(self) -> Track:
        """How the settings were selected."""
        selected_on = sorted({track_of(record).selected_on for record in self.members})
        return replace(track_of(self.first), selected_on=" or ".join(selected_on))

    @cached_property
    def cells(self) -> list[Cell]:
        """The cells that are shown."""
        return [cell for row in self.rows for cell in row.cells.values()]

    @cached_property
    def majorities(self) -> dict[str, float]:
        """Task → accuracy of always answering the most frequent class; tasks without, or with several, are left out."""
        found: dict[str, set[float]] = {}
        for cell in self.cells:
            if cell.majority is not None:
                found.setdefault(cell.task, set()).add(cell.majority)
        return {task: values.pop() for task, values in found.items() if len(values) == 1}


class LeftOut(NamedTuple):
    """A record that is not in the table: why in a word or two ("truncated", "superseded"), and the detail in a line."""

    record: Record
    why: str
    detail: str


@dataclass(frozen=True)
class Table:
    """A suite: its sections, pre-trained weights first, the records and files that do not enter, and quoted numbers.

    `planned` is the result of planned comparisons, if a file of them was given; `costs` are those that were
    measured on a machine, if they were given.
    """

    suite: SuiteCard
    sections: tuple[Section, ...]
    left_out: tuple[LeftOut, ...]
    problems: tuple[Problem, ...]
    published: tuple[PublishedRow, ...]
    level: float = 0.95
    planned: PlanResult | None = None
    costs: CostFile | None = None
