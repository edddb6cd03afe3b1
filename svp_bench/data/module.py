"""The data module: one task, one protocol, one stage, as batches of uint8 images.

What makes it different from a plain one:

- the training images are decoded once into a uint8 cache, so that an epoch only indexes it;
- which image is in which batch follows from (seed, epoch) alone, for any number of processes;
- there is no test loader until `unlock_test` was called, which the command line does once the weights are final.
"""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from svp_bench.core.errors import ConfigError, DataError, UsageError, plural, printable, unknown_name
from svp_bench.data.augment import Augment, Augmenter, Mixing
from svp_bench.data.cache import cached, examined
from svp_bench.data.content import (
    content_digest,
    differences_from_first_use,
    first_overlap,
    joined,
    overlap,
    two_labels,
)
from svp_bench.data.decode import Depth
from svp_bench.data.folds import with_fold
from svp_bench.data.inspection import Examined
from svp_bench.data.samplers import EvalBatchSampler, GlobalBatchSampler, Positions
from svp_bench.data.sources import (
    DataReport,
    Images,
    Source,
    cpu_count,
    in_threads,
    inspect,
    measured,
    need_readable,
    open_source,
)
from svp_bench.data.transforms import CROP_RATIO, INTERPOLATIONS, RESIZES, View, sides
from svp_bench.tasks.cards import (
    ProtocolCard,
    SuiteCard,
    TaskCard,
    displayed_class_names,
    load_protocol,
    load_suite,
    load_task,
)

__all__ = ["MEMORY_LIMIT_BYTES", "Batch", "VisionDataModule"]

MEMORY_LIMIT_BYTES = 4 * 2**30  # a list that is larger when decoded is decoded anew in each epoch, by worker processes
# What Lightning warns of and what is meant to be so here: no loader of val, and no workers where nothing is decoded.
_WRONG_GUESSES = (r"Total length of `list` across ranks is zero", r"The '\w+_dataloader' does not have many workers")
_MOST_WORKERS = 1024
_FEW_IMAGES = 512  # below, starting worker processes takes longer than decoding


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


