"""Strict, plain YAML with line numbers: what cards and configs are read with.

No tags, no key given twice, no merge keys; each mistake is an error whose text begins with "file:line:".
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import yaml
from yaml.constructor import SafeConstructor
from yaml.reader import Reader

from svp_bench.core.atomic import read_regular
from svp_bench.core.errors import CardError, SvpBenchError, show, unknown_name

P = ParamSpec("P")
T = TypeVar("T")

_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml's is some ten times faster
_SCALARS = SafeConstructor()
_PLAIN = "tag:yaml.org,2002:"
_MAX_DEPTH = 16
_MAX_BYTES = 4 * 2**20
_MAX_VALUES = 100_000  # of a file, each alias counted with all that it stands for


@dataclass(frozen=True)
class Node:
    """A YAML value, the line it stands on (that of its key, if it has one), and typed ways to take it apart."""

    path: Path
    line: int
    label: str  # the key, or what stands for it in a message
    value: Any  # plain Python: dict, list, str, int, float, bool, None
    children: dict[str, Node] | list[Node] | None = None
    error_class: type[SvpBenchError] = CardError

    def where(self, keys: Sequence[str | int] = ()) -> str:
        """Return "file:line" of the value that keys lead to, or of the last one that exists on the way."""
        node = self
        for key in keys:
            inside: dict[Any, Node] = (
                dict(enumerate(node.children)) if isinstance(node.children, list) else node.children or {}
            )
            node = inside.get(key, node)
        return f"{self.path}:{node.line}"

    def error(self, text: str, *keys: str | int) -> SvpBenchError:
        """Return the error `text` at this place, or at the value that keys lead to."""
        return self.error_class(f"{self.where(keys)}: {text}")

    @property
    def kind(self) -> str:
        """What the value is, in the writer's words."""
        words = {dict: "a mapping", list: "a list", type(None): "empty"}
        return words.get(type(self.value)) or show(self.value)

    def mapping(self) -> dict[str, Node]:
        """Return the entries of a mapping with at least one."""
        if not isinstance(self.children, dict) or not self.children:
            raise self.error(f"{self.label} must be a mapping with at least one entry, not {self.kind}")
        return self.children

    def keys(self, required: Sequence[str], optional: Iterable[str]) -> dict[str, Node]:
        """Return the entries of a mapping that has all of `required` and else only some of `optional`."""
        if not isinstance(self.children, dict):
            raise self.error(f"{self.label} must be a mapping, not {self.kind}")
        allowed = [*required, *optional]
        for key in self.children:
            if key not in allowed:
                where = self.where([key])
                raise unknown_name(f"key in {self.label}", key, allowed, where=where, error=self.error_class)
        for key in required:
            if key not in self.children:
                raise self.error(f"{self.label} lacks the key {key!r}")
        return self.children

    def sequence(self) -> list[Node]:
        """Return the entries of a list with at least one."""
        if not isinstance(self.children, list) or not self.children:
            raise self.error(f"{self.label} must be a list with at least one entry, not {self.kind}")
        return self.children


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


_READ: list[dict[Any, Any]] = []  # what was read in a block of `reading_once`


@contextmanager
def reading_once() -> Iterator[None]:
    """Read each YAML file and card once while the block lasts: a plan of thousands of runs needs few files."""
    _READ.append({})
    try:
        yield
    finally:
        _READ.pop()


