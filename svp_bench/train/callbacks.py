"""What is measured along the way, for TensorBoard and for the record."""

from __future__ import annotations

import math
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

__all__ = ["EpochLines", "RunProgressBar", "SteadyTensorBoardLogger", "ThroughputMonitor", "peak_memory_mib"]


class ThroughputMonitor(Callback):
    """Images per second, gradient norm of the trained part, learning rate, wall times and peak memory.

    Attributes:
        seconds: Wall seconds by phase: "train_seconds", "test_seconds", "val_seconds".
        images: Training images seen, all processes together.
        epochs: Completed training epochs.
        validated_at: Optimizer steps that were done when val was last scored, or None.
        failed_in: What the trainer was doing when an exception ended it, or None.
        peak_mib: The peak memory, where it was read before something else was measured, or None.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.images = 0
        self.epochs = 0
        self.validated_at: int | None = None
        self.failed_in: RunningStage | None = None
        self.peak_mib: float | None = None
        self._started: dict[str, float] = {}
        self._epoch = (0.0, 0)  # when it began, and the images seen by then

    def state_dict(self) -> dict[str, Any]:
        """Return the counts that a resumed run continues; a checkpoint is written at the end of an epoch."""
        seconds = dict(self.seconds)
        for phase, began in self._started.items():
            seconds[phase] = seconds.get(phase, 0.0) + time.perf_counter() - began
        return {
            "seconds": seconds,
            "images": self.images,
            "epochs": self.epochs,
            "validated_at": self.validated_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Count on."""
        self.seconds, self.images = dict(state_dict["seconds"]), state_dict["images"]
        self.epochs, self.validated_at = state_dict["epochs"], state_dict["validated_at"]

    @property
    def images_per_second(self) -> float | None:
        """Training throughput over the whole run, validation left out; None before the first epoch has ended."""
        seconds = self.seconds.get("train_seconds", 0.0)
        return self.images / seconds if seconds > 0 and self.images else None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the peak of an earlier run of this process."""
        if pl_module.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(pl_module.device)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        if torch.cuda.is_available() and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        self._start("train_seconds")
        self._epoch = (time.perf_counter(), self.images)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; log the throughput since the epoch began."""
        self.images += len(batch.labels) * trainer.world_size
        began, images = self._epoch
        seconds = time.perf_counter() - began
        pl_module.log("train/images_per_second", (self.images - images) / seconds, batch_size=1)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the learning rate of this step, and the norm of the gradient of everything that trains, unclipped."""
        pl_module.log("train/learning_rate", optimizer.param_groups[0]["lr"], batch_size=1)
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norms = [torch.linalg.vector_norm(gradient.float()) for gradient in gradients]
        pl_module.log("train/grad_norm", torch.linalg.vector_norm(torch.stack(norms)), batch_size=1)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._stop("train_seconds")
        self.epochs += 1

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validation is not training time."""
        if not trainer.sanity_checking:
            self._stop("train_seconds")
            self._start("val_seconds")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock of the epoch."""
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
        """Note where it came: the trainer forgets."""
        self.failed_in = trainer.state.stage

    def _start(self, phase: str) -> None:
        self._started[phase] = time.perf_counter()

    def _stop(self, phase: str) -> None:
        if phase in self._started:
            spent = time.perf_counter() - self._started.pop(phase)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent


_measured = 0  # runs of this process whose peak was asked for


def peak_memory_mib(device: torch.device) -> float | None:
    """Return the peak memory in MiB: of the device's allocator on a GPU, of the whole process on a CPU.

    None where the operating system does not say (Windows), and for later runs of a process on a CPU: the peak of a
    process cannot be reset, so it may be that of an earlier run.
    """
    global _measured
    _measured += 1
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if _measured > 1:
        return None
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


class SteadyTensorBoardLogger(TensorBoardLogger):
    """TensorBoard's logger, except that its failures are reported once and never end a run.

    A full disk or a folder that somebody has deleted costs the curves, not the training.

    Attributes:
        failure: Why logging has stopped, or None.
    """

    failure: str | None = None

    @property
    def experiment(self) -> Any:
        """Return a `SummaryWriter` whose methods cannot fail."""
        return _Attempts(self._attempt, lambda: super(SteadyTensorBoardLogger, self).experiment)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Log numbers."""
        self._attempt(lambda: super(SteadyTensorBoardLogger, self).log_metrics(*args, **kwargs))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Log hyper-parameters."""
        self._attempt(lambda: super(SteadyTensorBoardLogger, self).log_hyperparams(*args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        """Log the graph of the model."""
        self._attempt(lambda: super(SteadyTensorBoardLogger, self).log_graph(*args, **kwargs))

    def save(self) -> None:
        """Write what is pending."""
        self._attempt(super().save)

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._attempt(lambda: super(SteadyTensorBoardLogger, self).finalize(status))

    def _attempt(self, work: Callable[[], Any]) -> Any:
        if self.failure is not None:
            return None
        try:
            return work()
        except Exception as error:  # any failure of the writer or its thread; the run matters more
            self.failure = " ".join(f"{type(error).__name__}: {error}".split())
            rank_zero_warn(f"TensorBoard's logs end here, the run continues: {self.failure}")
            return None


class _Attempts:
    """The methods of an object that is made when one is called; none of them can fail."""

    def __init__(self, attempt: Callable[[Callable[[], Any]], Any], make: Callable[[], Any]) -> None:
        self._attempt = attempt
        self._make = make

    def __getattr__(self, name: str) -> Any:
        value = self._attempt(lambda: getattr(self._make(), name))
        if value is not None and not callable(value):
            return value
        return lambda *args, **kwargs: self._attempt(lambda: value(*args, **kwargs))


class _Clock:
    """Time that a run has taken, and how long it still takes at the speed so far.

    The first step compiles kernels, which can take longer than the run: the speed is that of the steps after it.
    """

    def __init__(self) -> None:
        self._began = (time.perf_counter(), 0.0)  # when, and epochs that were done by then
        self._warm: tuple[float, float] | None = None  # the same at the end of the first step

    def start(self, trainer: Trainer) -> None:
        """Begin to count; a resumed run begins where it was."""
        self._began, self._warm = (time.perf_counter(), self._done(trainer)), None

    def step(self, trainer: Trainer) -> None:
        """Note the end of the first step."""
        if self._warm is None:
            self._warm = (time.perf_counter(), self._done(trainer))

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.perf_counter() - self._began[0]

    def left(self, trainer: Trainer) -> float | None:
        """Return the seconds until the last epoch ends; None before there is a speed."""
        done = self._done(trainer)
        since, before = self._began if self._warm is None or done <= self._warm[1] else self._warm
        seen = done - before
        return (time.perf_counter() - since) / seen * ((trainer.max_epochs or 0) - done) if seen > 0 else None

    @staticmethod
    def _done(trainer: Trainer) -> float:
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        batches = trainer.num_training_batches
        share = progress.completed / batches if 0 < batches < math.inf else 0.0
        epochs: Any = trainer.fit_loop.epoch_progress.current
        finished = int(epochs.processed)  # the current epoch counts once it is over
        return finished + (share if epochs.started > finished else 0.0)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class EpochLines(Callback):
    """Prints one line an epoch, for a run whose output is no terminal: a log file, a pipe, a worker of a sweep."""

    def __init__(self) -> None:
        self._clock = _Clock()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._clock.start(trainer)

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Note the end of the first step."""
        self._clock.step(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the epoch, counted from 1, its loss, the score on val, the time so far and the time left."""
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
        left = self._clock.left(trainer)
        parts.append(f"{_duration(self._clock.elapsed())} elapsed")
        parts.append("" if left is None else f"{_duration(left)} left")
        sys.stdout.write("  ".join(part for part in parts if part) + "\n")
        sys.stdout.flush()


class RunProgressBar(TQDMProgressBar):
    """Lightning's progress bar with epochs counted from 1 and the time left of the whole run."""

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
        """Begin the bar of an epoch. Lightning's own method would show the epoch counted from 0 for a moment."""
        self.train_progress_bar.reset(self.total_train_batches)
        self.train_progress_bar.initial = 0
        self.train_progress_bar.set_description(f"Epoch {trainer.current_epoch + 1}/{trainer.max_epochs}")

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what stands behind the bar."""
        items = super().get_metrics(trainer, pl_module)
        items.pop("v_num", None)
        left = self._clock.left(trainer) if trainer.training else None
        return items if left is None else {**items, "run_left": _duration(left)}
