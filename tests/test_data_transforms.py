from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
from PIL import Image

from svp_bench.core.errors import UsageError
from svp_bench.data.decode import convert
from svp_bench.data.transforms import INTERPOLATIONS, resize_squash


def gradient(width: int = 8, height: int = 6) -> Image.Image:
    y, x = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([x * 20, y * 30, (x + y) * 10], axis=-1).astype(np.uint8))


def reopened(image: Image.Image, kind: str, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return Image.open(io.BytesIO(buffer.getvalue()))


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_the_result_is_pillows_resize_as_channels_first_uint8(name: str) -> None:
    image = gradient(13, 7)
    result = resize_squash(image, 5, name)
    assert result.shape == (3, 5, 5)
    assert result.dtype == np.uint8
    assert result.flags.c_contiguous
    assert np.array_equal(result.transpose(1, 2, 0), np.asarray(image.resize((5, 5), INTERPOLATIONS[name])))


def test_both_sides_are_squeezed_nothing_is_cropped() -> None:
    image = Image.new("RGB", (100, 10))
    image.paste((255, 255, 255), (0, 0, 10, 10))  # the leftmost tenth, which a centre crop would lose
    result = resize_squash(image, 50)
    assert result[0, :, 0].min() == 255
    assert result[0, :, -1].max() == 0


def test_shrinking_averages() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 254
    assert (
        np.abs(resize_squash(Image.fromarray(stripes), 8).astype(int) - 127).max() <= 8
    )  # less at the edges; picking pixels would give 127


def test_a_image_of_the_right_size_is_not_touched() -> None:
    image = gradient(6, 6)
    assert np.array_equal(resize_squash(image, 6).transpose(1, 2, 0), np.asarray(image))


def test_an_unknown_interpolation_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="unknown interpolation 'bicubik'; did you mean 'bicubic'"):
        resize_squash(gradient(), 4, "bicubik")


def test_grey_palette_and_one_bit_keep_their_colours() -> None:
    grey = gradient().convert("L")
    assert np.array_equal(np.asarray(convert(grey).image), np.repeat(np.asarray(grey)[..., None], 3, axis=-1))
    palette = gradient().quantize(256)
    assert np.array_equal(np.asarray(convert(palette).image), np.asarray(palette.convert("RGB")))
    assert np.asarray(convert(grey.convert("1")).image).max() == 255


def test_cmyk_comes_back_close_to_its_colours() -> None:
    image = gradient()
    back = np.asarray(convert(reopened(image.convert("CMYK"), "TIFF")).image)
    assert np.abs(back.astype(int) - np.asarray(image)).max() <= 1


def test_transparency_is_composited_over_white() -> None:
    image = gradient().convert("RGBA")
    image.putalpha(0)
    assert np.asarray(convert(reopened(image, "PNG")).image).min() == 255
    image.putalpha(255)
    assert np.array_equal(np.asarray(convert(reopened(image, "PNG")).image), np.asarray(gradient()))


def test_a_palette_with_transparency_makes_no_warning() -> None:
    palette = gradient().quantize(16)
    image = reopened(palette, "PNG", transparency=bytes(range(16)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.asarray(convert(image).image).min() > 230  # hardly anything is opaque


def test_16_bit_grey_keeps_its_high_byte() -> None:
    wide = (np.arange(256, dtype=np.uint16) << 8 | 0x37).reshape(16, 16)
    image = reopened(Image.fromarray(wide), "PNG")
    assert np.asarray(convert(image).image)[..., 1].reshape(-1).tolist() == list(range(256))
    as_32_bit = Image.fromarray(wide.astype(np.int32))
    assert np.array_equal(np.asarray(convert(as_32_bit).image), np.asarray(convert(image).image))


def test_pixels_without_an_agreed_range_are_refused() -> None:
    with pytest.raises(ValueError, match="pixels from -3 to 70000; add an offset"):
        convert(Image.fromarray(np.array([[-3, 70000]], np.int32)))
    for value in (np.nan, np.inf):
        with pytest.raises(ValueError, match="NaN or infinite"):
            convert(Image.fromarray(np.array([[value, 1]], np.float32)))


def test_the_exif_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter
    assert convert(reopened(gradient(8, 6), "JPEG", exif=exif)).image.size == (6, 8)


def test_to_rgb_is_the_conversion_of_single_images() -> None:
    values = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    for deep, levels, brightest in ((values, 256, 255), (values // 16, 256, 255), (values // 32 + 10, 128, 137)):
        found = np.asarray(convert(Image.fromarray(deep)).image)
        assert found.shape == (64, 64, 3)
        assert (len(np.unique(found)), found.max()) == (levels, brightest)
