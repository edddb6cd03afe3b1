"""`svp-bench demo`: three tasks, four methods, the embedded weights: real transfer in minutes, offline."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from svp_bench.core.errors import plural
from svp_bench.core.terminal import plain_console
from svp_bench.data.sources import cpu_count
from svp_bench.records.store import check_writable, refuse_unwritable
from svp_bench.report.page import report_path, write_report
from svp_bench.stats.inference import one_standard_error
from svp_bench.sweep.local_pool import LocalPool, visible_gpus
from svp_bench.sweep.plan import execute_jobs
from svp_bench.sweep.scheduler import CellJobs, Sweep
from svp_bench.tables.build import run_table, table_paths
from svp_bench.tasks.cards import load_suite, load_task

Scores = dict[str, dict[str, tuple[float, int]]]  # method → task → top-1 and number of test images

SUITE = "demo-quick"  # three tasks, one of each of VTAB's groups
# The recipes' learning rates are for runs ten times as long; these do well on val at this length.
METHODS: Mapping[str, Mapping[str, Any]] = {
    "svp": {"model.learning_rate": 3e-3},
    "vpt_deep": {"model.learning_rate": 1e-2},
    "full": {"model.learning_rate": 1e-3},
    "linear": {"model.learning_rate": 3e-2},  # the quickest last: no worker waits long for another at the end
}
_MOST_WORKERS = 4  # each a process of its own with some 0.6 GB


def train_demo(results_root: str, runs_root: str) -> int:
    """Train each method on each task, show a leaderboard, write tables and report, and say where everything is.

    Runs that have a record are not run again.

    Args:
        results_root: Where records, tables and the report go.
        runs_root: Where logs and checkpoints go.

    Returns:
        The exit status: 0 if all runs are complete, 1 if one failed, 130 after ctrl-C.

    Raises:
        SvpBenchError: If it cannot begin.
    """
    console = plain_console()
    began = time.perf_counter()
    check_writable(results_root)
    refuse_unwritable(Path(runs_root), "--runs_root")
    tasks = load_suite(SUITE).tasks
    cells = [CellJobs(task, method, method, values=values) for task in tasks for method, values in METHODS.items()]
    roots = ("--results_root", results_root, "--runs_root", runs_root)
    sweep = Sweep(cells, (0,), roots, Path(results_root), retry_failed=True)
    workers = None if visible_gpus() else min(_MOST_WORKERS, cpu_count())  # on GPUs the pool's own default
    pool = LocalPool(workers, None, Path(runs_root) / "sweep-logs")
    title = (
        f"Demo: {plural(len(tasks), 'task')} × {plural(len(METHODS), 'method')}, a Vision Mamba of 0.3 M parameters, "
        "pre-trained on synthetic images"
    )
    status = execute_jobs(console, sweep, pool, title, ("svp-bench", "demo", *roots))
    if status is not None:
        return status
    if not sweep.done:
        return 1
    scores: Scores = defaultdict(dict)
    for done in sweep.done:
        scores[done.job.method][done.job.task] = done.outcome.top1 or 0.0, done.outcome.count or 0
    run_table(results_root, [SUITE])
    write_report(results_root, [SUITE], runs_root=runs_root)
    console.print(leaderboard(scores, tasks))
    console.print(_closing(tasks, results_root, runs_root), soft_wrap=True)
    console.print(f"\n{plural(len(sweep.done), 'run')} in {time.perf_counter() - began:.0f} s.")
    return 1 if sweep.failed else 0


def leaderboard(scores: Mapping[str, Mapping[str, tuple[float, int]]], tasks: Sequence[str]) -> Table:
    """Return top-1 of each method on each task, the best mean first; ± is the standard error from the test images.

    Args:
        scores: Method → task → (top-1 in percent, test images).
        tasks: Full names, in the order of the columns.
    """
    board = Table(title="Top-1 on test, in %", title_justify="left")
    board.add_column("rank", justify="right")
    board.add_column("method", overflow="fold")
    for task in tasks:
        board.add_column(task.split("/")[1], justify="right", overflow="fold")
    board.add_column("mean", justify="right", overflow="fold")

    def mean(method: str) -> float:
        return round(sum(top1 for top1, _ in scores[method].values()) / len(tasks), 2)

    whole = sorted((method for method in scores if len(scores[method]) == len(tasks)), key=mean, reverse=True)
    for method in [*whole, *sorted(set(scores) - set(whole))]:
        errors = {task: one_standard_error(*one) for task, one in scores[method].items()}
        texts = [f"{scores[method][task][0]:.1f} ± {errors[task]:.1f}" if task in errors else "–" for task in tasks]
        rank, average = "–", "–"
        if method in whole:
            rank = str(1 + sum(mean(other) > mean(method) for other in whole))
            average = f"{mean(method):.1f} ± {math.hypot(*errors.values()) / len(tasks):.1f}"
        board.add_row(rank, method, *texts, average)
    return board


def _closing(tasks: Sequence[str], results_root: str, runs_root: str) -> str:
    tables = "\n             ".join(str(path) for path in table_paths(load_suite(SUITE), results_root))
    chance = ", ".join(f"{100 / load_task(task).classes:g}" for task in tasks)
    records = Path(results_root) / "records" / load_suite(SUITE).owner
    return (
        f"± is one standard error from the sampling of the test images; guessing gives {chance} %. One seed and one\n"
        "setting a method: another seed can change the order. results/reference in the repository is for the whole\n"
        "suite with all methods and five seeds, with controls. These results do not predict the ranking on natural\n"
        "images with Vim-S.\n"
        "\n"
        f"report       {report_path(results_root)}   (open it in a browser; it loads nothing)\n"
        f"tables       {tables}\n"
        f"records      {records}\n"
        f"TensorBoard  tensorboard --logdir {runs_root}   (make tensorboard)\n"
        "\n"
        "Next:\n"
        "  svp-bench fit --config configs/demo/count.yaml --method lora --model.learning_rate 1e-2\n"
        "  svp-bench sweep --suite demo-quick --methods svp,lora,linear --seeds 0,1,2    (intervals)\n"
        "  svp-bench fit --config configs/vtab/caltech101.yaml --data.root DIR    (VTAB-1k's images, Vim-S's weights)"
    )
