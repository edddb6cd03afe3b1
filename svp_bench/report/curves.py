"""Read learning curves from the TensorBoard event files of runs."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from svp_bench.records.record import Record

TAGS = ("train/loss", "train/top1", "val/loss", "val/top1")
"""The logged scalars that are shown; `top1` is a fraction in the files, and percent in a `Curve`."""

POINTS = 60
"""Maximum number of points of a curve."""

Curve = Mapping[str, tuple[tuple[int, float], ...]]
"""Learning curves of a run: tag → (step, value), by step."""


def read_curves(records: Iterable[Record], runs_root: Path | str) -> dict[tuple[str, str], Curve]:
    """Return (task, run id) → curves of each record whose run has event files below `runs_root`."""
    found = {}
    for record in records if Path(runs_root).is_dir() else ():
        curve = read_curve(Path(runs_root) / record.task / record.run_id)
        if curve is not None:
            found[record.task, record.run_id] = curve
    return found


def read_curve(folder: Path) -> Curve | None:
    """Return the curves of the run in `folder`, or None; a truncated event file is read up to its end."""
    if not any(folder.glob("events.out.tfevents.*")):
        return None
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    logger = logging.getLogger("tensorboard")  # it warns about steps that a resumed run logged twice
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        events = EventAccumulator(str(folder), size_guidance={SCALARS: 0, "images": 1, "tensors": 1})
        with suppress(OSError, ValueError, struct.error):  # the events before a truncation are loaded
            events.Reload()
        curve = {}
        for tag in (tag for tag in TAGS if tag in events.Tags()[SCALARS]):
            factor = 100.0 if tag.endswith("/top1") else 1.0
            curve[tag] = thin([(event.step, event.value * factor) for event in events.Scalars(tag)])
    finally:
        logger.setLevel(level)
    return curve or None


def thin(points: list[tuple[int, float]], most: int = POINTS) -> tuple[tuple[int, float], ...]:
    """Return at most `most` points: means of steps and values over equal shares, and the last point."""
    if len(points) <= most:
        return tuple(points)
    shares, body, thinned = most - 1, points[:-1], []
    for share in range(shares):
        part = body[share * len(body) // shares : (share + 1) * len(body) // shares]
        thinned.append((round(sum(step for step, _ in part) / len(part)), sum(value for _, value in part) / len(part)))
    return (*thinned, points[-1])
