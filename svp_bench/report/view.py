"""What the page shows, derived from tables and their records: places in the pool, intervals, costs and fronts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from svp_bench.core.errors import plural
from svp_bench.records.published import WHOLE, mean_names
from svp_bench.records.record import Record
from svp_bench.records.store import Problem
from svp_bench.report.curves import Curve
from svp_bench.report.model import (
    Axis,
    Bounds,
    CellView,
    CurveRun,
    Curves,
    Hole,
    OutView,
    Point,
    Pool,
    QuotedView,
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
from svp_bench.stats.inference import one_standard_error
from svp_bench.tables.comparison import column_marks, images_of_cell, seeds_of_cell
from svp_bench.tables.model import Cell, LeftOut, Row, Section, Table
from svp_bench.tables.notes import (
    STAND_IN,
    choice_notes,
    comparison_notes,
    data_notes,
    departure_notes,
    dirty_notes,
    majority_notes,
    majority_scores,
    marks,
    new_tasks_note,
    one_line,
    partial,
    partial_notes,
    provenance_notes,
    ranks_notes,
    short_name,
    verdict_marks,
    weights,
)
from svp_bench.tables.quoted import quoted_methods
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    from svp_bench.stats.inference import Estimate

__all__ = ["front", "report_view"]

PARAMETERS = Axis(
    "parameters",
    "trained parameters outside the head",
    "parameters",
    "The mean over the tasks, where a search or the classes of a task change the number.",
)
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
    "Test seconds over test images, the mean over the tasks; reading and decoding the images is in it, and so is "
    "the first call of a compiled kernel. The adapter is not merged: a method that can be folded into the backbone "
    "costs what the plain backbone costs once it is.",
)


def report_view(
    tables: Sequence[Table],
    titles: Mapping[str, str],
    curves: Mapping[tuple[str, str], Curve],
    strays: Iterable[Problem] = (),
    runs_root: str = "runs",
) -> ReportView:
    """Derive what the page shows.

    Args:
        tables: One a suite, all of one level.
        titles: Task → title of its card; a task without one is called by its id.
        curves: (task, run id) → its learning curve.
        strays: Files that belong to no suite.
        runs_root: Where the curves were looked for; the page names it.
    """
    pool = Pool([record for table in tables for record in _records(table)])
    labels = sorted({row.label for table in tables for section in table.sections for row in section.rows})
    styles = {label: number for number, label in enumerate(labels)}
    return ReportView(
        suites=tuple(_suite(table, titles, curves, pool, styles) for table in sorted(tables, key=_weight)),
        pool=pool,
        newest=max((record.created for record in pool.records), default=None),
        level=tables[0].level if tables else 0.95,
        strays=tuple(sorted(strays, key=lambda stray: (stray.path, stray.reason))),
        runs_root=runs_root,
    )


def _weight(table: Table) -> tuple[int, str]:
    """Suites with many records on pre-trained weights and real data come first."""
    rows = [row for section in table.sections if not section.random for row in section.rows if not row.drawn]
    return -sum(len(cell.records) for row in rows for cell in row.cells.values()), table.suite.name


def _records(table: Table) -> Iterable[Record]:
    for section in table.sections:
        for row in section.rows:
            for cell in (*row.cells.values(), *row.apart):
                yield from cell.records
    for out in table.left_out:
        yield out.record


def _suite(
    table: Table,
    titles: Mapping[str, str],
    curves: Mapping[tuple[str, str], Curve],
    pool: Pool,
    styles: Mapping[str, int],
) -> SuiteView:
    suite = table.suite
    tasks = tuple(
        TaskView(suite.full(task), task, titles.get(suite.full(task), task), group)
        for group, members in suite.groups.items()
        for task in members
    )
    sections = tuple(
        _section(f"{suite.name}-{number}", section, suite, table.level, pool, styles)
        for number, section in enumerate(table.sections, 1)
    )
    return SuiteView(
        id=suite.name,
        card=suite,
        tasks=tasks,
        means=mean_names(suite),
        sections=sections,
        out=tuple(_out(out, pool) for out in table.left_out),
        counts=dict(sorted(Counter(out.why for out in table.left_out).items())),
        problems=table.problems,
        quoted=tuple(_quoted(table)),
        curves=_curves(table, curves, pool, styles),
    )


def _out(out: LeftOut, pool: Pool) -> OutView:
    return OutView(out.why, out.detail, out.record.task, out.record.method, out.record.seed, pool.place(out.record))


def _section(
    name: str, section: Section, suite: SuiteCard, level: float, pool: Pool, styles: Mapping[str, int]
) -> SectionView:
    standings = _standings(section, suite, level)
    verdicts = verdict_marks(section)
    rows = tuple(
        _row(f"{name}-{number}", row, suite, level, pool, styles[row.label], standings, verdicts)
        for number, row in enumerate(section.rows, 1)
    )
    return SectionView(
        id=name,
        table=section,
        title=", ".join([*([section.data] if section.data else []), section.backbone, section.track.title]),
        weights=weights(section),
        notes=tuple(_notes(section, suite)),
        comparison_notes=tuple(comparison_notes(section, suite, level)),
        rank_notes=tuple(ranks_notes(section, level)),
        rows=rows,
        parameters=_parameters(name, section.rows, rows),
        setups=_setups(name, section.rows, rows),
        holes=tuple(Hole(row.label, row.missing) for row in rows if row.missing),
        majority={
            name: score
            for name, score in zip(
                [*suite.tasks, *suite.groups, *mean_names(suite)], majority_scores(section, suite), strict=True
            )
            if score is not None
        },
    )


def _notes(section: Section, suite: SuiteCard) -> Iterable[str]:
    cells = [cell for row in section.rows for cell in row.cells.values()]
    single = sorted({row.label for row in section.rows if row.seeds[0] == 1})
    if single:
        yield (
            "No interval over new seeds where a task has one seed only, for its variance is unknown: "
            f"{'; '.join(single)}. The interval over test images takes its place: it is about these runs."
        )
    if any(cell.std == 0 for cell in cells):
        yield "No interval over new seeds where all seeds gave the same number: their variance is unknown, not zero."
    yield from partial_notes(section, suite)
    yield from majority_notes(section)
    yield from new_tasks_note(section, suite)
    yield from choice_notes(section)
    yield from departure_notes(section)
    yield from provenance_notes(section)
    if any("†" in marks(cell) for cell in cells):
        yield "† The files on disk differ from the task card in count or digest; the records say how."
    variants = sorted({f"{short_name(cell.task)} ({cell.variant})" for cell in cells if "‡" in marks(cell)})
    if variants:
        yield f"‡ Another variant of the data than the card's own: {', '.join(variants)}."
    if any(cell.drawn for cell in cells):
        yield STAND_IN
    yield from data_notes(section, suite)
    yield from dirty_notes(section)
    shared = "; ".join(", ".join(group) for group in suite.same_images)
    if shared:
        yield f"Tasks that share their images, and count as one source: {shared}."


def _standings(section: Section, suite: SuiteCard, level: float) -> dict[tuple[str, str], str]:
    """(Task, label) → "best", "second" or "tied", as `column_marks` has it, and so the same as in LaTeX."""
    found: dict[tuple[str, str], str] = {}
    of_tasks = column_marks(suite, section, level)[: len(suite.tasks)]  # those of the means stand behind
    for task, known in zip(suite.tasks, of_tasks, strict=True):
        if known is None:
            continue
        told = len(known.tied) < sum(task in row.cells for row in section.rows)  # all tied: a mark would say nothing
        tied = known.tied if told else ()
        for standing, labels in (("best", [known.best]), ("second", [known.second]), ("tied", tied)):
            found.update({(task, label): standing for label in labels if label is not None})
    return found


def _row(
    name: str,
    row: Row,
    suite: SuiteCard,
    level: float,
    pool: Pool,
    style: int,
    standings: Mapping[tuple[str, str], str],
    verdicts: Mapping[str, Mapping[str, str]],
) -> RowView:
    known = row.intervals
    return RowView(
        id=name,
        label=row.label,
        method=row.method,
        style=style,
        rank=row.rank,
        cells={
            task: _cell(
                row.cells[task],
                level,
                pool,
                standings.get((task, row.label), ""),
                verdicts.get(row.label, {}).get(task, ""),
            )
            for task in suite.tasks
            if task in row.cells
        },
        apart=tuple(_cell(cell, level, pool) for cell in row.apart),
        missing=tuple(task for task in suite.tasks if task not in row.cells),
        task_mean=_value(row.task_mean, known.task_mean, known.new_tasks, known.images),
        present=Value(
            row.present_mean,
            _bounds(known.present),
            _bounds(known.new_tasks),
            _bounds(known.images),
            partial(row, suite),
        ),
        group_mean=_value(row.group_mean, known.group_mean, None, known.group_mean_images),
        groups={
            group: _value(row.groups[group], known.groups[group], None, known.group_images[group])
            for group in suite.groups
        },
        seeds=row.seeds,
        trainable=row.adapter,
        trials=row.trials,
        departs=bool(row.departures),
    )


def _value(mean: float | None, these: Estimate | None, new: Estimate | None, images: Estimate | None) -> Value | None:
    return None if mean is None else Value(mean, _bounds(these), _bounds(new), _bounds(images))


def _bounds(estimate: Estimate | None) -> Bounds | None:
    if estimate is None or estimate.low is None or estimate.high is None:
        return None
    return estimate.low, estimate.high


def _cell(cell: Cell, level: float, pool: Pool, standing: str = "", verdict: str = "") -> CellView:
    runs = tuple(
        Run(record.seed, record.metrics.top1, pool.place(record))
        for record in cell.records
        if record.metrics is not None
    )
    return CellView(
        task=cell.task,
        value=Value(cell.mean, _bounds(seeds_of_cell(cell, level)), images=_bounds(images_of_cell(cell, level))),
        std=cell.std,
        images=cell.images,
        binomial=one_standard_error(cell.mean, cell.images),
        runs=runs,
        marks=marks(cell),
        variant=cell.variant,
        standing=standing,
        verdict=verdict,
    )


# --------------------------------------------------------------------------------------------------------- trade-offs


def front(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Tell which (cost, accuracy) points are on the Pareto front: cheap and accurate is good.

    A point is off the front if another one is at most as dear and at least as accurate, and not equal to it.
    """
    return [
        not any(
            cost <= own_cost and score >= own_score and (cost, score) != (own_cost, own_score) for cost, score in points
        )
        for own_cost, own_score in points
    ]


