"""Partial fine-tuning: biases, other tensors, the last blocks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import reference_vim
import torch
from tolerances import BACKBONE, relative_error

from svp_bench.core.errors import ConfigError
from svp_bench.methods import create_model
from svp_bench.methods.base import Method
from svp_bench.methods.bias import Bias
from svp_bench.methods.build import adapt
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.partial import LastBlocks, Partial
from svp_bench.models import VisionMamba

# (3, 48, 64) images: width 32, inner width 64, 4 states
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
ALL_BIASES = r"layers\.\d\.mixer\.(conv1d|dt_proj)(_b)?\.bias|patch_embed\.proj\.bias"


def trained(method: Method) -> tuple[VisionMamba, set[str]]:
    model = VisionMamba(**SIZES)
    adapt(model, method)
    names = {name for name in trained_parameters(model) if not name.startswith("head.")}
    assert model.adapter is None
    return model, names


@pytest.mark.parametrize(
    ("method", "pattern", "count"),
    [
        (Bias(), r"layers\.\d\.mixer\.dt_proj(_b)?\.bias", 6),
        (Bias(["conv1d"]), r"layers\.\d\.mixer\.conv1d(_b)?\.bias", 6),
        (Bias(["patch_embed"]), r"patch_embed\.proj\.bias", 1),
        (Bias(["dt_proj", "conv1d", "patch_embed"]), ALL_BIASES, 13),
        (Partial(["bias"]), ALL_BIASES, 13),
        (Partial(["A_log"]), r"layers\.\d\.mixer\.A(_b)?_log", 6),
        (Partial(["D"]), r"layers\.\d\.mixer\.D(_b)?", 6),
        (Partial(["conv1d.weight"]), r"layers\.\d\.mixer\.conv1d(_b)?\.weight", 6),
        (Partial(["norm"]), r"layers\.\d\.norm\.weight|norm_f\.weight", 4),
        (Partial(["cls_token", "pos_embed"]), "cls_token|pos_embed", 2),
        (LastBlocks(2), r"layers\.[12]\..*|norm_f\.weight", 1 + 2 * 17),
    ],
    ids=repr,
)
def test_exactly_these_tensors_train_and_all_get_a_gradient(method: Method, pattern: str, count: int) -> None:
    model, names = trained(method)
    expected = {n for n, _ in model.named_parameters() if re.fullmatch(pattern, n)}
    assert names == expected
    assert len(names) == count
    reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, 48, 64)
    logits = model.eval()(images)
    state = {n: value.double() for n, value in model.state_dict().items()}
    assert relative_error(logits, reference_vim.logits(state, images.double(), stride=16)) <= BACKBONE.forward
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"method": "bias"}, 36_864),
        ({"method": "bias", "which": ["dt_proj", "conv1d", "patch_embed"]}, 74_112),
        ({"method": "partial", "tensors": ["cls_token"]}, 384),
        ({"method": "partial", "tensors": ["pos_embed"]}, 75_648),
        ({"method": "partial", "tensors": ["D"]}, 36_864),
        ({"method": "partial", "tensors": ["A_log"]}, 589_824),
        ({"method": "partial", "tensors": ["conv1d.weight"]}, 147_456),
    ],
    ids=str,
)
def test_published_counts_on_vim_small(arguments: dict[str, Any], count: int) -> None:
    """MambaPEFT's table on VTAB-1k with Vim-S (Yoshimura et al., ICLR 2025), without the head."""
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=10, **arguments)
    names = trained_parameters(model)
    assert sum(p.numel() for n, p in names.items() if not n.startswith("head.")) == count


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Bias(["dt_prj"]), r"unknown layer with a bias 'dt_prj'; did you mean 'dt_proj'\?"),
        (Bias(["norm"]), "unknown layer with a bias 'norm'"),
        (Bias("conv1d"), "bias: which must be a list"),  # type: ignore[arg-type]
        (Bias([]), "bias: which must be distinct, and at least one of "),
        (Bias(["conv1d", "conv1d"]), "bias: which must be distinct"),
        (Partial(["A"]), "unknown tensor 'A'"),
        (Partial(["qkv.bias"]), "unknown tensor 'qkv.bias'.*vim has .*conv1d.bias"),
        (LastBlocks(4), "last_blocks: count must be one of 1, 2, 3, not 4"),
    ],
    ids=repr,
)
def test_unknown_tensors_are_refused(method: Method, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        trained(method)


def test_tensors_of_the_backbone_take_no_weight_decay() -> None:
    """A difference to the pre-trained tensor would decay to it; the tensor itself must not decay to zero."""
    assert not Partial(["conv1d.weight"]).decays("layers.0.mixer.conv1d.weight")
    assert Partial(["conv1d.weight"]).decays("head.weight")
    assert LastBlocks().decays("layers.2.mixer.in_proj.weight")
