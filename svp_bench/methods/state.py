"""Trained states of the selective scan: state-offset tuning and initial-state tuning.

Letters used for shapes: B batch, L length (tokens), E inner width, N states.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting
from svp_bench.models import Backbone
from svp_bench.models.hooks import ScanInputs
from svp_bench.ops import Direction, is_tracing, no_autocast

SUFFIXES = ("", "_b")  # of the scan directions


def scan_sizes(model: Backbone, method: str) -> tuple[int, int]:
    """Return E and N of a backbone.

    Raises:
        ConfigError: If it has no selective scan.
    """
    if not model.points.has_scan:
        raise ConfigError(f"{method}: {model.family} has no selective scan; the families vim and mambar have one")
    return model.projections["out_proj"].in_features, model.projections["C"].stop - model.projections["C"].start


class StateOffset(Method):
    """A trained offset of the state that each token reads, or of the output of the scan.

    Kang et al., "State-offset Tuning: State-based Parameter-Efficient Fine-Tuning for State Space Models", ACL 2025,
    arXiv:2503.03499. In each block and scan direction, before the gate::

        h    o_t = (SSM(x)_t + D ⊙ x_t + h' C_t) ⊙ SiLU(z_t)    h' of E × N, C_t that of the token
        y    o_t = (SSM(x)_t + D ⊙ x_t + y') ⊙ SiLU(z_t)        y' of E

    with offsets that start at zero. Published for language models with one direction. Vim halves the sum of its
    directions, so the offsets are halved too; the backward offset reads the backward C. With `y` the sum of both
    offsets alone matters: one of the two would do, and both are trained to have the published form in each direction.

    Trained parameters without the head, for depth L: 2 L E N for h, 2 L r (E + N) with rank r, 2 L E for y. On Vim-S:
    589,824 (as A_log has) and 36,864 (as D has).

    Args:
        kind: h: an offset of the state; y: of the output.
        rank: r of h' = up · down, where `up` starts at zero and `down` as `nn.Linear` does; null: h' itself.
    """

    identity_at_start = True

    def __init__(self, kind: Literal["h", "y"] = "h", rank: int | None = None) -> None:
        check_setting("state_offset", "kind", kind, ["h", "y"])
        if rank is not None:
            check_setting("state_offset", "rank", rank, 1)
            if kind == "y":
                raise ConfigError("state_offset: rank is for kind h; an offset of the output is a vector")
        self.kind = kind
        self.rank = rank

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}`, which adds to the output of the scan."""
        inner, states = scan_sizes(model, "state_offset")
        model.adapter = adapter = nn.ModuleDict()
        for layer in range(model.depth):
            part = _OutputOffset(inner) if self.kind == "y" else _StateOffset(inner, states, self.rank)
            adapter[str(layer)] = part
            model.points.on_scan(layer, part)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the formula of the class docstring."""
        inner, states = scan_sizes(model, "state_offset")
        size = inner * states if self.rank is None else self.rank * (inner + states)
        return 2 * model.depth * (inner if self.kind == "y" else size)


def add_before_gate(inputs: ScanInputs, y: Tensor, added: Tensor) -> Tensor:
    """Return y + ½ added ⊙ SiLU(z), where `added`, (B, L, E) or (E,), is the sum of both directions."""
    return y + (0.5 * added * F.silu(inputs.z)).to(y.dtype)


class _OutputOffset(nn.Module):
    def __init__(self, inner: int) -> None:
        super().__init__()
        self.y = nn.Parameter(torch.zeros(inner))
        self.y_b = nn.Parameter(torch.zeros(inner))

    def forward(self, inputs: ScanInputs, y: Tensor) -> Tensor:
        return add_before_gate(inputs, y, (self.y + self.y_b).to(y.dtype))


class _StateOffset(nn.Module):
    def __init__(self, inner: int, states: int, rank: int | None) -> None:
        super().__init__()
        self.rank = rank
        self.states = states
        for suffix in SUFFIXES:
            if rank is None:
                self.register_parameter(f"h{suffix}", nn.Parameter(torch.zeros(inner, states)))
            else:
                self.add_module(f"down{suffix}", nn.Linear(states, rank, bias=False))
                self.add_module(f"up{suffix}", up := nn.Linear(rank, inner, bias=False))
                nn.init.zeros_(up.weight)

    def offset(self, suffix: str) -> Tensor:
        """Return h' of a direction, (E, N)."""
        if self.rank is None:
            return self.get_parameter(f"h{suffix}")
        return self.get_parameter(f"up{suffix}.weight") @ self.get_parameter(f"down{suffix}.weight")

    def forward(self, inputs: ScanInputs, y: Tensor) -> Tensor:
        offsets = torch.cat([self.offset(suffix) for suffix in SUFFIXES], dim=1)  # both directions in one product
        read = [one.C[..., -self.states :] for one in (inputs.forward, inputs.backward)]  # another method adds in front
        return add_before_gate(inputs, y, F.linear(torch.cat(read, dim=-1), offsets))


class InitialState(Method):
    """A trained state at which the scan starts, instead of zero.

    The baseline of Kang et al., "State-offset Tuning", ACL 2025, arXiv:2503.03499. In each block and scan direction the
    recurrence h_t = exp(Δ_t A) h_(t-1) + Δ_t B_t x_t starts from h_0 of E × N, which starts at zero and takes no weight
    decay. The scan is linear in its state, so this adds, before the gate, C_t · exp((Δ_1 + … + Δ_t) A) h_0; the
    backward direction sums from the end. On the tokens far from the start of a direction the effect fades.

    Trained parameters without the head, for depth L: 2 L E N; 589,824 on Vim-S.
    """

    identity_at_start = True

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}`, which adds to the output of the scan."""
        inner, states = scan_sizes(model, "initial_state")
        model.adapter = adapter = nn.ModuleDict()
        for layer in range(model.depth):
            adapter[str(layer)] = part = _InitialState(inner, states)
            model.points.on_scan(layer, part)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a trained parameter: not to the states."""
        return not name.startswith("adapter.")

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 2 L E N."""
        inner, states = scan_sizes(model, "initial_state")
        return 2 * model.depth * inner * states


class _InitialState(nn.Module):
    def __init__(self, inner: int, states: int) -> None:
        super().__init__()
        self.h = nn.Parameter(torch.zeros(inner, states))
        self.h_b = nn.Parameter(torch.zeros(inner, states))

    def forward(self, inputs: ScanInputs, y: Tensor) -> Tensor:
        ahead = _response(inputs.forward, self.h, backward=False)
        return add_before_gate(inputs, y, ahead + _response(inputs.backward, self.h_b, backward=True))


def _response(inputs: Direction, h: Tensor, backward: bool) -> Tensor:
    """Return C_t · exp(A Σ Δ) h for each token, (B, L, E), in float32 or wider."""
    wide, states = torch.promote_types(h.dtype, torch.float32), int(h.shape[1])
    A, C = inputs.A[:, -states:], inputs.C[..., -states:]  # another method adds states in front
    with no_autocast(h):
        bias = inputs.delta_bias
        delta = inputs.delta.to(wide)
        delta = F.softplus(delta if bias is None else delta + bias)
        elapsed = delta.flip(1).cumsum(1).flip(1) if backward else delta.cumsum(1)
        parts = elapsed, A.to(wide), C.to(wide), h.to(wide)
        response: Tensor = _sum_of_decays(*parts) if is_tracing() else _Decays.apply(*parts)
    return response


def _sum_of_decays(elapsed: Tensor, A: Tensor, C: Tensor, h: Tensor) -> Tensor:
    """Return Σ_n C_n exp(elapsed A_n) h_n: (B, L, E), (E, N), (B, L, N), (E, N) → (B, L, E)."""
    total = torch.zeros_like(elapsed)
    for n in range(int(A.shape[1])):  # one state at a time: all at once are N times the memory
        total = total + C[..., n, None] * (torch.exp(elapsed * A[:, n]) * h[:, n])
    return total


class _Decays(torch.autograd.Function):
    """`_sum_of_decays`, computing the decays again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, elapsed: Tensor, A: Tensor, C: Tensor, h: Tensor) -> Tensor:
        ctx.save_for_backward(elapsed, A, C, h)
        return _sum_of_decays(elapsed, A, C, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        elapsed, A, C, h = ctx.saved_tensors
        grad_elapsed = torch.zeros_like(elapsed)
        grad_A, grad_C, grad_h = torch.empty_like(A), torch.empty_like(C), torch.empty_like(h)
        for n in range(A.shape[1]):
            decay = torch.exp(elapsed * A[:, n])
            grad_C[..., n] = (grad * decay) @ h[:, n]
            decay *= grad * C[..., n, None]
            grad_h[:, n] = decay.sum((0, 1))
            decay *= h[:, n]
            grad_A[:, n] = (decay * elapsed).sum((0, 1))
            grad_elapsed += decay * A[:, n]
        return grad_elapsed, grad_A, grad_C, grad_h
