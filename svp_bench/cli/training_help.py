"""The help of `fit`, `validate` and `test`, from the source text of their settings: no torch is imported for it."""

from __future__ import annotations

import re
import textwrap
from typing import Any

from svp_bench.cli.commands import RUN_COMMANDS
from svp_bench.config.keys import settings
from svp_bench.core.resources import configs_dir
from svp_bench.core.yaml import read_yaml
from svp_bench.records.digests import flat

_OWN = {
    "fit": (
        ("--config FILE", "a task's config; further ones override it. Needed, unless --data.task is given"),
        ("--method NAME", "a method of `svp-bench methods`, or the path of a method file (default: svp)"),
        ("--selected_config FILE", "take the settings that a search has selected (default: none)"),
        ("--resume", "continue the last unfinished run of this setting and seed (default: begin a new one)"),
        ("--no_test", "train only; the record is unscored (default: test once)"),
    ),
    **dict.fromkeys(
        ("validate", "test"),
        (
            ("--config FILE", "config.yaml of the run"),
            ("--ckpt_path FILE", "its checkpoint"),
            ("--method NAME", "its method, if the config names none (default: svp)"),
        ),
    ),
}
_PLACES = (
    ("--seed_everything N", "seed of weights, order and augmentation (default: 0)"),
    ("--results_root DIR", "where records and tables go (default: results)"),
    ("--runs_root DIR", "where logs and checkpoints go (default: runs)"),
)
_TRAINER = (
    ("--trainer.max_epochs N", "epochs (default: of the protocol)"),
    ("--trainer.precision P", "32-true, bf16-mixed … (default: bf16-mixed on a GPU, else 32-true)"),
    ("--trainer.accelerator NAME", "auto, cpu, gpu (default: auto)"),
    ("--trainer.devices N", "devices (default: auto)"),
    ("--trainer.accumulate_grad_batches N", "parts of a batch, one after the other (default: 1)"),
    ("--trainer.callbacks+=CLASS", "add a callback (default: none)"),
)


def training_help(subcommand: str) -> str:
    """Return the help of a subcommand that trains or tests."""
    base = dict(flat(read_yaml(configs_dir() / "base.yaml").value))
    lines = [
        f"usage: svp-bench {subcommand} --config FILE [--method NAME] [--KEY VALUE …]",
        "",
        RUN_COMMANDS[subcommand],
        "",
    ]
    lines += _rows([*_OWN[subcommand], *_PLACES])
    for group in ("model", "data"):
        lines += ["", f"{group}:", *_rows(_setting_rows(group, base))]
    lines += ["", "trainer:", *_rows(_TRAINER)]
    lines += [
        "",
        f"All arguments, with those of Lightning's Trainer: svp-bench {subcommand} --help=all (takes seconds)",
    ]
    return "\n".join(lines)


def _setting_rows(group: str, base: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (flag, text) of each setting of a group; `base` holds the defaults of configs/base.yaml."""
    rows = []
    for key, default, text in settings(group):
        value = base.get(key, default)
        shown = "" if value in (None, "None") else f" (default: {str(value).strip(chr(39))})"
        first = re.split(r"(?<!e\.g)\. ", text)[0].rstrip(".")
        rows.append((f"--{key}", f"{first}{shown}"))
    return rows


def _rows(rows: Any) -> list[str]:
    lines = []
    for flag, text in rows:
        wrapped = textwrap.wrap(text, 84) or [""]
        if len(flag) > 32:
            lines.append(f"  {flag}")
            flag = ""
        lines.append(f"  {flag:<32} {wrapped[0]}")
        lines += [" " * 35 + more for more in wrapped[1:]]
    return lines
