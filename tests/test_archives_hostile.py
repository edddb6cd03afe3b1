"""Archives that are hostile, damaged or odd: refused by the name of the entry, and nothing is written."""

from __future__ import annotations

import gzip
import io
import os
import stat
import struct
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_error, command
from hypothesis import given, settings
from hypothesis import strategies as st

from svp_bench.core.errors import DataError
from svp_bench.data.synthetic import draw_task
from svp_bench.prepare import archives
from svp_bench.prepare.archives import Archive, open_archive, stem
from svp_bench.tasks.cards import load_task

COUNTS = {"train800": 4, "val200": 2, "test": 3}
Content = dict[str, bytes]


def write_zip(path: Path, entries: list[tuple[str, bytes]], **flags: Any) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries:
            archive.writestr(entry(name, **flags), content)
    return path


def entry(name: str, *, mode: int = 0, method: int = zipfile.ZIP_DEFLATED) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("x")
    info.filename = info.orig_filename = name  # past the constructor, which tidies up
    info.external_attr, info.compress_type = mode << 16, method
    return info


def write_tar(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], mode: str = "w", **options: Any) -> Path:
    with tarfile.open(path, mode, **options) as archive:  # type: ignore[call-overload]
        for member, content in members:
            member.size = member.size or len(content)
            archive.addfile(member, io.BytesIO(content) if content else None)
    return path


def tar_file(name: str, **changes: Any) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    for key, value in changes.items():
        setattr(member, key, value)
    return member


def content_of(archive: Archive) -> Content:
    return {name: b"".join(chunks) for name, chunks in archive.read(archive.sizes)}


def refused(path: Path) -> str:
    """Return the message of one line with which an archive is refused, on opening or on reading all of it."""
    with pytest.raises(DataError) as caught:
        content_of(open_archive(path))
    text = str(caught.value)
    assert "\n" not in text
    assert str(path) in text
    return text.replace(str(path), "")  # which has the name of the test


# --- names, in both kinds of archive ---------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[Path, list[str]], Path]] = {
    "zip": lambda folder, names: write_zip(folder / "a.zip", [(name, b"x") for name in names]),
    "tar": lambda folder, names: write_tar(folder / "a.tgz", [(tar_file(name), b"x") for name in names], "w:gz"),
}
BAD_NAMES = [
    "../evil.txt",
    "cifar/../../evil.txt",
    "/etc/evil",
    "//server/evil",
    "C:evil.txt",
    "c:/evil.txt",
    "cifar\\evil.txt",
    "..\\evil.txt",
    "cifar/a\nb.jpg",
    "cifar/a\x1b[31m.jpg",
    "x" * 1001,
    "a/" * 600 + "b",
    "..",
]


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("name", BAD_NAMES, ids=ascii)
def test_a_name_that_leaves_the_folder_is_refused(kind: str, name: str, tmp_path: Path) -> None:
    text = refused(WRITERS[kind](tmp_path, ["cifar/good.jpg", name]))
    assert "refused" in text
    assert name[:12].strip("/.").encode("unicode_escape").decode().replace("\\\\", "\\")[:5] in text


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize(
    "names",
    [
        ("a/b.jpg", "a/b.jpg"),
        ("a/b.jpg", "./a//b.jpg"),
        ("a/b.jpg", "A/B.JPG"),
        ("a/stra\u00dfe.jpg", "a/STRASSE.jpg"),
        (unicodedata.normalize("NFC", "a/\u00e9.jpg"), unicodedata.normalize("NFD", "a/\u00e9.jpg")),
        ("a/b", "a/b/c.jpg"),
        ("a/b/c.jpg", "A/B"),
    ],
)
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_names_of_one_file_are_refused(kind: str, names: tuple[str, str], tmp_path: Path) -> None:
    text = refused(WRITERS[kind](tmp_path, list(names)))
    assert "twice" in text or "a file and a folder" in text


@pytest.mark.parametrize("kind", WRITERS)
def test_plain_names_are_kept_and_litter_of_macos_is_skipped(kind: str, tmp_path: Path) -> None:
    good = ["a/b.jpg", "./c/d e.jpg", "a/..b/c..jpg", "\u00e9/\u4e2d.jpg", "a/c.."]
    litter = ["__MACOSX/a/._b.jpg", "a/.DS_Store", "a/._b.jpg"]
    archive = open_archive(WRITERS[kind](tmp_path, [*good, *litter]))
    assert [*archive.sizes] == [name.removeprefix("./") for name in good]
    assert archive.skipped == len(litter)
    assert {*content_of(archive).values()} == {b"x"}


