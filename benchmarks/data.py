"""Images per second: the first pass over a split and the cached ones, against PIL and torchvision.

The baseline is what most training code does: a data set that opens each file with PIL, resizes it with torchvision
(bicubic, antialiased by PIL) and returns uint8, in a `DataLoader`. All ways run in turns in one process, over the same
files, and must give the same pixels; the best of some turns counts. "Per core" is per second of CPU time, of worker
processes too, which other work on the machine hardly changes.

    python benchmarks/data.py --output benchmarks/results/data.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import InterpolationMode  # type: ignore[import-untyped]
from torchvision.transforms.v2 import Compose, PILToTensor, Resize  # type: ignore[import-untyped]

from svp_bench.data.loading import Batch, ImageDataset, Loader, outlive_signals, to_arrays
from svp_bench.data.pixels import PixelCache, list_entries, remove_entry
from svp_bench.data.samplers import EvalBatchSampler
from svp_bench.data.sources import FileImages, Images
from svp_bench.data.split_files import ImageList
from svp_bench.data.synthetic import draw_task
from svp_bench.data.transforms import EvalTransform
from svp_bench.tasks.cards import load_task

SIZES = ((32, 32), (64, 64), (96, 96), (256, 256), (500, 375), (1000, 750))  # width, height: VTAB's, roughly
SIDE, BATCH, CORES = 224, 64, 2
GOAL = 7000  # images/s of the warm test evaluation, on two cores
Way = Callable[[], Iterator[torch.Tensor]]


def draw(folder: Path, width: int, height: int, ending: str, count: int) -> Images:
    """Write images of soft shapes with some noise, and return them as a split."""
    generator = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = generator.integers(0, 256, (max(2, height // 16), max(2, width // 16), 3), dtype=np.uint8)
        soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = soft + generator.integers(-6, 7, soft.shape, dtype=np.int16)
        paths.append(f"{number:05d}.{ending}")
        image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
        image.save(folder / paths[-1], **({"quality": 90} if ending == "jpg" else {}))
    return FileImages(folder, "test", ImageList(tuple(paths), np.zeros(count, dtype=np.int64)))


class TorchvisionFiles(Dataset[torch.Tensor]):
    """The baseline's data set."""

    def __init__(self, images: Images) -> None:
        self._images = images
        interpolation = InterpolationMode.BICUBIC
        self._transform = Compose([Resize((SIDE, SIDE), interpolation=interpolation), PILToTensor()])

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> torch.Tensor:
        with Image.open(self._images.where(index)) as image:
            transformed: torch.Tensor = self._transform(image.convert("RGB"))
        return transformed


def baseline(images: Images, workers: int) -> Iterator[torch.Tensor]:
    """Yield batches as PIL and torchvision give them."""
    yield from DataLoader(TorchvisionFiles(images), BATCH, num_workers=workers)


def open_cached(images: Images) -> ImageDataset:
    """Return the images as a run opens them: checked, and cached on disk, or read from there."""
    cache = PixelCache("benchmark", EvalTransform(SIDE), lambda _: None, _refuse)
    pixels = cache.open(images, cache.examine(images))
    assert pixels is not None
    return ImageDataset(images, EvalTransform(SIDE), pixels=pixels)


def _refuse(line: str) -> None:
    raise SystemExit(line)


def batches(dataset: ImageDataset, workers: int) -> Iterator[torch.Tensor]:
    """Yield the batches of an evaluation."""
    sampler, options = EvalBatchSampler(len(dataset), BATCH, 1, 0), {}
    if workers:
        options = {"num_workers": workers, "collate_fn": to_arrays, "worker_init_fn": outlive_signals}
    loader: DataLoader[Batch] = Loader(dataset, sampler=sampler, batch_size=None, **options)  # type: ignore[arg-type]
    for batch in loader:
        yield batch.images


def empty_cache() -> None:
    """Remove the cached images and findings."""
    for path, _, _ in list_entries():
        remove_entry(path)
    shutil.rmtree(Path(os.environ["SVP_BENCH_CACHE"]) / "images", ignore_errors=True)


def first_pass(images: Images) -> Iterator[torch.Tensor]:
    """Yield the batches of a run that finds no cache; it also checks the images and stores them."""
    empty_cache()
    yield from batches(open_cached(images), 0)


def two_passes(images: Images) -> Iterator[torch.Tensor]:
    """Yield the batches of a run without the cache: it checks all images, then decodes them again."""
    Images.examine(images)
    yield from batches(ImageDataset(images, EvalTransform(SIDE)), 0)


