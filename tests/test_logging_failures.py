"""A writer of TensorBoard that fails costs the curves, not the run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import run, settle, small
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from svp_bench.core.errors import RecordError
from svp_bench.train import recorded as recording
from svp_bench.train.module import AdaptationModule

LINE = small("--method", "linear", "--trainer.log_every_n_steps", "1", trainer__max_epochs="3")


def fail(*_: Any, **__: Any) -> Any:
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (SummaryWriter, "__init__"),
        (SummaryWriter, "add_scalar"),
        (SummaryWriter, "add_image"),
        (SummaryWriter, "flush"),
        (SummaryWriter, "close"),
        (RecordWriter, "write"),  # in the writer's thread
        (RecordWriter, "flush"),
    ],
)
def test_a_writer_that_fails_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: Any, name: str
) -> None:
    settle(tmp_path, monkeypatch)
    monkeypatch.setattr(target, name, fail)
    outcome = run(*LINE)
    assert outcome.record["status"] == "complete"
    told = [text for text in outcome.warnings if "TensorBoard" in text]
    assert len(told) == 1, outcome.warnings
    assert "No space left on device" in told[0]
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("what", ["runs", "events"])
def test_a_deleted_folder_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    settle(tmp_path, monkeypatch)
    real, seen = AdaptationModule.training_step, [0]

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> Any:
        seen[0] += 1
        if seen[0] == 8:
            for place in [Path("runs")] if what == "runs" else list(Path("runs").rglob("*tfevents*")):
                shutil.rmtree(place) if place.is_dir() else place.unlink()
        return real(self, batch, batch_idx)

    monkeypatch.setattr(AdaptationModule, "training_step", training_step)
    outcome = run(*LINE)
    assert outcome.record["status"] == "complete"
    assert (Path("runs") / outcome.record["checkpoint_file"]).is_file()


def test_predictions_that_cannot_be_written_leave_a_complete_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)

    def full_disk(*_: Any) -> Any:
        raise RecordError("cannot write results into runs: No space left on device; choose another folder")

    monkeypatch.setattr(recording, "write_predictions", full_disk)
    outcome = run(*small("--method", "linear"))
    assert outcome.record["status"] == "complete"
    assert any("No space left on device" in text for text in outcome.warnings)
