"""Execute `svp-bench sweep` and `svp-bench tune`: from flags to a plan, through a pool, to tables and a report."""

from __future__ import annotations

import contextlib
import shlex
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from svp_bench.config.compose import Flags, method_layer
from svp_bench.core.errors import SvpBenchError, UsageError, file_size, plural, printable, unknown_name
from svp_bench.core.terminal import plain_console
from svp_bench.core.yaml import reading_once
from svp_bench.records.digests import cell_config, flat
from svp_bench.records.selection import context_of
from svp_bench.records.store import check_writable, read_records, refuse_unwritable
from svp_bench.report.page import write_report
from svp_bench.sweep.jobs import Job, duration
from svp_bench.sweep.local_pool import LocalPool, Pool
from svp_bench.sweep.lookup import Lookup, PlanCache
from svp_bench.sweep.progress import ProgressView
from svp_bench.sweep.scheduler import CellJobs, Sweep
from svp_bench.sweep.search import Plan, SearchSpace, load_search
from svp_bench.tables.build import run_table, suites_of
from svp_bench.tasks.cards import load_suite

_OWN_KEYS = {  # keys that the sweep sets → the flag to use instead
    "seed_everything": ": use --seeds 0,1,2",
    "data.task": ": use --tasks",
    **dict.fromkeys(("data.stage", "no_test", "resume", "ckpt_path", "results_root", "runs_root"), ""),
}
_TRUNCATING = ("trainer.limit_", "trainer.fast_dev_run", "trainer.overfit_batches", "trainer.max_steps")


@dataclass(frozen=True)
class Request:
    """The flags of `svp-bench sweep`.

    Attributes:
        tasks: Full names.
        methods: Names or method files.
        shard: (i, n): only every n-th pair of task and method, from the i-th on.
        report: Write tables and the report at the end.
        flags: All other flags, which go to every run.
        command: The command line, for messages.
    """

    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    search: str | None
    engine: str
    workers: int | None
    threads: int | None
    gpu_fraction: float | None
    ray_address: str | None
    shard: tuple[int, int]
    dry_run: bool
    retry_failed: bool
    only_search: bool
    report: bool
    results_root: str
    runs_root: str
    flags: Flags
    command: tuple[str, ...]


def execute_sweep(request: Request) -> int:
    """Plan a sweep, run its jobs and report on it.

    Returns:
        The exit status: 0 if all runs are complete (or it was asked to stop by SIGTERM or SIGUSR1), 1 if some failed or
        cannot run, 130 after ctrl-C.

    Raises:
        SvpBenchError: If it cannot begin.
    """
    console = plain_console()
    common = _common(request)
    search = load_search(request.search) if request.search else None
    names = [(task, method) for task in request.tasks for method in request.methods]
    index, of = request.shard
    cells = [CellJobs(task, method, method_layer(method)[2]) for task, method in names[index::of]]
    if request.dry_run:
        console.print(f"{plural(len(cells), 'cell')} (task and method); looking for records …")
    else:
        check_writable(request.results_root)
        refuse_unwritable(Path(request.runs_root), "--runs_root")
    cache = PlanCache() if request.dry_run else None
    runner = Lookup(cache)
    with reading_once():
        read = _prepare(cells, common, search, runner)
    sweep = Sweep(
        cells,
        request.seeds,
        common,
        Path(request.results_root),
        search=search,
        retry_failed=request.retry_failed,
        only_search=request.only_search,
    )
    _warn_of_changes(console, read)
    _print_search(console, search, cells, request)
    if request.dry_run:
        with reading_once():
            _print_plan(console, sweep, request, runner)
        if cache is not None:
            cache.save()
        return 1 if sweep.blocked else 0
    settings = f"search {search.name} (K = {search.budget}, {search.sampler})" if search else "default settings"
    title = f"Sweep: {plural(len(cells), 'cell')} × {plural(len(request.seeds), 'seed')}, {settings}"
    status = execute_jobs(console, sweep, _pool(request), title, request.command)
    if status is not None:
        return status
    if request.report and not request.only_search and sweep.done:
        owners = {task.split("/")[0] for task in request.tasks}
        shown = suites_of(read_records(request.results_root)[0])
        suites = [name for name in shown if load_suite(name).owner in owners]
        console.print(run_table(request.results_root, suites), soft_wrap=True, end="")
        page = write_report(request.results_root, suites, runs_root=request.runs_root)
        console.print(page, soft_wrap=True, end="")
    return 1 if sweep.failed or sweep.blocked else 0


def _common(request: Request) -> tuple[str, ...]:
    """Return the flags that all jobs share."""
    flags = request.flags
    if flags.method is not None or flags.selected_config is not None:
        raise UsageError("a sweep takes --methods NAME,NAME, and finds its own selected configs")
    for key in flags.values:
        if key in _OWN_KEYS:
            raise UsageError(f"--{key} is the sweep's own{_OWN_KEYS[key]}")
        if key.startswith(_TRUNCATING):
            raise UsageError(f"--{key} makes truncated runs, which no table takes; use --trainer.max_epochs")
    layers = [part for config in flags.configs for part in ("--config", config)]
    return (*layers, *flags.rest, "--results_root", request.results_root, "--runs_root", request.runs_root)


