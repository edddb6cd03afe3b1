"""From an image to uint8 RGB at the model's size. Normalisation is not here: it belongs to the backbone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.core.ranges import check_one_of, check_range

RESIZES = ("squash", "centre_crop")
CROP_RATIO = 0.875  # of timm and torchvision: 224 of 256

# All of Pillow's: they average over the covered area when they shrink (antialiasing), unlike plain tensor resizes.
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def sides(size: int | tuple[int, int]) -> tuple[int, int]:
    """Return (height, width) of a size that may be one number for both."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def resize_squash(
    image: Image.Image, size: int | tuple[int, int], interpolation: str = "bicubic"
) -> npt.NDArray[np.uint8]:
    """Resize both sides; the aspect ratio is not preserved, and no part is cropped.

    Args:
        image: An RGB image.
        size: Height and width of the result in pixels, or one number for both.
        interpolation: A name of `INTERPOLATIONS`.

    Returns:
        uint8 (3, height, width), contiguous.

    Raises:
        UsageError: If the interpolation is unknown.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown_name("interpolation", interpolation, INTERPOLATIONS)
    height, width = sides(size)
    fits = image.size == (width, height)
    return to_array(image if fits else image.resize((width, height), INTERPOLATIONS[interpolation]))


def to_array(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Return an RGB image as uint8 (3, H, W), contiguous."""
    return np.ascontiguousarray(np.asarray(image, dtype=np.uint8).transpose(2, 0, 1))


def shorter_side(size: int, crop_ratio: float) -> int:
    """Return the length of the shorter side before a crop of `size` pixels: size / crop_ratio rounded down, as timm."""
    return math.floor(size / crop_ratio)


@dataclass(frozen=True)
class TransformConfig:
    """Settings of the transform without randomness.

    Attributes:
        resize: How an image is brought to `data.image_size`: squash (both sides, the aspect ratio is lost) or
            centre_crop (shorter side to image_size / crop_ratio, then the square in the middle); null for the
            protocol's.
        interpolation: bicubic, bilinear or lanczos; null for the protocol's.
        crop_ratio: Share of the shorter side that centre_crop and the training crop `random` keep.

    Raises:
        ConfigError: If a value is not one of these.
    """

    resize: Literal["squash", "centre_crop"] | None = None
    interpolation: Literal["bicubic", "bilinear", "lanczos"] | None = None
    crop_ratio: float = CROP_RATIO

    def __post_init__(self) -> None:
        check_one_of("data.transform.resize", self.resize, RESIZES)
        check_one_of("data.transform.interpolation", self.interpolation, INTERPOLATIONS)
        check_range("data.transform.crop_ratio", self.crop_ratio, "(0, 1]")


@dataclass(frozen=True)
class EvalTransform:
    """From an RGB image to the model's size, without randomness: the transform of evaluation.

    Attributes:
        size: Height and width of the result in pixels, or one number for both.
        resize: `squash`: see `resize_squash`. `centre_crop`: the shorter side is resized to size / crop_ratio, the
            aspect ratio preserved, and the square in the middle is cut out (torchvision's Resize and CenterCrop).
        interpolation: A name of `INTERPOLATIONS`.
        crop_ratio: Share of the shorter side that a crop keeps.

    Raises:
        ConfigError: If a crop is not to be a square.
    """

    size: int | tuple[int, int]
    resize: str = "squash"
    interpolation: str = "bicubic"
    crop_ratio: float = CROP_RATIO

    def __post_init__(self) -> None:
        if self.resize == "centre_crop":
            self.side("data.transform.resize centre_crop")

    @property
    def sides(self) -> tuple[int, int]:
        """Height and width of the result in pixels."""
        return sides(self.size)

    def side(self, what: str) -> int:
        """Return the side of the square that `what` needs.

        Raises:
            ConfigError: If the result is not a square.
        """
        height, width = self.sides
        if height != width:
            raise ConfigError(
                f"{what} makes squares, and the images are {height} x {width}; use --data.transform.resize squash"
            )
        return height

    def __call__(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Return the image as uint8 (3, height, width)."""
        if self.resize == "squash":
            return resize_squash(image, self.size, self.interpolation)
        from torchvision.transforms.v2 import functional as F  # type: ignore[import-untyped]  # slow to import

        mode = F.InterpolationMode(self.interpolation)
        side = self.side("data.transform.resize centre_crop")
        resized = F.resize(image, [shorter_side(side, self.crop_ratio)], interpolation=mode)
        return to_array(F.center_crop(resized, [side, side]))
