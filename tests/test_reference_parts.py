"""The script of the reference results, on synthetic records: several backbones in one folder, and partial results."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from synthetic_records import make_record
from test_reference import load

from svp_bench.records.record import Record, SearchSummary
from svp_bench.records.store import write_record
from svp_bench.tasks.cards import load_suite, load_task

DEMO = load_suite("demo")
VIM, VIT = "vim_nano_patch8_64", "vit_nano_patch8_64"
SEEDS = (0, 1)
LEADS = {  # images of 1000 above linear on Vim; on the ViT half of it
    "full": 300,
    "lora": 280,
    "adapter": 200,
    "svp": 20,
    "bias": 150,
    "offset": 120,
    "vpt_deep": 100,
    "vpt_shallow": 10,
    "linear": 0,
    "prodial": 240,
    "lp_ft": 290,
    "last_blocks": 270,
}
DIGEST = "sha256:" + "12" * 32
SEARCH = SearchSummary("demo", "grid", 6, 6, "val", DIGEST, DIGEST, ("model.learning_rate",), 6, nested=True, folds=0)
TARGETS = "model.method.init_args.targets"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    return load("reference")


def record(task: str, method: str, backbone: str, seed: int, right: int, **more: Any) -> Record:
    changes = {"model.backbone": backbone, "model.method.init_args": {}, **more.pop("changes", {})}
    fields = {"backbone": backbone, "protocol": DEMO.protocol, "task_version": load_task(task).version, **more}
    return make_record(task, method, seed, right, 1000, changes, SEARCH, **fields)


def score(task: str, method: str, backbone: str, seed: int) -> int:
    lead = LEADS[method] if backbone == VIM else LEADS[method] // 2
    return 500 + lead + 7 * DEMO.tasks.index(task) + 4 * seed + 3 * (len(method) * (seed + 1) % 5)


def trained(backbones: tuple[str, ...] = (VIM, VIT)) -> list[Record]:
    return [
        record(task, method, backbone, seed, score(task, method, backbone, seed))
        for backbone in backbones
        for method in LEADS
        for task in DEMO.tasks
        for seed in SEEDS
    ]


def scratch() -> list[Record]:
    random = {"checkpoint": "none", "checkpoint_digest": None}
    return [
        record(task, method, VIM, seed, 200 + 5 * seed, **random)
        for method in ("full", "linear")
        for task in DEMO.tasks
        for seed in SEEDS
    ]


def fill(folder: Path, records: list[Record], random: list[Record], floors: bool = True) -> Path:
    for name, runs in (("demo", records), ("demo-random", random)):
        (folder / name).mkdir(parents=True)
        for one in runs:
            write_record(one, folder / name)
    if floors:
        probe = {"top1": 40.0}
        of_task: dict[str, dict[str, Any]] = {
            "raw_pixels.json": {"pixels": probe, "contrasts": probe},
            "features.json": {"embedded": {"top1": 60.0}, "random": [probe, {"top1": 44.0}]},
        }
        for name, values in of_task.items():
            tasks = {task: {"data_digest": "x", **values} for task in DEMO.tasks}
            (folder / "demo" / name).write_text(json.dumps({"tasks": tasks}), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with complete results on two backbones, and a control that uses LoRA's code."""
    controls = [
        record(task, "lora", VIM, seed, 990, changes={TARGETS: ["in_proj", "out_proj"]})
        for task in DEMO.tasks
        for seed in SEEDS
    ]
    return fill(tmp_path_factory.mktemp("whole"), [*trained(), *controls], scratch())


def first_column(table: str) -> list[str]:
    return [line.split(" | ")[0].strip("|* ") for line in table.splitlines() if line.startswith("|")][2:]


def cells_of(table: str, name: str) -> list[str]:
    (line,) = [line for line in table.splitlines() if line.strip("|* ").startswith(f"{name} |") or f"*{name}*" in line]
    return [cell.strip() for cell in line.strip("|").split(" | ")][1:]


def test_each_backbone_has_tables_of_its_own(script: ModuleType, whole: Path) -> None:
    reference = script.Reference(whole)
    assert list(reference.sections) == [VIM, VIT]
    assert reference.missing == []
    for table in (reference.main_table(), reference.against_linear()):
        assert re.findall(r"^\*\*`(\w+)`\*\*$", table, re.MULTILINE) == [VIM, VIT]
    vim, vit = reference.main_table().split(f"**`{VIT}`**")
    labels = first_column(vim)
    assert "in_proj" in labels[0]  # the control with the best mean, named by its setting
    means = {method: sum(score(t, method, VIM, s) for t in DEMO.tasks for s in SEEDS) for method in LEADS}
    assert labels[1 : 1 + len(LEADS)] == sorted(LEADS, key=lambda method: -means[method])
    assert {"full, from scratch", "linear on random features", "logistic regression on pixels"} < set(first_column(vim))
    assert set(first_column(vit)) == set(LEADS)
    count = [score("demo/count", "svp", VIM, seed) / 10 for seed in SEEDS]
    assert cells_of(vim, "svp")[DEMO.tasks.index("demo/count")].startswith(f"{sum(count) / 2:.1f} ± ")


