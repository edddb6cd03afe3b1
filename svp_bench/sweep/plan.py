"""`svp-bench sweep` and `svp-bench tune`: from flags to a plan, through a pool, to tables and a report."""

from __future__ import annotations

import contextlib
import shlex
import signal
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from svp_bench.config.compose import Flags, method_layer
from svp_bench.core.errors import SvpBenchError, UsageError, file_size, plural, printable, unknown_name
from svp_bench.core.terminal import plain_console
from svp_bench.data.sources import measured
from svp_bench.records.record import Record
from svp_bench.records.selection import read_selected_config
from svp_bench.records.store import check_writable, read_records, refuse_unwritable
from svp_bench.report.page import run_report
from svp_bench.sweep.jobs import Job, common_arguments
from svp_bench.sweep.local_pool import LocalPool, Pool
from svp_bench.sweep.progress import View, duration
from svp_bench.sweep.scheduler import Cell, Sweep, searched_context
from svp_bench.sweep.search import Plan, Search, load_search
from svp_bench.tables.build import run_table, suites_of
from svp_bench.tasks.cards import load_suite, load_task

__all__ = ["Asked", "Request", "asked_by_signals", "conclude", "run_sweep"]

_NOT_HERE = (
    "seed_everything",
    "data.task",
    "data.stage",
    "no_test",
    "resume",
    "ckpt_path",
    "results_root",
    "runs_root",
)
_TRUNCATING = ("trainer.limit_", "trainer.fast_dev_run", "trainer.overfit_batches", "trainer.max_steps")


@dataclass(frozen=True)
class Request:
    """What a sweep was asked for.

    Attributes:
        tasks: Full names.
        methods: Names or method files.
        seeds: Of the final runs.
        search: Name or file of a search declaration, or None.
        engine: "local" or "ray".
        workers: Jobs at once, or None for what the engine has.
        threads: CPU threads of each worker, or None.
        gpu_fraction: Share of a GPU that a job takes (Ray).
        ray_address: Of a Ray cluster.
        shard: (i, n): only every n-th cell, from the i-th on.
        dry_run: Say what would be run, and run nothing.
        retry_failed: Run again what failed earlier.
        only_search: Stop at the selected configs.
        report: Write tables and the report at the end.
        results_root: Where records, selected configs and tables go.
        runs_root: Where logs and checkpoints go.
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


def run_sweep(request: Request) -> int:
    """Plan, run and report a sweep.

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
    cells = [Cell(task, method, _label(method)) for task, method in names[index::of]]
    if request.dry_run:
        console.print(f"{plural(len(cells), 'cell')} (task and method); looking what is there …")
    else:
        check_writable(request.results_root)
        refuse_unwritable(Path(request.runs_root), "--runs_root")
    prepared = _Prepared(cells, common, search)
    sweep = Sweep(
        cells,
        request.seeds,
        common,
        Path(request.results_root),
        search=search,
        retry_failed=request.retry_failed,
        only_search=request.only_search,
    )
    _warn_of_changes(console, prepared)
    if request.dry_run:
        _print_plan(console, sweep, request, prepared)
        return 1 if sweep.blocked else 0
    with _pool(request) as pool, asked_by_signals() as asked:  # in this order: ray.init sets handlers too
        console.print(
            f"Sweep: {plural(len(cells), 'cell')} × {plural(len(request.seeds), 'seed')}"
            + (f", search {search.name} (K = {search.budget}, {search.sampler})" if search else ", default settings")
            + f"; {pool.what}",
            soft_wrap=True,
        )
        if search is not None:
            _print_search(console, search, cells, request)
        with View(console, pool.what) as view:
            sweep.run(pool, view, asked.soft)
    status = conclude(console, sweep, request.command, asked)
    for line in selection_notes(sweep):
        console.print(line, soft_wrap=True, markup=False)
    if status is not None:
        return status
    if request.report and not request.only_search and sweep.done:
        owners = {task.split("/")[0] for task in request.tasks}
        shown = suites_of(read_records(request.results_root)[0])
        suites = [name for name in shown if load_suite(name).owner in owners]
        console.print(run_table(request.results_root, suites), soft_wrap=True, end="")
        page = run_report(request.results_root, suites, runs_root=request.runs_root)
        console.print(page, soft_wrap=True, end="")
    return 1 if sweep.failed or sweep.blocked else 0


