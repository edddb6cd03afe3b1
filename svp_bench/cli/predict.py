"""Subcommands that use the whole: the demo, and predictions of a trained run."""

from __future__ import annotations

from collections.abc import Sequence

from svp_bench.cli.parser import parser

__all__ = ["demo", "predict"]


def demo(argv: Sequence[str]) -> int:
    """Adapt the embedded weights to three tasks with four methods, and show a leaderboard."""
    options = parser("demo")
    options.add_argument("--results_root", default="results", help="where records and tables go")
    options.add_argument("--runs_root", default="runs", help="where logs and checkpoints go")
    arguments = options.parse_args(argv)
    from svp_bench.sweep.demo import run_demo

    return run_demo(arguments.results_root, arguments.runs_root)


def predict(argv: Sequence[str]) -> int:
    """Name the classes of images with a trained run."""
    options = parser("predict")
    options.add_argument("--ckpt", required=True, help="runs/…/checkpoints/last.ckpt")
    options.add_argument("--images", required=True, nargs="+", help="images, or folders of images")
    options.add_argument("--output", help="a CSV file; standard output by default")
    options.add_argument("--checkpoint", help="where the backbone's weights are now, if they have moved")
    options.add_argument("--top", type=int, default=1, choices=range(1, 11), help="how many classes to name")
    options.add_argument(
        "--batch_size",
        type=int,
        default=32,
        help="images at a time; results change by rounding at most",
    )
    options.add_argument("--method", help="the run's own method file, if its class lies next to it", metavar="FILE")
    options.epilog = "Exit status: 0 if all images were read; 1 if some were not, which the column error names."
    arguments = options.parse_args(argv)
    from svp_bench.train.predict import run_predict

    return run_predict(
        arguments.ckpt,
        arguments.images,
        arguments.output,
        arguments.checkpoint,
        arguments.top,
        arguments.batch_size,
        arguments.method,
    )
