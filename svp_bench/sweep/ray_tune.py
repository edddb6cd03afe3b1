"""A search as a Ray Tune experiment, for those who live in Tune: its tables, its loggers, its dashboards.

    from svp_bench.sweep.ray_tune import make_tuner  # the extra `tune`
    make_tuner("vtab/dtd", "svp", flags=["--data.root", "data"]).fit()

Tune places the trials and keeps its own table of them. What is tried comes from the declaration of the search, through
the same sampler, in the same order; each trial is a run of stage select that leaves its record. Then
`svp-bench tune --task vtab/dtd --method svp --data.root data` finds the records, trains nothing, and freezes the choice
by the rule that it always follows: the choice is the same, whoever drove the trials.

`svp-bench sweep --engine ray --search NAME` does not go through Tune; its trials are jobs of `ray_pool.RayPool` like
its final runs. Tune would be a second coordinator with less to it: it knows one search at a time, where a sweep runs
many beside each other and fills free workers with final runs; it starts a process for each trial, where a worker stays
warm; it has a store of its own that must agree with the records; and what it is best at, ending poor trials early, is
what a table must not take, since a trial that was cut short is a record of another budget.
"""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svp_bench.config.compose import method_layer, split_flags
from svp_bench.core.errors import SvpBenchError, UnavailableError
from svp_bench.sweep.jobs import Job, common_arguments
from svp_bench.sweep.local_pool import Done, Work, WorkerProcess
from svp_bench.sweep.search import Plan, Sampler, load_search, make_sampler
from svp_bench.tasks.cards import load_task

__all__ = ["METRIC", "make_tuner"]

METRIC = "val_top1"  # reported to Tune: the mean over the images of all runs of a trial, in percent
_CLAIM_PAUSE = 5.0  # seconds until a run that another process is at is looked at again
_RETRIES = 2  # of a run whose process died


def make_tuner(
    task: str,
    method: str = "svp",
    search: str = "default",
    *,
    flags: Sequence[str] = (),
    results_root: str = "results",
    runs_root: str = "runs",
    cpus: float = 1,
    gpus: float = 0,
    at_once: int | None = None,
    seed: int = 0,
) -> Any:
    """Return a `ray.tune.Tuner` whose `fit()` runs the trials of a search of one method on one task.

    Ray's own settings (`ray.init`) are the caller's. All nodes must share the working directory and the two roots.

    Args:
        task: Full name, e.g. "vtab/dtd".
        method: A name or a method file.
        search: A declaration.
        flags: Flags that go to every run, as `svp-bench tune` takes them.
        results_root: Where records go.
        runs_root: Where logs and checkpoints go, and Tune's own files (`ray-tune`).
        cpus: CPU cores of each trial.
        gpus: GPUs of each trial, or a fraction.
        at_once: Trials at once, or None for what the cluster has.
        seed: Of the final runs that a nested search is for.

    Raises:
        UnavailableError: If Ray Tune is not installed.
        SvpBenchError: If a name, a flag or the declaration is wrong.
    """
    try:
        from ray import tune
    except ImportError:
        raise UnavailableError("Ray Tune is not installed: pip install 'svp-bench[tune]'") from None
    from svp_bench.sweep.runner import Runner  # torch

    declared = load_search(search)
    _, _, label = method_layer(method)
    full, given = load_task(task).name, split_flags(flags)
    common = common_arguments(given.configs, given.rest, results_root, runs_root)
    keys = [dimension.key for dimension in declared.space(label)]
    runner, job = Runner(), Job(full, method, 0, "select", common=common)
    default = runner.default_values(job, keys)
    plan = runner.plan(declared, runner.resolved(job), seed)
    trial = _trial(full, method, plan, common, Path(runs_root) / "sweep-logs", max(1, int(cpus)))
    of_seed = f", seed {seed}" if declared.nested and seed else ""
    sampler = make_sampler(declared, label, default, f"{full}, {label}{of_seed}")
    return tune.Tuner(
        tune.with_resources(trial, {"cpu": cpus, "gpu": gpus}),
        tune_config=tune.TuneConfig(
            search_alg=_searcher(sampler), num_samples=declared.budget, max_concurrent_trials=at_once
        ),
        run_config=tune.RunConfig(
            name=f"{declared.name}-{full.replace('/', '-')}-{label}",
            storage_path=str((Path(runs_root) / "ray-tune").absolute()),
        ),
    )


