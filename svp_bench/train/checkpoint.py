"""A checkpoint of ours, read once and checked: what it says about its run, and that its parts are what they should be.

A file from elsewhere, or a damaged one, is refused in one line here; nobody behind this looks at unchecked keys.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from svp_bench.core.errors import CheckpointError
from svp_bench.data.reading import show
from svp_bench.data.transforms import INTERPOLATIONS, RESIZES
from svp_bench.models.weight_files import check_tensor, load_pickle_safely

__all__ = ["SAVED_KEY", "About", "Saved", "check_tensors", "file_weights_digest", "weights_digest", "wrong_part"]

SAVED_KEY = "svp_bench"  # our key in a Lightning checkpoint
_UNREADABLE = "; get the file again, or give another"  # the end of what `load_pickle_safely` says of a damaged file


@dataclass(frozen=True)
class About:
    """What a checkpoint says about its run. Older ones say nothing of what may be None.

    Attributes:
        task: Full name of the task.
        protocol: Name of the protocol card.
        stage: final or select.
        run_id: The run's name.
        data_digest: "sha256:…" of the lists that the run reads.
        backbone: timm name of the backbone.
        backbone_digest: "sha256:…" of its weights.
        checkpoint: Where these came from.
        init_seed: Of the random initial weights.
        method: "module.Class" of the method.
        method_args: Its settings.
        num_classes: Classes.
        image_size: Height and width of the images.
        head_hidden: Width of the head's first layer, if it has two.
        head_digest: "sha256:…" of the head that the run began with, if that was the checkpoint's.
        pos_embed_grid: Rows and columns of patches.
        input_attention: On the normalised image.
        ema_decay: Of the averaged weights, if there are any.
        ema_evaluate: Whether these are evaluated.
        view: How an image is brought to its size: resize, crop_ratio and interpolation; and the depth of deep images.
        class_names: What the classes are called.
    """

    task: str
    protocol: str
    stage: str
    run_id: str | None
    data_digest: str | None
    backbone: str
    backbone_digest: str
    checkpoint: str
    init_seed: int
    method: str
    method_args: Mapping[str, Any]
    num_classes: int
    image_size: tuple[int, int]
    head_hidden: int | None
    head_digest: str | None
    pos_embed_grid: tuple[int, int] | None
    input_attention: str | None
    ema_decay: float | None
    ema_evaluate: bool | None
    view: Mapping[str, Any] | None
    class_names: tuple[str, ...] | None

    @classmethod
    def of(cls, value: object, where: str, remedy: str | None = None) -> About:
        """Check what a checkpoint says.

        Args:
            value: The part `SAVED_KEY` of a checkpoint.
            where: What it is of, for messages.
            remedy: What to do if it is damaged.

        Raises:
            CheckpointError: If a part is missing or of another kind.
        """
        if not isinstance(value, Mapping):
            raise wrong_part(where, SAVED_KEY, value, "what svp-bench says about the run", remedy)
        found: dict[str, Any] = {}
        for field in fields(cls):
            what, fits = _PARTS[field.name]
            part = value.get(field.name)
            if not (fits(part) or (part is None and field.name in _OPTIONAL)):
                raise wrong_part(where, f"{SAVED_KEY}.{field.name}", part, what, remedy)
            found[field.name] = tuple(part) if isinstance(part, (list, tuple)) else part
        names, classes = found["class_names"], found["num_classes"]
        if names is not None and len(names) != classes:
            raise wrong_part(where, f"{SAVED_KEY}.class_names", names, f"{classes} names", remedy)
        return cls(**found)


def wrong_part(where: str, part: str, value: object, expected: str, remedy: str | None = None) -> CheckpointError:
    """Return the error for a part of a checkpoint that is missing or of another kind.

    Args:
        where: The file.
        part: Name of the part.
        value: What it is; None if it is missing.
        expected: What it should be.
        remedy: What to do; to get the file again, by default.
    """
    given = "is missing" if value is None else f"is {show(value)}"
    return CheckpointError(
        f"{where}: damaged, or not written by svp-bench: {part} {given}, expected {expected}"
        f"{f'; {remedy}' if remedy else _UNREADABLE}"
    )


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value)


def _is_number(value: object, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_plain_mapping(value: object) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


_MOST_BITS = 64


def _is_view(value: object) -> bool:
    if not isinstance(value, Mapping) or not {*value} <= {"resize", "interpolation", "crop_ratio", "depth"}:
        return False
    depth = value.get("depth", [None, None])
    if not isinstance(depth, (list, tuple)) or len(depth) != 2:
        return False
    if any(bits is not None and not (_is_number(bits) and bits <= _MOST_BITS) for bits in depth):
        return False
    ratio = value.get("crop_ratio", 1.0)
    return (
        value.get("resize") in RESIZES
        and value.get("interpolation") in INTERPOLATIONS
        and isinstance(ratio, (int, float))
        and 0 < ratio <= 1
    )


def _is_pair(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(_is_number(side, 1) for side in value)


_TEXT = ("a text", _is_text)
_PARTS: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    **dict.fromkeys(("task", "protocol", "run_id", "data_digest", "backbone", "backbone_digest"), _TEXT),
    **dict.fromkeys(("checkpoint", "method", "input_attention", "head_digest"), _TEXT),
    "stage": ("final or select", lambda value: value in ("final", "select")),
    "init_seed": ("a whole number of 0 or above", lambda value: _is_number(value) and value < 2**63),
    "method_args": ("a mapping of names", _is_plain_mapping),
    "num_classes": ("a whole number of 1 or above", lambda value: _is_number(value, 1)),
    "image_size": ("height and width", _is_pair),
    "pos_embed_grid": ("rows and columns", _is_pair),
    "head_hidden": ("a whole number of 1 or above", lambda value: _is_number(value, 1)),
    "ema_decay": ("a number between 0 and 1", lambda value: isinstance(value, float) and 0 < value < 1),
    "ema_evaluate": ("true or false", lambda value: isinstance(value, bool)),
    "view": ("resize, crop_ratio, interpolation and depth", _is_view),
    "class_names": (
        "a list of names",
        lambda value: isinstance(value, (list, tuple)) and all(isinstance(name, str) for name in value),
    ),
}
_OPTIONAL = {"run_id", "data_digest", "head_hidden", "input_attention", "ema_decay", "ema_evaluate", "view"}
_OPTIONAL |= {"class_names", "head_digest", "pos_embed_grid"}


@dataclass(frozen=True)
class Saved:
    """A checkpoint of ours.

    Attributes:
        path: The file.
        content: All of it, as Lightning takes it.
        about: What it says about its run.
        epoch: The epoch that it was written in, from 0.
        global_step: Optimizer steps behind it.
    """

    path: Path
    content: dict[str, Any]
    about: About
    epoch: int
    global_step: int

    @classmethod
    def read(cls, path: str | Path, remedy: str | None = None) -> Saved:
        """Read and check a checkpoint; no code of the file is run.

        Args:
            path: The file.
            remedy: What to do if it is damaged; to get it again, by default.

        Raises:
            CheckpointError: If it is missing, unreadable, not ours, or a part is missing or of another kind.
        """
        path = Path(path)
        try:
            content = load_pickle_safely(path)
        except CheckpointError as error:
            reason = str(error).removesuffix(_UNREADABLE)
            if remedy is None or reason == str(error):
                raise
            raise CheckpointError(f"{reason}; {remedy}") from None
        if not isinstance(content, dict) or SAVED_KEY not in content:
            what_next = remedy or "weights of a backbone alone go to --model.checkpoint PATH"
            raise CheckpointError(f"{path}: no svp-bench checkpoint; {what_next}")
        about = About.of(content[SAVED_KEY], str(path), remedy)
        for key in ("epoch", "global_step"):
            if not _is_number(content.get(key)):
                raise wrong_part(str(path), key, content.get(key), "a whole number of 0 or above", remedy)
        for key in ("state_dict", *(["ema"] if about.ema_decay is not None else [])):
            if not _is_state_dict(content.get(key)):
                raise wrong_part(str(path), key, content.get(key), "tensors by name", remedy)
            check_tensors(content[key], str(path), key, remedy)
        return cls(path, content, about, content["epoch"], content["global_step"])


def check_tensors(tensors: Mapping[str, Tensor], where: str, part: str, remedy: str | None = None) -> None:
    """Check that tensors of a checkpoint are weights (`check_tensor`).

    Args:
        tensors: By name.
        where: The file.
        part: What they are in it, for messages.
        remedy: What to do if one is not.

    Raises:
        CheckpointError: If one is not; names it.
    """
    for name, value in tensors.items():
        try:
            check_tensor(f"{part}.{name}", value, where)
        except CheckpointError as error:
            raise CheckpointError(f"{error}{f'; {remedy}' if remedy else _UNREADABLE}") from None


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(part, Tensor) for name, part in value.items()
    )


def weights_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of the weights in a checkpoint: names, types, shapes and bytes of all tensors that it holds.

    Args:
        content: A checkpoint, or the parts of one that hold weights: `state_dict`, and `ema` if weights are averaged.
    """
    sha = hashlib.sha256()
    for part in ("state_dict", "ema"):
        for name, value in sorted((content.get(part) or {}).items()):
            tensor = value.detach().cpu().contiguous()
            sha.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return f"sha256:{sha.hexdigest()}"


def file_weights_digest(path: str | Path) -> str:
    """Return `weights_digest` of a checkpoint file; that of a record's `checkpoint_file` equals its `weights_digest`.

    Raises:
        CheckpointError: If the file is missing, unreadable, or not a checkpoint of a run.
    """
    return weights_digest(Saved.read(path).content)
