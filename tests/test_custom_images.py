"""Custom images: a folder for each class, no card to write."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_error, command, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from svp_bench.core.errors import DataError
from svp_bench.data.class_folders import open_class_folders
from svp_bench.data.sources import FileImages, Source, inspect, measured, open_source
from svp_bench.records.store import read_records
from svp_bench.tasks.cards import load_task

CARD = load_task("custom/images")
NANO = (
    *("--model.backbone", "vim_nano_patch8_64", "--model.checkpoint", "embedded", "--data.image_size", "64"),
    *("--trainer.max_epochs", "1", "--data.batch_size", "8", "--trainer.accelerator", "cpu"),
)


def image(path: Path, grey: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng([grey, *str(path).encode()]).integers(0, 40, size=(12, 10), dtype=np.uint8)
    Image.fromarray(noise + np.uint8(grey)).save(path)


def fill(root: Path, *, below: str = "", classes: tuple[str, ...] = ("cat", "dog"), count: int = 10) -> Path:
    for label, name in enumerate(classes):
        for number in range(count):
            image(root / below / name / f"{number}.png", 20 + 80 * label + number)
    return root


def paths(source: Source, name: str) -> list[str]:
    images = source.get(name)
    assert isinstance(images, FileImages)
    return list(images.paths)


def lengths(source: Source) -> dict[str, int]:
    return {name: len(images) for name, images in source.splits.items()}


# --- the two layouts -------------------------------------------------------------------------------------------------


def test_class_folders_are_split_in_fifths(tmp_path: Path) -> None:
    source = open_source(CARD, fill(tmp_path))
    assert source.class_names == ("cat", "dog")
    assert lengths(source) == {"train": 12, "val": 4, "trainval": 16, "test": 4}
    for name in source.splits:
        labels = source.get(name).labels.tolist()
        assert [path.startswith("dog/") for path in paths(source, name)] == [label == 1 for label in labels]
    assert paths(source, "trainval") == sorted(paths(source, "train") + paths(source, "val"))
    card = measured(CARD, tmp_path)
    assert (card.classes, card.counts) == (2, lengths(source))
    assert inspect(card, source, ["train", "val", "test"]).status == "as_card"


def test_folders_train_val_test_are_taken_as_they_are(tmp_path: Path) -> None:
    for part, count in (("train", 5), ("validation", 2), ("test", 3)):
        fill(tmp_path, below=part, count=count)
    source = open_source(CARD, tmp_path)
    assert lengths(source) == {"train": 10, "val": 4, "trainval": 14, "test": 6}
    assert {path.split("/")[0] for path in paths(source, "val")} == {"validation"}


def test_without_val_a_fifth_of_train_is_val(tmp_path: Path) -> None:
    fill(tmp_path, below="train", count=10)
    fill(tmp_path, below="test", count=3)
    source = open_source(CARD, tmp_path)
    assert lengths(source) == {"train": 16, "val": 4, "trainval": 20, "test": 6}
    assert {path.split("/")[0] for path in paths(source, "val")} == {"train"}


def test_what_is_no_image_is_left_out_and_folders_within_a_class_are_its_own(tmp_path: Path) -> None:
    fill(tmp_path)
    before = lengths(open_source(CARD, tmp_path))
    (tmp_path / "README.txt").write_text("mine")
    (tmp_path / ".git").mkdir()
    (tmp_path / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "cat" / ".hidden.png").write_bytes(b"x")
    assert lengths(open_source(CARD, tmp_path)) == before
    image(tmp_path / "cat" / "indoors" / "möwe 1.JPG", 77)
    assert sum(lengths(open_source(CARD, tmp_path)).values()) > sum(before.values())


@given(counts=st.lists(st.integers(3, 40), min_size=2, max_size=5), more=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_a_split_is_a_partition_and_one_more_image_moves_at_most_one_of_each_list(
    tmp_path_factory: pytest.TempPathFactory, counts: list[int], more: int
) -> None:
    root = tmp_path_factory.mktemp("own")
    for label, count in enumerate(counts):
        (root / f"c{label}").mkdir()
        for number in range(count):
            (root / f"c{label}" / f"{number}.jpg").write_text(f"{label} {number}")
    first = open_class_folders(CARD, None, root)  # type: ignore[arg-type]  # it does not use the suite's card
    parts = [set(paths(first, name)) for name in ("train", "val", "test")]
    assert sum(map(len, parts)) == len(set.union(*parts)) == sum(counts)
    for name in first.splits:
        assert np.bincount(first.get(name).labels, minlength=len(counts)).min() >= 1
    (root / "c0" / f"new {more}.jpg").write_text("new")
    second = open_class_folders(CARD, None, root)  # type: ignore[arg-type]
    assert len(set(paths(second, "test")) - parts[2]) <= 1
    assert len(set(paths(second, "val")) - parts[1]) <= 2
    shutil.rmtree(root)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def make_empty(root: Path) -> None:
    root.mkdir(exist_ok=True)


def make_lonely(root: Path) -> None:
    fill(root)
    image(root / "cow" / "1.png", 9)


def make_hollow(root: Path) -> None:
    fill(root)
    (root / "cow").mkdir()


def make_untested(root: Path) -> None:
    fill(root, below="train", classes=("cat", "dog"))
    fill(root, below="val", classes=("cow", "dog"))


def make_untrained(root: Path) -> None:
    fill(root, below="Val")
    fill(root, below="Test", classes=("cow", "dog"))


def make_single(root: Path) -> None:
    fill(root / "images")


def make_twice(root: Path) -> None:
    fill(root)
    shutil.copy(root / "cat" / "3.png", root / "dog" / "copy.png")


def make_looped(root: Path) -> None:
    fill(root)
    (root / "cat" / "all").symlink_to("..", target_is_directory=True)


def make_only_heic(root: Path) -> None:
    fill(root)
    (root / "phone").mkdir()
    (root / "phone" / "1.HEIC").write_bytes(b"x")


def make_dangling(root: Path) -> None:
    fill(root)
    (root / "dog" / "gone.jpg").symlink_to("nowhere.jpg")


def make_foreign(root: Path) -> None:
    fill(root, below="train")
    fill(root, below="test", classes=("cat", "dogs"))


def make_double(root: Path) -> None:
    for part in ("train", "val", "valid", "test"):
        fill(root, below=part)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_empty, "holds no folder with images .*; own images lie in DIR/<class>/, or in DIR/train/<class>/"),
        (make_lonely, "cow has 1 image; to be split, a class needs at least 3"),
        (make_hollow, "cow holds no image"),
        (make_untested, "has train, val and no folder called test; add one, or put all images into class folders"),
        (make_untrained, "has Test, Val and no folder called train"),
        (make_single, "holds one class only, 'images'; .*one level too high"),
        (make_twice, "cat/3.png and dog/copy.png are the same image; keep one of them"),
        (make_looped, "this link leads back to a folder that it is in; take it away"),
        (make_only_heic, r"phone holds no image .*\(skipped: 1 \.heic\); take the folder away, or fill it"),
        (make_dangling, "gone.jpg: cannot be read"),
        (make_foreign, "test: unknown class .*train.* 'dogs'; did you mean 'dog'"),
        (make_double, "has both val and valid; keep one of them"),
    ],
)
def test_errors_of_folders_state_the_reason(make: object, message: str, tmp_path: Path) -> None:
    make(tmp_path / "images")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        measured(CARD, tmp_path / "images")


def test_a_missing_folder_and_no_folder_are_one_line_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SVP_BENCH_DATA", raising=False)
    fit = ("fit", "--config", "configs/custom/images.yaml", *NANO)
    assert "Give their folder with --data.root DIR (DIR/<class>/*.jpg)" in assert_error(command(*fit), 1)
    assert "nowhere is not a folder (--data.root is nowhere)" in assert_error(
        command(*fit, "--data.root", "nowhere"), 1
    )
    assert not list(tmp_path.iterdir())


# --- through the commands --------------------------------------------------------------------------------------------


def test_from_a_folder_to_a_table_and_predictions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "my images", classes=("cat", "dog", "öl"))
    assert "found" in run("tasks", "custom").out
    checked = run("data", "verify", "custom/images", "--root", "my images").out
    assert "train 18, val 6, trainval 24, test 6" in checked
    assert "classes cat, dog, öl" in checked
    given = ("--config", "configs/custom/images.yaml", "--data.root", "my images", *NANO)
    run("fit", *given, "--method", "linear")
    run("fit", *given, "--method", "svp", "--data.stage", "select")
    records, problems = read_records(tmp_path / "results")
    assert problems == []
    assert {(record.kind, record.method, record.data_status) for record in records} == {
        ("final", "linear", "as_card"),
        ("selection", "svp", "as_card"),
    }
    (final,) = (record for record in records if record.kind == "final")
    assert final.metrics is not None
    assert final.metrics.count == 6
    assert "linear" in run("table").out
    (path,) = (tmp_path / "results" / "records").rglob(f"{final.run_id}.json")
    audited = command("audit", str(path)).out
    assert "6 images of test" in audited
    assert "classes as found" in audited
    again = run("rerun", str(path), "--results_root", "again", "--runs_root", "again-runs")
    assert "Bit-equal" in again.out
    (checkpoint,) = (tmp_path / "runs").rglob(f"{final.run_id}/checkpoints/last.ckpt")
    named = run("predict", "--ckpt", str(checkpoint), "--images", "my images/öl/1.png").out
    assert set(named.splitlines()[-1].split(",")) & {"cat", "dog", "öl"}
    plan = run("sweep", "--tasks", "custom/images", "--methods", "linear,bias", *given[2:], "--dry_run").out
    assert "bias" in plan


def test_other_images_under_the_same_names_are_another_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fill(tmp_path / "one", count=6)
    shutil.copytree(tmp_path / "one", tmp_path / "same")
    (tmp_path / "two").mkdir()
    for old, new in (("cat", "dog"), ("dog", "cat")):  # the labels swapped
        shutil.copytree(tmp_path / "one" / old, tmp_path / "two" / new)
    assert open_source(CARD, tmp_path / "one").digest == open_source(CARD, tmp_path / "same").digest
    given = ("--config", "configs/custom/images.yaml", "--method", "linear", *NANO)
    run("fit", *given, "--data.root", "one")
    sweep = ("sweep", "--tasks", "custom/images", "--methods", "linear", *NANO, "--dry_run", "--data.root")
    plans = {name: run(*sweep, name).out.splitlines() for name in ("same", "two")}
    there = {
        name: next(line.split() for line in plan if line.split()[:1] == ["linear"]) for name, plan in plans.items()
    }
    assert there["same"][:6] == ["linear", "0", "1", "1", "0", "0"]  # trials, runs, there, failed, to do
    assert there["two"][:6] == ["linear", "0", "1", "0", "0", "1"]


def test_parts_may_be_called_as_people_do_and_a_class_may_be_called_train(tmp_path: Path) -> None:
    for part, name in (("Training", "a"), ("TEST", "b"), ("Valid", "c")):
        fill(tmp_path / "parts", below=part, count=3 + len(name))
    assert lengths(open_source(CARD, tmp_path / "parts")) == {"train": 8, "val": 8, "trainval": 16, "test": 8}
    vehicles = open_source(CARD, fill(tmp_path / "vehicles", classes=("bus", "train")))
    assert vehicles.class_names == ("bus", "train")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_one_line(tmp_path: Path) -> None:
    fill(tmp_path)
    (tmp_path / "cat").chmod(0)
    try:
        with pytest.raises(DataError, match="cat: cannot be read"):
            open_source(CARD, tmp_path)
    finally:
        (tmp_path / "cat").chmod(0o755)
