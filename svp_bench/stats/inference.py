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
depends on the unit; sums are rounded once (`math.fsum`), so the order of the input changes no digit. An interval that
cannot be known is None, never zero. Arguments are not checked: records and flags were, when they were read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from svp_bench.stats.estimates import (
    FEWEST_SOURCES,
    Estimate,
    Paired,
    difference_of,
    moments_of,
    scale_of,
    seed_differences,
    source_sums,
    weighted_mean,
)
from svp_bench.stats.significance import sign_flip

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Runs = Mapping[str, Mapping[int, float]]
"""Task → seed → value."""


def mean_of(
    cells: Mapping[str, Sequence[float]], weights: Mapping[str, float] | None = None, level: float = 0.95
) -> Estimate:
    """Estimate the weighted mean over tasks of the means over seeds: these tasks, other seeds.

    mean = Σ w_t m_t, SE² = Σ w_t² s_t² / n_t, over the tasks t with n_t seeds, mean m_t and sample variance s_t². The
    interval is mean ± t(df) SE with df = SE⁴ / Σ ((w_t² s_t² / n_t)² / (n_t - 1)). With one task that is the ordinary
    t interval. The number of seeds may differ by task.

    Without a variance there is no interval: where a task has one seed, or if no task varies at all, since equal numbers
    from a few seeds do not show that others would be equal too.

    Source: Satterthwaite 1946, Biometrics Bulletin 2(6), 110-114; Welch 1947, Biometrika 34, 28-35.

    Args:
        cells: Task → the values of its seeds; `n` of the estimate is their number.
        weights: Task → weight, for exactly the tasks of `cells`; divided by their sum. None: all equal.
        level: Confidence level.
    """
    weights = dict.fromkeys(cells, 1.0) if weights is None else weights
    moments = {task: moments_of(values) for task, values in cells.items()}
    value = weighted_mean({task: mean for task, (mean, _) in moments.items()}, weights)
    n, total = sum(map(len, cells.values())), math.fsum(weights.values())
    parts: list[tuple[float, int]] = []
    for task, (_, variance) in moments.items():
        seeds = len(cells[task])
        if variance is None:
            return Estimate(value, None, None, None, None, n, level)
        parts.append(((weights[task] / total) ** 2 * variance / seeds, seeds - 1))
    whole = math.fsum(part for part, _ in parts)
    df = 1 / math.fsum((part / whole) ** 2 / free for part, free in parts) if whole else 0.0
    return _t_interval(value, whole, df, n, level)