def _trade_off(name: str, axis: Axis, costs: Mapping[str, float], rows: Sequence[RowView], why: str) -> TradeOff:
    """Draw the complete rows that have a cost."""
    shown = [(row, costs[row.id], row.task_mean) for row in rows if row.id in costs and row.task_mean is not None]
    on_front = front([(cost, value.mean) for _, cost, value in shown])
    missing = {
        row.label: (
            f"is partial: {len(row.cells)} of {plural(len(row.cells) + len(row.missing), 'task')}"
            if row.missing
            else why
        )
        for row in rows
        if row.task_mean is None or row.id not in costs
    }
    points = [Point(row, cost, value, is_on) for (row, cost, value), is_on in zip(shown, on_front, strict=True)]
    return TradeOff(name, axis, tuple(points), missing)


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


def _parameters(name: str, rows: Sequence[Row], views: Sequence[RowView]) -> TradeOff:
    costs = {
        view.id: _mean(_mean(run.parameters.adapter for run in cell.records) for cell in row.cells.values())
        for row, view in zip(rows, views, strict=True)
    }
    return _trade_off(f"{name}-parameters", PARAMETERS, costs, views, "")


Setup = tuple[str, int, str, str]


def _setup(record: Record) -> Setup:
    return record.device, record.device_count, record.precision, record.scan_backend