def _common(request: Request) -> tuple[str, ...]:
    flags = request.flags
    if flags.method is not None or flags.selected_config is not None:
        raise UsageError("a sweep takes --methods NAME,NAME, and finds its own selected configs")
    for key in flags.values:
        if key in _NOT_HERE:
            hint = {"seed_everything": "--seeds 0,1,2", "data.task": "--tasks"}.get(key)
            raise UsageError(f"--{key} is the sweep's own{f': use {hint}' if hint else ''}")
        if key.startswith(_TRUNCATING):
            raise UsageError(f"--{key} makes truncated runs, which no table takes; use --trainer.max_epochs")
    return common_arguments(flags.configs, flags.rest, request.results_root, request.runs_root)


def _label(method: str) -> str:
    _, _, label = method_layer(method)
    return label


def _warn_of_changes(console: Console, prepared: _Prepared) -> None:
    """Say before anything is trained that an audit will fail the records, if code or cards are not committed."""
    from svp_bench.train.provenance import changed_cards, commit_and_dirty, dirty_warning  # torch

    commit, dirty = commit_and_dirty()
    cards = changed_cards(prepared.read) if commit else []
    if dirty or cards:
        console.print(f"Warning: {dirty_warning(commit, cards)}", soft_wrap=True, markup=False)


class _Prepared:
    """What the plan needs to know of each cell: parsed once, in this process.

    Args:
        cells: Are completed in place: default values and context of a search, or why a cell cannot run.
        common: Flags of all jobs.
        search: The declaration, or None.
    """

    def __init__(self, cells: Sequence[Cell], common: tuple[str, ...], search: Search | None) -> None:
        from svp_bench.sweep.runner import Runner  # torch

        self.cells = cells
        self.runner = Runner()
        self.read: set[Path] = set()  # cards and configs of all cells
        missing: dict[str, str] = {}
        for cell in cells:
            stage = "final" if search is None else "select"
            job = Job(cell.task, cell.method, 0, stage, common=common)
            resolved = self.runner.resolved(job)  # a wrong flag ends the sweep before it begins
            self.read.update(resolved.read)
            if cell.task not in missing:
                try:
                    self.runner.report(resolved)
                    missing[cell.task] = ""
                except SvpBenchError as error:
                    missing[cell.task] = str(error)
            if missing[cell.task]:
                cell.blocked = missing[cell.task]
                continue
            weights, _ = self.runner.weights(resolved)
            if search is not None:
                cell.checkpoint_digest = weights
                cell.plan = self.runner.plan(search, resolved)
                _, fold = cell.plan.runs()[0]
                cell.data_digest = self.runner.report(self.runner.resolved(replace(job, values=fold))).digest
                keys = [dimension.key for dimension in search.space(cell.label)]
                cell.default = self.runner.default_values(job, keys)
                unknown = [key for key in keys if not self.runner.knows(job, key)]
                if unknown:
                    raise unknown_name(
                        f"config key of the search {search.name} for {cell.label}",
                        unknown[0],
                        self.runner.keys(job),
                        where=str(search.path),
                    )
                cell.context = searched_context(resolved.config, keys, resolved.sources)
        if cells and all(cell.blocked for cell in cells):
            raise SvpBenchError(f"none of the tasks can run: {cells[0].blocked}")


# ---------------------------------------------------------------------------------------------------------------- plan


def _print_search(console: Console, search: Search, cells: Sequence[Cell], request: Request) -> None:
    """Say how many runs a setting of a search is, and how many searches there are."""
    of_tasks: dict[Plan, list[str]] = {}
    for cell in cells:
        if cell.blocked is None and cell.task not in of_tasks.setdefault(cell.plan, []):
            of_tasks[cell.plan].append(cell.task)
    many = len(request.seeds) if search.nested else 1
    searches = (" × 1 search" if many == 1 else f" × {many} searches, one for each seed") if search.nested else ""
    for plan, tasks in of_tasks.items():
        runs = len(plan.runs())
        if plan.folds:
            on = f"{plan.folds} folds of the labelled images"
            on += f", divided {plan.repeats} times" if plan.repeats > 1 else ""
        else:
            on = "val"
        seeds = f" with {plural(len(plan.seeds), 'seed')}" if len(plan.seeds) > 1 else ""
        console.print(
            f"Search on {on}{seeds}: up to {plural(search.budget, 'setting')} × {plural(runs, 'run')}{searches} = "
            f"{search.budget * runs * many} trial runs a method and task ({', '.join(tasks)})",
            soft_wrap=True,
            markup=False,
        )


