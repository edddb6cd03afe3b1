"""Strict, plain YAML with line numbers: what cards and configs are read with.

No tags, no key given twice, no merge keys; each mistake is an error whose text begins with "file:line:".
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import Reader
from yaml.resolver import Resolver

from svp_bench.core.atomic import read_regular
from svp_bench.core.errors import CardError, SvpBenchError, nearest, unknown_name

__all__ = ["Node", "check_value", "did_you_mean", "read_text", "read_yaml", "show"]

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is some ten times faster
_RESOLVER: Any = Resolver()
_SCALARS = SafeConstructor()
_PLAIN = "tag:yaml.org,2002:"
_MAX_DEPTH = 16
_MAX_BYTES = 4 * 2**20
_MAX_VALUES = 100_000  # of a file, each alias counted with all that it stands for
_SHORT = reprlib.Repr()
_SHORT.maxstring = 60


def show(value: object) -> str:
    """Return a short repr: an error stays one line."""
    return _SHORT.repr(value)


@dataclass(frozen=True)
class Node:
    """A YAML value, the line it stands on (that of its key, if it has one), and typed ways to take it apart."""

    path: Path
    line: int
    label: str  # the key, or what stands for it in a message
    value: Any  # plain Python: dict, list, str, int, float, bool, None
    children: dict[str, Node] | list[Node] | None = None
    error_class: type[SvpBenchError] = CardError

    def error(self, text: str) -> SvpBenchError:
        """Return the error `text` at this place."""
        return self.error_class(f"{self.path}:{self.line}: {text}")

    @property
    def kind(self) -> str:
        """What the value is, in the writer's words."""
        words = {dict: "a mapping", list: "a list", type(None): "empty"}
        return words.get(type(self.value)) or show(self.value)

    def mapping(self, pattern: re.Pattern[str] | None = None) -> dict[str, Node]:
        """Return the entries of a mapping with at least one; its keys fit `pattern`."""
        if not isinstance(self.children, dict) or not self.children:
            raise self.error(f"{self.label} must be a mapping with at least one entry, not {self.kind}")
        for key, child in self.children.items():
            if pattern and not pattern.fullmatch(key):
                raise child.error(f"key {show(key)} in {self.label} may hold only a-z, 0-9, _ and -")
        return self.children

    def keys(self, required: Sequence[str], optional: Iterable[str]) -> dict[str, Node]:
        """Return the entries of a mapping that has all of `required` and else only some of `optional`."""
        if not isinstance(self.children, dict):
            raise self.error(f"{self.label} must be a mapping, not {self.kind}")
        allowed = [*required, *optional]
        for key, child in self.children.items():
            if key not in allowed:
                hint = did_you_mean(key, [other for other in allowed if other not in self.children])
                raise child.error(
                    f"unknown key {show(key)} in {self.label}{hint or '; allowed: ' + ', '.join(allowed)}"
                )
        for key in required:
            if key not in self.children:
                raise self.error(f"{self.label} lacks the key {key!r}")
        return self.children

    def sequence(self) -> list[Node]:
        """Return the entries of a list with at least one."""
        if not isinstance(self.children, list) or not self.children:
            raise self.error(f"{self.label} must be a list with at least one entry, not {self.kind}")
        return self.children

    def text(self, pattern: re.Pattern[str] | None = None, what: str = "a line of text") -> str:
        """Return a text of one line without outer blanks that fits `pattern`."""
        text = self.prose()
        if text != self.value or len(text.splitlines()) > 1 or (pattern and not pattern.fullmatch(text)):
            raise self.error(f"{self.label} must be {what}, not {show(self.value)}")
        return text

    def prose(self) -> str:
        """Return a text that is not blank, without outer blanks."""
        if not isinstance(self.value, str) or not self.value.strip():
            quotes = " (put it in quotes?)" if isinstance(self.value, (bool, int, float)) else ""
            raise self.error(f"{self.label} must be a text, not {self.kind}{quotes}")
        return self.value.strip()

    def positive(self) -> int:
        """Return a whole number of at least 1."""
        if not isinstance(self.value, int) or isinstance(self.value, bool) or self.value < 1:
            raise self.error(f"{self.label} must be a whole number of at least 1, not {self.kind}")
        return self.value

    def one_of(self, allowed: Iterable[str], kind: str) -> str:
        """Return a text that is one of `allowed`."""
        allowed = list(allowed)
        text = self.prose()
        if text not in allowed:
            raise unknown_name(kind, text, allowed, where=f"{self.path}:{self.line}", error=self.error_class)
        return text


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return "; did you mean …?", or nothing if no name is near."""
    hit = nearest(name, allowed)
    return f"; did you mean {hit!r}?" if hit else ""


def read_text(path: Path, error_class: type[SvpBenchError] = CardError) -> str:
    """Return the UTF-8 text of a file, without a byte-order mark."""
    try:
        raw = read_regular(path, _MAX_BYTES)
    except (OSError, ValueError) as error:  # a ValueError for a NUL in the path
        raise error_class(f"{path}:1: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise error_class(f"{path}:{line}: not UTF-8 text; save the file as UTF-8") from None


def read_yaml(path: Path, *, error: type[SvpBenchError] = CardError, label: str = "the card") -> Node:
    """Read one YAML file into a mapping node.

    Args:
        path: The file.
        error: What to raise, from here and from the node's own checks.
        label: What the file holds, in a message.

    The tree is built from the parser's events rather than by a loader: so explicit tags are seen (and refused), a key
    given twice is an error and not a silent overwrite, every value keeps its line, and an alias can only name what is
    complete, which leaves no way to make a value contain itself.
    """
    return _parse(path, read_text(path, error), error, label)


def check_value(text: str, where: str, error: type[SvpBenchError] = CardError) -> None:
    """Refuse a text that a YAML loader would blow up: one with aliases, or nested too deeply.

    Args:
        text: The text that another loader will read, e.g. a value of the command line.
        where: What it is, for the message.
        error: What to raise.
    """
    anchors, depth = set(), 0
    try:
        for event in yaml.parse(text, Loader=_LOADER):
            if isinstance(event, yaml.AliasEvent) and event.anchor in anchors:  # others are a text: "*.jpg"
                raise error(f"{where}: the alias *{event.anchor} is not allowed here; write the value out")
            anchors.add(getattr(event, "anchor", None))
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _MAX_DEPTH:
                raise error(f"{where}: nested deeper than {_MAX_DEPTH} levels")
    except yaml.YAMLError:
        return  # not YAML: a text


def _parse(path: Path, text: str, error_class: type[SvpBenchError], label: str) -> Node:
    if bad := Reader.NON_PRINTABLE.search(text):
        line = text.count("\n", 0, bad.start()) + 1
        raise error_class(f"{path}:{line}: the character {bad.group()!r} is not allowed in YAML")
    anchors: dict[str, _Anchored] = {}
    try:
        events: Iterator[Any] = (event for event in yaml.parse(text, Loader=_LOADER) if not isinstance(event, _FRAME))
        first = next(events, None)
        if first is None:
            raise error_class(f"{path}:1: the file is empty")
        card = _build(path, first, events, anchors, error_class, depth=0, count=_Count()).node
        if (second := next(events, None)) is not None:
            raise error_class(f"{path}:{second.start_mark.line + 1}: a second YAML document; write one document a file")
    except yaml.YAMLError as problem:
        mark: Any = getattr(problem, "problem_mark", None)
        words = " ".join(str(getattr(problem, "problem", None) or problem).split())
        raise error_class(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {words}") from None
    return replace(card, line=1, label=label)


_FRAME = (yaml.StreamStartEvent, yaml.StreamEndEvent, yaml.DocumentStartEvent, yaml.DocumentEndEvent)


@dataclass(frozen=True)
class _Anchored:
    """A value, and how much it holds.

    Attributes:
        node: The value.
        values: The values in it, itself included.
        height: Levels below it.
    """

    node: Node
    values: int
    height: int


@dataclass
class _Count:
    """The values of a file so far, each alias counted with all that it stands for."""

    values: int = 0


def _build(
    path: Path,
    event: Any,
    events: Iterator[Any],
    anchors: dict[str, _Anchored],
    error_class: type[SvpBenchError],
    depth: int,
    count: _Count,
) -> _Anchored:
    line = event.start_mark.line + 1

    def fail(text: str) -> SvpBenchError:
        return error_class(f"{path}:{line}: {text}")

    def need_bounds(values: int, height: int) -> None:
        if depth + height > _MAX_DEPTH:
            raise fail(f"nested deeper than {_MAX_DEPTH} levels")
        count.values += values
        if count.values > _MAX_VALUES:
            raise fail(f"more than {_MAX_VALUES:,} values, each alias counted with all that it stands for")

    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise fail(f"alias *{event.anchor} names no complete value above it")
        known = anchors[event.anchor]
        need_bounds(known.values, known.height)
        return replace(known, node=replace(known.node, line=line))
    if event.tag is not None:
        raise fail(f"tag {show(event.tag.replace(_PLAIN, '!!'))} is not allowed; write plain YAML")
    need_bounds(1, 0)

    def build(part: Any) -> _Anchored:
        return _build(path, part, events, anchors, error_class, depth + 1, count)

    node: Node
    parts: list[_Anchored] = []
    if isinstance(event, yaml.ScalarEvent):
        node = Node(path, line, "the value", _scalar(event, fail), None, error_class)
    elif isinstance(event, yaml.SequenceStartEvent):
        while not isinstance(part := next(events), yaml.SequenceEndEvent):
            parts.append(build(part))
        items = [replace(item.node, label="an entry of the list") for item in parts]
        node = Node(path, line, "the list", [item.value for item in items], items, error_class)
    else:
        entries: dict[str, Node] = {}
        while not isinstance(part := next(events), yaml.MappingEndEvent):
            key, value = build(part).node, build(next(events))
            parts.append(value)
            if not isinstance(key.value, str):
                raise key.error(f"a key must be a text, not {key.kind} (put it in quotes?)")
            if key.value in entries:
                raise key.error(f"key {show(key.value)} is given twice (first on line {entries[key.value].line})")
            entries[key.value] = replace(value.node, line=key.line, label=show(key.value).strip("'\""))
        node = Node(
            path, line, "the mapping", {key: entry.value for key, entry in entries.items()}, entries, error_class
        )
    values = 1 + sum(part.values for part in parts)
    built = _Anchored(node, values, 1 + max((part.height for part in parts), default=-1))
    if event.anchor is not None:
        anchors[event.anchor] = built
    return built


def _scalar(event: Any, fail: Callable[[str], SvpBenchError]) -> str | int | float | bool | None:
    tag = _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit).removeprefix(_PLAIN)
    if tag == "str":
        return str(event.value)
    if tag == "null":
        return None
    node = yaml.ScalarNode(_PLAIN + tag, event.value)
    try:
        if tag == "bool":
            return bool(_SCALARS.construct_yaml_bool(node))
        if tag == "int":
            return int(_SCALARS.construct_yaml_int(node))
        if tag == "float":
            return float(_SCALARS.construct_yaml_float(node))
    except (ValueError, OverflowError):
        raise fail(f"{show(event.value)} is not a number; put it in quotes if it is a text") from None
    # "timestamp", "merge" (<<) and "value" (=): meanings that nobody needs here
    raise fail(f"{show(event.value)} has a special meaning in YAML; put it in quotes if it is a text")
