"""Read weight files safely: published containers, state dicts and safetensors, without running code of the file.

Published Vim files are `torch.save` dictionaries with the key `model` next to optimizer state, an EMA copy and an
`argparse.Namespace`, the only class allowed here in addition to tensors.

A file may state the grid of its position embedding as `pos_embed_grid`, "ROWSxCOLUMNS" of patches: in the metadata of a
.safetensors file, or as a key next to the weights in a `torch.save` file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import pickle
import pickletools
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from svp_bench.core.errors import CheckpointError

GRID_KEY = "pos_embed_grid"
Grid = tuple[int, int]  # rows and columns of patches
WRAPPER_PREFIXES = ("module.", "_orig_mod.", "model.", "backbone.")  # DDP, torch.compile, Lightning, timm

_CONTAINERS = ("model", "state_dict", "model_state_dict", "model_ema")  # the EMA copy only without another
_MAX_NESTING = 4  # of containers
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_SAFE_DTYPES = ("F32", "F16", "BF16", "F64")
_ALLOWED_GLOBALS = ("collections.OrderedDict", "torch._utils._rebuild", "torch.storage.", "argparse.Namespace")
_MAX_OPCODES = 10**6  # of a pickle that is searched for class names


def by(grid: Grid) -> str:
    """Return a grid as text, e.g. "14x14"."""
    return f"{grid[0]}x{grid[1]}"


@dataclass(frozen=True)
class LoadReport:
    """Changes that `load_checkpoint` made in addition to copying.

    Attributes:
        path: The file.
        pos_embed_resized: (from, to) grid of the position embedding if it was resized, else None.
        dropped: Names of the file's head tensors that were left out.
        kept: Names of the head tensors that were taken from the file.
        cast: Changes of precision, e.g. ("float16 -> float32 (141 tensors)",).
        head_digest: "sha256:…" of the head that was taken from the file, else None.
    """

    path: Path
    pos_embed_resized: tuple[Grid, Grid] | None = None
    dropped: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    head_digest: str | None = None

    @property
    def head_replaced(self) -> bool:
        """Whether the file has a head that was left out."""
        return bool(self.dropped)

    @property
    def resized(self) -> tuple[str, ...]:
        """Return the change of grid as text, e.g. ("pos_embed 14x14 -> 4x16",)."""
        return (f"pos_embed {' -> '.join(map(by, self.pos_embed_resized))}",) if self.pos_embed_resized else ()

    def for_record(self) -> dict[str, list[str]] | None:
        """Return the changes for `Record.checkpoint_load`; None for a plain copy with a fresh head."""
        kept = [f"head {self.head_digest}"] if self.head_digest else []
        changes = {"resized": [*self.resized], "kept": kept, "cast": [*self.cast]}
        return {name: lines for name, lines in changes.items() if lines} or None

    def describe(self) -> str | None:
        """Return the changes on one line, or None after a plain copy."""
        parts = [f"resized {line}" for line in self.resized]
        parts += [f"kept the head of the file ({', '.join(self.kept)})"] if self.kept else []
        parts += [f"dropped the head of the file ({', '.join(map(shown, self.dropped))})"] if self.dropped else []
        return "; ".join([*parts, *(f"cast {line}" for line in self.cast)]) or None


class WeightFile(NamedTuple):
    """Content of a weight file.

    Attributes:
        tensors: Tensors by published name.
        grid: (rows, columns) that the file states for its position embedding, or None.
    """

    tensors: dict[str, Tensor]
    grid: tuple[int, int] | None


def read_weights(path: Path) -> WeightFile:
    """Read and validate a weight file; remove the name prefixes of wrappers.

    Raises:
        CheckpointError: If the file is missing, unreadable, holds pickled code or anything but finite dense floating
            point tensors, or holds one tensor under two spellings of its name.
    """
    if not path.is_file():
        problem = "is a folder; give the weight file" if path.is_dir() else "does not exist"
        raise CheckpointError(
            f"no checkpoint file {str(path)!r}: it {problem}; --model.checkpoint takes a path, hub, embedded or none"
        )
    named, grid = _read_safetensors(path) if _is_safetensors(path) else _find_weights(load_pickle_safely(path), path)
    tensors = _by_published_name(named, path)
    for name, value in tensors.items():
        check_tensor(name, value, str(path))
    return WeightFile(tensors, None if grid is None else _parse_grid(grid, path))


def _is_safetensors(path: Path) -> bool:
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _read_safetensors(path: Path) -> tuple[Mapping[Any, Any], object]:
    """Return tensors by name, and the stated grid or None."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 1)
        if count > 1:
            raise CheckpointError(f"{path}: {shown(name)} appears {count} times; save it once")
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
                    f"{path}: {shown(name)} is of type {shown(entry['dtype'])}, not {', '.join(_SAFE_DTYPES)}"
                )
        return load_file(path), (header.get("__metadata__") or {}).get(GRID_KEY)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged header can raise anything
        raise CheckpointError(f"{path}: not a readable safetensors file ({first_line(error)})") from None


