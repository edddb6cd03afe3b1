"""Find the run to resume, lock it, and check that its checkpoint holds everything that training continues with.

A resumed run ends at the same weights, bit for bit on a CPU: batches and every random number of a training step follow
from (seed, epoch, step), and the checkpoint holds the rest (weights, optimizer, schedule, progress, monitors).
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

from svp_bench.core.errors import ConfigError, UsageError
from svp_bench.core.yaml import read_yaml
from svp_bench.data.module import VisionDataModule
from svp_bench.data.sources import inspect, open_source
from svp_bench.methods.build import trained_parameters
from svp_bench.models.checkpoints import backbone_digest
from svp_bench.records.record import Record
from svp_bench.records.store import read_record
from svp_bench.train.checkpoint import CHECKPOINT, Checkpoint, check_tensors, wrong_part
from svp_bench.train.module import AdaptationModule, initial_backbone
from svp_bench.train.processes import is_first_process
from svp_bench.train.provenance import changed_sources, read_sources

__all__ = ["Claimed", "Found", "Start", "check_resumable", "claim_run", "claim_setting", "find_run", "held", "locked"]

REMEDY = "delete it, and the run begins anew; or leave --resume out"
_LOCK = "lock"


class Found(NamedTuple):
    """A run to resume.

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
        """Return whether there is nothing left to do."""
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
        self._saved: tuple[tuple[Path, int, int], Checkpoint] | None = None
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
            about = self.saved(found.checkpoint).metadata
            other = None if (about.backbone_digest, about.head_digest) == self._weights else "weights"
        elif config.get("model", {}).get("checkpoint") != checkpoint:  # stopped before it had anything to save
            other = "weights"
        if other:
            self.passed_over = self.passed_over or f"{found.folder.name} began from other {other}"
        return other is None

    def saved(self, checkpoint: Path) -> Checkpoint:
        """Read a checkpoint, once as long as it does not change."""
        status = checkpoint.stat()
        version = checkpoint, status.st_mtime_ns, status.st_size
        if self._saved is None or self._saved[0] != version:
            self._saved = version, Checkpoint.read(checkpoint, REMEDY)
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


class Claimed(Exception):  # not an error: another process does the work
    """Raised if another process holds a lock."""


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
    """Lock a setting and seed as long as `holding` lasts: two `--resume` that find no run must not begin two.

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
    """Find the run to resume, as `find_run`, and lock it as long as `holding` lasts.

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
                f"({changed_sources(read_sources(other.folder), sources)}); a changed method is not resumed: restore "
                "the files, or begin a new run without --resume"
            )
    if found is None or found.finished or not is_first_process():
        return found
    holding.enter_context(locked(found.folder))
    return Found.at(found.folder, records)


# --- the content of a checkpoint ---------------------------------------------------------------------------------


def check_resumable(
    saved: Checkpoint, trainer: Trainer, model: AdaptationModule, callbacks: Sequence[Callback]
) -> None:
    """Check that a checkpoint holds everything that training continues with.

    Args:
        saved: The checkpoint.
        trainer: The trainer that will continue.
        model: What is trained.
        callbacks: Those that must find their state in it.

    Raises:
        CheckpointError: If a part is missing or of another form; names it.
    """

    def need(part: str, value: Any, fits: bool, expected: str) -> Any:
        if not fits:
            raise wrong_part(str(saved.path), part, value, expected, REMEDY)
        return value

    def need_form(part: str, given: Any, fresh: Any) -> None:
        odd = _difference(part, given, fresh)
        if odd:
            raise wrong_part(str(saved.path), *odd, REMEDY)

    def need_mappings(part: str, count: int | None = None) -> list[dict[str, Any]]:
        value, expected = saved.content.get(part), f"a list of {count}" if count else "a list"
        right = isinstance(value, list) and len(value) == (count or len(value)) > 0
        parts: list[dict[str, Any]] = need(part, value, right, expected)
        return [need(f"{part}[{i}]", entry, isinstance(entry, dict), "a mapping") for i, entry in enumerate(parts)]

    (optimizer,) = need_mappings("optimizer_states", 1)
    (schedule,) = need_mappings("lr_schedulers", 1)
    need("lr_schedulers.last_epoch", last := schedule.get("last_epoch"), isinstance(last, int), "a whole number")
    parameters = [*trained_parameters(model.model).values()]
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    all_there = _numbers(groups) == list(range(len(parameters)))
    need("optimizer_states.param_groups", groups, all_there, f"all {len(parameters)} trained parameters")
    moments = need("optimizer_states.state", state, isinstance(state, dict), "a mapping")
    if saved.global_step and model.optimizer_config.name == "adamw":
        shapes = sorted(_shape_of_moments(moments.get(number)) for number in range(len(parameters)))
        fits = shapes == sorted(tuple(parameter.shape) for parameter in parameters)
        need("optimizer_states.state", moments, fits, "the moments of each trained parameter")
    for number, parts in moments.items():
        values = parts.items() if isinstance(parts, dict) else ()
        tensors = {f"{number}.{key}": value for key, value in values if isinstance(value, Tensor)}
        check_tensors(tensors, str(saved.path), "optimizer_states.state", REMEDY)
    for part, key, fresh in (
        ("loops", "fit_loop", trainer.fit_loop.state_dict()),
        *(("callbacks", callback.state_key, callback.state_dict()) for callback in callbacks),
    ):
        states = need(part, value := saved.content.get(part), isinstance(value, dict), "a mapping")
        need_form(f"{part}.{key}", states.get(key), fresh)


def _numbers(groups: Any) -> list[Any]:
    """Return the numbers of the parameters in an optimizer's groups, as far as they are such."""
    lists = [group.get("params") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return [number for numbers in lists if isinstance(numbers, list) for number in numbers]


def _shape_of_moments(state: Any) -> tuple[int, ...]:
    """Return the shape of Adam's moments of a parameter; (-1,) if they are not all there."""
    parts = [state.get(key) for key in ("exp_avg", "exp_avg_sq")] if isinstance(state, dict) and "step" in state else []
    shapes = {tuple(part.shape) for part in parts if isinstance(part, Tensor)}
    return shapes.pop() if len(parts) == 2 and len(shapes) == 1 else (-1,)


def _difference(part: str, given: Any, fresh: Any) -> tuple[str, Any, str] | None:
    """Return (part, what it is, what was expected) where a state has not the form of a fresh one; None if it has.

    More keys, and anything where a fresh one has nothing, are fine.
    """
    if isinstance(fresh, Mapping):
        if not isinstance(given, Mapping):
            return part, given, "a mapping"
        for key, value in fresh.items():
            if odd := _difference(f"{part}.{key}", given.get(key), value):
                return odd
    elif fresh is not None and type(given) is not type(fresh):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return part, given, kinds.get(type(fresh), "a value")
    return None
