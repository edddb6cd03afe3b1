"""Augmentation as a pure function of (seed, epoch, image): no worker, process or resumed run changes a pixel.

timm and torchvision draw from three global random states (Python's, numpy's, torch's). Here these are seeded anew for
each image or step, from its key, and restored afterwards.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import Mixup, auto_augment, rand_augment_transform
from timm.data.constants import IMAGENET_DEFAULT_MEAN
from timm.data.mixup import cutmix_bbox_and_lam
from timm.data.random_erasing import RandomErasing
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision.transforms import v2  # type: ignore[import-untyped]

from svp_bench.core.errors import ConfigError
from svp_bench.core.ranges import check_one_of, check_range
from svp_bench.data.transforms import EvalTransform, shorter_side, to_array


class _Draw(IntEnum):
    """Random quantities, each with its own stream."""

    IMAGE = 1
    ERASING = 2
    MIXING = 3


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Seed Python's, numpy's and torch's (CPU) random states from a key of whole numbers; restore them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002  # the state that timm draws from
    words = np.random.SeedSequence(key).generate_state(6)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:4])  # noqa: NPY002
    torch.default_generator.manual_seed(
        int(words[4]) << 31 | int(words[5]) >> 1
    )  # not torch.cuda's: nothing draws there
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


@dataclass(frozen=True)
class AugmentConfig:
    """Settings of the random changes of training images; none by default.

    What chance does to an image depends on (seed, epoch, position, repetition) alone. Flips and crops change what some
    tasks ask for (VTAB's structured ones).

    Attributes:
        crop: random_resized (a rectangle of random area and aspect ratio, resized to the square; Inception's) or random
            (shorter side to image_size / crop_ratio, then a random square, as in VPT's FGVC recipe); null for none: an
            image is resized as in evaluation.
        crop_scale: Range of the area of random_resized, as a share of the image (timm's, as Inception's).
        crop_aspect: Range of its width / height.
        flip: Probability of a horizontal flip.
        rand_augment: RandAugment (Cubuk et al., 2020) by a specification of timm's, e.g. rand-m9-mstd0.5-inc1; null for
            none. Uncovered pixels take ImageNet's mean colour.
        color_jitter: Range of brightness, contrast and saturation, factors of 1 ± this. Refused with rand_augment: timm
            would ignore it silently.
        random_erasing: Probability that a rectangle becomes noise (timm's mode "pixel"), on the device, after
            normalisation.
        mixup: α of mixup (Zhang et al., ICLR 2018): each training batch is mixed with its mirror image, λ from
            Beta(α, α); 0 for none.
        cutmix: α of cutmix (Yun et al., ICCV 2019), 0 for none; with both, each batch gets one of them.
        mix_probability: That a batch is mixed, if mixup or cutmix is on.
        mix_switch_probability: That it is by cutmix, if both are on.
        repeats: Times that each training image appears in a row, otherwise augmented, in an epoch of unchanged length
            (repeated augmentation).

    Raises:
        ConfigError: If a value is out of range, timm does not understand the specification, or two settings exclude
            each other.
    """

    crop: Literal["random", "random_resized"] | None = None
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_aspect: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.0
    rand_augment: str | None = None
    color_jitter: float = 0.0
    random_erasing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    mix_switch_probability: float = 0.5
    repeats: int = 1

    def __post_init__(self) -> None:
        check_one_of("data.augment.crop", self.crop, ("random", "random_resized"))
        for name in ("flip", "color_jitter", "random_erasing", "mix_probability", "mix_switch_probability"):
            check_range(f"data.augment.{name}", getattr(self, name), "[0, 1]")
        for name in ("mixup", "cutmix"):
            check_range(f"data.augment.{name}", getattr(self, name), "[0, inf)")
        check_range("data.augment.repeats", self.repeats, "[1, inf)")
        for name, high in (("crop_scale", "1]"), ("crop_aspect", "inf)")):
            low, top = values = getattr(self, name)
            for value in values:
                check_range(f"data.augment.{name}", value, f"(0, {high}")
            if low > top:
                raise ConfigError(f"data.augment.{name} {[low, top]} is [low, high], with low not above high")
            if self.crop != "random_resized" and values != getattr(AugmentConfig, name):
                given = self.crop or "null"
                raise ConfigError(f"data.augment.{name} belongs to data.augment.crop random_resized, not to {given}")
        if self.rand_augment is not None:
            if self.color_jitter:
                raise ConfigError(
                    "data.augment.color_jitter has no effect with data.augment.rand_augment: timm leaves it out then; "
                    "set one of them"
                )
            _rand_augment(self.rand_augment, {})

    @property
    def changes_images(self) -> bool:
        """Whether images are changed one by one, before they are batched."""
        return bool(self.crop or self.flip or self.rand_augment is not None or self.color_jitter)

    @property
    def mixes(self) -> bool:
        """Whether batches are mixed."""
        return (self.mixup > 0 or self.cutmix > 0) and self.mix_probability > 0


# Each part of a specification, and its bounds. timm ignores unknown parts silently.
_WHOLE, _FRACTION = r"[0-9]{1,4}", r"[0-9]{1,4}(?:\.[0-9]+)?"
_PARTS = {"m": _WHOLE, "n": _WHOLE, "p": _FRACTION, "mstd": _FRACTION, "mmax": _WHOLE, "inc": "[01]"}
_SETS = r"t(?:weights|3a|3aw)"
_TOP = 10  # timm's greatest magnitude, without mmax


def _rand_augment(specification: str, settings: dict[str, Any]) -> Any:
    """Return timm's RandAugment of a specification.

    Args:
        specification: rand, then -m9 (magnitude), -n2 (layers), -p0.5 (probability of each), -mstd0.5 (deviation of the
            magnitude), -mmax10 (its greatest), -inc1 (harder with the magnitude), -tweights, -t3a or -t3aw (which
            operations), in any order.
        settings: timm's settings of the operations.

    Raises:
        ConfigError: If a part is unknown, given twice or out of range.
    """
    values: dict[str, float] = {}
    problem = None
    head, *parts = specification.split("-")
    for part in parts:
        match = re.fullmatch(r"(?P<key>[a-z]+)(?P<value>[0-9].*)", part)
        key = match["key"] if match else ""
        if re.fullmatch(_SETS, part) and hasattr(auto_augment, "rand_augment_choices"):
            key, value = "t", 0.0
        elif match and key in _PARTS and re.fullmatch(_PARTS[key], match["value"]):
            value = float(match["value"])
        else:
            problem = f"{part!r} is no part of one"
            break
        if key in values:
            problem = f"{part!r} is the second of its kind"
        values[key] = value
    top = values.get("mmax", _TOP)
    if head != "rand" or not parts:
        problem = "it begins with rand-"
    elif problem is None and values.get("m", _TOP) > top:
        problem = f"m is at most {top:g}, or mmax"
    elif problem is None and not 0 < values.get("p", 1) <= 1:
        problem = "p is above 0, at most 1"
    elif problem is None and top < 1:
        problem = "mmax is at least 1"
    if problem is None:
        transform = rand_augment_transform(specification, settings)
        weights = transform.choice_weights
        most = len(transform.ops) if weights is None else int(np.count_nonzero(weights))
        if 1 <= values.get("n", 1) <= most:
            return _guarded(transform)
        problem = f"n is 1 to {most}"
    raise ConfigError(
        f"data.augment.rand_augment {specification!r} is not a RandAugment of timm's ({problem}); for example: "
        "rand-m9-mstd0.5-inc1"
    )


def _guarded(transform: Any) -> Any:
    """Let posterize keep no bits, as timm asks for at the greatest magnitudes: Pillow refuses that from version 13."""
    for operation in transform.ops:
        if operation.aug_fn is auto_augment.posterize:
            operation.aug_fn = _posterize
    return transform


def _posterize(image: Image.Image, bits: int, **settings: object) -> Image.Image:
    """Keep the `bits` highest bits of each channel; none of them is black, as before Pillow 13."""
    return Image.new(image.mode, image.size) if bits < 1 else auto_augment.posterize(image, bits, **settings)


class Augmenter:
    """Applies random changes to single images.

    Args:
        augment: The changes.
        transform: Brings an image to its size where no random crop does.
        seed: Of all draws.
    """

    def __init__(self, augment: AugmentConfig, transform: EvalTransform, seed: int) -> None:
        self.needs_original = augment.crop is not None
        self._seed = seed
        steps: list[object] = []
        interpolation = transform.interpolation
        side = transform.side(f"data.augment.crop {augment.crop}") if augment.crop else 0
        if augment.crop == "random_resized":
            scale, aspect = augment.crop_scale, augment.crop_aspect
            steps.append(RandomResizedCropAndInterpolation(side, scale, aspect, interpolation))
        elif augment.crop == "random":
            steps.append(v2.Resize(shorter_side(side, transform.crop_ratio), v2.InterpolationMode(interpolation)))
            steps.append(v2.RandomCrop(side))
        if augment.flip:
            steps.append(v2.RandomHorizontalFlip(augment.flip))
        if augment.rand_augment is not None:  # the settings that timm's own training transforms pass on
            fill = tuple(min(255, round(255 * x)) for x in IMAGENET_DEFAULT_MEAN)
            settings = {
                "translate_const": int(min(transform.sides) * 0.45),
                "img_mean": fill,
                "interpolation": Image.Resampling[interpolation.upper()],
            }
            steps.append(_rand_augment(augment.rand_augment, settings))
        if augment.color_jitter:
            steps.append(v2.ColorJitter(*[augment.color_jitter] * 3))
        self._steps = steps

    def __call__(self, image: Image.Image, epoch: int, index: int, copy: int) -> npt.NDArray[np.uint8]:
        """Return an RGB image, augmented.

        Args:
            image: As stored if `needs_original`, else at the transform's size.
            epoch: The epoch.
            index: Position of the image in its list.
            copy: How many times it came before in this epoch.

        Returns:
            uint8 (3, size, size), contiguous.
        """
        with seeded(self._seed, _Draw.IMAGE, epoch, index, copy):
            for step in self._steps:
                image = step(image)  # type: ignore[operator]
        return to_array(image)


def erase(
    images: Tensor, probability: float, seed: int, epoch: int, index: list[int], copies: list[int] | None = None
) -> Tensor:
    """Random erasing (Zhong et al., AAAI 2020) in place: a rectangle of normal noise, mode "pixel" of timm's.

    It belongs after normalisation, for which the noise is of the images' own scale. The noise is sampled on the CPU, so
    that an image is the same on every device.

    Args:
        images: Normalised float (B, 3, H, W), on any device.
        probability: That an image is changed.
        seed: Of all draws.
        epoch: The epoch.
        index: Positions of the B images in their list.
        copies: How many times each came before in this epoch; 0 if None.

    Returns:
        `images`.
    """
    erasing = RandomErasing(probability, mode="pixel", device="cpu")
    for image, position, copy in zip(images, index, copies or [0] * len(index), strict=True):
        with seeded(seed, _Draw.ERASING, epoch, position, copy):
            erasing(image)
    return images


@dataclass(frozen=True)
class Mix:
    """How the images of one step are mixed.

    Attributes:
        share: λ, what an image keeps of itself (cutmix: of its area).
        box: (top, bottom, left, right) of what cutmix takes from the partner, in pixels; None for mixup.
    """

    share: float
    box: tuple[int, int, int, int] | None = None


def draw_mix(augment: AugmentConfig, seed: int, epoch: int, step: int, height: int, width: int) -> Mix:
    """Return the mix of one optimizer step, a pure function of its arguments; one draw for a whole batch.

    Args:
        augment: Mixup and cutmix (timm's mode "batch").
        seed: Of all draws.
        epoch: The epoch.
        step: The optimizer step within the epoch.
        height: Of the images, in pixels.
        width: Of the images, in pixels.
    """
    switch = augment.mix_switch_probability
    timm_mixup = Mixup(augment.mixup, augment.cutmix, prob=augment.mix_probability, switch_prob=switch)
    with seeded(seed, _Draw.MIXING, epoch, step):
        share, by_cutmix = timm_mixup._params_per_batch()
        if not by_cutmix or share == 1:
            return Mix(float(share))
        box, share = cutmix_bbox_and_lam((height, width), share)
    top, bottom, left, right = map(int, box)
    return Mix(float(share), (top, bottom, left, right))


def mirror(values: Tensor) -> Tensor:
    """Return each entry's neighbour of the same pair: 1, 0, 3, 2, ...; a last one without a neighbour stays itself.

    Args:
        values: (B, ...), as `GlobalBatchSampler(pairs=True)` orders a batch.
    """
    partner = torch.arange(len(values), device=values.device) ^ 1
    return values[partner.clamp(max=len(values) - 1)]


def mix(images: Tensor, parameters: Mix) -> Tensor:
    """Mix each image with its neighbour of the pair (`mirror`).

    Args:
        images: Float (B, 3, H, W), the pairs side by side.
        parameters: The mix of this step.

    Returns:
        Float (B, 3, H, W): λ x + (1 - λ) x' for mixup, x with a box of x' for cutmix.
    """
    if parameters.share == 1:
        return images
    if parameters.box is None:
        return images * parameters.share + mirror(images) * (1 - parameters.share)
    top, bottom, left, right = parameters.box
    mixed = images.clone()
    mixed[:, :, top:bottom, left:right] = mirror(images)[:, :, top:bottom, left:right]
    return mixed


def soft_targets(labels: Tensor, classes: int, parameters: Mix) -> Tensor:
    """Return the targets of mixed images, float (B, classes): λ of an image's own class, 1 - λ of its partner's."""
    own = F.one_hot(labels, classes).float()
    return own * parameters.share + mirror(own) * (1 - parameters.share)
