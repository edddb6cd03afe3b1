"""Recipes: each piece against its source, all that chance does as a pure function, and every shipped recipe file."""

from __future__ import annotations

import math
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import BACKBONE, CONFIG, assert_error, command, register_backbone, run, settle, small
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from timm.loss import SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV2
from torch import nn
from torchvision.transforms import v2

from svp_bench.core.errors import ConfigError, SvpBenchError
from svp_bench.core.resources import configs_dir
from svp_bench.data.augment import AugmentConfig, Augmenter, Mix, draw_mix, erase, mirror, mix, seeded, soft_targets
from svp_bench.data.module import VisionDataModule
from svp_bench.data.samplers import GlobalBatchSampler, Positions
from svp_bench.data.synthetic import draw_task
from svp_bench.data.transforms import EvalTransform, TransformConfig
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.svp import SVP
from svp_bench.models.layers import hidden_head, simam
from svp_bench.records.digests import cell_config, config_digest, flat, setting_digest
from svp_bench.records.migrate import MOVED, group_settings
from svp_bench.tasks.cards import load_task
from svp_bench.train.module import AdaptationModule
from svp_bench.train.optim import EMA, EMAConfig, OptimizerConfig, Schedule, ScheduleConfig

RECIPES = configs_dir() / "recipes"
SIZE = 16
COUNTS = {"train800": 14, "val200": 5, "test": 3}  # trains on 19 in stage final
EVERYTHING = AugmentConfig(
    crop="random_resized",
    flip=0.5,
    rand_augment="rand-m9-mstd0.5-inc1",
    random_erasing=0.5,
    mixup=0.8,
    cutmix=1.0,
)

pytestmark = pytest.mark.filterwarnings("ignore:the data of vtab/dtd differ from its card")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    draw_task(load_task("vtab/dtd"), root, counts=COUNTS, size=20)
    return root


def ready(root: Path, world_size: int = 1, rank: int = 0, accumulate: int = 1, **arguments: Any) -> VisionDataModule:
    given = {"task": "vtab/dtd", "root": str(root), "image_size": SIZE, "batch_size": 8, "num_workers": 0, **arguments}
    data = VisionDataModule(**given)
    data.trainer = SimpleNamespace(  # type: ignore[assignment]
        world_size=world_size, global_rank=rank, accumulate_grad_batches=accumulate, num_devices=world_size
    )
    data.setup("fit")
    return data


def make_image(seed: int = 0, width: int = 40, height: int = 30) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def random_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


# --- chance is a pure function ---------------------------------------------------------------------------------------


def test_seeded_draws_follow_from_the_key_alone_and_leave_no_trace() -> None:
    def draws(*key: int) -> tuple[float, float, float]:
        with seeded(*key):
            return random.random(), np.random.rand(), torch.rand(()).item()  # noqa: NPY002

    before = random_states()
    first = draws(0, 1, 2, 3)
    assert random_states() == before
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    torch.manual_seed(5)
    assert draws(0, 1, 2, 3) == first
    assert len({draws(0, 1, 2, 3), draws(0, 1, 2, 4), draws(0, 1, 3, 2), draws(1, 1, 2, 3), draws(0, 1, 2)}) == 5
    before = random_states()
    with pytest.raises(KeyError), seeded(0):
        raise KeyError
    assert random_states() == before


@pytest.mark.parametrize(
    "specification",
    ["rand-m10-n15-p1-inc1", "rand-m20-n15-p1-inc1-mmax20", "rand-m0-n15-p1", "rand-m9-n5-mstd101-inc1-t3aw"],
)
def test_every_operation_runs_at_its_extremes(specification: str) -> None:
    """At magnitude 10 and above, timm asks posterize to keep no bits, which Pillow 13 refuses."""
    augmenter = Augmenter(AugmentConfig(rand_augment=specification), EvalTransform(SIZE), seed=0)
    image = make_image(width=SIZE, height=SIZE)
    for index in range(8):
        assert augmenter(image, 0, index, 0).shape == (3, SIZE, SIZE)


def test_posterize_without_bits_is_black() -> None:
    augment = Augmenter(AugmentConfig(rand_augment="rand-m10-n1-p1-inc1"), EvalTransform(SIZE), seed=0)
    (transform,) = augment._steps
    (posterize,) = [operation for operation in transform.ops if operation.name == "PosterizeIncreasing"]  # type: ignore[attr-defined]
    image = make_image(width=SIZE, height=SIZE)
    assert not np.asarray(posterize(image)).any()
    posterize.magnitude = 9  # one bit
    assert np.unique(np.asarray(posterize(image))).tolist() == [0, 128]


@pytest.mark.parametrize(
    "augment",
    [
        AugmentConfig(crop="random_resized", flip=0.5, rand_augment="rand-m9-mstd0.5-inc1"),
        AugmentConfig(crop="random", flip=0.5),
        AugmentConfig(flip=0.5, color_jitter=0.4),
    ],
)
def test_an_augmented_image_follows_from_its_key(augment: AugmentConfig) -> None:
    augmenter = Augmenter(augment, EvalTransform(SIZE), seed=3)
    image = make_image(width=SIZE, height=SIZE) if not augmenter.needs_original else make_image()
    keys = [(epoch, index, copy) for epoch in range(3) for index in range(4) for copy in range(2)]
    before = random_states()
    first = {key: augmenter(image, *key) for key in keys}
    assert random_states() == before
    torch.manual_seed(9)
    again = {key: augmenter(image, *key) for key in reversed(keys)}
    for key in keys:
        assert first[key].shape == (3, SIZE, SIZE)
        assert first[key].dtype == np.uint8
        assert np.array_equal(first[key], again[key])
    distinct = {value.tobytes() for value in first.values()}
    assert len(distinct) > len(keys) // 2 or not augment.color_jitter
    assert len(distinct) > 4
    other = Augmenter(augment, EvalTransform(SIZE), seed=4)
    assert any(not np.array_equal(other(image, *key), first[key]) for key in keys)


