"""Tables as Markdown and as text for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import NamedTuple

from svp_bench.core.errors import file_size, printable
from svp_bench.records.costs import CostFile
from svp_bench.tables.measured import caption, measured_grid
from svp_bench.tables.model import Row, Section, Table
from svp_bench.tables.notes import (
    COST,
    MAJORITY,
    MISSING,
    QUOTED,
    RANDOM_WEIGHTS,
    columns,
    common_notes,
    comparison_notes,
    counts,
    decimals,
    halves,
    heading,
    interval,
    interval_notes,
    left_out_lines,
    left_out_reasons,
    majority_scores,
    marks,
    named,
    new_tasks_note,
    one_line,
    p_value,
    percent,
    ranks_notes,
    short_name,
    shown_columns,
    signed,
    size_span,
    span,
    verdict_marks,
    weights,
)
from svp_bench.tables.planned import planned_grid, planned_notes
from svp_bench.tables.quoted import QUOTED_CAUTION, QUOTED_NOTES, citations, not_quoted, other_lines, quoted_grid

_WIDTH = 100
_NARROW = 20  # characters that a column of text keeps when the terminal is too narrow for all
_EMPTY = "There are no complete records of this suite yet."


# -------------------------------------------------------------------------------------------------------------- grids


class _Layout(NamedTuple):
    """The parts of a grid: task columns, the deviation over seeds behind each task, ± behind all means or one."""

    tasks: bool
    spread: bool
    all_means: bool


_PAGE = _Layout(tasks=True, spread=True, all_means=True)
_TERMINAL = (
    _PAGE,
    _Layout(tasks=True, spread=False, all_means=True),
    _Layout(tasks=True, spread=False, all_means=False),
    _Layout(tasks=False, spread=False, all_means=True),
    _Layout(tasks=False, spread=False, all_means=False),
)


def _texts(section: Section, row: Row, layout: _Layout) -> list[str]:
    """The scores of `row` in the order of `columns`, with ± as `layout` has it, and marks."""
    verdicts = verdict_marks(section).get(row.label, {})
    texts = []
    for task in section.suite.tasks:
        cell = row.cells.get(task)
        spread = f" ± {cell.std:.2f}" if layout.spread and cell is not None and cell.std is not None else ""
        texts.append(MISSING if cell is None else f"{cell.mean:.2f}{spread}{marks(cell)}{verdicts.get(task, '')}")
    for mean in row.shown_means:
        text = decimals(None if mean is None else mean.value)
        if mean is not None:
            behind = "" if section.random else mean.behind
            text += f" {behind}" if behind and (layout.all_means or mean is row.present) else ""
            text += f" ({row.partial})" if mean is row.present and row.partial else ""
            text += "§" if mean.synthetic else ""
        texts.append(text)
    return texts


def _grid(section: Section, layout: _Layout, *, empty: bool = True) -> list[list[str]]:
    """Header and rows as text; without `empty`, columns in which no row has a number are left out."""
    names, shown = columns(section.suite), shown_columns(section.suite, layout.tasks)
    texts = [_texts(section, row, layout) for row in section.rows]
    if not empty:
        shown = [index for index in shown if any(line[index] != MISSING for line in texts)]
    grid = [["rank", "method", *(names[index] for index in shown), "complete", "seeds", "trainable w/o head"]]
    for row, line in zip(section.rows, texts, strict=True):
        rank = MISSING if row.rank is None else str(row.rank)
        facts = (row.done, span(*row.seeds), size_span(*row.adapter))
        grid.append([rank, named(row), *(line[index] for index in shown), *facts])
    chance = majority_scores(section)
    if any(chance[index] is not None for index in shown):
        grid.append([MISSING, MAJORITY, *(decimals(chance[index]) for index in shown), MISSING, MISSING, MISSING])
    return grid


def _statistics(section: Section, *, terminal: bool, cells: bool) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """Yield the title, the grid (of a header only, if it is empty) and the notes of each block below the rows.

    Args:
        section: The section.
        terminal: Leave out the means of the groups, for which a terminal is too narrow.
        cells: Are the tasks shown, with their marks?
    """
    if section.random:
        return
    names = columns(section.suite)[len(section.suite.tasks) :]
    seeds = [] if terminal else [*range(len(names))] if len(section.suite.groups) > 1 else [len(names) - 2]
    head = [
        *(f"{names[index]}, new seeds" for index in seeds),
        *(f"{names[-2]}, {q}" for q in ("test images", "new tasks")),
    ]
    grid = [["method", names[-2], "test images", "new tasks"] if terminal else ["method", *head]]
    for row in section.rows:
        means = [row.means[index] for index in seeds]
        texts = [*(interval(None if mean is None else mean.seeds) for mean in means)]
        texts += [decimals(row.task_mean)] if terminal else []
        texts += [interval(None if row.partial else row.present.images), interval(row.new_tasks)]
        if any(text != MISSING for text in texts):
            grid.append([row.label, *texts])
    if len(grid) > 1:
        grid = without_empty(grid, [len(grid[0]) - 1])
        yield f"Means with {percent(section.level)} intervals", grid, new_tasks_note(section)
    if section.comparison is not None:
        title = f"Differences to {section.comparison.control or 'a control'}"
        yield title, _comparison_grid(section), comparison_notes(section, cells)
    if section.ranks is not None:
        yield "" if terminal else "Mean ranks (descriptive)", [[]], ranks_notes(section)


def _costs(section: Section, costs: CostFile | None) -> Iterator[tuple[str, list[list[str]], list[str]]]:
    """Yield the block of the costs that do not depend on the machine, if records state them, and of measured ones."""
    grid = [["method", "trainable w/o head", "head", "stored", "merges", "inference MACs", "training MACs"]]
    for row in section.rows:
        cost = row.cost
        if cost is None:
            continue
        macs = [MISSING if found is None else size_span(*found) for found in (cost.inference_macs, cost.training_macs)]
        stored = " – ".join(dict.fromkeys(map(file_size, cost.stored_bytes)))
        facts = [size_span(*row.adapter), size_span(*cost.head), stored, "yes" if cost.mergeable else "no"]
        grid.append([row.label, *facts, *macs])
    if len(grid) > 1:
        yield "Cost", grid, [COST]
    if costs is not None:
        yield _measured(section, costs)


def _measured(section: Section, costs: CostFile) -> tuple[str, list[list[str]], list[str]]:
    return f"Cost on {costs.device}", measured_grid(section, costs), [caption(costs)]


def _comparison_grid(section: Section) -> list[list[str]]:
    """Header and rows of the differences to the control."""
    grid = [["method", "difference", "new seeds", "test images", "new tasks", "p", "p (Holm)", "tasks", "shared seeds"]]
    for found in section.comparison.contrasts if section.comparison else ():
        intervals = map(interval, (found.these_tasks, found.images, found.new_tasks))
        done = f"{len(found.tasks)}/{len(section.suite.tasks)}"
        p = (p_value(found.p), p_value(found.holm))
        grid.append([found.row, signed(found.these_tasks.value), *intervals, *p, done, span(*found.seeds)])
    return without_empty(grid, [4, 5, 6])


def without_empty(grid: list[list[str]], columns: Sequence[int]) -> list[list[str]]:
    """Return `grid` without those of `columns` in which no row has anything."""
    empty = {index for index in columns if all(line[index] == MISSING for line in grid[1:])}
    return [[text for index, text in enumerate(line) if index not in empty] for line in grid]


# ----------------------------------------------------------------------------------------------------------- markdown


def markdown_grid(grid: list[list[str]], left: int) -> list[str]:
    """Return a Markdown table; the first `left` columns are text, the rest numbers."""
    rows = [[escape_markdown(text).replace("|", "\\|") for text in line] for line in grid]
    rule = [":---" if index < left else "---:" for index in range(len(grid[0]))]
    return [f"| {' | '.join(line)} |" for line in (rows[0], rule, *rows[1:])]


def bullets(notes: Sequence[str]) -> list[str]:
    """Return notes as items of a Markdown list."""
    return [f"- {escape_markdown(note, starts=True)}" for note in notes]


_MARKUP = re.compile(r"[\\`*~$]|\](?=[(\[:])|(?<![^\W_])_|_(?![^\W_])")
_STARTS = re.compile(r"^(\d*)([-+=#.)])")


def escape_markdown(text: str, *, starts: bool = False) -> str:
    """Return `text` on one line, as Markdown that shows it: a checkpoint may be named `<script>` or `**best**`.

    Args:
        text: Plain text.
        starts: Does it begin a block, where "#", "-" or "1." would make a heading or a list of it?
    """
    plain = one_line(text)
    escaped = _MARKUP.sub(lambda match: f"\\{match.group()}", plain)
    escaped = escaped.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _STARTS.sub(r"\1\\\2", escaped) if starts else escaped


def render_markdown(table: Table) -> str:
    """Return the table as Markdown."""
    suite = table.suite
    lines = [f"# {escape_markdown(suite.title)}", ""]
    lines.append(f"Suite {suite.name}, version {suite.version}. Derived from records; do not edit.")
    if not table.sections:
        lines += ["", _EMPTY]
    for section in table.sections:
        lines += [
            "",
            f"## {escape_markdown(heading(section))}",
            "",
            f"Track {escape_markdown(section.track.words)}.",
            "",
        ]
        if section.random:
            lines += [f"**{RANDOM_WEIGHTS}**", ""]
        precisions = sorted({record.precision for record in section.members})
        rule = section.selection or "Its card is not available in this version, so its selection rule cannot be quoted."
        notes = [
            f"Protocol {section.first.protocol}, version {section.first.protocol_version}. {rule}",
            f"Backbone {section.first.backbone}, {weights(section)}. Precision: {', '.join(precisions)}.",
            f"Cards: {_versions(section)}.",
            "Accuracy in percent. ± behind a task is the standard deviation over its seeds.",
        ]
        lines += [*markdown_grid(_grid(section, _PAGE), left=2), ""]
        lines += bullets([*notes, *interval_notes(section), *common_notes(section)])
        for title, grid, explained in (
            *_statistics(section, terminal=False, cells=True),
            *_costs(section, table.costs),
        ):
            lines += ["", f"### {escape_markdown(title)}", ""]
            lines += [*markdown_grid(grid, left=1), ""] if len(grid) > 1 else []
            lines += bullets(explained)
    if table.planned is not None:
        lines += ["", "## Planned comparisons", "", *markdown_grid(planned_grid(table.planned), left=2), ""]
        lines += bullets(planned_notes(table))
    if table.published:
        grid = quoted_grid(table)
        lines += ["", f"## Quoted: {QUOTED}", "", QUOTED_CAUTION, ""]
        lines += [*markdown_grid(grid, left=5), "", *bullets([QUOTED_NOTES])] if len(grid) > 1 else []
        lines += bullets([*not_quoted(table), *other_lines(table), *citations(table).values()])
    if counts(table):
        lines += ["", "## Not in the table", "", counts(table), "", *bullets(left_out_lines(table))]
    return "\n".join(lines) + "\n"


def _versions(section: Section) -> str:
    tasks: dict[int, set[str]] = {}
    for cell in section.cells:
        tasks.setdefault(cell.data[2], set()).add(short_name(cell.task))
    if len(tasks) == 1:
        return f"all tasks of version {next(iter(tasks))}"
    return "; ".join(f"version {version}: {', '.join(sorted(tasks[version]))}" for version in sorted(tasks))


# ----------------------------------------------------------------------------------------------------------- terminal


def render_terminal(table: Table, *, all_columns: bool = False) -> str:
    """Return the table as plain text: with the tasks if they fit into 100 columns, else with groups and averages.

    Long names are wrapped; with three groups, lines may become a little longer than that.

    Args:
        table: The table.
        all_columns: Show tasks and groups for which no row has a number too.
    """
    lines = [table.suite.title]
    if not table.sections:
        lines += ["", _EMPTY]
    for section in table.sections:
        rendered = [(layout, align(_grid(section, layout, empty=all_columns), 2)) for layout in _TERMINAL]
        layout, fitting = next((one for one in rendered if max(map(len, one[1])) <= _WIDTH), rendered[-1])
        lines += ["", heading(section), *fitting]
        notes = [RANDOM_WEIGHTS] if section.random else []
        notes += [f"Track {section.track.words}.", *interval_notes(section), *common_notes(section)]
        lines += wrap(notes)
        blocks = [*_statistics(section, terminal=True, cells=layout.tasks)]
        blocks += [] if table.costs is None else [_measured(section, table.costs)]
        for title, grid, explained in blocks:
            lines += ["", *filter(None, [title]), *(align(grid, 1) if len(grid) > 1 else []), *wrap(explained)]
    if table.planned is not None:
        grid = without_empty(planned_grid(table.planned), [3, 4, 5, 6, 7])
        lines += ["", "Planned comparisons", *align(grid, 2), *wrap(planned_notes(table))]
    if table.published:
        grid = quoted_grid(table, terminal=True)
        lines += ["", f"Quoted: {QUOTED}"]
        lines += [*align(grid, 3), *wrap([QUOTED_NOTES])] if len(grid) > 1 else []
        lines += [*not_quoted(table, terminal=True), *wrap(other_lines(table))]
        lines += [f"[{number}] {text}" for number, text in enumerate(citations(table).values(), 1)]
    if counts(table):
        lines += ["", f"Not in the table: {counts(table)}"]
        lines += wrap(left_out_reasons(table))
        lines += [f"  {problem.path}: {one_line(problem.reason)}" for problem in table.problems]
    return "\n".join(map(printable, lines)) + "\n"


def wrap(notes: Sequence[str]) -> list[str]:
    """Return notes as lines of at most 100 characters; those after the first are indented."""
    return [line for note in notes for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")]


def align(grid: list[list[str]], left: int) -> list[str]:
    """Align the columns under a header of two lines; the first `left` columns are text, wrapped if it has to be."""
    grid = [list(map(printable, line)) for line in grid]
    heads = [halves(text) for text in grid[0]]
    widths = [max(*map(len, head), *(len(line[index]) for line in grid[1:])) for index, head in enumerate(heads)]
    over = sum(widths) + 2 * (len(widths) - 1) - _WIDTH
    for index in sorted(range(left), key=lambda index: -widths[index]):
        cut = min(max(over, 0), max(widths[index] - _NARROW, 0))
        widths[index] -= cut
        over -= cut

    def draw(cells: Sequence[str]) -> list[str]:
        wrapped = [textwrap.wrap(text, widths[index]) or [""] for index, text in enumerate(cells)]
        rendered = []
        for parts in zip_longest(*wrapped, fillvalue=""):
            aligned = [
                text.ljust(width) if index < left else text.rjust(width)
                for index, (text, width) in enumerate(zip(parts, widths, strict=True))
            ]
            rendered.append("  ".join(aligned).rstrip())
        return rendered

    lines = [[head[0] for head in heads], [head[1] for head in heads], *grid[1:]]
    return [row for line in lines for row in draw(line)]
