"""The committed reference results: what the pages say follows from the records, and a record gives its number again."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
from helpers import run

from svp_bench.audit.record import audit
from svp_bench.data.sources import open_source
from svp_bench.records.defaults import row_digest
from svp_bench.records.record import Record
from svp_bench.records.store import read_record, read_records, record_path
from svp_bench.tables.build import load_table
from svp_bench.tasks.cards import load_protocol, load_suite, load_task

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference"
pytestmark = pytest.mark.skipif(
    not (REFERENCE / "demo" / "raw_pixels.json").is_file(),
    reason="the reference results are not made yet: make reference",
)
METHODS = {"svp", "vpt_shallow", "vpt_deep", "linear", "full", "lora", "adapter", "offset", "bias"}
VIM = "vim_nano_patch8_64"
SEEDS = {0, 1, 2, 3, 4}
SMALL = "demo/digits-5shot"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def records(folder: str) -> list[Record]:
    found, problems = read_records(REFERENCE / folder)
    assert problems == []
    return found


def test_the_pages_say_what_the_records_say() -> None:
    """`python benchmarks/reference.py --write` would change nothing."""
    script = load("reference")
    for path, blocks in script.blocks().items():
        text = path.read_text(encoding="utf-8")
        for name, block in blocks.items():
            assert script.inserted(text, name, block) == text, f"{path.name}, {name}: run it and commit"


@pytest.mark.parametrize(
    ("folder", "rows", "checkpoint"),
    [("demo", {VIM: METHODS}, "embedded"), ("demo-random", {VIM: {"linear", "full"}}, "none")],
)
def test_every_cell_exists_and_is_of_one_kind(folder: str, rows: dict[str, set[str]], checkpoint: str) -> None:
    """A section for each backbone, and in each the same tasks and seeds for every row."""
    found = records(folder)
    table = load_table(load_suite("demo"), found)
    assert {section.first.backbone: {row.label for row in section.rows} for section in table.sections} == rows
    assert len(table.sections) == len(rows)
    finals = [record for record in found if record.kind == "final"]
    cells = {(run.backbone, run.method, row_digest(run), run.task, run.seed) for run in finals}
    assert cells == {
        (section.first.backbone, row.method, row.setting_digest, task, seed)
        for section in table.sections
        for row in section.rows
        for task in load_suite("demo").tasks
        for seed in SEEDS
    }
    assert len(finals) == len(cells) == len(SEEDS) * 8 * sum(map(len, rows.values()))
    assert {(record.status, record.dirty, record.checkpoint) for record in finals} == {("complete", False, checkpoint)}
    assert len({(record.device, record.scan_backend, json.dumps(record.libraries)) for record in finals}) == 1


def test_every_method_had_the_same_budget_and_every_selected_config_is_valid() -> None:
    for folder in ("demo", "demo-random"):
        paths = sorted((REFERENCE / folder / "selected_configs").rglob("*.json"))
        assert {len(json.loads(path.read_text(encoding="utf-8"))["trials"]) for path in paths} == {6}
        run("audit", str(REFERENCE / folder / "records" / "demo"))


def test_the_one_known_fault_is_that_of_twelve_names() -> None:
    """README.md says so; the records are made anew in a later issue."""
    found = audit([REFERENCE]).audits
    failing = [one for one in found if one.failures]
    assert len(found) == 968
    assert len(failing) == 12
    assert {finding.subject for one in failing for finding in one.failures} == {"run id"}
    for one in failing:
        record, other = one.record, REFERENCE / "demo" / one.path.relative_to(REFERENCE / "demo-random")
        assert record is not None
        assert (record.kind, record.task, record.checkpoint) == ("selection", "demo/size", "none")
        assert read_record(other).run_id == record.run_id
        assert str(other) in one.failures[0].text


def test_the_floors_are_of_these_data_and_come_out_again() -> None:
    tasks = json.loads((REFERENCE / "demo" / "raw_pixels.json").read_text(encoding="utf-8"))["tasks"]
    assert {name: task["data_digest"] for name, task in tasks.items()} == {
        name: load_task(name).digest for name in load_suite("demo").tasks
    }
    script = load("raw_pixels")
    lists = ("train", "val"), ("trainval", "test")
    contrasts = partial(script.table, feature=script.contrasts)
    again = script.measure(open_source(load_task(SMALL)), *lists, contrasts)
    assert again["C"] == tasks[SMALL]["contrasts"]["C"]
    assert again["top1"] == pytest.approx(tasks[SMALL]["contrasts"]["top1"], abs=0.3)  # two images, elsewhere


def test_the_probes_are_of_these_data_and_come_out_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    tasks = json.loads((REFERENCE / "demo" / "features.json").read_text(encoding="utf-8"))["tasks"]
    assert {name: task["data_digest"] for name, task in tasks.items()} == {
        name: load_task(name).digest for name in load_suite("demo").tasks
    }
    script = load("features")
    protocol = load_protocol(load_suite("demo").protocol)
    probe = partial(script.features, model=script.network("embedded", 0), protocol=protocol)
    again = script.measure(open_source(load_task(SMALL)), ("train", "val"), ("trainval", "test"), probe)
    assert again["top1"] == pytest.approx(tasks[SMALL]["embedded"]["top1"], abs=0.5)


def seconds(record: Record) -> float:
    return sum(record.times.values())


@pytest.mark.parametrize("most", [12.0, pytest.param(float("inf"), marks=pytest.mark.slow)])
def test_a_record_drawn_at_random_gives_its_number_again(tmp_path: Path, most: float) -> None:
    """Bit-equal on the machine that made it; elsewhere within what another seed does to the cell.

    The draw is another one each time: what is checked in the long run is every record, of `most` seconds.
    """
    folder = random.SystemRandom().choice(["demo", "demo", "demo", "demo-random"])
    finals = [record for record in records(folder) if record.kind == "final"]
    record = random.SystemRandom().choice([record for record in finals if seconds(record) <= most])
    path = record_path(record, REFERENCE / folder)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "svp_bench", "rerun", str(path)),
            *("--results_root", str(tmp_path / "results"), "--runs_root", str(tmp_path / "runs")),
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    output = f"{path.relative_to(ROOT)}\n{done.stdout}\n{done.stderr}"
    (new,) = (tmp_path / "results" / "records").rglob("*.json")
    again = read_record(new)
    assert again.status == "complete", output
    assert again.metrics is not None
    assert record.metrics is not None
    key = record.task, record.backbone, record.setting_digest
    cell = [one.metrics.top1 for one in finals if (one.task, one.backbone, one.setting_digest) == key and one.metrics]
    assert len(cell) == len(SEEDS)
    range_of_seeds = max(cell) - min(cell)
    assert abs(again.metrics.top1 - record.metrics.top1) <= max(1.5, 2 * range_of_seeds), output
    if "Bit-equal" not in done.stdout:
        assert "differs" in done.stdout, output  # another machine: what differs is named
