"""What a record proves, in plain words: `svp-bench audit`. No pictures, no weights and no torch are needed.

Each line is `pass` (checked, and as it should be), `note` (a reader should know it) or `fail` (the number is not what a
table claims, or nobody can see that it is). A record passes if no line fails. What fails, and what does not:

- A file that breaks the schema, or that lies where another record belongs, fails: tables list it as a problem.
- A run that is not complete fails, and so does a complete one whose config cuts it short (`limit_*`). A selection
  record is not failed for its kind: tables never show it, and that is said.
- Facts that contradict the config, the run's name or the cards fail: seed, task, lists, numbers of pictures, classes.
  The digests leave the seed out, so that an edited seed shows here alone.
- Another version of the task card fails, as tables leave it out. Another version of the protocol card is a note: tables
  give it a section of its own, but its lists and budget cannot be checked with the card at hand.
- More epochs than the protocol's budget fail: that is what the budget is for. Fewer, or other values than card and
  recipe give, are notes: tables make them a row of their own, and nothing in a record says how they were chosen.
- Drawn stand-ins fail. Files that differ from the card, another variant, and random weights are notes: tables mark
  them.
- Of a searched run, all of this fails: the choice is missing, was changed, was frozen after the run began, was made for
  another setting, broke its budget or its rule, was made on another list than val, or claims trials whose selection
  records are missing or say something else. What was tested, or scored on val, outside of the search is a note.
- The same cell and seed run twice on the same code with another score fails, for both records: tables show the newer
  one, so that whoever repeats a seed until its score pleases is seen. A repetition that only checks belongs to
  `svp-bench rerun`, whose records lie apart. On other code, or with the same score, it is a note. "The same code" is
  the same known commit without changes, or, of installed packages, the same version.
- Two seeds of a cell with the same score, bits, loss and times fail: one is a copy.
- A dirty tree fails: the run cannot be rebuilt from a commit. An installed package without a commit is a note.

An audit believes what the files say. It cannot see runs whose records were deleted, nor numbers invented with all their
digests; `svp-bench rerun` repeats a run.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal

from svp_bench._version import __version__
from svp_bench.cards import ProtocolCard, TaskCard, load_protocol, load_suite, load_task
from svp_bench.errors import RecordError, SvpBenchError, UsageError
from svp_bench.plain_yaml import read_yaml
from svp_bench.resources import configs_dir
from svp_bench.results.choices import Choice, Trial, choice_path, context_of, read_choice
from svp_bench.results.digests import cell_config, flat
from svp_bench.results.files import read_record, read_records, record_path
from svp_bench.results.record import CREATED, Record, Search, Tuned
from svp_bench.results.stats import StatsError, one_standard_error

__all__ = ["Audit", "Finding", "audit", "render"]

Verdict = Literal["pass", "note", "fail"]
_RULE = "one_standard_error"
_ROLES = {"final": ("train", "test"), "selection": ("train", "val")}
_STAGES = {"final": "final", "selection": "select"}
_CUTS = ("limit_train_batches", "limit_test_batches", "limit_val_batches", "overfit_batches", "fast_dev_run")
_NAMED_WEIGHTS = ("hub", "embedded", "none")
_SHOWN = 6  # names in one line
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # what may be part of a path
_TABLE = re.compile(rf"{_NAME.pattern}/{_NAME.pattern}")


@dataclass(frozen=True)
class Finding:
    """One line of an audit.

    Attributes:
        verdict: "pass", "note" or "fail".
        subject: What was looked at, in a word.
        text: What was found, one line.
    """

    verdict: Verdict
    subject: str
    text: str


@dataclass(frozen=True)
class Audit:
    """What one file proves.

    Attributes:
        path: The file.
        findings: One line each.
    """

    path: Path
    findings: tuple[Finding, ...]

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The lines that fail."""
        return tuple(finding for finding in self.findings if finding.verdict == "fail")


def audit(paths: Sequence[Path | str], results_root: Path | str | None = None) -> list[Audit]:
    """Audit records.

    Args:
        paths: Files, and folders: of a results folder, all that lies below its `records/`; of another, all JSON files.
        results_root: Where other records and the choices of searches are; by default the folder that a record lies in
            (`R/records/<suite>/<task>/<run>.json`).

    Returns:
        One audit a file; one that cannot be read has a failing line, and the others go on.

    Raises:
        UsageError: If a folder holds no record, or `results_root` is no folder.
    """
    if results_root is not None and not Path(results_root).is_dir():
        raise UsageError(f"--results_root {results_root} is no folder; give the one that holds records/ and choices/")
    shelves: dict[Path, _Shelf] = {}
    audits = []
    for path in [file for given in paths for file in _files(Path(given))]:
        root = Path(results_root) if results_root is not None else _root_of(path)
        shelf = shelves.setdefault(root, _Shelf(root)) if root is not None else None
        audits.append(_audit_file(path, shelf))
    return audits