def group_weights(groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the weights that turn the mean over tasks into the mean of the groups' means: 1 / (groups · its tasks)."""
    return {task: 1 / (len(groups) * len(tasks)) for tasks in groups.values() for task in tasks}


def mean_over_new_tasks(
    cells: Mapping[str, Sequence[float]], sources: Sequence[Sequence[str]], level: float = 0.95
) -> Estimate:
    """Estimate the mean over tasks of the means over seeds: new tasks, and new seeds.

    The tasks are seen as a sample. Tasks cut from the same images are one cluster; the clusters are independent.
    mean = Σ m_t / T over T tasks; with the clusters' weights W_g = T_g / T and sums e_g = Σ_{t in g} (m_t - mean) / T,

        SE² = Σ_g e_g² / (1 - W_g)                                                (CR2: bias-reduced linearization)
        df  = 1 / (Σ_g W_g² + Σ_{g ≠ h} W_g² W_h² / ((1 - W_g) (1 - W_h)))        (Satterthwaite)

    and the interval is mean ± t(df) SE. Under the working model of independent tasks of one variance, SE² is unbiased,
    and df follows exactly; both are those of the reference implementation (R package clubSandwich) for an intercept. If
    all sources have as many tasks, SE is the standard deviation of the sources by √G and df is G - 1; a source of many
    tasks takes degrees of freedom away. The noise of the seeds is part of the m_t and so of SE; one seed a task is
    enough.

    In simulations with 6, 10 and 16 sources of unequal size, whose tasks are independent, half or wholly dependent
    within a source, a 95 % interval covers in 93 to 97 % of cases (`tests/test_stats.py`); t(G - 1) with the factor
    G / (G - 1) covered in 86 to 94 %. With fewer sources than `FEWEST_SOURCES` there is no interval.

    Source: Bell & McCaffrey 2002, Survey Methodology 28(2), 169-181; Pustejovsky & Tipton 2018, Journal of Business &
    Economic Statistics 36(4), 672-683, sections 2 and 3.

    Args:
        cells: Task → the values of its seeds.
        sources: The tasks of each image source; each task of `cells` in exactly one. Other tasks are passed over. `n`
            of the estimate is the number G of sources with a task in `cells`.
        level: Confidence level.
    """
    means = {task: moments_of(values)[0] for task, values in cells.items()}
    equal = dict.fromkeys(means, 1.0)
    value, total = weighted_mean(means, equal), len(means)
    apart = source_sums({task: mean - value for task, mean in means.items()}, sources)
    shares = [share / total for share in source_sums(equal, sources)]
    if len(shares) < FEWEST_SOURCES:
        return Estimate(value, None, None, None, None, len(shares), level)
    variance = math.fsum((x / total) ** 2 / (1 - share) for x, share in zip(apart, shares, strict=True))
    # Σ_{g ≠ h} of products is the square of the sum without the sum of squares
    odds = [share**2 / (1 - share) for share in shares]
    df = 1 / (math.fsum(share**2 for share in shares) + math.fsum(odds) ** 2 - math.fsum(odd**2 for odd in odds))
    return _t_interval(value, variance, df, len(shares), level)


def _t_interval(value: float, variance: float, df: float, n: int, level: float) -> Estimate:
    if not variance:  # equal numbers: their spread is unknown, not zero
        return Estimate(value, None, None, None, None, n, level)
    from scipy import special  # type: ignore[import-untyped]

    se = math.sqrt(variance)
    half = float(special.stdtrit(df, (1 + level) / 2)) * se
    return Estimate(value, value - half, value + half, se, df, n, level)


def paired(a: Runs, b: Runs, sources: Sequence[Sequence[str]], level: float = 0.95) -> Paired:
    """Compare two methods, a - b, paired by task and seed.

    On each task, the differences of the runs that share a seed are averaged; seeds of one side alone are passed over.
    `these_tasks` is `mean_of` over the differences, `new_tasks` is `mean_over_new_tasks` over them.

    p is the `sign_flip` of the sources' summed differences, so that its statistic is the mean difference that is
    printed. It tests that a source's difference is as often up as down by the same amount, and so speaks about new
    tasks. Differences are rounded to 2⁻⁴⁰ of the largest value, so that numbers that are equal in decimals are equal.

    Args:
        a: Task → seed → value, e.g. top-1 in percent.
        b: The same tasks, with a seed in common on each.
        sources: As in `mean_over_new_tasks`.
        level: Confidence level of all intervals.
    """
    differences = _differences(a, b)
    alone = {task: _differences({task: a[task]}, {task: b[task]})[task] for task in differences}
    by_source = source_sums({task: moments_of(x)[0] for task, x in differences.items()}, sources)
    return Paired(
        tasks={task: mean_of({task: x}, level=level) for task, x in alone.items()},
        these_tasks=mean_of(differences, level=level),
        new_tasks=mean_over_new_tasks(differences, sources, level),
        p=sign_flip(by_source),
        n_sources=len(by_source),
    )


def _differences(a: Runs, b: Runs) -> dict[str, list[float]]:
    scale = scale_of([x for side in (a, b) for seeds in side.values() for x in seeds.values()])
    return {task: seed_differences(a[task], b[task], scale) for task in sorted(a)}


def difference_of_differences(
    a: Runs, b: Runs, c: Runs, d: Runs, sources: Sequence[Sequence[str]], level: float = 0.95
) -> Paired:
    """Compare two differences, (a - b) - (c - d): is the lead of a method the same on another backbone?

    On task t with the seeds S_t that all four share,

        d_t = Σ_{s in S_t} ((a_ts - b_ts) - (c_ts - d_ts)) / |S_t|,   mean = Σ_t d_t / T

    and everything else is `paired` of these: `these_tasks` has the variance of the seeds' differences within each task,
    so that what a seed does to all four runs (order of images, augmentation) cancels; `new_tasks` is CR2 with
    Satterthwaite's degrees of freedom over the sources, and equals the interaction of method and backbone in a linear
    model with an effect of each task. In simulations with the sources of the demo suite (3, 1, 1, 1, 1, 1 tasks) its
    95 % interval covers in 93 to 97 % of cases (`tests/test_stats.py`).

    Source: Bertrand, Duflo & Mullainathan 2004, Quarterly Journal of Economics 119(1), 249-275 (why differences of
    differences need a variance over clusters); CR2: see `mean_over_new_tasks`.

    Args:
        a: Task → seed → value; the first method on the first backbone.
        b: The second method on the first backbone. All four have the same tasks, and on each a seed in common.
        c: The first method on the second backbone.
        d: The second method on the second backbone.
        sources: As in `mean_over_new_tasks`.
        level: Confidence level of all intervals.
    """
    scale = scale_of([x for side in (a, b, c, d) for seeds in side.values() for x in seeds.values()])

    def apart(one: Runs, other: Runs) -> Runs:
        return {
            task: {seed: difference_of(x, other[task][seed], scale) for seed, x in seeds.items() if seed in other[task]}
            for task, seeds in one.items()
        }

    return paired(apart(a, b), apart(c, d), sources, level)


def p_of_zero(estimate: Estimate) -> float | None:
    """Return the two-sided p of the t test that the true value is zero; None if there is no standard error.

    It belongs to the interval of the estimate: below 1 - level exactly where the interval leaves out zero. Unlike
    `sign_flip` it assumes that the means of the sources are about normal, and can be small with few of them.
    """
    if estimate.se is None or estimate.df is None:
        return None
    from scipy import special

    return 2 * float(special.stdtr(estimate.df, -abs(estimate.value) / estimate.se))


def accuracy_over_images(accuracy_percent: float, count: int, level: float = 0.95) -> Estimate:
    """Estimate an accuracy in percent and its sampling error over test images: Wilson's score interval.

    Of runs that were tested once on `count` images. It lies within 0 and 100 and has a width at 0 and 100 too. It is
    about these weights and other test images; other seeds it does not see. A mean over seeds on the same images may be
    given: the seeds share their images, and no smaller error is claimed.

    Source: Wilson 1927, JASA 22, 209-212; Brown, Cai & DasGupta 2001, Statistical Science 16(2), 101-133.

    Args:
        accuracy_percent: 0 to 100.
        count: Test images, at least 1; `n` of the estimate. Its se is that of the interval's centre.
        level: Confidence level.
    """
    from scipy import special

    share, z = accuracy_percent / 100, float(special.ndtri((1 + level) / 2))
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    se = math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    low = 0.0 if share == 0 else 100 * max(0.0, centre - z * se)
    high = 100.0 if share == 1 else 100 * min(1.0, centre + z * se)
    return Estimate(accuracy_percent, low, high, 100 * se, None, count, level)


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
        bits: For each pair, booleans of shape (images,) for both runs: was the image classified correctly? At least one
            pair; the same images in the same order throughout. `n` of the estimate is their number.
        level: Confidence level.
    """
    import numpy as np
    from scipy import special

    n, k = bits[0][0].size, len(bits)
    counts = sum((a.astype(np.int64) - b.astype(np.int64) for a, b in bits), np.zeros(n, int))
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
        tasks: Task → its estimate, with an interval; all of one level. `n` adds up.
        sources: As in `mean_over_new_tasks`.
        weights: As in `mean_of`.
    """
    weights = dict.fromkeys(tasks, 1.0) if weights is None else weights
    total = math.fsum(weights.values())
    value = weighted_mean({task: found.value for task, found in tasks.items()}, weights)

    def distance(ends: Mapping[str, float | None]) -> float:
        apart = {task: weights[task] * abs(tasks[task].value - end) for task, end in ends.items() if end is not None}
        return math.sqrt(math.fsum(part**2 for part in source_sums(apart, sources))) / total

    below = distance({task: found.low for task, found in tasks.items()})
    above = distance({task: found.high for task, found in tasks.items()})
    n, level = sum(found.n for found in tasks.values()), next(iter(tasks.values())).level
    return Estimate(value, value - below, value + above, None, None, n, level)


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


def one_standard_error(accuracy_percent: float, count: int) -> float:
    """Return the binomial standard error of an accuracy on `count` images, in points: about 3 on 200.

    100 · sqrt(p (1 - p) / n) with p = (right + 1) / (n + 2) for the share of right ones (Laplace), so that 100 % right
    is not known without error. It is the error of one score, or of a mean over seeds on the same images, not of a
    difference: on the same images, differences are known better.

    Source: the rule of one standard error: Breiman et al. 1984, Classification and Regression Trees, section 3.4.3.
    """
    share = (accuracy_percent / 100 * count + 1) / (count + 2)
    return 100 * math.sqrt(share * (1 - share) / count)
