"""Reader: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from svp_bench.core.errors import CardError, unknown_name
from svp_bench.data.reading import reader_options
from svp_bench.data.sources import ArrayImages, Source
from svp_bench.tasks.cards import SuiteCard, TaskCard

__all__ = ["open_digits"]

_TRAINING = 1000  # of 1,797; the others are the test list
_TRAIN = 800
_WIDEST = 16  # margin
_FEWEST = 3  # the fewest per class whose fifth is still one


def open_digits(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read the handwritten digits that scikit-learn ships: 1,797 grey images of 8 × 8 pixels, 10 classes.

    Lists, all in file order: `train` the first 800, `val` the next 200, `trainval` both, `test` the last 797. With the
    option `per_class: k`, `trainval` holds k of each class, evenly spaced among the first 1,000 (the file goes from
    writer to writer, so val is not by those of train alone); of these, a fifth, evenly spaced again, are `val`.

    With the option `margin: m`, m empty pixels are put around each image: 2 make the share of the digit that of
    MNIST, 8 of 12 pixels for its 20 of 28. `root` is not used.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository (its test part).

    Raises:
        CardError: If an option or list is unknown, an option out of range, or the number of classes wrong.
    """
    options = reader_options(card, {"per_class": int, "margin": int})
    per_class = None if "per_class" not in options else int(options["per_class"])
    margin = int(options.get("margin", 0))
    if not 0 <= margin <= _WIDEST:
        raise CardError(f"{card.path}:1: margin {margin} is out of range, allowed: 0..{_WIDEST} (pixels)")
    from sklearn.datasets import load_digits  # takes a second to import

    digits = load_digits()
    labels = np.asarray(digits.target, dtype=np.int64)
    pixels = np.rint(np.asarray(digits.images) * (255 / 16)).astype(np.uint8)  # 17 grey values, 0..16
    pixels = np.pad(pixels, ((0, 0), (margin, margin), (margin, margin)))  # their ground is 0

    if card.classes != len(digits.target_names):
        raise CardError(
            f"{card.path}:1: the digits have {len(digits.target_names)} classes, the card states {card.classes}"
        )
    first = labels[:_TRAINING]
    if per_class is None:
        train, val = np.arange(_TRAIN), np.arange(_TRAIN, _TRAINING)
    else:
        most = int(np.bincount(first).min())
        if not _FEWEST <= per_class <= most:
            raise CardError(
                f"{card.path}:1: per_class {per_class} is out of range, allowed: {_FEWEST}..{most} "
                f"(of the first {_TRAINING:,} digits, with at least one of each class for val)"
            )
        of_class = [_spread(np.flatnonzero(first == digit), per_class) for digit in range(card.classes)]
        held = per_class - round(0.8 * per_class)
        val = np.sort(np.concatenate([_spread(chosen, held) for chosen in of_class]))
        train = np.setdiff1d(np.concatenate(of_class), val)
    positions = {
        "train": train,
        "val": val,
        "trainval": np.sort(np.concatenate([train, val])),
        "test": np.arange(_TRAINING, len(labels)),
    }
    unknown = [name for name in card.counts if name not in positions]
    if unknown:
        raise unknown_name(
            "list of the reader 'digits'", unknown[0], positions, where=f"{card.path}:1", error=CardError
        )
    lists = {name: ArrayImages(name, pixels, labels, positions[name]) for name in card.counts}
    return Source("scikit-learn's digits", lists, class_names=tuple(map(str, digits.target_names)))


def _spread(numbers: npt.NDArray[np.int64], count: int) -> npt.NDArray[np.int64]:
    """Return `count` of some numbers, evenly spaced: the file goes from writer to writer, so these have many."""
    return numbers[_middles(len(numbers), count)]


def _middles(length: int, count: int) -> npt.NDArray[np.int64]:
    """Return the middles of `count` equal parts of 0 … length - 1."""
    return (2 * np.arange(count, dtype=np.int64) + 1) * length // (2 * count)
