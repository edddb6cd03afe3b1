"""Show a method the training images before the training, or rebuild from a checkpoint what it built then."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.data.module import VisionDataModule
from svp_bench.methods.base import Method
from svp_bench.methods.checks import check_promises, trained_parameters
from svp_bench.models import Backbone
from svp_bench.train.optim import EMA

_BATCH = 16  # training images that a method gets at a time


class PreparedModule(LightningModule):
    """The part of `AdaptationModule` that calls `Method.prepare` and `Method.restore`."""

    method: Method
    model: Backbone
    init_seed: int
    ema: EMA | None
    _prepared = False  # whether the method saw the training images, or comes from a checkpoint

    def setup(self, stage: str) -> None:
        """Show the method the training images before a training that begins."""
        if stage == "fit" and self.trainer.ckpt_path is None:
            self.prepare_method(self.trainer, getattr(self.trainer, "datamodule", None))

    def prepare_method(self, trainer: Trainer, data: Any) -> None:
        """Show the method the training images, on the device of the training, unless that was done before.

        Args:
            trainer: The trainer.
            data: Its `VisionDataModule`, after `setup`.

        Raises:
            ConfigError: If the method looks at the images, and `data` has none.
        """
        if self._prepared or type(self.method).prepare is Method.prepare:
            return
        if not isinstance(data, VisionDataModule):
            name = type(self.method).__name__
            raise ConfigError(f"the method {name} looks at the training images, which needs a VisionDataModule")
        before = self.model.first_parameter.device
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(self.init_seed)
            try:
                self.model.to(trainer.strategy.root_device)
                self.method.prepare(self.model, _TrainingImages(self, data))
            finally:
                self.model.to(before)
        self._method_changed()

    def restore_method(self, checkpoint: Mapping[str, Any]) -> None:
        """Rebuild from a checkpoint what the method built when it saw the training images; its values load later."""
        tensors = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
        self.method.restore(self.model, tensors)
        self._method_changed()

    def _method_changed(self) -> None:
        self._prepared = True
        check_promises(self.model, self.method)
        trained = trained_parameters(self.model)
        if self.ema is not None and self.ema.shapes != {name: p.shape for name, p in trained.items()}:
            self.ema = EMA(self.ema.decay, trained)


class _TrainingImages:
    """The training images as normalised batches on the device of the model, read again in each iteration."""

    def __init__(self, module: Any, data: VisionDataModule) -> None:
        self.module, self.data = module, data

    def __iter__(self) -> Iterator[Tensor]:
        device = self.module.model.first_parameter.device
        for batch in self.data.without_augmentation(_BATCH):
            images = batch.images.to(self.module.get_buffer("mean").device)
            yield self.module.prepare(images).to(device)
