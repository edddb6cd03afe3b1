"""`svp-bench demo`: real digits, four methods, a table, offline."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from svp_bench.config import split_flags
from svp_bench.results.tables import run_table
from svp_bench.train.cli import run

__all__ = ["run_demo"]

_FROM_SCRATCH = ("--model.learning_rate", "1e-3")  # the recipe's 1e-4 is for fine-tuning
_RUNS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("demo/digits", "full", _FROM_SCRATCH),
    ("demo/digits", "linear", ()),
    ("demo/digits-10shot", "full", _FROM_SCRATCH),
    ("demo/digits-10shot", "linear", ()),
    ("demo/digits-10shot", "vpt_deep", ()),
    ("demo/digits-10shot", "svp", ()),
)


def run_demo(results_root: str, runs_root: str) -> int:
    """Train each method on the digits, build the table, and say what it means and where everything is.

    Args:
        results_root: Where records and tables go.
        runs_root: Where logs and checkpoints go.

    Returns:
        The exit status.
    """
    console = Console(highlight=False)
    began = time.perf_counter()
    for number, (task, method, settings) in enumerate(_RUNS, 1):
        console.rule(f"{number} of {len(_RUNS)}: {method} on {task}")
        arguments = ["--config", f"configs/{task}.yaml", "--method", method, *settings]
        run("fit", split_flags([*arguments, "--results_root", results_root, "--runs_root", runs_root]))
    console.rule("the table")
    print(run_table(results_root, ["demo"]))
    print(
        "What this shows: real digits (scikit-learn's, 8×8 pixels, enlarged to 64×64), 1,000 or 100 to train on,\n"
        "797 others to test on, 5 epochs. `full` trains every weight and learns for real from 1,000. The others train\n"
        "little and lean on a pre-trained backbone. Here it has random weights, so their numbers are plumbing, not\n"
        "science, and nothing is ranked: after 20 steps prompts hardly move random features, and methods may tie.\n"
        "\n"
        f"records      {Path(results_root) / 'records' / 'demo'}\n"
        f"tables       {Path(results_root) / 'tables'} (demo.csv, demo_long.csv, demo.md)\n"
        f"TensorBoard  tensorboard --logdir {runs_root}   (make tensorboard)\n"
        "\n"
        "Next:\n"
        "  svp-bench fit --config configs/demo/digits-10shot.yaml --method svp --model.method.share_layers 4\n"
        "  svp-bench tasks; svp-bench methods\n"
        "  svp-bench fit --config configs/vtab/caltech101.yaml --data.root DIR    (pictures, weights)\n"
        f"\n{len(_RUNS)} runs in {time.perf_counter() - began:.0f} s."
    )
    return 0
