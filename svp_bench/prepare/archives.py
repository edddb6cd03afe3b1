"""Read zip and tar archives that may be hostile.

Every name is checked before anything is read, and what is read is counted: sizes that an archive states are not
trusted. Links, devices, encrypted entries, names that leave the folder, and two names that are one file on some file
system refuse the whole archive. Nothing is extracted here: `Archive.read` yields bytes, and the caller writes them.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import stat
import struct
import tarfile
import tempfile
import unicodedata
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from svp_bench.core.atomic import open_regular
from svp_bench.core.errors import DataError, SvpBenchError, file_size, plural, show
from svp_bench.data.reading import readable
from svp_bench.data.split_files import plain_path
from svp_bench.prepare.stage import RefusedError

SUFFIXES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
MAX_ENTRIES = 1_000_000
MAX_FILE_BYTES = 2**29  # of one file; an image of the largest size that is decoded has as much
MAX_RATIO = 200  # of bytes read to bytes stored: images reach 20, lists 30
_FREE_BYTES = 2**26  # that may be read at any ratio
_MAX_NAME = 1000  # characters
_CHUNK = 2**18
_MAX_READ = 2**24  # at a time: tarfile reads a long header in one piece
_MAX_DEPTH = 2  # an archive in an archive

# Names that need no closer look: most of a million.
_PLAIN = re.compile(r"(?:(?!\.{1,2}/)[A-Za-z0-9_.-]+/)*(?!\.{1,2}\Z)[A-Za-z0-9_.-]+")
_DAMAGE = (
    *(zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, struct.error),
    *(EOFError, RuntimeError, ValueError, OverflowError),
)


class Archive(ABC):
    """The files in an archive.

    Attributes:
        label: The archive in messages: its path, and for one in another both.
        sizes: Path of each file → size in bytes as stated, in stored order.
        skipped: Number of entries that macOS adds (`__MACOSX`, `.DS_Store`, `._name`), which are no files of the data.
    """

    def __init__(self, file: BinaryIO, label: str, depth: int) -> None:
        self.label = label
        self.sizes: dict[str, int] = {}
        self.skipped = 0
        self._file = file
        self._depth = depth
        self._stored = file.seek(0, 2)
        file.seek(0)
        self._limit = _FREE_BYTES + MAX_RATIO * self._stored
        self._seen: dict[str, str] = {}  # name as file systems may compare it → name
        self._entries = 0
        with _refusing(label):
            self._list()
        self._check_folders()

    @abstractmethod
    def _list(self) -> None:
        """Check all entries, and note the files (`_note`)."""

    @abstractmethod
    def _chunks(self, name: str) -> Iterator[bytes]:
        """Yield the content of a file."""

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Yield (name, its content in parts), in stored order, which a compressed archive reads once.

        Raises:
            RefusedError: If a file is damaged, or larger than allowed or stated.
        """
        wanted = {*names}
        for name in [name for name in self.sizes if name in wanted]:
            yield name, self._counted(name, MAX_FILE_BYTES)

    def nested(self, name: str, folder: Path) -> Archive:
        """Open an archive in this one, from an unnamed temporary file in `folder`.

        Raises:
            RefusedError: As `open_archive`, or if there are archives in archives in archives.
        """
        if self._depth >= _MAX_DEPTH:
            raise RefusedError(f"{self.label}: {show(name)} is an archive in an archive in an archive; unpack it")
        folder.mkdir(parents=True, exist_ok=True)
        file = cast(BinaryIO, tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  the archive closes it
        try:
            for chunk in self._counted(name, self._limit):
                file.write(chunk)
            return _opened(file, f"{self.label}/{name}", self._depth + 1)
        except BaseException:
            file.close()
            raise

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _counted(self, name: str, limit: int) -> Iterator[bytes]:
        stated, count = self.sizes[name], 0
        where = f"{self.label}: {show(name)}"
        with _refusing(where):
            for chunk in self._chunks(name):
                count += len(chunk)
                if count > min(limit, stated):
                    what = "than it states" if count > stated else f"than {file_size(limit)}"
                    raise RefusedError(f"{where} is larger {what}; the archive is hostile or damaged")
                yield chunk
        if count != stated:
            raise RefusedError(f"{where} has {count} bytes, it states {stated}; the archive is truncated or damaged")

    # --- entries

    def _refused(self, name: object, reason: str) -> RefusedError:
        return RefusedError(f"{self.label}: the entry {show(name)} {reason}; the archive is refused")

    def _plain(self, name: str) -> str:
        """Count an entry, and return its name in plain spelling; "" for the top folder."""
        self._entries += 1
        if self._entries > MAX_ENTRIES:
            raise RefusedError(f"{self.label}: more than {MAX_ENTRIES:,} entries; the archive is refused")
        if _PLAIN.fullmatch(name) and len(name) <= _MAX_NAME:
            return name
        if len(name) > _MAX_NAME:
            raise self._refused(name, f"has a name of {len(name)} characters")
        if "\\" in name:
            raise self._refused(name, "has a backslash in its name")
        if name.endswith("/"):
            name = name.rstrip("/") or "/"
        if name in (".", ""):
            return ""
        try:
            return plain_path(name, f"{self.label}: the entry")
        except DataError as error:
            raise RefusedError(f"{error}; the archive is refused") from None

    def _note(self, raw: str, size: int) -> str | None:
        """Note a file, and return its plain name; None if it is skipped."""
        name = self._plain(raw)
        if not name:
            raise self._refused(raw, "is a file without a name")
        parts = name.split("/")
        if "__MACOSX" in parts or parts[-1] == ".DS_Store" or parts[-1].startswith("._"):
            self.skipped += 1
            return None
        if size < 0:
            raise self._refused(raw, f"states a size of {size}")
        same = self._seen.setdefault(_folded(name), name)
        if name in self.sizes or same != name:
            also = "" if same == name else f" (as {show(same)})"
            raise self._refused(raw, f"is there twice{also}, or is one file with another on some file systems")
        self.sizes[name] = size
        return name

    def _check_folders(self) -> None:
        """Refuse a name that is both a file and the folder of another."""
        folders: set[str] = set()
        for folded in self._seen:
            above = folded.rpartition("/")[0]
            while above and above not in folders:
                folders.add(above)
                above = above.rpartition("/")[0]
        if both := folders & self._seen.keys():
            raise self._refused(self._seen[min(both)], "is a file and a folder")


class _Zip(Archive):
    def _list(self) -> None:
        self._read_in_all = 0
        self._infos: dict[str, zipfile.ZipInfo] = {}
        try:
            self._zip = zipfile.ZipFile(self._file)
        except UnicodeDecodeError as error:
            raise self._refused(error.object, "has a name that is not UTF-8") from None
        for info in self._zip.infolist():
            raw = info.orig_filename  # `filename` ends at a NUL, and has the separators of the machine
            if not raw.isascii() and not info.flag_bits & 0x800:  # zipfile took the bytes for code page 437
                try:
                    raw = raw.encode("cp437").decode()
                except UnicodeError:
                    raise self._refused(raw, "has a name that is not UTF-8") from None
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise self._refused(raw, "is a link" if kind == stat.S_IFLNK else "is not a file")
            if raw.endswith("/") or kind == stat.S_IFDIR:
                self._plain(raw)
                continue
            if info.flag_bits & 0x41:
                raise self._refused(raw, "is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise self._refused(raw, f"is compressed by method {info.compress_type}, not 0 or 8 (deflate)")
            name = self._note(raw, info.file_size)
            if name is not None:
                self._infos[name] = info

    def _chunks(self, name: str) -> Iterator[bytes]:
        info = self._infos[name]
        limit, count = _FREE_BYTES // 4 + MAX_RATIO * info.compress_size, 0
        with self._zip.open(info) as file:
            while chunk := file.read(_CHUNK):
                count += len(chunk)
                self._read_in_all += len(chunk)
                if count > limit or self._read_in_all > self._limit:  # entries may share what is stored
                    raise RefusedError(
                        f"{self.label}: {show(name)} grows to more than {MAX_RATIO} times what is stored; "
                        "the archive is a decompression bomb"
                    )
                yield chunk


class _Tar(Archive):
    """A tar archive; its entries are found by tarfile, and read from the places that it found."""

    def __init__(self, file: BinaryIO, label: str, depth: int, stream: IO[bytes]) -> None:
        self._stream = _Bounded(stream, label)
        self._places: dict[str, int] = {}
        super().__init__(file, label, depth)

    def _list(self) -> None:
        self._stream.limit = self._limit
        end = -1
        try:
            tar = tarfile.open(  # noqa: SIM115  closing it would close nothing
                fileobj=cast(Any, self._stream), mode="r:", encoding="utf-8", errors="surrogateescape"
            )
        except tarfile.ReadError as error:
            raise RefusedError(f"{self.label}: not a zip or tar archive, or damaged ({error}); get it again") from None
        while (member := tar.next()) is not None:
            cast(Any, tar).members = []  # tarfile would hold a million
            if member.isdir():
                self._plain(member.name)
            elif member.issparse():
                raise self._refused(member.name, "is a sparse file")
            elif not member.isreg():
                raise self._refused(member.name, "is a link" if member.issym() or member.islnk() else "is not a file")
            elif (name := self._note(member.name, member.size)) is not None:
                self._places[name] = member.offset_data
            if cast(Any, tar).offset <= end:
                raise self._refused(member.name, "leads back to earlier ones")
            end = cast(Any, tar).offset
        # tarfile takes a header that is cut or damaged for the end.
        self._stream.seek(cast(Any, tar).offset)
        if self._stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise RefusedError(f"{self.label}: truncated or damaged after {plural(self._entries, 'entry', 'entries')}")
        while self._stream.read(_CHUNK):  # the checksum of the compressed stream comes last
            pass

    def _chunks(self, name: str) -> Iterator[bytes]:
        place, left = self._places[name], self.sizes[name]
        while left:
            self._stream.seek(place)  # files may be read in turns
            chunk = self._stream.read(min(left, _CHUNK))
            if not chunk:
                return
            place += len(chunk)
            left -= len(chunk)
            yield chunk

    def close(self) -> None:
        self._stream.file.close()
        super().close()


class _Bounded:
    """A stream that refuses to be read behind `limit`, or in pieces as large as a hostile header asks for."""

    def __init__(self, file: IO[bytes], label: str) -> None:
        self.file = file
        self.limit = 0
        self._label = label

    def _check(self, place: int) -> None:
        if place > self.limit:
            raise RefusedError(
                f"{self._label}: grows to more than {file_size(self.limit)}, {MAX_RATIO} times what is stored; "
                "the archive is a decompression bomb, or states a wrong size"
            )

    def read(self, count: int) -> bytes:
        if not 0 <= count <= _MAX_READ:
            raise RefusedError(f"{self._label}: a header of {count} bytes; the archive is hostile or damaged")
        chunk = self.file.read(count)
        self._check(self.file.tell())
        return chunk

    def seek(self, place: int) -> int:
        self._check(place)
        return self.file.seek(place)

    def tell(self) -> int:
        return self.file.tell()


def open_archive(path: Path) -> Archive:
    """Open a zip or tar archive (also .tar.gz, .tar.bz2 and .tar.xz), by its content, and check all its names.

    Raises:
        DataError: If it cannot be read.
        RefusedError: If it is not an archive of these kinds, is damaged or truncated, or has an entry that is not
            allowed; names the first.
    """
    with readable(path):
        file = open_regular(path)
    try:
        return _opened(file, str(path), 1)
    except BaseException:
        file.close()
        raise


def is_archive(name: str) -> bool:
    """Return whether a file has the name of an archive."""
    return name.lower().endswith(SUFFIXES)


def stem(name: str) -> str:
    """Return the name of an archive without folders and ending: "vtab-1k" of "a/vtab-1k.tar.gz"."""
    base = name.rpartition("/")[2]
    ending = max((suffix for suffix in SUFFIXES if base.lower().endswith(suffix)), key=len, default="")
    return base[: len(base) - len(ending)]


def _opened(file: BinaryIO, label: str, depth: int) -> Archive:
    file.seek(0)
    with _refusing(label):
        head = file.read(512)
        file.seek(0)
        if head[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
            return _Zip(file, label, depth)
        if head.lstrip()[:1] == b"<":
            raise RefusedError(
                f"{label}: a web page, not an archive: its server asks for a confirmation or a login; use a browser"
            )
        if head[:2] == b"\x1f\x8b":
            return _Tar(file, label, depth, cast(IO[bytes], gzip.GzipFile(fileobj=file)))
        if head[:3] == b"BZh":
            return _Tar(file, label, depth, bz2.BZ2File(file))
        if head[:6] == b"\xfd7zXZ\x00":
            return _Tar(file, label, depth, lzma.LZMAFile(file))
        return _Tar(file, label, depth, file)


@contextmanager
def _refusing(where: str) -> Iterator[None]:
    """Turn any error of a library that reads an archive into one line."""
    try:
        yield
    except SvpBenchError:
        raise
    except OSError as error:
        if error.errno is not None:
            raise DataError(f"{where}: cannot be read ({error.strerror})") from None
        raise RefusedError(f"{where}: damaged or truncated ({error}); get it again") from None
    except _DAMAGE as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RefusedError(f"{where}: damaged or truncated ({reason}); get it again") from None


def _folded(name: str) -> str:
    """Return what a file system that ignores case and spelling of accents compares."""
    if name.isascii():
        return name.lower()
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())
