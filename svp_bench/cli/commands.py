"""The light subcommands: each is a small argparse program in a module of this package, imported when it is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

__all__ = ["HEAVY", "SUBCOMMANDS", "Subcommand"]

HEAVY = {
    "fit": "adapt a backbone to a task; in stage final, test once and write the record",
    "validate": "score a checkpoint on val (stage select)",
    "test": "score the final weights of a run made with --no_test",
}


@dataclass(frozen=True)
class Subcommand:
    """A light subcommand.

    Attributes:
        summary: One line for the help.
        target: "module:function" of its program.
    """

    summary: str
    target: str

    def run(self, arguments: Sequence[str]) -> int:
        """Run it with the arguments after the subcommand; return the exit status."""
        module, _, name = self.target.partition(":")
        program: Callable[[Sequence[str]], int] = getattr(import_module(module), name)
        return program(arguments)


SUBCOMMANDS: dict[str, Subcommand] = {
    "demo": Subcommand(
        "adapt embedded weights to three tasks with four methods, offline; a leaderboard in minutes",
        "svp_bench.cli.predict:demo",
    ),
    "sweep": Subcommand(
        "run methods × tasks × seeds, searching on val first if asked to; goes on where it was cut off",
        "svp_bench.cli.sweep:sweep",
    ),
    "tune": Subcommand("search the settings of one method on one task, on val", "svp_bench.cli.sweep:tune"),
    "predict": Subcommand("name the classes of images of your own with a trained run", "svp_bench.cli.predict:predict"),
    "table": Subcommand("build the comparison tables from the records", "svp_bench.cli.table:table"),
    "report": Subcommand("build the HTML report from the records", "svp_bench.cli.report:report"),
    "audit": Subcommand("say what records prove: lists, budget, search, seeds, code", "svp_bench.cli.reproduce:audit"),
    "rerun": Subcommand("repeat a run from its record, and compare the numbers", "svp_bench.cli.reproduce:rerun"),
    "replicate": Subcommand(
        "measure what picking the best epoch on the test list gains; no result", "svp_bench.cli.reproduce:replicate"
    ),
    "power": Subcommand(
        "say how many seeds a claim needs, from the spread of the records", "svp_bench.cli.table:power"
    ),
    "tasks": Subcommand("list the tasks, or show one task's card", "svp_bench.cli.listing:tasks"),
    "methods": Subcommand("list the methods, or show one method's recipe", "svp_bench.cli.listing:methods"),
    "data": Subcommand("check the images on disk, or draw a small stand-in", "svp_bench.cli.data:data"),
    "doctor": Subcommand(
        "say which scan backends run here, or why not; test them; compile their kernels",
        "svp_bench.cli.doctor:doctor",
    ),
}
