"""Flags, types, defaults and help of a subcommand follow from the signature and docstring of its function."""

from __future__ import annotations

import contextlib
from typing import Annotated, Any, Literal

import pytest

from svp_bench.cli.commands import SUBCOMMANDS
from svp_bench.cli.parser import CommandLine, call_action, call_function, whole_number
from svp_bench.core.errors import UsageError

CALLS: list[dict[str, Any]] = []


def example(
    place: str,
    others: tuple[str, ...] = (),
    /,
    *rest: str,
    root: Annotated[str | None, "--data.root"] = None,
    count: Annotated[int, whole_number(1, 10)] = 2,
    engine: Literal["local", "ray"] = "local",
    pair: tuple[str, str] | None = None,
    suite: list[str] | None = None,
    fast: bool = False,
    command_line: CommandLine,
) -> int:
    """Do something.

    A paragraph with 95 %.

    Args:
        place: Where.
        others: More places.
        *rest: Flags of fit.
        root: CPU threads, or a root.
        count: How many.
        engine: Which engine.
        pair: Two rows.
        suite: May be repeated.
        fast: Skip a step.
        command_line: As typed.
    """
    CALLS.append(dict(locals()))
    return 3


def call(*arguments: str) -> dict[str, Any]:
    assert call_function(example, "example", arguments) == 3
    return CALLS.pop()


def test_defaults_and_values_reach_the_function() -> None:
    assert call("here") == {
        "place": "here",
        "others": (),
        "rest": (),
        "root": None,
        "count": 2,
        "engine": "local",
        "pair": None,
        "suite": None,
        "fast": False,
        "command_line": ("example", "here"),
    }
    given = ["here", "there", "--pair", "a", "b", "--suite", "x", "--suite=y", "--fast", "--data.root", "/d"]
    found = call(*given, "--count", "10", "--engine", "ray", "--trainer.devices", "2")
    assert (found["others"], found["pair"], found["suite"], found["fast"]) == (("there",), ("a", "b"), ["x", "y"], True)
    assert (found["root"], found["count"], found["engine"]) == ("/d", 10, "ray")
    assert found["rest"] == ("--trainer.devices", "2")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "PLACE"),
        (["x", "--cont", "3"], "did you mean '--count'"),
        (["x", "--count", "11"], "'11' is not a whole number from 1 to 10"),
        (["x", "--count", "-1"], "--count"),
        (["x", "--engine", "slurm"], "'slurm'"),
        (["x", "--pair", "a"], "--pair"),
    ],
)
def test_wrong_arguments_are_usage_errors(arguments: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        call_function(example, "example", arguments)


def test_the_help_has_texts_and_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        call_function(example, "example", ["--help"])
    assert stopped.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("Do something", "95 %", "how many (default: 2)", "CPU threads, or a root", "--engine {local,ray}"):
        assert words in shown


def test_an_action_is_named_or_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert call_action({"example": example}, "data", ["--help"]) == 0
    assert "Do something" in capsys.readouterr().out
    with pytest.raises(UsageError, match="did you mean 'example'"):
        call_action({"example": example}, "data", ["exampel"])
    with pytest.raises(UsageError, match="give example"):
        call_action({"example": example}, "data", [])


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    subcommand = SUBCOMMANDS[name]
    assert subcommand.summary[0].islower() or subcommand.summary[:2].isupper()
    if name == "replicate":
        return  # the help of fit
    with contextlib.suppress(SystemExit):
        subcommand.run(["--help"])
    assert f"usage: svp-bench {name}" in capsys.readouterr().out
