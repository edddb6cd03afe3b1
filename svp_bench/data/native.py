"""The data sets' own files: training and test images, class ids, and the names of the classes."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from svp_bench.core.errors import DataError, plural, show
from svp_bench.data.reading import foreign_errors, need_regular, whole_numbers
from svp_bench.data.split_files import plain_path, text_lines

Ids = dict[str, int]  # path of an image -> class id, in the order of the list
Parts = tuple[Ids, Ids | None, Ids]  # training, val (None if there is none) and test images


@dataclass(frozen=True)
class NativeForm:
    """The data sets' own files that list their images.

    Attributes:
        files: The files, below the data set's folder.
        read: Reads them: folder → training, val and test images.
        names: Returns the data set's names of its classes, as class id → name, empty if it has none: of its folder,
            and of all its images as path → class id.
        names_in: The files that `names` reads, where they are there.
    """

    files: tuple[str, ...]
    read: Callable[[Path], Parts]
    names: Callable[[Path, Mapping[str, int]], Mapping[int, str]]
    names_in: tuple[str, ...] = ()


# --- CUB-200-2011 and NABirds: text files ----------------------------------------------------------------------------

_TEXT_FILES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")


def _column(path: Path, form: str) -> dict[str, str]:
    """Read lines of `<key> <value>`, parted by blanks or tabs; the value may hold blanks."""
    column: dict[str, str] = {}
    for number, line in text_lines(path):
        key, *value = line.split(maxsplit=1)
        if not value or key in column:
            what = "the id is given twice" if key in column else f"expected `{form}`"
            raise DataError(f"{path}:{number}: found {show(line)}: {what}")
        column[key] = value[0]
    return column


def _read_text_files(folder: Path) -> Parts:
    """Read CUB-200-2011's and NABirds' files: lines `<image id> <path | class id | 1 for training>`."""
    paths, ids, splits = (_column(folder / name, "<image id> <value>") for name in _TEXT_FILES)
    parts: dict[str, Ids] = {"1": {}, "0": {}}
    for key, path in paths.items():
        for name, column in zip(_TEXT_FILES[1:], (ids, splits), strict=True):
            if key not in column:
                raise DataError(f"{folder / name}: lacks the image {key} ({path}) of {_TEXT_FILES[0]}")
        if splits[key] not in parts:
            raise DataError(f"{folder / _TEXT_FILES[2]}: image {key} has {show(splits[key])}, expected 1 or 0")
        enter(parts[splits[key]], path, ids[key], folder / _TEXT_FILES[0])
    return parts["1"], None, parts["0"]


def _names_of_text_files(folder: Path, ids: Mapping[str, int]) -> Mapping[int, str]:
    """Read classes.txt, lines `<class id> <name>`; without it, the names of the folders."""
    path = folder / "classes.txt"
    if not path.is_file():
        return names_of_folders(folder, ids)
    names = {}
    for key, name in _column(path, "<class id> <name>").items():
        class_id = class_id_of(key, f"{path}: the class id of {show(name)}")
        number, _, rest = name.partition(".")  # CUB's are those of its folders: "001.Black_footed_Albatross"
        names[class_id] = rest if rest and number.isdecimal() and int(number) == class_id else name
    lacking = sorted({*ids.values()} - names.keys())
    if lacking:
        raise DataError(f"{path}: lacks the class {lacking[0]}; get the file again")
    return names


# --- Oxford Flowers, Stanford Dogs, Stanford Cars: MATLAB's files ----------------------------------------------------


def _mat(path: Path, *keys: str) -> list[Any]:
    """Return some variables of a MATLAB file: arrays, texts, and a list of dicts for an array of structs."""
    from scipy.io import loadmat  # type: ignore[import-untyped]

    need_regular(path)
    with foreign_errors(path):
        content = loadmat(path, variable_names=keys, simplify_cells=True)
    return [_field(content, key, path) for key in keys]


def _field(content: Any, key: str, path: Path) -> Any:
    if not isinstance(content, dict) or key not in content:
        raise DataError(f"{path}: lacks {key!r}; get the file again")
    return content[key]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{what} is {show(value)}, expected a text; get the file again")
    return value


def _read_flowers_mat(folder: Path) -> Parts:
    """Read Oxford Flowers' setid.mat (trnid, valid, tstid: numbers of images from 1) and imagelabels.mat (labels)."""
    numbers_file, labels_file = folder / "setid.mat", folder / "imagelabels.mat"
    labels = whole_numbers(_mat(labels_file, "labels")[0], f"{labels_file}: labels holds").tolist()
    keys = ("trnid", "valid", "tstid")
    parts: list[Ids] = []
    for key, numbers in zip(keys, _mat(numbers_file, *keys), strict=True):
        part: Ids = {}
        for number in whole_numbers(numbers, f"{numbers_file}: {key} holds").tolist():
            if not 1 <= number <= len(labels):
                raise DataError(f"{numbers_file}: {key} names image {number} of {len(labels)}")
            enter(part, f"jpg/image_{number:05d}.jpg", labels[number - 1], labels_file)
        parts.append(part)
    train, val, test = parts
    return train, val, test


