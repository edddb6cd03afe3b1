"""The statistics, against brute force, SciPy and simulation: what they say has to be true as often as they say."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from svp_bench.stats.estimates import FEWEST_PAIRS, FEWEST_SOURCES, Estimate, Marks
from svp_bench.stats.inference import (
    accuracy_over_images,
    difference_of_differences,
    difference_over_images,
    group_weights,
    mean_of,
    mean_over_new_tasks,
    one_standard_error,
    over_images,
    p_of_zero,
    paired,
    within,
)
from svp_bench.stats.significance import (
    best_and_second,
    cell_verdict,
    holm,
    mcnemar,
    rank_cliques,
    sign_flip,
    signed_rank,
    smallest_p,
)

# The shape of VTAB-1k: 7 + 4 + 8 tasks, three image sources with two tasks each.
TASKS = [f"t{i:02d}" for i in range(19)]
GROUPS = {"natural": TASKS[:7], "specialised": TASKS[7:11], "structured": TASKS[11:]}
SOURCES = [[task] for task in TASKS[:13]] + [TASKS[13:15], TASKS[15:17], TASKS[17:]]
ALONE = [[task] for task in TASKS]

Cells = dict[str, list[float]]
Runs = dict[str, dict[int, float]]

# Accuracies in hundredths of a percent: ties and zeros occur.
percents = st.integers(0, 10_000).map(lambda x: x / 100)


@st.composite
def runs(draw: st.DrawFn, fewest_seeds: int = 1) -> Runs:
    """Draw up to five tasks with the seeds 0, 1, 2 …"""
    sizes = draw(st.lists(st.integers(fewest_seeds, 4), min_size=1, max_size=5))
    return {TASKS[-1 - i]: {s: draw(percents) for s in range(size)} for i, size in enumerate(sizes)}


def cells_of(runs: Mapping[str, Mapping[int, float]]) -> Cells:
    return {task: list(seeds.values()) for task, seeds in runs.items()}


def mapped(runs: Runs, change: Callable[[float], float]) -> Runs:
    return {task: {seed: change(x) for seed, x in seeds.items()} for task, seeds in runs.items()}


def ends(estimate: Estimate) -> tuple[float, float]:
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


def covers(estimate: Estimate, truth: float) -> bool:
    low, high = ends(estimate)
    return low <= truth <= high


def seeded(values: Any) -> Runs:
    """Turn an array (tasks, seeds) into runs."""
    return {task: dict(enumerate(map(float, row))) for task, row in zip(TASKS, values, strict=False)}


# ---- Means -----------------------------------------------------------------------------------------------------------


def test_importing_it_loads_neither_scipy_nor_numpy_nor_torch() -> None:
    code = (
        "import sys, svp_bench.stats.inference, svp_bench.stats.power; "
        "print([m for m in ('torch', 'scipy', 'numpy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_mean_of_one_task_has_the_ordinary_t_interval() -> None:
    values = [81.5, 80.4, 81.8, 65.9]  # SVHN with VPT, as four seeds gave it
    estimate = mean_of({"svhn": values})
    expected = scipy_stats.t.interval(0.95, 3, np.mean(values), scipy_stats.sem(values))
    assert ends(estimate) == pytest.approx(expected)
    assert (estimate.value, estimate.df, estimate.n) == (pytest.approx(np.mean(values)), pytest.approx(3), 4)


def test_two_tasks_with_opposite_weights_would_be_welchs_test() -> None:
    # Welch's interval of a difference is that of the mean of (a, -b), times two.
    a, b = [1.0, 4.0, 2.5, 3.0], [10.0, 12.0, 20.0]
    welch = scipy_stats.ttest_ind(a, b, equal_var=False).confidence_interval(0.9)
    estimate = mean_of({"a": a, "b": [-x for x in b]}, level=0.9)
    assert [2 * x for x in ends(estimate)] == pytest.approx([welch.low, welch.high])


def test_weights_are_divided_by_their_sum() -> None:
    cells = {"a": [1.0, 2.0], "b": [5.0, 9.0]}
    estimate = mean_of(cells, {"a": 30, "b": 10})
    assert estimate == mean_of(cells, {"a": 0.75, "b": 0.25})
    assert estimate.value == 0.75 * 1.5 + 0.25 * 7
    assert estimate.se == pytest.approx(math.sqrt(0.75**2 * 0.5 / 2 + 0.25**2 * 8 / 2))
    assert estimate.n == 4


def test_one_task_with_one_seed_takes_the_interval_away() -> None:
    estimate = mean_of({"a": [1.0, 2.0], "b": [5.0]})
    assert estimate == Estimate(3.25, None, None, None, None, 3, 0.95)


@pytest.mark.filterwarnings("error")
def test_nothing_varies() -> None:
    estimate = mean_of({"a": [0.1] * 3, "b": [0.7] * 2})
    # A few equal numbers are no proof that others would be equal: no interval, rather than one without width
    assert (estimate.low, estimate.high, estimate.se, estimate.df) == (None, None, None, None)
    assert mean_of({"a": [0.1] * 3, "b": [0.1] * 7}).value == 0.1


def test_the_plain_mean_is_the_sum_by_the_number() -> None:
    means = np.random.default_rng(5).uniform(0, 100, 19)
    assert mean_of({t: [m] for t, m in zip(TASKS, means, strict=True)}).value == math.fsum(means) / 19


def test_group_weights() -> None:
    weights = group_weights(GROUPS)
    assert math.fsum(weights.values()) == pytest.approx(1)
    cells = {task: [float(i)] for i, task in enumerate(TASKS)}
    assert mean_of(cells, weights).value == pytest.approx(np.mean([3.0, 8.5, 14.5]))


def test_new_tasks_without_clusters_is_the_t_interval_over_tasks() -> None:
    means = np.random.default_rng(1).normal(70, 15, 19)
    estimate = mean_over_new_tasks({t: [m] for t, m in zip(TASKS, means, strict=True)}, ALONE)
    assert ends(estimate) == pytest.approx(scipy_stats.t.interval(0.95, 18, means.mean(), scipy_stats.sem(means)))
    assert (estimate.n, estimate.df) == (19, pytest.approx(18))


def test_new_tasks_is_the_sandwich_of_least_squares() -> None:
    generator = np.random.default_rng(2)
    y, w = generator.normal(70, 15, 19), np.ones(19)
    estimate = mean_over_new_tasks({t: [m - 1, m + 1] for t, m in zip(TASKS, y, strict=True)}, SOURCES)
    design = np.ones((19, 1))
    bread = np.linalg.inv(design.T @ np.diag(w) @ design)
    beta = bread @ design.T @ (w * y)
    member = np.array([[task in source for task in TASKS] for source in SOURCES])
    # CR2 with the working model var(m_t) = 1 / w_t, as matrices: A (I - H) Phi (I - H)' A' = Phi in each cluster
    hat = design @ bread @ design.T @ np.diag(w)
    rest, phi = np.eye(19) - hat, np.diag(1 / w)
    directions, meat = [], 0.0
    for m in member:
        root = np.diag(np.sqrt(w[m]))
        inner = root @ (rest @ phi @ rest.T)[np.ix_(m, m)] @ root
        values, vectors = np.linalg.eigh(inner)
        inverse = vectors @ np.diag([x**-0.5 if x > 1e-9 else 0.0 for x in values]) @ vectors.T
        adjustment = np.linalg.inv(root) @ inverse @ root
        assert adjustment @ (rest @ phi @ rest.T)[np.ix_(m, m)] @ adjustment.T == pytest.approx(phi[np.ix_(m, m)])
        row = np.zeros(19)
        row[m] = bread[0, 0] * w[m] @ adjustment
        meat += float(row @ (y - beta[0])) ** 2
        directions.append(row @ rest)
    gram = np.array(directions) @ phi @ np.array(directions).T
    assert estimate.value == pytest.approx(beta[0])
    assert estimate.se == pytest.approx(math.sqrt(meat))
    assert estimate.n == 16
    assert estimate.df == pytest.approx(np.trace(gram) ** 2 / (gram**2).sum())
    assert estimate.df is not None
    assert estimate.df < 15


def test_copies_of_a_task_in_one_source_add_nothing() -> None:
    cells = {task: [float(x)] for task, x in zip("abcdef", (1, 5, 9, 2, 7, 7), strict=True)}
    copies = {f"{task}{i}": values for task, values in cells.items() for i in range(4)}
    once = mean_over_new_tasks(cells, [[task] for task in cells])
    assert (once.n, once.df) == (6, pytest.approx(5))
    copied = mean_over_new_tasks(copies, [[f"{task}{i}" for i in range(4)] for task in cells])
    assert (copied.value, *ends(copied), copied.n) == pytest.approx((once.value, *ends(once), 6))


@pytest.mark.parametrize("count", range(1, FEWEST_SOURCES + 2))
def test_a_few_sources_have_no_interval_over_new_tasks(count: int) -> None:
    """Two tasks of 52.6 and 90.6 % would give [-93.68, 236.83]: t with one degree of freedom."""
    cells = {TASKS[i]: [90.6 if i % 2 else 52.6] for i in range(count)}
    estimate = mean_over_new_tasks(cells, ALONE)
    assert estimate.n == count
    assert (estimate.low is None) == (estimate.df is None) == (count < FEWEST_SOURCES)


def test_one_source_has_no_interval_and_absent_tasks_are_passed_over() -> None:
    cells = {TASKS[17]: [1.0, 2.0], TASKS[18]: [3.0]}
    assert mean_over_new_tasks(cells, SOURCES) == Estimate(2.25, None, None, None, None, 1, 0.95)


@settings(max_examples=60, deadline=None)
@given(runs(fewest_seeds=2), st.randoms(use_true_random=False), st.floats(-50, 50), st.floats(0.1, 20))
def test_means_turn_with_their_input(runs: Runs, random: Any, shift: float, factor: float) -> None:
    cells = cells_of(runs)
    weights = {task: 1.0 + i for i, task in enumerate(cells)}
    tasks = list(cells)
    random.shuffle(tasks)
    turned = {task: random.sample(cells[task], len(cells[task])) for task in tasks}
    sources = [random.sample(source, len(source)) for source in random.sample(SOURCES, len(SOURCES))]
    for f in (
        lambda cells, sources=SOURCES: mean_of(cells, weights),
        lambda cells, sources=SOURCES: mean_over_new_tasks(cells, sources),
    ):
        plain = f(cells)
        assert f(turned, sources) == plain  # to the last digit
        moved = f({task: [factor * x + shift for x in values] for task, values in cells.items()})
        assert moved.value == pytest.approx(factor * plain.value + shift, abs=1e-9)
        for one, other in zip((moved.low, moved.high), (plain.low, plain.high), strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None and moved.df is not None and plain.df is not None:
                # Rounding of a shifted constant may let it vary in the last digit; its df then means nothing.
                assert one == pytest.approx(factor * other + shift, rel=1e-6, abs=1e-6)


# ---- Coverage --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, group_weights(GROUPS)])
def test_welch_satterthwaite_covers_with_three_seeds(weights: Mapping[str, float] | None) -> None:
    generator = np.random.default_rng(11)
    stds = np.exp(generator.normal(-0.7, 0.8, 19))  # 0.1 to 2 points
    hits = [
        covers(mean_of(cells_of(seeded(generator.normal(0, 1, (19, 3)) * stds[:, None])), weights), 0.0)
        for _ in range(2500)
    ]
    assert 0.935 < np.mean(hits) < 0.97


def test_the_percentile_bootstrap_over_three_seeds_does_not() -> None:
    # Why there is none here: resampling three seeds within each task understates the variance by 2/3.
    generator = np.random.default_rng(12)
    stds = np.exp(generator.normal(-0.7, 0.8, 19))
    hits = []
    for _ in range(400):
        values = generator.normal(0, 1, (19, 3)) * stds[:, None]
        picks = generator.integers(0, 3, (400, 19, 3))
        sampled = values[np.arange(19)[None, :, None], picks].mean((1, 2))
        low, high = np.quantile(sampled, [0.025, 0.975])
        hits.append(low <= 0 <= high)
    assert np.mean(hits) < 0.9


def test_the_cluster_interval_covers_with_sixteen_sources() -> None:
    generator = np.random.default_rng(13)
    of_source = [next(i for i, source in enumerate(SOURCES) if task in source) for task in TASKS]
    clustered, naive = [], []
    for _ in range(1500):
        twins = generator.normal(0, 4, 16)[of_source]
        cells = cells_of(seeded((twins + generator.normal(0, 1, 19))[:, None] + generator.normal(0, 0.5, (19, 3))))
        clustered.append(covers(mean_over_new_tasks(cells, SOURCES), 0.0))
        naive.append(covers(mean_over_new_tasks(cells, ALONE), 0.0))
    assert 0.93 < np.mean(clustered) < 0.97
    assert np.mean(naive) < np.mean(clustered)


@pytest.mark.parametrize("within_source", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "sizes",
    [
        *([1] * 6, [3, 1, 1, 1, 1, 1], [2, 2, 2, 1, 1, 1], [4, 3, 2, 1, 1, 1]),
        *([5, 2, *[1] * 8], [4, 3, 3, 2, 2, *[1] * 5], [2, 2, 2, *[1] * 13], [5, 4, 3, 2, 2, *[1] * 11]),
    ],
    ids=str,
)
def test_the_cluster_interval_covers_with_sources_of_unequal_size(sizes: list[int], within_source: float) -> None:
    """6, 10 and 16 sources; their tasks independent, half or wholly dependent: 93 to 97 %."""
    generator = np.random.default_rng(15)
    of_source = np.repeat(np.arange(len(sizes)), sizes)
    names = [f"t{i}" for i in range(len(of_source))]
    sources = [[name for name, g in zip(names, of_source, strict=True) if g == source] for source in range(len(sizes))]
    # One estimate of the function gives df, which does not depend on the values; the rest in arrays, and compared
    twins = math.sqrt(within_source) * generator.normal(0, 1, (20_000, len(sizes)))[:, of_source]
    means = twins + math.sqrt(1 - within_source) * generator.normal(0, 1, (20_000, len(names)))
    estimate = mean_over_new_tasks({t: [m] for t, m in zip(names, means[0], strict=True)}, sources)
    values = means.mean(1)
    shares = np.array(sizes) / len(names)
    sums = np.stack([(means - values[:, None])[:, of_source == g].sum(1) for g in range(len(sizes))], 1) / len(names)
    se = np.sqrt((sums**2 / (1 - shares)).sum(1))
    assert (estimate.value, estimate.se) == pytest.approx((values[0], se[0]))
    half = scipy_stats.t.ppf(0.975, estimate.df) * se
    assert ends(estimate) == pytest.approx((values[0] - half[0], values[0] + half[0]))
    assert 0.93 < (abs(values) <= half).mean() < 0.97


def test_the_paired_p_is_as_rare_as_it_says() -> None:
    generator = np.random.default_rng(14)
    of_source = [next(i for i, source in enumerate(SOURCES) if task in source) for task in TASKS]
    found, excluded = [], []
    for _ in range(800):
        effect = generator.normal(0, 2, 16)[of_source] + generator.normal(0, 0.5, 19)
        a = 70 + effect[:, None] + generator.normal(0, 0.5, (19, 3))
        result = paired(seeded(a), seeded(70 + generator.normal(0, 0.5, (19, 3))), SOURCES)
        found.append(result.p < 0.05)
        excluded.append(not covers(result.new_tasks, 0.0))
    assert 0.03 < np.mean(found) < 0.07
    assert 0.03 < np.mean(excluded) < 0.075
    assert np.mean(np.equal(found, excluded)) > 0.95  # the interval and the p tell one story


# ---- Pairs -----------------------------------------------------------------------------------------------------------


def test_paired_against_scipy() -> None:
    generator = np.random.default_rng(3)
    a, b = generator.normal(80, 3, (19, 4)), generator.normal(79, 3, (19, 4))
    result = paired(seeded(a), seeded(b), SOURCES)
    for i, task in enumerate(TASKS):
        expected = scipy_stats.ttest_rel(a[i], b[i]).confidence_interval(0.95)
        assert result.tasks[task].n == 4
        assert ends(result.tasks[task]) == pytest.approx([expected.low, expected.high])
    apart = dict(zip(TASKS, (a - b).tolist(), strict=True))
    for one, other in ((result.these_tasks, mean_of(apart)), (result.new_tasks, mean_over_new_tasks(apart, SOURCES))):
        assert (one.value, *ends(one)) == pytest.approx((other.value, *ends(other)))
    by_source = [np.sum([np.mean(apart[task]) for task in source]) for source in SOURCES]
    assert sum(by_source) / 19 == pytest.approx(result.new_tasks.value)  # one weighting: p tests the mean that is shown
    assert result.n_sources == 16
    test = scipy_stats.permutation_test(
        (by_source,), np.sum, permutation_type="samples", n_resamples=2**17, vectorized=False
    )
    assert result.p == pytest.approx(test.pvalue)


def test_only_shared_seeds_count() -> None:
    a, b = {"x": {0: 5.0, 1: 7.0, 9: 100.0}}, {"x": {1: 6.0, 0: 1.0, 3: -50.0}}
    result = paired(a, b, [["x"]])
    assert result.tasks["x"].n == 2
    assert result.these_tasks.value == 2.5
    assert ends(result.these_tasks) == pytest.approx(scipy_stats.t.interval(0.95, 1, 2.5, 1.5))
    assert result.new_tasks.low is None
    assert (result.p, result.n_sources) == (1.0, 1)


def test_one_pair_a_task_leaves_the_interval_for_new_tasks() -> None:
    generator = np.random.default_rng(4)
    result = paired(seeded(generator.normal(1, 1, (19, 1))), seeded(generator.normal(0, 1, (19, 1))), SOURCES)
    assert result.these_tasks.low is None
    assert all(difference.low is None for difference in result.tasks.values())
    assert result.new_tasks.low is not None


def test_what_is_equal_in_decimals_is_equal() -> None:
    a = {f"t{i}": {0: 90.1 + i, 1: 70.3} for i in range(7)}
    b = {f"t{i}": {0: 90.0 + i, 1: 70.2} for i in range(7)}
    result = paired(a, b, [[task] for task in a])
    assert result.these_tasks.se is result.new_tasks.se is None  # nothing varies, so nothing is known of it
    assert result.p == 2**-6
    mixed = paired({"x": {0: 90.1, 1: 80.0}}, {"x": {0: 90.0, 1: 80.1}}, [["x"]])
    assert mixed.these_tasks.value == 0


@settings(max_examples=60, deadline=None)
@given(runs(), runs(), st.randoms(use_true_random=False))
def test_paired_is_antisymmetric_and_blind_to_order(one: Runs, other: Runs, random: Any) -> None:
    tasks = sorted(one.keys() & other.keys())
    a, b = {task: one[task] for task in tasks}, {task: other[task] for task in tasks}
    ab, ba = paired(a, b, SOURCES), paired(b, a, SOURCES)
    for x, y in (
        (ab.these_tasks, ba.these_tasks),
        (ab.new_tasks, ba.new_tasks),
        *((ab.tasks[task], ba.tasks[task]) for task in tasks),
    ):
        assert x.value == -y.value
        assert (x.se, x.df, x.n) == (y.se, y.df, y.n)
        if x.low is not None and x.high is not None:
            assert (x.low, x.high) == (-(y.high or 0.0), -(y.low or 0.0))
    assert 0 < ab.p == ba.p <= 1
    items = list(a.items())
    random.shuffle(items)
    assert paired({t: dict(reversed(list(s.items()))) for t, s in items}, b, list(reversed(SOURCES))) == ab


def test_a_method_against_itself() -> None:
    a = seeded(np.random.default_rng(6).normal(70, 3, (19, 3)))
    result = paired(a, a, SOURCES)
    assert result.p == 1
    assert (result.these_tasks.value, result.new_tasks.value) == (0, 0)
    assert result.these_tasks.low is result.new_tasks.low is None
    assert rank_cliques({r: dict.fromkeys(TASKS, 1.0) for r in "ab"}, SOURCES).cliques == (("a", "b"),)


# ---- Differences of differences --------------------------------------------------------------------------------------

DEMO = [f"d{i}" for i in range(8)]
DEMO_SOURCES = [DEMO[:3], *([task] for task in DEMO[3:])]


def demo_runs(values: Any) -> Runs:
    """Return values of shape (tasks, seeds) as runs of the demo suite's shape."""
    return {task: {s: float(x) for s, x in enumerate(line)} for task, line in zip(DEMO, values, strict=True)}


