"""`svp-bench fit | validate | test`: LightningCLI over a composed config, and the record at the end."""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from svp_bench.config import Flags
from svp_bench.data.locate import locate
from svp_bench.data.module import VisionDataModule
from svp_bench.errors import CheckpointError, ConfigError, RecordError, SvpBenchError, UsageError
from svp_bench.models.checkpoints import load_pickle_safely
from svp_bench.results.digests import cell_config, setting_digest
from svp_bench.results.files import (
    check_writable,
    continue_record,
    read_record,
    replace_record,
    write_atomically,
    write_record,
)
from svp_bench.results.record import Record, new_run_id
from svp_bench.train.callbacks import Meter
from svp_bench.train.metrics import describe
from svp_bench.train.module import SAVED_KEY, AdaptationModule
from svp_bench.train.parsing import ConfigCLI, one_line
from svp_bench.train.provenance import commit_and_dirty
from svp_bench.train.quiet import quiet
from svp_bench.train.recording import Recorder
from svp_bench.train.resume import (
    CHECKPOINT,
    AtomicCheckpointIO,
    Found,
    Preempted,
    StepSeeds,
    Stopper,
    find_run,
    locked,
)

__all__ = ["BenchCLI", "run"]

_RUN_ID = "SVP_BENCH_RUN_ID"
# A null may stand over a number of a lower layer (no gradient clipping), so a saved config keeps it.


def run(verb: str, flags: Flags) -> None:
    """Run one verb.

    Raises:
        SvpBenchError: For everything that a user can mend.
    """
    _make_importable(flags)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with quiet():
            BenchCLI(verb, flags)
    except SystemExit as stop:
        if stop.code or type(stop) is not SystemExit:  # what Lightning makes of ctrl-C and of SIGTERM
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves ctrl-C ignored


def _make_importable(flags: Flags) -> None:
    """Let a method's class come from the folder of its file, or from the working directory.

    Behind all else on the path: nothing that is installed is hidden by a file that happens to lie there.
    """
    given = [Path(name) for name in (flags.method, *flags.configs) if name]
    for folder in [*(path.parent for path in given if path.is_file()), Path()]:
        if (place := str(folder.resolve())) not in sys.path:
            sys.path.append(place)


