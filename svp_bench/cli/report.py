"""The subcommand that builds the HTML report from records."""

from __future__ import annotations

from collections.abc import Sequence

from svp_bench.cli.parser import parser

__all__ = ["report"]


def report(argv: Sequence[str]) -> int:
    """Build the HTML report."""
    from svp_bench.report.page import run_report

    options = parser("report")
    options.add_argument("--suite", action="append", help="a suite; may be repeated; by default all that have records")
    options.add_argument(
        "--results_root", default="results", help="the folder that holds records/; the page goes below it"
    )
    options.add_argument("--runs_root", default="runs", help="the folder of the runs, for learning curves")
    options.add_argument(
        "--output", metavar="PATH", help="the page; by default report/index.html in the results folder"
    )
    options.add_argument("--control", help="the method or row that all others are compared with; linear by default")
    options.add_argument(
        "--published",
        action="store_true",
        help="show published numbers from the start; else behind a switch in the page",
    )
    arguments = options.parse_args(argv)
    text = run_report(
        arguments.results_root,
        arguments.suite,
        published=arguments.published,
        output=arguments.output,
        runs_root=arguments.runs_root,
        control=arguments.control,
    )
    print(text, end="")
    return 0
