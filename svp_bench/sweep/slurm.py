"""A sweep as a Slurm job array: the same command, each element with its own share of the cells."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from svp_bench.records.store import write_atomically
from svp_bench.sweep.plan import Request


def emit_slurm(request: Request, arguments: Sequence[str]) -> Path:
    """Write a Slurm job array whose elements share the cells of a sweep; return the script's path.

    Each element runs the same command on its own share. Records, selected configs and claims in the shared folders
    separate the elements. A preempted element (SIGUSR1 comes two minutes before the end) is queued again and resumes.

    Args:
        request: The sweep.
        arguments: Its command line, without `--emit` and `--shard`.

    Raises:
        RecordError: If the script cannot be written.
    """
    cells = len(request.tasks) * len(request.methods)
    folder = Path(request.runs_root) / "slurm"
    root = Path.cwd()
    command = shlex.join([sys.executable, "-m", "svp_bench", "sweep", *arguments, "--no_report"])
    script = f"""#!/bin/bash
#SBATCH --job-name=svp-bench
#SBATCH --array=0-{cells - 1}
#SBATCH --output={folder.absolute()}/%A_%a.log
#SBATCH --requeue
#SBATCH --signal=B:USR1@120
# Set what your cluster asks for: --partition, --time, --gres=gpu:1, --cpus-per-task.
# One element a cell (task and method) of the sweep. Afterwards: svp-bench table --results_root {request.results_root}
cd {shlex.quote(str(root))} || exit 1
{command} --shard "$SLURM_ARRAY_TASK_ID/{cells}" &
sweep=$!
again() {{
  kill -USR1 "$sweep"
  wait "$sweep"
  scontrol requeue "${{SLURM_ARRAY_JOB_ID}}_${{SLURM_ARRAY_TASK_ID}}"
  exit 0
}}
trap again USR1 TERM
wait "$sweep"
"""
    path = folder / "sweep.sbatch"
    write_atomically(path, script)
    os.chmod(path, 0o755)
    return path
