"""Tests between rows: sign flip, signed rank, McNemar, Holm, ranks and marks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from svp_bench.stats.estimates import (
    FEWEST_PAIRS,
    Marks,
    McNemar,
    Ranks,
    Verdict,
    difference_of,
    moments_of,
    scale_of,
    seed_differences,
    source_sums,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

K = TypeVar("K")

_EXACT = 40  # sign patterns of two halves of 20 are enumerated; beyond, they are sampled
_DRAWS = 99_999


def sign_flip(differences: Sequence[float]) -> float:
    """Return the two-sided p of the sign-flip test: each difference might as well have had the other sign.

    p is the share of the 2ⁿ sign patterns whose sum is as far from zero as the observed sum, or further. Up to 40
    differences that are not zero it is exact (zeros change nothing and are left out): the patterns of one half of the
    differences are looked up among those of the other. Beyond, 99,999 patterns are sampled, and
    p = (1 + hits) / (1 + draws), which is valid, not an approximation.

    The smallest p there can be is 2^(1 - n): .25 at 3, .0625 at 5, .031 at 6.

    Source: Fisher 1935, The Design of Experiments, section 21; the halves: Horowitz & Sahni 1974, J. ACM 21, 277-292;
    the + 1: Phipson & Smyth 2010, Stat. Appl. Genet. Mol. Biol. 9(1), 39.

    Args:
        differences: Shape (n,), n ≥ 1; independent of each other.
    """
    import numpy as np

    sizes = sorted(abs(x) for x in differences if x)
    # Sums that are equal on paper differ in the last digits.
    bar = abs(math.fsum(differences)) - 1e-9 * math.fsum(sizes)
    if bar <= 0:
        return 1.0
    if len(sizes) <= _EXACT:
        one, other = np.sort(_signed_sums(sizes[::2])), np.sort(_signed_sums(sizes[1::2]))
        above = other.size - np.searchsorted(other, bar - one, side="left")
        below = np.searchsorted(other, -bar - one, side="right")
        return math.ldexp(int(above.sum() + below.sum()), -len(sizes))
    generator = np.random.default_rng(0)
    hits, block = 0, 4096
    for start in range(0, _DRAWS, block):
        signs = generator.integers(0, 2, size=(min(block, _DRAWS - start), len(sizes)), dtype=np.int8)
        hits += int((np.abs((2.0 * signs - 1) @ np.array(sizes)) >= bar).sum())
    return (1 + hits) / (1 + _DRAWS)


def smallest_p(n_sources: int, tests: int = 1) -> float:
    """Return the smallest p that any outcome of a sign flip over `n_sources` differences can give: tests · 2^(1 - n).

    With `tests` above 1 it is the smallest p after Holm's adjustment over so many tests, at most 1. A test that cannot
    fall below 1 - level, for any measurement, is not informative and not printed.
    """
    return min(1.0, tests * 2.0 ** (1 - n_sources))


def signed_rank(differences: Sequence[float]) -> float:
    """Return the two-sided p of Wilcoxon's signed-rank test: `sign_flip` on the ranks of the sizes, with their signs.

    Zeros are left out, equal sizes share their mean rank. Exact given those ties, where SciPy's `wilcoxon` goes over to
    a normal approximation.

    Source: Wilcoxon 1945, Biometrics Bulletin 1(6), 80-83; ties: Pratt & Gibbons 1981, Concepts of Nonparametric
    Theory, chapter 3.
    """
    largest = max(abs(x) for x in differences)
    # Nine digits of the largest: sizes that are equal on paper get one rank.
    sizes = [round(abs(x) / largest, 9) if largest else 0.0 for x in differences]
    ranks = _mean_ranks([size for size in sizes if size])
    signs = [math.copysign(1, x) for x, size in zip(differences, sizes, strict=True) if size]
    return sign_flip([rank * sign for rank, sign in zip(ranks, signs, strict=True)]) if ranks else 1.0


def holm(pvalues: Mapping[K, float]) -> dict[K, float]:
    """Return the p adjusted for their number: p_(i) becomes max over j ≤ i of (m - j + 1) p_(j), at most 1.

    Rejecting what falls below α keeps the chance of any false rejection below α, for any dependence.

    Source: Holm 1979, Scand. J. Statist. 6, 65-70; adjusted p: Wright 1992, Biometrics 48, 1005-1013.

    Args:
        pvalues: Name → p. The result has the same order.
    """
    adjusted: dict[K, float] = {}
    highest = 0.0
    for i, name in enumerate(sorted(pvalues, key=lambda name: pvalues[name])):
        highest = max(highest, min(1.0, (len(pvalues) - i) * pvalues[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in pvalues}


def cell_verdict(a_by_seed: Mapping[int, float], b_by_seed: Mapping[int, float], level: float = 0.95) -> Verdict:
    """Say whether a is better than b on one task: a mark for a single cell of a table.

    "too few" below six shared seeds, or if 2^(1 - n) ≥ 1 - level: then no outcome could reach the level. Otherwise
    "better" or "worse" if `sign_flip` of the differences by seed is below 1 - level, else "tie". A table has many
    cells: without an adjustment (`holm` on the p) one in twenty null cells gets a mark at level 0.95. Seeds of one side
    alone are passed over.
    """
    differences = seed_differences(a_by_seed, b_by_seed, scale_of([*a_by_seed.values(), *b_by_seed.values()]))
    if len(differences) < FEWEST_PAIRS or 2.0 ** (1 - len(differences)) >= 1 - level:
        return "too few"
    if sign_flip(differences) >= 1 - level:
        return "tie"
    return "better" if math.fsum(differences) > 0 else "worse"


def mcnemar(bits_a: NDArray[np.bool_], bits_b: NDArray[np.bool_]) -> McNemar:
    """Compare two runs image by image: exact McNemar test.

    Of the b + c images that one run alone has right, b are a's: binomial with 1/2 if the runs are equally good. It is
    about these two runs and new test images; other seeds it does not see.

    Source: McNemar 1947, Psychometrika 12, 153-157; for classifiers: Dietterich 1998, Neural Computation 10, 1895-1923.

    Args:
        bits_a: Booleans, shape (images,): was image i classified correctly?
        bits_b: The same images in the same order.
    """
    from scipy import stats  # type: ignore[import-untyped]

    b, c = int((bits_a & ~bits_b).sum()), int((~bits_a & bits_b).sum())
    return McNemar(b, c, float(stats.binomtest(b, b + c, 0.5).pvalue) if b + c else 1.0)


def best_and_second(rows: Mapping[str, Mapping[int, float]], level: float = 0.95) -> Marks:
    """Say which rows of one column may be marked best and second.

    The row with the highest mean is compared with each other row by the test of `cell_verdict`, from six shared seeds
    on, and the p are adjusted (`holm`, over these comparisons): three rows need seven seeds, and twelve need nine. If
    all others are worse, the top row is `best`, and the same procedure among the others finds `second`. If not, nobody
    is best: `tied` is the top row with those not separated from it, and there is no second. Of two rows none is second:
    it was compared with nothing. Nor is a single row best.

    Source: comparisons with the best, Hsu 1996, Multiple Comparisons, chapter 4; here with the exact test by pairs and
    Holm's steps instead of a common variance.

    Args:
        rows: Row → seed → value, for one column: of one task.
        level: 1 - level is the significance level of the whole column.
    """
    scale = scale_of([x for seeds in rows.values() for x in seeds.values()])
    order = sorted(rows, key=lambda row: (-moments_of([*rows[row].values()])[0], row))

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

    "Not separated" is no proof of equality: with few sources everything is one clique.

    Source: Benavoli, Corani & Mangili 2016, JMLR 17(5), 1-10 (pairwise signed-rank tests instead of mean-rank tests);
    the diagram: Demšar 2006, JMLR 7, 1-30, section 3.2.

    Args:
        scores: Row → task → score (the mean over seeds); all rows have the same tasks.
        sources: As in `mean_over_new_tasks`.
        level: 1 - level is the significance level over all pairs.
    """
    rows = sorted(scores)
    tasks = sorted(scores[rows[0]])
    columns = [_mean_ranks([-scores[row][task] for row in rows]) for task in tasks]
    mean_ranks = {row: math.fsum(column[i] for column in columns) / len(tasks) for i, row in enumerate(rows)}
    order = sorted(rows, key=lambda row: (mean_ranks[row], row))
    scale = scale_of([x for by_task in scores.values() for x in by_task.values()])
    raw: dict[tuple[str, str], float] = {}
    for one, other in itertools.combinations(order, 2):
        apart = {task: difference_of(scores[one][task], scores[other][task], scale) for task in tasks}
        raw[one, other] = signed_rank(source_sums(apart, sources))
    p = holm(raw)
    cliques: list[tuple[str, ...]] = []
    end = 0
    for start in range(len(order)):
        stop = start + 1
        while stop < len(order) and all(p[row, order[stop]] >= 1 - level for row in order[start:stop]):
            stop += 1
        if stop > max(end, start + 1):
            cliques.append(tuple(order[start:stop]))
            end = stop
    n_sources = len(source_sums(dict.fromkeys(tasks, 1.0), sources))
    least = smallest_p(n_sources, max(len(p), 1))
    return Ranks({row: mean_ranks[row] for row in order}, tuple(cliques), p, n_sources, least)


def _signed_sums(sizes: Sequence[float]) -> NDArray[np.float64]:
    """The sums of `sizes` under all patterns of signs, shape (2^n,)."""
    import numpy as np

    sums = np.zeros(1)
    for size in sizes:
        sums = np.concatenate([sums - size, sums + size])
    return sums


def _mean_ranks(values: Sequence[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal values share their mean rank."""
    import numpy as np

    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: list[float] = (np.cumsum(counts) - (counts - 1) / 2)[place].tolist()
    return ranks


def _p_of_two(a: Mapping[int, float], b: Mapping[int, float], scale: float) -> float:
    """Two-sided p that the row a is no better than b; 1 below six shared seeds, and where b is ahead over these."""
    differences = seed_differences(a, b, scale)
    if len(differences) < FEWEST_PAIRS or math.fsum(differences) <= 0:
        return 1.0
    return sign_flip(differences)
