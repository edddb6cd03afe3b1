"""Find the run to resume, lock it, and check its checkpoint.

A resumed run ends with the same weights, bit for bit on a CPU: batches and random numbers follow from (seed, epoch,
step), and the checkpoint contains the rest (weights, optimizer, schedule, progress, counts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from svp_bench.core.errors import CheckpointError, ConfigError, UsageError
from svp_bench.core.yaml import read_yaml
from svp_bench.data.module import VisionDataModule
from svp_bench.methods.checks import trained_parameters
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.records.record import Record
from svp_bench.records.store import read_record
from svp_bench.train.checkpoint import CHECKPOINT, UNREADABLE, Checkpoint, check_tensors, wrong_part
from svp_bench.train.module import AdaptationModule, initial_backbone
from svp_bench.train.processes import is_first_process
from svp_bench.train.provenance import changed_sources, read_sources

REMEDY = "delete it, and the run begins anew; or leave --resume out"


class FoundRun(NamedTuple):
    """A run to resume.

    Attributes:
        folder: Its folder.
        checkpoint: Its last checkpoint, or None.
        record: Its record, or None.
    """

    folder: Path
    checkpoint: Path | None
    record: Record | None

    @classmethod
    def at(cls, folder: Path, records: Path) -> FoundRun:
        """Read the run in `folder`, whose record is in the folder `records`."""
        file, checkpoint = records / f"{folder.name}.json", folder / CHECKPOINT
        record = read_record(file) if file.is_file() else None
        return cls(folder, checkpoint if checkpoint.is_file() else None, record)

    @property
    def finished(self) -> bool:
        """Whether the run is complete."""
        return self.record is not None and self.record.status == "complete"


class InitialState:
    """The initial weights and the data of a config, to compare with those of earlier runs; computed when needed.

    Args:
        config: The resolved config.
        data: The data module; the digests of its files are computed, no image is decoded.

    Attributes:
        mismatch: Why an earlier run of the same setting and seed is not resumed, or None.
    """

    def __init__(self, config: Mapping[str, Any], data: VisionDataModule) -> None:
        self._config, self._data = config, data
        self.mismatch: str | None = None

    def is_of(self, found: FoundRun, config: Mapping[str, Any]) -> bool:
        """Return whether a run of the same setting began from these weights and, if it is complete, on these data.

        Raises:
            CheckpointError: If its checkpoint is damaged, or the initial weights cannot be loaded.
        """
        record, checkpoint = found.record, str(self._config["model"]["checkpoint"])
        other = None
        if record is not None and (found.finished or found.checkpoint is None):
            theirs = record.checkpoint_digest, (record.checkpoint_load or {}).get("kept")
            ours: tuple[str | None, Any] = None, None  # random weights
            if checkpoint != "none":
                backbone, head = self._weights
                ours = backbone, [f"head {head}"] if head else None
            if theirs != ours:
                other = "weights"
            elif found.finished and self._data_facts != (
                *(record.data_digest, record.task_version, record.protocol, record.protocol_version),
            ):
                other = "data or cards"
        elif found.checkpoint is not None:
            about = read_resumed(found.checkpoint).metadata
            other = None if (about.backbone_digest, about.head_digest) == self._weights else "weights"
        elif config.get("model", {}).get("checkpoint") != checkpoint:  # it has no checkpoint yet
            other = "weights"
        if other:
            self.mismatch = self.mismatch or f"{found.folder.name} began from other {other}"
        return other is None

    @cached_property
    def _weights(self) -> tuple[str, str | None]:
        """Digest of the backbone, and of the head if it comes from the checkpoint."""
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
    def _data_facts(self) -> tuple[Any, ...]:
        """Digest of the splits, and versions of the cards."""
        data = self._data
        return data.inspect()[1].digest, data.card.version, data.protocol.name, data.protocol.version


def find_run(
    folder: Path,
    records: Path,
    seed: int,
    same_setting: Callable[[Mapping[str, Any]], bool],
    sources: Mapping[str, str] | None = None,
    same_start: Callable[[FoundRun, Mapping[str, Any]], bool] = lambda found, config: True,
) -> FoundRun | None:
    """Return the newest unfinished run of a setting and seed, else the newest finished one, else None.

    A run whose record is in another results folder is skipped.

    Args:
        folder: Folder of the task's runs, `runs/<suite>/<task>`.
        records: Folder of its records.
        seed: The run's seed.
        same_setting: Returns whether a saved config has the same setting.
        sources: The `ResolvedConfig.sources` that the run must have; None for any.
        same_start: Returns whether a run, given with its saved config, began from the same weights and data.
    """
    finished: FoundRun | None = None
    for path in sorted(folder.glob(f"*-seed{seed}-*"), key=_started, reverse=True):
        config = _config_of(path)
        if config is None or config.get("seed_everything") != seed or not same_setting(config):
            continue
        if sources is not None and read_sources(path) != sources:
            continue
        found = FoundRun.at(path, records)
        if (found.record is None and _recorded_elsewhere(path, config, records)) or not same_start(found, config):
            continue
        if not found.finished:
            return found
        finished = finished or found
    return finished


def _recorded_elsewhere(folder: Path, config: Mapping[str, Any], records: Path) -> bool:
    """Return whether a run's config names another results folder, and its record is there."""
    root, task = config.get("results_root"), f"{folder.parent.parent.name}/{folder.parent.name}"
    place = Path(str(root)) / "records" / task
    return root is not None and place.resolve() != records.resolve() and (place / f"{folder.name}.json").is_file()


