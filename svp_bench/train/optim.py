"""Pieces of training recipes: optimizer, schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from svp_bench.core.errors import CheckpointError, ConfigError, plural
from svp_bench.core.ranges import check_one_of, check_range
from svp_bench.records.defaults import clipped_warmup

# --- optimizer -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OptimizerConfig:
    """Settings of the optimizer, next to its learning rate and weight decay.

    Attributes:
        name: adamw or sgd. Weight decay is decoupled in AdamW and a part of the gradient in SGD, as PyTorch's.
        betas: Of AdamW.
        eps: Of AdamW.
        momentum: Of SGD.

    Raises:
        ConfigError: If a value is out of range, or belongs to the other optimizer.
    """

    name: Literal["adamw", "sgd"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    momentum: float = 0.9

    def __post_init__(self) -> None:
        check_one_of("model.optimizer.name", self.name, ("adamw", "sgd"))
        for beta in self.betas:
            check_range("model.optimizer.betas", beta, "[0, 1)")
        check_range("model.optimizer.eps", self.eps, "(0, inf)")
        check_range("model.optimizer.momentum", self.momentum, "[0, 1)")
        for key in ("betas", "eps") if self.name == "sgd" else ("momentum",):
            if getattr(self, key) != getattr(OptimizerConfig, key):
                raise ConfigError(f"model.optimizer.{key} is not a setting of model.optimizer.name {self.name}")


def make_optimizer(
    groups: Iterable[dict[str, Any]], config: OptimizerConfig, learning_rate: float
) -> torch.optim.Optimizer:
    """Return AdamW or SGD over parameter groups, which hold their own weight decay."""
    if config.name == "sgd":
        return torch.optim.SGD(groups, lr=learning_rate, momentum=config.momentum)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=config.betas, eps=config.eps)


# --- schedule --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ScheduleConfig:
    """Settings of the learning rate's schedule: linear warm-up, then cosine decay.

    Attributes:
        warmup_start_factor: The warm-up starts at this fraction of the learning rate.
        warmup_learning_rate: The warm-up starts at this learning rate instead; null to use `warmup_start_factor`.
        min_learning_rate: Where the cosine ends.
        cosine_start: Where the cosine begins: warmup_end, or run_start, whose first part the warm-up then covers
            (timm's schedule).
        interval: The learning rate changes with each step or each epoch.
        cooldown_epochs: Last epochs of the run, at `min_learning_rate`: the cosine ends before them. (timm adds them to
            its epochs; here `trainer.max_epochs` is the whole run.)

    Raises:
        ConfigError: If a value is out of range.
    """

    warmup_start_factor: float = 1e-3
    warmup_learning_rate: float | None = None
    min_learning_rate: float = 1e-5
    cosine_start: Literal["warmup_end", "run_start"] = "warmup_end"
    interval: Literal["step", "epoch"] = "step"
    cooldown_epochs: float = 0.0

    def __post_init__(self) -> None:
        check_range("model.schedule.warmup_start_factor", self.warmup_start_factor, "[0, 1]")
        if self.warmup_learning_rate is not None:
            check_range("model.schedule.warmup_learning_rate", self.warmup_learning_rate, "[0, inf)")
        check_range("model.schedule.min_learning_rate", self.min_learning_rate, "[0, inf)")
        check_one_of("model.schedule.cosine_start", self.cosine_start, ("warmup_end", "run_start"))
        check_one_of("model.schedule.interval", self.interval, ("step", "epoch"))
        check_range("model.schedule.cooldown_epochs", self.cooldown_epochs, "[0, inf)")

    def build(self, learning_rate: float, warmup_epochs: float, epochs: int, steps: int) -> Schedule:
        """Return the schedule of a run.

        Args:
            learning_rate: Peak learning rate.
            warmup_epochs: Epochs of warm-up, clipped to the run.
            epochs: Epochs of the run.
            steps: Optimizer steps of the run.

        Raises:
            ConfigError: If the cooldown leaves no epoch for the cosine.
        """
        if 0 < epochs <= self.cooldown_epochs:
            raise ConfigError(
                f"model.schedule.cooldown_epochs {self.cooldown_epochs:g} leaves nothing of the {epochs} epochs of "
                "trainer.max_epochs for the cosine"
            )
        total = epochs if self.interval == "epoch" else steps
        start = self.warmup_start_factor
        if self.warmup_learning_rate is not None:
            start = self.warmup_learning_rate / learning_rate
        warmup = round(total * clipped_warmup(warmup_epochs, epochs) / epochs) if epochs > 0 else 0
        cooldown = round(total * self.cooldown_epochs / epochs) if epochs > 0 else 0
        floor = self.min_learning_rate / learning_rate
        return Schedule(warmup, total - cooldown, start, floor, self.cosine_start == "run_start")


def warmup_notice(warmup_epochs: float, epochs: int, clipped: float) -> str:
    """Return the line that reports a clipped warm-up."""
    limit = "the run" if clipped == epochs else "a fifth of the run"
    return (
        f"The warm-up of {warmup_epochs:g} epochs is longer than {limit} of {plural(epochs, 'epoch')}: clipped to "
        f"{clipped:g} epochs."
    )


class Schedule:
    """Factor of the learning rate: linear warm-up, cosine to `floor`, then `floor`.

    Args:
        warmup: Steps (or epochs) of warm-up.
        total: Where the cosine ends.
        start: Factor at the start of the warm-up.
        floor: Factor at the end of the cosine, at most 1.
        whole_cosine: The cosine begins with the run, not after the warm-up, which covers its first part (timm's way):
            the peak is then a little lower.
    """

    def __init__(self, warmup: int, total: int, start: float, floor: float, whole_cosine: bool = False) -> None:
        self.warmup, self.total, self.start, self.floor = warmup, total, start, min(floor, 1.0)
        self.begin = 0 if whole_cosine else warmup

    def __call__(self, step: int) -> float:
        """Return the factor at a step (or epoch)."""
        if step < self.warmup:
            return self.start + (1 - self.start) * step / self.warmup
        progress = min(1.0, (step - self.begin) / max(1, self.total - self.begin))
        return self.floor + (1 - self.floor) * (1 + math.cos(math.pi * progress)) / 2


# --- averaged weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EMAConfig:
    """Settings of the moving average of the trained weights.

    Attributes:
        decay: Keep an average with this decay, stored in the checkpoint too; null for none.
        evaluate: Validate, test and predict with the averaged weights.

    Raises:
        ConfigError: If the decay is out of range, or there is no average to evaluate.
    """

    decay: float | None = None
    evaluate: bool = False

    def __post_init__(self) -> None:
        if self.decay is not None:
            check_range("model.ema.decay", self.decay, "(0, 1)")
        elif self.evaluate:
            raise ConfigError("model.ema.evaluate needs averaged weights: set model.ema.decay, e.g. 0.9999")


class EMA:
    """Exponential moving average of the trained weights: after each step, average = d · average + (1 - d) · weights.

    It starts at the initial weights and has no warm-up of d, as timm's `ModelEma`.

    Args:
        decay: d.
        parameters: What is averaged, by name.
    """

    def __init__(self, decay: float, parameters: Mapping[str, nn.Parameter]) -> None:
        self.decay = decay
        self.weights = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    @torch.no_grad()
    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Take one step's weights in."""
        for name, parameter in parameters.items():
            average = self.weights[name] = self.weights[name].to(parameter.device)
            average.lerp_(parameter.detach().to(average.dtype), 1 - self.decay)

    @property
    def shapes(self) -> dict[str, torch.Size]:
        """Return the shapes of the averages by name."""
        return {name: value.shape for name, value in self.weights.items()}

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from saved weights.

        Raises:
            CheckpointError: If they are not those of the trained part.
        """
        if self.shapes != {name: value.shape for name, value in weights.items()}:
            raise CheckpointError("the averaged weights of the checkpoint are not those of the trained part")
        self.weights = {name: value.detach().clone() for name, value in weights.items()}
