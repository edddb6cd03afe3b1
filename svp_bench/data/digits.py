"""Reader: the handwritten digits that scikit-learn ships."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Annotated

import numpy as np
from msgspec import Meta

from svp_bench.core.errors import CardError
from svp_bench.data.reading import Positions, reader_options, split_positions
from svp_bench.data.sources import Source, array_splits
from svp_bench.tasks.cards import SuiteCard, TaskCard

_TRAINING = 1000  # of 1,797; the others are the test split
_TRAIN = 800


@dataclass(frozen=True)
class _Options:
    per_class: Annotated[int, Meta(ge=3)] | None = None  # the fewest whose fifth is still one
    margin: Annotated[int, Meta(ge=0, le=16, description="0 to 16 (pixels)")] = 0


def open_digits(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read the handwritten digits that scikit-learn ships: 1,797 grey images of 8 × 8 pixels, 10 classes.

    Splits, all in file order: `train` the first 800, `val` the next 200, `trainval` both, `test` the last 797. With the
    option `per_class: k`, `trainval` holds k of each class, evenly spaced among the first 1,000 (the file goes from
    writer to writer, so val is not by those of train alone); of these, a fifth, evenly spaced again, are `val`.

    With the option `margin: m`, m empty pixels are put around each image: 2 make the share of the digit that of
    MNIST, 8 of 12 pixels for its 20 of 28. `root` is not used.

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI repository (its test part).

    Raises:
        CardError: If an option or split is unknown, an option out of range, or the number of classes wrong.
    """
    options = reader_options(card, _Options)
    # importing sklearn, with pandas, would take as long as the training of a demo's task
    table = np.loadtxt(
        str(distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")), delimiter=","
    )
    labels = table[:, -1].astype(np.int64)
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)  # 17 grey values, 0..16
    pixels = np.pad(pixels, ((0, 0), *[(options.margin, options.margin)] * 2))
    names = tuple(map(str, range(10)))
    if card.classes != len(names):
        raise CardError(f"{card.path}:1: the digits have {len(names)} classes, the card states {card.classes}")

    if options.per_class is None:
        train, val = np.arange(_TRAIN), np.arange(_TRAIN, _TRAINING)
    else:
        first = labels[:_TRAINING]
        if options.per_class > (most := int(np.bincount(first).min())):
            raise CardError(f"{card.path}:1: per_class {options.per_class} is out of range, allowed: 3..{most}")
        of_class = [_spread(np.flatnonzero(first == digit), options.per_class) for digit in range(card.classes)]
        held = options.per_class - round(0.8 * options.per_class)
        val = np.sort(np.concatenate([_spread(chosen, held) for chosen in of_class]))
        train = np.setdiff1d(np.concatenate(of_class), val)
    splits = split_positions(train, val, np.arange(_TRAINING, len(labels)))
    return Source("scikit-learn's digits", array_splits(card, pixels, labels, splits, "digit"), class_names=names)


def _spread(numbers: Positions, count: int) -> Positions:
    """Return `count` of some numbers, the middles of equal parts."""
    return numbers[(2 * np.arange(count, dtype=np.int64) + 1) * len(numbers) // (2 * count)]
