"""Methods that train in several stages: what rests in a stage, its beginning, and the check of its gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn

from svp_bench.core.errors import ConfigError, plural
from svp_bench.methods.base import Method
from svp_bench.methods.checks import trained_parameters
from svp_bench.models import Backbone

_GRADIENT_STEP = 2  # optimizer steps before the gradients are checked


class Stages:
    """The stages of a training.

    The optimizer holds the parameters of all stages, and all keep `requires_grad`: checkpoints, averages and processes
    see the same tensors in each stage. What rests has no gradient at the optimizer's step, so that neither momentum nor
    weight decay moves it.

    Attributes:
        resting: Parameters that do not train in this stage, by name.
        began: Whether the method may have changed weights after the last optimizer step, at the start of an epoch.
    """

    def __init__(self, method: Method, model: Backbone) -> None:
        self.method, self.model = method, model
        self.resting: dict[str, nn.Parameter] = {}
        self.began = False
        self._first_epoch = 0  # of this stage
        self._changes = method.stages > 1 or type(method).start_epoch is not Method.start_epoch

    def check(self, trainer: Trainer) -> None:
        """Check that a training has all stages.

        Raises:
            ConfigError: If it has too few epochs, or a callback averages weights over the stages.
        """
        stages, epochs, name = self.method.stages, trainer.max_epochs or 0, type(self.method).__name__
        if stages == 1:
            return
        if epochs < stages or [self.method.stage(at, epochs) for at in (0, epochs - 1)] != [0, stages - 1]:
            raise ConfigError(
                f"{name} trains in {stages} stages, which trainer.max_epochs {epochs} has no place for; give at least "
                f"{plural(stages, 'epoch')}"
            )
        if any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            raise ConfigError(
                f"{name} trains in {stages} stages, which a callback must not average; set model.ema.decay"
            )

    def enter(self, trainer: Trainer) -> None:
        """Find the stage of the current epoch."""
        epoch, epochs = trainer.current_epoch, trainer.max_epochs or 1
        stage = self.method.stage(epoch, epochs)
        trained = trained_parameters(self.model)
        self.resting = {name: p for name, p in trained.items() if not self.method.trains_in_stage(name, stage)}
        self._first_epoch = next(at for at in range(epoch + 1) if self.method.stage(at, epochs) == stage)
        self.began = self._changes

    def start_epoch(self, trainer: Trainer) -> bool:
        """Call the method before an epoch; return whether a stage after the first begins.

        The optimizer then begins anew, but for the learning rate.
        """
        epoch, epochs, stage = trainer.current_epoch, trainer.max_epochs or 1, self.method.stage
        self.method.start_epoch(self.model, epoch, epochs)
        self.enter(trainer)
        begins = epoch > 0 and stage(epoch, epochs) != stage(epoch - 1, epochs)
        if begins:
            for optimizer in trainer.optimizers:
                optimizer.state.clear()
        return begins

    @contextmanager
    def forward(self, trainer: Trainer) -> Iterator[None]:
        """Compute no gradients of what rests, for the forward pass within.

        Several processes wait for the gradients of all parameters, and a checkpointed block is computed again in the
        backward pass, as in the forward pass: there, they are computed, and `before_step` takes them.
        """
        rests = [] if trainer.world_size > 1 or self.model.grad_checkpointing else [*self.resting.values()]
        try:
            for parameter in rests:
                parameter.requires_grad_(False)
            yield
        finally:
            for parameter in rests:
                parameter.requires_grad_(True)

    def before_step(self, trainer: Trainer) -> list[str]:
        """Take the gradients of what rests; report trained tensors without one at the third step of a stage, by name.

        Zero-initialised factors give others a zero gradient in the first step, and with a warm-up from zero in the
        second.
        """
        self.began = False
        for parameter in self.resting.values():
            parameter.grad = None
        self.method.before_step(self.model)
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        if trainer.global_step != self._first_epoch * steps + _GRADIENT_STEP:
            return []
        trained = {name: p for name, p in trained_parameters(self.model).items() if name not in self.resting}
        inactive = [name for name, p in trained.items() if p.grad is None or not p.grad.any()]
        if inactive:
            shown = ", ".join(inactive[:4]) + (" …" if len(inactive) > 4 else "")
            where = f" from epoch {self._first_epoch} on" if self._first_epoch else ""
            rank_zero_warn(
                f"{plural(len(inactive), 'trained tensor')} of {len(trained)} got no gradient in optimizer step "
                f"{_GRADIENT_STEP + 1}{where}: {shown}. They have no effect on the loss so far"
            )
        return inactive
