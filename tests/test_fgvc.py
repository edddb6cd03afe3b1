"""FGVC: what its cards say, JSON splits with all that is known to be wrong with them, and the data sets' own files."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import run, settle, small
from native_files import write_json_split, write_native
from PIL import Image
from synthetic_records import make_record

from svp_bench.core.errors import CardError, DataError
from svp_bench.data.sources import FileImages, Source, inspect, open_source
from svp_bench.records.store import write_record
from svp_bench.tasks.cards import TaskCard, class_names, list_tasks, load_protocol, load_suite, load_task

# Classes, images of train.json without those of val.json, of val.json and of test.json (counted in the released
# split), then official training and test images (the data sets' own pages).
FACTS = {
    "cub": (200, 5393, 600, 5794, 5994, 5794),
    "nabirds": (555, 21536, 2393, 24633, 23929, 24633),
    "oxford_flowers": (102, 1020, 1020, 6149, 2040, 6149),
    "stanford_dogs": (120, 10800, 1200, 8580, 12000, 8580),
    "stanford_cars": (196, 7329, 815, 8041, 8144, 8041),
}
NAMES = [f"fgvc/{task}" for task in FACTS]
COUNTS = {"train": 12, "val": 5, "test": 7}
CUB = load_task("fgvc/cub")


def draw(root: Path, card: TaskCard = CUB, *quirks: str, native: bool = False) -> Path:
    """Write the files of a task; its counts decide its variant."""
    folder = (write_native if native else write_json_split)(card, root, COUNTS)
    add_quirks(folder, *quirks)
    return folder


def add_quirks(folder: Path, *quirks: str) -> None:
    """Change a JSON split as released ones are: texts as ids, a val without a class or inside train, other endings."""
    if not quirks:
        return
    splits = {name: entries(folder, name) for name in COUNTS}
    if "val_lacks_class" in quirks:
        first, second = sorted({*splits["train"].values()})[:2]
        splits["val"] = {path: second if value == first else value for path, value in splits["val"].items()}
    if "val_in_train" in quirks:
        splits["train"] = dict(sorted({**splits["train"], **splits["val"]}.items()))
    for name, ids in splits.items():
        for number, path in enumerate(list(ids)):
            if "upper_case" in quirks and number % 4 == 0:
                upper = path.removesuffix(".jpg") + ".JPG"
                (folder / "images" / path).rename(folder / "images" / upper)
                ids[upper] = ids.pop(path)
        texts = {path: f"{value:03d}" if "text_ids" in quirks else value for path, value in ids.items()}
        (folder / f"{name}.json").write_text(json.dumps(texts))


def change(path: Path, **changes: object) -> None:
    """Set entries of a JSON file; None takes one out."""
    entries = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def change_lines(path: Path, how: Callable[[list[str]], list[str]]) -> None:
    """Change the lines of a text file."""
    path.write_text("".join(f"{line}\n" for line in how(path.read_text().splitlines())))


def entries(folder: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content


def images(source: Source, name: str) -> dict[str, int]:
    """Path -> label of one list."""
    of = source.get(name)
    assert isinstance(of, FileImages)
    return dict(zip(of.paths, of.labels.tolist(), strict=True))


def verify(source: Source) -> None:
    for of in source.splits.values():
        of.verify()


# --- the cards -------------------------------------------------------------------------------------------------------


def test_the_suite_is_one_group_of_five() -> None:
    suite = load_suite("fgvc")
    assert dict(suite.groups) == {"fgvc": tuple(FACTS)}
    assert (suite.table, suite.folder, suite.protocol) == ("fgvc", "FGVC", "fgvc-final")
    assert list_tasks("fgvc") == NAMES


@pytest.mark.parametrize("task", FACTS)
def test_a_card_states_the_numbers_of_the_split_and_of_its_source(task: str) -> None:
    classes, train, val, test, official, official_test = FACTS[task]
    card = load_task(f"fgvc/{task}")
    assert card.classes == classes
    assert card.counts == {"train": train, "val": val, "trainval": train + val, "test": test}
    variant = card.variants["official"]
    assert (variant["trainval"], variant["test"]) == (official, official_test)
    assert variant["train"] + variant["val"] == official
    assert variant["val"] == (val if task == "oxford_flowers" else official // 10)  # an official val, or every tenth


def test_the_protocol_has_the_lists_of_both_stages() -> None:
    protocol = load_protocol("fgvc-final")
    assert protocol.stages == {
        "select": {"train": "train", "val": "val"},
        "final": {"train": "trainval", "test": "test"},
    }
    assert (protocol.resize, protocol.training["trainer"]["max_epochs"]) == ("centre_crop", 100)


# --- JSON splits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_each_task_is_read_in_both_forms(tmp_path: Path, name: str) -> None:
    card = load_task(name)
    draw(tmp_path / "json", card)
    source = open_source(card, tmp_path / "json")
    verify(source)
    assert {key: len(of) for key, of in source.splits.items()} == {**COUNTS, "trainval": 17}
    assert inspect(card, source, ["trainval", "test"]).variant == "card"

    draw(tmp_path / "native", card, native=True)
    source = open_source(card, tmp_path / "native")
    verify(source)
    counts = {key: len(of) for key, of in source.splits.items()}
    tenth = COUNTS if name == "fgvc/oxford_flowers" else {"train": 16, "val": 1, "test": 7}
    assert counts == {**tenth, "trainval": 17}
    report = inspect(card, source, ["trainval", "test"])
    assert (report.variant, report.status) == ("official", "different")  # a few images are not the variant's
    assert any("the card's variant official states" in note for note in report.notes)


def test_labels_are_the_ranks_of_the_ids_in_train(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    ranks = {class_id: rank for rank, class_id in enumerate(sorted({*entries(folder, "train").values()}))}
    assert sorted(ranks) != list(ranks.values())  # ids are no labels
    source = open_source(CUB, tmp_path)
    for name in COUNTS:
        assert images(source, name) == {path: ranks[value] for path, value in entries(folder, name).items()}


def test_ids_may_be_texts_and_give_the_same_labels(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    numbers = {name: images(open_source(CUB, tmp_path), name) for name in COUNTS}
    for name in COUNTS:  # not padded: as texts, "11" would come before "5"
        change(folder / f"{name}.json", **{path: str(value) for path, value in entries(folder, name).items()})
    assert {name: images(open_source(CUB, tmp_path), name) for name in COUNTS} == numbers
    padded = draw(tmp_path / "padded", CUB, "text_ids")
    assert {*map(type, entries(padded, "val").values())} == {str}
    assert set(images(open_source(CUB, tmp_path / "padded"), "train").values()) == set(range(12))


def test_a_class_that_val_lacks_shifts_no_label(tmp_path: Path) -> None:
    card = load_task("fgvc/nabirds")
    folder = draw(tmp_path, card, "val_lacks_class")
    train, val = entries(folder, "train"), entries(folder, "val")
    assert min(train.values()) not in val.values()
    source = open_source(card, tmp_path)
    label_of = {train[path]: label for path, label in images(source, "train").items()}
    assert images(source, "val") == {path: label_of[value] for path, value in val.items()}
    anew = {value: rank for rank, value in enumerate(sorted({*val.values()}))}  # what released loaders do
    assert images(source, "val") != {path: anew[value] for path, value in val.items()}


def test_val_inside_train_is_taken_out_of_train_and_stays_in_trainval(tmp_path: Path) -> None:
    card = load_task("fgvc/stanford_cars")
    folder = draw(tmp_path, card, "val_in_train")
    train, val = entries(folder, "train"), entries(folder, "val")
    assert val.keys() < train.keys()
    source = open_source(card, tmp_path)
    assert images(source, "train").keys() == train.keys() - val.keys()
    assert list(images(source, "trainval")) == list(train)
    assert not images(source, "val").keys() & images(source, "train").keys()


def test_upper_case_names_are_read(tmp_path: Path) -> None:
    folder = draw(tmp_path, CUB, "upper_case")
    assert any(path.endswith(".JPG") for path in entries(folder, "train"))
    verify(open_source(CUB, tmp_path))


@pytest.mark.parametrize("place", ["CUB_200_2011", "cub", "FGVC/CUB_200_2011", "FGVC/FGVC/cub"])
@pytest.mark.parametrize("images", ["images", "Images", ""])
def test_folders_and_image_roots_go_by_several_names(tmp_path: Path, place: str, images: str) -> None:
    folder = draw(tmp_path / "synthetic")
    target = tmp_path / "root" / place
    target.parent.mkdir(parents=True)
    folder.rename(target)
    if images:
        (target / "images").rename(target / images)
    else:
        for child in (target / "images").iterdir():
            child.rename(target / child.name)
    verify(open_source(CUB, tmp_path / "root"))
    if Path(place).name == CUB.folder:
        verify(open_source(CUB, target))


def test_no_data_names_all_places_and_what_to_get(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_source(CUB, tmp_path)
    text = str(caught.value)
    for place in ("CUB_200_2011", "cub", "FGVC/CUB_200_2011", "FGVC/FGVC/cub"):
        assert f"{tmp_path / place}" in text
    for file in ("train.json", "test.json", "train_test_split.txt", "https://github.com/KMnP/vpt", CUB.source):
        assert file in text
    assert "\n" not in text


def test_images_in_none_of_the_roots(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    (folder / "images").rename(folder / "photos")
    with pytest.raises(DataError, match=r"train\.json: its images are in none of .+/images, .+/Images, .+CUB_200_2011"):
        open_source(CUB, tmp_path)


def test_a_name_in_other_case_is_pointed_out(tmp_path: Path) -> None:
    folder = draw(tmp_path, CUB, "upper_case")
    path = next(path for path in entries(folder, "train") if path.endswith(".JPG"))
    file = folder / "images" / path
    file.rename(file.with_suffix(".jpg"))
    with pytest.raises(DataError, match=rf"the first is .+\.JPG \(there is {file.stem}\.jpg, in other case\); get"):
        open_source(CUB, tmp_path).get("train").verify()


def test_listed_images_that_are_absent_are_counted(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    for path in list(entries(folder, "val"))[:2]:
        (folder / "images" / path).unlink()
    with pytest.raises(DataError, match=r"2 of the 5 images of .+/val\.json are missing, the first is .+\.jpg; get"):
        open_source(CUB, tmp_path).get("val").verify()


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("train.json", "{", r"train\.json: not JSON \(.+\); get the split again"),
        ("val.json", "\xff", r"val\.json: not JSON"),
        ("train.json", "[1]", r"train\.json: found \[1\], expected one object of image path -> class id"),
        ("test.json", "{}", r"test\.json: found \{\}, expected one object"),
        ("train.json", '{"a.jpg": 1, "b.jpg": 2, "a.jpg": 1}', r"train\.json: 'a\.jpg' is listed twice"),
        ("train.json", '{"a.jpg": 1.0}', r"class id of 'a\.jpg' is 1\.0, expected a whole number or a text of digits"),
        ("train.json", '{"a.jpg": true}', r"class id of 'a\.jpg' is True"),
        ("train.json", '{"a.jpg": null}', r"class id of 'a\.jpg' is None"),
        ("train.json", '{"a.jpg": "owl"}', r"class id of 'a\.jpg' is 'owl'"),
        ("train.json", '{"/a.jpg": 1}', r"train\.json: '/a\.jpg' is an absolute path"),
        ("train.json", '{"../a.jpg": 1}', r"train\.json: '\.\./a\.jpg' leads out of"),
        ("val.json", '{"a.jpg": 999}', r"val\.json: class id 999 of 'a\.jpg' is not among those of .+train\.json"),
        ("val.json", '{"\\ud800.jpg": 5}', r"val\.json: '\\ud800\.jpg' is not Unicode text \(half of"),
        ("val.json", '{"a\\u0000.jpg": 5}', r"val\.json: 'a\\x00\.jpg' holds control characters"),
        ("val.json", '{"./": 5}', r"val\.json: '\./' names no image"),
        ("train.json", '{"a.jpg": -1}', r"class id of 'a\.jpg' is -1, expected a whole number"),
        ("test.json", '{"a.jpg": "007"}', r"test\.json: class id 7 of 'a\.jpg' is not among those"),
        ("val.json", None, r"CUB_200_2011 has a JSON split without val\.json; get train\.json, val\.json and"),
    ],
)
def test_a_broken_split_is_one_line(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = draw(tmp_path)
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content.encode("latin1"))
    with pytest.raises(DataError, match=message) as caught:
        open_source(CUB, tmp_path)
    assert "\n" not in str(caught.value)


def test_test_images_in_training_stop_it(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    path, value = next(iter(entries(folder, "train").items()))
    change(folder / "test.json", **{path: value})
    with pytest.raises(DataError, match=r"test\.json: 1 of its images are also in .+train\.json, which must not see"):
        open_source(CUB, tmp_path)


@pytest.mark.parametrize("spell", ["./{0}/{1}", "{0}//{1}", "{0}/./{1}"])
def test_another_spelling_hides_no_test_image(tmp_path: Path, spell: str) -> None:
    folder = draw(tmp_path)
    path, value = next(iter(entries(folder, "train").items()))
    other = spell.format(*path.split("/"))
    change(folder / "test.json", **{other: value})
    with pytest.raises(DataError, match=r"test\.json: 1 of its images are also in .+train\.json"):
        open_source(CUB, tmp_path)
    change(folder / "test.json", **{other: None})
    change(folder / "train.json", **{other: value})
    with pytest.raises(DataError, match=r"train\.json: '.+' is listed twice"):
        open_source(CUB, tmp_path)


def test_in_the_own_files_another_spelling_hides_none_either(tmp_path: Path) -> None:
    folder = draw(tmp_path, native=True)
    change_lines(folder / "images.txt", lambda lines: [*lines, f"99 ./{lines[0].split()[1]}"])
    first = (folder / "train_test_split.txt").read_text().split()[1]
    change_lines(folder / "image_class_labels.txt", lambda lines: [*lines, f"99 {lines[0].split()[1]}"])
    change_lines(folder / "train_test_split.txt", lambda lines: [*lines, f"99 {1 - int(first)}"])
    with pytest.raises(DataError, match=r"images\.txt: 1 of its images are also in .+images\.txt, which must not"):
        open_source(CUB, tmp_path)


def test_two_ids_for_one_image_stop_it(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    (path, value), (_, other) = list(entries(folder, "train").items())[:2]
    change(folder / "val.json", **{path: other})
    with pytest.raises(DataError, match=rf"val\.json: '.+' has class id {other}, in .+train\.json {value}"):
        open_source(CUB, tmp_path)


def test_nothing_but_val_leaves_nothing_to_train_on(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    (folder / "val.json").write_text((folder / "train.json").read_text())
    with pytest.raises(DataError, match="none is left to train on"):
        open_source(CUB, tmp_path)


def test_more_classes_than_the_card_stop_it_and_fewer_are_a_difference(tmp_path: Path) -> None:
    draw(tmp_path)
    with pytest.raises(DataError, match=r"train\.json: 12 classes, but the card of fgvc/cub has 11"):
        open_source(replace(CUB, classes=11), tmp_path)
    assert any("has 12 classes, the card states 200" in note for note in open_source(CUB, tmp_path).notes)
    assert open_source(replace(CUB, classes=12, class_names=None), tmp_path).notes == ()


def test_as_on_the_card(tmp_path: Path) -> None:
    draw(tmp_path)
    card = replace(CUB, counts={**COUNTS, "trainval": 17}, classes=12, class_names=None)
    report = inspect(card, open_source(card, tmp_path), list(card.counts))
    assert (report.variant, report.status, report.notes) == ("card", "as_card", ())


# --- the data sets' own files ----------------------------------------------------------------------------------------


def test_val_of_the_official_form_is_every_tenth_in_official_order(tmp_path: Path) -> None:
    write_native(CUB, tmp_path, {"train": 30, "val": 5, "test": 4})
    lines = (tmp_path / "CUB_200_2011" / "images.txt").read_text().splitlines()
    split = (tmp_path / "CUB_200_2011" / "train_test_split.txt").read_text().splitlines()
    official = [line.split()[1] for line, flag in zip(lines, split, strict=True) if flag.endswith(" 1")]
    source = open_source(CUB, tmp_path)
    assert list(images(source, "val")) == [official[9], official[19], official[29]]
    assert list(images(source, "train")) == [path for path in official if path not in images(source, "val")]
    assert list(images(source, "trainval")) == official


def test_the_json_split_goes_before_the_own_files_and_is_never_called_official(tmp_path: Path) -> None:
    native = draw(tmp_path / "native", native=True)
    folder = draw(tmp_path / "json")
    for file in native.glob("*.txt"):
        (folder / file.name).write_bytes(file.read_bytes())
    source = open_source(CUB, tmp_path / "json")
    assert (source.variant, len(source.get("val"))) == ("card", 5)
    counts = {name: len(of) for name, of in source.splits.items()}
    card = replace(CUB, variants={"official": counts})  # even if it had its counts
    assert inspect(card, source, ["test"]).variant == "card"
    (folder / "val.json").unlink()  # a part of a split is no reason to take another
    with pytest.raises(DataError, match=r"has a JSON split without val\.json"):
        open_source(CUB, tmp_path / "json")


def test_the_official_form_is_as_on_the_card_by_the_variants_counts(tmp_path: Path) -> None:
    draw(tmp_path, native=True)
    counts = {"train": 16, "val": 1, "trainval": 17, "test": 7}
    card = replace(CUB, classes=12, class_names=None, variants={"official": counts})
    report = inspect(card, open_source(card, tmp_path), ["trainval", "test"])
    assert (report.variant, report.status, report.notes) == ("official", "as_card", ())


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("images.txt", "1\n", r"images\.txt:1: found '1': expected `<image id> <value>`"),
        ("images.txt", "1 a.jpg\n1 b.jpg\n", r"images\.txt:2: found '1 b\.jpg': the id is given twice"),
        ("images.txt", "1 a.jpg\n2 a.jpg\n", r"images\.txt: 'a\.jpg' is listed twice"),
        ("images.txt", "1 a.jpg\n99 b.jpg\n", r"image_class_labels\.txt: lacks the image 99 \(b\.jpg\)"),
        ("train_test_split.txt", None, r"without train_test_split\.txt; get train\.json"),
        ("train_test_split.txt", "2", r"image 1 has '2', expected 1 or 0"),
        ("train_test_split.txt", "1", r"its files list no test image"),
        ("image_class_labels.txt", "x", r"class id of '.+' is 'x', expected a whole number"),
    ],
)
def test_broken_own_files_are_one_line(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    folder = draw(tmp_path, native=True)
    if content is None:
        (folder / file).unlink()
    elif len(content) == 1:
        (folder / file).write_text("".join(f"{number} {content}\n" for number in range(1, 25)))
    else:
        (folder / file).write_text(content)
    with pytest.raises(DataError, match=message):
        open_source(CUB, tmp_path)


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("fgvc/oxford_flowers", "setid.mat"),
        ("fgvc/oxford_flowers", "imagelabels.mat"),
        ("fgvc/stanford_dogs", "test_list.mat"),
        ("fgvc/stanford_cars", "cars_annos.mat"),
    ],
)
def test_broken_mat_files_are_one_line(tmp_path: Path, name: str, file: str) -> None:
    from scipy.io import savemat

    card = load_task(name)
    folder = draw(tmp_path, card, native=True)
    savemat(folder / file, {"other": np.zeros(3)})
    with pytest.raises(DataError, match=rf"{file}: lacks '\w+'; get the file again"):
        open_source(card, tmp_path)
    (folder / file).write_bytes(b"MATLAB" * 3)
    with pytest.raises(DataError, match=rf"{file}: cannot be read \(.+\); get the file again") as caught:
        open_source(card, tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("value", "shown"), [(np.nan, "nan"), (1.7, r"1\.7"), (np.inf, "inf"), (-1, "-1"), (0, "0"), (103, "103")]
)
def test_labels_of_flowers_that_are_no_class_are_refused(tmp_path: Path, value: float, shown: str) -> None:
    from scipy.io import loadmat, savemat

    card = load_task("fgvc/oxford_flowers")
    folder = draw(tmp_path, card, native=True)
    labels = loadmat(folder / "imagelabels.mat")["labels"].astype(float)
    labels[0, int(loadmat(folder / "setid.mat")["trnid"][0, 0]) - 1] = value
    savemat(folder / "imagelabels.mat", {"labels": labels})
    with pytest.raises(DataError, match=rf"\.mat: .*{shown}\b.*(expected|those of fgvc/oxford_flowers are)"):
        open_source(card, tmp_path)


def test_numbers_of_flowers_that_are_none_are_refused(tmp_path: Path) -> None:
    from scipy.io import loadmat, savemat

    card = load_task("fgvc/oxford_flowers")
    folder = draw(tmp_path, card, native=True)
    content = {key: loadmat(folder / "setid.mat")[key].astype(float) for key in ("trnid", "valid", "tstid")}
    content["valid"][0, 0] += 0.5
    savemat(folder / "setid.mat", content)
    with pytest.raises(DataError, match=r"setid\.mat: valid holds \d+\.5, expected whole numbers"):
        open_source(card, tmp_path)


@pytest.mark.parametrize(
    ("name", "file", "content", "message"),
    [
        ("stanford_dogs", "train_list.mat", {"file_list": np.zeros((3, 1)), "labels": np.ones((3, 1))}, "image 1 of"),
        ("stanford_dogs", "train_list.mat", {"file_list": np.zeros((3, 1)), "labels": np.ones((2, 1))}, "3 .* and 2"),
        ("stanford_dogs", "test_list.mat", {"file_list": np.zeros(0), "labels": np.array(["x"])}, "labels holds 'x'"),
        ("stanford_cars", "cars_annos.mat", {"annotations": np.zeros(3)}, "lacks 'relative_im_path'"),
    ],
)
def test_mat_files_of_another_content_are_one_line(
    tmp_path: Path, name: str, file: str, content: dict[str, Any], message: str
) -> None:
    from scipy.io import savemat

    card = load_task(f"fgvc/{name}")
    folder = draw(tmp_path, card, native=True)
    savemat(folder / file, content)
    with pytest.raises(DataError, match=rf"{file}: .*{message}"):
        open_source(card, tmp_path)


def test_a_mistake_of_ours_is_no_broken_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(tmp_path, load_task("fgvc/stanford_dogs"), native=True)

    def mistaken(*_: object) -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr("svp_bench.data.native.enter", mistaken)
    with pytest.raises(ZeroDivisionError):
        open_source(load_task("fgvc/stanford_dogs"), tmp_path)


@pytest.mark.parametrize("form", ["bom", "tabs", "crlf"])
def test_own_text_files_may_be_written_as_lists_may(tmp_path: Path, form: str) -> None:
    folder = draw(tmp_path, native=True)
    plain = {name: images(open_source(CUB, tmp_path), name) for name in COUNTS}
    for file in folder.glob("*.txt"):
        text = file.read_text()
        changed = {"bom": f"\ufeff{text}", "tabs": text.replace(" ", "\t"), "crlf": text.replace("\n", "\r\n")}[form]
        file.write_bytes(changed.encode())
    assert {name: images(open_source(CUB, tmp_path), name) for name in COUNTS} == plain


# --- names of classes ------------------------------------------------------------------------------------------------


def rename_folders(folder: Path, form: str) -> None:
    """Give the folders of CUB's images names, in all files of the JSON split."""
    for name in COUNTS:
        (folder / f"{name}.json").write_text(
            json.dumps({form.format(*path.split("/")): value for path, value in entries(folder, name).items()})
        )
    for child in (folder / "images").iterdir():
        child.rename(folder / "images" / form.format(child.name, "").rstrip("/"))


