"""Tables, derived from records and never edited: the same records give the same bytes, in whatever order they are read.

A row is protocol, backbone, checkpoint digest, method and setting; a cell is a row on the same data of one task. Only
complete final records enter. The seeds of a cell are averaged; nothing is averaged over different data. A cell without
a record stays a hole, and so does every mean that would need it. Complete rows are ranked among rows of the same
protocol, backbone and checkpoint, by the mean over all tasks; not so rows with a drawn stand-in for data, and rows on
random weights, which stand apart. What does not enter is listed below.
"""

from __future__ import annotations

import csv
import io
import json
import math
import textwrap
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from svp_bench.cards import ProtocolCard, SuiteCard, list_suites, load_protocol, load_suite, load_task
from svp_bench.errors import UsageError
from svp_bench.results.digests import setting_config
from svp_bench.results.files import Problem, read_records, write_atomically
from svp_bench.results.published import WHOLE, PublishedRow, load_published, mean_names
from svp_bench.results.record import Record

__all__ = [
    "Cell",
    "LeftOut",
    "Row",
    "Section",
    "Table",
    "build_table",
    "render_markdown",
    "render_terminal",
    "run_table",
    "table_paths",
    "write_tables",
]

HOLE = "–"
QUOTED = "published, not measured here"
_CARD = "card"  # the data variant that follows the task card itself
_DRAWN = "drawn"  # the data variant of drawn pictures
_DIGITS = 4  # decimals in CSV files; two means that agree in them share a rank
_WIDTH = 100
_NARROW = 20  # characters that a column of text keeps when the terminal is too narrow for all
_PLUMBING = "The backbone has random weights: these rows show plumbing, not science, and are not ranked."
_STAND_IN = "§ Drawn stand-in, not the data set: rows with such a cell are not ranked."


@dataclass(frozen=True)
class Cell:
    """One task of a row, on the same data and with the same config: the mean of its seeds.

    Attributes:
        task: Full name.
        task_version: Version of its card.
        variant: Data variant: "card", a variant's name, or "drawn".
        data_digest: Of the lists that the runs read.
        config_digest: Of the runs' config.
        mean: Mean accuracy in percent.
        std: Sample standard deviation over the seeds (n - 1), None for one seed.
        seeds: Sorted.
        different: Did the data of any of the runs differ from the card?
        adapter: Trainable parameters outside the head: the smallest and the largest count of the runs.
    """

    task: str
    task_version: int
    variant: str
    data_digest: str | None
    config_digest: str
    mean: float
    std: float | None
    seeds: tuple[int, ...]
    different: bool
    adapter: tuple[int, int]

    @property
    def drawn(self) -> bool:
        """Are the data a drawn stand-in?"""
        return self.variant == _DRAWN


@dataclass(frozen=True)
class Row:
    """One method with one setting.

    Attributes:
        method: Registered name.
        label: The name, with what tells its settings apart if there are several.
        setting_digest: See `record.setting_digest`.
        cells: Task → the cell that is shown; a hole has no entry.
        apart: Further cells, on other data (or with other tuned values) of tasks that have a cell; they stand in the
            long CSV and in a line each below the table.
        groups: Group → mean of its tasks, None if one of them is a hole.
        task_mean: Mean over all tasks, or None.
        group_mean: Mean over the group means, or None.
        rank: 1 is best; None for incomplete rows, for rows with a drawn cell, and for random weights.
    """

    method: str
    label: str
    setting_digest: str
    cells: Mapping[str, Cell]
    apart: tuple[Cell, ...]
    groups: Mapping[str, float | None]
    task_mean: float | None
    group_mean: float | None
    rank: int | None = None

    @property
    def drawn(self) -> bool:
        """Is any cell on a drawn stand-in?"""
        return any(cell.drawn for cell in self.cells.values())

    @property
    def seeds(self) -> tuple[int, int]:
        """Smallest and largest number of seeds of a cell."""
        counts = [len(cell.seeds) for cell in self.cells.values()]
        return min(counts), max(counts)

    @property
    def adapter(self) -> tuple[int, int]:
        """Smallest and largest number of trainable parameters outside the head."""
        counts = [count for cell in self.cells.values() for count in cell.adapter]
        return min(counts), max(counts)


