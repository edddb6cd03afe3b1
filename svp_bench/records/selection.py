"""Frozen selected configs: what a search on val chose for one task and method, with every trial and the reason.

A selected config is a JSON file, written once and never overwritten:
`<results root>/selected_configs/<search>-<8 digits of its digest>/<suite>/<task>/<method>.json`, of a nested search
`<method>-seed<N>.json` for each seed of the final runs. `svp-bench fit --selected_config FILE` lays its values over the
config, and the record of that run holds the file's digest. The search reads val (or folds of the labelled images) only;
the run that tests reads the selected config only.

Version 2 of the rules (`RULE_VERSION`) compares trials image by image and breaks ties by the val loss; its files are of
the schema `selected config-2`. Files of version 1 stay readable and are checked by the rules that made them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench.core.errors import RecordError, UsageError, plural, unknown_name
from svp_bench.records.bits import count_ones, unpack_bits
from svp_bench.records.digests import canonical_digest, plain
from svp_bench.records.record import SearchSummary
from svp_bench.records.store import read_json, read_record, write_atomically
from svp_bench.stats.inference import one_standard_error

__all__ = [
    "AUTO_FOLDS",
    "FALLBACK",
    "FOLD_KEYS",
    "RULES",
    "RULE_VERSION",
    "SCHEMAS",
    "Decision",
    "SelectedConfig",
    "Trial",
    "check_selected_config",
    "choose",
    "context_of",
    "decide",
    "edges",
    "grid_settings",
    "read_selected_config",
    "selected_config_path",
    "trial_problems",
    "write_selected_config",
]

SCHEMAS = {1: "svp-bench/choice-1", 2: "svp-bench/choice-2"}  # by the version of the rules
RULES = ("one_standard_error", "best_on_val")
RULE_VERSION = 2  # of new searches: see `decide`; version 1 is `choose`
FOLD_KEYS = ("data.folds", "data.fold", "data.fold_seed")
AUTO_FOLDS = 5  # what `folds: auto` takes where val is small
FALLBACK = "default"  # the space of methods without one of their own
_DECLARED: Mapping[str, tuple[type, ...]] = {
    "name": (str,),
    "version": (int,),
    "sampler": (str,),
    "budget": (int,),
    "rule": (str,),
    "seeds": (list,),
    "spaces": (Mapping,),
}
_DECLARED_NEW: Mapping[str, tuple[type, ...]] = {
    "rule_version": (int,),
    "folds": (int, str, type(None)),
    "repeats": (int,),
    "small_val": (int,),
}
_NEW_IN_TRIALS = ("losses", "right", "counts")
_NEW = ("search_seed", "folds", "repeats", "images", "ties", "at_edge")


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        values: Dotted config key → value, all keys of the method's space.
        run_ids: The runs on val, one for each of the search's seeds and, within a seed, for each fold.
        scores: Their top-1 on val in percent, in that order; empty if a run failed.
        trainable: Trained parameters, or None if a run failed.
        status: "complete", or why the setting has no score.
        losses: Their mean cross entropy on val, in nats. This and what follows: None before version 2.
        right: Their packed bits (`pack_bits`), one an image: classified rightly?
        counts: Their numbers of images.
    """

    values: Mapping[str, Any]
    run_ids: tuple[str, ...]
    scores: tuple[float, ...]
    trainable: int | None
    status: str
    losses: tuple[float, ...] | None = None
    right: tuple[str, ...] | None = None
    counts: tuple[int, ...] | None = None

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
class SelectedConfig:
    """What a search chose.

    Attributes:
        task: Full name.
        method: Registered name, or that of a method file.
        search: The search's whole declaration, as plain values: name, sampler, budget, seeds, rule, all spaces.
        search_digest: Its digest, the same for all methods and tasks of a search.
        context: The resolved config that all trials share: without seed, paths, devices, stage and the searched keys.
        checkpoint_digest: Of the backbone's weights; None for random ones.
        data_digest: Of the lists that the trials read.
        selected_on: The list that chose, e.g. "val200", or "trainval (5 folds)".
        count: Images that a trial is scored on: of that list, or of all folds together.
        trials: What was tried, in order; the first is the method's default setting.
        chosen: Index into `trials`.
        standard_error: In points. Version 1: of the best score. Version 2: of its difference from the next best.
        reason: Why this one, in a line.
        created: UTC, as in a record.
        search_seed: The final seed that a nested search is for; None if one search serves all. From version 2 on, as
            all that follows.
        folds: Parts of the labelled images, each held out once; 0 if val chose.
        repeats: How often they were divided anew; 0 without folds.
        images: Held-out images of each fold, as positions in the split that is divided; empty without folds.
        ties: Settings that reach the best accuracy.
        at_edge: Ends of the searched axes at which the best or the chosen setting lies, see `edges`.
    """

    task: str
    method: str
    search: Mapping[str, Any]
    search_digest: str
    context: Mapping[str, Any]
    checkpoint_digest: str | None
    data_digest: str
    selected_on: str
    count: int
    trials: tuple[Trial, ...]
    chosen: int
    standard_error: float
    reason: str
    created: str
    search_seed: int | None = None
    folds: int = 0
    repeats: int = 0
    images: tuple[tuple[int, ...], ...] = ()
    ties: int = 1
    at_edge: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """Version of the rules that it was made by."""
        return int(self.search.get("rule_version", 1))

    @property
    def nested(self) -> bool:
        """Whether each final seed has a search of its own."""
        return bool(self.search.get("nested", False))

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds of each trial."""
        return tuple(self.search["seeds"]) if self.search_seed is None else (self.search_seed,)

    @property
    def completed(self) -> int:
        """Trials that have a score."""
        return sum(trial.status == "complete" for trial in self.trials)

    @property
    def values(self) -> Mapping[str, Any]:
        """The chosen setting: dotted config key → value."""
        return self.trials[self.chosen].values

    def text(self) -> str:
        """Return the file's text."""
        data = {"schema": SCHEMAS[min(self.version, RULE_VERSION)], **plain(dataclasses.asdict(self), "selected")}
        if self.version < RULE_VERSION:  # the bytes, and so the digest, of an older file
            data = {key: value for key, value in data.items() if key not in _NEW}
            data["trials"] = [
                {key: value for key, value in trial.items() if key not in _NEW_IN_TRIALS} for trial in data["trials"]
            ]
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Return "sha256:..." of the file's text."""
        return "sha256:" + hashlib.sha256(self.text().encode()).hexdigest()

    def summary(self) -> SearchSummary:
        """Return the summary for the record of a run with this selected config."""
        new = self.version >= RULE_VERSION
        return SearchSummary(
            name=str(self.search["name"]),
            sampler=str(self.search["sampler"]),
            budget=int(self.search["budget"]),
            trials=self.completed,
            selected_on=self.selected_on,
            declaration=self.search_digest,
            selected_config=self.digest,
            keys=tuple(sorted(self.values)),
            tried=len(self.trials) if new else None,
            nested=self.nested if new else None,
            folds=self.folds if new else None,
            at_edge=self.at_edge if new else None,
            ties=self.ties if new else None,
        )

    @classmethod
    def from_json(cls, data: Any, where: str) -> SelectedConfig:
        """Check `data` and return the selected config.

        Raises:
            RecordError: If it does not follow the schema; names the key.
        """
        if not isinstance(data, Mapping) or data.get("schema") not in SCHEMAS.values():
            known = " or ".join(map(repr, SCHEMAS.values()))
            raise RecordError(f"{where}: is no selected config of a search (its schema is not {known})")
        old = data["schema"] == SCHEMAS[1]
        names = [field.name for field in dataclasses.fields(cls) if not (old and field.name in _NEW)]
        _check_keys(data, ["schema", *names], where, "")
        types: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(
                ("task", "method", "search_digest", "data_digest", "selected_on", "reason", "created"), (str,)
            ),
            **dict.fromkeys(("search", "context"), (Mapping,)),
            **dict.fromkeys(("count", "chosen"), (int,)),
            "trials": (list,),
            "standard_error": (int, float),
            **({} if old else {**dict.fromkeys(("folds", "repeats", "ties"), (int,)), "at_edge": (list,)}),
        }
        for key, allowed in types.items():
            if not isinstance(data[key], allowed) or isinstance(data[key], bool):
                raise RecordError(f"{where}: {key!r} must be {' or '.join(t.__name__ for t in allowed)}")
        if data["checkpoint_digest"] is not None and not isinstance(data["checkpoint_digest"], str):
            raise RecordError(f"{where}: 'checkpoint_digest' must be text or null")
        for key, allowed in (_DECLARED if old else {**_DECLARED, **_DECLARED_NEW}).items():
            if key not in data["search"]:
                raise RecordError(f"{where}: 'search' lacks {key!r}")
            if not isinstance(data["search"][key], allowed) or isinstance(data["search"][key], bool):
                raise RecordError(f"{where}: 'search.{key}' must be {' or '.join(t.__name__ for t in allowed)}")
        if old == ("rule_version" in data["search"]) or (not old and data["search"]["rule_version"] != RULE_VERSION):
            raise RecordError(f"{where}: 'search.rule_version' does not fit the schema {data['schema']!r}")
        if not old:
            _check_new(data, where)
        trials = tuple(_trial(item, f"trials[{i}]", where, old) for i, item in enumerate(data["trials"]))
        if not 0 <= data["chosen"] < len(trials):
            raise RecordError(f"{where}: 'chosen' is {data['chosen']}, and there are {plural(len(trials), 'trial')}")
        taken = {**{name: data[name] for name in names}, "trials": trials}
        if not old:
            taken |= {"images": tuple(map(tuple, data["images"])), "at_edge": tuple(data["at_edge"])}
        selected = cls(**taken)
        for problem in check_selected_config(selected):
            raise RecordError(f"{where}: {problem}")
        return selected


