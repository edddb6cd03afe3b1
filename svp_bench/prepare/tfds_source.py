"""Source: TensorFlow Datasets, from which VTAB was made. TensorFlow itself is needed to build some sets, not to read.

The images are written as the builder stores them, PNG or JPEG, without another encoding; those of zeros and ones
(`pixels: times_255`) as PNG. Their pixels are not those of the community's archive, so the variant is "tfds".
"""

from __future__ import annotations

import io
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from PIL import Image

from svp_bench.core.errors import CardError, DataError, UnavailableError, UsageError, show
from svp_bench.data.reading import foreign_errors
from svp_bench.prepare.known import Part, SuiteSources, TfdsSpec, known_sources, suite_sources
from svp_bench.prepare.labels import label_of
from svp_bench.prepare.sources import Built, DataSource, Request
from svp_bench.prepare.stage import Stage
from svp_bench.tasks.cards import SuiteCard, TaskCard

_IMAGE = "image"  # the feature, in all of these builders
_INFO = "dataset_info.json"
_SUFFIXES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
_PATIENCE_S = 5.0


class TfdsSource(DataSource):
    """Read what TensorFlow Datasets has prepared, or let it download and prepare."""

    def plan(self, card: TaskCard, suite: SuiteCard, request: Request) -> dict[str, object]:
        """Return builder and version. `--from` is a data folder of TensorFlow Datasets, or one of a prepared version.

        Without it, the default data folder ($TFDS_DATA_DIR, else ~/tensorflow_datasets) is searched, then the folder
        of downloads, into which a missing one is built.
        """
        spec = _spec(card, suite)
        _splits(card, suite_sources(suite))
        found = _prepared(spec, request)
        version = found.name if found else _buildable(spec, request)
        return {"builder": spec.name, "version": version}

    def probe(self, card: TaskCard, suite: SuiteCard, request: Request) -> str:
        """Return what is prepared, or what would be built."""
        spec = _spec(card, suite)
        found = _prepared(spec, request)
        if found is None:
            return f"{spec.name}:{_buildable(spec, request)} is not prepared yet; it would be built in {_home(request)}"
        builder = _open(spec, found)
        counts = ", ".join(f"{name} {split.num_examples}" for name, split in builder.info.splits.items())
        return f"{spec.name}:{found.name} in {found} ({_format(builder)}): {counts}"

    def build(
        self, card: TaskCard, suite: SuiteCard, request: Request, plan: Mapping[str, object], stage: Stage
    ) -> Built:
        """Write images and split files; `--from` as in `plan`."""
        spec, sources = _spec(card, suite), suite_sources(suite)
        splits = _splits(card, sources)
        found = _prepared(spec, request) or _download(spec, str(plan["version"]), request)
        builder = _open(spec, found)
        needed: dict[Part, int | None] = {}  # None: all
        for parts in splits.values():
            for part, first in parts.items():
                before = needed.get(part, 0)
                needed[part] = None if first == "all" or before is None else max(before, first)
        written = {
            part: _write_part(card, spec, builder, part, count, request, stage) for part, count in needed.items()
        }
        for name, parts in splits.items():
            firsts = {part: None if first == "all" else first for part, first in parts.items()}
            stage.write_split(name, [one for part, first in firsts.items() for one in written[part][:first]])
        origin = {"builder": spec.name, "version": found.name, "format": _format(builder)}
        return Built("tfds", {**origin, "tensorflow-datasets": _tfds().__version__})


def _tfds() -> ModuleType:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UnavailableError(
            f"the source tfds needs the package tensorflow-datasets ({error}); pip install 'svp-bench[vtab]'"
        ) from None
    package: ModuleType = tensorflow_datasets
    return package


def _spec(card: TaskCard, suite: SuiteCard) -> TfdsSpec:
    spec = known_sources(card, suite).tfds
    if spec is None:
        raise UsageError(
            f"TensorFlow Datasets has no builder for {card.name} that is known here; "
            f"`svp-bench data prepare --help` lists the sources"
        )
    return spec


