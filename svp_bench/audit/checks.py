"""Check a record against its config, the cards and the shipped recipe; `CHECKS` lists all checks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from svp_bench._version import __version__
from svp_bench.audit.base import Case, Line, fold_of, get, short, some, split_text, verdicts
from svp_bench.audit.compare import check_alike, check_copied_weights, check_repeated, check_seeds, check_tested
from svp_bench.audit.search import (
    check_config,
    check_grid,
    check_other_searches,
    check_outside,
    check_rule,
    check_track,
    check_trials,
)
from svp_bench.core.errors import plural
from svp_bench.core.resources import configs_dir
from svp_bench.records.bits import count_ones
from svp_bench.records.code import package_digest_at
from svp_bench.records.defaults import override_texts, overrides, recipe, shipped_layer
from svp_bench.records.digests import flat
from svp_bench.records.record import Metrics, Record
from svp_bench.records.store import record_path
from svp_bench.tasks.cards import OTHER_PIXELS

_STAGES = {"final": ("final", ("train", "test")), "selection": ("select", ("train", "val"))}
_CUTS = ("limit_train_batches", "limit_test_batches", "limit_val_batches", "overfit_batches", "fast_dev_run")
_PERCENT = 1e-3  # tolerance of float32 for scores in percent
_LOSS = 1e-5  # and for a loss, relative to 1 + its bound
_FIRST = 5
_NAMED_WEIGHTS = ("hub", "embedded", "none")


def check_place(case: Case) -> Iterator[Line]:
    """Check that the file is where tables read it."""
    record, root = case.record, results_root_of(case.path)
    scored = f"its {record.correct.count} bits give the score, " if record.correct else ""
    yield "pass", f"schema {record.schema}; {scored}its digests match its config"
    if root is not None and case.path.absolute() != record_path(record, root):
        home = record_path(record, root).relative_to(root).as_posix()
        yield "fail", f"the file is a copy of {home}, or was moved from there: tables do not count it"
    elif case.path.name != f"{record.run_id}.json":
        yield "note", f"the file is not named after its run, {record.run_id}.json"


def check_status(case: Case) -> Iterator[Line]:
    """Check that the run is complete, and its config does not shorten it."""
    record, problems = case.record, []
    asked = {key: get(record.config, f"trainer.{key}") for key in _CUTS}
    cut = [f"trainer.{key} {value}" for key, value in asked.items() if _cuts(value)]
    if record.status != "complete":
        problems.append(f"{record.status}: {record.status_reason or 'trained, not tested'}; no table counts it")
    elif cut:
        problems.append(f"stated as complete, but its config cuts it short: {', '.join(cut)}")
    epochs = get(record.config, "trainer.max_epochs")
    if record.status in ("complete", "unscored") and isinstance(epochs, int) and record.epochs != epochs:
        ran = plural(record.epochs, "epoch")
        problems.append(f"stated as {record.status} after {ran}, and its config asks for {epochs}")
    return verdicts(problems, f"complete: {plural(record.epochs, 'epoch')}")


def _cuts(value: Any) -> bool:
    """Return whether a limit leaves images out: 1.0 and null mean all, 1 is one batch."""
    return value is not None and value is not False and repr(value) not in ("1.0", "0.0", "0")


def check_facts(case: Case) -> Iterator[Line]:
    """Check that the facts of the record agree with its config."""
    record, config = case.record, case.record.config
    source = str(get(config, "model.checkpoint"))
    facts: list[tuple[str, Any, Any]] = [
        ("seed", record.seed, config.get("seed_everything")),
        ("task", record.task, get(config, "data.task")),
        ("stage", record.stage, get(config, "data.stage") or "final"),
        ("backbone", record.backbone, get(config, "model.backbone")),
        ("precision", record.precision, get(config, "trainer.precision") or record.precision),
        ("protocol", record.protocol, get(config, "data.protocol") or record.protocol),
        ("checkpoint", record.checkpoint, source if source in _NAMED_WEIGHTS else Path(source).name),
    ]
    arguments = get(config, "model.method.init_args")
    for key, value in arguments.items() if isinstance(arguments, Mapping) else ():
        facts.append((f"method_args.{key}", record.method_args.get(key, value), value))
    problems = [f"{key} is {ours!r}, but the config states {theirs!r}" for key, ours, theirs in facts if ours != theirs]
    digests = {"setting_digest": record.setting_digest, **(record.migrated_from or {})}  # a migration keeps run ids
    digest = digests["setting_digest"].removeprefix("sha256:")[:8]
    start, _, end = record.run_id.partition("-seed")
    if not start.startswith(f"{record.method}-") or not end.startswith(f"{record.seed}-{digest}-"):
        own = f"its method is {record.method}, its seed {record.seed} and its setting {digest}"
        problems.append(f"the run is named {record.run_id}, but {own}")
    shipped = str(recipe(record.method).get("model.method.class_path", "")).split(".")[-1]
    theirs = str(get(config, "model.method.class_path"))
    owner = _shipped_classes(configs_dir()).get(theirs, record.method)
    if (shipped and theirs.split(".")[-1] != shipped) or owner != record.method:
        problems.append(f"the method is {record.method}, but the class in the config is {theirs}")
    return verdicts(problems, f"{record.method}, seed {record.seed}: run id, facts and config agree")


@cache
def _shipped_classes(folder: Path) -> dict[str, str]:
    """Return class → name of each shipped method."""
    names = sorted(path.stem for path in (folder / "method").glob("*.yaml"))
    return {str(recipe(name).get("model.method.class_path")): name for name in names}


def check_method_code(case: Case) -> Iterator[Line]:
    """Check that the files of a custom method are stated; other files are another cell."""
    record, name = case.record, str(get(case.record.config, "model.method.class_path"))
    ours = record.method_source or {}
    if not name.startswith("svp_bench."):
        files = some(f"{file} {short(digest)}" for file, digest in ours.items())
        stated = f"its files are stated: {files}" if ours else "no commit names its code"
        yield "note", f"the class {name} of the method is not part of svp-bench; {stated}"
    setting = (record.setting_digest, record.config_digest)
    others = [one for one in case.family if (one.setting_digest, one.config_digest) == setting]
    runs = [one for one in others if (one.method_source or {}) != ours]
    if runs:
        pairs = {pair for one in runs for pair in {*ours.items()} ^ {*(one.method_source or {}).items()}}
        files = ", ".join(sorted({file for file, _ in pairs}))
        names = some(one.run_id for one in runs)
        yield "note", f"{names} ran this setting with another source of the method ({files}): another cell"


def check_selected_on(case: Case) -> Iterator[Line]:
    """Check that the values of the recipe were not selected on a test split."""
    if get(case.record.config, "selected_on") == "test":
        yield "note", "the authors of the recipe selected its values on test splits (selected_on: test); tables mark it"


def check_comparable(case: Case) -> Iterator[Line]:
    """Check that no user class changed the run behind its config."""
    record, callbacks = case.record, get(case.record.config, "trainer.callbacks")
    for reason in record.not_comparable or ():
        yield "fail", f"{reason}; tables leave the run out"
    if record.external_classes:
        names = some(record.external_classes)
        yield "note", f"classes from outside of svp-bench, which no commit of it names, took part: {names}"
    if callbacks:
        listed = callbacks if isinstance(callbacks, list) else [callbacks]
        names = ", ".join(str(one.get("class_path", one)) if isinstance(one, Mapping) else str(one) for one in listed)
        yield "note", f"user callbacks were active: {names}"


def check_protocol(case: Case) -> Iterator[Line]:
    """Check that the cards here equal those of the run."""
    yield from case.cards.lines


def check_scores(case: Case) -> Iterator[Line]:
    """Check that loss, accuracies and calibration error are possible for a model."""
    card, metrics = case.cards.task, case.record.metrics
    if metrics is not None:
        problems = impossible_scores(metrics, (card.classes or None) if card is not None else None)
        yield from verdicts(problems, "loss, accuracies and calibration error can be those of one model")


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


def check_splits(case: Case) -> Iterator[Line]:
    """Check that the run read and scored only the splits of its stage and protocol."""
    record, protocol, problems = case.record, case.cards.protocol, []
    stage, roles = _STAGES[record.kind]
    folds, fold, fold_seed = fold_of(record.config)
    known = protocol is not None and record.stage in protocol.stages
    allowed = (
        protocol.splits(record.stage, folds if folds > 1 else None, fold, fold_seed) if known and protocol else None
    )
    if sorted(record.splits) != sorted(roles) or record.stage != stage:
        stated = f"this one states stage {record.stage} and {split_text(record.splits)}"
        problems.append(f"a {record.kind} record reads {' and '.join(roles)} in stage {stage}, {stated}")
    elif allowed is not None and allowed != dict(record.splits):
        problems.append(
            f"the splits are {split_text(record.splits)}, and those of {record.protocol} are {split_text(allowed)}"
        )
    if record.kind == "final" and "val_seconds" in record.times:
        problems.append("a split was scored during the training of a final run (times.val_seconds)")
    for role, bits in (("test", record.correct), ("val", record.val_correct)):
        if bits is not None and bits.split != record.splits.get(role):
            problems.append(f"the bits are those of the split {bits.split!r}")
    if record.val_correct is not None and record.metrics is not None:
        ones = count_ones(record.val_correct.bits, record.val_correct.count)
        if ones != record.metrics.correct:
            problems.append(f"the bits of val have {ones} ones, and {record.metrics.correct} images are correct")
    trained = f"the record states: trained on {record.splits.get('train')}"
    if record.kind == "selection":
        good = f"{trained}, selected on {record.splits.get('val')}, without a test split; tables never show it"
    else:
        scored = f"scored on {record.splits.get('test')} with the weights of epoch {record.epochs}"
        good = f"{trained}, then {scored} (stage final has no split to select on)"
    return verdicts(problems, good)


def check_images(case: Case) -> Iterator[Line]:
    """Check that images, classes and digest of the scored split equal those of the card and of other records."""
    record, card = case.record, case.cards.task
    metrics, correct = record.metrics, record.correct
    if card is None or metrics is None:
        return
    name = record.splits.get("test" if record.kind == "final" else "val", "")
    expected, problems, images = case.split_counts.get(name), [], plural(metrics.count, "image")
    if record.data_variant not in ("card", *card.variants, *OTHER_PIXELS, "synthetic"):
        problems.append(f"the card has no data variant {record.data_variant!r}")
    elif expected is not None and metrics.count != expected:
        problems.append(f"{name} has {images}, and in the card {expected}")
    scored = len(metrics.per_class.count) if metrics.per_class is not None else card.classes
    if not card.as_found and scored != card.classes:
        problems.append(f"scores of {plural(scored or 0, 'class')}, and the card has {card.classes}")
    if metrics.top5 is not None and not _is_count(metrics.top5 * metrics.count / 100, metrics.count):
        problems.append(f"top5 {metrics.top5} % of {images} is not a whole number of images")
    for other in case.of_task if correct is not None else ():
        same = _scored_split(other) == _scored_split(record)
        if same and other.correct and correct and other.correct.split_digest != correct.split_digest:
            problems.append(f"{other.run_id} read the same splits, and has another digest of {correct.split}")
    digest = f" ({short(correct.split_digest)})" if correct is not None else ""
    classes = "classes as found" if card.as_found else plural(card.classes or 0, "class")
    yield from verdicts(problems, f"{metrics.count} images of {name}{digest}, {classes}")


def _scored_split(record: Record) -> tuple[str | None, ...]:
    return record.data_digest, record.stage, record.correct.split if record.correct else None


def _is_count(number: float, count: int) -> bool:
    """Return whether a number of images is whole, with the tolerance of float32."""
    return abs(number - round(number)) <= max(1e-3, 1e-6 * count)


def check_data(case: Case) -> Iterator[Line]:
    """Check that the data are those of the card."""
    record, digest = case.record, short(case.record.data_digest)
    if record.data_variant == "synthetic":
        yield "fail", "synthetic images, not the data set: the number carries no information about the task"
        return
    if record.data_status == "different":
        yield "note", f"differs from the card: {'; '.join(record.data_notes) or 'no reason is given'}"
    elif record.data_variant in OTHER_PIXELS:
        cited = short(record.manifest_digest) if record.manifest_digest else "none"
        yield "note", f"pixels of the source {record.data_variant}, not of the card; splits {digest}, manifest {cited}"
    elif record.data_variant != "card":
        yield "note", f"the record states the variant {record.data_variant} of the card, splits {digest}"
    else:
        yield "pass", f"the record states that the files are as in the card; splits {digest}"
    if record.image_notes:
        counted = (f"{note} ({count})" for note, count in sorted(record.image_notes.items()))
        yield "note", f"images that were skipped or converted: {some(counted)}"


def check_weights(case: Case) -> Iterator[Line]:
    """Check that the weights before and after training are stated."""
    record = case.record
    if record.checkpoint_digest is None:
        yield "note", "random weights: this run says nothing about transfer; tables keep it separate, unranked"
    else:
        stated = f"{record.backbone} from {record.checkpoint}, {short(record.checkpoint_digest)}"
        yield "pass", f"the record states {stated}; there is no registry of known weights to compare with"
    if record.status in ("complete", "unscored") and record.package_digest and record.weights_digest is None:
        yield "fail", "weights_digest is missing, which svp-bench writes: the scored weights are unknown"
    for event, lines in (record.checkpoint_load or {}).items():
        yield "note", f"{event} while loading: {some(lines)}"
    here = case.store.weights.get((record.backbone, record.checkpoint, "complete"), {}) if case.store else {}
    others = {digest for digest, runs in here.items() if runs != {record.run_id}} - {record.checkpoint_digest}
    if others:
        yield "note", f"other runs state other weights from {record.checkpoint}: {some(sorted(map(short, others)))}"


def check_budget(case: Case) -> Iterator[Line]:
    """Check that the run has at most the epochs of its task's config, or else of the protocol."""
    record, protocol, key = case.record, case.cards.protocol, "trainer.max_epochs"
    if protocol is None:
        return
    own = shipped_layer(f"{record.task}.yaml")  # tasks with small splits may train longer
    source = f"configs/{record.task}.yaml" if key in own else protocol.name
    allowed, used = own.get(key, dict(flat(protocol.training)).get(key)), get(record.config, key)
    if not isinstance(allowed, int) or not isinstance(used, int):
        yield "note", f"{source} or the config has no number of epochs"
    elif used > allowed:
        yield "fail", f"{plural(used, 'epoch')}, more than the {allowed} of {source}"
    elif used < allowed:
        yield "note", f"{plural(used, 'epoch')}, fewer than the {allowed} of {source}"
    else:
        yield "pass", f"{plural(used, 'epoch')}, as in {source}"


