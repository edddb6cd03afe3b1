"""What a table must not claim: settings, runs and names that a record cannot vouch for."""

from __future__ import annotations

import csv
import dataclasses
import io
from pathlib import Path

import pytest
from helpers import run
from synthetic_records import make_record

from svp_bench.records.defaults import overrides
from svp_bench.records.record import Record, SearchSummary
from svp_bench.records.store import write_record
from svp_bench.report.page import render
from svp_bench.report.view import report_view
from svp_bench.tables.build import build_table
from svp_bench.tables.model import Table
from svp_bench.tables.render_csv import wide_csv
from svp_bench.tables.render_latex import render_latex
from svp_bench.tables.render_text import render_markdown, render_terminal
from svp_bench.tasks.cards import load_protocol, load_suite

VTAB = load_suite("vtab")
PROTOCOL = load_protocol("vtab-final")
RATE = "model.learning_rate"


def build(records: list[Record]) -> Table:
    return build_table(VTAB, records, task_versions=dict.fromkeys(VTAB.tasks, 1), protocols=[PROTOCOL])


def whole(method: str, right: int, seeds: int = 1, **fields: object) -> list[Record]:
    return [
        make_record(task, method, seed, right + 7 * seed % 5, 1000, **fields)  # type: ignore[arg-type]
        for task in VTAB.tasks
        for seed in range(seeds)
    ]


def pages(table: Table) -> dict[str, str]:
    """Return every rendering on one line; of the HTML page without its scripts."""
    html = render(report_view([table], {}, {}))
    html = html[: html.index('<script type="application/json"')]
    texts = {"md": render_markdown(table), "tex": render_latex(table), "out": render_terminal(table), "html": html}
    return {name: " ".join(text.split()) for name, text in texts.items()}


def test_a_row_that_is_not_as_shipped_is_marked_everywhere() -> None:
    table = build([*whole("lora", 700, changes={RATE: 0.123}), *whole("linear", 600)])
    texts = pages(table)
    shipped = overrides(table.sections[0].rows[0].cells["vtab/dtd"].records[0], PROTOCOL)[RATE][1]
    for name, text in texts.items():
        assert "fixed before" not in text, name
        assert f"{RATE} 0.123, not {shipped}" in text.replace(r"\_", "_"), name
        assert "No record can prove when or why a value was chosen" in text, name
    assert "| 1 | lora ¶ |" in texts["md"]
    assert "| 2 | linear |" in texts["md"]
    assert r"lora $^{\P}$" in texts["tex"]
    assert texts["html"].count("¶ not as shipped") == 1
    lines = {line["row"]: line["overrides"] for line in csv.DictReader(io.StringIO(wide_csv(table)))}
    assert lines == {"lora": f"{RATE} 0.123, not {shipped}", "linear": ""}


def test_a_clipped_warm_up_is_no_departure_and_another_one_is() -> None:
    for warmup, departs in ((1.6, False), (3, True)):
        record = make_record(changes={"trainer.max_epochs": 8, "model.warmup_epochs": warmup})
        assert ("model.warmup_epochs" in overrides(record, PROTOCOL)) == departs


def test_departures_of_some_tasks_are_counted_and_searched_ones_spared() -> None:
    records = whole("lora", 700)
    records[0] = make_record(records[0].task, "lora", 0, 700, 1000, changes={"trainer.max_epochs": 3})
    search = SearchSummary("default", "grid", 12, 12, "val200", "sha256:" + "12" * 32, "sha256:" + "12" * 32, (RATE,))
    records += whole("linear", 600, changes={RATE: 0.5}, search=search)
    text = pages(build(records))["md"]
    assert "trainer.max_epochs 3, not 100" in text
    assert f"linear overrides the shipped settings: {RATE}" not in text


def test_a_method_without_a_recipe_is_noted() -> None:
    assert "There is no shipped recipe to compare with: nonesuch." in pages(build(whole("nonesuch", 600)))["md"]