def _find_weights(content: object, path: Path) -> tuple[Mapping[Any, Any], object]:
    """Return the state dict inside the containers of a `torch.save` file, and the stated grid or None.

    Raises:
        CheckpointError: If the file holds no state dict, or several.
    """
    where, grid = "", None
    for _ in range(_MAX_NESTING):
        if not isinstance(content, Mapping):
            break
        metadata = content.get("svp_bench")  # of a checkpoint of a run
        grid = content.get(GRID_KEY, grid)
        grid = metadata.get(GRID_KEY, grid) if isinstance(metadata, Mapping) else grid
        found = [key for key in _CONTAINERS if isinstance(content.get(key), Mapping)]
        found = [key for key in found if _holds_weights(content[key])] or found
        found = [key for key in found if key != "model_ema"] or found
        if not found:
            break
        if len(found) > 1:
            raise CheckpointError(f"{path}: holds weights under {' and '.join(map(repr, found))}; save one of them")
        content, where = content[found[0]], f"{where}[{found[0]!r}]"
    if not isinstance(content, Mapping) or not content:
        kind = "an empty dict" if isinstance(content, Mapping) else type(content).__name__
        raise CheckpointError(
            f"{path}: holds {kind}{where and ' under '}{where}, not a state dict or a container of one "
            f"({', '.join(_CONTAINERS)})"
        )
    content = {key: value for key, value in content.items() if key != GRID_KEY}
    for key, value in content.items():
        if not isinstance(value, Tensor):
            other = [name for name, inner in content.items() if isinstance(inner, Mapping) and _holds_weights(inner)]
            hint = f"; weights are under {shown(other[0])}, expected under {', '.join(_CONTAINERS)}" if other else ""
            raise CheckpointError(f"{path}: not a state dict: {shown(key)!r} is a {type(value).__name__}{hint}")
    return content, grid


def _holds_weights(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) for value in content.values()) or any(
        isinstance(content.get(key), Mapping) for key in _CONTAINERS
    )


def _by_published_name(named: Mapping[Any, Any], path: Path) -> dict[str, Tensor]:
    """Remove the prefixes of wrappers.

    Raises:
        CheckpointError: If a name is not text, or two spellings mean one tensor.
    """
    spellings: dict[str, str] = {}
    for key in named:
        if not isinstance(key, str):
            raise CheckpointError(f"{path}: not a state dict: the name {shown(key)} is a {type(key).__name__}")
        name = key.replace("._orig_mod.", ".")  # torch.compile of a part
        while prefix := next((prefix for prefix in WRAPPER_PREFIXES if name.startswith(prefix)), None):
            name = name.removeprefix(prefix)
        if name in spellings:
            raise CheckpointError(
                f"{path}: {shown(spellings[name])} and {shown(key)} are two spellings of one tensor; keep one"
            )
        spellings[name] = key
    return {name: named[key] for name, key in spellings.items()}


def check_tensor(name: str, value: object, where: str, indices: bool = False) -> None:
    """Check that a tensor of a file is dense, of floating point type and finite, without trusting its claimed size.

    Args:
        name: Its name, for the message.
        value: The tensor.
        where: The file, for the message.
        indices: Also allow int64, for what a method has chosen.

    Raises:
        CheckpointError: If it is not; names the tensor.
    """
    if problem := _tensor_problem(value, {*_DTYPES, torch.int64} if indices else {*_DTYPES}):
        raise CheckpointError(f"{where}: {shown(name)} {problem}; weights are dense tensors of finite numbers")


def _tensor_problem(value: object, dtypes: set[torch.dtype]) -> str | None:
    if type(value) not in (Tensor, nn.Parameter):
        return f"is a {type(value).__name__}"
    assert isinstance(value, Tensor)
    dtype = dtype_name(value)
    for wrong, problem in (
        (value.is_nested, "is a nested tensor"),
        (value.is_quantized, f"is quantised ({dtype})"),
        (value.layout != torch.strided, f"is sparse ({str(value.layout).removeprefix('torch.')})"),
        (value.is_meta, "is on the meta device and holds no numbers"),
        (value.dtype not in dtypes, f"is of type {dtype}"),
    ):
        if wrong:
            return problem
    if _overlaps(value):
        return f"is a view of shape {tuple(value.shape)} and strides {value.stride()} whose numbers overlap in memory"
    memory = value.untyped_storage().nbytes()
    if value.numel() * value.element_size() > memory:
        return f"of shape {tuple(value.shape)} has {memory} bytes of memory"
    return None if bool(torch.isfinite(value.detach()).all()) else "holds NaN or infinite values"


