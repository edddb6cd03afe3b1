"""The Lightning module: one backbone, one method, one recipe."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from svp_bench.core.errors import CheckpointError, ConfigError, NonFiniteLossError, UsageError
from svp_bench.core.ranges import check_one_of, check_range
from svp_bench.data.augment import draw_mix, erase, mix, soft_targets
from svp_bench.data.decode import Depth
from svp_bench.data.loading import Batch
from svp_bench.data.samplers import GlobalBatchSampler
from svp_bench.methods.base import Method
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.models import Backbone
from svp_bench.models.checkpoints import Head, backbone_digest
from svp_bench.models.layers import hidden_head, simam
from svp_bench.ops import BackendChoice, choose
from svp_bench.records.defaults import clipped_warmup
from svp_bench.train.checkpoint import METADATA_KEY, Checkpoint, CheckpointMetadata
from svp_bench.train.features import FrozenFeatures, compute_features
from svp_bench.train.metrics import (
    Evaluation,
    ImageScores,
    confusion_image,
    evaluate,
    in_order,
    per_class_markdown,
    score_images,
)
from svp_bench.train.optim import (
    EMA,
    EMAConfig,
    OptimizerConfig,
    Schedule,
    ScheduleConfig,
    make_optimizer,
    warmup_notice,
)
from svp_bench.train.preparation import PreparedModule
from svp_bench.train.stages import Stages

_DTYPES = {"64": torch.float64, "bf16": torch.bfloat16, "16": torch.float16}  # of activations, by precision


class AdaptationModule(PreparedModule):
    """Adapts a backbone to a task with a method, by AdamW or SGD with linear warm-up and cosine decay.

    Args:
        method: Adds and selects the parameters that train.
        backbone: timm name of the backbone.
        checkpoint: Its weights: hub, embedded, none (random), or a path.
        num_classes: Classes of the task; set by the data module.
        image_size: Height and width of the images; set by the data module.
        learning_rate: Peak learning rate. It does not change with the batch size or the number of devices.
        weight_decay: Of the optimizer. Biases, one-dimensional tensors and the backbone's own list take none; tables of
            scales (SVP's alpha and beta, groups or blocks × width) are two-dimensional and take it, as released.
        warmup_epochs: Epochs of linear warm-up, clipped to the run. On the command line, a value of a recipe made for
            another number of epochs is clipped to a fifth of the run.
        label_smoothing: Of the cross entropy.
        head: fresh: a new head; keep: the head of the checkpoint, which must have as many classes.
        head_hidden: Width of a first linear layer of the head, without an activation after it; null for none.
        input_attention: simam: SimAM on the normalised image; null for none.
        frozen_mode: eval: dropout and drop path of the frozen backbone are off; train: they are on.
        drop_path: Drop path rate of the backbone.
        scan_backend: auto, or a name of `svp_bench.list_backends()`.
        grad_checkpointing: Keep the input of each layer alone and compute the layer again in the backward pass: less
            memory, the same numbers, about a third more time.
        cache_features: auto: compute the frozen part of the forward pass once per image, where that is exact (no
            augmentation, nothing random in the frozen blocks): the same numbers, up to rounding, in less time; true:
            warn where it is not; false: never.
        compile: Let torch.compile fuse what lies between the scan and the convolution. The first step takes minutes.
        seed: Of the random initial weights (head, adapter, and the backbone without a checkpoint).
        optimizer: Settings of the optimizer.
        schedule: Settings of the learning rate's schedule.
        ema: Settings of the moving average of the trained weights.

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
        image_size: int | tuple[int, int] = 224,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-4,
        warmup_epochs: float = 10.0,
        label_smoothing: float = 0.0,
        head: Head = "fresh",
        head_hidden: int | None = None,
        input_attention: Literal["simam"] | None = None,
        frozen_mode: Literal["eval", "train"] = "eval",
        drop_path: float = 0.0,
        scan_backend: str = "auto",
        grad_checkpointing: bool = False,
        cache_features: bool | Literal["auto"] = "auto",
        compile: bool = False,  # named as torch's
        seed: int = 0,
        optimizer: OptimizerConfig = OptimizerConfig(),
        schedule: ScheduleConfig = ScheduleConfig(),
        ema: EMAConfig = EMAConfig(),
    ) -> None:
        super().__init__()
        self.method = method
        self.backbone_name, self.checkpoint, self.num_classes, self.init_seed = backbone, checkpoint, num_classes, seed
        self.learning_rate = check_range("model.learning_rate", learning_rate, "(0, inf)")
        self.weight_decay = check_range("model.weight_decay", weight_decay, "[0, inf)")
        self.warmup_epochs = check_range("model.warmup_epochs", warmup_epochs, "[0, inf)")
        self.label_smoothing = check_range("model.label_smoothing", label_smoothing, "[0, 1)")
        check_range("model.drop_path", drop_path, "[0, 1)")
        self.frozen_mode = frozen_mode
        self.head_hidden, self.input_attention = _head(head, head_hidden), input_attention
        check_one_of("model.input_attention", input_attention, ("simam",))
        self.optimizer_config, self.schedule_config, self.ema_config = optimizer, schedule, ema
        _check_settings(method)
        sizes: Any = {"num_classes": num_classes, "img_size": image_size}
        self.model = self._build(head, {**sizes, "drop_path_rate": drop_path, "scan_backend": scan_backend})
        self.model.set_grad_checkpointing(grad_checkpointing)
        self.cache_features = cache_features
        self.features: dict[str, FrozenFeatures] | None = None  # by role; None before the first epoch
        if compile:
            self.model.compile(dynamic=False)  # in place: the names of the parameters stay
        self.ema = EMA(ema.decay, trained_parameters(self.model)) if ema.decay is not None else None
        self.stages = Stages(method, self.model)
        self.strict_loading = False  # our checkpoints hold the trained part only; on_load_checkpoint is strict about it
        cfg: Any = self.model.pretrained_cfg
        self.register_buffer("mean", torch.tensor(cfg["mean"]).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(cfg["std"]).view(1, 3, 1, 1) * 255, persistent=False)
        # unchecked: the labels were, when they were read; and a task may have one class, which torchmetrics refuses
        self.train_top1 = MulticlassAccuracy(max(2, num_classes), average="micro", validate_args=False)
        self.inactive: list[str] = []  # trained tensors without a gradient after the second step of a stage
        self.schedule: Schedule | None = None  # of the learning rate; there once training begins
        self.run_id: str | None = None  # of the run that trains this, for its checkpoints
        self.validated: Evaluation | None = None  # the last validation, of all processes; none before training
        self.tested: Evaluation | None = None
        self._scored: list[ImageScores] = []  # the batches of the current evaluation in this process
        self.train()  # Lightning takes the modes as it finds them

    def _build(self, head: Head, arguments: dict[str, Any]) -> Backbone:
        """Build the adapted backbone; its initial weights depend on the seed alone."""
        with torch.random.fork_rng(devices=[]):
            model = initial_backbone(self.backbone_name, self.checkpoint, head, self.init_seed, **arguments)
            self.load_report = model.load_report
            self.backbone_digest = backbone_digest(model)
            if self.head_hidden is not None:
                head_module = hidden_head(model.head_hidden_size, self.head_hidden, model.num_classes)
                model.head = head_module.to(model.first_parameter)
            return adapt(model, self.method)

    # --- the forward pass --------------------------------------------------------------------------------------------

    def normalise(self, images: Tensor) -> Tensor:
        """Uint8 (B, 3, H, W), 0…255 → float, by the backbone's own mean and standard deviation."""
        mean, std = self.get_buffer("mean"), self.get_buffer("std")
        return (images.to(mean.dtype) - mean) / std

    def forward(self, images: Tensor) -> Tensor:
        """Uint8 (B, 3, H, W) → logits (B, classes)."""
        return self._logits(self.prepare(images))

    def prepare(self, images: Tensor) -> Tensor:
        """Return the input of the backbone, float (B, 3, H, W), for uint8 images (B, 3, H, W)."""
        return self._attend(self.normalise(images))

    def _attend(self, images: Tensor) -> Tensor:
        return images if self.input_attention is None else simam(images)

    def _logits(self, images: Tensor) -> Tensor:
        """Input of the backbone, float (B, 3, H, W) → logits (B, classes)."""
        if self.ema is not None and self.ema_config.evaluate and not self.training:
            trained = trained_parameters(self.model)
            averaged = {name: weight.to(trained[name]) for name, weight in self.ema.weights.items()}
            logits: Tensor = torch.func.functional_call(self.model, averaged, (images,))
        else:
            logits = self.model(images)
        return logits

    def scan_decision(self, device: torch.device, precision: str) -> BackendChoice | None:
        """Return the scan backend that runs on a device at a precision ("bf16-mixed", …), and why; None without scan.

        Raises:
            UnavailableError: If a backend was asked for by name and cannot run there.
        """
        if self.model.scan_backend is None:
            return None
        return choose(self.model.scan_backend, device, _DTYPES.get(precision.split("-")[0], torch.float32))

    def train(self, mode: bool = True) -> AdaptationModule:
        """Switch to training mode; frozen parts stay in eval mode unless `frozen_mode` is train."""
        super().train(mode)
        frozen = self.stages.resting or any(not p.requires_grad for p in self.model.parameters())
        if mode and frozen and self.frozen_mode == "eval":
            self.model.eval()
            parts = (self.model.adapter, self.model.head, self.model.head_drop, getattr(self.model, "head_dist", None))
            for module in (part for part in parts if part is not None):
                module.train()
        return self

    # --- steps -------------------------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Forget the features of another training.

        Raises:
            ConfigError: If the epochs have no place for the method's stages, or a callback averages over them.
        """
        self.features = None
        self.stages.check(self.trainer)

    def on_train_start(self) -> None:
        """Find the stage of the method, also in the middle of an epoch."""
        self.stages.enter(self.trainer)
        if self.method.stages > 1:
            self.train()

    def on_train_epoch_start(self) -> None:
        """Prepare the method; compute the output of the frozen part for each image, before the first epoch."""
        if self.stages.start_epoch(self.trainer) and self.ema is not None:
            self.ema = EMA(self.ema.decay, trained_parameters(self.model))
        if self.method.stages > 1:
            self.train()
        if self.features is None:
            self.features = compute_features(self)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross entropy of a batch after the augmentation on the device: random erasing, mixup, cutmix.

        The accuracy that is logged is against each image's own class, also where it is mixed with another.
        """
        with self.stages.forward(self.trainer):
            if self.features and "train" in self.features:
                logits, targets = self.features["train"].logits(self.model, batch.index), batch.labels
            else:
                images, targets = self._perturbed(batch, batch_idx)
                logits = self._logits(self._attend(images))
        loss = F.cross_entropy(logits.float(), targets, label_smoothing=self.label_smoothing)
        if not torch.isfinite(loss):
            raise NonFiniteLossError(
                f"the training loss became {loss.item()} in epoch {self.current_epoch}, step {self.global_step}; try a "
                "smaller --model.learning_rate, or --trainer.precision 32-true"
            )
        self.train_top1(logits.detach(), batch.labels)
        size = len(batch.labels)
        self.log("train/loss", loss.detach(), batch_size=size, prog_bar=True)
        self.log("train/top1", self.train_top1, on_step=False, on_epoch=True, batch_size=size, prog_bar=True)
        # exact where an uneven last batch is spread over processes or accumulated: the mean over all its images
        sampler = getattr(self.trainer.train_dataloader, "sampler", None)  # Lightning's own under overfit_batches
        return loss * sampler.loss_scale(batch_idx) if isinstance(sampler, GlobalBatchSampler) else loss

    def _perturbed(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Return normalised images (B, 3, H, W) and targets: labels (B,), or (B, classes) where images are mixed.

        All draws follow from (seed, epoch, image) or (seed, epoch, step): no process or resumed run changes them.
        """
        images = self.normalise(batch.images)
        data: Any = getattr(self.trainer, "datamodule", None)
        if data is None or not (data.augment.random_erasing or data.augment.mixes):
            return images, batch.labels
        epoch, augment = self.current_epoch, data.augment
        if augment.random_erasing:
            sampler = getattr(self.trainer.train_dataloader, "sampler", None)
            copies = sampler.copies(batch_idx) if isinstance(sampler, GlobalBatchSampler) else None
            images = erase(images, augment.random_erasing, data.seed, epoch, batch.index.tolist(), copies)
        if not augment.mixes:
            return images, batch.labels
        step = batch_idx // self.trainer.accumulate_grad_batches
        parameters = draw_mix(augment, data.seed, epoch, step, images.shape[2], images.shape[3])
        return mix(images, parameters), soft_targets(batch.labels, self.num_classes, parameters)

    # --- evaluation --------------------------------------------------------------------------------------------------

    def on_validation_epoch_start(self) -> None:
        """Forget the images of an earlier validation."""
        self._scored = []

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Score each image of a batch of val."""
        known = (self.features or {}).get("val") if self.trainer.state.fn == TrainerFn.FITTING else None
        logits = self(batch.images) if known is None else known.logits(self.model, batch.index)
        self._scored.append(score_images(logits.float(), batch.labels, batch.index))

    def on_validation_epoch_end(self) -> None:
        """Log validation metrics; log nothing if the split is empty.

        Raises:
            NonFiniteLossError: If an image's loss is not finite.
        """
        evaluation = self._evaluation("val")
        if evaluation is None or self.trainer.sanity_checking:
            return
        self.validated = evaluation
        self._log_scalars("val", evaluation)
        if self.trainer.state.fn == TrainerFn.VALIDATING:  # no training will end
            self._show("val", evaluation)

    def on_train_end(self) -> None:
        """Show the last validation in TensorBoard."""
        if self.validated is not None:
            self._show("val", self.validated)

    def on_test_epoch_start(self) -> None:
        """Forget an earlier test."""
        self._scored, self.tested = [], None

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Score each image of a batch of the test list."""
        self._scored.append(score_images(self(batch.images).float(), batch.labels, batch.index))

    def on_test_epoch_end(self) -> None:
        """Log the numbers of the test list, and show the confusions in TensorBoard.

        Raises:
            NonFiniteLossError: If an image's loss is not finite.
        """
        self.tested = self._evaluation("test")
        if self.tested is None:
            return
        self._log_scalars("test", self.tested)
        self._show("test", self.tested)

    def _evaluation(self, role: str) -> Evaluation | None:
        """Bring the images of all processes together, in the order of the list; None if there are none."""
        parts, self._scored = self._scored, []
        if self.trainer.world_size > 1:
            gathered: list[Any] = [None] * self.trainer.world_size
            torch.distributed.all_gather_object(gathered, parts)
            parts = [part for rank in gathered for part in rank]
        if not parts:
            return None
        scores = in_order(parts)
        if not torch.isfinite(scores.loss).all():
            raise NonFiniteLossError(f"the loss on the {role} list is not finite: the trained weights are of no use")
        return evaluate(scores, self.num_classes)

    def _log_scalars(self, role: str, evaluation: Evaluation) -> None:
        for name, value in evaluation.scalars().items():
            # all processes have the same value, and callbacks may watch it on each: the largest is exact, a mean is not
            self.log(f"{role}/{name}", value, prog_bar=name == "top1", sync_dist=True, reduce_fx="max")

    def _show(self, role: str, evaluation: Evaluation) -> None:
        """Put the confusion matrix and the accuracy of each class into TensorBoard, if that is logged to."""
        if not self.trainer.is_global_zero:
            return
        names = self.trainer.datamodule.class_names  # type: ignore[attr-defined]
        for logger in self.loggers:
            if isinstance(logger, TensorBoardLogger):
                image = confusion_image(evaluation.confusion, names)
                step = self.trainer.global_step
                logger.experiment.add_image(f"{role}/confusion", image, step, dataformats="HWC")
                logger.experiment.add_text(f"{role}/per_class", per_class_markdown(evaluation, names), step)

    # --- the recipe --------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW or SGD with the usual exclusions from weight decay; linear warm-up, then cosine.

        Raises:
            ConfigError: If the cooldown leaves no epoch for the cosine.
        """
        excluded = self.model.no_weight_decay()
        decay: list[torch.nn.Parameter] = []
        no_decay: list[torch.nn.Parameter] = []
        for name, parameter in trained_parameters(self.model).items():
            # tables of scales (groups or blocks × width) are two-dimensional and so take the decay, as in SVP's code
            exempt = parameter.ndim <= 1 or name.endswith(".bias") or name in excluded or not self.method.decays(name)
            (no_decay if exempt else decay).append(parameter)
        groups = [
            {"params": decay, "weight_decay": self.weight_decay},
            {"params": no_decay, "weight_decay": 0.0},
        ]
        optimizer = make_optimizer([g for g in groups if g["params"]], self.optimizer_config, self.learning_rate)
        epochs, steps = self.trainer.max_epochs or 1, int(self.trainer.estimated_stepping_batches)
        clipped = clipped_warmup(self.warmup_epochs, epochs)
        if clipped != self.warmup_epochs:
            rank_zero_info(warmup_notice(self.warmup_epochs, epochs, clipped))
        config = self.schedule_config
        self.schedule = config.build(self.learning_rate, self.warmup_epochs, epochs, steps)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": config.interval}}

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        """Take the gradients of what rests in this stage; report trained tensors without one at its third step."""
        self.inactive = list(dict.fromkeys([*self.inactive, *self.stages.before_step(self.trainer)]))

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Any,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Do one optimizer step, and take the new weights into their average."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if self.ema is not None:
            self.ema.update(trained_parameters(self.model))

    # --- checkpoints: the trained part only, checked strictly --------------------------------------------------------

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the trained part, and the settings that the rest is built from."""
        trained = self.trained_names()
        for part in ("state_dict", "current_model_state"):  # the second is Lightning's, where a callback averages
            if part in checkpoint:
                checkpoint[part] = {k: v for k, v in checkpoint[part].items() if k in trained}
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        transform = data.eval_transform
        checkpoint[METADATA_KEY] = {
            **self.identity(),
            "task": data.card.name,
            "protocol": data.protocol.name,
            "stage": data.stage,
            "run_id": self.run_id,
            "data_digest": data.report.digest,  # a resumed run needs the same splits
            "transform": {
                "resize": transform.resize,
                "crop_ratio": transform.crop_ratio,
                "interpolation": transform.interpolation,
                **({} if data.depth == Depth() else {"depth": [data.depth.whole, data.depth.real]}),
            },
            "class_names": list(data.class_names),
            "inactive_parameters": self.inactive,
        }
        if self.ema is not None:
            checkpoint["ema"] = self.ema.weights

    def trained_names(self) -> set[str]:
        """Return the names of the tensors that a checkpoint holds: trained parameters, and buffers that may change."""
        frozen = {f"model.{name}" for name, p in self.model.named_parameters() if not p.requires_grad}
        return {name for name in self.state_dict() if name.startswith("model.") and name not in frozen}

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """Return the weights as a checkpoint holds them, by its parts: `state_dict`, and `ema` if there is an average.

        They share memory with the model.
        """
        names = self.trained_names()
        parts = {"state_dict": {name: value for name, value in self.state_dict().items() if name in names}}
        return parts if self.ema is None else {**parts, "ema": self.ema.weights}

    def identity(self) -> dict[str, Any]:
        """Return backbone, method and sizes as plain values; a checkpoint of the trained part fits these only."""
        return {
            "backbone": self.backbone_name,
            "backbone_digest": self.backbone_digest,
            "checkpoint": str(self.checkpoint),
            "init_seed": self.init_seed,
            "method": f"{type(self.method).__module__}.{type(self.method).__qualname__}",
            "method_args": self.method.settings(),
            "num_classes": self.num_classes,
            "image_size": list(self.model.image_size),
            "head_hidden": self.head_hidden,
            "head_digest": self.load_report.head_digest if self.load_report else None,
            "pos_embed_grid": list(self.model.grid_size),
            "input_attention": self.input_attention,
            "ema_decay": self.ema_config.decay,
            "ema_evaluate": self.ema_config.evaluate,
        }

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]  # Lightning's other arguments have no meaning here
        cls,
        checkpoint_path: str | Path | Checkpoint,
        map_location: torch.device | str | None = None,
        *,
        checkpoint: str | None = None,
        method_file: str | None = None,
        **others: Any,
    ) -> AdaptationModule:
        """Rebuild the module of a run from its checkpoint, in eval mode: backbone, method, head and trained weights.

        The recipe (learning rate …) is in the config.yaml of the run, not in its checkpoint, and has its defaults here;
        `svp-bench fit --resume` continues a run.

        Args:
            checkpoint_path: `runs/…/checkpoints/last.ckpt`, or a `Checkpoint`.
            map_location: Device to put it on.
            checkpoint: Path of the backbone's weights, if they were moved.
            method_file: The file of a custom method, if its class lies next to it.
            others: Lightning's other arguments; they must be None.

        Raises:
            CheckpointError: If the file is not an svp-bench checkpoint, is damaged, or the backbone's weights differ.
            UsageError: If there is no such file, its method is not known here, or another argument is given.
        """
        if given := sorted(key for key, value in others.items() if value is not None):
            raise UsageError(
                "load_from_checkpoint takes checkpoint_path, map_location, checkpoint and method_file, not "
                f"{given[0]}: the checkpoint defines the module; for other settings use svp-bench fit"
            )
        saved = checkpoint_path if isinstance(checkpoint_path, Checkpoint) else Checkpoint.read(checkpoint_path)
        about = saved.metadata
        module = cls(
            method=saved.build_method(method_file),
            backbone=about.backbone,
            checkpoint=checkpoint or about.checkpoint,
            num_classes=about.num_classes,
            image_size=about.image_size,
            seed=about.init_seed,
            head_hidden=about.head_hidden,
            input_attention=about.input_attention,  # type: ignore[arg-type]  # checked there
            ema=EMAConfig(about.ema_decay, bool(about.ema_evaluate)),
            head="keep" if about.head_digest else "fresh",
        )
        module.on_load_checkpoint(saved.content)
        module.load_state_dict(saved.content["state_dict"], strict=False)  # strictness is on_load_checkpoint's
        return module.eval().to(map_location or "cpu")

    def on_load_checkpoint(self, checkpoint: Mapping[str, Any]) -> None:
        """Check that the file is of this backbone and method, and holds exactly the trained part.

        Raises:
            CheckpointError: If not; names the difference.
        """
        if METADATA_KEY not in checkpoint:
            raise CheckpointError("the file is no svp-bench checkpoint; backbone weights go to --model.checkpoint PATH")
        about, ours = CheckpointMetadata.of(checkpoint[METADATA_KEY], "the checkpoint"), self.identity()
        theirs = {**dataclasses.asdict(about), "image_size": list(about.image_size)}
        keys = ("backbone", "backbone_digest", "method", "method_args", "num_classes", "image_size")
        for key in (*keys, "head_hidden", "head_digest", "input_attention", "ema_decay"):
            if theirs[key] != ours[key]:
                raise CheckpointError(
                    f"the checkpoint was trained with {key} = {theirs[key]!r}, this run has {ours[key]!r}; "
                    "use the config.yaml next to it"
                )
        self.restore_method(checkpoint)
        own = self.state_dict()
        expected = {name: own[name].shape for name in self.trained_names()}
        found = {name: value.shape for name, value in checkpoint["state_dict"].items()}
        if expected != found:
            odd = sorted(set(expected) ^ set(found)) or [k for k in expected if expected[k] != found[k]]
            raise CheckpointError(f"the checkpoint does not hold exactly the trained part; first difference: {odd[0]}")
        self.inactive = list(about.inactive_parameters or ())
        if self.ema is not None:
            self.ema.load(checkpoint.get("ema", {}))
        if "averaging_state" in checkpoint:  # Lightning's WeightAveraging wants the frozen part too, which is here
            assert isinstance(checkpoint, dict)
            for part in ("state_dict", "current_model_state"):
                checkpoint[part] = {**own, **checkpoint[part]}


def initial_backbone(backbone: str, checkpoint: str, head: Head, seed: int, **arguments: Any) -> Backbone:
    """Build the backbone that a run begins with: the weights of a checkpoint, or those that its seed draws.

    It seeds PyTorch: call it within `torch.random.fork_rng`.

    Args:
        backbone: timm name.
        checkpoint: hub, embedded, none (random), or a path.
        head: fresh or keep.
        seed: Of random weights.
        arguments: Of `create_backbone`.
    """
    torch.manual_seed(seed)
    return create_backbone(backbone, checkpoint=checkpoint, head=head, **arguments)


def _head(head: Head, hidden: int | None) -> int | None:
    """Return the width of the head's hidden layer, checked."""
    if hidden is None:
        return None
    if head == "keep":
        raise ConfigError("model.head keep takes the file's head, model.head_hidden makes another: set one of them")
    return check_range("model.head_hidden", hidden, "[1, inf)")


def _check_settings(method: Method) -> None:
    """Records and checkpoints hold a method's settings: find out now that they can, not after the training."""
    name = type(method).__name__
    try:
        json.dumps(method.settings(), allow_nan=False)
    except AttributeError as error:
        raise ConfigError(f"{name}: keep each constructor argument as an attribute of its name ({error})") from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{name}: its settings must be plain numbers, texts, lists and mappings ({error})") from None
