"""Prompts in the pixels: a trained frame or patch (VP), and a trained border around a smaller image (AutoVP)."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method, check_setting
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES
from svp_bench.ops import no_autocast

FRAME = 30 / 224  # of the side of an image, Bahng et al.
SIDE = 128 / 224  # of an image at scale 1, Tsao et al.


def frame_width(method: str, width: int | None, size: tuple[int, int]) -> int:
    """Return the width of a frame in pixels; None: 30 of 224 pixels in proportion to the shorter side.

    Raises:
        ConfigError: If the frame leaves no pixel of the image free.
    """
    width = max(1, round(FRAME * min(size))) if width is None else width
    if 2 * width >= min(size):
        most = (min(size) - 1) // 2
        raise ConfigError(f"{method}: width must be at most {most} for {size[0]}x{size[1]} images, not {width}")
    return width


def frame_pixels(size: tuple[int, int], width: int) -> int:
    """Return the number of pixels of a frame."""
    return size[0] * size[1] - (size[0] - 2 * width) * (size[1] - 2 * width)


def frame(delta: Tensor, size: tuple[int, int], width: int) -> Tensor:
    """Return the frame (…, 3, H, W), zero inside, of its pixels (…, 3, n): upper and lower rows, then left and right.

    Args:
        delta: The pixels, n of `frame_pixels`.
        size: Height H and width W of the image.
        width: Of the frame.
    """
    rows, inner, free = width * size[1], size[0] - 2 * width, size[1] - 2 * width
    above, below, left, right = torch.split(delta, [rows, rows, inner * width, inner * width], dim=-1)
    left, right = (part.reshape(*part.shape[:-1], inner, width) for part in (left, right))
    middle = torch.cat([left, left.new_zeros(*left.shape[:-1], free), right], dim=-1)
    above, below = (part.reshape(*part.shape[:-1], width, size[1]) for part in (above, below))
    return torch.cat([above, middle, below], dim=-2)


def _check_side(method: str, name: str, value: int, model: Backbone) -> None:
    height, width = model.image_size
    if value > min(height, width):
        raise ConfigError(
            f"{method}: {name} must be at most {min(height, width)} for {height}x{width} images, not {value}"
        )


class _Pixels(Method):
    identity_at_start = False

    def decays(self, name: str) -> bool:
        """Whether weight decay applies: to the head alone, since the pixels are published without."""
        return name.startswith(HEAD_PREFIXES)


class VP(_Pixels):
    """A trained prompt that is added to pixels of the normalised image: x + δ on a frame, or on a patch.

    Bahng et al., "Exploring Visual Prompts for Adapting Large-Scale Models", arXiv:2203.17274, on a frame of 30 pixels
    of 224. δ starts from N(0, 1). Their variant with a patch at a random position is left out. Published rows train δ
    alone, by SGD with learning rate 40, and read classes of the pre-trained head; here the head trains too, as in the
    table of SVP (Yao et al., AAAI 2025, arXiv:2412.08947).

    Trained parameters without the head: 3 (H W − (H − 2 w) (W − 2 w)) for images of H × W and a frame of width w,
    69,840 at 224 pixels; 3 w² for a patch.

    Args:
        shape: frame, or patch: a square in the upper left corner.
        width: Of the frame, or side of the patch, in pixels; null: 30 of 224 in proportion to the shorter side.
    """

    def __init__(self, shape: Literal["frame", "patch"] = "frame", width: int | None = None) -> None:
        check_setting("vp", "shape", shape, ("frame", "patch"))
        if width is not None:
            check_setting("vp", "width", width, 1)
        self.shape = shape
        self.width = width

    def attach(self, model: Backbone) -> None:
        """Build `adapter.delta`, the pixels of the prompt, and add it to the images.

        Raises:
            ConfigError: If the frame or the patch does not fit into the image.
        """
        model.adapter = prompt = _Prompt(self, model)
        model.points.on_images(prompt.add)

    def side(self, model: Backbone) -> int:
        """Return the width of the frame, or the side of the patch, in pixels."""
        if self.shape == "frame" or self.width is None:
            return frame_width("vp", self.width, model.image_size)
        _check_side("vp", "width", self.width, model)
        return self.width

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 3 for each pixel of the frame or the patch."""
        side = self.side(model)
        return model.in_chans * (frame_pixels(model.image_size, side) if self.shape == "frame" else side**2)


class _Prompt(nn.Module):
    def __init__(self, vp: VP, model: Backbone) -> None:
        super().__init__()
        self.size, self.width, self.framed = model.image_size, vp.side(model), vp.shape == "frame"
        pixels = frame_pixels(self.size, self.width) if self.framed else self.width**2
        self.delta = nn.Parameter(torch.randn(model.in_chans, pixels))

    def add(self, images: Tensor) -> Tensor:
        (height, width), side = self.size, self.width
        if self.framed:
            prompt = frame(self.delta, self.size, side)
        else:
            prompt = F.pad(self.delta.view(-1, side, side), (0, width - side, 0, height - side))
        return images + prompt.to(images.dtype)