class VisionDataModule(LightningDataModule):
    """The images of one task under one protocol.

    The Trainer must run with `use_distributed_sampler=False`: the samplers here divide the work themselves.

    Args:
        task: Full name of the task, e.g. "vtab/caltech101" (`svp-bench tasks` lists all).
        root: The folder that holds the task folders; by default $SVP_BENCH_DATA, else `data/`.
        protocol: Name of a protocol card; by default the suite's.
        stage: "final" trains on the protocol's refit list and tests; "select" trains on train and validates on val.
        batch_size: Images for one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Images for one evaluation step over all processes; by default `batch_size`. Results do not
            depend on it, except for rounding.
        num_workers: Worker processes that decode images which are not cached in memory (those of test); "auto" is one
            for each core, at most 8, and none for a small list.
        seed: Seed of the order of the training images.
        drop_last: Leave a smaller last batch out of an epoch, unless it is the only one.
        image_size: Height and width of the images in pixels, or one number for both; by default the protocol's, else
            the backbone's. Not a square: with `resize` squash and without crops.
        resize: How an image is brought to that size: squash (both sides, the aspect ratio is lost) or centre_crop
            (shorter side to image_size / crop_ratio, then the square in the middle); by default the protocol's.
        interpolation: bicubic, bilinear or lanczos; by default the protocol's.
        crop_ratio: Share of the shorter side that centre_crop and the training crop `random` keep; 0.875 by default.
        train_crop: Crop of training images by chance: random_resized (Inception's) or random (shorter side to
            image_size / crop_ratio, then a random square, as VPT's FGVC recipe); by default none, they are seen as in
            evaluation.
        crop_scale: Range of the area of random_resized, as a share of the image; 0.08 to 1 by default.
        crop_aspect: Range of its width / height; 3/4 to 4/3 by default.
        flip: Probability of a horizontal flip of a training image. Flips, and crops too, change what some tasks ask
            for (VTAB's structured ones): no default recipe has them.
        rand_augment: RandAugment by a specification of timm's, e.g. rand-m9-mstd0.5-inc1.
        color_jitter: Range of brightness, contrast and saturation, factors of 1 ± this. Refused with rand_augment:
            timm would ignore it silently.
        random_erasing: Probability that a rectangle of a training image becomes noise (timm's mode "pixel"), on the
            device, after normalisation.
        mixup: α of mixup: each training batch is mixed with its mirror image, λ from Beta(α, α); null or 0 for none.
        cutmix: α of cutmix; with both, each batch gets one of them.
        mix_probability: That a batch is mixed, if mixup or cutmix is on; 1 by default.
        mix_switch_probability: That it is by cutmix, if both are on; 0.5 by default.
        repeats: Times that each training image appears in a row, otherwise augmented, in an epoch of unchanged length
            (repeated augmentation); 1 by default.
        folds: In stage "select": divide the protocol's refit split into so many stratified parts, one of them val, the
            others train; as many as images is leave-one-out. Null: the protocol's own train and val.
        fold: Which part is val, from 0; `folds` and above are the parts of further divisions (repeats). 0 by default.
        fold_seed: Seed of the divisions, which are the same for all methods and settings; 0 by default.
        allow_overlap: Train on own images although some have the same pixels as images of val or test; records say so.
            Refused by default.

    A null means its default. What chance does to an image follows from (seed, epoch, position, repetition) alone.

    Attributes:
        card: The task's card.
        suite: The card of its suite.
        protocol: The protocol card.
        num_classes: Number of classes.
        depth: Bits that deep images use; after `setup`.
        class_names: What to call them, in the order of their labels; the data's own names, if any, after `setup`.
        image_size: Height and width of the images in pixels.
        lists: Role ("train", "val", "test") → name of the list that plays it in this stage.
        splits_read: The source's lists that this stage reads: those of `lists`, or the one that folds divide.

    Raises:
        UsageError: If the task, protocol or stage is unknown, or the protocol reads lists that the task has not.
        CardError: If a card, or the task's file of class names, is malformed.
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
        image_size: int | tuple[int, int] | None = None,
        resize: Literal["squash", "centre_crop"] | None = None,
        interpolation: Literal["bicubic", "bilinear", "lanczos"] | None = None,
        crop_ratio: float | None = None,
        train_crop: Literal["random", "random_resized"] | None = None,
        crop_scale: tuple[float, float] | None = None,
        crop_aspect: tuple[float, float] | None = None,
        flip: float | None = None,
        rand_augment: str | None = None,
        color_jitter: float | None = None,
        random_erasing: float | None = None,
        mixup: float | None = None,
        cutmix: float | None = None,
        mix_probability: float | None = None,
        mix_switch_probability: float | None = None,
        repeats: int | None = None,
        folds: int | None = None,
        fold: int | None = None,
        fold_seed: int | None = None,
        allow_overlap: bool | None = None,
    ) -> None:
        super().__init__()
        self._root = None if root is None else Path(root)
        self.card: TaskCard = measured(load_task(task), self._root)
        self.suite: SuiteCard = load_suite(self.card.suite)
        self.protocol: ProtocolCard = load_protocol(protocol or self.suite.protocol)
        if stage not in self.protocol.stages:
            raise unknown_name("stage", stage, self.protocol.stages)
        self.stage = stage
        self.folds, self.fold, self.fold_seed = _folds(stage, folds, fold, fold_seed)
        self.splits: Mapping[str, str] = self.protocol.splits(stage, self.folds, self.fold, self.fold_seed)
        self.splits_read: tuple[str, ...] = tuple(self.splits.values())
        if self.folds is not None:
            self.splits_read = (self.protocol.stages["final"]["train"],)
        for name in self.splits_read:
            if name not in self.card.counts:
                role = next((role for role, of in self.splits.items() if of == name), "the folds of stage 'select'")
                raise UsageError(
                    f"the protocol {self.protocol.name!r} reads the list {name!r} for {role}, "
                    f"which {self.card.name} lacks; it has: {', '.join(self.card.counts)}"
                )
        self.num_classes = self.card.classes
        self.class_names: list[str] = displayed_class_names(self.card)
        size = self.protocol.image_size if image_size is None else image_size
        if size is None:
            raise ConfigError(
                f"the protocol {self.protocol.name} leaves --data.image_size to the backbone; give that of yours "
                "(svp_bench.methods.build.input_size tells it)"
            )
        self.image_size: int | tuple[int, int] = size
        for side in sides(self.image_size):
            _at_least(1, "image_size", side)
        self.batch_size = _at_least(1, "batch_size", batch_size)
        self.eval_batch_size = _at_least(
            1, "eval_batch_size", batch_size if eval_batch_size is None else eval_batch_size
        )
        if num_workers != "auto":
            _between(0, _MOST_WORKERS, "num_workers", num_workers)
        self.num_workers = num_workers
        self.seed = _at_least(0, "seed", seed)
        self.drop_last = drop_last
        _one_of("resize", resize, RESIZES)
        _one_of("interpolation", interpolation, INTERPOLATIONS)
        _one_of("train_crop", train_crop, ("random", "random_resized"))
        if train_crop is not None:
            View(self.image_size).side("--data.train_crop")
        self.view = View(
            self.image_size,
            self.protocol.resize if resize is None else resize,
            self.protocol.interpolation if interpolation is None else interpolation,
            _between(0, 1, "crop_ratio", CROP_RATIO if crop_ratio is None else crop_ratio, open_low=True),
        )
        if crop_ratio is not None and self.view.resize != "centre_crop" and train_crop != "random":
            raise ConfigError("--data.crop_ratio belongs to --data.resize centre_crop or --data.train_crop random")
        for name, value in (("flip", flip), ("random_erasing", random_erasing), ("color_jitter", color_jitter)):
            _between(0, 1, name, 0.0 if value is None else value)
        self.augment = Augment(
            train_crop,
            None if crop_scale is None else _range("crop_scale", crop_scale, 1),
            None if crop_aspect is None else _range("crop_aspect", crop_aspect, math.inf),
            flip or None,
            rand_augment,
            color_jitter or None,
        )
        self.random_erasing = random_erasing or 0.0
        self.mixing = Mixing(
            _between(0, math.inf, "mixup", mixup or 0.0),
            _between(0, math.inf, "cutmix", cutmix or 0.0),
            _between(0, 1, "mix_probability", 1.0 if mix_probability is None else mix_probability),
            _between(0, 1, "mix_switch_probability", 0.5 if mix_switch_probability is None else mix_switch_probability),
        )
        self.allow_overlap = bool(allow_overlap)
        self.repeats = _at_least(1, "repeats", 1 if repeats is None else repeats)
        self._source: Source | None = None
        self._report: DataReport | None = None
        self.depth = Depth()
        self._content_digests: dict[str, str] = {}
        self._image_notes: dict[str, int] = {}
        self._datasets: dict[str, _Images] = {}
        self._test_unlocked = False

    # --- setting up --------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Find, compare and check the data of this stage (once), and fill the image cache (once).

        All lists of the stage are read and all their images checked at any `stage`: a broken test image must
        stop a run before training, not after it.

        Args:
            stage: Lightning's: "fit", "validate" or "test".

        Raises:
            DataError: If data are missing, malformed or unreadable, or lists leak into each other.
            ConfigError: If the batch size does not fit the number of processes.
        """
        for guess in _WRONG_GUESSES:
            warnings.filterwarnings("ignore", guess)
        if self._source is None:
            source = open_source(self.card, self._root, suite=self.suite, protocol=self.protocol)
            report = inspect(self.card, source, list(self.splits_read))
            if self.folds is not None:
                names = self.splits["train"], self.splits["val"]
                divided = self.card.name, self.folds, self.fold, self.fold_seed
                source = with_fold(source, self.splits_read[0], names, *divided)
                parts = {name: len(source.get(name)) for name in names}
                report = replace(report, counts={**report.counts, **parts})
            if stage == "fit":
                self._check_batch_size(len(source.get(self.splits["train"])))
            report = self._examine(source, report)
            if report.status == "different":
                rank_zero_warn(
                    f"the data of {self.card.name} differ from its card: {'; '.join(report.notes)}; "
                    f"records will say data_status: different"
                )
            if source.class_names is not None:
                self.class_names = [*source.class_names]
            self._source, self._report = source, report
        if stage == "fit":
            self._dataset("train")
        if stage in ("fit", "validate") and "val" in self.splits:
            self._dataset("val")

    def _examine(self, source: Source, report: DataReport) -> DataReport:
        """Decode all images of this stage once: check, count and compare them; return the report with what it adds."""
        names = [*dict.fromkeys(self.splits.values())]
        parts = self._parts_of_refit(source)
        found = {name: examined(source.get(name), rank_zero_info) for name in [*names, *parts]}
        need_readable([(source.get(name), found[name]) for name in names])
        if any(found[name].problems for name in parts):  # of a stage that this one does not need
            parts = []
        depth = Depth.of(*(_largest(found.values(), name) for name in ("largest_whole", "largest_real")))
        for images in source.splits.values():
            images.depth = depth
        self._content_digests = {name: content_digest(found[name]) for name in names}
        self.depth = depth
        self._image_notes = {f"skipped: {kind}": len(paths) for kind, paths in source.skipped.items()}
        for name in names:
            done = {**found[name].notes, **depth.notes(found[name].whole, found[name].real)}
            for note, count in done.items():
                self._image_notes[note] = self._image_notes.get(note, 0) + count
        notes = self._compare(source, found, parts, report)
        if self._image_notes:
            first = [path for paths in source.skipped.values() for path in paths][:3]
            rank_zero_warn(
                f"images of {self.card.name}: "
                + ", ".join(f"{note} ({count})" for note, count in self._image_notes.items())
                + (f"; skipped are {', '.join(map(printable, first))} …" if first else "")
            )
        return report if not notes else replace(report, status="different", notes=(*report.notes, *notes))

    def _parts_of_refit(self, source: Source) -> list[str]:
        """Return the names of train and val if the training split should hold both, and its files are others."""
        select, counts = self.protocol.stages.get("select", {}), self.card.counts
        parts = [select[role] for role in ("train", "val") if role in select]
        refit = self.splits["train"]
        if (
            source.synthetic
            or self.stage != "final"
            or len(parts) < 2
            or refit in parts
            or not {*parts} <= source.splits.keys()
        ):
            return []
        if sum(counts.get(name, 0) for name in parts) != counts[refit] and not self.card.as_found:
            return []

        def entries(name: str) -> set[tuple[str, int]]:
            images = source.get(name)
            return set(zip(images.keys(), images.labels.tolist(), strict=True))

        return [] if entries(refit) == set().union(*map(entries, parts)) else parts

    def _compare(
        self, source: Source, found: Mapping[str, Examined], parts: list[str], report: DataReport
    ) -> list[str]:
        """Compare the splits by content; return what makes the data differ from their card.

        Raises:
            DataError: If own images are in two splits that must be apart, and `allow_overlap` is not set.
        """
        splits = {name: (source.get(name), one) for name, one in found.items()}
        train = splits[self.splits["train"]]
        notes = []
        # A card that pins the digest of the pixels describes these images, also those that it has twice.
        as_pinned = self.card.digest is not None and report.status == "as_card"
        for role in ("val", "test"):
            if role not in self.splits:
                continue
            held = splits[self.splits[role]]
            if pairs := overlap(held, train):
                self._image_notes[f"images of {held[0].name} that are also in {train[0].name}"] = len(pairs)
                text = first_overlap(held, train, pairs)
                if self.card.suite == "custom" and not self.allow_overlap:
                    raise DataError(
                        f"{text}; remove them from one of the two, or keep them with --data.allow_overlap true "
                        "(records will say data_status: different)"
                    )
                if not as_pinned:
                    notes.append(text)
        if pairs := two_labels(train):
            self._image_notes[f"images of {train[0].name} that have two labels"] = len(pairs)
        if parts and (difference := joined(train, splits[parts[0]], splits[parts[1]])):
            notes.append(difference)
        return notes

    def compare_with_first_use(self, results_root: Path) -> None:
        """Compare the content of the splits with that of the first run on this task whose records are there.

        The digests of the first run are stored in `content/<task>.json` below the results. Custom datasets are
        distinguished by their digest instead, and synthetic images are not compared.
        """
        report = self.report
        if self.card.suite == "custom" or report.variant == "synthetic" or self.folds is not None:
            return
        path = results_root / "content" / f"{self.card.name}.json"
        try:
            notes = differences_from_first_use(path, self._content_digests)
        except OSError as error:
            rank_zero_warn(
                f"{path} cannot be written ({error.strerror}): later runs cannot compare their data with these"
            )
            return
        if notes:
            rank_zero_warn(f"{'; '.join(notes)}; records will say data_status: different")
            self._report = replace(report, status="different", notes=(*report.notes, *notes))

    @property
    def content_digests(self) -> Mapping[str, str]:
        """Split → digest of the decoded pixels of its images, for the splits of this stage; after `setup`."""
        return self._content_digests

    @property
    def image_notes(self) -> Mapping[str, int]:
        """What was skipped or converted → how many images, over the splits of this stage; after `setup`."""
        return self._image_notes

    @property
    def report(self) -> DataReport:
        """How the data on disk compare with the card; there after `setup`."""
        if self._report is None:
            raise RuntimeError("the data were not looked at yet; call setup() first")
        return self._report

    @property
    def test_split_digest(self) -> str | None:
        """Digest of the test list, after `setup`; None in a stage that does not test."""
        return self.split_digest("test") if "test" in self.splits else None

    def split_digest(self, role: str) -> str:
        """Return the digest of the split that plays a role, after `setup`."""
        return self._images(role).digest

    def image_names(self, role: str) -> Sequence[str]:
        """Return what names each image of a split, in its order: a path below the data's folder, or a number."""
        return self._images(role).keys()

    def _images(self, role: str) -> Images:
        if self._source is None:
            raise RuntimeError("the data were not looked at yet; call setup() first")
        return self._source.get(self.splits[role])

    def _dataset(self, role: str) -> _Images:
        """Return the images of a role: decoded and cached, unless they are for test, cropped by chance or too many."""
        if role not in self._datasets:
            images = self._images(role)
            augmenter = Augmenter(self.augment, self.view, self.seed) if role == "train" and self.augment else None
            cropped = augmenter is not None and augmenter.needs_original
            bytes_decoded = len(images) * 3 * math.prod(self.view.sides)
            keep = role != "test" and not cropped and bytes_decoded <= MEMORY_LIMIT_BYTES
            if role != "test" and not cropped and not keep:
                rank_zero_info(
                    f"{images.name} would take {bytes_decoded / 2**30:.1f} GiB decoded; its images are decoded "
                    f"anew in each epoch"
                )
            kind = _CachedImages if keep else _Images
            self._datasets[role] = kind(images, self.view, augmenter)
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
            repeats=self.repeats,
            pairs=bool(self.mixing),
        )
        return self._loader(dataset, sampler)

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """Return the loader of val, or in stage "final" an empty list, which Lightning takes for no validation."""
        if "val" not in self.splits:
            return []
        return self._evaluation_loader("val")

    def require_val(self) -> None:
        """Do nothing if this stage has a val list.

        Raises:
            UsageError: If it has none.
        """
        if "val" not in self.splits:
            raise UsageError(
                f"stage {self.stage!r} has no val split: {self.protocol.name} trains on {self.splits['train']!r}; "
                f"validate with --data.stage select"
            )

    def unlock_test(self) -> None:
        """Allow the test loader. Call it once the weights are final.

        Raises:
            UsageError: If this stage has no test list.
        """
        if "test" not in self.splits:
            raise UsageError(
                f"stage {self.stage!r} has no test list: hyper-parameters are chosen on {self.splits['val']!r}; "
                f"test with --data.stage final"
            )
        self._test_unlocked = True

    @property
    def test_unlocked(self) -> bool:
        """Whether `unlock_test` was called."""
        return self._test_unlocked

    def test_dataloader(self) -> DataLoader[Batch]:
        """Return the loader of the test list.

        Raises:
            UsageError: If `unlock_test` was not called.
        """
        if not self._test_unlocked:
            raise UsageError(
                "there is no test loader yet: the test images are read once, after the weights are final "
                "(`unlock_test()`, which `svp-bench fit` and `svp-bench test` call by themselves)"
            )
        return self._evaluation_loader("test")

    def _evaluation_loader(self, role: str) -> DataLoader[Batch]:
        dataset = self._dataset(role)
        world_size, rank, _ = self._processes()
        return self._loader(dataset, EvalBatchSampler(len(dataset), self.eval_batch_size, world_size, rank))

    def _loader(self, dataset: _Images, sampler: GlobalBatchSampler | EvalBatchSampler) -> DataLoader[Batch]:
        workers = 0 if dataset.ready_made else self._workers(len(dataset))
        return _Loader(
            dataset,
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches, and the data set takes them
            num_workers=workers,
            persistent_workers=workers > 0 and isinstance(sampler, GlobalBatchSampler),
            collate_fn=_to_arrays if workers else None,  # type: ignore[arg-type]  # of whole batches, see batch_size
            worker_init_fn=_outlive_signals,
            pin_memory=torch.cuda.is_available() and not workers,  # else `_Loader` pins what comes from the workers
            generator=torch.Generator().manual_seed(self.seed),  # else each epoch would draw from the global state
        )

    def _workers(self, count: int) -> int:
        if self.num_workers != "auto":
            return self.num_workers
        if count < _FEW_IMAGES:
            return 0
        processes = self.trainer.num_devices if self.trainer is not None else 1
        return max(1, min(8, cpu_count() // processes))

    def _processes(self) -> tuple[int, int, int]:
        """Return (number of processes, rank of this one, batches accumulated for a step)."""
        trainer = self.trainer
        if trainer is None:
            return 1, 0, 1
        return trainer.world_size, trainer.global_rank, trainer.accumulate_grad_batches

    def images_at_once(self, role: str, batch_size: int | None = None, accumulate: int | None = None) -> int:
        """Return how many images one process gets at a time, at most; after `setup`.

        Args:
            role: "train", "val" or "test".
            batch_size: As of `data.batch_size`, or for val and test of `data.eval_batch_size`; what is set by default.
            accumulate: Batches that are accumulated for a step of training; as many as the Trainer does by default.

        Raises:
            ConfigError: If a batch of training cannot be shared out so.
        """
        count = len(self._images(role))
        world_size, _, accumulated = self._processes()
        if role != "train":
            in_one_step = math.ceil((batch_size or self.eval_batch_size) / world_size) * world_size
            return math.ceil(count / (math.ceil(count / in_one_step) * world_size))  # as EvalBatchSampler cuts the list
        batch_size, accumulate = batch_size or self.batch_size, accumulate or accumulated
        self._check_batch_size(count, batch_size, accumulate)
        unit = 2 if self.mixing else 1  # mixed images stay in pairs
        units = math.ceil(min(batch_size, count) / unit)
        return min(unit * math.ceil(math.ceil(units / accumulate) / world_size), batch_size, count)

    def _check_batch_size(self, count: int, batch_size: int | None = None, accumulate: int | None = None) -> None:
        """Refuse a batch size that cannot be shared out so that every process has images in every step."""
        world_size, _, accumulated = self._processes()
        batch_size, accumulate = batch_size or self.batch_size, accumulate or accumulated
        parts = world_size * accumulate
        given = f"--data.batch_size {batch_size}"
        shared = (
            f"{plural(world_size, 'process')} x {plural(accumulate, 'accumulated batch')} = {plural(parts, 'part')}"
        )
        least = parts  # images that a batch needs
        if self.mixing and parts > 1:
            least = 2 * parts - 1  # mixed images are distributed in pairs; the last may be half
            shared += " of two images, which mixup and cutmix need"
        if count < least:
            raise ConfigError(
                f"{self.splits['train']} has {plural(count, 'image')}, fewer than {shared}; use fewer devices "
                f"or a smaller --trainer.accumulate_grad_batches"
            )
        if batch_size % parts == 0 and self._last(count, batch_size) >= least:
            return
        # All multiples of `parts` above `count` fit, so only those around a large batch size need a look.
        below = batch_size // parts * parts
        sizes = (below, below + parts) if below > count else range(parts, count + 2 * parts, parts)
        fit = [size for size in sizes if self._last(count, size) >= least]
        near = sorted(sorted(fit, key=lambda size: (abs(size - batch_size), size))[:2])
        allowed = " or ".join(map(str, near))
        if batch_size % parts:
            raise ConfigError(f"{given} cannot be divided by {shared}; {allowed} would fit")
        raise ConfigError(
            f"{given} leaves a last batch of {self._last(count, batch_size)} of the {plural(count, 'image')}, "
            f"fewer than {shared}; {allowed} would fit, or leave it out with --data.drop_last true"
        )

    def _last(self, count: int, batch_size: int) -> int:
        """Return the number of images in the last batch of an epoch."""
        rest = count % batch_size
        return batch_size if count >= batch_size and (rest == 0 or self.drop_last) else rest


class _Images(Dataset[Batch]):
    """The images of one list, decoded when asked for; indexed by a list of positions, it returns a whole batch."""

    def __init__(self, images: Images, view: View, augmenter: Augmenter | None = None) -> None:
        self._images = images
        self._view = view
        self._augmenter = augmenter
        self._labels = torch.from_numpy(images.labels)

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def ready_made(self) -> bool:
        """Whether a batch is a matter of indexing."""
        return False

    def __getitem__(self, positions: list[int] | int) -> Batch:
        index = torch.as_tensor(positions).reshape(-1)  # a single one: Lightning's overfit_batches
        return Batch(self._augmented(positions, index), self._labels[index], index)

    def _augmented(self, positions: list[int] | int, index: torch.Tensor) -> torch.Tensor:
        if self._augmenter is None:
            return self._pixels(index)
        # Lightning's own sampler, of overfit_batches, knows no epoch: the images stay the same
        keys = positions if isinstance(positions, Positions) else Positions(index.tolist())
        return torch.from_numpy(
            np.stack(
                [
                    self._augmenter(self._original(position), keys.epoch, position, copy)
                    for position, copy in zip(keys, keys.copies, strict=True)
                ]
            )
        )

    def _original(self, position: int) -> Image.Image:
        """Return what augmentation begins with: the stored image if it crops it, else the image at its size."""
        assert self._augmenter is not None
        if self._augmenter.needs_original:
            return self._images.load(position)
        (image,) = self._pixels(torch.tensor([position])).numpy()
        return Image.fromarray(image.transpose(1, 2, 0))

    def _pixels(self, index: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._decode(position) for position in index.tolist()]))

    def _decode(self, position: int) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        return self._view(self._images.load(position))


