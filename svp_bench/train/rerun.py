"""`svp-bench rerun`: repeat a run from its record alone, and compare the numbers.

The run has the config and the seed of the record. Splits (by digest), weights (by digest) and the resolved config must
equal those of the record before training begins; other differences (commit, versions, cards, device) are printed.

The exit status is 0 if the numbers agree:

- bit-equal: the same images are right, and the mean loss is the same to the last digit; or
- a fact differs that changes the last digits (device, threads, number of devices, scan backend, versions, commit, or a
  setting that no digest covers), and the exact McNemar test on the recorded bits has p >= 0.05. Selection records
  without bits: the two accuracies differ by at most 1.96 binomial standard errors of val. The mean losses may differ by
  the larger of a tenth of the recorded loss and 0.02 nats, plus ln 2 for each image that differs, divided by the number
  of images.

Otherwise it is 1; always if the source of a custom method differs from the recorded one. The record of the rerun is
written to another results folder, so that no table counts a seed twice.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

from svp_bench import __version__
from svp_bench.config.compose import compose, split_flags
from svp_bench.core.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    RecordError,
    SvpBenchError,
    UsageError,
    one_line,
    plural,
)
from svp_bench.core.registry import import_object, make_importable
from svp_bench.data.module import VisionDataModule
from svp_bench.records.bits import unpack_bits
from svp_bench.records.code import package_digest
from svp_bench.records.digests import CELL_EXCLUDED, flat
from svp_bench.records.record import Metrics, Record
from svp_bench.records.store import read_record, record_path
from svp_bench.stats.inference import one_standard_error
from svp_bench.stats.significance import mcnemar
from svp_bench.train.parser import ResolvedConfig, resolve
from svp_bench.train.provenance import changed_sources, cpu_name
from svp_bench.train.run import FitRun, first_difference, run

_Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
_LEVEL = 0.05  # of the McNemar test
_THREADS = re.compile(r"(\d+) threads")  # of `device_name`
_NAMED_WEIGHTS = ("hub", "embedded", "none")
_LOSS_SHARE, _LOSS_NATS = 0.1, 0.02  # tolerance of the mean loss
_FACTS = ("device", "cpu", "device_count", "scan_backend", "package_version", "commit")
_WITHOUT_EFFECT = ("data.num_workers", "data.pixel_cache", "model.scan_backend")  # the backend that ran is in _FACTS
_REFUSED = ("seed_everything", "data.seed", "model.seed", "config", "ckpt_path", "resume", "no_test")
_CHANGES = "code: uncommitted changes, in the record or here"


def run_rerun(record: Record, places: Mapping[str, str], further: Sequence[str] = ()) -> int:
    """Repeat a record's run, and print how the numbers compare.

    Args:
        record: The record.
        places: Paths by config key: data.root, model.checkpoint, results_root, runs_root.
        further: Flags that change no number.

    Returns:
        The exit status: 0 if the numbers agree by the rule above, else 1.

    Raises:
        SvpBenchError: If the data, weights, method or settings of the run are not available.
    """
    if record.status != "complete":
        raise RecordError(f"{record.run_id} is {record.status}: it has no number that could be repeated")
    if (seed := record.config.get("seed_everything")) != record.seed:
        raise RecordError(f"{record.run_id} has seed {record.seed}, but its config has {seed}: one of them was edited")
    if record_path(record, places["results_root"]).exists():
        raise UsageError(
            f"{places['results_root']} holds the record itself, and tables would count its seed twice; give the rerun "
            "another --results_root"
        )
    _check_flags(further)
    settings = dict(flat(record.config))
    _check_method(record, str(settings.get("model.method.class_path")))
    weights = str(settings.get("model.checkpoint"))
    if "model.checkpoint" not in places and weights not in _NAMED_WEIGHTS and not Path(weights).is_file():
        raise CheckpointError(
            f"the run began with the weights {weights} ({_short(record.checkpoint_digest)}), which are not here; give "
            "their place with --model.checkpoint PATH"
        )
    flags = [f"--{key}={value}" for key, value in {**places, "seed_everything": record.seed}.items()]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(record.config, sort_keys=False), encoding="utf-8")
        try:
            composed = compose(split_flags(["--config", str(file), *further, *flags]))
            composed.search = record.search
            config = resolve(composed)
            if config.config_digest != record.config_digest:
                different = first_difference(config.config, record.config)
                which = f"{different[0]} = {different[1]}, in the record {different[2]}" if different else "unknown"
                raise ConfigError(
                    f"svp-bench {__version__} resolves the record's config to another setting ({which}); "
                    f"{_other_version(record)}"
                )
            done = run(config, run_type=lambda config, watchers: _RepeatedRun(config, watchers, record))
        except SvpBenchError as error:
            raise type(error)(str(error).replace(str(file), f"the config of {record.run_id}")) from None
    if not done.trainer.is_global_zero:
        return 0
    path = config.results_root / "records" / record.task / f"{done.run_id}.json"
    return _compare(record, read_record(path))


# --- before training --------------------------------------------------------------------------------------------------


class _RepeatedRun(FitRun):
    """A fit that refuses other data and weights than those of a record."""

    next_step = None
    resumable = False

    def __init__(self, config: ResolvedConfig, watchers: Sequence[Callback], record: Record) -> None:
        super().__init__(config, watchers)
        self.record = record

    def prepare(self) -> None:
        """Prepare as `fit` does, and compare splits and code with the record."""
        super().prepare()
        notes = _differing_code(self.record, self)
        _check_splits(self.record, self.data)
        self._print_header(notes)

    @rank_zero_only
    def _print_header(self, notes: Sequence[str]) -> None:
        record = self.record
        print(f"Repeating {record.run_id} ({record.task}, {record.method}, stage {record.stage}, seed {record.seed})")
        print(f"  splits     {_short(record.data_digest)}, as in the record")
        for note in notes:
            print(f"  note       {note}")

    def check_weights(self) -> None:
        """Refuse other weights than the record's."""
        model, record = self.model, self.record
        digest = None if str(model.checkpoint) == "none" else model.backbone_digest
        remedy = "give the right ones with --model.checkpoint PATH"
        if digest != record.checkpoint_digest:
            raise CheckpointError(
                f"{model.checkpoint} has other weights ({_short(digest)}) than the run began with "
                f"({_short(record.checkpoint_digest)}); {remedy}"
            )
        now = (model.load_report.for_record() if model.load_report else None) or {}
        then = record.checkpoint_load or {}
        if now.get("kept") != (list(then["kept"]) if "kept" in then else None):
            raise CheckpointError(f"{model.checkpoint} has another head than the run began with; {remedy}")


