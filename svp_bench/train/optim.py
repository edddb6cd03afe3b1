"""Pieces of training recipes: optimizer, schedule, soft targets, averaged weights, head, attention on the input."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from svp_bench.core.errors import CheckpointError, ConfigError, plural
from svp_bench.data.augment import Mix, mirror
from svp_bench.models import VisionMamba

__all__ = [
    "EMA",
    "Schedule",
    "hidden_head",
    "make_optimizer",
    "mix",
    "simam",
    "soft_targets",
    "warmup_notice",
]

ADAMW_EPS = 1e-8
SGD_MOMENTUM = 0.9


# --- images and targets --------------------------------------------------------------------------------------------


def mix(images: Tensor, drawn: Mix) -> Tensor:
    """Mix each image with its neighbour of the pair (`mirror`).

    Args:
        images: Float (B, 3, H, W), the pairs side by side.
        drawn: What was drawn for this step.

    Returns:
        Float (B, 3, H, W): λ x + (1 - λ) x' for mixup, x with a box of x' for cutmix.
    """
    if drawn.share == 1:
        return images
    if drawn.box is None:
        return images * drawn.share + mirror(images) * (1 - drawn.share)
    top, bottom, left, right = drawn.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = mirror(images)[:, :, top:bottom, left:right]
    return mixed


def soft_targets(labels: Tensor, classes: int, drawn: Mix) -> Tensor:
    """Return the targets of mixed images, float (B, classes): λ of an image's own class, 1 - λ of its partner's."""
    own = F.one_hot(labels, classes).float()
    return own * drawn.share + mirror(own) * (1 - drawn.share)


def simam(x: Tensor, regulariser: float = 1e-3) -> Tensor:
    """SimAM, attention without parameters: each value times the sigmoid of its inverse energy.

    Yang et al., "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks", ICML 2021, eq. 5
    (its appendix's code divides by n - 1). SVP's released code puts it on the normalised input image of some data
    sets, by an option named input_relu.

    Args:
        x: (B, C, H, W), at least two values a channel.
        regulariser: λ of the paper.

    Returns:
        (B, C, H, W).
    """
    deviation = (x - x.mean(dim=(2, 3), keepdim=True)).square()
    variance = deviation.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(deviation / (4 * (variance + regulariser)) + 0.5)


# --- head ------------------------------------------------------------------------------------------------------------


def hidden_head(model: VisionMamba, width: int) -> None:
    """Replace the head by two linear layers, D → width → classes, without an activation between them.

    SVP's released code has it for some data sets (384 → 192 → classes). It can express no more than one linear layer of
    that rank; it trains otherwise. Its parameters are `head.0.weight|bias`, `head.1.weight|bias`: D·width + width +
    width·classes + classes numbers. Weights start truncated normal of deviation 0.02 and biases at zero, as the linear
    head's.
    """
    head = nn.Sequential(nn.Linear(model.embed_dim, width), nn.Linear(width, model.num_classes))
    for name, parameter in head.named_parameters():
        if name.endswith("weight"):
            trunc_normal_(parameter, std=0.02)
        else:
            nn.init.zeros_(parameter)
    model.head = head.to(model.cls_token)


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
