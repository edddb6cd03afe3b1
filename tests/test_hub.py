"""The source `hub`: parquet data sets, read by the real client from a hub on loopback."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_hub import Hub, settle_client
from helpers import assert_error, command, wait_for
from PIL import Image

from svp_bench.core import hub as client
from svp_bench.core.errors import DataError, UnavailableError, UsageError
from svp_bench.data.manifest import Manifest, read_manifest
from svp_bench.data.sources import open_source
from svp_bench.prepare.hub_source import HubSource
from svp_bench.prepare.known import known_sources
from svp_bench.prepare.sources import Request, prepare
from svp_bench.tasks.cards import load_suite, load_task

pa = pytest.importorskip("pyarrow", reason="the extra hub is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra hub is not installed")

TASK, REPO = "vtab/dtd", "bramtoula/vtab_dtd"
COUNTS = {"train800": 7, "val200": 3, "test": 5, "trainval": 2}


def stored(index: int, kind: str = "PNG", size: tuple[int, int] = (9, 8)) -> bytes:
    pixels = np.random.default_rng(index).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **({"lossless": True} if kind == "WEBP" else {}))
    return file.getvalue()


def parquet(
    images: list[bytes | None], labels: list[int | None], rows: int = 2, names: tuple[str, str] = ("image", "label")
) -> bytes:
    """Return a file as `datasets` writes one: a struct of bytes and path, and whole numbers."""
    column = pa.array(
        [{"bytes": content, "path": None} for content in images],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({names[0]: column, names[1]: pa.array(labels, pa.int64())})
    file = io.BytesIO()
    pq.write_table(table, file, row_group_size=rows)
    return file.getvalue()


def numbered(start: int, count: int, **kwargs: Any) -> bytes:
    return parquet([stored(start + i) for i in range(count)], [(start + i) % 47 for i in range(count)], **kwargs)


def data_set() -> dict[str, bytes]:
    return {
        "README.md": b"---\n---\n",
        "data/train800-00000-of-00002.parquet": numbered(0, 4),
        "data/train800-00001-of-00002.parquet": numbered(4, 3),
        "data/val200-00000-of-00001.parquet": numbered(10, 3),
        "data/test-00000-of-00001.parquet": numbered(20, 5),
        "data/trainval-00000-of-00001.parquet": numbered(30, 2),
    }


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    settle_client(monkeypatch, str(tmp_path / "hub"), server.url)
    yield server
    server.stop()


class Place:
    """A data root, and `prepare` into it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = root / "vtab-1k" / "dtd"
        self.notes: list[str] = []
        self.request = Request(None, None, False, (), 2, root / ".downloads", self.notes.append)

    def prepare(self, task: str = TASK, **changes: Any) -> tuple[Manifest, tuple[str, ...]]:
        again = changes.pop("again", False)
        card = load_task(task)
        return prepare(card, load_suite(card.suite), "hub", replace(self.request, **changes), self.root, replace=again)

    def refused(self, **changes: Any) -> str:
        with pytest.raises(DataError) as caught:
            self.prepare(**changes)
        assert "\n" not in str(caught.value)
        assert not self.folder.exists()
        return str(caught.value)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path / "root")


def test_all_19_tasks_state_a_repository() -> None:
    """Names of facts/data_sources; two of them were seen, the others follow from the script that made them."""
    suite = load_suite("vtab")
    specs = {name: known_sources(load_task(name), suite).hub for name in suite.tasks}
    assert all(specs.values())
    repositories = [spec.repository for spec in specs.values() if spec]
    assert len({*repositories}) == 19
    assert {spec.repository for spec in specs.values() if spec and spec.status == "seen"} == {
        "bramtoula/vtab_cifar100",
        "bramtoula/vtab_patch_camelyon",
    }
    assert all(name.startswith("bramtoula/vtab_") for name in repositories)


