"""The source `hub`: a data set of parquet files on the Hugging Face hub, or in a folder, with the splits of the card.

The files of a split are named `train800-00000-of-00002.parquet` (as `datasets` writes them), `train800.parquet` or
`train800/0000.parquet`, in any folder. A column holds images as stored files, another the labels.
"""

from __future__ import annotations

import io
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from svp_bench.core.errors import DataError, UnavailableError, UsageError, one_line, plural, show
from svp_bench.core.hub import HubError, HubFile, HubRepository, default_endpoint, describe_files, download, is_offline
from svp_bench.core.hub import look_up as look_up_repository
from svp_bench.data.decode import FORMATS, MAX_PIXELS
from svp_bench.prepare.download import shown_address
from svp_bench.prepare.known import known_sources, suite_sources
from svp_bench.prepare.sources import SOURCES, Built, DataSource, Request
from svp_bench.prepare.stage import RefusedError, Stage
from svp_bench.tasks.cards import SuiteCard, TaskCard

_PARQUET = re.compile(
    r"(?:(?P<folder>.*)/)?(?:(?P<split>[^/]+?)-(?P<number>\d{5})-of-(?P<count>\d{5})(?:-[0-9a-f]{8,})?"
    r"|(?P<whole>[^/]*[^/\d][^/]*)|\d{1,5})\.parquet"
)
_MAX_ROW_GROUP = 2**31  # bytes, unpacked: memory grows with it, since a page may be as large
_AS_STORED = {"PNG": "png", "JPEG": "jpg"}  # formats whose files are written as they are
_PNG_MODES = ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA")
_ROWS = 64  # read at a time
_PATIENCE_S = 5.0


@dataclass(frozen=True)
class _Found:
    """The parquet files of a task's splits, on the hub or in a folder."""

    place: str
    splits: Mapping[str, tuple[HubFile, ...]]
    repository: HubRepository | None
    folder: Path | None
    status: str

    def facts(self) -> dict[str, object]:
        if self.repository is not None:
            return {"repository": self.repository.name, "revision": self.repository.revision}
        assert self.folder is not None
        states = {file.path: (self.folder / file.path).stat() for files in self.splits.values() for file in files}
        return {
            "folder": self.folder.name,
            "files": {path: f"{s.st_size} {s.st_mtime_ns}" for path, s in states.items()},
        }

    def open(self, file: HubFile, offline: bool) -> Path:
        if self.repository is None:
            assert self.folder is not None
            return self.folder / file.path
        try:
            return download(self.repository, file, offline=offline)
        except HubError as error:
            raise DataError(f"{self.place}: {error}") from None


class HubSource(DataSource):
    """Parquet data sets with the splits of the card."""

    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """See `DataSource.plan`."""
        _pyarrow()
        found = _find(card, suite, request)
        _needed(card, suite, found)
        if found.repository is not None:
            origin = "given" if request.revision else "pinned" if _spec(card, suite).revision else "the newest now"
            request.note(f"{card.name}: {found.repository.name} at {found.repository.revision} ({origin})")
        return found.facts()

    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """See `DataSource.probe`."""
        found = _find(card, suite, request)
        needed = [*_own_splits(card, suite)]
        rows = _stated_rows(found)
        named = [f"{split} {rows[split]} rows" if split in rows else f"{split} (rows not stated)" for split in needed
                 if split in found.splits]  # fmt: skip
        missing = [split for split in needed if split not in found.splits]
        files = [file for split in needed for file in found.splits.get(split, ())]
        lacks = f"; LACKS {', '.join(missing)}" if missing else ""
        return (
            f"{found.place}{found.status}: {', '.join(named) or 'no split of the card'}, {describe_files(files)}{lacks}"
        )

    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """See `DataSource.build`."""
        revision = plan.get("revision")
        found = _find(card, suite, replace(request, revision=None if revision is None else str(revision)))
        needed = _needed(card, suite, found)
        offline = request.offline or is_offline()
        formats: Counter[str] = Counter()
        lines: dict[str, list[tuple[str, int]]] = {}
        with ThreadPoolExecutor(max_workers=request.workers) as pool:
            files = {split: [pool.submit(found.open, file, offline) for file in found.splits[split]]
                     for split in needed}  # fmt: skip
            try:
                for split, pending in files.items():
                    shards = (future.result() for future in pending)
                    lines[split] = _write_split(card, split, shards, stage, formats, request)
                    stage.write_split(split, lines[split])
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
        for split, parts in _composed(card, suite).items():
            stage.write_split(split, [line for part in parts for line in lines[part]])
        stored = ", ".join(
            f"{count} {kind}{'' if kind in _AS_STORED else ' written as PNG'}"
            for kind, count in sorted(formats.items())
        )
        request.note(f"{card.name}: images as stored: {stored}")
        address = {} if found.repository is None else {"endpoint": shown_address(found.repository.endpoint)}
        return Built("hub", {**address, "images": stored})


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UnavailableError(
            "the source 'hub' reads parquet files with pyarrow, which is not installed: pip install 'svp-bench[hub]'"
        ) from None
    return pyarrow


