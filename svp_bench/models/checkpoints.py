"""Backbone weights: where they come from, read safely, loaded strictly.

Published Vim files are `torch.save` dictionaries with the key `model` beside optimizer state, an EMA copy and an
`argparse.Namespace`. They are read with PyTorch's restricted unpickler, which runs no code of the file; `Namespace`,
plain data, is the one class allowed besides tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pickle
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from svp_bench.errors import CheckpointError, unknown_name
from svp_bench.models.vim import VisionMamba

__all__ = [
    "LoadReport",
    "backbone_digest",
    "embedded_checkpoint",
    "load_checkpoint",
    "read_state",
    "resolve_checkpoint",
]

SOURCES = ("hub", "embedded", "none")  # what `checkpoint` may be besides a path
_CONTAINERS = ("model", "state_dict")  # keys under which files hold their weights, in the order tried


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did.

    Attributes:
        path: The file.
        head_replaced: The file's head has another class count and was left out; the model keeps its own.
        pos_embed_resized: (from, to) grid of the position embedding if it was resized, else None.
    """

    path: Path
    head_replaced: bool
    pos_embed_resized: tuple[tuple[int, int], tuple[int, int]] | None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file: a published container, a plain state dict, or safetensors. Runs no code of the file.

    Raises:
        CheckpointError: If the file is missing, unreadable, holds pickled code, or holds no tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint file {str(path)!r}; give a path, or one of {', '.join(SOURCES)} (--model.checkpoint)"
        )
    if path.suffix == ".safetensors":
        try:
            state: dict[str, Tensor] = load_file(path)
            return state
        except Exception as error:  # a damaged header can make the reader raise anything
            raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(error)})") from None
    content = load_pickle_safely(path)
    for key in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path}: holds {type(content).__name__}, not a state dict or a container of one")
    state = {str(key).removeprefix("module."): value for key, value in content.items()}
    strangers = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{path}: is no state dict: {strangers[0]!r} is a {type(state[strangers[0]]).__name__}")
    return state


