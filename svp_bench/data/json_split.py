"""Reader: JSON splits, files of image paths and class ids; without them, the data set's own files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from svp_bench.core.atomic import read_regular
from svp_bench.core.errors import CardError, DataError, plural, show
from svp_bench.data.locate import locate
from svp_bench.data.native import NATIVE_FORMS, Ids, NativeForm, enter, names_of_folders
from svp_bench.data.reading import Refit, is_synthetic, joined_names, readable, reader_options
from svp_bench.data.sources import FileImages, Source, read_split_files
from svp_bench.data.split_files import MAX_SPLIT_BYTES, ImageList
from svp_bench.tasks.cards import SuiteCard, TaskCard, class_names

SPLIT_FILES = ("train.json", "val.json", "test.json")
IMAGE_ROOTS = ("images", "Images", "")
_ROOT_PROBES = 100  # listed images that are looked for to find what their paths are relative to
_VAL_EVERY = 10  # of a data set that has no val list of its own
_OFFICIAL = "official"  # the variant of a card that the data set's own files make


@dataclass(frozen=True)
class _Options:
    native: Literal["text_files", "flowers_mat", "list_mats", "annotations_mat"] | None = None
    refit: Refit = "trainval"
    first_id: int | None = None


def open_json_split(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read `train.json`, `val.json` and `test.json`, each one object of image path → class id, next to the images.

    Labels: the distinct ids of train.json in ascending order are 0, 1, …, and that one map serves all splits (a map
    built anew for each file, as released loaders do, shifts where a file lacks a class). Ids are whole numbers or texts
    of digits. Images of val.json are taken out of `train`, also where train.json repeats them; `trainval` is train
    and val together. Paths are relative to `images`, `Images` or the folder itself.

    Names of classes follow the ids: where the card states the id of the first line of its names (`first_id`), these;
    else those of the data set's own files or of its folders; else the card's, if train.json has all classes.

    Where none of the three files is there but the data set's own are (option `native`), these are read: the official
    training and test images, and as `val` the official one or else every tenth of the official training images, in
    official order. That is the card's variant `official`, and never mixes with the JSON split.

    Source of the format: M. Jia et al., Visual Prompt Tuning, ECCV 2022, and its released splits.

    Raises:
        CardError: If the name of a split or an option is unknown.
        DataError: If no folder is found, a file is missing or malformed, an id is not in train.json or not one of the
            card's, or there are more ids than classes.
    """
    options = reader_options(card, _Options)
    native = NATIVE_FORMS[options.native] if options.native else None
    if native and _OFFICIAL not in card.variants:
        raise CardError(f"{card.path}:1: the option 'native' needs the counts of the variant {_OFFICIAL!r}")
    also = f", or its own {joined_names(native.files)}," if native else ""
    remedy = (
        f"{joined_names(SPLIT_FILES)} of the VPT split (links in the README of https://github.com/KMnP/vpt){also} "
        f"next to the images of {card.source}"
    )
    folder = locate(card, suite, root, [SPLIT_FILES, *([native.files] if native else [])], remedy)
    if is_synthetic(folder):
        return read_split_files(card, folder)
    official = native if not any((folder / name).exists() for name in SPLIT_FILES) else None
    parts, listings = read_parts(folder, official, remedy)
    train, val, test = parts
    labels = _labels(card, parts, listings, options.first_id)
    notes: tuple[str, ...] = ()
    if len(labels) < card.classes:
        notes = (f"{listings[0]} has {plural(len(labels), 'class')}, the card states {card.classes}",)
    splits = {
        "train": {path: class_id for path, class_id in train.items() if path not in val},
        "val": val,
        "trainval": {**train, **val},  # an image of both keeps its place in train
        "test": test,
    }
    if not splits["train"]:
        raise DataError(f"{listings[0]}: all its images are also in {listings[1]}; none is left to train on")
    splits["refit"] = splits[options.refit]
    place = _images_root(folder, [path for part in parts for path in part], listings[0])
    listed_in = {"val": listings[1], "test": listings[2]}
    images = {}
    for name in card.counts:
        of_split = np.array([labels[class_id] for class_id in splits[name].values()], dtype=np.int64)
        images[name] = FileImages(
            place, name, ImageList(tuple(splits[name]), of_split), listed_in.get(name, listings[0])
        )
    names = _names(card, labels, folder, train | val | test, native, options.first_id)
    variant = _OFFICIAL if official else "card"
    return Source(str(folder), images, notes, variant=variant, class_names=names, folder=folder)