def check_selected_config(selected: SelectedConfig) -> list[str]:
    """Return what in a selected config contradicts itself, a line each: digest, trials, space, budget, rule.

    It cannot see whether the trials were run as stated: that is in their records.
    """
    problems = []
    search, trials = selected.search, selected.trials
    if canonical_digest(search) != selected.search_digest:
        problems.append("'search_digest' is not that of the declaration in 'search'")
    spaces = search["spaces"]
    space = spaces.get(selected.method, spaces.get(FALLBACK))
    if not isinstance(space, Mapping):
        return [*problems, f"the search declares no space for the method {selected.method!r}"]
    new = selected.version >= RULE_VERSION
    if new:
        problems += _fold_problems(selected)
    runs = len(selected.seeds) * max(1, selected.folds * selected.repeats)
    of_folds = f" in {selected.folds} folds × {selected.repeats}" if selected.folds else ""
    for number, trial in enumerate(trials):
        what = f"trial {number + 1}"
        if set(trial.values) != set(space):
            problems.append(f"{what} does not set the keys of its space: {', '.join(sorted(space))}")
        if len(trial.run_ids) != runs:
            problems.append(
                f"{what} has {plural(len(trial.run_ids), 'run')}, and the search has "
                f"{plural(len(selected.seeds), 'seed')}{of_folds}"
            )
        if len(trial.scores) != (len(trial.run_ids) if trial.status == "complete" else 0):
            problems.append(f"{what} is {trial.status!r} and has {plural(len(trial.scores), 'score')}")
        elif new:
            problems += [f"{what}: {text}" for text in _run_problems(selected, trial)]
            continue
        for score in trial.scores:
            right = score * selected.count / 100
            if not 0 <= right <= selected.count + 1e-3 or abs(right - round(right)) > 1e-3:
                problems.append(f"{what}: {score} % of {plural(selected.count, 'image')} is no whole number of images")
    if problems:
        return problems
    settings = [dict(trial.values) for trial in trials]
    if search["sampler"] == "grid":
        if settings != grid_settings(space, settings[0]):
            problems.append("the trials are not the default setting and then the declared grid, whole and in order")
    elif len(trials) != search["budget"]:
        problems.append(f"there are {plural(len(trials), 'trial')}, and the search declares {search['budget']}")
    if len(trials) > search["budget"]:
        problems.append(f"there are {plural(len(trials), 'trial')}, more than the budget of {search['budget']}")
    if any(not _inside(setting, space) for setting in settings[1:]):
        problems.append("a trial lies outside of the declared space")
    if search["rule"] not in RULES:
        problems.append(f"the rule {search['rule']!r} is not known here; known: {', '.join(RULES)}")
    elif not any(trial.scores for trial in trials):
        problems.append("no trial has a score on val")
    else:
        if new:
            decision = decide(trials, selected.count, search["rule"], selected.images)
            chosen, error, reason = decision.chosen, decision.standard_error, decision.reason
            if decision.ties != selected.ties or edges(trials, decision) != selected.at_edge:
                problems.append("'ties' or 'at_edge' is not what the trials give")
        else:
            chosen, error, reason = choose(trials, selected.count, search["rule"])
        if chosen != selected.chosen:
            problems.append(f"'chosen' is trial {selected.chosen + 1}, and by its rule trial {chosen + 1} wins")
        elif abs(error - selected.standard_error) > 1e-9 or reason != selected.reason:
            problems.append("'standard_error' or 'reason' is not what the trials give")
    return problems


