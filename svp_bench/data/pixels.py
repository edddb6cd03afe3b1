"""Cache the images of a split, decoded and at the model's size, in a file that runs and processes map into memory.

An entry is `KEY.npy`, uint8 (N, 3, H, W), and `KEY.json` with the facts about it and a checksum of each image. The key
is a digest of the decoded images, the transform and the versions of the decoders: changed images, another size or
another Pillow have another entry, and tasks with the same images share one. `KEY.json` is written last; without it, an
entry is not read. An image is compared with its checksum whenever it is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout
from PIL.Image import Image

from svp_bench.core.atomic import open_regular, read_regular, replacing
from svp_bench.core.errors import DataError, file_size
from svp_bench.core.resources import cache_dir
from svp_bench.core.validate import convert
from svp_bench.data.content import content_digest
from svp_bench.data.decode import Decoded, decoder_version
from svp_bench.data.inspection import Examined, load_examined
from svp_bench.data.sources import Images, Note
from svp_bench.data.transforms import EvalTransform

FOLDER = "pixels"  # below the cache folder
_SCHEMA = 1
_MAX_BYTES = 2**28  # of KEY.json: eight characters an image
_WORTH_A_NOTE = 2**26  # bytes


class DamagedPixelsError(Exception):
    """A cached image is not the one that was stored; the text names the file and the image."""


class Pixels:
    """The images of an entry.

    Args:
        path: The `.npy` file.
        shape: (N, 3, H, W).
        sums: uint32 (N,), the checksum of each image.

    Raises:
        OSError: If the file cannot be read.
        DamagedPixelsError: If it does not hold an array of this shape.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], sums: npt.NDArray[np.uint32]) -> None:
        self.path, self.shape, self._sums = path, shape, sums
        header = _header(shape)
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(len(header)) != header or size != len(header) + math.prod(shape) or len(sums) != shape[0]:
                raise DamagedPixelsError(f"{path}: not uint8 {shape}, or cut short")
            mapped = np.memmap(file, np.uint8, "r", len(header), shape)
        self._array: npt.NDArray[np.uint8] = np.asarray(mapped)

    def __reduce__(self) -> tuple[Any, ...]:  # a worker process that is not forked maps the file itself
        return Pixels, (self.path, self.shape, self._sums)

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
        """Return a copy of some images, uint8 (B, 3, H, W).

        Raises:
            DamagedPixelsError: If one has another checksum than when it was stored.
        """
        images = self._array.take(positions, axis=0)
        for image, position in zip(images, positions.tolist(), strict=True):
            if _checksum(image, position) != self._sums[position]:
                raise DamagedPixelsError(f"{self.path}: image {position} has another checksum than when it was stored")
        return images


def _header(shape: tuple[int, ...]) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return buffer.getvalue()


def _checksum(image: npt.NDArray[np.uint8], position: int) -> int:
    return zlib.crc32(image.reshape(-1).data, position)  # begins with the position: images must not change places


@dataclass(frozen=True)
class Entry:
    """What is stored about an entry.

    Attributes:
        schema: Version of this form.
        task: The task that stored it; others with the same images share it.
        split: The split.
        content: "sha256:…" of the decoded images (`content_digest`).
        shape: N, 3, height, width.
        transform: Fields of the `EvalTransform`.
        decoder: See `decoder_version`.
        sums: CRC-32 of each image, eight hex digits each.
    """

    schema: int
    task: str
    split: str
    content: str
    shape: tuple[int, ...]
    transform: dict[str, Any]
    decoder: str
    sums: str


