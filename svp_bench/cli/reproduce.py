"""Subcommands that check a number: `audit`, `rerun` and `replicate`."""

from __future__ import annotations

from typing import Annotated

from svp_bench.core.registry import importing_torch


def audit(records: Annotated[tuple[str, ...], "RECORD"], /, *, results_root: str | None = None) -> int:
    """Check what records prove: splits, budget, search, seeds, code.

    Exit status: 0 if no check fails, else 1.

    Args:
        records: Records, or folders of records.
        results_root: Where other records and the selected configs of searches are; that of each record by default.
    """
    from svp_bench.audit.record import audit as audit_records
    from svp_bench.audit.record import render

    report = audit_records(records, results_root)
    print(render(report), end="")
    return int(report.failed)


def rerun(
    record: str,
    /,
    *further: str,
    data_root: Annotated[str | None, "--data.root"] = None,
    checkpoint: Annotated[str | None, "--model.checkpoint"] = None,
    results_root: str = "results/reruns",
    runs_root: str = "runs/reruns",
) -> int:
    """Repeat the run of a record, and compare the numbers.

    Flags of fit that change no number may follow too: --trainer.accelerator, --trainer.devices, --model.scan_backend,
    --data.num_workers … Exit status: 0 if the numbers agree, else 1.

    Args:
        record: Path of the record, results/records/…/….json.
        *further: Flags of fit.
        data_root: Where the images are; as in the record by default.
        checkpoint: Where the weights are; as in the record by default.
        results_root: Where the record of the rerun is written.
        runs_root: Where its logs and checkpoints are written.
    """
    from svp_bench.records.store import read_record

    loaded = read_record(record)  # reports an error before torch is imported
    with importing_torch():
        from svp_bench.train.rerun import run_rerun

    given = {"data.root": data_root, "model.checkpoint": checkpoint}
    places = {"results_root": results_root, "runs_root": runs_root}
    return run_rerun(loaded, {**{key: value for key, value in given.items() if value is not None}, **places}, further)


def replicate(*arguments: str) -> int:
    """Measure the gain of picking the best epoch on the test split; tables refuse its output."""
    from svp_bench.config.compose import compose, split_flags

    if {"-h", "--help"} & {*arguments}:
        print("svp-bench replicate takes the flags of `svp-bench fit` in stage final (see its --help).")
        print("It reads the test split after every epoch, and reports the best epoch next to the last.")
        print("Tables refuse its output.")
        return 0
    composed = compose(split_flags(arguments))  # reports most errors before torch is imported
    with importing_torch():
        from svp_bench.train.parser import resolve
        from svp_bench.train.replicate import ReplicationRun
        from svp_bench.train.run import run

    run(resolve(composed), run_type=ReplicationRun)
    return 0
