"""Migrate records of schema 1 to schema 2; `read_record` does so in memory, `svp-bench migrate` in the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from svp_bench.core.errors import RecordError
from svp_bench.records.digests import canonical_digest, cell_config, config_digest, setting_config, setting_digest

__all__ = ["from_schema_1", "migrate_config"]

_TASKS = {"own/pictures": "custom/images"}
_PROTOCOLS = {"own-final": "custom-final"}
_VALUES = {"data.task": _TASKS, "data.protocol": _PROTOCOLS, "data.resize": {"straight": "squash"}}


def migrate_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved config of schema 1 with the values of today."""
    new = dict(config)
    for key, values in _VALUES.items():
        group, name = key.split(".")
        section = new.get(group)
        if isinstance(section, Mapping) and isinstance(section.get(name), str) and section[name] in values:
            new[group] = {**section, name: values[section[name]]}
    return new


def from_schema_1(data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the JSON of a schema-1 record as that of schema 2.

    Keys get their new names, the table of tuned values goes, and the digests of the config are computed anew.

    Args:
        data: The record's JSON object.
        where: Begins each error.

    Raises:
        RecordError: If a digest does not belong to the config, so that the change would hide an edited record.
    """
    tuned = data.get("tuned")
    _check_digests(data, tuned, where)
    new: dict[str, Any] = {}
    for key, value in data.items():
        if key == "lists":
            new["splits"] = value
        elif key == "tuned":
            new["search"] = _search(tuned)
        elif key in ("correct", "val_correct") and isinstance(value, Mapping):
            renamed = {"list": "split", "list_digest": "split_digest"}
            new[key] = {renamed.get(name, name): item for name, item in value.items()}
        elif key == "config" and isinstance(value, Mapping):
            new[key] = migrate_config(value)
        elif key == "data_variant" and value == "drawn":
            new[key] = "synthetic"
        elif key == "task":
            new[key] = _TASKS.get(value, value) if isinstance(value, str) else value
        elif key == "suite" and value == "own":
            new[key] = "custom"
        elif key == "protocol":
            new[key] = _PROTOCOLS.get(value, value) if isinstance(value, str) else value
        else:
            new[key] = value
    new["schema"] = 2
    if isinstance(new.get("config"), Mapping):
        keys = _Keys(new["search"]) if isinstance(new.get("search"), Mapping) else None
        new["config_digest"] = config_digest(new["config"])
        new["setting_digest"] = setting_digest(new["config"], keys)
        old = {key: data[key] for key in ("config_digest", "setting_digest") if key in data}
        new["migrated_from"] = {"schema": "1", **old}
    return new


class _Keys:
    """The selected keys and the declaration's digest of a search that is not validated yet."""

    def __init__(self, search: Mapping[str, Any]) -> None:
        self.keys = tuple(key for key in search.get("keys") or () if isinstance(key, str))
        self.declaration = str(search.get("declaration"))


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
    for key, digest in expected.items():
        if key in data and data[key] != digest:
            raise RecordError(f"{where}: {key!r} does not belong to the config: it should be {digest}")
