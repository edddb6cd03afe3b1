"""Synthetic records for the report: methods, tasks, seeds and tracks, with missing results, failures and a search."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from synthetic_records import make_record, synthetic_record, unscored

from svp_bench.records.record import Parameters, Record, SearchSummary
from svp_bench.records.store import record_path
from svp_bench.tasks.cards import load_suite, load_task

# method → gain over linear in points, trained parameters outside the head, slowdown in training and in test
METHODS: Mapping[str, tuple[float, int, float, float]] = {
    "linear": (0.0, 0, 1.0, 1.0),
    "bias": (4.5, 57_216, 1.9, 1.0),
    "vpt_shallow": (3.2, 3_840, 2.1, 1.04),
    "vpt_deep": (6.1, 92_160, 2.2, 1.06),
    "svp": (9.4, 1_512_000, 2.6, 1.19),
    "lora": (10.1, 1_179_648, 2.4, 1.02),
    "adapter": (8.0, 1_199_000, 2.3, 1.07),
    "offset": (5.2, 37_000, 2.0, 1.01),
    "full": (7.3, 25_400_000, 3.1, 1.0),
}
SEARCH = SearchSummary(
    "default", "grid", 12, 12, "val200", "sha256:" + "7a" * 32, "sha256:" + "5e" * 32, ("model.learning_rate",)
)
SCRIPT = "<script>alert('x')</script>"
HOSTILE = f'{SCRIPT}</script><img src=x onerror="alert(1)">\u2028& "quotes"'


def scored(
    task: str, method: str, seed: int, *, gain: float = 0.0, noise: float = 0.5, number: int = 0, **fields: Any
) -> Record:
    """Return a complete record with a random accuracy, its own run id, and times that belong to its method."""
    rng = random.Random(f"{task} {method} {seed} {gain}")
    card = load_task(task)
    base, parameters, train, test = METHODS[method]
    count = card.counts["test"]
    level = random.Random(task).uniform(38, 80)
    accuracy = min(
        max(level + (base + gain) * random.Random(task + method).uniform(0.5, 1.5) + rng.gauss(0, noise), 2), 99
    )
    right = round(count * accuracy / 100)
    head = 384 * card.classes + card.classes
    machine: dict[str, Any] = {
        "times": {
            "train_seconds": round(310 * train * rng.uniform(0.97, 1.03), 3),
            "test_seconds": round(count * 0.0021 * test * rng.uniform(0.98, 1.02), 3),
        },
        "device": "NVIDIA H100 80GB HBM3",
        "precision": "bf16-mixed",
        "scan_backend": "triton",
        "scan_reason": "the fastest that can run",
        "images_per_second": round(320 / train, 2),
        "peak_memory_mib": round(2400 * train, 1),
        "method_args": {"share_layers": 1} if method == "svp" else {},
        "parameters": Parameters(parameters + head, head, parameters, 25_400_000 + parameters + head),
    }
    made = make_record(task, method, seed, right, count, number=number, **{**machine, **fields})
    return named(made, number)


def named(record: Record, number: int) -> Record:
    """Give `record` a run id without the time of its creation."""
    return dataclasses.replace(
        record, run_id=f"{record.method}-20260131T120000Z-seed{record.seed}-{record.setting_digest[7:15]}-{number:08x}"
    )


def vtab(seeds: Sequence[int] = (0, 1, 2, 3, 4), tasks: Sequence[str] | None = None) -> Iterator[Record]:
    """Yield the records of nine methods on VTAB-1k, with all that a real folder has."""
    names = list(tasks if tasks is not None else load_suite("vtab").tasks)
    number = 0
    for method in METHODS:
        for task in names:
            if method == "adapter" and task in names[-2:]:
                continue  # missing results
            for seed in seeds[:1] if method == "full" else seeds:
                number += 1
                yield scored(task, method, seed, number=number)
    for task in names:  # a second setting of svp
        for seed in seeds:
            number += 1
            changes = {"model.method.init_args.share_layers": 4}
            yield scored(task, "svp", seed, gain=-0.6, number=number, changes=changes)
    for method in ("linear", "svp", "lora"):  # the searched track
        for task in names:
            for seed in seeds[:3]:
                number += 1
                yield scored(task, method, seed, gain=1.5, number=number, search=SEARCH)
    for method in ("linear", "svp"):  # random weights
        number += 1
        yield scored(names[0], method, 0, gain=-30, number=number, checkpoint="none", checkpoint_digest=None)
    yield named(scored(names[0], "svp", 7, kind="selection", stage="select", number=9001), 9001)
    yield named(unscored(scored(names[1], "lora", 7, number=9002), "failed", f"loss is NaN {HOSTILE}"), 9002)
    yield named(unscored(scored(names[1], "vpt_deep", 7, number=9003), "truncated", "limit_train_batches"), 9003)
    yield dataclasses.replace(
        scored(names[0], "linear", 0, number=9004, device=f"cpu {HOSTILE}"), created="2026-01-31T11:00:00+00:00"
    )


def write(root: Path, records: Sequence[Record], broken: bool = False) -> Path:
    """Write records below `root`; `broken` adds a file that is none, with a hostile name."""
    for record in records:  # not by `write_record`, which waits for the disk each time
        path = record_path(record, root)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.text(), encoding="utf-8")
    if broken:
        folder = root / "records" / "vtab" / "dtd"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "<b>broken&.json").write_text("{", encoding="utf-8")
    return root


def demo_records() -> list[Record]:
    """Return records of the demo on synthetic data."""
    return [named(synthetic_record("demo/size", "linear", seed=seed, number=seed), 9100 + seed) for seed in (0, 1)]
