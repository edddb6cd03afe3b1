"""A warm worker as a process of its own: jobs come as lines of JSON on standard input, events leave on standard output.

What the runs print goes to a log file. When the other end closes, the process saves what it is training and ends.
"""

from __future__ import annotations

import dataclasses
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from svp_bench.core.terminal import readable_output

__all__ = ["main"]

_PATIENCE = 120.0  # seconds that a run gets to save, once nobody listens any more


class _Channel:
    """Lines of JSON to the parent process; standard output itself is free for the output of libraries."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        self._lock = threading.Lock()

    def send(self, message: Mapping[str, Any]) -> None:
        try:
            with self._lock:
                self._out.write(json.dumps(message) + "\n")
                self._out.flush()
        except (BrokenPipeError, ValueError):
            pass  # nobody listens; the reader of standard input ends the process


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def main() -> None:
    """Serve jobs until standard input ends."""
    readable_output()
    channel = _Channel()
    # A descriptor of our own: a thread that waits on sys.stdin holds its lock, and forked data workers close sys.stdin.
    orders = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    first = json.loads(orders.readline())  # {"log": file for what is printed outside of jobs}
    _redirect(Path(first["log"]))
    inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy = threading.Event()

    def listen() -> None:
        for line in orders:
            inbox.put(json.loads(line))
        inbox.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # save and stop
            threading.Event().wait(_PATIENCE)
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    from svp_bench.data.cache import cache_between_runs
    from svp_bench.sweep.jobs import Job
    from svp_bench.sweep.runner import Runner  # torch, Lightning: some seconds, once

    cache_between_runs()
    runner = Runner()
    channel.send({"event": "ready"})
    while (request := inbox.get()) is not None:
        job = Job.from_json(request["job"])
        log = Path(request["log"])
        _redirect(log)
        busy.set()
        report = _reporter(channel, request["id"])
        outcome = runner.run(job, report, request["retry"])
        busy.clear()
        sys.stdout.flush()
        done = {"event": "done", "id": request["id"], "outcome": dataclasses.asdict(outcome)}
        done["outcome"]["log"] = None if outcome.found else str(log)
        channel.send(done)
        if outcome.status == "stopped":
            break


def _reporter(channel: _Channel, number: int) -> Any:
    def report(progress: Mapping[str, Any]) -> None:
        channel.send({"event": "progress", "id": number, **progress})

    return report


if __name__ == "__main__":
    main()
