"""How many seeds a claim needs, before they are run: the power of the comparisons of `stats`. Pure functions.

All answers are for *these tasks*: more seeds say nothing about new tasks, and nothing about other test images
(`image_floor`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from svp_bench.stats.estimates import StatsError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["PowerAnswer", "PowerAt", "TaskSeeds", "image_floor", "power_of_t", "seeds_needed"]

_FEWEST, _MOST = 2, 10_000


@dataclass(frozen=True)
class PowerAt:
    """What `n` seeds a task give for the suite's mean.

    Attributes:
        n: Seeds a task, the same for both methods.
        power: Chance that the interval of the difference excludes zero, if the true difference is the effect.
        cautious_power: The same with the upper bound of the variance.
        detectable: The difference, in points, that is found with the wanted power.
        cautious_detectable: The same with the upper bound of the variance.
    """

    n: int
    power: float
    cautious_power: float
    detectable: float
    cautious_detectable: float


@dataclass(frozen=True)
class TaskSeeds:
    """Seeds that the effect needs on one task alone; None: more than 10,000."""

    seeds: int | None
    cautious_seeds: int | None


@dataclass(frozen=True)
class PowerAnswer:
    """How many seeds; see `seeds_needed`.

    Attributes:
        seeds: Seeds a task for the suite's mean, with the variances as they were estimated; None: more than 10,000.
        cautious_seeds: The same with the upper bound of the variance.
        power_at: Power and detectable difference of the suite's mean at the numbers of seeds asked for.
        tasks: Task → the seeds that the same effect needs on it alone.
        inflation: Upper bound of the suite's variance by its estimate: how uncertain the estimate is.
        df: Degrees of freedom of that estimate.
        effect: As asked, in points.
        level: As asked.
        power: As asked.
        caution: As asked.
    """

    seeds: int | None
    cautious_seeds: int | None
    power_at: tuple[PowerAt, ...]
    tasks: dict[str, TaskSeeds]
    inflation: float
    df: float | None
    effect: float
    level: float
    power: float
    caution: float


def power_of_t(noncentrality: float, df: float, level: float = 0.95, interval_df: float | None = None) -> float:
    """Return the power of the two-sided t test: P(|T| > t) for the noncentral T of `df` and the quantile t of the test.

    With S = √(χ²_df / df) it is E[Φ(δ - t S) + Φ(-δ - t S)], here over 256 Gauss-Legendre nodes of S's probability:
    1e-6 of SciPy's `nct` or better, which returns NaN for some of the tails needed here (df 2.3, δ 10).

    Source: Johnson, Kotz & Balakrishnan 1995, Continuous Univariate Distributions 2, chapter 31.

    Args:
        noncentrality: δ: true difference by its standard error.
        df: Degrees of freedom, above 0.
        level: 1 - level is the significance level.
        interval_df: Degrees of freedom of the quantile, t((1 + level) / 2), if they are not `df`.

    Raises:
        StatsError: If `noncentrality` is not finite, a df is not above 0, or `level` is not between 0 and 1.
    """
    from scipy import special  # type: ignore[import-untyped]

    quantile_df = df if interval_df is None else interval_df
    if not math.isfinite(noncentrality) or not 0 < df < math.inf or not 0 < quantile_df < math.inf:
        raise StatsError(f"noncentrality {noncentrality} and df {df}, {quantile_df}: finite, and df above 0")
    _fraction(level, "the level")
    import numpy as np

    nodes, parts = _nodes()
    edge = special.stdtrit(quantile_df, (1 + level) / 2) * np.sqrt(special.chdtri(df, 1 - nodes) / df)
    return float(parts @ (special.ndtr(noncentrality - edge) + special.ndtr(-noncentrality - edge)))


def seeds_needed(
    effect: float,
    variances: Mapping[str, float],
    df_per_task: Mapping[str, int],
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
    power: float = 0.8,
    *,
    of: Literal["method", "pairs"] = "method",
    correlation: float = 0.0,
    caution: float = 0.8,
    at: Sequence[int] = (3, 5, 10),
) -> PowerAnswer:
    """Say how many seeds a task the claim "the suite's mean differs by `effect` points" needs, on these tasks.

    The claim is tested as `stats.paired` does (`these_tasks`): n pairs a task, with variance d_t = 2 v_t (1 - ρ) for
    the difference of two runs, v_t the variance over seeds of one method (that of both: they are taken to be equal).
    From earlier pairs, d_t is given itself (`of="pairs"`). Then, with weights w_t of sum 1,

        SE² = Σ w_t² d_t / n,   ν = (n - 1) (Σ w_t² d_t)² / Σ (w_t² d_t)²,   δ = effect / SE

    and the power is that of the noncentral t with ν degrees of freedom. The interval does not know ν: from n seeds it
    estimates about (n - 1) (ν + 2) / (n + 1), the ratio of the expectations of (Σ x)² and Σ x² / (n - 1) for scaled
    χ² x, and takes a wider quantile. So power = `power_of_t(δ, ν, level, that)`.
    Simulated power minus this, in points, for 1 to 19 tasks from equal variances to one task with 100 times the
    variance of the others, at powers from 0.2 to 0.99: -6 to +30 at two seeds, -2 to +13 at three, -2 to +7 at four, -2
    to +5 at five, -2 to +2 at ten. So a plan of two or three seeds may have more power than stated
    (`tests/test_power.py` holds these bounds).
    One task is exact. `seeds` is the smallest n ≥ 2 that reaches `power`.

    The variances are estimated, mostly from very few seeds, and a plan on the plain estimate misses its power in about
    half of all cases. The cautious answer puts their upper confidence bound in place: with the estimate's own degrees
    of freedom f (Satterthwaite, from `df_per_task`), variance · f / χ²_f(1 - caution). At caution 0.8 the plan reaches
    its power in 80 % of cases, or somewhat more. For one task after three seeds the bound is 4.5 times the estimate.

    Source: noncentral t, as in `power_of_t`; ν and f: Satterthwaite 1946, Biometrics Bulletin 2(6), 110-114; the bound:
    Browne 1995, Statistics in Medicine 14, 1933-1940.

    Args:
        effect: True difference of the means, in points, above 0.
        variances: Task → sample variance over seeds, in points²: of one method, or of paired differences (`of`).
        df_per_task: Task → degrees of freedom behind that variance: seeds - 1; the sum over methods, if it is pooled.
        weights: As in `stats.mean_of`.
        level: Confidence level of the interval that is to exclude zero.
        power: The wanted chance that it does.
        of: Whose variance was given.
        correlation: ρ of two methods' runs that share a seed, above -1 and below 1; 0 if unknown, above 0 it saves
            seeds. Only with `of="method"`.
        caution: Confidence of the upper bound of the variance.
        at: Seeds a task for which power and detectable difference are wanted, each 2 or more.

    Raises:
        StatsError: If there is no task, tasks differ between the arguments, or a number is outside its range.
    """
    tasks = _checked(effect, variances, df_per_task, weights, of, correlation)
    for value, what in ((level, "the level"), (power, "the power"), (caution, "the caution")):
        _fraction(value, what)
    if power <= 1 - level:
        raise StatsError(f"the power {power} is reached without any effect at level {level}; ask for more")
    if bad := [n for n in at if n < _FEWEST]:
        raise StatsError(f"the power at {bad[0]} seeds is not defined; 2 are the fewest that show a variance")
    total = math.fsum(tasks.values())
    factor = 2 * (1 - correlation) if of == "method" else 1.0
    parts = {task: (weight / total) ** 2 * factor * float(variances[task]) for task, weight in tasks.items()}
    suite = _Design(list(parts.values()), [df_per_task[task] for task in parts], level, caution)
    alone = {t: _Design([factor * float(variances[t])], [df_per_task[t]], level, caution) for t in sorted(parts)}
    return PowerAnswer(
        seeds=suite.seeds(effect, power, 1.0),
        cautious_seeds=suite.seeds(effect, power, suite.inflation),
        power_at=tuple(
            PowerAt(
                n,
                suite.power(effect, n, 1.0),
                suite.power(effect, n, suite.inflation),
                suite.detectable(power, n, 1.0),
                suite.detectable(power, n, suite.inflation),
            )
            for n in at
        ),
        tasks={
            t: TaskSeeds(d.seeds(effect, power, 1.0), d.seeds(effect, power, d.inflation)) for t, d in alone.items()
        },
        inflation=suite.inflation,
        df=suite.df,
        effect=float(effect),
        level=level,
        power=power,
        caution=caution,
    )


def image_floor(
    discordant: Mapping[str, float],
    counts: Mapping[str, int],
    weights: Mapping[str, float] | None = None,
    level: float = 0.95,
    sources: Sequence[Sequence[str]] | None = None,
) -> float:
    """Return the half-width, in points, that the sampling of test images alone leaves to a difference of suite means.

    z · 100 · sqrt(Σ_g (Σ_{t in g} w_t sqrt(q_t / n_t))²) with q_t the share of the n_t test images that exactly one of
    two runs has right and z the normal quantile. q_t / n_t is an upper bound of the variance (q_t - (p_a - p_b)²) / n_t
    of the difference of one pair of runs; over seeds q_t may be averaged. More seeds hardly lower it, for all runs are
    tested on the same images: a difference below it may be true of these test splits and of no other. Tasks of one
    source g share their test images; how their errors depend on each other is not known, and adding their standard
    errors bounds it.

    Source: McNemar 1947, Psychometrika 12, 153-157 (the variance of a paired difference of shares).

    Args:
        discordant: Task → q_t, between 0 and 1: (b + c) / n of `stats.mcnemar`.
        counts: Task → images in the test list, at least 1.
        weights: As in `stats.mean_of`.
        level: Confidence level.
        sources: The tasks of each source of test images, as in `stats.mean_over_new_tasks`; None: none is shared.

    Raises:
        StatsError: If there is no task, tasks differ between the arguments, a task is in no source or in two, or a
            number is outside its range.
    """
    from scipy import special

    _fraction(level, "the level")
    tasks = _weights_of(discordant, weights)
    listed = sorted(task for source in sources for task in source) if sources is not None else sorted(discordant)
    if twice := sorted({task for task in listed if listed.count(task) > 1}):
        raise StatsError(f"{', '.join(twice[:5])}: in more than one source; test images come from one")
    _same_tasks(discordant, dict.fromkeys(listed), "the sources")
    _same_tasks(discordant, counts, "the counts")
    for task, share in discordant.items():
        if not 0 <= share <= 1 or counts[task] < 1:
            raise StatsError(f"{task}: a share of {share} of {counts[task]} images; 0 to 1, of 1 image or more")
    total = math.fsum(tasks.values())
    parts = {task: w / total * math.sqrt(discordant[task] / counts[task]) for task, w in tasks.items()}
    shared = sources if sources is not None else [[task] for task in tasks]
    variance = math.fsum(math.fsum(parts.get(task, 0.0) for task in source) ** 2 for source in shared)
    return 100 * float(special.ndtri((1 + level) / 2)) * math.sqrt(variance)


class _Design:
    """A weighted sum of means over n seeds; `parts` are the variances of its summands at one seed."""

    def __init__(self, parts: Sequence[float], df: Sequence[int], level: float, caution: float) -> None:
        from scipy import special

        self.level = level
        self.variance = math.fsum(parts)
        self.df: float | None = None
        self.df_of_one_pair, self.inflation = 1.0, 1.0  # df of the comparison, by n - 1; upper bound by estimate
        if self.variance:
            squares = [(part / self.variance) ** 2 for part in parts]
            self.df = 1 / math.fsum(square / d for square, d in zip(squares, df, strict=True))
            self.df_of_one_pair = 1 / math.fsum(squares)
            self.inflation = self.df / float(special.chdtri(self.df, caution))

    def power_of(self, noncentrality: float, n: int) -> float:
        """Power at n seeds for a difference of so many standard errors."""
        df = (n - 1) * self.df_of_one_pair
        return power_of_t(noncentrality, df, self.level, (n - 1) * (df + 2) / (n + 1))

    def power(self, effect: float, n: int, inflation: float) -> float:
        """Power at n seeds."""
        if not self.variance:
            return 1.0
        return self.power_of(min(effect / math.sqrt(self.variance * inflation / n), 1e9), n)

    def seeds(self, effect: float, power: float, inflation: float) -> int | None:
        """Fewest seeds that reach the power; it grows with them."""

        def enough(n: int) -> bool:
            return self.power(effect, n, inflation) >= power

        high = _FEWEST
        while not enough(high):
            if high >= _MOST:
                return None
            high = min(2 * high, _MOST)
        return _first(enough, max(_FEWEST, high // 2), high)

    def detectable(self, power: float, n: int, inflation: float) -> float:
        """The effect that n seeds find with the power."""
        if not self.variance:
            return 0.0
        low, high = 0.0, 1.0
        while self.power_of(high, n) < power:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self.power_of(middle, n) >= power else (middle, high)
        return high * math.sqrt(self.variance * inflation / n)


def _first(enough: Callable[[int], bool], low: int, high: int) -> int:
    """The first number from `low` to `high` that is enough; `high` is."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle + 1, high)
    return high


