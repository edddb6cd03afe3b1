"""Full fine-tuning."""

from __future__ import annotations

import math

from svp_bench.methods.base import Method
from svp_bench.models import Backbone


class Full(Method):
    """Every parameter of the backbone is trained.

    Trained parameters without the head: all. On Vim, for width D, inner width E, N states, rank R, convolution width W,
    depth L, P patches of side p: ``D + (P + 1) D + (3 p² + 1) D + D`` for class token, positions, patches and the last
    norm, and ``L (D + 3 D E + 2 (E N + E + E W + E + E (R + 2 N) + R E + E))`` for the blocks.
    """

    identity_at_start = True
    mergeable = True

    def attach(self, model: Backbone) -> None:
        """Add nothing."""

    def trains(self, name: str) -> bool:
        """Whether it trains: always."""
        return True

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the size of the backbone without head."""
        return sum(math.prod(shape) for shape in model.own_parameters.values())
