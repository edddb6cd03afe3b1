"""Statistics of a benchmark: means with intervals, paired comparisons, ranks. Pure functions over numbers.

Different questions have different answers, and an interval needs its question:

- *these tasks*: what would other seeds give on the same tasks? Only the seeds vary (`mean_of`, `Paired.these_tasks`).
- *new tasks*: what would other tasks like these give? The tasks are the sample, and tasks cut from the same images
  (dSprites by place and by angle) are one draw, not two (`mean_over_new_tasks`, `Paired.new_tasks`, every p).

A third question is about the test images: what would these runs give on other images of the same tasks? One seed is
enough for it (`accuracy_over_images`, `difference_over_images`, `over_images`).

Intervals and tests of a comparison use one weighting, that of the mean: by default each task counts the same, and a
source counts with the sum of its tasks.

Common to all functions: higher is better; values are accuracies in percent, so differences are in points, but nothing
depends on the unit; sums are rounded once (`math.fsum`), so the order of the input changes no digit; what draws takes a
seed or a generator. An interval that cannot be known is None, never zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from svp_bench.core.errors import SvpBenchError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

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
    "accuracy_over_images",
    "best_and_second",
    "cell_verdict",
    "difference_over_images",
    "group_weights",
    "holm",
    "mcnemar",
    "mean_of",
    "mean_over_new_tasks",
    "one_standard_error",
    "over_images",
    "paired",
    "rank_cliques",
    "sign_flip",
    "signed_rank",
    "smallest_p",
    "spread",
    "tax",
    "within",
]

FEWEST_PAIRS = 6  # the first number of pairs at which a two-sided sign-flip test can fall below 0.05 (1/32)
FEWEST_SOURCES = 6  # with fewer sources of tasks there is no interval over new tasks: its coverage is tested from 6 on
_EXACT = 40  # sign patterns of two halves of 20 are enumerated; beyond, they are sampled
_DRAWS = 99_999
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


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation, sqrt(Σ (x - mean)² / (n - 1)); it is None for one value.

    Raises:
        StatsError: If there is no value, or one is not finite.
    """
    numbers = _numbers(values, "the values")
    mean, variance = _moments(numbers)
    return Spread(mean, None if variance is None else math.sqrt(variance), len(numbers))


def mean_of(
    cells: Mapping[str, Sequence[float]], weights: Mapping[str, float] | None = None, level: float = 0.95
) -> Estimate:
    """Estimate the weighted mean over tasks of the means over seeds: these tasks, other seeds.

    mean = Σ w_t m_t, SE² = Σ w_t² s_t² / n_t, over the tasks t with n_t seeds, mean m_t and sample variance s_t². The
    interval is mean ± t(df) SE with df = SE⁴ / Σ ((w_t² s_t² / n_t)² / (n_t - 1)). With one task that is the ordinary
    t interval. The number of seeds may differ by task.

    A task with one seed has no variance that could be known, and is given none: the interval, se and df are then None.
    So it is if no task varies at all: equal numbers from a few seeds do not show that others would be equal too.

    Source: Satterthwaite 1946, Biometrics Bulletin 2(6), 110-114; Welch 1947, Biometrika 34, 28-35.

    Args:
        cells: Task → the values of its seeds.
        weights: Task → weight, for exactly the tasks of `cells`; divided by their sum. None: all equal. A task of
            weight 0 counts for nothing, its seeds neither.
        level: Confidence level.

    Returns:
        The estimate; `n` is the number of values.

    Raises:
        StatsError: If there is no task or a task has no value, a value is not finite, `weights` names other tasks, is
            negative or sums to nothing, or `level` is not between 0 and 1.
    """
    _check_level(level)
    numbers = {task: _numbers(values, f"the seeds of {task}") for task, values in _some(cells, "task").items()}
    return _mean_of(numbers, _counting(numbers, weights), level)


