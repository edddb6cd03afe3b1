"""Subcommands on the files of a results folder: migrate them to the current schema, pack records into archives."""

from __future__ import annotations


def migrate(*, results_root: str = "results", dry_run: bool = False) -> int:
    """Rewrite records and selected configs of an older schema, and list the changes.

    Records of an older schema are read without this; migrating is needed to pack them. A record keeps its run id and
    scores. Exit status: 0, or 1 if a file could not be read.

    Args:
        results_root: The folder that contains records/ (and choices/, the older name of selected_configs/).
        dry_run: List the changes without writing.
    """
    from collections import Counter
    from pathlib import Path

    from svp_bench.core.errors import RecordError, UsageError, plural, printable
    from svp_bench.records.record import SCHEMA
    from svp_bench.records.store import read_json, read_record, write_atomically

    root = Path(results_root)
    if not root.is_dir():
        raise UsageError(f"--results_root {root} is not a folder; give the one that contains records/")
    changed: Counter[str] = Counter()
    problems = []
    for path in sorted((root / "records").rglob("*.json")):
        try:
            old, record = read_json(path, str(path)), read_record(path)
        except RecordError as error:
            problems.append(str(error))
            continue
        text = record.text()
        if path.read_text(encoding="utf-8") == text:
            continue
        new = record.to_json()
        changed[f"schema {old['schema']} → {SCHEMA}"] += old["schema"] != SCHEMA
        for key in sorted({*old, *new}):
            if key not in new or key not in old:
                changed[f"{'removed' if key in old else 'added'} key {key}"] += 1
            elif old[key] != new[key]:
                changed[f"changed {key}"] += 1
        changed["records rewritten"] += 1
        target = root / "records" / record.task / path.name
        if not dry_run:
            write_atomically(target, text)
            if target != path:
                path.unlink()
    older, folder = root / "choices", root / "selected_configs"
    if older.is_dir() and folder.exists():
        problems.append(f"{older} was left: {folder} exists too; move its files there")
    elif older.is_dir():
        changed["folder choices/ renamed to selected_configs/"] += 1
        if not dry_run:
            older.rename(folder)
    for what, count in sorted(changed.items()):
        if count:
            print(f"{count:>6}  {what}")
    print("\n".join(map(printable, problems)), end="\n" if problems else "")
    done = plural(changed["records rewritten"], "record")
    print(f"{done} {'to rewrite' if dry_run else 'rewritten'} below {printable(str(root))}")
    return int(bool(problems))


def pack(suite: str, /, *, results_root: str = "results", unpack: bool = False) -> int:
    """Move the records of a suite into one archive, records/SUITE.jsonl.gz, which all subcommands read in place.

    A packed record keeps its path: table, report, audit and rerun take it as if the file were there.

    Args:
        suite: The suite, e.g. vtab.
        results_root: The folder that contains records/.
        unpack: Write the files again and remove the archive.
    """
    from svp_bench.core.errors import plural
    from svp_bench.records import store

    if unpack:
        print(f"{plural(store.unpack(results_root, suite), 'record')} unpacked")
        return 0
    archive, count = store.pack(results_root, suite)
    print(f"{plural(count, 'record')} packed into {archive}")
    return 0
