"""`svp-bench predict`: runs of own methods, broken images, hostile files, and what it prints."""

from __future__ import annotations

import csv
import io
import os
import random
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Outcome, assert_error, command, run, settle, small
from PIL import Image

from svp_bench.data.decode import UnreadableImageError, decode
from svp_bench.train.checkpoint import Checkpoint

CASES = max(300, int(os.environ.get("SVP_BENCH_FUZZ", "0")) // 2)
METHOD = """\
from torch import nn
from svp_bench.methods.linear import Linear


class Mine(Linear):
    pass
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def trained(*extra: str) -> str:
    return str(run(*small(*extra)).folder / "checkpoints" / "last.ckpt")


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(text.splitlines()))


def predict(checkpoint: str, *more: str) -> Outcome:
    return command("predict", "--ckpt", checkpoint, *more)


def test_a_checkpoint_of_an_older_version_keeps_its_transform(place: Path) -> None:
    """Its metadata call the transform "view"; the protocol's would be another one."""
    outcome = run(*small("--method", "linear", "--data.transform.resize", "centre_crop"))
    path = outcome.folder / "checkpoints/last.ckpt"
    content = torch.load(path, weights_only=True)
    content["svp_bench"]["view"] = content["svp_bench"].pop("transform")
    torch.save(content, "older.ckpt")
    about = [Checkpoint.read(file).metadata for file in (path, Path("older.ckpt"))]
    assert about[0].transform == about[1].transform
    assert about[1].transform is not None
    assert about[1].transform.resize == "centre_crop"


def test_what_cannot_be_read_is_a_row_with_the_reason(place: Path) -> None:
    checkpoint = trained("--method", "linear")
    folder = place / "mixed"
    folder.mkdir()
    for number in range(3):
        shutil.copy(f"data/cifar/images/test/00000{number}.jpg", folder / f"{number}.jpg")
    shutil.copy("data/cifar/images/test/000004.jpg", folder / "browser.jfif")
    shutil.copy("data/cifar/images/test/000005.jpg", folder / "no suffix")
    (folder / "1.jpg").write_bytes((folder / "1.jpg").read_bytes()[:200])
    (folder / "page.png").write_text("<html>")
    (folder / "drawing.svg").write_text("<svg/>")
    (folder / "evil\x1b[31m[x]=.jpg").write_bytes(b"x")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.jpg").symlink_to("/dev/zero")
    outcome = predict(checkpoint, "--images", "mixed", "--output", "out.csv")
    assert outcome.status == 1
    found = {Path(row["path"]).name: row for row in rows(Path("out.csv").read_text())}
    assert {name for name, row in found.items() if not row["error"]} == {"0.jpg", "2.jpg", "browser.jfif", "no suffix"}
    assert all(row["class1"] for row in found.values() if not row["error"])
    assert "runcated" in found["1.jpg"]["error"]
    assert "no known image format" in found["page.png"]["error"]
    assert "Predicted 4 of 7 images" in outcome.out
    assert "images/s), in out.csv" in outcome.out
    assert "1 .svg" in outcome.out
    assert "2 not a regular file" in outcome.out
    assert "Could not read 3" in outcome.err
    assert "\x1b" not in outcome.out + outcome.err + Path("out.csv").read_text()


def test_success_says_so_and_keeps_standard_output_clean(place: Path) -> None:
    checkpoint = trained("--method", "linear")
    outcome = predict(checkpoint, "--images", "data/cifar/images/test")
    assert outcome.status == 0
    assert len(rows(outcome.out)) == 9
    assert list(rows(outcome.out)[0]) == ["path", "class1", "name1", "p1", "error"]
    assert "Predicted 9 of 9 images" in outcome.err
    assert "images/s" in outcome.err


def test_other_kinds_of_files_are_rows_or_refused(place: Path) -> None:
    checkpoint = trained("--method", "linear")
    os.mkfifo("pipe.png")
    Path("loop.png").symlink_to("loop.png")
    began = time.monotonic()
    outcome = predict(checkpoint, "--images", "pipe.png", "loop.png", "/dev/zero", "data/cifar/images/test/000000.jpg")
    assert outcome.status == 1
    assert ["FIFO" in rows(outcome.out)[0]["error"], "device" in rows(outcome.out)[2]["error"]] == [True, True]
    assert rows(outcome.out)[1]["error"]
    assert rows(outcome.out)[3]["class1"]
    assert "no checkpoint" in assert_error(predict("pipe.png", "--images", "data"), 2)
    assert "no image or folder 'gone'" in assert_error(predict(checkpoint, "--images", "gone"), 2)
    assert time.monotonic() - began < 30


def test_a_run_of_an_own_method_predicts_and_says_what_changed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"mine_{random.randrange(10**9)}"
    Path(f"{name}.py").write_text(METHOD)
    Path("mine.yaml").write_text(f"model: {{method: {{class_path: {name}.Mine}}}}\n")
    checkpoint = trained("--method", "mine.yaml")
    image = "data/cifar/images/test/000000.jpg"
    first = predict(checkpoint, "--images", image)
    assert first.status == 0, first.err
    assert "changed" not in first.err
    folder = Path(checkpoint).parent.parent
    (folder / "config.yaml").rename(folder / "kept.yaml")
    assert "give the method's file with --method FILE" in assert_error(predict(checkpoint, "--images", image), 2)
    assert predict(checkpoint, "--images", image, "--method", "mine.yaml").out == first.out
    (folder / "kept.yaml").rename(folder / "config.yaml")
    (folder / "method_source.json").write_text(f'{{"{name}.py": "sha256:0"}}')
    assert f"changed since the run: {name}.py" in predict(checkpoint, "--images", image).err
    import sys

    del sys.modules[name]
    Path(f"{name}.py").unlink()
    shutil.rmtree("__pycache__", ignore_errors=True)
    assert f"its method '{name}.Mine' cannot be imported" in assert_error(predict(checkpoint, "--images", image), 2)


# --- whatever an image file holds ------------------------------------------------------------------------------------


def originals() -> list[bytes]:
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (23, 31, 3), dtype=np.uint8))
    deep = Image.fromarray(rng.integers(0, 65536, (23, 31)).astype(np.uint16))
    exif = Image.Exif()
    exif[0x0112] = 6
    found = []
    for kind, one, options in (
        ("JPEG", image, {"exif": exif}),
        ("JPEG", image.convert("CMYK"), {}),
        ("PNG", image.convert("RGBA"), {"exif": exif}),
        ("PNG", deep, {}),
        ("PNG", image.quantize(16), {"transparency": 3}),
        ("GIF", image, {"save_all": True, "append_images": [image.rotate(90)]}),
        ("TIFF", image, {"compression": "tiff_lzw", "exif": exif}),
        ("TIFF", deep, {}),
        ("WEBP", image, {}),
        ("BMP", image, {}),
        ("PPM", image, {}),
        ("JPEG2000", image, {}),
        ("AVIF", image, {}),
        ("DDS", image, {}),
        ("TGA", image, {}),
        ("ICO", image, {}),
        ("PCX", image, {}),
        ("SGI", image, {}),
    ):
        buffer = io.BytesIO()
        try:
            one.save(buffer, kind, **options)
        except (KeyError, OSError):  # this Pillow cannot write it
            continue
        found.append(buffer.getvalue())
    return found


