"""Quoted numbers as tables show them: apart, marked, as printed, never ranked."""

from __future__ import annotations

from collections import defaultdict

from svp_bench.core.errors import plural
from svp_bench.records.published import WHOLE, PublishedRow
from svp_bench.tables.model import Table
from svp_bench.tables.notes import MISSING, columns, one_line, shown_columns


def quoted_methods(table: Table) -> list[tuple[PublishedRow, dict[str, str], str]]:
    """Return one entry a quoted method: a row of it, score column → value as printed, parameters as printed."""
    entries: dict[tuple[str, ...], tuple[PublishedRow, dict[str, str], list[str]]] = {}
    units = {"params": "", "params_k": " K", "params_m": " M"}
    for row in table.published:
        key = (row.source, row.backbone, row.pretrain, row.method)
        _, scores, parameters = entries.setdefault(key, (row, {}, []))
        if row.task_or_group == WHOLE and row.metric in units:
            parameters.append(row.value + units[row.metric])
        elif row.metric == "top1":
            scores[row.task_or_group] = row.value
    return [(row, scores, " / ".join(parameters)) for row, scores, parameters in entries.values() if scores]


def quoted_grid(table: Table, *, terminal: bool = False) -> list[list[str]]:
    """Return header and rows: with every task, or for a terminal with numbered sources (`citations`) and means only."""
    names, numbers = columns(table.suite), {source: n for n, source in enumerate(citations(table), 1)}
    shown = [names[index] for index in shown_columns(table.suite, tasks=not terminal)]
    facts = ["source", "backbone", "method"] if terminal else ["source", "backbone", "pre-training", "method"]
    grid = [[*facts, *shown, *([] if terminal else ["parameters as printed"])]]
    for row, scores, parameters in quoted_methods(table):
        if any(name in scores for name in shown):
            values = [scores.get(name, MISSING) for name in shown]
            if terminal:
                grid.append([f"[{numbers[row.source]}]", f"{row.backbone}, {row.pretrain}", row.method, *values])
            else:
                grid.append([row.source, row.backbone, row.pretrain, row.method, *values, parameters or MISSING])
    return grid


def citations(table: Table) -> dict[str, str]:
    """Return source → its name and citations, on one line, in the order in which the sources are quoted."""
    sources: dict[str, set[str]] = defaultdict(set)
    for row in table.published:
        sources[row.source].add(row.citation)
    return {source: one_line(f"{source}: {'; '.join(sorted(cited))}") for source, cited in sources.items()}


def not_quoted(table: Table, grid: list[list[str]]) -> list[str]:
    """Return a line that counts the quoted methods without a number in `grid`, or nothing."""
    missing = len(quoted_methods(table)) - len(grid) + 1
    return [f"{plural(missing, 'quoted method')} without a number in these columns."] if missing else []
