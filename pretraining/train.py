"""Pre-train an embedded backbone on synthetic images.

    python -m pretraining.train --seed 0 [--minutes 8] [--until VIEWS] [--folder FOLDER] [--KEY VALUE …]

The same command resumes an earlier call, and does nothing once all views are seen. All randomness is a function of
(seed, image number), so a run in parts ends at the same weights, bit-equal on a CPU with as many threads. See README.md
in this folder.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `svp-bench` does; read when torch is imported

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch import Callback, LightningDataModule, Trainer
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

import svp_bench
from pretraining import drawing
from pretraining.images import contact_sheet, loss_curve
from pretraining.module import PARTS, Pretraining, TensorBatch
from svp_bench.core.errors import NonFiniteLossError, SvpBenchError, UsageError
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.models.weight_files import load_pickle_safely
from svp_bench.records.store import write_atomically
from svp_bench.train.checkpoint import AtomicCheckpointIO
from svp_bench.train.logging import quiet

CONFIG = Path(__file__).with_name("config.yaml")
HELD_OUT_SEED = 20_261_122  # of the validation images: no run may train on it
CHECKPOINT = "last.ckpt"
SUMMARY = "summary.json"
# Settings that determine the weights; folder, minutes, workers, device and logging intervals do not
_WEIGHT_SETTINGS = (
    *("seed", "backbone", "views", "batch_size", "warmup_views", "learning_rate", "min_learning_rate", "weight_decay"),
    *("betas", "gradient_clip", "pose_weight", "coarse_weight", "patch_weight", "centred_weight", "spread_weight"),
)


def parse(arguments: Sequence[str] | None = None) -> Namespace:
    """Return the settings: config.yaml, then the command line.

    Raises:
        UsageError: If a value is not allowed.
    """
    parser = ArgumentParser(prog="python -m pretraining.train", default_config_files=[str(CONFIG)])
    parser.add_argument("--config", action="config", help="a further config file")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights and of the images")
    parser.add_argument("--folder", type=str, default=None, help="runs/pretraining/BACKBONE/seed-SEED by default")
    parser.add_argument("--minutes", type=float, default=None, help="stop after this time; the same command resumes")
    parser.add_argument("--until", type=int, default=None, help="stop after so many views; the schedule stays")
    parser.add_argument("--workers", type=int, default=1, help="processes that generate images (2,000 images/s each)")
    parser.add_argument("--threads", type=int, default=None, help="threads of PyTorch; its default if not given")
    parser.add_argument("--accelerator", type=str, default="auto", help="cpu, gpu or auto")
    parser.add_argument("--backbone", type=str, help="timm name")
    for name in ("views", "batch_size", "warmup_views", "held_out", "held_out_every", "log_every", "save_every"):
        parser.add_argument(f"--{name}", type=int)
    for name in (
        "learning_rate",
        "min_learning_rate",
        "weight_decay",
        "gradient_clip",
        *(f"{part}_weight" for part in PARTS),
    ):
        parser.add_argument(f"--{name}", type=float)
    parser.add_argument("--betas", type=tuple[float, float])
    settings = parser.parse_args(arguments)
    for name in ("views", "batch_size", "held_out", "held_out_every", "log_every", "save_every"):
        if settings[name] < 1:
            raise UsageError(f"--{name} is {settings[name]}; it must be at least 1")
    for name in ("seed", "workers", "warmup_views"):
        if settings[name] < 0:
            raise UsageError(f"--{name} is {settings[name]}; it must be at least 0")
    if settings.seed == HELD_OUT_SEED:
        raise UsageError(f"--seed {HELD_OUT_SEED} is that of the held-out images; give another")
    if settings.folder is None:
        settings.folder = f"runs/pretraining/{settings.backbone}/seed-{settings.seed}"
    return settings


def as_tensors(batch: drawing.SyntheticBatch) -> TensorBatch:
    """Return a batch as tensors."""
    return TensorBatch(*(torch.from_numpy(np.ascontiguousarray(getattr(batch, name))) for name in TensorBatch._fields))


class SyntheticStream(IterableDataset[TensorBatch]):
    """Batches from one step on; step n has the images n · batch_size … (n + 1) · batch_size - 1.

    The order does not depend on the number of workers.
    """

    def __init__(self, seed: int, batch_size: int, first: int, steps: int) -> None:
        self.seed = seed
        self.batch_size = batch_size
        self.first = first
        self.steps = steps

    def __iter__(self) -> Iterator[TensorBatch]:
        """Yield batch after batch."""
        worker = get_worker_info()
        number, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for step in range(self.first + number, self.steps, workers):
            start = step * self.batch_size
            yield as_tensors(drawing.draw(self.seed, np.arange(start, start + self.batch_size)))


def _one_thread(worker: int) -> None:
    from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]  # scikit-learn brings it

    threadpool_limits(1)


class SyntheticData(LightningDataModule):
    """The stream of training images, from the trainer's step on."""

    def __init__(self, seed: int, batch_size: int, steps: int, workers: int) -> None:
        super().__init__()
        self.settings = (seed, batch_size, steps)
        self.workers = workers

    def train_dataloader(self) -> DataLoader[TensorBatch]:
        """Return the loader, from the trainer's current step on."""
        seed, batch_size, steps = self.settings
        first = self.trainer.global_step if self.trainer is not None else 0
        stream = SyntheticStream(seed, batch_size, first, steps)
        return DataLoader(
            stream,
            batch_size=None,
            num_workers=self.workers,
            worker_init_fn=_one_thread,
            prefetch_factor=8 if self.workers else None,
            pin_memory=torch.cuda.is_available(),
        )


