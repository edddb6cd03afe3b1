"""Files that wait, never end or blow up: each is refused in one line, at once."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import assert_error, command, settle, small

from svp_bench.core.atomic import open_regular, read_regular
from svp_bench.core.errors import ConfigError
from svp_bench.core.yaml import check_value, read_yaml
from svp_bench.records.store import read_records

pytestmark = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    began = time.monotonic()
    yield settle(tmp_path, monkeypatch)
    assert time.monotonic() - began < 60


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_folder(path: Path) -> None:
    path.mkdir()


def make_loop(path: Path) -> None:
    path.symlink_to(path.name)


KINDS = [make_fifo, make_socket, make_endless, make_folder, make_loop]
Make = Callable[[Path], None]


@pytest.mark.parametrize("make", KINDS)
def test_only_ordinary_files_are_opened(make: Make, tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(OSError, match=r"FIFO|socket|device|folder|symbolic links"):
        open_regular(tmp_path / "x")
    (tmp_path / "y").write_bytes(b"12345")
    assert read_regular(tmp_path / "y", 5) == b"12345"
    with pytest.raises(OSError, match="MiB"):
        read_regular(tmp_path / "y", 4)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("file", ["images/train800val200/000003.jpg", "images/test/000003.jpg", "test.txt"])
def test_a_run_refuses_other_kinds_of_files(make: Make, file: str, place: Path) -> None:
    path = place / "data/cifar" / file
    path.unlink()
    make(path)
    outcome = command(*small())
    assert outcome.status == 1
    assert Path(file).name in outcome.err
    assert outcome.err.count("\n") == 1
    assert not (place / "runs").exists()


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("flag", ["--config", "--method", "--selected_config", "--model.checkpoint"])
def test_a_flag_refuses_other_kinds_of_files(make: Make, flag: str, place: Path) -> None:
    make(place / "odd.yaml")
    outcome = command(*small(flag, "odd.yaml", **{"model__checkpoint": None} if flag == "--model.checkpoint" else {}))
    assert outcome.status in (1, 2)
    assert "odd.yaml" in outcome.err
    assert outcome.err.count("\n") == 1


@pytest.mark.parametrize("make", KINDS)
def test_other_kinds_of_files_among_records_are_listed(make: Make, place: Path) -> None:
    folder = place / "results/records/vtab/cifar"
    folder.mkdir(parents=True)
    make(folder / "x.json")
    assert command("table").status == 0
    assert command("audit", "results").status in (1, 2)
    _, problems = read_records("results")
    assert [problem.path for problem in problems] == ([] if make is make_folder else ["records/vtab/cifar/x.json"])


BOMB = "a: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
CHAIN = "a: &a0 x\n" + "".join(f"b{n}: &a{n} [*a{n - 1}]\n" for n in range(1, 3000))
WIDE = "a: &a [" + ", ".join("x" * 5000) + "]\nb: [" + ", ".join(["*a"] * 5000) + "]\n"
DEEP = "a: " + "[" * 50_000


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (BOMB, "alias counted with all that it stands for"),
        (CHAIN, "nested deeper than 16 levels"),
        (WIDE, "alias counted with all that it stands for"),
        (DEEP, "nested deeper than 16 levels"),
        ("a: '" + "x" * 5_000_000 + "'", "more than 4 MiB"),
    ],
    ids=["bomb", "chain", "wide", "deep", "large"],
)
def test_yaml_that_blows_up_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    began = time.monotonic()
    with pytest.raises(ConfigError, match=words) as caught:
        read_yaml(path, error=ConfigError)
    assert time.monotonic() - began < 5
    assert str(caught.value).startswith(f"{path}:")
    for flag in ("--config", "--method"):
        assert (
            command(
                "fit", *(() if flag == "--config" else ("--config", "configs/vtab/cifar.yaml")), flag, str(path)
            ).status
            == 2
        )


def test_a_few_aliases_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: &a [1, 2]\nb: *a\nc: {d: *a}\n")
    assert read_yaml(path).value == {"a": [1, 2], "b": [1, 2], "c": {"d": [1, 2]}}


def test_values_of_the_command_line_cannot_blow_up(place: Path) -> None:
    bomb = "[&a [x, x], &b [*a, *a], &c [*b, *b]]"
    outcome = command(*small("--data.crop_scale", bomb))
    assert outcome.status == 2
    assert "--data.crop_scale: the alias *a is not allowed" in outcome.err
    outcome = command(*small("--data.crop_scale", "[" * 5000))
    assert outcome.status == 2
    assert "--data.crop_scale: nested deeper than 16 levels" in outcome.err
    check_value("*.jpg", "x")  # an alias of nothing is a text
    check_value("[unfinished", "x")


def test_json_of_a_split_that_is_nested_deeply_is_one_line(tmp_path: Path) -> None:
    folder = tmp_path / "CUB_200_2011"
    folder.mkdir()
    for name in ("train", "val", "test"):
        (folder / f"{name}.json").write_text(json.dumps({"a.jpg": 1}))
    (folder / "train.json").write_text("[" * 200_000)
    outcome = command("data", "verify", "fgvc/cub", "--root", str(tmp_path))
    assert "train.json: not JSON" in assert_error(outcome, 1)


@pytest.mark.parametrize("size", ["1000000000", "9223372036854775807", "999999999999999999999999"])
def test_a_huge_batch_is_one_batch(size: str, place: Path) -> None:
    assert command(*small("--method", "linear", data__batch_size=size)).status == 0
    outcome = command(*small("--trainer.accumulate_grad_batches", "3", data__batch_size=str(int(size) + 1)))
    assert outcome.status in (0, 2)
    assert "Traceback" not in outcome.err


def test_an_absurd_number_of_workers_is_refused(place: Path) -> None:
    outcome = command(*small("--data.num_workers", "1000000000"))
    assert outcome.status == 2
    assert "allowed: 0 to 1024" in outcome.err
