"""The keys of a config, read from the source text of the classes that take them: importing these would take seconds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from functools import cache
from importlib.metadata import distribution
from pathlib import Path
from typing import Any, NamedTuple

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.records.migrate import MOVED

_CLASSES = {"model": ("train/module.py", "AdaptationModule"), "data": ("data/module.py", "VisionDataModule")}
_GROUPS = {  # class of a group of settings → its file
    "OptimizerConfig": "train/optim.py",
    "ScheduleConfig": "train/optim.py",
    "EMAConfig": "train/optim.py",
    "TransformConfig": "data/transforms.py",
    "AugmentConfig": "data/augment.py",
    "CrossValidationConfig": "data/folds.py",
}
DERIVED = {
    "model.num_classes": "it follows from the task's card",
    "model.image_size": "set --data.image_size",
    "model.seed": "set --seed_everything",
    "data.seed": "set --seed_everything",
}
GENERAL = ("seed_everything", "results_root", "runs_root", "selected_on", "no_test", "resume")
LISTS = ("trainer.callbacks", "trainer.logger", "trainer.plugins")  # take +=
_WITH_ARGUMENTS = tuple(f"{key}." for key in (*LISTS, "trainer.profiler", "trainer.strategy", "trainer.accelerator"))
_LOADERS = ("self", "model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders")


class Setting(NamedTuple):
    """A setting: its key, its default as written in the source, and its description."""

    key: str
    default: str | None
    text: str


@cache
def settings(group: str) -> tuple[Setting, ...]:
    """Return the settings of the group "model" or "data", in the order of the source; `model.method` is not one."""
    file, name = _CLASSES[group]
    return tuple(_settings(group, Path(__file__).parents[1] / file, name))


def _settings(group: str, file: Path, name: str) -> Iterator[Setting]:
    cls = _class(file, name)
    found = re.findall(r"^    (\w+): (.+?)(?=^    \w|\Z|^\S|^$)", ast.get_docstring(cls) or "", re.M | re.S)
    described = dict(reversed(found))  # the first of a name: arguments come before attributes
    for key, annotation, default in _arguments(cls):
        if annotation in _GROUPS:
            yield from _settings(f"{group}.{key}", Path(__file__).parents[1] / _GROUPS[annotation], annotation)
        elif f"{group}.{key}" not in (*DERIVED, "model.method"):
            yield Setting(f"{group}.{key}", default, " ".join(described.get(key, "").split()))


def _class(file: Path, name: str) -> ast.ClassDef:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return found


def _function(cls: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    return next((node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == name), None)


def _arguments(cls: ast.ClassDef) -> list[tuple[str, str, str | None]]:
    """Return (name, annotation, default) of each argument of a constructor, or field of a dataclass, in order."""
    init = _function(cls, "__init__")
    if init is None:
        fields = (node for node in cls.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name))
        return [
            (ast.unparse(one.target), ast.unparse(one.annotation), ast.unparse(one.value) if one.value else None)
            for one in fields
        ]
    arguments, given = init.args.args[1:], init.args.defaults
    defaults = [None] * (len(arguments) - len(given)) + [ast.unparse(one) for one in given]
    kinds = [ast.unparse(one.annotation) if one.annotation else "" for one in arguments]
    return [(one.arg, kind, default) for one, kind, default in zip(arguments, kinds, defaults, strict=True)]


@cache
def known_keys(subcommand: str) -> frozenset[str]:
    """Return the keys of a config of fit, validate or test, those of methods left out."""
    own = {setting.key for group in _CLASSES for setting in settings(group)}
    trainer = _class(
        Path(str(distribution("lightning").locate_file("lightning/pytorch/trainer/trainer.py"))), "Trainer"
    )
    init, call = _function(trainer, "__init__"), _function(trainer, subcommand)
    assert init is not None
    assert call is not None
    arguments = [*init.args.args, *init.args.kwonlyargs]
    own |= {f"trainer.{one.arg}" for one in arguments if one.arg != "self"}
    return frozenset({*own, *GENERAL, *(one.arg for one in call.args.args if one.arg not in _LOADERS)})


def check_keys(
    values: Mapping[str, Any], origins: Mapping[str, str], flags: Mapping[str, str], subcommand: str
) -> None:
    """Check every key of every layer and of the command line, those of the method left out.

    Args:
        values: The composed config.
        origins: Its dotted keys → "file:line".
        flags: Key → text of the command line.
        subcommand: fit, validate or test.

    Raises:
        ConfigError: If one is unknown; names the nearest.
    """
    known = {*known_keys(subcommand), "help", "print_config"}
    given = [(key, where) for key, where in origins.items()] + [(key, "") for key in flags]
    for key, where in given:
        prefix = f"{where}: " if where else ""
        if key in DERIVED:
            raise ConfigError(f"{prefix}{key} is not set by hand: {DERIVED[key]}")
        if key in MOVED:
            raise ConfigError(f"{prefix}{key} is named {MOVED[key][0]} now")
        if key.startswith("model.method") or key in known or key.startswith(_WITH_ARGUMENTS):
            continue
        if key[-1:] == "+" and key[:-1] in LISTS:
            continue
        inside = next((name for name in sorted(known) if name.startswith(f"{key}.")), None)
        if inside is None:
            kind, listing = "config key" if where else "argument", f"svp-bench {subcommand} --help=all"
            raise unknown_name(kind, key, known, where=where or None, listing=listing, error=ConfigError)
        if not where or not _is_mapping(values, key):
            raise ConfigError(f"{prefix}{key} is a group of settings; set them one by one, e.g. {inside}")


def _is_mapping(values: Any, key: str) -> bool:
    for part in key.split("."):
        values = values.get(part) if isinstance(values, Mapping) else None
    return isinstance(values, Mapping)
