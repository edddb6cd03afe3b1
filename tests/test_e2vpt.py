"""E²VPT: masked prompts, their pruning, and runs through both stages."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
from helpers import command, run, settle, small
from tolerances import BACKBONE, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import adapt, create_backbone, create_model
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.e2vpt import E2VPT
from svp_bench.models import Backbone, MambaRegister, VisionMamba
from svp_bench.train.module import AdaptationModule

SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}


@pytest.mark.parametrize("position", ["prefix", "spread"])
def test_e2vpt_is_its_formula(position: Any) -> None:
    model = adapt(VisionMamba(**SIZES).eval(), E2VPT(4, pieces=8, position=position))
    reference_vim.fill(model)
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    leaves = [state[name].requires_grad_() for name in trained_parameters(model)]
    tokens, pieces = state["adapter.project.tokens"], state["adapter.project.pieces"]
    scales = torch.stack([torch.stack([tokens[p] * pieces[p, d // 4] for d in range(32)]) for p in range(4)])
    masked = state["adapter.prompts"] * scales
    images = reference_vim.make_images(2, 3, 48, 64)
    before = reference_vim.vpt({**state, "adapter.prompts": masked}, position=position, mode="replace")
    expected = reference_vim.logits(state, images.double(), stride=16, before_block=before)
    found = model(images)
    assert relative_error(found, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*found.shape)
    gradients = torch.autograd.grad(found, list(trained_parameters(model).values()), cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained_parameters(model), gradients, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name


def test_the_smallest_sums_are_pruned() -> None:
    method = E2VPT(4, pieces=4, pruned_tokens=0.5, pruned_pieces=0.25, first_share=0.5)
    model: Any = adapt(VisionMamba(**SIZES).eval(), method)
    start = model.adapter.prompts.detach().clone()
    masks = model.adapter.project
    with torch.no_grad():
        for parameter in model.adapter.parameters():
            parameter.add_(1)
        masks.of_tokens.copy_(torch.tensor([3.0, 1.0, 4.0, 2.0]))
        masks.of_pieces.copy_(torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3], [3, 4, 1, 2]]))
    for epoch in (0, 1, 2, 4):
        method.start_epoch(model, epoch, 6)
        assert (masks.tokens == 2).all()
    method.start_epoch(model, 3, 6)
    assert masks.tokens.tolist() == [1, 0, 1, 0]
    assert masks.pieces.tolist() == [[0, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 0, 1]]
    assert torch.equal(model.adapter.prompts, start)


@pytest.mark.parametrize(("share", "kept"), [(0.0, 5), (0.1, 5), (0.5, 3), (0.99, 1)])
def test_one_prompt_is_always_kept(share: float, kept: int) -> None:
    method = E2VPT(5, pieces=1, pruned_tokens=share, pruned_pieces=share)
    model: Any = adapt(VisionMamba(**SIZES).eval(), method)
    method.start_epoch(model, 1, 2)
    assert model.adapter.project.tokens.sum() == kept
    assert model.adapter.project.pieces.sum() == 5


@pytest.mark.parametrize("family", ["vim", "mambar", "vit"])
def test_masks_and_prompts_get_gradients_in_each_family(family: str) -> None:
    model: Backbone
    if family == "mambar":
        model = MambaRegister(registers=2, reduction=2, **SIZES)
        reference_vim.fill(model)
    else:
        model = create_backbone(f"{family}_nano_patch8_64", num_classes=5)
    adapt(model, E2VPT(position="spread"))
    model(reference_vim.make_images(2, 3, *model.image_size)).square().sum().backward()
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_the_count_is_that_of_vpt() -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=2, method="e2vpt")
    assert model.method.adapter_parameters(model) == 24 * 10 * 384
    assert {name for name in trained_parameters(model) if not model.method.decays(name)} == {
        "adapter.project.tokens",
        "adapter.project.pieces",
    }


# --------------------------------------------------------------------------------------------------------------- runs

FLAGS = ("--method", "e2vpt", "--model.method.length", "4", "--trainer.max_epochs", "4", "--model.warmup_epochs", "0")


def line(*extra: str) -> list[str]:
    return small(*FLAGS, *extra, trainer__max_epochs=None)


def tensors(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


def test_a_run_prunes_by_the_gradients_of_its_first_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    sums = {"tokens": torch.zeros(4), "pieces": torch.zeros(4, 16)}
    starts: list[Tensor] = []
    real = E2VPT.before_step

    def before_step(self: E2VPT, model: Any) -> None:
        for name, total in sums.items():
            gradient = getattr(model.adapter.project, name).grad
            assert (gradient is None) == (len(starts) >= 10)
            total += 0 if gradient is None else gradient.abs()
        starts.append(model.adapter.prompts.detach().clone())
        real(self, model)

    monkeypatch.setattr(E2VPT, "before_step", before_step)
    outcome = run(*line())
    state = tensors(outcome.folder)
    assert len(starts) == 20
    assert torch.equal(starts[0], starts[10])
    assert not torch.equal(starts[0], starts[9])
    prefix = "model.adapter.project."
    assert torch.equal(state[f"{prefix}of_tokens"], sums["tokens"])
    assert torch.equal(state[f"{prefix}of_pieces"], sums["pieces"])
    kept = state[f"{prefix}tokens"].bool()
    assert kept.sum() == 2
    assert sums["tokens"][kept].min() > sums["tokens"][~kept].max()
    for mask, found in zip(state[f"{prefix}pieces"].bool(), sums["pieces"], strict=True):
        assert mask.sum() == 8
        assert found[mask].min() > found[~mask].max()
    record = outcome.record
    assert record["parameters"]["adapter"] == 3 * 4 * 16
    assert not record.get("not_comparable")
    saved = AdaptationModule.load_from_checkpoint(outcome.folder / "checkpoints" / "last.ckpt")
    assert torch.equal(saved.model.get_parameter("adapter.project.tokens"), state[f"{prefix}tokens"])


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_a_stopped_run_ends_at_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    whole = tensors(run(*line()).folder)
    real: Any = AdaptationModule.training_step
    for stop in (3, 10, 13):
        seen = [0]

        def training_step(self: Any, batch: Any, batch_idx: int, stop: int = stop, seen: list[int] = seen) -> Any:
            seen[0] += 1
            if seen[0] == stop:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(self, batch, batch_idx)

        where = ("--runs_root", f"runs{stop}", "--results_root", f"results{stop}")
        with monkeypatch.context() as patch:
            patch.setattr(AdaptationModule, "training_step", training_step)
            stopped = command(*line(*where))
        assert f"after {stop} steps" in stopped.out
        found = tensors(run(*line(*where, "--resume")).folder)
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[name], value) for name, value in whole.items()), stop


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pieces": 5}, "e2vpt: pieces must divide the width 64, not be 5"),
        ({"pruned_tokens": 1.0}, r"e2vpt: pruned_tokens must be in \[0, 1\), not 1.0"),
        ({"first_share": 0.0}, "e2vpt: first_share must be above 0, not 0.0"),
    ],
    ids=str,
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vim_nano_patch8_64", num_classes=2, method="e2vpt", **arguments)
