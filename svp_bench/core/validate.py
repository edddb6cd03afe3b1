"""Convert parsed JSON or YAML into typed objects, with errors of one line that name the key."""

from __future__ import annotations

import dataclasses
import re
import reprlib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from svp_bench.core.errors import SvpBenchError, unknown_name

__all__ = ["Count", "Digest", "Finite", "Positive", "Text", "convert"]

T = TypeVar("T")

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Finite = Annotated[float, Meta(ge=-1.7e308, le=1.7e308)]
Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$", description="'sha256:' and 64 hexadecimal digits")]

_AT = re.compile(r"(?P<what>.*?)(?: - at `\$(?P<path>[^`]*)`)?$", re.DOTALL)
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


def convert(
    data: Any, kind: type[T], where: str, error: type[SvpBenchError] = SvpBenchError, what: str = "object"
) -> T:
    """Return `data` as an object of the dataclass `kind`.

    Args:
        data: Parsed JSON or YAML.
        kind: A dataclass; its annotations may carry `msgspec.Meta` constraints, whose description words the error.
        where: Begins each error, e.g. "file.json".
        error: The class of errors.
        what: Names the object in errors, e.g. "record".

    Raises:
        SvpBenchError: Of class `error`, on an unknown key (with the nearest match), a missing key or a wrong value.
    """
    if not isinstance(data, Mapping):
        raise error(f"{where}: the {what} must be a JSON object, not {_short.repr(data)}")
    for prefix, key, known in _unknown(data, kind, ""):
        raise unknown_name(f"{what} key", f"{prefix}{key}", known, where=where, error=error)
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as problem:
        raise error(f"{where}: {_sentence(str(problem), data, kind)}") from None


def _plain(annotation: Any) -> Any:
    """Return an annotation without `Annotated` and `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [item for item in get_args(annotation) if item is not type(None)]
        return _plain(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _unknown(data: Any, kind: Any, prefix: str) -> Iterator[tuple[str, str, list[str]]]:
    """Yield (prefix, key, known keys) of each key of nested objects that their dataclass lacks."""
    if isinstance(data, list) and get_args(kind):
        for index, item in enumerate(data):
            yield from _unknown(item, _plain(get_args(kind)[0]), f"{prefix.rstrip('.')}[{index}].")
    if not (isinstance(data, Mapping) and dataclasses.is_dataclass(kind)):
        return
    hints = get_type_hints(kind)
    for key, value in data.items():
        if key not in hints:
            yield prefix, str(key), list(hints)
        else:
            yield from _unknown(value, _plain(hints[key]), f"{prefix}{key}.")


def _sentence(message: str, data: Any, kind: type) -> str:
    """Return msgspec's message as: key, what it must be, what it is."""
    found = _AT.match(message)
    assert found is not None
    path = re.findall(r"\.(\w+)|\[(\d+|\.\.\.)\]", found["path"] or "")
    if missing := re.search(r"missing required field `(\w+)`", found["what"]):
        key = "".join(f".{name}" if name else f"[{index}]" for name, index in [*path, (missing[1], "")]).lstrip(".")
        return f"the key {key!r} is missing"
    value, annotation, wanted = data, kind, ""
    for name, index in path:
        if name and isinstance(value, Mapping):
            inner = _plain(annotation)
            hints = get_type_hints(inner, include_extras=True) if dataclasses.is_dataclass(inner) else {}
            value, annotation = value.get(name), hints.get(name, Any)
        elif index.isdigit() and isinstance(value, Sequence) and int(index) < len(value):
            value = value[int(index)]
    wanted = _wanted(annotation) or found["what"].partition(", got")[0].replace("`", "").replace("Expected ", "")
    key = "".join(f".{name}" if name else f"[{index}]" for name, index in path).lstrip(".")
    if key.endswith("[...]"):  # msgspec does not name the key of a mapping
        return f"{key.removesuffix('[...]')!r} must hold values of {wanted}, not {_short.repr(value)}"
    return f"{key!r} must be {wanted}, not {_short.repr(value)}"


def _wanted(annotation: Any) -> str:
    """Return the words of an annotation: the description of its `Meta`, or the values of a `Literal`."""
    for item in (annotation, *(get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ())):
        null = " or null" if item is not annotation and type(None) in get_args(annotation) else ""
        if get_origin(item) is Literal:
            return f"one of {', '.join(map(str, get_args(item)))}{null}"
        for meta in get_args(item)[1:] if get_origin(item) is Annotated else ():
            if isinstance(meta, Meta) and meta.description:
                return f"{meta.description}{null}"
    return ""
