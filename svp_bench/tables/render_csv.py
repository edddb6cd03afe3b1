"""Tables as CSV: a line a row (wide), and a line a cell (long). What a spreadsheet would run begins with a quote."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from svp_bench.records.published import mean_names
from svp_bench.records.store import csv_text
from svp_bench.tables.comparison import images_of_cell
from svp_bench.tables.model import CARD, Cell, Row, Section, Table
from svp_bench.tables.notes import DIGITS, MAJORITY, QUOTED, columns, majority_scores, one_line, scores, short_name
from svp_bench.tables.quoted import quoted_methods
from svp_bench.tasks.cards import SuiteCard

__all__ = [
    "DATA_COLUMNS",
    "SECTION_COLUMNS",
    "csv_lines",
    "data_facts",
    "long_csv",
    "number",
    "section_facts",
    "wide_csv",
]

SECTION_COLUMNS = ("protocol", "protocol_version", "backbone", "checkpoint", "checkpoint_digest", "weights", "track")
DATA_COLUMNS = ("data_variant", "data_digest", "data_status")


def number(value: float | None) -> str:
    """Return a number with the decimals of CSV files, or nothing."""
    return "" if value is None else f"{value:.{DIGITS}f}"


_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def csv_lines(rows: Iterable[Sequence[object]]) -> str:
    """Return rows as CSV; text is on one line, and behind a quote where a spreadsheet would take it for a formula."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows([_field(value) for value in row] for row in rows)
    return out.getvalue()


def _field(value: object) -> object:
    if not isinstance(value, str) or _NUMBER.fullmatch(value):
        return value
    return csv_text(one_line(value))


def section_facts(section: Section) -> list[object]:
    """Return the values of `SECTION_COLUMNS`."""
    return [
        section.protocol,
        section.protocol_version,
        section.backbone,
        section.checkpoint,
        section.checkpoint_digest or "",
        "random" if section.random else "pretrained",
        section.track.title,
    ]


def data_facts(cell: Cell) -> list[object]:
    """Return the values of `DATA_COLUMNS`."""
    return [cell.variant, cell.data_digest or "", "different" if cell.different else "as_card"]


def _interval_columns(suite: SuiteCard) -> list[str]:
    """Names of the ends of all intervals: over new seeds for each mean, over new tasks for the mean over tasks."""
    tasks, groups = mean_names(suite)
    names = [f"{name}, new seeds" for name in (*suite.groups, tasks, groups)]
    names += [f"{tasks}, new tasks", "mean of the tasks there are, test images"]
    return [f"{name}, {end}" for name in names for end in ("low", "high")]


def _interval_ends(row: Row, suite: SuiteCard) -> list[str]:
    """The ends of all intervals, in the order of `_interval_columns`; empty where there is none."""
    known = row.intervals
    estimates = [*(known.groups[group] for group in suite.groups), known.task_mean, known.group_mean, known.new_tasks]
    estimates.append(known.images)
    return [
        number(end)
        for estimate in estimates
        for end in ((None, None) if estimate is None else (estimate.low, estimate.high))
    ]


def wide_csv(table: Table) -> str:
    """Return the CSV with a line a row, quoted rows last."""
    suite, names, ends = table.suite, columns(table.suite), _interval_columns(table.suite)
    facts = ["complete", "seeds_min", "seeds_max", "adapter_parameters_min", "adapter_parameters_max"]
    marks = ["data_different", "other_variants"]
    quoted = ["source", "citation"]
    head = ["origin", *SECTION_COLUMNS, "rank", "row", "method", "setting_digest", *names, *facts, *marks, *quoted]
    last = ["overrides", "mixed_cells", "mean of the tasks there are", "custom_data"]
    lines: list[Sequence[object]] = [[*head, "interval_level", *ends, *last]]
    for section in table.sections:
        for row in section.rows:
            different = [short_name(task) for task in suite.tasks if task in row.cells and row.cells[task].different]
            variants = [
                f"{short_name(task)}={row.cells[task].variant}"
                for task in suite.tasks
                if task in row.cells and row.cells[task].variant != CARD
            ]
            lines.append(
                [
                    *("measured", *section_facts(section)),
                    *("" if row.rank is None else row.rank, row.label, row.method, row.setting_digest),
                    *(number(score) for score in scores(row, suite)),
                    *(f"{len(row.cells)}/{len(suite.tasks)}", *row.seeds, *row.adapter),
                    *(";".join(different), ";".join(variants), "", ""),
                    *(f"{table.level:g}", *_interval_ends(row, suite)),
                    *("; ".join(row.overrides), ";".join(short_name(t) for t, c in row.cells.items() if c.mixed)),
                    *(number(row.present_mean), section.data),
                ]
            )
        if section.majorities:
            lines.append(
                [
                    *("baseline", *section_facts(section), "", MAJORITY, "", ""),
                    *(number(score) for score in majority_scores(section, suite)),
                    *(f"{len(section.majorities)}/{len(suite.tasks)}", "", "", "", "", "", "", "", ""),
                    *("", *("" for _ in ends), "", "", "", section.data),
                ]
            )
    for quote, values, _ in quoted_methods(table):
        lines.append(
            [
                *(QUOTED, "", "", quote.backbone, quote.pretrain, "", "as the source states", ""),
                *("", quote.method, quote.method, ""),
                *(values.get(name, "") for name in names),
                *("", "", "", "", "", "", "", quote.source, quote.citation),
                *("", *("" for _ in ends), "", "", "", ""),
            ]
        )
    return csv_lines(lines)


def long_csv(table: Table) -> str:
    """Return the CSV with a line per cell, also for missing results."""
    head = [*SECTION_COLUMNS, "row", "method", "setting_digest", "task", "task_version"]
    head += DATA_COLUMNS
    tail = ["images", "test images, low", "test images, high", "majority_class", "custom_data"]
    lines: list[Sequence[object]] = [[*head, "mean", "std", "n", "seeds", "status", *tail]]
    for section in table.sections:
        for row in section.rows:
            facts = [*section_facts(section), row.label, row.method, row.setting_digest]
            for task in table.suite.tasks:
                if task not in row.cells:
                    lines.append([*facts, task, "", "", "", "", "", "", 0, "", "missing", "", "", "", "", section.data])
                cells = [row.cells[task]] if task in row.cells else []
                for cell in [*cells, *(cell for cell in row.apart if cell.task == task)]:
                    status = "complete" if cell is row.cells[task] else "not in the wide table"
                    spread = [number(cell.mean), number(cell.std), len(cell.seeds)]
                    seeds = " ".join(map(str, cell.seeds))
                    over = images_of_cell(cell, table.level)
                    images = [cell.images, number(over.low), number(over.high), number(cell.majority), section.data]
                    lines.append([*facts, task, cell.task_version, *data_facts(cell), *spread, seeds, status, *images])
    return csv_lines(lines)
