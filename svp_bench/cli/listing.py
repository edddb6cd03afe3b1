"""Subcommands that list cards and methods."""

from __future__ import annotations

from collections.abc import Sequence

from svp_bench.cli.parser import parser, print_table

__all__ = ["methods", "tasks"]


def tasks(argv: Sequence[str]) -> int:
    """List the tasks, or show one task's card."""
    from svp_bench.tasks.cards import list_suites, list_tasks, load_suite, load_task

    options = parser("tasks")
    options.add_argument("name", nargs="?", help="a task (shows its card) or a suite; all by default")
    name = options.parse_args(argv).name
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
            classes, count, tested = ("found",) * 3 if card.as_found else (str(card.classes), str(most), str(test))
            rows.append((task, card.group, classes, count, tested, card.title))
    print_table(rows)
    return 0


def methods(argv: Sequence[str]) -> int:
    """List the methods, or show one method's recipe."""
    from svp_bench.methods import METHODS

    options = parser("methods")
    options.add_argument("name", nargs="?", help="a method: shows its recipe; all by default")
    name = options.parse_args(argv).name
    if name:
        from svp_bench.core.resources import configs_dir

        METHODS.entry(name)
        recipe = configs_dir() / "method" / f"{name}.yaml"
        print(recipe.read_text(encoding="utf-8") if recipe.is_file() else METHODS.entry(name).target, end="")
        return 0
    print_table([("method", "what it does"), *((entry.name, entry.summary) for entry in METHODS)])
    return 0
