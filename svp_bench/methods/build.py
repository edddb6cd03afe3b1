"""`create_model`: a backbone with a checkpoint and a method, ready to train."""

from __future__ import annotations

import copy
import re
from collections import Counter
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

import timm
import torch
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.methods import METHODS
from svp_bench.methods.base import Method, build_method
from svp_bench.models import VisionMamba
from svp_bench.models.checkpoints import Head, keeps_head, load_checkpoint, resolve_checkpoint

__all__ = ["adapt", "create_backbone", "create_model", "input_size", "trained_parameters"]


def list_backbones() -> list[str]:
    """Return the timm names of all backbones."""
    return sorted(timm.list_models("vim_*"))


def input_size(name: str) -> int | tuple[int, int]:
    """Return the image size that a backbone was trained with: one number for a square, else (height, width).

    Raises:
        UsageError: If there is no such backbone; names the nearest.
    """
    _need_known(name)
    cfg: Any = timm.get_pretrained_cfg(name)
    _, height, width = cfg.input_size
    return int(height) if height == width else (int(height), int(width))


def _need_known(name: str) -> None:
    known = list_backbones()
    if name not in known:
        raise unknown_name("backbone", name, known)


def create_backbone(
    name: str,
    *,
    num_classes: int,
    checkpoint: str | Path | None = None,
    head: Head | None = None,
    **arguments: Any,
) -> VisionMamba:
    """Build a backbone and load its weights; `load_report` of the model says what that did in addition to copying.

    Args:
        name: timm name, e.g. "vim_small_patch16_224".
        num_classes: Classes of the head.
        checkpoint: None or "none" for random weights, "hub", "embedded", or a path.
        head: fresh: a new head; keep: that of the file, which must have `num_classes` classes. None is fresh.
        arguments: Of `VisionMamba`, e.g. `img_size`, `drop_path_rate`, `scan_backend`.

    Raises:
        UsageError: If there is no such backbone; names the nearest.
        ConfigError: If the images are smaller than a patch, or there is no class.
        CheckpointError: If the weights cannot be had or do not fit.
    """
    _need_known(name)
    if num_classes < 1:
        raise ConfigError(f"num_classes must be at least 1, not {num_classes}")
    path = resolve_checkpoint(checkpoint, name)
    if keeps_head(head) and path is None:
        raise ConfigError("model.head keep takes the head of a file; model.checkpoint none has no file")
    model = timm.create_model(name, num_classes=num_classes, **arguments)
    assert isinstance(model, VisionMamba)
    if model.patch_embed.num_patches < 1:
        size, side = arguments.get("img_size"), model.patch_embed.patch_size[0]
        raise ConfigError(f"data.image_size {size} is smaller than a patch of {name} ({side} pixels)")
    if path is not None:
        load_checkpoint(model, path, head)
    return model


def adapt(model: VisionMamba, method: Method) -> VisionMamba:
    """Attach a method to a backbone, in place, and freeze what it does not train.

    A method from outside this package that declares `identity_at_start` is checked: the features of one random image,
    before and after, differ by at most 1e-4 of the largest (2e-2 below float32).

    It is also checked that a deep copy of the model uses an adapter of its own, whatever its hooks read.

    Raises:
        ConfigError: If the model carries a method already, the settings do not fit it, a hook would not take effect, or
            a promise of the method does not hold; the model is then as it was.
    """
    taken = model.adapter is not None or getattr(model, "method", None) is not None
    if taken:
        raise ConfigError("this model carries a method already; create a new one for another method")
    _check_foreign(model, method)
    shipped = type(method).__module__.startswith(f"{__package__}.")  # tests hold those to their promises
    before = None if shipped or not _declares_identity(method) else _probe(model)
    places = [(place, list(place)) for place in model.points.places()]
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    try:
        method.attach(model)
        if model.adapter is not None:  # as the backbone: its device, precision and mode
            model.adapter.to(model.cls_token).train(model.training)
        for name, parameter in model.named_parameters():
            trains = method.trains(name)
            if trains and not parameter.is_floating_point():
                raise ConfigError(
                    f"{type(method).__name__} trains {name}, which is quantised ({parameter.dtype}) and cannot be "
                    "trained; take a method that leaves it frozen"
                )
            parameter.requires_grad_(trains)
        _check_promises(model, method, before)
        if not shipped:
            _check_copies(model, type(method).__name__)
    except BaseException:
        kept = {id(place): hooks for place, hooks in places}
        for place in model.points.places():
            place[:] = kept.get(id(place), [])
        model.adapter = None
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(trained.get(name, parameter.is_floating_point()))
        raise
    model.method = method  # type: ignore[assignment]  # a plain object, no module
    return model


