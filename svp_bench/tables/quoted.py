"""Quoted numbers as tables show them: apart, marked, as printed, never ranked, next to ours of the same method."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping

from svp_bench.core.errors import plural
from svp_bench.records.defaults import other, shipped_layer
from svp_bench.records.digests import flat
from svp_bench.records.published import OTHER_DATA, WHOLE, PublishedRow
from svp_bench.tables.model import Row, Section, Table
from svp_bench.tables.notes import MISSING, columns, decimals, one_line, shown_columns, size_span

MEASURED = "measured here"
QUOTED_CAUTION = (
    "Copied as printed, from other code, protocols and selection rules; never ranked with the rows above. Known errors "
    "are listed in `results/published/README.md`."
)
QUOTED_NOTES = (
    f"{MEASURED}: rows of this table, above the published ones of the same method. (not Vim), or *: another backbone. "
    "(secondary), or s: read elsewhere than with those who measured it."
)
QUOTED_COLUMNS = ("our_method", "secondary", "published_protocol")
"""Columns that only a wide CSV with quoted rows has."""
_UNITS = {"params": "", "params_k": " K", "params_m": " M"}


def quoted_methods(table: Table) -> list[tuple[PublishedRow, dict[str, str], str]]:
    """Return one entry a quoted method: a row of it, score column → value as printed, parameters as printed.

    Those of methods with rows of ours come first, in the order of these; the others in the order of files and lines.
    """
    entries: dict[tuple[str, ...], tuple[PublishedRow, dict[str, str], list[str]]] = {}
    for row in table.published:
        _, scores, parameters = entries.setdefault(row.entry, (row, {}, []))
        if row.task_or_group == WHOLE and row.metric in _UNITS:
            parameters.append(row.value + _UNITS[row.metric])
        elif row.is_score:
            scores[row.task_or_group] = row.value
    place = {name: number for number, name in enumerate(dict.fromkeys(name for name, _, _ in measured(table)))}
    found = [(row, scores, " / ".join(parameters)) for row, scores, parameters in entries.values() if scores]
    return sorted(found, key=lambda entry: place.get(entry[0].ours, len(place)))


def measured(table: Table) -> Iterator[tuple[str, Section, Row]]:
    """Yield the rows on pre-trained weights, with their name as quoted rows have it in `ours`.

    That is the quoted method file whose settings the row has, else its method.
    """
    files = sorted({row.ours for row in table.published if "/" in row.ours})
    for section in table.sections:
        for row in section.rows if not section.random else ():
            yield next((name for name in files if _has_settings(row, name)), row.method), section, row


def _has_settings(row: Row, name: str) -> bool:
    """Whether the runs of a row have all settings of a shipped method file."""
    config, layer = dict(flat(row.records[0].config)), shipped_layer(f"method/{name}.yaml")
    return bool(layer) and not any(other(config.get(key), value) for key, value in layer.items())


def quoted_grid(table: Table, *, terminal: bool = False) -> list[list[str]]:
    """Return header and rows: with every task, or for a terminal with numbered sources (`citations`) and means only.

    The rows of ours stand above the quoted ones of the same method.
    """
    names, numbers = columns(table.suite), {source: n for n, source in enumerate(citations(table), 1)}
    indices = shown_columns(table.suite, tasks=not terminal)
    shown = [names[index] for index in indices]
    facts = ["backbone", "method"] if terminal else ["backbone", "pre-training", "method"]
    grid = [[*([] if terminal else ["ours"]), "source", *facts, *shown, *([] if terminal else ["parameters"])]]
    rows, done = [*measured(table)], set()
    for quote, scores, parameters in quoted_methods(table):
        if not any(name in scores for name in shown):
            continue
        for name, section, row in rows if quote.ours not in done else ():
            if name != quote.ours:
                continue
            values = [decimals(row.scores[index]) for index in indices]
            backbone, weights = section.first.backbone, section.checkpoint
            if terminal:
                grid.append(["here", f"{backbone}, {weights}", row.label, *values])
            else:
                size = size_span(*row.adapter)
                grid.append([name, MEASURED, backbone, weights, row.label, *values, size])
        done.add(quote.ours)
        values = [scores.get(name, MISSING) for name in shown]
        if terminal:
            mark = " *" if not_vim(quote) else ""
            source = f"[{numbers[quote.source]}]{' s' if quote.secondary else ''}"
            grid.append([source, f"{quote.backbone}{mark}, {quote.pretrain}", quote.method, *values])
        else:
            named = [quote.ours, quote.source + secondary(quote), quote.backbone + not_vim(quote), quote.pretrain]
            grid.append([*named, quote.method, *values, parameters or MISSING])
    return grid


def secondary(quote: PublishedRow) -> str:
    """Return the mark of a number that was read elsewhere than with those who measured it."""
    return " (secondary)" if quote.secondary else ""


def not_vim(quote: PublishedRow) -> str:
    """Return the mark of another backbone than Vim."""
    return "" if quote.backbone.lower().startswith(("vim", "not stated")) else " (not Vim)"


def citations(table: Table) -> dict[str, str]:
    """Return source → its name, citations and protocols, on one line, in the order in which sources are quoted."""
    sources: dict[str, tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for row in table.published:
        sources[row.source][0].add(row.citation)
        sources[row.source][1].add(row.protocol)
    return {
        source: one_line(f"{source}: {'; '.join(sorted(cited))}. Protocol: {' / '.join(sorted(protocols))}.")
        for source, (cited, protocols) in sources.items()
    }


def other_lines(table: Table) -> list[str]:
    """Return a line for each quoted method without a score in the columns of the suite: its numbers on other data."""
    entries: dict[tuple[str, ...], list[PublishedRow]] = defaultdict(list)
    for row in table.published:
        entries[row.entry].append(row)
    return [
        one_line(
            f"{rows[0].method}, {rows[0].backbone}{not_vim(rows[0])} (ours: {rows[0].ours}): "
            f"{', '.join(map(_fact, rows))} ({rows[0].source}{secondary(rows[0])})."
        )
        for rows in entries.values()
        if not any(row.is_score for row in rows)
    ]


def _fact(row: PublishedRow) -> str:
    """Return a value with its data: "Stanford Cars 85.38", "natural: top1 gain points 3.5"."""
    data = "" if row.task_or_group == WHOLE else row.task_or_group.removeprefix(OTHER_DATA)
    if row.metric in _UNITS:
        return f"{row.value}{_UNITS[row.metric]} parameters"
    name = data if row.metric == "top1" else f"{data + ': ' if data else ''}{row.metric.replace('_', ' ')}"
    return f"{name} {row.value}"


def not_quoted(table: Table, terminal: bool = False) -> list[str]:
    """Return a line that counts the quoted methods without a number in the columns of `quoted_grid`, or nothing."""
    names = columns(table.suite)
    shown = {names[index] for index in shown_columns(table.suite, tasks=not terminal)}
    missing = sum(not shown & {*scores} for _, scores, _ in quoted_methods(table))
    return [f"{plural(missing, 'quoted method')} without a number in these columns."] if missing else []


def quoted_facts(quote: PublishedRow, scores: Mapping[str, str]) -> dict[str, object]:
    """Return a quoted method as a line of the wide CSV."""
    return {
        "backbone": quote.backbone,
        "checkpoint": quote.pretrain,
        "weights": "as the source states",
        "row": quote.method,
        "method": quote.method,
        "source": quote.source,
        "citation": quote.citation,
        **scores,
        **dict(zip(QUOTED_COLUMNS, (quote.ours, "yes" if quote.secondary else "no", quote.protocol), strict=True)),
    }
