"""Files of records: written aside, fsynced and renamed; read strictly."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.errors import RecordError, printable
from svp_bench.records.archive import SUFFIX, archive_of, archive_text, packed, packed_paths
from svp_bench.records.record import Record
from svp_bench.records.schema import parse_record

_MAX_BYTES = 64 * 2**20  # of a record or another JSON file of results
_SAME_RUN = (
    *("run_id", "created", "kind", "seed", "method", "backbone", "checkpoint_digest", "task_version", "protocol"),
    *("protocol_version", "data_variant", "data_digest", "config_digest", "setting_digest"),
    "source_digest",
)


@dataclass(frozen=True)
class Problem:
    """A file below `records/` that is not a valid record.

    Attributes:
        path: Relative to the results root, with forward slashes.
        reason: One line.
    """

    path: str
    reason: str


def write_atomically(path: Path, text: str | bytes) -> None:
    """Write `text` to `path` (UTF-8): aside in the same folder, fsynced, renamed. Folders are created as needed.

    Raises:
        RecordError: If that is not possible; nothing is left behind.
    """
    try:
        with replacing(path) as file:
            # A lone surrogate (from an undecodable file name) becomes \udcXX: in JSON the escape of that very code
            file.write(text if isinstance(text, bytes) else text.encode("utf-8", errors="backslashreplace"))
    except OSError as error:
        raise _not_writable(path.parent, error) from None


def csv_text(value: str) -> str:
    """Return a text as one cell of a CSV: one line, and no formula to a spreadsheet (a quote before = + - @)."""
    text = printable(value)
    return f"'{text}" if text.lstrip()[:1] in ("=", "+", "-", "@") else text


def _not_writable(folder: Path, error: OSError) -> RecordError:
    reason = error.strerror or str(error)
    return RecordError(f"cannot write results into {folder}: {reason}; choose another folder with --results_root DIR")


def check_writable(results_root: Path | str) -> None:
    """Make sure, before training, that records can be written below `results_root`; make its `records` folder.

    Raises:
        RecordError: If they cannot; names the folder and the reason.
    """
    folder = Path(results_root) / "records"
    probe = folder / f".probe.{os.urandom(4).hex()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _not_writable(folder, error) from None


def record_path(record: Record, results_root: Path | str) -> Path:
    """Return where `record` belongs below `results_root`."""
    return Path(results_root) / "records" / record.task / f"{record.run_id}.json"


def write_record(record: Record, results_root: Path | str) -> Path:
    """Write a new record and return its path.

    Raises:
        RecordError: If the record breaks its schema, its file exists already, or the folder cannot be written.
    """
    text = _checked_text(record)
    path = record_path(record, results_root)
    if path.exists() or packed(path) is not None:
        raise RecordError(f"{path} exists already; the record of another run is never overwritten")
    write_atomically(path, text)
    return path


def replace_record(record: Record, results_root: Path | str) -> Path:
    """Replace the unscored record of a run by its complete one; return its path.

    Raises:
        RecordError: If there is no unscored record of this run, `record` is not complete, or they are not of one run.
    """
    old = read_record(record_path(record, results_root))
    if old.status != "unscored" or record.status != "complete":
        path = record_path(record, results_root)
        raise RecordError(f"{path}: only an unscored record may become complete, not {old.status} → {record.status}")
    return _replace(old, record, results_root, _SAME_RUN)


def continue_record(record: Record, results_root: Path | str) -> Path:
    """Replace the record of the first part of a run, which was interrupted or failed and then resumed; return its path.

    Raises:
        RecordError: If the run was complete already, or the two are not of one run.
    """
    old = read_record(record_path(record, results_root))
    if old.status == "complete":
        path = record_path(record, results_root)
        raise RecordError(f"{path}: the run is complete already; a complete record is never replaced")
    return _replace(old, record, results_root, ("run_id", "kind", "seed", "setting_digest"))


def _replace(old: Record, record: Record, results_root: Path | str, same: Sequence[str]) -> Path:
    path, text = record_path(record, results_root), _checked_text(record)
    for key in same:
        if getattr(old, key) != getattr(record, key):
            raise RecordError(f"{path}: {key!r} of the run is {getattr(old, key)!r}, not {getattr(record, key)!r}")
    write_atomically(path, text)
    return path


def _checked_text(record: Record) -> str:
    text = record.text()
    parse_record(json.loads(text), f"record of {record.task} ({record.run_id})")
    return text


def read_record(path: Path | str) -> Record:
    """Read one record, strictly.

    Raises:
        RecordError: If the file is unreadable or does not follow the schema; names the file and the key.
    """
    return _read(Path(path), str(path))


def _read(path: Path, where: str) -> Record:
    inside = None if path.exists() else packed(path)
    return parse_record(read_json(path, where) if inside is None else inside, where)


def record_files(folder: Path) -> list[Path]:
    """Return the paths of all records at or below `folder`, sorted: of files and of packed records."""
    files = (path for path in folder.rglob("*.json") if path.is_file())
    visible = (path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts))
    return sorted({*visible, *packed_paths(folder)})


def pack(results_root: Path | str, suite: str) -> tuple[Path, int]:
    """Move the records of a suite into its archive; return the archive and the number of records that were added.

    Raises:
        RecordError: If a file is not a record that can be restored to the byte, or the archive cannot be written.
    """
    root = Path(results_root)
    folder = root / "records" / suite
    archive = archive_of(folder / "task" / "run.json")
    records = {path.relative_to(folder).as_posix(): packed(path) for path in packed_paths(folder)}
    loose = sorted(folder.rglob("*.json"))
    if not loose and not records:
        raise RecordError(
            f"{folder} has no records; give a suite with records, and their folder with --results_root DIR"
        )
    for path in loose:
        record = read_record(path)
        if path != record_path(record, root) or path.read_text(encoding="utf-8") != record.text():
            raise RecordError(f"{path} is not as svp-bench writes it; run `svp-bench migrate {root}` first")
        records[path.relative_to(folder).as_posix()] = record.to_json()
    if loose:
        write_atomically(archive, archive_text({name: data for name, data in records.items() if data is not None}))
    for path in loose:
        path.unlink()
    for inner in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with suppress(OSError):
            inner.rmdir()
    with suppress(OSError):
        folder.rmdir()
    return archive, len(loose)


def unpack(results_root: Path | str, suite: str) -> int:
    """Write the packed records of a suite as files, remove its archive, and return their number."""
    root = Path(results_root)
    archive = archive_of(root / "records" / suite / "task" / "run.json")
    if not archive.is_file():
        raise RecordError(f"there is no archive {archive}")
    paths = list(packed_paths(archive))
    for path in paths:
        write_atomically(path, read_record(path).text())
    archive.unlink()
    return len(paths)


def read_json(path: Path, where: str) -> Any:
    """Return the content of a JSON file, read strictly: UTF-8, no key twice, no NaN.

    Raises:
        RecordError: If it cannot be read; the text begins with `where`.
    """
    try:
        text = read_regular(path, _MAX_BYTES).decode("utf-8")
    except OSError as error:
        raise RecordError(f"{where}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecordError(f"{where}: is not UTF-8 text") from None
    try:
        return json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: is not JSON: {error.msg} in line {error.lineno}") from None
    except RecursionError:
        raise RecordError(f"{where}: is nested too deeply for a record") from None
    except ValueError as error:
        raise RecordError(f"{where}: is not JSON: {error}") from None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) < len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"the key {next(key for key in names if names.count(key) > 1)!r} is given twice")
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")


def read_records(results_root: Path | str) -> tuple[list[Record], list[Problem]]:
    """Read every record below `results_root`.

    Returns:
        The valid records, sorted by task and run; and one problem for every other file, sorted by path. Names that
        begin with a dot are left alone: they are files being written.
    """
    root = Path(results_root)
    records: list[Record] = []
    problems: list[Problem] = []
    loose = [path for path in (root / "records").rglob("*") if not path.is_dir()]
    try:
        paths = sorted({*loose, *packed_paths(root / "records")})
    except RecordError as error:
        where, _, reason = str(error).partition(": ")
        problems.append(Problem(Path(where).relative_to(root).as_posix(), reason))
        paths = sorted(loose)
    on_disk = set(loose)
    for path in paths:
        name = path.relative_to(root).as_posix()
        if name.startswith(".") or "/." in name or name.endswith(SUFFIX):
            continue
        try:
            record = _read(path, name)
            inside = packed(path) if path in on_disk else None
            if inside is not None and inside != record.to_json():
                raise RecordError(f"{name}: the archive {archive_of(path).name} holds another record of this run")
            home = record_path(record, root)
            if path != home:
                raise RecordError(f"{name}: is a copy of {home.relative_to(root).as_posix()} or was moved from there")
            records.append(record)
        except RecordError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
    records.sort(key=lambda record: (record.task, record.run_id))
    return records, sorted(problems, key=lambda problem: problem.path)


def refuse_unwritable(folder: Path, flag: str) -> None:
    """Say early, and without making it, that a folder cannot be written.

    Raises:
        RecordError: If a file has its name, or the folder above it cannot be written.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "is not a folder" if not place.is_dir() else "is not writable"
        raise RecordError(f"cannot write into {folder}: {place} {why}; choose another folder with {flag} DIR")
