"""What the tests of the front door share: a very small backbone, drawn data, and a command run in this process."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from warnings import catch_warnings

import pytest

from svp_bench.cli.main import main
from svp_bench.data.synthetic import draw_task
from svp_bench.tasks.cards import load_task

TASK = "vtab/cifar"
CONFIG = f"configs/{TASK}.yaml"
COUNTS = {"train800": 12, "val200": 5, "test": 9}  # trains on 17 in stage final
METHODS = [
    "svp",
    "vpt_shallow",
    "vpt_deep",
    "linear",
    "full",
    "lora",
    "adapter",
    "offset",
    "bias",
    "partial",
    "last_blocks",
    "vp",
    "auto_vp",
    "dam_vp",
    "spt",
    "vapt",
    "affix",
    "parallel_adapter",
    "additional_scan",
    "state_offset",
    "initial_state",
    "prodial",
    "memba",
    "lp_ft",
    "sdlora",
    "e2vpt",
]
BACKBONE = "vim_test_patch8_32"
SMALL = {  # a run of a second
    "model.backbone": BACKBONE,
    "model.checkpoint": "none",
    "model.scan_backend": "reference",
    "data.image_size": "32",
    "data.batch_size": "4",
    "data.root": "data",
    "trainer.max_epochs": "1",
    "trainer.enable_progress_bar": "false",
    "trainer.accelerator": "cpu",  # where results are exact, also on a machine with a GPU
}
SWEEP_FLAGS = [  # runs of a sweep, whose workers know no backbone of the tests
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "none", "--data.image_size", "32"),
    *("--trainer.max_epochs", "1", "--model.scan_backend", "reference", "--trainer.accelerator", "cpu"),
]


def register_backbone() -> None:
    """Make the backbone `BACKBONE` known to timm: width 16, depth 3, 16 patches, some 10,000 parameters."""
    import timm
    from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

    from svp_bench.models.vim import VisionMamba

    if timm.is_model(BACKBONE):
        return

    def vim_test_patch8_32(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 3, "d_state": 4}
        model: VisionMamba = build_model_with_cfg(VisionMamba, BACKBONE, pretrained, **{**sizes, **kwargs})
        return model

    cfg = {"input_size": (3, 32, 32), "num_classes": 10, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    globals()["default_cfgs"] = generate_default_cfgs({BACKBONE: cfg})  # where timm looks for them
    register_model(vim_test_patch8_32)


def draw(root: Path, task: str = TASK, counts: Mapping[str, int] = COUNTS, seed: int = 0) -> Path:
    """Draw the data of a task below `root` and return the task's folder."""
    return draw_task(load_task(task), root, counts=counts, size=16, seed=seed)


def settle(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make `folder` the working directory, with drawn data in `data/` and the small backbone at hand."""
    register_backbone()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", list(sys.path))  # a run adds the places of its methods
    draw(folder / "data")
    return folder


def arguments(values: Mapping[str, str | None]) -> list[str]:
    """Return `--key value` pairs; a None leaves the key out."""
    return [part for key, value in values.items() if value is not None for part in (f"--{key}", value)]


def small(*extra: str, subcommand: str = "fit", config: str = CONFIG, **values: str | None) -> list[str]:
    """Return the command line of a small run; `values` replace those of `SMALL` (`data__root` for "data.root")."""
    given = {key.replace("__", "."): value for key, value in values.items()}
    return [subcommand, "--config", config, *arguments({**SMALL, **given}), *extra]


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str
    notices: tuple[str, ...]
    warnings: tuple[str, ...]

    @property
    def record_path(self) -> Path:
        """The record that the command announced."""
        found = re.search(r"^Record \(\w+\): (.+)$", self.out, re.MULTILINE)
        assert found, self.out + self.err
        return Path(found.group(1))

    @property
    def record(self) -> dict[str, Any]:
        """That record."""
        return read_json(self.record_path)

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        found = re.search(r"^  files      (.+)$", self.out, re.MULTILINE)
        assert found, self.out + self.err
        return Path(found.group(1))


def wait_for(happened: Callable[[], object], seconds: float = 600) -> None:
    """Wait until something has happened; generous, since a busy machine is no failure."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, f"it has not happened within {seconds:.0f} s"
        time.sleep(0.05)


def read_json(path: Path) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return data


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect what Lightning's logger says: its handler holds the stderr of another time."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    handler = Handler()
    logger.addHandler(handler)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)


def command(*argv: str) -> Outcome:
    """Run one command in this process."""
    out, err = io.StringIO(), io.StringIO()
    with heard() as notices, catch_warnings(record=True) as warned, redirect_stdout(out), redirect_stderr(err):
        status = main(argv)
    texts = tuple(str(warning.message) for warning in warned)
    return Outcome(status, out.getvalue(), err.getvalue(), tuple(notices), texts)


def run(*argv: str) -> Outcome:
    """Run one command in this process, which must end well."""
    outcome = command(*argv)
    assert outcome.status == 0, outcome.err
    return outcome


def assert_error(outcome: Outcome, status: int) -> str:
    """Check that a command ended with `status` and one line on stderr, and return that line."""
    assert outcome.status == status, (outcome.status, outcome.out, outcome.err)
    lines = outcome.err.splitlines()
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("svp-bench: "), outcome.err
    assert "Traceback" not in outcome.err + outcome.out
    return lines[0]


def files(root: Path = Path()) -> set[str]:
    """Return the files and empty folders below `root`, images left out."""
    found = {path for path in root.rglob("*") if path.suffix != ".jpg"}
    return {path.relative_to(root).as_posix() for path in found if path.is_file() or not any(path.iterdir())}
