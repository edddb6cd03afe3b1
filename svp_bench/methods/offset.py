"""A static prompt: the same trained vector for every patch token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svp_bench.methods.base import Method, selected_blocks, zero_at
from svp_bench.models import Backbone, TokenState


class Offset(Method):
    """A trained vector per block, added to every patch token of the block input: x + v_i.

    A control for SVP (Yao et al., AAAI 2025, arXiv:2412.08947), with prompts that do not depend on the token: the same
    positions, the same excluded class token. The vectors start at zero.

    Trained parameters without the head: |depths| · D.

    Args:
        include_cls: Add it to the class token too.
        depths: Blocks that get a vector; all if None.
    """

    identity_at_start = True

    def __init__(self, include_cls: bool = False, depths: Sequence[int] | None = None) -> None:
        self.include_cls = include_cls
        self.depths = None if depths is None else list(depths)

    def attach(self, model: Backbone) -> None:
        """Build `adapter.offset`, a row for each block of `depths`, and add it before each of them."""
        depths = selected_blocks("offset", self.depths, model)
        model.adapter = offsets = _Offsets(depths, model.embed_dim, self.include_cls)
        model.points.on_tokens(offsets.add, first=depths[0])

    def adapter_parameters(self, model: Backbone) -> int:
        """Return |depths| · D."""
        return len(selected_blocks("offset", self.depths, model)) * model.embed_dim


class _Offsets(nn.Module):
    def __init__(self, depths: list[int], width: int, include_cls: bool) -> None:
        super().__init__()
        self.rows = {layer: row for row, layer in enumerate(depths)}
        self.include_cls = include_cls
        self.offset = nn.Parameter(torch.zeros(len(depths), width))

    def add(self, layer: int, state: TokenState) -> TokenState:
        if layer not in self.rows:
            return state
        hidden = state.hidden
        added: Tensor = self.offset[self.rows[layer]].to(hidden.dtype)
        if not self.include_cls:
            added = zero_at(added.expand_as(hidden), state.not_patches)
        return state._replace(hidden=hidden + added)
