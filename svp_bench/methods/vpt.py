"""Visual Prompt Tuning (VPT), shallow and deep, on a model that carries (hidden, residual)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting
from svp_bench.models import Backbone, TokenState

Position = Literal["prefix", "suffix", "both", "around_cls", "spread"]
POSITIONS = ("prefix", "suffix", "both", "around_cls", "spread")


def prompt_positions(position: str, length: int, tokens: int, cls_positions: Sequence[int]) -> list[int]:
    """Return the positions of the prompts in the longer sequence, in ascending order.

    Args:
        position: `prefix` before all tokens, `suffix` after them, `both` half and half (the larger half in front),
            `around_cls` half and half around the class token, `spread` evenly between the tokens.
        length: Number of prompts.
        tokens: Length of the sequence without prompts.
        cls_positions: Positions of the class tokens in it.

    Raises:
        ConfigError: If the position is around one class token and the backbone has several.
    """
    if position == "around_cls" and len(cls_positions) != 1:
        others = ", ".join(name for name in POSITIONS if name != position)
        raise ConfigError(
            f"vpt: position around_cls needs one class token, and this backbone has {len(cls_positions)}; there are "
            f"{others}"
        )
    cls_index = next(iter(cls_positions), 0)
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

    def _attach(self, model: Backbone, layers: int, accumulate: bool) -> _Prompts:
        prompts = _Prompts(self, model, layers, accumulate)
        model.adapter = prompts
        model.points.on_tokens(prompts.insert)
        return prompts


class VPTShallow(_VPT):
    """Trained tokens inserted once, before block 0; then they are treated as all other tokens.

    Jia et al., "Visual Prompt Tuning", ECCV 2022, arXiv:2203.12119, section 3.2. The prompts get no position embedding
    and start uniform in ± √(6 / (3 p² + D)), p the patch size (their code's initialisation).

    The prompt-tuning of Yoshimura et al., "MambaPEFT: Exploring Parameter-Efficient Fine-Tuning for Mamba", ICLR 2025,
    arXiv:2411.03855, has 8 prompts, position `both`, init `normal`, without or with `projection`: the prompts then are
    U tanh(V e + v) + u for trained embeddings e.

    Trained parameters without the head: length · D; with `projection` 2 (D² + D) more. On Vim-S at length 8: 3,072 and
    298,752.

    Args:
        length: Number of prompts.
        position: See `prompt_positions`. In Vim's reversed scan a prefix comes last and reaches no token of the image,
            so select the position on val.
        dropout: On the prompts, while training.
        projection: Pass the prompts through a network of two layers, both D → D; null: no.
        init: Of the prompts (the embeddings, with `projection`): uniform as above, or normal, N(0, 1); null: uniform.
    """

    def __init__(
        self,
        length: int = 8,
        position: Position = "prefix",
        dropout: float = 0.0,
        projection: bool | None = None,  # null, as for init, so that records from before it are the same setting
        init: Literal["uniform", "normal"] | None = None,
    ) -> None:
        super().__init__(length, position, dropout)
        check_setting("vpt", "init", init, (None, "uniform", "normal"))
        self.projection = projection
        self.init = init

    def attach(self, model: Backbone) -> None:
        """Insert the prompts before block 0."""
        prompts = self._attach(model, 1, accumulate=False)
        if self.init == "normal":
            nn.init.normal_(prompts.prompts)
        if self.projection:
            width = model.embed_dim
            prompts.project = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return length · D, with `projection` 2 (D² + D) more."""
        width = model.embed_dim
        return self.length * width + (2 * (width * width + width) if self.projection else 0)


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

    def attach(self, model: Backbone) -> None:
        """Insert the prompts before block 0 and replace them before each later block.

        Raises:
            ConfigError: For mode `accumulate` on a backbone whose residual stream is the block input.
        """
        if self.mode == "accumulate" and not model.separate_residual:
            raise ConfigError("vpt_deep: mode accumulate needs a residual stream next to the block input; use replace")
        self._attach(model, model.depth, accumulate=self.mode == "accumulate")

    def adapter_parameters(self, model: Backbone) -> int:
        """Return depth · length · D."""
        return model.depth * self.length * model.embed_dim


class _Prompts(nn.Module):
    def __init__(self, vpt: _VPT, model: Backbone, layers: int, accumulate: bool) -> None:
        super().__init__()
        width = model.embed_dim
        bound = math.sqrt(6 / (3 * model.patch_size**2 + width))
        self.prompts = nn.Parameter(torch.empty(layers, vpt.length, width).uniform_(-bound, bound))
        self.project: nn.Module = nn.Identity()
        self.dropout = nn.Dropout(vpt.dropout)
        self.accumulate = accumulate
        self.position = vpt.position
        prompt_positions(vpt.position, vpt.length, model.num_tokens, model.cls_positions)  # refuses what does not fit

    def insert(self, layer: int, state: TokenState) -> TokenState:
        if layer >= len(self.prompts):
            return state
        hidden, residual = state.hidden, state.residual
        prompts = self.project(self.prompts[layer]).to(hidden.dtype).expand(hidden.shape[0], -1, -1)
        prompts = self.dropout(prompts)  # independent for each image
        if layer == 0:
            count, tokens = len(self.prompts[0]), int(hidden.shape[1])  # tracing gives tensors
            return state.insert(self, prompts, prompt_positions(self.position, count, tokens, state.cls_positions))
        places = torch.tensor(state.inserted[self], device=hidden.device)
        hidden = hidden.index_copy(1, places, prompts)
        if residual is not None and not self.accumulate:
            residual = residual.index_fill(1, places, 0)
        return state._replace(hidden=hidden, residual=residual)
