"""The subcommand that measures costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from svp_bench.core.errors import UsageError
from svp_bench.core.registry import importing_torch


def measure(
    *,
    backbone: list[str] | None = None,
    method: list[str] | None = None,
    results_root: str = "results",
    device: str = "auto",
    output: Annotated[str | None, "FILE"] = None,
) -> int:
    """Measure latency, throughput, step time and memory of the settings in the records.

    Each setting is measured in a process of its own on random weights: about ten seconds for a small backbone. `table`
    and `report` show the file with --costs. Exit status: 1 if a setting could not be measured.

    Args:
        backbone: A backbone; may be repeated; the shipped recipes on it are measured, not the records.
        method: A method, hybrid or method file; may be repeated; by default all.
        results_root: The folder that contains records/.
        device: The device: cpu, cuda, or auto.
        output: The file, which is written anew; by default costs.json in the results folder.
    """
    from svp_bench.records.store import read_records, write_atomically

    with importing_torch():
        import torch

        from svp_bench.methods import list_methods
        from svp_bench.train.measure import measure_all, recipe_job, record_jobs
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {device!r} is not one of auto, cpu, cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch finds no CUDA device here; use --device cpu")
    if backbone:
        jobs = [recipe_job(name, one) for name in backbone for one in method or list_methods(name)]
    else:
        records = read_records(results_root)[0]
        jobs = record_jobs(record for record in records if not method or record.method in method)
    if not jobs:
        raise UsageError(
            f"no complete record{' of these methods' if method else ''} in {results_root}/records; --backbone NAME "
            "measures the shipped recipes"
        )
    used = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    costs, failed = measure_all(jobs, used, lambda line: print(line, flush=True))
    if costs.rows:
        target = Path(output) if output else Path(results_root) / "costs.json"
        write_atomically(target, costs.text())
        print(f"Written: {target}; show it with `svp-bench table --costs {target}`")
    return int(bool(failed))
