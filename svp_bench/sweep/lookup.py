"""Look up what a sweep needs to know of a job before it runs: config, data, weights, record, size of its checkpoint.

Torch is imported when the first answer needs it. A dry run caches these answers on disk (`PlanCache`), so that the next
one of the same code, cards and configs imports no torch. Data files and records are looked at each time.
"""

from __future__ import annotations

import glob
import json
import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatch
from functools import cache as cache_once
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from svp_bench.config.compose import Composed, compose, split_flags
from svp_bench.config.resolved import ResolvedConfig
from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.errors import RecordError, SvpBenchError, one_line
from svp_bench.core.registry import import_object, importing_torch
from svp_bench.core.resources import cache_dir
from svp_bench.data.folds import CrossValidationConfig, fold_positions
from svp_bench.data.sources import DataReport, inspect, measured, open_source
from svp_bench.records.code import package_digest
from svp_bench.records.digests import canonical_digest, card_digest, flat
from svp_bench.records.record import Record
from svp_bench.records.store import read_record, record_files
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.search import Plan, SearchSpace
from svp_bench.tasks.cards import load_protocol, load_suite, load_task
from svp_bench.train.provenance import LIBRARIES

T = TypeVar("T")
Weights = tuple[str | None, dict[str, list[str]] | None]  # digest, changes at loading

# Keys that other values of a config follow from: an image size, a warm-up clipped to the run.
_DECISIVE = {"model.backbone", "data.protocol", "trainer.max_epochs", "model.warmup_epochs", "model.head"}
_HUB = ("HOME", "HF_HOME", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "XDG_CACHE_HOME")  # where `hub` keeps weights
_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_MAX_BYTES, _MAX_ENTRIES = 2**27, 10_000


