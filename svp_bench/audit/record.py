"""Audit records: `svp-bench audit`. No images, no weights and no torch are needed.

Each line is `pass` (checked), `note` (a reader should know it) or `fail` (a table must not use the number, or it cannot
be checked). Facts from the record alone are given as "the record states". `checks`, `compare` and `search` contain the
checks, one function each; this module finds the files and renders the findings. The last line states the limits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from svp_bench.audit.base import Case, Finding, RecordStore
from svp_bench.audit.checks import CHECKS, results_root_of
from svp_bench.core.errors import RecordError, UsageError, plural, printable
from svp_bench.records.archive import SUFFIX
from svp_bench.records.record import Record
from svp_bench.records.store import read_json, read_record, record_files

_NO_RECORDS = ("selected_configs", "replications", "tables")  # folders with other JSON files
_LIMITS = (
    "An audit compares the files with each other and with the cards here. No record can prove that no run was deleted, "
    "that numbers, digests, times and commit were not invented, or when a value was fixed."
)


@dataclass(frozen=True)
class Audit:
    """The findings about one file.

    Attributes:
        path: The file.
        findings: One per line.
        record: Its record; None if the file is not a valid record.
    """

    path: Path
    findings: tuple[Finding, ...]
    record: Record | None = None

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The findings that fail."""
        return tuple(found for found in self.findings if found.verdict == "fail")


@dataclass(frozen=True)
class Report:
    """The result of `audit`.

    Attributes:
        audits: One per file.
        skipped: JSON files below the given folders that are not records.
    """

    audits: tuple[Audit, ...]
    skipped: int

    @property
    def failed(self) -> bool:
        """Whether a check fails."""
        return any(one.failures for one in self.audits)


def audit(paths: Sequence[Path | str], results_root: Path | str | None = None) -> Report:
    """Audit records.

    Args:
        paths: Files, results folders, or folders with records among other JSON files.
        results_root: Folder of the other records and the selected configs; by default the results folder of each
            record.

    Returns:
        One audit per file; a file that cannot be read has a failing line.

    Raises:
        UsageError: If a folder contains no record, or `results_root` is not a folder.
    """
    if results_root is not None and not Path(results_root).is_dir():
        raise UsageError(f"--results_root {results_root} is not a folder; give the one that contains records/")
    stores: dict[Path, RecordStore] = {}
    files: dict[Path, None] = {}  # an ordered set
    skipped: set[Path] = set()
    for given in paths:
        found, others = _files(Path(given))
        files.update(dict.fromkeys(found))
        skipped.update(others)
    audits = []
    for path in files:
        root = Path(results_root) if results_root is not None else results_root_of(path)
        audits.append(_audit_file(path, stores.setdefault(root, RecordStore(root)) if root is not None else None))
    by_id: dict[str, list[Audit]] = defaultdict(list)
    for one in audits:
        if one.record is not None:
            by_id[one.record.run_id].append(one)
    named = [
        replace(a, findings=(*a.findings, *_same_id(a, by_id[a.record.run_id]))) if a.record else a for a in audits
    ]
    return Report(tuple(named), len(skipped - files.keys()))


def render(report: Report) -> str:
    """Return the text to print: each file with its lines, the counts, and the limits of an audit."""
    lines: list[str] = []
    audits = report.audits
    width = max((len(finding.subject) for one in audits for finding in one.findings), default=0)
    for one in audits:
        lines.append(str(one.path))
        lines += [f"  {found.verdict}  {found.subject:<{width}}  {found.text}" for found in one.findings]
        failed, noted = (_subjects(one, verdict) for verdict in ("fail", "note"))
        lines += [f"  → fails: {failed}" if failed else f"  → passes; notes: {noted}" if noted else "  → passes", ""]
    good = sum(not one.failures for one in audits)
    lines.append(f"{plural(len(audits), 'record')}: {good} passed, {len(audits) - good} failed")
    if report.skipped:
        lines.append(f"{plural(report.skipped, 'JSON file')} skipped: not records")
    return "\n".join(map(printable, [*lines, _LIMITS])) + "\n"


def _subjects(one: Audit, verdict: str) -> str:
    return ", ".join(dict.fromkeys(found.subject for found in one.findings if found.verdict == verdict))


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the records of a path, and the JSON files that are not records."""
    base = path / "records" if (path / "records").is_dir() else path
    files = record_files(base) if not path.is_file() or path.name.endswith(SUFFIX) else []
    if not files and not path.is_dir():
        return [path], []
    found = [file for file in files if base != path or _is_record(file, path)]
    if not found:
        others = f" (other JSON files: {len(files)})" if files else ""
        raise UsageError(f"{path} contains no record{others}; `svp-bench fit` writes them below results/records")
    return found, sorted(set(files) - set(found))


def _is_record(file: Path, folder: Path) -> bool:
    """Return whether a JSON file is a record, or lies where one belongs: then a broken one is reported."""
    if results_root_of(file) is not None:
        return True
    if any(part in _NO_RECORDS for part in file.relative_to(folder).parts[:-1]):
        return False
    try:
        data = read_json(file, str(file))
    except RecordError:
        return False
    return isinstance(data, Mapping) and type(data.get("schema")) is int and "run_id" in data


def _audit_file(path: Path, store: RecordStore | None) -> Audit:
    try:
        known = store.by_path.get(path.absolute()) if store is not None else None
        case = Case(known or read_record(path), path, store)
    except RecordError as error:
        text = str(error).removeprefix(f"{path}: ")
        return Audit(path, (Finding("fail", "schema", " ".join(text.split())),))
    found = (
        Finding(verdict, subject, " ".join(text.split())) for subject, check in CHECKS for verdict, text in check(case)
    )
    return Audit(path, tuple(found), case.record)


def _same_id(one: Audit, all_of_them: Sequence[Audit]) -> Iterator[Finding]:
    """Yield a finding for each other audited file with the same run id."""
    record = one.record
    for other in all_of_them:
        if other.path == one.path or other.record is None or record is None:
            continue
        if other.record == record:
            yield Finding("note", "run id", f"{other.path} is a copy of this record")
            continue
        parts = ("task", "checkpoint", "checkpoint_digest", "method", "seed", "kind", "created")
        differing = [name for name in parts if getattr(record, name) != getattr(other.record, name)]
        text = f"{other.path} has the same run id, and is another run ({', '.join(differing) or 'other content'})"
        if record.created < other.record.created:
            yield Finding("note", "run id", f"{text}: the other one, the later, was written under the name of this one")
            continue
        later = "this one, the later," if record.created > other.record.created else "one of them"
        yield Finding("fail", "run id", f"{text}: {later} was written under the name of the other")
