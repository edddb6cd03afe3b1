"""What the light subcommands share: a parser whose errors are ours, and tables of text."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from svp_bench.core.errors import UsageError, nearest, printable, unknown_name

__all__ = ["Parser", "parser", "print_table"]

_OF_FIT = ("--config", "--method", "--choice", "--no_test", "--resume", "--seed_everything")


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of leaving the process.

    Attributes:
        forwards: Whether flags that it does not know are for `fit`.
    """

    forwards = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; name the nearest flag where one is unknown, also where a required one is missing."""
        own = [name for name in self._option_string_actions if name.startswith("--")]
        for given in () if self._subparsers is not None else sys.argv[1:] if args is None else args:
            flag = given.partition("=")[0]
            if given == "--":
                break
            if not flag.startswith("--") or flag in own:
                continue
            if not self.forwards or (flag not in _OF_FIT and "." not in flag and nearest(flag, own)):
                raise unknown_name("argument", flag, own, listing=f"{self.prog} --help")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise what is wrong with the arguments."""
        raise UsageError(f"{message} (`{self.prog} --help`)")


def parser(subcommand: str, forwards: bool = False) -> Parser:
    """Return the parser of a subcommand, described by its summary; with `forwards`, it leaves flags to `fit`."""
    from svp_bench.cli.commands import SUBCOMMANDS

    options = Parser(prog=f"svp-bench {subcommand}", description=SUBCOMMANDS[subcommand].summary, allow_abbrev=False)
    options.forwards = forwards
    options.add_argument(  # for the help alone: `svp_bench.cli.main` takes it out of every command line
        "--tasks_dir", metavar="DIR", help="a folder of further task cards; also $SVP_BENCH_TASKS"
    )
    return options


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows of text in aligned columns; control characters as escapes."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
