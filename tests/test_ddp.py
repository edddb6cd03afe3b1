"""Two processes train as one does: the same weights within rounding, each test picture once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import command, complaint, read_json, run, settle
from helpers import small as line

# 17 pictures in batches of 6: the last of an epoch has 5, which two processes share unevenly; so are the 9 of test.
FLAGS = {"data__batch_size": "6", "trainer__max_epochs": "2", "trainer__accelerator": "cpu"}
TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
TOLERANCE = 1e-5  # relative to a tensor's largest entry; gradients are summed in another order
SCRIPT = """
import sys
sys.path[:0] = [TESTS]
import helpers
helpers.register_backbone()
from svp_bench.cli import entry_point
entry_point()
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place with drawn data and a program, since Lightning starts the second process by the first one's file."""
    settle(tmp_path, monkeypatch)
    Path("program.py").write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    for name in [name for name in os.environ if name.startswith(("SVP_BENCH_RUN", "LOCAL_RANK", "NODE_RANK"))]:
        monkeypatch.delenv(name)
    return tmp_path


def start(*argv: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "program.py", *argv], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def two(*extra: str) -> str:
    process = start(*line(*TWO, *extra, **FLAGS))
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    return out


def trained(root: Path) -> dict[str, torch.Tensor]:
    (path,) = root.glob("runs/vtab/cifar/*/checkpoints/last.ckpt")
    state: dict[str, torch.Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return state


def record(root: Path) -> dict[str, Any]:
    (path,) = root.glob("results/records/vtab/cifar/*.json")
    return read_json(path)


def alone(monkeypatch: pytest.MonkeyPatch, *extra: str) -> Path:
    """The same run in one process, elsewhere on the same data."""
    other = Path("one").resolve()
    other.mkdir()
    (other / "data").symlink_to(Path("data").resolve())
    with monkeypatch.context() as patch:
        patch.chdir(other)
        run(*line(*extra, **FLAGS))
    return other


def check_equal(one: Path, other: Path) -> None:
    ours, theirs = trained(one), trained(other)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert float((value - theirs[name]).abs().max() / scale) <= TOLERANCE, name
    mine, its = record(one), record(other)
    assert (mine["device_count"], its["device_count"]) == (2, 1)
    assert mine["metrics"]["count"] == its["metrics"]["count"] == 9
    for key in ("correct", "data_digest", "setting_digest", "epochs", "status", "parameters"):
        assert mine[key] == its[key], key
    assert mine["metrics"]["loss"] == pytest.approx(its["metrics"]["loss"], rel=1e-4)


def test_two_processes_train_as_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = two()
    assert out.count("Record (complete)") == 1
    check_equal(place, alone(monkeypatch))


@pytest.mark.slow
def test_with_accumulated_gradients(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--trainer.accumulate_grad_batches", "2", "--data.batch_size", "4", "--data.drop_last", "true")
    two("--method", "full", *flags)
    check_equal(place, alone(monkeypatch, "--method", "full", "--data.batch_size", "4", "--data.drop_last", "true"))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_both_processes_stop_at_the_same_step_and_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--trainer.max_epochs", "60")
    process = start(*line(*TWO, *flags, **FLAGS))
    for _ in range(1200):
        time.sleep(0.05)
        if list(place.glob("runs/vtab/cifar/*/checkpoints/last.ckpt")):
            break
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "Stopped by SIGTERM" in out
    assert not list(place.glob("results/records/vtab/cifar/*.json"))
    two(*flags, "--resume")
    check_equal(place, alone(monkeypatch, *flags))


def test_a_batch_that_cannot_be_shared_is_refused(place: Path) -> None:
    told = complaint(command(*line(*TWO, data__batch_size="5")), 2)
    assert "cannot be divided by 2 processes" in told


def test_accumulated_gradients_equal_the_big_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process; the last batch of an epoch, of 5 pictures, is cut unevenly."""
    run(*line("--trainer.accumulate_grad_batches", "3", **FLAGS))
    other = alone(monkeypatch)
    ours, theirs = trained(place), trained(other)
    for name, value in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert float((value - theirs[name]).abs().max() / scale) <= TOLERANCE, name
    assert record(place)["correct"] == record(other)["correct"]
