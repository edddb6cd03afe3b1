"""Run jobs in this process: look for the record of a job, claim it, train, report. Imports torch.

A worker stays warm: imports, compiled kernels, decoded images and weights are cached between runs.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from svp_bench.config.compose import compose, split_flags
from svp_bench.core.errors import SvpBenchError, UsageError, one_line
from svp_bench.core.registry import import_object
from svp_bench.data.folds import CrossValidationConfig, fold_positions
from svp_bench.data.module import VisionDataModule
from svp_bench.data.sources import DataReport, measured, open_source
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.records.digests import canonical_digest, cell_config, flat, setting_digest
from svp_bench.records.record import Record
from svp_bench.records.store import read_record, record_files
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.search import Plan, SearchSpace
from svp_bench.tasks.cards import load_protocol, load_suite, load_task
from svp_bench.train.parser import ResolvedConfig, resolve
from svp_bench.train.resume import AlreadyLockedError, find_run, lock_file
from svp_bench.train.run import run

# Keys that other values of a config follow from: an image size, a warm-up clipped to the run.
_DECISIVE = {"model.backbone", "data.protocol", "trainer.max_epochs", "model.warmup_epochs", "model.head"}

Report = Callable[[Mapping[str, Any]], None]
Weights = tuple[str | None, dict[str, list[str]] | None]  # digest, changes at loading


class _Epochs(Callback):
    """Reports the progress of a run."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch."""
        self._report({"epoch": trainer.current_epoch + 1, "epochs": trainer.max_epochs})


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


class Runner:
    """Runs jobs, one after the other, in this process."""

    def __init__(self) -> None:
        self._resolved: dict[tuple[str, ...], ResolvedConfig] = {}
        self._data: dict[tuple[Any, ...], DataReport] = {}
        self._folds: dict[tuple[Any, ...], tuple[tuple[int, ...], str]] = {}
        self._weights: dict[tuple[Any, ...], Weights] = {}
        self._sizes: dict[str, int] = {}
        self._trained: dict[str, tuple[int, int]] = {}  # parameters of a model, and those of its head for one class

    # --- looking -----------------------------------------------------------------------------------------------------

    def checkpoint_bytes(self, job: Job) -> int:
        """Return the approximate size of a job's checkpoint: trained parameters in float32, and optimizer state."""
        config = self.resolved(job).config
        cell = json.dumps([config["model"], config["data"]], sort_keys=True, default=str)
        if cell not in self._sizes:
            self._sizes[cell] = self._checkpoint_bytes(config)
        return self._sizes[cell]

    def _checkpoint_bytes(self, config: Mapping[str, Any]) -> int:
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
            self._resolved[arguments] = resolve(compose(split_flags(arguments)))
        return self._resolved[arguments]

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
        for path in (path for path in record_files(folder) if fnmatch(path.name, pattern)):
            try:
                yield read_record(path)
            except SvpBenchError:
                continue

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
            self._data[key] = VisionDataModule.from_config(data).inspect()[1]
        return self._data[key]

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
        module = VisionDataModule.from_config(data)
        size, classes = module.image_size, module.num_classes if head == "keep" else 1
        key = (name, checkpoint, head, classes, size)
        if key not in self._weights:
            backbone = create_backbone(name, num_classes=classes, checkpoint=checkpoint, head=head, img_size=size)
            report = backbone.load_report
            self._weights[key] = backbone_digest(backbone), report.for_record() if report else None
        return self._weights[key]

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, job: Job, report: Report = lambda _: None, retry: bool = False) -> Outcome:
        """Run a job, unless it has a record, or another process runs it.

        Args:
            job: The job.
            report: Called after each epoch.
            retry: Run a job that failed earlier once more.
        """
        began = time.perf_counter()
        try:
            outcome = self._run(job, report, retry)
        except AlreadyLockedError:
            outcome = Outcome("claimed", reason="another process runs it")
        except KeyboardInterrupt:
            outcome = Outcome("stopped", reason="interrupted")
        except Exception as error:  # while looking, before anything is run
            outcome = _failure(error)
        return replace(outcome, seconds=time.perf_counter() - began)

    def _run(self, job: Job, report: Report, retry: bool) -> Outcome:
        found = self.look(job)
        if found is not None and (found.status == "complete" or not retry):
            return found
        resolved = self.resolved(job)
        setting = resolved.setting_digest
        # no two processes of any sweep over this runs folder run the same cell and seed at once
        cell = [resolved.task, resolved.method, resolved.seed, cell_config(resolved.config), setting]
        name = canonical_digest(cell).removeprefix("sha256:")[:32]
        with lock_file(resolved.runs_root / "claims" / f"{name}.lock"):
            found = self.look(job)  # another process may have finished it just before
            if found is not None and found.status == "complete":
                return found
            weights = resolved.config["model"]["checkpoint"]

            def same(config: Mapping[str, Any]) -> bool:  # another sweep over these runs may have had other weights
                same_weights = config.get("model", {}).get("checkpoint") == weights
                return same_weights and setting_digest(config, resolved.search) == setting

            folder, records = resolved.runs_root / resolved.task, resolved.results_root / "records" / resolved.task
            unfinished = find_run(folder, records, resolved.seed, same, resolved.sources)
            # a finished one of the same setting is of other data or weights (else `look` had found it)
            resume = ["--resume"] if unfinished is not None and not unfinished.finished else []
            problem: Exception | None = None
            quiet = ["--trainer.enable_progress_bar", "false"]
            try:
                run(resolve(compose(split_flags([*job.arguments(), *quiet, *resume]))), [_Epochs(report)])
            except Exception as error:  # one failed job must not end the others
                problem = error
            return self._ended(resolved, problem)

    def _ended(self, resolved: ResolvedConfig, problem: Exception | None) -> Outcome:
        ours = [record for record in self._records(resolved) if self._same(record, resolved)]
        ours.sort(key=lambda record: (record.status == "complete", record.run_id))
        if problem is not None:
            return replace(_failure(problem), run_id=ours[-1].run_id if ours else None)
        if not ours or ours[-1].status == "interrupted":
            return Outcome("stopped", reason="stopped after saving its state")
        record = ours[-1]
        if record.status != "complete":
            return Outcome("failed", reason=record.status_reason or record.status, run_id=record.run_id)
        if record.kind == "selection":  # the weights of a trial are not needed
            shutil.rmtree(resolved.runs_root / resolved.task / record.run_id / "checkpoints", ignore_errors=True)
        return self._outcome(record, resolved, found=False)

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


def _failure(error: Exception) -> Outcome:
    """Return the outcome of a job that raised an error."""
    if isinstance(error, SvpBenchError):
        return Outcome("failed", reason=one_line(str(error)), refused=isinstance(error, UsageError))
    # an OSError or ImportError lies in the machine, not in the setting
    refused = not isinstance(error, (OSError, ImportError))
    return Outcome("failed", reason=one_line(f"{type(error).__name__}: {error}"), refused=refused)


def _weights_of(record: Record) -> Weights:
    load = record.checkpoint_load
    return record.checkpoint_digest, {name: [*lines] for name, lines in load.items()} if load else None
