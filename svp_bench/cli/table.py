"""The subcommands that read records: tables, and plans for more of them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

from svp_bench.cli.parser import parser

__all__ = ["power", "table"]


def table(argv: Sequence[str]) -> int:
    """Build the comparison tables, or compare two rows."""
    from svp_bench.tables.build import run_compare, run_table

    options = parser("table")
    options.epilog = (
        "Each suite gets four files below tables/: a wide CSV, a long CSV, a Markdown page, and LaTeX (booktabs). Rows "
        "of different protocols, backbones, weights or tracks (default settings, searched ones) stand in sections of "
        "their own. ± behind a mean is half its 95 % interval over new seeds; of one seed, over test images."
    )
    options.add_argument("--suite", action="append", help="a suite; may be repeated; by default all that have records")
    options.add_argument("--results_root", default="results", help="the folder that holds records/ and tables/")
    options.add_argument("--published", action="store_true", help="show published numbers beside ours, marked")
    options.add_argument(
        "--control",
        metavar="ROW",
        help="the method or row that all others are compared with (default: linear, where there is one)",
    )
    options.add_argument(
        "--compare",
        nargs=2,
        metavar=("ROW_A", "ROW_B"),
        help="compare two methods or rows task by task, by their seeds and by their test images; writes no table",
    )
    options.add_argument(
        "--all_columns", action="store_true", help="print tasks and groups that have no result yet too; files have them"
    )
    arguments = options.parse_args(argv)
    if arguments.compare is not None:
        if arguments.published or arguments.control is not None or arguments.all_columns:
            options.error("--compare goes with --suite and --results_root only")
        first, second = arguments.compare
        print(run_compare(arguments.results_root, first, second, arguments.suite), end="")
        return 0
    text = run_table(
        arguments.results_root, arguments.suite, arguments.published, arguments.control, arguments.all_columns
    )
    print(text, end="")
    return 0


def power(argv: Sequence[str]) -> int:
    """Say how many seeds a claim needs, from the spread of the records at hand."""
    options = parser("power")
    options.epilog = (
        "Two answers: with the variances as they were estimated (plug-in), and with an upper bound of them (cautious). "
        "Reads records only; needs two seeds in some cells."
    )
    options.add_argument(
        "--effect", type=_points, required=True, metavar="POINTS", help="difference of the suite's mean, e.g. 1.0"
    )
    options.add_argument("--suite", action="append", help="a suite; may be repeated; by default all that have records")
    options.add_argument("--method", metavar="ROW", help="the method or row whose noise counts; by default all rows")
    options.add_argument(
        "--control", metavar="ROW", help="with --method: the noise is that of their differences, seed by seed"
    )
    options.add_argument("--level", type=_share, default=0.95, help="of the interval that is to exclude zero (0.95)")
    options.add_argument("--power", type=_share, default=0.8, help="wanted chance that it does (0.8)")
    options.add_argument("--results_root", default="results", help="the folder that holds records/")
    arguments = options.parse_args(argv)
    if arguments.power <= 1 - arguments.level:
        options.error(
            f"--power {arguments.power:g} is no more than chance at --level {arguments.level:g}; ask for more"
        )
    from svp_bench.tables.power import run_power

    text = run_power(
        arguments.results_root,
        arguments.effect,
        arguments.suite,
        arguments.method,
        arguments.control,
        arguments.level,
        arguments.power,
    )
    print(text, end="")
    return 0


def _points(text: str) -> float:
    value = _number(text)
    if not 0 < value <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no difference in points: above 0, at most 100")
    return value


def _share(text: str) -> float:
    value = _number(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie between 0 and 1; 95 % is 0.95")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
