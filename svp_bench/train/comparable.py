"""Detect callbacks and other user classes that change the recipe or the weights of a run behind its record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch.callbacks import LambdaCallback
from torch import Tensor
from torch.optim import Optimizer

from svp_bench.core.errors import UsageError
from svp_bench.data.module import VisionDataModule
from svp_bench.methods.checks import trained_parameters
from svp_bench.train.checkpoint import Checkpoint, weights_digest
from svp_bench.train.module import AdaptationModule

# Classes of Lightning that change neither weights nor settings; the record names all others.
_HARMLESS = {
    *("ModelSummary", "RichModelSummary", "ProgressBar", "TQDMProgressBar", "RichProgressBar", "ModelCheckpoint"),
    *("OnExceptionCheckpoint", "LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor", "Timer"),
    *("EarlyStopping", "TensorBoardLogger", "CSVLogger", "DummyLogger"),
    *("PassThroughProfiler", "SimpleProfiler", "AdvancedProfiler", "PyTorchProfiler"),
    *("SingleDeviceStrategy", "DDPStrategy", "CPUAccelerator", "CUDAAccelerator", "MPSAccelerator"),
    *("Precision", "MixedPrecision", "DoublePrecision", "HalfPrecision", "TorchCheckpointIO"),
    *("LightningEnvironment", "TorchElasticEnvironment", "SLURMEnvironment", "MPIEnvironment", "LSFEnvironment"),
    "KubeflowEnvironment",
}
_OWN_PACKAGES = ("svp_bench.",)
_LIGHTNING = ("lightning.pytorch.", "lightning.fabric.", "pytorch_lightning.", "lightning_fabric.")

# Callbacks that a record cannot describe: class, reason, remedy.
_REFUSED: Mapping[str, tuple[str, str]] = {
    "LearningRateFinder": (
        "it sets another learning rate than the record would state",
        "choose model.learning_rate on val with `svp-bench tune`, or set it",
    ),
    "BatchSizeFinder": (
        "it sets another batch size than the record would state",
        "set --data.batch_size; an out-of-memory error suggests one",
    ),
    "GradientAccumulationScheduler": (
        "data.batch_size is global, and a schedule would change it between epochs",
        "set --data.batch_size and --trainer.accumulate_grad_batches",
    ),
    "BaseFinetuning": (
        "the method selects the parameters that train, from the first step to the last",
        "leave it out, or write a method",
    ),
    "ModelPruning": ("it replaces parameters of the backbone behind the method", "leave it out"),
}


def refuse_hidden_changes(trainer: Trainer, *, trains: bool) -> None:
    """Refuse, before training, callbacks and strategies that a record cannot describe.

    Args:
        trainer: The trainer.
        trains: Whether it will train; else callbacks are accepted.

    Raises:
        UsageError: If there is one; names the remedy.
    """
    for name, (why, instead) in _REFUSED.items() if trains else ():
        kind = getattr(lightning_callbacks, name)
        for callback in _callbacks(trainer):
            if isinstance(callback, kind):
                raise UsageError(f"trainer.callbacks: {_name(callback)} is refused: {why}; {instead}")
    given = getattr(trainer.strategy, "_start_method", "popen")  # of DDP; no public property has it
    if given != "popen":
        raise UsageError(
            f"trainer.strategy: {_name(trainer.strategy)} with processes by {given} (ddp_{given}, "
            "ddp_notebook …) is refused: they do not return the state of a run, so its record would be wrong; "
            "use --trainer.strategy ddp"
        )


def external_classes(trainer: Trainer) -> list[str]:
    """Return the full names of the classes in a trainer that are neither of svp-bench nor known to be harmless."""
    strategy: Any = trainer.strategy
    parts = [
        *(_callbacks(trainer)),
        *trainer.loggers,
        *(getattr(trainer, name) for name in ("profiler", "strategy", "accelerator")),
        *(getattr(strategy, name, None) for name in ("precision_plugin", "checkpoint_io", "cluster_environment")),
        getattr(strategy, "_layer_sync", None),
    ]
    return sorted({_name(part) for part in parts if part is not None and not _is_known(part)})


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined, no-any-return]


def _name(value: object) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _is_known(value: object) -> bool:
    name = _name(value)
    return name.startswith(_OWN_PACKAGES) or (name.startswith(_LIGHTNING) and type(value).__name__ in _HARMLESS)


class RecipeWatch(Callback):
    """Check that a run trains by its recipe, and that its checkpoint has the weights that are scored.

    It must be the last callback. Before each optimizer step it compares learning rate, weight decay and the trained
    parameters with the recipe; at the test it compares the weights with those after the last step.

    Args:
        checkpoint: The run's last checkpoint; written again if the weights were changed after it.

    Attributes:
        reasons: Why the run is not comparable, one line each.
        scored: Digest of the weights that were tested, or None.
        first: A callback for the first place, which stores batches and gradients before other callbacks see them.
    """

    def __init__(self, checkpoint: Path | None) -> None:
        self.checkpoint = checkpoint
        self.reasons: list[str] = []
        self.scored: str | None = None
        self._settings: dict[str, Any] = {}
        self._last: str | None = None  # digest of the weights after the last optimizer step
        self._frozen: dict[str, Tensor] = {}
        self._frozen_digest: str | None = None
        self.first = _First(
            on_train_batch_start=lambda trainer, module, batch, *_: self._start_batch(module, batch._asdict()),
            on_test_batch_start=lambda trainer, module, batch, *_: self._store(batch._asdict()),
            on_after_backward=lambda trainer, module: self._store(_gradients(module)),
            on_before_optimizer_step=lambda trainer, module, _: self._store(_gradients(module)),
        )
        self._external = False  # whether there are user classes; only then the following is compared
        self._weights: dict[str, Tensor] = {}  # after the last optimizer step, or at the first test batch
        self._modes: set[str] = set()
        self._build: list[Any] = []
        self._stored: dict[str, Tensor] = {}  # batch or gradients

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run continues from."""
        return {"reasons": list(self.reasons), "last": self._last}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.reasons, self._last = list(state_dict["reasons"]), state_dict["last"]

    def begin(self, trainer: Trainer, model: AdaptationModule, data: VisionDataModule) -> None:
        """Store settings and weights before any callback has run."""
        self._settings = _settings(trainer, model, data)
        frozen = _frozen(model)
        self._frozen_digest = weights_digest({"state_dict": frozen})
        self._external = bool(external_classes(trainer))
        if self._external:
            self._frozen = {name: value.detach().cpu().clone() for name, value in frozen.items()}
            self._weights = _copied(trained_parameters(model.model))
            self._modes, self._build = _modes(model), _build(model)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the settings, and from now on each optimizer step."""
        if not self._settings or not isinstance(pl_module, AdaptationModule):
            return
        self._compare_settings(trainer, pl_module)
        (optimizer,) = trainer.optimizers
        trained = {id(parameter) for parameter in trained_parameters(pl_module.model).values()}
        schedule, by_epoch = pl_module.schedule, pl_module.schedule_config.interval == "epoch"
        last_step = int(trainer.estimated_stepping_batches)
        assert schedule is not None

        if trainer.ckpt_path is not None and self._external:  # the checkpoint was loaded after `begin`
            self._weights = _copied(trained_parameters(pl_module.model))

        def note(reason: str) -> None:
            self._note(f"{reason} (first in epoch {trainer.current_epoch}, step {trainer.global_step})", reason)

        def before(optimizer: Optimizer, _: Any, kwargs: dict[str, Any]) -> None:
            at = trainer.current_epoch if by_epoch else trainer.global_step
            rate = self._settings["model.learning_rate"] * schedule(at)
            for reason in _differences(optimizer, self._settings, rate, trained):
                note(reason)
            if not self._external:
                return
            if _modes(pl_module) != self._modes:
                note("other parts than by the recipe were in training mode")
            if _build(pl_module) != self._build:
                note("parts of the model were replaced or hooked")
            closure = kwargs.get("closure")  # the forward and backward pass with the hooks of all callbacks

            def watched() -> Any:
                result = closure() if closure else None
                if not _same(self._weights, trained_parameters(pl_module.model)):
                    note("the weights were changed between optimizer steps")
                return result

            if closure:
                kwargs["closure"] = watched
            else:
                watched()

        def after(*_: Any) -> None:
            if self._external:
                self._weights = _copied(trained_parameters(pl_module.model))
            if trainer.global_step + 1 >= last_step:
                self._last = _trained_digest(pl_module.weights())

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the settings."""
        if self._settings and isinstance(pl_module, AdaptationModule):
            self._compare_settings(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Compute the digest of the final weights, and check that every batch is scored with them."""
        if not isinstance(pl_module, AdaptationModule):
            return
        if batch_idx == 0:
            self.check_final_weights(trainer, pl_module)
        if not self._external or not self._settings:
            return
        now = {name: value for name, value in pl_module.state_dict().items() if name.startswith("model.")}
        if batch_idx == 0:
            self._weights = _copied(now)
        elif not _same(self._weights, now):
            self._note("the weights were changed during the test")
        if pl_module.training or _modes(pl_module):
            self._note("parts of the model were in training mode during the test")
        if _build(pl_module) != self._build:
            self._note("parts of the model were replaced or hooked for the test")
        self._compare("a test batch", batch._asdict())

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the weights, before the method may change them for the epoch."""
        if not self._external or not isinstance(pl_module, AdaptationModule):
            return
        if not _same(self._weights, trained_parameters(pl_module.model)):
            reason = "the weights were changed between optimizer steps"
            self._note(f"{reason} (first in epoch {trainer.current_epoch}, step {trainer.global_step})", reason)

    def _start_batch(self, module: LightningModule, batch: Mapping[str, Any]) -> None:
        """Store a batch, and what the method changed for the epoch, before other callbacks see them."""
        self._store(batch)
        if self._external and isinstance(module, AdaptationModule) and module.stages.began:
            self._weights, self._modes = _copied(trained_parameters(module.model)), _modes(module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Compare the batch with that of the loader."""
        self._compare("a training batch", batch._asdict())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the gradients with those of the loss."""
        self._compare("gradients", _gradients(pl_module))

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Compare the gradients with those of the loss."""
        self._compare("gradients", _gradients(pl_module))

    def _store(self, tensors: Mapping[str, Tensor]) -> None:
        if self._external:
            self._stored = _copied(tensors)

    def _compare(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        if self._external and not _same(self._stored, tensors):
            self._note(f"a callback changed {name}")

    def check_final_weights(self, trainer: Trainer, model: AdaptationModule) -> None:
        """Compute the digest of the final weights, and write them into the checkpoint if it has others.

        Raises:
            CheckpointError: If the checkpoint cannot be read.
            SvpBenchError: If it cannot be written.
        """
        weights = model.weights()
        self.scored = weights_digest(weights)
        if self._last is not None and _trained_digest(weights) != self._last:
            self._note("the weights were changed after the last optimizer step")
        if self._frozen_digest is not None and weights_digest({"state_dict": _frozen(model)}) != self._frozen_digest:
            originals = {name: value for name, value in self._frozen.items() if name in _frozen(model)}
            model.load_state_dict(originals, strict=False)
            self._note(f"frozen weights were changed{', and put back before the test' if originals else ''}")
        if not self._settings or self.checkpoint is None or not trainer.is_global_zero or not self.checkpoint.is_file():
            return
        saved = Checkpoint.read(self.checkpoint)
        if weights_digest(saved.content) != self.scored:
            self._note("the weights were changed after the last checkpoint, which was written again with them")
            parts = {part: {name: v.detach().cpu() for name, v in state.items()} for part, state in weights.items()}
            trainer.strategy.checkpoint_io.save_checkpoint({**saved.content, **parts}, self.checkpoint)

    def _compare_settings(self, trainer: Trainer, model: AdaptationModule) -> None:
        now = _settings(trainer, model, trainer.datamodule)  # type: ignore[attr-defined]
        for key, value in self._settings.items():
            if now[key] != value:
                self._note(f"{key} was changed from {value} to {now[key]}")

    def begin_test(self, data: VisionDataModule) -> None:
        """Add a reason if the test split was accessible before the weights were final."""
        if data.test_unlocked:
            self._note("the test split was unlocked before the weights were final")

    def _note(self, reason: str, kind: str | None = None) -> None:
        """Add a reason, unless one that begins with `kind` is known."""
        if not any(known.startswith(kind or reason) for known in self.reasons):
            self.reasons.append(reason)


class _First(LambdaCallback):
    """The callback `RecipeWatch.first`; a class of svp-bench, so that `external_classes` leaves it out."""


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in tensors.items()}


def _same(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    """Return whether tensors hold the same numbers, on any device and in any precision."""
    return before.keys() == now.keys() and all(
        torch.equal(old.to(now[name]), now[name].detach()) for name, old in before.items()
    )


def _gradients(module: LightningModule) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def _modes(model: AdaptationModule) -> set[str]:
    """Return the names of the modules in training mode."""
    return {name for name, part in model.model.named_modules() if part.training}


def _build(model: AdaptationModule) -> list[Any]:
    """Return what a forward pass calls: modules, number of their hooks, and methods that are set on an instance."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    parts = [
        (name, id(part), [len(getattr(part, kind)) for kind in kinds], "forward" in vars(part))
        for name, part in model.model.named_modules()
    ]
    own = [name for name in vars(model) if callable(getattr(AdaptationModule, name, None))]
    return [parts, len(model.model.points), own]


_RECIPE = (
    *("learning_rate", "weight_decay", "warmup_epochs", "label_smoothing", "frozen_mode"),
    *("optimizer_config", "schedule_config", "ema_config"),
)
_DATA = ("batch_size", "seed", "drop_last", "augment", "eval_transform", "splits", "stage")
_TRAINER = ("max_epochs", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm", "precision")


def _settings(trainer: Trainer, model: AdaptationModule, data: VisionDataModule) -> dict[str, Any]:
    """Return the settings that must not change, by config key."""
    found: dict[str, Any] = {}
    for group, owner, names in (("model", model, _RECIPE), ("data", data, _DATA), ("trainer", trainer, _TRAINER)):
        for name in names:
            value = getattr(owner, name, None)
            found[f"{group}.{name.removesuffix('_config')}"] = dict(value) if isinstance(value, Mapping) else value
    return found


def _trained_digest(weights: Mapping[str, Any]) -> str:
    """Return the digest of the weights without their average, which is updated after each optimizer step."""
    return weights_digest({"state_dict": weights["state_dict"]})


def _frozen(model: AdaptationModule) -> dict[str, Tensor]:
    trained = model.trained_names()
    return {n: v for n, v in model.state_dict().items() if n.startswith("model.") and n not in trained}


def _differences(optimizer: Optimizer, settings: Mapping[str, Any], rate: float, trained: set[int]) -> Iterator[str]:
    """Yield how an optimizer differs from the recipe before a step.

    Args:
        optimizer: The optimizer.
        settings: The result of `_settings`.
        rate: The expected learning rate.
        trained: `id` of the parameters that the method trains.
    """
    for group in optimizer.param_groups:
        if abs(group["lr"] - rate) > 1e-6 * abs(rate) + 1e-15:
            yield "the learning rate was not that of the recipe"
        if group["weight_decay"] not in (0.0, settings["model.weight_decay"]):
            yield "the weight decay was not that of the recipe"
        betas = group.get("betas")
        if betas is not None and tuple(betas) != tuple(settings["model.optimizer"].betas):
            yield "the betas of the optimizer were not those of the recipe"
        for key in ("eps", "momentum", "dampening", "nesterov", "amsgrad", "maximize"):
            if group.get(key) != optimizer.defaults.get(key):
                yield f"{key} of the optimizer was not that of the recipe"
    if {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} != trained:
        yield "the optimizer did not train the parameters of the method"
