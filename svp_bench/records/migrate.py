"""Migrate records of schema 1, and configs from before their settings were grouped, to those of today.

`read_record` does so in memory, `svp-bench migrate` in the files.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from svp_bench.core.errors import RecordError, SvpBenchError
from svp_bench.core.resources import tasks_dirs
from svp_bench.records.digests import canonical_digest, cell_config, config_digest, setting_config, setting_digest
from svp_bench.tasks.cards import ProtocolCard, load_protocol, load_suite

_TASKS = {"own/pictures": "custom/images"}
_PROTOCOLS = {"own-final": "custom-final"}
_RECORD_VALUES: Mapping[str, Mapping[str, str]] = {
    "task": _TASKS,
    "suite": {"own": "custom"},
    "protocol": _PROTOCOLS,
    "data_variant": {"drawn": "synthetic"},
}
_VALUES = {"data.task": _TASKS, "data.protocol": _PROTOCOLS, "data.resize": {"straight": "squash"}}

MOVED: Mapping[str, tuple[str, Any]] = {
    "model.optimizer": ("model.optimizer.name", "adamw"),
    "model.betas": ("model.optimizer.betas", [0.9, 0.999]),
    "model.eps": ("model.optimizer.eps", 1e-8),
    "model.momentum": ("model.optimizer.momentum", 0.9),
    "model.warmup_start_factor": ("model.schedule.warmup_start_factor", 1e-3),
    "model.warmup_learning_rate": ("model.schedule.warmup_learning_rate", None),
    "model.min_learning_rate": ("model.schedule.min_learning_rate", 1e-5),
    "model.cosine_start": ("model.schedule.cosine_start", "warmup_end"),
    "model.schedule_interval": ("model.schedule.interval", "step"),
    "model.cooldown_epochs": ("model.schedule.cooldown_epochs", 0.0),
    "model.ema_decay": ("model.ema.decay", None),
    "model.ema_evaluate": ("model.ema.evaluate", False),
    "data.resize": ("data.transform.resize", None),
    "data.interpolation": ("data.transform.interpolation", None),
    "data.crop_ratio": ("data.transform.crop_ratio", 0.875),
    "data.train_crop": ("data.augment.crop", None),
    "data.crop_scale": ("data.augment.crop_scale", [0.08, 1.0]),
    "data.crop_aspect": ("data.augment.crop_aspect", [3 / 4, 4 / 3]),
    "data.flip": ("data.augment.flip", 0.0),
    "data.rand_augment": ("data.augment.rand_augment", None),
    "data.color_jitter": ("data.augment.color_jitter", 0.0),
    "data.random_erasing": ("data.augment.random_erasing", 0.0),
    "data.mixup": ("data.augment.mixup", 0.0),
    "data.cutmix": ("data.augment.cutmix", 0.0),
    "data.mix_probability": ("data.augment.mix_probability", 1.0),
    "data.mix_switch_probability": ("data.augment.mix_switch_probability", 0.5),
    "data.repeats": ("data.augment.repeats", 1),
    "data.folds": ("data.cross_validation.folds", None),
    "data.fold": ("data.cross_validation.fold", 0),
    "data.fold_seed": ("data.cross_validation.seed", 0),
}
"""Flat config keys of older versions → (key of today, the value that stood for null or a missing key)."""
_FILLED = {
    "model.head": "fresh",
    "model.cache_features": False,
    "data.allow_overlap": False,
}  # nulls or missing keys of today's flat settings


def is_flat(config: Mapping[str, Any]) -> bool:
    """Return whether a resolved config is from before the settings were grouped."""
    model = config.get("model")
    return isinstance(model, Mapping) and "betas" in model


def migrate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved config with the names of today for tasks, protocols and resizes."""
    new = dict(config)
    for key, values in _VALUES.items():
        group, name = key.split(".")
        section = new.get(group)
        if isinstance(section, Mapping) and isinstance(section.get(name), str) and section[name] in values:
            new[group] = {**section, name: values[section[name]]}
    return new


def group_settings(config: Mapping[str, Any], version: int | None = None) -> dict[str, Any]:
    """Return a flat resolved config with its settings grouped, and explicit values for nulls that stood for defaults.

    Args:
        config: A resolved config; a grouped one is returned as it is.
        version: Version of the protocol card whose image size and transform the nulls stood for; by default that of
            today. Of another version they stay null.
    """
    if not is_flat(config):
        return dict(config)
    new: dict[str, Any] = {**config}
    for group in ("model", "data"):
        section = config.get(group)
        if not isinstance(section, Mapping):
            continue
        new[group] = {key: value for key, value in section.items() if f"{group}.{key}" not in MOVED}
        for old, (key, default) in MOVED.items():
            _, name = old.split(".")
            if old.startswith(f"{group}."):
                _, part, inner = key.split(".")
                new[group].setdefault(part, {})[inner] = _value(section.get(name), default)
        for key, default in _FILLED.items():
            if key.startswith(f"{group}."):
                name = key.removeprefix(f"{group}.")
                new[group][name] = _value(section.get(name), default)
    data = new.get("data")
    if isinstance(data, dict):
        protocol = _protocol(str(data.get("task")), data.get("protocol"), tasks_dirs())
        if protocol is not None and version in (None, protocol.version):
            layer = protocol.layer["data"]
            data["transform"] = {key: value or layer["transform"].get(key) for key, value in data["transform"].items()}
            data["image_size"] = data.get("image_size") or layer.get("image_size")
    return new


