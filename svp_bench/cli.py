"""The front door: `svp-bench VERB …`. Light verbs import no torch; every expected failure is one line."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext

from svp_bench import __version__
from svp_bench.errors import SvpBenchError, printable, unknown_name
from svp_bench.interrupts import INTERRUPTS, Preempted, ignore_from_now_on
from svp_bench.terminal import readable_output
from svp_bench.verbs import HEAVY, VERBS

__all__ = ["entry_point", "main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 well, 1 failed, 2 wrong usage, 130 interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _dispatch(arguments)
        sys.stdout.flush()  # a closed pipe shows here, not when Python shuts down
        return status
    except SystemExit as stop:  # `--help` of a parser
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except SvpBenchError as error:
        text = printable(" ".join(str(error).split()))
        print(f"svp-bench: error: {text}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        print("svp-bench: interrupted", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # `svp-bench tasks | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"svp-bench {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb in HEAVY:
        with INTERRUPTS.taken() if verb == "fit" else nullcontext():  # importing torch takes seconds
            try:
                return _run_training(verb, rest)
            except Preempted:
                INTERRUPTS.say_stopped_early()
                return 0
    if verb not in VERBS:
        raise unknown_name("command", verb, [*HEAVY, *VERBS], listing="svp-bench --help")
    return VERBS[verb].run(rest)


def _run_training(verb: str, rest: list[str]) -> int:
    from svp_bench.config import compose, split_flags

    flags = split_flags(rest)
    if not flags.asks_help:
        compose(flags)  # fails in a second, before torch is imported
    from svp_bench.train.cli import run

    run(verb, flags)
    return 0


def _help() -> str:
    lines = [
        "usage: svp-bench COMMAND [--help] …",
        "",
        "Adapt pre-trained Vision Mamba models and compare the methods, honestly.",
        "",
        *(f"  {name:<10} {summary}" for name, summary in HEAVY.items()),
        *(f"  {name:<10} {verb.summary}" for name, verb in VERBS.items()),
        "",
        "examples:",
        "  svp-bench demo",
        "  svp-bench fit --config configs/vtab/caltech101.yaml --data.root DIR",
        "  svp-bench fit --config configs/vtab/caltech101.yaml --method linear",
        "  svp-bench table",
    ]
    return "\n".join(lines)


def entry_point() -> None:
    """Run the command of this process and exit."""
    # GNU OpenMP, read when torch is imported: idle threads soon sleep instead of spinning. On a machine that has other
    # work, spinning threads make a step several times slower; on a quiet one it is the same.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    readable_output()
    status = main()
    ignore_from_now_on()
    sys.exit(status)
