"""`svp-bench fit | validate | test`: run a resolved config, and write its record."""

from __future__ import annotations

import dataclasses
import shlex
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn

from svp_bench.core.errors import ConfigError, RecordError, SvpBenchError, UsageError, one_line, plural
from svp_bench.core.interrupts import INTERRUPTS, Preempted
from svp_bench.core.resources import custom_tasks_flags
from svp_bench.data.transforms import sides
from svp_bench.methods.checks import trained_shares
from svp_bench.records.digests import cell_config, flat
from svp_bench.records.record import Record, Status
from svp_bench.records.store import (
    check_writable,
    continue_record,
    read_record,
    replace_record,
    write_atomically,
    write_record,
)
from svp_bench.train.base import BaseRun
from svp_bench.train.checkpoint import CHECKPOINT, Checkpoint, weights_digest
from svp_bench.train.comparable import external_classes
from svp_bench.train.logging import quiet
from svp_bench.train.metrics import describe
from svp_bench.train.parser import ResolvedConfig
from svp_bench.train.processes import is_first_process, is_of_a_lost_process
from svp_bench.train.provenance import changed_sources, dirty_warning, save_sources
from svp_bench.train.recorded import RecordedRun
from svp_bench.train.resume import check_resumable, locked


@quiet()
def run(
    config: ResolvedConfig,
    watchers: Sequence[Callback] = (),
    run_type: Callable[[ResolvedConfig, Sequence[Callback]], BaseRun] | None = None,
) -> BaseRun:
    """Run a resolved config.

    Args:
        config: The resolved config of fit, validate or test.
        watchers: Callbacks of the caller that do not change the run.
        run_type: The class of the run; by default `FitRun` or `ScoreRun`.

    Raises:
        SvpBenchError: For every error that a user can fix.
    """
    on_interrupt = signal.getsignal(signal.SIGINT)
    done = (run_type or (FitRun if config.subcommand == "fit" else ScoreRun))(config, watchers)
    try:
        done.execute()
    except SystemExit as stop:
        if stop.code or type(stop) is not SystemExit:  # Lightning turns ctrl-C and SIGTERM into it
            raise KeyboardInterrupt from None
        raise
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning does not restore it
    return done


