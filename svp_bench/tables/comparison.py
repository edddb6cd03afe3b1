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
    mean_of,
    mean_over_new_tasks,
    over_images,
    paired,
    within,
)
from svp_bench.stats.significance import best_and_second, cell_verdict, holm, rank_cliques, smallest_p
from svp_bench.tables.model import Cell, CellContrast, Comparison, Contrast, Mean, Row, Section, Table, columns_of
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

DEFAULT_CONTROL = "linear"
"""The method that others are compared with if none is named: the result without any adaptation."""


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


def seeds_of_cell(cell: Cell, level: float) -> Estimate:
    """Return the accuracy of a cell with its t interval over new seeds, within 0 and 100."""
    return within(mean_of({cell.task: list(cell.scores.values())}, level=level), 0, 100)


def images_of_cell(cell: Cell, level: float) -> Estimate:
    """Return the accuracy of a cell with its interval over new test images (Wilson); see `accuracy_over_images`."""
    return accuracy_over_images(min(max(cell.mean, 0.0), 100.0), cell.images, level)


def mean_and_intervals(suite: SuiteCard, cells: Mapping[str, Cell], weights: Mapping[str, float], level: float) -> Mean:
    """Return the weighted mean over the tasks of `weights`, with its intervals."""
    images = {task: images_of_cell(cells[task], level) for task in weights}
    return Mean(
        math.fsum(weight * cells[task].mean for task, weight in weights.items()) / math.fsum(weights.values()),
        within(mean_of({task: list(cells[task].scores.values()) for task in weights}, weights, level), 0, 100),
        over_images(images, sources_of(suite), weights),
        any(cells[task].synthetic for task in weights),
    )


def over_new_tasks(suite: SuiteCard, cells: Mapping[str, Cell], level: float) -> Estimate:
    """Return the mean over all tasks with its interval over new tasks."""
    scores = {task: list(cells[task].scores.values()) for task in suite.tasks}
    return within(mean_over_new_tasks(scores, sources_of(suite), level=level), 0, 100)


# ------------------------------------------------------------------------------------------------------------ control


def check_row(tables: Iterable[Table], name: str | None, flag: str) -> None:
    """Raise UsageError if a row was named that no table has; tables without rows have nothing to compare with."""
    rows = [row for table in tables for section in table.sections for row in section.rows]
    names = {known for row in rows for known in (row.method, row.label)}
    if name is not None and names and name not in names:
        raise unknown_name("method or row", name, names, where=flag)


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


def pick_control(rows: Sequence[Row], name: str | None) -> Row | str:
    """Return the row that the others of a section are compared with, or one line: why there is none.

    Args:
        rows: Of the section.
        name: Label or method; None: `DEFAULT_CONTROL`.
    """
    wanted = DEFAULT_CONTROL if name is None else name
    found = rows_named(rows, wanted)
    if len(found) == 1:
        return f"{wanted} has synthetic data, and is not compared" if found[0].synthetic else found[0]
    labels = "; ".join(row.label for row in found or rows)
    if found:
        why = f"{wanted} has {plural(len(found), 'row')} here; name one as the control"
    else:
        why = f"no row {wanted} here to compare with; name a control"
    return f"{why}: --control ROW, one of: {labels}"


def shared_tasks(suite: SuiteCard, row: Row, other: Row) -> list[str]:
    """Return the tasks that both rows have on the same lists of images, with a seed in common, in suite order."""
    return [
        task
        for task in suite.tasks
        if task in row.cells
        and task in other.cells
        and row.cells[task].data == other.cells[task].data
        and set(row.cells[task].seeds) & set(other.cells[task].seeds)
    ]


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
    bits = {task: list(shared_bits(row.cells[task], control.cells[task]).values()) for task in tasks}
    images = {task: difference_over_images(pairs, level) for task, pairs in bits.items() if pairs}
    cells = {
        task: CellContrast(
            within(result.tasks[task], -100, 100), images.get(task), cell_verdict(ours[task], theirs[task], level=level)
        )
        for task in tasks
    }
    least = smallest_p(result.n_sources, tests)
    return Contrast(
        row=row.label,
        tasks=cells,
        these_tasks=within(result.these_tasks, -100, 100),
        new_tasks=within(result.new_tasks, -100, 100),
        images=within(over_images(images, sources), -100, 100) if len(images) == len(tasks) else None,
        p=result.p if least < 1 - level else None,
        holm=None,
        least=least,
        sources=result.n_sources,
    )