def _warn_of_changes(console: Console, read: set[Path]) -> None:
    """Warn before training that an audit will fail the records, if code or the cards of `read` are not committed."""
    from svp_bench.train.provenance import changed_cards, commit_and_dirty, dirty_warning

    commit, dirty = commit_and_dirty()
    cards = changed_cards(read) if commit else []
    if dirty or cards:
        console.print(f"Warning: {dirty_warning(commit, cards)}", soft_wrap=True, markup=False)


def _prepare(
    cells: Sequence[CellJobs], common: tuple[str, ...], search: SearchSpace | None, runner: Lookup
) -> set[Path]:
    """Complete cells in place: plan and context of a search, or why a cell cannot run.

    Returns:
        Cards and configs of all cells.
    """
    read: set[Path] = set()
    for cell in cells:
        job = Job(cell.task, cell.method, 0, "select" if search else "final", common=common)
        resolved = runner.resolved(job)  # a wrong flag ends the sweep before it begins
        read.update(resolved.read)
        try:
            runner.report(resolved)
        except SvpBenchError as error:
            cell.blocked = str(error)
        if cell.blocked:
            continue
        cell.checkpoint_digest, _ = runner.weights(resolved)  # missing weights end the sweep before it begins
        if search is None:
            continue
        known = dict(flat(resolved.config))
        keys = [dimension.key for dimension in search.space(cell.label)]
        for key in keys:
            if key not in known:
                what = f"config key of the search {search.name} for {cell.label}"
                raise unknown_name(what, key, known, where=str(search.path))
        cell.default = {key: known[key] for key in keys}
        cell.context = context_of(cell_config(resolved.config), keys, resolved.sources)
        cell.plan = runner.plan(search, resolved)
        _, fold = cell.plan.runs([0], 0)[0]
        cell.data_digest = runner.report(runner.resolved(replace(job, values=fold))).digest
    if cells and all(cell.blocked for cell in cells):
        raise SvpBenchError(f"none of the tasks can run: {cells[0].blocked}")
    return read


def _print_search(console: Console, search: SearchSpace | None, cells: Sequence[CellJobs], request: Request) -> None:
    """Print how many runs a setting of a search has, and how many searches there are."""
    tasks: dict[Plan, dict[str, None]] = defaultdict(dict)
    for cell in cells if search is not None else ():
        if cell.blocked is None:
            tasks[cell.plan][cell.task] = None
    for plan, names in tasks.items():
        assert search is not None
        many = len(request.seeds) if search.nested else 1
        searches = (" × 1 search" if many == 1 else f" × {many} searches, one for each seed") if search.nested else ""
        on = f"{plan.folds} folds of the labelled images" if plan.folds else "val"
        on += f", divided {plan.repeats} times" if plan.repeats > 1 else ""
        runs = len(plan.runs(search.seeds or (0,), 0))
        console.print(
            f"Search on {on}: up to {plural(search.budget, 'setting')} × {plural(runs, 'run')}{searches} = "
            f"{search.budget * runs * many} trial runs a method and task ({', '.join(names)})",
            soft_wrap=True,
            markup=False,
        )


# ------------------------------------------------------------------------------------------------------------- dry run


