"""A run that was stopped goes on to the weights that it would have reached, to the bit; nothing is half-written."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Outcome, command, complaint, read_json, run, settle
from helpers import small as line
from hypothesis import given, settings
from hypothesis import strategies as st

from svp_bench.data.samplers import GlobalBatchSampler
from svp_bench.errors import SvpBenchError
from svp_bench.train.module import AdaptationModule
from svp_bench.train.resume import AtomicCheckpointIO, find_run, locked

CHANGING = {"run_id", "created", "times", "images_per_second", "peak_memory_mib", "checkpoint_file"}
CHANGING |= {"data_notes"}  # they name the folder
EPOCHS, STEPS = 3, 15  # 17 pictures in batches of 4: five steps an epoch
FLAGS = ("--model.method.dropout", "0.5", "--trainer.max_epochs", str(EPOCHS))
needs_signals = pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def small(*extra: str) -> list[str]:
    values = line(*extra)
    at = values.index("--trainer.max_epochs")
    return values[:at] + values[at + 2 :]


def weights(outcome: Outcome) -> dict[str, torch.Tensor]:
    content = torch.load(outcome.folder / "checkpoints" / "last.ckpt", weights_only=True)
    state: dict[str, torch.Tensor] = content["state_dict"]
    return state


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steady(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in CHANGING}


def at_step(monkeypatch: pytest.MonkeyPatch, step: int, deed: Any) -> None:
    """Do something in the middle of one training step, once."""
    real, seen = AdaptationModule.training_step, [0]

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        seen[0] += 1
        if seen[0] == step:
            deed()
        return real(self, batch, batch_idx)

    monkeypatch.setattr(AdaptationModule, "training_step", training_step)


class Whole(NamedTuple):
    """A run that nobody stopped."""

    weights: dict[str, torch.Tensor]
    record: dict[str, Any]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    with pytest.MonkeyPatch.context() as patch:
        settle(tmp_path_factory.mktemp("whole"), patch)
        outcome = run(*small(*FLAGS))
        return Whole(weights(outcome), steady(outcome.record))


def fail() -> None:
    raise RuntimeError("the power went")


@needs_signals
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("step", [1, 4, 5, 6, 13, 15])
def test_a_signal_saves_and_the_run_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, step: int, name: str
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), getattr(signal, name)))
        stopped = command(*small(*FLAGS))
    assert stopped.status == 0
    assert f"Stopped by {name}" in stopped.out
    assert f"after {step} steps" in stopped.out
    assert "Go on: the same command with --resume" in stopped.out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    assert not list(Path("results").rglob("*.json"))
    again = run(*small(*FLAGS, "--resume"))
    assert again.folder == stopped.folder
    assert same(weights(again), whole.weights)
    assert steady(again.record) == whole.record


@pytest.mark.parametrize("step", [2, 5, 6, 12])
def test_a_crash_costs_the_epoch_at_most(place: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, step: int) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, step, fail)
        with pytest.raises(RuntimeError, match="the power went"):
            command(*small(*FLAGS))
    again = run(*small(*FLAGS, "--resume"))
    assert same(weights(again), whole.weights)
    assert steady(again.record) == whole.record
    assert len(list(Path("results/records/vtab/cifar").glob("*.json"))) == 1  # the record of the crash was replaced
    assert again.record["epochs"] == EPOCHS


@needs_signals
def test_in_stage_select_and_with_accumulation(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*FLAGS, "--data.stage", "select", "--trainer.accumulate_grad_batches", "2")
    whole = run(*small(*flags))
    with monkeypatch.context() as patch:
        at_step(patch, 9, lambda: os.kill(os.getpid(), signal.SIGTERM))  # the first half of a step
        stopped = command(*small(*flags))
    assert "after 5 steps" in stopped.out
    again = run(*small(*flags, "--resume"))
    assert same(weights(again), weights(whole))
    assert steady(again.record) == steady(whole.record)


@needs_signals
def test_within_an_epoch_a_step_stays_as_many_batches(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere the number is free: what a record compares does not depend on it."""
    flags = (*FLAGS, "--trainer.accumulate_grad_batches")
    with monkeypatch.context() as patch:
        at_step(patch, 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert command(*small("--data.drop_last", "true", *flags, "2")).status == 0
    told = complaint(command(*small("--data.drop_last", "true", *flags, "1", "--resume")), 2)
    assert "counts 2 batches for a step: go on with --trainer.accumulate_grad_batches 2, not 1" in told
    run(*small("--data.drop_last", "true", *flags, "2", "--resume"))


def test_what_there_is_to_go_on_with(place: Path) -> None:
    first = command(*small(*FLAGS, "--resume"))
    assert first.status == 0
    assert any("no run of this setting and seed" in notice for notice in first.notices)
    again = command(*small(*FLAGS, "--resume"))
    assert again.status == 0
    assert f"{first.folder.name} is complete" in again.out
    other = run(*small(*FLAGS, "--seed_everything", "1", "--resume"))
    assert other.folder != first.folder
    assert len(list(Path("results/records/vtab/cifar").glob("*.json"))) == 2


def test_other_data_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 8, fail)
        with pytest.raises(RuntimeError):
            command(*small(*FLAGS))
    lists = sorted(Path("data").rglob("train800val200.txt")) or sorted(Path("data").rglob("*train800val200*"))
    lines = lists[0].read_text().splitlines()
    lists[0].write_text("\n".join(lines[::-1]) + "\n")
    assert "the run began with other lists of vtab/cifar" in complaint(command(*small(*FLAGS, "--resume")), 2)


