"""Bottleneck adapters: after each sublayer, or parallel to its last projection."""

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
        names = sublayers(model, "adapter")
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


def sublayers(model: Backbone, method: str) -> tuple[str, ...]:
    """Return the projections that end the sublayers of a block; ConfigError if the backbone names none."""
    if not model.branch_outputs:
        raise ConfigError(f"{method}: the end of a sublayer is not known for the blocks of this {model.family}")
    return model.branch_outputs


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


class ParallelAdapter(Method):
    """A bottleneck parallel to the last projection of each sublayer: W y + s · U relu(D y).

    Chen et al., "AdaptFormer: Adapting Vision Transformers for Scalable Visual Recognition", NeurIPS 2022,
    arXiv:2205.13535; on Vim as in Yoshimura et al., "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning for Mamba",
    ICLR 2025, arXiv:2411.03855: y is the mean of both gated scans, the input of out_proj. On a ViT both sublayers have
    one, at the inputs of proj and fc2 (AdaptFormer's has the input of the whole MLP). No biases; D starts as
    `nn.Linear` does, U at zero; the dropout acts on the bottleneck.

    Trained parameters without the head, for depth L, inner width E, width D, hidden width h: L h (E + D). On Vim-S
    663,552 for h = 24, which is the published count, and 884,736 for h = 32, which is the released config.

    Args:
        hidden_dim: Width h of the bottleneck.
        scale: s, multiplies the update.
        dropout: On the bottleneck, while training.
    """

    identity_at_start = True

    def __init__(self, hidden_dim: int = 24, scale: float = 0.1, dropout: float = 0.1) -> None:
        check_setting("parallel_adapter", "hidden_dim", hidden_dim, 1)
        check_setting("parallel_adapter", "scale", scale, "positive")
        check_setting("parallel_adapter", "dropout", dropout, "fraction")
        self.hidden_dim = hidden_dim
        self.scale = scale
        self.dropout = dropout

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}.{projection}`, parallel to the projection that ends a sublayer."""
        adapter = model.adapter = nn.ModuleDict()
        places = model.projections
        for layer in range(model.depth):
            adapter[str(layer)] = parts = nn.ModuleDict()
            for name in sublayers(model, "parallel_adapter"):
                parts[name] = part = _Parallel(self, places[name].in_features, model.embed_dim)
                model.points.on_linear(layer, name, part)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return L h (E + D), summed over the sublayers."""
        places = model.projections
        sides = sum(places[name].in_features + model.embed_dim for name in model.branch_outputs)
        return model.depth * self.hidden_dim * sides


class _Parallel(nn.Module):
    def __init__(self, adapter: ParallelAdapter, inner: int, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(inner, adapter.hidden_dim, bias=False)
        self.up = nn.Linear(adapter.hidden_dim, width, bias=False)
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(adapter.dropout)
        self.scale = adapter.scale

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.add(y, self.up(self.dropout(F.relu(self.down(x)))), alpha=self.scale)
