"""Check a record against the other records of its results folder: copies, repeated seeds, other settings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from svp_bench.audit.base import Case, Line, cell_of, some, verdicts
from svp_bench.core.errors import plural
from svp_bench.records.digests import cell_config, flat
from svp_bench.records.record import Record


def check_copied_weights(case: Case) -> Iterator[Line]:
    """Check that no run of another seed, task or score has the same final weights."""
    record = case.record
    if record.weights_digest is None or not record.epochs:
        return
    for other in case.stored:
        if other.weights_digest != record.weights_digest or not other.epochs:
            continue
        if (other.task, other.seed) != (record.task, record.seed):
            yield "fail", f"the same weights as {other.run_id} ({other.task}, seed {other.seed}): one is a copy"
        elif record.correct and other.correct and record.correct.split_digest == other.correct.split_digest:
            machine, same = ((one.device, one.scan_backend, one.precision) for one in (record, other))
            if machine == same and record.correct.bits != other.correct.bits:
                yield "fail", f"the same weights and test images as {other.run_id}, with other images correct"


def check_seeds(case: Case) -> Iterator[Line]:
    """Check that all seeds of the cell are here, and none is a copy of another."""
    record = case.record
    if case.store is None:
        yield "note", "the record lies in no results folder: other seeds are unknown (--results_root R)"
        return
    complete = [other for other in case.cell if other.status == "complete"]
    for other in complete:
        if other.seed == record.seed or record.metrics is None or _scores(other) != _scores(record):
            continue
        if (dict(other.times), other.metrics) == (dict(record.times), record.metrics):
            yield "fail", f"the same score, bits, loss and times as seed {other.seed} ({other.run_id}): a copy"
        else:
            same = f"the same bits and, to the last digit, the same loss as seed {other.seed} ({other.run_id})"
            yield "note", f"{same}: possibly a copy with other times"
    own = {record.seed} if record.status == "complete" else set()
    seeds = sorted({other.seed for other in complete} | own)
    missing = sorted(set(range(max(seeds, default=0))) - set(seeds))
    text = f"{len(seeds)} of this cell: {some(map(str, seeds))}"
    if not seeds:
        yield "note", "no complete run of this cell is here"
    elif missing:
        yield "note", f"{text}; not here: {some(map(str, missing))}"
    elif len(seeds) == 1:
        yield "note", f"{text}; an interval needs at least two seeds"
    else:
        yield "pass", text


def _scores(record: Record) -> tuple[Any, ...]:
    """Return the bits and the loss; two seeds do not share both by chance."""
    return record.metrics and (record.metrics.correct, record.metrics.loss), record.correct and record.correct.bits


def check_repeated(case: Case) -> Iterator[Line]:
    """Check that no seed of the cell was run again for a better score; tables show the newest run."""
    record = case.record
    same = [other for other in case.cell if other.seed == record.seed]
    ended = Counter(other.status for other in same if other.status != "complete")
    if ended:
        parts = ", ".join(f"{count} {status}" for status, count in sorted(ended.items()))
        yield "note", f"further runs of this cell and seed that no table counts: {parts}"
    if record.status != "complete" or record.metrics is None:
        return
    done = sorted((other for other in same if other.status == "complete"), key=_age)
    for other in done:
        if other.metrics is not None:
            yield _repeated(case, other, record.metrics.top1, other.metrics.top1)
    if len(done) > 1:
        yield "note", f"{len(done) + 1} complete runs of this cell and seed are here; the newest counts in tables"
    if case.store is not None and not same:
        yield "pass", "no other run of this cell and seed is here"


def _repeated(case: Case, other: Record, ours: float, theirs: float) -> Line:
    record = case.record
    newest = max(record, other, key=_age)
    if newest is other:
        event = f"run again as {other.run_id}, which tables show instead"
    else:
        event = f"run before as {other.run_id}, which it replaces in tables"
    scores = f"{theirs:.2f} there, {ours:.2f} here"
    if ours == theirs:
        return "note", f"{event}, with the same score"
    if not _same_code(record, other):
        counting = {one.seed: one for one in sorted(case.cell, key=_age) if one.status == "complete"}
        left = [f"seed {seed}" for seed, one in sorted(counting.items()) if not _same_code(one, newest)]
        left = [seed for seed in left if seed != f"seed {record.seed}"]
        if left and record.kind == "final":
            alone = f"run again alone: {some(left)} of this cell still count from other code"
            return "fail", f"{event}, on other code: {scores}; {alone}"
        return "note", f"{event}, on other code: {scores}"
    if record.kind == "selection":
        return "note", f"{event}, on the same code: {scores}; a selected config names the runs that it counts"
    return "fail", f"{event}: {scores}; a second draw of one seed on the same code"


def _age(record: Record) -> tuple[str, str]:
    return record.created, record.run_id


def _same_code(one: Record, other: Record) -> bool:
    if one.dirty or other.dirty:
        return False
    if one.package_digest is not None and other.package_digest is not None:
        return one.package_digest == other.package_digest
    if one.commit is None and other.commit is None:
        return one.package_version == other.package_version
    return one.commit == other.commit


def check_alike(case: Case) -> Iterator[Line]:
    """Check that runs of the cell have the same parameters, and runs of the split the same class counts."""
    record, problems = case.record, []
    for other in case.of_task:
        if other.kind != record.kind:
            continue
        ours, theirs = record.parameters, other.parameters
        if ours != theirs and cell_of(other) == cell_of(record):
            counts = f"{theirs.trainable} of {theirs.total} train, here {ours.trainable} of {ours.total}"
            problems.append(f"{other.run_id}, of the same cell, has other parameters: {counts}")
        classes = [one.metrics.per_class.count for one in (record, other) if one.metrics and one.metrics.per_class]
        same_split = (other.data_digest, other.splits) == (record.data_digest, record.splits)
        if same_split and len({*classes}) > 1:
            problems.append(f"{other.run_id} scored the same split, with other numbers of images in its classes")
    if case.store is not None:
        yield from verdicts(problems, "parameters, and images of each class, as in the other runs here")


def check_tested(case: Case) -> Iterator[Line]:
    """Check that no other setting of the method was tested on the task and track."""
    record = case.record
    if case.store is None or record.kind != "final":
        return
    tested = {_setting(one): one for one in case.family if one.status == "complete" and _track(one) == _track(record)}
    tested[_setting(record)] = record
    if len(tested) == 1:
        yield "pass", f"no other setting of {record.method} was tested on {record.task}, of those here"
        return
    settings = [dict(flat(cell_config(one.config))) for one in tested.values()]
    keys = sorted({key for setting in settings for key in setting})
    differing = some(key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1)
    yield (
        "note",
        f"{plural(len(tested), 'setting')} of {record.method} were tested on {record.task}, on this track; they differ "
        f"in {differing}: reporting the best of them selects on the test split",
    )


def _setting(record: Record) -> str:
    """Return the digest of a tested setting; all seeds of a nested search have the same."""
    return record.setting_digest if record.search and record.search.nested else record.config_digest


def _track(record: Record) -> str | None:
    return record.search.declaration if record.search else None
