"""timm's vision transformers (ViT, DeiT) as backbones, without changes in timm.

`as_backbone` gives a `VisionTransformer` of timm, a subclass of it included, the interface of `Backbone`: it stays the
same object with the same parameter names, and its class becomes a subclass that calls the hooks.

Letters used for shapes: B batch, L length (tokens), D width (embed_dim), P patches.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from timm.layers import Attention, DropPath, LayerScale, Mlp
from timm.layers import LayerNorm as TimmLayerNorm
from timm.layers import PatchEmbed as TimmPatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.models.backbone import Backbone
from svp_bench.models.hooks import HookedLinear, HookPoints, Projection, TokenState, is_plain, not_plain

_BRANCH_OUTPUTS = ("proj", "fc2", "attn_out_proj", "mlp_out_proj", "out_proj")  # of timm's kinds of blocks


class ViTBackbone(Backbone):
    """The interface of `Backbone` for timm's `VisionTransformer`; see `as_backbone`.

    Hook points are the linear layers of a block by their last names (qkv, proj, fc1, fc2), their weights and biases.
    Tokens that a method inserts take part in attention and are left out of the pooling. The tokens that are not patches
    are timm's prefix tokens: class, distillation and register tokens.
    """

    family: ClassVar[str] = "vit"
    exact_parts = (
        *(Attention, Block, DropPath, HookedLinear, LayerScale, Mlp, TimmLayerNorm, TimmPatchEmbed),
        *(nn.GELU, nn.LayerNorm, nn.Sequential),
    )
    blocks: nn.Sequential
    norm: nn.Module
    fc_norm: nn.Module
    attn_pool: nn.Module | None
    num_prefix_tokens: int
    global_pool: str

    def adopt(self) -> None:
        """Set what the interface needs on a model that timm built."""
        self._refuse_unsupported()
        self.depth = len(self.blocks)
        self.cls_positions = tuple(range(self.num_prefix_tokens))
        self.scan_backend = None
        linears = [
            {name.rpartition(".")[2]: part for name, part in block.named_modules() if type(part) is nn.Linear}
            for block in self.blocks
        ]
        for block, found in zip(self.blocks, linears, strict=True):
            if sum(type(part) is nn.Linear for part in block.modules()) > len(found):
                raise ConfigError(f"a {type(block).__name__} with several linear layers of one name is not supported")
        names = [name for name in linears[0] if all(name in found for found in linears)]
        self.branch_outputs = tuple(name for name in _BRANCH_OUTPUTS if name in names)
        self.default_targets = ("q", "v") if "qkv" in names else tuple(names[:1])
        tensors = [f"{name}.weight" for name in names]
        tensors += [f"{name}.bias" for name in names if all(found[name].bias is not None for found in linears)]
        self.finish(HookPoints(self.depth, names, tensors))
        for layer, found in enumerate(linears):
            for name in names:
                part: Any = found[name]
                part.__class__ = HookedLinear
                part.points, part.layer, part.name = self.points, layer, name

    def _refuse_unsupported(self) -> None:
        """Refuse what has no fixed grid of patches, or patches that are not pixels."""
        if getattr(self, "dynamic_img_size", False):
            raise ConfigError("a ViT with dynamic_img_size has no fixed number of patches and is not supported")
        if not isinstance(getattr(self, "patch_drop", None), nn.Identity):
            raise ConfigError("a ViT with patch_drop_rate has no fixed number of patches; create it without")
        if type(self.patch_embed) is not TimmPatchEmbed:
            kind = type(self.patch_embed).__name__
            raise ConfigError(f"a ViT whose patch embedding is a {kind} is not supported; it must be timm's PatchEmbed")

    def no_weight_decay(self) -> set[str]:
        """Return timm's list: position embedding, class, distillation and register tokens."""
        model: Any = self
        return set(model.wrapped.no_weight_decay(self))

    def forward_intermediates(self, x: Tensor, *arguments: Any, **settings: Any) -> Any:
        """Return timm's intermediate features.

        Raises:
            ConfigError: If the model carries a method; timm's function would skip some of its hooks.
        """
        self.refuse_method("forward_intermediates")
        model: Any = self
        return model.wrapped.forward_intermediates(self, x, *arguments, **settings)

    def position_rows(self, patches: int) -> tuple[int, ...]:
        """Return the first rows, one for each prefix token, unless the embedding is that of the patches alone."""
        return () if getattr(self, "no_embed_class", False) else tuple(range(self.num_prefix_tokens))

    @property
    def projections(self) -> Mapping[str, Projection]:
        """Return the linear layers, and the rows q, k and v of qkv, by name."""
        found = {}
        for name in self.points.linear_names:
            part = self.part(0, name)
            found[name] = Projection((name,), 0, part.out_features, part.in_features)
            if name == "qkv" and part.out_features % 3 == 0:
                third = part.out_features // 3
                found |= {
                    row: Projection((name,), at * third, (at + 1) * third, part.in_features)
                    for at, row in enumerate("qkv")
                }
        return found

    def part(self, layer: int, name: str) -> Any:
        """Return the linear layer `name` of block `layer`."""
        return next(p for n, p in self.blocks[layer].named_modules() if n.rpartition(".")[2] == name)

    def check_hooks(self) -> None:
        """Check that every tensor that a method changes is read."""
        for (layer, name), hooks in self.points.tensor.items():
            part_name, _, leaf = name.rpartition(".")
            part = self.part(layer, part_name)
            if hooks and not is_plain(part, HookedLinear):
                raise not_plain(f"blocks.{layer}.{part_name}.{leaf}", part)

    def embed(self, images: Tensor) -> TokenState:
        """(B, 3, H, W) → the token sequence before block 0, prefix tokens and positions added."""
        model: Any = self
        tokens = model._pos_embed(self.embedded_patches(self.hooked_images(images)))
        return TokenState(model.norm_pre(model.patch_drop(tokens)), None, self.cls_positions)

    @property
    def blocks_in_order(self) -> nn.Sequential:
        """Return the blocks."""
        return self.blocks

    @property
    def final_parts(self) -> list[nn.Module]:
        """Return the modules between the last block and the head."""
        return [part for part in (self.norm, self.attn_pool, self.fc_norm) if part is not None]

    def run_block(self, block: nn.Module, state: TokenState) -> TokenState:
        """Return the state after a block."""
        state = state.settled(self.points.scan_backend)
        return state._replace(hidden=block(state.hidden))

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → the tokens after the final norm, without those that a method inserted, (B, L, D)."""
        return self.final_tokens(self.run_blocks(self.embed(images)).without_inserted())

    def final_tokens(self, state: TokenState) -> Tensor:
        """Return the tokens after the final norm, (B, L, D), of the state after a block."""
        tokens: Tensor = self.norm(state.settled(self.points.scan_backend).hidden)
        return tokens

    def pooled(self, state: TokenState) -> Tensor:
        """Return the prefix tokens after the final norm, (B, T, D), or for other poolings the pooled tokens (B, D)."""
        model: Any = self
        tokens = self.final_tokens(state.without_inserted())
        if self.global_pool == "token":
            return tokens[:, : self.num_prefix_tokens]
        features: Tensor = self.fc_norm(model.pool(tokens))
        return features

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes) of the features of `pooled`."""
        model: Any = self
        logits: Tensor = model.forward_head(features) if features.ndim == 3 else self.head(self.head_drop(features))
        return logits


