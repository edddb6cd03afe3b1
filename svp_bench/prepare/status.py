"""Report which tasks have data on disk, without opening an image: from the split files, and from cached verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from svp_bench.core.errors import DataError
from svp_bench.core.resources import custom_tasks_flags
from svp_bench.data.locate import MissingDataError, locate
from svp_bench.data.sources import inspect, measured, open_source
from svp_bench.data.torchvision_sets import TORCHVISION_SETS
from svp_bench.prepare.known import known_sources
from svp_bench.prepare.verdict import load_verdict
from svp_bench.tasks.cards import SuiteCard, TaskCard, load_suite, load_task

State = Literal["absent", "partial", "unverified", "verified", "different", "outdated", "broken", "synthetic"]


@dataclass(frozen=True)
class TaskStatus:
    """The data of one task.

    Attributes:
        task: Full name.
        status: "absent": no folder has any of its files; "partial": splits are missing; "unverified": the splits are
            as on the card, and no image was decoded; "verified" and "different": as `data verify` found, with the files
            as they were then; "outdated": verified once, and changed since; "broken": malformed, or files that differ
            from the manifest; "synthetic": synthetic images.
        counts: Split → number of images found; empty if they are known only after `data verify`.
        card_counts: Split → number of images on the card.
        place: The folder; where it was looked for if the data are absent; "package" for built-in data.
        detail: Differences and errors, in one line; "" if there are none.
        next: The command that gets, repairs or verifies the data; "" if nothing is to be done.
    """

    task: str
    status: State
    counts: Mapping[str, int]
    card_counts: Mapping[str, int]
    place: str
    detail: str
    next: str


def task_status(name: str, root: Path | None = None) -> TaskStatus:
    """Return the status of a task's data. Imports no torch and opens no image.

    Args:
        name: Full name of the task.
        root: The data root; see `data_root`.

    Raises:
        UsageError: If there is no such task.
        CardError: If a card is malformed.
    """
    card = load_task(name)
    suite = load_suite(card.suite)
    where = "" if root is None else f" --root {root}"
    verify = f"svp-bench data verify {name}{where}"

    def status(
        state: State, place: str, detail: str = "", counts: Mapping[str, int] | None = None, then: str = ""
    ) -> TaskStatus:
        return TaskStatus(name, state, dict(counts or {}), dict(card.counts), place, detail, then)

    get = prepare_command(card, suite)
    get = f"{get}{where}" if get else ""
    cached = load_verdict(name, root)
    if cached is not None:
        verdict, same = cached
        place = verdict.folder or "package"
        if same:
            detail = "; ".join(verdict.notes)
            if verdict.variant == "synthetic":
                return status("synthetic", place, detail, verdict.counts, get)
            if verdict.status == "changed":
                return status("broken", place, detail, verdict.counts, verify)
            return status(verdict.status, place, detail, verdict.counts)
        if Path(place).is_dir():
            return status("outdated", place, f"changed since {verdict.time}", verdict.counts, verify)
    try:
        if card.reader.kind == "torchvision":  # whose reader imports torch
            files = TORCHVISION_SETS[str(card.reader.options["set"])].files
            place = str(locate(card, suite, root, [files], shared=True))
            if lacks := [file for file in files if not (Path(place) / file).exists()]:
                return status("partial", place, f"lacks {', '.join(lacks)}", then=get)
            return status("unverified", place, then=verify)
        card = measured(card, root)
        source = open_source(card, root, suite=suite)
        report = inspect(card, source, sorted(source.splits))
    except MissingDataError as error:
        return status("absent", ", ".join(map(str, error.places)), "" if error.places else str(error), then=get)
    except DataError as error:
        return status("broken", "", str(error), then=get)
    place = source.origin if Path(source.origin).is_dir() else "package"
    detail = "; ".join(report.notes)
    if source.synthetic:
        return status("synthetic", place, detail, report.counts, get)
    if lacks := [split for split in card.counts if split not in source.splits]:
        return status("partial", place, f"lacks {', '.join(lacks)}", report.counts, get)
    return status("different" if report.status == "different" else "unverified", place, detail, report.counts, verify)


def prepare_command(card: TaskCard, suite: SuiteCard) -> str:
    """Return the command that gets the data of a task: from a source that is known to have it, else from a folder."""
    known = known_sources(card, suite)
    if card.reader.kind == "torchvision":
        source = "torchvision"
    elif card.reader.kind not in ("split_files", "json_split"):
        return ""
    else:
        source = "hub" if known.hub else "native" if known.native else "tfds" if known.tfds else "folder --from DIR"
    flags = "".join(f" {flag}" for flag in custom_tasks_flags())
    return f"svp-bench data prepare {card.name} --source {source}{flags}"
