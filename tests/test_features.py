"""The frozen part of the backbone, computed once per image: where it ends, and that nothing but the time changes."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers import BACKBONE, Outcome, register_backbone, run, settle, small
from torch import nn

from svp_bench.data import cache
from svp_bench.methods.adapter import Adapter
from svp_bench.methods.base import Method
from svp_bench.methods.bias import Bias
from svp_bench.methods.build import adapt
from svp_bench.methods.full import Full
from svp_bench.methods.linear import Linear
from svp_bench.methods.lora import LoRA
from svp_bench.methods.offset import Offset
from svp_bench.methods.svp import SVP
from svp_bench.methods.vpt import VPTShallow
from svp_bench.models import VisionMamba
from svp_bench.train import features
from svp_bench.train.features import frozen_blocks
from svp_bench.train.module import AdaptationModule

DEPTH = 3
LINEAR = ("--method", "linear")
LATE = ("--method", "svp", "--model.method.depths", f"[{DEPTH - 1}]")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def model(method: Method, **arguments: Any) -> VisionMamba:
    register_backbone()
    made = timm.create_model(BACKBONE, num_classes=3, **arguments)
    assert isinstance(made, VisionMamba)
    assert made.depth == DEPTH
    return adapt(made, method)


@pytest.mark.parametrize(
    ("method", "blocks"),
    [
        (Linear(), DEPTH + 1),
        (SVP(share_layers=2, hidden_dim=4, depths=[2, 1]), 1),
        (Offset(depths=[1]), 1),
        (Offset(), 0),
        (VPTShallow(), 0),
        (LoRA(rank=2), 0),
        (Adapter(hidden_dim=4), 0),
        (Bias(), 0),
        (Full(), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Method) else str(value),
)
def test_the_frozen_part_ends_where_the_method_begins(method: Method, blocks: int | None) -> None:
    assert frozen_blocks(model(method)) == blocks


def test_the_frozen_part_ends_where_chance_acts() -> None:
    dropping = model(Linear(), drop_path_rate=0.5)
    assert frozen_blocks(dropping.train()) == 2  # block 0 and 1 have rate 0
    assert frozen_blocks(dropping.eval()) == DEPTH + 1


def test_the_frozen_part_ends_at_a_replaced_or_hooked_part() -> None:
    hooked = model(Linear())
    hooked.layers[2].register_forward_hook(lambda *_: None)
    assert frozen_blocks(hooked) == 2
    replaced = model(Linear())
    replaced.layers[1].norm = nn.LayerNorm(replaced.embed_dim).requires_grad_(False)
    assert frozen_blocks(replaced) == 1
    trained = model(Linear())
    trained.norm_f.requires_grad_()
    assert frozen_blocks(trained) == DEPTH


def test_no_token_hook_is_called_before_its_first_block() -> None:
    seen: list[int] = []
    plain = model(Linear())
    plain.points.on_tokens(lambda layer, state: seen.append(layer) or state, first=2)  # type: ignore[func-returns-value]
    plain(torch.zeros(1, 3, 32, 32))
    assert seen == [2]
    with pytest.raises(ValueError, match="no block 3"):
        plain.points.on_tokens(lambda _, state: state, first=3)


def content(outcome: Outcome) -> dict[str, torch.Tensor]:
    weights: dict[str, torch.Tensor] = torch.load(outcome.folder / "checkpoints/last.ckpt", weights_only=True)[
        "state_dict"
    ]
    return weights


@pytest.mark.parametrize(("method", "what"), [(LINEAR, "pooled features"), (LATE, f"tokens before block {DEPTH - 1}")])
def test_a_run_is_the_same_with_and_without(place: Path, method: tuple[str, ...], what: str) -> None:
    given = small(*method, "--model.learning_rate", "0.05", data__stage="select", trainer__max_epochs="3")
    cached, plain = run(*given), run(*given, "--model.cache_features", "false")
    assert set(cached.record["frozen_features"]) == {"train", "val"}
    assert all(text.startswith(what) for text in cached.record["frozen_features"].values())
    assert "frozen_features" not in plain.record
    assert cached.record["config_digest"] == plain.record["config_digest"]
    for name, value in content(plain).items():
        torch.testing.assert_close(content(cached)[name], value, rtol=1e-4, atol=1e-6)
    assert cached.record["val_correct"] == plain.record["val_correct"]
    assert cached.record["metrics"]["loss"] == pytest.approx(plain.record["metrics"]["loss"], rel=1e-5)


@pytest.mark.parametrize(
    "flags",
    [
        ("--data.augment.flip", "0.5"),
        ("--data.augment.random_erasing", "0.5"),
        ("--data.augment.mixup", "0.8"),
        ("--trainer.callbacks+=MyCallback",),
    ],
    ids=lambda flags: flags[0],
)
def test_nothing_is_cached_where_images_or_blocks_differ_between_epochs(place: Path, flags: tuple[str, ...]) -> None:
    Path("watching.py").write_text("from lightning.pytorch import Callback\nclass MyCallback(Callback):\n    pass\n")
    flags = tuple(flag.replace("MyCallback", "watching.MyCallback") for flag in flags)
    record = run(*small(*LATE, *flags, trainer__max_epochs="2")).record
    assert "train" not in record.get("frozen_features", {})


def test_only_blocks_before_an_active_drop_path_are_cached(place: Path) -> None:
    flags = ("--model.frozen_mode", "train", "--model.drop_path", "0.5")
    record = run(*small(*LINEAR, *flags, trainer__max_epochs="2")).record
    assert record["frozen_features"]["train"].startswith("tokens before block 2 of")


def test_one_epoch_computes_nothing_twice(place: Path) -> None:
    assert "frozen_features" not in run(*small(*LINEAR, trainer__max_epochs="1")).record


def test_what_does_not_fit_into_memory_is_not_cached(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "MEMORY_LIMIT_BYTES", 1000)
    assert "frozen_features" not in run(*small(*LATE, trainer__max_epochs="2")).record
    assert "frozen_features" in run(*small(*LINEAR, trainer__max_epochs="2")).record  # pooled features are small


def test_a_stopped_run_continues_to_the_same_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = small(*LATE, trainer__max_epochs="4")
    whole = run(*given)
    real, seen = AdaptationModule.training_step, []

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch_idx)
        if len(seen) == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationModule, "training_step", training_step)
        stopped = run(*given)
    again = run(*given, "--resume")
    assert again.folder == stopped.folder
    assert all(torch.equal(content(whole)[name], value) for name, value in content(again).items())


def test_runs_of_one_process_share_features_of_the_same_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = features.FrozenFeatures.__init__

    def counted(self: features.FrozenFeatures, *given: Any) -> None:
        computed.append(given[0])
        real(self, *given)

    monkeypatch.setattr(features.FrozenFeatures, "__init__", counted)
    monkeypatch.setattr(cache, "_cache", None)
    cache.cache_between_runs()
    given = small(*LINEAR, trainer__max_epochs="2")
    first = run(*given)
    assert run(*given, "--model.learning_rate", "0.5").record["frozen_features"] == first.record["frozen_features"]
    assert computed == [DEPTH + 1]
    run(*given, "--seed_everything", "1")  # random weights of another seed
    assert computed == [DEPTH + 1] * 2
    run(*small(*LATE, trainer__max_epochs="2"))
    assert computed == [DEPTH + 1, DEPTH + 1, DEPTH - 1]
