"""SVP and VPT against the formulas written out one token at a time (reference_vim.py), and what follows from them."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import reference_vim
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BACKBONE, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods.base import Method
from svp_bench.methods.build import adapt, create_model
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.svp import SVP
from svp_bench.methods.vpt import POSITIONS, VPTDeep, VPTShallow, prompt_positions
from svp_bench.models import TokenState, VisionMamba


def adapted(method: Method, **arguments: Any) -> VisionMamba:
    """A Vim of 12 patches, every parameter random, α and β too."""
    sizes: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
    return adapt(VisionMamba(**{**sizes, **arguments}).eval(), method)


def assert_as_written_out(
    model: VisionMamba, before_block: Any, *, images: Tensor | None = None, stride: int = 16
) -> None:
    """Logits and the gradients of the trained part, float32 against the formulas in float64."""
    state = reference_vim.fill(model)
    if images is None:
        images = reference_vim.make_images(2, 3, *model.patch_embed.img_size)
    trained = trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    expected = reference_vim.logits(state, images.double(), stride=stride, before_block=before_block(state))
    given = model(images)
    assert relative_error(given, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*given.shape)
    found = torch.autograd.grad(given, list(trained.values()), cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained, found, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name
    # The prompts matter here: without them these bounds would not hold.
    with torch.no_grad():
        bare = reference_vim.logits(state, images.double(), stride=stride)
    assert relative_error(bare, expected) > 100 * BACKBONE.forward


# ------------------------------------------------------------------------------------------------------- SVP


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("share_layers", [1, 2, 3, 8])
@pytest.mark.parametrize("variant", ["paper", "released"])
def test_svp_is_its_formula(variant: Any, share_layers: int, batch: int) -> None:
    model = adapted(SVP(share_layers=share_layers, hidden_dim=7, variant=variant))
    assert_as_written_out(
        model,
        lambda state: reference_vim.svp(state, share_layers=share_layers, variant=variant),
        images=reference_vim.make_images(batch, 3, 48, 64),
    )


@pytest.mark.parametrize(
    ("arguments", "sizes"),
    [
        ({"paths": "cross"}, {}),
        ({"paths": "inner"}, {}),
        ({"paths": "cross", "depths": [0, 2], "share_layers": 1}, {}),
        ({"paths": "cross", "variant": "released"}, {}),
        ({"paths": "inner", "variant": "released"}, {}),
        ({"include_cls": True}, {}),
        ({"depths": [2]}, {}),
        ({"depths": [1, 0], "variant": "released"}, {}),
        ({"depths": [4, 2, 3], "share_layers": 2}, {"depth": 5}),
        ({"share_layers": 2}, {"depth": 5}),  # the last group is shorter
        ({}, {"img_size": 48}),  # nine patches: four before the class token, five after
        ({}, {"img_size": 48, "stride": 8}),  # 25 patches
        ({}, {"img_size": 48, "embed_dim": 24}),
        ({"hidden_dim": 2}, {}),
        ({}, {"img_size": 16}),  # one patch
        ({"variant": "released"}, {"img_size": (40, 64), "stride": 8}),  # 28 patches
    ],
    ids=str,
)
def test_svps_settings_are_the_formula(arguments: dict[str, Any], sizes: dict[str, Any]) -> None:
    method = SVP(**{"share_layers": 8, "hidden_dim": 5, **arguments})
    model = adapted(method, **sizes)
    assert_as_written_out(
        model,
        lambda state: reference_vim.svp(
            state,
            share_layers=method.share_layers,
            variant=method.variant,
            include_cls=method.include_cls,
            depths=method.depths,
        ),
        stride=sizes.get("stride", 16),
    )


def test_svp_on_vim_tiny_is_its_formula() -> None:
    model = create_model("vim_tiny_patch16_224", num_classes=3, method="svp", share_layers=5, hidden_dim=16).eval()
    state = reference_vim.fill(model)
    images = reference_vim.make_images(1, 3, 224, 224)
    with torch.no_grad():
        before = reference_vim.svp(state, share_layers=5)
        expected = reference_vim.logits(state, images.double(), stride=16, before_block=before)
        assert relative_error(model(images), expected) <= BACKBONE.forward


def test_the_two_variants_differ_and_the_first_half_does_not() -> None:
    hidden = reference_vim.make_images(2, 13, 32)
    out = {}
    for variant in ("paper", "released"):
        model = adapted(SVP(variant=variant, share_layers=2))  # type: ignore[arg-type]
        reference_vim.fill(model)
        out[variant] = model.points.tokens[0](1, TokenState(hidden, None, (6,))).settled().hidden
    assert relative_error(out["paper"][:, :6], out["released"][:, :6]) <= 1e-6
    assert torch.equal(out["paper"][:, 6], out["released"][:, 6])
    assert relative_error(out["paper"][:, 7:], out["released"][:, 7:]) > 1e-3


@pytest.mark.parametrize("variant", ["paper", "released"])
def test_the_class_token_is_never_prompted(variant: Any) -> None:
    model = adapted(SVP(variant=variant))
    reference_vim.fill(model)
    hidden = reference_vim.make_images(2, 13, 32).requires_grad_()
    state = model.points.tokens[0](0, TokenState(hidden, None, (6,))).settled()
    assert torch.equal(state.hidden[:, 6], hidden[:, 6])
    assert not any(torch.equal(state.hidden[:, t], hidden[:, t]) for t in range(13) if t != 6)
    trained = list(trained_parameters(model).values())
    gradients = torch.autograd.grad(state.hidden[:, 6].sum(), [hidden, *trained], allow_unused=True)
    for gradient in gradients[1:]:
        assert gradient is None or gradient.count_nonzero() == 0
    only_itself = torch.zeros_like(hidden)
    only_itself[:, 6] = 1
    assert torch.equal(gradients[0], only_itself)


@pytest.mark.parametrize("include_cls", [False, True])
def test_paper_prompts_are_made_from_the_token_itself(include_cls: bool) -> None:
    model = adapted(SVP(include_cls=include_cls))
    reference_vim.fill(model)
    hidden = reference_vim.make_images(1, 13, 32)
    before = model.points.tokens[0](2, TokenState(hidden, None, (6,))).settled().hidden
    for token in range(13):
        changed = hidden.clone()
        changed[:, token] += 1
        after = model.points.tokens[0](2, TokenState(changed, None, (6,))).settled().hidden
        moved = (after != before).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == [token]
        prompts = after - changed - (before - hidden)
        assert (prompts[:, token].abs().max() > 1e-3) == (token != 6 or include_cls)


def test_released_prompts_are_made_from_the_token_before_too() -> None:
    model = adapted(SVP(variant="released"))
    reference_vim.fill(model)
    hidden = reference_vim.make_images(1, 13, 32)
    before = model.points.tokens[0](2, TokenState(hidden, None, (6,))).settled().hidden
    for token in range(13):
        changed = hidden.clone()
        changed[:, token] += 1
        after = model.points.tokens[0](2, TokenState(changed, None, (6,))).settled().hidden
        moved = (after != before).any(dim=-1)[0].nonzero().flatten().tolist()
        assert moved == ([token, token + 7] if token < 6 else [token])


@pytest.mark.parametrize(
    ("sizes", "patches"), [({"img_size": 48}, 9), ({"img_size": 48, "stride": 8}, 25), ({"img_size": 16}, 1)]
)
def test_released_needs_an_even_number_of_patches(sizes: dict[str, Any], patches: int) -> None:
    with pytest.raises(ConfigError, match=rf"even number of patches.*has {patches} patches.*use variant paper"):
        adapted(SVP(variant="released"), **sizes)


def test_stride_8_takes_paper_only() -> None:
    with torch.device("meta"):
        model = timm.create_model("vim_tiny_patch16_stride8_224")
        with pytest.raises(ConfigError, match="this model has 729"):
            adapt(model, SVP(variant="released"))
        adapt(model, SVP())


@pytest.mark.parametrize("share_layers", [1, 2, 5, 7, 8, 12, 23, 24, 100])
def test_counts_on_vim_small(share_layers: int) -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=100, method="svp", share_layers=share_layers)
    trained = trained_parameters(model)
    without_head = sum(p.numel() for name, p in trained.items() if not name.startswith("head."))
    assert without_head == math.ceil(24 / share_layers) * 148_224 + 1_199_616
    assert sum(p.numel() for p in trained.values()) == without_head + 38_500
    groups = math.ceil(24 / share_layers)
    shapes = {name: tuple(p.shape) for name, p in trained.items()}
    assert shapes["adapter.alpha"] == (groups, 384)
    assert shapes["adapter.beta"] == (24, 384)
    assert shapes[f"adapter.cross.{groups - 1}.weight"] == (384, 384)
    assert shapes[f"adapter.cross.{groups - 1}.bias"] == (384,)
    assert shapes["adapter.inner.23.down.weight"] == (64, 384)
    assert shapes["adapter.inner.23.down.bias"] == (64,)
    assert shapes["adapter.inner.23.up.weight"] == (384, 64)
    assert shapes["adapter.inner.23.up.bias"] == (384,)
    assert len(shapes) == 2 + 2 * groups + 4 * 24 + 2


def test_svps_dropout_is_of_each_prompt_and_only_while_training() -> None:
    model = adapted(SVP(dropout=0.5))
    reference_vim.fill(model)
    with torch.no_grad():  # prompts of exactly 1 (cross) and 10 (inner)
        for parameter in trained_parameters(model).values():
            parameter.zero_()
        one = 1.2784645427610738  # SiLU of it is 1
        model.get_parameter("adapter.cross.0.bias").fill_(one)
        model.get_parameter("adapter.inner.0.up.bias").fill_(one)
        model.get_parameter("adapter.alpha").fill_(1.0)
        model.get_parameter("adapter.beta").fill_(10.0)
    state = TokenState(torch.zeros(2, 13, 32), None, (6,))
    still = model.points.tokens[0](0, state).settled().hidden
    patches = [t for t in range(13) if t != 6]
    assert torch.allclose(still[:, patches], torch.full((2, 12, 32), 11.0))
    model.train()
    values = model.points.tokens[0](0, state).settled().hidden[:, patches].round().unique().tolist()
    assert values == [0.0, 2.0, 20.0, 22.0]


# ------------------------------------------------------------------------------------------------------- VPT


@pytest.mark.parametrize("length", [1, 4, 5])
@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("mode", [None, "replace", "accumulate"])
def test_vpt_is_its_formula(mode: Any, position: Any, length: int) -> None:
    method = VPTShallow(length, position) if mode is None else VPTDeep(length, position, mode)
    model = adapted(method)
    assert_as_written_out(model, lambda state: reference_vim.vpt(state, position=position, mode=mode))


@pytest.mark.parametrize("sizes", [{"img_size": 48}, {"img_size": 48, "stride": 8}, {"img_size": 16}], ids=str)
@pytest.mark.parametrize("position", POSITIONS)
def test_vpt_on_other_grids(sizes: dict[str, Any], position: Any) -> None:
    model = adapted(VPTDeep(3, position), **sizes)
    assert_as_written_out(
        model,
        lambda state: reference_vim.vpt(state, position=position, mode="replace"),
        images=reference_vim.make_images(1, 3, *model.patch_embed.img_size),
        stride=sizes.get("stride", 16),
    )


@pytest.mark.parametrize(
    ("position", "length", "expected"),
    [
        ("prefix", 2, "12abCde"),
        ("suffix", 2, "abCde12"),
        ("both", 2, "1abCde2"),
        ("both", 3, "12abCde3"),
        ("both", 1, "1abCde"),
        ("around_cls", 2, "ab1C2de"),
        ("around_cls", 3, "ab12C3de"),
        ("around_cls", 1, "ab1Cde"),
        ("spread", 1, "ab1Cde"),
        ("spread", 2, "a1bC2de"),
        ("spread", 4, "a1b2C3d4e"),
        ("spread", 5, "1a2b3C4d5e"),
        ("spread", 9, "1a23b45C67d89e"),
    ],
)
def test_where_prompts_stand(position: str, length: int, expected: str) -> None:
    """Five tokens a, b, C (the class token), d, e, and prompts 1, 2, …"""
    places = prompt_positions(position, length, 5, [2])
    tokens, prompts = list("edCba"), [str(k) for k in range(length, 0, -1)]
    written = "".join(prompts.pop() if k in places else tokens.pop() for k in range(5 + length))
    assert written == expected
    assert places == sorted(places)


@settings(max_examples=60, deadline=None)
@given(
    position=st.sampled_from(POSITIONS), length=st.integers(1, 40), tokens=st.integers(2, 30), at=st.floats(0, 0.999)
)
def test_prompts_never_collide_and_spread_evenly(position: str, length: int, tokens: int, at: float) -> None:
    places = prompt_positions(position, length, tokens, [int(at * tokens)])
    assert len(set(places)) == length
    assert places[0] >= 0
    assert places[-1] < tokens + length
    if position == "spread":
        edges = [-1, *places, tokens + length]
        gaps = [b - a - 1 for a, b in pairwise(edges)]
        assert max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    ("position", "index"), [("prefix", 10), ("suffix", 6), ("both", 8), ("around_cls", 8), ("spread", 8)]
)
@pytest.mark.parametrize("deep", [False, True])
def test_the_class_tokens_place_moves(deep: bool, position: Any, index: int) -> None:
    model = adapted(VPTDeep(4, position) if deep else VPTShallow(4, position))
    reference_vim.fill(model)
    seen: list[TokenState] = []
    model.points.on_tokens(lambda _, state: seen.append(state) or state)  # type: ignore[func-returns-value]
    images = reference_vim.make_images(2, 3, 48, 64)
    tokens, (cls_index,) = model.forward_tokens(images)
    assert tokens.shape[1] == 17
    assert cls_index == index
    assert [state.cls_index for state in seen] == [index] * 3
    embedded = model.embed(images)
    assert torch.equal(seen[0].hidden[:, index], embedded.hidden[:, embedded.cls_index])
    assert torch.equal(model.forward_features(images), tokens[:, index])


def test_prompts_get_no_position_embedding() -> None:
    model = adapted(VPTShallow(3, "both"))
    reference_vim.fill(model)
    with torch.no_grad():
        model.pos_embed.fill_(1e3)
    state = model.points.tokens[0](0, model.embed(reference_vim.make_images(2, 3, 48, 64)))
    prompts = model.get_parameter("adapter.prompts")[0]
    assert torch.equal(state.hidden[:, [0, 1, 15]], prompts.expand(2, 3, 32))


@pytest.mark.parametrize("mode", ["replace", "accumulate"])
@pytest.mark.parametrize("position", POSITIONS)
def test_what_survives_of_an_older_prompt(position: Any, mode: Any) -> None:
    """At the places of the prompts, before block i ≥ 1: `replace` leaves p_i and nothing else, `accumulate` more."""
    model = adapted(VPTDeep(3, position, mode))
    reference_vim.fill(model)
    states: list[TokenState] = []
    model.points.on_tokens(lambda _, state: states.append(state) or state)  # type: ignore[func-returns-value]
    model(reference_vim.make_images(2, 3, 48, 64))
    prompts = model.get_parameter("adapter.prompts")
    places = prompt_positions(position, 3, 13, [6])
    others = [k for k in range(16) if k not in places]
    for layer in (1, 2):
        hidden, residual = states[layer].hidden, states[layer].residual
        assert residual is not None
        assert torch.equal(hidden[:, places], prompts[layer].expand(2, 3, 32))
        entering = (hidden + residual)[:, places]
        (gradient,) = torch.autograd.grad(entering.square().sum(), prompts, retain_graph=True)
        assert gradient[layer].count_nonzero() > 0
        assert (gradient[:layer].count_nonzero() == 0) == (mode == "replace")
        assert gradient[layer + 1 :].count_nonzero() == 0
        assert (residual[:, places].count_nonzero() == 0) == (mode == "replace")
        # The tokens of the image keep their stream, and carry what they took from older prompts.
        assert residual[:, others].count_nonzero() > 0
        (gradient,) = torch.autograd.grad(residual[:, others].square().sum(), prompts, retain_graph=True)
        if layer == 2:
            assert gradient[0].count_nonzero() > 0


def test_a_prefix_reaches_the_image_by_the_forward_scan_only() -> None:
    """Why the position is a setting: with the forward scan silenced, a prefix changes nothing and a suffix does."""
    for position, changes in (("prefix", False), ("suffix", True)):
        model = adapted(VPTDeep(2, position))  # type: ignore[arg-type]
        reference_vim.fill(model)
        with torch.no_grad():
            for mixer in model.mixers:  # no state, and no reach of the convolution: each token for itself
                mixer.get_parameter("x_proj.weight").zero_()
                mixer.conv1d.weight[..., :-1] = 0
        images = reference_vim.make_images(1, 3, 48, 64)
        before = model(images)
        with torch.no_grad():
            model.get_parameter("adapter.prompts").add_(reference_vim.sample("prompts", (3, 2, 32)))
        assert (relative_error(model(images), before) > 1e-6) == changes


@pytest.mark.parametrize("deep", [False, True])
def test_vpts_initialisation(deep: bool) -> None:
    torch.manual_seed(3)
    sizes: dict[str, Any] = {"img_size": 48, "embed_dim": 64, "depth": 4}
    model = adapted(VPTDeep(50) if deep else VPTShallow(200), **sizes)
    prompts = model.get_parameter("adapter.prompts").detach()
    bound = math.sqrt(6 / (3 * 16 * 16 + 64))
    assert prompts.shape == ((4, 50, 64) if deep else (1, 200, 64))
    assert 0.999 * bound < prompts.abs().max() <= bound
    # 12,800 draws of a uniform distribution: its largest distance from the diagonal is below 1.95 / √n with p = .999
    ranked = ((prompts / bound + 1) / 2).flatten().sort().values
    n = len(ranked)
    distance = (ranked - torch.arange(1, n + 1) / n).abs().max()
    assert distance < 1.95 / math.sqrt(n) + 1 / n
    other = adapted(VPTDeep(50), img_size=32, patch_size=8, embed_dim=64).get_parameter("adapter.prompts")
    assert 0.999 * math.sqrt(6 / (3 * 64 + 64)) < other.abs().max() <= math.sqrt(6 / (3 * 64 + 64))


def test_vpts_dropout_is_drawn_for_each_image() -> None:
    model = adapted(VPTShallow(4, "suffix", dropout=0.5)).train()
    state = TokenState(torch.zeros(3, 13, 32), None, (6,))
    prompts = model.points.tokens[0](0, state).settled().hidden[:, 13:]
    expected = model.get_parameter("adapter.prompts")[0] * 2
    assert ((prompts == 0) | (prompts == expected)).all()
    assert not torch.equal(prompts[0], prompts[1])
    model.eval()
    assert torch.equal(model.points.tokens[0](0, state).settled().hidden[:, 13:], (expected / 2).expand(3, 4, 32))


@pytest.mark.parametrize(
    ("method", "per_token"), [("vpt_shallow", 384), ("vpt_deep", 24 * 384)], ids=["shallow", "deep"]
)
@pytest.mark.parametrize("length", [1, 10, 50])
def test_vpt_counts_on_vim_small(method: str, per_token: int, length: int) -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=2, method=method, length=length)
    names = {name for name in trained_parameters(model) if not name.startswith("head.")}
    assert names == {"adapter.prompts"}
    assert model.get_parameter("adapter.prompts").numel() == length * per_token
