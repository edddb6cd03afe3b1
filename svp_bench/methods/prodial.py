"""Projector-targeted diagonal-centric linear transformation (ProDiaL)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_names, check_setting
from svp_bench.methods.lora import OnOutput
from svp_bench.models import Backbone
from svp_bench.models.hooks import Projection
from svp_bench.ops import no_autocast


class ProDiaL(Method):
    """A trained transformation of frozen projections: W' = diag(s) W D + (α / r) · up · down.

    Ham et al., "Parameter Efficient Mamba Tuning via Projector-targeted Diagonal-centric Linear Transformation", CVPR
    2025, arXiv:2411.15224. D is block-diagonal with `blocks` blocks over the input channels, built from a trained P:
    off its diagonal D_ij = P_ij, on it D_ii = 1 - ReLU(P_ii). P starts at 0, s at 1, `up` at 0, `down` as `nn.Linear`
    does. s and P act on the weight, the low-rank product on the output, with dropout.

    With P at exactly 0 on its diagonal, as published, the gradient of ReLU there is 0 and the diagonal never trains;
    with one block per channel D stays the identity, and P is reported as inactive.

    Trained parameters without the head, for each target of `in` and `out` channels and b blocks:
    b ⌈in / b⌉² + out + r (in + out). On Vim-S at r = 8: 663,552 with a block per channel, 912,384 with 64 blocks,
    1,188,864 with 32. Where b does not divide the input channels, the end of the last block has no channel.

    Args:
        targets: Projections; null: in_proj and out_proj on Vim, as published; all linear layers of a ViT's blocks.
        blocks: b, the same for all targets, at most their input channels; channel: as many as input channels; null: one
            for every 12 channels of the backbone's width, as published for the ARC challenge (64 blocks at width 768).
        rank: r; published 16, and 8 with 64 blocks.
        alpha: α; the library's default in the released code.
        dropout: On the r channels, while training.
        diagonal_start: Start of the diagonal of P: 0 as published, where it never trains; a small positive number
            trains it, and is not the identity at start.
    """

    identity_at_start: bool  # at diagonal_start 0
    mergeable = True

    def __init__(
        self,
        targets: Sequence[str] | None = None,
        blocks: int | Literal["channel"] | None = None,
        rank: int = 8,
        alpha: float = 8.0,
        dropout: float = 0.1,
        diagonal_start: float = 0.0,
    ) -> None:
        if blocks not in (None, "channel"):
            check_setting("prodial", "blocks", blocks, 1)
        check_setting("prodial", "rank", rank, 1)
        check_setting("prodial", "alpha", alpha, "positive")
        check_setting("prodial", "dropout", dropout, "fraction")
        check_setting("prodial", "diagonal_start", diagonal_start, "fraction")
        self.targets = None if targets is None else targets if isinstance(targets, str) else list(targets)
        self.blocks = blocks
        self.rank = rank
        self.alpha = alpha
        self.dropout = dropout
        self.diagonal_start = diagonal_start
        self.identity_at_start = diagonal_start == 0
        self.dead_parameters = ("adapter.*.diagonal.p",) if blocks == "channel" and not diagonal_start else ()

    def _places(self, model: Backbone) -> dict[str, tuple[Projection, int]]:
        """Return the projection and the number of blocks of each target."""
        # whole layers with one copy: not row slices, and not those of Vim's two directions
        known = {name: place for name, place in model.projections.items() if place.points == (name,)}
        targets = known if self.targets is None else self.targets
        check_names("prodial", "targets", [*targets], [*known], "target of prodial", model.family)
        found = {}
        for name in targets:
            channels = known[name].in_features
            count = max(1, model.embed_dim // 12) if self.blocks is None else self.blocks
            blocks = channels if count == "channel" else int(count)
            if blocks > channels:
                raise ConfigError(
                    f"prodial: blocks must be at most the {channels} input channels of {name}, not {blocks}"
                )
            found[name] = known[name], blocks
        return found

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}.{target}`: `diagonal` acts on the weight, `low_rank` on the output."""
        model.adapter = adapter = nn.ModuleDict()
        places = self._places(model)
        for layer in range(model.depth):
            adapter[str(layer)] = parts = nn.ModuleDict()
            for name, (place, blocks) in places.items():
                diagonal = _Diagonal(place, blocks, self.diagonal_start)
                low_rank = OnOutput(place, f"{name}.weight", self.rank, self.alpha / self.rank, self.dropout)
                parts[name] = nn.ModuleDict({"diagonal": diagonal, "low_rank": low_rank})
                model.points.on_tensor(layer, f"{name}.weight", diagonal)
                model.points.on_linear(layer, name, low_rank)

    def fold(self, model: Backbone) -> None:
        """Replace each frozen weight by W'."""
        assert isinstance(model.adapter, nn.ModuleDict)
        for layer, parts in model.adapter.items():
            assert isinstance(parts, nn.ModuleDict)
            for name, part in parts.items():
                assert isinstance(part, nn.ModuleDict)
                weight = model.tensor_parameter(int(layer), f"{name}.weight")
                low_rank = part["low_rank"]
                assert isinstance(low_rank, OnOutput)
                weight.copy_(low_rank.changed(part["diagonal"](weight)))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the formula of the class docstring, summed."""
        count = 0
        for place, blocks in self._places(model).values():
            size, out = -(-place.in_features // blocks), place.stop - place.start
            count += blocks * size**2 + out + self.rank * (place.in_features + out)
        return model.depth * count


class _Diagonal(nn.Module):
    """W → diag(s) W D."""

    def __init__(self, place: Projection, blocks: int, start: float) -> None:
        super().__init__()
        size = -(-place.in_features // blocks)
        self.scale = nn.Parameter(torch.ones(place.stop - place.start))
        self.p = nn.Parameter(start * torch.eye(size).repeat(blocks, 1, 1))

    def forward(self, weight: Tensor) -> Tensor:
        blocks, size = int(self.p.shape[0]), int(self.p.shape[1])
        with no_autocast(weight):  # rounded once, when the projection reads it
            identity = torch.eye(size, dtype=self.p.dtype, device=self.p.device)
            matrix = self.p * (1 - identity) + identity * (1 - self.p.relu())
            columns = int(weight.shape[1])
            padded = nn.functional.pad(weight, (0, blocks * size - columns)).reshape(-1, blocks, size)
            mixed = torch.einsum("obi,bij->obj", padded, matrix)
            return self.scale[:, None] * mixed.flatten(1)[:, :columns]
