"""Sweeps on Ray: how a cluster is shared out, the same records as a local sweep, and workers and nodes that go.

Everything that Ray does stands in processes of its own: its signal handlers, threads and variables outlive `shutdown`.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, call

import pytest
from helpers import assert_error, command, wait_for

from svp_bench import __version__
from svp_bench.core.errors import UsageError
from svp_bench.records.store import read_records
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.ray_pool import RayPool, _Actor, _RayWorker, share_out

FLAGS = [
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "none", "--data.image_size", "32"),
    *("--trainer.max_epochs", "1", "--model.scan_backend", "reference", "--trainer.accelerator", "cpu"),
]
SWEEP = ["sweep", "--tasks", "demo/digits-5shot", "--methods", "linear", "--seeds", "0,1,2", "--no_report", *FLAGS]


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
    assert shares == expected


@pytest.mark.parametrize(
    ("nodes", "threads", "fraction", "expected"),
    [
        ([{"CPU": 8}], None, 0.5, "the Ray cluster has no GPU"),
        ([{"CPU": 2}], 4, None, "the largest has 2 cores"),
        ([], None, None, "no node of the Ray cluster"),
    ],
)
def test_what_does_not_fit_is_one_line(
    nodes: list[dict[str, float]], threads: int | None, fraction: float | None, expected: str
) -> None:
    with pytest.raises(UsageError, match=expected):
        share_out(nodes, None, threads, fraction)


def test_without_ray_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'svp-bench[ray]'" in assert_error(command(*SWEEP, "--engine", "ray"), 1)


# ---- a node


def reason_of_a_node(folder: Path, *marks: Path, version: str = __version__) -> str | None:
    """Why an actor does not start a worker, asked without Ray; None if it does."""
    actor = _Actor(marks, version, folder, {"log": folder / "log", "environment": {}})
    reason = actor.start()
    if reason is None:
        actor.stop()
        actor._process.wait(60)
    return reason


def test_a_node_must_see_the_folders_of_the_sweep(tmp_path: Path) -> None:
    (tmp_path / "mark").touch()
    assert reason_of_a_node(tmp_path, tmp_path / "mark") is None
    reason = reason_of_a_node(tmp_path, tmp_path / "mark", tmp_path / "elsewhere" / "mark")
    assert reason == f"does not see the files that the sweep writes to {tmp_path / 'elsewhere'}"
    assert reason_of_a_node(tmp_path / "gone") == f"has no folder {tmp_path / 'gone'}, where the sweep was started"
    assert reason_of_a_node(tmp_path, version="0.0") == f"has svp-bench {__version__}, and the sweep 0.0"


def test_an_actor_that_is_closed_ends_its_process_at_once(tmp_path: Path) -> None:
    actor = _Actor((), __version__, tmp_path, {"log": tmp_path / "log", "environment": {}})
    assert actor.start() is None
    actor.close()
    actor._process.wait(60)
    assert actor.news(60)[-1] == {"event": "ended", "how": "by signal SIGKILL"}


def test_a_pool_that_is_closed_ends_busy_workers_at_once() -> None:
    """Killing the actor alone would let a busy process save first."""
    ray, pool = MagicMock(), RayPool.__new__(RayPool)
    idle, busy = (_RayWorker(number, actor=MagicMock()) for number in range(2))
    busy.job = Job("vtab/dtd", "linear", 0, "final")
    pool._ray, pool._workers, pool._marks = ray, [idle, busy], []
    pool.close()
    assert not idle.actor.close.remote.called
    ended = busy.actor.close.remote.return_value
    assert ray.mock_calls[0].args == ([ended],)  # waits for the end, then kills the actors
    assert ray.mock_calls[1:] == [call.kill(idle.actor), call.kill(busy.actor), call.shutdown()]


# ---- sweeps


def scores(root: Path) -> dict[tuple[str, int], Any]:
    records, problems = read_records(root)
    assert not problems
    return {(r.method, r.seed): (r.setting_digest, r.correct, r.metrics) for r in records}


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    ray = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_MODE": "disabled"}
    ray["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # a cluster on the loopback device only
    return {**os.environ, **ray, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}


def start(folder: Path, *extra: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "svp_bench", *SWEEP, *extra],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    )


def until_runs_began(folder: Path, count: int) -> None:
    wait_for(lambda: len(list(folder.glob("runs/demo/*/*/config.yaml"))) >= count)


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


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the sweep, run by the local engine."""
    folder = tmp_path_factory.mktemp("local")
    out, _ = (sweep := start(folder)).communicate(timeout=600)
    assert sweep.returncode == 0, out
    return folder


