"""Vision Mamba (Vim), readable from top to bottom, as a timm model.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", ICML 2024,
arXiv:2401.09417. Parameter names and shapes are those of the published checkpoints (hustvl/Vim-*-midclstok): RMSNorm,
absolute position embedding, class token in the middle, bidirectional mixer "v2" whose two directions are averaged.

Letters used for shapes: B batch, L length (patches + class token + whatever a method inserts), D width (embed_dim),
E = 2 D inner width, N state size, R = ceil(D / 16) rank of Δ, W convolution width, P patches.

The backbone knows no method. It offers named points (`Points`) where one may act; each is empty by default.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svp_bench.ops import (
    Direction,
    Prompts,
    Remake,
    add_norm,
    add_prompts,
    bidirectional_conv,
    bidirectional_scan,
    require,
)

__all__ = ["LINEAR_POINTS", "TENSOR_POINTS", "Block", "Mixer", "Points", "RMSNorm", "TokenState", "VisionMamba"]

NORM_EPS = 1e-5  # of the published checkpoints; timm's usual 1e-6 gives other numbers

LINEAR_POINTS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
TENSOR_POINTS = (
    *(f"{name}.weight" for name in (*LINEAR_POINTS, "conv1d", "conv1d_b")),
    *(f"{name}.bias" for name in ("conv1d", "conv1d_b", "dt_proj", "dt_proj_b")),
    *("A", "A_b", "D", "D_b"),
)


class TokenState(NamedTuple):
    """What flows from block to block.

    Attributes:
        hidden: The block input, (B, L, D): the embedding before block 0, afterwards the previous mixer's output, not
            yet added to the residual stream.
        residual: The residual stream, (B, L, D), or None before block 0.
        cls_index: Where the class token stands.
        prompts: What is still to be added to `hidden`: the block does it in one pass with the residual stream. A point
            may leave prompts here; no point finds any, since they are added before the next one is called.
    """

    hidden: Tensor
    residual: Tensor | None
    cls_index: int
    prompts: Prompts | None = None

    def settled(self, scan_backend: str = "auto") -> TokenState:
        """Return the state with its prompts added to `hidden`."""
        if self.prompts is None:
            return self
        return self._replace(hidden=add_prompts(self.hidden, *self.prompts, backend=scan_backend), prompts=None)


TokenPoint = Callable[[int, TokenState], TokenState]
LinearPoint = Callable[[Tensor, Tensor], Tensor]
TensorPoint = Callable[[Tensor], Tensor]


class Points:
    """The places of the backbone where a method may act. All empty by default, at no cost.

    Attributes:
        tokens: `f(layer, state) -> state`, called before each block in the order of registration.
        patch_embed: `f(images, y) -> y`, called after the patch embedding of images (B, 3, H, W), before class token
            and positions: may change its output y (B, P, D).
        linear: `f(x, y) -> y` by (layer, name of `LINEAR_POINTS`): may change the output y of a projection of x. y is
            the point's own: it may be changed in place.
        tensor: `f(w) -> w` by (layer, name of `TENSOR_POINTS`): may change a tensor that a projection, the convolution
            or the scan reads.
        scan_backend: The model's choice, for methods whose own operations have backends.
    """

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.scan_backend = "auto"
        self.tokens: list[TokenPoint] = []
        self.patch_embed: list[LinearPoint] = []
        self.linear: dict[tuple[int, str], list[LinearPoint]] = defaultdict(list)
        self.tensor: dict[tuple[int, str], list[TensorPoint]] = defaultdict(list)

    def on_tokens(self, point: TokenPoint) -> None:
        """Call `point` before each block."""
        self.tokens.append(point)

    def on_patch_embed(self, point: LinearPoint) -> None:
        """Call `point` after the patch embedding."""
        self.patch_embed.append(point)

    def on_linear(self, layer: int, name: str, point: LinearPoint) -> None:
        """Call `point` after the projection `name` of block `layer`.

        Raises:
            ValueError: If there is no such projection.
        """
        self._check_layer(layer)
        if name not in LINEAR_POINTS:
            raise ValueError(f"no linear projection {name!r}; there are {', '.join(LINEAR_POINTS)}")
        self.linear[layer, name].append(point)

    def on_tensor(self, layer: int, name: str, point: TensorPoint) -> None:
        """Pass the tensor `name` of block `layer` through `point` before it is used.

        Raises:
            ValueError: If there is no such tensor.
        """
        self._check_layer(layer)
        if name not in TENSOR_POINTS:
            raise ValueError(f"no tensor {name!r}; there are {', '.join(TENSOR_POINTS)}")
        self.tensor[layer, name].append(point)

    def remove(self, owner: nn.Module) -> None:
        """Take away the points that belong to `owner`: itself, its submodules, and methods of these."""
        parts = {id(module) for module in owner.modules()}
        places: list[list[Any]] = [self.tokens, self.patch_embed, *self.linear.values(), *self.tensor.values()]
        for place in places:
            place[:] = [point for point in place if id(getattr(point, "__self__", point)) not in parts]

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise ValueError(f"no block {layer}; there are 0..{self.depth - 1}")


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, eps 1e-5, computed in float32 (or wider)."""

    def __init__(self, width: int, eps: float = NORM_EPS) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(…, D) → (…, D)."""
        return F.rms_norm(x, self.weight.shape, self.weight.to(x.dtype), self.eps)


class PatchEmbed(nn.Module):
    """Pictures to patch tokens by one strided convolution; with `stride` below `patch_size` the patches overlap."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.stride = stride
        self.grid_size = tuple((side - patch_size) // stride + 1 for side in img_size)
        self.num_patches = math.prod(self.grid_size)
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, P, D).

        Raises:
            ValueError: If the pictures are not of the size that the model was built for.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            given = "×".join(map(str, images.shape[-2:]))
            wanted = "×".join(map(str, self.img_size))
            raise ValueError(f"the model was built for {wanted} pictures, not {given}; create it with img_size={given}")
        patches: Tensor = self.proj(images)
        return patches.flatten(2).mT