def _started(folder: Path) -> tuple[str, int]:
    """Return the time stamp in a run's name and, for runs of the same second, the time of its config."""
    config = folder / "config.yaml"
    return folder.name.split("-")[1], config.stat().st_mtime_ns if config.is_file() else 0


def _config_of(folder: Path) -> dict[str, Any] | None:
    try:
        config = read_yaml(folder / "config.yaml", error=ConfigError).value
    except ConfigError:
        return None  # killed before it was written
    return config if isinstance(config, dict) else None


class AlreadyLockedError(Exception):
    """Raised if another process holds a lock; it does the work."""


@contextmanager
def lock_file(lock: Path) -> Iterator[None]:
    """Lock a file; the lock ends with the process.

    Raises:
        AlreadyLockedError: If another process has locked it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by forked data workers, as flock is
        except BlockingIOError:
            raise AlreadyLockedError from None
        except OSError:  # a file system without locks
            pass
        yield


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a run's folder, so that no two processes train the same run.

    Raises:
        UsageError: If another process has locked it.
    """
    try:
        with lock_file(folder / "lock"):
            yield
    except AlreadyLockedError:
        raise UsageError(f"another process is training the run {folder.name} right now") from None


def lock_setting(exit_stack: ExitStack, lock: Path) -> None:
    """Lock a setting and seed until `exit_stack` closes: only one of two commands with `--resume` begins the run.

    The first process of a run holds the lock for all of its processes.

    Raises:
        UsageError: If another process has locked it.
    """
    if not is_first_process():
        return
    try:
        exit_stack.enter_context(lock_file(lock))
    except AlreadyLockedError:
        raise UsageError(
            "--resume: another process is running this setting and seed right now; once it has ended, the same command "
            "continues from there"
        ) from None


def lock_run(
    exit_stack: ExitStack,
    records: Path,
    find: Callable[[Mapping[str, str] | None], FoundRun | None],
    sources: Mapping[str, str],
) -> FoundRun | None:
    """Find the run to resume, and lock it until `exit_stack` closes.

    The first process of a run holds the lock for all of its processes.

    Args:
        exit_stack: Releases the lock when it closes.
        records: Folder of the task's records.
        find: `find_run` with all arguments but `sources`.
        sources: The `ResolvedConfig.sources` that the run must have.

    Raises:
        UsageError: If another process is training the run, or its method had other source files.
    """
    found = find(sources)
    if found is None:
        other = find(None)
        if other is not None and not other.finished:
            raise UsageError(
                f"--resume: the run {other.folder.name} began with another source of its method "
                f"({changed_sources(read_sources(other.folder), sources)}); a changed method is not resumed: restore "
                "the files, or begin a new run without --resume"
            )
    if found is None or found.finished or not is_first_process():
        return found
    exit_stack.enter_context(locked(found.folder))
    return FoundRun.at(found.folder, records)  # another process may have finished it meanwhile


@contextmanager
def _remedy() -> Iterator[None]:
    """Replace the remedy of errors about a damaged file by that for a run."""
    try:
        yield
    except CheckpointError as error:
        text = str(error)
        what = text.removesuffix(UNREADABLE) if text.endswith(UNREADABLE) else text.rpartition("; ")[0] or text
        raise CheckpointError(f"{what}; {REMEDY}") from None


