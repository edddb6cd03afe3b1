"""What a record proves, in plain words: `svp-bench audit`. No images, no weights and no torch are needed.

Each line is `pass` (checked, and as it should be), `note` (a reader should know it) or `fail` (the number is not what a
table claims, or nobody can see that it is). What was only read off the record is given as "the record states". What
fails, and what does not:

- A file that breaks the schema, or that lies where another record belongs, fails: tables list it as a problem.
- A run that is not complete fails, and so does a complete one whose config cuts it short (`limit_*`). A selection
  record is not failed for its kind: tables never show it, and that is said.
- Scores that no model can have fail: a loss below ln 2 for each wrong image, an impossible top-5 or calibration error.
- Facts that contradict the config, the run's name or the cards fail: seed, task, lists, numbers of images, classes.
  The digests leave the seed out, so that an edited seed shows here alone.
- Another version of the task card fails, as tables leave it out. Another version of the protocol card is a note: tables
  give it a section of its own, but its lists and budget cannot be checked with the card at hand.
- Times that contradict each other fail: a record from before its run began, by the run's name, or from a day to come;
  more seconds of training than lie between; images per second that give half or twice the images of its epochs.
- More epochs than the config of the task, or else the protocol, allows fail: that is what the budget is for. Fewer, or
  other values than card and recipe give, are notes: tables make them a row of their own, and nothing in a record says
  how they were chosen.
- Drawn stand-ins fail. Files that differ from the card, another variant, and random weights are notes: tables mark
  them.
- Of a searched run, all of this fails: the choice is missing, was changed, was frozen after the run began, was made for
  another setting, contradicts its own declaration (digest, grid, space, budget, runs, rule), was made on another list
  than val, claims trials whose selection records are missing or say something else, or leaves out a run on val of a
  setting and seed that it declares. What was tested, or scored on val, outside of the search is a note.
- The same cell and seed run twice on the same code with another score fails, for both records: tables show the newer
  one, so that whoever repeats a seed until its score pleases is seen. A repetition that only checks belongs to
  `svp-bench rerun`, whose records lie apart. On other code, or with the same score, it is a note. "The same code" is
  the same known commit without changes, or, of installed packages, the same version.
- Two seeds of a cell with the same scores, bits, loss and times fail: one is a copy. Equal bits and an equal loss alone
  are a note. Runs of different seeds or tasks that state the same final weights fail: one is a copy. So do runs that
  state the same weights and the same test images with other images right.
  A seed that was run again on other code with another score fails too where other seeds of its cell still count from
  another code. Which code: the digest of the package's files, where both records have it, else commit or version.
- A run id that another record has fails, for the later of them: one of the two was written under the name of the other.
  All given folders are looked through together. Two files with the same content are one record and its copy, a note.
- A run that the package called not comparable fails, as tables leave it out. Classes from outside of the package
  (callbacks, loggers, strategies ...), and what loading did to the weights or the images, are notes.
- A dirty tree fails: the run cannot be rebuilt from a commit. An installed package without a commit is a note. So does
  a digest of the package's files that is not that of the stated commit, where git has it, or not that of other records
  of the same commit or installed version: git can be told not to look at a changed file.
- A task or protocol card that says something else than the card here of the same version fails.
- Runs of one cell with other parameter counts, or with other numbers of images a class of the same list, fail.

An audit believes what the files say. It cannot see runs whose records were deleted, nor numbers, digests or a commit
that were invented, nor when a value was fixed; its last line says so. `svp-bench rerun` repeats a run.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from functools import cache
from pathlib import Path
from typing import Any

from svp_bench._version import __version__
from svp_bench.audit.base import (
    SHOWN,
    Auditor,
    Finding,
    Shelf,
    Verdict,
    began,
    differ,
    fold_of,
    get,
    roles,
    short,
    some,
)
from svp_bench.audit.scores import impossible_scores
from svp_bench.audit.search import search_findings
from svp_bench.core.errors import RecordError, UsageError, plural, printable
from svp_bench.core.resources import configs_dir, tasks_dirs
from svp_bench.core.yaml import read_yaml
from svp_bench.records.bits import count_ones
from svp_bench.records.code import package_digest_at
from svp_bench.records.defaults import departure_texts, departures, recipe, shipped_layer
from svp_bench.records.digests import card_digest, cell_config, flat
from svp_bench.records.record import CREATED, Record, Tuned
from svp_bench.records.store import read_json, read_record, record_path
from svp_bench.tasks.cards import ProtocolCard, TaskCard, load_protocol, load_suite, load_task

__all__ = ["Audit", "Finding", "Report", "audit", "render"]

_ROLES = {"final": ("train", "test"), "selection": ("train", "val")}
_STAGES = {"final": "final", "selection": "select"}
_CUTS = ("limit_train_batches", "limit_test_batches", "limit_val_batches", "overfit_batches", "fast_dev_run")
_NAMED_WEIGHTS = ("hub", "embedded", "none")
_TABLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*/[A-Za-z0-9_][A-Za-z0-9._-]*")  # what may be part of a path
_NO_RECORDS = ("choices", "replications", "tables")  # folders of a results folder that hold other JSON
_CLOCKS = timedelta(minutes=1)  # a run's name, its record and its stop watch: three clocks, the first in whole seconds
_AHEAD = timedelta(days=1)  # how far the clock of another machine may be ahead of this one
_LIMITS = (
    "An audit checks what the files say, against each other and against the cards here. What no record can prove: that "
    "no run was deleted, that numbers, digests, times and commit were not invented, and when a value was fixed."
)


@dataclass(frozen=True)
class Audit:
    """What one file proves.

    Attributes:
        path: The file.
        findings: One line each.
        record: What it holds; None if it is no valid record.
    """

    path: Path
    findings: tuple[Finding, ...]
    record: Record | None = None

    @property
    def failures(self) -> tuple[Finding, ...]:
        """The lines that fail."""
        return tuple(finding for finding in self.findings if finding.verdict == "fail")

    @property
    def notes(self) -> tuple[Finding, ...]:
        """What a reader should know; the machine, which every record names, is not among it."""
        return tuple(found for found in self.findings if found.verdict == "note" and found.subject != "machine")


@dataclass(frozen=True)
class Report:
    """What `audit` found.

    Attributes:
        audits: One a file.
        skipped: JSON files below the given folders that are no records.
    """

    audits: tuple[Audit, ...]
    skipped: int

    @property
    def failed(self) -> bool:
        """Whether a line of a record fails."""
        return any(one.failures for one in self.audits)


def audit(paths: Sequence[Path | str], results_root: Path | str | None = None) -> Report:
    """Audit records.

    Args:
        paths: Files, and folders: of a results folder, all that lies below its `records/`; of another, all JSON files
            that are records (`"schema": 1` and a run id, or a place where a record belongs).
        results_root: Where other records and the choices of searches are; by default the folder that a record lies in
            (`R/records/<suite>/<task>/<run>.json`).

    Returns:
        One audit a file, where one that cannot be read has a failing line, and the others go on; and how many JSON
        files of the folders were left out.

    Raises:
        UsageError: If a folder holds no record, or `results_root` is no folder.
    """
    if results_root is not None and not Path(results_root).is_dir():
        raise UsageError(f"--results_root {results_root} is no folder; give the one that holds records/ and choices/")
    shelves: dict[Path, Shelf] = {}
    audits = []
    files: dict[Path, None] = {}  # in order, none twice
    skipped: set[Path] = set()
    for given in paths:
        found, left_out = _files(Path(given))
        files.update(dict.fromkeys(found))
        skipped.update(left_out)
    for path in files:
        root = Path(results_root) if results_root is not None else _root_of(path)
        shelf = shelves.setdefault(root, Shelf(root)) if root is not None else None
        audits.append(_audit_file(path, shelf))
    return Report(tuple(_with_namesakes(audits)), len(skipped - files.keys()))


def render(report: Report) -> str:
    """Return the text to print: each file with its lines, the sum, and what an audit cannot see."""
    lines: list[str] = []
    audits = report.audits
    width = max((len(finding.subject) for one in audits for finding in one.findings), default=0)
    for one in audits:
        lines.append(str(one.path))
        lines += [f"  {found.verdict}  {found.subject:<{width}}  {found.text}" for found in one.findings]
        failed, noted = (", ".join(dict.fromkeys(f.subject for f in found)) for found in (one.failures, one.notes))
        if failed:
            lines += [f"  → fails: {failed}", ""]
        else:
            lines += [f"  → no line fails; notes: {noted}" if noted else "  → no line fails", ""]
    good = sum(not one.failures for one in audits)
    count = plural(len(audits), "record")
    lines.append(f"{count}: {good} without a failing line, {len(audits) - good} fail")
    if report.skipped:
        lines.append(f"{plural(report.skipped, 'other JSON file')} left out: no records")
    return "\n".join(map(printable, [*lines, _LIMITS])) + "\n"


def _files(path: Path) -> tuple[list[Path], list[Path]]:
    """Return the records of a path, and the JSON files that are none."""
    if not path.is_dir():
        return [path], []
    base = path / "records" if (path / "records").is_dir() else path
    files = sorted(
        file
        for file in base.rglob("*.json")
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(base).parts)
    )
    found = [file for file in files if base != path or _is_record(file, path)]
    if not found:
        others = f" (JSON that is none: {len(files)})" if files else ""
        raise UsageError(f"{path} holds no record{others}; `svp-bench fit` writes them below results/records")
    return found, sorted(set(files) - set(found))


def _is_record(file: Path, folder: Path) -> bool:
    """Whether a JSON file says that it is a record, or lies where one belongs, so that a broken one is seen."""
    if _root_of(file) is not None:
        return True
    if any(part in _NO_RECORDS for part in file.relative_to(folder).parts[:-1]):
        return False
    try:
        data = read_json(file, str(file))
    except RecordError:
        return False
    number = data.get("schema") if isinstance(data, Mapping) else None
    return isinstance(number, int) and not isinstance(number, bool) and "run_id" in data


def _root_of(path: Path) -> Path | None:
    """The results folder that a file lies in, if it lies where a record belongs."""
    absolute = path.absolute()
    return absolute.parents[3] if len(absolute.parents) > 3 and absolute.parents[2].name == "records" else None


def _audit_file(path: Path, shelf: Shelf | None) -> Audit:
    try:
        record = read_record(path)
    except RecordError as error:
        return Audit(path, (Finding("fail", "schema", " ".join(str(error).removeprefix(f"{path}: ").split())),))
    auditor = _Auditor(record, shelf, path)
    auditor.look()
    return Audit(path, tuple(auditor.findings), record)


def _with_namesakes(audits: Sequence[Audit]) -> list[Audit]:
    """Add a line to each record whose run id another of the audited files has too."""
    by_id: dict[str, list[Audit]] = defaultdict(list)
    for one in audits:
        if one.record is not None:
            by_id[one.record.run_id].append(one)
    return [
        replace(one, findings=(*one.findings, *_namesake_findings(one, by_id[one.record.run_id])))
        if one.record
        else one
        for one in audits
    ]


def _namesake_findings(one: Audit, all_of_them: Sequence[Audit]) -> Iterator[Finding]:
    record = one.record
    for other in all_of_them:
        if other.path == one.path or other.record is None or record is None:
            continue
        if other.record == record:
            yield Finding("note", "run id", f"{other.path} is a copy of this record")
            continue
        parts = ("task", "checkpoint", "checkpoint_digest", "method", "seed", "kind", "created")
        differing = [name for name in parts if getattr(record, name) != getattr(other.record, name)]
        text = f"{other.path} has the same run id, and is another run ({', '.join(differing) or 'other content'})"
        if record.created > other.record.created:
            yield Finding("fail", "run id", f"{text}: this one, the later, was written under the name of the other")
        elif record.created == other.record.created:
            yield Finding("fail", "run id", f"{text}: one of them was written under the name of the other")
        else:
            yield Finding("note", "run id", f"{text}: the other one, the later, was written under this one's name")


# ---------------------------------------------------------------------------------------------------------- one record


@dataclass
class _Auditor(Auditor):
    path: Path

    def look(self) -> None:
        """Look at everything."""
        record = self.record
        scored = f"its {record.correct.count} bits give the score, " if record.correct else ""
        self.say("pass", "schema", f"schema {record.schema}; {scored}its digests belong to its config")
        self._place()
        self._status()
        self._identity()
        card, protocol = self._cards()
        if record.metrics is not None:
            problems = impossible_scores(record.metrics, (card.classes or None) if card is not None else None)
            self.judge("scores", problems, "loss, accuracies and calibration error can be those of one model")
        self._clocks(card)
        self._lists(protocol)
        if card is not None:
            self._counts(card)
        self._data()
        self._weights()
        self._budget(protocol)
        self._track(protocol, card)
        self._seeds()
        self._repetitions()
        self._alike()
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
        asked = {key: get(record.config, f"trainer.{key}") for key in _CUTS}
        cut = [f"trainer.{key} {value}" for key, value in asked.items() if _cuts(value)]
        problems = []
        if record.status != "complete":
            problems.append(f"{record.status}: {record.status_reason or 'trained, not tested'}; no table counts it")
        elif cut:
            problems.append(f"said to be complete, but its config cuts it short: {', '.join(cut)}")
        epochs = get(record.config, "trainer.max_epochs")
        if record.status in ("complete", "unscored") and isinstance(epochs, int) and record.epochs != epochs:
            problems.append(
                f"said to be {record.status} after {plural(record.epochs, 'epoch')}, and its config asks for {epochs}"
            )
        self.judge("status", problems, f"complete: {plural(record.epochs, 'epoch')}")

    def _identity(self) -> None:
        """The facts beside the config must be those of the config: digests do not cover the seed."""
        record, config = self.record, self.record.config
        pairs: list[tuple[str, Any, Any]] = [
            ("seed", record.seed, config.get("seed_everything")),
            ("task", record.task, get(config, "data.task")),
            ("stage", record.stage, get(config, "data.stage") or "final"),
            ("backbone", record.backbone, get(config, "model.backbone")),
        ]
        if (precision := get(config, "trainer.precision")) is not None:
            pairs.append(("precision", record.precision, precision))
        if (protocol := get(config, "data.protocol")) is not None:
            pairs.append(("protocol", record.protocol, protocol))
        source = str(get(config, "model.checkpoint"))
        pairs.append(("checkpoint", record.checkpoint, source if source in _NAMED_WEIGHTS else Path(source).name))
        arguments = get(config, "model.method.init_args")
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
        layers = recipe(record.method)
        shipped = str(layers.get("model.method.class_path", "")).split(".")[-1]
        theirs = str(get(config, "model.method.class_path"))
        name = _shipped_classes(configs_dir()).get(theirs)
        if (shipped and theirs.split(".")[-1] != shipped) or name not in (None, record.method):
            problems.append(f"the method is {record.method}, but the config's class is {theirs}")
        self.judge("identity", problems, f"{record.method}, seed {record.seed}: name, facts and config agree")
        if not theirs.startswith("svp_bench."):
            stated = (
                f"its files are stated: {some(f'{name} {short(one)}' for name, one in record.method_source.items())}"
                if record.method_source
                else "no commit names its code"
            )
            self.say("note", "identity", f"the method's class {theirs} is not part of svp-bench; {stated}")
        self._other_sources()
        if get(config, "selected_on") == "test":
            what = "the recipe's authors chose its values on test lists (selected_on: test); tables mark the row"
            self.say("note", "identity", what)
        for reason in record.not_comparable or ():
            self.say("fail", "comparable", f"{reason}; tables leave the run out")
        if record.external_classes:
            text = "classes from outside of svp-bench, which no commit of it names, took part"
            self.say("note", "comparable", f"{text}: {some(record.external_classes)}")
        callbacks = get(config, "trainer.callbacks")
        if callbacks:
            callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
            names = [str(one.get("class_path", one)) if isinstance(one, Mapping) else str(one) for one in callbacks]
            self.say("note", "identity", f"callbacks of its own ran along: {', '.join(names)}")

    def _other_sources(self) -> None:
        """Note runs of this setting with another source of the method: tables keep them apart, as other cells."""
        record, found = self.record, dict[str, str]()
        for other in self._others(record.kind):
            if _cell(other)[:-1] == _cell(record)[:-1] and (other.method_source or {}) != (record.method_source or {}):
                names = {*(other.method_source or {}), *(record.method_source or {})}
                ours, theirs = record.method_source or {}, other.method_source or {}
                found[other.run_id] = ", ".join(sorted(n for n in names if ours.get(n) != theirs.get(n)))
        if found:
            files = ", ".join(dict.fromkeys(found.values()))
            text = f"{some(found)} ran this setting with another source of the method ({files}): another cell"
            self.say("note", "identity", text)

    def _clocks(self, card: TaskCard | None) -> None:
        """The times of a record must fit its run's name, each other and the images that it trained on."""
        record = self.record
        created = datetime.strptime(record.created, CREATED).replace(tzinfo=timezone.utc)
        start, seconds, problems = began(record), record.times.get("train_seconds"), []
        if created > datetime.now(timezone.utc) + _AHEAD:
            problems.append(f"created {record.created}, which is yet to come")
        if start is not None and created + _CLOCKS < start:
            problems.append(f"created {record.created}, before the run began ({start:%Y-%m-%d %H:%M:%S}, in its name)")
        elif start is not None and seconds is not None and seconds > (created - start + _CLOCKS).total_seconds():
            problems.append(
                f"trained for {seconds:.0f} s, and only {(created - start).total_seconds():.0f} s lie between the "
                "start in its name and the record"
            )
        problems += [
            f"{name} is {value}, and the run did that"
            for name, value in record.times.items()
            if value < 0 or (value == 0 and record.status == "complete")
        ]
        if record.status == "complete" and record.epochs and seconds is None:
            problems.append("there is no train_seconds, and the run trained")
        for name in ("images_per_second", "peak_memory_mib"):
            value = getattr(record, name)
            if value is not None and value <= 0:
                problems.append(f"{name} is {value}, which no run has")
        images = self._images(card, "train")
        if record.status == "complete" and images and seconds and record.images_per_second is not None:
            seen, expected = record.images_per_second * seconds, images * record.epochs
            if not expected / 2 <= seen <= 2 * expected:  # a last batch may be dropped, or filled up for all devices
                problems.append(
                    f"{record.images_per_second:.4g} images per second for {seconds:g} s are {seen:.0f} images, and "
                    f"{record.epochs} epochs of {record.lists['train']} are {expected}"
                )
        self.judge("times", problems, "name, date, seconds and images per second fit each other")

    def _split_counts(self, card: TaskCard | None) -> Mapping[str, int]:
        """Return the images of each split by the card; empty if the card does not know the run's data."""
        if card is None or self.record.data_status != "as_card":
            return {}
        forms: Mapping[str, Mapping[str, int]] = {"card": card.counts, **card.variants}
        return forms.get(self.record.data_variant, {})

    def _images(self, card: TaskCard | None, role: str) -> int | None:
        """Return the number of images of a split by the card, None if the card does not know."""
        return self._split_counts(card).get(self.record.lists.get(role, ""))

    # --- lists, data, weights ----------------------------------------------------------------------------------------

    def _cards(self) -> tuple[TaskCard | None, ProtocolCard | None]:
        """The cards at hand, each None if it is not the one that the run was made with."""
        record = self.record
        card: TaskCard | None = None
        protocol: ProtocolCard | None = None
        try:
            card, suite_protocol = _task_card(record.task, tasks_dirs())
        except UsageError:
            self.say(
                "fail",
                "protocol",
                f"there is no task card {record.task} here: no table has such a task (cards of your own: --tasks_dir)",
            )
            return None, None
        if card.version != record.task_version:
            self.say(
                "fail",
                "protocol",
                f"run on version {record.task_version} of the task card, now {card.version}: tables leave it out",
            )
            card = None
        elif self._card_differs("task", card):
            card = None
        try:
            protocol = _protocol_card(record.protocol, tasks_dirs())
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
        if self._card_differs("protocol", protocol):
            return card, None
        own = "" if record.protocol == suite_protocol else f"; the suite's own is {suite_protocol}"
        verdict: Verdict = "note" if own else "pass"
        self.say(verdict, "protocol", f"{record.protocol} version {record.protocol_version}, as the card at hand{own}")
        return card, protocol

    def _card_differs(self, kind: str, card: TaskCard | ProtocolCard) -> bool:
        """Whether the run used another card of the same name and version than the one here; say so."""
        stated = (self.record.card_digests or {}).get(kind)
        if stated is None or stated == card_digest(card):
            return False
        text = (
            f"the {kind} card {card.name} version {card.version} of the run ({short(stated)}) says something else than "
            f"the one here ({short(card_digest(card))}): it was changed without a new version"
        )
        self.say("fail", "protocol", text)
        return True

    def _lists(self, protocol: ProtocolCard | None) -> None:
        record = self.record
        problems = []
        card_says = None
        if protocol and record.stage in protocol.stages:
            folds, fold, fold_seed = fold_of(record.config)
            card_says = protocol.splits(record.stage, folds if folds > 1 else None, fold, fold_seed)
        if sorted(record.lists) != sorted(_ROLES[record.kind]) or record.stage != _STAGES[record.kind]:
            problems.append(
                f"a {record.kind} record reads {' and '.join(_ROLES[record.kind])} in stage {_STAGES[record.kind]}, "
                f"this one says stage {record.stage} and {roles(record.lists)}"
            )
        elif card_says is not None and card_says != dict(record.lists):
            problems.append(f"the lists are {roles(record.lists)}, and {record.protocol} says {roles(card_says)}")
        if record.kind == "final" and "val_seconds" in record.times:
            problems.append("a list was scored during the training of a final run (times.val_seconds)")
        if record.correct is not None and record.correct.list != record.lists.get("test"):
            problems.append(f"the bits are those of the list {record.correct.list!r}")
        if record.val_correct is not None and record.val_correct.list != record.lists.get("val"):
            problems.append(f"the bits are those of the list {record.val_correct.list!r}")
        if record.val_correct is not None and record.metrics is not None:
            ones = count_ones(record.val_correct.bits, record.val_correct.count)
            if ones != record.metrics.correct:
                problems.append(f"the bits of val have {ones} ones, and {record.metrics.correct} images are right")
        if record.kind == "selection":
            good = (
                f"the record states: trained on {record.lists.get('train')}, scored on {record.lists.get('val')}, "
                "which chooses, without a test list; tables never show it"
            )
        else:
            good = (
                f"the record states: trained on {record.lists.get('train')}, then scored on {record.lists.get('test')} "
                f"with the weights of epoch {record.epochs} (stage final has no list that could choose)"
            )
        self.judge("lists", problems, good)

    def _counts(self, card: TaskCard) -> None:
        record, problems = self.record, []
        role = "test" if record.kind == "final" else "val"
        name = record.lists.get(role, "")
        if record.metrics is None:
            return
        expected = self._images(card, role)
        if record.data_variant not in ("card", *card.variants, "drawn"):
            problems.append(f"the card has no data variant {record.data_variant!r}")
        elif expected is not None and record.metrics.count != expected:
            problems.append(f"{name} has {plural(record.metrics.count, 'image')}, and the card says {expected}")
        scored = record.metrics.per_class
        if scored is not None and not card.as_found and len(scored.count) != card.classes:
            problems.append(f"scores of {plural(len(scored.count), 'class')}, and the card says {card.classes}")
        top5 = record.metrics.top5
        if top5 is not None and not _whole(top5, record.metrics.count):
            problems.append(f"top5 {top5} % of {plural(record.metrics.count, 'image')} is no whole number of images")
        problems += self._other_digests()
        digest = f" ({short(record.correct.list_digest)})" if record.correct is not None else ""
        classes = "classes as found" if card.as_found else f"{plural(card.classes, 'class')}"
        self.judge("images", problems, f"{record.metrics.count} images of {name}{digest}, {classes}")

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
        digest = short(record.data_digest)
        if record.data_variant == "drawn":
            self.say("fail", "data", "a drawn stand-in, not the data set: the number says nothing about the task")
            return
        if record.data_status == "different":
            self.say("note", "data", f"differs from the card: {'; '.join(record.data_notes) or 'no reason is given'}")
        elif record.data_variant != "card":
            self.say("note", "data", f"the record states the card's variant {record.data_variant}, lists {digest}")
        else:
            self.say("pass", "data", f"the record states that the files are as the card says; lists {digest}")
        if record.image_notes:
            counted = (f"{what} ({count})" for what, count in sorted(record.image_notes.items()))
            self.say("note", "data", f"images that were skipped or converted: {some(counted)}")
        others = {
            other.data_digest
            for other in (self.shelf.records if self.shelf else ())
            if (other.task, other.stage, other.protocol) == (record.task, record.stage, record.protocol)
            and (other.status, other.data_variant) == ("complete", record.data_variant)
        } - {record.data_digest}
        if others:
            shown = ", ".join(sorted(map(short, others))[:SHOWN])
            self.say("note", "data", f"other runs of {record.task} read other lists ({shown}): they are other cells")

    def _weights(self) -> None:
        record = self.record
        if record.checkpoint_digest is None:
            self.say("note", "weights", "random weights: plumbing, not transfer; tables keep it apart, unranked")
        else:
            said = f"{record.backbone} from {record.checkpoint}, {short(record.checkpoint_digest)}"
            self.say("pass", "weights", f"the record states {said}; no list of known weights is here to compare with")
        if record.status in ("complete", "unscored") and record.package_digest and record.weights_digest is None:
            self.say(
                "fail", "weights", "weights_digest is missing, which svp-bench writes: nobody can say what was scored"
            )
        for what, lines in (record.checkpoint_load or {}).items():
            self.say("note", "weights", f"{what} while loading: {some(lines)}")
        for problem in self._copied_weights():
            self.say("fail", "weights", problem)
        others = {
            one.checkpoint_digest
            for one in (self.shelf.records if self.shelf else ())
            if (one.backbone, one.checkpoint) == (record.backbone, record.checkpoint) and one.status == "complete"
        } - {record.checkpoint_digest}
        if others:
            shown = some(sorted(map(short, others)))
            self.say("note", "weights", f"other runs state other weights from {record.checkpoint}: {shown}")

    def _copied_weights(self) -> list[str]:
        """Return which other runs ended with the very same weights, and cannot have: of another seed, task or score."""
        record, problems = self.record, []
        if record.weights_digest is None or not record.epochs:
            return []
        for other in self.shelf.records if self.shelf else ():
            if other.weights_digest != record.weights_digest or other.run_id == record.run_id or not other.epochs:
                continue
            ours, theirs = (record.task, record.seed), (other.task, other.seed)
            if ours != theirs:
                problems.append(f"the same weights as {other.run_id} ({theirs[0]}, seed {theirs[1]}): one is a copy")
            elif record.correct and other.correct and record.correct.list_digest == other.correct.list_digest:
                machine = (record.device, record.scan_backend, record.precision)
                if machine == (other.device, other.scan_backend, other.precision) and (
                    record.correct.bits != other.correct.bits
                ):
                    problems.append(f"the same weights and test images as {other.run_id}, with other images right")
        return problems

    # --- budget and search -------------------------------------------------------------------------------------------

    def _budget(self, protocol: ProtocolCard | None) -> None:
        record = self.record
        if protocol is None:
            return
        key, source = "trainer.max_epochs", protocol.name
        allowed, used = dict(flat(protocol.training)).get(key), get(record.config, key)
        of_task = shipped_layer(f"{record.task}.yaml")  # a short list may have more epochs than its protocol's others
        if key in of_task:
            allowed, source = of_task[key], f"configs/{record.task}.yaml"
        if not isinstance(allowed, int) or not isinstance(used, int):
            self.say("note", "budget", f"{source} or the config gives no number of epochs")
        elif used > allowed:
            self.say("fail", "budget", f"{plural(used, 'epoch')}, more than the {allowed} of {source}")
        elif used < allowed:
            self.say("note", "budget", f"{plural(used, 'epoch')}, fewer than the {allowed} of {source}")
        else:
            self.say("pass", "budget", f"{plural(used, 'epoch')}, as {source} says")

    def _track(self, protocol: ProtocolCard | None, card: TaskCard | None) -> None:
        record, tuned = self.record, self.record.tuned
        found = departure_texts(departures(record, protocol, tuned.keys if tuned else ()))
        if tuned is None:
            self.say("pass", "track", "default: the record states no tuned table and no search")
        elif tuned.search is None:
            self._tuned_table(tuned)
        else:
            self.findings += search_findings(
                record, tuned, tuned.search, self.shelf, protocol, self._split_counts(card)
            )
        if not recipe(record.method):
            self.say("note", "settings", f"there is no recipe of the method {record.method} here to compare with")
        self.judge(
            "settings",
            [f"chosen by hand, as far as the record says: {'; '.join(found)}"] if found else [],
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
        entries = get(table, f"tasks.{record.task.split('/')[1]}") or {}
        ours = dict(flat(record.config))
        wrong = [f"{key} is {ours.get(key)}, the table says {entries.get(key)}" for key in tuned.keys]
        wrong = [text for text, key in zip(wrong, tuned.keys, strict=True) if differ(ours.get(key), entries.get(key))]
        good = f"tuned ({tuned.table}), selected on {table.get('selected_on')}: {keys}"
        self.judge("track", wrong, good)

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
            if other.seed == record.seed or record.metrics is None or _scores(other) != _scores(record):
                continue
            if (dict(other.times), other.metrics) == (dict(record.times), record.metrics):
                what = f"the same score, bits, loss and times as seed {other.seed} ({other.run_id}): a copy"
                self.say("fail", "seeds", what)
            else:
                what = f"the same bits and, to the last digit, the same loss as seed {other.seed} ({other.run_id})"
                self.say("note", "seeds", f"{what}: a copy with other times looks so")
        if not seeds:
            self.say("note", "seeds", "no complete run of this cell is here")
            return
        missing = sorted(set(range(max(seeds))) - set(seeds))
        text = f"{len(seeds)} of this cell: {some(map(str, seeds))}"
        if missing:
            self.say("note", "seeds", f"{text}; not here: {some(map(str, missing))}")
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
                left = self._seeds_on_other_code(record if newer is record else other)
                if left and record.kind == "final":
                    text = f"{scores}; run again alone: {some(left)} of this cell still count from other code"
                    self.say("fail", "repeated", f"{what} on other code, {counts}: {text}")
                else:
                    self.say("note", "repeated", f"{what} on other code, {counts}: {scores}")
            elif record.kind == "selection":
                self.say(
                    "note", "repeated", f"{what} on the same code: {scores}; a choice names the runs that it counts"
                )
            else:
                again = "a second draw of one seed on the same code"
                self.say("fail", "repeated", f"{what}, {counts}: {scores}; {again}")
        if len(done) > 1:
            runs = f"{len(done) + 1} complete runs of this cell and seed are here; the newest counts in tables"
            self.say("note", "repeated", runs)
        if self.shelf is not None and not same:
            self.say("pass", "repeated", "no other run of this cell and seed is here")

    def _seeds_on_other_code(self, newest: Record) -> list[str]:
        """Return which other seeds of a cell count, by their newest run, from other code than a run."""
        counting: dict[int, Record] = {}
        for other in sorted(self._others(newest.kind), key=_age):
            if _cell(other) == _cell(newest) and other.status == "complete" and other.seed != newest.seed:
                counting[other.seed] = other
        return [f"seed {seed}" for seed, other in sorted(counting.items()) if not _same_code(other, newest)]

    def _alike(self) -> None:
        """What all runs of one cell have in common, whatever their seed."""
        record, problems = self.record, []
        for other in self._others(record.kind):
            if other.run_id == record.run_id:
                continue
            if _cell(other) == _cell(record) and other.parameters != record.parameters:
                problems.append(
                    f"{other.run_id}, of the same cell, has other parameters: {other.parameters.trainable} of "
                    f"{other.parameters.total} train, here {record.parameters.trainable} of {record.parameters.total}"
                )
            ours, theirs = (one.metrics.per_class if one.metrics else None for one in (record, other))
            same_list = (other.task, other.data_digest, other.lists) == (record.task, record.data_digest, record.lists)
            if same_list and ours is not None and theirs is not None and ours.count != theirs.count:
                problems.append(f"{other.run_id} scored the same list, with other numbers of images in its classes")
        if self.shelf is not None:
            self.judge("alike", problems, "parameters, and images of each class, as in the other runs here")

    def _tested_settings(self) -> None:
        record = self.record
        if self.shelf is None or record.kind != "final":
            return
        family = {
            _setting(other): other
            for other in self._others("final")
            if _family(other) == _family(record) and other.status == "complete" and _track(other) == _track(record)
        }
        family[_setting(record)] = record
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
            f"{some(differing)}: to take the best of them is to choose on the test list",
        )

    # --- code and machine --------------------------------------------------------------------------------------------

    def _code(self) -> None:
        record = self.record
        version = f"the record states svp-bench {record.package_version}"
        if record.dirty:
            self.say("fail", "code", f"{version}, commit {record.commit} with changes: cannot be rebuilt from a commit")
        elif record.commit is None:
            self.say("note", "code", f"{version}, installed: no commit is known")
        elif record.dirty is None:
            self.say("note", "code", f"{version}, commit {record.commit}; whether anything was changed is not known")
        else:
            self.say("pass", "code", f"{version}, commit {record.commit}, nothing changed")
        if problems := self._code_problems():
            self.judge("code", problems, "")
        if record.package_version != __version__:
            self.say("note", "code", f"audited by svp-bench {__version__}, with its cards and recipes")

    def _code_problems(self) -> list[str]:
        """Return how the digest of the package's files contradicts the commit, or other records of the same code."""
        record, problems = self.record, []
        if record.package_digest is None or record.dirty:
            return []
        ours = short(record.package_digest)
        expected = package_digest_at(record.commit) if record.commit else None
        if expected is not None and expected != record.package_digest:
            problems.append(
                f"the package's files were {ours}, and those of commit {record.commit} are {short(expected)}: code was "
                "changed without git showing it"
            )
        others = {
            other.package_digest: other.run_id
            for other in (self.shelf.records if self.shelf else ())
            if (other.commit, other.package_version) == (record.commit, record.package_version)
            and other.package_digest not in (None, record.package_digest)
            and not other.dirty
        }
        same = f"commit {record.commit}" if record.commit else f"version {record.package_version}, installed"
        problems += [
            f"{run_id} states the same {same}, and other files of the package ({short(digest)}, here {ours})"
            for digest, run_id in others.items()
        ]
        return problems

    def _machine(self) -> None:
        record = self.record
        versions = ", ".join(f"{name} {version}" for name, version in record.libraries.items())
        cpu = f" ({record.cpu})" if record.cpu else ""
        many = f"{record.device_count} × " if record.device_count > 1 else ""
        self.say(
            "note",
            "machine",
            f"{many}{record.device}{cpu}, scan backend {record.scan_backend}, precision {record.precision}; {versions}",
        )


