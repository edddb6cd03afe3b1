from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from svp_bench.core.errors import DataError
from svp_bench.data.locate import locate
from svp_bench.tasks.cards import load_suite, load_task

CARD = load_task("vtab/caltech101")
SUITE = load_suite("vtab")


@pytest.fixture(autouse=True)
def no_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SVP_BENCH_DATA", raising=False)
    monkeypatch.chdir(tmp_path)


def make(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or tuple(CARD.counts):
        (folder / f"{name}.txt").write_text("a.jpg 0\n")
    return folder


@pytest.mark.parametrize("below", ["caltech101", "vtab-1k/caltech101", "vtab-1k/vtab-1k/caltech101"])
def test_each_place_below_the_root_is_found(tmp_path: Path, below: str) -> None:
    folder = make(tmp_path / "root" / below)
    assert locate(CARD, SUITE, tmp_path / "root") == folder


def test_the_task_folder_itself_may_be_given(tmp_path: Path) -> None:
    folder = make(tmp_path / "caltech101")
    assert locate(CARD, SUITE, folder) == folder


def test_a_folder_of_another_name_is_no_task_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no data of vtab/caltech101"):
        locate(CARD, SUITE, make(tmp_path / "dtd"))


def test_the_nearest_place_wins_but_a_whole_one_goes_before_a_part(tmp_path: Path) -> None:
    near = make(tmp_path / "caltech101", "test")
    assert locate(CARD, SUITE, tmp_path) == near
    far = make(tmp_path / "vtab-1k" / "caltech101")
    assert locate(CARD, SUITE, tmp_path) == far
    make(near)
    assert locate(CARD, SUITE, tmp_path) == near


def test_the_root_comes_from_the_argument_then_the_variable_then_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_data = make(tmp_path / "data" / "caltech101")
    assert locate(CARD, SUITE) == in_data
    monkeypatch.setenv("SVP_BENCH_DATA", "")
    assert locate(CARD, SUITE) == in_data
    in_variable = make(tmp_path / "variable" / "caltech101")
    monkeypatch.setenv("SVP_BENCH_DATA", str(tmp_path / "variable"))
    assert locate(CARD, SUITE) == in_variable
    given = make(tmp_path / "given" / "caltech101")
    assert locate(CARD, SUITE, Path("given")) == given


def test_the_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = make(tmp_path / "images" / "caltech101")
    assert locate(CARD, SUITE, Path("~/images")) == folder


def test_nothing_found_names_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "root" / "caltech101").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        locate(CARD, SUITE, tmp_path / "root")
    text = str(caught.value)
    root = tmp_path / "root"
    assert text.startswith("no data of vtab/caltech101: none of ")
    for tried in (root / "caltech101", root / "vtab-1k" / "caltech101", root / "vtab-1k" / "vtab-1k" / "caltech101"):
        assert f"{tried}," in text or f"{tried} holds" in text
    assert "holds train800.txt, val200.txt, train800val200.txt or test.txt" in text
    assert f"(--data.root is {root})" in text
    assert "get vtab-1k.zip from https://" in text
    assert "--data.root DIR or $SVP_BENCH_DATA" in text
    assert text.endswith("`svp-bench data draw`")
    assert "\n" not in text


def test_the_message_states_where_the_root_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"\(the default data root is data\)"):
        locate(CARD, SUITE)
    monkeypatch.setenv("SVP_BENCH_DATA", "elsewhere")
    with pytest.raises(DataError, match=r"\(\$SVP_BENCH_DATA is elsewhere\)"):
        locate(CARD, SUITE)


def test_the_archive_is_the_suite_cards() -> None:
    with pytest.raises(DataError, match=r"; get all\.tar from https://example\.org and give its folder"):
        locate(CARD, replace(SUITE, archive="all.tar from https://example.org"), Path("none"))


def test_another_suite_is_sent_to_the_page_of_its_task(tmp_path: Path) -> None:
    digits = load_task("demo/digits")
    with pytest.raises(DataError, match=r"get the images of https://archive\.ics\.uci\.edu"):
        locate(digits, load_suite("demo"), tmp_path)