def test_a_zip_with_names_that_are_not_utf8_is_refused(tmp_path: Path) -> None:
    plain = write_zip(tmp_path / "a.zip", [("cifar/aXb.jpg", b"x")]).read_bytes()
    (tmp_path / "a.zip").write_bytes(plain.replace(b"aXb", b"a\xffb"))
    assert "not UTF-8" in refused(tmp_path / "a.zip")
    flagged = bytearray(plain.replace(b"aXb", b"a\xffb"))
    flagged[7] |= 8  # the flag for UTF-8, in the local and in the central header
    flagged[flagged.index(b"PK\x01\x02") + 9] |= 8
    (tmp_path / "a.zip").write_bytes(flagged)
    assert "not UTF-8" in refused(tmp_path / "a.zip")


def test_a_zip_with_utf8_names_but_without_the_flag_is_read(tmp_path: Path) -> None:
    plain = write_zip(tmp_path / "a.zip", [("cifar/aXXb.jpg", b"x")]).read_bytes()
    (tmp_path / "a.zip").write_bytes(plain.replace(b"aXXb", "a\u00e9b".encode()))
    assert content_of(open_archive(tmp_path / "a.zip")) == {"cifar/a\u00e9b.jpg": b"x"}


def test_a_tar_with_names_that_are_not_utf8_is_refused(tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [(tar_file("a\udcffb"), b"x")], errors="surrogateescape", format=tarfile.GNU_FORMAT
    )
    assert "surrogate" in refused(path)


def test_a_nul_in_a_name_does_not_hide_the_rest(tmp_path: Path) -> None:
    assert "evil" in refused(write_zip(tmp_path / "a.zip", [("good.jpg\x00/../evil", b"x")]))


# --- kinds of entries ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO, stat.S_IFCHR, stat.S_IFSOCK])
def test_links_and_devices_in_a_zip_are_refused(mode: int, tmp_path: Path) -> None:
    assert "'cifar/evil'" in refused(write_zip(tmp_path / "a.zip", [("cifar/evil", b"/etc/passwd")], mode=mode))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes, tmp_path: Path) -> None:
    member = tar_file("cifar/evil", type=kind, linkname="/etc/passwd")
    assert "'cifar/evil'" in refused(write_tar(tmp_path / "a.tar", [(tar_file("a"), b"x"), (member, b"")]))


def test_an_encrypted_entry_is_refused(tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "a.zip", [("cifar/secret.jpg", b"x")]).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    (tmp_path / "a.zip").write_bytes(data)
    text = refused(tmp_path / "a.zip")
    assert "cifar/secret.jpg" in text
    assert "encrypted" in text


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_method_whose_memory_has_no_bound_is_refused(method: int, tmp_path: Path) -> None:
    assert f"method {method}" in refused(write_zip(tmp_path / "a.zip", [("a", b"x")], method=method))


# --- damage ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["zip", "tar", "tgz", "tar.bz2", "tar.xz"])
def test_an_archive_that_is_cut_anywhere_is_refused(ending: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"a.{ending}", {f"cifar/{number}.jpg": os.urandom(3000) for number in range(4)}
    if ending == "zip":
        write_zip(path, [*whole.items()])
    else:
        mode = {"tar": "w", "tgz": "w:gz"}.get(ending, f"w:{ending[4:]}")
        write_tar(path, [(tar_file(name), content) for name, content in whole.items()], mode)
    assert content_of(open_archive(path)) == whole
    data = path.read_bytes()
    end = len(data) if ending != "tar" else data.rindex(b"ustar") + 3584  # less than a block of zeros is left
    for size in range(0, end, 499):
        path.write_bytes(data[:size])
        refused(path)


@pytest.mark.parametrize("ending", ["zip", "tgz"])
def test_a_flipped_bit_is_refused(ending: str, tmp_path: Path) -> None:
    path, whole = tmp_path / f"a.{ending}", {"cifar/0.jpg": os.urandom(5000)}
    write_zip(path, [*whole.items()]) if ending == "zip" else write_tar(
        path, [(tar_file("a"), os.urandom(5000))], "w:gz"
    )
    data = bytearray(path.read_bytes())
    data[2500] ^= 1
    path.write_bytes(data)
    assert "damaged" in refused(path)


def test_a_damaged_header_is_not_the_end_of_a_tar(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "a.tar", [(tar_file("a"), b"x"), (tar_file("b"), b"y")])
    data = bytearray(path.read_bytes())
    data[1024 + 148] ^= 1  # its checksum
    path.write_bytes(data)
    assert "after 1 entry" in refused(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"<!DOCTYPE html><html>", b"Rar!\x1a\x07\x00", b"PK\x03\x04"])
