"""From the JSON of a record to a `Record`: types, values, and facts that must not contradict each other."""

from __future__ import annotations

import dataclasses
import math
import re
import reprlib
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from svp_bench._version import __version__
from svp_bench.core.errors import RecordError, plural, unknown_name
from svp_bench.records.bits import count_ones
from svp_bench.records.digests import config_digest, setting_digest
from svp_bench.records.record import (
    CREATED,
    DATA_STATUSES,
    ENCODING,
    KINDS,
    METHOD,
    SCHEMA,
    STATUSES,
    Correct,
    Metrics,
    Parameters,
    PerClass,
    Record,
    Search,
    Tuned,
)

__all__ = ["parse"]

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TASK = re.compile(r"[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*")
_TOP1_TOLERANCE = 1e-3  # percent: top1 may have gone through float32
_OTHER_FILES = {  # what might be taken for a record, by its schema
    "svp-bench/replication-1": "a replication, its best epoch picked on the test list: no table of results takes it",
    "svp-bench/choice-1": "the frozen choice of a search, which belongs below choices/",
    "svp-bench/choice-2": "the frozen choice of a search, which belongs below choices/",
}

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def parse(data: Any, where: str) -> Record:
    """Check `data` against the schema and return the record; see `Record.from_json`."""
    record = _parse(data, where)
    _check_facts(record, where)
    return record


