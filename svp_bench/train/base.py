"""Prepare a run: check it early, name it, and build the Lightning module and the Trainer."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info

from svp_bench.core.errors import ConfigError, OutOfMemoryError, UsageError, one_line
from svp_bench.core.interrupts import INTERRUPTS, Preempted
from svp_bench.core.terminal import has_width
from svp_bench.data.locate import locate
from svp_bench.data.module import VisionDataModule
from svp_bench.records.digests import canonical_digest, config_digest, setting_digest
from svp_bench.records.record import new_run_id
from svp_bench.records.store import refuse_unwritable
from svp_bench.train.callbacks import (
    EpochLines,
    RunProgressBar,
    SteadyTensorBoardLogger,
    ThroughputMonitor,
    peak_memory_mib,
)
from svp_bench.train.checkpoint import CHECKPOINT, AtomicCheckpointIO, Checkpoint
from svp_bench.train.comparable import RecipeWatch, refuse_hidden_changes
from svp_bench.train.module import AdaptationModule
from svp_bench.train.oom import AllocationFailure, explain_run, is_out_of_memory
from svp_bench.train.parser import ResolvedConfig, instantiate
from svp_bench.train.preemption import PerStepSeed, PreemptionHandler
from svp_bench.train.processes import agreed_name
from svp_bench.train.provenance import changed_cards, commit_and_dirty
from svp_bench.train.resume import FoundRun, InitialState, find_run, lock_run, lock_setting, read_resumed

T = TypeVar("T")


class BaseRun(ABC):
    """The parts that fit, validate and test share.

    Args:
        config: The resolved config.
        watchers: Callbacks of the caller.

    Attributes:
        run_id: The run's name; set by `prepare`, as `run_dir` and `data`.
        run_dir: Its folder.
        data: The data module.
        model: The Lightning module; set by `build`, as `trainer`.
        trainer: The trainer.
    """

    resumable = True  # whether --resume continues it after a signal
    module_type: type[AdaptationModule] = AdaptationModule
    data_type: type[VisionDataModule] = VisionDataModule

    model: AdaptationModule
    data: VisionDataModule
    trainer: Trainer

    def __init__(self, config: ResolvedConfig, watchers: Sequence[Callback] = ()) -> None:
        self.config = config
        self.watchers = watchers
        self.trains = config.subcommand == "fit"
        self.dry = bool(config.arguments.trainer.fast_dev_run)
        self.monitor = ThroughputMonitor()
        self.watch = RecipeWatch(None)
        self.preemption: PreemptionHandler | None = None
        self.run_id = ""
        self.run_dir = Path()
        self.resumed: FoundRun | None = None
        self.saved: Checkpoint | None = None

    def execute(self) -> None:
        """Run the subcommand.

        Raises:
            SvpBenchError: For every error that a user can fix.
        """
        with ExitStack() as self.exit_stack:  # the run's lock, its name in the environment, the signal handlers
            try:
                if self.trains and self.resumable:
                    self.exit_stack.enter_context(INTERRUPTS.taken())
                self.prepare()
                self.build()
                self.main()
            except Preempted:
                INTERRUPTS.print_stopped_early()
            except ConfigError as error:
                raise type(error)(self.config.with_origin(str(error))) from None

    # --- checks before weights and images are read -------------------------------------------------------------------

    def prepare(self) -> None:
        """Name the run, and check data, stage and folders."""
        for notice in self.config.composed.notices:
            rank_zero_info(f"Note: {notice}")
        self.commit, dirty = commit_and_dirty()
        self.changed_cards = changed_cards(self.config.read) if self.commit else []
        self.dirty = True if self.changed_cards else dirty
        self.objects = instantiate(self.config)
        data = self.data = self.data_type(**vars(self.objects.data), seed=self.config.seed)  # reads cards only
        root = self.config.config["data"].get("root")
        if data.card.reader.kind == "split_files":
            locate(data.card, data.suite, Path(root) if root else None)
        if self.config.subcommand == "validate":
            data.require_val()
        if self.config.subcommand == "test" and data.stage != "final":
            raise UsageError("stage 'select' has no test split: test a run of --data.stage final")
        self.name_run()
        if self.trains:
            refuse_unwritable(self.config.results_root / "records" / data.card.name, "--results_root")
            refuse_unwritable(self.run_dir, "--runs_root")

    def name_run(self) -> None:
        """Set the run's name and folder: with --resume those of an earlier run, else new ones."""
        config, task = self.config, self.data.card.name
        runs, records = config.runs_root / task, config.results_root / "records" / task
        resume = self.trains and bool(config.arguments.resume)

        def same_setting(other: Mapping[str, Any]) -> bool:
            digests = setting_digest(other, config.search), config_digest(other)
            return digests == (config.setting_digest, config.config_digest)

        start = InitialState(config.config, self.data)

        def decide() -> str:
            if resume:
                if not self.dry:
                    claims = config.runs_root / "claims"
                    refuse_unwritable(claims, "--runs_root")
                    parts = [task, config.setting_digest, config.seed, str(config.config["model"]["checkpoint"])]
                    lock_setting(self.exit_stack, claims / f"resume-{canonical_digest(parts)[7:39]}.lock")
                find = partial(find_run, runs, records, config.seed, same_setting, same_start=start.is_of)
                found = lock_run(self.exit_stack, records, find, config.sources)
                if found is not None:
                    return found.folder.name
                reason = f" ({start.mismatch})" if start.mismatch else ""
                rank_zero_info(f"Note: --resume: no run of this setting and seed in {runs}{reason}; this one begins.")
            return new_run_id(config.method, config.seed, config.setting_digest)

        self.run_id = agreed_name(self.exit_stack, decide, resume)
        self.run_dir = runs / self.run_id
        if resume and self.run_dir.is_dir():
            self.resumed = FoundRun.at(self.run_dir, records)
            if self.resumed.checkpoint is not None and not self.resumed.finished:
                self.saved = read_resumed(self.resumed.checkpoint)

    # --- model and trainer --------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Build the Lightning module and the Trainer."""
        seed_everything(self.config.seed, workers=True, verbose=False)
        data, settings = self.data, vars(self.objects.model)
        sizes: Any = {"num_classes": data.num_classes, "image_size": data.image_size}
        try:
            self.model = self.module_type(**settings, **sizes, seed=self.config.seed)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"the model does not fit into memory ({one_line(error)}); its size follows from model.backbone, "
                "data.image_size, model.head_hidden and the settings of the method"
            ) from None
        self.trainer = self._build_trainer()

    def _build_trainer(self) -> Trainer:
        settings = dict(vars(self.objects.trainer))
        given = settings.get("callbacks") or []
        given = [given] if isinstance(given, Callback) else list(given)
        settings["callbacks"] = [
            self.watch.first,
            *given,
            *self._callbacks(),
            *self._progress(settings, given),
            self.watch,
        ]
        settings["plugins"] = [*(settings["plugins"] or []), AtomicCheckpointIO()]
        if not self.trains:
            settings["logger"] = False
        elif settings["logger"] in (None, True) and not self.dry:
            # the steps after the last checkpoint will be logged again
            done = None if self.resumed is None else self.saved.global_step if self.saved else 0
            settings["logger"] = SteadyTensorBoardLogger(self.run_dir, name="", version="", purge_step=done)
        try:
            trainer = Trainer(**settings)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"Lightning refuses these trainer settings: {one_line(error)}") from None
        refuse_hidden_changes(trainer, trains=self.trains)
        order: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        order.append(order.pop(order.index(self.watch)))  # Lightning puts checkpoint callbacks last
        return trainer

    def _callbacks(self) -> list[Callback]:
        callbacks: list[Callback] = [self.monitor, *self.watchers]
        if self.trains and self.objects.trainer.enable_checkpointing is not False and not self.dry:
            folder = self.run_dir / "checkpoints"
            self.watch.checkpoint = folder / CHECKPOINT.name
            self.preemption = PreemptionHandler(folder / CHECKPOINT.name)
            callbacks += [
                self.preemption,
                ModelCheckpoint(
                    folder,
                    filename=CHECKPOINT.stem,
                    save_top_k=1,
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,  # after the epoch's validation, if there is one
                ),
            ]
        return [*callbacks, PerStepSeed(self.config.seed)] if self.trains else callbacks

    def _progress(self, settings: dict[str, Any], given: Sequence[Callback]) -> list[Callback]:
        """Return a progress bar for a terminal, else one line per epoch."""
        if not self.trains:
            return []
        has_bar = any(isinstance(one, ProgressBar) for one in given)
        if not has_width(sys.stdout):
            if not has_bar:
                settings["enable_progress_bar"] = False
            return [EpochLines()]
        return [RunProgressBar()] if settings["enable_progress_bar"] is not False and not has_bar else []

    @abstractmethod
    def main(self) -> None:
        """Run the subcommand on the built model, data and trainer."""

    def within_memory(self, work: Callable[[], T]) -> T:
        """Run `work`; if memory runs out, measure how many images fit into it.

        Raises:
            OutOfMemoryError: If memory ran out.
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = AllocationFailure.from_error(error)
        # not in the except clause, which would keep the error and with it the tensors of the step
        INTERRUPTS.waits = INTERRUPTS.waits or self.trains  # a signal must not prevent the record
        self.monitor.peak_mib = peak_memory_mib(self.trainer.strategy.root_device)
        evaluates = {RunningStage.VALIDATING: "val", RunningStage.SANITY_CHECKING: "val", RunningStage.TESTING: "test"}
        stage = self.monitor.failed_in
        role = evaluates.get(stage, "train") if stage else "train"
        resume = self.trains and self.resumable and (self.run_dir / CHECKPOINT).is_file()
        raise explain_run(failure, self.trainer, self.model, self.data, role, resume)
