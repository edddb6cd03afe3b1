"""Tables and report of large results folders: seconds and peak memory over the number of records.

Synthetic records of 34 tasks, 40 methods, five seeds and three backbones, each with a whole config and one bit per test
image of its task; made of a committed record, so they have the size of real ones. Fewer records are fewer methods.

    python benchmarks/scale.py [--records 1000 5000 20000] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime as dt
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from svp_bench.core.errors import file_size
from svp_bench.records.digests import config_digest, setting_digest
from svp_bench.records.record import Correct, Metrics, PerClass, Record, new_run_id
from svp_bench.records.store import read_records, write_atomically
from svp_bench.tasks.cards import load_suite, load_task

SUITES = ("vtab", "fgvc", "hta")
BACKBONES = ("vim_tiny_patch16_224", "vim_small_patch16_224", "vim_base_patch16_224")
SEEDS = 5
METHODS = ("svp", "linear", "full", "vpt_deep", "vpt_shallow", "lora", "adapter", "offset", "bias")
METHODS += tuple(f"method_{number}" for number in range(10, 41))
REFERENCE = Path(__file__).parents[1] / "results" / "reference" / "demo"


def write_records(root: Path, count: int) -> int:
    """Write about `count` records below `root`: methods by methods, all tasks, backbones and seeds of each."""
    template = next(r for r in read_records(REFERENCE)[0] if r.kind == "final" and r.status == "complete")
    random = np.random.default_rng(0)
    tasks = [(suite, task) for suite in SUITES for task in load_suite(suite).tasks]
    written = 0
    for position, method in enumerate(METHODS):
        for suite, task in tasks:
            for backbone in BACKBONES:
                for seed in range(SEEDS):
                    if written >= count:
                        return written
                    accuracy = random.normal(50 + position / 4 + len(task), 1) / 100
                    record = _record(template, suite, task, method, backbone, seed, accuracy, random, written)
                    text = json.dumps(record.to_json(), indent=2, ensure_ascii=False) + "\n"
                    path = root / "records" / task / f"{record.run_id}.json"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(text)
                    written += 1
    return written


def _record(
    template: Record,
    suite: str,
    task: str,
    method: str,
    backbone: str,
    seed: int,
    accuracy: float,
    random: np.random.Generator,
    number: int,
) -> Record:
    card = load_task(task)
    images, classes = card.counts["test"], card.classes or 10
    bits = random.random(images) < accuracy
    of_class = np.bincount(np.arange(images) % classes, minlength=classes)
    right = np.bincount(np.arange(images)[bits] % classes, minlength=classes)
    config: dict[str, Any] = json.loads(json.dumps(template.config))
    config["seed_everything"] = seed
    config["data"]["task"], config["model"]["backbone"] = task, backbone
    config["model"]["method"] = {"class_path": f"methods.{method}", "init_args": {"hidden_dim": 64}}
    digest = setting_digest(config, None)
    run_id = new_run_id(
        method, seed, digest, dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc), number.to_bytes(4, "big")
    )
    top1, balanced = 100 * float(bits.mean()), 100 * float(np.mean(right[of_class > 0] / of_class[of_class > 0]))
    per_class = PerClass(right.tolist(), of_class.tolist())
    return dataclasses.replace(
        template,
        run_id=run_id,
        task=task,
        suite=suite,
        task_version=card.version,
        method=method,
        method_args={"hidden_dim": 64},
        backbone=backbone,
        protocol=f"{suite}-final",
        protocol_version=1,
        seed=seed,
        config=config,
        config_digest=config_digest(config),
        setting_digest=digest,
        search=None,
        metrics=Metrics(top1, 1.25, int(bits.sum()), images, top1, balanced, 1.25, 10.5, per_class),
        correct=Correct.of(bits, "test", "sha256:" + "cd" * 32),
        migrated_from=None,
    )


def measure(command: list[str], folder: Path) -> dict[str, float]:
    """Return seconds and peak GiB of a subcommand."""
    code = "import resource, subprocess, sys; s = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode; "
    code += "print(s, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, sys.executable, "-m", "svp_bench", *command],
        cwd=folder,
        capture_output=True,
        text=True,
        check=True,
    )
    seconds = time.perf_counter() - began
    status, peak = map(int, done.stdout.split())
    if status:
        raise SystemExit(f"{' '.join(command)}: status {status}\n{done.stderr}")
    return {"seconds": seconds, "peak_gib": peak / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, nargs="+", default=[1000, 5000, 20000])
    parser.add_argument("--output", type=Path, help="where the JSON goes")
    parser.add_argument("--folder", type=Path, help="keep the records here")
    arguments = parser.parse_args()
    rows = []
    load = os.getloadavg()[0]
    for count in arguments.records:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (arguments.folder or Path(temporary)) / str(count)
            if not folder.is_dir():
                write_records(folder / "results", count)
            row: dict[str, Any] = {"records": count, "table": measure(["table"], folder)}
            row["report"] = measure(["report"], folder)
            row["report_bytes"] = (folder / "results" / "report" / "index.html").stat().st_size
            rows.append(row)
            parts = (
                f"{name} {row[name]['seconds']:5.1f} s, {row[name]['peak_gib']:.2f} GiB" for name in ("table", "report")
            )
            print(f"{count:6d} records: {'; '.join(parts)}, page {file_size(row['report_bytes'])}", flush=True)
    if arguments.output:
        machine = f"{platform.machine()}, {os.cpu_count()} cores"
        result = {"date": dt.date.today().isoformat(), "machine": machine, "load_before": load, "rows": rows}
        write_atomically(arguments.output, json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