def render(audits: Sequence[Audit]) -> str:
    """Return the text to print: each file with its lines, and the sum."""
    lines: list[str] = []
    width = max((len(finding.subject) for one in audits for finding in one.findings), default=0)
    for one in audits:
        lines.append(str(one.path))
        lines += [f"  {found.verdict}  {found.subject:<{width}}  {found.text}" for found in one.findings]
        failed = ", ".join(dict.fromkeys(finding.subject for finding in one.failures))
        lines += [f"  → fails: {failed}" if failed else "  → passes", ""]
    good = sum(not one.failures for one in audits)
    count = f"{len(audits)} record{'s' if len(audits) != 1 else ''}"
    lines.append(f"{count}: {good} pass{'es' if good == 1 else ''}, {len(audits) - good} fail")
    return "\n".join(lines) + "\n"


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    base = path / "records" if (path / "records").is_dir() else path
    found = sorted(
        file
        for file in base.rglob("*.json")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(base).parts)
    )
    if not found:
        raise UsageError(f"{path} holds no record; `svp-bench fit` writes them below results/records")
    return found


def _root_of(path: Path) -> Path | None:
    """The results folder that a file lies in, if it lies where a record belongs."""
    absolute = path.absolute()
    return absolute.parents[3] if len(absolute.parents) > 3 and absolute.parents[2].name == "records" else None


@dataclass
class _Shelf:
    """The records of a results folder, read once.

    Attributes:
        root: The folder.
    """

    root: Path

    @cached_property
    def records(self) -> list[Record]:
        return read_records(self.root)[0]

    @cached_property
    def by_id(self) -> dict[str, Record]:
        return {record.run_id: record for record in self.records}

    @property
    def choices(self) -> Path:
        return self.root / "choices"


def _audit_file(path: Path, shelf: _Shelf | None) -> Audit:
    try:
        record = read_record(path)
    except RecordError as error:
        return Audit(path, (Finding("fail", "schema", " ".join(str(error).removeprefix(f"{path}: ").split())),))
    auditor = _Auditor(record, path, shelf)
    auditor.look()
    return Audit(path, tuple(auditor.findings))


# ---------------------------------------------------------------------------------------------------------- one record


