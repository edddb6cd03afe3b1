"""Records: one run, one small JSON file with everything that made its numbers. Schema 1; this text is the reference.

A record is `<results root>/records/<suite>/<task>/<run_id>.json`, pretty-printed. The top-level keys stand in the order
of `Record`'s fields, the keys of inner mappings in alphabetical order, so equal records are equal bytes. Files are
written aside, fsynced and renamed. Nothing changes afterwards, except that an unscored record may become complete.

A *cell* is task, protocol, backbone, checkpoint digest, data variant, data digest, method and `config_digest`; its
seeds are averaged. A table *row* is protocol, backbone, checkpoint digest, method and `setting_digest`: the config
without the task and what a tuned table set for it.
"""

from __future__ import annotations

import base64
import binascii
import dataclasses
import hashlib
import json
import math
import os
import re
import reprlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any

from svp_bench.errors import RecordError, unknown_name

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = [
    "CELL_EXCLUDED",
    "DATA_STATUSES",
    "KINDS",
    "SCHEMA",
    "SETTING_EXCLUDED",
    "STATUSES",
    "Correct",
    "Metrics",
    "Parameters",
    "PerClass",
    "Problem",
    "Record",
    "Tuned",
    "cell_config",
    "check_writable",
    "config_digest",
    "continue_record",
    "new_run_id",
    "pack_bits",
    "read_record",
    "read_records",
    "replace_record",
    "setting_config",
    "setting_digest",
    "timestamp",
    "unpack_bits",
    "write_atomically",
    "write_record",
]

SCHEMA = 1
KINDS = ("final", "selection")
STATUSES = ("complete", "unscored", "truncated", "failed", "interrupted")
DATA_STATUSES = ("as_card", "different")
ENCODING = "base64+packbits"

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
    "data.eval_batch_size": "device: each picture is scored by itself",
    "data.num_workers": "device",
    "model.scan_backend": "device: every backend is tested against the reference",
    "model.grad_checkpointing": "device: memory for time, the same numbers",
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
    # what is printed, watched and kept
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

_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_METHOD = re.compile(r"[a-z][a-z0-9_]*")
_TASK = re.compile(r"[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*")
_CREATED = "%Y-%m-%dT%H:%M:%S+00:00"
_SAME_RUN = (
    *("run_id", "created", "kind", "seed", "method", "backbone", "checkpoint_digest", "task_version", "protocol"),
    *("protocol_version", "data_variant", "data_digest", "config_digest", "setting_digest"),
)
_TOP1_TOLERANCE = 1e-3  # percent: top1 may have gone through float32

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True)
class Tuned:
    """The tuned table that a run took values from.

    Attributes:
        table: The table's name, e.g. "vtab/svp".
        digest: "sha256:..." of the table's file.
        keys: Dotted config keys whose values came from it; they may differ between the tasks of one table row.
    """

    table: str
    digest: str
    keys: tuple[str, ...]


@dataclass(frozen=True)
class PerClass:
    """The pictures of each class; the position in a list is the class.

    Attributes:
        correct: Pictures of the class that are classified rightly.
        count: Pictures of the class; 0 if the list has none.
    """

    correct: tuple[int, ...]
    count: tuple[int, ...]


