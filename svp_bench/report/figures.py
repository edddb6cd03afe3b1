"""The plots as Plotly specifications: plain dictionaries, which the page draws with the colours of its theme.

Of each row the colour (Okabe and Ito's palette, for all kinds of colour vision), the marker's shape and the name tell
it apart; none of them alone has to. A colour that begins with "@" is one of the page's theme: "@ink", "@muted",
"@grid". Text from records is escaped, because Plotly reads a little HTML in its texts.

A specification is {"data", "layout", "height", "quoted"}. The last is what takes the place of layout and height while
published numbers are shown, and data to be added, or with "replace" to take the place of the data; or None.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from svp_bench.core.errors import plural, printable
from svp_bench.report.model import (
    CellView,
    Point,
    QuotedView,
    RowView,
    SectionView,
    SuiteView,
    TaskView,
    TradeOff,
    Value,
)

__all__ = [
    "COLOURS",
    "SHAPES",
    "columns_of",
    "figures_of",
    "group_figure",
    "plain",
    "slug",
    "task_figure",
    "trade_off_figure",
]

Figure = dict[str, Any]

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C")
"""Okabe and Ito's palette (2008) with a grey for its black, without its yellow, which vanishes on white."""

_ON_COLOUR = ("#000000", "#000000", "#000000", "#FFFFFF", "#000000", "#000000", "#000000")
SHAPES = (
    *("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "star", "hexagon"),
    "hourglass",
)
"""Ten, so that colour and shape together name seventy rows."""

_QUOTED_MARKER = {"symbol": "star-diamond-open", "size": 10, "color": "@muted", "line": {"width": 1.5}}
_LINE = 26  # pixels of a row in a plot of rows
_TALL = 360  # pixels of a plot of accuracy over a cost
_NAME = 22  # characters of a name before it is wrapped


def plain(text: str) -> str:
    """Return `text` so that Plotly shows it as it is."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _name(label: str) -> str:
    return "<br>".join(plain(line) for line in textwrap.wrap(printable(label), _NAME)) or "–"


def _colour(row: RowView) -> str:
    return COLOURS[row.style % len(COLOURS)]


def _shape(row: RowView) -> str:
    return SHAPES[row.style % len(SHAPES)]


def _between(value: Value, level: float) -> str:
    parts = [f"<b>{value.mean:.2f} %</b>"]
    if value.these:
        parts.append(f"{level:.0%} for new seeds: {value.these[0]:.2f} to {value.these[1]:.2f}")
    else:
        parts.append("no interval over new seeds")
    if value.images:
        parts.append(f"{level:.0%} for new test images: {value.images[0]:.2f} to {value.images[1]:.2f}")
    if value.new:
        parts.append(f"{level:.0%} for new tasks: {value.new[0]:.2f} to {value.new[1]:.2f}")
    return "<br>".join(parts)


def _error(values: Sequence[Value | None], **style: Any) -> dict[str, Any]:
    """Error bars from the intervals over new seeds, else over test images; none where there is neither."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [_round(v.shown[1] - v.mean) if v and v.shown else None for v in values],
        "arrayminus": [_round(v.mean - v.shown[0]) if v and v.shown else None for v in values],
        "color": "@ink",
        **style,
    }


def _round(value: float) -> float:
    return round(value, 4)


def _rows_layout(rows: Sequence[RowView], x: Mapping[str, Any], quoted: bool) -> tuple[dict[str, Any], int]:
    """The layout of a plot with one line a row, the first on top; `quoted` adds a line for published numbers."""
    names = [_name(row.label) for row in rows] + (["<i>published,<br>not measured here</i>"] if quoted else [])
    lines = sum(max(_LINE, 14 * (name.count("<br>") + 1) + 4) for name in names)
    layout = {
        "xaxis": {"ticksuffix": " %", **x},
        "yaxis": {
            "tickmode": "array",
            "tickvals": list(range(len(names))),
            "ticktext": names,
            "range": [len(names) - 0.4, -0.6],
            "automargin": True,
            "fixedrange": True,
            "showgrid": False,
            "zeroline": False,
        },
        "margin": {"l": 10, "r": 22, "t": 8, "b": 36},
        "showlegend": False,
        "bargap": 0.3,
    }
    return layout, lines + 52


