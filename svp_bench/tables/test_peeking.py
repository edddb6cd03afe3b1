"""Replications: the gain of choosing the best epoch on test, measured and separate from all results.

Some papers, that of SVP among them, read the test list after every epoch and print the best. `svp-bench replicate` does
that on purpose. It writes `<results root>/replications/<suite>/<task>/<run_id>.json`, of the schema
"svp-bench/replication-1":

- the run's facts under the keys of a record (`record.Record`), without `kind`, `metrics` and `correct`; `status` is
  "complete", or "truncated" if the run was cut short or the list was not read after each epoch;
- `count`: images in the test list;
- `test_top1`: top-1 accuracy in percent after each epoch, in order;
- `best_test`: the largest of them, `best_epoch`: the first epoch that has it, counted from 1;
- `final`: the last of them, what an honest run of the same seed would have.

The *test-peek tax* is `best_test` - `final`, in points; it is never negative. The file has no correctness bits, so that
no record can be made of it, and tables list a copy below `records/` as a problem. The tax has a table of its own.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench.core.errors import RecordError, plural, printable, unknown_name
from svp_bench.records.defaults import row_digest
from svp_bench.records.digests import plain
from svp_bench.records.record import Record
from svp_bench.records.schema import parse_record
from svp_bench.records.store import Problem, read_json, write_atomically
from svp_bench.stats.estimates import FEWEST_SOURCES, Estimate, Tax
from svp_bench.stats.inference import mean_over_new_tasks, tax, within
from svp_bench.tables.comparison import sources_of
from svp_bench.tables.labels import custom_data, custom_name, row_labels
from svp_bench.tables.model import CARD, SYNTHETIC, track_of
from svp_bench.tables.notes import DIGITS, interval, percent, short_name, signed, span
from svp_bench.tables.render_csv import csv_lines
from svp_bench.tables.render_text import escape_markdown
from svp_bench.tasks.cards import SuiteCard, list_suites, load_suite, load_task

__all__ = [
    "SCHEMA",
    "Replication",
    "read_replication",
    "read_replications",
    "replication_path",
    "run_tax_table",
    "tax_paths",
    "write_replication",
]

SCHEMA = "svp-bench/replication-1"
STATUSES = ("complete", "truncated")
_NOT_SHARED = ("schema", "kind", "metrics", "correct")  # of a record's keys
_OWN = ("count", "test_top1", "best_test", "best_epoch", "final")
_TOLERANCE = 1e-3  # percent, as in records


@dataclass(frozen=True)
class Replication:
    """One run whose test list was read after every epoch.

    Attributes:
        run: Its facts, as those of a final run that was not scored: this record is never written.
        count: Images in the test list.
        test_top1: Top-1 in percent after each epoch.
    """

    run: Record
    count: int
    test_top1: tuple[float, ...]

    @property
    def complete(self) -> bool:
        """Whether the whole run was trained, and tested after each epoch."""
        return self.run.status == "unscored"

    @property
    def best_test(self) -> float:
        """What picking on the test list would claim."""
        return max(self.test_top1)

    @property
    def best_epoch(self) -> int:
        """The first epoch with that score, counted from 1."""
        return 1 + self.test_top1.index(self.best_test)

    @property
    def final(self) -> float:
        """What the final weights have."""
        return self.test_top1[-1]

    @property
    def tax(self) -> float:
        """`best_test` - `final`, in points."""
        return self.best_test - self.final

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values.

        Raises:
            RecordError: If a value has no place in JSON; names the key.
        """
        facts = {key: value for key, value in self.run.to_json().items() if key not in _NOT_SHARED}
        if self.complete:
            facts["status"] = "complete"
        own = {"count": self.count, "test_top1": plain(list(self.test_top1), "test_top1")}
        picked = {"best_test": self.best_test, "best_epoch": self.best_epoch, "final": self.final}
        return {"schema": SCHEMA, **facts, **own, **picked}

    def text(self) -> str:
        """Return the file's text."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, data: Any, where: str = "replication") -> Replication:
        """Check `data` against the schema and return the replication.

        Raises:
            RecordError: On an unknown or missing key, a wrong type or value, another schema, or facts that contradict
                each other. The text begins with `where` and names the key.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise RecordError(f"{where}: is no replication (its schema is not {SCHEMA!r})")
        shared = [name for name in Record.__dataclass_fields__ if name not in _NOT_SHARED]
        names = ["schema", *shared, *_OWN]
        for key in data:
            if key not in names:
                raise unknown_name("key of a replication", key, names, where=where, error=RecordError)
        optional = {name for name, field in Record.__dataclass_fields__.items() if field.default is None}
        for key in names:
            if key not in data and key not in optional:
                raise RecordError(f"{where}: the key {key!r} is missing")
        if data["status"] not in STATUSES:
            raise RecordError(f"{where}: 'status' must be one of {', '.join(STATUSES)}, not {data['status']!r}")
        run = parse_record(
            {
                **{key: data[key] for key in shared if key in data},
                "schema": 2,
                "kind": "final",
                "metrics": {},
                "correct": None,
                "status": "unscored" if data["status"] == "complete" else data["status"],
            },
            where,
        )
        return _checked(cls(run, data["count"], tuple(_curve(data, where))), data, where)