def test_a_data_set_becomes_split_files_and_images(hub: Hub, place: Place) -> None:
    commit = hub.add(REPO, data_set())
    manifest, notes = place.prepare()
    assert (manifest.source, manifest.variant) == ("hub", "hub")
    assert manifest.splits == {"train800": 7, "val200": 3, "train800val200": 10, "test": 5}
    assert manifest.origin["repository"] == REPO
    assert manifest.origin["revision"] == commit
    assert manifest.origin["images"] == "15 PNG"
    assert len(notes) == 4  # the counts are not those of the card
    assert read_manifest(place.folder) == manifest

    lines = (place.folder / "train800val200.txt").read_text().splitlines()
    assert lines[0] == "images/train800/000000.png 0"
    assert lines[7] == "images/val200/000000.png 10"
    assert (place.folder / "images/train800/000006.png").read_bytes() == stored(6)
    assert not (place.folder / "images/train800val200").exists()
    card = load_task(TASK)
    found = open_source(card, place.root)
    assert found.splits["test"].labels.tolist() == [20, 21, 22, 23, 24]
    assert any(commit in line and "the newest now" in line for line in place.notes)
    assert not any("trainval" in line for line in hub.asked)  # only what the card needs


def test_a_revision_is_kept(hub: Hub, place: Place) -> None:
    old = hub.add(REPO, data_set(), "a" * 40)
    hub.add(REPO, {**data_set(), "data/test-00000-of-00001.parquet": numbered(20, 6)}, "b" * 40)
    assert place.prepare(revision=old)[0].splits["test"] == 5
    manifest, _ = place.prepare(again=True)
    assert (manifest.splits["test"], manifest.origin["revision"]) == (6, "b" * 40)
    with pytest.raises(DataError, match="no such revision"):
        place.prepare(revision="c" * 40, again=True)
    assert read_manifest(place.folder) == manifest


def test_the_second_time_nothing_is_downloaded(hub: Hub, place: Place) -> None:
    hub.add(REPO, data_set())
    first, _ = place.prepare()
    hub.asked.clear()
    assert place.prepare()[0] == first
    assert hub.asked == [f"GET /api/datasets/{REPO}"]


def test_offline_takes_what_was_downloaded(hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, data_set())
    assert f"{REPO} is not in the hub's cache" in place.refused(offline=True)
    first, _ = place.prepare()
    hub.stop()
    second, _ = place.prepare(offline=True, again=True)
    assert second.digest == first.digest
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert place.prepare(again=True)[0].digest == first.digest
    assert place.prepare(again=True, revision=first.origin["revision"])[0].digest == first.digest


def test_offline_an_incomplete_cache_is_refused(hub: Hub, place: Place) -> None:
    hub.add(REPO, {k: v for k, v in data_set().items() if "test" not in k})
    hub.add(REPO, data_set(), "d" * 40)
    repository = client.look_up(REPO, "dataset")
    client.download(repository, repository.files[1])
    assert "files [0], expected 0 to 1" in place.refused(offline=True)


def test_a_mirror_of_the_hub(hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, data_set())
    gone = Hub()
    gone.stop()
    monkeypatch.setenv("HF_ENDPOINT", gone.url)
    manifest, _ = place.prepare(mirrors=(hub.url,))
    assert manifest.origin["endpoint"] == hub.url


def test_images_of_other_formats(hub: Hub, place: Place) -> None:
    """JPEG stays the original file; anything else becomes a PNG of the same pixels."""
    images = [stored(1, "JPEG"), stored(2, "WEBP"), stored(3, "BMP"), stored(4)]
    hub.add(REPO, {**data_set(), "data/test-00000-of-00001.parquet": parquet([*images], [0, 1, 2, 3])})
    manifest, _ = place.prepare()
    folder = place.folder / "images" / "test"
    assert (folder / "000000.jpg").read_bytes() == images[0]
    for index in (1, 2):
        with Image.open(folder / f"{index:06d}.png") as found, Image.open(io.BytesIO(images[index])) as meant:
            assert found.format == "PNG"
            assert np.array_equal(np.asarray(found), np.asarray(meant.convert("RGB")))
    assert manifest.origin["images"] == "1 BMP written as PNG, 1 JPEG, 11 PNG, 1 WEBP written as PNG"
    assert any("written as PNG" in line for line in place.notes)


def test_plain_binary_columns_other_names_and_types(hub: Hub, place: Place) -> None:
    table = pa.table({"id": pa.array(["a", "b"]), "pixels": pa.array([stored(1), stored(2)], pa.large_binary()),
                      "class": pa.array([3, 4], pa.uint8())})  # fmt: skip
    file = io.BytesIO()
    pq.write_table(table, file)
    names = {"train800": "train800.parquet", "val200": "default/val200/0000.parquet", "test": "x/test.parquet"}
    hub.add(REPO, dict.fromkeys(names.values(), file.getvalue()))
    manifest, _ = place.prepare()
    assert manifest.splits == {"train800": 2, "val200": 2, "train800val200": 4, "test": 2}
    assert (place.folder / "test.txt").read_text() == "images/test/000000.png 3\nimages/test/000001.png 4\n"


