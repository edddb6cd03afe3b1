"""Read TFRecord files without TensorFlow.

Format (tensorflow.org/tutorials/load_data/tfrecord): for each record its length (uint64), the masked CRC-32C of that,
the content, and its masked CRC-32C, all little-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import google_crc32c

from svp_bench.core.atomic import open_regular
from svp_bench.core.errors import DataError

_MAX_RECORD = 2**30


def _masked(content: bytes) -> int:
    crc: int = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_records(path: Path, skip: int, take: int) -> Iterator[bytes]:
    """Yield `take` records of a file behind the first `skip`.

    Raises:
        DataError: If the file is missing, too short or damaged.
    """

    def damaged(what: str) -> DataError:
        return DataError(f"{path}: record {number} {what}; get the file again")

    try:
        with open_regular(path) as file:
            for number in range(skip + take):
                head = file.read(12)
                if len(head) < 12:
                    raise damaged(f"of {skip + take} is missing")
                length, check = struct.unpack("<QI", head)
                if _masked(head[:8]) != check or length > _MAX_RECORD:
                    raise damaged("has a damaged length")
                if number < skip:
                    file.seek(length + 4, 1)
                    continue
                body = file.read(length + 4)
                if len(body) < length + 4:
                    raise damaged("is cut off")
                if _masked(body[:-4]) != int.from_bytes(body[-4:], "little"):
                    raise damaged("has another checksum than it states")
                yield body[:-4]
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