def test_names_follow_the_ids_and_not_the_labels(tmp_path: Path) -> None:
    card = load_task("fgvc/oxford_flowers")
    folder = draw(tmp_path, card)
    for name in COUNTS:  # ids 2 to 7 only: labels 0 to 5
        ids = {path: 2 + number % 6 for number, path in enumerate(entries(folder, name))}
        (folder / f"{name}.json").write_text(json.dumps(ids))
    listed = class_names(card)
    source = open_source(card, tmp_path)
    assert listed is not None
    assert source.class_names is not None
    assert source.class_names[:6] == tuple(listed[1:7])
    assert len(source.class_names) == 102
    change(folder / "test.json", **{next(iter(entries(folder, "test"))): 8})
    with pytest.raises(DataError, match="class id 8 of"):
        open_source(card, tmp_path)


def test_ids_that_the_card_has_no_name_for_are_refused(tmp_path: Path) -> None:
    card = load_task("fgvc/oxford_flowers")
    folder = draw(tmp_path, card)
    change(folder / "train.json", **{next(iter(entries(folder, "train"))): 103})
    with pytest.raises(DataError, match=r"train\.json: class id 103 is out of range, those of fgvc/oxford_flowers are"):
        open_source(card, tmp_path)


def test_names_of_a_card_without_the_first_id_need_all_classes(tmp_path: Path) -> None:
    folder = draw(tmp_path)  # 12 of 200 classes: which, nobody knows
    assert open_source(CUB, tmp_path).class_names == tuple(f"class {label}" for label in range(200))
    paths = [*entries(folder, "train")] + [f"more/{number}.jpg" for number in range(200)]
    (folder / "train.json").write_text(json.dumps({path: 1 + number % 200 for number, path in enumerate(paths)}))
    (folder / "val.json").write_text(json.dumps({paths[0]: 1}))
    listed = class_names(CUB)
    assert listed is not None
    assert open_source(CUB, tmp_path).class_names == tuple(listed)


