"""Selective Visual Prompting (SVP)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting, selected_blocks, zero_at
from svp_bench.models import Backbone, TokenState
from svp_bench.ops import PromptTerms, add_prompts


class SVP(Method):
    """Token-wise prompts before each block, generated from the tokens themselves by two light paths.

    Yao et al., "Selective Visual Prompting in Vision Mamba", AAAI 2025, arXiv:2412.08947. Before block i every patch
    token x of the block input becomes::

        x + α_g ⊙ SiLU(W_g x + b_g) + β_i ⊙ SiLU(U_i (D_i x + d_i) + u_i),   g = i // share_layers

    The first term is Cross-Prompting, shared by `share_layers` consecutive blocks; the second is Inner-Prompting, one
    bottleneck per block (no activation inside it, as released). The class token gets no prompt. α and β start at zero.

    Trained parameters without the head, for width D, hidden width h, |depths| prompted blocks in G groups::

        cross: G (D² + D) + G D          inner: |depths| (2 D h + h + D) + |depths| D

    i.e. ⌈24/s⌉ · 148,224 + 1,199,616 on Vim-S at h = 64.

    The released code (zhoujiahuan1991/AAAI2025-SVP) changes the tokens in place, so that the cross prompt of the k-th
    token after the class token is generated from the already prompted k-th token before it; in the paper each token's
    prompt is generated from that token. `variant` selects one.

    Args:
        share_layers: Blocks that share one cross generator; the last group may be shorter.
        hidden_dim: Width h of the inner bottleneck.
        variant: `paper`: each token is prompted from itself. `released`: as the released code, see above; needs an
            even number of patches.
        dropout: On each of the two prompts, while training.
        include_cls: Prompt all tokens, not only patches (variant `paper` only).
        paths: The terms to use.
        depths: Blocks that get a prompt; all if None.
    """

    identity_at_start = True

    def __init__(
        self,
        share_layers: int = 8,
        hidden_dim: int = 64,
        variant: Literal["paper", "released"] = "paper",
        dropout: float = 0.0,
        include_cls: bool = False,
        paths: Literal["both", "cross", "inner"] = "both",
        depths: Sequence[int] | None = None,
    ) -> None:
        check_setting("svp", "share_layers", share_layers, 1)
        check_setting("svp", "hidden_dim", hidden_dim, 1)
        check_setting("svp", "dropout", dropout, "fraction")
        check_setting("svp", "variant", variant, ("paper", "released"))
        check_setting("svp", "paths", paths, ("both", "cross", "inner"))
        if include_cls and variant == "released":
            raise ConfigError("svp: include_cls needs variant paper; the released code never prompts the class token")
        self.share_layers = share_layers
        self.hidden_dim = hidden_dim
        self.variant = variant
        self.dropout = dropout
        self.include_cls = include_cls
        self.paths = paths
        self.depths = None if depths is None else list(depths)

    def attach(self, model: Backbone) -> None:
        """Build the generators and prompt the tokens before each block."""
        patches, middle = model.num_patches, model.num_patches // 2
        if self.variant == "released" and (patches % 2 or model.cls_positions != (middle,)):
            raise ConfigError(
                "svp: variant released needs one class token in the middle of an even number of patches, and this "
                f"model has {patches} patches and other tokens at {', '.join(map(str, model.cls_positions))}: the "
                "released code pairs the tokens before and after the class token; use variant paper"
            )
        depths = selected_blocks("svp", self.depths, model)
        prompter = _Prompter(self, model, depths)
        model.adapter = prompter
        model.points.on_tokens(prompter.prompt, first=depths[0])

    def adapter_parameters(self, model: Backbone) -> int:
        """Return G (D² + 2 D) + |depths| (2 D h + h + 2 D), each term if its path is there."""
        width, hidden, depths = model.embed_dim, self.hidden_dim, selected_blocks("svp", self.depths, model)
        groups = len({i // self.share_layers for i in depths})
        cross = groups * (width * width + 2 * width) if self.paths != "inner" else 0
        inner = len(depths) * (2 * width * hidden + hidden + 2 * width) if self.paths != "cross" else 0
        return cross + inner


class _Inner(nn.Module):
    """The inner bottleneck up to its SiLU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, hidden)
        self.up = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        pre: Tensor = self.up(self.down(x))
        return pre


