"""Low-rank adaptation (LoRA) of Vim's projections."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svp_bench.methods.base import Method, check_names, check_setting
from svp_bench.models import VisionMamba
from svp_bench.models.hooks import is_plain, plain_parameter
from svp_bench.ops import is_tracing

TARGETS = ("embed", "in_proj", "X", "Z", "x_proj", "d", "B", "C", "dt_proj", "out_proj")


class _Rows(NamedTuple):
    """Rows start … stop - 1 of a projection whose input has `columns` channels."""

    projection: str
    start: int
    stop: int
    columns: int

    @property
    def suffixes(self) -> tuple[str, ...]:
        """Return the suffixes of its copies: one, or one per direction."""
        return ("",) if self.projection in ("in_proj", "out_proj") else ("", "_b")


class LoRA(Method):
    """A trained low-rank product added to frozen projections: W + s · up · down.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685; the targets
    and row slices ("partial LoRA") are those of Yoshimura et al., "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning
    for Mamba", ICLR 2025, arXiv:2411.03855. `down` starts as `nn.Linear` does, `up` at zero; neither
    has a bias. Overlapping targets add up.

    Trained parameters without the head, for rank r, width D, inner width E, N states, rank R of Δ, depth L, patches of
    p × p, by target::

        embed      r (3 p² + D)             the patch embedding: a convolution to r channels, then r → D
        in_proj    L r (D + 2 E)            both parts
        X, Z       L r (D + E)              its rows of the convolved part, its rows of the gate
        x_proj     2 L r (E + R + 2 N)      both directions, as for d, B, C and dt_proj
        d          2 L r (E + R)            its rows of Δ
        B, C       2 L r (E + N)            its rows of B, its rows of C
        dt_proj    2 L r (R + E)
        out_proj   L r (E + D)

    r may exceed the number of rows, as in MambaPEFT. embed, in_proj, X, Z and out_proj act on the output of the
    projection, with dropout. The others act on the weight, as in MambaPEFT, without dropout: their weights are small.

    Args:
        targets: Parts with an update; see above.
        rank: r, the same for all targets.
        scale: s, multiplies the product (and is not divided by the rank).
        dropout: On the r channels, while training.
    """

    identity_at_start = True
    mergeable = True

    def __init__(
        self,
        targets: Sequence[str] = ["X"],  # a list as in the method file; never modified
        rank: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        check_names("lora", "targets", targets, TARGETS, "target of lora")
        check_setting("lora", "rank", rank, 1)
        check_setting("lora", "scale", scale, "positive")
        check_setting("lora", "dropout", dropout, "fraction")
        self.targets = list(targets)
        self.rank = rank
        self.scale = scale
        self.dropout = dropout

    def _rows(self, model: VisionMamba) -> dict[str, _Rows]:
        """Return the rows of each target but the patch embedding."""
        mixer, width = model.mixers[0], model.embed_dim
        (inner, state), rank = mixer.A_log.shape, mixer.dt_rank
        rows = {
            "in_proj": _Rows("in_proj", 0, 2 * inner, width),
            "X": _Rows("in_proj", 0, inner, width),
            "Z": _Rows("in_proj", inner, 2 * inner, width),
            "x_proj": _Rows("x_proj", 0, rank + 2 * state, inner),
            "d": _Rows("x_proj", 0, rank, inner),
            "B": _Rows("x_proj", rank, rank + state, inner),
            "C": _Rows("x_proj", rank + state, rank + 2 * state, inner),
            "dt_proj": _Rows("dt_proj", 0, inner, rank),
            "out_proj": _Rows("out_proj", 0, width, inner),
        }
        return {target: rows[target] for target in self.targets if target in rows}

    def attach(self, model: VisionMamba) -> None:
        """Build `adapter.embed` and `adapter.{layer}.{target}`, backward copies with the suffix _b."""
        adapter = nn.ModuleDict()
        points, rank, scale, dropout = model.points, self.rank, self.scale, self.dropout
        if "embed" in self.targets:
            embed = adapter["embed"] = _OnPatches(model, rank, scale, dropout)
            points.on_patch_embed(embed)
        rows = self._rows(model)
        for layer in range(model.depth if rows else 0):
            adapter[str(layer)] = parts = nn.ModuleDict()
            for target, place in rows.items():
                for suffix in place.suffixes:
                    name = f"{place.projection}{suffix}"
                    if place.projection in ("in_proj", "out_proj"):
                        on_output = parts[target] = _OnOutput(place, f"{name}.weight", rank, scale, dropout)
                        points.on_linear(layer, name, on_output)
                    else:
                        on_weight = parts[f"{target}{suffix}"] = _OnWeight(place, f"{name}.weight", rank, scale)
                        points.on_tensor(layer, f"{name}.weight", on_weight)
        model.adapter = adapter

    def fold(self, model: VisionMamba) -> None:
        """Add each product to its rows of the frozen weight."""
        assert isinstance(model.adapter, nn.ModuleDict)
        for key, part in model.adapter.items():
            if isinstance(part, _OnPatches):
                weight = plain_parameter(model, "patch_embed.proj.weight")
                weight.copy_(part.changed(weight))
                continue
            assert isinstance(part, nn.ModuleDict)
            for update in part.values():
                assert isinstance(update, _LowRank)
                weight = plain_parameter(model.mixers[int(key)], update.name)
                weight.copy_(update.changed(weight))

    def adapter_parameters(self, model: VisionMamba) -> int:
        """Return the sum of the formulas of the class docstring."""
        rows = self._rows(model).values()
        sides = sum(len(place.suffixes) * (place.columns + place.stop - place.start) for place in rows)
        patch = model.in_chans * math.prod(model.patch_embed.patch_size)
        embed = patch + model.embed_dim if "embed" in self.targets else 0
        return self.rank * (model.depth * sides + embed)


class _AddProduct(torch.autograd.Function):
    """y[..., start:start + rows] += s · h upᵀ, in place.

    For y (…, out), h (…, r), up (rows, r). In place, because the output of in_proj is the largest tensor of a block.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, h: Tensor, up: Tensor, start: int, scale: float) -> Tensor:
        y.view(-1, y.shape[-1])[:, start : start + len(up)].addmm_(h.flatten(0, -2), up.T, alpha=scale)
        ctx.mark_dirty(y)
        ctx.save_for_backward(h, up)
        ctx.settings = (start, scale)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (h, up), (start, scale) = ctx.saved_tensors, ctx.settings
        need_y, need_h, need_up, *_ = ctx.needs_input_grad
        part = grad.reshape(-1, grad.shape[-1])[:, start : start + len(up)]
        grad_h = part.mm(up).mul_(scale).view_as(h) if need_h else None
        grad_up = part.T.mm(h.flatten(0, -2)).mul_(scale) if need_up else None
        return grad if need_y else None, grad_h, grad_up, None, None


