"""The test-peek tax: top-1 of the best test epoch minus top-1 of the last epoch of the same run, in points.

Some papers, that of SVP among them, read the test split after every epoch and print the best. `svp-bench replicate`
does that on purpose (`records.replication`), and this table shows the gain. Its rows and cells are those of `build`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from svp_bench.core.errors import printable
from svp_bench.records.replication import Replication
from svp_bench.records.store import write_atomically
from svp_bench.stats.estimates import Estimate
from svp_bench.stats.inference import mean_of, within
from svp_bench.tables.model import Cell, Table
from svp_bench.tables.notes import heading, interval, left_out_lines, mark_notes, marks, short_name, signed, span
from svp_bench.tables.render_csv import DATA_COLUMNS, SECTION_COLUMNS, csv_lines, data_facts, number, section_facts
from svp_bench.tables.render_text import align, wrap
from svp_bench.tasks.cards import SuiteCard

_WARNING = (
    "No number here is a result, and none compares with a leaderboard: the best epoch was picked on the test split, on "
    "purpose, to measure what that gains."
)
_NOTE = (
    "Tax: top-1 of the best test epoch minus top-1 of the last epoch of the same run, in points. It is never negative, "
    "and its 95 % interval over new seeds is cut at zero; –: one seed has no interval."
)
_HEAD = ["method", "task", "seeds", "last epoch", "best epoch", "picked epochs", "tax"]
_CSV = (
    *(
        "not_a_result",
        *SECTION_COLUMNS,
        "row",
        "method",
        "setting_digest",
        "scope",
        *DATA_COLUMNS,
        "seeds",
        "n",
        "last_epoch",
        "best_epoch",
        "picked_epochs",
        "tax",
        "tax_low",
        "tax_high",
    ),
)


def tax_path(suite: SuiteCard, results_root: Path | str) -> Path:
    """Return the CSV file of a suite's test-peek tax."""
    return Path(results_root) / "tables" / f"{suite.table}_test_peek_tax.csv"


def write_tax(table: Table, runs: Mapping[str, Replication], results_root: Path | str) -> str:
    """Write the CSV file of the test-peek tax, and return the table as text for a terminal.

    Args:
        table: Of the records that honest runs would have (`Replication.honest_record`).
        runs: Run id → replication.
        results_root: The file goes to its `tables/`.
    """
    shown = [f"{table.suite.title}: the test-peek tax", *wrap([_WARNING])]
    lines: list[Sequence[object]] = [_CSV]
    for section in table.sections:
        grid = [_HEAD]
        for row in section.rows:
            where = ("picked on the test split", *section_facts(section), row.label, row.method, row.setting_digest)
            for number_of_line, cells in enumerate(([*row.cells.values()], *([cell] for cell in row.all_cells))):
                tax = within(_mean(cells, runs, "tax"), 0, 100)
                last, best = (_mean(cells, runs, name).value for name in ("final", "best_test"))
                if number_of_line == 0:
                    scope, seeds, picked = f"mean of {row.done} tasks", span(*row.seeds), []
                    facts: list[object] = [scope, "", "", "", ""]
                else:
                    cell, picked = cells[0], [str(runs[run.run_id].best_epoch) for run in cells[0].records]
                    scope, seeds = short_name(cell.task) + marks(cell), str(len(cell.seeds))
                    facts = [cell.task, *data_facts(cell), " ".join(map(str, cell.seeds))]
                texts = [row.label, scope, seeds, f"{last:.2f}", f"{best:.2f}", ", ".join(picked)]
                grid.append([*texts, f"{signed(tax.value)} {interval(tax)}"])
                numbers = [number(x) for x in (tax.value, tax.low, tax.high)]
                lines.append([*where, *facts, tax.n, number(last), number(best), " ".join(picked), *numbers])
        shown += ["", heading(section), *align(grid, 2), *wrap([_NOTE, *mark_notes(section)])]
    shown += [f"Left out: {line}" for line in left_out_lines(table)]
    path = tax_path(table.suite, results_root)
    write_atomically(path, csv_lines(lines))
    return "\n".join(map(printable, [*shown, f"Written: {path}"])) + "\n"


def _mean(cells: Sequence[Cell], runs: Mapping[str, Replication], name: str) -> Estimate:
    """The mean over tasks of an attribute of their runs."""
    return mean_of({cell.task: [getattr(runs[run.run_id], name) for run in cell.records] for cell in cells})
