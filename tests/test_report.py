"""The report as data and as text: its content, equal bytes for equal records, and escaped text."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import math
import random
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_error, command, run
from hypothesis import given
from hypothesis import strategies as st
from synthetic_records import make_record
from synthetic_report import HOSTILE, METHODS, SCRIPT, demo_records, named, scored, vtab, write

from svp_bench.core.errors import UnavailableError
from svp_bench.records.published import load_published
from svp_bench.records.record import Efficiency, Record
from svp_bench.report import assets
from svp_bench.report.curves import POINTS, read_curve, read_curves, thin
from svp_bench.report.figures import _CostScale, columns_of, figures_of, plain
from svp_bench.report.model import ReportView, SectionView
from svp_bench.report.page import json_in_html, render
from svp_bench.report.view import front, report_view
from svp_bench.stats.inference import mean_of, one_standard_error
from svp_bench.tables.build import load_table
from svp_bench.tables.model import Table
from svp_bench.tasks.cards import load_suite, load_task

VTAB = load_suite("vtab")
FEW = VTAB.tasks[:2] + VTAB.tasks[-2:]
GRID = re.compile(r"<tr[ >].*?</tr>", re.DOTALL)


def table_of(records: list[Record], published: bool = False) -> Table:
    return load_table(VTAB, records, published=load_published(VTAB) if published else [])


def view_of(records: list[Record], published: bool = False, **options: Any) -> ReportView:
    options.setdefault("titles", {})
    options.setdefault("curves", {})
    return report_view([table_of(records, published)], **options)


@pytest.fixture(scope="module")
def full() -> list[Record]:
    return list(vtab(seeds=(0, 1, 2)))


@pytest.fixture(scope="module")
def view(full: list[Record]) -> ReportView:
    return view_of(full, published=True)


@pytest.fixture(scope="module")
def page(full: list[Record]) -> str:
    table = table_of(full, published=True)
    return render(report_view([table], {}, {}))


class Scan(html.parser.HTMLParser):
    """Tags, addresses, texts and scripts of a page, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def data_of(page: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert found
    data: dict[str, Any] = json.loads(found.group(1))
    return data


def without_libraries(page: str) -> str:
    """The page without what others wrote."""
    for text in (assets.plotly_js(), assets.datatables_js(), assets.datatables_css()):
        assert page.count(text) == 1
        page = page.replace(text, "")
    return page


def directives_of(page: str) -> dict[str, str]:
    """The content security policy of the page."""
    tags = Scan(page.split("<style>", 1)[0]).all("meta")
    (policy,) = [tag["content"] for tag in tags if tag.get("http-equiv") == "Content-Security-Policy"]
    return dict(part.strip().split(" ", 1) for part in (policy or "").split(";"))


# ---- the view


def section_of(view: ReportView, track: str = "default", random_weights: bool = False) -> SectionView:
    (suite,) = view.suites
    (found,) = [s for s in suite.sections if s.table.track.kind == track and s.table.random == random_weights]
    return found


def test_sections_differ_by_track_and_weights(view: ReportView) -> None:
    (suite,) = view.suites
    kinds = [(section.table.track.kind, section.table.random) for section in suite.sections]
    assert kinds == [("default", False), ("searched", False), ("default", True)]
    assert [section.weights for section in suite.sections][-1] == "random weights"
    assert {row.table.rank for row in section_of(view, random_weights=True).rows} == {None}
    assert section_of(view, "searched").title == "vim_small_patch16_224, searched (default, K = 12)"


def test_means_intervals_seeds_and_missing_results_of_a_row(view: ReportView) -> None:
    rows = {row.label: row for row in section_of(view).rows}
    assert set(rows) == {*METHODS, "svp (share_layers=1)", "svp (share_layers=4)"} - {"svp"}
    lora, adapter, alone = rows["lora"], rows["adapter"], rows["full"]
    assert lora.task_mean is not None
    assert lora.task_mean.these is not None
    assert lora.task_mean.new is not None
    assert lora.task_mean.new[0] < lora.task_mean.these[0] < lora.task_mean.mean < lora.task_mean.these[1]
    assert (adapter.table.rank, adapter.task_mean, adapter.missing) == (None, None, tuple(VTAB.tasks[-2:]))
    assert adapter.groups["structured"] is None
    assert adapter.groups["natural"] is not None
    assert alone.task_mean is not None
    assert (alone.task_mean.these, alone.table.seeds) == (None, (1, 1))
    assert alone.task_mean.new is not None, "one seed a task is enough for the interval over tasks"
    assert [row.label for row in rows.values() if row.missing] == ["adapter"]
    notes = " ".join(section_of(view).notes)
    assert re.search(r"No interval over new seeds where a task .*\(full\)", notes)
    assert "Several settings of svp are in this ranking" in notes


def test_a_cell_by_brute_force(view: ReportView) -> None:
    cell = next(row for row in section_of(view).rows if row.label == "bias").cells["vtab/dtd"]
    scores = [run.top1 for run in cell.runs]
    assert [run.seed for run in cell.runs] == [0, 1, 2]
    assert cell.value.mean == pytest.approx(statistics.fmean(scores))
    assert cell.table.std == pytest.approx(statistics.stdev(scores))
    assert cell.table.images == load_task("vtab/dtd").counts["test"]
    assert cell.binomial == one_standard_error(cell.value.mean, cell.table.images)
    expected = mean_of({"dtd": scores})
    assert cell.value.these == (expected.low, expected.high)
    records = [view.pool.records[run.record] for run in cell.runs]
    assert [(record.method, record.task, record.seed) for record in records] == [
        ("bias", "vtab/dtd", seed) for seed in range(3)
    ]
    assert [record.metrics.top1 for record in records if record.metrics] == scores


def test_excluded_records_are_listed(view: ReportView) -> None:
    (suite,) = view.suites
    assert suite.excluded == {"failed": 1, "selection": 1, "superseded": 1, "truncated": 1}
    failed = next(out for out in suite.table.left_out if out.why == "failed")
    assert failed.detail.startswith("loss is NaN")
    assert view.pool.records[view.pool.place(failed.record)].status == "failed"


def test_every_record_is_in_the_pool_once_and_its_values_too(view: ReportView, full: list[Record]) -> None:
    data = json.loads(json_in_html(view.pool.to_json()))
    assert len(data["records"]) == len(full) == len(view.pool.records)
    place = view.pool.place(full[40])
    facts = dict(zip(data["fields"], (data["values"][value] for value in data["records"][place]), strict=True))
    assert facts["run_id"] == full[40].run_id
    assert facts["path"] == f"records/{full[40].task}/{full[40].run_id}.json"
    assert facts["config_digest"] == full[40].config_digest
    assert facts["metrics"] == {"top1": full[40].metrics.top1, "loss": 0.75, "correct": full[40].metrics.correct,
                                "count": full[40].metrics.count}  # type: ignore[union-attr]  # fmt: skip
    texts = [json.dumps(value, sort_keys=True) for value in data["values"]]
    assert len(texts) == len(set(texts))


@pytest.mark.parametrize("seed", range(20))
def test_the_front_by_brute_force(seed: int) -> None:
    rng = random.Random(seed)
    points = [(rng.randint(0, 6), rng.randint(0, 6)) for _ in range(rng.randint(0, 12))]
    for (cost, score), on_front in zip(points, front(points), strict=True):
        better = [other for other in points if other[0] <= cost and other[1] >= score and other != (cost, score)]
        assert on_front == (not better)


def test_equal_points_are_both_on_the_front() -> None:
    assert front([(1, 5), (1, 5), (2, 5), (0, 4)]) == [True, True, False, True]


def test_times_are_compared_on_one_kind_of_machine_only() -> None:
    def on(device: str, method: str, task: str, seconds: float) -> Record:
        times = {"train_seconds": seconds, "test_seconds": seconds / 10}
        return scored(task, method, 0, device=device, times=times, number=len(method) + len(task))

    here = [on("one", method, task, 100.0) for method in ("linear", "svp") for task in VTAB.tasks]
    there = [on("two", "lora", task, 1.0) for task in VTAB.tasks[:-1]] + [on("one", "lora", VTAB.tasks[-1], 100.0)]
    (setup,) = section_of(view_of([*here, *there])).setups
    assert setup.title == "one, 1 process, precision bf16-mixed, scan backend triton"
    assert [point.row.label for point in setup.training.points] == ["svp", "linear"]
    assert setup.inference.missing == {"lora": "not all of its tasks were run on this machine"}
    assert {point.x for point in setup.training.points} == {100.0}
    expected = statistics.fmean(1000 * 10 / load_task(task).counts["test"] for task in VTAB.tasks)
    assert setup.inference.points[0].x == pytest.approx(expected)


def test_a_row_without_times_has_no_point() -> None:
    records = [scored(task, "svp", 0, times={}, images_per_second=None) for task in VTAB.tasks]
    section = section_of(view_of(records))
    assert section.setups == ()
    assert len(section.parameters.points) == 1


def test_a_row_with_missing_results_has_no_point(view: ReportView) -> None:
    parameters = section_of(view).parameters
    assert parameters.missing == {"adapter": "is partial: 17 of 19 tasks"}
    on_front = [point.row.label for point in parameters.points if point.front]
    assert "linear" in on_front, "nothing is cheaper than no parameter"


def test_accuracy_over_multiplications() -> None:
    macs = {"linear": (900, 901), "svp": (1100, 5_000_000), "lora": (1200, 3_000_000), "offset": None}
    records = [
        scored(task, method, 0, number=number, efficiency=both and Efficiency(both[0] + number % 2, both[1], 8, False))
        for method, both in macs.items()
        for number, task in enumerate(VTAB.tasks)
    ]
    view = view_of(records)
    section = section_of(view)
    inference, training = section.further
    costs = {point.row.label: point.x for point in inference.points}
    assert costs == {name: pytest.approx(both[0] + 9 / 19) for name, both in macs.items() if both}  # mean of 19 tasks
    assert {"offset": "its records state no multiplications"} == inference.missing == training.missing
    scores = {point.row.label: point.value.mean for point in training.points}
    on_front = {point.row.label for point in training.points if point.front}
    assert scores["lora"] > scores["svp"], "with fewer multiplications"
    assert on_front == {"linear", "lora"}
    figure = figures_of(view.suites[0], view.level)[training.id]
    assert figure["layout"]["xaxis"]["ticktext"][-1] == "10 M", "logarithmic"
    assert [trace["name"] for trace in figure["data"]][-1] == "Pareto front"
    narrow = figures_of(view.suites[0], view.level)[inference.id]["layout"]["xaxis"]
    assert narrow["ticktext"] == ["900", "1 K", "1.1 K", "1.2 K"]
    assert narrow["tickvals"] == [round(math.log10(number), 4) for number in (900, 1000, 1100, 1200)]
    table = render(view).partition("Costs in numbers")[2].partition("</table>")[0]
    (line,) = [row for row in GRID.findall(table) if ">lora<" in row]
    assert "3,000,000 ◆" in line
    assert "1,201" in line


# ---- figures


def test_every_figure_is_valid_for_plotly(view: ReportView) -> None:
    graph_objects = pytest.importorskip("plotly.graph_objects")
    figures = figures_of(view.suites[0], view.level)
    assert len(figures) > 50
    for figure in figures.values():
        for spec in (figure, figure["quoted"]):
            if spec is not None:
                text = json.dumps([spec["data"], spec["layout"]]).replace('"@', '"#0000').replace("#0000ink", "black")
                text = re.sub(r"#0000(muted|grid)", "grey", text)
                data, layout = json.loads(text)
                graph_objects.Figure(data, layout)  # raises on a key or value that Plotly does not know
    assert json.dumps(figures, allow_nan=False)


def test_a_missing_result_is_named_and_is_not_zero(view: ReportView) -> None:
    section = section_of(view)
    figure = figures_of(view.suites[0], view.level)[f"{section.id}-mean-all-tasks"]
    bars, missing = figure["data"]
    assert len(bars["x"]) == len(section.rows) - 1
    assert min(bars["x"]) > 1
    assert missing["text"] == ["– results are missing"]
    assert missing["y"] == [len(section.rows) - 1]


def test_every_seed_is_a_point(view: ReportView) -> None:
    section = section_of(view)
    means, seeds = figures_of(view.suites[0], view.level)[f"{section.id}-task-dtd"]["data"]
    cells = [row.cells["vtab/dtd"] for row in section.rows]
    assert means["x"] == [round(cell.value.mean, 4) for cell in cells]
    assert seeds["x"] == [round(run.top1, 4) for cell in cells for run in cell.runs]
    assert seeds["customdata"] == [[run.record] for cell in cells for run in cell.runs]
    shown = [cell.value.these or cell.value.images for cell in cells]
    assert any(cell.value.these is None for cell in cells)
    assert means["error_x"]["array"] == [
        round(high - cell.value.mean, 4) for (_, high), cell in zip(shown, cells, strict=True)
    ]


def test_published_numbers_are_open_stars_apart_from_ours(view: ReportView) -> None:
    section = section_of(view)
    figures = figures_of(view.suites[0], view.level)
    quoted = figures[f"{section.id}-mean-all-tasks"]["quoted"]
    (trace,) = quoted["data"]
    assert set(trace["y"]) == {len(section.rows)}, "on a line of its own"
    assert trace["marker"]["symbol"] == "star-diamond-open"
    assert all(text.startswith("published, not measured here") for text in trace["hovertext"])
    assert "published" in quoted["layout"]["yaxis"]["ticktext"][-1]
    ours = figures[f"{section.id}-task-dtd"]["data"]
    assert "star-diamond-open" not in json.dumps(ours)
    trade = figures[section.parameters.id]["quoted"]
    assert trade["replace"] is True
    assert trade["data"][-1]["name"] == "published, not measured here"


def test_a_suite_of_one_group_has_one_mean() -> None:
    card = dataclasses.replace(load_suite("demo"), groups={"structured": ("location", "count", "size")})
    table = load_table(card, demo_records())
    (suite,) = report_view([table], {}, {}).suites
    assert list(columns_of(suite, suite.sections[0])) == ["mean of 3 tasks"]


def test_costs_of_zero_have_a_place_on_the_axis(view: ReportView) -> None:
    figure = figures_of(view.suites[0], view.level)[section_of(view).parameters.id]
    axis = figure["layout"]["xaxis"]
    assert axis["ticktext"][0] == "0"
    (linear,) = [trace for trace in figure["data"] if trace["name"] == "linear"]
    assert linear["x"] == [axis["tickvals"][0]]
    assert axis["range"][0] < linear["x"][0] < axis["tickvals"][1]


@given(least=st.floats(1e-3, 1e12), factor=st.floats(1, 9.99))
def test_ticks_of_a_narrow_axis_are_inside_and_round(least: float, factor: float) -> None:
    axis = _CostScale([least, least * factor]).axis()
    low, high = axis["range"]
    assert 3 <= len(axis["tickvals"]) <= 8
    assert all(low - 1e-3 <= place <= high + 1e-3 for place in axis["tickvals"])
    assert low < math.log10(least) <= math.log10(least * factor) < high
    assert len(set(axis["ticktext"])) == len(axis["ticktext"])


# ---- the page


def test_the_same_records_give_the_same_bytes(
    tmp_path: Path, full: list[Record], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = full[::9]
    write(tmp_path / "one" / "results", records, broken=True)
    write(tmp_path / "two" / "results", records[::-1], broken=True)
    pages = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        run("report")
        pages.append(Path("results/report/index.html").read_bytes())
    assert pages[0] == pages[1]
    code = "import sys; from svp_bench.cli.main import main; sys.exit(main(['report', '--output', 'again.html']))"
    subprocess.run(
        [sys.executable, "-c", code], check=True, timeout=600, env={"PYTHONHASHSEED": "7"}, capture_output=True
    )
    again = Path("again.html").read_text(encoding="utf-8")
    assert again.replace('href="results/', 'href="../').replace('"root":"results"', '"root":".."').encode() == pages[1]


def test_the_command_reports_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "results", [scored(task, "svp", 0, number=n) for n, task in enumerate(FEW)], broken=True)
    outcome = run("report")
    lines = outcome.out.splitlines()
    assert lines[0] == (
        "VTAB-1k: 1 section, 1 row, 4 records, 1 left out, 0 learning curves, "
        f"{len(view_of([], published=True).suites[0].quoted)} published methods"
    )
    assert re.fullmatch(r"Written: results/report/index\.html \(\d\.\d MiB, loads nothing\)", lines[1])
    page = Path("results/report/index.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;broken&amp;.json" in page
    assert "4/19" in page


def test_the_page_without_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = assert_error(command("report"), 2)
    assert "--results_root results: there is no such folder" in line
    assert not Path("results").exists()  # a mistyped folder is not made
    Path("results").mkdir()
    outcome = run("report")
    assert (
        "There are no records yet, so the page is empty; `svp-bench fit --config FILE` writes a record." in outcome.out
    )
    assert "There are no records yet" in Path("results/report/index.html").read_text(encoding="utf-8")


def test_published_suites_are_shown_when_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    run("report", "--published")
    page = Path("results/report/index.html").read_text(encoding="utf-8")
    assert '<body class="quoting">' in page
    assert re.search(r'id="published-switch" checked', page)
    assert "VTAB-1k: published, not measured here" in page
    assert "There are no complete records of this suite yet." in page


def test_wrong_usage_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = assert_error(command("report", "--suite", "vtap"), 2)
    assert "vtap" in line
    assert "did you mean 'vtab'" in line or "vtab" in line
    (tmp_path / "here").mkdir()
    (tmp_path / "results").mkdir()
    line = assert_error(command("report", "--output", "here"), 2)
    assert "--output here is a folder; give the name of the page, e.g. here/index.html" in line
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert "cannot write results into" in assert_error(command("report", "--output", "file/page.html"), 1)
    write(tmp_path / "results", [scored(FEW[0], "svp", 0)])
    line = assert_error(command("report", "--control", "svq"), 2)
    assert "unknown method or row 'svq'" in line


def test_the_page_loads_nothing(page: str) -> None:
    own = without_libraries(page)
    scan = Scan(own)
    for tag, attributes in scan.tags:
        assert tag not in {"iframe", "object", "embed", "form", "base", "audio", "video"}
        for name in ("src", "srcset", "poster", "background", "action"):
            assert name not in attributes, (tag, attributes)
        if tag == "link":
            assert attributes == {"rel": "icon", "href": "data:,"}
        if tag == "a":
            assert (attributes["href"] or "").startswith(("#", "../records/")), attributes
        assert not any(name.startswith("on") for name in attributes)
    assert "@import" not in own
    assert "url(" not in re.sub(r"url\(data:", "", own)
    directives = directives_of(page)
    assert directives["default-src"] == "'none'"
    assert directives["img-src"] == "data: blob:"
    assert set(directives) == {"default-src", "script-src", "style-src", "img-src", "base-uri", "form-action"}
    assert "http" not in " ".join(directives.values())


def test_the_policy_names_the_scripts_of_the_page_and_no_others(page: str) -> None:
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    assert len(scripts) == 3
    hashes = " ".join(assets.script_hash(script) for script in scripts)
    assert directives_of(page)["script-src"] == hashes, "and neither unsafe-inline nor unsafe-eval"


@pytest.mark.parametrize(
    "place",
    [
        lambda r: {"method_args": {HOSTILE: HOSTILE}},
        lambda r: {"device": HOSTILE},
        lambda r: {"scan_backend": HOSTILE, "scan_reason": HOSTILE},
        lambda r: {"backbone": HOSTILE},
        lambda r: {"checkpoint": HOSTILE},
        lambda r: {"protocol": HOSTILE},
        lambda r: {"precision": HOSTILE},
        lambda r: {"status": "failed", "status_reason": HOSTILE, "metrics": None, "correct": None},
        lambda r: {"data_status": "different", "data_notes": [HOSTILE]},
        lambda r: {"data_variant": HOSTILE},
        lambda r: {"libraries": {HOSTILE: HOSTILE}},
        lambda r: {"commit": HOSTILE},
    ],
)
def test_text_of_a_record_stays_text(place: Callable[[Record], dict[str, Any]]) -> None:
    record = make_record("vtab/dtd")
    table = table_of([dataclasses.replace(record, **place(record))])
    page = render(report_view([table], {}, {}))
    _nothing_escapes(page)


def test_a_row_label_stays_text() -> None:
    records = [make_record(task, changes={"model.method.init_args.share_layers": value}, number=n)
               for n, (task, value) in enumerate([("vtab/dtd", HOSTILE), ("vtab/dtd", 1)])]  # fmt: skip
    table = table_of([named(record, n) for n, record in enumerate(records)])
    report = report_view([table], {}, {})
    _nothing_escapes(render(report))
    traces = [trace for figure in figures_of(report.suites[0], report.level).values() for trace in figure["data"]]
    read = json.dumps([{key: value for key, value in trace.items() if key != "meta"} for trace in traces])
    assert "&lt;script" in read
    assert "<script" not in read, "Plotly reads HTML in its texts"
    assert plain("<b>&") == "&lt;b&gt;&amp;"


def test_names_of_files_and_curves_stay_text() -> None:
    record = make_record("vtab/dtd")
    table = dataclasses.replace(table_of([record]))
    curves = {(record.task, record.run_id): {"train/loss": ((0, 1.0),)}}
    report = report_view([table], {"vtab/dtd": HOSTILE}, curves, runs_root=HOSTILE)
    _nothing_escapes(render(report, root=".."))


def _nothing_escapes(page: str) -> None:
    own = without_libraries(page)
    assert SCRIPT not in own
    scan = Scan(own)
    assert [attributes for attributes in scan.all("script") if attributes not in ({}, DATA)] == []
    assert len(scan.all("script")) == 4
    assert scan.all("img") == []
    assert not any(name.startswith("on") for _, attributes in scan.tags for name in attributes)
    assert "\u2028" not in re.sub(r"<main.*</main>", "", own, flags=re.DOTALL), "in scripts it ends a line"
    data_of(page)


DATA = {"type": "application/json", "id": "data"}


def test_numbers_lead_to_records(page: str, full: list[Record]) -> None:
    scan = Scan(without_libraries(page))
    pool = data_of(page)["pool"]
    paths = {pool["values"][row[pool["fields"].index("path")]] for row in pool["records"]}
    assert paths == {f"records/{record.task}/{record.run_id}.json" for record in full}
    linked = {
        str(attributes["href"]).removeprefix("../") for attributes in scan.all("a") if "data-records" in attributes
    }
    assert linked <= paths
    shown = {record.run_id for record in full if record.status == "complete" and record.kind == "final"}
    assert len(linked) >= len(shown) - 1
    for attributes in [*scan.all("button"), *scan.all("a")]:
        for place in filter(None, (attributes.get("data-records") or "").split(",")):
            assert 0 <= int(place) < len(paths)


def test_the_leaderboard_in_numbers(page: str, view: ReportView) -> None:
    section = section_of(view)
    board = page.split(f'id="{section.id}-leaderboard"', 1)[1].split("</table>", 1)[0]
    lines = GRID.findall(board.split("<tbody>", 1)[1])
    assert len(lines) == len(section.rows)
    for line, row in zip(lines, section.rows, strict=True):
        text = " ".join(re.sub(r"<[^>]*>", " ", line.replace("<wbr>", "")).split())
        assert row.label.replace("(", "").split()[0] in text
        if row.task_mean is None:
            assert text.startswith("– not ranked")
            assert "incomplete" in text
            assert "17/19" in text
        else:
            assert text.startswith(f"{row.table.rank} ")
            assert f"{row.task_mean.mean:.2f}" in text
            assert row.task_mean.new is not None
            assert f"tasks {row.task_mean.new[0]:.2f}–{row.task_mean.new[1]:.2f}" in text
            seeds = row.task_mean.these
            assert (f"seeds {seeds[0]:.2f}–{seeds[1]:.2f}" if seeds else "seeds –") in text
            assert "19/19" in text


def test_every_plot_has_words_and_a_table(page: str) -> None:
    scan = Scan(without_libraries(page))
    figures = data_of(page)["figures"]
    plots = [attributes for attributes in scan.all("div") if "data-figure" in attributes]
    assert {attributes["data-figure"] for attributes in plots} == set(figures)
    assert all(attributes["role"] == "img" and "table" in (attributes["aria-label"] or "") for attributes in plots)
    identifiers = [attributes["id"] for _, attributes in scan.tags if attributes.get("id")]
    assert len(identifiers) == len(set(identifiers))
    for name in ("aria-labelledby",):
        assert {attributes[name] for _, attributes in scan.tags if attributes.get(name)} <= set(identifiers)
    assert len(scan.all("caption")) == len(scan.all("table"))
    assert scan.all("html") == [{"lang": "en"}]


def test_the_size_for_1530_records(tmp_path: Path) -> None:
    tasks = [*VTAB.tasks, *load_suite("fgvc").tasks, *load_suite("hta").tasks]
    assert len(tasks) == 34
    records = [
        scored(task, method, seed, number=number, suite=task.split("/")[0])
        for number, (method, task, seed) in enumerate((m, t, s) for m in METHODS for t in tasks for s in range(5))
    ]
    assert len(records) == 1530
    tables = [
        load_table(load_suite(name), records, published=load_published(load_suite(name)))
        for name in ("vtab", "fgvc", "hta")
    ]
    page = render(report_view(tables, {}, {}))
    assert len(page.encode()) < 11 * 2**20
    sections = [section for suite in report_view(tables, {}, {}).suites for section in suite.sections]
    assert {len(section.table.members) for section in sections} == {19 * 45, 5 * 45, 10 * 45}


# ---- what is inlined


def test_a_script_cannot_end_early() -> None:
    hostile = "a = '</script>'; b = /<!--/; c = '<SCRIPT>'; d = x < y; e = '</p>'"
    safe = assets.in_script(hostile)
    assert safe == r"a = '\x3C/script>'; b = /\x3C!--/; c = '\x3CSCRIPT>'; d = x < y; e = '</p>'"
    for text in (assets.plotly_js(), assets.datatables_js()):
        assert not re.search(r"<(?:!--|/?script)", text, re.IGNORECASE)


def test_another_kind_of_bundle_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assets, "_itables", lambda name: "export{a as DataTable};")
    with pytest.raises(UnavailableError, match=r"itables [\d.]+ ships a DataTables bundle that svp-bench cannot read"):
        assets.datatables_js()


def test_the_notices_of_what_is_inlined_are_in_the_page(page: str) -> None:
    for notice in assets.NOTICES:
        assert notice.holder in page
        assert f"{notice.licence} licence" in assets.LICENCES
    assert "Permission is hereby granted, free of charge" in page
    assert "Licensed under the MIT license" in page, "the head of plotly.js itself"


def test_json_in_html() -> None:
    value = {"a": "</script><!-- & \u2028\u2029", "b": [1.5, None, True, "é"]}
    text = json_in_html(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError, match="JSON"):
        json_in_html(math.nan)


def test_the_report_imports_no_torch_and_no_pandas() -> None:
    code = """
import sys
import svp_bench.report.page
from svp_bench.report import assets, curves
assets.plotly_js(); assets.datatables_js()
import tensorboard.backend.event_processing.event_accumulator
print([name for name in ("torch", "lightning", "timm", "tensorflow", "pandas", "IPython") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- learning curves


def log(folder: Path, scalars: dict[str, list[tuple[int, float]]]) -> None:
    """Write an event file as the training does."""
    from tensorboard.compat.proto.event_pb2 import Event
    from tensorboard.compat.proto.summary_pb2 import Summary
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

    writer = EventFileWriter(str(folder))
    for tag, points in scalars.items():
        for step, value in points:
            summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
            writer.add_event(Event(step=step, wall_time=0, summary=summary))
    writer.close()


def test_curves_are_read_and_thinned(tmp_path: Path) -> None:
    points = [(10 * n, 1 / (n + 1)) for n in range(500)]
    log(tmp_path, {"train/loss": points, "train/top1": [(0, 0.25), (31, 0.5)], "epoch": [(0, 0.0)]})
    curve = read_curve(tmp_path)
    assert curve is not None
    assert set(curve) == {"train/loss", "train/top1"}
    assert curve["train/top1"] == ((0, 25.0), (31, 50.0)), "in percent"
    loss = curve["train/loss"]
    assert len(loss) == POINTS
    assert loss[-1] == (4990, pytest.approx(1 / 500))
    assert [step for step, _ in loss] == sorted(step for step, _ in loss)


@pytest.mark.parametrize("count", [0, 1, 59, 60, 61, 119, 1000])
def test_thinning_keeps_the_mean_and_the_end(count: int) -> None:
    points = [(n, float(n % 7)) for n in range(count)]
    thinned = thin(points)
    assert len(thinned) <= POINTS
    if count <= POINTS:
        assert thinned == tuple(points)
    else:
        assert len(thinned) == POINTS
        assert thinned[-1] == points[-1]
        assert all(0 <= value <= 6 for _, value in thinned)


def test_runs_without_event_files_have_no_curve(tmp_path: Path) -> None:
    record = make_record("vtab/dtd")
    assert read_curves([record], tmp_path / "nowhere") == {}
    folder = tmp_path / record.task / record.run_id
    folder.mkdir(parents=True)
    assert read_curves([record], tmp_path) == {}
    (folder / "events.out.tfevents.0").write_bytes(b"\x18\x00\x00\x00 no event file")
    assert read_curves([record], tmp_path) == {}
    log(folder, {"train/loss": [(0, 2.0), (5, 1.0)]})
    assert read_curves([record], tmp_path)[record.task, record.run_id]["train/loss"] == ((0, 2.0), (5, 1.0))


def test_the_page_has_learning_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = scored("vtab/dtd", "svp", 0, number=1)
    chosen = named(scored("vtab/dtd", "svp", 1, kind="selection", stage="select", number=2), 2)
    without = scored("vtab/dtd", "svp", 2, number=3)
    write(tmp_path / "results", [shown, chosen, without])
    log(tmp_path / "logs" / shown.task / shown.run_id, {"train/loss": [(0, 2.0), (5, 1.0)]})
    log(tmp_path / "logs" / chosen.task / chosen.run_id, {"val/top1": [(5, 0.5)]})
    run("report")
    text = Path("results/report/index.html").read_text(encoding="utf-8")
    assert "no TensorBoard files below <code>runs</code>" in text
    outcome = run("report", "--runs_root", "logs")
    assert "2 learning curves" in outcome.out
    text = Path("results/report/index.html").read_text(encoding="utf-8")
    assert "TensorBoard files of 2 runs below <code>logs</code>; 1 more record without files there" in text
    curves = data_of(text)["curves"]["vtab"]
    assert [(entry["section"], entry["label"]) for entry in curves["runs"]] == [
        ("vtab-1", "svp"),
        ("", "svp, selection"),
    ]
    assert curves["runs"][0]["tags"] == {"train/loss": [[0, 5], [2.0, 1.0]]}
    assert list(curves["sections"]) == ["vtab-1", ""]