def _fold_problems(selected: SelectedConfig) -> list[str]:
    """Return what is wrong with the folds of a selected config of version 2, a line each."""
    problems = []
    if selected.nested != (selected.search_seed is not None):
        problems.append("'search_seed' is that of a nested search, and only of one")
    if (selected.folds > 0) != (selected.repeats > 0) or len(selected.images) != selected.folds * selected.repeats:
        return [*problems, "'images' has not one entry for each fold and repeat"]
    for repeat in range(selected.repeats):
        parts = selected.images[repeat * selected.folds : (repeat + 1) * selected.folds]
        if sorted(itertools.chain(*parts)) != list(range(selected.count)):
            problems.append(
                f"the folds of repeat {repeat} do not hold each of the {plural(selected.count, 'image')} once"
            )
    return problems


def _run_problems(selected: SelectedConfig, trial: Trial) -> list[str]:
    """Return where the runs of a trial of version 2 contradict each other, a line each."""
    if trial.status != "complete":
        return ["has no score, and has bits or losses"] if trial.right or trial.losses or trial.counts else []
    of_each_seed = [len(part) for part in selected.images] or [selected.count]
    if list(trial.counts or ()) != of_each_seed * len(selected.seeds):
        return ["'counts' are not the images of its folds"]
    if len(trial.right or ()) != len(trial.scores) or len(trial.losses or ()) != len(trial.scores):
        return ["'right' and 'losses' have not one entry for each run"]
    problems = []
    assert trial.right is not None
    assert trial.losses is not None
    assert trial.counts is not None
    for bits, count, score, loss in zip(trial.right, trial.counts, trial.scores, trial.losses, strict=True):
        try:
            ones = count_ones(bits, count)
        except RecordError as error:
            return [f"'right' does not fit: {error}"]
        if abs(100 * ones / count - score) > 1e-3:
            problems.append(f"{score} % of {plural(count, 'image')}, and the bits have {ones} right")
        if not math.isfinite(loss) or loss < 0:
            problems.append(f"the loss {loss} is not a cross entropy")
    return problems


