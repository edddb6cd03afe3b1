"""What a callback from outside does between two hooks: it makes the run not comparable, and the reason says when."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import run, settle, small

from svp_bench.train.module import AdaptationModule

OUTSIDERS = """
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint


def scale(module, factor):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(factor)


class Quiet(Callback):
    pass


class BetweenEpochs(Callback):
    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 0:
            scale(pl_module, 0.5)


class WithinAStep(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 1:
            scale(pl_module, 0.5)


class OtherStart(Callback):
    def on_fit_start(self, trainer, pl_module):
        scale(pl_module, 2)


class Gradients(Callback):
    def on_after_backward(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()


class LateGradients(ModelCheckpoint):  # Lightning calls these last
    def on_after_backward(self, trainer, pl_module):
        for parameter in pl_module.parameters():
            if parameter.grad is not None:
                parameter.grad.neg_()


class Labels(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        batch.labels.zero_()


class TestLabels(Callback):
    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        batch.labels.zero_()


class TrainingMode(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.model.train()


class TestedInTrainingMode(Callback):
    def on_test_start(self, trainer, pl_module):
        pl_module.train()


class Epsilon(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["eps"] = 0.1


class Hook(Callback):
    def on_test_start(self, trainer, pl_module):
        pl_module.model.head.register_forward_hook(lambda module, args, output: -output)


class OtherStep(Callback):
    def on_fit_start(self, trainer, pl_module):
        step = pl_module.training_step
        pl_module.training_step = lambda *args: 3 * step(*args)


class BetweenTestBatches(Callback):
    def on_test_batch_end(self, trainer, pl_module, *args):
        scale(pl_module, 0.5)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "watched.py").write_text(OUTSIDERS)
    monkeypatch.delitem(sys.modules, "watched", raising=False)
    return settle(tmp_path, monkeypatch)


def with_callback(name: str) -> list[str]:
    Path("trainer.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [{"class_path": f"watched.{name}"}]}}))
    return small("--method", "linear", "--config", "trainer.yaml", trainer__max_epochs="2")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("BetweenEpochs", "weights were changed between optimizer steps (first in epoch 1,"),
        ("WithinAStep", "weights were changed between optimizer steps (first in epoch 0, step 1)"),
        ("OtherStart", "weights were changed between optimizer steps (first in epoch 0, step 0)"),
        ("Gradients", "changed gradients"),
        ("LateGradients", "changed gradients"),
        ("Labels", "changed a training batch"),
        ("TestLabels", "changed a test batch"),
        ("TrainingMode", "training mode (first in epoch 0, step 0)"),
        ("TestedInTrainingMode", "training mode during the test"),
        ("Epsilon", "eps of the optimizer was not that of the recipe"),
        ("Hook", "replaced or hooked for the test"),
        ("OtherStep", "replaced or hooked (first in epoch 0, step 0)"),
        ("BetweenTestBatches", "weights were changed during the test"),
    ],
)
def test_what_a_callback_does_between_two_hooks_is_seen(place: Path, name: str, reason: str) -> None:
    record = run(*with_callback(name)).record
    assert reason in "; ".join(record["not_comparable"])


@pytest.mark.parametrize("resumed", [False, True])
def test_a_callback_that_changes_nothing_leaves_a_run_comparable(
    place: Path, monkeypatch: pytest.MonkeyPatch, resumed: bool
) -> None:
    given = with_callback("Quiet")
    if resumed:
        real, seen = AdaptationModule.training_step, [0]

        def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
            seen[0] += 1
            if seen[0] == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return real(self, batch, batch_idx)

        with monkeypatch.context() as patch:
            patch.setattr(AdaptationModule, "training_step", training_step)
            assert "Stopped by SIGTERM" in run(*given).out
        given.append("--resume")
    assert "not_comparable" not in run(*given).record


STAGED = ("sdlora", "--model.method.warmup_share", "0.5"), ("lp_ft", "--model.drop_path", "0.1")


@pytest.mark.parametrize("method", [*STAGED, (*STAGED[0], "--model.grad_checkpointing", "true")], ids=str)
def test_what_a_method_changes_where_a_stage_begins_is_not_a_callbacks(place: Path, method: tuple[str, ...]) -> None:
    given = with_callback("Quiet")
    at = given.index("linear")
    assert "not_comparable" not in run(*given[:at], *method, *given[at + 1 :]).record
    given = with_callback("BetweenEpochs")  # there, too, what a callback does is seen
    record = run(*given[:at], *method, *given[at + 1 :]).record
    assert "changed between optimizer steps (first in epoch 1, step 5)" in "; ".join(record["not_comparable"])
