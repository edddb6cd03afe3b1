"""Select one of the trials of a search.

Version 2 of the rules (`decide`) compares trials image by image and breaks ties by the val loss. Version 1 (`choose`)
checks the files that it made.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from svp_bench.core.errors import UsageError, plural
from svp_bench.core.validate import Count
from svp_bench.records.bits import count_ones, unpack_bits
from svp_bench.records.defaults import other as differ
from svp_bench.stats.inference import one_standard_error

RULES = ("one_standard_error", "best_on_val")
_NO_SCORE = "no setting of the search has a score on val"


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        values: Dotted config key → value, all keys of the method's space.
        run_ids: The runs on val, one for each of the search's seeds and, within a seed, for each fold.
        scores: Their top-1 on val in percent, in that order; empty if a run failed.
        trainable: Trained parameters, or None if a run failed.
        status: "complete", or why the setting has no score.
        losses: Their mean cross entropy on val, in nats. Like all below None before version 2.
        right: Their packed bits (`pack_bits`), one an image: classified correctly?
        counts: Their numbers of images.
    """

    values: Annotated[Mapping[str, Any], Meta(min_length=1)]
    run_ids: tuple[str, ...]
    scores: tuple[float, ...]
    trainable: Count | None
    status: str
    losses: tuple[float, ...] | None = None
    right: tuple[str, ...] | None = None
    counts: tuple[Count, ...] | None = None

    @property
    def mean(self) -> float | None:
        """Top-1 on val in percent, over the images of all runs, or None."""
        if self.scores and self.counts and self.right:
            return 100 * sum(map(count_ones, self.right, self.counts)) / sum(self.counts)
        return sum(self.scores) / len(self.scores) if self.scores else None

    @property
    def loss(self) -> float | None:
        """Mean cross entropy over the images of all runs, or None."""
        if not self.losses or not self.counts:
            return None
        return math.fsum(loss * count for loss, count in zip(self.losses, self.counts, strict=True)) / sum(self.counts)


@dataclass(frozen=True)
class Decision:
    """Result of a rule of version 2.

    Attributes:
        chosen: Index of the selected trial.
        best: Index of the trial with the best accuracy; of equal ones the lowest loss, the cheapest, the first.
        standard_error: Of the difference between the best and the next best trial, in points.
        reason: Why the selected one, in a line.
        ties: Trials that reach the best accuracy.
    """

    chosen: int
    best: int
    standard_error: float
    reason: str
    ties: int


