"""`svp-bench demo`: what a newcomer sees first."""

from __future__ import annotations

import csv
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import assert_error, command, run

from svp_bench.methods import list_methods
from svp_bench.records.store import read_records
from svp_bench.report import page
from svp_bench.stats.inference import one_standard_error
from svp_bench.sweep import demo
from svp_bench.tables import build as tables
from svp_bench.tasks.cards import SuiteCard, list_parts, list_suites, load_suite, load_task

ROOT = Path(__file__).resolve().parents[1]


def paths_named(text: str) -> list[str]:
    """Return the files and folders that the end of the demo names."""
    block = text[text.index("\nreport ") : text.index("\nTensorBoard")]
    return re.findall(r"results/\S+", block)


def quick(*tasks: str) -> SuiteCard:
    """The demo's suite with some of its tasks."""
    return replace(load_suite("demo-quick"), groups={"natural": tasks})


def test_one_task_of_each_group_and_known_methods() -> None:
    suite, part = load_suite("demo"), load_suite(demo.SUITE)
    assert part.groups.keys() == suite.groups.keys()
    assert all({*tasks} <= {*suite.groups[group]} and len(tasks) == 1 for group, tasks in part.groups.items())
    assert {*part.tasks} <= {*suite.tasks}
    assert part.protocol == suite.protocol
    assert demo.SUITE in list_parts("demo")
    assert demo.SUITE not in list_suites()
    assert set(demo.METHODS) <= set(list_methods())
    assert set(demo.METHODS) == {"svp", "vpt_deep", "linear", "full"}


def test_it_ends_with_a_board_and_files_and_runs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    card = quick("digits-5shot")
    for module in (demo, tables, page):
        monkeypatch.setattr(module, "load_suite", lambda name: card if name == demo.SUITE else load_suite(name))
    monkeypatch.setattr(demo, "METHODS", {name: demo.METHODS[name] for name in ("linear", "vpt_deep")})
    first = run("demo").out
    assert "2 runs complete (2 new), 0 failed" in first
    records, problems = read_records(tmp_path / "results")
    assert problems == []
    assert {(record.method, record.checkpoint, record.status) for record in records} == {
        ("linear", "embedded", "complete"),
        ("vpt_deep", "embedded", "complete"),
    }
    board = first[first.index("Top-1 on test") :]
    for record in records:
        assert record.metrics is not None
        assert re.search(rf"│ +\d │ {record.method} +│ +{record.metrics.top1:.1f} ± ", board)
    best = max(records, key=lambda record: record.metrics.top1 if record.metrics else 0)
    assert board.index(best.method) == min(board.index(record.method) for record in records)
    named = paths_named(first)
    assert len(named) == 6
    assert {path.rsplit("/", 1)[1] for path in named} == {
        *("index.html", "demo_quick.csv", "demo_quick_long.csv", "demo_quick.md", "demo_quick.tex", "demo"),
    }
    wide = next(csv.DictReader((tmp_path / "results/tables/demo_quick.csv").open(encoding="utf-8")))
    assert (wide["rank"], wide["method"]) == ("1", best.method)  # a whole board, not a hole
    assert all((tmp_path / path).exists() for path in named)
    assert first[first.index("\nNext:") :].count("\n  svp-bench ") == 3
    assert "2 runs complete (0 new), 0 failed" in run("demo").out


def test_a_runs_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    line = assert_error(command("demo", "--runs_root", "afile/runs"), 1)
    assert "afile is not a folder; choose another folder with --runs_root DIR" in line


def readme_board() -> list[list[str]]:
    """The rows of the README's board, each as its texts."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    block = text[text.index("<!-- begin: demo board -->") : text.index("<!-- end: demo board -->")]
    lines = [line for line in block.splitlines() if line.startswith(("┃", "│"))]
    return [[part.strip() for part in re.split("[┃│]", line)[1:-1]] for line in lines]


def test_the_board_of_the_readme_is_one_that_the_demo_prints() -> None:
    """Written by benchmarks/demo_board.py from records; that its numbers come out again: `test_the_whole_demo`."""
    head, *rows = readme_board()
    suite = load_suite(demo.SUITE)
    assert head == ["rank", "method", *(task.split("/")[1] for task in suite.tasks), "mean"]
    assert {row[1] for row in rows} == set(demo.METHODS)
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    means = [float(row[-1].split(" ± ")[0]) for row in rows]
    assert means == sorted(means, reverse=True)
    for row, mean in zip(rows, means, strict=True):
        cells = [tuple(map(float, text.split(" ± "))) for text in row[2:-1]]
        for (top1, error), task in zip(cells, suite.tasks, strict=True):
            count = load_task(task).counts["test"]
            assert error == pytest.approx(one_standard_error(top1, count), abs=0.06)
        assert mean == pytest.approx(sum(top1 for top1, _ in cells) / len(cells), abs=0.06)


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is printed, not tested: the machine may be busy."""
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    output = run("demo").out
    print(f"{time.perf_counter() - began:.0f} s")
    assert "12 runs complete (12 new), 0 failed" in output
    records, _ = read_records(tmp_path / "results")
    top1 = {(record.task, record.method): record.metrics.top1 for record in records if record.metrics}
    for row in readme_board()[1:]:  # another processor rounds otherwise, which moves a score by a point or two
        for text, task in zip(row[2:-1], load_suite(demo.SUITE).tasks, strict=True):
            assert top1[task, row[1]] == pytest.approx(float(text.split(" ± ")[0]), abs=4), (row[1], task)
    table = run("table").out  # without --suite: the part stands in the place of its suite
    assert "3/3" in table
    assert "/8" not in table
    assert not (tmp_path / "results/tables/demo.csv").exists()
    for task in load_suite(
        demo.SUITE
    ).tasks:  # weights from which tuning does transfer: everything beats a linear probe's random guess
        assert min(top1[task, method] for method in demo.METHODS) > 30
        assert top1[task, "full"] > top1[task, "linear"]
