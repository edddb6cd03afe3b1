"""How many seeds: the formula against SciPy where SciPy has it, and against simulated experiments."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from scipy import special
from scipy import stats as scipy_stats

from svp_bench.stats.estimates import StatsError
from svp_bench.stats.power import image_floor, power_of_t, seeds_needed

TASKS = [f"t{i:02d}" for i in range(19)]
STDS = np.exp(np.random.default_rng(21).normal(-0.7, 0.8, 19))  # one method's, over seeds: 0.1 to 2 points
VARIANCES = dict(zip(TASKS, (STDS**2).tolist(), strict=True))
TWO = dict.fromkeys(TASKS, 2)


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
    weights = 1 / (3 * sizes) if grouped else np.full(19, 1 / 19)
    answer = seeds_needed(effect, VARIANCES, TWO, dict(zip(TASKS, weights.tolist(), strict=True)))
    assert answer.seeds is not None
    for at in answer.power_at:
        assert simulated(effect, at.n, weights, 8_000) == pytest.approx(at.power, abs=0.04)
    assert simulated(effect, answer.seeds, weights, 8_000) > 0.77
    assert simulated(effect, answer.seeds - 1, weights, 8_000) < 0.83


BOUNDS = {2: (-0.06, 0.30), 3: (-0.02, 0.13), 4: (-0.02, 0.07), 5: (-0.02, 0.05), 10: (-0.02, 0.02)}
"""Seeds → how far, by the docstring of `seeds_needed`, the true power may be below and above the predicted one."""


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
                named = {str(i): float(v) for i, v in enumerate(variances)}
                predicted = seeds_needed(effect, named, dict.fromkeys(named, 4), at=[n]).power_at[0].power
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
    answer = seeds_needed(1.0, {"x": 2.0}, {"x": 4}, of="pairs", at=(5, 10, 20))
    for at in answer.power_at:
        edge, shift = scipy_stats.t.ppf(0.975, at.n - 1), math.sqrt(at.n / 2)
        assert at.power == pytest.approx(scipy_stats.nct.sf(edge, at.n - 1, shift), abs=1e-3)
    assert answer.seeds == answer.tasks["x"].seeds == 18
    assert answer.df == pytest.approx(4)
    assert answer.inflation == pytest.approx(4 / scipy_stats.chi2.ppf(0.2, 4))


def test_the_detectable_effect_is_found_with_the_wanted_power() -> None:
    answer = seeds_needed(0.3, VARIANCES, TWO, power=0.9, level=0.99)
    assert [at.n for at in answer.power_at] == [3, 5, 10]
    for at in answer.power_at:
        again = seeds_needed(at.detectable, VARIANCES, TWO, power=0.5, level=0.99, at=[at.n])
        assert again.power_at[0].power == pytest.approx(0.9, abs=1e-6)
        assert at.cautious_detectable == pytest.approx(at.detectable * math.sqrt(answer.inflation))
    # The seeds that it needs are the ones it was asked for.
    assert seeds_needed(answer.power_at[1].detectable * 1.0001, VARIANCES, TWO, power=0.9, level=0.99).seeds == 5


def test_pairs_correlation_and_scale() -> None:
    method = seeds_needed(0.3, VARIANCES, TWO)
    pairs = {task: 2 * v for task, v in VARIANCES.items()}
    assert seeds_needed(0.3, pairs, TWO, of="pairs").power_at == method.power_at
    halved = seeds_needed(0.3, {task: 2 * v for task, v in VARIANCES.items()}, TWO, correlation=0.5)
    assert halved.power_at == method.power_at
    scaled = seeds_needed(3.0, {task: 100 * v for task, v in VARIANCES.items()}, TWO)
    assert (scaled.seeds, scaled.cautious_seeds, scaled.tasks) == (method.seeds, method.cautious_seeds, method.tasks)


def test_more_is_asked_where_less_is_known() -> None:
    answer = seeds_needed(0.15, VARIANCES, TWO)
    assert answer.seeds is not None
    assert answer.cautious_seeds is not None
    assert answer.cautious_seeds > answer.seeds
    assert all(at.cautious_power < at.power for at in answer.power_at)
    known = seeds_needed(0.15, VARIANCES, dict.fromkeys(TASKS, 1000))
    assert known.inflation < 1.05 < answer.inflation
    for seeds in answer.tasks.values():  # one task after three seeds: 4.5 times the variance
        assert seeds.seeds is not None
        assert seeds.cautious_seeds is None or seeds.cautious_seeds > seeds.seeds
    assert seeds_needed(0.001, VARIANCES, TWO).seeds is None


def test_the_cautious_plan_keeps_its_promise() -> None:
    # Pilots of three seeds; how often does the plan reach the true power of 0.8?
    generator = np.random.default_rng(23)
    true = seeds_needed(0.3, VARIANCES, TWO, at=()).seeds
    assert true is not None
    plain, cautious = [], []
    for _ in range(40):
        pilot = (generator.normal(0, 1, (19, 3)) * STDS[:, None]).var(1, ddof=1)
        answer = seeds_needed(0.3, dict(zip(TASKS, pilot.tolist(), strict=True)), TWO, at=())
        plain.append((answer.seeds or math.inf) >= true)
        cautious.append((answer.cautious_seeds or math.inf) >= true)
    assert np.mean(plain) < 0.7
    assert np.mean(cautious) > 0.75


@pytest.mark.filterwarnings("error")
def test_nothing_varies() -> None:
    answer = seeds_needed(0.1, {"x": 0.0}, {"x": 2})
    assert (answer.seeds, answer.cautious_seeds, answer.df, answer.inflation) == (2, 2, None, 1.0)
    assert answer.power_at[0].power == 1
    assert answer.power_at[0].detectable == 0


def test_image_floor() -> None:
    assert image_floor({"x": 0.2}, {"x": 2000}) == pytest.approx(1.96, abs=0.01)
    even = image_floor(dict.fromkeys(TASKS, 0.2), dict.fromkeys(TASKS, 2000))
    assert even == pytest.approx(image_floor({"x": 0.2}, {"x": 2000}) / math.sqrt(19))
    weighted = image_floor({"x": 0.2, "y": 0.1}, {"x": 2000, "y": 10}, {"x": 1.0, "y": 0.0})
    assert weighted == image_floor({"x": 0.2}, {"x": 2000})
    # What it bounds: the spread of the difference over test lists.
    generator = np.random.default_rng(24)
    counts = generator.multinomial(2000, [0.1, 0.1, 0.8], size=4000)
    drawn = 100 * (counts[:, 0] - counts[:, 1]) / 2000
    assert 1.96 * drawn.std() == pytest.approx(image_floor({"x": 0.2}, {"x": 2000}), rel=0.05)


def test_image_floor_with_shared_test_images() -> None:
    shares, counts = {"x": 0.2, "y": 0.2, "z": 0.1}, {"x": 500, "y": 500, "z": 300}
    apart = image_floor(shares, counts)
    assert image_floor(shares, counts, sources=[["x"], ["y"], ["z"]]) == pytest.approx(apart)
    shared = image_floor(shares, counts, sources=[["x", "y"], ["z"]])
    assert shared > apart
    assert image_floor({"x": 0.2, "y": 0.2}, {"x": 500, "y": 500}, sources=[["x", "y"]]) == pytest.approx(
        image_floor({"x": 0.2}, {"x": 500})
    )
    # Two tasks on the same images whose errors are the same: the difference of means varies as that of one task
    generator = np.random.default_rng(26)
    counted = generator.multinomial(500, [0.1, 0.1, 0.8], size=4000)
    drawn = 100 * (counted[:, 0] - counted[:, 1]) / 500
    floor = image_floor({"x": 0.2, "y": 0.2}, {"x": 500, "y": 500}, sources=[["x", "y"]])
    assert (abs(drawn) <= floor).mean() >= 0.94
    assert (abs(drawn) <= image_floor({"x": 0.2, "y": 0.2}, {"x": 500, "y": 500})).mean() < 0.9


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: power_of_t(math.nan, 3), "finite"),
        (lambda: power_of_t(1, 0), "df above 0"),
        (lambda: seeds_needed(0, VARIANCES, TWO), "the effect is 0 points"),
        (lambda: seeds_needed(1, {}, {}), "there is no task"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"y": 1}), "the degrees of freedom and the tasks differ in x, y"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, {"y": 1.0}), "the weights and the tasks differ in x, y"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, {"x": 0.0}), "not all 0"),
        (lambda: seeds_needed(1, {"x": -1.0}, {"x": 1}), "the variance of x is -1.0"),
        (lambda: seeds_needed(1, {"x": math.nan}, {"x": 1}), "the variance of x is nan"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 0}), "x has 0 degrees of freedom; one seed shows no variance"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, level=95), "the level is 95"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, power=80), "the power is 80"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, power=0.05), "reached without any effect"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, caution=1), "the caution is 1"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, at=[1]), "the power at 1 seeds"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, of="runs"), "variances of 'runs'"),  # type: ignore[arg-type]
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, correlation=1), "the correlation is 1"),
        (lambda: seeds_needed(1, {"x": 1.0}, {"x": 1}, of="pairs", correlation=0.5), "0 for variances of pairs"),
        (lambda: image_floor({"x": 1.5}, {"x": 10}), "x: a share of 1.5 of 10 images"),
        (lambda: image_floor({"x": 0.5}, {"x": 10}, sources=[["y"]]), "the sources and the tasks differ in x, y"),
        (lambda: image_floor({"x": 0.5}, {"x": 10}, sources=[["x"], ["x"]]), "x: in more than one source"),
    ],
)
def test_errors_are_one_line(call: Callable[[], object], text: str) -> None:
    with pytest.raises(StatsError, match=text) as info:
        call()
    assert "\n" not in str(info.value)
