"""Going on after an interruption: safe checkpoints, the run to go on with, and signals that ask to stop.

A run that goes on ends at the same weights, to the bit on a CPU: batches and every random draw of a training step
follow from (seed, epoch, step), and the checkpoint holds the rest (weights, optimizer, schedule, progress, meters).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities import rank_zero_only

from svp_bench.core.atomic import replacing
from svp_bench.core.errors import ConfigError, SvpBenchError, UsageError, plural
from svp_bench.core.interrupts import INTERRUPTS, Preempted
from svp_bench.core.yaml import read_yaml
from svp_bench.data.module import VisionDataModule
from svp_bench.data.samplers import GlobalBatchSampler
from svp_bench.data.sources import inspect, open_source
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.models.weight_files import load_pickle_safely
from svp_bench.records.record import Record
from svp_bench.records.store import read_record, write_atomically
from svp_bench.train.checkpoint import Saved
from svp_bench.train.module import initial_backbone
from svp_bench.train.resumable import REMEDY

__all__ = [
    "AtomicCheckpointIO",
    "Claimed",
    "Found",
    "Preempted",
    "Start",
    "StepSeeds",
    "Stopper",
    "agreed_name",
    "changed_sources",
    "claim_run",
    "claim_setting",
    "find_run",
    "held",
    "is_first_process",
    "is_of_a_lost_process",
    "locked",
    "read_sources",
    "save_sources",
]

CHECKPOINT = Path("checkpoints") / "last.ckpt"
_LOCK = "lock"
_SOURCES = "method_source.json"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint aside, then renames it: whenever the process dies, the file is the old one or the new one.

    (Lightning's own writes into the system's folder for temporary files and moves the file; between two file systems
    that is a copy, which can be cut short.)

    Attributes:
        known: A checkpoint that was read already; it is not read again, and let go once Lightning has it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.known: Saved | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a checkpoint.

        Raises:
            SvpBenchError: If the folder cannot be written or the disk is full; the old file is still there.
        """
        path = Path(path)
        try:
            for left in path.parent.glob(f".{path.name}.*"):  # of a process that was killed
                left.unlink(missing_ok=True)
            with replacing(path) as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:  # torch makes a full disk a RuntimeError
            reason = str(error).strip().splitlines()[0]
            raise SvpBenchError(
                f"cannot write the checkpoint {path} ({reason}); an older one, if there is one, is untouched: "
                "make room, then go on with --resume"
            ) from None

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        """Return a checkpoint, read with the restricted unpickler, onto the CPU."""
        known, self.known = self.known, None
        content: dict[str, Any] = (
            known.content if known is not None and known.path == Path(path) else load_pickle_safely(Path(path))
        )
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

    @classmethod
    def at(cls, folder: Path, records: Path) -> Found:
        """Look at a run's folder and at its record, which is in the folder `records`."""
        place, checkpoint = records / f"{folder.name}.json", folder / CHECKPOINT
        return cls(
            folder,
            checkpoint if checkpoint.is_file() else None,
            read_record(place) if place.is_file() else None,
        )

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to do."""
        return self.record is not None and self.record.status == "complete"


class Start:
    """The weights and data that a run would begin with now; computed when a run is there to compare them with.

    Args:
        config: The resolved config.
        data: The data module; its files are read, its images are not.

    Attributes:
        passed_over: Why a run of the same setting and seed is not resumed, or None.
    """

    def __init__(self, config: Mapping[str, Any], data: VisionDataModule) -> None:
        self._config, self._data = config, data
        self._saved: tuple[tuple[Path, int, int], Saved] | None = None
        self.passed_over: str | None = None

    def is_of(self, found: Found, config: Mapping[str, Any]) -> bool:
        """Whether a run of the same setting began from these weights and, if it is complete, on these data.

        Raises:
            CheckpointError: If its checkpoint is damaged, or the weights of now cannot be had.
        """
        record, checkpoint = found.record, str(self._config["model"]["checkpoint"])
        other = None
        if record is not None and (found.finished or found.checkpoint is None):
            theirs = record.checkpoint_digest, (record.checkpoint_load or {}).get("kept")
            ours: tuple[str | None, Any] = None, None  # of random weights
            if checkpoint != "none":
                backbone, head = self._weights
                ours = backbone, [f"head {head}"] if head else None
            if theirs != ours:
                other = "weights"
            elif found.finished and self._meaning_of(record) != self._meaning:
                other = "data or cards"
        elif found.checkpoint is not None:
            about = self.saved(found.checkpoint).about
            other = None if (about.backbone_digest, about.head_digest) == self._weights else "weights"
        elif config.get("model", {}).get("checkpoint") != checkpoint:  # stopped before it had anything to save
            other = "weights"
        if other:
            self.passed_over = self.passed_over or f"{found.folder.name} began from other {other}"
        return other is None

    def saved(self, checkpoint: Path) -> Saved:
        """Read a checkpoint, once as long as it does not change."""
        status = checkpoint.stat()
        version = checkpoint, status.st_mtime_ns, status.st_size
        if self._saved is None or self._saved[0] != version:
            self._saved = version, Saved.read(checkpoint, REMEDY)
        return self._saved[1]

    @cached_property
    def _weights(self) -> tuple[str, str | None]:
        """Digests of the backbone and, if it is the checkpoint's, of the head."""
        model, data = self._config["model"], self._data
        with torch.random.fork_rng(devices=[]):
            backbone = initial_backbone(
                str(model["backbone"]),
                str(model["checkpoint"]),
                model.get("head"),
                data.seed,
                num_classes=data.num_classes,
                img_size=data.image_size,
            )
        return backbone_digest(backbone), backbone.load_report.head_digest if backbone.load_report else None

    @cached_property
    def _meaning(self) -> tuple[Any, ...]:
        """Return what a complete run's record must say for its number to be the one that is asked for."""
        data = self._data
        root = self._config["data"].get("root")
        source = open_source(data.card, Path(root) if root else None, suite=data.suite, protocol=data.protocol)
        digest = inspect(data.card, source, list(data.splits_read)).digest
        return digest, data.card.version, data.protocol.name, data.protocol.version

    @staticmethod
    def _meaning_of(record: Record) -> tuple[Any, ...]:
        return record.data_digest, record.task_version, record.protocol, record.protocol_version


