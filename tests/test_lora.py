"""LoRA: the formula on weights, the counts that MambaPEFT published, dropout, precision, and merging away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
import yaml
from helpers import assert_error, command, run, settle, small
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import adapt, create_model
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.full import Full
from svp_bench.methods.linear import Linear
from svp_bench.methods.lora import LoRA, _AddProduct
from svp_bench.methods.svp import SVP
from svp_bench.models import VisionMamba
from svp_bench.ops import backend_statuses

BACKENDS = [status.name for status in backend_statuses() if status.available]
# (3, 48, 64) images: width 32, inner width 64, 4 states, rank 2 of Δ
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
ROWS = {  # of the projection and its copies: which rows, written down apart from the code
    "in_proj": ("in_proj", slice(0, 128)),
    "X": ("in_proj", slice(0, 64)),
    "Z": ("in_proj", slice(64, 128)),
    "x_proj": ("x_proj", slice(0, 10)),
    "d": ("x_proj", slice(0, 2)),
    "B": ("x_proj", slice(2, 6)),
    "C": ("x_proj", slice(6, 10)),
    "dt_proj": ("dt_proj", slice(0, 64)),
    "out_proj": ("out_proj", slice(0, 32)),
}
TARGETS = ("embed", *ROWS)
ON_OUTPUT = ("embed", "in_proj", "X", "Z", "out_proj")
ALL = list(TARGETS)


def backbone(backend: str = "auto", **arguments: Any) -> VisionMamba:
    return VisionMamba(**{**SIZES, **arguments}, scan_backend=backend).eval()


def lora(targets: list[str], backend: str = "auto", sizes: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A random backbone with LoRA, all factors random."""
    model = adapt(backbone(backend, **(sizes or {})), LoRA(targets, **arguments))
    reference_vim.fill(model)
    return model


def make_images(model: VisionMamba, count: int = 2) -> Tensor:
    return reference_vim.make_images(count, 3, *model.patch_embed.img_size)


def written_out(state: dict[str, Tensor], targets: list[str], scale: float, depth: int = 3) -> dict[str, Tensor]:
    """The state with every product added to its weight."""
    merged = dict(state)

    def add(weight: str, adapter: str, rows: slice) -> None:
        up, down = state[f"adapter.{adapter}.up.weight"], state[f"adapter.{adapter}.down.weight"]
        whole = merged[weight].clone()
        whole[rows] = whole[rows] + scale * (up @ down.flatten(1)).view_as(whole[rows])
        merged[weight] = whole

    for target in targets:
        if target == "embed":
            add("patch_embed.proj.weight", "embed", slice(None))
            continue
        projection, rows = ROWS[target]
        for suffix in ("", "_b") if projection in ("x_proj", "dt_proj") else ("",):
            for layer in range(depth):
                add(f"layers.{layer}.mixer.{projection}{suffix}.weight", f"{layer}.{target}{suffix}", rows)
    return merged


def assert_as_written_out(model: VisionMamba, targets: list[str], scale: float, stride: int = 16) -> None:
    """Logits and the gradients of the factors, float32 against products added to the weights in float64."""
    state = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    trained = trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    images = make_images(model)
    expected = reference_vim.logits(written_out(state, targets, scale), images.double(), stride=stride)
    found = model(images)
    assert relative_error(found, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*found.shape)
    gradients = torch.autograd.grad(found, list(trained.values()), cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained, gradients, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name
    with torch.no_grad():
        bare = reference_vim.logits(state, images.double(), stride=stride)
    assert relative_error(bare, expected) > 100 * BACKBONE.forward


# ------------------------------------------------------------------------------------------------------- formula


@pytest.mark.parametrize("targets", [*([target] for target in TARGETS), ["in_proj", "X", "B", "x_proj"], ALL], ids=str)
def test_lora_is_its_formula(targets: list[str]) -> None:
    assert_as_written_out(lora(targets, rank=5, scale=0.7, dropout=0.5), targets, 0.7)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("sizes", "stride"),
    [({"img_size": (40, 56), "stride": 8}, 8), ({"img_size": (51, 37)}, 16), ({"expand": 2, "d_conv": 3}, 16)],
    ids=["overlapping patches", "odd images", "another convolution"],
)
def test_lora_on_other_shapes(sizes: dict[str, Any], stride: int, backend: str) -> None:
    model = lora(ALL, backend, sizes, rank=3, scale=0.5)
    assert_as_written_out(model, ALL, 0.5, stride)


