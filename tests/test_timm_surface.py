"""timm's interface to a backbone, as its ViTs have it; what Vim does not offer is refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
import reference_vim
import timm
import torch
from timm.optim import param_groups_layer_decay
from tolerances import relative_error
from torch import Tensor, nn

import svp_bench.models  # noqa: F401  registers the backbones
from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import create_model
from svp_bench.models import VisionMamba


def nano(**arguments: Any) -> VisionMamba:
    torch.manual_seed(0)
    model: VisionMamba = timm.create_model("vim_nano_patch8_64", **arguments).eval()
    return model


def images(*sides: int) -> Tensor:
    return reference_vim.make_images(2, 3, *(sides or (64, 64)))


def test_features_only() -> None:
    net = timm.create_model("vim_nano_patch8_64", features_only=True).eval()
    assert [tuple(y.shape) for y in net(images())] == [(2, 64, 8, 8)] * 3
    assert net.feature_info.channels() == [64, 64, 64]
    assert net.feature_info.reduction() == [8, 8, 8]
    torch.manual_seed(0)
    chosen = timm.create_model("vim_nano_patch8_64", features_only=True, out_indices=(1, 4)).eval()
    wanted = nano().forward_intermediates(images(), indices=[1, 4], intermediates_only=True)
    assert len(chosen.model.layers) == 5  # what is behind the last is gone
    assert all(torch.equal(a, b) for a, b in zip(chosen(images()), wanted, strict=True))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("output_fmt", ["NCHW", "NLC"])
def test_forward_intermediates(norm: bool, output_fmt: str) -> None:
    model = nano(img_size=(48, 64))
    streams: list[Tensor] = []
    for block in [*model.layers][1:]:  # what the next block adds up
        block.norm.register_forward_pre_hook(lambda _, inputs: streams.append(inputs[0]))  # type: ignore[union-attr]
    final, taken = model.forward_intermediates(images(48, 64), norm=norm, output_fmt=output_fmt)
    assert len(taken) == 8
    assert relative_error(final, model.forward_features(images(48, 64))) <= 1e-6
    for stream, y in zip(streams, taken[:-1], strict=False):
        tokens = model.norm_f(stream) if norm else stream
        patches = torch.cat([tokens[:, :24], tokens[:, 25:]], dim=1)
        expected = patches.mT.reshape(2, 64, 6, 8) if output_fmt == "NCHW" else patches
        assert relative_error(y, expected) <= 1e-5
    assert relative_error(model.forward_head(final), model(images(48, 64))) <= 1e-6


def test_prefix_tokens_dicts_and_early_stops() -> None:
    model = nano()
    pairs = model.forward_intermediates(
        images(), 1, return_prefix_tokens=True, norm=True, output_fmt="NLC", intermediates_only=True
    )
    ((patches, cls),) = pairs
    assert patches.shape == (2, 64, 64)
    assert relative_error(cls[:, 0], model.forward_features(images())) <= 1e-6
    outputs = model.forward_intermediates(images(), [0, -1], return_prefix_tokens=True, output_dict=True)
    assert set(outputs) == {"image_features", "image_intermediates", "image_intermediates_prefix"}
    calls: list[int] = []
    model.layers[2].register_forward_hook(lambda *_: calls.append(1))
    (early,) = model.forward_intermediates(images(), [1], stop_early=True, intermediates_only=True)
    assert not calls
    assert torch.equal(early, model.forward_intermediates(images(), [1], intermediates_only=True)[0])
    (older,) = model.get_intermediate_layers(images(), [1], reshape=True)
    assert torch.equal(older, early)
    with pytest.raises(ConfigError, match=r"unknown output_fmt 'NHWC'.*NCHW"):
        model.forward_intermediates(images(), output_fmt="NHWC")  # type: ignore[arg-type]


def test_intermediates_of_adapted_models() -> None:
    for method in ("svp", "lora"):
        model = create_model("vim_nano_patch8_64", num_classes=3, method=method).eval()
        final, taken = model.forward_intermediates(images(), 2)
        assert [y.shape for y in taken] == [(2, 64, 8, 8)] * 2
        assert relative_error(model.forward_head(final), model(images())) <= 1e-6
    model = create_model("vim_nano_patch8_64", num_classes=3, method="vpt_shallow")
    with pytest.raises(ConfigError, match=r"inserts tokens \(73, not 65\)"):
        model.forward_intermediates(images())


def test_global_pool() -> None:
    assert nano(global_pool="token").global_pool == "token"
    nano().reset_classifier(3, "token")
    for pool in ("avg", "", "map"):
        with pytest.raises(ValueError, match=rf"'{pool}'.*only 'token'.*forward_tokens gives all tokens"):
            nano(global_pool=pool)
        with pytest.raises(ValueError, match="only 'token'"):
            nano().reset_classifier(3, pool)


@pytest.mark.parametrize("size", [(96, 96), (32, 128), (64, 64), 72])
def test_set_input_size(size: int | tuple[int, int]) -> None:
    model = nano()
    model.set_input_size(size)
    rows, columns = (size, size) if isinstance(size, int) else size
    fresh = nano(img_size=(rows, columns))
    state = fresh.state_dict() | {k: v for k, v in model.state_dict().items() if k != "pos_embed"}
    assert model.pos_embed.shape == fresh.pos_embed.shape
    assert model.cls_index == fresh.cls_index
    old = nano().pos_embed
    assert torch.equal(model.pos_embed[:, model.cls_index], old[:, 32])  # the class token's row is not interpolated
    fresh.load_state_dict(state | {"pos_embed": model.pos_embed})
    assert relative_error(model(images(rows, columns)), fresh(images(rows, columns))) <= 1e-6
    if size == (64, 64):
        assert torch.equal(model(images()), nano()(images()))
    with pytest.raises(ValueError, match=f"takes {rows}×{columns}"):
        model(images(40, 40))


def test_a_flat_grid_keeps_its_directions() -> None:
    """Positions that grow from left to right still do so when the grid becomes wider: 64 rows of another order."""
    model = nano()
    across = torch.arange(8.0).repeat(8)
    with torch.no_grad():
        model.pos_embed.copy_(torch.cat([across[:32], torch.tensor([99.0]), across[32:]])[None, :, None])
    model.set_input_size((32, 128))  # 4 × 16: as many patches
    at = model.cls_index
    grid = torch.cat([model.pos_embed[0, :at, 0], model.pos_embed[0, at + 1 :, 0]]).view(4, 16)
    assert model.pos_embed[0, at, 0] == 99
    assert (grid.diff(dim=1) > 0).all()
    assert grid.std(dim=0).max() < 0.05


def test_set_input_size_with_other_patches() -> None:
    model = nano()
    model.set_input_size((64, 64), patch_size=16)
    assert model.patch_embed.grid_size == (4, 4)
    assert model.patch_embed.proj.weight.shape == (64, 3, 16, 16)
    assert model.feature_info[0]["reduction"] == 16
    assert model(images()).isfinite().all()
    overlapping = timm.create_model("vim_tiny_patch16_stride8_224", img_size=48, depth=1)
    with pytest.raises(ConfigError, match=r"patch_size \(8, 8\).*stride 8"):
        overlapping.set_input_size(patch_size=8)
    with pytest.raises(ConfigError, match=r"4×4 is smaller than a patch of 8"):
        nano().set_input_size(4)


def test_sizes_and_blocks_are_changed_before_a_method() -> None:
    model = create_model("vim_nano_patch8_64", num_classes=3, method="vpt_deep")
    with pytest.raises(ConfigError, match="set_input_size: this model already carries a method"):
        model.set_input_size(96)
    with pytest.raises(ConfigError, match="prune_intermediate_layers: this model already carries"):
        model.prune_intermediate_layers(3)


def test_layer_wise_learning_rates() -> None:
    model = create_model("vim_nano_patch8_64", num_classes=3, method="full")
    groups = param_groups_layer_decay(model, layer_decay=0.5, no_weight_decay_list=tuple(model.no_weight_decay()))
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    scales = {name: scale[id(p)] for name, p in model.named_parameters()}
    assert scales["cls_token"] == scales["patch_embed.proj.weight"] < scales["layers.0.mixer.D"]
    assert scales["layers.0.mixer.D"] * 2 == scales["layers.1.norm.weight"]
    assert scales["layers.7.mixer.D"] <= scales["norm_f.weight"] <= scales["head.weight"] == 1
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(model.get_parameter("layers.3.mixer.A_log"))] == 0


def test_a_new_head_follows_the_model() -> None:
    model = nano().double()
    model.norm_f = nn.Identity()  # type: ignore[assignment]
    model.reset_classifier(4)
    assert isinstance(model.head, nn.Linear)
    assert model.head.weight.dtype == torch.float64
    assert not model.head.training
