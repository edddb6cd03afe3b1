"""The subcommand about images on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svp_bench.cli.parser import Parser, parser, print_table

__all__ = ["data"]


def data(argv: Sequence[str]) -> int:
    """Check the images on disk, or draw a small stand-in."""
    options = parser("data")
    actions = options.add_subparsers(dest="action", required=True, metavar="check|draw", parser_class=Parser)
    check = actions.add_parser("check", help="compare the images on disk with the cards")
    check.add_argument("tasks", nargs="*", help="tasks or suites; all by default")
    check.add_argument("--root", help="the data root; $SVP_BENCH_DATA, else data/, by default")
    draw = actions.add_parser("draw", help="draw a small stand-in for a task's images, to try things out")
    draw.add_argument("task", help="e.g. vtab/caltech101")
    draw.add_argument("--root", required=True, help="the data root to write below")
    draw.add_argument("--seed", type=int, default=0)
    draw.add_argument("--layout", help="of a JSON split: json (the default), or native for the data set's own files")
    arguments = options.parse_args(argv)
    return _check_data(arguments) if arguments.action == "check" else _draw_data(arguments)


def _check_data(arguments: Any) -> int:
    from svp_bench.core.errors import DataError
    from svp_bench.data.sources import inspect, measured, open_source
    from svp_bench.tasks.cards import list_suites, list_tasks, load_task

    names: list[str] = []
    for name in arguments.tasks or list_suites():
        names += [name] if "/" in name else list_tasks(name)
    rows = [("task", "status", "lists", "notes")]
    worst = 0
    root = Path(arguments.root) if arguments.root else None
    for name in names:
        try:
            shipped = load_task(name)
            card = measured(shipped, root)
            source = open_source(card, root)
            report = inspect(card, source, sorted(source.lists))
            for images in source.lists.values():
                images.verify()
        except DataError as error:
            rows.append((name, "missing or broken", "", str(error)))
            worst = 1
            continue
        lists = ", ".join(f"{key} {count}" for key, count in report.counts.items())
        found = f"; classes {', '.join(source.class_names or ())}" if shipped.as_found else ""
        rows.append((name, report.status, lists, ("; ".join(report.notes) or report.digest) + found))
    print_table(rows)
    return worst


def _draw_data(arguments: Any) -> int:
    from svp_bench.data.synthetic import draw_task
    from svp_bench.tasks.cards import load_task

    folder = draw_task(load_task(arguments.task), Path(arguments.root), seed=arguments.seed, layout=arguments.layout)
    print(f"Drew a stand-in for {arguments.task} in {folder} (not the real images: records will say so).")
    print(f"Next: svp-bench fit --config configs/{arguments.task}.yaml --data.root {arguments.root} ...")
    return 0
