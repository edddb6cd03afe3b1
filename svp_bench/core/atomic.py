"""Write files atomically, and read only regular files, which neither block nor are endless."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

_KINDS = (
    (stat.S_ISDIR, errno.EISDIR, "a folder, not a file"),
    (stat.S_ISFIFO, errno.EINVAL, "a FIFO, not a file"),
    (stat.S_ISSOCK, errno.EINVAL, "a socket, not a file"),
    (stat.S_ISCHR, errno.EINVAL, "a device, not a file"),
    (stat.S_ISBLK, errno.EINVAL, "a device, not a file"),
)


def open_regular(path: Path | str) -> BinaryIO:
    """Open a regular file for reading; links are followed.

    Raises:
        OSError: If it cannot be opened, or is a folder, FIFO, socket or device (see `strerror`).
    """
    _refuse_other_kinds(path, os.stat(path).st_mode)
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _refuse_other_kinds(path, os.fstat(handle).st_mode)  # it may have been replaced
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _refuse_other_kinds(path: Path | str, mode: int) -> None:
    for of_this_kind, number, words in _KINDS:
        if of_this_kind(mode):
            raise OSError(number, words, str(path))


def read_regular(path: Path | str, limit: int) -> bytes:
    """Return the content of a regular file of at most `limit` bytes.

    Raises:
        OSError: As `open_regular`, or if the file is larger.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"more than {limit / 2**20:g} MiB", str(path))
    return content


def file_digest(path: Path | str, algorithm: str = "sha256") -> str:
    """Return the digest of a regular file, e.g. "sha256:…".

    Raises:
        OSError: As `open_regular`.
    """
    state = hashlib.new(algorithm, usedforsecurity=False)
    with open_regular(path) as file:
        while chunk := file.read(2**20):
            state.update(chunk)
    return f"{algorithm}:{state.hexdigest()}"


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[BinaryIO]:
    """Yield a temporary file in the folder of `path` and rename it to `path` at the end of the block.

    If the process or the machine dies, `path` is the old or the new file. Missing folders are created. The temporary
    file begins with a dot and is removed if the block raises.

    Args:
        path: The file.
        durable: Wait until the disk has it. Without, only the death of the machine can
            leave `path` empty; for many files that are synchronised together later (`os.sync`).

    Raises:
        OSError: If the folder or the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with temporary.open("xb") as file:
            yield file
            file.flush()
            if durable:
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open folders; the rename is durable there with the file
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