def test_a_difference_of_differences_by_brute_force() -> None:
    generator = np.random.default_rng(21)
    a, b, c, d = generator.normal(70, 10, (4, 8, 5))
    found = difference_of_differences(*map(demo_runs, (a, b, c, d)), DEMO_SOURCES)
    by_seed = (a - b) - (c - d)
    assert found.new_tasks.value == found.these_tasks.value == pytest.approx(by_seed.mean())
    for task, values in zip(DEMO, by_seed, strict=True):
        interval = scipy_stats.t.interval(0.95, 4, values.mean(), scipy_stats.sem(values))
        assert (found.tasks[task].value, *ends(found.tasks[task])) == pytest.approx((values.mean(), *interval))
    variances = by_seed.var(1, ddof=1) / 5 / 64
    assert found.these_tasks.se == pytest.approx(math.sqrt(variances.sum()))
    assert found.these_tasks.df == pytest.approx(variances.sum() ** 2 / (variances**2 / 4).sum())
    assert found.n_sources == 6
    sums = [by_seed[:3].mean(1).sum(), *by_seed[3:].mean(1)]
    patterns = [abs(np.dot(signs, sums)) for signs in itertools.product((1, -1), repeat=6)]
    assert found.p == np.mean([x >= abs(sum(sums)) - 1e-9 for x in patterns])


