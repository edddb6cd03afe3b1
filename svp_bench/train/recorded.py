"""Build the record of a run: status, scores, and the facts that determined them."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_warn

from svp_bench import __version__
from svp_bench.core.errors import RecordError, SvpBenchError, plural
from svp_bench.methods.checks import counted_parameters
from svp_bench.models.backbone import HEAD_PREFIXES
from svp_bench.ops import BackendChoice
from svp_bench.records.code import package_digest
from svp_bench.records.record import SCHEMA, Correct, Metrics, Parameters, Record, Status, timestamp
from svp_bench.train.base import BaseRun
from svp_bench.train.callbacks import peak_memory_mib
from svp_bench.train.checkpoint import CHECKPOINT
from svp_bench.train.comparable import external_classes
from svp_bench.train.efficiency import efficiency_of
from svp_bench.train.metrics import Evaluation, write_predictions, write_tables
from svp_bench.train.provenance import cpu_name, device_name, library_versions


class RecordedRun(BaseRun):
    """A run that can build its record, and write the tables of its predictions."""

    def scan_backend(self) -> BackendChoice | None:
        """Return the scan backend that runs, and the reason; None for a backbone without a scan.

        Raises:
            UnavailableError: If a backend was asked for by name and cannot run on the device.
        """
        return self.model.scan_decision(self.trainer.strategy.root_device, str(self.trainer.precision))

    def outcome(self) -> tuple[Status, str | None]:
        """Return the status and its reason: `limit_*`, `fast_dev_run` and early ends make a run truncated."""
        trainer, config = self.trainer, self.config.config["trainer"]
        if trainer.interrupted:
            return "interrupted", "stopped by the user"
        cut = [
            f"trainer.{name} {config[name]}"
            for name in ("limit_train_batches", "limit_test_batches", "limit_val_batches")
            if config.get(name) is not None and repr(config[name]) != "1.0"  # 1.0: all; 1: one batch
        ]
        if config.get("fast_dev_run"):
            cut.append("trainer.fast_dev_run")
        if config.get("overfit_batches"):
            cut.append(f"trainer.overfit_batches {config['overfit_batches']}")
        if cut:
            return "truncated", ", ".join(cut)
        epochs = trainer.max_epochs or 0
        steps = epochs * math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if trainer.current_epoch < epochs:
            return "truncated", f"stopped after {trainer.current_epoch} of {plural(epochs, 'epoch')}"
        if trainer.global_step < steps:
            return "truncated", f"stopped after {trainer.global_step} of {plural(steps, 'step')}"
        if self.data.stage == "select" and self.monitor.validated_at != trainer.global_step:
            return "truncated", "val was not scored after the last epoch"
        return "complete", None

    def parameters(self) -> Parameters:
        """Count the parameters; those of an earlier stage alone are not trained ones."""
        trained = counted_parameters(self.model.model)
        head = sum(p.numel() for name, p in trained.items() if name.startswith(HEAD_PREFIXES))
        total = sum(p.numel() for p in self.model.model.parameters())
        trainable = sum(p.numel() for p in trained.values())
        return Parameters(trainable=trainable, head=head, adapter=trainable - head, total=total)

    def scores_of(self, role: str) -> tuple[Metrics, Correct]:
        """Return the scores on the split of a role, test or val, and one bit per image.

        Raises:
            SvpBenchError: If an image was not scored exactly once.
        """
        evaluation, split = self._evaluation(role), self.data.splits[role]
        expected, index = self.data.report.counts[split], evaluation.scores.index
        if not torch.equal(index, torch.arange(expected)):
            raise SvpBenchError(
                f"the {role} split gave {plural(len(index), 'image')}, not each of the {expected} once; please "
                "report this"
            )
        return evaluation.for_record(), Correct.of(evaluation.right, split, self.data.split(role).digest)

    def _evaluation(self, role: str) -> Evaluation:
        evaluation = self.model.tested if role == "test" else self.model.validated
        assert evaluation is not None
        return evaluation

    def write_tables(self, role: str, folder: Path) -> None:
        """Write the confusion matrix, class accuracies and predictions into the run's folder; print the paths."""
        evaluation = self._evaluation(role)
        try:
            confusion, per_class = write_tables(evaluation, self.data.class_names, folder, role)
            names = self.data.split(role).keys()
            images = write_predictions(evaluation, names, self.data.class_names, folder, role)
        except RecordError as error:
            reason = str(error).partition("; ")[0]  # the remedy after it is that of another folder
            rank_zero_warn(f"{reason}; the record is complete, the tables of its predictions are not")
            return
        print(f"Confusion matrix: {confusion}; accuracy of each class: {per_class}", flush=True)
        print(f"Predictions of all images: {images}", flush=True)

    def build_record(self, status: Status, reason: str | None, tested: bool) -> Record:
        """Return the record; `tested`: whether the test split was scored."""
        model, data, resolved = self.model, self.data, self.config
        metrics, correct, val_correct = None, None, None
        if tested:
            metrics, correct = self.scores_of("test")
        elif data.stage == "select" and status == "complete":
            metrics, val_correct = self.scores_of("val")
        looked = data._report is not None  # whether the files were read before an error
        backend = self.scan_backend()
        saved = self.run_dir / CHECKPOINT
        peak = self.monitor.peak_mib
        source = str(model.checkpoint)
        return Record(
            schema=SCHEMA,
            run_id=self.run_id,
            created=timestamp(),
            task=data.card.name,
            task_version=data.card.version,
            suite=data.card.suite,
            kind="final" if data.stage == "final" else "selection",
            status=status,
            status_reason=reason,
            method=resolved.method,
            method_args=model.method.settings(),
            backbone=model.backbone_name,
            checkpoint=source if source in ("hub", "embedded", "none") else Path(source).name,
            checkpoint_digest=None if source == "none" else model.backbone_digest,
            protocol=data.protocol.name,
            protocol_version=data.protocol.version,
            stage=data.stage,
            splits=dict(data.splits),
            data_variant=data.report.variant if looked else "card",
            data_status=data.report.status if looked else "as_card",
            data_notes=list(data.report.notes) if looked else [],
            data_digest=data.report.digest if looked else None,
            manifest_digest=data.report.manifest_digest if looked else None,
            seed=resolved.seed,
            config=resolved.config,
            config_digest=resolved.config_digest,
            setting_digest=resolved.setting_digest,
            search=resolved.search,
            package_version=__version__,
            commit=self.commit,
            dirty=self.dirty,
            libraries=library_versions(),
            scan_backend=backend.name if backend else None,
            scan_reason=backend.reason if backend else None,
            device=device_name(self.trainer.strategy.root_device),
            device_count=self.trainer.world_size,
            precision=str(self.trainer.precision),
            metrics=metrics,
            correct=correct,
            val_correct=val_correct,
            parameters=self.parameters(),
            times={name: round(value, 3) for name, value in self.monitor.seconds.items()},
            epochs=self.monitor.epochs,
            images_per_second=self.monitor.images_per_second,
            peak_memory_mib=peak_memory_mib(self.trainer.strategy.root_device) if peak is None else peak,
            image_notes=dict(data.image_notes) or None,
            content_digests=dict(data.content_digests) or None,
            checkpoint_file=saved.relative_to(resolved.runs_root).as_posix() if saved.is_file() else None,
            method_source=dict(resolved.sources) or None,
            package_digest=package_digest(),
            cpu=cpu_name(),
            card_digests=dict(resolved.card_digests),
            weights_digest=self.watch.scored if status in ("complete", "unscored") else None,
            external_classes=external_classes(self.trainer),
            not_comparable=list(self.watch.reasons) or None,
            checkpoint_load=model.load_report.for_record() if model.load_report else None,
            backbone_family=model.model.family,
            efficiency=efficiency_of(model.model, model.identity()),
            inactive_parameters=model.inactive or None,
            frozen_features={role: found.describe() for role, found in (model.features or {}).items()} or None,
        )
