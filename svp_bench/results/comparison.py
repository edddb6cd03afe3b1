"""What a table says with statistics: intervals of means, differences to one control, mean ranks.

Rows are compared on the same tasks and the same pictures only; tasks that share their pictures are one source.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from svp_bench.cards import SuiteCard
from svp_bench.errors import UsageError
from svp_bench.results.rows import Cell, Comparison, Contrast, Intervals, Row, Section
from svp_bench.results.stats import (
    Marks,
    Ranks,
    best_and_second,
    cell_verdict,
    group_weights,
    holm,
    mean_of,
    mean_over_new_tasks,
    paired,
    rank_cliques,
)

__all__ = [
    "DEFAULT_CONTROL",
    "column_marks",
    "compare_rows",
    "contrast",
    "find_row",
    "full_groups",
    "pick_control",
    "rank_rows",
    "row_intervals",
    "rows_named",
    "shared_tasks",
    "sources_of",
]

DEFAULT_CONTROL = "linear"
"""The method that others are compared with if none is named: what no adaptation at all would give."""


def sources_of(suite: SuiteCard, tasks: Sequence[str] | None = None) -> list[list[str]]:
    """Return the independent sources of pictures among `tasks` (full names; default: all of the suite).

    A source is the tasks of one group of `same_pictures`, or any other task alone. In suite order.
    """
    wanted = suite.tasks if tasks is None else [task for task in suite.tasks if task in set(tasks)]
    home = {f"{suite.name}/{task}": number for number, group in enumerate(suite.same_pictures) for task in group}
    sources: dict[object, list[str]] = {}
    for task in wanted:
        sources.setdefault(home.get(task, task), []).append(task)
    return list(sources.values())


def full_groups(suite: SuiteCard) -> dict[str, tuple[str, ...]]:
    """Return group → full names of its tasks."""
    return {group: tuple(f"{suite.name}/{task}" for task in tasks) for group, tasks in suite.groups.items()}


def row_intervals(suite: SuiteCard, cells: Mapping[str, Cell], level: float) -> Intervals:
    """Return the intervals of a row's means; None for each mean over a hole."""
    scores = {task: list(cell.scores.values()) for task, cell in cells.items()}
    groups = full_groups(suite)
    whole = all(task in scores for task in suite.tasks)
    ordered = {task: scores[task] for task in suite.tasks} if whole else {}
    return Intervals(
        groups={
            group: mean_of({task: scores[task] for task in tasks}, level=level) if set(tasks) <= set(scores) else None
            for group, tasks in groups.items()
        },
        task_mean=mean_of(ordered, level=level) if whole else None,
        group_mean=mean_of(ordered, weights=group_weights(groups), level=level) if whole else None,
        new_tasks=mean_over_new_tasks(ordered, sources_of(suite), level=level) if whole else None,
    )


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
        raise UsageError(f"{name!r} has {len(found)} rows; name one of them: {labels}")
    return found[0] if found else None


def pick_control(rows: Sequence[Row], name: str | None) -> tuple[Row | None, str | None]:
    """Choose the row that the others of a section are compared with.

    Args:
        rows: Of the section.
        name: Label or method; None: `DEFAULT_CONTROL`.

    Returns:
        The row and None, or None and one line that says why there is none.
    """
    wanted = DEFAULT_CONTROL if name is None else name
    found = rows_named(rows, wanted)
    labels = "; ".join(row.label for row in rows)
    if not found:
        return None, f"no row {wanted} here to compare with; name a control: --control ROW, one of: {labels}"
    if len(found) > 1:
        labels = "; ".join(row.label for row in found)
        return None, f"{wanted} has {len(found)} rows here; name one as the control: --control ROW, one of: {labels}"
    if found[0].drawn:
        return None, f"{wanted} has a drawn stand-in among its data, and no row is compared with that"
    return found[0], None


def shared_tasks(suite: SuiteCard, row: Row, other: Row) -> list[str]:
    """Return the tasks that both rows have on the same lists of pictures, with a seed in common, in suite order."""
    return [
        task
        for task in suite.tasks
        if task in row.cells
        and task in other.cells
        and _same_pictures(row.cells[task], other.cells[task])
        and set(row.cells[task].seeds) & set(other.cells[task].seeds)
    ]


def _same_pictures(cell: Cell, other: Cell) -> bool:
    return (cell.variant, cell.data_digest, cell.task_version) == (
        other.variant,
        other.data_digest,
        other.task_version,
    )