def _spec(card: TaskCard, suite: SuiteCard) -> Any:
    from svp_bench.prepare.known import HubSpec

    return known_sources(card, suite).hub or HubSpec("")


def _find(card: TaskCard, suite: SuiteCard, request: Request) -> _Found:
    """Return the parquet files of the splits at the place that the user or the suite states."""
    if card.reader.kind != "split_files":
        others = [name for name in SOURCES.names() if name != "hub"]
        raise UsageError(
            f"the source 'hub' writes split files, which {card.name} does not read; use {', '.join(others)}"
        )
    if request.location is not None and Path(request.location).expanduser().is_dir():
        folder = Path(request.location).expanduser().resolve()
        files = [
            HubFile(path.relative_to(folder).as_posix(), path.stat().st_size) for path in folder.rglob("*.parquet")
        ]
        return _Found(str(folder), _by_split(files, str(folder)), None, folder, "")
    spec = _spec(card, suite)
    name = request.location or spec.repository
    if not name:
        raise UsageError(
            f"no hub repository of {card.name} is known; give one with --from OWNER/NAME, or a folder of parquet files"
        )
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise UsageError(f"--from {name!r} is neither a repository OWNER/NAME nor a folder; a hub goes to --mirror")
    own = name == spec.repository
    status = f" ({spec.status}; {'pinned' if spec.revision else 'no revision pinned'})" if own else ""
    try:
        repository = look_up_repository(
            name,
            "dataset",
            revision=request.revision or (spec.revision if own else None),
            endpoints=(default_endpoint(), *request.mirrors),
            offline=request.offline or is_offline(),
        )
    except HubError as error:
        inferred = own and spec.status == "inferred" and "no such repository" in str(error)
        guess = "; its name is inferred, so it may not exist" if inferred else ""
        raise DataError(
            f"cannot find the data set {name} ({error}){guess}; give another with --from OWNER/NAME, a mirror of the "
            "hub with --mirror, or another --source"
        ) from None
    place = f"{name}@{repository.revision[:8]}"
    return _Found(place, _by_split(repository.files, place), repository, None, status)


def _by_split(files: Sequence[HubFile], place: str) -> dict[str, tuple[HubFile, ...]]:
    """Return split → its parquet files in order.

    Raises:
        DataError: If a split lies in several folders, or its numbered files are not complete.
    """
    found: dict[str, dict[tuple[str, str | None], list[HubFile]]] = {}
    for file in sorted(files, key=lambda file: file.path):
        if match := _PARQUET.fullmatch(file.path):
            above, _, parent = (match["folder"] or "").rpartition("/")
            split = match["split"] or match["whole"]
            where = (match["folder"] or "", match["count"]) if split else (above, None)
            found.setdefault(split or parent, {}).setdefault(where, []).append(file)
    for split, places in found.items():
        if len(places) > 1:
            names = ", ".join(sorted({files[0].path for files in places.values()}))
            raise DataError(
                f"{place}: the split {split} is there {len(places)} times ({names}); use a repository with one"
            )
        (((_, count), shards),) = places.items()
        numbers = [int(match["number"]) for file in shards if (match := _PARQUET.fullmatch(file.path)) and count]
        if count and numbers != [*range(int(count))]:
            raise DataError(
                f"{place}: the split {split} has the files {numbers}, expected 0 to {int(count) - 1}, each once"
            )
    return {split: tuple(shards) for split, places in found.items() for shards in places.values()}


def _composed(card: TaskCard, suite: SuiteCard) -> dict[str, tuple[str, ...]]:
    """Return splits that consist of other splits of the card, e.g. train800val200: they repeat no images."""
    parts = {split: [*of.items()] for split, of in suite_sources(suite).splits.items() if split in card.counts}
    single = {items[0]: split for split, items in parts.items() if len(items) == 1}
    return {
        split: tuple(single[item] for item in items)
        for split, items in parts.items()
        if len(items) > 1 and all(item in single for item in items)
    }


def _own_splits(card: TaskCard, suite: SuiteCard) -> list[str]:
    composed = _composed(card, suite)
    return [split for split in card.counts if split not in composed]


def _needed(card: TaskCard, suite: SuiteCard, found: _Found) -> list[str]:
    needed = _own_splits(card, suite)
    if missing := [split for split in needed if split not in found.splits]:
        raise DataError(
            f"{found.place} has no parquet files of {', '.join(missing)} ({missing[0]}-00000-of-00001.parquet …); "
            f"it has the splits: {', '.join(found.splits) or 'none'}; give another repository with --from or --revision"
        )
    return needed