def test_a_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(content)
    assert ("web page" in refused(tmp_path / "a.zip")) == (content[:1] == b"<")


def test_a_folder_fifo_or_missing_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "missing"):
        with pytest.raises(DataError, match="cannot be read"):
            open_archive(path)


# --- bombs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "_FREE_BYTES", 2**16)


@pytest.mark.usefixtures("small_limits")
def test_a_file_that_grows_too_much_is_refused(tmp_path: Path) -> None:
    bomb = b"\x00" * 2**22
    assert "cifar/bomb" in refused(write_zip(tmp_path / "a.zip", [("cifar/bomb", bomb)]))
    assert "bomb" in refused(write_tar(tmp_path / "a.tgz", [(tar_file("cifar/bomb"), bomb)], "w:gz"))


@pytest.mark.usefixtures("small_limits")
def test_entries_that_share_what_is_stored_are_refused(tmp_path: Path) -> None:
    """The central directory lists one stored file under many names."""
    data = write_zip(tmp_path / "a.zip", [("00.jpg", b"\x00" * 15_000)]).read_bytes()
    start = data.index(b"PK\x01\x02")
    central, end = data[start : data.index(b"PK\x05\x06")], bytearray(data[data.index(b"PK\x05\x06") :])
    struct.pack_into("<HHI", end, 8, 90, 90, len(central) * 90)
    (tmp_path / "a.zip").write_bytes(data[:start] + central * 90 + end)
    assert "twice" in refused(tmp_path / "a.zip")


def test_all_that_is_read_is_counted(tmp_path: Path) -> None:
    archive = open_archive(write_zip(tmp_path / "a.zip", [("a", b"x" * 800), ("b", b"y" * 800)]))
    archive._limit = 1000
    with pytest.raises(DataError, match=r"'b' .*bomb"):
        content_of(archive)


@pytest.mark.parametrize("change", [-1, 1, 2**20])
def test_a_wrong_size_in_a_zip_is_refused(change: int, tmp_path: Path) -> None:
    data = bytearray(write_zip(tmp_path / "a.zip", [("cifar/a.jpg", os.urandom(1000))]).read_bytes())
    struct.pack_into("<I", data, data.index(b"PK\x01\x02") + 24, 1000 + change)
    (tmp_path / "a.zip").write_bytes(data)
    assert "cifar/a.jpg" in refused(tmp_path / "a.zip")


@pytest.mark.parametrize("size", [2**40, -512, -(2**20), 2**62])
def test_a_wrong_size_in_a_tar_is_refused(size: int, tmp_path: Path) -> None:
    path = write_tar(
        tmp_path / "a.tar", [(tar_file("b"), b"y"), (tar_file("a", size=size), b"")], format=tarfile.GNU_FORMAT
    )
    assert ("states a size" in refused(path)) == (size < 0)


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_of_a_gigabyte_is_not_read(kind: bytes, tmp_path: Path) -> None:
    header = tar_file("long", type=kind, size=2**30).tobuf(tarfile.GNU_FORMAT)
    with gzip.open(tmp_path / "a.tgz", "wb") as file:
        file.write(header + bytes(2**16))
    assert "a header of 1073741824 bytes" in refused(tmp_path / "a.tgz")


def test_a_sparse_file_is_refused(tmp_path: Path) -> None:
    member = tar_file("cifar/huge", pax_headers={"GNU.sparse.size": "1099511627776", "GNU.sparse.numblocks": "0"})
    assert "sparse" in refused(write_tar(tmp_path / "a.tar", [(member, b"")], format=tarfile.PAX_FORMAT))


def test_more_entries_than_allowed_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(archives, "MAX_ENTRIES", 5)
    for kind in WRITERS:
        assert "more than 5 entries" in refused(WRITERS[kind](tmp_path, [f"{number}" for number in range(6)]))


def test_archives_in_archives_in_archives_are_refused(tmp_path: Path) -> None:
    content = write_zip(tmp_path / "1.zip", [("x", b"x")]).read_bytes()
    for number in (2, 3):
        content = write_zip(tmp_path / f"{number}.zip", [("in.zip", content)]).read_bytes()
    inner = open_archive(tmp_path / "3.zip").nested("in.zip", tmp_path)
    assert [*inner.sizes] == ["in.zip"]
    with pytest.raises(DataError, match="archive in an archive"):
        inner.nested("in.zip", tmp_path)