def find_run(
    folder: Path,
    records: Path,
    seed: int,
    same_setting: Callable[[Mapping[str, Any]], bool],
    sources: Mapping[str, str] | None = None,
    same_start: Callable[[Found, Mapping[str, Any]], bool] = lambda found, config: True,
) -> Found | None:
    """Return the newest unfinished run of a setting and seed, else the newest finished one, else None.

    A run that another results folder has a record of is left alone: its name is taken.

    Args:
        folder: Where the runs of the task are, `runs/<suite>/<task>`.
        records: Where its records are.
        seed: The run's seed.
        same_setting: Whether a saved config is of the same setting.
        sources: `Resolved.sources`, which a run must have begun with; None for any.
        same_start: Whether a run of the same setting, with its saved config, began from the same weights and data.
    """
    finished: Found | None = None
    for path in sorted(folder.glob(f"*-seed{seed}-*"), key=_started, reverse=True):
        config = _config_of(path)
        if config is None or config.get("seed_everything") != seed or not same_setting(config):
            continue
        if sources is not None and read_sources(path) != sources:
            continue
        found = Found.at(path, records)
        if (found.record is None and _recorded_elsewhere(path, config, records)) or not same_start(found, config):
            continue
        if not found.finished:
            return found
        finished = finished or found
    return finished


def save_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Write down the digests of a method's own files in the folder of a run; nothing for a shipped method.

    Raises:
        RecordError: If the folder cannot be written.
    """
    if sources:
        write_atomically(folder / _SOURCES, json.dumps(dict(sources), indent=2) + "\n")


def read_sources(folder: Path) -> dict[str, str]:
    """Return what `save_sources` wrote; empty if it wrote nothing."""
    try:
        sources = json.loads((folder / _SOURCES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sources if isinstance(sources, dict) else {}


def changed_sources(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return which files differ, "scale.py, helper.py"; "" if none does."""
    return ", ".join(name for name in sorted({*old, *new}) if old.get(name) != new.get(name))


