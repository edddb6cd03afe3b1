"""Readers of published splits: JSON files of paths and class ids, a data set's own files, and what torchvision reads.

The lists that these readers know, the same for both:

- `train`, `val`, `test`;
- `trainval`: train and val together;
- `refit`: the training list of stage final where it is not `trainval` on every card of a suite. The card's option
  `refit` says which of `train` and `trainval` it is.

No picture is ever in `train` and in `val`, and none of `test` in the others.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import pickle
import reprlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from svp_bench.cards import SuiteCard, TaskCard, class_names
from svp_bench.data.lists import PictureList, check_path
from svp_bench.data.locate import find_folder
from svp_bench.data.sources import DRAWN_MARK, ArrayPictures, FilePictures, Pictures, Source, reader_options
from svp_bench.errors import CardError, DataError, SvpBenchError, UnavailableError, unknown_name

__all__ = [
    "NATIVE_FORMS",
    "TORCHVISION_SETS",
    "NativeForm",
    "TorchvisionSet",
    "open_json_split",
    "open_torchvision",
    "optional_import",
]

_LISTS = ("train", "val", "trainval", "test", "refit")
_REFITS = ("train", "trainval")
_Ids = dict[str, int]  # path of a picture -> class id, in the order of the list
_Labels = npt.NDArray[np.int64]


def optional_import(module: str, package: str, what: str) -> Any:
    """Import a module that not every installation has.

    Args:
        module: Its name.
        package: What to install for it.
        what: What needs it, for the message.

    Raises:
        UnavailableError: If it cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        reason = " ".join(str(error).split())
        raise UnavailableError(f"{what} needs {package} ({reason}); install it: pip install {package}") from None


def _list_names(card: TaskCard, options: Mapping[str, Any]) -> str:
    """Check the card's list names and its option `refit`; return what `refit` stands for."""
    reader = card.reader.kind
    for name in card.counts:
        if name not in _LISTS:
            raise unknown_name(f"list of the reader {reader!r}", name, _LISTS, where=f"{card.path}:1", error=CardError)
    refit = options.get("refit", "trainval")
    if refit not in _REFITS:
        raise unknown_name("list to refit on", refit, _REFITS, where=f"{card.path}:1", error=CardError)
    if "refit" in options and "refit" not in card.counts:
        raise CardError(f"{card.path}:1: the option 'refit' is given, but counts has no list 'refit'")
    return str(refit)


def _drawn_notes(folder: Path) -> tuple[str, ...]:
    return (f"the pictures in {folder} are drawn, not real",) if (folder / DRAWN_MARK).exists() else ()


# --- JSON splits -----------------------------------------------------------------------------------------------------

_SPLIT_FILES = ("train.json", "val.json", "test.json")
_PICTURE_ROOTS = ("images", "Images", "")
_ROOT_PROBES = 100  # listed pictures that are looked for to find what their paths are relative to
_VAL_EVERY = 10  # of a data set that has no val list of its own
_OFFICIAL = "official"  # the variant of a card that the data set's own files make