def _splits(card: TaskCard, sources: SuiteSources) -> dict[str, Mapping[Part, Any]]:
    """Return the splits of a card as first images of parts."""
    if lacking := [name for name in card.counts if name not in sources.splits]:
        raise CardError(f"{card.path}:1: the sources of the suite do not state what its split {lacking[0]!r} holds")
    return {name: sources.splits[name] for name in card.counts}


# --- prepared folders ------------------------------------------------------------------------------------------------


def _home(request: Request) -> Path:
    return request.downloads / "tfds"


def _prepared(spec: TfdsSpec, request: Request) -> Path | None:
    """Return the folder of the preferred version that is prepared; None if `--from` is not given and there is none."""
    if request.location is None:
        default = Path(os.environ.get("TFDS_DATA_DIR") or Path.home() / "tensorflow_datasets")
        places = [default, _home(request)]
    else:
        places = [Path(request.location).expanduser()]
        if (places[0] / _INFO).is_file():
            return _checked(spec, places[0])
    folders = [place / spec.name for place in places]
    names = [path.parent.name for folder in folders for path in sorted(folder.glob(f"*/{_INFO}"))]
    if (version := _preferred(spec, names)) is not None:
        return next(folder / version for folder in folders if (folder / version / _INFO).is_file())
    if names or request.location is not None:
        has = f"only version {', '.join(names)}" if names else "no prepared version"
        raise DataError(
            f"{folders[0]} has {has} of {spec.name}, needed: {' or '.join(spec.versions)}; prepare it with "
            f"TensorFlow Datasets, or leave out --from to download it"
        )
    return None


def _checked(spec: TfdsSpec, folder: Path) -> Path:
    """Return the folder of one prepared version if it is one of this builder."""
    with foreign_errors(folder / _INFO):
        info = json.loads((folder / _INFO).read_text(encoding="utf-8"))
        name = "/".join([str(info["name"]), *([str(info["configName"])] if info.get("configName") else [])])
    if name != spec.name or _preferred(spec, [folder.name]) is None:
        raise DataError(
            f"{folder} holds {name}:{folder.name}, needed: {spec.name}, version {' or '.join(spec.versions)}"
        )
    return folder


def _preferred(spec: TfdsSpec, versions: list[str]) -> str | None:
    """Return the newest version that the first matching pattern allows."""
    for pattern in spec.versions:
        wanted = re.compile(re.escape(pattern).replace(r"\*", "[0-9]+"))
        if found := [version for version in versions if wanted.fullmatch(version)]:
            return max(found, key=lambda version: [int(number) for number in version.split(".")])
    return None


def _buildable(spec: TfdsSpec, request: Request) -> str:
    """Return the preferred version that the installed package can build."""
    if request.offline:
        raise DataError(f"{spec.name} is not prepared, and --offline is given; give a prepared folder with --from DIR")
    tfds = _tfds()
    with foreign_errors(Path(spec.name), "install another version of tensorflow-datasets"):
        known = [str(version) for version in tfds.builder(spec.name, data_dir=str(_home(request))).versions]
    version = _preferred(spec, known)
    if version is None:
        raise DataError(
            f"tensorflow-datasets {tfds.__version__} builds {spec.name} in version {', '.join(known)}, "
            f"needed: {' or '.join(spec.versions)}; install an older one "
            f"(pip install 'tensorflow-datasets<{tfds.__version__}')"
        )
    return version


def _download(spec: TfdsSpec, version: str, request: Request) -> Path:
    """Let TensorFlow Datasets download and prepare a version, and return its folder."""
    tfds, home = _tfds(), _home(request)
    request.note(f"{spec.name}:{version} is downloaded and prepared in {home} by TensorFlow Datasets")
    remedy = (
        "some sets need TensorFlow to be built (pip install tensorflow) or archives fetched by hand (see "
        "https://www.tensorflow.org/datasets/catalog); other sources: `svp-bench data prepare --help`"
    )
    with foreign_errors(home / spec.name / version, remedy):
        builder = tfds.builder(f"{spec.name}:{version}", data_dir=str(home))
        # TensorFlow is needed to write its own format, and array_record has no wheel for each system.
        random_access = True
        try:
            import array_record  # noqa: F401
        except ImportError:
            random_access = False
        config = tfds.download.DownloadConfig(num_workers=request.workers)
        with suppress(AttributeError):  # a name that may change; without it the builder asks a server for statistics
            config.try_download_gcs = False
        builder.download_and_prepare(
            download_config=config, **({"file_format": "array_record"} if random_access else {})
        )
    return home / spec.name / version


