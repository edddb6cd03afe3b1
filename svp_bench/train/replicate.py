"""`svp-bench replicate`: train as `fit` does, but score the test split after every epoch.

Some papers report the best test epoch; this measures the gain of that. The output is not a record
(`records.replication`). `fit` cannot do this: the test loader of its data module exists after the training only.
"""

from __future__ import annotations

import dataclasses

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch.utils.data import DataLoader

from svp_bench.core.errors import SvpBenchError, UsageError, plural
from svp_bench.data.loading import Batch
from svp_bench.data.module import VisionDataModule
from svp_bench.records.record import Metrics
from svp_bench.records.replication import Curve, Replication, write_replication
from svp_bench.records.store import refuse_unwritable
from svp_bench.train.metrics import Evaluation
from svp_bench.train.module import AdaptationModule
from svp_bench.train.run import FitRun

_TAG = "test_each_epoch"  # name of the curves in TensorBoard, instead of "val"
_NEVER = {
    "resume": "a replication cannot be continued",
    "no_test": "a replication scores the test split",
    "ckpt_path": "a replication trains from the start",
}


class _TestEachEpochData(VisionDataModule):
    """A data module that validates on the test split."""

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test split."""
        return self._evaluation_loader("test")


class _TestEachEpochModule(AdaptationModule):
    """A Lightning module that logs validation scores as those of the test split."""

    def _log_scalars(self, role: str, evaluation: Evaluation) -> None:
        super()._log_scalars(_TAG if role == "val" else role, evaluation)

    def _show(self, role: str, evaluation: Evaluation) -> None:
        super()._show(_TAG if role == "val" else role, evaluation)


class ReplicationRun(FitRun):
    """Train, and score the test split after every epoch."""

    module_type = _TestEachEpochModule
    data_type = _TestEachEpochData
    saved_config = "replication.yaml"
    resumable = False

    def prepare(self) -> None:
        """Refuse flags that a replication does not take, then prepare as `fit` does."""
        self.scores: list[Metrics] = []
        self.incomplete = False
        self.watchers = [*self.watchers, LambdaCallback(on_train_epoch_end=self._collect)]
        arguments = self.config.arguments
        for flag, why in _NEVER.items():
            if arguments[flag]:
                raise UsageError(f"replicate takes no --{flag}: {why}")
        if arguments.data.stage != "final":
            raise UsageError(f"replicate takes no --data.stage {arguments.data.stage}: only final has a test split")
        super().prepare()
        refuse_unwritable(self.config.results_root / "replications", "--results_root")

    def name_run(self) -> None:
        """Set the run's folder below runs/replications."""
        super().name_run()
        self.run_dir = self.config.runs_root / "replications" / self.data.card.name / self.run_id

    def main(self) -> None:
        """Train, score the test split after each epoch, and write the result."""
        self.set_up()
        with self.run_lock():
            self.announce()
            rank_zero_info("Note: the test split is read after every epoch; tables refuse the best score")
            self.save_config()
            self.within_memory(lambda: self.trainer.fit(self.model, datamodule=self.data))
            self._write()

    def _collect(self, trainer: Trainer, model: LightningModule) -> None:
        """Collect the scores of an epoch."""
        evaluation = self.model.validated
        if evaluation is not None and self.monitor.validated_at == trainer.global_step:
            self.scores.append(evaluation.for_record())
        else:
            self.incomplete = True

    @rank_zero_only
    def _write(self) -> None:
        status, reason = self.outcome()
        scores = self.scores
        if status == "interrupted":
            raise KeyboardInterrupt
        if not scores:
            raise SvpBenchError(f"the test split was never read to its end ({reason}); nothing is written")
        if status == "complete" and self.incomplete:
            status, reason = "truncated", "the test split was not read after each epoch"
        facts = self.build_record("unscored" if status == "complete" else status, reason, tested=False)
        times = {{"val_seconds": "test_seconds"}.get(name, name): value for name, value in facts.times.items()}
        curve = Curve(scores[0].count, tuple(found.top1 for found in scores))
        done = Replication(dataclasses.replace(facts, times=times), curve)
        path = write_replication(done, self.config.results_root)
        print(
            f"top-1 on {facts.splits['test']} ({plural(curve.count, 'image')}): {done.final:.2f} % after the last "
            f"epoch, {done.best_test:.2f} % after the best (epoch {done.best_epoch} of {len(scores)})\n"
            f"Test-peek tax: picking the epoch on the test split claims {done.tax:.2f} points more\n"
            f"Replication ({status}): {path}\n"
            "Next: svp-bench table (it also prints the tax)",
            flush=True,
        )
