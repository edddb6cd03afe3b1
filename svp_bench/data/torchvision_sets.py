"""Reader: data sets through torchvision, from where they lie; nothing is downloaded."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.core.errors import CardError, DataError, UnavailableError, plural, unknown_name
from svp_bench.data.locate import find_folder
from svp_bench.data.reading import (
    all_of,
    any_of,
    foreign_errors,
    list_names,
    need_regular,
    optional_import,
    reader_options,
    show,
    synthetic_notes,
    whole_numbers,
)
from svp_bench.data.sources import ArrayImages, FileImages, Images, Source
from svp_bench.data.split_files import ImageList, plain_path
from svp_bench.tasks.cards import SuiteCard, TaskCard, class_names

__all__ = ["TORCHVISION_SETS", "TorchvisionSet", "open_torchvision"]

_Labels = npt.NDArray[np.int64]
_KNOWN_VERSIONS = "0.21 to 0.29"  # whose data sets keep what is read here where it is read
_BEFORE = "0.30"


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set class of torchvision.

    Attributes:
        files: What its root folder holds when the data set is there.
        splits: "train", "test" and, where it has one, "val" → the arguments for it.
        content: Returns its images, uint8 (N, H, W, 3) or a list of their files, and their labels.
        look: Reads the file of a synthetic split, whose checksum cannot match.
        downloads: Splits that are downloaded each for itself; one of them brings all where this is one.
        needs: Packages that torchvision imports only to read this one.
    """

    files: tuple[str, ...]
    splits: Mapping[str, Mapping[str, object]]
    content: Callable[[Any], tuple[Any, Any]]
    look: Callable[[Any, Path], None] = lambda dataset_class, folder: None
    downloads: tuple[str, ...] = ("train",)
    needs: tuple[str, ...] = ()


def _attribute(dataset: Any, name: str) -> Any:
    """Return what torchvision keeps of a data set; some of it has no public name.

    Raises:
        UnavailableError: If this version of torchvision keeps it elsewhere.
    """
    try:
        return getattr(dataset, name)
    except AttributeError:
        import torchvision  # type: ignore[import-untyped]

        raise UnavailableError(
            f"torchvision {torchvision.__version__} keeps no {name!r} of {type(dataset).__name__}; versions "
            f"{_KNOWN_VERSIONS} do: pip install 'torchvision<{_BEFORE}'"
        ) from None


def _files_of(dataset: Any) -> tuple[Any, Any]:
    return _attribute(dataset, "_image_files"), _attribute(dataset, "_labels")


def _arrays_of(labels: str) -> Callable[[Any], tuple[Any, Any]]:
    return lambda dataset: (_attribute(dataset, "data"), _attribute(dataset, labels))


def _svhn_of(dataset: Any) -> tuple[Any, Any]:
    pixels, labels = _arrays_of("labels")(dataset)
    return pixels.transpose(0, 2, 3, 1), labels


def _gtsrb_of(dataset: Any) -> tuple[Any, Any]:
    # torchvision numbers the folders that it finds, which shifts all labels if one is missing; their names are the ids.
    samples = _attribute(dataset, "_samples")
    files, labels = [Path(path) for path, _ in samples], [label for _, label in samples]
    for file, label in zip(files, labels, strict=True):
        if file.parent.name.isdigit() and int(file.parent.name) != label:
            raise DataError(f"{file}: torchvision labels it {label}: a class folder before it is missing; get all")
    return files, labels