def _setups(name: str, rows: Sequence[Row], views: Sequence[RowView]) -> tuple[SetupView, ...]:
    """Times by kind of machine: a row counts on the machines that have run all of its tasks."""
    setups = sorted({_setup(run) for row in rows for cell in row.cells.values() for run in cell.records})
    found = [_measured(f"{name}-{number}", setup, rows, views) for number, setup in enumerate(setups, 1)]
    kept = [view for view in found if view.training.points or view.inference.points]
    return tuple(sorted(kept, key=lambda view: -len(view.inference.points)))


def _measured(name: str, setup: Setup, rows: Sequence[Row], views: Sequence[RowView]) -> SetupView:
    training: dict[str, float] = {}
    inference: dict[str, float] = {}
    throughput: dict[str, float] = {}
    memory: dict[str, float] = {}
    for row, view in zip(rows, views, strict=True):
        cells = [[run for run in cell.records if _setup(run) == setup] for cell in row.cells.values()]
        trained = [[run.times["train_seconds"] for run in runs if "train_seconds" in run.times] for runs in cells]
        tested = [
            [1000 * run.times["test_seconds"] / run.metrics.count for run in runs if _was_timed(run) and run.metrics]
            for runs in cells
        ]
        if all(trained):
            training[view.id] = _mean(map(_mean, trained))
        if all(tested):
            inference[view.id] = _mean(map(_mean, tested))
        here = [run for runs in cells for run in runs]
        rates = [run.images_per_second for run in here if run.images_per_second is not None]
        peaks = [run.peak_memory_mib for run in here if run.peak_memory_mib is not None]
        if rates:
            throughput[view.label] = _mean(rates)
        if peaks:
            memory[view.label] = max(peaks)
    device, count, precision, backend = setup
    processes = plural(count, "process")
    why = "not all of its tasks were run on this machine"
    return SetupView(
        title=f"{device}, {processes}, precision {precision}, scan backend {backend}",
        training=_trade_off(f"{name}-training", TRAINING, training, views, why),
        inference=_trade_off(f"{name}-inference", INFERENCE, inference, views, why),
        images_per_second=throughput,
        memory=memory,
    )


