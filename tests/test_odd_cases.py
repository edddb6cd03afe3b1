"""Runs that are unusual and right: other image sizes, odd images and labels, odd places, two at once."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import BACKBONE, assert_error, command, draw, run, settle
from helpers import small as line
from PIL import Image

from svp_bench.records.store import read_records


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def lists(name: str) -> Path:
    (path,) = Path("data").rglob(f"{name}.txt")
    return path


@pytest.mark.parametrize("side", ["8", "24", "40", "64"])
def test_images_of_another_size(place: Path, side: str) -> None:
    record = run(*line(data__image_size=side)).record
    assert record["status"] == "complete"
    assert record["config"]["data"]["image_size"] == int(side)


def test_images_that_are_no_squares(place: Path) -> None:
    """32 high and 48 wide: 4 × 6 patches, for training, test and the images that a run predicts."""
    outcome = run(*line(data__image_size="[32, 48]"))
    assert outcome.record["config"]["data"]["image_size"] == [32, 48]
    shown = run("predict", "--ckpt", str(outcome.folder / "checkpoints/last.ckpt"), "--images", "data/cifar/images")
    assert shown.status == 0
    for flags in (("--data.transform.resize", "centre_crop"), ("--data.augment.crop", "random_resized")):
        text = assert_error(command(*line(*flags, data__image_size="[32, 48]")), 2)
        assert "makes squares, and the images are 32 x 48; use --data.transform.resize squash" in text


def test_images_that_patches_do_not_cover(place: Path) -> None:
    for size, near in (("33", "32 or 40"), ("[32, 44]", "40 or 48")):
        text = assert_error(command(*line(data__image_size=size)), 2)
        assert f"is not covered by the patches of {BACKBONE}; {near} would fit" in text
    text = assert_error(command(*line(data__image_size="7")), 2)
    assert f"data.image_size 7 is smaller than a patch of {BACKBONE} (8 pixels)" in text


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGBA", "CMYK", "I;16", "LA"])
def test_images_in_another_mode(place: Path, mode: str) -> None:
    """Grey, black and white, palette, transparency, four inks, 16 bits."""
    for path in sorted(Path("data").rglob("*.jpg")):
        with Image.open(path) as image:
            changed = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        changed.save(path, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    assert run(*line()).record["status"] == "complete"


def test_a_class_without_training_images(place: Path) -> None:
    """The card has 100 classes and 17 training images: most have none; nothing is invented for them."""
    record = run(*line()).record
    assert record["parameters"]["head"] == 100 * 16 + 100
    assert record["metrics"]["count"] == 9


def test_all_images_of_one_class(place: Path) -> None:
    for name in ("train800", "val200", "train800val200", "test"):
        path = lists(name)
        path.write_text("".join(f"{entry.split()[0]} 0\n" for entry in path.read_text().splitlines()))
    record = run(*line("--method", "full", trainer__max_epochs="3", data__batch_size="17")).record
    assert record["status"] == "complete"
    assert 0 <= record["metrics"]["top1"] <= 100


@pytest.mark.parametrize("size", ["17", "18", "500"])
def test_a_batch_as_large_as_the_data_set_or_larger(place: Path, size: str) -> None:
    outcome = run(*line("--data.drop_last", "true", data__batch_size=size, trainer__max_epochs="2"))
    assert outcome.record["status"] == "complete"
    assert outcome.record["epochs"] == 2


@pytest.mark.parametrize("batch", ["1", "16"])
def test_a_batch_of_one_image(place: Path, batch: str) -> None:
    """Either all are, or the last of an epoch is."""
    assert run(*line(data__batch_size=batch)).record["status"] == "complete"


def test_a_place_with_blanks_and_other_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "Büro für Größen 中文 [x] 'y' #1"
    odd.mkdir()
    settle(odd, monkeypatch)
    draw(odd / "mes données")
    outcome = run(*line("--results_root", "mes résultats", "--runs_root", "läufe 1", data__root="mes données"))
    assert outcome.record_path.is_file()
    assert outcome.record_path.parts[0] == "mes résultats"
    assert run("table", "--results_root", "mes résultats").status == 0


@pytest.mark.slow
def test_two_runs_into_one_folder_at_once(place: Path) -> None:
    """Of one setting and seed, at one moment: two runs, two records, nothing mixed."""
    script = (
        f"import sys\nsys.path[:0] = [{str(Path(__file__).parent)!r}]\nimport helpers\nhelpers.register_backbone()\n"
    )
    Path("program.py").write_text(f"{script}from svp_bench.cli.main import entry_point\nentry_point()\n")
    argv = [sys.executable, "program.py", *line()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(argv, **pipes) for _ in range(2)]  # type: ignore[call-overload]
    for process in both:
        _, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    records, problems = read_records("results")
    assert not problems
    assert len({record.run_id for record in records}) == 2
    one, other = records
    assert one.correct == other.correct
    assert one.setting_digest == other.setting_digest
    assert len(list(Path("runs/vtab/cifar").iterdir())) == 2


@pytest.mark.parametrize("method", ["svp", "full", "lora"])
def test_mixed_precision_on_a_cpu(place: Path, method: str) -> None:
    """In bfloat16 the run ends near the one in float32."""
    exact = run(*line("--method", method, trainer__max_epochs="2")).record
    mixed = run(*line("--method", method, trainer__max_epochs="2", trainer__precision="bf16-mixed")).record
    assert mixed["precision"] == "bf16-mixed"
    assert mixed["metrics"]["loss"] == pytest.approx(exact["metrics"]["loss"], rel=0.02)


def test_gradients_are_clipped(place: Path) -> None:
    """AdamW divides by the gradient's size plus 1e-8: gradients clipped to far below that move nothing."""
    moved = []
    for norm in ("1000", "1.0e-14"):
        outcome = run(*line("--method", "linear", "--trainer.gradient_clip_val", norm, trainer__max_epochs="2"))
        state = torch.load(outcome.folder / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        moved.append(float(state["model.head.bias"].abs().max()))  # it starts at zero
    assert moved[0] > 1e-4
    assert moved[1] < 1e-7


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on CPUs")
def test_a_compiled_run_ends_as_the_plain_one(place: Path) -> None:
    plain = run(*line("--model.grad_checkpointing", "true")).record
    compiled = run(*line("--model.compile", "true")).record
    assert compiled["metrics"]["loss"] == pytest.approx(plain["metrics"]["loss"], rel=1e-4)
    assert compiled["setting_digest"] == plain["setting_digest"]
