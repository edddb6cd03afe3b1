"""The verb that builds tables from records."""

from __future__ import annotations

from collections.abc import Sequence

from svp_bench.verbs.base import parser

__all__ = ["table"]


def table(argv: Sequence[str]) -> int:
    """Build the comparison tables."""
    from svp_bench.results.tables import run_table

    options = parser("table")
    options.add_argument("--suite", action="append", help="a suite; may be repeated; by default all that have records")
    options.add_argument("--results_root", default="results", help="the folder that holds records/ and tables/")
    options.add_argument("--published", action="store_true", help="show published numbers beside ours, marked")
    arguments = options.parse_args(argv)
    print(run_table(arguments.results_root, arguments.suite, arguments.published), end="")
    return 0
