"""Validate the JSON of a record: types, values, and facts that must not contradict each other."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import lru_cache
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from svp_bench._version import __version__
from svp_bench.core.errors import RecordError, plural
from svp_bench.core.validate import convert
from svp_bench.records.bits import count_ones
from svp_bench.records.digests import cell_config, json_digest, plain, setting_config
from svp_bench.records.migrate import migrate_record
from svp_bench.records.record import CREATED, SCHEMA, Metrics, Record, SearchSummary

_SEED = "seed_everything"
_TOP1_TOLERANCE = 1e-3  # percent: top1 may have gone through float32
_OTHER_FILES = {  # what might be taken for a record, by its schema
    "svp-bench/replication-1": "a replication, with its best epoch chosen on test; tables refuse it",
    "svp-bench/choice-1": "the selected config of a search, which belongs below selected_configs/",
    "svp-bench/choice-2": "the selected config of a search, which belongs below selected_configs/",
}


def parse_record(data: Any, where: str = "record") -> Record:
    """Validate the JSON of a record and return the record; one of schema 1 is migrated.

    Args:
        data: Parsed JSON.
        where: Begins each error.

    Raises:
        RecordError: On an unknown or missing key, a wrong type or value, an unknown schema, or contradicting facts.
            Names the key.
    """
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if isinstance(schema, str) and schema in _OTHER_FILES:
        raise RecordError(f"{where}: is not a record but {_OTHER_FILES[schema]}")
    if isinstance(data, Mapping) and schema in (1, SCHEMA):
        data = migrate_record(data, where)
    elif isinstance(data, Mapping):
        given = repr(schema) if "schema" in data else "missing"
        raise RecordError(f"{where}: 'schema' is {given}; svp-bench {__version__} reads the schemas 1 and {SCHEMA}")
    if isinstance(data, Mapping) and data.get("metrics") == {}:
        data = {**data, "metrics": None}
    record = convert(data, Record, where, RecordError, "record")
    shared, digests = _without_seed(*_config_key(record))  # the seeds of a cell share one config in memory
    _check_facts(record, digests, where)
    return replace(record, config={**shared, _SEED: record.config[_SEED]} if _SEED in record.config else shared)


def _config_key(record: Record) -> tuple[str, SearchSummary | None]:
    """Return the config without its seed as text, and the search: what both digests depend on."""
    config = {key: value for key, value in record.config.items() if key != _SEED}
    try:
        return json.dumps(config, allow_nan=False), record.search
    except ValueError:
        return json.dumps(plain(config, "config")), record.search  # raises, and names the key


@lru_cache(maxsize=8192)
def _without_seed(text: str, search: SearchSummary | None) -> tuple[dict[str, Any], dict[str, str]]:
    config = json.loads(text)
    cell = cell_config(config)
    digests = {"config_digest": json_digest(cell), "setting_digest": json_digest(setting_config(cell, search))}
    return config, digests


def _check_facts(record: Record, digests: Mapping[str, str], where: str) -> None:
    """Raise RecordError if the facts of a well-typed record contradict each other."""

    def refuse(key: str, why: str) -> RecordError:
        return RecordError(f"{where}: {key!r} {why}")

    try:
        datetime.strptime(record.created, CREATED)
    except ValueError:
        raise refuse("created", f"must be UTC like 2026-01-31T12:00:00+00:00, not {record.created!r}") from None
    if record.suite != record.task.split("/")[0]:
        raise refuse("suite", f"is {record.suite!r}, but the task is {record.task!r}")
    if (record.checkpoint_digest is None) != (record.checkpoint == "none"):
        raise refuse("checkpoint_digest", f"is {record.checkpoint_digest!r} for the checkpoint {record.checkpoint!r}")
    if record.status in ("complete", "unscored") and record.data_digest is None:
        raise refuse("data_digest", f"is null; a run that is {record.status} has read its splits")
    if record.status not in ("complete", "unscored") and record.status_reason is None:
        raise refuse("status_reason", f"is null; a run that is {record.status} needs a reason")
    for key, digest in digests.items():
        if getattr(record, key) != digest:
            raise refuse(key, f"does not belong to the config: it should be {digest}")
    counts = record.parameters
    if counts.trainable != counts.adapter + counts.head or counts.trainable > counts.total:
        raise refuse(
            "parameters",
            f"do not add up: trainable {counts.trainable}, adapter {counts.adapter}, head {counts.head}, "
            f"total {counts.total}",
        )
    file = record.checkpoint_file
    if file is not None and (PurePosixPath(file).is_absolute() or PureWindowsPath(file).drive):
        raise refuse("checkpoint_file", f"must be relative to the runs folder, not {file!r}")
    _check_scores(record, refuse)


def _check_scores(record: Record, refuse: Callable[[str, str], RecordError]) -> None:
    metrics, correct = record.metrics, record.correct
    if record.status == "complete" and metrics is None:
        raise refuse("metrics", "is empty; a complete record has its scores")
    if record.status == "complete" and record.kind == "final" and correct is None:
        raise refuse("correct", "is null; a complete final record has one bit for each test image")
    if record.status == "unscored" and (metrics is not None or correct is not None):
        raise refuse("status", "is unscored, but the record has scores")
    if metrics is not None and metrics.correct > metrics.count:
        raise refuse("metrics.correct", f"is {metrics.correct} of only {metrics.count}")
    if metrics is not None and abs(metrics.top1 - 100 * metrics.correct / metrics.count) > _TOP1_TOLERANCE:
        raise refuse("metrics.top1", f"is {metrics.top1}, but {metrics.correct} of {metrics.count} are right")
    if metrics is not None:
        _check_metrics(metrics, refuse)
    if record.val_correct is not None and (record.kind != "selection" or correct is not None):
        raise refuse("val_correct", "belongs to a selection record, which has no other bits")
    for key, bits in (("correct", correct), ("val_correct", record.val_correct)):
        if bits is None:
            continue
        try:
            ones = count_ones(bits.bits, bits.count)
        except RecordError as error:
            raise refuse(f"{key}.bits", f"does not fit: {error}") from None
        if metrics is None or bits.count != metrics.count:
            raise refuse(f"{key}.count", f"is {bits.count}, but metrics.count is {metrics and metrics.count}")
        if ones != metrics.correct and key == "correct":  # the audit checks val_correct
            raise refuse(f"{key}.bits", f"has {ones} ones, but metrics.correct is {metrics.correct}")


def _check_metrics(metrics: Metrics, refuse: Callable[[str, str], RecordError]) -> None:
    """Refuse optional scores that contradict the others."""
    for key in ("top5", "balanced_accuracy", "ece"):
        value = getattr(metrics, key)
        if value is not None and not 0 <= value <= 100 + _TOP1_TOLERANCE:
            raise refuse(f"metrics.{key}", f"is {value}, which is not a percentage")
    if metrics.top5 is not None and metrics.top5 < metrics.top1 - _TOP1_TOLERANCE:
        raise refuse("metrics.top5", f"is {metrics.top5}, less than top1 {metrics.top1}")
    if metrics.nll is not None and metrics.nll != metrics.loss:
        raise refuse("metrics.nll", f"is {metrics.nll}, but metrics.loss, the same number, is {metrics.loss}")
    if metrics.per_class is None:
        return
    correct, count = metrics.per_class.correct, metrics.per_class.count
    if len(correct) != len(count):
        raise refuse("metrics.per_class", f"has {plural(len(correct), 'class')} in correct and {len(count)} in count")
    for name, given, total in (("correct", correct, metrics.correct), ("count", count, metrics.count)):
        if sum(given) != total:
            raise refuse(f"metrics.per_class.{name}", f"adds up to {sum(given)}, but metrics.{name} is {total}")
    for label, (right, images) in enumerate(zip(correct, count, strict=True)):
        if right > images:
            raise refuse("metrics.per_class", f"has {right} of only {images} right in class {label}")
    shares = [100 * right / images for right, images in zip(correct, count, strict=True) if images]
    mean = math.fsum(shares) / len(shares)
    if metrics.balanced_accuracy is not None and abs(metrics.balanced_accuracy - mean) > _TOP1_TOLERANCE:
        raise refuse("metrics.balanced_accuracy", f"is {metrics.balanced_accuracy}, but metrics.per_class gives {mean}")
