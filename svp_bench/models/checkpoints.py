"""Backbone weights: where they come from, read safely, loaded strictly and as a whole.

Published Vim files are `torch.save` dictionaries with the key `model` beside optimizer state, an EMA copy and an
`argparse.Namespace`. They are read with PyTorch's restricted unpickler, which runs no code of the file; `Namespace`,
plain data, is the one class allowed besides tensors.

A file may state the grid of its position embedding, "ROWSxCOLUMNS" of patches, under the name `pos_embed_grid`: in the
metadata of a .safetensors file (`save_weights` writes it), or as a key next to the weights in a `torch.save` file. The
grid of a file that does not state it is taken as square.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import os
import pickle
import pickletools
import re
import socket
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from svp_bench.core.atomic import replacing
from svp_bench.core.errors import CheckpointError, UsageError, unknown_name
from svp_bench.models.vim import VisionMamba, resize_positions

__all__ = [
    "Head",
    "LoadReport",
    "backbone_digest",
    "check_tensor",
    "embedded_checkpoint",
    "keeps_head",
    "load_checkpoint",
    "read_state",
    "resolve_checkpoint",
    "save_weights",
]

SOURCES = ("hub", "embedded", "none")  # what `checkpoint` may be besides a path
Head = Literal["fresh", "keep"]
GRID_KEY = "pos_embed_grid"
MAX_PATCHES = 2**16  # 256 x 256; a larger position embedding is refused before it is resized

_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_ema")  # an EMA copy only where nothing else is
_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # of wrappers: DDP, torch.compile, Lightning, timm's
_NESTED = 4  # containers in one another, at most
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFE_DTYPES = ("F32", "F16", "BF16", "F64")
_UNREADABLE = "; get the file again, or give another"
_ALLOWED = ("collections.OrderedDict", "torch._utils._rebuild", "torch.storage.", "argparse.Namespace")
_MOST_OPCODES = 10**6  # of a pickle that is searched for the names of classes


@dataclass(frozen=True)
class LoadReport:
    """What `load_checkpoint` did in addition to copying.

    Attributes:
        path: The file.
        resized: The position embedding's change of grid, e.g. ("pos_embed 14x14 -> 4x16",).
        dropped: Names of the file's tensors that were left out: its head, where the model keeps its own.
        kept: Names of the head's tensors that were taken from the file.
        cast: Changes of precision, e.g. ("float16 -> float32 (141 tensors)",).
        pos_embed_resized: (from, to) grid of the position embedding if it was resized, else None.
        head_digest: "sha256:…" of the head that was taken from the file, else None.
    """

    path: Path
    resized: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    pos_embed_resized: tuple[tuple[int, int], tuple[int, int]] | None = None
    head_digest: str | None = None

    @property
    def head_replaced(self) -> bool:
        """Whether the file has a head that was left out."""
        return bool(self.dropped)

    def for_record(self) -> dict[str, list[str]] | None:
        """Return what sets this load apart from an ordinary one, for `Record.checkpoint_load`; None if nothing does.

        Ordinary is a copy of the backbone with a fresh head, whether the file has a head or not.
        """
        kept = [f"head {self.head_digest}"] if self.head_digest else []
        changes = {"resized": [*self.resized], "kept": kept, "cast": [*self.cast]}
        return {name: lines for name, lines in changes.items() if lines} or None

    def describe(self) -> str | None:
        """Return one line for people, or None after a plain copy."""
        parts = [f"resized {line}" for line in self.resized]
        parts += [f"kept the head of the file ({', '.join(self.kept)})"] if self.kept else []
        parts += [f"dropped the head of the file ({', '.join(map(_shown, self.dropped))})"] if self.dropped else []
        parts += [f"cast {line}" for line in self.cast]
        return "; ".join(parts) or None


# --- reading a file --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """Weights as a file holds them: tensors by the published names, and the grid that it states, if any."""

    state: dict[str, Tensor]
    grid: tuple[int, int] | None


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the weights of a file: a published container, a plain state dict, or safetensors. Runs no code of the file.

    Names of wrappers (`module.`, `model.`, `_orig_mod.`, `backbone.`) are taken off.

    Raises:
        CheckpointError: If the file is missing, unreadable, holds pickled code, holds anything but dense floating point
            tensors of finite numbers, or holds a tensor under two spellings of its name.
    """
    return _read(Path(path)).state