def test_one_run_is_trained_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from svp_bench.errors import UsageError\n"
        "from svp_bench.train.resume import locked\n"
        "try:\n"
        "    with locked(pathlib.Path(sys.argv[1])): print('free')\n"
        "except UsageError as error: print(error)\n"
    )
    asked = [sys.executable, "-c", code, str(tmp_path / "svp-run")]
    with locked(tmp_path / "svp-run"):
        taken = subprocess.run(asked, capture_output=True, text=True, check=True).stdout
    assert taken == "another process is training the run svp-run right now\n"
    assert subprocess.run(asked, capture_output=True, text=True, check=True).stdout == "free\n"


def test_a_checkpoint_is_the_old_or_the_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, keeper = tmp_path / "checkpoints" / "last.ckpt", AtomicCheckpointIO()
    keeper.save_checkpoint({"x": torch.ones(2)}, path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(
            SvpBenchError, match=r"No space left on device.*an older one, if there is one, is untouched"
        ):
            keeper.save_checkpoint({"x": torch.zeros(2)}, path)
    assert keeper.load_checkpoint(path)["x"].tolist() == [1, 1]
    (path.parent / ".last.ckpt.1.part").write_bytes(b"half")
    keeper.save_checkpoint({"x": torch.zeros(2)}, path)
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]
    assert keeper.load_checkpoint(path)["x"].tolist() == [0, 0]


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_sampler_skips_what_is_done(data: st.DataObject) -> None:
    world, accumulate = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    batch = world * accumulate * data.draw(st.integers(1, 4))
    count = batch * data.draw(st.integers(1, 6))
    rank, epoch = data.draw(st.integers(0, world - 1)), data.draw(st.integers(0, 3))
    sampler = GlobalBatchSampler(count, batch, 5, world, rank, accumulate=accumulate)
    sampler.set_epoch(epoch)
    whole = list(sampler)
    skipped = accumulate * data.draw(st.integers(0, len(whole) // accumulate))
    sampler.skip(skipped)
    assert len(sampler) == len(whole)
    assert list(sampler) == whole[skipped:]
    assert list(sampler) == whole  # the epochs after it are whole


def test_the_newest_unfinished_run_is_found(tmp_path: Path) -> None:
    for name, seed in (("svp-20260101T000000Z-seed0-aa-1", 0), ("svp-20260102T000000Z-seed0-aa-2", 0)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"seed_everything: {seed}\nkey: 1\n")
    (tmp_path / "svp-20260103T000000Z-seed0-aa-3").mkdir()  # killed before its config was written
    found = find_run(tmp_path, tmp_path, 0, lambda config: config["key"] == 1)
    assert found is not None
    assert found.folder.name.endswith("aa-2")
    assert found.checkpoint is None
    assert find_run(tmp_path, tmp_path, 0, lambda config: False) is None
    assert find_run(tmp_path, tmp_path, 1, lambda config: True) is None


def killed_somewhere(argv: list[str], seconds: float) -> bool:
    """Start a run as a process of its own and kill it after some time; return whether it had ended by itself."""
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    began = time.monotonic()
    while process.poll() is None and time.monotonic() - began < seconds:
        time.sleep(0.01)
    ended = process.poll() is not None
    process.kill()
    process.wait()
    return ended


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_killed_at_many_moments(place: Path) -> None:
    """kill -9, again and again, until the run is through: the same weights as without."""
    code = (
        "import helpers, sys; helpers.register_backbone(); from svp_bench.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    flags = ("--model.method.dropout", "0.5", "--trainer.max_epochs", "60")
    whole = run(*small(*flags))
    argv = [sys.executable, "-c", code, *small(*flags, "--seed_everything", "0", "--resume")]
    Path("runs").rename("whole")
    Path("results").rename("whole_results")
    moments = 0
    while not killed_somewhere(argv, 5.0 + 0.37 * (moments % 11)):
        moments += 1
        assert moments < 60, "it never gets anywhere"
    (record,) = Path("results/records/vtab/cifar").glob("*.json")
    (checkpoint,) = Path("runs/vtab/cifar").glob("*/checkpoints/last.ckpt")
    ours = torch.load(checkpoint, weights_only=True)["state_dict"]
    theirs = torch.load(next(Path("whole/vtab/cifar").glob("*/checkpoints/last.ckpt")), weights_only=True)["state_dict"]
    assert moments >= 1
    assert same(ours, theirs)
    found = read_json(next(Path("whole_results/records/vtab/cifar").glob("*.json")))
    assert steady(read_json(record)) == steady(found)
    assert whole.record_path.name != record.name
