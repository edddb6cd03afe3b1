"""`svp-bench data status` and `data verify`: what they find, what they write, and what they refuse."""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers import assert_error, command, run
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from svp_bench.data.manifest import MANIFEST, SUMS, parse_sums, read_manifest, sums_of
from svp_bench.data.synthetic import draw_task
from svp_bench.prepare.verify import perceptual_hash
from svp_bench.tasks.cards import load_task

TASK = "vtab/eurosat"
COUNTS = {"train800": 40, "val200": 20, "train800val200": 60, "test": 30}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data root with one task whose images are not marked as synthetic."""
    monkeypatch.setenv("SVP_BENCH_CACHE", str(tmp_path / "cache"))
    folder = draw_task(load_task(TASK), tmp_path / "data", counts=COUNTS, size=24)
    (folder / "SYNTHETIC.txt").unlink()
    return tmp_path / "data"


def folder_of(root: Path) -> Path:
    return root / load_task(TASK).folder


def verify(root: Path, *flags: str) -> str:
    return run("data", "verify", TASK, "--root", str(root), *flags).out


def status(root: Path, task: str = TASK) -> dict[str, object]:
    lines = run("data", "status", task, "--root", str(root), "--json").out.splitlines()
    return dict(json.loads(lines[0]))


def test_the_states_of_a_task(root: Path) -> None:
    found = status(root)
    assert (found["status"], found["counts"]) == ("different", COUNTS)
    assert "train800 has 40 images, the card states 800" in str(found["detail"])
    assert found["next"] == f"svp-bench data verify {TASK} --root {root}"
    assert "different" in verify(root)
    assert (status(root)["status"], status(root)["next"]) == ("different", "")

    (folder_of(root) / "new.txt").write_text("a file more")
    assert status(root)["status"] == "outdated"
    (folder_of(root) / "new.txt").unlink()
    verify(root)
    (folder_of(root) / "test.txt").unlink()
    shutil.rmtree(root.parent / "cache")
    found = status(root)
    assert (found["status"], found["detail"]) == ("partial", "lacks test")
    shutil.rmtree(folder_of(root))
    found = status(root)
    assert found["status"] == "absent"
    assert str(folder_of(root)) in str(found["place"])
    assert str(found["next"]).startswith(f"svp-bench data prepare {TASK} --source hub")


def test_status_lists_all_tasks_and_the_packaged_ones_become_verified(root: Path) -> None:
    lines = run("data", "status", "--root", str(root)).out.splitlines()
    rows = {line.split()[0]: line for line in lines if "/" in line.split()[0] and not line.split()[0].endswith(":")}
    assert len(rows) == 19 + 5 + 10 + 8
    assert "unverified" in rows["demo/digits-5shot"]
    run("data", "verify", "demo/digits-5shot")
    assert status(root, "demo/digits-5shot")["status"] == "unverified"  # of another root
    run("data", "verify", "demo/digits-5shot", "--root", str(root))
    found = status(root, "demo/digits-5shot")
    assert (found["status"], found["place"], found["next"]) == ("verified", "package", "")


def test_the_manifest_is_that_of_sha256sum(root: Path) -> None:
    out = verify(root)
    folder = folder_of(root)
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest.digest in out
    assert (manifest.task, manifest.source, manifest.variant, manifest.splits) == (TASK, "folder", "card", COUNTS)
    assert manifest.files == 150 + 4
    if shutil.which("sha256sum"):
        checked = subprocess.run(["sha256sum", "-c", "--quiet", SUMS], cwd=folder, capture_output=True, timeout=60)
        assert checked.returncode == 0, checked.stderr
    before = (folder / MANIFEST).read_bytes()
    verify(root)
    assert (folder / MANIFEST).read_bytes() == before


def test_files_that_differ_from_the_manifest_are_named_and_accepted_on_request(root: Path) -> None:
    verify(root)
    folder = folder_of(root)
    one = folder / "images/test/000003.jpg"
    stat = one.stat()
    Image.fromarray(np.full((24, 24, 3), 7, np.uint8)).save(one)
    content = one.read_bytes()[: stat.st_size].ljust(stat.st_size, b"\0")  # of the same size and time
    one.write_bytes(content)
    os.utime(one, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    (folder / "more.txt").write_text("x")
    (folder / "unused.md").write_text("x")
    before = (folder / MANIFEST).read_bytes()
    outcome = command("data", "verify", TASK, "--root", str(root))
    assert outcome.status == 1
    assert "1 file of" in outcome.out
    assert "images/test/000003.jpg" in outcome.out
    assert "more.txt, unused.md" in outcome.out
    assert (folder / MANIFEST).read_bytes() == before
    assert status(root)["status"] == "broken"
    assert "replaced" in verify(root, "--accept")
    accepted = read_manifest(folder)
    assert accepted is not None
    assert accepted.origin["changed_from"] == json.loads(before)["digest"]
    assert status(root)["status"] == "different"


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"schema": 99}', b'{"schema": 1}', b"\xff\xfe"])
def test_a_broken_manifest_is_one_line_until_it_is_accepted(root: Path, content: bytes) -> None:
    verify(root)
    (folder_of(root) / MANIFEST).write_bytes(content)
    assert MANIFEST in assert_error(command("data", "verify", TASK, "--root", str(root)), 1)
    verify(root, "--accept")
    assert read_manifest(folder_of(root)) is not None


def test_equal_and_similar_images_across_splits(root: Path, tmp_path: Path) -> None:
    folder = folder_of(root)
    images = folder / "images"
    rng = np.random.default_rng(0)
    for path in sorted(images.rglob("*.jpg")):  # so that no two look alike by chance
        small = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(path, quality=95)
    shutil.copy(images / "train800/000005.jpg", images / "test/000007.jpg")
    with Image.open(images / "train800/000006.jpg") as image:
        image.resize((61, 61)).save(images / "test/000008.jpg", quality=60)
    out = verify(root, "--near_duplicates", str(tmp_path / "near"))
    assert "1 of the 30 images of test have the same pixels as images of train800" in out
    with (tmp_path / "near" / f"{TASK}.csv").open() as file:
        rows = list(csv.DictReader(file))
    pairs = {(Path(row["image"]).name, Path(row["other_image"]).name, row["other_split"]) for row in rows}
    assert ("000007.jpg", "000005.jpg", "train800") in pairs
    assert ("000008.jpg", "000006.jpg", "train800") in pairs
    assert {pair[0] for pair in pairs} == {"000007.jpg", "000008.jpg"}
    assert rows[0]["distance"] == "0"


def test_the_hash_survives_what_the_eye_does_not_see() -> None:
    rng = np.random.default_rng(1)
    hashes = []
    for _ in range(40):
        image = Image.fromarray(rng.integers(0, 255, (9, 9, 3), dtype=np.uint8)).resize((96, 96))
        hashes.append(perceptual_hash(image))
        other = perceptual_hash(image.resize((50, 70)).point(lambda value: min(255, value + 9)))
        assert (hashes[-1] != other).sum() <= 4
    distances = [(a != b).sum() for index, a in enumerate(hashes) for b in hashes[:index]]
    assert min(distances) > 8


@pytest.mark.parametrize(
    ("content", "reason"),
    [(b"", "empty file"), (b"no image", "no known image format"), (b"\xff\xd8\xff\xe0 cut", "not a readable image")],
)
def test_an_image_that_cannot_be_decoded_is_named(root: Path, content: bytes, reason: str) -> None:
    verify(root)
    (folder_of(root) / "images/test/000003.jpg").write_bytes(content)
    line = assert_error(command("data", "verify", TASK, "--root", str(root)), 1)
    assert "000003.jpg" in line
    assert reason in line


def test_linked_images_are_in_the_manifest(root: Path, tmp_path: Path) -> None:
    images = folder_of(root) / "images"
    images.rename(tmp_path / "elsewhere")
    images.symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/circle").symlink_to(tmp_path / "elsewhere")
    verify(root)
    manifest = read_manifest(folder_of(root))
    assert manifest is not None
    assert manifest.files == 150 + 4
    shutil.copy(tmp_path / "elsewhere/test/000001.jpg", tmp_path / "elsewhere/test/000002.jpg")
    outcome = command("data", "verify", TASK, "--root", str(root))
    assert outcome.status == 1
    assert "images/test/000002.jpg" in outcome.out


def test_a_fifo_among_the_images_is_refused(root: Path) -> None:
    one = folder_of(root) / "images/test/000003.jpg"
    one.unlink()
    os.mkfifo(one)
    assert "000003.jpg" in assert_error(command("data", "verify", TASK, "--root", str(root)), 1)


def test_a_read_only_folder_is_verified_without_a_manifest(root: Path) -> None:
    folder = folder_of(root)
    folder.chmod(0o555)
    try:
        if os.access(folder, os.W_OK):
            pytest.skip("this user may write anywhere")
        assert "no manifest could be written" in verify(root)
    finally:
        folder.chmod(0o755)


def test_synthetic_images_get_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SVP_BENCH_CACHE", str(tmp_path / "cache"))
    folder = draw_task(load_task(TASK), tmp_path / "data", counts=COUNTS, size=16)
    verify(tmp_path / "data")
    assert not (folder / MANIFEST).exists()
    assert status(tmp_path / "data")["status"] == "synthetic"


def test_a_verify_that_is_killed_leaves_nothing_that_is_trusted(root: Path) -> None:
    delays = random.Random(0)
    for _ in range(4):
        argv = [sys.executable, "-m", "svp_bench", "data", "verify", TASK, "--root", str(root)]
        process = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(delays.uniform(0.2, 1.2))
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=30)
        if (folder_of(root) / MANIFEST).exists():
            assert read_manifest(folder_of(root)) is not None
    verify(root)
    assert status(root)["status"] == "different"
    left = {path.name for path in folder_of(root).iterdir()}
    assert left == {"images", MANIFEST, SUMS, *(f"{name}.txt" for name in COUNTS)}


NAMES = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="\n\r\\\0"), min_size=1, max_size=20)


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(NAMES, st.binary(min_size=32, max_size=32).map(bytes.hex), max_size=6))
def test_sums_are_read_as_written(digests: dict[str, str]) -> None:
    assert parse_sums(sums_of(digests), Path(SUMS)) == digests
