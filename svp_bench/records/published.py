"""Numbers quoted from papers and repositories: `results/published/*.csv`, each row with its citation.

They were not measured here, and other protocols, backbones and selection rules stand behind them: tables show them
apart, marked, and never rank them with our own. A file `<source>_<table>.csv` belongs to the suite whose tables are
called `<table>`; other files are not shown in tables. `results/published/README.md` lists known errors.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench.core.errors import RecordError, plural, unknown_name
from svp_bench.core.resources import published_dir
from svp_bench.tasks.cards import SuiteCard

COLUMNS = (
    *("source", "backbone", "pretrain", "method", "task_or_group", "metric", "value", "citation"),
    *("protocol", "secondary", "ours"),
)
WHOLE = "all"
"""`task_or_group` of facts about the method as a whole, such as its parameter count."""

OTHER_DATA = "other data: "
"""Begin of a `task_or_group` that names data outside of the suite."""
NO_METHOD = "-"
"""`ours` of a method that svp-bench does not have."""

_UNSTATED = "average (of unstated tasks)"
_VALUE = re.compile(r"(-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?)(?: ?([KM]))?")
_FACTORS = {"K": 1e3, "M": 1e6}


@dataclass(frozen=True)
class PublishedRow:
    """One quoted number.

    Attributes:
        file: Name of the CSV file.
        line: Its line there.
        source: Short name of the source.
        backbone: As the source names it.
        pretrain: Data the backbone was pre-trained on, as the source states.
        method: As the source names it.
        task_or_group: A task id, a group, the name of a mean, "all", or "other data: " and a name.
        metric: "top1" in percent, or what else the source gives: "params_k", "params_m", "params" ...
        value: As printed, e.g. "68.9" or "0.16M".
        citation: Where it stands.
        protocol: Data, selection and epochs, as far as the source states them.
        secondary: Whether the number was read elsewhere than in the paper or repository of those who measured it.
        ours: The method here: a registered name, a shipped method file like "mambapeft/lora_b", or "-".
    """

    file: str
    line: int
    source: str
    backbone: str
    pretrain: str
    method: str
    task_or_group: str
    metric: str
    value: str
    citation: str
    protocol: str
    secondary: bool
    ours: str

    @property
    def entry(self) -> tuple[str, ...]:
        """What one quoted method is: source, backbone, pre-training and method."""
        return self.source, self.backbone, self.pretrain, self.method

    @property
    def is_score(self) -> bool:
        """Whether the value is an accuracy in a column of the suite."""
        return self.metric == "top1" and not self.task_or_group.startswith(OTHER_DATA)

    @property
    def number(self) -> float:
        """The value as a number; the suffixes K and M are multiplied in."""
        return float(self.value.rstrip(" KM")) * _FACTORS.get(self.value[-1], 1.0)


def mean_names(suite: SuiteCard) -> tuple[str, str]:
    """Return the names of both averages with the suite's own numbers: ("mean of 19 tasks", "mean of 3 groups")."""
    tasks, groups = len(suite.tasks), len(suite.groups)
    return f"mean of {plural(tasks, 'task')}", f"mean of {plural(groups, 'group')}"


def load_published(suite: SuiteCard, folder: Path | None = None) -> list[PublishedRow]:
    """Return the quoted numbers of `suite`, in the order of files and lines.

    Args:
        suite: Its `table` chooses the files; its tasks, groups and averages are the allowed `task_or_group`.
        folder: Where the files are; default: those that come with svp-bench.

    Raises:
        RecordError: On anything malformed; the text begins with `file:line:`.
    """
    allowed = {*(task.split("/")[1] for task in suite.tasks), *suite.groups, *mean_names(suite), _UNSTATED, WHOLE}
    rows: list[PublishedRow] = []
    for path in sorted((folder or published_dir()).glob(f"*_{suite.table}.csv")):
        rows += read_published(path, allowed)
    return rows


def read_published(path: Path, allowed: Collection[str] | None = None) -> list[PublishedRow]:
    """Read one file.

    Args:
        path: The CSV file, UTF-8, its first line the names of `COLUMNS`.
        allowed: Valid `task_or_group`; None takes any.

    Raises:
        RecordError: On another header, a missing or empty field, a value that is not a number, an accuracy outside of
            0…100, an unknown task, or a number given twice. The text begins with `file:line:`.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecordError(f"{path}: cannot be read: {error}") from None
    lines = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[PublishedRow] = []
    seen: dict[tuple[str, ...], int] = {}
    try:
        for fields in lines:
            where = f"{path}:{lines.line_num}"
            if lines.line_num == 1:
                if tuple(fields) != COLUMNS:
                    raise RecordError(f"{where}: the columns must be {','.join(COLUMNS)}, not {','.join(fields)}")
                continue
            row = _row(fields, path.name, lines.line_num, where)
            other = row.task_or_group.startswith(OTHER_DATA)
            if allowed is not None and row.task_or_group not in allowed and not other:
                raise unknown_name("task or group", row.task_or_group, allowed, where=where, error=RecordError)
            key = (*row.entry, row.task_or_group, row.metric)
            if key in seen:
                raise RecordError(f"{where}: the {row.metric} of {row.method!r} is on line {seen[key]} already")
            seen[key] = row.line
            rows.append(row)
    except csv.Error as error:
        raise RecordError(f"{path}:{lines.line_num}: is not CSV: {error}") from None
    if not rows:
        raise RecordError(f"{path}:1: holds no numbers; the columns are {','.join(COLUMNS)}")
    return rows


def _row(fields: list[str], file: str, line: int, where: str) -> PublishedRow:
    if len(fields) != len(COLUMNS):
        raise RecordError(f"{where}: has {len(fields)} fields instead of {len(COLUMNS)} ({','.join(COLUMNS)})")
    for column, field in zip(COLUMNS, fields, strict=True):
        if not field.strip():
            raise RecordError(f"{where}: {column!r} is empty; every number needs its source and place")
    given: dict[str, Any] = dict(zip(COLUMNS, fields, strict=True))
    if given["secondary"] not in ("yes", "no"):
        raise RecordError(f"{where}: 'secondary' must be yes or no, not {given['secondary']!r}")
    row = PublishedRow(file, line, **{**given, "secondary": given["secondary"] == "yes"})
    if not _VALUE.fullmatch(row.value):
        raise RecordError(f"{where}: 'value' must be a number, with K or M behind it if necessary, not {row.value!r}")
    if row.metric == "top1" and not 0 <= row.number <= 100:
        raise RecordError(f"{where}: 'value' of a top1 must be a percentage, not {row.value!r}")
    return row
