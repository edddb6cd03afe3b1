"""Show a sweep while it runs: a live view in a terminal, one line for each event elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from svp_bench.core.errors import printable
from svp_bench.sweep.jobs import Job, duration
from svp_bench.sweep.scheduler import Sweep

_SHOWN = 8  # running jobs in the live view, and searches


class _Live(Progress):
    """Bars below lines of text, which may be longer than a column."""

    lines: tuple[str, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from (Text(printable(line)) for line in self.lines)
        yield from super().get_renderables()


class ProgressView:
    """Shows how many jobs are over, running and failed, their epochs, the time left, and the best scores on val.

    Scores on test are not shown before the end: they must not decide whether a sweep is stopped.

    Args:
        console: Where to.
        sweep: The sweep.
        what: Workers and hardware, in words.
    """

    def __init__(self, console: Console, sweep: Sweep, what: str) -> None:
        self._sweep, self._what = sweep, what
        self._progress = _Live(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._whole = self._progress.add_task("runs", total=None)
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
        seconds = self.seconds_left()
        left = "time left unknown until a run has ended" if seconds is None else f"about {duration(seconds)} left"
        lines = [f"{len(sweep.running)} running, {len(sweep.failed)} failed, {left}; {self._what}"]
        if sweep.stopping:
            lines = ["Stopping: the running jobs save and end. ctrl-C once more ends them at once."]
        for cell in [cell for cell in sweep.cells if cell.searching and cell.best is not None][:_SHOWN]:
            seed = "" if cell.seed is None else f", seed {cell.seed}"
            lines.append(f"best on val so far: {cell.best:.2f} % ({cell.task}, {cell.label}{seed})")
        progress.lines = tuple(lines)
        over = len(sweep.done) + len(sweep.failed)
        progress.update(self._whole, completed=over, total=over + sweep.left + len(sweep.to_come))
        for key in [key for key in self._jobs if key not in sweep.running]:
            progress.remove_task(self._jobs.pop(key))
        for key, one in list(sweep.running.items())[:_SHOWN]:
            if key not in self._jobs:
                self._jobs[key] = progress.add_task(printable(one.job.name), total=None)
            progress.update(self._jobs[key], completed=one.epoch, total=one.epochs or None)

    def seconds_left(self) -> float | None:
        """Return the time left, from the mean time of jobs of the same method and stage; None before the first."""
        sweep, spent = self._sweep, defaultdict[tuple[str, str] | None, list[float]](list)
        for done in sweep.done:
            for kind in () if done.outcome.found else ((done.job.method, done.job.stage), None):
                spent[kind].append(done.outcome.seconds)
        if not spent:
            return None
        mean = {kind: fmean(seconds) for kind, seconds in spent.items()}

        def expected(job: Job) -> float:
            return mean.get((job.method, job.stage), mean[None])

        now = time.monotonic()
        total = sum(map(expected, (*sweep.due, *(job for _, job in sweep.later), *sweep.to_come)))
        total += sum(max(0.0, expected(one.job) - (now - one.began)) for one in sweep.running.values())
        return total / max(1, len(sweep.running))
