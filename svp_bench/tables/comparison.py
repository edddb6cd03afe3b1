"""Statistics of a table: intervals of means, differences to one control, mean ranks.

Rows are compared on the same tasks and the same images only; tasks that share their images are one source.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from svp_bench.core.errors import UsageError, plural, unknown_name
from svp_bench.records.bits import unpack_bits
from svp_bench.stats.estimates import FEWEST_SOURCES, Estimate, Marks, Ranks
from svp_bench.stats.inference import (
    accuracy_over_images,
    difference_over_images,
    group_weights,
    mean_of,
    mean_over_new_tasks,
    over_images,
    paired,
    within,
)
from svp_bench.stats.significance import best_and_second, cell_verdict, holm, rank_cliques, smallest_p
from svp_bench.tables.model import Cell, Comparison, Contrast, Intervals, Row, Section, Table
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "DEFAULT_CONTROL",
    "check_row",
    "column_marks",
    "compare_rows",
    "contrast",
    "find_row",
    "full_groups",
    "images_of_cell",
    "images_of_pair",
    "pick_control",
    "rank_rows",
    "row_intervals",
    "rows_named",
    "seeds_of_cell",
    "shared_bits",
    "shared_tasks",
    "sources_of",
]

DEFAULT_CONTROL = "linear"
"""The method that others are compared with if none is named: what no adaptation at all would give."""


def sources_of(suite: SuiteCard, tasks: Sequence[str] | None = None) -> list[list[str]]:
    """Return the independent sources of images among `tasks` (full names; default: all of the suite).

    A source is the tasks of one group of `same_images`, or any other task alone. In suite order.
    """
    wanted = suite.tasks if tasks is None else [task for task in suite.tasks if task in set(tasks)]
    home = {suite.full(task): number for number, group in enumerate(suite.same_images) for task in group}
    sources: dict[object, list[str]] = {}
    for task in wanted:
        sources.setdefault(home.get(task, task), []).append(task)
    return list(sources.values())


def full_groups(suite: SuiteCard) -> dict[str, tuple[str, ...]]:
    """Return group → full names of its tasks."""
    return {group: tuple(suite.full(task) for task in tasks) for group, tasks in suite.groups.items()}


def seeds_of_cell(cell: Cell, level: float) -> Estimate:
    """Return the accuracy of a cell with its t interval over new seeds, within 0 and 100."""
    return within(mean_of({cell.task: list(cell.scores.values())}, level=level), 0, 100)


def images_of_cell(cell: Cell, level: float) -> Estimate:
    """Return the accuracy of a cell with its interval over new test images (Wilson); see `accuracy_over_images`."""
    return accuracy_over_images(min(max(cell.mean, 0.0), 100.0), cell.images, level)


def row_intervals(suite: SuiteCard, cells: Mapping[str, Cell], level: float) -> Intervals:
    """Return the intervals of a row's means, each within 0 and 100; None for each mean over a missing result."""
    scores = {task: list(cell.scores.values()) for task, cell in cells.items()}
    images = {task: images_of_cell(cell, level) for task, cell in cells.items()}
    groups = full_groups(suite)
    whole = all(task in scores for task in suite.tasks)
    ordered = {task: scores[task] for task in suite.tasks} if whole else {}
    sources, weights = sources_of(suite), group_weights(groups)
    present = [task for task in suite.tasks if task in scores]

    def over(tasks: Sequence[str], by_task: Mapping[str, float] | None = None) -> Estimate:
        return over_images({task: images[task] for task in tasks}, sources, by_task)

    complete = {group: tasks for group, tasks in groups.items() if set(tasks) <= set(scores)}
    found = Intervals(
        groups={
            group: mean_of({task: scores[task] for task in tasks}, level=level) if group in complete else None
            for group, tasks in groups.items()
        },
        task_mean=mean_of(ordered, level=level) if whole else None,
        group_mean=mean_of(ordered, weights=weights, level=level) if whole else None,
        new_tasks=mean_over_new_tasks(ordered, sources, level=level) if whole else None,
        present=within(mean_of({task: scores[task] for task in present}, level=level), 0, 100),
        images=over(present),
        group_images={group: over(tasks) if group in complete else None for group, tasks in groups.items()},
        group_mean_images=over(suite.tasks, weights) if whole else None,
    )
    return replace(
        found,
        groups={group: _possible(estimate) for group, estimate in found.groups.items()},
        task_mean=_possible(found.task_mean),
        group_mean=_possible(found.group_mean),
        new_tasks=_possible(found.new_tasks),
    )


def _possible(estimate: Estimate | None) -> Estimate | None:
    return None if estimate is None else within(estimate, 0, 100)


# ------------------------------------------------------------------------------------------------------------ control


