"""Vision Mamba (Vim), readable from top to bottom, as a timm model.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", ICML 2024,
arXiv:2401.09417. Parameter names and shapes are those of the published checkpoints (hustvl/Vim-*-midclstok): RMSNorm,
absolute position embedding, class token in the middle, bidirectional mixer "v2" whose two directions are averaged.

Letters used for shapes: B batch, L length (patches + class token + whatever a method inserts), D width (embed_dim),
E = 2 D inner width, N state size, R = ceil(D / 16) rank of Δ, W convolution width, P patches.

The backbone knows no method. It offers named points (`Points`) where one may act; each is empty by default.

Kernels read the tensors of a part (projection, convolution, norm) while that part is plain (`is_plain`). A part that
was replaced, or carries hooks, parametrizations or a pruning mask, is called as a module instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, resample_abs_pos_embed, resample_patch_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.models.hooks import LINEAR_POINTS, TENSOR_POINTS, Points, TokenState, is_plain, not_plain
from svp_bench.ops import (
    Direction,
    Remake,
    add_norm,
    bidirectional_conv,
    bidirectional_scan,
    is_tracing,
    require,
)

if TYPE_CHECKING:
    from svp_bench.models.checkpoints import LoadReport

__all__ = ["LINEAR_POINTS", "TENSOR_POINTS", "Block", "Mixer", "Points", "RMSNorm", "TokenState", "VisionMamba"]

NORM_EPS = 1e-5  # of the published checkpoints; timm's usual 1e-6 gives other numbers


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
    """Images to patch tokens by one strided convolution; with `stride` below `patch_size` the patches overlap."""

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
            ValueError: If the images are not of the size that the model was built for.
        """
        if tuple(images.shape[-2:]) != self.img_size:
            given = "×".join(map(str, images.shape[-2:]))
            wanted = "×".join(map(str, self.img_size))
            raise ValueError(f"the model was built for {wanted} images, not {given}; create it with img_size={given}")
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
        self.d_conv = d_conv
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
            log: Tensor = getattr(self, f"{name}_log")
            value = -torch.exp(log.to(torch.promote_types(log.dtype, torch.float32)))
        else:
            part, _, leaf = name.rpartition(".")
            value = getattr(getattr(self, part) if part else self, leaf)
            if part.startswith("conv1d") and leaf == "weight":
                value = value.squeeze(1)  # (E, 1, W) → (E, W)
        for point in self.points.tensor.get((self.layer, name), ()):
            value = point(value)
        return value

    def bias(self, part: str) -> Tensor | None:
        """Return the bias of a plain part as a kernel is to read it, or None if the part has none."""
        if getattr(self, part).bias is None:
            self.refuse_tensor_points(part, "bias")
            return None
        return self.tensor(f"{part}.bias")

    def refuse_tensor_points(self, part: str, *leaves: str) -> None:
        """Check that no method changes a tensor of a part that reads its tensors itself.

        Raises:
            ConfigError: If one does.
        """
        for leaf in leaves:
            if self.points.tensor.get((self.layer, f"{part}.{leaf}")):
                raise not_plain(f"layers.{self.layer}.mixer.{part}.{leaf}", getattr(self, part))

    def check_points(self) -> None:
        """Check that all that methods change is read.

        Raises:
            ConfigError: If a method changes a tensor of a part that is not plain.
        """
        for part in LINEAR_POINTS:
            if not is_plain(getattr(self, part), nn.Linear):
                self.refuse_tensor_points(part, "weight", "bias")
        for part in ("conv1d", "conv1d_b"):
            if not _is_causal(getattr(self, part)):
                self.refuse_tensor_points(part, "weight", "bias")

    def project(self, name: str, x: Tensor) -> Tensor:
        """Apply the projection `name` of `LINEAR_POINTS` to x, and what methods add to it.

        The bias of dt_proj is not added here if `bias_in_scan`.
        """
        part = getattr(self, name)
        points = self.points.linear.get((self.layer, name), ())
        if is_plain(part, nn.Linear):
            y = F.linear(x, self.tensor(f"{name}.weight"), None if self.bias_in_scan(name) else self.bias(name))
        else:
            self.refuse_tensor_points(name, "weight", "bias")
            y = part(x)
            if points:
                y = y.clone()  # its hooks may have kept it, and points may change it in place
        for point in points:
            y = point(x, y)
        return y

    def bias_in_scan(self, name: str) -> bool:
        """Whether the scan adds the bias of a projection: of dt_proj, if nothing else makes or sees its output."""
        return (
            name.startswith("dt_proj")
            and not self.points.linear.get((self.layer, name))
            and is_plain(getattr(self, name), nn.Linear)
        )

    def direction(self, suffix: str, u: Tensor) -> Direction:
        """Return what the scan of one direction reads, from its convolved input u (B, L, E)."""
        A, dt_proj = self.tensor(f"A{suffix}"), f"dt_proj{suffix}"
        state = A.shape[-1]
        dt, B, C = self.project(f"x_proj{suffix}", u).split([self.dt_rank, state, state], dim=-1)
        delta = self.project(dt_proj, dt)
        bias = self.bias(dt_proj) if self.bias_in_scan(dt_proj) else None
        return Direction(u, delta, A, B, C, self.tensor(f"D{suffix}"), bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        x, z = self.project("in_proj", hidden).chunk(2, dim=-1)
        u, u_b, remake = self._convolve(x)
        forward, backward = self.direction("", u), self.direction("_b", u_b)
        y = bidirectional_scan(forward, backward, z, remake=remake, backend=self.scan_backend)
        return self.project("out_proj", y)

    def _convolve(self, x: Tensor) -> tuple[Tensor, Tensor, Remake | None]:
        """Return SiLU of both convolutions of x, (B, L, E) each, and how to compute them again if that pays."""
        both = _is_causal(self.conv1d) and _is_causal(self.conv1d_b)
        if not both or self.conv1d.kernel_size != self.conv1d_b.kernel_size:
            return self._convolve_one("conv1d", x), self._convolve_one("conv1d_b", x.flip(1)).flip(1), None
        ahead = (self.tensor("conv1d.weight"), self.bias("conv1d"))
        back = (self.tensor("conv1d_b.weight"), self.bias("conv1d_b"))

        def convolve(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return bidirectional_conv(x, parts[:2], parts[2:], backend=self.scan_backend)  # type: ignore[arg-type]

        u, u_b = convolve(x, *ahead, *back)  # type: ignore[arg-type]
        # where nothing else holds u for the backward pass, convolving again is cheaper than keeping it
        remake = None if self._keeps_u() else Remake(torch.no_grad()(convolve), (x, *ahead, *back))
        return u, u_b, remake

    def _convolve_one(self, name: str, x: Tensor) -> Tensor:
        """Return SiLU of one convolution of x (B, L, E), the first L steps of what it gives."""
        conv, length = getattr(self, name), x.shape[1]
        if _is_causal(conv):
            y = F.conv1d(
                x.mT,
                self.tensor(f"{name}.weight").unsqueeze(1),
                self.bias(name),
                padding=conv.padding,
                groups=conv.groups,
            )
        else:
            self.refuse_tensor_points(name, "weight", "bias")
            y = conv(x.mT)
        if y.shape[-1] < length:
            raise ConfigError(
                f"layers.{self.layer}.mixer.{name}, a {type(conv).__name__}, gives {y.shape[-1]} steps for {length}; "
                "what replaces the convolution must pad its input by kernel_size - 1"
            )
        return F.silu(y[..., :length]).mT

    def _keeps_u(self) -> bool:
        """Whether autograd keeps the convolved inputs anyway: a trained or changed x_proj needs them."""
        linear, tensor = self.points.linear, self.points.tensor
        return any(
            not is_plain(part := getattr(self, name), nn.Linear)
            or part.weight.requires_grad
            or linear.get((self.layer, name))
            or tensor.get((self.layer, f"{name}.weight"))
            for name in ("x_proj", "x_proj_b")
        )


def _is_causal(conv: nn.Module) -> bool:
    """Whether a part is the depth-wise causal convolution that kernels know."""
    return (
        is_plain(conv, nn.Conv1d)
        and isinstance(conv, nn.Conv1d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding == (conv.kernel_size[0] - 1,)
        and conv.stride == conv.dilation == (1,)
        and conv.padding_mode == "zeros"
    )


def _add_norm(norm: nn.Module, state: TokenState, backend: str) -> tuple[Tensor, Tensor]:
    """Return the residual stream with the branch added, and what `norm` makes of it."""
    hidden = state.hidden
    if is_plain(norm, RMSNorm):
        weight, eps = norm.weight, norm.eps
        return add_norm(hidden, state.residual, weight, eps, state.prompts, backend=backend)  # type: ignore[arg-type]
    stream = state.settled(backend).stream
    taken = stream
    if not isinstance(norm, RMSNorm):  # which takes any precision; others take that of their parameters
        taken = stream.to(next((p.dtype for p in norm.parameters() if p.is_floating_point()), stream.dtype))
    return stream, norm(taken).to(hidden.dtype)


class Block(nn.Module):
    """Add, norm, mix: the branch of the block before is added first, and the own branch is returned apart."""

    def __init__(self, width: int, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Mixer(width, **mixer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.scan_backend = "auto"

    def forward(self, state: TokenState) -> TokenState:
        """Tokens (B, L, D) → hidden: the mixer's output, residual: the stream.

        The drop path acts on the branch of the block before; block 0 has none before it and does not call its own.
        """
        backend, drop = self.scan_backend, self.drop_path
        idle = is_plain(drop, nn.Identity) or (is_plain(drop, DropPath) and not drop.training)
        if state.residual is not None and not idle:
            state = state.settled(backend)
            state = state._replace(hidden=drop(state.hidden))
        stream, normed = _add_norm(self.norm, state, backend)
        return TokenState(self.mixer(normed), stream, state.cls_index)


def _check_pool(name: str) -> None:
    if name != "token":
        raise ValueError(
            f"Vim reads its class token (global_pool='token'); {name!r} is not offered; forward_tokens gives all tokens"
        )


def resize_positions(rows: Tensor, old: tuple[int, ...], new: tuple[int, ...]) -> Tensor:
    """Resize a position embedding (1, P + 1, D) from one grid to another (bicubic), the class token's row apart."""
    at, to = math.prod(old) // 2, math.prod(new) // 2
    patches = torch.cat([rows[:, :at], rows[:, at + 1 :]], dim=1)
    patches = resample_abs_pos_embed(patches, new_size=list(new), old_size=list(old), num_prefix_tokens=0)
    return torch.cat([patches[:, :to], rows[:, at : at + 1], patches[:, to:]], dim=1)


def _mixer_of(layer: int, block: nn.Module) -> Mixer:
    found = [module for module in block.modules() if isinstance(module, Mixer)]
    if len(found) != 1:
        raise ConfigError(
            f"layers.{layer}, a {type(block).__name__}, holds {len(found)} Mixer modules and must hold one: methods "
            "act on Vim's mixers; keep the mixer inside what replaces the block"
        )
    return found[0]


class VisionMamba(nn.Module):
    """Vision Mamba with the class token in the middle; timm's surface, the published parameter names.

    Args:
        img_size: Height and width of the images, or one number for both.
        patch_size: Side of a patch.
        stride: Distance between patches; `patch_size` if None.
        in_chans: Channels of the images.
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
        global_pool: "token", timm's name for reading the class token; there is no other pooling.

    Attributes:
        points: Where a method may act.
        adapter: What a method trains, or None.
        load_report: What loading the weights did in addition to copying, or None for random ones.
        feature_info: A dict a block, as timm's `features_only` reads it.

    Raises:
        ValueError: If another pooling is asked for.
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
        global_pool: str = "token",
    ) -> None:
        super().__init__()
        _check_pool(global_pool)
        self.global_pool = global_pool
        self.num_classes = num_classes
        self.in_chans = in_chans
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
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.stride} for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.adapter: nn.Module | None = None
        self.load_report: LoadReport | None = None  # of `load_checkpoint`
        self.points = Points(depth)
        self.grad_checkpointing = False
        for layer, mix in enumerate(self.mixers):
            mix.layer, mix.points = layer, self.points
        self.set_scan_backend(scan_backend)
        self.init_weights()
        self.reset_classifier(num_classes)  # last: the random backbone of a seed must not depend on the classes

    @property
    def mixers(self) -> list[Mixer]:
        """The mixers, from the first block to the last, also of blocks that were wrapped.

        Raises:
            ConfigError: If a block does not hold exactly one.
        """
        return [_mixer_of(layer, block) for layer, block in enumerate(self.layers)]

    def set_scan_backend(self, name: str) -> None:
        """Use this scan backend from now on.

        Raises:
            UsageError: If there is none of that name.
            UnavailableError: If it cannot run here.
        """
        require(name)
        self.scan_backend = self.points.scan_backend = name
        for module in self.modules():
            if isinstance(module, (Block, Mixer)):
                module.scan_backend = name

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

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter names by depth, for layer-wise learning rates; the adapter comes last."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one, initialised as Vim does.

        Raises:
            ValueError: If another pooling than "token" is asked for: Vim reads its class token.
        """
        if global_pool is not None:
            _check_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = head = nn.Linear(self.embed_dim, num_classes)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            head.to(device=self.cls_token.device, dtype=self.cls_token.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Take images of another size, or patches of another, from now on (as timm's ViTs do).

        Positions are resized (bicubic) by their grid, the class token's row apart; so are the weights of the patches.

        Args:
            img_size: Height and width; as before if None.
            patch_size: Side of a patch; as before if None. Not for overlapping patches.

        Raises:
            ConfigError: If the model carries a method, or no patch fits.
        """
        if self.adapter is not None or len(self.points):
            raise ConfigError("set_input_size: this model carries a method that was built for its size; call it before")
        old, embed = self.patch_embed, self.patch_embed.proj
        size = old.img_size if img_size is None else to_2tuple(img_size)
        side = old.patch_size if patch_size is None else to_2tuple(patch_size)
        if side[0] != side[1] or (side != old.patch_size and old.stride != old.patch_size[0]):
            raise ConfigError(
                f"set_input_size: patch_size {patch_size} is not offered; patches are square, and those of this model "
                f"({old.patch_size[0]}, a step of {old.stride}) can only change where they do not overlap"
            )
        stride = old.stride if side == old.patch_size else side[0]
        new = PatchEmbed(size, side[0], stride, self.in_chans, self.embed_dim)
        if new.num_patches < 1:
            raise ConfigError(f"set_input_size: no patch of {side[0]} fits into {size[0]}×{size[1]}")
        if side != old.patch_size:
            with torch.no_grad():
                new.proj.to(embed.weight)
                new.proj.weight.copy_(resample_patch_embed(embed.weight, list(side)))
                if embed.bias is None:
                    new.proj.bias = None
                elif new.proj.bias is not None:
                    new.proj.bias.copy_(embed.bias)
            new.proj.requires_grad_(embed.weight.requires_grad)
        else:
            new.proj = embed  # with its hooks, or what it was replaced by
        self.patch_embed = new.train(old.training)
        if new.grid_size != old.grid_size:
            with torch.no_grad():
                rows = resize_positions(self.pos_embed, old.grid_size, new.grid_size)
            self.pos_embed = nn.Parameter(rows, requires_grad=self.pos_embed.requires_grad)
        self.cls_index = new.num_patches // 2
        for info in self.feature_info:
            info["reduction"] = stride

    def embed(self, images: Tensor) -> TokenState:
        """(B, 3, H, W) → the token sequence before block 0, class token in the middle, positions added."""
        tokens = self.patch_embed(images)
        for point in self.points.patch_embed:
            tokens = point(images, tokens)
        cls = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
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
        for layer, block in enumerate(self.layers):
            state = self._run(layer, block, state)
        return self._final_norm(state), state.cls_index

    def _run(self, layer: int, block: nn.Module, state: TokenState) -> TokenState:
        """Return the state after a block, which is computed again in the backward pass if that was asked for."""
        if self.grad_checkpointing and torch.is_grad_enabled() and not is_tracing():
            again: TokenState = checkpoint(self._layer, layer, block, state, use_reentrant=False)
            return again
        return self._layer(layer, block, state)

    def _final_norm(self, state: TokenState) -> Tensor:
        """(B, L, D), normed, of the state after a block."""
        if state.residual is not None:
            state = state._replace(hidden=self.drop_path(state.hidden))
        return _add_norm(self.norm_f, state, self.scan_backend)[1]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D), the class token after the final norm."""
        tokens, cls_index = self.forward_tokens(images)
        return tokens[:, cls_index]

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Return what `forward_features` returns, and the patch tokens after chosen blocks (timm's interface).

        The tokens after a block are the residual stream with the block's branch added.

        Args:
            x: Normalised images (B, 3, H, W).
            indices: The last n blocks, the blocks of these numbers, or all.
            return_prefix_tokens: Return pairs of the patch tokens and the class token (B, 1, D).
            norm: Apply the final norm to the tokens of every block.
            stop_early: Skip the blocks behind the last chosen one; needs `intermediates_only`.
            output_fmt: NCHW for maps (B, D, rows, columns), NLC for tokens (B, P, D).
            intermediates_only: Return the list alone.
            output_dict: Return a dict of image_features, image_intermediates and image_intermediates_prefix.

        Raises:
            ConfigError: If a method has inserted tokens, so that the others are no map; or if the format is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown_name("output_fmt", str(output_fmt), ("NCHW", "NLC"), error=ConfigError)
        chosen, last = feature_take_indices(len(self.layers), indices)
        patches, (rows, columns) = self.patch_embed.num_patches, self.patch_embed.grid_size
        taken, prefixes = [], []
        state = self.embed(x)
        for layer, block in enumerate(self.layers[: last + 1] if stop_early and intermediates_only else self.layers):
            state = self._run(layer, block, state)
            if layer not in chosen:
                continue
            tokens, at = self._final_norm(state) if norm else state.stream.to(state.hidden.dtype), state.cls_index
            if tokens.shape[1] != patches + 1:
                raise ConfigError(
                    f"the method of this model inserts tokens ({tokens.shape[1]} where the images give {patches + 1}), "
                    "so they are not a map; take the intermediates of a model without it, or forward_tokens"
                )
            spatial = torch.cat([tokens[:, :at], tokens[:, at + 1 :]], dim=1)
            taken.append(spatial.mT.unflatten(2, (rows, columns)).contiguous() if output_fmt == "NCHW" else spatial)
            prefixes.append(tokens[:, at : at + 1])
        if output_dict:
            outputs: dict[str, Any] = {"image_intermediates": taken}
            if return_prefix_tokens:
                outputs["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                outputs["image_features"] = self._final_norm(state)[:, state.cls_index]
            return outputs
        intermediates = list(zip(taken, prefixes, strict=True)) if return_prefix_tokens else taken
        return intermediates if intermediates_only else (self._final_norm(state)[:, state.cls_index], intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Return the patch tokens after blocks n, or after the last n: an older name of `forward_intermediates`."""
        return self.forward_intermediates(
            x,
            n,
            return_prefix_tokens=return_prefix_tokens,
            norm=norm,
            output_fmt="NCHW" if reshape else "NLC",
            intermediates_only=True,
        )

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the blocks behind the last of `indices`, and the head; timm's `features_only` calls this.

        Args:
            indices: The last n blocks, or the blocks of these numbers.
            prune_norm: Remove the final norm.
            prune_head: Remove the head.

        Returns:
            The numbers of the chosen blocks.

        Raises:
            ConfigError: If the model carries a method.
        """
        if self.adapter is not None or len(self.points):
            raise ConfigError(
                "prune_intermediate_layers: this model carries a method for all its blocks; call it before"
            )
        chosen, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.depth = self.points.depth = last + 1
        if prune_norm:
            self.norm_f = nn.Identity()  # type: ignore[assignment]
        if prune_head:
            self.reset_classifier(0)
        return list(chosen)

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
        """Load a published file; timm calls this for `pretrained=True`, and keeps a head of as many classes."""
        from svp_bench.models.checkpoints import load_checkpoint

        cfg: Any = getattr(self, "pretrained_cfg", {})
        load_checkpoint(self, checkpoint_path, head="keep" if self.num_classes == cfg.get("num_classes") else "fresh")


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
    features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}  # as timm's ViTs
    model: VisionMamba = build_model_with_cfg(
        VisionMamba, variant, pretrained, feature_cfg=features, **{**defaults, **kwargs}
    )
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
    """A small Vim for 64×64 images, demos and tests: width 64, depth 8, state size 8; 293,632 parameters."""
    defaults = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 8, "d_state": 8, "num_classes": 10}
    return _create("vim_nano_patch8_64", pretrained, defaults, kwargs)
