"""Prompts in the pixels: VP's frame and patch, AutoVP's resized image in a border."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import reference_vim
import torch
import torch.nn.functional as F
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods import create_model
from svp_bench.methods.base import Method
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.pixels import VP, AutoVP
from svp_bench.models import Backbone, MambaRegister, VisionMamba

SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 5}
METHODS = [VP(), VP("patch", 9), AutoVP(), AutoVP(1.5, train_scale=False)]


def adapted(method: Method) -> tuple[Backbone, dict[str, Tensor], Tensor]:
    """A random backbone with a method, its state in float64, and images."""
    model = adapt(VisionMamba(**SIZES).eval(), method)
    reference_vim.fill(model)
    return model, {n: p.detach().double() for n, p in model.named_parameters()}, reference_vim.make_images(2, 3, 48, 64)


def frame(delta: Tensor, width: int) -> Tensor:
    """The frame (3, 48, 64), pixel by pixel: the rows above and below, then those at the left and at the right."""
    places = [(y, x) for y in range(width) for x in range(64)]
    places += [(y, x) for y in range(48 - width, 48) for x in range(64)]
    places += [(y, x) for y in range(width, 48 - width) for x in range(width)]
    places += [(y, x) for y in range(width, 48 - width) for x in range(64 - width, 64)]
    prompt = torch.zeros(3, 48, 64, dtype=delta.dtype)
    for at, (y, x) in enumerate(places):
        prompt[:, y, x] = delta[:, at]
    assert delta.shape == (3, len(places))
    return prompt


@pytest.mark.parametrize("width", [None, 1, 23])
def test_vp_is_its_formula(width: int | None) -> None:
    model, state, images = adapted(VP(width=width))
    prompt = frame(state["adapter.delta"], 6 if width is None else width)
    expected = reference_vim.logits(state, images.double() + prompt, stride=16)
    assert relative_error(model(images), expected) <= BACKBONE.forward
    assert relative_error(reference_vim.logits(state, images.double(), stride=16), expected) > 1e-3


def test_a_patch_stands_in_the_upper_left_corner() -> None:
    model, state, images = adapted(VP("patch", 9))
    prompted = images.double()
    for at in range(81):
        prompted[:, :, at // 9, at % 9] += state["adapter.delta"][:, at]
    assert relative_error(model(images), reference_vim.logits(state, prompted, stride=16)) <= BACKBONE.forward


def surrounded(images: Tensor, delta: Tensor, rows: int, columns: int) -> Tensor:
    """Images (B, 3, H, W) resized by torch to rows × columns, in the middle of AutoVP's border."""
    mean = torch.tensor([0.485, 0.456, 0.406], dtype=delta.dtype).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225], dtype=delta.dtype).view(3, 1, 1)
    border = (1 / (1 + torch.exp(-delta)) - mean) / std
    made = border.expand(len(images), -1, -1, -1).clone()
    top, left = (images.shape[2] - rows) // 2, (images.shape[3] - columns) // 2
    small = F.interpolate(images, (rows, columns), mode="bilinear", antialias=True)
    made[:, :, top : top + rows, left : left + columns] = small
    return made


@pytest.mark.parametrize(("scale", "rows", "columns"), [(1.0, 24, 32), (0.5, 12, 16), (1.25, 30, 40)])
def test_auto_vp_is_its_formula(scale: float, rows: int, columns: int) -> None:
    model, state, images = adapted(AutoVP(train_scale=False, scale=scale, side=24))
    prompted = surrounded(images.double(), state["adapter.delta"], rows, columns)
    expected = reference_vim.logits(state, prompted, stride=16)
    assert relative_error(model(images), expected) <= BACKBONE.forward
    assert relative_error(reference_vim.logits(state, images.double(), stride=16), expected) > 1e-2


def test_auto_vps_scale_has_the_gradient_of_the_resized_image() -> None:
    model, _, images = adapted(AutoVP())
    border, step = copy.deepcopy(model.adapter).double(), 1e-5  # type: ignore[union-attr]
    cotangent = reference_vim.make_images(2, 3, 48, 64).flip(0).double()

    def at(scale: float) -> Tensor:
        with torch.no_grad():
            border.scale.fill_(scale)  # type: ignore[operator, union-attr]
        return (border.surround(images.double()) * cotangent).sum()  # type: ignore[operator, union-attr]

    for scale in (0.83, 1.0, 1.9):
        (gradient,) = torch.autograd.grad(at(scale), border.scale)  # type: ignore[arg-type]
        difference = (at(scale + step) - at(scale - step)) / (2 * step)
        assert gradient.item() == pytest.approx(difference.item(), rel=1e-4)


