"""Mamba-Reg: Vim's blocks with register tokens spread over the sequence.

Wang et al., "Mamba-R: Vision Mamba Also Needs Registers", CVPR 2025, arXiv:2405.14858. Parameter names and shapes are
those of the published checkpoints (Wangf3014/Mamba-Reg).

Letters used for shapes: B batch, D width (embed_dim), P patches, T register tokens.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.models.hooks import TokenState
from svp_bench.models.layers import RMSNorm
from svp_bench.models.vim import VisionMamba


class MambaRegister(VisionMamba):
    """Vision Mamba with T register tokens, one after every P // (T + 1) patches, that the head reads.

    Each register passes the final norm and a linear layer D → D / reduction; their concatenation is normed again and is
    the input of the head. Registers have a position embedding of their own.

    Args:
        registers: T.
        reduction: Of the width of each register before the head; it must divide D.
        arguments: Of `VisionMamba`.

    Raises:
        ConfigError: If there are fewer patches than one for each register and one after the last.
    """

    family: ClassVar[str] = "mambar"

    def __init__(self, registers: int = 12, reduction: int = 2, **arguments: Any) -> None:
        self._sizes = (registers, reduction)  # `VisionMamba.__init__` calls the methods below
        super().__init__(**arguments)

    def _add_tokens(self) -> None:
        registers, reduction = self._sizes
        self.cls_positions = self._cls_positions(self.num_patches)
        self.cls_token = nn.Parameter(torch.zeros(1, registers, self.embed_dim))
        self.pos_embed_cls = nn.Parameter(torch.zeros(1, registers, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, self.embed_dim))
        width = self.embed_dim // reduction
        self.neck = nn.Linear(self.embed_dim, width, bias=False)
        self.norm_neck = RMSNorm(registers * width)
        self.num_features = self.head_hidden_size = registers * width

    def _cls_positions(self, patches: int) -> tuple[int, ...]:
        registers = self._sizes[0]
        between = patches // (registers + 1)
        if not between:
            raise ConfigError(f"Mamba-Reg has {registers} registers and needs at least {registers + 1} patches")
        return tuple(between + at * (between + 1) for at in range(registers))

    def position_rows(self, patches: int) -> tuple[int, ...]:
        """Return nothing: the registers have a position embedding of their own."""
        return ()

    def init_weights(self) -> None:
        """Initialise as Mamba-Reg does before pre-training."""
        super().init_weights()
        trunc_normal_(self.pos_embed_cls, std=0.02)
        trunc_normal_(self.neck.weight, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay in addition to one-dimensional ones."""
        return {*super().no_weight_decay(), "pos_embed_cls"}

    def embed(self, images: Tensor) -> TokenState:
        """(B, 3, H, W) → the sequence before block 0, registers between the patches, positions added."""
        tokens = self.embedded_patches(self.hooked_images(images)) + self.pos_embed
        registers = (self.cls_token + self.pos_embed_cls).to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        parts, start = [], 0
        for count, at in enumerate(self.cls_positions):
            parts += [tokens[:, start : at - count], registers[:, count : count + 1]]
            start = at - count
        return TokenState(torch.cat([*parts, tokens[:, start:]], dim=1), None, self.cls_positions)

    @property
    def final_parts(self) -> list[nn.Module]:
        """Return the modules between the last block and the head."""
        return [*super().final_parts, self.neck, self.norm_neck]

    def pooled(self, state: TokenState) -> Tensor:
        """Return the registers after norm and neck, concatenated, (B, T · D / reduction)."""
        registers = self.final_tokens(state)[:, [*state.cls_positions]]
        features: Tensor = self.norm_neck(self.neck(registers).flatten(1))
        return features