def test_the_short_table_has_ten_rows_by_its_rule(script: ModuleType, whole: Path) -> None:
    table = script.Reference(whole).short_table()
    names = first_column(table)
    assert names[-2:] == ["full, from scratch", "logistic regression on pixels"]
    # the controls lp_ft, last_blocks and LoRA on other projections do not count, though their means are higher
    assert names[:-2] == ["full", "lora", "prodial", "adapter", "bias", "offset", "svp", "linear"]
    assert len(names) == script.SHORT
    for backbone, column in ((VIM, 0), (VIT, 1)):
        for method in ("lora", "svp"):
            scores = [score(task, method, backbone, seed) / 10 for task in DEMO.tasks for seed in SEEDS]
            assert cells_of(table, method)[column].startswith(f"{sum(scores) / len(scores):.1f} [")
    assert cells_of(table, "logistic regression on pixels") == ["40.0", "–", "–"]


def test_the_planned_comparisons_come_from_nested_searches_only(
    script: ModuleType, whole: Path, tmp_path: Path
) -> None:
    text = script.Reference(whole).comparisons()
    assert text.count("records missing") == 5  # two seeds of five
    assert f"24 of 40 runs of svp on {VIT}" in text
    plan = json.dumps(
        {
            "suite": "demo",
            "seeds": [*SEEDS],
            "smallest_difference": 1,
            "comparisons": [
                {"methods": ["svp", "lora"], "backbones": [VIM]},
                {"methods": ["svp", "lora"], "backbones": [VIM, VIT]},
            ],
        }
    )
    (tmp_path / "plan.yaml").write_text(plan, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "COMPARISONS", tmp_path / "plan.yaml")
        lines = script.Reference(whole).comparisons().splitlines()
    by_task = {
        backbone: [
            sum(score(task, "svp", backbone, s) - score(task, "lora", backbone, s) for s in SEEDS) / 20
            for task in DEMO.tasks
        ]
        for backbone in (VIM, VIT)
    }
    vim, vit = (sum(values) / len(values) for values in by_task.values())
    assert f"| {vim:+.2f} |" in lines[2]
    assert f"| {vim - vit:+.2f} |" in lines[3]
    assert "older than the plan" in script.Reference().comparisons()


def test_partial_results_are_shown_with_what_is_missing_and_not_written(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    some = [
        one
        for one in trained((VIM,))
        if not (one.method == "lora" and one.task == "demo/size") and not (one.method == "bias" and one.seed == 1)
    ]
    folder = fill(tmp_path / "part", some, [], floors=False)
    reference = script.Reference(folder)
    text = "\n".join(reference.missing)
    assert f"demo: lora on {VIM} has all 2 seeds on 7 of 8 tasks" in text
    assert f"demo: bias on {VIM} has all 2 seeds on 0 of 8 tasks" in text
    assert "demo-random: no complete final run" in text
    assert "raw_pixels.json" in text
    lora = cells_of(reference.main_table(), "lora")
    assert lora[DEMO.tasks.index("demo/size")] == lora[8] == "–"
    assert lora[DEMO.tasks.index("demo/count")] != "–"
    assert cells_of(reference.against_linear(), "lora")[2:4] == ["–", "–"]  # structured, all 8
    assert "lora" not in first_column(reference.short_table())
    pages = [script.ROOT / "README.md", script.FOLDER / "README.md"]
    before = [page.read_bytes() for page in pages]
    monkeypatch.setattr(sys, "argv", ["reference.py", "--folder", str(folder), "--write"])
    with pytest.raises(SystemExit, match="nothing is written"):
        script.main()
    assert [page.read_bytes() for page in pages] == before
    monkeypatch.setattr(sys, "argv", ["reference.py", "--folder", str(folder)])
    script.main()
    printed = capsys.readouterr().out
    assert "Not complete:" in printed
    assert f"lora on {VIM} has all 2 seeds on 7 of 8 tasks" in printed
    assert "--- short reference table" in printed


def test_the_wide_table_has_its_own_tasks(script: ModuleType, tmp_path: Path) -> None:
    folder = fill(tmp_path / "some", trained((VIM,)), scratch())
    assert "wide table" not in script.blocks_of(script.Reference(folder))[script.FOLDER / "README.md"]
    tasks = ("demo/textures", "demo/count")
    for method, lead in (("vp", 10), ("spt", 60), ("vapt", 90)):
        for task in tasks:
            for seed in SEEDS:
                if (method, task) != ("vapt", "demo/count"):
                    write_record(record(task, method, VIM, seed, 500 + lead + seed), folder / "demo-wide")
    reference = script.Reference(folder)
    assert reference.missing == [f"demo-wide: vapt on {VIM} has all 2 seeds on 1 of 2 tasks"]
    table = script.blocks_of(reference)[script.FOLDER / "README.md"]["wide table"]
    assert table.startswith("|  | textures | count | mean of 2 [95 %] |")
    assert first_column(table) == ["spt", "vp", "vapt"]
    assert cells_of(table, "spt")[0].startswith("56.0 ± ")
    assert cells_of(table, "spt")[2].startswith("56.0")
    assert cells_of(table, "vapt")[1:3] == ["–", "–"]


def test_without_any_results_everything_is_missing(script: ModuleType, tmp_path: Path) -> None:
    reference = script.Reference(fill(tmp_path, [], [], floors=False))
    assert len(reference.missing) == 4
    assert all(isinstance(text, str) for named in script.blocks_of(reference).values() for text in named.values())


@pytest.mark.parametrize(
    ("change", "text"),
    [({"protocol_version": 9}, "sections by backbone"), ({"data_digest": "sha256:" + "00" * 32}, "further cells")],
)
def test_results_of_several_kinds_are_refused(
    script: ModuleType, tmp_path: Path, change: dict[str, Any], text: str
) -> None:
    other = [record(task, "svp", VIM, 7, 500, **change) for task in DEMO.tasks]
    with pytest.raises(SystemExit, match=text):
        script.Reference(fill(tmp_path, [*trained((VIM,)), *other], scratch()))