class PlanCache:
    """What dry runs found out with torch, on disk, for one state of code, libraries and devices.

    Attributes:
        entries: Key → value, as in JSON.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Any] = {}
        self._path: Path | None = None
        self._changed = False
        plugins = any(metadata.entry_points(group=f"svp_bench.{kind}") for kind in ("methods", "backbones"))
        if plugins or any(name.startswith("PL_FIT__") for name in os.environ):
            return  # code of other packages is not in the key; such a variable is an error
        gpus = sorted([*glob.glob("/dev/nvidia[0-9]*"), *glob.glob("/dev/kfd"), *glob.glob("/dev/dxg")])
        visible = [os.environ.get(name) for name in _DEVICES]
        versions = {name: metadata.version(name) for name in LIBRARIES}
        of = [package_digest(), versions, platform.python_version(), platform.platform(), gpus, visible]
        with suppress(RuntimeError):  # no home
            self._path = cache_dir("dry_run") / f"{canonical_digest(of).removeprefix('sha256:')[:32]}.json"
        if self._path is not None:
            with suppress(OSError, msgspec.MsgspecError):  # missing or damaged: everything is computed anew
                self.entries = msgspec.json.decode(read_regular(self._path, _MAX_BYTES), type=dict[str, Any])

    def key(self, kind: str, facts: Any) -> str | None:
        """Return the key of a value; None if it cannot be cached."""
        if self._path is None:
            return None
        try:
            return f"{kind} {canonical_digest(facts)}"
        except RecordError:  # a value that JSON does not have
            return None

    def store(self, key: str | None, value: Any) -> None:
        """Add a value."""
        if key is not None:
            if len(self.entries) >= _MAX_ENTRIES:
                self.entries.clear()
            self.entries[key] = value
            self._changed = True

    def save(self) -> None:
        """Write new values; those of other states of the code are removed. Nothing happens if that is impossible."""
        if self._path is None or not self._changed:
            return
        with suppress(OSError):
            with replacing(self._path) as file:
                file.write(msgspec.json.encode(self.entries))
            for other in self._path.parent.glob("*.json"):
                if other != self._path:
                    other.unlink()


def with_values(resolved: ResolvedConfig, seed: int, values: Mapping[str, Any]) -> ResolvedConfig:
    """Return a resolved config with another seed and other values, as parsing it anew would give it.

    A whole number becomes a fraction where the config has one, which is all that parsing changes in a plain value.
    """
    config = deepcopy(resolved.config) if values else {**resolved.config}
    config["seed_everything"] = seed
    for key, value in values.items():
        *parents, last = key.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        is_float = isinstance(node.get(last), float) and isinstance(value, int) and not isinstance(value, bool)
        node[last] = float(value) if is_float else value
    return replace(resolved, config=config, seed=seed)


class Lookup:
    """Answers about jobs, each found out once in a process.

    Args:
        cache: Of a dry run.
    """

    def __init__(self, cache: PlanCache | None = None) -> None:
        self._cache = cache
        self._resolved: dict[tuple[str, ...], ResolvedConfig] = {}
        self._data: dict[tuple[Any, ...], DataReport] = {}
        self._folds: dict[tuple[Any, ...], tuple[tuple[int, ...], str]] = {}
        self._weights: dict[str, Weights] = {}
        self._sizes: dict[tuple[Any, ...], int] = {}
        self._trained: dict[str, tuple[int, int]] = {}  # parameters of a model, and those of its head for one class
        self._files, self._read = cache_once(record_files), cache_once(_readable)  # of a dry run: none is added

    def checkpoint_bytes(self, job: Job) -> int:
        """Return the approximate size of a job's checkpoint: trained parameters in float32, and optimizer state."""
        seed = None if job.selected is None else job.seed
        cell = job.task, job.method, job.stage, job.selected, seed, job.common, json.dumps(job.values)
        if cell not in self._sizes:
            resolved = self.resolved(job)
            config, card = resolved.config, load_task(resolved.task)
            facts = None if resolved.sources or card.as_found else [config["model"], config["data"], card_digest(card)]
            self._sizes[cell] = self._cached("bytes", facts, int, lambda: self._checkpoint_bytes(config))
        return self._sizes[cell]

    def _checkpoint_bytes(self, config: Mapping[str, Any]) -> int:
        with importing_torch():
            from svp_bench.data.module import VisionDataModule
            from svp_bench.methods.build import adapt, create_backbone
            from svp_bench.methods.checks import trained_parameters
        model, data = config["model"], VisionDataModule.from_config(config["data"])
        key = json.dumps([model, data.image_size], sort_keys=True, default=str)
        if key not in self._trained:
            method = import_object(model["method"]["class_path"])(**(model["method"].get("init_args") or {}))
            backbone = create_backbone(str(model["backbone"]), num_classes=1, img_size=data.image_size)
            sizes = {name: p.numel() for name, p in trained_parameters(adapt(backbone, method)).items()}
            self._trained[key] = sum(sizes.values()), sum(sizes[name] for name in sizes if name.startswith("head."))
        parameters, head = self._trained[key]
        copies = 3 if model["optimizer"]["name"] == "adamw" else 2
        copies += model["ema"]["decay"] is not None
        return 4 * copies * (parameters + head * (data.num_classes - 1))

    def resolved(self, job: Job) -> ResolvedConfig:
        """Return the job's resolved config; parsed once for all seeds and values of a task and method."""
        seed = 0 if job.selected is None else job.seed  # a selected config of a nested search is for one seed
        base = self._resolve(replace(job, seed=seed, values={}))
        plain = dict(flat(base.config)) if job.values else {}
        if any(key not in plain or key in _DECISIVE for key in job.values):
            return self._resolve(job)  # a key that only a full parse may judge
        return with_values(base, job.seed, job.values)

    def _resolve(self, job: Job) -> ResolvedConfig:
        arguments = tuple(job.arguments())
        if arguments not in self._resolved:
            self._resolved[arguments] = self._parse(compose(split_flags(arguments)))
        return self._resolved[arguments]

    def _parse(self, composed: Composed) -> ResolvedConfig:
        card = load_task(composed.flags.values.get("data.task") or str(composed.get("data.task")))
        protocol = composed.flags.values.get("data.protocol") or composed.get("data.protocol")
        cards = card_digest(card), card_digest(load_protocol(str(protocol or load_suite(card.suite).protocol)))
        selected = composed.selected.digest if composed.selected else None
        facts = [composed.values, composed.origins, composed.flags.rest, composed.method, cards, selected]
        if self._cache is not None:
            found = self._cache.entries.get(self._cache.key("config", facts) or "")
            if found is not None:
                return ResolvedConfig.of(composed, "fit", sources={}, **found)
        with importing_torch():
            from svp_bench.train.parser import resolve
        resolved = resolve(composed)
        if self._cache is not None and not resolved.sources:
            roots = str(resolved.results_root), str(resolved.runs_root)
            value = {"config": resolved.config, "method": resolved.method, "roots": roots}
            self._cache.store(self._cache.key("config", facts), value)
        return resolved

    def look(self, job: Job) -> Outcome | None:
        """Return how a job ended earlier: complete or failed; None if it is still to be run.

        Raises:
            SvpBenchError: If the command line is wrong, or data or weights are missing.
        """
        resolved = self.resolved(job)
        failed: Record | None = None
        for record in self._records(resolved):
            if not self._same(record, resolved):
                continue
            if record.status == "complete":
                if record.kind == "selection" and record.val_correct is None:
                    continue  # of an older version: a search compares trials image by image
                return self._outcome(record, resolved, found=True)
            if record.status == "failed":
                failed = record
        if failed is None:
            return None
        return Outcome("failed", found=True, reason=failed.status_reason, run_id=failed.run_id)

    def _records(self, resolved: ResolvedConfig) -> Iterator[Record]:
        """Yield the records of a setting and seed, the oldest first. Unreadable ones are left to the tables."""
        folder = resolved.results_root / "records" / resolved.task
        pattern = f"{resolved.method}-*-seed{resolved.seed}-*.json"
        listed, read = (record_files, _readable) if self._cache is None else (self._files, self._read)
        for path in (path for path in listed(folder) if fnmatch(path.name, pattern)):
            if (record := read(path)) is not None:
                yield record

    def _same(self, record: Record, resolved: ResolvedConfig) -> bool:
        """Whether a record is of the cell and seed of a config, on the data and weights that are here."""
        card = load_task(resolved.task)
        suite = load_suite(card.suite)
        protocol = load_protocol(str(resolved.config["data"].get("protocol") or suite.protocol))
        stage = resolved.config["data"].get("stage") or "final"
        if record.status == "complete" and record.data_digest != self.report(resolved).digest:
            return False
        return (
            record.config_digest == resolved.config_digest
            and (record.method_source or {}) == resolved.sources
            and record.setting_digest == resolved.setting_digest
            and record.seed == resolved.seed
            and record.stage == stage
            and record.task_version == card.version
            and (record.protocol, record.protocol_version) == (protocol.name, protocol.version)
            and _weights_of(record) == self.weights(resolved)
        )

    def report(self, resolved: ResolvedConfig) -> DataReport:
        """Return how the data on disk compare with the card.

        Raises:
            DataError: If they are missing or malformed.
        """
        data = resolved.config["data"]
        divided = data["cross_validation"]["folds"] is not None
        key = (resolved.task, data.get("root"), data.get("protocol"), data.get("stage"), divided)
        if key not in self._data:
            self._data[key] = self._inspect(resolved)
        return self._data[key]

    def _inspect(self, resolved: ResolvedConfig) -> DataReport:
        data, card = resolved.config["data"], load_task(resolved.task)

        def module() -> Any:
            with importing_torch():
                from svp_bench.data.module import VisionDataModule
            return VisionDataModule.from_config(data)

        if self._cache is None or card.as_found:
            report: DataReport = module().inspect()[1]
            return report
        facts = [data, resolved.card_digests]
        if card.reader.kind == "synthetic":  # follows from the card
            return self._cached("report", facts, DataReport, lambda: module().inspect()[1])
        splits = self._cached("splits", facts, tuple[str, ...], lambda: module().splits_read)
        suite, root = load_suite(card.suite), data.get("root")
        protocol = load_protocol(str(data.get("protocol") or suite.protocol))
        source = open_source(card, Path(root) if root else None, suite=suite, protocol=protocol)
        return inspect(card, source, splits)

    def _cached(self, kind: str, facts: Any, value: type[T], compute: Callable[[], T]) -> T:
        """Return a value from the cache, else compute it; `facts` is everything that it depends on, None for never."""
        if self._cache is None or facts is None or (key := self._cache.key(kind, facts)) is None:
            return compute()
        if key not in self._cache.entries:
            self._cache.store(key, msgspec.to_builtins(compute()))
        return msgspec.convert(self._cache.entries[key], value)

    def plan(self, search: SearchSpace, resolved: ResolvedConfig) -> Plan:
        """Return the runs of a trial of a search, by the numbers of images on disk.

        Args:
            search: The declaration.
            resolved: Of any trial.

        Raises:
            DataError: If the data are missing or malformed.
            ConfigError: If there are more folds than labelled images.
        """
        protocol = str(resolved.config["data"].get("protocol") or load_suite(load_task(resolved.task).suite).protocol)
        stages, counts = load_protocol(protocol).stages, self.report(resolved).counts
        return search.plan(counts[stages["select"]["val"]], counts.get(stages["final"]["train"], 0))

    def weights(self, resolved: ResolvedConfig) -> Weights:
        """Return digest and changes at loading of the initial weights of a run, as its record states them."""
        model, data = resolved.config["model"], resolved.config["data"]
        name, checkpoint, head = str(model["backbone"]), str(model["checkpoint"]), model["head"]
        if checkpoint == "none":
            return None, None
        card = load_task(resolved.task)
        facts = [name, checkpoint, head, data["image_size"], card.classes if head == "keep" else 1]
        key = json.dumps([*facts, [resolved.task, data.get("root")] if card.as_found else None])
        if key in self._weights:
            return self._weights[key]
        known = None
        if self._cache is not None and not card.as_found:
            known = self._cache.key("weights", [*facts, os.getcwd(), [os.environ.get(each) for each in _HUB]])
            if (found := self._cache.entries.get(known or "")) and found["files"] == _stamps(Path(found["path"])):
                self._weights[key] = found["digest"], found["changes"]
                return self._weights[key]
        with importing_torch():
            from svp_bench.data.module import VisionDataModule
            from svp_bench.methods.build import create_backbone
            from svp_bench.models.checkpoints import backbone_digest
        module = VisionDataModule.from_config(data)
        size, classes = module.image_size, module.num_classes if head == "keep" else 1
        backbone = create_backbone(name, num_classes=classes, checkpoint=checkpoint, head=head, img_size=size)
        report = backbone.load_report
        self._weights[key] = backbone_digest(backbone), report.for_record() if report else None
        if self._cache is not None and known is not None and report is not None:
            digest, changes = self._weights[key]
            path = report.path.absolute()
            value = {"digest": digest, "changes": changes, "path": str(path), "files": _stamps(path)}
            self._cache.store(known, value)
        return self._weights[key]

    def _outcome(self, record: Record, resolved: ResolvedConfig, *, found: bool) -> Outcome:
        metrics, selection = record.metrics, record.kind == "selection"
        if selection and record.not_comparable:  # a search must not select it
            reason = f"the trial is not comparable: {'; '.join(record.not_comparable)}"
            return Outcome("failed", found=found, reason=one_line(reason), run_id=record.run_id)
        images, divided = self._fold(resolved) if selection else (None, None)
        return Outcome(
            "complete",
            found=found,
            run_id=record.run_id,
            top1=metrics.top1 if metrics else None,
            count=metrics.count if metrics else None,
            trainable=record.parameters.trainable,
            selected_on=record.splits.get("val" if selection else "test"),
            loss=metrics.loss if metrics else None,
            right=record.val_correct.bits if record.val_correct else None,
            images=images,
            divided=divided,
        )

    def _fold(self, resolved: ResolvedConfig) -> tuple[tuple[int, ...] | None, str | None]:
        """Return which images a trial holds out, as positions in the split that is divided, and that split's name."""
        data = resolved.config["data"]
        division = CrossValidationConfig(**data["cross_validation"])
        if division.folds is None:
            return None, None
        key = (resolved.task, data["root"], data["protocol"], division)
        if key not in self._folds:
            root, card = data["root"] and Path(data["root"]), load_task(resolved.task)
            protocol = load_protocol(data["protocol"] or load_suite(card.suite).protocol)
            name = protocol.stages["final"]["train"]
            images = open_source(measured(card, root), root).get(name)
            held = fold_positions(
                images.keys(), images.labels, resolved.task, division.folds, division.fold, division.seed
            )
            self._folds[key] = tuple(held.tolist()), name
        return self._folds[key]


def _weights_of(record: Record) -> Weights:
    load = record.checkpoint_load
    return record.checkpoint_digest, {name: [*lines] for name, lines in load.items()} if load else None


def _readable(path: Path) -> Record | None:
    try:
        return read_record(path)
    except SvpBenchError:
        return None


def _stamps(path: Path) -> list[list[Any]]:
    """Return size and time of a weight file, and of the hub's note which of its versions is current."""
    found = []
    for file in (path, path.parents[2] / "refs" / "main" if len(path.parents) > 2 else path):
        with suppress(OSError):
            state = file.stat()
            found.append([str(file), state.st_size, state.st_mtime_ns])
    return found