def _quoted_line(line: int, quoted: Sequence[QuotedView], column: str) -> dict[str, Any] | None:
    """Published numbers of a column, on the line `line`."""
    found = [(float(view.scores[column]), view) for view in quoted if column in view.scores]
    if not found:
        return None
    return {
        "type": "scatter",
        "mode": "markers",
        "name": "published, not measured here",
        "x": [score for score, _ in found],
        "y": [line for _ in found],
        "marker": _QUOTED_MARKER,
        "hoverinfo": "text",
        "hovertext": [_quoted_text(view, f"{score:g} %") for score, view in found],
    }


def _quoted_text(view: QuotedView, score: str) -> str:
    lines = [
        f"published, not measured here: <b>{score}</b>",
        plain(f"{view.row.method}, {view.row.backbone} ({view.row.pretrain})"),
        plain(view.row.source),
    ]
    return "<br>".join(lines)


def _with_quoted(
    data: list[dict[str, Any]], rows: Sequence[RowView], x: Mapping[str, Any], trace: dict[str, Any] | None
) -> Figure:
    layout, height = _rows_layout(rows, x, quoted=False)
    added = None
    if trace is not None:
        wider, taller = _rows_layout(rows, x, quoted=True)
        added = {"data": [trace], "layout": wider, "height": taller}
    return {"data": data, "layout": layout, "height": height, "quoted": added}


def group_figure(
    section: SectionView, values: Mapping[str, Value | None], column: str, quoted: Sequence[QuotedView], level: float
) -> Figure:
    """Draw bars of a mean with the interval over new seeds; they begin at zero. Missing results are named."""
    rows = section.rows
    shown = [(line, row, value) for line, row in enumerate(rows) if (value := values[row.id]) is not None]
    missing = [line for line, row in enumerate(rows) if values[row.id] is None]
    data: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "x": [_round(value.mean) for _, _, value in shown],
            "y": [line for line, _, _ in shown],
            "marker": {"color": [_colour(row) for _, row, _ in shown], "line": {"color": "@ink", "width": 1}},
            "error_x": _error([value for _, _, value in shown], thickness=2, width=5),
            "text": [f"{value.mean:.1f}" for _, _, value in shown],
            "textposition": "inside",
            "insidetextanchor": "start",
            "insidetextfont": {"color": [_ON_COLOUR[row.style % len(_ON_COLOUR)] for _, row, _ in shown]},
            "hoverinfo": "text",
            "hovertext": [
                f"{plain(row.label)}, {plain(column)}<br>{_between(value, level)}" for _, row, value in shown
            ],
            "customdata": [list(row.records) for _, row, _ in shown],
            "meta": {"titles": [f"{row.label}: {column}" for _, row, _ in shown]},
        }
    ]
    if missing:
        data.append(
            {
                "type": "scatter",
                "mode": "text",
                "x": [1 for _ in missing],
                "y": missing,
                "text": ["– results are missing" for _ in missing],
                "textposition": "middle right",
                "textfont": {"color": "@muted"},
                "hoverinfo": "skip",
            }
        )
    x = {"range": [0, 100], "tickvals": [0, 25, 50, 75, 100], "fixedrange": True}
    return _with_quoted(data, rows, x, _quoted_line(len(rows), quoted, column))