@dataclass(frozen=True)
class Section:
    """Rows that compare: of one protocol, backbone and checkpoint.

    Attributes:
        protocol: Its name.
        protocol_version: Its version.
        selection: The protocol's rule, in words; None if the card at hand is missing or of another version.
        backbone: Model name.
        checkpoint: Where the weights came from, e.g. "hub".
        checkpoint_digest: None for random weights.
        precisions: Of its runs, sorted.
        rows: Ranked ones first.
        records: Number of records in it.
        dirty: How many of them were made with uncommitted changes.
    """

    protocol: str
    protocol_version: int
    selection: str | None
    backbone: str
    checkpoint: str
    checkpoint_digest: str | None
    precisions: tuple[str, ...]
    rows: tuple[Row, ...]
    records: int
    dirty: int

    @property
    def random(self) -> bool:
        """Are the weights random?"""
        return self.checkpoint_digest is None


@dataclass(frozen=True)
class LeftOut:
    """A record that is not in the table.

    Attributes:
        record: The record.
        why: One word or two, by which they are counted: "truncated", "selection", "superseded" ...
        detail: One line.
    """

    record: Record
    why: str
    detail: str


@dataclass(frozen=True)
class Table:
    """All that is known of a suite.

    Attributes:
        suite: Its card.
        sections: Pre-trained weights first.
        left_out: Records that do not enter, sorted.
        problems: Files that are no records, sorted.
        published: Quoted numbers, in the order of their files.
    """

    suite: SuiteCard
    sections: tuple[Section, ...]
    left_out: tuple[LeftOut, ...]
    problems: tuple[Problem, ...]
    published: tuple[PublishedRow, ...]


# ------------------------------------------------------------------------------------------------------------- build


def build_table(
    suite: SuiteCard,
    records: Iterable[Record],
    problems: Iterable[Problem] = (),
    *,
    task_versions: Mapping[str, int],
    protocols: Iterable[ProtocolCard] = (),
    published: Iterable[PublishedRow] = (),
) -> Table:
    """Derive the table of `suite`.

    Args:
        suite: Its card.
        records: Records of any suites, in any order.
        problems: Files that are no records; those of other suites are left to their tables.
        task_versions: Task → version of its card, for every task with records; those of another version do not enter.
        protocols: Cards whose selection rule is printed.
        published: Quoted numbers to be shown in a section of their own.
    """
    rules = {(card.name, card.version): card.selection for card in protocols}
    entering: list[Record] = []
    left_out: list[LeftOut] = []
    for record in records:
        if record.suite != suite.name:
            continue
        reason = _reason_to_leave_out(record, suite, task_versions)
        if reason is None:
            entering.append(record)
        else:
            left_out.append(LeftOut(record, *reason))
    counting, superseded = _newest_of_each_seed(entering)
    by_section: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in counting:
        key = (record.protocol, record.protocol_version, record.backbone, record.checkpoint_digest or "")
        by_section[key].append(record)
    sections = [_section(suite, members, rules) for _, members in sorted(by_section.items())]
    return Table(
        suite=suite,
        sections=tuple(sorted(sections, key=lambda section: section.random)),
        left_out=tuple(sorted([*left_out, *superseded], key=lambda out: (out.why, out.record.task, out.record.run_id))),
        problems=tuple(
            sorted(
                (problem for problem in problems if _suite_of(problem) == suite.name), key=lambda problem: problem.path
            )
        ),
        published=tuple(published),
    )


def _reason_to_leave_out(record: Record, suite: SuiteCard, task_versions: Mapping[str, int]) -> tuple[str, str] | None:
    if record.kind != "final":
        return record.kind, "scored on the list that chooses, not on the test list"
    if record.status != "complete":
        return record.status, record.status_reason or "trained, not tested"
    if record.task not in suite.tasks:
        return "unknown task", f"the suite {suite.name} (version {suite.version}) has no such task"
    version = task_versions[record.task]
    if record.task_version != version:
        return "other card version", f"run on version {record.task_version} of the task card, which is now {version}"
    return None


def _newest_of_each_seed(records: list[Record]) -> tuple[list[Record], list[LeftOut]]:
    by_seed: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.created, record.run_id)):
        by_seed[(*_row_key(record), record.task, *_cell_key(record), record.seed)].append(record)
    newest = [runs[-1] for runs in by_seed.values()]
    superseded = [
        LeftOut(old, "superseded", f"{runs[-1].run_id} is a newer run of the same cell and seed")
        for runs in by_seed.values()
        for old in runs[:-1]
    ]
    return newest, superseded


def _row_key(record: Record) -> tuple[Any, ...]:
    return (
        record.protocol,
        record.protocol_version,
        record.backbone,
        record.checkpoint_digest,
        record.method,
        record.setting_digest,
    )


def _cell_key(record: Record) -> tuple[str, str, str]:
    """What tells the cells of one row and task apart. Only failed runs lack a data digest, and none of them enters."""
    return record.data_variant, record.data_digest or "", record.config_digest