class Mixer(nn.Module):
    """The bidirectional Mamba mixer of Vim ("v2"): one in_proj and out_proj, two of everything between (Algorithm 1).

    Args:
        width: D.
        d_state: N.
        d_conv: W.
        expand: E / D.
        dt_rank: R; D / 16 rounded up if None.
    """

    conv1d: nn.Conv1d
    conv1d_b: nn.Conv1d
    dt_proj: nn.Linear
    dt_proj_b: nn.Linear
    A_log: nn.Parameter

    def __init__(
        self, width: int, d_state: int = 16, d_conv: int = 4, expand: int = 2, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        inner = expand * width
        self.dt_rank = math.ceil(width / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)  # rows: x, then the gate z
        for suffix in ("", "_b"):  # forward, backward
            self.add_module(f"conv1d{suffix}", nn.Conv1d(inner, inner, d_conv, groups=inner, padding=d_conv - 1))
            self.add_module(f"x_proj{suffix}", nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False))  # Δ, B, C
            self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, inner))
            states = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(inner, 1)
            self.register_parameter(f"A{suffix}_log", nn.Parameter(states.log()))  # A = -exp(A_log), S4D-real
            self.register_parameter(f"D{suffix}", nn.Parameter(torch.ones(inner)))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self.layer = 0
        self.points = Points()  # the model puts its own here
        self.scan_backend = "auto"

    def init_dt(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Give Δ its range: weights uniform ± R^-½, biases such that softplus(bias) is log-uniform in [1e-3, 0.1].

        Both directions get it. (In the released code a later pass sets the backward bias to zero.)
        """
        for dt_proj in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = math.log(dt_min), math.log(dt_max)
            dt = torch.exp(torch.rand(dt_proj.bias.shape) * (high - low) + low).clamp(min=dt_floor)
            with torch.no_grad():
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def tensor(self, name: str) -> Tensor:
        """Return the tensor `name` of `TENSOR_POINTS` as a kernel is to read it: what methods made of it."""
        if name in ("A", "A_b"):
            log = self.get_parameter(f"{name}_log")
            value = -torch.exp(log.to(torch.promote_types(log.dtype, torch.float32)))
        else:
            value = self.get_parameter(name)
            if name.startswith("conv1d") and name.endswith("weight"):
                value = value.squeeze(1)  # (E, 1, W) → (E, W)
        for point in self.points.tensor.get((self.layer, name), ()):
            value = point(value)
        return value

    def project(self, name: str, x: Tensor) -> Tensor:
        """Apply the projection `name` of `LINEAR_POINTS` to x, without its bias, and what methods add to it.

        The biases of dt_proj are not added here: the scan takes them.
        """
        y = F.linear(x, self.tensor(f"{name}.weight"))
        for point in self.points.linear.get((self.layer, name), ()):
            y = point(x, y)
        return y

    def direction(self, suffix: str, u: Tensor) -> Direction:
        """Return what the scan of one direction reads, from its convolved input u (B, L, E)."""
        A = self.tensor(f"A{suffix}")
        state = A.shape[-1]
        x_dbl = self.project(f"x_proj{suffix}", u)
        dt, B, C = x_dbl.split([x_dbl.shape[-1] - 2 * state, state, state], dim=-1)
        delta = self.project(f"dt_proj{suffix}", dt)
        return Direction(u, delta, A, B, C, self.tensor(f"D{suffix}"), self.tensor(f"dt_proj{suffix}.bias"))

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        x, z = self.project("in_proj", hidden).chunk(2, dim=-1)
        ahead = (self.tensor("conv1d.weight"), self.tensor("conv1d.bias"))
        back = (self.tensor("conv1d_b.weight"), self.tensor("conv1d_b.bias"))

        def convolve(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return bidirectional_conv(x, parts[:2], parts[2:], backend=self.scan_backend)  # type: ignore[arg-type]

        u, u_b = convolve(x, *ahead, *back)
        y = bidirectional_scan(
            self.direction("", u),
            self.direction("_b", u_b),
            z,
            # where nothing else holds u for the backward pass, convolving again is cheaper than keeping it
            remake=None if self._keeps_u() else Remake(torch.no_grad()(convolve), (x, *ahead, *back)),
            backend=self.scan_backend,
        )
        return self.project("out_proj", y)

    def _keeps_u(self) -> bool:
        """Whether autograd keeps the convolved inputs anyway: a trained or changed x_proj needs them."""
        names = ("x_proj", "x_proj_b")
        trained = any(self.get_parameter(f"{name}.weight").requires_grad for name in names)
        linear, tensor = self.points.linear, self.points.tensor
        changed = any(linear.get((self.layer, n)) or tensor.get((self.layer, f"{n}.weight")) for n in names)
        return trained or changed


class Block(nn.Module):
    """Add, norm, mix: the branch of the block before is added first, and the own branch is returned apart."""

    def __init__(self, width: int, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Mixer(width, **mixer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, state: TokenState) -> TokenState:
        """Tokens (B, L, D) → hidden: the mixer's output, residual: the stream."""
        backend, norm = self.mixer.scan_backend, self.norm
        if state.residual is not None and isinstance(self.drop_path, DropPath) and self.drop_path.training:
            state = state.settled(backend)
            state = state._replace(hidden=self.drop_path(state.hidden))
        stream, normed = add_norm(state.hidden, state.residual, norm.weight, norm.eps, state.prompts, backend=backend)
        return TokenState(self.mixer(normed), stream, state.cls_index)


class VisionMamba(nn.Module):
    """Vision Mamba with the class token in the middle; timm's surface, the published parameter names.

    Args:
        img_size: Height and width of the pictures, or one number for both.
        patch_size: Side of a patch.
        stride: Distance between patches; `patch_size` if None.
        in_chans: Channels of the pictures.
        num_classes: Classes of the head; 0 for none.
        embed_dim: D.
        depth: Number of blocks.
        d_state: N.
        d_conv: W.
        expand: E / D.
        drop_rate: Dropout before the head.
        drop_path_rate: Of the last block; block i ≥ 1 gets the (i-1)-th of `depth` values from 0 to the rate, block 0
            gets 0, and a last drop path with the full rate stands before the final norm (as released).
        scan_backend: "auto" or a name of `svp_bench.list_backends()`.

    Attributes:
        points: Where a method may act.
        adapter: What a method trains, or None.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        scan_backend: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.depth = depth
        self.patch_embed = PatchEmbed(to_2tuple(img_size), patch_size, stride or patch_size, in_chans, embed_dim)
        patches = self.patch_embed.num_patches
        self.cls_index = patches // 2
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, embed_dim))  # row cls_index is the class token's
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()  # also for a model on the meta device
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.layers = nn.ModuleList(Block(embed_dim, rates[max(i - 1, 0)], **mixer) for i in range(depth))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm_f = RMSNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.adapter: nn.Module | None = None
        self.points = Points(depth)
        self.grad_checkpointing = False
        for layer, mix in enumerate(self.mixers):
            mix.layer, mix.points = layer, self.points
        self.set_scan_backend(scan_backend)
        self.init_weights()
        self.reset_classifier(num_classes)  # last: the random backbone of a seed must not depend on the classes

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, from the first block to the last."""
        return [block.mixer for block in self.layers if isinstance(block, Block)]

    def set_scan_backend(self, name: str) -> None:
        """Use this scan backend from now on.

        Raises:
            UsageError: If there is none of that name.
            UnavailableError: If it cannot run here.
        """
        require(name)
        self.scan_backend = self.points.scan_backend = name
        for mixer in self.mixers:
            mixer.scan_backend = name

    def init_weights(self) -> None:
        """Initialise as Vim does before pre-training: LeCun-normal patches, GPT-2's depth scaling of out_proj."""
        for module in self.modules():
            if isinstance(module, Mixer):
                nn.init.kaiming_uniform_(module.out_proj.weight, a=math.sqrt(5))
                with torch.no_grad():
                    module.out_proj.weight /= math.sqrt(self.depth)
                module.init_dt()
        # LeCun normal: variance 1 / fan-in
        fan_in = self.patch_embed.proj.weight[0].numel()
        trunc_normal_(self.patch_embed.proj.weight, std=fan_in**-0.5 / 0.87962566103423978)
        if self.patch_embed.proj.bias is not None:
            nn.init.zeros_(self.patch_embed.proj.bias)
        trunc_normal_(self.pos_embed, std=0.02)
        trunc_normal_(self.cls_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that take no weight decay besides biases and one-dimensional ones (Vim's list)."""
        logs = {name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log"))}
        return {"pos_embed", "cls_token", *logs}

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, initialised as Vim does.

        Raises:
            ValueError: If a pooling is asked for: Vim reads its class token.
        """
        if global_pool not in (None, "token"):
            raise ValueError(f"Vim reads its class token (global_pool='token'); {global_pool!r} is not offered")
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = head = nn.Linear(self.embed_dim, num_classes)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            head.to(device=self.norm_f.weight.device, dtype=self.norm_f.weight.dtype)

    def embed(self, images: Tensor) -> TokenState:
        """(B, 3, H, W) → the token sequence before block 0, class token in the middle, positions added."""
        tokens = self.patch_embed(images)
        for point in self.points.patch_embed:
            tokens = point(images, tokens)
        cls = self.cls_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        middle = self.cls_index
        sequence = torch.cat([tokens[:, :middle], cls, tokens[:, middle:]], dim=1)
        return TokenState(sequence + self.pos_embed, None, middle)

    def _layer(self, layer: int, block: nn.Module, state: TokenState) -> TokenState:
        """What the methods do before a block, and the block."""
        for point in self.points.tokens:
            state = point(layer, state.settled(self.scan_backend))
        after: TokenState = block(state)
        return after

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep the input of each layer alone and compute the layer again in the backward pass (timm's name for it)."""
        self.grad_checkpointing = enable

    def forward_tokens(self, images: Tensor) -> tuple[Tensor, int]:
        """(B, 3, H, W) → all tokens after the final norm, (B, L, D), and the place of the class token."""
        state = self.embed(images)
        for i, block in enumerate(self.layers):
            if self.grad_checkpointing and torch.is_grad_enabled():
                state = checkpoint(self._layer, i, block, state, use_reentrant=False)
            else:
                state = self._layer(i, block, state)
        branch = state.hidden if state.residual is None else self.drop_path(state.hidden)
        norm = self.norm_f
        _, normed = add_norm(branch, state.residual, norm.weight, norm.eps, backend=self.scan_backend)
        return normed, state.cls_index

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D), the class token after the final norm."""
        tokens, cls_index = self.forward_tokens(images)
        return tokens[:, cls_index]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """(B, D) → (B, classes), or the features before the head if `pre_logits`."""
        x = self.head_drop(x)
        if pre_logits:
            return x
        logits: Tensor = self.head(x)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Normalised float (B, 3, H, W) → logits (B, classes)."""
        return self.forward_head(self.forward_features(images))

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a published file; timm calls this for `pretrained=True`."""
        from svp_bench.models.checkpoints import load_checkpoint

        load_checkpoint(self, checkpoint_path)


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "paper_ids": "arXiv:2401.09417",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


def _hub(size: str, file: str) -> dict[str, Any]:
    return _cfg(hf_hub_id=f"hustvl/Vim-{size}-midclstok", hf_hub_filename=file, custom_load="hf")


default_cfgs = generate_default_cfgs(
    {
        "vim_tiny_patch16_224.in1k": _hub("tiny", "vim_t_midclstok_76p1acc.pth"),
        "vim_tiny_patch16_stride8_224.in1k": _hub("tiny", "vim_t_midclstok_ft_78p3acc.pth"),
        "vim_small_patch16_224.in1k": _hub("small", "vim_s_midclstok_80p5acc.pth"),
        "vim_small_patch16_stride8_224.in1k": _hub("small", "vim_s_midclstok_ft_81p6acc.pth"),
        "vim_base_patch16_224.in1k": _hub("base", "vim_b_midclstok_81p9acc.pth"),
        "vim_nano_patch8_64": _cfg(input_size=(3, 64, 64), num_classes=10, origin_url="", paper_ids=""),
    }
)


def _create(variant: str, pretrained: bool, defaults: dict[str, Any], kwargs: dict[str, Any]) -> VisionMamba:
    model: VisionMamba = build_model_with_cfg(VisionMamba, variant, pretrained, **{**defaults, **kwargs})
    return model


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-tiny: width 192, 6,955,008 parameters without head; 76.1 % on ImageNet-1K."""
    return _create("vim_tiny_patch16_224", pretrained, {"embed_dim": 192}, kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-tiny with overlapping patches, 730 tokens; 78.3 % on ImageNet-1K."""
    return _create("vim_tiny_patch16_stride8_224", pretrained, {"embed_dim": 192, "stride": 8}, kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-small: width 384, 25,411,584 parameters without head; 80.5 % on ImageNet-1K. SVP's backbone."""
    return _create("vim_small_patch16_224", pretrained, {"embed_dim": 384}, kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-small with overlapping patches, 730 tokens; 81.6 % on ImageNet-1K."""
    return _create("vim_small_patch16_stride8_224", pretrained, {"embed_dim": 384, "stride": 8}, kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """Vim-base: width 768, 96,829,440 parameters without head; 81.9 % on ImageNet-1K."""
    return _create("vim_base_patch16_224", pretrained, {"embed_dim": 768}, kwargs)


@register_model
def vim_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
    """A small Vim for 64×64 pictures, demos and tests: width 64, depth 8, state size 8; 293,632 parameters."""
    defaults = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 8, "d_state": 8, "num_classes": 10}
    return _create("vim_nano_patch8_64", pretrained, defaults, kwargs)
