"""Run jobs in this process: look for the record of a job, claim it, train, report. Imports torch.

A worker stays warm: imports, compiled kernels, decoded images and weights are cached between runs.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from svp_bench.config.compose import compose, split_flags
from svp_bench.core.errors import SvpBenchError, UsageError, one_line
from svp_bench.records.digests import canonical_digest, cell_config, setting_digest
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.lookup import Lookup
from svp_bench.train.parser import ResolvedConfig, resolve
from svp_bench.train.resume import AlreadyLockedError, find_run, lock_file
from svp_bench.train.run import run

Report = Callable[[Mapping[str, Any]], None]


class _Epochs(Callback):
    """Reports the progress of a run."""

    def __init__(self, report: Report) -> None:
        self._report = report

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the epoch."""
        self._report({"epoch": trainer.current_epoch + 1, "epochs": trainer.max_epochs})


class Runner(Lookup):
    """Runs jobs, one after the other, in this process."""

    def run(self, job: Job, report: Report = lambda _: None, retry: bool = False) -> Outcome:
        """Run a job, unless it has a record, or another process runs it.

        Args:
            job: The job.
            report: Called after each epoch.
            retry: Run a job that failed earlier once more.
        """
        began = time.perf_counter()
        try:
            outcome = self._run(job, report, retry)
        except AlreadyLockedError:
            outcome = Outcome("claimed", reason="another process runs it")
        except KeyboardInterrupt:
            outcome = Outcome("stopped", reason="interrupted")
        except Exception as error:  # while looking, before anything is run
            outcome = _failure(error)
        return replace(outcome, seconds=time.perf_counter() - began)

    def _run(self, job: Job, report: Report, retry: bool) -> Outcome:
        found = self.look(job)
        if found is not None and (found.status == "complete" or not retry):
            return found
        resolved = self.resolved(job)
        setting = resolved.setting_digest
        # no two processes of any sweep over this runs folder run the same cell and seed at once
        cell = [resolved.task, resolved.method, resolved.seed, cell_config(resolved.config), setting]
        name = canonical_digest(cell).removeprefix("sha256:")[:32]
        with lock_file(resolved.runs_root / "claims" / f"{name}.lock"):
            found = self.look(job)  # another process may have finished it just before
            if found is not None and found.status == "complete":
                return found
            weights = resolved.config["model"]["checkpoint"]

            def same(config: Mapping[str, Any]) -> bool:  # another sweep over these runs may have had other weights
                same_weights = config.get("model", {}).get("checkpoint") == weights
                return same_weights and setting_digest(config, resolved.search) == setting

            folder, records = resolved.runs_root / resolved.task, resolved.results_root / "records" / resolved.task
            unfinished = find_run(folder, records, resolved.seed, same, resolved.sources)
            # a finished one of the same setting is of other data or weights (else `look` had found it)
            resume = ["--resume"] if unfinished is not None and not unfinished.finished else []
            problem: Exception | None = None
            quiet = ["--trainer.enable_progress_bar", "false"]
            try:
                run(resolve(compose(split_flags([*job.arguments(), *quiet, *resume]))), [_Epochs(report)])
            except Exception as error:  # one failed job must not end the others
                problem = error
            return self._ended(resolved, problem)

    def _ended(self, resolved: ResolvedConfig, problem: Exception | None) -> Outcome:
        ours = [record for record in self._records(resolved) if self._same(record, resolved)]
        ours.sort(key=lambda record: (record.status == "complete", record.run_id))
        if problem is not None:
            return replace(_failure(problem), run_id=ours[-1].run_id if ours else None)
        if not ours or ours[-1].status == "interrupted":
            return Outcome("stopped", reason="stopped after saving its state")
        record = ours[-1]
        if record.status != "complete":
            return Outcome("failed", reason=record.status_reason or record.status, run_id=record.run_id)
        if record.kind == "selection":  # the weights of a trial are not needed
            shutil.rmtree(resolved.runs_root / resolved.task / record.run_id / "checkpoints", ignore_errors=True)
        return self._outcome(record, resolved, found=False)


def _failure(error: Exception) -> Outcome:
    """Return the outcome of a job that raised an error."""
    if isinstance(error, SvpBenchError):
        return Outcome("failed", reason=one_line(str(error)), refused=isinstance(error, UsageError))
    # an OSError or ImportError lies in the machine, not in the setting
    refused = not isinstance(error, (OSError, ImportError))
    return Outcome("failed", reason=one_line(f"{type(error).__name__}: {error}"), refused=refused)
