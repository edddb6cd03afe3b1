"""`svp-bench rerun`: repeat a run from its record alone, and compare the numbers.

The run has the config and the seed of the record. Splits (by digest), weights (by digest) and the resolved config must
equal those of the record before training begins; other differences (commit, versions, cards, device) are printed.

The numbers agree, exit status 0, if they are bit-equal: the same images are right, and the mean loss is the same to the
last digit; or if a recorded fact differs (device, threads, scan backend, versions, commit …), the exact McNemar test on
the recorded bits has p >= 0.05, and the mean losses differ by at most the larger of a tenth of the recorded loss and
0.02 nats, plus ln 2 for each image that differs, divided by the number of images. Otherwise the status is 1; always if
the source of a custom method differs. The new record goes to another results folder, so that no table counts a seed
twice.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
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
from svp_bench.records.digests import CELL_EXCLUDED, flat
from svp_bench.records.record import Record
from svp_bench.records.store import read_record, record_path
from svp_bench.stats.significance import mcnemar
from svp_bench.train.parser import ResolvedConfig, resolve
from svp_bench.train.provenance import changed_sources
from svp_bench.train.run import FitRun, first_difference, run

_LEVEL = 0.05  # of the McNemar test
_NAMED_WEIGHTS = ("hub", "embedded", "none")
_LOSS_SHARE, _LOSS_NATS = 0.1, 0.02  # tolerance of the mean loss
_FACTS = (
    *("device", "cpu", "device_count", "scan_backend", "package_version", "commit"),
    *("task_version", "protocol", "protocol_version"),
)
_WITHOUT_EFFECT = ("data.num_workers", "model.scan_backend")  # the backend that ran is in _FACTS
_REFUSED = ("seed_everything", "data.seed", "model.seed", "config", "ckpt_path", "resume", "no_test")


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
            repeated: list[_RepeatedRun] = []

            def build(config: ResolvedConfig, watchers: Sequence[Callback]) -> _RepeatedRun:
                repeated.append(_RepeatedRun(config, watchers, record))
                return repeated[0]

            done = run(config, run_type=build)
        except SvpBenchError as error:
            raise type(error)(str(error).replace(str(file), f"the config of {record.run_id}")) from None
    if not done.trainer.is_global_zero:
        return 0
    path = config.results_root / "records" / record.task / f"{done.run_id}.json"
    return _compare(record, read_record(path), repeated[0].differing)


# --- before training --------------------------------------------------------------------------------------------------


class _RepeatedRun(FitRun):
    """A fit that refuses other data and weights than those of a record."""

    next_step = None
    resumable = False

    def __init__(self, config: ResolvedConfig, watchers: Sequence[Callback], record: Record) -> None:
        super().__init__(config, watchers)
        self.record = record
        self.differing: list[str] = []  # facts that differ from the record and can change the last digits

    def prepare(self) -> None:
        """Prepare as `fit` does, and compare the splits with the record."""
        super().prepare()
        _check_splits(self.record, self.data)

    @rank_zero_only
    def announce(self) -> None:
        """Print the header of a run, and the differences from the record."""
        super().announce()
        record = self.record
        self.differing = _differences(record, self.build_record("unscored", None, tested=False))
        print(f"Repeating {record.run_id} ({record.task}, {record.method}, stage {record.stage}, seed {record.seed})")
        print(f"  splits     {_short(record.data_digest)}, as in the record")
        for line in self.differing:
            print(f"  differs    {line}")

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


def _compare(old: Record, new: Record, differing: Sequence[str]) -> int:
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
    edited = old.method_source is not None and changed_sources(old.method_source, new.method_source or {})
    if edited:
        print(f"Does not agree on the method's source: {edited} (exit status 1). It is another method's number:")
    bits = (old.correct, new.correct) if old.kind == "final" else (old.val_correct, new.val_correct)
    same_bits = bits[0] == bits[1] if all(bits) else before.correct == after.correct
    if same_bits and before.loss == after.loss and before.per_class == after.per_class:
        print("Bit-equal: the same images are right, and the loss is the same to the last digit.")
        return int(bool(edited))
    one, other = (unpack_bits(found.bits, found.count) if found else np.zeros(0, dtype=bool) for found in bits)
    if len(one) != len(other) or not len(one):
        print(f"Not bit-equal, and without the bits of both runs not comparable: {after.correct - before.correct:+d}")
        return 1
    test = mcnemar(one, other)
    images, apart = test.b + test.c, abs(after.loss - before.loss)
    allowed = max(_LOSS_NATS, _LOSS_SHARE * before.loss) + math.log(2) * images / before.count
    print(
        f"Not bit-equal: {images} of {plural(before.count, 'image')} differ ({test.b} right in the record alone, "
        f"{test.c} in the rerun alone; exact McNemar p = {test.p:.3g}); the loss differs by {apart:.3g}, {allowed:.3g} "
        f"nats are allowed. Top-1 {after.top1 - before.top1:+.2f} points."
    )
    if not differing:
        print("Nothing that is recorded differs, so the numbers should be the same, and are not (exit status 1).")
        return 1
    agrees = test.p >= _LEVEL and apart <= allowed
    print("Agrees: on another machine or version this may be chance." if agrees else "Does not agree (exit status 1).")
    return int(not agrees or bool(edited))


def _differences(old: Record, new: Record) -> list[str]:
    """Return one line for each fact that differs and can change the last digits."""
    names = {**old.libraries, **new.libraries}
    ours, theirs = dict(flat(old.config)), dict(flat(new.config))
    keys = [key for key, kind in CELL_EXCLUDED.items() if kind.startswith("device") and key not in _WITHOUT_EFFECT]
    pairs = [
        *((fact, getattr(old, fact), getattr(new, fact)) for fact in _FACTS),
        ("the package's files", _short(old.package_digest), _short(new.package_digest)),
        *((name, old.libraries.get(name, "none"), new.libraries.get(name, "none")) for name in names),
        *((key, str(ours.get(key)), str(theirs.get(key))) for key in keys),
    ]
    lines = [f"{name}: {before} in the record, {now} here" for name, before, now in pairs if before != now]
    return [*lines, "code: uncommitted changes, in the record or here"] if old.dirty or new.dirty else lines


def _short(digest: str | None) -> str:
    return f"sha256:{digest.removeprefix('sha256:')[:12]}" if digest else "none"
