"""What a record says of the weights that were scored, and of classes from outside that may change a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import run, settle, small

from svp_bench.train.saved import file_weights_digest, weights_digest

LINEAR = ("--method", "linear")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


@pytest.mark.parametrize("extra", [{}, {"model.ema_decay": "0.5", "model.ema_evaluate": "true"}])
def test_the_record_has_the_digest_of_its_checkpoint(place: Path, extra: dict[str, str]) -> None:
    outcome = run(*small(*LINEAR, **extra))
    path = Path("runs") / outcome.record["checkpoint_file"]
    assert outcome.record["weights_digest"] == file_weights_digest(path)
    content = torch.load(path, weights_only=True)
    for part in ("state_dict", "ema") if extra else ("state_dict",):
        changed = {name: value.clone() for name, value in content[part].items()}
        changed["model.head.bias" if part == "state_dict" else "head.bias"][0] += 1e-6
        assert weights_digest({**content, part: changed}) != outcome.record["weights_digest"]


def test_unscored_records_have_the_digest_too(place: Path) -> None:
    outcome = run(*small(*LINEAR, "--no_test"))
    assert outcome.record["weights_digest"] == file_weights_digest(Path("runs") / outcome.record["checkpoint_file"])