def test_runs_of_other_machines_and_commits_are_marked() -> None:
    records = whole("lora", 700, 3) + whole("linear", 600, 3)
    same = pages(build(records))
    for name, text in same.items():
        assert "from 1 commit, 1 set of libraries, 1 device, 1 scan backend, 1 precision." in text, name
        assert "‖" not in text, name
        assert r"\|" not in text, name
    other = {"commit": "f" * 40, "device": "another", "libraries": {"torch": "2.7.0"}}
    records = [
        dataclasses.replace(r, **other) if (r.seed, r.method, r.task) == (1, "lora", "vtab/dtd") else r for r in records
    ]
    table = build(records)
    texts = pages(table)
    for name, text in texts.items():
        assert "from 2 commits, 2 sets of libraries, 2 devices, 1 scan backend, 1 precision." in text, name
        assert "differ in more than the seed (commit, libraries, device)" in text, name
        assert "Cells by row: lora 1." in text, name
    assert texts["md"].count("‖ |") == 1
    assert texts["tex"].count(r"$^{\|}$ &") == 1
    (line,) = [line for line in csv.DictReader(io.StringIO(wide_csv(table))) if line["row"] == "lora"]
    assert line["mixed_cells"] == "dtd"


def test_renderings_mark_the_same_cells() -> None:
    """Bold in LaTeX and on the page is better by the test of ▲; with fewer than six seeds there is neither."""
    texts = {seeds: pages(build(whole("lora", 700, seeds) + whole("linear", 600, seeds))) for seeds in (3, 7)}
    assert not any(mark in text for text in texts[3].values() for mark in ("▲", r"\textbf", r"\underline"))
    assert 'class="num best"' not in texts[3]["html"]
    assert 'class="num tied"' not in texts[3]["html"]
    assert texts[7]["md"].count("▲ |") == texts[7]["html"].count('class="num best"') == 19
    assert texts[7]["tex"].count(r"\textbf") == 19 + 5
    assert r"\underline" not in texts[7]["tex"]  # the other of two rows is no second best


def test_equal_seeds_have_no_interval_without_width() -> None:
    records = [make_record(t, m, s, right, 1000) for t in VTAB.tasks for m, right in ROWS for s in (0, 1)]
    for name, text in pages(build(records)).items():
        assert "[10.00, 10.00]" not in text, name
        assert "[70.00, 70.00]" not in text, name
        assert "gave the same number" in text, name


ROWS = (("lora", 700), ("linear", 600))


def test_an_incomplete_row_is_no_part_of_the_holm_family() -> None:
    complete = whole("lora", 700, 2) + whole("linear", 600, 2)
    partial = [record for record in whole("full", 900, 2) if record.task == "vtab/dtd"]
    alone, joint = (build(records).sections[0].comparison for records in (complete, [*complete, *partial]))
    assert alone is not None
    assert joint is not None
    found = {contrast.row: contrast for contrast in joint.contrasts}
    assert found["lora"].holm == alone.contrasts[0].holm == found["lora"].p
    assert found["full"].holm is None
    texts = pages(build([*complete, *partial]))
    for name in ("md", "out", "html"):
        assert "Holm over 1 complete row." in texts[name], name
        assert "On fewer than 19 tasks" in texts[name], name
        assert "cannot be tested with 1 source of images; no outcome" in texts[name], (
            name
        )  # one task: a p would always be 1
    assert found["full"].p is None


def test_markdown_passes_no_tags_on() -> None:
    evil = "<script>alert(1)</script>"
    records = whole("lora", 700, checkpoint=evil) + whole(
        "lora", 600, checkpoint=evil, changes={"model.method.init_args.share_layers": "<b>&"}
    )
    records.append(dataclasses.replace(records[0], status="failed", status_reason=evil, metrics=None, correct=None))
    page = render_markdown(build(records))
    assert "<" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "&lt;b&gt;&amp;" in page


@pytest.mark.parametrize("more", [(), ("--suite", "vtab")])
def test_a_results_folder_that_is_not_there_is_not_made(tmp_path: Path, more: tuple[str, ...]) -> None:
    outcome = run("table", "--results_root", str(tmp_path / "nope"), *more)
    assert "There are no records in" in outcome.out
    assert not (tmp_path / "nope").exists()
    write_record(make_record(), tmp_path / "yes")
    assert "Written" in run("table", "--results_root", str(tmp_path / "yes"), *more).out
