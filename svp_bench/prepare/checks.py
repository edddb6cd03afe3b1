"""Checks of a task's splits by content, for `data prepare` and `data verify`: every image is decoded once."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from svp_bench.core.errors import plural, printable
from svp_bench.data.content import content_digest, overlap, two_labels
from svp_bench.data.inspection import Examined
from svp_bench.data.sources import Images, Note, Source, need_readable
from svp_bench.tasks.cards import ProtocolCard, TaskCard

_NAMED = 5  # classes in a note


def examine(source: Source, note: Note | None) -> dict[str, Examined]:
    """Decode every image once, without the cache of earlier findings; return split → findings.

    Raises:
        DataError: If images are missing or cannot be decoded.
    """
    once = each_image_once(source)
    found = {images.name: Images.examine(images, note) for images in once}
    need_readable([(images, found[images.name]) for images in once])
    digests = {key: row for images in once for key, row in zip(images.keys(), found[images.name].digests, strict=True)}
    for name, images in source.splits.items():
        if name not in found:
            rows = [*map(digests.__getitem__, images.keys())]
            found[name] = Examined(np.stack(rows) if rows else np.zeros((0, 16), np.uint8), (), {})
    return found


def each_image_once(source: Source) -> list[Images]:
    """Return splits that hold all images: not those that repeat the images of others, as trainval and refit do."""
    seen: set[str] = set()
    chosen = []
    for images in sorted(source.splits.values(), key=len, reverse=True):
        if not seen.issuperset(keys := images.keys()):
            chosen.append(images)
            seen.update(keys)
    return chosen


def content_digests(found: Mapping[str, Examined]) -> dict[str, str]:
    """Return split → digest of the decoded pixels of its images."""
    return {name: content_digest(one) for name, one in found.items()}


def held_out_pairs(source: Source, protocol: ProtocolCard) -> list[tuple[Images, Images]]:
    """Return (held-out split, split that must not have its images): test and all others, a stage's val and train."""
    stages = protocol.stages.values()
    tests = {roles["test"] for roles in stages if "test" in roles}
    pairs = [(test, name) for test in sorted(tests) for name in source.splits if name not in tests]
    pairs += [(roles["val"], roles["train"]) for roles in stages if "val" in roles]
    return [(source.splits[a], source.splits[b]) for a, b in pairs if a in source.splits and b in source.splits]


def leaks(source: Source, found: Mapping[str, Examined], protocol: ProtocolCard) -> list[str]:
    """Return a note for each held-out split that has the pixels of a split which must not have them."""
    pairs = held_out_pairs(source, protocol)
    texts = [overlap((held, found[held.name]), (seen, found[seen.name]))[1] for held, seen in pairs]
    return [printable(text) for text in texts if text]


def remarks(card: TaskCard, source: Source, found: Mapping[str, Examined]) -> list[str]:
    """Return notes about classes without images, and about equal images within a split."""
    notes = []
    for name, images in source.splits.items():
        absent = sorted({*range(card.classes)} - {*images.labels.tolist()})
        if absent and len(images) >= card.classes:
            some = ", ".join(map(str, absent[:_NAMED])) + (" …" if len(absent) > _NAMED else "")
            notes.append(f"{name} has no image of {plural(len(absent), 'class')} ({some})")
        again = len(images) - len({*found[name].keys()})
        if again:
            notes.append(f"{name} has {plural(again, 'image')} with the pixels of another of its images")
        if pairs := two_labels((images, found[name])):
            one, other = pairs[0]
            notes.append(
                f"{name} has {plural(len(pairs), 'image')} with the pixels of another and another label, the first is "
                f"{images.where(one)} = {images.where(other)}"
            )
    return [printable(note) for note in notes]