class _Fields:
    """The keys of one JSON object of a record, each taken with a check of its type."""

    def __init__(self, data: Any, cls: type, where: str, inside: str = "") -> None:
        self._where, self._inside = where, f"{inside}." if inside else ""
        if not isinstance(data, Mapping):
            raise RecordError(f"{where}: {inside or 'the record'} must be a JSON object, not {_short.repr(data)}")
        fields = dataclasses.fields(cls)
        names = [field.name for field in fields]
        for key in data:
            if key not in names:
                raise unknown_name("record key", f"{self._inside}{key}", names, where=where, error=RecordError)
        for field in fields:
            if field.name not in data and field.default is dataclasses.MISSING:
                raise RecordError(f"{where}: the key {self._inside + field.name!r} is missing")
        self._data = data

    def _take(self, key: str, wanted: str, fits: Callable[[Any], bool]) -> Any:
        value = self._data[key]
        if not fits(value):
            raise RecordError(f"{self._where}: {self._inside + key!r} must be {wanted}, not {_short.repr(value)}")
        return value

    def text(self, key: str, pattern: re.Pattern[str] | None = None, wanted: str = "text") -> str:
        def fits(value: Any) -> bool:
            return isinstance(value, str) and value != "" and (pattern is None or bool(pattern.fullmatch(value)))

        return str(self._take(key, wanted, fits))

    def text_or_null(self, key: str) -> str | None:
        return None if self._data[key] is None else self.text(key, wanted="text or null")

    def digest(self, key: str) -> str:
        return self.text(key, _DIGEST, "'sha256:' and 64 hexadecimal digits")

    def digest_or_null(self, key: str) -> str | None:
        return None if self._data[key] is None else self.digest(key)

    def choice(self, key: str, allowed: Sequence[str]) -> str:
        return str(self._take(key, f"one of {', '.join(allowed)}", lambda value: value in allowed))

    def integer(self, key: str, least: int | None = 0) -> int:
        def fits(value: Any) -> bool:
            return isinstance(value, int) and not isinstance(value, bool) and (least is None or value >= least)

        return int(self._take(key, "an integer" if least is None else f"an integer of at least {least}", fits))

    def number(self, key: str) -> float:
        return float(self._take(key, "a finite number", _is_number))

    def number_if_there(self, key: str) -> float | None:
        return self.number(key) if key in self._data else None

    def integers(self, key: str) -> tuple[int, ...]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(
                isinstance(item, int) and not isinstance(item, bool) and item >= 0 for item in value
            )

        return tuple(self._take(key, "a list of integers of at least 0", fits))

    def number_or_null(self, key: str) -> float | None:
        return None if self._data[key] is None else self.number(key)

    def flag_or_null(self, key: str) -> bool | None:
        value = self._take(key, "true, false or null", lambda value: value is None or isinstance(value, bool))
        return None if value is None else bool(value)

    def mapping(self, key: str, wanted: str = "an object", fits: Callable[[Any], bool] = lambda _: True) -> Any:
        def all_fit(value: Any) -> bool:
            return isinstance(value, Mapping) and all(isinstance(name, str) and fits(value[name]) for name in value)

        return dict(self._take(key, wanted, all_fit))

    def texts(self, key: str) -> list[str]:
        def fits(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)

        return list(self._take(key, "a list of texts", fits))

    def holds(self, key: str, nothing: Any) -> bool:
        return bool(self._data[key] != nothing)

    def has(self, key: str) -> bool:
        return key in self._data

    def inner(self, key: str, cls: type) -> _Fields:
        return _Fields(self._data[key], cls, self._where, f"{self._inside}{key}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and bool(_DIGEST.fullmatch(value))


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _parse(data: Any, where: str) -> Record:
    if isinstance(data, Mapping) and _is_text(data.get("schema")) and data["schema"] in _OTHER_FILES:
        raise RecordError(f"{where}: is no record but {_OTHER_FILES[data['schema']]}")
    if isinstance(data, Mapping) and data.get("schema") != SCHEMA:
        given = _short.repr(data["schema"]) if "schema" in data else "missing"
        raise RecordError(f"{where}: 'schema' is {given}; this svp-bench {__version__} reads schema {SCHEMA}")
    take = _Fields(data, Record, where)
    parameters = take.inner("parameters", Parameters)
    return Record(
        schema=SCHEMA,
        run_id=take.text("run_id", _RUN_ID, "a name of letters, digits, '-' and '_'"),
        created=take.text("created"),
        task=take.text("task", _TASK, "'<suite>/<task>'"),
        task_version=take.integer("task_version", 1),
        suite=take.text("suite"),
        kind=take.choice("kind", KINDS),
        status=take.choice("status", STATUSES),
        status_reason=take.text_or_null("status_reason"),
        method=take.text("method", METHOD, "a method's name"),
        method_args=take.mapping("method_args"),
        backbone=take.text("backbone"),
        checkpoint=take.text("checkpoint"),
        checkpoint_digest=take.digest_or_null("checkpoint_digest"),
        protocol=take.text("protocol"),
        protocol_version=take.integer("protocol_version", 1),
        stage=take.text("stage"),
        lists=take.mapping("lists", "an object of texts", _is_text),
        data_variant=take.text("data_variant"),
        data_status=take.choice("data_status", DATA_STATUSES),
        data_notes=take.texts("data_notes"),
        data_digest=take.digest_or_null("data_digest"),
        seed=take.integer("seed", None),
        config=take.mapping("config"),
        config_digest=take.digest("config_digest"),
        setting_digest=take.digest("setting_digest"),
        tuned=_parse_tuned(take),
        package_version=take.text("package_version"),
        commit=take.text_or_null("commit"),
        dirty=take.flag_or_null("dirty"),
        libraries=take.mapping("libraries", "an object of texts", _is_text),
        scan_backend=take.text("scan_backend"),
        scan_reason=take.text_or_null("scan_reason"),
        device=take.text("device"),
        device_count=take.integer("device_count", 1),
        precision=take.text("precision"),
        metrics=_parse_metrics(take),
        correct=_parse_correct(take),
        parameters=Parameters(
            parameters.integer("trainable"),
            parameters.integer("head"),
            parameters.integer("adapter"),
            parameters.integer("total"),
        ),
        times=take.mapping("times", "an object of finite numbers", _is_number),
        epochs=take.integer("epochs"),
        images_per_second=take.number_or_null("images_per_second"),
        peak_memory_mib=take.number_or_null("peak_memory_mib"),
        checkpoint_file=take.text_or_null("checkpoint_file"),
        weights_digest=take.digest("weights_digest") if take.has("weights_digest") else None,
        checkpoint_load=take.mapping("checkpoint_load", "an object of lists of texts", _is_texts)
        if take.has("checkpoint_load")
        else None,
        method_source=take.mapping("method_source", "an object of digests", _is_digest)
        if take.has("method_source")
        else None,
        package_digest=take.digest("package_digest") if take.has("package_digest") else None,
        cpu=take.text("cpu") if take.has("cpu") else None,
        external_classes=take.texts("external_classes") if take.has("external_classes") else None,
        not_comparable=take.texts("not_comparable") if take.has("not_comparable") else None,
        image_notes=take.mapping("image_notes", "an object of counts", _is_count) if take.has("image_notes") else None,
        content_digests=take.mapping("content_digests", "an object of digests", _is_digest)
        if take.has("content_digests")
        else None,
        card_digests=take.mapping("card_digests", "an object of digests", _is_digest)
        if take.has("card_digests")
        else None,
        val_correct=_parse_correct(take, "val_correct") if take.has("val_correct") else None,
    )


def _parse_tuned(record: _Fields) -> Tuned | None:
    if not record.holds("tuned", None):
        return None
    take = record.inner("tuned", Tuned)
    return Tuned(
        table=take.text("table"),
        digest=take.digest("digest"),
        keys=tuple(take.texts("keys")),
        search=_parse_search(take) if take.has("search") else None,
    )


def _parse_search(tuned: _Fields) -> Search:
    take = tuned.inner("search", Search)
    return Search(
        name=take.text("name"),
        sampler=take.text("sampler"),
        budget=take.integer("budget", 1),
        trials=take.integer("trials", 1),
        selected_on=take.text("selected_on"),
        choice=take.digest("choice"),
        tried=take.integer("tried", 1) if take.has("tried") else None,
        nested=take.flag_or_null("nested") if take.has("nested") else None,
        folds=take.integer("folds") if take.has("folds") else None,
        at_edge=tuple(take.texts("at_edge")) if take.has("at_edge") else None,
        ties=take.integer("ties", 1) if take.has("ties") else None,
    )


def _parse_metrics(record: _Fields) -> Metrics | None:
    if not record.holds("metrics", {}):
        return None
    take = record.inner("metrics", Metrics)
    return Metrics(
        top1=take.number("top1"),
        loss=take.number("loss"),
        correct=take.integer("correct"),
        count=take.integer("count", 1),
        top5=take.number_if_there("top5"),
        balanced_accuracy=take.number_if_there("balanced_accuracy"),
        nll=take.number_if_there("nll"),
        ece=take.number_if_there("ece"),
        per_class=_parse_per_class(take) if take.has("per_class") else None,
    )


def _parse_per_class(metrics: _Fields) -> PerClass:
    take = metrics.inner("per_class", PerClass)
    return PerClass(correct=take.integers("correct"), count=take.integers("count"))


def _parse_correct(record: _Fields, key: str = "correct") -> Correct | None:
    if not record.holds(key, None):
        return None
    take = record.inner(key, Correct)
    return Correct(
        encoding=take.choice("encoding", (ENCODING,)),
        count=take.integer("count", 1),
        bits=take.text("bits"),
        list=take.text("list"),
        list_digest=take.digest("list_digest"),
    )


def _check_facts(record: Record, where: str) -> None:
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
        raise refuse("data_digest", f"is null; a run that is {record.status} has read its lists")
    if record.status not in ("complete", "unscored") and record.status_reason is None:
        raise refuse("status_reason", f"is null; a run that is {record.status} says why")
    for key in ("config_digest", "setting_digest"):
        digest = config_digest(record.config) if key == "config_digest" else setting_digest(record.config, record.tuned)
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
        if ones != metrics.correct and key == "correct":  # of val_correct the audit says it
            raise refuse(f"{key}.bits", f"has {ones} ones, but metrics.correct is {metrics.correct}")


def _check_metrics(metrics: Metrics, refuse: Callable[[str, str], RecordError]) -> None:
    """Refuse optional scores that contradict the others."""
    for key in ("top5", "balanced_accuracy", "ece"):
        value = getattr(metrics, key)
        if value is not None and not 0 <= value <= 100 + _TOP1_TOLERANCE:
            raise refuse(f"metrics.{key}", f"is {value}, which is no percentage")
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
