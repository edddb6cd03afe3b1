"""The cache of decoded images on disk: equal numbers, one pass, damage, kills, races, full disks, the subcommand."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from svp_bench.cli.main import main
from svp_bench.data import pixels, sources
from svp_bench.data.augment import AugmentConfig
from svp_bench.data.folds import CrossValidationConfig
from svp_bench.data.module import VisionDataModule
from svp_bench.data.pixels import DamagedPixelsError, list_entries, open_entry
from svp_bench.data.synthetic import draw_task
from svp_bench.data.transforms import TransformConfig
from svp_bench.tasks.cards import load_task

TASK = "vtab/dtd"
COUNTS = {"train800": 13, "val200": 6, "train800val200": 19, "test": 11}
pytestmark = pytest.mark.filterwarnings("ignore:the data of:UserWarning")  # synthetic data differ from the card


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVP_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pixels"


@pytest.fixture
def root(tmp_path: Path, cache: Path) -> Path:
    """Return a data root with synthetic images."""
    draw_task(load_task(TASK), tmp_path / "data", counts=COUNTS, size=20)
    return tmp_path / "data"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the names of the files that are decoded from now on."""
    names: list[str] = []
    read = sources.read_image
    monkeypatch.setattr(sources, "read_image", lambda path, *depth: names.append(Path(path).name) or read(path, *depth))
    return names


def ready(root: Path, **arguments: Any) -> VisionDataModule:
    given = {"task": TASK, "root": str(root), "image_size": 16, "batch_size": 4, "num_workers": 0, **arguments}
    data = VisionDataModule(**given)
    data.setup("fit")
    return data


def batches(data: VisionDataModule, role: str) -> torch.Tensor:
    return torch.cat([batch.images for batch in data.in_order(role, 5)])


def all_images(root: Path, **arguments: Any) -> dict[str, torch.Tensor]:
    data = ready(root, **arguments)
    return {role: batches(data, role) for role in data.splits}


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for role in expected:
        assert torch.equal(found[role], expected[role]), role


def entry_of(split: str) -> Path:
    (path,) = (path for path, entry, _ in list_entries() if entry is not None and entry.split == split)
    return path


# --- equal numbers, one pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["squash", "centre_crop"])
@pytest.mark.parametrize("stage", ["final", "select"])
def test_images_are_those_of_decoding(root: Path, stage: str, resize: str) -> None:
    transform = TransformConfig(resize=resize)  # type: ignore[arg-type]
    expected = all_images(root, stage=stage, transform=transform, pixel_cache=False)
    assert not list_entries()
    assert_equal(all_images(root, stage=stage, transform=transform), expected)
    assert len(list_entries()) == 2
    assert_equal(all_images(root, stage=stage, transform=transform), expected)


def test_each_image_is_decoded_once_and_never_again(root: Path, decoded: list[str]) -> None:
    first = ready(root)
    before = {role: batches(first, role) for role in first.splits}
    assert len(decoded) == COUNTS["train800val200"] + COUNTS["test"]
    decoded.clear()
    again = ready(root)
    assert_equal({role: batches(again, role) for role in again.splits}, before)
    again.unlock_test()
    assert sum(len(batch.images) for batch in again.test_dataloader()) == COUNTS["test"]
    assert decoded == []
    assert again.content_digests == first.content_digests
    assert again.image_notes == first.image_notes


def test_another_size_or_transform_is_another_entry(root: Path) -> None:
    for arguments in ({}, {"image_size": 8}, {"transform": TransformConfig(interpolation="bilinear")}):
        assert_equal(all_images(root, **arguments), all_images(root, pixel_cache=False, **arguments))
    assert len(list_entries()) == 6


def test_a_changed_image_is_another_entry(root: Path) -> None:
    before = all_images(root)
    path = root / "dtd" / "images" / "test" / "000003.jpg"
    times = path.stat()
    Image.new("RGB", (20, 20), (9, 8, 7)).save(path)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # as after an unpacking that restores times
    after = all_images(root)
    assert_equal(after, all_images(root, pixel_cache=False))
    assert not torch.equal(after["test"], before["test"])


def test_a_copy_of_the_images_shares_the_entries(root: Path, tmp_path: Path) -> None:
    expected = all_images(root)
    shutil.copytree(root, tmp_path / "copy")
    assert_equal(all_images(tmp_path / "copy"), expected)
    assert len(list_entries()) == 2


