"""Collect the provenance of a number: versions, commit, changed files, processor, device."""

from __future__ import annotations

import contextlib
import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from svp_bench.core.resources import checkout_root
from svp_bench.records.code import git, package_digest, package_digest_at
from svp_bench.records.store import write_atomically

if TYPE_CHECKING:
    import torch

LIBRARIES = ("torch", "lightning", "timm", "torchmetrics", "numpy", "pillow", "jsonargparse")
_CODE, _READ = "svp_bench", ("tasks", "configs")  # changes elsewhere do not make a number dirty
_SOURCES = "method_source.json"
_SHOWN = 4  # changed files in a warning


def library_versions() -> dict[str, str]:
    """Return Python's version and those of the libraries that a number depends on."""
    import torch

    versions = {name: metadata.version(name) for name in LIBRARIES}
    with contextlib.suppress(metadata.PackageNotFoundError):
        versions["numba"] = metadata.version("numba")  # it compiles the CPU kernels
    return {"python": platform.python_version(), **versions, "torch": str(torch.__version__)}  # with its build: +cu126


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """Return the commit of the checkout and whether the package's code differs from it.

    Code counts as changed also where git is set not to look (`assume-unchanged`, `skip-worktree`).

    Returns:
        (None, None) for an installed package or without git; (commit, None) if git cannot compare.
    """
    root = checkout_root()
    head = git(root, "rev-parse", "HEAD", timeout=20) if root else None
    if root is None or head is None:
        return None, None
    commit = head.decode().strip()
    changed = _changed(root, _CODE)
    if changed is None:
        return commit, None
    return commit, bool(changed) or package_digest_at(commit) not in (None, package_digest())


def changed_cards(read: Iterable[Path]) -> list[str]:
    """Return the paths of the cards and configs in the checkout that a run reads and that differ from the commit."""
    root = checkout_root()
    if root is None:
        return []
    places = [path.resolve() for path in read]
    named = sorted({str(p.relative_to(root)) for p in places if any(p.is_relative_to(root / one) for one in _READ)})
    return (_changed(root, "--ignored", "--", *named) or []) if named else []


def dirty_warning(commit: str | None, cards: Sequence[str]) -> str:
    """Return the warning that an audit will fail the record of a run.

    Args:
        commit: Commit of the checkout.
        cards: The result of `changed_cards`.
    """
    root = checkout_root()
    files = [*((_changed(root, _CODE) if root else None) or []), *cards]
    listed = ", ".join(files[:_SHOWN]) + (f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else "")
    shown = listed or f"{_CODE}/, which git is set to ignore (`git ls-files -v {_CODE}`)"
    own = ", or keep cards of your own outside of the checkout (--tasks_dir DIR)" if cards else ""
    return (
        f"changes that commit {(commit or 'unknown')[:12]} does not have: {shown}. Records will say so, and `svp-bench "
        f"audit` fails them, because nobody can rebuild the run from the commit. Commit the changes first{own}."
    )


def _changed(root: Path, *places: str) -> list[str] | None:
    """Return the changed and new files below some places of a repository, sorted; None without git."""
    separator = () if "--" in places else ("--",)
    status = git(root, "status", "--porcelain", "-z", "--no-renames", "--untracked-files=all", *separator, *places)
    if status is None:
        return None
    return sorted({line[3:] for line in status.decode("utf-8", "surrogateescape").split("\0") if line})


@cache
def cpu_name() -> str:
    """Return the processor's model and the widest instruction set that PyTorch uses: "AMD EPYC 7763, AVX2"."""
    import torch

    name = ""
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
        name = found[1].strip() if found else ""
    name = " ".join((name or platform.processor() or platform.machine() or "unknown").split())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: torch.device) -> str:
    """Return the device's name, e.g. "NVIDIA H100 80GB HBM3", or "CPU (x86_64, 2 threads)"."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type == "cpu":
        return f"CPU ({platform.machine()}, {torch.get_num_threads()} threads)"
    return device.type


def save_sources(folder: Path, sources: Mapping[str, str]) -> None:
    """Write the digests of a custom method's files into a run's folder.

    Raises:
        RecordError: If the folder cannot be written.
    """
    if sources:
        write_atomically(folder / _SOURCES, json.dumps(dict(sources), indent=2) + "\n")


def read_sources(folder: Path) -> dict[str, str]:
    """Return the digests that `save_sources` wrote; empty for a shipped method."""
    try:
        sources = json.loads((folder / _SOURCES).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return sources if isinstance(sources, dict) else {}


def changed_sources(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Return the names of the files that differ: "helper.py, scale.py"; "" if none does."""
    return ", ".join(name for name in sorted({*old, *new}) if old.get(name) != new.get(name))
