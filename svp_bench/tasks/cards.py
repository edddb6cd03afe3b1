"""Cards: plain YAML files in `tasks/` that describe tasks, suites and protocols, read into frozen objects.

Files in a folder of cards:

    <suite>.yaml             a suite: its tasks in groups, their reader, their protocol; or, with `tasks_of` and without
                             a folder of tasks, a part of another suite
    <suite>/<task>.yaml      a task: classes, sizes of the splits, origin of the data; its name is "<suite>/<task>"
    protocols/<name>.yaml    a protocol: image transform, splits of both stages, training budget
    sources/<suite>.yaml     where the data of a suite's tasks come from (`svp_bench.prepare.known`)
    references.bib           the works that `citation` names

Custom cards lie in further folders of the same form (`--tasks_dir DIR`, `$SVP_BENCH_TASKS`); their suites may use the
shipped protocols. Two different suites or protocols must not have the same name.

Any mistake in a card is a `CardError` whose text begins with "file:line:".
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from msgspec import Meta

from svp_bench.core.errors import CardError, UsageError, nearest, plural, show, unknown_name
from svp_bench.core.resources import tasks_dirs
from svp_bench.core.validate import Count, Digest, Positive, convert
from svp_bench.core.yaml import Node, once, read_text, read_yaml

OTHER_PIXELS = ("hub", "tfds")
"""Data variants of any task whose sources have other pixels than those that a card describes."""

_T = TypeVar("_T")
_ID = re.compile(r"[a-z0-9][a-z0-9_-]*")

Id = Annotated[str, Meta(pattern=rf"^{_ID.pattern}\Z", description="a name of a-z, 0-9, _ and -")]
File = Annotated[str, Meta(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*\Z", description="a single file or folder name")]
Line = Annotated[str, Meta(pattern=r"^[^\n\r\v\f\x1c-\x1e\x85\u2028\u2029]+\Z", description="a line of text")]
Prose = Annotated[str, Meta(min_length=1, description="a text")]
Citation = Annotated[str, Meta(pattern=r"^[A-Za-z][A-Za-z0-9:_.+-]*\Z", description="a key of references.bib")]
Address = Annotated[
    str,
    Meta(pattern=r"^(https?://\S+|synthetic|your own)\Z", description="an address (https://…), synthetic or your own"),
]
Splits = Mapping[Id, Positive]  # name -> number of images
Group = Annotated[tuple[Id, ...], Meta(min_length=1, description="a list of task ids")]
SameImages = Annotated[tuple[Id, ...], Meta(min_length=2, description="a list of two or more task ids")]


@dataclass(frozen=True)
class ReaderSpec:
    """How the images and splits of a task are read.

    Attributes:
        kind: A name of the reader registry of `svp_bench.data`, e.g. "split_files".
        options: Arguments of that reader, e.g. {"per_class": 5}; mostly empty.
    """

    kind: Id
    options: Mapping[str, int | str | float | bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TaskCard:
    """One classification task.

    Attributes:
        name: "<suite>/<id>", e.g. "vtab/caltech101".
        version: Increases when the meaning of the card changes, so that old numbers do not mix with new ones.
        group: The suite's group that lists the task.
        title: Short name for tables.
        classes: Number of classes; labels run from 0 to classes - 1. 0 if it follows from the data (`as_found`).
        counts: Split → number of images; empty if it follows from the data.
        folder: Folder of the task below the data root.
        source: Address of the data set's home page, "synthetic" if code draws its images, or "your own".
        licence: Terms of the data in a few words.
        citation: Key in `references.bib`.
        digest: "sha256:<64 hex digits>" over all splits as first seen, or None while unseen (`Images.digest`).
        variants: Other known forms of the data: name → split → number of images, for all splits.
        notes: Remarks for readers of a number on this task.
        reader: How the data are read: the card's own reader, else the suite's.
        class_names: File next to the card with one class name per line, or None.
        path: The card's file.
        other_folders: Further names that the folder has in other releases of the data, tried after `folder`.
    """

    name: Line
    version: Positive
    group: Id
    title: Line
    classes: Count
    counts: Splits
    folder: File
    source: Address
    licence: Line
    citation: Citation
    digest: Digest | None
    reader: ReaderSpec
    variants: Mapping[Id, Splits] = field(default_factory=dict)
    notes: Prose = ""
    class_names: File | None = None
    other_folders: tuple[File, ...] = ()
    path: Path = field(default=Path(), compare=False)

    @property
    def as_found(self) -> bool:
        """Whether the data define the classes and splits, not the card; `svp_bench.data.sources.measured` fills it."""
        return self.classes == 0

    @property
    def suite(self) -> str:
        """The part of the name before the slash: "vtab"."""
        return self.name.partition("/")[0]

    @property
    def id(self) -> str:
        """The part of the name after the slash: "caltech101"."""
        return self.name.partition("/")[2]


@dataclass(frozen=True, kw_only=True)
class SuiteCard:
    """The tasks of a benchmark and what they share.

    Attributes:
        name: "vtab".
        version: Increases when members, groups or protocol change.
        title: Displayed name: "VTAB-1k".
        table: Stem of the names of the table files.
        folder: The suite's folder below a data root, searched after the root itself.
        protocol: Name of the protocol card.
        reader: How the data are read, unless a task's card states another.
        groups: Group → task ids, in the order of the table's columns.
        same_images: Tasks that share their images and so are not independent measurements.
        citation: Key in `references.bib`.
        notes: Remarks for readers of the suite's averages.
        path: The card's file.
        other_folders: Further names of the folder, tried after `folder`: that of a suite which shares its data.
        archive: The one archive that holds all tasks, and its address; "" if each task has a page of its own.
        tasks_of: The suite whose tasks these are, for a suite that is a part of another and has no task cards.
    """

    name: Line
    version: Positive
    title: Line
    table: Id
    folder: File
    protocol: Line
    reader: ReaderSpec
    groups: Annotated[Mapping[Id, Group], Meta(min_length=1, description="groups of tasks")]
    citation: Citation
    same_images: tuple[SameImages, ...] = ()
    notes: Prose = ""
    other_folders: tuple[File, ...] = ()
    archive: Prose = ""
    tasks_of: Line | None = None
    path: Path = field(default=Path(), compare=False)

    @property
    def owner(self) -> str:
        """The suite that its tasks and their records belong to: itself, unless it is a part of another."""
        return self.tasks_of or self.name

    @property
    def tasks(self) -> list[str]:
        """Full names of the tasks, in the order of the table's columns."""
        return [self.full(task) for tasks in self.groups.values() for task in tasks]

    def full(self, task: str) -> str:
        """Return the full name of one of its task ids."""
        return f"{self.owner}/{task}"