def _print_plan(console: Console, sweep: Sweep, request: Request, runner: Lookup) -> None:
    """Print the jobs of a sweep by method, those that have records already, the time and the disk space."""
    rows: dict[str, dict[str, Any]] = defaultdict(lambda: defaultdict(int))
    epoch: dict[tuple[str, ...], list[float]] = defaultdict(list)  # seconds of an epoch, with its part of the test
    for record in read_records(request.results_root)[0]:
        if record.status == "complete" and record.epochs:
            of = record.backbone, record.method, record.kind
            for key in (of, (*of, record.task)):
                epoch[key].append(sum(record.times.values()) / record.epochs)
    unknown = 0
    for job in sweep.due:
        row = rows[job.method]
        row["trials" if job.stage == "select" else "runs"] += 1
        try:
            found = runner.look(job)
            size = runner.checkpoint_bytes(job) if job.stage == "final" else 0  # that of a trial is deleted
        except UsageError as error:  # an impossible setting of a grid: the sweep will list it as failed
            console.print(f"Cannot run: {job.name}: {error}", soft_wrap=True, markup=False)
            row["failed"] += 1
            continue
        if found is not None and found.status == "complete":
            row["there"] += 1
            continue
        if found is not None and not request.retry_failed:
            row["failed"] += 1
            continue
        row["to do"] += 1
        row["bytes"] += size
        config = runner.resolved(job).config
        of = str(config["model"]["backbone"]), job.method, "selection" if job.stage == "select" else "final"
        if times := epoch.get((*of, job.task)) or epoch.get(of):
            row["seconds"] += median(times) * int(config["trainer"]["max_epochs"])
        else:
            unknown += 1
    for job in sweep.to_come:
        rows[job.method]["bytes"] += runner.checkpoint_bytes(job)
    table = Table(box=None, pad_edge=False, padding=(0, 1))
    for name in ("method", "trials", "runs", "there", "failed", "to do", "time", "disk"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for method, row in rows.items():
        time = duration(row["seconds"]) if row["seconds"] else ("unknown" if row["to do"] else "–")
        counts = [str(row[key]) for key in ("trials", "runs", "there", "failed", "to do")]
        table.add_row(method, *counts, time, file_size(row["bytes"]) if row["bytes"] else "–")
    console.print(table)
    if sweep.to_come:
        console.print(f"{plural(len(sweep.to_come), 'final run')} to come after the searches.")
    slots, total = request.workers or 1, sum(row["seconds"] for row in rows.values())
    if total:
        several = f" with {plural(slots, 'worker')}, if they do not slow each other" if slots > 1 else ""
        without = f"; {plural(unknown, 'run')} without such records are not in it" if unknown else ""
        console.print(
            f"Time: about {duration(total / slots)}{several}, from records of the same backbones and methods{without}.",
            soft_wrap=True,
        )
    elif unknown:
        console.print("Time: unknown, since there are no records of these backbones and methods.")
    disk, folder = sum(row["bytes"] for row in rows.values()), Path(request.runs_root).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.is_dir())).free
    needed = f"about {file_size(disk)} for checkpoints of final runs" if disk else "no new checkpoint of a final run"
    console.print(f"Disk: {needed}; {file_size(free)} are free.", soft_wrap=True)
    for cell in sweep.blocked:
        console.print(printable(f"Cannot run: {cell.task}, {cell.label}: {cell.blocked}"), soft_wrap=True)


# ----------------------------------------------------------------------------------------------------------------- run


def _pool(request: Request) -> Pool:
    logs = Path(request.runs_root) / "sweep-logs"
    if request.engine == "local":
        return LocalPool(request.workers, request.threads, logs)
    from svp_bench.sweep.ray_pool import RayPool

    return RayPool(
        workers=request.workers,
        threads=request.threads,
        gpu_fraction=request.gpu_fraction,
        address=request.ray_address,
        logs=logs,
        shared=[Path(request.results_root)],
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT, SIGTERM and SIGUSR1 instead of dying of them (in the main thread)."""
    numbers: list[int] = []
    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]  # Windows lacks the last
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in names):
            before[number] = signal.signal(number, lambda number, _: numbers.append(number))
    try:
        yield numbers
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def execute_jobs(console: Console, sweep: Sweep, pool: Pool, title: str, command: Sequence[str]) -> int | None:
    """Run the jobs of a sweep in a pool, close it, and print how the sweep ended.

    Args:
        console: Where to.
        sweep: The sweep.
        pool: The pool.
        title: The first line.
        command: Of the sweep; it continues a stopped one.

    Returns:
        The exit status if it was asked to stop, else None.
    """
    with pool, _stop_signals() as signals:  # inside of the pool, since ray.init sets handlers too

        def asked_to_stop() -> bool:
            if signals.count(signal.SIGINT) > 1:
                raise KeyboardInterrupt  # a second ctrl-C does not wait for the runs to save
            return bool(signals)

        console.print(f"{title}; {pool.what}", soft_wrap=True)
        with ProgressView(console, sweep, pool.what) as view:
            sweep.run(pool, view.report, view.tick, asked_to_stop)
    new = sum(not done.outcome.found for done in sweep.done)
    console.print(
        f"{plural(len(sweep.done), 'run')} complete ({new} new), {len(sweep.failed)} failed, "
        f"{plural(len(sweep.blocked), 'cell')} cannot run, "
        f"{len(sweep.due) + len(sweep.later) + len(sweep.stopped)} left.",
        soft_wrap=True,
    )
    lines = []
    for done in sweep.failed:
        log = f" (log: {done.outcome.log})" if done.outcome.log else ""
        lines.append(f"  failed: {done.job.name}: {done.outcome.reason}{log}")
    lines += [f"  cannot run: {cell.task}, {cell.label}: {cell.blocked}" for cell in sweep.blocked]
    for line in lines:
        console.print(printable(line), soft_wrap=True)
    if sweep.failed:
        how = "" if sweep.retry_failed else " with --retry_failed"
        console.print(f"Once the cause is fixed: the same command{how}.")
    if not sweep.stopping:
        return None
    saved = sum(done.outcome.status == "stopped" for done in sweep.stopped)
    what = f"{plural(saved, 'running job')} saved" if saved else "no job had begun to train"
    console.print(f"Stopped; {what}. Continue: {shlex.join(command)}", soft_wrap=True)
    return 130 if signal.SIGINT in signals else 0
