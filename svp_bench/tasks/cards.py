"""Cards: the plain YAML files in `tasks/` that say what a task, a suite and a protocol are, read into frozen objects.

Where they lie, below one folder of cards:

    <suite>.yaml             a suite: which tasks, in which groups, read how, under which protocol
    <suite>.yaml             or, without a folder of tasks, a part of another suite, which `tasks_of` names
    <suite>/<task>.yaml      a task: classes, list lengths, where the data come from; its name is "<suite>/<task>"
    protocols/<name>.yaml    a protocol: the image transform, the lists of both stages, the training budget
    references.bib           the works that `citation` names

Cards of the user's own lie in further folders of the same form (`--tasks_dir DIR`, `$SVP_BENCH_TASKS`); their suites
may follow the shipped protocols. No name may stand for two different suites or protocols.

Reading is strict. Every mistake in a card (unknown or missing key, wrong type, a name that does not fit the place, a
tag, a key given twice) is a `CardError` whose text begins with "file:line:". No card is ever left out silently.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svp_bench.core.errors import CardError, UsageError, plural, unknown_name
from svp_bench.core.resources import tasks_dirs
from svp_bench.core.yaml import Node, did_you_mean, read_text, read_yaml, show

__all__ = [
    "ProtocolCard",
    "ReaderSpec",
    "SuiteCard",
    "TaskCard",
    "class_names",
    "displayed_class_names",
    "list_parts",
    "list_suites",
    "list_tasks",
    "load_protocol",
    "load_suite",
    "load_task",
]


@dataclass(frozen=True)
class ReaderSpec:
    """How the images and lists of a task are read.

    Attributes:
        kind: A name of the reader registry of `svp_bench.data`: "split_files" (text files of "path label" lines),
            "json_split", "torchvision" or "digits".
        options: Arguments of that reader, e.g. {"per_class": 5}; mostly empty.
    """

    kind: str
    options: Mapping[str, int | str | float | bool]


@dataclass(frozen=True)
class TaskCard:
    """One classification task.

    Attributes:
        name: "<suite>/<id>", e.g. "vtab/caltech101".
        version: Goes up when the meaning of the card changes, so that old numbers do not mix with new ones.
        group: The suite's group that lists the task.
        title: Short name for tables.
        classes: Number of classes; labels run from 0 to classes - 1. 0 if it is as found (`as_found`).
        counts: Name of each list → its number of images; empty if they are as found.
        folder: Folder of the task below the data root.
        source: Address of the data set's home page, "synthetic" if code draws its images, or "your own".
        licence: Terms of the data in a few words.
        citation: Key in `references.bib`.
        digest: "sha256:<64 hex digits>" over all lists as first seen, or None while unseen. With the reader `lists`, of
            their lines (list names, paths, labels), not of pixels; with `digits`, of pixels and labels.
        variants: Other known forms of the data: name → list lengths (all of them, not only those that differ).
        notes: What a reader of a number on this task should know.
        reader: How the data are read: the card's own reader, else the suite's.
        class_names: File next to the card with one class name per line, or None.
        path: The card's file.
        other_folders: Further names that the folder has in other releases of the data, tried after `folder`.
    """

    name: str
    version: int
    group: str
    title: str
    classes: int
    counts: Mapping[str, int]
    folder: str
    source: str
    licence: str
    citation: str
    digest: str | None
    variants: Mapping[str, Mapping[str, int]]
    notes: str
    reader: ReaderSpec
    class_names: str | None
    path: Path = field(compare=False)
    other_folders: tuple[str, ...] = ()

    @property
    def as_found(self) -> bool:
        """Do the data say how many classes and images there are (own images), not the card?

        `svp_bench.data.sources.measured` fills such a card in.
        """
        return self.classes == 0

    @property
    def suite(self) -> str:
        """The part of the name before the slash: "vtab"."""
        return self.name.partition("/")[0]

    @property
    def id(self) -> str:
        """The part of the name after the slash: "caltech101"."""
        return self.name.partition("/")[2]


@dataclass(frozen=True)
class SuiteCard:
    """The tasks of a benchmark and what they share.

    Attributes:
        name: "vtab".
        version: Goes up when members, groups or protocol change.
        title: Name for people: "VTAB-1k".
        table: Stem of the names of the table files.
        folder: The suite's folder below a data root, tried when a task's folder does not lie there directly.
        protocol: Name of the protocol card.
        reader: How the data are read, unless a task's card states another.
        groups: Group → task ids, in the order of the table's columns.
        same_images: Tasks that share their images and so are not independent measurements.
        citation: Key in `references.bib`.
        notes: What a reader of the suite's averages should know.
        path: The card's file.
        other_folders: Further names of the folder, tried after `folder`: that of a suite which shares its data.
        archive: The one archive that holds all tasks, and where to get it; "" if each task has a page of its own.
        tasks_of: The suite whose tasks these are, for a suite that is a part of another and has no task cards.
    """

    name: str
    version: int
    title: str
    table: str
    folder: str
    protocol: str
    reader: ReaderSpec
    groups: Mapping[str, tuple[str, ...]]
    same_images: tuple[tuple[str, ...], ...]
    citation: str
    notes: str
    path: Path = field(compare=False)
    other_folders: tuple[str, ...] = ()
    archive: str = ""
    tasks_of: str | None = None

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


@dataclass(frozen=True)
class ProtocolCard:
    """What makes two numbers on one task comparable.

    Attributes:
        name: "vtab-final".
        version: Goes up when anything here changes that moves a number.
        title: One line for people.
        image_size: Height and width of the model's input in pixels; None ("backbone" on the card) for the size that the
            backbone was trained with.
        resize: "squash": both sides to `image_size`, any aspect ratio; "centre_crop": the shorter side to
            `image_size` / 0.875, then the square in the middle.
        interpolation: "bicubic" (Pillow's, which averages when it shrinks).
        augmentation: "none".
        normalisation: "backbone": mean and standard deviation that the backbone was trained with.
        stages: Stage → role → list: {"select": {"train": .., "val": ..}, "final": {"train": .., "test": ..}}.
        training: A config layer of sections "trainer", "data", "model"; its keys are checked where configs are parsed.
        selection: The rule by which hyper-parameters are chosen, in words.
        citation: Key in `references.bib`.
        notes: What a reader of a number under this protocol should know.
        path: The card's file.
    """

    name: str
    version: int
    title: str
    image_size: int | None
    resize: str
    interpolation: str
    augmentation: str
    normalisation: str
    stages: Mapping[str, Mapping[str, str]]
    training: Mapping[str, Mapping[str, Any]]
    selection: str
    citation: str
    notes: str
    path: Path = field(compare=False)

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

_LISTING = "svp-bench tasks"
_PROTOCOLS = "protocols"  # the one sub-folder that is not a suite's


def list_suites(root: Path | None = None) -> list[str]:
    """Return the names of all suites with tasks of their own: the shipped ones, sorted, then the user's.

    Suites that are a part of another: `list_parts`.

    Args:
        root: The one folder of cards; the shipped one and the user's own by default.

    Raises:
        UsageError: If `root` is not a folder.
        CardError: If a folder of task cards has no suite card, or a file's name is not a valid id.
    """
    return [*dict.fromkeys(name for folder in _roots(root) for name in _suites_of(folder))]


def _suites_of(root: Path) -> list[str]:
    """Return the names of the suites in one folder of cards, sorted."""
    suites = _stems(root)
    for folder in sorted(entry for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        if folder.name not in [*suites, _PROTOCOLS] and (cards := _stems(folder)):
            first = folder / f"{cards[0]}.yaml"
            raise CardError(f"{first}:1: this card belongs to no suite; write {root / folder.name}.yaml or move it")
    if _PROTOCOLS in suites:
        raise CardError(f"{root / _PROTOCOLS}.yaml:1: {_PROTOCOLS!r} cannot name a suite; its folder holds protocols")
    return [suite for suite in suites if _stems(root / suite)]


def list_parts(suite: str | None = None, root: Path | None = None) -> list[str]:
    """Return the names of the suites that are a part of another one, or of one suite, sorted.

    Args:
        suite: The suite that they are parts of; None for all.
        root: The one folder of cards; the shipped one and the user's own by default.

    Raises:
        CardError: If one of their cards is malformed.
    """
    return [name for name in _parts(root) if suite is None or load_suite(name, root).owner == suite]


def _parts(root: Path | None) -> list[str]:
    found = [name for folder in _roots(root) for name in _stems(folder) if not _stems(folder / name)]
    return [*dict.fromkeys(found)]


def list_tasks(suite: str | None = None, root: Path | None = None) -> list[str]:
    """Return the full names of the tasks of one suite, or of all, in the order of the table's columns.

    Args:
        suite: Name of a suite; None for all of them.
        root: The one folder of cards; the shipped one and the user's own by default.

    Raises:
        UsageError: If there is no such suite; names the nearest.
        CardError: If a suite card is malformed.
    """
    suites = list_suites(root) if suite is None else [suite]
    return [task for name in suites for task in load_suite(name, root).tasks]


def load_task(name: str, root: Path | None = None) -> TaskCard:
    """Read and check the card of one task.

    Args:
        name: Full name, e.g. "vtab/caltech101".
        root: The one folder of cards; the shipped one and the user's own by default.

    Raises:
        UsageError: If there is no such task; names the nearest.
        CardError: If its card, or the card of its suite or protocol, is malformed.
    """
    suite_name, _, task_id = name.partition("/")
    suite = load_suite(suite_name, root) if suite_name in list_suites(root) else None
    if suite is None or name not in suite.tasks:
        error = unknown_name("task", name, list_tasks(root=root), listing=_LISTING)
        own = "" if "did you mean" in str(error) or root is not None else "; cards of your own: --tasks_dir DIR"
        raise UsageError(f"{error}{own}")
    path = suite.path.parent / suite_name / f"{task_id}.yaml"
    return _task(read_yaml(path), suite, load_protocol(suite.protocol, root))


def load_suite(name: str, root: Path | None = None) -> SuiteCard:
    """Read and check the card of one suite, and that its folder holds the cards of its members and no others.

    Args:
        name: E.g. "vtab".
        root: The one folder of cards; the shipped one and the user's own by default.

    Raises:
        UsageError: If there is no such suite; names the nearest.
        CardError: If the card is malformed or does not fit its folder.
    """
    suites = list_suites(root)
    if name not in suites and name not in _parts(root):
        raise unknown_name("suite", name, [*suites, *_parts(root)], listing=_LISTING)
    home = _home(root, "suite", f"{name}.yaml", name)
    card, owner = read_yaml(home / f"{name}.yaml"), name
    of = card.children.get("tasks_of") if isinstance(card.children, dict) else None
    if of is not None:
        owner = of.one_of(suites, "tasks_of")
        if name in suites:
            raise of.error(f"a part of the suite {owner!r} has no task cards of its own; remove {home / name}")
        home = _home(root, "suite", f"{owner}.yaml", owner)
    return _suite(card, _stems(home / owner), _protocols(root), owner)


def load_protocol(name: str, root: Path | None = None) -> ProtocolCard:
    """Read and check a protocol card.

    Args:
        name: E.g. "vtab-final".
        root: The one folder of cards; the shipped one and the user's own by default.

    Raises:
        UsageError: If there is no such protocol; names the nearest.
        CardError: If the card is malformed.
    """
    names = _protocols(root)
    if name not in names:
        raise unknown_name("protocol", name, names)
    home = _home(root, "protocol", f"{_PROTOCOLS}/{name}.yaml")
    return _protocol(read_yaml(home / _PROTOCOLS / f"{name}.yaml"))


def _protocols(root: Path | None) -> list[str]:
    return [*dict.fromkeys(name for folder in _roots(root) for name in _stems(folder / _PROTOCOLS))]


def _home(root: Path | None, kind: str, card: str, tasks: str | None = None) -> Path:
    """Return the folder of cards that holds a card.

    Raises:
        CardError: If several do, and the card or, of a suite, its tasks differ.
    """
    first, *others = [folder for folder in _roots(root) if (folder / card).is_file()]

    def content(folder: Path) -> dict[str, bytes]:
        inside = [path for path in sorted((folder / tasks).glob("*")) if path.is_file()] if tasks else []
        return {path.name: path.read_bytes() for path in (folder / card, *inside)}

    for other in others:
        if content(other) != content(first):
            raise CardError(
                f"{other / card}:1: there is another {kind} of this name in {first}; give yours a name of its own"
            )
    return first


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
        raise CardError(
            f"{path}:{max(len(names), 1)}: {plural(len(names), 'class name')}, but {card.name} has "
            f"{plural(card.classes, 'class')}"
        )
    return names


def displayed_class_names(card: TaskCard) -> list[str]:
    """Return what to call a task's classes, in the order of their labels: their names, else "class 0", "class 1" …

    Raises:
        CardError: If the card names a file of class names that is malformed, see `class_names`.
    """
    return class_names(card) or [f"class {label}" for label in range(card.classes)]


def _roots(root: Path | None) -> tuple[Path, ...]:
    """Return the folder that was given, else all folders of cards."""
    if root is None:
        return tasks_dirs()
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder; give the folder that holds the suite cards (<suite>.yaml)")
    return (root,)


def _stems(folder: Path) -> list[str]:
    """Return the sorted ids of the cards in `folder` (none if it does not exist)."""
    if not folder.is_dir():
        return []
    stems = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or path.suffix not in (".yaml", ".yml"):
            continue
        if path.suffix == ".yml" or not _ID.fullmatch(path.stem):
            raise CardError(f"{path}:1: a card's file is called <id>.yaml, the id of a-z, 0-9, _ and -; rename it")
        stems.append(path.stem)
    return stems


# --- what each card holds --------------------------------------------------------------------------------------------

_ID = re.compile(r"[a-z0-9][a-z0-9_-]*")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # one component: no slash, no leading dot
_SOURCE = re.compile(r"https?://\S+|synthetic|your own")
_BACKBONE = "backbone"  # in the place of a protocol's image_size
_FOUND = "found"  # in the place of classes and counts
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
_CITATION = re.compile(r"[A-Za-z][A-Za-z0-9:_.+-]*")

# The only ones that the transforms know. A card that promised another would be a false statement about its numbers.
_OPTIONS = {
    "resize": ["squash", "centre_crop"],
    "interpolation": ["bicubic"],
    "augmentation": ["none"],
    "normalisation": ["backbone"],
}
_STAGES = {"select": ("train", "val"), "final": ("train", "test")}

_TASK_KEYS = (
    "name",
    "version",
    "group",
    "title",
    "classes",
    "counts",
    "folder",
    "source",
    "licence",
    "citation",
    "digest",
)
_SUITE_KEYS = ("name", "version", "title", "table", "folder", "protocol", "reader", "groups", "citation")
_PROTOCOL_KEYS = ("name", "version", "title", "image_size", *_OPTIONS, "stages", "training", "selection", "citation")


def _task(card: Node, suite: SuiteCard, protocol: ProtocolCard) -> TaskCard:
    keys = card.keys(_TASK_KEYS, ["variants", "notes", "reader", "class_names", "other_folders"])
    name = f"{card.path.parent.name}/{card.path.stem}"
    _fits_place(keys["name"], name)

    group = keys["group"].one_of(suite.groups, "group")
    if card.path.stem not in suite.groups[group]:
        listed = next(other for other, tasks in suite.groups.items() if card.path.stem in tasks)
        raise keys["group"].error(f"group is {group!r}, but {suite.path.name} lists the task under {listed!r}")

    found = [key for key in ("classes", "counts") if keys[key].value == _FOUND]
    if len(found) == 1:
        raise keys[found[0]].error(f"classes and counts are both {_FOUND!r}, or neither is")
    counts = {} if found else _counts(keys["counts"])
    for stage, roles in protocol.stages.items():
        for role, list_name in roles.items():
            if list_name not in counts and not found:
                raise keys["counts"].error(
                    f"counts lacks the list {list_name!r} ({role} of stage {stage!r} in protocol {protocol.name!r}); "
                    f"it has: {', '.join(counts)}"
                )

    variants: dict[str, dict[str, int]] = {}
    if "variants" in keys:
        for variant, body in keys["variants"].mapping(_ID).items():
            differing = body.keys(["counts"], [])["counts"]
            differing.keys([], counts)
            variants[variant] = {**counts, **_counts(differing)}

    names_file = keys["class_names"].text(_FILE, "a file name") if "class_names" in keys else None
    if names_file and not (card.path.parent / names_file).is_file():
        raise keys["class_names"].error(f"there is no file {names_file!r} next to the card")
    return TaskCard(
        name=name,
        version=keys["version"].positive(),
        group=group,
        title=keys["title"].text(),
        classes=0 if found else keys["classes"].positive(),
        counts=counts,
        folder=keys["folder"].text(_FILE, "a single folder name"),
        source=keys["source"].text(_SOURCE, "an address that begins with http:// or https://, synthetic, or your own"),
        licence=keys["licence"].text(),
        citation=keys["citation"].text(_CITATION, "a key of references.bib"),
        digest=None if keys["digest"].value is None else keys["digest"].text(_DIGEST, "null or sha256:<64 hex digits>"),
        variants=variants,
        notes=keys["notes"].prose() if "notes" in keys else "",
        reader=_reader(keys["reader"]) if "reader" in keys else suite.reader,
        class_names=names_file,
        path=card.path,
        other_folders=_folders(keys["other_folders"]) if "other_folders" in keys else (),
    )


def _suite(card: Node, cards: list[str], protocols: list[str], owner: str) -> SuiteCard:
    keys = card.keys(_SUITE_KEYS, ["same_images", "notes", "other_folders", "archive", "tasks_of"])
    _fits_place(keys["name"], card.path.stem)

    groups: dict[str, tuple[str, ...]] = {}
    members: dict[str, str] = {}  # task id -> its group
    for group, tasks in keys["groups"].mapping(_ID).items():
        for task in tasks.sequence():
            task_id = task.text(_ID, "a task id of a-z, 0-9, _ and -")
            if task_id in members:
                raise task.error(f"task {task_id!r} is listed twice (already in group {members[task_id]!r})")
            if task_id not in cards:
                hint = did_you_mean(task_id, [stem for stem in cards if stem not in members])
                raise task.error(f"task {task_id!r} has no card {owner}/{task_id}.yaml{hint}")
            members[task_id] = group
        groups[group] = tuple(task.text() for task in tasks.sequence())
    for stem in cards:
        if stem not in members and owner == card.path.stem:
            stray = card.path.parent / card.path.stem / f"{stem}.yaml"
            raise CardError(f"{stray}:1: this card is not in the groups of {card.path}; list it there or move it away")

    same: list[tuple[str, ...]] = []
    seen: set[str] = set()
    if "same_images" in keys:
        for together in keys["same_images"].sequence():
            tasks_together = tuple(task.one_of(members, "task") for task in together.sequence())
            if len(tasks_together) < 2 or len({*tasks_together} - seen) < len(tasks_together):
                raise together.error("same_images holds lists of two or more tasks, each task at most once")
            seen |= {*tasks_together}
            same.append(tasks_together)
    return SuiteCard(
        name=card.path.stem,
        version=keys["version"].positive(),
        title=keys["title"].text(),
        table=keys["table"].text(_ID, "a file stem of a-z, 0-9, _ and -"),
        folder=keys["folder"].text(_FILE, "a single folder name"),
        protocol=keys["protocol"].one_of(protocols, "protocol"),
        reader=_reader(keys["reader"]),
        groups=groups,
        same_images=tuple(same),
        citation=keys["citation"].text(_CITATION, "a key of references.bib"),
        notes=keys["notes"].prose() if "notes" in keys else "",
        path=card.path,
        other_folders=_folders(keys["other_folders"]) if "other_folders" in keys else (),
        archive=keys["archive"].prose() if "archive" in keys else "",
        tasks_of=owner if "tasks_of" in keys else None,
    )


def _protocol(card: Node) -> ProtocolCard:
    keys = card.keys(_PROTOCOL_KEYS, ["notes"])
    _fits_place(keys["name"], card.path.stem)

    stages: dict[str, dict[str, str]] = {}
    for stage, roles in keys["stages"].keys(list(_STAGES), []).items():
        lists = roles.keys(list(_STAGES[stage]), [])
        stages[stage] = {role: lists[role].text(_ID, "a list name of a-z, 0-9, _ and -") for role in _STAGES[stage]}
    test = stages["final"]["test"]
    for stage, role in (("select", "train"), ("select", "val"), ("final", "train")):
        if stages[stage][role] == test:  # the honest way is the only one that a card can state
            raise keys["stages"].error(f"{role} of stage {stage!r} is the test list {test!r}; use a list without it")

    training = keys["training"].mapping(_ID)
    return ProtocolCard(
        name=card.path.stem,
        version=keys["version"].positive(),
        title=keys["title"].text(),
        image_size=None if keys["image_size"].value == _BACKBONE else keys["image_size"].positive(),
        **{key: keys[key].one_of(allowed, key) for key, allowed in _OPTIONS.items()},
        stages=stages,
        training={section: {k: v.value for k, v in body.mapping().items()} for section, body in training.items()},
        selection=keys["selection"].prose(),
        citation=keys["citation"].text(_CITATION, "a key of references.bib"),
        notes=keys["notes"].prose() if "notes" in keys else "",
        path=card.path,
    )


def _fits_place(name: Node, expected: str) -> None:
    if name.text() != expected:
        raise name.error(f"name is {show(name.value)}, but a card in this place is called {expected!r}")


def _counts(node: Node) -> dict[str, int]:
    return {name: count.positive() for name, count in node.mapping(_ID).items()}


def _folders(node: Node) -> tuple[str, ...]:
    return tuple(folder.text(_FILE, "a single folder name") for folder in node.sequence())


def _reader(node: Node) -> ReaderSpec:
    keys = node.keys(["kind"], ["options"])
    options: dict[str, int | str | float | bool] = {}
    if "options" in keys:
        for name, option in keys["options"].mapping().items():
            if not isinstance(option.value, (bool, int, float, str)):
                raise option.error(f"reader option {name!r} must be a number, a text or true/false, not {option.kind}")
            options[name] = option.value
    return ReaderSpec(keys["kind"].text(_ID, "a reader name of a-z, 0-9, _ and -"), options)
