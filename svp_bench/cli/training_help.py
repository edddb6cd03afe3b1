"""The help of `fit`, `validate` and `test`, from the source text of their settings: no torch is imported for it."""

from __future__ import annotations

import ast
import re
import textwrap
from pathlib import Path
from typing import Any

from svp_bench.cli.commands import HEAVY
from svp_bench.core.resources import configs_dir
from svp_bench.core.yaml import read_yaml

__all__ = ["training_help"]

_SETTINGS = {"model": ("train/module.py", "AdaptationModule"), "data": ("data/module.py", "VisionDataModule")}
_GROUPS = {  # class of a group of settings → its file
    "OptimizerConfig": "train/optim.py",
    "ScheduleConfig": "train/optim.py",
    "EMAConfig": "train/optim.py",
    "TransformConfig": "data/transforms.py",
    "AugmentConfig": "data/augment.py",
    "CrossValidationConfig": "data/folds.py",
}
_BY_OTHERS = {"model.method", "model.num_classes", "model.image_size", "model.seed", "data.seed"}
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
    base = read_yaml(configs_dir() / "base.yaml").value
    lines = [f"usage: svp-bench {subcommand} --config FILE [--method NAME] [--KEY VALUE …]", "", HEAVY[subcommand], ""]
    lines += _rows([*_OWN[subcommand], *_PLACES])
    for group, (file, name) in _SETTINGS.items():
        lines += ["", f"{group}:", *_rows(_settings(group, file, name, base.get(group) or {}))]
    lines += ["", "trainer:", *_rows(_TRAINER)]
    lines += [
        "",
        f"All arguments, with those of Lightning's Trainer: svp-bench {subcommand} --help=all (takes seconds)",
    ]
    return "\n".join(lines)


def _settings(group: str, file: str, name: str, base: dict[str, Any]) -> list[tuple[str, str]]:
    """Return (flag, text) of the arguments of a class, or of the fields of a dataclass."""
    tree = ast.parse((Path(__file__).parents[1] / file).read_text(encoding="utf-8"))
    (cls,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    found = re.findall(r"^    (\w+): (.+?)(?=^    \w|\Z|^\S|^$)", ast.get_docstring(cls) or "", re.M | re.S)
    described = dict(reversed(found))  # the first of a name: arguments come before attributes
    rows = []
    for key, annotation, default in _arguments(cls):
        if f"{group}.{key}" in _BY_OTHERS:
            continue
        if annotation in _GROUPS:
            rows += _settings(f"{group}.{key}", _GROUPS[annotation], annotation, base.get(key) or {})
            continue
        text = re.split(r"(?<!e\.g)\. ", " ".join(described.get(key, "").split()))[0].rstrip(".")
        value = base.get(key, default)
        shown = "" if value in (None, "None") else f" (default: {str(value).strip(chr(39))})"
        rows.append((f"--{group}.{key}", f"{text}{shown}"))
    return rows


def _arguments(cls: ast.ClassDef) -> list[tuple[str, str, str | None]]:
    """Return (name, annotation, default) of each argument of the constructor, in order."""
    inits = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    if not inits:
        fields = (node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
        return [
            (ast.unparse(one.target), ast.unparse(one.annotation), ast.unparse(one.value) if one.value else None)
            for one in fields
        ]
    arguments, given = inits[0].args.args[1:], inits[0].args.defaults
    defaults = [None] * (len(arguments) - len(given)) + [ast.unparse(one) for one in given]
    kinds = [ast.unparse(one.annotation) if one.annotation else "" for one in arguments]
    return [(one.arg, kind, default) for one, kind, default in zip(arguments, kinds, defaults, strict=True)]


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
