"""Subcommands of many runs: `sweep` and `tune`."""

from __future__ import annotations

import re
from argparse import ArgumentTypeError
from collections.abc import Iterator
from typing import Annotated, Literal

from svp_bench.cli.parser import CommandLine, whole_number
from svp_bench.core.errors import UsageError, unknown_name
from svp_bench.core.resources import custom_tasks_flags
from svp_bench.tasks.cards import list_tasks, load_suite, load_task


def _names(text: str) -> tuple[str, ...]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise ArgumentTypeError(f"{text!r}: names separated by commas, none of them empty")
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ArgumentTypeError(f"{twice[0]} is given twice")
    return tuple(names)


def _seeds(text: str) -> tuple[int, ...]:
    return tuple(whole_number(0, 2**32 - 1)(name) for name in _names(text))


def _share(text: str) -> float:
    if 0.01 <= float(text) <= 1:
        return float(text)
    raise ArgumentTypeError(f"{text!r} is not 0.01 to 1")


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not int(match[1]) < int(match[2]):
        raise ArgumentTypeError(f"{text!r} is not i/n with i from 0 to n - 1, e.g. 0/4")
    return int(match[1]), int(match[2])


def sweep(
    *rest: str,
    suite: str | None = None,
    tasks: Annotated[tuple[str, ...] | None, _names] = None,
    methods: Annotated[tuple[str, ...], _names],
    seeds: Annotated[tuple[int, ...], _seeds] = (0,),
    workers: Annotated[int | None, whole_number(1)] = None,
    threads: Annotated[int | None, whole_number(1)] = None,
    results_root: str = "results",
    runs_root: str = "runs",
    search: str | None = None,
    only_search: bool = False,
    dry_run: bool = False,
    retry_failed: bool = False,
    no_report: bool = False,
    engine: Literal["local", "ray"] = "local",
    gpu_fraction: Annotated[float | None, _share] = None,
    ray_address: str | None = None,
    shard: Annotated[tuple[int, int] | None, _shard] = None,
    emit: Literal["slurm"] | None = None,
    command_line: CommandLine,
) -> int:
    """Run methods × tasks × seeds, searching on val first if asked to; resume an interrupted sweep.

    All other flags go to every run: --data.root DIR, --model.backbone NAME, --trainer.max_epochs 10 …

    Args:
        *rest: Flags of all runs.
        suite: All tasks of vtab, fgvc, hta, demo or demo-quick.
        tasks: Instead of a suite, or some of it: names, comma-separated.
        methods: Names or method files, comma-separated.
        seeds: Comma-separated, e.g. 0,1,2.
        workers: Runs at once; by default one for each GPU, else one.
        threads: CPU threads of each run; by default the cores are divided.
        results_root: Where records, selected configs and tables are written.
        runs_root: Where logs and checkpoints are written.
        search: Select hyper-parameters on val first, e.g. configs/search/default.yaml.
        only_search: Stop once the configs are selected.
        dry_run: Print the runs, those that exist already, the time and the disk space.
        retry_failed: Run again the runs that failed in an earlier sweep.
        no_report: Write neither tables nor the report at the end.
        engine: Where the runs are executed.
        gpu_fraction: Share of a GPU for each run (ray), e.g. 0.25.
        ray_address: Address of a Ray cluster, e.g. auto or ray://host:10001.
        shard: Only every n-th pair of task and method from the i-th on, for job arrays: i/n.
        emit: Write a job array instead of running.
        command_line: The command as typed.
    """
    if engine != "ray" and (gpu_fraction is not None or ray_address is not None):
        raise UsageError("--gpu_fraction and --ray_address belong to --engine ray")
    if emit and shard is not None:
        raise UsageError("--emit slurm creates the shards itself; leave --shard out")
    from svp_bench.config.compose import method_layer, split_flags

    selected = tuple(_tasks(suite, tasks))
    for method in methods:
        method_layer(method)  # reports an unknown name before torch is imported
    flags = split_flags(rest)
    from svp_bench.sweep.plan import Request, execute_sweep

    request = Request(
        tasks=selected,
        methods=methods,
        seeds=seeds,
        search=search,
        engine=engine,
        workers=workers,
        threads=threads,
        gpu_fraction=gpu_fraction,
        ray_address=ray_address,
        shard=shard or (0, 1),
        dry_run=dry_run,
        retry_failed=retry_failed,
        only_search=only_search,
        report=not no_report,
        results_root=results_root,
        runs_root=runs_root,
        flags=flags,
        command=("svp-bench", *command_line, *custom_tasks_flags()),
    )
    if emit:
        from svp_bench.sweep.slurm import emit_slurm

        script = emit_slurm(request, [*_without(("--emit",), command_line)[1:], *custom_tasks_flags()])
        print(f"Wrote {script}: {len(selected) * len(methods)} array elements. Check its head, then: sbatch {script}")
        return 0
    return execute_sweep(request)


def tune(
    *rest: str,
    task: str | None = None,
    method: str = "svp",
    search: str = "default",
    seeds: Annotated[tuple[int, ...], _seeds] = (0,),
    workers: Annotated[int | None, whole_number(1)] = None,
    threads: Annotated[int | None, whole_number(1)] = None,
    results_root: str = "results",
    runs_root: str = "runs",
    command_line: CommandLine,
) -> int:
    """Search the hyper-parameters of one method on one task, on val.

    All other flags go to every run: --data.root DIR, --model.backbone NAME, --trainer.max_epochs 10 …

    Args:
        *rest: Flags of all runs.
        task: Its name, e.g. vtab/dtd; by default that of the first --config.
        method: A name or a method file.
        search: A search declaration, by name or path.
        seeds: Seeds of the final runs; a nested search is run for each.
        workers: Runs at once; by default one for each GPU, else one.
        threads: CPU threads of each run; by default the cores are divided.
        results_root: Where records and selected configs are written.
        runs_root: Where logs and checkpoints are written.
        command_line: The command as typed.
    """
    from svp_bench.config.compose import find_config, split_flags

    if task is None:
        configs = split_flags(rest).configs
        if not configs:
            raise UsageError("no task: give --task vtab/dtd, or --config configs/vtab/dtd.yaml")
        path = find_config(configs[0])
        task, rest = f"{path.parent.name}/{path.stem}", _without(("--config", "-c"), rest)
    return sweep(
        *rest,
        tasks=(task,),
        methods=(method,),
        seeds=seeds,
        workers=workers,
        threads=threads,
        results_root=results_root,
        runs_root=runs_root,
        search=search,
        only_search=True,
        no_report=True,
        command_line=command_line,
    )


def _tasks(suite: str | None, given: tuple[str, ...] | None) -> Iterator[str]:
    if suite is None and given is None:
        raise UsageError("no tasks: give --suite vtab, or --tasks vtab/dtd,vtab/svhn")
    inside = list_tasks(load_suite(suite).name) if suite is not None else []
    if given is None:
        yield from inside
    for name in given or ():
        full = load_task(name if "/" in name or suite is None else load_suite(suite).full(name)).name
        if suite is not None and full not in inside:
            raise unknown_name(f"task of the suite {suite}", name, inside)
        yield full


def _without(flags: tuple[str, ...], arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Return arguments without the first occurrence of one of the flags, and its value."""
    place = next(place for place, one in enumerate(arguments) if one.partition("=")[0] in flags)
    return (*arguments[:place], *arguments[place + (2 if arguments[place] in flags else 1) :])
