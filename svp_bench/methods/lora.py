"""Low-rank adaptation (LoRA, DoRA) of a backbone's projections."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_names, check_setting
from svp_bench.models import Backbone
from svp_bench.models.hooks import Projection, is_plain, plain_parameter
from svp_bench.ops import is_tracing, no_autocast


class LoRA(Method):
    """A trained low-rank product added to frozen projections: W + s · up · down.

    Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv:2106.09685; on Vim the targets
    and row slices ("partial LoRA") are those of Yoshimura et al., "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning
    for Mamba", ICLR 2025, arXiv:2411.03855. `down` starts as `nn.Linear` does, `up` at zero; neither
    has a bias. Overlapping targets add up.

    With `dora` the updated rows get a trained magnitude per input channel, W' = m ⊙ (W + s · up · down) / ‖W + s · up ·
    down‖, the norm over the rows, not differentiated, m starting at ‖W‖ (Liu et al., "DoRA: Weight-Decomposed Low-Rank
    Adaptation", ICML 2024, arXiv:2402.09353). In MambaPEFT's code the backward copies of d, B and C start at the
    forward norm; here at their own.

    Trained parameters without the head, for rank r and depth L: r times the sum of inputs and outputs of each target
    and direction, times L; with `dora` one more for each input. On Vim, for width D, inner width E, N states, rank R of
    Δ, patches of p × p::

        embed      r (3 p² + D)             the patch embedding: a convolution to r channels, then r → D
        in_proj    L r (D + 2 E)            both parts
        X, Z       L r (D + E)              its rows of the convolved part, its rows of the gate
        x_proj     2 L r (E + R + 2 N)      both directions, as for d, B, C and dt_proj
        d          2 L r (E + R)            its rows of Δ
        B, C       2 L r (E + N)            its rows of B, its rows of C
        dt_proj    2 L r (R + E)
        out_proj   L r (E + D)

    On a ViT the targets are embed, qkv, its rows q, k and v, proj, fc1 and fc2. r may exceed the number of rows, as in
    MambaPEFT. embed, in_proj, X, Z, out_proj and the targets of a ViT act on the output of the projection, with
    dropout. The others, and all with `dora`, act on the weight, without dropout.

    Args:
        targets: Parts with an update; see above. null: X on Vim, as the strongest of MambaPEFT; q and v on a ViT, as
            LoRA's paper.
        rank: r, the same for all targets.
        scale: s, multiplies the product (and is not divided by the rank).
        dropout: On the r channels, while training.
        dora: Train a magnitude per input channel too; null: no.
    """

    identity_at_start = True
    mergeable = True

    def __init__(
        self,
        targets: Sequence[str] | None = None,
        rank: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        dora: bool | None = None,  # null, so that records from before it are the same setting
    ) -> None:
        check_setting("lora", "rank", rank, 1)
        check_setting("lora", "scale", scale, "positive")
        check_setting("lora", "dropout", dropout, "fraction")
        self.targets = None if targets is None else targets if isinstance(targets, str) else list(targets)
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        self.dora = dora

    def _targets(self, model: Backbone) -> dict[str, Projection | None]:
        """Return the projection of each target; None for the patch embedding."""
        known: dict[str, Projection | None] = {"embed": None, **model.projections}
        targets = model.default_targets if self.targets is None else self.targets
        check_names("lora", "targets", targets, [*known], "target of lora", model.family)
        if self.dora and "embed" in targets:
            raise ConfigError("lora: dora has no form for the patch embedding; leave out the target embed")
        return {target: known[target] for target in known if target in targets}

    def attach(self, model: Backbone) -> None:
        """Build `adapter.embed` and `adapter.{layer}.{target}`, backward copies with the suffix _b."""
        adapter = nn.ModuleDict()
        targets = self._targets(model)
        if "embed" in targets:
            embed = adapter["embed"] = _OnPatches(model, self.rank, self.scale, self.dropout)
            model.points.on_patch_embed(embed)
        places = [(target, place) for target, place in targets.items() if place is not None]
        for layer in range(model.depth if places else 0):
            adapter[str(layer)] = parts = nn.ModuleDict()
            for target, place in places:
                for point in place.points:
                    name = f"{target}_b" if point.endswith("_b") else target
                    weight = f"{point}.weight"
                    if self.dora:
                        frozen = model.tensor_parameter(layer, weight)
                        parts[name] = dora = _Decomposed(place, weight, self.rank, self.scale, frozen)
                        model.points.on_tensor(layer, weight, dora)
                    elif place.on_weight:
                        parts[name] = on_weight = _OnWeight(place, weight, self.rank, self.scale)
                        model.points.on_tensor(layer, weight, on_weight)
                    else:
                        parts[name] = on_output = OnOutput(place, weight, self.rank, self.scale, self.dropout)
                        model.points.on_linear(layer, point, on_output)
        model.adapter = adapter

    def fold(self, model: Backbone) -> None:
        """Add each product to its rows of the frozen weight."""
        assert isinstance(model.adapter, nn.ModuleDict)
        for key, part in model.adapter.items():
            if isinstance(part, _OnPatches):
                weight = plain_parameter(model, "patch_embed.proj.weight")
                weight.copy_(part.changed(weight))
                continue
            assert isinstance(part, nn.ModuleDict)
            for update in part.values():
                assert isinstance(update, LowRank)
                weight = model.tensor_parameter(int(key), update.name)
                weight.copy_(update.changed(weight))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the sum of the formulas of the class docstring."""
        count = 0
        for place in self._targets(model).values():
            if place is None:
                count += self.rank * (model.in_chans * model.patch_size**2 + model.embed_dim)
                continue
            sides = self.rank * (place.in_features + place.stop - place.start)
            count += model.depth * len(place.points) * (sides + (place.in_features if self.dora else 0))
        return count


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


class LowRank(nn.Module):
    """Factors for rows of the weight `name` of a block."""

    def __init__(self, place: Projection, name: str, rank: int, scale: float) -> None:
        super().__init__()
        self.name = name
        self.start, self.stop = place.start, place.stop
        self.scale = scale
        self.down = nn.Linear(place.in_features, rank, bias=False)
        self.up = nn.Linear(rank, place.stop - place.start, bias=False)
        nn.init.zeros_(self.up.weight)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight (out, in) with s · up · down added to its rows."""
        before, rows, after = weight.tensor_split([self.start, self.stop])
        down, up = plain_parameter(self, "down.weight"), plain_parameter(self, "up.weight")
        with no_autocast(weight):  # rounded once, when the projection reads it
            rows = torch.addmm(rows, up, down, alpha=self.scale)
        return torch.cat([before, rows, after])


class _OnWeight(LowRank):
    """Update of the weight of a projection."""

    def forward(self, weight: Tensor) -> Tensor:
        return self.changed(weight)


class _Decomposed(_OnWeight):
    """Update of rows of a weight with a trained magnitude of each of its columns (DoRA)."""

    def __init__(self, place: Projection, name: str, rank: int, scale: float, weight: Tensor) -> None:
        super().__init__(place, name, rank, scale)
        rows = weight.detach()[place.start : place.stop]
        self.magnitude = nn.Parameter(torch.linalg.vector_norm(rows.float(), dim=0))

    def changed(self, weight: Tensor) -> Tensor:
        before, rows, after = super().changed(weight).tensor_split([self.start, self.stop])
        norm = torch.linalg.vector_norm(rows.detach().float(), dim=0).clamp_min(1e-12)  # a column may be zero
        return torch.cat([before, rows * (self.magnitude / norm).to(rows.dtype), after])


class OnOutput(LowRank):
    """Update of the output of a projection."""

    def __init__(self, place: Projection, name: str, rank: int, scale: float, dropout: float) -> None:
        super().__init__(place, name, rank, scale)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x (…, in), y (…, out) → y with the product added to its rows; may change y in place."""
        h = self.dropout(self.down(x)).to(y.dtype)
        if is_tracing() or not is_plain(self.up, nn.Linear):  # out of place, by plain operations
            before, rows, after = y.tensor_split([self.start, self.stop], dim=-1)
            return torch.cat([before, torch.add(rows, self.up(h).to(y.dtype), alpha=self.scale), after], dim=-1)
        added: Tensor = _AddProduct.apply(y.contiguous(), h, self.up.weight.to(y.dtype), self.start, self.scale)
        return added


class _OnPatches(nn.Module):
    """Update of the output of the patch embedding."""

    def __init__(self, model: Backbone, rank: int, scale: float, dropout: float) -> None:
        super().__init__()
        side, stride = model.patch_size, model.patch_stride
        self.scale = scale
        self.down = nn.Conv2d(model.in_chans, rank, side, stride, bias=False)
        self.up = nn.Linear(rank, model.embed_dim, bias=False)  # a 1 × 1 convolution on tokens
        nn.init.zeros_(self.up.weight)
        self.dropout = nn.Dropout(dropout)

    def changed(self, weight: Tensor) -> Tensor:
        """Return the weight (D, 3, p, p) with s · up · down added."""
        down, up = plain_parameter(self, "down.weight"), plain_parameter(self, "up.weight")
        with no_autocast(weight):
            product = up @ down.flatten(1)
        return torch.add(weight, product.view_as(weight), alpha=self.scale)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        h = self.dropout(self.down(images).flatten(2).mT)
        return torch.add(tokens, self.up(h), alpha=self.scale)
