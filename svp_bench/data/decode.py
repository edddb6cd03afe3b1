"""From the content of an image file to 8-bit RGB, with a count of every conversion.

- Formats: `FORMATS`, identified by the content, not by the name of the file. Of several frames, the first is read.
- EXIF orientation: applied, so an image is seen as a viewer shows it.
- Transparency: composited over white. What is stored under it is not seen.
- Deeper than 8 bits: see `Depth`. Negative and non-finite values are refused.
- CMYK, YCbCr, HSV and palettes as Pillow converts them; LAB is not read.
"""

from __future__ import annotations

import hashlib
import io
import math
import warnings
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError, features

from svp_bench.core.atomic import open_regular

# Not EPS and WMF, which run other programs, and not what has no mark of its own (TGA), which a text may pass for.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF")
MAX_PIXELS = 178_956_970  # Pillow's own limit: twice its `MAX_IMAGE_PIXELS`

_VERSION = 3  # a change of the pixels or notes raises it
_CODECS = ("libjpeg_turbo", "jpg", "jpg_2000", "webp", "libtiff", "avif")
_ORIENTATION = 0x0112  # of EXIF
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_OTHER_ENDIAN = {"L": "B", "B": "L", "N": "B" if np.little_endian else "L"}

warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # there is a limit, and it is checked
warnings.filterwarnings("ignore", module=r"PIL\..*")  # about metadata


class UnreadableImageError(Exception):
    """An image file cannot be decoded; the text is the reason, in one line without the path."""


