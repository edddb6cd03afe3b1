"""Loaders of training and evaluation: images of a split, decoded to uint8 batches, once or in worker processes."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from svp_bench.core.errors import DataError
from svp_bench.data.augment import Augmenter
from svp_bench.data.cache import cached
from svp_bench.data.pixels import DamagedPixelsError, Pixels, remove_entry
from svp_bench.data.samplers import Positions
from svp_bench.data.sources import Images, in_threads
from svp_bench.data.transforms import EvalTransform


class Batch(NamedTuple):
    """What the loaders yield.

    Attributes:
        images: uint8 (B, 3, H, W), RGB, not normalised.
        labels: int64 (B,).
        index: int64 (B,), the positions of the images in their list.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class ImageDataset(Dataset[Batch]):
    """The images of one split; indexed by a list of positions, it returns a whole batch.

    Args:
        images: The split.
        transform: Brings an image to the model's size.
        augmenter: Changes training images, if any.
        in_memory: Decode all images at once into one uint8 tensor, else when they are asked for.
        pixels: The images as cached on disk, if they are; then none is decoded.
    """

    def __init__(
        self,
        images: Images,
        transform: EvalTransform,
        augmenter: Augmenter | None = None,
        in_memory: bool = False,
        pixels: Pixels | None = None,
    ) -> None:
        self._images = images
        self._transform = transform
        self._augmenter = augmenter
        self._labels = torch.from_numpy(images.labels)
        self._on_disk = pixels
        decode = in_memory and pixels is None
        self._cache = torch.from_numpy(cached(images, transform, self._decode_all)) if decode else None
        self.ready_made = (decode or pixels is not None) and augmenter is None  # a batch is a matter of indexing

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, positions: list[int] | int) -> Batch:
        index = torch.as_tensor(positions).reshape(-1)  # a single one: Lightning's overfit_batches
        return Batch(self._augmented(positions, index), self._labels[index], index)

    def _augmented(self, positions: list[int] | int, index: torch.Tensor) -> torch.Tensor:
        if self._augmenter is None:
            return self._pixels(index)
        # Lightning's own sampler, of overfit_batches, knows no epoch: the images stay the same
        keys = positions if isinstance(positions, Positions) else Positions(index.tolist())
        images = [
            self._augmenter(self._original(position), keys.epoch, position, copy)
            for position, copy in zip(keys, keys.copies, strict=True)
        ]
        return torch.from_numpy(np.stack(images))

    def _original(self, position: int) -> Image.Image:
        """Return what augmentation begins with: the stored image if it crops it, else the image at its size."""
        assert self._augmenter is not None
        if self._augmenter.needs_original:
            return self._images.load(position)
        (image,) = self._pixels(torch.tensor([position])).numpy()
        return Image.fromarray(image.transpose(1, 2, 0))

    def _pixels(self, index: torch.Tensor) -> torch.Tensor:
        if self._cache is not None:
            return self._cache[index]
        if self._on_disk is not None:
            try:
                return torch.from_numpy(self._on_disk.take(index.numpy()))
            except DamagedPixelsError as error:
                rank_zero_warn(
                    f"{error}; the images of {self._images.name} are decoded, and stored again by the next run"
                )
                with suppress(OSError):
                    remove_entry(self._on_disk.path)
                self._on_disk = None
        return torch.from_numpy(np.stack([self._transform(self._images.load(at)) for at in index.tolist()]))

    def _decode_all(self) -> NDArray[np.uint8]:
        images = np.empty((len(self), 3, *self._transform.sides), dtype=np.uint8)

        def decode(position: int) -> None:
            images[position] = self._transform(self._images.load(position))

        in_threads(decode, len(self), f"decoding the images of {self._images.name}", rank_zero_info)
        return images


class Loader(DataLoader[Batch]):
    """A loader whose workers need no shared memory and outlive signals, and whose errors stay one line.

    Batches come from the workers through pipes: PyTorch's own way, /dev/shm, is 64 MB in a container, and a worker that
    finds it full is killed.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            with _signals_held_back():  # workers inherit the mask, so none is hit before it is prepared
                batches = super().__iter__()
            for batch in batches:
                yield _to_tensors(batch) if self.num_workers else batch
        except DataError as error:  # torch makes a worker's text a whole traceback, with the message on its last line
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
        except OSError as error:
            if not self.num_workers or error.errno not in _NO_WORKERS:
                raise
            raise DataError(
                f"cannot start {self.num_workers} processes that load images ({error.strerror}; is /dev/shm full?); "
                "use --data.num_workers 0, or give the container more shared memory (docker run --shm-size)"
            ) from None


_NO_WORKERS = (errno.ENOSPC, errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EACCES, errno.EROFS)
_ASKING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


def to_arrays(batch: Batch) -> tuple[NDArray[Any], ...]:
    """Return a batch as arrays, which travel through a pipe."""
    return tuple(part.numpy() for part in batch)


def _to_tensors(parts: Iterable[NDArray[Any]]) -> Batch:
    tensors = map(torch.from_numpy, parts)
    return Batch(*(tensor.pin_memory() for tensor in tensors) if torch.cuda.is_available() else tensors)


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """Let signals wait for the end of a block, where the system can."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ASKING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def outlive_signals(_: int) -> None:
    """Let a worker end with its loader only: a signal to the group is for the run, which still needs batches."""
    for number in _ASKING:
        signal.signal(number, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):
        return
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # stays blocked, and is received by this thread alone
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*_ASKING} - {signal.SIGTERM})


def _end_with_parent(parent: int) -> None:
    """Heed a SIGTERM of the loader's own process, which is how it ends a worker that does not answer, and its death.

    A worker whose loader was killed would wait for ever for somebody to read its last batch.
    """
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, 1.0)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