def rows_named(rows: Sequence[Row], name: str) -> list[Row]:
    """Return the row with the label `name`, else all of the method `name`."""
    return [row for row in rows if row.label == name] or [row for row in rows if row.method == name]


def find_row(rows: Sequence[Row], name: str) -> Row | None:
    """Return the row with the label `name`, else the only one of the method `name`; None if there is none.

    Raises:
        UsageError: If the method has several rows.
    """
    found = rows_named(rows, name)
    if len(found) > 1:
        labels = "; ".join(repr(row.label) for row in found)
        raise UsageError(f"{name!r} has {plural(len(found), 'row')}; name one of them: {labels}")
    return found[0] if found else None


def check_row(tables: Iterable[Table], name: str | None, flag: str) -> None:
    """Raise UsageError if a row was named that no table has; tables without rows have nothing to compare with."""
    rows = [row for table in tables for section in table.sections for row in section.rows]
    names = {known for row in rows for known in (row.method, row.label)}
    if name is not None and names and name not in names:
        raise unknown_name("method or row", name, names, where=flag)


def pick_control(rows: Sequence[Row], name: str | None) -> tuple[Row | None, str | None]:
    """Choose the row that the others of a section are compared with.

    Args:
        rows: Of the section.
        name: Label or method; None: `DEFAULT_CONTROL`.

    Returns:
        The row and None, or None and one line: why there is none.
    """
    wanted = DEFAULT_CONTROL if name is None else name
    found = rows_named(rows, wanted)
    labels = "; ".join(row.label for row in rows)
    if not found:
        return None, f"no row {wanted} here to compare with; name a control: --control ROW, one of: {labels}"
    if len(found) > 1:
        labels = "; ".join(row.label for row in found)
        return (
            None,
            f"{wanted} has {plural(len(found), 'row')} here; name one as the control: --control ROW, one of: {labels}",
        )
    if found[0].synthetic:
        return None, f"{wanted} has synthetic data, and is not compared"
    return found[0], None


def shared_tasks(suite: SuiteCard, row: Row, other: Row) -> list[str]:
    """Return the tasks that both rows have on the same lists of images, with a seed in common, in suite order."""
    return [
        task
        for task in suite.tasks
        if task in row.cells
        and task in other.cells
        and _same_images(row.cells[task], other.cells[task])
        and set(row.cells[task].seeds) & set(other.cells[task].seeds)
    ]


def _same_images(cell: Cell, other: Cell) -> bool:
    return (cell.variant, cell.data_digest, cell.task_version) == (
        other.variant,
        other.data_digest,
        other.task_version,
    )


def shared_bits(ours: Cell, theirs: Cell) -> dict[int, tuple[NDArray[np.bool_], NDArray[np.bool_]]]:
    """Return shared seed → the bits of both runs, where they are of one split."""
    others = {run.seed: run.correct for run in theirs.records}
    found = {}
    for run in ours.records:
        mine, other = run.correct, others.get(run.seed)
        if mine is None or other is None or (mine.split_digest, mine.count) != (other.split_digest, other.count):
            continue
        found[run.seed] = (unpack_bits(mine.bits, mine.count), unpack_bits(other.bits, other.count))
    return found


def images_of_pair(ours: Cell, theirs: Cell, level: float) -> Estimate | None:
    """Return the difference of two cells with its interval over new test images; None without bits of one split."""
    bits = list(shared_bits(ours, theirs).values())
    return difference_over_images(bits, level) if bits else None


def contrast(suite: SuiteCard, row: Row, control: Row, level: float, tests: int = 1) -> Contrast | None:
    """Compare `row` with `control` on the tasks that they share; None if there is none. `holm` is left open.

    Args:
        suite: Their suite.
        row: A row.
        control: Another.
        level: Of the intervals; 1 - level is the level of the test.
        tests: Rows that Holm's adjustment is over. If no outcome could reject, p is None.
    """
    tasks = shared_tasks(suite, row, control)
    if not tasks:
        return None
    ours = {task: row.cells[task].scores for task in tasks}
    theirs = {task: control.cells[task].scores for task in tasks}
    sources = sources_of(suite, tasks)
    result = paired(ours, theirs, sources, level=level)
    seeds = [len(set(ours[task]) & set(theirs[task])) for task in tasks]
    images = {task: images_of_pair(row.cells[task], control.cells[task], level) for task in tasks}
    known = {task: estimate for task, estimate in images.items() if estimate is not None}
    least = smallest_p(result.n_sources, tests)
    return Contrast(
        row=row.label,
        setting_digest=row.setting_digest,
        tasks=tuple(tasks),
        seeds=(min(seeds), max(seeds)),
        these_tasks=within(result.these_tasks, -100, 100),
        new_tasks=within(result.new_tasks, -100, 100),
        images=within(over_images(known, sources), -100, 100) if len(known) == len(tasks) else None,
        p=result.p if least < 1 - level else None,
        holm=None,
        least=least,
        sources=result.n_sources,
        verdicts={task: cell_verdict(ours[task], theirs[task], level=level) for task in tasks},
    )


