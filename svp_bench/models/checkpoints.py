"""Load backbone weights strictly and as a whole, find them by name, digest and save them."""

from __future__ import annotations

import hashlib
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save
from torch import Tensor

from svp_bench.core.atomic import replacing
from svp_bench.core.errors import CheckpointError, UsageError, plural, unknown_name
from svp_bench.models.backbone import HEAD_PREFIXES, Backbone
from svp_bench.models.hub_weights import fetch_weights
from svp_bench.models.layers import resize_positions
from svp_bench.models.weight_files import (
    GRID_KEY,
    WRAPPER_PREFIXES,
    Grid,
    LoadReport,
    by,
    dtype_name,
    first_line,
    read_weights,
    shown,
)

Head = Literal["fresh", "keep"]
MAX_PATCHES = 2**16  # 256 × 256; a larger position embedding is refused before it is resized


def keeps_head(head: str | None) -> bool:
    """Whether the head is taken from the file; None means fresh.

    Raises:
        UsageError: If `head` is neither fresh nor keep.
    """
    if head is not None and head not in get_args(Head):
        raise unknown_name("head", str(head), get_args(Head))
    return head == "keep"


def load_checkpoint(model: Backbone, path: str | Path, head: Head | None = None) -> LoadReport:
    """Load backbone weights into a model, strictly and as a whole; its adapter stays as it is.

    A position embedding of another grid is resized (bicubic); the rows of other tokens are copied.
    The grid of a file that does not state it is taken as square. Numbers are cast to the model's precision.

    Args:
        model: The model.
        path: A published container, a plain state dict, or a .safetensors file.
        head: fresh (as None): leave the model's head as it is; keep: take the head of the file.

    Returns:
        The changes in addition to copying; also stored as `model.load_report`.

    Raises:
        CheckpointError: If the file is not readable or unsafe, a tensor is missing, unexpected or of another shape, or
            the head to keep does not fit. The model is then unchanged.
        UsageError: If `head` is neither fresh nor keep.
    """
    keep, path = keeps_head(head), Path(path)
    file = read_weights(path)
    given = dict(file.tensors)
    own = {name: value.detach() for name, value in model.state_dict().items() if not name.startswith("adapter.")}
    if any(value.is_meta for value in own.values()):
        raise CheckpointError(f"{path}: the model is on the meta device and cannot take weights")
    own_head, given_head = ({k: t for k, t in state.items() if k.startswith(HEAD_PREFIXES)} for state in (own, given))
    if keep:
        _check_head(given_head, own_head, path)
    else:
        own, given = ({k: t for k, t in state.items() if not k.startswith(HEAD_PREFIXES)} for state in (own, given))
    resized = _fit_pos_embed(given, model, path, file.grid)
    _check_names_and_shapes(given, own, path, model)
    cast = Counter[str]()
    for name, target in own.items():
        given[name] = given[name].detach().to(target.dtype)
        if file.tensors[name].dtype != target.dtype:
            cast[f"{dtype_name(file.tensors[name])} -> {dtype_name(target)}"] += 1
            if not bool(torch.isfinite(given[name]).all()):
                raise CheckpointError(f"{path}: {name} holds numbers beyond {dtype_name(target)}, the model's type")
    _copy(given, own, path)
    model.load_report = LoadReport(
        path,
        resized,
        dropped=() if keep else tuple(sorted(given_head)),
        kept=tuple(sorted(given_head)) if keep else (),
        cast=tuple(f"{change} ({plural(count, 'tensor')})" for change, count in sorted(cast.items())),
        head_digest=_digest({name: given[name] for name in own_head}) if keep else None,
    )
    return model.load_report


