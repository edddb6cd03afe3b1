"""Entry point `svp-bench`. Most subcommands import no torch; an expected error is printed as one line."""

from __future__ import annotations

import gc
import getpass
import os
import sys
import tempfile
from collections.abc import Sequence
from contextlib import nullcontext

from svp_bench import __version__
from svp_bench.cli.commands import RUN_COMMANDS, SUBCOMMANDS
from svp_bench.core.errors import SvpBenchError, UsageError, printable, unknown_name
from svp_bench.core.interrupts import INTERRUPTS, Preempted, ignore_from_now_on
from svp_bench.core.registry import importing_torch
from svp_bench.core.resources import CUSTOM_TASKS
from svp_bench.core.terminal import readable_output

_RENAMED = {  # older names
    "--choice": "--selected_config",
    "own/pictures": "custom/images",
    "configs/own/pictures.yaml": "configs/custom/images.yaml",
}
_TASK_FLAGS = ("--data.task", "--task", "--tasks")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the program's name; those of the process by default.

    Returns:
        The exit status: 0 well, 1 failed, 2 wrong usage, 130 interrupted.
    """
    arguments = [_current_name(argument) for argument in (sys.argv[1:] if argv is None else argv)]
    before = os.environ.get(CUSTOM_TASKS)
    try:
        status = _dispatch(_set_tasks_dirs(arguments))
        sys.stdout.flush()  # raises BrokenPipeError here, not when Python exits
        return status
    except SystemExit as stop:  # `--help` of a parser
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except SvpBenchError as error:
        text = printable(" ".join(str(error).split()))
        print(f"svp-bench: error: {text}", file=sys.stderr, flush=True)
        return error.exit_status
    except KeyboardInterrupt:
        remedy = "; the same command with --resume continues" if arguments[:1] == ["fit"] else ""
        print(f"svp-bench: interrupted{remedy}", file=sys.stderr, flush=True)
        return 130
    except BrokenPipeError:  # `svp-bench tasks | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    finally:
        if before is None:
            os.environ.pop(CUSTOM_TASKS, None)
        else:
            os.environ[CUSTOM_TASKS] = before


def _current_name(argument: str) -> str:
    """Return an argument with older names replaced, and print a notice."""
    parts = argument.partition("=")
    for part in parts:
        if part in _RENAMED:
            print(f"svp-bench: {part} is now called {_RENAMED[part]}", file=sys.stderr)
    return "".join(_RENAMED.get(part, part) for part in parts)


def _set_tasks_dirs(arguments: Sequence[str]) -> list[str]:
    """Set `$SVP_BENCH_TASKS` from `--tasks_dir DIR` and from paths of cards; return the other arguments.

    The path of a card is replaced by the name of the task.

    Raises:
        UsageError: If the flag lacks its value, or the suite card of a given card is missing.
    """
    folders = [name for name in os.environ.get(CUSTOM_TASKS, "").split(os.pathsep) if name]
    rest: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if name == "--tasks_dir":
            if not equals and (not queue or queue[0].startswith("--")):
                raise UsageError("--tasks_dir needs a value: --tasks_dir DIR, which holds <suite>.yaml and <suite>/")
            folders.append(os.path.abspath(os.path.expanduser(value if equals else queue.pop(0))))
        elif name in _TASK_FLAGS and equals:
            rest.append(f"{name}={_task_names(value, folders)}")
        elif rest and (rest[-1] in _TASK_FLAGS or rest == ["tasks"]):
            rest.append(_task_names(argument, folders))
        else:
            rest.append(argument)
    if folders:
        os.environ[CUSTOM_TASKS] = os.pathsep.join(dict.fromkeys(folders))
    return rest


def _task_names(text: str, folders: list[str]) -> str:
    """Return comma-separated task names; the path of a card becomes a name, and its folder is added to `folders`."""
    names = []
    for name in text.split(","):
        if name.endswith((".yaml", ".yml")) and "/" in name.replace(os.sep, "/"):
            card = os.path.abspath(os.path.expanduser(name.strip()))
            folder, file = os.path.split(card)
            root, suite = os.path.split(folder)
            if not os.path.isfile(card):
                raise UsageError(f"no task card {name!r}; give a task's name (`svp-bench tasks`) or its card's path")
            if not os.path.isfile(f"{folder}.yaml"):
                raise UsageError(
                    f"{name}: a card lies in the folder of its suite, and the suite's card {folder}.yaml is missing; "
                    "take tasks/custom.yaml as the pattern"
                )
            folders.append(root)
            name = f"{suite}/{os.path.splitext(file)[0]}"
        names.append(name)
    return ",".join(names)


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0 if arguments else 2
    if arguments[0] in ("-V", "--version"):
        print(f"svp-bench {__version__}")
        return 0
    subcommand, rest = arguments[0], arguments[1:]
    if subcommand in RUN_COMMANDS:
        with INTERRUPTS.taken() if subcommand == "fit" else nullcontext():  # also while torch is imported
            try:
                return _run_training(subcommand, rest)
            except Preempted:
                INTERRUPTS.print_stopped_early()
                return 0
    if subcommand not in SUBCOMMANDS:
        raise unknown_name("command", subcommand, [*RUN_COMMANDS, *SUBCOMMANDS], listing="svp-bench --help")
    return SUBCOMMANDS[subcommand].run(rest)


def _run_training(subcommand: str, rest: list[str]) -> int:
    from svp_bench.config.compose import compose, split_flags

    if any(flag in rest for flag in ("--help", "-h")):
        from svp_bench.cli.training_help import training_help

        print(training_help(subcommand))
        return 0
    if "--help=all" in rest:
        from svp_bench.train.parser import build_parser

        build_parser(subcommand).print_help()
        return 0
    composed = compose(split_flags(rest), subcommand)  # reports most errors before torch is imported
    if sys.stdout.isatty():
        print("Loading PyTorch, weights and images …", flush=True)
    with importing_torch():
        from svp_bench.train.parser import resolve
        from svp_bench.train.run import run

    run(resolve(composed, subcommand))
    return 0


def _help() -> str:
    lines = [
        "usage: svp-bench COMMAND [--help] …",
        "",
        "Adapt pre-trained Vision Mamba models and compare the methods, honestly.",
        "",
        *(f"  {name:<10} {summary}" for name, summary in RUN_COMMANDS.items()),
        *(f"  {name:<10} {subcommand.summary}" for name, subcommand in SUBCOMMANDS.items()),
        "",
        "task cards of your own: --tasks_dir DIR with any command, or $SVP_BENCH_TASKS",
        "",
        "examples:",
        "  svp-bench demo",
        "  svp-bench fit --config configs/vtab/caltech101.yaml --data.root DIR",
        "  svp-bench fit --config configs/vtab/caltech101.yaml --method linear",
        "  svp-bench table",
    ]
    return "\n".join(lines)


def _ensure_home() -> None:
    """Set USER and HOME if they are missing, as in a container with an unknown user: libraries need them."""
    user = str(os.getuid()) if hasattr(os, "getuid") else "user"
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):
        os.environ["USER"] = user
    if os.access(os.path.expanduser("~"), os.W_OK | os.X_OK):
        return
    place = os.path.join(tempfile.gettempdir(), f"svp-bench-home-{user}")
    try:
        os.makedirs(place, mode=0o700, exist_ok=True)
        mine = not os.path.islink(place) and (not hasattr(os, "getuid") or os.stat(place).st_uid == os.getuid())
    except OSError:
        mine = False
    if not mine:
        place = tempfile.mkdtemp(prefix="svp-bench-home-")
    os.environ["HOME"] = place


def entry_point() -> None:
    """Run the command of this process and exit."""
    # GNU OpenMP: idle threads sleep instead of spinning, which makes a step several times slower on a busy machine
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    readable_output()
    _ensure_home()
    INTERRUPTS.ends_process = True
    if sys.argv[1:2] and sys.argv[1] not in RUN_COMMANDS:
        gc.set_threshold(100_000)  # records are trees: with the default of 700, collections take a tenth of the time
    status = main()
    ignore_from_now_on()
    sys.exit(status)
