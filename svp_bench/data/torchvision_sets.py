"""Reader: data sets through torchvision, from where they lie; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from svp_bench.core.errors import CardError, DataError, UnavailableError, plural, show
from svp_bench.data.locate import locate
from svp_bench.data.reading import (
    Positions,
    Refit,
    foreign_errors,
    is_synthetic,
    need_regular,
    reader_options,
    split_positions,
    whole_numbers,
)
from svp_bench.data.sources import ArrayImages, FileImages, Images, Source, read_split_files
from svp_bench.data.split_files import ImageList, plain_path
from svp_bench.tasks.cards import SuiteCard, TaskCard, class_names


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set class of torchvision.

    Attributes:
        files: What its root folder holds when the data set is there.
        splits: "train", "test" and, where it has one, "val" → the arguments for it.
        content: Returns its images, uint8 (N, H, W, 3) or a list of their files, and their labels.
        downloads: Splits that are downloaded each for itself; one of them brings all where this is one.
    """

    files: tuple[str, ...]
    splits: Mapping[str, Mapping[str, object]]
    content: Callable[[Any], tuple[Any, Any]]
    downloads: tuple[str, ...] = ("train",)

    def download_command(self, name: str, folder: Path) -> str:
        """Return the shell command that downloads the data set, torchvision's class `name`, to a folder."""
        call = f"{name}('{folder}', download=True)"
        if len(self.downloads) > 1:
            call = f"[{name}('{folder}', split=s, download=True) for s in {self.downloads}]"
        return f'python -c "from torchvision.datasets import {name}; {call}"'


def _gtsrb(dataset: Any) -> tuple[Any, Any]:
    # torchvision numbers the folders that it finds, which shifts all labels if one is missing; their names are the ids.
    files, labels = [Path(path) for path, _ in dataset._samples], [label for _, label in dataset._samples]
    for file, label in zip(files, labels, strict=True):
        if file.parent.name.isdigit() and int(file.parent.name) != label:
            raise DataError(f"{file}: torchvision labels it {label}: a class folder before it is missing; get all")
    return files, labels


_CIFAR_SPLITS: Mapping[str, Mapping[str, object]] = {"train": {"train": True}, "test": {"train": False}}
_SPLITS: Mapping[str, Mapping[str, object]] = {"train": {"split": "train"}, "test": {"split": "test"}}


def _cifar(dataset: Any) -> tuple[Any, Any]:
    return dataset.data, dataset.targets


def _files(dataset: Any) -> tuple[Any, Any]:
    return dataset._image_files, dataset._labels


# Keyed by torchvision's class.
TORCHVISION_SETS: Mapping[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(("cifar-10-batches-py",), _CIFAR_SPLITS, _cifar),
    "CIFAR100": TorchvisionSet(("cifar-100-python",), _CIFAR_SPLITS, _cifar),
    "DTD": TorchvisionSet(("dtd/dtd",), {**_SPLITS, "val": {"split": "val"}}, _files),
    "Food101": TorchvisionSet(("food-101",), _SPLITS, _files),
    "GTSRB": TorchvisionSet(("gtsrb/GTSRB",), _SPLITS, _gtsrb, downloads=("train", "test")),
    "SVHN": TorchvisionSet(
        ("train_32x32.mat", "test_32x32.mat"),
        _SPLITS,
        lambda dataset: (dataset.data.transpose(0, 2, 3, 1), dataset.labels),
        downloads=("train", "test"),
    ),
}


@dataclass(frozen=True)
class _Options:
    set: Literal["CIFAR10", "CIFAR100", "DTD", "Food101", "GTSRB", "SVHN"]
    val: Literal["last", "hashed", "official"]
    together: str = ""
    refit: Refit = "trainval"