@dataclass(frozen=True)
class Metrics:
    """What the test (or, in a selection record, the val) list gave.

    What is None is left out of the JSON: older records have the first four alone.

    Attributes:
        top1: Accuracy in percent.
        loss: Mean cross entropy without label smoothing, in nats.
        correct: Pictures classified rightly.
        count: Pictures in the list.
        top5: Top-5 accuracy in percent; None for tasks of fewer than six classes.
        balanced_accuracy: Mean accuracy of the classes that occur in the list, in percent.
        nll: Mean negative log-likelihood in nats: `loss`, by its other name.
        ece: Expected calibration error in percent (top label, 15 bins of equal width; Guo et al. 2017).
        per_class: Right and all pictures of each class.
    """

    top1: float
    loss: float
    correct: int
    count: int
    top5: float | None = None
    balanced_accuracy: float | None = None
    nll: float | None = None
    ece: float | None = None
    per_class: PerClass | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what is known as plain JSON values; the order of the keys is that of the fields.

        Raises:
            RecordError: If a number is not finite; names the key.
        """
        known = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.per_class is not None:
            known["per_class"] = {"correct": self.per_class.correct, "count": self.per_class.count}
        return {key: _plain(value, f"metrics.{key}") for key, value in known.items() if value is not None}


@dataclass(frozen=True)
class Correct:
    """One bit for each picture of a list, in the list's order: was it classified rightly?

    Attributes:
        encoding: "base64+packbits": see `pack_bits`.
        count: Pictures in the list.
        bits: The packed bits.
        list: Name of the list, e.g. "test".
        list_digest: "sha256:..." of the list.
    """

    encoding: str
    count: int
    bits: str
    list: str
    list_digest: str

    @classmethod
    def of(cls, right: NDArray[np.bool_], list_name: str, list_digest: str) -> Correct:
        """Pack `right`, shape (pictures,), in the order of the list `list_name`."""
        return cls(ENCODING, int(right.size), pack_bits(right), list_name, list_digest)


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are.

    Attributes:
        trainable: All that train: adapter + head.
        head: Those of the head that train.
        adapter: Those outside the head that train (for full fine-tuning: the backbone's).
        total: All of the model, frozen ones included.
    """

    trainable: int
    head: int
    adapter: int
    total: int