def test_the_names_of_the_factors() -> None:
    model = adapt(backbone(), LoRA(ALL, rank=7))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items() if name.startswith("adapter.")}
    assert shapes["adapter.embed.down.weight"] == (7, 3, 16, 16)
    assert shapes["adapter.embed.up.weight"] == (32, 7)
    assert shapes["adapter.2.X.down.weight"] == (7, 32)
    assert shapes["adapter.2.X.up.weight"] == (64, 7)
    assert shapes["adapter.0.B_b.down.weight"] == (7, 64)
    assert shapes["adapter.0.B_b.up.weight"] == (4, 7)
    assert shapes["adapter.1.dt_proj.up.weight"] == (64, 7)
    blocks = {name.split(".")[2] for name in shapes if name.split(".")[1] != "embed"}
    both_ways = {f"{name}{suffix}" for name in ("x_proj", "d", "B", "C", "dt_proj") for suffix in ("", "_b")}
    assert blocks == {"in_proj", "X", "Z", "out_proj", *both_ways}
    assert len(shapes) == 2 * (1 + 3 * len(blocks))


def test_the_factors_start_as_in_the_paper() -> None:
    model = adapt(backbone(embed_dim=64), LoRA(ALL, rank=48))
    for name, parameter in trained_parameters(model).items():
        if name.endswith("up.weight"):
            assert parameter.count_nonzero() == 0, name
        elif name.endswith("down.weight"):
            bound = parameter[0].numel() ** -0.5  # nn.Linear's default: uniform ± fan-in^-½
            assert parameter.abs().max() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / 3**0.5, rel=0.1), name


def test_an_update_in_place_has_the_right_gradients() -> None:
    y, h, up = torch.randn(2, 3, 7).double(), torch.randn(2, 3, 4).double(), torch.randn(5, 4).double()
    for leaf in (y, h, up):
        leaf.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, h, up: _AddProduct.apply(y.clone(), h, up, 1, 0.3), (y, h, up))
    expected = torch.cat([y[..., :1], y[..., 1:6] + 0.3 * h @ up.T, y[..., 6:]], dim=-1)
    assert torch.allclose(_AddProduct.apply(y.clone(), h, up, 1, 0.3), expected)


def test_an_update_of_in_proj_keeps_no_convolved_input() -> None:
    """The memory of a linear probe: where x_proj is left alone, the scan convolves again instead of keeping u."""
    for targets in (["X"], ["in_proj", "out_proj"], ["dt_proj"], ["embed"]):
        assert not any(mixer._saves_u() for mixer in adapt(backbone(), LoRA(targets)).mixers)
    for targets in (["x_proj"], ["d"], ["X", "B"]):
        assert all(mixer._saves_u() for mixer in adapt(backbone(), LoRA(targets)).mixers)