@lru_cache(maxsize=1)
def _nodes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Legendre nodes and weights on (0, 1)."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(256)
    return (nodes + 1) / 2, weights / 2


def _fraction(value: float, what: str) -> None:
    if not 0 < value < 1:
        raise StatsError(f"{what} is {value}; it lies between 0 and 1: 0.95 for 95 %")


def _same_tasks(tasks: Mapping[str, object], others: Mapping[str, object], what: str) -> None:
    if apart := sorted(set(tasks) ^ set(others)):
        raise StatsError(f"{what} and the tasks differ in {', '.join(apart[:5])}; give both for the same tasks")


def _weights_of(tasks: Mapping[str, object], weights: Mapping[str, float] | None) -> dict[str, float]:
    """The weights that are not zero."""
    if not tasks:
        raise StatsError("there is no task; give at least one")
    if weights is None:
        return dict.fromkeys(tasks, 1.0)
    _same_tasks(tasks, weights, "the weights")
    if not all(0 <= weight < math.inf for weight in weights.values()) or not any(weights.values()):
        raise StatsError("weights are finite, 0 or more, and not all 0")
    return {task: float(weights[task]) for task in tasks if weights[task]}


def _checked(
    effect: float,
    variances: Mapping[str, float],
    df_per_task: Mapping[str, int],
    weights: Mapping[str, float] | None,
    of: str,
    correlation: float,
) -> dict[str, float]:
    if not 0 < effect < math.inf:
        raise StatsError(
            f"the effect is {effect} points; it is above 0 (no number of seeds shows that nothing differs)"
        )
    tasks = _weights_of(variances, weights)
    _same_tasks(variances, df_per_task, "the degrees of freedom")
    for task, variance in variances.items():
        if not 0 <= variance < math.inf:
            raise StatsError(f"the variance of {task} is {variance}; it is 0 or more")
        if df_per_task[task] < 1:
            raise StatsError(f"{task} has {df_per_task[task]} degrees of freedom; one seed shows no variance, run two")
    if of not in ("method", "pairs"):
        raise StatsError(f"variances of {of!r}; 'method' or 'pairs'")
    if not -1 < correlation < 1 or (of == "pairs" and correlation):
        raise StatsError(f"the correlation is {correlation}; above -1 and below 1, and 0 for variances of pairs")
    return tasks