@dataclass(frozen=True, kw_only=True)
class ProtocolCard:
    """What makes two numbers on one task comparable.

    Attributes:
        name: "vtab-final".
        version: Increases when anything here changes that moves a number.
        title: One line for people.
        image_size: Height and width of the model's input in pixels; None ("backbone" on the card) for the size that the
            backbone was trained with.
        resize: "squash": both sides to `image_size`, any aspect ratio; "centre_crop": the shorter side to
            `image_size` / 0.875, then the square in the middle.
        interpolation: "bicubic" (Pillow's, which averages when it shrinks).
        augmentation: "none".
        normalisation: "backbone": mean and standard deviation that the backbone was trained with.
        stages: Stage → role → split: {"select": {"train": .., "val": ..}, "final": {"train": .., "test": ..}}.
        training: A config layer of sections "trainer", "data", "model"; its keys are checked where configs are parsed.
        selection: The rule by which hyper-parameters are chosen, in words.
        citation: Key in `references.bib`.
        notes: Remarks for readers of a number under this protocol.
        path: The card's file.
    """

    name: Line
    version: Positive
    title: Line
    image_size: Annotated[int, Meta(ge=1, description="int >= 1, backbone")] | None
    resize: Literal["squash", "centre_crop"]
    interpolation: Literal["bicubic"]
    augmentation: Literal["none"]
    normalisation: Literal["backbone"]
    stages: Mapping[str, Mapping[str, Id]]
    training: Mapping[Id, Mapping[str, Any]]
    selection: Prose
    citation: Citation
    notes: Prose = ""
    path: Path = field(default=Path(), compare=False)

    @property
    def layer(self) -> dict[str, dict[str, Any]]:
        """The protocol as a config layer: the training budget and the image transform."""
        data: dict[str, Any] = {} if self.image_size is None else {"image_size": self.image_size}
        data["transform"] = {"resize": self.resize, "interpolation": self.interpolation}
        sections = {name: dict(section) for name, section in self.training.items()}
        return {**sections, "data": {**sections.get("data", {}), **data}}

    def splits(
        self, stage: str, folds: int | None = None, fold: int | None = None, fold_seed: int | None = None
    ) -> dict[str, str]:
        """Return role → split of a stage.

        Args:
            stage: One of `stages`.
            folds: Of stage "select": the refit split is divided into so many parts, and val is one of them.
            fold: Which part; it counts through repeated divisions.
            fold_seed: Seed of the division.
        """
        if folds is None or stage != "select":
            return dict(self.stages[stage])
        whole, (repeat, part) = self.stages["final"]["train"], divmod(fold or 0, folds)
        name = f"fold{part + 1}of{folds}-seed{fold_seed or 0}-repeat{repeat}"
        return {"train": f"{whole}-without-{name}", "val": f"{whole}-{name}"}


