"""The one place that knows where the cards, configs and published numbers are: a checkout or an installed wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from svp_bench.errors import SvpBenchError

__all__ = ["checkout_root", "configs_dir", "published_dir", "tasks_dir"]

_PACKAGE = Path(__file__).resolve().parent


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


def configs_dir() -> Path:
    """Return the folder of the shipped configs."""
    return _find("configs", "configs")


def published_dir() -> Path:
    """Return the folder of the numbers quoted from papers (CSV files, one citation in each row)."""
    return _find("published", "results/published")