class FitRun(RecordedRun):
    """Train; in stage final test once with the final weights; write the record in any case."""

    saved_config = "config.yaml"
    next_step: str | None = "svp-bench table"  # printed after a complete final run

    def main(self) -> None:
        """Train, test and write the record."""
        if self.config.arguments.ckpt_path:
            raise UsageError("fit trains from the start and takes no --ckpt_path; `svp-bench test` scores a checkpoint")
        if self.resumed is not None and self.resumed.finished:
            print(
                f"Nothing to resume: {self.run_id} is complete; its record is in {self.config.results_root}", flush=True
            )
            return
        self.set_up()
        check_writable(self.config.results_root)
        self.data.compare_with_first_use(self.config.results_root)
        checkpoint: Path | None = None
        if self.saved is not None:
            self._check_splits(self.saved)
            self.model.restore_method(self.saved.content)
            states = [self.monitor, *([self.preemption] if self.preemption else [])]
            check_resumable(self.saved, self.trainer, self.model, states)
            checkpoint, self.saved = self.saved.path, None
        with self.run_lock():
            self.announce()
            self.save_config()
            try:
                self._fit(checkpoint)
            except Preempted:
                self._print_stopped()

    def set_up(self) -> None:
        """Check weights, scan backend and data before anything is written."""
        self.check_weights()
        if external := external_classes(self.trainer):  # they may need, or change, the backbone in each step
            if self.model.cache_features is True:
                rank_zero_warn(f"model.cache_features true has no effect with {', '.join(external)}")
            self.model.cache_features = False
        self.scan_backend()  # raises if the requested backend cannot run on this device
        self.model.stages.check(self.trainer)
        self.model.run_id = self.run_id
        self.data.trainer = self.trainer  # for the check of the batch size
        self.data.setup("fit")
        if self.saved is None:
            self.within_memory(lambda: self.model.prepare_method(self.trainer, self.data))

    def check_weights(self) -> None:
        """Refuse a selected config of other weights."""
        selected, checkpoint = self.config.composed.selected, self.model.checkpoint
        digest = None if checkpoint == "none" else self.model.backbone_digest
        if selected is not None and selected.checkpoint_digest != digest:
            raise UsageError(
                f"{self.config.composed.flags.selected_config} was selected with other weights than "
                f"{checkpoint}; search again for these, or leave --selected_config out"
            )

    def _fit(self, checkpoint: Path | None) -> None:
        """Train, test, and write the record, except if the run was preempted."""
        status: Status = "failed"
        reason = None
        tested = preempted = False
        try:
            status, reason, tested = self.within_memory(lambda: self._train_and_test(checkpoint))
        except Preempted:
            preempted = True
            raise
        except (KeyboardInterrupt, SystemExit):  # Lightning raises SystemExit for ctrl-C
            status, reason = "interrupted", "stopped by the user"
            raise
        except Exception as error:
            status, reason = "failed", one_line(f"{type(error).__name__}: {error}")
            if isinstance(error, MisconfigurationException) or "conditioned on metric" in str(error):
                raise ConfigError(f"trainer.callbacks: {one_line(error)}") from None
            schedules = [
                one.scheduler for one in self.trainer.lr_scheduler_configs if hasattr(one.scheduler, "base_lrs")
            ]
            if any(len(one.base_lrs) < len(one.optimizer.param_groups) for one in schedules):
                raise ConfigError(
                    "trainer.callbacks: a callback added a parameter group to the optimizer, for which the schedule "
                    "has no learning rate; train these parameters in a method instead"
                ) from None
            if self.trainer.world_size > 1 and is_of_a_lost_process(error):
                why = one_line(error).partition(". ")[0]
                raise SvpBenchError(
                    f"another process of this run is gone ({why}); continue with the same command and --resume"
                ) from None
            raise
        finally:
            if not preempted:
                INTERRUPTS.shield()  # a signal must not interrupt the writing of the record
                self._finish(status, reason, tested)

    def _train_and_test(self, checkpoint: Path | None) -> tuple[Status, str | None, bool]:
        """Train and test; return status, its reason, and whether the test split was scored."""
        model, data, trainer = self.model, self.data, self.trainer
        self.watch.begin(trainer, model, data)
        trainer.fit(model, datamodule=data, ckpt_path=checkpoint)
        self.watch.begin_test(data)
        status, reason = self.outcome()
        if status != "complete":
            return status, reason, False
        if data.stage == "select" and model.validated is None:
            trainer.validate(model, datamodule=data, verbose=False)  # resumed after the last epoch
        if data.stage != "final" or self.config.arguments.no_test:
            self.watch.check_final_weights(trainer, model)
            return (status, reason, False) if data.stage != "final" else ("unscored", "--no_test", False)
        data.unlock_test()
        trainer.test(model, datamodule=data, verbose=False)
        return status, reason, True

    def _check_splits(self, saved: Checkpoint) -> None:
        """Refuse to resume with other splits than those that the run began with."""
        if saved.metadata.data_digest != self.data.report.digest:
            raise UsageError(
                f"{saved.path}: the run began with other splits of {self.data.card.name} than those found here; "
                "give their folder with --data.root, or begin a new run without --resume"
            )

    def run_lock(self) -> AbstractContextManager[None]:
        """Lock the run's folder, once for all processes of the run."""
        locked_already = self.resumed is not None and is_first_process()
        no_lock = self.dry or locked_already or not self.trainer.is_global_zero
        return nullcontext() if no_lock else locked(self.run_dir)

    @rank_zero_only
    def _print_stopped(self) -> None:
        saved = self.run_dir / CHECKPOINT
        state = f"saved: {saved}" if saved.is_file() else "nothing to save yet"
        name = INTERRUPTS.asked.name if INTERRUPTS.asked else "a signal"
        epoch, steps = self.trainer.current_epoch, plural(self.trainer.global_step, "step")
        print(f"Stopped by {name} in epoch {epoch}, after {steps}; {state}", flush=True)
        print("Continue with the same command and --resume", flush=True)

    @rank_zero_only
    def announce(self) -> None:
        """Print the header of a run."""
        model, data = self.model, self.data
        counts, backend = self.parameters(), self.scan_backend()
        scan = f", scan backend {backend.name} ({backend.reason})" if backend else ", no selective scan"
        weights = "random weights" if model.checkpoint == "none" else f"weights {model.checkpoint}"
        height, width = sides(data.image_size)
        loaded = model.load_report.describe() if model.load_report else None
        print(
            f"{self.run_id}\n"
            f"  task       {data.card.name} v{data.card.version}, stage {data.stage} "
            f"({', '.join(f'{role} on {name}' for role, name in data.splits.items())})\n"
            f"  backbone   {model.backbone_name}, {weights}{scan}\n"
            f"{f'  loaded     {loaded}{chr(10)}' if loaded else ''}"
            f"  images     {height}x{width} pixels\n"
            f"  method     {self.config.method}: {counts.adapter:,} parameters + {counts.head:,} of the head train, "
            f"of {counts.total:,}\n"
            f"{''.join(f'             {line}{chr(10)}' for line in trained_shares(model.model))}"
            f"  content    {', '.join(f'{name} {digest[7:19]}' for name, digest in data.content_digests.items())}\n"
            f"  files      {self.run_dir}",
            flush=True,
        )
        for notice in self.config.notices:
            rank_zero_info(f"Note: {notice}")
        if sys.stdout.isatty():
            print("  Training begins; the first step compiles kernels where that was not done before", flush=True)
        if model.checkpoint == "none":
            print("  Random weights: this run says nothing about transfer; tables list such rows apart.", flush=True)
        if self.dirty:
            print(f"  Warning: {dirty_warning(self.commit, self.changed_cards)}", flush=True)

    @rank_zero_only
    def save_config(self) -> None:
        """Write the resolved config and the digests of the method's sources into the run's folder.

        Raises:
            SvpBenchError: If the folder cannot be written.
        """
        try:
            write_atomically(self.run_dir / self.saved_config, yaml.safe_dump(self.config.config, sort_keys=False))
            save_sources(self.run_dir, self.config.sources)
        except RecordError as error:
            reason = str(error).partition("; ")[0]
            raise SvpBenchError(f"{reason}; choose another folder with --runs_root DIR") from None

    @rank_zero_only
    def _finish(self, status: Status, reason: str | None, tested: bool) -> None:
        root = self.config.results_root
        record = self.build_record(status, reason, tested)
        again = self.resumed is not None and self.resumed.record is not None
        path = (continue_record if again else write_record)(record, root)
        role = "test" if record.kind == "final" else "val"
        if record.metrics is not None:
            print(describe(record.metrics, record.splits[role]), flush=True)
        print(f"Record ({status}): {path}", flush=True)
        if record.not_comparable:
            print(f"Not comparable, tables leave it out: {'; '.join(record.not_comparable)}", flush=True)
        if record.metrics is not None:
            self.write_tables(role, self.run_dir)
        if record.kind == "final" and status == "complete" and self.next_step:
            flags = [*(() if str(root) == "results" else ("--results_root", str(root))), *custom_tasks_flags()]
            print(" ".join([f"Next: {self.next_step}", *map(shlex.quote, flags)]), flush=True)
        elif status == "unscored":
            checkpoint = self.run_dir / CHECKPOINT
            print(f"Next: svp-bench test --config {self.run_dir / 'config.yaml'} --ckpt_path {checkpoint}", flush=True)