def _declares_identity(method: Method) -> bool:
    """Return `identity_at_start` of a method; refuse a method that does not declare it."""
    declared = getattr(method, "identity_at_start", None)
    if not isinstance(declared, bool):
        raise ConfigError(f"the method {type(method).__name__} must declare identity_at_start = True or False")
    return declared


def _check_promises(model: VisionMamba, method: Method, before: Tensor | None) -> None:
    """Check that the hooks of a method take effect, its count and, if `before` is given, its identity at the start."""
    name = type(method).__name__
    for mixer in model.mixers:
        mixer.check_hooks()
    inside = set(model.modules())
    for hook in (hook for place in model.points.places() for hook in place):
        owner = getattr(hook, "__self__", hook)
        if isinstance(owner, nn.Module) and owner not in inside and any(True for _ in owner.parameters()):
            raise ConfigError(
                f"{name}: a hook belongs to a {type(owner).__name__} that is not in the model, so it would be neither "
                "trained nor saved; put it into model.adapter"
            )
    for part in model.adapter.modules() if model.adapter is not None else ():
        for key, value in vars(part).items():
            if isinstance(value, FunctionType) and _closes_over(value, inside):
                raise ConfigError(
                    f"{name}: {key} of the adapter's {type(part).__name__} is a function that closes over a module of "
                    "the model: copies of the model would go on using that one; make it a method"
                )
    counted = sum(p.numel() for key, p in trained_parameters(model).items() if not key.startswith("head."))
    if (claimed := method.adapter_parameters(model)) != counted:
        raise ConfigError(
            f"{name}: adapter_parameters() says {claimed} and {counted} parameters train outside the head; correct the "
            "formula"
        )
    if before is None or (after := _probe(model)) is None:
        return
    same = after.shape == before.shape
    moved = float((after - before).abs().max() / before.abs().max()) if same else float("nan")
    bound = 1e-4 if torch.finfo(model.cls_token.dtype).bits >= 32 else 2e-2
    if not moved <= bound:
        raise ConfigError(
            f"{name}: identity_at_start is declared, and the features of a random image change by {moved:.2g} of the "
            f"largest ({bound:g} is allowed); start at zero, or declare identity_at_start = False"
        )


def _closes_over(function: FunctionType, modules: set[nn.Module]) -> bool:
    """Whether a function, or one that it closes over, holds one of the modules."""
    held = [cell.cell_contents for cell in function.__closure__ or () if cell != CellType()]
    return any(
        part in modules
        if isinstance(part, nn.Module)
        else isinstance(part, FunctionType) and part is not function and _closes_over(part, modules)
        for part in held
    )


