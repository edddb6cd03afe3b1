"""How many seeds a claim needs, from the records: the text of `svp-bench power` (arithmetic: `power.py`)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svp_bench.core.errors import RecordError, UsageError, plural, printable, unknown_name
from svp_bench.records.store import read_records
from svp_bench.stats.inference import spread
from svp_bench.stats.power import PowerAnswer, image_floor, seeds_needed
from svp_bench.stats.significance import mcnemar
from svp_bench.tables.build import load_table
from svp_bench.tables.comparison import find_row, shared_bits, shared_tasks, sources_of
from svp_bench.tables.model import Row, Section
from svp_bench.tables.notes import MISSING, columns, heading, percent, short_name
from svp_bench.tables.render_text import align, wrap
from svp_bench.tasks.cards import SuiteCard, list_suites, load_suite

__all__ = ["AT", "Noise", "Plan", "make_plan", "noise_of", "run_power"]

AT = (3, 5, 10, 20)
"""Seeds a task whose power is tabled."""


@dataclass(frozen=True)
class Noise:
    """What the records know of the variance over seeds.

    Attributes:
        variances: Task → sample variance over seeds, in points²; tasks without two seeds have none.
        df: Task → degrees of freedom behind it.
        of: "pairs" for differences of two rows' runs with the same seed, "method" for one row's runs.
        whose: In words.
    """

    variances: dict[str, float]
    df: dict[str, int]
    of: Literal["method", "pairs"]
    whose: str


@dataclass(frozen=True)
class Plan:
    """How many seeds a claim about the suite's mean needs.

    Attributes:
        whole: For the suite's mean. Its `effect` and detectable differences are in units of `scale` points.
        alone: For each task by itself.
        scale: See `make_plan`.
        known: Tasks with a known variance.
        total: Tasks of the suite.
    """

    whole: PowerAnswer
    alone: PowerAnswer
    scale: float
    known: int
    total: int


def noise_of(suite: SuiteCard, section: Section, method: str | None, control: str | None) -> Noise:
    """Return the variances over seeds of a section.

    Args:
        suite: Its suite.
        section: The section.
        method: Label or method of a row; None: the variances of all rows are pooled, task by task.
        control: Another row: the variances are those of the paired differences.

    Raises:
        UsageError: If a name has several rows.
    """
    rows = [row for row in section.rows if not row.synthetic]
    first = find_row(rows, method) if method is not None else None
    second = find_row(rows, control) if control is not None else None
    if control is not None:
        if first is None or second is None:
            return Noise({}, {}, "pairs", f"{method} and {control}")
        samples = {task: [_differences(first, second, task)] for task in shared_tasks(suite, first, second)}
        whose = f"differences of {first.label} and {second.label}, runs with the same seed"
        return Noise(*_pooled(samples), "pairs", whose)
    if method is not None:
        chosen = [first] if first is not None else []
        alone = f"runs of {first.label if first is not None else method}"
        whose = f"{alone}; the other method is taken to be as noisy, and independent"
    else:
        chosen = rows
        pooled = f"runs of {plural(len(rows), 'row')}, pooled task by task"
        whose = f"{pooled}; runs of two methods are taken as independent"
    samples = {
        task: [list(row.cells[task].scores.values()) for row in chosen if task in row.cells] for task in suite.tasks
    }
    return Noise(*_pooled(samples), "method", whose)


def _differences(first: Row, second: Row, task: str) -> list[float]:
    ours, theirs = first.cells[task].scores, second.cells[task].scores
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _pooled(samples: dict[str, list[list[float]]]) -> tuple[dict[str, float], dict[str, int]]:
    """Task → variance and degrees of freedom, pooled over its samples of two values or more."""
    variances: dict[str, float] = {}
    df: dict[str, int] = {}
    for task, lists in samples.items():
        known = [(found.std**2, found.n - 1) for found in map(spread, lists) if found.std is not None]
        if known:
            df[task] = sum(free for _, free in known)
            variances[task] = math.fsum(variance * free for variance, free in known) / df[task]
    return variances, df


def make_plan(noise: Noise, tasks: Sequence[str], effect: float, level: float, power: float) -> Plan:
    """Plan the seeds for a claim of `effect` points of the mean over `tasks`.

    Tasks without a known variance are taken to be as noisy as the known ones on average. Their share is laid upon the
    known ones, whose weights grow to sqrt(w² + W / m) with W the sum of the others' w² and m known tasks: the mean then
    has the variance that the assumption gives, with the degrees of freedom of what is known. These weights sum to
    `scale`, by which the effect is divided, because weights are taken relative to their sum.

    Raises:
        StatsError: If no variance is known, or a number is outside its range.
    """
    known = [task for task in tasks if task in noise.variances]
    share = 1 / len(tasks)
    weight = math.sqrt(share**2 + (len(tasks) - len(known)) * share**2 / len(known)) if known else share
    scale = weight * len(known) if known else 1.0
    variances = {task: noise.variances[task] for task in known}
    df = {task: noise.df[task] for task in known}
    whole = seeds_needed(effect / scale, variances, df, level=level, power=power, of=noise.of, at=AT)
    alone = seeds_needed(effect, variances, df, level=level, power=power, of=noise.of, at=())
    return Plan(whole, alone, scale, len(known), len(tasks))


def run_power(
    results_root: Path | str,
    effect: float,
    suites: Sequence[str] | None = None,
    method: str | None = None,
    control: str | None = None,
    level: float = 0.95,
    power: float = 0.8,
) -> str:
    """Do what `svp-bench power` does, and return the text to print.

    Args:
        results_root: The folder that holds `records/`.
        effect: Points of the suite's mean that a claim is about.
        suites: Suites to plan for; None: those with records.
        method: Label or method of the row whose noise counts; None: that of all rows.
        control: Another row: the noise is that of their differences.
        level: Of the interval that is to exclude zero.
        power: Wanted chance that it does.

    Raises:
        UsageError: If a suite or row is unknown, or a name has several rows.
        RecordError: If no records have replicated seeds.
    """
    if control is not None and method is None:
        raise UsageError("--control NAME needs --method NAME: the noise is that of their differences")
    records, problems = read_records(results_root)
    cards = [load_suite(name) for name in (suites if suites is not None else list_suites())]
    tables = [load_table(card, records, problems, level=level) for card in cards]
    rows = [row for table in tables for section in table.sections for row in section.rows]
    for name, flag in ((method, "--method"), (control, "--control")):
        names = {known for row in rows for known in (row.method, row.label)}
        if name is not None and names and name not in names:
            raise unknown_name("method or row", name, names, where=flag)
    if method is not None and method == control:
        raise UsageError(f"--method and --control are both {method!r}; name two rows")
    texts = []
    for table in tables:
        for section in table.sections:
            noise = noise_of(table.suite, section, method, control)
            if noise.variances and not section.random:
                floor = _floor(table.suite, section, method, control, level)
                plan = make_plan(noise, table.suite.tasks, effect, level, power)
                texts.append(_text(table.suite, section, noise, plan, effect, floor))
    if not texts:
        what = " and ".join(name for name in (method, control) if name is not None) or "any row"
        raise RecordError(
            f"no replicated seeds: in {Path(results_root) / 'records'} no cell of {what} on pre-trained weights has "
            f"two {'shared ' if control else ''}seeds, and so their variance is unknown; run some tasks with other "
            "seeds (`svp-bench sweep --seeds 0,1,2 ...`, or `--seed_everything 1`)"
        )
    return "\n".join(texts)


def _floor(suite: SuiteCard, section: Section, method: str | None, control: str | None, level: float) -> float | None:
    """Return the half-width that sampling test images alone leaves to the difference of two rows; None if unknown."""
    if method is None or control is None:
        return None
    first, second = find_row(section.rows, method), find_row(section.rows, control)
    if first is None or second is None:
        return None
    shares: dict[str, float] = {}
    counts: dict[str, int] = {}
    for task in shared_tasks(suite, first, second):
        pairs = list(shared_bits(first.cells[task], second.cells[task]).values())
        if pairs:
            counts[task] = int(pairs[0][0].size)
            apart = [found.b + found.c for found in (mcnemar(a, b) for a, b in pairs)]
            shares[task] = math.fsum(apart) / len(apart) / counts[task]
    if len(shares) < len(suite.tasks):
        return None
    return image_floor(shares, counts, level=level, sources=sources_of(suite))


def _text(suite: SuiteCard, section: Section, noise: Noise, plan: Plan, effect: float, floor: float | None) -> str:
    whole, alone = plan.whole, plan.alone
    level, mean = percent(whole.level), columns(suite)[-2]
    points = f"{effect:g} {'point' if effect == 1 else 'points'}"
    notes = [
        f"Claim: two methods differ by {points} in the {mean}. The {level} interval of the difference (these tasks, "
        f"new seeds) is to exclude zero with power {percent(whole.power)}.",
        f"Variance over seeds: {noise.whose}; {plural(sum(noise.df.values()), 'degree')} of freedom.",
    ]
    if plan.known < plan.total:
        notes.append(
            f"Replicated seeds on {plan.known} of {plural(plan.total, 'task')}; the others are taken to be as "
            "noisy as these on "
            "average."
        )
    grid = [["seeds a task", "power", "cautious", "detectable", "cautious"]]
    for found in whole.power_at:
        grid.append(
            [
                str(found.n),
                f"{found.power:.3f}",
                f"{found.cautious_power:.3f}",
                f"{found.detectable * plan.scale:.2f}",
                f"{found.cautious_detectable * plan.scale:.2f}",
            ]
        )
    tasks = [["task", "std", "df", "seeds", "cautious"]]
    for task in suite.tasks:
        if task in alone.tasks:
            need = alone.tasks[task]
            std = f"{math.sqrt(noise.variances[task]):.2f}"
            tasks.append([short_name(task), std, str(noise.df[task]), _seeds(need.seeds), _seeds(need.cautious_seeds)])
        else:
            tasks.append([short_name(task), MISSING, "0", MISSING, MISSING])
    lines = [
        suite.title,
        heading(section),
        *wrap(notes),
        "",
        f"Seeds a task, for both methods: {_seeds(whole.seeds)} (plug-in), {_seeds(whole.cautious_seeds)} (cautious)",
        "",
        *align(grid, 0),
        "",
        f"The same {points} on one task alone",
        *align(tasks, 1),
        *wrap(
            [
                "Plug-in: the variances as estimated; such a plan misses its power about every second time. Cautious: "
                f"their upper {percent(whole.caution)} bound. Detectable: points found with power "
                f"{percent(whole.power)}.",
                "More seeds say nothing about new tasks.",
            ]
        ),
    ]
    if floor is not None:
        lines += wrap(
            [f"The sampling of test images alone leaves ± {floor:.2f} points ({level}) with any number of seeds."]
        )
    return "\n".join(map(printable, lines)) + "\n"


def _seeds(count: int | None) -> str:
    return "more than 10000" if count is None else str(count)
