"""Render and write the page: one HTML file that loads nothing; the same records give the same bytes."""

from __future__ import annotations

import base64
import gzip
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from svp_bench._version import __version__
from svp_bench.core.errors import UsageError, file_size, plural, printable
from svp_bench.records.costs import load_costs
from svp_bench.records.published import load_published
from svp_bench.records.record import CREATED
from svp_bench.records.store import read_records, write_atomically
from svp_bench.report import assets
from svp_bench.report import figures as drawing
from svp_bench.report.curves import POINTS, read_curves
from svp_bench.report.model import Point, ReportView, RowView, SectionView, SuiteView, TaskView, TradeOff
from svp_bench.report.view import report_view
from svp_bench.stats.estimates import FEWEST_PAIRS, FEWEST_SOURCES
from svp_bench.tables.build import load_table, outside_of_suites, suite_of, suites_of
from svp_bench.tables.comparison import check_row
from svp_bench.tables.measured import caption, spans_of, value_span
from svp_bench.tables.notes import (
    COST,
    MAJORITY,
    RANDOM_WEIGHTS,
    decimals,
    interval,
    marks,
    one_line,
    p_value,
    percent,
    short_name,
    signed,
    size_span,
    span,
)
from svp_bench.tables.plan import read_plan
from svp_bench.tables.planned import add_plan, planned_grid, planned_notes
from svp_bench.tables.quoted import citations, measured, not_vim, other_lines, secondary
from svp_bench.tasks.cards import load_suite, load_task


def json_in_html(value: Any) -> str:
    r"""Return JSON for a <script>: `<`, `>`, `&`, U+2028 and U+2029 are \u escapes."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


_LARGE = 4_000_000  # characters of JSON that the page holds as plain text


def _packed(text: str) -> str:
    """Return the base64 text of the gzipped JSON of a large page, which is a tenth of it; "" for a small one."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode() if len(text) > _LARGE else ""


def report_path(results_root: Path | str) -> Path:
    """Return the default path of the page."""
    return Path(results_root) / "report" / "index.html"


def write_report(
    results_root: Path | str,
    suites: Sequence[str] | None = None,
    *,
    published: bool = False,
    output: Path | str | None = None,
    runs_root: Path | str = "runs",
    control: str | None = None,
    comparisons: Path | str | None = None,
    backbones: Callable[[], Iterable[str]] = tuple,
    costs: Path | str | None = None,
) -> str:
    """Read all records, write the page, and return the text to print.

    Args:
        results_root: The folder that contains `records/`.
        suites: Suites to show; by default those with records and, with `published`, those with published numbers.
        published: Show the published numbers from the start; otherwise a switch in the page shows them.
        output: The page; by default `report_path`.
        runs_root: Folder of the runs, whose event files contain the learning curves.
        control: Method or label of the row that all others are compared with; by default `linear`.
        comparisons: A file of planned comparisons.
        costs: File of costs that were measured on a machine.
        backbones: See `tables.planned.add_plan`.

    Raises:
        UsageError: If `results_root` is missing, a suite is unknown, no table has a row named `control`, `comparisons`
            is malformed, or `output` is a folder.
        RecordError: If the page cannot be written, or a file of published numbers or costs is malformed.
    """
    machine = None if costs is None else load_costs(costs)
    target = report_path(results_root) if output is None else Path(output)
    if target.is_dir():
        raise UsageError(f"--output {target} is a folder; give the name of the page, e.g. {target / 'index.html'}")
    given = None if suites is None else [load_suite(name) for name in suites]
    plan = None if comparisons is None else read_plan(comparisons)
    if not Path(results_root).is_dir():
        raise UsageError(
            f"--results_root {results_root}: there is no such folder; give the one that contains records/ "
            "(`svp-bench fit` creates it)"
        )
    records, problems = read_records(results_root)
    planned = None if plan is None else plan.plan.suite
    names = dict.fromkeys([*suites_of(records), *([planned] if planned else [])])
    cards = [load_suite(name) for name in names] if given is None else given
    present = {record.suite for record in records} | {suite_of(problem) for problem in problems}
    tables = []
    for card in cards:
        quoted = load_published(card)
        shown = card.owner in present or (published and quoted) or card.name == planned
        if suites is None and not shown:
            continue
        tables.append(load_table(card, records, problems, quoted, control, costs=machine))
    owners = {card.owner for card in cards}
    check_row(tables, control, "--control")
    if plan is not None:
        tables = add_plan(tables, plan, backbones)
    report = report_view(
        tables,
        titles={task: load_task(task).title for table in tables for task in table.suite.tasks},
        curves=read_curves([record for record in records if record.suite in owners], runs_root),
        strays=outside_of_suites(records, problems) if suites is None else [],
        runs_root=Path(runs_root).as_posix(),
    )
    text = render(report, published=published, root=_link(Path(results_root), target.parent))
    write_atomically(target, text)
    return _summary(report, target, text)


