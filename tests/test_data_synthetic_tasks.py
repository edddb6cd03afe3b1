"""Synthetic tasks: images show what their labels state, and a card gives the same bytes everywhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from svp_bench.core.errors import CardError
from svp_bench.data.sources import Source, open_source
from svp_bench.data.synthetic_tasks import KINDS, SIZE, draw_numbered
from svp_bench.tasks.cards import ReaderSpec, load_suite, load_task

TASKS = [name for name in load_suite("demo").tasks if load_task(name).reader.kind == "synthetic"]
MANY = 96  # images of a kind that are measured


def objects(image: npt.NDArray[np.uint8]) -> list[npt.NDArray[np.float64]]:
    """Return the pixels (row, column) of each connected thing that stands out from the ground, the largest first.

    The ground is a plane of grey values in each channel, fitted to the border where it agrees with itself.
    """
    rows, columns = np.mgrid[:SIZE, :SIZE]
    terms = np.stack([rows, columns, np.ones_like(rows)], axis=-1).reshape(-1, 3).astype(float)
    values = image.reshape(-1, 3).astype(float)
    ground = np.ones(len(values), dtype=bool)
    for limit in (60.0, 30.0, 22.0, 22.0):  # what does not fit is no ground
        plane, *_ = np.linalg.lstsq(terms[ground], values[ground], rcond=None)
        far = np.abs(values - terms @ plane).max(axis=1)
        ground = far < limit
    found, number = ndimage.label(ndimage.median_filter((far >= 22).reshape(SIZE, SIZE).astype(np.uint8), 3))
    things = [np.argwhere(found == one + 1).astype(float) for one in range(number)]
    return sorted(things, key=len, reverse=True)


def agreement(kind: str, read: dict[int, int]) -> float:
    return sum(label == draw_numbered(kind, 5, number)[1] for number, label in read.items()) / MANY


def test_the_largest_thing_lies_in_the_cell_of_its_label() -> None:
    read = {}
    for number in range(MANY):
        row, column = objects(draw_numbered("location", 5, number)[0])[0].mean(axis=0) + 0.5
        read[number] = int((row - 8) // 12) * 4 + int((column - 8) // 12)
    assert agreement("location", read) > 0.9


def test_the_label_is_the_number_of_objects() -> None:
    read = {n: len([t for t in objects(draw_numbered("count", 5, n)[0]) if len(t) > 8]) - 1 for n in range(MANY)}
    assert agreement("count", read) > 0.9


def test_the_label_is_the_side_of_the_larger_object() -> None:
    read = {}
    for number in range(MANY):
        things = objects(draw_numbered("size", 5, number)[0])
        if len(things) < 2:  # one has nearly the ground's colour
            continue
        down, right = things[0].mean(axis=0) - things[1].mean(axis=0)
        sideways = abs(right) > abs(down)
        read[number] = (0 if right > 0 else 1) if sideways else (2 if down > 0 else 3)
    assert agreement("size", read) > 0.9


def test_the_label_is_the_direction_of_the_bow() -> None:
    """The bow holds more of the key than the shaft: seen from the middle of its extent, the mean lies towards it."""
    read = {}
    for number in range(MANY):
        thing = objects(draw_numbered("orientation", 5, number)[0])[0]
        mean = thing.mean(axis=0)
        axis = np.linalg.svd(thing - mean, full_matrices=False)[2][0]
        along = (thing - mean) @ axis
        if along.max() + along.min() > 0:  # the far end is the shaft's
            axis = -axis
        read[number] = round(np.degrees(np.arctan2(axis[0], axis[1])) / 45) % 8
    assert agreement("orientation", read) > 0.85


def spectrum(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.float64]:
    """Return an image's waves, whichever way it is turned: the power in rings, and how uneven each ring is."""
    grey = image.mean(axis=2)
    power = np.log1p(np.abs(np.fft.fftshift(np.fft.fft2(grey - grey.mean()))) ** 2)
    rows, columns = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    ring = np.hypot(rows, columns).astype(int)
    inside = [power[ring == radius] for radius in range(1, SIZE // 2)]
    return np.array([[values.mean(), values.std(), values.max()] for values in inside]).ravel()


def test_patterns_differ_in_their_spectrum_and_not_by_single_pixels() -> None:
    images = [draw_numbered("textures", 5, number) for number in range(640)]
    assert len({image.tobytes() for image, _ in images}) == len(images)
    features = np.stack([spectrum(image) for image, _ in images])
    labels = np.array([label for _, label in images])
    reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    assert reader.fit(features[:480], labels[:480]).score(features[480:], labels[480:]) > 0.5  # guessing: 0.125
    for label in range(8):
        grey = np.stack([image.mean(axis=2) for image, of in images if of == label])
        assert grey.mean(axis=0).std() < 0.35 * grey.std(axis=(1, 2)).mean()


@given(kind=st.sampled_from(sorted(KINDS)), seed=st.integers(0, 10**9), number=st.integers(0, 10**9))
@settings(max_examples=40, deadline=None)
def test_an_image_is_a_pure_function_of_its_numbers(kind: str, seed: int, number: int) -> None:
    image, label = draw_numbered(kind, seed, number)
    again, _ = draw_numbered(kind, seed, number)
    assert image.shape == (SIZE, SIZE, 3)
    assert image.dtype == np.uint8
    assert label == number % len(KINDS[kind].classes)
    assert np.array_equal(image, again)
    assert not np.array_equal(image, draw_numbered(kind, seed + 1, number)[0])
    assert image.std() > 3


# --- the reader ------------------------------------------------------------------------------------------------------


def opened(task: str = "demo/size", **changes: object) -> Source:
    card = load_task(task)
    options = {**card.reader.options, **changes.pop("options", {})}  # type: ignore[dict-item]
    options = {key: value for key, value in options.items() if value is not None}
    return open_source(replace(card, reader=ReaderSpec("synthetic", options), **changes), suite=load_suite("demo"))  # type: ignore[arg-type]


@pytest.mark.parametrize("task", TASKS)
def test_the_shipped_cards_are_true(task: str) -> None:
    source = open_source(load_task(task))
    card = load_task(task)
    assert source.digest == card.digest  # the same bytes on every machine
    assert {name: len(images) for name, images in source.splits.items()} == dict(card.counts)
    assert source.class_names == KINDS[str(card.reader.options["kind"])].classes
    for images in source.splits.values():
        counts = np.bincount(images.labels, minlength=card.classes)
        assert counts.max() - counts.min() <= 2  # every class is there, in equal parts


def test_lists_share_no_image_and_trainval_is_both() -> None:
    source = opened()
    of = {name: [images.load(i).tobytes() for i in range(len(images))] for name, images in source.splits.items()}
    assert of["trainval"] == of["train"] + of["val"]
    assert not set(of["trainval"]) & set(of["test"])
    assert source.get("test").where(0) == "image 300"


def test_another_seed_draws_other_images() -> None:
    assert opened(options={"seed": 1}).digest != opened().digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"options": {"kind": "sizes"}}, "'kind' must be one of textures, .+, not 'sizes'"),
        ({"options": {"kind": None}}, "the key 'kind' is missing"),
        ({"options": {"seed": None}}, "the key 'seed' is missing"),
        ({"options": {"generator": 2}}, "'generator' must be 1, the version of the generator, not 2"),
        ({"options": {"seeds": 2}}, "reader 'synthetic': unknown reader key 'seeds'; did you mean 'seed'"),
        ({"options": {"seed": "zero"}}, "seed"),
        ({"classes": 5}, "'size' has 4 classes, the card states 5"),
        ({"counts": {"train": 4, "tests": 4}}, "unknown split 'tests'; did you mean 'test'"),
        ({"counts": {"train": 4, "val": 4, "trainval": 9}}, "trainval is train and val together, 8, not 9"),
    ],
)
def test_wrong_cards_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CardError, match=message) as caught:
        opened(**changes)
    assert str(caught.value).startswith(f"{load_task('demo/size').path}:1: ")
