"""Convert parsed JSON or YAML into typed objects, with errors of one line that name the key."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

from svp_bench.core.errors import SvpBenchError, show, unknown_name

T = TypeVar("T")
Keys = tuple[str | int, ...]

Text = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]
Finite = Annotated[float, Meta(ge=-1.7e308, le=1.7e308)]
Digest = Annotated[str, Meta(pattern=r"^sha256:[0-9a-f]{64}$", description="'sha256:' and 64 hexadecimal digits")]


def convert(
    data: Any,
    kind: type[T],
    where: str | Callable[[Keys], str],
    error: type[SvpBenchError] = SvpBenchError,
    what: str = "object",
) -> T:
    """Return `data` as an object of the dataclass `kind`.

    Args:
        data: Parsed JSON or YAML.
        kind: A dataclass; its annotations may carry `msgspec.Meta` constraints, whose description words the error.
        where: Begins each error, e.g. "file.json"; or a function that returns this for the keys that lead to the error.
        error: The class of errors.
        what: Names the object in errors, e.g. "record".

    Raises:
        SvpBenchError: Of class `error`, on an unknown key (with the nearest match), a missing key or a wrong value.
    """

    def place(keys: Keys) -> str:
        return where if isinstance(where, str) else where(keys)

    if not isinstance(data, Mapping):
        raise error(f"{place(())}: the {what} must be a mapping of keys, not {show(data)}")
    for keys, known in _unknown(data, kind, ()):
        raise unknown_name(f"{what} key", _dotted(keys), known, where=place(keys), error=error)
    try:
        return msgspec.convert(data, kind, strict=True)
    except msgspec.ValidationError as problem:
        keys, sentence = _problem(data, kind, (), str(problem))
        raise error(f"{place(keys)}: {sentence}") from None


@cache
def _plain(annotation: Any) -> Any:
    """Return an annotation without `Annotated` and `| None`."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        rest = [item for item in get_args(annotation) if item is not type(None)]
        return _plain(rest[0]) if len(rest) == 1 else annotation
    return annotation


def _parts(data: Any, annotation: Any) -> Iterator[tuple[str | int, Any, Any]]:
    """Yield (key, value, annotation) of each value in a dataclass, mapping or list; Ellipsis for an unknown key."""
    kind = _plain(annotation)
    if isinstance(data, Mapping) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        hints = _hints(kind)
        yield from ((key, value, hints.get(key, ...)) for key, value in data.items())
    elif isinstance(data, Mapping) and get_origin(kind) in (dict, Mapping):
        key_kind, value_kind = get_args(kind)
        for key, value in data.items():
            yield key, key, key_kind
            yield key, value, value_kind
    elif isinstance(data, list | tuple) and get_origin(kind) in (list, tuple, Sequence):
        yield from ((index, value, get_args(kind)[0]) for index, value in enumerate(data))


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


@cache
def _inner(kind: type) -> list[tuple[str, Any]]:
    """Return the fields of a dataclass that can hold further dataclasses, with their annotations."""
    return [(name, annotation) for name, annotation in _hints(kind).items() if _holds_dataclass(annotation)]


@cache
def _holds_dataclass(annotation: Any) -> bool:
    """Return whether a value of this annotation can hold keys that a dataclass has to know."""
    kind = _plain(annotation)
    return dataclasses.is_dataclass(kind) or any(map(_holds_dataclass, get_args(kind)))


def _unknown(data: Any, kind: Any, keys: Keys) -> Iterator[tuple[Keys, list[str]]]:
    """Yield the keys that lead to each key which its dataclass lacks, and what that has."""
    if not _holds_dataclass(kind):
        return
    kind = _plain(kind)
    known = _hints(kind).keys() if isinstance(kind, type) and dataclasses.is_dataclass(kind) else ()
    if isinstance(data, dict) and known and data.keys() <= known:  # as usual
        for name, annotation in _inner(kind):
            if name in data:
                yield from _unknown(data[name], annotation, (*keys, name))
        return
    for key, value, annotation in _parts(data, kind):
        if annotation is ...:
            yield (*keys, key), [*_hints(_plain(kind))]
        else:
            yield from _unknown(value, annotation, (*keys, key))


def _problem(data: Any, annotation: Any, keys: Keys, message: str) -> tuple[Keys, str]:
    """Return the keys that lead to the innermost wrong value, and: key, what it must be, what it is."""
    for key, value, kind in _parts(data, annotation):
        try:
            msgspec.convert(value, kind, strict=True)
        except msgspec.ValidationError as problem:
            return _problem(value, kind, (*keys, key), str(problem))
    if missing := re.match(r"Object missing required field `(\w+)`", message):
        return keys, f"the key {_dotted((*keys, missing[1]))!r} is missing"
    wanted = _wanted(annotation) or message.partition(", got")[0].replace("`", "").replace("Expected ", "")
    for term, words in (("object", "a mapping of keys"), ("array", "a list"), ("|", "or")):
        wanted = re.sub(rf"(?<!\w){re.escape(term)}(?!\w)", words, wanted)
    return keys, f"{_dotted(keys)!r} must be {wanted}, not {show(data)}"


def _dotted(keys: Keys) -> str:
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in keys).lstrip(".")


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