def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into the model; if one copy fails, restore the others."""
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            for name, value in source.items():
                before[name] = target[name].clone()
                target[name].copy_(value)
        except BaseException as error:
            for name, value in before.items():
                with suppress(RuntimeError):  # the one that cannot be written
                    target[name].copy_(value)
            if not isinstance(error, Exception):
                raise
            raise CheckpointError(
                f"{path}: {shown([*before][-1])} could not be copied into the model ({first_line(error)}); the "
                "model is unchanged"
            ) from None


def _check_head(given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    if own and {name: t.shape for name, t in given.items()} == {name: t.shape for name, t in own.items()}:
        return

    def described(head: Mapping[str, Tensor]) -> str:
        if sorted(head) == ["head.bias", "head.weight"] and head["head.weight"].ndim == 2:
            return "has a head of {} classes (width {})".format(*head["head.weight"].shape)
        tensors = _some([f"{shown(name)} {tuple(head[name].shape)}" for name in sorted(head)])
        return f"has a head of {tensors}" if head else "has no head"

    raise CheckpointError(
        f"{path}: the file {described(given)}, the model {described(own)}: --model.head keep needs the same head in "
        "both; leave it out for a fresh one"
    )


def _fit_pos_embed(
    given: dict[str, Tensor], model: Backbone, path: Path, stated: Grid | None
) -> tuple[Grid, Grid] | None:
    """Resize the position embedding, (1, patches + 1, D), to the model's grid; return (old, new) if they differ.

    Raises:
        CheckpointError: If its rows are not a grid with a class token, or too many.
    """
    source = given.get("pos_embed")
    if source is None or source.ndim != 3 or source.shape[0] != 1 or source.shape[-1] != model.embed_dim:
        return None  # `_check_names_and_shapes` reports it
    others = len(model.position_rows(model.num_patches))
    patches = source.shape[1] - others
    if not 1 <= patches <= MAX_PATCHES:
        tokens = "a class token and " if others == 1 else f"{others} other tokens and " if others else ""
        raise CheckpointError(f"{path}: pos_embed has {source.shape[1]} rows, not {tokens}1 to {MAX_PATCHES} patches")
    old = stated or (math.isqrt(patches), math.isqrt(patches))
    if math.prod(old) != patches:
        problem = (
            f"and {GRID_KEY} states {by(old)}"
            if stated
            else "which is not a square grid; save the weights with svp_bench.models.checkpoints.save_weights, or "
            f"state {GRID_KEY} = 'ROWSxCOLUMNS' in the metadata of a .safetensors file or next to the weights"
        )
        raise CheckpointError(f"{path}: its position embedding has {patches} patches, {problem}")
    new = model.grid_size
    if old == new:
        return None
    given["pos_embed"] = resize_positions(source.detach().float(), old, new, model.position_rows)
    return old, new


def _check_names_and_shapes(
    given: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path, model: Backbone
) -> None:
    missing, unexpected = sorted({*own} - {*given}), sorted({*given} - {*own})
    wrong = sorted(name for name in {*given} & {*own} if given[name].shape != own[name].shape)
    parts = []
    if wrong:
        shapes = f"{tuple(given[wrong[0]].shape)} in the file, {tuple(own[wrong[0]].shape)} in the model"
        parts.append(f"{len(wrong)} of another shape (first {wrong[0]}: {shapes})")
    parts += [f"{len(missing)} missing ({_some(missing)})"] if missing else []
    parts += [f"{len(unexpected)} left over ({_some(unexpected)})"] if unexpected else []
    if not parts:
        return
    hint = None
    if unexpected and not (missing or wrong) and all(name.startswith("adapter.") for name in unexpected):
        hint = "the file also holds a method's adapter: save the backbone alone"
    elif missing and all(name.startswith(("adapter.", *HEAD_PREFIXES)) for name in given):
        hint = "the trained part of a run alone goes to svp-bench predict --ckpt"
    elif missing and (prefix := _common_prefix(missing, unexpected)):
        hint = f"names begin with {shown(prefix)}: remove it ({', '.join(WRAPPER_PREFIXES)} are removed automatically)"
    elif architecture := _guess_architecture(given):
        hint = f"the file looks like {architecture}"
    problem = "; ".join([*parts, hint] if hint else parts)
    raise CheckpointError(f"{path}: does not fit {_model_name(model)}: {problem}")


def _common_prefix(missing: Sequence[str], unexpected: Sequence[str]) -> str | None:
    """Return the text in front of every missing name in the file, if it is the same."""
    found = {*unexpected}
    prefixes = {name.removesuffix(missing[0]) for name in found if name.endswith(f".{missing[0]}")}
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in found for name in missing)), None)


def _some(names: Sequence[str], most: int = 4) -> str:
    return ", ".join(map(shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _model_name(model: Backbone) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    return str(name) if name else f"this model (width {model.embed_dim}, depth {model.depth})"


def _guess_architecture(state: Mapping[str, Tensor]) -> str | None:
    """Name the Vim that a state dict belongs to, from its width and depth."""
    norm = state.get("norm_f.weight")
    layers = [int(m[1]) for name in state if (m := re.match(r"layers\.(\d{1,4})\.mixer\.A_b_log", name))]
    if norm is None or norm.ndim != 1 or not layers:
        return None
    width, depth = norm.shape[0], max(layers) + 1
    sizes = {(192, 24): "vim_tiny", (384, 24): "vim_small", (768, 24): "vim_base", (64, 8): "vim_nano"}
    size = sizes.get((width, depth))
    return f"{size} (width {width}, depth {depth})" if size else f"a Vim of width {width} and depth {depth}"


def backbone_digest(model: Backbone) -> str:
    """Return the SHA-256 of the backbone's tensors (names, shapes, float32 values), without head and adapter."""
    return _digest({k: v for k, v in model.state_dict().items() if not k.startswith((*HEAD_PREFIXES, "adapter."))})


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"


