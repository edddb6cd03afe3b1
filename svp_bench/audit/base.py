"""What the parts of an audit share: a finding, the records beside the one at hand, and words."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from svp_bench.records.record import Record
from svp_bench.records.selection import FOLD_KEYS
from svp_bench.records.store import read_records

__all__ = [
    "SHOWN",
    "Auditor",
    "Finding",
    "Shelf",
    "Verdict",
    "began",
    "differ",
    "fold_of",
    "get",
    "hour",
    "roles",
    "short",
    "some",
]

Verdict = Literal["pass", "note", "fail"]
SHOWN = 6  # names in one line


@dataclass(frozen=True)
class Finding:
    """One line of an audit.

    Attributes:
        verdict: "pass", "note" or "fail".
        subject: What was looked at, in a word.
        text: What was found, one line.
    """

    verdict: Verdict
    subject: str
    text: str


@dataclass
class Shelf:
    """The records of a results folder, read once.

    Attributes:
        root: The folder.
    """

    root: Path

    @cached_property
    def records(self) -> list[Record]:
        """All valid ones."""
        return read_records(self.root)[0]

    @cached_property
    def by_id(self) -> dict[str, Record]:
        """Run id → record."""
        return {record.run_id: record for record in self.records}

    @property
    def choices(self) -> Path:
        """The folder of frozen choices."""
        return self.root / "choices"


@dataclass
class Auditor:
    """Looks at a record and keeps a line for each thing that it looked at.

    Attributes:
        record: The record.
        shelf: The records beside it, None if it lies in no results folder.
        findings: The lines.
    """

    record: Record
    shelf: Shelf | None
    findings: list[Finding] = field(default_factory=list, kw_only=True)

    def say(self, verdict: Verdict, subject: str, text: str) -> None:
        """Add a line."""
        self.findings.append(Finding(verdict, subject, " ".join(text.split())))

    def judge(self, subject: str, problems: Sequence[str], good: str, verdict: Verdict = "fail") -> None:
        """Say all problems, or what is good if there are none."""
        for problem in problems:
            self.say(verdict, subject, problem)
        if not problems:
            self.say("pass", subject, good)


def get(config: Mapping[str, Any], key: str) -> Any:
    """Return a value of a config by its dotted key, None if there is none."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def fold_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return folds, fold and seed of the division that a config states; 0 for what is missing or not a number."""
    folds, fold, seed = (
        value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
        for value in (get(config, key) for key in FOLD_KEYS)
    )
    return folds, fold, seed


def differ(one: Any, other: Any) -> bool:
    """Whether two config values differ; a list is a tuple, and true is not 1."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(differ(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) != isinstance(other, bool) or one != other


def roles(lists: Mapping[str, str]) -> str:
    """Return "train on LIST, test on LIST"."""
    order = [role for role in ("train", "val", "test") if role in lists]
    return ", ".join(f"{role} on {lists[role]}" for role in (*order, *sorted(lists.keys() - set(order)))) or "no list"


def short(digest: str | None) -> str:
    """Return the first digits of a digest."""
    return f"sha256:{digest.removeprefix('sha256:')[:12]}" if digest else "unknown"


def some(names: Iterable[str]) -> str:
    """Return the first few of many names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def hour(created: str) -> str:
    """Return a time of a record as people write it."""
    return created.removesuffix("+00:00").replace("T", " ")


def began(record: Record) -> datetime | None:
    """When a run began, from its name; None if that has no time."""
    for part in record.run_id.split("-"):
        try:
            return datetime.strptime(part, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        except ValueError:
            continue
    return None