# --- looking cards up ------------------------------------------------------------------------------------------------
# `root` is the one folder of cards; by default the shipped one and the custom ones.

_LISTING = "svp-bench tasks"
_PROTOCOLS = "protocols"
_NO_SUITES = {_PROTOCOLS: "protocols", "sources": "the sources of suites"}  # sub-folders → what they hold


@dataclass(frozen=True)
class _Index:
    """The folders of cards that hold a card of each name: suites with tasks, suites that are a part, protocols."""

    suites: dict[str, list[Path]] = field(default_factory=dict)
    parts: dict[str, list[Path]] = field(default_factory=dict)
    protocols: dict[str, list[Path]] = field(default_factory=dict)

    def folder(self, kind: str, card: str, folders: list[Path], tasks: str = "") -> Path:
        """Return the first folder of a card; CardError if another has a different card, or tasks, of the same name."""

        def content(folder: Path) -> dict[str, bytes]:
            inside = [path for path in sorted((folder / tasks).glob("*")) if path.is_file()] if tasks else []
            return {path.name: path.read_bytes() for path in (folder / card, *inside)}

        for other in folders[1:]:
            if content(other) != content(folders[0]):
                text = f"there is another {kind} of this name in {folders[0]}; give yours a name of its own"
                raise CardError(f"{other / card}:1: {text}")
        return folders[0]

    def suite(self, name: str) -> SuiteCard:
        """Read and check the card of a suite, and that its folder holds the cards of its members and no others."""
        folders = self.suites.get(name, []) + self.parts.get(name, [])
        if not folders:
            raise unknown_name("suite", name, [*self.suites, *self.parts], listing=_LISTING)
        home = self.folder("suite", f"{name}.yaml", folders, name)
        card, owner = read_yaml(home / f"{name}.yaml"), name
        if isinstance(card.value, dict) and "tasks_of" in card.value:
            owner = card.value["tasks_of"]
            if owner not in [*self.suites]:
                where = card.where(("tasks_of",))
                raise unknown_name("suite", str(owner), self.suites, where=where, error=CardError)
            if name in self.suites:
                text = f"a part of the suite {owner!r} has no task cards of its own; remove {home / name}"
                raise card.error(text, "tasks_of")
            home = self.folder("suite", f"{owner}.yaml", self.suites[owner], owner)
        return _suite(card, _stems(home / owner), [*self.protocols], owner)

    def protocol(self, name: str) -> ProtocolCard:
        """Read and check a protocol card."""
        if name not in self.protocols:
            raise unknown_name("protocol", name, self.protocols)
        card = f"{_PROTOCOLS}/{name}.yaml"
        return _protocol(read_yaml(self.folder("protocol", card, self.protocols[name]) / card))


@once
def _index(root: Path | None) -> _Index:
    """Return the cards of all folders; CardError for a card that cannot belong to a suite."""
    if root is not None and not root.is_dir():
        raise UsageError(f"{root} is not a folder; give the folder that holds the suite cards (<suite>.yaml)")
    index = _Index()
    for folder in tasks_dirs() if root is None else (root,):
        stems = _stems(folder)
        for inside in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
            if inside.name not in [*stems, *_NO_SUITES] and (cards := _stems(inside)):
                text = f"this card belongs to no suite; write {folder / inside.name}.yaml or move it"
                raise CardError(f"{inside / cards[0]}.yaml:1: {text}")
        for name in {*stems} & {*_NO_SUITES}:
            raise CardError(f"{folder / name}.yaml:1: {name!r} cannot name a suite; it holds {_NO_SUITES[name]}")
        for name in stems:
            (index.suites if _stems(folder / name) else index.parts).setdefault(name, []).append(folder)
        for name in _stems(folder / _PROTOCOLS):
            index.protocols.setdefault(name, []).append(folder)
    return index


def _stems(folder: Path) -> list[str]:
    """Return the sorted ids of the cards in `folder` (none if it does not exist)."""
    stems = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(".") or path.suffix not in (".yaml", ".yml"):
            continue
        if path.suffix == ".yml" or not _ID.fullmatch(path.stem):
            raise CardError(f"{path}:1: a card's file is called <id>.yaml, the id of a-z, 0-9, _ and -; rename it")
        stems.append(path.stem)
    return stems


