"""Pools run the jobs of a sweep; `LocalPool` has worker processes on this machine."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench.core.errors import plural, printable
from svp_bench.data.sources import cpu_count
from svp_bench.sweep.jobs import Job, Outcome


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


class Pool(contextlib.AbstractContextManager["Pool"]):
    """Runs jobs.

    Attributes:
        slots: Jobs that run at once.
        what: Workers and hardware, in words.
    """

    slots: int
    what: str

    @abstractmethod
    def submit(self, job: Job, *, retry: bool) -> None:
        """Start a job; there is a free slot."""

    @abstractmethod
    def wait(self, seconds: float) -> list[Event]:
        """Return new events, waiting for them at most `seconds`."""

    @abstractmethod
    def stop(self) -> None:
        """Ask all running jobs to save and end; their `Done` events follow."""

    @abstractmethod
    def close(self) -> None:
        """End all workers, at once."""

    def __exit__(self, *_: object) -> None:
        self.close()


class WorkerProcess:
    """A process of `svp_bench.sweep.worker`; messages in both directions are one JSON object a line.

    Its main thread trains, so that signals reach the run; it has a session of its own, so that ctrl-C does not.

    Args:
        hear: Gets each of its messages, in another thread, and at the very end {"event": "ended", "how": …}.
        log: File for its output outside of jobs.
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
        environment: Mapping[str, str],
        folder: Path | None = None,
    ) -> None:
        self._log = (folder or Path()) / log
        self._log.parent.mkdir(parents=True, exist_ok=True)
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "svp_bench.sweep.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **environment},
                cwd=folder,
                text=True,
                start_new_session=True,
            )
        self._leaving = False
        threading.Thread(target=self._read, args=(hear,), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether it takes a job: it runs, and was not asked to stop."""
        return not self._leaving and self._process.poll() is None

    def submit(self, request: Mapping[str, Any]) -> None:
        """Send it a job (`Worker.begin`)."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError, ValueError):  # it has died: "ended" follows
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def stop(self) -> None:
        """Ask it to save and end."""
        with contextlib.suppress(OSError):
            self._process.send_signal(signal.SIGTERM)

    def close(self, *, busy: bool) -> None:
        """Make it end; at once if it is busy."""
        if busy:
            self._process.kill()
            return
        with contextlib.suppress(OSError, ValueError):
            assert self._process.stdin is not None
            self._process.stdin.close()

    def wait(self, seconds: float) -> None:
        """Wait for its end, and kill it after some seconds."""
        try:
            self._process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self, hear: Callable[[Mapping[str, Any]], None]) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # half a line of a process that was killed
            self._leaving |= message["event"] == "done" and message["outcome"]["status"] == "stopped"
            hear(message)

        code = self._process.wait()
        how = f"with status {code}"
        if code < 0:
            names = {one.value: one.name for one in signal.Signals}
            how = f"by signal {names.get(-code, -code)}"
        elif code > 0 and (lines := self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()):
            how = f"{how}: {printable(lines[-1])}"  # such as a failing import
        hear({"event": "ended", "how": how})


@dataclass
class Worker:
    """A worker of a pool, and its job.

    Attributes:
        number: Its place in the pool.
        job: The current job, or None.
        run: Number of that job, which tells its messages from those of others.
        log: File for the job's output.
        began: `time.perf_counter` at the job's start.
    """

    number: int
    job: Job | None = None
    run: int = 0
    log: Path = Path()
    began: float = 0.0

    def begin(self, job: Job, run: int, logs: Path, *, retry: bool) -> dict[str, Any]:
        """Take a job; return the request for the worker process."""
        name = re.sub(r"[^\w.=-]+", "-", job.name.replace("/", "-"))[:120]
        self.job, self.run, self.log, self.began = job, run, logs / f"{name}-{run}.log", time.perf_counter()
        return {"id": run, "job": job.to_json(), "retry": retry, "log": str(self.log)}

    def events(self, message: Mapping[str, Any]) -> list[Event]:
        """Return the event, if any, that a message of the worker process reports."""
        if message["event"] == "ended":
            return self.lost(f"its process ended {message['how']}")
        if self.job is None or message.get("id") != self.run:
            return []
        if message["event"] == "progress":
            return [Progress(self.job, message["epoch"], message["epochs"])]
        return self._done(Outcome(**message["outcome"]))

    def lost(self, reason: str) -> list[Event]:
        """Return the end of the job, if any, of a worker that has died."""
        log = str(self.log) if self.log.is_file() else None
        return self._done(Outcome("died", reason=reason, seconds=time.perf_counter() - self.began, log=log))

    def _done(self, outcome: Outcome) -> list[Event]:
        job, self.job = self.job, None
        return [Done(job, outcome)] if job is not None else []


@dataclass
class _LocalWorker(Worker):
    process: WorkerProcess | None = None


class LocalPool(Pool):
    """Worker processes of this machine, each started with its first job, and replaced if it dies.

    Args:
        workers: Their number; by default one for each GPU, else one.
        threads: CPU threads of each; by default the cores are divided (a single worker takes PyTorch's default).
        logs: Folder for the output of the jobs.
    """

    def __init__(self, workers: int | None, threads: int | None, logs: Path) -> None:
        self._gpus = visible_gpus()
        self.slots = workers if workers is not None else max(1, len(self._gpus))
        self._threads = threads or (max(1, cpu_count() // self.slots) if self.slots > 1 else None)
        self._logs = logs
        self._heard: queue.Queue[tuple[_LocalWorker, Mapping[str, Any]]] = queue.Queue()
        self._workers = [_LocalWorker(number) for number in range(self.slots)]
        self._runs = itertools.count(1)
        kind = plural(len(self._gpus), "GPU") if self._gpus else "CPU"
        self.what = f"{plural(self.slots, 'worker')} on this machine ({kind})"

    def submit(self, job: Job, *, retry: bool) -> None:
        """Send a job to a free worker, starting or replacing it if necessary."""
        worker = next(worker for worker in self._workers if worker.job is None)
        if worker.process is None or not worker.process.alive:
            worker = self._workers[worker.number] = self._start(worker.number)
        assert worker.process is not None
        worker.process.submit(worker.begin(job, next(self._runs), self._logs, retry=retry))

    def _start(self, number: int) -> _LocalWorker:
        worker = _LocalWorker(number)
        environment = thread_variables(self._threads)
        if self._gpus and self.slots > 1:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[number % len(self._gpus)]
        log = self._logs / f"worker-{number}.log"
        worker.process = WorkerProcess(lambda text: self._heard.put((worker, text)), log, environment=environment)
        return worker

    def wait(self, seconds: float) -> list[Event]:
        """Return new events; a worker that dies ends its job."""
        until = time.monotonic() + seconds
        while True:
            try:
                worker, message = self._heard.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                return []
            if events := worker.events(message):
                return events

    def stop(self) -> None:
        """Ask the workers to save and end."""
        for worker in self._workers:
            if worker.process is not None:
                worker.process.stop()

    def close(self) -> None:
        """End the workers; busy ones at once."""
        for worker in self._workers:
            if worker.process is not None:
                worker.process.close(busy=worker.job is not None)
        for worker in self._workers:
            if worker.process is not None:
                worker.process.wait(20)


def thread_variables(threads: int | None) -> dict[str, str]:
    """Return the environment variables that limit the CPU threads of a process; {} for PyTorch's default."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads)) if threads else {}


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
