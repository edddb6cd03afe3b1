"""Tables, derived from records and never edited: the same records give the same bytes in any order.

A row is protocol, backbone, checkpoint digest, method and setting; a cell is a row on the same data of one task. Only
complete final records enter. The seeds of a cell are averaged, never different data. Missing results stay blank, and so
do means that need them. Complete rows are ranked by the mean over all tasks among rows of the same protocol, backbone,
checkpoint and track. Rows with synthetic data and rows on random weights are not ranked. Excluded records are listed.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from svp_bench.core.errors import UsageError, printable
from svp_bench.records.costs import CostFile, load_costs
from svp_bench.records.defaults import override_texts, overrides, recipe, row_digest
from svp_bench.records.published import PublishedRow, load_published
from svp_bench.records.record import Record
from svp_bench.records.store import Problem, read_records, write_atomically
from svp_bench.tables.comparison import check_row, compare_rows, mean_and_intervals, over_new_tasks, rank_rows
from svp_bench.tables.labels import data_key, data_name, row_labels
from svp_bench.tables.model import CARD, Cell, LeftOut, Row, Section, Table, columns_of, content_of, track_of
from svp_bench.tables.notes import DIGITS, NOT_COMPARABLE
from svp_bench.tables.plan import read_plan
from svp_bench.tables.planned import add_plan
from svp_bench.tables.render_csv import long_csv, wide_csv
from svp_bench.tables.render_latex import render_latex
from svp_bench.tables.render_text import render_markdown, render_terminal
from svp_bench.tasks.cards import ProtocolCard, SuiteCard, list_parts, list_suites, load_protocol, load_suite, load_task


def _grouped(records: Iterable[Record], key: Callable[[Record], Hashable]) -> dict[Any, list[Record]]:
    groups: dict[Any, list[Record]] = defaultdict(list)
    for record in records:
        groups[key(record)].append(record)
    return groups


def build_table(
    suite: SuiteCard,
    records: Iterable[Record],
    problems: Iterable[Problem] = (),
    *,
    task_versions: Mapping[str, int],
    as_found: Collection[str] = (),
    protocols: Iterable[ProtocolCard] = (),
    published: Iterable[PublishedRow] = (),
    control: str | None = None,
    level: float = 0.95,
    costs: CostFile | None = None,
) -> Table:
    """Derive the table of `suite`.

    Args:
        suite: Its card.
        records: Records of any suites, in any order.
        problems: Files that are no records; those of other suites are left to their tables.
        task_versions: Task → version of its card, for every task with records; those of another version do not enter.
        as_found: Tasks whose card leaves classes and counts to the data: another data set is another task. Their
            records have one section for each digest of the data. Records of another source's pixels have one, too.
        protocols: Cards whose selection rule is printed.
        published: Quoted numbers to be shown in a section of their own.
        control: Method or label of the row that all others are compared with; None: `linear`, where there is one.
        level: Of all intervals.
        costs: Costs that were measured on a machine, to be shown next to the rows.
    """
    rules = {(card.name, card.version): card for card in protocols}
    entering: list[Record] = []
    left_out: list[LeftOut] = []
    for record in records:
        if record.suite != suite.owner or (suite.tasks_of is not None and record.task not in suite.tasks):
            continue
        reason = _reason_to_leave_out(record, suite, task_versions)
        if reason is None:
            entering.append(record)
        else:
            left_out.append(LeftOut(record, *reason))
    counting: list[Record] = []
    row_keys = {id(run): (run.method, row_digest(run)) for run in entering}
    entering.sort(key=lambda run: (run.created, run.run_id))
    for runs in _grouped(
        entering, lambda run: (_section_key(run), row_keys[id(run)], _cell_key(run), run.seed)
    ).values():
        counting.append(runs[-1])
        why = f"{runs[-1].run_id} is a newer run of the same cell and seed"
        left_out += [LeftOut(old, "superseded", why) for old in runs[:-1]]
    by_section = _grouped(counting, lambda run: (*_section_key(run), data_key(run, as_found)))
    sections = [
        _section(
            suite,
            _grouped(members, lambda run: row_keys[id(run)]),
            rules.get((members[0].protocol, members[0].protocol_version)),
            level,
            data_name(members, as_found),
        )
        for key, members in sorted(by_section.items())
    ]
    sections.sort(key=lambda section: (section.random, section.data))
    return Table(
        suite=suite,
        sections=tuple(
            replace(section, comparison=compare_rows(section, control), ranks=rank_rows(section))
            for section in sections
        ),
        left_out=tuple(sorted(left_out, key=lambda out: (out.why, out.record.task, out.record.run_id))),
        problems=tuple(sorted((one for one in problems if suite_of(one) == suite.owner), key=lambda one: one.path)),
        published=tuple(published),
        level=level,
        costs=costs,
    )


def _reason_to_leave_out(record: Record, suite: SuiteCard, task_versions: Mapping[str, int]) -> tuple[str, str] | None:
    if record.kind != "final":
        return record.kind, "scored on the list that chooses, not on the test list"
    if record.status != "complete":
        return record.status, record.status_reason or "trained, not tested"
    if record.not_comparable:
        return NOT_COMPARABLE, "; ".join(record.not_comparable)
    if record.task not in suite.tasks:
        return "unknown task", f"the suite {suite.name} (version {suite.version}) has no such task"
    version = task_versions[record.task]
    if record.task_version != version:
        return "other card version", f"run on version {record.task_version} of the task card, which is now {version}"
    return None


def _section_key(run: Record) -> tuple[Any, ...]:
    return run.protocol, run.protocol_version, run.backbone, run.checkpoint_digest or "", track_of(run)


def _cell_key(run: Record) -> tuple[str, str, str, str]:
    """Return the key of a cell within its row. Only failed runs lack a data digest, and none of them enters.

    The seeds of a nested search are one cell, though each has the setting that its own search selected.
    """
    nested = run.search is not None and run.search.nested
    setting = run.setting_digest if nested else run.config_digest
    return run.task, run.data_variant, f"{run.data_digest or ''} {content_of(run)}", setting + run.source_digest


def suite_of(problem: Problem) -> str | None:
    """Return the suite that the path of a file names, None if there is none."""
    parts = problem.path.split("/")
    return parts[1] if len(parts) > 2 else None


def _section(
    suite: SuiteCard,
    by_row: Mapping[tuple[str, str], list[Record]],
    protocol: ProtocolCard | None,
    level: float,
    data: str,
) -> Section:
    labels = row_labels({key: members[0] for key, members in by_row.items()})
    rows = [_row(suite, key, labels[key], by_row[key], level, protocol) for key in sorted(by_row)]
    return Section(
        suite,
        level,
        protocol.selection if protocol else None,
        tuple(_in_order(rows, ranked=next(iter(by_row.values()))[0].checkpoint_digest is not None)),
        data,
    )


def _row(
    suite: SuiteCard,
    key: tuple[str, str],
    label: str,
    records: list[Record],
    level: float,
    protocol: ProtocolCard | None,
) -> Row:
    # The first cell of a task is shown: data of the card first, synthetic data last, of several the newest
    newest_first = sorted(
        _grouped(records, _cell_key).items(),
        key=lambda item: (max((run.created, run.run_id) for run in item[1]), item[0]),
        reverse=True,
    )
    shown_first = sorted(
        (Cell(tuple(sorted(runs, key=lambda run: run.seed))) for _, runs in newest_first),
        key=lambda cell: (cell.task, cell.synthetic, cell.different, cell.variant != CARD, -len(cell.seeds)),
    )
    cells: dict[str, Cell] = {}
    apart = tuple(cell for cell in shown_first if cells.setdefault(cell.task, cell) is not cell)
    means = [
        mean_and_intervals(suite, cells, column.weights, level) if set(column.weights) <= set(cells) else None
        for column in columns_of(suite)[len(suite.tasks) :]
    ]
    *groups, tasks, of_groups = means
    if of_groups is not None:  # the mean of the groups' own means, to the last digit
        values = [group.value for group in groups if group is not None]
        means[-1] = replace(of_groups, value=math.fsum(values) / len(values))
    present = {task: 1.0 for task in suite.tasks if task in cells}
    return Row(
        method=key[0],
        label=label,
        setting_digest=key[1],
        suite=suite,
        cells=cells,
        apart=apart,
        means=tuple(means),
        present=tasks or mean_and_intervals(suite, cells, present, level),
        new_tasks=over_new_tasks(suite, cells, level) if tasks else None,
        overrides=_overrides(suite, cells, protocol),
        shipped=bool(recipe(key[0])),
    )


def _overrides(
    suite: SuiteCard, cells: Mapping[str, Cell], protocol: ProtocolCard | None
) -> dict[str, tuple[str, ...]]:
    """Return override of the shipped settings → its tasks. The runs of a cell have one config."""
    found: dict[str, list[str]] = defaultdict(list)
    for task in suite.tasks:
        if task in cells:
            run = cells[task].records[0]
            searched = run.search.keys if run.search is not None else ()
            for text in override_texts(overrides(run, protocol, searched, epochs=True)):
                found[text].append(task)
    return {text: tuple(found[text]) for text in sorted(found)}


def _in_order(rows: list[Row], ranked: bool) -> list[Row]:
    """Rank the complete rows on real data (1, 2, 2, 4: equal means share a rank); behind them the others, by name.

    Rows on other images have no common ranking: ranked are those on the data that most rows have, if there are such.
    """
    by_name = sorted(rows, key=lambda row: (row.label, row.setting_digest))
    if not ranked:
        return by_name
    data = {
        row.label: tuple(sorted((task, *cell.data[:2]) for task, cell in row.cells.items()))
        for row in by_name
        if row.task_mean is not None and not row.synthetic
    }
    counts = Counter(data.values()).most_common(2)
    common = counts[0][0] if counts and (len(counts) == 1 or counts[0][1] > counts[1][1]) else None
    means = [
        None if row.task_mean is None or data.get(row.label, ()) != common else round(row.task_mean, DIGITS)
        for row in by_name
    ]
    scores = [mean for mean in means if mean is not None]
    placed = [
        row if mean is None else replace(row, rank=1 + sum(x > mean for x in scores))
        for row, mean in zip(by_name, means, strict=True)
    ]
    return sorted(placed, key=lambda row: len(rows) + 1 if row.rank is None else row.rank)


# ------------------------------------------------------------------------------------------------------------- files


def table_paths(suite: SuiteCard, results_root: Path | str) -> tuple[Path, Path, Path, Path]:
    """Return the files of a suite: the wide CSV, the long CSV, the Markdown page, the LaTeX table."""
    folder = Path(results_root) / "tables"
    names = (f"{suite.table}.csv", f"{suite.table}_long.csv", f"{suite.table}.md", f"{suite.table}.tex")
    return folder / names[0], folder / names[1], folder / names[2], folder / names[3]


def write_tables(table: Table, results_root: Path | str) -> tuple[Path, Path, Path, Path]:
    """Write the files of `table_paths`, each atomically, and return their paths.

    Raises:
        RecordError: If the folder cannot be written.
    """
    paths = table_paths(table.suite, results_root)
    texts = (wide_csv(table), long_csv(table), render_markdown(table), render_latex(table))
    for path, text in zip(paths, texts, strict=True):
        write_atomically(path, text)
    return paths


def load_table(
    card: SuiteCard,
    records: Sequence[Record],
    problems: Iterable[Problem] = (),
    published: Iterable[PublishedRow] = (),
    control: str | None = None,
    level: float = 0.95,
    costs: CostFile | None = None,
) -> Table:
    """Derive the table of the suite `card` as `build_table` does, with task and protocol cards as they are now."""
    tasks = {record.task for record in records}
    return build_table(
        card,
        records,
        problems,
        task_versions={task: load_task(task).version for task in card.tasks if task in tasks},
        as_found=[task for task in card.tasks if task in tasks and load_task(task).as_found],
        protocols=_protocols(records, card.owner),
        published=published,
        control=control,
        level=level,
        costs=costs,
    )


def load_tables(results_root: Path | str, suites: Sequence[str] | None = None, level: float = 0.95) -> list[Table]:
    """Return the tables of the named suites, or of all, from the records below `results_root`."""
    records, problems = read_records(results_root)
    cards = map(load_suite, list_suites() if suites is None else suites)
    return [load_table(card, records, problems, level=level) for card in cards]


def suites_of(records: Iterable[Record]) -> list[str]:
    """Return the suites to show by default: all, a part in the place of its suite if just its tasks were tested."""
    tested: dict[str, set[str]] = defaultdict(set)
    for record in records:
        if record.kind == "final" and record.status == "complete":
            tested[record.suite].add(record.task)
    shown = []
    for name in list_suites():
        parts = [part for part in list_parts(name) if {*load_suite(part).tasks} == tested[name]]
        shown.append(parts[0] if parts else name)
    return shown


def run_table(
    results_root: Path | str,
    suites: Sequence[str] | None = None,
    published: bool = False,
    control: str | None = None,
    all_columns: bool = False,
    comparisons: Path | str | None = None,
    backbones: Callable[[], Iterable[str]] = tuple,
    costs: Path | str | None = None,
) -> str:
    """Write the tables of all records, and return the text of `svp-bench table`; its help explains the arguments.

    Without `suites`, those with records, with files of earlier tables, with `published` those with quoted numbers, and
    that of the planned `comparisons`. `backbones`: see `tables.planned.add_plan`.

    Raises:
        UsageError: If a suite is unknown, no table has a row named `control`, or `comparisons` is malformed.
        RecordError: If the tables cannot be written, or a file of published numbers or costs is malformed.
    """
    plan = None if comparisons is None else read_plan(comparisons)
    measured = None if costs is None else load_costs(costs)
    records, problems = read_records(results_root)
    names = dict.fromkeys(suites if suites is not None else suites_of(records))
    if plan is not None and suites is None:
        names[plan.plan.suite] = None
    cards = {name: load_suite(name) for name in names}
    quoted = {name: load_published(card) if published else [] for name, card in cards.items()}
    present = {record.suite for record in records} | {suite_of(problem) for problem in problems}
    tables: list[Table] = []
    for name, card in cards.items():
        old = any(path.exists() for path in table_paths(card, results_root))
        planned = plan is not None and plan.plan.suite == name
        if suites is None and card.owner not in present and not quoted[name] and not old and not planned:
            continue
        tables.append(load_table(card, records, problems, quoted[name], control, costs=measured))
    check_row(tables, control, "--control")
    if not Path(results_root).is_dir() and not any(quoted.values()):
        return _no_records(results_root)  # a mistyped folder is not made; quoted numbers alone are a table
    if plan is not None:
        tables = add_plan(tables, plan, backbones)
    parts: list[str] = []
    for table in tables:
        paths = write_tables(table, results_root)
        shown = render_terminal(table, all_columns=all_columns)
        parts.append(f"{shown}\nWritten: {', '.join(printable(path) for path in paths)}\n")
    parts += listed(outside_of_suites(records, problems))
    if (Path(results_root) / "replications").is_dir():
        parts += run_tax(results_root, suites)
    return "\n".join(parts) or _no_records(results_root)


def run_tax(results_root: Path | str, suites: Sequence[str] | None = None) -> list[str]:
    """Write the tables of the test-peek tax from the replications below `results_root`; return the texts to print."""
    from svp_bench.records.replication import read_replications
    from svp_bench.tables.test_peeking import tax_path, write_tax

    found, problems = read_replications(results_root)
    records = [one.honest_record() for one in found]
    present = {record.suite for record in records} | {suite_of(problem) for problem in problems}
    parts = [
        write_tax(load_table(card, records, problems), {one.run.run_id: one for one in found}, results_root)
        for card in map(load_suite, list_suites() if suites is None else suites)
        if card.owner in present or tax_path(card, results_root).exists()
    ]
    return parts + listed(outside_of_suites((), problems))


def run_compare(results_root: Path | str, first: str, second: str, suites: Sequence[str] | None = None) -> str:
    """Return the text of `svp-bench table --compare`: two rows, first minus second, task by task.

    Raises:
        UsageError: If a suite is unknown, a name is that of no row or of several, or no section has both rows.
    """
    from svp_bench.tables.pairwise import compare_pair, render_pairs

    tables = load_tables(results_root, suites)
    if not any(table.sections for table in tables):
        return _no_records(results_root)
    return render_pairs(compare_pair(tables, first, second))


def _no_records(results_root: Path | str) -> str:
    folder = Path(results_root) / "records"
    return f"There are no records in {folder} yet, so no table; `svp-bench fit --config FILE` writes a record.\n"


def listed(strays: Iterable[Problem]) -> list[str]:
    """Return the text on files that belong to no suite, if there are such."""
    lines = [printable(f"  {stray.path}: {stray.reason}") for stray in strays]
    return ["\n".join(["Belong to no suite:", *lines, ""])] if lines else []


def outside_of_suites(records: Iterable[Record], problems: Iterable[Problem]) -> list[Problem]:
    """Return the files and records that belong to no suite here."""
    known = list_suites()
    strays = [problem for problem in problems if suite_of(problem) not in known]
    for record in records:
        if record.suite not in known:
            reason = f"there is no suite {record.suite!r} here; --tasks_dir DIR adds cards"
            strays.append(Problem(f"records/{record.task}/{record.run_id}.json", reason))
    return strays


def _protocols(records: Iterable[Record], suite: str) -> list[ProtocolCard]:
    cards = []
    for name in sorted({record.protocol for record in records if record.suite == suite}):
        try:
            cards.append(load_protocol(name))
        except UsageError:  # a record of a protocol that is gone still counts; its notes say that the card is missing
            continue
    return cards
