"""The subcommand `data`: prepare, verify and create images on disk."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

from svp_bench.cli.parser import call_action, print_table
from svp_bench.cli.weights import weights


def data(*arguments: str) -> int:
    """Prepare, verify and list the images on disk, or create a small synthetic data set."""
    actions: Mapping[str, Callable[..., int]] = {
        "status": _status,
        "prepare": _prepare,
        "verify": _verify,
        "weights": weights,
        "cache": _cache,
        "draw": _draw,
    }
    return call_action(actions, "data", arguments)


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
    request = Request(location, revision, offline, tuple(mirror or ()), workers, downloads, _note)
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


def _status(tasks: tuple[str, ...] = (), /, *, root: str | None = None, json: bool = False) -> int:
    """Report which tasks have data on disk, and the command that gets them; open no image.

    Args:
        tasks: Tasks or suites; all by default.
        root: The data root; $SVP_BENCH_DATA, else data/, by default.
        json: Print one JSON object a task and line.
    """
    from dataclasses import asdict
    from json import dumps

    from svp_bench.core.yaml import reading_once
    from svp_bench.prepare.status import task_status

    folder = Path(root) if root else None
    with reading_once():
        found = [task_status(name, folder) for name in _names(tasks or _shipped())]
    if json:
        for one in found:
            print(dumps(asdict(one), ensure_ascii=False))
        return 0
    rows = [("task", "status", "images", "folder", "next")]
    for one in found:
        images = ", ".join(
            f"{split} {one.counts.get(split, '?')}" + ("" if one.counts.get(split) == count else f" of {count}")
            for split, count in one.card_counts.items()
        )
        first, _, others = one.place.partition(", ")  # of the places that were tried
        place = f"{first} and {others.count(', ') + 1} other places" if others and one.status == "absent" else one.place
        rows.append((one.task, one.status, images if one.status != "absent" else "", place, one.next))
    print_table(rows)
    for one in found:
        if one.detail:
            print(f"{one.task}: {one.detail}")
    return 0


def _verify(
    tasks: tuple[str, ...] = (),
    /,
    *,
    root: str | None = None,
    accept: bool = False,
    near_duplicates: str | None = None,
) -> int:
    """Decode every image, check splits and files, and write the manifests that records cite.

    Args:
        tasks: Tasks or suites; by default all that have data.
        root: The data root; $SVP_BENCH_DATA, else data/, by default.
        accept: Accept files that differ from the manifest, and write a new one.
        near_duplicates: Write the images of val and test that look like images of other splits to DIR/<task>.csv.
    """
    from svp_bench.core.errors import DataError, plural
    from svp_bench.data.locate import MissingDataError
    from svp_bench.data.sources import measured
    from svp_bench.prepare import verify as checks
    from svp_bench.tasks.cards import load_protocol, load_suite, load_task

    folder = Path(root) if root else None
    failed = done = 0
    names = _names(tasks or _shipped())
    for name in names:
        try:
            card = measured(load_task(name), folder)
            suite = load_suite(card.suite)
            verdict, source = checks.verify(card, suite, folder, accept=accept, note=_note)
        except DataError as error:
            if isinstance(error, MissingDataError) and not tasks:
                continue
            if len(names) == 1:
                raise
            failed += 1
            print(f"{name}: {error}", file=sys.stderr)
            continue
        done += 1
        failed += verdict.status == "changed"
        counts = ", ".join(f"{split} {count}" for split, count in verdict.counts.items())
        cited = f", {verdict.manifest_digest}" if verdict.manifest_digest else ""
        print(f"{name}: {verdict.status}: {counts} (variant {verdict.variant}{cited})")
        if load_task(name).as_found:
            print(f"{name}: classes {', '.join(source.class_names or ())}")
        for note in verdict.notes:
            print(f"{name}: {note}")
        if near_duplicates is not None:
            pairs = checks.near_duplicates(source, load_protocol(suite.protocol), note=_note)
            path = Path(near_duplicates) / f"{name}.csv"
            checks.write_near_duplicates(path, pairs)
            print(f"{name}: {plural(len(pairs), 'near-duplicate')} across splits, in {path}")
    if not done and not failed:
        print("No task has data here; `svp-bench data status` lists where it was looked for.")
    return 1 if failed else 0


def _shipped() -> tuple[str, ...]:
    """Return all tasks that have a data set, not those whose classes are as found in the user's images."""
    from svp_bench.tasks.cards import list_suites, list_tasks, load_task

    return tuple(name for suite in list_suites() for name in list_tasks(suite) if not load_task(name).as_found)


def _note(line: str) -> None:
    print(line, file=sys.stderr)


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
    from svp_bench.tasks.cards import load_task

    for name in tasks:  # a mistyped name would remove nothing, silently
        _names((name,))
        if "/" in name:
            load_task(name)
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
