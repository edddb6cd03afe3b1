"""`svp-bench fit | validate | test`: LightningCLI over a composed config, and the record at the end."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.trainer.states import RunningStage
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from svp_bench.config.compose import Flags
from svp_bench.core.errors import ConfigError, RecordError, SvpBenchError, UsageError, one_line, plural
from svp_bench.core.interrupts import INTERRUPTS, Preempted
from svp_bench.core.resources import custom_tasks_flags
from svp_bench.core.terminal import has_width
from svp_bench.data.locate import locate
from svp_bench.data.module import VisionDataModule
from svp_bench.data.transforms import sides
from svp_bench.records.digests import canonical_digest, cell_config, config_digest, flat, setting_digest
from svp_bench.records.record import Record, new_run_id
from svp_bench.records.store import (
    check_writable,
    continue_record,
    read_record,
    refuse_unwritable,
    replace_record,
    write_atomically,
    write_record,
)
from svp_bench.train.callbacks import EpochLines, Meter, RunProgressBar, SteadyTensorBoardLogger, peak_memory_mib
from svp_bench.train.checkpoint import About, Saved, weights_digest
from svp_bench.train.comparable import RecipeWatch, refuse_hidden_changes
from svp_bench.train.logging import quiet
from svp_bench.train.metrics import describe
from svp_bench.train.module import AdaptationModule
from svp_bench.train.oom import AllocationFailure, explain_run, is_out_of_memory
from svp_bench.train.parser import ConfigCLI, make_importable
from svp_bench.train.provenance import changed_cards, commit_and_dirty, dirty_warning
from svp_bench.train.record_writer import Recorder
from svp_bench.train.resumable import check_resumable
from svp_bench.train.resume import (
    CHECKPOINT,
    AtomicCheckpointIO,
    Found,
    Start,
    StepSeeds,
    Stopper,
    agreed_name,
    changed_sources,
    claim_run,
    claim_setting,
    is_first_process,
    is_of_a_lost_process,
    locked,
    save_sources,
)

__all__ = ["BenchCLI", "run"]

T = TypeVar("T")


def run(
    subcommand: str,
    flags: Flags,
    callbacks: Sequence[Callback] = (),
    cli: Callable[[str, Flags, Sequence[Callback]], BenchCLI] | None = None,
) -> BenchCLI:
    """Run one subcommand, and return what ran it.

    Args:
        subcommand: fit, validate or test.
        flags: The command line.
        callbacks: Of whoever watches the run; they change nothing of it.
        cli: What runs it; `BenchCLI` by default.

    Raises:
        SvpBenchError: For everything that a user can mend.
    """
    make_importable(flags)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with quiet():
            return (cli or BenchCLI)(subcommand, flags, callbacks)
    except SystemExit as stop:
        if stop.code or type(stop) is not SystemExit:  # what Lightning makes of ctrl-C and of SIGTERM
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves ctrl-C ignored


class BenchCLI(ConfigCLI):
    """One subcommand over one composed config.

    Args:
        subcommand: fit, validate or test.
        flags: The command line.
        watchers: Callbacks of whoever watches the run.
    """

    saved_config = "config.yaml"
    next_step: str | None = "svp-bench table"  # after a complete final run
    goes_on = True  # after a signal, with --resume

    def __init__(self, subcommand: str, flags: Flags, watchers: Sequence[Callback] = ()) -> None:
        self.watchers = watchers
        self.meter = Meter()
        self.watch = RecipeWatch(None)
        self.stopper: Stopper | None = None
        self.run_id = ""
        self.run_dir = Path()
        self.resumed: Found | None = None
        self.saved: Saved | None = None
        self.checkpoints = AtomicCheckpointIO()
        with ExitStack() as self.holding:  # the run's lock, its name for processes that are launched, the signals
            try:
                if subcommand == "fit" and self.goes_on:
                    self.holding.enter_context(INTERRUPTS.taken())
                super().__init__(subcommand, flags)
            except Preempted:
                INTERRUPTS.say_stopped_early()
            except ConfigError as error:
                raise type(error)(self.with_origin(str(error))) from None

    # --- before anything heavy ---------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Resolve the precision, name the run, and fail early: results folder, data, stage."""
        config = self.config[self.command]
        for notice in self.composed.notices:
            rank_zero_info(f"Note: {notice}")
        self.settings = self.resolved()
        # of the code that is running, whatever happens to it meanwhile
        self.commit, self.dirty = commit_and_dirty()
        self.changed_cards = changed_cards(self.settings.read) if self.commit else []
        self.dirty = True if self.changed_cards else self.dirty
        data = VisionDataModule(**config.data.as_dict())  # cheap: reads cards only
        if data.card.reader.kind == "split_files":
            locate(data.card, data.suite, Path(config.data.root) if config.data.root else None)
        if self.command == "validate":
            data.require_val()
        if self.command == "test" and data.stage != "final":
            raise UsageError("stage 'select' has no test list: test a run of --data.stage final")
        self._name_run(config, data)
        if self.command == "fit":
            refuse_unwritable(Path(config.results_root) / "records" / data.card.name, "--results_root")
            refuse_unwritable(self.run_dir, "--runs_root")

    def _name_run(self, config: Namespace, data: VisionDataModule) -> None:
        digest, search = self.settings.setting_digest, self.settings.search
        runs, records = Path(config.runs_root) / data.card.name, Path(config.results_root) / "records" / data.card.name
        resume = self.command == "fit" and bool(config.get("resume"))

        def same_setting(other: Mapping[str, Any]) -> bool:  # selected values are not part of the setting's digest
            return setting_digest(other, search) == digest and config_digest(other) == self.settings.config_digest

        start = Start(self.settings.config, data)

        def decide() -> str:
            if resume:
                if not config.trainer.fast_dev_run:
                    refuse_unwritable(Path(config.runs_root) / "claims", "--runs_root")
                    name = canonical_digest([data.card.name, digest, self.settings.seed, str(config.model.checkpoint)])[
                        7:39
                    ]
                    claim_setting(self.holding, Path(config.runs_root) / "claims" / f"resume-{name}.lock")
                sources = self.settings.sources
                found = claim_run(self.holding, runs, records, data.seed, same_setting, sources, start.is_of)
                if found is not None:
                    return found.folder.name
                passed_over = f" ({start.passed_over})" if start.passed_over else ""
                rank_zero_info(
                    f"Note: --resume: no run of this setting and seed in {runs}{passed_over}; this one begins."
                )
            return new_run_id(self.settings.method, self.settings.seed, digest)

        self.run_id = agreed_name(self.holding, decide, resume)
        self.run_dir = runs / self.run_id
        if resume and self.run_dir.is_dir():
            self.resumed = Found.at(self.run_dir, records)
            if self.resumed.checkpoint is not None and not self.resumed.finished:
                self.saved = start.saved(self.resumed.checkpoint)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, with our callbacks, checkpoints and TensorBoard below the run's folder."""
        config = self.config_init[self.command].trainer
        callbacks: list[Any] = [self.meter, *self.watchers]
        dry = bool(config.fast_dev_run)
        if self.command == "fit" and config.enable_checkpointing is not False and not dry:
            folder = self.run_dir / "checkpoints"
            self.watch.checkpoint = folder / CHECKPOINT.name
            self.stopper = Stopper(folder / CHECKPOINT.name)
            callbacks += [
                self.stopper,
                ModelCheckpoint(
                    folder,
                    filename=CHECKPOINT.stem,
                    save_top_k=1,
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,  # after the epoch's validation, if there is one
                ),
            ]
        if self.command == "fit":
            callbacks.append(StepSeeds(int(self.config_init[self.command].seed_everything)))
        callbacks.append(self.watch)
        kwargs["plugins"] = [*(config.plugins or []), self.checkpoints]
        if config.logger in (None, True) and self.command == "fit" and not dry:
            # what was logged after the last checkpoint will be logged once more
            done = None if self.resumed is None else self.saved.global_step if self.saved else 0
            kwargs["logger"] = SteadyTensorBoardLogger(self.run_dir, name="", version="", purge_step=done)
        elif self.command != "fit":
            kwargs["logger"] = False
        trainer_config = {**config.as_dict(), **kwargs}
        given = trainer_config.get("callbacks") or []
        if self.command == "fit":
            bars = [given] if isinstance(given, Callback) else given
            if not has_width(sys.stdout):
                callbacks.append(EpochLines())
                if not any(isinstance(one, ProgressBar) for one in bars):
                    trainer_config["enable_progress_bar"] = False
            elif config.enable_progress_bar is not False and not any(isinstance(one, ProgressBar) for one in bars):
                callbacks.append(RunProgressBar())
        given = [given] if isinstance(given, Callback) else given
        trainer_config["callbacks"] = [self.watch.first, *given, *callbacks]
        try:
            trainer = Trainer(**trainer_config)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"Lightning refuses these trainer settings: {one_line(str(error))}") from None
        refuse_hidden_changes(trainer, trains=self.command == "fit")
        order: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
        order.append(order.pop(order.index(self.watch)))  # Lightning puts checkpoint callbacks, also of others, last
        return trainer

    # --- subcommands --------------------------------------------------------------------------------------------------

    def fit(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Train; in stage final test once with the final weights; write the record whatever happens."""
        config = self.config[self.command]
        if kwargs.get("ckpt_path"):
            raise UsageError("fit trains from the start and takes no --ckpt_path; `svp-bench test` scores a checkpoint")
        if self.resumed is not None and self.resumed.finished:
            print(
                f"Nothing to go on with: {self.run_id} is complete; its record is in {config.results_root}", flush=True
            )
            return
        self._need_chosen_weights(model)
        self.recorder.scan_choice()  # a backend asked for by name runs on this device, or the run ends here
        model.run_id = self.run_id
        datamodule.trainer = self.trainer  # the batch size is checked against devices and accumulation
        datamodule.setup("fit")  # data errors stop the run before it leaves a trace
        check_writable(config.results_root)
        datamodule.compare_with_first_use(Path(config.results_root))
        if self.saved is not None:
            self._need_same_data(self.saved)
            check_resumable(self.saved, self.trainer, model, [self.meter, *([self.stopper] if self.stopper else [])])
            self.checkpoints.known, kwargs["ckpt_path"] = self.saved, str(self.saved.path)
            self.saved = None
        with self._alone():
            self._announce()
            self._save_config()
            try:
                self._fit(model, datamodule, kwargs)
            except Preempted:
                self._say_how_to_go_on()

    def _need_chosen_weights(self, model: AdaptationModule) -> None:
        """Refuse a frozen choice that was made for other weights."""
        choice = self.composed.choice
        digest = None if model.checkpoint == "none" else model.backbone_digest
        if choice is not None and choice.checkpoint_digest != digest:
            raise UsageError(
                f"{self.flags.choice} was chosen on other weights than those of --model.checkpoint {model.checkpoint}; "
                "search again for these, or leave --choice out"
            )

    def _fit(self, model: AdaptationModule, datamodule: VisionDataModule, kwargs: dict[str, Any]) -> None:
        """Train, test, and write the record, unless the run is to go on later."""
        status, reason = "failed", None
        tested = preempted = False
        try:
            status, reason, tested = self.within_memory(lambda: self._train_and_test(model, datamodule, kwargs))
        except Preempted:
            preempted = True
            raise
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one the other
            status, reason = "interrupted", "stopped by the user"
            raise
        except Exception as error:
            status, reason = "failed", one_line(f"{type(error).__name__}: {error}")
            if isinstance(error, MisconfigurationException) or "conditioned on metric" in str(error):
                raise ConfigError(f"trainer.callbacks: {one_line(str(error))}") from None
            if self.trainer.world_size > 1 and is_of_a_lost_process(error):
                why = one_line(str(error)).partition(". ")[0]
                raise SvpBenchError(
                    f"another process of this run is gone ({why}); go on: the same command with --resume"
                ) from None
            raise
        finally:
            if not preempted:
                INTERRUPTS.waits = True  # the end is near: no signal cuts the record in two
                self._finish(status, reason, tested)

    def _train_and_test(
        self, model: AdaptationModule, datamodule: VisionDataModule, kwargs: dict[str, Any]
    ) -> tuple[str, str | None, bool]:
        """Train, and test what is to be tested; return status, its reason, and whether it was tested."""
        self.watch.begin(self.trainer, model, datamodule)
        self.trainer.fit(model, datamodule=datamodule, **kwargs)
        self.watch.begin_test(datamodule)
        status, reason = self.recorder.outcome()
        if status != "complete":
            return status, reason, False
        if datamodule.stage == "select" and model.validated is None:
            self.trainer.validate(model, datamodule=datamodule, verbose=False)  # resumed after the last epoch
        if datamodule.stage != "final" or self.config[self.command].no_test:
            self.watch.settle(self.trainer, model)
            return (status, reason, False) if datamodule.stage != "final" else ("unscored", "--no_test", False)
        datamodule.unlock_test()
        self.trainer.test(model, datamodule=datamodule, verbose=False)
        return status, reason, True

    def within_memory(self, work: Callable[[], T]) -> T:
        """Run `work`; if memory runs out, measure how many images fit.

        Raises:
            OutOfMemoryError: If memory ran out.
        """
        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            failure = AllocationFailure.from_error(error)
        # outside of the clause, which would keep the error and with it the tensors of the step
        INTERRUPTS.waits = INTERRUPTS.waits or self.command == "fit"  # a signal must not prevent the record
        self.meter.peak_mib = peak_memory_mib(self.trainer.strategy.root_device)  # before the probes move it
        evaluates = {RunningStage.VALIDATING: "val", RunningStage.SANITY_CHECKING: "val", RunningStage.TESTING: "test"}
        stage = self.meter.failed_in
        role = evaluates.get(stage, "train") if stage else "train"
        resume = self.command == "fit" and self.goes_on and (self.run_dir / CHECKPOINT).is_file()
        raise explain_run(failure, self.trainer, self.model, self.datamodule, role, resume)

    def _need_same_data(self, saved: Saved) -> None:
        """Refuse to go on with other images than those that the run began with."""
        if saved.about.data_digest != self.datamodule.report.digest:
            raise UsageError(
                f"{saved.path}: the run began with other lists of {self.datamodule.card.name} than those found here; "
                "give their folder with --data.root, or begin anew without --resume"
            )

    def _alone(self) -> AbstractContextManager[None]:
        """No other process trains this run; the processes of one run are one. A run to go on with is held already."""
        dry = bool(self.config[self.command].trainer.fast_dev_run)
        begun = self.resumed is not None and is_first_process()
        return nullcontext() if dry or begun or not self.trainer.is_global_zero else locked(self.run_dir)

    @rank_zero_only
    def _say_how_to_go_on(self) -> None:
        saved = self.run_dir / CHECKPOINT
        what = f"saved: {saved}" if saved.is_file() else "nothing to save yet"
        name = INTERRUPTS.asked.name if INTERRUPTS.asked else "a signal"
        epoch, steps = self.trainer.current_epoch, self.trainer.global_step
        print(
            f"Stopped by {name} in epoch {epoch}, after {plural(steps, 'step')}; {what}\nGo on: the same "
            "command with --resume",
            flush=True,
        )

    def validate(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Validate a checkpoint on val (stage select)."""
        self._need_checkpoint(kwargs)
        self.within_memory(lambda: self.trainer.validate(model, datamodule=datamodule, **kwargs))

    def test(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Test the final weights of a run made with `--no_test`, and complete its record.

        Weights without a record, of another stage, or of an earlier epoch are refused: the test list chooses nothing.
        A run that has a score is tested again for the eye only: its record stays.
        """
        about, epochs = self._need_checkpoint(kwargs)
        root = self.config[self.command].results_root
        where = Path(root) / "records" / about.task / f"{about.run_id}.json"
        if about.stage != "final":
            raise UsageError(f"{kwargs['ckpt_path']}: weights of stage {about.stage!r} are never tested; refit first")
        if not where.is_file():
            raise UsageError(f"no record {where}: only recorded runs are tested; give the run's --results_root")
        old = read_record(where)
        if epochs != old.epochs:
            raise UsageError(
                f"{kwargs['ckpt_path']}: not the final weights of its run ({epochs} of {plural(old.epochs, 'epoch')})"
            )
        saved = self.checkpoints.known
        assert saved is not None
        model.on_load_checkpoint(dict(saved.content))  # says which weight is missing, foreign or of another shape
        if old.weights_digest is not None and weights_digest(saved.content) != old.weights_digest:
            raise UsageError(
                f"{kwargs['ckpt_path']}: not the weights that its run ended with: their digest is not the "
                f"weights_digest of {where}; nothing else is tested under this run's name"
            )
        self.recorder.scan_choice()
        datamodule.setup("test")
        self._need_same_run(old, where)
        datamodule.unlock_test()
        given = {**kwargs, "verbose": False}
        self.within_memory(lambda: self.trainer.test(model, datamodule=datamodule, **given))
        self._complete(old, where)

    @rank_zero_only
    def _complete(self, old: Record, where: Path) -> None:
        metrics, correct = self.recorder.scores()
        print(describe(metrics, old.splits["test"]))
        if old.status != "unscored":
            same = "the same" if old.metrics and old.metrics.correct == metrics.correct else "another number"
            print(f"The record {where} has its score already ({same}); it is not changed.")
            return
        times = {**old.times, **self.meter.seconds}
        done = dataclasses.replace(
            old, status="complete", status_reason=None, metrics=metrics, correct=correct, times=times
        )
        replace_record(done, self.config[self.command].results_root)
        print(f"Completed {where}")
        self.recorder.write_tables("test", Path(self.config[self.command].runs_root) / old.task / old.run_id)

    def _need_checkpoint(self, kwargs: Mapping[str, Any]) -> tuple[About, int]:
        """Read the checkpoint; return what it says about its run, and the epochs it has seen."""
        path = kwargs.get("ckpt_path")
        if not path:
            raise UsageError(
                f"{self.command} needs --ckpt_path runs/…/checkpoints/last.ckpt, and --config its config.yaml"
            )
        if not Path(path).is_file():
            raise UsageError(f"no checkpoint {str(path)!r}; runs keep theirs in runs/<task>/<run>/checkpoints/")
        saved = self.checkpoints.known = Saved.read(path)
        return saved.about, saved.epoch + 1

    def _need_same_run(self, old: Record, where: Path) -> None:
        """Refuse to complete a record with a score that its settings or data did not give."""
        if old.status != "unscored":
            return
        ours, theirs = (dict(flat(cell_config(config))) for config in (self.settings.config, old.config))
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if other:
            raise UsageError(
                f"the run of {where} was made with another {other[0]} ({theirs.get(other[0])}, "
                f"here {ours.get(other[0])}); test it with its own config.yaml, unchanged"
            )
        if edited := changed_sources(old.method_source or {}, self.settings.sources):
            raise UsageError(
                f"the run of {where} was made with another source of its method ({edited}); restore the files it was "
                "trained with"
            )
        if self.datamodule.report.digest != old.data_digest:
            raise UsageError(
                f"the run of {where} was trained with other lists of {old.task} than those found here; "
                "give their folder with --data.root"
            )

    # --- around a fit ------------------------------------------------------------------------------------------------

    @rank_zero_only
    def _announce(self) -> None:
        model, data = self.model, self.datamodule
        counts = self.recorder.parameters()
        choice = self.recorder.scan_choice()
        weights = "random weights" if model.checkpoint == "none" else f"weights {model.checkpoint}"
        height, width = sides(data.image_size)
        loaded = model.load_report.describe() if model.load_report else None
        print(
            f"{self.run_id}\n"
            f"  task       {data.card.name} v{data.card.version}, stage {data.stage} "
            f"({', '.join(f'{role} on {name}' for role, name in data.splits.items())})\n"
            f"  backbone   {model.backbone_name}, {weights}, scan backend {choice.name} ({choice.reason})\n"
            f"{f'  loaded     {loaded}{chr(10)}' if loaded else ''}"
            f"  images     {height}x{width} pixels\n"
            f"  method     {self.settings.method}: {counts.adapter:,} parameters + {counts.head:,} of the head train, "
            f"of {counts.total:,}\n"
            f"  content    {', '.join(f'{name} {digest[7:19]}' for name, digest in data.content_digests.items())}\n"
            f"  files      {self.run_dir}",
            flush=True,
        )
        for notice in self.settled:
            rank_zero_info(f"Note: {notice}")
        if sys.stdout.isatty():
            print("  Training begins; the first step compiles kernels where that was not done before", flush=True)
        if model.checkpoint == "none":
            print("  Random weights: this run shows plumbing, not transfer; tables keep such rows apart.", flush=True)
        if self.dirty:
            print(f"  Warning: {dirty_warning(self.commit, self.changed_cards)}", flush=True)

    @rank_zero_only
    def _save_config(self) -> None:
        try:
            write_atomically(self.run_dir / self.saved_config, yaml.safe_dump(self.settings.config, sort_keys=False))
            save_sources(self.run_dir, self.settings.sources)
        except RecordError as error:
            reason = str(error).partition("; ")[0]
            raise SvpBenchError(f"{reason}; choose another folder with --runs_root DIR") from None

    @rank_zero_only
    def _finish(self, status: str, reason: str | None, tested: bool) -> None:
        record = self.recorder.record(status, reason, tested)
        again = self.resumed is not None and self.resumed.record is not None  # of the part before an interruption
        path = (continue_record if again else write_record)(record, self.config[self.command].results_root)
        role = "test" if record.kind == "final" else "val"
        if record.metrics is not None:
            print(describe(record.metrics, record.splits[role]), flush=True)
        print(f"Record ({status}): {path}", flush=True)
        if record.not_comparable:
            print(f"Not comparable, tables leave it out: {'; '.join(record.not_comparable)}", flush=True)
        if record.metrics is not None:
            self.recorder.write_tables(role, self.run_dir)
        checkpoint = self.run_dir / CHECKPOINT
        if record.kind == "final" and status == "complete" and self.next_step:
            root = str(self.config[self.command].results_root)
            places = [*(() if root == "results" else ("--results_root", root)), *custom_tasks_flags()]
            print(" ".join([f"Next: {self.next_step}", *map(shlex.quote, places)]), flush=True)
        elif status == "unscored":
            print(f"Next: svp-bench test --config {self.run_dir / 'config.yaml'} --ckpt_path {checkpoint}", flush=True)

    @property
    def recorder(self) -> Recorder:
        """What makes the record of this run."""
        return Recorder(
            run_id=self.run_id,
            run_dir=self.run_dir,
            resolved=self.settings,
            commit=self.commit,
            dirty=self.dirty,
            model=self.model,
            data=self.datamodule,
            trainer=self.trainer,
            meter=self.meter,
            watch=self.watch,
        )
