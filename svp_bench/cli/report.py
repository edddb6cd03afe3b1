"""The subcommand that builds the HTML report from records."""

from __future__ import annotations

from typing import Annotated


def report(
    *,
    suite: list[str] | None = None,
    results_root: str = "results",
    runs_root: str = "runs",
    output: Annotated[str | None, "PATH"] = None,
    control: Annotated[str | None, "ROW"] = None,
    published: bool = False,
    comparisons: Annotated[str | None, "FILE"] = None,
    costs: Annotated[str | None, "FILE"] = None,
) -> int:
    """Build the HTML report from the records.

    Args:
        suite: A suite; may be repeated; by default all that have records.
        results_root: The folder that contains records/; the page is written below it.
        runs_root: The folder of the runs, for learning curves.
        output: The page; by default report/index.html in the results folder.
        control: The method or row that all others are compared with; linear by default.
        published: Show published numbers from the start; otherwise they are behind a switch in the page.
        comparisons: A file of planned comparisons: also show these, with the p adjusted over exactly these.
        costs: A file of svp-bench measure: latency, throughput, step time and memory of the rows on its machine.
    """
    from svp_bench.cli.table import backbone_names
    from svp_bench.report.page import write_report

    text = write_report(
        results_root,
        suite,
        published=published,
        output=output,
        runs_root=runs_root,
        control=control,
        comparisons=comparisons,
        backbones=backbone_names,
        costs=costs,
    )
    print(text, end="")
    return 0
