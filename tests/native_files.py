"""Write the files of the FGVC and HTA data sets with synthetic images, to test their readers."""

from __future__ import annotations

import itertools
import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.io import savemat

from svp_bench.data.synthetic import draw_image
from svp_bench.tasks.cards import TaskCard, class_names

Ids = dict[str, int]
Pixels = np.ndarray[Any, np.dtype[np.uint8]]
Splits = Mapping[str, tuple[list[int], list[Pixels]]]  # labels and images
IMAGE_PATHS = {  # of the data sets' own files
    "text_files": "images/{class_id:03d}/{number:06d}.jpg",
    "flowers_mat": "jpg/image_{number:05d}.jpg",
    "list_mats": "Images/n{class_id:08d}-kind/n{class_id:08d}_{number}.jpg",
    "annotations_mat": "car_ims/{number:06d}.jpg",
}


def write_json_split(card: TaskCard, root: Path, counts: Mapping[str, int], size: int = 12) -> Path:
    """Write a JSON split, its class ids with gaps unless the card states the first, and its images."""
    folder, number = root / card.folder, itertools.count(1)
    form = IMAGE_PATHS[str(card.reader.options["native"])]
    classes = min(card.classes, counts["train"])
    for seed, name in enumerate(("train", "val", "test")):
        rng = np.random.default_rng(seed)
        ids: Ids = {}
        for label in rng.permutation(np.arange(counts[name]) % classes).tolist():
            class_id = label + int(card.reader.options.get("first_id", 5 + 2 * label))
            path = form.format(number=next(number), class_id=class_id)
            save(folder / path, draw_image(label, card.classes, rng, size))
            ids[path.removeprefix("images/").removeprefix("Images/")] = class_id
        (folder / f"{name}.json").write_text(json.dumps(ids))
    return folder


def write_native(card: TaskCard, root: Path, counts: Mapping[str, int], size: int = 12) -> Path:
    """Write the data set's own files, class ids from 1, instead of a JSON split."""
    folder = write_json_split(card, root, counts, size)
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


# --- the files that torchvision reads --------------------------------------------------------------------------------


def write_torchvision(card: TaskCard, root: Path, counts: Mapping[str, int], size: int = 12) -> Path:
    """Write the files of one of torchvision's data sets; its official train split holds train and val."""
    folder = root / card.folder
    counts = dict(counts)
    if card.reader.options["val"] != "official":
        counts["train"] += counts.pop("val")
    names = class_names(card) or [f"{label:05d}" for label in range(card.classes)]
    splits = {}
    for seed, (split, count) in enumerate(counts.items()):
        rng = np.random.default_rng(seed)
        labels = rng.permutation(np.arange(count) % card.classes).tolist()
        splits[split] = labels, [draw_image(label, card.classes, rng, size) for label in labels]
    kind = str(card.reader.options["set"])
    folder.mkdir(parents=True)
    if kind.startswith("CIFAR"):
        write_cifar(folder, kind, names, splits)
    for split, (labels, images) in splits.items():
        if kind == "SVHN":
            digits = np.array([[label or 10 for label in labels]], dtype=np.uint8).T  # 10 stands for the digit 0
            savemat(folder / f"{split}_32x32.mat", {"X": thumbnails(images).transpose(1, 2, 3, 0), "y": digits})
        elif kind == "DTD":
            paths = [f"{names[label]}/{split}{number:04d}.jpg" for number, label in enumerate(labels)]
            save_all(folder / "dtd/dtd/images", paths, images)
            write_text(folder / f"dtd/dtd/labels/{split}1.txt", "".join(f"{path}\n" for path in paths))
        elif kind == "Food101":
            listed: dict[str, list[str]] = {name: [] for name in names}
            for number, label in enumerate(labels):
                listed[names[label]].append(f"{names[label]}/{split}{number}")
            paths = [f"{names[label]}/{split}{number}.jpg" for number, label in enumerate(labels)]
            save_all(folder / "food-101/images", paths, images)
            write_text(folder / f"food-101/meta/{split}.json", json.dumps(listed))
        elif kind == "GTSRB" and split == "train":  # tracks of three frames
            frames = [labels[:place].count(label) for place, label in enumerate(labels)]
            paths = [f"{label:05d}/{n // 3:05d}_{n % 3:05d}.ppm" for label, n in zip(labels, frames, strict=True)]
            save_all(folder / "gtsrb/GTSRB/Training", paths, images)
        elif kind == "GTSRB":
            paths = [f"{number:05d}.ppm" for number in range(len(labels))]
            save_all(folder / "gtsrb/GTSRB/Final_Test/Images", paths, images)
            rows = [f"{path};{label}\n" for path, label in zip(paths, labels, strict=True)]
            write_text(folder / "gtsrb/GT-final_test.csv", "".join(["Filename;ClassId\n", *rows]))
    return folder


def write_cifar(
    folder: Path, kind: str, names: list[str], splits: Mapping[str, tuple[list[int], list[Pixels]]]
) -> None:
    fine = "fine_" if kind == "CIFAR100" else ""
    place = folder / ("cifar-100-python" if fine else "cifar-10-batches-py")
    place.mkdir()
    for split, (labels, images) in splits.items():
        data = thumbnails(images).transpose(0, 3, 1, 2).reshape(len(labels), -1)
        files = [split] if fine else ["test_batch"] if split == "test" else [f"data_batch_{n}" for n in range(1, 6)]
        for file, part in zip(files, np.array_split(np.arange(len(labels)), len(files)), strict=True):
            content = {"data": data[part], f"{fine}labels": [labels[number] for number in part]}
            (place / file).write_bytes(pickle.dumps(content))
    (place / ("meta" if fine else "batches.meta")).write_bytes(pickle.dumps({f"{fine}label_names": names}))


def thumbnails(images: Sequence[Pixels]) -> Pixels:
    """Return images as uint8 (N, 32, 32, 3)."""
    return np.stack([np.asarray(Image.fromarray(image).resize((32, 32))) for image in images])


def save(path: Path, image: Pixels) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)


def save_all(folder: Path, paths: list[str], images: list[Pixels]) -> None:
    for path, image in zip(paths, images, strict=True):
        save(folder / path, image)


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
