"""A run that was stopped goes on to the weights that it would have reached, to the bit; nothing is half-written."""

from __future__ import annotations

import copy
import os
import pydoc
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from helpers import Outcome, assert_error, command, read_json, run, settle
from helpers import small as line
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.utilities import rank_zero_only

from svp_bench.core.errors import CheckpointError, SvpBenchError, plural
from svp_bench.data.module import VisionDataModule
from svp_bench.data.samplers import GlobalBatchSampler
from svp_bench.train import resume
from svp_bench.train import run as cli
from svp_bench.train.checkpoint import AtomicCheckpointIO, Checkpoint
from svp_bench.train.module import AdaptationModule
from svp_bench.train.processes import is_first_process
from svp_bench.train.resume import check_resumable, find_run, lock_run, locked

CHANGING = {"run_id", "created", "times", "images_per_second", "peak_memory_mib", "checkpoint_file"}
CHANGING |= {"data_notes"}  # they name the folder
EPOCHS, STEPS = 3, 15  # 17 images in batches of 4: five steps an epoch
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
@pytest.mark.parametrize(
    ("step", "name"),
    [
        *((step, "SIGTERM") for step in (1, 5, 15)),
        (4, "SIGUSR1"),
        *(pytest.param(step, "SIGTERM", marks=pytest.mark.slow) for step in (4, 6, 13)),
        *(pytest.param(step, "SIGUSR1", marks=pytest.mark.slow) for step in (1, 5, 6, 13, 15)),
    ],
)
def test_a_signal_saves_and_the_run_goes_on(
    place: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole, step: int, name: str
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        at_step(patch, step, lambda: os.kill(os.getpid(), getattr(signal, name)))
        stopped = command(*small(*FLAGS))
    assert stopped.status == 0
    assert f"Stopped by {name}" in stopped.out
    assert f"after {plural(step, 'step')}" in stopped.out
    assert "the same command and --resume" in stopped.out
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    assert not list(Path("results").rglob("*.json"))
    again = run(*small(*FLAGS, "--resume"))
    assert again.folder == stopped.folder
    assert same(weights(again), whole.weights)
    assert steady(again.record) == whole.record


EARLY = "Stopped by SIGUSR1 before training; nothing to save yet\nContinue with the same command and --resume\n"


def kill_at(patch: pytest.MonkeyPatch, target: Any, name: str, number: int) -> None:
    """Send this process a signal when something is called."""
    real = getattr(target, name)

    def killing(*arguments: Any, **keywords: Any) -> Any:
        os.kill(os.getpid(), number)
        return real(*arguments, **keywords)

    patch.setattr(target, name, killing)


@needs_signals
@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("svp_bench.config.compose", "compose"),
        ("svp_bench.train.parser", "build_parser"),
        ("svp_bench.data.module", "open_source"),
        ("svp_bench.train.run", "check_writable"),
    ],
)
def test_a_signal_before_training_ends_a_run_well(
    place: Path, monkeypatch: pytest.MonkeyPatch, target: str, name: str
) -> None:
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    with monkeypatch.context() as patch:
        owner = pydoc.locate(target)
        kill_at(patch, owner, name, signal.SIGUSR1)
        stopped = command(*small(*FLAGS))
    assert (stopped.status, stopped.err) == (0, "")
    assert stopped.out == EARLY
    assert not Path("runs").exists()
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers


@needs_signals
def test_a_signal_while_torch_is_imported_ends_a_run_well(place: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, *rest):\n"
        "        if name == 'torch': os.kill(os.getpid(), signal.SIGUSR1)\n"
        "sys.meta_path.insert(0, Finder)\n"
        "from svp_bench.cli.main import entry_point\n"
        "entry_point()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *small(*FLAGS)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, EARLY, "")