def _inside(setting: Mapping[str, Any], space: Mapping[str, Any]) -> bool:
    for key, declared in space.items():
        if isinstance(declared, Mapping):
            value = setting[key]
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                return False
            if not declared.get("low", value) <= value <= declared.get("high", value):
                return False
        elif setting[key] not in declared:
            return False
    return True


def trial_problems(selected: SelectedConfig, results_root: Path | str) -> list[str]:
    """Return the trials whose records are missing or contradict the selected config, a line each."""
    problems = []
    for number, trial in enumerate(selected.trials):
        bits = trial.right or [None] * len(trial.scores)
        for run_id, score, right in zip(trial.run_ids, trial.scores, bits, strict=False):
            path = Path(results_root) / "records" / selected.task / f"{run_id}.json"
            try:
                record = read_record(path)
            except RecordError as error:
                problems.append(f"trial {number + 1}: {error}")
                continue
            top1 = record.metrics.top1 if record.metrics else None
            if right is not None and (record.val_correct is None or record.val_correct.bits != right):
                problems.append(f"trial {number + 1}: {path} has other images right than stated")
            if record.kind != "selection" or top1 != score:
                problems.append(f"trial {number + 1}: {path} is of kind {record.kind} with {top1} %, not {score} %")
    return problems


def grid_settings(space: Mapping[str, Any], default: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of a grid search: the default first, then the rest of the grid in the declared order.

    Args:
        space: Dotted config key → its values.
        default: The method's own setting.
    """
    product = itertools.product(*(space.values()))
    grid = [dict(zip(space, values, strict=True)) for values in product]
    return [dict(default), *(setting for setting in grid if setting != dict(default))]


@dataclass(frozen=True)
class Decision:
    """What a rule of version 2 decides.

    Attributes:
        chosen: Index of the chosen trial.
        best: Index of the trial with the best accuracy; of equal ones the lowest loss, the cheapest, the first.
        standard_error: Of the difference between the best and the next best trial, in points.
        reason: Why the chosen one, in a line.
        ties: Trials that reach the best accuracy.
    """

    chosen: int
    best: int
    standard_error: float
    reason: str
    ties: int


def decide(trials: Sequence[Trial], count: int, rule: str, images: Sequence[Sequence[int]] = ()) -> Decision:
    """Choose among finished trials by version 2 of a rule.

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
        raise UsageError("no setting of the search has a score on val")
    right = {index: _times_right(trials[index], count, images) for index in scored}
    total = {index: sum(right[index]) for index in scored}
    losses = {index: trials[index].loss or 0.0 for index in scored}
    order = sorted(scored, key=lambda index: (-total[index], losses[index], trials[index].trainable or 0, index))
    best = order[0]
    shown = {index: trials[index].mean or 0.0 for index in scored}
    tied = [index for index in scored if total[index] == total[best]]
    runs = len(trials[best].scores) // max(1, len(images) or 1)
    times = runs * (sum(map(len, images)) // count if images else 1)  # how often each image is scored
    error = _paired_error(right[best], right[order[1]], times) if len(order) > 1 else 0.0
    where = "of the held-out images of all folds" if images else "on val"
    how = f"{shown[best]:.2f} % {where}"
    if len(tied) > 1:
        lowest = [index for index in tied if losses[index] == losses[best]]
        last = "the lowest val loss" if len(lowest) == 1 else "the fewest trained parameters, then the order,"
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
        f"the best, {how}; "
        f"among them {why}, {shown[chosen]:.2f}, wins"
    )
    return Decision(chosen, best, error, reason, len(tied))


def _times_right(trial: Trial, count: int, images: Sequence[Sequence[int]]) -> list[int]:
    """Return how often each image is classified rightly, over all runs of a trial."""
    times = [0] * count
    assert trial.right is not None
    assert trial.counts is not None
    places = images or [range(count)]
    for run, (bits, size) in enumerate(zip(trial.right, trial.counts, strict=True)):
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
    """Return at which ends of the searched axes the best or the chosen setting lies: a wider search might do better.

    An end is the smallest or largest number that was tried on an axis, failed trials included. Zero is no end: nothing
    lies below it. An axis of two numbers has no inside, and counts only if it is a learning rate.

    Args:
        trials: All of them.
        decision: What was decided among them.

    Returns:
        "model.learning_rate = 0.1 (largest tried)" and so on, in the order of the keys.
    """
    found: dict[str, None] = {}
    for key in trials[0].values:
        tried = {trial.values[key] for trial in trials if _is_number(trial.values.get(key))}
        if len(tried) < (2 if key.endswith("learning_rate") else 3):
            continue
        for index in (decision.best, decision.chosen):
            value = trials[index].values[key]
            if not _is_number(value) or value == 0:
                continue
            if value in (min(tried), max(tried)):
                found[f"{key} = {value:g} ({'largest' if value == max(tried) else 'smallest'} tried)"] = None
    return tuple(found)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def choose(trials: Sequence[Trial], count: int, rule: str = RULES[0]) -> tuple[int, float, str]:
    """Choose among finished trials by version 1 of a rule, which files of the schema selected config-1 were made by.

    `one_standard_error`: within one standard error of the best, the default or the cheapest setting wins. The standard
    error is that of the best score on a val list of `count` images (binomial; about 3 points at 200 images).
    Differences within it are noise, and a search that follows them overfits val. (Breiman et al., Classification and
    Regression Trees, 1984, section 3.4.3.)

    `best_on_val`: the best score, of equal ones the earliest trial. For searches whose default setting is no
    sensible prior, e.g. one made for runs ten times as long.

    Args:
        trials: The first is the default setting.
        count: Images in the val list.
        rule: Of `RULES`.

    Returns:
        Index of the selected config, the standard error in points, and the reason in a line.

    Raises:
        UsageError: If no trial has a score.
    """
    means = [trial.mean for trial in trials]
    scored = [index for index, mean in enumerate(means) if mean is not None]
    if not scored:
        raise UsageError("no setting of the search has a score on val")

    def score(index: int) -> float:
        mean = means[index]
        assert mean is not None
        return mean

    best = max(scored, key=lambda index: (score(index), -index))
    error = one_standard_error(score(best), count)
    if rule == "best_on_val":
        ties = sum(score(index) == score(best) for index in scored)
        among = f", the first of {ties} that reach it" if ties > 1 else ""
        return best, error, f"{score(best):.2f} on val, the best of {plural(len(scored), 'setting')}{among}"
    equal = [index for index in scored if score(index) >= score(best) - error]
    if 0 in equal:
        chosen, why = 0, "the default setting"
    else:
        chosen = min(equal, key=lambda index: (trials[index].trainable or 0, -score(index), index))
        why = "the cheapest setting (fewest trained parameters, then the best score)"
    if len(equal) == 1:
        reason = f"{score(best):.2f} on val; no other setting is within one standard error ({error:.2f} points)"
    else:
        reason = (
            f"{len(equal)} of {plural(len(scored), 'setting')} are within one standard error ({error:.2f} "
            "points) of the best, "
            f"{score(best):.2f} on val; among them {why}, {score(chosen):.2f}, wins"
        )
    return chosen, error, reason


def _check_keys(data: Mapping[str, Any], names: Sequence[str], where: str, inside: str) -> None:
    for key in data:
        if key not in names:
            raise unknown_name("key of a selected config", f"{inside}{key}", names, where=where, error=RecordError)
    for name in names:
        if name not in data:
            raise RecordError(f"{where}: the key {inside + name!r} is missing")


def _check_new(data: Mapping[str, Any], where: str) -> None:
    """Check the types of what version 2 of the schema added."""
    nested, seed = data["search"].get("nested"), data["search_seed"]
    if not isinstance(nested, bool):
        raise RecordError(f"{where}: 'search.nested' must be true or false")
    if seed is not None and not _is_whole(seed):
        raise RecordError(f"{where}: 'search_seed' must be a seed or null")
    parts = data["images"]
    if not isinstance(parts, list) or not all(isinstance(part, list) and all(map(_is_whole, part)) for part in parts):
        raise RecordError(f"{where}: 'images' must hold a list of positions for each fold")
    if not all(isinstance(text, str) for text in data["at_edge"]):
        raise RecordError(f"{where}: 'at_edge' must be a list of texts")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _trial(data: Any, inside: str, where: str, old: bool) -> Trial:
    if not isinstance(data, Mapping):
        raise RecordError(f"{where}: {inside!r} must be an object")
    names = [field.name for field in dataclasses.fields(Trial) if not (old and field.name in _NEW_IN_TRIALS)]
    _check_keys(data, names, where, f"{inside}.")
    scores, ids = data["scores"], data["run_ids"]
    if not isinstance(data["values"], Mapping) or not data["values"]:
        raise RecordError(f"{where}: '{inside}.values' must name at least one key")
    if not isinstance(scores, list) or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in scores):
        raise RecordError(f"{where}: '{inside}.scores' must be a list of numbers")
    if not isinstance(ids, list) or any(not isinstance(x, str) for x in ids):
        raise RecordError(f"{where}: '{inside}.run_ids' must be a list of texts")
    trial = Trial(dict(data["values"]), tuple(ids), tuple(map(float, scores)), data["trainable"], str(data["status"]))
    if old or data["status"] != "complete":
        return trial
    if not _is_whole(data["trainable"]):
        raise RecordError(f"{where}: '{inside}.trainable' must be a number of parameters")
    fits = {"losses": _is_number, "right": lambda x: isinstance(x, str), "counts": _is_whole}
    for key, fit in fits.items():
        if not isinstance(data[key], list) or not all(map(fit, data[key])):
            raise RecordError(f"{where}: '{inside}.{key}' must be a list with an entry for each run")
    return dataclasses.replace(
        trial, losses=tuple(map(float, data["losses"])), right=tuple(data["right"]), counts=tuple(data["counts"])
    )


