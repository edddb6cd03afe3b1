"""Two backbones and a method file in one results folder: each has selected configs of its own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import command, run

from svp_bench.records.store import read_records

SEARCH = """\
name: small
version: 1
sampler: grid
budget: 1
folds: none
rule: best_on_val
spaces:
  default: {model.learning_rate: [1.0e-3]}
"""
PROBE = """\
model:
  method: {class_path: svp_bench.methods.linear.Linear}
  learning_rate: 1.0e-3
  weight_decay: 0.0
"""
FLAGS = ["--model.checkpoint", "none", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
VIM, VIT = "vim_nano_patch8_64", "vit_nano_patch8_64"


@pytest.mark.slow
def test_two_backbones_and_a_method_file_share_a_results_folder(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    Path("search.yaml").write_text(SEARCH, encoding="utf-8")
    Path("probe.yaml").write_text(PROBE, encoding="utf-8")

    def sweep(backbone: str, methods: str) -> str:
        flags = ["--tasks", "demo/digits-5shot", "--methods", methods, "--seeds", "0", "--no_report", *FLAGS]
        return run("sweep", *flags, "--search", "search.yaml", "--model.backbone", backbone).out

    assert "4 runs complete (4 new)" in sweep(VIM, "linear,probe.yaml")
    assert "2 runs complete (2 new)" in sweep(VIT, "linear")
    assert "(0 new), 0 failed, 0 cells cannot run" in sweep(VIT, "linear")
    (folder,) = Path("results/selected_configs").glob("*/demo/digits-5shot")
    files = {"linear-seed0.json": VIM, "probe-seed0.json": VIM, f"linear@{VIT}-seed0.json": VIT}
    assert {path.name for path in folder.iterdir()} == set(files)
    for name, backbone in files.items():
        assert json.loads((folder / name).read_text(encoding="utf-8"))["context"]["model"]["backbone"] == backbone
    audited = command("audit", "results").out
    assert audited.count("pass  selection") == 3
    assert not re.search(r"fail +(selection|trials|rule|outside)", audited), audited
    finals = [record for record in read_records("results")[0] if record.kind == "final"]
    assert len({record.search.selected_config for record in finals if record.search}) == 3
    chosen = folder / f"linear@{VIT}-seed0.json"
    chosen.write_bytes((folder / "linear-seed0.json").read_bytes())  # of the other backbone
    assert re.search(r"fail +selection", command("audit", "results").out)
