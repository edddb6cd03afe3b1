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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from svp_bench.stats.estimates import (
    FEWEST_SOURCES,
    Difference,
    Estimate,
    Paired,
    Spread,
    StatsError,
    Tax,
    check_level,
    cluster_sums,
    discordant_counts,
    moments_of,
    name_list,
    need_same,
    need_some,
    source_clusters,
    task_differences,
    task_weights,
    to_number,
    to_numbers,
    weighted_sum,
)
from svp_bench.stats.significance import sign_flip, signed_rank

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "accuracy_over_images",
    "difference_over_images",
    "group_weights",
    "mean_of",
    "mean_over_new_tasks",
    "one_standard_error",
    "over_images",
    "paired",
    "spread",
    "tax",
    "within",
]


def spread(values: Sequence[float]) -> Spread:
    """Return mean and sample standard deviation, sqrt(Σ (x - mean)² / (n - 1)); it is None for one value.

    Raises:
        StatsError: If there is no value, or one is not finite.
    """
    numbers = to_numbers(values, "the values")
    mean, variance = moments_of(numbers)
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
    check_level(level)
    numbers = {task: to_numbers(values, f"the seeds of {task}") for task, values in need_some(cells, "task").items()}
    return _mean_of(numbers, task_weights(numbers, weights), level)


def group_weights(groups: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Return the weights that turn the mean over tasks into the mean of the groups' means: 1 / (groups · its tasks).

    Raises:
        StatsError: If there is no group, a group has no task, or a task is in two groups.
    """
    weights: dict[str, float] = {}
    for name, tasks in need_some(groups, "group").items():
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
    check_level(level)
    numbers = {task: to_numbers(values, f"the seeds of {task}") for task, values in need_some(cells, "task").items()}
    clusters, counting = source_clusters(numbers, sources), task_weights(numbers, weights)
    return _mean_over_new_tasks({task: moments_of(x)[0] for task, x in numbers.items()}, clusters, counting, level)


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
    check_level(level)
    differences = task_differences(a, b)
    clusters, counting = source_clusters(differences, sources), task_weights(differences, weights)
    means = {task: moments_of(x)[0] for task, x in differences.items()}
    by_source = cluster_sums(means, clusters, counting)
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
    from scipy import special  # type: ignore[import-untyped]

    check_level(level)
    if not 0 <= to_number(accuracy_percent, "the accuracy") <= 100:
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

    check_level(level)
    if not bits:
        raise StatsError("there is no pair of runs; give at least one")
    sizes = {discordant_counts(a, b)[2] for a, b in bits}
    if len(sizes) > 1:
        raise StatsError(f"the pairs have {name_list(sizes)} images; all need the same split")
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
    counting = task_weights(need_some(tasks, "task"), weights)
    clusters = source_clusters(tasks, sources)
    levels = {estimate.level for estimate in tasks.values()}
    if len(levels) > 1:
        raise StatsError(f"the levels are {name_list(levels)}; give one")
    below: dict[str, float] = {}
    above: dict[str, float] = {}
    for task in counting:
        estimate = tasks[task]
        if estimate.low is None or estimate.high is None:
            raise StatsError(f"{task} has no interval over its test images")
        below[task], above[task] = estimate.value - estimate.low, estimate.high - estimate.value
    value, total = weighted_sum({task: tasks[task].value for task in counting}, counting), math.fsum(counting.values())
    down, up = (math.sqrt(math.fsum(part**2 for part in cluster_sums(x, clusters, counting))) for x in (below, above))
    down, up = down / total, up / total
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
    if not 0 <= to_number(accuracy_percent, "the accuracy") <= 100:
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
    check_level(level)
    differences = task_differences(best, final)
    for task, seeds in best.items():
        need_same(final[task], seeds, f"the last epochs on {task}", "its best epochs")
        for seed, value in seeds.items():
            if value < final[task][seed]:
                raise StatsError(
                    f"{task}, seed {seed}: the best epoch has {value}, the last {final[task][seed]}; the last is one "
                    "of all epochs and cannot be better: are the arguments swapped?"
                )
    tasks = {task: _mean_of({task: x}, {task: 1.0}, level) for task, x in sorted(differences.items())}
    return Tax(tasks, _mean_of(differences, task_weights(differences, weights), level))


def _mean_of(numbers: Mapping[str, Sequence[float]], weights: Mapping[str, float], level: float) -> Estimate:
    moments = {task: moments_of(numbers[task]) for task in weights}
    value = weighted_sum({task: mean for task, (mean, _) in moments.items()}, weights)
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
    value, total = weighted_sum(means, weights), math.fsum(weights.values())
    apart = cluster_sums({task: means[task] - value for task in weights}, clusters, weights)
    shares = [share / total for share in cluster_sums(dict.fromkeys(weights, 1.0), clusters, weights)]
    count = len(shares)
    if count < FEWEST_SOURCES:
        return Estimate(value, None, None, None, None, count, level)
    variance = math.fsum((x / total) ** 2 / (1 - share) for x, share in zip(apart, shares, strict=True))
    # Σ_{g ≠ h} of products is the square of the sum without the sum of squares
    odds = [share**2 / (1 - share) for share in shares]
    df = 1 / (math.fsum(share**2 for share in shares) + math.fsum(odds) ** 2 - math.fsum(odd**2 for odd in odds))
    return _t_interval(value, variance, df, count, level)


def _t_interval(value: float, variance: float, df: float | None, n: int, level: float) -> Estimate:
    if not variance or df is None:  # equal numbers: their spread is unknown, not zero
        return Estimate(value, None, None, None, None, n, level)
    from scipy import special

    se = math.sqrt(variance)
    half = float(special.stdtrit(df, (1 + level) / 2)) * se
    return Estimate(value, value - half, value + half, se, df, n, level)
