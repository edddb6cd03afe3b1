"""`svp-bench data prepare` from files: the real command, also killed, in parallel, without space or permission."""

from __future__ import annotations

import functools
import http.server
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import Outcome, assert_error, command, run, wait_for
from native_files import write_json_split, write_native

from svp_bench.data.manifest import read_manifest
from svp_bench.data.reading import SYNTHETIC_MARK
from svp_bench.data.sources import open_source
from svp_bench.data.synthetic import draw_task
from svp_bench.prepare.known import KnownSources, suite_sources
from svp_bench.tasks.cards import list_tasks, load_suite, load_task

COUNTS = {"train800": 5, "val200": 3, "test": 4}
VTAB = list_tasks("vtab")
Content = dict[str, bytes]


def draw(root: Path, *tasks: str) -> Path:
    """Draw tasks below `root`, without the mark of synthetic images."""
    for task in tasks:
        (draw_task(load_task(task), root, counts=COUNTS, size=16) / SYNTHETIC_MARK).unlink()
    return root


def pack(folder: Path, path: Path, prefix: str = "", skip: tuple[str, ...] = ()) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file() and file.name not in skip:
                archive.write(file, prefix + file.relative_to(folder).as_posix())
    return path


def content(folder: Path) -> Content:
    """Return the data in a folder: path → content."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name not in ("manifest.json", "SHA256SUMS")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def prepare(*arguments: str | Path) -> Outcome:
    return command("data", "prepare", *map(str, arguments))


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    argv = [sys.executable, "-m", "svp_bench", "data", "prepare", *map(str, arguments)]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --- zip -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "vtab-1k/", "vtab-1k/vtab-1k/", "some/where/"])
def test_an_archive_is_read_in_every_layout(prefix: str, tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar", "vtab/dtd")
    path = pack(source, tmp_path / "x.zip", prefix)
    prepare_both = prepare("vtab/cifar", "vtab/dtd", "--source", "zip", "--from", path, "--root", tmp_path / "d")
    assert prepare_both.status == 0, prepare_both.err
    for task in ("cifar", "dtd"):
        assert content(tmp_path / "d/vtab-1k" / task) == content(source / task)
    manifest = read_manifest(tmp_path / "d/vtab-1k/cifar")
    assert manifest is not None
    assert (manifest.source, manifest.variant, manifest.task) == ("zip", "card", "vtab/cifar")
    assert manifest.origin["archive"] == "x.zip"
    assert manifest.splits == {**COUNTS, "train800val200": 8}
    assert str(tmp_path) not in json.dumps(dict(manifest.origin))
    assert (
        subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=tmp_path / "d/vtab-1k/cifar").returncode == 0
    )


@pytest.mark.parametrize("form", ["of tasks", "of all", "tar"])
def test_archives_in_an_archive_and_tars_are_read(form: str, tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar", "vtab/dtd")
    inner = tmp_path / "inner"
    inner.mkdir()
    if form == "of tasks":
        pack(source / "cifar", inner / "cifar.zip")  # the files of the task at its top
        pack(source / "dtd", inner / "dtd.zip", "dtd/")
    elif form == "of all":
        pack(source, inner / "VTAB-1K.zip", "vtab-1k/")
    path = pack(inner, tmp_path / "outer.zip", "download/")
    if form == "tar":
        path = tmp_path / "vtab.tar.xz"
        with tarfile.open(path, "w:xz") as archive:
            archive.add(source, "./vtab-1k")
    outcome = prepare("vtab/cifar", "vtab/dtd", "--source", "zip", "--from", path, "--root", tmp_path / "d")
    assert outcome.status == 0, outcome.err
    for task in ("cifar", "dtd"):
        assert content(tmp_path / "d/vtab-1k" / task) == content(source / task)


def test_a_zip_with_12_of_19_tasks_builds_12_and_names_the_others(tmp_path: Path) -> None:
    source = draw(tmp_path / "src", *VTAB[:12])
    outcome = prepare("vtab", "--source", "zip", "--from", pack(source, tmp_path / "x.zip"), "--root", tmp_path / "d")
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert "7 of 19" in last
    assert [task for task in VTAB if task in last] == VTAB[12:]
    assert sorted(path.name for path in (tmp_path / "d/vtab-1k").iterdir() if path.is_dir()) == sorted(
        load_task(task).folder for task in VTAB[:12]
    )


def test_only_what_a_task_needs_is_extracted(tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    whole = content(source / "cifar")
    for name in ("cifar/setup.py", "cifar/images/test/extra.jpg", "cifar/.DS_Store", "__MACOSX/cifar/._test.txt"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(b"x")
    run(
        "data",
        "prepare",
        "vtab/cifar",
        "--source",
        "zip",
        "--from",
        str(pack(source, tmp_path / "x.zip")),
        "--root",
        str(tmp_path / "d"),
    )
    assert content(tmp_path / "d/vtab-1k/cifar") == whole


@pytest.mark.parametrize("lost", ["val200.txt", "images/test/000002.jpg"])
def test_a_lost_list_or_image_is_named_and_nothing_is_in_place(lost: str, tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    (source / "cifar" / lost).unlink()
    for kind, place in (("zip", pack(source, tmp_path / "x.zip")), ("folder", source)):
        line = assert_error(prepare("vtab/cifar", "--source", kind, "--from", place, "--root", tmp_path / kind), 1)
        assert lost in line
        assert not (tmp_path / kind / "vtab-1k/cifar").exists()


def test_a_task_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    shutil.copytree(source / "cifar", source / "old/cifar")
    path = pack(source, tmp_path / "x.zip")
    line = assert_error(prepare("vtab/cifar", "--source", "zip", "--from", path, "--root", tmp_path / "d"), 1)
    assert "'cifar/'" in line
    assert "'old/cifar/'" in line


def test_an_archive_of_another_task_is_not_taken_for_it(tmp_path: Path) -> None:
    """CIFAR's labels would all be valid ones of SUN397."""
    source = draw(tmp_path / "src", "vtab/cifar")
    path = pack(source / "cifar", tmp_path / "cifar.zip")
    for kind, place in (("zip", path), ("folder", source / "cifar")):
        assert prepare("vtab/sun397", "--source", kind, "--from", place, "--root", tmp_path / "d").status == 1
    assert prepare("vtab/cifar", "--source", "zip", "--from", path, "--root", tmp_path / "d").status == 0


