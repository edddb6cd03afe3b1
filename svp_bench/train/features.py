"""Compute the frozen part of the forward pass once per image, instead of once per image and epoch.

A method that leaves the first blocks of the backbone alone sees the same tokens of an image in every epoch, as long as
nothing random happens before: no augmentation, no active dropout or drop path. Then the tokens before the first changed
block are stored, or the pooled features where only the head trains.

The stored values are computed in the order of the split, in batches of a fixed size: they depend neither on the order
of training nor on interruptions, so a resumed run ends at the same weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from svp_bench.core.errors import file_size, plural
from svp_bench.data.cache import cached
from svp_bench.data.module import MEMORY_LIMIT_BYTES, VisionDataModule
from svp_bench.models import TokenState, VisionMamba
from svp_bench.models.hooks import is_plain
from svp_bench.models.layers import PatchEmbed, RMSNorm
from svp_bench.models.vim import Block, Mixer

__all__ = ["FrozenFeatures", "compute_features", "frozen_blocks"]

_BATCH = 16  # images computed at a time
# Parts that give the same output for the same input, or only call such parts, which are checked too.
_PLAIN = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Identity, nn.Dropout, DropPath, RMSNorm, PatchEmbed, Block, Mixer)


def frozen_blocks(model: VisionMamba) -> int | None:
    """Return how many blocks come before the first part that a method changes or chance acts on.

    Returns:
        0..depth; depth + 1 if the final norm is frozen too, so that only the head trains; None if the embedding is not
        frozen.
    """
    points, frozen = model.points, 0
    if points.patch_embed or model.cls_token.requires_grad or model.pos_embed.requires_grad:
        return None
    if not _is_frozen(model.patch_embed):
        return None
    changed = {layer for hooks in (points.linear, points.tensor) for (layer, _), found in hooks.items() if found}
    while frozen < len(model.layers) and frozen < points.first_tokens and frozen not in changed:
        if not _is_frozen(model.layers[frozen]):
            return frozen
        frozen += 1
    if frozen < len(model.layers):
        return frozen
    return frozen + int(_is_frozen(model.drop_path) and _is_frozen(model.norm_f))


def _is_frozen(module: nn.Module) -> bool:
    """Return whether no parameter of a module trains, and it gives the same output for the same input."""
    if any(parameter.requires_grad for parameter in module.parameters()):
        return False
    for part in module.modules():
        if not is_plain(part, type(part)) or not isinstance(part, _PLAIN) or type(part) not in _PLAIN:
            return False
        if part.training and (getattr(part, "p", 0.0) or getattr(part, "drop_prob", 0.0)):
            return False
    return True


@dataclass(frozen=True)
class FrozenFeatures:
    """What the frozen part of a backbone gives for each image of a split.

    Attributes:
        blocks: As of `frozen_blocks`.
        hidden: (N, L, D), or pooled features (N, D).
        residual: (N, L, D), or None for pooled features.
        cls_index: Index of the class token.
    """

    blocks: int
    hidden: Tensor
    residual: Tensor | None
    cls_index: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(part.nbytes for part in (self.hidden, self.residual) if part is not None)

    def logits(self, model: VisionMamba, index: Tensor) -> Tensor:
        """Return the logits (B, classes) of images by their positions in the split, int64 (B,)."""
        device, rows = model.cls_token.device, index.to(self.hidden.device)
        hidden = self.hidden[rows].to(device)
        if self.residual is None:
            return model.forward_head(hidden)
        state = TokenState(hidden, self.residual[rows].to(device), self.cls_index)
        return model.forward_head(model.pool(model.run_blocks(state, self.blocks)))

    def describe(self) -> str:
        """Return the stored values in words."""
        what = "pooled features" if self.residual is None else f"tokens before block {self.blocks}"
        return f"{what} of {plural(len(self.hidden), 'image')}, {file_size(self.nbytes)}"


def compute_features(
    model: VisionMamba,
    data: VisionDataModule,
    role: str,
    blocks: int,
    prepare: Callable[[Tensor], Tensor],
    precision: Callable[[], AbstractContextManager[Any]],
    key: tuple[Any, ...],
) -> FrozenFeatures | None:
    """Compute the frozen part for all images of a split, or take it from an earlier run of this process.

    Args:
        model: The adapted backbone, on its device.
        data: The data module, set up.
        role: "train" or "val".
        blocks: As of `frozen_blocks`, at least 1.
        prepare: From uint8 images to the input of the backbone.
        precision: Context of the forward pass.
        key: What else the values depend on: weights of the backbone, precision, backend, …

    Returns:
        None if the values do not fit into memory.
    """
    images, pooled = data.split(role), blocks > model.depth
    tokens = model.patch_embed.num_patches + 1
    if not pooled and len(images) * tokens * model.embed_dim * 8 > MEMORY_LIMIT_BYTES:
        return None

    def compute() -> FrozenFeatures:
        hidden = residual = torch.empty(0)
        with torch.no_grad(), precision():
            for batch in data.in_order(role, _BATCH):
                state = model.embed(prepare(batch.images.to(model.cls_token.device)))
                state = model.run_blocks(state, 0, min(blocks, model.depth))
                stream = state.hidden if state.residual is None else state.residual
                first, second = (model.pool(state), stream[:, :0]) if pooled else (state.hidden, stream)
                if not len(hidden):
                    hidden, residual = (
                        part.new_empty(len(images), *part.shape[1:], device="cpu") for part in (first, second)
                    )
                hidden[batch.index], residual[batch.index] = first.cpu(), second.cpu()
        return FrozenFeatures(blocks, hidden, None if pooled else residual, model.cls_index)

    return cached(images, ("features", data.eval_transform, blocks, *key), compute)