def _recorded_elsewhere(folder: Path, config: Mapping[str, Any], records: Path) -> bool:
    """Whether the results folder that a run's config names is another one, and has its record."""
    root, task = config.get("results_root"), f"{folder.parent.parent.name}/{folder.parent.name}"
    place = Path(str(root)) / "records" / task
    return root is not None and place.resolve() != records.resolve() and (place / f"{folder.name}.json").is_file()


def _started(folder: Path) -> tuple[str, int]:
    """Return the time stamp in a run's name, in seconds, and when its config was written, which tells two apart."""
    config = folder / "config.yaml"
    return folder.name.split("-")[1], config.stat().st_mtime_ns if config.is_file() else 0


def _config_of(folder: Path) -> dict[str, Any] | None:
    try:
        config = read_yaml(folder / "config.yaml", error=ConfigError).value
    except ConfigError:
        return None  # killed before it was written
    return config if isinstance(config, dict) else None


class Claimed(Exception):  # not an error: somebody else is doing it
    """Raised where another process holds what was to be held."""


@contextmanager
def held(lock: Path) -> Iterator[None]:
    """Hold a lock file. The lock ends with the process, however it ends.

    Raises:
        Claimed: If another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows: nothing like it that ends with the process
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked data workers do not inherit it
        except BlockingIOError:
            raise Claimed from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a run's folder: no two processes train the same run.

    Raises:
        UsageError: If another process holds it.
    """
    try:
        with held(folder / _LOCK):
            yield
    except Claimed:
        raise UsageError(f"another process is training the run {folder.name} right now") from None


def claim_setting(holding: ExitStack, lock: Path) -> None:
    """Hold a setting and seed as long as `holding` lasts: two `--resume` that find no run must not begin two.

    As in `claim_run`, the first process holds it for all processes of a run.

    Args:
        holding: Releases the lock.
        lock: The lock file of the task, setting and seed.

    Raises:
        UsageError: If another process holds it.
    """
    if not is_first_process():
        return
    try:
        holding.enter_context(held(lock))
    except Claimed:
        raise UsageError(
            "--resume: another process is running this setting and seed right now; once it has ended, the same command "
            "continues from there"
        ) from None


def claim_run(
    holding: ExitStack,
    folder: Path,
    records: Path,
    seed: int,
    same_setting: Callable[[Mapping[str, Any]], bool],
    sources: Mapping[str, str] | None = None,
    same_start: Callable[[Found, Mapping[str, Any]], bool] = lambda found, config: True,
) -> Found | None:
    """Find the run to go on with, as `find_run`, and hold it as long as `holding` lasts.

    It is looked at again once it is held: another process may have finished it just before. Of the processes of a
    cluster's launcher (srun), which share no more than the file system, the first holds it for all.

    Raises:
        UsageError: If another process is training it, or the only one began with another source of its method.
    """
    found = find_run(folder, records, seed, same_setting, sources, same_start)
    if found is None and sources is not None:
        other = find_run(folder, records, seed, same_setting, None, same_start)
        if other is not None and not other.finished:
            raise UsageError(
                f"--resume: the run {other.folder.name} began with another source of its method "
                f"({changed_sources(read_sources(other.folder), sources)}); a changed method does not go on: restore "
                "the files, or begin a new run without --resume"
            )
    if found is None or found.finished or not is_first_process():
        return found
    holding.enter_context(locked(found.folder))
    return Found.at(found.folder, records)


# --- the processes of one run ----------------------------------------------------------------------------------------

_RUN_ID = "SVP_BENCH_RUN_ID"  # by which the first process tells those that Lightning launches
_PATIENCE = timedelta(minutes=10)  # for the first process, which looks at the runs that are there