# --------------------------------------------------------------------------------------------------------------- parts


def _cuts(value: Any) -> bool:
    """Whether a `limit_*` leaves something out: 1.0 and null are all; 1 is one batch."""
    return value is not None and value is not False and repr(value) not in ("1.0", "0.0", "0")


def _whole(percent: float, count: int) -> bool:
    """Whether a percentage is one of whole images; it may have gone through float32."""
    right = percent * count / 100
    return abs(right - round(right)) <= max(1e-3, 1e-6 * count)


@cache
def _task_card(name: str, folders: tuple[Path, ...]) -> tuple[TaskCard, str]:
    """A task's card, and the protocol of its suite; reading all cards for each record would take most of the time."""
    return load_task(name), load_suite(name.partition("/")[0]).protocol


@cache
def _protocol_card(name: str, folders: tuple[Path, ...]) -> ProtocolCard:
    return load_protocol(name)


@cache
def _shipped_classes(folder: Path) -> dict[str, str]:
    """Return the class of each shipped method → the method's name."""
    names = sorted(path.stem for path in (folder / "method").glob("*.yaml"))
    return {str(recipe(name).get("model.method.class_path")): name for name in names}


def _age(record: Record) -> tuple[str, str]:
    """What tables order runs by."""
    return record.created, record.run_id


def _family(record: Record) -> tuple[Any, ...]:
    """All settings of a method on one task that a table could show beside each other."""
    return (
        *(record.task, record.task_version, record.protocol, record.protocol_version, record.backbone),
        *(record.checkpoint_digest, record.method, record.data_variant, record.data_digest),
    )


def _setting(record: Record) -> str:
    """What counts as one tested setting: of a nested search, whatever the search of each seed selected."""
    return record.setting_digest if record.tuned and record.tuned.nested else record.config_digest


def _track(record: Record) -> str | None:
    return record.tuned.digest if record.tuned else None


def _cell(record: Record) -> tuple[Any, ...]:
    return (*_family(record), record.setting_digest, record.config_digest, record.source_digest)


def _scores(record: Record) -> tuple[Any, ...]:
    """What two seeds do not share by chance: which images are right, and the loss to the last digit."""
    return record.metrics and (record.metrics.correct, record.metrics.loss), record.correct and record.correct.bits


def _same_code(one: Record, other: Record) -> bool:
    if one.dirty or other.dirty:
        return False
    if one.package_digest is not None and other.package_digest is not None:
        return one.package_digest == other.package_digest
    if one.commit is None and other.commit is None:
        return one.package_version == other.package_version
    return one.commit == other.commit
