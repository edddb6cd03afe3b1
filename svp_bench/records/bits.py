"""One bit for each image of a list, packed into text."""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING

from svp_bench.core.errors import RecordError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


def pack_bits(right: NDArray[np.bool_]) -> str:
    """Pack booleans of shape (n,) into base64 text: eight to a byte, the first in the highest bit, zeros at the end."""
    import numpy as np

    if right.ndim != 1 or right.dtype != np.bool_:
        raise RecordError(f"bits must be booleans of one dimension, not {right.dtype} of shape {right.shape}")
    return base64.b64encode(np.packbits(right).tobytes()).decode("ascii")


def unpack_bits(text: str, count: int) -> NDArray[np.bool_]:
    """Undo `pack_bits`: return booleans of shape (count,).

    Raises:
        RecordError: If `text` is no base64, has another length than `count` bits need, or a one behind the last bit.
    """
    import numpy as np

    packed = np.frombuffer(_packed_bytes(text, count), dtype=np.uint8)
    return np.unpackbits(packed, count=count).astype(np.bool_)


def count_ones(text: str, count: int) -> int:
    """Return how many of the `count` packed bits are one; raises as `unpack_bits` does."""
    return int.from_bytes(_packed_bytes(text, count), "big").bit_count()


def _packed_bytes(text: str, count: int) -> bytes:
    try:
        packed = base64.b64decode(text.encode("ascii"), validate=True)
    except (UnicodeEncodeError, binascii.Error):
        raise RecordError("the packed bits are not base64") from None
    if len(packed) != (count + 7) // 8:
        raise RecordError(f"the packed bits are {len(packed)} bytes; {count} bits need {(count + 7) // 8}")
    padding = 8 * len(packed) - count
    if padding and packed[-1] & ((1 << padding) - 1):
        raise RecordError(f"the packed bits have a one behind bit {count}")
    return packed
