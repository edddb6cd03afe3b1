"""Layers of a vision backbone that are not specific to Vim.

Letters used for shapes: B batch, P patches, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed, resample_patch_embed, trunc_normal_
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.models.hooks import is_plain

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
    """Map images to patch tokens by a strided convolution; patches overlap if `stride` is below `patch_size`."""

    def __init__(self, img_size: tuple[int, int], patch_size: int, stride: int, in_chans: int, width: int) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.stride = stride
        rows, columns = ((side - patch_size) // stride + 1 for side in img_size)
        self.grid_size = (rows, columns)
        self.num_patches = rows * columns
        self.proj = nn.Conv2d(in_chans, width, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, P, D); ValueError for images of another size."""
        if tuple(images.shape[-2:]) != self.img_size:
            given, expected = ("×".join(map(str, size)) for size in (images.shape[-2:], self.img_size))
            raise ValueError(f"the model takes {expected} images, not {given}; create it with img_size={given}")
        patches: Tensor = self.proj(images)
        return patches.flatten(2).mT

    def with_patch_size(self, size: tuple[int, int]) -> PatchEmbed:
        """Return a copy with resized weights (bicubic) and patches of another size that do not overlap.

        Raises:
            ConfigError: If the patches of this layer overlap, or the new ones are not square.
        """
        if size == self.patch_size:
            return self
        if size[0] != size[1] or self.stride != self.patch_size[0]:
            raise ConfigError(
                f"patch_size {size} is not supported: patches are square, and those of this model "
                f"({self.patch_size[0]}, stride {self.stride}) can only change if they do not overlap"
            )
        weight, bias = self.proj.weight, self.proj.bias
        new = PatchEmbed(self.img_size, size[0], size[0], weight.shape[1], weight.shape[0])
        with torch.no_grad():
            new.proj.to(weight)
            new.proj.weight.copy_(resample_patch_embed(weight, list(size)))
            new.proj.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        new.proj.requires_grad_(weight.requires_grad)
        return new


def is_causal_conv(conv: nn.Module) -> bool:
    """Whether a module is a plain depth-wise causal convolution, as the kernels compute it."""
    return (
        is_plain(conv, nn.Conv1d)
        and isinstance(conv, nn.Conv1d)
        and conv.groups == conv.in_channels == conv.out_channels
        and conv.padding == (conv.kernel_size[0] - 1,)
        and conv.stride == conv.dilation == (1,)
        and conv.padding_mode == "zeros"
    )


def resize_positions(
    rows: Tensor, old: tuple[int, ...], new: tuple[int, ...], own: Callable[[int], tuple[int, ...]]
) -> Tensor:
    """Resize a position embedding to another grid (bicubic); copy the rows that do not belong to patches.

    Args:
        rows: (1, P + T, D), T of the rows for other tokens.
        old: Its grid.
        new: The new grid.
        own: The rows of other tokens for a number of patches, as `Backbone.position_rows`.

    Returns:
        (1, P' + T, D).
    """
    others, places = own(math.prod(old)), own(math.prod(new))
    patches = rows[:, [at for at in range(rows.shape[1]) if at not in {*others}]]
    patches = resample_abs_pos_embed(patches, new_size=list(new), old_size=list(old), num_prefix_tokens=0)
    resized: Tensor = patches.new_empty(1, patches.shape[1] + len(places), rows.shape[2])
    resized[:, [at for at in range(resized.shape[1]) if at not in {*places}]] = patches
    resized[:, [*places]] = rows[:, [*others]].to(patches.dtype)
    return resized


def simam(x: Tensor, regulariser: float = 1e-3) -> Tensor:
    """SimAM, attention without parameters: each value times the sigmoid of its inverse energy.

    Yang et al., "SimAM: A Simple, Parameter-Free Attention Module for Convolutional Neural Networks", ICML 2021, eq. 5
    (its appendix's code divides by n - 1). SVP's released code puts it on the normalised input image of some data
    sets, by an option named input_relu.

    Args:
        x: (B, C, H, W), at least two values a channel.
        regulariser: λ of the paper.

    Returns:
        (B, C, H, W).
    """
    deviation = (x - x.mean(dim=(2, 3), keepdim=True)).square()
    variance = deviation.sum(dim=(2, 3), keepdim=True) / (x.shape[2] * x.shape[3] - 1)
    return x * torch.sigmoid(deviation / (4 * (variance + regulariser)) + 0.5)


def hidden_head(width: int, hidden: int, classes: int) -> nn.Sequential:
    """Return a head of two linear layers, width → hidden → classes, without an activation between them.

    SVP's released code has it for some data sets (384 → 192 → classes). It can express no more than one linear layer
    of that rank, and trains differently. Its parameters are `head.0.weight|bias`, `head.1.weight|bias`: width·hidden
    + hidden + hidden·classes + classes numbers. Weights start truncated normal of deviation 0.02 and biases at zero,
    as the linear head's.
    """
    head = nn.Sequential(nn.Linear(width, hidden), nn.Linear(hidden, classes))
    for name, parameter in head.named_parameters():
        if name.endswith("weight"):
            trunc_normal_(parameter, std=0.02)
        else:
            nn.init.zeros_(parameter)
    return head
