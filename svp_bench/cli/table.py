"""Subcommands that read records: `table` and `power`."""

from __future__ import annotations

import argparse
import math
from typing import Annotated

from svp_bench.core.errors import UsageError


def table(
    *,
    suite: list[str] | None = None,
    results_root: str = "results",
    published: bool = False,
    control: Annotated[str | None, "ROW"] = None,
    compare: Annotated[tuple[str, str] | None, ("ROW_A", "ROW_B")] = None,
    comparisons: Annotated[str | None, "FILE"] = None,
    all_columns: bool = False,
    costs: Annotated[str | None, "FILE"] = None,
) -> int:
    """Build the comparison tables from the records.

    Each suite gets four files below tables/: a wide CSV, a long CSV, a Markdown page, and LaTeX (booktabs). Rows of
    different protocols, backbones, weights or tracks (default or searched hyper-parameters) are in separate sections.
    ± after a mean is half its 95 % interval over new seeds; with one seed, over test images.

    Args:
        suite: A suite; may be repeated; by default all that have records.
        results_root: The folder that contains records/ and tables/.
        published: Show published numbers next to ours, marked.
        control: The method or row that all others are compared with; by default linear, where there is one.
        compare: Compare two methods or rows task by task, by their seeds and by their test images; writes no table.
        comparisons: A file of planned comparisons: also print these, with the p adjusted over exactly these.
        all_columns: Also print tasks and groups that have no result yet; the files always have them.
        costs: A file of svp-bench measure: latency, throughput, step time and memory of the rows on its machine.
    """
    from svp_bench.tables.build import run_compare, run_table

    if compare is None:
        text = run_table(results_root, suite, published, control, all_columns, comparisons, backbone_names, costs)
        print(text, end="")
        return 0
    if published or control is not None or all_columns or comparisons is not None or costs is not None:
        raise UsageError("--compare is used with --suite and --results_root only (`svp-bench table --help`)")
    print(run_compare(results_root, *compare, suite), end="")
    return 0


def backbone_names() -> list[str]:
    """Return the names of all backbones; imports torch."""
    from svp_bench.methods.build import list_backbones

    return list_backbones()


def _points(text: str) -> float:
    if not 0 < _number(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is not a difference in points: above 0, at most 100")
    return float(text)


def _share(text: str) -> float:
    if not 0 < _number(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1; 95 % is 0.95")
    return float(text)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def power(
    *,
    effect: Annotated[float, _points, "POINTS"],
    suite: list[str] | None = None,
    method: Annotated[str | None, "ROW"] = None,
    control: Annotated[str | None, "ROW"] = None,
    level: Annotated[float, _share] = 0.95,
    power: Annotated[float, _share] = 0.8,
    results_root: str = "results",
) -> int:
    """Compute how many seeds a claim needs, from the spread of the records.

    Two answers: with the estimated variances (plug-in), and with an upper bound of them (cautious). Reads records
    only; needs two seeds in some cells.

    Args:
        effect: Difference of the mean over the tasks, e.g. 1.0.
        suite: A suite; may be repeated; by default all that have records.
        method: The method or row whose variance counts; by default all rows.
        control: With --method: the variance of their differences, seed by seed, counts.
        level: Level of the interval that should exclude zero.
        power: Desired probability that it does.
        results_root: The folder that contains records/.
    """
    if power <= 1 - level:
        raise UsageError(f"--power {power:g} is no more than chance at --level {level:g}; ask for more")
    from svp_bench.tables.power import run_power

    print(run_power(results_root, effect, suite, method, control, level, power), end="")
    return 0
