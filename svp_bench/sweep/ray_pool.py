"""Workers on a Ray cluster, or on a Ray of this machine's own: nodes, whole GPUs, and shares of a GPU.

Each slot is a Ray actor that holds its share of a node and owns one warm worker process, the same one that the local
engine uses (`pools.WorkerProcess`). The process, not the actor, trains: Ray runs the methods of such an actor in
threads, where no signal handler can be set, and a run could then not save when it is asked to stop. It finds the GPU
that Ray gave the actor in CUDA_VISIBLE_DEVICES. Jobs go only to actors that are up; an actor that dies, alone or with
its node, is asked for again, and its job resumes elsewhere from the last checkpoint, once the claim on it is free.

What Ray does not do here: it stores nothing, retries nothing and orders nothing. What is due follows from the records,
as with every other engine, so that a sweep may begin on one engine and end on another.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import queue
import signal
import socket
import threading
import time
import uuid
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench import __version__
from svp_bench.core.errors import SvpBenchError, UnavailableError, UsageError, plural
from svp_bench.data.sources import cpu_count
from svp_bench.sweep.jobs import Job
from svp_bench.sweep.local_pool import Done, Event, Pool, Work, WorkerProcess

__all__ = ["RayPool", "Shares", "share_out"]

_FIRST = 60.0  # seconds until the first worker must be up
_OTHERS = 5.0  # seconds more that the others get, to collect all errors at the start
_LOST = 600.0  # seconds that a sweep waits for a worker once it has lost all
_TRIES = 3  # at starting a worker that dies before it is up
_CALL = 10.0  # seconds that a question for news stays open
_CARRIED = ("CUBLAS_WORKSPACE_CONFIG", "HF_ENDPOINT", "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "PYTHONPATH")
# Switches that Ray reads when it is imported. The first is not for those systems only: "0" binds to 127.0.0.1 alone.
_LOOPBACK = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
_QUIET = {"RAY_DEDUP_LOGS_SKIP_REGEX": "."}  # else each death is a paragraph on standard output


# --------------------------------------------------------------------------------------------------------- the division


@dataclass(frozen=True)
class Shares:
    """How a cluster is divided.

    Attributes:
        workers: Workers that are asked for.
        capacity: Workers that fit on the current nodes.
        cpus: CPU cores of each.
        gpus: GPUs of each, a fraction, one or none.
    """

    workers: int
    capacity: int
    cpus: float
    gpus: float

    @property
    def threads(self) -> int:
        """CPU threads of each."""
        return max(1, int(self.cpus))


def share_out(
    nodes: Sequence[Mapping[str, float]], workers: int | None, threads: int | None, gpu_fraction: float | None
) -> Shares:
    """Divide the nodes of a cluster among workers.

    By default there is a worker for each GPU (with `gpu_fraction`, several), or one for each node if there are none,
    and each takes its part of the cores. `threads` alone, without GPUs, makes as many workers as the cores give.

    Args:
        nodes: Resources of each node, "CPU" and "GPU".
        workers: Their number, or None. More than the capacity wait for further nodes.
        threads: CPU cores of each, or None.
        gpu_fraction: Share of a GPU of each, or None.

    Raises:
        UsageError: If not a single worker fits.
    """
    if gpu_fraction is not None and not 0.01 <= gpu_fraction <= 1:
        raise UsageError(f"--gpu_fraction is 0.01 to 1, not {gpu_fraction:g}")
    cores = [node.get("CPU", 0.0) for node in nodes]
    cards = [int(node.get("GPU", 0.0)) for node in nodes]
    if gpu_fraction is not None and not any(cards):
        raise UsageError(f"--gpu_fraction {gpu_fraction:g}: the Ray cluster has no GPU; leave it out")
    if any(cards):
        gpus = round(gpu_fraction or 1.0, 4)  # Ray counts in ten-thousandths
        each = math.floor(1 / gpus + 1e-9)
        places = [(core, card * each) for core, card in zip(cores, cards, strict=True) if card]
        cpus = float(threads or min(core // place or core / place for core, place in places))
    else:
        gpus = 0.0
        places = [(core, int(core)) for core in cores if core >= 1]
        cpus = float(threads or _cores_of_each([core for core, _ in places], workers))
    capacity = sum(min(place, math.floor(core / cpus + 1e-9)) if cpus else place for core, place in places)
    if capacity < 1:
        most = max(cores, default=0.0)
        raise UsageError(
            f"no node of the Ray cluster has {cpus:g} CPU cores{' and a GPU' if gpus else ''} for a worker "
            f"(the largest has {most:g} cores); use a smaller --threads"
        )
    return Shares(workers if workers is not None else capacity, capacity, cpus, gpus)


def _cores_of_each(cores: Sequence[float], workers: int | None) -> int:
    """Return the most cores with which so many workers fit; all of the smallest node's if their number is open."""
    if not cores or workers is None:
        return int(min(cores, default=1.0))
    for count in range(int(max(cores)), 1, -1):
        if sum(core // count for core in cores) >= workers:
            return count
    return 1


# ------------------------------------------------------------------------------------------------------------ the actor


@dataclass(frozen=True)
class _Setup:
    """What an actor must know."""

    folder: str  # the coordinator's working directory
    logs: str
    threads: int
    environment: Mapping[str, str]
    marks: tuple[str, ...]  # files of the coordinator that each node must see


class _Actor:
    """Owns a worker process on a node. Its methods run in threads; `news` occupies one."""

    def __init__(self, number: int, setup: _Setup) -> None:
        self._number = number
        self._setup = setup
        self._messages: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._process: WorkerProcess | None = None
        self._starts = 0
        self._stopped = False
        self._lock = threading.Lock()  # orders come in their order, but in different threads

    def check(self) -> dict[str, Any]:
        """Return what keeps this node from working for the sweep, in words, or None."""
        problem = self._problem()
        return {"problem": problem, "version": __version__}

    def _problem(self) -> str | None:
        if not Path(self._setup.folder).is_dir():
            return f"has no folder {self._setup.folder}, where the sweep was started"
        for text in self._setup.marks:
            mark = Path(text)
            for _ in range(20):  # a network file system may take a moment
                if mark.is_file():
                    break
                time.sleep(0.1)
            else:
                return f"does not see the files that the sweep writes to {mark.parent}"
            try:
                own = mark.with_name(f"{mark.name}-{self._number}")
                own.touch()
                own.unlink()
            except OSError as error:
                return f"cannot write to {mark.parent} ({error.strerror})"
        return None

    def submit(self, number: int, job: Mapping[str, Any], retry: bool, log: str) -> None:
        """Give the worker a job; what goes wrong comes as a message too."""
        with self._lock:
            if self._stopped:
                self._messages.put({"event": "ended", "how": "before it began, being asked to stop"})
                return
            try:
                if self._process is None or not self._process.alive:
                    self._process = self._start()
                self._process.submit(number, job, retry=retry, log=Path(log))
            except OSError as error:
                self._messages.put({"event": "ended", "how": f"before it began: {error}"})

    def _start(self) -> WorkerProcess:
        self._starts += 1
        number = self._starts

        def hear(message: Mapping[str, Any]) -> None:
            if number == self._starts:  # the end of an older process is no end of what the newer one does
                self._messages.put(message)

        return WorkerProcess(
            hear,
            Path(self._setup.logs) / f"worker-{self._number}.log",
            threads=self._setup.threads,
            environment=self._setup.environment,
            folder=Path(self._setup.folder),
        )

    def news(self, seconds: float) -> list[Mapping[str, Any]]:
        """Return the messages of the worker, waiting for it at most some seconds."""
        messages = []
        with contextlib.suppress(queue.Empty):
            messages.append(self._messages.get(timeout=seconds))
            while True:
                messages.append(self._messages.get_nowait())
        return messages

    def stop(self) -> None:
        """Ask the worker to save and end."""
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.stop()

    def close(self, busy: bool) -> None:
        """End the worker: gently if it is idle."""
        if self._process is not None:
            self._process.close(busy=busy)
            self._process.wait(20)


# ------------------------------------------------------------------------------------------------------------- the pool


@dataclass
class _Slot:
    number: int
    actor: Any
    call: Any  # the question to it that is open
    tries: int = 1  # at coming up
    up: bool = False
    work: Work | None = None


class RayPool(Pool):
    """Workers on Ray.

    `slots` is the number of workers that are up: it grows when nodes join and shrinks when they leave.

    Args:
        workers: Their number, or None for what the cluster has (`share_out`).
        threads: CPU cores of each, or None.
        gpu_fraction: Share of a GPU that each takes, or None.
        address: Of a running cluster: "auto", "host:port" or "ray://host:port". None takes the variable RAY_ADDRESS,
            else starts Ray on this machine, for this machine only, and ends it with the pool.
        logs: Folder for what the jobs print.
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
        ray = self._ray = _import_ray(local=address is None)
        self._ours = not ray.is_initialized()
        self._logs = logs
        self._slots: list[_Slot] = []
        self._marks: list[Path] = []
        self._count = 0
        self._stopping = False
        self._unfit = ""  # why the last node was left out
        self._lost: float | None = None  # since when no worker is up
        self.slots = 0
        if self._ours:
            _connect(ray, address, cores=max(cpu_count(), (workers or 1) * (threads or 1)))
        try:
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            shares = share_out(nodes, workers, threads, gpu_fraction)
            self.what = _describe(shares, nodes, address if self._ours else "of this process")
            for folder in dict.fromkeys([logs, *shared]):
                self._mark(folder)
            self._make = _maker(ray, shares, self._setup(shares))
            self._slots = [self._ask_for(number) for number in range(shares.workers)]
            self._await_first()
        except BaseException:
            self.close()
            raise

    # --- the start ---------------------------------------------------------------------------------------------------

    def _mark(self, folder: Path) -> None:
        mark = folder.absolute() / f".ray-{uuid.uuid4().hex}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        except OSError as error:
            raise SvpBenchError(f"cannot write to {folder} ({error.strerror})") from None
        self._marks.append(mark)

    def _setup(self, shares: Shares) -> _Setup:
        carried = {name: os.environ[name] for name in os.environ if name in _CARRIED or name.startswith("SVP_BENCH_")}
        return _Setup(str(Path.cwd()), str(self._logs), shares.threads, carried, tuple(map(str, self._marks)))

    def _ask_for(self, number: int, tries: int = 1) -> _Slot:
        actor = self._make(number)
        return _Slot(number, actor, actor.check.remote(), tries)

    def _await_first(self) -> None:
        """Wait until a worker is up, and a little longer for the others; any error ends the sweep here."""
        began = time.monotonic()
        until = began + _FIRST
        while time.monotonic() < until and self.slots < len(self._slots):
            self._hear(0.25)
            if self._unfit:
                raise SvpBenchError(self._unfit)
            if self.slots and until > began + _FIRST / 2:
                until = min(until, time.monotonic() + _OTHERS)
        if not self.slots:
            free = self._ray.available_resources()
            raise SvpBenchError(
                f"no worker came up on the Ray cluster within {_FIRST:.0f} s; free there now: "
                f"{free.get('CPU', 0):g} CPU cores, {free.get('GPU', 0):g} GPUs"
            )

    # --- jobs --------------------------------------------------------------------------------------------------------

    def submit(self, job: Job, *, retry: bool) -> None:
        """Give a job to a free worker."""
        slot = next(slot for slot in self._slots if slot.up and slot.work is None)
        self._count += 1
        slot.work = Work.begin(self._count, job, self._logs)
        slot.actor.submit.remote(self._count, job.to_json(), retry, str(slot.work.log))

    def wait(self, seconds: float) -> list[Event]:
        """Return the messages of the workers; one that died, or whose node did, took its job with it.

        Raises:
            SvpBenchError: If no worker has been up for ten minutes.
        """
        events = self._hear(seconds)
        now = time.monotonic()
        self._lost = None if self.slots else self._lost or now
        if self._lost is not None and now - self._lost > _LOST and not self._stopping:
            raise SvpBenchError(
                f"the Ray cluster has had no worker for {_LOST / 60:.0f} minutes"
                + (f" ({self._unfit})" if self._unfit else "")
                + "; completed runs are stored, and the same command continues"
            )
        return events

    def _hear(self, seconds: float) -> list[Event]:
        ray = self._ray
        calls = {slot.call: slot for slot in self._slots if slot.call is not None}
        if not calls:
            time.sleep(seconds)
            return []
        over, _ = ray.wait(list(calls), num_returns=1, timeout=seconds)
        if over:
            over, _ = ray.wait(list(calls), num_returns=len(calls), timeout=0)
        events: list[Event] = []
        for call in over:
            slot = calls[call]
            try:
                answer = ray.get(call)
            except (ray.exceptions.RayError, ConnectionError) as error:
                events += self._died(slot, error)
                continue
            if not slot.up:
                self._checked(slot, answer)
                continue
            for message in answer:
                event = slot.work.event(message) if slot.work is not None else None
                if isinstance(event, Done):
                    slot.work = None
                if event is not None:
                    events.append(event)
            self._ask(slot)
        self.slots = sum(slot.up for slot in self._slots)
        return events

    def _ask(self, slot: _Slot) -> None:
        slot.call = slot.actor.news.remote(_CALL)

    def _checked(self, slot: _Slot, answer: Mapping[str, Any]) -> None:
        problem = answer["problem"]
        if answer["version"] != __version__:
            problem = f"has svp-bench {answer['version']}, and this machine {__version__}"
        if problem is None:
            slot.up = True
            self._ask(slot)
            return
        slot.call = None  # its place stays empty: another actor would come to the same node
        self._unfit = (
            f"a node of the Ray cluster {problem}; all nodes need the same svp-bench, and one shared folder for "
            "--results_root and --runs_root"
        )

    def _died(self, slot: _Slot, error: Exception) -> list[Event]:
        """Ask for another worker in the place of one that is gone."""
        with contextlib.suppress(Exception):  # if it is only out of reach
            self._ray.kill(slot.actor)
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        work, tries = slot.work, 1 if slot.up else slot.tries + 1
        slot.call, slot.up, slot.work = None, False, None
        if tries > _TRIES:
            self._unfit = f"a worker cannot start on the Ray cluster: {lines[-1]}"
            if "references" in str(error):  # the cluster could not call back
                self._unfit += " (a cluster that asks for no token: RAY_AUTH_MODE=disabled)"
        elif not self._stopping:
            self._slots[self._slots.index(slot)] = self._ask_for(slot.number, tries)
        return [work.died(f"its Ray worker is gone: {_how(self._ray, error)}")] if work is not None else []

    # --- the end -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Ask the workers to save and end."""
        self._stopping = True
        for slot in self._slots:
            if slot.up:
                slot.actor.stop.remote()

    def close(self) -> None:
        """End idle workers gently, others at once; end Ray if it was started here."""
        ray = self._ray
        with contextlib.suppress(Exception):  # it may be gone already
            calls = [slot.actor.close.remote(slot.work is not None) for slot in self._slots if slot.up]
            if calls:
                ray.wait(calls, num_returns=len(calls), timeout=25)
        for slot in self._slots:
            with contextlib.suppress(Exception):
                ray.kill(slot.actor)
        self._slots, self.slots = [], 0
        for mark in self._marks:
            mark.unlink(missing_ok=True)
        if self._ours:
            ray.shutdown()


def _how(ray: Any, error: Exception) -> str:
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it is out of reach"
    return "its node has died" if "node has died" in str(error) else "it has died"


def _describe(shares: Shares, nodes: Sequence[Mapping[str, float]], address: str | None) -> str:
    cores, cards = (sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU"))
    has = f"{cores:g} CPU core{'s' if cores != 1 else ''}"
    if cards:
        has = f"{cards:g} GPU{'s' if cards != 1 else ''}, {has}"
    where = "Ray on this machine" if address is None else f"the Ray cluster {address}"
    if len(nodes) > 1:
        has = f"{len(nodes)} nodes, {has}"
    waiting = f", capacity for {shares.capacity} now" if shares.workers > shares.capacity else ""
    share = f" with {shares.gpus:g} GPU each" if shares.gpus else ""
    return f"{plural(shares.workers, 'worker')}{share} on {where} ({has}{waiting})"


def _maker(ray: Any, shares: Shares, setup: _Setup) -> Any:
    """Return what makes an actor from its number."""
    # several threads: one waits for news. (Concurrency groups would be tidier; ray:// knows them not for single calls.)
    remote = ray.remote(num_cpus=shares.cpus, num_gpus=shares.gpus, max_restarts=0, max_concurrency=4)
    actor = remote(_Actor)
    return lambda number: actor.options(name=f"svp-bench-{os.getpid()}-{number}-{uuid.uuid4().hex[:6]}").remote(
        number, setup
    )


# -------------------------------------------------------------------------------------------------------------- Ray


def _import_ray(*, local: bool) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with _variables({**_QUIET, **(_LOOPBACK if local else {})}):
        try:
            import ray
            import ray.exceptions
        except ImportError:
            raise UnavailableError(
                "--engine ray needs Ray, which is not installed: pip install 'svp-bench[ray]'"
            ) from None
    return ray


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables that are not set, for a while."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            del os.environ[name]


def _connect(ray: Any, address: str | None, cores: int) -> None:
    logging.getLogger("ray").setLevel(logging.ERROR)
    options: dict[str, Any] = {"address": address or "local", "log_to_driver": False, "configure_logging": False}
    if address is None:
        options |= {"num_cpus": cores, "include_dashboard": False, "object_store_memory": 100_000_000}
    try:
        if address is not None:
            _knock(address)
        with _handlers(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if address is None:
            raise SvpBenchError(f"cannot start Ray on this machine: {reason}") from None
        if address == "auto" and isinstance(error, ConnectionError):
            reason = "none runs on this machine (ray start --head starts one)"
        raise SvpBenchError(
            f"cannot reach the Ray cluster {address}: {reason}; --ray_address is auto, host:port or ray://host:port "
            "(a cluster that asks for a token: RAY_AUTH_MODE=token), and without it Ray is started on this machine"
        ) from None


def _knock(address: str) -> None:
    """See whether somebody listens: Ray itself tries for minutes.

    Raises:
        OSError: If nobody does.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


@contextlib.contextmanager
def _handlers() -> Iterator[None]:
    """Keep our signal handlers: `ray.init` takes SIGTERM for itself, and a sweep would end instead of stopping."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
