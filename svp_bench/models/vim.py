"""Vision Mamba (Vim) as a timm model, readable from top to bottom.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model", ICML 2024,
arXiv:2401.09417. Parameter names and shapes are those of the published checkpoints (hustvl/Vim-*-midclstok): RMSNorm,
absolute position embedding, class token in the middle, bidirectional mixer "v2" that averages its two directions.

Letters used for shapes: B batch, L length (patches, class token, tokens that a method inserts), D width (embed_dim),
E = 2 D inner width, N state size, R = ceil(D / 16) rank of Δ, W convolution width, P patches.

The backbone knows no method: methods act at its hook points (`HookPoints`), empty by default. Kernels read the tensors
of a part (projection, convolution, norm) while it is plain (`is_plain`); a replaced part, or one with hooks,
parametrizations or a pruning mask, is called as a module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, to_2tuple, trunc_normal_
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.models.backbone import Backbone
from svp_bench.models.checkpoints import load_checkpoint
from svp_bench.models.hooks import HookPoints, Projection, ScanInputs, TokenState, is_plain, not_plain
from svp_bench.models.layers import PatchEmbed, RMSNorm, is_causal_conv, resize_positions
from svp_bench.ops import Direction, Recompute, add_norm, bidirectional_conv, bidirectional_scan, require

LINEAR_POINTS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
TENSOR_POINTS = (
    *(f"{name}.weight" for name in (*LINEAR_POINTS, "conv1d", "conv1d_b")),
    *(f"{name}.bias" for name in ("conv1d", "conv1d_b", "dt_proj", "dt_proj_b")),
    *("A", "A_b", "D", "D_b"),
)


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
        self.points = HookPoints()  # replaced by the model's
        self.scan_backend = "auto"

    def init_dt(self, dt_min: float = 1e-3, dt_max: float = 0.1, dt_floor: float = 1e-4) -> None:
        """Initialise dt_proj of both directions: weights uniform ± R^-½, softplus(bias) log-uniform in [1e-3, 0.1].

        In the released code a later pass sets the backward bias to zero.
        """
        for dt_proj in (self.dt_proj, self.dt_proj_b):
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            low, high = math.log(dt_min), math.log(dt_max)
            dt = torch.exp(torch.rand(dt_proj.bias.shape) * (high - low) + low).clamp(min=dt_floor)
            with torch.no_grad():
                dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse of softplus

    def tensor(self, name: str) -> Tensor:
        """Return the tensor `name` of `TENSOR_POINTS` as a kernel reads it, changed by its hooks."""
        if name in ("A", "A_b"):
            log: Tensor = getattr(self, f"{name}_log")
            value = -torch.exp(log.to(torch.promote_types(log.dtype, torch.float32)))
        else:
            part, _, leaf = name.rpartition(".")
            value = getattr(getattr(self, part) if part else self, leaf)
            if part.startswith("conv1d") and leaf == "weight":
                value = value.squeeze(1)  # (E, 1, W) → (E, W)
        for hook in self.points.tensor.get((self.layer, name), ()):
            value = hook(value)
        return value

    def bias(self, part: str) -> Tensor | None:
        """Return the bias of a plain part as a kernel reads it, or None."""
        if getattr(self, part).bias is None:
            self.refuse_tensor_hooks(part, "bias")
            return None
        return self.tensor(f"{part}.bias")

    def refuse_tensor_hooks(self, part: str, *leaves: str) -> None:
        """Check that no method changes a tensor of a part that reads its tensors itself.

        Raises:
            ConfigError: If one does.
        """
        for leaf in leaves:
            if self.points.tensor.get((self.layer, f"{part}.{leaf}")):
                raise not_plain(f"layers.{self.layer}.mixer.{part}.{leaf}", getattr(self, part))

    def check_hooks(self) -> None:
        """Check that every tensor that a method changes is read.

        Raises:
            ConfigError: If a method changes a tensor of a part that is not plain.
        """
        plain = {name: is_plain(getattr(self, name), nn.Linear) for name in LINEAR_POINTS}
        plain |= {name: is_causal_conv(getattr(self, name)) for name in ("conv1d", "conv1d_b")}
        for part in (name for name, known in plain.items() if not known):
            self.refuse_tensor_hooks(part, "weight", "bias")

    def project(self, name: str, x: Tensor) -> Tensor:
        """Apply the projection `name` of `LINEAR_POINTS` and its hooks to x; `bias_in_scan` leaves out the bias."""
        part = getattr(self, name)
        hooks = self.points.linear.get((self.layer, name), ())
        if is_plain(part, nn.Linear):
            y = F.linear(x, self.tensor(f"{name}.weight"), None if self.bias_in_scan(name) else self.bias(name))
        else:
            self.refuse_tensor_hooks(name, "weight", "bias")
            y = part(x)
            if hooks:
                y = y.clone()  # the module may hold its output, and hooks may change it in place
        for hook in hooks:
            y = hook(x, y)
        return y

    def bias_in_scan(self, name: str) -> bool:
        """Whether the scan adds the bias of a projection: that of a plain dt_proj without hooks."""
        return (
            name.startswith("dt_proj")
            and not self.points.linear.get((self.layer, name))
            and is_plain(getattr(self, name), nn.Linear)
        )

    def direction(self, suffix: str, u: Tensor) -> Direction:
        """Return the inputs of the scan of one direction from its convolved input u (B, L, E)."""
        A, dt_proj = self.tensor(f"A{suffix}"), f"dt_proj{suffix}"
        state = A.shape[-1]
        dt, B, C = self.project(f"x_proj{suffix}", u).split([self.dt_rank, state, state], dim=-1)
        delta = self.project(dt_proj, dt)
        bias = self.bias(dt_proj) if self.bias_in_scan(dt_proj) else None
        return Direction(u, delta, A, B, C, self.tensor(f"D{suffix}"), bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, D) → (B, L, D)."""
        x, z = self.project("in_proj", hidden).chunk(2, dim=-1)
        u, u_b, recompute = self._convolve(x)
        forward, backward = self.direction("", u), self.direction("_b", u_b)
        y = bidirectional_scan(forward, backward, z, recompute=recompute, backend=self.scan_backend)
        for hook in self.points.scan.get(self.layer, ()):
            y = hook(ScanInputs(forward, backward, z), y)
        return self.project("out_proj", y)

    def _convolve(self, x: Tensor) -> tuple[Tensor, Tensor, Recompute | None]:
        """Return SiLU of both convolutions of x, (B, L, E) each, and how to recompute them unless autograd saves u."""
        both = is_causal_conv(self.conv1d) and is_causal_conv(self.conv1d_b)
        if not both or self.conv1d.kernel_size != self.conv1d_b.kernel_size:
            return self._convolve_one("conv1d", x), self._convolve_one("conv1d_b", x.flip(1)).flip(1), None
        ahead = (self.tensor("conv1d.weight"), self.bias("conv1d"))
        back = (self.tensor("conv1d_b.weight"), self.bias("conv1d_b"))

        def convolve(x: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
            return bidirectional_conv(x, parts[:2], parts[2:], backend=self.scan_backend)  # type: ignore[arg-type]

        u, u_b = convolve(x, *ahead, *back)  # type: ignore[arg-type]
        recompute = None if self._saves_u() else Recompute(torch.no_grad()(convolve), (x, *ahead, *back))
        return u, u_b, recompute

    def _convolve_one(self, name: str, x: Tensor) -> Tensor:
        """Return the first L steps of SiLU of one convolution of x (B, L, E)."""
        conv, length = getattr(self, name), x.shape[1]
        if is_causal_conv(conv):
            weight, bias = self.tensor(f"{name}.weight").unsqueeze(1), self.bias(name)
            y = F.conv1d(x.mT, weight, bias, padding=conv.padding, groups=conv.groups)
        else:
            self.refuse_tensor_hooks(name, "weight", "bias")
            y = conv(x.mT)
        if y.shape[-1] < length:
            raise ConfigError(
                f"layers.{self.layer}.mixer.{name}, a {type(conv).__name__}, gives {y.shape[-1]} steps for {length}; "
                "a replacement of the convolution must pad its input by kernel_size - 1"
            )
        return F.silu(y[..., :length]).mT

    def _saves_u(self) -> bool:
        """Whether autograd saves the convolved inputs anyway, for a trained or changed x_proj."""
        linear, tensor = self.points.linear, self.points.tensor
        return any(
            not is_plain(part := getattr(self, name), nn.Linear)
            or part.weight.requires_grad
            or linear.get((self.layer, name))
            or tensor.get((self.layer, f"{name}.weight"))
            for name in ("x_proj", "x_proj_b")
        )


def _add_norm(norm: nn.Module, state: TokenState, backend: str) -> tuple[Tensor, Tensor]:
    """Return the residual stream with the branch added, and its norm."""
    hidden = state.hidden
    if is_plain(norm, RMSNorm):
        weight, eps = norm.weight, norm.eps
        return add_norm(hidden, state.residual, weight, eps, state.prompts, backend=backend)  # type: ignore[arg-type]
    stream = state.settled(backend).stream
    dtype = stream.dtype
    if not isinstance(norm, RMSNorm):  # other norms expect the precision of their parameters
        dtype = next((p.dtype for p in norm.parameters() if p.is_floating_point()), dtype)
    return stream, norm(stream.to(dtype)).to(hidden.dtype)


class Block(nn.Module):
    """Add the branch of the previous block to the stream, norm, mix; the own branch is returned separately."""

    def __init__(self, width: int, drop_path: float, **mixer: Any) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.mixer = Mixer(width, **mixer)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.scan_backend = "auto"

    def forward(self, state: TokenState) -> TokenState:
        """(hidden, residual) → (mixer output, stream). The drop path acts on `hidden`, except in block 0."""
        backend, drop = self.scan_backend, self.drop_path
        idle = is_plain(drop, nn.Identity) or (is_plain(drop, DropPath) and not drop.training)
        if state.residual is not None and not idle:
            state = state.settled(backend)
            state = state._replace(hidden=drop(state.hidden))
        stream, normed = _add_norm(self.norm, state, backend)
        return state._replace(hidden=self.mixer(normed), residual=stream, prompts=None)


def _check_pool(name: str) -> None:
    if name != "token":
        raise ValueError(
            f"global_pool {name!r} is not supported, only 'token' (the class token); forward_tokens gives all tokens"
        )


def _mixer_of(layer: int, block: nn.Module) -> Mixer:
    found = [module for module in block.modules() if isinstance(module, Mixer)]
    if len(found) != 1:
        raise ConfigError(
            f"layers.{layer}, a {type(block).__name__}, holds {len(found)} Mixer modules and must hold one; keep the "
            "mixer inside the module that replaces the block"
        )
    return found[0]


class VisionMamba(Backbone):
    """Vision Mamba with the class token in the middle, timm's interface and the published parameter names.

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
        drop_path_rate: Block i ≥ 1 gets the (i-1)-th of `depth` values from 0 to this rate, block 0 gets 0, and the
            drop path before the final norm the full rate (as released).
        scan_backend: "auto" or a name of `svp_bench.list_backends()`.
        global_pool: "token" (timm's name for the class token); others raise ValueError.

    Attributes:
        feature_info: One dict per block, for timm's `features_only`.
    """

    family: ClassVar[str] = "vim"
    exact_parts = (PatchEmbed, RMSNorm, Block, Mixer)
    separate_residual = True
    branch_outputs = ("out_proj",)
    default_targets = ("X",)
    scan_backend: str

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
        self._add_tokens()
        rates = torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()  # "cpu" also for meta models
        mixer = {"d_state": d_state, "d_conv": d_conv, "expand": expand}
        self.layers = nn.ModuleList(Block(embed_dim, rates[max(i - 1, 0)], **mixer) for i in range(depth))
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self.norm_f = RMSNorm(embed_dim)
        self.feature_info = [
            {"module": f"layers.{i}", "num_chs": embed_dim, "reduction": self.patch_embed.stride} for i in range(depth)
        ]
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = nn.Identity()
        self.init_weights()
        self.finish(HookPoints(depth, LINEAR_POINTS, TENSOR_POINTS, has_scan=True))
        for layer, mix in enumerate(self.mixers):
            mix.layer, mix.points = layer, self.points
        self.set_scan_backend(scan_backend)
        self.reset_classifier(num_classes)  # last, so that a seed's random backbone is independent of the classes

    def _add_tokens(self) -> None:
        """Add the class token and the position embedding."""
        patches = self.num_patches
        self.cls_positions = self._cls_positions(patches)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, patches + 1, self.embed_dim))

    def position_rows(self, patches: int) -> tuple[int, ...]:
        """Return the row of the class token, in the middle."""
        return (patches // 2,)

    @property
    def mixers(self) -> list[Mixer]:
        """Return the mixer of each block, wrapped blocks included; ConfigError if a block does not hold one."""
        return [_mixer_of(layer, block) for layer, block in enumerate(self.layers)]

    @property
    def projections(self) -> Mapping[str, Projection]:
        """Return Vim's projections, and MambaPEFT's row slices X, Z, d, B and C, by name."""
        mixer, width = self.mixers[0], self.embed_dim
        (inner, state), rank = mixer.A_log.shape, mixer.dt_rank
        x_proj, dt_proj = ("x_proj", "x_proj_b"), ("dt_proj", "dt_proj_b")
        return {
            "in_proj": Projection(("in_proj",), 0, 2 * inner, width),
            "X": Projection(("in_proj",), 0, inner, width),
            "Z": Projection(("in_proj",), inner, 2 * inner, width),
            "x_proj": Projection(x_proj, 0, rank + 2 * state, inner, on_weight=True),
            "d": Projection(x_proj, 0, rank, inner, on_weight=True),
            "B": Projection(x_proj, rank, rank + state, inner, on_weight=True),
            "C": Projection(x_proj, rank + state, rank + 2 * state, inner, on_weight=True),
            "dt_proj": Projection(dt_proj, 0, inner, rank, on_weight=True),
            "out_proj": Projection(("out_proj",), 0, width, inner),
        }

    def part(self, layer: int, name: str) -> nn.Module:
        """Return the projection or convolution `name` of block `layer`."""
        return self.mixers[layer].get_submodule(name)

    def check_hooks(self) -> None:
        """Check that every tensor that a method changes is read."""
        for mixer in self.mixers:
            mixer.check_hooks()

    def set_scan_backend(self, name: str) -> None:
        """Set the scan backend; raise UsageError for an unknown name, UnavailableError if it cannot run here."""
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
        """Return the parameters without weight decay in addition to one-dimensional ones (Vim's list)."""
        logs = {name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log"))}
        return {"pos_embed", "cls_token", *logs}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return timm's patterns of parameter names by depth, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a newly initialised one; ValueError for a pooling other than "token"."""
        _check_pool("token" if global_pool is None else global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes > 0:
            self.head = head = nn.Linear(self.head_hidden_size, num_classes)
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
            head.to(device=self.cls_token.device, dtype=self.cls_token.dtype).train(self.training)

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Change the image size or the patch size in place, as timm's ViTs do.

        Position embeddings and patch weights are resized (bicubic); the row of the class token is copied.

        Args:
            img_size: Height and width; unchanged if None.
            patch_size: Side of a patch; unchanged if None. Only without overlap.

        Raises:
            ConfigError: If the model carries a method, or the patches do not fit.
        """
        self.refuse_method("set_input_size")
        old = self.patch_embed
        size = old.img_size if img_size is None else to_2tuple(img_size)
        new = old if patch_size is None else old.with_patch_size(to_2tuple(patch_size))
        embed = PatchEmbed(size, new.patch_size[0], new.stride, self.in_chans, self.embed_dim)
        embed.proj, grid = new.proj, embed.grid_size  # with its hooks and replacements
        if min(grid) < 1:
            raise ConfigError(f"set_input_size: {size[0]}×{size[1]} is smaller than a patch of {new.patch_size[0]}")
        self.patch_embed = embed.train(old.training)
        if grid != old.grid_size:
            with torch.no_grad():
                rows = resize_positions(self.pos_embed, old.grid_size, grid, self.position_rows)
            self.pos_embed = nn.Parameter(rows, requires_grad=self.pos_embed.requires_grad)
        self.cls_positions = self._cls_positions(embed.num_patches)
        self.note_parameters()
        for info in self.feature_info:
            info["reduction"] = embed.stride

    def _cls_positions(self, patches: int) -> tuple[int, ...]:
        """Return the positions of the class tokens among a number of patches."""
        return (patches // 2,)

    def embed(self, images: Tensor) -> TokenState:
        """(B, 3, H, W) → the token sequence before block 0, class token in the middle, positions added."""
        images = self.hooked_images(images)
        tokens = self.embedded_patches(images)
        cls = self.cls_token.to(tokens.dtype).expand(tokens.shape[0], -1, -1)
        middle = self.cls_index
        sequence = torch.cat([tokens[:, :middle], cls, tokens[:, middle:]], dim=1)
        return TokenState(sequence + self.pos_embed, None, (middle,))

    @property
    def blocks_in_order(self) -> nn.ModuleList:
        """Return the blocks."""
        return self.layers

    @property
    def final_parts(self) -> list[nn.Module]:
        """Return the modules between the last block and the head."""
        return [self.drop_path, self.norm_f]

    def run_block(self, block: nn.Module, state: TokenState) -> TokenState:
        """Return the state after a block."""
        after: TokenState = block(state)
        return after

    def pooled(self, state: TokenState) -> Tensor:
        """Return the class token after the final norm, (B, D), of the state after the last block."""
        return self.final_tokens(state)[:, state.cls_positions[0]]

    def classify(self, features: Tensor) -> Tensor:
        """Return the logits (B, classes) of features (B, D)."""
        return self.forward_head(features)

    def final_tokens(self, state: TokenState) -> Tensor:
        """Return the tokens after the final norm, (B, L, D), of the state after a block."""
        if state.residual is not None:
            state = state._replace(hidden=self.drop_path(state.hidden))
        return _add_norm(self.norm_f, state, self.scan_backend)[1]

    def forward_features(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, D), the features that the head reads."""
        return self.pooled(self.run_blocks(self.embed(images)))

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
        """Return the features of `forward_features`, and the patch tokens after some blocks (timm's interface).

        The tokens after a block are the residual stream with the block's branch added.

        Args:
            x: Normalised images (B, 3, H, W).
            indices: The last n blocks, block numbers, or all.
            return_prefix_tokens: Return pairs of the patch tokens and the class tokens (B, T, D).
            norm: Apply the final norm to the tokens of every block.
            stop_early: Skip the blocks after the last index; needs `intermediates_only`.
            output_fmt: NCHW for maps (B, D, rows, columns), NLC for tokens (B, P, D).
            intermediates_only: Return the list alone.
            output_dict: Return a dict of image_features, image_intermediates and image_intermediates_prefix.

        Raises:
            ConfigError: If a method has inserted tokens, or the format is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise unknown_name("output_fmt", str(output_fmt), ("NCHW", "NLC"), error=ConfigError)
        chosen, last = feature_take_indices(len(self.layers), indices)
        rows, columns = self.grid_size
        taken, prefixes = [], []
        state = self.embed(x)
        for layer, block in enumerate(self.layers[: last + 1] if stop_early and intermediates_only else self.layers):
            state = self._checkpointed(layer, block, state)
            if layer not in chosen:
                continue
            if state.inserted:
                raise ConfigError(
                    f"the method of this model inserts tokens ({state.hidden.shape[1]}, not {self.num_tokens}), so "
                    "they are not a map; use a model without it, or forward_tokens"
                )
            tokens = self.final_tokens(state) if norm else state.stream.to(state.hidden.dtype)
            others = [*state.cls_positions]
            spatial = tokens[:, [at for at in range(tokens.shape[1]) if at not in others]]
            taken.append(spatial.mT.unflatten(2, (rows, columns)).contiguous() if output_fmt == "NCHW" else spatial)
            prefixes.append(tokens[:, others])
        if output_dict:
            outputs: dict[str, Any] = {"image_intermediates": taken}
            if return_prefix_tokens:
                outputs["image_intermediates_prefix"] = prefixes
            if not intermediates_only:
                outputs["image_features"] = self.pooled(state)
            return outputs
        intermediates = list(zip(taken, prefixes, strict=True)) if return_prefix_tokens else taken
        return intermediates if intermediates_only else (self.pooled(state), intermediates)

    def get_intermediate_layers(
        self,
        x: Tensor,
        n: int | Sequence[int] = 1,
        reshape: bool = False,
        return_prefix_tokens: bool = False,
        norm: bool = False,
    ) -> Any:
        """Return the patch tokens after blocks n, or after the last n (older timm name of `forward_intermediates`)."""
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
        """Remove the blocks after the last of `indices`, and on request the final norm and the head, for timm.

        Returns:
            The block numbers of `indices`.
        """
        self.refuse_method("prune_intermediate_layers")
        chosen, last = feature_take_indices(len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        self.depth = self.points.depth = last + 1
        self.note_parameters()
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

    def load_pretrained(self, checkpoint_path: str, prefix: str = "") -> None:
        """Load a published file, with its head if it has as many classes (timm calls this for `pretrained=True`)."""
        cfg: Any = getattr(self, "pretrained_cfg", {})
        load_checkpoint(self, checkpoint_path, head="keep" if self.num_classes == cfg.get("num_classes") else "fresh")
