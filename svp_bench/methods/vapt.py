"""Visual Adaptive Prompt Tuning (VAPT): prompts computed from the patches of the image."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting
from svp_bench.methods.vpt import POSITIONS, Position, prompt_positions
from svp_bench.models import Backbone, TokenState


class VAPT(Method):
    """Prompts before each block, from block 1 on a function of the patch tokens of the image.

    Le et al., "Adaptive Prompt: Unlocking the Power of Visual Prompt Tuning", arXiv:2501.18936. Before block 0 stand P
    ordinary prompts, as in VPT. Before a later block, x the patch tokens (G × G × D) of its input,

        y = Linear_i(dropout(K_i * LN_i(x))),    prompts = y + W₂ relu(W₁ y),

    K_i a k × k kernel shared by all channels, without padding, dropout of whole channels, Linear_i: (G − k + 1)² → P
    for each channel, and W₁: D → h, W₂: h → D shared by all blocks. The prompts replace those of the block before.
    Linear_i starts at zero, so these prompts do too; K_i starts from N(0, 1), the norm at 1 and 0, W₁ and W₂ as
    PyTorch's linear layers (the published start was not found). Written from the equations, without the released code.
    On Vim the input of a block is the sum of hidden state and residual stream; the new prompts get no residual.

    Trained parameters without the head: P D + (L − 1) (2 D + k² + (N + 1) P) + 2 D h, N = (G − k + 1)²: 66,840 for
    Vim-S at 224 pixels, P = 10, k = 2, h = 8.

    Args:
        length: Number of prompts P.
        kernel_size: Side k of the kernels.
        hidden_dim: Width h of the shared layers.
        dropout: On whole channels after the kernel, while training.
        position: See `svp_bench.methods.vpt.prompt_positions`; published for a ViT, where it does not matter.
    """

    identity_at_start = False

    def __init__(
        self,
        length: int = 10,
        kernel_size: int = 2,
        hidden_dim: int = 8,
        dropout: float = 0.1,
        position: Position = "prefix",
    ) -> None:
        check_setting("vapt", "length", length, 1)
        check_setting("vapt", "kernel_size", kernel_size, 1)
        check_setting("vapt", "hidden_dim", hidden_dim, 1)
        check_setting("vapt", "dropout", dropout, "fraction")
        check_setting("vapt", "position", position, POSITIONS)
        self.length = length
        self.kernel_size = kernel_size
        self.hidden_dim = hidden_dim
        self.dropout = dropout
        self.position = position

    def attach(self, model: Backbone) -> None:
        """Insert the prompts before block 0, and compute new ones before each later block.

        Raises:
            ConfigError: If the kernel is larger than the grid of patches.
        """
        self._places(model)
        model.adapter = prompts = _AdaptivePrompts(self, model)
        model.points.on_tokens(prompts.insert)

    def _places(self, model: Backbone) -> int:
        """Return the number of places of the kernel in the grid."""
        rows, columns = (side - self.kernel_size + 1 for side in model.grid_size)
        if min(rows, columns) < 1:
            grid = "x".join(map(str, model.grid_size))
            raise ConfigError(f"vapt: kernel_size must fit into the {grid} patches, not be {self.kernel_size}")
        return rows * columns

    def adapter_parameters(self, model: Backbone) -> int:
        """Return P D + (L − 1) (2 D + k² + (N + 1) P) + 2 D h."""
        width, places = model.embed_dim, self._places(model)
        block = 2 * width + self.kernel_size**2 + (places + 1) * self.length
        return self.length * width + (model.depth - 1) * block + 2 * width * self.hidden_dim


class _AdaptivePrompts(nn.Module):
    def __init__(self, vapt: VAPT, model: Backbone) -> None:
        super().__init__()
        width, later, size = model.embed_dim, range(model.depth - 1), vapt.kernel_size
        self.grid, self.position = model.grid_size, vapt.position
        bound = math.sqrt(6 / (3 * model.patch_size**2 + width))  # VPT's
        self.prompts = nn.Parameter(torch.empty(vapt.length, width).uniform_(-bound, bound))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in later)
        self.kernels = nn.ParameterList(torch.randn(size, size) for _ in later)
        self.linears = nn.ModuleList(nn.Linear(vapt._places(model), vapt.length) for _ in later)
        for linear in self.linears:
            nn.init.zeros_(linear.weight)  # type: ignore[arg-type]
            nn.init.zeros_(linear.bias)  # type: ignore[arg-type]
        self.down = nn.Linear(width, vapt.hidden_dim, bias=False)
        self.up = nn.Linear(vapt.hidden_dim, width, bias=False)
        self.dropout = nn.Dropout2d(vapt.dropout)
        prompt_positions(vapt.position, vapt.length, model.num_tokens, model.cls_positions)  # refuses what does not fit

    def insert(self, layer: int, state: TokenState) -> TokenState:
        hidden = state.hidden
        if layer == 0:
            prompts, tokens = self.prompts.to(hidden.dtype).expand(hidden.shape[0], -1, -1), int(hidden.shape[1])
            positions = prompt_positions(self.position, len(self.prompts), tokens, state.cls_positions)
            return state.insert(self, prompts, positions)
        prompts = self.adapted(layer - 1, state.patch_stream).to(hidden.dtype)
        places = torch.tensor(state.inserted[self], device=hidden.device)
        residual = None if state.residual is None else state.residual.index_fill(1, places, 0)
        return state._replace(hidden=hidden.index_copy(1, places, prompts), residual=residual)

    def adapted(self, row: int, patches: Tensor) -> Tensor:
        """Patch tokens (B, G², D) → prompts (B, P, D)."""
        channels = self.norms[row](patches).transpose(1, 2)
        kernel = self.kernels[row][None, None]
        mixed = F.conv2d(channels.reshape(-1, 1, *self.grid), kernel)
        rows, columns = (side - int(kernel.shape[-1]) + 1 for side in self.grid)
        mixed = self.dropout(mixed.view(-1, int(channels.shape[1]), rows, columns))
        prompts = self.linears[row](mixed.flatten(2)).transpose(1, 2)
        added: Tensor = prompts + self.up(self.down(prompts).relu())
        return added
