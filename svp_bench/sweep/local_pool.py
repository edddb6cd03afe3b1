"""Pools: where the jobs of a sweep run. This one: warm worker processes of this machine."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svp_bench.core.errors import plural, printable
from svp_bench.data.sources import cpu_count
from svp_bench.sweep.jobs import Job, Outcome

__all__ = ["Done", "Event", "LocalPool", "Pool", "Progress", "Work", "WorkerProcess", "visible_gpus"]


@dataclass(frozen=True)
class Progress:
    """A job has finished an epoch."""

    job: Job
    epoch: int
    epochs: int


@dataclass(frozen=True)
class Done:
    """A job has ended."""

    job: Job
    outcome: Outcome


Event = Progress | Done


class Pool(ABC):
    """Runs jobs.

    Attributes:
        slots: Jobs that run at once.
        what: What they run on, in words.
    """

    slots: int
    what: str

    @abstractmethod
    def submit(self, job: Job, *, retry: bool) -> None:
        """Start a job; there is a free slot."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Event]:
        """Return what has happened, waiting for it at most `seconds`."""

    @abstractmethod
    def stop(self) -> None:
        """Ask all running jobs to save and end; their `Done` events follow."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, at once."""

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerProcess:
    """A process of `svp_bench.sweep.worker` and the talk with it: one JSON object a line, both ways.

    Its main thread trains, so that signals reach the run; it has a session of its own, so that ctrl-C does not.

    Args:
        hear: Is given each of its messages, from a thread of its own, and at the very end {"event": "ended", "how": …}.
        log: File for what it prints outside of jobs.
        threads: CPU threads, or None for PyTorch's default.
        environment: Variables laid over those of this process.
        folder: Its working directory, by default ours.

    Raises:
        OSError: If it cannot be started.
    """

    def __init__(
        self,
        hear: Callable[[Mapping[str, Any]], None],
        log: Path,
        *,
        threads: int | None = None,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        variables = {**os.environ, **(environment or {})}
        if threads is not None:
            for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
                variables[name] = str(threads)
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  # until `_watch`
        self._process = subprocess.Popen(
            [sys.executable, "-m", "svp_bench.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,  # until its log is open
            env=variables,
            cwd=folder,
            text=True,
            start_new_session=True,  # ctrl-C of the terminal is ours: `stop` ends the workers
        )
        self._leaving = False
        reader = threading.Thread(target=self._read, args=(hear,), daemon=True)
        reader.start()
        threading.Thread(target=self._watch, args=(hear, reader), daemon=True).start()
        self._send({"log": str(log)})

    @property
    def alive(self) -> bool:
        """Whether it takes a job: it runs, and was not asked to stop."""
        return not self._leaving and self._process.poll() is None

    def submit(self, number: int, job: Mapping[str, Any], *, retry: bool, log: Path) -> None:
        """Give it a job, as plain values; `number` comes back in its messages. It takes one after the other."""
        self._send({"id": number, "job": job, "retry": retry, "log": str(log)})

    def stop(self) -> None:
        """Ask it to save and end."""
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGTERM)

    def close(self, *, busy: bool) -> None:
        """Make it end: after what it does, or at once if it is busy."""
        if busy:
            self._process.kill()
            return
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait for its end, and make it end after some seconds."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: Mapping[str, Any]) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has died: its end is on the way as a message
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()

    def _read(self, hear: Callable[[Mapping[str, Any]], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # half a line of a process that was killed
            self._leaving |= message["event"] == "done" and message["outcome"]["status"] == "stopped"
            hear(message)

    def _watch(self, hear: Callable[[Mapping[str, Any]], None], reader: threading.Thread) -> None:
        code = self._process.wait()
        reader.join(1.0)  # its last words; data workers that it left behind may hold the pipe open for longer
        how = f"by signal {_signal_name(-code)}" if code < 0 else f"with status {code}"
        with self._stderr:
            self._stderr.seek(0)
            lines = self._stderr.read().strip().splitlines()
        if code > 0 and lines:  # an error before its log was open, such as a failing import
            how = f"{how}: {printable(lines[-1])}"
        hear({"event": "ended", "how": how})


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return str(number)


@dataclass
class Work:
    """A job at a worker.

    Attributes:
        number: Tells its messages from those of other jobs of the worker.
        job: The job.
        log: What the run prints.
        began: `time.perf_counter` at its start.
    """

    number: int
    job: Job
    log: Path
    began: float = field(default_factory=time.perf_counter)

    @classmethod
    def begin(cls, number: int, job: Job, logs: Path) -> Work:
        """Return a job's work, with a log file named like it."""
        name = re.sub(r"[^\w.=-]+", "-", job.name.replace("/", "-"))[:120]
        return cls(number, job, logs / f"{name}-{number}.log")

    def event(self, message: Mapping[str, Any]) -> Event | None:
        """Return the event that a message of its worker reports."""
        if message["event"] == "ended":
            return self.died(f"its process ended {message['how']}")
        if message.get("id") != self.number:
            return None
        if message["event"] == "progress":
            return Progress(self.job, message["epoch"], message["epochs"])
        if message["event"] == "done":
            return Done(self.job, Outcome(**message["outcome"]))
        return None

    def died(self, reason: str) -> Done:
        """Return the end of a job whose worker is gone."""
        log = str(self.log) if self.log.is_file() else None
        return Done(self.job, Outcome("died", reason=reason, seconds=time.perf_counter() - self.began, log=log))


@dataclass
class _Worker:
    number: int
    process: WorkerProcess | None = None
    work: Work | None = None


class LocalPool(Pool):
    """Worker processes of this machine, each warm from its first job on, each replaced if it dies.

    Args:
        workers: Their number; by default one for each GPU, else one.
        threads: CPU threads of each; by default the cores are shared out (a single worker takes PyTorch's default).
        logs: Folder for what the jobs print.
    """

    def __init__(self, workers: int | None, threads: int | None, logs: Path) -> None:
        gpus = visible_gpus()
        self.slots = workers if workers is not None else max(1, len(gpus))
        self._gpus = gpus
        self._threads = threads
        if threads is None and self.slots > 1:
            self._threads = max(1, cpu_count() // self.slots)
        self._logs = logs
        self._heard: queue.Queue[tuple[_Worker, Mapping[str, Any]]] = queue.Queue()
        self._workers = [_Worker(number) for number in range(self.slots)]
        self._count = 0
        kind = plural(len(gpus), "GPU") if gpus else "CPU"
        self.what = f"{plural(self.slots, 'worker')} on this machine ({kind})"

    def _start(self, number: int) -> _Worker:
        worker = _Worker(number)
        environment = {}
        if self._gpus and self.slots > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        worker.process = WorkerProcess(
            lambda message: self._heard.put((worker, message)),
            self._logs / f"worker-{number}.log",
            threads=self._threads,
            environment=environment,
        )
        return worker

    def submit(self, job: Job, *, retry: bool) -> None:
        """Give a job to a free worker, starting or replacing it if need be."""
        worker = next(worker for worker in self._workers if worker.work is None)
        if worker.process is None or not worker.process.alive:
            worker = self._workers[worker.number] = self._start(worker.number)
        assert worker.process is not None
        self._count += 1
        worker.work = Work.begin(self._count, job, self._logs)
        worker.process.submit(self._count, job.to_json(), retry=retry, log=worker.work.log)

    def wait(self, seconds: float) -> list[Event]:
        """Return the messages of the workers; a worker that died took its job with it."""
        events: list[Event] = []
        until = time.monotonic() + seconds
        while not events:
            try:
                worker, message = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                break
            event = worker.work.event(message) if worker.work is not None else None
            if isinstance(event, Done):
                worker.work = None
            if event is not None:
                events.append(event)
        return events

    def stop(self) -> None:
        """Ask the workers to save and end."""
        for worker in self._workers:
            if worker.process is not None:
                worker.process.stop()

    def close(self) -> None:
        """End idle workers gently, others at once."""
        processes = [(worker, worker.process) for worker in self._workers if worker.process is not None]
        for worker, process in processes:
            process.close(busy=worker.work is not None)
        for _, process in processes:
            process.wait(20)
        self._workers = [_Worker(number) for number in range(self.slots)]


def visible_gpus() -> list[str]:
    """Return the visible CUDA devices, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [part for part in visible.split(",") if part.strip() not in ("", "-1")]
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip().isdigit()] if not done.returncode else []