class PixelCache:
    """The entries of one task for one transform, in `pixels` below the cache folder.

    Args:
        task: Full name of the task.
        transform: From a stored image to the model's size.
        note: Called with lines about the progress.
        warn: Called with a line if an entry cannot be written or is damaged; then the images are decoded.
    """

    def __init__(self, task: str, transform: EvalTransform, note: Note, warn: Callable[[str], None]) -> None:
        self._task, self._transform, self._note, self._warn = task, transform, note, warn
        self._failed: set[str] = set()  # splits that could not be stored

    def examine(self, images: Images) -> Examined:
        """Examine images, and store them in the same pass; decode none if the findings are cached.

        Where another process does the same, its result is awaited.
        """
        state = images.state()
        if state is None:
            return images.examine(self._note)
        if (known := load_examined(state)) is not None:
            return known
        with self._writer(images, digest(state, asdict(self._transform))) as writer:
            if (known := load_examined(state)) is not None:  # by the process that was awaited
                return known
            writer.start()

            def keep(position: int, decoded: Decoded) -> None:
                if not decoded.is_deep:  # the others need the depth of all splits
                    writer.put(position, self._transform, decoded.image)

            found = images.examine(self._note, keep)
            if writer.complete:
                self._finish(writer, images, found)
            return found

    def open(self, images: Images, found: Examined) -> Pixels | None:
        """Return the cached images of a split, stored now if need be; None if they cannot be cached.

        Args:
            images: The split, its `depth` set.
            found: What examining it found.
        """
        if found.problems or images.state() is None:
            return None
        if (pixels := self._load(images, found)) is not None:
            return pixels
        key = self._key(images, found)
        with self._writer(images, key) as writer:
            if (pixels := self._load(images, found)) is not None or not writer.start():
                return pixels

            def keep(position: int, decoded: Decoded) -> None:
                writer.put(position, self._transform, images.load(position) if decoded.is_deep else decoded.image)

            now = images.examine(self._note, keep)
            unchanged = content_digest(now) == content_digest(found) and self._key(images, found) == key
            if writer.complete and unchanged:
                self._finish(writer, images, found)
            return self._load(images, found)

    def _key(self, images: Images, found: Examined) -> str:
        content: list[Any] = [_SCHEMA, content_digest(found), asdict(self._transform), decoder_version()]
        if found.whole or found.real:  # the digest of a deep image leaves out its depth and rotation
            content += [None if images.depth is None else asdict(images.depth), images.digest, images.state()]
        return digest(*content)

    def _load(self, images: Images, found: Examined) -> Pixels | None:
        with suppress(RuntimeError):  # no home, so no cache
            path = cache_dir(FOLDER) / f"{self._key(images, found)}.npy"
            try:
                return open_entry(path)[1]
            except (FileNotFoundError, NotADirectoryError):
                return None
            except OSError as error:
                self._warn(f"{path}: cannot be read ({error.strerror}); the images of {images.name} are decoded")
            except DamagedPixelsError as error:
                self._warn(f"{error}; the images of {images.name} are decoded and stored again")
                with suppress(OSError):
                    remove_entry(path)
        return None

    @contextmanager
    def _writer(self, images: Images, name: str) -> Iterator[_Writer]:
        """Yield a writer; of several processes with one name, one at a time."""
        writer = _Writer((len(images), 3, *self._transform.sides))
        with ExitStack() as stack:
            if images.name not in self._failed:
                try:
                    writer.path = cache_dir(FOLDER) / f".{name}.building"
                    writer.path.parent.mkdir(parents=True, exist_ok=True)
                    lock = FileLock(writer.path.with_suffix(".lock"))
                    try:
                        lock.acquire(timeout=0)
                    except Timeout:
                        self._note(f"waiting for another process that decodes the images of {images.name}")
                        lock.acquire()
                    stack.callback(lock.release)
                    stack.callback(writer.close)  # while the lock is held
                except (OSError, RuntimeError, NotImplementedError) as error:  # also without a home, or locks
                    writer.error = error
            yield writer
        if writer.error is not None:
            self._failed.add(images.name)
            self._warn(
                f"the images of {images.name} cannot be cached ({writer.error}), so each run decodes them again; set "
                "SVP_BENCH_CACHE to a folder on another disk, or give --data.pixel_cache false"
            )

    def _finish(self, writer: _Writer, images: Images, found: Examined) -> None:
        path = cache_dir(FOLDER) / f"{self._key(images, found)}.npy"
        entry = Entry(
            schema=_SCHEMA,
            task=self._task,
            split=images.name,
            content=content_digest(found),
            shape=writer.shape,
            transform=asdict(self._transform),
            decoder=decoder_version(),
            sums=writer.sums.astype(">u4").tobytes().hex(),
        )
        try:
            size = writer.finish(path)
            with replacing(path.with_suffix(".json")) as file:
                file.write(json.dumps(asdict(entry), indent=1).encode())
        except OSError as error:
            writer.error = error
            return
        if size >= _WORTH_A_NOTE:
            self._note(f"cached the images of {images.name} at the model's size: {file_size(size)} in {path.parent}")