def selection_notes(sweep: Sweep) -> list[str]:
    """Return notes on the selected configs of a sweep, a line each: ends of the grid, unequal completion."""
    selected_configs = []
    for cell in sweep.cells:
        if cell.selected is not None and Path(cell.selected).is_file():
            selected_configs.append(read_selected_config(cell.selected))
    if not selected_configs:
        return []
    lines = []
    at_edge: dict[str, dict[str, None]] = defaultdict(dict)
    for selected in selected_configs:
        for text in selected.at_edge:
            at_edge[f"{selected.method}: {text}"][selected.task] = None
    lines += [
        f"At the end of the grid, so that a wider one might do better: {text} ({', '.join(tasks)})"
        for text, tasks in at_edge.items()
    ]
    lost = [selected for selected in selected_configs if selected.completed < len(selected.trials)]
    if lost:
        counts: dict[str, None] = {}
        for selected in lost:
            seed = "" if selected.search_seed is None else f", seed {selected.search_seed}"
            counts[f"{selected.method} {selected.completed} of {len(selected.trials)} ({selected.task}{seed})"] = None
        others = sorted({selected.completed for selected in selected_configs if selected not in lost})
        rest = f"; the others completed all of {' or '.join(map(str, others))}" if others else ""
        lines.append(f"Not every method has as many trials with a score: {', '.join(counts)}{rest}")
    return lines


def _print_plan(console: Console, sweep: Sweep, request: Request, prepared: _Prepared) -> None:
    rows: dict[str, dict[str, Any]] = {}
    records, _ = read_records(request.results_root)
    speed = _Speed(records)
    total_seconds, unknown, disk = 0.0, 0, 0
    for job in sweep.due:
        row = rows.setdefault(job.method, defaultdict(int))
        try:
            there = prepared.runner.look(job)
        except UsageError as error:  # an impossible setting of a grid: the sweep will list it as failed
            console.print(f"Cannot run: {job.name}: {error}", soft_wrap=True, markup=False)
            row["trials"] += 1
            row["failed"] += 1
            continue
        kind = "trials" if job.stage == "select" else "runs"
        row[kind] += 1
        if there is not None and there.status == "complete":
            row["there"] += 1
            continue
        if there is not None and not request.retry_failed:
            row["failed"] += 1
            continue
        row["to do"] += 1
        seconds = speed.seconds(prepared.runner.resolved(job).config, job.method)
        if seconds is None:
            unknown += 1
        else:
            row["seconds"] += seconds
            total_seconds += seconds
        if job.stage == "final":
            size = prepared.runner.checkpoint_bytes(job)
            row["bytes"] += size
            disk += size
    if sweep.search is not None:
        _print_search(console, sweep.search, prepared.cells, request)
    table: list[tuple[str, ...]] = [("method", "trials", "runs", "there", "failed", "to do", "time", "disk")]
    for method, row in rows.items():
        time = f"{duration(row['seconds'])}" if row["seconds"] else ("unknown" if row["to do"] else "–")
        counts = [str(row[key]) for key in ("trials", "runs", "there", "failed", "to do")]
        table.append((method, *counts, time, file_size(row["bytes"]) if row["bytes"] else "–"))
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    for line in table:
        _, *rest = (text.rjust(width) for text, width in zip(line, widths, strict=True))
        console.print(f"  {line[0].ljust(widths[0])}  {'  '.join(rest)}", soft_wrap=True)
    if sweep.to_come:
        console.print(f"{plural(sweep.to_come, 'final run')} to come after the searches.")
    slots = request.workers or 1
    if total_seconds:
        several = f" with {plural(slots, 'worker')}, if they do not slow each other" if slots > 1 else ""
        console.print(
            f"Time: about {duration(total_seconds / slots)}{several}, from the throughput in {speed.what}"
            + (f"; {unknown} runs of methods without a record are not in it." if unknown else "."),
            soft_wrap=True,
        )
    elif unknown:
        console.print("Time: unknown, since no record here tells how fast these methods run on this machine.")
    free = _free(Path(request.runs_root))
    needed = f"about {file_size(disk)} for checkpoints of final runs" if disk else "no new checkpoint of a final run"
    console.print(f"Disk: {needed}; {file_size(free)} are free.")
    for cell in sweep.blocked:
        console.print(printable(f"Cannot run: {cell.task}, {cell.label}: {cell.blocked}"), soft_wrap=True)


