"""Repeated stratified k-fold on the labelled images of a task, for searches whose val split is too small to choose."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.core.errors import ConfigError, DataError
from svp_bench.core.ranges import check_range
from svp_bench.data.decode import Decoded
from svp_bench.data.sources import Images, Source


@dataclass(frozen=True)
class CrossValidationConfig:
    """Settings of cross-validation, in stage select.

    Attributes:
        folds: Divide the protocol's refit split into so many stratified parts, one of them val, the others train; as
            many as images is leave-one-out. Null for the protocol's own train and val.
        fold: Which part is val, from 0; `folds` and above are the parts of further divisions (repeats).
        seed: Seed of the divisions, which are the same for all methods and settings.

    Raises:
        ConfigError: If a value is out of range, or belongs to `folds` and there are none.
    """

    folds: int | None = None
    fold: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("fold", "seed"):
            value = check_range(f"data.cross_validation.{name}", getattr(self, name), "[0, inf)")
            if self.folds is None and value:
                raise ConfigError(f"data.cross_validation.{name} {value} needs data.cross_validation.folds N")
        if self.folds is not None:
            check_range("data.cross_validation.folds", self.folds, "[2, inf)")


def fold_positions(
    keys: Sequence[str], labels: npt.NDArray[np.int64], task: str, folds: int, fold: int, seed: int
) -> npt.NDArray[np.int64]:
    """Return the positions of one fold's held-out images, sorted.

    The partition follows from the task's name, `seed`, the repeat (fold // folds) and the images' keys alone: the order
    of the split, the method and the setting do not matter. The images of each class are sorted by a hash and dealt
    out one fold after the other, so that folds differ by at most one image in size. With as many folds as images this
    is leave-one-out. An image that the split repeats is in one fold.

    Args:
        keys: What tells each image from all others, N texts.
        labels: int64 (N,).
        task: Full name of the task.
        folds: Number of parts, at least 2.
        fold: Counts through the repeats: folds * repeat + number of the part.
        seed: Seed of the partition.

    Returns:
        int64 (M,), positions in the split.

    Raises:
        DataError: If there are more folds than distinct images.
    """
    first: dict[str, int] = {}
    for position, key in enumerate(keys):
        first.setdefault(key, position)
    if folds > len(first):
        raise DataError(
            f"{folds} folds of the {len(first)} labelled images of {task} would leave some empty; "
            f"--data.cross_validation.folds is at most {len(first)} here (leave-one-out)"
        )
    repeat, part = divmod(fold, folds)

    def order(key: str) -> tuple[int, bytes]:
        text = f"{task}\n{seed}\n{repeat}\n{key}"
        return int(labels[first[key]]), hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    part_of = {key: number % folds for number, key in enumerate(sorted(first, key=order))}
    return np.array([position for position, key in enumerate(keys) if part_of[key] == part], dtype=np.int64)


class Subset(Images):
    """Some images of a split, as a split of their own.

    Args:
        name: Its name.
        whole: The split.
        positions: int64, which of its images.
    """

    def __init__(self, name: str, whole: Images, positions: npt.NDArray[np.int64]) -> None:
        self.name = name
        self.positions = positions
        self._whole = whole
        self.listing = whole.listing
        self.labels = whole.labels[positions]
        text = f"{name}\n{whole.digest}\n{' '.join(map(str, positions.tolist()))}"
        self.digest = "sha256:" + hashlib.sha256(text.encode()).hexdigest()

    def keys(self) -> Sequence[str]:
        """Return the keys of its images."""
        keys = self._whole.keys()
        return [keys[position] for position in self.positions.tolist()]

    def load(self, index: int) -> Image.Image:
        """Decode one image."""
        return self._whole.load(int(self.positions[index]))

    def where(self, index: int) -> str:
        """Return what names one image in a message."""
        return self._whole.where(int(self.positions[index]))

    def _decoded(self, index: int) -> Decoded | str:
        return self._whole._decoded(int(self.positions[index]))


def with_fold(
    source: Source, whole: str, names: tuple[str, str], task: str, folds: int, fold: int, seed: int
) -> Source:
    """Return a source with two further splits: one fold of a split, and the rest of it.

    Args:
        source: The task's data.
        whole: Name of the split that is divided.
        names: What to call the rest, to train on, and the fold, to score.
        task: Full name of the task.
        folds: See `fold_positions`.
        fold: See `fold_positions`.
        seed: See `fold_positions`.
    """
    images = source.get(whole)
    held = fold_positions(images.keys(), images.labels, task, folds, fold, seed)
    rest = np.setdiff1d(np.arange(len(images)), held)
    parts = {names[0]: Subset(names[0], images, rest), names[1]: Subset(names[1], images, held)}
    return replace(source, splits={**source.splits, **parts})