def test_a_folder_of_parquet_files(hub: Hub, place: Place, tmp_path: Path) -> None:
    for name, content in data_set().items():
        path = tmp_path / "mine" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    manifest, _ = place.prepare(location=str(tmp_path / "mine"))
    assert manifest.splits["train800"] == 7
    assert not hub.asked
    assert "train800 7 rows, val200 3 rows, test 5 rows" in probe(place, location=str(tmp_path / "mine"))


def probe(place: Place, task: str = TASK, **changes: Any) -> str:
    card = load_task(task)
    return HubSource().probe(card, load_suite(card.suite), replace(place.request, **changes))


# ---- refused


def without(split: str) -> dict[str, bytes]:
    return {path: content for path, content in data_set().items() if f"/{split}-" not in path}


WRONG: dict[str, tuple[Callable[[], dict[str, bytes]], list[str]]] = {
    "no split": (lambda: without("val200"), ["no parquet files of val200", "train800", "trainval", "--revision"]),
    "a shard is missing": (
        lambda: {k: v for k, v in data_set().items() if "00001-of-00002" not in k},
        ["train800", "files [0], expected 0 to 1"],
    ),
    "a shard twice": (
        lambda: {**data_set(), "data/test-00000-of-00001-0123456789abcdef.parquet": numbered(20, 5)},
        ["the split test has the files [0, 0]"],
    ),
    "a split in two folders": (
        lambda: {**data_set(), "other/test-00000-of-00001.parquet": numbered(20, 5)},
        ["the split test is there 2 times", "data/test-00000-of-00001.parquet", "other/test"],
    ),
    "no image column": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": labels_only()},
        ["needs one column of images", "found none", "'label' int64"],
    ),
    "two label columns": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": two_labels()},
        ["needs one column of labels", "'coarse', 'fine'"],
    ),
    "a label above": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([stored(1)], [47])},
        ["test-00000-of-00001.parquet: row 0 of test: label 47", "47 classes (0..46)"],
    ),
    "a label below": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([stored(1)] * 3, [0, 1, -1])},
        ["row 2 of test: label -1"],
    ),
    "no label": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([stored(1)], [None])},
        ["row 0 of test: label None"],
    ),
    "no image": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([stored(1), None], [0, 1])},
        ["row 1 of test: holds no image"],
    ),
    "a broken image": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([b"no image"], [0])},
        ["row 0 of test: not a readable image"],
    ),
    "a giant image": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([giant()], [0])},
        ["row 0 of test: not a readable image", "100000"],
    ),
    "a truncated file": (
        lambda: {**data_set(), "data/test-00000-of-00001.parquet": numbered(20, 5)[:-100]},
        ["test-00000-of-00001.parquet: not a readable parquet file"],
    ),
    "damaged inside": (lambda: {**data_set(), "data/test-00000-of-00001.parquet": damaged()}, ["test"]),
    "no rows": (lambda: {**data_set(), "data/test-00000-of-00001.parquet": parquet([], [])}, ["test has no rows"]),
}


def labels_only() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"label": [1, 2]}), file)
    return file.getvalue()


def two_labels() -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [stored(1)], "coarse": [1], "fine": [2]}), file)
    return file.getvalue()


def giant() -> bytes:
    """Return a PNG whose header states 100,000 × 100,000 pixels."""
    import struct
    import zlib

    content = stored(1)
    header = b"IHDR" + struct.pack(">II", 100_000, 100_000) + content[24:29]
    return content[:8] + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def damaged() -> bytes:
    content = bytearray(numbered(20, 5))
    content[10:400] = b"\xff" * 390
    return bytes(content)


@pytest.mark.parametrize("case", [*WRONG])
def test_damaged_and_hostile_data_sets_leave_nothing(hub: Hub, place: Place, case: str) -> None:
    files, expected = WRONG[case]
    hub.add(REPO, files())
    text = place.refused()
    for part in expected:
        assert part in text
    assert not [*place.root.rglob("*.png")]