def test_names_come_from_classes_txt(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    ids = sorted({*entries(folder, "train").values()})
    assert "Duck" not in str(open_source(CUB, tmp_path).class_names)
    (folder / "classes.txt").write_text("".join(f"{key} {key:03d}.Bird_of_kind {key}\n" for key in range(1, 201)))
    names = open_source(CUB, tmp_path).class_names
    assert names is not None
    assert names[: len(ids)] == tuple(f"Bird_of_kind {key}" for key in ids)
    (folder / "classes.txt").write_text("".join(f"{key} Duck\n" for key in range(1, 201)))
    names = open_source(CUB, tmp_path).class_names
    assert names is not None
    assert names[:2] == (f"Duck ({ids[0]})", f"Duck ({ids[1]})")
    (folder / "classes.txt").write_text("1 Duck\n")
    with pytest.raises(DataError, match=rf"classes\.txt: lacks the class {ids[0]}; get the file again"):
        open_source(CUB, tmp_path)
    (folder / "classes.txt").write_text("Duck\n")
    with pytest.raises(DataError, match=r"classes\.txt:1: found 'Duck': expected `<class id> <name>`"):
        open_source(CUB, tmp_path)


def test_names_come_from_folders(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    rename_folders(folder, "{0}.Kind_{0}/{1}")
    source = open_source(CUB, tmp_path)
    verify(source)
    assert source.class_names is not None
    first = next(iter(images(source, "test").items()))
    assert first[0].startswith(f"{source.class_names[first[1]].removeprefix('Kind_')}.Kind_")
    rename_folders(folder, "plain{0}/{1}")  # no number before the name: nothing is made up
    assert "plain" not in str(open_source(CUB, tmp_path).class_names)


def test_names_come_from_the_annotations_of_cars(tmp_path: Path) -> None:
    from scipy.io import loadmat, savemat

    card = load_task("fgvc/stanford_cars")
    folder = draw(tmp_path, card, native=True)
    assert "Car no." not in str(open_source(card, tmp_path).class_names)
    cells = np.empty((1, 196), dtype=object)
    cells[0, :] = [f"Car no. {number}" for number in range(1, 197)]
    savemat(folder / "cars_annos.mat", {**loadmat(folder / "cars_annos.mat"), "class_names": cells})
    names = open_source(card, tmp_path).class_names
    assert names is not None
    assert names[:2] == ("Car no. 1", "Car no. 2")


def test_a_run_calls_the_classes_by_the_datas_own_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    folder = draw(tmp_path / "data")
    rename_folders(folder, "{0}.Kind_{0}/{1}")
    outcome = run(*small("--method", "linear", config="configs/fgvc/cub.yaml"))
    assert "Kind_" in (outcome.folder / "test_per_class.csv").read_text()
    image = str(next((folder / "images").rglob("*.jpg")))
    shown = run("predict", "--ckpt", str(outcome.folder / "checkpoints/last.ckpt"), "--images", image, "--top", "9")
    (row,) = csv.DictReader(shown.out.splitlines())
    with open(outcome.folder / "test_per_class.csv", encoding="utf-8", newline="") as file:
        names = [line["name"] for line in csv.DictReader(file)]
    assert [row[f"name{rank}"] for rank in range(1, 10)] == [names[int(row[f"class{rank}"])] for rank in range(1, 10)]
    assert all(name.startswith("Kind_") for name in names[:12])


# --- cards that ask for what is not there -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"counts": {"trian": 1}}, "unknown split 'trian'; did you mean 'train'"),
        ({"variants": {}}, "the option 'native' needs the counts of the variant 'official'"),
        ({"options": {"native": "text_file"}}, "'native' must be one of text_files, .+, not 'text_file'"),
        ({"options": {"refit": "all"}}, "'refit' must be one of train, trainval, not 'all'"),
        ({"options": {"roots": "x"}}, "unknown reader key 'roots'"),
    ],
)
def test_wrong_cards_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    if "options" in changes:
        changes = {"reader": replace(CUB.reader, options=changes["options"])}
    with pytest.raises(CardError, match=f"cub.yaml:1: .*{message}"):
        open_source(replace(CUB, **changes), tmp_path)


