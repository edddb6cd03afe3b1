"""`create_model`: a backbone with a checkpoint and a method, ready to train."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
from torch import nn

import svp_bench.models.vim  # noqa: F401  registers the backbones with timm
from svp_bench.errors import ConfigError, unknown_name
from svp_bench.methods import METHODS
from svp_bench.methods.base import Method, build_method
from svp_bench.models.checkpoints import load_checkpoint, resolve_checkpoint
from svp_bench.models.vim import VisionMamba

__all__ = ["adapt", "create_backbone", "create_model", "trained_parameters"]


def list_backbones() -> list[str]:
    """Return the timm names of all backbones."""
    return sorted(timm.list_models("vim_*"))


def create_backbone(
    name: str, *, num_classes: int, checkpoint: str | Path | None = None, **arguments: Any
) -> VisionMamba:
    """Build a backbone and load its weights.

    Args:
        name: timm name, e.g. "vim_small_patch16_224".
        num_classes: Classes of the head.
        checkpoint: None or "none" for random weights, "hub", "embedded", or a path.
        arguments: Of `VisionMamba`, e.g. `img_size`, `drop_path_rate`, `scan_backend`.

    Raises:
        UsageError: If there is no such backbone; names the nearest.
        CheckpointError: If the weights cannot be had or do not fit.
    """
    known = list_backbones()
    if name not in known:
        raise unknown_name("backbone", name, known)
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, not {num_classes}")
    path = resolve_checkpoint(checkpoint, name)
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    assert isinstance(model, VisionMamba)
    if path is not None:
        load_checkpoint(model, path)
    return model


def adapt(model: VisionMamba, method: Method) -> VisionMamba:
    """Attach a method to a backbone, in place, and freeze what it does not train.

    Raises:
        ConfigError: If the model carries a method already, or the settings do not fit it.
    """
    taken = model.adapter is not None or getattr(model, "method", None) is not None
    if taken:
        raise ConfigError("this model carries a method already; create a new one for another method")
    method.attach(model)
    if model.adapter is not None:  # as the backbone: its device, precision and mode
        model.adapter.to(model.cls_token).train(model.training)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(method.trains(name))
    counted = sum(p.numel() for name, p in trained_parameters(model).items() if not name.startswith("head."))
    if (claimed := method.adapter_parameters(model)) != counted:
        raise ConfigError(
            f"{type(method).__name__}: adapter_parameters() says {claimed} and {counted} parameters train besides the "
            "head; correct the formula"
        )
    model.method = method  # type: ignore[assignment]  # a plain object, no module
    return model


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def create_model(
    name: str,
    *,
    num_classes: int,
    method: str = "svp",
    checkpoint: str | Path | None = None,
    **method_args: Any,
) -> VisionMamba:
    """Build a backbone, load its weights, attach a method.

    >>> model = create_model("vim_nano_patch8_64", num_classes=10, method="svp", share_layers=4)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    76170

    Args:
        name: timm name of the backbone, e.g. "vim_small_patch16_224".
        num_classes: Classes of the head.
        method: A name of `svp_bench.list_methods()`.
        checkpoint: None or "none" for random weights, "hub", "embedded", or a path.
        method_args: The method's settings.

    Returns:
        The model: normalised float (B, 3, H, W) → logits (B, num_classes). What the method trains has
        `requires_grad`, the rest has not.

    Raises:
        UsageError: If the backbone, the method or an argument of it is unknown; names the nearest.
        CheckpointError: If the weights cannot be had or do not fit.
    """
    made = build_method(METHODS.get(method), method, method_args)
    return adapt(create_backbone(name, num_classes=num_classes, checkpoint=checkpoint), made)
