"""Error classes, and helpers for their messages.

User errors are subclasses of `SvpBenchError` with a text of one line: the given value, the allowed ones, the nearest
match, the next step. The command line prints it and exits with the `exit_status` of the class.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

# Control characters (ANSI escapes begin with one), line separators, halves of surrogate pairs, and the marks that
# reverse the order in which a terminal shows text.
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80


class SvpBenchError(Exception):
    """Base of the errors of svp-bench; `exit_status` is the exit status of the command line."""

    exit_status = 1


class UsageError(SvpBenchError):
    """Wrong usage of a command: an unknown name, exclusive flags, a missing argument."""

    exit_status = 2


class ConfigError(UsageError):
    """A config file or flag is invalid: unknown key, wrong type, wrong value."""


class CardError(SvpBenchError):
    """A card is malformed. The text begins with `file:line:`."""


class DataError(SvpBenchError):
    """The data on disk are missing, malformed or do not fit their card."""


class CheckpointError(SvpBenchError):
    """A checkpoint is missing, unreadable, unsafe or belongs to another architecture."""


class RecordError(SvpBenchError):
    """A result record is unreadable or does not follow its schema, or the results folder cannot be written."""


class UnavailableError(SvpBenchError):
    """A requested part (a scan backend, an optional package) cannot run here; states the reason."""


class NonFiniteLossError(SvpBenchError):
    """The training loss became NaN or infinite."""


class OutOfMemoryError(SvpBenchError):
    """A training step needs more memory than the device has."""


def printable(text: object) -> str:
    r"""Return text from a file on one printable line: control characters become Python's escapes.

    >>> printable("a\x1b[31mb\nc")
    'a\\x1b[31mb\\nc'
    """
    return _UNPRINTABLE.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), str(text))


def one_line(text: object) -> str:
    """Return a text on one line, cut at 600 characters."""
    line = " ".join(str(text).split())
    return line if len(line) <= 600 else f"{line[:600]} …"


def show(value: object) -> str:
    """Return a value for a message: its repr, cut short, on one line."""
    return re.sub(r"\s*\n\s*", " ", _SHORT.repr(value))


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """Return "1 task", "2 tasks", "2 classes".

    Args:
        count: How many.
        noun: For one.
        nouns: For several, where it is neither `noun` with "s" nor, behind s, sh, x, z, nch, rch or tch, with "es".
    """
    several = nouns or noun + ("es" if noun.endswith(("nch", "rch", "tch", "s", "sh", "x", "z")) else "s")
    return f"{count} {noun if count == 1 else several}"


def file_size(count: float) -> str:
    """Return a number of bytes as text: "600 B", "12.0 KiB", "9.5 MiB", "640 MiB", "21.9 GiB"."""
    units = (("TiB", 2**40), ("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
    unit, size = next((one for one in units if count >= one[1]), units[-1])
    whole = unit == "B" or (unit == "MiB" and count >= 10 * size)
    return f"{count / size:.{0 if whole else 1}f} {unit}"


def nearest(name: str, allowed: Iterable[str]) -> str | None:
    """Return the entry of `allowed` most similar to `name` (case ignored), or None if none is close.

    >>> nearest("caltech", ["vtab/caltech101", "vtab/dtd"])
    'vtab/caltech101'
    """
    by_key: dict[str, str] = {}
    for entry in allowed:
        by_key.setdefault(entry.lower(), entry)
    wanted = name.lower()
    hits = difflib.get_close_matches(wanted, by_key, n=1, cutoff=0.6)
    if not hits:  # "caltech" for "vtab/caltech101": compare with the last part, and accept a unique containment
        tails = {key.rsplit("/", 1)[-1].rsplit(".", 1)[-1]: key for key in reversed(by_key)}
        tail = wanted.rsplit("/", 1)[-1].rsplit(".", 1)[-1]
        hits = [tails[hit] for hit in difflib.get_close_matches(tail, tails, n=1, cutoff=0.6)]
        if not hits and len(tail) >= 3:
            inside = [key for key in by_key if tail in key]
            hits = inside[:1]
    return by_key[hits[0]] if hits else None


def unknown_name(
    kind: str,
    name: str,
    allowed: Iterable[str],
    *,
    where: str | None = None,
    listing: str | None = None,
    error: type[SvpBenchError] = UsageError,
) -> SvpBenchError:
    """Build the error for an unknown name; the caller raises it.

    Args:
        kind: The kind of name: "task", "method", "config key".
        name: The given name.
        allowed: All valid names.
        where: Origin of the name, e.g. "configs/vtab/dtd.yaml:3".
        listing: The command that lists the valid names, e.g. "svp-bench tasks".
        error: The class to build.
    """
    names = sorted(allowed)
    text = f"{where}: unknown {kind} {name!r}" if where else f"unknown {kind} {name!r}"
    hit = nearest(name, names)
    if hit:
        text += f"; did you mean {hit!r}?"
    elif names and len(names) <= 20:
        text += f"; allowed: {', '.join(names)}"
    if listing:
        text += f" (`{listing}` lists all)"
    return error(text)
