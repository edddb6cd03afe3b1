"""Build a backbone with a checkpoint and a method, ready to train."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import timm
import torch

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.methods import METHODS, checks
from svp_bench.methods.base import Method, build_method
from svp_bench.methods.hybrid import Hybrid
from svp_bench.models import BACKBONES, Backbone, as_backbone
from svp_bench.models.checkpoints import Head, keeps_head, load_checkpoint, resolve_checkpoint

_TIMM_MODULES = ("vision_transformer", "deit")  # of timm's own models: ViT and DeiT


def list_backbones() -> list[str]:
    """Return the names of all backbones: this package's, those of installed packages, and timm's ViT and DeiT."""
    own = timm.list_models(["vim_*", "mambar_*", "vit_nano_*"])
    others = [name for module in _TIMM_MODULES for name in timm.list_models(module=module)]
    return [*sorted({*own, *BACKBONES.names()}), *sorted(others)]


def input_size(name: str) -> int | tuple[int, int]:
    """Return the image size that a backbone was trained with: one number for a square, else (height, width).

    Raises:
        UsageError: If there is no such backbone; names the nearest.
    """
    _check_backbone(name)
    if name in BACKBONES.names():
        height, width = as_backbone(BACKBONES.get(name)(num_classes=1)).image_size
    else:
        cfg: Any = timm.get_pretrained_cfg(name)
        _, height, width = cfg.input_size
    return int(height) if height == width else (int(height), int(width))


def family_of(name: str) -> str:
    """Return the family of a backbone: "vim", "mambar", "vit", or that of another package's.

    Raises:
        UsageError: If there is no such backbone; names the nearest.
    """
    _check_backbone(name)
    with torch.device("meta"):
        return _new_backbone(name, 1, {}).family


def _check_backbone(name: str) -> None:
    """Refuse a name that neither timm nor a package registers."""
    architecture, _, weights = name.partition(".")
    if name in BACKBONES.names() or (timm.is_model(architecture) and not weights):
        return
    if not timm.is_model(architecture):
        known = list_backbones()
        near = difflib.get_close_matches(name, [other[: len(name) + 1] for other in known], n=1)
        raise unknown_name("backbone", name, [other for other in known if near and other.startswith(near[0])] or known)
    tagged = timm.list_pretrained(f"{architecture}.*")
    if name not in tagged:
        raise unknown_name("backbone", name, tagged or [architecture])


def _new_backbone(name: str, num_classes: int, arguments: dict[str, Any]) -> Backbone:
    """Build a backbone with random weights; the scan backend is set afterwards, since only some have a scan."""
    backend = arguments.pop("scan_backend", "auto")
    if name in BACKBONES.names():
        model = as_backbone(BACKBONES.get(name)(num_classes=num_classes, **arguments))
    else:
        try:
            built = timm.create_model(name, num_classes=num_classes, **arguments)
        except TypeError as error:  # a model that takes no img_size
            raise ConfigError(
                f"{name} is not a supported backbone ({error}): Vim, Mamba-Reg, and ViT and DeiT of timm are"
            ) from None
        model = as_backbone(built)
    model.set_scan_backend(backend)
    cfg: Any = getattr(model, "pretrained_cfg", None) or {}
    if any(cfg.get(key) is None for key in ("mean", "std")):
        raise ConfigError(
            f"the backbone {name} states no mean and std for its images; set model.pretrained_cfg, e.g. "
            "{'mean': (0.485, 0.456, 0.406), 'std': (0.229, 0.224, 0.225), 'input_size': (3, 224, 224)}"
        )
    return model


def create_backbone(
    name: str,
    *,
    num_classes: int,
    checkpoint: str | Path | None = None,
    head: Head | None = None,
    **arguments: Any,
) -> Backbone:
    """Build a backbone and load its weights; its `load_report` states the changes in addition to copying.

    Args:
        name: timm name of a Vim, a Mamba-Reg or a ViT, e.g. "vim_small_patch16_224", or a name that an installed
            package declares as the entry point `svp_bench.backbones`.
        num_classes: Classes of the head.
        checkpoint: None or "none" for random weights, "hub", "embedded", or a path.
        head: fresh (as None): a new head; keep: that of the file, which must have `num_classes` classes.
        arguments: Of the model, e.g. `img_size`, `drop_path_rate`; and `scan_backend`.

    Raises:
        UsageError: If there is no such backbone; names the nearest.
        ConfigError: If the images are not covered by patches, there is no class, or the model is of another kind.
        CheckpointError: If the weights are not found or do not fit.
    """
    _check_backbone(name)
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, not {num_classes}")
    path = resolve_checkpoint(checkpoint, name)
    if keeps_head(head) and path is None:
        raise ConfigError("model.head keep takes the head of a file; model.checkpoint none has no file")
    model = _new_backbone(name, num_classes, arguments)
    _check_patches(model, name)
    if path is not None:
        load_checkpoint(model, path, head)
    return model


def _check_patches(model: Backbone, name: str) -> None:
    """Refuse an image size that patches do not cover: the pixels at the edge would be dropped without a word."""
    patch, stride = model.patch_size, model.patch_stride
    shown = "x".join(map(str, dict.fromkeys(model.image_size)))
    for side in model.image_size:
        if side < patch:
            raise ConfigError(f"data.image_size {shown} is smaller than a patch of {name} ({patch} pixels)")
        rest = (side - patch) % stride
        if rest:
            near = f"{side - rest} or {side - rest + stride}"
            raise ConfigError(f"data.image_size {shown} is not covered by the patches of {name}; {near} would fit")


def adapt(model: Backbone, method: Method) -> Backbone:
    """Attach a method to a backbone, in place, and freeze the parameters that it does not train.

    Methods from outside this package are checked more: their `identity_at_start`, and that a deep copy of the model
    uses its own adapter.

    Raises:
        ConfigError: If the model carries a method already, the settings do not fit it, a hook would not take effect, or
            a promise of the method does not hold; the model is then unchanged.
    """
    taken = model.adapter is not None or model.method is not None
    if taken:
        raise ConfigError("this model carries a method already; create a new one for another method")
    _check_family(model, method)
    checks.check_parameters(model, method)
    shipped = type(method).__module__.startswith(f"{__package__}.")  # tests check those
    before = None if shipped or not checks.declares_identity(method) else checks.probe_features(model)
    hooks = {id(hooks): list(hooks) for hooks in model.points.hook_lists()}
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        method.attach(model)
        if model.adapter is not None:  # device, precision and mode of the backbone
            model.adapter.to(model.first_parameter).train(model.training)
        for name, parameter in model.named_parameters():
            trains = method.trains(name)
            if trains and not parameter.is_floating_point():
                raise ConfigError(
                    f"{type(method).__name__} trains {name}, which is quantised ({parameter.dtype}) and cannot be "
                    "trained; use a method that leaves it frozen"
                )
            parameter.requires_grad_(trains)
        checks.check_promises(model, method)
        checks.check_identity(model, method, before)
        if not shipped:
            checks.check_copies(model, type(method).__name__)
    except BaseException:
        for place in model.points.hook_lists():
            place[:] = hooks.get(id(place), [])
        model.adapter = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.is_floating_point()))
        raise
    model.method = method
    return model


def _check_family(model: Backbone, method: Method) -> None:
    """Refuse a registered method on a backbone that lacks what it needs."""
    target = f"{type(method).__module__}:{type(method).__qualname__}"
    for entry in METHODS:
        if entry.target == target and entry.families and model.family not in entry.families:
            fitting = ", ".join(other.name for other in METHODS if not other.families or model.family in other.families)
            raise ConfigError(
                f"{entry.name} works on the families {', '.join(entry.families)}, not on {model.family}; these methods "
                f"do: {fitting}"
            )


def create_model(
    name: str,
    *,
    num_classes: int,
    method: str | Sequence[str] = "svp",
    checkpoint: str | Path | None = None,
    head: Head | None = None,
    **method_args: Any,
) -> Backbone:
    """Build a backbone, load its weights, attach a method.

    >>> model = create_model("vim_nano_patch8_64", num_classes=10, method="svp", share_layers=4)
    >>> sum(p.numel() for p in model.parameters() if p.requires_grad)
    76170

    Args:
        name: timm name of the backbone, e.g. "vim_small_patch16_224".
        num_classes: Classes of the head.
        method: A name of `svp_bench.list_methods()`, or several for a hybrid.
        checkpoint: None or "none" for random weights, "hub", "embedded", or a path.
        head: fresh (as None): a new head; keep: that of the file, which must have `num_classes` classes.
        method_args: Settings of the method; of a hybrid a mapping for each method, e.g. ``lora={"rank": 8}``.

    Returns:
        The model: normalised float (B, 3, H, W) → logits (B, num_classes). Trained parameters have `requires_grad`.

    Raises:
        UsageError: If the backbone, the method or an argument of it is unknown; names the nearest.
        CheckpointError: If the weights are not found or do not fit.
    """
    if not isinstance(method, str) and len(method) == 1:
        (method,) = method
    if isinstance(method, str):
        instance: Method = build_method(METHODS.get(method), method, method_args)
    else:
        for given in method_args:
            if given not in method:
                raise unknown_name("method of the hybrid", given, [*method], error=ConfigError)
        instance = Hybrid({name: method_args.get(name) for name in method})
    return adapt(create_backbone(name, num_classes=num_classes, checkpoint=checkpoint, head=head), instance)