class RunLog(Callback):
    """Log, measure on the held-out images, write checkpoints, and stop in time.

    Args:
        settings: Settings of the run.
        began: Start of the call (`time.monotonic`).
    """

    def __init__(self, settings: Namespace, began: float) -> None:
        self.settings = settings
        self.folder = Path(settings.folder)
        self.began = began
        self.steps = steps_of(settings)
        self.rows: list[dict[str, float]] = []  # the log: means over the views since the row before
        self.held_out: list[dict[str, float]] = []
        self.earlier: list[dict[str, Any]] = []  # earlier calls
        self.started = 0.0
        self.step = self.first_step = 0
        self._sums: dict[str, float] = {}
        self._count = 0
        self._pending: list[dict[str, Tensor]] = []
        self._images: list[TensorBatch] = []

    def state_dict(self) -> dict[str, Any]:
        """Return the log as plain data."""
        return {
            "setting": setting_digest(self.settings),
            "rows": self.rows,
            "held_out": self.held_out,
            "calls": [*self.earlier, self.call()],
            "sums": self._sums,
            "count": self._count,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the log of a checkpoint; UsageError if that run had other settings."""
        if state["setting"] != setting_digest(self.settings):
            raise UsageError(
                f"{self.folder} holds a run with other settings (or another version of the images); give another "
                "--folder, or remove it"
            )
        self.rows, self.held_out, self.earlier = state["rows"], state["held_out"], state["calls"]
        self._sums, self._count = state["sums"], state["count"]

    def call(self) -> dict[str, Any]:
        """Return hardware, steps and time of this call."""
        gpu = torch.cuda.is_available() and self.settings.accelerator != "cpu"
        return {
            "device": torch.cuda.get_device_name() if gpu else _processor(),
            "threads": torch.get_num_threads(),
            "workers": self.settings.workers,
            "steps": self.step - self.first_step,
            "seconds": round(time.monotonic() - self.started, 1),
            "torch": str(torch.__version__),
        }

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Generate the held-out images."""
        self.step = self.first_step = trainer.global_step
        count = self.settings.held_out
        for start in range(0, count, 256):
            rows = np.arange(start, min(start + 256, count))
            self._images.append(as_tensors(drawing.draw(HELD_OUT_SEED, rows)))
        self.started = time.monotonic()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log, measure, save and stop at their intervals."""
        step = self.step = trainer.global_step
        self._pending.append(outputs)
        last = step >= self.steps
        if last or self._due("log_every"):
            self._log(trainer)
        if last or self._due("held_out_every"):
            self._measure(pl_module)
        minutes, until = self.settings.minutes, self.settings.until
        late = minutes is not None and time.monotonic() - self.began > 60 * minutes
        late = late or (until is not None and step * self.settings.batch_size >= until)
        if last:  # before the last checkpoint, which implies it
            self._write_summary(pl_module)
        if last or late or self._due("save_every"):
            self._save(trainer)
        if late:
            trainer.should_stop = True

    def _due(self, name: str) -> bool:
        every: int = max(1, self.settings[name] // self.settings.batch_size)
        return int(self.step) % every == 0

    def _collect(self) -> None:
        """Add up the outputs of the steps; only this waits for a GPU."""
        for outputs in self._pending:
            for name, value in outputs.items():
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += len(self._pending)
        self._pending = []
        if not all(np.isfinite(total) for total in self._sums.values()):
            raise NonFiniteLossError(
                f"the pre-training loss became NaN or infinite near step {self.step}; try a smaller --learning_rate"
            )

    def _log(self, trainer: Trainer) -> None:
        self._collect()
        means = {name: total / self._count for name, total in self._sums.items()}
        rate = float(trainer.optimizers[0].param_groups[0]["lr"])
        views = self.step * self.settings.batch_size
        self.rows.append({"views": views, "learning_rate": rate, **means})
        self._sums, self._count = {}, 0
        speed = (self.step - self.first_step) * self.settings.batch_size / (time.monotonic() - self.started)
        parts = "  ".join(f"{name} {value:.4f}" for name, value in means.items())
        print(f"{views:>9,} views  {parts}  {speed:.0f} views/s", flush=True)

    def _measure(self, module: Pretraining) -> None:
        module.eval()
        sums: dict[str, float] = {}
        for batch in self._images:
            moved = TensorBatch(*(tensor.to(module.device) for tensor in batch))
            for name, value in module.held_out(moved).items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.images)
        module.train()
        means = {name: total / self.settings.held_out for name, total in sums.items()}
        self.held_out.append({"views": self.step * self.settings.batch_size, **means})
        print(f"          held-out  {'  '.join(f'{name} {value:.4f}' for name, value in means.items())}", flush=True)

    def _save(self, trainer: Trainer) -> None:
        self._collect()
        trainer.save_checkpoint(self.folder / CHECKPOINT, weights_only=False)  # with the optimizer
        self._write_log()

    def _write_log(self) -> None:
        """Write log.csv, held_out.csv and curve.png."""
        write_atomically(self.folder / "log.csv", _csv(self.rows))
        write_atomically(self.folder / "held_out.csv", _csv(self.held_out))
        curves = {
            name: [(row["views"], row[name]) for row in self.rows if name in row]
            for name in ("loss", "pose", "coarse", "patch", "centred")
        }
        curves["held-out total"] = [(row["views"], row["total"]) for row in self.held_out]
        _save_png(loss_curve(curves, f"{self.settings.backbone}, seed {self.settings.seed}"), self.folder / "curve.png")

    def _write_summary(self, module: Pretraining) -> None:
        """Write summary.json: settings, result, time and hardware."""
        calls = [*self.earlier, self.call()]
        summary = {
            "schema": "svp-bench/pretraining-1",
            "svp_bench": svp_bench.__version__,
            "drawing": drawing.VERSION,
            "settings": weight_settings(self.settings),
            "setting_digest": setting_digest(self.settings),
            "views": self.step * self.settings.batch_size,
            "held_out_seed": HELD_OUT_SEED,
            "held_out_images": self.settings.held_out,
            "held_out": self.held_out[-1],
            "seconds": round(sum(call["seconds"] for call in calls), 1),
            "calls": calls,
            "weights": backbone_digest(module.model),
        }
        write_atomically(self.folder / SUMMARY, json.dumps(summary, indent=2) + "\n")


def steps_of(settings: Namespace) -> int:
    """Return the optimizer steps of a run."""
    return max(1, int(settings.views) // int(settings.batch_size))


def weight_settings(settings: Namespace) -> dict[str, Any]:
    """Return the settings that determine the weights."""
    return {name: list(settings[name]) if name == "betas" else settings[name] for name in _WEIGHT_SETTINGS}


def setting_digest(settings: Namespace) -> str:
    """Return the digest of the settings that determine the weights, with the version of the drawing."""
    text = json.dumps({**weight_settings(settings), "drawing": drawing.VERSION}, sort_keys=True)
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def _csv(rows: Sequence[dict[str, float]]) -> str:
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, list(rows[-1]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: v if k == "views" else f"{v:.6g}" for k, v in row.items()} for row in rows)
    return text.getvalue()


def _save_png(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    image.save(temporary, format="PNG")
    temporary.replace(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _trainer(settings: Namespace, run_log: RunLog) -> Trainer:
    return Trainer(
        accelerator=settings.accelerator,
        devices=1,
        max_steps=steps_of(settings),
        max_epochs=-1,
        gradient_clip_val=settings.gradient_clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[run_log],
        plugins=[AtomicCheckpointIO()],
    )


def train(settings: Namespace) -> bool:
    """Train or resume until all views are seen or the time is up; return whether all are seen.

    Raises:
        UsageError: If the folder holds a run with other settings.
        CheckpointError: If its checkpoint cannot be read.
        SvpBenchError: If it cannot be written.
    """
    began = time.monotonic()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    folder = Path(settings.folder)
    run_log = RunLog(settings, began)
    steps = steps_of(settings)
    module = Pretraining(
        settings.backbone,
        learning_rate=settings.learning_rate,
        min_learning_rate=settings.min_learning_rate,
        weight_decay=settings.weight_decay,
        betas=tuple(settings.betas),
        warmup_steps=settings.warmup_views // settings.batch_size,
        total_steps=steps,
        seed=settings.seed,
        **{f"{part}_weight": settings[f"{part}_weight"] for part in PARTS},
    )
    path = folder / CHECKPOINT
    if path.is_file():
        saved = load_pickle_safely(path)
        run_log.load_state_dict(saved["callbacks"]["RunLog"])  # refuses other settings before anything is built
        if saved["global_step"] >= steps:
            print(f"{folder}: all {steps * settings.batch_size:,} views are seen")
            return True
    else:
        _save_png(contact_sheet(settings.seed), folder / "images.png")
    trainer = _trainer(settings, run_log)
    data = SyntheticData(settings.seed, settings.batch_size, steps, settings.workers)
    trainer.fit(module, data, ckpt_path=path if path.is_file() else None)
    done = trainer.global_step >= steps
    views = trainer.global_step * settings.batch_size
    if done:
        print(f"{folder}: all {views:,} views are seen; next: python -m pretraining.export {folder} …")
    else:
        print(f"{folder}: {views:,} of {steps * settings.batch_size:,} views are seen; the same command resumes")
    return done


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0 if all views are seen, 3 if the time was up before."""
    try:
        with quiet():
            return 0 if train(parse(arguments)) else 3
    except SvpBenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(main())
