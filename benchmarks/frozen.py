"""Linear probing with the frozen features computed once, against computing them in each epoch.

Vim-S with random weights (their values do not change the time), the 1,000 training images of a VTAB-1k task, synthetic,
224². The epochs without cached features are measured for a few epochs and extrapolated; each takes the same time.

    python benchmarks/frozen.py --output benchmarks/results/frozen.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

from svp_bench.data.synthetic import draw_task
from svp_bench.tasks.cards import load_task

TASK = "vtab/dtd"
COUNTS = {"train800": 800, "val200": 200, "test": 4}
FIT = [
    *("fit", "--data.task", TASK, "--method", "linear", "--model.checkpoint", "none", "--data.root", "data"),
    *("--trainer.accelerator", "cpu", "--no_test", "--trainer.enable_progress_bar", "false"),
]


def train_seconds(folder: Path, epochs: int, cached: bool) -> tuple[float, Any]:
    """Return the training seconds of a run and what its record states about frozen features."""
    results = folder / f"results-{cached}"
    flags = ["--trainer.max_epochs", str(epochs), "--model.cache_features", str(cached).lower()]
    command = [sys.executable, "-m", "svp_bench", *FIT, *flags, "--results_root", str(results)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"status {done.returncode}\n{done.stdout}{done.stderr}")
    (path,) = (results / "records").rglob("*.json")
    record = json.loads(path.read_text(encoding="utf-8"))
    return record["times"]["train_seconds"], record.get("frozen_features")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--plain_epochs", type=int, default=2, help="measured without cached features")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        draw_task(load_task(TASK), folder / "data", counts=COUNTS, size=64)
        plain, _ = train_seconds(folder, arguments.plain_epochs, cached=False)
        cached, stored = train_seconds(folder, arguments.epochs, cached=True)
    per_epoch = plain / arguments.plain_epochs
    found = {
        "epochs": arguments.epochs,
        "cached_seconds": round(cached, 1),
        "plain_seconds_per_epoch": round(per_epoch, 1),
        "ratio": round(per_epoch * arguments.epochs / cached, 1),
        "frozen_features": stored,
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "load_before": load,
        "date": date.today().isoformat(),
    }
    print(json.dumps(found, indent=2))
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
