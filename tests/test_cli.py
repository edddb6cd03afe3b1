"""The front door as a program: light subcommands stay light, help helps, and every way in is the same."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import METHODS, SMALL, TASK, command, draw, run, settle, small

from svp_bench import __version__
from svp_bench.cli.commands import RUN_COMMANDS, SUBCOMMANDS
from svp_bench.cli.main import main
from svp_bench.config.keys import known_keys
from svp_bench.tasks.cards import list_tasks
from svp_bench.train.parser import build_parser

UNUSED_BY_FIT = ("pandas", "sklearn", "matplotlib", "plotly", "itables", "ray", "optuna", "svp_bench.tables.build")
HEAVY_PACKAGES = (
    *("torch", "torchvision", "torchmetrics", "lightning", "timm", "jsonargparse", "tensorboard", "numba", "triton"),
    *("transformers", *UNUSED_BY_FIT[1:7]),
)
SCRIPT = Path(sys.executable).with_name("svp-bench")

PROBE = """
import json, sys
from svp_bench.cli.main import main
status = main(json.loads(sys.argv[1]))
heavy = sorted(name for name in json.loads(sys.argv[2]) if name in sys.modules)
print(json.dumps([status, heavy]), file=sys.stderr)
"""


def fresh(*argv: str, cwd: Path | None = None) -> tuple[int, list[str], str]:
    """Run a command in a process of its own; return its status, the heavy packages that it imported, its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(argv), json.dumps(HEAVY_PACKAGES)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    status, heavy = json.loads(done.stderr.splitlines()[-1])
    return status, heavy, done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--help"], ["usage: svp-bench COMMAND", *RUN_COMMANDS, *SUBCOMMANDS]),
        (["--version"], [f"svp-bench {__version__}\n"]),
        (["tasks"], [*list_tasks(), "classes", "natural", "structured"]),
        (["tasks", "demo"], ["demo/digits", "797"]),
        (["tasks", "vtab/dtd"], ["name: vtab/dtd\n", "classes: 47\n"]),
        (["tasks", "--help"], ["usage: svp-bench tasks"]),
        (["methods"], METHODS),
        (["methods", "svp"], ["share_layers: 8", "learning_rate: 1.0e-3"]),
        (["table"], ["ecord"]),
        (["table", "--help"], ["--published"]),
        (["report", "--help"], ["--output"]),
        (["audit", "--help"], ["RECORD"]),
        (["power", "--help"], ["--effect"]),
        (["replicate", "--help"], ["test split"]),
        (["sweep", "--help"], ["--dry_run"]),
        (["tune", "--help"], ["--search"]),
        (["migrate", "--help"], ["--dry_run"]),
        (["data", "verify", "demo"], ["demo/digits: verified: train 800, val 200, trainval 1000, test 797"]),
        (["data", "status", "demo", "vtab"], ["demo/digits", "absent", "svp-bench data prepare vtab/dtd --source hub"]),
        (["fit", "--config", "configs/vtab/dtdd.yaml"], []),
        (["predict", "--help"], ["--images"]),
        (["demo", "--help"], ["--results_root"]),
        (["doctor", "--help"], ["usage: svp-bench doctor"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0] in ("--help", "--version", "fit", *SUBCOMMANDS) else "",
)
def test_a_light_command_imports_nothing_heavy(argv: list[str], words: list[str], tmp_path: Path) -> None:
    status, heavy, out = fresh(*argv, cwd=tmp_path)
    assert status == (2 if argv[0] == "fit" else 0)
    assert heavy == []
    assert [word for word in words if word not in out] == []
    assert list(tmp_path.iterdir()) == []


def test_data_draw_is_light_and_draws(tmp_path: Path) -> None:
    status, heavy, out = fresh("data", "draw", "vtab/svhn", "--root", "synthetic", cwd=tmp_path)
    assert (status, heavy) == (0, [])
    assert "Wrote synthetic images for vtab/svhn" in out
    assert (tmp_path / "synthetic/svhn/SYNTHETIC.txt").is_file()
    assert command("data", "verify", "vtab/svhn", "--root", str(tmp_path / "synthetic")).status == 0


@pytest.mark.parametrize("way", [[str(SCRIPT)], [sys.executable, "-m", "svp_bench"]], ids=["script", "module"])
def test_every_way_in_is_the_same(way: list[str], tmp_path: Path) -> None:
    for argv, status in ((["methods"], 0), (["methods", "lineer"], 2), (["--version"], 0)):
        here = command(*argv)
        done = subprocess.run([*way, *argv], capture_output=True, text=True, cwd=tmp_path, timeout=120)
        assert (done.returncode, done.stdout, done.stderr) == (here.status, here.out, here.err)
        assert here.status == status


@pytest.mark.parametrize("subcommand", [*RUN_COMMANDS])
@pytest.mark.parametrize("flag", ["--help", "-h", "--help=all"])
def test_help_of_the_heavy_subcommands_needs_no_config(subcommand: str, flag: str) -> None:
    outcome = command(subcommand, flag)
    assert outcome.status == 0
    assert outcome.err == ""
    for words in ("--config", "--method", "--model.learning_rate", "--data.batch_size", "--trainer.max_epochs"):
        assert words in outcome.out
    assert "--results_root" in outcome.out