def open_json_split(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read `train.json`, `val.json` and `test.json`, each one object of picture path → class id, beside the pictures.

    Labels: the distinct ids of train.json in ascending order are 0, 1, …, and that one map serves all lists (a map
    built anew for each file, as released loaders do, shifts where a file lacks a class). Ids are whole numbers or texts
    of digits. Pictures of val.json are taken out of `train`, also where train.json repeats them; `trainval` is train
    and val together. Paths are relative to `images`, `Images` or the folder itself.

    Where none of the three files is there but the data set's own are (option `native`), these are read: the official
    training and test lists, and as `val` the official one or else every tenth of the official training pictures, in
    official order. That is the card's variant `official`, and never mixes with the JSON split.

    Source of the format: M. Jia et al., Visual Prompt Tuning, ECCV 2022, and its released splits.

    Raises:
        CardError: If a list name or an option is unknown.
        DataError: If no folder is found, a file is missing or malformed, an id is not in train.json, there are more
            ids than classes, or a test picture is also one of training.
        UnavailableError: If the data set's own files are MATLAB's, and scipy is not installed.
    """
    options = reader_options(card, {"native": str, "refit": str})
    refit = _list_names(card, options)
    native = None
    if "native" in options:
        if options["native"] not in NATIVE_FORMS:
            raise unknown_name(
                "native form", str(options["native"]), NATIVE_FORMS, where=f"{card.path}:1", error=CardError
            )
        if _OFFICIAL not in card.variants:
            raise CardError(f"{card.path}:1: the option 'native' needs the counts of the variant {_OFFICIAL!r}")
        native = NATIVE_FORMS[str(options["native"])]

    files = _SPLIT_FILES if native is None else (*_SPLIT_FILES, *native.files)
    forms: list[Callable[[Path], bool]] = [_all_of(_SPLIT_FILES), _any_of(_SPLIT_FILES)]
    if native is not None:
        forms += [_all_of(native.files), _any_of(native.files)]
    also = f", or its own {_and(native.files)}," if native else ""
    remedy = (
        f"{_and(_SPLIT_FILES)} of the VPT split (links in the README of https://github.com/KMnP/vpt){also} beside the "
        f"pictures of {card.source}"
    )
    folder = find_folder(card, suite, root, forms, " or ".join(files), remedy)

    if native is None or _any_of(_SPLIT_FILES)(folder):
        missing = [name for name in _SPLIT_FILES if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} has a JSON split without {_and(missing)}; get {remedy}")
        parts = [_read_json(folder / name) for name in _SPLIT_FILES]
        listings, variant = [str(folder / name) for name in _SPLIT_FILES], "card"
    else:
        missing = [name for name in native.files if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {_and(missing)}; get {remedy}")
        train, val, test = native.read(folder)
        if val is None:
            val = {path: train[path] for path in list(train)[_VAL_EVERY - 1 :: _VAL_EVERY]}
        parts, listings, variant = [train, val, test], [str(folder / native.files[0])] * 3, _OFFICIAL
    return _split_source(card, folder, parts, listings, refit, variant)


def _split_source(
    card: TaskCard, folder: Path, parts: list[_Ids], listings: list[str], refit: str, variant: str
) -> Source:
    """Make the lists of a split from its three parts; `listings` says for each where it was read."""
    train, val, test = parts
    labels = {class_id: label for label, class_id in enumerate(sorted({*train.values()}))}
    if len(labels) > card.classes:
        raise DataError(f"{listings[0]}: {len(labels)} classes, but the card of {card.name} has {card.classes}")
    for part, listing in zip(parts[1:], listings[1:], strict=True):
        for path, class_id in part.items():
            if class_id not in labels:
                raise DataError(f"{listing}: class id {class_id} of {_show(path)} is not among those of {listings[0]}")
            if train.get(path, class_id) != class_id:
                raise DataError(f"{listing}: {_show(path)} has class id {class_id}, in {listings[0]} {train[path]}")
    leaked = [path for path in test if path in train or path in val]
    if leaked:
        raise DataError(
            f"{listings[2]}: {len(leaked)} test pictures are also listed for training, the first is "
            f"{_show(leaked[0])}; get the split again"
        )
    lists = {
        "train": {path: class_id for path, class_id in train.items() if path not in val},
        "val": val,
        "trainval": {**train, **val},  # a picture of both keeps its place in train
        "test": test,
    }
    if not lists["train"]:
        raise DataError(f"{listings[0]}: all its pictures are also in {listings[1]}; none is left to train on")
    lists["refit"] = lists[refit]

    notes = list(_drawn_notes(folder))
    if len(labels) < card.classes:
        notes.append(f"{listings[0]} has {len(labels)} classes, the card says {card.classes}")
    pictures_root = _pictures_root(folder, [*train, *test], listings[0])
    listing_of = {"val": listings[1], "test": listings[2]}
    Image.init()  # all formats, before threads race for the rarer ones
    pictures: dict[str, Pictures] = {}
    for name in card.counts:
        ids = lists[name]
        label_array = np.array([labels[class_id] for class_id in ids.values()], dtype=np.int64)
        listed_in = listing_of.get(name, listings[0])
        pictures[name] = FilePictures(pictures_root, name, PictureList(tuple(ids), label_array), listed_in)
    drawn = (folder / DRAWN_MARK).exists()
    return Source(str(folder), pictures, tuple(notes), drawn, variant)


def _pictures_root(folder: Path, paths: list[str], listing: str) -> Path:
    probes = paths[:: max(1, len(paths) // _ROOT_PROBES)]
    roots = [folder / name for name in _PICTURE_ROOTS]
    for root in roots:
        if any((root / path).is_file() for path in probes):
            return root
    raise DataError(
        f"{listing}: its pictures are in none of {', '.join(map(str, roots))} (looked for {len(probes)} of them, "
        f"the first is {_show(paths[0])}); unpack the pictures there"
    )


def _read_json(path: Path) -> _Ids:
    """Read one file of a split."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise DataError(f"{path}: {_show(twice)} is listed twice")
        return entries

    try:
        entries = json.loads(path.read_bytes(), object_pairs_hook=unique)
    except OSError as error:
        raise DataError(f"{path}: the split cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise DataError(f"{path}: not JSON ({' '.join(str(error).split())}); get the split again") from None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path}: found {_show(entries)}, expected one object of picture path -> class id")
    ids: _Ids = {}
    for picture, class_id in entries.items():
        check_path(picture, str(path))
        ids[picture] = _class_id(class_id, f"{path}: class id of {_show(picture)}")
    return ids


def _class_id(value: object, what: str) -> int:
    # Texts by their value: "002" < "010" either way, and the labels do not depend on how ids were written.
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise DataError(f"{what} is {_show(value)}, expected a whole number or a text of digits")


def _show(value: object) -> str:
    shown = reprlib.Repr()
    shown.maxstring = 80
    return shown.repr(value)


def _and(names: Iterable[str]) -> str:
    *some, last = names
    return f"{', '.join(some)} and {last}" if some else last


def _all_of(names: Iterable[str]) -> Callable[[Path], bool]:
    return lambda place: all((place / name).exists() for name in names)


def _any_of(names: Iterable[str]) -> Callable[[Path], bool]:
    return lambda place: any((place / name).exists() for name in names)


# --- a data set's own files ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NativeForm:
    """How a data set itself says which pictures it has.

    Attributes:
        files: The files that say it, below the data set's folder.
        read: Reads them: folder → training, val (None if it has none) and test pictures, as path → class id.
        pictures: Folder of the pictures in the data set's folder, "" if the paths begin at the latter.
        path: Form of a path, for drawing: of `number` and `class_id`.
    """

    files: tuple[str, ...]
    read: Callable[[Path], tuple[_Ids, _Ids | None, _Ids]]
    pictures: str
    path: str


_TEXT_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def _read_text_files(folder: Path) -> tuple[_Ids, _Ids | None, _Ids]:
    """Read CUB-200-2011's and NABirds' files: lines `<picture id> <path | class id | 1 for training>`."""
    columns = []
    for name in _TEXT_FILES:
        column: dict[str, str] = {}
        for number, line in _lines(folder / name):
            key, _, value = line.partition(" ")
            if not value.strip() or key in column:
                what = "the id is given twice" if key in column else "expected `<picture id> <value>`"
                raise DataError(f"{folder / name}:{number}: found {_show(line)}: {what}")
            column[key] = value.strip()
        columns.append(column)
    paths, ids, splits = columns
    parts: dict[str, _Ids] = {"1": {}, "0": {}}
    for key, path in paths.items():
        for name, column in zip(_TEXT_FILES[1:], (ids, splits), strict=True):
            if key not in column:
                raise DataError(f"{folder / name}: lacks the picture {key} ({path}) of {_TEXT_FILES[0]}")
        if splits[key] not in parts:
            raise DataError(f"{folder / _TEXT_FILES[2]}: picture {key} has {_show(splits[key])}, expected 1 or 0")
        _enter(parts[splits[key]], path, ids[key], folder / _TEXT_FILES[0])
    return _filled(folder, parts["1"], None, parts["0"])


def _read_flowers_mat(folder: Path) -> tuple[_Ids, _Ids | None, _Ids]:
    """Read Oxford Flowers' setid.mat (trnid, valid, tstid: numbers of pictures from 1) and imagelabels.mat (labels)."""
    with _told(folder / "imagelabels.mat"):
        labels = np.ravel(_mat(folder / "imagelabels.mat")["labels"]).astype(int).tolist()
    parts: list[_Ids] = []
    with _told(folder / "setid.mat"):
        content = _mat(folder / "setid.mat")
        for key in ("trnid", "valid", "tstid"):
            part: _Ids = {}
            for number in np.ravel(content[key]).astype(int).tolist():
                if not 1 <= number <= len(labels):
                    raise DataError(f"{folder / 'setid.mat'}: {key} names picture {number} of {len(labels)}")
                _enter(part, f"jpg/image_{number:05d}.jpg", labels[number - 1], folder / "setid.mat")
            parts.append(part)
    train, val, test = parts
    return _filled(folder, train, val, test)


def _read_list_mats(folder: Path) -> tuple[_Ids, _Ids | None, _Ids]:
    """Read Stanford Dogs' train_list.mat and test_list.mat: file_list (paths) and labels."""
    parts: list[_Ids] = []
    for name in ("train_list.mat", "test_list.mat"):
        part: _Ids = {}
        with _told(folder / name):
            content = _mat(folder / name)
            paths, ids = np.ravel(content["file_list"]), np.ravel(content["labels"])
            for path, class_id in zip(paths, ids, strict=True):
                _enter(part, str(np.ravel(path)[0]), int(class_id), folder / name)
        parts.append(part)
    return _filled(folder, parts[0], None, parts[1])


def _read_annotations_mat(folder: Path) -> tuple[_Ids, _Ids | None, _Ids]:
    """Read Stanford Cars' cars_annos.mat: annotations with relative_im_path, class and test."""
    file = folder / "cars_annos.mat"
    parts: dict[int, _Ids] = {0: {}, 1: {}}
    with _told(file):
        for entry in np.ravel(_mat(file)["annotations"]):
            path, class_id, is_test = (np.ravel(entry[key])[0] for key in ("relative_im_path", "class", "test"))
            _enter(parts[int(is_test)], str(path), int(class_id), file)
    return _filled(folder, parts[0], None, parts[1])


# Keyed by the form of the files, not by the data set: two data sets share the first.
NATIVE_FORMS: Mapping[str, NativeForm] = {
    "text_files": NativeForm(_TEXT_FILES, _read_text_files, "images", "{class_id:03d}/{number:06d}.jpg"),
    "flowers_mat": NativeForm(("setid.mat", "imagelabels.mat"), _read_flowers_mat, "", "jpg/image_{number:05d}.jpg"),
    "list_mats": NativeForm(
        ("train_list.mat", "test_list.mat"),
        _read_list_mats,
        "Images",
        "n{class_id:08d}-kind/n{class_id:08d}_{number}.jpg",
    ),
    "annotations_mat": NativeForm(("cars_annos.mat",), _read_annotations_mat, "", "car_ims/{number:06d}.jpg"),
}


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise DataError(f"{path}: cannot be read ({reason})") from None
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            yield number, line.strip()


def _enter(part: _Ids, path: str, class_id: object, listing: Path) -> None:
    check_path(path, str(listing))
    if path in part:
        raise DataError(f"{listing}: {_show(path)} is listed twice")
    part[path] = _class_id(class_id, f"{listing}: class id of {_show(path)}")


def _filled(folder: Path, train: _Ids, val: _Ids | None, test: _Ids) -> tuple[_Ids, _Ids | None, _Ids]:
    for name, part in (("training", train), ("val", val), ("test", test)):
        if part is not None and not part:
            raise DataError(f"{folder}: its files list no {name} picture; get them again")
    return train, val, test


def _mat(path: Path) -> dict[str, Any]:
    loadmat = optional_import("scipy.io", "scipy", f"reading {path.name}").loadmat
    content: dict[str, Any] = loadmat(path)
    return content


class _told:
    """What is raised while `path` is read becomes one line that names it (scipy raises a dozen kinds)."""

    def __init__(self, path: Path, remedy: str = "get the file again") -> None:
        self.path = path
        self.remedy = remedy

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, SvpBenchError):
            reason = " ".join(str(error).split()) or type(error).__name__
            raise DataError(f"{self.path}: cannot be read ({type(error).__name__}: {reason}); {self.remedy}") from None


