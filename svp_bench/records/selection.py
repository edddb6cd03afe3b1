"""Selected configs: the setting that a search on val selected for one task and method, with all trials and the reason.

A selected config is a JSON file, written once and never overwritten:
`<results root>/selected_configs/<search>-<8 digits of its digest>/<suite>/<task>/<method>.json`, of a nested search
`<method>-seed<N>.json` for each seed of the final runs, and `<method>@<backbone>` where another backbone has the name
already. `svp-bench fit --selected_config FILE` lays its values over the
config, and the record of that run holds the file's digest. The search reads val (or folds of the labelled images) only;
the run that tests reads the selected config only.

Files of version 1 have the older schema, stay readable and are checked by the rules that made them.
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
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from svp_bench.core.errors import RecordError, plural
from svp_bench.core.validate import Count, Text, convert
from svp_bench.records.bits import count_ones
from svp_bench.records.digests import canonical_digest, cell_config, plain
from svp_bench.records.migrate import group_settings, migrate_config
from svp_bench.records.record import SearchSummary
from svp_bench.records.selection_rule import RULES, Trial, choose, contains, decide, edges, grid_settings
from svp_bench.records.store import read_json, read_record, write_atomically

SCHEMAS = {1: "svp-bench/choice-1", 2: "svp-bench/choice-2"}  # by the version of the rules
RULE_VERSION = 2  # of new searches: see `decide`; version 1 is `choose`
FOLD_KEYS = ("data.cross_validation.folds", "data.cross_validation.fold", "data.cross_validation.seed")
AUTO_FOLDS = 5  # of `folds: auto` where val is small
FALLBACK = "default"  # the space of methods without one of their own
_NEW_IN_TRIALS = ("losses", "right", "counts")  # in version 2
_NEW = ("search_seed", "folds", "repeats", "images", "ties", "at_edge")


@dataclass(frozen=True)
class _Declaration1:
    """Types of `SelectedConfig.search`, in version 1."""

    name: Text
    version: Count
    sampler: Text
    budget: Count
    rule: Text
    seeds: tuple[Count, ...]
    spaces: Mapping[str, Any]


@dataclass(frozen=True)
class _Declaration2(_Declaration1):
    rule_version: Literal[2]
    folds: int | str
    repeats: Count
    small_val: Count
    nested: bool


@dataclass(frozen=True)
class SelectedConfig:
    """Result of a search.

    Attributes:
        task: Full name.
        method: Registered name, or that of a method file.
        search: The search's whole declaration, as plain values: name, sampler, budget, seeds, rule, all spaces.
        search_digest: Its digest, the same for all methods and tasks of a search.
        context: The resolved config that all trials share: without seed, paths, devices, stage and the searched keys.
        checkpoint_digest: Of the backbone's weights; None for random ones.
        data_digest: Of the splits that the trials read.
        selected_on: The split that trials are scored on, e.g. "val200", or "trainval (5 folds)".
        count: Images that a trial is scored on: of that split, or of all folds together.
        trials: All trials, in order; the first is the method's default setting.
        chosen: Index into `trials`.
        standard_error: In points. Version 1: of the best score. Version 2: of its difference from the next best.
        reason: Why this one, in a line.
        created: UTC, as in a record.
        search_seed: The final seed that a nested search is for; None if one search serves all. Like all below new in
            version 2.
        folds: Parts of the labelled images, each held out once; 0 if trials are scored on val.
        repeats: How often they were divided anew; 0 without folds.
        images: Held-out images of each fold, as positions in the split that is divided; empty without folds.
        ties: Settings that reach the best accuracy.
        at_edge: Ends of the searched axes at which the best or the selected setting lies, see `edges`.
    """

    task: str
    method: str
    search: Mapping[str, Any]
    search_digest: str
    context: Mapping[str, Any]
    checkpoint_digest: str | None
    data_digest: str
    selected_on: str
    count: Count
    trials: tuple[Trial, ...]
    chosen: int
    standard_error: float
    reason: str
    created: str
    search_seed: Count | None = None
    folds: Count = 0
    repeats: Count = 0
    images: tuple[tuple[Count, ...], ...] = ()
    ties: int = 1
    at_edge: tuple[str, ...] = ()

    @property
    def version(self) -> int:
        """Version of the rules that made it."""
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
        """The selected setting: dotted config key → value."""
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

    @cached_property
    def digest(self) -> str:
        """Return "sha256:..." of the file's text."""
        return "sha256:" + hashlib.sha256(self.text().encode()).hexdigest()

    @cached_property
    def todays_context(self) -> dict[str, Any]:
        """The context with the settings grouped as today's configs group them."""
        return context_of(cell_config(group_settings(migrate_config(self.context))), list(self.values))

    @cached_property
    def todays_digest(self) -> str:
        """Digest of `todays_context`."""
        return canonical_digest(self.todays_context)

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
        """Validate parsed JSON and return the selected config.

        Raises:
            RecordError: If it does not follow the schema, or contradicts itself; names the key.
        """
        versions = {schema: version for version, schema in SCHEMAS.items()}
        if not isinstance(data, Mapping) or data.get("schema") not in versions:
            known = " or ".join(map(repr, versions))
            raise RecordError(f"{where}: is not a selected config of a search (its schema is not {known})")
        facts = {key: value for key, value in data.items() if key != "schema"}
        selected = convert(facts, cls, where, RecordError, "selected config")
        declaration = _Declaration1 if versions[data["schema"]] == 1 else _Declaration2
        convert(facts["search"], declaration, f"{where}: 'search'", RecordError, "declaration")
        written = json.loads(selected.text())
        if different := _different_key(written, data):
            key, given = different
            wrong = f"is not part of {data['schema']}" if given else "is missing"
            raise RecordError(f"{where}: the key {key!r} {wrong}")
        if not 0 <= selected.chosen < len(selected.trials):
            count = plural(len(selected.trials), "trial")
            raise RecordError(f"{where}: 'chosen' is {selected.chosen}, and there are {count}")
        for problem in _problems(selected):
            raise RecordError(f"{where}: {problem}")
        return selected


