"""Build the plots as Plotly specifications: plain dictionaries that the script of the page draws.

Rows differ by colour (palette of Okabe and Ito), marker and name. The colours "@ink", "@muted" and "@grid" are those of
the page's theme. Text from records is escaped, because Plotly interprets some HTML.

A specification is {"data", "layout", "height", "quoted"}. "quoted" is used while published numbers are shown:
its layout and height replace the others; its data are added, or with "replace" replace the others too. It may be None.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from svp_bench.core.errors import plural, printable
from svp_bench.report.model import Point, QuotedView, RowView, SectionView, SuiteView, TaskView, TradeOff, Value
from svp_bench.tables.quoted import secondary

Figure = dict[str, Any]

COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#8C8C8C")
"""The palette of Okabe and Ito (2008) with grey instead of black, without yellow, which is not visible on white."""

_ON_COLOUR = ("#000000", "#000000", "#000000", "#FFFFFF", "#000000", "#000000", "#000000")
SHAPES = {
    "circle": "M5,0A5,5 0 1 1 -5,0A5,5 0 1 1 5,0Z",
    "square": "M-4.6,-4.6H4.6V4.6H-4.6Z",
    "diamond": "M0,-6L6,0L0,6L-6,0Z",
    "triangle-up": "M0,-6L5.8,4.4H-5.8Z",
    "cross": "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
    "triangle-down": "M0,6L5.8,-4.4H-5.8Z",
    "pentagon": "M0,-5.8L5.6,-1.8L3.5,4.8H-3.5L-5.6,-1.8Z",
    "star": "M0,-6.4L1.6,-2.1L6.1,-2L2.5,0.8L3.8,5.2L0,2.6L-3.8,5.2L-2.5,0.8L-6.1,-2L-1.6,-2.1Z",
    "hexagon": "M0,-6L5.2,-3V3L0,6L-5.2,3V-3Z",
    "hourglass": "M-5,-5H5L-5,5H5Z",
}
"""Marker of Plotly → SVG path for the name of a row; seven colours and ten shapes distinguish seventy rows."""

_LINE = 26  # height of a row in pixels
_TALL = 360  # height of a plot of accuracy over a cost in pixels
_NAME = 22  # characters of a line of a name


def plain(text: str) -> str:
    """Return a text escaped for Plotly."""
    return printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _colour(row: RowView) -> str:
    return COLOURS[row.style % len(COLOURS)]


def _shape(row: RowView) -> str:
    return [*SHAPES][row.style % len(SHAPES)]


def _round(value: float) -> float:
    return round(value, 4)


def _trace(x: Sequence[float], y: Sequence[float], texts: Sequence[str], mode: str = "markers", **more: Any) -> Figure:
    return {"type": "scatter", "mode": mode, "x": x, "y": y, "hoverinfo": "text", "hovertext": texts, **more}


def _with_records(trace: Figure, records: Iterable[Sequence[int]], titles: Sequence[str]) -> Figure:
    """Return a trace whose points open their records under a title."""
    return {**trace, "customdata": [list(places) for places in records], "meta": {"titles": titles}}


def _hover(value: Value, level: float) -> str:
    parts = [f"<b>{value.mean:.2f} %</b>"]
    for name, bounds in (("seeds", value.these), ("test images", value.images), ("tasks", value.new)):
        if bounds:
            parts.append(f"{level:.0%} for new {name}: {bounds[0]:.2f} to {bounds[1]:.2f}")
        elif name == "seeds":
            parts.append("no interval over new seeds")
    return "<br>".join(parts)


def _error(values: Sequence[Value], **style: Any) -> dict[str, Any]:
    """Return error bars from the intervals over new seeds, else over test images."""
    return {
        "type": "data",
        "symmetric": False,
        "array": [_round(v.shown[1] - v.mean) if v.shown else None for v in values],
        "arrayminus": [_round(v.mean - v.shown[0]) if v.shown else None for v in values],
        "color": "@ink",
        **style,
    }


def _rows_figure(data: list[Figure], rows: Sequence[RowView], x: Mapping[str, Any], quoted: Figure | None) -> Figure:
    """Return a figure with one line per row, the first on top, and one more for published numbers."""
    added = None if quoted is None else {"data": [quoted], **_rows_layout(rows, x, quoted=True)}
    return {"data": data, **_rows_layout(rows, x, quoted=False), "quoted": added}


def _rows_layout(rows: Sequence[RowView], x: Mapping[str, Any], quoted: bool) -> dict[str, Any]:
    wrapped = [textwrap.wrap(printable(row.label), _NAME) for row in rows]
    names = ["<br>".join(map(plain, lines)) or "–" for lines in wrapped]
    names += ["<i>published,<br>not measured here</i>"] if quoted else []
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
    return {"layout": layout, "height": lines + 52}


def _quoted_trace(xs: Sequence[float], ys: Sequence[float], texts: Sequence[str]) -> Figure:
    marker = {"symbol": "star-diamond-open", "size": 10, "color": "@muted", "line": {"width": 1.5}}
    return _trace(xs, ys, texts, name="published, not measured here", marker=marker)


def _quoted_line(line: int, quoted: Sequence[QuotedView], column: str) -> Figure | None:
    """Return the published numbers of a column as points on a line."""
    found = [(float(view.scores[column]), _quoted_text(view, column)) for view in quoted if column in view.scores]
    return _quoted_trace([x for x, _ in found], [line] * len(found), [text for _, text in found]) if found else None


def _quoted_text(view: QuotedView, column: str) -> str:
    method = plain(f"{view.row.method}, {view.row.backbone} ({view.row.pretrain})")
    score = f"published, not measured here: <b>{float(view.scores[column]):g} %</b>"
    return "<br>".join([score, method, plain(f"{view.row.source}{secondary(view.row)}")])


def _group_figure(
    section: SectionView, values: Mapping[str, Value | None], column: str, quoted: Sequence[QuotedView], level: float
) -> Figure:
    """Return bars of a mean with the interval over new seeds; a text marks missing results."""
    rows = section.rows
    shown = [(line, row, value) for line, row in enumerate(rows) if (value := values[row.label]) is not None]
    missing = [line for line, row in enumerate(rows) if values[row.label] is None]
    bars = _with_records(
        _trace(
            [_round(value.mean) for _, _, value in shown],
            [line for line, _, _ in shown],
            [f"{plain(row.label)}, {plain(column)}<br>{_hover(value, level)}" for _, row, value in shown],
            orientation="h",
            marker={"color": [_colour(row) for _, row, _ in shown], "line": {"color": "@ink", "width": 1}},
            error_x=_error([value for _, _, value in shown], thickness=2, width=5),
            text=[f"{value.mean:.1f}" for _, _, value in shown],
            textposition="inside",
            insidetextanchor="start",
            insidetextfont={"color": [_ON_COLOUR[row.style % len(_ON_COLOUR)] for _, row, _ in shown]},
        ),
        [row.records for _, row, _ in shown],
        [f"{row.label}: {column}" for _, row, _ in shown],
    )
    del bars["mode"]
    data = [{**bars, "type": "bar"}]
    if missing:
        style = {"textposition": "middle right", "textfont": {"color": "@muted"}, "hoverinfo": "skip"}
        text = ["– results are missing"] * len(missing)
        data.append({"type": "scatter", "mode": "text", "x": [1] * len(missing), "y": missing, "text": text, **style})
    x = {"range": [0, 100], "tickvals": [0, 25, 50, 75, 100], "fixedrange": True}
    return _rows_figure(data, rows, x, _quoted_line(len(rows), quoted, column))


def _task_figure(section: SectionView, task: TaskView, quoted: Sequence[QuotedView], level: float) -> Figure:
    """Return each seed of a task as a point, and the mean with its interval over new seeds."""
    rows = section.rows
    cells = [(line, row, row.cells[task.name]) for line, row in enumerate(rows) if task.name in row.cells]
    runs = [  # below the mean and side by side, so that equal seeds are visible
        (line + 0.16 + 0.22 * place / max(len(cell.runs) - 1, 1), row, run)
        for line, row, cell in cells
        for place, run in enumerate(cell.runs)
    ]
    line_style = {"color": "@ink", "width": 1.2}
    colours, shapes = [_colour(row) for _, row, _ in cells], [_shape(row) for _, row, _ in cells]
    means = _trace(
        [_round(cell.value.mean) for _, _, cell in cells],
        [line for line, _, _ in cells],
        [
            f"{plain(row.label)}, mean of {len(cell.runs)}<br>{_hover(cell.value, level)}"
            f"<br>{plural(cell.table.images, 'test image')}: binomial standard error {cell.binomial:.2f}"
            for _, row, cell in cells
        ],
        name="mean",
        marker={"color": colours, "symbol": shapes, "size": 11, "line": line_style},
        error_x=_error([cell.value for _, _, cell in cells], thickness=1.6, width=5),
    )
    colours, line_style = [_colour(row) for _, row, _ in runs], {"color": "@ink", "width": 0.6}
    seeds = _trace(
        [_round(run.top1) for _, _, run in runs],
        [_round(line) for line, _, _ in runs],
        [f"{plain(row.label)}, seed {run.seed}: <b>{run.top1:.2f} %</b>" for _, row, run in runs],
        name="one seed",
        marker={"color": colours, "symbol": "circle", "size": 6, "opacity": 0.8, "line": line_style},
    )
    titles = [f"{row.label} on {task.id}" for _, row, _ in cells]
    data = [
        _with_records(means, [cell.records for _, _, cell in cells], titles),
        _with_records(
            seeds,
            [[run.record] for _, _, run in runs],
            [f"{row.label} on {task.id}, seed {run.seed}" for _, row, run in runs],
        ),
    ]
    return _rows_figure(data, rows, {"fixedrange": True}, _quoted_line(len(rows), quoted, task.id))


def _trade_off_figure(trade: TradeOff, quoted: Sequence[QuotedView], column: str, level: float) -> Figure:
    """Return accuracy over a cost, one point per row, with the interval over new seeds and the Pareto front."""
    costs = [point.x for point in trade.points]
    figure = {**_cost_figure(trade, _CostScale(costs), level), "quoted": None}
    views = [view for view in quoted if view.size is not None and column in view.scores]
    if views and trade.axis.id == "parameters":
        sizes = [view.size or 0.0 for view in views]
        scale = _CostScale([*costs, *sizes])
        texts = [f"{_quoted_text(view, column)}<br>parameters as printed: {plain(view.parameters)}" for view in views]
        trace = _quoted_trace(list(map(scale.place, sizes)), [float(view.scores[column]) for view in views], texts)
        again = _cost_figure(trade, scale, level)
        figure["quoted"] = {**again, "replace": True, "data": [*again["data"], trace]}
    return figure


class _CostScale:
    """A logarithmic axis of costs, zero on the left; costs within a factor of ten have round numbers between them."""

    def __init__(self, costs: Sequence[float]) -> None:
        positive = [cost for cost in costs if cost > 0] or [1.0]
        self.zero = any(cost == 0 for cost in costs)
        least, most = min(positive), max(positive)
        self.low, self.high = math.floor(math.log10(least)), math.ceil(math.log10(most))
        self.high = max(self.high, self.low + 1)
        self.narrow = None if self.zero or most >= 10 * least else (least, most)

    def place(self, cost: float) -> float:
        return _round(math.log10(cost)) if cost > 0 else self.low - 0.6

    def axis(self) -> dict[str, Any]:
        if self.narrow is not None:
            least, most = self.narrow
            pad = max(1.05, (most / least) ** 0.1)
            ticks = _round_numbers(least / pad, most * pad)
            ends = [_round(math.log10(least / pad)), _round(math.log10(most * pad))]
            return {**_ticks([self.place(tick) for tick in ticks], map(_short, ticks)), "range": ends}
        values = [*([self.low - 0.6] if self.zero else []), *range(self.low, self.high + 1)]
        texts = [*(["0"] if self.zero else []), *(_short(10.0**power) for power in range(self.low, self.high + 1))]
        left = self.low - (0.85 if self.zero else 0.15)
        return {**_ticks(values, texts), "range": [left, self.high + 0.15]}


def _ticks(values: Sequence[float], texts: Iterable[str]) -> dict[str, Any]:
    return {"tickmode": "array", "tickvals": values, "ticktext": list(texts)}


def _round_numbers(low: float, high: float) -> list[float]:
    """Return three to eight multiples of 1, 2 or 5 times a power of ten between two positive numbers."""
    power = 10 ** math.floor(math.log10((high - low) / 3))
    step = next(factor * power for factor in (5, 2, 1) if (high - low) / (factor * power) >= 3)
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(number: float) -> str:
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "K")):
        if number >= factor:
            return f"{number / factor:g} {unit}"
    return f"{number:g}"


def _cost_figure(trade: TradeOff, scale: _CostScale, level: float) -> Figure:
    data = [_point_trace(point, scale, trade, level) for point in trade.points]
    steps = sorted({(scale.place(point.x), _round(point.value.mean)) for point in trade.points if point.front})
    if steps:
        line = {"color": "@muted", "dash": "dash", "width": 1.5, "shape": "hv"}
        xs, ys = [x for x, _ in steps], [y for _, y in steps]
        front = {"type": "scatter", "mode": "lines", "name": "Pareto front", "x": xs, "y": ys}
        data.append({**front, "line": line, "hoverinfo": "skip"})
    x, y = {"text": trade.axis.title, "standoff": 8}, {"text": "mean accuracy", "standoff": 10}
    layout = {
        "xaxis": {"title": x, "zeroline": False, "automargin": True, **scale.axis()},
        "yaxis": {"title": y, "ticksuffix": " %", "zeroline": False, "automargin": True},
        "margin": {"l": 10, "r": 22, "t": 8, "b": 40},
        "showlegend": False,
    }
    return {"data": data, "layout": layout, "height": _TALL}


def _point_trace(point: Point, scale: _CostScale, trade: TradeOff, level: float) -> Figure:
    row = point.row
    cost = f"{point.x:,.0f}" if point.x >= 1000 else f"{point.x:,.3g}"
    on_front = "<br>on the Pareto front" if point.front else ""
    text = f"{plain(row.label)}<br>{_hover(point.value, level)}<br>{cost} {trade.axis.unit}{on_front}"
    line = {"color": "@ink", "width": 2 if point.front else 1}
    marker = {"color": _colour(row), "symbol": _shape(row), "size": 13 if point.front else 11, "line": line}
    trace = _trace([scale.place(point.x)], [_round(point.value.mean)], [text], name=plain(row.label), marker=marker)
    trace["error_y"] = _error([point.value], thickness=1.4, width=4)
    return _with_records(trace, [row.records], [row.label])


def figures_of(suite: SuiteView, level: float) -> dict[str, Figure]:
    """Return the id of the element in the page → plot, for a suite."""
    found: dict[str, Figure] = {}
    for section in suite.sections:
        for column, values in columns_of(suite, section).items():
            if any(value is not None for value in values.values()):
                name = f"{section.id}-mean-{slug(suite, column)}"
                found[name] = _group_figure(section, values, column, suite.quoted, level)
        for task in suite.tasks:
            if any(task.name in row.cells for row in section.rows):
                found[f"{section.id}-task-{task.id}"] = _task_figure(section, task, suite.quoted, level)
        timed = [trade for setup in section.setups for trade in (setup.training, setup.inference)]
        for trade in (section.parameters, *section.further, *timed):
            if trade.points:
                found[trade.id] = _trade_off_figure(trade, suite.quoted, suite.means[0], level)
    return found


def columns_of(suite: SuiteView, section: SectionView) -> dict[str, dict[str, Value | None]]:
    """Return name of a mean → label → value.

    A suite with one group has the mean over the tasks only. Means that no row has are left out, except for that one.
    """
    groups = {group: {row.label: row.groups[group] for row in section.rows} for group in suite.card.groups}
    means = {
        suite.means[0]: {row.label: row.task_mean for row in section.rows},
        suite.means[1]: {row.label: row.group_mean for row in section.rows},
    }
    if len(groups) == 1:
        return {suite.means[0]: means[suite.means[0]]}
    found = {**groups, **means}
    return {name: of for name, of in found.items() if name == suite.means[0] or any(v is not None for v in of.values())}


def slug(suite: SuiteView, column: str) -> str:
    """Return the name of a column in ids."""
    return {suite.means[0]: "all-tasks", suite.means[1]: "all-groups"}.get(column, column)