def test_repositories_that_are_not_there(hub: Hub, place: Place) -> None:
    text = place.refused()
    for part in (REPO, "no such repository", "its name is inferred", "--from OWNER/NAME", "--mirror"):
        assert part in text
    with pytest.raises(UsageError, match="neither a repository OWNER/NAME nor a folder"):
        place.prepare(location="no/such/name")
    assert "not the name of a repository" in place.refused(location="a--b/c")
    assert "inferred" not in place.refused(location="some/body")


def test_tasks_that_the_source_cannot_write(place: Place) -> None:
    with pytest.raises(UsageError, match="split files, which fgvc/cub does not read"):
        place.prepare("fgvc/cub")


def test_without_pyarrow(hub: Hub, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(REPO, data_set())
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UnavailableError, match=r"pip install 'svp-bench\[hub\]'"):
        place.prepare()
    assert not hub.asked


# ---- the network


def test_a_busy_hub_and_a_cut_download(hub: Hub, place: Place) -> None:
    commit = hub.add(REPO, data_set())
    repository = client.look_up(REPO, "dataset", revision=commit)
    hub.failing, hub.cut = [500, 500], 100
    found = client.download(repository, repository.files[1])
    assert found.read_bytes() == data_set()["data/train800-00000-of-00002.parquet"]
    assert place.prepare()[0].splits["train800"] == 7


def test_a_file_with_another_digest_than_stated(hub: Hub, place: Place) -> None:
    hub.add(REPO, data_set())
    path = "data/test-00000-of-00001.parquet"
    hub.wrong[path] = bytes(len(data_set()[path]))
    text = place.refused()
    assert f"{path} of {REPO} has the digest sha256:" in text
    assert "the hub states sha256:" in text
    hub.wrong.clear()
    assert place.prepare()[0].splits["test"] == 5


def test_a_killed_build_is_continued(hub: Hub, place: Place, tmp_path: Path) -> None:
    """Kill the command when it has written images; the same command then downloads nothing again."""
    many = parquet([stored(i, size=(60, 60)) for i in range(3000)], [i % 47 for i in range(3000)], rows=100)
    hub.add(REPO, {**data_set(), "data/test-00000-of-00001.parquet": many})
    argv = ["-m", "svp_bench", "data", "prepare", TASK, "--source", "hub", "--root", str(place.root)]
    process = subprocess.Popen([sys.executable, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = place.folder.with_name(".dtd.partial") / "dtd" / "images" / "test"
    wait_for(lambda: partial.is_dir() and any(partial.iterdir()), 60)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not place.folder.exists()
    before = {path.name: path.stat().st_mtime_ns for path in partial.glob("*.png")}
    sent = hub.sent
    manifest, _ = place.prepare()
    assert manifest.splits["test"] == 3000
    assert hub.sent - sent < len(many)
    images = place.folder / "images" / "test"
    assert {name: (images / name).stat().st_mtime_ns for name in before} == before
    assert len([*images.iterdir()]) == 3000


# ---- the command


def test_probe_reports_all_19_tasks_and_downloads_no_images(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    hub.add(REPO, data_set())
    splits = [{"name": name, "num_examples": count} for name, count in COUNTS.items()]
    hub.cards[f"datasets/{REPO}"] = {"dataset_info": {"splits": splits}}
    hub.add("bramtoula/vtab_cifar100", without("val200"))
    outcome = command("data", "prepare", "vtab", "--source", "hub", "--probe")
    assert outcome.status == 1
    (dtd,) = (line for line in outcome.out.splitlines() if line.startswith(TASK))
    for part in (REPO, "c0ffee", "inferred", "train800 7 rows, val200 3 rows, test 5 rows", "4 files"):
        assert part in dtd
    (cifar,) = (line for line in outcome.out.splitlines() if line.startswith("vtab/cifar:"))
    assert "LACKS val200" in cifar
    assert "rows not stated" in cifar
    assert "17 of 19 tasks failed" in outcome.err
    assert outcome.err.count("no such repository") == 17
    assert not [line for line in hub.asked if "resolve" in line or "files" in line]


def test_the_command_builds_a_task(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    argv = ("data", "prepare", TASK, "--source", "hub", "--root", "root")
    assert "no such repository" in assert_error(command(*argv), 1)
    hub.add(REPO, data_set())
    outcome = command(*argv)
    assert outcome.status == 0
    assert "train800 7" in outcome.out
    assert "variant hub" in outcome.out
