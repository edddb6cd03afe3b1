"""The subcommands: each is a typed function in a module of this package, imported when it is needed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

RUN_COMMANDS = {
    "fit": "adapt a backbone to a task; in stage final, test once and write the record",
    "validate": "score a checkpoint on val (stage select)",
    "test": "score the final weights of a run made with --no_test",
}


@dataclass(frozen=True)
class Subcommand:
    """A subcommand that parses its arguments before it imports torch, if at all.

    Attributes:
        name: As typed.
        module: Module of this package with a function of the same name.
    """

    name: str
    module: str

    @property
    def function(self) -> Callable[..., int]:
        """The function to call."""
        found: Callable[..., int] = getattr(import_module(f"svp_bench.cli.{self.module}"), self.name)
        return found

    @property
    def summary(self) -> str:
        """One line for the help."""
        line = (inspect.getdoc(self.function) or "").splitlines()[0].rstrip(".")
        return line[:1].lower() + line[1:]

    def run(self, arguments: Sequence[str]) -> int:
        """Call the function with the arguments after the subcommand; return the exit status."""
        from svp_bench.cli.parser import call_function

        return call_function(self.function, self.name, arguments)


_MODULES = {
    "demo": "predict",
    "sweep": "sweep",
    "tune": "sweep",
    "predict": "predict",
    "table": "table",
    "report": "report",
    "audit": "reproduce",
    "rerun": "reproduce",
    "replicate": "reproduce",
    "power": "table",
    "migrate": "records",
    "pack": "records",
    "tasks": "listing",
    "methods": "listing",
    "data": "data",
    "doctor": "doctor",
    "measure": "measure",
}
SUBCOMMANDS = {name: Subcommand(name, module) for name, module in _MODULES.items()}
