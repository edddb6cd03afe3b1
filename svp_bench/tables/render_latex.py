r"""Tables as LaTeX: plain tabulars that need `\usepackage{booktabs}` and nothing else.

One float a section: the tasks of each group, then the means with their intervals. Bold and underlined is only what the
intervals allow (`stats.best_and_second`); marks of the data are explained below the tabulars.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from svp_bench.stats.estimates import FEWEST_PAIRS as FEWEST
from svp_bench.stats.estimates import Marks
from svp_bench.tables.comparison import column_marks
from svp_bench.tables.model import Row, Section, Table
from svp_bench.tables.notes import (
    IMAGES,
    MAJORITY,
    MISSING,
    RANDOM_WEIGHTS,
    SYNTHETIC_NOTE,
    Whisker,
    averaged_tasks,
    columns,
    images_note,
    interval,
    majority_notes,
    majority_scores,
    marks,
    named,
    one_line,
    override_notes,
    partial,
    partial_notes,
    percent,
    provenance_notes,
    short_name,
    shown_columns,
    shown_scores,
    sizes,
    span,
    unknown_variance_notes,
    weights,
    whiskers,
)
from svp_bench.tasks.cards import SuiteCard

__all__ = ["escape", "render_latex"]

_SPECIAL = {
    **{char: f"\\{char}" for char in "_%&#${}"},
    **{char: f"${char}$" for char in "<>|"},  # in the default font encoding these three are other glyphs
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    '"': "''",
    "–": "--",
    "±": r"$\pm$",
    "×": r"$\times$",
    "−": "$-$",
    "…": r"\ldots{}",
    "†": r"$^{\dagger}$",
    "‡": r"$^{\ddagger}$",
    "§": r"$^{\S}$",
    "¶": r"$^{\P}$",
    "‖": r"$^{\|}$",
    "`": r"\textasciigrave{}",
}
_LATIN = 0x180  # below: Latin letters, which LaTeX knows as UTF-8


def escape(text: str) -> str:
    """Return `text`, on one line, as LaTeX that prints it; letters that LaTeX may not know, by their code point."""

    def printed(char: str) -> str:
        return _SPECIAL.get(char) or (char if ord(char) < _LATIN else f"(U+{ord(char):04X})")

    return "".join(map(printed, one_line(text)))


def render_latex(table: Table) -> str:
    """Return the table as LaTeX."""
    lines = [
        f"% {one_line(table.suite.title)}, suite {table.suite.name}, version {table.suite.version}.",
        "% Derived from records by `svp-bench table`; do not edit.",
        r"% Needs \usepackage{booktabs}. Quoted numbers are in the other files only.",
    ]
    if not table.sections:
        lines.append("% There are no complete records of this suite yet.")
    for number, section in enumerate(table.sections, 1):
        lines += ["", *_float(table, section, number)]
    return "\n".join(lines) + "\n"


def _float(table: Table, section: Section, number: int) -> list[str]:
    suite = table.suite
    allowed = column_marks(suite, section, table.level)
    tasks, means = _tasks(section, suite, allowed), _means(section, suite, allowed, table.level)
    return [
        r"\begin{table}[tbp]",
        r"\centering",
        rf"\caption{{{_caption(table, section, allowed)}}}",
        rf"\label{{tab:{suite.table}-{number}}}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{2pt}",
        *tasks,
        "",
        r"\medskip",
        "",
        *means,
        *_footnotes(section, suite),
        r"\end{table}",
    ]


def _caption(table: Table, section: Section, allowed: Sequence[Marks | None]) -> str:
    seeds = [count for row in section.rows for count in row.seeds]
    level = percent(table.level)
    rule = section.selection or "Its card is not available in this version."
    parts = [
        f"{table.suite.title}{f', {section.data}' if section.data else ''}: top-1 accuracy in percent.",
        f"Protocol {section.protocol}, version {section.protocol_version}. {rule}",
        f"Track {section.track.words}.",
        f"Backbone {section.backbone}, {weights(section)}.",
        f"{span(min(seeds), max(seeds))} seed{'' if max(seeds) == 1 else 's'} a task.",
    ]
    if section.random:
        parts.append(RANDOM_WEIGHTS)
    shown = [whisker for row in section.rows for whisker in _whiskers(section, row, table.suite) if whisker is not None]
    if any(not whisker.images for whisker in shown):
        parts.append(f"± behind a mean: half its {level} interval for these tasks and new seeds (Welch–Satterthwaite).")
    if any(whisker.images for whisker in shown):
        parts.append(images_note(table.level))
    if any(_new_tasks(section, row) for row in section.rows):
        parts.append(f"In brackets: {level} interval for new tasks.")
    if any(found and found.best for found in allowed):
        parts.append(
            f"Bold: better than every other row of the column by a sign flip over the shared seeds, from {FEWEST} on "
            f"({level}, Holm within the column); underlined: better than every other but that."
        )
    elif not section.random and len(section.rows) > 1 and max(seeds) < FEWEST:
        parts.append(f"Nothing is bold: differences between rows cannot be tested with fewer than {FEWEST} seeds.")
    elif not section.random and len(section.rows) > 1:
        parts.append("No row differs from all others of a column by a sign flip over the seeds, so nothing is bold.")
    return escape(" ".join(parts))


def _tasks(section: Section, suite: SuiteCard, allowed: Sequence[Marks | None]) -> list[str]:
    """A tabular a group, with its tasks: more than one group side by side would be wider than a page."""
    lines: list[str] = []
    first = 0
    for group, names in suite.groups.items():
        indices = range(first, first + len(names))
        first += len(names)
        lines += [
            *(["", r"\smallskip", ""] if lines else []),
            rf"\begin{{tabular}}{{l{'r' * len(names)}}}",
            r"\toprule",
        ]
        if len(suite.groups) > 1:
            lines += [_line(["", rf"\multicolumn{{{len(names)}}}{{c}}{{{escape(group)}}}"])]
            lines += [rf"\cmidrule(lr){{2-{len(names) + 1}}}"]
        lines += [_line(["method", *(_stacked(re.split("[_-]", name)) for name in names)]), r"\midrule"]
        for row in section.rows:
            cells = []
            for index in indices:
                cell = row.cells.get(suite.tasks[index])
                text = escape(MISSING) if cell is None else _emphasised(f"{cell.mean:.2f}", row, allowed[index])
                cells.append(text + ("" if cell is None else escape(marks(cell))))
            lines.append(_line([escape(named(row)), *cells]))
        chance = majority_scores(section, suite)
        if any(chance[index] is not None for index in indices):
            lines += [r"\midrule", _line([escape(MAJORITY), *(_plain(chance[index]) for index in indices)])]
        lines += [r"\bottomrule", r"\end{tabular}"]
    return lines


def _stacked(words: Sequence[str]) -> str:
    """Words below each other: a narrow header."""
    lines = r" \\ ".join(escape(word) for word in words)
    return lines if len(words) == 1 else rf"\shortstack[r]{{{lines}}}"


def _means(section: Section, suite: SuiteCard, allowed: Sequence[Marks | None], level: float) -> list[str]:
    """The tabular of the means, with their intervals."""
    names, shown = columns(suite), shown_columns(suite, tasks=False)
    beyond = [f"new tasks, {percent(level)}"] if any(_new_tasks(section, row) for row in section.rows) else []
    head = ["rank", "method", *(names[index] for index in shown), *beyond]
    head += ["complete", "seeds", "trainable w/o head"]
    lines = [rf"\begin{{tabular}}{{rl{'r' * (len(head) - 2)}}}", r"\toprule"]
    lines += [_line([_stacked(_halves(name)) for name in head]), r"\midrule"]
    for row in section.rows:
        values, behind, averaged = shown_scores(row, suite), _whiskers(section, row, suite), averaged_tasks(suite)
        synthetic = {task for task, cell in row.cells.items() if cell.synthetic}
        cells = []
        for index in shown:
            value, whisker = values[index], behind[index]
            text = escape(MISSING) if value is None else _emphasised(f"{value:.2f}", row, allowed[index])
            star = f"^{{{IMAGES}}}" if whisker is not None and whisker.images else ""
            if whisker is not None:
                low, high = f"{whisker.low:.2f}", f"{whisker.high:.2f}"
                text += (
                    rf"$_{{[{low}, {high}]}}{star}$"
                    if whisker.half is None
                    else rf"$_{{\pm {whisker.half:.2f}}}{star}$"
                )
            if index == len(names) - 2 and partial(row, suite):
                text += f" ({partial(row, suite)})"
            cells.append(text + (escape("§") if value is not None and synthetic & averaged[index] else ""))
        rank = escape(MISSING) if row.rank is None else str(row.rank)
        done = f"{len(row.cells)}/{len(suite.tasks)}"
        facts = [done, escape(span(*row.seeds)), escape(sizes(row))]
        new_tasks = [_new_tasks(section, row) or escape(MISSING) for _ in beyond]
        lines.append(_line([rank, escape(named(row)), *cells, *new_tasks, *facts]))
    chance = majority_scores(section, suite)
    if any(chance[index] is not None for index in shown):
        rest = [escape(MISSING)] * (len(beyond) + 3)
        cells = [_plain(chance[index]) for index in shown]
        lines += [r"\midrule", _line([escape(MISSING), escape(MAJORITY), *cells, *rest])]
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _halves(text: str) -> list[str]:
    """Split a header in the middle, between words."""
    words = text.split()
    half = len(words) // 2
    return [" ".join(words[:half]), " ".join(words[half:])] if half else [text]


def _plain(value: float | None) -> str:
    return escape(MISSING) if value is None else f"{value:.2f}"


def _whiskers(section: Section, row: Row, suite: SuiteCard) -> list[Whisker | None]:
    """As `whiskers`; random weights are a smoke test, and their means stand without intervals."""
    return [None for _ in columns(suite)] if section.random else whiskers(row, suite)


def _new_tasks(section: Section, row: Row) -> str:
    """The interval over new tasks, or nothing."""
    text = MISSING if section.random else interval(row.intervals.new_tasks)
    return "" if text == MISSING else text


def _emphasised(text: str, row: Row, allowed: Marks | None) -> str:
    if allowed is not None and row.label == allowed.best:
        return rf"\textbf{{{text}}}"
    if allowed is not None and row.label == allowed.second:
        return rf"\underline{{{text}}}"
    return text


def _line(cells: Sequence[str]) -> str:
    return " & ".join(cells) + r" \\"


def _footnotes(section: Section, suite: SuiteCard) -> list[str]:
    """What the marks mean, where an interval is missing, and what the runs were made with."""
    notes = []
    cells = [cell for row in section.rows for cell in row.cells.values()]
    shown = {mark for cell in cells for mark in marks(cell)}
    if "†" in shown:
        notes.append("† The files on disk differ from the task card in count or digest.")
    if "‡" in shown:
        variants = sorted({f"{short_name(cell.task)} ({cell.variant})" for cell in cells if "‡" in marks(cell)})
        notes.append(f"‡ Another variant of the data than the card's own: {', '.join(variants)}.")
    if "§" in shown:
        notes.append(SYNTHETIC_NOTE)
    notes += partial_notes(section, suite)
    notes += majority_notes(section)
    notes += unknown_variance_notes(section, suite)
    notes += override_notes(section)
    notes += provenance_notes(section)
    return [line for note in notes for line in ("", r"\smallskip", rf"\parbox{{0.95\linewidth}}{{{escape(note)}}}")]
