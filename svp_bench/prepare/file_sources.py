"""The sources `folder` and `zip`: a task's lists and images, as they are, from a folder or a zip or tar archive."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from svp_bench.core.atomic import file_digest, open_regular
from svp_bench.core.errors import DataError, UsageError, file_size, plural, show
from svp_bench.data.json_split import IMAGE_ROOTS, SPLIT_FILES, read_parts
from svp_bench.data.locate import locate
from svp_bench.data.manifest import MANIFEST, SUMS, read_manifest
from svp_bench.data.native import NATIVE_FORMS
from svp_bench.data.reading import SYNTHETIC_MARK, joined_names, readable
from svp_bench.data.sources import Note
from svp_bench.data.split_files import read_list
from svp_bench.prepare.archives import Archive, is_archive, open_archive, stem
from svp_bench.prepare.download import fetch, shown_address
from svp_bench.prepare.known import suite_sources
from svp_bench.prepare.sources import Built, DataSource, Request
from svp_bench.prepare.stage import RefusedError, Stage
from svp_bench.tasks.cards import OTHER_PIXELS, SuiteCard, TaskCard

_CHUNK = 2**18
_PATIENCE_S = 5.0  # between two notes about the progress
_PROBES = 100  # listed images that are looked for to find the folder that their paths are relative to


# --- files by path ---------------------------------------------------------------------------------------------------


class Files(ABC):
    """The files of a task by path, wherever they are.

    Attributes:
        label: Where they are, for messages.
    """

    label: str

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Return the size of a file in bytes; None if it is not there."""

    @abstractmethod
    def read(self, paths: Iterable[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield (path, content in parts) of files that are there, in the order that is read best."""


class FolderFiles(Files):
    """Files below a folder; links are followed if they stay inside."""

    def __init__(self, folder: Path) -> None:
        self.label = str(folder)
        self._folder = folder.resolve()

    def size(self, path: str) -> int | None:
        """Return the size of a file; None if it is not there."""
        file = self._folder / path
        return file.stat().st_size if file.is_file() else None

    def read(self, paths: Iterable[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield (path, content in parts); DataError if a link leads out of the folder."""
        for path in paths:
            if not (self._folder / path).resolve().is_relative_to(self._folder):
                raise DataError(f"{self.label}/{path} leads out of {self.label} by a link; copy the file into it")
            yield path, self._chunks(self._folder / path)

    def _chunks(self, file: Path) -> Iterator[bytes]:
        with readable(file), open_regular(file) as content:
            while chunk := content.read(_CHUNK):
                yield chunk


class ArchiveFiles(Files):
    """Files below a folder of an archive; `prefix` is "" or ends with a slash."""

    def __init__(self, archive: Archive, prefix: str) -> None:
        self.label = f"{archive.label}/{prefix}".rstrip("/")
        self._archive = archive
        self._prefix = prefix

    def size(self, path: str) -> int | None:
        """Return the size of a file as the archive states it; None if it is not there."""
        return self._archive.sizes.get(self._prefix + path)

    def read(self, paths: Iterable[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield (path, content in parts), in stored order."""
        for name, chunks in self._archive.read(self._prefix + path for path in paths):
            yield name.removeprefix(self._prefix), chunks


# --- a task's files --------------------------------------------------------------------------------------------------


def task_forms(card: TaskCard) -> list[tuple[str, ...]]:
    """Return the files that list the images of a task, in each form that its reader reads.

    Raises:
        UsageError: If its reader reads none.
    """
    if card.reader.kind == "split_files":
        return [tuple(f"{name}.txt" for name in card.counts)]
    if card.reader.kind == "json_split":
        native = NATIVE_FORMS.get(str(card.reader.options.get("native")))
        return [SPLIT_FILES, *([native.files] if native else [])]
    other = "torchvision" if card.reader.kind == "torchvision" else None
    raise UsageError(
        f"{card.name} is read by {card.reader.kind!r}, not from lists and images; "
        + (f"use `--source {other}`, also for files that are there" if other else "give its folder with --data.root")
    )


def copy_task(card: TaskCard, files: Files, stage: Stage, note: Note) -> None:
    """Copy the lists of a task, and the images that they name; files that are there already are left out.

    Raises:
        DataError: If a list or an image is missing or malformed, or there is not enough space.
    """
    try:
        lists = copy_lists(card, files, stage)
        for listing, images in lists.items():
            need_images(images, files, listing)
    except DataError as error:  # no later attempt with the same files can succeed: nothing of them may stay
        raise RefusedError(str(error).replace(f"{stage.folder}{os.sep}", f"{files.label}: ")) from None
    copy([path for images in lists.values() for path in images], files, stage, note)


def copy_lists(card: TaskCard, files: Files, stage: Stage) -> dict[str, list[str]]:
    """Copy the lists of a task; return list → paths of its images in `files`.

    Raises:
        DataError: If a list is missing or malformed.
    """
    forms = task_forms(card)
    synthetic = files.size(SYNTHETIC_MARK) is not None
    if synthetic or card.reader.kind == "split_files":
        lists = tuple(f"{name}.txt" for name in card.counts)
        if missing := [name for name in lists if files.size(name) is None]:
            raise DataError(f"{files.label} lacks {joined_names(missing)}; get the data again, whole")
        copy([*lists, *([SYNTHETIC_MARK] if synthetic else [])], files, stage)
        return {name: list(read_list(stage.folder / name, card.classes, task=card.name).paths) for name in lists}
    native = NATIVE_FORMS.get(str(card.reader.options.get("native")))
    official = native if not any(files.size(name) is not None for name in SPLIT_FILES) else None
    lists = (official.files if official else SPLIT_FILES) + (native.names_in if native else ())
    copy([name for name in dict.fromkeys(lists) if files.size(name) is not None], files, stage)
    parts, listings = read_parts(stage.folder, official, f"{joined_names(forms[0])} of {card.source}")
    found: dict[str, list[str]] = {}
    for listing, part in zip(listings, parts, strict=True):
        found.setdefault(Path(listing).name, []).extend(part)
    base = image_root(files, [path for paths in found.values() for path in paths])
    return {listing: [f"{base}{path}" for path in dict.fromkeys(paths)] for listing, paths in found.items()}


def image_root(files: Files, paths: Sequence[str]) -> str:
    """Return what the paths of a JSON split are relative to: "images/", "Images/" or ""; "" if none is there."""
    probes = probes_of(paths)
    bases = [f"{name}/" if name else "" for name in IMAGE_ROOTS]
    return next((base for base in bases if any(files.size(base + path) is not None for path in probes)), "")


def probes_of(paths: Sequence[str]) -> Sequence[str]:
    """Return some listed images, to look for their folder."""
    return paths[:: max(1, len(paths) // _PROBES)]


def need_images(paths: Sequence[str], files: Files, listing: str) -> None:
    """Check that images are there; DataError if not: names the list, how many are missing, and the first."""
    if missing := [path for path in paths if files.size(path) is None]:
        raise DataError(
            f"{files.label}: {len(missing)} of the {plural(len(paths), 'image')} of {listing} are missing, "
            f"the first is {show(missing[0])}; get the data again, whole"
        )


def copy(paths: Iterable[str], files: Files, stage: Stage, note: Note | None = None) -> None:
    """Copy files that are there, but for those that the stage has; `note` is called with the progress.

    Raises:
        DataError: If there is not enough space.
    """
    sizes = {path: files.size(path) or 0 for path in paths}
    todo = [path for path, size in sizes.items() if not stage.has(path, size)]
    need, free = sum(sizes[path] for path in todo), shutil.disk_usage(stage.folder).free
    if need > free:
        raise DataError(f"{stage.folder}: {file_size(need)} to write, {file_size(free)} free; give another --root")
    last = time.monotonic()
    for count, (path, chunks) in enumerate(files.read(todo), 1):
        stage.write_chunks(path, chunks)
        if note is not None and time.monotonic() - last >= _PATIENCE_S:
            last = time.monotonic()
            note(f"{files.label}: {count:,} of {len(todo):,} files copied")


def _other_pixels(files: Files) -> str | None:
    """Return the variant that a manifest among the files states, if its pixels are not the card's: a copy has them too.

    Raises:
        DataError: If the manifest is malformed.
    """
    names = [name for name in (MANIFEST, SUMS) if files.size(name) is not None]
    with tempfile.TemporaryDirectory() as folder:
        for name, chunks in files.read(names):
            Path(folder, name).write_bytes(b"".join(chunks))
        manifest = read_manifest(Path(folder))
    return manifest.variant if manifest is not None and manifest.variant in OTHER_PIXELS else None


# --- the source `folder` ---------------------------------------------------------------------------------------------


class FolderSource(DataSource):
    """A folder with a task's lists and images, e.g. an unpacked archive; only these files are copied."""

    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """Return the folder of the task, with a digest of the names, sizes and times of its files."""
        folder = self._folder(card, suite, request)
        sha = hashlib.sha256()
        for base, folders, names in os.walk(folder):
            folders.sort()
            for name in sorted(names):
                status = os.lstat(os.path.join(base, name))
                line = f"{os.path.relpath(base, folder)}/{name} {status.st_size} {status.st_mtime_ns}\n"
                sha.update(line.encode(errors="surrogateescape"))
        return {"copy_of": folder.name, "files": f"sha256:{sha.hexdigest()}"}

    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """Return the folder and the lists in it."""
        folder = self._folder(card, suite, request)
        return f"{folder}: {_found(card, FolderFiles(folder))}"

    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """Copy the lists and images."""
        folder = self._folder(card, suite, request)
        copy_task(card, FolderFiles(folder), stage, request.note)
        return Built(_other_pixels(FolderFiles(folder)), {})

    def _folder(self, card: TaskCard, suite: SuiteCard, request: Request) -> Path:
        if request.location is None:
            raise UsageError("--source folder needs --from DIR: a task's folder, or the one that holds it")
        given = Path(request.location).expanduser()
        if not given.is_dir():
            raise UsageError(f"--from {request.location} is not a folder; for an archive use --source zip")
        forms = task_forms(card)
        names = (card.folder, *card.other_folders)
        hint = f"{card.name} in a folder named {joined_names(names, 'or')}"
        return locate(card, suite, given, forms, hint)


def _found(card: TaskCard, files: Files) -> str:
    lists = [name for form in task_forms(card) for name in form if files.size(name) is not None]
    return joined_names(lists) if lists else "no list"


# --- the source `zip` ------------------------------------------------------------------------------------------------


class ZipSource(DataSource):
    """A zip or tar archive with the folders of tasks, e.g. the community's vtab-1k.zip, also as archives in it."""

    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """Return the archive, its digest, and the folder in it."""
        task_forms(card)
        path = self._path(suite, request)
        return {
            "archive": path.name,
            "digest": archive_digest(path),
            "folder": self._files(card, suite, path, request)[1],
        }

    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """Return the place of the task in the archive, and its lists."""
        files, _ = self._files(card, suite, self._path(suite, request), request)
        return f"{files.label}: {_found(card, files)}"

    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """Extract the lists and images."""
        path = self._path(suite, request)
        files, _ = self._files(card, suite, path, request)
        copy_task(card, files, stage, request.note)
        origin = {"from": shown_address(request.location)} if request.location and is_address(request.location) else {}
        return Built(_other_pixels(files), origin)

    def _path(self, suite: SuiteCard, request: Request) -> Path:
        if request.location is not None and not is_address(request.location):
            return need_archive(Path(request.location).expanduser())
        known = suite_sources(suite).archives
        addresses = (request.location,) if request.location else known
        if not addresses:
            raise UsageError(f"--source zip needs --from ARCHIVE for {suite.name}: a path or an address")
        return fetched((*addresses, *request.mirrors), request)

    def _files(self, card: TaskCard, suite: SuiteCard, path: Path, request: Request) -> tuple[Files, str]:
        archive = opened(path)
        hit = find_task(card, suite, archive, request.downloads)
        if hit is None:
            names = joined_names((card.folder, *card.other_folders), "or")
            lists = joined_names(task_forms(card)[0], "or")
            raise DataError(f"{path}: no folder {names} with {lists}; it holds {_tasks_in(archive)}")
        where, prefix = hit
        return ArchiveFiles(where, prefix), f"{where.label.removeprefix(str(path))}/{prefix}".strip("/")


def find_task(card: TaskCard, suite: SuiteCard, archive: Archive, scratch: Path) -> tuple[Archive, str] | None:
    """Return the archive (this one, or one in it) and the folder in it, "" or with a slash, that hold a task's lists.

    Raises:
        DataError: If several folders do.
    """
    names = (card.folder, *card.other_folders)
    for form in task_forms(card):
        found = _places(archive, names, form)
        if len(found) > 1:
            raise DataError(
                f"{archive.label} has {card.name} more than once: {', '.join(map(show, sorted(found)))}; unpack the "
                "right one, and use --source folder"
            )
        if found:
            return archive, found.pop()
    inner = [name for name in archive.sizes if is_archive(name)]
    likely = [name for name in inner if stem(name).lower() in {one.lower() for one in names}]
    whole = {one.lower() for one in (suite.folder, *suite.other_folders, suite.name)}
    likely += [name for name in inner if stem(name).lower() in whole or len(archive.sizes) == 1]
    for name in dict.fromkeys(likely):
        if hit := find_task(card, suite, _nested(archive, name, scratch), scratch):
            return hit
    return None


def _places(archive: Archive, names: Sequence[str], form: Sequence[str]) -> set[str]:
    found = set()
    for path in archive.sizes:
        folder, _, name = path.rpartition("/")
        if name in form and (folder.rpartition("/")[2] if folder else stem(archive.label)) in names:
            found.add(f"{folder}/" if folder else "")
    return found


def _tasks_in(archive: Archive) -> str:
    """Return what an archive holds: the folders with lists and the archives, or its first files."""
    lists = re.compile(r"(?:train|val|test)[^/]*\.(?:txt|json)")
    folders = {path.rpartition("/")[0] for path in archive.sizes if lists.fullmatch(path.rpartition("/")[2])}
    found = sorted(folders) + [name for name in archive.sizes if is_archive(name)] or sorted(archive.sizes)
    return (", ".join(found[:20]) + (f" (and {len(found) - 20} more)" if len(found) > 20 else "")) or "no file"


# --- archives on disk ------------------------------------------------------------------------------------------------


def need_archive(path: Path) -> Path:
    """Return the path of a file that should be an archive; UsageError if there is none."""
    if path.is_dir():
        raise UsageError(f"--from {path} is a folder, not an archive; use --source folder")
    if not path.exists():
        raise UsageError(f"--from {path}: there is no such file; give a zip or tar archive, or its address")
    return path


def is_address(location: str) -> bool:
    """Return whether a location is an address, not a path."""
    return location.startswith(("http://", "https://"))


def fetched(addresses: Sequence[str], request: Request, digest: str | None = None) -> Path:
    """Return a file from the first of some addresses, in the folder of downloads."""
    name = addresses[0].partition("?")[0].rstrip("/").rpartition("/")[2]
    place = request.downloads / hashlib.sha256(addresses[0].encode()).hexdigest()[:8]  # names may be those of others
    target = place / name
    for number in range(len(addresses)):
        path = fetch(addresses[number:], target, digest=digest, offline=request.offline, note=request.note)
        if digest is not None or not is_archive(name):
            break
        try:
            opened(path)
            break
        except DataError as error:  # cut short, or a page of the host: without a digest only the content tells
            path.unlink()
            if number + 1 == len(addresses):
                raise RefusedError(f"{error}; the download was deleted, so the same command tries it again") from None
            request.note(f"{error}; the next address is tried")
    return target


def opened(path: Path) -> Archive:
    """Return an open archive; the last ones stay open, since each task of a suite needs them."""
    return _open(path, _state(path))


def _state(path: Path) -> tuple[int, int]:
    with readable(path):
        status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)
def _open(path: Path, state: tuple[int, int]) -> Archive:
    return open_archive(path)


@lru_cache(maxsize=1)
def _nested(archive: Archive, name: str, scratch: Path) -> Archive:
    return archive.nested(name, scratch)


def archive_digest(path: Path) -> str:
    """Return "sha256:…" of a file, computed once."""
    return _digest(path, _state(path))


@lru_cache(maxsize=4)
def _digest(path: Path, state: tuple[int, int]) -> str:
    with readable(path):
        return file_digest(path)