# --- torchvision's data sets -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TorchvisionSet:
    """A data set class of torchvision.

    Attributes:
        files: What its root folder holds when the data set is there.
        splits: "train", "test" and, where it has one, "val" → the arguments for it.
        content: Returns its pictures, uint8 (N, H, W, 3) or a list of their files, and their labels.
        downloads: Splits that are downloaded each for itself; one of them brings all where this is one.
        needs: Packages that torchvision imports only to read this one.
    """

    files: tuple[str, ...]
    splits: Mapping[str, Mapping[str, object]]
    content: Callable[[Any], tuple[Any, Any]]
    downloads: tuple[str, ...] = ("train",)
    needs: tuple[str, ...] = ()


def _gtsrb_content(dataset: Any) -> tuple[list[Path], list[int]]:
    # torchvision numbers the folders that it finds, which shifts all labels if one is missing; their names are the ids.
    files = [Path(path) for path, _ in dataset._samples]
    labels = [label for _, label in dataset._samples]
    for file, label in zip(files, labels, strict=True):
        if file.parent.name.isdigit() and int(file.parent.name) != label:
            raise DataError(f"{file}: torchvision labels it {label}: a class folder before it is missing; get all")
    return files, labels


_CIFAR_SPLITS: Mapping[str, Mapping[str, object]] = {"train": {"train": True}, "test": {"train": False}}
_SPLITS: Mapping[str, Mapping[str, object]] = {"train": {"split": "train"}, "test": {"split": "test"}}