def open_torchvision(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read a data set through torchvision; nothing is downloaded.

    Options: `set`, torchvision's class; `val`, how the official training images are divided into train (the first four
    fifths, rounded down) and val:

    - `last`: in file order;
    - `hashed`: in ascending order of the SHA-256 of each image's path (relative to torchvision's root, with slashes):
      a fixed permutation that depends on no library. With `together: TEXT`, the hash is taken of the path before its
      last TEXT, and the path itself decides between equal ones, so that images that share that beginning stay
      together (but for the one group where the cut falls);
    - `official`: the data set has a val split of its own;

    and `refit`, the split that is meant by "refit". A split holds its images in file order. Files whose checksum
    torchvision knows must have it, which also makes its pickles safe to load.

    Raises:
        CardError: If an option or split is unknown or missing.
        DataError: If the data are missing, damaged or have labels out of range; names the download command.
    """
    options = reader_options(card, _Options)
    name, known, official = options.set, TORCHVISION_SETS[options.set], options.val == "official"
    if official != ("val" in known.splits):
        has = "has a val list of its own" if "val" in known.splits else "has no val list of its own"
        raise CardError(f"{card.path}:1: the rule for val is {options.val!r}, but {name} {has}")

    remedy = f"them with `{known.download_command(name, (root or Path('data')) / card.folder)}`"
    folder = locate(card, suite, root, [known.files], remedy, shared=True)
    if is_synthetic(folder):
        return read_split_files(card, folder)
    from torchvision import datasets  # type: ignore[import-untyped]

    dataset_class = getattr(datasets, name)
    for path in known.files:  # torchvision opens what is there
        place = folder / path
        for file in [place, *place.iterdir()] if place.is_dir() else [place]:
            if file.exists() and not file.is_dir():
                need_regular(file)
    pools = {}
    again = f"get it again with `{known.download_command(name, folder)}`"
    for split, arguments in known.splits.items():
        with foreign_errors(folder, again):
            dataset = dataset_class(str(folder), download=False, **arguments)
        try:
            content, labels = known.content(dataset)
        except AttributeError as error:  # some of what is read has no public name
            raise UnavailableError(
                f"{error}; install a torchvision that has it: pip install 'torchvision<0.30'"
            ) from None
        names = getattr(dataset, "classes", None)
        pools[split] = _Pool.of(card, folder, f"{name} {split}", content, labels, names)
    train, test = pools["train"], pools["test"]
    if official:
        count, train = len(train.labels), train.joined(pools["val"])
        first, second = np.split(np.arange(len(train.labels)), [count])
    else:
        first, second = _four_fifths(train, options, card)
    splits = split_positions(first, second, np.arange(len(test.labels)), options.refit)
    images = {name: (test if name == "test" else train).take(name, splits[name]) for name in card.counts}
    return Source(str(folder), images, variant="card", folder=folder)


@dataclass(frozen=True)
class _Pool:
    """The images of one official split: an array, or paths below `folder`."""

    folder: Path
    what: str
    images: npt.NDArray[np.uint8] | tuple[str, ...]
    labels: npt.NDArray[np.int64]

    @classmethod
    def of(cls, card: TaskCard, folder: Path, what: str, content: Any, given: Any, names: list[str] | None) -> _Pool:
        where = f"{what} in {folder}"
        labels = whole_numbers(given, f"{where}: its labels hold")
        if not len(labels) or len(labels) != len(content):
            raise DataError(f"{where}: {plural(len(content), 'image')} and {plural(len(labels), 'label')}")
        listed = class_names(card)
        classes, whose = card.classes, f"the card of {card.name}"
        if names is not None and listed is not None:  # torchvision numbers the classes that it finds
            classes, whose = len(names), what
            if strange := [name for name in names if name not in listed]:
                raise DataError(f"{where} has a class {show(strange[0])} that {card.class_names} lacks")
        outside = labels[(labels < 0) | (labels >= classes)]
        if outside.size:
            has = f"{whose} has {plural(classes, 'class')} (0..{classes - 1})"
            raise DataError(f"{where}: label {outside[0]} is out of range, {has}")
        if names is not None and listed is not None:
            labels = np.array([listed.index(name) for name in names], dtype=np.int64)[labels]
        if isinstance(content, np.ndarray):
            return cls(folder, what, content, labels)
        paths = (Path(path).relative_to(folder).as_posix() for path in content)
        return cls(folder, what, tuple(plain_path(path, where) for path in paths), labels)

    def joined(self, other: _Pool) -> _Pool:
        labels = np.concatenate([self.labels, other.labels])
        return replace(self, images=(*self.images, *other.images), labels=labels)

    def take(self, name: str, positions: Positions) -> Images:
        if isinstance(self.images, np.ndarray):
            return ArrayImages(name, self.images, self.labels, positions, f"{self.what} image")
        paths = tuple(self.images[position] for position in positions.tolist())
        return FileImages(self.folder, name, ImageList(paths, self.labels[positions]), f"{self.what} ({name})")


def _four_fifths(pool: _Pool, options: _Options, card: TaskCard) -> list[Positions]:
    count = len(pool.labels)
    order = np.arange(count)
    if options.val == "hashed":
        if isinstance(pool.images, np.ndarray):
            raise CardError(f"{card.path}:1: the rule 'hashed' is for data sets of files, {pool.what} is an array")
        keys = []
        for path in pool.images:
            head = path.rpartition(options.together)[0] if options.together else path
            keys.append((hashlib.sha256((head or path).encode()).hexdigest(), path))
        order = np.array(sorted(range(count), key=keys.__getitem__), dtype=np.int64)
    return [np.sort(part) for part in np.split(order, [count * 4 // 5])]
