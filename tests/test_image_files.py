"""Image files of all kinds: what is read, how it is converted, and that all of it is counted, named and recorded."""

from __future__ import annotations

import io
import os
import shutil
import struct
import unicodedata
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_error, command, run, settle, small
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from svp_bench.data.content import differences_from_first_use, joined, two_labels
from svp_bench.data.decode import Decoded, Depth, UnreadableImageError, decode, identify
from svp_bench.data.sources import ArrayImages

Array = np.ndarray[Any, Any]
FIT = (
    *("fit", "--config", "configs/custom/images.yaml", "--method", "linear", "--data.image_size", "64"),
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "embedded", "--data.num_workers", "0"),
    *("--trainer.max_epochs", "1", "--data.batch_size", "8", "--trainer.accelerator", "cpu", "--data.root", "own"),
)


def noise(channels: int = 3, top: int = 256, seed: int = 0) -> Array:
    """Return values below `top`, which occurs less one: (6, 10, channels), or (6, 10) for 0 channels."""
    shape = (6, 10, channels) if channels else (6, 10)
    values = np.random.default_rng(seed).integers(0, top, shape)
    values[0, 0] = top - 1
    return values


def make_image(seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(seed=seed).astype(np.uint8))


def deep(top: int) -> Image.Image:
    return Image.fromarray(noise(0, top).astype(np.uint16))


def saved(image: Image.Image, kind: str, **options: Any) -> io.BytesIO:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    buffer.seek(0)
    return buffer


def pixels(content: io.BytesIO | Decoded, depth: Depth | None = None) -> Array:
    decoded = content if isinstance(content, Decoded) else decode(content, depth)
    assert decoded.image.mode == "RGB"
    return np.asarray(decoded.image)


