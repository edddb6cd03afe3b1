"""Checkpoints of runs: write them atomically, read them once, validate their metadata and tensors."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO
from msgspec import Meta
from torch import Tensor

from svp_bench.config.compose import HYBRID
from svp_bench.core.atomic import replacing
from svp_bench.core.errors import CheckpointError, ConfigError, SvpBenchError, UsageError, printable, show
from svp_bench.core.registry import import_object, make_importable
from svp_bench.core.validate import Positive, Text, convert
from svp_bench.core.yaml import read_yaml
from svp_bench.data.transforms import CROP_RATIO, INTERPOLATIONS, RESIZES
from svp_bench.methods import METHODS
from svp_bench.methods.base import Method, build_method
from svp_bench.models.weight_files import check_tensor, load_pickle_safely
from svp_bench.records.code import source_files
from svp_bench.train.provenance import changed_sources, read_sources

CHECKPOINT = Path("checkpoints") / "last.ckpt"  # in a run's folder
Bits = Annotated[int, Meta(ge=0, le=64)]
METADATA_KEY = "svp_bench"  # our key in a Lightning checkpoint
UNREADABLE = "; get the file again, or give another"  # the end of messages about damaged files


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write checkpoints atomically, so that a killed process leaves the old or the new one.

    Lightning's own class writes into the system's temporary folder, and a move between file systems is not atomic.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SvpBenchError: If the folder cannot be written or the disk is full; the old file is still there.
        """
        path = Path(path)
        try:
            for old in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
                old.unlink(missing_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
            reason = str(error).strip().splitlines()[0]
            raise SvpBenchError(
                f"cannot write the checkpoint {path} ({reason}); an older one, if there is one, is untouched: "
                "free some space, then continue with --resume"
            ) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint on the CPU, read with the restricted unpickler."""
        content: dict[str, Any] = load_pickle_safely(Path(path))
        return content


@dataclass(frozen=True)
class TransformMetadata:
    """The image transform of a run; `depth`: the bits of whole and floating-point values, as of `Depth`."""

    resize: Literal[RESIZES]  # type: ignore[valid-type]
    interpolation: Literal[tuple(INTERPOLATIONS)]  # type: ignore[valid-type]
    crop_ratio: Annotated[float, Meta(gt=0, le=1)] = CROP_RATIO
    depth: tuple[Bits | None, Bits | None] = (None, None)


@dataclass(frozen=True)
class CheckpointMetadata:
    """The facts of the run that wrote a checkpoint. Those with a default are missing in older checkpoints.

    Attributes:
        task: Full name of the task.
        protocol: Name of the protocol card.
        stage: final or select.
        backbone: timm name of the backbone.
        backbone_digest: "sha256:…" of its weights.
        checkpoint: Source of these weights.
        init_seed: Seed of the random initial weights.
        method: "module.Class" of the method.
        method_args: Its settings.
        num_classes: Number of classes.
        image_size: Height and width of the images.
        run_id: The run's name.
        data_digest: "sha256:…" of the splits that the run read.
        head_hidden: Width of the head's first layer, if it has two.
        head_digest: "sha256:…" of the initial head, if it came from the checkpoint.
        pos_embed_grid: Rows and columns of patches.
        input_attention: Attention on the normalised image.
        ema_decay: Decay of the weight average, if there is one.
        ema_evaluate: Whether the average is evaluated.
        transform: The image transform.
        class_names: Names of the classes.
        inactive_parameters: Trained tensors without a gradient so far, by name.
    """

    task: Text
    protocol: Text
    stage: Literal["final", "select"]
    backbone: Text
    backbone_digest: Text
    checkpoint: Text
    init_seed: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    method: Text
    method_args: Mapping[str, Any]
    num_classes: Positive
    image_size: tuple[Positive, Positive]
    run_id: Text | None = None
    data_digest: Text | None = None
    head_hidden: Positive | None = None
    head_digest: Text | None = None
    pos_embed_grid: tuple[Positive, Positive] | None = None
    input_attention: Text | None = None
    ema_decay: Annotated[float, Meta(gt=0, lt=1)] | None = None
    ema_evaluate: bool | None = None
    transform: TransformMetadata | None = None
    class_names: tuple[str, ...] | None = None
    inactive_parameters: tuple[str, ...] | None = None

    @classmethod
    def of(cls, value: object, where: str) -> CheckpointMetadata:
        """Validate the metadata of a checkpoint.

        Args:
            value: The part `METADATA_KEY` of a checkpoint.
            where: The file, for messages.

        Raises:
            CheckpointError: If a part is missing or of another type.
        """
        if not isinstance(value, Mapping):
            raise wrong_part(where, METADATA_KEY, value, "the metadata of the run")
        if "transform" not in value and "view" in value:  # its older name
            value = {**value, "transform": value["view"]}
        known = {field.name: value[field.name] for field in fields(cls) if value.get(field.name) is not None}
        try:
            found = convert(known, cls, f"{where}: damaged, or not written by svp-bench", CheckpointError, "metadata")
        except CheckpointError as error:
            raise CheckpointError(f"{error}{UNREADABLE}") from None
        names = found.class_names
        if names is not None and len(names) != found.num_classes:
            raise wrong_part(where, f"{METADATA_KEY}.class_names", names, f"{found.num_classes} names")
        return found


def wrong_part(where: str, part: str, value: object, expected: str) -> CheckpointError:
    """Return the error for a part of a checkpoint that is missing (None) or of another type.

    Args:
        where: The file.
        part: Name of the part.
        value: Its value.
        expected: Its expected type or value.
    """
    given = "is missing" if value is None else f"is {show(value)}"
    return CheckpointError(
        f"{where}: damaged, or not written by svp-bench: {part} {given}, expected {expected}{UNREADABLE}"
    )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Checkpoint:
    """A validated checkpoint of a run.

    Attributes:
        path: The file.
        content: Its content, for Lightning.
        metadata: Facts of its run.
        epoch: The epoch in which it was written, from 0.
        global_step: Optimizer steps so far.
    """

    path: Path
    content: dict[str, Any]
    metadata: CheckpointMetadata
    epoch: int
    global_step: int

    @classmethod
    def read(cls, path: str | Path) -> Checkpoint:
        """Read and validate a checkpoint; no code of the file is run.

        Raises:
            UsageError: If there is no such file.
            CheckpointError: If it is unreadable, of another program, or a part is missing or of another type.
        """
        path = Path(path)
        if not path.is_file():
            inside = path / CHECKPOINT
            hint = f"give {inside}" if inside.is_file() else "they are in runs/<task>/<run>/checkpoints/"
            raise UsageError(f"no checkpoint {str(path)!r}; {hint}")
        content = load_pickle_safely(path)
        if not isinstance(content, dict) or METADATA_KEY not in content:
            raise CheckpointError(
                f"{path}: not a checkpoint of svp-bench; weights of a backbone alone go to --model.checkpoint PATH"
            )
        metadata = CheckpointMetadata.of(content[METADATA_KEY], str(path))
        for key in ("epoch", "global_step"):
            if not _is_count(content.get(key)):
                raise wrong_part(str(path), key, content.get(key), "a whole number of 0 or above")
        for key in ("state_dict", *(["ema"] if metadata.ema_decay is not None else [])):
            if not _is_state_dict(content.get(key)):
                raise wrong_part(str(path), key, content.get(key), "tensors by name")
            check_tensors(content[key], str(path), key)
        return cls(path, content, metadata, content["epoch"], content["global_step"])

    def build_method(self, method_file: str | None = None) -> Method:
        """Build the run's method with its settings.

        Args:
            method_file: The file of a custom method, if its class lies next to it.

        Raises:
            UsageError: If its class is neither registered here nor importable.
            CheckpointError: If it refuses its settings.
        """
        about = self.metadata
        names = {entry.target.replace(":", "."): entry.name for entry in METHODS}
        if about.method == HYBRID:
            found: type[Method] = import_object(HYBRID)
        else:
            found = METHODS.get(names[about.method]) if about.method in names else self._custom_method(method_file)
        name = names.get(about.method, found.__name__)
        try:
            return build_method(found, name, dict(about.method_args))
        except (TypeError, ValueError, ConfigError) as error:
            expected = f"settings of {name} ({error})"
            raise wrong_part(str(self.path), f"{METADATA_KEY}.method_args", dict(about.method_args), expected) from None

    def _custom_method(self, method_file: str | None) -> type[Method]:
        class_path, path = self.metadata.method, self.path
        folder = path.resolve().parent.parent
        if method_file is None and class_path != _named_in_config(folder / "config.yaml"):
            raise UsageError(
                f"{path}: its method {class_path!r} is not registered here (`svp-bench methods`), and no config.yaml "
                "of the run next to the checkpoints names it; give the method's file with --method FILE"
            )
        make_importable(method_file)
        try:
            found = import_object(class_path)
        except Exception as error:  # the user's module may raise anything
            raise UsageError(
                f"{path}: its method {class_path!r} cannot be imported ({type(error).__name__}: {error}); run in the "
                "folder of its file, or give the method's file next to it with --method FILE"
            ) from None
        if not (isinstance(found, type) and issubclass(found, Method)):
            raise UsageError(f"{path}: {class_path!r} is not a class of a method")
        if edited := changed_sources(read_sources(folder), source_files([class_path])):
            sys.stderr.write(f"Note: changed since the run: {printable(edited)}; the current code is used.\n")
        return found


def _named_in_config(path: Path) -> str | None:
    try:
        return str(read_yaml(path, error=ConfigError).value["model"]["method"]["class_path"])
    except (ConfigError, KeyError, TypeError):
        return None


def check_tensors(tensors: Mapping[str, Tensor], where: str, part: str) -> None:
    """Check tensors of a checkpoint with `check_tensor`.

    Args:
        tensors: By name.
        where: The file.
        part: Name of the part that contains them.

    Raises:
        CheckpointError: If one is refused; names it.
    """
    for name, value in tensors.items():
        try:
            check_tensor(f"{part}.{name}", value, where, indices=part == "state_dict")
        except CheckpointError as error:
            raise CheckpointError(f"{error}{UNREADABLE}") from None


def _is_state_dict(value: object) -> bool:
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(part, Tensor) for name, part in value.items()
    )


def weights_digest(content: Mapping[str, Any]) -> str:
    """Return the digest of the weights in a checkpoint: names, types, shapes and bytes of all tensors.

    Args:
        content: A checkpoint, or its parts with weights: `state_dict`, and `ema` if weights are averaged.
    """
    sha = hashlib.sha256()
    for part in ("state_dict", "ema"):
        for name, value in sorted((content.get(part) or {}).items()):
            tensor = value.detach().cpu().contiguous()
            sha.update(f"{part} {name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    return f"sha256:{sha.hexdigest()}"