def _curve(data: Mapping[str, Any], where: str) -> list[float]:
    count, curve = data["count"], data["test_top1"]
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise RecordError(f"{where}: 'count' must be a whole number of at least 1")
    if not isinstance(curve, list) or not curve:
        raise RecordError(f"{where}: 'test_top1' must be a list with at least one number")
    for epoch, value in enumerate(curve, 1):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 100:
            raise RecordError(f"{where}: 'test_top1' of epoch {epoch} is no percentage: {value!r}")
        if abs(value - 100 * round(value * count / 100) / count) > _TOLERANCE:
            raise RecordError(
                f"{where}: 'test_top1' of epoch {epoch} is {value}, which {plural(count, 'image')} cannot give"
            )
    return [float(value) for value in curve]


def _checked(replication: Replication, data: Mapping[str, Any], where: str) -> Replication:
    run, length = replication.run, len(replication.test_top1)
    for key in ("best_test", "best_epoch", "final"):
        if data[key] != getattr(replication, key):
            raise RecordError(f"{where}: {key!r} is {data[key]!r}, and its epochs give {getattr(replication, key)!r}")
    if run.stage != "final" or set(run.splits) != {"train", "test"}:
        raise RecordError(f"{where}: 'stage' and 'splits' are not those of a final run")
    planned = run.config.get("trainer", {}).get("max_epochs")
    if replication.complete and (length != run.epochs or length != planned):
        raise RecordError(
            f"{where}: a complete replication has a score for each epoch, this one has {length}, of {run.epochs} "
            f"epochs of {planned}"
        )
    if length > run.epochs:
        raise RecordError(f"{where}: 'test_top1' has {length} scores of {plural(run.epochs, 'epoch')}")
    return replication


# --------------------------------------------------------------------------------------------------------------- files


def replication_path(replication: Replication, results_root: Path | str) -> Path:
    """Return where a replication belongs below `results_root`."""
    return Path(results_root) / "replications" / replication.run.task / f"{replication.run.run_id}.json"


def write_replication(replication: Replication, results_root: Path | str) -> Path:
    """Write a new replication and return its path.

    Raises:
        RecordError: If it breaks its schema, its file exists already, or the folder cannot be written.
    """
    text = replication.text()
    Replication.from_json(json.loads(text), f"replication of {replication.run.task} ({replication.run.run_id})")
    path = replication_path(replication, results_root)
    if path.exists():
        raise RecordError(f"{path} exists already; what another run wrote is never overwritten")
    write_atomically(path, text)
    return path


def read_replication(path: Path | str) -> Replication:
    """Read one replication, strictly.

    Raises:
        RecordError: If the file is unreadable or does not follow the schema; names the file and the key.
    """
    return Replication.from_json(read_json(Path(path), str(path)), str(path))