class _ArraysOnly(pickle.Unpickler):
    """Refuses everything but plain values and numpy arrays."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
            *(
                (f"numpy.{core}.{place}", name)
                for core in ("core", "_core")
                for place, name in (("multiarray", "_reconstruct"), ("numeric", "_frombuffer"))
            ),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._ALLOWED:
            raise DataError(f"the pickle asks for {module}.{name}; only plain values and arrays are read")
        return super().find_class(module, name)


def _refuse_code(dataset_class: Any, folder: Path) -> None:
    """Look through the pickles that torchvision would load: the checksums were what made that safe."""
    lists = [file for attribute in ("train_list", "test_list") for file, _ in getattr(dataset_class, attribute)]
    for name in (*lists, dataset_class.meta["filename"]):
        path = folder / dataset_class.base_folder / name
        with foreign_errors(path, "draw the data again"), open(path, "rb") as file:
            try:
                _ArraysOnly(file, encoding="latin1").load()
            except DataError as error:
                raise DataError(f"{path}: {error}") from None


def _refuse_fractions(dataset_class: Any, folder: Path) -> None:
    """Look at the labels that torchvision would round."""
    loadmat = optional_import("scipy.io", "scipy", "reading MATLAB's files").loadmat
    for _, name, _ in dataset_class.split_list.values():
        path = folder / name
        if path.is_file():
            with foreign_errors(path, "draw the data again"):
                labels = loadmat(path, variable_names="y")["y"]
            whole_numbers(labels, f"{path}: y holds")


_CIFAR_SPLITS: Mapping[str, Mapping[str, object]] = {"train": {"train": True}, "test": {"train": False}}
_SPLITS: Mapping[str, Mapping[str, object]] = {"train": {"split": "train"}, "test": {"split": "test"}}

# Keyed by torchvision's class.
TORCHVISION_SETS: Mapping[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(("cifar-10-batches-py",), _CIFAR_SPLITS, _arrays_of("targets"), _refuse_code),
    "CIFAR100": TorchvisionSet(("cifar-100-python",), _CIFAR_SPLITS, _arrays_of("targets"), _refuse_code),
    "DTD": TorchvisionSet(("dtd/dtd",), {**_SPLITS, "val": {"split": "val"}}, _files_of),
    "Food101": TorchvisionSet(("food-101",), _SPLITS, _files_of),
    "GTSRB": TorchvisionSet(("gtsrb/GTSRB",), _SPLITS, _gtsrb_of, downloads=("train", "test")),
    "SVHN": TorchvisionSet(
        ("train_32x32.mat", "test_32x32.mat"), _SPLITS, _svhn_of, _refuse_fractions, ("train", "test"), ("scipy",)
    ),
}
_VAL_RULES = ("last", "hashed", "official")


def open_torchvision(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read a data set through torchvision, from where it lies; nothing is downloaded.

    Options: `set`, torchvision's class; `val`, how the official training images are shared out between train (the
    first four fifths, rounded down) and val:

    - `last`: in file order;
    - `hashed`: in ascending order of the SHA-256 of each image's path (relative to torchvision's root, with slashes):
      a fixed permutation that depends on no library. With `together: TEXT`, the hash is taken of the path before its
      last TEXT, and the path itself decides between equal ones, so that images that share that beginning stay
      together (but for the one group where the cut falls);
    - `official`: the data set has a val list of its own;

    and `refit` (see `list_names`). A split holds its images in file order. Files whose checksum
    torchvision knows must have it, unless the folder is marked as synthetic: then they are read instead, and a
    pickle that would run code is refused.

    Raises:
        CardError: If an option or list is unknown or missing.
        DataError: If the data are missing, damaged or have labels out of range; names the download command.
        UnavailableError: If torchvision (or scipy, for SVHN) is not installed, or is of a version that is not known.
    """
    options = reader_options(card, {"set": str, "val": str, "together": str, "refit": str})
    refit = list_names(card, options)
    name, rule = str(options.get("set", "")), str(options.get("val", ""))
    if name not in TORCHVISION_SETS:
        raise unknown_name("data set of torchvision", name, TORCHVISION_SETS, where=f"{card.path}:1", error=CardError)
    if rule not in _VAL_RULES:
        raise unknown_name("rule for val", rule, _VAL_RULES, where=f"{card.path}:1", error=CardError)
    known = TORCHVISION_SETS[name]
    if (rule == "official") != ("val" in known.splits):
        has = "has a val list of its own" if "val" in known.splits else "has no val list of its own"
        raise CardError(f"{card.path}:1: the rule for val is {rule!r}, but {name} {has}")

    remedy = f"them with `{_download_command(name, known, (root or Path('data')) / card.folder)}`"
    forms = [all_of(known.files), any_of(known.files)]
    folder = find_folder(card, suite, root, forms, " and ".join(known.files), remedy, shared=True)
    notes = synthetic_notes(folder)
    dataset_class = getattr(optional_import("torchvision.datasets", "torchvision", f"reading {card.name}"), name)
    for package in known.needs:
        optional_import(package, package, f"reading {card.name}")
    if notes:
        known.look(dataset_class, folder)
        dataset_class = _without_checksums(dataset_class)

    for path in known.files:  # torchvision opens what is there
        place = folder / path
        for file in [place, *place.iterdir()] if place.is_dir() else [place]:
            if file.exists() and not file.is_dir():
                need_regular(file)
    pools = {}
    again = f"get it again with `{_download_command(name, known, folder)}`"
    for split, arguments in known.splits.items():
        with foreign_errors(folder, again):
            dataset = dataset_class(str(folder), download=False, **arguments)
        content, labels = known.content(dataset)
        names = getattr(dataset, "classes", None)
        pools[split] = _Pool.of(card, folder, f"{name} {split}", content, labels, names)
    if rule == "official":
        train, val = np.arange(len(pools["train"].labels)), np.arange(len(pools["val"].labels))
        pools["train"] = pools["train"].joined(pools["val"])
        val += len(train)
    else:
        train, val = _four_fifths(pools["train"], rule, options.get("together"), card)
    positions = {"train": train, "val": val, "trainval": np.sort(np.concatenate([train, val]))}
    positions["refit"] = positions[refit]
    lists = {
        name: pools["train"].take(name, positions[name])
        if name in positions
        else pools["test"].take(name, np.arange(len(pools["test"].labels)))
        for name in card.counts
    }
    return Source(str(folder), lists, notes, bool(notes), "card")


