"""Names of rows: the method, and the values that differ if a method has several settings."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from svp_bench.core.errors import plural
from svp_bench.records.defaults import row_setting
from svp_bench.records.record import Record
from svp_bench.tasks.cards import OTHER_PIXELS


def data_key(record: Record, as_found: Collection[str]) -> str:
    """Return the key of the data whose runs have a section of their own; "" for the data of a card.

    Args:
        record: A run.
        as_found: Tasks whose card leaves classes and counts to the data: a custom data set is keyed by its digest.
    """
    if record.task in as_found:
        return f"{record.data_variant} {record.data_digest or ''}"
    return record.data_variant if record.data_variant in OTHER_PIXELS else ""


def data_name(records: Sequence[Record], as_found: Collection[str]) -> str:
    """Return the name of the data of `records`, which have one `data_key`; "" for the data of a card.

    That of a custom data set has its folders, number of classes and first digits of the digest.
    """
    if records[0].task not in as_found:
        key = data_key(records[0], as_found)
        return f"data from {key}" if key else ""
    folders = sorted({str(record.config.get("data", {}).get("root") or "") for record in records})
    named = sorted({_folder(folder) for folder in folders})
    scored = [record.metrics.per_class for record in records if record.metrics and record.metrics.per_class]
    classes = len(scored[0].count) if scored else records[0].config.get("model", {}).get("num_classes")
    parts = [" or ".join(name for name in named if name) or "custom data"]
    if isinstance(classes, int):
        parts.append(plural(classes, "class"))
    return ", ".join([*parts, f"data {short_value(records[0].data_digest)}"])


def _folder(path: str) -> str:
    """The last part of a path that is a name, of either kind of separator."""
    return next((part for part in reversed(re.split(r"[/\\]", path)) if part not in ("", ".", "..")), "")


def row_labels(rows: Mapping[tuple[str, str], Record]) -> dict[tuple[str, str], str]:
    """Name each (method, setting digest) by the method, and by the values that differ if it has several.

    Args:
        rows: (method, setting digest) → any record of the row. The labels tell these rows apart, and no others.
    """
    labels: dict[tuple[str, str], str] = {}
    for method in {method for method, _ in rows}:
        settings = {key: dict(_flat(row_setting(record))) for key, record in rows.items() if key[0] == method}
        names = {name for setting in settings.values() for name in setting}
        differing = sorted(name for name in names if _differs(name, list(settings.values())))
        shown = _short_names(differing)
        for key, setting in settings.items():
            parts = [f"{shown[name]}={short_value(setting[name])}" for name in differing if name in setting]
            labels[key] = f"{method} ({', '.join(parts)})" if parts else method
    counts = Counter(labels.values())  # 4 and "4" look alike: then the digest has to tell the rows apart
    return {key: label if counts[label] == 1 else f"{label} [{short_value(key[1])}]" for key, label in labels.items()}


def _differs(name: tuple[str, ...], settings: Sequence[Mapping[tuple[str, ...], Any]]) -> bool:
    values = {json.dumps(setting[name]) if name in setting else "" for setting in settings}  # "" is no JSON: absent
    return len(values) > 1


def _flat(config: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterable[tuple[tuple[str, ...], Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*prefix, key))
        else:
            yield (*prefix, key), value


def short_value(value: Any) -> str:
    """Return a config value as short text: of a digest its first twelve digits, else the value as JSON writes it."""
    if isinstance(value, str):
        return value.removeprefix("sha256:")[:12] if value.startswith("sha256:") else value
    return json.dumps(value, separators=(",", ":"))


def _short_names(names: Sequence[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Give each dotted key its last part, and as many parts before it as it takes to tell the keys apart."""
    # `class_path` and `init_args` are jsonargparse's; they tell a reader nothing
    shown = {name: tuple(part for part in name if part not in ("class_path", "init_args")) or name for name in names}
    short: dict[tuple[str, ...], str] = {}
    for name, parts in shown.items():
        size = 1
        while size < len(parts) and sum(other[-size:] == parts[-size:] for other in shown.values()) > 1:
            size += 1
        short[name] = ".".join(parts[-size:])
    return short