@dataclass(frozen=True)
class Record:
    """One run. The field names are the JSON keys; digests are "sha256:" and 64 hexadecimal digits.

    Attributes:
        schema: 1.
        run_id: See `new_run_id`; also the name of the file.
        created: UTC, "2026-01-31T12:00:00+00:00" (`timestamp`).
        task: "vtab/caltech101".
        task_version: Version of the task card.
        suite: "vtab".
        kind: "final" (refit, tested once) or "selection" (trained on train, scored on val; never tabled).
        status: "complete"; "unscored" (trained, not tested); "truncated" (`limit_*`, `fast_dev_run`); "failed";
            "interrupted". Only complete final records enter tables.
        status_reason: One line, or null for a complete run.
        method: Registered name.
        method_args: The method's arguments, resolved.
        backbone: Registered model name.
        checkpoint: The source of the weights: "hub", "embedded", "none", or the name of the file.
        checkpoint_digest: Digest of the backbone's tensors (names, shapes, float32 values; without head and adapter),
            not of the file they came in; null if and only if `checkpoint` is "none" (random weights).
        protocol: Name of the protocol card.
        protocol_version: Its version.
        stage: "final" or "select".
        lists: Role → list, e.g. {"train": "train800val200", "test": "test"}.
        data_variant: "card", the name of a variant on the card, or "drawn" (a stand-in, not the data set).
        data_status: "as_card", or "different" if count or digest differ from the card.
        data_notes: What differs, a line each.
        data_digest: Digest of the lists on disk that this stage reads; null if a run failed or was stopped before it
            had read them. Runs on other data are another cell.
        seed: The one seed of the run.
        config: The resolved config.
        config_digest: `config_digest(config)`.
        setting_digest: `setting_digest(config, tuned)`.
        tuned: The tuned table used, or null.
        package_version: Of svp-bench.
        commit: Commit of the checkout, or null.
        dirty: Were code, cards or configs changed since that commit? null if unknown.
        libraries: Name → version.
        scan_backend: The backend of the selective scan that ran.
        scan_reason: Why `auto` chose it, or null.
        device: The device's name.
        device_count: Processes that trained.
        precision: As Lightning names it: "32-true", "bf16-mixed".
        metrics: The scores; {} in JSON if there are none.
        correct: One bit a picture, or null. Every complete final record has them.
        parameters: Parameter counts.
        times: Name → seconds: "train_seconds", "test_seconds", ...
        epochs: Completed training epochs.
        images_per_second: Training throughput over the whole run, all devices together, or null.
        peak_memory_mib: Peak device memory, or null where it is not measured.
        checkpoint_file: What the run saved, relative to the runs folder, or null.
    """

    schema: int
    run_id: str
    created: str
    task: str
    task_version: int
    suite: str
    kind: str
    status: str
    status_reason: str | None
    method: str
    method_args: Mapping[str, Any]
    backbone: str
    checkpoint: str
    checkpoint_digest: str | None
    protocol: str
    protocol_version: int
    stage: str
    lists: Mapping[str, str]
    data_variant: str
    data_status: str
    data_notes: Sequence[str]
    data_digest: str | None
    seed: int
    config: Mapping[str, Any]
    config_digest: str
    setting_digest: str
    tuned: Tuned | None
    package_version: str
    commit: str | None
    dirty: bool | None
    libraries: Mapping[str, str]
    scan_backend: str
    scan_reason: str | None
    device: str
    device_count: int
    precision: str
    metrics: Metrics | None
    correct: Correct | None
    parameters: Parameters
    times: Mapping[str, float]
    epochs: int
    images_per_second: float | None
    peak_memory_mib: float | None
    checkpoint_file: str | None

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values.

        Raises:
            RecordError: If a value has no place in JSON (a path, NaN, a key that is no text); names the key.
        """
        data: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Metrics):
                data[field.name] = value.to_json()
            elif isinstance(value, (Tuned, Correct, Parameters)):
                inner = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
                data[field.name] = {key: _plain(item, f"{field.name}.{key}") for key, item in inner.items()}
            elif isinstance(value, Mapping):
                data[field.name] = _sorted(_plain(value, field.name))
            else:
                data[field.name] = _plain(value, field.name)
        if self.metrics is None:
            data["metrics"] = {}
        return data

    @classmethod
    def from_json(cls, data: Any, where: str = "record") -> Record:
        """Check `data` against the schema and return the record.

        Raises:
            RecordError: On an unknown or missing key, a wrong type or value, another schema, or facts that contradict
                each other. The text begins with `where` and names the key.
        """
        record = _parse(data, where)
        _check_facts(record, where)
        return record

    def text(self) -> str:
        """Return the file's text."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Problem:
    """A file below `records/` that is no valid record.

    Attributes:
        path: Relative to the results root, with forward slashes.
        reason: One line.
    """

    path: str
    reason: str


# ---------------------------------------------------------------------------------------------------------- digests