def read_replications(results_root: Path | str) -> tuple[list[Replication], list[Problem]]:
    """Read every replication below `results_root`.

    Returns:
        The valid ones, sorted by task and run; and one problem for every other file below `replications/`, sorted by
        path. Names that begin with a dot are left alone: they are files being written.
    """
    root = Path(results_root)
    found: list[Replication] = []
    problems: list[Problem] = []
    for path in sorted((root / "replications").rglob("*")):
        inside = path.relative_to(root)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.as_posix()
        try:
            one = Replication.from_json(read_json(path, name), name)
            home = replication_path(one, root).relative_to(root).as_posix()
            if name != home:
                raise RecordError(f"{name}: is a copy of {home} or was moved from there")
            found.append(one)
        except RecordError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
    found.sort(key=lambda one: (one.run.task, one.run.run_id))
    return found, problems


# ------------------------------------------------------------------------------------------------- the table of the tax

_WARNING = (
    "No number here is a result, and none compares with a leaderboard: the best epoch was picked on the test list, on "
    "purpose, to measure what that gains."
)
_MEANING = (
    "Tax: top-1 of the best test epoch minus top-1 of the last epoch of the same run, in points: what printing the "
    "best test epoch adds. It is never negative, and its t interval is cut at zero. Means are over the tasks that a "
    "row has."
)
_LEVEL = 0.95


@dataclass(frozen=True)
class _Cell:
    """One task of a row, on the same data and with the same config: seed → replication."""

    task: str
    seeds: Mapping[int, Replication]

    @property
    def first(self) -> Record:
        return next(iter(self.seeds.values())).run

    @property
    def mark(self) -> str:
        if self.first.data_variant == SYNTHETIC:
            return "§"
        return ("†" if self.first.data_status == "different" else "") + ("‡" if self.first.data_variant != CARD else "")

    @property
    def last(self) -> float:
        return math.fsum(one.final for one in self.seeds.values()) / len(self.seeds)

    @property
    def best(self) -> float:
        return math.fsum(one.best_test for one in self.seeds.values()) / len(self.seeds)


@dataclass(frozen=True)
class _Row:
    """One method with one setting.

    Attributes:
        label: Its name.
        cells: By task, in suite order; of a task with several, the one that is averaged.
        apart: The others.
        tax: Of the tasks, and of their mean for other seeds.
        new_tasks: The same mean, for other tasks.
    """

    label: str
    cells: Sequence[_Cell]
    apart: Sequence[_Cell]
    tax: Tax
    new_tasks: Estimate

    @property
    def last(self) -> float:
        return math.fsum(cell.last for cell in self.cells) / len(self.cells)

    @property
    def best(self) -> float:
        return math.fsum(cell.best for cell in self.cells) / len(self.cells)

    @property
    def seeds(self) -> str:
        counts = [len(cell.seeds) for cell in self.cells]
        return span(min(counts), max(counts))

    @property
    def mark(self) -> str:
        return "".join(mark for mark in "§†‡" if any(mark in cell.mark for cell in self.cells))


@dataclass(frozen=True)
class _Section:
    """Rows of one protocol, backbone, checkpoint and track."""

    first: Record
    rows: Sequence[_Row]
    data: str = ""

    @property
    def title(self) -> str:
        run = self.first
        digest = run.checkpoint_digest
        weights = "random weights" if digest is None else f"{run.checkpoint}, {digest[: len('sha256:') + 12]}"
        track = track_of(run).title
        data = f"{self.data}: " if self.data else ""
        return f"{data}{run.backbone} ({weights}), {run.protocol} version {run.protocol_version}, track {track}"


def tax_paths(suite: SuiteCard, results_root: Path | str) -> tuple[Path, Path]:
    """Return the files of a suite's test-peek tax: the Markdown page, the CSV file."""
    stem = Path(results_root) / "tables" / f"{suite.table}_test_peek_tax"
    return stem.with_name(f"{stem.name}.md"), stem.with_name(f"{stem.name}.csv")


