"""Subcommands that train or run a model: the demo, and predictions of a trained run."""

from __future__ import annotations

from typing import Annotated

from svp_bench.cli.parser import whole_number
from svp_bench.core.registry import importing_torch


def demo(*, results_root: str = "results", runs_root: str = "runs") -> int:
    """Adapt embedded weights to three tasks with four methods, offline; print a leaderboard in minutes.

    Args:
        results_root: Where records and tables are written.
        runs_root: Where logs and checkpoints are written.
    """
    from svp_bench.sweep.demo import train_demo

    return train_demo(results_root, runs_root)


def predict(
    *,
    ckpt: str,
    images: tuple[str, ...],
    output: str | None = None,
    checkpoint: str | None = None,
    top: Annotated[int, whole_number(1, 10)] = 1,
    batch_size: int = 32,
    method: Annotated[str | None, "FILE"] = None,
) -> int:
    """Predict the classes of your images with a trained run.

    Exit status: 0 if all images were read; 1 if some were not: the column error names them.

    Args:
        ckpt: A checkpoint: runs/…/checkpoints/last.ckpt.
        images: Images, or folders of images.
        output: A CSV file; standard output by default.
        checkpoint: Where the weights of the backbone are now, if they have moved.
        top: How many classes to name, at most 10.
        batch_size: Images at a time; results change by rounding at most.
        method: The method file of the run, if its class is defined next to it.
    """
    with importing_torch():
        from svp_bench.train.predict import run_predict

    return run_predict(ckpt, list(images), output, checkpoint, top, batch_size, method)
