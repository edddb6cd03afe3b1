"""Cross-validation on the labelled images: each image held out once, the same folds for all, no test split."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import assert_error, command
from hypothesis import given, settings
from hypothesis import strategies as st

from svp_bench.core.errors import ConfigError, DataError
from svp_bench.data.folds import CrossValidationConfig, fold_positions
from svp_bench.data.module import VisionDataModule

TASK = "demo/digits-5shot"


def parts(keys: list[str], labels: np.ndarray, folds: int, seed: int = 0, repeat: int = 0) -> list[list[int]]:
    return [fold_positions(keys, labels, TASK, folds, folds * repeat + part, seed).tolist() for part in range(folds)]


@given(labels=st.lists(st.integers(0, 4), min_size=2, max_size=60), folds=st.integers(2, 8), seed=st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_a_partition_is_whole_even_and_stratified(labels: list[int], folds: int, seed: int) -> None:
    if folds > len(labels):
        return
    of, keys = np.array(labels), [f"image {number}" for number in range(len(labels))]
    found = parts(keys, of, folds, seed)
    assert sorted(position for part in found for position in part) == list(range(len(labels)))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    for label in set(labels):
        counts = [int((of[part] == label).sum()) for part in found]
        assert max(counts) - min(counts) <= 1
    assert all(part == sorted(part) for part in found)


def test_the_order_of_the_split_does_not_matter_seed_and_repeat_do() -> None:
    keys, labels = [f"{number}.jpg" for number in range(40)], np.arange(40) % 4
    found = parts(keys, labels, 5)
    turned = parts(keys[::-1], labels[::-1], 5)
    assert [{keys[i] for i in part} for part in found] == [{keys[::-1][i] for i in part} for part in turned]
    assert found != parts(keys, labels, 5, seed=1)
    assert found != parts(keys, labels, 5, repeat=1)
    assert found[0] == [6, 11, 13, 28, 29, 30, 35, 36]  # the same on every machine


def test_an_image_that_is_repeated_is_never_on_both_sides() -> None:
    keys, labels = ["a", "b", "a", "c", "d", "b"], np.array([0, 0, 0, 1, 1, 0])
    for part in parts(keys, labels, 2):
        assert not {keys[i] for i in part} & {keys[i] for i in range(6) if i not in part}


def test_leave_one_out_and_no_further() -> None:
    keys, labels = list("abcde"), np.array([0, 0, 1, 1, 1])
    assert sorted(part[0] for part in parts(keys, labels, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"6 folds of the 5 labelled images .*folds is at most 5 here"):
        parts(keys, labels, 6)


def test_the_data_module_holds_out_each_labelled_image_once() -> None:
    seen: list[int] = []
    digests = set()
    for fold in range(5):
        data = VisionDataModule(TASK, stage="select", cross_validation=CrossValidationConfig(5, fold), image_size=32)
        data.setup("fit")
        assert set(data.splits) == {"train", "val"}
        assert data.splits_read == ("trainval",)
        train, val = data.split("train"), data.split("val")
        assert (len(train), len(val)) == (40, 10)
        assert sorted(val.labels.tolist()) == list(range(10))
        assert not {*train.keys()} & {*val.keys()}
        assert data.report.counts[data.splits["val"]] == 10
        held = val.keys()
        seen += [int(key.split()[-1]) for key in held]
        digests.add(data.report.digest)
        assert val.digest != train.digest
    assert len(set(seen)) == len(seen) == 50
    assert len(digests) == 1  # all folds read the same split


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fold": 1}, "data.cross_validation.fold 1 needs data.cross_validation.folds N"),
        ({"folds": 1}, "data.cross_validation.folds 1 is out of range"),
        ({"folds": 5, "fold": -1}, "data.cross_validation.fold -1 is out of range"),
        ({"folds": 5, "seed": -1}, "data.cross_validation.seed -1 is out of range"),
    ],
)
def test_wrong_folds_are_one_line(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CrossValidationConfig(**arguments)  # type: ignore[arg-type]


def test_a_final_run_has_no_folds() -> None:
    with pytest.raises(ConfigError, match=r"data.cross_validation.folds 5 belongs to data.stage select"):
        VisionDataModule(TASK, cross_validation=CrossValidationConfig(5))


def test_more_folds_than_images_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fit = ["fit", "--config", f"configs/{TASK}.yaml", "--data.stage", "select", "--data.cross_validation.folds", "51"]
    assert "at most 50 here" in assert_error(command(*fit), 1)
