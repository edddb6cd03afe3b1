"""Two rows of a table, task by task: by their seeds, and by their test images.

The seeds: the paired differences of runs with the same seed. The images: each record keeps one bit for each test
image, so that two runs on one list can be compared image by image; that is about these runs and other images
like these, and sees no other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from svp_bench.core.errors import UsageError, plural, printable
from svp_bench.stats.estimates import FEWEST_PAIRS
from svp_bench.stats.significance import holm, mcnemar, smallest_p
from svp_bench.tables.comparison import check_row, contrast, find_row, shared_bits
from svp_bench.tables.model import Contrast, Row, Section, Table
from svp_bench.tables.notes import (
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


@dataclass(frozen=True)
class Pair:
    """Two rows of one section: first minus second.

    Attributes:
        section: Where both stand.
        first: A row.
        second: Another.
        whole: Over the tasks that both have on the same images with a seed in common; None if there is none.
        mcnemar: Task → seed → exact McNemar p of the two runs' bits.
        p: Task → these p in one (`middle_p`); without the tasks where so few images divide the runs that no outcome
            could fall below 1 - level after the adjustment.
        holm: p, adjusted by Holm over the tasks that have one.
    """

    section: Section
    first: Row
    second: Row
    whole: Contrast | None
    mcnemar: Mapping[str, Mapping[int, float]]
    p: Mapping[str, float]
    holm: Mapping[str, float]


def compare_pair(tables: Sequence[Table], first: str, second: str) -> list[Pair]:
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
    found: list[Pair] = []
    for table in tables:
        for section in table.sections:
            a, b = find_row(section.rows, first), find_row(section.rows, second)
            if a is not None and a is b:
                raise UsageError(f"--compare: {first!r} and {second!r} are one row, {a.label!r}; name two")
            if a is not None and b is not None:
                found.append(_pair(section, a, b))
    if not found:
        raise UsageError(
            f"--compare: {first!r} and {second!r} are not in one section; rows compare under one protocol, "
            "backbone, checkpoint and track"
        )
    return found


def _pair(section: Section, first: Row, second: Row) -> Pair:
    whole = contrast(section.suite, first, second, section.level)
    mcnemar_p: dict[str, dict[int, float]] = {}
    least: dict[str, float] = {}
    for task in whole.tasks if whole else ():
        tests = {seed: mcnemar(a, b) for seed, (a, b) in shared_bits(first.cells[task], second.cells[task]).items()}
        if tests:
            mcnemar_p[task] = {seed: test.p for seed, test in tests.items()}
            least[task] = middle_p([smallest_p(test.b + test.c or 1) for test in tests.values()])
    p = {task: middle_p([*mcnemar_p[task].values()]) for task in _testable(least, 1 - section.level)}
    return Pair(section, first, second, whole, mcnemar_p, p, holm(p))


def _testable(least: Mapping[str, float], bar: float) -> list[str]:
    """Return a family of tests that Holm's adjustment could all reject, by the smallest p that each could give.

    The smallest p depends on how many images divide the runs, not on which run has them right, so that leaving tests
    out by it keeps the adjustment valid.

    Source: Tarone 1990, Biometrics 46, 515-522.
    """
    family = dict(least)
    while family and max(holm(family).values()) >= bar:
        largest = max(family.values())
        family = {task: p for task, p in family.items() if p < largest}
    return list(family)


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


def render_pairs(found: Sequence[Pair]) -> str:
    """Return the comparisons as text for a terminal."""
    return "\n".join(map(_text, found))


def _text(pair: Pair) -> str:
    section = pair.section
    lines = [f"{section.suite.title}: {pair.first.label} minus {pair.second.label}, in points", heading(section), ""]
    if section.random:
        lines.append(RANDOM_WEIGHTS)
    if pair.whole is None:
        lines.append("They share no task on the same images with a seed in common: nothing can be compared.")
        return "\n".join(lines) + "\n"
    grid = [["task", "difference", "new seeds", "pairs", "by seeds", "test images", "McNemar p", "one p", "(Holm)"]]
    for task, cell in pair.whole.tasks.items():
        line = [short_name(task), signed(cell.seeds.value), interval(cell.seeds), str(cell.seeds.n), cell.verdict]
        p = sorted(pair.mcnemar[task].values()) if task in pair.p else [None]
        spread = dict.fromkeys((p_value(p[0]), p_value(p[-1])))  # one value, or the smallest and the largest
        tests = ("–".join(spread), p_value(pair.p.get(task)), p_value(pair.holm.get(task)))
        grid.append([*line, interval(cell.images), *tests])
    grid = without_empty(grid, [6, 7, 8])
    return "\n".join(map(printable, [*lines, *align(grid, 1), *wrap(_notes(pair, pair.whole))])) + "\n"


def _notes(pair: Pair, whole: Contrast) -> list[str]:
    suite, level, cells = pair.section.suite, pair.section.level, whole.tasks.values()
    every = len(cells) == len(suite.tasks)
    mean = columns(suite)[-2] if every else f"mean of these {plural(len(cells), 'task')}"
    sources = plural(whole.sources, "source")
    test = f"it cannot be tested with {sources} of images: {no_outcome(level, whole.least)}"
    if whole.p is not None:
        test = f"sign flip over {sources.replace('source', 'independent source')} of images: p {p_value(whole.p)}."
    notes = [
        f"{mean[0].upper()}{mean[1:]}: {signed(whole.these_tasks.value)}, new seeds {interval(whole.these_tasks)}, "
        f"test images {interval(whole.images)}, new tasks {interval(whole.new_tasks)}; {test}"
    ]
    if not every:
        notes.append(
            f"{len(cells)} of {plural(len(suite.tasks), 'task')}: those that both rows have on the same images with a "
            "shared seed."
        )
    explained = (
        " McNemar p: exact, smallest and largest of the shared seeds; one p: their median, at most doubled, valid "
        f"for any dependence (Rüger); Holm over {plural(len(pair.p), 'task')}."
    )
    notes += [
        f"New seeds: t interval ({percent(level)}) of the differences of runs with the same seed. By seeds: sign flip "
        f"over these pairs, each task by itself; too few: n < {FEWEST_PAIRS} paired seeds. It is the test of all "
        "marks in tables; tie: not separated by it, also where the t interval, which trusts a normal distribution, "
        "leaves out zero.",
        f"Test images: interval ({percent(level)}, adjusted Wald of paired shares) from the bits in the records; about "
        f"these runs, not other seeds.{explained if pair.p else ''}",
    ]
    if any(cell.seeds.low is None for cell in cells):
        notes.append("– for new seeds: one shared seed, or differences that are all the same: the variance is unknown.")
    if any(cell.images is None for cell in cells):
        notes.append("– for test images: the bits of the two rows are not of one split.")
    if untested := len(pair.mcnemar) - len(pair.p):
        notes.append(
            f"No McNemar p on {plural(untested, 'task')}: so few images divide the runs (fewer than {FEWEST_PAIRS}, or "
            "a few more with several seeds or tasks) that no outcome could reject; these cannot be tested."
        )
    return notes
