"""Affix tuning: virtual tokens in front of each scan, inside the mixer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svp_bench.methods.base import Method, check_names, check_setting
from svp_bench.models import Backbone
from svp_bench.models.hooks import ScanInputs, changes_shape


class Affix(Method):
    """Trained tokens in front of the inner sequence of each block and direction, cut off after the scan.

    Yoshimura et al., "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning for Mamba", ICLR 2025, arXiv:2411.03855,
    their `inner_dual_prefix`. The tokens (x, z) of width 2 E stand after in_proj and before the convolution; so each
    scan starts with a trained state, and its first steps convolve trained inputs. Each direction has its own tokens.

    Both scans are causal in their direction. So the tokens of the backward scan can stand behind the sequence, in
    reversed order, at the same time as those of the forward scan in front of it: neither scan reads the tokens of the
    other before the image. The result is that of two separate sequences.

    The tokens start as N(0, 1). With `projection` n tokens of width 2 E, shared by all blocks, pass Linear(2 E, 2 E),
    tanh, and for each block Linear(2 E, 4 E), all with biases; the released code has one Linear(2 E, L · 4 E).

    The z of a token gates its own output alone, which is cut off: half of the tokens, or half of the rows of the last
    projections, never gets a gradient. They are counted, as published.

    Trained parameters without the head, for n tokens, inner width E, depth L: 4 n L E; with `projection`
    2 n E + 4 E² + 2 E + L (8 E² + 4 E). On Vim-S at n = 3: 221,184 and 115,685,376 (published: 230 K with their head,
    and 117 M, which is 1.1 % more than the shapes of their code give). Of the other positions in the released code, a
    suffix reaches no output in a causal scan, and the places inside the sequence are not offered here.

    Args:
        length: Number of tokens n of each block and direction.
        projection: Make the tokens by a shared network, see above.
    """

    identity_at_start = False

    def __init__(self, length: int = 3, projection: bool = False) -> None:
        check_setting("affix", "length", length, 1)
        self.length = length
        self.projection = projection

    def _width(self, model: Backbone) -> int:
        """Return 2 E, the outputs of in_proj."""
        places = model.projections
        check_names("affix", "projections", ["in_proj"], [*places], "projection", model.family)
        return places["in_proj"].stop

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}`, and `adapter.shared` with `projection`; insert after in_proj, cut after the scan."""
        width = self._width(model)
        adapter = model.adapter = nn.ModuleDict()
        shared = _Shared(self.length, width) if self.projection else None
        if shared is not None:
            adapter["shared"] = shared
        for layer in range(model.depth):
            adapter[str(layer)] = part = _Affixes(self.length, width, shared)
            model.points.on_linear(layer, "in_proj", part.insert)
            model.points.on_scan(layer, part.cut)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 2 n L W for W = 2 E, with `projection` n W + W² + W + L (2 W² + 2 W)."""
        width, length = self._width(model), self.length
        if not self.projection:
            return 2 * length * model.depth * width
        return length * width + width * width + width + model.depth * (2 * width * width + 2 * width)


class _Shared(nn.Module):
    """The tokens before the last projection, (n, W)."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(length, width))
        self.hidden = nn.Linear(width, width)

    def forward(self) -> Tensor:
        return torch.tanh(self.hidden(self.tokens))


class _Affixes(nn.Module):
    """The tokens of a block, those of the forward scan first."""

    def __init__(self, length: int, width: int, shared: _Shared | None) -> None:
        super().__init__()
        self.length = length
        self.shared = (shared,)  # in a tuple: a module of the adapter, not of this one
        if shared is None:
            self.tokens = nn.Parameter(torch.randn(2, length, width))
        else:
            self.up = nn.Linear(width, 2 * width)

    def _tokens(self) -> tuple[Tensor, Tensor]:
        """Return the tokens of both directions, (n, W) each, in the order of their scan."""
        (shared,) = self.shared
        first, second = self.tokens.unbind() if shared is None else self.up(shared()).chunk(2, dim=-1)
        return first, second

    @changes_shape
    def insert(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, L, W) → (B, n + L + n, W)."""
        forward, backward = (tokens.to(y.dtype).expand(y.shape[0], -1, -1) for tokens in self._tokens())
        return torch.cat([forward, y, backward.flip(1)], dim=1)

    @changes_shape
    def cut(self, inputs: ScanInputs, y: Tensor) -> Tensor:
        """(B, n + L + n, E) → (B, L, E)."""
        return y[:, self.length : -self.length]
