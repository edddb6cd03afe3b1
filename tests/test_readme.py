"""The commands, paths and code blocks of README and docs work as they are printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import command

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def lines_of(language: str) -> list[str]:
    """All commands in blocks of a language, comments removed."""
    rows = [line.split("  #")[0].strip() for kind, text in BLOCKS if kind == language for line in text.splitlines()]
    return [row for row in rows if row and not row.startswith("#")]


COMMANDS = [line for line in lines_of("bash") if line.startswith("svp-bench")]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "ARCHITECTURE.md", *sorted((ROOT / "docs").glob("*.md"))]
WORDS_AT_MOST = 1600


def one_command(start: str) -> list[str]:
    (line,) = [line for line in COMMANDS if line.startswith(start)]
    return shlex.split(line)[1:]


def block_with(text: str) -> str:
    (block,) = [block for _, block in BLOCKS if text in block]
    return block


def test_it_is_short() -> None:
    assert len(TEXT.split()) <= WORDS_AT_MOST


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_subcommands_targets_and_paths_exist(page: Path) -> None:
    from svp_bench.cli.commands import RUN_COMMANDS, SUBCOMMANDS

    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"^svp-bench (\w+)|`svp-bench (\w+)", text, flags=re.MULTILINE):
        assert "".join(name) in {*RUN_COMMANDS, *SUBCOMMANDS}, name
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", text, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile, target
    for path in re.findall(r"\]\(([^)#:]+)[^):]*\)", text):
        assert (page.parent / path).exists(), path
    for path in re.findall(
        r"(?<![\w/])(?:configs|tasks|svp_bench|benchmarks|tests)/[\w/.-]+\.(?:yaml|bib|py|json|md)", text
    ):
        assert "NAME" in path or (ROOT / path).exists(), path


def test_no_placeholder_is_left() -> None:
    assert not re.findall(r"^[A-Z]+_[A-Z]+$", TEXT, flags=re.MULTILINE)


def test_the_listing_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for subcommand in ("tasks", "methods", "table"):
        assert f"`svp-bench {subcommand}`" in TEXT or f"svp-bench {subcommand} " in TEXT
        assert command(subcommand).status == 0


def test_without_data_or_weights_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub_offline: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = [
        line for line in COMMANDS if re.fullmatch(r"svp-bench fit --config \S+caltech101.yaml( --method linear)?", line)
    ]
    assert len(lines) == 2
    for line in lines:
        done = command(*shlex.split(line)[1:])
        assert done.status == 1
        assert len(done.err.strip().splitlines()) == 1
        assert "--data.root" in done.err


def test_synthetic_images_run_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*one_command("svp-bench data draw")).status == 0
    line = next(line for line in COMMANDS if "--data.root synthetic" in line)
    done = command(*shlex.split(line)[1:], "--trainer.enable_progress_bar", "false")
    assert done.status == 0, done.err
    assert list(tmp_path.glob("results/records/vtab/caltech101/svp-*.json"))
    assert "svp" in command("table").out


def test_the_dataframe_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "results/records").mkdir(parents=True)
    exec(block_with("svp_bench.load_results("), {})


def test_the_python_block() -> None:
    names: dict[str, object] = {}
    exec(block_with("svp_bench.create_model("), names)
    assert names["logits"].shape == (2, 10)  # type: ignore[attr-defined]
    assert names["trained"]


@pytest.mark.slow
def test_your_own_method(tmp_path: Path) -> None:
    """In a process of its own, as the console script: the class must be found beside its method file."""
    for name in ("mine.py", "mine.yaml"):
        (tmp_path / name).write_text(block_with(f"# {name}"), encoding="utf-8")
    script = Path(sys.executable).with_name("svp-bench")
    done = subprocess.run(
        [script, *one_command("svp-bench fit --config configs/demo/digits-5shot.yaml --method mine.yaml")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("results/records/demo/digits-5shot/shift-*.json"))