# Keyed by torchvision's class.
TORCHVISION_SETS: Mapping[str, TorchvisionSet] = {
    "CIFAR10": TorchvisionSet(("cifar-10-batches-py",), _CIFAR_SPLITS, lambda data: (data.data, data.targets)),
    "CIFAR100": TorchvisionSet(("cifar-100-python",), _CIFAR_SPLITS, lambda data: (data.data, data.targets)),
    "DTD": TorchvisionSet(
        ("dtd/dtd",), {**_SPLITS, "val": {"split": "val"}}, lambda data: (data._image_files, data._labels)
    ),
    "Food101": TorchvisionSet(("food-101",), _SPLITS, lambda data: (data._image_files, data._labels)),
    "GTSRB": TorchvisionSet(("gtsrb/GTSRB",), _SPLITS, _gtsrb_content, ("train", "test")),
    "SVHN": TorchvisionSet(
        ("train_32x32.mat", "test_32x32.mat"),
        _SPLITS,
        lambda data: (data.data.transpose(0, 2, 3, 1), data.labels),
        ("train", "test"),
        ("scipy",),
    ),
}
_VAL_RULES = ("last", "hashed", "official")


def open_torchvision(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read a data set through torchvision, from where it lies; nothing is downloaded.

    Options: `set`, torchvision's class; `val`, how the official training pictures are shared out between train (the
    first four fifths, rounded down) and val:

    - `last`: in file order;
    - `hashed`: in ascending order of the SHA-256 of each picture's path (relative to torchvision's root, with slashes):
      a fixed permutation that depends on no library. With `together: TEXT`, the hash is taken of the path before its
      last TEXT, and the path itself decides between equal ones, so that pictures that share that beginning stay
      together (but for the one group where the cut falls);
    - `official`: the data set has a val list of its own;

    and `refit` (see the module). Whatever the order, a list holds its pictures in file order. Files whose checksum
    torchvision knows must have it, unless the folder is marked as drawn: then they are looked through instead, and a
    pickle that would run code is refused.

    Raises:
        CardError: If an option or list is unknown or missing.
        DataError: If the data are missing, damaged or have labels out of range; says how to download them.
        UnavailableError: If torchvision (or scipy, for SVHN) is not installed.
    """
    options = reader_options(card, {"set": str, "val": str, "together": str, "refit": str})
    refit = _list_names(card, options)
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
    forms = [_all_of(known.files), _any_of(known.files)]
    folder = find_folder(card, suite, root, forms, " and ".join(known.files), remedy, shared=True)
    drawn = (folder / DRAWN_MARK).exists()
    dataset_class = getattr(optional_import("torchvision.datasets", "torchvision", f"reading {card.name}"), name)
    if drawn:
        dataset_class = _without_checksums(dataset_class, folder)
    for package in known.needs:
        optional_import(package, package, f"reading {card.name}")

    pools = {}
    again = f"get it again with `{_download_command(name, known, folder)}`"
    for split, arguments in known.splits.items():
        with _told(folder, again):
            dataset = dataset_class(str(folder), download=False, **arguments)
            content, labels = known.content(dataset)
            names = getattr(dataset, "classes", None)
            pools[split] = _Pool.of(card, folder, f"{name} {split}", content, np.asarray(labels, dtype=np.int64), names)
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
    return Source(str(folder), lists, _drawn_notes(folder), drawn, "card")


@dataclass(frozen=True)
class _Pool:
    """The pictures of one official list: files below `folder`, or an array."""

    folder: Path
    what: str
    paths: tuple[str, ...] | None
    pixels: npt.NDArray[np.uint8] | None
    labels: _Labels

    @classmethod
    def of(
        cls, card: TaskCard, folder: Path, what: str, content: Any, labels: _Labels, names: list[str] | None
    ) -> _Pool:
        listed = class_names(card)
        if names is not None and listed is not None:  # by name: torchvision numbers the classes that it finds
            strange = [name for name in names if name not in listed]
            if strange:
                raise DataError(f"{what} in {folder} has a class {strange[0]!r} that {card.class_names} lacks")
            labels = np.array([listed.index(name) for name in names], dtype=np.int64)[labels]
        if not len(labels) or len(labels) != len(content):
            raise DataError(f"{what} in {folder}: {len(content)} pictures and {len(labels)} labels")
        outside = labels[(labels < 0) | (labels >= card.classes)]
        if outside.size:
            raise DataError(
                f"{what} in {folder}: label {outside[0]} is out of range, the card of {card.name} has {card.classes} "
                f"classes (0..{card.classes - 1})"
            )
        if isinstance(content, np.ndarray):
            return cls(folder, what, None, content, labels)
        paths = tuple(Path(path).relative_to(folder).as_posix() for path in content)
        return cls(folder, what, paths, None, labels)

    def joined(self, other: _Pool) -> _Pool:
        labels = np.concatenate([self.labels, other.labels])
        return _Pool(self.folder, self.what, (*(self.paths or ()), *(other.paths or ())), None, labels)

    def take(self, name: str, positions: npt.NDArray[np.int64]) -> Pictures:
        if self.paths is None:
            assert self.pixels is not None
            return ArrayPictures(name, self.pixels, self.labels, positions, f"{self.what} picture")
        Image.init()  # all formats, before threads race for the rarer ones
        paths = tuple(self.paths[position] for position in positions.tolist())
        return FilePictures(self.folder, name, PictureList(paths, self.labels[positions]), f"{self.what} ({name})")


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
        raise DataError(f"{pool.what} in {pool.folder}: {count} pictures are too few for train and val")
    return np.sort(order[:cut]), np.sort(order[cut:])


def _download_command(name: str, known: TorchvisionSet, folder: Path) -> str:
    if len(known.downloads) == 1:
        call = f"{name}('{folder}', download=True)"
    else:
        call = f"[{name}('{folder}', split=s, download=True) for s in {known.downloads}]"
    return f'python -c "from torchvision.datasets import {name}; {call}"'


def _without_checksums(dataset_class: Any, folder: Path) -> Any:
    """Return the class for drawn data, which cannot have the checksums of the real ones.

    torchvision takes a checksum of None for "any"; that is the whole change. What it would unpickle is looked through
    before, since a checksum was what made that safe.
    """
    changes: dict[str, Any] = {}
    for attribute in ("train_list", "test_list"):
        if hasattr(dataset_class, attribute):
            changes[attribute] = [[file, None] for file, _ in getattr(dataset_class, attribute)]
    if hasattr(dataset_class, "meta"):
        changes["meta"] = {**dataset_class.meta, "md5": None}
        names = [file for files in changes.values() if isinstance(files, list) for file, _ in files]
        for name in (*names, dataset_class.meta["filename"]):
            _refuse_code(folder / dataset_class.base_folder / name)
    if hasattr(dataset_class, "split_list"):
        changes["split_list"] = {split: [url, file, None] for split, (url, file, _) in dataset_class.split_list.items()}
    return type(dataset_class.__name__, (dataset_class,), changes) if changes else dataset_class


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


def _refuse_code(path: Path) -> None:
    with _told(path, "draw the data again"), open(path, "rb") as file:
        try:
            _ArraysOnly(file, encoding="latin1").load()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
