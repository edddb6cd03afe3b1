"""What warm workers save: 40 tiny runs as one `svp-bench sweep`, and the same runs as 40 `svp-bench fit` processes.

The overhead of a run is its share of the wall time less the seconds of training and testing in its record.
Both ways run in turns of ten, so that a machine whose speed drifts treats them alike.

    python benchmarks/sweep.py --output benchmarks/results/sweep.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

METHODS = ["linear", "offset", "svp", "bias"]
TASK = "demo/digits-5shot"
FLAGS = [
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "none"),
    *("--trainer.max_epochs", "1", "--trainer.accelerator", "cpu"),
]


def call(arguments: list[str], folder: Path) -> float:
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "svp_bench", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - began


def busy(folder: Path) -> tuple[int, float]:
    """Return the number of records and the seconds in which their runs trained and tested."""
    times = [json.loads(path.read_text())["times"] for path in (folder / "results" / "records").rglob("*.json")]
    return len(times), sum(sum(spent.values()) for spent in times)


def scores(folder: Path) -> dict[tuple[str, int], str]:
    records = [json.loads(path.read_text()) for path in (folder / "results" / "records").rglob("*.json")]
    return {(record["method"], record["seed"]): record["correct"]["bits"] for record in records}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=40, help="a multiple of 4")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    seeds = list(range(arguments.runs // len(METHODS)))
    wall = {"sweep": 0.0, "fit": 0.0}
    starts = 0
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as root:
        folders = {name: Path(root) / name for name in wall}
        for folder in folders.values():
            folder.mkdir()
        share = [seeds[i :: arguments.turns] for i in range(arguments.turns)]
        for part in filter(None, share):
            listed = ",".join(map(str, part))
            sweep = ["sweep", "--tasks", TASK, "--methods", ",".join(METHODS), "--seeds", listed, "--no_report", *FLAGS]
            wall["sweep"] += call(sweep, folders["sweep"])
            starts += 1
            for method in METHODS:
                for seed in part:
                    fit = ["fit", "--config", f"configs/{TASK}.yaml", "--method", method]
                    wall["fit"] += call([*fit, "--seed_everything", str(seed), *FLAGS], folders["fit"])
        counts = {name: busy(folder) for name, folder in folders.items()}
        same = scores(folders["sweep"]) == scores(folders["fit"])
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "load_at_start": round(load, 2),
        "runs": counts["sweep"][0],
        "sweep_starts": starts,
        "same_bits": same,
    }
    for name, seconds in wall.items():
        count, inside = counts[name]
        result[name] = {
            "wall_seconds": round(seconds, 1),
            "training_and_testing_seconds": round(inside, 1),
            "overhead_seconds_a_run": round((seconds - inside) / count, 2),
        }
    result["fit_over_sweep"] = round(wall["fit"] / wall["sweep"], 2)
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.output:
        arguments.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
