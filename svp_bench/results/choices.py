"""Frozen choices: what a search on val chose for one task and method, with every trial and the reason.

A choice is a JSON file, written once and never overwritten:
`<results root>/choices/<search>-<8 digits of its digest>/<suite>/<task>/<method>.json`. `svp-bench fit --choice FILE`
lays its values over the config, in the place of a tuned table, and the record of that run names the file's digest. The
search reads val alone; the run that tests reads the choice alone: neither sees what the other may not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from svp_bench.errors import RecordError, UsageError, unknown_name
from svp_bench.results.digests import canonical_digest, plain
from svp_bench.results.files import read_json, read_record, write_atomically
from svp_bench.results.record import Search, Tuned
from svp_bench.results.stats import one_standard_error

__all__ = [
    "FALLBACK",
    "RULES",
    "SCHEMA",
    "Choice",
    "Trial",
    "check_choice",
    "choice_path",
    "choose",
    "context_of",
    "grid_settings",
    "read_choice",
    "trial_problems",
    "write_choice",
]

SCHEMA = "svp-bench/choice-1"
RULES = ("one_standard_error", "best_on_val")
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


@dataclass(frozen=True)
class Trial:
    """One setting that was tried.

    Attributes:
        values: Dotted config key → value, all keys of the method's space.
        run_ids: The runs on val, one for each of the search's seeds.
        scores: Their top-1 on val in percent, in that order; empty if a run failed.
        trainable: Trained parameters, or None if a run failed.
        status: "complete", or why the setting has no score.
    """

    values: Mapping[str, Any]
    run_ids: tuple[str, ...]
    scores: tuple[float, ...]
    trainable: int | None
    status: str

    @property
    def mean(self) -> float | None:
        """Mean top-1 on val, or None."""
        return sum(self.scores) / len(self.scores) if self.scores else None


@dataclass(frozen=True)
class Choice:
    """What a search chose.

    Attributes:
        task: Full name.
        method: Registered name, or that of a method file.
        search: The search's whole declaration, as plain values: name, sampler, budget, seeds, rule, all spaces.
        search_digest: Its digest, the same for all methods and tasks of a search.
        context: The resolved config that all trials share: without seed, paths, devices, stage and the searched keys.
        checkpoint_digest: Of the backbone's weights; None for random ones.
        data_digest: Of the lists that the trials read.
        selected_on: The list that chose, e.g. "val200".
        count: Pictures in that list.
        trials: What was tried, in order; the first is the method's default setting.
        chosen: Index into `trials`.
        standard_error: Of the best trial's score, in points: settings within it of the best count as equal.
        reason: Why this one, in a line.
        created: UTC, as in a record.
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

    @property
    def values(self) -> Mapping[str, Any]:
        """The chosen setting: dotted config key → value."""
        return self.trials[self.chosen].values

    def text(self) -> str:
        """Return the file's text."""
        data = {"schema": SCHEMA, **plain(dataclasses.asdict(self), "choice")}
        return json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @property
    def digest(self) -> str:
        """Return "sha256:..." of the file's text."""
        return "sha256:" + hashlib.sha256(self.text().encode()).hexdigest()

    def tuned(self) -> Tuned:
        """Return what the record of a run with this choice says of it."""
        return Tuned(
            table=f"{self.task.split('/')[0]}/{self.method}",
            digest=self.search_digest,
            keys=tuple(sorted(self.values)),
            search=Search(
                name=str(self.search["name"]),
                sampler=str(self.search["sampler"]),
                budget=int(self.search["budget"]),
                trials=sum(trial.status == "complete" for trial in self.trials),
                selected_on=self.selected_on,
                choice=self.digest,
            ),
        )

    @classmethod
    def from_json(cls, data: Any, where: str) -> Choice:
        """Check `data` and return the choice.

        Raises:
            RecordError: If it does not follow the schema; names the key.
        """
        if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
            raise RecordError(f"{where}: is no frozen choice of a search (its schema is not {SCHEMA!r})")
        names = [field.name for field in dataclasses.fields(cls)]
        _check_keys(data, ["schema", *names], where, "")
        types: dict[str, tuple[type, ...]] = {
            **dict.fromkeys(
                ("task", "method", "search_digest", "data_digest", "selected_on", "reason", "created"), (str,)
            ),
            **dict.fromkeys(("search", "context"), (Mapping,)),
            **dict.fromkeys(("count", "chosen"), (int,)),
            "trials": (list,),
            "standard_error": (int, float),
        }
        for key, allowed in types.items():
            if not isinstance(data[key], allowed) or isinstance(data[key], bool):
                raise RecordError(f"{where}: {key!r} must be {' or '.join(t.__name__ for t in allowed)}")
        if data["checkpoint_digest"] is not None and not isinstance(data["checkpoint_digest"], str):
            raise RecordError(f"{where}: 'checkpoint_digest' must be text or null")
        for key, allowed in _DECLARED.items():
            if key not in data["search"]:
                raise RecordError(f"{where}: 'search' lacks {key!r}")
            if not isinstance(data["search"][key], allowed) or isinstance(data["search"][key], bool):
                raise RecordError(f"{where}: 'search.{key}' must be {' or '.join(t.__name__ for t in allowed)}")
        trials = tuple(_trial(item, f"trials[{i}]", where) for i, item in enumerate(data["trials"]))
        if not 0 <= data["chosen"] < len(trials):
            raise RecordError(f"{where}: 'chosen' is {data['chosen']}, and there are {len(trials)} trials")
        choice = cls(**{**{name: data[name] for name in names}, "trials": trials})
        for problem in check_choice(choice):
            raise RecordError(f"{where}: {problem}")
        return choice