# --- random archives -------------------------------------------------------------------------------------------------

PARTS = st.sampled_from(
    ["a", "b", "B", "..", ".", "", "c.jpg", "__MACOSX", "._x", "\\", "C:", "\u00e9", "e\u0301", "x" * 300]
)
NAMES = st.one_of(st.lists(PARTS, min_size=1, max_size=4).map("/".join), st.text(max_size=12))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(max_examples=150)
@given(
    entries=st.lists(st.tuples(NAMES, st.binary(max_size=20)), max_size=6),
    kind=st.sampled_from(["zip", "tar"]),
    data=st.data(),
)
def test_random_entries_are_read_as_they_are_or_refused(
    entries: list[tuple[str, bytes]], kind: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("random")
    path = folder / "a"
    try:
        if kind == "zip":
            write_zip(path, entries)
        else:
            kinds = st.sampled_from([tarfile.REGTYPE] * 6 + [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE])
            write_tar(
                path, [(tar_file(name, type=data.draw(kinds), linkname="../x"), content) for name, content in entries]
            )
    except (ValueError, UnicodeError, struct.error):  # it cannot even be written
        return
    if data.draw(st.booleans(), "damaged"):
        raw = bytearray(path.read_bytes())
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(raw)
    try:
        found = content_of(open_archive(path))
    except DataError:
        return
    for name in found:
        inside = (folder / "target" / name).resolve()
        assert inside.is_relative_to((folder / "target").resolve())
        assert inside != (folder / "target").resolve()
        assert not {"..", "", "."} & {*name.split("/")}
    assert [*folder.iterdir()] == [path]


def test_stems() -> None:
    names = ("a/vtab-1k.zip", "x.tar.gz", "x.TGZ", "x.tar", "x.y.zip", "x")
    assert [stem(name) for name in names] == ["vtab-1k", "x", "x", "x", "x.y", "x"]


# --- through the command line ----------------------------------------------------------------------------------------


def draw_zip(folder: Path, *extra: tuple[str, bytes]) -> Path:
    task = draw_task(load_task("vtab/cifar"), folder / "src", counts=COUNTS, size=16)
    files = [
        (f"cifar/{path.relative_to(task).as_posix()}", path.read_bytes()) for path in task.rglob("*") if path.is_file()
    ]
    return write_zip(folder / "cifar.zip", [*files, *extra])


@pytest.mark.parametrize("name", ["../evil.txt", "/tmp/evil.txt", "cifar\\evil.txt"])
def test_prepare_refuses_a_hostile_archive_and_writes_nothing(name: str, tmp_path: Path) -> None:
    path = draw_zip(tmp_path, (name, b"x"))
    before = {*tmp_path.rglob("*")}
    outcome = command(
        "data", "prepare", "vtab/cifar", "--source", "zip", "--from", str(path), "--root", str(tmp_path / "d")
    )
    assert ascii(name).strip("'") in assert_error(outcome, 1)
    assert {*tmp_path.rglob("*")} == before


def test_prepare_leaves_nothing_of_an_archive_that_is_found_damaged_on_the_way(tmp_path: Path) -> None:
    path = draw_zip(tmp_path)
    with zipfile.ZipFile(path) as archive:
        place = archive.getinfo("cifar/images/test/000002.jpg").header_offset + 200
    data = bytearray(path.read_bytes())
    data[place] ^= 255
    path.write_bytes(data)
    outcome = command(
        "data", "prepare", "vtab/cifar", "--source", "zip", "--from", str(path), "--root", str(tmp_path / "d")
    )
    assert "cifar/images/test/000002.jpg" in outcome.err
    assert outcome.status == 1
    assert not [file for file in (tmp_path / "d").rglob("*") if file.is_file() and file.suffix != ".lock"]


def test_prepare_names_an_image_that_cannot_be_decoded(tmp_path: Path) -> None:
    path = draw_zip(tmp_path)
    entries = []
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            content = archive.read(name)
            entries.append((name, content[: len(content) // 2] if name.endswith("test/000001.jpg") else content))
    write_zip(path, entries)
    outcome = command(
        "data", "prepare", "vtab/cifar", "--source", "zip", "--from", str(path), "--root", str(tmp_path / "d")
    )
    assert outcome.status == 1
    assert "images/test/000001.jpg: not a readable image" in outcome.err
    assert ".partial" not in outcome.err
    assert [path.name for path in (tmp_path / "d/vtab-1k").iterdir() if path.is_dir()] == []
