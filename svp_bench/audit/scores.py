"""Bounds between loss, accuracies and calibration error of one split: scores that no model can have."""

from __future__ import annotations

import math

from svp_bench.core.errors import plural
from svp_bench.records.record import Metrics

_PERCENT = 1e-3  # tolerance of float32 for scores in percent
_LOSS = 1e-5  # and for a loss, relative to 1 + its bound
_FIRST = 5


def impossible_scores(metrics: Metrics, classes: int | None = None) -> list[str]:
    """Return why the scores of a record are impossible, one line each.

    An image that is wrong gives its label a probability of at most 1/2, one whose label is not among the first five at
    most 1/6, and one that is right at least 1 / classes. With g the gap between an image's confidence and 1 (right) or
    0 (wrong), its loss is at least -ln(1 - g), which is convex, and the mean gap is at least the calibration error.

    Args:
        metrics: The scores.
        classes: Number of classes if `metrics.per_class` is None; None if unknown.
    """
    count, wrong = metrics.count, metrics.count - metrics.correct
    classes = len(metrics.per_class.count) if metrics.per_class is not None else classes
    problems: list[str] = []
    least, why = (
        wrong * math.log(2) / count,
        f"{wrong} of {plural(count, 'image')} are wrong, each with a loss of ln 2 or more",
    )
    if metrics.top5 is not None:
        missed = round(count - metrics.top5 * count / 100)
        if classes is not None and classes <= _FIRST and missed:
            problems.append(f"top5 is {metrics.top5}, and all of {plural(classes, 'class')} are among the first five")
        least += max(missed, 0) * (math.log(_FIRST + 1) - math.log(2)) / count
    if metrics.ece is not None:
        by_gap = -math.log1p(-metrics.ece / 100) if metrics.ece < 100 else math.inf
        if by_gap > least:
            least, why = by_gap, f"a calibration error of {metrics.ece} % needs as much"
    if metrics.loss < least - _LOSS * (1 + least):
        problems.append(f"the loss is {metrics.loss:.6g}, and the least possible is {least:.6g}: {why}")
    if classes is not None and not wrong and metrics.loss > math.log(classes) * (1 + _LOSS) + _LOSS:
        problems.append(f"the loss is {metrics.loss:.6g}, and at most ln {classes} if every image is right")
    if classes is not None and metrics.ece is not None:
        low, high = max(0.0, 100 / classes - metrics.top1), 100 - metrics.top1 / classes
        if not low - _PERCENT <= metrics.ece <= high + _PERCENT:
            problems.append(f"ece is {metrics.ece}, and top1 {metrics.top1:.2f} allows {low:.4g} to {high:.4g}")
    balanced = metrics.balanced_accuracy
    for end, percent in ((0, 0.0), (count, 100.0)):
        if balanced is not None and (abs(balanced - percent) <= _PERCENT / count) != (metrics.correct == end):
            problems.append(
                f"balanced_accuracy is {balanced}, and {metrics.correct} of {plural(count, 'image')} are right"
            )
    return problems