def _searcher(sampler: Sampler) -> Any:
    """Return one of our samplers as Tune knows them."""
    from ray.tune.search import Searcher

    class _Searcher(Searcher):
        def __init__(self) -> None:
            super().__init__(metric=METRIC, mode="max")
            self._settings: list[dict[str, Any]] = []
            self._scores: dict[int, float | None] = {}
            self._numbers: dict[str, int] = {}

        def suggest(self, trial_id: str) -> Any:
            """Return the next setting; None while it depends on trials that run, FINISHED at the end."""
            if len(self._numbers) == len(self._settings):
                if len(self._scores) < len(self._settings):
                    return None
                told = [(setting, self._scores[number]) for number, setting in enumerate(self._settings)]
                new = sampler.ask(told)
                if not new:
                    return Searcher.FINISHED
                self._settings += new
            number = self._numbers[trial_id] = len(self._numbers)
            return dict(self._settings[number])

        def on_trial_complete(self, trial_id: str, result: Any = None, error: bool = False) -> None:
            """Keep its score, None if it has none."""
            self._scores[self._numbers[trial_id]] = None if error or not result else result.get(METRIC)

        def save(self, checkpoint_path: str) -> None:
            """Do nothing: the records are what is kept."""

        def restore(self, checkpoint_path: str) -> None:
            """Do nothing: `fit` anew finds the records."""

    return _Searcher()


def _trial(
    task: str, method: str, plan: Plan, common: tuple[str, ...], logs: Path, threads: int
) -> Callable[[Mapping[str, Any]], None]:
    """Return what Tune runs: a setting, once with each seed and fold, in a worker process of its own."""
    folder = Path.cwd()
    carried = {"PYTHONPATH": os.environ["PYTHONPATH"]} if "PYTHONPATH" in os.environ else {}

    def trial(values: Mapping[str, Any]) -> None:
        from ray import tune

        messages: queue.Queue[Mapping[str, Any]] = queue.Queue()
        log = logs / f"tune-{tune.get_context().get_trial_id()}.log"
        scores: list[tuple[float, int]] = []  # top-1 and number of images
        process: WorkerProcess | None = None
        waiting = [
            (Job(task, method, seed, "select", {**values, **fold}, None, common), 0) for seed, fold in plan.runs()
        ]
        try:
            while waiting:
                job, deaths = waiting.pop(0)
                if process is None or not process.alive:
                    process = WorkerProcess(
                        messages.put, folder / log, threads=threads, environment=carried, folder=folder
                    )
                work = Work(len(scores), job, log)
                process.submit(work.number, job.to_json(), retry=deaths > 0, log=folder / log)
                outcome = _outcome(work, messages)
                if outcome.status == "complete" and outcome.top1 is not None:
                    scores.append((outcome.top1, outcome.count))
                elif outcome.status == "claimed":
                    time.sleep(_CLAIM_PAUSE)
                    waiting.insert(0, (job, deaths))
                elif outcome.status == "died" and deaths < _RETRIES:
                    waiting.insert(0, (job, deaths + 1))
                else:
                    raise SvpBenchError(outcome.reason or outcome.status)
        finally:
            if process is not None:
                process.close(busy=False)
                process.wait(20)
        tune.report({METRIC: sum(top1 * count for top1, count in scores) / sum(count for _, count in scores)})

    return trial


def _outcome(work: Work, messages: queue.Queue[Mapping[str, Any]]) -> Any:
    while True:
        event = work.event(messages.get())
        if isinstance(event, Done):
            return event.outcome
