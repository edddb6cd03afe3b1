"""What the page shows, as plain frozen data without a word of HTML; `view` derives it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from svp_bench.records.record import Record
from svp_bench.records.store import Problem
from svp_bench.report.curves import Curve
from svp_bench.tables.model import Section, track_of
from svp_bench.tasks.cards import SuiteCard

__all__ = [
    "Axis",
    "Bounds",
    "CellView",
    "CurveRun",
    "Curves",
    "Hole",
    "OutView",
    "Point",
    "Pool",
    "QuotedView",
    "ReportView",
    "RowView",
    "Run",
    "SectionView",
    "SetupView",
    "SuiteView",
    "TaskView",
    "TradeOff",
    "Value",
]

Bounds = tuple[float, float]


@dataclass(frozen=True)
class Value:
    """A mean in percent and its intervals; an interval is None where a cell has one seed only.

    Attributes:
        mean: The mean.
        these: Interval of the mean over new seeds on these tasks.
        new: Interval of the mean over new tasks; None also where it is not asked for.
        images: Interval of the mean over new test images, for these runs.
        partial: "3/8" for the mean over 3 of 8 tasks, else "".
    """

    mean: float
    these: Bounds | None
    new: Bounds | None = None
    images: Bounds | None = None
    partial: str = ""

    @property
    def shown(self) -> Bounds | None:
        """What a whisker shows: the interval over new seeds, else that over test images."""
        return self.these or self.images


@dataclass(frozen=True)
class Run:
    """One seed of a cell.

    Attributes:
        seed: The seed.
        top1: Its accuracy in percent.
        record: Place of its record in the pool.
    """

    seed: int
    top1: float
    record: int


@dataclass(frozen=True)
class CellView:
    """One task of a row.

    Attributes:
        task: Full name.
        value: Mean of the seeds; its interval is over new seeds.
        std: Sample standard deviation over the seeds, None for one.
        images: In the test list.
        binomial: Standard error in points that the number of test images alone implies; see `one_standard_error`.
        runs: Its seeds.
        marks: "†" (data differ from the card), "‡" (another variant), "§" (a drawn stand-in), "‖" (seeds of several
            commits, devices ...), or "".
        variant: Of the data.
        standing: "best" (better than every other row, beyond chance), "second", "tied" (not told from the highest,
            where others are), or "".
        verdict: "▲" or "▼" where it is told from the control's cell, or "".
    """

    task: str
    value: Value
    std: float | None
    images: int
    binomial: float
    runs: tuple[Run, ...]
    marks: str
    variant: str
    standing: str = ""
    verdict: str = ""

    @property
    def records(self) -> tuple[int, ...]:
        """Places of its records in the pool."""
        return tuple(run.record for run in self.runs)


@dataclass(frozen=True)
class RowView:
    """One method with one setting.

    Attributes:
        id: Unique in the page.
        label: Its name.
        method: Registered name.
        style: Number of its colour and marker, the same for this label in the whole page.
        rank: Or None.
        cells: Task → cell; a hole has no entry.
        apart: Cells on other data of tasks that have a cell.
        missing: Tasks without a cell.
        task_mean: Over all tasks, with all intervals; None if a result is missing.
        present: Over the tasks that the row has; `task_mean`, if it has all.
        group_mean: Over the group means.
        groups: Group → mean of its tasks.
        seeds: Smallest and largest number of seeds of a cell.
        trainable: Trained parameters outside the head: smallest and largest of the runs.
        trials: Settings tried for a cell, smallest and largest; None outside of searches.
        departs: Does it depart from the shipped settings?
    """

    id: str
    label: str
    method: str
    style: int
    rank: int | None
    cells: Mapping[str, CellView]
    apart: tuple[CellView, ...]
    missing: tuple[str, ...]
    task_mean: Value | None
    present: Value
    group_mean: Value | None
    groups: Mapping[str, Value | None]
    seeds: tuple[int, int]
    trainable: tuple[int, int]
    trials: tuple[int, int] | None
    departs: bool

    @property
    def records(self) -> tuple[int, ...]:
        """Places of its records in the pool."""
        return tuple(run.record for cell in self.cells.values() for run in cell.runs)


@dataclass(frozen=True)
class Point:
    """A row in a trade-off.

    Attributes:
        row: The row.
        x: Its cost.
        value: Its mean over all tasks.
        front: Is no other row both at least as good and at most as dear, and better in one of them?
    """

    row: RowView
    x: float
    value: Value
    front: bool


@dataclass(frozen=True)
class Axis:
    """A cost that accuracy is drawn over.

    Attributes:
        id: "parameters", "training" or "inference".
        title: For the axis.
        unit: Short, for the table.
        note: How it is measured, in a sentence.
    """

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
    """What was measured on one kind of machine; times of different ones do not compare.

    Attributes:
        title: Device, processes, precision and scan backend.
        training: Accuracy over training time.
        inference: Accuracy over test time per image.
        images_per_second: Label → training throughput, the mean over the runs that say it.
        memory: Label → largest peak of device memory in MiB.
    """

    title: str
    training: TradeOff
    inference: TradeOff
    images_per_second: Mapping[str, float]
    memory: Mapping[str, float]


@dataclass(frozen=True)
class Hole:
    """Tasks that a row lacks."""

    label: str
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class SectionView:
    """Rows that compare.

    Attributes:
        id: Unique in the page.
        table: What it was made from.
        title: Backbone and track.
        weights: The checkpoint and the first digits of its digest, or "random weights".
        notes: What has to be said of its numbers.
        comparison_notes: What has to be said of the differences to the control.
        rank_notes: Mean ranks, in words.
        rows: Ranked ones first.
        parameters: Accuracy over trained parameters.
        setups: What was measured on which machine; the one with the most rows first.
        holes: Of the rows.
        majority: Task or name of a mean → accuracy of the majority class.
    """

    id: str
    table: Section
    title: str
    weights: str
    notes: tuple[str, ...]
    comparison_notes: tuple[str, ...]
    rank_notes: tuple[str, ...]
    rows: tuple[RowView, ...]
    parameters: TradeOff
    setups: tuple[SetupView, ...]
    holes: tuple[Hole, ...]
    majority: Mapping[str, float]

    @property
    def cells(self) -> list[CellView]:
        """All cells that are shown."""
        return [cell for row in self.rows for cell in row.cells.values()]


@dataclass(frozen=True)
class QuotedView:
    """A method as another source reports it.

    Attributes:
        source: Short name.
        backbone: As the source names it.
        pretrain: What the backbone was pre-trained on.
        method: As the source names it.
        scores: Task id, group or mean → accuracy as printed.
        parameters: As printed, with what the numbers count.
        size: Number of parameters, or None.
        citation: Where it stands.
    """

    source: str
    backbone: str
    pretrain: str
    method: str
    scores: Mapping[str, str]
    parameters: str
    size: float | None
    citation: str


@dataclass(frozen=True)
class OutView:
    """A record that does not enter.

    Attributes:
        why: One word or two.
        detail: One line.
        task: Full name.
        method: Registered name.
        seed: The seed.
        record: Place in the pool.
    """

    why: str
    detail: str
    task: str
    method: str
    seed: int
    record: int


@dataclass(frozen=True)
class TaskView:
    """A task: its full name, its id in the suite, and its title."""

    name: str
    id: str
    title: str
    group: str


@dataclass(frozen=True)
class CurveRun:
    """The learning curves of a run.

    Attributes:
        record: Place of its record in the pool.
        section: Id of the section that holds it; "" for a run that is in no table.
        label: Of its row; of a run in no table, its method and why.
        style: Number of its colour.
        curve: The curves.
    """

    record: int
    section: str
    label: str
    style: int
    curve: Curve


@dataclass(frozen=True)
class Curves:
    """Learning curves of a suite.

    Attributes:
        runs: Those with event files, in the order of the pool.
        without: How many records have none.
    """

    runs: tuple[CurveRun, ...]
    without: int


@dataclass(frozen=True)
class SuiteView:
    """A suite.

    Attributes:
        id: Its name.
        card: Its card.
        tasks: In the order of the columns.
        means: Names of both averages.
        sections: Pre-trained weights first.
        out: Records that do not enter.
        counts: Why they do not → how many.
        problems: Files that are no records.
        quoted: Published numbers.
        curves: Learning curves.
    """

    id: str
    card: SuiteCard
    tasks: tuple[TaskView, ...]
    means: tuple[str, str]
    sections: tuple[SectionView, ...]
    out: tuple[OutView, ...]
    counts: Mapping[str, int]
    problems: tuple[Problem, ...]
    quoted: tuple[QuotedView, ...]
    curves: Curves


@dataclass
class Pool:
    """The records of a page, in the order of task and run, each value stored once.

    Attributes:
        records: The records.
    """

    records: list[Record] = field(default_factory=list)

    def __post_init__(self) -> None:
        unique = {(record.task, record.run_id): record for record in self.records}
        self.records = [unique[key] for key in sorted(unique)]
        self._place = {(record.task, record.run_id): place for place, record in enumerate(self.records)}

    def place(self, record: Record) -> int:
        """Return where `record` stands."""
        return self._place[record.task, record.run_id]

    def to_json(self) -> dict[str, Any]:
        """Return {"fields": names, "values": each value once, "records": a list of places of values a record}."""
        facts = [_facts(record) for record in self.records]
        fields = list(facts[0]) if facts else []
        places: dict[str, int] = {}
        values: list[Any] = []
        rows = []
        for fact in facts:
            row = []
            for name in fields:
                key = json.dumps(fact[name], sort_keys=True)
                if key not in places:
                    places[key] = len(values)
                    values.append(fact[name])
                row.append(places[key])
            rows.append(row)
        return {"fields": fields, "values": values, "records": rows}


@dataclass(frozen=True)
class ReportView:
    """The whole page.

    Attributes:
        suites: Those with the most records on pre-trained weights first.
        pool: All records that the page speaks of.
        newest: When the newest of them was created, as in the record; None without records.
        level: Of the intervals.
        strays: Files and records that belong to no suite.
        runs_root: Where event files were looked for.
    """

    suites: tuple[SuiteView, ...]
    pool: Pool
    newest: str | None
    level: float
    strays: tuple[Problem, ...]
    runs_root: str


def _facts(record: Record) -> dict[str, Any]:
    """What the page says of a record: all but the config and the bits, which its file holds."""
    metrics = record.metrics
    scores = {} if metrics is None else {key: value for key, value in metrics.to_json().items() if key != "per_class"}
    return {
        "run_id": record.run_id,
        "path": f"records/{record.task}/{record.run_id}.json",
        "task": record.task,
        "task_version": record.task_version,
        "method": record.method,
        "method_args": dict(sorted(record.method_args.items())),
        "seed": record.seed,
        "kind": record.kind,
        "status": record.status,
        "status_reason": record.status_reason,
        "created": record.created,
        "metrics": scores,
        "track": track_of(record).words,
        "backbone": record.backbone,
        "checkpoint": record.checkpoint,
        "checkpoint_digest": record.checkpoint_digest,
        "protocol": f"{record.protocol} {record.protocol_version}",
        "stage": record.stage,
        "lists": dict(sorted(record.lists.items())),
        "data_variant": record.data_variant,
        "data_status": record.data_status,
        "data_notes": list(record.data_notes),
        "data_digest": record.data_digest,
        "list_digest": None if record.correct is None else record.correct.list_digest,
        "config_digest": record.config_digest,
        "setting_digest": record.setting_digest,
        "tuned": None if record.tuned is None else record.tuned.to_json(),
        "package_version": record.package_version,
        "commit": record.commit,
        "dirty": record.dirty,
        "libraries": dict(sorted(record.libraries.items())),
        "scan_backend": record.scan_backend,
        "scan_reason": record.scan_reason,
        "device": record.device,
        "device_count": record.device_count,
        "precision": record.precision,
        "parameters": {
            "trainable": record.parameters.trainable,
            "head": record.parameters.head,
            "adapter": record.parameters.adapter,
            "total": record.parameters.total,
        },
        "times": dict(sorted(record.times.items())),
        "epochs": record.epochs,
        "images_per_second": record.images_per_second,
        "peak_memory_mib": record.peak_memory_mib,
        "checkpoint_file": record.checkpoint_file,
    }
