"""`svp-bench demo`: what a newcomer sees first."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from helpers import command, complaint, run

from svp_bench.cards import load_suite
from svp_bench.methods import list_methods
from svp_bench.results.files import read_records
from svp_bench.sweep import demo


def paths_named(text: str) -> list[str]:
    """Return the files and folders that the end of the demo names."""
    block = text[text.index("\nreport ") : text.index("\nTensorBoard")]
    return re.findall(r"results/\S+", block)


def test_one_task_of_each_group_and_known_methods() -> None:
    suite = load_suite("demo")
    group_of = {f"demo/{task}": group for group, tasks in suite.groups.items() for task in tasks}
    assert sorted(group_of[task] for task in demo.TASKS) == sorted(suite.groups)
    assert set(demo.METHODS) <= set(list_methods())
    assert set(demo.METHODS) == {"svp", "vpt_deep", "linear", "full"}


def test_it_ends_with_a_board_and_files_and_runs_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "TASKS", ("demo/digits-5shot",))
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
        assert re.search(rf"{record.method} +│ +{record.metrics.top1:.1f} ± ", board)
    best = max(records, key=lambda record: record.metrics.top1 if record.metrics else 0)
    assert board.index(best.method) == min(board.index(record.method) for record in records)
    named = paths_named(first)
    assert len(named) == 6
    assert {path.rsplit("/", 1)[1] for path in named} == {
        *("index.html", "demo.csv", "demo_long.csv", "demo.md", "demo.tex", "demo"),
    }
    assert all((tmp_path / path).exists() for path in named)
    assert first[first.index("\nNext:") :].count("\n  svp-bench ") == 3
    assert "2 runs complete (0 new), 0 failed" in run("demo").out


def test_a_runs_folder_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "afile").write_text("")
    line = complaint(command("demo", "--runs_root", "afile/runs"), 1)
    assert "afile is not a folder; choose another folder with --runs_root DIR" in line


@pytest.mark.slow
def test_the_whole_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its time is said, not judged: a busy machine is no mistake."""
    monkeypatch.chdir(tmp_path)
    began = time.perf_counter()
    said = run("demo").out
    print(f"{time.perf_counter() - began:.0f} s")
    assert "12 runs complete (12 new), 0 failed" in said
    records, _ = read_records(tmp_path / "results")
    top1 = {(record.task, record.method): record.metrics.top1 for record in records if record.metrics}
    for task in demo.TASKS:  # weights from which tuning does transfer: everything beats a linear probe's random guess
        assert min(top1[task, method] for method in demo.METHODS) > 30
        assert top1[task, "full"] > top1[task, "linear"]