def test_a_difference_of_differences_is_the_interaction_of_a_clustered_regression() -> None:
    """CR2 and Satterthwaite written out as matrices, for the 32 means of 8 tasks, 2 methods and 2 backbones."""
    generator = np.random.default_rng(22)
    means = generator.normal(70, 10, (8, 4))
    found = difference_of_differences(*(demo_runs(means[:, [k]]) for k in range(4)), DEMO_SOURCES).new_tasks
    method, backbone = np.array([1, -1, 1, -1]) / 2, np.array([1, 1, -1, -1]) / 2
    columns = [np.tile(x, 8) for x in (method * backbone, method, backbone)]
    design = np.column_stack([*columns, np.kron(np.eye(8), np.ones((4, 1)))])
    y = means.ravel()
    bread = np.linalg.inv(design.T @ design)
    beta = bread @ design.T @ y
    rest = np.eye(32) - design @ bread @ design.T
    of_task = np.repeat(np.arange(8), 4)
    directions, meat = [], 0.0
    for source in DEMO_SOURCES:
        m = np.isin(of_task, [DEMO.index(task) for task in source])
        values, vectors = np.linalg.eigh(rest[np.ix_(m, m)])
        adjustment = vectors @ np.diag([x**-0.5 if x > 1e-9 else 0.0 for x in values]) @ vectors.T
        row = np.zeros(32)
        row[m] = bread[0] @ design[m].T @ adjustment
        meat += float(row @ (y - design @ beta)) ** 2
        directions.append(row @ rest)
    gram = np.array(directions) @ np.array(directions).T
    assert found.value == pytest.approx(beta[0])
    assert found.se == pytest.approx(math.sqrt(meat))
    assert found.df == pytest.approx(np.trace(gram) ** 2 / (gram**2).sum())


