"""Derive the data of the page from tables and their records."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from svp_bench.core.errors import plural
from svp_bench.records.published import WHOLE
from svp_bench.records.record import Record
from svp_bench.records.store import Problem
from svp_bench.report.curves import Curve
from svp_bench.report.model import (
    Axis,
    Bounds,
    CellView,
    CurveRun,
    Point,
    QuotedView,
    RecordPool,
    ReportView,
    RowView,
    Run,
    SectionView,
    SetupView,
    SuiteView,
    TaskView,
    TradeOff,
    Value,
)
from svp_bench.tables.comparison import column_marks, images_of_cell, seeds_of_cell
from svp_bench.tables.measured import spans_of
from svp_bench.tables.model import Cell, Mean, Row, Section, Table
from svp_bench.tables.notes import (
    columns,
    common_notes,
    comparison_notes,
    majority_scores,
    new_tasks_note,
    ranks_notes,
    verdict_marks,
    weights,
)
from svp_bench.tables.quoted import quoted_methods
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    from svp_bench.records.costs import CostFile
    from svp_bench.stats.estimates import Estimate

PARAMETERS = Axis(
    "parameters",
    "trained parameters outside the head",
    "parameters",
    "The mean over the tasks, where a search or the classes of a task change the number.",
)
INFERENCE_MACS = Axis(
    "inference-macs",
    "inference MACs of one image",
    "MACs",
    "The mean over the tasks; the adapter is not merged.",
)
TRAINING_MACS = Axis(
    "training-macs",
    "training MACs of one image",
    "MACs",
    "A forward and a backward pass; the mean over the tasks.",
)
_AS_STATED = "From svp-bench measure, as stated below its table; the adapter is not merged."
STEP = Axis("step", "time of a training step in milliseconds", "ms", _AS_STATED)
LATENCY = Axis("latency", "latency of one image in milliseconds", "ms", _AS_STATED)
TRAINING = Axis(
    "training",
    "training time of a run in seconds",
    "s",
    "The mean over the tasks of the mean over their seeds; validation and test are left out.",
)
INFERENCE = Axis(
    "inference",
    "test time per image in milliseconds",
    "ms",
    "Test seconds over test images, the mean over the tasks, including reading and decoding images and the first call "
    "of a compiled kernel. The adapter is not merged: a method that can be folded into the backbone then costs as much "
    "as the plain backbone.",
)


def report_view(
    tables: Sequence[Table],
    titles: Mapping[str, str],
    curves: Mapping[tuple[str, str], Curve],
    strays: Iterable[Problem] = (),
    runs_root: str = "runs",
) -> ReportView:
    """Derive the data of the page.

    Args:
        tables: One per suite, all with the same confidence level.
        titles: Task → title of its card; by default its id.
        curves: (task, run id) → learning curves.
        strays: Files that belong to no suite.
        runs_root: Folder of the event files, for the page.
    """
    rows = [row for table in tables for section in table.sections for row in section.rows]
    styles = {label: number for number, label in enumerate(sorted({row.label for row in rows}))}
    cells = [cell for row in rows for cell in row.all_cells]
    left_out = [out.record for table in tables for out in table.left_out]
    pool = RecordPool([*(record for cell in cells for record in cell.records), *left_out])
    return ReportView(
        suites=tuple(_suite(table, titles, curves, pool, styles) for table in sorted(tables, key=_weight)),
        pool=pool,
        level=tables[0].level if tables else 0.95,
        strays=tuple(sorted(strays, key=lambda stray: (stray.path, stray.reason))),
        runs_root=runs_root,
    )


def _weight(table: Table) -> tuple[int, str]:
    """Return the sort key of a suite: those with the most records of pre-trained weights and real data come first."""
    rows = [row for section in table.sections if not section.random for row in section.rows if not row.synthetic]
    return -sum(len(cell.records) for row in rows for cell in row.cells.values()), table.suite.name


def _suite(
    table: Table,
    titles: Mapping[str, str],
    curves: Mapping[tuple[str, str], Curve],
    pool: RecordPool,
    styles: Mapping[str, int],
) -> SuiteView:
    suite = table.suite
    tasks = tuple(
        TaskView(suite.full(task), task, titles.get(suite.full(task), task), group)
        for group, members in suite.groups.items()
        for task in members
    )
    sections = tuple(
        _section(f"{suite.name}-{number}", section, table, pool, styles)
        for number, section in enumerate(table.sections, 1)
    )
    named = dict(_named_runs(table, pool, styles))
    runs = tuple(
        CurveRun(place, *named[place], curves[record.task, record.run_id])
        for place, record in enumerate(pool.records)
        if place in named and (record.task, record.run_id) in curves
    )
    return SuiteView(table, tasks, sections, tuple(_quoted(table)), runs, len(named) - len(runs))


def _section(name: str, section: Section, table: Table, pool: RecordPool, styles: Mapping[str, int]) -> SectionView:
    suite, level = table.suite, table.level
    standings, verdicts = _standings(section), verdict_marks(section)

    def cell_view(row: Row, task: str, cell: Cell) -> CellView:
        scored = [(run, run.metrics.top1) for run in cell.records if run.metrics is not None]
        runs = tuple(Run(run.seed, top1, pool.place(run)) for run, top1 in scored)
        value = Value(cell.mean, _bounds(seeds_of_cell(cell, level)), images=_bounds(images_of_cell(cell, level)))
        verdict = verdicts.get(row.label, {}).get(task, "")
        return CellView(cell, value, runs, standings.get((task, row.label), ""), verdict)

    rows = []
    for row in section.rows:
        cells = {task: cell_view(row, task, row.cells[task]) for task in suite.tasks if task in row.cells}
        rows.append(_row(row, suite, cells, styles[row.label]))
    majority = zip([*suite.tasks, *columns(suite)[len(suite.tasks) :]], majority_scores(section), strict=True)
    return SectionView(
        table=section,
        id=name,
        title=", ".join([*([section.data] if section.data else []), section.first.backbone, section.track.title]),
        weights=weights(section),
        notes=(*common_notes(section), *new_tasks_note(section)),
        comparison_notes=(*comparison_notes(section), *ranks_notes(section)),
        rows=tuple(rows),
        parameters=_over_tasks(name, PARAMETERS, lambda run: run.parameters.adapter, rows),
        further=tuple(trade for trade in (*_macs(name, rows), *_machine(name, rows, table.costs)) if trade.points),
        setups=_setups(name, rows),
        majority={name: score for name, score in majority if score is not None},
    )


def _standings(section: Section) -> dict[tuple[str, str], str]:
    """Return (task, label) → "best", "second" or "tied", as in LaTeX tables."""
    found: dict[tuple[str, str], str] = {}
    for task, known in zip(section.suite.tasks, column_marks(section), strict=False):  # those of the means come after
        if known is None:
            continue
        all_tied = len(known.tied) == sum(task in row.cells for row in section.rows)
        tied = () if all_tied else known.tied
        for standing, labels in (("best", [known.best]), ("second", [known.second]), ("tied", tied)):
            found.update({(task, label): standing for label in labels if label is not None})
    return found


def _row(row: Row, suite: SuiteCard, cells: Mapping[str, CellView], style: int) -> RowView:
    *groups, whole, of_groups = map(_value, row.means)
    present = Value(row.present.value, _bounds(row.present.seeds), _bounds(row.new_tasks), _bounds(row.present.images))
    return RowView(
        table=row,
        style=style,
        cells=cells,
        missing=tuple(task for task in suite.tasks if task not in row.cells),
        task_mean=whole and present,
        present=replace(present, partial=row.partial),
        group_mean=of_groups,
        groups=dict(zip(suite.groups, groups, strict=True)),
    )


def _value(mean: Mean | None) -> Value | None:
    return None if mean is None else Value(mean.value, _bounds(mean.seeds), None, _bounds(mean.images))


def _bounds(estimate: Estimate | None) -> Bounds | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high


# --- trade-offs ------------------------------------------------------------------------------------------------------


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return which (cost, accuracy) points are on the Pareto front.

    A point is off the front if another one costs at most as much, is at least as accurate, and is not equal to it.
    """
    return [not any(x <= cost and y >= score and (x, y) != (cost, score) for x, y in points) for cost, score in points]