# -------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize(
    ("target", "rank", "count", "thousands"),
    [
        ("embed", 32, 36_864, 45),
        ("x_proj", 64, 2_531_328, 2540),
        ("dt_proj", 64, 2_433_024, 2442),
        ("out_proj", 96, 2_654_208, 2663),
        ("in_proj", 32, 1_474_560, 1483),
        ("d", 64, 2_433_024, 2442),
        ("C", 64, 2_408_448, 2417),
        ("B", 64, 2_408_448, 2417),
        ("Z", 64, 1_769_472, 1778),
        ("X", 64, 1_769_472, 1778),
    ],
)
def test_counts_are_those_of_mambapeft(target: str, rank: int, count: int, thousands: int) -> None:
    """Vim-S. The thousands that the paper prints include a head: the same 8,500 to 8,635 in every row."""
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=10, method="lora", targets=[target], rank=rank)
    assert sum(p.numel() for n, p in trained_parameters(model).items() if n.startswith("adapter.")) == count
    assert LoRA([target], rank=rank).adapter_parameters(model) == count
    assert {round((count + head) / 1000) for head in (8_500, 8_635)} == {thousands}


@settings(max_examples=25, deadline=None)
@given(
    targets=st.lists(st.sampled_from(TARGETS), min_size=1, unique=True),
    rank=st.integers(1, 70),
    width=st.sampled_from([8, 16, 48]),
    states=st.integers(1, 5),
)
def test_counts_for_any_setting(targets: list[str], rank: int, width: int, states: int) -> None:
    model = backbone(img_size=32, embed_dim=width, depth=2, d_state=states)
    inner, dt = 2 * width, -(-width // 16)
    sides = {
        "embed": 3 * 256 + width,
        "in_proj": 2 * (width + 2 * inner),
        "X": 2 * (width + inner),
        "Z": 2 * (width + inner),
        "x_proj": 4 * (inner + dt + 2 * states),
        "d": 4 * (inner + dt),
        "B": 4 * (inner + states),
        "C": 4 * (inner + states),
        "dt_proj": 4 * (dt + inner),
        "out_proj": 2 * (inner + width),
    }
    made = LoRA(targets, rank=rank)
    adapt(model, made)
    assert isinstance(model.adapter, nn.Module)
    counted = sum(p.numel() for p in model.adapter.parameters())
    assert counted == made.adapter_parameters(model) == rank * sum(sides[target] for target in targets)
    assert model(torch.zeros(1, 3, 32, 32)).isfinite().all()


# ------------------------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("target", TARGETS)
def test_dropout_is_where_the_product_acts_on_an_output(target: str) -> None:
    model = lora([target], rank=8, dropout=0.5)
    images = make_images(model)
    still = model(images)
    assert torch.equal(model(images), still)
    model.adapter.train()
    outputs = [model(images) for _ in range(2)]
    if target in ON_OUTPUT:
        assert relative_error(outputs[0], outputs[1]) > 1e-4
    else:
        assert all(torch.equal(logits, still) for logits in outputs)


# ----------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("target", TARGETS)
def test_bf16_autocast_is_near(target: str) -> None:
    model = lora([target], rank=8, scale=0.5)
    images = make_images(model)
    exact = model(images)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(images)
        loss = found.float().square().sum()
    loss.backward()
    assert relative_error(found, exact) < 0.05
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.count_nonzero() > 0, name
        assert parameter.grad.dtype == torch.float32


# ------------------------------------------------------------------------------------------------------- merging


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("targets", [*([target] for target in TARGETS), ALL], ids=str)
def test_merging_keeps_the_logits(targets: list[str], backend: str) -> None:
    model = lora(targets, backend, {"img_size": (40, 56), "stride": 8}, rank=6, scale=0.5)
    images = make_images(model)
    with torch.no_grad():
        before = model(images)
    frozen = backbone(backend, img_size=(40, 56), stride=8)
    reference_vim.fill(frozen)
    model.method.merge(model)
    with torch.no_grad():
        after = model(images)
        assert relative_error(after, before) <= SAME_MATHS
        assert relative_error(frozen(images), before) > 1e-3
    # a plain backbone: its names, no points, and weights that another one can load
    assert model.adapter is None
    assert model.method is None
    points = model.points
    assert not any([*points.linear.values(), *points.tensor.values(), points.tokens, points.patch_embed])
    frozen.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(frozen(images), after)


def test_merging_makes_a_full_rank_update_of_a_slice() -> None:
    """Rank 64 on four rows: more factors than the product can use, on purpose."""
    model = lora(["B"], rank=64)
    weight = model.get_parameter("layers.1.mixer.x_proj_b.weight")
    before = weight.clone()
    model.method.merge(model)
    change = weight - before
    assert torch.linalg.matrix_rank(change) == 4
    assert (change.abs().sum(dim=1) > 0).tolist() == [False] * 2 + [True] * 4 + [False] * 4
    assert not weight.requires_grad


def test_merging_leaves_other_points_alone_and_the_model_free() -> None:
    model = lora(["X", "B", "embed"])
    seen: list[int] = []
    model.points.on_linear(0, "in_proj", lambda x, y: seen.append(1) or y)  # type: ignore[func-returns-value]
    method = model.method
    method.merge(model)
    model(make_images(model))
    assert seen == [1]
    with pytest.raises(ConfigError, match=r"this model does not carry this LoRA; call model\.method\.merge"):
        method.merge(model)
    adapt(model, LoRA(["out_proj"]))
    assert set(trained_parameters(model)) == {n for n, _ in model.named_parameters() if n.startswith(("adap", "head"))}


def test_merging_where_there_is_nothing_to_fold_or_no_way() -> None:
    for method in (Linear(), Full()):
        model = adapt(backbone(), method)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        method.merge(model)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert model.method is None  # type: ignore[attr-defined]
    model = adapt(backbone(), SVP())
    with pytest.raises(ConfigError, match="the method SVP does not merge into the backbone's weights"):
        model.method.merge(model)  # type: ignore[union-attr, operator]
    assert model.adapter is not None

    class Promises(SVP):
        mergeable = True

    model = adapt(backbone(), Promises())
    with pytest.raises(ConfigError, match=r"Promises is declared mergeable and must define fold\(model\)"):
        model.method.merge(model)  # type: ignore[union-attr, operator]
    assert model.adapter is not None


# ------------------------------------------------------------------------------------------- messages and command


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": "X"}, r"lora: targets must be a list such as \[embed, in_proj\], not the text 'X'"),
        ({"targets": ["x_prj"]}, r"unknown target of lora 'x_prj'; did you mean 'x_proj'\?"),
        ({"targets": ["X", 3]}, "unknown target of lora '3'"),
        ({"targets": []}, "lora: targets must be distinct, and at least one of embed, in_proj, X"),
        ({"targets": ["X", "X"]}, "lora: targets must be distinct"),
        ({"rank": 0}, "lora: rank must be at least 1, not 0"),
        ({"scale": 0.0}, r"lora: scale must be above 0, not 0\.0"),
        ({"scale": float("nan")}, "lora: scale must be above 0, not nan"),
        ({"dropout": 1.0}, r"lora: dropout must be in \[0, 1\), not 1\.0"),
    ],
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model("vim_nano_patch8_64", num_classes=2, method="lora", **arguments)
    assert "\n" not in str(caught.value)


def test_targets_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    given = ("--method", "lora", "--model.method.targets", "[B, out_proj]", "--model.method.rank", "2")
    outcome = run(*small(*given))
    record = outcome.record
    assert record["method"] == "lora"
    assert record["parameters"]["adapter"] == 3 * 2 * (2 * (32 + 4) + (32 + 16))
    config = yaml.safe_load((outcome.folder / "config.yaml").read_text(encoding="utf-8"))
    expected = {"targets": ["B", "out_proj"], "rank": 2, "scale": 0.1, "dropout": 0.1, "dora": None}
    assert config["model"]["method"]["init_args"] == expected
    weights = torch.load(outcome.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert weights["model.adapter.2.B_b.down.weight"].shape == (2, 32)
    text = assert_error(command(*small("--method", "lora", "--model.method.targets", "[out_prj]")), 2)
    assert "unknown target of lora 'out_prj'; did you mean 'out_proj'?" in text