def png_of_16_bit_colour(values: Array, kind: int) -> io.BytesIO:
    """Write what Pillow cannot: a PNG file of 16-bit colour (2), grey and alpha (4), or colour and alpha (6)."""
    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0))
    return io.BytesIO(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


# --- depth -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
@pytest.mark.parametrize(("top", "bits"), [(256, 8), (1024, 10), (4096, 12), (16384, 14), (65536, 16)])
def test_deep_grey_keeps_the_upper_eight_of_the_bits_in_use(kind: str, top: int, bits: int) -> None:
    decoded = decode(saved(deep(top), kind))
    assert decoded.whole == top - 1
    assert Depth.of(decoded.whole, None) == Depth(bits)
    assert np.array_equal(pixels(decoded)[..., 1], noise(0, top) >> (bits - 8))


@pytest.mark.parametrize(("kind", "channels"), [(2, 3), (4, 2), (6, 4)])
@pytest.mark.parametrize(("top", "bits"), [(256, 8), (4096, 12), (65536, 16)])
def test_deep_colour_too(kind: int, channels: int, top: int, bits: int) -> None:
    values = noise(channels, top)
    if channels % 2 == 0:
        values[..., -1] = 65535
    colour = values[..., :3] if channels > 2 else np.repeat(values[..., :1], 3, axis=-1)
    assert np.array_equal(pixels(png_of_16_bit_colour(values, kind)), colour >> (bits - 8))


def test_alpha_is_not_scaled_by_the_range_of_the_colours() -> None:
    values = np.full((2, 2, 4), 200)
    values[..., 3] = 65535
    values[0, 0, 3] = 0
    seen = pixels(png_of_16_bit_colour(values, 6))
    assert seen[0, 0].tolist() == [255, 255, 255]
    assert seen[1, 1].tolist() == [200, 200, 200]


def test_a_dark_image_among_bright_ones_stays_dark() -> None:
    dark = saved(deep(200), "PNG")
    assert pixels(dark).max() == 199
    dark.seek(0)
    assert pixels(dark, Depth.of(65000, None)).max() == 0
    decoded = decode(saved(deep(6000), "PNG"), Depth(12))
    assert pixels(decoded).max() == 255
    assert "values above the depth of the data set clipped" in decoded.notes


def test_floating_point_and_32_bit_files() -> None:
    unit = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    assert np.array_equal(pixels(saved(Image.fromarray(unit), "TIFF"))[..., 0], np.rint(unit * 255))
    assert np.array_equal(pixels(saved(Image.fromarray(unit * 255), "TIFF"))[..., 0], np.floor(unit * 255))
    wide = np.array([[0, 2**20 - 1]], np.int32)
    assert pixels(saved(Image.fromarray(wide), "TIFF"))[0, :, 0].tolist() == [0, 255]
    for odd in (np.array([[-1, 5]], np.int32), np.array([[np.nan, 1]], np.float32), np.array([[-1, 1]], np.float32)):
        with pytest.raises(UnreadableImageError, match=r"add an offset|NaN or infinite"):
            decode(saved(Image.fromarray(odd), "TIFF"))


# --- orientation, transparency, colour, frames -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_every_orientation_is_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = saved(make_image(), kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))
    decoded = decode(content)
    content.seek(0)
    with Image.open(content) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    assert np.array_equal(pixels(decoded), np.asarray(expected))
    assert ("rotated by EXIF" in decoded.notes) == (orientation in range(2, 9))


def test_broken_exif_does_not_hide_a_whole_image() -> None:
    content = saved(make_image(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff" + bytes(20))
    assert pixels(content).shape == (6, 10, 3)


def test_transparent_pixels_are_white() -> None:
    for mode in ("RGBA", "LA"):
        image = make_image().convert(mode)
        image.putalpha(0)
        decoded = decode(saved(image, "PNG"))
        assert pixels(decoded).min() == 255
        assert decoded.notes == ("composited over white",)
        image.putalpha(255)
        decoded = decode(saved(image, "PNG"))
        assert decoded.notes == ()
        assert np.array_equal(pixels(decoded), np.asarray(image.convert("RGB")))
    half = pixels(saved(Image.new("RGBA", (1, 1), (0, 100, 255, 128)), "PNG"))[0, 0]
    assert np.abs(half.astype(int) - np.array([127, 177, 255])).max() <= 1


@pytest.mark.parametrize("mode", ["P", "L", "RGB", "1", "I;16"])
def test_a_transparent_colour_is_white(mode: str) -> None:
    image = deep(4096) if mode == "I;16" else make_image().quantize(16) if mode == "P" else make_image().convert(mode)
    key = image.getpixel((3, 3))
    decoded = decode(saved(image, "PNG", transparency=1 if mode == "1" and key else key))
    assert pixels(decoded)[3, 3].tolist() == [255, 255, 255]
    if mode != "1":
        assert "composited over white" in decoded.notes


def test_a_palette_with_an_alpha_for_each_colour() -> None:
    image = make_image().quantize(16)
    assert pixels(saved(image, "PNG", transparency=bytes(16))).min() == 255
    opaque = saved(image, "PNG", transparency=bytes([255] * 16))
    assert np.array_equal(pixels(opaque), np.asarray(image.convert("RGB")))


def test_other_colour_spaces() -> None:
    colour = Image.new("RGB", (4, 4), (200, 100, 50))
    for content, note in (
        (saved(colour.convert("CMYK"), "TIFF"), "converted from CMYK"),
        (saved(colour.convert("CMYK"), "JPEG", quality=100), "converted from CMYK"),
        (saved(colour.convert("YCbCr"), "TIFF"), "converted from YCbCr"),
    ):
        decoded = decode(content)
        assert decoded.notes == (note,)
        assert np.abs(pixels(decoded)[0, 0].astype(int) - [200, 100, 50]).max() <= 3
    with pytest.raises(UnreadableImageError, match="LAB"):
        decode(saved(Image.new("LAB", (4, 4)), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_is_read(kind: str) -> None:
    options = {"lossless": True} if kind == "WEBP" else {}
    decoded = decode(saved(make_image(0), kind, save_all=True, append_images=[make_image(1)], **options))
    assert "first of several frames" in decoded.notes
    single = decode(saved(make_image(0), kind, **options))
    assert np.array_equal(pixels(decoded), pixels(single))
    assert single.notes == ()


@given(seed=st.integers(0, 1000), kind=st.sampled_from(["JPEG", "PNG", "BMP", "PPM"]), grey=st.booleans())
@settings(max_examples=40, deadline=None)
def test_ordinary_images_are_what_pillow_reads(seed: int, kind: str, grey: bool) -> None:
    content = saved(make_image(seed).convert("L") if grey else make_image(seed), kind)
    decoded = decode(content)
    assert decoded.notes == ()
    content.seek(0)
    with Image.open(content) as plain:
        assert np.array_equal(pixels(decoded), np.asarray(plain.convert("RGB")))


@pytest.mark.parametrize(
    ("kind", "is_read"), [("JPEG", True), ("GIF", True), ("TGA", False), ("DDS", False), ("PCX", False)]
)
def test_formats_are_identified_by_content(kind: str, is_read: bool, tmp_path: Path) -> None:
    make_image().save(tmp_path / "image.txt", kind)
    assert (identify(tmp_path / "image.txt") == kind) == is_read


# --- through fit -----------------------------------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(6):
            make_image(10 * label + number).save(tmp_path / "own" / name / f"{number}.png")
    return tmp_path / "own"


def test_every_skipped_and_converted_file_is_counted_named_and_recorded(own: Path) -> None:
    cat, dog = own / "cat", own / "dog"
    make_image(50).save(cat / "windows.jfif", "JPEG")
    make_image(51).save(cat / "no suffix", "PNG")
    make_image(52).save(cat / "odd.xyz", "WEBP")
    exif = Image.Exif()
    exif[0x0112] = 6
    make_image(53).save(cat / "phone.jpeg", exif=exif)
    clear = make_image(54).convert("RGBA")
    clear.putalpha(100)
    clear.save(cat / "stamp.png")
    deep(4096).save(cat / "x-ray.png")
    for path in (cat / "a.svg", cat / "b.heic", cat / "c.heic", dog / "Thumbs.db", dog / ".DS_Store", dog / "README"):
        path.write_text("no image")
    (dog / "evil\x1b[31m[x].txt").write_text("x")
    os.mkfifo(dog / "pipe.jpg")
    outcome = run(*FIT)
    notes = outcome.record["image_notes"]
    assert {note: count for note, count in notes.items() if note.startswith("skipped")} == {
        "skipped: .db": 1,
        "skipped: .heic": 2,
        "skipped: .svg": 1,
        "skipped: .txt": 1,
        "skipped: hidden file": 1,
        "skipped: no ending": 1,
        "skipped: not a regular file": 1,
    }
    assert {note: count for note, count in notes.items() if not note.startswith("skipped")} == {
        "12-bit values scaled to 8 bits": 1,
        "composited over white": 1,
        "rotated by EXIF": 1,
    }
    (warned,) = [text for text in outcome.warnings if "skipped: .heic (2)" in text]
    assert "\x1b" not in warned
    assert "Thumbs.db" in warned
    assert set(outcome.record["content_digests"]) == {"trainval", "test"}
    assert f"test {outcome.record['content_digests']['test'][7:19]}" in outcome.out
    checkpoint = str(outcome.folder / "checkpoints" / "last.ckpt")
    predicted = run("predict", "--ckpt", checkpoint, "--images", "own/cat")
    assert len(predicted.out.splitlines()) == 1 + 6 + 6


def test_all_broken_images_are_named_at_once(own: Path) -> None:
    for name in ("cat/0.png", "cat/4.png", "dog/2.png"):
        path = own / name
        path.write_bytes(path.read_bytes()[:60])
    (own / "dog" / "page.jpg").write_text("<html>404</html>")
    line = assert_error(command(*FIT), 1)
    for name in ("cat/0.png", "cat/4.png", "dog/2.png", "dog/page.jpg"):
        assert f"{own / name}: not a readable image" in line
    assert not (own.parent / "runs").exists()


def test_a_class_may_be_spelled_in_two_ways_but_not_in_one_folder(own: Path) -> None:
    for part, form, seed in (("train", "NFC", 100), ("test", "NFD", 200)):
        for label, name in enumerate((unicodedata.normalize(form, "café"), "dog")):
            folder = own.parent / "two" / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                make_image(seed + 10 * label + number).save(folder / f"{number}.png")
    fit = (*FIT[:-1], "two")
    assert run(*fit).record["metrics"]["count"] == 8
    folder = own.parent / "two" / "train" / unicodedata.normalize("NFD", "café")
    folder.mkdir()
    assert "differ only in case or in how accents are spelled" in assert_error(command(*fit), 1)
    folder.rmdir()
    (own.parent / "two" / "train" / "DOG").mkdir()
    assert "'DOG' and 'dog'" in assert_error(command(*fit), 1)


# --- content ---------------------------------------------------------------------------------------------------------


def test_own_images_with_the_pixels_of_test_images_are_refused_unless_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for part, seed in (("train", 0), ("test", 100)):
        for label, name in enumerate(("cat", "dog")):
            Path("own", part, name).mkdir(parents=True)
            for number in range(5):
                make_image(seed + 10 * label + number).save(Path("own", part, name, f"{number}.png"))
    with Image.open("own/test/cat/3.png") as image:
        image.save("own/train/cat/copy.bmp")  # another file, the same pixels
    line = assert_error(command(*FIT), 1)
    for words in (
        "1 of the 10 images of test have the same pixels",
        "test/cat/3.png",
        "copy.bmp",
        "allow_overlap true",
    ):
        assert words in line
    record = run(*FIT, "--data.allow_overlap", "true").record
    assert record["data_status"] == "different"
    assert record["image_notes"]["images of test that are also in trainval"] == 1


@pytest.mark.parametrize("kind", ["copy", "hard link", "symbolic link", "another format"])
def test_a_training_image_that_is_a_test_image_marks_the_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    train, test = (Path("data/cifar/images", name, "000003.jpg") for name in ("train800val200", "test"))
    train.unlink()
    if kind == "copy":
        shutil.copy(test, train)
    elif kind == "hard link":
        os.link(test, train)
    elif kind == "symbolic link":
        train.symlink_to(test.resolve())
    else:
        with Image.open(test) as image:
            image.save(train, "PNG")
    record = run(*small("--method", "linear")).record
    assert record["data_status"] == "different"
    assert any("have the same pixels as images of train800val200" in note for note in record["data_notes"])
    assert record["image_notes"]["images of test that are also in train800val200"] == 1


def test_other_pixels_than_in_the_first_run_are_reported(tmp_path: Path) -> None:
    path = tmp_path / "content" / "x.json"
    assert differences_from_first_use(path, {"train": "sha256:a", "test": "sha256:b"}) == []
    assert differences_from_first_use(path, {"test": "sha256:b", "val": "sha256:c"}) == []
    (note,) = differences_from_first_use(path, {"test": "sha256:x", "val": "sha256:c"})
    assert "the pixels of test are not those of the first run here" in note


def test_refit_is_train_and_val_by_content() -> None:
    values, labels = noise(0).astype(np.uint8).reshape(10, 2, 3), np.arange(10) % 2

    def part(name: str, positions: list[int], shift: int = 0) -> Any:
        images = ArrayImages(name, values, (labels + shift) % 2, np.array(positions))
        return images, images.examine()

    train, val = part("train", [0, 1, 2]), part("val", [3, 4])
    assert joined(part("refit", [4, 3, 2, 1, 0]), train, val) is None
    assert "1 are only in refit, 1 only in train and val" in str(joined(part("refit", [0, 1, 2, 3, 5]), train, val))
    assert "5 are only in refit" in str(joined(part("refit", [0, 1, 2, 3, 4], 1), train, val))
    values[1] = values[0]
    assert two_labels(part("train", [0, 1, 2])) == [(1, 0)]
