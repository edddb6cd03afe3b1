"""Subcommands that run many runs: `sweep` and `tune`."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence

from svp_bench.cli.parser import Parser, parser
from svp_bench.core.errors import UsageError, unknown_name
from svp_bench.core.resources import own_tasks_flags
from svp_bench.tasks.cards import list_tasks, load_suite, load_task

__all__ = ["sweep", "tune"]

_EPILOG = "All other flags go to every run: --data.root DIR, --model.backbone NAME, --trainer.max_epochs 10 …"


def sweep(argv: Sequence[str]) -> int:
    """Plan and run a sweep; it goes on where it was cut off."""
    options = parser("sweep", forwards=True)
    options.epilog = (
        "All other flags go to every run: --data.root DIR, --model.backbone NAME, --trainer.max_epochs 10 …"
    )
    options.add_argument("--suite", help="vtab, fgvc, hta, demo, demo-quick: all its tasks")
    options.add_argument("--tasks", help="instead of, or out of, a suite: names, comma-separated")
    options.add_argument("--methods", required=True, help="names or method files, comma-separated")
    options.add_argument("--seeds", default="0", help="comma-separated, e.g. 0,1,2 (default: 0)")
    _shared(options)
    options.add_argument("--search", help="choose settings on val first: e.g. configs/search/default.yaml")
    options.add_argument("--only_search", action="store_true", help="stop once the choices are frozen")
    options.add_argument("--dry_run", action="store_true", help="say what would run, what is there, time and disk")
    options.add_argument("--retry_failed", action="store_true", help="run again what failed in an earlier sweep")
    options.add_argument("--no_report", action="store_true", help="no tables and no page at the end")
    options.add_argument("--engine", choices=("local", "ray"), default="local", help="where the runs go")
    options.add_argument("--gpu_fraction", type=float, help="share of a GPU that a run takes (ray), e.g. 0.25")
    options.add_argument("--ray_address", help="of a running Ray cluster, e.g. auto or ray://host:10001")
    options.add_argument("--shard", help="i/n: only every n-th cell from the i-th on, for job arrays")
    options.add_argument("--emit", choices=("slurm",), help="write a job array instead of running")
    given, rest = options.parse_known_args(argv)
    tasks = _tasks(given.suite, given.tasks)
    methods = _names(given.methods, "--methods")
    seeds = tuple(_seed(text) for text in _names(given.seeds, "--seeds"))
    if given.gpu_fraction is not None and not 0 < given.gpu_fraction <= 1:
        raise UsageError(f"--gpu_fraction is above 0 and at most 1, not {given.gpu_fraction:g}")
    if given.engine != "ray" and (given.gpu_fraction is not None or given.ray_address is not None):
        raise UsageError("--gpu_fraction and --ray_address belong to --engine ray")
    from svp_bench.config.compose import method_layer, split_flags

    for method in methods:
        method_layer(method)  # a mistyped name ends it in a second
    flags = split_flags(rest)
    from svp_bench.sweep.plan import Request, run_sweep

    request = Request(
        tasks=tasks,
        methods=methods,
        seeds=seeds,
        search=given.search,
        engine=given.engine,
        workers=given.workers,
        threads=given.threads,
        gpu_fraction=given.gpu_fraction,
        ray_address=given.ray_address,
        shard=_shard(given.shard),
        dry_run=given.dry_run,
        retry_failed=given.retry_failed,
        only_search=given.only_search,
        report=not given.no_report,
        results_root=given.results_root,
        runs_root=given.runs_root,
        flags=flags,
        command=("svp-bench", "sweep", *argv, *own_tasks_flags()),
    )
    if given.emit:
        if given.shard:
            raise UsageError("--emit slurm makes the shards itself; leave --shard out")
        from svp_bench.sweep.slurm import emit_slurm

        script = emit_slurm(request, [*_without_emit(argv), *own_tasks_flags()])
        print(f"Wrote {script}: {len(tasks) * len(methods)} array elements. Look at its head, then: sbatch {script}")
        return 0
    return run_sweep(request)


def tune(argv: Sequence[str]) -> int:
    """Search one task and method on val, one run after the other, and freeze the choice."""
    options = parser("tune", forwards=True)
    options.epilog = (
        "All other flags go to every run: --data.root DIR, --model.backbone NAME, --trainer.max_epochs 10 …"
    )
    options.add_argument("--task", help="e.g. vtab/dtd")
    options.add_argument("--method", default="svp", help="a name or a method file (default: svp)")
    options.add_argument("--search", default="default", help="a declaration (default: configs/search/default.yaml)")
    options.add_argument(
        "--seeds", default="0", help="seeds of the final runs; a nested search is made for each (default: 0)"
    )
    _shared(options)
    given, rest = options.parse_known_args(argv)
    from svp_bench.config.compose import find_config, method_layer, split_flags

    method_layer(given.method)
    flags = split_flags(rest)
    task, configs = given.task, list(flags.configs)
    if task is None:
        if not configs:
            raise UsageError("no task: give --task vtab/dtd, or --config configs/vtab/dtd.yaml")
        path = find_config(configs.pop(0))
        task = f"{path.parent.name}/{path.stem}"
    task = load_task(task).name
    from dataclasses import replace

    from svp_bench.sweep.plan import Request, run_sweep

    request = Request(
        tasks=(task,),
        methods=(given.method,),
        seeds=tuple(_seed(text) for text in _names(given.seeds, "--seeds")),
        search=given.search,
        engine="local",
        workers=given.workers,
        threads=given.threads,
        gpu_fraction=None,
        ray_address=None,
        shard=(0, 1),
        dry_run=False,
        retry_failed=False,
        only_search=True,
        report=False,
        results_root=given.results_root,
        runs_root=given.runs_root,
        flags=replace(flags, configs=tuple(configs)),
        command=("svp-bench", "tune", *argv, *own_tasks_flags()),
    )
    return run_sweep(request)


def _shared(options: Parser) -> None:
    options.add_argument("--workers", type=_count, help="runs at once (default: one for each GPU, else one)")
    options.add_argument("--threads", type=_count, help="CPU threads of each (default: the cores are shared out)")
    options.add_argument("--results_root", default="results", help="where records, choices and tables go")
    options.add_argument("--runs_root", default="runs", help="where logs and checkpoints go")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least 1")
    return int(text)


def _names(text: str, flag: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"{flag} {text!r}: names separated by commas, none of them empty")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UsageError(f"{flag}: {twice[0]} stands twice")
    return tuple(names)


def _seed(text: str) -> int:
    if not re.fullmatch(r"\d{1,10}", text) or int(text) >= 2**32:
        raise UsageError(f"--seeds: {text!r} is no whole number of 0 to {2**32 - 1}")
    return int(text)


def _tasks(suite: str | None, given: str | None) -> tuple[str, ...]:
    if suite is None and given is None:
        raise UsageError("no tasks: give --suite vtab, or --tasks vtab/dtd,vtab/svhn")
    inside = list_tasks(load_suite(suite).name) if suite is not None else []
    if given is None:
        return tuple(inside)
    names = []
    for name in _names(given, "--tasks"):
        full = name if "/" in name or suite is None else load_suite(suite).full(name)
        names.append(load_task(full).name)
        if suite is not None and names[-1] not in inside:
            raise unknown_name(f"task of the suite {suite}", name, inside)
    return tuple(names)


def _shard(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise UsageError(f"--shard is i/n with i from 0 to n - 1, e.g. 0/4, not {text!r}")
    return int(match[1]), int(match[2])


def _without_emit(argv: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in argv:
        if skip:
            skip = False
        elif argument == "--emit":
            skip = True
        elif not argument.startswith("--emit="):
            kept.append(argument)
    return kept