@dataclass
class _Auditor:
    record: Record
    path: Path
    shelf: _Shelf | None
    findings: list[Finding] = field(default_factory=list)

    def say(self, verdict: Verdict, subject: str, text: str) -> None:
        self.findings.append(Finding(verdict, subject, " ".join(text.split())))

    def judge(self, subject: str, problems: Sequence[str], good: str, verdict: Verdict = "fail") -> None:
        """Say all problems, or what is good if there are none."""
        for problem in problems:
            self.say(verdict, subject, problem)
        if not problems:
            self.say("pass", subject, good)

    def look(self) -> None:
        """Look at everything."""
        record = self.record
        scored = f"its {record.correct.count} bits give the score, " if record.correct else ""
        self.say("pass", "schema", f"schema {record.schema}; {scored}its digests belong to its config")
        self._place()
        self._status()
        self._identity()
        card, protocol = self._cards()
        self._lists(protocol)
        if card is not None:
            self._counts(card)
        self._data()
        self._weights()
        self._budget(protocol)
        self._track(protocol)
        self._seeds()
        self._repetitions()
        self._tested_settings()
        self._code()
        self._machine()

    # --- the record itself -------------------------------------------------------------------------------------------

    def _place(self) -> None:
        own = f"{self.record.run_id}.json"
        root = _root_of(self.path)
        if root is not None and self.path.absolute() != record_path(self.record, root):
            home = record_path(self.record, root).relative_to(root).as_posix()
            self.say("fail", "schema", f"the file is a copy of {home}, or was moved from there: tables do not count it")
        elif self.path.name != own:
            self.say("note", "schema", f"the file is not named after its run, {own}")

    def _status(self) -> None:
        record = self.record
        asked = {key: _get(record.config, f"trainer.{key}") for key in _CUTS}
        cut = [f"trainer.{key} {value}" for key, value in asked.items() if _cuts(value)]
        problems = []
        if record.status != "complete":
            problems.append(f"{record.status}: {record.status_reason or 'trained, not tested'}; no table counts it")
        elif cut:
            problems.append(f"said to be complete, but its config cuts it short: {', '.join(cut)}")
        epochs = _get(record.config, "trainer.max_epochs")
        if record.status == "complete" and isinstance(epochs, int) and record.epochs != epochs:
            problems.append(f"said to be complete after {record.epochs} epochs, and its config asks for {epochs}")
        self.judge("status", problems, f"complete: {record.epochs} epochs")

    def _identity(self) -> None:
        """The facts beside the config must be those of the config: digests do not cover the seed."""
        record, config = self.record, self.record.config
        pairs: list[tuple[str, Any, Any]] = [
            ("seed", record.seed, config.get("seed_everything")),
            ("task", record.task, _get(config, "data.task")),
            ("stage", record.stage, _get(config, "data.stage") or "final"),
            ("backbone", record.backbone, _get(config, "model.backbone")),
        ]
        if (precision := _get(config, "trainer.precision")) is not None:
            pairs.append(("precision", record.precision, precision))
        if (protocol := _get(config, "data.protocol")) is not None:
            pairs.append(("protocol", record.protocol, protocol))
        source = str(_get(config, "model.checkpoint"))
        pairs.append(("checkpoint", record.checkpoint, source if source in _NAMED_WEIGHTS else Path(source).name))
        arguments = _get(config, "model.method.init_args")
        pairs += [
            (f"method_args.{key}", record.method_args[key], value)
            for key, value in (arguments.items() if isinstance(arguments, Mapping) else ())
            if key in record.method_args
        ]
        problems = [
            f"{key} is {ours!r}, but the config says {theirs!r}" for key, ours, theirs in pairs if ours != theirs
        ]
        digest = record.setting_digest.removeprefix("sha256:")[:8]
        start, _, end = record.run_id.partition("-seed")
        if not start.startswith(f"{record.method}-") or not end.startswith(f"{record.seed}-{digest}-"):
            problems.append(
                f"the run is named {record.run_id}, but its method is {record.method}, its seed {record.seed} and its "
                f"setting {digest}"
            )
        recipe = _recipe(record.method)
        shipped = str(recipe.get("model.method.class_path", "")).split(".")[-1]
        theirs = str(_get(config, "model.method.class_path"))
        if shipped and theirs.split(".")[-1] != shipped:
            problems.append(f"the method is {record.method}, but the config's class is {theirs}")
        self.judge("identity", problems, f"{record.method}, seed {record.seed}: name, facts and config agree")
        if not theirs.startswith("svp_bench."):
            self.say(
                "note", "identity", f"the method's class {theirs} is not part of svp-bench; no commit names its code"
            )
        callbacks = _get(config, "trainer.callbacks")
        if callbacks:
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            names = [str(one.get("class_path", one)) if isinstance(one, Mapping) else str(one) for one in callbacks]
            self.say("note", "identity", f"callbacks of its own ran along: {', '.join(names)}")

    # --- lists, data, weights ----------------------------------------------------------------------------------------

    def _cards(self) -> tuple[TaskCard | None, ProtocolCard | None]:
        """The cards at hand, each None if it is not the one that the run was made with."""
        record = self.record
        card: TaskCard | None = None
        protocol: ProtocolCard | None = None
        try:
            card, suite_protocol = _task_card(record.task)
        except UsageError:
            self.say("fail", "protocol", f"there is no task card {record.task} here: no table has such a task")
            return None, None
        if card.version != record.task_version:
            self.say(
                "fail",
                "protocol",
                f"run on version {record.task_version} of the task card, now {card.version}: tables leave it out",
            )
            card = None
        try:
            protocol = _protocol_card(record.protocol)
        except UsageError:
            self.say(
                "note",
                "protocol",
                f"{record.protocol} version {record.protocol_version}: there is no such card here, so its lists and "
                "budget were not checked",
            )
            return card, None
        if protocol.version != record.protocol_version:
            self.say(
                "note",
                "protocol",
                f"{record.protocol} version {record.protocol_version}; the card at hand is version {protocol.version}, "
                "so that lists and budget were not checked",
            )
            return card, None
        own = "" if record.protocol == suite_protocol else f"; the suite's own is {suite_protocol}"
        verdict: Verdict = "note" if own else "pass"
        self.say(verdict, "protocol", f"{record.protocol} version {record.protocol_version}, as the card at hand{own}")
        return card, protocol

    def _lists(self, protocol: ProtocolCard | None) -> None:
        record = self.record
        problems = []
        card_says = dict(protocol.stages[record.stage]) if protocol and record.stage in protocol.stages else None
        if sorted(record.lists) != sorted(_ROLES[record.kind]) or record.stage != _STAGES[record.kind]:
            problems.append(
                f"a {record.kind} record reads {' and '.join(_ROLES[record.kind])} in stage {_STAGES[record.kind]}, "
                f"this one says stage {record.stage} and {_roles(record.lists)}"
            )
        elif card_says is not None and card_says != dict(record.lists):
            problems.append(f"the lists are {_roles(record.lists)}, and {record.protocol} says {_roles(card_says)}")
        if record.kind == "final" and "val_seconds" in record.times:
            problems.append("a list was scored during the training of a final run (times.val_seconds)")
        if record.correct is not None and record.correct.list != record.lists.get("test"):
            problems.append(f"the bits are those of the list {record.correct.list!r}")
        if record.kind == "selection":
            good = (
                f"trained on {record.lists.get('train')}, scored on {record.lists.get('val')}, which chooses; no test "
                "picture was read, and tables never show it"
            )
        else:
            good = (
                f"trained on {record.lists.get('train')}; then {record.lists.get('test')} read once, with the weights "
                f"of epoch {record.epochs} (stage final has no list that could choose)"
            )
        self.judge("lists", problems, good)

    def _counts(self, card: TaskCard) -> None:
        record, problems = self.record, []
        role = "test" if record.kind == "final" else "val"
        name = record.lists.get(role, "")
        if record.metrics is None:
            return
        forms: Mapping[str, Mapping[str, int]] = {"card": card.counts, **card.variants}
        expected = forms.get(record.data_variant, {}).get(name)
        if record.data_variant not in (*forms, "drawn"):
            problems.append(f"the card has no data variant {record.data_variant!r}")
        elif expected is not None and record.data_status == "as_card" and record.metrics.count != expected:
            problems.append(f"{name} has {record.metrics.count} pictures, and the card says {expected}")
        if record.metrics.per_class is not None and len(record.metrics.per_class.count) != card.classes:
            problems.append(
                f"scores of {len(record.metrics.per_class.count)} classes, and the card says {card.classes}"
            )
        problems += self._other_digests()
        digest = f" ({_short(record.correct.list_digest)})" if record.correct is not None else ""
        self.judge("pictures", problems, f"{record.metrics.count} pictures of {name}{digest}, {card.classes} classes")

    def _other_digests(self) -> list[str]:
        """Records of the same lists must have the same digest of the test list."""
        record = self.record
        if self.shelf is None or record.correct is None:
            return []
        return [
            f"{other.run_id} read the same lists, and has another digest of {record.correct.list}"
            for other in self.shelf.records
            if (other.task, other.data_digest) == (record.task, record.data_digest)
            and other.correct is not None
            and (other.correct.list, other.stage) == (record.correct.list, record.stage)
            and other.correct.list_digest != record.correct.list_digest
        ]

    def _data(self) -> None:
        record = self.record
        digest = _short(record.data_digest)
        if record.data_variant == "drawn":
            self.say("fail", "data", "a drawn stand-in, not the data set: the number says nothing about the task")
            return
        if record.data_status == "different":
            self.say("note", "data", f"differs from the card: {'; '.join(record.data_notes) or 'no reason is given'}")
        elif record.data_variant != "card":
            self.say("note", "data", f"the card's variant {record.data_variant}, lists {digest}")
        else:
            self.say("pass", "data", f"as the card says, lists {digest}")
        others = {
            other.data_digest
            for other in (self.shelf.records if self.shelf else ())
            if (other.task, other.stage, other.protocol) == (record.task, record.stage, record.protocol)
            and (other.status, other.data_variant) == ("complete", record.data_variant)
        } - {record.data_digest}
        if others:
            shown = ", ".join(sorted(map(_short, others))[:_SHOWN])
            self.say("note", "data", f"other runs of {record.task} read other lists ({shown}): they are other cells")

    def _weights(self) -> None:
        record = self.record
        if record.checkpoint_digest is None:
            self.say("note", "weights", "random weights: plumbing, not transfer; tables keep it apart, unranked")
        else:
            self.say(
                "pass", "weights", f"{record.backbone} from {record.checkpoint}, {_short(record.checkpoint_digest)}"
            )

    # --- budget and search -------------------------------------------------------------------------------------------

    def _budget(self, protocol: ProtocolCard | None) -> None:
        record = self.record
        if protocol is None:
            return
        training = dict(flat(protocol.training))
        allowed, used = training.get("trainer.max_epochs"), _get(record.config, "trainer.max_epochs")
        if not isinstance(allowed, int) or not isinstance(used, int):
            self.say("note", "budget", f"{protocol.name} or the config gives no number of epochs")
        elif used > allowed:
            self.say("fail", "budget", f"{used} epochs, more than the {allowed} of {protocol.name}")
        elif used < allowed:
            self.say("note", "budget", f"{used} epochs, fewer than the {allowed} of {protocol.name}")
        else:
            self.say("pass", "budget", f"{used} epochs, as {protocol.name} says")

    def _departures(self, protocol: ProtocolCard | None, searched: Iterable[str]) -> list[str]:
        """Values other than those of protocol card, task config and recipe at hand; epochs have their own line."""
        record = self.record
        layers = {**(dict(flat(protocol.training)) if protocol is not None else {}), **_layer(f"{record.task}.yaml")}
        layers.update(_recipe(record.method))
        ours = dict(flat(record.config))
        spared = {"trainer.max_epochs", "model.method.class_path", "data.task", "model.backbone", "model.checkpoint"}
        return [
            f"{key} {ours[key]}, not {value}"
            for key, value in sorted(layers.items())
            if key in ours and key not in spared and key not in searched and _other(ours[key], value)
        ]

    def _track(self, protocol: ProtocolCard | None) -> None:
        record, tuned = self.record, self.record.tuned
        departures = self._departures(protocol, tuned.keys if tuned else ())
        if tuned is None:
            self.say("pass", "track", "default: no tuned table and no search gave it values")
        elif tuned.search is None:
            self._tuned_table(tuned)
        else:
            self._searched(tuned, tuned.search, protocol)
        if not _recipe(record.method):
            self.say("note", "settings", f"there is no recipe of the method {record.method} here to compare with")
        self.judge(
            "settings",
            [f"chosen by hand, as far as the record says: {'; '.join(departures)}"] if departures else [],
            "as protocol card, task and recipe at hand" + (", beside what was tuned" if tuned else ""),
            "note",
        )

    def _tuned_table(self, tuned: Tuned) -> None:
        record = self.record
        if not _TABLE.fullmatch(tuned.table):
            self.say("fail", "track", f"tuned.table {tuned.table!r} is no name of a table: <suite>/<method>")
            return
        path = configs_dir() / "tuned" / f"{tuned.table}.yaml"
        keys = ", ".join(tuned.keys) or "nothing"
        if not path.is_file():
            self.say("note", "track", f"tuned ({tuned.table}), which set {keys}; that table is not at hand")
            return
        if f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" != tuned.digest:
            self.say("note", "track", f"tuned ({tuned.table}), which set {keys}; the table at hand is another version")
            return
        table = read_yaml(path).value
        entries = _get(table, f"tasks.{record.task.split('/')[1]}") or {}
        ours = dict(flat(record.config))
        wrong = [f"{key} is {ours.get(key)}, the table says {entries.get(key)}" for key in tuned.keys]
        wrong = [text for text, key in zip(wrong, tuned.keys, strict=True) if _other(ours.get(key), entries.get(key))]
        good = f"tuned ({tuned.table}), selected on {table.get('selected_on')}: {keys}"
        self.judge("track", wrong, good)

    def _searched(self, tuned: Tuned, search: Search, protocol: ProtocolCard | None) -> None:
        track = f"searched ({search.name}, K = {search.budget}), {search.sampler}, {search.trials} settings tried on "
        self.say("note", "track", f"{track}{search.selected_on}; declaration {_short(tuned.digest)}")
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
        path = choice_path(self.shelf.root, search.name, tuned.digest, self.record.task, method)
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
        val = protocol.stages["select"]["val"] if protocol is not None else None
        if val is not None and choice.selected_on != val:
            problems.append(f"chosen on {choice.selected_on}, and {self.record.protocol} chooses on {val}")
        self.judge(
            "choice", problems, f"{where}, frozen {_hour(choice.created)}, before the run; the config has its values"
        )
        self._trials(choice)
        self._rule(choice)
        self._other_searches(path)

    def _choice_problems(self, choice: Choice, tuned: Tuned, search: Search, where: str) -> list[str]:
        record, ours = self.record, dict(flat(self.record.config))
        problems = []
        if choice.digest != search.choice:
            problems.append(f"{where} is not the file that the run was made with ({_short(search.choice)})")
        stated = {
            "task": (choice.task, record.task),
            "declaration": (choice.search_digest, tuned.digest),
            "weights": (_short(choice.checkpoint_digest), _short(record.checkpoint_digest)),
            "list": (choice.selected_on, search.selected_on),
            "budget": (choice.search.get("budget"), search.budget),
            "sampler": (choice.search.get("sampler"), search.sampler),
            "number of trials": (len(choice.trials), search.trials),
            "keys": (sorted(choice.values), sorted(tuned.keys)),
        }
        problems += [
            f"the choice's {name} is {theirs}, the record's {mine}"
            for name, (theirs, mine) in stated.items()
            if theirs != mine
        ]
        if len(choice.trials) > search.budget:
            problems.append(f"{len(choice.trials)} settings were tried, more than K = {search.budget}")
        problems += [
            f"{key} is {ours.get(key)}, and the choice says {value}"
            for key, value in choice.values.items()
            if _other(ours.get(key), value)
        ]
        problems += self._context_problem(record, choice, "the run")
        began = _began(record)
        try:
            frozen = datetime.strptime(choice.created, CREATED).replace(tzinfo=timezone.utc)
        except ValueError:
            problems.append(f"the choice's created {choice.created!r} is no time")
        else:
            if began is None or frozen > began:
                start = record.run_id if began is None else f"{began:%Y-%m-%d %H:%M:%S}"
                problems.append(
                    f"frozen {_hour(choice.created)}, after the run began ({start}): it did not choose for it"
                )
        return problems

    @staticmethod
    def _context_problem(record: Record, choice: Choice, who: str) -> list[str]:
        ours = dict(flat(context_of(cell_config(record.config), list(choice.values))))
        theirs = dict(flat(choice.context))
        other = sorted(key for key in {*ours, *theirs} if _other(ours.get(key), theirs.get(key)))
        if not other:
            return []
        return [f"chosen with {other[0]} = {theirs.get(other[0])}, and {who} has {ours.get(other[0])}"]

    def _trials(self, choice: Choice) -> None:
        """Every trial must have the selection records, with the scores, that the choice claims."""
        assert self.shelf is not None
        problems = []
        seeds = choice.search.get("seeds")
        for number, trial in enumerate(choice.trials, 1):
            found = [self.shelf.by_id.get(run_id) for run_id in trial.run_ids]
            if trial.status != "complete":
                done = [record for record in found if record is not None and record.status == "complete"]
                if trial.run_ids and len(done) == len(trial.run_ids):
                    problems.append(
                        f"trial {number} is said to have failed ({trial.status}), but its records are complete"
                    )
                continue
            problems += [f"trial {number}: {text}" for text in self._trial_problems(choice, trial, found)]
            if isinstance(seeds, list) and len(trial.run_ids) != len(seeds):
                problems.append(f"trial {number} has {len(trial.run_ids)} runs, and the search has {len(seeds)} seeds")
        runs = sum(len(trial.run_ids) for trial in choice.trials if trial.status == "complete")
        self.judge(
            "trials",
            problems,
            f"{runs} selection records have the scores that the choice claims, all on {choice.selected_on}; none read "
            "a test picture",
        )
        self._outside(choice)

    def _trial_problems(self, choice: Choice, trial: Trial, found: Sequence[Record | None]) -> Iterable[str]:
        if len(trial.scores) != len(trial.run_ids):
            yield f"{len(trial.scores)} scores of {len(trial.run_ids)} runs"
            return
        seeds = choice.search.get("seeds")
        for run_id, score, record, place in zip(trial.run_ids, trial.scores, found, range(len(found)), strict=True):
            if record is None:
                yield f"its record {run_id} is missing"
                continue
            if record.kind != "selection" or "test" in record.lists or record.correct is not None:
                yield f"{run_id} read test pictures ({record.kind}, {_roles(record.lists)})"
                continue
            if record.status != "complete" or record.metrics is None:
                yield f"{run_id} is {record.status}, and has no score"
                continue
            if not math.isclose(record.metrics.top1, score, abs_tol=1e-9):
                yield f"{run_id} has {record.metrics.top1:.2f} on val, the choice says {score:.2f}"
            if record.lists.get("val") != choice.selected_on or record.metrics.count != choice.count:
                yield (
                    f"{run_id} was scored on {record.metrics.count} pictures of {record.lists.get('val')}, the choice "
                    f"says {choice.count} of {choice.selected_on}"
                )
            if (record.task, record.checkpoint_digest) != (choice.task, choice.checkpoint_digest):
                yield f"{run_id} is of another task or other weights"
            if record.data_digest != choice.data_digest:
                yield f"{run_id} read other lists ({_short(record.data_digest)}, not {_short(choice.data_digest)})"
            ours = dict(flat(record.config))
            for key, value in trial.values.items():
                if _other(ours.get(key), value):
                    yield f"{run_id} ran with {key} = {ours.get(key)}, the choice says {value}"
            yield from self._context_problem(record, choice, run_id)
            if isinstance(seeds, list) and place < len(seeds) and record.seed != seeds[place]:
                yield f"{run_id} has seed {record.seed}, and the search declares {seeds}"
            if trial.trainable is not None and record.parameters.trainable != trial.trainable:
                yield f"{run_id} trains {record.parameters.trainable} parameters, the choice says {trial.trainable}"

    def _outside(self, choice: Choice) -> None:
        """Scores on val, and tests, of this method and context that the choice does not name."""
        assert self.shelf is not None
        named = {run_id for trial in choice.trials for run_id in trial.run_ids}
        keys = list(choice.values)
        frozen = choice.created
        extra: list[Record] = []
        before: list[Record] = []
        for other in self.shelf.records:
            if (other.task, other.method, other.status) != (choice.task, self.record.method, "complete"):
                continue
            if context_of(cell_config(other.config), keys) != dict(choice.context):
                continue
            if other.kind == "selection" and other.run_id not in named:
                extra.append(other)
            elif other.kind == "final" and other.created < frozen:
                before.append(other)
        for runs, what in ((extra, "scored on val outside of the search"), (before, "tested before it was over")):
            if runs:
                names = _some(record.run_id for record in runs)
                self.say("note", "trials", f"further runs of this method, {what}: {len(runs)} ({names})")

    def _rule(self, choice: Choice) -> None:
        rule = choice.search.get("rule")
        if rule != _RULE:
            self.say(
                "fail", "rule", f"the search states the rule {rule!r}, which this svp-bench {__version__} cannot check"
            )
            return
        problems = []
        try:
            expected = _by_the_rule(choice)
        except StatsError as error:  # an accuracy of 120 %
            self.say("fail", "rule", str(error))
            return
        if expected is None:
            problems.append("no trial has a score")
        else:
            number, one_error = expected
            if number != choice.chosen:
                problems.append(
                    f"by its rule ({rule}) trial {number + 1} wins, and the choice took {choice.chosen + 1}"
                )
            if not math.isclose(one_error, choice.standard_error, abs_tol=1e-6):
                problems.append(
                    f"one standard error is {one_error:.4f} points, the choice says {choice.standard_error:.4f}"
                )
        self.judge("rule", problems, f"{rule}: trial {choice.chosen + 1} of {len(choice.trials)}; {choice.reason}")

    def _other_searches(self, path: Path) -> None:
        assert self.shelf is not None
        inside = path.relative_to(self.shelf.choices).parts
        others = [
            file.relative_to(self.shelf.choices).parts[0]
            for file in sorted(self.shelf.choices.glob("/".join(("*", *inside[1:]))))
            if file != path
        ]
        if others:
            self.say("note", "choice", f"other searches chose for this method and task too: {_some(others)}")

    # --- beside other records ----------------------------------------------------------------------------------------

    def _others(self, kind: str) -> list[Record]:
        return [record for record in self.shelf.records if record.kind == kind] if self.shelf else []

    def _seeds(self) -> None:
        record = self.record
        if self.shelf is None:
            self.say(
                "note",
                "seeds",
                "the record lies in no results folder, so that other seeds are not seen (--results_root R)",
            )
            return
        cell = [
            other
            for other in self._others(record.kind)
            if _cell(other) == _cell(record) and other.status == "complete" and other.run_id != record.run_id
        ]
        seeds = sorted({other.seed for other in cell} | ({record.seed} if record.status == "complete" else set()))
        for other in cell:
            if other.seed != record.seed and _scores(other) == _scores(record) and record.metrics is not None:
                self.say(
                    "fail",
                    "seeds",
                    f"the same score, bits, loss and times as seed {other.seed} ({other.run_id}): a copy",
                )
        if not seeds:
            self.say("note", "seeds", "no complete run of this cell is here")
            return
        missing = sorted(set(range(max(seeds))) - set(seeds))
        text = f"{len(seeds)} of this cell: {_some(map(str, seeds))}"
        if missing:
            self.say("note", "seeds", f"{text}; not here: {_some(map(str, missing))}")
        elif len(seeds) == 1:
            self.say("note", "seeds", f"{text}; one seed has no error bar")
        else:
            self.say("pass", "seeds", text)

    def _repetitions(self) -> None:
        """Runs of the same cell and seed: the newer one counts, so a second one must not be a second draw."""
        record = self.record
        same = [
            other
            for other in self._others(record.kind)
            if _cell(other) == _cell(record) and other.seed == record.seed and other.run_id != record.run_id
        ]
        ended = Counter(other.status for other in same if other.status != "complete")
        if ended:
            parts = ", ".join(f"{count} {status}" for status, count in sorted(ended.items()))
            self.say("note", "repeated", f"further runs of this cell and seed that no table counts: {parts}")
        done = [other for other in same if other.status == "complete"]
        if record.status != "complete" or record.metrics is None:
            return
        for other in sorted(done, key=_age):
            assert other.metrics is not None
            newer = other if _age(other) > _age(record) else record
            counts = "which tables show in its place" if newer is other else "which it replaces in tables"
            what = f"run again as {other.run_id}" if newer is other else f"run before as {other.run_id}"
            scores = f"{other.metrics.top1:.2f} there, {record.metrics.top1:.2f} here"
            if other.metrics.top1 == record.metrics.top1:
                self.say("note", "repeated", f"{what}, {counts}, with the same score")
            elif not _same_code(record, other):
                self.say("note", "repeated", f"{what} on other code, {counts}: {scores}")
            elif record.kind == "selection":
                self.say(
                    "note", "repeated", f"{what} on the same code: {scores}; a choice names the runs that it counts"
                )
            else:
                again = "a second draw of one seed on the same code"
                self.say("fail", "repeated", f"{what}, {counts}: {scores}; {again}")
        if self.shelf is not None and not same:
            self.say("pass", "repeated", "no other run of this cell and seed is here")

    def _tested_settings(self) -> None:
        record = self.record
        if self.shelf is None or record.kind != "final":
            return
        family = {
            other.config_digest: other
            for other in self._others("final")
            if _family(other) == _family(record) and other.status == "complete" and _track(other) == _track(record)
        }
        family[record.config_digest] = record
        if len(family) == 1:
            self.say(
                "pass", "tested", f"no other setting of {record.method} was tested on {record.task}, of those here"
            )
            return
        settings = [dict(flat(cell_config(other.config))) for other in family.values()]
        names = {name for setting in settings for name in setting}
        differing = sorted(name for name in names if len({repr(setting.get(name)) for setting in settings}) > 1)
        self.say(
            "note",
            "tested",
            f"{len(family)} settings of {record.method} were tested on {record.task}, on this track; they differ in "
            f"{_some(differing)}: to take the best of them is to choose on the test list",
        )

    # --- code and machine --------------------------------------------------------------------------------------------

    def _code(self) -> None:
        record = self.record
        version = f"svp-bench {record.package_version}"
        if record.dirty:
            self.say("fail", "code", f"{version}, commit {record.commit} with changes: cannot be rebuilt from a commit")
        elif record.commit is None:
            self.say("note", "code", f"{version}, installed: no commit is known")
        elif record.dirty is None:
            self.say("note", "code", f"{version}, commit {record.commit}; whether anything was changed is not known")
        else:
            self.say("pass", "code", f"{version}, commit {record.commit}, nothing changed")
        if record.package_version != __version__:
            self.say("note", "code", f"audited by svp-bench {__version__}, with its cards and recipes")

    def _machine(self) -> None:
        record = self.record
        versions = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
        many = f"{record.device_count} × " if record.device_count > 1 else ""
        self.say(
            "note",
            "machine",
            f"{many}{record.device}, scan backend {record.scan_backend}, precision {record.precision}; {versions}",
        )