def compare_rows(section: Section, name: str | None) -> Comparison | None:
    """Compare the rows of a section with its control; None for random weights or fewer than two complete rows.

    Holm's family is the rows that are compared on all tasks of the suite. A mean over fewer tasks is another quantity:
    such a row neither makes the others' p larger nor gets an adjusted p itself.
    """
    if section.random or sum(row.task_mean is not None and not row.synthetic for row in section.rows) < 2:
        return None
    control = pick_control(section.rows, name)
    if isinstance(control, str):
        return Comparison(None, (), (f"No differences: {control}.",))
    suite, level = section.suite, section.level
    contrasts: list[Contrast] = []
    others = [row for row in section.rows if row is not control and not row.synthetic]
    shared = {row.label: len(shared_tasks(suite, row, control)) for row in others}
    family = sum(count == len(suite.tasks) for count in shared.values())
    remarks = [f"Not compared: {row.label} has synthetic data." for row in section.rows if row.synthetic]
    for row in others:
        found = contrast(suite, row, control, level, family if shared[row.label] == len(suite.tasks) else 1)
        if found is None:
            why = "shares no task with it on the same images and with a seed in common"
            remarks.append(f"Not compared: {row.label} {why}.")
        else:
            contrasts.append(found)
    adjusted = holm({c.row: c.p for c in contrasts if c.p is not None and len(c.tasks) == len(suite.tasks)})
    compared = tuple(replace(found, holm=adjusted.get(found.row)) for found in contrasts)
    return Comparison(control.label, compared, tuple(remarks))


def rank_rows(section: Section) -> Ranks | None:
    """Return the mean ranks of the ranked rows by label, and which are not separated.

    None for fewer than two rows, or fewer sources of tasks than `FEWEST_SOURCES`.
    """
    ranked = [row for row in section.rows if row.rank is not None]
    suite, sources = section.suite, sources_of(section.suite)
    if len(ranked) < 2 or len(sources) < FEWEST_SOURCES:
        return None
    scores = {row.label: {task: row.cells[task].mean for task in suite.tasks} for row in ranked}
    return rank_cliques(scores, sources, level=section.level)


# -------------------------------------------------------------------------------------------------------------- marks


def column_marks(section: Section) -> list[Marks | None]:
    """Return who may be printed as best and second in each column.

    The test and the number of seeds are those of the marks against the control (`stats.cell_verdict`), so that no two
    renderings disagree. A mean is tested by its values seed by seed, for which all of its tasks need the same seeds.
    None where rows do not compare: random weights, synthetic data, lists of images that differ between the rows.
    """
    return [None if section.random else _marks(section, column.weights) for column in columns_of(section.suite)]


def _marks(section: Section, weights: Mapping[str, float]) -> Marks | None:
    rows = [row for row in section.rows if set(weights) <= set(row.cells)]
    synthetic = any(row.cells[task].synthetic for row in rows for task in weights)
    if not rows or synthetic or any(len({row.cells[task].data for row in rows}) > 1 for task in weights):
        return None
    return best_and_second({row.label: _by_seed(row, weights) for row in rows}, level=section.level)


def _by_seed(row: Row, weights: Mapping[str, float]) -> dict[int, float]:
    """Seed → weighted mean over tasks. One value, without a spread, if the seeds differ by task."""
    cells, total = [row.cells[task] for task in weights], math.fsum(weights.values())
    if len({cell.seeds for cell in cells}) > 1:
        return {0: math.fsum(weights[cell.task] * cell.mean for cell in cells) / total}
    return {
        seed: math.fsum(weights[cell.task] * cell.scores[seed] for cell in cells) / total for seed in cells[0].seeds
    }
