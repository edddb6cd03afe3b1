"""How many seeds a claim needs, before they are run: the power of the comparisons of `stats`.

All answers are for these tasks: more seeds say nothing about new tasks or other test images.
"""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SEEDS = range(2, 10_001)


def power_of_t(noncentrality: float, df: float, level: float = 0.95, interval_df: float | None = None) -> float:
    """Return the power of the two-sided t test: P(|T| > t) for the noncentral T of `df` and the quantile t of the test.

    With S = √(χ²_df / df) it is E[Φ(δ - t S) + Φ(-δ - t S)], here over 256 Gauss-Legendre nodes of S's probability:
    1e-6 of SciPy's `nct` or better, which returns NaN for some tails (df 2.3, δ 10).

    Source: Johnson, Kotz & Balakrishnan 1995, Continuous Univariate Distributions 2, chapter 31.

    Args:
        noncentrality: δ: true difference by its standard error.
        df: Degrees of freedom, above 0.
        level: 1 - level is the significance level.
        interval_df: Degrees of freedom of the quantile, t((1 + level) / 2), if they are not `df`.
    """
    import numpy as np
    from scipy import special  # type: ignore[import-untyped]

    nodes, parts = _nodes()
    quantile = special.stdtrit(df if interval_df is None else interval_df, (1 + level) / 2)
    edge = quantile * np.sqrt(special.chdtri(df, 1 - nodes) / df)
    return float(parts @ (special.ndtr(noncentrality - edge) + special.ndtr(-noncentrality - edge)))


@lru_cache(maxsize=1)
def _nodes() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gauss-Legendre nodes and weights on (0, 1)."""
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(256)
    return (nodes + 1) / 2, weights / 2


@dataclass(frozen=True)
class Design:
    """The comparison of two methods by the mean over tasks, tested as `stats.paired` does (`these_tasks`).

    n pairs of runs a task, with variance d_t of the difference of one pair, and weights w_t of sum 1 give

        SE² = Σ w_t² d_t / n,   ν = (n - 1) (Σ w_t² d_t)² / Σ (w_t² d_t)²,   δ = effect / SE

    and the power is that of the noncentral t with ν degrees of freedom. The interval does not know ν: from n seeds it
    estimates about (n - 1) (ν + 2) / (n + 1), the ratio of the expectations of (Σ x)² and Σ x² / (n - 1) for scaled
    χ² x, and takes a wider quantile. So power = `power_of_t(δ, ν, level, that)`.
    Simulated power minus this, in points, for 1 to 19 tasks from equal variances to one task with 100 times the
    variance of the others, at powers from 0.2 to 0.99: -6 to +30 at two seeds, -2 to +13 at three, -2 to +7 at four, -2
    to +5 at five, -2 to +2 at ten. So a plan of two or three seeds may have more power than stated
    (`tests/test_power.py` holds these bounds). One task is exact.

    Source: noncentral t, as in `power_of_t`; ν and f: Satterthwaite 1946, Biometrics Bulletin 2(6), 110-114; the bound:
    Browne 1995, Statistics in Medicine 14, 1933-1940.

    Attributes:
        parts: w_t² d_t of each task, in points².
        df: Degrees of freedom behind each of them: seeds - 1; the sum over methods, if it is pooled.
        level: Confidence level of the interval that is to exclude zero.
    """

    parts: tuple[float, ...]
    df: tuple[int, ...]
    level: float = 0.95

    @property
    def variance(self) -> float:
        """SE² at one seed."""
        return math.fsum(self.parts)

    @property
    def _squares(self) -> list[float]:
        return [(part / self.variance) ** 2 for part in self.parts]

    def cautious(self, caution: float = 0.8) -> Design:
        """Return the design with the upper confidence bound of the variance.

        A plan on variances that were estimated from few seeds misses its power in about half of all cases. With the
        estimate's degrees of freedom f (Satterthwaite), the bound is variance · f / χ²_f(1 - caution): at caution 0.8
        the plan reaches its power in 80 % of cases, or somewhat more. For one task after three seeds it is 4.5 times
        the estimate.
        """
        from scipy import special

        if not self.variance:
            return self
        df = 1 / math.fsum(square / d for square, d in zip(self._squares, self.df, strict=True))
        inflation = df / float(special.chdtri(df, caution))
        return replace(self, parts=tuple(part * inflation for part in self.parts))

    def _power(self, noncentrality: float, n: int) -> float:
        df = (n - 1) / math.fsum(self._squares)
        return power_of_t(noncentrality, df, self.level, (n - 1) * (df + 2) / (n + 1))

    def power(self, effect: float, n: int) -> float:
        """Return the chance that the interval of `n` seeds excludes zero, for a true difference of `effect` points."""
        return self._power(min(effect / math.sqrt(self.variance / n), 1e9), n) if self.variance else 1.0

    def seeds(self, effect: float, power: float) -> int | None:
        """Return the fewest seeds, from 2 on, that reach `power`; None: more than 10,000."""
        index = bisect.bisect_left(_SEEDS, True, key=lambda n: self.power(effect, n) >= power)
        return _SEEDS[index] if index < len(_SEEDS) else None

    def detectable(self, power: float, n: int) -> float:
        """Return the difference, in points, that `n` seeds find with `power`."""
        if not self.variance:
            return 0.0
        low, high = 0.0, 1.0
        while self._power(high, n) < power:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if self._power(middle, n) >= power else (middle, high)
        return high * math.sqrt(self.variance / n)