class _CachedImages(_Images):
    """The images of one split, decoded at once into one uint8 tensor."""

    def __init__(self, images: Images, view: View, augmenter: Augmenter | None = None) -> None:
        super().__init__(images, view, augmenter)
        self._cache = torch.from_numpy(cached(images, view, self._decode_all))

    def _decode_all(self) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        images = np.empty((len(self), 3, *self._view.sides), dtype=np.uint8)

        def decode(position: int) -> None:
            images[position] = self._decode(position)

        in_threads(decode, len(self), f"decoding the images of {self._images.name}", rank_zero_info)
        return images

    @property
    def ready_made(self) -> bool:
        return self._augmenter is None

    def _pixels(self, index: torch.Tensor) -> torch.Tensor:
        return self._cache[index]


class _Loader(DataLoader[Batch]):
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
        except (
            DataError
        ) as error:  # from a worker, torch makes its text a whole traceback, the message on its last line
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


def _to_arrays(batch: Batch) -> tuple[NDArray[Any], ...]:
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


def _outlive_signals(_: int) -> None:
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


def _folds(stage: str, folds: int | None, fold: int | None, fold_seed: int | None) -> tuple[int | None, int, int]:
    """Check the settings of cross-validation, and return them without nulls."""
    if folds is None:
        for name, value in (("fold", fold), ("fold_seed", fold_seed)):
            if value is not None:
                raise ConfigError(f"--data.{name} {value} belongs to --data.folds N")
        return None, 0, 0
    if stage != "select":
        raise ConfigError(
            f"--data.folds {folds} belongs to --data.stage select: a final run trains on the whole refit split"
        )
    _at_least(2, "folds", folds)
    return folds, _at_least(0, "fold", fold or 0), _at_least(0, "fold_seed", fold_seed or 0)


