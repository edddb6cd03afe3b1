"""Which images go into which batch, on which process: pure functions of the seed, the epoch and the sizes.

Both samplers yield whole batches, as lists of positions, to a `DataLoader(..., sampler=sampler, batch_size=None)`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt


def permutation(count: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return the order of `count` images in one epoch: int64 (count,), a pure function of its arguments.

    It sorts raw PCG64 words, whose stream numpy promises to keep (NEP 19); that of its own `permutation` it does not.
    """
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(count)
    return np.argsort(words, kind="stable").astype(np.int64)


def _share(start: int, stop: int, pieces: int, piece: int, unit: int = 1) -> slice:
    """Return the `piece`-th of `pieces` contiguous parts of start..stop, whose sizes differ by one unit at most.

    Units are not cut; the last one may be smaller.
    """
    units = -(-(stop - start) // unit)
    first, last = (min(start + units * number // pieces * unit, stop) for number in (piece, piece + 1))
    return slice(first, last)


class Positions(list[int]):
    """The positions of one training batch, and what else decides how its images are augmented.

    Args:
        positions: Positions in the list.
        epoch: The epoch of the samples.
        copies: For each, how many times the image came before in this epoch; all 0 if None.
    """

    def __init__(self, positions: Sequence[int], epoch: int = 0, copies: Sequence[int] | None = None) -> None:
        super().__init__(positions)
        self.epoch = epoch
        self.copies = [0] * len(self) if copies is None else list(copies)


class GlobalBatchSampler:
    """Batches of one epoch that do not depend on the number of processes.

    The epoch's order is cut into global batches of `batch_size` (the last may be smaller). Each global batch is cut
    into `accumulate` contiguous micro-batches and each of these into one contiguous slice for each process, sizes
    differing by one at most. All processes so yield the same number of batches, and an optimizer step always sees one
    global batch, whole.

    Args:
        count: Images in the list.
        batch_size: Images in a global batch, that is for one optimizer step; a multiple of world_size × accumulate.
        seed: Seed of the order.
        world_size: Number of processes.
        rank: Which of them this is.
        accumulate: Micro-batches that are accumulated for one optimizer step.
        drop_last: Leave a smaller last batch out, unless it is the only one.
        shuffle: Take a new order each epoch; else the order of the list.
        repeats: Times that an image appears, one after the other, before the next one comes; the epoch keeps its
            length, so it holds fewer different images. Repeated augmentation (Hoffer et al., CVPR 2020), as timm's
            `RepeatAugSampler` without its rounding of the epoch to 256.
        pairs: Put the first and the last image of a global batch side by side, then the second and the last but one,
            and so on, and let no slice part them: mixing each image with its neighbour then mixes the global
            batch with its mirror image, as timm's `Mixup` does on one process, for any number of processes.

    Raises:
        ValueError: If a number is out of range, the batch does not divide, or a slice would be empty.
    """

    def __init__(
        self,
        count: int,
        batch_size: int,
        seed: int,
        world_size: int = 1,
        rank: int = 0,
        *,
        accumulate: int = 1,
        drop_last: bool = False,
        shuffle: bool = True,
        repeats: int = 1,
        pairs: bool = False,
    ) -> None:
        pieces = world_size * accumulate
        if min(count, batch_size, world_size, accumulate, repeats) < 1 or not 0 <= rank < world_size or seed < 0:
            raise ValueError(
                f"out of range: {count=}, {batch_size=}, {seed=}, {world_size=}, {rank=}, {accumulate=}, {repeats=}; "
                f"all are at least 1, seed and rank at least 0, rank below world_size"
            )
        if batch_size % pieces:
            raise ValueError(f"a batch of {batch_size} cannot be cut into {world_size} x {accumulate} equal parts")
        bounds = [(start, min(start + batch_size, count)) for start in range(0, count, batch_size)]
        if drop_last and len(bounds) > 1 and bounds[-1][1] - bounds[-1][0] < batch_size:
            bounds.pop()
        smallest, unit = bounds[-1][1] - bounds[-1][0], 2 if pairs else 1
        if -(-smallest // unit) < pieces:
            fewer = "fewer pairs than" if pairs else "fewer than"
            raise ValueError(f"the last batch has {smallest} images, {fewer} {world_size} x {accumulate} parts")
        self.count = count
        self.batch_size = batch_size
        self.seed = seed
        self.world_size = world_size
        self.rank = rank
        self.accumulate = accumulate
        self.shuffle = shuffle
        self.repeats = repeats
        self.pairs = pairs
        self.epoch = 0
        self._unit = unit
        self._bounds = bounds
        self._skipped = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order is yielded next; Lightning calls it at the start of each."""
        self.epoch = epoch

    def skip(self, batches: int) -> None:
        """Leave out the first batches of the next epoch that is iterated: a run resumes within it.

        Args:
            batches: Micro-batches of this process; a multiple of `accumulate`.

        Raises:
            ValueError: If it is no multiple of `accumulate`, or there are not as many.
        """
        if batches % self.accumulate or not 0 <= batches <= len(self):
            raise ValueError(f"cannot skip {batches} of {len(self)} batches; a step has {self.accumulate}")
        self._skipped = batches

    def __len__(self) -> int:
        return len(self._bounds) * self.accumulate

    def __iter__(self) -> Iterator[list[int]]:
        first, self._skipped = self._skipped, 0
        order = permutation(self.count, self.seed, self.epoch) if self.shuffle else np.arange(self.count)
        for batch_index in range(first, len(self)):
            places = self._places(batch_index)
            copies = (places % self.repeats).tolist()
            yield Positions(order[places // self.repeats].tolist(), self.epoch, copies)

    def _places(self, batch_index: int) -> npt.NDArray[np.int64]:
        """Return the places in the epoch that this process takes in a micro-batch, in their order there."""
        start, stop = self._bounds[batch_index // self.accumulate]
        places = np.arange(start, stop)
        if self.pairs:  # first, last, second, last but one, ...
            places = np.stack([places, places[::-1]], axis=1).reshape(-1)[: len(places)]
        micro = _share(0, len(places), self.accumulate, batch_index % self.accumulate, self._unit)
        return places[_share(micro.start, micro.stop, self.world_size, self.rank, self._unit)]

    def copies(self, batch_index: int) -> list[int]:
        """Return, for each image of a batch, how many times it came before in the epoch."""
        copies: list[int] = (self._places(batch_index) % self.repeats).tolist()
        return copies

    def loss_scale(self, batch_index: int) -> float:
        """Return the factor for a batch's mean loss that makes the averages over processes and micro-batches exact.

        It is 1 where all parts of the global batch are of one size, so always on one process without accumulation.
        """
        start, stop = self._bounds[batch_index // self.accumulate]
        return len(self._places(batch_index)) * self.world_size * self.accumulate / (stop - start)


class EvalBatchSampler:
    """Each image of a list exactly once over all processes, in the order of the list.

    A process takes one contiguous slice of each global batch. The list is cut so that all slices differ by one image
    at most, hence all processes yield equally many batches wherever there are images enough.

    Args:
        count: Images in the list.
        batch_size: Images on all processes together in one step; rounded up to a multiple of `world_size`.
        world_size: Number of processes.
        rank: Which of them this is.

    Raises:
        ValueError: If a number is out of range.
    """

    def __init__(self, count: int, batch_size: int, world_size: int = 1, rank: int = 0) -> None:
        if min(count, batch_size, world_size) < 1 or not 0 <= rank < world_size:
            raise ValueError(f"out of range: {count=}, {batch_size=}, {world_size=}, {rank=}")
        in_one_step = -(-batch_size // world_size) * world_size
        steps = -(-count // in_one_step)
        slices = (_share(0, count, steps * world_size, step * world_size + rank) for step in range(steps))
        self._batches = [list(range(part.start, part.stop)) for part in slices if part.start < part.stop]

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)