@dataclass(frozen=True)
class _Pool:
    """The images of one official list: files below `folder`, or an array."""

    folder: Path
    what: str
    paths: tuple[str, ...] | None
    pixels: npt.NDArray[np.uint8] | None
    labels: _Labels

    @classmethod
    def of(cls, card: TaskCard, folder: Path, what: str, content: Any, given: Any, names: list[str] | None) -> _Pool:
        labels = whole_numbers(given, f"{what} in {folder}: its labels hold")
        if not len(labels) or len(labels) != len(content):
            raise DataError(f"{what} in {folder}: {plural(len(content), 'image')} and {plural(len(labels), 'label')}")
        listed = class_names(card)
        by_name = names is not None and listed is not None  # torchvision numbers the classes that it finds
        classes = len(names) if by_name and names is not None else card.classes
        outside = labels[(labels < 0) | (labels >= classes)]
        if outside.size:
            whose = f"{what} has" if by_name else f"the card of {card.name} has"
            raise DataError(
                f"{what} in {folder}: label {outside[0]} is out of range, {whose} {plural(classes, 'class')} "
                f"(0..{classes - 1})"
            )
        if names is not None and listed is not None:
            strange = [name for name in names if name not in listed]
            if strange:
                raise DataError(f"{what} in {folder} has a class {show(strange[0])} that {card.class_names} lacks")
            labels = np.array([listed.index(name) for name in names], dtype=np.int64)[labels]
        if isinstance(content, np.ndarray):
            if content.dtype != np.uint8 or content.ndim != 4 or content.shape[3] != 3:
                raise DataError(
                    f"{what} in {folder}: its images are {content.dtype} {content.shape}, expected uint8 (N, H, W, 3)"
                )
            return cls(folder, what, None, content, labels)
        return cls(folder, what, tuple(_below(folder, path, what) for path in content), None, labels)

    def joined(self, other: _Pool) -> _Pool:
        labels = np.concatenate([self.labels, other.labels])
        return _Pool(self.folder, self.what, (*(self.paths or ()), *(other.paths or ())), None, labels)

    def take(self, name: str, positions: npt.NDArray[np.int64]) -> Images:
        if self.paths is None:
            assert self.pixels is not None
            return ArrayImages(name, self.pixels, self.labels, positions, f"{self.what} image")
        Image.init()  # all formats, before threads race for the rarer ones
        paths = tuple(self.paths[position] for position in positions.tolist())
        return FileImages(self.folder, name, ImageList(paths, self.labels[positions]), f"{self.what} ({name})")


def _below(folder: Path, path: object, what: str) -> str:
    try:
        relative = Path(str(path)).relative_to(folder)
    except ValueError:
        raise DataError(f"{what} in {folder}: {show(str(path))} lies elsewhere; get it again") from None
    return plain_path(relative.as_posix(), f"{what} in {folder}")


def _four_fifths(
    pool: _Pool, rule: str, together: object, card: TaskCard
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    count = len(pool.labels)
    order = np.arange(count)
    if rule == "hashed":
        if pool.paths is None:
            raise CardError(f"{card.path}:1: the rule 'hashed' is for data sets of files, {pool.what} is an array")
        keys = []
        for path in pool.paths:
            head = path.rpartition(together)[0] if isinstance(together, str) and together else path
            keys.append((hashlib.sha256((head or path).encode()).hexdigest(), path))
        order = np.array(sorted(range(count), key=keys.__getitem__), dtype=np.int64)
    cut = count * 4 // 5
    if not 0 < cut < count:
        raise DataError(f"{pool.what} in {pool.folder}: {plural(count, 'image')} are too few for train and val")
    return np.sort(order[:cut]), np.sort(order[cut:])


def _download_command(name: str, known: TorchvisionSet, folder: Path) -> str:
    if len(known.downloads) == 1:
        call = f"{name}('{folder}', download=True)"
    else:
        call = f"[{name}('{folder}', split=s, download=True) for s in {known.downloads}]"
    return f'python -c "from torchvision.datasets import {name}; {call}"'


def _without_checksums(dataset_class: Any) -> Any:
    """Return the class for synthetic data, whose checksums differ from the real ones.

    torchvision takes a checksum of None for "any"; that is the whole change. What it would read is looked through
    before.
    """
    changes: dict[str, Any] = {}
    for attribute in ("train_list", "test_list"):
        if hasattr(dataset_class, attribute):
            changes[attribute] = [[file, None] for file, _ in getattr(dataset_class, attribute)]
    if hasattr(dataset_class, "meta"):
        changes["meta"] = {**dataset_class.meta, "md5": None}
    if hasattr(dataset_class, "split_list"):
        changes["split_list"] = {split: [url, file, None] for split, (url, file, _) in dataset_class.split_list.items()}
    return type(dataset_class.__name__, (dataset_class,), changes) if changes else dataset_class