def _value(given: Any, default: Any) -> Any:
    """Return a setting's value, with the type that today's config has."""
    if given is None:
        return default
    return float(given) if isinstance(default, float) and type(given) is int else given


@cache
def _protocol(task: str, name: object, folders: tuple[Path, ...]) -> ProtocolCard | None:
    try:
        return load_protocol(name if isinstance(name, str) else load_suite(task.partition("/")[0]).protocol)
    except SvpBenchError:  # a card of another time
        return None


def migrate_record(data: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the JSON of a record as that of today's schema; one of today's is returned as it is.

    Args:
        data: The record's JSON object, of schema 1 or 2.
        where: Begins each error.

    Raises:
        RecordError: If a digest does not belong to the config, so that the change would hide an edited record.
    """
    if data["schema"] == 1:
        return from_schema_1(data, where)
    config = data.get("config")
    if not isinstance(config, Mapping) or not is_flat(config):
        return data
    keys = _Keys.of(data.get("search"))
    _refuse_edited(
        data, {"config_digest": config_digest(config), "setting_digest": setting_digest(config, keys)}, where
    )
    return {"migrated_from": {"schema": "2"}, **data, **_regrouped(data, keys)}


def _regrouped(data: Mapping[str, Any], keys: _Keys | None) -> dict[str, Any]:
    """Return the grouped config of a record and its digests."""
    version = data.get("protocol_version")
    config = group_settings(data["config"], version if isinstance(version, int) else 0)
    return {
        "config": config,
        "config_digest": config_digest(config),
        "setting_digest": setting_digest(config, keys),
    }


def from_schema_1(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the JSON of a schema-1 record as that of schema 2.

    Keys get their new names, the table of tuned values goes, and the digests of the config are computed anew.

    Args:
        data: The record's JSON object.
        where: Begins each error.

    Raises:
        RecordError: If a digest does not belong to the config, so that the change would hide an edited record.
    """
    _check_digests(data, data.get("tuned"), where)
    new = {**data, "schema": 2}
    if "lists" in new:
        new["splits"] = new.pop("lists")
    if "tuned" in new:
        new["search"] = _search(new.pop("tuned"))
    for key in ("correct", "val_correct"):
        if isinstance(bits := new.get(key), Mapping):
            new[key] = {name.replace("list", "split"): value for name, value in bits.items()}
    for key, values in _RECORD_VALUES.items():
        if isinstance(new.get(key), str):
            new[key] = values.get(new[key], new[key])
    if isinstance(new.get("config"), Mapping):
        new["config"] = migrate_config(new["config"])
        new |= _regrouped(new, _Keys.of(new.get("search")))
        old = {key: data[key] for key in ("config_digest", "setting_digest") if key in data}
        new["migrated_from"] = {"schema": "1", **old}
    return new


class _Keys:
    """The selected keys and the declaration's digest of a search that is not validated yet."""

    def __init__(self, search: Mapping[str, Any]) -> None:
        self.keys = tuple(key for key in search.get("keys") or () if isinstance(key, str))
        self.declaration = str(search.get("declaration"))

    @classmethod
    def of(cls, search: object) -> _Keys | None:
        return cls(search) if isinstance(search, Mapping) else None


def _search(tuned: Any) -> Any:
    """Return the search of a schema-1 block `tuned`; None if it records no search."""
    if not isinstance(tuned, Mapping):
        return tuned
    search = tuned.get("search")
    if not isinstance(search, Mapping):
        return None
    new = {("selected_config" if key == "choice" else key): value for key, value in search.items()}
    return {**new, "declaration": tuned.get("digest"), "keys": tuned.get("keys")}


def _check_digests(data: Mapping[str, Any], tuned: Any, where: str) -> None:
    config = data.get("config")
    if not isinstance(config, Mapping):
        return
    expected = {"config_digest": canonical_digest(cell_config(config))}
    if isinstance(tuned, Mapping):
        keys = _Keys({"keys": tuned.get("keys"), "declaration": tuned.get("digest")})
        setting = {key: value for key, value in setting_config(config, keys).items() if key != "search"}
        expected["setting_digest"] = canonical_digest({**setting, "tuned": tuned.get("digest")})
    else:
        expected["setting_digest"] = setting_digest(config)
    _refuse_edited(data, expected, where)


def _refuse_edited(data: Mapping[str, Any], expected: Mapping[str, str], where: str) -> None:
    for key, digest in expected.items():
        if key in data and data[key] != digest:
            raise RecordError(f"{where}: {key!r} does not belong to the config: it should be {digest}")
