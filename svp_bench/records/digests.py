"""Digests of configs: what makes two runs one cell, and two cells one table row."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import reprlib
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Protocol

from svp_bench.core.errors import RecordError
from svp_bench.tasks.cards import ProtocolCard, TaskCard

# Callbacks and plugins stay in: some change the weights (averaging, precision).
CELL_EXCLUDED: Mapping[str, str] = {
    # seeds: the runs of one cell differ in nothing else
    "seed_everything": "seed",
    "data.seed": "seed",
    "model.seed": "seed",
    # where files lie
    "config": "path",
    "ckpt_path": "path",
    "resume": "path",
    "results_root": "path",
    "runs_root": "path",
    "data.root": "path",
    "trainer.default_root_dir": "path",
    "model.checkpoint": "path: the digest of the weights is part of the cell",
    # what computes, and how it is spread
    "data.eval_batch_size": "device: each image is scored by itself",
    "data.num_workers": "device",
    "data.pixel_cache": "device: the same images, decoded once",
    "model.scan_backend": "device: every backend is tested against the reference",
    "model.grad_checkpointing": "device: memory for time, the same numbers",
    "model.cache_features": "device: the frozen part is computed once, in other batches",
    "model.compile": "device: the same sums in another order",
    "trainer.accelerator": "device",
    "trainer.devices": "device",
    "trainer.num_nodes": "device",
    "trainer.strategy": "device",
    "trainer.accumulate_grad_batches": "device: data.batch_size is global",
    "trainer.use_distributed_sampler": "device",
    "trainer.sync_batchnorm": "device",
    "trainer.benchmark": "device",
    "trainer.deterministic": "device",
    "trainer.inference_mode": "device",
    # logging
    "no_test": "whether a run is scored is its status",
    "trainer.barebones": "logging",
    "trainer.detect_anomaly": "logging",
    "trainer.enable_autolog_hparams": "logging",
    "trainer.enable_checkpointing": "logging",
    "trainer.enable_model_summary": "logging",
    "trainer.enable_progress_bar": "logging",
    "trainer.log_every_n_steps": "logging",
    "trainer.logger": "logging",
    "trainer.model_registry": "logging",
    "trainer.num_sanity_val_steps": "logging",
    "trainer.profiler": "logging",
}
"""Config keys that are not part of a cell, each with the reason.

Both this and `SETTING_EXCLUDED` belong to schema 1: a change would make the digests of older records wrong, so it needs
a new schema once records are shared.
"""

SETTING_EXCLUDED: Mapping[str, str] = {
    "data.task": "the column of the table",
    "model.num_classes": "follows from the task",
}
"""Config keys that are, further, not part of a table row."""


class SelectedKeys(Protocol):
    """The part of a `SearchSummary` that a setting depends on."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Dotted keys of the selected values."""

    @property
    def declaration(self) -> str:
        """Digest of the search declaration."""


def cell_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without the keys of `CELL_EXCLUDED`: without seed, paths, device and logging.

    Nulls and mappings that are left empty go too: a null means the default, and a library that gains an option with a
    null default must not split a cell in two.
    """
    return _without(config, CELL_EXCLUDED)


def setting_config(config: Mapping[str, Any], search: SelectedKeys | None = None) -> dict[str, Any]:
    """Return `cell_config(config)` without the task and the values that a search selected: the common part of a row.

    The digest of the search's declaration takes the place of the selected values, as the key "search".
    """
    excluded = {*CELL_EXCLUDED, *SETTING_EXCLUDED, *(search.keys if search else ())}
    setting = _without(config, excluded)
    return {**setting, "search": search.declaration} if search else setting


def without_nulls(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without nulls and mappings left empty: a new option that is null by default changes nothing."""
    return _without(config, ())


def config_digest(config: Mapping[str, Any]) -> str:
    """Return "sha256:..." of `cell_config(config)` as canonical JSON: sorted keys, no blanks, floats by `repr`.

    Raises:
        RecordError: If a value has no place in JSON; names the key.
    """
    return canonical_digest(cell_config(config))


def setting_digest(config: Mapping[str, Any], search: SelectedKeys | None = None) -> str:
    """Return "sha256:..." of `setting_config(config, search)`; see `config_digest`."""
    return canonical_digest(setting_config(config, search))


def canonical_digest(value: Any) -> str:
    """Return "sha256:..." of a value as canonical JSON.

    Raises:
        RecordError: If it has no place in JSON; names the key.
    """
    return json_digest(plain(value, "config"))


def json_digest(value: Any) -> str:
    """Return `canonical_digest` of a value that was read from JSON and so needs no check."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


_WORDS = ("path", "title", "group", "folder", "other_folders", "source", "licence", "citation", "notes", "selection")


def card_digest(card: TaskCard | ProtocolCard) -> str:
    """Return "sha256:..." of the fields of a card that can change a number: no titles, notes, sources or paths."""
    facts = {field.name: getattr(card, field.name) for field in dataclasses.fields(card) if field.name not in _WORDS}
    if isinstance(card, TaskCard):
        facts["reader"] = {"kind": card.reader.kind, "options": dict(card.reader.options)}
    return canonical_digest(facts)


def flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of each leaf."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _without(config: Mapping[str, Any], excluded: Collection[str], prefix: str = "") -> dict[str, Any]:
    rest: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" in excluded or value is None:
            continue
        if type(value) is dict or isinstance(value, Mapping):  # the first is faster
            inner = _without(value, excluded, f"{prefix}{key}.")
            if inner:
                rest[key] = inner
        else:
            rest[key] = value
    return rest


def plain(value: Any, key: str) -> Any:
    """Return `value` built of dict, list, str, int, float, bool and None only."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise RecordError(f"{key!r} is {value}, which JSON cannot hold; a record needs a finite number or null")
        return float(value)
    if isinstance(value, Mapping):
        for name in value:
            if not isinstance(name, str):
                raise RecordError(f"{key!r} has the key {name!r}; keys in a record are text")
        return {name: plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    raise RecordError(f"{key!r} is a {type(value).__name__} ({reprlib.repr(value)}), which JSON cannot hold")
