"""Sparse dimension tuning of the SSM with LoRA (SDLoRA)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting, stage_border
from svp_bench.methods.lora import OnOutput
from svp_bench.models import Backbone, VisionMamba


class SDLoRA(Method):
    """Differences on a few channels and states of the SSM, which a warm-up selects, and LoRA on out_proj.

    Galim et al., "Parameter-Efficient Fine-Tuning of State Space Models", ICML 2025, arXiv:2410.09016. A_log + δ, and
    W + γ for the rows of B and C in x_proj; all differences start at zero.

    Stages: first δ of all channels and states trains, with LoRA on out_proj. Then the channels of each block and
    direction are ranked by the sum of δ² over the states, and the states of a selected channel by δ²; δ and LoRA go
    back to their start. In the second stage δ of the selected states of the selected channels trains, γ in the same
    input columns (for all states), and LoRA. The head trains in both and is not reset. The learning rate is that of the
    one schedule: with its warm-up of 10 of 100 epochs, that of the first stage is the rising part.

    Trained parameters without the head, those of the second stage, for K = ⌈channel_share · E⌉ channels and
    S = ⌈state_share · N⌉ states: ``2 L (K S + 2 N K) + L r (E + D)``. On Vim-S: 13,824 + 221,184 = 235,008. The full δ
    of the first stage (589,824 there) is in checkpoints, as zeros, and does not count.

    The released code starts the second stage from the pre-trained weights in a second run, and can set states to zero
    (none by default), which is left out here. Its count for Vim is derived; nobody published it on Vim.

    Args:
        channel_share: Selected share of the channels.
        state_share: Selected share of the states of a selected channel.
        rank: r of LoRA.
        scale: Multiplies LoRA's product; the released α / r is 1.
        dropout: On the r channels of LoRA, while training.
        warmup_share: Share of the epochs for the first stage, at least one epoch. Released: up to about one of ten.
    """

    identity_at_start = True
    mergeable = True
    stages = 2

    def __init__(
        self,
        channel_share: float = 0.01,
        state_share: float = 0.25,
        rank: int = 8,
        scale: float = 1.0,
        dropout: float = 0.1,
        warmup_share: float = 0.1,
    ) -> None:
        for name, share in (("channel_share", channel_share), ("state_share", state_share)):
            check_setting("sdlora", name, share, "positive")
            if share > 1:
                raise ConfigError(f"sdlora: {name} must be at most 1, not {share}")
        check_setting("sdlora", "rank", rank, 1)
        check_setting("sdlora", "scale", scale, "positive")
        check_setting("sdlora", "dropout", dropout, "fraction")
        check_setting("sdlora", "warmup_share", warmup_share, "positive")
        check_setting("sdlora", "warmup_share", warmup_share, "fraction")
        self.channel_share = channel_share
        self.state_share = state_share
        self.rank = rank
        self.scale = scale
        self.dropout = dropout
        self.warmup_share = warmup_share

    def _sizes(self, model: Backbone) -> tuple[int, int, int, int]:
        """Return channels, states, selected channels and selected states."""
        if "C" not in model.projections:
            raise ConfigError(f"sdlora: {model.family} has no selective scan; vim and mambar have one")
        rows = model.projections["C"]
        channels, states = rows.in_features, rows.stop - rows.start
        return channels, states, _selected(self.channel_share, channels), _selected(self.state_share, states)

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}`: A, x_proj, their backward copies A_b and x_proj_b, and out_proj."""
        channels, states, selected, selected_states = self._sizes(model)
        first, out = model.projections["B"].start, model.projections["out_proj"]
        adapter = nn.ModuleDict()
        for layer in range(model.depth):
            parts: dict[str, nn.Module] = {}
            for suffix in ("", "_b"):
                parts[f"A{suffix}"] = on_a = _States(channels, states, selected, selected_states)
                parts[f"x_proj{suffix}"] = on_columns = _Columns(first, states, selected)
                model.points.on_tensor(layer, f"A{suffix}", on_a)
                model.points.on_tensor(layer, f"x_proj{suffix}.weight", on_columns)
            parts["out_proj"] = low_rank = OnOutput(out, "out_proj.weight", self.rank, self.scale, self.dropout)
            low_rank.register_buffer("start_down", low_rank.down.weight.detach().clone(), persistent=False)
            model.points.on_linear(layer, "out_proj", low_rank)
            adapter[str(layer)] = nn.ModuleDict(parts)
        model.adapter = adapter

    def stage(self, epoch: int, epochs: int) -> int:
        """Return 0 in the warm-up, then 1."""
        return int(epoch >= stage_border(self.warmup_share, epochs))

    def trains_in_stage(self, name: str, stage: int) -> bool:
        """Whether it is not one of the differences of the other stage."""
        return not name.endswith((".selected", ".probe")[stage])

    @torch.no_grad()
    def start_epoch(self, model: Backbone, epoch: int, epochs: int) -> None:
        """Before the second stage: select channels and states, reset the differences and LoRA."""
        if epoch != stage_border(self.warmup_share, epochs):
            return
        assert isinstance(model.adapter, nn.ModuleDict)
        for parts in model.adapter.values():
            assert isinstance(parts, nn.ModuleDict)
            for suffix in ("", "_b"):
                on_a, on_columns = parts[f"A{suffix}"], parts[f"x_proj{suffix}"]
                assert isinstance(on_a, _States)
                assert isinstance(on_columns, _Columns)
                on_a.select()
                on_columns.channels.copy_(on_a.channels)
            low_rank = parts["out_proj"]
            assert isinstance(low_rank, OnOutput)
            low_rank.down.weight.copy_(low_rank.get_buffer("start_down"))
            low_rank.up.weight.zero_()

    def fold(self, model: Backbone) -> None:
        """Add the differences and LoRA's product to the frozen tensors."""
        assert isinstance(model.adapter, nn.ModuleDict)
        assert isinstance(model, VisionMamba)
        for layer, (mixer, parts) in enumerate(zip(model.mixers, model.adapter.values(), strict=True)):
            assert isinstance(parts, nn.ModuleDict)
            for suffix in ("", "_b"):
                on_a, on_columns = parts[f"A{suffix}"], parts[f"x_proj{suffix}"]
                assert isinstance(on_a, _States)
                mixer.get_parameter(f"A{suffix}_log").add_(on_a.change())
                weight = model.tensor_parameter(layer, f"x_proj{suffix}.weight")
                weight.copy_(on_columns(weight))
            weight, low_rank = model.tensor_parameter(layer, "out_proj.weight"), parts["out_proj"]
            assert isinstance(low_rank, OnOutput)
            weight.copy_(low_rank.changed(weight))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 2 L (K S + 2 N K) + L r (E + D)."""
        channels, states, selected, selected_states = self._sizes(model)
        of_scan = 2 * (selected * selected_states + 2 * states * selected)
        return model.depth * (of_scan + self.rank * (channels + model.embed_dim))


def _selected(share: float, size: int) -> int:
    """Return how many of `size` a share selects, rounded up."""
    return max(1, math.ceil(share * size - 1e-9))


class _States(nn.Module):
    """A difference on A_log: of all entries (`probe`), and of the selected ones."""

    channels: Tensor
    states: Tensor

    def __init__(self, channels: int, states: int, selected: int, selected_states: int) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.zeros(channels, states))
        self.selected = nn.Parameter(torch.zeros(selected, selected_states))
        self.register_buffer("channels", torch.arange(selected))
        self.register_buffer("states", torch.arange(selected_states).repeat(selected, 1))

    def select(self) -> None:
        """Keep the entries that moved the most, and start at zero."""
        moved = self.probe.float().square()
        self.channels.copy_(moved.sum(1).topk(len(self.channels)).indices.sort().values)
        chosen = moved[self.channels].topk(self.states.shape[1], dim=1).indices
        self.states.copy_(chosen.sort(dim=1).values)
        self.probe.zero_()
        self.selected.zero_()

    def change(self) -> Tensor:
        """Return the difference, (E, N)."""
        return self.probe.index_put((self.channels[:, None], self.states), self.selected, accumulate=True)

    def forward(self, A: Tensor) -> Tensor:
        """A = -exp(A_log) → -exp(A_log + difference)."""
        return A * self.change().to(A.dtype).exp()


class _Columns(nn.Module):
    """A difference on the rows of B and C in x_proj, in the selected columns."""

    channels: Tensor

    def __init__(self, first_row: int, states: int, selected: int) -> None:
        super().__init__()
        self.first_row = first_row
        self.selected = nn.Parameter(torch.zeros(2 * states, selected))
        self.register_buffer("channels", torch.arange(selected))

    def forward(self, weight: Tensor) -> Tensor:
        """(R + 2 N, E) → the same shape."""
        before, rows = weight.tensor_split([self.first_row])
        return torch.cat([before, rows.index_add(1, self.channels, self.selected.to(rows.dtype))])