def _overlaps(value: Tensor) -> bool:
    """Whether two elements of a strided tensor may share memory, as in an expanded one."""
    reach = 0
    for stride, size in sorted((stride, size) for size, stride in zip(value.shape, value.stride(), strict=True)):
        if size > 1 and value.numel():
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def dtype_name(value: Tensor) -> str:
    """Return the dtype without "torch."."""
    return str(value.dtype).removeprefix("torch.")


def shown(name: object, longest: int = 80) -> str:
    """Return a name from a file on one printable line of limited length, for a message."""
    text = name if isinstance(name, str) and name.isprintable() and name else ascii(name)
    return text if len(text) <= longest else f"{text[:longest]}…"


def first_line(error: Exception) -> str:
    """Return the type of an error and the start of its text, for a message."""
    text = (str(error).strip().splitlines() or [""])[0].split(". ")[0].rstrip(".")
    return f"{type(error).__name__}: {text[:120]}"


def _parse_grid(stated: object, path: Path) -> tuple[int, int]:
    """Return (rows, columns) of a stated grid: "4x16", or a pair of integers."""
    match = re.fullmatch(r"(\d{1,5})x(\d{1,5})", stated) if isinstance(stated, str) else None
    sides = [*map(int, match.groups())] if match else stated
    if isinstance(sides, (list, tuple)) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides):
        return sides[0], sides[1]
    raise CheckpointError(f"{path}: {GRID_KEY} is {shown(stated)}, not rows x columns of patches, e.g. 4x16")


def load_pickle_safely(path: Path) -> Any:
    """Read a `torch.save` file with PyTorch's restricted unpickler.

    Raises:
        CheckpointError: If it holds anything but tensors and plain data, or is not readable.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything (struct.error, MemoryError, …)
        if foreign := _foreign_class(path, error):
            raise CheckpointError(
                f"{path}: refused: it holds pickled code or objects ({shown(foreign)}) in addition to tensors and "
                "plain data; nothing of it was run; if you trust the file, save its state dict alone as .safetensors"
            ) from None
        kind = _kind_of_file(path)
        raise CheckpointError(
            f"{path}: truncated or not a checkpoint{f' ({kind})' if kind else ''}; get the file again, or give another"
        ) from None


def _foreign_class(path: Path, error: Exception) -> str | None:
    """Return the first class or function of a pickle that is not allowed, or None."""
    if isinstance(error, pickle.UnpicklingError) and (match := re.search(r"GLOBAL (\S+)", str(error))):
        return match[1]
    texts: list[str] = []
    try:
        with path.open("rb") as file:
            for opcode, argument, _ in itertools.islice(pickletools.genops(file), _MAX_OPCODES):
                found = None
                if opcode.name in ("GLOBAL", "INST"):
                    found = str(argument).replace(" ", ".")
                elif opcode.name == "STACK_GLOBAL":
                    found = ".".join(texts[-2:])
                elif isinstance(argument, str):
                    texts = [*texts[-1:], argument]
                if found and not found.startswith(_ALLOWED_GLOBALS):
                    return found
    except Exception:  # not a pickle, or cut off
        return None
    return None


def _kind_of_file(path: Path) -> str | None:
    """Describe a file that is not a checkpoint; None for a damaged checkpoint."""
    try:
        with path.open("rb") as file:
            start = file.read(256)
        if start.startswith(b"PK"):
            with zipfile.ZipFile(path) as archive:
                members = {name.rpartition("/")[2] for name in archive.namelist()}
            if "constants.pkl" in members:
                return "a TorchScript archive; save the state dict of the model"
            return None if "data.pkl" in members else "a zip archive that torch.save did not write"
    except OSError as error:
        return first_line(error)
    except Exception:  # a zip file without its directory: cut off
        return None
    for prefix, kind in (
        (b"version https://git-lfs", "a pointer of Git LFS, not the file itself: git lfs pull"),
        (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", None),  # magic number of the legacy format
        (b"\x80", "torch.save did not write it"),
        (b"<", "a page of HTML or XML"),
    ):
        if start.lstrip().startswith(prefix):
            return kind
    return "neither torch.save nor safetensors wrote it" if start else "the file is empty"