def save_weights(model: Backbone, path: str | Path) -> None:
    """Write a backbone and its head as .safetensors, with the grid of its position embedding in the metadata.

    Args:
        model: A backbone without adapter (`model.method.merge(model)` folds a mergeable method in).
        path: The file, *.safetensors; replaced atomically.

    Raises:
        UsageError: If the model carries an adapter, or the name has another suffix.
        CheckpointError: If the file cannot be written.
    """
    path = Path(path)
    if model.adapter is not None:
        raise UsageError("the model carries a method's adapter; save a plain backbone, or merge the method first")
    if path.suffix != ".safetensors":
        raise UsageError(f"weights are saved as *.safetensors, not {path.name!r}")
    state = {name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()}
    content = save(state, metadata={GRID_KEY: by(model.grid_size)})
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror or error})") from None


def embedded_checkpoint(architecture: str) -> Path | None:
    """Return the weights that ship with the package for an architecture, or None."""
    path = Path(__file__).parent / "embedded" / f"{architecture}.safetensors"
    return path if path.is_file() else None


def resolve_checkpoint(source: str | Path | None, architecture: str) -> Path | None:
    """Return the file of `--model.checkpoint`.

    Args:
        source: "hub" (see `svp_bench.models.hub_weights`), "embedded", "none" or None (random weights), or a path.
        architecture: timm name, e.g. "vim_small_patch16_224".

    Returns:
        The file, or None for random weights.

    Raises:
        CheckpointError: If there is no such file, or the hub cannot be reached.
    """
    if source is None or source == "none":
        return None
    if source == "hub":
        return fetch_weights(architecture)[0]
    if source == "embedded":
        if embedded := embedded_checkpoint(architecture):
            return embedded
        raise CheckpointError(
            f"no weights of {architecture} are embedded in this package; use --model.checkpoint hub, none or PATH"
        )
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f"--model.checkpoint {str(source)!r} is a folder; give the weight file")
    if path.is_file():
        return path
    if path.suffix == "" and path.parent == Path("."):
        raise unknown_name("checkpoint", str(source), ["hub", "embedded", "none", "PATH"])
    raise CheckpointError(f"no checkpoint file {str(source)!r}; --model.checkpoint is hub, embedded, none or PATH")
