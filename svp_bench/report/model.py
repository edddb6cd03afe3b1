"""The data of the page: objects of `tables` with ids, styles, values and the places of their records."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from svp_bench.records.published import PublishedRow, mean_names
from svp_bench.records.record import Record
from svp_bench.records.store import Problem
from svp_bench.report.curves import Curve
from svp_bench.stats.inference import one_standard_error
from svp_bench.tables.model import Cell, Row, Section, Table, track_of
from svp_bench.tasks.cards import SuiteCard

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Value:
    """A mean in percent and its intervals, None where they are unknown.

    Attributes:
        mean: The mean.
        these: Over new seeds on these tasks.
        new: Over new tasks.
        images: Over new test images, for these runs.
        partial: "3/8" for the mean over 3 of 8 tasks, else "".
    """

    mean: float
    these: Bounds | None
    new: Bounds | None = None
    images: Bounds | None = None
    partial: str = ""

    @property
    def shown(self) -> Bounds | None:
        """The interval of error bars: over new seeds, else over test images."""
        return self.these or self.images


class Run(NamedTuple):
    """A run of a cell: its seed, its accuracy in percent, and the place of its record in the pool."""

    seed: int
    top1: float
    record: int


@dataclass(frozen=True)
class CellView:
    """A task of a row.

    Attributes:
        table: The cell.
        value: Mean of the seeds.
        runs: One per seed.
        standing: "best" (significantly better than all other rows), "second", "tied" (not significantly worse than the
            highest, if other rows are), or "".
        verdict: "▲" or "▼" if it differs significantly from the cell of the control, else "".
    """

    table: Cell
    value: Value
    runs: tuple[Run, ...]
    standing: str
    verdict: str

    @property
    def records(self) -> tuple[int, ...]:
        """Places of its records in the pool."""
        return tuple(run.record for run in self.runs)

    @property
    def binomial(self) -> float:
        """Binomial standard error in points, from the number of test images."""
        return one_standard_error(self.table.mean, self.table.images)


@dataclass(frozen=True)
class RowView:
    """One method with one setting.

    Attributes:
        table: The row.
        style: Number of its colour and marker, by label.
        cells: Task → cell; without missing results.
        missing: Tasks without a cell.
        task_mean: Over all tasks; None if a result is missing.
        present: Over the tasks with a result.
        group_mean: Over the group means.
        groups: Group → mean of its tasks.
    """

    table: Row
    style: int
    cells: Mapping[str, CellView]
    missing: tuple[str, ...]
    task_mean: Value | None
    present: Value
    group_mean: Value | None
    groups: Mapping[str, Value | None]

    @property
    def label(self) -> str:
        """Its name."""
        return self.table.label

    @property
    def records(self) -> tuple[int, ...]:
        """Places of its records in the pool."""
        return tuple(run.record for cell in self.cells.values() for run in cell.runs)


class Point(NamedTuple):
    """A row in a trade-off: its cost, its mean over all tasks, and whether it is on the Pareto front."""

    row: RowView
    x: float
    value: Value
    front: bool


class Axis(NamedTuple):
    """A cost: id, title of the axis, short unit, and how it is measured."""

    id: str
    title: str
    unit: str
    note: str


@dataclass(frozen=True)
class TradeOff:
    """Accuracy over a cost.

    Attributes:
        id: Unique in the page.
        axis: The cost.
        points: In the order of the rows.
        missing: Label → why the row has no point.
    """

    id: str
    axis: Axis
    points: tuple[Point, ...]
    missing: Mapping[str, str]


@dataclass(frozen=True)
class SetupView:
    """Measurements on one kind of machine.

    Attributes:
        title: Device, processes, precision and scan backend.
        training: Accuracy over training time.
        inference: Accuracy over test time per image.
        images_per_second: Label → training throughput, the mean over the runs.
        memory: Label → largest peak of device memory in MiB.
    """

    title: str
    training: TradeOff
    inference: TradeOff
    images_per_second: Mapping[str, float]
    memory: Mapping[str, float]


@dataclass(frozen=True)
class SectionView:
    """Rows that compare.

    Attributes:
        table: The section.
        id: Unique in the page.
        title: Backbone and track.
        weights: The checkpoint and the first digits of its digest, or "random weights".
        notes: Notes on its numbers.
        comparison_notes: Notes on the differences to the control, and the mean ranks.
        rows: Ranked ones first.
        parameters: Accuracy over trained parameters.
        further: Accuracy over multiplications of one image, and over times of `svp-bench measure`.
        setups: One per kind of machine; the one with the most rows first.
        majority: Task or name of a mean → accuracy of the majority class.
    """

    table: Section
    id: str
    title: str
    weights: str
    notes: tuple[str, ...]
    comparison_notes: tuple[str, ...]
    rows: tuple[RowView, ...]
    parameters: TradeOff
    further: tuple[TradeOff, ...]
    setups: tuple[SetupView, ...]
    majority: Mapping[str, float]


class QuotedView(NamedTuple):
    """A published method: one of its rows, column → accuracy as printed, parameters as printed and as a number."""

    row: PublishedRow
    scores: Mapping[str, str]
    parameters: str
    size: float | None


class TaskView(NamedTuple):
    """A task: its full name, its id in the suite, its title and its group."""

    name: str
    id: str
    title: str
    group: str


class CurveRun(NamedTuple):
    """The learning curves of a run, with place of its record, id of its section ("" if excluded), label and style."""

    record: int
    section: str
    label: str
    style: int
    curve: Curve


@dataclass(frozen=True)
class SuiteView:
    """A suite.

    Attributes:
        table: Its table.
        tasks: In the order of the columns.
        sections: Pre-trained weights first.
        quoted: Published numbers.
        curves: Learning curves, in the order of the pool.
        without: Number of runs without event files.
    """

    table: Table
    tasks: tuple[TaskView, ...]
    sections: tuple[SectionView, ...]
    quoted: tuple[QuotedView, ...]
    curves: tuple[CurveRun, ...]
    without: int

    @property
    def card(self) -> SuiteCard:
        """Its card."""
        return self.table.suite

    @property
    def means(self) -> tuple[str, str]:
        """Names of both averages."""
        return mean_names(self.card)

    @property
    def excluded(self) -> dict[str, int]:
        """Reason → number of excluded records."""
        return dict(sorted(Counter(out.why for out in self.table.left_out).items()))


@dataclass(frozen=True)
class ReportView:
    """The whole page.

    Attributes:
        suites: Those with the most records on pre-trained weights first.
        pool: All records of the page.
        level: Confidence level of the intervals.
        strays: Files and records that belong to no suite.
        runs_root: Folder of the event files.
    """

    suites: tuple[SuiteView, ...]
    pool: RecordPool
    level: float
    strays: tuple[Problem, ...]
    runs_root: str


class RecordPool:
    """The records of a page, in the order of task and run.

    Attributes:
        records: The records.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        unique = {(record.task, record.run_id): record for record in records}
        self.records = [unique[key] for key in sorted(unique)]
        self._place = {(record.task, record.run_id): place for place, record in enumerate(self.records)}

    def place(self, record: Record) -> int:
        """Return the place of a record."""
        return self._place[record.task, record.run_id]

    def path(self, place: int) -> str:
        """Return the path of a record below the results root."""
        return f"records/{self.records[place].task}/{self.records[place].run_id}.json"

    def to_json(self) -> dict[str, Any]:
        """Return {"fields": names, "values": each value once, "records": for each record the indices of its values}."""
        facts = [self._facts(place) for place in range(len(self.records))]
        fields = list(dict.fromkeys(name for fact in facts for name in fact))
        places: dict[str, int] = {}
        values: list[Any] = []
        rows = []
        for fact in facts:
            row = []
            for name in fields:
                key = json.dumps(fact.get(name), sort_keys=True)
                if key not in places:
                    places[key] = len(values)
                    values.append(fact.get(name))
                row.append(places[key])
            rows.append(row)
        return {"fields": fields, "values": values, "records": rows}

    def _facts(self, place: int) -> dict[str, Any]:
        """Return the facts of a record without its config and bits."""
        record = self.records[place]
        facts = {key: value for key, value in record.to_json().items() if key not in _IN_THE_FILE}
        facts["metrics"] = {key: value for key, value in facts["metrics"].items() if key != "per_class"}
        split = {} if record.correct is None else {"split_digest": record.correct.split_digest}
        return {"run_id": record.run_id, "path": self.path(place), **facts, "track": track_of(record).words, **split}


_IN_THE_FILE = ("schema", "config", "correct", "val_correct", "suite")
