"""Records as a pandas DataFrame, for custom analyses."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svp_bench.core.errors import RecordError, plural, printable
from svp_bench.records.costs import CostFile, load_costs
from svp_bench.records.record import Record
from svp_bench.records.store import read_records, record_path
from svp_bench.tables.measured import MEASURES
from svp_bench.tables.model import track_of

if TYPE_CHECKING:
    import pandas as pd

_FACTS = (
    *("suite", "task", "method", "backbone", "seed", "kind", "status", "top1", "config_digest", "setting_digest"),
    *("run_id", "created", "status_reason", "checkpoint", "checkpoint_digest", "protocol", "protocol_version"),
    *("task_version", "stage", "data_variant", "data_status", "data_digest", "package_version", "commit", "dirty"),
    *("scan_backend", "device", "device_count", "precision", "epochs", "images_per_second", "peak_memory_mib"),
    "backbone_family",
)
_COSTS = ("inference_macs", "training_macs", "stored_bytes", "mergeable")
_SCORES = ("loss", "correct", "count", "top5", "balanced_accuracy", "ece")
_PARAMETERS = ("trainable", "head", "adapter", "total")
_MORE = ("track", "not_comparable", "train_seconds", "test_seconds", "path")
_NAMED = 5  # files that a warning names


def load_results(root: str | Path = "results", costs: str | Path | None = None) -> pd.DataFrame:
    """Return the records of a results folder, a row a run.

    Every record has a row, of any kind and status: those of a table are `kind == "final"` and
    `status == "complete"`, of one `config_digest` and one `data_digest` a cell.

    Args:
        root: The folder that holds `records/`.
        costs: A file of `svp-bench measure`. Adds `measured_latency_ms`, `measured_merged_latency_ms`,
            `measured_images_per_second`, `measured_batch`, `measured_step_ms`, `measured_peak_memory_mib` (NaN for
            settings that were not measured), `measured_device` and `measured_date`.

    Returns:
        Rows in the order of task and run id. Columns: `suite`, `task` (full name), `method`, `backbone`, `seed`,
        `kind`, `status`, `top1` (percent; NaN without scores), `config_digest`, further facts of the record under its
        own keys, its other scores, its parameter counts as `parameters_trainable` …, its costs (`inference_macs` …),
        `track`, `not_comparable` (reasons in one text, or None), `train_seconds`, `test_seconds`, and `path` of the
        file relative to `root`. A folder without records gives an empty frame with these columns.

    Raises:
        RecordError: If there is no folder `root`, or the costs cannot be read.

    Warns:
        UserWarning: If files below `records/` are not records: how many, and which.
    """
    import pandas as pd

    folder = Path(root)
    if not folder.is_dir():
        raise RecordError(
            f"{folder}: there is no such folder; give the one that holds records/ (--results_root of a run)"
        )
    measured = None if costs is None else load_costs(costs)
    records, problems = read_records(folder)
    if problems:
        listed = [f"{problem.path} ({problem.reason})" for problem in problems[:_NAMED]]
        more = f" and {len(problems) - _NAMED} more" if len(problems) > _NAMED else ""
        text = (
            f"{plural(len(problems), 'file')} in {folder / 'records'} skipped, not a record: {'; '.join(listed)}{more}"
        )
        warnings.warn(printable(text), stacklevel=2)
    names = [*_FACTS, *_SCORES, *(f"parameters_{name}" for name in _PARAMETERS), *_COSTS, *_MORE]
    rows = [_row(record, folder) for record in records]
    if measured is not None:
        names += [f"measured_{name}" for name in (*MEASURES, "device", "date")]
        rows = [row | _measured(measured, record) for row, record in zip(rows, records, strict=True)]
    return pd.DataFrame(rows, columns=names)


def _measured(costs: CostFile, record: Record) -> dict[str, Any]:
    cost = costs.of(record)
    if cost is None:
        return {}
    values = {f"measured_{name}": value(cost) for name, value in MEASURES.items()}
    return {**values, "measured_device": costs.device, "measured_date": costs.date}


def _row(record: Record, root: Path) -> dict[str, Any]:
    scores = record.metrics
    row = {name: getattr(record, name) for name in _FACTS if name != "top1"}
    row |= {name: None if scores is None else getattr(scores, name) for name in ("top1", *_SCORES)}
    row["top1"] = float("nan") if scores is None else scores.top1
    row |= {f"parameters_{name}": getattr(record.parameters, name) for name in _PARAMETERS}
    row |= {name: getattr(record.efficiency, name, None) for name in _COSTS}
    row |= {name: record.times.get(name) for name in ("train_seconds", "test_seconds")}
    row["track"] = track_of(record).title
    row["not_comparable"] = "; ".join(record.not_comparable) if record.not_comparable else None
    row["path"] = record_path(record, root).relative_to(root).as_posix()
    return row