def list_suites(root: Path | None = None) -> list[str]:
    """Return the names of all suites with tasks of their own: the shipped ones, sorted, then the custom ones."""
    return [*_index(root).suites]


def list_parts(suite: str | None = None, root: Path | None = None) -> list[str]:
    """Return the names of the suites that are a part of another one (of `suite`, if given), sorted."""
    index = _index(root)
    return [name for name in index.parts if suite is None or index.suite(name).owner == suite]


def list_tasks(suite: str | None = None, root: Path | None = None) -> list[str]:
    """Return the full names of the tasks of one suite, or of all, in the order of the table's columns.

    Raises:
        UsageError: If there is no such suite; names the nearest.
        CardError: If a suite card is malformed.
    """
    index = _index(root)
    return [task for name in (index.suites if suite is None else [suite]) for task in index.suite(name).tasks]


@once
def load_task(name: str, root: Path | None = None) -> TaskCard:
    """Read and check the card of one task, e.g. "vtab/caltech101".

    Raises:
        UsageError: If there is no such task; names the nearest.
        CardError: If its card, or the card of its suite or protocol, is malformed.
    """
    index = _index(root)
    suite_name, _, task_id = name.partition("/")
    suite = index.suite(suite_name) if suite_name in index.suites else None
    if suite is None or name not in suite.tasks:
        error = unknown_name("task", name, list_tasks(root=root), listing=_LISTING)
        own = "" if "did you mean" in str(error) or root is not None else "; cards of your own: --tasks_dir DIR"
        raise UsageError(f"{error}{own}")
    path = suite.path.parent / suite_name / f"{task_id}.yaml"
    return _task(read_yaml(path), suite, index.protocol(suite.protocol))


@once
def load_suite(name: str, root: Path | None = None) -> SuiteCard:
    """Read and check the card of one suite, e.g. "vtab".

    Raises:
        UsageError: If there is no such suite; names the nearest.
        CardError: If the card is malformed or does not fit its folder.
    """
    return _index(root).suite(name)


@once
def load_protocol(name: str, root: Path | None = None) -> ProtocolCard:
    """Read and check a protocol card, e.g. "vtab-final".

    Raises:
        UsageError: If there is no such protocol; names the nearest.
        CardError: If the card is malformed.
    """
    return _index(root).protocol(name)


def class_names(card: TaskCard) -> list[str] | None:
    """Return the names of a task's classes in the order of their labels, or None if the card names no file of them.

    Raises:
        CardError: If the file is unreadable, or has an empty line, a name twice, or not one line for each class.
    """
    if card.class_names is None:
        return None
    path = card.path.parent / card.class_names
    names = [line.strip() for line in read_text(path).splitlines()]
    first: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        if not name:
            raise CardError(f"{path}:{line}: empty line; write one class name a line")
        if first.setdefault(name, line) != line:
            raise CardError(f"{path}:{line}: class name {show(name)} stands on line {first[name]} already")
    if len(names) != card.classes:
        count, classes = plural(len(names), "class name"), plural(card.classes, "class")
        raise CardError(f"{path}:{max(len(names), 1)}: {count}, but {card.name} has {classes}")
    return names


def displayed_class_names(card: TaskCard) -> list[str]:
    """Return the names of a task's classes in the order of their labels, else "class 0", "class 1" …"""
    return class_names(card) or [f"class {label}" for label in range(card.classes)]


# --- checks of the cards ---------------------------------------------------------------------------------------------


def _read(kind: type[_T], card: Node, **filled: Any) -> _T:
    """Convert a card; `filled` replaces values of the file."""
    values = card.value
    if isinstance(values, dict):
        values = {key: value.strip() if isinstance(value, str) else value for key, value in values.items()} | filled
        place = card.path.stem if kind is not TaskCard else f"{card.path.parent.name}/{card.path.stem}"
        if values.get("name", place) != place:
            raise card.error(f"name is {show(values['name'])}, but a card in this place is called {place!r}", "name")
    return convert(values, kind, card.where, CardError, "card")