def test_training_crops_are_those_of_torchvision() -> None:
    """VPT's crop: shorter side to size / 0.875, then a square of the size somewhere in it."""
    image = make_image(width=40, height=30)
    resized = np.asarray(v2.functional.resize(image, [18], interpolation=v2.InterpolationMode.BILINEAR))
    windows = {
        resized[y : y + SIZE, x : x + SIZE].tobytes()
        for y in range(resized.shape[0] - SIZE + 1)
        for x in range(resized.shape[1] - SIZE + 1)
    }
    augmenter = Augmenter(AugmentConfig(crop="random"), EvalTransform(SIZE, interpolation="bilinear"), seed=0)
    seen = {augmenter(image, 0, index, 0).transpose(1, 2, 0).tobytes() for index in range(60)}
    assert seen <= windows
    assert len(seen) > 10


def test_the_centre_crop_is_torchvisions() -> None:
    for image in (
        make_image(width=300, height=260),
        make_image(width=260, height=500),
        make_image(width=50, height=20),
    ):
        steps = v2.Compose([v2.Resize(256, v2.InterpolationMode.BICUBIC), v2.CenterCrop(224)])
        seen = EvalTransform(224, resize="centre_crop")(image)
        assert np.array_equal(seen.transpose(1, 2, 0), np.asarray(steps(image)))


@pytest.mark.parametrize("share", [(2, 1, 0), (1, 2, 0), (2, 2, 0), (1, 1, 1)])
def test_images_do_not_depend_on_processes_accumulation_or_workers(root: Path, share: tuple[int, int, int]) -> None:
    """Everything at once: crops, RandAugment, erasing and the partner in the global batch."""
    world_size, accumulate, workers = share
    # the last batch has three images; four parts in pairs would need seven
    arguments = {"augment": EVERYTHING, "drop_last": world_size * accumulate > 2}
    whole = perturbed(root, 1, 1, 0, arguments)
    assert set(whole) == {0, 1}
    assert perturbed(root, world_size, accumulate, workers, arguments) == whole