class _LowRank(nn.Module):
    """Factors for rows of the weight `name` of a mixer."""

    def __init__(self, place: _Rows, name: str, rank: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.start, self.stop = place.start, place.stop
        self.scale = scale
        self.down = nn.Linear(place.columns, rank, bias=False)
        self.up = nn.Linear(rank, place.stop - place.start, bias=False)
        nn.init.zeros_(self.up.weight)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight (out, in) with s · up · down added to its rows."""
        before, rows, after = weight.tensor_split([self.start, self.stop])
        down, up = plain_parameter(self, "down.weight"), plain_parameter(self, "up.weight")
        with torch.autocast(weight.device.type, enabled=False):  # rounded once, when the projection reads it
            rows = torch.addmm(rows, up, down, alpha=self.scale)
        return torch.cat([before, rows, after])


class _OnWeight(_LowRank):
    """Update of the weight of a projection."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.changed(weight)


class _OnOutput(_LowRank):
    """Update of the output of a projection."""

    def __init__(self, place: _Rows, name: str, rank: int, scale: float, dropout: float) -> None:
        super().__init__(place, name, rank, scale)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.dropout(self.down(x)).to(y.dtype)
        if is_tracing() or not is_plain(self.up, nn.Linear):  # out of place, by plain operations
            before, rows, after = y.tensor_split([self.start, self.stop], dim=-1)
            return torch.cat([before, torch.add(rows, self.up(h).to(y.dtype), alpha=self.scale), after], dim=-1)
        added: Tensor = _AddProduct.apply(y.contiguous(), h, self.up.weight.to(y.dtype), self.start, self.scale)
        return added


class _OnPatches(nn.Module):
    """Update of the output of the patch embedding."""

    def __init__(self, model: VisionMamba, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        side, stride = model.patch_embed.patch_size[0], model.patch_embed.stride
        self.scale = scale
        self.down = nn.Conv2d(model.in_chans, rank, side, stride, bias=False)
        self.up = nn.Linear(rank, model.embed_dim, bias=False)  # a 1 × 1 convolution on tokens
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight (D, 3, p, p) with s · up · down added."""
        down, up = plain_parameter(self, "down.weight"), plain_parameter(self, "up.weight")
        with torch.autocast(weight.device.type, enabled=False):
            product = up @ down.flatten(1)
        return torch.add(weight, product.view_as(weight), alpha=self.scale)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        h = self.dropout(self.down(images).flatten(2).mT)
        return torch.add(tokens, self.up(h), alpha=self.scale)
