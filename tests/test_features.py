"""The frozen part of the backbone, computed once per image: where it ends, and that nothing but the time changes."""

from __future__ import annotations

import os
import signal
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from helpers import BACKBONE, Outcome, arguments, command, register_backbone, run, settle, small
from hypothesis import HealthCheck, Phase, event, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from test_ddp import SCRIPT, alone, check_equal, record, two
from torch import nn
from torch.utils.data import DataLoader

from svp_bench.data import cache
from svp_bench.data.loading import Batch
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
    whole = model(Linear())
    whole.register_forward_pre_hook(lambda _, images: tuple(2 * each for each in images))
    assert frozen_blocks(whole) is None
    patched = model(Linear())
    patched.forward_features = lambda images: images.mean(dim=(2, 3))  # type: ignore[method-assign]
    assert frozen_blocks(patched) is None


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
    line = small(*method, "--model.learning_rate", "0.05", data__stage="select", trainer__max_epochs="3")
    cached, plain = run(*line), run(*line, "--model.cache_features", "false")
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


@pytest.mark.parametrize("step", [7, 18])  # in the second and in the last of four epochs of five steps
def test_a_stopped_run_continues_to_the_same_weights(place: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    line = small(*LATE, trainer__max_epochs="4")
    whole = run(*line)
    real, seen = AdaptationModule.training_step, []

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        seen.append(batch_idx)
        if len(seen) == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationModule, "training_step", training_step)
        stopped = run(*line)
    again = run(*line, "--resume")
    assert again.folder == stopped.folder
    assert all(torch.equal(content(whole)[name], value) for name, value in content(again).items())


def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Switch the cache between runs off, with all that it holds, until the test ends."""
    monkeypatch.setattr(cache, "_limit", 0)
    monkeypatch.setattr(cache, "_values", OrderedDict())


def test_runs_of_one_process_share_features_of_the_same_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[int] = []
    real = features.FrozenFeatures.__init__

    def counted(self: features.FrozenFeatures, *line: Any) -> None:
        computed.append(line[0])
        real(self, *line)

    monkeypatch.setattr(features.FrozenFeatures, "__init__", counted)
    empty_cache(monkeypatch)
    cache.cache_between_runs()
    line = small(*LINEAR, trainer__max_epochs="2")
    first = run(*line)
    assert run(*line, "--model.learning_rate", "0.5").record["frozen_features"] == first.record["frozen_features"]
    assert computed == [DEPTH + 1]
    run(*line, "--seed_everything", "1")  # random weights of another seed
    assert computed == [DEPTH + 1] * 2
    run(*small(*LATE, trainer__max_epochs="2"))
    assert computed == [DEPTH + 1, DEPTH + 1, DEPTH - 1]


CHANGING = """
import torch
from svp_bench.methods.linear import Linear


class Changing(Linear):
    \"\"\"Linear probing on a backbone that it changes when it is attached.\"\"\"

    identity_at_start = False

    def __init__(self, factor: float = 1.0) -> None:
        self.factor = factor

    def attach(self, model):
        with torch.no_grad():
            model.layers[0].mixer.out_proj.weight.mul_(self.factor)


class Delayed(Linear):
    \"\"\"Linear probing with a scale before the last block that depends on the number of calls.\"\"\"

    identity_at_start = False

    def __init__(self) -> None:
        self.calls = 0

    def settings(self):
        return {}

    def attach(self, model):
        model.points.on_tokens(self.scale, first=2)

    def scale(self, layer, state):
        self.calls += 1
        return state.with_stream(state.stream * (1 + 1 / self.calls))