_CLASSES: dict[type, type[ViTBackbone]] = {}


def _backbone_class(kind: type) -> type[ViTBackbone]:
    """Return the subclass of a class of vision transformers that has the interface."""
    if kind not in _CLASSES:
        contents = {"__doc__": ViTBackbone.__doc__, "__reduce_ex__": _reduce, "wrapped": kind}
        _CLASSES[kind] = type(f"{kind.__name__}Backbone", (ViTBackbone, kind), contents)
    return _CLASSES[kind]


def _reduce(model: Any, protocol: int) -> tuple[Any, ...]:
    return _empty, (model.wrapped,), model.__dict__


def _empty(kind: type[VisionTransformer]) -> Any:
    made = _backbone_class(kind)
    return made.__new__(made)


def as_backbone(model: nn.Module) -> Backbone:
    """Return a model as a backbone: a `Backbone` as it is, timm's vision transformers in place.

    Raises:
        ConfigError: If the model is neither.
    """
    if isinstance(model, Backbone):
        return model
    if not isinstance(model, VisionTransformer):
        raise ConfigError(
            f"{type(model).__name__} is not a supported backbone: Vim, Mamba-Reg, timm's VisionTransformer (ViT, DeiT) "
            "and subclasses of svp_bench.models.Backbone are"
        )
    adopted: Any = model
    adopted.__class__ = _backbone_class(type(model))
    adopted.adopt()
    made: ViTBackbone = adopted
    return made
