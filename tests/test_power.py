"""How many seeds: the formula against SciPy where SciPy has it, and against simulated experiments."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from svp_bench.stats.power import Design, power_of_t

STDS = np.exp(np.random.default_rng(21).normal(-0.7, 0.8, 19))  # one method's, over seeds: 0.1 to 2 points
WEIGHTS = np.full(19, 1 / 19)


def design(variances: np.ndarray = STDS**2, weights: np.ndarray = WEIGHTS, df: int = 2, level: float = 0.95) -> Design:
    """The comparison of two methods with these variances over seeds."""
    return Design(tuple((2 * weights**2 * variances).tolist()), (df,) * len(variances), level)


def simulated(effect: float, n: int, weights: np.ndarray, experiments: int = 20_000) -> float:
    """How often the interval of `paired` (here in arrays) excludes zero."""
    generator = np.random.default_rng(22)
    pairs = effect + generator.normal(0, math.sqrt(2), (experiments, 19, n)) * STDS[:, None]
    parts = weights**2 * pairs.var(2, ddof=1) / n
    variance = parts.sum(1)
    df = variance**2 / (parts**2 / (n - 1)).sum(1)
    return float((abs(pairs.mean(2) @ weights) > scipy_stats.t.ppf(0.975, df) * np.sqrt(variance)).mean())


@pytest.mark.parametrize(("df", "noncentrality"), [(1, 10), (2.3, 5), (4, 1), (38, 2.8), (500, 2.8), (1e5, 0)])
def test_power_against_the_noncentral_t(df: float, noncentrality: float) -> None:
    edge = scipy_stats.t.ppf(0.975, df)
    expected = scipy_stats.nct.sf(edge, df, noncentrality) + scipy_stats.nct.cdf(-edge, df, noncentrality)
    assert power_of_t(noncentrality, df) == pytest.approx(expected, abs=1e-6)
    assert power_of_t(-noncentrality, df) == pytest.approx(expected, abs=1e-6)


def test_power_where_scipy_has_none() -> None:
    assert power_of_t(10, 2.3) == pytest.approx(0.99859, abs=1e-5)
    assert power_of_t(1e9, 5) == pytest.approx(1)
    assert power_of_t(2, 10, interval_df=3) < power_of_t(2, 10)


@pytest.mark.parametrize(("effect", "grouped"), [(0.3, False), (0.2, False), (0.15, False), (0.25, True)])
def test_the_predicted_power_comes_true(effect: float, grouped: bool) -> None:
    sizes = np.array([7] * 7 + [4] * 4 + [8] * 8)
    weights = 1 / (3 * sizes) if grouped else WEIGHTS
    found = design(weights=weights)
    seeds = found.seeds(effect, 0.8)
    assert seeds is not None
    for n in (3, 5, 10):
        assert simulated(effect, n, weights, 8_000) == pytest.approx(found.power(effect, n), abs=0.04)
    assert simulated(effect, seeds, weights, 8_000) > 0.77
    assert simulated(effect, seeds - 1, weights, 8_000) < 0.83


BOUNDS = {2: (-0.06, 0.30), 3: (-0.02, 0.13), 4: (-0.02, 0.07), 5: (-0.02, 0.05), 10: (-0.02, 0.02)}
"""Seeds → how far, by the docstring of `Design`, the true power may be below and above the predicted one."""


@pytest.mark.parametrize("n", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in BOUNDS if n > 2)])
def test_the_predicted_power_is_as_far_off_as_the_docstring_says(n: int) -> None:
    generator = np.random.default_rng(25)
    found = []
    for count in (1, 2, 5, 19):
        unequal = np.full(count, 0.01)
        unequal[0] = 1.0
        for variances in (np.ones(count), unequal, np.exp(generator.normal(0, 2, count))):
            pairs = 2 * variances / count**2  # of the weighted difference of one pair
            for shift in (1.6, 3.0):
                effect = shift * (1.8 if n == 2 else 1.0) * math.sqrt(pairs.sum() / n)
                predicted = design(variances, np.full(count, 1 / count), 4).power(effect, n)
                means = effect + math.sqrt(pairs.sum() / n) * generator.normal(0, 1, 20_000)
                parts = pairs / n * generator.chisquare(n - 1, (20_000, count)) / (n - 1)
                variance = parts.sum(1)
                df = variance**2 / (parts**2 / (n - 1)).sum(1)
                true = (abs(means) > special.stdtrit(df, 0.975) * np.sqrt(variance)).mean()
                found.append(true - predicted)
                assert BOUNDS[n][0] < found[-1] < BOUNDS[n][1], (count, variances, shift)
    if n <= 4:
        assert max(found) > BOUNDS[n][1] / 2  # the bound is of that size, not a safe large number


def test_one_task_is_the_paired_t_test() -> None:
    one = Design((2.0,), (4,))
    for n in (5, 10, 20):
        edge, shift = scipy_stats.t.ppf(0.975, n - 1), math.sqrt(n / 2)
        assert one.power(1.0, n) == pytest.approx(scipy_stats.nct.sf(edge, n - 1, shift), abs=1e-3)
    assert one.seeds(1.0, 0.8) == 18
    assert one.cautious(0.8).variance == pytest.approx(2.0 * 4 / scipy_stats.chi2.ppf(0.2, 4))


def test_the_detectable_effect_is_found_with_the_wanted_power() -> None:
    found = design(level=0.99)
    for n in (3, 5, 10):
        detectable = found.detectable(0.9, n)
        assert found.power(detectable, n) == pytest.approx(0.9, abs=1e-6)
        inflation = found.cautious().variance / found.variance
        assert found.cautious().detectable(0.9, n) == pytest.approx(detectable * math.sqrt(inflation))
    assert found.seeds(found.detectable(0.9, 5) * 1.0001, 0.9) == 5


def test_the_unit_does_not_matter() -> None:
    found, scaled = design(), design(100 * STDS**2)
    assert scaled.seeds(3.0, 0.8) == found.seeds(0.3, 0.8)
    assert scaled.cautious().seeds(3.0, 0.8) == found.cautious().seeds(0.3, 0.8)


def test_more_is_asked_where_less_is_known() -> None:
    found = design()
    seeds, cautious = found.seeds(0.15, 0.8), found.cautious().seeds(0.15, 0.8)
    assert seeds is not None
    assert cautious is not None
    assert cautious > seeds
    assert all(found.cautious().power(0.15, n) < found.power(0.15, n) for n in (3, 5, 10))
    known = design(df=1000)
    assert known.cautious().variance / known.variance < 1.05 < found.cautious().variance / found.variance
    assert found.seeds(0.001, 0.8) is None
    assert Design((1.0,), (2,)).cautious().variance == pytest.approx(4.5, abs=0.05)  # one task after three seeds


def test_the_cautious_plan_keeps_its_promise() -> None:
    # Pilots of three seeds; how often does the plan reach the true power of 0.8?
    generator = np.random.default_rng(23)
    true = design().seeds(0.3, 0.8)
    assert true is not None
    plain, cautious = [], []
    for _ in range(40):
        pilot = design((generator.normal(0, 1, (19, 3)) * STDS[:, None]).var(1, ddof=1))
        plain.append((pilot.seeds(0.3, 0.8) or math.inf) >= true)
        cautious.append((pilot.cautious().seeds(0.3, 0.8) or math.inf) >= true)
    assert np.mean(plain) < 0.7
    assert np.mean(cautious) > 0.75


@pytest.mark.filterwarnings("error")
def test_nothing_varies() -> None:
    still = Design((0.0,), (2,))
    assert still.cautious() == still
    assert (still.seeds(0.1, 0.8), still.power(0.1, 3), still.detectable(0.8, 3)) == (2, 1.0, 0.0)