def test_deep_images_follow_the_depth_of_the_data_set(root: Path) -> None:
    folder = root / "dtd" / "images" / "train800val200"
    for number, high in ((0, 1023), (1, 255)):
        values = np.linspace(0, high, 400).astype(np.uint16).reshape(20, 20)
        Image.fromarray(values).save(folder / f"{number:06d}.jpg", format="PNG")
    for _ in range(2):
        assert_equal(all_images(root), all_images(root, pixel_cache=False))
    values = np.full((20, 20), 60000, dtype=np.uint16)  # in test, which makes those of train darker
    Image.fromarray(values).save(root / "dtd" / "images" / "test" / "000000.jpg", format="PNG")
    for _ in range(2):
        assert_equal(all_images(root), all_images(root, pixel_cache=False))


def test_crops_of_the_stored_image_and_folds_are_not_cached(root: Path) -> None:
    data = ready(root, augment=AugmentConfig(crop="random_resized"))
    list(data.train_dataloader())
    assert {entry.split for _, entry, _ in list_entries() if entry} == {"test"}
    pixels_before = list_entries()
    ready(root, stage="select", cross_validation=CrossValidationConfig(folds=3))
    assert list_entries() == pixels_before


def test_augmentation_and_worker_processes_read_the_cache(root: Path) -> None:
    def epoch(**arguments: Any) -> list[torch.Tensor]:
        return [b.images for b in ready(root, augment=AugmentConfig(flip=0.5), **arguments).train_dataloader()]

    expected = epoch(pixel_cache=False)
    for workers in (0, 2):
        assert all(torch.equal(*pair) for pair in zip(epoch(num_workers=workers), expected, strict=True))


def test_a_pickled_entry_is_a_path(root: Path) -> None:
    ready(root, image_size=64)
    images = open_entry(entry_of("test"))[1]
    packed = pickle.dumps(images)
    assert len(packed) < 2000 < images.take(np.array([0])).nbytes
    assert np.array_equal(pickle.loads(packed).take(np.arange(11)), images.take(np.arange(11)))


# --- damage ----------------------------------------------------------------------------------------------------------


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from([".npy", ".json"]))
def test_no_flipped_bit_goes_unnoticed(root: Path, data: st.DataObject, suffix: str) -> None:
    expected = all_images(root)
    path = entry_of("test").with_suffix(suffix)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) * 8 - 1))
    content[at // 8] ^= 1 << at % 8
    path.write_bytes(content)
    try:
        assert_equal(all_images(root), expected)
    finally:
        shutil.rmtree(path.parent)


def test_a_damaged_image_is_named_and_stored_again(root: Path) -> None:
    expected = all_images(root)
    path = entry_of("test")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of the last image
    path.write_bytes(content)
    data = ready(root)
    with pytest.warns(UserWarning, match=rf"{path.name}: image 10 .*decoded"):
        found = batches(data, "test")
    assert torch.equal(found, expected["test"])
    assert not path.exists()
    assert_equal(all_images(root), expected)
    assert path.read_bytes()[-1] == content[-1] ^ 1


def test_images_that_changed_places_are_noticed(root: Path) -> None:
    all_images(root)
    path = entry_of("test")
    array = np.load(path, mmap_mode="r+")
    array[[2, 3]] = array[[3, 2]]
    array.flush()
    images = open_entry(path)[1]
    images.take(np.array([0, 1]))
    with pytest.raises(DamagedPixelsError, match="image 2"):
        images.take(np.array([2]))


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "other shape", "no facts", "no schema"])
def test_a_damaged_file_is_built_again(root: Path, damage: str) -> None:
    expected = all_images(root)
    path = entry_of("test")
    facts = path.with_suffix(".json")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-100])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_bytes(b"hello")
    elif damage == "other shape":
        np.save(path, np.zeros((11, 3, 8, 8), np.uint8))
    elif damage == "no facts":
        facts.unlink()
    else:
        facts.write_text(json.dumps({**json.loads(facts.read_text()), "schema": 99}))
    assert_equal(all_images(root), expected)
    assert_equal(all_images(root), expected)
    assert path.read_bytes() == content


def test_a_file_that_changes_after_the_check_is_not_stored_under_its_old_digest(root: Path) -> None:
    data = VisionDataModule(TASK, root=str(root), image_size=16, batch_size=4)
    data.setup("fit")
    for path, _, _ in list_entries():
        pixels.remove_entry(path)
    changed = root / "dtd" / "images" / "test" / "000003.jpg"
    Image.new("RGB", (20, 20), (9, 8, 7)).save(changed)
    assert batches(data, "test")[3].float().mean() < 20
    assert not [entry for _, entry, _ in list_entries() if entry and entry.split == "test"]