def _check_splits(record: Record, data: VisionDataModule) -> None:
    if dict(data.splits) != dict(record.splits):
        raise ConfigError(
            f"the protocol {record.protocol} (version {data.protocol.version}) reads {dict(data.splits)}, the record's "
            f"(version {record.protocol_version}) {dict(record.splits)}; {_other_version(record)}"
        )
    source, report = data.inspect()
    if report.digest != record.data_digest:
        raise DataError(
            f"{source.origin} has other splits of {record.task} ({_short(report.digest)}) than the run read "
            f"({_short(record.data_digest)}, variant {record.data_variant}); give their folder with --data.root DIR"
        )


def _other_version(record: Record) -> str:
    commit = f" (commit {record.commit})" if record.commit else ""
    return f"rerun it with the version that wrote it, {record.package_version}{commit}"


def _differing_code(record: Record, now: FitRun) -> list[str]:
    """Return one line for each difference of code and cards."""
    data, sources = now.data, now.config.sources
    pairs = [
        (f"task card {record.task}, version", record.task_version, data.card.version),
        (f"protocol {record.protocol}, version", record.protocol_version, data.protocol.version),
        ("svp-bench", record.package_version, __version__),
        ("commit", record.commit, now.commit),
    ]
    if record.package_digest is not None:
        pairs.append(("the package's files", _short(record.package_digest), _short(package_digest())))
    if record.cpu is not None:
        pairs.append(("processor", record.cpu, cpu_name()))
    notes = [_differs(name, theirs, ours) for name, theirs, ours in pairs if theirs != ours]
    if record.dirty or now.dirty:
        notes.append(_CHANGES)
    if edited := _edited(record.method_source, sources):
        notes.append(f"the method's source: {edited} here differs from the record's")
    elif sources and record.method_source is None:
        notes.append("the method's source: not in the record, so it may have changed")
    return notes


def _check_flags(further: Sequence[str]) -> None:
    """Refuse flags that would change the setting."""
    flags = split_flags(further)
    if flags.configs or flags.method or flags.selected_config:
        raise UsageError("rerun takes no --config, --method or --selected_config: the record has all settings")
    stray = [word for word in further if not word.startswith("--") and word not in flags.values.values()]
    if stray:
        raise UsageError(f"rerun takes one record, not also {stray[0]!r}; give the record first, then the flags")
    for key in flags.values:
        if key not in CELL_EXCLUDED or key in _REFUSED:
            raise UsageError(f"rerun takes no --{key}: it would be another run than the record's; use svp-bench fit")


def _check_method(record: Record, class_path: str) -> None:
    """Check that the class of the method can be imported."""
    make_importable()
    try:
        import_object(class_path)
    except Exception as error:  # the user's module may raise anything
        if class_path.startswith("svp_bench."):
            where = f"svp-bench {__version__} has no such method; the record is of {record.package_version}"
        else:
            where = "it is not part of svp-bench: run this in the folder of its module, or install that"
        raise ConfigError(
            f"the method {class_path} of {record.run_id} cannot be imported ({one_line(error)}); {where}"
        ) from None


# --- after training ---------------------------------------------------------------------------------------------------


