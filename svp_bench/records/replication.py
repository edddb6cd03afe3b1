"""Replications: the accuracy of a run on the test split after every epoch, which no honest run reads.

A file is `<results root>/replications/<suite>/<task>/<run_id>.json`: the facts of the run under the keys of a record
without `kind`, `metrics` and `correct`, so that no record can be made of it; `status` is "complete", or "truncated" if
the run was cut short or the split was not read after each epoch. The other keys are those of `Curve` and their results.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from svp_bench.core.errors import RecordError, plural
from svp_bench.core.validate import Positive, convert
from svp_bench.records.record import SCHEMA as RECORD_SCHEMA
from svp_bench.records.record import Metrics, Record
from svp_bench.records.schema import parse_record
from svp_bench.records.store import Problem, read_json, write_atomically

SCHEMA = "svp-bench/replication-1"
_NOT_SHARED = ("schema", "kind", "metrics", "correct")  # keys of a record
_DERIVED = ("best_test", "best_epoch", "final")
Percent = Annotated[float, Meta(ge=0, le=100)]


@dataclass(frozen=True)
class Curve:
    """Top-1 in percent on the `count` images of the test split, after each epoch."""

    count: Positive
    test_top1: Annotated[tuple[Percent, ...], Meta(min_length=1)]


@dataclass(frozen=True)
class Replication:
    """A run (with the status "unscored" if it is complete) and its curve."""

    run: Record
    curve: Curve

    @property
    def best_test(self) -> float:
        """Top-1 of the best epoch."""
        return max(self.curve.test_top1)

    @property
    def best_epoch(self) -> int:
        """The first epoch with that score, from 1."""
        return 1 + self.curve.test_top1.index(self.best_test)

    @property
    def final(self) -> float:
        """Top-1 of the final weights: the score of an honest run of the same seed."""
        return self.curve.test_top1[-1]

    @property
    def tax(self) -> float:
        """`best_test` - `final`, in points; never negative."""
        return self.best_test - self.final

    def honest_record(self) -> Record:
        """Return the record that an honest run would have, without bits: to group runs, never to write."""
        if self.run.status != "unscored":
            return self.run
        scores = Metrics(self.final, 0.0, round(self.final * self.curve.count / 100), self.curve.count)
        return dataclasses.replace(self.run, status="complete", metrics=scores)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; `text` is the file."""
        facts = {key: value for key, value in self.run.to_json().items() if key not in _NOT_SHARED}
        facts["status"] = "complete" if self.run.status == "unscored" else self.run.status
        curve = {"count": self.curve.count, "test_top1": list(self.curve.test_top1)}
        return {"schema": SCHEMA, **facts, **curve, **{key: getattr(self, key) for key in _DERIVED}}

    def text(self) -> str:
        """Return the text of the file."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    def path(self, results_root: Path | str) -> Path:
        """Return the file of the replication below `results_root`."""
        return Path(results_root) / "replications" / self.run.task / f"{self.run.run_id}.json"

    @classmethod
    def from_json(cls, data: Any, where: str = "replication") -> Replication:
        """Validate `data` and return the replication; a RecordError begins with `where` and names the key."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise RecordError(f"{where}: is not a replication (its schema is not {SCHEMA!r})")
        own = {field.name for field in dataclasses.fields(Curve)}
        curve = convert({key: data[key] for key in own if key in data}, Curve, where, RecordError, "replication")
        facts = {key: value for key, value in data.items() if key not in {*own, *_DERIVED, *_NOT_SHARED}}
        facts |= {"schema": RECORD_SCHEMA, "kind": "final", "metrics": {}, "correct": None}
        if data.get("status") == "complete":
            facts["status"] = "unscored"
        found = cls(parse_record(facts, where), curve)
        again = found.to_json()
        if wrong := sorted(key for key in {*data, *again} if data.get(key) != again.get(key)):
            raise RecordError(f"{where}: {wrong[0]!r} is {data.get(wrong[0])!r}, not {again.get(wrong[0])!r}")
        shares = [100 * round(value * curve.count / 100) / curve.count for value in curve.test_top1]
        if any(abs(x - y) > 1e-3 for x, y in zip(curve.test_top1, shares, strict=True)):  # percent, as in records
            raise RecordError(f"{where}: 'test_top1' is not a share of {plural(curve.count, 'image')} in some epoch")
        epochs, planned = found.run.epochs, found.run.config.get("trainer", {}).get("max_epochs")
        scores = len(curve.test_top1)
        if scores > epochs or (data["status"] == "complete" and not scores == epochs == planned):
            raise RecordError(f"{where}: 'test_top1' has {plural(scores, 'score')} of {epochs} epochs of {planned}")
        return found


def write_replication(replication: Replication, results_root: Path | str) -> Path:
    """Write a new replication and return its path.

    Raises:
        RecordError: If it breaks its schema, its file exists already, or the folder cannot be written.
    """
    text, path = replication.text(), replication.path(results_root)
    Replication.from_json(json.loads(text), f"replication of {replication.run.task} ({replication.run.run_id})")
    if path.exists():
        raise RecordError(f"{path} exists already; the file of another run is never overwritten")
    write_atomically(path, text)
    return path


def read_replications(results_root: Path | str) -> tuple[list[Replication], list[Problem]]:
    """Return the replications below `results_root`, and one problem for every other file, both sorted by path."""
    root = Path(results_root)
    found: list[Replication] = []
    problems: list[Problem] = []
    for path in sorted(path for path in (root / "replications").rglob("[!.]*") if path.is_file()):
        name = path.relative_to(root).as_posix()
        try:
            one = Replication.from_json(read_json(path, name), name)
            if path != one.path(root):
                raise RecordError(f"{name}: is a copy of {one.path(root).relative_to(root).as_posix()}, or was moved")
            found.append(one)
        except RecordError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
    return found, problems