@dataclass(frozen=True)
class Depth:
    """Bits that the values of deep images (more than 8 bits stored) use, to reduce them to 8.

    The bits are those of the largest value among all images of a data set, rounded up to 8, 10, 12, 14, 16 …; the
    upper 8 of them are used. So 8-bit values in a 16-bit file stay as they are, and a dark image among bright ones
    stays dark.

    Attributes:
        whole: Bits of whole numbers; None if there are none.
        real: Bits of floating-point numbers, or 0 for values of 0 to 1; None if there are none.
    """

    whole: int | None = None
    real: int | None = None

    @classmethod
    def of(cls, whole: float | None, real: float | None) -> Depth:
        """Return the depth for the largest whole and floating-point values of a data set; None if there are none."""
        return cls(None if whole is None else _bits(whole), None if real is None else 0 if real <= 1 else _bits(real))

    def filled(self, other: Depth) -> Depth:
        """Return this depth, with what it lacks from another."""
        whole = other.whole if self.whole is None else self.whole
        return Depth(whole, other.real if self.real is None else self.real)

    def notes(self, whole: int, real: int) -> dict[str, int]:
        """Return what is done to deep images → how many, for so many images with whole and with real numbers."""
        of_real = _scaling(self.real) if self.real else "values of 0 to 1 scaled to 8 bits"
        counts = {of_real: real}
        of_whole = _scaling(self.whole)
        counts[of_whole] = counts.get(of_whole, 0) + whole
        return {note: count for note, count in counts.items() if count}

    def to_bytes(self, values: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return values scaled to 0..255; those above the depth become 255."""
        if values.dtype.kind == "f" and self.real == 0:
            scaled = np.rint(values * 255)
        else:
            bits = (self.real if values.dtype.kind == "f" else self.whole) or 8
            scaled = np.floor(values / 2 ** (bits - 8)) if values.dtype.kind == "f" else values >> (bits - 8)
        small: npt.NDArray[np.uint8] = np.minimum(scaled, 255).astype(np.uint8)
        return small


def _scaling(bits: int | None) -> str:
    return "8-bit values in a deeper format" if bits == 8 else f"{bits}-bit values scaled to 8 bits"


def _bits(value: float) -> int:
    bits = max(8, int(value).bit_length())
    return bits + bits % 2


@dataclass(frozen=True)
class Decoded:
    """An image file, decoded.

    Attributes:
        image: 8-bit RGB.
        notes: What was done to it beyond copying, e.g. "rotated by EXIF".
        whole: The largest value, if whole numbers of more than 8 bits are stored.
        real: The largest value, if floating-point numbers are stored.
        digest: BLAKE2b (16 bytes) of size and pixels; of a deep image before it was scaled.
    """

    image: Image.Image
    notes: tuple[str, ...]
    whole: float | None
    real: float | None
    digest: bytes

    @property
    def is_deep(self) -> bool:
        """Whether more than 8 bits are stored, so that the 8-bit image follows from the depth of the data set."""
        return self.whole is not None or self.real is not None

    def without_pixels(self) -> Decoded:
        """Return the same with an image of one pixel: those of a data set would not fit into memory."""
        return replace(self, image=_NO_IMAGE)


_NO_IMAGE = Image.new("RGB", (1, 1))


@lru_cache(maxsize=1)
def decoder_version() -> str:
    """Return what identifies this module, Pillow and its codecs: others may decode a file to other pixels."""
    versions = " ".join(f"{name} {features.version(name)}" for name in ("pil", *_CODECS))
    return f"v{_VERSION}-{hashlib.sha256(versions.encode()).hexdigest()[:8]}"


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)  # Pillow may be built without some


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "no known image format"
    if isinstance(error, MemoryError):
        return "needs more memory than there is"
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split())[:200] or type(error).__name__


def identify(path: Path | str) -> str | None:
    """Return the format of an image file by its content; None if it is none of `FORMATS`.

    Raises:
        OSError: If the file cannot be opened.
    """
    with open_regular(path) as file:
        try:
            with Image.open(file, formats=_formats()) as image:
                return image.format
        except Exception:  # Pillow's readers raise a dozen kinds for other files
            return None


def read_image(path: Path | str, depth: Depth | None = None) -> Decoded:
    """Decode an image file.

    Args:
        path: The file.
        depth: Of the data set that it belongs to; its own by default.

    Raises:
        FileNotFoundError: If it is missing.
        NotADirectoryError: If its path leads through a file.
        UnreadableImageError: If it cannot be read or decoded, for any error of the decoder.
    """
    try:
        with open_regular(path) as file:
            return decode(file, depth)
    except (FileNotFoundError, NotADirectoryError, UnreadableImageError):
        raise
    except OSError as error:
        raise UnreadableImageError(_reason(error)) from None


def decode(file: BinaryIO, depth: Depth | None = None) -> Decoded:
    """Decode the content of an image file: see `read_image`.

    Raises:
        UnreadableImageError: If it cannot be decoded.
    """
    try:
        if not file.read(1):
            raise UnreadableImageError("an empty file")
        file.seek(0)
        with Image.open(file, formats=_formats()) as image:
            return convert(image, depth, file)
    except UnreadableImageError:
        raise
    except Exception as error:  # Pillow's decoders raise a dozen kinds for broken files
        raise UnreadableImageError(_reason(error)) from None


def convert(image: Image.Image, depth: Depth | None = None, file: BinaryIO | None = None) -> Decoded:
    """Convert an opened image to 8-bit RGB.

    Args:
        image: It; of several frames, the first is taken.
        depth: Of the data set that it belongs to; its own by default.
        file: Where it comes from; without it, 16-bit colour keeps its upper 8 bits.

    Raises:
        ValueError: If its pixels are negative or not finite, or there are too many.
        Exception: What Pillow raises while it decodes.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
    notes: list[str] = []
    low = None if file is None else _low_bytes(image, file)
    turn = _orientation(image) if image.format == "TIFF" else 1  # which Pillow applies by itself, when it loads them
    image.load()
    if _is_animated(image):
        notes.append("first of several frames")
    deep = _deep_values(image, low)
    whole = real = None
    if deep is None:
        rgb, composited = _to_rgb(image, notes)
    else:
        largest = _largest(deep[..., :-1] if image.mode == "RGBA" else deep)  # without alpha
        whole, real = (None, largest) if deep.dtype.kind == "f" else (largest, None)
        depth = (depth or Depth()).filled(Depth.of(whole, real))
        bits = depth.real if deep.dtype.kind == "f" else depth.whole
        if largest > (1 if bits == 0 else 2 ** (bits or 8) - 1):
            notes.append("values above the depth of the data set clipped")
        rgb, composited = _composed(image, depth.to_bytes(deep), deep)
    if composited:
        notes.append("composited over white")
    if (left := _orientation(image)) in _TURNS:
        rgb = rgb.transpose(_TURNS[left])
    if turn in _TURNS or left in _TURNS:
        notes.append("rotated by EXIF")
    form = f"{rgb.size}" if deep is None else f"{deep.shape} {deep.dtype}"
    hasher = hashlib.blake2b(form.encode(), digest_size=16)
    hasher.update(rgb.tobytes() if deep is None else np.ascontiguousarray(deep).tobytes())
    return Decoded(rgb, tuple(notes), whole, real, hasher.digest())


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except Exception:  # broken metadata; the pixels may be whole
        return 1


def _is_animated(image: Image.Image) -> bool:
    if image.format == "MPO":  # a photo with previews
        return False
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a broken second frame; the first may be whole
        return True


# --- transparency and colour -----------------------------------------------------------------------------------------


def _to_rgb(image: Image.Image, notes: list[str]) -> tuple[Image.Image, bool]:
    """Return an image of at most 8 bits as RGB, and whether something shone through."""
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        if image.mode == "La":
            image = image.convert("LA")
        return _over_white(image.convert("RGBA"))
    if image.mode == "LAB":
        raise ValueError("LAB colours; convert the file to RGB")
    if image.mode in ("CMYK", "HSV") or (image.mode == "YCbCr" and image.format != "JPEG"):
        notes.append(f"converted from {image.mode}")
    return image.convert("RGB"), False


def _over_white(image: Image.Image) -> tuple[Image.Image, bool]:
    if image.getchannel("A").getextrema() == (255, 255):
        return image.convert("RGB"), False
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB"), True


# --- more than 8 bits ------------------------------------------------------------------------------------------------


def _largest(values: npt.NDArray[Any]) -> float:
    """Return the largest value; ValueError if one is negative or not finite."""
    if not values.size:
        return 0
    least, largest = float(values.min()), float(values.max())
    if not math.isfinite(least) or not math.isfinite(largest):
        raise ValueError("pixels that are NaN or infinite")
    if least < 0:
        raise ValueError(f"pixels from {least:g} to {largest:g}; add an offset, so that none is negative")
    return largest


def _deep_values(image: Image.Image, low: Image.Image | None) -> npt.NDArray[Any] | None:
    """Return the values of a loaded image that stores more than 8 bits: (H, W), or (H, W, channels); else None."""
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(np.uint16)
    if image.mode == "I":
        return np.asarray(image).astype(np.int64)  # Pillow reads 32-bit files without sign as with one
    if image.mode == "F":
        return np.asarray(image)
    if low is not None:
        low.load()
        colour: npt.NDArray[np.uint16] = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
        return colour
    return None


def _low_bytes(image: Image.Image, file: BinaryIO) -> Image.Image | None:
    """Return the same file opened to yield the lower bytes of 16-bit colour; None for all other images.

    Pillow reads the upper bytes.
    """
    tiles = getattr(image, "tile", None)
    if not tiles or image.mode not in ("RGB", "RGBA") or image.format not in ("PNG", "TIFF"):
        return None
    rawmode = _rawmode(tiles[0])
    if ";16" not in rawmode:
        return None
    place = file.tell()
    file.seek(0)
    content = file.read()
    file.seek(place)
    other = Image.open(io.BytesIO(content), formats=(str(image.format),))
    if rawmode.startswith("LA;"):  # grey and alpha of two bytes each, read here as four channels
        other.tile = [_with_rawmode(tile, "RGBA") for tile in other.tile]
        _, grey, _, alpha = other.split()
        return Image.merge("RGBA", (grey, grey, grey, alpha))
    swapped = rawmode[:-1] + _OTHER_ENDIAN[rawmode[-1]]
    other.tile = [_with_rawmode(tile, swapped) for tile in other.tile]
    return other


def _rawmode(tile: Any) -> str:
    arguments = tile[3]
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _with_rawmode(tile: Any, rawmode: str) -> Any:
    arguments = tile[3]
    changed = (rawmode, *arguments[1:]) if isinstance(arguments, tuple) else rawmode
    return type(tile)(*tile[:3], changed) if hasattr(tile, "_fields") else (*tile[:3], changed)


def _composed(image: Image.Image, scaled: npt.NDArray[np.uint8], deep: npt.NDArray[Any]) -> tuple[Image.Image, bool]:
    """Return the scaled values as RGB over white, and whether something shone through."""
    if image.mode == "RGBA":  # alpha is not scaled by the range of the colours
        scaled[..., -1] = deep[..., -1] >> 8
        return _over_white(Image.fromarray(scaled))
    key = image.info.get("transparency")
    grey = scaled.ndim == 2
    rgb = Image.fromarray(scaled).convert("RGB")
    if not isinstance(key, (int, tuple)):
        return rgb, False
    hidden = deep == key if grey else (deep == np.asarray(key)).all(axis=-1)
    if not hidden.any():
        return rgb, False
    rgb.paste((255, 255, 255), mask=Image.fromarray((hidden * np.uint8(255)).astype(np.uint8)))
    return rgb, True