def check_settings(case: Case) -> Iterator[Line]:
    """Check that the hyper-parameters are the shipped ones, or were selected by a search."""
    record, search = case.record, case.record.search
    if not recipe(record.method):
        yield "note", f"there is no recipe of the method {record.method} here to compare with"
    found = override_texts(overrides(record, case.cards.protocol, search.keys if search else ()))
    good = "as protocol card, task and recipe here" + (", except for the selected values" if search else "")
    yield from verdicts([f"overrides of the shipped settings: {'; '.join(found)}"] if found else [], good, "note")


def check_code(case: Case) -> Iterator[Line]:
    """Check that the code is a known commit."""
    record = case.record
    version = f"the record states svp-bench {record.package_version}"
    if record.dirty:
        yield "fail", f"{version}, commit {record.commit} with changes: cannot be rebuilt from a commit"
    elif record.commit is None:
        yield "note", f"{version}, installed: no commit is known"
    elif record.dirty is None:
        yield "note", f"{version}, commit {record.commit}; whether anything was changed is not known"
    else:
        yield "pass", f"{version}, commit {record.commit}, nothing changed"
    if record.package_version != __version__:
        yield "note", f"audited by svp-bench {__version__}, with its cards and recipes"


def check_code_digest(case: Case) -> Iterator[Line]:
    """Check that the files of the package equal those of the commit and of other records of it."""
    record = case.record
    if record.package_digest is None or record.dirty:
        return
    ours, expected = short(record.package_digest), package_digest_at(record.commit) if record.commit else None
    if expected is not None and expected != record.package_digest:
        theirs = f"those of commit {record.commit} are {short(expected)}"
        yield "fail", f"the files of the package were {ours}, and {theirs}: code was changed without git showing it"
    others = {
        one.package_digest: one.run_id
        for one in case.stored
        if (one.commit, one.package_version) == (record.commit, record.package_version) and not one.dirty
    }
    code = f"commit {record.commit}" if record.commit else f"version {record.package_version}, installed"
    for digest, run_id in others.items():
        if digest not in (None, record.package_digest):
            theirs = f"{short(digest)}, here {ours}"
            yield "fail", f"{run_id} states the same {code}, and other files of the package ({theirs})"


def results_root_of(path: Path) -> Path | None:
    """Return the results folder R of a file R/records/SUITE/TASK/FILE, else None."""
    absolute = path.absolute()
    return absolute.parents[3] if len(absolute.parents) > 3 and absolute.parents[2].name == "records" else None


CHECKS: tuple[tuple[str, Callable[[Case], Iterator[Line]]], ...] = (
    ("schema", check_place),
    ("status", check_status),
    ("identity", check_facts),
    ("identity", check_method_code),
    ("identity", check_selected_on),
    ("comparable", check_comparable),
    ("protocol", check_protocol),
    ("scores", check_scores),
    ("splits", check_splits),
    ("images", check_images),
    ("data", check_data),
    ("weights", check_weights),
    ("weights", check_copied_weights),
    ("budget", check_budget),
    ("track", check_track),
    ("selection", check_config),
    ("selection", check_other_searches),
    ("trials", check_trials),
    ("trials", check_outside),
    ("rule", check_rule),
    ("grid", check_grid),
    ("settings", check_settings),
    ("seeds", check_seeds),
    ("repeated", check_repeated),
    ("alike", check_alike),
    ("tested", check_tested),
    ("code", check_code),
    ("code", check_code_digest),
)
"""Subject and check, in the order of the lines."""
