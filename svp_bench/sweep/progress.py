"""What a sweep shows while it runs: one live view in a terminal, one line an event elsewhere."""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from svp_bench.core.errors import plural, printable
from svp_bench.records.selection import FOLD_KEYS, SelectedConfig
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.local_pool import Progress
from svp_bench.sweep.scheduler import Cell, Sweep, Watcher

__all__ = ["View", "duration"]

_SHOWN = 8  # running jobs in the live view


def duration(seconds: float) -> str:
    """Return a time in words: "42 s", "3 min", "5 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"


class View(Watcher):
    """Shows done, running and failed jobs, the time left, and the best score on val so far.

    Scores on test are not shown before all is over: nobody should stop a sweep because of them.
    """

    def __init__(self, console: Console, what: str) -> None:
        self._console = console
        self._what = what
        self._live = Live(console=console, refresh_per_second=4, transient=True) if console.is_terminal else None
        self._began = time.monotonic()
        self._progress: dict[str, tuple[int, int]] = {}
        self._since: dict[str, float] = {}
        self._scores: dict[tuple[Any, ...], list[float]] = defaultdict(list)  # of task, method and setting
        self._best: dict[tuple[str, str], float] = {}
        self._spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._slots = 1

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def _say(self, text: str) -> None:
        self._console.print(Text(printable(text)), soft_wrap=True)

    def started(self, job: Job) -> None:
        """Remember when."""
        self._since[job.key] = time.monotonic()

    def progressed(self, progress: Progress) -> None:
        """Remember how far."""
        self._progress[progress.job.key] = progress.epoch, progress.epochs

    def ended(self, job: Job, outcome: Outcome) -> None:
        """Say how it ended, and keep what it teaches."""
        self._forget(job)
        if outcome.status == "complete":
            if job.stage == "select" and outcome.top1 is not None:
                self._tried(job, outcome.top1)
            if not outcome.found:
                self._spent[job.method, job.stage].append(outcome.seconds)
            score = f", {outcome.top1:.2f} % on val" if job.stage == "select" and outcome.top1 is not None else ""
            how = "there already" if outcome.found else f"done in {duration(outcome.seconds)}"
            if not outcome.found or self._live is None:
                self._say(f"{job.name}: {how}{score}")
            return
        log = f" (log: {outcome.log})" if outcome.log else ""
        again = "; it failed earlier and is left alone without --retry_failed" if outcome.found else ""
        self._say(f"{job.name}: FAILED: {outcome.reason}{again}{log}")

    def _tried(self, job: Job, top1: float) -> None:
        """Keep the best setting: of those that are scored fold by fold, the mean over the folds so far."""
        setting = tuple((name, str(value)) for name, value in job.values.items() if name not in FOLD_KEYS)
        scores = self._scores[job.task, job.method, setting]
        scores.append(top1)
        longest = max(len(of) for key, of in self._scores.items() if key[:2] == (job.task, job.method))
        means = [
            sum(of) / len(of)
            for key, of in self._scores.items()
            if key[:2] == (job.task, job.method) and len(of) == longest
        ]
        self._best[job.task, job.method] = max(means)

    def retried(self, job: Job, outcome: Outcome) -> None:
        """Report that it resumes."""
        self._forget(job)
        self._say(f"{job.name}: {outcome.reason or outcome.status}; it resumes from its last checkpoint")

    def chose(self, cell: Cell, selected: SelectedConfig, path: Path) -> None:
        """Say what, and why."""
        setting = ", ".join(f"{key.rsplit('.', 1)[-1]} = {value}" for key, value in selected.values.items())
        seed = "" if selected.search_seed is None else f", seed {selected.search_seed}"
        self._say(f"{cell.task}, {cell.label}{seed}: chose {setting}: {selected.reason} ({path})")

    def _forget(self, job: Job) -> None:
        self._since.pop(job.key, None)
        self._progress.pop(job.key, None)

    def tick(self, sweep: Sweep) -> None:
        """Draw."""
        if self._live is not None:
            self._live.update(self._draw(sweep))

    def seconds_left(self, sweep: Sweep, slots: int) -> float | None:
        """Return the time that is left, from the mean time of jobs of the same method and stage; None if unknown."""
        everything = [seconds for spent in self._spent.values() for seconds in spent]
        if not everything:
            return None
        mean = sum(everything) / len(everything)

        def expected(method: str, stage: str) -> float:
            spent = self._spent.get((method, stage))
            return sum(spent) / len(spent) if spent else mean

        waiting = [*sweep.due, *(job for _, job in sweep.later), *sweep.running.values()]
        total = sum(expected(job.method, job.stage) for job in waiting) + sweep.to_come * mean
        now = time.monotonic()
        total -= sum(min(now - began, mean) for began in self._since.values())
        return max(0.0, total / max(1, slots))

    def _draw(self, sweep: Sweep) -> Group:
        over, left = len(sweep.done) + len(sweep.failed), sweep.left + sweep.to_come
        seconds = self.seconds_left(sweep, max(1, len(sweep.running)))
        eta = "unknown until a run has ended" if seconds is None else duration(seconds)
        head = Text(
            f"{over} of {plural(over + left, 'run')} over, {len(sweep.running)} running, {len(sweep.failed)} failed; "
            f"{duration(time.monotonic() - self._began)} so far, about {eta} left; {printable(self._what)}"
        )
        if sweep.stopping:
            head = Text("Stopping: the running jobs save and end. ctrl-C once more ends them at once.\n") + head
        rows = Table.grid(padding=(0, 2))
        for job in list(sweep.running.values())[:_SHOWN]:
            epoch, epochs = self._progress.get(job.key, (0, 0))
            rows.add_row(Text(printable(job.name)), f"epoch {epoch} of {epochs}" if epochs else "starting")
        best = Table.grid(padding=(0, 2))
        for (task, method), score in sorted(self._best.items())[-_SHOWN:]:
            best.add_row(Text(printable(f"best on val so far: {task}, {method}")), f"{score:.2f} %")
        return Group(ProgressBar(total=max(1, over + left), completed=over), head, rows, best)
