"""The subcommand `data`: check and create images on disk."""

from __future__ import annotations

from pathlib import Path

from svp_bench.cli.parser import call_action, print_table


def data(*arguments: str) -> int:
    """Check the images on disk, or create a small synthetic data set."""
    return call_action({"check": _check, "draw": _draw}, "data", arguments)


def _check(tasks: tuple[str, ...] = (), /, *, root: str | None = None) -> int:
    """Compare the images on disk with the cards.

    Args:
        tasks: Tasks or suites; all by default.
        root: The data root; $SVP_BENCH_DATA, else data/, by default.
    """
    from svp_bench.core.errors import DataError
    from svp_bench.data.sources import inspect, measured, open_source
    from svp_bench.tasks.cards import list_suites, list_tasks, load_task

    folder = Path(root) if root else None
    names = [task for name in tasks or list_suites() for task in ([name] if "/" in name else list_tasks(name))]
    rows = [("task", "status", "splits", "notes")]
    status = 0
    for name in names:
        try:
            shipped = load_task(name)
            card = measured(shipped, folder)
            source = open_source(card, folder)
            report = inspect(card, source, sorted(source.splits))
            for images in source.splits.values():
                images.verify()
        except DataError as error:
            rows.append((name, "missing or broken", "", str(error)))
            status = 1
            continue
        counts = ", ".join(f"{split} {count}" for split, count in report.counts.items())
        found = f"; classes {', '.join(source.class_names or ())}" if shipped.as_found else ""
        rows.append((name, report.status, counts, ("; ".join(report.notes) or report.digest) + found))
    print_table(rows)
    return status


def _draw(task: str, /, *, root: str, seed: int = 0) -> int:
    """Create a small synthetic data set in the format of a task, to try things out.

    Args:
        task: Its name, e.g. vtab/caltech101.
        root: The data root to write below.
        seed: Seed of the images.
    """
    from svp_bench.data.synthetic import draw_task
    from svp_bench.tasks.cards import load_task

    folder = draw_task(load_task(task), Path(root), seed=seed)
    print(f"Wrote synthetic images for {task} to {folder} (not the real images: records will state so).")
    print(f"Next: svp-bench fit --config configs/{task}.yaml --data.root {root} ...")
    return 0
