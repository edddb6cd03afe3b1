"""Results of statistics as small dataclasses, and the checks of their inputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from svp_bench.core.errors import SvpBenchError

if TYPE_CHECKING:
    pass

__all__ = [
    "FEWEST_PAIRS",
    "FEWEST_SOURCES",
    "Difference",
    "Estimate",
    "Marks",
    "McNemar",
    "Paired",
    "Ranks",
    "Spread",
    "StatsError",
    "Tax",
    "Verdict",
    "check_level",
    "cluster_sums",
    "difference_of",
    "discordant_counts",
    "moments_of",
    "name_list",
    "need_same",
    "need_some",
    "scale_of",
    "seed_differences",
    "source_clusters",
    "task_differences",
    "task_weights",
    "to_number",
    "to_numbers",
    "weighted_sum",
]

FEWEST_PAIRS = 6  # the first number of pairs at which a two-sided sign-flip test can fall below 0.05 (1/32)

FEWEST_SOURCES = 6  # with fewer sources of tasks there is no interval over new tasks: its coverage is tested from 6 on

_LARGEST = 1e100  # squares of what is larger leave the range of a float

Verdict = Literal["better", "worse", "tie", "too few"]


class StatsError(SvpBenchError):
    """Numbers do not fit the question: not finite, none at all, a task on one side only, a level of 95 for 0.95."""


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

    @property
    def half_width(self) -> float | None:
        """Half the width of the interval, or None."""
        return None if self.low is None or self.high is None else (self.high - self.low) / 2

    @property
    def excludes_zero(self) -> bool | None:
        """Whether zero lies outside the interval; None if there is no interval."""
        return None if self.low is None or self.high is None else self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation (n - 1) of `n` values; `std` is None for one value."""

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """a - b on one task.

    Attributes:
        task: Full name.
        estimate: Mean of the differences of runs with the same seed, with their t interval; `n` is `n_pairs`.
        n_pairs: Seeds that both sides have.
    """

    task: str
    estimate: Estimate
    n_pairs: int


@dataclass(frozen=True)
class Paired:
    """a - b over the tasks of a suite; see `paired`.

    Attributes:
        tasks: One difference a task, by name.
        these_tasks: The (weighted) mean difference; the interval is for other seeds on the same tasks; `n` is pairs.
        new_tasks: The same mean; the interval is for other sources of tasks; `n` is sources.
        p: Two-sided exact sign-flip test over the sources; its statistic is the same weighted mean.
        wilcoxon_p: Two-sided exact signed-rank test over the same: a second opinion, less moved by one large source.
        n_sources: Independent sources. With fewer than six, no p can fall below 0.05 (`smallest_p`).
    """

    tasks: tuple[Difference, ...]
    these_tasks: Estimate
    new_tasks: Estimate
    p: float
    wilcoxon_p: float
    n_sources: int


@dataclass(frozen=True)
class McNemar:
    """Exact McNemar test: `b` images that only a has right, `c` that only b has right, and the two-sided p."""

    b: int
    c: int
    p: float


@dataclass(frozen=True)
class Marks:
    """What a column of a table may print in bold; see `best_and_second`.

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


@dataclass(frozen=True)
class Tax:
    """Best epoch on the test list minus last epoch; see `tax`.

    Attributes:
        tasks: Task → mean over its seeds, in points.
        overall: Mean over the tasks, for other seeds on the same tasks.
    """

    tasks: dict[str, Estimate]
    overall: Estimate


def to_number(value: Any, what: str) -> float:
    """Return a finite number as float."""
    number: float
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise StatsError(f"{what}: {value!r} is no number") from None
    if not abs(number) <= _LARGEST:  # NaN compares false
        raise StatsError(f"{what}: {number} cannot be used; numbers have to be finite and at most {_LARGEST:g}")
    return number


def to_numbers(values: Iterable[Any], what: str) -> list[float]:
    """Return finite numbers as floats; refuse none."""
    numbers = [to_number(value, what) for value in values]
    if not numbers:
        raise StatsError(f"{what}: there is none; give at least one")
    return numbers


def need_some(things: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    """Return a mapping that is not empty."""
    if not things:
        raise StatsError(f"there is no {kind}; give at least one")
    return things


def need_same(names: Iterable[Any], wanted: Iterable[Any], what: str, pattern: str) -> None:
    """Refuse names that differ from the wanted ones."""
    have, want = set(names), set(wanted)
    if have != want:
        raise StatsError(
            f"{what} and {pattern} differ in {name_list(have ^ want)}; give both the same, leave out what one lacks"
        )


def name_list(names: Iterable[Any]) -> str:
    """Return up to five names in one text."""
    ordered = sorted(str(name) for name in names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def check_level(level: float) -> None:
    """Refuse a level outside of 0 to 1."""
    if not 0 < to_number(level, "the level") < 1:
        raise StatsError(f"the level is {level}; it lies between 0 and 1: 0.95 for 95 %")


def task_weights(tasks: Iterable[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights of `tasks` that are not zero, of any sum: all 1 if none are given."""
    names = list(tasks)
    if weights is None:
        return dict.fromkeys(names, 1.0)
    need_same(weights, names, "the weights", "the tasks")
    for task, weight in weights.items():
        if to_number(weight, f"the weight of {task}") < 0:
            raise StatsError(f"the weight of {task} is {weight}; weights are 0 or more")
    if not any(weights.values()):
        raise StatsError("all weights are 0; at least one task has to count")
    return {task: float(weights[task]) for task in names if weights[task]}


