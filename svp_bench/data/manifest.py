"""The manifest of a prepared data folder: where the files come from, and a digest of each.

Two files at the top of a task's folder: `SHA256SUMS`, a line a file in the form of `sha256sum` (so `sha256sum -c`
checks it), and `manifest.json`, the facts about the set. The digest of the set is that of `SHA256SUMS`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.errors import DataError, printable, show
from svp_bench.core.validate import convert

MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"
SCHEMA = 1
_MAX_BYTES = 2**28


@dataclass(frozen=True)
class Manifest:
    """Facts about a data folder that `svp-bench data prepare` or `data verify` wrote.

    Attributes:
        schema: Version of this form.
        task: Full name of the task, e.g. "vtab/caltech101".
        task_version: Version of its card.
        source: Name of the source: "hub", "zip", "tfds", "folder", "torchvision" or "native".
        variant: Name of the data variant that records state; "card" if the card describes these pixels.
        origin: Facts for finding the same data again: address, repository, revision, digest of an archive.
        splits: Split → number of images.
        content: Split → digest of the decoded pixels of its images; a run compares those that it reads.
        files: Number of files in `SHA256SUMS`.
        bytes: Their size together.
        digest: "sha256:…" of `SHA256SUMS`.
        created: Time in ISO 8601, UTC.
        package_version: Version of svp-bench.
    """

    schema: int
    task: str
    task_version: int
    source: str
    variant: str
    origin: Mapping[str, str]
    splits: Mapping[str, int]
    content: Mapping[str, str]
    files: int
    bytes: int
    digest: str
    created: str
    package_version: str


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a folder; None if it has none.

    Raises:
        DataError: If it is malformed, of another schema, or not that of the `SHA256SUMS` next to it.
    """
    path = folder / MANIFEST
    try:
        content = read_regular(path, _MAX_BYTES)
        sums = read_regular(folder / SUMS, _MAX_BYTES)
    except FileNotFoundError as error:
        if not path.exists():
            return None
        raise DataError(f"{error.filename}: missing next to {MANIFEST}; run `svp-bench data verify`") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        data = json.loads(content)
    except ValueError:
        raise DataError(f"{path}: not JSON; delete it and run `svp-bench data verify`") from None
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else None
        raise DataError(f"{path}: schema {found!r}, expected {SCHEMA}; update svp-bench or prepare the data again")
    manifest: Manifest = convert(data, Manifest, str(path), DataError, "the manifest")
    if sums_digest(sums) != manifest.digest:
        raise DataError(f"{path}: {SUMS} has another digest than it states; run `svp-bench data verify`")
    return manifest


def write_manifest(folder: Path, manifest: Manifest, sums: bytes) -> None:
    """Write both files; `manifest.json` last, since a folder with it is complete."""
    with replacing(folder / SUMS) as file:
        file.write(sums)
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(asdict(manifest), indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n")


def sums_of(digests: Mapping[str, str]) -> bytes:
    """Return the content of `SHA256SUMS` for path → 64 hex digits, in the order of the paths.

    Raises:
        DataError: If a path holds a line break or a backslash, which the form would have to escape.
    """
    for path in digests:
        if "\n" in path or "\\" in path or "\r" in path:
            raise DataError(f"{printable(path)}: a line break or backslash in the name of a file; rename it")
    return "".join(f"{digests[path]}  {path}\n" for path in sorted(digests)).encode("utf-8", "surrogateescape")


def parse_sums(sums: bytes, path: Path) -> dict[str, str]:
    """Return path → 64 hex digits of the content of `SHA256SUMS`.

    Raises:
        DataError: If a line is malformed.
    """
    digests: dict[str, str] = {}
    for number, line in enumerate(sums.decode("utf-8", "surrogateescape").split("\n"), 1):
        if line:
            digest, gap, name = line[:64], line[64:66], line[66:]
            if gap != "  " or not name or digest.strip("0123456789abcdef"):
                raise DataError(f"{path}:{number}: found {show(line)}, expected 64 hex digits, two blanks, a path")
            digests[name] = digest
    return digests


def sums_digest(sums: bytes) -> str:
    """Return "sha256:…" of the content of `SHA256SUMS`: the digest of the set."""
    return "sha256:" + hashlib.sha256(sums).hexdigest()