def once(function: Callable[P, T]) -> Callable[P, T]:
    """Decorate a function that reads files: in a block of `reading_once` it is called once for the same arguments."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        if not _READ:
            return function(*args, **kwargs)
        key = (function, args, *kwargs.items())
        if key not in _READ[-1]:
            _READ[-1][key] = function(*args, **kwargs)
        found: T = _READ[-1][key]
        return found

    return wrapper


@once
def read_yaml(path: Path, *, error: type[SvpBenchError] = CardError, label: str = "the card") -> Node:
    """Read one YAML file into a mapping node.

    Args:
        path: The file.
        error: What to raise, from here and from the node's own checks.
        label: What the file holds, in a message.

    Each value has its line. Explicit tags and a key that is given twice are refused.
    """
    return _parse(path, read_text(path, error), error, label)


def check_value(text: str, where: str, error: type[SvpBenchError] = CardError) -> None:
    """Refuse a text that a YAML loader would blow up: one with aliases, or nested too deeply.

    Args:
        text: The text that another loader will read, e.g. a value of the command line.
        where: Its origin, for the message.
        error: The class of errors.
    """
    anchors = set()
    try:
        for event in _events(text):
            if isinstance(event, yaml.AliasEvent) and event.anchor in anchors:  # others are a text: "*.jpg"
                raise error(f"{where}: the alias *{event.anchor} is not allowed here; write the value out")
            anchors.add(getattr(event, "anchor", None))
    except _TooDeep:
        raise error(f"{where}: nested deeper than {_MAX_DEPTH} levels") from None
    except yaml.YAMLError:
        return  # not YAML: a text


class _TooDeep(yaml.MarkedYAMLError):
    pass


def _events(text: str) -> Iterator[Any]:
    """Yield the parser's events. `yaml.compose` alone would overflow the stack on thousands of brackets."""
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > _MAX_DEPTH:
            mark: Any = event.start_mark
            raise _TooDeep(None, None, f"nested deeper than {_MAX_DEPTH} levels", mark)
        yield event


def _parse(path: Path, text: str, error_class: type[SvpBenchError], label: str) -> Node:
    def fail(line: int, problem: str) -> SvpBenchError:
        return error_class(f"{path}:{line}: {problem}")

    if bad := Reader.NON_PRINTABLE.search(text):
        raise fail(text.count("\n", 0, bad.start()) + 1, f"the character {bad.group()!r} is not allowed in YAML")
    try:
        for event in _events(text):
            if tag := getattr(event, "tag", None):
                shown = show(tag.replace(_PLAIN, "!!"))
                raise fail(event.start_mark.line + 1, f"tag {shown} is not allowed; write plain YAML")
        root = yaml.compose(text, Loader=_LOADER)
    except yaml.YAMLError as problem:
        mark: Any = getattr(problem, "problem_mark", None)
        words = " ".join(str(getattr(problem, "problem", None) or problem).split())
        raise fail(mark.line + 1 if mark else 1, f"not YAML: {words}") from None
    if root is None:
        raise fail(1, "the file is empty")

    values = itertools.count(1)

    def build(node: Any, line: int, label: str, depth: int) -> Node:
        if depth > _MAX_DEPTH:  # an alias may stand for a value that it is in
            raise fail(line, f"nested deeper than {_MAX_DEPTH} levels")
        if next(values) > _MAX_VALUES:
            raise fail(line, f"more than {_MAX_VALUES:,} values, each alias counted with all that it stands for")
        if isinstance(node, yaml.ScalarNode):
            return Node(path, line, label, _scalar(node, line, fail), None, error_class)
        if isinstance(node, yaml.SequenceNode):
            items = [build(item, item.start_mark.line + 1, "an entry of the list", depth + 1) for item in node.value]
            return Node(path, line, label, [item.value for item in items], items, error_class)
        entries: dict[str, Node] = {}
        for key_node, item in node.value:
            key = build(key_node, key_node.start_mark.line + 1, "the key", depth + 1)
            if not isinstance(key.value, str):
                raise key.error(f"a key must be a text, not {key.kind} (put it in quotes?)")
            if key.value in entries:
                raise key.error(f"key {show(key.value)} is given twice (first on line {entries[key.value].line})")
            entries[key.value] = build(item, key.line, show(key.value).strip("'\""), depth + 1)
        return Node(path, line, label, {key: entry.value for key, entry in entries.items()}, entries, error_class)

    return build(root, 1, label, 0)


def _scalar(node: Any, line: int, fail: Callable[[int, str], SvpBenchError]) -> str | int | float | bool | None:
    tag = node.tag.removeprefix(_PLAIN)
    if tag not in ("str", "null", "bool", "int", "float"):  # timestamps, merge keys (<<) and "=" are not needed
        raise fail(line, f"{show(node.value)} has a special meaning in YAML; put it in quotes if it is a text")
    try:
        value: str | int | float | bool | None = getattr(_SCALARS, f"construct_yaml_{tag}")(node)
    except (ValueError, OverflowError):
        raise fail(line, f"{show(node.value)} is not a number; put it in quotes if it is a text") from None
    return value