def _compare(old: Record, new: Record) -> int:
    """Print how the numbers compare; return the exit status."""
    before, after = old.metrics, new.metrics
    if new.status != "complete" or after is None or before is None:
        print(f"The rerun is {new.status} ({new.status_reason}): nothing to compare")
        return 1
    split = old.splits["test" if old.kind == "final" else "val"]
    print(
        f"  record     top-1 {before.top1:.2f} % on {split} ({before.correct} of {before.count}), loss {before.loss!r}"
    )
    print(f"  rerun      top-1 {after.top1:.2f} % ({after.correct} of {after.count}), loss {after.loss!r}")
    differing = _differences(old, new)
    for line in differing:
        print(f"  differs    {line}")
    if edited := _edited(old.method_source, new.method_source or {}):
        print(f"Does not agree on the method's source: {edited} (exit status 1). It is another method's number:")
    return _compare_numbers(old, new, before, after, differing) or int(bool(edited))


def _edited(recorded: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
    """Return the files of a method that differ from those of a record; "" if none does or the record has none."""
    return "" if recorded is None else changed_sources(recorded, found)


def _compare_numbers(old: Record, new: Record, before: Metrics, after: Metrics, differing: Sequence[str]) -> int:
    """Print how the scores compare; return the exit status."""
    same_bits = old.correct == new.correct if old.correct and new.correct else before.correct == after.correct
    if same_bits and before.loss == after.loss and before.per_class == after.per_class:
        print("Bit-equal: the same images are right, and the loss is the same to the last digit.")
        return 0
    agrees, apart, bound, images = _within_noise(old, new, before, after)
    print(f"Not bit-equal: {apart}")
    print(f"Top-1 {after.top1 - before.top1:+.2f} points.")
    recorded, here = (_THREADS.search(record.device or "") for record in (old, new))
    if recorded and here and recorded[1] != here[1]:  # sums of another order
        print(f"The record was made with {recorded[1]} threads: try again with OMP_NUM_THREADS={recorded[1]}.")
    if not differing:
        print("Nothing that is recorded differs, so the numbers should be the same, and are not (exit status 1).")
        return 1
    if agrees:
        allowed = max(_LOSS_NATS, _LOSS_SHARE * before.loss) + math.log(2) * images / before.count
        agrees = abs(after.loss - before.loss) <= allowed
        loss = f"the loss differs by {abs(after.loss - before.loss):.3g}; {allowed:.3g} nats are allowed"
        bound = f"{bound}; {loss}" if agrees else f"{loss}; {bound}"
    print(f"Agrees: {bound}, on another machine or version." if agrees else f"Does not agree: {bound} (exit status 1).")
    return int(not agrees)


def _within_noise(old: Record, new: Record, before: Metrics, after: Metrics) -> tuple[bool, str, str, int]:
    """Return whether the accuracies agree, the difference, the bound that decides, and how many images differ."""
    if old.correct is None or new.correct is None:  # a selection record
        images, apart = abs(after.correct - before.correct), abs(after.top1 - before.top1)
        limit = _Z * one_standard_error((before.top1 + after.top1) / 2, before.count)
        where = f"1.96 binomial standard errors of {plural(before.count, 'image')} (± {limit:.2f} points; no bits)"
        text = f"{plural(images, 'image')} more or fewer are right"
        return apart <= limit, text, f"{'within' if apart <= limit else 'beyond'} {where}", images
    if old.correct.count != new.correct.count:
        raise RecordError(
            f"the rerun scored {plural(new.correct.count, 'image')}, the run {old.correct.count}; report this"
        )
    one, other = (unpack_bits(bits.bits, bits.count) for bits in (old.correct, new.correct))
    test = mcnemar(one, other)
    images = test.b + test.c
    if images == 0:
        text = "the same images are right, but the loss differs"
        return True, text, "both runs classify the same images correctly", 0
    text = (
        f"{images} of {plural(old.correct.count, 'image')} differ ({test.b} right in the record alone, {test.c} in the "
        "rerun alone)"
    )
    agrees = test.p >= _LEVEL
    how = "may well" if agrees else "would hardly"
    bound = f"{test.b} against {test.c} {how} be chance (paired by image: exact McNemar p = {test.p:.3g})"
    return agrees, text, bound, images


def _differences(old: Record, new: Record) -> list[str]:
    """Return one line for each fact that differs and can change the last digits."""
    digests = "the package's files", _short(old.package_digest), _short(new.package_digest)
    names = {**old.libraries, **new.libraries}
    ours, theirs = dict(flat(old.config)), dict(flat(new.config))
    keys = [key for key, kind in CELL_EXCLUDED.items() if kind.startswith("device") and key not in _WITHOUT_EFFECT]
    pairs = [
        *((fact, getattr(old, fact), getattr(new, fact)) for fact in _FACTS),
        *([digests] if old.package_digest is not None else []),
        *((name, old.libraries.get(name, "none"), new.libraries.get(name, "none")) for name in names),
        *((key, str(ours.get(key)), str(theirs.get(key))) for key in keys),
    ]
    lines = [_differs(*pair) for pair in pairs if pair[1] != pair[2]]
    return [*lines, _CHANGES] if old.dirty or new.dirty else lines


def _differs(name: str, theirs: Any, ours: Any) -> str:
    shown = ["unknown" if value is None else str(value) for value in (theirs, ours)]
    return f"{name}: {shown[0]} in the record, {shown[1]} here"


def _short(digest: str | None) -> str:
    return f"sha256:{digest.removeprefix('sha256:')[:12]}" if digest else "none"
