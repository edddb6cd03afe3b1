"""Write the data sets' own files of FGVC tasks, to test their readers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.io import savemat

from svp_bench.data import draw_task
from svp_bench.tasks.cards import TaskCard

Ids = dict[str, int]


def draw_native(card: TaskCard, root: Path, counts: Mapping[str, int], size: int = 12) -> Path:
    """Draw a task with the data set's own files, class ids from 1, instead of its JSON split."""
    folder = draw_task(card, root, counts=counts, size=size)
    parts: list[Ids] = []
    for name in ("train", "val", "test"):
        file = folder / f"{name}.json"
        gaps = "first_id" not in card.reader.options
        parts.append({path: (i - 5) // 3 + 1 if gaps else i for path, i in json.loads(file.read_text()).items()})
        file.unlink()
    write = {
        "text_files": write_text_files,
        "flowers_mat": write_flowers_mat,
        "list_mats": write_list_mats,
        "annotations_mat": write_annotations_mat,
    }
    write[str(card.reader.options["native"])](folder, *parts)
    return folder


def write_text_files(folder: Path, train: Ids, val: Ids, test: Ids) -> None:
    entries = sorted([(p, i, 1) for p, i in (train | val).items()] + [(p, i, 0) for p, i in test.items()])
    names = ("images", "image_class_labels", "train_test_split")
    for name, column in zip(names, zip(*entries, strict=True), strict=True):
        lines = "".join(f"{number} {value}\n" for number, value in enumerate(column, 1))
        (folder / f"{name}.txt").write_text(lines, encoding="utf-8")


def write_flowers_mat(folder: Path, train: Ids, val: Ids, test: Ids) -> None:
    labels = np.zeros((1, len(train) + len(val) + len(test)), dtype=np.uint8)
    numbers: dict[str, Any] = {}
    for key, part in (("trnid", train), ("valid", val), ("tstid", test)):
        numbers[key] = np.array([[int(Path(path).stem.partition("_")[2]) for path in part]], dtype=np.uint16)
        labels[0, numbers[key][0].astype(int) - 1] = list(part.values())
    savemat(folder / "setid.mat", numbers)
    savemat(folder / "imagelabels.mat", {"labels": labels})


def write_list_mats(folder: Path, train: Ids, val: Ids, test: Ids) -> None:
    for name, part in (("train_list", train | val), ("test_list", test)):
        paths = np.empty((len(part), 1), dtype=object)
        paths[:, 0] = list(part)
        labels = np.array([list(part.values())], dtype=np.uint8).T
        savemat(folder / f"{name}.mat", {"file_list": paths, "labels": labels})


def write_annotations_mat(folder: Path, train: Ids, val: Ids, test: Ids) -> None:
    entries = sorted([(p, i, 0) for p, i in (train | val).items()] + [(p, i, 1) for p, i in test.items()])
    kinds = [("relative_im_path", object), ("class", object), ("test", object)]
    savemat(folder / "cars_annos.mat", {"annotations": np.array([entries], dtype=kinds)})
