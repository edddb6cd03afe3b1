"""Filter the log lines and warnings of libraries."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from svp_bench.core.errors import printable

__all__ = ["quiet"]


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out log lines and warnings of Lightning that do not apply here."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_no_chatter)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    in_threads, threading.excepthook = threading.excepthook, _no_thread_of_tensorboard
    try:
        with _expected_warnings():
            yield
    finally:
        threading.excepthook = in_threads
        logger.removeFilter(_no_chatter)


def _no_thread_of_tensorboard(args: threading.ExceptHookArgs) -> None:
    """Leave out the traceback of the thread that writes TensorBoard's file: our logger reports the failure."""
    if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(args)


def _no_chatter(record: logging.LogRecord) -> bool:
    """Leave out Lightning's lines about devices that are not there, its advertisements, and facts of our header.

    The lines that stay may hold names of files and classes; a terminal must not obey these.
    """
    text = record.getMessage()
    record.msg, record.args = "\n".join(map(printable, text.split("\n"))), None
    chatter = (
        *("GPU available", "TPU available", "HPU available", "Tip:", "to estimate number of stepping batches"),
        "`weights_only` was not set",  # our reader is strict anyway
    )
    return not any(part in text for part in chatter)


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Leave out warnings about intended states."""
    shape = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = lambda message, *_, **__: f"Warning: {printable(message)}\n"
        for pattern in (
            r".*does not have many workers.*",  # training images are in memory
            r".*`isinstance\(treespec, LeafSpec\)`.*",  # Lightning 2.6 with torch ≥ 2.9
            r".*The number of training batches .* is smaller than the logging interval.*",
            r".*Checkpoint directory .* exists and is not empty.*",
            r".*GPU available but not used.*",
            r".*in eval mode at the start of training.*",  # frozen parts are
            r".*`LambdaLR`.*lr_scheduler.step.*",
            r".*The dirpath has changed.*",
            r".*functools.lru_cache.*",  # torch.compile, of selected configs that do not change
        ):
            warnings.filterwarnings("ignore", pattern)
        try:
            yield
        finally:
            warnings.formatwarning = shape
