"""Visual Prompt Tuning (VPT), shallow and deep, on a model that carries (hidden, residual)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from svp_bench.methods.base import Method, check_setting
from svp_bench.models import TokenState, VisionMamba

Position = Literal["prefix", "suffix", "both", "around_cls", "spread"]
POSITIONS = ("prefix", "suffix", "both", "around_cls", "spread")


def prompt_positions(position: str, length: int, tokens: int, cls_index: int) -> list[int]:
    """Return the positions of the prompts in the longer sequence, in ascending order.

    Args:
        position: `prefix` before all tokens, `suffix` after them, `both` half and half (the larger half in front),
            `around_cls` half and half around the class token, `spread` evenly between the tokens.
        length: Number of prompts.
        tokens: Length of the sequence without prompts.
        cls_index: Index of the class token in it.
    """
    first = (length + 1) // 2
    before = {  # tokens before each prompt
        "prefix": [0] * length,
        "suffix": [tokens] * length,
        "both": [0] * first + [tokens] * (length - first),
        "around_cls": [cls_index] * first + [cls_index + 1] * (length - first),
        "spread": [(i + 1) * tokens // (length + 1) for i in range(length)],
    }[position]
    return [count + i for i, count in enumerate(before)]


class _VPT(Method):
    identity_at_start = False

    def __init__(self, length: int, position: Position, dropout: float) -> None:
        check_setting("vpt", "length", length, 1)
        check_setting("vpt", "position", position, POSITIONS)
        check_setting("vpt", "dropout", dropout, "fraction")
        self.length = length
        self.position = position
        self.dropout = dropout

    def _attach(self, model: VisionMamba, layers: int, accumulate: bool) -> None:
        prompts = _Prompts(self, model, layers, accumulate)
        model.adapter = prompts
        model.points.on_tokens(prompts.insert)


class VPTShallow(_VPT):
    """Trained tokens inserted once, before block 0; then they are treated as all other tokens.

    Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv:2203.12119, section 3.2. The prompts get no position embedding
    and start uniform in ± √(6 / (3 p² + D)), p the patch size (their code's initialisation).

    Trained parameters without the head: length · D.

    Args:
        length: Number of prompts.
        position: See `prompt_positions`. In Vim's reversed scan a prefix comes last and reaches no token of the image,
            so select the position on val.
        dropout: On the prompts, while training.
    """

    def __init__(self, length: int = 8, position: Position = "prefix", dropout: float = 0.0) -> None:
        super().__init__(length, position, dropout)

    def attach(self, model: VisionMamba) -> None:
        """Insert the prompts before block 0."""
        self._attach(model, 1, accumulate=False)

    def adapter_parameters(self, model: VisionMamba) -> int:
        """Return length · D."""
        return self.length * model.embed_dim


class VPTDeep(_VPT):
    """Trained tokens before block 0, replaced by new ones before each later block.

    Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv:2203.12119, section 3.2, for Vim, whose block
    input is a pair: the last mixer's output and the residual stream. In mode `replace` the positions of the prompts get
    hidden = p_i and residual = 0, so that nothing of an older prompt remains, as in a ViT. In mode `accumulate` only
    the hidden part is replaced; older prompts remain in the residual stream.

    Trained parameters without the head: depth · length · D.

    Args:
        length: Number of prompts of each block.
        position: See `prompt_positions`.
        mode: `replace` or `accumulate`, see above.
        dropout: On the prompts, while training.
    """

    def __init__(
        self,
        length: int = 8,
        position: Position = "prefix",
        mode: Literal["replace", "accumulate"] = "replace",
        dropout: float = 0.0,
    ) -> None:
        super().__init__(length, position, dropout)
        check_setting("vpt", "mode", mode, ("replace", "accumulate"))
        self.mode = mode

    def attach(self, model: VisionMamba) -> None:
        """Insert the prompts before block 0 and replace them before each later block."""
        self._attach(model, model.depth, accumulate=self.mode == "accumulate")

    def adapter_parameters(self, model: VisionMamba) -> int:
        """Return depth · length · D."""
        return model.depth * self.length * model.embed_dim


class _Prompts(nn.Module):
    places: Tensor
    order: Tensor

    def __init__(self, vpt: _VPT, model: VisionMamba, layers: int, accumulate: bool) -> None:
        super().__init__()
        width, tokens, cls_index = model.embed_dim, model.patch_embed.num_patches + 1, model.cls_index
        bound = math.sqrt(6 / (3 * math.prod(model.patch_embed.patch_size) + width))
        self.prompts = nn.Parameter(torch.empty(layers, vpt.length, width).uniform_(-bound, bound))
        self.dropout = nn.Dropout(vpt.dropout)
        self.accumulate = accumulate
        places = prompt_positions(vpt.position, vpt.length, tokens, cls_index)
        rest = sorted(set(range(tokens + vpt.length)) - set(places))
        self.cls_index = rest[cls_index]
        # order[k] is the row of [tokens, prompts] that becomes token k of the longer sequence
        rows = dict(zip(rest, range(tokens), strict=True))
        rows |= dict(zip(places, range(tokens, tokens + vpt.length), strict=True))
        order = torch.tensor([rows[k] for k in range(tokens + vpt.length)])
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.register_buffer("order", order, persistent=False)

    def insert(self, layer: int, state: TokenState) -> TokenState:
        if layer >= len(self.prompts):
            return state
        hidden, residual = state.hidden, state.residual
        prompts = self.prompts[layer].to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        prompts = self.dropout(prompts)  # independent for each image
        if layer == 0:
            longer = torch.cat([hidden, prompts], dim=1).index_select(1, self.order)
            return TokenState(longer, residual, self.cls_index)
        hidden = hidden.index_copy(1, self.places, prompts)
        if residual is not None and not self.accumulate:
            residual = residual.index_fill(1, self.places, 0)
        return TokenState(hidden, residual, state.cls_index)