def mutated(content: bytes, rng: random.Random) -> bytes:
    raw = bytearray(content)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(min(len(raw), rng.choice([32, 200, len(raw)])))
        kind = rng.choice(["flip", "flip", "cut", "end", "put", "huge"])
        if kind == "flip":
            raw[at] ^= rng.randint(1, 255)
        elif kind == "cut":
            del raw[at : at + rng.randint(1, 40)]
        elif kind == "end":
            del raw[max(8, at) :]
        elif kind == "put":
            raw[at:at] = rng.randbytes(rng.randint(1, 16))
        else:
            raw[at : at + 4] = rng.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
        if not raw:
            return b""
    return bytes(raw)


def test_a_mutated_image_is_read_or_refused_in_one_line() -> None:
    rng, files = random.Random(0), originals()
    reasons: list[str] = []
    for number in range(CASES):
        content = mutated(files[number % len(files)], rng)
        try:
            decoded = decode(io.BytesIO(content))
        except UnreadableImageError as error:
            reasons.append(str(error))
            continue
        assert decoded.image.mode == "RGB"
    assert 0 < len(reasons) < CASES
    assert all(reason.strip() and "\n" not in reason for reason in reasons)


def test_decompression_bombs_are_refused() -> None:
    for head in (b"P6 65535 65535 255\n", b"P5 2000000000 2000000000 65535\n"):
        with pytest.raises(UnreadableImageError):
            decode(io.BytesIO(head + bytes(100)))


def test_mutated_images_are_rows(place: Path) -> None:
    checkpoint = trained("--method", "linear")
    rng, files = random.Random(1), originals()
    Path("fuzz").mkdir()
    for number in range(60):
        Path(f"fuzz/{number}.jpg").write_bytes(mutated(files[number % len(files)], rng))
    outcome = predict(checkpoint, "--images", "fuzz", "--output", "out.csv")
    assert outcome.status == 1
    assert "Traceback" not in outcome.err
    assert len(rows(Path("out.csv").read_text())) == 60
