"""The cache between the runs of one process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers import COUNTS, TASK, draw

from svp_bench.core.errors import DataError
from svp_bench.data import cache
from svp_bench.data.module import VisionDataModule

pytestmark = pytest.mark.filterwarnings("ignore:the data of:UserWarning")  # synthetic data differ from the card


@pytest.fixture(autouse=True)
def _empty_cache() -> Iterator[None]:
    yield
    cache.cache_between_runs(0)


def images(root: Path, size: int = 16) -> np.ndarray:
    data = VisionDataModule(TASK, root=str(root), stage="select", image_size=size, batch_size=4, pixel_cache=False)
    data.setup("fit")
    return data._dataset("train")._cache.numpy()  # type: ignore[attr-defined]


def test_the_cache_is_off_by_default(tmp_path: Path) -> None:
    draw(tmp_path)
    assert images(tmp_path) is not images(tmp_path)
    assert not cache._values


def test_decoded_images_are_cached_by_folder_split_and_transform(tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 1)):
        draw(tmp_path / name, seed=seed)
    fresh = {name: images(tmp_path / name) for name in ("a", "b")}
    cache.cache_between_runs()
    first = images(tmp_path / "a")
    assert np.shares_memory(first, images(tmp_path / "a"))
    assert (first == fresh["a"]).all()
    assert (images(tmp_path / "b") == fresh["b"]).all()  # same names, other images
    assert not (fresh["a"] == fresh["b"]).all()
    assert images(tmp_path / "a", size=8).shape == (COUNTS["train800"], 3, 8, 8)


def test_the_least_recently_used_images_are_dropped_first(tmp_path: Path) -> None:
    draw(tmp_path)
    one = 3 * 16 * 16 * COUNTS["train800"]
    cache.cache_between_runs(limit=2 * one + 1000)  # val has fewer images than train
    first = images(tmp_path)
    images(tmp_path, size=24)  # larger than the cache
    assert sum(array.nbytes for array in cache._values.values()) < 2 * one + 1000
    assert (images(tmp_path) == first).all()


def test_a_broken_image_is_never_taken_for_verified(tmp_path: Path) -> None:
    folder = draw(tmp_path)
    image = folder / (folder / "train800.txt").read_text(encoding="utf-8").split()[0]
    good = image.read_bytes()
    cache.cache_between_runs()
    image.write_bytes(b"nothing")
    with pytest.raises(DataError, match=image.name):
        images(tmp_path)
    image.write_bytes(good)
    images(tmp_path)
