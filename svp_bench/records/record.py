"""The record of a run: one small JSON file with everything that made its numbers. Schema 2; this text is the reference.

A record is `<results root>/records/<suite>/<task>/<run_id>.json`. Top-level keys have the order of `Record`'s fields,
inner mappings are sorted, so equal records are equal bytes. A file is written once, atomically; only an unscored record
may later become complete.

A *cell* is task, protocol, backbone, checkpoint digest, data variant, data digest, method, `config_digest` and
`source_digest` (changes at loading, and the source of a method that is not shipped); its seeds are averaged. A table
*row* is protocol, backbone, checkpoint digest, method, `source_digest` and `setting_digest`: the config without the
task and the values that a search selected. The epochs that a task's own config sets count as the protocol's
(`row_digest` in `defaults.py`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Annotated, Any, Literal

from msgspec import Meta

from svp_bench.core.errors import RecordError
from svp_bench.core.validate import Count, Digest, Finite, Positive, Text
from svp_bench.records.bits import pack_bits
from svp_bench.records.digests import canonical_digest, plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SCHEMA = 2
ENCODING = "base64+packbits"
CREATED = "%Y-%m-%dT%H:%M:%S+00:00"
METHOD = re.compile(r"[a-z][a-z0-9_]*(\+[a-z][a-z0-9_]*)*")  # names of a hybrid are joined by +

Status = Literal["complete", "unscored", "truncated", "failed", "interrupted"]
_RunId = Annotated[
    str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9_+-]*$", description="a name of letters, digits, '-', '_' and '+'")
]
_Task = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9_-]*/[a-z0-9][a-z0-9_-]*$", description="'<suite>/<task>'")]
_Encoding = Annotated[str, Meta(pattern=rf"^{re.escape(ENCODING)}$", description=f"one of {ENCODING}")]
_Method = Annotated[str, Meta(pattern=rf"^{METHOD.pattern}$", description="a method's name")]


@dataclass(frozen=True)
class SearchSummary:
    """The search, on val, that selected some values of a run.

    Attributes:
        name: Name of the search declaration, e.g. "default".
        sampler: "grid", "random" or "tpe".
        budget: K: settings that each method may try on each task, the same for every method.
        trials: Settings that were tried for this method and task, and have a score.
        selected_on: The split that selected, e.g. "val200".
        declaration: Digest of the search declaration.
        selected_config: Digest of the file of the selected config, with its trials and the reason.
        keys: Dotted config keys that were selected; their values may differ between the tasks of one table row.
        tried: Settings that were tried, including those that failed. Like all below None (left out of the JSON) in
            records of older searches.
        nested: Whether each final seed has its own search, with its own training seed and folds, so the spread over
            seeds includes the noise of the selection; without folds, that of the training seed only.
        folds: Parts of the labelled images that were held out in turn; 0 if val selected.
        at_edge: "model.learning_rate = 0.1 (largest tried)", for each axis that ends where the best setting is.
        ties: Settings with the best accuracy, including the selected one if it is one of them.
    """

    name: Text
    sampler: str
    budget: Positive
    trials: Positive
    selected_on: str
    declaration: Digest
    selected_config: Digest
    keys: tuple[str, ...]
    tried: Positive | None = None
    nested: bool | None = None
    folds: Count | None = None
    at_edge: tuple[str, ...] | None = None
    ties: Positive | None = None


@dataclass(frozen=True)
class PerClass:
    """The images of each class; the position in a list is the class.

    Attributes:
        correct: Images of the class that are classified correctly.
        count: Images of the class; 0 if the split has none.
    """

    correct: tuple[Count, ...]
    count: tuple[Count, ...]


@dataclass(frozen=True)
class Metrics:
    """Scores on the test split (in a selection record: on the val split).

    Optional scores that are None are left out of the JSON: older records have the first four only.

    Attributes:
        top1: Accuracy in percent.
        loss: Mean cross entropy without label smoothing, in nats.
        correct: Images classified correctly.
        count: Images in the split.
        top5: Top-5 accuracy in percent; None for tasks of fewer than six classes.
        balanced_accuracy: Mean accuracy of the classes that occur in the split, in percent.
        nll: Mean negative log-likelihood in nats: `loss`, by its other name.
        ece: Expected calibration error in percent (top label, 15 bins of equal width; Guo et al. 2017).
        per_class: Right and all images of each class.
    """

    top1: Finite
    loss: Finite
    correct: Count
    count: Positive
    top5: Finite | None = None
    balanced_accuracy: Finite | None = None
    nll: Finite | None = None
    ece: Finite | None = None
    per_class: PerClass | None = None


@dataclass(frozen=True)
class Correct:
    """One bit for each image of a split, in its order: was it classified correctly?

    Attributes:
        encoding: "base64+packbits": see `pack_bits`.
        count: Images in the split.
        bits: The packed bits.
        split: Name of the split, e.g. "test".
        split_digest: "sha256:..." of the split.
    """

    encoding: _Encoding
    count: Positive
    bits: Text
    split: Text
    split_digest: Digest

    @classmethod
    def of(cls, right: NDArray[np.bool_], list_name: str, split_digest: str) -> Correct:
        """Pack `right`, shape (images,), in the order of the list `list_name`."""
        return cls(ENCODING, int(right.size), pack_bits(right), list_name, split_digest)


@dataclass(frozen=True)
class Parameters:
    """How many parameters there are.

    Attributes:
        trainable: All that train: adapter + head.
        head: Those of the head that train.
        adapter: Those outside the head that train (for full fine-tuning: the backbone's).
        total: All of the model, frozen ones included.
    """

    trainable: Count
    head: Count
    adapter: Count
    total: Count


@dataclass(frozen=True)
class Efficiency:
    """The cost of a model that does not depend on the machine.

    Attributes:
        inference_macs: Multiplications (with or without an addition) of one image's forward pass; null if not counted.
        training_macs: Those of its forward and backward pass.
        stored_bytes: Size of the trained tensors, head included: what a task adds to the stored backbone.
        mergeable: Whether the adapter can be folded into the backbone's weights.
    """

    inference_macs: Count | None
    training_macs: Count | None
    stored_bytes: Count
    mergeable: bool


@dataclass(frozen=True)
class Record:
    """One run. The field names are the JSON keys; digests are "sha256:" and 64 hexadecimal digits.

    Attributes:
        schema: 2.
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
        splits: Role → split, e.g. {"train": "train800val200", "test": "test"}.
        data_variant: "card", the name of a variant on the card, "hub" or "tfds" (sources of other pixels), or
            "synthetic" (generated images).
        data_status: "as_card", or "different" if count or digest differ from the card.
        data_notes: The differences, a line each.
        data_digest: Digest of the splits on disk that this stage reads; null if a run failed or was stopped before it
            had read them. Runs on other data are another cell.
        seed: The one seed of the run.
        config: The resolved config.
        config_digest: `config_digest(config)`.
        setting_digest: `setting_digest(config, search)`.
        search: The search that selected some of the values, or null.
        package_version: Of svp-bench.
        commit: Commit of the checkout, or null.
        dirty: Were code, cards or configs changed since that commit? null if unknown.
        libraries: Name → version.
        scan_backend: The backend of the selective scan that ran; null for a backbone without one.
        scan_reason: Why `auto` chose it, or null.
        device: The device's name.
        device_count: Processes that trained.
        precision: As Lightning names it: "32-true", "bf16-mixed".
        metrics: The scores; {} in JSON if there are none.
        correct: One bit an image, or null. Every complete final record has them.
        parameters: Parameter counts.
        times: Name → seconds: "train_seconds", "test_seconds", ...
        epochs: Completed training epochs.
        images_per_second: Training throughput over the whole run, all devices together, or null.
        peak_memory_mib: Peak device memory, or null where it is not measured.
        checkpoint_file: The last checkpoint, relative to the runs folder, or null.
        weights_digest: Digest of the weights that were scored (or, unscored, that were final), as `checkpoint_file`
            holds them.
        checkpoint_load: Changes to the published weights at loading, e.g.
            {"resized": ["pos_embed 14x14 -> 4x16"], "dropped": ["head.weight"]}. Empty lists are left out.
        method_source: Digests of the files that define a method which is not shipped, by file name.
        package_digest: Digest of the package's own source files, as they were on disk.
        cpu: Model name of the processor and the widest instruction set that PyTorch used.
        external_classes: Callbacks, loggers, profilers, strategies and plugins from outside the package.
        not_comparable: Why the run's number does not belong into a table, one reason a line.
        image_notes: Conversion or skip of images → how often, e.g. {"skipped: .svg": 1, "rotated by EXIF": 2}.
        content_digests: Split → digest of the decoded pixels of its images.
        card_digests: `card_digest` of the run's "task" and "protocol" card.
        val_correct: Of a selection record: one bit a val image, which a search compares settings by.
        frozen_features: Role → what was computed once per image instead of in each epoch.
        backbone_family: "vim", "mambar", "vit", or that of another package's backbone; null in older records.
        efficiency: The cost that does not depend on the machine.
        inactive_parameters: Trained tensors without a gradient after the second optimizer step, by name.
        manifest_digest: Digest of all files of the data folder, as the manifest of `svp-bench data prepare` or `verify`
            states it; null if the folder has none.
        migrated_from: Of a record that was written with an older schema: {"schema": "1", "config_digest": …,
            "setting_digest": …}, its digests of that time. The run id holds the first digits of the latter.
    """

    schema: int
    run_id: _RunId
    created: Text
    task: _Task
    task_version: Positive
    suite: Text
    kind: Literal["final", "selection"]
    status: Status
    status_reason: Text | None
    method: _Method
    method_args: Mapping[str, Any]
    backbone: Text
    checkpoint: Text
    checkpoint_digest: Digest | None
    protocol: Text
    protocol_version: Positive
    stage: Text
    splits: Mapping[str, str]
    data_variant: Text
    data_status: Literal["as_card", "different"]
    data_notes: Sequence[str]
    data_digest: Digest | None
    seed: int
    config: Mapping[str, Any]
    config_digest: Digest
    setting_digest: Digest
    search: SearchSummary | None
    package_version: Text
    commit: Text | None
    dirty: bool | None
    libraries: Mapping[str, str]
    scan_backend: Text | None
    scan_reason: Text | None
    device: Text
    device_count: Positive
    precision: Text
    metrics: Metrics | None
    correct: Correct | None
    parameters: Parameters
    times: Mapping[str, Finite]
    epochs: Count
    images_per_second: Finite | None
    peak_memory_mib: Finite | None
    checkpoint_file: Text | None
    weights_digest: Digest | None = None
    checkpoint_load: Mapping[str, Sequence[str]] | None = None
    method_source: Mapping[str, Digest] | None = None
    package_digest: Digest | None = None
    cpu: Text | None = None
    external_classes: Sequence[str] | None = None
    not_comparable: Sequence[str] | None = None
    image_notes: Mapping[str, Positive] | None = None
    content_digests: Mapping[str, Digest] | None = None
    card_digests: Mapping[str, Digest] | None = None
    val_correct: Correct | None = None
    migrated_from: Mapping[str, Text] | None = None
    frozen_features: Mapping[str, Text] | None = None
    backbone_family: Text | None = None
    efficiency: Efficiency | None = None
    inactive_parameters: Sequence[str] | None = None
    manifest_digest: Digest | None = None

    @property
    def source_digest(self) -> str:
        """Digest of the changes at loading and of the source of a user's method; "" if there is neither."""
        if not self.checkpoint_load and not self.method_source:
            return ""
        return canonical_digest({"load": self.checkpoint_load or {}, "method": self.method_source or {}})

    def to_json(self) -> dict[str, Any]:
        """Return the record as plain JSON values.

        Raises:
            RecordError: If a value has no place in JSON (a path, NaN, a key that is not text); names the key.
        """
        return {key: {} if key == "metrics" and value is None else value for key, value in _plain(self).items()}

    def text(self) -> str:
        """Return the file's text."""
        return json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a dataclass as plain JSON values with sorted mappings, without the optional fields that are None."""
    data: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item, key = getattr(value, field.name), f"{prefix}{field.name}"
        if dataclasses.is_dataclass(item):
            data[field.name] = _plain(item, f"{key}.")
        elif item is not None or field.default is not None:
            data[field.name] = _sorted(plain(item, key))
    return data


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value


def timestamp(now: datetime | None = None) -> str:
    """Return `now` (with a time zone; default: the present) in UTC and whole seconds, as `Record.created` needs it."""
    return (now or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime(CREATED)


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
    if not METHOD.fullmatch(method):
        raise RecordError(
            f"a run cannot be named after the method {method!r}: lower case, digits, underscores and + only"
        )
    stamp = (now or datetime.now(timezone.utc)).astimezone(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
    noise = (entropy if entropy is not None else os.urandom(4)).hex()
    return f"{method}-{stamp}-seed{seed}-{setting_digest.removeprefix('sha256:')[:8]}-{noise}"
