"""Costs that were measured on one machine: the file that `svp-bench measure` writes and `--costs` reads.

A cost belongs to a setting: backbone, class and arguments of the method, image size, head, and the source files of a
method that is not shipped. Records are joined with it by the digest of these, never by a name.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from svp_bench._version import __version__
from svp_bench.core.errors import RecordError
from svp_bench.core.validate import Digest, Positive, Text, convert
from svp_bench.records.digests import canonical_digest, without_nulls
from svp_bench.records.record import Record

SCHEMA = "svp-bench/costs-1"
_Time = Annotated[float, Meta(gt=0, le=1e12)]


@dataclass(frozen=True)
class Setting:
    """What a cost depends on, apart from the machine.

    Attributes:
        backbone: timm name.
        method: Class path of the method.
        method_args: All arguments of the method.
        image_size: Height and width.
        head_hidden: Width of the hidden layer of the head; None without one.
        method_source: Digests of the files of a method that is not shipped, by file name.
    """

    backbone: Text
    method: Text
    method_args: Mapping[str, Any]
    image_size: tuple[Positive, Positive]
    head_hidden: Positive | None = None
    method_source: Mapping[str, Digest] = dataclasses.field(default_factory=dict)

    @cached_property
    def digest(self) -> str:
        """Digest of all attributes, without nulls."""
        return canonical_digest(without_nulls(dataclasses.asdict(self)))


@dataclass(frozen=True)
class MeasuredCost:
    """The cost of a setting on a machine; times are medians after warm-up.

    Attributes:
        name: Of the method, for readers.
        setting: What was measured.
        setting_digest: Its digest.
        latency_ms: Of the forward pass of one image, not merged.
        merged_latency_ms: The same after merging; None for a method that does not merge.
        images_per_second: Of the forward pass at `batch`.
        batch: The batch size with the highest throughput that was found.
        step_ms: Of a training step: forward, backward, optimizer.
        peak_memory_mib: Peak of a process that only trains: of the allocator on a GPU, of all memory on a CPU; None
            where it cannot be read.
    """

    name: Text
    setting: Setting
    setting_digest: Digest
    latency_ms: _Time
    merged_latency_ms: _Time | None
    images_per_second: _Time
    batch: Positive
    step_ms: _Time
    peak_memory_mib: _Time | None


@dataclass(frozen=True)
class CostFile:
    """Costs on one machine.

    Attributes:
        schema: `SCHEMA`.
        date: "2026-01-31", UTC.
        package_version: Of svp-bench.
        commit: Of the checkout; None for an installed package.
        dirty: Whether the code differs from the commit; None if unknown.
        libraries: Versions.
        device: As in records.
        cpu: Model and instruction set of the processor.
        scan_backends: Those that ran.
        precision: "32-true".
        classes: Of the head.
        step_batch: Images of a training step.
        load_before: Average load of the machine before the first measurement; None where it is unknown.
        rows: One for each setting.
    """

    schema: Text
    date: Text
    package_version: Text
    commit: Text | None
    dirty: bool | None
    libraries: Mapping[str, str]
    device: Text
    cpu: Text
    scan_backends: tuple[Text, ...]
    precision: Text
    classes: Positive
    step_batch: Positive
    load_before: float | None
    rows: tuple[MeasuredCost, ...]

    @cached_property
    def _by_digest(self) -> dict[str, MeasuredCost]:
        return {row.setting_digest: row for row in self.rows}

    def of(self, record: Record) -> MeasuredCost | None:
        """Return the cost of the setting of a record; None if it was not measured, or trained otherwise."""
        setting = setting_of(record)
        trained = record.config.get("model", {})
        optimizer = trained.get("optimizer", {}).get("name", "adamw")
        other = any(trained.get(key) for key in ("grad_checkpointing", "compile", "drop_path"))
        other = other or trained.get("frozen_mode", "eval") != "eval" or optimizer != "adamw"
        if setting is None or other or record.precision != self.precision:
            return None
        return self._by_digest.get(setting.digest)

    def text(self) -> str:
        """Return the JSON of the file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def setting_of(record: Record) -> Setting | None:
    """Return the setting of a record; None if its config does not state it, or it has an attention on the image."""
    model, data = record.config.get("model", {}), record.config.get("data", {})
    method, size = model.get("method", {}).get("class_path"), data.get("image_size")
    if not method or not size or model.get("input_attention") is not None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    source = dict(record.method_source or {})
    return Setting(record.backbone, method, record.method_args, (height, width), model.get("head_hidden"), source)


def load_costs(path: Path | str) -> CostFile:
    """Read a file of measured costs.

    Raises:
        RecordError: If it cannot be read, has another schema, or a row does not belong to its digest. Names the key.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecordError(f"{path}: cannot be read as JSON: {error}; `svp-bench measure` writes such a file") from None
    schema = data.get("schema") if isinstance(data, Mapping) else None
    if schema != SCHEMA:
        raise RecordError(
            f"{path}: 'schema' is {schema!r}; svp-bench {__version__} reads costs of the schema {SCHEMA!r}; "
            "`svp-bench measure` writes them"
        )
    found = convert(data, CostFile, str(path), RecordError, "file of costs")
    seen: set[str] = set()
    for number, row in enumerate(found.rows):
        if row.setting.digest != row.setting_digest:
            raise RecordError(f"{path}: rows[{number}] ({row.name}) was changed: its setting has another digest")
        if row.setting_digest in seen:
            raise RecordError(f"{path}: rows[{number}] ({row.name}) is there twice")
        seen.add(row.setting_digest)
    return found
