"""The pre-training of the embedded weights: synthetic images, objective, resuming, and the shipped weights."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # pretraining/ is no part of the package
    sys.path.insert(0, str(ROOT))

from pretraining import drawing, export, images, train  # noqa: E402
from pretraining.module import COARSE, Pretraining  # noqa: E402
from svp_bench.methods.build import create_backbone  # noqa: E402
from svp_bench.models.checkpoints import backbone_digest, load_checkpoint  # noqa: E402

COUNT = 400
TINY = [
    *("--views", "64", "--batch_size", "16", "--warmup_views", "16", "--held_out", "8", "--workers", "0"),
    *("--held_out_every", "32", "--log_every", "16", "--save_every", "32", "--accelerator", "cpu"),
]


@pytest.fixture(scope="module")
def batch() -> drawing.SyntheticBatch:
    return drawing.draw(3, np.arange(COUNT))


def rows_of(batch: drawing.SyntheticBatch, family: str) -> Any:
    return np.nonzero(batch.family == list(drawing.FAMILIES).index(family))[0]


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 50])
def test_an_image_depends_on_its_seed_and_number_alone(batch: drawing.SyntheticBatch, size: int) -> None:
    for start in range(0, 100, size):
        rows = np.arange(start, min(start + size, 100))
        again = drawing.draw(3, rows[::-1])  # in another company, in another order
        for name, value in again._asdict().items():
            assert np.array_equal(value[::-1], getattr(batch, name)[rows]), name


def test_another_seed_or_number_gives_another_image(batch: drawing.SyntheticBatch) -> None:
    assert len({image.tobytes() for image in batch.images}) == COUNT
    other = drawing.draw(4, np.arange(50))
    assert all(not np.array_equal(a, b) for a, b in zip(other.images, batch.images, strict=False))


def test_shapes_and_types(batch: drawing.SyntheticBatch) -> None:
    side, grid, centred = drawing.SIZE, drawing.GRID, drawing.CENTRED
    expected = {
        "images": ((COUNT, 3, side, side), np.uint8),
        "mask": ((COUNT, side, side), np.uint8),
        "centred": ((COUNT, centred, centred), np.uint8),
        "pose": ((COUNT, len(drawing.POSE)), np.float32),
        "blanked": ((COUNT, grid, grid), np.bool_),
        "family": ((COUNT,), np.int64),
    }
    assert {name: (value.shape, value.dtype.type) for name, value in batch._asdict().items()} == expected


def test_shares_of_the_families() -> None:
    assert sum(drawing.FAMILIES.values()) == pytest.approx(1)
    family = drawing.family_of(0, np.arange(20_000))
    for number, share in enumerate(drawing.FAMILIES.values()):
        error = (share * (1 - share) / 20_000) ** 0.5
        assert abs((family == number).mean() - share) < 4 * error


def test_random_numbers_are_uniform_and_independent() -> None:
    numbers = drawing.Chance(0, np.arange(4000)).uniform(shape=(50,))
    counts = np.histogram(numbers, bins=20, range=(0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 45  # chi² with 19 degrees of freedom: p < 0.001
    assert abs(np.corrcoef(numbers[:, :10].T) - np.eye(10)).max() < 0.08  # one number of an image and the next
    assert abs(np.corrcoef(numbers[:-1, 0], numbers[1:, 0])[0, 1]) < 0.08  # one image and the next
    normal = drawing.Chance(1, np.arange(4000)).normal((20,))
    assert abs(normal.mean()) < 0.02
    assert normal.std() == pytest.approx(1, abs=0.02)


def test_hidden_patches(batch: drawing.SyntheticBatch) -> None:
    hidden = batch.blanked.reshape(COUNT, -1).sum(axis=1)
    assert set(hidden.tolist()) == {0, round(0.3 * 64)}
    assert abs((hidden > 0).mean() - 0.5) < 0.1


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [name for name in drawing.FAMILIES if name != "gratings"])
def test_the_mask_is_where_the_figure_is(batch: drawing.SyntheticBatch, family: str) -> None:
    """Where the mask is full the brightness differs from that where it is empty, by more than noise and waves do."""
    apart = []
    for row in rows_of(batch, family):
        light = batch.images[row].mean(axis=0)
        full, empty = batch.mask[row] > 250, batch.mask[row] == 0
        if full.sum() >= 30:
            spread = np.sqrt((light[full].var() + light[empty].var()) / 2)
            apart.append(abs(light[full].mean() - light[empty].mean()) / max(spread, 1))
    assert len(apart) > 10
    assert np.mean(np.array(apart) > 0.8) > 0.9
    # and not where it would be if it were turned over
    wrong = [
        abs(np.corrcoef(batch.images[r].mean(axis=0).ravel(), batch.mask[r].T.ravel())[0, 1])
        < abs(np.corrcoef(batch.images[r].mean(axis=0).ravel(), batch.mask[r].ravel())[0, 1])
        for r in rows_of(batch, family)
    ]
    assert np.mean(wrong) > 0.9


def test_gratings_differ_in_their_waves_not_in_their_colour(batch: drawing.SyntheticBatch) -> None:
    for row in rows_of(batch, "gratings"):
        light = batch.images[row].mean(axis=0)
        full, empty = batch.mask[row] > 250, batch.mask[row] == 0
        assert abs(light[full].mean() - light[empty].mean()) < 0.9 * light.std()


def test_pose_by_moments_of_the_mask(batch: drawing.SyntheticBatch) -> None:
    mean, spread = drawing._POSE_MEAN, drawing._POSE_SPREAD
    centres = (np.arange(64) + 0.5) / 32 - 1
    for row in range(80):
        weight = batch.mask[row].astype(np.float64).ravel()
        x, y = np.tile(centres, 64), np.repeat(centres, 64)
        z = (x - np.average(x, weights=weight)) + 1j * (y - np.average(y, weights=weight))
        size = np.sqrt(np.average(abs(z) ** 2, weights=weight))
        stretch = np.average(z**2, weights=weight) / size**2
        skew = np.average(abs(z) ** 2 * z, weights=weight) / size**3
        triple = np.average(z**3, weights=weight) / size**3
        numbers = [np.average(x, weights=weight), np.average(y, weights=weight), size]
        numbers += [part for value in (stretch, skew, triple) for part in (value.real, value.imag)]
        numbers.append(np.log(weight.mean() / 255 + 1e-3))
        expected = np.clip((np.array(numbers) - mean) / spread, -3, 3)
        # the masks were rounded to 255 steps
        assert np.allclose(batch.pose[row], expected, atol=0.05), drawing.POSE


def test_pose_is_standardised() -> None:
    pose = drawing.draw(5, np.arange(1500)).pose
    assert (abs(pose.mean(axis=0)) < 0.3).all()
    assert ((pose.std(axis=0) > 0.6) & (pose.std(axis=0) < 1.4)).all()


def test_centred_masks_do_not_move_with_the_figure() -> None:
    cover = np.zeros((3, 64, 64), dtype=np.float32)
    cover[0, 10:22, 8:14] = 1
    cover[1, 40:52, 50:56] = 1  # moved
    cover[2, 10:34, 8:20] = 1  # twice as large
    _, centred = drawing._describe(cover)
    assert np.allclose(centred[0], centred[1], atol=1e-4)
    assert np.allclose(centred[0], centred[2], atol=0.15)
    assert centred[0][7:9, 7:9].min() > 0.9
    assert centred[0][0].max() == 0


def test_polygons_against_another_rasteriser() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        count = int(rng.integers(3, 8))
        gaps = rng.uniform(0.7, 1.3, count)
        corners = ((np.cumsum(gaps) - gaps[0]) / gaps.sum() * 2 * np.pi).astype(np.float32)
        radii = rng.uniform(0.35, 0.7, count).astype(np.float32)
        x, y = rng.uniform(-0.2, 0.2, 2).astype(np.float32)
        inside = drawing._star(corners[None], radii[None], np.ones((1, count), np.bool_), np.array([x]), np.array([y]))
        large = Image.new("1", (512, 512))
        points = zip((x + radii * np.cos(corners) + 1) * 256, (y + radii * np.sin(corners) + 1) * 256, strict=True)
        ImageDraw.Draw(large).polygon([(float(px), float(py)) for px, py in points], fill=1)
        expected = np.asarray(large, dtype=np.float64).reshape(64, 8, 64, 8).mean(axis=(1, 3))
        assert abs(np.clip(inside[0] + 0.5, 0, 1) - expected).mean() < 0.006


def test_ink_lies_along_the_curve() -> None:
    """A straight pen of 6 pixels against the distance to its segment."""
    t = np.linspace(0, 1, 96, dtype=np.float32)[None]
    x, y = -0.6 + 1.1 * t, -0.3 + 0.7 * t
    length = float(np.hypot(1.1, 0.7))
    cover = drawing._ink(x, y, np.full_like(x, 6 / 32), np.full_like(x, length / 95))[0]
    axis = (np.arange(64) + 0.5) / 32 - 1
    along = ((axis[None] + 0.6) * 1.1 + (axis[:, None] + 0.3) * 0.7) / length**2
    across = abs((axis[None] + 0.6) * 0.7 - (axis[:, None] + 0.3) * 1.1) / length * 32
    middle = (along > 0.15) & (along < 0.85)
    assert cover[middle & (across < 2)].min() == 1
    assert cover[middle & (across > 4)].max() == 0
    assert cover[(along < -0.15) | (along > 1.15)].max() == 0


# --- objective and training ------------------------------------------------------------------------------------------


def test_each_token_is_asked_for_its_own_patch() -> None:
    module = Pretraining(total_steps=2)
    batch = train.as_tensors(drawing.draw(0, np.arange(4)))
    mask = batch.mask.float()
    cells = torch.nn.functional.unfold(mask[:, None], 8, stride=8).mT
    assert torch.equal(cells[:, 13].reshape(-1, 8, 8), mask[:, 8:16, 40:48])  # row 1, column 5
    parts = module.parts(batch, hide=True)
    assert list(parts) == ["pose", "coarse", "patch", "centred"]
    weights = {"pose": 1.0, "coarse": 5.0, "patch": 3.0, "centred": 5.0}
    assert module.total(parts).item() == pytest.approx(sum(weights[n] * v.item() for n, v in parts.items()), rel=1e-5)
    assert module.whole_head.out_features == len(drawing.POSE) + COARSE**2 + drawing.CENTRED**2


def test_hidden_patches_are_not_seen() -> None:
    module = Pretraining(total_steps=2)
    batch = train.as_tensors(drawing.draw(0, np.arange(6)))
    hidden = batch.blanked.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(batch.images)
    other = batch._replace(images=torch.where(hidden, 255 - batch.images, batch.images))
    assert hidden.any()
    assert torch.equal(module.parts(batch, hide=True)["pose"], module.parts(other, hide=True)["pose"])
    assert not torch.equal(module.parts(batch, hide=False)["pose"], module.parts(other, hide=False)["pose"])


def run(folder: Path, *more: str) -> int:
    return train.main([*TINY, "--folder", str(folder), *more])


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretraining") / "whole"
    assert run(folder) == 0
    return folder


def test_two_steps_and_two_more_are_four_steps(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--until", "32") == 3
    assert run(tmp_path) == 0
    for name in ("log.csv", "held_out.csv"):
        assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    one, other = (torch.load(f / "last.ckpt", weights_only=True) for f in (whole, tmp_path))
    assert other["global_step"] == 4
    assert all(torch.equal(value, other["state_dict"][name]) for name, value in one["state_dict"].items())
    first, second = (s["optimizer_states"][0]["state"] for s in (one, other))
    assert all(torch.equal(first[n][key], second[n][key]) for n in first for key in ("exp_avg", "exp_avg_sq"))
    calls = json.loads((tmp_path / "summary.json").read_text())["calls"]
    assert [call["steps"] for call in calls] == [2, 2]


def test_workers_change_nothing(whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path, "--workers", "2") == 0
    assert (tmp_path / "log.csv").read_bytes() == (whole / "log.csv").read_bytes()


def test_time_is_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--minutes", "0") == 3
    assert "16 of 64 views are seen; the same command resumes" in capsys.readouterr().out


def test_a_finished_run_is_left_alone(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (whole / "last.ckpt").read_bytes()
    assert run(whole) == 0
    assert "all 64 views are seen" in capsys.readouterr().out
    assert (whole / "last.ckpt").read_bytes() == before


def test_other_settings_are_refused(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(whole, "--learning_rate", "0.1") == 2
    assert re.search(r"error: .* holds a run with other settings .* --folder", capsys.readouterr().err)


def test_the_held_out_seed_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--seed", str(train.HELD_OUT_SEED)) == 2
    assert "is that of the held-out images" in capsys.readouterr().err
    assert run(tmp_path, "--batch_size", "0") == 2
    assert "--batch_size is 0; it must be at least 1" in capsys.readouterr().err


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "--learning_rate", "1e30") == 1
    assert "became NaN or infinite" in capsys.readouterr().err


def test_what_is_kept_can_be_looked_at(whole: Path) -> None:
    for name in ("curve.png", "images.png"):
        with Image.open(whole / name) as image:
            image.load()
            assert len(image.convert("RGB").getcolors(2**20) or []) > 5
    assert (whole / "log.csv").read_text().splitlines()[0] == "views,learning_rate,loss,pose,coarse,patch,centred"
    assert images.loss_curve({"loss": [(0, float("nan"))]}, "nothing to show").size == (900, 480)


# --- export ----------------------------------------------------------------------------------------------------------


def test_export_is_loaded_strictly(whole: Path, tmp_path: Path) -> None:
    assert export.main([str(whole), "--embedded", str(tmp_path / "e"), "--results", str(tmp_path / "r")]) == 0
    path = tmp_path / "e" / "vim_nano_patch8_64.safetensors"
    assert path.stat().st_size < 4e6
    model = create_backbone("vim_nano_patch8_64", num_classes=7, checkpoint="none")
    fresh = backbone_digest(model)
    report = load_checkpoint(model, path)
    assert not report.head_replaced
    assert report.pos_embed_resized is None
    shipped = json.loads((tmp_path / "r" / "vim_nano_patch8_64" / "shipped.json").read_text())
    assert backbone_digest(model) == shipped["weights"] != fresh
    trained = torch.load(whole / "last.ckpt", weights_only=True)["state_dict"]
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert {f"model.{name}" for name in own} == {name for name in trained if name.startswith("model.")}
    assert all(torch.equal(value, trained[f"model.{name}"]) for name, value in own.items())
    assert {p.name for p in (tmp_path / "r").iterdir()} == {"images.png", "vim_nano_patch8_64"}
    assert {p.name for p in (tmp_path / "r" / "vim_nano_patch8_64").iterdir()} == {"seed-0", "shipped.json"}
    first = path.read_bytes()
    assert export.main([str(whole), "--embedded", str(tmp_path / "e"), "--results", str(tmp_path / "r")]) == 0
    assert path.read_bytes() == first


def summary(seed: int, total: float, **settings: Any) -> dict[str, Any]:
    shared = {"held_out_seed": 1, "held_out_images": 8, "drawing": 1, "held_out": {"total": total}}
    return {**shared, "settings": {"seed": seed, "views": 64, **settings}}


def test_the_rule_for_the_shipped_seed() -> None:
    assert export.better([summary(0, 2.0), summary(1, 1.9)]) == 1
    assert export.better([summary(0, 2.0), summary(1, 2.0)]) == 0
    with pytest.raises(export.UsageError, match="differ in more than their seed"):
        export.better([summary(0, 2.0), summary(1, 1.9, views=128)])


RESULTS = ROOT / "pretraining" / "results"
SHIPPED = ["vim_nano_patch8_64", "vit_nano_patch8_64"]


@pytest.mark.parametrize("backbone", SHIPPED)
def test_the_shipped_weights_are_those_of_the_better_seed(backbone: str) -> None:
    shipped = json.loads((RESULTS / backbone / "shipped.json").read_text(encoding="utf-8"))
    summaries = [json.loads((RESULTS / backbone / f"seed-{n}" / "summary.json").read_text()) for n in (0, 1)]
    assert shipped["seed"] == min((0, 1), key=lambda n: summaries[n]["held_out"]["total"])
    assert shipped["weights"] == summaries[shipped["seed"]]["weights"]
    model = create_backbone(backbone, num_classes=3, checkpoint="embedded")
    assert backbone_digest(model) == shipped["weights"]
    assert model(torch.zeros(1, 3, 64, 64)).isfinite().all()


def test_both_backbones_were_trained_alike() -> None:
    """They differ in the backbone and in the learning rate, which one rule chose."""
    first = [json.loads((RESULTS / name / "seed-0" / "summary.json").read_text())["settings"] for name in SHIPPED]
    assert {key for key in first[0] if first[0][key] != first[1][key]} == {"backbone", "learning_rate"}


def test_export_refuses_what_is_not_finished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert export.main([str(tmp_path), "--results", str(tmp_path), "--embedded", str(tmp_path)]) == 2
    assert "holds no finished pre-training" in capsys.readouterr().err


# --- what the pre-training must not know -----------------------------------------------------------------------------


def test_drawing_knows_numpy_alone() -> None:
    """No evaluation image, generator, font or data set can get in: the module imports none of them."""
    code = (
        "import sys, numpy; before = set(sys.modules); import pretraining.drawing; "
        "new = {m.split('.')[0] for m in set(sys.modules) - before}; print(sorted(new - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['numpy', 'pretraining']"  # numpy loads some of its parts late
