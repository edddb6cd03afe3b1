"""The class names of the shipped cards: as many as classes, and in the order of the labels."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from svp_bench.prepare.labels import label_of
from svp_bench.tasks.cards import class_names, list_tasks, load_task

UNNAMED = {"fgvc/nabirds", "hta/nabirds"}  # the reader takes them from the data set's own classes.txt
NAMED = [name for suite in ("vtab", "fgvc", "hta") for name in list_tasks(suite) if name not in UNNAMED]


def names_of(task: str) -> list[str]:
    names = class_names(load_task(task))
    assert names is not None
    return names


def test_all_tasks_but_one_data_set_have_names() -> None:
    assert len(NAMED) == 32
    assert all(class_names(load_task(name)) is None for name in UNNAMED)


@pytest.mark.parametrize("task", NAMED)
def test_there_is_one_name_a_class(task: str) -> None:
    names = names_of(task)  # refuses duplicates and empty lines
    assert len(names) == load_task(task).classes
    assert all(name == name.strip() and name.isprintable() for name in names)


@pytest.mark.parametrize(
    ("task", "other"),
    [
        ("vtab/dtd", "hta/dtd"),
        ("vtab/oxford_flowers102", "fgvc/oxford_flowers"),
        ("hta/cub200", "fgvc/cub"),
        ("hta/stanford_dogs", "fgvc/stanford_dogs"),
        ("vtab/cifar", "hta/cifar100"),
        ("vtab/svhn", "hta/svhn"),
    ],
)
def test_one_data_set_has_one_list(task: str, other: str) -> None:
    assert names_of(task) == names_of(other)


def test_dogs_are_in_the_order_of_wordnet() -> None:
    """Stanford Dogs numbers its classes by their WordNet ids; timm has ids and names of ImageNet's classes."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo("imagenet-1k")
    synsets = sorted(info.label_names())
    first, last, dalmatian = (synsets.index(name) for name in ("n02085620", "n02113978", "n02110341"))
    dogs = [*synsets[first:dalmatian], *synsets[dalmatian + 1 : last + 1], "n02115641", "n02115913", "n02116738"]
    lemmas = [info.label_name_to_description(name).lower().split(", ") for name in dogs]
    names = [name.lower().replace("_", " ") for name in names_of("fgvc/stanford_dogs")]
    assert [name for name, known in zip(names, lemmas, strict=True) if name not in known] == []


@pytest.mark.parametrize(
    ("task", "module", "attribute"),
    [
        ("vtab/oxford_iiit_pet", "datasets.oxford_iiit_pet.oxford_iiit_pet_dataset_builder", "_LABEL_CLASSES"),
        ("vtab/oxford_flowers102", "datasets.oxford_flowers102.oxford_flowers102_dataset_builder", "_NAMES"),
        ("vtab/resisc45", "datasets.resisc45.resisc45_dataset_builder", "_LABELS"),
        ("vtab/eurosat", "image_classification.eurosat", "_LABELS"),
        ("fgvc/stanford_cars", "image_classification.cars196", "_NAMES"),
    ],
)
def test_names_are_those_of_the_builders(task: str, module: str, attribute: str) -> None:
    pytest.importorskip("tensorflow_datasets", reason="needs the extra vtab")
    assert names_of(task) == [*getattr(importlib.import_module(f"tensorflow_datasets.{module}"), attribute)]


@pytest.mark.parametrize(
    ("task", "file"), [("caltech101", "caltech101_labels"), ("dtd", "dtd_key_attributes"), ("sun397", "sun397_labels")]
)
def test_names_are_those_of_the_builders_files(task: str, file: str) -> None:
    tfds = pytest.importorskip("tensorflow_datasets", reason="needs the extra vtab")
    path = Path(tfds.__path__[0], "image_classification", f"{file}.txt")
    listed = path.read_text(encoding="utf-8").split()
    assert names_of(f"vtab/{task}") == [name[3:] if name.startswith("/") else name for name in listed]


@pytest.mark.parametrize("task", ["cifar10", "cifar100", "dtd", "food101"])
def test_sets_that_number_their_classes_by_name_are_sorted(task: str) -> None:
    assert names_of(f"hta/{task}") == sorted(names_of(f"hta/{task}"))


def test_birds_and_cars_begin_and_end_as_their_own_lists() -> None:
    cub, cars = names_of("fgvc/cub"), names_of("fgvc/stanford_cars")
    # numbered as the folders of the data set are, e.g. "002.Laysan_Albatross", in another public list
    known = {2: "Laysan_Albatross", 16: "Painted_Bunting", 29: "American_Crow", 41: "Scissor_tailed_Flycatcher"}
    known |= {55: "Evening_Grosbeak", 73: "Blue_Jay", 83: "White_breasted_Kingfisher", 87: "Mallard"}
    known |= {106: "Horned_Puffin", 110: "Geococcyx", 186: "Cedar_Waxwing", 188: "Pileated_Woodpecker"}
    assert {number: cub[number - 1] for number in known} == known
    assert (cub[0], cub[199]) == ("Black_footed_Albatross", "Common_Yellowthroat")
    assert (cars[0], cars[195]) == ("AM General Hummer SUV 2000", "smart fortwo Convertible 2012")


def test_names_of_bins_follow_the_label_rules() -> None:
    for value in range(32):
        name = names_of("vtab/dsprites_loc")[label_of({"label_x_position": value}, "x_position_in_16")]
        low, high = (int(word) for word in name.split()[1:4:2])
        assert low <= value <= high
    for value in range(40):
        name = names_of("vtab/dsprites_ori")[label_of({"label_orientation": value}, "orientation_in_16")]
        low, high = (int(word) for word in name.split()[1:4:2])
        assert low <= value <= high
    for depth in (0.5, 8.0, 8.2, 9.1, 10.0, 11.0):
        name = names_of("vtab/clevr_dist")[
            label_of({"objects": {"pixel_coords": [[0, 0, depth]]}}, "nearest_object_depth")
        ]
        numbers = [float(word) for word in name.split() if word[0].isdigit()]
        if name.startswith("up to"):
            assert depth <= numbers[0]
        elif len(numbers) == 2:
            assert numbers[0] < depth <= numbers[1]
        else:
            assert depth > numbers[0]
