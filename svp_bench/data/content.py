"""Checks of splits by content: images with the same pixels are the same image, under any path."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.errors import printable
from svp_bench.data.inspection import Examined
from svp_bench.data.sources import Images, Source

Split = tuple[Images, Examined]
_MAX_BYTES = 2**20


def content_digest(examined: Examined) -> str:
    """Return "sha256:…" over the decoded pixels of all images of a split, in its order."""
    return "sha256:" + hashlib.sha256(examined.digests.tobytes()).hexdigest()


def overlap(held: Split, seen: Split) -> tuple[int, str]:
    """Return how many images of `held` have the pixels of one of `seen`, and a sentence about them."""
    (images, found), (others, other_found) = held, seen
    first: dict[bytes, int] = {}
    for index, key in enumerate(other_found.keys()):
        first.setdefault(key, index)
    pairs = [(index, first[key]) for index, key in enumerate(found.keys()) if key in first]
    if not pairs:
        return 0, ""
    one, other = pairs[0]
    return len(pairs), printable(
        f"{len(pairs)} of the {len(images)} images of {images.name} have the same pixels as images of {others.name}, "
        f"the first is {images.where(one)} = {others.where(other)}"
    )


def two_labels(split: Split) -> list[tuple[int, int]]:
    """Return (position, earlier position) for each image that a split has before with another label."""
    first: dict[bytes, int] = {}
    labels = split[0].labels
    pairs = []
    for index, key in enumerate(split[1].keys()):
        before = first.setdefault(key, index)
        if labels[before] != labels[index]:
            pairs.append((index, before))
    return pairs


def joined(refit: Split, train: Split, val: Split) -> str | None:
    """Compare `refit` with train and val together, as pixels and labels; return the difference, or None."""

    def content(images: Images, examined: Examined) -> Counter[tuple[bytes, int]]:
        return Counter(zip(examined.keys(), images.labels.tolist(), strict=True))

    both = content(*train) + content(*val)
    ours = content(*refit)
    if ours == both:
        return None
    names = f"{train[0].name} and {val[0].name} together"
    return (
        f"{refit[0].name} does not hold the images and labels of {names}: "
        f"{(ours - both).total()} are only in {refit[0].name}, {(both - ours).total()} only in {names}"
    )


def differences_from_manifest(digests: Mapping[str, str], source: Source) -> str:
    """Return a note on splits whose pixels are not those that the manifest states; "" without any.

    A record must not cite the manifest of files that it did not read.
    """
    other = [name for name, digest in digests.items() if source.manifest_content.get(name, digest) != digest]
    if not other:
        return ""
    text = f"the pixels of {', '.join(other)} are not those of the manifest in {source.origin}"
    return printable(f"{text}; `svp-bench data verify` names the files that changed")


def differences_from_first_use(path: Path, digests: Mapping[str, str]) -> list[str]:
    """Compare digests with those of the first run on a task, which are written to `path` where it lacks them.

    Raises:
        OSError: If the file cannot be written.
    """
    try:
        known = json.loads(read_regular(path, _MAX_BYTES))
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    changed = [name for name in digests if known.get(name, digests[name]) != digests[name]]
    if {*digests} - {*known}:
        with replacing(path) as file:
            file.write((json.dumps({**digests, **known}, indent=2, sort_keys=True) + "\n").encode())
    return [
        f"the pixels of {name} are not those of the first run here ({digests[name][:19]}…, in {path} "
        f"{str(known[name])[:19]}…)"
        for name in changed
    ]