def _check_copies(model: VisionMamba, name: str) -> None:
    """Check that no forward pass of a deep copy reads a trained parameter of the model itself.

    Raises:
        ConfigError: If one does: averages of weights and other copies would be wrong without a word.
    """
    own = {id(p): key for key, p in trained_parameters(model).items()}
    if torch.is_inference_mode_enabled() or model.cls_token.is_meta or model.cls_token.is_inference():
        return
    try:
        twin = copy.deepcopy(model)
    except Exception:  # whoever copies this model is told
        return
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # a hook may draw
        features = _features(twin)
    queue, seen = [features.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        key = own.get(id(getattr(node, "variable", None)))
        if key is not None:
            raise ConfigError(
                f"{name}: a deep copy of the model goes on using {key} of the original (hooks that read a class, a "
                "global, an attribute of a function …, or sit on modules of the backbone); keep what hooks read in "
                "model.adapter and register a method of it: points.on_tokens(adapter.add)"
            )
        queue.extend(after for after, _ in node.next_functions)


@torch.no_grad()
def _probe(model: VisionMamba) -> Tensor | None:
    """Return the features of one random image (1, D) in float64, without dropout; None where there are no values."""
    return None if model.cls_token.is_meta else _features(model)


def _features(model: VisionMamba) -> Tensor:
    """Return the features of one random image (1, D) in float64, without dropout."""
    weight = model.cls_token
    noise = torch.randn(1, model.in_chans, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(0))
    modes = [(module, module.training) for module in model.modules()]
    backend = model.scan_backend
    try:
        model.eval()
        if weight.device.type == "cpu":
            model.set_scan_backend("reference")  # no kernel is compiled for two images
        return model.forward_features(noise.to(weight)).double()
    finally:
        model.set_scan_backend(backend)
        for module, mode in modes:
            module.training = mode


# what pruning, weight_norm and parametrizations make of the name of a parameter
_DERIVED = re.compile(r"(\.parametrizations)?\.(\w+?)(_orig|_g|_v|\.original[01]?)$")


def _check_foreign(model: VisionMamba, method: Method) -> None:
    """Refuse to freeze, without a word, trained parameters that somebody put into the backbone.

    The backbone's own are known by their names, or, inside a wrapper, by their shapes.
    """
    mixer, embed = model.mixers[0], model.patch_embed
    (inner, states), width = mixer.A_log.shape, model.embed_dim
    with torch.device("meta"):
        sizes: dict[str, Any] = {
            "embed_dim": width,
            "d_state": states,
            "d_conv": mixer.d_conv,
            "expand": inner // width,
        }
        twin = VisionMamba(embed.img_size, embed.patch_size[0], embed.stride, model.in_chans, 0, depth=1, **sizes)
    plain = {name: tuple(p.shape) for name, p in twin.named_parameters()}
    unclaimed = Counter(("layers" if name.startswith("layers.") else "", shape) for name, shape in plain.items())
    left = {place: unclaimed.copy() for place in ["", *(f"layers.{i}" for i in range(len(model.layers)))]}
    others: list[tuple[str, str, str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        found = re.match(r"layers\.\d+", name)
        place, kind = (found[0], "layers") if found else ("", "")
        known = re.sub(r"^layers\.\d+", "layers.0", _DERIVED.sub(r".\2", name))
        if known in plain:
            left[place][kind, plain[known]] -= 1
        elif not name.startswith("head."):
            others.append((name, place, kind, parameter))
    for name, place, kind, parameter in others:
        key = kind, tuple(parameter.shape)
        left[place][key] -= 1
        if left[place][key] < 0 and parameter.requires_grad and not method.trains(name):
            raise ConfigError(
                f"{type(method).__name__} would freeze {name}, which is not a parameter of the backbone: the module "
                "that has it was put in before the method; attach the method first and replace modules after, or let "
                "trains() of a method of yours accept the name"
            )


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def create_model(
    name: str,
    *,
    num_classes: int,
    method: str = "svp",
    checkpoint: str | Path | None = None,
    head: Head | None = None,
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
        head: fresh: a new head; keep: that of the file, which must have `num_classes` classes. None is fresh.
        method_args: The method's settings.

    Returns:
        The model: normalised float (B, 3, H, W) → logits (B, num_classes). What the method trains has
        `requires_grad`, the rest has not.

    Raises:
        UsageError: If the backbone, the method or an argument of it is unknown; names the nearest.
        CheckpointError: If the weights cannot be had or do not fit.
    """
    made = build_method(METHODS.get(method), method, method_args)
    return adapt(create_backbone(name, num_classes=num_classes, checkpoint=checkpoint, head=head), made)
