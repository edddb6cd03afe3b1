"""Output for any terminal: replacements for characters that its encoding lacks, and a plain text console."""

from __future__ import annotations

import codecs
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_HANDLER = "svp-bench-ascii"  # name of the codec error handler
_ASCII = {
    "…": "...",
    "–": "-",
    "—": "-",
    "−": "-",
    "×": "x",
    "±": "+/-",
    "·": "*",
    "≥": ">=",
    "≤": "<=",
    "≈": "~",
    "→": "->",
    "←": "<-",
    "•": "*",
    "‘": "'",
    "’": "'",
    "“": '"',
    "”": '"',
    "²": "^2",
    "√": "sqrt",
    "\u00a0": " ",
    **dict.fromkeys("─━═", "-"),
    **dict.fromkeys("│┃║", "|"),
    **dict.fromkeys("┌┐└┘├┤┬┴┼┏┓┗┛┡┩╇", "+"),
    **dict.fromkeys("█▉▊▋▌▍▎▏", "#"),
}


def ascii_for(text: str) -> str:
    """Return the text in ASCII: typographic signs by usual replacements, others as Python's escapes."""
    return "".join(_ASCII.get(char) or char.encode("ascii", "backslashreplace").decode("ascii") for char in text)


def _replace(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return ascii_for(error.object[error.start : error.end]), error.end


def readable_output() -> None:
    """Replace characters that the encoding of standard output or error lacks, instead of raising."""
    codecs.register_error(_HANDLER, _replace)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # tests and notebooks replace the streams
            stream.reconfigure(errors=_HANDLER)


def has_width(stream: TextIO) -> bool:
    """Whether a stream is a terminal that states its width, as progress bars need."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except (OSError, ValueError):
        return False


def plain_console() -> Console:
    """Return a rich console without markup and emoji, for text with brackets and colons."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)