def run_tax_table(results_root: Path | str, suites: Sequence[str] | None = None) -> str | None:
    """Derive the tables of the test-peek tax from all replications, and return the text to print.

    The same files give the same bytes. Seeds of one cell are averaged; of one seed run twice, the newer counts.

    Args:
        results_root: The folder that holds `replications/`; the files go to its `tables/`.
        suites: Suites to write. None: those with replications or with files of earlier tables.

    Returns:
        None if there is nothing to show.

    Raises:
        UsageError: If a suite is unknown.
        RecordError: If the files cannot be written.
    """
    found, problems = read_replications(results_root)
    parts = []
    for name in list_suites() if suites is None else suites:
        suite = load_suite(name)
        paths = tax_paths(suite, results_root)
        ours = [one for one in found if one.run.suite == name]
        wrong = [problem for problem in problems if problem.path.split("/")[1] == name]
        if not ours and not wrong and not any(path.exists() for path in paths):
            continue
        counting, left_out = _counting(suite, ours)
        sections = _sections(suite, counting)
        left_out += [f"{problem.path}: {problem.reason}" for problem in wrong]
        write_atomically(paths[0], _markdown(suite, sections, left_out))
        write_atomically(paths[1], _csv(suite, sections))
        written = ", ".join(map(str, paths))
        parts.append(f"{_terminal(suite, sections, left_out)}Written: {written}\n")
    strays = [problem for problem in problems if problem.path.split("/")[1] not in list_suites()]
    if strays:
        listed = (printable(f"  {stray.path}: {stray.reason}") for stray in strays)
        parts.append("\n".join(["Belong to no suite:", *listed, ""]))
    return "\n".join(parts) or None


def _counting(suite: SuiteCard, replications: Iterable[Replication]) -> tuple[list[Replication], list[str]]:
    """Return what counts, and a line for each that does not."""
    newest: dict[tuple[Any, ...], Replication] = {}
    left_out: list[str] = []

    def leave(one: Replication, why: str) -> None:
        left_out.append(f"{one.run.task} {one.run.run_id}: {why}")

    for one in sorted(replications, key=lambda one: (one.run.created, one.run.run_id)):
        run = one.run
        if not one.complete:
            leave(one, f"{run.status} ({run.status_reason})")
        elif run.not_comparable:
            leave(one, f"not comparable: {'; '.join(run.not_comparable)}")
        elif run.task not in suite.tasks:
            leave(one, f"the suite {suite.name} has no such task")
        elif run.task_version != load_task(run.task).version:
            leave(one, f"run on version {run.task_version} of the task card, now {load_task(run.task).version}")
        else:
            key = (*_section_key(run), run.method, row_digest(run), *_cell_key(run), run.seed)
            if key in newest:
                leave(newest[key], f"superseded by {run.run_id}, a newer run of the same cell and seed")
            newest[key] = one
    return list(newest.values()), sorted(left_out)


def _section_key(run: Record) -> tuple[Any, ...]:
    custom = custom_data(run) if load_task(run.task).as_found else ""
    return run.protocol, run.protocol_version, run.backbone, run.checkpoint_digest or "", track_of(run), custom


def _cell_key(run: Record) -> tuple[str, str, str, str]:
    return run.task, run.data_variant, run.data_digest or "", run.config_digest + run.source_digest


def _sections(suite: SuiteCard, replications: Iterable[Replication]) -> list[_Section]:
    by_section: dict[tuple[Any, ...], list[Replication]] = defaultdict(list)
    for one in replications:
        by_section[_section_key(one.run)].append(one)
    sections = []
    # pre-trained weights first
    for section, members in sorted(by_section.items(), key=lambda item: (item[0][3] == "", item[0])):
        by_row: dict[tuple[str, str], list[Replication]] = defaultdict(list)
        for one in members:
            by_row[one.run.method, row_digest(one.run)].append(one)
        labels = row_labels({key: rows[0].run for key, rows in by_row.items()})
        rows = [_row(suite, labels[key], by_row[key]) for key in sorted(by_row, key=lambda key: (labels[key], key))]
        sections.append(
            _Section(members[0].run, rows, custom_name([one.run for one in members]) if section[-1] else "")
        )
    return sections