def read_parts(folder: Path, official: NativeForm | None, remedy: str) -> tuple[list[Ids], list[str]]:
    """Return training, val and test images, and the file that lists each.

    Args:
        folder: The task's folder.
        official: The data set's own files to read; None for a JSON split.
        remedy: What to get, for the message.

    Raises:
        DataError: If a file is missing or malformed.
    """
    files, present = (official.files, "own files") if official else (SPLIT_FILES, "a JSON split")
    if missing := [name for name in files if not (folder / name).is_file()]:
        raise DataError(f"{folder} has {present} without {joined_names(missing)}; get {remedy}")
    if official is None:
        return [_read_json(folder / name) for name in files], [str(folder / name) for name in files]
    train, val, test = official.read(folder)
    if val is None:
        val = {path: train[path] for path in list(train)[_VAL_EVERY - 1 :: _VAL_EVERY]}
    for name, part in (("training", train), ("test", test)):
        if not part:
            raise DataError(f"{folder}: its files list no {name} image; get them again")
    return [train, val, test], [str(folder / files[0])] * 3


def _labels(card: TaskCard, parts: list[Ids], listings: list[str], first: int | None) -> dict[int, int]:
    """Return class id → label, and check that the parts agree; `listings` names the file of each."""
    train, *others = parts
    labels = {class_id: label for label, class_id in enumerate(sorted({*train.values()}))}
    if len(labels) > card.classes:
        raise DataError(
            f"{listings[0]}: {plural(len(labels), 'class')}, but the card of {card.name} has {card.classes}"
        )
    outside = [class_id for class_id in labels if first is not None and not first <= class_id < first + card.classes]
    if first is not None and outside:
        raise DataError(
            f"{listings[0]}: class id {outside[0]} is out of range, those of {card.name} are "
            f"{first}..{first + card.classes - 1}"
        )
    for part, listing in zip(others, listings[1:], strict=True):
        for path, class_id in part.items():
            if class_id not in labels:
                raise DataError(f"{listing}: class id {class_id} of {show(path)} is not among those of {listings[0]}")
            if train.get(path, class_id) != class_id:
                raise DataError(f"{listing}: {show(path)} has class id {class_id}, in {listings[0]} {train[path]}")
    return labels


def _images_root(folder: Path, paths: list[str], listing: str) -> Path:
    probes = paths[:: max(1, len(paths) // _ROOT_PROBES)]
    roots = [folder / name for name in IMAGE_ROOTS]
    for root in roots:
        if any((root / path).is_file() for path in probes):
            return root
    raise DataError(
        f"{listing}: its images are in none of {', '.join(map(str, roots))} (looked for {len(probes)} of them, "
        f"the first is {show(paths[0])}); unpack the images there"
    )


def _names(
    card: TaskCard, labels: Mapping[int, int], folder: Path, ids: Ids, native: NativeForm | None, first: int | None
) -> tuple[str, ...] | None:
    """Return the names of the labels; None if neither data nor card have any."""
    if card.class_names is not None and first is not None:
        names: Mapping[int, str] = dict(enumerate(class_names(card) or (), first))
    else:
        names = (native.names if native else names_of_folders)(folder, ids)
    if not labels.keys() <= names.keys():
        if card.class_names is None:
            return None
        if len(labels) == card.classes:
            return tuple(class_names(card) or ())
        return tuple(f"class {label}" for label in range(card.classes))  # the card's names would be those of others
    shared = Counter(names[class_id] for class_id in labels)
    called = [f"{names[key]} ({key})" if shared[names[key]] > 1 else names[key] for key in sorted(labels)]
    return (*called, *(f"class {label}" for label in range(len(called), card.classes)))


def _read_json(path: Path) -> Ids:
    """Read one file of a split."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entries = dict(pairs)
        if len(entries) < len(pairs):
            twice = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
            raise DataError(f"{path}: {show(twice)} is listed twice")
        return entries

    with readable(path):
        content = read_regular(path, MAX_SPLIT_BYTES)
    try:
        entries = json.loads(content, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise DataError(f"{path}: not JSON ({' '.join(str(error).split())}); get the split again") from None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path}: found {show(entries)}, expected one object of image path -> class id")
    ids: Ids = {}
    for image, class_id in entries.items():
        enter(ids, image, class_id, path)
    return ids
