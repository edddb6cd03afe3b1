"""What the light verbs share: a parser whose errors are ours, and tables of text."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import NoReturn

from svp_bench.errors import UsageError, printable

__all__ = ["Parser", "parser", "print_table"]


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of leaving the process."""

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments."""
        raise UsageError(f"{message} (`{self.prog} --help`)")


def parser(verb: str) -> Parser:
    """Return the parser of a verb, with its summary as the description."""
    from svp_bench.verbs import VERBS

    options = Parser(prog=f"svp-bench {verb}", description=VERBS[verb].summary, allow_abbrev=False)
    options.add_argument(  # for the help alone: `svp_bench.cli` takes it out of every command line
        "--tasks_dir", metavar="DIR", help="a folder of further task cards; also $SVP_BENCH_TASKS"
    )
    return options


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in aligned columns; control characters as escapes."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
