from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from svp_bench.core.errors import DataError, UsageError
from svp_bench.data.sources import open_source
from svp_bench.data.split_files import read_list
from svp_bench.data.synthetic import draw_image, draw_task
from svp_bench.data.transforms import resize_squash
from svp_bench.tasks.cards import list_tasks, load_task

CARD = load_task("vtab/dtd")
COUNTS = {"train800": 12, "val200": 5, "test": 9}


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_folder_has_the_form_of_the_community_archive(tmp_path: Path) -> None:
    folder = draw_task(CARD, tmp_path, counts=COUNTS, size=20)
    assert folder == tmp_path / "dtd"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dtd"]  # nothing else is left
    full = {**COUNTS, "train800val200": 17}
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["SYNTHETIC.txt", "images", *(f"{n}.txt" for n in full)]
    )
    for name, count in full.items():
        text = (folder / f"{name}.txt").read_text()
        lines = text.splitlines()
        assert [line.split(" ")[0] for line in lines] == [f"images/{name}/{number:06d}.jpg" for number in range(count)]
        assert text.endswith("\n")
        assert len(list((folder / "images" / name).iterdir())) == count
        source = open_source(CARD, tmp_path).get(name)
        source.verify()


def test_training_images_are_stored_twice_numbered_anew(tmp_path: Path) -> None:
    folder = draw_task(CARD, tmp_path, counts=COUNTS, size=20)
    lists = {name: read_list(folder / f"{name}.txt", CARD.classes) for name in CARD.counts}

    def stored(name: str) -> list[tuple[bytes, int]]:
        images = lists[name]
        return [
            ((folder / path).read_bytes(), int(label)) for path, label in zip(images.paths, images.labels, strict=True)
        ]

    assert stored("train800val200") == stored("train800") + stored("val200")
    assert len({image for image, _ in stored("train800val200") + stored("test")}) == 17 + 9


def test_sizes_vary_and_a_few_images_are_grey(tmp_path: Path) -> None:
    folder = draw_task(CARD, tmp_path, counts={**COUNTS, "train800": 30}, size=40)
    images = [Image.open(path) for path in sorted((folder / "images/train800").iterdir())]
    assert {image.format for image in images} == {"JPEG"}
    assert len({image.size for image in images}) > 10
    assert all(30 <= side <= 50 for image in images for side in image.size)
    assert sum(image.mode == "L" for image in images) == 3
    assert {image.mode for image in images} == {"L", "RGB"}


def test_the_seed_decides_everything(tmp_path: Path) -> None:
    first = content(draw_task(CARD, tmp_path / "a", counts=COUNTS, size=16, seed=3))
    again = content(draw_task(CARD, tmp_path / "b", counts=COUNTS, size=16, seed=3))
    other = content(draw_task(CARD, tmp_path / "c", counts=COUNTS, size=16, seed=4))
    assert first == again
    images = {name for name in first if name.endswith(".jpg")}
    assert all(first[name] != other[name] for name in images)


def test_default_counts_are_a_small_part(tmp_path: Path) -> None:
    card = replace(CARD, counts={"train800": 800, "val200": 50, "train800val200": 850, "test": 6})
    folder = draw_task(card, tmp_path, size=8)
    lengths = {name: len(read_list(folder / f"{name}.txt", card.classes)) for name in card.counts}
    assert lengths == {"train800": 80, "val200": 8, "train800val200": 88, "test": 6}


@pytest.mark.parametrize("classes", [2, 10])
def test_the_images_are_learnable(classes: int) -> None:
    rng = np.random.default_rng(0)

    def features(count: int) -> tuple[np.ndarray, np.ndarray]:
        labels = np.arange(count) % classes
        images = [Image.fromarray(draw_image(int(label), classes, rng, 32)) for label in labels]
        return np.stack([resize_squash(image, 16).reshape(3, -1).mean(axis=1) for image in images]), labels

    train, train_labels = features(100)
    test, test_labels = features(100)
    distance = ((test[:, None] - train[None]) ** 2).sum(axis=-1)
    accuracy = (train_labels[distance.argmin(axis=1)] == test_labels).mean()
    assert accuracy > 3 / classes if classes > 3 else accuracy > 0.9  # by mean colour alone


@pytest.mark.parametrize("name", list_tasks("vtab"))
def test_each_card_of_the_suite_has_synthetic_images(tmp_path: Path, name: str) -> None:
    card = load_task(name)
    draw_task(card, tmp_path, counts={"train800": 2, "val200": 1, "test": 2}, size=8)
    source = open_source(card, tmp_path)
    assert {name: len(images) for name, images in source.splits.items()} == {
        "train800": 2,
        "val200": 1,
        "train800val200": 3,
        "test": 2,
    }


# --- what is refused -------------------------------------------------------------------------------------------------


def test_existing_data_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    (tmp_path / "dtd" / "train800.txt").write_text("mine 0\n")
    with pytest.raises(DataError, match=r"/dtd exists already and is not empty; give another"):
        draw_task(CARD, tmp_path, counts=COUNTS, size=8)
    assert content(tmp_path) == {"dtd/train800.txt": b"mine 0\n"}


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "dtd").mkdir()
    assert (draw_task(CARD, tmp_path, counts=COUNTS, size=8) / "test.txt").is_file()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Image.Image, *args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(DataError, match=r"/dtd cannot be written \(No space left on device\); give another folder"):
        draw_task(CARD, tmp_path, counts=COUNTS, size=8)
    assert list(tmp_path.iterdir()) == []


def test_a_root_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "root").write_text("")
    with pytest.raises(DataError, match=r"/root/dtd cannot be written \(.+\); give another folder"):
        draw_task(CARD, tmp_path / "root", counts=COUNTS, size=8)


def test_tasks_without_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="demo/digits is read by 'digits'"):
        draw_task(load_task("demo/digits"), tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": {"trian800": 4}}, "vtab/dtd 'trian800'; did you mean 'train800'"),
        ({"counts": {"test": 0}}, "count 0 of 'test' is out of range"),
        ({"counts": {"train800": 4, "val200": 2, "train800val200": 7}}, r"count 7 of 'train800val200' does not fit:"),
        ({"size": 7}, "synthetic images need a size of at least 8, not 7"),
        ({"seed": -1}, "seed -1 is out of range; a seed is 0 or above"),
    ],
)
def test_wrong_arguments_are_named(tmp_path: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        draw_task(CARD, tmp_path / "root", **arguments)  # type: ignore[arg-type]
    assert not (tmp_path / "root").exists()