class _Speed:
    """Seconds of a run, from records of the same backbone and method."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._train: dict[tuple[str, str], list[float]] = defaultdict(list)
        self._test: dict[str, list[float]] = defaultdict(list)
        devices: set[str] = set()
        for record in records:
            if record.status != "complete" or not record.epochs or "train_seconds" not in record.times:
                continue
            images = _images(record.task, record.splits.get("train"))
            if images:
                seconds = record.times["train_seconds"] / (record.epochs * images)
                self._train[record.backbone, record.method].append(seconds)
                devices.add(record.device)
            scored = record.metrics.count if record.metrics else 0
            spent = record.times.get("test_seconds", record.times.get("val_seconds"))
            if spent is not None and scored and record.kind == "final":
                self._test[record.backbone].append(spent / scored)
        self.what = f"records of {', '.join(sorted(devices))}" if devices else "no records"

    def seconds(self, config: dict[str, Any], method: str) -> float | None:
        """Return the expected seconds of a run, or None."""
        backbone = str(config["model"]["backbone"])
        spent = self._train.get((backbone, method))
        if not spent:
            return None
        root = config["data"].get("root")
        card = measured(load_task(str(config["data"]["task"])), Path(root) if root else None)
        from svp_bench.tasks.cards import load_protocol

        protocol = load_protocol(str(config["data"].get("protocol") or load_suite(card.suite).protocol))
        lists = protocol.stages[str(config["data"].get("stage") or "final")]
        epochs, folds = int(config["trainer"]["max_epochs"]), int(config["data"]["cross_validation"]["folds"] or 0)
        if folds:
            labelled = card.counts[protocol.stages["final"]["train"]]
            train, scored = labelled - labelled // folds, labelled // folds
        else:
            train, scored = card.counts[lists["train"]], card.counts[lists.get("test", lists.get("val", ""))]
        seconds = sorted(spent)[len(spent) // 2] * epochs * train
        tests = self._test.get(backbone)
        rounds = 1 if "test" in lists else epochs
        return seconds + (sorted(tests)[len(tests) // 2] * scored * rounds if tests else 0.0)


def _images(task: str, name: str | None) -> int:
    try:
        return load_task(task).counts.get(name or "", 0)
    except SvpBenchError:
        return 0


def _free(folder: Path) -> int:
    import shutil

    place = folder.absolute()
    while not place.is_dir():
        place = place.parent
    return shutil.disk_usage(place).free


# ----------------------------------------------------------------------------------------------------------------- run


@contextlib.contextmanager
def _pool(request: Request) -> Iterator[Pool]:
    logs = Path(request.runs_root) / "sweep-logs"
    if request.engine == "ray":
        from svp_bench.sweep.ray_pool import RayPool

        with RayPool(
            workers=request.workers,
            threads=request.threads,
            gpu_fraction=request.gpu_fraction,
            address=request.ray_address,
            logs=logs,
            shared=[Path(request.results_root)],
        ) as pool:
            yield pool
        return
    with LocalPool(request.workers, request.threads, logs) as pool:
        yield pool


class Asked:
    """Signals that asked to stop."""

    def __init__(self) -> None:
        self.signals: list[int] = []

    def soft(self) -> bool:
        """Whether to stop; a second ctrl-C does not wait for the runs to save."""
        if self.signals.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        return bool(self.signals)


@contextlib.contextmanager
def asked_by_signals() -> Iterator[Asked]:
    """Collect SIGINT, SIGTERM and SIGUSR1 instead of dying of them (in the main thread)."""
    asked = Asked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def hear(number: int, frame: FrameType | None) -> None:
        asked.signals.append(number)

    names = [name for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    before = {name: signal.signal(getattr(signal, name), hear) for name in names}
    try:
        yield asked
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def conclude(console: Console, sweep: Sweep, command: Sequence[str], asked: Asked) -> int | None:
    """Say how a sweep ended.

    Args:
        console: Where to.
        sweep: It.
        command: Of the sweep; it continues a stopped one.
        asked: The signals that came.

    Returns:
        The exit status if it was stopped, else None.
    """
    new = sum(not ended.outcome.found for ended in sweep.done)
    console.print(
        f"{plural(len(sweep.done), 'run')} complete ({new} new), {len(sweep.failed)} failed, "
        f"{plural(len(sweep.blocked), 'cell')} cannot run, "
        f"{len(sweep.due) + len(sweep.later) + len(sweep.stopped)} left.",
        soft_wrap=True,
    )
    for ended in sweep.failed:
        log = f" (log: {ended.outcome.log})" if ended.outcome.log else ""
        console.print(printable(f"  failed: {ended.job.name}: {ended.outcome.reason}{log}"), soft_wrap=True)
    for cell in sweep.blocked:
        console.print(printable(f"  cannot run: {cell.task}, {cell.label}: {cell.blocked}"), soft_wrap=True)
    if sweep.failed:
        how = "" if sweep.retry_failed else " with --retry_failed"
        console.print(f"Once the cause is fixed: the same command{how}.")
    if sweep.stopping:
        saved = sum(ended.outcome.status == "stopped" for ended in sweep.stopped)
        what = f"{plural(saved, 'running job')} saved" if saved else "no job had begun to train"
        console.print(f"Stopped; {what}. Continue: {shlex.join(command)}", soft_wrap=True)
        return 130 if signal.SIGINT in asked.signals else 0
    return None
