"""E²VPT: deep visual prompts with masks of tokens and of their pieces, pruned within the training."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import check_setting, stage_border
from svp_bench.methods.vpt import _VPT, Position, _Prompts
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES


class E2VPT(_VPT):
    """VPT-deep whose prompts are multiplied by masks: p_ij · t_j · s_j, pruned and trained again.

    Han et al., "E²VPT: An Effective and Efficient Approach for Visual Prompt Tuning", ICCV 2023, arXiv:2307.13770,
    without its prompts for the keys and values of attention, which have no place in a scan; they are left out on a ViT
    too, so that families compare. t has one entry for each of the `length` prompts, s one for each of the `pieces`
    equal parts of a prompt; all blocks share them. They start at 1, the prompts as in VPT.

    Stages: first prompts and masks train, and the absolute gradients of the masks add up over the steps. Then the
    prompts with the smallest sums are pruned, and of the others the pieces with the smallest: their mask is 0, that of
    the rest 1; the prompts go back to their start. In the second stage they train alone. Pruned prompts stay in the
    sequence, as zeros, as released. The head trains in both stages and is not reset. The paper has two trainings, and
    selects the shares on val from 10 % to 90 %; here both stages are within the epochs of the protocol. In the released
    code, every sixteenth entry of a prompt belongs to one piece; here neighbours do, as in the paper. Its ranking of
    pieces was not found: here within each prompt.

    Trained parameters without the head, those of the second stage: depth · length · D are stored; those of pruned
    pieces have no effect.

    Args:
        length: Number of prompts of each block.
        pieces: Pieces of a prompt.
        pruned_tokens: Share of the prompts that is pruned.
        pruned_pieces: Share of the pieces of each other prompt that is pruned.
        first_share: Share of the epochs for the first stage.
        position: See `svp_bench.methods.vpt.prompt_positions`.
        dropout: On the prompts, while training.
    """

    stages = 2

    def __init__(
        self,
        length: int = 10,
        pieces: int = 16,
        pruned_tokens: float = 0.5,
        pruned_pieces: float = 0.5,
        first_share: float = 0.5,
        position: Position = "prefix",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(length, position, dropout)
        check_setting("e2vpt", "pieces", pieces, 1)
        check_setting("e2vpt", "pruned_tokens", pruned_tokens, "fraction")
        check_setting("e2vpt", "pruned_pieces", pruned_pieces, "fraction")
        check_setting("e2vpt", "first_share", first_share, "positive")
        check_setting("e2vpt", "first_share", first_share, "fraction")
        self.pieces = pieces
        self.pruned_tokens = pruned_tokens
        self.pruned_pieces = pruned_pieces
        self.first_share = first_share

    def attach(self, model: Backbone) -> None:
        """Insert the prompts before block 0, with masks, and replace them before each later block.

        Raises:
            ConfigError: If a prompt cannot be cut into pieces of one size.
        """
        if model.embed_dim % self.pieces:
            raise ConfigError(f"e2vpt: pieces must divide the width {model.embed_dim}, not be {self.pieces}")
        prompts = self._attach(model, model.depth, accumulate=False)
        prompts.project = _Masks(self.length, self.pieces)
        prompts.register_buffer("start", prompts.prompts.detach().clone(), persistent=False)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies: not to masks."""
        return name.startswith(HEAD_PREFIXES) or name == "adapter.prompts"

    def stage(self, epoch: int, epochs: int) -> int:
        """Return 0 before the pruning, then 1."""
        return int(epoch >= stage_border(self.first_share, epochs))

    def trains_in_stage(self, name: str, stage: int) -> bool:
        """Whether it is no mask, or the stage the first."""
        return stage == 0 or not name.startswith("adapter.project.")

    def before_step(self, model: Backbone) -> None:
        """Add up the absolute gradients of the masks, in the first stage."""
        _parts(model)[1].add_up()

    @torch.no_grad()
    def start_epoch(self, model: Backbone, epoch: int, epochs: int) -> None:
        """Before the second stage: prune, and reset the prompts."""
        if epoch == stage_border(self.first_share, epochs):
            prompts, masks = _parts(model)
            masks.prune(self.pruned_tokens, self.pruned_pieces)
            prompts.prompts.copy_(prompts.get_buffer("start"))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return depth · length · D."""
        return model.depth * self.length * model.embed_dim


def _parts(model: Backbone) -> tuple[_Prompts, _Masks]:
    assert isinstance(model.adapter, _Prompts)
    assert isinstance(model.adapter.project, _Masks)
    return model.adapter, model.adapter.project


class _Masks(nn.Module):
    """Masks of prompts (P,) and of their pieces (P, S), and the sums of their absolute gradients."""

    of_tokens: Tensor
    of_pieces: Tensor

    def __init__(self, length: int, pieces: int) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.ones(length))
        self.pieces = nn.Parameter(torch.ones(length, pieces))
        self.register_buffer("of_tokens", torch.zeros(length))
        self.register_buffer("of_pieces", torch.zeros(length, pieces))

    def forward(self, prompts: Tensor) -> Tensor:
        """Prompts (P, D) → masked prompts (P, D)."""
        size = int(prompts.shape[1]) // int(self.pieces.shape[1])
        return prompts * self.tokens[:, None] * self.pieces.repeat_interleave(size, dim=1)

    @torch.no_grad()
    def add_up(self) -> None:
        for mask, total in ((self.tokens, self.of_tokens), (self.pieces, self.of_pieces)):
            if mask.grad is not None:
                total += mask.grad.abs()

    def prune(self, tokens: float, pieces: float) -> None:
        """Set the masks of shares of prompts and pieces to 0, those of the rest to 1; at least one of each stays."""
        self.tokens.fill_(1)
        self.tokens[_least(self.of_tokens, tokens)] = 0
        self.pieces.fill_(1)
        self.pieces.scatter_(1, _least(self.of_pieces, pieces), 0)


def _least(sums: Tensor, share: float) -> Tensor:
    """Return the positions of a share of the entries in the last dimension: the smallest."""
    count = sums.shape[-1]
    return sums.argsort(dim=-1)[..., : min(round(share * count), count - 1)]
