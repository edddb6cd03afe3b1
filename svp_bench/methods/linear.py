"""Linear probing."""

from __future__ import annotations

from svp_bench.methods.base import Method
from svp_bench.models import Backbone


class Linear(Method):
    """Train the head alone.

    Trained parameters without the head: 0.
    """

    identity_at_start = True
    mergeable = True

    def attach(self, model: Backbone) -> None:
        """Add nothing."""

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 0."""
        return 0