def test_wrong_locations_are_usage_errors(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for kind, location in (
        ("zip", tmp_path),
        ("zip", tmp_path / "no"),
        ("folder", tmp_path / "file"),
        ("folder", None),
    ):
        where = ["--from", str(location)] if location else []
        assert_error(prepare("vtab/cifar", "--source", kind, *where, "--root", tmp_path / "d"), 2)
    for task, kind in (("hta/cifar10", "zip"), ("custom/images", "folder"), ("vtab/cifar", "native")):
        assert_error(prepare(task, "--source", kind, "--from", tmp_path, "--root", tmp_path / "d"), 2)
    assert not (tmp_path / "d").exists()


def test_probe_says_where_the_tasks_are_and_writes_nothing(tmp_path: Path) -> None:
    path = pack(draw(tmp_path / "src", "vtab/cifar"), tmp_path / "x.zip", "vtab-1k/")
    outcome = prepare("vtab/cifar", "vtab/dtd", "--source", "zip", "--from", path, "--root", tmp_path / "d", "--probe")
    assert outcome.status == 1
    assert "x.zip/vtab-1k/cifar" in outcome.out
    assert "vtab/dtd" in outcome.err
    assert not (tmp_path / "d/vtab-1k").exists()


# --- folder ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_copied_and_links_that_stay_inside_are_followed(tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    whole = content(source / "cifar")
    first, second = source / "cifar/images/test/000000.jpg", source / "cifar/images/train800/000000.jpg"
    first.rename(source / "cifar/kept.jpg")
    first.symlink_to("../../kept.jpg")
    run("data", "prepare", "vtab/cifar", "--source", "folder", "--from", str(source), "--root", str(tmp_path / "d"))
    assert content(tmp_path / "d/vtab-1k/cifar") == whole
    second.rename(tmp_path / "outside.jpg")
    second.symlink_to(tmp_path / "outside.jpg")
    line = assert_error(prepare("vtab/cifar", "--source", "folder", "--from", source, "--root", tmp_path / "e"), 1)
    assert "images/train800/000000.jpg" in line
    assert not (tmp_path / "e/vtab-1k/cifar").exists()


@pytest.mark.parametrize("kind", ["folder", "zip"])
def test_a_copy_of_other_pixels_keeps_its_variant(kind: str, tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    first = tmp_path / "d/vtab-1k/cifar"
    run("data", "prepare", "vtab/cifar", "--source", "folder", "--from", str(source), "--root", str(tmp_path / "d"))
    stated = json.loads((first / "manifest.json").read_text()) | {"variant": "hub", "source": "hub"}
    (first / "manifest.json").write_text(json.dumps(stated))
    place = first if kind == "folder" else pack(tmp_path / "d", tmp_path / "x.zip")
    run("data", "prepare", "vtab/cifar", "--source", kind, "--from", str(place), "--root", str(tmp_path / "e"))
    copied = read_manifest(tmp_path / "e/vtab-1k/cifar")
    assert copied is not None
    assert copied.variant == "hub"


def test_synthetic_images_stay_marked(tmp_path: Path) -> None:
    draw_task(load_task("vtab/cifar"), tmp_path / "src", counts=COUNTS, size=16)
    run(
        "data",
        "prepare",
        "vtab/cifar",
        "--source",
        "folder",
        "--from",
        str(tmp_path / "src"),
        "--root",
        str(tmp_path / "d"),
    )
    assert (tmp_path / "d/vtab-1k/cifar" / SYNTHETIC_MARK).exists()
    assert open_source(load_task("vtab/cifar"), tmp_path / "d").synthetic


# --- native ----------------------------------------------------------------------------------------------------------

FGVC = {"train": 210, "val": 20, "test": 30}


@pytest.mark.parametrize("task", list_tasks("fgvc"))
def test_native_archives_and_lists_make_the_folder(task: str, tmp_path: Path) -> None:
    card = load_task(task)
    folder = write_json_split(card, tmp_path / "src", FGVC)
    spec = suite_sources(load_suite("fgvc")).tasks[card.id].native
    assert spec is not None
    (name,) = spec.archives
    given = tmp_path / "given"
    given.mkdir()
    mode = "w:gz" if name.endswith("gz") else "w"
    with tarfile.open(given / name, mode) as archive:  # type: ignore[call-overload]
        top = card.folder + "/" if name.startswith((card.folder, card.id)) else ""
        (images,) = [path for path in folder.iterdir() if path.is_dir()]
        archive.add(images, top + images.name)
    lists = given / spec.lists
    lists.mkdir()
    for part in FGVC:
        shutil.copy(folder / f"{part}.json", lists)
    outcome = prepare(task, "--source", "native", "--from", given, "--root", tmp_path / "d")
    assert outcome.status == 0, outcome.err
    assert content(tmp_path / "d/FGVC" / card.folder) == content(folder)
    assert "not as released" in outcome.out  # synthetic lists
    built, meant = open_source(card, tmp_path / "d"), open_source(card, tmp_path / "src")
    assert (built.digest, built.variant) == (meant.digest, "card")


def test_lists_and_archive_come_from_addresses(tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card, suite = load_task("fgvc/cub"), load_suite("fgvc")
    folder = write_json_split(card, tmp_path / "src", FGVC)
    with tarfile.open(tmp_path / "www/CUB_200_2011.tgz", "w:gz") as archive:
        archive.add(folder / "images", "CUB_200_2011/images")
    (tmp_path / "www/cub").mkdir()
    for part in FGVC:
        shutil.copy(folder / f"{part}.json", tmp_path / "www/cub")
    known = suite_sources(suite)
    spec = known.tasks["cub"].native
    assert spec is not None
    from dataclasses import replace

    changed = replace(known, lists=server, tasks={"cub": KnownSources(native=replace(spec, digests={}))})
    for module in ("known", "file_sources", "native_source"):
        monkeypatch.setattr(f"svp_bench.prepare.{module}.suite_sources", lambda suite: changed)
    there = f"{server}/CUB_200_2011.tgz"
    run("data", "prepare", "fgvc/cub", "--source", "native", "--from", there, "--root", str(tmp_path / "d"))
    assert content(tmp_path / "d/FGVC/CUB_200_2011") == content(folder)
    shutil.rmtree(tmp_path / "d/FGVC")
    shutil.rmtree(tmp_path / "www")  # what was downloaded is there
    run(
        "data", "prepare", "fgvc/cub", "--source", "native", "--from", there, "--root", str(tmp_path / "d"), "--offline"
    )
    assert content(tmp_path / "d/FGVC/CUB_200_2011") == content(folder)


def test_official_lists_make_the_official_variant(tmp_path: Path) -> None:
    card = load_task("fgvc/stanford_dogs")
    folder = write_native(card, tmp_path / "src", FGVC)
    run(
        "data",
        "prepare",
        card.name,
        "--source",
        "folder",
        "--from",
        str(tmp_path / "src"),
        "--root",
        str(tmp_path / "d"),
    )
    assert content(tmp_path / "d/FGVC" / card.folder) == content(folder)
    manifest = read_manifest(tmp_path / "d/FGVC" / card.folder)
    assert manifest is not None
    assert manifest.variant == "official"


def test_data_that_are_given_by_hand_are_asked_for_by_name(tmp_path: Path) -> None:
    line = assert_error(prepare("fgvc/nabirds", "--source", "native", "--root", tmp_path, "--offline"), 2)
    assert "nabirds.tar.gz" in line
    assert load_task("fgvc/nabirds").source in line


def test_a_task_that_shares_its_folder_names_the_other(tmp_path: Path) -> None:
    line = assert_error(prepare("hta/cub200", "--source", "native", "--root", tmp_path, "--offline"), 2)
    assert "svp-bench data prepare fgvc/cub --source native" in line


# --- addresses -------------------------------------------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """Serve the folder `www` on loopback."""
    (tmp_path / "www").mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

    place = functools.partial(Handler, directory=str(tmp_path / "www"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), place) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()


def test_a_zip_comes_from_an_address_or_a_mirror(tmp_path: Path, server: str) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    pack(source, tmp_path / "www/vtab-1k.zip", "vtab-1k/")
    common = ("vtab/cifar", "--source", "zip", "--from", f"{server}/gone.zip", "--root", tmp_path / "d")
    assert f"{server}/gone.zip" in assert_error(prepare(*common), 1)
    outcome = prepare(*common, "--mirror", f"{server}/vtab-1k.zip")
    assert outcome.status == 0, outcome.err
    assert content(tmp_path / "d/vtab-1k/cifar") == content(source / "cifar")


# --- killed, in parallel, no space, no permission --------------------------------------------------------------------


def draw_many(folder: Path, count: int) -> Path:
    """Draw a task with so many links to one image that a build takes a while; return its archive."""
    source = draw(folder / "src", "vtab/cifar")
    image = (source / "cifar/images/test/000000.jpg").read_bytes()
    (source / "cifar/test.txt").write_text("".join(f"images/test/{number:06d}.jpg 0\n" for number in range(count)))
    with zipfile.ZipFile(pack(source, folder / "x.zip", skip=("000000.jpg",)), "a") as archive:
        for part in ("train800", "val200", "train800val200"):
            archive.write(source / f"cifar/images/{part}/000000.jpg", f"cifar/images/{part}/000000.jpg")
        for number in range(count):
            if number == 0 or number > 3:
                archive.writestr(f"cifar/images/test/{number:06d}.jpg", image)
    return folder / "x.zip"


def ended_or_written(process: subprocess.Popen[str], folder: Path, count: int) -> bool:
    return process.poll() is not None or len([*folder.glob("*.jpg")]) >= count


def test_a_killed_build_continues_with_the_same_command(tmp_path: Path) -> None:
    path, root = draw_many(tmp_path, 6000), tmp_path / "d"
    arguments = ("vtab/cifar", "--source", "zip", "--from", path, "--root", root)
    partial = root / "vtab-1k/.cifar.partial/cifar"
    times: dict[str, int] = {}
    for goal in (200, 2500):
        process = start(*arguments)
        wait_for(functools.partial(ended_or_written, process, partial / "images/test", goal))
        assert process.poll() is None, "it ended before it could be killed"
        process.kill()
        process.communicate()
        assert not (root / "vtab-1k/cifar").exists()
        now = {file.name: file.stat().st_mtime_ns for file in partial.glob("images/test/*.jpg")}
        assert times.items() <= now.items()  # nothing is written twice
        times = now
    (partial / "images/test/.000000.jpg.00000000.tmp").write_bytes(b"half")  # what a kill within a write leaves
    run("data", "prepare", *map(str, arguments))
    with zipfile.ZipFile(path) as archive:
        whole = {name.removeprefix("cifar/"): archive.read(name) for name in archive.namelist()}
    assert content(root / "vtab-1k/cifar") == whole
    assert not (root / "vtab-1k/.cifar.partial").exists()
    again = prepare(*arguments)
    assert again.status == 0
    assert "already" in again.err


def test_a_partial_folder_of_another_archive_is_not_continued(tmp_path: Path) -> None:
    root = tmp_path / "d"
    left = root / "vtab-1k/.cifar.partial/cifar/images/test/000000.jpg"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"of another archive")
    (root / "vtab-1k/.cifar.partial/plan.json").write_text("{}")
    source = draw(tmp_path / "src", "vtab/cifar")
    path = pack(source, tmp_path / "x.zip")
    run("data", "prepare", "vtab/cifar", "--source", "zip", "--from", str(path), "--root", str(root))
    assert content(root / "vtab-1k/cifar") == content(source / "cifar")


def test_two_builds_at_once_make_one_folder(tmp_path: Path) -> None:
    path, root = draw_many(tmp_path, 3000), tmp_path / "d"
    arguments = ("vtab/cifar", "--source", "zip", "--from", path, "--root", root)
    first = start(*arguments)
    wait_for(lambda: first.poll() is not None or (root / "vtab-1k/.cifar.partial/cifar/images/test").exists())
    first.send_signal(signal.SIGSTOP)
    assert "another process" in assert_error(prepare(*arguments), 1)
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate()
    assert first.returncode == 0, err
    assert len([*(root / "vtab-1k/cifar/images/test").iterdir()]) == 3000


def test_a_folder_that_exists_is_replaced_only_on_request(tmp_path: Path) -> None:
    root = tmp_path / "d"
    (root / "vtab-1k/cifar").mkdir(parents=True)
    (root / "vtab-1k/cifar/mine.txt").write_text("x")
    source = draw(tmp_path / "src", "vtab/cifar")
    arguments = ("vtab/cifar", "--source", "folder", "--from", source, "--root", root)
    assert "--replace" in assert_error(prepare(*arguments), 2)
    assert content(root / "vtab-1k/cifar") == {"mine.txt": b"x"}
    assert prepare(*arguments, "--replace").status == 0
    assert content(root / "vtab-1k/cifar") == content(source / "cifar")
    (source / "cifar/images/test/000000.jpg").write_bytes((source / "cifar/images/test/000001.jpg").read_bytes())
    assert "--replace" in assert_error(prepare(*arguments), 2)  # other data are not the same


def test_a_built_folder_that_was_damaged_is_not_taken_for_whole(tmp_path: Path) -> None:
    root, source = tmp_path / "d", draw(tmp_path / "src", "vtab/cifar")
    path = pack(source, tmp_path / "x.zip")
    arguments = ("vtab/cifar", "--source", "zip", "--from", path, "--root", root)
    assert prepare(*arguments).status == 0
    image = root / "vtab-1k/cifar/images/test/000000.jpg"
    image.write_bytes(image.read_bytes() + b"x")
    line = assert_error(prepare(*arguments), 2)
    assert "changed" in line
    assert "--replace" in line
    run("data", "verify", "vtab/cifar", "--root", str(root), "--accept")
    accepted = read_manifest(root / "vtab-1k/cifar")
    assert accepted is not None
    assert (accepted.source, accepted.origin["changed_from_source"]) == ("folder", "zip")
    assert prepare(*arguments).status == 2  # it is not the archive's data any more
    assert prepare(*arguments, "--replace").status == 0
    assert content(root / "vtab-1k/cifar") == content(source / "cifar")


def test_a_prepared_folder_goes_before_an_older_one_without_a_manifest(tmp_path: Path) -> None:
    old, new = draw(tmp_path / "d", "vtab/cifar"), draw(tmp_path / "src", "vtab/cifar")
    image = new / "cifar/images/test/000000.jpg"
    image.write_bytes((new / "cifar/images/test/000001.jpg").read_bytes())
    arguments = ("vtab/cifar", "--source", "folder", "--from", new, "--root", tmp_path / "d")
    assert prepare(*arguments).status == 0
    card = load_task("vtab/cifar")
    assert open_source(card, tmp_path / "d").folder == tmp_path / "d/vtab-1k/cifar"
    run("data", "verify", "vtab/cifar", "--root", str(old / "cifar"))  # now both have one
    outcome = prepare(*arguments, "--replace")
    assert outcome.status == 0
    assert f"read {tmp_path / 'd/cifar'}" in outcome.out


def test_a_damaged_download_is_deleted_and_the_next_address_tried(tmp_path: Path, server: str) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    good = pack(source, tmp_path / "www/good.zip", "vtab-1k/").read_bytes()
    (tmp_path / "www/vtab-1k.zip").write_bytes(good[: len(good) // 2])
    address = f"{server.replace('//', '//user:secret@')}/vtab-1k.zip?token=SECRET"
    arguments = ("vtab/cifar", "--source", "zip", "--from", address, "--root", tmp_path / "d")
    assert "deleted" in assert_error(prepare(*arguments), 1)
    outcome = prepare(*arguments, "--mirror", f"{server}/good.zip")
    assert outcome.status == 0, outcome.err
    assert "secret" not in (tmp_path / "d/vtab-1k/cifar/manifest.json").read_text().lower()
    assert content(tmp_path / "d/vtab-1k/cifar") == content(source / "cifar")


@pytest.mark.parametrize("line", ["images/test/000000.jpg 100", "../../../etc/passwd 0", "images/gone.jpg 0"])
def test_a_malformed_list_leaves_nothing_and_names_the_archive(line: str, tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    with (source / "cifar/test.txt").open("a") as file:
        file.write(f"{line}\n")
    path = pack(source, tmp_path / "x.zip")
    message = assert_error(prepare("vtab/cifar", "--source", "zip", "--from", path, "--root", tmp_path / "d"), 1)
    assert "x.zip" in message
    assert "partial" not in message
    assert [path.name for path in (tmp_path / "d").rglob("*") if path.is_file() and path.suffix != ".lock"] == []


def test_an_image_of_test_that_is_in_train_makes_the_data_different(tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    images = source / "cifar/images"
    (images / "test/000000.jpg").write_bytes((images / "train800/000001.jpg").read_bytes())
    outcome = prepare("vtab/cifar", "--source", "folder", "--from", source, "--root", tmp_path / "d")
    assert outcome.status == 0
    assert "1 of the 4 images of test have the same pixels as images of train800" in outcome.out
    assert ".partial" not in outcome.out
    (status,) = run("data", "status", "vtab/cifar", "--root", str(tmp_path / "d"), "--json").out.splitlines()
    assert json.loads(status)["status"] == "different"


def test_a_root_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    (tmp_path / "file").write_text("x")
    line = assert_error(prepare("vtab/cifar", "--source", "folder", "--from", source, "--root", tmp_path / "file"), 1)
    assert "cannot be written" in line
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        outcome = prepare("vtab/cifar", "--source", "folder", "--from", source, "--root", tmp_path / "closed")
        assert "cannot be written" in assert_error(outcome, 1)


def test_too_little_space_is_noticed_before_and_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = draw(tmp_path / "src", "vtab/cifar")
    big = source / "cifar/images/test/000003.jpg"
    big.write_bytes(big.read_bytes() + bytes(2**21))  # bytes behind the end of a JPEG are ignored
    arguments = ("vtab/cifar", "--source", "folder", "--from", source, "--root", tmp_path / "d")
    free = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: free)
        assert "free" in assert_error(prepare(*arguments), 1)
    code = (
        f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({2**20}, resource.RLIM_INFINITY)); "
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "import sys; from svp_bench.cli.main import main; sys.exit(main())"
    )
    full = subprocess.run(
        [sys.executable, "-c", code, "data", "prepare", *map(str, arguments)], capture_output=True, text=True
    )
    assert full.returncode == 1, full.stderr
    assert "cannot be written" in full.stderr.splitlines()[-1]
    assert not (tmp_path / "d/vtab-1k/cifar").exists()
    run("data", "prepare", *map(str, arguments))
    assert content(tmp_path / "d/vtab-1k/cifar") == content(source / "cifar")
