"""The source torchvision: real archives from a real server on loopback, unpacked and read by torchvision's classes."""

from __future__ import annotations

import hashlib
import inspect as introspection
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
from helpers import command
from native_files import write_torchvision
from torchvision import datasets

from svp_bench.core.errors import DataError, UsageError
from svp_bench.data.manifest import read_manifest
from svp_bench.data.sources import open_source
from svp_bench.prepare import torchvision_source
from svp_bench.prepare.sources import Request, get_source, prepare
from svp_bench.prepare.torchvision_source import ARCHIVES
from svp_bench.tasks.cards import list_tasks, load_suite, load_task

HTA = load_suite("hta")
TASKS = [name for name in list_tasks("hta") if load_task(name).reader.kind == "torchvision"]
COUNTS = {"train": 48, "val": 12, "test": 9}
UNPACKED = {  # archive -> what it holds, below the folder that it is unpacked into
    "cifar-10-python.tar.gz": ["cifar-10-batches-py"],
    "cifar-100-python.tar.gz": ["cifar-100-python"],
    "dtd-r1.0.1.tar.gz": ["dtd"],
    "food-101.tar.gz": ["food-101"],
    "GTSRB-Training_fixed.zip": ["GTSRB/Training"],
    "GTSRB_Final_Test_Images.zip": ["GTSRB/Final_Test"],
    "GTSRB_Final_Test_GT.zip": ["GT-final_test.csv"],
}


