from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svp_bench.core.errors import DataError
from svp_bench.data.split_files import ImageList, combined_digest, read_list, split_digest


def read(tmp_path: Path, text: str | bytes, classes: int = 10) -> ImageList:
    path = tmp_path / "train800.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_list(path, classes, task="vtab/dtd")


def test_a_plain_list_is_read_in_file_order(tmp_path: Path) -> None:
    images = read(tmp_path, "images/train800/000000.jpg 3\nimages/train800/000001.jpg 0\n")
    assert images.paths == ("images/train800/000000.jpg", "images/train800/000001.jpg")
    assert images.labels.dtype == np.int64
    assert images.labels.tolist() == [3, 0]
    assert len(images) == 2


def test_byte_order_mark_line_ends_blank_lines_and_blanks_in_paths_are_fine(tmp_path: Path) -> None:
    text = "\ufeffa b.jpg 1\r\n\r\n   \n\tc  d e.jpg \t 2  \r\n7 8.jpg 9"
    assert read(tmp_path, text).paths == ("a b.jpg", "c  d e.jpg", "7 8.jpg")
    assert read(tmp_path, text).labels.tolist() == [1, 2, 9]


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg",
        "3",
        "a.jpg three",
        "a.jpg 3.0",
        "a.jpg +3",
        "a.jpg ٣",
        "a.jpg,3",
        "a\x00b.jpg 3",
        "a\rb.jpg 3",
        "a.jpg\u00a03",
    ],
)
def test_a_malformed_line_stops_with_file_and_line(tmp_path: Path, line: str) -> None:
    with pytest.raises(DataError, match=r"train800\.txt:3: found '.*', expected `path label`") as caught:
        read(tmp_path, f"ok.jpg 1\n\n{line}\n")
    assert "\n" not in str(caught.value)


def test_a_long_malformed_line_is_shown_shortened(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        read(tmp_path, "x" * 100_000)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("label", [10, -1, 10**17])
def test_a_label_out_of_range_names_card_and_range(tmp_path: Path, label: int) -> None:
    with pytest.raises(DataError, match=rf"train800\.txt:2: label {label} is out of range") as caught:
        read(tmp_path, f"a.jpg 9\nb.jpg {label}\n")
    assert str(caught.value).endswith("the card of vtab/dtd has 10 classes (0..9)")


def test_a_label_out_of_range_without_a_task_names_the_range(tmp_path: Path) -> None:
    (tmp_path / "l.txt").write_text("a.jpg 2\n")
    with pytest.raises(DataError, match=r"l\.txt:1: label 2 is out of range, allowed \(0\.\.1\)$"):
        read_list(tmp_path / "l.txt", 2)


@pytest.mark.parametrize("path", ["/etc/a.jpg", "C:\\a.jpg", "\\\\server\\share\\a.jpg", "\\a.jpg"])
def test_an_absolute_path_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"train800\.txt:1: .* is an absolute path; paths are relative"):
        read(tmp_path, f"{path} 1\n")


@pytest.mark.parametrize("path", ["../a.jpg", "images/../../a.jpg", "images\\..\\a.jpg"])
def test_a_path_that_leaves_the_folder_is_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"train800\.txt:1: .* leads out of the task's folder; '\.\.' is not allowed"):
        read(tmp_path, f"{path} 1\n")


def test_two_dots_inside_a_name_are_no_way_out(tmp_path: Path) -> None:
    assert read(tmp_path, "a..b.jpg 1\n").paths == ("a..b.jpg",)


def test_text_that_is_not_utf8_stops_with_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train800\.txt:2: not UTF-8 text"):
        read(tmp_path, b"a.jpg 1\n\xff.jpg 2\n")


@pytest.mark.parametrize("text", ["", "\n \r\n", "\ufeff"])
def test_an_empty_list_stops(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"train800\.txt: the list is empty; expected lines `path label`"):
        read(tmp_path, text)


def test_a_missing_list_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: cannot be read \(No such file or directory\)$"):
        read_list(tmp_path / "none.txt", 2)


_part = st.text(st.characters(categories=["L", "N", "Zs"], include_characters="._-() "), min_size=1, max_size=12)
_path = st.lists(_part, min_size=1, max_size=3).map(lambda parts: "x" + "/x".join(parts) + "x.jpg")
_blanks = st.text(" \t", min_size=1, max_size=3)


@settings(deadline=None)  # a busy machine is no failure
@given(
    st.lists(st.tuples(_path, _blanks, st.integers(0, 9), st.sampled_from(["\n", "\r\n", "\n\n", " \n"])), min_size=1)
)
def test_blanks_and_line_ends_change_no_path_label_or_digest(
    lines: list[tuple[str, str, int, str]],
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        messy = read(Path(folder), "".join(f"{path}{blanks}{label}{end}" for path, blanks, label, end in lines))
        clean = read(Path(folder), "".join(f"{path} {label}\n" for path, _, label, _ in lines))
    assert messy.paths == tuple(path for path, *_ in lines)
    assert messy.labels.tolist() == [label for _, _, label, _ in lines]
    assert split_digest("train800", messy) == split_digest("train800", clean)


def test_the_digest_sees_name_paths_labels_and_order(tmp_path: Path) -> None:
    first = read(tmp_path, "a 1\nb 2\n")
    digests = {
        split_digest("train800", first),
        split_digest("val200", first),
        split_digest("train800", read(tmp_path, "b 2\na 1\n")),
        split_digest("train800", read(tmp_path, "a 1\nb 3\n")),
        split_digest("train800", read(tmp_path, "a 1\nc 2\n")),
    }
    assert len(digests) == 5


def test_the_digest_is_the_documented_one(tmp_path: Path) -> None:
    # printf 'train800\na 1\nb 2\n' | sha256sum
    images = read(tmp_path, "a  1\r\n\r\nb\t2")
    expected = "sha256:7228e2552c139e598a4866978f208ea636c791163482979aafd476bd700cdf67"
    assert split_digest("train800", images) == expected


def test_the_combined_digest_does_not_depend_on_the_order_of_the_mapping() -> None:
    assert combined_digest({"a": "1", "b": "2"}) == combined_digest({"b": "2", "a": "1"})
    assert combined_digest({"a": "1", "b": "2"}) != combined_digest({"a": "2", "b": "1"})
