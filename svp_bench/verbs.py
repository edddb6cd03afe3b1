"""The light verbs: each is a small argparse program that imports what it needs, when it needs it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from svp_bench.errors import UsageError

__all__ = ["HEAVY", "VERBS", "Verb"]

HEAVY = {
    "fit": "adapt a backbone to a task; in stage final, test once and write the record",
    "validate": "score a checkpoint on val (stage select)",
    "test": "score the final weights of a run made with --no_test",
}


@dataclass(frozen=True)
class Verb:
    """A light verb.

    Attributes:
        summary: One line for the help.
        run: Takes the arguments after the verb, returns the exit status.
    """

    summary: str
    run: Callable[[Sequence[str]], int]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (`{self.prog} --help`)")


def _parser(verb: str) -> _Parser:
    return _Parser(prog=f"svp-bench {verb}", description=VERBS[verb].summary, allow_abbrev=False)


def _print_table(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _tasks(argv: Sequence[str]) -> int:
    from svp_bench.cards import list_suites, list_tasks, load_suite, load_task

    parser = _parser("tasks")
    parser.add_argument("name", nargs="?", help="a task (shows its card) or a suite; all by default")
    name = parser.parse_args(argv).name
    if name and "/" in name:
        print(load_task(name).path.read_text(encoding="utf-8"), end="")
        return 0
    suites = [load_suite(name).name] if name else list_suites()
    rows = [("task", "group", "classes", "train+val", "test", "title")]
    for suite in suites:
        for task in list_tasks(suite):
            card = load_task(task)
            test = card.counts.get("test", 0)
            most = max((count for key, count in card.counts.items() if key != "test"), default=0)
            rows.append((task, card.group, str(card.classes), str(most), str(test), card.title))
    _print_table(rows)
    return 0


def _methods(argv: Sequence[str]) -> int:
    from svp_bench.methods import METHODS

    parser = _parser("methods")
    parser.add_argument("name", nargs="?", help="a method: shows its recipe; all by default")
    name = parser.parse_args(argv).name
    if name:
        from svp_bench.resources import configs_dir

        METHODS.entry(name)
        recipe = configs_dir() / "method" / f"{name}.yaml"
        print(recipe.read_text(encoding="utf-8") if recipe.is_file() else METHODS.entry(name).target, end="")
        return 0
    _print_table([("method", "what it does"), *((entry.name, entry.summary) for entry in METHODS)])
    return 0


def _table(argv: Sequence[str]) -> int:
    from svp_bench.results.tables import run_table

    parser = _parser("table")
    parser.add_argument("--suite", action="append", help="a suite; may be repeated; by default all that have records")
    parser.add_argument("--results_root", default="results", help="the folder that holds records/ and tables/")
    parser.add_argument("--published", action="store_true", help="show published numbers beside ours, marked")
    arguments = parser.parse_args(argv)
    print(run_table(arguments.results_root, arguments.suite, arguments.published), end="")
    return 0


def _data(argv: Sequence[str]) -> int:
    parser = _parser("data")
    actions = parser.add_subparsers(dest="action", required=True, metavar="check|draw", parser_class=_Parser)
    check = actions.add_parser("check", help="compare the pictures on disk with the cards")
    check.add_argument("tasks", nargs="*", help="tasks or suites; all by default")
    check.add_argument("--root", help="the data root; $SVP_BENCH_DATA, else data/, by default")
    draw = actions.add_parser("draw", help="draw a small stand-in for a task's pictures, to try things out")
    draw.add_argument("task", help="e.g. vtab/caltech101")
    draw.add_argument("--root", required=True, help="the data root to write below")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--layout", help="of a JSON split: json (the default), or native for the data set's own files")
    arguments = parser.parse_args(argv)
    return _check_data(arguments) if arguments.action == "check" else _draw_data(arguments)


def _check_data(arguments: Any) -> int:
    from svp_bench.cards import list_suites, list_tasks, load_task
    from svp_bench.data.sources import inspect, open_source
    from svp_bench.errors import DataError

    names: list[str] = []
    for name in arguments.tasks or list_suites():
        names += [name] if "/" in name else list_tasks(name)
    rows = [("task", "status", "lists", "notes")]
    worst = 0
    for name in names:
        card = load_task(name)
        try:
            source = open_source(card, Path(arguments.root) if arguments.root else None)
            report = inspect(card, source, sorted(source.lists))
            for pictures in source.lists.values():
                pictures.verify()
        except DataError as error:
            rows.append((name, "missing or broken", "", str(error)))
            worst = 1
            continue
        lists = ", ".join(f"{key} {count}" for key, count in report.counts.items())
        rows.append((name, report.status, lists, "; ".join(report.notes) or report.digest))
    _print_table(rows)
    return worst


def _draw_data(arguments: Any) -> int:
    from svp_bench.cards import load_task
    from svp_bench.data.synthetic import draw_task

    folder = draw_task(load_task(arguments.task), Path(arguments.root), seed=arguments.seed, layout=arguments.layout)
    print(f"Drew a stand-in for {arguments.task} in {folder} (not the real pictures: records will say so).")
    print(f"Next: svp-bench fit --config configs/{arguments.task}.yaml --data.root {arguments.root} ...")
    return 0


def _demo(argv: Sequence[str]) -> int:
    parser = _parser("demo")
    parser.add_argument("--results_root", default="results", help="where records and tables go")
    parser.add_argument("--runs_root", default="runs", help="where logs and checkpoints go")
    arguments = parser.parse_args(argv)
    from svp_bench.train.demo import run_demo

    return run_demo(arguments.results_root, arguments.runs_root)


def _predict(argv: Sequence[str]) -> int:
    parser = _parser("predict")
    parser.add_argument("--ckpt", required=True, help="runs/…/checkpoints/last.ckpt")
    parser.add_argument("--images", required=True, nargs="+", help="pictures, or folders of pictures")
    parser.add_argument("--output", help="a CSV file; standard output by default")
    parser.add_argument("--checkpoint", help="where the backbone's weights are now, if they have moved")
    parser.add_argument("--top", type=int, default=1, choices=range(1, 11), help="how many classes to name")
    arguments = parser.parse_args(argv)
    from svp_bench.train.predict import run_predict

    return run_predict(arguments.ckpt, arguments.images, arguments.output, arguments.checkpoint, arguments.top)


def _versions(*names: str) -> list[str]:
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return found


def _doctor(argv: Sequence[str]) -> int:
    _parser("doctor").parse_args(argv)
    import os
    import platform

    import torch

    from svp_bench._version import __version__
    from svp_bench.ops import backend_statuses, choose
    from svp_bench.ops.compiled import cache_folder
    from svp_bench.ops.memory import keep_freed_memory
    from svp_bench.ops.selftest import self_test
    from svp_bench.ops.threads import pool_name

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none that torch sees"
    print(f"svp-bench {__version__}, Python {platform.python_version()}, torch {torch.__version__}")
    print(
        f"CPU       {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads; kernels run on {pool_name()}"
    )
    print(f"memory    freed: {keep_freed_memory()}")
    packages = _versions("numba", "llvmlite", "triton", "mamba-ssm", "causal-conv1d", "lightning", "timm")
    print(f"packages  {', '.join(packages)}")
    print(f"GPU       {gpu}")
    print(f"kernels   compiled ones are kept in {cache_folder()}")
    print("\nScan backends, in the order in which `auto` tries them:")
    for backend in backend_statuses():
        print(f"  {backend.name:<10} {'available' if backend.available else 'not here':<10} {backend.summary}")
        if backend.reason:
            print(f"  {'':<10} {'':<10} {backend.reason}")
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        print(f"  auto on {device}: {choose('auto', device, torch.float32).name}")
    print("\nSelf-test against the reference in float64 (outputs and all gradients):")
    results = self_test()
    for r in results:
        verdict = "good" if r.passed else "WRONG: do not use it; please report"
        times = f"first call {r.first:.2f} s, then {r.seconds:.3f} s"
        print(f"  {r.name:<10} {r.device:<5} error {r.error:.1e}  {times}  {verdict}")
    return 0 if all(r.passed for r in results) else 1


VERBS: dict[str, Verb] = {
    "demo": Verb("train four methods on real digits, offline, and show a table", _demo),
    "predict": Verb("name the classes of pictures of your own with a trained run", _predict),
    "table": Verb("build the comparison tables from the records", _table),
    "tasks": Verb("list the tasks, or show one task's card", _tasks),
    "methods": Verb("list the methods, or show one method's recipe", _methods),
    "data": Verb("check the pictures on disk, or draw a small stand-in", _data),
    "doctor": Verb("say which scan backends run here, or why not; test them; compile their kernels", _doctor),
}