def _was_timed(run: Record) -> bool:
    return run.times.get("test_seconds", 0) > 0 and run.metrics is not None and run.metrics.count > 0


# ---------------------------------------------------------------------------------------------------------- published

_FACTORS = {"params": 1.0, "params_k": 1e3, "params_m": 1e6}


def _quoted(table: Table) -> Iterable[QuotedView]:
    sizes: dict[tuple[str, ...], float] = {}
    for row in table.published:
        if row.task_or_group == WHOLE and row.metric in _FACTORS:
            key = (row.source, row.backbone, row.pretrain, row.method)
            sizes.setdefault(key, row.number * _FACTORS[row.metric])
    for row, scores, parameters in quoted_methods(table):
        yield QuotedView(
            source=row.source,
            backbone=row.backbone,
            pretrain=row.pretrain,
            method=row.method,
            scores=scores,
            parameters=parameters,
            size=sizes.get((row.source, row.backbone, row.pretrain, row.method)),
            citation=one_line(row.citation),
        )


# ------------------------------------------------------------------------------------------------------------- curves


def _curves(table: Table, curves: Mapping[tuple[str, str], Curve], pool: Pool, styles: Mapping[str, int]) -> Curves:
    """The curves of all runs that the table knows; one that does not enter is called by its method and why."""
    named: dict[int, tuple[Record, str, str, int]] = {}
    for number, section in enumerate(table.sections, 1):
        for row in section.rows:
            for cell in (*row.cells.values(), *row.apart):
                for record in cell.records:
                    home = f"{table.suite.name}-{number}"
                    named[pool.place(record)] = (record, home, row.label, styles[row.label])
    for out in table.left_out:
        style = styles.get(out.record.method, len(styles))
        named[pool.place(out.record)] = (out.record, "", f"{out.record.method}, {out.why}", style)
    runs = [
        CurveRun(place, home, label, style, curves[record.task, record.run_id])
        for place, (record, home, label, style) in sorted(named.items())
        if (record.task, record.run_id) in curves
    ]
    return Curves(tuple(runs), without=len(named) - len(runs))