@pytest.mark.parametrize("within_source", [0.0, 0.5, 1.0])
def test_a_difference_of_differences_covers_and_its_p_is_as_rare_as_stated(within_source: float) -> None:
    """Five seeds that shift all four runs alike, tasks on which methods and backbones differ: 1000 simulated suites."""
    generator = np.random.default_rng(23)
    of_source = np.array([0, 0, 0, 1, 2, 3, 4, 5])
    hits, rejected = [], []
    for _ in range(1000):
        twins = generator.normal(0, math.sqrt(within_source), (4, 6))[:, of_source]
        effects = 3 * (twins + generator.normal(0, math.sqrt(1 - within_source), (4, 8)))
        shared = generator.normal(0, 2, (8, 5))  # by task and seed
        values = 70 + effects[:, :, None] + shared + generator.normal(0, 0.5, (4, 8, 5))
        values[0] += 2.0
        found = difference_of_differences(*map(demo_runs, values), DEMO_SOURCES).new_tasks
        hits.append(covers(found, 2.0))
        p = p_of_zero(Estimate(found.value - 2.0, None, None, found.se, found.df, found.n, found.level))
        assert p is not None
        rejected.append(p < 0.05)
    assert hits == [not one for one in rejected]
    assert 0.93 < np.mean(hits) < 0.97