def _trade_off(name: str, axis: Axis, costs: Mapping[str, float], rows: Sequence[RowView], why: str) -> TradeOff:
    """Return accuracy over a cost for the complete rows that have a cost; `why` is the reason for the others."""
    shown = [(row, costs[row.label], row.task_mean) for row in rows if row.label in costs and row.task_mean is not None]
    on_front = front([(cost, value.mean) for _, cost, value in shown])
    missing = {}
    for row in rows:
        if row.missing:
            tasks = plural(len(row.cells) + len(row.missing), "task")
            missing[row.label] = f"is partial: {len(row.cells)} of {tasks}"
        elif row.label not in costs:
            missing[row.label] = why
    points = (Point(*entry, is_on) for entry, is_on in zip(shown, on_front, strict=True))
    return TradeOff(name, axis, tuple(points), missing)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _over_tasks(
    name: str, axis: Axis, cost: Callable[[Record], float | None], rows: Sequence[RowView], why: str = ""
) -> TradeOff:
    """Return accuracy over a cost that records state: the mean over the tasks of the mean over their seeds."""
    costs = {}
    for row in rows:
        cells = [[cost(run) for run in cell.records] for cell in row.table.cells.values()]
        known = [[value for value in values if value is not None] for values in cells]
        if known == cells:
            costs[row.label] = _mean(map(_mean, known))
    return _trade_off(f"{name}-{axis.id}", axis, costs, rows, why)