def group_weights(groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the weights that turn the mean over tasks into the mean of the groups' means: 1 / (groups · its tasks).

    Raises:
        StatsError: If there is no group, a group has no task, or a task is in two groups.
    """
    weights: dict[str, float] = {}
    for name, tasks in _some(groups, "group").items():
        if not tasks:
            raise StatsError(f"the group {name!r} has no task; leave it out")
        for task in tasks:
            if task in weights:
                raise StatsError(f"{task} is listed twice in the groups; a task has one group")
            weights[task] = 1 / (len(groups) * len(tasks))
    return weights


def mean_over_new_tasks(
    cells: Mapping[str, Sequence[float]],
    sources: Sequence[Sequence[str]],
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> Estimate:
    """Estimate the weighted mean over tasks of the means over seeds: new tasks, and new seeds.

    The tasks are seen as a sample. Tasks cut from the same images are one cluster; the clusters are independent.
    mean = Σ w_t m_t as in `mean_of`, with weights of sum 1; with the clusters' weights W_g = Σ_{t in g} w_t and sums
    e_g = Σ_{t in g} w_t (m_t - mean),

        SE² = Σ_g e_g² / (1 - W_g)                                                (CR2: bias-reduced linearization)
        df  = 1 / (Σ_g W_g² + Σ_{g ≠ h} W_g² W_h² / ((1 - W_g) (1 - W_h)))        (Satterthwaite)

    and the interval is mean ± t(df) SE. Under the working model of independent tasks with variances proportional to
    1 / w_t, SE² is unbiased, and df follows exactly. Where the tasks of a source weigh the same, both are those of the
    reference implementation (R package clubSandwich) for an intercept; elsewhere it takes another root of the same
    matrix. If all sources weigh the same, SE is the standard
    deviation of the sources by √G and df is G - 1; a source of many tasks takes degrees of freedom away. The noise of
    the seeds is part of the m_t and so of SE; one seed a task is enough. For the mean of group means, the groups'
    distance from each other counts as noise too: the interval errs on the wide side.

    In simulations with 6, 10 and 16 sources of unequal size, whose tasks are independent, half or wholly dependent
    within a source, a 95 % interval covers in 93 to 97 % of cases (`tests/test_stats.py`); t(G - 1) with the factor
    G / (G - 1) covered in 86 to 94 %. With fewer sources than `FEWEST_SOURCES` there is no interval.

    Source: Bell & McCaffrey 2002, Survey Methodology 28(2), 169-181; Pustejovsky & Tipton 2018, Journal of Business &
    Economic Statistics 36(4), 672-683, sections 2 and 3.

    Args:
        cells: Task → the values of its seeds.
        sources: The tasks of each image source; each task of `cells` in exactly one. Tasks that `cells` has not are
            passed over: the list of a suite serves each of its groups.
        weights: As in `mean_of`. A source whose tasks all weigh 0 does not count.
        level: Confidence level.

    Returns:
        The estimate; `n` is the number of sources G. With fewer than `FEWEST_SOURCES`, or sources that do not differ,
        interval, se and df are None.

    Raises:
        StatsError: As `mean_of`; or if a task is in no source, or in two.
    """
    _check_level(level)
    numbers = {task: _numbers(values, f"the seeds of {task}") for task, values in _some(cells, "task").items()}
    clusters, counting = _clusters(numbers, sources), _counting(numbers, weights)
    return _mean_over_new_tasks({task: _moments(x)[0] for task, x in numbers.items()}, clusters, counting, level)


def paired(
    a: Mapping[str, Mapping[int, float]],
    b: Mapping[str, Mapping[int, float]],
    sources: Sequence[Sequence[str]],
    level: float = 0.95,
    *,
    weights: Mapping[str, float] | None = None,
    seed: int | np.random.Generator = 0,
) -> Paired:
    """Compare two methods, a - b, paired by task and seed.

    On each task, the differences of the runs that share a seed are averaged; seeds of one side alone are passed over
    (`Difference.n_pairs` counts the rest). `these_tasks` is `mean_of` over the differences, `new_tasks` is
    `mean_over_new_tasks` over them.

    Both p flip whole sources: the weighted sum of a source's differences, with the weights of the mean, so that the
    statistic of the sign flip is the mean difference that is printed. They test that a source's difference is as often
    up as down by the same amount, and so speak about new tasks. See `sign_flip` and `signed_rank`, and `smallest_p` for
    when they can say anything. Differences are rounded to 2⁻⁴⁰ of the largest value, so that what is equal in decimals
    is equal.

    Args:
        a: Task → seed → value, e.g. top-1 in percent.
        b: The same tasks.
        sources: As in `mean_over_new_tasks`.
        level: Confidence level of all intervals.
        weights: As in `mean_of`.
        seed: For the draws of a test over more than 40 sources; otherwise unused.

    Raises:
        StatsError: If a task is on one side only, or its sides share no seed; and as `mean_over_new_tasks`.
    """
    _check_level(level)
    differences = _differences(a, b)
    clusters, counting = _clusters(differences, sources), _counting(differences, weights)
    means = {task: _moments(x)[0] for task, x in differences.items()}
    by_source = _sums(means, clusters, counting)
    return Paired(
        tasks=tuple(
            Difference(task, _mean_of({task: differences[task]}, {task: 1.0}, level), len(differences[task]))
            for task in sorted(differences)
        ),
        these_tasks=_mean_of(differences, counting, level),
        new_tasks=_mean_over_new_tasks(means, clusters, counting, level),
        p=sign_flip(by_source, seed),
        wilcoxon_p=signed_rank(by_source, seed),
        n_sources=len(by_source),
    )


def sign_flip(differences: Sequence[float], seed: int | np.random.Generator = 0) -> float:
    """Return the two-sided p of the sign-flip test: each difference might as well have had the other sign.

    p is the share of the 2ⁿ sign patterns whose sum is as far from zero as the observed sum, or further. Up to 40
    differences that are not zero it is exact (zeros change nothing and are left out): the patterns of one half of the
    differences are looked up among those of the other. Beyond, 99,999 patterns are sampled, and
    p = (1 + hits) / (1 + draws), which is valid, not an approximation.

    The smallest p there can be is 2^(1 - n): .25 at 3, .0625 at 5, .031 at 6.

    Source: Fisher 1935, The Design of Experiments, section 21; the halves: Horowitz & Sahni 1974, J. ACM 21, 277-292;
    the + 1: Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9(1), 39.

    Args:
        differences: Shape (n,); independent of each other.
        seed: For the draws; a generator is advanced only if there are draws.

    Raises:
        StatsError: If there is no difference, or one is not finite.
    """
    import numpy as np

    numbers = _numbers(differences, "the differences")
    sizes = sorted(abs(x) for x in numbers if x)
    # Sums that are equal on paper differ in the last digits.
    bar = abs(math.fsum(numbers)) - 1e-9 * math.fsum(sizes)
    if bar <= 0:
        return 1.0
    if len(sizes) <= _EXACT:
        one, other = np.sort(_signed_sums(sizes[::2])), np.sort(_signed_sums(sizes[1::2]))
        above = other.size - np.searchsorted(other, bar - one, side="left")
        below = np.searchsorted(other, -bar - one, side="right")
        return math.ldexp(int(above.sum() + below.sum()), -len(sizes))
    generator = np.random.default_rng(seed)
    hits, block = 0, 4096
    for start in range(0, _DRAWS, block):
        signs = generator.integers(0, 2, size=(min(block, _DRAWS - start), len(sizes)), dtype=np.int8)
        hits += int((np.abs((2.0 * signs - 1) @ np.array(sizes)) >= bar).sum())
    return (1 + hits) / (1 + _DRAWS)


def smallest_p(n_sources: int, tests: int = 1) -> float:
    """Return the smallest p that any outcome of a sign flip over `n_sources` differences can give: tests · 2^(1 - n).

    With `tests` above 1 it is the smallest p after Holm's adjustment over so many tests, at most 1. A test that cannot
    fall below 1 - level, for any measurement, is not informative and not printed.

    Raises:
        StatsError: If there is no source or no test.
    """
    if n_sources < 1 or tests < 1:
        raise StatsError(f"{tests} tests over {n_sources} sources; give at least one of each")
    return min(1.0, tests * 2.0 ** (1 - n_sources))


def signed_rank(differences: Sequence[float], seed: int | np.random.Generator = 0) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test: `sign_flip` on the ranks of the sizes, with their signs.

    Zeros are left out, equal sizes share their mean rank. Exact given those ties up to 40 differences, where SciPy's
    `wilcoxon` goes over to a normal approximation, depending on its version; without ties and zeros the two agree.

    Source: Wilcoxon 1945, Biometrics Bulletin 1(6), 80-83; ties: Pratt & Gibbons 1981, Concepts of Nonparametric
    Theory, chapter 3.

    Raises:
        StatsError: As `sign_flip`.
    """
    numbers = _numbers(differences, "the differences")
    largest = max(abs(x) for x in numbers)
    # Nine digits of the largest: sizes that are equal on paper get one rank.
    sizes = [round(abs(x) / largest, 9) if largest else 0.0 for x in numbers]
    ranks = _mean_ranks([size for size in sizes if size])
    signs = [math.copysign(1, x) for x, size in zip(numbers, sizes, strict=True) if size]
    return sign_flip([rank * sign for rank, sign in zip(ranks, signs, strict=True)], seed) if ranks else 1.0


def holm(pvalues: Mapping[str, float]) -> dict[str, float]:
    """Return the p adjusted for their number: p_(i) becomes max over j ≤ i of (m - j + 1) p_(j), at most 1.

    Rejecting what falls below α keeps the chance of any false rejection below α, for any dependence.

    Source: Holm 1979, Scand. J. Statist. 6, 65-70; adjusted p: Wright 1992, Biometrics 48, 1005-1013.

    Args:
        pvalues: Name → p. May be empty.

    Returns:
        Name → adjusted p, in the order of `pvalues`.

    Raises:
        StatsError: If a p is not between 0 and 1.
    """
    for name, p in pvalues.items():
        if not 0 <= _number(p, f"p of {name}") <= 1:
            raise StatsError(f"p of {name} is {p}; a p lies between 0 and 1")
    adjusted: dict[str, float] = {}
    highest = 0.0
    for i, name in enumerate(sorted(pvalues, key=lambda name: (pvalues[name], name))):
        highest = max(highest, min(1.0, (len(pvalues) - i) * float(pvalues[name])))
        adjusted[name] = highest
    return {name: adjusted[name] for name in pvalues}


def cell_verdict(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float], level: float = 0.95) -> Verdict:
    """Say whether a is better than b on one task: a mark for a single cell of a table.

    "too few" below six shared seeds, or if 2^(1 - n) ≥ 1 - level: then no outcome could reach the level. Otherwise
    "better" or "worse" if `sign_flip` of the differences by seed is below 1 - level, else "tie". A table has many
    cells: without an adjustment (`holm` on the p) one in twenty null cells gets a mark at level 0.95.

    Args:
        a_by_seed: Seed → value.
        b_by_seed: The same for the other method; seeds of one side alone are passed over.
        level: 1 - level is the significance level.

    Raises:
        StatsError: If a value is not finite, or `level` is not between 0 and 1.
    """
    _check_level(level)
    differences = _seed_differences(a_by_seed, b_by_seed, _scale([*a_by_seed.values(), *b_by_seed.values()]))
    if len(differences) < FEWEST_PAIRS or 2.0 ** (1 - len(differences)) >= 1 - level:
        return "too few"
    if sign_flip(differences) >= 1 - level:
        return "tie"
    return "better" if math.fsum(differences) > 0 else "worse"


