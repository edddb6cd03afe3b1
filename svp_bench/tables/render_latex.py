r"""Tables as LaTeX: plain tabulars that need `\usepackage{booktabs}` and nothing else.

One float a section: the tasks of each group, then the means with their intervals. Bold and underlined is only what the
intervals allow (`stats.best_and_second`); marks of the data are explained below the tabulars.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from svp_bench.stats.estimates import FEWEST_PAIRS, Marks
from svp_bench.tables.comparison import column_marks
from svp_bench.tables.model import IMAGES, Mean, Row, Section, Table
from svp_bench.tables.notes import (
    MAJORITY,
    MISSING,
    RANDOM_WEIGHTS,
    columns,
    common_notes,
    decimals,
    halves,
    interval,
    interval_notes,
    majority_scores,
    marks,
    named,
    one_line,
    percent,
    shown_columns,
    size_span,
    span,
    weights,
)
from svp_bench.tables.plan import PlanResult
from svp_bench.tables.planned import planned_grid, planned_notes

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
    if table.planned is not None:
        lines += ["", *_planned(table, table.planned)]
    return "\n".join(lines) + "\n"


def _float(table: Table, section: Section, number: int) -> list[str]:
    allowed = column_marks(section)
    return [
        r"\begin{table}[tbp]",
        r"\centering",
        rf"\caption{{{_caption(section, allowed)}}}",
        rf"\label{{tab:{table.suite.table}-{number}}}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{2pt}",
        *_tasks(section, allowed),
        "",
        r"\medskip",
        "",
        *_means(section, allowed),
        *(
            line
            for note in [*interval_notes(section), *common_notes(section)]
            for line in ("", r"\smallskip", rf"\parbox{{0.95\linewidth}}{{{escape(note)}}}")
        ),
        r"\end{table}",
    ]


def _planned(table: Table, result: PlanResult) -> list[str]:
    """Return the float of the planned comparisons."""
    head, *rows = planned_grid(result)
    caption = " ".join([f"{table.suite.title}: planned comparisons.", *planned_notes(table)])
    return [
        r"\begin{table}[tbp]",
        r"\centering",
        rf"\caption{{{escape(caption)}}}",
        rf"\label{{tab:{table.suite.table}-planned}}",
        r"\scriptsize",
        r"\setlength{\tabcolsep}{2pt}",
        *_tabular("rlrrrrrrl", [_line(map(escape, head))], [list(map(escape, row)) for row in rows], []),
        r"\end{table}",
    ]


def _caption(section: Section, allowed: Sequence[Marks | None]) -> str:
    seeds = [count for row in section.rows for count in row.seeds]
    data = f", {section.data}" if section.data else ""
    parts = [
        f"{section.suite.title}{data}: top-1 accuracy in percent.",
        f"Protocol {section.first.protocol}, version {section.first.protocol_version}. "
        + (section.selection or "Its card is not available in this version."),
        f"Track {section.track.words}.",
        f"Backbone {section.first.backbone}, {weights(section)}.",
        f"{span(min(seeds), max(seeds))} seed{'' if max(seeds) == 1 else 's'} a task.",
    ]
    if section.random:
        parts.append(RANDOM_WEIGHTS)
    if any(_new_tasks(section, row) for row in section.rows):
        parts.append(f"In brackets: {percent(section.level)} interval for new tasks.")
    if any(found and found.best for found in allowed):
        parts.append(
            "Bold: better than every other row of the column by a sign flip over the shared seeds, from "
            f"{FEWEST_PAIRS} on ({percent(section.level)}, Holm within the column); underlined: better than every "
            "other but that."
        )
    elif not section.random and len(section.rows) > 1:
        parts.append(
            f"Nothing is bold: differences between rows cannot be tested with fewer than {FEWEST_PAIRS} seeds."
            if max(seeds) < FEWEST_PAIRS
            else "No row differs from all others of a column by a sign flip over the seeds, so nothing is bold."
        )
    return escape(" ".join(parts))


def _tasks(section: Section, allowed: Sequence[Marks | None]) -> list[str]:
    """A tabular a group, with its tasks: more than one group side by side would be wider than a page."""
    suite, chance = section.suite, majority_scores(section)
    lines: list[str] = []
    first = 0
    for group, names in suite.groups.items():
        indices = range(first, first + len(names))
        first += len(names)
        head = [_line(["method", *(_stacked(re.split("[_-]", name)) for name in names)])]
        if len(suite.groups) > 1:
            above = _line(["", rf"\multicolumn{{{len(names)}}}{{c}}{{{escape(group)}}}"])
            head = [above, rf"\cmidrule(lr){{2-{len(names) + 1}}}", *head]
        rows = []
        for row in section.rows:
            cells = []
            for index in indices:
                cell = row.cells.get(suite.tasks[index])
                text = escape(MISSING) if cell is None else _emphasised(cell.mean, row, allowed[index])
                cells.append(text + ("" if cell is None else escape(marks(cell))))
            rows.append([escape(named(row)), *cells])
        majority = [chance[index] for index in indices]
        foot = [MAJORITY, *map(decimals, majority)] if any(score is not None for score in majority) else []
        lines += [*(["", r"\smallskip", ""] if lines else []), *_tabular("l" + "r" * len(names), head, rows, foot)]
    return lines


def _means(section: Section, allowed: Sequence[Marks | None]) -> list[str]:
    """The tabular of the means, with their intervals."""
    names, shown, first = columns(section.suite), shown_columns(section.suite, tasks=False), len(section.suite.tasks)
    beyond = [_new_tasks(section, row) for row in section.rows]
    head = ["rank", "method", *(names[index] for index in shown)]
    head += [f"new tasks, {percent(section.level)}"] if any(beyond) else []
    head += ["complete", "seeds", "trainable w/o head"]
    rows = []
    for row, new_tasks in zip(section.rows, beyond, strict=True):
        means = [_mean(section, row, row.shown_means[index - first], allowed[index]) for index in shown]
        facts = [*([new_tasks or MISSING] if any(beyond) else []), row.done, span(*row.seeds), size_span(*row.adapter)]
        rank = MISSING if row.rank is None else str(row.rank)
        rows.append([escape(rank), escape(named(row)), *means, *map(escape, facts)])
    chance = [majority_scores(section)[index] for index in shown]
    foot = [MISSING, MAJORITY, *map(decimals, chance), *[MISSING] * (len(head) - 2 - len(shown))]
    stacked = [_line([_stacked([half for half in halves(name) if half]) for name in head])]
    known = any(score is not None for score in chance)
    return _tabular("rl" + "r" * (len(head) - 2), stacked, rows, foot if known else [])


def _mean(section: Section, row: Row, mean: Mean | None, allowed: Marks | None) -> str:
    if mean is None:
        return escape(MISSING)
    text = _emphasised(mean.value, row, allowed)
    if mean.behind and not section.random:
        half, star, _ = mean.behind.replace("±", r"\pm").partition(IMAGES)
        text += f"$_{{{half}}}{star and f'^{{{star}}}'}$"
    partial = f" ({row.partial})" if row.partial and mean is row.present else ""
    return f"{text}{partial}{escape('§') if mean.synthetic else ''}"


def _tabular(alignment: str, head: Sequence[str], rows: Sequence[Sequence[str]], foot: Sequence[str]) -> list[str]:
    lines = [rf"\begin{{tabular}}{{{alignment}}}", r"\toprule", *head, r"\midrule", *map(_line, rows)]
    lines += [r"\midrule", _line([escape(text) for text in foot])] if foot else []
    return [*lines, r"\bottomrule", r"\end{tabular}"]


def _stacked(words: Sequence[str]) -> str:
    """Words below each other: a narrow header."""
    lines = r" \\ ".join(escape(word) for word in words)
    return lines if len(words) == 1 else rf"\shortstack[r]{{{lines}}}"


def _new_tasks(section: Section, row: Row) -> str:
    """The interval over new tasks, or nothing."""
    text = MISSING if section.random else interval(row.new_tasks)
    return "" if text == MISSING else text


def _emphasised(value: float, row: Row, allowed: Marks | None) -> str:
    if allowed is not None and row.label == allowed.best:
        return rf"\textbf{{{value:.2f}}}"
    if allowed is not None and row.label == allowed.second:
        return rf"\underline{{{value:.2f}}}"
    return f"{value:.2f}"


def _line(cells: Iterable[str]) -> str:
    return " & ".join(cells) + r" \\"
