"""Show a sweep while it runs: a live view in a terminal, one line for each event elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from svp_bench.core.errors import printable
from svp_bench.sweep.scheduler import Sweep

__all__ = ["ProgressView"]

_SHOWN = 8  # running jobs in the live view


class ProgressView:
    """Shows how many jobs are over, running and failed, the epochs of running jobs, and the time left.

    Scores on test are not shown before the end: they must not decide whether a sweep is stopped.

    Args:
        console: Where to.
        sweep: The sweep.
        what: Workers and hardware, in words.
    """

    def __init__(self, console: Console, sweep: Sweep, what: str) -> None:
        self._sweep, self._what = sweep, what
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
            speed_estimate_period=1e9,  # the whole sweep: a run may take hours
        )
        self._whole = self._progress.add_task(what, total=None)
        self._jobs: dict[str, TaskID] = {}

    def __enter__(self) -> ProgressView:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def report(self, text: str) -> None:
        """Print the line of an event."""
        self._progress.console.print(Text(printable(text)), soft_wrap=True)

    def tick(self) -> None:
        """Update the live view."""
        sweep, progress = self._sweep, self._progress
        new = sum(not done.outcome.found for done in (*sweep.done, *sweep.failed))  # others say nothing about the time
        text = f"{len(sweep.running)} running, {len(sweep.failed)} failed; {self._what}"
        if sweep.stopping:
            text = "Stopping: the running jobs save and end. ctrl-C once more ends them at once."
        progress.update(self._whole, description=printable(text), completed=new, total=new + sweep.left + sweep.to_come)
        for key in [key for key in self._jobs if key not in sweep.running]:
            progress.remove_task(self._jobs.pop(key))
        for key, one in list(sweep.running.items())[:_SHOWN]:
            if key not in self._jobs:
                self._jobs[key] = progress.add_task(printable(one.job.name), total=None)
            progress.update(self._jobs[key], completed=one.epoch, total=one.epochs or None)
