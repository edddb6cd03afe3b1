"""What a run shows while it trains: a line an epoch, or in a terminal a bar for the whole run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from helpers import run, settle, small

from svp_bench.train.callbacks import _Clock, _duration

LINE = re.compile(
    r"^epoch (\d+)/(\d+)  loss (\d+\.\d{4})(  val loss .+ val top-1 \S+)?  (\S+) elapsed  (\S+) left$", re.M
)


@pytest.mark.parametrize(("stage", "bar"), [("final", "false"), ("select", None)])
def test_an_epoch_is_a_line_without_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, bar: str | None
) -> None:
    settle(tmp_path, monkeypatch)
    values: dict[str, Any] = {"trainer.max_epochs": "3", "data.stage": stage, "trainer.enable_progress_bar": bar}
    found = LINE.findall(run(*small("--method", "linear", **values)).out)
    assert [(epoch, epochs) for epoch, epochs, *_ in found] == [("1", "3"), ("2", "3"), ("3", "3")]
    assert all(bool(line[3]) == (stage == "select") for line in found)
    assert found[-1][-1] == "0:00"


def test_the_time_left_is_that_of_the_whole_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("svp_bench.train.callbacks.time.perf_counter", lambda: now[0])
    trainer: Any = SimpleNamespace(global_step=8, estimated_stepping_batches=40)  # resumed after two epochs of ten
    clock = _Clock()
    clock.start(trainer)
    assert clock.left(trainer) is None
    now[0], trainer.global_step = 105.0, 10
    assert clock.left(trainer) == pytest.approx(75.0)  # two steps took 5 s, 30 are left
    now[0], trainer.global_step = 110.0, 12
    assert clock.left(trainer) == pytest.approx(70.0)
    clock.start(trainer)  # again from epoch 3: a first step of 90 s, all others take 1 s
    now[0], trainer.global_step = 200.0, 13
    clock.step(trainer)
    now[0], trainer.global_step = 203.0, 16
    clock.step(trainer)
    assert clock.left(trainer) == pytest.approx(24.0)  # 6 epochs of 4 steps
    assert [_duration(seconds) for seconds in (0.4, 61, 3599.6, 7325)] == ["0:00", "1:01", "1:00:00", "2:02:05"]


def shown_in_terminal(folder: Path, columns: int, *argv: str) -> str:
    import fcntl
    import pty
    import struct
    import termios

    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40 if columns else 0, columns, 0, 0))
    process = subprocess.Popen([sys.executable, *argv], cwd=folder, stdout=slave, stderr=slave)
    os.close(slave)
    text = b""
    while True:
        try:
            part = os.read(master, 4096)
        except OSError:
            break
        if not part:
            break
        text += part
    assert process.wait() == 0
    return text.decode()


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(("columns", "has"), [(0, "False"), (100, "True")])
def test_a_progress_bar_needs_a_terminal_with_a_width(tmp_path: Path, columns: int, has: str) -> None:
    code = "import sys; from svp_bench.core.terminal import has_width; print(has_width(sys.stdout))"
    assert shown_in_terminal(tmp_path, columns, "-c", code).strip() == has


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
@pytest.mark.parametrize("columns", [0, 160])
def test_a_terminal_shows_phases_and_epochs(tmp_path: Path, columns: int) -> None:
    task = ("--config", "configs/demo/digits-5shot.yaml", "--method", "linear", "--trainer.max_epochs", "2")
    shown = shown_in_terminal(tmp_path, columns, "-m", "svp_bench", "fit", *task)
    assert shown.startswith("Loading PyTorch")
    assert "Training begins" in shown
    for word in ("Epoch 1/2", "Epoch 2/2", "run_left") if columns else ("epoch 1/2", "epoch 2/2", "left"):
        assert word in shown
    assert "Epoch 0" not in shown
