"""What examining the images of a split found, and its cache on disk."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from svp_bench.core.atomic import read_regular, replacing
from svp_bench.core.resources import cache_dir
from svp_bench.data.decode import Decoded, decoder_version

MISSING = "missing"
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

    @property
    def nbytes(self) -> int:
        """Size in bytes for a cache; with problems too large for any, as the files may be repaired."""
        return sys.maxsize if self.problems else self.digests.nbytes

    def keys(self) -> list[bytes]:
        """Return the digest of each image."""
        return [row.tobytes() for row in self.digests]


def _file(key: str) -> Path:
    return cache_dir("images") / f"{decoder_version()}-{key}.npz"


def load_examined(key: str) -> Examined | None:
    """Return the cached findings for files of the same names, sizes and times; None if there are none."""
    try:
        with np.load(io.BytesIO(read_regular(_file(key), _MAX_BYTES)), allow_pickle=False) as content:
            return Examined(content["digests"], (), **json.loads(str(content["facts"])))
    except Exception:  # missing, or damaged: it is computed anew
        return None


def save_examined(key: str, examined: Examined) -> None:
    """Cache findings; do nothing where the cache cannot be written."""
    names = ("notes", "whole", "real", "largest_whole", "largest_real")
    facts = {name: getattr(examined, name) for name in names}
    with suppress(OSError, RuntimeError), replacing(_file(key)) as file:
        np.savez(file, digests=examined.digests, facts=json.dumps(facts))