# --------------------------------------------------------------------------------------------------------------- parts


def _by_the_rule(choice: Choice) -> tuple[int, float] | None:
    """Return which trial wins by the one-standard-error rule, and that error in points; written anew, to check with.

    Settings within one (binomial) standard error of the best score on val are equal. Among equal ones the first trial,
    the default, wins; else the one that trains the fewest parameters, then the better score, then the earlier one.
    """
    scored = [(index, trial.mean, trial) for index, trial in enumerate(choice.trials) if trial.mean is not None]
    if not scored:
        return None
    best = max(mean for _, mean, _ in scored)
    error = one_standard_error(best, choice.count)
    equal = [(index, mean, trial) for index, mean, trial in scored if mean >= best - error]
    if equal[0][0] == 0:
        return 0, error
    size = {index: trial.trainable if isinstance(trial.trainable, int) else 0 for index, _, trial in equal}
    winner = min(equal, key=lambda one: (size[one[0]], -one[1], one[0]))
    return winner[0], error


def _cuts(value: Any) -> bool:
    """Whether a `limit_*` leaves something out: 1.0 and null are all; 1 is one batch."""
    return value is not None and value is not False and repr(value) not in ("1.0", "0.0", "0")


def _get(config: Mapping[str, Any], key: str) -> Any:
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def _layer(name: str) -> dict[str, Any]:
    """The leaves of a shipped config, none if there is no such file."""
    return _leaves(configs_dir() / name)


