"""Hybrids: several methods on one backbone, in Python, in a config and on the command line."""

from __future__ import annotations

from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
from helpers import assert_error, command, run, settle, small
from tolerances import SAME_MATHS, relative_error
from torch import nn

from svp_bench.core.errors import ConfigError, UsageError
from svp_bench.methods import METHODS, create_model, list_methods
from svp_bench.methods.build import create_backbone
from svp_bench.methods.checks import trained_parameters

IMAGES = reference_vim.make_images(2, 3, 64, 64)
WHOLE = {"full", "last_blocks", *(n for n in METHODS.names() if METHODS.get(n).stages > 1)}  # or train in stages
PAIRS = list(combinations([name for name in list_methods() if name not in WHOLE], 2))


def build(*methods: str, backbone: str = "vim_nano_patch8_64", **arguments: Any) -> Any:
    torch.manual_seed(0)
    return create_model(backbone, num_classes=4, method=list(methods), **arguments).eval()


def size(model: nn.Module) -> int:
    return sum(p.numel() for n, p in trained_parameters(model).items() if not n.startswith("head."))


@pytest.mark.parametrize("pair", PAIRS, ids="+".join)
def test_any_two_methods_add_up(pair: tuple[str, str]) -> None:
    """Counts add up, no names clash, and each trained tensor gets a gradient as in the method alone."""
    model = build(*pair)
    alone = [build(name) for name in pair]
    assert size(model) == sum(map(size, alone)) == model.method.adapter_parameters(model)
    expected = {
        name.replace("adapter.", f"adapter.{method}.", 1)
        for method, one in zip(pair, alone, strict=True)
        for name in trained_parameters(one)
    }
    assert {*trained_parameters(model)} == expected
    assert model(IMAGES).isfinite().all()
    assert model.method.identity_at_start == all(one.method.identity_at_start for one in alone)
    if model.method.identity_at_start:
        torch.manual_seed(0)
        plain = create_backbone("vim_nano_patch8_64", num_classes=4).eval()
        with torch.no_grad():
            assert relative_error(model(IMAGES), plain(IMAGES)) <= SAME_MATHS


def test_prompts_of_two_methods_keep_their_places() -> None:
    """Deep prompts are replaced at their own positions, also where another method inserts tokens after them."""
    model = build("vpt_deep", "vpt_shallow", vpt_deep={"length": 2, "position": "prefix"}, vpt_shallow={"length": 3})
    states: list[Any] = []
    model.points.on_tokens(lambda _, state: states.append(state) or state)  # type: ignore[func-returns-value]
    model(IMAGES)
    deep, shallow = model.adapter["vpt_deep"], model.adapter["vpt_shallow"]
    for layer, state in enumerate(states):
        assert state.inserted == {deep: (3, 4), shallow: (0, 1, 2)}
        assert torch.equal(state.hidden[:, [3, 4]], deep.prompts[layer].expand(2, -1, -1))
    assert torch.equal(states[0].hidden[:, :3], shallow.prompts[0].expand(2, -1, -1))


def test_inserted_tokens_are_not_prompted() -> None:
    model = build("vpt_shallow", "svp")
    reference_vim.fill(model)
    state = model.embed(IMAGES)
    inserted = model.points.tokens[0](0, state)
    prompted = model.points.tokens[1](0, inserted).settled()
    changed = (prompted.hidden != inserted.hidden).any(dim=-1).any(dim=0).nonzero().flatten().tolist()
    assert changed == [at for at in range(inserted.hidden.shape[1]) if at not in inserted.not_patches]


@pytest.mark.parametrize("backbone", ["vim_nano_patch8_64", "vit_nano_patch8_64"])
def test_a_hybrid_of_mergeable_methods_merges(backbone: str) -> None:
    model = build("lora", "bias", backbone=backbone, lora={"rank": 3})
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.add_(0.1 * reference_vim.sample(name, parameter.shape))
        before = model(IMAGES)
        model.method.merge(model)
        assert relative_error(model(IMAGES), before) <= SAME_MATHS
    assert model.adapter is None
    plain = create_backbone(backbone, num_classes=4).eval()
    plain.load_state_dict(model.state_dict())


