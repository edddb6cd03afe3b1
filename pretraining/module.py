"""The pre-training objective as a Lightning module: regress the figure from an image with noise and hidden patches."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from pretraining.drawing import CENTRED, GRID, POSE, SIZE
from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import create_backbone

COARSE = 16
PARTS = ("pose", "coarse", "patch", "centred", "spread")  # of the loss, in the order of the log


class TensorBatch(NamedTuple):
    """Tensors of a `drawing.SyntheticBatch`, without the family."""

    images: Tensor
    mask: Tensor
    centred: Tensor
    pose: Tensor
    blanked: Tensor


class Pretraining(LightningModule):
    """Regress the figure of an image from the tokens of a backbone, with linear heads that are discarded afterwards.

    The class token predicts the figure's pose (squared error), its mask at 16×16 and its mask at a common centre and
    scale, invariant to position and size (binary cross entropy). Each patch token predicts the mask of its patch, pixel
    by pixel. In half of the images 30 % of the patches are hidden.

    Args:
        backbone: timm name; it must take 64×64 images in patches of 8.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Of matrices; vectors, biases and Vim's own list take none.
        betas: Of AdamW.
        warmup_steps: Linear warm-up.
        total_steps: Where the cosine reaches `min_learning_rate`.
        min_learning_rate: See there.
        pose_weight: Of the squared error of the pose.
        coarse_weight: Of the mask at 16×16.
        patch_weight: Of the patches' masks.
        centred_weight: Of the centred mask.
        spread_weight: Of a term for class token features of zero mean, unit variance and uncorrelated over
            a batch (the variance and covariance terms of VICReg, Bardes et al., ICLR 2022, arXiv:2105.04906).
        seed: Of the initial weights.

    Raises:
        ConfigError: If the backbone takes other images.
    """

    def __init__(
        self,
        backbone: str = "vim_nano_patch8_64",
        learning_rate: float = 2e-3,
        weight_decay: float = 0.05,
        betas: tuple[float, float] = (0.9, 0.98),
        warmup_steps: int = 200,
        total_steps: int = 1000,
        min_learning_rate: float = 1e-5,
        pose_weight: float = 1.0,
        coarse_weight: float = 5.0,
        patch_weight: float = 3.0,
        centred_weight: float = 5.0,
        spread_weight: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.recipe = (learning_rate, min_learning_rate, warmup_steps, total_steps)
        self.weight_decay = weight_decay
        self.betas = betas
        self.weights = dict(
            zip(PARTS, (pose_weight, coarse_weight, patch_weight, centred_weight, spread_weight), strict=True)
        )
        with torch.random.fork_rng(devices=[]):  # initial weights depend on the seed alone
            torch.manual_seed(seed)
            model: Any = create_backbone(backbone, num_classes=1, checkpoint="none")
            model.reset_classifier(0)  # the heads below read the tokens
            if model.image_size != (SIZE, SIZE) or model.grid_size != (GRID, GRID):
                raise ConfigError(f"{backbone} takes other images than {SIZE}×{SIZE} in {GRID}×{GRID} patches")
            width = model.embed_dim
            self.model = model
            self.whole_head = nn.Linear(width, len(POSE) + COARSE**2 + CENTRED**2)
            self.patch_head = nn.Linear(width, (SIZE // GRID) ** 2)
        cfg: Any = self.model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1) * 255, persistent=False)

    def parts(self, batch: TensorBatch, hide: bool) -> dict[str, Tensor]:
        """Return the parts of the loss, unweighted, by name.

        Args:
            batch: The images.
            hide: Hide the patches in `batch.blanked` (mean colour).
        """
        images = (batch.images - self.get_buffer("mean")) / self.get_buffer("std")
        if hide:
            cell = SIZE // GRID
            hidden = batch.blanked.repeat_interleave(cell, 1).repeat_interleave(cell, 2)
            images = images.masked_fill(hidden[:, None], 0.0)
        tokens, (at,) = self.model.forward_tokens(images)  # one class token
        token = tokens[:, at]
        patches = torch.cat([tokens[:, :at], tokens[:, at + 1 :]], dim=1)
        pose, coarse, centred = self.whole_head(token).split([len(POSE), COARSE**2, CENTRED**2], dim=1)
        mask = batch.mask / 255
        small = F.avg_pool2d(mask[:, None], SIZE // COARSE).flatten(1)
        cells = F.unfold(mask[:, None], SIZE // GRID, stride=SIZE // GRID).mT  # (B, patches, pixels of a patch)
        bce = F.binary_cross_entropy_with_logits
        parts = {
            "pose": F.mse_loss(pose, batch.pose),
            "coarse": bce(coarse, small),
            "patch": bce(self.patch_head(patches), cells),
            "centred": bce(centred, batch.centred.flatten(1) / 255),
        }
        if self.weights["spread"]:
            parts["spread"] = spread_out(token)
        return parts

    def total(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the weighted sum of the parts."""
        return torch.stack([self.weights[name] * value for name, value in parts.items()]).sum()

    def training_step(self, batch: TensorBatch, batch_idx: int) -> dict[str, Tensor]:
        """Return the loss of a batch, and its parts for the log."""
        parts = self.parts(batch, hide=True)
        return {"loss": self.total(parts), **{name: value.detach() for name, value in parts.items()}}

    @torch.no_grad()
    def held_out(self, batch: TensorBatch) -> dict[str, Tensor]:
        """Return the parts of the loss on whole images, and `total`, their weighted sum without `spread`."""
        parts = self.parts(batch, hide=False)
        parts.pop("spread", None)
        return {"total": self.total(parts), **parts}

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return AdamW with linear warm-up, then cosine, by step."""
        peak, last, warmup, total = self.recipe
        excluded = {f"model.{name}" for name in self.model.no_weight_decay()}
        decay = [p for n, p in self.named_parameters() if p.ndim > 1 and n not in excluded]
        others = [p for n, p in self.named_parameters() if p.ndim <= 1 or n in excluded]
        groups = [{"params": decay, "weight_decay": self.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=peak, betas=self.betas)

        def factor(step: int) -> float:
            if step < warmup:
                return (step + 1) / warmup
            done = min(1.0, (step - warmup) / max(1, total - warmup))
            return last / peak + (1 - last / peak) * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def spread_out(token: Tensor) -> Tensor:
    """Return the distance of features (B, D) from zero mean, unit variance and no correlation."""
    mean = token.mean(dim=0)
    centred = token - mean
    covariance = centred.T @ centred / (len(token) - 1)
    return (covariance - torch.eye(len(covariance), device=token.device)).square().sum() / len(covariance) + (
        mean.square().mean()
    )
