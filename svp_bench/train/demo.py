"""`svp-bench demo`: real digits, four methods, a table, offline."""

from __future__ import annotations

import time
from pathlib import Path

from rich.console import Console

from svp_bench.config import split_flags
from svp_bench.results.tables import run_table
from svp_bench.train.cli import run

__all__ = ["run_demo"]

_TASK = "demo/digits"
_METHODS: dict[str, list[str]] = {
    "full": ["--model.learning_rate", "1e-3"],  # from random weights: the recipe's 1e-4 is for fine-tuning
    "svp": [],
    "vpt_deep": [],
    "linear": [],
}


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
    for number, (method, settings) in enumerate(_METHODS.items(), 1):
        console.rule(f"{number} of {len(_METHODS)}: {method} on {_TASK}")
        arguments = ["--config", f"configs/{_TASK}.yaml", "--method", method, *settings]
        run("fit", split_flags([*arguments, "--results_root", results_root, "--runs_root", runs_root]))
    console.rule("the table")
    print(run_table(results_root, ["demo"]))
    print(
        "What this shows: 1,000 real digits (scikit-learn's, 8×8 pixels, enlarged to 64×64), 797 others to test on.\n"
        "`full` trains every weight and learns for real. The other three train little and lean on a pre-trained\n"
        "backbone; here it has random weights, so their numbers are plumbing, not science, and nothing is ranked.\n"
        "\n"
        f"records      {Path(results_root) / 'records' / 'demo'}\n"
        f"tables       {Path(results_root) / 'tables'} (demo.csv, demo_long.csv, demo.md)\n"
        f"TensorBoard  tensorboard --logdir {runs_root}   (make tensorboard)\n"
        "\n"
        "Next:\n"
        "  svp-bench fit --config configs/demo/digits-10shot.yaml --method svp --model.method.share_layers 4\n"
        "  svp-bench tasks; svp-bench methods\n"
        "  svp-bench fit --config configs/vtab/caltech101.yaml --data.root DIR    (pictures, weights)\n"
        f"\n{len(_METHODS)} runs in {time.perf_counter() - began:.0f} s."
    )
    return 0