def visible_gpus(process: int) -> str:
    """CUDA_VISIBLE_DEVICES of a process."""
    variables = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
    return next(text.partition(b"=")[2].decode() for text in variables if text.startswith(b"CUDA_VISIBLE_DEVICES="))


@pytest.mark.slow
def test_a_sweep_on_ray_survives_a_killed_worker_and_equals_a_local_one(tmp_path: Path, local: Path) -> None:
    pytest.importorskip("ray")
    sweep = start(tmp_path, "--engine", "ray", "--workers", "2", "--threads", "1")
    until_runs_began(tmp_path, 1)
    victims = list(workers_in(tmp_path))
    assert victims
    os.kill(victims[0], signal.SIGKILL)
    out, _ = sweep.communicate(timeout=600)
    assert sweep.returncode == 0, out
    assert "on Ray on this machine" in out
    assert "3 runs complete (3 new), 0 failed" in out
    assert "(raylet)" not in out
    assert scores(tmp_path / "results") == scores(local / "results")
    wait_for(lambda: not list(workers_in(tmp_path)))
    assert not list(tmp_path.rglob(".ray-*"))


@pytest.mark.slow
def test_of_200_queued_runs_none_is_lost_with_a_worker(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    seeds = ("--methods", "linear,bias", "--seeds", ",".join(map(str, range(100))), "--trainer.max_epochs", "1")
    sweep = start(tmp_path, *seeds, "--engine", "ray", "--workers", "2", "--threads", "1")
    until_runs_began(tmp_path, 50)
    os.kill(next(workers_in(tmp_path)), signal.SIGKILL)
    out, _ = sweep.communicate(timeout=1200)
    assert sweep.returncode == 0, out[-2000:]
    assert "200 runs complete (200 new), 0 failed" in out
    assert len(scores(tmp_path / "results")) == 200


CLUSTER = """
import sys
from ray.cluster_utils import Cluster
node = {"num_cpus": 1, "num_gpus": 1, "object_store_memory": 10**8}
cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
second = cluster.add_node(**node)
print(cluster.address, flush=True)
sys.stdin.readline()
cluster.remove_node(second, allow_graceful=False)
sys.stdin.readline()
cluster.shutdown()
"""


@pytest.mark.slow
def test_a_node_that_goes_and_a_sweep_that_is_stopped(tmp_path: Path, local: Path) -> None:
    pytest.importorskip("ray")
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert cluster.stdin is not None
    assert cluster.stdout is not None
    try:
        options = ("--engine", "ray", "--ray_address", cluster.stdout.readline().strip())
        sweep = start(tmp_path, *options)
        until_runs_began(tmp_path, 2)
        assert {visible_gpus(worker) for worker in workers_in(tmp_path)} == {"0"}  # each node's only one
        print(file=cluster.stdin, flush=True)
        assert sweep.stdout is not None
        for line in sweep.stdout:
            if "its Ray worker is gone" in line:
                break
        sweep.send_signal(signal.SIGTERM)
        out, _ = sweep.communicate(timeout=600)
        assert sweep.returncode == 0, out
        assert "Stopped; " in out
        sweep = start(tmp_path, *options)
        out, _ = sweep.communicate(timeout=600)
    finally:
        cluster.communicate("\n", timeout=60)
    assert sweep.returncode == 0, out
    assert "with 1 GPU each on the Ray cluster" in out  # 1 worker, or 2 as long as Ray believes in the lost node
    assert "3 runs complete" in out
    assert scores(tmp_path / "results") == scores(local / "results")


@pytest.mark.slow
def test_a_cluster_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    sweep = start(tmp_path, "--engine", "ray", "--ray_address", "127.0.0.1:1")
    out, _ = sweep.communicate(timeout=600)
    assert sweep.returncode in (1, 2), out
    assert "cannot reach the Ray cluster 127.0.0.1:1" in out
    assert "Traceback" not in out
