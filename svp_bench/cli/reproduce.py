"""Subcommands that check a number: audit its record, repeat its run, measure the gain of choosing on test."""

from __future__ import annotations

from collections.abc import Sequence

from svp_bench.cli.parser import parser

__all__ = ["audit", "replicate", "rerun"]


def audit(argv: Sequence[str]) -> int:
    """Say what records prove; the exit status is 0 if nothing fails."""
    options = parser("audit")
    options.add_argument("records", nargs="+", metavar="RECORD", help="a record, or a folder of records")
    options.add_argument(
        "--results_root", help="where other records and the choices of searches are; that of each record by default"
    )
    arguments = options.parse_args(argv)
    from svp_bench.audit.record import audit as look
    from svp_bench.audit.record import render

    report = look(arguments.records, arguments.results_root)
    print(render(report), end="")
    return int(report.failed)


def rerun(argv: Sequence[str]) -> int:
    """Repeat a run from its record; the exit status is 0 if the numbers agree."""
    options = parser("rerun", forwards=True)
    options.add_argument("record", metavar="RECORD", help="results/records/…/….json")
    options.add_argument("--data.root", dest="data_root", help="where the images are; as in the record by default")
    options.add_argument(
        "--model.checkpoint", dest="checkpoint", help="where the weights are; as in the record by default"
    )
    options.add_argument("--results_root", default="results/reruns", help="where the record of the rerun goes")
    options.add_argument("--runs_root", default="runs/reruns", help="where its logs and checkpoints go")
    options.epilog = (
        "Flags of fit that change no number may follow too: --trainer.accelerator, --trainer.devices, "
        "--model.scan_backend, --data.num_workers …"
    )
    arguments, further = options.parse_known_args(argv)
    from svp_bench.records.store import read_record

    record = read_record(arguments.record)  # before torch is imported
    from svp_bench.train.rerun import run_rerun

    given = {"data.root": arguments.data_root, "model.checkpoint": arguments.checkpoint}
    places = {"results_root": arguments.results_root, "runs_root": arguments.runs_root}
    return run_rerun(record, {**{key: value for key, value in given.items() if value is not None}, **places}, further)


def replicate(argv: Sequence[str]) -> int:
    """Train as `fit` does, read the test list after every epoch, and say what the best epoch gains over the last."""
    from svp_bench.config.compose import compose, split_flags

    flags = split_flags(argv)
    if flags.asks_help:
        print("svp-bench replicate takes the flags of fit in stage final. It reads the test list after every epoch, as")
        print("some papers do, and writes the best epoch beside the last. Tables refuse what it writes.\n")
    else:
        compose(flags)  # fails in a second, before torch is imported
    from svp_bench.train.replicate import run_replication

    run_replication(flags)
    return 0
