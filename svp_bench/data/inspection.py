"""What examining the images of a split found, and its cache on disk."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.data.decode import Decoded

__all__ = ["MISSING", "Examined", "load_examined", "save_examined"]

MISSING = "missing"
_VERSION = 2  # of what `decode` yields: a change of the pixels or notes raises it
_MAX_BYTES = 2**30


@dataclass(frozen=True)
class Examined:
    """What examining the images of a split found.

    Attributes:
        digests: uint8 (N, 16), of the pixels of each image; zeros for those that cannot be decoded.
        problems: (position, reason) of images that cannot be decoded; the reason `MISSING` if there is no file.
        notes: What was done to images beyond copying → how many.
        whole: Images that store whole numbers of more than 8 bits.
        real: Images that store floating-point numbers.
        largest_whole: The largest value of the former; None if there are none.
        largest_real: The largest value of the latter.
    """

    digests: npt.NDArray[np.uint8]
    problems: tuple[tuple[int, str], ...]
    notes: Mapping[str, int]
    whole: int = 0
    real: int = 0
    largest_whole: float | None = None
    largest_real: float | None = None

    @classmethod
    def of(cls, decoded: Sequence[Decoded | str]) -> Examined:
        """Sum up decoded images; a text is the reason why one cannot be."""
        digests = np.zeros((len(decoded), 16), dtype=np.uint8)
        problems: list[tuple[int, str]] = []
        notes: dict[str, int] = {}
        whole: list[float] = []
        real: list[float] = []
        for index, one in enumerate(decoded):
            if isinstance(one, str):
                problems.append((index, one))
                continue
            digests[index] = np.frombuffer(one.digest, dtype=np.uint8)
            if one.whole is not None:
                whole.append(one.whole)
            if one.real is not None:
                real.append(one.real)
            for note in one.notes:
                notes[note] = notes.get(note, 0) + 1
        largest = (max(values) if values else None for values in (whole, real))
        return cls(digests, tuple(problems), notes, len(whole), len(real), *largest)

    def keys(self) -> list[bytes]:
        """Return the digest of each image."""
        return [row.tobytes() for row in self.digests]


def _file(key: str) -> Path | None:
    given = os.environ.get("SVP_BENCH_CACHE")
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        folder = Path(given) if given else (Path(base) if base else Path.home() / ".cache") / "svp-bench"
    except RuntimeError:  # no home
        return None
    return folder / "images" / f"v{_VERSION}-{key}.npz"


def load_examined(key: str) -> Examined | None:
    """Return what was found earlier in files of the same names, sizes and times; None if that is not known."""
    path = _file(key)
    if path is None:
        return None
    try:
        with np.load(io.BytesIO(read_regular(path, _MAX_BYTES)), allow_pickle=False) as content:
            facts = json.loads(str(content["facts"]))
            return Examined(content["digests"], (), **facts)
    except Exception:  # missing, or damaged: it is made anew
        return None


def save_examined(key: str, examined: Examined) -> None:
    """Cache what was found; where the cache cannot be written, do nothing."""
    path = _file(key)
    if path is None:
        return
    names = ("notes", "whole", "real", "largest_whole", "largest_real")
    facts = {name: getattr(examined, name) for name in names}
    try:
        with replacing(path) as file:
            np.savez(file, digests=examined.digests, facts=json.dumps(facts))
    except OSError:
        return