def compare_rows(suite: SuiteCard, section: Section, name: str | None, level: float) -> Comparison | None:
    """Compare the rows of a section with its control; None for random weights or fewer than two complete rows.

    Holm's family is the rows that are compared on all tasks of the suite. A mean over fewer tasks is another quantity:
    such a row neither makes the others' p larger nor gets an adjusted p itself.
    """
    if section.random or sum(row.task_mean is not None and not row.synthetic for row in section.rows) < 2:
        return None
    control, missing = pick_control(section.rows, name)
    if control is None:
        return Comparison(None, missing, (), {})
    contrasts: list[Contrast] = []
    incomparable: dict[str, str] = {}
    others = [row for row in section.rows if row is not control and not row.synthetic]
    family = sum(len(shared_tasks(suite, row, control)) == len(suite.tasks) for row in others)
    for row in section.rows:
        if row is control:
            continue
        if row.synthetic:
            incomparable[row.label] = "has synthetic data"
            continue
        whole = len(shared_tasks(suite, row, control)) == len(suite.tasks)
        found = contrast(suite, row, control, level, family if whole else 1)
        if found is None:
            incomparable[row.label] = "shares no task with it on the same images and with a seed in common"
        else:
            contrasts.append(found)
    whole_p = {c.row: c.p for c in contrasts if len(c.tasks) == len(suite.tasks)}
    adjusted = holm({label: p for label, p in whole_p.items() if p is not None})
    return Comparison(
        control=control.label,
        missing=None,
        contrasts=tuple(replace(found, holm=adjusted.get(found.row)) for found in contrasts),
        incomparable=incomparable,
    )


def rank_rows(suite: SuiteCard, section: Section, level: float) -> Ranks | None:
    """Return the mean ranks of the ranked rows by label, and which are not separated.

    None for fewer than two rows, or fewer sources of tasks than `FEWEST_SOURCES`.
    """
    ranked = [row for row in section.rows if row.rank is not None]
    sources = sources_of(suite)
    if len(ranked) < 2 or len(sources) < FEWEST_SOURCES:
        return None
    scores = {row.label: {task: row.cells[task].mean for task in suite.tasks} for row in ranked}
    return rank_cliques(scores, sources, level=level)


# -------------------------------------------------------------------------------------------------------------- marks


def column_marks(suite: SuiteCard, section: Section, level: float) -> list[Marks | None]:
    """Return who may be printed as best and second in each column: tasks, groups, mean of tasks, mean of groups.

    The test and the number of seeds are those of the marks against the control (`stats.cell_verdict`), so that no two
    renderings disagree. A mean is tested by its values seed by seed, for which all of its tasks need the same seeds.
    None where rows do not compare: random weights, synthetic data, lists of images that differ between the rows.
    """
    groups = full_groups(suite)
    weighings = [*({task: 1.0} for task in suite.tasks), *(dict.fromkeys(tasks, 1.0) for tasks in groups.values())]
    weighings += [dict.fromkeys(suite.tasks, 1.0), group_weights(groups)]
    return [None if section.random else _marks(section, weights, level) for weights in weighings]


def _marks(section: Section, weights: Mapping[str, float], level: float) -> Marks | None:
    rows = [row for row in section.rows if set(weights) <= set(row.cells)]
    images = {
        task: {(row.cells[task].variant, row.cells[task].data_digest, row.cells[task].task_version) for row in rows}
        for task in weights
    }
    synthetic = any(row.cells[task].synthetic for row in rows for task in weights)
    if not rows or synthetic or any(len(kinds) > 1 for kinds in images.values()):
        return None
    return best_and_second({row.label: _by_seed(row, weights) for row in rows}, level=level)


def _by_seed(row: Row, weights: Mapping[str, float]) -> dict[int, float]:
    """Seed → weighted mean over tasks. One value, without a spread, if the seeds differ by task."""
    scores = {task: row.cells[task].scores for task in weights}
    total = math.fsum(weights.values())
    seeds = {tuple(by_seed) for by_seed in scores.values()}
    if len(seeds) > 1:
        means = {task: row.cells[task].mean for task in weights}
        return {0: math.fsum(weights[task] * means[task] for task in weights) / total}
    return {
        seed: math.fsum(weights[task] * scores[task][seed] for task in weights) / total for seed in next(iter(seeds))
    }