def _macs(name: str, rows: Sequence[RowView]) -> Iterator[TradeOff]:
    why = "its records state no multiplications"
    yield _over_tasks(name, INFERENCE_MACS, lambda run: getattr(run.efficiency, "inference_macs", None), rows, why)
    yield _over_tasks(name, TRAINING_MACS, lambda run: getattr(run.efficiency, "training_macs", None), rows, why)


def _machine(name: str, rows: Sequence[RowView], costs: CostFile | None) -> Iterator[TradeOff]:
    """Yield accuracy over the measured times; of a row with several settings, over the largest."""
    spans = {row.label: spans_of(costs, row.table) for row in rows}
    for axis, measure in ((STEP, "step_ms"), (LATENCY, "latency_ms")):
        times = {label: found[measure][1] for label, found in spans.items() if measure in found}
        yield _trade_off(f"{name}-{axis.id}", axis, times, rows, "it was not measured")


def _setup(record: Record) -> tuple[str, int, str, str]:
    return record.device, record.device_count, record.precision, record.scan_backend or ""


def _setups(name: str, rows: Sequence[RowView]) -> tuple[SetupView, ...]:
    """Return the measurements by kind of machine; a row is shown if all of its tasks ran on that kind."""
    runs = [run for row in rows for cell in row.table.cells.values() for run in cell.records]
    setups = sorted({_setup(run) for run in runs})
    found = [_measured(f"{name}-{number}", setup, rows) for number, setup in enumerate(setups, 1)]
    timed = [view for view in found if view.training.points or view.inference.points]
    return tuple(sorted(timed, key=lambda view: -len(view.inference.points)))


def _measured(name: str, setup: tuple[str, int, str, str], rows: Sequence[RowView]) -> SetupView:
    costs: dict[str, dict[str, float]] = {"training": {}, "inference": {}}
    throughput: dict[str, float] = {}
    memory: dict[str, float] = {}
    times: dict[str, Callable[[Record], float | None]] = {"training": _train_seconds, "inference": _milliseconds}
    for row in rows:
        cells = [[run for run in cell.records if _setup(run) == setup] for cell in row.table.cells.values()]
        for axis, time in times.items():
            timed = [[value for run in runs if (value := time(run)) is not None] for runs in cells]
            if all(timed):
                costs[axis][row.label] = _mean(map(_mean, timed))
        here = [run for runs in cells for run in runs]
        rates = [run.images_per_second for run in here if run.images_per_second is not None]
        peaks = [run.peak_memory_mib for run in here if run.peak_memory_mib is not None]
        if rates:
            throughput[row.label] = _mean(rates)
        if peaks:
            memory[row.label] = max(peaks)
    device, count, precision, backend = setup
    why = "not all of its tasks were run on this machine"
    title = f"{device}, {plural(count, 'process')}, precision {precision}"
    return SetupView(
        title=f"{title}, scan backend {backend}" if backend else title,
        training=_trade_off(f"{name}-training", TRAINING, costs["training"], rows, why),
        inference=_trade_off(f"{name}-inference", INFERENCE, costs["inference"], rows, why),
        images_per_second=throughput,
        memory=memory,
    )


def _train_seconds(run: Record) -> float | None:
    return run.times.get("train_seconds")


def _milliseconds(run: Record) -> float | None:
    seconds, count = run.times.get("test_seconds", 0), run.metrics.count if run.metrics else 0
    return 1000 * seconds / count if seconds > 0 and count > 0 else None


# --- published numbers and curves ------------------------------------------------------------------------------------

_FACTORS = {"params": 1.0, "params_k": 1e3, "params_m": 1e6}


def _quoted(table: Table) -> Iterator[QuotedView]:
    sizes: dict[tuple[str, ...], float] = {}
    for row in table.published:
        if row.task_or_group == WHOLE and row.metric in _FACTORS:
            sizes.setdefault((row.source, row.backbone, row.pretrain, row.method), row.number * _FACTORS[row.metric])
    for row, scores, parameters in quoted_methods(table):
        size = sizes.get((row.source, row.backbone, row.pretrain, row.method))
        yield QuotedView(row, scores, parameters, size)


def _named_runs(
    table: Table, pool: RecordPool, styles: Mapping[str, int]
) -> Iterator[tuple[int, tuple[str, str, int]]]:
    """Yield the place of each run of a table, with its section, label and style; excluded runs have no section."""
    for number, section in enumerate(table.sections, 1):
        for row in section.rows:
            for cell in row.all_cells:
                for record in cell.records:
                    yield pool.place(record), (f"{table.suite.name}-{number}", row.label, styles[row.label])
    for out in table.left_out:
        style = styles.get(out.record.method, len(styles))
        yield pool.place(out.record), ("", f"{out.record.method}, {out.why}", style)
