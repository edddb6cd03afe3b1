"""What a record says of the weights that were scored, and of classes from outside that may change a run."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import Outcome, assert_error, command, run, settle, small

from svp_bench.train.checkpoint import Checkpoint, weights_digest
from svp_bench.train.module import AdaptationModule

LINEAR = ("--method", "linear")
OUTSIDERS = """
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import LearningRateFinder, LearningRateMonitor
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import Profiler


def scale(module, factor):
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(factor)


class Quiet(Callback):
    pass


class Log(CSVLogger):
    pass


class Profile(Profiler):
    def start(self, action_name):
        pass

    def stop(self, action_name):
        pass


class Monitor(LearningRateMonitor):
    pass


class Finder(LearningRateFinder):
    pass


class ScaledAtTheEnd(Callback):
    def on_train_end(self, trainer, pl_module):
        scale(pl_module, 0.5)


class ScaledForTheTest(Callback):
    def on_test_start(self, trainer, pl_module):
        scale(pl_module, 0.5)

    def on_test_end(self, trainer, pl_module):
        scale(pl_module, 2)


class OtherRate(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        trainer.optimizers[0].param_groups[0]["lr"] = 0.1


class RateBeforeTheOptimizer(Callback):
    def setup(self, trainer, pl_module, stage):
        pl_module.learning_rate = 0.5


class OtherDecay(Callback):
    def on_fit_start(self, trainer, pl_module):
        trainer.optimizers[0].param_groups[0]["weight_decay"] = 0.7


class FrozenWeights(Callback):
    def on_train_start(self, trainer, pl_module):
        pl_module.model.pos_embed.data.add_(1)


class Accumulates(Callback):
    def on_train_epoch_start(self, trainer, pl_module):
        trainer.accumulate_grad_batches = 2


class BatchSize(Callback):
    def setup(self, trainer, pl_module, stage):
        trainer.datamodule.batch_size = 2


class ReadsTest(Callback):
    def on_train_start(self, trainer, pl_module):
        trainer.datamodule.unlock_test()
        next(iter(trainer.datamodule.test_dataloader()))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "outsiders.py").write_text(OUTSIDERS)
    monkeypatch.delitem(sys.modules, "outsiders", raising=False)
    return settle(tmp_path, monkeypatch)


def with_trainer(trainer: dict[str, Any], *extra: str, epochs: str = "2") -> list[str]:
    Path("trainer.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    return small(*LINEAR, "--config", "trainer.yaml", *extra, trainer__max_epochs=epochs)


def with_callback(class_path: str, *extra: str, epochs: str = "2", **init_args: Any) -> list[str]:
    return with_trainer({"callbacks": [{"class_path": class_path, "init_args": init_args}]}, *extra, epochs=epochs)


def checkpoint(outcome: Outcome) -> Path:
    return Path("runs") / str(outcome.record["checkpoint_file"])


@pytest.mark.parametrize("extra", [{}, {"model.ema.decay": "0.5", "model.ema.evaluate": "true"}])
def test_the_record_has_the_digest_of_its_checkpoint(place: Path, extra: dict[str, str]) -> None:
    outcome = run(*small(*LINEAR, **extra))
    record, path = outcome.record, checkpoint(outcome)
    assert record["weights_digest"] == weights_digest(Checkpoint.read(path).content)
    assert record["external_classes"] == []
    assert "not_comparable" not in record
    content = torch.load(path, weights_only=True)
    for part in ("state_dict", "ema") if extra else ("state_dict",):
        changed = {name: value.clone() for name, value in content[part].items()}
        changed["model.head.bias" if part == "state_dict" else "head.bias"][0] += 1e-6
        assert weights_digest({**content, part: changed}) != record["weights_digest"]


def test_unscored_and_selection_records_have_the_digest_too(place: Path) -> None:
    for extra in (("--no_test",), ("--data.stage", "select")):
        outcome = run(*small(*LINEAR, *extra))
        assert outcome.record["weights_digest"] == weights_digest(Checkpoint.read(checkpoint(outcome)).content)


@pytest.mark.parametrize(
    ("class_path", "init_args", "reasons"),
    [
        ("outsiders.ScaledAtTheEnd", {}, ["after the last optimizer step", "written again"]),
        ("outsiders.ScaledForTheTest", {}, ["after the last optimizer step", "written again"]),
        ("outsiders.OtherRate", {}, ["learning rate was not that of the recipe (first in epoch 0, step 0)"]),
        ("outsiders.RateBeforeTheOptimizer", {}, ["model.learning_rate was changed from 0.001 to 0.5"]),
        ("outsiders.OtherDecay", {}, ["weight decay"]),
        ("outsiders.FrozenWeights", {}, ["frozen weights were changed"]),
        ("outsiders.Accumulates", {}, ["trainer.accumulate_grad_batches was changed from 1 to 2"]),
        ("outsiders.BatchSize", {}, ["data.batch_size was changed from 4 to 2"]),
        ("outsiders.ReadsTest", {}, ["unlocked before the weights were final"]),
        ("lightning.pytorch.callbacks.WeightAveraging", {}, ["after the last optimizer step"]),
        ("lightning.pytorch.callbacks.EMAWeightAveraging", {"decay": 0.9}, ["after the last optimizer step"]),
        ("lightning.pytorch.callbacks.StochasticWeightAveraging", {"swa_lrs": 0.1}, ["learning rate", "written again"]),
    ],
)
def test_what_others_change_is_recorded_and_not_compared(
    place: Path, class_path: str, init_args: dict[str, Any], reasons: list[str]
) -> None:
    outcome = run(*with_callback(class_path, **init_args))
    record = outcome.record
    assert record["status"] == "complete"
    assert record["weights_digest"] == weights_digest(Checkpoint.read(checkpoint(outcome)).content)
    assert [name.rpartition(".")[2] for name in record["external_classes"]] == [class_path.rpartition(".")[2]]
    told = "; ".join(record["not_comparable"])
    assert all(reason in told for reason in reasons), told
    assert "Not comparable" in outcome.out
    run("table")
    assert reasons[0] in Path("results/tables/vtab1k.md").read_text()
    # the checkpoint reproduces the score
    again = run(
        *small("--ckpt_path", str(checkpoint(outcome)), subcommand="test", config=str(outcome.folder / "config.yaml"))
    )
    assert "its score already (the same)" in again.out


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [
        ({"callbacks": [{"class_path": "outsiders.Quiet"}]}, ["outsiders.Quiet"]),
        ({"callbacks": [{"class_path": "outsiders.Monitor"}]}, ["outsiders.Monitor"]),
        ({"callbacks": [{"class_path": "LearningRateMonitor"}]}, []),
        ({"logger": [{"class_path": "outsiders.Log", "init_args": {"save_dir": "logs"}}]}, ["outsiders.Log"]),
        ({"profiler": {"class_path": "outsiders.Profile"}}, ["outsiders.Profile"]),
    ],
)
def test_classes_from_outside_are_named(place: Path, trainer: dict[str, Any], expected: list[str]) -> None:
    assert run(*with_trainer(trainer, epochs="1")).record["external_classes"] == expected


