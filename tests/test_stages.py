"""Methods that train in stages: what rests does not move, resumed runs are exact, and the two methods that do so."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import reference_vim
import torch
from helpers import assert_error, command, run, settle, small
from tolerances import BACKBONE, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import adapt, create_model
from svp_bench.methods.checks import counted_parameters, trained_parameters
from svp_bench.methods.full import Full
from svp_bench.methods.hybrid import Hybrid
from svp_bench.methods.lp_ft import LPFT
from svp_bench.methods.sdlora import SDLoRA
from svp_bench.models import MambaRegister, VisionMamba
from svp_bench.train.features import frozen_blocks
from svp_bench.train.module import AdaptationModule

# (3, 48, 64) images: width 32, inner width 64, 4 states, rank 2 of Δ
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
EPOCHS, STEPS = 4, 5  # 17 images in batches of 4: five steps an epoch
FLAGS = ("--trainer.max_epochs", str(EPOCHS), "--model.warmup_epochs", "0", "--model.weight_decay", "0.1")
SDLORA = ("--method", "sdlora", "--model.method.warmup_share", "0.5", *FLAGS)
STAGED = {
    "lp_ft": ("--method", "lp_ft", *FLAGS),
    "sdlora": SDLORA,
    "sdlora, averaged": (*SDLORA, "--model.ema.decay", "0.5", "--model.ema.evaluate", "true"),
    "lp_ft, SGD": ("--method", "lp_ft", *FLAGS, "--model.optimizer.name", "sgd", "--model.learning_rate", "0.1"),
    "sdlora, checkpointed": (*SDLORA, "--model.grad_checkpointing", "true"),
    "lp_ft, accumulated": (
        "--method",
        "lp_ft",
        *FLAGS,
        "--trainer.accumulate_grad_batches",
        "2",
        "--data.drop_last",
        "true",
    ),
}
staged = pytest.mark.parametrize("flags", STAGED.values(), ids=STAGED.keys())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def line(flags: tuple[str, ...], *extra: str) -> list[str]:
    return small(*flags, *extra, trainer__max_epochs=None)


def sdlora(model: VisionMamba | None = None, **settings: Any) -> Any:
    made = SDLoRA(**{"channel_share": 0.05, "state_share": 0.5, "rank": 3, "dropout": 0.0, **settings})
    return adapt(VisionMamba(**SIZES).eval() if model is None else model, made)


# --- through a run ----------------------------------------------------------------------------------------------------


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[SimpleNamespace]:
    """The state before and after each optimizer step."""
    steps: list[SimpleNamespace] = []
    real: Callable[..., None] = AdaptationModule.optimizer_step

    def optimizer_step(self: AdaptationModule, epoch: int, batch_idx: int, optimizer: Any, closure: Any) -> None:
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        real(self, epoch, batch_idx, optimizer, closure)
        after = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        on = {name.split(".")[0] for name, part in self.model.named_modules() if part.training and name}
        numbers = {id(p): name for name, p in self.model.named_parameters()}
        state = {numbers[id(p)] for p in optimizer.optimizer.state}
        average = None if self.ema is None else {name: value.clone() for name, value in self.ema.weights.items()}
        steps.append(
            SimpleNamespace(epoch=epoch, after=after, before=before, moved=moved, on=on, state=state, average=average)
        )
        assert all(p.requires_grad == self.method.trains(name) for name, p in self.model.named_parameters())

    monkeypatch.setattr(AdaptationModule, "optimizer_step", optimizer_step)
    return steps


@staged
def test_what_rests_stays_bit_equal(flags: tuple[str, ...], place: Path, watched: list[SimpleNamespace]) -> None:
    outcome = run(*line(flags))
    method = LPFT() if "lp_ft" in flags else SDLoRA(warmup_share=0.5)
    trained = {name for name in watched[0].before if method.trains(name)}
    for step in watched:
        stage = method.stage(step.epoch, EPOCHS)
        assert stage == int(step.epoch >= 2)
        here = {name for name in trained if method.trains_in_stage(name, stage)}
        assert step.moved <= here
        assert step.state <= here  # momentum of the other stage is gone
        if step.average is not None:
            for name in trained - here:
                assert torch.equal(step.average[name], step.after[name])
    for stage in (0, 1):
        moved = {name for step in watched if (step.epoch >= 2) == bool(stage) for name in step.moved}
        assert moved == {name for name in trained if method.trains_in_stage(name, stage)}
    assert outcome.record["status"] == "complete"
    assert outcome.record.get("inactive_parameters") is None
    if "lp_ft" in flags:
        assert watched[0].on == {"head", "head_drop"}  # dropout and drop path as in a frozen backbone
        assert "layers" in watched[-1].on


def test_the_second_stage_of_sdlora_begins_at_the_start(place: Path, watched: list[SimpleNamespace]) -> None:
    record = run(*line(SDLORA)).record
    first = next(step for step in watched if step.epoch == 2).before
    last = [step for step in watched if step.epoch == 1][-1].after
    for name, value in first.items():
        if name.endswith((".probe", ".selected", "up.weight")):
            assert value.count_nonzero() == 0, name
        elif name.endswith("down.weight"):
            assert torch.equal(value, watched[0].before[name]), name
        else:
            assert torch.equal(value, last[name]), name
    # width 16, inner width 32: one channel of 32 and one of 4 states; rank 8
    assert record["parameters"]["adapter"] == 3 * (2 * (1 * 1 + 2 * 4 * 1) + 8 * (32 + 16))


@pytest.mark.skipif(not hasattr(signal, "SIGUSR1"), reason="this system has no SIGUSR1")
@pytest.mark.parametrize("flags", [STAGED["lp_ft"], STAGED["sdlora, averaged"]], ids=["lp_ft", "sdlora"])
def test_a_stopped_run_goes_on_exactly(flags: tuple[str, ...], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run(*line(flags))

    def weights(folder: Path) -> dict[str, dict[str, Tensor]]:
        content = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
        return {part: content.get(part, {}) for part in ("state_dict", "ema")}

    expected = weights(whole.folder)
    real: Any = AdaptationModule.training_step
    for stop in (3, 2 * STEPS, 2 * STEPS + 1, 3 * STEPS, 3 * STEPS + 3):  # in each stage, at the border, after it
        seen = [0]

        def training_step(self: Any, batch: Any, batch_idx: int, stop: int = stop, seen: list[int] = seen) -> Any:
            seen[0] += 1
            if seen[0] == stop:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(self, batch, batch_idx)

        where = ("--runs_root", f"runs{stop}", "--results_root", f"results{stop}")
        with monkeypatch.context() as patch:
            patch.setattr(AdaptationModule, "training_step", training_step)
            stopped = command(*line(flags, *where))
        assert f"after {stop} steps" in stopped.out
        again = run(*line(flags, *where, "--resume"))
        assert again.folder == stopped.folder
        found = weights(again.folder)
        for part, values in expected.items():
            assert found[part].keys() == values.keys()
            assert all(torch.equal(found[part][name], value) for name, value in values.items()), (stop, part)
        assert again.record["correct"] == whole.record["correct"]


def test_the_checkpoint_predicts_as_the_run(place: Path) -> None:
    outcome = run(*line(SDLORA))
    saved = AdaptationModule.load_from_checkpoint(outcome.folder / "checkpoints" / "last.ckpt")
    chosen = [value for name, value in saved.model.named_buffers() if name.endswith("channels")]
    assert len(chosen) == 12
    assert any(value.any() for value in chosen)  # they are not the first channels
    assert "inactive_parameters" not in outcome.record or not outcome.record["inactive_parameters"]


@pytest.mark.parametrize("method", ["lp_ft", "sdlora"])
def test_one_epoch_has_no_place_for_two_stages(method: str, place: Path) -> None:
    message = assert_error(command(*small("--method", method, trainer__max_epochs="1")), 2)
    assert "trains in 2 stages, which trainer.max_epochs 1 has no place for; give at least 2 epochs" in message


def test_a_callback_must_not_average_over_stages(place: Path) -> None:
    callback = "lightning.pytorch.callbacks.EMAWeightAveraging"
    Path("more.yaml").write_text(f"trainer:\n  callbacks:\n    - class_path: {callback}\n")
    message = assert_error(command(*line(STAGED["lp_ft"], "--config", "more.yaml")), 2)
    assert "a callback must not average; set model.ema.decay" in message


def test_hybrids_have_one_stage() -> None:
    with pytest.raises(ConfigError, match="a hybrid cannot hold sdlora, which trains in stages"):
        Hybrid({"sdlora": {}, "adapter": {}})


def test_no_block_is_cached_that_trains_later() -> None:
    assert frozen_blocks(adapt(VisionMamba(**SIZES).eval(), LPFT())) is None
    assert frozen_blocks(sdlora()) == 0


# --- trained tensors without a gradient, in any stage -----------------------------------------------------------------

DISCONNECTED = '''
import torch
from torch import nn
from svp_bench.methods.base import Method

class Lost(Method):
    """Args: staged: whether."""
    identity_at_start = True
    stages = 2

    def attach(self, model):
        model.adapter = adapter = Add()
        model.points.on_tokens(adapter.add)

    def stage(self, epoch, epochs):
        return int(epoch > 0)

    def trains_in_stage(self, name, stage):
        return stage == 1 or name != "adapter.late"

    def adapter_parameters(self, model):
        return 22

class Add(nn.Module):
    def __init__(self):
        super().__init__()
        self.never, self.late = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
        self.used = nn.Parameter(torch.zeros(16))

    def add(self, layer, state):
        return state._replace(hidden=state.hidden + self.used)
'''


def test_a_disconnected_tensor_is_reported_and_recorded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("lost.py").write_text(DISCONNECTED)
    Path("lost.yaml").write_text("model:\n  method:\n    class_path: lost.Lost\n")
    flags = ("--method", "lost.yaml", "--trainer.max_epochs", "3", "--model.warmup_epochs", "0")
    outcome = run(*small(*flags, trainer__max_epochs=None))
    first, second = [text for text in outcome.warnings if "got no gradient" in text]
    assert "1 trained tensor of 4 got no gradient in optimizer step 3: adapter.never" in first
    assert "2 trained tensors of 5 got no gradient in optimizer step 3 from epoch 1 on: adapter.never" in second
    assert outcome.record["inactive_parameters"] == ["adapter.never", "adapter.late"]


# --- lp_ft ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "epochs", "border"), [(0.5, 100, 50), (0.2, 10, 2), (0.01, 10, 1), (0.99, 10, 9)])
def test_the_border_of_lp_ft(share: float, epochs: int, border: int) -> None:
    method = LPFT(share)
    assert [method.stage(epoch, epochs) for epoch in range(epochs)] == [0] * border + [1] * (epochs - border)


@pytest.mark.parametrize("share", [0.0, 1.0, -1.0, float("nan")])
def test_the_share_of_lp_ft_is_a_fraction(share: float) -> None:
    with pytest.raises(ConfigError, match="lp_ft: probe_share must be"):
        LPFT(share)


@pytest.mark.parametrize("name", ["vim_nano_patch8_64", "vit_nano_patch8_64"])
def test_lp_ft_ends_as_full(name: str) -> None:
    model = create_model(name, num_classes=3, method="lp_ft")
    assert len(counted_parameters(model)) == len([*model.parameters()])
    assert LPFT().adapter_parameters(model) == Full().adapter_parameters(model)
    assert all(LPFT().trains_in_stage(n, 0) == n.startswith("head.") for n in trained_parameters(model))


# --- sdlora -----------------------------------------------------------------------------------------------------------


def written_out(state: dict[str, Tensor], depth: int = 3) -> dict[str, Tensor]:
    """The state with every difference added to its tensor, entry by entry."""
    merged = {name: value.clone() for name, value in state.items()}
    for layer in range(depth):
        block, part = f"layers.{layer}.mixer.", f"adapter.{layer}."
        for suffix in ("", "_b"):
            channels, states = (state[f"{part}A{suffix}.{name}"].long() for name in ("channels", "states"))
            log, x_proj = merged[f"{block}A{suffix}_log"], merged[f"{block}x_proj{suffix}.weight"]
            log += state[f"{part}A{suffix}.probe"]
            for k, channel in enumerate(channels.tolist()):
                for s, at in enumerate(states[k].tolist()):
                    log[channel, at] += state[f"{part}A{suffix}.selected"][k, s]
                for row in range(8):  # B, then C
                    x_proj[2 + row, channel] += state[f"{part}x_proj{suffix}.selected"][row, k]
        up, down = state[f"{part}out_proj.up.weight"], state[f"{part}out_proj.down.weight"]
        merged[f"{block}out_proj.weight"] = merged[f"{block}out_proj.weight"] + up @ down
    return merged


def filled(model: Any) -> Any:
    """Random weights, and other channels and states in each direction."""
    reference_vim.fill(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parts in model.adapter.values():
            for suffix in ("", "_b"):
                on_a = parts[f"A{suffix}"]
                on_a.channels.copy_(torch.randperm(64, generator=generator)[:4])
                for row in on_a.states:
                    row.copy_(torch.randperm(4, generator=generator)[:2])
                parts[f"x_proj{suffix}"].channels.copy_(on_a.channels)
    return model


def test_sdlora_is_its_formula() -> None:
    model = filled(sdlora())
    images = reference_vim.make_images(2, 3, 48, 64)
    state = {name: value.detach().double().clone() for name, value in model.state_dict().items()}
    trained = trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    expected = reference_vim.logits(written_out(state), images.double(), stride=16)
    found = model(images)
    assert relative_error(found, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*found.shape)
    gradients = torch.autograd.grad(found, [*trained.values()], cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained, gradients, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name
        assert b.count_nonzero() == b.numel(), name
    with torch.no_grad():
        bare = reference_vim.logits(state, images.double(), stride=16)
    assert relative_error(bare, expected.detach()) > 100 * BACKBONE.forward


def test_sdlora_merges() -> None:
    model = filled(sdlora())
    images = reference_vim.make_images(2, 3, 48, 64)
    before = model(images)
    model.method.merge(model)
    assert model.adapter is None
    assert len(model.points) == 0
    assert relative_error(model(images), before) <= 1e-5


def test_the_counts_of_sdlora_on_vim_s() -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=100, method="sdlora")
    counted = {name: p for name, p in counted_parameters(model).items() if not name.startswith("head.")}
    of_scan = sum(p.numel() for name, p in counted.items() if "out_proj" not in name)
    assert of_scan == 13_824
    assert sum(p.numel() for p in counted.values()) == 235_008 == SDLoRA().adapter_parameters(model)
    assert sum(p.numel() for name, p in trained_parameters(model).items() if name.endswith("probe")) == 589_824


def test_sdlora_selects_what_moved_the_most() -> None:
    model = sdlora()
    with torch.no_grad():
        for parts in model.adapter.values():
            for suffix, channels in (("", [60, 7, 30, 12]), ("_b", [1, 2, 3, 63])):
                probe = parts[f"A{suffix}"].probe
                probe.fill_(0.01)
                for channel in channels:
                    probe[channel] = torch.tensor([-3.0, 0.5, 1.0, 0.5])
    model.method.start_epoch(model, 9, 100)  # before the border
    assert model.adapter["0"]["A"].channels.tolist() == [0, 1, 2, 3]
    model.method.start_epoch(model, 10, 100)
    for parts in model.adapter.values():
        assert parts["A"].channels.tolist() == parts["x_proj"].channels.tolist() == [7, 12, 30, 60]
        assert parts["A_b"].channels.tolist() == parts["x_proj_b"].channels.tolist() == [1, 2, 3, 63]
        assert parts["A"].states.tolist() == parts["A_b"].states.tolist() == [[0, 2]] * 4
        assert parts["A"].probe.count_nonzero() == 0


def test_sdlora_on_other_backbones() -> None:
    model = sdlora(MambaRegister(registers=2, reduction=2, **SIZES).eval())
    model(reference_vim.make_images(2, 3, 48, 64)).sum().backward()
    assert all(p.grad is not None for p in trained_parameters(model).values())
    with pytest.raises(ConfigError, match="sdlora works on the families vim, mambar, not on vit"):
        create_model("vit_nano_patch8_64", num_classes=2, method="sdlora")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channel_share": 0.0}, "sdlora: channel_share must be above 0"),
        ({"state_share": 1.5}, "sdlora: state_share must be at most 1"),
        ({"rank": 0}, "sdlora: rank must be at least 1"),
        ({"warmup_share": 1.0}, "sdlora: warmup_share must be in"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SDLoRA(**settings)