@cache
def _leaves(path: Path) -> dict[str, Any]:
    return dict(flat(read_yaml(path, error=SvpBenchError).value)) if path.is_file() else {}


@cache
def _task_card(name: str) -> tuple[TaskCard, str]:
    """A task's card, and the protocol of its suite; reading all cards for each record would take most of the time."""
    return load_task(name), load_suite(name.partition("/")[0]).protocol


@cache
def _protocol_card(name: str) -> ProtocolCard:
    return load_protocol(name)


def _recipe(method: str) -> dict[str, Any]:
    return _layer(f"method/{method}.yaml")


def _other(one: Any, other: Any) -> bool:
    """Whether two config values differ; a list is a tuple, and true is not 1."""
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) != len(other) or any(_other(a, b) for a, b in zip(one, other, strict=True))
    return isinstance(one, bool) != isinstance(other, bool) or one != other


def _roles(lists: Mapping[str, str]) -> str:
    order = [role for role in ("train", "val", "test") if role in lists]
    return ", ".join(f"{role} on {lists[role]}" for role in (*order, *sorted(lists.keys() - set(order)))) or "no list"


def _short(digest: str | None) -> str:
    return f"sha256:{digest.removeprefix('sha256:')[:12]}" if digest else "unknown"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _SHOWN} more" if len(listed) > _SHOWN else ""
    return ", ".join(listed[:_SHOWN]) + more


def _hour(created: str) -> str:
    return created.removesuffix("+00:00").replace("T", " ")


def _began(record: Record) -> datetime | None:
    """When a run began, from its name; None if that has no time."""
    for part in record.run_id.split("-"):
        try:
            return datetime.strptime(part, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        except ValueError:
            continue
    return None


def _age(record: Record) -> tuple[str, str]:
    """What tables order runs by."""
    return record.created, record.run_id


def _family(record: Record) -> tuple[Any, ...]:
    """All settings of a method on one task that a table could show beside each other."""
    return (
        *(record.task, record.task_version, record.protocol, record.protocol_version, record.backbone),
        *(record.checkpoint_digest, record.method, record.data_variant, record.data_digest),
    )


def _track(record: Record) -> str | None:
    return record.tuned.digest if record.tuned else None


def _cell(record: Record) -> tuple[Any, ...]:
    return (*_family(record), record.setting_digest, record.config_digest)


def _scores(record: Record) -> tuple[Any, ...]:
    return record.metrics, record.correct and record.correct.bits, dict(record.times)


def _same_code(one: Record, other: Record) -> bool:
    if one.dirty or other.dirty:
        return False
    if one.commit is None and other.commit is None:
        return one.package_version == other.package_version
    return one.commit == other.commit