@pytest.mark.parametrize(
    ("class_path", "init_args", "remedy"),
    [
        ("LearningRateFinder", {}, "svp-bench tune"),
        ("outsiders.Finder", {}, "svp-bench tune"),
        ("BatchSizeFinder", {}, "--data.batch_size"),
        ("GradientAccumulationScheduler", {"scheduling": {"1": 2}}, "--trainer.accumulate_grad_batches"),
        ("BackboneFinetuning", {}, "method"),
        ("ModelPruning", {"pruning_fn": "l1_unstructured"}, "leave it out"),
    ],
)
@pytest.mark.parametrize("stage", ["final", "select"])
def test_what_a_record_cannot_describe_is_refused(
    place: Path, class_path: str, init_args: dict[str, Any], remedy: str, stage: str
) -> None:
    line = assert_error(command(*with_callback(class_path, "--data.stage", stage, **init_args)), 2)
    assert class_path.rpartition(".")[2] in line
    assert remedy in line
    assert not Path("runs").exists()


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook", "ddp_fork_find_unused_parameters_true"])
@pytest.mark.parametrize("subcommand", ["fit", "validate"])
def test_strategies_that_hand_nothing_back_are_refused(place: Path, strategy: str, subcommand: str) -> None:
    given = {"trainer.strategy": strategy, "trainer.devices": "2", "data.stage": "select"}
    line = assert_error(command(*small(*LINEAR, subcommand=subcommand, **given)), 2)
    assert "--trainer.strategy ddp" in line
    assert not Path("results").exists()


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [
        ("EMAWeightAveraging", {"decay": 0.9}),
        pytest.param("WeightAveraging", {}, marks=pytest.mark.slow),
        ("StochasticWeightAveraging", {"swa_lrs": 0.1, "swa_epoch_start": 2}),
    ],
)
@pytest.mark.parametrize("step", [pytest.param(3, marks=pytest.mark.slow), 12])
def test_averages_resume(
    place: Path, monkeypatch: pytest.MonkeyPatch, class_path: str, init_args: dict[str, Any], step: int
) -> None:
    given = with_callback(class_path, epochs="3", **init_args)
    whole = run(*given, "--runs_root", "whole", "--results_root", "whole")
    real, seen = AdaptationModule.training_step, [0]

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> torch.Tensor:
        seen[0] += 1
        if seen[0] == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(AdaptationModule, "training_step", training_step)
        assert "Stopped by SIGTERM" in run(*given).out
    again = run(*given, "--resume")
    assert again.record["weights_digest"] == whole.record["weights_digest"]
    assert again.record["metrics"] == whole.record["metrics"]
    assert again.record["not_comparable"] == whole.record["not_comparable"]
