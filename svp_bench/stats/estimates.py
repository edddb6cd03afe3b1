"""Results of statistics as small dataclasses, and the sums that they share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

FEWEST_PAIRS = 6  # the first number of pairs at which a two-sided sign-flip test can fall below 0.05 (1/32)

FEWEST_SOURCES = 6  # with fewer sources of tasks there is no interval over new tasks: its coverage is tested from 6 on

Verdict = Literal["better", "worse", "tie", "too few"]


@dataclass(frozen=True)
class Estimate:
    """A number and how well it is known.

    Attributes:
        value: The estimate, in the unit of the input.
        low: Lower end of the interval; None if the variance cannot be known (one seed, one source, or seeds that all
            gave the same number: no spread in a few draws is not a spread of zero).
        high: Upper end, or None.
        se: Standard error, or None.
        df: Degrees of freedom of the t interval; None if there is no interval, or if it is no t interval.
        n: Independent samples behind it (runs, sources or images; see the function).
        level: Confidence level of the interval, e.g. 0.95.
    """

    value: float
    low: float | None
    high: float | None
    se: float | None
    df: float | None
    n: int
    level: float


@dataclass(frozen=True)
class Paired:
    """a - b over the tasks of a suite; see `paired`.

    Attributes:
        tasks: Task → mean of the differences of runs with the same seed, with their t interval; `n` is pairs.
        these_tasks: The mean difference; the interval is for other seeds on the same tasks; `n` is pairs.
        new_tasks: The same mean; the interval is for other sources of tasks; `n` is sources.
        p: Two-sided exact sign-flip test over the sources; its statistic is the same mean.
        n_sources: Independent sources. With fewer than six, no p can fall below 0.05 (`smallest_p`).
    """

    tasks: dict[str, Estimate]
    these_tasks: Estimate
    new_tasks: Estimate
    p: float
    n_sources: int


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: `b` images that only a has right, `c` that only b has right, and the two-sided p."""

    b: int
    c: int
    p: float


@dataclass(frozen=True)
class Marks:
    """The rows that a column of a table may print in bold; see `best_and_second`.

    Attributes:
        best: The one row that is better than every other, or None.
        tied: If `best` is None: the row with the highest mean, then those that are not separated from it, by mean.
        second: The one row that is better than every other but `best`, or None; always None for two rows.
    """

    best: str | None
    tied: tuple[str, ...]
    second: str | None


@dataclass(frozen=True)
class Ranks:
    """Mean ranks, and the rows that are not separated; see `rank_cliques`.

    Attributes:
        mean_ranks: Row → mean rank over the tasks, 1 is best; in that order.
        cliques: Runs of neighbours in that order without a separated pair, two rows or more, none inside another.
        p: (row, row further down) → Holm-adjusted p, over all pairs.
        n_sources: Independent sources of tasks.
        least: The smallest adjusted p that any outcome of so many sources and pairs could give. Where it is 1 - level
            or more, the cliques say nothing.
    """

    mean_ranks: dict[str, float]
    cliques: tuple[tuple[str, ...], ...]
    p: dict[tuple[str, str], float]
    n_sources: int
    least: float


def moments_of(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample variance; equal numbers have exactly their mean and no variance."""
    first, n = numbers[0], len(numbers)
    if all(x == first for x in numbers):
        return first, 0.0 if n > 1 else None
    mean = math.fsum(numbers) / n
    return mean, math.fsum((x - mean) ** 2 for x in numbers) / (n - 1)


def weighted_mean(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean; all equal, it is exactly their value, and all weighing 1, it is their sum by their number."""
    first = means[next(iter(weights))]
    if all(means[task] == first for task in weights):
        return first
    return math.fsum(means[task] * weight for task, weight in weights.items()) / math.fsum(weights.values())


def source_sums(values: Mapping[str, float], sources: Sequence[Sequence[str]]) -> list[float]:
    """The sum of the values of each source; sources without any are left out."""
    present = [[values[task] for task in source if task in values] for source in sources]
    return [math.fsum(numbers) for numbers in present if numbers]


def scale_of(values: Sequence[float]) -> float:
    """The power of two below the largest value."""
    largest = max((abs(x) for x in values), default=0.0)
    return 2.0 ** math.floor(math.log2(largest)) if largest else 1.0


def difference_of(x: float, y: float, scale: float) -> float:
    """x - y to 2⁻⁴⁰ of `scale`: 90.1 - 90 and 80.1 - 80 are then equal."""
    step = scale * 2.0**-40
    return round((x - y) / step) * step


def seed_differences(a: Mapping[int, float], b: Mapping[int, float], scale: float) -> list[float]:
    """Return the differences of the seeds that both have."""
    return [difference_of(a[seed], b[seed], scale) for seed in a if seed in b]
