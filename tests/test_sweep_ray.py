"""Sweeps on Ray: how a cluster is shared out, the same records as a local sweep, and workers and nodes that go."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers import command, complaint

from svp_bench.errors import UsageError
from svp_bench.results.files import read_records
from svp_bench.sweep.ray_pool import share_out

FLAGS = [
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "none", "--data.image_size", "32"),
    *("--trainer.max_epochs", "1", "--model.scan_backend", "reference", "--trainer.accelerator", "cpu"),
]
SWEEP = ["sweep", "--tasks", "demo/digits-5shot", "--methods", "linear,offset", "--seeds", "0,1", "--no_report", *FLAGS]


# ---- how a cluster is shared out


@pytest.mark.parametrize(
    ("nodes", "workers", "threads", "fraction", "expected"),
    [
        ([{"CPU": 8}], None, None, None, (1, 8.0, 0.0)),  # one worker a node without GPUs
        ([{"CPU": 8}], None, 2, None, (4, 2.0, 0.0)),
        ([{"CPU": 8}], 4, None, None, (4, 2.0, 0.0)),
        ([{"CPU": 8}, {"CPU": 4}], None, None, None, (3, 4.0, 0.0)),
        ([{"CPU": 16, "GPU": 2}], None, None, None, (2, 8.0, 1.0)),
        ([{"CPU": 16, "GPU": 2}], None, None, 0.25, (8, 2.0, 0.25)),
        ([{"CPU": 16, "GPU": 2}], None, None, 0.3, (6, 2.0, 0.3)),
        ([{"CPU": 16, "GPU": 1}, {"CPU": 64}], None, None, None, (1, 16.0, 1.0)),
    ],
)
def test_a_cluster_is_shared_out(
    nodes: list[dict[str, float]],
    workers: int | None,
    threads: int | None,
    fraction: float | None,
    expected: tuple[int, float, float],
) -> None:
    shares = share_out(nodes, workers, threads, fraction)
    assert (shares.workers, shares.cpus, shares.gpus) == expected
    assert shares.room >= 1


@pytest.mark.parametrize(
    ("nodes", "threads", "fraction", "said"),
    [
        ([{"CPU": 8}], None, 0.5, "the Ray cluster has no GPU"),
        ([{"CPU": 8, "GPU": 1}], None, 0.001, "--gpu_fraction is 0.01 to 1"),
        ([{"CPU": 2}], 4, None, "the largest has 2 cores"),
        ([], None, None, "no node of the Ray cluster"),
    ],
)
def test_what_does_not_fit_is_one_line(
    nodes: list[dict[str, float]], threads: int | None, fraction: float | None, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        share_out(nodes, None, threads, fraction)


def test_without_ray_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'svp-bench[ray]'" in complaint(command(*SWEEP, "--engine", "ray"), 1)


# ---- sweeps


def scores(root: Path) -> dict[tuple[str, int], Any]:
    records, problems = read_records(root)
    assert not problems
    return {(r.method, r.seed): (r.setting_digest, r.correct, r.metrics) for r in records}


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-m", "svp_bench", *SWEEP, *extra],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def workers_in(folder: Path) -> Iterator[int]:
    """The worker processes whose working directory is `folder`."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            line = (entry / "cmdline").read_bytes()
            if b"svp_bench.sweep.worker" in line and Path(os.readlink(entry / "cwd")) == folder:
                yield int(entry.name)
        except OSError:
            continue


@pytest.mark.slow
def test_a_sweep_on_ray_survives_a_killed_worker_and_equals_a_local_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    local, remote = tmp_path / "local", tmp_path / "remote"
    for folder in (local, remote):
        folder.mkdir()
    monkeypatch.chdir(local)
    assert command(*SWEEP).status == 0
    sweep = start(remote, "--engine", "ray", "--workers", "2", "--threads", "1")
    until = time.monotonic() + 120
    while not list(remote.glob("runs/demo/*/*/config.yaml")) and time.monotonic() < until:
        time.sleep(0.1)
    victims = list(workers_in(remote))
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    out, _ = sweep.communicate(timeout=200)
    assert sweep.returncode == 0, out
    assert "on Ray on this machine" in out
    assert "4 runs complete (4 new), 0 failed" in out
    assert scores(remote / "results") == scores(local / "results")
    assert not list(workers_in(remote))
    assert not list(remote.rglob(".ray-*"))


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sweep = start(tmp_path, "--engine", "ray", "--ray_address", "127.0.0.1:1")
    out, _ = sweep.communicate(timeout=120)
    assert sweep.returncode in (1, 2), out
    assert "cannot reach the Ray cluster 127.0.0.1:1" in out
    assert "Traceback" not in out
