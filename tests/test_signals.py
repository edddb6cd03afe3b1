"""Signals to a whole process group with loader workers, and loaders without shared memory."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import TASK, assert_error, command, draw, settle, small, wait_for
from torch.utils.data import DataLoader

from svp_bench.data.augment import AugmentConfig
from svp_bench.data.module import VisionDataModule

pytestmark = pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="needs POSIX signals")
RUN = (
    *("fit", "--config", "configs/demo/digits.yaml", "--method", "linear", "--trainer.max_epochs", "30"),
    *("--data.num_workers", "2", "--data.augment.flip", "0.5", "--trainer.enable_progress_bar", "false"),
)


def loaders(root: Path, workers: int) -> VisionDataModule:
    data = VisionDataModule(
        TASK, root=str(root), batch_size=4, image_size=32, num_workers=workers, augment=AugmentConfig(flip=0.5)
    )
    data.setup("fit")
    return data


def children() -> list[int]:
    return [child.pid for child in multiprocessing.active_children() if child.pid is not None]


def test_workers_outlive_signals_and_need_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path)
    expected = list(loaders(tmp_path, 0).train_dataloader())
    loader = loaders(tmp_path, 2).train_dataloader()
    batches = iter(loader)
    first = next(batches)
    workers = children()
    assert len(workers) == 2
    for number in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGTERM"):
        for worker in workers:  # from another process than the parent, as of a group
            code = f"import os; os.kill({worker}, {int(getattr(signal, number))})"
            subprocess.run([sys.executable, "-c", code], check=True)
    found = [first, *batches]
    for one, other in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert not any(part.is_shared() for part in one)
    assert children() == workers
    os.kill(workers[0], signal.SIGTERM)  # the parent's own ends it
    deadline = time.monotonic() + 20
    while workers[0] in children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert workers[0] not in children()
    del batches, loader


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EAGAIN])
def test_workers_that_cannot_start_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    settle(tmp_path, monkeypatch)

    def full(self: DataLoader[Any]) -> Any:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(DataLoader, "__iter__", full)
    line = assert_error(command(*small("--method", "linear", "--data.augment.flip", "0.5", data__num_workers="2")), 1)
    assert "--data.num_workers 0" in line
    assert os.strerror(number) in line


def started(folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "svp_bench", *RUN],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # ignored in background jobs
    )


def signalled(run: subprocess.Popen[str], name: str, times: int) -> str:
    for _ in range(times):
        try:
            os.killpg(run.pid, getattr(signal, name))
        except ProcessLookupError:
            break
        time.sleep(0.03)
    text = run.communicate(timeout=120)[0]
    with pytest.raises(ProcessLookupError):  # nobody is left
        os.killpg(run.pid, 0)
    return text


@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("SIGTERM", 5),
        pytest.param("SIGTERM", 1, marks=pytest.mark.slow),
        pytest.param("SIGUSR1", 2, marks=pytest.mark.slow),
        pytest.param("SIGINT", 3, marks=pytest.mark.slow),
    ],
)
def test_a_signal_to_the_group_saves(tmp_path: Path, name: str, times: int) -> None:
    run = started(tmp_path)
    while not [*tmp_path.rglob("last.ckpt")]:
        assert run.poll() is None, run.communicate()[0]
        time.sleep(0.02)
    text = signalled(run, name, times)
    assert "Traceback" not in text, text
    if name == "SIGINT":
        assert run.returncode == 130, text
        assert "Record (interrupted)" in text
    else:
        assert run.returncode == 0, text
        assert f"Stopped by {name} in epoch" in text
        assert "saved: runs" in text


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of a signal: before, while Python starts, the signal just ends it."""
    status = Path(f"/proc/{process}/status").read_text()
    return bool(int(status.partition("SigCgt:")[2].split()[0], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs /proc")
@pytest.mark.parametrize("delay", [0.0, 1.0, 2.0, 4.0])
def test_a_signal_to_the_group_before_training(tmp_path: Path, delay: float) -> None:
    run = started(tmp_path)
    wait_for(lambda: catches(run.pid, signal.SIGTERM))
    time.sleep(delay)
    text = signalled(run, "SIGTERM", 2)
    assert "Traceback" not in text, text
    assert run.returncode == 0, text
    assert "the same command and --resume" in text


KILLED = """
import os, signal, sys
import numpy as np, torch
from torch.utils.data import DataLoader
from svp_bench.data.loading import Batch, Loader, outlive_signals, to_arrays

class Large(torch.utils.data.Dataset):
    def __len__(self): return 64
    def __getitem__(self, i):
        numbers = torch.zeros(64, dtype=torch.int64)
        return Batch(torch.zeros(64, 3, 64, 64, dtype=torch.uint8), numbers, numbers)

loader = Loader(Large(), batch_size=None, num_workers=2, collate_fn=to_arrays, worker_init_fn=outlive_signals)
batches = iter(loader)
next(batches)
import multiprocessing
print(*(child.pid for child in multiprocessing.active_children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not hasattr(signal, "sigtimedwait"), reason="no such wait here")
def test_workers_end_with_a_killed_loader() -> None:
    killed = subprocess.run([sys.executable, "-c", KILLED], capture_output=True, text=True, timeout=120, check=False)
    workers = [int(number) for number in killed.stdout.split()]
    assert len(workers) == 2, killed.stderr
    wait_for(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 60)