def test_the_seeds_interval_of_a_difference_of_differences_covers_and_pairing_pays() -> None:
    generator = np.random.default_rng(24)
    truth = generator.normal(0, 5, (4, 8))
    hits, paired_se, separate_se = [], [], []
    for _ in range(1000):
        shared = generator.normal(0, 2, (8, 5))
        values = 70 + truth[:, :, None] + shared + generator.normal(0, 0.7, (4, 8, 5))
        found = difference_of_differences(*map(demo_runs, values), DEMO_SOURCES).these_tasks
        hits.append(covers(found, float((truth[0] - truth[1] - truth[2] + truth[3]).mean())))
        assert found.se is not None
        paired_se.append(found.se)
        separate_se.append(math.sqrt(sum(run.var(1, ddof=1).sum() / 5 / 64 for run in values)))
    assert 0.93 < np.mean(hits) < 0.97
    assert np.mean(paired_se) < 0.5 * np.mean(separate_se)


@settings(max_examples=60, deadline=None)
@given(runs(), runs(), runs(), runs())
def test_a_difference_of_differences_turns_with_its_sides(one: Runs, two: Runs, three: Runs, four: Runs) -> None:
    tasks = [task for task in one if task in two and task in three and task in four]
    sides = [{task: side[task] for task in tasks} for side in (one, two, three, four)]
    if not tasks:
        return
    a, b, c, d = sides
    plain = difference_of_differences(a, b, c, d, SOURCES)
    turned = difference_of_differences(c, d, a, b, SOURCES)
    assert turned.new_tasks.value == -plain.new_tasks.value
    assert (turned.p, turned.new_tasks.se, turned.these_tasks.se) == (
        plain.p,
        plain.new_tasks.se,
        plain.these_tasks.se,
    )
    swapped = difference_of_differences(a, c, b, d, SOURCES)  # (a - c) - (b - d)
    assert swapped.new_tasks.value == pytest.approx(plain.new_tasks.value, abs=1e-9)
    assert difference_of_differences(a, b, a, b, SOURCES).new_tasks.value == 0
    zero = {task: dict.fromkeys({**seeds, **b[task]}, 50.0) for task, seeds in a.items()}
    alone = difference_of_differences(a, b, zero, zero, SOURCES)
    assert alone.these_tasks.value == pytest.approx(paired(a, b, SOURCES).these_tasks.value, abs=1e-9)


def test_only_seeds_that_all_four_share_count() -> None:
    a = {"t": {0: 10.0, 1: 20.0, 2: 90.0}}
    b = {"t": {0: 5.0, 1: 5.0, 3: 1.0}}
    c = {"t": {0: 1.0, 1: 1.0, 2: 1.0}}
    d = {"t": {0: 0.0, 1: 0.0, 4: 9.0}}
    found = difference_of_differences(a, b, c, d, [["t"]])
    assert (found.tasks["t"].value, found.tasks["t"].n) == (9.0, 2)


def test_p_of_zero_is_that_of_the_t_interval() -> None:
    values = np.random.default_rng(25).normal(1, 2, 9)
    estimate = mean_over_new_tasks({f"t{i}": [x] for i, x in enumerate(values)}, [[f"t{i}"] for i in range(9)])
    assert p_of_zero(estimate) == pytest.approx(scipy_stats.ttest_1samp(values, 0).pvalue)
    assert p_of_zero(mean_over_new_tasks({"t": [1.0]}, [["t"]])) is None
    assert p_of_zero(Estimate(0.0, -1.0, 1.0, 0.5, 4.0, 5, 0.95)) == 1.0


# ---- p ---------------------------------------------------------------------------------------------------------------


