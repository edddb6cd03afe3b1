"""A bottleneck adapter after each mixer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting, zero_at
from svp_bench.models import Backbone

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "none": lambda x: x,
}


class Adapter(Method):
    """A sequential bottleneck on the output of each sublayer: y + s · (U act(D y + d) + u).

    Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", ICML 2019, arXiv:1902.00751: after a sublayer and
    before its output is added to the residual stream. A Vim block has one sublayer, its mixer; a ViT block has two,
    attention and MLP. The last block has adapters too, for the class token. U and u start at zero.

    A control for SVP's inner prompt, which before block i ≥ 1 is a bottleneck at the same position. The prompt differs
    in the activation (after U), in scales per channel, in excluding the class token, and in having one before block 0
    and none after the last block.

    Trained parameters without the head, for depth L, S sublayers a block, width D, hidden width h:
    L S (2 D h + h + D), with L - 1 blocks without the class token. On Vim-S at h = 64: 1,190,400; SVP's inner path has
    D more per block (1,199,616).

    Args:
        hidden_dim: Width h of the bottleneck.
        activation: Inside the bottleneck.
        scale: s, multiplies the update.
        include_cls: Adapt all tokens; otherwise patches only, and the last block has no adapter.
    """

    identity_at_start = True

    def __init__(
        self,
        hidden_dim: int = 64,
        activation: Literal["relu", "gelu", "silu", "none"] = "relu",
        scale: float = 0.1,
        include_cls: bool = True,
    ) -> None:
        check_setting("adapter", "hidden_dim", hidden_dim, 1)
        check_setting("adapter", "activation", activation, [*ACTIVATIONS])
        check_setting("adapter", "scale", scale, "positive")
        self.hidden_dim = hidden_dim
        self.activation = activation
        self.scale = scale
        self.include_cls = include_cls

    def _layers(self, model: Backbone) -> range:
        return range(model.depth if self.include_cls else model.depth - 1)

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}`, in a ViT `adapter.{layer}.{sublayer}`, after the projection that ends a sublayer."""
        if not self._layers(model):
            raise ConfigError("adapter: a model of one block needs include_cls true; its other tokens are not read")
        adapter = nn.ModuleDict()
        names = model.branch_outputs
        for layer in self._layers(model):
            parts = {name: _Bottleneck(self, model) for name in names}
            adapter[str(layer)] = nn.ModuleDict(parts) if len(parts) > 1 else parts[names[0]]
            for name, part in parts.items():
                model.points.on_linear(layer, name, part)
        model.adapter = adapter

    def adapter_parameters(self, model: Backbone) -> int:
        """Return L S (2 D h + h + D), with L - 1 for L without the class token."""
        width, hidden = model.embed_dim, self.hidden_dim
        return len(self._layers(model)) * len(model.branch_outputs) * (2 * width * hidden + hidden + width)


class _Bottleneck(nn.Module):
    def __init__(self, adapter: Adapter, model: Backbone) -> None:
        super().__init__()
        width = model.embed_dim
        self.points = model.points  # a plain object
        self.down = nn.Linear(width, adapter.hidden_dim)
        self.up = nn.Linear(adapter.hidden_dim, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)
        self.activation = adapter.activation
        self.scale = adapter.scale
        self.include_cls = adapter.include_cls

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        added: Tensor = self.up(ACTIVATIONS[self.activation](self.down(y)))
        if not self.include_cls:
            added = zero_at(added, self.points.not_patches)
        return torch.add(y, added, alpha=self.scale)