@needs_signals
def test_a_signal_behind_the_end_changes_nothing() -> None:
    code = (
        "import atexit, os, signal\n"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
        "from svp_bench.cli.main import entry_point\n"
        "entry_point()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, "--version"], capture_output=True, text=True, check=False)
    assert done.returncode == 0


@needs_signals
def test_a_signal_does_not_cut_the_record(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, cli, "write_record", signal.SIGTERM)
        outcome = run(*small(*FLAGS))
    assert outcome.record["status"] == "complete"
    assert "Stopped" not in outcome.out


@needs_signals
def test_a_signal_during_the_test_leaves_the_run_to_be_tested(
    place: Path, monkeypatch: pytest.MonkeyPatch, whole: Whole
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, AdaptationModule, "test_step", signal.SIGTERM)
        stopped = command(*small(*FLAGS))
    assert stopped.status == 0
    assert "Stopped by SIGTERM" in stopped.out
    again = run(*small(*FLAGS, "--resume"))
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
    message = assert_error(command(*small("--data.drop_last", "true", *flags, "1", "--resume")), 2)
    assert "counts 2 batches for a step: continue with --trainer.accumulate_grad_batches 2, not 1" in message
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


def test_a_run_that_another_process_has_just_finished_is_left_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked at again once its lock is held: nobody reads the test list twice."""
    first = run(*small(*FLAGS))
    first.record_path.rename("record.json")

    @contextmanager
    def finished_meanwhile(folder: Path) -> Iterator[None]:
        Path("record.json").rename(first.record_path)
        yield

    monkeypatch.setattr(resume, "locked", finished_meanwhile)
    monkeypatch.setattr(VisionDataModule, "setup", lambda *_: pytest.fail("the lists were read"))
    again = command(*small(*FLAGS, "--resume"))
    assert again.status == 0
    assert f"Nothing to resume: {first.folder.name} is complete" in again.out


def test_two_resumes_at_once_make_one_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second comes before the first has made its folder, in another process."""
    code = (
        "import sys; sys.path[:0] = sys.argv[1:2]; from helpers import *; register_backbone(); "
        "outcome = command(*sys.argv[2:]); sys.stderr.write(outcome.err); sys.exit(outcome.status)"
    )
    second = [sys.executable, "-c", code, str(Path(__file__).parent), *small("--method", "linear", "--resume")]
    seen: list[Any] = []
    real = cli.FitRun.build

    def build(self: Any) -> Any:
        assert not [*Path("runs").rglob("config.yaml")]
        seen.append(subprocess.run(second, capture_output=True, text=True, timeout=120))
        return real(self)

    with monkeypatch.context() as patch:
        patch.setattr(cli.FitRun, "build", build)
        run(*small("--method", "linear", "--resume"))
    (done,) = seen
    assert done.returncode == 2, done.stderr
    assert "another process is running this setting and seed" in done.stderr
    assert len([*Path("results").rglob("*.json")]) == 1
    assert "is complete" in run(*small("--method", "linear", "--resume")).out  # the lock has ended


def test_only_the_first_of_a_runs_processes_holds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """srun starts them alike; the others find the same run, and must not stumble over the lock of their own."""
    folder = tmp_path / "svp-20260101T000000Z-seed0-aa-1"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed_everything: 0\n")
    monkeypatch.setattr(resume, "locked", lambda folder: pytest.fail("held") if rank else nullcontext())
    for rank in (0, 1):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        with ExitStack() as holding:
            found = lock_run(holding, tmp_path, lambda _: find_run(tmp_path, tmp_path, 0, lambda _: True), {})
        assert found is not None
        assert found.folder == folder
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    monkeypatch.setenv("NODE_RANK", "1")
    assert not is_first_process()


def test_other_data_are_refused(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        at_step(patch, 8, fail)
        with pytest.raises(RuntimeError):
            command(*small(*FLAGS))
    lists = sorted(Path("data").rglob("train800val200.txt")) or sorted(Path("data").rglob("*train800val200*"))
    lines = lists[0].read_text().splitlines()
    lists[0].write_text("\n".join(lines[::-1]) + "\n")
    assert "the run began with other splits of vtab/cifar" in assert_error(command(*small(*FLAGS, "--resume")), 2)


@pytest.mark.slow
def test_one_run_is_trained_by_one_process(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from svp_bench.core.errors import UsageError\n"
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


# --- checkpoints that are damaged ------------------------------------------------------------------------------------


class Unfinished(NamedTuple):
    """A run that was stopped, and what its checkpoint is checked against."""

    folder: Path
    checkpoint: Path
    checked: tuple[Checkpoint, Any, Any, Any]


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unfinished]:
    folder = tmp_path_factory.mktemp("unfinished")
    with pytest.MonkeyPatch.context() as patch:
        settle(folder, patch)
        with pytest.MonkeyPatch.context() as inner:
            at_step(inner, 8, fail)
            with pytest.raises(RuntimeError):
                command(*small(*FLAGS))
        checked: list[Any] = []

        def keep(*arguments: Any) -> None:
            checked.append(copy.deepcopy(arguments[0]))
            checked.extend(arguments[1:])
            raise SvpBenchError("enough")

        (checkpoint,) = Path("runs").rglob("last.ckpt")
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(cli, "check_resumable", keep)
            assert "enough" in assert_error(command(*small(*FLAGS, "--resume")), 1)
        yield Unfinished(folder, checkpoint, tuple(checked))


def damaged(saved: Checkpoint, place: list[Any], value: Any) -> Checkpoint:
    """Return a copy with another value at a place; `MISSING` takes it out."""
    content = copy.deepcopy(saved.content)
    node: Any = content
    for key in place[:-1]:
        node = node[key]
    if value is MISSING:
        del node[place[-1]]
    else:
        node[place[-1]] = value
    return replace(saved, content=content)


MISSING = object()
MOMENTS = ["optimizer_states", 0, "state"]


@pytest.mark.parametrize(
    ("place", "value", "words"),
    [
        (["optimizer_states"], [], r"optimizer_states is \[\], expected a list of 1"),
        (["optimizer_states"], MISSING, "optimizer_states is missing, expected a list of 1"),
        (["optimizer_states"], [3], r"optimizer_states\[0\] is 3, expected a mapping"),
        (["optimizer_states", 0, "param_groups"], [], r"param_groups is \[\], expected all \d+ trained parameters"),
        (["optimizer_states", 0, "param_groups"], 3, r"param_groups is 3, expected all \d+ trained parameters"),
        (["optimizer_states", 0, "param_groups", 0, "params"], None, "expected all"),
        (MOMENTS, {}, r"optimizer_states\.state is \{\}, expected the moments of each trained parameter"),
        (MOMENTS, MISSING, r"optimizer_states\.state is missing, expected a mapping"),
        ([*MOMENTS, 0], MISSING, "expected the moments of each trained parameter"),
        ([*MOMENTS, 1, "exp_avg"], torch.zeros(9, 9, 9), "expected the moments of each trained parameter"),
        (["lr_schedulers"], [], r"lr_schedulers is \[\], expected a list of 1"),
        (["lr_schedulers", 0, "last_epoch"], "x", r"lr_schedulers\.last_epoch is 'x', expected a whole number"),
        ([*MOMENTS, 1, "exp_avg_sq"], torch.tensor(torch.nan), "expected the moments"),
        (["loops"], MISSING, "loops is missing, expected a mapping"),
        (["loops", "fit_loop"], MISSING, r"loops\.fit_loop is missing"),
        (["loops", "fit_loop", "epoch_progress"], {}, r"loops\.fit_loop\.epoch_progress\.total is missing"),
        (["loops", "fit_loop", "epoch_progress", "current", "ready"], 1.5, "current.ready is 1.5, expected a whole"),
        (["callbacks"], {}, r"callbacks\.\w+ is missing, expected a mapping"),
        (["callbacks"], 3, "callbacks is 3, expected a mapping"),
        (
            ["callbacks", "PreemptionHandler", "batches"],
            "x",
            r"callbacks\.PreemptionHandler\.batches is 'x', expected a whole number",
        ),
        (["callbacks", "ThroughputMonitor"], {}, r"callbacks\.ThroughputMonitor\.\w+ is missing"),
    ],
)
def test_a_gutted_checkpoint_names_what_is_missing(
    unfinished: Unfinished, place: list[Any], value: Any, words: str
) -> None:
    saved, *rest = unfinished.checked
    check_resumable(saved, *rest)
    with pytest.raises(CheckpointError, match=words) as caught:
        check_resumable(damaged(saved, place, value), *rest)
    text = str(caught.value)
    assert text.startswith(f"{saved.path}: damaged, or not written by svp-bench: ")
    assert text.endswith("; delete it, and the run begins anew; or leave --resume out")
    assert "\n" not in text


@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_no_damage_goes_unnoticed_or_makes_a_traceback(unfinished: Unfinished, data: st.DataObject) -> None:
    """Whatever is taken out of what Lightning restores, it is named."""
    saved, *rest = unfinished.checked
    place: list[Any] = []
    node: Any = {key: saved.content[key] for key in ("optimizer_states", "lr_schedulers", "loops", "callbacks")}
    while isinstance(node, (dict, list)) and node and (not place or data.draw(st.booleans())):
        place.append(data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else [*range(len(node))])))
        node = node[place[-1]]
    broken = damaged(saved, place, data.draw(st.sampled_from([MISSING, None, 3, "x", [], {}, [3], {"a": 1}])))
    text = ""
    try:
        check_resumable(broken, *rest)
    except CheckpointError as error:
        text = str(error)
    assert "\n" not in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"svp_bench": 3}, "svp_bench is 3, expected"),
        ({"svp_bench": {}}, "'task' is missing"),
        ({"svp_bench.image_size": "big"}, "'image_size' must be a list, not 'big'"),
        ({"svp_bench.image_size": [32]}, "'image_size' must be a list of length 2"),
        ({"svp_bench.transform": 3}, "'transform' must be a mapping"),
        ({"svp_bench.transform.resize": "x"}, "'transform.resize' must be one of squash, centre_crop, not 'x'"),
        ({"svp_bench.transform.depth": [65, None]}, "'transform.depth[0]' must be"),
        ({"svp_bench.transform.crop_ratio": 2}, "'transform.crop_ratio' must be"),
        ({"svp_bench.num_classes": True}, "'num_classes' must be int, not True"),
        ({"svp_bench.num_classes": 7}, "expected 7 names"),
        ({"svp_bench.method_args": [1]}, "'method_args' must be a mapping of keys, not [1]"),
        ({"svp_bench.method_args": {"hidden_dim": "x"}}, "{'hidden_dim': 'x'}, expected settings of svp ("),
        ({"svp_bench.method_args": {"width": 1}}, "{'width': 1}, expected settings of svp (unknown argument"),
        ({"svp_bench.stage": "test"}, "'stage' must be one of final, select, not 'test'"),
        ({"svp_bench.init_seed": -1}, "'init_seed' must be int >= 0, not -1"),
        ({"svp_bench.ema_decay": 2.0}, "'ema_decay' must be float < 1.0, not 2.0"),
        ({"svp_bench.ema_decay": 0.5}, "ema is missing, expected tensors by name"),
        ({"state_dict": 5}, "state_dict is 5, expected tensors by name"),
        ({"state_dict": {"a": 5}}, "state_dict is {'a': 5}, expected tensors by name"),
        ({"state_dict": {}}, "the checkpoint does not hold exactly the trained part"),
        ({"global_step": "x"}, "global_step is 'x', expected a whole number of 0 or above"),
        ({"epoch": -1}, "epoch is -1, expected a whole number of 0 or above"),
    ],
)
def test_a_checkpoint_of_other_content_is_one_line(
    unfinished: Unfinished, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    content = copy.deepcopy(unfinished.checked[0].content)
    for key, value in changes.items():
        *folders, last = key.split(".")
        node = content
        for folder in folders:
            node = node[folder]
        node[last] = value
    torch.save(content, tmp_path / "odd.ckpt")
    image = str(next((unfinished.folder / "data").rglob("*.jpg")))
    assert words in assert_error(command("predict", "--ckpt", str(tmp_path / "odd.ckpt"), "--images", image), 1)


@pytest.mark.parametrize("content", [[1, 2], 3, "x", {}, {"state_dict": {}}])
def test_what_is_no_checkpoint_of_ours_is_one_line(unfinished: Unfinished, tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "odd.ckpt")
    image = str(next((unfinished.folder / "data").rglob("*.jpg")))
    message = assert_error(command("predict", "--ckpt", str(tmp_path / "odd.ckpt"), "--images", image), 1)
    assert f"{tmp_path / 'odd.ckpt'}: not a checkpoint of svp-bench; weights of a backbone alone go to" in message


def test_a_gutted_or_truncated_checkpoint_stops_a_run_that_goes_on(
    unfinished: Unfinished, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(unfinished.folder)
    whole = unfinished.checkpoint.read_bytes()
    saved = unfinished.checked[0].content
    try:
        for content, words in (
            ({**saved, "optimizer_states": []}, "optimizer_states is [], expected a list of 1"),
            ({**saved, "lr_schedulers": [3]}, "lr_schedulers[0] is 3, expected a mapping"),
            ({**saved, "global_step": "x"}, "global_step is 'x', expected a whole number"),
            ({"state_dict": {}}, "not a checkpoint of svp-bench"),
            ([1], "not a checkpoint of svp-bench"),
            (None, "truncated or not a checkpoint"),
        ):
            if content is None:
                unfinished.checkpoint.write_bytes(whole[: len(whole) // 2])
            else:
                torch.save(content, unfinished.checkpoint)
            message = assert_error(command(*small(*FLAGS, "--resume")), 1)
            assert words in message
            assert message.endswith("; delete it, and the run begins anew; or leave --resume out")
    finally:
        unfinished.checkpoint.write_bytes(whole)


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
    (path.parent / ".last.ckpt.1.tmp").write_bytes(b"half")
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
    same_second = tmp_path / "svp-20260102T000000Z-seed0-aa-0"  # its name sorts first, but it began later
    same_second.mkdir()
    (same_second / "config.yaml").write_text("seed_everything: 0\nkey: 1\n")
    os.utime(same_second / "config.yaml", ns=(2**62, 2**62))
    later = find_run(tmp_path, tmp_path, 0, lambda config: config["key"] == 1)
    assert later is not None
    assert later.folder == same_second
    assert find_run(tmp_path, tmp_path, 0, lambda config: False) is None
    assert find_run(tmp_path, tmp_path, 1, lambda config: True) is None


def last_saved() -> int:
    """When the newest checkpoint was written, 0 if there is none."""
    return max((path.stat().st_mtime_ns for path in Path("runs").rglob("last.ckpt")), default=0)


def killed_somewhere(argv: list[str], seconds: float, *, after_progress: bool) -> bool:
    """Start a run as a process of its own and kill it some time after its start, or after it has saved something.

    Returns:
        Whether it had ended by itself.
    """
    saved = last_saved()
    process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while after_progress and process.poll() is None and last_saved() == saved:
        time.sleep(0.01)
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
        "import helpers, sys; helpers.register_backbone(); "
        "from svp_bench.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    folder = str(Path(__file__).parent)
    os.environ["PYTHONPATH"] = os.pathsep.join([folder, os.environ.get("PYTHONPATH", "")])
    flags = ("--model.method.dropout", "0.5", "--trainer.max_epochs", "20")
    whole = run(*small(*flags))
    argv = [sys.executable, "-c", code, *small(*flags, "--seed_everything", "0", "--resume")]
    Path("runs").rename("whole")
    Path("results").rename("whole_results")
    moments = 0
    # whatever the machine's pace: each second time it gets somewhere, the other times it may be killed at its start
    while not killed_somewhere(argv, 0.37 * (moments % 11), after_progress=moments % 2 == 0):
        moments += 1
        assert moments < 130, "it never gets anywhere"
    (record,) = Path("results/records/vtab/cifar").glob("*.json")
    (checkpoint,) = Path("runs/vtab/cifar").glob("*/checkpoints/last.ckpt")
    ours = torch.load(checkpoint, weights_only=True)["state_dict"]
    theirs = torch.load(next(Path("whole/vtab/cifar").glob("*/checkpoints/last.ckpt")), weights_only=True)["state_dict"]
    assert moments >= 1
    assert same(ours, theirs)
    found = read_json(next(Path("whole_results/records/vtab/cifar").glob("*.json")))
    assert steady(read_json(record)) == steady(found)
    assert whole.record_path.name != record.name
