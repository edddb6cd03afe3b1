"""Pieces of training recipes: optimizer, schedule, averaged weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from svp_bench.core.errors import CheckpointError, ConfigError, plural

__all__ = [
    "EMA",
    "Schedule",
    "make_optimizer",
    "warmup_notice",
]

ADAMW_EPS = 1e-8
SGD_MOMENTUM = 0.9


# --- optimizer and schedule ------------------------------------------------------------------------------------------


def make_optimizer(
    groups: Iterable[dict[str, Any]],
    name: str,
    learning_rate: float,
    *,
    betas: tuple[float, float],
    eps: float | None,
    momentum: float | None,
) -> torch.optim.Optimizer:
    """Return AdamW or SGD over parameter groups.

    Args:
        groups: Parameter groups with their weight decay.
        name: adamw or sgd. Decay is decoupled in the first and a part of the gradient in the second, as PyTorch's.
        learning_rate: Peak learning rate.
        betas: Of AdamW.
        eps: Of AdamW; 1e-8 if None.
        momentum: Of SGD; 0.9 if None.

    Raises:
        ConfigError: If a setting belongs to the other optimizer.
    """
    if name == "sgd":
        if eps is not None:
            raise ConfigError("model.eps belongs to model.optimizer adamw, not to sgd")
        return torch.optim.SGD(groups, lr=learning_rate, momentum=SGD_MOMENTUM if momentum is None else momentum)
    if momentum is not None:
        raise ConfigError("model.momentum belongs to model.optimizer sgd; AdamW has model.betas")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=ADAMW_EPS if eps is None else eps)


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

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Continue from saved weights.

        Raises:
            CheckpointError: If they are not those of the trained part.
        """
        expected = {name: value.shape for name, value in self.weights.items()}
        if expected != {name: value.shape for name, value in weights.items()}:
            raise CheckpointError("the averaged weights of the checkpoint are not those of the trained part")
        self.weights = {name: value.detach().clone() for name, value in weights.items()}
