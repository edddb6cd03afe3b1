"""Additional-scan: further states in the selective scan of each block."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from svp_bench.methods.base import Method, check_names, check_setting
from svp_bench.models import Backbone, VisionMamba
from svp_bench.models.hooks import changes_shape


class AdditionalScan(Method):
    """Add trained states to the scan of each block and direction: columns of A, and rows of x_proj for B and C.

    Yoshimura et al., "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning for Mamba", ICLR 2025, arXiv:2411.03855. The
    state grows from N to N + n; the new states come before the old ones, which compute the same as without them. With
    the new A, B_t and C_t, the output gains ⟨C_t, h_t⟩ for h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t x_t. Trained is
    log(-A), as in the backbone, without weight decay.

    With `init` copy_first (MambaPEFT) the columns of A copy the first one, and the new rows start as `nn.Linear` does:
    the model changes at the start. With zero_c (the code of Kang et al., "State-offset Tuning: State-based
    Parameter-Efficient Fine-Tuning for State Space Models", ACL 2025, arXiv:2503.03499, which uses n = 8) the columns
    copy the last one and the rows of C start at zero: the model stays the same at the start. Open: how that code draws
    the rows of B is only known as "Kaiming"; here as `nn.Linear` does.

    Trained parameters without the head, for n states, inner width E, depth L: 6 n E L. On Vim-S at n = 6: 663,552.

    Args:
        states: Number of additional states n.
        init: copy_first or zero_c, see above.
    """

    def __init__(self, states: int = 6, init: Literal["copy_first", "zero_c"] = "copy_first") -> None:
        check_setting("additional_scan", "states", states, 1)
        check_setting("additional_scan", "init", init, ("copy_first", "zero_c"))
        self.states = states
        self.init = init
        self.identity_at_start = init == "zero_c"

    def attach(self, model: Backbone) -> None:
        """Build `adapter.{layer}.forward_scan` and `.backward_scan`, and widen A and x_proj."""
        check_names("additional_scan", "tensors", ["A"], model.points.tensor_names, "tensor", model.family)
        assert isinstance(model, VisionMamba)
        adapter = model.adapter = nn.ModuleDict()
        for layer, mixer in enumerate(model.mixers):
            adapter[str(layer)] = parts = nn.ModuleDict()
            for suffix, name in (("", "forward_scan"), ("_b", "backward_scan")):
                log: Tensor = getattr(mixer, f"A{suffix}_log").detach()
                parts[name] = part = _States(log, mixer.dt_rank, self)
                model.points.on_tensor(layer, f"A{suffix}", part.widen_a)
                model.points.on_tensor(layer, f"x_proj{suffix}.weight", part.widen_x_proj)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies: not to the columns of A."""
        return not name.endswith("A_log")

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 6 n E L."""
        places = model.projections
        check_names("additional_scan", "projections", ["x_proj"], [*places], "projection", model.family)
        return 6 * self.states * places["x_proj"].in_features * model.depth


class _States(nn.Module):
    """The additional states of a scan."""

    def __init__(self, log: Tensor, rank: int, method: AdditionalScan) -> None:
        super().__init__()
        inner, old = log.shape
        zero_c = method.init == "zero_c"
        self.A_log = nn.Parameter(
            log[:, -1:].repeat(1, method.states) if zero_c else log[:, :1].repeat(1, method.states)
        )
        self.x_proj = nn.Linear(inner, 2 * method.states, bias=False)  # rows of B, then of C
        if zero_c:
            nn.init.zeros_(self.x_proj.weight[method.states :])
        self.rows = [rank, rank + old]  # where the old rows of B and C start

    @changes_shape
    def widen_a(self, a: Tensor) -> Tensor:
        """(E, N) → (E, n + N)."""
        new = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        return torch.cat([new, a], dim=1)

    @changes_shape
    def widen_x_proj(self, weight: Tensor) -> Tensor:
        """(R + 2 N, E) → (R + 2 (n + N), E)."""
        (step, b, c), (new_b, new_c) = weight.tensor_split(self.rows), self.x_proj.weight.chunk(2)
        return torch.cat([step, new_b, b, new_c, c])
