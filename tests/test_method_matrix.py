"""Every registered method on every available scan backend: it does what it declares, and no more.

A new method needs nothing here: it is taken from the registry with its default settings. `VARIANTS` adds settings of
our own methods that change what they build.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import reference_vim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import relative_error
from torch import Tensor, nn

import svp_bench
from svp_bench.core.errors import ConfigError, UsageError
from svp_bench.methods import METHODS
from svp_bench.methods.base import Method, build_method
from svp_bench.methods.build import adapt, create_model
from svp_bench.methods.checks import counted_parameters, trained_parameters
from svp_bench.models import TokenState, VisionMamba
from svp_bench.models.vim import LINEAR_POINTS, TENSOR_POINTS
from svp_bench.ops import backend_statuses

BACKENDS = [status.name for status in backend_statuses() if status.available]
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("svp", {"variant": "released", "share_layers": 2}),
    ("svp", {"paths": "cross", "share_layers": 2, "include_cls": True}),
    ("svp", {"paths": "inner", "hidden_dim": 3, "depths": [2, 0]}),
    ("svp", {"depths": [1, 2], "share_layers": 2, "dropout": 0.3}),
    ("vpt_shallow", {"position": "around_cls", "length": 3, "dropout": 0.3}),
    ("vpt_deep", {"position": "both", "length": 3}),
    ("vpt_deep", {"position": "spread", "length": 1, "mode": "accumulate"}),
    ("lora", {"targets": ["embed", "X", "Z", "d", "B", "C", "dt_proj"], "rank": 5, "dropout": 0.0}),
    ("lora", {"targets": ["in_proj", "X", "x_proj", "B", "out_proj"], "rank": 40, "scale": 2.0, "dropout": 0.3}),
    ("adapter", {"hidden_dim": 3, "activation": "none", "include_cls": False}),
    ("offset", {"depths": [2, 0], "include_cls": True}),
    ("bias", {"which": ["conv1d", "patch_embed"]}),
    ("vpt_shallow", {"position": "both", "projection": True, "init": "normal"}),
    ("affix", {"length": 1, "projection": True}),
    ("parallel_adapter", {"hidden_dim": 3, "dropout": 0.0}),
    ("additional_scan", {"states": 8, "init": "zero_c"}),
]
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
CASES = [*((name, {}) for name in METHODS.names()), *VARIANTS]
IDS = [" ".join([name, *(f"{key}={value}" for key, value in arguments.items())]) for name, arguments in CASES]

matrix = pytest.mark.parametrize(("name", "arguments"), CASES, ids=IDS)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def backbone(backend: str = "auto", **arguments: Any) -> VisionMamba:
    """A trained-looking Vim of 12 patches in a 3 × 4 grid."""
    model = VisionMamba(**{**SIZES, **arguments}, scan_backend=backend).eval()
    reference_vim.fill(model)
    return model


def method(name: str, arguments: dict[str, Any]) -> Method:
    return build_method(METHODS.get(name), name, arguments)


def images(count: int = 2) -> Tensor:
    return reference_vim.make_images(count, 3, 48, 64)


def adapter_names(model: VisionMamba) -> set[str]:
    return {name for name, _ in model.named_parameters() if name.startswith("adapter.")}


def step(model: VisionMamba, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images(4)), torch.tensor([0, 1, 2, 3])).backward()
    optimizer.step()


@matrix
def test_only_what_is_declared_moves(name: str, arguments: dict[str, Any], backend: str) -> None:
    made = method(name, arguments)
    model = adapt(backbone(backend), made).train()
    declared = {n for n, _ in model.named_parameters() if made.trains(n)}
    assert set(trained_parameters(model)) == declared
    assert adapter_names(model) <= declared
    assert {"head.weight", "head.bias"} <= declared
    before = {n: value.clone() for n, value in model.state_dict().items()}
    buffers = {n: value.clone() for n, value in model.named_buffers()}
    # Adam moves every entry that has a gradient by about lr. Two steps: a scale that starts at zero gives its generator
    # a gradient of exactly zero in the first.
    optimizer = torch.optim.Adam(trained_parameters(model).values(), lr=1e-2)
    for _ in range(2):
        step(model, optimizer)
        for n, parameter in model.named_parameters():
            assert (parameter.grad is not None) == (n in declared), n
    moved = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
    assert moved == declared
    assert all(torch.equal(value, buffers[n]) for n, value in model.named_buffers())


def test_svps_generators_have_zero_gradients_in_the_first_step(backend: str) -> None:
    model = adapt(backbone(backend), method("svp", {"share_layers": 2}))
    nn.functional.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
    for name, parameter in model.named_parameters():
        if name.startswith("adapter."):
            assert parameter.grad is not None, name
            is_scale = name in ("adapter.alpha", "adapter.beta")
            assert (parameter.grad.count_nonzero() > 0) == is_scale, name
            assert (parameter.count_nonzero() == 0) == is_scale, name


@matrix
def test_identity_at_start(name: str, arguments: dict[str, Any], backend: str) -> None:
    made = method(name, arguments)
    plain = backbone(backend)
    expected = plain(images())
    given = adapt(backbone(backend), made)(images())
    if made.identity_at_start:
        assert relative_error(given, expected) <= 1e-6
    else:
        assert relative_error(given, expected) > 1e-4


@matrix
def test_the_count_is_the_formula(name: str, arguments: dict[str, Any]) -> None:
    made = method(name, arguments)
    model = adapt(backbone(), made)
    counted = sum(p.numel() for n, p in counted_parameters(model).items() if not n.startswith("head."))
    assert made.adapter_parameters(model) == counted
    with torch.device("meta"):
        assert made.adapter_parameters(VisionMamba(**SIZES)) == counted  # known without building anything


@matrix
def test_the_trained_part_is_saved_and_loaded_alone(name: str, arguments: dict[str, Any], backend: str) -> None:
    made = method(name, arguments)
    model = adapt(backbone(backend), made)
    with torch.no_grad():
        for n, parameter in trained_parameters(model).items():
            parameter.copy_(1.1 * reference_vim.sample(n, parameter.shape))
    trained = set(trained_parameters(model))
    part = {n: value.clone() for n, value in model.state_dict().items() if n in trained}
    fresh = adapt(backbone(backend), method(name, arguments))
    assert relative_error(fresh(images()), model(images())) > 1e-3
    outcome = fresh.load_state_dict(part, strict=False)
    assert not outcome.unexpected_keys
    assert not trained & set(outcome.missing_keys)
    assert torch.equal(fresh(images()), model(images()))


@matrix
def test_a_copy_is_independent(name: str, arguments: dict[str, Any]) -> None:
    model = adapt(backbone(), method(name, arguments))
    copied = copy.deepcopy(model)
    before = model(images())
    with torch.no_grad():
        for n, parameter in trained_parameters(model).items():
            parameter.copy_(1.1 * reference_vim.sample(n, parameter.shape))
    assert torch.equal(copied(images()), before)
    copied.load_state_dict(model.state_dict())
    assert torch.equal(copied(images()), model(images()))
    copied(images()).sum().backward()
    assert all(p.grad is None for p in model.parameters())


@matrix
def test_the_backbones_names_stay(name: str, arguments: dict[str, Any]) -> None:
    plain, adapted = backbone(), adapt(backbone(), method(name, arguments))
    assert {n for n in adapted.state_dict() if not n.startswith("adapter.")} == set(plain.state_dict())


@matrix
def test_training_on_a_batch_of_one(name: str, arguments: dict[str, Any]) -> None:
    model = adapt(backbone(), method(name, arguments)).train()
    model(images(1)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained_parameters(model).values())


@matrix
def test_the_adapter_follows_the_backbones_precision_and_mode(name: str, arguments: dict[str, Any]) -> None:
    model = adapt(backbone().double(), method(name, arguments))
    assert not any(module.training for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    assert model(images().double()).dtype == torch.float64
    with torch.device("meta"):
        empty = VisionMamba(**SIZES)
    assert {p.device.type for p in adapt(empty, method(name, arguments)).parameters()} == {"meta"}


@matrix
def test_a_second_attach_is_refused(name: str, arguments: dict[str, Any]) -> None:
    model = adapt(backbone(), method(name, arguments))
    before = set(model.state_dict())
    for second in METHODS.names():
        with pytest.raises(
            ConfigError, match="this model carries a method already; create a new one for another method"
        ):
            adapt(model, method(second, {}))
    assert set(model.state_dict()) == before


@matrix
def test_settings_are_kept(name: str, arguments: dict[str, Any]) -> None:
    made = method(name, arguments)
    defaults = {key: p.default for key, p in inspect.signature(type(made)).parameters.items()}
    assert inspect.Parameter.empty not in defaults.values()
    assert made.settings() == {**defaults, **arguments}
    again = method(name, made.settings())
    assert repr(again) == repr(made)
    assert type(made).__name__ in repr(made)
    documented = inspect.getdoc(type(made)) or ""
    assert all(f"{key}:" in documented for key in defaults)


# ------------------------------------------------------------------------------------------- named points


@pytest.mark.parametrize("name", LINEAR_POINTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_every_linear_point_reaches_the_output(name: str, layer: int, backend: str) -> None:
    plain, model = backbone(backend), backbone(backend)
    scale = torch.zeros((), requires_grad=True)
    seen = []

    def point(x: Tensor, y: Tensor) -> Tensor:
        seen.append((x.shape, y.shape))
        return y + scale * torch.linspace(-1, 1, y.shape[-1])

    model.points.on_linear(layer, name, point)
    assert_reaches(plain, model, scale)
    mixer = model.mixers[layer]
    out, into = mixer.get_parameter(f"{name}.weight").shape
    assert set(seen) == {((2, 13, into), (2, 13, out))}


@pytest.mark.parametrize("name", TENSOR_POINTS)
@pytest.mark.parametrize("layer", [0, 2])
def test_every_tensor_point_reaches_the_output(name: str, layer: int, backend: str) -> None:
    plain, model = backbone(backend), backbone(backend)
    scale = torch.zeros((), requires_grad=True)

    def point(w: Tensor) -> Tensor:
        return w + 0.5 * scale * reference_vim.sample("noise", w.shape)

    model.points.on_tensor(layer, name, point)
    assert_reaches(plain, model, scale)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_the_token_point_reaches_the_output(layer: int, backend: str) -> None:
    plain, model = backbone(backend), backbone(backend)
    scale = torch.zeros((), requires_grad=True)
    seen = []

    def point(at: int, state: TokenState) -> TokenState:
        seen.append((at, state.cls_index, state.residual is None))
        if at != layer:
            return state
        return state._replace(hidden=state.hidden + 0.1 * scale * torch.linspace(-1, 1, 13)[:, None])

    model.points.on_tokens(point)
    assert_reaches(plain, model, scale)
    assert seen[:3] == [(0, 6, True), (1, 6, False), (2, 6, False)]


def assert_reaches(plain: VisionMamba, model: VisionMamba, scale: Tensor) -> None:
    """A point that adds `scale` × something: no change at 0, a change at 1, and a gradient."""
    expected, given = plain(images()), model(images())
    assert relative_error(given, expected) <= 1e-6
    cotangent = reference_vim.make_images(2, 5)
    (gradient,) = torch.autograd.grad(given, scale, cotangent)
    with torch.no_grad():
        step = 1e-2
        scale.fill_(1.0)
        assert relative_error(model(images()), expected) > 1e-4
        scale.fill_(step)
        above = (model(images()).double() * cotangent).sum()
        scale.fill_(-step)
        below = (model(images()).double() * cotangent).sum()
    assert gradient.abs() > 1e-6
    assert gradient.item() == pytest.approx((above - below).item() / (2 * step), rel=0.05, abs=1e-3)


def test_points_act_in_the_order_of_registration() -> None:
    model = backbone()
    order: list[str] = []

    def note(text: str) -> Callable[[Tensor], Tensor]:
        return lambda w: order.append(text) or w  # type: ignore[func-returns-value]

    model.points.on_tensor(1, "A", note("first"))
    model.points.on_tensor(1, "A", note("second"))
    model(images(1))
    assert order == ["first", "second"]


def test_a_point_reads_a_as_the_kernel_does() -> None:
    model = backbone()
    seen: dict[str, Tensor] = {}
    model.points.on_tensor(0, "A_b", lambda w: seen.setdefault("A_b", w))
    model.points.on_tensor(0, "conv1d.weight", lambda w: seen.setdefault("conv1d.weight", w))
    model(images(1))
    assert torch.equal(seen["A_b"], -torch.exp(model.get_parameter("layers.0.mixer.A_b_log")))
    assert seen["conv1d.weight"].shape == (64, 4)


# ---------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("name", METHODS.names())
def test_unknown_arguments_are_named(name: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown argument of the method {name} 'no_such_thing'"):
        create_model("vim_nano_patch8_64", num_classes=2, method=name, no_such_thing=1)


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("svp", {"hiden_dim": 3}, r"unknown argument of the method svp 'hiden_dim'; did you mean 'hidden_dim'\?"),
        ("svp", {"share_layers": 0}, "svp: share_layers must be at least 1, not 0"),
        ("svp", {"hidden_dim": -1}, "svp: hidden_dim must be at least 1, not -1"),
        ("svp", {"dropout": 1.0}, r"svp: dropout must be in \[0, 1\), not 1\.0"),
        ("svp", {"dropout": float("nan")}, r"svp: dropout must be in \[0, 1\), not nan"),
        ("svp", {"variant": "papers"}, "svp: variant must be one of paper, released, not 'papers'"),
        ("svp", {"paths": "none"}, "svp: paths must be one of both, cross, inner, not 'none'"),
        ("svp", {"variant": "released", "include_cls": True}, "svp: include_cls needs variant paper"),
        ("svp", {"depths": [0, 8]}, r"svp: depths must be distinct blocks of 0\.\.7, not \[0, 8\]"),
        ("svp", {"depths": [-1]}, r"svp: depths must be distinct blocks of 0\.\.7, not \[-1\]"),
        ("svp", {"depths": [1, 1]}, "svp: depths must be distinct blocks"),
        ("svp", {"depths": []}, r"svp: depths must be distinct blocks of 0\.\.7, not \[\]"),
        ("vpt_shallow", {"length": 0}, "vpt: length must be at least 1, not 0"),
        (
            "vpt_deep",
            {"position": "middle"},
            "vpt: position must be one of prefix, suffix, both, around_cls, spread, not",
        ),
        ("vpt_deep", {"mode": "add"}, "vpt: mode must be one of replace, accumulate, not 'add'"),
        ("vpt_shallow", {"mode": "replace"}, "unknown argument of the method vpt_shallow 'mode'"),
        ("vpt_deep", {"dropout": -0.1}, r"vpt: dropout must be in \[0, 1\), not -0\.1"),
        ("linear", {"length": 3}, "unknown argument of the method linear 'length'"),
    ],
)
def test_bad_settings(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model("vim_nano_patch8_64", num_classes=2, method=name, **arguments)
    assert "\n" not in str(caught.value)


def test_unknown_methods_are_named() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'vpt_depe'; did you mean 'vpt_deep'\?.*svp-bench methods"):
        create_model("vim_nano_patch8_64", num_classes=2, method="vpt_depe")


def test_a_refused_method_leaves_the_model_free() -> None:
    model = backbone(img_size=48)  # nine patches
    with pytest.raises(ConfigError, match="even number of patches"):
        adapt(model, method("svp", {"variant": "released"}))
    assert model.adapter is None
    assert not model.points.tokens
    adapt(model, method("svp", {}))


def test_listing() -> None:
    assert svp_bench.list_methods() == METHODS.names()
    assert {"svp", "vpt_shallow", "vpt_deep", "linear", "full"} <= set(svp_bench.list_methods())
    assert all(entry.summary for entry in METHODS)


# ------------------------------------------------------------------------------------ counts, for any setting

DEPTH, WIDTH = 5, 16


def svp_settings() -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {
            "share_layers": st.integers(1, 2 * DEPTH),
            "hidden_dim": st.integers(1, 40),
            "paths": st.sampled_from(["both", "cross", "inner"]),
            "depths": st.none() | st.lists(st.integers(0, DEPTH - 1), min_size=1, unique=True),
        }
    )


def vpt_settings() -> st.SearchStrategy[dict[str, Any]]:
    positions = st.sampled_from(["prefix", "suffix", "both", "around_cls", "spread"])
    return st.fixed_dictionaries({"length": st.integers(1, 30), "position": positions})


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_counts_for_any_setting(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(["svp", "vpt_shallow", "vpt_deep"]))
    arguments = data.draw(svp_settings() if name == "svp" else vpt_settings())
    made = method(name, arguments)
    model = adapt(VisionMamba(img_size=32, embed_dim=WIDTH, depth=DEPTH, d_state=2, num_classes=3).eval(), made)
    counted = sum(p.numel() for p in model.adapter.parameters())  # type: ignore[union-attr]
    if name == "svp":
        depths = range(DEPTH) if arguments["depths"] is None else arguments["depths"]
        groups = {depth // arguments["share_layers"] for depth in depths}
        h = arguments["hidden_dim"]
        expected = 0
        if arguments["paths"] in ("both", "cross"):
            expected += len(groups) * (WIDTH * WIDTH + WIDTH) + len(groups) * WIDTH
        if arguments["paths"] in ("both", "inner"):
            expected += len(depths) * (WIDTH * h + h + h * WIDTH + WIDTH) + len(depths) * WIDTH
    else:
        expected = arguments["length"] * WIDTH * (DEPTH if name == "vpt_deep" else 1)
    assert counted == expected == made.adapter_parameters(model)
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()
