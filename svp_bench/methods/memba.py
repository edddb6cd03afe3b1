"""Memba: a leaky integrating membrane on the gate, and LoRA on the projections around the scan."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting
from svp_bench.methods.lora import LowRank, OnOutput
from svp_bench.models import Backbone
from svp_bench.models.hooks import HookPoints, Projection


class Memba(Method):
    """A membrane without parameters on the gate z of each block, and LoRA on in_proj and out_proj.

    Lee et al., "Memba: Membrane-driven Parameter-Efficient Fine-Tuning for Mamba", ICLR 2026, arXiv:2506.18184. The
    sequence is cut into T chunks X_1 … X_T of the same length, and the membrane u, a tensor of a chunk's shape, follows
    u_(i+1) = f(τ u_i + X_i), f(v) = 0 where v > V and v elsewhere; u_2 … u_(T+1) take the place of X_1 … X_T. u_1 is
    the mean of the membranes of the block before; 0 in the first block. LoRA as in `LoRA`.

    Written without the released code. Open, and set here: T and τ (a larger τ is reported as better); whether the
    membrane acts on z or inside the low-rank bypass of in_proj; scale and dropout of LoRA; the last chunk, which is
    filled with zeros if T does not divide the length (197 tokens); the gradient of f, 0 where it resets and else 1;
    the activation of the gate, which stays Vim's SiLU.

    On z the model changes before the first step: f removes gates above V. Inside the bypass it starts as the backbone.
    f jumps at V, so rounding moves single gates across: bf16 differs from float32 much more than with other methods.

    Trained parameters without the head, for rank r, depth L, width D, inner width E: L r (3 D + 3 E); 4,718,592 on
    Vim-S at rank 64, the published number.

    Args:
        rank: r, the same for both projections.
        scale: s, multiplies the low-rank products.
        dropout: On the r channels, while training.
        place: gate: on z; bypass: on the r channels, for the rows of z alone.
        chunks: T.
        tau: τ, in (0, 1].
        threshold: V; published 1.
        hand_over: Start a block's membrane at the mean of the block before, not at 0.
    """

    identity_at_start: bool  # inside the bypass

    def __init__(
        self,
        rank: int = 64,
        scale: float = 0.1,
        dropout: float = 0.1,
        place: Literal["gate", "bypass"] = "gate",
        chunks: int = 4,
        tau: float = 0.9,
        threshold: float = 1.0,
        hand_over: bool = True,
    ) -> None:
        check_setting("memba", "rank", rank, 1)
        check_setting("memba", "scale", scale, "positive")
        check_setting("memba", "dropout", dropout, "fraction")
        check_setting("memba", "place", place, ["gate", "bypass"])
        check_setting("memba", "chunks", chunks, 1)
        if not 0 < tau <= 1:
            raise ConfigError(f"memba: tau must be in (0, 1], not {tau}")
        check_setting("memba", "threshold", threshold, "positive")
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        self.place = place
        self.chunks = chunks
        self.tau = tau
        self.threshold = threshold
        self.hand_over = hand_over
        self.identity_at_start = place == "bypass"

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}.in_proj` and `.out_proj`, with hooks on these projections."""
        if not model.points.has_scan:
            raise ConfigError(f"memba: {model.family} has no gate; the families vim and mambar have one")
        places = model.projections
        gate = places["Z"].start
        model.adapter = adapter = nn.ModuleDict()
        for layer in range(model.depth):
            membrane, sizes = _Membrane(self, model.points), (self.rank, self.scale, self.dropout)
            adapter[str(layer)] = parts = nn.ModuleDict()
            if self.place == "gate":
                parts["in_proj"] = OnOutput(places["in_proj"], "in_proj.weight", *sizes)
                parts["gate"] = _OnGate(membrane, gate)
            else:
                parts["in_proj"] = _Bypass(places["in_proj"], *sizes, membrane, gate)
            for hook in parts.values():
                model.points.on_linear(layer, "in_proj", hook)
            parts["out_proj"] = OnOutput(places["out_proj"], "out_proj.weight", *sizes)
            model.points.on_linear(layer, "out_proj", parts["out_proj"])

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the formula of the class docstring."""
        places = (model.projections["in_proj"], model.projections["out_proj"])
        return model.depth * self.rank * sum(place.in_features + place.stop - place.start for place in places)


class _Membrane:
    """The membrane of a block: tokens (B, L, F) → the membrane that has taken in each token, (B, L, F)."""

    def __init__(self, memba: Memba, points: HookPoints) -> None:
        self.points = points
        self.chunks, self.tau, self.threshold = memba.chunks, memba.tau, memba.threshold
        self.hand_over = memba.hand_over

    def __call__(self, tokens: Tensor) -> Tensor:
        length = int(tokens.shape[1])
        size = -(-length // self.chunks)
        chunks = F.pad(tokens, (0, 0, 0, self.chunks * size - length)).chunk(self.chunks, dim=1)
        carried = self.points.carried
        membrane = carried.get("memba") if self.hand_over else None
        membranes = []
        for chunk in chunks:
            integrated = chunk if membrane is None else self.tau * membrane + chunk
            membrane = integrated.masked_fill(integrated > self.threshold, 0.0)
            membranes.append(membrane)
        stacked = torch.stack(membranes, dim=1)
        if self.hand_over:
            carried["memba"] = stacked.mean(dim=1)
        return stacked.flatten(1, 2)[:, :length]


class _OnGate(nn.Module):
    """The membrane on the rows of z."""

    def __init__(self, membrane: _Membrane, gate: int) -> None:
        super().__init__()
        self.membrane, self.gate = membrane, gate

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.cat([y[..., : self.gate], self.membrane(y[..., self.gate :])], dim=-1)


class _Bypass(LowRank):
    """A low-rank update of the output of in_proj, with the membrane between the factors for the rows of z."""

    def __init__(
        self, place: Projection, rank: int, scale: float, dropout: float, membrane: _Membrane, gate: int
    ) -> None:
        super().__init__(place, "in_proj.weight", rank, scale)
        self.dropout = nn.Dropout(dropout)
        self.membrane, self.gate = membrane, gate

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        h = self.dropout(self.down(x))
        rows, gate_rows = self.up.weight.tensor_split([self.gate])
        update = torch.cat([F.linear(h, rows), F.linear(self.membrane(h), gate_rows)], dim=-1)
        return torch.add(y, update.to(y.dtype), alpha=self.scale)
