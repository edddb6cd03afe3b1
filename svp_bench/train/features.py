"""Compute the frozen part of the forward pass once per image, instead of once per image and epoch.

A method that leaves the first blocks of the backbone alone sees the same tokens of an image in every epoch, as long as
nothing random happens before: no augmentation, no active dropout or drop path. Then the tokens before the first changed
block are stored, or the pooled features where only the head trains.

The stored values are computed in the order of the split, in batches of a fixed size: they depend neither on the order
of training nor on interruptions, so a resumed run ends at the same weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from timm.layers import DropPath
from torch import Tensor, nn

from svp_bench.core.errors import file_size, plural
from svp_bench.data.cache import cached
from svp_bench.data.module import MEMORY_LIMIT_BYTES, VisionDataModule
from svp_bench.models import Backbone, TokenState
from svp_bench.models.backbone import HEAD_PREFIXES
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.models.hooks import is_plain

_BATCH = 16  # images computed at a time
# Parts that give the same output for the same input, or only call such parts, which are checked too. A backbone adds
# its own (`Backbone.exact_parts`).
_EXACT = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Identity, nn.Dropout, DropPath)


def frozen_blocks(model: Backbone) -> int | None:
    """Return how many blocks come before the first part that a method changes or chance acts on.

    Returns:
        0..depth; depth + 1 if the final norm is frozen too, so that only the head trains; None if the embedding is not
        frozen, or a forward pass of the whole model may differ from that of its parts.
    """
    points, kind, blocks, frozen = model.points, type(model), model.blocks_in_order, 0
    if not is_plain(model, kind) or any(callable(getattr(kind, name, None)) for name in vars(model)):
        return None
    if points.images or points.patch_embed or any(p.requires_grad for p in model.parameters(recurse=False)):
        return None
    later = {id(part) for part in (blocks, model.adapter, model.head, model.head_drop, *model.final_parts)}
    for name, part in model.named_children():
        if id(part) not in later and not f"{name}.".startswith(HEAD_PREFIXES) and not _is_frozen(part, model):
            return None
    changed = {layer for hooks in (points.linear, points.tensor) for (layer, _), found in hooks.items() if found}
    changed |= {layer for layer, found in points.scan.items() if found}
    while frozen < len(blocks) and frozen < points.first_tokens and frozen not in changed:
        if not _is_frozen(blocks[frozen], model):
            return frozen
        frozen += 1
    if frozen < len(blocks):
        return frozen
    return frozen + int(all(_is_frozen(part, model) for part in model.final_parts))


def _is_frozen(module: nn.Module, model: Backbone) -> bool:
    """Return whether no parameter of a module trains, and it gives the same output for the same input."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return False
    exact = {*_EXACT, *model.exact_parts}
    for part in module.modules():
        if not is_plain(part, type(part)) or type(part) not in exact:
            return False
        if part.training and (any(getattr(part, rate, 0.0) for rate in ("p", "drop_prob"))):
            return False
    return True


@dataclass(frozen=True)
class FrozenFeatures:
    """Output of the frozen part of a backbone for each image of a split.

    Attributes:
        blocks: As of `frozen_blocks`.
        pooled: Whether `hidden` holds pooled features.
        hidden: (N, L, D), or pooled features (N, D).
        residual: (N, L, D), or None where there is none.
        cls_positions: Positions of the tokens that are not patches.
    """

    blocks: int
    pooled: bool
    hidden: Tensor
    residual: Tensor | None
    cls_positions: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for part in (self.hidden, self.residual) if part is not None)

    def logits(self, model: Backbone, index: Tensor) -> Tensor:
        """Return the logits (B, classes) of images by their positions in the split, int64 (B,)."""
        device, rows = model.first_parameter.device, index.to(self.hidden.device)
        hidden = self.hidden[rows].to(device)
        if self.pooled:
            return model.classify(hidden)
        residual = None if self.residual is None else self.residual[rows].to(device)
        state = TokenState(hidden, residual, self.cls_positions)
        return model.classify(model.pooled(model.run_blocks(state, self.blocks)))

    def describe(self) -> str:
        """Return the stored values in words."""
        what = "pooled features" if self.pooled else f"tokens before block {self.blocks}"
        return f"{what} of {plural(len(self.hidden), 'image')}, {file_size(self.nbytes)}"