def load_pickle_safely(path: Path) -> Any:
    """Read a `torch.save` file with the restricted unpickler.

    Raises:
        CheckpointError: If it is unreadable or holds anything but tensors and plain data.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" ({named.group(1)})" if named else ""
        raise CheckpointError(
            f"{path}: refused: it is no checkpoint, or it holds pickled code or objects{what} beside tensors and plain "
            "data; nothing of it was run. Save the state dict alone, best as .safetensors, where you trust the file"
        ) from None
    except Exception:  # a damaged file can make the reader raise anything (struct.error, MemoryError, …)
        raise CheckpointError(f"{path}: truncated or not a checkpoint; get the file again, or give another") from None


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:120]}"


def load_checkpoint(model: VisionMamba, path: str | Path) -> LoadReport:
    """Load backbone weights into a model, strictly, whatever method is attached to it.

    The head is taken from the file if it is one linear layer with the model's class count, else the model keeps its
    own. A position embedding of another grid is resized (bicubic, square source grid), the class token's row apart:
    it stands in the middle.

    Args:
        model: The model; its `adapter`, if any, is left alone.
        path: A published container, a plain state dict, or a .safetensors file.

    Returns:
        What was done beyond copying.

    Raises:
        CheckpointError: If the file is missing, unreadable or unsafe, or if any tensor is missing, left over or of
            another shape; lists them. The model is then unchanged.
    """
    path = Path(path)
    state = read_state(path)
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("adapter.")}
    head = {name for name in own if name.startswith("head.")}
    theirs = {name for name in state if name.startswith("head.")}
    fits = theirs == head and all(state[name].shape == own[name].shape for name in head)
    for name in theirs if not fits else ():
        del state[name]
    resized = _fit_pos_embed(state, model, path)
    expected = set(own) - (head if not fits else set())
    _check(state, {name: own[name] for name in expected}, path, model)
    with torch.no_grad():
        for name in expected:
            own[name].copy_(state[name])
    return LoadReport(path, head_replaced=bool(theirs) and not fits, pos_embed_resized=resized)


def _fit_pos_embed(
    state: dict[str, Tensor], model: VisionMamba, path: Path
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    source = state.get("pos_embed")
    grid = (model.patch_embed.grid_size[0], model.patch_embed.grid_size[1])
    width = model.embed_dim
    if source is None or source.ndim != 3 or source.shape[-1] != width or source.shape == model.pos_embed.shape:
        return None
    patches = source.shape[1] - 1
    side = round(patches**0.5)
    if side * side != patches:
        raise CheckpointError(f"{path}: its position embedding has {patches} patches, which is no square grid")
    middle = patches // 2
    rows = torch.cat([source[:, :middle], source[:, middle + 1 :]], dim=1)
    rows = resample_abs_pos_embed(
        rows, new_size=list(grid), old_size=[side, side], num_prefix_tokens=0, interpolation="bicubic"
    )
    at = model.cls_index
    state["pos_embed"] = torch.cat([rows[:, :at], source[:, middle : middle + 1], rows[:, at:]], dim=1)
    return (side, side), grid


def _check(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, model: VisionMamba) -> None:
    missing = sorted(set(expected) - set(state))
    left_over = sorted(set(state) - set(expected))
    wrong = sorted(name for name in set(state) & set(expected) if state[name].shape != expected[name].shape)
    if not (missing or left_over or wrong):
        return
    parts = []
    if wrong:
        name = wrong[0]
        parts.append(
            f"{len(wrong)} of another shape (first {name}: {tuple(state[name].shape)} in the file, "
            f"{tuple(expected[name].shape)} in the model)"
        )
    if missing:
        parts.append(f"{len(missing)} missing ({_some(missing)})")
    if left_over:
        parts.append(f"{len(left_over)} left over ({_some(left_over)})")
    text = f"{path}: does not fit {_model_name(model)}: " + "; ".join(parts)
    if left_over and not (missing or wrong) and all(name.startswith("adapter.") for name in left_over):
        raise CheckpointError(f"{text}; the file holds a method's adapter too: save the backbone alone")
    fit = _guess(state)
    raise CheckpointError(f"{text}; the file looks like {fit}" if fit else text)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _model_name(model: VisionMamba) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    return str(name) if name else f"this model (width {model.embed_dim}, depth {model.depth})"


def _guess(state: Mapping[str, Tensor]) -> str | None:
    """Name the Vim that a state dict belongs to, from its width and depth."""
    norm = state.get("norm_f.weight")
    layers = {int(m.group(1)) for name in state if (m := re.match(r"layers\.(\d+)\.mixer\.A_b_log", name))}
    if norm is None or not layers:
        return None
    width, depth = norm.shape[0], max(layers) + 1
    sizes = {(192, 24): "vim_tiny", (384, 24): "vim_small", (768, 24): "vim_base", (64, 8): "vim_nano"}
    size = sizes.get((width, depth))
    return f"{size} (width {width}, depth {depth})" if size else f"a Vim of width {width} and depth {depth}"


def backbone_digest(model: VisionMamba) -> str:
    """SHA-256 over the names, shapes and float32 values of the backbone's tensors, without head and adapter.

    The same weights have the same digest whatever file they came from.
    """
    sha = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if not name.startswith(("head.", "adapter.")):
            sha.update(f"{name} {tuple(value.shape)}\n".encode())
            sha.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"


def embedded_checkpoint(architecture: str) -> Path | None:
    """Return the weights that ship with the package for an architecture, or None if there are none."""
    path = Path(__file__).parent / "embedded" / f"{architecture}.safetensors"
    return path if path.is_file() else None


def resolve_checkpoint(source: str | Path | None, architecture: str) -> Path | None:
    """Turn `--model.checkpoint` into a file.

    Args:
        source: "hub" (local hub cache, else a download), "embedded", "none" or None (random weights), or a path.
        architecture: timm name, e.g. "vim_small_patch16_224".

    Returns:
        The file, or None for random weights.

    Raises:
        CheckpointError: If there is no such file, or the hub cannot be reached; says what to do.
    """
    if source is None or source == "none":
        return None
    if source == "hub":
        return _from_hub(architecture)
    if source == "embedded":
        path = embedded_checkpoint(architecture)
        if path is None:
            raise CheckpointError(
                f"no weights of {architecture} are embedded in this package; use --model.checkpoint hub, none or PATH"
            )
        return path
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f"--model.checkpoint {str(source)!r} is a folder; give the file of the weights")
    if not path.is_file():
        looks_like_name = path.suffix == "" and path.parent == Path(".")
        if looks_like_name:
            raise unknown_name("checkpoint", str(source), [*SOURCES, "PATH"], error=CheckpointError)
        raise CheckpointError(f"no checkpoint file {str(source)!r}; --model.checkpoint is hub, embedded, none or PATH")
    return path


def _from_hub(architecture: str) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache
    from huggingface_hub.utils import logging
    from timm.models import get_pretrained_cfg, is_model

    cfg = get_pretrained_cfg(architecture, allow_unregistered=False) if is_model(architecture) else None
    if cfg is None or not cfg.hf_hub_id or not cfg.hf_hub_filename:
        raise CheckpointError(
            f"no published checkpoint of {architecture} is known; use --model.checkpoint PATH, embedded or none"
        )
    repo, file = cfg.hf_hub_id, cfg.hf_hub_filename
    cached = try_to_load_from_cache(repo, file)
    if isinstance(cached, str):
        return Path(cached)
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    try:
        _probe(endpoint)
        logging.set_verbosity_error()  # its retries would be said several times over; the line below says it once
        return Path(hf_hub_download(repo, file, endpoint=endpoint, etag_timeout=10))
    except Exception as error:  # the hub client raises many kinds; each means the same to the user
        raise CheckpointError(
            f"cannot get the weights of {architecture}: {repo} is not in the local hub cache and {endpoint} gave none "
            f"({_first_line(error)}); download https://huggingface.co/{repo}/resolve/main/{file} elsewhere and pass "
            "--model.checkpoint PATH, or use --model.checkpoint none for random weights"
        ) from None


def _probe(endpoint: str) -> None:
    """Fail at once where there is no way to the hub: its client would try for 20 s and more."""
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy", "HTTP_PROXY", "all_proxy")):
        return
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise ConnectionError("HF_HUB_OFFLINE is set")
    url = urlsplit(endpoint)
    port = url.port or (443 if url.scheme == "https" else 80)
    socket.create_connection((url.hostname or "", port), timeout=10).close()
