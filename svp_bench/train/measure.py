"""Measure the cost of settings on this machine: latency, throughput, time of a training step, peak memory.

Each setting is measured in a process of its own, with random weights and images, in float32.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

import torch
import torch.nn.functional as F

from svp_bench._version import __version__
from svp_bench.config.compose import method_layer
from svp_bench.core.errors import SvpBenchError, one_line
from svp_bench.core.registry import import_object, make_importable
from svp_bench.core.validate import convert
from svp_bench.methods.build import input_size
from svp_bench.ops.interface import choose
from svp_bench.records.code import class_paths, source_files
from svp_bench.records.costs import SCHEMA, CostFile, MeasuredCost, Setting, setting_of
from svp_bench.records.record import Record
from svp_bench.train.callbacks import peak_memory_mib
from svp_bench.train.module import AdaptationModule
from svp_bench.train.provenance import commit_and_dirty, cpu_name, device_name, library_versions

CLASSES = 10
STEP_BATCH = 32
LARGEST = 1024  # images; throughput hardly grows beyond it
_SLOW = 5.0  # seconds of a call after which no larger batch is tried
Job = dict[str, Any]
"""A setting to measure, as JSON: its name, `Setting`, the config of the method, and the digest if a record has it."""


def recipe_job(backbone: str, method: str) -> Job:
    """Return the job for the recipe of a method, by name, as a hybrid or by file.

    Raises:
        UsageError: If there is no such backbone or method; names the nearest.
    """
    size = input_size(backbone)
    layer, _, name = method_layer(method)
    height, width = (size, size) if isinstance(size, int) else size
    return {"name": name, "backbone": backbone, "method": layer["model"]["method"], "image_size": [height, width]}


def record_jobs(records: Iterable[Record]) -> list[Job]:
    """Return a job for each setting of complete final records."""
    jobs: dict[str, Job] = {}
    for record in records:
        setting = setting_of(record) if (record.kind, record.status) == ("final", "complete") else None
        if setting is not None and setting.digest not in jobs:
            jobs[setting.digest] = {
                "name": record.method,
                "backbone": setting.backbone,
                "method": record.config["model"]["method"],
                "image_size": list(setting.image_size),
                "head_hidden": setting.head_hidden,
                "digest": setting.digest,
            }
    return list(jobs.values())


def measure_all(
    jobs: Iterable[Job], device: str, report: Callable[[str], object], largest: int = LARGEST
) -> tuple[CostFile, list[str]]:
    """Measure jobs one after another.

    Args:
        jobs: The jobs.
        device: "cpu", "cuda", ...
        report: Called with a line about each job.
        largest: The largest batch size to try.

    Returns:
        The costs, and a line for each job that failed.
    """
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    commit, dirty = commit_and_dirty()
    rows, failed = [], []
    backends: set[str] = set()
    for job in jobs:
        command = [sys.executable, "-m", "svp_bench.train.measure"]
        given = json.dumps({**job, "device": device, "largest": largest})
        what = f"{job['name']} on {job['backbone']}"
        try:
            done = subprocess.run(command, input=given, capture_output=True, text=True, check=False)
        except KeyboardInterrupt:  # keep what was measured
            failed.append(f"{what}: interrupted; the settings after it were not measured either")
            report(f"not measured: {failed[-1]}")
            break
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"its process ended with status {done.returncode}"])[-1]
            failed.append(f"{what}: {one_line(last)}")
            report(f"not measured: {failed[-1]}")
            continue
        found = json.loads(done.stdout.splitlines()[-1])
        backends.update(filter(None, [found.pop("scan_backend")]))
        row = convert(found, MeasuredCost, what)
        rows.append(row)
        report(f"{what}: latency {row.latency_ms:g} ms, step {row.step_ms:g} ms, {row.images_per_second:g} images/s")
    costs = CostFile(
        schema=SCHEMA,
        date=datetime.now(timezone.utc).date().isoformat(),
        package_version=__version__,
        commit=commit,
        dirty=dirty,
        libraries=library_versions(),
        device=device_name(torch.device(device)),
        cpu=cpu_name(),
        scan_backends=tuple(sorted(backends)),
        precision="32-true",
        classes=CLASSES,
        step_batch=STEP_BATCH,
        load_before=load,
        rows=tuple(rows),
    )
    return costs, failed


# --- one setting, in a process of its own ----------------------------------------------------------------------------


def median_seconds(work: Callable[[], object], device: torch.device, least: float = 0.5) -> float:
    """Return the median seconds of a call, after two that do not count.

    Args:
        work: The call.
        device: Where it works.
        least: Seconds of calls; there are at least five, unless one takes more than a second.
    """
    times: list[float] = []
    for count in range(10_000):
        began = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        if count < 2:  # the first one may compile kernels
            continue
        times.append(time.perf_counter() - began)
        if (len(times) >= 5 and sum(times) >= least) or times[-1] > 1:
            break
    return statistics.median(times)


def throughput(forward: Callable[[int], object], device: torch.device, largest: int = LARGEST) -> tuple[int, float]:
    """Return the batch size with the highest throughput, and this in images per second.

    The size is doubled until memory ends, a call takes seconds, the throughput falls twice, or it is `largest`.
    """
    best, size, falls = (1, 0.0), 1, 0
    while size <= largest and falls < 2:
        batch = size
        try:
            seconds = median_seconds(lambda batch=batch: forward(batch), device, least=0.3)  # type: ignore[misc]
        except (torch.OutOfMemoryError, MemoryError):
            break
        except RuntimeError as error:  # of the CPU allocator, which has no class of its own
            if "can't allocate memory" not in str(error):
                raise
            break
        falls = falls + 1 if batch / seconds < 0.9 * best[1] else 0
        best = max(best, (batch, batch / seconds), key=lambda found: found[1])
        if seconds > _SLOW:
            break
        size *= 2
    return best


def measure(job: Job) -> dict[str, Any]:
    """Return the cost of a setting as the fields of `MeasuredCost`, and its scan backend.

    Raises:
        ConfigError: If the method does not fit.
        SvpBenchError: If the setting is not that of the record.
    """
    device = torch.device(job["device"])
    make_importable()
    given = job["method"]
    method = import_object(given["class_path"])(**(given.get("init_args") or {}))
    size, hidden = (job["image_size"][0], job["image_size"][1]), job.get("head_hidden")
    sources = source_files(class_paths({"model": {"method": given}}))
    setting = Setting(job["backbone"], given["class_path"], method.settings(), size, hidden, sources)
    if job.get("digest") not in (None, setting.digest):
        raise SvpBenchError("the code or the arguments of the method are not those of the record")
    torch.manual_seed(0)
    module = AdaptationModule(
        method, job["backbone"], "none", num_classes=CLASSES, image_size=size, head_hidden=hidden
    ).to(device)
    model: Any = module.model
    images = torch.randn(STEP_BATCH, model.in_chans, *size, device=device)
    method.prepare(model, [images])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    labels = torch.arange(STEP_BATCH, device=device) % CLASSES

    def forward(count: int) -> None:
        with torch.inference_mode():
            model(images[torch.arange(count, device=device) % STEP_BATCH])

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    module.train()
    step_seconds = median_seconds(step, device)
    peak = peak_memory_mib(device)  # before the forward passes of larger batches
    module.eval()
    latency = median_seconds(lambda: forward(1), device)
    batch, rate = throughput(forward, device, job["largest"])
    merged = None
    if method.mergeable and model.adapter is not None:
        method.merge(model)
        merged = round(1000 * median_seconds(lambda: forward(1), device), 3)
    backend = model.scan_backend
    return {
        "name": job["name"],
        "setting": asdict(setting),
        "setting_digest": setting.digest,
        "latency_ms": round(1000 * latency, 3),
        "merged_latency_ms": merged,
        "images_per_second": round(rate, 1),
        "batch": batch,
        "step_ms": round(1000 * step_seconds, 3),
        "peak_memory_mib": None if peak is None else round(peak, 1),
        "scan_backend": None if backend is None else choose(backend, device, torch.float32).name,
    }


if __name__ == "__main__":
    try:
        sys.stdout.write(json.dumps(measure(json.load(sys.stdin))) + "\n")
    except SvpBenchError as error:
        sys.exit(one_line(str(error)))