class AutoVP(_Pixels):
    """A smaller image in a trained border: the image resized by a trained scale, sigmoid(δ) around it.

    Tsao et al., "AutoVP: An Automated Visual Prompting Framework and Benchmark", ICLR 2024, arXiv:2310.08381. The image
    takes a share s · 128 / 224 of each side, in the middle, s the scale; the other pixels, in 0…1 before normalisation,
    are sigmoid(δ). δ starts at zero, a grey border. The gradient of s comes from the resized image alone: the border is
    cut at whole pixels, as released. Theirs also chooses between initial scales, and between four mappings of classes,
    by a search; here the scale is a setting, and the head trains. They resize the original image; here it is the image
    of the data, with a triangle filter. A model without `pretrained_cfg` is taken to have ImageNet's normalisation.

    Trained parameters without the head: 3 H W + 1 for images of H × W, 3 H W with a fixed scale. At 224 pixels 150,528
    are stored for the border, and 101,376 have an effect at scale 1.

    Args:
        scale: Initial scale; 0.5, 1 and 1.5 are published.
        train_scale: Train the scale, limited to 0.1…5; false: it is fixed.
        side: Side of the image at scale 1, in pixels of the shorter side; null: 128 of 224.
    """

    def __init__(self, scale: float = 1.0, train_scale: bool = True, side: int | None = None) -> None:
        if not 0.1 <= scale <= 5:
            raise ConfigError(f"auto_vp: scale must be in [0.1, 5], not {scale}")
        if side is not None:
            check_setting("auto_vp", "side", side, 1)
        self.scale = scale
        self.train_scale = train_scale
        self.side = side

    def attach(self, model: Backbone) -> None:
        """Build `adapter.delta` and `adapter.scale`, and pass the images through them.

        Raises:
            ConfigError: If the image at scale 1 is larger than the input, or covers all of it at a fixed scale.
        """
        if self.side is not None:
            _check_side("auto_vp", "side", self.side, model)
        model.adapter = border = _Border(self, model)
        if not self.train_scale and self.scale * border.share >= 1:
            raise ConfigError(f"auto_vp: at the fixed scale {self.scale} the image leaves no border; use a smaller one")
        model.points.on_images(border.surround)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return 3 for each pixel of the image, and one for a trained scale."""
        height, width = model.image_size
        return model.in_chans * height * width + int(self.train_scale)


class _Border(nn.Module):
    def __init__(self, auto_vp: AutoVP, model: Backbone) -> None:
        super().__init__()
        cfg: Any = getattr(model, "pretrained_cfg", None) or {}
        self.size = model.image_size
        self.share = SIDE if auto_vp.side is None else auto_vp.side / min(self.size)
        self.delta = nn.Parameter(torch.zeros(model.in_chans, *self.size))
        scale = torch.tensor(float(auto_vp.scale))
        if auto_vp.train_scale:
            self.scale = nn.Parameter(scale)
        else:
            self.register_buffer("scale", scale, persistent=False)
        mean, std = cfg.get("mean", IMAGENET_DEFAULT_MEAN), cfg.get("std", IMAGENET_DEFAULT_STD)
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)

    def surround(self, images: Tensor) -> Tensor:
        with no_autocast(images):
            wide = torch.promote_types(images.dtype, torch.float32)
            share = self.share * self.scale.to(wide).clamp(0.1, 5)
            rows, columns = (_triangles(side, share) for side in self.size)
            resized = rows @ images.to(wide) @ columns.T
            border = (self.delta.to(wide).sigmoid() - self.get_buffer("mean")) / self.get_buffer("std")
            inside = _inside(self.size[0], share)[:, None] & _inside(self.size[1], share)
            return torch.where(inside, resized, border).to(images.dtype)


def _centres(side: int, like: Tensor) -> Tensor:
    """Return the positions of the pixels of a side, from −1 to 1."""
    return (2 * torch.arange(side, device=like.device, dtype=like.dtype) + 1) / side - 1


def _inside(side: int, share: Tensor) -> Tensor:
    return _centres(side, share).abs() < share


def _triangles(side: int, share: Tensor) -> Tensor:
    """Return the weights (side, side) that resize a side to a share of it, in the middle: bilinear, antialiased."""
    pixels = torch.arange(side, device=share.device, dtype=share.dtype)
    source = ((_centres(side, share) / share + 1) * side - 1) / 2
    weights = (1 - (source[:, None] - pixels).abs() * share.clamp(max=1)).relu()
    return weights / weights.sum(dim=1, keepdim=True).clamp(min=1e-6)
