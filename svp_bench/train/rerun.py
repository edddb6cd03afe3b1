"""`svp-bench rerun`: a run again, from its record alone, and how the numbers compare.

The record's resolved config is run as a saved config, with its seed. Before training, what makes the number must be at
hand: the lists (their digest), the weights (theirs), and a package that resolves the config to the same cell. What
differs beside that (commit, versions, cards, device) is said.

The exit status is 0 if the numbers agree:

- bit-equal: the same images are right, and the mean loss is the same to the last digit; or
- something that is known to move the last digits differs (device, threads, number of devices, scan backend, versions,
  commit, or a setting that no digest holds), and the images that differ are as good as evenly divided: by the exact
  McNemar test on the recorded bits, p >= 0.05. Both runs saw the same images, so only those that one run alone has
  right say anything; two independent test lists could be much further apart by chance. A selection record has no bits:
  there the two accuracies may be 1.96 binomial standard errors of the val list apart, the wider bound. The mean losses
  may differ by a tenth of the recorded one or 0.02 nats, whichever is more, and by ln 2 for each image that differs,
  divided by the number of images.

Otherwise it is 1; always if the source of a method of somebody's own is not the recorded one. Another processor, or the
same with another widest instruction set, rounds otherwise: records name it, and a difference is said. The rerun's
record goes to a results folder of its own, so that no table counts a seed twice.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse._util import import_object  # the look-up that will instantiate the method
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_only

from svp_bench import __version__
from svp_bench.config.compose import Flags, split_flags
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
from svp_bench.data.module import VisionDataModule
from svp_bench.data.sources import inspect, open_source
from svp_bench.records.bits import unpack_bits
from svp_bench.records.code import package_digest
from svp_bench.records.digests import CELL_EXCLUDED, cell_config, flat
from svp_bench.records.record import Record
from svp_bench.records.store import read_record, record_path
from svp_bench.stats.inference import mcnemar, one_standard_error
from svp_bench.train.module import AdaptationModule
from svp_bench.train.parser import make_importable
from svp_bench.train.provenance import cpu_name
from svp_bench.train.resume import changed_sources
from svp_bench.train.run import BenchCLI, run

__all__ = ["run_rerun"]

_Z = 1.959963984540054  # of a normal distribution, at 95 %
_LEVEL = 0.05  # below this p the images that differ are not evenly divided
_NAMED_WEIGHTS = ("hub", "embedded", "none")
_LOSS_SHARE, _LOSS_NATS = 0.1, 0.02  # how far apart two mean losses may be, besides what differing images explain
_FACTS = ("device", "cpu", "device_count", "scan_backend", "package_version", "commit")
_MOVE_NOTHING = ("data.num_workers", "model.scan_backend")  # the backend that ran is a fact of its own
_NOT_GIVEN = ("seed_everything", "data.seed", "model.seed", "config", "ckpt_path", "resume", "no_test")
_CHANGES = "code: with changes that no commit names, in the record or here"
_FREE = tuple(key for key in CELL_EXCLUDED if key not in _NOT_GIVEN)


def run_rerun(record: Record, places: Mapping[str, str], further: Sequence[str] = ()) -> int:
    """Run a record's run again, and print how the numbers compare.

    Args:
        record: What to repeat.
        places: Config keys of paths → where things are now, or go: data.root, model.checkpoint, results_root,
            runs_root.
        further: Flags that change no number.

    Returns:
        The exit status: 0 if the numbers agree, by the rule of this module, else 1.

    Raises:
        SvpBenchError: If the run cannot be repeated here: its data, weights, method or settings are not at hand.
    """
    if record.status != "complete":
        raise RecordError(f"{record.run_id} is {record.status}: it has no number that could be repeated")
    if (seed := record.config.get("seed_everything")) != record.seed:
        raise RecordError(f"{record.run_id} has seed {record.seed}, and its config says {seed}: one of them was edited")
    if record_path(record, places["results_root"]).exists():
        raise UsageError(
            f"{places['results_root']} holds the record itself, and tables would count its seed twice; give the rerun "
            "another --results_root"
        )
    _need_free(further)
    _need_method(record)
    _need_weights_file(record, places)
    flags = [f"--{key}={value}" for key, value in {**places, "seed_everything": record.seed}.items()]

    def cli(subcommand: str, flags: Flags, watchers: Sequence[Callback]) -> BenchCLI:
        return _RerunCLI(subcommand, flags, watchers, record)

    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        config.write_text(yaml.safe_dump(_plain(record.config), sort_keys=False), encoding="utf-8")
        try:
            done = run("fit", split_flags(["--config", str(config), *further, *flags]), cli=cli)
        except SvpBenchError as error:
            text = str(error).replace(str(config), f"the config of {record.run_id}")
            raise type(error)(text) from None
    if not done.trainer.is_global_zero:
        return 0
    path = Path(places["results_root"]) / "records" / record.task / f"{done.run_id}.json"
    return _compare(record, read_record(path))


# -------------------------------------------------------------------------------------------------- before the training


class _RerunCLI(BenchCLI):
    """A fit whose cell, data and weights must be those of a record."""

    next_step = None
    goes_on = False

    def __init__(self, subcommand: str, flags: Flags, watchers: Sequence[Callback], record: Record) -> None:
        self.repeated = record
        super().__init__(subcommand, flags, watchers)

    def before_instantiate_classes(self) -> None:
        """Check settings and data against the record."""
        self.composed.search = self.repeated.search  # its values are all in the config; where they came from is not
        super().before_instantiate_classes()
        self._need_same_cell()
        data = VisionDataModule(**self.config[self.command].data.as_dict())
        notes = self._differing_code(data)
        self._need_lists(data)
        self._say_what_is_repeated(notes)

    def _need_same_cell(self) -> None:
        record, settings = self.repeated, self.settings
        if settings.config_digest == record.config_digest:
            return
        ours, theirs = (dict(flat(cell_config(config))) for config in (settings.config, record.config))
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        which = f"{other[0]} = {ours.get(other[0])}, in the record {theirs.get(other[0])}" if other else "unknown"
        raise ConfigError(
            f"svp-bench {__version__} makes another setting of the record's config ({which}); rerun it with the "
            f"version that made it, {record.package_version}{_at(record.commit)}"
        )

    def _need_lists(self, data: VisionDataModule) -> None:
        record = self.repeated
        if dict(data.splits) != dict(record.splits):
            raise ConfigError(
                f"the protocol {record.protocol} at hand (version {data.protocol.version}) reads {dict(data.splits)}, "
                f"the record's (version {record.protocol_version}) {dict(record.splits)}; rerun it with the version "
                f"that made it, {record.package_version}{_at(record.commit)}"
            )
        root = self.config[self.command].data.root
        source = open_source(data.card, Path(root) if root else None, suite=data.suite)
        digest = inspect(data.card, source, list(data.splits_read)).digest
        if digest != record.data_digest:
            raise DataError(
                f"{source.origin} has other lists of {record.task} ({_short(digest)}) than the run read "
                f"({_short(record.data_digest)}, variant {record.data_variant}); give their folder with --data.root DIR"
            )

    def _differing_code(self, data: VisionDataModule) -> list[str]:
        """What differs of code and cards, a line each."""
        record = self.repeated
        pairs = [
            (f"task card {record.task}, version", record.task_version, data.card.version),
            (f"protocol {record.protocol}, version", record.protocol_version, data.protocol.version),
            ("svp-bench", record.package_version, __version__),
            ("commit", record.commit, self.commit),
        ]
        if record.package_digest is not None:
            pairs.append(("the package's files", _short(record.package_digest), _short(package_digest())))
        if record.cpu is not None:
            pairs.append(("processor", record.cpu, cpu_name()))
        notes = [
            f"{what}: {_told(theirs)} in the record, {_told(ours)} here"
            for what, theirs, ours in pairs
            if theirs != ours
        ]
        if record.dirty or self.dirty:
            notes.append(_CHANGES)
        if edited := _edited(record.method_source, self.settings.sources):
            notes.append(f"the method's source: {edited} here is not what the record's run was made with")
        elif self.settings.sources and record.method_source is None:
            notes.append("the method's source: the record does not have it, so that nobody can say whether it changed")
        return notes

    @rank_zero_only
    def _say_what_is_repeated(self, notes: Sequence[str]) -> None:
        record = self.repeated
        print(f"Repeating {record.run_id} ({record.task}, {record.method}, stage {record.stage}, seed {record.seed})")
        print(f"  lists      {_short(record.data_digest)}, as in the record")
        for note in notes:
            print(f"  note       {note}")

    def fit(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Check the weights, then train as a fit does."""
        digest = None if str(model.checkpoint) == "none" else model.backbone_digest
        if digest != self.repeated.checkpoint_digest:
            raise CheckpointError(
                f"{model.checkpoint} has other weights ({_short(digest)}) than the run began with "
                f"({_short(self.repeated.checkpoint_digest)}); give the right ones with --model.checkpoint PATH"
            )
        now = (model.load_report.for_record() if model.load_report else None) or {}
        then = self.repeated.checkpoint_load or {}
        if now.get("kept") != (list(then["kept"]) if "kept" in then else None):
            raise CheckpointError(
                f"{model.checkpoint} has another head than the run began with; give the right weights with "
                "--model.checkpoint PATH"
            )
        super().fit(model, datamodule, **kwargs)


