"""Task cards outside of the checkout: every command reads them, and a record names what they say."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SMALL, arguments, assert_error, command, run, settle
from PIL import Image

from svp_bench.core.resources import CUSTOM_TASKS, tasks_dir
from svp_bench.records.digests import card_digest
from svp_bench.tasks.cards import list_tasks, load_task

SUITE = """\
name: mine
version: 1
title: Mine
table: mine
folder: mine
protocol: custom-final
reader: {kind: class_folders}
groups:
  all: [flowers]
citation: me2026
"""
CARD = """\
name: mine/flowers
version: 1
group: all
title: Flowers
classes: found
counts: found
folder: flowers
source: your own
licence: your own
citation: me2026
digest: null
"""


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a suite of one task, and its images in `images`."""
    settle(tmp_path, monkeypatch)
    folder = tmp_path / "my cards"
    (folder / "mine").mkdir(parents=True)
    (folder / "mine.yaml").write_text(SUITE, encoding="utf-8")
    (folder / "mine" / "flowers.yaml").write_text(CARD, encoding="utf-8")
    rng = np.random.default_rng(0)
    for name in ("rose", "tulip"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(10):
            pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{number}.png")
    return folder


def fit(*extra: str) -> list[str]:
    return ["fit", *arguments({**SMALL, "data.root": "images"}), "--method", "linear", *extra]


def test_every_command_reads_them(cards: Path) -> None:
    flag = ["--tasks_dir", str(cards)]
    assert "--tasks_dir DIR" in assert_error(command("tasks", "zzz/qqq"), 2)
    text = assert_error(command(*fit("--data.task", "mine/flowers")), 2)
    assert "unknown task 'mine/flowers'" in text
    assert "--tasks_dir DIR" in run("audit", "--help").out
    assert "--tasks_dir DIR" in run("--help").out
    first = run(*fit("--data.task", "mine/flowers", *flag)).record
    assert first["task"] == "mine/flowers"
    assert set(first["card_digests"]) == {"task", "protocol"}
    assert CUSTOM_TASKS not in os.environ
    assert "mine/flowers" in run("tasks", *flag).out
    assert run("tasks", "mine/flowers", *flag).out == CARD
    assert "mine/flowers: verified" in run("data", "verify", "mine", "--root", "images", *flag).out
    assert "linear" in run("table", *flag).out
    assert Path("results/tables/mine.md").is_file()
    run("report", *flag)
    (path,) = Path("results/records/mine").rglob("*.json")
    assert "there is no task card mine/flowers here" in command("audit", str(path)).out
    assert "there is no task card" not in command("audit", str(path), f"--tasks_dir={cards}").out
    assert command("rerun", str(path), *flag).status == 0


@pytest.mark.slow
def test_a_sweep_and_its_workers_read_them(cards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--model.backbone", "vim_nano_patch8_64", "--data.image_size", "32", "--trainer.max_epochs", "1"]
    flags = [*small, "--model.checkpoint", "none", "--model.scan_backend", "reference", "--data.root", "images"]
    sweep = ["sweep", "--suite", "mine", "--methods", "linear", "--no_report", "--trainer.accelerator", "cpu", *flags]
    monkeypatch.setenv(CUSTOM_TASKS, str(cards))
    done = run(*sweep)
    assert "1 run complete (1 new)" in done.out
    assert os.environ[CUSTOM_TASKS] == str(cards)
    monkeypatch.delenv(CUSTOM_TASKS)
    again = run(*sweep, "--tasks_dir", str(cards))
    assert "1 run complete (0 new)" in again.out


def test_the_next_command_finds_the_record_and_its_card(cards: Path) -> None:
    text = run(*fit("--data.task", str(cards / "mine" / "flowers.yaml"), "--results_root", "other place")).out
    (following,) = re.findall(r"^Next: svp-bench (.+)$", text, re.M)
    assert shlex.split(following) == ["table", "--results_root", "other place", "--tasks_dir", str(cards)]
    assert "linear" in run(*shlex.split(following)).out
    assert "there is no suite 'mine' here; --tasks_dir DIR" in run("table", "--results_root", "other place").out


def test_a_cards_path_names_its_task(cards: Path) -> None:
    made = run(*fit("--data.task", str(cards / "mine" / "flowers.yaml"))).record
    assert made["task"] == made["config"]["data"]["task"] == "mine/flowers"
    assert str(cards) not in str(made["card_digests"])
    assert run("tasks", "my cards/mine/flowers.yaml").out == CARD
    (cards / "mine.yaml").unlink()
    text = assert_error(command(*fit("--data.task", "my cards/mine/flowers.yaml")), 2)
    assert "mine.yaml is missing" in text
    assert "no task card 'nowhere/x.yaml'" in assert_error(command(*fit("--data.task", "nowhere/x.yaml")), 2)


def test_a_card_outside_of_the_checkout_leaves_a_run_clean(cards: Path) -> None:
    from svp_bench.config.compose import compose, split_flags
    from svp_bench.train.parser import resolve
    from svp_bench.train.provenance import changed_cards

    os.environ[CUSTOM_TASKS] = str(cards)
    try:
        resolved = resolve(compose(split_flags(fit("--data.task", "mine/flowers")[1:])))
        assert load_task("mine/flowers").path in resolved.read
        assert changed_cards(resolved.read) == []
        assert resolved.card_digests["task"] == card_digest(load_task("mine/flowers"))
    finally:
        del os.environ[CUSTOM_TASKS]


def test_a_card_that_was_changed_without_a_new_version_fails_the_audit(cards: Path) -> None:
    flag = ["--tasks_dir", str(cards)]
    path = run(*fit("--data.task", "mine/flowers", *flag)).record_path
    card = cards / "mine" / "flowers.yaml"
    card.write_text(CARD + "notes: nothing that moves a number\n", encoding="utf-8")
    assert "changed without a new version" not in command("audit", str(path), *flag).out
    card.write_text(
        CARD.replace("classes: found\ncounts: found", "classes: 3\ncounts: {train: 1, val: 1, test: 1, trainval: 2}")
    )
    shutil.copytree(cards, "other cards")  # another folder: cards are read once for each
    out = command("audit", str(path), "--tasks_dir", "other cards").out
    assert "the task card mine/flowers version 1 of the run" in out
    assert "changed without a new version" in out


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda folder: shutil.rmtree(folder), "is not a folder; --tasks_dir"),
        (lambda folder: (folder / "mine.yaml").unlink(), "this card belongs to no suite"),
        (lambda folder: (folder / "vtab.yaml").write_text(SUITE), "there is another suite of this name"),
        (lambda folder: (folder / "mine.yaml").write_text(SUITE.replace("custom-final", "custom")), "custom-final"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(cards: Path, change: object, expected: str) -> None:
    assert callable(change)
    change(cards)
    tasks = ["tasks", "--tasks_dir", str(cards)]
    assert expected in assert_error(command(*tasks), command(*tasks).status)


def test_a_copy_of_the_shipped_cards_is_no_conflict(cards: Path) -> None:
    before = list_tasks()
    shutil.copytree(tasks_dir(), cards, dirs_exist_ok=True)
    os.environ[CUSTOM_TASKS] = str(cards)
    try:
        assert list_tasks() == [*before, "mine/flowers"]
    finally:
        del os.environ[CUSTOM_TASKS]


def test_the_flag_needs_its_value() -> None:
    assert "--tasks_dir needs a value" in assert_error(command("tasks", "--tasks_dir"), 2)
    assert "--tasks_dir needs a value" in assert_error(command("tasks", "--tasks_dir", "--help"), 2)


def test_other_processes_of_the_command_line_see_them(cards: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "svp_bench", "tasks", "mine", f"--tasks_dir={cards.name}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "mine/flowers" in done.stdout


@pytest.mark.parametrize("subcommand", ["fit", "sweep"])
def test_uncommitted_cards_are_reported_before_anything_is_trained(
    cards: Path, monkeypatch: pytest.MonkeyPatch, subcommand: str
) -> None:
    from svp_bench.sweep import plan as sweeping
    from svp_bench.train import base as cli
    from svp_bench.train import provenance

    monkeypatch.setattr(provenance, "commit_and_dirty", lambda: ("c" * 40, False))
    monkeypatch.setattr(cli, "commit_and_dirty", lambda: ("c" * 40, False))
    for module in (provenance, cli):
        monkeypatch.setattr(module, "changed_cards", lambda read: ["tasks/mine/flowers.yaml"])
    monkeypatch.setattr(provenance, "_changed", lambda *_: [])
    flag = ["--tasks_dir", str(cards)]
    if subcommand == "fit":
        made = run(*fit("--data.task", "mine/flowers", *flag))
        assert made.record["dirty"] is True
        out = made.out.partition("top-1")[0]
    else:
        monkeypatch.setattr(sweeping, "_pool", None)
        flags = ["--methods", "linear", "--dry_run", "--data.root", "images", "--model.checkpoint", "none"]
        out = run("sweep", "--suite", "mine", *flags, *flag).out
    warning = re.search(r"^ *Warning: (.+)$", out, re.MULTILINE)
    assert warning is not None, out
    for part in ("tasks/mine/flowers.yaml", "cccccccccccc", "svp-bench audit", "Commit", "--tasks_dir DIR"):
        assert part in warning[1]
