"""HTA: what its cards say, how its lists are made, and torchvision's data sets read from where they lie."""

from __future__ import annotations

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run, settle, small
from native_files import write_json_split, write_torchvision

from svp_bench.core.errors import CardError, DataError, UnavailableError
from svp_bench.data.reading import SYNTHETIC_MARK
from svp_bench.data.sources import FileImages, Source, inspect, open_source
from svp_bench.data.synthetic import draw_task
from svp_bench.data.torchvision_sets import TORCHVISION_SETS
from svp_bench.tasks.cards import TaskCard, class_names, list_tasks, load_protocol, load_suite, load_task

# Classes, train, val and test, and the length of the list that SVP trains on (its released code; JSON files counted).
FACTS = {
    "cifar10": (10, 40_000, 10_000, 10_000, 50_000),
    "cifar100": (100, 40_000, 10_000, 10_000, 50_000),
    "cub200": (200, 5_393, 600, 5_794, 5_393),
    "dtd": (47, 1_880, 1_880, 1_880, 1_880),
    "nabirds": (555, 21_536, 2_393, 24_633, 21_536),
    "stanford_dogs": (120, 10_800, 1_200, 8_580, 10_800),
    "oxford_flowers": (102, 1_020, 1_020, 6_149, 1_020),
    "food101": (101, 60_600, 15_150, 25_250, 60_600),
    "gtsrb": (43, 21_312, 5_328, 12_630, 21_312),
    "svhn": (10, 58_605, 14_652, 26_032, 58_605),
}
OFFICIAL_TRAIN = {"cifar10": 50_000, "cifar100": 50_000, "food101": 75_750, "gtsrb": 26_640, "svhn": 73_257}
SHARED = {"cub200": "cub", "nabirds": "nabirds", "stanford_dogs": "stanford_dogs", "oxford_flowers": "oxford_flowers"}
THROUGH_TORCHVISION = [f"hta/{task}" for task in FACTS if task not in SHARED]
COUNTS = {"train": 48, "val": 12, "test": 9}  # as four to one; 43 classes of GTSRB must be there


def draw(root: Path, name: str) -> tuple[TaskCard, Path]:
    card = load_task(name)
    return card, write_torchvision(card, root, COUNTS)