# --- through the command line ----------------------------------------------------------------------------------------


def test_a_run_from_drawing_to_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    draw(tmp_path / "data", CUB, "text_ids", "val_in_train")
    outcome = run(*small(config="configs/fgvc/cub.yaml"))
    record = outcome.record
    assert (record["task"], record["protocol"], record["splits"]) == (
        "fgvc/cub",
        "fgvc-final",
        {"train": "trainval", "test": "test"},
    )
    assert (record["data_variant"], record["data_status"], record["metrics"]["count"]) == ("card", "different", 7)
    select = run(*small("--data.stage", "select", config="configs/fgvc/cub.yaml")).record
    assert (select["kind"], select["splits"], select["metrics"]["count"]) == (
        "selection",
        {"train": "train", "val": "val"},
        5,
    )
    table = run("table", "--suite", "fgvc").out
    assert "FGVC" in table
    assert "1/5" in table


def test_a_whole_suite_is_tabled_with_its_published_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for number, (name, right) in enumerate(zip(NAMES, (5, 6, 7, 8, 9), strict=True)):
        fields = {"protocol": "fgvc-final", "splits": {"train": "trainval", "test": "test"}}
        write_record(make_record(name, right=right, number=number, **fields), "results")
    table = run("table", "--suite", "fgvc", "--published").out
    assert "5/5" in table
    assert "70.0" in table  # the mean of 50 … 90
    assert "88.54" in table  # V-PETL Bench, full fine-tuning


def test_drawing_and_checking_from_the_command_line(tmp_path: Path) -> None:
    for name in ("fgvc/stanford_cars", "fgvc/oxford_flowers"):
        outcome = run("data", "draw", name, "--root", str(tmp_path))
        assert f"Next: svp-bench fit --config configs/{name}.yaml" in outcome.out
        checked = run("data", "verify", name, "--root", str(tmp_path))
        assert "are synthetic, not real" in checked.out


def test_an_image_that_cannot_be_read_names_its_split(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    for path in list(entries(folder, "test"))[:2]:
        (folder / "images" / path).write_bytes(b"no image")
    with pytest.raises(DataError, match=r"not a readable image: no known image format; .+: not a readable image"):
        open_source(CUB, tmp_path).get("test").verify()
    with Image.open(folder / "images" / next(iter(entries(folder, "train")))) as image:
        assert image.format == "JPEG"
