"""From a picture file to uint8 RGB at the model's size. Normalisation is not here: it belongs to the backbone.

Two choices follow the loaders that the published numbers were made with (torchvision's and MMPretrain's): transparency
is dropped, not composited (`convert("RGB")` keeps the colour that is stored under it), and the EXIF orientation is not
applied: the pixels are taken as stored.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.errors import unknown_name

__all__ = ["INTERPOLATIONS", "resize_straight", "to_rgb"]

# All of Pillow's: they average over the covered area when they shrink (antialiasing), unlike plain tensor resizes.
INTERPOLATIONS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "lanczos": Image.Resampling.LANCZOS,
}


def to_rgb(image: Image.Image) -> Image.Image:
    """Return the (first) picture as 8-bit RGB: grey, palette, CMYK, with transparency, 16-bit.

    16-bit grey keeps its high byte, as Pillow does for 16-bit colour; Pillow's own conversion would clip at 255 and so
    turn almost all of it white.

    Raises:
        ValueError: If the pixels are floating-point or wider than 16 bits: there is no agreed range to map from.
    """
    if image.mode.startswith("I"):
        wide = np.asarray(image)
        if wide.size and (wide.min() < 0 or wide.max() > 0xFFFF):
            raise ValueError(f"pixels from {wide.min()} to {wide.max()}, more than 16 bits")
        return Image.fromarray((wide >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise ValueError("floating-point pixels")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert("RGB")  # the same colours; Pillow warns about the direct way
    return image.convert("RGB")


def resize_straight(image: Image.Image, size: int, interpolation: str = "bicubic") -> npt.NDArray[np.uint8]:
    """Resize both sides to `size`, whatever the aspect ratio: no crop loses a part that the label speaks of.

    Args:
        image: An RGB picture.
        size: Height and width of the result in pixels.
        interpolation: A name of `INTERPOLATIONS`.

    Returns:
        uint8 (3, size, size), contiguous.

    Raises:
        UsageError: If the interpolation is unknown.
    """
    if interpolation not in INTERPOLATIONS:
        raise unknown_name("interpolation", interpolation, INTERPOLATIONS)
    resized = image if image.size == (size, size) else image.resize((size, size), INTERPOLATIONS[interpolation])
    return np.ascontiguousarray(np.asarray(resized, dtype=np.uint8).transpose(2, 0, 1))