def _summary(report: ReportView, target: Path, text: str) -> str:
    lines = []
    for suite in report.suites:
        rows = sum(len(section.rows) for section in suite.sections)
        entered = sum(len(section.table.members) for section in suite.sections)
        parts = [plural(len(suite.sections), "section"), plural(rows, "row"), plural(entered, "record")]
        excluded = len(suite.table.left_out) + len(suite.table.problems)
        parts += [f"{excluded} left out", plural(len(suite.curves), "learning curve")]
        parts += [plural(len(suite.quoted), "published method")]
        lines.append(f"{suite.card.title}: {', '.join(parts)}")
    if not report.suites:
        lines.append("There are no records yet, so the page is empty; `svp-bench fit --config FILE` writes a record.")
    length = file_size(len(text.encode("utf-8", errors="backslashreplace")))
    lines.append(f"Written: {target} ({length}, loads nothing)")
    return "\n".join([*map(printable, lines), ""])


def _link(results_root: Path, folder: Path) -> str:
    """Return the address of the results root, relative to the page if possible."""
    try:
        return quote(Path(os.path.relpath(results_root.resolve(), folder.resolve())).as_posix())
    except ValueError:  # on another drive of Windows
        return results_root.resolve().as_uri()


def render(report: ReportView, *, published: bool = False, root: str = "..") -> str:
    """Return the page.

    Args:
        report: Its data.
        published: Show the published numbers from the start.
        root: Address of the results root, relative to the page.
    """
    folder = files("svp_bench.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=False, keep_trailing_newline=True)
    environment.finalize = lambda value: printable(value) if type(value) is str else value  # but no Markup
    environment.filters["short_name"] = short_name
    environment.filters["plural"] = plural
    environment.tests["measured"] = lambda task, section: any(task.name in row.cells for row in section.rows)
    environment.filters["breakable"] = _breakable
    figures = {
        name: figure for suite in report.suites for name, figure in drawing.figures_of(suite, report.level).items()
    }
    pool = report.pool
    newest = max((record.created for record in pool.records), default=None)
    script = (folder / "page.js").read_text(encoding="utf-8")
    scripts = [assets.plotly_js(), assets.datatables_js(), assets.in_script(script)]
    data = {
        "root": root,
        "figures": figures,
        "pool": pool.to_json(),
        "curves": {suite.card.name: _curve_data(suite) for suite in report.suites},
        "colours": drawing.COLOURS,
    }
    data_json = json_in_html(data)
    helpers: dict[str, Callable[..., Any]] = {
        "raw": Markup,
        "columns_of": drawing.columns_of,
        "slug": drawing.slug,
        "colour": lambda style: drawing.COLOURS[style % len(drawing.COLOURS)],
        "shape_path": lambda style: [*drawing.SHAPES.values()][style % len(drawing.SHAPES)],
        "place": lambda number, domain: f"{100 * (number - domain[0]) / (domain[1] - domain[0]):.2f}",
        "domain_of": _domain_of,
        "images_of": _images_of,
        "charted_means": lambda suite, section: [
            column
            for column in drawing.columns_of(suite, section)
            if f"{section.id}-mean-{drawing.slug(suite, column)}" in figures
        ],
        "tested": lambda comparison: any(found.p is not None for found in comparison.contrasts),
        "span": span,
        "sizes": lambda pair: size_span(*pair),
        "interval": interval,
        "signed": signed,
        "p_value": p_value,
        "planned_grid": planned_grid,
        "planned_notes": planned_notes,
        "point": _point,
        "on_front": _on_front,
        "spans_of": spans_of,
        "value_span": value_span,
        "caption": caption,
        "places_of": _places_of,
        "quoted_columns": _quoted_columns,
        "measured_rows": _measured_rows,
        "not_vim": not_vim,
        "secondary": secondary,
        "record_link": lambda place: f"{root}/{quote(pool.path(place))}",
        "marks": marks,
        "one_line": one_line,
    }
    text: str = environment.from_string((folder / "template.html.j2").read_text(encoding="utf-8")).render(
        cost_note=COST,
        **helpers,
        report=report,
        figures=figures,
        pool=pool,
        citations={suite.card.name: list(citations(suite.table).values()) for suite in report.suites},
        other_quoted={suite.card.name: other_lines(suite.table) for suite in report.suites},
        suite_titles=", ".join(suite.card.title for suite in report.suites) or "No records yet",
        newest=newest,
        newest_text=newest and datetime.strptime(newest, CREATED).strftime("%Y-%m-%d, %H:%M UTC"),
        level=percent(report.level),
        random_weights=RANDOM_WEIGHTS,
        majority=MAJORITY,
        fewest=FEWEST_PAIRS,
        fewest_sources=FEWEST_SOURCES,
        show_published=published,
        any_quoted=any(suite.table.published for suite in report.suites),
        curve_points=POINTS,
        version=__version__,
        plotly_version=version("plotly"),
        itables_version=version("itables"),
        notices=assets.NOTICES,
        licence_texts=assets.LICENCES,
        policy=_policy(scripts),
        datatables_css=assets.datatables_css(),
        css=(folder / "page.css").read_text(encoding="utf-8"),
        plotly_js=scripts[0],
        datatables_js=scripts[1],
        js=scripts[2],
        styles=sorted({row.style for suite in report.suites for section in suite.sections for row in section.rows}),
        packed=_packed(data_json),
        data_json=data_json,
    )
    return text


def _policy(scripts: Sequence[str]) -> str:
    """Return a content security policy that allows these scripts, inline styles, and no network."""
    hashes = " ".join(assets.script_hash(script) for script in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _breakable(label: str) -> Markup:
    """Return a name with allowed line breaks after its words."""
    return Markup(re.sub(r"([_=./,]+)", r"\1<wbr>", str(escape(printable(label)))))


def _point(trade: TradeOff, row: RowView) -> Point | None:
    return next((point for point in trade.points if point.row is row), None)


def _on_front(section: SectionView, axis: str, row: RowView) -> str:
    """Return the mark of a row on the Pareto front of a cost, or nothing."""
    points = (_point(trade, row) for trade in section.further if trade.axis.id == axis)
    return " ◆" if any(point and point.front for point in points) else ""


def _domain_of(section: SectionView) -> tuple[int, int]:
    """Return the range of the leaderboard's axis in whole percents."""
    values = [row.present for row in section.rows]
    ends = [end for value in values for pair in (value.shown, value.new) if pair for end in pair]
    ends += [value.mean for value in values]
    return (math.floor(min(ends)), math.floor(max(ends)) + 1) if ends else (0, 100)


def _images_of(section: SectionView, task: TaskView) -> str:
    """Return the number of test images of a task in a section; "9–10" where its rows have different splits."""
    counts = [row.cells[task.name].table.images for row in section.rows if task.name in row.cells]
    low, high = min(counts, default=0), max(counts, default=0)
    return "" if not counts else f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _places_of(suite: SuiteView, row: RowView, column: str) -> list[int]:
    """Return the places of the records behind the mean `column` of a row."""
    inside = {task.name for task in suite.tasks if column in (task.group, *suite.means)}
    return [run.record for task, cell in row.cells.items() if task in inside for run in cell.runs]


def _quoted_columns(suite: SuiteView) -> list[str]:
    """Return the columns with a published number, in the order of the tables, others at the end."""
    known = [*suite.means, *suite.card.groups, *(task.id for task in suite.tasks)]
    used = {column for quote in suite.quoted for column in quote.scores}
    return [*(column for column in dict.fromkeys(known) if column in used), *sorted(used.difference(known))]


def _measured_rows(suite: SuiteView, method: str) -> str:
    """Return the rows of ours of a method: label and mean over all tasks (or their number), backbone and track."""
    rows = [*measured(suite.table)]
    several = len({section.first.backbone for _, section, _ in rows}) > 1
    texts = []
    for _, section, row in (one for one in rows if one[0] == method):
        facts = [section.first.backbone] if several else []
        facts += [] if section.track.kind == "default" else [section.track.kind]
        mean = decimals(row.task_mean) if row.task_mean else f"{row.done} tasks"
        texts.append(f"{row.label} {mean}" + (f" ({', '.join(facts)})" if facts else ""))
    return "; ".join(texts)


def _curve_data(suite: SuiteView) -> dict[str, Any]:
    """Return the titles of the sections with curves, and record, section, label, style and curves of each run."""
    used = {run.section for run in suite.curves}
    titles = {section.id: f"{section.title}, {section.weights}" for section in suite.sections if section.id in used}
    if "" in used:
        titles[""] = "not in the tables"
    runs = []
    for run in suite.curves:
        tags = {
            tag: [[step for step, _ in points], [float(f"{value:.5g}") for _, value in points]]
            for tag, points in sorted(run.curve.items())
        }
        runs.append(
            {"record": run.record, "section": run.section, "label": run.label, "style": run.style, "tags": tags}
        )
    return {"sections": titles, "runs": runs}
