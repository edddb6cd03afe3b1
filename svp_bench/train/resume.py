"""Going on after an interruption: safe checkpoints, the run to go on with, and signals that ask to stop.

A run that goes on ends at the same weights, to the bit on a CPU: batches and every random draw of a training step
follow from (seed, epoch, step), and the checkpoint holds the rest (weights, optimizer, schedule, progress, meters).
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO

from svp_bench.data.samplers import GlobalBatchSampler
from svp_bench.errors import SvpBenchError, UsageError
from svp_bench.models.checkpoints import load_pickle_safely
from svp_bench.results.files import read_record
from svp_bench.results.record import Record

__all__ = ["AtomicCheckpointIO", "Found", "Preempted", "StepSeeds", "Stopper", "find_run", "locked"]

CHECKPOINT = Path("checkpoints") / "last.ckpt"
_LOCK = "lock"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, then renames it: whenever the process dies, the file is the old one or the new one.

    (Lightning's own writes into the system's folder for temporary files and moves the file; between two file systems
    that is a copy, which can be cut short.)
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SvpBenchError: If the folder cannot be written or the disk is full; the old file is still there.
        """
        path = Path(path)
        aside = path.with_name(f".{path.name}.{os.getpid()}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            for left in path.parent.glob(f".{path.name}.*.part"):  # of a process that was killed
                left.unlink(missing_ok=True)
            with aside.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except (OSError, RuntimeError) as error:  # torch makes a full disk a RuntimeError
            aside.unlink(missing_ok=True)
            reason = str(error).strip().splitlines()[0]
            raise SvpBenchError(
                f"cannot write the checkpoint {path} ({reason}); an older one, if there is one, is untouched: "
                "make room, then go on with --resume"
            ) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Read a checkpoint with the restricted unpickler, onto the CPU."""
        content: dict[str, Any] = load_pickle_safely(Path(path))
        return content


class Found(NamedTuple):
    """A run to go on with.

    Attributes:
        folder: Its folder.
        checkpoint: Its last checkpoint, or None if it was stopped before the first.
        record: What it has recorded so far, or None.
    """

    folder: Path
    checkpoint: Path | None
    record: Record | None

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.record is not None and self.record.status == "complete"


def find_run(folder: Path, records: Path, seed: int, same_setting: Callable[[Mapping[str, Any]], bool]) -> Found | None:
    """Return the newest unfinished run of a setting and seed, else the newest finished one, else None.

    Args:
        folder: Where the runs of the task are, `runs/<suite>/<task>`.
        records: Where its records are.
        seed: The run's seed.
        same_setting: Whether a saved config is of the same setting.
    """
    finished: Found | None = None
    for path in sorted(folder.glob(f"*-seed{seed}-*"), key=_started, reverse=True):
        config = _config_of(path)
        if config is None or config.get("seed_everything") != seed or not same_setting(config):
            continue
        place = records / f"{path.name}.json"
        checkpoint = path / CHECKPOINT
        found = Found(
            path, checkpoint if checkpoint.is_file() else None, read_record(place) if place.is_file() else None
        )
        if not found.finished:
            return found
        finished = finished or found
    return finished


def _started(folder: Path) -> str:
    """The time stamp in a run's name."""
    return folder.name.partition("-")[2]


def _config_of(folder: Path) -> dict[str, Any] | None:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None  # killed before it was written
    return config if isinstance(config, dict) else None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder: no two processes train the same run. The lock ends with the process, however it ends.

    Raises:
        UsageError: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing like it that ends with the process
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked data workers do not inherit it
        except BlockingIOError:
            raise UsageError(f"another process is training the run {folder.name} right now") from None
        except OSError:  # a file system without locks
            pass
        yield


class Preempted(Exception):  # not an error: the run goes on later
    """Raised where a run stops because a signal asked for it; everything is saved."""


class Stopper(Callback):
    """Saves and stops at the next optimizer step once SIGTERM or SIGUSR1 (preemption) has come.

    Args:
        checkpoint: Where to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self.asked: signal.Signals | None = None
        self._training = False
        self._skip = 0  # batches of the current epoch that are done, in a checkpoint within an epoch
        self._saving_at = 0
        self._accumulate = self._accumulated = 1  # batches for an optimizer step: of this run, of its checkpoint
        self._old: dict[int, Any] = {}

    def state_dict(self) -> dict[str, Any]:
        """How many batches of its epoch a checkpoint has behind it (0 at the end of one), and how many make a step."""
        return {"batches": self._saving_at, "accumulate": self._accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on within the epoch."""
        self._skip, self._accumulated = int(state_dict["batches"]), int(state_dict.get("accumulate", 1))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take SIGTERM and SIGUSR1 while a run lasts."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._old = {number: signal.getsignal(number) for number in self._signals()}
        self._listen()
        try:
            yield
        finally:
            for number, handler in self._old.items():
                signal.signal(number, handler)

    @staticmethod
    def _signals() -> list[signal.Signals]:
        return [signal.SIGTERM, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]

    def _listen(self) -> None:
        if self._old:
            for number in self._signals():
                signal.signal(number, self._ask)

    def _ask(self, number: int, _: Any) -> None:
        self.asked = signal.Signals(number)
        if not self._training:  # nothing is half done
            raise Preempted

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal waits for the end of a step; a run that goes on within an epoch skips what is done."""
        self._accumulate = trainer.accumulate_grad_batches
        if self._skip and self._accumulated != self._accumulate:
            raise UsageError(
                f"the checkpoint lies within an epoch and counts {self._accumulated} batches for a step: go on with "
                f"--trainer.accumulate_grad_batches {self._accumulated}, not {self._accumulate}"
            )
        self._training = True
        self._listen()  # Lightning has taken the signals meanwhile, with its own idea of them
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if self._skip and isinstance(sampler, GlobalBatchSampler):
            sampler.skip(self._skip)
        self._skip = 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Between two optimizer steps: save and stop if asked to."""
        if batch_idx % trainer.accumulate_grad_batches == 0 and self._agreed(trainer, pl_module):
            self._saving_at = batch_idx
            trainer.save_checkpoint(self.checkpoint)
            raise Preempted

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last checkpoint is written; what follows can be done again."""
        self._training = False
        if self._agreed(trainer, pl_module):
            raise Preempted

    def _agreed(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether any process was asked to stop: all stop at the same step."""
        if trainer.world_size == 1:
            return self.asked is not None
        flag = torch.tensor(float(self.asked is not None), device=pl_module.device)
        return bool(trainer.strategy.reduce(flag, reduce_op="sum") > 0)


class StepSeeds(Callback):
    """Seeds PyTorch before each training step from (seed, epoch, batch, process): dropout and drop path can be made
    again without the steps before."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed the CPU's and the device's generator."""
        entropy = [self.seed, trainer.current_epoch, batch_idx, trainer.global_rank]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1)))