class _Prompter(nn.Module):
    """Generators and scales of all blocks. Row r of `beta` belongs to the r-th prompted block, of `alpha` to the r-th
    group with a prompted block."""

    def __init__(self, svp: SVP, model: Backbone, depths: list[int]) -> None:
        super().__init__()
        width = model.embed_dim
        self.points = model.points  # a plain object; has the scan backend
        self.share_layers = svp.share_layers
        self.released = svp.variant == "released"
        self.include_cls = svp.include_cls
        self.rows = {layer: row for row, layer in enumerate(depths)}
        groups = sorted({layer // svp.share_layers for layer in depths})
        self.group_rows = {group: row for row, group in enumerate(groups)}
        self.cross = self.inner = None
        if svp.paths != "inner":
            self.cross = nn.ModuleDict({str(group): nn.Linear(width, width) for group in groups})
            self.alpha = nn.Parameter(torch.zeros(len(groups), width))
        if svp.paths != "cross":
            self.inner = nn.ModuleDict({str(layer): _Inner(width, svp.hidden_dim) for layer in depths})
            self.beta = nn.Parameter(torch.zeros(len(depths), width))
        self.dropout = nn.Dropout(svp.dropout)

    def _terms(self, layer: int, x: Tensor, cross_source: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return scale and pre-activation of each term for tokens x (B, T, D), the cross term from `cross_source`."""
        terms: list[tuple[Tensor, Tensor]] = []
        group = layer // self.share_layers
        if self.cross is not None:
            terms.append((self.alpha[self.group_rows[group]], self.cross[str(group)](cross_source)))
        if self.inner is not None:
            terms.append((self.beta[self.rows[layer]], self.inner[str(layer)](x)))
        return terms

    def _drop(self, x: Tensor, terms: list[tuple[Tensor, Tensor]], excluded: Sequence[int]) -> Tensor:
        """Return the tokens x with prompts after dropout."""
        prompts = torch.stack([scale * self.dropout(F.silu(pre)) for scale, pre in terms]).sum(dim=0).to(x.dtype)
        return x + zero_at(prompts, excluded)

    def _add(self, layer: int, x: Tensor, cross_source: Tensor) -> Tensor:
        """Return the tokens x with their prompts added."""
        terms = self._terms(layer, x, cross_source)
        if self.training and self.dropout.p > 0:
            return self._drop(x, terms, ())
        return add_prompts(x, terms, None, backend=self.points.scan_backend)

    def prompt(self, layer: int, state: TokenState) -> TokenState:
        if layer not in self.rows:
            return state
        x = state.hidden
        if self.released:
            (middle,) = state.not_patches
            before, cls, after = x[:, :middle], x[:, middle : middle + 1], x[:, middle + 1 :]
            prompted = self._add(layer, before, before)
            return state._replace(hidden=torch.cat([prompted, cls, self._add(layer, after, prompted)], dim=1))
        terms, excluded = self._terms(layer, x, x), () if self.include_cls else state.not_patches
        if self.training and self.dropout.p > 0:
            return state._replace(hidden=self._drop(x, terms, excluded))
        if len(excluded) > 1:  # the fused operation leaves out one token at most
            prompted = add_prompts(x, terms, None, backend=self.points.scan_backend)
            at = torch.tensor(excluded, device=x.device)
            return state._replace(hidden=prompted.index_copy(1, at, x.index_select(1, at)))
        return state._replace(prompts=PromptTerms(terms, excluded[0] if excluded else None))  # the block adds them