def _suite_of(problem: Problem) -> str | None:
    parts = problem.path.split("/")
    return parts[1] if len(parts) > 2 else None


def _section(suite: SuiteCard, records: list[Record], rules: Mapping[tuple[str, int], str]) -> Section:
    first = records[0]
    by_row: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        by_row[record.method, record.setting_digest].append(record)
    labels = _labels({key: members[0] for key, members in by_row.items()})
    rows = [_row(suite, method, labels[method, digest], by_row[method, digest]) for method, digest in sorted(by_row)]
    return Section(
        protocol=first.protocol,
        protocol_version=first.protocol_version,
        selection=rules.get((first.protocol, first.protocol_version)),
        backbone=first.backbone,
        checkpoint=", ".join(sorted({record.checkpoint for record in records})),
        checkpoint_digest=first.checkpoint_digest,
        precisions=tuple(sorted({record.precision for record in records})),
        rows=tuple(_in_order(rows, ranked=first.checkpoint_digest is not None)),
        records=len(records),
        dirty=sum(record.dirty is True for record in records),
    )


def _row(suite: SuiteCard, method: str, label: str, records: list[Record]) -> Row:
    by_cell: dict[tuple[str, ...], list[Record]] = defaultdict(list)
    for record in records:
        by_cell[(record.task, *_cell_key(record))].append(record)
    newest_first = sorted(
        by_cell, key=lambda key: (max((run.created, run.run_id) for run in by_cell[key]), key), reverse=True
    )
    # The first cell of a task is shown: data as the card says, and never a stand-in if there is anything else
    shown_first = sorted(
        (_cell(by_cell[key]) for key in newest_first),
        key=lambda cell: (cell.task, cell.drawn, cell.different, cell.variant != _CARD, -len(cell.seeds)),
    )
    cells: dict[str, Cell] = {}
    apart: list[Cell] = []
    for cell in shown_first:
        if cell.task in cells:
            apart.append(cell)
        else:
            cells[cell.task] = cell
    groups = {
        group: _mean_or_hole([cells.get(f"{suite.name}/{task}") for task in tasks])
        for group, tasks in suite.groups.items()
    }
    means = [mean for mean in groups.values() if mean is not None]
    return Row(
        method=method,
        label=label,
        setting_digest=records[0].setting_digest,
        cells=cells,
        apart=tuple(apart),
        groups=groups,
        task_mean=_mean_or_hole([cells.get(task) for task in suite.tasks]),
        group_mean=_mean(means) if len(means) == len(groups) else None,
    )


def _cell(runs: list[Record]) -> Cell:
    scores = [run.metrics.top1 for run in runs if run.metrics is not None]
    mean = _mean(scores)
    # One seed has no spread: a 0 would claim that it has none
    std = math.sqrt(math.fsum((x - mean) ** 2 for x in scores) / (len(scores) - 1)) if len(scores) > 1 else None
    adapter = [run.parameters.adapter for run in runs]
    return Cell(
        task=runs[0].task,
        task_version=runs[0].task_version,
        variant=runs[0].data_variant,
        data_digest=runs[0].data_digest,
        config_digest=runs[0].config_digest,
        mean=mean,
        std=std,
        seeds=tuple(sorted(run.seed for run in runs)),
        different=any(run.data_status == "different" for run in runs),
        adapter=(min(adapter), max(adapter)),
    )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)  # fsum: the order of the records must not reach the last digit


def _mean_or_hole(cells: Sequence[Cell | None]) -> float | None:
    present = [cell.mean for cell in cells if cell is not None]
    return _mean(present) if len(present) == len(cells) else None


def _in_order(rows: list[Row], ranked: bool) -> list[Row]:
    """Rank the complete rows on real data (1, 2, 2, 4: equal means share a rank); behind them the others, by name."""
    by_name = sorted(rows, key=lambda row: (row.label, row.setting_digest))
    if not ranked:
        return by_name
    means = [None if row.task_mean is None or row.drawn else round(row.task_mean, _DIGITS) for row in by_name]
    scores = [mean for mean in means if mean is not None]
    placed = [
        row if mean is None else replace(row, rank=1 + sum(x > mean for x in scores))
        for row, mean in zip(by_name, means, strict=True)
    ]
    return sorted(placed, key=lambda row: len(rows) + 1 if row.rank is None else row.rank)


# ------------------------------------------------------------------------------------------------------------ labels