def check_choice(choice: Choice) -> list[str]:
    """Return what in a choice contradicts itself, a line each: digest, trials, space, budget, rule.

    What it cannot see is whether the trials were run as it says: that is in their records.
    """
    problems = []
    search, trials = choice.search, choice.trials
    if canonical_digest(search) != choice.search_digest:
        problems.append("'search_digest' is not that of the declaration in 'search'")
    spaces = search["spaces"]
    space = spaces.get(choice.method, spaces.get(FALLBACK))
    if not isinstance(space, Mapping):
        return [*problems, f"the search declares no space for the method {choice.method!r}"]
    for number, trial in enumerate(trials):
        what = f"trial {number + 1}"
        if set(trial.values) != set(space):
            problems.append(f"{what} does not set the keys of its space: {', '.join(sorted(space))}")
        if len(trial.run_ids) != len(search["seeds"]):
            problems.append(f"{what} has {len(trial.run_ids)} runs, and the search has {len(search['seeds'])} seeds")
        if len(trial.scores) != (len(trial.run_ids) if trial.status == "complete" else 0):
            problems.append(f"{what} is {trial.status!r} and has {len(trial.scores)} scores")
        for score in trial.scores:
            right = score * choice.count / 100
            if not 0 <= right <= choice.count + 1e-3 or abs(right - round(right)) > 1e-3:
                problems.append(f"{what}: {score} % of {choice.count} pictures is no whole number of pictures")
    if problems:
        return problems
    settings = [dict(trial.values) for trial in trials]
    if search["sampler"] == "grid":
        if settings != grid_settings(space, settings[0]):
            problems.append("the trials are not the default setting and then the declared grid, whole and in order")
    elif len(trials) != search["budget"]:
        problems.append(f"there are {len(trials)} trials, and the search declares {search['budget']}")
    if len(trials) > search["budget"]:
        problems.append(f"there are {len(trials)} trials, more than the budget of {search['budget']}")
    if any(not _inside(setting, space) for setting in settings[1:]):
        problems.append("a trial lies outside of the declared space")
    if search["rule"] not in RULES:
        problems.append(f"the rule {search['rule']!r} is not known here; known: {', '.join(RULES)}")
    elif not any(trial.scores for trial in trials):
        problems.append("no trial has a score on val")
    else:
        chosen, error, reason = choose(trials, choice.count, search["rule"])
        if chosen != choice.chosen:
            problems.append(f"'chosen' is trial {choice.chosen + 1}, and by its rule trial {chosen + 1} wins")
        elif abs(error - choice.standard_error) > 1e-9 or reason != choice.reason:
            problems.append("'standard_error' or 'reason' is not what the trials give")
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


def trial_problems(choice: Choice, results_root: Path | str) -> list[str]:
    """Return where the records of a choice's trials do not say what it says: missing, of another kind or score."""
    problems = []
    for number, trial in enumerate(choice.trials):
        for run_id, score in zip(trial.run_ids, trial.scores, strict=False):
            path = Path(results_root) / "records" / choice.task / f"{run_id}.json"
            try:
                record = read_record(path)
            except RecordError as error:
                problems.append(f"trial {number + 1}: {error}")
                continue
            top1 = record.metrics.top1 if record.metrics else None
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


