"""Schedule the jobs of a sweep and handle their results.

Search and test are two separate phases: a trial is a run of stage select, which has no test split; the selected config
is written to disk; a final run reads that file and nothing else of the search. In a nested search each seed of the
final runs has its own search and selected config.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

from svp_bench.core.errors import SvpBenchError, plural
from svp_bench.records.record import timestamp
from svp_bench.records.selection import (
    SelectedConfig,
    read_selected_config,
    selected_config_of,
    trial_problems,
    write_selected_config,
)
from svp_bench.records.selection_rule import Trial, decide, edges
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.local_pool import Done, Pool, Progress
from svp_bench.sweep.search import Plan, Sampler, SearchSpace, make_sampler

_CLAIM_PAUSE = 5.0  # seconds until a job that another sweep runs is tried again


@dataclass
class _OpenTrial:
    """One setting of a search, and its runs so far."""

    values: dict[str, Any]
    jobs: list[str] = field(default_factory=list)  # keys, in the order of the selected config
    outcomes: dict[str, Outcome] = field(default_factory=dict)  # by key

    def trial(self) -> Trial:
        runs = [self.outcomes[key] for key in self.jobs]
        ids = tuple(run.run_id or "" for run in runs)
        failed = [run.reason or run.status for run in runs if run.status != "complete"]
        if failed:
            return Trial(self.values, ids, (), None, failed[0])
        return Trial(
            values=self.values,
            run_ids=ids,
            scores=tuple(float(run.top1 or 0.0) for run in runs),
            trainable=runs[0].trainable,
            status="complete",
            losses=tuple(float(run.loss or 0.0) for run in runs),
            right=tuple(run.right or "" for run in runs),
            counts=tuple(run.count or 0 for run in runs),
        )


@dataclass
class CellJobs:
    """A task and a method of a sweep, with the state of their search.

    Attributes:
        task: Full name.
        method: `--method`: a name or a file.
        label: The method's name in selected configs.
        values: Fixed config values of the runs, where there is no search.
        default: Of a search: values of the searched keys in the method's recipe.
        context: Of a search: the config that all its runs share (`context_of`).
        checkpoint_digest: Of a search: digest of the backbone's weights; None for random ones.
        data_digest: Of a search: digest of the splits that trials read.
        plan: Of a search: the runs of a trial.
        seed: The final seed that a nested search is for; None if one search serves all.
        sampler: Of an open search.
        trials: Of an open search.
        selected: Path of the selected config.
        blocked: Why the cell cannot continue.
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
    trials: list[_OpenTrial] = field(default_factory=list)
    selected: str | None = None
    blocked: str | None = None

    @property
    def searching(self) -> bool:
        """Whether its search is open."""
        return self.sampler is not None and self.selected is None and self.blocked is None

    @property
    def best(self) -> float | None:
        """The best mean score on val so far, of the settings with the most runs; None before the first."""
        scores = [[run.top1 for run in one.outcomes.values() if run.top1 is not None] for one in self.trials]
        most = max(map(len, scores), default=0)
        return max(fmean(of) for of in scores if len(of) == most) if most else None


@dataclass
class Running:
    """A job in the pool, and its progress."""

    job: Job
    began: float = field(default_factory=time.monotonic)
    epoch: int = 0
    epochs: int = 0


