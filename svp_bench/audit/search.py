"""Check a searched run: its selected config, the trials of the search, and the runs outside of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from datetime import datetime, timezone
from math import isclose
from typing import Any

from svp_bench.audit.base import Case, Line, fold_of, short, some, split_text, start_of, verdicts
from svp_bench.core.errors import plural
from svp_bench.records.defaults import other as differ
from svp_bench.records.defaults import recipe
from svp_bench.records.digests import flat
from svp_bench.records.record import CREATED, Record
from svp_bench.records.selection import (
    AUTO_FOLDS,
    FALLBACK,
    RULE_VERSION,
    SelectedConfig,
)
from svp_bench.records.selection_rule import Trial, contains


def check_track(case: Case) -> Iterator[Line]:
    """Report whether the settings are the default ones or those of a search."""
    search, config = case.record.search, case.selected[0]
    if search is None:
        yield "pass", "default: the record states no search"
        return
    tried = f"{search.sampler}, {plural(search.trials, 'setting')} tried on {search.selected_on}"
    yield "note", f"searched ({search.name}, K = {search.budget}), {tried}; declaration {short(search.declaration)}"
    if config is not None and not config.nested:
        yield "note", "one search for all seeds: the interval over seeds leaves out the noise of the selection"


def check_config(case: Case) -> Iterator[Line]:
    """Check that the selected config exists, was written before the run, and agrees with the record."""
    config, where = case.selected
    if config is not None:
        good = f"{where}, selected {config.created}, before the run; the config has its values"
        yield from verdicts(_config_problems(case, config), good)
    elif where:
        yield "fail", where


def _config_problems(case: Case, config: SelectedConfig) -> Iterator[str]:
    record, search = case.record, case.record.search
    assert search is not None
    ours, expected = dict(flat(record.config)), config.summary()
    if config.search_seed not in (None, record.seed):
        yield f"the selected config is that of seed {config.search_seed}, and the run has seed {record.seed}"
    stated = {field.name: (getattr(expected, field.name), getattr(search, field.name)) for field in fields(search)}
    named = recipe(config.method)  # else it is the name of a method file, whose class and arguments the context has
    for key in ("task", *(["method"] if named else []), "checkpoint_digest"):
        stated[key] = getattr(config, key), getattr(record, key)
    for name, (theirs, mine) in stated.items():
        if theirs != mine:
            yield f"the {name} of the selected config is {theirs}, that of the record {mine}"
    for key, value in config.values.items():
        if differ(ours.get(key), value):
            yield f"{key} is {ours.get(key)}, and in the selected config {value}"
    yield from _context_problems(case, record, config, "the run")
    start = start_of(record)
    try:
        written = datetime.strptime(config.created, CREATED).replace(tzinfo=timezone.utc)
    except ValueError:
        yield f"'created' of the selected config is {config.created!r}, which is not a time"
    else:
        if start is None or written > start:
            began = record.run_id if start is None else f"{start:%Y-%m-%dT%H:%M:%S+00:00}"
            yield f"selected {config.created}, after the run began ({began})"
    yield from _split_problems(case, config)


def _context_problems(case: Case, record: Record, config: SelectedConfig, who: str) -> Iterator[str]:
    assert case.store is not None  # it holds the selected config
    context, digest = case.store.context(record, tuple(config.values))
    if digest == config.todays_digest:
        return
    ours, theirs = dict(flat(context)), dict(flat(config.todays_context))
    for key in sorted(key for key in {*ours, *theirs} if differ(ours.get(key), theirs.get(key)))[:1]:
        yield f"selected with {key} = {theirs.get(key)}, and {who} has {ours.get(key)}"


def _split_problems(case: Case, config: SelectedConfig) -> Iterator[str]:
    """Yield how splits, folds and numbers of images of the selection differ from the cards and the search."""
    protocol, counts, folds = case.cards.protocol, case.split_counts, config.folds
    new = config.version >= RULE_VERSION
    declared, small = (config.search["folds"], config.search["small_val"]) if new else ("none", 0)
    if protocol is not None:
        val, labelled = protocol.stages["select"]["val"], protocol.stages["final"]["train"]
        allowed = f"{labelled} ({folds} folds)" if folds else val
        scored, in_val = counts.get(labelled if folds else val), counts.get(val)
        if config.selected_on != allowed:
            yield f"selected on {config.selected_on}, and {case.record.protocol} selects on {allowed}"
        if scored is not None and config.count != scored:
            yield f"selected on {plural(config.count, 'image')}, and the task card has {scored}"
        if folds and declared == "auto" and in_val is not None and in_val >= small:
            yield f"selected in {folds} folds, and val has {in_val} images: the search declares folds below {small}"
    auto = min(AUTO_FOLDS, config.count) if folds else 0
    expected = {"none": 0, "leave_one_out": config.count, "auto": auto}.get(declared, declared)
    if expected is not None and folds != expected:
        yield f"selected in {folds} folds of {plural(config.count, 'image')}, and the search declares {declared}"
    if declared == "auto" and not folds and config.count < small:
        yield f"selected on {config.count} images of val, fewer than {small}"
    if folds and config.repeats != config.search["repeats"]:
        yield f"the images were divided {config.repeats} times, not {config.search['repeats']}"


def check_trials(case: Case) -> Iterator[Line]:
    """Check that each trial has selection records with the stated scores."""
    config, store = case.selected[0], case.store
    if config is None or store is None:
        return
    problems: list[str] = []
    for number, trial in enumerate(config.trials, 1):
        found = [store.by_id.get(run_id) for run_id in trial.run_ids]
        if trial.status == "complete":
            problems += [f"trial {number}: {text}" for text in _trial_problems(case, config, trial, found)]
            continue
        if all(record is not None and record.status == "complete" for record in found):
            problems.append(f"trial {number} is stated as failed ({trial.status}), but its records are complete")
        names = zip(trial.run_ids, found, strict=True)  # "" for a run without a record
        problems += [f"trial {number}: its record {one} is missing" for one, record in names if one and record is None]
    named = Counter(run_id for trial in config.trials for run_id in trial.run_ids if run_id)
    problems += [f"{plural(count, 'trial')} are one run, {run_id}" for run_id, count in named.items() if count > 1]
    runs = sum(len(trial.run_ids) for trial in config.trials if trial.status == "complete")
    good = f"{runs} selection records have the stated scores, all on {config.selected_on}; none states a test split"
    yield from verdicts(problems, good)
    if config.completed < len(config.trials):
        text = f"{len(config.trials) - config.completed} of {plural(len(config.trials), 'trial')} failed"
        budget = config.search["budget"]
        yield "note", f"{text}: {plural(config.completed, 'setting')} to select from, of a budget of {budget}"


def _trial_problems(case: Case, config: SelectedConfig, trial: Trial, found: Sequence[Record | None]) -> Iterable[str]:
    parts = max(1, config.folds * config.repeats)
    counts = trial.counts or (config.count,) * len(found)
    for place, (run_id, record) in enumerate(zip(trial.run_ids, found, strict=True)):
        if record is None:
            yield f"its record {run_id} is missing"
            continue
        if record.kind != "selection" or "test" in record.splits or record.correct is not None:
            yield f"{run_id} read test images ({record.kind}, {split_text(record.splits)})"
            continue
        if record.status != "complete" or record.metrics is None:
            yield f"{run_id} is {record.status}, and has no score"
            continue
        ours, bits = dict(flat(record.config)), record.val_correct.bits if record.val_correct else None
        if config.folds:
            scored: Any = (fold_of(record.config), (config.folds, place % parts, config.search_seed or 0))
        else:
            scored = ((fold_of(record.config), record.splits.get("val")), ((0, 0, 0), config.selected_on))
        stated: dict[str, tuple[Any, Any]] = {
            "top1": (record.metrics.top1, trial.scores[place]),
            "loss": (record.metrics.loss, trial.losses[place] if trial.losses else record.metrics.loss),
            "images": (record.metrics.count, counts[place]),
            "split": scored,
            "correct images": (bits, trial.right[place] if trial.right else bits),
            "task": (record.task, config.task),
            "weights": (short(record.checkpoint_digest), short(config.checkpoint_digest)),
            "data": (short(record.data_digest), short(config.data_digest)),
            "seed": (record.seed, config.seeds[place // parts]),
            "trained parameters": (record.parameters.trainable, trial.trainable),
            **{key: (ours.get(key), value) for key, value in trial.values.items()},
        }
        for name, (mine, theirs) in stated.items():
            close = isinstance(mine, float) and isinstance(theirs, float) and isclose(mine, theirs, abs_tol=1e-9)
            if not close and differ(mine, theirs):
                yield f"{run_id}: {name} is {str(mine)[:60]}, and in the selected config {str(theirs)[:60]}"
        yield from _context_problems(case, record, config, run_id)


def check_outside(case: Case) -> Iterator[Line]:
    """Check that the selected config names all runs on val of its settings and seeds."""
    config, _ = case.selected
    if config is None or case.store is None:
        return
    of_task = [one for one in case.store.selected_configs.values() if one.task == config.task]
    search = (config.search_digest, config.search_seed)
    configs = [config, *(one for one in of_task if (one.search_digest, one.search_seed) != search)]
    named = {run_id for one in configs for trial in one.trials for run_id in trial.run_ids}
    hidden: list[str] = []
    extra: list[str] = []
    tested: list[str] = []
    for other in case.store.by_task.get(config.task, ()):
        if (other.method, other.status) != (case.record.method, "complete"):
            continue
        if case.store.context(other, tuple(config.values))[0] != config.todays_context:
            continue
        if other.kind == "final" and other.created < config.created:
            tested.append(other.run_id)
        elif other.kind == "selection" and other.run_id not in named:
            (hidden if _belongs(config, other) else extra).append(other.run_id)
    for runs, event in ((extra, "scored on val outside of the search"), (tested, "tested before the search ended")):
        if runs:
            yield "note", f"further runs of this method, {event}: {len(runs)} ({some(runs)})"
    if hidden:
        yield "fail", f"runs of settings and seeds of the search that the selected config leaves out: {some(hidden)}"


def _belongs(config: SelectedConfig, record: Record) -> bool:
    """Return whether a run on val has a setting, seed, split and time of the search."""
    same = (record.checkpoint_digest, record.data_digest) == (config.checkpoint_digest, config.data_digest)
    if not same or record.seed not in config.seeds or record.created > config.created:
        return False
    folds, fold, seed = fold_of(record.config)
    division = (folds, seed) == (config.folds, config.search_seed or 0) and fold < config.folds * config.repeats
    if not (division if config.folds else not folds):
        return False
    ours = dict(flat(record.config))
    if any(not any(differ(ours.get(key), value) for key, value in trial.values.items()) for trial in config.trials):
        return True
    spaces = config.search["spaces"]
    space = spaces[config.method] if config.method in spaces else spaces[FALLBACK]
    return all(contains(declared, ours.get(key)) for key, declared in space.items())


def check_rule(case: Case) -> Iterator[Line]:
    """Report the selection rule, which `read_selected_config` checks, and ties that it breaks by order."""
    config, _ = case.selected
    if config is None:
        return
    rule = config.search["rule"]
    yield "pass", f"{rule}: trial {config.chosen + 1} of {len(config.trials)}; {config.reason}"
    chosen = config.trials[config.chosen]
    ties = sum(trial.mean == chosen.mean for trial in config.trials)
    if config.version < RULE_VERSION and ties > 1:
        score = f"{chosen.mean:.2f} % of {plural(config.count, 'image')}"
        yield (
            "note",
            f"{plural(ties, 'setting')} tie with {score}, and version 1 of the rule takes the first: the selection is "
            "arbitrary among them",
        )


def check_grid(case: Case) -> Iterator[Line]:
    """Check that the best setting is not at an edge of the grid."""
    config, _ = case.selected
    if config is not None and config.at_edge:
        yield "note", f"the best lies at the end of the grid: {some(config.at_edge)}; values beyond may be better"


def check_other_searches(case: Case) -> Iterator[Line]:
    """Report other searches of the task and method, and methods of this search with another number of trials."""
    config, where = case.selected
    if config is None or case.store is None:
        return
    ours, folders, completed = where.split("/")[1], set(), dict[str, int]()
    for path, one in case.store.selected_configs.items():
        if one.task != config.task:
            continue
        folder = path.relative_to(case.store.root).parts[1]
        if one.method == config.method and folder != ours:
            folders.add(folder)
        elif one.method != config.method and folder == ours:
            completed[one.method] = min(completed.get(one.method, one.completed), one.completed)
    if folders:
        yield "note", f"other searches selected for this method and task too: {some(sorted(folders))}"
    unequal = [f"{method} {count}" for method, count in completed.items() if count != config.completed]
    if unequal:
        counts = f"{config.method} {config.completed}, {some(unequal)}"
        yield "note", f"methods differ in trials with a score: {counts}"