def compute_features(module: Any) -> dict[str, FrozenFeatures]:
    """Compute the frozen part for the splits of a training, by role, where it is the same in every epoch.

    Each process computes and stores all images. A resumed run decides as the run that it continues.

    Args:
        module: The `AdaptationModule`, whose module imports this one, in training.
    """
    found: dict[str, FrozenFeatures] = {}
    if module.cache_features is False:
        return found
    trainer: Any = module.trainer
    epochs, data, blocks = trainer.max_epochs or 1, trainer.datamodule, frozen_blocks(module.model)
    reason = None
    if not isinstance(data, VisionDataModule):
        reason = "the images do not come from a VisionDataModule"
    elif epochs <= trainer.world_size:
        reason = f"it gains nothing in {plural(epochs, 'epoch')} of {plural(trainer.world_size, 'process')}"
    elif blocks is None:
        reason = "the embedding is trained, or the model is compiled, hooked or changed"
    elif not blocks:  # the embedding alone costs next to nothing
        reason = "the frozen part of the backbone ends before its first block"
    else:
        if data.augment.changes_images or data.augment.random_erasing or data.augment.mixes:
            reason = "the training images are augmented"
        elif (features := _compute(module, data, "train", blocks)) is not None:
            found["train"] = features
        else:
            reason = "the values do not fit into memory"
        averaged = module.ema_config.evaluate  # another model is validated
        if "val" in data.splits and not averaged and (features := _compute(module, data, "val", blocks)) is not None:
            found["val"] = features
    if reason and module.cache_features is True:
        rank_zero_warn(f"model.cache_features true has no effect on the training: {reason}")
    return found


def _compute(module: Any, data: VisionDataModule, role: str, blocks: int) -> FrozenFeatures | None:
    """Compute the frozen part for all images of a split; None if the values do not fit into memory."""
    model, trainer, images = module.model, module.trainer, data.split(role)
    pooled = blocks > model.depth
    bytes_per_number = torch.finfo(model.first_parameter.dtype).bits // 8
    size = len(images) * model.num_tokens * model.embed_dim * 2 * bytes_per_number
    if not pooled and size * trainer.world_size > MEMORY_LIMIT_BYTES:
        return None
    precision = str(trainer.precision)
    backend = module.scan_decision(module.device, precision)
    normalisation = [buffer.flatten().tolist() for buffer in (module.get_buffer("mean"), module.get_buffer("std"))]
    # the weights as they are now: a method may have changed them when it was attached
    key = (backbone_digest(model), str(normalisation), module.input_attention, precision)
    where = backend.name if backend else None, module.device.type

    def compute() -> FrozenFeatures:
        hidden: Tensor | None = None
        residual: Tensor | None = None
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            for batch in data.in_order(role, _BATCH):
                state = model.embed(module.prepare(batch.images.to(module.device)))
                state = model.run_blocks(state, 0, min(blocks, model.depth))
                first, second = (model.pooled(state), None) if pooled else (state.hidden, state.residual)
                if hidden is None:
                    hidden = first.new_empty(len(images), *first.shape[1:], device="cpu")
                    residual = (
                        None if second is None else second.new_empty(len(images), *second.shape[1:], device="cpu")
                    )
                hidden[batch.index] = first.cpu()
                if residual is not None and second is not None:
                    residual[batch.index] = second.cpu()
        assert hidden is not None  # a split has images
        return FrozenFeatures(blocks, pooled, hidden, residual, model.cls_positions)

    rank_zero_info(f"Note: the frozen part of the backbone is computed once for the {len(images)} images of {role}.")
    return cached(images, ("features", data.eval_transform, blocks, *key, *where), compute)