def test_auto_vp_at_full_size_is_the_image_and_beyond_it_a_part() -> None:
    model, _, images = adapted(AutoVP(side=48))
    border: Any = model.adapter
    with torch.no_grad():
        border.scale.fill_(1.0)
        assert relative_error(border.surround(images), images) <= SAME_MATHS
        border.scale.fill_(2.0)
        zoomed = F.interpolate(images, scale_factor=2.0, mode="bilinear")[:, :, 24:72, 32:96]
        assert relative_error(border.surround(images), zoomed) <= SAME_MATHS
        border.scale.fill_(9.0)  # limited to 5
        limited = border.surround(images)
        border.scale.fill_(5.0)
        assert torch.equal(border.surround(images), limited)


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"method": "vp"}, 69_840),
        ({"method": "vp", "shape": "patch", "width": 50}, 7_500),
        ({"method": "auto_vp"}, 150_529),
        ({"method": "auto_vp", "train_scale": False}, 150_528),
    ],
    ids=str,
)
def test_counts_on_vim_small(arguments: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=2, **arguments)
    assert model.method.adapter_parameters(model) == count
    assert sum(p.numel() for n, p in trained_parameters(model).items() if n.startswith("adapter.")) == count


def test_auto_vp_has_the_published_number_of_border_pixels() -> None:
    model = adapt(VisionMamba(img_size=224, embed_dim=8, depth=1, d_state=2, num_classes=2), AutoVP())
    border: Any = model.adapter
    border.surround(torch.zeros(1, 3, 224, 224)).sum().backward()
    assert border.delta.grad.count_nonzero() == 101_376


def backbone(family: str) -> Backbone:
    if family == "mambar":
        made: Backbone = MambaRegister(registers=2, reduction=2, **SIZES)
    else:
        made = create_backbone("vit_nano_patch8_64" if family == "vit" else "vim_nano_patch8_64", num_classes=5)
    if family == "mambar":
        reference_vim.fill(made)
    return made


@pytest.mark.parametrize("family", ["vim", "mambar", "vit"])
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_every_trained_tensor_gets_a_gradient_in_each_family(method: Method, family: str) -> None:
    torch.manual_seed(0)
    model = adapt(backbone(family), copy.deepcopy(method)).train()
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=1e-2)
    images = reference_vim.make_images(3, 3, *model.image_size)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
        assert not name.startswith("adapter.") or not model.method.decays(name)


def test_the_border_has_the_backbones_normalisation() -> None:
    model = adapt(create_backbone("vim_nano_patch8_64", num_classes=5), AutoVP())
    border: Any = model.adapter
    with torch.no_grad():
        corner = border.surround(torch.zeros(1, 3, 64, 64))[0, :, 0, 0]
    cfg: Any = model.pretrained_cfg
    for value, mean, std in zip(corner, cfg["mean"], cfg["std"], strict=True):
        assert value.item() == pytest.approx((0.5 - mean) / std)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "vp", "width": 32}, "vp: width must be at most 31 for 64x64 images, not 32"),
        ({"method": "vp", "width": 0}, "vp: width must be at least 1, not 0"),
        ({"method": "vp", "shape": "patch", "width": 65}, "vp: width must be at most 64 for 64x64 images, not 65"),
        ({"method": "vp", "shape": "circle"}, "vp: shape must be one of frame, patch, not 'circle'"),
        ({"method": "auto_vp", "scale": 0.01}, r"auto_vp: scale must be in \[0.1, 5\], not 0.01"),
        ({"method": "auto_vp", "side": 65}, "auto_vp: side must be at most 64 for 64x64 images, not 65"),
        ({"method": "auto_vp", "scale": 2.0, "train_scale": False}, "auto_vp: at the fixed scale 2.0 the image leaves"),
    ],
    ids=str,
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model("vim_nano_patch8_64", num_classes=2, **arguments)
    assert "\n" not in str(caught.value)
