"""SPT: prompts that start as tokens of training images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
from helpers import run, settle, small
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import adapt, create_backbone, create_model
from svp_bench.methods.hybrid import Hybrid
from svp_bench.methods.spt import SPT
from svp_bench.methods.vpt import VPTDeep, VPTShallow
from svp_bench.models import Backbone, MambaRegister, TokenState, VisionMamba
from svp_bench.train.module import AdaptationModule

SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}


def backbone(family: str) -> Backbone:
    torch.manual_seed(0)
    if family == "vit":
        return create_backbone("vit_nano_patch8_64", num_classes=5).eval()
    model = VisionMamba(**SIZES) if family == "vim" else MambaRegister(registers=2, reduction=2, **SIZES)
    reference_vim.fill(model)
    return model.eval()


def inputs(model: Backbone, images: Tensor) -> list[Tensor]:
    """The patch tokens (B, P, D) at the input of each block."""
    seen: list[Tensor] = []

    def note(_: int, state: TokenState) -> TokenState:
        others = [at for at in range(state.hidden.shape[1]) if at not in state.cls_positions]
        seen.append((state.hidden if state.residual is None else state.hidden + state.residual)[:, others])
        return state

    model.points.on_tokens(note)
    with torch.no_grad():
        model(images)
    return seen


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("family", ["vim", "mambar", "vit"])
def test_prompts_are_patch_tokens_of_the_blocks_input(family: str, deep: bool) -> None:
    model = adapt(backbone(family), SPT(length=5, deep=deep))
    images = reference_vim.make_images(7, 3, *model.image_size)
    torch.manual_seed(0)
    model.method.prepare(model, images.split(3))
    prompts = model.get_parameter("adapter.prompts").detach()
    assert prompts.shape[0] == (model.depth if deep else 1)
    places = []
    for sampled, tokens in zip(prompts, inputs(backbone(family), images), strict=False):
        distances = torch.cdist(sampled, tokens.flatten(0, 1), compute_mode="donot_use_mm_for_euclid_dist")
        assert (distances.min(dim=1).values <= 1e-4 * tokens.abs().max()).all()
        at = distances.argmin(dim=1).tolist()
        assert len(set(at)) == 5  # no token twice
        places.append(at)
    assert not deep or places[0] != places[1]
    assert len({at // model.num_patches for found in places for at in found}) > 1  # of several images


def test_tokens_are_drawn_uniformly() -> None:
    model = adapt(backbone("vim"), SPT(length=4, deep=False))
    images = reference_vim.make_images(5, 3, 48, 64)
    tokens = inputs(backbone("vim"), images)[0].flatten(0, 1)
    counts = torch.zeros(len(tokens))
    torch.manual_seed(0)
    for _ in range(300):
        model.method.prepare(model, images.split(2))
        counts[torch.cdist(model.get_parameter("adapter.prompts")[0].detach(), tokens).argmin(dim=1)] += 1
    assert counts.sum() == 1200
    assert counts.min() > 5  # 20 on average, standard deviation 4.3
    assert counts.max() < 40


def test_few_tokens_leave_the_other_prompts_and_samples_limit_the_images() -> None:
    model = adapt(backbone("vim"), SPT(length=20, samples=1))
    before = model.get_parameter("adapter.prompts").detach().clone()
    model.method.prepare(model, [reference_vim.make_images(4, 3, 48, 64)])
    after = model.get_parameter("adapter.prompts").detach()
    assert (after[:, :12] != before[:, :12]).any(dim=2).all()  # twelve patches of one image
    assert torch.equal(after[:, 12:], before[:, 12:])


def test_then_it_is_vpt() -> None:
    for method, other in ((SPT(3), VPTDeep(3)), (SPT(3, deep=False), VPTShallow(3))):
        models = [adapt(backbone("vim"), one) for one in (method, other)]
        for model in models:
            reference_vim.fill(model)
        images = reference_vim.make_images(2, 3, 48, 64)
        assert torch.equal(models[0](images), models[1](images))


def test_counts_on_vim_small() -> None:
    for arguments, count in (({}, 24 * 20 * 384), ({"deep": False, "length": 100}, 38_400)):
        with torch.device("meta"):
            model = create_model("vim_small_patch16_224", num_classes=2, method="spt", **arguments)
        assert model.method.adapter_parameters(model) == count


def test_in_a_hybrid() -> None:
    parts: dict[str, Any] = {"spt": {"length": 2}, "svp": {"share_layers": 3}}
    model = adapt(backbone("vim"), Hybrid(parts))
    before = model.get_parameter("adapter.spt.prompts").detach().clone()
    model.method.prepare(model, [reference_vim.make_images(4, 3, 48, 64)])
    assert (model.get_parameter("adapter.spt.prompts") != before).all()
    assert isinstance(model.adapter, torch.nn.ModuleDict)


def test_a_run_starts_from_tokens_and_the_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    starts: list[Tensor] = []

    def on_train_start(self: AdaptationModule) -> None:
        starts.append(self.model.get_parameter("adapter.prompts").detach().clone())
        real(self)

    real = AdaptationModule.on_train_start
    monkeypatch.setattr(AdaptationModule, "on_train_start", on_train_start)
    for seed in ("1", "1", "2"):
        run(*small("--method", "spt", "--model.method.length", "3", "--seed_everything", seed))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    bound = (6 / (3 * 8**2 + 16)) ** 0.5
    assert starts[0].abs().max() != pytest.approx(bound, rel=0.05)
    assert starts[0].shape == (3, 3, 16)


def test_bad_settings() -> None:
    with pytest.raises(ConfigError, match="spt: samples must be at least 1, not 0"):
        SPT(samples=0)