def _need_free(further: Sequence[str]) -> None:
    """Refuse flags that would make it another run."""
    flags = split_flags(further)
    if flags.configs or flags.method or flags.choice:
        raise UsageError("rerun takes no --config, --method or --choice: the record has all that made the run")
    stray = [word for word in further if not word.startswith("--") and word not in flags.values.values()]
    if stray:
        raise UsageError(f"rerun takes one record, and {stray[0]!r} besides; give the record first, then the flags")
    for key in flags.values:
        if key not in _FREE:
            raise UsageError(
                f"rerun takes no --{key}: it would be another run than the record's (svp-bench fit makes one)"
            )


def _need_method(record: Record) -> None:
    """Import the method's class, which may be of somebody else, as a fit would."""
    make_importable(split_flags([]))
    class_path = str(dict(flat(record.config)).get("model.method.class_path"))
    try:
        import_object(class_path)
    except Exception as error:  # what somebody's module raises while it is imported
        if class_path.startswith("svp_bench."):
            where = f"svp-bench {__version__} has no such method; the record is of {record.package_version}"
        else:
            where = "it is not part of svp-bench: run this in the folder of its module, or install that"
        raise ConfigError(
            f"the method {class_path} of {record.run_id} cannot be imported ({one_line(str(error))}); {where}"
        ) from None


