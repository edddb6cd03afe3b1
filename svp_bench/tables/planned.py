"""Results of planned comparisons (`tables.plan`), from the sections of a table."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from svp_bench.core.errors import ConfigError, UsageError, plural, unknown_name
from svp_bench.core.resources import configs_dir
from svp_bench.records.defaults import row_digest
from svp_bench.stats.estimates import FEWEST_SOURCES, Paired
from svp_bench.stats.inference import Runs, difference_of_differences, p_of_zero, paired
from svp_bench.stats.significance import holm
from svp_bench.tables.comparison import sources_of
from svp_bench.tables.model import Row, Section, Table
from svp_bench.tables.notes import MISSING, heading, interval, p_value, percent, short_name, signed, span
from svp_bench.tables.plan import Outcome, Plan, PlanFile, Planned, PlanResult, Verdict
from svp_bench.tasks.cards import SuiteCard


def add_plan(tables: Iterable[Table], file: PlanFile, backbones: Callable[[], Iterable[str]]) -> list[Table]:
    """Return the tables, that of the plan's suite with the results of its comparisons.

    Args:
        tables: One a suite.
        file: The plan.
        backbones: Returns the names of all backbones; called only if a backbone of the plan has no records.

    Raises:
        ConfigError: If a method or backbone of the plan is unknown; the text begins with `file:line:`.
        UsageError: If the suite of the plan has no table here.
    """
    plan, found = file.plan, list(tables)
    if plan.suite not in [table.suite.name for table in found]:
        raise UsageError(
            f"{file.node.where(['suite'])}: compares in the suite {plan.suite!r}; add --suite {plan.suite}"
        )
    _check_names(file, found, backbones)
    return [
        replace(table, planned=PlanResult(plan, outcomes_of(plan, table))) if table.suite.name == plan.suite else table
        for table in found
    ]


def _check_names(file: PlanFile, tables: Iterable[Table], backbones: Callable[[], Iterable[str]]) -> None:
    sections = [section for table in tables for section in table.sections]
    methods = {path.stem for path in (configs_dir() / "method").glob("*.yaml")}
    methods |= {name for section in sections for row in section.rows for name in (row.method, row.label)}
    known = {section.first.backbone for section in sections}
    if not known.issuperset(name for one in file.plan.comparisons for name in one.backbones):
        known |= set(backbones())
    for number, one in enumerate(file.plan.comparisons):
        for kind, names, allowed in (("method", one.methods, methods), ("backbone", one.backbones, known)):
            for index, name in enumerate(names):
                if name not in allowed:
                    place = file.node.where(["comparisons", number, f"{kind}s", index])
                    raise unknown_name(kind, name, allowed, where=place, error=ConfigError)


# ------------------------------------------------------------------------------------------------------------ records


def outcomes_of(plan: Plan, table: Table) -> tuple[Outcome, ...]:
    """Return the results of a plan, in its order.

    A comparison is computed once all of its rows have all tasks of the suite with all seeds of the plan, on the same
    images; a seed whose run failed is left out, and listed. Holm's family is always the whole plan: comparisons
    without a p count as p = 1, so that an adjusted p can only fall when their records come.

    A finding has an adjusted p below 1 - level and an estimate of at least `smallest_difference` in either direction.
    Everything else is undecided, which is not equal.

    Args:
        plan: The plan.
        table: Of its suite.
    """
    found = [_compare(one, plan.seeds, table) for one in plan.comparisons]
    raw = {number: p_of_zero(one.new_tasks) for number, (one, *_) in enumerate(found) if isinstance(one, Paired)}
    adjusted = holm({number: 1.0 if (p := raw.get(number)) is None else p for number in range(len(found))})
    outcomes = []
    for number, (planned, (result, missing, failed)) in enumerate(zip(plan.comparisons, found, strict=True)):
        p = raw.get(number)
        verdict: Verdict = "undecided" if result is not None else "records missing"
        if result is not None and p is not None and adjusted[number] < 1 - table.level:
            large = round(abs(result.new_tasks.value), 9) >= plan.smallest_difference  # 1 may be stored as 0.999…
            verdict = "finding" if large else "undecided"
        holm_p = None if p is None else adjusted[number]
        changed = _changed_recipes(planned, table)
        outcomes.append(Outcome(planned, result, p, holm_p, verdict, missing, failed, changed))
    return tuple(outcomes)


def _changed_recipes(planned: Planned, table: Table) -> tuple[str, ...]:
    """Return a phrase for each row of a comparison that was not trained by its shipped recipe."""
    found = []
    for section in (_section_of(table, backbone) for backbone in planned.backbones):
        if isinstance(section, str):
            continue
        for method in planned.methods:
            row = _row_of(section, method)
            changed = () if isinstance(row, str) else [one for one in row.overrides if not is_argument(one)]
            if changed:
                found.append(f"{method} on {section.first.backbone} ({', '.join(changed)})")
    return tuple(found)


def _compare(
    planned: Planned, seeds: Sequence[int], table: Table
) -> tuple[Paired | None, tuple[str, ...], tuple[str, ...]]:
    """Return the result of a comparison, what it lacks, and its failed runs."""
    suite = table.suite
    missing: list[str] = []
    failed: list[str] = []
    runs: list[Runs] = []
    places = [_section_of(table, backbone) for backbone in planned.backbones]
    sections = [place for place in places if isinstance(place, Section)]
    missing += [place for place in places if isinstance(place, str)]
    if len(sections) == 2 and (mixed := _different(*sections)):
        missing.append(mixed)
    rows: list[Row] = []
    for section in sections:
        for method in planned.methods:
            row = _row_of(section, method)
            if isinstance(row, str):
                missing.append(f"{row} on {section.first.backbone}")
                continue
            rows.append(row)
            lost = _failed_seeds(table, section, row)
            missing += _missing_runs(suite, row, seeds, lost, section.first.backbone)
            failed += [
                f"{row.label} on {section.first.backbone}, {short_name(task)}, seed {seed}"
                for task in suite.tasks
                for seed in sorted(lost[task] & set(seeds))
            ]
            runs.append(
                {task: {s: x for s, x in cell.scores.items() if s in seeds} for task, cell in row.cells.items()}
            )
    if missing:
        return None, tuple(missing), tuple(failed)
    if problem := _not_paired(suite, rows, runs):
        return None, (problem,), tuple(failed)
    sources = sources_of(suite)
    if len(runs) == 2:
        return paired(runs[0], runs[1], sources, table.level), (), tuple(failed)
    result = difference_of_differences(runs[0], runs[1], runs[2], runs[3], sources, table.level)
    return result, (), tuple(failed)


def _section_of(table: Table, backbone: str) -> Section | str:
    """Return the section of a backbone with pre-trained weights, or what is missing."""
    every = [one for one in table.sections if one.first.backbone == backbone and not one.random]
    found = [one for one in every if not one.data] or every  # of several data variants, the card's
    if len(found) == 1:
        return found[0]
    if not found:
        return f"no complete final run on {backbone}"
    return (
        f"{backbone} has {plural(len(found), 'section')} ({'; '.join(map(heading, found))}); give the comparisons a "
        "results folder with one protocol, checkpoint, track and data variant"
    )


def _different(one: Section, other: Section) -> str:
    """Say in which of protocol and track two sections differ; "" if in neither."""
    protocols = {f"{run.protocol} {run.protocol_version}" for run in (one.first, other.first)}
    if len(protocols) > 1:
        return f"the backbones have different protocols: {' and '.join(sorted(protocols))}"
    if one.track != other.track:
        return f"the backbones have different tracks: {one.track.words}; {other.track.words}"
    return ""


def _row_of(section: Section, name: str) -> Row | str:
    """Return the row of a label with settings, or of a method as shipped; or what is missing.

    The only row of a method may be a control that uses its code with other arguments: it must not stand for the method.
    """
    by_method = [row for row in section.rows if row.method == name]
    if not by_method:
        return next((row for row in section.rows if row.label == name), f"no run of {name}")
    shipped = [row for row in by_method if not any(map(is_argument, row.overrides))]
    if len(shipped) == 1:
        return shipped[0]
    if shipped:
        labels = "; ".join(repr(row.label) for row in shipped)
        return f"{plural(len(shipped), 'row')} of {name} ({labels}: name one of them)"
    others = [f"{row.label}: {next(filter(is_argument, row.overrides))}" for row in by_method]
    return f"no run of {name} with its shipped arguments ({'; '.join(others)})"


def is_argument(override: str) -> bool:
    """Return whether an override (`Row.overrides`) is of an argument of the method, not of its training."""
    return override.startswith("model.method.")


def _failed_seeds(table: Table, section: Section, row: Row) -> Mapping[str, set[int]]:
    """Return task → seeds without a score whose final run failed."""
    found: dict[str, set[int]] = defaultdict(set)
    for record in (out.record for out in table.left_out if out.why == "failed" and out.record.kind == "final"):
        cell = row.cells.get(record.task)
        same = (record.backbone, row_digest(record)) == (section.first.backbone, row.setting_digest)
        if same and record.method == row.method and (cell is None or record.seed not in cell.seeds):
            found[record.task].add(record.seed)
    return found


def _missing_runs(
    suite: SuiteCard, row: Row, seeds: Sequence[int], failed: Mapping[str, set[int]], backbone: str
) -> list[str]:
    """Return a phrase on the runs that a row lacks, or nothing."""
    lacks: dict[str, list[int]] = {}
    for task in suite.tasks:
        have = set(row.cells[task].seeds if task in row.cells else ()) | failed[task]
        if absent := sorted(set(seeds) - have):
            lacks[short_name(task)] = absent
    if not lacks:
        return []
    listed = ", ".join(
        task if len(absent) == len(seeds) else f"{task} (seed {', '.join(map(str, absent))})"
        for task, absent in lacks.items()
    )
    count = sum(map(len, lacks.values()))
    return [f"{count} of {plural(len(seeds) * len(suite.tasks), 'run')} of {row.label} on {backbone}: {listed}"]


def _not_paired(suite: SuiteCard, rows: Sequence[Row], runs: Sequence[Runs]) -> str:
    """Say why complete rows cannot be paired; "" if they can."""
    for task in suite.tasks:
        cells = [row.cells.get(task) for row in rows]
        if any(cell is not None and cell.synthetic for cell in cells):
            return f"{short_name(task)} has synthetic data"
        if len({cell.data for cell in cells if cell is not None}) > 1:
            return f"the rows are on different images of {short_name(task)}"
        if not set.intersection(*(set(side.get(task, ())) for side in runs)):
            return f"no seed of {short_name(task)} is left: a run of each failed"
    return ""


# --------------------------------------------------------------------------------------------------------------- text


def planned_grid(result: PlanResult) -> list[list[str]]:
    """Return header and rows as text: the first two columns are text."""
    head = ["no.", "comparison", "difference", "interval", "new seeds", "p", "p (Holm)", "seeds", "verdict"]
    grid = [head]
    for number, one in enumerate(result.outcomes, 1):
        estimate = signed(one.new_tasks.value if one.new_tasks else None)
        intervals = interval(one.new_tasks), interval(one.new_seeds)
        seeds = span(*one.seeds) if one.seeds else MISSING
        facts = p_value(one.p), p_value(one.holm), seeds, one.verdict
        grid.append([str(number), one.planned.words, estimate, *intervals, *facts])
    return grid


def planned_notes(table: Table) -> list[str]:
    """Explain the columns and the rule, and list what is missing or failed; nothing without a plan."""
    if table.planned is None:
        return []
    plan, outcomes = table.planned.plan, table.planned.outcomes
    suite, level, count = table.suite, percent(table.level), len(outcomes)
    sources = len(sources_of(suite))
    notes = [
        f"Differences in points of the mean over {plural(len(suite.tasks), 'task')}, each weighing the same, of runs "
        f"with the same seed (of {', '.join(map(str, plan.seeds))}) on the same images. Interval ({level}, not "
        f"adjusted): over the suite's {plural(sources, 'independent source')} of images (CR2, Satterthwaite). New "
        f"seeds ({level}): other seeds on these tasks.",
        f"p: two-sided t test of that interval; adjusted by Holm over {plural(count, 'planned comparison')}.",
        f"Finding: an adjusted p below {1 - table.level:.2g} and a difference of {plan.smallest_difference:g} or more, "
        "up or down. Otherwise undecided, which is not equal.",
    ]
    if any(one.found is None for one in outcomes):
        notes.append("A comparison with missing records counts as p = 1: its records can only lower the others' p.")
    if sources < FEWEST_SOURCES:
        notes.append(f"No interval and no p with fewer than {FEWEST_SOURCES} independent sources of images.")
    for number, one in enumerate(outcomes, 1):
        parts = [one.planned.question] if one.planned.question else []
        parts += [f"Missing: {'; '.join(one.missing)}."] if one.missing else []
        parts += [f"Not the shipped recipe: {'; '.join(one.overrides)}."] if one.overrides else []
        parts += [f"Failed, left out with their seed: {'; '.join(one.failed)}."] if one.failed else []
        notes += [f"Comparison {number}: {' '.join(parts)}"] if parts else []
    return notes
