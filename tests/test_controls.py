"""Adapter, offset and bias: each against its formula, its counts on Vim-S, and what follows from its place."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
import yaml
from helpers import assert_error, command, run, settle, small
from tolerances import BACKBONE, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods.adapter import ACTIVATIONS, Adapter
from svp_bench.methods.base import Method
from svp_bench.methods.bias import Bias
from svp_bench.methods.build import adapt, create_model
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.offset import Offset
from svp_bench.models import VisionMamba
from svp_bench.ops import backend_statuses

BACKENDS = [status.name for status in backend_statuses() if status.available]
BIASES = ("dt_proj", "conv1d", "patch_embed")
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
STRIDE_8: dict[str, Any] = {"img_size": (40, 56), "stride": 8}
ODD: dict[str, Any] = {"img_size": (51, 37)}  # six patches, and pixels that belong to none
SHAPES = pytest.mark.parametrize(("sizes", "stride"), [({}, 16), (STRIDE_8, 8), (ODD, 16)], ids=["", "overlap", "odd"])
Written = Callable[[dict[str, Tensor], Tensor], Tensor]


def adapted(method: Method, backend: str = "auto", **arguments: Any) -> Any:
    """A Vim with every parameter random, also those that start at zero."""
    model = adapt(VisionMamba(**{**SIZES, **arguments}, scan_backend=backend).eval(), method)
    reference_vim.fill(model)
    return model


def make_images(model: VisionMamba, count: int = 2) -> Tensor:
    return reference_vim.make_images(count, 3, *model.patch_embed.img_size)


def assert_as_written_out(model: VisionMamba, written: Written) -> None:
    """Logits and the gradients of the trained part, float32 against the formula in float64."""
    state = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    trained = trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    images = make_images(model)
    expected = written(state, images.double())
    given = model(images)
    assert relative_error(given, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*given.shape)
    found = torch.autograd.grad(given, list(trained.values()), cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained, found, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name
    with torch.no_grad():  # what is added matters here
        bare = reference_vim.logits(state, images.double(), stride=model.patch_embed.stride)
    assert relative_error(bare, expected) > 100 * BACKBONE.forward


# ------------------------------------------------------------------------------------------------------- adapter

ACTS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda x: torch.where(x > 0, x, 0),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "silu": reference_vim.silu,
    "none": lambda x: x,
}


def adapter_written_out(
    monkeypatch: pytest.MonkeyPatch, *, stride: int, activation: str, scale: float, excluded: int | None
) -> Written:
    mixer = reference_vim.mixer

    def with_adapter(state: Any, prefix: str, hidden: Tensor) -> Tensor:
        tokens = list(mixer(state, prefix, hidden).unbind(1))
        part = f"adapter.{prefix.split('.')[1]}."
        for t, y in enumerate(tokens):
            if t != excluded and f"{part}up.bias" in state:
                h = ACTS[activation](y @ state[f"{part}down.weight"].T + state[f"{part}down.bias"])
                tokens[t] = y + scale * (h @ state[f"{part}up.weight"].T + state[f"{part}up.bias"])
        return torch.stack(tokens, dim=1)

    def logits(state: dict[str, Tensor], images: Tensor) -> Tensor:
        with monkeypatch.context() as patched:
            patched.setattr(reference_vim, "mixer", with_adapter)
            return reference_vim.logits(state, images, stride=stride)

    return logits


@pytest.mark.parametrize("backend", BACKENDS)
@SHAPES
@pytest.mark.parametrize("include_cls", [True, False])
def test_the_adapter_is_its_formula(
    include_cls: bool, sizes: dict[str, Any], stride: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(Adapter(hidden_dim=5, scale=0.7, include_cls=include_cls), backend, **sizes)
    excluded = None if include_cls else model.cls_index
    written = adapter_written_out(monkeypatch, stride=stride, activation="relu", scale=0.7, excluded=excluded)
    assert_as_written_out(model, written)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_adapters_activations(activation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(Adapter(hidden_dim=5, activation=activation, scale=2.0))
    written = adapter_written_out(monkeypatch, stride=16, activation=activation, scale=2.0, excluded=None)
    assert_as_written_out(model, written)


def test_the_last_block_has_an_adapter_only_for_the_class_token() -> None:
    whole = adapted(Adapter(hidden_dim=4))
    images = make_images(whole)
    before = whole(images)
    with torch.no_grad():
        whole.get_parameter("adapter.2.up.weight").mul_(2)
    assert relative_error(whole(images), before) > 1e-3
    patches = adapted(Adapter(hidden_dim=4, include_cls=False))
    assert {name.split(".")[1] for name in patches.state_dict() if name.startswith("adapter.")} == {"0", "1"}
    with pytest.raises(ConfigError, match="adapter: a model of one block needs include_cls true"):
        adapted(Adapter(include_cls=False), depth=1)


def test_the_adapter_is_as_large_as_svps_inner_path() -> None:
    def parameters(method: str, **arguments: Any) -> int:
        with torch.device("meta"):
            model = create_model("vim_small_patch16_224", num_classes=10, method=method, **arguments)
        return sum(p.numel() for name, p in trained_parameters(model).items() if name.startswith("adapter."))

    inner = parameters("svp", paths="inner")
    assert inner == 1_199_616
    widths = {width: parameters("adapter", hidden_dim=width) for width in (62, 63, 64, 65, 66)}
    assert min(widths, key=lambda width: abs(widths[width] - inner)) == 64 == Adapter().hidden_dim
    assert widths[64] == 24 * (2 * 384 * 64 + 64 + 384) == 1_190_400
    assert parameters("adapter", include_cls=False) == 23 * (2 * 384 * 64 + 64 + 384)


# -------------------------------------------------------------------------------------------------------- offset


@pytest.mark.parametrize("backend", BACKENDS)
@SHAPES
@pytest.mark.parametrize(("include_cls", "depths"), [(False, None), (True, None), (False, [2, 0]), (True, [1])])
def test_the_offset_is_its_formula(
    include_cls: bool, depths: list[int] | None, sizes: dict[str, Any], stride: int, backend: str
) -> None:
    def written(state: dict[str, Tensor], images: Tensor) -> Tensor:
        blocks = sorted(range(3) if depths is None else depths)

        def before_block(i: int, hidden: Tensor, residual: Tensor | None, cls: int) -> Any:
            if i not in blocks:
                return hidden, residual, cls
            vector = state["adapter.offset"][blocks.index(i)]
            tokens = [x if t == cls and not include_cls else x + vector for t, x in enumerate(hidden.unbind(1))]
            return torch.stack(tokens, dim=1), residual, cls

        return reference_vim.logits(state, images, stride=stride, before_block=before_block)

    assert_as_written_out(adapted(Offset(include_cls, depths), backend, **sizes), written)


@pytest.mark.parametrize(("depths", "count"), [(None, 24 * 384), ([0], 384), ([3, 23, 4], 3 * 384)])
def test_offsets_counts_on_vim_small(depths: list[int] | None, count: int) -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=10, method="offset", depths=depths)
    assert model.get_parameter("adapter.offset").shape == (count // 384, 384)
    assert Offset(depths=depths).adapter_parameters(model) == count


@pytest.mark.parametrize("method", [Adapter(), Offset()])
def test_what_does_not_merge_says_so(method: Method) -> None:
    model = adapted(method)
    before = model(make_images(model))
    with pytest.raises(ConfigError, match=rf"the method {type(method).__name__} does not merge .*; predict with its"):
        model.method.merge(model)
    assert torch.equal(model(make_images(model)), before)


# ----------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    "method",
    [Adapter(scale=1.0), Adapter(include_cls=False, scale=1.0), Offset(), Offset(include_cls=True), Bias(list(BIASES))],
    ids=repr,
)
def test_bf16_autocast_is_near(method: Method) -> None:
    model = adapted(method)
    images = make_images(model)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        given = model(images)
        loss = given.float().square().sum()
    loss.backward()
    assert relative_error(given, exact) < 0.05
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
        assert parameter.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------- messages and command


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("adapter", {"hidden_dim": 0}, "adapter: hidden_dim must be at least 1, not 0"),
        ("adapter", {"activation": "rlu"}, "adapter: activation must be one of relu, gelu, silu, none, not 'rlu'"),
        ("adapter", {"scale": -1.0}, r"adapter: scale must be above 0, not -1\.0"),
        ("offset", {"depths": [0, 8]}, r"offset: depths must be distinct blocks of 0\.\.7, not \[0, 8\]"),
        ("offset", {"depths": [1, 1]}, "offset: depths must be distinct blocks"),
        ("offset", {"depths": []}, "offset: depths must be distinct blocks"),
    ],
)
def test_bad_settings(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model("vim_nano_patch8_64", num_classes=2, method=name, **arguments)
    assert "\n" not in str(caught.value)


def test_settings_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    for name, given, settings, count in (
        ("bias", {"which": "[conv1d, patch_embed]"}, {"which": ["conv1d", "patch_embed"]}, 3 * 2 * 32 + 16),
        ("offset", {"depths": "[2]"}, {"include_cls": False, "depths": [2]}, 16),
        (
            "adapter",
            {"activation": "gelu", "hidden_dim": "3"},
            {"hidden_dim": 3, "activation": "gelu", "scale": 0.1, "include_cls": True},
            3 * (2 * 16 * 3 + 3 + 16),
        ),
    ):
        flags = [part for key, value in given.items() for part in (f"--model.method.{key}", value)]
        outcome = run(*small("--method", name, *flags))
        assert outcome.record["parameters"]["adapter"] == count
        config = yaml.safe_load((outcome.folder / "config.yaml").read_text(encoding="utf-8"))
        assert config["model"]["method"]["init_args"] == settings
    text = assert_error(command(*small("--method", "bias", "--model.method.which", "[conv1]")), 2)
    assert "unknown layer with a bias 'conv1'; did you mean 'conv1d'?" in text
