"""A dry run caches what it finds out with torch, and refuses the same with and without its cache."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import command, run

from svp_bench.methods.build import create_backbone
from svp_bench.models.checkpoints import save_weights

PROBE = """
import json, sys
from svp_bench.cli.main import main
status = main(json.loads(sys.argv[1]))
print(json.dumps([status, "torch" in sys.modules]), file=sys.stderr)
"""


def fresh(*argv: str) -> tuple[int, bool, str]:
    """Run a command in a process of its own; return its status, whether it imported torch, and its output."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, json.dumps(argv)], capture_output=True, text=True, timeout=120, check=True
    )
    status, heavy = json.loads(done.stderr.splitlines()[-1])
    return status, heavy, done.stdout


def test_a_second_dry_run_imports_no_torch_and_prints_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVP_BENCH_CACHE", "cache")
    sweep = ("sweep", "--tasks", "demo/count,demo/digits", "--methods", "linear,offset", "--seeds", "0,1", "--dry_run")
    first, second = (fresh(*sweep) for _ in range(2))
    assert (first[0], second[:2]) == (0, (0, False))
    tables = [[line for line in out.splitlines() if not line.startswith("Disk")] for _, _, out in (first, second)]
    assert tables[0] == tables[1]
    assert first[1]


@pytest.mark.parametrize("answer", ["missing", "damaged"])
def test_a_dry_run_with_cached_answers_refuses_as_without(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SVP_BENCH_CACHE", "cache")
    weights = Path("weights.safetensors")
    save_weights(create_backbone("vim_nano_patch8_64", num_classes=2, checkpoint="embedded"), weights)
    sweep = ("sweep", "--tasks", "demo/count", "--methods", "linear", "--dry_run")
    good = run(*sweep, "--model.checkpoint", str(weights))
    assert good.status == run(*sweep, "--model.checkpoint", str(weights)).status == 0
    if answer == "missing":
        weights.unlink()
    else:
        weights.write_bytes(b"no weights")
    for flags in (
        ("--model.checkpoint", str(weights)),
        ("--model.checkpoint", "embedded", "--model.learning_rate", "fast"),
        ("--model.checkpoint", "embedded", "--data.batch_size", "0"),
        ("--model.checkpoint", "embedded", "--model.backbone", "vim_nano"),
    ):
        refused = []
        for cache in ("cache", "none"):
            monkeypatch.setenv("SVP_BENCH_CACHE", cache)
            refused.append(command(*sweep, *flags))
        assert refused[0].status != 0
        assert (refused[0].status, refused[0].err) == (refused[1].status, refused[1].err), flags
    monkeypatch.setenv("PL_FIT__SEED_EVERYTHING", "3")
    assert "PL_FIT__SEED_EVERYTHING" in command(*sweep).err
