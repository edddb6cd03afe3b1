"""Schedule the jobs of a sweep and handle their results.

Search and test are two separate phases: a trial is a run of stage select, which has no test list;
the selected config is written to disk; a final run reads that file and nothing else of the search. In a nested search
each seed of the final runs has its own search and selected config.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from svp_bench.core.errors import RecordError, SvpBenchError
from svp_bench.records.digests import cell_config
from svp_bench.records.record import timestamp
from svp_bench.records.selection import (
    SelectedConfig,
    Trial,
    context_of,
    read_selected_config,
    selected_config_path,
    trial_problems,
    write_selected_config,
)
from svp_bench.records.selection_rule import decide, edges
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.local_pool import Pool, Progress
from svp_bench.sweep.search import Plan, Sampler, Search, make_sampler

__all__ = ["Cell", "Ended", "Sweep", "Watcher"]

_CLAIM_PAUSE = 5.0  # seconds until a job that another sweep holds is looked at again


@dataclass
class _Try:
    """One setting of a search, on its way."""

    values: dict[str, Any]
    jobs: list[str] = field(default_factory=list)  # keys, in the order of the selected config file
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by key

    @property
    def over(self) -> bool:
        return len(self.outcomes) == len(self.jobs)

    def trial(self) -> Trial:
        ended = [self.outcomes[key] for key in self.jobs]
        good = all(outcome.status == "complete" and outcome.top1 is not None for outcome in ended)
        reasons = [outcome.reason or outcome.status for outcome in ended if outcome.status != "complete"]
        return Trial(
            values=self.values,
            run_ids=tuple(outcome.run_id or "" for outcome in ended),
            scores=tuple(float(outcome.top1 or 0.0) for outcome in ended) if good else (),
            trainable=ended[0].trainable if good else None,
            status="complete" if good else reasons[0],
            losses=tuple(float(outcome.loss or 0.0) for outcome in ended) if good else None,
            right=tuple(outcome.right or "" for outcome in ended) if good else None,
            counts=tuple(outcome.count or 0 for outcome in ended) if good else None,
        )


@dataclass
class Cell:
    """A task and a method of a sweep.

    Attributes:
        task: Full name.
        method: `--method`: a name or a file.
        label: The method's name in selected configs.
        values: Fixed config values of the cell's runs, where there is no search.
        default: Values of the searched keys in the method's recipe; empty without a search.
        context: What all its runs share (`selected configs.context_of`), of a search.
        checkpoint_digest: Of the backbone's weights, of a search; None for random ones.
        data_digest: Of the lists that trials read.
        plan: Which runs make a trial, of a search.
        seed: The final seed that a nested search is for; None if one search serves all.
    """

    task: str
    method: str
    label: str
    values: Mapping[str, Any] = field(default_factory=dict)
    default: Mapping[str, Any] = field(default_factory=dict)
    context: Mapping[str, Any] = field(default_factory=dict)
    checkpoint_digest: str | None = None
    data_digest: str = ""
    plan: Plan = field(default_factory=Plan)
    seed: int | None = None
    sampler: Sampler | None = None
    tries: list[_Try] = field(default_factory=list)
    selected: str | None = None
    blocked: str | None = None


@dataclass(frozen=True)
class Ended:
    """A job with its outcome."""

    job: Job
    outcome: Outcome


class Watcher:
    """Sees what a sweep does; this one does nothing with it."""

    def started(self, job: Job) -> None:
        """A job was given to the pool."""

    def progressed(self, progress: Progress) -> None:
        """A job has finished an epoch."""

    def ended(self, job: Job, outcome: Outcome) -> None:
        """A job has ended."""

    def retried(self, job: Job, outcome: Outcome) -> None:
        """A job whose process died is run again, from its last checkpoint."""

    def chose(self, cell: Cell, selected: SelectedConfig, path: Path) -> None:
        """A search is over."""

    def tick(self, sweep: Sweep) -> None:
        """Time has passed."""


class Sweep:
    """All jobs of a sweep, as they become due.

    Args:
        cells: Tasks and methods; with a nested search each of them becomes one for each seed.
        seeds: Of the final runs.
        common: Flags that all jobs share.
        results_root: Where records and selected configs are.
        search: The declaration, or None for the default track.
        retry_failed: Run again what failed in an earlier sweep.
        retries: How often a job is run again whose process died.
        only_search: Stop at the selected configs.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        seeds: Sequence[int],
        common: tuple[str, ...],
        results_root: Path,
        *,
        search: Search | None = None,
        retry_failed: bool = False,
        retries: int = 2,
        only_search: bool = False,
    ) -> None:
        self.cells = list(cells)
        if search is not None:
            self.cells = [
                replace(cell, seed=seed, plan=_planned(cell.plan, search, seed), tries=[])
                for cell in cells
                for seed in (seeds if search.nested else (None,))
            ]
        self.seeds = tuple(seeds)
        self.common = common
        self.results_root = results_root
        self.search = search
        self.retry_failed = retry_failed
        self.retries = retries
        self.only_search = only_search
        self.due: deque[Job] = deque()
        self.later: list[tuple[float, Job]] = []
        self.running: dict[str, Job] = {}
        self.done: list[Ended] = []
        self.failed: list[Ended] = []
        self.stopped: list[Ended] = []
        self.stopping = False
        self._deaths: Counter[str] = Counter()
        self._cell_of: dict[str, tuple[Cell, int | None]] = {}
        for cell in self.cells:
            self._begin(cell)

    # --- what is due -------------------------------------------------------------------------------------------------

    def _begin(self, cell: Cell) -> None:
        if self.search is None:
            self._refit(cell)
            return
        if cell.blocked is not None:
            return
        of = self.search.name, self.search.digest, cell.task, cell.label
        path = selected_config_path(self.results_root, *of, cell.seed)
        if path.is_file():
            try:
                selected = read_selected_config(path)
            except RecordError as error:
                cell.blocked = f"{error}; a selected config is not edited: take the file away to search again"
                return
            other = [
                name for name in ("context", "checkpoint_digest") if getattr(selected, name) != getattr(cell, name)
            ]
            if other or selected.data_digest != cell.data_digest:
                what = {"context": "setting", "checkpoint_digest": "weights"}.get(other[0]) if other else "data"
                cell.blocked = f"{path} was chosen on other {what}; take those, or another folder with --results_root"
                return
            for problem in trial_problems(selected, self.results_root):
                cell.blocked = f"{path} is not what its trials' records say: {problem}"
                return
            cell.selected = str(path)
            self._refit(cell)
            return
        of_seed = "" if not cell.seed else f", seed {cell.seed}"
        cell.sampler = make_sampler(self.search, cell.label, cell.default, f"{cell.task}, {cell.label}{of_seed}")
        self._ask(cell)

    def _refit(self, cell: Cell) -> None:
        if self.only_search:
            return
        for seed in self.seeds if cell.seed is None else (cell.seed,):
            self._add(cell, None, Job(cell.task, cell.method, seed, "final", cell.values, cell.selected, self.common))

    def _ask(self, cell: Cell) -> bool:
        """Make the next trials of a search due; return whether there are any."""
        assert cell.sampler is not None
        trials = [one.trial() for one in cell.tries]
        settings = cell.sampler.ask([(trial.values, trial.mean) for trial in trials])
        for values in settings:
            one = _Try(values)
            cell.tries.append(one)
            for seed, fold in cell.plan.runs():
                job = Job(cell.task, cell.method, seed, "select", {**values, **fold}, None, self.common)
                one.jobs.append(job.key)
                self._add(cell, len(cell.tries) - 1, job)
        return bool(settings)

    def _add(self, cell: Cell, number: int | None, job: Job) -> None:
        self._cell_of[job.key] = cell, number
        self.due.append(job)

    # --- what follows ------------------------------------------------------------------------------------------------

    def run(self, pool: Pool, watcher: Watcher, asked_to_stop: Callable[[], bool] = lambda: False) -> None:
        """Run all jobs; return when nothing is left to do, or when all have stopped after being asked to."""
        while True:
            if asked_to_stop() and not self.stopping:
                self.stopping = True
                pool.stop()
            now = time.monotonic()
            self.due.extend(job for moment, job in self.later if moment <= now)
            self.later = [(moment, job) for moment, job in self.later if moment > now]
            while self.due and len(self.running) < pool.slots and not self.stopping:
                job = self.due.popleft()
                self.running[job.key] = job
                retry = self.retry_failed or self._deaths[job.key] > 0
                pool.submit(job, retry=retry)
                watcher.started(job)
            if not self.running and (self.stopping or not (self.due or self.later)):
                return
            for event in pool.wait(0.25):
                if isinstance(event, Progress):
                    watcher.progressed(event)
                else:
                    self._ended(event.job, event.outcome, watcher)
            watcher.tick(self)

    def _ended(self, job: Job, outcome: Outcome, watcher: Watcher) -> None:
        self.running.pop(job.key)
        if outcome.status == "claimed":
            self.later.append((time.monotonic() + _CLAIM_PAUSE, job))
            return
        if outcome.status == "stopped" or (outcome.status == "died" and self.stopping):
            self.stopped.append(Ended(job, outcome))
            if not self.stopping:  # somebody else asked the worker to stop: a preempted node, say
                self.stopped.pop()
                self.due.append(job)
                watcher.retried(job, outcome)
            return
        if outcome.status == "died" and self._deaths[job.key] < self.retries:
            self._deaths[job.key] += 1
            self.due.appendleft(job)
            watcher.retried(job, outcome)
            return
        cell, number = self._cell_of.pop(job.key)
        (self.done if outcome.status == "complete" else self.failed).append(Ended(job, outcome))
        watcher.ended(job, outcome)
        if number is not None:
            self._tried(cell, number, job, outcome, watcher)

    def _tried(self, cell: Cell, number: int, job: Job, outcome: Outcome, watcher: Watcher) -> None:
        assert self.search is not None
        cell.tries[number].outcomes[job.key] = outcome
        if not all(one.over for one in cell.tries) or self._ask(cell):
            return
        outcomes = [(one.values, one.outcomes[key]) for one in cell.tries for key in one.jobs]
        for values, outcome in outcomes:
            lost = outcome.run_id is None and outcome.status != "complete"
            if lost and not outcome.refused:  # no setting loses for what is not its doing
                setting = ", ".join(f"{key} = {value}" for key, value in values.items())
                cell.blocked = (
                    f"nothing is chosen, since the trial {setting} left no record: {outcome.reason or outcome.status}; "
                    "put that right and run the same command again (or take the setting out of the search)"
                )
                return
        trials = tuple(one.trial() for one in cell.tries)
        good = next((one for one, trial in zip(cell.tries, trials, strict=True) if trial.scores), None)
        if good is None:
            cell.blocked = f"no setting of its search has a score on val: {trials[0].status}"
            return
        plan, runs = cell.plan, [good.outcomes[key] for key in good.jobs]
        images = tuple(tuple(run.images or ()) for run in runs[: plan.folds * plan.repeats])
        count = sum(map(len, images[: plan.folds])) if plan.folds else runs[0].count
        selected_on = f"{runs[0].divided} ({plan.folds} folds)" if plan.folds else runs[0].selected_on
        assert count is not None
        assert selected_on is not None
        decision = decide(trials, count, self.search.rule, images)
        selected = SelectedConfig(
            task=cell.task,
            method=cell.label,
            search=self.search.declaration(),
            search_digest=self.search.digest,
            context=cell.context,
            checkpoint_digest=cell.checkpoint_digest,
            data_digest=cell.data_digest,
            selected_on=selected_on,
            count=count,
            trials=trials,
            chosen=decision.chosen,
            standard_error=decision.standard_error,
            reason=decision.reason,
            created=timestamp(),
            search_seed=cell.seed,
            folds=plan.folds,
            repeats=plan.repeats,
            images=images,
            ties=decision.ties,
            at_edge=edges(trials, decision),
        )
        try:
            path = write_selected_config(selected, self.results_root)
        except SvpBenchError as problem:
            cell.blocked = str(problem)
            return
        cell.selected = str(path)
        watcher.chose(cell, selected, path)
        self._refit(cell)

    # --- what is known -----------------------------------------------------------------------------------------------

    @property
    def blocked(self) -> list[Cell]:
        """Cells that cannot continue; one for each task and method that a nested search blocks for the same reason."""
        found = {(cell.task, cell.method, cell.blocked): cell for cell in reversed(self.cells) if cell.blocked}
        return list(reversed(found.values()))

    @property
    def left(self) -> int:
        """Jobs that are known and not over."""
        return len(self.due) + len(self.later) + len(self.running)

    @property
    def to_come(self) -> int:
        """Final runs that follow once a search is over."""
        waiting = [
            cell for cell in self.cells if cell.sampler is not None and cell.selected is None and not cell.blocked
        ]
        return 0 if self.only_search else sum(1 if cell.seed is not None else len(self.seeds) for cell in waiting)


def _planned(plan: Plan, search: Search, seed: int | None) -> Plan:
    """Return a plan with the training seeds of a search, or of the one of a nested search that is for `seed`."""
    if seed is None:
        return replace(plan, seeds=search.seeds)
    return replace(plan, seeds=(seed,), fold_seed=seed if plan.folds else 0)


def searched_context(
    config: Mapping[str, Any], keys: Sequence[str], sources: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return the context of a cell's search from a resolved config of any of its runs."""
    return context_of(cell_config(config), keys, sources)
