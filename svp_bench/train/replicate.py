"""`svp-bench replicate`: training as `fit` does it, with the test list read after every epoch, on purpose.

Papers print the best test epoch; this measures the gain of that. It uses two classes of its own: a data module that
validates on the test split, and a module whose logs name it. `fit` builds `VisionDataModule` itself, whose test loader
does not exist before the weights are final. The output is not a record (`tables.test_peeking`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from svp_bench.config.compose import Composed
from svp_bench.core.errors import SvpBenchError, UsageError, plural
from svp_bench.data.module import Batch, VisionDataModule
from svp_bench.records.store import refuse_unwritable
from svp_bench.tables.test_peeking import Replication, write_replication
from svp_bench.train.metrics import Evaluation
from svp_bench.train.module import AdaptationModule
from svp_bench.train.parser import ResolvedConfig, resolve
from svp_bench.train.run import FitRun, run

__all__ = ["run_replication"]

_TAG = "test_each_epoch"  # of the curves in TensorBoard, in the place of "val"
_NEVER = {"resume": "a replication starts anew", "no_test": "a replication is about nothing but the test list"}


class _LendsTest(VisionDataModule):
    """The data module of stage final whose test list is read after each epoch."""

    def val_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test list."""
        return self._evaluation_loader("test")


class _SaysTest(AdaptationModule):
    """The Lightning module, whose curves of "validation" are called what they are."""

    def _log_scalars(self, role: str, evaluation: Evaluation) -> None:
        super()._log_scalars(_TAG if role == "val" else role, evaluation)

    def _show(self, role: str, evaluation: Evaluation) -> None:
        super()._show(_TAG if role == "val" else role, evaluation)


class _Curve(Callback):
    """Top-1 in percent on the test list after each epoch.

    Attributes:
        top1: One number an epoch.
        count: Images in the list.
        incomplete: Whether the split was not read after some epoch.
    """

    def __init__(self) -> None:
        self.top1: list[float] = []
        self.count = 0
        self.incomplete = False
        self._step: int | None = None  # optimizer steps that were done when the list was last read

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the list was read."""
        if not trainer.sanity_checking:
            self._step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the score of the epoch."""
        evaluation = pl_module.validated
        if not isinstance(evaluation, Evaluation) or self._step != trainer.global_step:
            self.incomplete = True
            return
        metrics = evaluation.for_record()
        self.top1.append(metrics.top1)
        self.count = metrics.count
        pl_module.log(f"{_TAG}/best_top1", max(self.top1) / 100, batch_size=1, sync_dist=True, reduce_fx="max")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the two numbers in TensorBoard."""
        if self.top1:
            numbers = {"replication/best_test": max(self.top1), "replication/final": self.top1[-1]}
            for logger in trainer.loggers:
                logger.log_metrics(numbers, trainer.global_step)


class _ReplicationRun(FitRun):
    """One replication."""

    module_type = _SaysTest
    data_type = _LendsTest
    saved_config = "replication.yaml"
    resumable = False

    def __init__(self, config: ResolvedConfig, watchers: Sequence[Callback] = ()) -> None:
        self.curve = _Curve()
        super().__init__(config, [*watchers, self.curve])

    def prepare(self) -> None:
        """Refuse flags that a replication does not have, then prepare as a fit does."""
        arguments = self.config.arguments
        for flag, why in _NEVER.items():
            if arguments[flag]:
                raise UsageError(f"replicate takes no --{flag}: {why}")
        if arguments.data.stage != "final":
            raise UsageError(
                f"replicate takes no --data.stage {arguments.data.stage}: it reads the test split, which stage final "
                "alone has; settings are selected on val with `svp-bench fit --data.stage select`"
            )
        super().prepare()
        refuse_unwritable(self.config.results_root / "replications", "--results_root")

    def name_run(self) -> None:
        """Put the run's folder below runs/replications."""
        super().name_run()
        self.run_dir = self.config.runs_root / "replications" / self.data.card.name / self.run_id

    def main(self) -> None:
        """Train, reading the test split after each epoch, and write the result."""
        if self.config.arguments.ckpt_path:
            raise UsageError("replicate trains from the start and takes no --ckpt_path")
        self.set_up()
        with self.alone():
            self.announce()
            self._warn()
            self.save_config()
            self.within_memory(lambda: self.trainer.fit(self.model, datamodule=self.data))
            self._write()

    @rank_zero_only
    def _warn(self) -> None:
        print(
            "  The test list is read after every epoch; its best score is no result, and tables refuse it.", flush=True
        )

    @rank_zero_only
    def _write(self) -> None:
        status, reason = self.recorder.outcome()
        curve = self.curve
        if status == "interrupted":
            raise KeyboardInterrupt
        if not curve.top1:
            raise SvpBenchError(f"the test list was never read to its end ({reason}); nothing is written")
        if status == "complete" and curve.incomplete:
            status, reason = "truncated", "the test list was not read after each epoch"
        facts = self.recorder.record("unscored" if status == "complete" else status, reason, tested=False)
        times = {{"val_seconds": "test_seconds"}.get(name, name): value for name, value in facts.times.items()}
        done = Replication(dataclasses.replace(facts, times=times), curve.count, tuple(curve.top1))
        path = write_replication(done, self.config.results_root)
        print(
            f"top-1 on {done.run.splits['test']} ({plural(done.count, 'image')}): {done.final:.2f} % after the "
            "last epoch, "
            f"{done.best_test:.2f} % after the best (epoch {done.best_epoch} of {len(done.test_top1)})\n"
            f"Test-peek tax: picking the epoch on the test list claims {done.tax:.2f} points more\n"
            f"Replication ({status}): {path}\n"
            "Next: svp-bench table (the tax has a page of its own)",
            flush=True,
        )


def run_replication(composed: Composed) -> None:
    """Run one replication.

    Raises:
        SvpBenchError: For everything that a user can fix.
    """
    run(resolve(composed), run_type=_ReplicationRun)
