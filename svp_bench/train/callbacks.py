"""Measure the speed and memory of a run, log them to TensorBoard, and show the progress."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer


class ThroughputMonitor(Callback):
    """Measure images per second, gradient norm, learning rate, wall times and peak memory.

    Attributes:
        seconds: Wall seconds by phase: "train_seconds", "test_seconds", "val_seconds".
        images: Training images seen by all processes together.
        epochs: Completed training epochs.
        validated_at: Number of optimizer steps when val was last scored, or None.
        failed_in: Stage of the trainer when an exception ended it, or None.
        peak_mib: Peak memory of a run that ran out of memory, read before the probes that follow; else None.
    """

    def __init__(self) -> None:
        global _runs
        _runs += 1
        self.seconds: dict[str, float] = {}
        self.images = 0
        self.epochs = 0
        self.validated_at: int | None = None
        self.failed_in: RunningStage | None = None
        self.peak_mib: float | None = None
        self._started: dict[str, float] = {}
        self._epoch = (0.0, 0)  # start time of the epoch, and images seen before it

    def state_dict(self) -> dict[str, Any]:
        """Return the counts that a resumed run continues from."""
        seconds = dict(self.seconds)
        for phase, began in self._started.items():
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began
        counts = {"images": self.images, "epochs": self.epochs, "validated_at": self.validated_at}
        return {"seconds": seconds, **counts}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from the counts of a checkpoint."""
        self.seconds, self.images = dict(state_dict["seconds"]), state_dict["images"]
        self.epochs, self.validated_at = state_dict["epochs"], state_dict["validated_at"]

    @property
    def images_per_second(self) -> float | None:
        """Training throughput of the whole run without validation; None before the end of the first epoch."""
        seconds = self.seconds.get("train_seconds", 0.0)
        return self.images / seconds if seconds > 0 and self.images else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Reset the peak memory of an earlier run of this process."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._start("train_seconds")
        self._epoch = (time.perf_counter(), self.images)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the images, and log the throughput of this epoch."""
        self.images += len(batch.labels) * trainer.world_size
        began, images = self._epoch
        seconds = time.perf_counter() - began
        pl_module.log("train/images_per_second", (self.images - images) / seconds, batch_size=1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the learning rate, and the gradient norm before clipping."""
        pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"], batch_size=1)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients]
        pl_module.log("train/grad_norm", torch.linalg.vector_norm(torch.stack(norms)), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop("train_seconds")
        self.epochs += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Pause the training clock."""
        if not trainer.sanity_checking:
            self._stop("train_seconds")
            self._start("val_seconds")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resume the training clock."""
        if not trainer.sanity_checking:
            self._stop("val_seconds")
            self.validated_at = trainer.global_step
            if trainer.training:
                self._start("train_seconds")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._start("test_seconds")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop("test_seconds")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Store the stage, which the trainer resets."""
        self.failed_in = trainer.state.stage

    def _start(self, phase: str) -> None:
        self._started[phase] = time.perf_counter()

    def _stop(self, phase: str) -> None:
        if phase in self._started:
            spent = time.perf_counter() - self._started.pop(phase)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


_runs = 0  # of this process


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB: of the allocator on a GPU, of the whole process on a CPU.

    Return None on Windows, and for the second and later runs of a process on a CPU: the peak of a process cannot be
    reset, so it may be that of an earlier run.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _runs > 1:
        return None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class SteadyTensorBoardLogger(TensorBoardLogger):
    """Log to TensorBoard; a failure (full disk, deleted folder) ends logging with a warning, not the run.

    Attributes:
        failure: The error that stopped logging, or None.
    """

    failure: str | None = None

    @property
    def experiment(self) -> Any:
        """Return a `SummaryWriter` whose methods cannot fail."""
        return _SafeWriter(self._attempt, lambda: super(SteadyTensorBoardLogger, self).experiment)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log hyper-parameters."""
        self._attempt(lambda: super(SteadyTensorBoardLogger, self).log_hyperparams(*args, **kwargs))

    def save(self) -> None:
        """Write pending events and the hyper-parameters."""
        self._attempt(super().save)

    def _attempt(self, work: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return work()
        except Exception as error:  # of the writer or its thread
            self.failure = " ".join(f"{type(error).__name__}: {error}".split())
            rank_zero_warn(f"TensorBoard's logs end here, the run continues: {self.failure}")
            return None


class _SafeWriter:
    """A writer that is created at the first call, and whose methods pass through `attempt`."""

    def __init__(self, attempt: Callable[[Callable[[], Any]], Any], make: Callable[[], Any]) -> None:
        self._attempt = attempt
        self._make = make

    def __getattr__(self, name: str) -> Any:
        value = self._attempt(lambda: getattr(self._make(), name))
        if value is not None and not callable(value):
            return value
        return lambda *args, **kwargs: self._attempt(lambda: value(*args, **kwargs))


class _Clock:
    """Measure the elapsed time of a run, and estimate the remaining time.

    The first step compiles kernels, which can take longer than the run: the estimate uses the steps after it.
    """

    def start(self, trainer: Trainer) -> None:
        """Start the clock at the progress of the trainer."""
        self._began = self._warm = time.perf_counter(), trainer.global_step

    def step(self, trainer: Trainer) -> None:
        """Note the end of the first step."""
        if self._warm is self._began and trainer.global_step > self._began[1]:
            self._warm = time.perf_counter(), trainer.global_step

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began[0]

    def left(self, trainer: Trainer) -> float | None:
        """Return the estimated seconds until the end of training; None before the first step."""
        since, before = self._began if self._warm[1] == trainer.global_step else self._warm
        done = trainer.global_step - before
        rest = trainer.estimated_stepping_batches - trainer.global_step
        return (time.perf_counter() - since) / done * rest if done else None


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class EpochLines(Callback):
    """Print one line per epoch, for output that is not a terminal."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock.start(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Note the end of the first step."""
        self._clock.step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch, its scores, the elapsed and the remaining time."""
        if not trainer.is_global_zero:
            return
        numbers, epoch, epochs = trainer.callback_metrics, trainer.current_epoch + 1, trainer.max_epochs or 0
        parts = [f"epoch {epoch}/{epochs}"]
        for key, text in (
            ("train/loss", "loss {:.4f}"),
            ("val/loss", "val loss {:.4f}"),
            ("val/top1", "val top-1 {:.3f}"),
        ):
            if key in numbers:
                parts.append(text.format(float(numbers[key])))
        parts.append(f"{_duration(self._clock.elapsed())} elapsed")
        if (left := self._clock.left(trainer)) is not None:
            parts.append(f"{_duration(left)} left")
        sys.stdout.write("  ".join(parts) + "\n")
        sys.stdout.flush()


class RunProgressBar(TQDMProgressBar):
    """Show Lightning's progress bar with epochs counted from 1 and the remaining time of the run."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()

    def on_train_start(self, *args: Any) -> None:
        """Start the clock."""
        super().on_train_start(*args)
        self._clock.start(args[0])

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Note the end of the first step, and update the bar."""
        self._clock.step(trainer)
        super().on_train_batch_end(trainer, *args)

    def on_train_epoch_start(self, trainer: Trainer, *args: Any) -> None:
        """Start the bar of an epoch; Lightning's method shows the epoch counted from 0."""
        self.train_progress_bar.reset(self.total_train_batches)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the values next to the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        left = self._clock.left(trainer) if trainer.training else None
        return items if left is None else {**items, "run_left": _duration(left)}
