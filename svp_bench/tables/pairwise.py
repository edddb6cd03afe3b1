"""Two rows of a table, task by task: what the seeds say, and what the test images say.

The seeds: the paired differences of runs with the same seed. The images: each record keeps one bit for each test
image, so that two runs on one list can be compared image by image; that is about these runs and other images
like these, and sees no other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from svp_bench.core.errors import UsageError, plural, printable
from svp_bench.stats.estimates import FEWEST_PAIRS, Difference, Estimate
from svp_bench.stats.inference import difference_over_images, paired, within
from svp_bench.stats.significance import holm, mcnemar, smallest_p
from svp_bench.tables.comparison import check_row, contrast, find_row, shared_bits, shared_tasks
from svp_bench.tables.model import Contrast, Row, Section, Table
from svp_bench.tables.notes import (
    MISSING,
    RANDOM_WEIGHTS,
    columns,
    heading,
    interval,
    no_outcome,
    p_value,
    percent,
    short_name,
    signed,
)
from svp_bench.tables.render_text import align, without_empty, wrap
from svp_bench.tasks.cards import SuiteCard

__all__ = ["Pair", "PairTask", "compare_pair", "middle_p", "render_pairs"]


@dataclass(frozen=True)
class PairTask:
    """Two rows on one task.

    Attributes:
        task: Full name.
        seeds: Mean of the paired differences of the shared seeds, with their t interval.
        images: The same difference over the seeds whose bits are of one split, with its interval over test images
            (`difference_over_images`); None if there are no such seeds.
        mcnemar: Seed → exact McNemar p of the two runs' bits.
        p: These p in one (`middle_p`); None without any, and where so few images divide the runs that no outcome could
            fall below 1 - level after the adjustment.
        holm: p, adjusted by Holm over the tasks that have one; None where p is.
        verdict: Of the seeds: "better", "worse", "tie" or "too few"; see `stats.cell_verdict`.
    """

    task: str
    seeds: Difference
    images: Estimate | None
    mcnemar: dict[int, float]
    p: float | None
    holm: float | None
    verdict: str


@dataclass(frozen=True)
class Pair:
    """Two rows of one section: first minus second.

    Attributes:
        section: Where both stand.
        first: A row.
        second: Another.
        tasks: The tasks that both have on the same images with a seed in common, in suite order.
        whole: Over these tasks; None if there is none.
    """

    section: Section
    first: Row
    second: Row
    tasks: tuple[PairTask, ...]
    whole: Contrast | None


def compare_pair(tables: Sequence[Table], first: str, second: str) -> list[tuple[SuiteCard, Pair]]:
    """Compare two rows in every section where both stand.

    Args:
        tables: Of one or more suites.
        first: Label or method of a row.
        second: Label or method of another.

    Raises:
        UsageError: If a name is that of no row or of several, both are one row, or no section has both.
    """
    check_row(tables, first, "--compare")
    check_row(tables, second, "--compare")
    found: list[tuple[SuiteCard, Pair]] = []
    for table in tables:
        for section in table.sections:
            a, b = find_row(section.rows, first), find_row(section.rows, second)
            if a is not None and a is b:
                raise UsageError(f"--compare: {first!r} and {second!r} are one row, {a.label!r}; name two")
            if a is not None and b is not None:
                found.append((table.suite, _pair(table, section, a, b)))
    if not found:
        raise UsageError(
            f"--compare: {first!r} and {second!r} are not in one section; rows compare under one protocol, "
            "backbone, checkpoint and track"
        )
    return found


def _pair(table: Table, section: Section, first: Row, second: Row) -> Pair:
    names = shared_tasks(table.suite, first, second)
    whole = contrast(table.suite, first, second, table.level) if names else None
    tasks = []
    least: dict[str, float] = {}
    for task in names:
        ours, theirs = first.cells[task], second.cells[task]
        difference = paired({task: ours.scores}, {task: theirs.scores}, [[task]], level=table.level).tasks[0]
        bits = shared_bits(ours, theirs)
        tests = {seed: mcnemar(a, b) for seed, (a, b) in bits.items()}
        if tests:
            least[task] = middle_p([smallest_p(test.b + test.c or 1) for test in tests.values()])
        tasks.append(
            PairTask(
                task=task,
                seeds=Difference(task, within(difference.estimate, -100, 100), difference.n_pairs),
                images=difference_over_images(list(bits.values()), table.level) if bits else None,
                mcnemar={seed: test.p for seed, test in tests.items()},
                p=middle_p([test.p for test in tests.values()]) if tests else None,
                holm=None,
                verdict=whole.verdicts[task] if whole else "too few",
            )
        )
    family = _testable(least, 1 - table.level)
    tasks = [found if found.task in family else replace(found, p=None) for found in tasks]
    adjusted = holm({found.task: found.p for found in tasks if found.p is not None})
    return Pair(
        section=section,
        first=first,
        second=second,
        tasks=tuple(replace(found, holm=adjusted.get(found.task)) for found in tasks),
        whole=whole,
    )


def _testable(least: Mapping[str, float], bar: float) -> set[str]:
    """Return a family of tests that Holm's adjustment could all reject, by the smallest p that each could give.

    The smallest p depends on how many images divide the runs, not on which run has them right, so that leaving tests
    out by it keeps the adjustment valid.

    Source: Tarone 1990, Biometrics 46, 515-522.
    """
    family = dict(least)
    while family and max(holm(family).values()) >= bar:
        largest = max(family.values())
        family = {task: p for task, p in family.items() if p < largest}
    return set(family)


def middle_p(values: Sequence[float]) -> float:
    """Return one p for k tests of the same images: (k / r) times the r-th smallest, r = ⌈k / 2⌉; 2 p at most.

    For one test that is its p. It is valid however the tests depend on each other: the runs of several seeds err on the
    same hard images.

    Source: Rüger 1978, Metrika 25, 171-178.

    Args:
        values: The p of each test, at least one.
    """
    r = math.ceil(len(values) / 2)
    return min(1.0, sorted(values)[r - 1] * len(values) / r)


# --------------------------------------------------------------------------------------------------------------- text


def render_pairs(found: Sequence[tuple[SuiteCard, Pair]], level: float) -> str:
    """Return the comparisons as text for a terminal."""
    return "\n".join(_text(suite, pair, level) for suite, pair in found)


def _text(suite: SuiteCard, pair: Pair, level: float) -> str:
    lines = [f"{suite.title}: {pair.first.label} minus {pair.second.label}, in points", heading(pair.section), ""]
    if pair.section.random:
        lines.append(RANDOM_WEIGHTS)
    if pair.whole is None:
        lines.append("They share no task on the same images with a seed in common: nothing can be compared.")
        return "\n".join(lines) + "\n"
    grid = [["task", "difference", "new seeds", "pairs", "by seeds", "test images", "McNemar p", "one p", "(Holm)"]]
    for found in pair.tasks:
        p = sorted(found.mcnemar.values()) if found.p is not None else []
        spread = MISSING if not p else p_value(p[0]) if len(p) == 1 else f"{p_value(p[0])}–{p_value(p[-1])}"
        grid.append(
            [
                short_name(found.task),
                signed(found.seeds.estimate.value),
                interval(found.seeds.estimate),
                str(found.seeds.n_pairs),
                found.verdict,
                interval(found.images),
                spread,
                MISSING if found.p is None else p_value(found.p),
                MISSING if found.holm is None else p_value(found.holm),
            ]
        )
    grid = without_empty(grid, [6, 7, 8])
    return "\n".join(map(printable, [*lines, *align(grid, 1), *wrap(_notes(suite, pair, level))])) + "\n"


def _notes(suite: SuiteCard, pair: Pair, level: float) -> list[str]:
    whole = pair.whole
    tested = [found for found in pair.tasks if found.p is not None]
    notes = []
    if whole is not None:
        mean = (
            columns(suite)[-2]
            if len(pair.tasks) == len(suite.tasks)
            else f"mean of these {plural(len(pair.tasks), 'task')}"
        )
        notes.append(
            f"{mean[0].upper()}{mean[1:]}: {signed(whole.these_tasks.value)}, new seeds {interval(whole.these_tasks)}, "
            f"test images {interval(whole.images)}, new tasks {interval(whole.new_tasks)}; "
            + (
                f"sign flip over {plural(whole.sources, 'independent source')} of images: p {p_value(whole.p)}."
                if whole.p is not None
                else f"it cannot be tested with {plural(whole.sources, 'source')} of images: "
                f"{no_outcome(level, whole.least)}"
            )
        )
        if len(pair.tasks) < len(suite.tasks):
            notes.append(
                f"{len(pair.tasks)} of {plural(len(suite.tasks), 'task')}: those that both rows have on the "
                "same images with a "
                "shared seed."
            )
    notes += [
        f"New seeds: t interval ({percent(level)}) of the differences of runs with the same seed. By seeds: sign flip "
        f"over these pairs, each task by itself; too few: n < {FEWEST_PAIRS} paired seeds. It is the test of all "
        "marks in tables; tie: not separated by it, also where the t interval, which trusts a normal distribution, "
        "leaves out zero.",
        f"Test images: interval ({percent(level)}, adjusted Wald of paired shares) from the bits in the records; about "
        "these runs, not other seeds."
        + (
            " McNemar p: exact, smallest and largest of the shared seeds; one p: their median, at most doubled, valid "
            f"for any dependence (Rüger); Holm over {plural(len(tested), 'task')}."
            if tested
            else ""
        ),
    ]
    if any(found.seeds.estimate.low is None for found in pair.tasks):
        notes.append("– for new seeds: one shared seed, or differences that are all the same: the variance is unknown.")
    if any(found.images is None for found in pair.tasks):
        notes.append("– for test images: the bits of the two rows are not of one split.")
    untested = [found for found in pair.tasks if found.p is None and found.images is not None]
    if untested:
        notes.append(
            f"No McNemar p on {plural(len(untested), 'task')}: so few images divide the runs (fewer than "
            f"{FEWEST_PAIRS}, or a few more with several seeds or tasks) that no outcome could reject; these cannot be "
            "tested."
        )
    return notes
