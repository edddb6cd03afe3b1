"""Archives of records: one compressed JSON Lines file per suite, read in place.

`R/records/<suite>.jsonl.gz` holds records of a results folder R, one JSON object per line, sorted by task and run id. A
packed record keeps its path, `R/records/<suite>/<task>/<run_id>.json`: every command takes that path, whether the file
exists or is packed.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from svp_bench.core.errors import RecordError

SUFFIX = ".jsonl.gz"
_MAX_BYTES = 2**30  # of an archive, decompressed


def archive_of(path: Path) -> Path:
    """Return the archive that would hold the record at `path` (`R/records/<suite>/<task>/<run_id>.json`)."""
    return path.parents[1].with_name(path.parents[1].name + SUFFIX)


def packed(path: Path) -> Mapping[str, Any] | None:
    """Return the JSON of the record at `path` if an archive holds it, else None.

    Raises:
        RecordError: If the archive cannot be read.
    """
    if len(path.parents) < 3:
        return None
    archive = archive_of(path)
    return _members(archive).get(f"{path.parent.name}/{path.name}") if archive.is_file() else None


def packed_paths(folder: Path) -> Iterator[Path]:
    """Yield the paths of the packed records at or below `folder`, or of an archive, in the order of their archives.

    Raises:
        RecordError: If an archive cannot be read.
    """
    if folder.name.endswith(SUFFIX):
        yield from _paths(folder)
        return
    near = [place.with_name(place.name + SUFFIX) for place in (folder, folder.parent) if place.name]
    for archive in [*near, *sorted(folder.rglob(f"*{SUFFIX}"))]:
        if archive.is_file() and archive.parent.name == "records":
            yield from (path for path in _paths(archive) if folder in path.parents)


def archive_text(records: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return the content of an archive; the same records give the same bytes.

    Args:
        records: "<task>/<run_id>.json" → the record's JSON.
    """
    lines = (json.dumps(records[name], ensure_ascii=False, separators=(",", ":")) for name in sorted(records))
    return gzip.compress("".join(f"{line}\n" for line in lines).encode(), 9, mtime=0)


def _paths(archive: Path) -> Iterator[Path]:
    folder = archive.with_name(archive.name.removesuffix(SUFFIX))
    for name in _members(archive):
        yield folder / name


def _members(archive: Path) -> Mapping[str, Any]:
    """Return "<task>/<run_id>.json" → JSON of each record of an archive."""
    state = archive.stat()
    return _read(archive, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=16)
def _read(archive: Path, _mtime: int, _size: int) -> Mapping[str, Any]:
    try:
        with gzip.open(archive) as file:
            content = file.read(_MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise RecordError(f"{archive}: cannot be read: {error}") from None
    if len(content) > _MAX_BYTES:
        raise RecordError(f"{archive}: is larger than {_MAX_BYTES} bytes when decompressed")
    suite = archive.name.removesuffix(SUFFIX)
    members: dict[str, Any] = {}
    for number, line in enumerate(content.splitlines(), 1):
        try:
            data = json.loads(line)
            (owner, task), run_id = data["task"].split("/"), data["run_id"]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise RecordError(f"{archive}:{number}: is not a record") from None
        name = f"{task}/{run_id}.json"
        if owner != suite or "/" in run_id or name in members:
            why = "is there twice" if name in members else f"does not belong into the archive of {suite}"
            raise RecordError(f"{archive}:{number}: the record {data['task']}/{run_id} {why}")
        members[name] = data
    return members
