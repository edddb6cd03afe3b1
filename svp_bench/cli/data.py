"""The subcommand `data`: prepare, check and create images on disk."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from svp_bench.cli.parser import call_action, print_table


def data(*arguments: str) -> int:
    """Prepare and check the images on disk, or create a small synthetic data set."""
    return call_action({"prepare": _prepare, "check": _check, "draw": _draw, "cache": _cache}, "data", arguments)


def _prepare(
    tasks: tuple[str, ...],
    /,
    *,
    source: str,
    location: Annotated[str | None, "--from"] = None,
    root: str | None = None,
    revision: str | None = None,
    mirror: list[str] | None = None,
    workers: int = 4,
    offline: bool = False,
    probe: bool = False,
    replace: bool = False,
) -> int:
    """Build the data folders of tasks from a source, and write their manifests.

    Args:
        tasks: Tasks or suites, e.g. vtab/caltech101 or vtab.
        source: Where the data come from: folder, zip, hub, tfds, torchvision or native.
        location: Path or address of the data; the place that the source knows by default.
        root: The data root to write below; $SVP_BENCH_DATA, else data/, by default.
        revision: Revision of a hub repository; the pinned one, else the newest, by default.
        mirror: A further address to try if the first fails; may be repeated.
        workers: Downloads and decoders that run at a time.
        offline: Use no network; take what was downloaded before.
        probe: Report which tasks the source has, and build nothing.
        replace: Replace folders that exist.
    """
    from svp_bench.core.errors import SvpBenchError, file_size
    from svp_bench.core.ranges import check_range
    from svp_bench.data.locate import data_root
    from svp_bench.prepare.sources import Request, get_source, prepare
    from svp_bench.tasks.cards import load_suite, load_task

    check_range("--workers", workers, "[1, 64]")
    builder = get_source(source)
    base = Path(root) if root else None
    downloads = data_root(base)[0] / ".downloads"
    request = Request(
        location, revision, offline, tuple(mirror or ()), workers, downloads, lambda line: print(line, file=sys.stderr)
    )
    names = _names(tasks)
    failed: list[str] = []
    for name in names:
        card = load_task(name)
        suite = load_suite(card.suite)
        try:
            if probe:
                print(f"{name}: {builder.probe(card, suite, request)}")
                continue
            manifest, notes = prepare(card, suite, source, request, base, replace=replace)
        except SvpBenchError as error:
            if len(names) == 1:
                raise
            failed.append(name)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        splits = ", ".join(f"{split} {count}" for split, count in manifest.splits.items())
        print(f"{name}: {splits} ({file_size(manifest.bytes)}, variant {manifest.variant}, {manifest.digest})")
        for note in notes:
            print(f"{name}: differs from the card: {note}")
    if failed:
        print(f"{len(failed)} of {len(names)} tasks failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def _names(given: tuple[str, ...]) -> list[str]:
    """Return the tasks that names of tasks and suites stand for, each once."""
    from svp_bench.tasks.cards import list_tasks

    return [*dict.fromkeys(task for name in given for task in ([name] if "/" in name else list_tasks(name)))]


def _check(tasks: tuple[str, ...] = (), /, *, root: str | None = None) -> int:
    """Compare the images on disk with the cards.

    Args:
        tasks: Tasks or suites; all by default.
        root: The data root; $SVP_BENCH_DATA, else data/, by default.
    """
    from svp_bench.core.errors import DataError
    from svp_bench.data.sources import inspect, measured, open_source
    from svp_bench.tasks.cards import list_suites, load_task

    folder = Path(root) if root else None
    names = _names(tasks or tuple(list_suites()))
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


def _cache(tasks: tuple[str, ...] = (), /, *, remove: bool = False) -> int:
    """List the images that runs stored decoded and resized, with their sizes, or remove them.

    They are in `pixels` below $SVP_BENCH_CACHE, else ~/.cache/svp-bench; a run stores what it lacks.

    Args:
        tasks: Tasks or suites; all, and what is incomplete, by default. Tasks with the same images share them.
        remove: Remove the listed files.
    """
    from svp_bench.core.errors import DataError, file_size
    from svp_bench.core.resources import cache_dir
    from svp_bench.data.pixels import FOLDER, list_entries, remove_entry

    known = list_entries()
    chosen = [one for one in known if not tasks or (one[1] and {one[1].task, one[1].task.split("/")[0]} & {*tasks})]
    rows = [("task", "split", "images", "pixels", "size", "file")]
    total = 0
    for path, entry, size in chosen:
        try:
            state = "" if not remove else ", removed" if remove_entry(path) else ", in use: not removed"
        except OSError as error:
            raise DataError(f"{path}: cannot be removed ({error.strerror})") from None
        total += size
        if entry is None:
            rows.append(("(incomplete)", "", "", "", file_size(size), f"{path.name}{state}"))
        else:
            count, _, height, width = entry.shape
            about = (entry.task, entry.split, str(count), f"{height} x {width}", file_size(size))
            rows.append((*about, f"{path.name}{state}"))
    if chosen:
        print_table(rows)
    removed = "removed" if remove else "in all"
    print(f"{cache_dir(FOLDER)}: {file_size(total)} {removed}")
    return 0
