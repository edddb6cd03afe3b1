"""Where a task's folder is: below the data root, in one of the places where people unpack `vtab-1k.zip`."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from svp_bench.core.errors import DataError
from svp_bench.tasks.cards import SuiteCard, TaskCard

__all__ = ["ROOT_VARIABLE", "find_folder", "list_file", "locate"]

ROOT_VARIABLE = "SVP_BENCH_DATA"


def list_file(folder: Path, name: str) -> Path:
    """Return the file of the list `name` in a task's folder."""
    return folder / f"{name}.txt"


def locate(card: TaskCard, suite: SuiteCard, root: Path | None = None) -> Path:
    """Return the folder that holds the lists of a task.

    `root` itself may be the task's folder; else its sub-folders `<task>`, `<suite>/<task>` and `<suite>/<suite>/<task>`
    are tried (an archive unpacked into a folder of its own name doubles it). A place with all lists of the card goes
    before one with some.

    Args:
        card: The task's card.
        suite: The card of its suite.
        root: The data root; by default $SVP_BENCH_DATA, else `data/` in the working directory.

    Raises:
        DataError: If no place holds a list; names all that were tried.
    """
    remedy = suite.archive or f"the images of {card.source} as lists and folders"
    forms = [
        lambda place, wanted=wanted: wanted(list_file(place, name).is_file() for name in card.counts)
        for wanted in (all, any)
    ]
    return find_folder(card, suite, root, forms, _file_names(card), remedy)


def find_folder(
    card: TaskCard,
    suite: SuiteCard,
    root: Path | None,
    forms: Sequence[Callable[[Path], bool]],
    content: str,
    remedy: str,
    *,
    shared: bool = False,
) -> Path:
    """Return the folder of a task's data: the first place that has the first of `forms` which any place has.

    The places are the names of the task's folder below the root, below the names of the suite's folder, and below that
    folder doubled; and the root itself, if it has such a name.

    Args:
        card: The task's card.
        suite: The card of its suite.
        root: The data root, as in `locate`.
        forms: Tests of a place, the form of the data that is preferred first.
        content: What would be found there, for the message: "train.txt or test.txt".
        remedy: What to get, for the message.
        shared: Are the data found also where the root, or the suite's folder, holds several data sets side by side?

    Raises:
        DataError: If no place has any of the forms; names all that were tried.
    """
    if root is not None:
        given, source = root, "--data.root"
    elif variable := os.environ.get(ROOT_VARIABLE):
        given, source = Path(variable), f"${ROOT_VARIABLE}"
    else:
        given, source = Path("data"), "the default data root"
    base = Path(os.path.abspath(given.expanduser()))

    names = (card.folder, *card.other_folders)
    suites = (suite.folder, *suite.other_folders)
    above = [base, *(base / name for name in suites), *(base / name / name for name in suites)]
    places = [folder / name for folder in above for name in names]
    if base.name in names:
        places.insert(0, base)
    if shared:
        places += [folder for folder in above if folder not in places]
    for form in forms:
        for place in places:
            if form(place):
                return place

    raise DataError(
        f"no data of {card.name}: none of {', '.join(map(str, places))} holds {content} "
        f"({source} is {given}); get {remedy} and give its folder with --data.root DIR or ${ROOT_VARIABLE}, or try "
        f"with synthetic images: `svp-bench data draw`"
    )


def _file_names(card: TaskCard) -> str:
    names = [f"{name}.txt" for name in card.counts]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} or {names[-1]}"