def _largest(found: Iterable[Examined], name: str) -> float | None:
    return max((value for one in found if (value := getattr(one, name)) is not None), default=None)


def _at_least(least: int, name: str, value: int) -> int:
    if value < least:
        raise ConfigError(f"--data.{name} {value} is out of range, allowed: {least} and above")
    return value


def _between(low: float, high: float, name: str, value: float, *, open_low: bool = False) -> float:
    if not (low < value if open_low else low <= value) or not value <= high or not math.isfinite(value):
        upper = "" if high == math.inf else f" to {high:g}"
        raise ConfigError(
            f"--data.{name} {value:g} is out of range, allowed: {'above ' if open_low else ''}{low:g}"
            f"{upper or ' and above'}"
        )
    return value


def _range(name: str, values: tuple[float, float], high: float) -> tuple[float, float]:
    low, top = values
    if not 0 < low <= top <= high or not math.isfinite(top):
        upper = "" if high == math.inf else f", at most {high:g}"
        raise ConfigError(
            f"--data.{name} {list(values)} is out of range, allowed: [low, high] above 0, low not above high{upper}"
        )
    return low, top


def _one_of(name: str, value: str | None, allowed: Iterable[str]) -> None:
    if value is not None and value not in allowed:
        raise unknown_name(f"--data.{name}", value, allowed, error=ConfigError)