def contrast(suite: SuiteCard, row: Row, control: Row, level: float) -> Contrast | None:
    """Compare `row` with `control` on the tasks that they share; None if there is none. `holm` is left open."""
    tasks = shared_tasks(suite, row, control)
    if not tasks:
        return None
    ours = {task: row.cells[task].scores for task in tasks}
    theirs = {task: control.cells[task].scores for task in tasks}
    sources = sources_of(suite, tasks)
    result = paired(ours, theirs, sources, level=level)
    seeds = [len(set(ours[task]) & set(theirs[task])) for task in tasks]
    return Contrast(
        row=row.label,
        setting_digest=row.setting_digest,
        tasks=tuple(tasks),
        seeds=(min(seeds), max(seeds)),
        these_tasks=result.these_tasks,
        new_tasks=result.new_tasks,
        p=result.p,
        holm=None,
        sources=result.n_sources,
        verdicts={task: cell_verdict(ours[task], theirs[task], level=level) for task in tasks},
    )


def compare_rows(suite: SuiteCard, section: Section, name: str | None, level: float) -> Comparison | None:
    """Compare the rows of a section with its control; None for fewer than two ranked rows.

    Holm's family is the rows that are compared on all tasks of the suite. A mean over fewer tasks is another quantity:
    such a row neither makes the others' p larger nor gets an adjusted p itself.
    """
    if sum(row.rank is not None for row in section.rows) < 2:
        return None
    control, missing = pick_control(section.rows, name)
    if control is None:
        return Comparison(None, missing, (), {})
    contrasts: list[Contrast] = []
    incomparable: dict[str, str] = {}
    for row in section.rows:
        if row is control:
            continue
        if row.drawn:
            incomparable[row.label] = "has a drawn stand-in among its data"
            continue
        found = contrast(suite, row, control, level)
        if found is None:
            incomparable[row.label] = "shares no task with it on the same pictures and with a seed in common"
        else:
            contrasts.append(found)
    adjusted = holm({found.row: found.p for found in contrasts if len(found.tasks) == len(suite.tasks)})
    return Comparison(
        control=control.label,
        missing=None,
        contrasts=tuple(replace(found, holm=adjusted.get(found.row)) for found in contrasts),
        incomparable=incomparable,
    )


def rank_rows(suite: SuiteCard, section: Section, level: float) -> Ranks | None:
    """Return the mean ranks of the ranked rows by label, and which are not told apart; None for fewer than two rows."""
    ranked = [row for row in section.rows if row.rank is not None]
    if len(ranked) < 2:
        return None
    scores = {row.label: {task: row.cells[task].mean for task in suite.tasks} for row in ranked}
    return rank_cliques(scores, sources_of(suite), level=level)


# -------------------------------------------------------------------------------------------------------------- marks


def column_marks(suite: SuiteCard, section: Section, level: float) -> list[Marks | None]:
    """Return who may be printed as best and second in each column: tasks, groups, mean of tasks, mean of groups.

    The test and the number of seeds are those of the marks against the control (`stats.cell_verdict`), so that no two
    renderings disagree. A mean is tested by its values seed by seed, for which all of its tasks need the same seeds.
    None where rows do not compare: random weights, a drawn stand-in, lists of pictures that differ between the rows.
    """
    groups = full_groups(suite)
    weighings = [*({task: 1.0} for task in suite.tasks), *(dict.fromkeys(tasks, 1.0) for tasks in groups.values())]
    weighings += [dict.fromkeys(suite.tasks, 1.0), group_weights(groups)]
    return [None if section.random else _marks(section, weights, level) for weights in weighings]


def _marks(section: Section, weights: Mapping[str, float], level: float) -> Marks | None:
    rows = [row for row in section.rows if set(weights) <= set(row.cells)]
    pictures = {
        task: {(row.cells[task].variant, row.cells[task].data_digest, row.cells[task].task_version) for row in rows}
        for task in weights
    }
    drawn = any(row.cells[task].drawn for row in rows for task in weights)
    if not rows or drawn or any(len(kinds) > 1 for kinds in pictures.values()):
        return None
    return best_and_second({row.label: _by_seed(row, weights) for row in rows}, level=level)


def _by_seed(row: Row, weights: Mapping[str, float]) -> dict[int, float]:
    """Seed → weighted mean over tasks. One value, from which nothing can be told, if the seeds differ by task."""
    scores = {task: row.cells[task].scores for task in weights}
    total = math.fsum(weights.values())
    seeds = {tuple(by_seed) for by_seed in scores.values()}
    if len(seeds) > 1:
        means = {task: row.cells[task].mean for task in weights}
        return {0: math.fsum(weights[task] * means[task] for task in weights) / total}
    return {
        seed: math.fsum(weights[task] * scores[task][seed] for task in weights) / total for seed in next(iter(seeds))
    }
