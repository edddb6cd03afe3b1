"""The data module: one task, one protocol, one stage, as batches of uint8 pictures.

What makes it different from a plain one:

- the training pictures are decoded once and kept as uint8, so that an epoch is a matter of indexing;
- which picture is in which batch follows from (seed, epoch) alone, whatever the number of processes;
- there is no test loader until `unlock_test` was called, which the command line does once the weights are final.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from svp_bench.cards import ProtocolCard, SuiteCard, TaskCard, load_protocol, load_suite, load_task
from svp_bench.data.samplers import EvalBatchSampler, GlobalBatchSampler
from svp_bench.data.sources import DataReport, Pictures, Source, cpu_count, in_threads, inspect, open_source
from svp_bench.data.transforms import resize_straight
from svp_bench.errors import ConfigError, DataError, UsageError, unknown_name

__all__ = ["MEMORY_LIMIT_BYTES", "Batch", "VisionDataModule"]

MEMORY_LIMIT_BYTES = 4 * 2**30  # a list that is larger when decoded is decoded anew in each epoch, by worker processes
# What Lightning warns of and what is meant to be so here: no loader of val, and no workers where nothing is decoded.
_WRONG_GUESSES = (r"Total length of `list` across ranks is zero", r"The '\w+_dataloader' does not have many workers")
_FEW_PICTURES = 512  # below, starting worker processes takes longer than decoding


class Batch(NamedTuple):
    """What the loaders yield.

    Attributes:
        images: uint8 (B, 3, H, W), RGB, not normalised.
        labels: int64 (B,).
        index: int64 (B,), the positions of the pictures in their list.
    """

    images: torch.Tensor
    labels: torch.Tensor
    index: torch.Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here


class VisionDataModule(LightningDataModule):
    """The pictures of one task under one protocol.

    The Trainer must run with `use_distributed_sampler=False`: the samplers here divide the work themselves.

    Args:
        task: Full name of the task, e.g. "vtab/caltech101" (`svp-bench tasks` lists all).
        root: The folder that holds the task folders; by default $SVP_BENCH_DATA, else `data/`.
        protocol: Name of a protocol card; by default the suite's.
        stage: "final" trains on the protocol's refit list and tests; "select" trains on train and validates on val.
        batch_size: Pictures for one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Pictures for one evaluation step over all processes; by default `batch_size`. No result depends
            on it.
        num_workers: Worker processes that decode pictures which are not kept in memory (those of test); "auto" is one
            for each core, at most 8, and none for a small list.
        seed: Seed of the order of the training pictures.
        drop_last: Leave a smaller last batch out of an epoch, unless it is the only one.
        image_size: Height and width of the pictures in pixels; by default the protocol's.

    Attributes:
        card: The task's card.
        suite: The card of its suite.
        protocol: The protocol card.
        num_classes: Number of classes.
        image_size: Height and width of the pictures in pixels.
        lists: Role ("train", "val", "test") → name of the list that plays it in this stage.

    Raises:
        UsageError: If the task, protocol or stage is unknown, or the protocol reads lists that the task has not.
        ConfigError: If a number is out of range.
    """

    def __init__(
        self,
        task: str,
        root: str | None = None,
        protocol: str | None = None,
        stage: Literal["final", "select"] = "final",
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        num_workers: int | Literal["auto"] = "auto",
        seed: int = 0,
        drop_last: bool = False,
        image_size: int | None = None,
    ) -> None:
        super().__init__()
        self.card: TaskCard = load_task(task)
        self.suite: SuiteCard = load_suite(self.card.suite)
        self.protocol: ProtocolCard = load_protocol(protocol or self.suite.protocol)
        if stage not in self.protocol.stages:
            raise unknown_name("stage", stage, self.protocol.stages)
        self.stage = stage
        self.lists: Mapping[str, str] = dict(self.protocol.stages[stage])
        for role, name in self.lists.items():
            if name not in self.card.counts:
                raise UsageError(
                    f"the protocol {self.protocol.name!r} reads the list {name!r} for {role}, "
                    f"which {self.card.name} lacks; it has: {', '.join(self.card.counts)}"
                )
        self.num_classes = self.card.classes
        self.image_size = _at_least(1, "image_size", self.protocol.image_size if image_size is None else image_size)
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.eval_batch_size = _at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        self.num_workers = num_workers if num_workers == "auto" else _at_least(0, "num_workers", num_workers)
        self.seed = _at_least(0, "seed", seed)
        self.drop_last = drop_last
        self._root = None if root is None else Path(root)
        self._source: Source | None = None
        self._report: DataReport | None = None
        self._datasets: dict[str, _Pictures] = {}
        self._test_unlocked = False

    # --- setting up --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Find, compare and check the data of this stage (once), and decode what is kept in memory (once).

        All lists of the stage are read and all their pictures checked whatever `stage` is: a broken test picture must
        stop a run before training, not after it.

        Args:
            stage: Lightning's: "fit", "validate" or "test".

        Raises:
            DataError: If data are missing, malformed or unreadable.
            ConfigError: If the batch size does not fit the number of processes.
        """
        for guess in _WRONG_GUESSES:
            warnings.filterwarnings("ignore", guess)
        if self._source is None:
            source = open_source(self.card, self._root, suite=self.suite)
            report = inspect(self.card, source, list(self.lists.values()))
            if stage == "fit":
                self._check_batch_size(len(source.get(self.lists["train"])))
            for name in self.lists.values():
                source.get(name).verify(rank_zero_info)
            if report.status == "different":
                rank_zero_warn(
                    f"the data of {self.card.name} differ from its card: {'; '.join(report.notes)}; "
                    f"records will say data_status: different"
                )
            self._source, self._report = source, report
        if stage == "fit":
            self._dataset("train")
        if stage in ("fit", "validate") and "val" in self.lists:
            self._dataset("val")

    @property
    def report(self) -> DataReport:
        """How the data on disk compare with the card; there after `setup`."""
        if self._report is None:
            raise RuntimeError("the data were not looked at yet; call setup() first")
        return self._report

    @property
    def test_list_digest(self) -> str | None:
        """Digest of the test list, after `setup`; None in a stage that does not test."""
        return self._pictures("test").digest if "test" in self.lists else None

    def _pictures(self, role: str) -> Pictures:
        if self._source is None:
            raise RuntimeError("the data were not looked at yet; call setup() first")
        return self._source.get(self.lists[role])

    def _dataset(self, role: str) -> _Pictures:
        """Return the pictures of a role: decoded and kept, unless they are for test or too many."""
        if role not in self._datasets:
            pictures, size, interpolation = self._pictures(role), self.image_size, self.protocol.interpolation
            bytes_decoded = len(pictures) * 3 * size * size
            keep = role != "test" and bytes_decoded <= MEMORY_LIMIT_BYTES
            if role != "test" and not keep:
                rank_zero_info(
                    f"{pictures.name} would take {bytes_decoded / 2**30:.1f} GiB decoded; its pictures are decoded "
                    f"anew in each epoch"
                )
            kind = _KeptPictures if keep else _Pictures
            self._datasets[role] = kind(pictures, size, interpolation)
        return self._datasets[role]

    # --- loaders -----------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the training list of this stage, in a new order each epoch.

        Raises:
            ConfigError: If the batch size does not fit the number of processes.
        """
        dataset = self._dataset("train")
        self._check_batch_size(len(dataset))
        world_size, rank, accumulate = self._processes()
        sampler = GlobalBatchSampler(
            len(dataset),
            self.batch_size,
            self.seed,
            world_size,
            rank,
            accumulate=accumulate,
            drop_last=self.drop_last,
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of val, or in stage "final" an empty list, which Lightning takes for no validation."""
        if "val" not in self.lists:
            return []
        return self._evaluation_loader("val")

    def require_val(self) -> None:
        """Do nothing if this stage has a val list.

        Raises:
            UsageError: If it has none.
        """
        if "val" not in self.lists:
            raise UsageError(
                f"stage {self.stage!r} has no val list: {self.protocol.name} trains on all of {self.lists['train']!r}; "
                f"validate with --data.stage select"
            )

    def unlock_test(self) -> None:
        """Allow the test loader. Call it once the weights are final.

        Raises:
            UsageError: If this stage has no test list.
        """
        if "test" not in self.lists:
            raise UsageError(
                f"stage {self.stage!r} has no test list: hyper-parameters are chosen on {self.lists['val']!r}; "
                f"test with --data.stage final"
            )
        self._test_unlocked = True

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test list.

        Raises:
            UsageError: If `unlock_test` was not called.
        """
        if not self._test_unlocked:
            raise UsageError(
                "there is no test loader yet: the test pictures are read once, after the weights are final "
                "(`unlock_test()`, which `svp-bench fit` and `svp-bench test` call by themselves)"
            )
        return self._evaluation_loader("test")

    def _evaluation_loader(self, role: str) -> DataLoader[Batch]:
        dataset = self._dataset(role)
        world_size, rank, _ = self._processes()
        return self._loader(dataset, EvalBatchSampler(len(dataset), self.eval_batch_size, world_size, rank))

    def _loader(self, dataset: _Pictures, sampler: GlobalBatchSampler | EvalBatchSampler) -> DataLoader[Batch]:
        workers = 0 if isinstance(dataset, _KeptPictures) else self._workers(len(dataset))
        return _Loader(
            dataset,
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches, and the data set takes them
            num_workers=workers,
            persistent_workers=workers > 0 and isinstance(sampler, GlobalBatchSampler),
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch would draw from the global state
        )

    def _workers(self, count: int) -> int:
        if self.num_workers != "auto":
            return self.num_workers
        if count < _FEW_PICTURES:
            return 0
        processes = self.trainer.num_devices if self.trainer is not None else 1
        return max(1, min(8, cpu_count() // processes))

    def _processes(self) -> tuple[int, int, int]:
        """Return (number of processes, rank of this one, batches accumulated for a step)."""
        trainer = self.trainer
        if trainer is None:
            return 1, 0, 1
        return trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches

    def _check_batch_size(self, count: int) -> None:
        """Refuse a batch size that cannot be shared out so that every process has pictures in every step."""
        world_size, _, accumulate = self._processes()
        parts = world_size * accumulate
        given = f"--data.batch_size {self.batch_size}"
        shared = f"{world_size} processes x {accumulate} accumulated batches = {parts} parts"
        if count < parts:
            raise ConfigError(
                f"{self.lists['train']} has {count} pictures, fewer than {shared}; use fewer devices "
                f"or a smaller --trainer.accumulate_grad_batches"
            )
        fit = [
            size
            for size in range(parts, max(count, self.batch_size) + parts, parts)
            if self._last(count, size) >= parts
        ]
        near = sorted(sorted(fit, key=lambda size: (abs(size - self.batch_size), size))[:2])
        allowed = " or ".join(map(str, near))
        if self.batch_size % parts:
            raise ConfigError(f"{given} cannot be divided by {shared}; {allowed} would fit")
        if self._last(count, self.batch_size) < parts:
            raise ConfigError(
                f"{given} leaves a last batch of {self._last(count, self.batch_size)} of the {count} pictures, "
                f"fewer than {shared}; {allowed} would fit, or leave it out with --data.drop_last true"
            )

    def _last(self, count: int, batch_size: int) -> int:
        """Return the number of pictures in the last batch of an epoch."""
        rest = count % batch_size
        return batch_size if count >= batch_size and (rest == 0 or self.drop_last) else rest


class _Pictures(Dataset[Batch]):
    """The pictures of one list, decoded when asked for; indexed by a list of positions, it returns a whole batch."""

    def __init__(self, pictures: Pictures, size: int, interpolation: str) -> None:
        self._pictures = pictures
        self._size = size
        self._interpolation = interpolation
        self._labels = torch.from_numpy(pictures.labels)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, positions: list[int] | int) -> Batch:
        index = torch.as_tensor(positions).reshape(-1)  # a single one: Lightning's overfit_batches
        return Batch(self._images(index), self._labels[index], index)

    def _images(self, index: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._decode(position) for position in index.tolist()]))

    def _decode(self, position: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return resize_straight(self._pictures.load(position), self._size, self._interpolation)


class _KeptPictures(_Pictures):
    """The pictures of one list, decoded at once and kept in one uint8 tensor."""

    def __init__(self, pictures: Pictures, size: int, interpolation: str) -> None:
        super().__init__(pictures, size, interpolation)
        kept = np.empty((len(pictures), 3, size, size), dtype=np.uint8)

        def decode(position: int) -> None:
            kept[position] = self._decode(position)

        in_threads(decode, len(pictures), f"decoding the pictures of {pictures.name}", rank_zero_info)
        self._kept = torch.from_numpy(kept)

    def _images(self, index: torch.Tensor) -> torch.Tensor:
        return self._kept[index]


class _Loader(DataLoader[Batch]):
    """A loader whose data errors stay one line when a worker process meets them."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except (
            DataError
        ) as error:  # from a worker, torch makes its text a whole traceback, the message on its last line
            raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ConfigError(f"--data.{name} {value} is out of range, allowed: {least} and above")
    return value
