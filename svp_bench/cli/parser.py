"""Run a typed function as a subcommand: the signature gives the arguments, the docstring their help.

Positional-only parameters are positional arguments, keyword-only ones are flags, and `*rest` receives flags of `fit`.
`bool` is a switch, `Literal` lists the values, `list` is a flag that may be repeated, `tuple` has several values.
`Annotated` adds a converter of the text or a name: `--flag` or the metavar.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, NewType, NoReturn, get_args, get_origin, get_type_hints

from svp_bench.core.errors import UsageError, nearest, printable, unknown_name

CommandLine = NewType("CommandLine", tuple[str, ...])
"""Type of a parameter that receives the unparsed subcommand and arguments."""

_OF_FIT = ("--config", "--method", "--selected_config", "--no_test", "--resume", "--seed_everything")
_ARGUMENT = re.compile(r"^    \*?(\w+): (.+?)(?=^    \*?\w|\Z)", re.MULTILINE | re.DOTALL)


class Parser(argparse.ArgumentParser):
    """A parser that raises `UsageError` instead of leaving the process.

    Attributes:
        forwards: Whether unknown flags are passed to `fit`.
    """

    forwards = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a command line; report an unknown flag, with the nearest one, before a missing required flag."""
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
        """Raise a usage error that points to the help."""
        raise UsageError(f"{message} (`{self.prog} --help`)")


def call_function(function: Callable[..., int], subcommand: str, arguments: Sequence[str]) -> int:
    """Parse arguments for a function and call it.

    Args:
        function: Returns the exit status. A function of `*arguments` alone parses them itself.
        subcommand: Its name, for the help.
        arguments: The arguments after the subcommand.

    Raises:
        UsageError: If an argument is unknown, missing or of another type.
    """
    parameters = inspect.signature(function).parameters
    if [parameter.kind for parameter in parameters.values()] == [inspect.Parameter.VAR_POSITIONAL]:
        return function(*arguments)
    options = Parser(prog=f"svp-bench {subcommand}", allow_abbrev=False)
    options.add_argument(  # for the help only: `svp_bench.cli.main` takes it out of every command line
        "--tasks_dir", metavar="DIR", help="a folder of further task cards; also $SVP_BENCH_TASKS"
    )
    _add_arguments(options, function)
    given, rest = options.parse_known_args(arguments)
    if rest and not options.forwards:
        options.error(f"unrecognized arguments: {' '.join(rest)}")
    positional, keywords = [], {}
    for name, parameter in parameters.items():
        value = getattr(given, name, None)
        if isinstance(value, list) and "list[" not in parameter.annotation:
            value = tuple(value)
        if parameter.annotation == "CommandLine":
            value = CommandLine((subcommand, *arguments))
        if parameter.kind is parameter.POSITIONAL_ONLY:
            positional.append(value)
        elif parameter.kind is parameter.KEYWORD_ONLY:
            keywords[name] = value
    return function(*positional, *rest, **keywords)


def call_action(actions: Mapping[str, Callable[..., int]], subcommand: str, arguments: Sequence[str]) -> int:
    """Run the action that the first argument names, with the others; print the actions for `--help`.

    Raises:
        UsageError: If there is no such action.
    """
    name = arguments[0] if arguments else ""
    if name in ("-h", "--help"):
        print(f"usage: svp-bench {subcommand} ACTION [--help] …\n")
        print_table([(f"  {action}", _parse_docstring(function)[0]) for action, function in actions.items()])
        return 0
    if not name:
        raise UsageError(f"no action: give {' or '.join(actions)} (`svp-bench {subcommand} --help`)")
    if name not in actions:
        raise unknown_name("action", name, actions, listing=f"svp-bench {subcommand} --help")
    return call_function(actions[name], f"{subcommand} {name}", arguments[1:])


def _add_arguments(options: Parser, function: Callable[..., int]) -> None:
    """Add the arguments and the help of a function to a parser."""
    options.description, options.epilog, texts = _parse_docstring(function)
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.VAR_POSITIONAL:
            options.forwards = True
        elif parameter.annotation != "CommandLine":
            _add_argument(options, parameter, hints[name], texts[name])


def _parse_docstring(function: Callable[..., int]) -> tuple[str, str, dict[str, str]]:
    """Return the summary of a function, the paragraphs below it, and argument → text."""
    head, _, listed = (inspect.getdoc(function) or "").partition("\n\nArgs:\n")
    summary, *more = head.split("\n\n")
    texts = {name: " ".join(text.split()).rstrip(".") for name, text in _ARGUMENT.findall(listed.split("\n\n")[0])}
    return summary.rstrip("."), " ".join(" ".join(more).split()), texts


def _add_argument(options: Parser, parameter: inspect.Parameter, hint: Any, text: str) -> None:
    hint, *extra = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    hint = (
        next((one for one in get_args(hint) if one is not type(None)), hint) if type(None) in get_args(hint) else hint
    )
    origin, inner = get_origin(hint), get_args(hint)
    required, default = parameter.default is parameter.empty, parameter.default
    flag = parameter.name if parameter.kind is parameter.POSITIONAL_ONLY else f"--{parameter.name}"
    settings: dict[str, Any] = {} if required else {"default": default}
    if converter := next((one for one in extra if callable(one)), None):
        settings["type"] = converter
    elif origin is Literal:
        settings["choices"] = inner
    elif hint is bool:
        settings["action"] = "store_true"
    elif origin is tuple:
        several = ("+" if required else "*") if inner[-1] is ... else len(inner)
        settings |= {"nargs": several, "type": inner[0]}
    else:
        settings |= {"action": "append"} if origin is list else {"type": hint}
    for one in extra:
        if isinstance(one, str) and one.startswith("--"):
            flag, settings["dest"] = one, parameter.name
        elif not callable(one):
            settings["metavar"] = one
    if flag.startswith("-"):
        settings["required"] = required
    else:
        settings.setdefault("metavar", flag.upper())
        if not required:
            settings.setdefault("nargs", "?")
    shown = ",".join(map(str, default)) if isinstance(default, tuple) else default
    note = "" if required or default is None or default is False or shown == "" else f" (default: {shown})"
    options.add_argument(flag, help=f"{_lower(text)}{note}".replace("%", "%%"), **settings)


def _lower(text: str) -> str:
    """Return a sentence that begins in lower case, except for an acronym."""
    return text if text[1:2].isupper() else text[:1].lower() + text[1:]


def whole_number(low: int, high: int | None = None) -> Callable[[str], int]:
    """Return a converter of text to a whole number of at least `low` and, if given, at most `high`."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < low or (high is not None and int(text) > high):
            allowed = f"of at least {low}" if high is None else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number {allowed}")
        return int(text)

    return convert


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """Print rows in aligned columns, with control characters escaped."""
    rows = [list(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