"""


@pytest.fixture
def changing(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delitem(sys.modules, "changing", raising=False)
    Path("changing.py").write_text(CHANGING)
    recipe = {"learning_rate": 0.05, "weight_decay": 0.0}
    for name in ("Changing", "Delayed"):
        text = yaml.safe_dump({"model": {"method": {"class_path": f"changing.{name}"}, **recipe}})
        Path(f"{name.lower()}.yaml").write_text(text)
    return place


def test_methods_that_change_frozen_weights_share_no_features(changing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty_cache(monkeypatch)
    cache.cache_between_runs()
    losses = []
    for factor in ("1.0", "3.0"):
        flags = ("--method", "changing.yaml", "--model.method.factor", factor)
        losses.append(run(*small(*flags, trainer__max_epochs="2")).record["metrics"]["loss"])
    assert losses[0] != losses[1]
    empty_cache(monkeypatch)
    alone = run(*small("--method", "changing.yaml", "--model.method.factor", "3.0", trainer__max_epochs="2"))
    assert alone.record["metrics"]["loss"] == losses[1]


def test_a_module_that_is_trained_twice_computes_its_features_twice(place: Path) -> None:
    module = AdaptationModule(Linear(), BACKBONE, "none", num_classes=3, image_size=32, scan_backend="reference")
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    batch = Batch(images, torch.arange(8) % 3, torch.arange(8))
    loader: Any = DataLoader([0], collate_fn=lambda _: batch)  # type: ignore[arg-type]
    for _ in range(2):  # without a data module nothing is computed
        trainer = Trainer(
            accelerator="cpu", max_epochs=2, logger=False, enable_checkpointing=False, enable_progress_bar=False
        )
        module.features = {"train": None}  # type: ignore[dict-item]  # of an earlier training
        trainer.fit(module, loader)
        assert module.features == {}


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ((*LATE, "--data.augment.flip", "0.5"), "augmented"),
        (("--method", "lora"), "ends before its first block"),
        ((*LINEAR, "--trainer.max_epochs", "1"), "1 epoch"),
    ],
)
def test_true_warns_where_nothing_is_computed(place: Path, flags: tuple[str, ...], reason: str) -> None:
    line = small("--model.cache_features", "true", trainer__max_epochs="2")
    assert any(reason in warning for warning in run(*line, *flags).warnings)


def test_two_processes_train_as_one(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flags = (*LATE, "--trainer.max_epochs", "3")
    Path("program.py").write_text(SCRIPT.replace("TESTS", repr(str(Path(__file__).parent))))
    for name in [name for name in os.environ if name.startswith(("SVP_BENCH_RUN", "LOCAL_RANK", "NODE_RANK"))]:
        monkeypatch.delenv(name)
    two(*flags)
    check_equal(place, alone(monkeypatch, *flags))
    assert record(place)["frozen_features"] == record(Path("one"))["frozen_features"] != {}


# --- any method, depth and setting ------------------------------------------------------------------------------------

BLOCKS = st.lists(st.integers(0, DEPTH - 1), min_size=1, unique=True).map(sorted)
METHODS = st.one_of(
    st.just(("--method", "linear")),
    st.just(("--method", "delayed.yaml")),
    st.builds(
        lambda blocks, dropout, variant: (
            *("--method", "svp", "--model.method.depths", str(blocks)),
            *("--model.method.dropout", dropout, "--model.method.variant", variant),
        ),
        BLOCKS,
        st.sampled_from(["0.0", "0.3"]),
        st.sampled_from(["paper", "released"]),
    ),
    BLOCKS.map(lambda blocks: ("--method", "offset", "--model.method.depths", str(blocks))),
    st.sampled_from([("--method", name) for name in ("vpt_shallow", "vpt_deep", "lora", "adapter", "bias", "full")]),
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "data.stage": st.sampled_from(["final", "select"]),
        "data.batch_size": st.sampled_from(["3", "7"]),
        "data.drop_last": st.just("true"),
        "data.transform.resize": st.sampled_from(["centre_crop", "squash"]),
        "data.augment.mixup": st.just("0.8"),
        "data.augment.random_erasing": st.just("0.5"),
        "model.frozen_mode": st.just("train"),
        "model.drop_path": st.just("0.4"),
        "model.ema.decay": st.just("0.5"),
        "model.ema.evaluate": st.sampled_from(["true", "false"]),
        "model.grad_checkpointing": st.just("true"),
        "model.input_attention": st.just("simam"),
        "model.head_hidden": st.just("4"),
        "model.label_smoothing": st.just("0.1"),
        "model.optimizer.name": st.just("sgd"),
        "trainer.accumulate_grad_batches": st.just("2"),
        "trainer.precision": st.sampled_from(["64-true", "bf16-mixed", "bf16-true"]),
        "trainer.gradient_clip_val": st.just("0.1"),
        "seed_everything": st.just("3"),
    },
)


@settings(
    max_examples=int(os.environ.get("FEATURE_EXAMPLES", "8")),
    deadline=None,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(METHODS, SETTINGS)
def test_no_method_or_setting_changes_a_number(changing: Path, method: tuple[str, ...], flags: dict[str, str]) -> None:
    if "model.ema.evaluate" in flags:
        flags = {"model.ema.decay": "0.5", **flags}
    if flags.get("trainer.accumulate_grad_batches"):
        flags = {**flags, "data.batch_size": "4"}
    line = small(*method, *arguments(flags), "--model.learning_rate", "0.01", trainer__max_epochs="3")
    outcomes = command(*line), command(*line, "--model.cache_features", "false")
    if outcomes[1].status:
        assert outcomes[0].err == outcomes[1].err
        return
    cached, plain = (outcome.record for outcome in outcomes)
    event(f"cached: {sorted(cached.get('frozen_features', {}))}")
    low = "bf16" in flags.get("trainer.precision", "")
    bound = 5e-2 if low else 2e-4
    for name, value in content(outcomes[1]).items():
        torch.testing.assert_close(content(outcomes[0])[name], value, rtol=bound, atol=bound)
    for name in ("loss", "nll"):
        assert cached["metrics"][name] == pytest.approx(plain["metrics"][name], rel=bound, abs=bound)