class Sweep:
    """All jobs of a sweep, as they become due.

    Args:
        cells: Tasks and methods; with a nested search each of them becomes one for each seed.
        seeds: Of the final runs.
        common: Flags that all jobs share.
        results_root: Folder of records and selected configs.
        search: The declaration, or None for the default track.
        retry_failed: Run again the jobs that failed in an earlier sweep.
        retries: How often a job is run again whose process died.
        only_search: Stop at the selected configs.

    Attributes:
        due: Jobs to start.
        later: Jobs that another sweep runs, with the time at which they are due again.
        running: Jobs in the pool, by key.
        done: Complete jobs.
        failed: Failed jobs.
        stopped: Jobs that were asked to stop.
        stopping: Whether the sweep was asked to stop.
    """

    def __init__(
        self,
        cells: Sequence[CellJobs],
        seeds: Sequence[int],
        common: tuple[str, ...],
        results_root: Path,
        *,
        search: SearchSpace | None = None,
        retry_failed: bool = False,
        retries: int = 2,
        only_search: bool = False,
    ) -> None:
        nested = search is not None and search.nested
        self.cells = [replace(cell, seed=seed) for cell in cells for seed in (seeds if nested else [None])]
        self.seeds = tuple(seeds)
        self.common = common
        self.results_root = results_root
        self.search = search
        self.retry_failed = retry_failed
        self.retries = retries
        self.only_search = only_search
        self.due: deque[Job] = deque()
        self.later: list[tuple[float, Job]] = []
        self.running: dict[str, Running] = {}
        self.done: list[Done] = []
        self.failed: list[Done] = []
        self.stopped: list[Done] = []
        self.stopping = False
        self._deaths: Counter[str] = Counter()
        self._trial_of: dict[str, tuple[CellJobs, _OpenTrial]] = {}  # of trials, by the key of a job
        for cell in self.cells:
            cell.trials = []
            self._begin(cell)

    def _begin(self, cell: CellJobs) -> None:
        """Make the first jobs of a cell due."""
        if cell.blocked is not None:
            return
        if self.search is None:
            self._refit(cell)
            return
        of = self.search.name, self.search.digest, cell.task, cell.label
        path = selected_config_of(self.results_root, *of, cell.seed, cell.context)
        if path.is_file():
            cell.blocked = self._wrong(cell, path)
            if cell.blocked is None:
                cell.selected = str(path)
                self._refit(cell)
            return
        of_seed = f", seed {cell.seed}" if cell.seed else ""
        cell.sampler = make_sampler(self.search, cell.label, cell.default, f"{cell.task}, {cell.label}{of_seed}")
        self._ask(cell, cell.sampler)

    def _wrong(self, cell: CellJobs, path: Path) -> str | None:
        """Return why an existing selected config cannot be used for a cell, or None."""
        try:
            selected = read_selected_config(path)
        except SvpBenchError as error:
            return f"{error}; a selected config is not edited: take the file away to search again"
        same = {
            "setting": selected.todays_context == cell.context,
            "weights": selected.checkpoint_digest == cell.checkpoint_digest,
            "data": selected.data_digest == cell.data_digest,
        }
        for fact, is_same in same.items():
            if not is_same:
                return f"{path} was selected on other {fact}; use those, or another folder with --results_root"
        problems = trial_problems(selected, self.results_root)
        return f"{path} contradicts the records of its trials: {problems[0]}" if problems else None

    def _refit(self, cell: CellJobs) -> None:
        """Make the final runs of a cell due."""
        self.due.extend(self._final_jobs(cell))

    def _final_jobs(self, cell: CellJobs) -> list[Job]:
        seeds = () if self.only_search else self.seeds if cell.seed is None else (cell.seed,)
        return [Job(cell.task, cell.method, seed, "final", cell.values, cell.selected, self.common) for seed in seeds]

    def _ask(self, cell: CellJobs, sampler: Sampler) -> bool:
        """Make the next trials of a search due; return whether there are any."""
        assert self.search is not None
        trials = [one.trial() for one in cell.trials]
        settings = sampler([(trial.values, trial.mean) for trial in trials])
        seeds = self.search.seeds if cell.seed is None else (cell.seed,)
        for values in settings:
            trial = _OpenTrial(values)
            cell.trials.append(trial)
            for seed, fold in cell.plan.runs(seeds, cell.seed or 0):
                job = Job(cell.task, cell.method, seed, "select", {**values, **fold}, None, self.common)
                trial.jobs.append(job.key)
                self._trial_of[job.key] = cell, trial
                self.due.append(job)
        return bool(settings)

    def run(
        self,
        pool: Pool,
        report: Callable[[str], None] = lambda _: None,
        tick: Callable[[], None] = lambda: None,
        asked_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """Run all jobs; return when nothing is left to do, or when all have stopped after being asked to.

        Args:
            pool: Runs the jobs.
            report: Gets a line for each event.
            tick: Is called several times a second.
            asked_to_stop: Whether to stop.
        """
        while True:
            if asked_to_stop() and not self.stopping:
                self.stopping = True
                pool.stop()
            now = time.monotonic()
            self.due.extend(job for moment, job in self.later if moment <= now)
            self.later = [(moment, job) for moment, job in self.later if moment > now]
            while self.due and len(self.running) < pool.slots and not self.stopping:
                job = self.due.popleft()
                self.running[job.key] = Running(job)
                pool.submit(job, retry=self.retry_failed or self._deaths[job.key] > 0)
            if not self.running and (self.stopping or not (self.due or self.later)):
                return
            for event in pool.wait(0.25):
                if isinstance(event, Progress):
                    running = self.running[event.job.key]
                    running.epoch, running.epochs = event.epoch, event.epochs
                else:
                    self._ended(event, report)
            tick()

    def _ended(self, done: Done, report: Callable[[str], None]) -> None:
        job, outcome = done.job, done.outcome
        self.running.pop(job.key)
        if outcome.status == "claimed":
            self.later.append((time.monotonic() + _CLAIM_PAUSE, job))
        elif self.stopping and outcome.status in ("stopped", "died"):
            self.stopped.append(done)
        elif outcome.status == "stopped" or (outcome.status == "died" and self._deaths[job.key] < self.retries):
            self._deaths[job.key] += outcome.status == "died"  # "stopped" not by this sweep: a preempted node
            self.due.appendleft(job)
            report(f"{job.name}: {outcome.reason or outcome.status}; it resumes from its last checkpoint")
        else:
            (self.done if outcome.status == "complete" else self.failed).append(done)
            if outcome.status != "complete" or not outcome.found:
                report(f"{job.name}: {outcome.text(job.stage)}")
            if job.key in self._trial_of:
                cell, trial = self._trial_of.pop(job.key)
                trial.outcomes[job.key] = outcome
                self._continue_search(cell, report)

    def _continue_search(self, cell: CellJobs, report: Callable[[str], None]) -> None:
        """Make further trials due; once there are none, write the selected config and make the final runs due."""
        assert cell.sampler is not None
        if any(len(one.outcomes) < len(one.jobs) for one in cell.trials) or self._ask(cell, cell.sampler):
            return
        try:
            selected = self._select(cell)
            path = write_selected_config(selected, self.results_root)
        except SvpBenchError as error:
            cell.blocked = str(error)
            return
        cell.selected = str(path)
        setting = ", ".join(f"{key.rsplit('.', 1)[-1]} = {value}" for key, value in selected.values.items())
        seed = "" if cell.seed is None else f", seed {cell.seed}"
        lost, edge = len(selected.trials) - selected.completed, ", ".join(selected.at_edge)
        notes = f"; {plural(lost, 'setting')} of {len(selected.trials)} failed" if lost else ""
        notes += f"; at the end of the grid, so that a wider one might do better: {edge}" if edge else ""
        report(f"{cell.task}, {cell.label}{seed}: selected {setting}: {selected.reason}{notes} ({path})")
        self._refit(cell)

    def _select(self, cell: CellJobs) -> SelectedConfig:
        """Apply the rule of the search to the trials of a cell.

        Raises:
            SvpBenchError: If a run failed for a reason that is not its setting's, or no trial has a score.
        """
        search, plan = self.search, cell.plan
        assert search is not None
        for one in cell.trials:
            for run in one.outcomes.values():
                if run.status != "complete" and run.run_id is None and not run.refused:
                    setting = ", ".join(f"{key} = {value}" for key, value in one.values.items())
                    raise SvpBenchError(
                        f"nothing is selected, since the trial {setting} left no record: {run.reason or run.status}; "
                        "fix that and run the same command again (or take the setting out of the search)"
                    )
        trials = tuple(one.trial() for one in cell.trials)
        good = next((one for one, trial in zip(cell.trials, trials, strict=True) if trial.scores), None)
        if good is None:
            raise SvpBenchError(f"no setting of its search has a score on val: {trials[0].status}")
        runs = [good.outcomes[key] for key in good.jobs]
        images = tuple(tuple(run.images or ()) for run in runs[: plan.folds * plan.repeats])
        count = sum(map(len, images[: plan.folds])) if plan.folds else runs[0].count or 0
        decision = decide(trials, count, search.rule, images)
        return SelectedConfig(
            task=cell.task,
            method=cell.label,
            search=search.declaration(),
            search_digest=search.digest,
            context=cell.context,
            checkpoint_digest=cell.checkpoint_digest,
            data_digest=cell.data_digest,
            selected_on=f"{runs[0].divided} ({plan.folds} folds)" if plan.folds else runs[0].selected_on or "",
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

    @property
    def blocked(self) -> list[CellJobs]:
        """Cells that cannot continue; one for each task and method that a nested search blocks for the same reason."""
        found = {(cell.task, cell.method, cell.blocked): cell for cell in reversed(self.cells) if cell.blocked}
        return list(reversed(found.values()))

    @property
    def left(self) -> int:
        """Jobs that are known and not over."""
        return len(self.due) + len(self.later) + len(self.running)

    @property
    def to_come(self) -> list[Job]:
        """Final runs that follow once a search is over, as yet without its selected config."""
        return [job for cell in self.cells if cell.searching for job in self._final_jobs(cell)]