def perturbed(root: Path, world_size: int, accumulate: int, workers: int, arguments: dict[str, Any]) -> Any:
    """What the model sees: epoch → {(step, position): (digest of the image, target)}."""
    seen: dict[int, dict[tuple[int, int], tuple[Any, ...]]] = {0: {}, 1: {}}
    for rank in range(world_size):
        data = ready(root, world_size, rank, accumulate, **{**arguments, "num_workers": workers})
        loader = data.train_dataloader()
        for epoch, found in seen.items():
            loader.sampler.set_epoch(epoch)
            for batch_idx, batch in enumerate(loader):
                images, targets = perturb(data, loader, epoch, accumulate, batch, batch_idx)
                for index, image, target in zip(batch.index.tolist(), images, targets, strict=True):
                    key = (batch_idx // accumulate, index)
                    assert key not in found
                    found[key] = (image.numpy().tobytes(), tuple(target.tolist()))
    return seen


def perturb(data: VisionDataModule, loader: Any, epoch: int, accumulate: int, batch: Any, batch_idx: int) -> Any:
    """`AdaptationModule._perturbed`, with no more of a module and a trainer than it looks at."""
    trainer = SimpleNamespace(datamodule=data, train_dataloader=loader, accumulate_grad_batches=accumulate)
    mean, std = torch.full((1, 3, 1, 1), 128.0), torch.full((1, 3, 1, 1), 64.0)

    def normalise(images: torch.Tensor) -> torch.Tensor:
        return (images.float() - mean) / std

    module = SimpleNamespace(trainer=trainer, current_epoch=epoch, normalise=normalise, num_classes=data.num_classes)
    return AdaptationModule._perturbed(module, batch, batch_idx)  # type: ignore[arg-type]


def test_another_epoch_shows_other_images(root: Path) -> None:
    data = ready(root, augment=AugmentConfig("random_resized", flip=0.5))
    loader = data.train_dataloader()
    epochs = []
    for epoch in (0, 1, 0):
        loader.sampler.set_epoch(epoch)
        epochs.append({int(i): image for batch in loader for image, i in zip(batch.images, batch.index, strict=True)})
    assert all(torch.equal(epochs[0][i], epochs[2][i]) for i in range(19))
    assert sum(torch.equal(epochs[0][i], epochs[1][i]) for i in range(19)) <= 2


def test_val_is_never_augmented(root: Path) -> None:
    plain, augmented = (ready(root, stage="select", augment=given) for given in (AugmentConfig(), EVERYTHING))
    for one, other in zip(plain.val_dataloader(), augmented.val_dataloader(), strict=True):
        assert torch.equal(one.images, other.images)


def test_images_kept_in_memory_are_augmented_too(root: Path) -> None:
    plain, flipped = (
        next(iter(ready(root, augment=AugmentConfig(flip=given)).train_dataloader())) for given in (0.0, 1.0)
    )
    assert torch.equal(flipped.images, plain.images.flip(-1))


# --- batches ---------------------------------------------------------------------------------------------------------


@st.composite
def paired_layouts(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """Return (count, batch size, world size, accumulate) that fit together in pairs."""
    world_size, accumulate = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    parts = world_size * accumulate
    batch_size = parts * draw(st.integers(2, 6))
    rest = draw(st.one_of(st.just(0), st.integers(2 * parts - 1, max(2 * parts - 1, batch_size - 1))))
    return (
        batch_size * draw(st.integers(0 if 0 < rest < batch_size else 1, 4)) + rest,
        batch_size,
        world_size,
        accumulate,
    )


@settings(deadline=None)
@given(paired_layouts(), st.integers(0, 99), st.integers(1, 3))
def test_partners_come_from_the_global_batch_whatever_the_processes(
    layout: tuple[int, int, int, int], seed: int, repeats: int
) -> None:
    count, batch_size, world_size, accumulate = layout

    def partners(world_size: int, accumulate: int) -> list[dict[int, int]]:
        steps: list[dict[int, int]] = []
        for rank in range(world_size):
            sampler = GlobalBatchSampler(
                count, batch_size, seed, world_size, rank, accumulate=accumulate, repeats=repeats, pairs=True
            )
            sampler.set_epoch(2)
            for number, batch in enumerate(sampler):
                assert isinstance(batch, Positions)
                assert batch
                assert (batch.epoch, batch.copies) == (2, sampler.copies(number))
                if number // accumulate == len(steps):
                    steps.append({})
                places = torch.tensor([i * repeats + copy for i, copy in zip(batch, batch.copies, strict=True)])
                pairs = dict(zip(places.tolist(), mirror(places).tolist(), strict=True))
                assert not steps[number // accumulate].keys() & pairs
                steps[number // accumulate].update(pairs)
        return steps

    whole = partners(1, 1)
    assert partners(world_size, accumulate) == whole
    plain = GlobalBatchSampler(count, batch_size, seed, repeats=repeats)
    plain.set_epoch(2)
    for pairs, batch in zip(whole, plain, strict=True):  # the mirror image of the batch, as timm's Mixup takes it
        assert isinstance(batch, Positions)
        places = [i * repeats + copy for i, copy in zip(batch, batch.copies, strict=True)]
        assert pairs == dict(zip(places, reversed(places), strict=True))


def test_repeats_show_fewer_images_several_times_in_an_epoch_of_the_same_length() -> None:
    sampler = GlobalBatchSampler(20, 6, seed=1, repeats=3)
    batches = [list(zip(batch, batch.copies, strict=True)) for batch in sampler if isinstance(batch, Positions)]
    together = [entry for batch in batches for entry in batch]
    assert [len(batch) for batch in batches] == [6, 6, 6, 2]
    assert len(set(together)) == 20
    order = [i for batch in GlobalBatchSampler(20, 20, seed=1) for i in batch]
    assert [i for i, _ in together] == [i for i in order for _ in range(3)][:20]
    assert [copy for _, copy in together] == [0, 1, 2] * 6 + [0, 1]


def test_layouts_that_would_part_a_pair_are_refused(root: Path) -> None:
    with pytest.raises(ValueError, match="the last batch has 2 images, fewer pairs than 2 x 1 parts"):
        GlobalBatchSampler(10, 4, 0, world_size=2, pairs=True)
    message = "leaves a last batch of 1 of the 19 images, fewer than 2 processes x 1 accumulated batch = 2 parts of two"
    with pytest.raises(ConfigError, match=message):
        ready(root, 2, batch_size=6, augment=AugmentConfig(mixup=0.8))
    with pytest.raises(ConfigError, match=r"data.batch_size 2 leaves .* 4 or 8 would fit"):
        ready(root, 2, batch_size=2, augment=AugmentConfig(mixup=0.8))


# --- mixup, cutmix, erasing, attention -------------------------------------------------------------------------------


@pytest.mark.parametrize(("alphas", "step"), [((0.8, 0.0), 0), ((0.0, 1.0), 1), ((0.8, 1.0), 2), ((0.8, 1.0), 5)])
def test_mixing_a_batch_is_timms_mixup(alphas: tuple[float, float], step: int) -> None:
    classes, smoothing = 7, 0.1
    images, labels = torch.randn(6, 3, 20, 24), torch.randint(classes, (6,))
    logits = torch.randn(6, classes)
    order = [0, 5, 1, 4, 2, 3]  # as the sampler pairs them
    sampled = draw_mix(AugmentConfig(mixup=alphas[0], cutmix=alphas[1]), 3, 1, step, 20, 24)
    ours = mix(images[order], sampled)
    targets = soft_targets(labels[order], classes, sampled)

    theirs = Mixup(*alphas, label_smoothing=smoothing, num_classes=classes)
    with seeded(3, 3, 1, step):
        expected, expected_targets = theirs(images.clone(), labels)
    assert torch.allclose(ours, expected[order], atol=1e-6)
    loss = F.cross_entropy(logits[order], targets, label_smoothing=smoothing)
    assert loss.item() == pytest.approx(SoftTargetCrossEntropy()(logits, expected_targets).item(), rel=1e-5)


def test_draws_of_mixing_have_the_right_shares() -> None:
    mixing = AugmentConfig(mixup=0.8, cutmix=1.0, mix_probability=0.5, mix_switch_probability=0.25)
    sampled = [draw_mix(mixing, 0, epoch, step, 32, 32) for epoch in range(20) for step in range(100)]
    mixed = [one for one in sampled if one.share != 1]
    assert len(mixed) / len(sampled) == pytest.approx(0.5, abs=0.05)
    assert sum(one.box is not None for one in mixed) / len(mixed) == pytest.approx(0.25, abs=0.05)
    for one in mixed:
        if one.box is not None:
            top, bottom, left, right = one.box
            assert one.share == pytest.approx(1 - (bottom - top) * (right - left) / 32**2)
    shares = np.array(
        [one.share for one in mixed if one.box is None]
    )  # Beta(a, a): mean 1/2, variance 1 / (4 (2 a + 1))
    assert shares.mean() == pytest.approx(0.5, abs=0.03)
    assert shares.var() == pytest.approx(1 / (4 * 2.6), abs=0.02)
    assert draw_mix(mixing, 0, 3, 4, 32, 32) == draw_mix(mixing, 0, 3, 4, 32, 32)
    assert mixing.mixes
    assert not AugmentConfig(mixup=0.8, mix_probability=0.0).mixes
    assert not AugmentConfig().mixes


@pytest.mark.parametrize("count", [1, 3])
def test_odd_batches_and_single_images_are_mixed(count: int) -> None:
    images, labels = torch.randn(count, 3, 8, 8), torch.arange(count)
    for drawn in (Mix(0.3), Mix(0.75, (0, 4, 0, 4))):
        mixed, targets = mix(images, drawn), soft_targets(labels, 5, drawn)
        assert torch.allclose(
            mixed[-1], images[-1]
        )  # the one in the middle of the global batch is its own mirror image
        assert torch.equal(targets[-1], F.one_hot(labels[-1], 5).float())
        assert torch.allclose(targets.sum(dim=1), torch.ones(count))


def test_erasing_is_timms_and_follows_from_seed_epoch_and_position() -> None:
    clean = torch.zeros(6, 3, 16, 16)
    whole = erase(clean.clone(), 0.5, 1, 2, list(range(6)))
    parts = [erase(clean[:1].clone(), 0.5, 1, 2, [position]) for position in reversed(range(6))]
    assert torch.equal(whole, torch.cat(parts[::-1]))
    assert not torch.equal(whole, erase(clean.clone(), 0.5, 1, 3, list(range(6))))
    assert not torch.equal(whole, erase(clean.clone(), 0.5, 1, 2, list(range(6)), [1] * 6))
    everywhere = erase(torch.zeros(200, 3, 16, 16), 1.0, 0, 0, list(range(200)))
    for image in everywhere:
        rows, columns = image[0].any(dim=1).nonzero(), image[0].any(dim=0).nonzero()
        box = image[:, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert (box != 0).all()  # one full rectangle of noise
        assert (image != 0).sum() == box.numel()
    noise = everywhere[everywhere != 0]
    assert noise.mean().item() == pytest.approx(0, abs=0.02)
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    expected = torch.zeros(3, 16, 16)
    with seeded(0, 2, 0, 5, 0):
        RandomErasing(1.0, mode="pixel", device="cpu")(expected)
    assert torch.equal(everywhere[5], expected)


def test_simam_is_the_formula_of_the_paper() -> None:
    x = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    result = simam(x)
    for b, c in np.ndindex(2, 3):
        values = x[b, c].flatten().tolist()
        mean = sum(values) / 20
        variance = sum((value - mean) ** 2 for value in values) / 19
        for place, value in enumerate(values):
            # the inverse of the minimal energy e* = 4 (σ² + λ) / ((t - μ)² + 2 σ² + 2 λ), eq. 5
            energy = 4 * (variance + 1e-3) / ((value - mean) ** 2 + 2 * variance + 2e-3)
            expected = value / (1 + math.exp(-1 / energy))
            assert result[b, c].flatten()[place].item() == pytest.approx(expected, rel=1e-9)


# --- head, optimizer, schedule, averaged weights ---------------------------------------------------------------------

# SVP's HTA runs on Vim-S: file, listed rate, decay, shared blocks, mixed, attention, two-layer head, classes, and the
# numbers of trained parameters: adapter, head, both. From svp/scripts/train.sh and the shapes of its modules.
HTA = [
    ("cub200", 6.0e-3, 1.0e-4, 8, True, False, True, 200, 1644288, 112520, 1756808),
    ("cifar100", 5.0e-3, 1.0e-5, 12, True, True, False, 100, 1496064, 38500, 1534564),
    ("cifar10", 5.0e-3, 1.0e-4, 8, True, True, False, 10, 1644288, 3850, 1648138),
    ("dtd", 6.5e-3, 1.0e-4, 4, True, False, False, 47, 2088960, 18095, 2107055),
    ("stanford_dogs", 5.0e-4, 1.0e-8, 12, True, False, False, 120, 1496064, 46200, 1542264),
    ("gtsrb", 1.0e-2, 1.0e-6, 6, True, False, False, 43, 1792512, 16555, 1809067),
    ("nabirds", 1.0e-2, 0.0, 8, True, False, True, 555, 1644288, 181035, 1825323),
    ("svhn", 1.5e-2, 1.0e-3, 12, False, False, False, 10, 1496064, 3850, 1499914),
    ("oxford_flowers", 1.5e-2, 1.0e-4, 8, False, True, True, 102, 1644288, 93606, 1737894),
    ("food101", 5.0e-3, 1.0e-4, 8, True, False, False, 101, 1644288, 38885, 1683173),
]
ids = [row[0] for row in HTA]


def file(recipe: str, name: str = "common") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((RECIPES / recipe / f"{name}.yaml").read_text())
    return loaded


@pytest.mark.parametrize("row", HTA, ids=ids)
def test_the_recipe_of_svp_trains_as_many_parameters_as_released(row: tuple[Any, ...]) -> None:
    name, classes, counts = row[0], row[7], row[8:]
    model, common = file("svp-hta", name)["model"], file("svp-hta")["model"]
    with torch.device("meta"):
        backbone = create_backbone("vim_small_patch16_224", num_classes=classes)
        if model["head_hidden"] is not None:
            backbone.head = hidden_head(backbone.embed_dim, model["head_hidden"], backbone.num_classes)
        adapt(backbone, SVP(**common["method"]["init_args"], **model["method"]["init_args"]))
    trained = {key: parameter.numel() for key, parameter in trained_parameters(backbone).items()}
    head = sum(count for key, count in trained.items() if key.startswith("head."))
    assert (sum(trained.values()) - head, head, sum(trained.values())) == counts
    linear = {"head.weight", "head.bias"}
    two = {"head.0.weight", "head.0.bias", "head.1.weight", "head.1.bias"}
    assert {key for key in trained if key.startswith("head.")} == (linear if model["head_hidden"] is None else two)


def built(**arguments: Any) -> AdaptationModule:
    register_backbone()
    given = {"method": SVP(), "backbone": BACKBONE, "checkpoint": "none", "num_classes": 5, "image_size": 32}
    return AdaptationModule(**{**given, **arguments})


def test_the_two_layer_head_is_a_linear_map() -> None:
    module = built(head_hidden=6).eval()
    head = module.model.head
    assert isinstance(head, nn.Sequential)
    first, second = head
    assert (tuple(first.weight.shape), tuple(second.weight.shape)) == ((6, 16), (5, 6))
    assert first.weight.std().item() == pytest.approx(0.02, rel=0.3)
    assert not first.bias.any()
    assert not second.bias.any()
    x = torch.randn(4, 16)
    assert torch.allclose(head(x), x @ (second.weight @ first.weight).T, atol=1e-6)
    assert head.training is False
    assert module.train().model.head.training
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert module(images).shape == (2, 5)


def test_attention_acts_on_the_normalised_image() -> None:
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    plain, attentive = (built(input_attention=name).eval() for name in (None, "simam"))
    assert torch.equal(attentive(images), plain.model(simam(plain.normalise(images))))
    assert not torch.equal(attentive(images), plain(images))


def configured(epochs: int = 100, steps: int = 1000, **arguments: Any) -> tuple[Any, Callable[[float], float], str]:
    """Return the optimizer, the learning rate at a step or epoch, and the unit of the schedule."""
    module = built(**arguments)
    module._trainer = SimpleNamespace(estimated_stepping_batches=steps, max_epochs=epochs)  # type: ignore[assignment]
    made: Any = module.configure_optimizers()
    (factor,) = {id(f): f for f in made["lr_scheduler"]["scheduler"].lr_lambdas}.values()
    return made["optimizer"], lambda t: factor(t) * module.learning_rate, made["lr_scheduler"]["interval"]


def test_weight_decay_spares_biases_and_vectors_and_reaches_the_tables_of_scales() -> None:
    module = built(weight_decay=0.3, head_hidden=4)
    module._trainer = SimpleNamespace(estimated_stepping_batches=10, max_epochs=1)  # type: ignore[assignment]
    made: Any = module.configure_optimizers()
    decay = {id(p): g["weight_decay"] for g in made["optimizer"].param_groups for p in g["params"]}
    named = {name: decay[id(p)] for name, p in trained_parameters(module.model).items()}
    assert len(decay) == len(named)
    assert named["adapter.alpha"] == named["adapter.beta"] == 0.3
    for name, value in named.items():
        assert value == (0.0 if name.endswith("bias") else 0.3), name


def test_optimizers_take_their_own_settings() -> None:
    sgd = configured(optimizer=OptimizerConfig("sgd"), learning_rate=0.5)[0]
    assert isinstance(sgd, torch.optim.SGD)
    assert {(g["momentum"], g["initial_lr"], g["nesterov"]) for g in sgd.param_groups} == {(0.9, 0.5, False)}
    assert {g["momentum"] for g in configured(optimizer=OptimizerConfig("sgd", momentum=0.0))[0].param_groups} == {0.0}
    adamw = configured(optimizer=OptimizerConfig(eps=1e-6, betas=(0.8, 0.9)))[0]
    assert isinstance(adamw, torch.optim.AdamW)
    assert {(g["eps"], g["betas"]) for g in adamw.param_groups} == {(1e-6, (0.8, 0.9))}
    assert {g["eps"] for g in configured()[0].param_groups} == {1e-8}


@pytest.mark.parametrize("row", HTA, ids=ids)
def test_the_schedule_of_svp_is_timms(row: tuple[Any, ...]) -> None:
    common, own = file("svp-hta"), file("svp-hta", row[0])
    model = common["model"]
    given = {"warmup_epochs": model["warmup_epochs"], "schedule": ScheduleConfig(**model["schedule"])}
    _, rate, unit = configured(learning_rate=own["model"]["learning_rate"], **given)
    assert unit == "epoch"
    peak = row[1] * 96 / 512
    timm = CosineLRScheduler(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak),
        t_initial=100,
        lr_min=1e-5,
        warmup_t=5,
        warmup_lr_init=1e-5,
        cycle_limit=1,
    )
    for epoch in range(100):
        assert rate(epoch) == pytest.approx(timm._get_lr(epoch)[0], rel=1e-9)


def test_a_cooldown_stays_at_the_least_rate_and_is_timms_on_top() -> None:
    given = {"warmup_learning_rate": 1e-5, "min_learning_rate": 1e-5, "cosine_start": "run_start"}
    schedule = ScheduleConfig(interval="epoch", cooldown_epochs=10, **given)  # type: ignore[arg-type]
    _, rate, _ = configured(110, learning_rate=1e-3, warmup_epochs=5, schedule=schedule)
    timm = CosineLRScheduler(
        torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-3),
        t_initial=100,
        lr_min=1e-5,
        warmup_t=5,
        warmup_lr_init=1e-5,
    )
    assert [rate(t) for t in range(110)] == pytest.approx([timm._get_lr(t)[0] for t in range(110)], rel=1e-9)
    assert [rate(t) for t in range(100, 110)] == pytest.approx([1e-5] * 10)
    cooled = ScheduleConfig(cooldown_epochs=10)
    _, by_step, unit = configured(110, 1100, learning_rate=1e-3, schedule=cooled, warmup_epochs=0)
    assert unit == "step"
    assert by_step(999) > 1e-5
    assert by_step(1000) == by_step(1099) == pytest.approx(1e-5)
    with pytest.raises(ConfigError, match="cooldown_epochs 10 leaves nothing of the 10 epochs"):
        configured(10, schedule=cooled)


def test_the_schedule_of_vpt_is_its_formula() -> None:
    model = file("vpt-fgvc")["model"]
    given = {"warmup_epochs": model["warmup_epochs"], "schedule": ScheduleConfig(**model["schedule"])}
    _, rate, unit = configured(learning_rate=2.5, **given)
    assert unit == "epoch"
    for epoch in range(100):
        wanted = epoch / 10 if epoch < 10 else (1 + math.cos(math.pi * (epoch - 10) / 90)) / 2
        assert rate(epoch) == pytest.approx(2.5 * wanted)


def test_the_default_schedule_is_the_one_it_always_was() -> None:
    schedule = Schedule(10, 100, 0.001, 0.01)
    assert [schedule(step) for step in (0, 5, 10, 55, 100, 200)] == pytest.approx([0.001, 0.5005, 1, 0.505, 0.01, 0.01])
    _, rate, unit = configured(100, 1000, learning_rate=1e-3, schedule=ScheduleConfig(min_learning_rate=1e-5))
    assert unit == "step"
    assert [rate(step) for step in (0, 50, 100, 550)] == pytest.approx([1e-6, 5.005e-4, 1e-3, 5.05e-4])


def test_the_average_of_weights_is_timms() -> None:
    model = nn.Linear(3, 2)
    parameters = dict(model.named_parameters())
    ours, theirs = EMA(0.9, parameters), ModelEmaV2(model, decay=0.9)
    for _ in range(5):
        with torch.no_grad():
            for parameter in parameters.values():
                parameter.add_(torch.randn_like(parameter))
        ours.update(parameters)
        theirs.update(model)
    for name, expected in theirs.module.named_parameters():
        assert torch.allclose(ours.weights[name], expected)
        assert not torch.equal(expected, parameters[name])
    fresh = EMA(0.9, parameters)
    fresh.load(ours.weights)
    assert all(torch.equal(fresh.weights[name], ours.weights[name]) for name in ours.weights)
    with pytest.raises(SvpBenchError, match="are not those of the trained part"):
        fresh.load({"weight": torch.zeros(2, 3)})


# --- wrong values ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"flip": 1.5}, "data.augment.flip 1.5 is out of range, allowed: 0 to 1"),
        ({"random_erasing": -0.1}, "data.augment.random_erasing -0.1 is out of range, allowed: 0 to 1"),
        ({"color_jitter": math.nan}, "data.augment.color_jitter nan is out of range, allowed: 0 to 1"),
        ({"mixup": -1.0}, "data.augment.mixup -1 is out of range, allowed: 0 and above"),
        ({"cutmix": math.inf}, "data.augment.cutmix inf is out of range, allowed: 0 and above"),
        ({"mix_probability": 2.0}, "data.augment.mix_probability 2 is out of range, allowed: 0 to 1"),
        ({"mix_switch_probability": 2.0}, "data.augment.mix_switch_probability 2 is out of range"),
        ({"repeats": 0}, "data.augment.repeats 0 is out of range, allowed: 1 and above"),
        (
            {"crop_scale": (0.1, 1.0)},
            "data.augment.crop_scale belongs to data.augment.crop random_resized, not to null",
        ),
        (
            {"crop": "random", "crop_aspect": (1.0, 1.0)},
            "data.augment.crop_aspect belongs to data.augment.crop random_",
        ),
        ({"crop": "random_resized", "crop_scale": (0.5, 0.1)}, "data.augment.crop_scale [0.5, 0.1] is [low, high]"),
        ({"crop": "random_resized", "crop_scale": (0.5, 2.0)}, "data.augment.crop_scale 2 is out of range"),
        ({"crop": "random_resize"}, "unknown data.augment.crop 'random_resize'; did you mean 'random_resized'?"),
        *(
            (
                {"rand_augment": given},
                f"data.augment.rand_augment '{given}' is not a RandAugment of timm's ({why}); for ex",
            )
            for given, why in {
                "m9": "it begins with rand-",
                "rand": "it begins with rand-",
                "rand-": "'' is no part of one",
                "original-m9": "it begins with rand-",
                "rand-q9": "'q9' is no part of one",
                "rand-mfoo": "'mfoo' is no part of one",
                "rand-m9-x": "'x' is no part of one",
                "rand-m9-tnone": "'tnone' is no part of one",
                "rand-m9.5": "'m9.5' is no part of one",
                "rand-m9-inc2": "'inc2' is no part of one",
                "rand-m9-mstdinf": "'mstdinf' is no part of one",
                "rand-m9-m8": "'m8' is the second of its kind",
                "rand-n0-m9": "n is 1 to 15",
                "rand-n16-m9": "n is 1 to 15",
                "rand-n15-m9-t3aw": "n is 1 to 14",
                "rand-m11": "m is at most 10, or mmax",
                "rand-m99999": "'m99999' is no part of one",
                "rand-m9-mmax8": "m is at most 8, or mmax",
                "rand-m9-p0": "p is above 0, at most 1",
                "rand-m0-mmax0": "mmax is at least 1",
            }.items()
        ),
        (
            {"rand_augment": "rand-m9", "color_jitter": 0.3},
            "data.augment.color_jitter has no effect with data.augment.rand_augment: timm leaves it out then; set one",
        ),
    ],
)
def test_wrong_augmentations_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AugmentConfig(**arguments)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"crop_ratio": 0.0, "resize": "centre_crop"},
            "data.transform.crop_ratio 0 is out of range, allowed: above 0 to 1",
        ),
        (
            {"crop_ratio": 0.9},
            "data.transform.crop_ratio belongs to data.transform.resize centre_crop or data.augment.",
        ),
        ({"resize": "center_crop"}, "unknown data.transform.resize 'center_crop'; did you mean 'centre_crop'?"),
        ({"interpolation": "bicubik"}, "unknown data.transform.interpolation 'bicubik'; did you mean 'bicubic'?"),
    ],
)
def test_wrong_transforms_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        VisionDataModule("vtab/dtd", transform=TransformConfig(**arguments))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_hidden": 0}, "model.head_hidden 0 is out of range, allowed: 1 and above"),
        ({"input_attention": "siman"}, "unknown model.input_attention 'siman'; did you mean 'simam'?"),
    ],
)
def test_wrong_model_arguments_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("group", "arguments", "message"),
    [
        (OptimizerConfig, {"eps": 0.0}, "model.optimizer.eps 0 is out of range, allowed: above 0"),
        (
            OptimizerConfig,
            {"name": "sgd", "momentum": 1.0},
            "model.optimizer.momentum 1 is out of range, allowed: 0 to",
        ),
        (OptimizerConfig, {"momentum": 0.8}, "model.optimizer.momentum is not a setting of model.optimizer.name adamw"),
        (
            OptimizerConfig,
            {"name": "sgd", "eps": 1e-7},
            "model.optimizer.eps is not a setting of model.optimizer.name sgd",
        ),
        (OptimizerConfig, {"name": "adam"}, "unknown model.optimizer.name 'adam'; did you mean 'adamw'?"),
        (ScheduleConfig, {"warmup_learning_rate": -1.0}, "model.schedule.warmup_learning_rate -1 is out of range"),
        (
            ScheduleConfig,
            {"cosine_start": "run"},
            "unknown model.schedule.cosine_start 'run'; did you mean 'run_start'?",
        ),
        (ScheduleConfig, {"interval": "epochs"}, "unknown model.schedule.interval 'epochs'; did you mean 'epoch'?"),
        (ScheduleConfig, {"cooldown_epochs": -1}, "model.schedule.cooldown_epochs -1 is out of range"),
        (EMAConfig, {"decay": 1.0}, "model.ema.decay 1 is out of range, allowed: above 0 to below 1"),
        (EMAConfig, {"evaluate": True}, "model.ema.evaluate needs averaged weights: set model.ema.decay, e.g. 0.9999"),
    ],
)
def test_wrong_settings_of_a_group_are_named(group: type, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        group(**arguments)
    assert str(caught.value).startswith(message)


# --- recipe files, through the front door ----------------------------------------------------------------------------


def recipe(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", f"configs/recipes/{name}.yaml")]


def parsed(*argv: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(run("fit", *argv, "--print_config").out)
    return values


def test_each_data_set_has_its_recipe() -> None:
    found = {path.relative_to(RECIPES).as_posix() for path in RECIPES.rglob("*") if path.is_file()}
    folders = ("svp-hta", "vpt-fgvc", "mambapeft-vtab")
    assert found == {f"{folder}/common.yaml" for folder in folders} | {f"svp-hta/{name}.yaml" for name in ids}


@pytest.mark.parametrize("row", HTA, ids=ids)
def test_the_recipe_of_svp_says_what_was_released(row: tuple[Any, ...]) -> None:
    name, listed, decay, shared, mixed, attention, hidden = row[:7]
    values = parsed("--config", f"configs/hta/{name}.yaml", *recipe("svp-hta/common", f"svp-hta/{name}"))
    model, data, trainer = (dict(flat(values[section])) for section in ("model", "data", "trainer"))
    expected = {
        "learning_rate": pytest.approx(listed * 96 / 512, rel=1e-12),
        "weight_decay": decay,
        "optimizer.name": "adamw",
        "optimizer.betas": [0.9, 0.999],
        "optimizer.eps": 1e-8,
        "warmup_epochs": 5,
        "schedule.warmup_learning_rate": 1e-5,
        "schedule.min_learning_rate": 1e-5,
        "schedule.interval": "epoch",
        "schedule.cosine_start": "run_start",
        "schedule.cooldown_epochs": 0,
        "label_smoothing": 0.1,
        "frozen_mode": "train",
        "drop_path": 0.1,
        "ema.decay": 0.99996,
        "ema.evaluate": False,
        "head_hidden": 192 if hidden else None,
        "input_attention": "simam" if attention else None,
        "method.class_path": "svp_bench.methods.svp.SVP",
        "method.init_args.share_layers": shared,
        "method.init_args.hidden_dim": 64,
        "method.init_args.variant": "released",
    }
    assert {key: model[key] for key in expected} == expected
    expected = {
        "batch_size": 96,
        "eval_batch_size": 144,
        "drop_last": True,
        "transform.resize": "centre_crop",
        "transform.crop_ratio": 0.875,
        "transform.interpolation": "bicubic",
        "augment.crop": "random_resized",
        "augment.crop_scale": [0.08, 1.0],
        "augment.crop_aspect": [pytest.approx(3 / 4), pytest.approx(4 / 3)],
        "augment.flip": 0.5,
        "augment.rand_augment": "rand-m9-mstd0.5-inc1",
        "augment.color_jitter": 0.0,
        "augment.random_erasing": 0.25,
        "augment.mixup": 0.8 if mixed else 0.0,
        "augment.cutmix": 1.0 if mixed else 0.0,
        "augment.mix_probability": 1.0,
        "augment.mix_switch_probability": 0.5,
        "augment.repeats": 1,
    }
    assert {key: data[key] for key in expected} == expected
    assert (trainer["max_epochs"], trainer["gradient_clip_val"], trainer["precision"]) == (100, None, "32-true")
    made = VisionDataModule.from_config(values["data"])  # and its values fit together
    assert made.num_classes == row[7]
    assert made.augment.mixes == mixed
    assert (made.eval_transform.resize, made.augment.random_erasing) == ("centre_crop", 0.25)


def test_the_recipe_of_vpt_says_what_was_released() -> None:
    values = parsed(
        "--config", CONFIG, "--method", "vpt_deep", *recipe("vpt-fgvc/common"), "--model.learning_rate", "5"
    )
    model, data, trainer = values["model"], values["data"], values["trainer"]
    assert (model["optimizer"]["name"], model["optimizer"]["momentum"], model["learning_rate"]) == ("sgd", 0.9, 5.0)
    assert (model["drop_path"], model["frozen_mode"], model["label_smoothing"]) == (0.0, "eval", 0.0)
    assert data["transform"] == {"resize": "centre_crop", "interpolation": "bilinear", "crop_ratio": 0.875}
    assert (data["augment"]["crop"], data["augment"]["flip"], data["augment"]["mixup"]) == ("random", 0.5, 0.0)
    assert data["augment"]["rand_augment"] is None
    assert (trainer["max_epochs"], trainer["gradient_clip_val"]) == (100, None)
    VisionDataModule.from_config(data)


def test_the_recipe_of_mambapeft_says_what_was_released() -> None:
    values = parsed("--config", CONFIG, "--method", "linear", *recipe("mambapeft-vtab/common"))
    model, data, trainer = dict(flat(values["model"])), values["data"], values["trainer"]
    expected = {
        "optimizer.name": "adamw",
        "learning_rate": 1e-3,
        "weight_decay": 1e-4,
        "optimizer.betas": [0.9, 0.999],
        "warmup_epochs": 10,
        "schedule.warmup_start_factor": 0.001,
        "schedule.min_learning_rate": 1e-5,
        "label_smoothing": 0.0,
        "drop_path": 0.1,
        "frozen_mode": "train",
    }
    assert {key: model[key] for key in expected} == expected
    assert (data["batch_size"], trainer["max_epochs"], trainer["gradient_clip_val"]) == (32, 100, 5.0)
    assert VisionDataModule.from_config(data).augment == AugmentConfig()


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def test_a_run_of_a_recipe_is_repeatable_saved_and_predicts(place: Path) -> None:
    """SVP's recipe for CUB: crops, RandAugment, erasing, mixing, two-layer head, averaged weights."""
    given = small("--trainer.max_epochs", "2", *recipe("svp-hta/common", "svp-hta/cub200"), trainer__max_epochs=None)
    first, second = run(*given), run(*given)
    record = first.record
    assert record["status"] == "complete"
    assert record["parameters"]["head"] == 16 * 192 + 192 + 192 * 100 + 100
    assert record["correct"] == second.record["correct"]
    saved = torch.load(first.folder / "checkpoints" / "last.ckpt", weights_only=True)
    again = torch.load(second.folder / "checkpoints" / "last.ckpt", weights_only=True)
    for part in ("state_dict", "ema"):
        assert saved[part].keys() == again[part].keys()
        assert all(torch.equal(saved[part][name], again[part][name]) for name in saved[part])
    assert {f"model.{name}" for name in saved["ema"]} == set(saved["state_dict"])
    assert not torch.equal(saved["ema"]["head.1.weight"], saved["state_dict"]["model.head.1.weight"])
    module = AdaptationModule.load_from_checkpoint(first.folder / "checkpoints" / "last.ckpt")
    assert torch.equal(module.model.head[1].weight, saved["state_dict"]["model.head.1.weight"])
    make_image(width=300, height=200).save("image.png")
    out = run("predict", "--ckpt", str(first.folder / "checkpoints" / "last.ckpt"), "--images", "image.png").out
    with torch.inference_mode():
        seen = EvalTransform(32, "centre_crop")(make_image(width=300, height=200))
        best = module(torch.from_numpy(seen)[None]).softmax(dim=-1).max()
    assert f"{best.item():.4f}" in out  # of the centre crop, as in the test


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="no signals to send oneself")
def test_a_run_of_a_recipe_that_was_stopped_goes_on_to_the_same_weights(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = recipe("svp-hta/common", "svp-hta/cifar100")
    given = small("--trainer.max_epochs", "2", "--model.ema.decay", "0.5", *names, trainer__max_epochs=None)
    whole = run(*given)
    real, seen = AdaptationModule.training_step, []

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch_idx)
        if len(seen) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationModule, "training_step", training_step)
        stopped = run(*given)
    assert len(seen) == 6  # of eight
    again = run(*given, "--resume")
    assert again.folder == stopped.folder
    one, other = (torch.load(o.folder / "checkpoints" / "last.ckpt", weights_only=True) for o in (whole, again))
    for part in ("state_dict", "ema"):
        assert all(torch.equal(one[part][name], other[part][name]) for name in one[part])


def test_averaged_weights_are_evaluated_where_asked_and_survive_the_checkpoint(place: Path) -> None:
    average = ["--model.ema.decay", "0.5", "--model.learning_rate", "0.1", "--no_test"]
    outcome = run(*small(*average, "--model.ema.evaluate", "true", "--method", "linear"))
    path = outcome.folder / "checkpoints" / "last.ckpt"
    module = AdaptationModule.load_from_checkpoint(path)
    saved = torch.load(path, weights_only=True)
    images = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8)
    with torch.inference_mode():
        seen = module(images)
        module.load_state_dict({f"model.{k}": v for k, v in saved["ema"].items()}, strict=False)
        module.ema_config = EMAConfig(0.5)
        assert torch.equal(module(images), seen)
        module.load_state_dict(saved["state_dict"], strict=False)
        assert not torch.equal(module(images), seen)
    scored = run("test", "--config", str(outcome.folder / "config.yaml"), "--ckpt_path", str(path))
    assert "top-1" in scored.out
    other = ["test", "--config", str(outcome.folder / "config.yaml"), "--ckpt_path", str(path)]
    text = assert_error(command(*other, "--model.ema.decay", "0.6"), 1)
    assert "the checkpoint was trained with ema_decay = 0.5, this run has 0.6" in text


def test_a_flat_config_of_an_older_version_has_the_digests_of_today(place: Path) -> None:
    for extra in ((), recipe("svp-hta/common", "svp-hta/cub200"), recipe("vpt-fgvc/common")):
        config = run(*small("--method", "svp", "--no_test", *extra)).record["config"]
        older = {key: dict(value) if key in ("model", "data") else value for key, value in config.items()}
        values = dict(flat(config))
        for group in ("model.optimizer", "model.schedule", "model.ema", "data.transform", "data.augment"):
            section, name = group.split(".")
            del older[section][name]
        for old, (key, default) in MOVED.items():
            section, name = old.split(".")
            older[section][name] = None if values[key] == default and name != "betas" else values[key]
        older["model"]["head"], older["data"]["allow_overlap"] = None, None
        older["data"].pop("cross_validation")
        for name in ("resize", "interpolation"):
            if not extra:  # nulls stood for the protocol's
                older["data"][name] = None
        grouped = group_settings(older)
        assert cell_config(grouped) == cell_config(config)
        assert (config_digest(grouped), setting_digest(grouped)) == (config_digest(config), setting_digest(config))
        assert group_settings(grouped) == grouped
