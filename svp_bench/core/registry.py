"""Registry of objects by name; an object is imported when `get` is called, so listing needs no torch."""

from __future__ import annotations

import gc
import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from svp_bench.core.errors import unknown_name

_NAME = re.compile(r"[a-z][a-z0-9_]*[a-z0-9]")


def import_object(path: str) -> Any:
    """Import and return the object of a class path, "package.module.Class".

    Raises:
        ImportError: If there is no such module or object, or the path has no dot.
    """
    module, _, name = path.rpartition(".")
    if not module:
        raise ImportError(f"not a class path: {path!r}")
    try:
        return getattr(importlib.import_module(module), name)
    except AttributeError as error:
        raise ImportError(str(error)) from None


@contextmanager
def importing_torch() -> Iterator[None]:
    """Pause garbage collection while the block imports torch and Lightning: it would take a quarter of their time.

    Imported objects live as long as the process: later collections skip them.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()


def make_importable(*files: str | None) -> None:
    """Append the folders of method and config files and the working directory to the import path.

    They come last, so that no file there hides an installed package.
    """
    given = [Path(name) for name in files if name]
    for folder in [*(path.parent for path in given if path.is_file()), Path()]:
        if (place := str(folder.resolve())) not in sys.path:
            sys.path.append(place)


@dataclass(frozen=True)
class Entry:
    """One registered name.

    Attributes:
        name: Lower case, digits and single underscores.
        target: "package.module:attribute".
        summary: One line for listings.
        families: Backbone families that a method works with; empty for all.
    """

    name: str
    target: str
    summary: str = ""
    families: tuple[str, ...] = ()


class Registry:
    """Names of one kind with the import path of each object.

    Args:
        kind: The kind as a word for messages, e.g. "method".
        listing: The command that lists the names, for messages.
        entry_points: Name of the entry-point group for other packages, if any.
    """

    def __init__(self, kind: str, *, listing: str | None = None, entry_points: str | None = None) -> None:
        self.kind = kind
        self.listing = listing
        self._group = entry_points
        self._entries: dict[str, Entry] = {}
        self._loaded = entry_points is None

    def add(self, name: str, target: str, summary: str = "", families: tuple[str, ...] = ()) -> None:
        """Register `name`.

        Raises:
            ValueError: If the name is not lower_case, is taken, or the target is not "module:attribute".
        """
        if not _NAME.fullmatch(name) or "__" in name:
            raise ValueError(f"a {self.kind} name is lower case with single underscores, not {name!r}")
        if name in self._entries:
            raise ValueError(f"the {self.kind} {name!r} is taken by {self._entries[name].target}")
        if target.count(":") != 1:
            raise ValueError(f"the {self.kind} {name!r} needs a target 'module:attribute', not {target!r}")
        self._entries[name] = Entry(name, target, summary, families)

    def __iter__(self) -> Iterator[Entry]:
        self._discover()
        return iter(self._entries.values())

    def __contains__(self, name: str) -> bool:
        self._discover()
        return name in self._entries

    def names(self) -> list[str]:
        """Return all names, in the order of registration."""
        return [entry.name for entry in self]

    def entry(self, name: str) -> Entry:
        """Return the entry of `name`; UsageError with the nearest if there is none."""
        self._discover()
        try:
            return self._entries[name]
        except KeyError:
            raise unknown_name(self.kind, name, self._entries, listing=self.listing) from None

    def get(self, name: str) -> Any:
        """Import and return the object of `name`; UsageError with the nearest if there is none."""
        module, attribute = self.entry(name).target.split(":")
        return getattr(importlib.import_module(module), attribute)

    def _discover(self) -> None:
        if self._loaded:
            return
        self._loaded = True
        for point in metadata.entry_points(group=self._group or ""):
            distribution = point.dist.name if point.dist else "another package"
            try:
                self.add(point.name, point.value, f"(from {distribution})")
            except ValueError as error:  # an error in another package must not fail every command
                warnings.warn(f"left out a {self.kind} of {distribution}: {error}", stacklevel=2)
