"""Check that a setting is one of its allowed values."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeVar

from svp_bench.core.errors import ConfigError, unknown_name

Number = TypeVar("Number", int, float)


def check_range(key: str, value: Number, interval: str) -> Number:
    """Return a number if it lies in an interval.

    Args:
        key: The config key, for the error.
        value: The number.
        interval: E.g. "[0, 1)", "(0, inf)".

    Raises:
        ConfigError: If it does not; names the allowed values.
    """
    low, high = map(float, interval[1:-1].split(","))
    open_low, open_high = interval[0] == "(", interval[-1] == ")"
    inside = (low < value if open_low else low <= value) and (value < high if open_high else value <= high)
    if inside and math.isfinite(value):
        return value
    start = f"{'above ' if open_low else ''}{low:g}"
    if high == math.inf:
        allowed = start if open_low else f"{start} and above"
    else:
        allowed = f"{start} to {'below ' if open_high else ''}{high:g}"
    raise ConfigError(f"{key} {value:g} is out of range, allowed: {allowed}")


def check_one_of(key: str, value: str | None, allowed: Iterable[str]) -> None:
    """Check that a text, unless it is None, is one of the allowed ones.

    Raises:
        ConfigError: If it is not; names the nearest.
    """
    if value is not None and value not in (names := [*allowed]):
        raise unknown_name(key, value, names, error=ConfigError)
