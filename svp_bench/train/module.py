"""The Lightning module: one backbone, one method, one recipe."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from svp_bench.data.module import Batch
from svp_bench.data.samplers import GlobalBatchSampler
from svp_bench.errors import CheckpointError, ConfigError, NonFiniteLossError
from svp_bench.methods.base import Method
from svp_bench.methods.build import adapt, create_backbone, trained_parameters
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.ops import Choice, choose

__all__ = ["SAVED_KEY", "AdaptationModule"]

_DTYPES = {"64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}  # of activations, by precision
SAVED_KEY = "svp_bench"  # our key in a Lightning checkpoint


class AdaptationModule(LightningModule):
    """Adapts a backbone to a task with a method, by AdamW with linear warm-up and cosine decay.

    Args:
        method: What is added and what trains.
        backbone: timm name of the backbone.
        checkpoint: Its weights: hub, embedded, none (random), or a path.
        num_classes: Classes of the task; the data module says how many.
        image_size: Height and width of the pictures; the data module says.
        learning_rate: Peak learning rate. It does not change with the batch size or the number of devices.
        weight_decay: Of AdamW; biases, one-dimensional tensors and the backbone's own list take none.
        betas: Of AdamW.
        warmup_epochs: Epochs of linear warm-up, clipped to the run.
        warmup_start_factor: The warm-up starts at this fraction of the learning rate.
        min_learning_rate: Where the cosine ends.
        label_smoothing: Of the cross entropy.
        frozen_mode: eval: dropout and drop path of the frozen backbone are off; train: they are on.
        drop_path: Drop path rate of the backbone.
        scan_backend: auto, or a name of `svp_bench.list_backends()`.
        seed: Of the random initial weights (head, adapter, and the backbone without a checkpoint).

    Raises:
        UsageError: If the backbone or scan backend is unknown.
        ConfigError: If a value does not make sense, or the method does not fit the backbone.
        CheckpointError: If the weights cannot be had or do not fit.
    """

    def __init__(
        self,
        method: Method,
        backbone: str = "vim_small_patch16_224",
        checkpoint: str = "hub",
        num_classes: int = 1000,
        image_size: int = 224,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_epochs: float = 10,
        warmup_start_factor: float = 1e-3,
        min_learning_rate: float = 1e-5,
        label_smoothing: float = 0.0,
        frozen_mode: Literal["eval", "train"] = "eval",
        drop_path: float = 0.0,
        scan_backend: str = "auto",
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check_range("learning_rate", learning_rate, 0, math.inf, open_low=True)
        for name, value in (("weight_decay", weight_decay), ("warmup_epochs", warmup_epochs)):
            _check_range(name, value, 0, math.inf)
        _check_range("min_learning_rate", min_learning_rate, 0, math.inf)
        for name, value in (("label_smoothing", label_smoothing), ("drop_path", drop_path)):
            _check_range(name, value, 0, 1, open_high=True)
        _check_range("warmup_start_factor", warmup_start_factor, 0, 1)
        for beta in betas:
            _check_range("betas", beta, 0, 1, open_high=True)
        _check_settings(method)
        self.method = method
        self.backbone_name = backbone
        self.checkpoint = checkpoint
        self.num_classes = num_classes
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_epochs = warmup_epochs
        self.warmup_start_factor = warmup_start_factor
        self.min_learning_rate = min_learning_rate
        self.label_smoothing = label_smoothing
        self.frozen_mode = frozen_mode
        self.init_seed = seed
        with torch.random.fork_rng(devices=[]):  # initial weights depend on the seed alone
            torch.manual_seed(seed)
            model = create_backbone(
                backbone,
                num_classes=num_classes,
                checkpoint=checkpoint,
                img_size=image_size,
                drop_path_rate=drop_path,
                scan_backend=scan_backend,
            )
            if model.patch_embed.num_patches < 1:
                side = model.patch_embed.patch_size[0]
                raise ConfigError(f"data.image_size {image_size} is smaller than a patch of {backbone} ({side} pixels)")
            self.backbone_digest = backbone_digest(model)
            self.model = adapt(model, method)
        self.strict_loading = False  # our checkpoints hold the trained part only; on_load_checkpoint is strict about it
        cfg: Any = self.model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.train_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_top1 = MulticlassAccuracy(num_classes, average="micro")
        self.val_loss = MeanMetric()
        self.run_id: str | None = None  # of the run that trains this, for its checkpoints
        self.tested: list[tuple[Tensor, Tensor, Tensor]] = []  # (index, right, loss) of each test batch
        self.train()  # Lightning takes the modes as it finds them

    # --- the forward pass --------------------------------------------------------------------------------------------

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 (B, 3, H, W), 0…255 → float, by the backbone's own mean and standard deviation."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images.to(mean.dtype) - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 (B, 3, H, W) → logits (B, classes)."""
        logits: Tensor = self.model(self.normalise(images))
        return logits

    def scan_choice(self, device: torch.device, precision: str) -> Choice:
        """Return the scan backend that runs on a device at a precision ("bf16-mixed", …), and why.

        Raises:
            UnavailableError: If a backend was asked for by name and cannot run there.
        """
        return choose(self.model.scan_backend, device, _DTYPES.get(precision.split("-")[0], torch.float32))

    def train(self, mode: bool = True) -> AdaptationModule:
        """Switch to training mode; frozen parts stay in eval mode unless `frozen_mode` is train."""
        super().train(mode)
        frozen = any(not p.requires_grad for p in self.model.parameters())
        if mode and frozen and self.frozen_mode == "eval":
            self.model.eval()
            for module in (self.model.adapter, self.model.head, self.model.head_drop):
                if module is not None:
                    module.train()
        return self

    # --- steps -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Cross entropy of one batch."""
        logits = self(batch.images)
        loss = F.cross_entropy(logits.float(), batch.labels, label_smoothing=self.label_smoothing)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, step {self.global_step}; try a "
                "smaller --model.learning_rate, or --trainer.precision 32-true"
            )
        self.train_top1(logits.detach(), batch.labels)
        size = len(batch.labels)
        self.log("train/loss", loss.detach(), batch_size=size, prog_bar=True)
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True, batch_size=size, prog_bar=True)
        # exact where an uneven last batch is spread over processes or accumulated: the mean over all its pictures
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)  # Lightning's own under overfit_batches
        return loss * sampler.loss_scale(batch_idx) if isinstance(sampler, GlobalBatchSampler) else loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Top-1 accuracy and loss on val."""
        logits = self(batch.images).float()
        self.val_top1(logits, batch.labels)
        self.val_loss(F.cross_entropy(logits, batch.labels, reduction="none"))
        self.log("val/top1", self.val_top1, batch_size=len(batch.labels), prog_bar=True)
        self.log("val/loss", self.val_loss, batch_size=len(batch.labels))

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self.tested = []

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Keep which pictures are right: the record stores one bit for each."""
        logits = self(batch.images).float()
        right = logits.argmax(dim=-1) == batch.labels
        loss = F.cross_entropy(logits, batch.labels, reduction="none")
        self.tested.append((batch.index.cpu(), right.cpu(), loss.cpu().double()))

    def on_test_epoch_end(self) -> None:
        """Bring the pictures of all processes together, in the order of the list."""
        parts = self.tested
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        index, right, loss = (torch.cat(column) for column in zip(*parts, strict=True))
        order = index.argsort()
        if not torch.isfinite(loss).all():
            raise NonFiniteLossError("the loss on the test list is not finite: the trained weights are of no use")
        self.tested = [(index[order], right[order], loss[order])]
        self.log("test/top1", right.double().mean().float(), rank_zero_only=True)
        self.log("test/loss", loss.mean().float(), rank_zero_only=True)

    # --- the recipe --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW with the usual exclusions from weight decay; linear warm-up, then cosine, step by step."""
        spared = self.model.no_weight_decay()
        decay: list[torch.nn.Parameter] = []
        no_decay: list[torch.nn.Parameter] = []
        for name, parameter in trained_parameters(self.model).items():
            exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in spared
            (no_decay if exempt else decay).append(parameter)
        groups = [
            {"params": decay, "weight_decay": self.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.learning_rate, betas=self.betas)
        total = int(self.trainer.estimated_stepping_batches)
        epochs = self.trainer.max_epochs or 1
        warmup = round(total * self.warmup_epochs / epochs) if epochs > 0 else 0
        if warmup > total:
            rank_zero_info(
                f"The warm-up of {self.warmup_epochs:g} epochs is longer than the run of {epochs}: clipped to the run."
            )
            warmup = total
        factor = _Schedule(warmup, total, self.warmup_start_factor, self.min_learning_rate / self.learning_rate)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # --- checkpoints: the trained part only, checked strictly --------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained part, and what it takes to build the rest."""
        trained = {f"model.{name}" for name in trained_parameters(self.model)}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in trained}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        about = {**self.identity(), "task": data.card.name, "protocol": data.protocol.name}
        checkpoint[SAVED_KEY] = {**about, "stage": data.stage, "run_id": self.run_id}

    def identity(self) -> dict[str, Any]:
        """Return what a checkpoint of the trained part belongs to, as plain values."""
        return {
            "backbone": self.backbone_name,
            "backbone_digest": self.backbone_digest,
            "checkpoint": str(self.checkpoint),
            "init_seed": self.init_seed,
            "method": f"{type(self.method).__module__}.{type(self.method).__qualname__}",
            "method_args": self.method.settings(),
            "num_classes": self.num_classes,
            "image_size": list(self.model.patch_embed.img_size),
        }

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that the file is of this backbone and method, and holds exactly the trained part.

        Raises:
            CheckpointError: If not; says what differs.
        """
        theirs, ours = checkpoint.get(SAVED_KEY), self.identity()
        if not isinstance(theirs, Mapping):
            raise CheckpointError("the file is no svp-bench checkpoint; backbone weights go to --model.checkpoint PATH")
        for key in ("backbone", "backbone_digest", "method", "method_args", "num_classes", "image_size"):
            if theirs.get(key) != ours[key]:
                raise CheckpointError(
                    f"the checkpoint was trained with {key} = {theirs.get(key)!r}, this run has {ours[key]!r}; "
                    "use the config.yaml beside it"
                )
        expected = {f"model.{name}": p.shape for name, p in trained_parameters(self.model).items()}
        found = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if expected != found:
            odd = sorted(set(expected) ^ set(found)) or [k for k in expected if expected[k] != found[k]]
            raise CheckpointError(f"the checkpoint does not hold exactly the trained part; first difference: {odd[0]}")


class _Schedule:
    """Factor of the learning rate at each step: linear warm-up, then cosine to `floor`."""

    def __init__(self, warmup: int, total: int, start: float, floor: float) -> None:
        self.warmup, self.total, self.start, self.floor = warmup, total, start, min(floor, 1.0)

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return self.start + (1 - self.start) * step / self.warmup
        progress = min(1.0, (step - self.warmup) / max(1, self.total - self.warmup))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


def _check_range(
    name: str, value: float, low: float, high: float, *, open_low: bool = False, open_high: bool = False
) -> None:
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if not inside or not math.isfinite(value):
        right = ")" if open_high or high == math.inf else "]"
        bounds = f"{'(' if open_low else '['}{low:g}, {'∞' if high == math.inf else f'{high:g}'}{right}"
        raise ConfigError(f"model.{name} must be in {bounds}, not {value}")


def _check_settings(method: Method) -> None:
    """Records and checkpoints hold a method's settings: find out now that they can, not after the training."""
    name = type(method).__name__
    try:
        json.dumps(method.settings(), allow_nan=False)
    except AttributeError as error:
        raise ConfigError(f"{name}: keep each constructor argument as an attribute of its name ({error})") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: its settings must be plain numbers, texts, lists and mappings ({error})") from None
