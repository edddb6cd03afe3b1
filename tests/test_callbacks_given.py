"""Callbacks and loggers on the command line or in a config: they run, or one line says why not."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml
from helpers import assert_error, command, run, settle, small

from svp_bench.cli.main import _ensure_home


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def line(*extra: str) -> list[str]:
    return small("--method", "linear", *extra)


def config(text: str) -> tuple[str, str]:
    Path("given.yaml").write_text(text)
    return "--config", "given.yaml"


@pytest.mark.parametrize(
    ("given", "classes"),
    [
        (["--trainer.callbacks=LearningRateMonitor"], ["LearningRateMonitor"]),
        (["--trainer.callbacks", "LearningRateMonitor"], ["LearningRateMonitor"]),
        (["--trainer.callbacks+=LearningRateMonitor"], ["LearningRateMonitor"]),
        (["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=train/loss"], ["EarlyStopping"]),
        (["--trainer.callbacks=Timer"], ["Timer"]),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=00:00:01:00"], ["Timer"]),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.interval=epoch"], ["Timer"]),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks+=LearningRateMonitor"], ["Timer", "LearningRateMonitor"]),
    ],
)
def test_they_run_and_are_in_the_record(given: list[str], classes: list[str]) -> None:
    outcome = run(*line(*given))
    found = outcome.record["config"]["trainer"]["callbacks"]
    found = found if isinstance(found, list) else [found]
    assert [entry["class_path"].rpartition(".")[2] for entry in found] == classes
    # what is saved can be given again
    own = yaml.safe_load((outcome.folder / "config.yaml").read_text())
    assert own["trainer"]["callbacks"] == outcome.record["config"]["trainer"]["callbacks"]
    again = run("fit", "--config", str(outcome.folder / "config.yaml"))
    assert again.record["config_digest"] == outcome.record["config_digest"]


TYPO = "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitor: train/loss, patiense: 3}\n"


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        (["--trainer.callbacks=EarlyStoping"], ["EarlyStoping", "did you mean 'EarlyStopping'"]),
        (["--trainer.callbacks+=LearningRateMonitr"], ["did you mean 'LearningRateMonitor'"]),
        (
            ["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitr", "x"],
            ["monitr", "did you mean 'monitor'"],
        ),
        (["--trainer.callbacks=EarlyStopping"], ["needs monitor", "--trainer.callbacks.monitor VALUE"]),
        (["--trainer.callbacks.monitor", "x"], ["--trainer.callbacks+=CLASS"]),
        (["--trainer.callbacks=EarlyStopping", "--trainer.callbacks.monitor", "val/loss"], ["val/loss", "train/loss"]),
        (["--trainer.callbacks+=Timer", "--trainer.callbacks.duration=abc"], ["abc"]),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dirr=x"], ["save_dirr", "did you mean 'save_dir'"]),
        ([TYPO], ["given.yaml:", "patiense", "did you mean 'patience'"]),
        (["trainer:\n  callbacks:\n  - class_path: EarlyStoping\n"], ["given.yaml:", "did you mean 'EarlyStopping'"]),
        (["trainer:\n  callbacks: LearningRateMonitr\n"], ["given.yaml:", "did you mean 'LearningRateMonitor'"]),
        (["trainer:\n  logger:\n    class_path: CSVLoger\n"], ["given.yaml:", "did you mean 'CSVLogger'"]),
    ],
)
def test_a_mistake_is_one_line(given: list[str], parts: list[str]) -> None:
    arguments = given if given[0].startswith("--") else [*config(given[0])]
    message = assert_error(command(*line(*arguments)), 2)
    assert all(part in message for part in parts), message


def test_a_process_without_a_home_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    _ensure_home()
    assert os.access(os.environ["HOME"], os.W_OK)
    assert Path(os.environ["HOME"]).parent == tmp_path
    home = os.environ["HOME"]
    _ensure_home()
    assert os.environ["HOME"] == home


def test_a_callback_that_adds_a_parameter_group_is_one_line() -> None:
    Path("groups.py").write_text(
        "import torch\nfrom lightning.pytorch import Callback\n\n\nclass Adds(Callback):\n"
        "    def on_train_epoch_start(self, trainer, pl_module):\n"
        "        trainer.optimizers[0].add_param_group({'params': [torch.nn.Parameter(torch.zeros(3))]})\n"
    )
    text = assert_error(command(*line("--trainer.callbacks+=groups.Adds", "--model.warmup_epochs", "0")), 2)
    assert "trainer.callbacks" in text
    assert "parameter group" in text


def test_settings_are_not_read_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_FIT__TRAINER__MAX_EPOCHS", "3")
    text = assert_error(command(*line()), 2)
    assert "PL_FIT__TRAINER__MAX_EPOCHS" in text
    assert "--trainer.max_epochs" in text