# --- disks that are full or cannot be written ------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_reported(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_images(root, pixel_cache=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SVP_BENCH_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match=r"test cannot be cached .*--data.pixel_cache false"):
        found = all_images(root)
    assert_equal(found, expected)


def test_a_small_disk_is_not_filled(root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_images(root, pixel_cache=False)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.warns(UserWarning, match=r"test cannot be cached .*half of the 1000 B free on its disk"):
        found = all_images(root)
    assert_equal(found, expected)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]


def test_a_disk_that_fills_up_is_reported(root: Path, cache: Path) -> None:
    expected = all_images(root, pixel_cache=False)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))  # bytes a file: writing more fails
    try:
        with pytest.warns(UserWarning, match=r"test cannot be cached .*File too large"):
            found = all_images(root)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert_equal(found, expected)
    assert not [path for path in cache.iterdir() if path.suffix not in (".lock",)]


# --- several processes -----------------------------------------------------------------------------------------------

_CODE = """
import os, sys, time
from pathlib import Path
from svp_bench.data import sources
from svp_bench.data.decode import read_image
from svp_bench.data.pixels import PixelCache
from svp_bench.data.transforms import EvalTransform
from svp_bench.data.sources import open_source
from svp_bench.tasks.cards import load_task

def slow(*arguments):
    print("decoded", flush=True)
    time.sleep(float(sys.argv[2]))
    return read_image(*arguments)

sources.read_image = slow
cache = PixelCache("vtab/dtd", EvalTransform(16), lambda line: print(line, flush=True), print)
images = open_source(load_task("vtab/dtd"), Path(sys.argv[1])).get("test")
found = cache.examine(images)
print("images", cache.open(images, found).shape[0], flush=True)
"""


def start(root: Path, pause: float) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", _CODE, str(root), str(pause)], stdout=subprocess.PIPE, text=True)


def test_of_two_processes_one_decodes_and_the_other_waits(root: Path) -> None:
    one = start(root, 0.2)
    assert one.stdout is not None
    assert one.stdout.readline() == "decoded\n"
    other = start(root, 0)
    texts = ["decoded\n" + one.communicate(timeout=60)[0], other.communicate(timeout=60)[0]]
    assert [text.count("decoded\n") for text in texts] == [COUNTS["test"], 0]
    assert "waiting for another process" in texts[1]
    assert all(text.endswith("images 11\n") for text in texts)


def test_what_a_killed_process_leaves_is_not_trusted(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    process = start(root, 0.2)
    assert process.stdout is not None
    for _ in range(3):
        process.stdout.readline()
    assert main(["data", "cache", "--remove"]) == 0
    assert "in use: not removed" in capsys.readouterr().out
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    ((left, entry, _),) = list_entries()
    assert left.suffix == ".building"
    assert entry is None
    expected = all_images(root, pixel_cache=False)
    assert_equal(all_images(root), expected)
    assert not left.exists()
    assert {entry.split for _, entry, _ in list_entries() if entry} == {"test", "train800val200"}


def test_a_kill_at_any_time_leaves_a_cache_that_works(root: Path) -> None:
    expected = all_images(root, pixel_cache=False)
    for attempt in range(6):
        process = start(root, 0.02)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 * attempt)
        process.kill()
        process.communicate()
        assert_equal(all_images(root), expected)
        if attempt % 2:
            shutil.rmtree(os.environ["SVP_BENCH_CACHE"])


# --- the subcommand --------------------------------------------------------------------------------------------------


def test_the_subcommand_lists_and_removes(root: Path, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "cache"]) == 0
    assert f"{cache}: 0 B in all" in capsys.readouterr().out
    expected = all_images(root)
    assert main(["data", "cache", "vtab"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert [line.split()[:3] for line in listed[-3:-1]] in (
        [["vtab/dtd", "test", "11"], ["vtab/dtd", "train800val200", "19"]],
        [["vtab/dtd", "train800val200", "19"], ["vtab/dtd", "test", "11"]],
    )
    assert main(["data", "cache", "vtab/caltech101", "--remove"]) == 0
    assert len(list_entries()) == 2
    data = ready(root)
    assert main(["data", "cache", "vtab/dtd", "--remove"]) == 0
    assert not [*cache.glob("*.npy"), *cache.glob("*.json")]
    assert_equal({role: batches(data, role) for role in data.splits}, expected)  # a run is not disturbed


def test_the_subcommand_imports_no_torch(root: Path) -> None:
    code = "import sys; from svp_bench.cli.main import main; main(['data', 'cache']); assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