def selected_config_path(
    results_root: Path | str, search: str, search_digest: str, task: str, method: str, seed: int | None = None
) -> Path:
    """Return the path of the selected config of a search for one task, method and, if nested, final seed."""
    folder = f"{search}-{search_digest.removeprefix('sha256:')[:8]}"
    name = method if seed is None else f"{method}-seed{seed}"
    return Path(results_root) / "selected_configs" / folder / task / f"{name}.json"


def write_selected_config(selected: SelectedConfig, results_root: Path | str) -> Path:
    """Write a new selected config and return its path. One that is there already stays as it is, if it chose the same.

    Raises:
        RecordError: If another selected config stands there already, or the folder cannot be written.
    """
    of = str(selected.search["name"]), selected.search_digest, selected.task, selected.method
    path = selected_config_path(results_root, *of, selected.search_seed)
    SelectedConfig.from_json(json.loads(selected.text()), str(path))
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    write_atomically(aside, selected.text())
    try:
        os.link(aside, path)  # fails if somebody was faster, where a rename would replace what they chose
    except FileExistsError:
        old = read_selected_config(path)
        same = ("context", "values", "search_digest", "checkpoint_digest", "data_digest")
        if any(getattr(old, name) != getattr(selected, name) for name in same):
            raise RecordError(
                f"{path} holds another selected config already, and is never overwritten; search into another folder "
                "with --results_root DIR"
            ) from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise RecordError(f"{path} exists already, and a selected config is never overwritten") from None
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def read_selected_config(path: Path | str) -> SelectedConfig:
    """Read one selected config, strictly.

    Raises:
        RecordError: If the file is unreadable or does not follow the schema; names the file and the key.
    """
    return SelectedConfig.from_json(read_json(Path(path), str(path)), str(path))


def context_of(
    config: Mapping[str, Any], keys: Sequence[str], sources: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Return what the trials of a search and the run with its selected config have in common.

    Args:
        config: A cell's config (`digests.cell_config`); which fold it holds out, if any, is left aside.
        keys: The searched keys, dotted, as in the config.
        sources: Digests of the files of a method that is not shipped, as in a record's `method_source`.
    """
    stage_and_searched = {"data.stage", *FOLD_KEYS, *keys}

    def rest(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.items():
            if f"{prefix}{key}" in stage_and_searched:
                continue
            if isinstance(value, Mapping):
                inner = rest(value, f"{prefix}{key}.")
                if inner:
                    result[key] = inner
            else:
                result[key] = value
        return result

    context = rest(config, "")
    return {**context, "method_source": dict(sources)} if sources else context