def choose(trials: Sequence[Trial], count: int, rule: str = RULES[0]) -> tuple[int, float, str]:
    """Choose among finished trials.

    `one_standard_error`: within one standard error of the best, the default or the cheapest setting wins. The standard
    error is that of the best score on a val list of `count` pictures (binomial; about 3 points at 200 pictures).
    Differences within it are noise, and a search that follows them overfits val. (Breiman et al., Classification and
    Regression Trees, 1984, section 3.4.3.)

    `best_on_val`: the best score, of equal ones the earliest trial. For searches whose default setting is no
    sensible prior, e.g. one made for runs ten times as long.

    Args:
        trials: The first is the default setting.
        count: Pictures in the val list.
        rule: Of `RULES`.

    Returns:
        Index of the choice, the standard error in points, and the reason in a line.

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
        return best, error, f"{score(best):.2f} on val, the best of {len(scored)} settings{among}"
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
            f"{len(equal)} of {len(scored)} settings are within one standard error ({error:.2f} points) of the best, "
            f"{score(best):.2f} on val; among them {why}, {score(chosen):.2f}, wins"
        )
    return chosen, error, reason


def _check_keys(data: Mapping[str, Any], names: Sequence[str], where: str, inside: str) -> None:
    for key in data:
        if key not in names:
            raise unknown_name("key of a choice", f"{inside}{key}", names, where=where, error=RecordError)
    for name in names:
        if name not in data:
            raise RecordError(f"{where}: the key {inside + name!r} is missing")


def _trial(data: Any, inside: str, where: str) -> Trial:
    if not isinstance(data, Mapping):
        raise RecordError(f"{where}: {inside!r} must be an object")
    names = [field.name for field in dataclasses.fields(Trial)]
    _check_keys(data, names, where, f"{inside}.")
    scores, ids = data["scores"], data["run_ids"]
    if not isinstance(data["values"], Mapping) or not data["values"]:
        raise RecordError(f"{where}: '{inside}.values' must name at least one key")
    if not isinstance(scores, list) or any(isinstance(x, bool) or not isinstance(x, (int, float)) for x in scores):
        raise RecordError(f"{where}: '{inside}.scores' must be a list of numbers")
    if not isinstance(ids, list) or any(not isinstance(x, str) for x in ids):
        raise RecordError(f"{where}: '{inside}.run_ids' must be a list of texts")
    return Trial(dict(data["values"]), tuple(ids), tuple(map(float, scores)), data["trainable"], str(data["status"]))


def choice_path(results_root: Path | str, search: str, search_digest: str, task: str, method: str) -> Path:
    """Return where the choice of a search for one task and method belongs."""
    folder = f"{search}-{search_digest.removeprefix('sha256:')[:8]}"
    return Path(results_root) / "choices" / folder / task / f"{method}.json"


def write_choice(choice: Choice, results_root: Path | str) -> Path:
    """Write a new choice and return its path. One that is there already stays as it is, if it chose the same.

    Raises:
        RecordError: If another choice stands there already, or the folder cannot be written.
    """
    path = choice_path(results_root, str(choice.search["name"]), choice.search_digest, choice.task, choice.method)
    Choice.from_json(json.loads(choice.text()), str(path))
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    write_atomically(aside, choice.text())
    try:
        os.link(aside, path)  # fails if somebody was faster, where a rename would replace what they chose
    except FileExistsError:
        old = read_choice(path)
        same = ("context", "values", "search_digest", "checkpoint_digest", "data_digest")
        if any(getattr(old, name) != getattr(choice, name) for name in same):
            raise RecordError(
                f"{path} holds another choice already, and a choice is never overwritten; search into another folder "
                "with --results_root DIR"
            ) from None
    except OSError:  # a file system without hard links
        if path.exists():
            raise RecordError(f"{path} exists already, and a choice is never overwritten") from None
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def read_choice(path: Path | str) -> Choice:
    """Read one choice, strictly.

    Raises:
        RecordError: If the file is unreadable or does not follow the schema; names the file and the key.
    """
    return Choice.from_json(read_json(Path(path), str(path)), str(path))


def context_of(config: Mapping[str, Any], keys: Sequence[str]) -> dict[str, Any]:
    """Return what the trials of a search and the run with its choice have in common.

    Args:
        config: A cell's config (`digests.cell_config`).
        keys: The searched keys, dotted, as they stand in it.
    """
    stage_and_searched = {"data.stage", *keys}

    def kept(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key, value in node.items():
            if f"{prefix}{key}" in stage_and_searched:
                continue
            if isinstance(value, Mapping):
                inner = kept(value, f"{prefix}{key}.")
                if inner:
                    result[key] = inner
            else:
                result[key] = value
        return result

    return kept(config, "")