def _read(path: Path) -> _File:
    if path.is_dir():
        raise CheckpointError(f"no checkpoint file {str(path)!r}, it is a folder; give the file of the weights")
    if not path.is_file():
        raise CheckpointError(
            f"no checkpoint file {str(path)!r}; give a path, or one of {', '.join(SOURCES)} (--model.checkpoint)"
        )
    named: Mapping[Any, Any]
    if path.suffix == ".safetensors" or _begins_as_safetensors(path):
        named, stated = _read_safetensors(path)
    else:
        named, stated = _weights_in(load_pickle_safely(path), path)
    state = _by_published_name(named, path)
    for name, value in state.items():
        check_tensor(name, value, str(path))
    return _File(state, None if stated is None else _grid_of(stated, path))


def _begins_as_safetensors(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(9)[8:] == b"{"
    except OSError:
        return False


def _read_safetensors(path: Path) -> tuple[dict[str, Any], object]:
    """Return tensors by name, and the grid that the metadata state or None."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        twice = [name for name, times in Counter(name for name, _ in pairs).items() if times > 1]
        if twice:
            raise CheckpointError(f"{path}: {_shown(twice[0])} stands in it {_times(pairs, twice[0])}; save it once")
        return dict(pairs)

    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("HeaderTooLarge")
            header = json.loads(file.read(length), object_pairs_hook=unique)
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] not in _SAFE_DTYPES:
                raise CheckpointError(
                    f"{path}: {_shown(name)} is of type {_shown(entry['dtype'])}; weights are floating point numbers "
                    f"({', '.join(_SAFE_DTYPES)})"
                )
        stated = (header.get("__metadata__") or {}).get(GRID_KEY)
        return {**load_file(path)}, stated
    except CheckpointError:
        raise
    except Exception as error:  # a damaged header can make the reader raise anything
        raise CheckpointError(f"{path}: not a readable safetensors file ({_first_line(error)})") from None


def _times(pairs: Sequence[tuple[str, Any]], name: str) -> str:
    count = sum(other == name for other, _ in pairs)
    return "twice" if count == 2 else f"{count} times"


def _weights_in(content: object, path: Path) -> tuple[Mapping[Any, Any], object]:
    """Return the state dict that a `torch.save` file holds, out of its containers, and the grid that it states or None.

    Raises:
        CheckpointError: If it holds none, or more than one that it could be.
    """
    where, stated = "", None
    for _ in range(_NESTED):
        if not isinstance(content, Mapping):
            break
        stated = content.get(GRID_KEY, stated)
        about = content.get("svp_bench")  # a run of ours states it there
        stated = about.get(GRID_KEY, stated) if isinstance(about, Mapping) else stated
        inner = [key for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
        inner = [key for key in inner if _holds_weights(content[key])] or inner
        choices = [key for key in inner if key != "model_ema"] or inner
        if len(choices) > 1:
            raise CheckpointError(
                f"{path}: holds weights under {' and under '.join(map(repr, choices))}; save the right ones alone"
            )
        if not choices:
            break
        content, where = content[choices[0]], f"{where}[{choices[0]!r}]"
    under = f" under {where}" if where else ""
    if not isinstance(content, Mapping) or not content:
        what = "an empty dict" if isinstance(content, Mapping) else f"{type(content).__name__}"
        raise CheckpointError(
            f"{path}: holds {what}{under}, not a state dict or a container of one ({', '.join(_CONTAINERS)})"
        )
    content = {key: value for key, value in content.items() if key != GRID_KEY}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            hint = [name for name, inner in content.items() if isinstance(inner, Mapping) and _holds_weights(inner)]
            raise CheckpointError(
                f"{path}: is not a state dict: {_shown(key)!r} is a {type(value).__name__}"
                + (f"; weights lie under {_shown(hint[0])}, read are {', '.join(_CONTAINERS)}" if hint else "")
            )
    return content, stated


def _holds_weights(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) or any(
        isinstance(content.get(key), Mapping) for key in _CONTAINERS
    )


def _by_published_name(named: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Take the prefixes of wrappers off.

    Raises:
        CheckpointError: If a name is not text, or two spellings mean the same tensor.
    """
    spelt: dict[str, str] = {}
    for key in named:
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: is not a state dict: the name {_shown(key)} is a {type(key).__name__}")
        name = key.replace("._orig_mod.", ".")  # torch.compile of a part
        while prefix := next((prefix for prefix in _PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        if name in spelt:
            raise CheckpointError(
                f"{path}: {_shown(spelt[name])} and {_shown(key)} are two spellings of one tensor; keep the right one"
            )
        spelt[name] = key
    return {name: named[key] for name, key in spelt.items()}


def check_tensor(name: str, value: object, where: str) -> None:
    """Check that a tensor of a file is weights: dense, of floating point type, its numbers in memory and finite.

    Nothing is computed from it before its memory is known to be as large as it claims.

    Args:
        name: Its name, for messages.
        value: The tensor.
        where: The file, for messages.

    Raises:
        CheckpointError: If it is not; names it.
    """

    def refuse(what: str) -> CheckpointError:
        return CheckpointError(f"{where}: {_shown(name)} {what}; weights are dense tensors of finite numbers")

    if type(value) not in (Tensor, nn.Parameter):
        raise refuse(f"is a {type(value).__name__}")
    assert isinstance(value, Tensor)
    if value.is_nested:
        raise refuse("is a nested tensor")
    if value.is_quantized:
        raise refuse(f"is quantised ({_dtype(value)})")
    if value.layout != torch.strided:
        raise refuse(f"is sparse ({str(value.layout).removeprefix('torch.')})")
    if value.is_meta:
        raise refuse("is on the meta device and holds no numbers")
    if value.dtype not in _DTYPES:
        raise refuse(f"is of type {_dtype(value)}, not {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}")
    if _overlaps(value):
        raise refuse(
            f"is a view of shape {tuple(value.shape)} and strides {value.stride()} whose numbers overlap in memory"
        )
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise refuse(f"of shape {tuple(value.shape)} has {value.untyped_storage().nbytes()} bytes of memory")
    if not bool(torch.isfinite(value.detach()).all()):
        raise refuse("holds NaN or infinite values")


def _overlaps(value: Tensor) -> bool:
    """Whether two places of a strided tensor may be the same number in memory (an expanded one, for one)."""
    if value.numel() < 2:
        return False
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shown(name: object, most: int = 80) -> str:
    """Return a name from a file for a message: on one line, not too long, quoted where it is odd."""
    text = name if isinstance(name, str) and name.isprintable() and name else ascii(name)
    return text if len(text) <= most else f"{text[:most]}…"


def _grid_of(stated: object, path: Path) -> tuple[int, int]:
    """Return the (height, width) that a file states: "4x16", or two numbers."""
    parts: Iterable[object] = ()
    if isinstance(stated, str) and (found := re.fullmatch(r"(\d{1,5})x(\d{1,5})", stated)):
        parts = map(int, found.groups())
    elif isinstance(stated, (list, tuple)):
        parts = stated
    sides = [side for side in parts if isinstance(side, int) and not isinstance(side, bool) and side > 0]
    if len(sides) != 2 or (isinstance(stated, (list, tuple)) and len(stated) != 2):
        raise CheckpointError(f"{path}: {GRID_KEY} is {_shown(stated)}; it is rows x columns of patches, e.g. 4x16")
    return sides[0], sides[1]


# --- pickled files ---------------------------------------------------------------------------------------------------


def load_pickle_safely(path: Path) -> Any:
    """Read a `torch.save` file with the restricted unpickler.

    Raises:
        CheckpointError: If it holds anything but tensors and plain data; or, another line, if it is not readable.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters raises
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything (struct.error, MemoryError, …)
        foreign = _foreign_class(path, error)
        if foreign:
            raise CheckpointError(
                f"{path}: refused: it holds pickled code or objects ({_shown(foreign)}) in addition to "
                "tensors and plain data; nothing of it was run. "
                "Save the state dict alone, best as .safetensors, where you trust the file"
            ) from None
        what = _kind_of_file(path)
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint{f' ({what})' if what else ''}{_UNREADABLE}"
        ) from None


def _foreign_class(path: Path, error: Exception) -> str | None:
    """Return the first class or function of a pickle that is not allowed, or None if there is none."""
    if isinstance(error, pickle.UnpicklingError) and (named := re.search(r"GLOBAL (\S+)", str(error))):
        return named[1]
    names: list[str] = []
    found: str | None = None
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in itertools.islice(pickletools.genops(file), _MOST_OPCODES):
                if opcode.name in ("GLOBAL", "INST"):
                    found = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    found = ".".join(names[-2:])
                elif isinstance(argument, str):
                    names = [*names[-1:], argument]
                if found and not found.startswith(_ALLOWED):
                    return found
                found = None
    except Exception:  # not a pickle, or the end of it is missing
        return None
    return None


def _kind_of_file(path: Path) -> str | None:
    """Say what a file is that cannot be read, or None: a damaged checkpoint, as far as it can be told."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
    except OSError as error:
        return _first_line(error)
    if not start:
        return "the file is empty"
    if start.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: git lfs pull"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = {name.rpartition("/")[2] for name in archive.namelist()}
        except Exception:  # its directory stands at its end: cut off
            return None
        if "constants.pkl" in members:
            return "a TorchScript archive; save the state dict of the model"
        return None if "data.pkl" in members else "a zip archive that torch.save did not write"
    if start.startswith(b"\x80"):
        return None if start.startswith(b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.") else "torch.save did not write it"
    if start.lstrip().startswith(b"<"):
        return "a page of HTML or XML"
    return "neither torch.save nor safetensors wrote it"


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:120]}"


# --- loading ---------------------------------------------------------------------------------------------------------


def keeps_head(head: str | None) -> bool:
    """Whether the head is taken from the file; None means fresh.

    Raises:
        UsageError: If `head` is neither fresh nor keep.
    """
    if head is not None and head not in get_args(Head):
        raise unknown_name("head", str(head), get_args(Head))
    return head == "keep"


def load_checkpoint(model: VisionMamba, path: str | Path, head: Head | None = None) -> LoadReport:
    """Load backbone weights into a model, strictly and as a whole, whatever method is attached to it.

    A position embedding of another grid is resized (bicubic), the class token's row apart: it stands in the middle, row
    `patches // 2`. The source grid is what the file states, else square. Numbers are cast to the model's precision.

    Args:
        model: The model; its `adapter`, if any, is left alone.
        path: A published container, a plain state dict, or a .safetensors file.
        head: fresh: the model's head stays as it is, a file's head is left out; keep: the head is taken from the file.
            None is fresh.

    Returns:
        What was done in addition to copying; also `model.load_report`.

    Raises:
        CheckpointError: If the file is missing, unreadable or unsafe; if a tensor is missing, left over, of another
            shape, or not weights (`check_tensor`); if the head is to be kept and does not fit. The model is then
            unchanged.
        UsageError: If `head` is neither.
    """
    keeps = keeps_head(head)
    path = Path(path)
    file = _read(path)
    state = dict(file.state)
    own = {name: value.detach() for name, value in model.state_dict().items() if not name.startswith("adapter.")}
    if any(value.is_meta for value in own.values()):
        raise CheckpointError(f"{path}: the model is on the meta device and cannot take weights")
    ours = {name for name in own if name.startswith("head.")}
    theirs = {name for name in state if name.startswith("head.")}
    if keeps:
        _need_fitting_head(state, {name: own[name] for name in ours}, theirs, path)
    for name in theirs if not keeps else ():
        del state[name]
    resized = _fit_pos_embed(state, model, path, file.grid)
    expected = {name: value for name, value in own.items() if keeps or name not in ours}
    _check(state, expected, path, model)
    ready, casts = {}, Counter[str]()
    for name, target in expected.items():
        ready[name] = state[name].detach().to(target.dtype)
        if file.state[name].dtype != target.dtype:
            casts[f"{_dtype(file.state[name])} -> {_dtype(target)}"] += 1
            if not bool(torch.isfinite(ready[name]).all()):
                raise CheckpointError(f"{path}: {name} holds numbers beyond {_dtype(target)}, the model's type")
    _copy(ready, expected, path)
    report = LoadReport(
        path,
        resized=(f"pos_embed {_by(resized[0])} -> {_by(resized[1])}",) if resized else (),
        dropped=tuple(sorted(theirs)) if not keeps else (),
        kept=tuple(sorted(ours)) if keeps else (),
        cast=tuple(f"{change} ({count} tensor{'s' * (count > 1)})" for change, count in sorted(casts.items())),
        pos_embed_resized=resized,
        head_digest=_digest({name: ready[name] for name in ours}) if keeps else None,
    )
    model.load_report = report
    return report


def _copy(ready: Mapping[str, Tensor], own: Mapping[str, Tensor], path: Path) -> None:
    """Copy checked tensors into the model; if one copy fails, put back what the others replaced."""
    before: dict[str, Tensor] = {}
    with torch.no_grad():
        try:
            for name, value in ready.items():
                before[name] = own[name].clone()
                own[name].copy_(value)
        except BaseException as error:
            for name, value in before.items():
                with suppress(RuntimeError):  # the one that could not be written
                    own[name].copy_(value)
            if isinstance(error, Exception):
                raise CheckpointError(
                    f"{path}: {_shown([*before][-1])} could not be copied into the model ({_first_line(error)}); the "
                    "model is unchanged"
                ) from None
            raise


def _need_fitting_head(state: Mapping[str, Tensor], ours: Mapping[str, Tensor], theirs: set[str], path: Path) -> None:
    if ours and theirs == set(ours) and all(state[name].shape == ours[name].shape for name in ours):
        return

    def told(names: Iterable[str], shapes: Mapping[str, Tensor]) -> str:
        known = sorted(names)
        if not known:
            return "has no head"
        if known == ["head.bias", "head.weight"] and shapes["head.weight"].ndim == 2:
            classes, width = shapes["head.weight"].shape
            return f"has a head of {classes} classes (width {width})"
        return f"has a head of {_some([f'{_shown(name)} {tuple(shapes[name].shape)}' for name in known])}"

    raise CheckpointError(
        f"{path}: the file {told(theirs, state)}, the model {told(ours, ours)}: --model.head keep needs the same head "
        "in both; leave it out for a fresh one"
    )


def _fit_pos_embed(
    state: dict[str, Tensor], model: VisionMamba, path: Path, stated: tuple[int, int] | None
) -> tuple[tuple[int, int], tuple[int, int]] | None:
    """Bring the position embedding, (1, patches + 1, D), to the model's grid; return the (old, new) grid if it was not.

    Raises:
        CheckpointError: If its rows are not a grid with a class token, or too many.
    """
    source = state.get("pos_embed")
    if source is None or source.ndim != 3 or source.shape[0] != 1 or source.shape[-1] != model.embed_dim:
        return None  # `_check` names it
    patches = source.shape[1] - 1
    if not 1 <= patches <= MAX_PATCHES:
        raise CheckpointError(
            f"{path}: its pos_embed has {source.shape[1]} rows; one for the class token and 1 to {MAX_PATCHES} for "
            "patches are allowed"
        )
    side = math.isqrt(patches)
    old = stated or (side, side)
    if math.prod(old) != patches:
        raise CheckpointError(
            f"{path}: its position embedding has {patches} patches, and {GRID_KEY} says {_by(old)}"
            if stated
            else f"{path}: its position embedding has {patches} patches, which is not a square grid; state it: save "
            f"the weights with svp_bench.models.checkpoints.save_weights, or with {GRID_KEY} = 'ROWSxCOLUMNS' in the "
            "metadata of a .safetensors file or next to the weights"
        )
    grid = (model.patch_embed.grid_size[0], model.patch_embed.grid_size[1])
    if old == grid:
        return None
    state["pos_embed"] = resize_positions(source.detach().float(), old, grid)
    return old, grid


def _by(grid: tuple[int, int]) -> str:
    return f"{grid[0]}x{grid[1]}"


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
    if missing and all(name.startswith(("adapter.", "head.")) for name in state):
        raise CheckpointError(f"{text}; the trained part of a run alone goes to svp-bench predict --ckpt")
    if missing and (prefix := _common_prefix(missing, left_over)):
        raise CheckpointError(
            f"{text}; names begin with {_shown(prefix)} here: take that off ({', '.join(_PREFIXES)} are by themselves)"
        )
    fit = _guess(state)
    raise CheckpointError(f"{text}; the file looks like {fit}" if fit else text)


def _common_prefix(missing: Sequence[str], left_over: Sequence[str]) -> str | None:
    """Return what stands before all missing names in the file, if it is the same."""
    given = set(left_over)
    prefixes = {other.removesuffix(missing[0]) for other in given if other.endswith(f".{missing[0]}")}
    return next((prefix for prefix in prefixes if all(f"{prefix}{name}" in given for name in missing)), None)


def _some(names: list[str], most: int = 4) -> str:
    return ", ".join(map(_shown, names[:most])) + (f" and {len(names) - most} more" if len(names) > most else "")


def _model_name(model: VisionMamba) -> str:
    cfg: Any = getattr(model, "pretrained_cfg", None)
    name = cfg.get("architecture") if isinstance(cfg, dict) else getattr(cfg, "architecture", None)
    return str(name) if name else f"this model (width {model.embed_dim}, depth {model.depth})"


def _guess(state: Mapping[str, Tensor]) -> str | None:
    """Name the Vim that a state dict belongs to, from its width and depth."""
    norm = state.get("norm_f.weight")
    layers = {int(m.group(1)) for name in state if (m := re.match(r"layers\.(\d{1,4})\.mixer\.A_b_log", name))}
    if norm is None or norm.ndim != 1 or not layers:
        return None
    width, depth = norm.shape[0], max(layers) + 1
    sizes = {(192, 24): "vim_tiny", (384, 24): "vim_small", (768, 24): "vim_base", (64, 8): "vim_nano"}
    size = sizes.get((width, depth))
    return f"{size} (width {width}, depth {depth})" if size else f"a Vim of width {width} and depth {depth}"


def backbone_digest(model: VisionMamba) -> str:
    """SHA-256 over the names, shapes and float32 values of the backbone's tensors, without head and adapter.

    The same weights have the same digest whatever file they came from.
    """
    backbone = {k: v for k, v in model.state_dict().items() if not k.startswith(("head.", "adapter."))}
    return _digest(backbone)


def _digest(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {tuple(value.shape)}\n".encode())
        sha.update(value.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())
    return f"sha256:{sha.hexdigest()}"


def save_weights(model: VisionMamba, path: str | Path) -> None:
    """Write a backbone and its head as .safetensors, with the grid of its position embedding in the metadata.

    Args:
        model: A backbone without a method's adapter (`model.method.merge(model)` folds a mergeable one in).
        path: The file, *.safetensors; replaced as a whole.

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
    height, width = model.patch_embed.grid_size
    content = save(state, metadata={GRID_KEY: _by((height, width))})
    try:
        with replacing(path) as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"cannot write {path} ({error.strerror or error})") from None


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
            "--model.checkpoint PATH, or take the weights in the package (--model.backbone vim_nano_patch8_64 "
            "--model.checkpoint embedded), or --model.checkpoint none for random weights"
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