class ScoreRun(RecordedRun):
    """Validate or test a checkpoint."""

    def main(self) -> None:
        """Validate or test."""
        (self.validate if self.config.subcommand == "validate" else self.test)()

    def validate(self) -> None:
        """Validate a checkpoint on val (stage select)."""
        saved = self._read_checkpoint()
        verbose = self.config.arguments.verbose
        self.within_memory(
            lambda: self.trainer.validate(self.model, datamodule=self.data, ckpt_path=saved.path, verbose=verbose)
        )

    def test(self) -> None:
        """Test the final weights of a run trained with `--no_test`, and complete its record.

        Weights without a record, of another stage or of an earlier epoch are refused. A run that has a score is tested
        again without changing its record.
        """
        saved = self._read_checkpoint()
        path, about = saved.path, saved.metadata
        where = self.config.results_root / "records" / about.task / f"{about.run_id}.json"
        if about.stage != "final":
            raise UsageError(f"{path}: weights of stage {about.stage!r} are never tested; refit first")
        if not where.is_file():
            raise UsageError(f"no record {where}: only recorded runs are tested; give the run's --results_root")
        old = read_record(where)
        if saved.epoch + 1 != old.epochs:
            epochs = f"{saved.epoch + 1} of {plural(old.epochs, 'epoch')}"
            raise UsageError(f"{path}: not the final weights of its run ({epochs})")
        self.model.on_load_checkpoint(dict(saved.content))  # raises if a weight is missing or has another shape
        if old.weights_digest is not None and weights_digest(saved.content) != old.weights_digest:
            raise UsageError(
                f"{path}: not the weights that its run ended with: their digest is not the weights_digest of {where}"
            )
        self.scan_backend()
        self.data.setup("test")
        self._check_same_run(old, where)
        self.data.unlock_test()
        self.within_memory(lambda: self.trainer.test(self.model, datamodule=self.data, ckpt_path=path, verbose=False))
        self._complete_record(old, where)

    @rank_zero_only
    def _complete_record(self, old: Record, where: Path) -> None:
        metrics, correct = self.scores_of("test")
        print(describe(metrics, old.splits["test"]))
        if old.status != "unscored":
            same = "the same" if old.metrics and old.metrics.correct == metrics.correct else "another number"
            print(f"The record {where} has its score already ({same}); it is not changed.")
            return
        times = {**old.times, **self.monitor.seconds}
        done = dataclasses.replace(
            old, status="complete", status_reason=None, metrics=metrics, correct=correct, times=times
        )
        replace_record(done, self.config.results_root)
        print(f"Completed {where}")
        self.write_tables("test", self.config.runs_root / old.task / old.run_id)

    def _read_checkpoint(self) -> Checkpoint:
        path = self.config.arguments.ckpt_path
        if not path:
            raise UsageError(
                f"{self.config.subcommand} needs --ckpt_path runs/…/checkpoints/last.ckpt, and --config its config.yaml"
            )
        return Checkpoint.read(path)

    def _check_same_run(self, old: Record, where: Path) -> None:
        """Refuse to complete a record with a score of other settings or data."""
        if old.status != "unscored":
            return
        if different := first_difference(self.config.config, old.config):
            key, ours, theirs = different
            raise UsageError(
                f"the run of {where} has {key} = {theirs}, here {ours}; test it with its own config.yaml, unchanged"
            )
        if edited := changed_sources(old.method_source or {}, self.config.sources):
            raise UsageError(
                f"the run of {where} had another source of its method ({edited}); restore the files it was trained with"
            )
        if self.data.report.digest != old.data_digest:
            raise UsageError(
                f"the run of {where} was trained with other splits of {old.task} than those found here; give their "
                "folder with --data.root"
            )


def first_difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> tuple[str, Any, Any] | None:
    """Return (key, our value, their value) of the first key in which two cells differ; None if they are equal."""
    one, other = dict(flat(cell_config(ours))), dict(flat(cell_config(theirs)))
    keys = sorted(key for key in {*one, *other} if one.get(key) != other.get(key))
    return (keys[0], one.get(keys[0]), other.get(keys[0])) if keys else None
