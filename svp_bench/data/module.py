"""The data module: one task, one protocol, one stage, as batches of uint8 images.

What makes it different from a plain one:

- the training images are decoded once into a uint8 cache, so that an epoch only indexes it;
- which image is in which batch follows from (seed, epoch) alone, for any number of processes;
- there is no test loader until `unlock_test` was called, which the command line does once the weights are final.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.utils.data import DataLoader

from svp_bench.core.errors import ConfigError, DataError, UsageError, plural, printable, unknown_name
from svp_bench.core.ranges import check_range
from svp_bench.data.augment import AugmentConfig, Augmenter
from svp_bench.data.cache import cached
from svp_bench.data.content import (
    content_digest,
    differences_from_first_use,
    differences_from_manifest,
    joined,
    overlap,
    two_labels,
)
from svp_bench.data.decode import Depth
from svp_bench.data.folds import CrossValidationConfig, with_fold
from svp_bench.data.inspection import Examined
from svp_bench.data.loading import Batch, ImageDataset, Loader, outlive_signals, to_arrays
from svp_bench.data.pixels import PixelCache, Pixels
from svp_bench.data.samplers import EvalBatchSampler, GlobalBatchSampler
from svp_bench.data.sources import DataReport, Images, Source, cpu_count, inspect, measured, need_readable, open_source
from svp_bench.data.transforms import CROP_RATIO, EvalTransform, TransformConfig, sides
from svp_bench.tasks.cards import (
    OTHER_PIXELS,
    ProtocolCard,
    SuiteCard,
    TaskCard,
    displayed_class_names,
    load_protocol,
    load_suite,
    load_task,
)

MEMORY_LIMIT_BYTES = 4 * 2**30  # a list that is larger when decoded is decoded anew in each epoch, by worker processes
# What Lightning warns of and what is meant to be so here: no loader of val, and no workers where nothing is decoded.
_WRONG_GUESSES = (r"Total length of `list` across ranks is zero", r"The '\w+_dataloader' does not have many workers")
_MOST_WORKERS = 1024
_FEW_IMAGES = 512  # below, starting worker processes takes longer than decoding


class VisionDataModule(LightningDataModule):
    """The images of one task under one protocol.

    The Trainer must run with `use_distributed_sampler=False`: the samplers here divide the work themselves.

    Args:
        task: Full name of the task, e.g. "vtab/caltech101" (`svp-bench tasks` lists all).
        root: The folder that holds the task folders; null for $SVP_BENCH_DATA, else `data/`.
        protocol: Name of a protocol card; null for the suite's.
        stage: "final" trains on the protocol's refit split and tests; "select" trains on train and validates on val.
        batch_size: Images for one optimizer step, over all processes and accumulated batches.
        eval_batch_size: Images for one evaluation step over all processes; null for `batch_size`. Results do not
            depend on it, except for rounding.
        num_workers: Worker processes that decode images which are not cached in memory (those of test); "auto" is one
            for each core, at most 8, and none for a small split.
        seed: Seed of the order of the training images.
        drop_last: Leave a smaller last batch out of an epoch, unless it is the only one.
        image_size: Height and width of the images in pixels, or one number for both; null for the protocol's, else
            the backbone's. Not a square: with `transform.resize` squash and without crops.
        pixel_cache: Store the images decoded and resized, for later runs and other processes, below $SVP_BENCH_CACHE,
            else ~/.cache/svp-bench; `svp-bench data cache` lists and removes them. The numbers are the same.
        allow_overlap: Train on custom images although some have the same pixels as images of val or test; records say
            so. Refused by default.
        transform: Settings of the transform without randomness.
        augment: Settings of the random changes of training images.
        cross_validation: Settings of cross-validation, in stage select.

    Attributes:
        card: The task's card.
        suite: The card of its suite.
        protocol: The protocol card.
        num_classes: Number of classes.
        depth: Bits that deep images use; after `setup`.
        class_names: What to call them, in the order of their labels; the data's own names, if any, after `setup`.
        eval_transform: From a stored image to the model's size.
        splits: Role ("train", "val", "test") → name of the split that plays it in this stage.
        content_digests: Split → digest of the decoded pixels of its images, of this stage; after `setup`.
        image_notes: What was skipped or converted → how many images of this stage; after `setup`.
        splits_read: The source's splits that this stage reads: those of `splits`, or the one that folds divide.

    Raises:
        UsageError: If the task, protocol or stage is unknown, or the protocol reads splits that the task has not.
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
        pixel_cache: bool = True,
        allow_overlap: bool = False,
        transform: TransformConfig = TransformConfig(),
        augment: AugmentConfig = AugmentConfig(),
        cross_validation: CrossValidationConfig = CrossValidationConfig(),
    ) -> None:
        super().__init__()
        self._root = None if root is None else Path(root)
        self.card: TaskCard = measured(load_task(task), self._root)
        self.suite: SuiteCard = load_suite(self.card.suite)
        self.protocol: ProtocolCard = load_protocol(protocol or self.suite.protocol)
        if stage not in self.protocol.stages:
            raise unknown_name("stage", stage, self.protocol.stages)
        self.stage, self.cross_validation = stage, cross_validation
        self.splits, self.splits_read = self._splits()
        self.num_classes = self.card.classes
        self.class_names: list[str] = displayed_class_names(self.card)
        self.image_size = self._image_size(image_size)
        self.batch_size = check_range("data.batch_size", batch_size, "[1, inf)")
        self.eval_batch_size = batch_size
        if eval_batch_size is not None:
            self.eval_batch_size = check_range("data.eval_batch_size", eval_batch_size, "[1, inf)")
        self.num_workers = num_workers
        if num_workers != "auto":
            check_range("data.num_workers", num_workers, f"[0, {_MOST_WORKERS}]")
        self.seed = check_range("data.seed", seed, "[0, inf)")
        self.drop_last, self.allow_overlap, self.augment = drop_last, allow_overlap, augment
        self.eval_transform = self._eval_transform(transform)
        self._pixel_cache: PixelCache | None = None
        if pixel_cache:
            self._pixel_cache = PixelCache(self.card.name, self.eval_transform, rank_zero_info, rank_zero_warn)
        self._found: dict[str, Examined] = {}
        self._source: Source | None = None
        self._report: DataReport | None = None
        self.depth = Depth()
        self.content_digests: dict[str, str] = {}
        self.image_notes: dict[str, int] = {}
        self._datasets: dict[str, ImageDataset] = {}
        self._test_unlocked = False

    @classmethod
    def from_config(cls, data: Mapping[str, Any]) -> VisionDataModule:
        """Build the data module of the section `data` of a resolved config."""
        groups = {"transform": TransformConfig, "augment": AugmentConfig, "cross_validation": CrossValidationConfig}
        return cls(**{key: groups[key](**_tuples(value)) if key in groups else value for key, value in data.items()})

    def _splits(self) -> tuple[Mapping[str, str], tuple[str, ...]]:
        """Return the splits of the stage by role, and those that are read from the source."""
        division, final = self.cross_validation, self.protocol.stages["final"]
        if division.folds is not None and self.stage != "select":
            raise ConfigError(
                f"data.cross_validation.folds {division.folds} belongs to data.stage select: a final run trains on the "
                "whole refit split"
            )
        splits = self.protocol.splits(self.stage, division.folds, division.fold, division.seed)
        read = tuple(splits.values()) if division.folds is None else (final["train"],)
        for name in read:
            if name not in self.card.counts:
                role = next((role for role, of in splits.items() if of == name), "the folds of stage 'select'")
                raise UsageError(
                    f"the protocol {self.protocol.name!r} reads the split {name!r} for {role}, "
                    f"which {self.card.name} lacks; it has: {', '.join(self.card.counts)}"
                )
        return splits, read

    def _image_size(self, given: int | tuple[int, int] | None) -> int | tuple[int, int]:
        size = self.protocol.image_size if given is None else given
        if size is None:
            raise ConfigError(
                f"the protocol {self.protocol.name} leaves data.image_size to the backbone; give that of yours "
                "(svp_bench.methods.build.input_size returns it)"
            )
        for side in sides(size):
            check_range("data.image_size", side, "[1, inf)")
        return size

    def _eval_transform(self, config: TransformConfig) -> EvalTransform:
        resize = config.resize or self.protocol.resize
        interpolation = config.interpolation or self.protocol.interpolation
        if config.crop_ratio != CROP_RATIO and resize != "centre_crop" and self.augment.crop != "random":
            raise ConfigError(
                "data.transform.crop_ratio belongs to data.transform.resize centre_crop or data.augment.crop random"
            )
        transform = EvalTransform(self.image_size, resize, interpolation, config.crop_ratio)
        if self.augment.crop is not None:
            transform.side("data.augment.crop")
        return transform

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
            source, report = self.inspect()
            division = self.cross_validation
            if division.folds is not None:
                names = self.splits["train"], self.splits["val"]
                divided = self.card.name, division.folds, division.fold, division.seed
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

    def inspect(self) -> tuple[Source, DataReport]:
        """Open the data, and compare the files of the splits of this stage with the card; decode no image.

        Raises:
            DataError: If they are missing or malformed.
        """
        source = open_source(self.card, self._root, suite=self.suite, protocol=self.protocol)
        return source, inspect(self.card, source, list(self.splits_read))

    def _examine(self, source: Source, report: DataReport) -> DataReport:
        """Decode all images of this stage once: check, count and compare them; return the report with what it adds."""
        names = [*dict.fromkeys(self.splits.values())]
        parts = self._parts_of_refit(source)
        found = {name: self._examined(source.get(name), name in names) for name in [*names, *parts]}
        need_readable([(source.get(name), found[name]) for name in names])
        if any(found[name].problems for name in parts):  # of a stage that this one does not need
            parts = []
        depth = Depth.of(*(_largest(found.values(), name) for name in ("largest_whole", "largest_real")))
        for images in source.splits.values():
            images.depth = depth
        self.content_digests = {name: content_digest(found[name]) for name in names}
        self.depth, self._found = depth, found
        self.image_notes = {f"skipped: {kind}": len(paths) for kind, paths in source.skipped.items()}
        for name in names:
            done = {**found[name].notes, **depth.notes(found[name].whole, found[name].real)}
            for note, count in done.items():
                self.image_notes[note] = self.image_notes.get(note, 0) + count
        notes = self._compare(source, found, parts, report)
        if changed := differences_from_manifest(self.content_digests, source):
            notes.append(changed)
            report = replace(report, manifest_digest=None)
        if self.image_notes:
            first = [path for paths in source.skipped.values() for path in paths][:3]
            rank_zero_warn(
                f"images of {self.card.name}: "
                + ", ".join(f"{note} ({count})" for note, count in self.image_notes.items())
                + (f"; skipped are {', '.join(map(printable, first))} …" if first else "")
            )
        return report if not notes else replace(report, status="different", notes=(*report.notes, *notes))

    def _examined(self, images: Images, needed: bool) -> Examined:
        """Return what examining images finds; in the same pass, those that are needed are decoded for the cache."""
        cache = self._pixel_cache
        if cache is None or not needed or (self._crops and images.name == self.splits["train"]):
            return cached(images, "examined", lambda: images.examine(rank_zero_info))
        return cached(images, "examined", lambda: cache.examine(images))

    @property
    def _crops(self) -> bool:
        """Whether training images are cropped by chance, out of the stored ones."""
        return self.augment.crop is not None

    def _pixels(self, images: Images) -> Pixels | None:
        found = self._found.get(images.name)
        return None if self._pixel_cache is None or found is None else self._pixel_cache.open(images, found)

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
            count, text = overlap(held, train)
            if count:
                self.image_notes[f"images of {held[0].name} that are also in {train[0].name}"] = count
                if self.card.suite == "custom" and not self.allow_overlap:
                    raise DataError(
                        f"{text}; remove them from one of the two, or keep them with --data.allow_overlap true "
                        "(records will say data_status: different)"
                    )
                if not as_pinned:
                    notes.append(text)
        if pairs := two_labels(train):
            self.image_notes[f"images of {train[0].name} that have two labels"] = len(pairs)
        if parts and (difference := joined(train, splits[parts[0]], splits[parts[1]])):
            notes.append(difference)
        return notes

    def compare_with_first_use(self, results_root: Path) -> None:
        """Compare the content of the splits with that of the first run on this task whose records are there.

        The digests of the first run are stored in `content/<task>.json` below the results. Custom datasets are
        distinguished by their digest instead, and synthetic images are not compared; a variant of other pixels
        (`OTHER_PIXELS`) has a file of its own.
        """
        report = self.report
        if self.card.suite == "custom" or report.variant == "synthetic" or self.cross_validation.folds is not None:
            return
        pixels = f".{report.variant}" if report.variant in OTHER_PIXELS else ""
        path = results_root / "content" / f"{self.card.name}{pixels}.json"
        try:
            notes = differences_from_first_use(path, self.content_digests)
        except OSError as error:
            rank_zero_warn(
                f"{path} cannot be written ({error.strerror}): later runs cannot compare their data with these"
            )
            return
        if notes:
            rank_zero_warn(f"{'; '.join(notes)}; records will say data_status: different")
            self._report = replace(report, status="different", notes=(*report.notes, *notes))

    @property
    def report(self) -> DataReport:
        """How the data on disk compare with the card; there after `setup`."""
        if self._report is None:
            raise RuntimeError("the data were not looked at yet; call setup() first")
        return self._report

    def split(self, role: str) -> Images:
        """Return the images of the split that plays a role, after `setup`."""
        if self._source is None:
            raise RuntimeError("the data were not looked at yet; call setup() first")
        return self._source.get(self.splits[role])

    def in_order(self, role: str, size: int) -> Iterator[Batch]:
        """Yield the images of a split in its order, in batches of one size, in this process; after `setup`."""
        dataset = self._dataset(role)
        for start in range(0, len(dataset), size):
            yield dataset[[*range(start, min(start + size, len(dataset)))]]

    def without_augmentation(self, size: int) -> Iterator[Batch]:
        """Yield the training images once, not augmented, in an order that follows from the seed; after `setup`."""
        augmented = self.augment.changes_images
        dataset = ImageDataset(self.split("train"), self.eval_transform) if augmented else self._dataset("train")
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(self.seed)).tolist()
        for start in range(0, len(order), size):
            yield dataset[order[start : start + size]]

    def _dataset(self, role: str) -> ImageDataset:
        """Return the images of a role: cached on disk, else in memory unless they are for test or too many."""
        if role not in self._datasets:
            images = self.split(role)
            augmenter = None
            if role == "train" and self.augment.changes_images:
                augmenter = Augmenter(self.augment, self.eval_transform, self.seed)
            cropped = role == "train" and self._crops
            pixels = None if cropped else self._pixels(images)
            bytes_decoded = len(images) * 3 * math.prod(self.eval_transform.sides)
            keep = role != "test" and not cropped and bytes_decoded <= MEMORY_LIMIT_BYTES
            if role != "test" and not cropped and not keep and pixels is None:
                rank_zero_info(
                    f"{images.name} would take {bytes_decoded / 2**30:.1f} GiB decoded; its images are decoded "
                    f"anew in each epoch"
                )
            self._datasets[role] = ImageDataset(images, self.eval_transform, augmenter, keep, pixels)
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
            repeats=self.augment.repeats,
            pairs=self.augment.mixes,
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

    def _loader(self, dataset: ImageDataset, sampler: GlobalBatchSampler | EvalBatchSampler) -> DataLoader[Batch]:
        workers = 0 if dataset.ready_made else self._workers(len(dataset))
        return Loader(
            dataset,
            sampler=sampler,
            batch_size=None,  # the sampler yields whole batches, and the data set takes them
            num_workers=workers,
            persistent_workers=workers > 0 and isinstance(sampler, GlobalBatchSampler),
            collate_fn=to_arrays if workers else None,  # type: ignore[arg-type]  # of whole batches, see batch_size
            worker_init_fn=outlive_signals,
            pin_memory=torch.cuda.is_available() and not workers,  # else `Loader` pins what comes from the workers
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
        count = len(self.split(role))
        world_size, _, accumulated = self._processes()
        if role != "train":
            in_one_step = math.ceil((batch_size or self.eval_batch_size) / world_size) * world_size
            return math.ceil(count / (math.ceil(count / in_one_step) * world_size))  # as EvalBatchSampler cuts the list
        batch_size, accumulate = batch_size or self.batch_size, accumulate or accumulated
        self._check_batch_size(count, batch_size, accumulate)
        unit = 2 if self.augment.mixes else 1  # mixed images stay in pairs
        units = math.ceil(min(batch_size, count) / unit)
        return min(unit * math.ceil(math.ceil(units / accumulate) / world_size), batch_size, count)

    def _check_batch_size(self, count: int, batch_size: int | None = None, accumulate: int | None = None) -> None:
        """Refuse a batch size that cannot be shared out so that every process has images in every step."""
        world_size, _, accumulated = self._processes()
        batch_size, accumulate = batch_size or self.batch_size, accumulate or accumulated
        parts = world_size * accumulate
        given = f"data.batch_size {batch_size}"
        shared = (
            f"{plural(world_size, 'process')} x {plural(accumulate, 'accumulated batch')} = {plural(parts, 'part')}"
        )
        least = parts  # images that a batch needs
        if self.augment.mixes and parts > 1:
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


def _tuples(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}


def _largest(found: Iterable[Examined], name: str) -> float | None:
    return max((value for one in found if (value := getattr(one, name)) is not None), default=None)