def _need_weights_file(record: Record, places: Mapping[str, str]) -> None:
    source = str(dict(flat(record.config)).get("model.checkpoint"))
    if "model.checkpoint" not in places and source not in _NAMED_WEIGHTS and not Path(source).is_file():
        raise CheckpointError(
            f"the run began with the weights {source} ({_short(record.checkpoint_digest)}), which are not here; give "
            "their place with --model.checkpoint PATH"
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# --------------------------------------------------------------------------------------------------- after the training


def _compare(old: Record, new: Record) -> int:
    """Print how the numbers compare; return the exit status."""
    if new.status != "complete" or new.metrics is None or old.metrics is None:
        print(f"The rerun is {new.status} ({new.status_reason}): nothing to compare")
        return 1
    role = "test" if old.kind == "final" else "val"
    before, after = old.metrics, new.metrics
    name = old.splits[role]
    print(
        f"  record     top-1 {before.top1:.2f} % on {name} ({before.correct} of {before.count}), loss {before.loss!r}"
    )
    print(f"  rerun      top-1 {after.top1:.2f} % ({after.correct} of {after.count}), loss {after.loss!r}")
    differing = _differences(old, new)
    for line in differing:
        print(f"  differs    {line}")
    if edited := _edited(old.method_source, new.method_source or {}):
        print(f"Does not agree on the method's source: {edited} (exit status 1). It is another method's number:")
    return _compare_numbers(old, new, differing) or int(bool(edited))


def _edited(recorded: Mapping[str, str] | None, found: Mapping[str, str]) -> str:
    """Return which files of a method differ from those of a record that has them; "" if none does."""
    return "" if recorded is None else changed_sources(recorded, found)


def _compare_numbers(old: Record, new: Record, differing: Sequence[str]) -> int:
    """Print how the scores compare; return the exit status."""
    before, after = old.metrics, new.metrics
    assert before is not None
    assert after is not None
    same_bits = old.correct == new.correct if old.correct and new.correct else before.correct == after.correct
    if same_bits and before.loss == after.loss and before.per_class == after.per_class:
        print("Bit-equal: the same images are right, and the loss is the same to the last digit.")
        return 0
    agrees, apart, bound = _within_noise(old, new)
    print(f"Not bit-equal: {apart}")
    print(f"Top-1 {after.top1 - before.top1:+.2f} points.")
    if not differing:
        print("Nothing that is recorded differs, so the numbers should be the same, and are not (exit status 1).")
        return 1
    if agrees:
        allowed = _loss_tolerance(old, new)
        agrees = abs(after.loss - before.loss) <= allowed
        much = f"the loss differs by {abs(after.loss - before.loss):.3g}, of {allowed:.3g} nats that are allowed"
        bound = f"{bound}; {much}" if agrees else f"{much}; {bound}"
    if agrees:
        print(f"Agrees: {bound}, on another machine or version.")
        return 0
    print(f"Does not agree: {bound} (exit status 1).")
    return 1


def _loss_tolerance(old: Record, new: Record) -> float:
    """Return how far apart two mean losses may be, in nats; see the text of this module."""
    before, after = old.metrics, new.metrics
    assert before is not None
    assert after is not None
    apart = abs(after.correct - before.correct)
    if old.correct is not None and new.correct is not None:
        one, other = (unpack_bits(bits.bits, bits.count) for bits in (old.correct, new.correct))
        apart = int((one != other).sum())
    return max(_LOSS_NATS, _LOSS_SHARE * before.loss) + math.log(2) * apart / before.count


def _within_noise(old: Record, new: Record) -> tuple[bool, str, str]:
    """Return whether two runs agree; how many images differ; and by which bound they agree or not."""
    before, after = old.metrics, new.metrics
    assert before is not None
    assert after is not None
    if old.correct is None or new.correct is None:  # an older selection record has no bits
        apart = abs(after.top1 - before.top1)
        bound = _Z * one_standard_error((before.top1 + after.top1) / 2, before.count)
        images = plural(before.count, "image")
        where = f"1.96 binomial standard errors of {images} (± {bound:.2f} points; no bits to pair)"
        said = f"{abs(after.correct - before.correct)} more or fewer images are right"
        return apart <= bound, said, f"{'within' if apart <= bound else 'beyond'} {where}"
    if old.correct.count != new.correct.count:
        raise RecordError(
            f"the rerun scored {plural(new.correct.count, 'image')}, the run {old.correct.count}; report this"
        )
    one, other = (unpack_bits(bits.bits, bits.count) for bits in (old.correct, new.correct))
    test = mcnemar(one, other)
    differ = test.b + test.c
    if differ == 0:
        return True, "the same images are right, but the loss differs", "no image divides the two runs"
    said = (
        f"{differ} of {plural(old.correct.count, 'image')} differ ({test.b} right in the record alone, "
        f"{test.c} in the rerun "
        "alone)"
    )
    agrees = test.p >= _LEVEL
    how = "may well" if agrees else "would hardly"
    return (
        agrees,
        said,
        f"{test.b} against {test.c} {how} be chance (paired by image: exact McNemar p = {test.p:.3g})",
    )


def _differences(old: Record, new: Record) -> list[str]:
    """What differs between two runs of one cell and seed, and can move the last digits."""
    lines = [
        f"{fact}: {_told(getattr(old, fact))} in the record, {_told(getattr(new, fact))} here"
        for fact in _FACTS
        if getattr(old, fact) != getattr(new, fact)
    ]
    if old.package_digest not in (None, new.package_digest):
        lines.append(
            f"the package's files: {_short(old.package_digest)} in the record, {_short(new.package_digest)} here"
        )
    names = [*old.libraries, *(name for name in new.libraries if name not in old.libraries)]
    lines += [
        f"{name}: {old.libraries.get(name, 'none')} in the record, {new.libraries.get(name, 'none')} here"
        for name in names
        if old.libraries.get(name) != new.libraries.get(name)
    ]
    ours, theirs = dict(flat(old.config)), dict(flat(new.config))
    lines += [
        f"{key}: {ours.get(key)} in the record, {theirs.get(key)} here"
        for key, kind in CELL_EXCLUDED.items()
        if kind.startswith("device") and key not in _MOVE_NOTHING and str(ours.get(key)) != str(theirs.get(key))
    ]
    return [*lines, _CHANGES] if old.dirty or new.dirty else lines


def _told(value: Any) -> str:
    return "unknown" if value is None else str(value)


def _short(digest: str | None) -> str:
    return f"sha256:{digest.removeprefix('sha256:')[:12]}" if digest else "none"


def _at(commit: str | None) -> str:
    return f" (commit {commit})" if commit else ""