def _row(suite: SuiteCard, label: str, replications: Iterable[Replication]) -> _Row:
    by_cell: dict[tuple[str, ...], dict[int, Replication]] = defaultdict(dict)
    for one in replications:
        by_cell[_cell_key(one.run)][one.run.seed] = one

    def shown_first(cell: _Cell) -> tuple[Any, ...]:
        run = cell.first
        odd = (run.data_variant == SYNTHETIC, run.data_status == "different", run.data_variant != CARD)
        return suite.tasks.index(cell.task), *odd, -len(cell.seeds), _cell_key(run)

    cells: dict[str, _Cell] = {}
    apart: list[_Cell] = []
    for cell in sorted((_Cell(key[0], dict(sorted(seeds.items()))) for key, seeds in by_cell.items()), key=shown_first):
        if cell.task in cells:
            apart.append(cell)
        else:
            cells[cell.task] = cell
    found = _tax(cells.values())
    means = {task: [estimate.value] for task, estimate in found.tasks.items()}
    new_tasks = within(mean_over_new_tasks(means, sources_of(suite, list(means)), level=_LEVEL), 0, 100)
    return _Row(label, list(cells.values()), apart, found, new_tasks)


def _tax(cells: Iterable[_Cell]) -> Tax:
    by_task = {cell.task: cell.seeds for cell in cells}
    picked = {task: {seed: one.best_test for seed, one in seeds.items()} for task, seeds in by_task.items()}
    last = {task: {seed: one.final for seed, one in seeds.items()} for task, seeds in by_task.items()}
    found = tax(picked, last, level=_LEVEL)
    tasks = {task: within(estimate, 0, 100) for task, estimate in found.tasks.items()}
    return Tax(tasks, within(found.overall, 0, 100))


def _with_interval(estimate: Estimate) -> str:
    return f"{signed(estimate.value)} {interval(estimate)}"


def _grid(suite: SuiteCard, section: _Section) -> list[list[str]]:
    grid = [["method", "tasks", "seeds", "last epoch", "best epoch", "tax, these tasks", "tax, new tasks"]]
    for row in section.rows:
        grid.append(
            [
                *(f"{row.label}{row.mark}", f"{len(row.cells)}/{len(suite.tasks)}", row.seeds),
                *(f"{row.last:.2f}", f"{row.best:.2f}"),
                *(_with_interval(row.tax.overall), _with_interval(row.new_tasks)),
            ]
        )
    return grid


def _task_grid(section: _Section) -> list[list[str]]:
    grid = [["task", "method", "seeds", "last epoch", "best epoch", "picked epochs", "tax"]]
    tasks = {cell.task: None for row in section.rows for cell in row.cells}
    for task in tasks:
        for row in section.rows:
            for cell in row.cells:
                if cell.task == task:
                    epochs = ", ".join(f"{one.best_epoch} of {len(one.test_top1)}" for one in cell.seeds.values())
                    grid.append(
                        [
                            *(f"{short_name(task)}{cell.mark}", row.label, str(len(cell.seeds))),
                            *(f"{cell.last:.2f}", f"{cell.best:.2f}", epochs),
                            _with_interval(row.tax.tasks[task]),
                        ]
                    )
    return grid


def _notes(sections: Sequence[_Section]) -> list[str]:
    marks = "".join(row.mark for section in sections for row in section.rows)
    apart = sum(len(row.apart) for section in sections for row in section.rows)
    notes = [
        _MEANING,
        f"Intervals: {percent(_LEVEL)}. These tasks: of other seeds. New tasks: of other tasks; those that share "
        f"images are one source. –: one seed, or fewer than {FEWEST_SOURCES} sources, have no interval; nor is there "
        "one that would hold every value.",
    ]
    if any(section.first.checkpoint_digest is None for section in sections):
        notes.append("Random weights: a smoke test.")
    if "§" in marks:
        notes.append("§ Synthetic data.")
    if "†" in marks:
        notes.append("† The files on disk differ from the task card in count or digest.")
    if "‡" in marks:
        notes.append("‡ Another variant of the data than the card's own.")
    if apart:
        notes.append(f"{plural(apart, 'cell')} on other data than those shown: in the CSV file only, and in no mean.")
    return notes


