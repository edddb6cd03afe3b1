"""Self-Prompt Tuning (SPT): VPT whose prompts start as tokens of training images."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from svp_bench.methods.base import check_setting, frozen_backbone
from svp_bench.methods.vpt import _VPT, Position, _Prompts
from svp_bench.models import Backbone


class SPT(_VPT):
    """Trained tokens before each block, or before block 0 alone, that start as patch tokens of training images.

    Wang et al., "Revisiting the Power of Prompt for Visual Tuning", ICML 2024, arXiv:2402.02382. VPT in all but the
    start: before the training, images of the training split pass the frozen backbone, and the prompts of a block are
    patch tokens sampled from its inputs, uniformly over images and places, without replacement. The released code takes
    20 prompts deep and 100 shallow, samples class tokens too, and averages the weights; means, maxima and centres of
    k-means in place of sampled tokens are left out. On Vim the input of a block is the sum of hidden state and residual
    stream. Before `prepare` the prompts have VPT's start.

    Trained parameters without the head: depth · length · D deep, length · D shallow.

    Args:
        length: Number of prompts of each block.
        deep: New prompts before each block; false: before block 0 alone.
        position: See `svp_bench.methods.vpt.prompt_positions`.
        dropout: On the prompts, while training.
        samples: Training images that tokens are sampled from; the released code takes all.
    """

    def __init__(
        self,
        length: int = 20,
        deep: bool = True,
        position: Position = "prefix",
        dropout: float = 0.0,
        samples: int = 1000,
    ) -> None:
        super().__init__(length, position, dropout)
        check_setting("spt", "samples", samples, 1)
        self.deep = deep
        self.samples = samples

    def _layers(self, model: Backbone) -> int:
        return model.depth if self.deep else 1

    def attach(self, model: Backbone) -> None:
        """Insert the prompts before block 0 and, deep, replace them before each later block."""
        self._attach(model, self._layers(model), accumulate=False)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return length · D, deep for each block."""
        return self._layers(model) * self.length * model.embed_dim

    @torch.no_grad()
    def prepare(self, model: Backbone, images: Iterable[Tensor]) -> None:
        """Sample the prompts of each block from the tokens of training images."""
        adapter = model.adapter
        assert isinstance(adapter, _Prompts)
        found = [_Sample(self.length, model.embed_dim) for _ in range(self._layers(model))]
        left = self.samples
        for whole in images:
            batch = whole[:left]
            left -= len(batch)
            with frozen_backbone(model):
                state = model.embed(batch)
                for layer, sample in enumerate(found):
                    sample.add(state.patch_stream)
                    state = model.run_blocks(state, layer, layer + 1)
            if not left:
                break
        for prompts, sample in zip(adapter.prompts, found, strict=True):
            prompts[: len(sample.tokens)] = sample.tokens


class _Sample:
    """Tokens sampled from batches, uniformly and without replacement: those with the smallest random keys."""

    def __init__(self, count: int, width: int) -> None:
        self.count = count
        self.keys, self.tokens = torch.empty(0), torch.empty(0, width)

    def add(self, tokens: Tensor) -> None:
        """Sample from tokens (B, L, D) too."""
        flat = tokens.flatten(0, 1)
        keys = torch.cat([self.keys, torch.rand(len(flat))])
        smallest = keys.argsort()[: self.count]
        self.tokens = torch.cat([self.tokens.to(flat), flat])[smallest.to(flat.device)]
        self.keys = keys[smallest]