def test_help_is_short_and_offers_what_is_accepted() -> None:
    text = command("fit", "--help", "--config", "configs/vtab/dtd.yaml").out
    assert len(text.splitlines()) < 160
    flags = re.findall(r"^  --([\w.]+)", text, re.MULTILINE)
    own = ["config", "method", "selected_config", "resume", "no_test"]
    assert flags[: len(own)] == own
    assert not {"model.num_classes", "model.image_size", "model.seed", "data.seed", "model", "data"} & {*flags}
    parsed = build_parser("fit").get_defaults().keys()
    every = {key for key in parsed if key.startswith(("model.", "data.")) and not key.startswith("model.method")}
    assert {flag for flag in flags if flag.startswith(("model.", "data."))} == every
    assert {"model.optimizer.name", "model.ema.decay", "data.augment.flip", "data.cross_validation.folds"} < every
    words = " ".join(text.split())
    assert "Peak learning rate (default: 0.001)" in words
    assert "--help=all" in words


@pytest.mark.parametrize("subcommand", ["fit", "validate", "test"])
def test_the_known_keys_are_those_of_the_parser(subcommand: str) -> None:
    keys = build_parser(subcommand).get_defaults().keys()
    parsed = {key for key in keys if not key.startswith("model.method")}
    assert known_keys(subcommand) == parsed - {"config"}


def test_a_mistyped_flag_imports_no_torch() -> None:
    argv = ["fit", "--config", "configs/vtab/dtd.yaml", "--model.learning_rat", "1"]
    code = (
        f"import sys; from svp_bench.cli.main import main; assert main({argv}) == 2; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code, *argv], check=True, capture_output=True, text=True)
    assert "did you mean 'model.learning_rate'?" in done.stderr


def test_fit_imports_what_it_needs_only(tmp_path: Path) -> None:
    flags = ["--model.backbone", "vim_nano_patch8_64", "--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"]
    status, heavy, _ = fresh(
        "fit", "--config", "configs/demo/digits-5shot.yaml", "--method", "linear", *flags, cwd=tmp_path
    )
    assert status == 0
    assert {"torch", "lightning", "timm"} <= {*heavy}
    assert {*heavy} & {*UNUSED_BY_FIT} == set()


def test_help_imports_no_torch() -> None:
    code = "import sys; from svp_bench.cli.main import main; main(['fit', '--help']); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_subcommands_of_the_help_are_those_that_run() -> None:
    out = run("--help").out
    listed = [line.split()[0] for line in out.splitlines() if line.startswith("  ") and not line.startswith("  svp-")]
    assert listed == [*RUN_COMMANDS, *SUBCOMMANDS]
    assert run("help").out == run("-h").out == out


def test_a_closed_pipe_is_quiet(tmp_path: Path) -> None:
    """As under `svp-bench tasks | head -1`: the reader goes away, whether before or after the first byte."""
    for argv in (["tasks"], ["--help"]):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run([SCRIPT, *argv], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120)
        os.close(writer)
        assert done.stderr == ""
        assert done.returncode == 1


def test_the_table_shows_published_numbers_marked_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    run(*small("--method", "linear"))
    plain, quoted = run("table").out, run("table", "--published").out
    assert "published, not measured here" not in plain
    assert "published, not measured here" in quoted
    assert run("table", "--suite", "vtab", "--suite", "demo").status == 0


def test_the_header_of_a_run_says_what_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    lines = run(*small("--method", "vpt_deep")).out.splitlines()
    head = {line.split()[0]: line for line in lines[1:5]}
    assert head["task"] == f"  task       {TASK} v1, stage final (train on train800val200, test on test)"
    backbone = SMALL["model.backbone"]
    assert head["backbone"].startswith(f"  backbone   {backbone}, random weights, scan backend reference (")
    assert head["method"].startswith("  method     vpt_deep: 384 parameters + 1,700 of the head train, of ")
    assert any(line.lstrip().startswith("Random weights") for line in lines[5:12])
    assert any(line.split() == ["adapter:", "384", "(100%", "in", "1", "of", "1", "tensor)"] for line in lines)
    assert lines[-1] == "Next: svp-bench table"


def test_a_task_needs_no_config_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    draw(tmp_path / "data", "vtab/dtd")
    with_file = run(*small("--data.task", "vtab/dtd", "--method", "linear")).record
    argv = small("--data.task", "vtab/dtd", "--method", "linear")
    without = run("fit", *argv[3:]).record
    assert without["config_digest"] == with_file["config_digest"]
    assert without["task"] == "vtab/dtd"


def test_every_run_gets_a_name_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    names = {run(*small("--method", "linear")).record["run_id"] for _ in range(2)}
    assert len(names) == 2
    assert all(name.startswith("linear-") and "-seed0-" in name for name in names)


def test_older_names_are_accepted_with_a_notice(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tasks", "own/pictures"]) == 0
    found = capsys.readouterr()
    assert "custom/images" in found.out
    assert found.err == "svp-bench: own/pictures is now called custom/images\n"
    assert main(["fit", "--config=configs/own/pictures.yaml", "--choice", "none.json", "--data.root", "."]) == 2
    found = capsys.readouterr()
    assert "configs/custom/images.yaml" in found.err
    assert "no file 'none.json'" in found.err