def _labels(rows: Mapping[tuple[str, str], Record]) -> dict[tuple[str, str], str]:
    """Name each (method, setting digest) by the method, and by what differs if a method has several settings."""
    labels: dict[tuple[str, str], str] = {}
    for method in {method for method, _ in rows}:
        settings = {
            key: dict(_flat(setting_config(record.config, record.tuned)))
            for key, record in rows.items()
            if key[0] == method
        }
        names = {name for setting in settings.values() for name in setting}
        differing = sorted(name for name in names if _differs(name, list(settings.values())))
        shown = _short_names(differing)
        for key, setting in settings.items():
            parts = [f"{shown[name]}={_value(setting[name])}" for name in differing if name in setting]
            labels[key] = f"{method} ({', '.join(parts)})" if parts else method
    counts = Counter(labels.values())  # 4 and "4" look alike: then the digest has to tell the rows apart
    return {key: label if counts[label] == 1 else f"{label} [{_value(key[1])}]" for key, label in labels.items()}


def _differs(name: tuple[str, ...], settings: Sequence[Mapping[tuple[str, ...], Any]]) -> bool:
    values = {json.dumps(setting[name]) if name in setting else "" for setting in settings}  # "" is no JSON: absent
    return len(values) > 1


def _flat(config: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value.removeprefix("sha256:")[:12] if value.startswith("sha256:") else value
    return json.dumps(value, separators=(",", ":"))


def _short_names(names: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Give each dotted key its last part, and as many parts before it as it takes to tell the keys apart."""
    # `class_path` and `init_args` are jsonargparse's; they tell a reader nothing
    kept = {name: tuple(part for part in name if part not in ("class_path", "init_args")) or name for name in names}
    short: dict[tuple[str, ...], str] = {}
    for name, parts in kept.items():
        size = 1
        while size < len(parts) and sum(other[-size:] == parts[-size:] for other in kept.values()) > 1:
            size += 1
        short[name] = ".".join(parts[-size:])
    return short


# -------------------------------------------------------------------------------------------------------------- text


def _columns(suite: SuiteCard) -> list[str]:
    """Names of the score columns: task ids in suite order, groups, both averages."""
    return [*(task.split("/")[1] for task in suite.tasks), *suite.groups, *mean_names(suite)]


def _scores(row: Row, suite: SuiteCard) -> list[float | None]:
    """The scores of `row`, in the order of `_columns`."""
    tasks = [row.cells[task].mean if task in row.cells else None for task in suite.tasks]
    return [*tasks, *row.groups.values(), row.task_mean, row.group_mean]


def _shown_columns(suite: SuiteCard, tasks: bool = True) -> list[int]:
    """Indices into `_columns` of what a reader is shown: of a single group, the means over it say nothing new."""
    count, groups = len(suite.tasks), len(suite.groups)
    means = [count + groups] if groups == 1 else [*range(count, count + groups + 2)]
    return [*(range(count) if tasks else ()), *means]


def _texts(row: Row, suite: SuiteCard, spread: bool) -> list[str]:
    """The scores of `row` as text with two decimals, marks and, with `spread`, the deviation over seeds."""
    drawn = {task for task, cell in row.cells.items() if cell.drawn}
    groups = [{f"{suite.name}/{task}" for task in tasks} for tasks in suite.groups.values()]
    averaged = [*groups, set(suite.tasks), set(suite.tasks)]
    texts = []
    for index, score in enumerate(_scores(row, suite)):
        text = HOLE if score is None else f"{score:.2f}"
        cell = row.cells.get(suite.tasks[index]) if index < len(suite.tasks) else None
        if cell is not None:
            text += f" ± {cell.std:.2f}" if spread and cell.std is not None else ""
            text += _marks(cell)
        elif score is not None and drawn & averaged[index - len(suite.tasks)]:
            text += "§"
        texts.append(text)
    return texts


def _marks(cell: Cell) -> str:
    if cell.drawn:
        return "§"
    return ("†" if cell.different else "") + ("‡" if cell.variant != _CARD else "")


def _span(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"


def _size(count: int) -> str:
    if count < 1000:
        return str(count)
    if count < 999_950:  # from here on, thousands would round up to 1000.0K
        return f"{count / 1e3:.1f}K"
    return f"{count / 1e6:.2f}M"


def _sizes(row: Row) -> str:
    low, high = row.adapter
    return _size(low) if _size(low) == _size(high) else f"{_size(low)}–{_size(high)}"


def _grid(section: Section, suite: SuiteCard, *, spread: bool, tasks: bool) -> list[list[str]]:
    """Header and rows as text."""
    columns, shown = _columns(suite), _shown_columns(suite, tasks)
    head = ["rank", "method", *(columns[index] for index in shown), "complete", "seeds", "trainable w/o head"]
    grid = [head]
    for row in section.rows:
        texts = _texts(row, suite, spread)
        rank = HOLE if row.rank is None else str(row.rank)
        done = f"{len(row.cells)}/{len(suite.tasks)}"
        grid.append([rank, row.label, *(texts[index] for index in shown), done, _span(*row.seeds), _sizes(row)])
    return grid


def _weights(section: Section) -> str:
    if section.checkpoint_digest is None:
        return "random weights"
    return f"{section.checkpoint} (sha256:{section.checkpoint_digest.removeprefix('sha256:')[:12]})"


def _notes(section: Section, suite: SuiteCard) -> list[str]:
    """What has to stand under the rows of a section."""
    cells = [cell for row in section.rows for cell in row.cells.values()]
    notes = [
        f"Protocol {section.protocol}, version {section.protocol_version}. "
        + (section.selection or "Its card is not at hand in this version, so its selection rule cannot be quoted."),
        f"Backbone {section.backbone}, {_weights(section)}. Precision: {', '.join(section.precisions)}.",
        f"Cards: {_versions(cells)}.",
        "Accuracy in percent. ± is the standard deviation over seeds; there are no confidence intervals yet.",
    ]
    if any("†" in _marks(cell) for cell in cells):
        notes.append("† The files on disk differ from the task card in count or digest; the records say how.")
    variants = sorted({f"{cell.task.split('/')[1]} ({cell.variant})" for cell in cells if "‡" in _marks(cell)})
    if variants:
        notes.append(f"‡ Another variant of the data than the card's own: {', '.join(variants)}.")
    if any(cell.drawn for cell in cells):
        notes.append(_STAND_IN)
    notes += _data_notes(section, suite)
    notes += _dirty_notes(section)
    shared = "; ".join(", ".join(group) for group in suite.same_pictures)
    if shared:
        notes.append(f"Tasks that share their pictures, and are not independent: {shared}.")
    return notes


def _data_notes(section: Section, suite: SuiteCard) -> list[str]:
    """Where the data of a task are not the same throughout: between rows, and within one."""
    digests: dict[str, set[str | None]] = defaultdict(set)
    for row in section.rows:
        for task, cell in row.cells.items():
            digests[task].add(cell.data_digest)
    mixed = [task.split("/")[1] for task in suite.tasks if len(digests[task]) > 1]
    notes = [f"The rows are not all on the same lists of pictures: {', '.join(mixed)}."] if mixed else []
    for row in section.rows:
        for cell in row.apart:
            shown = row.cells[cell.task]
            same = (cell.variant, cell.data_digest) == (shown.variant, shown.data_digest)
            kind = "a drawn stand-in" if cell.drawn else f"other data, variant {cell.variant}"
            where = "with another config" if same else f"on {kind} (lists {_value(cell.data_digest)})"
            seeds = f"{len(cell.seeds)} seed{'' if len(cell.seeds) == 1 else 's'}"
            notes.append(
                f"{cell.task.split('/')[1]}, {row.label}: also {cell.mean:.2f} ({seeds}) {where}; in the long CSV only."
            )
    return notes


def _dirty_notes(section: Section) -> list[str]:
    if not section.dirty:
        return []
    return [f"{section.dirty} of {section.records} records were made with uncommitted changes."]


def _versions(cells: Sequence[Cell]) -> str:
    by_version: dict[int, set[str]] = defaultdict(set)
    for cell in cells:
        by_version[cell.task_version].add(cell.task.split("/")[1])
    if len(by_version) == 1:
        return f"all tasks of version {next(iter(by_version))}"
    return "; ".join(f"version {version}: {', '.join(sorted(by_version[version]))}" for version in sorted(by_version))


def _counts(table: Table) -> str:
    """One line about what is not in the table, or nothing."""
    counts = Counter(out.why for out in table.left_out)
    parts = [f"{number} {why}" for why, number in sorted(counts.items())]
    if table.problems:
        parts.append(f"{len(table.problems)} unreadable")
    return f"{', '.join(parts)}." if parts else ""


def _left_out_lines(table: Table) -> list[str]:
    lines = [
        f"{out.record.task}, {out.record.method}, seed {out.record.seed}: {out.why}: {out.detail} ({out.record.run_id})"
        for out in table.left_out
    ]
    return lines + [f"{problem.path}: unreadable: {problem.reason}" for problem in table.problems]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _markdown_grid(grid: list[list[str]], left: int) -> list[str]:
    """A Markdown table; the first `left` columns are text, the rest numbers."""
    rows = [[_one_line(text).replace("|", "\\|") for text in line] for line in grid]
    rule = [":---" if index < left else "---:" for index in range(len(grid[0]))]
    return [f"| {' | '.join(line)} |" for line in (rows[0], rule, *rows[1:])]


def render_markdown(table: Table) -> str:
    """Return the table as Markdown."""
    suite = table.suite
    lines = [f"# {suite.title}", "", f"Suite {suite.name}, version {suite.version}. Derived from records; do not edit."]
    if not table.sections:
        lines += ["", "There are no complete records of this suite yet."]
    for section in table.sections:
        lines += ["", f"## {section.backbone}, {_weights(section)}, {section.protocol} {section.protocol_version}", ""]
        if section.random:
            lines += [f"**{_PLUMBING}**", ""]
        lines += [*_markdown_grid(_grid(section, suite, spread=True, tasks=True), left=2), ""]
        lines += [f"- {_one_line(note)}" for note in _notes(section, suite)]
    if table.published:
        lines += ["", f"## Quoted: {QUOTED}", "", *_published_lines(table)]
    if _counts(table):
        lines += ["", "## Not in the table", "", _counts(table), ""]
        lines += [f"- {_one_line(line)}" for line in _left_out_lines(table)]
    return "\n".join(lines) + "\n"


def render_terminal(table: Table) -> str:
    """Return the table as plain text: with the tasks if they fit into 100 columns, else with groups and averages.

    Long names are wrapped; with three groups beside them, lines may become a little longer than that.
    """
    suite = table.suite
    lines = [suite.title]
    if not table.sections:
        lines += ["", "There are no complete records of this suite yet."]
    for section in table.sections:
        lines += ["", f"{section.backbone}, {_weights(section)}, {section.protocol} {section.protocol_version}"]
        layouts = ((True, True), (False, True), (False, False))
        drawn = [_terminal_grid(_grid(section, suite, spread=spread, tasks=tasks), 2) for spread, tasks in layouts]
        fitting = next((text for text in drawn if max(map(len, text)) <= _WIDTH), drawn[-1])
        lines += fitting
        if section.random:
            lines.append(_PLUMBING)
        marks = {mark for row in section.rows for cell in row.cells.values() for mark in _marks(cell)}
        if "†" in marks:
            lines.append("† The files on disk differ from the task card.")
        if "‡" in marks:
            lines.append("‡ Another variant of the data than the card's own.")
        if "§" in marks:
            lines.append(_STAND_IN)
        for note in (*_data_notes(section, suite), *_dirty_notes(section)):
            lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
    if table.published:
        grid = _published_terminal_grid(table)
        lines += ["", f"Quoted: {QUOTED}", *_terminal_grid(grid, 3), *_not_quoted(table, grid)]
        lines += [f"[{number}] {text}" for number, text in enumerate(_citations(table).values(), 1)]
    if _counts(table):
        lines += ["", f"Not in the table: {_counts(table)}"]
        lines += [f"  {problem.path}: {_one_line(problem.reason)}" for problem in table.problems]
    return "\n".join(lines) + "\n"


def _terminal_grid(grid: list[list[str]], left: int) -> list[str]:
    """Align the columns under a header of two lines; the first `left` columns are text, wrapped if it has to be."""
    heads = [_two_lines(text) for text in grid[0]]
    widths = [max(*map(len, head), *(len(line[index]) for line in grid[1:])) for index, head in enumerate(heads)]
    over = sum(widths) + 2 * (len(widths) - 1) - _WIDTH
    for index in sorted(range(left), key=lambda index: -widths[index]):
        cut = min(max(over, 0), max(widths[index] - _NARROW, 0))
        widths[index] -= cut
        over -= cut

    def draw(cells: Sequence[str]) -> list[str]:
        wrapped = [textwrap.wrap(text, widths[index]) or [""] for index, text in enumerate(cells)]
        drawn = []
        for parts in zip_longest(*wrapped, fillvalue=""):
            aligned = [
                text.ljust(width) if index < left else text.rjust(width)
                for index, (text, width) in enumerate(zip(parts, widths, strict=True))
            ]
            drawn.append("  ".join(aligned).rstrip())
        return drawn

    lines = [[head[0] for head in heads], [head[1] for head in heads], *grid[1:]]
    return [drawn for line in lines for drawn in draw(line)]


def _two_lines(text: str) -> tuple[str, str]:
    """Split a header in the middle: "mean of 19 tasks" into "mean of" and "19 tasks"; one word goes below."""
    words = text.split()
    half = len(words) // 2
    return (" ".join(words[:half]), " ".join(words[half:]))


# --------------------------------------------------------------------------------------------------------- published


def _published_methods(table: Table) -> list[tuple[PublishedRow, dict[str, str], str]]:
    """One entry a quoted method: a row of it, score column → value as printed, parameters as printed."""
    entries: dict[tuple[str, ...], tuple[PublishedRow, dict[str, str], list[str]]] = {}
    units = {"params": "", "params_k": " K", "params_m": " M"}
    for row in table.published:
        key = (row.source, row.backbone, row.pretrain, row.method)
        _, scores, parameters = entries.setdefault(key, (row, {}, []))
        if row.task_or_group == WHOLE and row.metric in units:
            parameters.append(row.value + units[row.metric])
        elif row.metric == "top1":
            scores[row.task_or_group] = row.value
    return [(row, scores, " / ".join(parameters)) for row, scores, parameters in entries.values() if scores]


def _published_grid(table: Table) -> list[list[str]]:
    columns = _columns(table.suite)
    shown = [columns[index] for index in _shown_columns(table.suite)]
    grid = [["source", "backbone", "pre-training", "method", *shown, "parameters as printed"]]
    for row, scores, parameters in _published_methods(table):
        if any(name in scores for name in shown):
            values = [scores.get(name, HOLE) for name in shown]
            grid.append([row.source, row.backbone, row.pretrain, row.method, *values, parameters or HOLE])
    return grid


def _published_terminal_grid(table: Table) -> list[list[str]]:
    columns, numbers = _columns(table.suite), {source: n for n, source in enumerate(_citations(table), 1)}
    shown = [columns[index] for index in _shown_columns(table.suite, tasks=False)]
    grid = [["source", "backbone", "method", *shown]]
    for row, scores, _ in _published_methods(table):
        if any(name in scores for name in shown):
            values = [scores.get(name, HOLE) for name in shown]
            grid.append([f"[{numbers[row.source]}]", f"{row.backbone}, {row.pretrain}", row.method, *values])
    return grid


def _citations(table: Table) -> dict[str, str]:
    """Source → its name and citations, on one line, in the order in which the sources are quoted."""
    sources: dict[str, set[str]] = defaultdict(set)
    for row in table.published:
        sources[row.source].add(row.citation)
    return {source: _one_line(f"{source}: {'; '.join(sorted(cited))}") for source, cited in sources.items()}


def _not_quoted(table: Table, grid: list[list[str]]) -> list[str]:
    missing = len(_published_methods(table)) - len(grid) + 1
    return [f"{missing} quoted methods have no number in these columns."] if missing else []


def _published_lines(table: Table) -> list[str]:
    grid = _published_grid(table)
    return [
        "Copied as printed, from other code, protocols and selection rules; never ranked with the rows above. Known"
        " errors are listed in `results/published/README.md`.",
        "",
        *_markdown_grid(grid, left=4),
        "",
        *(f"- {line}" for line in _not_quoted(table, grid)),
        *(f"- {citation}" for citation in _citations(table).values()),
    ]


# --------------------------------------------------------------------------------------------------------------- csv


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.{_DIGITS}f}"


def _csv(rows: Iterable[Sequence[object]]) -> str:
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _section_facts(section: Section) -> list[object]:
    return [
        section.protocol,
        section.protocol_version,
        section.backbone,
        section.checkpoint,
        section.checkpoint_digest or "",
        "random" if section.random else "pretrained",
    ]


_SECTION_COLUMNS = ("protocol", "protocol_version", "backbone", "checkpoint", "checkpoint_digest", "weights")


def _wide_csv(table: Table) -> str:
    suite, columns = table.suite, _columns(table.suite)
    facts = ["complete", "seeds_min", "seeds_max", "adapter_parameters_min", "adapter_parameters_max"]
    marks = ["data_different", "other_variants"]
    quoted = ["source", "citation"]
    head = ["origin", *_SECTION_COLUMNS, "rank", "row", "method", "setting_digest", *columns, *facts, *marks, *quoted]
    lines: list[Sequence[object]] = [head]
    for section in table.sections:
        for row in section.rows:
            different = [task.split("/")[1] for task in suite.tasks if task in row.cells and row.cells[task].different]
            variants = [
                f"{task.split('/')[1]}={row.cells[task].variant}"
                for task in suite.tasks
                if task in row.cells and row.cells[task].variant != _CARD
            ]
            lines.append(
                [
                    *("measured", *_section_facts(section)),
                    *("" if row.rank is None else row.rank, row.label, row.method, row.setting_digest),
                    *(_number(score) for score in _scores(row, suite)),
                    *(f"{len(row.cells)}/{len(suite.tasks)}", *row.seeds, *row.adapter),
                    *(";".join(different), ";".join(variants), "", ""),
                ]
            )
    for quote, scores, _ in _published_methods(table):
        lines.append(
            [
                *(QUOTED, "", "", quote.backbone, quote.pretrain, "", "as the source says"),
                *("", quote.method, quote.method, ""),
                *(scores.get(name, "") for name in columns),
                *("", "", "", "", "", "", "", quote.source, quote.citation),
            ]
        )
    return _csv(lines)


def _long_csv(table: Table) -> str:
    head = [*_SECTION_COLUMNS, "row", "method", "setting_digest", "task", "task_version"]
    head += ["data_variant", "data_digest", "data_status"]
    lines: list[Sequence[object]] = [[*head, "mean", "std", "n", "seeds", "status"]]
    for section in table.sections:
        for row in section.rows:
            facts = [*_section_facts(section), row.label, row.method, row.setting_digest]
            for task in table.suite.tasks:
                if task not in row.cells:
                    lines.append([*facts, task, "", "", "", "", "", "", 0, "", "missing"])
                cells = [row.cells[task]] if task in row.cells else []
                for cell in [*cells, *(cell for cell in row.apart if cell.task == task)]:
                    status = "complete" if cell is row.cells[task] else "not in the wide table"
                    data = [cell.variant, cell.data_digest or "", "different" if cell.different else "as_card"]
                    spread = [_number(cell.mean), _number(cell.std), len(cell.seeds)]
                    seeds = " ".join(map(str, cell.seeds))
                    lines.append([*facts, task, cell.task_version, *data, *spread, seeds, status])
    return _csv(lines)


# ------------------------------------------------------------------------------------------------------------- files


def table_paths(suite: SuiteCard, results_root: Path | str) -> tuple[Path, Path, Path]:
    """Return the files of a suite: the wide CSV, the long CSV, the Markdown page."""
    folder = Path(results_root) / "tables"
    return folder / f"{suite.table}.csv", folder / f"{suite.table}_long.csv", folder / f"{suite.table}.md"


def write_tables(table: Table, results_root: Path | str) -> tuple[Path, Path, Path]:
    """Write the files of `table_paths`, each atomically, and return their paths.

    Raises:
        RecordError: If the folder cannot be written.
    """
    paths = table_paths(table.suite, results_root)
    for path, text in zip(paths, (_wide_csv(table), _long_csv(table), render_markdown(table)), strict=True):
        write_atomically(path, text)
    return paths


def run_table(results_root: Path | str, suites: Sequence[str] | None = None, published: bool = False) -> str:
    """Do what `svp-bench table` does: read all records, write the tables, and return the text to print.

    Args:
        results_root: The folder that holds `records/`; the files go to its `tables/`.
        suites: Suites to write. None: those with records, with files of earlier tables and, with `published`, with
            quoted numbers.
        published: Show the quoted numbers too.

    Raises:
        UsageError: If a suite is unknown.
        RecordError: If the tables cannot be written, or a file of published numbers is malformed.
    """
    records, problems = read_records(results_root)
    cards = {name: load_suite(name) for name in (suites if suites is not None else list_suites())}
    quoted = {name: load_published(card) if published else [] for name, card in cards.items()}
    tasks = {record.task for record in records}
    present = {record.suite for record in records} | {_suite_of(problem) for problem in problems}
    parts: list[str] = []
    for name, card in cards.items():
        old = any(path.exists() for path in table_paths(card, results_root))
        if suites is None and name not in present and not quoted[name] and not old:
            continue
        table = build_table(
            card,
            records,
            problems,
            task_versions={task: load_task(task).version for task in card.tasks if task in tasks},
            protocols=_protocols(records, name),
            published=quoted[name],
        )
        paths = write_tables(table, results_root)
        parts.append(f"{render_terminal(table)}\nWritten: {', '.join(str(path) for path in paths)}\n")
    strays = [problem for problem in problems if _suite_of(problem) not in list_suites()]
    strays += [
        Problem(f"records/{record.task}/{record.run_id}.json", f"there is no suite {record.suite!r}")
        for record in records
        if record.suite not in list_suites()
    ]
    if strays:
        parts.append("".join(["Belong to no suite:\n", *(f"  {stray.path}: {stray.reason}\n" for stray in strays)]))
    if not parts:
        folder = Path(results_root) / "records"
        return f"There are no records in {folder} yet, so no table; `svp-bench fit --config FILE` writes a record.\n"
    return "\n".join(parts)


def _protocols(records: Iterable[Record], suite: str) -> list[ProtocolCard]:
    cards = []
    for name in sorted({record.protocol for record in records if record.suite == suite}):
        try:
            cards.append(load_protocol(name))
        except UsageError:  # a record of a protocol that is gone still counts; its notes say that the card is missing
            continue
    return cards
