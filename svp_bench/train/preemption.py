"""Callbacks of resumable runs: save and stop at a signal, and seed each training step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from svp_bench.core.errors import UsageError, plural
from svp_bench.core.interrupts import INTERRUPTS, Preempted
from svp_bench.data.samplers import GlobalBatchSampler


class PreemptionHandler(Callback):
    """Save and stop at the next optimizer step after SIGTERM, SIGHUP or SIGUSR1 (`INTERRUPTS`).

    Args:
        checkpoint: The file to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._skip = 0  # batches of the current epoch that were done before the checkpoint
        self._saving_at = 0
        self._accumulate = self._accumulated = 1  # batches per optimizer step, of this run and of its checkpoint

    def state_dict(self) -> dict[str, Any]:
        """Return the batches done in the current epoch, and the batches per optimizer step."""
        return {"batches": self._saving_at, "accumulate": self._accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue within the epoch of a checkpoint."""
        self._skip, self._accumulated = int(state_dict["batches"]), int(state_dict["accumulate"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delay signals until the end of a step; skip the batches that were done before."""
        self._accumulate = trainer.accumulate_grad_batches
        if self._skip and self._accumulated != self._accumulate:
            raise UsageError(
                f"the checkpoint lies within an epoch and counts {plural(self._accumulated, 'batch')} for a "
                "step: continue with "
                f"--trainer.accumulate_grad_batches {self._accumulated}, not {self._accumulate}"
            )
        INTERRUPTS.waits = True
        INTERRUPTS.take_again()  # Lightning has replaced the handlers
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if self._skip and isinstance(sampler, GlobalBatchSampler):
            sampler.skip(self._skip)
        self._skip = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Save and stop between two optimizer steps after a signal."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._agreed(trainer, pl_module):
            self._saving_at = batch_idx
            trainer.save_checkpoint(self.checkpoint)
            raise Preempted

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop before the test after a signal; --resume then tests."""
        INTERRUPTS.waits = False
        if self._agreed(trainer, pl_module):
            raise Preempted

    def _agreed(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Return whether any process received a signal, so that all stop at the same step."""
        asked = INTERRUPTS.asked is not None
        if trainer.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=pl_module.device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)


class PerStepSeed(Callback):
    """Seed PyTorch before each training step from (seed, epoch, batch, process), so that resuming changes no number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the generators of the CPU and the device."""
        entropy = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))