def test_wrong_hybrids_are_refused() -> None:
    with pytest.raises(UsageError, match=r"unknown method 'lorra'; did you mean 'lora'\?"):
        build("lora", "lorra")
    with pytest.raises(ConfigError, match=r"unknown argument of the method lora 'rnak'; did you mean 'rank'\?"):
        build("lora", "bias", lora={"rnak": 2})
    with pytest.raises(ConfigError, match=r"unknown method of the hybrid 'lra'; did you mean 'lora'\?"):
        build("lora", "bias", lra={"rank": 2})
    with pytest.raises(ConfigError, match=r"bias and partial both train layers\.0\.mixer\.dt_proj\.bias"):
        build("bias", "partial", partial={"tensors": ["dt_proj.bias"]})
    model = build("adapter", "lora")
    with pytest.raises(ConfigError, match="does not merge"):
        model.method.merge(model)
    assert METHODS.names().count("hybrid") == 0


@pytest.mark.parametrize("form", ["top", "model", "flag"])
def test_a_hybrid_in_a_config_is_recorded_resumed_and_predicted(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(tmp_path, monkeypatch)
    lines = {"top": "method: [lora, offset]", "model": "model:\n  method: [lora, offset]", "flag": "model: {}"}[form]
    (tmp_path / "hybrid.yaml").write_text(f"{lines}\n", encoding="utf-8")
    flags = ["--config", "hybrid.yaml", "--model.method.parts.lora.rank", "2"]
    flags += ["--method", "lora+offset"] if form == "flag" else []
    outcome = run(*small(*flags))
    record = outcome.record
    assert record["method"] == "lora+offset"
    assert record["method_args"]["parts"]["lora"]["rank"] == 2
    assert record["method_args"]["parts"]["offset"] == {"include_cls": False, "depths": None}
    assert outcome.folder.name.startswith("lora+offset-")
    weights = torch.load(outcome.folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[2] for name in weights if name.startswith("model.adapter.")} == {"lora", "offset"}
    run("table")


def test_a_hybrid_on_the_command_line_names_the_nearest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    assert "did you mean 'lora'?" in assert_error(command(*small("--method", "lroa+offset")), 2)
    assert "twice" in assert_error(command(*small("--method", "lora+lora")), 2)
    text = assert_error(command(*small("--method", "lora,offset", "--model.method.parts.lora.rnk", "2")), 2)
    assert "did you mean 'rank'?" in text


MERGEABLE = ["lora", "prodial", "bias", "partial"]


@pytest.mark.parametrize("backbone", ["vim_nano_patch8_64", "vit_nano_patch8_64"])
@pytest.mark.parametrize("dora", [None, True])
@pytest.mark.parametrize("pair", list(permutations(MERGEABLE, 2)), ids="+".join)
def test_a_hybrid_merges_exactly_or_says_that_it_does_not(
    pair: tuple[str, str], dora: bool | None, backbone: str
) -> None:
    """Folding prodial or DoRA and another change of the same weight one after the other is another model."""
    targets = ["in_proj", "out_proj"] if backbone.startswith("vim") else ["qkv", "fc1", "proj"]
    lora: dict[str, Any] = {"lora": {"targets": targets, "dora": dora}} if "lora" in pair else {}
    lora |= {"partial": {"tensors": ["pos_embed"]}} if "partial" in pair else {}
    model = build(*pair, backbone=backbone, **lora)
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.add_(0.1 * reference_vim.sample(name, parameter.shape))
        before = model(IMAGES)
        assert model.method.mergeable == ({*pair} != {"lora", "prodial"})
        if model.method.mergeable:
            model.method.merge(model)
            assert relative_error(model(IMAGES), before) <= SAME_MATHS