def _task(card: Node, suite: SuiteCard, protocol: ProtocolCard) -> TaskCard:
    values = card.value if isinstance(card.value, dict) else {}
    empty: dict[str, Any] = {"classes": 0, "counts": {}}
    found = [key for key in empty if values.get(key) == "found"]
    filled = {key: empty[key] for key in found}
    if "reader" not in values:
        filled["reader"] = asdict(suite.reader)
    if isinstance(variants := values.get("variants"), dict):
        for name, body in variants.items():
            if name in OTHER_PIXELS:
                raise card.error(f"each task may have a variant {name!r}; give this one another name", "variants", name)
            if not isinstance(body, dict) or [*body] != ["counts"]:
                raise card.error(f"the variant {name!r} must be {{counts: {{split: images}}}}", "variants", name)
        filled["variants"] = {name: body["counts"] for name, body in variants.items()}
    task = _read(TaskCard, card, **filled)

    if task.group not in suite.groups:
        raise unknown_name("group", task.group, suite.groups, where=card.where(("group",)), error=CardError)
    if task.id not in suite.groups[task.group]:
        listed = next(group for group, tasks in suite.groups.items() if task.id in tasks)
        raise card.error(f"group is {task.group!r}, but {suite.path.name} lists the task under {listed!r}", "group")
    if len(found) == 1:
        raise card.error("classes and counts are both 'found', or neither is", *found)
    if not found and not task.classes:
        raise card.error("'classes' must be int >= 1, not 0", "classes")
    needed = {split: (role, stage) for stage, roles in protocol.stages.items() for role, split in roles.items()}
    for split, (role, stage) in needed.items():
        if split not in task.counts and not found:
            raise card.error(
                f"counts lacks the split {split!r} ({role} of stage {stage!r} in protocol {protocol.name!r}); "
                f"it has: {', '.join(task.counts)}",
                "counts",
            )
    for name, counts in task.variants.items():
        for split in counts:
            if split not in task.counts:
                where = card.where(("variants", name, "counts", split))
                raise unknown_name(f"split of {task.name}", split, task.counts, where=where, error=CardError)
    if task.class_names and not (card.path.parent / task.class_names).is_file():
        raise card.error(f"there is no file {task.class_names!r} next to the card", "class_names")
    full = {name: {**task.counts, **counts} for name, counts in task.variants.items()}
    return replace(task, variants=full, path=card.path)


def _suite(card: Node, cards: list[str], protocols: list[str], owner: str) -> SuiteCard:
    suite = _read(SuiteCard, card)
    if suite.protocol not in protocols:
        raise unknown_name("protocol", suite.protocol, protocols, where=card.where(("protocol",)), error=CardError)
    members: dict[str, str] = {}  # task id -> its group
    for group, tasks in suite.groups.items():
        for index, task in enumerate(tasks):
            if task in members:
                text = f"task {task!r} is listed twice (already in group {members[task]!r})"
                raise card.error(text, "groups", group, index)
            if task not in cards:
                hit = nearest(task, [stem for stem in cards if stem not in members])
                hint = f"; did you mean {hit!r}?" if hit else ""
                raise card.error(f"task {task!r} has no card {owner}/{task}.yaml{hint}", "groups", group, index)
            members[task] = group
    if owner == card.path.stem and (strays := [stem for stem in cards if stem not in members]):
        stray = card.path.parent / owner / f"{strays[0]}.yaml"
        raise CardError(f"{stray}:1: this card is not in the groups of {card.path}; list it there or move it away")
    seen: set[str] = set()
    for row, together in enumerate(suite.same_images):
        for index, task in enumerate(together):
            if task not in members:
                where = card.where(("same_images", row, index))
                raise unknown_name("task", task, members, where=where, error=CardError)
            if task in seen:
                raise card.error(f"same_images lists the task {task!r} twice", "same_images", row)
            seen.add(task)
    return replace(suite, path=card.path)


def _protocol(card: Node) -> ProtocolCard:
    values = card.value if isinstance(card.value, dict) else {}
    protocol = _read(ProtocolCard, card, **({"image_size": None} if values.get("image_size") == "backbone" else {}))
    for stage, known in (("select", {"train", "val"}), ("final", {"train", "test"})):
        roles = protocol.stages.get(stage, {})
        if {*roles} != known or len(protocol.stages) != 2:
            text = "stages must be {select: {train, val}, final: {train, test}}, each role with the name of a split"
            raise card.error(text, "stages", stage)
    test = protocol.stages["final"]["test"]
    for stage, role in (("select", "train"), ("select", "val"), ("final", "train")):
        if protocol.stages[stage][role] == test:  # the honest way is the only one that a card can state
            text = f"{role} of stage {stage!r} is the test split {test!r}; use a split without it"
            raise card.error(text, "stages", stage, role)
    return replace(protocol, path=card.path)
