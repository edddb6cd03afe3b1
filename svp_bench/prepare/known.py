"""The sources that the file `sources/<suite>.yaml` next to the cards states for the tasks of a suite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from svp_bench.core.errors import CardError, unknown_name
from svp_bench.core.validate import Positive, Text, convert
from svp_bench.core.yaml import once, read_yaml
from svp_bench.tasks.cards import SuiteCard, TaskCard

Version = Annotated[
    str, Meta(pattern=r"^[0-9]+\.([0-9]+|\*)\.([0-9]+|\*)\Z", description="a version such as 3.0.1 or 3.*.*")
]
Digest = Annotated[str, Meta(pattern=r"^(sha256:[0-9a-f]{64}|md5:[0-9a-f]{32})\Z", description="sha256:… or md5:…")]
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
class KnownFile:
    """A file on the network.

    Attributes:
        addresses: Where it is, the preferred first; empty where it is given to people only, e.g. after a form.
        digest: "sha256:…" or "md5:…" of it; None if it is not known.
    """

    addresses: tuple[Text, ...] = ()
    digest: Digest | None = None


@dataclass(frozen=True)
class NativeSpec:
    """The data set's own archives, and the lists of a split of others.

    Attributes:
        archives: Name of a file → where it is.
        lists: The folder of the lists, below the address that the suite states.
        digests: Name of a list → its digest.
    """

    archives: Annotated[Mapping[Text, KnownFile], Meta(min_length=1, description="names of archives")]
    lists: Text
    digests: Mapping[Text, Digest] = field(default_factory=dict)


@dataclass(frozen=True)
class HubSpec:
    """Where the hub has a task as parquet files.

    Attributes:
        repository: "owner/name" of the data set.
        status: "seen", or "inferred" if the name follows from others and nobody has stated that it exists.
        revision: Commit; None while none is known, so that the newest is taken.
    """

    repository: Annotated[str, Meta(pattern=r"^[\w.-]+/[\w.-]+\Z", description="a repository, owner/name")]
    status: Literal["seen", "inferred"] = "inferred"
    revision: Annotated[str, Meta(pattern=r"^[0-9a-f]{40}\Z", description="a commit of 40 digits")] | None = None


@dataclass(frozen=True)
class KnownSources:
    """The sources of one task.

    Attributes:
        hub: Where the hub has it; None if it has not.
        tfds: How TensorFlow Datasets has it; None if it has not.
        native: Its own archives and the lists of its split; None if they are not known.
    """

    hub: HubSpec | None = None
    tfds: TfdsSpec | None = None
    native: NativeSpec | None = None


@dataclass(frozen=True)
class SuiteSources:
    """The content of `sources/<suite>.yaml`.

    Attributes:
        splits: Split of the cards → part → how many of its first images the split holds.
        tasks: Task id → its sources.
        archives: Addresses of one archive that holds all tasks, the preferred first.
        lists: Address of the folder that holds the lists of the tasks' splits.
    """

    splits: Mapping[str, Mapping[Part, First]] = field(default_factory=dict)
    tasks: Mapping[str, KnownSources] = field(default_factory=dict)
    archives: tuple[Text, ...] = ()
    lists: Text | None = None


def suite_sources(suite: SuiteCard) -> SuiteSources:
    """Read and check the sources of a suite; empty if it states none.

    Raises:
        CardError: If the file is malformed, or names a task or split that the suite does not have.
    """
    return _read(suite.path.parent / "sources" / f"{suite.name}.yaml", tuple(suite.tasks))


@once
def _read(path: Path, tasks: tuple[str, ...]) -> SuiteSources:
    if not path.exists():
        return SuiteSources()
    file = read_yaml(path)
    sources = convert(file.value, SuiteSources, file.where, CardError, "sources")
    known = [name.partition("/")[2] for name in tasks]
    for task in sources.tasks:
        if task not in known:
            raise unknown_name("task", task, known, where=file.where(("tasks", task)), error=CardError)
    return sources


def known_sources(card: TaskCard, suite: SuiteCard) -> KnownSources:
    """Return the sources of one task; empty if none are stated."""
    return suite_sources(suite).tasks.get(card.id, KnownSources())
