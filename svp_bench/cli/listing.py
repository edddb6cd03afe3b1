"""Subcommands that list cards and methods."""

from __future__ import annotations

from svp_bench.cli.parser import print_table


def tasks(name: str | None = None, /) -> int:
    """List the tasks, or show the card of one task.

    Args:
        name: A task (shows its card) or a suite; all by default.
    """
    from svp_bench.tasks.cards import list_suites, list_tasks, load_suite, load_task

    if name and "/" in name:
        print(load_task(name).path.read_text(encoding="utf-8"), end="")
        return 0
    rows = [("task", "group", "classes", "train+val", "test", "title")]
    for suite in [load_suite(name).name] if name else list_suites():
        for task in list_tasks(suite):
            card = load_task(task)
            test = card.counts.get("test", 0)
            most = max((count for key, count in card.counts.items() if key != "test"), default=0)
            counts = ("found",) * 3 if card.as_found else (str(card.classes), str(most), str(test))
            rows.append((task, card.group, *counts, card.title))
    print_table(rows)
    return 0


def methods(name: str | None = None, /) -> int:
    """List the methods, or show the recipe of one method.

    Args:
        name: A method (shows its recipe); all by default.
    """
    from svp_bench.core.resources import configs_dir
    from svp_bench.methods import METHODS

    if name:
        target = METHODS.entry(name).target
        recipe = configs_dir() / "method" / f"{name}.yaml"
        print(recipe.read_text(encoding="utf-8") if recipe.is_file() else target, end="")
        return 0
    rows = ((entry.name, ", ".join(entry.families) or "all", entry.summary) for entry in METHODS)
    print_table([("method", "backbones", "summary"), *rows])
    return 0