def source_clusters(tasks: Iterable[str], sources: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tasks of each source, those of `tasks` only; sources without any are left out."""
    if isinstance(sources, str) or any(isinstance(source, str) for source in sources):
        raise StatsError("a source is a list of tasks, not a name; write [['suite/one'], ['suite/two', 'suite/three']]")
    names = set(tasks)
    clusters = [[task for task in source if task in names] for source in sources]
    listed = [task for cluster in clusters for task in cluster]
    twice = {task for task in listed if listed.count(task) > 1}
    if twice:
        raise StatsError(f"{name_list(twice)}: in more than one source; images come from one")
    if missing := names - set(listed):
        raise StatsError(f"{name_list(missing)}: in no source; give each its own, or that of its images")
    return [sorted(cluster) for cluster in clusters if cluster]


def moments_of(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample variance; equal numbers have exactly their mean and no variance."""
    first, n = numbers[0], len(numbers)
    if all(x == first for x in numbers):
        return first, 0.0 if n > 1 else None
    mean = math.fsum(numbers) / n
    return mean, math.fsum((x - mean) ** 2 for x in numbers) / (n - 1)


def weighted_sum(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean; all equal, it is exactly their value, and all weighing 1, it is their sum by their number."""
    first = means[next(iter(weights))]
    if all(means[task] == first for task in weights):
        return first
    return math.fsum(means[task] * weight for task, weight in weights.items()) / math.fsum(weights.values())


def cluster_sums(
    values: Mapping[str, float], clusters: Sequence[Sequence[str]], weights: Mapping[str, float]
) -> list[float]:
    """The weighted sum of the values of each cluster; clusters without a task that weighs anything are left out."""
    shared = [[task for task in cluster if task in weights] for cluster in clusters]
    return [math.fsum(weights[task] * values[task] for task in cluster) for cluster in shared if cluster]


def scale_of(values: Sequence[float]) -> float:
    """The power of two below the largest value."""
    largest = max((abs(to_number(x, "the values")) for x in values), default=0.0)
    return 2.0 ** math.floor(math.log2(largest)) if largest else 1.0


def difference_of(x: float, y: float, scale: float) -> float:
    """x - y to 2⁻⁴⁰ of `scale`: 90.1 - 90 and 80.1 - 80 are then equal."""
    step = scale * 2.0**-40
    return round((float(x) - float(y)) / step) * step if step else float(x) - float(y)


def seed_differences(a: Mapping[int, float], b: Mapping[int, float], scale: float) -> list[float]:
    """Return the differences of the seeds that both have."""
    return [difference_of(a[seed], b[seed], scale) for seed in a if seed in b]


def task_differences(
    a: Mapping[str, Mapping[int, float]], b: Mapping[str, Mapping[int, float]]
) -> dict[str, list[float]]:
    """Task → a - b of the seeds that both have."""
    need_same(a, b, "the tasks of a", "those of b")
    need_some(a, "task")
    for side in (a, b):
        for task, seeds in side.items():
            to_numbers(seeds.values(), f"the seeds of {task}")
    scale = scale_of([x for side in (a, b) for seeds in side.values() for x in seeds.values()])
    differences = {task: seed_differences(seeds, b[task], scale) for task, seeds in a.items()}
    if alone := [task for task, x in differences.items() if not x]:
        raise StatsError(f"{name_list(alone)}: the two sides share no seed; run both with the same seeds")
    return differences


def discordant_counts(a: Any, b: Any) -> tuple[int, int, int]:
    """How many images a alone has right, b alone, and all."""
    import numpy as np

    first, second = np.asarray(a), np.asarray(b)
    for bits in (first, second):
        if bits.ndim != 1 or bits.dtype != np.bool_ or not bits.size:
            raise StatsError(
                f"the bits are {bits.dtype} of shape {bits.shape}; give booleans of shape (images,), at least one"
            )
    if first.size != second.size:
        raise StatsError(f"{first.size} images against {second.size}; both runs need the same list")
    return int((first & ~second).sum()), int((~first & second).sum()), int(first.size)
