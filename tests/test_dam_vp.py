"""DAM-VP: clusters of training images, a frame for each, in runs that stop, resume and are loaded."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import reference_vim
import torch
from helpers import command, run, settle, small
from sklearn.cluster import AgglomerativeClustering
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor

from svp_bench.core.errors import CheckpointError, ConfigError
from svp_bench.methods import create_model
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.dam_vp import DAMVP
from svp_bench.methods.hybrid import Hybrid
from svp_bench.models import Backbone, MambaRegister, VisionMamba
from svp_bench.train.module import AdaptationModule

SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 2, "d_state": 4, "num_classes": 5}
FRAME = 3 * (48 * 64 - 40 * 56)  # of width 4


def groups() -> Tensor:
    """Twelve images of three kinds, in turn."""
    kinds = 3 * reference_vim.make_images(3, 3, 48, 64)
    return kinds.repeat(4, 1, 1, 1) + 0.1 * reference_vim.make_images(12, 3, 48, 64)


def prepared(model: Backbone, **arguments: Any) -> Backbone:
    adapt(model.eval(), DAMVP(**{"max_clusters": 3, "width": 4, **arguments}))
    model.method.prepare(model, groups().split(5))
    return model


def vim() -> Backbone:
    model = VisionMamba(**SIZES)
    reference_vim.fill(model)
    return model


def features(model: Backbone, images: Tensor) -> Tensor:
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    return reference_vim.features(state, images.double(), stride=16)


def test_the_clusters_are_those_of_average_linkage() -> None:
    model = prepared(vim())
    found = features(model, groups())
    labels = AgglomerativeClustering(3, linkage="average").fit_predict(found.numpy())
    assert sorted(set(labels)) == [0, 1, 2]
    expected = torch.stack([found[torch.from_numpy(labels) == label].mean(0) for label in range(3)])
    means = model.get_buffer("adapter.means")
    order = torch.cdist(means.double(), expected).argmin(dim=1)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert relative_error(means, expected[order]) <= BACKBONE.forward


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.1])
def test_a_threshold_is_that_of_scikit_learn(share: float) -> None:
    found = features(vim(), groups())
    threshold = share * torch.cdist(found, found).max().item()
    clusters = AgglomerativeClustering(None, linkage="average", distance_threshold=threshold).fit(found.numpy())
    model = prepared(vim(), threshold=threshold, max_clusters=12)
    assert len(model.get_buffer("adapter.means")) == clusters.n_clusters_
    assert len(prepared(vim(), threshold=threshold, max_clusters=2).get_buffer("adapter.means")) <= 2


def test_an_image_gets_the_frame_of_the_nearest_mean() -> None:
    model = prepared(vim())
    images = groups()[:6] + 0.2 * reference_vim.make_images(6, 3, 48, 64)
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    means = model.get_buffer("adapter.means").double()
    prompted = images.double()
    chosen = []
    for at, feature in enumerate(features(model, images)):
        distances = [(feature - mean).square().sum() for mean in means]
        chosen.append(distances.index(min(distances)))
        delta = state["adapter.delta"][chosen[-1]]
        frame = torch.zeros(3, 48, 64, dtype=torch.float64)
        frame[:, :4], frame[:, 44:] = delta[:, :256].view(3, 4, 64), delta[:, 256:512].view(3, 4, 64)
        frame[:, 4:44, :4], frame[:, 4:44, 60:] = delta[:, 512:672].view(3, 40, 4), delta[:, 672:].view(3, 40, 4)
        prompted[at] += frame
    assert chosen[:3] == chosen[3:]
    assert set(chosen) == {0, 1, 2}
    assert relative_error(model(images), reference_vim.logits(state, prompted, stride=16)) <= BACKBONE.forward
    model.train()  # the features are those of eval mode, and the modes stay
    assert relative_error(model(images), reference_vim.logits(state, prompted, stride=16)) <= BACKBONE.forward
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("family", ["vim", "mambar", "vit"])
def test_frames_of_the_batchs_clusters_get_gradients(family: str) -> None:
    if family == "vit":
        model = create_backbone("vit_nano_patch8_64", num_classes=5)
        images = 3 * reference_vim.make_images(3, 3, 64, 64).repeat(2, 1, 1, 1)
    else:
        model = vim() if family == "vim" else MambaRegister(registers=2, reduction=2, **SIZES)
        images = groups()[:6]
    if family == "mambar":
        reference_vim.fill(model)
    adapt(model, DAMVP(3, width=4))
    model.method.prepare(model, [images])
    assert model.method.adapter_parameters(model) == 3 * model.get_parameter("adapter.delta")[0].numel()
    model(images[[0, 3]]).square().sum().backward()  # of one kind
    used = trained_parameters(model)["adapter.delta"].grad.flatten(1).any(dim=1)  # type: ignore[union-attr]
    assert used.sum() == 1
    model(images).square().sum().backward()
    assert trained_parameters(model)["adapter.delta"].grad.flatten(1).any(dim=1).all()  # type: ignore[union-attr]


def test_counts() -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=2, method="dam_vp")
    assert model.method.adapter_parameters(model) == 69_840
    model.method.restore(model, {"adapter.means": torch.zeros(5, 384)})
    assert model.method.adapter_parameters(model) == 5 * 69_840 == model.get_parameter("adapter.delta").numel()
    assert prepared(vim()).method.adapter_parameters(vim()) == 3 * FRAME


def test_one_cluster_and_one_image() -> None:
    model = adapt(vim(), DAMVP(4, width=4))
    model.method.prepare(model, [groups()[:1]])
    assert len(model.get_buffer("adapter.means")) == 1
    assert len(prepared(vim(), samples=2).get_buffer("adapter.means")) == 2


def test_a_copy_of_a_prepared_model_has_its_own_frames() -> None:
    model = prepared(vim())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = copied(groups())
        model.get_parameter("layers.0.mixer.D").zero_()
        model.get_parameter("adapter.delta").zero_()
        assert torch.equal(copied(groups()), before)


def test_in_a_hybrid_the_features_are_those_of_the_backbone_alone() -> None:
    alone = prepared(vim())
    model = adapt(vim(), Hybrid({"lora": {"rank": 2}, "dam_vp": {"max_clusters": 3, "width": 4}})).eval()
    with torch.no_grad():
        for name, parameter in trained_parameters(model).items():
            parameter.copy_(reference_vim.sample(name, parameter.shape))
    model.method.prepare(model, groups().split(5))
    means = model.get_buffer("adapter.dam_vp.means")
    assert relative_error(means, alone.get_buffer("adapter.means")) <= SAME_MATHS
    again = adapt(vim(), Hybrid(model.method.parts))
    again.method.restore(again, {name: value.detach() for name, value in model.state_dict().items()})
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.eval()(groups()), model(groups()))
    trained = adapt(vim(), Hybrid({"partial": {}, "dam_vp": {"width": 4}}))
    with pytest.raises(ConfigError, match="dam_vp needs the features of a frozen backbone"):
        trained.method.prepare(trained, [groups()])


# --------------------------------------------------------------------------------------------------------------- runs

FLAGS = ("--method", "dam_vp", "--model.method.max_clusters", "3", "--trainer.max_epochs", "2")


def line(*extra: str) -> list[str]:
    return small(*FLAGS, *extra, trainer__max_epochs=None)


def tensors(folder: Path) -> dict[str, Tensor]:
    state: dict[str, Tensor] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return state


@pytest.mark.parametrize(
    "more", [(), ("--model.ema.decay", "0.5", "--model.ema.evaluate", "true")], ids=["plain", "ema"]
)
def test_a_run_counts_its_clusters_and_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Any) -> None:
    settle(tmp_path, monkeypatch)
    outcome = run(*line(*more))
    frames = 3 * 3 * (32 * 32 - 24 * 24)
    assert outcome.record["parameters"]["adapter"] == frames
    assert f"dam_vp: {frames:,} parameters" in outcome.out
    assert not outcome.record.get("not_comparable")
    state = tensors(outcome.folder)
    assert state["model.adapter.means"].shape == (3, 16)
    assert state["model.adapter.delta"].shape == (3, 3, 448)
    path = outcome.folder / "checkpoints" / "last.ckpt"
    module = AdaptationModule.load_from_checkpoint(path)
    assert torch.equal(module.model.get_buffer("adapter.means"), state["model.adapter.means"])
    assert torch.equal(module.model.get_parameter("adapter.delta"), state["model.adapter.delta"])
    again = run("test", "--config", str(outcome.folder / "config.yaml"), "--ckpt_path", str(path))
    assert "(the same)" in again.out
    assert "Predicted 9 of 9 images" in run("predict", "--ckpt", str(path), "--images", "data/cifar/images/test").err


def test_augmentation_does_not_change_the_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    plain = tensors(run(*line()).folder)["model.adapter.means"]
    flipped = tensors(run(*line("--data.augment.flip", "0.5")).folder)["model.adapter.means"]
    assert torch.equal(plain, flipped)


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
def test_a_resumed_run_ends_at_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    whole = tensors(run(*line()).folder)
    real, seen = AdaptationModule.training_step, []

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> Tensor:
        seen.append(batch_idx)
        if len(seen) == 7:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(AdaptationModule, "training_step", training_step)
    stopped = command(*line("--results_root", "other", "--runs_root", "elsewhere"))
    assert "Stopped by SIGUSR1" in stopped.out
    again = run(*line("--results_root", "other", "--runs_root", "elsewhere", "--resume"))
    assert again.folder == stopped.folder
    resumed = tensors(again.folder)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    assert len(seen) == 10


def test_a_checkpoint_without_means_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    path = run(*line()).folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    del content["state_dict"]["model.adapter.means"]
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"first difference: model.adapter\.(means|delta)"):
        AdaptationModule.load_from_checkpoint(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_clusters": 0}, "dam_vp: max_clusters must be at least 1, not 0"),
        ({"threshold": 0.0}, "dam_vp: threshold must be above 0, not 0.0"),
        ({"width": 32}, "dam_vp: width must be at most 31 for 64x64 images, not 32"),
    ],
    ids=str,
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vim_nano_patch8_64", num_classes=2, method="dam_vp", **arguments)