def agreed_name(holding: ExitStack, decide: Callable[[], str], resume: bool) -> str:
    """Return the name of a run, which its first process decides, in every one of its processes.

    Lightning launches the others from the first, whose environment they inherit. torchrun launches all alike: they ask
    the store that it provides for them to meet.

    Args:
        holding: As long as it lasts, processes that are launched inherit the name.
        decide: Called by the first process.
        resume: Whether the name may be that of an earlier run.

    Raises:
        UsageError: If the first process has failed, or someone else has launched these, who would not find each other.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        return _agreed_by_store(holding, decide)
    if "LOCAL_RANK" in os.environ:
        inherited = os.environ.get(_RUN_ID)
        if inherited is None and resume:
            raise UsageError(
                "--resume: LOCAL_RANK is set, but neither Lightning nor torchrun has launched this process, and the "
                "others would not know which run it goes on with; use torchrun"
            )
        return inherited or decide()
    name = decide()
    os.environ[_RUN_ID] = name
    holding.callback(os.environ.pop, _RUN_ID, None)
    return name


def _agreed_by_store(holding: ExitStack, decide: Callable[[], str]) -> str:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]  # public all the same
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=_PATIENCE))
    holding.callback(lambda: store)  # where the first process is the store itself, it must stay until training meets
    shared = PrefixStore("svp-bench", store)
    if rank > 0:
        name = str(shared.get("run").decode())
        shared.set(f"heard-{rank}", "")
        if not name:
            raise UsageError("the first process of this run has stopped; it says why")
        return name
    try:
        name = decide()
    except BaseException:
        _tell(shared, "", size)
        raise
    _tell(shared, name, size)
    return name


def _tell(store: Any, name: str, size: int) -> None:
    """Tell the other processes, and wait until they have heard: the first may be the store, and go with it."""
    store.set("run", name)
    with suppress(RuntimeError):  # one that never came is missed later, when they meet
        store.wait([f"heard-{rank}" for rank in range(1, size)], timedelta(minutes=1))


def is_first_process() -> bool:
    """Whether this is the first of a run's processes, as far as the environment tells before they have met."""
    node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
    rank: int = getattr(rank_zero_only, "rank", 0)  # Lightning sets it there
    return rank == 0 and node == "0"


_LOST = re.compile(r"gloo|NCCL|Connection (closed|reset) by peer|Broken pipe")


def is_of_a_lost_process(error: Exception) -> bool:
    """Whether an error is how the others learn that one of the processes of a run was killed."""
    return isinstance(error, RuntimeError) and _LOST.search(str(error)) is not None


# --- stopping --------------------------------------------------------------------------------------------------------


class Stopper(Callback):
    """Saves and stops at the next optimizer step once SIGTERM or SIGUSR1 (preemption) has come (`INTERRUPTS`).

    Args:
        checkpoint: Where to save.
    """

    def __init__(self, checkpoint: Path) -> None:
        self.checkpoint = checkpoint
        self._skip = 0  # batches of the current epoch that are done, in a checkpoint within an epoch
        self._saving_at = 0
        self._accumulate = self._accumulated = 1  # batches for an optimizer step: of this run, of its checkpoint

    def state_dict(self) -> dict[str, Any]:
        """How many batches of its epoch a checkpoint has behind it (0 at the end of one), and how many make a step."""
        return {"batches": self._saving_at, "accumulate": self._accumulate}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on within the epoch."""
        self._skip, self._accumulated = int(state_dict["batches"]), int(state_dict["accumulate"])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on a signal waits for the end of a step; a run that goes on within an epoch skips what is done."""
        self._accumulate = trainer.accumulate_grad_batches
        if self._skip and self._accumulated != self._accumulate:
            raise UsageError(
                f"the checkpoint lies within an epoch and counts {plural(self._accumulated, 'batch')} for a "
                "step: go on with "
                f"--trainer.accumulate_grad_batches {self._accumulated}, not {self._accumulate}"
            )
        INTERRUPTS.waits = True
        INTERRUPTS.take_again()  # Lightning has taken the signals meanwhile, with its own idea of them
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
        INTERRUPTS.waits = False
        if self._agreed(trainer, pl_module):
            raise Preempted

    def _agreed(self, trainer: Trainer, pl_module: LightningModule) -> bool:
        """Whether any process was asked to stop: all stop at the same step."""
        asked = INTERRUPTS.asked is not None
        if trainer.world_size == 1:
            return asked
        flag = torch.tensor(float(asked), device=pl_module.device)
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