@pytest.fixture(autouse=True)
def _any_checksum(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read files whose checksums are not those of the real data."""
    if "checksum" not in request.node.name:
        for module in ("cifar", "svhn"):
            monkeypatch.setattr(
                f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).is_file()
            )


def paths(source: Source, name: str) -> tuple[str, ...]:
    of = source.get(name)
    assert isinstance(of, FileImages)
    return of.paths


# --- the cards -------------------------------------------------------------------------------------------------------


def test_the_suite_is_one_group_of_ten() -> None:
    suite = load_suite("hta")
    assert dict(suite.groups) == {"hta": tuple(FACTS)}
    assert (suite.table, suite.protocol) == ("hta", "hta-final")
    assert list_tasks("hta") == [f"hta/{task}" for task in FACTS]


@pytest.mark.parametrize("task", FACTS)
def test_a_card_states_the_numbers_and_refits_on_a_list_of_svps_length(task: str) -> None:
    classes, train, val, test, of_svp = FACTS[task]
    card = load_task(f"hta/{task}")
    assert card.classes == classes
    assert card.counts == {"train": train, "val": val, "refit": of_svp, "test": test}
    assert card.counts["refit"] == card.counts["train"] + (val if card.reader.options["refit"] == "trainval" else 0)


@pytest.mark.parametrize("task", OFFICIAL_TRAIN)
def test_train_is_four_fifths_of_the_official_list_rounded_down(task: str) -> None:
    counts = load_task(f"hta/{task}").counts
    assert counts["train"] == int(0.8 * OFFICIAL_TRAIN[task])
    assert counts["train"] + counts["val"] == OFFICIAL_TRAIN[task]


@pytest.mark.parametrize("task", SHARED)
def test_shared_images_are_read_where_fgvc_reads_them(tmp_path: Path, task: str) -> None:
    ours, theirs = load_task(f"hta/{task}"), load_task(f"fgvc/{SHARED[task]}")
    assert (ours.folder, ours.other_folders, ours.classes) == (theirs.folder, theirs.other_folders, theirs.classes)
    assert ours.reader.kind == theirs.reader.kind
    write_json_split(theirs, tmp_path / "FGVC", {"train": 12, "val": 5, "test": 7})
    here, there = (open_source(card, tmp_path) for card in (ours, theirs))
    for name in ("train", "val", "test"):
        assert here.get(name).digest == there.get(name).digest
    assert paths(here, "refit") == paths(here, "train")
    assert len(there.get("trainval")) == 17


def test_the_protocol_has_the_lists_of_both_stages() -> None:
    protocol = load_protocol("hta-final")
    assert protocol.stages == {"select": {"train": "train", "val": "val"}, "final": {"train": "refit", "test": "test"}}
    assert (protocol.training["trainer"]["max_epochs"], protocol.training["data"]["batch_size"]) == (100, 96)


@pytest.mark.parametrize("suite", ["fgvc", "hta"])
def test_the_names_of_the_flowers_are_torchvisions(suite: str) -> None:
    from torchvision.datasets import Flowers102

    assert class_names(load_task(f"{suite}/oxford_flowers")) == Flowers102.classes


def test_the_signs_have_names() -> None:
    names = class_names(load_task("hta/gtsrb"))
    assert names is not None
    assert (names[0], names[14], names[42]) == (
        "Speed limit (20km/h)",
        "Stop",
        "End of no passing by vehicles over 3.5 metric tons",
    )


@pytest.mark.parametrize("task", ["cifar", "svhn"])
def test_vtab_calls_its_classes_as_the_same_sets_of_hta(task: str) -> None:
    other = {"cifar": "cifar100"}.get(task, task)
    assert class_names(load_task(f"vtab/{task}")) == class_names(load_task(f"hta/{other}"))


@pytest.mark.parametrize("task", ["cifar10", "cifar100", "dtd", "food101", "svhn"])
def test_class_names_have_the_order_of_the_labels(task: str) -> None:
    names = class_names(load_task(f"hta/{task}"))
    assert names is not None
    assert names == sorted(names)  # as the sources number them
    assert len(names) == FACTS[task][0]


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THROUGH_TORCHVISION)
def test_each_set_is_read(tmp_path: Path, name: str) -> None:
    card, _ = draw(tmp_path, name)
    source = open_source(card, tmp_path)
    for of in source.splits.values():
        of.verify()
        image = of.load(len(of) - 1)
        assert (image.mode, 0 <= of.labels.min() <= of.labels.max() < card.classes) == ("RGB", True)
        assert of.where(0)
    lengths = {key: len(of) for key, of in source.splits.items()}
    assert lengths == {**COUNTS, "refit": 60 if card.reader.options["refit"] == "trainval" else 48}
    report = inspect(card, source, ["refit", "test"])
    assert (report.variant, report.status) == ("card", "different")
    assert open_source(card, tmp_path).digest == source.digest


@pytest.mark.parametrize("name", ["hta/cifar10", "hta/dtd", "hta/gtsrb", "hta/svhn"])
def test_labels_belong_to_their_images(tmp_path: Path, name: str) -> None:
    # The hue of a synthetic image follows its class.
    card, _ = draw(tmp_path, name)
    source = open_source(card, tmp_path)
    hits = 0
    for key in ("train", "test"):
        of = source.get(key)
        for index, label in enumerate(of.labels.tolist()):
            hue = np.asarray(of.load(index).convert("HSV"))[..., 0] / 255 * 2 * np.pi
            mean = np.angle(np.exp(1j * hue).mean()) / (2 * np.pi) % 1
            distance = abs(mean - label / card.classes)
            hits += min(distance, 1 - distance) < 0.15
    assert hits / (len(source.get("train")) + len(source.get("test"))) > 0.8  # by chance: 0.3


def test_the_last_fifth_in_file_order_is_val(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/cifar100")
    stored = pickle.loads((folder / "cifar-100-python" / "train").read_bytes())
    source = open_source(card, tmp_path)
    labels = {name: of.labels.tolist() for name, of in source.splits.items()}
    assert labels["train"] == stored["fine_labels"][:48]
    assert labels["val"] == stored["fine_labels"][48:]
    assert labels["refit"] == stored["fine_labels"]
    first = np.asarray(source.get("val").load(0)).transpose(2, 0, 1).ravel()
    assert (first == stored["data"][48]).all()


def test_a_hashed_val_follows_from_the_paths_alone(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/food101")
    source = open_source(card, tmp_path)
    train, val = paths(source, "train"), paths(source, "val")
    order = sorted({*train, *val}, key=lambda path: hashlib.sha256(path.encode()).hexdigest())
    assert {*train} == {*order[:48]}
    assert {*val} == {*order[48:]}
    meta = folder / "food-101" / "meta" / "train.json"
    listed = [f"food-101/images/{path}.jpg" for part in json.loads(meta.read_text()).values() for path in part]
    assert [path for path in listed if path in {*train}] == list(train)  # in file order
    assert paths(source, "refit") == train


def test_frames_of_one_track_stay_together_but_for_the_cut(tmp_path: Path) -> None:
    card = load_task("hta/gtsrb")
    write_torchvision(card, tmp_path, {"train": 240, "val": 60, "test": 5}, size=8)
    source = open_source(card, tmp_path)
    tracks = {name: {path.rpartition("_")[0] for path in paths(source, name)} for name in ("train", "val")}
    assert len(tracks["train"] & tracks["val"]) <= 1
    assert len(tracks["val"]) > 5
    alone = replace(card, reader=replace(card.reader, options={"set": "GTSRB", "val": "hashed", "refit": "train"}))
    source = open_source(alone, tmp_path)
    tracks = {name: {path.rpartition("_")[0] for path in paths(source, name)} for name in ("train", "val")}
    assert len(tracks["train"] & tracks["val"]) > 1  # what the option is for


def test_the_official_val_of_dtd_is_val(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/dtd")
    source = open_source(card, tmp_path)
    listed = (folder / "dtd" / "dtd" / "labels" / "val1.txt").read_text().splitlines()
    assert paths(source, "val") == tuple(f"dtd/dtd/images/{path}" for path in listed)
    # Not all classes are in val: torchvision numbers those that it finds, the card's names put that right.
    names = class_names(card) or []
    assert [names[label] for label in source.get("val").labels.tolist()] == [path.split("/")[0] for path in listed]


def test_zero_is_labelled_zero_in_svhn(tmp_path: Path) -> None:
    from scipy.io import loadmat

    card, folder = draw(tmp_path, "hta/svhn")
    stored = loadmat(folder / "train_32x32.mat")["y"].ravel().astype(int)
    assert 10 in stored
    source = open_source(card, tmp_path)
    read = [*source.get("train").labels.tolist(), *source.get("val").labels.tolist()]
    assert read == (stored % 10).tolist()


@pytest.mark.parametrize("place", ["cifar10", "HTA/cifar10", "FGVC/cifar10", ".", "HTA"])
def test_torchvisions_root_may_be_the_tasks_folder_or_a_shared_one(tmp_path: Path, place: str) -> None:
    card, folder = draw(tmp_path / "synthetic", "hta/cifar10")
    target = tmp_path / "root" / place
    target.mkdir(parents=True, exist_ok=True)
    for child in folder.iterdir():
        child.rename(target / child.name)
    assert open_source(card, tmp_path / "root").origin == str(target.resolve())


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", THROUGH_TORCHVISION)
def test_the_error_of_a_missing_set_states_how_to_download_it(tmp_path: Path, name: str) -> None:
    card = load_task(name)
    with pytest.raises(DataError) as caught:
        open_source(card, tmp_path)
    text = str(caught.value)
    kind = str(card.reader.options["set"])
    assert f'python -c "from torchvision.datasets import {kind}; ' in text
    assert f"{kind}('{tmp_path / card.folder}', " in text
    assert "download=True" in text
    assert str(tmp_path / "HTA" / card.folder) in text
    assert "\n" not in text
    command = text.partition('python -c "')[2].partition('"')[0]
    compile(command, "command", "exec")


@pytest.mark.parametrize("name", ["hta/cifar10", "hta/svhn"])
def test_files_without_the_known_checksum_are_refused(tmp_path: Path, name: str) -> None:
    card, _ = draw(tmp_path, name)
    with pytest.raises(DataError, match=r"not found or corrupted.+; get it again with `python -c") as caught:
        open_source(card, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("hta/cifar10", "cifar-10-batches-py/test_batch", b"no pickle", r"/cifar10: cannot be read \(UnpicklingError"),
        ("hta/svhn", "test_32x32.mat", b"no mat file" * 20, r"/svhn: cannot be read \(.+\); get it again"),
        ("hta/food101", "food-101/meta/test.json", b"{", r"food101: cannot be read \(JSONDecodeError"),
        ("hta/food101", "food-101/meta/test.json", b'{"soup": ["soup/1"]}', "has a class 'soup' that food101.txt"),
        ("hta/gtsrb", "gtsrb/GT-final_test.csv", b"Filename;ClassId\n0.ppm;43\n", r"label 43 is out of range.+0\.\.42"),
        ("hta/gtsrb", "gtsrb/GT-final_test.csv", b"Filename;ClassId\n", "GTSRB test in .+: 0 images and 0 labels"),
    ],
)
def test_broken_sets_are_one_line(tmp_path: Path, name: str, file: str, content: bytes, message: str) -> None:
    card, folder = draw(tmp_path, name)
    (folder / file).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        open_source(card, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_test_image_of_dtd_in_train_stops_it(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/dtd")
    labels = folder / "dtd" / "dtd" / "labels"
    line = (labels / "test1.txt").read_text().splitlines()[0]
    (labels / "train1.txt").write_text(f"{(labels / 'train1.txt').read_text()}{line}\n")
    with pytest.raises(DataError, match=r"DTD test \(test\): 1 of its images are also in DTD train \(train\)"):
        open_source(card, tmp_path)


def test_a_test_image_of_food101_in_train_stops_it(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/food101")
    meta = folder / "food-101" / "meta"
    train, test = (json.loads((meta / f"{name}.json").read_text()) for name in ("train", "test"))
    kind = next(name for name, files in test.items() if files)
    train[kind] += test[kind]
    (meta / "train.json").write_text(json.dumps(train))
    with pytest.raises(DataError, match=r"Food101 test \(test\): \d of its images are also in Food101 train"):
        open_source(card, tmp_path)


def test_a_repeated_line_of_dtd_is_noted(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/dtd")
    path = folder / "dtd" / "dtd" / "labels" / "test1.txt"
    path.write_text(f"{path.read_text()}{path.read_text().splitlines()[0]}\n")
    assert any("DTD test (test) repeats 1 image, the first is" in note for note in open_source(card, tmp_path).notes)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([-1], r"CIFAR10 test in .+: label -1 is out of range, CIFAR10 test has 10 classes \(0\.\.9\)"),
        ([10], r"label 10 is out of range, CIFAR10 test has 10 classes"),
        ([1.7], r"CIFAR10 test in .+: its labels hold 1\.7, expected whole numbers"),
        ([float("nan")], "its labels hold nan, expected whole numbers"),
        (["cat"], "its labels hold 'cat', expected whole numbers"),
        ([[1, 2], [3]], "its labels hold .+, expected whole numbers"),
    ],
)
def test_labels_of_cifar_that_are_no_class_are_refused(tmp_path: Path, labels: list[Any], message: str) -> None:
    card, folder = draw(tmp_path, "hta/cifar10")
    path = folder / "cifar-10-batches-py" / "test_batch"
    content = pickle.loads(path.read_bytes())
    content["labels"] = [*labels, *content["labels"][len(labels) :]]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=message):
        open_source(card, tmp_path)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("y", lambda y: y + 20, r"label \d+ is out of range, the card of hta/svhn has 10 classes"),
    ],
)
def test_svhn_of_other_values_is_refused(tmp_path: Path, key: str, change: Any, message: str) -> None:
    from scipy.io import loadmat, savemat

    card, folder = draw(tmp_path, "hta/svhn")
    content = {name: loadmat(folder / "test_32x32.mat")[name] for name in ("X", "y")}
    savemat(folder / "test_32x32.mat", {**content, key: change(content[key])})
    with pytest.raises(DataError, match=message):
        open_source(card, tmp_path)


def test_a_torchvision_that_keeps_its_files_elsewhere_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torchvision

    card, _ = draw(tmp_path, "hta/dtd")
    original = torchvision.datasets.DTD.__init__

    def changed(self: Any, *arguments: Any, **keywords: Any) -> None:
        original(self, *arguments, **keywords)
        self.files = self.__dict__.pop("_image_files")

    monkeypatch.setattr(torchvision.datasets.DTD, "__init__", changed)
    with pytest.raises(UnavailableError, match=r"'DTD' .+ '_image_files'; install a torchvision .+ pip "):
        open_source(card, tmp_path)


def test_a_missing_class_folder_of_gtsrb_stops_it(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/gtsrb")
    (folder / "gtsrb" / "GTSRB" / "Training" / "00003").rename(tmp_path / "00003")
    with pytest.raises(DataError, match=r"00004_00000\.ppm|/00004/.+torchvision labels it 3: a class folder before it"):
        open_source(card, tmp_path)


def test_missing_images_are_found_before_training(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/dtd")
    for path in list((folder / "dtd" / "dtd" / "images").rglob("test*.jpg"))[:2]:
        path.unlink()
    with pytest.raises(DataError, match=r"2 of the 9 images of DTD test \(test\) are missing, the first is .+\.jpg"):
        open_source(card, tmp_path).get("test").verify()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"set": "CIFAR", "val": "last"}, "'set' must be one of CIFAR10, .+, not 'CIFAR'"),
        ({"set": "CIFAR10"}, "the key 'val' is missing"),
        ({"set": "CIFAR10", "val": "first"}, "'val' must be one of last, hashed, official, not 'first'"),
        ({"set": "DTD", "val": "last"}, "the rule for val is 'last', but DTD has a val list of its own"),
        ({"set": "SVHN", "val": "official"}, "the rule for val is 'official', but SVHN has no val list of its own"),
        ({"set": "CIFAR10", "val": "hashed", "refit": "train"}, "the rule 'hashed' is for data sets of files"),
        ({"set": "CIFAR10", "val": "last", "refit": "test"}, "'refit' must be one of train, trainval, not 'test'"),
        ({"kind": "CIFAR10"}, "unknown reader key 'kind'"),
    ],
)
def test_wrong_cards_are_refused(tmp_path: Path, options: dict[str, str], message: str) -> None:
    card, _ = draw(tmp_path, "hta/cifar10")
    with pytest.raises(CardError, match=f"cifar10.yaml:1: .*{message}"):
        open_source(replace(card, reader=replace(card.reader, options=options)), tmp_path)


def test_every_set_of_the_reader_is_on_a_card() -> None:
    used = {load_task(name).reader.options["set"] for name in THROUGH_TORCHVISION}
    assert used == {*TORCHVISION_SETS}


# --- synthetic images ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*THROUGH_TORCHVISION, "fgvc/cub", "hta/cub200"])
def test_a_synthetic_folder_is_read_as_split_files(tmp_path: Path, name: str) -> None:
    card = load_task(name)
    folder = draw_task(card, tmp_path, counts={"train": 12, "val": 5, "test": 7}, size=8)
    source = open_source(card, tmp_path)
    refit = 17 if card.reader.options.get("refit", "trainval") == "trainval" else 12
    assert {split: len(source.get(split)) for split in card.counts} == {
        split: {"train": 12, "val": 5, "test": 7}.get(split, refit) for split in card.counts
    }
    assert (source.origin, inspect(card, source, ["train"]).variant) == (str(folder), "synthetic")


def test_a_mark_without_split_files_is_refused(tmp_path: Path) -> None:
    card, folder = draw(tmp_path, "hta/cifar10")
    (folder / SYNTHETIC_MARK).touch()
    with pytest.raises(DataError, match=r"SYNTHETIC\.txt marks .+`svp-bench data draw hta/cifar10`.+delete the mark"):
        open_source(card, tmp_path)


def test_the_real_data_go_before_synthetic_images(tmp_path: Path) -> None:
    card, folder = draw(tmp_path / "HTA", "hta/cifar10")
    assert (draw_task(card, tmp_path, counts=COUNTS, size=8) / SYNTHETIC_MARK).is_file()
    assert open_source(card, tmp_path).origin == str(folder)


def test_a_run_from_drawing_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    draw_task(load_task("hta/svhn"), tmp_path / "data", counts={"train": 16, "val": 4, "test": 6}, size=16)
    record = run(*small(config="configs/hta/svhn.yaml")).record
    assert (record["task"], record["protocol"], record["splits"]) == (
        "hta/svhn",
        "hta-final",
        {"train": "refit", "test": "test"},
    )
    assert (record["data_variant"], record["metrics"]["count"]) == ("synthetic", 6)
    assert record["config"]["model"]["label_smoothing"] == 0.1
    select = run(*small("--data.stage", "select", config="configs/hta/svhn.yaml")).record
    assert (select["kind"], select["metrics"]["count"]) == ("selection", 4)
    assert "1/10" in run("table", "--suite", "hta").out