@pytest.fixture(autouse=True)
def _any_checksum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torchvision read unpacked files whose checksums are not those of the real data."""
    monkeypatch.delenv("SVP_BENCH_DATA", raising=False)
    for module in ("cifar", "svhn"):
        monkeypatch.setattr(f"torchvision.datasets.{module}.check_integrity", lambda path, md5: Path(path).is_file())


def pack(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write the archives of a small data set to a folder, and have their checksums expected."""
    card = load_task(task)
    whole = write_torchvision(card, tmp_path / "whole", COUNTS)
    served = tmp_path / "served"
    served.mkdir(exist_ok=True)
    kind = str(card.reader.options["set"])
    expected = []
    for one in ARCHIVES[kind]:
        file, inside = served / one.name, whole / one.folder
        if not one.packed:
            file.write_bytes((inside / one.name).read_bytes())
        elif one.name.endswith(".zip"):
            with zipfile.ZipFile(file, "w") as archive:
                for name in UNPACKED[one.name]:
                    paths = [inside / name, *sorted((inside / name).rglob("*"))]
                    for path in paths:
                        archive.write(path, path.relative_to(inside))
        else:
            with tarfile.open(file, "w:gz") as tar:
                for name in UNPACKED[one.name]:
                    tar.add(inside / name, name)
        expected.append(replace(one, md5=hashlib.md5(file.read_bytes()).hexdigest()))
    monkeypatch.setitem(torchvision_source.ARCHIVES, kind, tuple(expected))  # type: ignore[arg-type]
    return served


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve the folder `served`; the requests are listed."""
    (tmp_path / "served").mkdir()
    asked: list[str] = []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *arguments: Any) -> None:
            asked.append(self.path)

    running = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path / "served")))
    thread = Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


def request_of(
    tmp_path: Path, location: str | Path | None, mirrors: tuple[str, ...] = (), offline: bool = False
) -> Request:
    place = None if location is None else str(location)
    return Request(place, None, offline, mirrors, 2, tmp_path / "downloads", lambda line: None)


def pixels(root: Path, task: str) -> list[tuple[bytes, int]]:
    images = open_source(load_task(task), root).get("test")
    return [(np.asarray(images.load(n)).tobytes(), int(images.labels[n])) for n in range(len(images))]


@pytest.mark.parametrize("task", TASKS)
def test_a_set_is_downloaded_unpacked_and_read(
    task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, list[str]]
) -> None:
    address, asked = server
    pack(task, tmp_path, monkeypatch)
    card = load_task(task)
    manifest, _ = prepare(card, HTA, "torchvision", request_of(tmp_path, address), tmp_path / "data")
    assert (manifest.source, manifest.variant) == ("torchvision", "card")
    assert manifest.splits["test"] == 9
    assert {one.name for one in torchvision_source.ARCHIVES[str(card.reader.options["set"])]} <= {*manifest.origin}
    assert pixels(tmp_path / "data", task) == pixels(tmp_path / "whole", task)
    folder = tmp_path / "data" / "HTA" / card.folder
    assert not [path for path in folder.rglob("*") if path.suffix in (".gz", ".zip")]  # archives stay with downloads
    before = len(asked)
    prepare(card, HTA, "torchvision", request_of(tmp_path, address), tmp_path / "data", replace=True)
    assert len(asked) == before  # they are downloaded once


def test_archives_of_a_folder_are_checked_and_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = pack("hta/dtd", tmp_path, monkeypatch)
    archive = served / "dtd-r1.0.1.tar.gz"
    content = archive.read_bytes()
    card = load_task("hta/dtd")
    prepare(card, HTA, "torchvision", request_of(tmp_path, served, offline=True), tmp_path / "data")
    assert archive.read_bytes() == content
    archive.write_bytes(content[:-1])
    with pytest.raises(DataError, match=r"dtd-r1\.0\.1\.tar\.gz has md5:.* torchvision states md5:") as caught:
        prepare(card, HTA, "torchvision", request_of(tmp_path, served), tmp_path / "other")
    assert "robots.ox.ac.uk" in str(caught.value)
    archive.unlink()
    with pytest.raises(DataError, match=r"dtd-r1\.0\.1\.tar\.gz is missing"):
        prepare(card, HTA, "torchvision", request_of(tmp_path, served), tmp_path / "other")
    assert not (tmp_path / "other" / "HTA" / "dtd").exists()


def test_a_mirror_serves_where_the_first_address_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[str, list[str]]
) -> None:
    address, _ = server
    pack("hta/svhn", tmp_path, monkeypatch)
    request = request_of(tmp_path, f"{address}/gone", (address,))
    manifest, _ = prepare(load_task("hta/svhn"), HTA, "torchvision", request, tmp_path / "data")
    assert manifest.splits["test"] == 9


def test_a_half_unpacked_folder_is_unpacked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision takes a folder that exists for a whole one; an interrupted build must not."""
    served = pack("hta/food101", tmp_path, monkeypatch)
    card = load_task("hta/food101")
    from torchvision.datasets import utils

    original = utils.extract_archive

    def killed(source: str, target: str) -> None:
        original(source, target)
        for path in sorted(Path(target).rglob("*.jpg"))[10:]:
            path.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(utils, "extract_archive", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(card, HTA, "torchvision", request_of(tmp_path, served), tmp_path / "data")
    assert not (tmp_path / "data" / "HTA" / "food101").exists()
    prepare(card, HTA, "torchvision", request_of(tmp_path, served), tmp_path / "data")
    assert pixels(tmp_path / "data", "hta/food101") == pixels(tmp_path / "whole", "hta/food101")


def test_tasks_of_fgvc_name_the_task_that_shares_their_folder(tmp_path: Path) -> None:
    source = get_source("torchvision")
    with pytest.raises(UsageError, match=r"fgvc/cub .*`svp-bench data prepare fgvc/cub --source native`"):
        source.plan(load_task("hta/cub200"), HTA, request_of(tmp_path, None))
    with pytest.raises(UsageError, match="vtab/dtd is not read through torchvision"):
        source.plan(load_task("vtab/dtd"), load_suite("vtab"), request_of(tmp_path, None))


def test_probing_names_addresses_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, card = get_source("torchvision"), load_task("hta/gtsrb")
    line = source.probe(card, HTA, request_of(tmp_path, None))
    assert line.count("https://") == 3
    served = pack("hta/gtsrb", tmp_path, monkeypatch)
    line = source.probe(card, HTA, request_of(tmp_path, served))
    assert "://" not in line
    assert line.count("served") == 3


def test_the_command_prepares_and_goes_on_to_the_next_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = pack("hta/svhn", tmp_path, monkeypatch)
    flags = ["--source", "torchvision", "--from", str(served), "--root", str(tmp_path / "data")]
    outcome = command("data", "prepare", "hta/cub200", "hta/svhn", *flags)
    assert outcome.status == 1
    assert "hta/svhn: train 48" in outcome.out
    assert "fgvc/cub" in outcome.err
    manifest = read_manifest(tmp_path / "data" / "HTA" / "svhn")
    assert manifest is not None
    assert manifest.origin["test_32x32.mat"].startswith("md5:")


@pytest.mark.parametrize("kind", ARCHIVES)
def test_addresses_and_checksums_are_those_of_torchvision(kind: str) -> None:
    cls = getattr(datasets, kind)
    stated = {(one.address, one.md5) for one in ARCHIVES[kind]}
    if hasattr(cls, "tgz_md5"):
        assert stated == {(cls.url, cls.tgz_md5)}
    elif hasattr(cls, "_MD5"):
        assert stated == {(cls._URL, cls._MD5)}
    elif hasattr(cls, "split_list"):
        assert stated == {(cls.split_list[split][0], cls.split_list[split][2]) for split in ("train", "test")}
    else:
        code = introspection.getsource(cls.download)
        for one in ARCHIVES[kind]:
            folder, _, name = one.address.rpartition("/")
            assert f'"{folder}/"' in code
            assert name in code
            assert one.md5 in code
