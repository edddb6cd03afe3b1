"""Show a sweep while it runs: a live view in a terminal, one line for each event elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from statistics import mean

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from svp_bench.core.errors import plural, printable
from svp_bench.records.selection import FOLD_KEYS
from svp_bench.sweep.jobs import duration
from svp_bench.sweep.scheduler import Sweep

__all__ = ["ProgressView"]

_SHOWN = 8  # running jobs in the live view


class ProgressView:
    """Shows complete, running and failed jobs, the time left, and the best score on val so far.

    Scores on test are not shown before the end: they must not decide whether a sweep is stopped.

    Args:
        console: Where to.
        sweep: The sweep.
        what: Workers and hardware, in words.
    """

    def __init__(self, console: Console, sweep: Sweep, what: str) -> None:
        self._console, self._sweep, self._what = console, sweep, what
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._began = time.monotonic()

    def __enter__(self) -> ProgressView:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def report(self, text: str) -> None:
        """Print the line of an event."""
        self._console.print(Text(printable(text)), soft_wrap=True)

    def tick(self) -> None:
        """Draw the live view."""
        if self._live is not None:
            self._live.update(self._draw())

    def seconds_left(self) -> float | None:
        """Return the time left, from the mean time of jobs of the same method and stage; None if it is unknown."""
        sweep, spent = self._sweep, defaultdict[tuple[str, str], list[float]](list)
        for done in sweep.done:
            if not done.outcome.found:
                spent[done.job.method, done.job.stage].append(done.outcome.seconds)
        if not spent:
            return None
        usual = mean(seconds for times in spent.values() for seconds in times)
        expected = {key: mean(times) for key, times in spent.items()}
        running = sweep.running.values()
        waiting = [*sweep.due, *(job for _, job in sweep.later), *(one.job for one in running)]
        total = sum(expected.get((job.method, job.stage), usual) for job in waiting) + sweep.to_come * usual
        total -= sum(min(time.monotonic() - one.since, usual) for one in running)
        return max(0.0, total / max(1, len(running)))

    def best(self) -> dict[str, float]:
        """Return "task, method" → the best score on val so far; of folds, the mean of those of a setting."""
        scores: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for job, outcome in ((done.job, done.outcome) for done in self._sweep.done):
            if job.stage == "select" and outcome.top1 is not None:
                setting = str([(key, value) for key, value in job.values.items() if key not in FOLD_KEYS])
                scores[f"{job.task}, {job.method}"][setting].append(outcome.top1)
        runs = {cell: max(map(len, settings.values())) for cell, settings in scores.items()}
        return {
            cell: max(mean(one) for one in settings.values() if len(one) == runs[cell])
            for cell, settings in sorted(scores.items())
        }

    def _draw(self) -> Group:
        sweep, seconds = self._sweep, self.seconds_left()
        over, left = len(sweep.done) + len(sweep.failed), sweep.left + sweep.to_come
        eta = "unknown until a run has ended" if seconds is None else duration(seconds)
        head = Text(
            f"{over} of {plural(over + left, 'run')} over, {len(sweep.running)} running, {len(sweep.failed)} failed; "
            f"{duration(time.monotonic() - self._began)} so far, about {eta} left; {printable(self._what)}"
        )
        if sweep.stopping:
            head = Text("Stopping: the running jobs save and end. ctrl-C once more ends them at once.\n") + head
        rows = Table.grid(padding=(0, 2))
        for one in list(sweep.running.values())[:_SHOWN]:
            epoch = f"epoch {one.epoch} of {one.epochs}" if one.epochs else "starting"
            rows.add_row(Text(printable(one.job.name)), epoch)
        for cell, score in [*self.best().items()][-_SHOWN:]:
            rows.add_row(Text(printable(f"best on val so far: {cell}")), f"{score:.2f} %")
        return Group(ProgressBar(total=max(1, over + left), completed=over), head, rows)
