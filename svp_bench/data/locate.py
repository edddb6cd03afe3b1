"""Find the folder of a task below the data root, in the places where people unpack archives such as `vtab-1k.zip`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from svp_bench.core.errors import DataError
from svp_bench.data.manifest import MANIFEST
from svp_bench.data.reading import SYNTHETIC_MARK, joined_names
from svp_bench.tasks.cards import SuiteCard, TaskCard

ROOT_VARIABLE = "SVP_BENCH_DATA"


class MissingDataError(DataError):
    """No place has the data of a task.

    Attributes:
        places: The folders that were tried.
    """

    def __init__(self, message: str, places: Sequence[Path] = ()) -> None:
        super().__init__(message)
        self.places = tuple(places)


def data_root(root: Path | None) -> tuple[Path, str]:
    """Return the absolute data root (as given, else $SVP_BENCH_DATA, else `data/`), and its origin for messages."""
    variable = os.environ.get(ROOT_VARIABLE)
    given = root or Path(variable or "data")
    source = "--data.root" if root else f"${ROOT_VARIABLE}" if variable else "the default data root"
    return Path(os.path.abspath(given.expanduser())), f"{source} is {given}"


def locate(
    card: TaskCard,
    suite: SuiteCard,
    root: Path | None = None,
    forms: Sequence[Sequence[str]] = (),
    remedy: str = "",
    *,
    shared: bool = False,
) -> Path:
    """Return the folder of a task's data.

    The places are the names of the task's folder below the root, below the names of the suite's folder, and below that
    folder doubled (an archive unpacked into a folder of its own name); and the root itself, if it has such a name. A
    place with all files of a form goes before one with some, and the first form before the second; of several such
    places, one with a manifest goes first. A marked folder of synthetic images comes last.

    Args:
        card: The task's card.
        suite: The card of its suite.
        root: The data root; by default $SVP_BENCH_DATA, else `data/` in the working directory.
        forms: Files or folders that the data set consists of, in each form that it may have; by default split files.
        remedy: What to get, for the message.
        shared: Whether the root or the suite's folder may itself hold the data set, next to others.

    Raises:
        MissingDataError: If no place has any of the files; names all that were tried.
    """
    forms = forms or [[f"{name}.txt" for name in card.counts]]
    remedy = remedy or suite.archive or f"the images of {card.source} as lists and folders"
    base, origin = data_root(root)
    names = (card.folder, *card.other_folders)
    suites = (suite.folder, *suite.other_folders)
    above = [base, *(base / name for name in suites), *(base / name / name for name in suites)]
    places = [folder / name for folder in above for name in names]
    if base.name in names:
        places.insert(0, base)
    if shared:
        places += [folder for folder in above if folder not in places]
    for form in (*forms, [SYNTHETIC_MARK]):
        for enough in (all, any):
            hits = [place for place in places if enough((place / file).exists() for file in form)]
            if hits:
                return next((place for place in hits if (place / MANIFEST).exists()), hits[0])
    files = joined_names([file for form in forms for file in form], "or")
    raise MissingDataError(
        f"no data of {card.name}: none of {', '.join(map(str, places))} holds {files} ({origin}); get {remedy} and "
        f"give its folder with --data.root DIR or ${ROOT_VARIABLE}, or try with synthetic images: "
        "`svp-bench data draw`",
        places,
    )
