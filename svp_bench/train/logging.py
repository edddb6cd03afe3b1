"""Filter log lines and warnings of Lightning, PyTorch and TensorBoard."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from svp_bench.core.errors import printable


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress log lines and warnings that do not apply here."""
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_no_chatter)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    before, threading.excepthook = threading.excepthook, _no_tensorboard_traceback
    try:
        with _expected_warnings():
            yield
    finally:
        threading.excepthook = before
        logger.removeFilter(_no_chatter)


def _no_tensorboard_traceback(args: threading.ExceptHookArgs) -> None:
    """Suppress the traceback of TensorBoard's writer thread: `SteadyTensorBoardLogger` reports the failure."""
    if type(args.thread).__module__ != "tensorboard.summary.writer.event_file_writer":
        threading.__excepthook__(args)


def _no_chatter(record: logging.LogRecord) -> bool:
    """Suppress lines on missing devices and advertisements; escape control characters in the other lines."""
    text = record.getMessage()
    record.msg, record.args = "\n".join(map(printable, text.split("\n"))), None
    chatter = (
        *("GPU available", "TPU available", "HPU available", "Tip:", "to estimate number of stepping batches"),
        "`weights_only` was not set",  # our reader is strict anyway
    )
    return not any(part in text for part in chatter)


@contextmanager
def _expected_warnings() -> Iterator[None]:
    """Suppress warnings about intended states, and print the others in one line."""
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