def mcnemar(bits_a: NDArray[np.bool_] | Sequence[bool], bits_b: NDArray[np.bool_] | Sequence[bool]) -> McNemar:
    """Compare two runs image by image: exact McNemar test.

    Of the b + c images that one run alone has right, b are a's: binomial with 1/2 if the runs are equally good. p is
    SciPy's two-sided `binomtest`; 1 if no image divides them. It is about these two runs (their weights as they
    are) and new test images; what other seeds would do, it does not see.

    Source: McNemar 1947, Psychometrika 12, 153-157; for classifiers: Dietterich 1998, Neural Computation 10, 1895-1923.

    Args:
        bits_a: Booleans, shape (images,): was image i classified rightly?
        bits_b: The same images in the same order.

    Raises:
        StatsError: If these are not booleans of one dimension and equal length, or there is none.
    """
    from scipy import stats  # type: ignore[import-untyped]

    b, c, _ = _discordant(bits_a, bits_b)
    return McNemar(b, c, float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0)


def accuracy_over_images(accuracy_percent: float, count: int, level: float = 0.95) -> Estimate:
    """Estimate an accuracy in percent and its sampling error over test images: Wilson's score interval.

    Of runs that were tested once on `count` images. It lies within 0 and 100 and has a width at 0 and 100 too. It is
    about these weights and other test images; other seeds it does not see. A mean over seeds on the same images may be
    given: the seeds share their images, and no smaller error is claimed.

    Source: Wilson 1927, JASA 22, 209-212; Brown, Cai & DasGupta 2001, Statistical Science 16(2), 101-133.

    Args:
        accuracy_percent: 0 to 100.
        count: Test images, at least 1.
        level: Confidence level.

    Returns:
        The estimate; `n` is `count`, df is None, se is that of the interval's centre.

    Raises:
        StatsError: If the accuracy is not between 0 and 100, `count` is below 1, or `level` is not between 0 and 1.
    """
    from scipy import special

    _check_level(level)
    if not 0 <= _number(accuracy_percent, "the accuracy") <= 100:
        raise StatsError(f"the accuracy is {accuracy_percent}; it is in percent, between 0 and 100")
    if count < 1:
        raise StatsError(f"an accuracy over {count} images has no interval; give 1 image or more")
    share, z = float(accuracy_percent) / 100, float(special.ndtri((1 + level) / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    se = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    low = 0.0 if share == 0 else 100 * max(0.0, centre - z * se)
    high = 100.0 if share == 1 else 100 * min(1.0, centre + z * se)
    return Estimate(float(accuracy_percent), low, high, 100 * se, None, count, level)


def difference_over_images(
    bits: Sequence[tuple[NDArray[np.bool_], NDArray[np.bool_]]], level: float = 0.95
) -> Estimate:
    """Estimate the mean accuracy difference of k pairs of runs, in points, and its noise from the test images.

    All runs are tested on the same images. An image counts with the mean over the pairs of +1 (the first alone is
    right), -1 (the second alone) or 0; the interval is that of the mean of these counts after one image of +1 and one
    of -1 were added, cut at ±100. For one pair it is the adjusted Wald interval of Bonett and Price, which covers from
    few images on and has a width where no image divides the runs. As `mcnemar`, it is about these runs and new test
    images, and sees no other seeds.

    Source: Bonett & Price 2012, J. Educ. Behav. Stat. 37(4), 479-488, equation 6.

    Args:
        bits: For each pair, booleans of shape (images,) for both runs: was the image classified correctly? The same
            images in the same order throughout.
        level: Confidence level.

    Returns:
        The estimate; its value is the measured difference, not the interval's centre; `n` is the number of images.

    Raises:
        StatsError: If there is no pair, or bits are not booleans of one dimension and equal length.
    """
    import numpy as np
    from scipy import special

    _check_level(level)
    if not bits:
        raise StatsError("there is no pair of runs; give at least one")
    sizes = {_discordant(a, b)[2] for a, b in bits}
    if len(sizes) > 1:
        raise StatsError(f"the pairs have {_listing(sizes)} images; all need the same split")
    (n,), k = sizes, len(bits)
    counts = sum((np.asarray(a).astype(np.int64) - np.asarray(b).astype(np.int64) for a, b in bits), np.zeros(n, int))
    total, squares = int(counts.sum()), int((counts**2).sum())
    centre = total / k / (n + 2)
    variance = ((squares / k**2 + 2) / (n + 2) - centre**2) / (n + 2)
    half = float(special.ndtri((1 + level) / 2)) * math.sqrt(variance)
    low, high = max(-1.0, centre - half), min(1.0, centre + half)
    return Estimate(100 * total / (k * n), 100 * low, 100 * high, 100 * math.sqrt(variance), None, n, level)


def over_images(
    tasks: Mapping[str, Estimate], sources: Sequence[Sequence[str]], weights: Mapping[str, float] | None = None
) -> Estimate:
    """Combine the intervals over test images of several tasks to that of their weighted mean.

    With the ends l_t, u_t of the tasks and weights w_t of sum 1, mean - low is √(Σ_g (Σ_{t in g} w_t (m_t - l_t))²),
    and high - mean the same with u_t - m_t: the method of variance estimates recovery. The tasks of one source share
    test images; how their errors depend on each other is not known, so their distances add up, which is an upper bound.
    For one task it is the task's own interval; the mean of accuracies stays between 0 and 100.

    Source: Zou & Donner 2008, Statistics in Medicine 27(10), 1693-1702.

    Args:
        tasks: Task → its estimate, with an interval; all of one level.
        sources: As in `mean_over_new_tasks`.
        weights: As in `mean_of`.

    Returns:
        The estimate; `n` is the number of images of all tasks together; se and df are None.

    Raises:
        StatsError: If there is no task, a task has no interval, levels differ; for the rest as `mean_over_new_tasks`.
    """
    counting = _counting(_some(tasks, "task"), weights)
    clusters = _clusters(tasks, sources)
    levels = {estimate.level for estimate in tasks.values()}
    if len(levels) > 1:
        raise StatsError(f"the levels are {_listing(levels)}; give one")
    below: dict[str, float] = {}
    above: dict[str, float] = {}
    for task in counting:
        estimate = tasks[task]
        if estimate.low is None or estimate.high is None:
            raise StatsError(f"{task} has no interval over its test images")
        below[task], above[task] = estimate.value - estimate.low, estimate.high - estimate.value
    value, total = _weighted({task: tasks[task].value for task in counting}, counting), math.fsum(counting.values())
    down, up = (
        math.sqrt(math.fsum(part**2 for part in _sums(ends, clusters, counting))) / total for ends in (below, above)
    )
    n = sum(tasks[task].n for task in counting)
    return Estimate(value, value - down, value + up, None, None, n, levels.pop())


def within(estimate: Estimate, low: float, high: float) -> Estimate:
    """Return `estimate` with its interval cut to the values that are possible; without it, if it holds them all.

    The true value lies between `low` and `high`, so that cutting takes no coverage away. An interval that reaches both
    is not informative, and is left out.
    """
    if estimate.low is None or estimate.high is None:
        return estimate
    if estimate.low <= low and estimate.high >= high:
        return Estimate(estimate.value, None, None, None, None, estimate.n, estimate.level)
    if estimate.low >= low and estimate.high <= high:
        return estimate
    return replace(estimate, low=max(estimate.low, low), high=min(estimate.high, high))


def best_and_second(rows: Mapping[str, Mapping[int, float]], level: float = 0.95) -> Marks:
    """Say which rows of one column may be marked best and second.

    The row with the highest mean is compared with each other row by the test of `cell_verdict`: `sign_flip` of the
    differences by seed, from six shared seeds on (`FEWEST_PAIRS`). With fewer, no outcome could reach 95 %, and nothing
    is separated. One test and one number of seeds for all marks of a table: what is best here is also "better" there.
    The p are adjusted (`holm`, over the comparisons with the top row), so that three rows need seven seeds, and twelve
    need nine. Rows that fall below 1 - level are worse. If all are, the top row is `best`, and the same procedure among
    the others finds `second`. If not, nobody is best: `tied` is the top row with those not separated from it, and
    there is no second. Of two rows none is second: it was compared with nothing. Nor is a single row best.

    Source: comparisons with the best, Hsu 1996, Multiple Comparisons, chapter 4; here with the exact test by pairs and
    Holm's steps instead of a common variance.

    Args:
        rows: Row → seed → value, for one column: of one task.
        level: 1 - level is the significance level of the whole column.

    Raises:
        StatsError: If a row has no value, a value is not finite, or `level` is not between 0 and 1.
    """
    _check_level(level)
    values = {row: _numbers(list(seeds.values()), f"the seeds of {row}") for row, seeds in rows.items()}
    scale = _scale([x for numbers in values.values() for x in numbers])
    order = sorted(rows, key=lambda row: (-_moments(values[row])[0], row))

    def group(order: Sequence[str]) -> list[str]:
        if len(order) < 2:
            return []
        adjusted = holm({row: _p_of_two(rows[order[0]], rows[row], scale) for row in order[1:]})
        return [order[0], *(row for row in order[1:] if adjusted[row] >= 1 - level)]

    top = group(order)
    if len(top) != 1:
        return Marks(None, tuple(top), None)
    rest = group(order[1:])
    return Marks(top[0], (), rest[0] if len(rest) == 1 else None)


def rank_cliques(
    scores: Mapping[str, Mapping[str, float]], sources: Sequence[Sequence[str]], level: float = 0.95
) -> Ranks:
    """Rank rows over tasks, and group neighbours that are not separated. Descriptive, not a test.

    Ranks are 1 for the best score of a task; equal scores share their mean rank; mean ranks are plain means over the
    tasks. Each pair of rows is compared by `signed_rank` over the sources' summed differences, and `holm` adjusts over
    all pairs. A clique is a longest run of neighbours in rank order without a pair below 1 - level.

    A pair's own p depends on these two rows alone, unlike Nemenyi's critical difference; its adjusted p, and the mean
    ranks, still depend on which rows were put in. "Not separated" is no proof of equality: with few sources everything
    is one clique.

    Source: Benavoli, Corani & Mangili 2016, JMLR 17(5), 1-10 (pairwise signed-rank tests instead of mean-rank tests);
    the diagram: Demšar 2006, JMLR 7, 1-30, section 3.2.

    Args:
        scores: Row → task → score (the mean over seeds); all rows have the same tasks.
        sources: As in `mean_over_new_tasks`.
        level: 1 - level is the significance level over all pairs.

    Raises:
        StatsError: If there is no row, rows have different tasks, a score is not finite; and for `sources` and `level`
            as `mean_over_new_tasks`.
    """
    _check_level(level)
    tasks = sorted(next(iter(_some(scores, "row").values())))
    for row, by_task in scores.items():
        _same(by_task, tasks, f"the scores of {row}", "the scores of the first row")
        for task, score in by_task.items():
            _number(score, f"the score of {row} on {task}")
    clusters = _clusters(_some(dict.fromkeys(tasks), "task"), sources)
    rows = sorted(scores)
    columns = [_mean_ranks([-float(scores[row][task]) for row in rows]) for task in tasks]
    mean_ranks = {row: math.fsum(column[i] for column in columns) / len(tasks) for i, row in enumerate(rows)}
    order = sorted(rows, key=lambda row: (mean_ranks[row], row))
    pairs = [(one, other) for i, one in enumerate(order) for other in order[i + 1 :]]
    scale = _scale([float(x) for by_task in scores.values() for x in by_task.values()])
    raw: dict[str, float] = {}
    for k, (one, other) in enumerate(pairs):
        apart = {task: _apart(scores[one][task], scores[other][task], scale) for task in tasks}
        raw[str(k)] = signed_rank(_sums(apart, clusters, dict.fromkeys(tasks, 1.0)))
    adjusted = holm(raw)
    p = {pair: adjusted[str(k)] for k, pair in enumerate(pairs)}
    cliques: list[tuple[str, ...]] = []
    end = 0
    for start in range(len(order)):
        stop = start + 1
        while stop < len(order) and all(p[row, order[stop]] >= 1 - level for row in order[start:stop]):
            stop += 1
        if stop > max(end, start + 1):
            cliques.append(tuple(order[start:stop]))
            end = stop
    least = smallest_p(len(clusters), max(len(pairs), 1))
    return Ranks({row: mean_ranks[row] for row in order}, tuple(cliques), p, len(clusters), least)


def one_standard_error(accuracy_percent: float, count: int) -> float:
    """Return the binomial standard error of an accuracy on `count` images, in points: about 3 on 200.

    100 · sqrt(p (1 - p) / n) with p = (right + 1) / (n + 2) for the share of right ones (Laplace), so that 100 % right
    is not known without error; elsewhere that changes little. Settings on val within one such error of the best count
    as equal. It is the error of one score, not of a difference: on the same images, differences are known better.

    Source: the rule of one standard error: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3.

    Args:
        accuracy_percent: 0 to 100; a mean over seeds on the same images may be given (no smaller error is claimed).
        count: Images, at least 1.

    Raises:
        StatsError: If the accuracy is not between 0 and 100, or `count` is below 1.
    """
    if not 0 <= _number(accuracy_percent, "the accuracy") <= 100:
        raise StatsError(f"the accuracy is {accuracy_percent}; it is in percent, between 0 and 100")
    if count < 1:
        raise StatsError(f"an accuracy over {count} images has no standard error; give 1 image or more")
    share = (float(accuracy_percent) / 100 * count + 1) / (count + 2)
    return 100 * math.sqrt(share * (1 - share) / count)


def tax(
    best: Mapping[str, Mapping[int, float]],
    final: Mapping[str, Mapping[int, float]],
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
) -> Tax:
    """Estimate what picking the epoch on the test list adds to a number: best epoch minus last epoch of the same runs.

    `mean_of` over the differences, run by run. They are never negative and mostly skewed, so an interval may reach
    below zero although the tax cannot.

    Args:
        best: Task → seed → the highest test accuracy of any epoch of the run, in percent.
        final: The same runs: the test accuracy after the last epoch.
        weights: As in `mean_of`.
        level: Confidence level.

    Raises:
        StatsError: If the two do not have the same tasks and seeds, a best is below its final; and as `mean_of`.
    """
    _check_level(level)
    differences = _differences(best, final)
    for task, seeds in best.items():
        _same(final[task], seeds, f"the last epochs on {task}", "its best epochs")
        for seed, value in seeds.items():
            if value < final[task][seed]:
                raise StatsError(
                    f"{task}, seed {seed}: the best epoch has {value}, the last {final[task][seed]}; the last is one "
                    "of all epochs and cannot be better: are the arguments swapped?"
                )
    tasks = {task: _mean_of({task: x}, {task: 1.0}, level) for task, x in sorted(differences.items())}
    return Tax(tasks, _mean_of(differences, _counting(differences, weights), level))


def _number(value: Any, what: str) -> float:
    number: float
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise StatsError(f"{what}: {value!r} is no number") from None
    if not abs(number) <= _LARGEST:  # NaN compares false
        raise StatsError(f"{what}: {number} cannot be used; numbers have to be finite and at most {_LARGEST:g}")
    return number


def _numbers(values: Iterable[Any], what: str) -> list[float]:
    numbers = [_number(value, what) for value in values]
    if not numbers:
        raise StatsError(f"{what}: there is none; give at least one")
    return numbers


def _some(things: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    if not things:
        raise StatsError(f"there is no {kind}; give at least one")
    return things


def _same(names: Iterable[Any], wanted: Iterable[Any], what: str, pattern: str) -> None:
    have, want = set(names), set(wanted)
    if have != want:
        raise StatsError(
            f"{what} and {pattern} differ in {_listing(have ^ want)}; give both the same, leave out what one side lacks"
        )


def _listing(names: Iterable[Any]) -> str:
    ordered = sorted(str(name) for name in names)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")


def _check_level(level: float) -> None:
    if not 0 < _number(level, "the level") < 1:
        raise StatsError(f"the level is {level}; it lies between 0 and 1: 0.95 for 95 %")


def _counting(tasks: Iterable[str], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights of `tasks` that are not zero, of any sum: all 1 if none are given."""
    names = list(tasks)
    if weights is None:
        return dict.fromkeys(names, 1.0)
    _same(weights, names, "the weights", "the tasks")
    for task, weight in weights.items():
        if _number(weight, f"the weight of {task}") < 0:
            raise StatsError(f"the weight of {task} is {weight}; weights are 0 or more")
    if not any(weights.values()):
        raise StatsError("all weights are 0; at least one task has to count")
    return {task: float(weights[task]) for task in names if weights[task]}


def _clusters(tasks: Iterable[str], sources: Sequence[Sequence[str]]) -> list[list[str]]:
    """The tasks of each source, those of `tasks` only; sources without any are left out."""
    if isinstance(sources, str) or any(isinstance(source, str) for source in sources):
        raise StatsError("a source is a list of tasks, not a name; write [['suite/one'], ['suite/two', 'suite/three']]")
    names = set(tasks)
    clusters = [[task for task in source if task in names] for source in sources]
    listed = [task for cluster in clusters for task in cluster]
    twice = {task for task in listed if listed.count(task) > 1}
    if twice:
        raise StatsError(f"{_listing(twice)}: in more than one source; images come from one")
    if missing := names - set(listed):
        raise StatsError(f"{_listing(missing)}: in no source; give each its own, or that of its images")
    return [sorted(cluster) for cluster in clusters if cluster]


def _moments(numbers: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample variance; equal numbers have exactly their mean and no variance."""
    first, n = numbers[0], len(numbers)
    if all(x == first for x in numbers):
        return first, 0.0 if n > 1 else None
    mean = math.fsum(numbers) / n
    return mean, math.fsum((x - mean) ** 2 for x in numbers) / (n - 1)


def _weighted(means: Mapping[str, float], weights: Mapping[str, float]) -> float:
    """The weighted mean; all equal, it is exactly their value, and all weighing 1, it is their sum by their number."""
    first = means[next(iter(weights))]
    if all(means[task] == first for task in weights):
        return first
    return math.fsum(means[task] * weight for task, weight in weights.items()) / math.fsum(weights.values())


def _mean_of(numbers: Mapping[str, Sequence[float]], weights: Mapping[str, float], level: float) -> Estimate:
    moments = {task: _moments(numbers[task]) for task in weights}
    value = _weighted({task: mean for task, (mean, _) in moments.items()}, weights)
    n, total = sum(len(numbers[task]) for task in weights), math.fsum(weights.values())
    parts: list[tuple[float, int]] = []
    for task, weight in weights.items():
        variance, seeds = moments[task][1], len(numbers[task])
        if variance is None:
            return Estimate(value, None, None, None, None, n, level)
        parts.append(((weight / total) ** 2 * variance / seeds, seeds - 1))
    variance, df = _satterthwaite(parts)
    return _t_interval(value, variance, df, n, level)


def _satterthwaite(parts: Sequence[tuple[float, float]]) -> tuple[float, float | None]:
    """The sum of estimated variances, and its degrees of freedom; None if nothing varies."""
    total = math.fsum(variance for variance, _ in parts)
    return total, 1 / math.fsum((variance / total) ** 2 / df for variance, df in parts) if total else None


def _mean_over_new_tasks(
    means: Mapping[str, float], clusters: Sequence[Sequence[str]], weights: Mapping[str, float], level: float
) -> Estimate:
    value, total = _weighted(means, weights), math.fsum(weights.values())
    apart = _sums({task: means[task] - value for task in weights}, clusters, weights)
    shares = [share / total for share in _sums(dict.fromkeys(weights, 1.0), clusters, weights)]
    count = len(shares)
    if count < FEWEST_SOURCES:
        return Estimate(value, None, None, None, None, count, level)
    variance = math.fsum((x / total) ** 2 / (1 - share) for x, share in zip(apart, shares, strict=True))
    # Σ_{g ≠ h} of products is the square of the sum without the sum of squares
    odds = [share**2 / (1 - share) for share in shares]
    df = 1 / (math.fsum(share**2 for share in shares) + math.fsum(odds) ** 2 - math.fsum(odd**2 for odd in odds))
    return _t_interval(value, variance, df, count, level)


def _sums(values: Mapping[str, float], clusters: Sequence[Sequence[str]], weights: Mapping[str, float]) -> list[float]:
    """The weighted sum of the values of each cluster; clusters without a task that weighs anything are left out."""
    shared = [[task for task in cluster if task in weights] for cluster in clusters]
    return [math.fsum(weights[task] * values[task] for task in cluster) for cluster in shared if cluster]


def _t_interval(value: float, variance: float, df: float | None, n: int, level: float) -> Estimate:
    if not variance or df is None:  # equal numbers: their spread is unknown, not zero
        return Estimate(value, None, None, None, None, n, level)
    from scipy import special

    se = math.sqrt(variance)
    half = float(special.stdtrit(df, (1 + level) / 2)) * se
    return Estimate(value, value - half, value + half, se, df, n, level)


def _scale(values: Sequence[float]) -> float:
    """The power of two below the largest value."""
    largest = max((abs(_number(x, "the values")) for x in values), default=0.0)
    return 2.0 ** math.floor(math.log2(largest)) if largest else 1.0


def _apart(x: float, y: float, scale: float) -> float:
    """x - y to 2⁻⁴⁰ of `scale`: 90.1 - 90 and 80.1 - 80 are then equal."""
    step = scale * 2.0**-40
    return round((float(x) - float(y)) / step) * step if step else float(x) - float(y)


def _seed_differences(a: Mapping[int, float], b: Mapping[int, float], scale: float) -> list[float]:
    return [_apart(a[seed], b[seed], scale) for seed in a if seed in b]


def _differences(a: Mapping[str, Mapping[int, float]], b: Mapping[str, Mapping[int, float]]) -> dict[str, list[float]]:
    """Task → a - b of the seeds that both have."""
    _same(a, b, "the tasks of a", "those of b")
    _some(a, "task")
    for side in (a, b):
        for task, seeds in side.items():
            _numbers(seeds.values(), f"the seeds of {task}")
    scale = _scale([x for side in (a, b) for seeds in side.values() for x in seeds.values()])
    differences = {task: _seed_differences(seeds, b[task], scale) for task, seeds in a.items()}
    if alone := [task for task, x in differences.items() if not x]:
        raise StatsError(f"{_listing(alone)}: the two sides share no seed; run both with the same seeds")
    return differences


def _signed_sums(sizes: Sequence[float]) -> NDArray[np.float64]:
    """The sums of `sizes` under all patterns of signs, shape (2^n,)."""
    import numpy as np

    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums


def _mean_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal values share their mean rank."""
    order = sorted(values)
    first: dict[float, int] = {}
    count: dict[float, int] = {}
    for i, x in enumerate(order):
        first.setdefault(x, i + 1)
        count[x] = count.get(x, 0) + 1
    return [first[x] + (count[x] - 1) / 2 for x in values]


def _p_of_two(a: Mapping[int, float], b: Mapping[int, float], scale: float) -> float:
    """Two-sided p that the row a is no better than b; 1 below six shared seeds, and where b is ahead over these."""
    differences = _seed_differences(a, b, scale)
    if len(differences) < FEWEST_PAIRS or math.fsum(differences) <= 0:
        return 1.0
    return sign_flip(differences)


def _discordant(a: Any, b: Any) -> tuple[int, int, int]:
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
