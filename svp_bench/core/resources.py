"""Find the folders of cards, configs and published numbers, in a checkout or an installed wheel."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from svp_bench.core.errors import SvpBenchError, UsageError

CUSTOM_TASKS = "SVP_BENCH_TASKS"
"""The environment variable that names folders of further cards; `--tasks_dir DIR` sets it for one command."""

_PACKAGE = Path(__file__).resolve().parents[1]


@cache
def checkout_root() -> Path | None:
    """Return the root of the source checkout that this package is imported from, or None for an installed wheel."""
    root = _PACKAGE.parent
    return root if (root / "pyproject.toml").is_file() and (root / "tasks").is_dir() else None


def _find(name: str, in_checkout: str) -> Path:
    root = checkout_root()
    path = root / in_checkout if root else _PACKAGE / "_share" / name
    if not path.is_dir():
        raise SvpBenchError(f"this installation lacks its folder {path}; reinstall it with `pip install svp-bench`")
    return path


def tasks_dir() -> Path:
    """Return the folder of the task, suite and protocol cards."""
    return _find("tasks", "tasks")


def tasks_dirs() -> tuple[Path, ...]:
    """Return all folders of cards, the shipped one first; UsageError if a custom one is not a folder."""
    shipped = tasks_dir()
    given = [Path(name).expanduser() for name in os.environ.get(CUSTOM_TASKS, "").split(os.pathsep) if name]
    for folder in given:
        if not folder.is_dir():
            raise UsageError(
                f"{folder} is not a folder; --tasks_dir (or ${CUSTOM_TASKS}) names one that holds suite cards "
                "(<suite>.yaml) and their tasks (<suite>/<task>.yaml)"
            )
    custom = {folder.resolve(): None for folder in given}
    return (shipped, *(folder for folder in custom if folder != shipped.resolve()))


def custom_tasks_flags() -> list[str]:
    """Return the flags that pass the custom cards to another command."""
    folders = [name for name in os.environ.get(CUSTOM_TASKS, "").split(os.pathsep) if name]
    return [part for name in folders for part in ("--tasks_dir", str(Path(name).expanduser().resolve()))]


def configs_dir() -> Path:
    """Return the folder of the shipped configs."""
    return _find("configs", "configs")


def published_dir() -> Path:
    """Return the folder of published numbers (CSV files with a citation per row)."""
    return _find("published", "results/published")


def cache_dir(name: str) -> Path:
    """Return a folder below $SVP_BENCH_CACHE, else below the user's cache folder; RuntimeError without a home."""
    if given := os.environ.get("SVP_BENCH_CACHE"):
        return Path(given) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "svp-bench" / name
