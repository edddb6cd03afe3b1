"""The shipped settings of a run, and the values of a record that override them.

The shipped settings are three layers: protocol card, config of the task, recipe of the method. A record holds the whole
config of its run, so both are compared key by key. A record cannot prove when or why a value was chosen.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from svp_bench.core.errors import SvpBenchError
from svp_bench.core.resources import configs_dir, tasks_dirs
from svp_bench.core.yaml import read_yaml
from svp_bench.records.digests import canonical_digest, flat, setting_config
from svp_bench.records.record import Record
from svp_bench.tasks.cards import ProtocolCard, load_protocol

WARMUP_RUNS = 5  # an inherited warm-up is at most one part in this many of the run
_EPOCHS = "trainer.max_epochs"
_WARMUP = "model.warmup_epochs"
_IDENTITY = frozenset(
    {
        _EPOCHS,  # the budget: an audit has a line of its own for it
        "model.method.class_path",
        "data.task",
        "model.backbone",
        "model.checkpoint",
    }
)
"""Keys that identify a run; they are not settings."""


def overrides(
    record: Record, protocol: ProtocolCard | None, searched: Iterable[str] = (), *, epochs: bool = False
) -> dict[str, tuple[Any, Any]]:
    """Return dotted key → (the record's value, the shipped value) where they differ, by key.

    Keys that the record does not have, or no shipped layer sets, are passed over: there is nothing to compare.

    Args:
        record: The record.
        protocol: Its protocol card; None if that card is not available in the record's version.
        searched: Keys that may differ, because a search selected them.
        epochs: Compare the number of epochs too.
    """
    layers: dict[str, Any] = dict(flat(protocol.layer)) if protocol is not None else {}
    layers.update(shipped_layer(f"{record.task}.yaml"))
    layers.update(recipe(record.method))
    ours, allowed = dict(flat(record.config)), set(searched)
    used = ours.get(_EPOCHS)  # of any type: an audit reads files of others too
    if _WARMUP in layers and isinstance(used, int):
        clipped = clipped_warmup(layers[_WARMUP], used, inherited=True)  # by `fit`, for this number of epochs
        layers[_WARMUP] = clipped if ours.get(_WARMUP) == clipped else layers[_WARMUP]
    excluded = _IDENTITY - {_EPOCHS} if epochs else _IDENTITY
    return {
        key: (ours[key], value)
        for key, value in sorted(layers.items())
        if key in ours and key not in excluded and key not in allowed and other(ours[key], value)
    }


def clipped_warmup(warmup_epochs: float, epochs: int, *, inherited: bool = False) -> float:
    """Return the epochs of warm-up of a run of `epochs`: at most the run, and a fifth of it for an inherited value.

    Args:
        warmup_epochs: Epochs asked for.
        epochs: Epochs of the run.
        inherited: The value comes from a recipe made for another number of epochs, not from this run.
    """
    return min(warmup_epochs, epochs / WARMUP_RUNS if inherited else epochs)


def override_texts(found: dict[str, tuple[Any, Any]]) -> list[str]:
    """Return "model.learning_rate 0.123, not 0.001" for each of `overrides`."""
    return [f"{key} {ours}, not {shipped}" for key, (ours, shipped) in found.items()]


def recipe(method: str) -> dict[str, Any]:
    """Return dotted key → value of the shipped recipe of `method`; empty if there is none."""
    return shipped_layer(f"method/{method}.yaml")


def shipped_layer(name: str) -> dict[str, Any]:
    """Return the leaves of the shipped config `name`, e.g. "vtab/dtd.yaml"; empty if there is no such file."""
    return _leaves(configs_dir() / name)


@cache
def _leaves(path: Path) -> dict[str, Any]:
    return dict(flat(read_yaml(path, error=SvpBenchError).value)) if path.is_file() else {}


def row_setting(record: Record) -> dict[str, Any]:
    """Return the common part of a table row: `setting_config`, with the epochs that the task's config sets.

    A small task may have more epochs than its protocol. These count here as the protocol's epochs; a run of such a task
    with the protocol's number belongs to another row. A record does not state where its epochs came from.
    """
    setting, epochs = setting_config(record.config, record.search), _row_epochs(record)
    return setting if epochs is None else {**setting, "trainer": {**setting["trainer"], "max_epochs": epochs}}


def _row_epochs(record: Record) -> Any:
    """Return the epochs that a row shows for a task whose config sets them, or None to use those of the run."""
    own, used = shipped_layer(f"{record.task}.yaml").get(_EPOCHS), record.config.get("trainer", {}).get("max_epochs")
    usual = _epochs(record.protocol, tasks_dirs()) if own is not None else None
    searched = record.search is not None and _EPOCHS in record.search.keys
    if usual is None or used is None or searched or not other(own, usual):
        return None
    if not other(used, own):
        return usual
    return f"{used} for each task" if not other(used, usual) else None


def row_digest(record: Record) -> str:
    """Return "sha256:..." of `row_setting`, and of the record's `source_digest` where it has one.

    For a shipped method and tasks without epochs of their own it is the record's setting digest.
    """
    source = record.source_digest
    if not source and _row_epochs(record) is None:
        return record.setting_digest
    setting = row_setting(record)
    return canonical_digest({**setting, "source": source} if source else setting)


@cache
def _epochs(protocol: str, folders: tuple[Path, ...]) -> Any:
    try:
        return dict(flat(load_protocol(protocol).training)).get(_EPOCHS)
    except SvpBenchError:  # a protocol of another time
        return None


def other(one: Any, two: Any) -> bool:
    """Whether two config values differ; a list is a tuple, and true is not 1."""
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)):
        return len(one) != len(two) or any(other(a, b) for a, b in zip(one, two, strict=True))
    return isinstance(one, bool) != isinstance(two, bool) or one != two