def enumerated(differences: Sequence[float]) -> float:
    observed = abs(sum(differences))
    sums = [
        abs(sum(s * d for s, d in zip(signs, differences, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(differences))
    ]
    return sum(x >= observed - 1e-9 for x in sums) / len(sums)


@settings(max_examples=80, deadline=None)
@given(st.lists(percents.map(lambda x: x - 40), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_sign_flip_against_enumeration(differences: list[float], random: Any) -> None:
    p = sign_flip(differences)
    assert p == enumerated(differences)
    assert sign_flip(random.sample(differences, len(differences))) == p
    assert sign_flip([-3.7 * d for d in differences]) == p
    assert 0 < p <= 1


def test_the_smallest_p_there_can_be() -> None:
    assert [sign_flip([1.0] * n) for n in (1, 3, 5, 6)] == [1, 0.25, 0.0625, 0.03125]
    assert sign_flip([0.0, 0.0]) == signed_rank([0.0]) == 1
    assert sign_flip([0.0, 1.0, 2.0, 0.0, 3.0]) == 0.25  # zeros have no sign to flip


def test_the_smallest_p_after_holm() -> None:
    assert smallest_p(6) == sign_flip([1.0] * 6)
    assert smallest_p(6, 8) == holm({str(i): sign_flip([1.0 + i] * 6) for i in range(8)})["0"] == 0.25
    assert smallest_p(1) == smallest_p(3, 40) == 1


def test_sign_flip_of_many() -> None:
    differences = np.random.default_rng(7).normal(0.35, 1, 40)
    exact = sign_flip(differences.tolist())
    sampled = sign_flip([*differences, 1e-13])  # 41: Monte Carlo
    assert sampled == pytest.approx(exact, abs=4 * math.sqrt(exact / 99_999))
    assert sampled == sign_flip([*differences[::-1], 1e-13])
    assert sign_flip([1.0] * 50) == 1 / 100_000
    assert sign_flip([1.0] * 40) == 2.0**-39


@pytest.mark.parametrize("n", [4, 10, 25])
def test_signed_rank_against_scipy(n: int) -> None:
    differences = np.random.default_rng(n).normal(0.3, 1, n)
    assert signed_rank(differences.tolist()) == pytest.approx(
        scipy_stats.wilcoxon(differences, method="exact").pvalue, rel=1e-12
    )


def test_signed_rank_with_ties_and_zeros() -> None:
    differences = [0.1, 90.1 - 90.0, -0.1, 3.0, 0.0, 0.2]  # the sizes of three are equal on paper
    assert signed_rank(differences) == enumerated([2, 2, -2, 5, 4])


def test_holm_by_hand() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005}) == pytest.approx(
        {"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02}
    )
    assert holm({"a": 0.6, "b": 0.7}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=8))
def test_holm_is_monotone_and_never_below(pvalues: dict[str, float]) -> None:
    adjusted = holm(pvalues)
    assert list(adjusted) == list(pvalues)
    assert all(p <= adjusted[name] <= 1 for name, p in pvalues.items())
    assert all(adjusted[x] <= adjusted[y] for x in pvalues for y in pvalues if pvalues[x] <= pvalues[y])
    assert adjusted == holm(dict(reversed(list(pvalues.items()))))
    if pvalues:  # Bonferroni is never stricter for the smallest, never laxer for any
        assert all(adjusted[name] <= min(1, len(pvalues) * p) for name, p in pvalues.items())


def test_a_cell_needs_six_pairs() -> None:
    a, b = {s: 81.0 + s for s in range(6)}, {s: 80.0 + s / 2 for s in range(6)}
    assert cell_verdict(a, b) == "better"
    assert cell_verdict(b, a) == "worse"
    assert cell_verdict({s: a[s] for s in range(FEWEST_PAIRS - 1)}, b) == "too few"
    assert cell_verdict(a, {**b, 5: 99.0}) == "tie"
    assert cell_verdict(a, a) == "tie"
    assert cell_verdict(a, b, level=0.99) == "too few"  # six pairs cannot fall below .03
    assert cell_verdict({}, {}) == "too few"


def test_mcnemar_and_the_difference_over_images() -> None:
    generator = np.random.default_rng(8)
    a, b = generator.random(500) < 0.8, generator.random(500) < 0.74
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    result = mcnemar(a, b)
    assert (result.b, result.c) == (only_a, only_b)
    tail = sum(math.comb(only_a + only_b, k) for k in range(min(only_a, only_b) + 1)) / 2 ** (only_a + only_b)
    assert result.p == pytest.approx(min(1, 2 * tail))
    assert mcnemar(a, a).p == 1
    estimate = difference_over_images([(a, b)], level=0.9)
    first, second = (only_a + 1) / 502, (only_b + 1) / 502  # Bonett & Price 2012, equation 6
    half = scipy_stats.norm.ppf(0.95) * math.sqrt((first + second - (first - second) ** 2) / 502)
    assert estimate.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert ends(estimate) == pytest.approx((100 * (first - second - half), 100 * (first - second + half)))
    assert (estimate.n, estimate.df, estimate.level) == (500, None, 0.9)
    # On many images it is the resampling of images
    sampled = 100 * (a.astype(float) - b)[generator.integers(0, 500, (10_000, 500))].mean(1)
    assert ends(estimate) == pytest.approx(np.quantile(sampled, [0.05, 0.95]), abs=0.35)


def test_several_pairs_share_their_images() -> None:
    generator = np.random.default_rng(4)
    pairs = [(generator.random(300) < 0.8, generator.random(300) < 0.7) for _ in range(4)]
    each = 100 * np.mean([a.astype(float) - b for a, b in pairs], axis=0)
    sampled = each[generator.integers(0, 300, (10_000, 300))].mean(axis=1)
    found = difference_over_images(pairs, 0.9)
    assert found.value == pytest.approx(each.mean())
    assert ends(found) == pytest.approx(np.quantile(sampled, (0.05, 0.95)), abs=0.6)
    # Four times the same pair knows no more than once
    one = difference_over_images(pairs[:1], 0.9)
    assert ends(difference_over_images(pairs[:1] * 4, 0.9)) == pytest.approx(ends(one))


def test_equal_runs_still_have_noise() -> None:
    a = np.arange(50) < 30
    low, high = ends(difference_over_images([(a, a)]))
    assert low == -high
    assert 1 < high < 6


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.randoms(use_true_random=False))
def test_intervals_over_images_are_possible_values_and_turn_with_the_sides(n: int, random: Any) -> None:
    a, b = (np.array([random.random() < 0.7 for _ in range(n)]) for _ in range(2))
    ab, ba = difference_over_images([(a, b)]), difference_over_images([(b, a)])
    low, high = ends(ab)
    assert -100 <= low < high <= 100
    assert ends(ba) == pytest.approx((-high, -low))
    low, high = ends(accuracy_over_images(100 * a.mean(), n))
    assert 0 <= low <= 100 * a.mean() <= high <= 100
    assert low < high


@pytest.mark.parametrize(("n", "share"), [(20, 0.9), (50, 0.5), (50, 0.9), (300, 0.8)])
def test_intervals_over_images_cover(n: int, share: float) -> None:
    generator = np.random.default_rng(28)
    right = generator.binomial(n, share, 2000)
    found = {k: ends(accuracy_over_images(100 * k / n, n)) for k in set(right.tolist())}
    assert 0.93 < np.mean([found[k][0] <= 100 * share <= found[k][1] for k in right.tolist()]) < 0.985
    wins, losses = 0.15, 0.05
    hits = []
    for b, c, _ in generator.multinomial(n, [wins, losses, 1 - wins - losses], 800):
        one, other = (np.arange(n) < b, (np.arange(n) >= b) & (np.arange(n) < b + c))
        low, high = ends(difference_over_images([(one, other)]))
        hits.append(low <= 100 * (wins - losses) <= high)
    assert np.mean(hits) > 0.93


def test_the_interval_over_images_of_a_mean() -> None:
    """One task: its own interval. Independent tasks: as variances add. Shared images: no smaller than one task's."""
    task = accuracy_over_images(80.0, 400)
    assert ends(over_images({"x": task}, [["x"]])) == pytest.approx(ends(task))
    two = {"x": task, "y": accuracy_over_images(80.0, 400)}
    apart, shared = over_images(two, [["x"], ["y"]]), over_images(two, [["x", "y"]])
    assert ends(shared) == pytest.approx(ends(task))
    low, high = ends(task)
    assert ends(apart) == pytest.approx((80 - (80 - low) / 2**0.5, 80 + (high - 80) / 2**0.5))
    assert apart.n == 800
    perfect = over_images({t: accuracy_over_images(100.0, 10) for t in TASKS}, SOURCES)
    assert ends(perfect)[1] == 100
    weighted = over_images(two, [["x"], ["y"]], weights={"x": 1.0, "y": 1e-12})
    assert ends(weighted) == pytest.approx(ends(task))


def test_what_is_impossible_is_cut_and_what_says_nothing_is_left_out() -> None:
    def interval(low: float | None, high: float | None) -> Estimate:
        return Estimate(71.6, low, high, 1.0, 2.0, 3, 0.95)

    assert within(interval(-93.68, 236.83), 0, 100) == Estimate(71.6, None, None, None, None, 3, 0.95)
    assert within(interval(60.0, 103.0), 0, 100) == interval(60.0, 100)
    assert within(interval(-1.0, 80.0), 0, 100) == interval(0, 80.0)
    assert within(interval(60.0, 80.0), 0, 100) == interval(60.0, 80.0)
    assert within(interval(None, None), 0, 100) == interval(None, None)


# ---- Marks and ranks -------------------------------------------------------------------------------------------------


def test_a_clear_best_and_second() -> None:
    rows = {row: {seed: base + seed % 3 / 10 for seed in range(7)} for row, base in (("c", 70), ("a", 90), ("b", 80))}
    assert best_and_second(rows) == Marks("a", (), "b")
    # Of two rows the other is not "better than every other": there is no other
    assert best_and_second({row: rows[row] for row in "ab"}) == Marks("a", (), None)
    # Six pairs give p = 1/32 at best: enough for one comparison, not for two
    six = {row: {seed: x for seed, x in seeds.items() if seed < 6} for row, seeds in rows.items()}
    assert best_and_second(six).best is None
    assert best_and_second({row: six[row] for row in "ab"}).best == "a"
    five = {row: {seed: x for seed, x in seeds.items() if seed < 5} for row, seeds in rows.items()}
    assert best_and_second({row: five[row] for row in "ab"}).best is None


def test_marks_of_a_column_and_of_a_pair_are_one_test() -> None:
    generator = np.random.default_rng(17)
    kinds = set()
    for number in range(200):
        seeds = 3 + number % 7
        a, b = (dict(enumerate(generator.normal(80 + lift, 1, seeds).tolist())) for lift in (1, 0))
        marks, verdict = best_and_second({"a": a, "b": b}), cell_verdict(a, b)
        assert (marks.best == "a", marks.best == "b") == (verdict == "better", verdict == "worse")
        kinds.add(verdict)
    assert kinds >= {"better", "tie", "too few"}


def test_rows_that_cannot_be_told_apart_share_the_top() -> None:
    rows = {
        "a": {seed: 90.0 + seed % 2 for seed in range(8)},
        "b": {seed: 90.4 - seed % 3 / 10 for seed in range(8)},
        "c": dict.fromkeys(range(8), 20.0),
    }
    assert best_and_second(rows) == Marks(None, ("a", "b"), None)
    twins = {"b": {0: 1.0, 1: 2.0}, "a": {0: 1.0, 1: 2.0}}
    assert best_and_second(twins) == Marks(None, ("a", "b"), None)


def test_a_second_that_has_equals_is_not_marked() -> None:
    rows = {
        "a": {seed: 90.0 + seed / 10 for seed in range(9)},
        "b": {seed: 60.0 + 3 * (seed % 2) for seed in range(9)},
        "c": {seed: 61.0 + seed % 3 for seed in range(9)},
    }
    assert best_and_second(rows) == Marks("a", (), None)


def test_marks_of_rows_with_one_seed_of_constant_rows_and_of_one_row() -> None:
    assert best_and_second({"a": {0: 90.0, 1: 90.1, 2: 90.2}, "b": {0: 10.0}}) == Marks(None, ("a", "b"), None)
    # Two or three equal seeds are not seeds without noise
    assert best_and_second({"a": {0: 72.0, 1: 72.0}, "b": {0: 71.9, 1: 71.9}}) == Marks(None, ("a", "b"), None)
    assert best_and_second({"a": {0: 1.0, 1: 2.0}}) == best_and_second({}) == Marks(None, (), None)
    # Both seeds differ by one point: two pairs do that by chance, and the pairs are not taken at their word.
    assert best_and_second({"a": {0: 90.0, 1: 85.0}, "b": {0: 89.0, 1: 84.0}}).best is None


def test_only_shared_seeds_tell_rows_apart() -> None:
    a = {seed: 60.0 + 10 * seed for seed in range(6)}
    b = {seed: x - 1 - seed % 3 / 10 for seed, x in a.items()}
    assert best_and_second({"a": a, "b": b}).best == "a"
    assert best_and_second({"a": a, "b": {seed + 10: x for seed, x in b.items()}}).best is None
    # Ahead by a seed that the other has not; behind on each that both have
    assert best_and_second({"a": {**b, 6: 300.0}, "b": a}).best is None


def test_a_best_row_is_rare_where_all_are_equal() -> None:
    generator = np.random.default_rng(15)
    for rows in (2, 6):
        marks = [
            best_and_second({str(i): dict(enumerate(generator.normal(80, 1, 9).tolist())) for i in range(rows)}).best
            for _ in range(600)
        ]
        assert sum(best is not None for best in marks) / 600 < 0.07


@given(st.dictionaries(st.sampled_from("abcd"), st.dictionaries(st.integers(0, 3), percents, min_size=1), min_size=1))
def test_marks_do_not_depend_on_order_and_say_one_thing(rows: dict[str, dict[int, float]]) -> None:
    marks = best_and_second(rows)
    assert marks == best_and_second(dict(reversed(list(rows.items()))))
    assert (marks.best is None) or not marks.tied
    assert marks.second is None or marks.best not in (None, marks.second)
    assert len(marks.tied) != 1


def test_rank_cliques() -> None:
    generator = np.random.default_rng(16)
    level = {"a": 80.0, "b": 79.9, "c": 70.0, "d": 60.0}
    scores = {
        row: {t: level[row] + x for t, x in zip(TASKS, generator.normal(0, 1, 19), strict=True)} for row in "dbca"
    }
    ranks = rank_cliques(scores, SOURCES)
    table = np.array([[scores[row][task] for task in TASKS] for row in "abcd"])
    expected = scipy_stats.rankdata(-table, axis=0).mean(1)
    assert ranks.mean_ranks == pytest.approx(dict(zip("abcd", expected, strict=True)))
    assert set(ranks.mean_ranks) == set("abcd")
    assert list(ranks.mean_ranks.values()) == sorted(ranks.mean_ranks.values())
    assert [set(clique) for clique in ranks.cliques] == [{"a", "b"}]
    assert len(ranks.p) == 6
    raw = signed_rank([float(np.mean([scores["c"][t] - scores["d"][t] for t in source])) for source in SOURCES])
    assert ranks.p["c", "d"] == pytest.approx(6 * raw)
    few = rank_cliques({row: {t: scores[row][t] for t in TASKS[:5]} for row in scores}, SOURCES)
    assert [set(clique) for clique in few.cliques] == [set("abcd")]  # five sources tell nobody apart


def test_cliques_overlap_and_hold_no_smaller_ones() -> None:
    generator = np.random.default_rng(17)
    base = generator.normal(70, 5, 19)
    scores = {
        row: {t: float(x + shift + e) for t, x, e in zip(TASKS, base, generator.normal(0, 1.2, 19), strict=True)}
        for row, shift in (("a", 1.9), ("b", 1.2), ("c", 0.4), ("d", -6.0))
    }
    ranks = rank_cliques(scores, ALONE)
    order = list(ranks.mean_ranks)
    for clique in ranks.cliques:
        place = order.index(clique[0])
        assert list(clique) == order[place : place + len(clique)]
        assert all(ranks.p[pair] >= 0.05 for pair in itertools.combinations(clique, 2))
        assert not any(set(clique) < set(other) for other in ranks.cliques)
    together = {pair for clique in ranks.cliques for pair in itertools.combinations(clique, 2)}
    assert {pair for pair in itertools.pairwise(order) if ranks.p[pair] >= 0.05} <= together
    assert len(ranks.cliques) == 2


# ---- Small ones ------------------------------------------------------------------------------------------------------


def test_one_standard_error() -> None:
    assert one_standard_error(75, 200) == pytest.approx(3.07, abs=0.01)
    assert one_standard_error(50, 10_000) == pytest.approx(0.5, abs=0.001)
    assert one_standard_error(0, 200) == pytest.approx(one_standard_error(100, 200))
    assert one_standard_error(0, 200) == pytest.approx(0.5, abs=0.01)
    assert all(
        one_standard_error(x, 200) == pytest.approx(100 * math.sqrt(x / 100 * (1 - x / 100) / 200), rel=0.02)
        for x in range(20, 81)
    )
