"""`RayPool` has workers on a Ray cluster, or on a Ray of this machine's own: nodes, whole GPUs, and shares of a GPU.

Each worker is a Ray actor that holds its share of a node and owns one worker process, the same as in `LocalPool`. The
process trains, not the actor: Ray runs the methods of such an actor outside of the main thread, where no signal handler
can be set, and a run could then not save when it is asked to stop. A worker that dies, alone or with its node, is
replaced, and the scheduler runs its job again. Ray stores, retries and orders nothing: a sweep may begin on one engine
and end on another.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import os
import queue
import socket
import time
import uuid
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from svp_bench import __version__
from svp_bench.core.errors import SvpBenchError, UnavailableError, UsageError, plural
from svp_bench.data.sources import cpu_count
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.local_pool import Done, Event, Pool, Worker, WorkerProcess, thread_variables

_LOST = 600.0  # seconds that a sweep waits while no worker is up
_TRIES = 3  # at starting a worker that dies before it is ready
_CALL = 10.0  # seconds that `news` waits for a message
_CARRIED = ("CUBLAS_WORKSPACE_CONFIG", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "PYTHONPATH")


class Shares(NamedTuple):
    """The number of workers of a cluster, and the CPU cores and GPUs (a fraction, one or none) of each."""

    workers: int
    cpus: float
    gpus: float


def share_out(
    nodes: Sequence[Mapping[str, float]], workers: int | None, threads: int | None, gpu_fraction: float | None
) -> Shares:
    """Divide the nodes of a cluster among workers.

    Args:
        nodes: Resources of each node, "CPU" and "GPU".
        workers: Their number; those that do not fit wait for further nodes. By default one for each GPU (several with
            `gpu_fraction`); without GPUs one for each node, or as many as have `threads`.
        threads: CPU cores of each; by default they are divided.
        gpu_fraction: Share of a GPU of each.

    Raises:
        UsageError: If not a single worker fits.
    """
    sizes = [(node.get("CPU", 0.0), int(node.get("GPU", 0.0))) for node in nodes]
    largest = max((cores for cores, _ in sizes), default=0.0)
    if any(cards for _, cards in sizes):
        gpus = round(gpu_fraction or 1.0, 4)  # Ray counts in ten-thousandths
        each = math.floor(1 / gpus + 1e-9)
        places = [(cores, cards * each) for cores, cards in sizes if cards]
        cpus = float(threads or min(cores // place or cores / place for cores, place in places))
    elif gpu_fraction is not None:
        raise UsageError(f"--gpu_fraction {gpu_fraction:g}: the Ray cluster has no GPU; leave it out")
    else:
        gpus = 0.0
        places = [(cores, int(cores)) for cores, _ in sizes if cores >= 1]
        cpus = float(threads or min((cores // 1 for cores, _ in places), default=1))
        if workers and not threads:  # the most cores with which so many fit
            fits = (n for n in range(int(largest), 0, -1) if sum(cores // n for cores, _ in places) >= workers)
            cpus = float(next(fits, 1))
    fitting = sum(min(place, math.floor(cores / cpus + 1e-9)) if cpus else place for cores, place in places)
    if fitting < 1:
        raise UsageError(
            f"no node of the Ray cluster has {cpus:g} CPU cores{' and a GPU' if gpus else ''} for a worker "
            f"(the largest has {largest:g} cores); use a smaller --threads"
        )
    return Shares(workers or fitting, cpus, gpus)


class _Actor:
    """Owns a worker process on a node. Its methods run in several threads; `news` occupies one.

    Args:
        marks: Files that each node must see.
        version: Of the sweep's svp-bench.
        folder: Working directory of the sweep.
        options: Further arguments of `WorkerProcess`.
    """

    def __init__(self, marks: Sequence[Path], version: str, folder: Path, options: Mapping[str, Any]) -> None:
        self._marks, self._version, self._folder, self._options = marks, version, folder, options
        self._messages: queue.Queue[Mapping[str, Any]] = queue.Queue()

    def start(self) -> str | None:
        """Start the worker process; if this node cannot work for the sweep, return the reason instead."""
        if self._version != __version__:
            return f"has svp-bench {__version__}, and the sweep {self._version}"
        if not self._folder.is_dir():
            return f"has no folder {self._folder}, where the sweep was started"
        for mark in self._marks:
            until = time.monotonic() + 2  # a network file system may take a moment
            while not mark.is_file():
                if time.monotonic() > until:
                    return f"does not see the files that the sweep writes to {mark.parent}"
                time.sleep(0.1)
        self._process = WorkerProcess(self._messages.put, folder=self._folder, **self._options)
        return None

    def submit(self, request: Mapping[str, Any]) -> None:
        """Send the worker process a job."""
        self._process.submit(request)

    def news(self, seconds: float) -> list[Mapping[str, Any]]:
        """Return the messages of the worker process, waiting for the first at most some seconds."""
        messages = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._messages.get(timeout=seconds))
            while True:
                messages.append(self._messages.get_nowait())
        return messages

    def stop(self) -> None:
        """Ask the worker process to save and end."""
        self._process.stop()

    def close(self) -> None:
        """End the worker process at once."""
        self._process.close(busy=True)


@dataclass
class _RayWorker(Worker):
    actor: Any = None
    call: Any = None  # the open call of `start` or `news`
    up: bool = False
    tries: int = 1  # at getting ready


class RayPool(Pool):
    """Workers on Ray.

    `slots` is the number of workers that are up: it grows when nodes join and shrinks when they leave.

    Args:
        workers, threads, gpu_fraction: See `share_out`.
        address: Of a running cluster: "auto", "host:port" or "ray://host:port". None takes the variable RAY_ADDRESS,
            else starts Ray on this machine, for this machine only, and ends it with the pool.
        logs: Folder for the output of the jobs.
        shared: Folders that all nodes must share; `logs` is always one of them.

    Raises:
        UnavailableError: If Ray is not installed.
        UsageError: If the cluster has no capacity for a worker.
        SvpBenchError: If there is no cluster, or a node cannot work for the sweep.
    """

    def __init__(
        self,
        *,
        workers: int | None,
        threads: int | None,
        gpu_fraction: float | None,
        address: str | None,
        logs: Path,
        shared: Sequence[Path] = (),
    ) -> None:
        address = address or os.environ.get("RAY_ADDRESS") or None
        self._ray = ray = _connect(address, cores=max(cpu_count(), (workers or 1) * (threads or 1)))
        self._logs = logs
        self._workers: list[_RayWorker] = []
        self._marks: list[Path] = []
        self._runs = itertools.count(1)
        self._stopping = False
        self._unfit = ""  # why the last worker was given up
        self._worked = False  # a job has ended
        self._last_up = time.monotonic()
        self.slots = 0
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            shares = share_out(nodes, workers, threads, gpu_fraction)
            self.what = _describe(shares, nodes, address)
            for folder in dict.fromkeys([logs, *shared]):
                self._marks.append(_mark(folder.absolute()))
            carried = {key: os.environ[key] for key in os.environ if key in _CARRIED or key.startswith("SVP_BENCH_")}
            variables = carried | thread_variables(max(1, int(shares.cpus)))
            options = {"num_cpus": shares.cpus, "num_gpus": shares.gpus, "max_restarts": 0, "max_concurrency": 4}
            actor: Any = ray.remote(**options)(_Actor)

            def create(number: int) -> Any:
                process = {"log": logs / f"worker-{number}.log", "environment": variables}
                return actor.remote(self._marks, __version__, Path.cwd(), process)

            self._create = create
            self._workers = [self._start(number) for number in range(shares.workers)]
        except BaseException:
            self.close()
            raise

    def _start(self, number: int, tries: int = 1) -> _RayWorker:
        actor = self._create(number)
        return _RayWorker(number, actor=actor, call=actor.start.remote(), tries=tries)

    def submit(self, job: Job, *, retry: bool) -> None:
        """Send a job to a free worker."""
        worker = next(worker for worker in self._workers if worker.up and worker.job is None)
        worker.actor.submit.remote(worker.begin(job, next(self._runs), self._logs, retry=retry))

    def wait(self, seconds: float) -> list[Event]:
        """Return new events; a worker that dies, or whose node does, ends its job.

        Raises:
            SvpBenchError: If a node cannot work for the sweep, at its start; or no worker has been up for ten minutes.
        """
        ray, events, over = self._ray, list[Event](), []
        calls = {worker.call: worker for worker in self._workers if worker.call is not None}
        if calls:
            over, _ = ray.wait(list(calls), num_returns=len(calls), timeout=seconds)
        else:
            time.sleep(seconds)
        for call in over:
            worker = calls[call]
            try:
                answer = ray.get(call)
            except (ray.exceptions.RayError, ConnectionError) as error:
                events += self._replace(worker, "its node has died" if "node has died" in str(error) else str(error))
                continue
            if worker.up:
                events += self._heard(worker, answer)
            elif answer is None:
                worker.up, worker.call = True, worker.actor.news.remote(_CALL)
            else:  # its place stays empty: another actor would come to the same node
                worker.call = None
                self._unfit = (
                    f"a node of the Ray cluster {answer}; all nodes need the same svp-bench, and one shared folder for "
                    "--results_root and --runs_root"
                )
        self.slots = sum(worker.up for worker in self._workers)
        self._worked |= any(isinstance(event, Done) for event in events)
        if self.slots or self._stopping:
            self._last_up = time.monotonic()
        if self._unfit and not (self.slots and self._worked):
            raise SvpBenchError(self._unfit)
        if time.monotonic() - self._last_up > _LOST:
            free = ray.available_resources()
            raise SvpBenchError(
                f"the Ray cluster has had no worker for {_LOST / 60:.0f} minutes (free there now: "
                f"{free.get('CPU', 0):g} CPU cores, {free.get('GPU', 0):g} GPUs); completed runs are stored, and the "
                "same command continues"
            )
        return events

    def _heard(self, worker: _RayWorker, messages: Sequence[Mapping[str, Any]]) -> list[Event]:
        events = list[Event]()
        worker.call = worker.actor.news.remote(_CALL)
        for message in messages:
            events += worker.events(message)
            if message["event"] == "ready":
                worker.tries = 0
            elif message["event"] == "ended":
                self._replace(worker, f"its process ended {message['how']}")
        return events

    def _replace(self, worker: _RayWorker, reason: str) -> list[Event]:
        """Ask for another worker in the place of one that is gone; return the end of its job, if it had one."""
        with contextlib.suppress(Exception):  # it may be gone, or only out of reach
            self._ray.kill(worker.actor)
        worker.call, worker.up = None, False
        last = reason.strip().splitlines()[-1].strip()
        if worker.tries >= _TRIES:
            self._unfit = f"no worker starts on the Ray cluster: {last} (if it has no tokens: RAY_AUTH_MODE=disabled)"
        elif not self._stopping:
            self._workers[worker.number] = self._start(worker.number, worker.tries + 1)
        return worker.lost(f"its Ray worker is gone: {last}")

    def stop(self) -> None:
        """Ask the workers to save and end."""
        self._stopping = True
        for worker in self._workers:
            if worker.up:
                worker.actor.stop.remote()

    def close(self) -> None:
        """End the workers, busy ones at once, and Ray if it was started here."""
        with contextlib.suppress(Exception):  # an idle process ends once its actor is gone, a busy one would save first
            if busy := [worker.actor.close.remote() for worker in self._workers if worker.job is not None]:
                self._ray.wait(busy, num_returns=len(busy), timeout=_CALL)
        for worker in self._workers:
            with contextlib.suppress(Exception):
                self._ray.kill(worker.actor)
        for mark in self._marks:
            mark.unlink(missing_ok=True)
        self._ray.shutdown()


def _mark(folder: Path) -> Path:
    """Create a file in a folder, by which nodes see that they share it."""
    mark = folder / f".ray-{uuid.uuid4().hex}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    except OSError as error:
        raise SvpBenchError(f"cannot write to {folder} ({error.strerror})") from None
    return mark


def _describe(shares: Shares, nodes: Sequence[Mapping[str, float]], address: str | None) -> str:
    cores, cards = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    where = "Ray on this machine" if address is None else f"the Ray cluster {address}"
    share = f" with {shares.gpus:g} GPU each" if shares.gpus else ""
    has = f"{plural(len(nodes), 'node')}, {plural(int(cores), 'CPU core')}, {plural(int(cards), 'GPU')}"
    return f"{plural(shares.workers, 'worker')}{share} on {where} ({has})"


def _connect(address: str | None, cores: int) -> Any:
    """Return the module `ray`, connected to a cluster, or to a Ray that it starts on this machine."""
    # Ray reads these when it is imported. The third is not for those systems only: "0" binds to 127.0.0.1 alone.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS_SKIP_REGEX", ".")  # else each death is a paragraph on standard output
    if address is None:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UnavailableError("--engine ray needs Ray, which is not installed: pip install 'svp-bench[ray]'") from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "configure_logging": False}
    if address is None:
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 100_000_000}
    try:
        host, _, port = (address or "").removeprefix("ray://").rpartition(":")
        if host and port.isdigit():  # Ray itself would try for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        reason = next(filter(None, map(str.strip, str(error).splitlines())), type(error).__name__)
        if address is None:
            raise SvpBenchError(f"cannot start Ray on this machine: {reason}") from None
        if address == "auto" and isinstance(error, ConnectionError):
            reason = "none runs on this machine (ray start --head starts one)"
        raise SvpBenchError(
            f"cannot reach the Ray cluster {address}: {reason}; --ray_address is auto, host:port or ray://host:port "
            "(a cluster that asks for a token: RAY_AUTH_MODE=token), and without it Ray is started on this machine"
        ) from None
    return ray
