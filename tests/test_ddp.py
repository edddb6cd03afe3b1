"""Two processes train as one does: the same weights within rounding, each test image once."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import assert_error, command, read_json, run, settle, wait_for
from helpers import small as line

from svp_bench.core.errors import UsageError
from svp_bench.train.module import AdaptationModule
from svp_bench.train.processes import agreed_name

# 17 images in batches of 6: the last of an epoch has 5, which two processes share unevenly; so are the 9 of test.
FLAGS = {"data__batch_size": "6", "trainer__max_epochs": "2", "trainer__accelerator": "cpu"}
TWO = ("--trainer.strategy", "ddp", "--trainer.devices", "2")
TOLERANCE = 1e-5  # relative to a tensor's largest entry; gradients are summed in another order
SCRIPT = """
import sys
sys.path[:0] = [TESTS]
import helpers
helpers.register_backbone()
from svp_bench.cli.main import entry_point
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
    out, err = process.communicate(timeout=600)
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
@pytest.mark.parametrize("method", ["lp_ft", "sdlora"])
def test_with_stages(place: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """What rests has a gradient in each process, which none of them uses."""
    dropout = () if method == "lp_ft" else ("--model.method.dropout", "0")
    flags = ("--method", method, *dropout, "--trainer.max_epochs", "4")
    two(*flags)
    check_equal(place, alone(monkeypatch, *flags))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["dam_vp", "spt", "e2vpt"])
def test_with_training_images_and_gradients_for_the_method(
    place: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Each process clusters the same images, and e2vpt prunes by the gradients of both."""
    flags = ("--method", method, "--trainer.max_epochs", "4")
    two(*flags)
    check_equal(place, alone(monkeypatch, *flags))


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_both_processes_stop_at_the_same_step_and_go_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = ("--trainer.max_epochs", "60")
    process = start(*line(*TWO, *flags, **FLAGS))
    wait_for(lambda: list(place.glob("runs/vtab/cifar/*/checkpoints/last.ckpt")))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert "Stopped by SIGTERM" in out
    assert not list(place.glob("results/records/vtab/cifar/*.json"))
    two(*flags, "--resume")
    check_equal(place, alone(monkeypatch, *flags))


# --- one name for all processes --------------------------------------------------------------------------------------

ASKING = """
import sys
from contextlib import ExitStack
from svp_bench.core.errors import UsageError
from svp_bench.train.processes import agreed_name

def decide():
    print("decided", end=" ")
    if "fail" in sys.argv: raise UsageError("no run")
    return f"run-of-{sys.argv[1]}"

try:
    with ExitStack() as exit_stack: print(agreed_name(exit_stack, decide, resume=True))
except UsageError as error: print(error)
"""


def launched(*extra: str, **environment: str) -> list[str]:
    """Ask for the name in two processes, as torchrun launches them; return what each said."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    both = []
    for rank in ("0", "1"):
        own = {**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank, **environment}
        argv = [sys.executable, "-c", ASKING, rank, *extra]
        both.append(subprocess.Popen(argv, env=own, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=600) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    return [out.strip() for out, _ in said]


@pytest.mark.slow
def test_the_first_of_torchruns_processes_decides_for_all() -> None:
    assert launched() == ["decided run-of-0", "run-of-0"]


@pytest.mark.slow
def test_where_the_first_fails_none_waits_for_it() -> None:
    assert launched("fail") == ["decided no run", "the first process of this run has stopped; see its message"]


def test_what_lightning_launches_inherits_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "SVP_BENCH_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with ExitStack() as exit_stack:
        assert agreed_name(exit_stack, lambda: "svp-1", resume=True) == "svp-1"
        monkeypatch.setenv("LOCAL_RANK", "1")
        assert agreed_name(exit_stack, lambda: "svp-2", resume=True) == "svp-1"
    assert "SVP_BENCH_RUN_ID" not in os.environ
    with ExitStack() as exit_stack:  # launched by somebody else
        assert agreed_name(exit_stack, lambda: "svp-2", resume=False) == "svp-2"
        with pytest.raises(UsageError, match=r"--resume: LOCAL_RANK is set, but neither .+; use torchrun"):
            agreed_name(exit_stack, lambda: "svp-2", resume=True)


def by_torchrun(*extra: str) -> subprocess.CompletedProcess[str]:
    runner = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "program.py"]
    argv = [sys.executable, *runner, *line(*TWO, *extra, **FLAGS)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_torchrun_goes_on_with_the_run_that_was_stopped(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not with one new run for each process."""
    with monkeypatch.context() as patch:
        real, seen = AdaptationModule.training_step, [0]

        def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == 5:  # in the second of two epochs
                raise KeyboardInterrupt
            return real(self, batch, batch_idx)

        patch.setattr(AdaptationModule, "training_step", training_step)
        assert command(*line(**FLAGS)).status == 130
    (run_folder,) = place.glob("runs/vtab/cifar/*")
    done = by_torchrun("--resume")
    assert done.returncode == 0, done.stderr
    assert list(place.glob("runs/vtab/cifar/*")) == [run_folder]
    assert done.stdout.count("Record (complete)") == 1
    check_equal(place, alone(monkeypatch))
    assert "Nothing to resume" in by_torchrun("--resume").stdout


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill -9")
def test_a_process_that_is_killed_ends_the_others_in_one_line(place: Path) -> None:
    process = start(*line(*TWO, "--trainer.max_epochs", "200", **{**FLAGS, "trainer__max_epochs": None}))
    wait_for(lambda: list(place.glob("runs/vtab/cifar/*/checkpoints/last.ckpt")))
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    second = next(int(child) for child in children if b"program.py" in Path(f"/proc/{child}/cmdline").read_bytes())
    os.kill(second, signal.SIGKILL)
    _, err = process.communicate(timeout=600)
    assert "Traceback" not in err
    if process.returncode != -signal.SIGKILL:  # Lightning kills the rest of them if it is the first to notice
        assert "svp-bench: error: another process of this run is gone (" in err
        assert process.returncode == 1


def test_a_batch_that_cannot_be_shared_is_refused(place: Path) -> None:
    message = assert_error(command(*line(*TWO, data__batch_size="5")), 2)
    assert "cannot be divided by 2 processes" in message


def test_accumulated_gradients_equal_the_big_batch(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one process; the last batch of an epoch, of 5 images, is cut unevenly."""
    run(*line("--trainer.accumulate_grad_batches", "3", **FLAGS))
    other = alone(monkeypatch)
    ours, theirs = trained(place), trained(other)
    for name, value in ours.items():
        scale = theirs[name].abs().max().clamp(min=1e-3)
        assert float((value - theirs[name]).abs().max() / scale) <= TOLERANCE, name
    assert record(place)["correct"] == record(other)["correct"]
