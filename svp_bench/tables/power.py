"""The text of `svp-bench power`: how many seeds a claim needs, by the variance over seeds in the records."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from svp_bench.core.errors import RecordError, UsageError, plural, printable
from svp_bench.stats.estimates import moments_of
from svp_bench.stats.power import Design
from svp_bench.tables.build import load_tables
from svp_bench.tables.comparison import check_row, find_row, shared_tasks
from svp_bench.tables.model import Row, Section
from svp_bench.tables.notes import MISSING, columns, heading, percent, short_name
from svp_bench.tables.render_text import align, wrap

_AT = (3, 5, 10, 20)  # seeds a task whose power is tabled
_CAUTION = 0.8


@dataclass(frozen=True)
class Noise:
    """Variance over seeds in the records.

    Attributes:
        variances: Task → sample variance over seeds, in points²; tasks without two seeds have none.
        df: Task → degrees of freedom behind it.
        runs: 1 for the variances of paired differences, 2 for those of single runs: a difference has two.
        whose: In words.
    """

    variances: dict[str, float]
    df: dict[str, int]
    runs: int
    whose: str


def noise_of(section: Section, method: str | None, control: str | None) -> Noise:
    """Return the variances over seeds of a section.

    Args:
        section: The section.
        method: Label or method of a row; None: the variances of all rows are pooled, task by task.
        control: Another row: the variances are those of the paired differences.

    Raises:
        UsageError: If a name has several rows.
    """
    rows = [row for row in section.rows if not row.synthetic]
    first, second = (None if name is None else find_row(rows, name) for name in (method, control))
    if control is not None:
        if first is None or second is None:
            return Noise({}, {}, 1, "")
        samples = {task: [_differences(first, second, task)] for task in shared_tasks(section.suite, first, second)}
        return Noise(*_pooled(samples), 1, f"differences of {first.label} and {second.label}, runs with the same seed")
    if method is None:
        whose = f"runs of {plural(len(rows), 'row')}, pooled task by task; runs of two methods are taken as independent"
    else:
        rows = [first] if first is not None else []
        whose = f"runs of {first.label if first else method}; the other method is taken to be as noisy, and independent"
    samples = {t: [list(row.cells[t].scores.values()) for row in rows if t in row.cells] for t in section.suite.tasks}
    return Noise(*_pooled(samples), 2, whose)


def _differences(first: Row, second: Row, task: str) -> list[float]:
    ours, theirs = first.cells[task].scores, second.cells[task].scores
    return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]


def _pooled(samples: dict[str, list[list[float]]]) -> tuple[dict[str, float], dict[str, int]]:
    """Task → variance and degrees of freedom, pooled over its samples of two values or more."""
    variances: dict[str, float] = {}
    df: dict[str, int] = {}
    for task, lists in samples.items():
        known = [((moments_of(values)[1] or 0.0), len(values) - 1) for values in lists if len(values) > 1]
        if known:
            df[task] = sum(free for _, free in known)
            variances[task] = math.fsum(variance * free for variance, free in known) / df[task]
    return variances, df


def design_of(noise: Noise, tasks: Sequence[str], level: float) -> Design:
    """Return the design of a comparison of the means over `tasks`.

    Tasks without a known variance are taken to be as noisy as the known ones on average. Their share is laid upon the
    known ones, whose weights grow to sqrt(w² + W / m) with W the sum of the others' w² and m known tasks: the mean then
    has the variance that the assumption gives, with the degrees of freedom of the known ones.
    """
    known = [task for task in tasks if task in noise.variances]
    square = len(tasks) ** -2 * (1 + (len(tasks) - len(known)) / len(known))
    parts = tuple(noise.runs * square * noise.variances[task] for task in known)
    return Design(parts, tuple(noise.df[task] for task in known), level)


def run_power(
    results_root: Path | str,
    effect: float,
    suites: Sequence[str] | None = None,
    method: str | None = None,
    control: str | None = None,
    level: float = 0.95,
    power: float = 0.8,
) -> str:
    """Return the text of `svp-bench power`; its help explains the arguments.

    Raises:
        UsageError: If a suite or row is unknown, or a name has several rows.
        RecordError: If no records have replicated seeds.
    """
    if control is not None and method is None:
        raise UsageError("--control NAME needs --method NAME: the noise is that of their differences")
    tables = load_tables(results_root, suites, level)
    check_row(tables, method, "--method")
    check_row(tables, control, "--control")
    if method is not None and method == control:
        raise UsageError(f"--method and --control are both {method!r}; name two rows")
    texts = []
    for section in (section for table in tables for section in table.sections if not section.random):
        noise = noise_of(section, method, control)
        if noise.variances:
            texts.append(_text(section, noise, effect, power))
    if not texts:
        what = " and ".join(name for name in (method, control) if name is not None) or "any row"
        raise RecordError(
            f"no replicated seeds: in {Path(results_root) / 'records'} no cell of {what} on pre-trained weights has "
            f"two {'shared ' if control else ''}seeds, and so their variance is unknown; run some tasks with other "
            "seeds (`svp-bench sweep --seeds 0,1,2 ...`, or `--seed_everything 1`)"
        )
    return "\n".join(texts)


def _text(section: Section, noise: Noise, effect: float, power: float) -> str:
    suite, level = section.suite, section.level
    design = design_of(noise, suite.tasks, level)
    both = (design, design.cautious(_CAUTION))
    points = f"{effect:g} {'point' if effect == 1 else 'points'}"
    notes = [
        f"Claim: two methods differ by {points} in the {columns(suite)[-2]}. The {percent(level)} interval of the "
        f"difference (these tasks, new seeds) is to exclude zero with power {percent(power)}.",
        f"Variance over seeds: {noise.whose}; {plural(sum(noise.df.values()), 'degree')} of freedom.",
    ]
    if len(noise.variances) < len(suite.tasks):
        notes.append(
            f"Replicated seeds on {len(noise.variances)} of {plural(len(suite.tasks), 'task')}; the others are taken "
            "to be as noisy as these on average."
        )
    plain, cautious = (
        "more than 10000" if seeds is None else seeds for seeds in (d.seeds(effect, power) for d in both)
    )
    grid = [["seeds a task", "power", "cautious", "detectable", "cautious"]]
    for n in _AT:
        powers, points_found = [d.power(effect, n) for d in both], [d.detectable(power, n) for d in both]
        grid.append([str(n), *(f"{x:.3f}" for x in powers), *(f"{x:.2f}" for x in points_found)])
    tasks = [["task", "std", "df"]]
    for task in suite.tasks:
        std = f"{math.sqrt(noise.variances[task]):.2f}" if task in noise.variances else MISSING
        tasks.append([short_name(task), std, str(noise.df.get(task, 0))])
    lines = [
        *(suite.title, heading(section), *wrap(notes), ""),
        *(f"Seeds a task, for both methods: {plain} (plug-in), {cautious} (cautious)", "", *align(grid, 0), ""),
        *("Standard deviation over seeds", *align(tasks, 1)),
        *wrap(
            [
                "Plug-in: the variances as estimated; such a plan misses its power about every second time. Cautious: "
                f"their upper {percent(_CAUTION)} bound. Detectable: points found with power {percent(power)}.",
                "More seeds say nothing about new tasks or other test images.",
            ]
        ),
    ]
    return "\n".join(map(printable, lines)) + "\n"