def grid_settings(space: Mapping[str, Any], default: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of a grid search: the default first, then the rest of the grid in the declared order.

    Args:
        space: Dotted config key → its values.
        default: The method's own setting.
    """
    grid = [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    return [dict(default), *(setting for setting in grid if setting != dict(default))]


def decide(trials: Sequence[Trial], count: int, rule: str, images: Sequence[Sequence[int]] = ()) -> Decision:
    """Select among finished trials by version 2 of a rule.

    The accuracy is that over the images of all runs, out of fold if there are folds. Of equal accuracies the lower val
    loss wins, then the setting with fewer trained parameters, then the earlier one.

    `best_on_val`: the best by that order.

    `one_standard_error`: settings that are within one standard error of the best count as equal to it. The standard
    error is that of the difference, paired by image: with d the difference in how often an image is right, summed over
    repeats and seeds, a setting is within it if (sum d)² <= sum d² (of one run: McNemar's statistic is at most 1).
    Among these the default setting wins, else the one with the fewest trained parameters (then the better accuracy, the
    lower loss, the earlier one). (After Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.)

    Args:
        trials: The first is the default setting; those that failed are passed over.
        count: Images that each trial is scored on.
        rule: Of `RULES`.
        images: Positions of the images of each fold; empty if all runs score the same list.

    Raises:
        UsageError: If no trial has a score.
    """
    scored = [index for index, trial in enumerate(trials) if trial.scores]
    if not scored:
        raise UsageError(_NO_SCORE)
    right = {index: _times_right(trials[index], count, images) for index in scored}
    total = {index: sum(right[index]) for index in scored}
    losses = {index: trials[index].loss or 0.0 for index in scored}
    order = sorted(scored, key=lambda index: (-total[index], losses[index], trials[index].trainable or 0, index))
    best = order[0]
    tied = [index for index in scored if total[index] == total[best]]
    runs = len(trials[best].scores) // max(1, len(images))
    times = runs * (sum(map(len, images)) // count if images else 1)  # how often each image is scored
    error = _paired_error(right[best], right[order[1]], times) if len(order) > 1 else 0.0
    where = "of the held-out images of all folds" if images else "on val"
    how = f"{trials[best].mean or 0.0:.2f} % {where}"
    if len(tied) > 1:
        one_lowest = sum(losses[index] == losses[best] for index in tied) == 1
        last = "the lowest val loss" if one_lowest else "the fewest trained parameters, then the order,"
        how += f" (reached by {plural(len(tied), 'setting')}, of which {last} decides: {losses[best]:.4f})"
    if rule == "best_on_val":
        return Decision(best, best, error, f"{how}, the best of {plural(len(scored), 'setting')}", len(tied))
    equal = [index for index in scored if _within(right[best], right[index])]
    if len(equal) == 1:
        reason = f"{how}; no other setting is within one standard error of it, paired by image"
        return Decision(best, best, error, reason, len(tied))
    if 0 in equal:
        chosen, why = 0, "the default setting"
    else:
        chosen = min(equal, key=lambda i: (trials[i].trainable or 0, -total[i], losses[i], i))
        why = "the cheapest setting (fewest trained parameters, then the best score, then the lowest loss)"
    reason = (
        f"{len(equal)} of {plural(len(scored), 'setting')} are within one standard error, paired by image, of "
        f"the best, {how}; among them {why}, {trials[chosen].mean or 0.0:.2f}, wins"
    )
    return Decision(chosen, best, error, reason, len(tied))


def _times_right(trial: Trial, count: int, images: Sequence[Sequence[int]]) -> list[int]:
    """Return how often each image is classified correctly, over all runs of a trial."""
    times = [0] * count
    places = images or [range(count)]
    for run, (bits, size) in enumerate(zip(trial.right or (), trial.counts or (), strict=True)):
        for position, bit in zip(places[run % len(places)], unpack_bits(bits, size).tolist(), strict=True):
            times[position] += bit
    return times


def _within(best: Sequence[int], other: Sequence[int]) -> bool:
    """Whether a mean paired difference is at most its standard error; in whole numbers, so that nothing is rounded."""
    differences = [a - b for a, b in zip(best, other, strict=True)]
    return sum(differences) ** 2 <= sum(d * d for d in differences)


def _paired_error(one: Sequence[int], other: Sequence[int], times: int) -> float:
    """Return the standard error of the difference of two settings in points, the images being the sample."""
    differences = [a - b for a, b in zip(one, other, strict=True)]
    n = len(differences)
    if n < 2:
        return 0.0
    spread = n * sum(d * d for d in differences) - sum(differences) ** 2
    return 100 / times * math.sqrt(spread / (n - 1)) / n


def edges(trials: Sequence[Trial], decision: Decision) -> tuple[str, ...]:
    """Return at which ends of the searched axes the best or the selected setting lies: a wider search might do better.

    An end is the smallest or largest number that was tried on an axis, failed trials included. Zero is not an end:
    nothing lies below it. An axis of two numbers has no inside, and counts only if it is a learning rate.

    Args:
        trials: All of them.
        decision: Result of a rule for them.

    Returns:
        "model.learning_rate = 0.1 (largest tried)" and so on, in the order of the keys.
    """
    found: dict[str, None] = {}
    for key in trials[0].values:
        tried = {trial.values[key] for trial in trials if is_number(trial.values.get(key))}
        if len(tried) < (2 if key.endswith("learning_rate") else 3):
            continue
        for value in (trials[index].values[key] for index in (decision.best, decision.chosen)):
            if is_number(value) and value != 0 and value in (min(tried), max(tried)):
                found[f"{key} = {value:g} ({'largest' if value == max(tried) else 'smallest'} tried)"] = None
    return tuple(found)


def is_number(value: Any) -> bool:
    """Return whether a value of a config is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def contains(declared: Any, value: Any) -> bool:
    """Return whether the list or the range that a search space declares for a key contains a value."""
    if isinstance(declared, Mapping):
        return is_number(value) and bool(declared.get("low", value) <= value <= declared.get("high", value))
    return any(not differ(one, value) for one in declared)


def choose(trials: Sequence[Trial], count: int, rule: str = RULES[0]) -> tuple[int, float, str]:
    """Select among finished trials by version 1 of a rule.

    `one_standard_error`: within one standard error of the best, the default or the cheapest setting wins. The standard
    error is that of the best score on a val list of `count` images (binomial; about 3 points at 200 images).

    `best_on_val`: the best score, of equal ones the earliest trial.

    Args:
        trials: The first is the default setting.
        count: Images in the val list.
        rule: Of `RULES`.

    Returns:
        Index of the selected trial, the standard error in points, and the reason in a line.

    Raises:
        UsageError: If no trial has a score.
    """
    score = {index: trial.mean for index, trial in enumerate(trials) if trial.mean is not None}
    if not score:
        raise UsageError(_NO_SCORE)
    best = max(score, key=lambda index: (score[index], -index))
    error = one_standard_error(score[best], count)
    if rule == "best_on_val":
        ties = sum(one == score[best] for one in score.values())
        among = f", the first of {ties} that reach it" if ties > 1 else ""
        return best, error, f"{score[best]:.2f} on val, the best of {plural(len(score), 'setting')}{among}"
    equal = [index for index in score if score[index] >= score[best] - error]
    if 0 in equal:
        chosen, why = 0, "the default setting"
    else:
        chosen = min(equal, key=lambda index: (trials[index].trainable or 0, -score[index], index))
        why = "the cheapest setting (fewest trained parameters, then the best score)"
    if len(equal) == 1:
        reason = f"{score[best]:.2f} on val; no other setting is within one standard error ({error:.2f} points)"
    else:
        reason = (
            f"{len(equal)} of {plural(len(score), 'setting')} are within one standard error ({error:.2f} points) of "
            f"the best, {score[best]:.2f} on val; among them {why}, {score[chosen]:.2f}, wins"
        )
    return chosen, error, reason