# --- reading ---------------------------------------------------------------------------------------------------------


def _open(spec: TfdsSpec, folder: Path) -> Any:
    """Return a builder that reads a prepared folder."""
    tfds = _tfds()
    with foreign_errors(folder, "prepare it again with TensorFlow Datasets"):
        builder = tfds.builder_from_directory(str(folder))
        if _IMAGE not in builder.info.features:
            raise DataError(f"{folder}: {spec.name} has no feature {_IMAGE!r}")
    return builder


def _format(builder: Any) -> str:
    return str(builder.info.file_format.value)


def _examples(builder: Any, part: str, count: int | None) -> Iterator[Any]:
    """Yield the first examples of a slice in stored order, images as they are encoded."""
    tfds = _tfds()
    features = builder.info.features
    decoders = {
        name: tfds.decode.SkipDecoding()
        for name, feature in features.items()
        if isinstance(feature, tfds.features.Image)
    }
    if _format(builder) != "tfrecord":
        data = builder.as_data_source(split=part, decoders=decoders)
        yield from (data[index] for index in range(len(data) if count is None else min(count, len(data))))
        return
    from svp_bench.prepare.tfrecords import read_records

    records = (
        record
        for shard in builder.info.splits[part].file_instructions
        for record in read_records(Path(shard.filename), shard.skip, shard.take)
    )
    for record in islice(records, count):
        yield features.deserialize_example_np(record, decoders=decoders)


def _write_part(
    card: TaskCard, spec: TfdsSpec, builder: Any, part: Part, count: int | None, request: Request, stage: Stage
) -> list[tuple[str, int]]:
    """Write the first images of a part, and return their paths and labels."""
    what = f"{spec.name}:{builder.info.version}"
    if part not in spec.parts:
        raise CardError(f"{card.path}:1: the sources of the suite do not state the part {part!r} of {spec.name}")
    with foreign_errors(Path(what), f"the slice {spec.parts[part]!r} is needed"):
        total = builder.info.splits[spec.parts[part]].num_examples
    if total < (count or 1):
        raise DataError(f"{what}: {spec.parts[part]!r} has {total} images, needed: {count or 'at least 1'}")
    count = total if count is None else count
    images, last = [], time.monotonic()
    examples = _examples(builder, spec.parts[part], count)
    for number in range(count):
        where = f"{what}: image {number} of {spec.parts[part]!r}"
        with foreign_errors(Path(where), "prepare it again with TensorFlow Datasets"):
            example = next(examples)
            label = label_of(example, spec.label)
            content, suffix = _encoded(example[_IMAGE], spec, where)
        if not 0 <= label < card.classes:
            raise DataError(f"{where} has label {show(label)}, {card.name} has 0..{card.classes - 1}")
        path = f"images/{part}/{number:06d}{suffix}"
        if not stage.has(path):
            stage.write(path, content)
        images.append((path, label))
        if time.monotonic() - last > _PATIENCE_S:
            last = time.monotonic()
            request.note(f"{card.name}: wrote {number + 1:,} of {count:,} images of {part}")
    return images


def _encoded(content: Any, spec: TfdsSpec, where: str) -> tuple[bytes, str]:
    """Return the encoded image that is written, and its suffix."""
    content = bytes(content)
    suffix = next((name for magic, name in _SUFFIXES.items() if content.startswith(magic)), None)
    if suffix is None:
        raise DataError(f"{where} is neither PNG nor JPEG; it begins with {show(content[:8])}")
    if spec.pixels == "stored":
        return content, suffix
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.asarray(image)
    pixels = pixels.astype(np.uint8) if pixels.dtype == np.bool_ else pixels
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.max(initial=0) > 1:
        raise DataError(f"{where} is not of zeros and ones")
    buffer = io.BytesIO()
    Image.fromarray(pixels * np.uint8(255)).save(buffer, "PNG")
    return buffer.getvalue(), ".png"
