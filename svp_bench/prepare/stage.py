"""Build a data folder next to its final place, and rename it into place when it is complete.

A build that is killed leaves `.NAME.partial/NAME`, which the next one of the same plan continues: files in it were
renamed into place one by one, so each is whole. The partial folder has the final name, so that readers accept it. Data
that are refused (`RefusedError`) leave nothing.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock, Timeout

from svp_bench._version import __version__
from svp_bench.core.atomic import file_digest, replacing
from svp_bench.core.errors import DataError, UsageError
from svp_bench.data.manifest import MANIFEST, SCHEMA, SUMS, Manifest, sums_digest, sums_of, write_manifest
from svp_bench.data.split_files import plain_path
from svp_bench.tasks.cards import TaskCard

_PLAN = "plan.json"


class RefusedError(DataError):
    """The data are hostile or damaged: nothing that was built from them may stay."""


class Stage:
    """A data folder under construction.

    Attributes:
        folder: The partial folder; write only through the methods here, or rename whole files into it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, path: str, size: int | None = None) -> bool:
        """Return whether a file is complete, e.g. from a build that was interrupted; `size` in bytes, if it is known.

        An empty file is not: the machine may have died before the disk had it.
        """
        try:
            found = (self.folder / path).stat().st_size
        except OSError:
            return False
        return found > 0 and size in (None, found)

    def place(self, path: str) -> Path:
        """Return where a file belongs, its folders created.

        Raises:
            DataError: If the path is absolute or leaves the folder.
        """
        target = self.folder / plain_path(path, "the source")
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def write(self, path: str, content: bytes) -> None:
        """Write a file atomically; `finish` waits until the disk has them all."""
        self.write_chunks(path, (content,))

    def write_chunks(self, path: str, chunks: Iterable[bytes]) -> None:
        """Write a file atomically from its parts; nothing is written if they raise."""
        with replacing(self.place(path), durable=False) as file:
            for chunk in chunks:
                file.write(chunk)

    def finish(self, manifest: Manifest, sums: bytes) -> None:
        """Wait until the disk has all files, and write the manifest of the complete folder."""
        if hasattr(os, "sync"):  # not on Windows
            os.sync()
        write_manifest(self.folder, manifest, sums)

    def write_split(self, name: str, images: list[tuple[str, int]]) -> None:
        """Write `<name>.txt`: a line `path label` for each image."""
        self.write(f"{name}.txt", "".join(f"{path} {label}\n" for path, label in images).encode())


@contextmanager
def staged(target: Path, plan: Mapping[str, object], *, replace: bool = False) -> Iterator[Stage]:
    """Yield a partial folder, and rename it to `target` if the block wrote a manifest (`finish`).

    Args:
        target: The final folder.
        plan: Everything that decides the content; a partial folder of another plan is deleted first.
        replace: Replace a `target` that exists.

    Raises:
        UsageError: If `target` exists and is not to be replaced.
        DataError: If a folder cannot be written, or another process builds it.
    """
    outer = target.parent / f".{target.name}.partial"
    partial, mark = outer / target.name, outer / _PLAN
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock", timeout=0):
            if target.exists() and not replace:
                raise UsageError(f"{target} exists; check it with `svp-bench data verify`, or give --replace")
            text = json.dumps(plan, sort_keys=True)
            if outer.exists() and (not mark.is_file() or mark.read_text(encoding="utf-8") != text):
                shutil.rmtree(outer)
            partial.mkdir(parents=True, exist_ok=True)
            for left in partial.rglob(".*.tmp"):  # of a build that was killed
                left.unlink()
            with replacing(mark) as file:
                file.write(text.encode())
            try:
                yield Stage(partial)
            except RefusedError:
                shutil.rmtree(outer)
                raise
            if not (partial / MANIFEST).is_file():
                raise DataError(f"{partial}: no manifest was written; the build is not complete")
            old = target.parent / f".{target.name}.replaced"
            shutil.rmtree(old, ignore_errors=True)
            if target.exists():
                target.rename(old)
            partial.rename(target)
            shutil.rmtree(old, ignore_errors=True)
            shutil.rmtree(outer, ignore_errors=True)
    except Timeout:
        raise DataError(f"another process is building {target}; give the command again when it has ended") from None
    except OSError as error:
        raise DataError(f"{error.filename or target}: cannot be written ({error.strerror or error})") from None


def describe(
    folder: Path,
    card: TaskCard,
    *,
    source: str,
    variant: str,
    origin: Mapping[str, str],
    splits: Mapping[str, int],
    content: Mapping[str, str],
) -> tuple[Manifest, bytes]:
    """Return the manifest of a folder and the content of its `SHA256SUMS`; every file is read."""
    paths = _data_files(folder)
    sums = sums_below(folder)
    manifest = Manifest(
        schema=SCHEMA,
        task=card.name,
        task_version=card.version,
        source=source,
        variant=variant,
        origin=dict(origin),
        splits=dict(splits),
        content=dict(content),
        files=len(paths),
        bytes=sum((folder / path).stat().st_size for path in paths),
        digest=sums_digest(sums),
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        package_version=__version__,
    )
    return manifest, sums


def sums_below(folder: Path) -> bytes:
    """Return the content of `SHA256SUMS` for the files below a folder; every file is read."""
    paths = _data_files(folder)
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = pool.map(lambda path: file_digest(folder / path).partition(":")[2], paths)
        return sums_of(dict(zip(paths, digests, strict=True)))


def _data_files(folder: Path) -> list[str]:
    return [path for path in files_below(folder) if path not in (MANIFEST, SUMS)]


def files_below(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, relative to it, sorted; links are followed, as readers do."""
    found, seen = [], set()
    for base, folders, names in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(base))
        folders[:] = [name for name in folders if os.path.realpath(os.path.join(base, name)) not in seen]  # no circles
        found += [Path(base, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)
