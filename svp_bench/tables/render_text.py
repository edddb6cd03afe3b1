"""Tables as Markdown and as text for a terminal."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from svp_bench.core.errors import printable
from svp_bench.tables.model import Row, Section, Table
from svp_bench.tables.notes import (
    MAJORITY,
    MISSING,
    QUOTED,
    RANDOM_WEIGHTS,
    SYNTHETIC_NOTE,
    Whisker,
    above,
    averaged_tasks,
    column_estimates,
    columns,
    comparison_notes,
    counts,
    data_notes,
    dirty_notes,
    heading,
    interval,
    interval_notes,
    left_out_lines,
    left_out_reasons,
    majority_notes,
    majority_scores,
    marks,
    named,
    new_tasks_note,
    one_line,
    override_notes,
    p_value,
    partial,
    partial_notes,
    percent,
    provenance_notes,
    ranks_notes,
    section_notes,
    selection_notes,
    shown_columns,
    shown_scores,
    signed,
    sizes,
    span,
    verdict_marks,
    whiskers,
)
from svp_bench.tables.quoted import citations, not_quoted, quoted_grid, quoted_terminal_grid
from svp_bench.tasks.cards import SuiteCard

__all__ = [
    "align",
    "bullets",
    "escape_markdown",
    "markdown_grid",
    "render_markdown",
    "render_terminal",
    "without_empty",
    "wrap",
]

_WIDTH = 100
_NARROW = 20  # characters that a column of text keeps when the terminal is too narrow for all


# -------------------------------------------------------------------------------------------------------------- grids


@dataclass(frozen=True)
class _Layout:
    """What a grid shows: task columns, the deviation over seeds behind each task, ± behind all means or one."""

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


def _texts(
    row: Row, suite: SuiteCard, layout: _Layout, behind: Sequence[Whisker | None], verdicts: Mapping[str, str]
) -> list[str]:
    """The scores of `row` as text with two decimals, what is behind ± in `layout`, and marks."""
    synthetic = {task for task, cell in row.cells.items() if cell.synthetic}
    first_mean = len(suite.tasks) + len(suite.groups)
    texts = []
    for index, (score, averaged) in enumerate(zip(shown_scores(row, suite), averaged_tasks(suite), strict=True)):
        text = MISSING if score is None else f"{score:.2f}"
        whisker = behind[index]
        if index < len(suite.tasks):
            cell = row.cells.get(suite.tasks[index])
            if cell is not None:
                text += f" ± {cell.std:.2f}" if layout.spread and cell.std is not None else ""
                text += marks(cell) + verdicts.get(cell.task, "")
        else:
            if whisker is not None and (layout.all_means or index == first_mean):
                text += f" {whisker.text}"
            if index == first_mean and partial(row, suite):
                text += f" ({partial(row, suite)})"
            if score is not None and synthetic & averaged:
                text += "§"
        texts.append(text)
    return texts


def _grid(section: Section, suite: SuiteCard, layout: _Layout, *, empty: bool = True) -> list[list[str]]:
    """Header and rows as text; without `empty`, columns in which no row has a number are left out."""
    names, shown = columns(suite), shown_columns(suite, layout.tasks)
    if not empty:
        known = [shown_scores(row, suite) for row in section.rows]
        shown = [index for index in shown if any(values[index] is not None for values in known)]
    head = ["rank", "method", *(names[index] for index in shown), "complete", "seeds", "trainable w/o head"]
    grid = [head]
    verdicts = verdict_marks(section)
    for row in section.rows:
        # random weights: means without intervals
        behind = [None for _ in names] if section.random else whiskers(row, suite)
        texts = _texts(row, suite, layout, behind, verdicts.get(row.label, {}))
        rank = MISSING if row.rank is None else str(row.rank)
        done = f"{len(row.cells)}/{len(suite.tasks)}"
        grid.append([rank, named(row), *(texts[index] for index in shown), done, span(*row.seeds), sizes(row)])
    chance = majority_scores(section, suite)
    if any(chance[index] is not None for index in shown):
        texts = [MISSING if score is None else f"{score:.2f}" for score in chance]
        grid.append([MISSING, MAJORITY, *(texts[index] for index in shown), MISSING, MISSING, MISSING])
    return grid


def _intervals_grid(section: Section, suite: SuiteCard) -> list[list[str]]:
    """Header and rows of the means with their intervals written out; only rows that have one."""
    names = columns(suite)
    first = len(suite.tasks)
    several = len(suite.groups) > 1
    shown = [*range(first, len(names))] if several else [len(names) - 2]
    head = ["method", *(f"{names[index]}, new seeds" for index in shown)]
    head += [f"{names[-2]}, {question}" for question in ("test images", "new tasks")]
    grid = [head]
    for row in section.rows:
        estimates = column_estimates(row, suite)
        whole = row.intervals.images if row.task_mean is not None else None
        texts = [*(interval(estimates[index]) for index in shown), interval(whole), interval(row.intervals.new_tasks)]
        if any(text != MISSING for text in texts):
            grid.append([row.label, *texts])
    return without_empty(grid, [index for index, name in enumerate(head) if name.endswith("new tasks")])


def _comparison_grid(section: Section, suite: SuiteCard) -> list[list[str]]:
    """Header and rows of the differences to the control."""
    comparison = section.comparison
    grid = [["method", "difference", "new seeds", "test images", "new tasks", "p", "p (Holm)", "tasks", "shared seeds"]]
    for found in comparison.contrasts if comparison else ():
        grid.append(
            [
                found.row,
                signed(found.these_tasks.value),
                interval(found.these_tasks),
                interval(found.images),
                interval(found.new_tasks),
                p_value(found.p),
                p_value(found.holm),
                f"{len(found.tasks)}/{len(suite.tasks)}",
                span(*found.seeds),
            ]
        )
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
        lines += ["", "There are no complete records of this suite yet."]
    for section in table.sections:
        lines += ["", f"## {escape_markdown(heading(section))}", "", escape_markdown(above(section)), ""]
        if section.random:
            lines += [f"**{RANDOM_WEIGHTS}**", ""]
        lines += [*markdown_grid(_grid(section, suite, _PAGE), left=2), ""]
        lines += bullets(section_notes(section, suite, table.level))
        lines += _markdown_statistics(section, suite, table.level)
    if table.published:
        lines += ["", f"## Quoted: {QUOTED}", "", *_published_lines(table)]
    if counts(table):
        lines += ["", "## Not in the table", "", counts(table), ""]
        lines += bullets(left_out_lines(table))
    return "\n".join(lines) + "\n"


def _markdown_statistics(section: Section, suite: SuiteCard, level: float) -> list[str]:
    if section.random:
        return []
    lines: list[str] = []
    intervals = _intervals_grid(section, suite)
    if len(intervals) > 1:
        lines += ["", f"### Means with {percent(level)} intervals", "", *markdown_grid(intervals, left=1), ""]
        lines += bullets(new_tasks_note(section, suite))
    comparison = section.comparison
    if comparison is not None:
        title = f"Differences to {comparison.control or 'a control'}"
        lines += ["", f"### {escape_markdown(title)}", ""]
        if comparison.contrasts:
            lines += [*markdown_grid(_comparison_grid(section, suite), left=1), ""]
        lines += bullets(comparison_notes(section, suite, level))
    if section.ranks is not None:
        lines += ["", "### Mean ranks (descriptive)", "", *bullets(ranks_notes(section, level))]
    return lines


def _published_lines(table: Table) -> list[str]:
    grid = quoted_grid(table)
    return [
        "Copied as printed, from other code, protocols and selection rules; never ranked with the rows above. Known"
        " errors are listed in `results/published/README.md`.",
        "",
        *markdown_grid(grid, left=4),
        "",
        *bullets(not_quoted(table, grid)),
        *bullets(list(citations(table).values())),
    ]


# ----------------------------------------------------------------------------------------------------------- terminal


def render_terminal(table: Table, *, all_columns: bool = False) -> str:
    """Return the table as plain text: with the tasks if they fit into 100 columns, else with groups and averages.

    Long names are wrapped; with three groups, lines may become a little longer than that.

    Args:
        table: The table.
        all_columns: Show tasks and groups for which no row has a number too.
    """
    suite = table.suite
    lines = [suite.title]
    if not table.sections:
        lines += ["", "There are no complete records of this suite yet."]
    for section in table.sections:
        lines += ["", heading(section)]
        rendered = [(layout, align(_grid(section, suite, layout, empty=all_columns), 2)) for layout in _TERMINAL]
        layout, fitting = next((one for one in rendered if max(map(len, one[1])) <= _WIDTH), rendered[-1])
        lines += fitting
        if section.random:
            lines.append(RANDOM_WEIGHTS)
        shown = {mark for row in section.rows for cell in row.cells.values() for mark in marks(cell)}
        if "†" in shown:
            lines.append("† The files on disk differ from the task card.")
        if "‡" in shown:
            lines.append("‡ Another variant of the data than the card's own.")
        if "§" in shown:
            lines.append(SYNTHETIC_NOTE)
        notes = [
            *interval_notes(section, suite, table.level),
            *partial_notes(section, suite),
            *majority_notes(section),
            *selection_notes(section),
            *override_notes(section),
            *provenance_notes(section),
            *data_notes(section, suite),
            *dirty_notes(section),
        ]
        lines += wrap([above(section), *notes])
        lines += _terminal_statistics(section, suite, table.level, layout.tasks)
    if table.published:
        grid = quoted_terminal_grid(table)
        lines += ["", f"Quoted: {QUOTED}", *align(grid, 3), *not_quoted(table, grid)]
        lines += [f"[{number}] {text}" for number, text in enumerate(citations(table).values(), 1)]
    if counts(table):
        lines += ["", f"Not in the table: {counts(table)}"]
        lines += wrap(left_out_reasons(table))
        lines += [f"  {problem.path}: {one_line(problem.reason)}" for problem in table.problems]
    return "\n".join(map(printable, lines)) + "\n"


def _terminal_statistics(section: Section, suite: SuiteCard, level: float, cells: bool) -> list[str]:
    if section.random:
        return []
    lines: list[str] = []
    known = [
        [row.label, f"{row.task_mean:.2f}", interval(row.intervals.images), interval(row.intervals.new_tasks)]
        for row in section.rows
        if row.task_mean is not None
    ]
    if known:
        names = columns(suite)
        lines += ["", f"Means with {percent(level)} intervals"]
        lines += align(without_empty([["method", names[-2], "test images", "new tasks"], *known], [3]), 1)
        lines += wrap(new_tasks_note(section, suite))
    comparison = section.comparison
    if comparison is not None:
        lines += ["", f"Differences to {comparison.control or 'a control'}"]
        if comparison.contrasts:
            lines += align(_comparison_grid(section, suite), 1)
        lines += wrap(comparison_notes(section, suite, level, cells))
    if section.ranks is not None:
        lines += ["", *wrap(ranks_notes(section, level))]
    return lines


def wrap(notes: Sequence[str]) -> list[str]:
    """Return notes as lines of at most 100 characters; those after the first are indented."""
    return [line for note in notes for line in textwrap.wrap(note, _WIDTH, subsequent_indent="  ")]


def align(grid: list[list[str]], left: int) -> list[str]:
    """Align the columns under a header of two lines; the first `left` columns are text, wrapped if it has to be."""
    grid = [list(map(printable, line)) for line in grid]
    heads = [_two_lines(text) for text in grid[0]]
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


def _two_lines(text: str) -> tuple[str, str]:
    """Split a header in the middle: "mean of 19 tasks" into "mean of" and "19 tasks"; one word goes below."""
    words = text.split()
    half = len(words) // 2
    return (" ".join(words[:half]), " ".join(words[half:]))