def _different_key(written: Any, given: Any, prefix: str = "") -> tuple[str, bool] | None:
    """Return the first key that only one of two JSON values has, with its place, and whether it is in the given one."""
    if isinstance(written, Mapping) and isinstance(given, Mapping):
        for key in {**written, **given}:
            if key not in written or key not in given:
                return f"{prefix}{key}", key in given
            if found := _different_key(written[key], given[key], f"{prefix}{key}."):
                return found
    elif isinstance(written, list) and isinstance(given, list):
        for index, (one, other) in enumerate(zip(written, given, strict=False)):
            if found := _different_key(one, other, f"{prefix.removesuffix('.')}[{index}]."):
                return found
    return None


def _problems(selected: SelectedConfig) -> list[str]:
    """Return where a selected config contradicts itself, a line each: digest, trials, space, budget, rule."""
    search, trials = selected.search, selected.trials
    if canonical_digest(search) != selected.search_digest:
        return ["'search_digest' is not that of the declaration in 'search'"]
    space = search["spaces"].get(selected.method, search["spaces"].get(FALLBACK))
    if not isinstance(space, Mapping):
        return [f"the search declares no space for the method {selected.method!r}"]
    new = selected.version >= RULE_VERSION
    problems = _fold_problems(selected) if new else []
    for number, trial in enumerate(trials, 1):
        problems += [f"trial {number} {text}" for text in _trial_facts(selected, trial, space)]
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
    if any(not contains(space[key], value) for setting in settings[1:] for key, value in setting.items()):
        problems.append("a trial lies outside of the declared space")
    if search["rule"] not in RULES:
        return [*problems, f"the rule {search['rule']!r} is not known here; known: {', '.join(RULES)}"]
    if not any(trial.scores for trial in trials):
        return [*problems, "no trial has a score on val"]
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
    """Return where the folds of version 2 contradict the search, a line each."""
    problems = []
    if selected.nested != (selected.search_seed is not None):
        problems.append("'search_seed' is that of a nested search, and only of one")
    if (selected.folds > 0) != (selected.repeats > 0) or len(selected.images) != selected.folds * selected.repeats:
        return [*problems, "'images' has not one entry for each fold and repeat"]
    for repeat in range(selected.repeats):
        parts = selected.images[repeat * selected.folds : (repeat + 1) * selected.folds]
        if sorted(itertools.chain(*parts)) != list(range(selected.count)):
            images = plural(selected.count, "image")
            problems.append(f"the folds of repeat {repeat} do not hold each of the {images} once")
    return problems


