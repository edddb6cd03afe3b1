"""Tables as CSV: a line a row (wide), and a line a cell (long). A text that starts a formula gets a quote before it."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence

from svp_bench.records.store import csv_text
from svp_bench.tables.comparison import images_of_cell
from svp_bench.tables.measured import MEASURED_COLUMNS, measured_facts
from svp_bench.tables.model import CARD, Cell, Row, Section, Table
from svp_bench.tables.notes import DIGITS, MAJORITY, QUOTED, columns, majority_scores, one_line, short_name
from svp_bench.tables.quoted import QUOTED_COLUMNS, quoted_facts, quoted_methods

COST_COLUMNS = (
    *("head_parameters_min", "head_parameters_max", "stored_bytes_min", "stored_bytes_max", "inference_macs_min"),
    *("inference_macs_max", "training_macs_min", "training_macs_max", "mergeable"),
)
SECTION_COLUMNS = ("protocol", "protocol_version", "backbone", "checkpoint", "checkpoint_digest", "weights", "track")
DATA_COLUMNS = ("data_variant", "data_digest", "data_status")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def number(value: float | None) -> str:
    """Return a number with the decimals of CSV files, or nothing."""
    return "" if value is None else f"{value:.{DIGITS}f}"


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
    kind = "random" if section.random else "pretrained"
    run = section.first
    facts = [run.protocol, run.protocol_version, run.backbone, section.checkpoint, run.checkpoint_digest or "", kind]
    return [*facts, section.track.title]


def data_facts(cell: Cell) -> list[object]:
    """Return the values of `DATA_COLUMNS`."""
    return [cell.variant, cell.data[1] or "", "different" if cell.different else "as_card"]


def wide_csv(table: Table) -> str:
    """Return the CSV with a line a row, those of the majority class behind the rows, quoted rows last."""
    suite, names = table.suite, columns(table.suite)
    *groups, tasks, of_groups = names[len(suite.tasks) :]
    intervals = [f"{name}, new seeds" for name in (*groups, tasks, of_groups)]
    intervals += [f"{tasks}, new tasks", "mean of the tasks there are, test images"]
    head = [
        *("origin", *SECTION_COLUMNS, "rank", "row", "method", "setting_digest", *names, "complete", "seeds_min"),
        *("seeds_max", "adapter_parameters_min", "adapter_parameters_max", "data_different", "other_variants"),
        *("source", "citation", "interval_level", *(f"{name}, {end}" for name in intervals for end in ("low", "high"))),
        *("overrides", "mixed_cells", "mean of the tasks there are", "custom_data"),
    ]
    if any(row.cost for section in table.sections for row in section.rows):
        head += COST_COLUMNS
    if table.costs is not None:
        head += MEASURED_COLUMNS
    if table.published:
        head += QUOTED_COLUMNS
    lines: list[dict[str, object]] = []
    for section in table.sections:
        facts = {**dict(zip(SECTION_COLUMNS, section_facts(section), strict=True)), "custom_data": section.data}
        for row in section.rows:
            lines.append({"origin": "measured", **facts, **_row_facts(row), "interval_level": f"{table.level:g}"})
            lines[-1] |= dict(zip(names, map(number, row.scores), strict=True)) | measured_facts(table.costs, row)
            seeds = [None if mean is None else mean.seeds for mean in row.means]
            for name, estimate in zip(intervals, [*seeds, row.new_tasks, row.present.images], strict=True):
                if estimate is not None:
                    lines[-1] |= {f"{name}, low": number(estimate.low), f"{name}, high": number(estimate.high)}
        if section.majorities:
            done = f"{len(section.majorities)}/{len(suite.tasks)}"
            lines.append({"origin": "baseline", **facts, "row": MAJORITY, "complete": done})
            lines[-1] |= dict(zip(names, map(number, majority_scores(section)), strict=True))
    for quote, values, _ in quoted_methods(table):
        scores = {name: value for name, value in values.items() if name in names}
        lines.append({"origin": QUOTED, **quoted_facts(quote, scores)})
    return csv_lines([head, *([line.get(name, "") for name in head] for line in lines)])


def _row_facts(row: Row) -> dict[str, object]:
    cells = [row.cells[task] for task in row.suite.tasks if task in row.cells]
    return {
        "rank": "" if row.rank is None else row.rank,
        "row": row.label,
        "method": row.method,
        "setting_digest": row.setting_digest,
        "complete": row.done,
        **dict(zip(("seeds_min", "seeds_max"), row.seeds, strict=True)),
        **dict(zip(("adapter_parameters_min", "adapter_parameters_max"), row.adapter, strict=True)),
        "data_different": ";".join(short_name(cell.task) for cell in cells if cell.different),
        "other_variants": ";".join(f"{short_name(cell.task)}={cell.variant}" for cell in cells if cell.variant != CARD),
        "overrides": "; ".join(row.overrides),
        "mixed_cells": ";".join(short_name(task) for task, cell in row.cells.items() if cell.mixed),
        "mean of the tasks there are": number(row.present.value),
        **_cost_facts(row),
    }


def _cost_facts(row: Row) -> dict[str, object]:
    """Return the values of `COST_COLUMNS`."""
    cost = row.cost
    if cost is None:
        return {}
    spans = (cost.head, cost.stored_bytes, cost.inference_macs, cost.training_macs)
    ends = [end for found in spans for end in (found or ("", ""))]
    return dict(zip(COST_COLUMNS, [*ends, "yes" if cost.mergeable else "no"], strict=True))


def long_csv(table: Table) -> str:
    """Return the CSV with a line per cell, also for missing results."""
    head = [*SECTION_COLUMNS, "row", "method", "setting_digest", "task", "task_version", *DATA_COLUMNS, "mean", "std"]
    head += ["n", "seeds", "status", "images", "test images, low", "test images, high", "majority_class", "custom_data"]
    lines: list[Sequence[object]] = [head]
    for section in table.sections:
        for row in section.rows:
            facts = [*section_facts(section), row.label, row.method, row.setting_digest]
            for task in table.suite.tasks:
                if task not in row.cells:
                    lines.append([*facts, task, "", "", "", "", "", "", 0, "", "missing", "", "", "", "", section.data])
                for cell in (cell for cell in row.all_cells if cell.task == task):
                    status = "complete" if cell is row.cells[task] else "not in the wide table"
                    spread = [number(cell.mean), number(cell.std), len(cell.seeds), " ".join(map(str, cell.seeds))]
                    over = images_of_cell(cell, table.level)
                    images = [cell.images, number(over.low), number(over.high), number(cell.majority), section.data]
                    lines.append([*facts, task, cell.data[2], *data_facts(cell), *spread, status, *images])
    return csv_lines(lines)
