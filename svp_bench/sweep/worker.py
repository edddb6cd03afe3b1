"""Run jobs in a process of its own: requests are lines of JSON on standard input, events on standard output.

The output of the runs is written to a log file. When standard input ends, the process saves the current run and ends.
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
from functools import partial
from pathlib import Path
from typing import Any

from svp_bench.core.registry import importing_torch
from svp_bench.core.terminal import readable_output

_PATIENCE = 120.0  # seconds that a run gets to save, once the parent process is gone


class _Channel:
    """Lines of JSON to the parent process; standard output itself is free for the output of libraries."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)

    def send(self, content: Mapping[str, Any], **more: Any) -> None:
        try:
            self._out.write(json.dumps({**more, **content}) + "\n")
            self._out.flush()
        except (BrokenPipeError, ValueError):
            pass  # the parent process is gone; the reader of standard input ends this one


def _redirect(log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.close(handle)


def main() -> None:
    """Run jobs until standard input ends."""
    readable_output()
    channel = _Channel()
    # A descriptor of our own: a thread that waits on sys.stdin holds its lock, and forked data workers close sys.stdin.
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    inbox: queue.Queue[dict[str, Any] | None] = queue.Queue()
    busy = threading.Event()

    def listen() -> None:
        for line in requests:
            inbox.put(json.loads(line))
        inbox.put(None)
        if busy.is_set():
            os.kill(os.getpid(), signal.SIGTERM)  # save and stop
            threading.Event().wait(_PATIENCE)
            os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    with importing_torch():  # some seconds, once
        from svp_bench.data.cache import cache_between_runs
        from svp_bench.sweep.jobs import Job
        from svp_bench.sweep.runner import Runner

    cache_between_runs()
    runner = Runner()
    channel.send({}, event="ready")
    while (request := inbox.get()) is not None:
        job, number, log = Job.from_json(request["job"]), request["id"], Path(request["log"])
        _redirect(log)
        busy.set()
        outcome = runner.run(job, partial(channel.send, event="progress", id=number), request["retry"])
        busy.clear()
        sys.stdout.flush()
        outcome = dataclasses.replace(outcome, log=None if outcome.found else str(log))
        channel.send({"outcome": dataclasses.asdict(outcome)}, event="done", id=number)
        if outcome.status == "stopped":
            break


if __name__ == "__main__":
    main()
