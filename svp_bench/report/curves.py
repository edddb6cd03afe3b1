"""Learning curves from the TensorBoard event files of runs, thinned to what a plot can show."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from svp_bench.records.record import Record

__all__ = ["POINTS", "TAGS", "Curve", "read_curve", "read_curves", "thin"]

TAGS = ("train/loss", "train/top1", "val/loss", "val/top1")
"""The scalars that are shown, as the training logs them; `top1` is a fraction there, and percent in a `Curve`."""

POINTS = 60
"""At most so many points a curve."""


@dataclass(frozen=True)
class Curve:
    """The curves of one run.

    Attributes:
        scalars: Tag → (step, value) in the order of the steps.
    """

    scalars: Mapping[str, tuple[tuple[int, float], ...]]


def read_curves(records: Iterable[Record], runs_root: Path | str) -> dict[tuple[str, str], Curve]:
    """Return (task, run id) → curve of every record whose run lies below `runs_root` with event files."""
    root = Path(runs_root)
    found: dict[tuple[str, str], Curve] = {}
    if not root.is_dir():
        return found
    for record in records:
        curve = read_curve(root / record.task / record.run_id)
        if curve is not None:
            found[record.task, record.run_id] = curve
    return found


def read_curve(folder: Path) -> Curve | None:
    """Return the curves of the run in `folder`; None without event files, or without a scalar of `TAGS` in them.

    A file that a crash cut off is read as far as it goes.
    """
    if not any(folder.glob("events.out.tfevents.*")):
        return None
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    logger = logging.getLogger("tensorboard")  # it warns of every step that a resumed run logs twice
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, "images": 1, "tensors": 1})
        with suppress(OSError, ValueError, struct.error):  # what could be read before that is there
            events.Reload()
        tags = events.Tags()[SCALARS]
        scalars = {
            tag: thin([(event.step, event.value * _factor(tag)) for event in events.Scalars(tag)])
            for tag in TAGS
            if tag in tags
        }
    finally:
        logger.setLevel(level)
    return Curve(scalars) if scalars else None


def _factor(tag: str) -> float:
    return 100.0 if tag.endswith("/top1") else 1.0


def thin(points: list[tuple[int, float]], most: int = POINTS) -> tuple[tuple[int, float], ...]:
    """Return at most `most` points: the mean step and value of equal shares, and the last point as it is."""
    if len(points) <= most:
        return tuple(points)
    shares = most - 1
    body = points[:-1]
    kept = []
    for share in range(shares):
        part = body[share * len(body) // shares : (share + 1) * len(body) // shares]
        kept.append((round(sum(step for step, _ in part) / len(part)), sum(value for _, value in part) / len(part)))
    return (*kept, points[-1])