def cpu_seconds() -> float:
    """Return the CPU time of this process and the workers that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def measure(ways: dict[str, Way], count: int, turns: int) -> dict[str, dict[str, float]]:
    """Return images/s and images/s per core of each way, the best of some turns, which alternate."""
    best = {name: {"images_per_second": 0.0, "per_core": 0.0} for name in ways}
    for _ in range(turns):
        for name, way in ways.items():
            began, used = time.perf_counter(), cpu_seconds()
            found = sum(len(batch) for batch in way())
            wall, cpu = time.perf_counter() - began, cpu_seconds() - used
            if found != count:
                raise SystemExit(f"{name}: {found} images of {count}")
            best[name]["images_per_second"] = max(best[name]["images_per_second"], round(count / wall, 1))
            best[name]["per_core"] = max(best[name]["per_core"], round(count / cpu, 1))
    return best


def need_equal(ways: dict[str, Way]) -> None:
    """Stop unless all ways give the same pixels."""
    first, *others = (torch.cat(list(way())) for way in ways.values())
    for name, images in zip(list(ways)[1:], others, strict=True):
        if not torch.equal(images, first):
            raise SystemExit(f"{name} gives other pixels than {next(iter(ways))}")


def measure_sizes(folder: Path, sizes: Sequence[tuple[int, int]], turns: int) -> list[dict[str, Any]]:
    """Measure the first and a later pass over JPEG and PNG files of some sizes."""
    rows = []
    for width, height in sizes:
        for ending in ("jpg", "png"):
            place = folder / f"{width}x{height}-{ending}"
            place.mkdir()
            count = 256 if width <= 96 else 96 if width <= 500 else 32
            images = draw(place, width, height, ending, count)
            ways: dict[str, Way] = {
                "baseline": lambda images=images: baseline(images, 0),  # type: ignore[misc]
                "baseline_workers": lambda images=images: baseline(images, CORES),  # type: ignore[misc]
                "checked_without_cache": lambda images=images: two_passes(images),  # type: ignore[misc]
                "first": lambda images=images: first_pass(images),  # type: ignore[misc]
                "cached": lambda images=images: batches(open_cached(images), 0),  # type: ignore[misc]
            }
            need_equal(ways)
            rows.append({"size": f"{width} x {height}", "format": ending, **measure(ways, count, turns)})
            _print(rows[-1])
    return rows


def _print(row: dict[str, Any]) -> None:
    text = ", ".join(
        f"{k} {v['images_per_second']:.0f} ({v['per_core']:.0f})" for k, v in row.items() if type(v) is dict
    )
    print(f"{row['size']} {row['format']}: {text}", flush=True)


def measure_warm(folder: Path, turns: int) -> dict[str, Any]:
    """Measure a test evaluation of 2,048 cached images, in this process and in two workers."""
    folder.mkdir()
    images = draw(folder, 64, 64, "png", 2048)
    dataset = open_cached(images)
    stored = dataset._on_disk
    assert stored is not None
    last = np.ascontiguousarray(stored.take(np.arange(len(images))).transpose(0, 2, 3, 1))  # as (N, H, W, 3)

    def channels_last() -> Iterator[torch.Tensor]:
        for index in EvalBatchSampler(len(images), BATCH, 1, 0):
            yield torch.from_numpy(last.take(index, axis=0)).permute(0, 3, 1, 2).contiguous()

    ways: dict[str, Way] = {
        "this_process": lambda: batches(dataset, 0),
        "two_workers": lambda: batches(dataset, CORES),
        "stored_channels_last_unchecked": channels_last,
    }
    need_equal(ways)
    return measure(ways, len(images), turns)


# --- two sweeps ------------------------------------------------------------------------------------------------------

TASK = "vtab/dtd"
COUNTS = {"train800": 800, "val200": 200, "train800val200": 1000, "test": 1880}
SWEEP = [
    *("sweep", "--tasks", TASK, "--methods", "linear", "--seeds", "0", "--data.root", "data", "--workers", "1"),
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "none", "--trainer.max_epochs", "1"),
    *("--trainer.accelerator", "cpu", "--no_report", "--data.image_size", "64"),
]


def start_sweep(folder: Path, results: str, cached: bool) -> subprocess.Popen[bytes]:
    """Start a sweep of one run."""
    flags = ["--results_root", results, "--runs_root", f"{results}-runs", "--data.pixel_cache", str(cached).lower()]
    return subprocess.Popen(
        [sys.executable, "-m", "svp_bench", *SWEEP, *flags],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, "SVP_BENCH_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"},
    )


def measure_sweeps(folder: Path) -> dict[str, Any]:
    """Measure two sweeps at a time over one data set: without the cache, filling it, and with it."""
    folder.mkdir()
    draw_task(load_task(TASK), folder / "data", counts=COUNTS, size=400)
    found: dict[str, Any] = {}
    scores = set()
    for name, cached in (("warm_up", False), ("without", False), ("first", True), ("later", True)):
        began, used = time.perf_counter(), cpu_seconds()
        started = [start_sweep(folder, f"{name}-{number}", cached) for number in range(2)]
        for process in started:
            _, text = process.communicate()
            if process.returncode:
                raise SystemExit(f"status {process.returncode}\n{text.decode()}")
        wall, cpu = time.perf_counter() - began, cpu_seconds() - used
        found[name] = {"wall_seconds": round(wall, 1), "cpu_seconds": round(cpu, 1)}
        for number in range(2):
            (path,) = (folder / f"{name}-{number}" / "records").rglob("*.json")
            record = json.loads(path.read_text(encoding="utf-8"))
            scores.add((record["correct"]["bits"], json.dumps(record["metrics"], sort_keys=True)))
        print(f"two sweeps, {name}: {wall:.1f} s, {cpu:.1f} s of CPU time", flush=True)
    if len(scores) != 1:
        raise SystemExit("the runs with and without the cache have different results")
    found["equal_results"] = True
    found["cache_bytes"] = sum(path.stat().st_size for path in (folder / "cache" / "pixels").iterdir())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        os.environ["SVP_BENCH_CACHE"] = str(folder / "cache")
        warm = measure_warm(folder / "warm", arguments.turns)
        print(warm, flush=True)
        sizes = measure_sizes(folder, SIZES, arguments.turns)
        sweeps = measure_sweeps(folder / "sweeps")
    found = {
        "goal": {"warm_images_per_second": GOAL, "met": warm["this_process"]["images_per_second"] >= GOAL},
        "warm": warm,
        "sizes": sizes,
        "two_sweeps": sweeps,
        "machine": {"cores": os.cpu_count(), "processor": platform.processor() or platform.machine()},
        "load_before": load,
        "date": date.today().isoformat(),
    }
    if arguments.output:
        arguments.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