@_remedy()
def read_resumed(checkpoint: Path) -> Checkpoint:
    """Read the checkpoint of a run to resume; raise CheckpointError if it is damaged."""
    return Checkpoint.read(checkpoint)


@_remedy()
def check_resumable(
    saved: Checkpoint, trainer: Trainer, model: AdaptationModule, callbacks: Sequence[Callback]
) -> None:
    """Check that a checkpoint has the complete state of the training.

    Args:
        saved: The checkpoint.
        trainer: The new trainer.
        model: The Lightning module.
        callbacks: Callbacks whose state must be in it.

    Raises:
        CheckpointError: If a part is missing or of another type; names it.
    """

    def need(part: str, value: Any, fits: bool, expected: str) -> Any:
        if not fits:
            raise wrong_part(str(saved.path), part, value, expected)
        return value

    def only_mapping(part: str) -> dict[str, Any]:
        value = saved.content.get(part)
        (entry,) = need(part, value, isinstance(value, list) and len(value) == 1, "a list of 1")
        mapping: dict[str, Any] = need(f"{part}[0]", entry, isinstance(entry, dict), "a mapping")
        return mapping

    optimizer, schedule = only_mapping("optimizer_states"), only_mapping("lr_schedulers")
    need("lr_schedulers.last_epoch", last := schedule.get("last_epoch"), isinstance(last, int), "a whole number")
    parameters = [*trained_parameters(model.model).values()]
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    all_there = _numbers(groups) == list(range(len(parameters)))
    need("optimizer_states.param_groups", groups, all_there, f"all {len(parameters)} trained parameters")
    moments = need("optimizer_states.state", state, isinstance(state, dict), "a mapping")
    if saved.global_step and model.optimizer_config.name == "adamw":
        shapes = sorted(_shape_of_moments(moments[n]) for n in range(len(parameters)) if n in moments)
        method, epochs = model.method, trainer.max_epochs or 1
        stages = [method.stage(epoch, epochs) for epoch in (max(0, saved.epoch - 1), saved.epoch)]
        trained = trained_parameters(model.model).items()
        of_stage = sorted(tuple(p.shape) for name, p in trained if method.trains_in_stage(name, stages[1]))
        fits = shapes == of_stage or (stages[0] != stages[1] and not moments)  # a stage begins without moments
        need("optimizer_states.state", moments, fits, "the moments of each trained parameter")
    for number, parts in moments.items():
        values = parts.items() if isinstance(parts, dict) else ()
        tensors = {f"{number}.{key}": value for key, value in values if isinstance(value, Tensor)}
        check_tensors(tensors, str(saved.path), "optimizer_states.state")
    for part, key, fresh in (
        ("loops", "fit_loop", trainer.fit_loop.state_dict()),
        *(("callbacks", callback.state_key, callback.state_dict()) for callback in callbacks),
    ):
        states = need(part, value := saved.content.get(part), isinstance(value, dict), "a mapping")
        if different := _difference(f"{part}.{key}", states.get(key), fresh):
            raise wrong_part(str(saved.path), *different)


def _numbers(groups: Any) -> list[Any]:
    """Return the numbers of the parameters in an optimizer's groups."""
    lists = [group.get("params") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return [number for numbers in lists if isinstance(numbers, list) for number in numbers]


def _shape_of_moments(state: Any) -> tuple[int, ...]:
    """Return the shape of Adam's moments of a parameter; (-1,) if one is missing."""
    parts = [state.get(key) for key in ("exp_avg", "exp_avg_sq")] if isinstance(state, dict) and "step" in state else []
    shapes = {tuple(part.shape) for part in parts if isinstance(part, Tensor)}
    return shapes.pop() if len(parts) == 2 and len(shapes) == 1 else (-1,)


def _difference(part: str, given: Any, fresh: Any) -> tuple[str, Any, str] | None:
    """Return (part, its value, its expected type) where a state first differs in type from a new one, or None.

    Further keys are allowed, and any value where the new state has None.
    """
    if isinstance(fresh, Mapping):
        if not isinstance(given, Mapping):
            return part, given, "a mapping"
        for key, value in fresh.items():
            if different := _difference(f"{part}.{key}", given.get(key), value):
                return different
    elif fresh is not None and type(given) is not type(fresh):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return part, given, kinds.get(type(fresh), "a value")
    return None
