"""What is printed: names from files never control a terminal, and any encoding can show the output."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import command
from hypothesis import given
from hypothesis import strategies as st

from svp_bench.core.errors import printable
from svp_bench.core.terminal import ascii_for, plain_console


@given(st.text())
def test_a_printable_name_is_one_line_without_control_characters(text: str) -> None:
    shown = printable(text)
    assert len(shown.splitlines()) <= 1
    assert not any(ord(char) < 32 or 127 <= ord(char) < 160 or 0xD800 <= ord(char) < 0xE000 for char in shown)
    assert printable(shown) == shown


def test_ordinary_names_stay() -> None:
    assert printable("Übung 1/狗 [/x] :smile: 🐍.jpg") == "Übung 1/狗 [/x] :smile: 🐍.jpg"
    assert printable("a\x1b[2Jb\r\n\u202e") == "a\\x1b[2Jb\\r\\n\\u202e"


def test_an_error_about_a_hostile_name_stays_one_plain_line(tmp_path: Path) -> None:
    outcome = command("table", "--results_root", str(tmp_path / "a\x1b[31m"), "--suite", "x\x1b]0;title\x07")
    assert outcome.status == 2
    assert "\x1b" not in outcome.err
    assert "\x07" not in outcome.err
    assert outcome.err.count("\n") == 1


def test_the_console_takes_markup_as_text(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.table import Table

    out = io.StringIO()
    console = plain_console()
    console.file = out
    table = Table()
    table.add_column("[bold]head")
    table.add_row("[/x] :smile:")
    console.print("runs/[/x]/[red]y[/red]", table)
    assert "runs/[/x]/[red]y[/red]" in out.getvalue()
    assert "[/x] :smile:" in out.getvalue()
    assert "[bold]head" in out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1", "koi8-r", "shift_jis", "utf-8"])
def test_every_encoding_shows_the_output(encoding: str) -> None:
    code = "from svp_bench.core.terminal import readable_output as r; r(); print('… ± 狗 ┏━┓ é')"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": encoding}, capture_output=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    text = done.stdout.decode(encoding)
    assert "?" not in text
    if encoding == "ascii":
        assert text.split() == ["...", "+/-", r"\u72d7", "+-+", r"\xe9"]


def test_commands_run_in_a_c_locale() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for argv in (["--help"], ["tasks"], ["methods"], ["tasks", "nosuch…task"]):
        done = subprocess.run(
            [sys.executable, "-m", "svp_bench", *argv], env=env, capture_output=True, text=True, timeout=120
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert (done.stdout + done.stderr).isascii()
        assert done.returncode == (2 if "nosuch…task" in argv else 0)


def test_typographic_signs_have_their_usual_replacement() -> None:
    assert ascii_for("a … – × ± ≥ →") == "a ... - x +/- >= ->"
