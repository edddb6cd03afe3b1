"""Full fine-tuning."""

from __future__ import annotations

import math

from svp_bench.methods.base import Method
from svp_bench.models import VisionMamba


class Full(Method):
    """Every parameter of the backbone is trained.

    Trained parameters without the head, for width D, inner width E, N states, rank R, convolution width W, depth L,
    P patches of side p: ``D + (P + 1) D + (3 p² + 1) D + D`` for class token, positions, patches and the last norm, and
    ``L (D + 3 D E + 2 (E N + E + E W + E + E (R + 2 N) + R E + E))`` for the blocks.
    """

    identity_at_start = True
    mergeable = True

    def attach(self, model: VisionMamba) -> None:
        """Add nothing."""

    def trains(self, name: str) -> bool:
        """Whether it trains: always."""
        return True

    def adapter_parameters(self, model: VisionMamba) -> int:
        """Return the formula of the class docstring."""
        mixer = model.mixers[0]
        width, inner, state = model.embed_dim, mixer.A_log.shape[0], mixer.A_log.shape[1]
        rank, conv = mixer.dt_rank, mixer.d_conv
        patches, patch = model.patch_embed.num_patches, math.prod(model.patch_embed.patch_size)
        ends = width + (patches + 1) * width + (3 * patch + 1) * width + width
        one_way = inner * state + inner + inner * conv + inner + inner * (rank + 2 * state) + rank * inner + inner
        return int(ends + model.depth * (width + 3 * width * inner + 2 * one_way))
