"""The verdict on the data of a task, cached for `data status`."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.resources import cache_dir
from svp_bench.data.locate import data_root

_MAX_BYTES = 2**28


@dataclass(frozen=True)
class Verdict:
    """What verifying the data of a task found; the fields of the cached verdict that `data status` shows.

    Attributes:
        task: Full name of the task.
        status: "verified": all images are readable and the files are those of the manifest; "different": so too, but
            counts, digest or splits are not those of the card (see `notes`); "changed": files are not those of the
            manifest, which was left as it is.
        notes: Differences, one line each.
        counts: Split → number of images.
        variant: Name of the data variant.
        folder: The data folder; None for data that the package holds or computes.
        manifest_digest: Digest of all files; None where no manifest could be written.
        time: When, in ISO 8601, UTC.
    """

    task: str
    status: Literal["verified", "different", "changed"]
    notes: tuple[str, ...]
    counts: Mapping[str, int]
    variant: str
    folder: str | None
    manifest_digest: str | None
    time: str


def now() -> str:
    """Return the time in ISO 8601, UTC."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _verdict_file(task: str, root: Path | None) -> Path:
    key = hashlib.sha256(os.fsencode(f"{data_root(root)[0]}\n{task}")).hexdigest()[:24]
    return cache_dir("verified") / f"{key}.json"


def save_verdict(verdict: Verdict, root: Path | None) -> None:
    """Cache a verdict with the state of the folder; do nothing where the cache cannot be written."""
    state = {} if verdict.folder is None else folder_state(Path(verdict.folder))
    try:
        with replacing(_verdict_file(verdict.task, root)) as file:
            file.write(json.dumps({"verdict": asdict(verdict), "state": state}).encode())
    except (OSError, RuntimeError):
        return


def load_verdict(task: str, root: Path | None) -> tuple[Verdict, bool] | None:
    """Return the cached verdict of a task, and whether its folder is still in the same state; None if there is none."""
    try:
        content = json.loads(read_regular(_verdict_file(task, root), _MAX_BYTES))
        verdict = Verdict(**{**content["verdict"], "notes": tuple(content["verdict"]["notes"])})
        state = content["state"]
        if verdict.folder is None:
            return verdict, True
        return verdict, state == {path: _stamp(Path(verdict.folder) / path) for path in state}
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):  # missing, or of another version
        return None


def folder_state(folder: Path) -> dict[str, list[int] | None]:
    """Return path → size and time of the folders below a folder and of the files at its top.

    These change when a file is added, removed or renamed, or a split file or manifest is written; a change inside an
    image is found by `data verify` alone, which reads it.
    """
    paths = [*(Path(base) for base, _, _ in os.walk(folder)), *(path for path in folder.iterdir() if path.is_file())]
    return {path.relative_to(folder).as_posix(): _stamp(path) for path in paths}


def _stamp(path: Path) -> list[int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return [0 if path.is_dir() else status.st_size, status.st_mtime_ns]
