"""The interface that methods and runs rely on: `Backbone`, the base class of the backbones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svp_bench.core.errors import ConfigError, UsageError
from svp_bench.models.hooks import HookPoints, Projection, TokenState, plain_parameter
from svp_bench.models.weight_files import LoadReport
from svp_bench.ops import is_tracing

HEAD_PREFIXES = ("head.", "head_dist.")  # of parameter names; the second is DeiT's distillation head


class Backbone(nn.Module):
    """Base class of the backbones: blocks over a sequence of patch tokens and class tokens, and a linear head.

    A subclass sets the attributes below, calls `finish` at the end of its constructor, and defines `projections`,
    `part`, `embed`, `blocks_in_order`, `run_block`, `final_parts`, `final_tokens`, `pooled` and `classify`. It calls
    hooks of `points`: `embed` those of images and patch embedding, `run_block` those of projections, tensors and scan.
    Token hooks are called here. Normalisation and image size are those of `pretrained_cfg` (timm's).

    Attributes:
        family: "vim", "mambar", "vit", …; stored in records.
        exact_parts: Module classes that give the same output for the same input in eval mode, each time.
        embed_dim: Width D of the tokens.
        depth: Number of blocks L.
        in_chans: Channels of the images.
        num_classes: Classes of the head.
        head_hidden_size: Width of the features that the head reads.
        patch_embed: Patch embedding, with `proj`, `img_size`, `patch_size`, `grid_size` and `num_patches`.
        cls_positions: Positions of class, distillation and register tokens in the sequence before block 0.
        head: The head; `head_drop`: dropout before it.
        branch_outputs: Linear hook points whose output is added to the residual stream, in the order of the block.
        default_targets: Projections that LoRA updates by default.
        points: Hook points for methods.
        adapter: Adapter parameters of the method, or None.
        method: The method that was attached, or None.
        load_report: Report of `load_checkpoint`, or None for random weights.
        scan_backend: Backend of the selective scan; None for a backbone without one.
        separate_residual: Whether blocks read the sum of `TokenState.hidden` and a residual stream next to it.
        own_parameters: Shapes of the backbone's parameters by name, head excluded.
    """

    family: ClassVar[str]
    exact_parts: ClassVar[tuple[type[nn.Module], ...]] = ()
    separate_residual: ClassVar[bool] = False
    embed_dim: int
    depth: int
    in_chans: int
    num_classes: int
    head_hidden_size: int
    patch_embed: Any
    cls_positions: tuple[int, ...]
    head: nn.Module
    head_drop: nn.Module
    branch_outputs: tuple[str, ...]
    default_targets: tuple[str, ...]
    points: HookPoints
    adapter: nn.Module | None
    method: Any
    load_report: LoadReport | None
    scan_backend: str | None
    own_parameters: dict[str, tuple[int, ...]]
    grad_checkpointing: bool
    pretrained_cfg: Any

    def finish(self, points: HookPoints) -> None:
        """Set the attributes that every backbone starts with; call it once all parameters exist."""
        self.points = points
        self.adapter = self.load_report = None
        self.method = None
        self.grad_checkpointing = False
        self.note_parameters()

    def note_parameters(self) -> None:
        """Store the names and shapes of the backbone's own parameters."""
        named = self.named_parameters()
        self.own_parameters = {n: tuple(p.shape) for n, p in named if not n.startswith((*HEAD_PREFIXES, "adapter."))}

    # --- sizes -------------------------------------------------------------------------------------------------------

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.patch_embed.img_size
        return int(height), int(width)

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        rows, columns = self.patch_embed.grid_size
        return int(rows), int(columns)

    @property
    def num_patches(self) -> int:
        """Number of patches P."""
        return int(self.patch_embed.num_patches)

    @property
    def num_tokens(self) -> int:
        """Length of the sequence before block 0."""
        return self.num_patches + len(self.cls_positions)

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return int(self.patch_embed.patch_size[0])

    @property
    def patch_stride(self) -> int:
        """Distance between patches in pixels."""
        return int(self.patch_embed.proj.stride[0])

    @property
    def cls_index(self) -> int:
        """Position of the only class token.

        Raises:
            ConfigError: If the backbone has several, or none.
        """
        if len(self.cls_positions) != 1:
            raise ConfigError(f"{self.family} has {len(self.cls_positions)} tokens that are not patches, not one")
        return self.cls_positions[0]

    @property
    def first_parameter(self) -> nn.Parameter:
        """Return a parameter with the device and the precision of the backbone."""
        own = (p for n, p in self.named_parameters() if n in self.own_parameters and p.is_floating_point())
        return next(own)

    @property
    def projections(self) -> Mapping[str, Projection]:
        """Return the projections and their named row slices that low-rank updates may act on, by name."""
        raise ConfigError(f"{type(self).__name__} must define projections")

    def part(self, layer: int, name: str) -> nn.Module:
        """Return the module of the linear hook point `name` in block `layer`."""
        raise ConfigError(f"{type(self).__name__} must define part(layer, name)")

    def tensor_parameter(self, layer: int, name: str) -> nn.Parameter:
        """Return the plain parameter behind the weight or bias of a linear hook point, e.g. "in_proj.weight".

        Raises:
            ConfigError: If its part was replaced or carries a hook.
        """
        point, _, leaf = name.rpartition(".")
        return plain_parameter(self.part(layer, point), leaf, f"block {layer}, {point}.")

    # --- forward pass ------------------------------------------------------------------------------------------------

    def embed(self, images: Tensor) -> TokenState:
        """(B, 3, H, W) → the token sequence before block 0, positions added."""
        raise ConfigError(f"{type(self).__name__} must define embed(images)")

    @property
    def blocks_in_order(self) -> nn.ModuleList | nn.Sequential:
        """Return the blocks."""
        raise ConfigError(f"{type(self).__name__} must define blocks_in_order")

    @property
    def final_parts(self) -> list[nn.Module]:
        """Return the modules between the last block and the head, which `pooled` calls."""
        raise ConfigError(f"{type(self).__name__} must define final_parts")

    def run_block(self, block: nn.Module, state: TokenState) -> TokenState:
        """Return the state after a block."""
        raise ConfigError(f"{type(self).__name__} must define run_block(block, state)")

    def final_tokens(self, state: TokenState) -> Tensor:
        """Return the tokens after the final norm, (B, L, D), from the state after the last block."""
        raise ConfigError(f"{type(self).__name__} must define final_tokens(state)")

    def pooled(self, state: TokenState) -> Tensor:
        """Return the features of the head, (B, …), from the state after the last block."""
        raise ConfigError(f"{type(self).__name__} must define pooled(state)")

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes) of the features of `pooled`."""
        raise ConfigError(f"{type(self).__name__} must define classify(features)")

    def run_blocks(self, state: TokenState, start: int = 0, stop: int | None = None) -> TokenState:
        """Return the state after the blocks `start` to `stop` (exclusive; all by default)."""
        for layer, block in enumerate(self.blocks_in_order[start:stop], start):
            state = self._checkpointed(layer, block, state)
        return state

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float (B, 3, H, W) → logits (B, classes)."""
        return self.classify(self.pooled(self.run_blocks(self.embed(images))))

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """(B, 3, H, W) → all tokens after the final norm, (B, L, D), and the positions of the class tokens."""
        state = self.run_blocks(self.embed(images))
        return self.final_tokens(state), state.cls_positions

    def hooked_images(self, images: Tensor) -> Tensor:
        """Pass images through the image hooks; `embed` calls this first."""
        for hook in self.points.images:
            images = hook(images)
        return images

    def embedded_patches(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → patch tokens (B, P, D), with the hooks of the patch embedding."""
        tokens: Tensor = self.patch_embed(images)
        for hook in self.points.patch_embed:
            tokens = hook(images, tokens)
        return tokens

    def _layer(self, layer: int, block: nn.Module, state: TokenState) -> TokenState:
        """Apply the token hooks and a block."""
        for hook in self.points.tokens if layer >= self.points.first_tokens else ():
            state = hook(layer, state.settled(self.points.scan_backend))
        self.points.not_patches = state.not_patches
        self.points.carried = dict(state.carried)
        after = self.run_block(block, state)
        carried, self.points.carried = self.points.carried, {}
        return after._replace(carried=carried)

    def _checkpointed(self, layer: int, block: nn.Module, state: TokenState) -> TokenState:
        """Return the state after a block, with gradient checkpointing if enabled."""
        if self.grad_checkpointing and torch.is_grad_enabled() and not is_tracing():
            after: TokenState = checkpoint(self._layer, layer, block, state, use_reentrant=False)
            return after
        return self._layer(layer, block, state)

    # --- changes -----------------------------------------------------------------------------------------------------

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the input of each block and recompute the block in the backward pass."""
        self.grad_checkpointing = enable

    def set_scan_backend(self, name: str) -> None:
        """Set the backend of the selective scan.

        Raises:
            UsageError: If the backbone has no selective scan and a backend is asked for by name.
        """
        if name != "auto":
            raise UsageError(f"{self.family} has no selective scan: leave out model.scan_backend {name}")

    def no_weight_decay(self) -> set[str]:
        """Return the parameters without weight decay in addition to one-dimensional ones."""
        return set()

    def check_hooks(self) -> None:
        """Check that every tensor that a method changes is read.

        Raises:
            ConfigError: If a method changes a tensor of a part that is not plain.
        """

    def position_rows(self, patches: int) -> tuple[int, ...]:
        """Return the rows of `pos_embed` that do not belong to patches, for a given number of patches."""
        return ()

    def refuse_method(self, function: str) -> None:
        """Refuse a change of the model that carries a method already.

        Raises:
            ConfigError: If it does.
        """
        if self.adapter is not None or len(self.points):
            raise ConfigError(f"{function}: this model already carries a method; call {function} before adapting it")
