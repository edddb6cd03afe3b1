"""`svp-bench replicate`: training as `fit` does it, with the test list read after every epoch, on purpose.

Papers print the best test epoch; this measures the gain of that. It uses two classes of its own: a data module that
validates on the test split, and a module whose logs name it. `fit` builds `VisionDataModule` itself, whose test loader
does not exist before the weights are final. The output is not a record (`tables.test_peeking`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch.utils.data import DataLoader

from svp_bench.config.compose import Flags
from svp_bench.core.errors import SvpBenchError, UsageError, plural
from svp_bench.data.module import Batch, VisionDataModule
from svp_bench.records.store import refuse_unwritable
from svp_bench.tables.test_peeking import Replication, write_replication
from svp_bench.train.metrics import Evaluation
from svp_bench.train.module import AdaptationModule
from svp_bench.train.run import BenchCLI, run

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
        holes: Was the list not read after some epoch?
    """

    def __init__(self) -> None:
        self.top1: list[float] = []
        self.count = 0
        self.holes = False
        self._step: int | None = None  # optimizer steps that were done when the list was last read

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the list was read."""
        if not trainer.sanity_checking:
            self._step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the score of the epoch."""
        evaluation = pl_module.validated
        if not isinstance(evaluation, Evaluation) or self._step != trainer.global_step:
            self.holes = True
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


class _ReplicationCLI(BenchCLI):
    """One replication."""

    module_type = _SaysTest
    data_type = _LendsTest
    saved_config = "replication.yaml"
    goes_on = False

    def __init__(self, subcommand: str, flags: Flags, watchers: Sequence[Callback] = ()) -> None:
        self.curve = _Curve()
        super().__init__(subcommand, flags, [*watchers, self.curve])

    def before_instantiate_classes(self) -> None:
        """Refuse what a replication has not, then do as a fit does."""
        config = self.config[self.command]
        for flag, why in _NEVER.items():
            if config.get(flag):
                raise UsageError(f"replicate takes no --{flag}: {why}")
        if config.data.stage != "final":
            raise UsageError(
                f"replicate takes no --data.stage {config.data.stage}: it reads the test list, which stage final alone "
                "has; settings are chosen on val with `svp-bench fit --data.stage select`"
            )
        super().before_instantiate_classes()
        refuse_unwritable(Path(config.results_root) / "replications", "--results_root")

    def _name_run(self, config: Namespace, data: VisionDataModule) -> None:
        super()._name_run(config, data)
        self.run_dir = Path(config.runs_root) / "replications" / data.card.name / self.run_id

    def fit(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Train, reading the test list after each epoch, and write what came out."""
        if kwargs.get("ckpt_path"):
            raise UsageError("replicate trains from the start and takes no --ckpt_path")
        self._need_chosen_weights(model)
        self.recorder.scan_choice()
        model.run_id = self.run_id
        datamodule.trainer = self.trainer
        datamodule.setup("fit")
        with self._alone():
            self._announce()
            self._warn()
            self._save_config()
            self.within_memory(lambda: self.trainer.fit(model, datamodule=datamodule))
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
        if status == "complete" and curve.holes:
            status, reason = "truncated", "the test list was not read after each epoch"
        facts = self.recorder.record("unscored" if status == "complete" else status, reason, tested=False)
        times = {{"val_seconds": "test_seconds"}.get(name, name): value for name, value in facts.times.items()}
        done = Replication(dataclasses.replace(facts, times=times), curve.count, tuple(curve.top1))
        path = write_replication(done, self.config[self.command].results_root)
        print(
            f"top-1 on {done.run.splits['test']} ({plural(done.count, 'image')}): {done.final:.2f} % after the "
            "last epoch, "
            f"{done.best_test:.2f} % after the best (epoch {done.best_epoch} of {len(done.test_top1)})\n"
            f"Test-peek tax: picking the epoch on the test list claims {done.tax:.2f} points more\n"
            f"Replication ({status}): {path}\n"
            "Next: svp-bench table (the tax has a page of its own)",
            flush=True,
        )


def run_replication(flags: Flags) -> None:
    """Run one replication.

    Raises:
        SvpBenchError: For everything that a user can mend.
    """
    run("fit", flags, cli=_ReplicationCLI)