def cell_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` without the keys of `CELL_EXCLUDED`: without seed, paths, device and logging.

    Nulls and mappings that are left empty go too: a null means the default, and a library that gains an option with a
    null default must not split a cell in two.
    """
    return _without(config, CELL_EXCLUDED)


def setting_config(config: Mapping[str, Any], tuned: Tuned | None = None) -> dict[str, Any]:
    """Return `cell_config(config)` without the task and what a tuned table set for it: what a table row has in common.

    The digest of the tuned table takes the place of its values, as the key "tuned".
    """
    excluded = {*CELL_EXCLUDED, *SETTING_EXCLUDED, *(tuned.keys if tuned else ())}
    setting = _without(config, excluded)
    return {**setting, "tuned": tuned.digest} if tuned else setting


def config_digest(config: Mapping[str, Any]) -> str:
    """Return "sha256:..." of `cell_config(config)` as canonical JSON: sorted keys, no blanks, floats by `repr`.

    Raises:
        RecordError: If a value has no place in JSON; names the key.
    """
    return _digest(cell_config(config))


def setting_digest(config: Mapping[str, Any], tuned: Tuned | None = None) -> str:
    """Return "sha256:..." of `setting_config(config, tuned)`; see `config_digest`."""
    return _digest(setting_config(config, tuned))


def _digest(config: Mapping[str, Any]) -> str:
    text = json.dumps(_plain(config, "config"), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode("ascii")).hexdigest()


def _without(config: Mapping[str, Any], excluded: Collection[str], prefix: str = "") -> dict[str, Any]:
    kept: dict[str, Any] = {}
    for key, value in config.items():
        if f"{prefix}{key}" in excluded or value is None:
            continue
        if isinstance(value, Mapping):
            inner = _without(value, excluded, f"{prefix}{key}.")
            if inner:
                kept[key] = inner
        else:
            kept[key] = value
    return kept


def _plain(value: Any, key: str) -> Any:
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
        return {name: _plain(item, f"{key}.{name}") for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, f"{key}[{index}]") for index, item in enumerate(value)]
    raise RecordError(f"{key!r} is a {type(value).__name__} ({_short.repr(value)}), which JSON cannot hold")


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value


# ------------------------------------------------------------------------------------------------------ bits and ids


def pack_bits(right: NDArray[np.bool_]) -> str:
    """Pack booleans of shape (n,) into base64 text: eight to a byte, the first in the highest bit, zeros at the end."""
    import numpy as np

    if right.ndim != 1 or right.dtype != np.bool_:
        raise RecordError(f"bits must be booleans of one dimension, not {right.dtype} of shape {right.shape}")
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpack_bits(text: str, count: int) -> NDArray[np.bool_]:
    """Undo `pack_bits`: return booleans of shape (count,).

    Raises:
        RecordError: If `text` is no base64, has another length than `count` bits need, or a one behind the last bit.
    """
    import numpy as np

    packed = np.frombuffer(_packed_bytes(text, count), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(np.bool_)


def _packed_bytes(text: str, count: int) -> bytes:
    try:
        packed = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise RecordError("the packed bits are not base64") from None
    if len(packed) != (count + 7) // 8:
        raise RecordError(f"the packed bits are {len(packed)} bytes; {count} bits need {(count + 7) // 8}")
    padding = 8 * len(packed) - count
    if padding and packed[-1] & ((1 << padding) - 1):
        raise RecordError(f"the packed bits have a one behind bit {count}")
    return packed


def timestamp(now: datetime | None = None) -> str:
    """Return `now` (with a time zone; default: the present) in UTC and whole seconds, as `Record.created` needs it."""
    return (now or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime(_CREATED)


def new_run_id(
    method: str, seed: int, setting_digest: str, now: datetime | None = None, entropy: bytes | None = None
) -> str:
    """Return a new run's name: "svp-20260131T120000Z-seed0-1a2b3c4d-9f86d081".

    The names of one method sort by time; the last part tells apart two runs that start in the same second.

    Args:
        method: Registered name.
        seed: The run's seed.
        setting_digest: Of the run's config; its first eight digits are shown.
        now: With a time zone; default: the present.
        entropy: A few random bytes; default: four of the system's.
    """
    if not _METHOD.fullmatch(method):
        raise RecordError(f"a run cannot be named after the method {method!r}: lower case, digits and underscores only")
    stamp = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    noise = (entropy if entropy is not None else os.urandom(4)).hex()
    return f"{method}-{stamp}-seed{seed}-{setting_digest.removeprefix('sha256:')[:8]}-{noise}"


# ------------------------------------------------------------------------------------------------------------ schema


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


def _parse(data: Any, where: str) -> Record:
    if isinstance(data, Mapping) and data.get("schema") != SCHEMA:
        given = _short.repr(data["schema"]) if "schema" in data else "missing"
        raise RecordError(f"{where}: 'schema' is {given}; this svp-bench {_version()} reads schema {SCHEMA}")
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
        method=take.text("method", _METHOD, "a method's name"),
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
    )


def _parse_tuned(record: _Fields) -> Tuned | None:
    if not record.holds("tuned", None):
        return None
    take = record.inner("tuned", Tuned)
    return Tuned(table=take.text("table"), digest=take.digest("digest"), keys=tuple(take.texts("keys")))


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


def _parse_correct(record: _Fields) -> Correct | None:
    if not record.holds("correct", None):
        return None
    take = record.inner("correct", Correct)
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
        datetime.strptime(record.created, _CREATED)
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
        raise refuse("correct", "is null; a complete final record has one bit for each test picture")
    if record.status == "unscored" and (metrics is not None or correct is not None):
        raise refuse("status", "is unscored, but the record has scores")
    if metrics is not None and metrics.correct > metrics.count:
        raise refuse("metrics.correct", f"is {metrics.correct} of only {metrics.count}")
    if metrics is not None and abs(metrics.top1 - 100 * metrics.correct / metrics.count) > _TOP1_TOLERANCE:
        raise refuse("metrics.top1", f"is {metrics.top1}, but {metrics.correct} of {metrics.count} are right")
    if metrics is not None:
        _check_metrics(metrics, refuse)
    if correct is None:
        return
    try:
        ones = int.from_bytes(_packed_bytes(correct.bits, correct.count), "big").bit_count()
    except RecordError as error:
        raise refuse("correct.bits", f"does not fit: {error}") from None
    if metrics is None or correct.count != metrics.count:
        raise refuse("correct.count", f"is {correct.count}, but metrics.count is {metrics and metrics.count}")
    if ones != metrics.correct:
        raise refuse("correct.bits", f"has {ones} ones, but metrics.correct is {metrics.correct}")


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
        raise refuse("metrics.per_class", f"has {len(correct)} classes in correct and {len(count)} in count")
    for name, given, total in (("correct", correct, metrics.correct), ("count", count, metrics.count)):
        if sum(given) != total:
            raise refuse(f"metrics.per_class.{name}", f"adds up to {sum(given)}, but metrics.{name} is {total}")
    for label, (right, pictures) in enumerate(zip(correct, count, strict=True)):
        if right > pictures:
            raise refuse("metrics.per_class", f"has {right} of only {pictures} right in class {label}")
    shares = [100 * right / pictures for right, pictures in zip(correct, count, strict=True) if pictures]
    mean = math.fsum(shares) / len(shares)
    if metrics.balanced_accuracy is not None and abs(metrics.balanced_accuracy - mean) > _TOP1_TOLERANCE:
        raise refuse("metrics.balanced_accuracy", f"is {metrics.balanced_accuracy}, but metrics.per_class gives {mean}")


def _version() -> str:
    from svp_bench import __version__

    return __version__


# ------------------------------------------------------------------------------------------------------------- files


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` (UTF-8): aside in the same folder, fsynced, renamed. Folders are made as needed.

    Raises:
        RecordError: If that is not possible; nothing is left behind.
    """
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(aside, "xb") as file:
                # A lone surrogate (from an undecodable file name) becomes \udcXX: in JSON the escape of that very code
                file.write(text.encode("utf-8", errors="backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)
    except OSError as error:
        raise _not_writable(path.parent, error) from None


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders; the rename is durable there with the file
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _not_writable(folder: Path, error: OSError) -> RecordError:
    reason = error.strerror or str(error)
    return RecordError(f"cannot write results into {folder}: {reason}; choose another folder with --results_root DIR")


def check_writable(results_root: Path | str) -> None:
    """Make sure, before training, that records can be written below `results_root`; make its `records` folder.

    Raises:
        RecordError: If they cannot; names the folder and the reason.
    """
    folder = Path(results_root) / "records"
    probe = folder / f".probe.{os.urandom(4).hex()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise _not_writable(folder, error) from None


def record_path(record: Record, results_root: Path | str) -> Path:
    """Return where `record` belongs below `results_root`."""
    return Path(results_root) / "records" / record.task / f"{record.run_id}.json"


def write_record(record: Record, results_root: Path | str) -> Path:
    """Write a new record and return its path.

    Raises:
        RecordError: If the record breaks its schema, its file exists already, or the folder cannot be written.
    """
    text = _checked_text(record)
    path = record_path(record, results_root)
    if path.exists():
        raise RecordError(f"{path} exists already; the record of another run is never overwritten")
    write_atomically(path, text)
    return path


def replace_record(record: Record, results_root: Path | str) -> Path:
    """Replace the unscored record of a run by its complete one; return its path.

    Raises:
        RecordError: If there is no unscored record of this run, `record` is not complete, or they are not of one run.
    """
    text = _checked_text(record)
    path = record_path(record, results_root)
    old = read_record(path)
    if old.status != "unscored" or record.status != "complete":
        raise RecordError(f"{path}: only an unscored record may become complete, not {old.status} → {record.status}")
    for key in _SAME_RUN:
        if getattr(old, key) != getattr(record, key):
            raise RecordError(f"{path}: {key!r} of the run is {getattr(old, key)!r}, not {getattr(record, key)!r}")
    write_atomically(path, text)
    return path


def continue_record(record: Record, results_root: Path | str) -> Path:
    """Replace the record of the first part of a run, which was interrupted or failed and then went on; return its path.

    Raises:
        RecordError: If the run was complete already, or the two are not of one run.
    """
    text = _checked_text(record)
    path = record_path(record, results_root)
    old = read_record(path)
    if old.status == "complete":
        raise RecordError(f"{path}: the run is complete already; a complete record is never replaced")
    for key in ("run_id", "kind", "seed", "setting_digest"):
        if getattr(old, key) != getattr(record, key):
            raise RecordError(f"{path}: {key!r} of the run is {getattr(old, key)!r}, not {getattr(record, key)!r}")
    write_atomically(path, text)
    return path


def _checked_text(record: Record) -> str:
    text = record.text()
    Record.from_json(json.loads(text), f"record of {record.task} ({record.run_id})")
    return text


def read_record(path: Path | str) -> Record:
    """Read one record, strictly.

    Raises:
        RecordError: If the file is unreadable or does not follow the schema; names the file and the key.
    """
    return _read(Path(path), str(path))


def _read(path: Path, where: str) -> Record:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecordError(f"{where}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise RecordError(f"{where}: is not UTF-8 text") from None
    try:
        data = json.loads(text, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except json.JSONDecodeError as error:
        raise RecordError(f"{where}: is not JSON: {error.msg} in line {error.lineno}") from None
    except RecursionError:
        raise RecordError(f"{where}: is nested too deeply for a record") from None
    except ValueError as error:
        raise RecordError(f"{where}: is not JSON: {error}") from None
    return Record.from_json(data, where)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key, value in pairs:
        if key in data:
            raise ValueError(f"the key {key!r} stands twice")
        data[key] = value
    return data


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def read_records(results_root: Path | str) -> tuple[list[Record], list[Problem]]:
    """Read every record below `results_root`.

    Returns:
        The valid records, sorted by task and run; and one problem for every other file, sorted by path. Names that
        begin with a dot are left alone: they are files being written.
    """
    root = Path(results_root)
    records: list[Record] = []
    problems: list[Problem] = []
    for path in sorted((root / "records").rglob("*")):
        inside = path.relative_to(root)
        if path.is_dir() or any(part.startswith(".") for part in inside.parts):
            continue
        name = inside.as_posix()
        try:
            record = _read(path, name)
            home = record_path(record, root)
            if path != home:
                raise RecordError(f"{name}: is a copy of {home.relative_to(root).as_posix()} or was moved from there")
            records.append(record)
        except RecordError as error:
            problems.append(Problem(name, str(error).removeprefix(f"{name}: ")))
    records.sort(key=lambda record: (record.task, record.run_id))
    return records, sorted(problems, key=lambda problem: problem.path)