def _trial_facts(selected: SelectedConfig, trial: Trial, space: Mapping[str, Any]) -> list[str]:
    """Return where a trial contradicts the search or itself, a line each."""
    problems = []
    runs = len(selected.seeds) * max(1, selected.folds * selected.repeats)
    if set(trial.values) != set(space):
        problems.append(f"does not set the keys of its space: {', '.join(sorted(space))}")
    if len(trial.run_ids) != runs:
        of_folds = f" in {selected.folds} folds × {selected.repeats}" if selected.folds else ""
        seeds = plural(len(selected.seeds), "seed")
        problems.append(f"has {plural(len(trial.run_ids), 'run')}, and the search has {seeds}{of_folds}")
    complete = trial.status == "complete"
    if len(trial.scores) != (len(trial.run_ids) if complete else 0):
        return [*problems, f"is {trial.status!r} and has {plural(len(trial.scores), 'score')}"]
    if not complete:
        return [*problems, "has no score, and has bits or losses"] if trial.right or trial.losses else problems
    if selected.version < RULE_VERSION:
        for score in trial.scores:
            right = score * selected.count / 100
            if not 0 <= right <= selected.count + 1e-3 or abs(right - round(right)) > 1e-3:
                problems.append(f"has {score} % of {plural(selected.count, 'image')}: not a whole number of images")
        return problems
    bits, losses, counts = trial.right or (), trial.losses or (), trial.counts or ()
    in_each = [len(part) for part in selected.images] or [selected.count]
    if list(counts) != in_each * len(selected.seeds):
        return [*problems, "has 'counts' that are not the images of its folds"]
    if {len(bits), len(losses)} != {len(trial.scores)} or trial.trainable is None:
        return [*problems, "lacks 'right' or 'losses' of a run, or 'trainable'"]
    for one, count, score, loss in zip(bits, counts, trial.scores, losses, strict=True):
        try:
            ones = count_ones(one, count)
        except RecordError as error:
            return [*problems, f"has bits in 'right' that do not fit: {error}"]
        if abs(100 * ones / count - score) > 1e-3:
            problems.append(f"has {score} % of {plural(count, 'image')}, and the bits have {ones} right")
        if not math.isfinite(loss) or loss < 0:
            problems.append(f"has the loss {loss}, which is not a cross entropy")
    return problems


def trial_problems(selected: SelectedConfig, results_root: Path | str) -> list[str]:
    """Return the trials whose records are missing or contradict the selected config, a line each."""
    problems = []
    for number, trial in enumerate(selected.trials, 1):
        bits = trial.right or [None] * len(trial.scores)
        for run_id, score, right in zip(trial.run_ids, trial.scores, bits, strict=False):
            path = Path(results_root) / "records" / selected.task / f"{run_id}.json"
            try:
                record = read_record(path)
            except RecordError as error:
                problems.append(f"trial {number}: {error}")
                continue
            top1 = record.metrics.top1 if record.metrics else None
            if right is not None and (record.val_correct is None or record.val_correct.bits != right):
                problems.append(f"trial {number}: {path} has other images right than stated")
            if record.kind != "selection" or top1 != score:
                problems.append(f"trial {number}: {path} is of kind {record.kind} with {top1} %, not {score} %")
    return problems


def selected_config_path(
    results_root: Path | str, search: str, search_digest: str, task: str, method: str, seed: int | None = None
) -> Path:
    """Return the path of the selected config of a search for one task, method and, if nested, final seed."""
    folder = f"{search}-{search_digest.removeprefix('sha256:')[:8]}"
    name = method if seed is None else f"{method}-seed{seed}"
    return Path(results_root) / "selected_configs" / folder / task / f"{name}.json"


def selected_config_of(
    results_root: Path | str,
    search: str,
    search_digest: str,
    task: str,
    method: str,
    seed: int | None,
    context: Mapping[str, Any],
) -> Path:
    """Return `selected_config_path`, or where that file is of another backbone, the path with the name of this one.

    An unreadable file keeps its place, so that the caller's error names it.

    Args:
        results_root: And all up to `seed`: as for `selected_config_path`.
        context: As in `SelectedConfig`; names the backbone.
    """
    path, backbone = selected_config_path(results_root, search, search_digest, task, method, seed), _backbone(context)
    try:
        other = _backbone(read_selected_config(path).context) if path.is_file() else backbone
    except RecordError:
        return path
    if other == backbone:
        return path
    return selected_config_path(results_root, search, search_digest, task, f"{method}@{backbone}", seed)


def _backbone(context: Mapping[str, Any]) -> Any:
    return context.get("model", {}).get("backbone")


def write_selected_config(selected: SelectedConfig, results_root: Path | str) -> Path:
    """Write a new selected config and return its path. An existing one that selected the same stays as it is.

    Raises:
        RecordError: If another selected config has this path already, or the folder cannot be written.
    """
    of = str(selected.search["name"]), selected.search_digest, selected.task, selected.method
    path = selected_config_of(results_root, *of, selected.search_seed, selected.context)
    SelectedConfig.from_json(json.loads(selected.text()), str(path))
    aside = path.with_name(f".{path.name}.{os.urandom(4).hex()}.new")
    write_atomically(aside, selected.text())
    try:
        os.link(aside, path)  # fails if another sweep was faster, where a rename would replace its file
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
    """Return the config that the trials of a search and the run with its selected config have in common.

    Args:
        config: A cell's config (`digests.cell_config`); which fold it holds out, if any, is left out.
        keys: The searched keys, dotted, as in the config.
        sources: Digests of the files of a method that is not shipped, as in a record's `method_source`.
    """
    excluded = {"data.stage", *FOLD_KEYS, *keys}

    def rest(node: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        items = {
            key: rest(value, f"{prefix}{key}.") if isinstance(value, Mapping) else value
            for key, value in node.items()
            if f"{prefix}{key}" not in excluded
        }
        return {key: value for key, value in items.items() if value != {}}

    context = rest(config, "")
    return {**context, "method_source": dict(sources)} if sources else context
