"""The source `native`: a data set's own archives or unpacked folders, with the JSON lists of a split of others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from svp_bench.core.atomic import file_digest
from svp_bench.core.errors import DataError, UsageError, show
from svp_bench.data.json_split import IMAGE_ROOTS, SPLIT_FILES, read_parts
from svp_bench.data.native import NATIVE_FORMS
from svp_bench.data.reading import joined_names, readable
from svp_bench.prepare.archives import Archive
from svp_bench.prepare.file_sources import (
    ArchiveFiles,
    Files,
    FolderFiles,
    archive_digest,
    copy,
    fetched,
    is_address,
    need_archive,
    need_images,
    opened,
    probes_of,
)
from svp_bench.prepare.known import NativeSpec, known_sources, suite_sources
from svp_bench.prepare.sources import Built, DataSource, Request, refuse_shared
from svp_bench.prepare.stage import Stage
from svp_bench.tasks.cards import SuiteCard, TaskCard


@dataclass(frozen=True)
class _Inputs:
    """What a task is built of: the file of each list, and folders and archives with images."""

    lists: Mapping[str, Path]
    folders: tuple[Path, ...]
    archives: tuple[Path, ...]


class NativeSource(DataSource):
    """Images as their makers publish them, in the split of the lists.

    `--from DIR` holds the archives, or what was in them; it, or a folder of the task's name in it, may also hold the
    lists, else they are downloaded, as the archives are without `--from`.
    """

    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """Return the digests of lists and archives, and the folders."""
        inputs = _inputs(card, suite, request)
        return {
            "lists": {name: _md5(path) for name, path in inputs.lists.items()},
            "archives": {path.name: archive_digest(path) for path in inputs.archives},
            "folders": [folder.name for folder in inputs.folders],
        }

    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """Return the archives or folders, and the lists."""
        inputs = _inputs(card, suite, request)
        found = [str(path) for path in (*inputs.archives, *inputs.folders)]
        return f"images from {joined_names(found)}; lists {joined_names(map(str, inputs.lists.values()))}"

    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """Copy the lists, the images that they name, and the files with the names of classes."""
        spec, inputs = _spec(card, suite), _inputs(card, suite, request)
        for name, path in inputs.lists.items():
            with readable(path):
                stage.write(name, path.read_bytes())
        parts, _ = read_parts(stage.folder, None, f"{joined_names(SPLIT_FILES)} of the split")
        images = [*dict.fromkeys(path for part in parts for path in part)]
        files, base = _find(card, spec, inputs, images)
        need_images([base + path for path in images], files, joined_names(SPLIT_FILES))
        copy([base + path for path in images], files, stage, request.note)
        native = NATIVE_FORMS.get(str(card.reader.options.get("native")))
        for place in (files, *map(FolderFiles, inputs.folders)):
            copy([name for name in (native.names_in if native else ()) if place.size(name) is not None], place, stage)
        other = [name for name, path in inputs.lists.items() if spec.digests.get(name) not in (None, _md5(path))]
        notes = (
            (f"{joined_names(other)} of {next(iter(inputs.lists.values())).parent} not as released",) if other else ()
        )
        return Built(None, {"not_as_released": ", ".join(other)} if other else {}, notes)


def _spec(card: TaskCard, suite: SuiteCard) -> NativeSpec:
    spec = known_sources(card, suite).native
    if spec is None:
        refuse_shared(card, suite)
        known = [f"{suite.name}/{task}" for task, has in suite_sources(suite).tasks.items() if has.native]
        has = f"it has {', '.join(known)}" if known else f"it has none of {suite.name}"
        raise UsageError(f"--source native does not have {card.name}; {has}")
    return spec


def _inputs(card: TaskCard, suite: SuiteCard, request: Request) -> _Inputs:
    """Find or download what a task is built of."""
    spec = _spec(card, suite)
    if request.location is None or is_address(request.location):
        folders: tuple[Path, ...] = ()
        archives = _downloads(card, spec, request)
    elif (given := Path(request.location).expanduser().absolute()).is_dir():
        names = (card.folder, *card.other_folders, spec.lists)
        above = (given, given / suite.folder, given / "data_split" / "data")
        places = [given, *(folder / name for folder in above for name in names)]
        folders = tuple(dict.fromkeys(place for place in places if place.is_dir()))
        archives = tuple(place / name for place in folders for name in spec.archives if (place / name).is_file())
    else:
        folders, archives = (), (need_archive(given),)
    return _Inputs(_lists(suite, spec, folders, request), folders, archives)


def _downloads(card: TaskCard, spec: NativeSpec, request: Request) -> tuple[Path, ...]:
    """Download the archives of a task."""
    if request.location is not None:
        return (fetched((request.location, *request.mirrors), request),)
    if by_hand := [name for name, file in spec.archives.items() if not file.addresses]:
        raise UsageError(f"{card.name} needs --from DIR with {joined_names(by_hand)}, from {card.source}")
    return tuple(fetched((*file.addresses, *request.mirrors), request, file.digest) for file in spec.archives.values())


def _lists(suite: SuiteCard, spec: NativeSpec, folders: Sequence[Path], request: Request) -> dict[str, Path]:
    """Return the lists: those of a folder that has all, else downloaded."""
    for folder in folders:
        if all((folder / name).is_file() for name in SPLIT_FILES):
            return {name: folder / name for name in SPLIT_FILES}
    base = suite_sources(suite).lists
    if base is None:
        raise UsageError(f"--from needs {joined_names(SPLIT_FILES)} next to the images of {suite.name}")
    bases = (base, *request.mirrors)  # the digests decide
    try:
        return {
            name: fetched([f"{base}/{spec.lists}/{name}" for base in bases], request, spec.digests.get(name))
            for name in SPLIT_FILES
        }
    except DataError as error:
        where = f"in a folder {spec.lists!r} of --from DIR" if folders else "next to the archives, and --from DIR"
        raise DataError(f"{error}; or put {joined_names(SPLIT_FILES)} {where}") from None


def _find(card: TaskCard, spec: NativeSpec, inputs: _Inputs, images: Sequence[str]) -> tuple[Files, str]:
    """Return the folder or archive with the most of the listed images, and what their paths are relative to."""
    best: tuple[int, Files, str] | None = None
    probes = probes_of(images)
    for files, base in _places(inputs, images[0]):
        hits = sum(files.size(base + path) is not None for path in probes)
        if hits and (best is None or hits > best[0]):
            best = hits, files, base
    if best is None:
        places = [str(path) for path in (*inputs.archives, *inputs.folders)]
        raise DataError(
            f"no image of the lists, e.g. {show(images[0])}, in {joined_names(places)}; get "
            f"{joined_names(spec.archives)} of {card.source}"
        )
    return best[1], best[2]


def _places(inputs: _Inputs, image: str) -> Iterator[tuple[Files, str]]:
    """Yield the places that images may lie in, and the part of their path below it that lists leave out."""
    for folder in inputs.folders:
        for name in IMAGE_ROOTS:
            yield FolderFiles(folder), f"{name}/" if name else ""
    for path in inputs.archives:
        archive: Archive = opened(path)
        for stored in archive.sizes:
            if stored == image or stored.endswith(f"/{image}"):
                above = stored.removesuffix(image)
                base = next((f"{name}/" for name in IMAGE_ROOTS if name and f"/{above}".endswith(f"/{name}/")), "")
                yield ArchiveFiles(archive, above.removesuffix(base)), base


def _md5(path: Path) -> str:
    """Return "md5:…" of a list: the digest that is known of it."""
    with readable(path):
        return file_digest(path, "md5")