def _read_list_mats(folder: Path) -> Parts:
    """Read Stanford Dogs' train_list.mat and test_list.mat: file_list (paths) and labels."""
    parts: list[Ids] = []
    for file in (folder / "train_list.mat", folder / "test_list.mat"):
        files, labels = _mat(file, "file_list", "labels")
        paths, ids = np.ravel(files), whole_numbers(labels, f"{file}: labels holds")
        if len(paths) != len(ids):
            raise DataError(
                f"{file}: {plural(len(paths), 'image')} and {plural(len(ids), 'label')}; get the file again"
            )
        part: Ids = {}
        for number, (path, class_id) in enumerate(zip(paths, ids.tolist(), strict=True), 1):
            enter(part, _text(path, f"{file}: image {number} of file_list"), class_id, file)
        parts.append(part)
    return parts[0], None, parts[1]


_ANNOTATIONS = "cars_annos.mat"


def _read_annotations_mat(folder: Path) -> Parts:
    """Read Stanford Cars' cars_annos.mat: annotations with relative_im_path, class and test."""
    file = folder / _ANNOTATIONS
    (annotations,) = _mat(file, "annotations")
    parts: dict[int, Ids] = {0: {}, 1: {}}
    for number, entry in enumerate(annotations if isinstance(annotations, list) else [annotations], 1):
        path, class_id, is_test = (_field(entry, key, file) for key in ("relative_im_path", "class", "test"))
        what = f"{file}: of annotation {number},"
        if (split := class_id_of(is_test, f"{what} test")) not in parts:
            raise DataError(f"{what} test is {split}, expected 0 or 1; get the file again")
        enter(parts[split], _text(path, f"{what} relative_im_path"), class_id, file)
    return parts[0], None, parts[1]


def _names_of_annotations(folder: Path, ids: Mapping[str, int]) -> Mapping[int, str]:
    """Read class_names of cars_annos.mat, also next to a JSON split: that of id 1, of id 2, …"""
    file = folder / _ANNOTATIONS
    if not file.is_file():
        return {}
    try:
        (names,) = _mat(file, "class_names")
    except DataError:  # the file lacks them
        return {}
    return {number: _text(name, f"{file}: class name {number}").strip() for number, name in enumerate(names, 1)}


# --- names in the names of folders -----------------------------------------------------------------------------------

_NAMED_FOLDER = re.compile(r"n?[0-9]+[.-](?P<name>.*\S.*)")  # "001.Black_footed_Albatross", "n02085620-Chihuahua"


def names_of_folders(folder: Path, ids: Mapping[str, int]) -> Mapping[int, str]:
    """Return the names that the images' folders have behind a number, if each class has a folder of its own.

    Args:
        folder: The data set's folder; not looked at.
        ids: Path of each image → class id.

    Returns:
        Class id → name; empty if a class has several folders, or one without a name.
    """
    folder_of: dict[int, str] = {}
    for path, class_id in ids.items():
        parent = Path(path).parent.name
        if folder_of.setdefault(class_id, parent) != parent:
            return {}
    matches = {class_id: _NAMED_FOLDER.fullmatch(parent) for class_id, parent in folder_of.items()}
    names = {class_id: match["name"] for class_id, match in matches.items() if match}
    return names if len({*folder_of.values()}) == len(names) == len(folder_of) else {}


# Keyed by the form of the files, not by the data set: two data sets share the first.
NATIVE_FORMS: Mapping[str, NativeForm] = {
    "text_files": NativeForm(_TEXT_FILES, _read_text_files, _names_of_text_files, ("classes.txt",)),
    "flowers_mat": NativeForm(("setid.mat", "imagelabels.mat"), _read_flowers_mat, lambda folder, ids: {}),
    "list_mats": NativeForm(("train_list.mat", "test_list.mat"), _read_list_mats, names_of_folders),
    "annotations_mat": NativeForm((_ANNOTATIONS,), _read_annotations_mat, _names_of_annotations, (_ANNOTATIONS,)),
}


# --- entries ---------------------------------------------------------------------------------------------------------


def enter(part: Ids, path: str, class_id: object, listing: Path) -> None:
    """Add an image to a part of a split.

    Raises:
        DataError: If it is there already, or the path or class id is malformed.
    """
    plain = plain_path(path, str(listing))
    if plain in part:
        raise DataError(f"{listing}: {show(path)} is listed twice")
    part[plain] = class_id_of(class_id, f"{listing}: class id of {show(path)}")


def class_id_of(value: object, what: str) -> int:
    """Return a class id: a whole number, or a text of digits by its value.

    "002" < "010" either way, and the labels do not depend on how ids were written.

    Raises:
        DataError: If it is neither, or negative.
    """
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= 18:
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 10**18:
        return value
    raise DataError(f"{what} is {show(value)}, expected a whole number or a text of digits, 0 or above")
