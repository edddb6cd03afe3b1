"""A nested search: each seed has a search of its own, whose folds hold out each labelled image."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import SWEEP_FLAGS as FLAGS
from helpers import assert_error, command, run

from svp_bench.records.store import read_records

FOLDED = """\
name: folded
version: 1
sampler: grid
budget: 2
folds: 2
rule: best_on_val
spaces:
  default: {model.learning_rate: [1.0e-3, 1.0e-2]}
  lora: {model.method.rank: [64, 0]}
"""


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A nested search in two folds, one setting of which is impossible: its folder and what it printed."""
    folder = tmp_path_factory.mktemp("folded")
    (folder / "search.yaml").write_text(FOLDED, encoding="utf-8")
    monkey = pytest.MonkeyPatch()
    monkey.chdir(folder)
    flags = ["--tasks", "demo/digits-5shot", "--methods", "linear,lora", "--seeds", "0,1", *FLAGS]
    plan = run("sweep", *flags, "--search", "search.yaml", "--dry_run").out
    assert "up to 2 settings × 2 runs × 2 searches, one for each seed = 8 trial runs a method and task" in plan
    done = command("sweep", *flags, "--search", "search.yaml")
    monkey.undo()
    assert done.status == 1, done.out + done.err  # a trial failed
    return folder, done.out


def test_a_nested_search_holds_out_each_labelled_image_for_each_seed(folded: tuple[Path, str]) -> None:
    folder, output = folded
    records, problems = read_records(folder / "results")
    assert not problems
    trials = [record for record in records if record.kind == "selection"]
    # two seeds × two folds × (two settings of linear, one of lora: the other cannot be)
    assert len(trials) == 2 * 2 * 3
    for record in trials:
        data = record.config["data"]
        assert data["cross_validation"]["folds"] == 2
        assert data["cross_validation"]["seed"] == record.seed
        assert (
            record.splits["val"] == f"trainval-fold{data['cross_validation']['fold'] + 1}of2-seed{record.seed}-repeat0"
        )
        assert set(record.splits) == {"train", "val"}
        assert record.metrics is not None
        assert record.metrics.count == 25
        assert record.correct is None  # no test image
        assert record.val_correct is not None
        assert record.val_correct.split == record.splits["val"]
    assert len({record.data_digest for record in trials}) == 1
    finals = {(r.method, r.seed): r for r in records if r.kind == "final"}
    assert set(finals) == {(m, s) for m in ("linear", "lora") for s in (0, 1)}
    for (method, seed), record in finals.items():
        assert record.search is not None
        search = record.search
        assert search is not None
        assert (search.nested, search.folds, search.tried) == (True, 2, 2)
        assert search.trials == (2 if method == "linear" else 1)
        (path,) = folder.glob(f"results/selected_configs/*/demo/digits-5shot/{method}-seed{seed}.json")
        chosen = json.loads(path.read_text(encoding="utf-8"))
        assert chosen["search_seed"] == seed
        assert sorted(image for part in chosen["images"] for image in part) == list(range(50))
    assert "rank must be at least 1, not 0" in output
    assert "1 setting of 2 failed" in output
    assert "at the end of the grid" in output


def test_the_table_averages_the_seeds_of_a_nested_search(folded: tuple[Path, str], monkeypatch: Any) -> None:
    """Each seed may have another setting: still one cell, and the table says what its interval holds."""
    folder, _ = folded
    monkeypatch.chdir(folder)
    table = run("table", "--suite", "demo").out
    assert "include the noise of the selection" in " ".join(table.split())
    assert "Trials of a task that failed: lora up to 1" in " ".join(table.split())
    lines = (folder / "results" / "tables" / "demo_long.csv").read_text(encoding="utf-8").splitlines()
    assert len([line for line in lines if "digits-5shot" in line]) >= 2
    with (folder / "results" / "tables" / "demo.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["method"]]
    assert [(row["method"], row["seeds_min"]) for row in rows] == [("linear", "2"), ("lora", "2")]


def test_the_audit_passes_a_nested_search_and_sees_edits(folded: tuple[Path, str], tmp_path: Path) -> None:
    import shutil

    folder, _ = folded
    shutil.copytree(folder / "results", tmp_path / "results")
    paths = sorted(tmp_path.glob("results/records/demo/digits-5shot/linear-*.json"))
    final = next(path for path in paths if json.loads(path.read_text(encoding="utf-8"))["kind"] == "final")
    output = command("audit", str(final)).out
    assert not re.search(r"fail +(selection|trials|rule)", output), output
    assert "at the end of the grid" in output
    assert "methods differ in trials with a score" in output
    stored = json.loads(final.read_text(encoding="utf-8"))
    (path,) = tmp_path.glob(f"results/selected_configs/*/demo/digits-5shot/linear-seed{stored['seed']}.json")
    trial = json.loads(path.read_text(encoding="utf-8"))["trials"][0]["run_ids"][0]
    record = tmp_path / "results/records/demo/digits-5shot" / f"{trial}.json"
    kept = record.read_bytes()
    record.unlink()
    assert re.search(r"fail +trials", command("audit", str(final)).out)
    record.write_bytes(kept)
    other = path.with_name(path.name.replace(f"seed{stored['seed']}", f"seed{1 - stored['seed']}"))
    path.write_bytes(other.read_bytes())  # the selected config of the other seed
    assert re.search(r"fail +selection", command("audit", str(final)).out)


def test_a_selected_config_of_another_seed_is_refused(folded: tuple[Path, str], monkeypatch: Any) -> None:
    folder, _ = folded
    monkeypatch.chdir(folder)
    (path,) = folder.glob("results/selected_configs/*/demo/digits-5shot/linear-seed1.json")
    fit = [
        "fit",
        "--config",
        "configs/demo/digits-5shot.yaml",
        "--method",
        "linear",
        "--selected_config",
        str(path),
        *FLAGS,
    ]
    assert "was selected for --seed_everything 1, not 0" in assert_error(command(*fit), 2)


@pytest.mark.slow
def test_a_second_nested_sweep_finds_all_of_it(folded: tuple[Path, str], monkeypatch: Any) -> None:
    folder, _ = folded
    monkeypatch.chdir(folder)
    flags = ["--tasks", "demo/digits-5shot", "--methods", "linear,lora", "--seeds", "0,1", *FLAGS, "--no_report"]
    again = run("sweep", *flags, "--search", "search.yaml").out
    assert "4 runs complete (0 new), 0 failed" in again


# ---- disturbed