def _stated_rows(found: _Found) -> dict[str, int]:
    """Return split → rows as the repository's README states them, or as the files of a folder do."""
    if found.folder is not None:
        read = _pyarrow().parquet.read_metadata
        try:
            return {split: sum(read(found.folder / file.path).num_rows for file in files)
                    for split, files in found.splits.items()}  # fmt: skip
        except Exception as error:  # pyarrow raises several kinds
            raise DataError(f"{found.folder}: a parquet file cannot be read ({one_line(error)})") from None
    stated = found.repository.card.get("dataset_info") if found.repository is not None else None
    infos = stated if isinstance(stated, list) else [stated]
    splits = [
        one for info in infos if isinstance(info, dict) for one in info.get("splits") or () if isinstance(one, dict)
    ]
    return {str(one["name"]): one["num_examples"] for one in splits if isinstance(one.get("num_examples"), int)}


def _write_split(
    card: TaskCard, split: str, shards: Iterator[Path], stage: Stage, formats: Counter[str], request: Request
) -> list[tuple[str, int]]:
    """Write the images of a split and return (path, label) of each."""
    lines: list[tuple[str, int]] = []
    last = time.monotonic()
    for shard in shards:
        for row, (content, label) in enumerate(_rows(shard)):
            where = f"{shard.name}: row {row} of {split}"
            if not isinstance(label, int) or not 0 <= label < card.classes:
                classes = plural(card.classes, "class")
                raise RefusedError(f"{where}: label {show(label)}, {card.name} has {classes} (0..{card.classes - 1})")
            if not content:
                raise RefusedError(f"{where}: holds no image, perhaps a path alone; the files must be in the data set")
            kind, content = _file_of(content, where)
            formats[kind] += 1
            path = f"images/{split}/{len(lines):06d}.{_AS_STORED.get(kind, 'png')}"
            if not stage.has(path, len(content)):
                stage.write(path, content)
            lines.append((path, label))
            if time.monotonic() - last >= _PATIENCE_S:
                last = time.monotonic()
                request.note(f"{card.name}: {split}: {len(lines):,} images")
    if not lines:
        raise RefusedError(f"the split {split} has no rows")
    return lines


def _rows(path: Path) -> Iterator[tuple[bytes | None, object]]:
    """Yield (image file, label) of each row; takes about the memory of one row group.

    Raises:
        RefusedError: If the file is damaged, lacks a column, or a row group is too large.
    """
    parquet = _pyarrow().parquet
    try:
        with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
            image, label = _columns(file.schema_arrow, path.name)
            for index in range(file.num_row_groups):
                if (size := file.metadata.row_group(index).total_byte_size) > _MAX_ROW_GROUP:
                    raise RefusedError(f"{path.name}: row group {index} unpacks to {size:,} bytes, more than 2 GiB")
            for batch in file.iter_batches(_ROWS, columns=[image, label], use_threads=False):
                images = batch.column(image)
                if hasattr(images, "field"):  # a struct; the null of a struct is not that of its field
                    images = images.flatten()[images.type.get_field_index("bytes")]
                yield from zip(images.to_pylist(), batch.column(label).to_pylist(), strict=True)
    except RefusedError:
        raise
    except Exception as error:  # pyarrow raises several kinds for damaged files
        raise RefusedError(
            f"{path.name}: not a readable parquet file ({one_line(error)[:160]}); get it again"
        ) from None


def _columns(schema: Any, where: str) -> tuple[str, str]:
    """Return the names of the columns with images and with labels."""
    types = _pyarrow().types

    def holds_files(kind: Any) -> bool:
        if types.is_struct(kind):
            index = kind.get_field_index("bytes")
            return index >= 0 and holds_files(kind.field(index).type)
        return bool(types.is_binary(kind) or types.is_large_binary(kind))

    def one(what: str, fitting: Sequence[str], usual: tuple[str, ...]) -> str:
        chosen = fitting if len(fitting) == 1 else [name for name in fitting if name in usual]
        if len(chosen) == 1:
            return chosen[0]
        found = f"several ({', '.join(map(show, fitting))})" if fitting else "none"
        columns = ", ".join(f"{show(field.name)} {str(field.type)[:40]}" for field in schema)
        raise RefusedError(f"{where}: needs one column of {what}, found {found} among {columns}")

    images = [field.name for field in schema if holds_files(field.type)]
    labels = [field.name for field in schema if types.is_integer(field.type)]
    return (
        one("images (stored files: binary, or a struct with bytes)", images, ("image", "img")),
        one("labels (integers)", labels, ("label", "labels")),
    )


def _file_of(content: bytes, where: str) -> tuple[str, bytes]:
    """Return the format of an image, and the file to write: its own bytes, else a PNG of the same pixels."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            kind = str(image.format)
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            if kind in _AS_STORED:
                return kind, content
            image.load()
            if image.mode not in _PNG_MODES:
                raise ValueError(f"{kind} in {image.mode}, which PNG cannot hold")
            file = io.BytesIO()
            image.save(file, format="PNG", exif=image.getexif())
            return kind, file.getvalue()
    except Exception as error:  # Pillow raises a dozen kinds for broken files
        raise RefusedError(f"{where}: not a readable image ({one_line(error)[:160]})") from None