def _markdown(suite: SuiteCard, sections: Sequence[_Section], left_out: Sequence[str]) -> str:
    lines = [f"# {suite.title}: the test-peek tax", "", f"**{_WARNING}**", ""]
    if not sections:
        lines += ["There is no complete replication; `svp-bench replicate --config FILE` makes one.", ""]
    for section in sections:
        lines += [f"## {escape_markdown(section.title)}", "", *_markdown_table(_grid(suite, section)), ""]
        lines += ["By task:", "", *_markdown_table(_task_grid(section)), ""]
    if sections:
        lines += [*(f"- {escape_markdown(note)}" for note in _notes(sections)), ""]
    if left_out:
        lines += ["Left out:", "", *(f"- {escape_markdown(line, starts=True)}" for line in left_out), ""]
    return "\n".join(lines)


def _markdown_table(grid: Sequence[Sequence[str]]) -> list[str]:
    rows = [[escape_markdown(cell).replace("|", "\\|") for cell in row] for row in grid]
    return [
        f"| {' | '.join(rows[0])} |",
        f"|{' --- |' * len(rows[0])}",
        *(f"| {' | '.join(row)} |" for row in rows[1:]),
    ]


def _terminal(suite: SuiteCard, sections: Sequence[_Section], left_out: Sequence[str]) -> str:
    lines = [f"{suite.title}: the test-peek tax. {_WARNING}"]
    for section in sections:
        grid = _grid(suite, section)
        widths = [max(len(row[i]) for row in grid) for i in range(len(grid[0]))]
        lines += ["", section.title]
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in grid
        ]
    lines += ["", *_notes(sections)] if sections else []
    lines += [f"Left out: {line}" for line in left_out]
    return "\n".join(map(printable, lines)) + "\n"


def _csv(suite: SuiteCard, sections: Sequence[_Section]) -> str:
    head = ["not_a_result", "protocol", "protocol_version", "backbone", "checkpoint", "checkpoint_digest", "track"]
    head += ["row", "method", "setting_digest", "scope", "data_variant", "data_digest", "data_status", "seeds", "n"]
    head += ["last_epoch", "best_epoch", "picked_epochs", "tax", "tax_low", "tax_high"]
    lines: list[Sequence[object]] = [head]
    for section in sections:
        run = section.first
        where = ["picked on the test list", run.protocol, run.protocol_version, run.backbone, run.checkpoint]
        where += [run.checkpoint_digest or "", track_of(run).title]
        for row in section.rows:
            facts = [*where, row.label, row.cells[0].first.method, row_digest(row.cells[0].first)]
            for scope, estimate in (("mean, these tasks", row.tax.overall), ("mean, new tasks", row.new_tasks)):
                numbers = [_number(row.last), _number(row.best), "", *_numbers(estimate)]
                lines.append([*facts, scope, "", "", "", "", estimate.n, *numbers])
            for cell in [*row.cells, *row.apart]:
                first, seeds = cell.first, list(cell.seeds.values())
                data = [first.data_variant, first.data_digest or "", first.data_status]
                estimate = _tax([cell]).overall
                lines.append(
                    [
                        *(*facts, cell.task, *data, " ".join(map(str, cell.seeds)), len(seeds)),
                        *(_number(cell.last), _number(cell.best)),
                        *(" ".join(str(one.best_epoch) for one in seeds), *_numbers(estimate)),
                    ]
                )
    return csv_lines(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.{DIGITS}f}"


def _numbers(estimate: Estimate) -> list[str]:
    return [_number(estimate.value), _number(estimate.low), _number(estimate.high)]
