"""What a searched run proves: its frozen choice, the trials behind it, and what was tried beside them."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from svp_bench.audit.base import Auditor, Finding, Shelf, began, differ, fold_of, hour, roles, short, some
from svp_bench.core.errors import RecordError, plural
from svp_bench.records.bits import unpack_bits
from svp_bench.records.digests import cell_config, flat
from svp_bench.records.record import CREATED, Record, Search, Tuned
from svp_bench.records.selection import (
    AUTO_FOLDS,
    FALLBACK,
    RULE_VERSION,
    Choice,
    Trial,
    choice_path,
    context_of,
    read_choice,
)
from svp_bench.stats.inference import one_standard_error
from svp_bench.tasks.cards import ProtocolCard

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["search_findings"]

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # what may be part of a path
_TABLE = re.compile(rf"{_NAME.pattern}/{_NAME.pattern}")


def search_findings(
    record: Record,
    tuned: Tuned,
    search: Search,
    shelf: Shelf | None,
    protocol: ProtocolCard | None,
    counts: Mapping[str, int],
) -> list[Finding]:
    """Look at the choice that a searched run names, and at the records of its trials.

    Args:
        record: The run.
        tuned: What it says of its tuned values.
        search: What it says of the search.
        shelf: The records and choices beside it, None if it lies in no results folder.
        protocol: The card at hand, None if it is not the run's.
        counts: Images of each split, as the task card has them; empty if it does not know the run's data.
    """
    auditor = _SearchAuditor(record, shelf)
    auditor.look(tuned, search, protocol, counts)
    return auditor.findings


class _SearchAuditor(Auditor):
    def look(self, tuned: Tuned, search: Search, protocol: ProtocolCard | None, counts: Mapping[str, int]) -> None:
        """Look at the choice that a run names, and at its trials."""
        tried = plural(search.trials, "setting")
        track = f"searched ({search.name}, K = {search.budget}), {search.sampler}, {tried} tried on "
        self.say("note", "track", f"{track}{search.selected_on}; declaration {short(tuned.digest)}")
        if self.shelf is None:
            self.say(
                "fail", "choice", "the record lies in no results folder: give the one with its choice, --results_root R"
            )
            return
        if not _TABLE.fullmatch(tuned.table) or not _NAME.fullmatch(search.name):
            self.say(
                "fail", "choice", f"{tuned.table!r} of the search {search.name!r} names no choice: <suite>/<method>"
            )
            return
        method = tuned.table.partition("/")[2]
        seed = self.record.seed if search.nested else None
        path = choice_path(self.shelf.root, search.name, tuned.digest, self.record.task, method, seed)
        where = path.relative_to(self.shelf.root).as_posix()
        if not path.is_file():
            self.say("fail", "choice", f"{where} is missing: what chose the setting cannot be seen")
            return
        try:
            choice = read_choice(path)
        except RecordError as error:
            self.say("fail", "choice", str(error).replace(str(path), where))
            return
        problems = self._choice_problems(choice, tuned, search, where)
        if protocol is not None:
            val = protocol.stages["select"]["val"]
            if choice.folds:
                val = f"{protocol.stages['final']['train']} ({choice.folds} folds)"
            if choice.selected_on != val:
                problems.append(f"chosen on {choice.selected_on}, and {self.record.protocol} chooses on {val}")
            problems += self._count_problems(choice, protocol, counts)
        problems += self._plan_problems(choice)
        self.judge(
            "choice", problems, f"{where}, frozen {hour(choice.created)}, before the run; the config has its values"
        )
        self._trials(choice)
        self._completed(choice, path)
        self._rule(choice)
        self._quality(choice)
        self._other_searches(path)

    @staticmethod
    def _count_problems(choice: Choice, protocol: ProtocolCard, counts: Mapping[str, int]) -> list[str]:
        """Return where the number of images that chose is not that of the card's splits; a line each."""
        val, labelled = (counts.get(protocol.stages[s][r]) for s, r in (("select", "val"), ("final", "train")))
        problems, scored = [], labelled if choice.folds else val
        if scored is not None and choice.count != scored:
            problems.append(f"chosen on {plural(choice.count, 'image')}, and the task card has {scored}")
        if choice.folds and choice.search["folds"] == "auto" and val is not None and val >= choice.search["small_val"]:
            problems.append(
                f"chosen in {choice.folds} folds, and val has {plural(val, 'image')}: the search declares folds below "
                f"{choice.search['small_val']}"
            )
        return problems

    @staticmethod
    def _plan_problems(choice: Choice) -> list[str]:
        """Return where the folds of a choice are not what its search declares; a line each."""
        if choice.version < RULE_VERSION:
            return []
        declared, problems = choice.search["folds"], []
        if isinstance(declared, int) and choice.folds != declared:
            problems.append(f"chosen in {choice.folds} folds, and the search declares {declared}")
        if declared == "none" and choice.folds:
            problems.append(f"chosen in {choice.folds} folds, and the search declares none")
        if declared == "leave_one_out" and choice.folds != choice.count:
            problems.append(
                f"chosen in {choice.folds} folds of {plural(choice.count, 'image')}, and the search leaves one out"
            )
        if declared == "auto" and choice.folds and choice.folds != min(AUTO_FOLDS, choice.count):
            problems.append(f"chosen in {choice.folds} folds, and the search takes {AUTO_FOLDS}")
        if declared == "auto" and not choice.folds and choice.count < choice.search["small_val"]:
            problems.append(f"chosen on {choice.count} images of val, fewer than {choice.search['small_val']}")
        if choice.folds and choice.repeats != choice.search["repeats"]:
            problems.append(f"the images were divided {choice.repeats} times, not {choice.search['repeats']}")
        return problems

    def _completed(self, choice: Choice, path: Path) -> None:
        """Say whether other methods of the search have as many trials with a score on this task."""
        assert self.shelf is not None
        others: dict[str, int] = {}
        for file in sorted(path.parent.glob("*.json")):
            try:
                other = read_choice(file)
            except RecordError:
                continue
            if other.method != choice.method:
                others[other.method] = min(others.get(other.method, other.completed), other.completed)
        unequal = [f"{method} {count}" for method, count in others.items() if count != choice.completed]
        if unequal:
            self.say(
                "note",
                "trials",
                f"methods differ in trials with a score: {choice.method} {choice.completed}, {some(unequal)}",
            )

    def _quality(self, choice: Choice) -> None:
        """Say what the choice hangs on: a tie, the end of a grid, a single search for all seeds."""
        if choice.at_edge:
            self.say(
                "note", "grid", f"the best lies at the end of the grid: {some(choice.at_edge)}; more might be better"
            )
        if choice.version < RULE_VERSION:
            chosen = choice.trials[choice.chosen]
            ties = sum(trial.mean == chosen.mean for trial in choice.trials)
            if ties > 1:
                self.say(
                    "note",
                    "rule",
                    f"{plural(ties, 'setting')} tie with {chosen.mean:.2f} % of "
                    f"{plural(choice.count, 'image')}, and version 1 of the rule "
                    "takes the first: the choice is arbitrary among them",
                )
        if not choice.nested:
            self.say(
                "note", "track", "one search for all seeds: the interval over seeds leaves out the noise of the choice"
            )

    def _choice_problems(self, choice: Choice, tuned: Tuned, search: Search, where: str) -> list[str]:
        record, ours = self.record, dict(flat(self.record.config))
        problems = []
        if choice.digest != search.choice:
            problems.append(f"{where} is not the file that the run was made with ({short(search.choice)})")
        stated = {
            "task": (choice.task, record.task),
            "method": (choice.method, tuned.table.partition("/")[2]),
            "declaration": (choice.search_digest, tuned.digest),
            "weights": (short(choice.checkpoint_digest), short(record.checkpoint_digest)),
            "list": (choice.selected_on, search.selected_on),
            "budget": (choice.search.get("budget"), search.budget),
            "sampler": (choice.search.get("sampler"), search.sampler),
            "number of complete trials": (choice.completed, search.trials),
            "keys": (sorted(choice.values), sorted(tuned.keys)),
        }
        if choice.version >= RULE_VERSION:
            stated |= {
                "number of trials": (len(choice.trials), search.tried),
                "nesting": (choice.nested, search.nested),
                "folds": (choice.folds, search.folds),
                "ends of the grid": (list(choice.at_edge), list(search.at_edge or ())),
                "ties": (choice.ties, search.ties),
            }
        if choice.search_seed not in (None, record.seed):
            problems.append(f"the choice is that of seed {choice.search_seed}, and the run has seed {record.seed}")
        problems += [
            f"the choice's {name} is {theirs}, the record's {mine}"
            for name, (theirs, mine) in stated.items()
            if theirs != mine
        ]
        problems += [
            f"{key} is {ours.get(key)}, and the choice says {value}"
            for key, value in choice.values.items()
            if differ(ours.get(key), value)
        ]
        problems += self._context_problem(record, choice, "the run")
        start_time = began(record)
        try:
            frozen = datetime.strptime(choice.created, CREATED).replace(tzinfo=timezone.utc)
        except ValueError:
            problems.append(f"the choice's created {choice.created!r} is no time")
        else:
            if start_time is None or frozen > start_time:
                start = record.run_id if start_time is None else f"{start_time:%Y-%m-%d %H:%M:%S}"
                problems.append(
                    f"frozen {hour(choice.created)}, after the run began ({start}): it did not choose for it"
                )
        return problems

    @staticmethod
    def _context_problem(record: Record, choice: Choice, who: str) -> list[str]:
        ours = dict(flat(context_of(cell_config(record.config), list(choice.values), record.method_source)))
        theirs = dict(flat(choice.context))
        other = sorted(key for key in {*ours, *theirs} if differ(ours.get(key), theirs.get(key)))
        if not other:
            return []
        return [f"chosen with {other[0]} = {theirs.get(other[0])}, and {who} has {ours.get(other[0])}"]

    def _trials(self, choice: Choice) -> None:
        """Every trial must have the selection records, with the scores, that the choice claims."""
        assert self.shelf is not None
        problems = []
        for number, trial in enumerate(choice.trials, 1):
            found = [self.shelf.by_id.get(run_id) for run_id in trial.run_ids]
            if trial.status == "complete":
                problems += [f"trial {number}: {text}" for text in self._trial_problems(choice, trial, found)]
                continue
            if all(record is not None and record.status == "complete" for record in found):
                problems.append(f"trial {number} is said to have failed ({trial.status}), but its records are complete")
            problems += [  # a run that ended before it had a record has no name
                f"trial {number}: its record {run_id} is missing"
                for run_id, record in zip(trial.run_ids, found, strict=True)
                if run_id and record is None
            ]
        named = Counter(run_id for trial in choice.trials for run_id in trial.run_ids if run_id)
        problems += [f"{plural(count, 'trial')} are one run, {run_id}" for run_id, count in named.items() if count > 1]
        runs = sum(len(trial.run_ids) for trial in choice.trials if trial.status == "complete")
        problems += self._outside(choice)
        self.judge(
            "trials",
            problems,
            f"{runs} selection records have the scores that the choice claims, all on {choice.selected_on}; none "
            "states a test list",
        )
        if (ended := len(choice.trials) - choice.completed) > 0:
            left = plural(choice.completed, "setting")
            text = f"{ended} of {plural(len(choice.trials), 'trial')} failed: the method had {left} to choose"
            self.say("note", "trials", f"{text} from, of a budget of {choice.search['budget']}")

    def _trial_problems(self, choice: Choice, trial: Trial, found: Sequence[Record | None]) -> Iterable[str]:
        seeds, parts = choice.seeds, max(1, choice.folds * choice.repeats)
        counts = trial.counts or (choice.count,) * len(found)
        for run_id, score, record, place in zip(trial.run_ids, trial.scores, found, range(len(found)), strict=True):
            if record is None:
                yield f"its record {run_id} is missing"
                continue
            scored = record.lists.get("val")
            if record.kind != "selection" or "test" in record.lists or record.correct is not None:
                yield f"{run_id} read test images ({record.kind}, {roles(record.lists)})"
                continue
            if record.status != "complete" or record.metrics is None:
                yield f"{run_id} is {record.status}, and has no score"
                continue
            if not math.isclose(record.metrics.top1, score, abs_tol=1e-9):
                yield f"{run_id} has {record.metrics.top1:.2f} on val, the choice says {score:.2f}"
            if not _scored_as_said(choice, record, place % parts) or record.metrics.count != counts[place]:
                yield (
                    f"{run_id} was scored on {record.metrics.count} images of {scored}, the choice "
                    f"says {counts[place]} of {choice.selected_on}"
                )
            if trial.losses is not None and not math.isclose(record.metrics.loss, trial.losses[place], abs_tol=1e-9):
                said = f"the choice says {trial.losses[place]:.6f}"
                yield f"{run_id} has the loss {record.metrics.loss:.6f} on val, {said}"
            if trial.right is not None and (
                record.val_correct is None or record.val_correct.bits != trial.right[place]
            ):
                yield f"{run_id} has other images right than the choice says"
            if (record.task, record.checkpoint_digest) != (choice.task, choice.checkpoint_digest):
                yield f"{run_id} is of another task or other weights"
            if record.data_digest != choice.data_digest:
                yield f"{run_id} read other lists ({short(record.data_digest)}, not {short(choice.data_digest)})"
            ours = dict(flat(record.config))
            for key, value in trial.values.items():
                if differ(ours.get(key), value):
                    yield f"{run_id} ran with {key} = {ours.get(key)}, the choice says {value}"
            yield from self._context_problem(record, choice, run_id)
            if record.seed != seeds[place // parts]:
                yield f"{run_id} has seed {record.seed}, and the search declares {list(seeds)}"
            if trial.trainable is not None and record.parameters.trainable != trial.trainable:
                trained = plural(record.parameters.trainable, "parameter")
                yield f"{run_id} trains {trained}, the choice says {trial.trainable}"

    def _outside(self, choice: Choice) -> list[str]:
        """Return which runs on val of this search's settings and seeds the choice leaves out; note what else is here.

        Such a run is a second draw, or one that lost and was taken out, if it came before and no other choice names it.
        """
        assert self.shelf is not None
        named = {run_id for trial in choice.trials for run_id in trial.run_ids} | self._named_elsewhere(choice)
        keys = list(choice.values)
        hidden: list[Record] = []
        extra: list[Record] = []
        before: list[Record] = []
        for other in self.shelf.records:
            if (other.task, other.method, other.status) != (choice.task, self.record.method, "complete"):
                continue
            if context_of(cell_config(other.config), keys, other.method_source) != dict(choice.context):
                continue
            if other.kind == "final" and other.created < choice.created:
                before.append(other)
            elif other.kind == "selection" and other.run_id not in named:
                same = (other.checkpoint_digest, other.data_digest) == (choice.checkpoint_digest, choice.data_digest)
                ours = same and other.seed in choice.seeds and other.created <= choice.created
                ours = ours and _of_its_folds(choice, other)
                (hidden if ours and _declared(choice, other) else extra).append(other)
        for runs, what in ((extra, "scored on val outside of the search"), (before, "tested before it was over")):
            if runs:
                names = some(record.run_id for record in runs)
                self.say("note", "trials", f"further runs of this method, {what}: {len(runs)} ({names})")
        if not hidden:
            return []
        names = some(record.run_id for record in hidden)
        return [f"runs of settings and seeds that the search declares, which the choice leaves out: {names}"]

    def _named_elsewhere(self, choice: Choice) -> set[str]:
        """Return the runs that other sound choices for this task and method name as their trials."""
        assert self.shelf is not None
        found: set[str] = set()
        for file in self.shelf.choices.glob(f"*/{choice.task}/*.json"):
            try:
                other = read_choice(file)
            except RecordError:
                continue
            if (other.search_digest, other.search_seed) != (choice.search_digest, choice.search_seed):
                found.update(run_id for trial in other.trials for run_id in trial.run_ids)
        return found

    def _rule(self, choice: Choice) -> None:
        """Reckon again, by code of its own, what `read_choice` has reckoned already."""
        winner, problems = _by_the_rule(choice), []
        if winner != choice.chosen:
            problems.append(f"by its rule trial {winner + 1} wins, and the choice took {choice.chosen + 1}")
        rule = choice.search["rule"]
        self.judge("rule", problems, f"{rule}: trial {choice.chosen + 1} of {len(choice.trials)}; {choice.reason}")

    def _other_searches(self, path: Path) -> None:
        assert self.shelf is not None
        inside = path.relative_to(self.shelf.choices).parts
        method = path.stem.partition("-seed")[0]
        files = self.shelf.choices.glob("/".join(("*", *inside[1:-1], f"{method}*.json")))
        ours = [file for file in files if file.stem.partition("-seed")[0] == method]
        others = sorted({file.relative_to(self.shelf.choices).parts[0] for file in ours} - {inside[0]})
        if others:
            self.say("note", "choice", f"other searches chose for this method and task too: {some(others)}")


def _by_the_rule(choice: Choice) -> int:
    """Return which trial wins by the choice's rule; written anew, to check with.

    Version 2: accuracy and loss over the images of all runs; of equal accuracies the lower loss, then fewer trained
    parameters, then the earlier. `one_standard_error` there: the difference from the best, paired by image, is at most
    its standard error; among these as below, of equal costs the better accuracy, then the lower loss.

    Version 1: `best_on_val`: the highest mean, of equal ones the earliest. `one_standard_error`: settings within one
    (binomial) standard error of the best score on val are equal; among them the first trial, the default, wins, else
    the one that trains the fewest parameters, then the better score, then the earlier one.
    """
    if choice.version >= RULE_VERSION:
        return _by_the_paired_rule(choice)
    scored = [(index, trial.mean, trial) for index, trial in enumerate(choice.trials) if trial.mean is not None]
    best = max(mean for _, mean, _ in scored)
    if choice.search["rule"] == "best_on_val":
        return next(index for index, mean, _ in scored if mean == best)
    error = one_standard_error(best, choice.count)
    equal = [(index, mean, trial) for index, mean, trial in scored if mean >= best - error]
    if equal[0][0] == 0:
        return 0
    return min(equal, key=lambda one: (one[2].trainable or 0, -one[1], one[0]))[0]


def _by_the_paired_rule(choice: Choice) -> int:
    import numpy as np

    order = [np.asarray(part) for part in choice.images] or [np.arange(choice.count)]
    right: dict[int, npt.NDArray[np.int64]] = {}
    ranked = []
    for index, trial in enumerate(choice.trials):
        if not trial.scores or trial.right is None or trial.counts is None or trial.losses is None:
            continue
        times = np.zeros(choice.count, dtype=np.int64)
        for run, (bits, count) in enumerate(zip(trial.right, trial.counts, strict=True)):
            np.add.at(times, order[run % len(order)], unpack_bits(bits, count).astype(np.int64))
        right[index] = times
        loss = math.fsum(a * n for a, n in zip(trial.losses, trial.counts, strict=True)) / sum(trial.counts)
        ranked.append((-int(times.sum()), loss, trial.trainable or 0, index))
    best = min(ranked)[3]
    if choice.search["rule"] == "best_on_val":
        return best
    equal = []
    for score, loss, cost, index in ranked:
        d = right[best] - right[index]
        if int(d.sum()) ** 2 <= int((d * d).sum()):
            equal.append((index != 0, cost if index else 0, score, loss, index))
    return min(equal)[4]


def _scored_as_said(choice: Choice, record: Record, fold: int) -> bool:
    """Whether a trial's run was scored on val, or on its fold, as the choice says."""
    if not choice.folds:
        return fold_of(record.config) == (0, 0, 0) and record.lists.get("val") == choice.selected_on
    return fold_of(record.config) == (choice.folds, fold, choice.search_seed or 0)


def _of_its_folds(choice: Choice, record: Record) -> bool:
    """Whether a run on val holds out one of the folds of a choice, or, without folds, none."""
    folds, fold, seed = fold_of(record.config)
    if not choice.folds:
        return not folds
    return (folds, seed) == (choice.folds, choice.search_seed or 0) and fold < choice.folds * choice.repeats


def _declared(choice: Choice, record: Record) -> bool:
    """Whether a run's setting is that of a trial, or lies in the declared space."""
    ours = dict(flat(record.config))
    if any(not any(differ(ours.get(key), value) for key, value in trial.values.items()) for trial in choice.trials):
        return True
    spaces = choice.search["spaces"]
    space = spaces[choice.method] if choice.method in spaces else spaces[FALLBACK]
    return all(_holds(declared, ours.get(key)) for key, declared in space.items())


def _holds(declared: Any, value: Any) -> bool:
    """Whether a list of values or a range holds a value."""
    if not isinstance(declared, Mapping):
        return any(not differ(one, value) for one in declared)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and bool(declared["low"] <= value <= declared["high"])
