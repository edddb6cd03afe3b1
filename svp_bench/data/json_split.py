"""Reader: JSON splits, files of image paths and class ids; without them, the data set's own files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from svp_bench.core.atomic import read_regular
from svp_bench.core.errors import CardError, DataError, plural, unknown_name
from svp_bench.data.locate import find_folder
from svp_bench.data.native import NATIVE_FORMS, Ids, NativeForm, enter, names_of_folders
from svp_bench.data.reading import all_of, any_of, joined_names, list_names, reader_options, show, synthetic_notes
from svp_bench.data.sources import FileImages, Images, Source
from svp_bench.data.split_files import MAX_SPLIT_BYTES, ImageList
from svp_bench.tasks.cards import SuiteCard, TaskCard, class_names

__all__ = ["open_json_split"]

_SPLIT_FILES = ("train.json", "val.json", "test.json")
_IMAGE_ROOTS = ("images", "Images", "")
_ROOT_PROBES = 100  # listed images that are looked for to find what their paths are relative to
_VAL_EVERY = 10  # of a data set that has no val list of its own
_OFFICIAL = "official"  # the variant of a card that the data set's own files make


def open_json_split(card: TaskCard, suite: SuiteCard, root: Path | None) -> Source:
    """Read `train.json`, `val.json` and `test.json`, each one object of image path → class id, next to the images.

    Labels: the distinct ids of train.json in ascending order are 0, 1, …, and that one map serves all lists (a map
    built anew for each file, as released loaders do, shifts where a file lacks a class). Ids are whole numbers or texts
    of digits. Images of val.json are taken out of `train`, also where train.json repeats them; `trainval` is train
    and val together. Paths are relative to `images`, `Images` or the folder itself.

    Names of classes follow the ids: where the card has a file of names, its first line is for the id that the option
    `first_id` is the id of the first; else they come from the data set's own files or from the names of its folders.

    Where none of the three files is there but the data set's own are (option `native`), these are read: the official
    training and test lists, and as `val` the official one or else every tenth of the official training images, in
    official order. That is the card's variant `official`, and never mixes with the JSON split.

    Source of the format: M. Jia et al., Visual Prompt Tuning, ECCV 2022, and its released splits.

    Raises:
        CardError: If a list name or an option is unknown, or the card names classes without their ids.
        DataError: If no folder is found, a file is missing or malformed, an id is not in train.json or not one of the
            card's, or there are more ids than classes.
        UnavailableError: If the data set's own files are MATLAB's, and scipy is not installed.
    """
    options = reader_options(card, {"native": str, "refit": str, "first_id": int})
    refit = list_names(card, options)
    native = _native_form(card, options)
    if card.class_names is not None and "first_id" not in options:
        raise CardError(
            f"{card.path}:1: class_names needs the reader's option 'first_id': the class id of its first line"
        )

    files = _SPLIT_FILES if native is None else (*_SPLIT_FILES, *native.files)
    forms: list[Callable[[Path], bool]] = [all_of(_SPLIT_FILES), any_of(_SPLIT_FILES)]
    if native is not None:
        forms += [all_of(native.files), any_of(native.files)]
    also = f", or its own {joined_names(native.files)}," if native else ""
    remedy = (
        f"{joined_names(_SPLIT_FILES)} of the VPT split (links in the README of https://github.com/KMnP/vpt){also} "
        f"next to the images of {card.source}"
    )
    folder = find_folder(card, suite, root, forms, " or ".join(files), remedy)

    if native is None or any_of(_SPLIT_FILES)(folder):
        missing = [name for name in _SPLIT_FILES if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} has a JSON split without {joined_names(missing)}; get {remedy}")
        parts = [_read_json(folder / name) for name in _SPLIT_FILES]
        listings, variant = [str(folder / name) for name in _SPLIT_FILES], "card"
    else:
        missing = [name for name in native.files if not (folder / name).is_file()]
        if missing:
            raise DataError(f"{folder} lacks {joined_names(missing)}; get {remedy}")
        train, val, test = native.read(folder)
        if val is None:
            val = {path: train[path] for path in list(train)[_VAL_EVERY - 1 :: _VAL_EVERY]}
        parts, listings, variant = [train, val, test], [str(folder / native.files[0])] * 3, _OFFICIAL

    labels = _labels(card, parts, listings)
    notes = [*synthetic_notes(folder)]
    if len(labels) < card.classes:
        notes.append(f"{listings[0]} has {plural(len(labels), 'class')}, the card states {card.classes}")
    ids = {path: class_id for part in parts for path, class_id in part.items()}
    names = _names(card, labels, folder, ids, native)
    images = _images(card, folder, _lists(parts, listings, refit), labels, listings)
    return Source(str(folder), images, tuple(notes), bool(synthetic_notes(folder)), variant, names)


def _native_form(card: TaskCard, options: Mapping[str, Any]) -> NativeForm | None:
    name = options.get("native")
    if name is None:
        return None
    if name not in NATIVE_FORMS:
        raise unknown_name("native form", str(name), NATIVE_FORMS, where=f"{card.path}:1", error=CardError)
    if _OFFICIAL not in card.variants:
        raise CardError(f"{card.path}:1: the option 'native' needs the counts of the variant {_OFFICIAL!r}")
    return NATIVE_FORMS[str(name)]


def _labels(card: TaskCard, parts: list[Ids], listings: list[str]) -> dict[int, int]:
    """Return class id → label, and check that the parts agree; `listings` names the file of each."""
    train, *others = parts
    labels = {class_id: label for label, class_id in enumerate(sorted({*train.values()}))}
    if len(labels) > card.classes:
        raise DataError(
            f"{listings[0]}: {plural(len(labels), 'class')}, but the card of {card.name} has {card.classes}"
        )
    first = card.reader.options.get("first_id")
    if isinstance(first, int):
        outside = [class_id for class_id in labels if not first <= class_id < first + card.classes]
        if outside:
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


def _lists(parts: list[Ids], listings: list[str], refit: str) -> dict[str, Ids]:
    train, val, test = parts
    lists = {
        "train": {path: class_id for path, class_id in train.items() if path not in val},
        "val": val,
        "trainval": {**train, **val},  # an image of both keeps its place in train
        "test": test,
    }
    if not lists["train"]:
        raise DataError(f"{listings[0]}: all its images are also in {listings[1]}; none is left to train on")
    lists["refit"] = lists[refit]
    return lists


def _images(
    card: TaskCard, folder: Path, lists: Mapping[str, Ids], labels: Mapping[int, int], listings: list[str]
) -> dict[str, Images]:
    root = _images_root(folder, [*lists["train"], *lists["test"]], listings[0])
    listing_of = {"val": listings[1], "test": listings[2]}
    Image.init()  # all formats, before threads race for the rarer ones
    images: dict[str, Images] = {}
    for name in card.counts:
        label_array = np.array([labels[class_id] for class_id in lists[name].values()], dtype=np.int64)
        listed = ImageList(tuple(lists[name]), label_array)
        images[name] = FileImages(root, name, listed, listing_of.get(name, listings[0]))
    return images


def _images_root(folder: Path, paths: list[str], listing: str) -> Path:
    probes = paths[:: max(1, len(paths) // _ROOT_PROBES)]
    roots = [folder / name for name in _IMAGE_ROOTS]
    for root in roots:
        if any((root / path).is_file() for path in probes):
            return root
    raise DataError(
        f"{listing}: its images are in none of {', '.join(map(str, roots))} (looked for {len(probes)} of them, "
        f"the first is {show(paths[0])}); unpack the images there"
    )


def _names(
    card: TaskCard, labels: Mapping[int, int], folder: Path, ids: Mapping[str, int], native: NativeForm | None
) -> tuple[str, ...] | None:
    """Return the names of the labels; None if nobody knows the names of the ids."""
    listed = class_names(card)
    if listed is not None:
        names: Mapping[int, str] = dict(enumerate(listed, int(card.reader.options["first_id"])))
    else:
        names = (native.names if native else names_of_folders)(folder, ids)
    if not labels.keys() <= names.keys():
        return None
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

    try:
        entries = json.loads(read_regular(path, MAX_SPLIT_BYTES), object_pairs_hook=unique)
    except OSError as error:
        raise DataError(f"{path}: the split cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # not JSON, or not UTF-8
        raise DataError(f"{path}: not JSON ({' '.join(str(error).split())}); get the split again") from None
    if not isinstance(entries, dict) or not entries:
        raise DataError(f"{path}: found {show(entries)}, expected one object of image path -> class id")
    ids: Ids = {}
    for image, class_id in entries.items():
        enter(ids, image, class_id, path)
    return ids