def task_figure(section: SectionView, task: TaskView, quoted: Sequence[QuotedView], level: float) -> Figure:
    """Draw every seed of a task as a point, and the mean with its interval over new seeds."""
    rows = section.rows
    cells: list[tuple[int, RowView, CellView]] = [
        (line, row, row.cells[task.name]) for line, row in enumerate(rows) if task.name in row.cells
    ]
    runs = [
        (line + _shift(place, len(cell.runs)), row, run)
        for line, row, cell in cells
        for place, run in enumerate(cell.runs)
    ]
    data: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "mean",
            "x": [_round(cell.value.mean) for _, _, cell in cells],
            "y": [line for line, _, _ in cells],
            "marker": {
                "color": [_colour(row) for _, row, _ in cells],
                "symbol": [_shape(row) for _, row, _ in cells],
                "size": 11,
                "line": {"color": "@ink", "width": 1.2},
            },
            "error_x": _error([cell.value for _, _, cell in cells], thickness=1.6, width=5),
            "hoverinfo": "text",
            "hovertext": [
                f"{plain(row.label)}, mean of {len(cell.runs)}<br>{_between(cell.value, level)}"
                f"<br>{plural(cell.table.images, 'test image')}: binomial standard error {cell.binomial:.2f}"
                for _, row, cell in cells
            ],
            "customdata": [list(cell.records) for _, _, cell in cells],
            "meta": {"titles": [f"{row.label} on {task.id}" for _, row, _ in cells]},
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "one seed",
            "x": [_round(run.top1) for _, _, run in runs],
            "y": [_round(line) for line, _, _ in runs],
            "marker": {
                "color": [_colour(row) for _, row, _ in runs],
                "symbol": "circle",
                "size": 6,
                "opacity": 0.8,
                "line": {"color": "@ink", "width": 0.6},
            },
            "hoverinfo": "text",
            "hovertext": [f"{plain(row.label)}, seed {run.seed}: <b>{run.top1:.2f} %</b>" for _, row, run in runs],
            "customdata": [[run.record] for _, _, run in runs],
            "meta": {"titles": [f"{row.label} on {task.id}, seed {run.seed}" for _, row, run in runs]},
        },
    ]
    return _with_quoted(data, rows, {"fixedrange": True}, _quoted_line(len(rows), quoted, task.id))


def _shift(place: int, count: int) -> float:
    """Move the seeds of a line apart, below the mean, so that equal ones stay visible."""
    return 0.16 + 0.22 * place / max(count - 1, 1)


def trade_off_figure(trade: TradeOff, quoted: Sequence[QuotedView], column: str, level: float) -> Figure:
    """Draw accuracy over a cost, a point a row, with the interval over new seeds and the Pareto front."""
    published = [
        (view.size, float(view.scores[column]), view)
        for view in quoted
        if view.size is not None and column in view.scores and trade.axis.id == "parameters"
    ]
    alone = _CostScale([point.x for point in trade.points])
    data = [_point_trace(point, alone, trade, level) for point in trade.points]
    data += _front_trace(trade, alone)
    added = None
    if published:
        scale = _CostScale([*(point.x for point in trade.points), *(size for size, _, _ in published)])
        again = [_point_trace(point, scale, trade, level) for point in trade.points] + _front_trace(trade, scale)
        trace = {
            "type": "scatter",
            "mode": "markers",
            "name": "published, not measured here",
            "x": [scale.place(size) for size, _, _ in published],
            "y": [score for _, score, _ in published],
            "marker": _QUOTED_MARKER,
            "hoverinfo": "text",
            "hovertext": [
                f"{_quoted_text(view, f'{score:g} %')}<br>parameters as printed: {plain(view.parameters)}"
                for _, score, view in published
            ],
        }
        added = {"replace": True, "data": [*again, trace], "layout": _cost_layout(trade, scale), "height": _TALL}
    return {"data": data, "layout": _cost_layout(trade, alone), "height": _TALL, "quoted": added}


class _CostScale:
    """Places of costs on an axis: by powers of ten, with a place for zero at its left; even where they are near."""

    def __init__(self, costs: Sequence[float]) -> None:
        positive = [cost for cost in costs if cost > 0]
        self.zero = any(cost == 0 for cost in costs)
        self.even = not self.zero and bool(positive) and max(positive) < 10 * min(positive)
        self.low = math.floor(math.log10(min(positive))) if positive else 0
        self.high = max(math.ceil(math.log10(max(positive))), self.low + 1) if positive else self.low + 1
        self.top = max(positive, default=1.0)

    def place(self, cost: float) -> float:
        if self.even:
            return _round(cost)
        return _round(math.log10(cost)) if cost > 0 else self.low - 0.6

    def axis(self) -> dict[str, Any]:
        if self.even:
            return {"range": [0, 1.1 * self.top]}
        values = [*([self.low - 0.6] if self.zero else []), *range(self.low, self.high + 1)]
        texts = [*(["0"] if self.zero else []), *(_short(10.0**power) for power in range(self.low, self.high + 1))]
        left = self.low - (0.85 if self.zero else 0.15)
        return {"tickmode": "array", "tickvals": values, "ticktext": texts, "range": [left, self.high + 0.15]}