class _Writer:
    """A temporary `.npy` file that threads fill with images; after an error it takes no more.

    Attributes:
        shape: (N, 3, H, W).
        path: The file; None if nothing is to be written.
        sums: uint32 (N,), the checksum of each image.
        error: What went wrong.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape = shape
        self.path: Path | None = None
        self.sums = np.zeros(shape[0], dtype=np.uint32)
        self.error: Exception | None = None
        self._file: BinaryIO | None = None
        self._start = 0
        self._left = shape[0]
        self._lock = Lock()

    def start(self) -> bool:
        """Create the file, and return whether that succeeded; what killed processes left is removed."""
        if self.path is None or self.error is not None:
            return False
        try:
            for left in self.path.parent.glob(".*.building"):
                remove_entry(left)
            need, free = math.prod(self.shape), shutil.disk_usage(self.path.parent).free
            if need > free // 2:
                raise OSError(f"{file_size(need)} is more than half of the {file_size(free)} free on its disk")
            self._file = self.path.open("wb")
            self._start = self._file.write(_header(self.shape))
        except OSError as error:
            self.error = error
        return self.error is None

    def put(self, position: int, transform: EvalTransform, image: Image) -> None:
        """Store an image."""
        if self._file is None or self.error is not None:
            return
        pixels = transform(image)
        checksum = _checksum(pixels, position)
        with self._lock:  # and not a memory map: on a full disk, writing to one kills the process
            try:
                self._file.seek(self._start + position * pixels.nbytes)
                self._file.write(pixels.data)
            except OSError as error:
                self.error = error
                return
            self.sums[position] = checksum
            self._left -= 1

    @property
    def complete(self) -> bool:
        """Whether all images are stored."""
        return self.error is None and self._left == 0

    def finish(self, path: Path) -> int:
        """Rename the complete file, and return its size; OSError if that fails."""
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self._file.name, path)
        return os.fstat(self._file.fileno()).st_size

    def close(self) -> None:
        """Close the file, and remove it if it was not renamed."""
        if self._file is not None:
            with suppress(OSError):  # of a full disk, again
                self._file.close()
            Path(self._file.name).unlink(missing_ok=True)


def digest(*parts: Any) -> str:
    """Return 32 hex digits of some JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def open_entry(path: Path) -> tuple[Entry, Pixels]:
    """Open the entry of a `.npy` file.

    Raises:
        FileNotFoundError: If there is none.
        OSError: If it cannot be read.
        DamagedPixelsError: If it is malformed or cut short. The images are not read yet.
    """
    facts = read_regular(path.with_suffix(".json"), _MAX_BYTES)
    try:
        entry: Entry = convert(json.loads(facts), Entry, path.stem, DataError)
        sums = np.frombuffer(bytes.fromhex(entry.sums), dtype=">u4")
    except (ValueError, DataError):
        raise DamagedPixelsError(f"{path.with_suffix('.json')}: not the facts of an entry") from None
    return entry, Pixels(path, entry.shape, sums)


def list_entries() -> list[tuple[Path, Entry | None, int]]:
    """Return (file, facts, bytes) of all entries; without facts, what is incomplete, damaged or being built."""
    folder = cache_dir(FOLDER)
    found: list[tuple[Path, Entry | None, int]] = []
    for path in (*sorted(folder.glob("*.npy")), *sorted(folder.glob(".*.building"))):
        with suppress(OSError):  # removed meanwhile
            size, entry = path.stat().st_size, None
            with suppress(OSError, DamagedPixelsError):
                entry = open_entry(path)[0]
            found.append((path, entry, size))
    return found


def remove_entry(path: Path) -> bool:
    """Remove an entry or an incomplete file; return False, and leave it, if a process is building it.

    Raises:
        OSError: If it cannot be removed. Runs that have mapped an entry are not disturbed.
    """
    if path.suffix == ".building":
        try:
            with FileLock(path.with_suffix(".lock"), timeout=0):
                path.unlink(missing_ok=True)
        except Timeout:
            return False
    else:
        path.with_suffix(".json").unlink(missing_ok=True)  # first: without it, nothing is read
        path.unlink(missing_ok=True)
    return True
