"""The parts that all checks share: findings, the record store, the audited case, and text helpers."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache, cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from svp_bench.core.errors import RecordError, UsageError
from svp_bench.core.resources import tasks_dirs
from svp_bench.records.digests import canonical_digest, card_digest, cell_config
from svp_bench.records.record import Record
from svp_bench.records.selection import (
    FOLD_KEYS,
    SelectedConfig,
    context_of,
    read_selected_config,
    selected_config_path,
)
from svp_bench.records.store import read_records, record_path
from svp_bench.tasks.cards import OTHER_PIXELS, ProtocolCard, TaskCard, load_protocol, load_suite, load_task

Verdict = Literal["pass", "note", "fail"]
Line = tuple[Verdict, str]
SHOWN = 6  # names in one line
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")  # safe in a path


@dataclass(frozen=True)
class Finding:
    """One line of an audit.

    Attributes:
        verdict: "pass", "note" or "fail".
        subject: Name of the check.
        text: The finding in one line.
    """

    verdict: Verdict
    subject: str
    text: str


class Cards(NamedTuple):
    """The cards of a run, None where the one here differs, and the findings about them."""

    task: TaskCard | None
    protocol: ProtocolCard | None
    lines: tuple[Line, ...]


@dataclass
class RecordStore:
    """The records of a results folder, read once.

    Attributes:
        root: The folder.
    """

    root: Path
    _contexts: dict[Any, tuple[dict[str, Any], str]] = field(default_factory=dict, repr=False)

    @cached_property
    def records(self) -> list[Record]:
        """All valid records."""
        return read_records(self.root)[0]

    @cached_property
    def by_id(self) -> dict[str, Record]:
        """Run id → record."""
        return {record.run_id: record for record in self.records}

    @cached_property
    def by_path(self) -> dict[Path, Record]:
        """Absolute path → record."""
        return {record_path(record, self.root.absolute()): record for record in self.records}

    @cached_property
    def by_task(self) -> Mapping[str, list[Record]]:
        """Task → records."""
        found = defaultdict(list)
        for record in self.records:
            found[record.task].append(record)
        return found

    @cached_property
    def by_family(self) -> Mapping[tuple[Any, ...], list[Record]]:
        """`family_of` → records."""
        found = defaultdict(list)
        for record in self.records:
            found[family_of(record)].append(record)
        return found

    @cached_property
    def weights(self) -> Mapping[tuple[str, str, str], Mapping[str | None, set[str]]]:
        """Backbone, checkpoint and status → digest of the initial weights → run ids."""
        found: dict[tuple[str, str, str], dict[str | None, set[str]]] = defaultdict(lambda: defaultdict(set))
        for record in self.records:
            found[record.backbone, record.checkpoint, record.status][record.checkpoint_digest].add(record.run_id)
        return found

    def context(self, record: Record, keys: tuple[str, ...]) -> tuple[dict[str, Any], str]:
        """Return `context_of` a record for the keys of a search, and its digest; computed once for a cell."""
        name = record.config_digest, tuple(sorted((record.method_source or {}).items())), keys
        if name not in self._contexts:
            context = context_of(cell_config(record.config), keys, record.method_source)
            self._contexts[name] = context, canonical_digest(context)
        return self._contexts[name]

    @cached_property
    def selected_configs(self) -> Mapping[Path, SelectedConfig]:
        """Path → selected config, of all that are valid."""
        found = {}
        for path in sorted((self.root / "selected_configs").rglob("*.json")):
            with suppress(RecordError):
                found[path] = read_selected_config(path)
        return found

    @cached_property
    def by_digest(self) -> Mapping[str, list[Path]]:
        """Digest of a valid selected config → its paths."""
        found: dict[str, list[Path]] = defaultdict(list)
        for path, one in self.selected_configs.items():
            found[one.digest].append(path)
        return found


@dataclass
class Case:
    """A record under audit.

    Attributes:
        record: The record.
        path: Its file.
        store: The records of its results folder; None if it lies in no results folder.
    """

    record: Record
    path: Path
    store: RecordStore | None

    @property
    def stored(self) -> Sequence[Record]:
        """All other records of the store."""
        records = self.store.records if self.store else ()
        return [other for other in records if other.run_id != self.record.run_id]

    @property
    def of_task(self) -> Sequence[Record]:
        """All other records of the task in the store."""
        records = self.store.by_task.get(self.record.task, ()) if self.store else ()
        return [other for other in records if other.run_id != self.record.run_id]

    @cached_property
    def family(self) -> list[Record]:
        """Other runs of the same kind and family."""
        found = self.store.by_family[family_of(self.record)] if self.store else []
        return [one for one in found if one.kind == self.record.kind and one.run_id != self.record.run_id]

    @cached_property
    def cell(self) -> list[Record]:
        """Other runs of the same kind and cell."""
        return [one for one in self.family if cell_of(one) == cell_of(self.record)]

    @cached_property
    def cards(self) -> Cards:
        """The task and the protocol card, compared with those of the run."""
        record, lines, task_card, protocol = self.record, list[Line](), None, None
        name = f"{record.protocol} version {record.protocol_version}"
        try:
            task, suite_protocol = _task_card(record.task, tasks_dirs())
        except UsageError:
            text = f"there is no task card {record.task} here: no table has such a task (your own cards: --tasks_dir)"
            return Cards(None, None, (("fail", text),))
        if task.version != record.task_version:
            text = f"run on version {record.task_version} of the task card, now {task.version}: tables leave it out"
            lines.append(("fail", text))
        elif edited := self._edited("task", task):
            lines.append(("fail", edited))
        else:
            task_card = task
        try:
            card = _protocol_card(record.protocol, tasks_dirs())
        except UsageError:
            lines.append(("note", f"{name}: there is no such card here, so its splits and budget were not checked"))
            return Cards(task_card, None, tuple(lines))
        if card.version != record.protocol_version:
            text = f"{name}; the card here is version {card.version}, so splits and budget were not checked"
            lines.append(("note", text))
        elif edited := self._edited("protocol", card):
            lines.append(("fail", edited))
        else:
            protocol = card
            own = "" if record.protocol == suite_protocol else f"; the protocol of the suite is {suite_protocol}"
            lines.append(("note" if own else "pass", f"{name}, as the card here{own}"))
        return Cards(task_card, protocol, tuple(lines))

    def _edited(self, kind: str, card: TaskCard | ProtocolCard) -> str:
        """Return the finding if a card differs from that of the run in spite of the same version, else ""."""
        stated, here = (self.record.card_digests or {}).get(kind), card_digest(card)
        if stated is None or stated == here:
            return ""
        digests = f"of the run ({short(stated)}) is not the one here ({short(here)})"
        return f"the {kind} card {card.name} version {card.version} {digests}: it was changed without a new version"

    @cached_property
    def selected(self) -> tuple[SelectedConfig | None, str]:
        """The selected config of a searched run and its path; else None and the reason, "" without a search."""
        search = self.record.search
        if search is None:
            return None, ""
        if self.store is None:
            return None, "the record lies in no results folder: give that of its selected config, --results_root R"
        for name in (search.name, self.record.method):
            if not _NAME.fullmatch(name):
                return None, f"{name!r} cannot be part of the name of a selected config"
        seed = self.record.seed if search.nested else None
        of = search.name, search.declaration, self.record.task
        path = selected_config_path(self.store.root, *of, self.record.method, seed)
        # A method file and a further backbone have names of their own: the digest in the record tells which
        named = [one for one in self.store.by_digest.get(search.selected_config, ()) if one.parent == path.parent]
        path = path if path in named or not named else named[0]
        where = path.relative_to(self.store.root).as_posix()
        if not path.is_file():
            return None, f"{where} is missing: the selection of the setting cannot be checked"
        try:
            return self.store.selected_configs.get(path) or read_selected_config(path), where
        except RecordError as error:
            return None, str(error).replace(str(path), where)

    @property
    def split_counts(self) -> Mapping[str, int]:
        """Number of images of each split on the task card; empty if the data of the run differ from the card."""
        card = self.cards.task
        if card is None or self.record.data_status != "as_card":
            return {}
        variants: Mapping[str, Mapping[str, int]] = {"card": card.counts, **card.variants}
        if self.record.data_variant in OTHER_PIXELS:  # the counts of the card or of a variant: those that all agree on
            return {
                name: count
                for name, count in card.counts.items()
                if {counts[name] for counts in variants.values()} == {count}
            }
        return variants.get(self.record.data_variant, {})


def verdicts(problems: Iterable[str], good: str, bad: Verdict = "fail") -> Iterator[Line]:
    """Yield the problems, or the line `good` if there are none."""
    found = list(problems)
    yield from ((bad, text) for text in found)
    if not found:
        yield "pass", good


@cache
def _task_card(name: str, folders: tuple[Path, ...]) -> tuple[TaskCard, str]:
    return load_task(name), load_suite(name.partition("/")[0]).protocol


@cache
def _protocol_card(name: str, folders: tuple[Path, ...]) -> ProtocolCard:
    return load_protocol(name)


def family_of(record: Record) -> tuple[Any, ...]:
    """Return the key of the runs of a method on one task that tables compare: all but settings and seed."""
    return (
        *(record.task, record.task_version, record.protocol, record.protocol_version, record.backbone),
        *(record.checkpoint_digest, record.method, record.data_variant, record.data_digest),
    )


def cell_of(record: Record) -> tuple[Any, ...]:
    """Return the key of the runs that differ by seed only."""
    return (*family_of(record), record.setting_digest, record.config_digest, record.source_digest)


def get(config: Mapping[str, Any], key: str) -> Any:
    """Return a value of a config by its dotted key, None if it is missing."""
    node: Any = config
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


def fold_of(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Return the number of folds, the fold and the seed of a config; 0 for a missing or wrong value."""
    folds, fold, seed = (
        value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0
        for value in (get(config, key) for key in FOLD_KEYS)
    )
    return folds, fold, seed


def split_text(splits: Mapping[str, str]) -> str:
    """Return "train on SPLIT, test on SPLIT"."""
    order = ("test", "val", "train")
    roles = sorted(splits, key=lambda role: -order.index(role) if role in order else 1)
    return ", ".join(f"{role} on {splits[role]}" for role in roles) or "no split"


def short(digest: str | None) -> str:
    """Return the first digits of a digest."""
    return f"sha256:{digest.removeprefix('sha256:')[:12]}" if digest else "unknown"


def some(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - SHOWN} more" if len(listed) > SHOWN else ""
    return ", ".join(listed[:SHOWN]) + more


def start_of(record: Record) -> datetime | None:
    """Return the start time in a run id, or None."""
    for part in record.run_id.split("-"):
        try:
            return datetime.strptime(part, "%Y%m%dT%H%M%SZ").replace(tzinfo=timezone.utc)
        except ValueError:
            continue
    return None