def _short(number: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:g} {unit}"
    return f"{number:g}"


def _point_trace(point: Point, scale: _CostScale, trade: TradeOff, level: float) -> dict[str, Any]:
    row = point.row
    cost = f"{point.x:,.0f}" if trade.axis.id == "parameters" else f"{point.x:,.3g}"
    on_front = "<br>on the Pareto front" if point.front else ""
    return {
        "type": "scatter",
        "mode": "markers",
        "name": plain(row.label),
        "x": [scale.place(point.x)],
        "y": [_round(point.value.mean)],
        "marker": {
            "color": _colour(row),
            "symbol": _shape(row),
            "size": 13 if point.front else 11,
            "line": {"color": "@ink", "width": 2 if point.front else 1},
        },
        "error_y": _error([point.value], thickness=1.4, width=4),
        "hoverinfo": "text",
        "hovertext": [f"{plain(row.label)}<br>{_between(point.value, level)}<br>{cost} {trade.axis.unit}{on_front}"],
        "customdata": [list(row.records)],
        "meta": {"titles": [row.label]},
    }


def _front_trace(trade: TradeOff, scale: _CostScale) -> list[dict[str, Any]]:
    steps = sorted({(scale.place(point.x), _round(point.value.mean)) for point in trade.points if point.front})
    if not steps:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "Pareto front",
            "x": [x for x, _ in steps],
            "y": [y for _, y in steps],
            "line": {"color": "@muted", "dash": "dash", "width": 1.5, "shape": "hv"},
            "hoverinfo": "skip",
        }
    ]


def _cost_layout(trade: TradeOff, scale: _CostScale) -> dict[str, Any]:
    return {
        "xaxis": {
            "title": {"text": trade.axis.title, "standoff": 8},
            "zeroline": False,
            "automargin": True,
            **scale.axis(),
        },
        "yaxis": {
            "title": {"text": "mean accuracy", "standoff": 10},
            "ticksuffix": " %",
            "zeroline": False,
            "automargin": True,
        },
        "margin": {"l": 10, "r": 22, "t": 8, "b": 40},
        "showlegend": False,
    }


def figures_of(suite: SuiteView, level: float) -> dict[str, Figure]:
    """Return every plot of a suite, by the id of its place in the page."""
    found: dict[str, Figure] = {}
    for section in suite.sections:
        for column, values in columns_of(suite, section).items():
            if all(value is None for value in values.values()):
                continue  # no chart of nothing
            found[f"{section.id}-mean-{slug(suite, column)}"] = group_figure(
                section, values, column, suite.quoted, level
            )
        for task in suite.tasks:
            if any(task.name in row.cells for row in section.rows):
                found[f"{section.id}-task-{task.id}"] = task_figure(section, task, suite.quoted, level)
        trades = [section.parameters, *(t for setup in section.setups for t in (setup.training, setup.inference))]
        for trade in trades:
            if trade.points:
                found[trade.id] = trade_off_figure(trade, suite.quoted, suite.means[0], level)
    return found


def columns_of(suite: SuiteView, section: SectionView) -> dict[str, dict[str, Value | None]]:
    """Return name of a mean → row id → value; of a single group, the means over it say nothing new.

    Groups that no row has whole are left out, and so is then the mean of the groups.
    """
    groups = {group: {row.id: row.groups[group] for row in section.rows} for group in suite.card.groups}
    means = {
        suite.means[0]: {row.id: row.task_mean for row in section.rows},
        suite.means[1]: {row.id: row.group_mean for row in section.rows},
    }
    if len(groups) == 1:
        return {suite.means[0]: means[suite.means[0]]}
    found = {**groups, **means}
    return {name: of for name, of in found.items() if name == suite.means[0] or any(v is not None for v in of.values())}


def slug(suite: SuiteView, column: str) -> str:
    """Return a short name of a column for ids: of the means "tasks" and "groups"."""
    return {suite.means[0]: "all-tasks", suite.means[1]: "all-groups"}.get(column, column)