class BenchCLI(ConfigCLI):
    """One verb over one composed config.

    Args:
        verb: fit, validate or test.
        flags: The command line.
    """

    def __init__(self, verb: str, flags: Flags) -> None:
        self.meter = Meter()
        self.stopper: Stopper | None = None
        self.run_id = ""
        self.run_dir = Path()
        self.resumed: Found | None = None
        super().__init__(verb, flags)

    # --- before anything heavy ---------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Resolve the precision, name the run, and fail early: results folder, data, stage."""
        config = self.config[self.verb]
        for notice in self.composed.notices:
            rank_zero_info(f"Note: {notice}")
        self.commit, self.dirty = commit_and_dirty()  # of the code that is running, whatever happens to it meanwhile
        self.settings = self.resolved()
        data = VisionDataModule(**config.data.as_dict())  # cheap: reads cards only
        if data.card.reader.kind == "lists":
            locate(data.card, data.suite, Path(config.data.root) if config.data.root else None)
        if self.verb == "validate":
            data.require_val()
        if self.verb == "test" and data.stage != "final":
            raise UsageError("stage 'select' has no test list: test a run of --data.stage final")
        self._name_run(config, data)
        if self.verb == "fit":
            _refuse_unwritable(Path(config.results_root) / "records" / data.card.name, "--results_root")
            _refuse_unwritable(self.run_dir, "--runs_root")

    def _name_run(self, config: Namespace, data: VisionDataModule) -> None:
        digest = self.settings.setting_digest
        self.run_id = new_run_id(self.settings.method, self.settings.seed, digest)
        runs, records = Path(config.runs_root) / data.card.name, Path(config.results_root) / "records" / data.card.name
        if "LOCAL_RANK" in os.environ:  # a process that Lightning launched: the first one has named the run
            self.run_id = os.environ.get(_RUN_ID, self.run_id)
        elif config.get("resume"):
            tuned = self.settings.tuned
            found = find_run(runs, records, config.seed_everything, lambda c: setting_digest(c, tuned) == digest)
            if found is None:
                rank_zero_info(f"Note: --resume: no run of this setting and seed in {runs}; this one begins.")
            else:
                self.run_id = found.folder.name
        os.environ[_RUN_ID] = self.run_id
        self.run_dir = runs / self.run_id
        if config.get("resume") and self.run_dir.is_dir():
            place, checkpoint = records / f"{self.run_id}.json", self.run_dir / CHECKPOINT
            self.resumed = Found(
                self.run_dir,
                checkpoint if checkpoint.is_file() else None,
                read_record(place) if place.is_file() else None,
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, with our callbacks, checkpoints and TensorBoard below the run's folder."""
        config = self.config_init[self.verb].trainer
        callbacks: list[Any] = [self.meter]
        dry = bool(config.fast_dev_run)
        if self.verb == "fit" and config.enable_checkpointing is not False and not dry:
            folder = self.run_dir / "checkpoints"
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
        if self.verb == "fit":
            callbacks.append(StepSeeds(int(self.config_init[self.verb].seed_everything)))
            kwargs["plugins"] = [*(config.plugins or []), AtomicCheckpointIO()]
        if config.logger in (None, True) and self.verb == "fit" and not dry:
            # what was logged after the last checkpoint will be logged once more
            kwargs["logger"] = TensorBoardLogger(self.run_dir, name="", version="", purge_step=self._steps_done())
        elif self.verb != "fit":
            kwargs["logger"] = False
        trainer_config = {**config.as_dict(), **kwargs}
        trainer_config["callbacks"] = [*(trainer_config.get("callbacks") or []), *callbacks]
        try:
            return Trainer(**trainer_config)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"Lightning refuses these trainer settings: {one_line(str(error))}") from None

    def _steps_done(self) -> int | None:
        """Optimizer steps behind the checkpoint that this run goes on from."""
        if self.resumed is None:
            return None
        return int(load_pickle_safely(self.resumed.checkpoint)["global_step"]) if self.resumed.checkpoint else 0

    # --- the verbs ---------------------------------------------------------------------------------------------------

    def fit(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Train; in stage final test once with the final weights; write the record whatever happens."""
        config = self.config[self.verb]
        if kwargs.get("ckpt_path"):
            raise UsageError("fit trains from the start and takes no --ckpt_path; `svp-bench test` scores a checkpoint")
        if self.resumed is not None and self.resumed.finished:
            print(
                f"Nothing to go on with: {self.run_id} is complete; its record is in {config.results_root}", flush=True
            )
            return
        self.recorder.scan_choice()  # a backend asked for by name runs on this device, or the run ends here
        model.run_id = self.run_id
        datamodule.trainer = self.trainer  # the batch size is checked against devices and accumulation
        datamodule.setup("fit")  # data errors stop the run before it leaves a trace
        check_writable(config.results_root)
        if self.resumed is not None and self.resumed.checkpoint is not None:
            self._need_same_data(self.resumed.checkpoint)
            kwargs["ckpt_path"] = str(self.resumed.checkpoint)
        with self._alone(), self.stopper.listening() if self.stopper else nullcontext():
            self._announce()
            self._save_config()
            try:
                self._fit(model, datamodule, kwargs)
            except Preempted:
                self._say_how_to_go_on()

    def _fit(self, model: AdaptationModule, datamodule: VisionDataModule, kwargs: dict[str, Any]) -> None:
        """Train, test, and write the record, unless the run is to go on later."""
        status, reason = "failed", None
        tested = preempted = False
        try:
            self.trainer.fit(model, datamodule=datamodule, **kwargs)
            status, reason = self.recorder.outcome()
            if datamodule.stage == "select" and status == "complete" and model.validated is None:
                self.trainer.validate(model, datamodule=datamodule, verbose=False)  # resumed after the last epoch
            if datamodule.stage == "final" and status == "complete":
                if self.config[self.verb].no_test:
                    status, reason = "unscored", "--no_test"
                else:
                    datamodule.unlock_test()
                    self.trainer.test(model, datamodule=datamodule, verbose=False)
                    tested = True
        except Preempted:
            preempted = True
            raise
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one the other
            status, reason = "interrupted", "stopped by the user"
            raise
        except Exception as error:
            status, reason = "failed", one_line(f"{type(error).__name__}: {error}")
            raise
        finally:
            if not preempted:
                self._finish(status, reason, tested)

    def _need_same_data(self, checkpoint: Path) -> None:
        """Refuse to go on with other pictures than those that the run began with."""
        theirs = load_pickle_safely(checkpoint).get(SAVED_KEY, {}).get("data_digest")
        if theirs != self.datamodule.report.digest:
            raise UsageError(
                f"{checkpoint}: the run began with other lists of {self.datamodule.card.name} than those found here; "
                "give their folder with --data.root, or begin anew without --resume"
            )

    def _alone(self) -> AbstractContextManager[None]:
        """No other process trains this run; the processes of one run are one."""
        dry = bool(self.config[self.verb].trainer.fast_dev_run)
        return nullcontext() if dry or not self.trainer.is_global_zero else locked(self.run_dir)

    @rank_zero_only
    def _say_how_to_go_on(self) -> None:
        saved = self.run_dir / CHECKPOINT
        what = f"saved: {saved}" if saved.is_file() else "nothing to save yet"
        name = self.stopper.asked.name if self.stopper and self.stopper.asked else "a signal"
        epoch, steps = self.trainer.current_epoch, self.trainer.global_step
        print(
            f"Stopped by {name} in epoch {epoch}, after {steps} steps; {what}\nGo on: the same command with --resume",
            flush=True,
        )

    def validate(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Validate a checkpoint on val (stage select)."""
        self._need_checkpoint(kwargs)
        self.trainer.validate(model, datamodule=datamodule, **kwargs)

    def test(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Test the final weights of a run made with `--no_test`, and complete its record.

        Weights without a record, of another stage, or of an earlier epoch are refused: the test list chooses nothing.
        A run that has a score is tested again for the eye only: its record stays.
        """
        about, epochs = self._need_checkpoint(kwargs)
        root = self.config[self.verb].results_root
        where = Path(root) / "records" / str(about["task"]) / f"{about['run_id']}.json"
        if about["stage"] != "final":
            raise UsageError(
                f"{kwargs['ckpt_path']}: weights of stage {about['stage']!r} are never tested; refit first"
            )
        if not where.is_file():
            raise UsageError(f"no record {where}: only recorded runs are tested; give the run's --results_root")
        old = read_record(where)
        if epochs != old.epochs:
            raise UsageError(
                f"{kwargs['ckpt_path']}: not the final weights of its run ({epochs} of {old.epochs} epochs)"
            )
        self.recorder.scan_choice()
        datamodule.setup("test")
        self._need_same_run(old, where)
        datamodule.unlock_test()
        self.trainer.test(model, datamodule=datamodule, **{**kwargs, "verbose": False})
        self._complete(old, where)

    @rank_zero_only
    def _complete(self, old: Record, where: Path) -> None:
        metrics, correct = self.recorder.scores()
        print(describe(metrics, old.lists["test"]))
        if old.status != "unscored":
            same = "the same" if old.metrics and old.metrics.correct == metrics.correct else "another number"
            print(f"The record {where} has its score already ({same}); it is not changed.")
            return
        times = {**old.times, **self.meter.seconds}
        done = dataclasses.replace(
            old, status="complete", status_reason=None, metrics=metrics, correct=correct, times=times
        )
        replace_record(done, self.config[self.verb].results_root)
        print(f"Completed {where}")
        self.recorder.write_tables("test", Path(self.config[self.verb].runs_root) / old.task / old.run_id)

    def _need_checkpoint(self, kwargs: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
        """Return what a checkpoint says about its run, and the epochs it has seen."""
        path = kwargs.get("ckpt_path")
        if not path:
            raise UsageError(
                f"{self.verb} needs --ckpt_path runs/…/checkpoints/last.ckpt, and --config its config.yaml"
            )
        if not Path(path).is_file():
            raise UsageError(f"no checkpoint {str(path)!r}; runs keep theirs in runs/<task>/<run>/checkpoints/")
        content = load_pickle_safely(Path(path))  # Lightning's own way depends on its version
        if not isinstance(content, Mapping) or SAVED_KEY not in content:
            raise CheckpointError(
                f"{path}: no svp-bench checkpoint; weights of a backbone alone go to --model.checkpoint PATH"
            )
        return content[SAVED_KEY], int(content["epoch"]) + 1

    def _need_same_run(self, old: Record, where: Path) -> None:
        """Refuse to complete a record with a score that its settings or data did not give."""
        if old.status != "unscored":
            return
        ours, theirs = (dict(_flat(cell_config(config))) for config in (self.settings.config, old.config))
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if other:
            raise UsageError(
                f"the run of {where} was made with another {other[0]} ({theirs.get(other[0])}, "
                f"here {ours.get(other[0])}); test it with its own config.yaml, unchanged"
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
        print(
            f"{self.run_id}\n"
            f"  task       {data.card.name} v{data.card.version}, stage {data.stage} "
            f"({', '.join(f'{role} on {name}' for role, name in data.lists.items())})\n"
            f"  backbone   {model.backbone_name}, {weights}, scan backend {choice.name} ({choice.reason})\n"
            f"  method     {self.settings.method}: {counts.adapter:,} parameters + {counts.head:,} of the head train, "
            f"of {counts.total:,}\n"
            f"  files      {self.run_dir}",
            flush=True,
        )
        if model.checkpoint == "none":
            print("  Random weights: this run shows plumbing, not transfer; tables keep such rows apart.", flush=True)

    @rank_zero_only
    def _save_config(self) -> None:
        try:
            write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.settings.config, sort_keys=False))
        except RecordError as error:
            reason = str(error).partition("; ")[0]
            raise SvpBenchError(f"{reason}; choose another folder with --runs_root DIR") from None

    @rank_zero_only
    def _finish(self, status: str, reason: str | None, tested: bool) -> None:
        record = self.recorder.record(status, reason, tested)
        again = self.resumed is not None and self.resumed.record is not None  # of the part before an interruption
        path = (continue_record if again else write_record)(record, self.config[self.verb].results_root)
        role = "test" if record.kind == "final" else "val"
        if record.metrics is not None:
            print(describe(record.metrics, record.lists[role]), flush=True)
        print(f"Record ({status}): {path}", flush=True)
        if record.metrics is not None:
            self.recorder.write_tables(role, self.run_dir)
        checkpoint = self.run_dir / CHECKPOINT
        if record.kind == "final" and status == "complete":
            print("Next: svp-bench table", flush=True)
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
        )


def _refuse_unwritable(folder: Path, flag: str) -> None:
    """Say early, and without making it, that a folder cannot be written.

    Raises:
        RecordError: If a file stands in its way, or the folder above it cannot be written.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "is not a folder" if not place.is_dir() else "is not writable"
        raise RecordError(f"cannot write into {folder}: {place} {why}; choose another folder with {flag} DIR")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
