"""The cost of every method on a device: latency, throughput, time of a training step, peak memory.

    python benchmarks/methods.py [--backbones vim_nano_patch8_64,…] [--methods svp,lora] [--output FILE]

Each pair of backbone and method is measured in a process of its own, on random weights and images, with the default
settings of the method and 10 classes; a method that merges is measured merged too. Times are medians of one process
after warm-up: compare rows of one file only.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `svp-bench` does; read when torch is imported

import torch
import torch.nn.functional as F

from svp_bench.methods import create_model, list_methods
from svp_bench.train.efficiency import count_macs

CLASSES = 10
STEP_BATCH = 32
LARGEST = 1024  # images; throughput hardly grows beyond it


def median_seconds(work: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Return the median seconds of a call, of at least five calls and `least` seconds, after two that do not count."""
    times: list[float] = []
    for count in range(10_000):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if count >= 2:
            times.append(time.perf_counter() - began)
        if len(times) >= 5 and sum(times) >= least:
            break
    return statistics.median(times)


def throughput(forward: Callable[[int], object], device: torch.device) -> tuple[int, float]:
    """Return the batch size with the highest throughput, doubling until memory ends or it no longer grows, and it."""
    best = (1, 0.0)
    size = 1
    while size <= LARGEST:
        batch = size
        try:
            rate = batch / median_seconds(lambda batch=batch: forward(batch), device, least=0.3)  # type: ignore[misc]
        except (torch.OutOfMemoryError, MemoryError):
            break
        if rate < 0.9 * best[1]:
            break
        best = max(best, (size, rate), key=lambda found: found[1])
        size *= 2
    return best


def measure(backbone: str, method: str, device: torch.device) -> dict[str, Any]:
    """Return the cost of a method on a backbone."""
    torch.manual_seed(0)
    model: Any = create_model(backbone, num_classes=CLASSES, method=method).to(device)
    shape = (model.in_chans, *model.image_size)
    images = torch.randn(min(LARGEST, 64 if model.embed_dim > 64 else LARGEST), *shape, device=device)
    inference, training = count_macs(model)

    def forward(count: int) -> None:
        with torch.inference_mode():
            model(images[torch.arange(count) % len(images)] if count > len(images) else images[:count])

    model.eval()
    found: dict[str, Any] = {
        "backbone": backbone,
        "method": method,
        "inference_macs": inference,
        "training_macs": training,
    }
    found["latency_ms"] = round(1000 * median_seconds(lambda: forward(1), device), 3)
    batch, rate = throughput(forward, device)
    found |= {"images_per_second": round(rate, 1), "batch": batch}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(STEP_BATCH, device=device) % CLASSES

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images[:STEP_BATCH]), labels).backward()
        optimizer.step()

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    found["step_ms"] = round(1000 * median_seconds(step, device), 2)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak)
    if model.method.mergeable and model.adapter is not None:
        model.method.merge(model)
        found["merged_latency_ms"] = round(1000 * median_seconds(lambda: forward(1), device), 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="vim_nano_patch8_64,vit_nano_patch8_64")
    parser.add_argument("--methods", default="", help="all that fit by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--one", nargs=2, metavar=("BACKBONE", "METHOD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if arguments.one:
        print(json.dumps(measure(*arguments.one, device)))
        return
    rows = []
    for backbone in arguments.backbones.split(","):
        for method in arguments.methods.split(",") if arguments.methods else list_methods(backbone):
            command = [sys.executable, __file__, "--device", arguments.device, "--one", backbone, method]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(f"{backbone}, {method}: {done.stderr}")
            rows.append(json.loads(done.stdout.splitlines()[-1]))
            print(rows[-1], flush=True)
    found = {
        "rows": rows,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "instruction_set": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "step_batch": STEP_BATCH,
        "load_before": os.getloadavg()[0],
        "date": dt.date.today().isoformat(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
