"""The sources that the file `sources/<suite>.yaml` next to the cards states for the tasks of a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Literal

from msgspec import Meta

from svp_bench.core.errors import CardError, unknown_name
from svp_bench.core.validate import Positive, Text, convert
from svp_bench.core.yaml import once, read_yaml
from svp_bench.tasks.cards import SuiteCard, TaskCard

Version = Annotated[
    str, Meta(pattern=r"^[0-9]+\.([0-9]+|\*)\.([0-9]+|\*)\Z", description="a version such as 3.0.1 or 3.*.*")
]
Part = Literal["train", "val", "test"]
First = Positive | Literal["all"]
"""How many of the first images of a part."""


@dataclass(frozen=True)
class TfdsSpec:
    """How TensorFlow Datasets has a task.

    Attributes:
        builder: Name of the builder.
        versions: Versions that may be read, the preferred first; "*" stands for any number.
        parts: Part → slice in the syntax of TensorFlow Datasets, e.g. "train[:90%]".
        config: Name of the builder's config, if it has several.
        label: A feature of the builder, or a rule of `svp_bench.prepare.labels`.
        pixels: "stored", or "times_255" for images of zeros and ones.
    """

    builder: Text
    versions: Annotated[tuple[Version, ...], Meta(min_length=1, description="a list of versions")]
    parts: Mapping[Part, Text]
    config: Text | None = None
    label: Text = "label"
    pixels: Literal["stored", "times_255"] = "stored"

    @property
    def name(self) -> str:
        """Name of the builder with its config: "eurosat/rgb"."""
        return f"{self.builder}/{self.config}" if self.config else self.builder


@dataclass(frozen=True)
class KnownSources:
    """The sources of one task.

    Attributes:
        tfds: How TensorFlow Datasets has it; None if it has not.
    """

    tfds: TfdsSpec | None = None


@dataclass(frozen=True)
class SuiteSources:
    """The content of `sources/<suite>.yaml`.

    Attributes:
        splits: Split of the cards → part → how many of its first images the split holds.
        tasks: Task id → its sources.
    """

    splits: Mapping[str, Mapping[Part, First]] = field(default_factory=dict)
    tasks: Mapping[str, KnownSources] = field(default_factory=dict)


@once
def suite_sources(suite: SuiteCard) -> SuiteSources:
    """Read and check the sources of a suite; empty if it states none.

    Raises:
        CardError: If the file is malformed, or names a task or split that the suite does not have.
    """
    path = suite.path.parent / "sources" / f"{suite.name}.yaml"
    if not path.exists():
        return SuiteSources()
    file = read_yaml(path)
    sources = convert(file.value, SuiteSources, file.where, CardError, "sources")
    known = [name.partition("/")[2] for name in suite.tasks]
    for task in sources.tasks:
        if task not in known:
            raise unknown_name("task", task, known, where=file.where(("tasks", task)), error=CardError)
    return sources


def known_sources(card: TaskCard, suite: SuiteCard) -> KnownSources:
    """Return the sources of one task; empty if none are stated."""
    return suite_sources(suite).tasks.get(card.id, KnownSources())
