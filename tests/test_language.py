"""Search package, cards, configs and docs for words that are not terms of the field."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Pattern of a word → what to write. General English words (make, list, point, way, about, need) cannot be searched for.
TERMS = {
    r"pictures?": "image",
    r"drawn": "synthetic, or sampled",
    r"stand[-_ ]ins?": "synthetic data set",
    r"verbs?": "subcommand",
    r"rooms?|houses?|front door": "package, module, entry point; memory: available",
    r"holes?": "missing result",
    r"plumbing": "smoke test",
    r"keepers?|kept": "cached",
    r"remakes?|remade": "recompute",
    r"spared": "excluded",
    r"told|said|says": "reported, stated, states",
    r"what came of": "result, outcome",
    r"choices?": "selected config",
    r"departures?|departs?": "override",
    r"walks?|walked": "iterate, path",
    r"go(?:es|ing)? on|went on": "continue, resume",
    r"gauges?|gauged": "probe",
    r"shortages?": "out-of-memory report",
    r"shelf|shelves": "record store",
    r"straight": "squash",
    r"twins?|peers?": "reference implementation, baseline",
    r"meters?|stoppers?": "throughput monitor, preemption handler",
    r"c[oa]me by": "chosen, selected",
    r"at hand|besides?": "available, next to, in addition to",
    r"mend|mends|mended": "fix",
    r"whatever|whoever|of which|what follows from": "name the thing",
    r"wording|quiet\.py|proof\.py|using\.py": "notes, logging, reproduce, predict",
    r"complaints?": "error",
}
WORDS = re.compile(r"(?<![a-zA-Z])(?:" + "|".join(f"(?:{term})" for term in TERMS) + r")(?![a-zA-Z])", re.IGNORECASE)

# Lines that may hold such a word: pattern of the line → the reason.
ALLOWED: dict[str, str] = {
    r'\.choices?\(|choices=|\["choices"\]|`Literal` a choice': "names of argparse, random and NumPy",
    r"rand_augment_choices|choice_weights": "names of timm",
    r"svp-bench/choice-[12]": "schema ids of selected-config files, which are part of their digests",
    r'--choice|choices/|"choices"|key == "choice"|"drawn"|own/pictures|"straight"': "older names that are still read",
    r"\b(?:os|ast)\.walk\(": "names of Python",
    r"reset\) by peer": "a message of the system",
    r'head.*kept|kept.*head|"kept"|\bkept: |kept=|self\.kept|kept else': "`checkpoint_load.kept` of records",
    r"svp-bench drawn \{VERSION\}": "a random seed, on which the bytes of the demo tasks depend",
    r"of which \{last\} decides": "stored in selected configs, which are compared with it",
    r"[Hh]ouse-number|says nothing about transfer": "plain English",
}
CHECKED = [
    *(path for path in sorted((ROOT / "svp_bench").rglob("*")) if path.suffix in {".py", ".j2", ".js", ".css", ".md"}),
    *sorted((ROOT / "tasks").rglob("*.yaml")),
    *sorted((ROOT / "configs").rglob("*.yaml")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "pretraining").rglob("*.py")),
    *sorted((ROOT / "benchmarks").glob("*.py")),
    *(ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "Makefile", "pretraining/README.md")),
    ROOT / "benchmarks/README.md",
    *(ROOT / "results" / name for name in ("README.md", "reference/README.md")),
]
ALLOWED_LINE = re.compile("|".join(ALLOWED))


def findings(text: str) -> Iterator[tuple[int, str]]:
    """Yield (line number, word) of each word that does not belong in a text."""
    for number, line in enumerate(text.splitlines(), 1):
        if not ALLOWED_LINE.search(line):
            yield from ((number, word) for word in WORDS.findall(line))


@pytest.mark.parametrize("path", CHECKED, ids=[path.relative_to(ROOT).as_posix() for path in CHECKED])
def test_the_words_are_those_of_the_field(path: Path) -> None:
    found = [f"{path.name}:{number}: {word}" for number, word in findings(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)


def test_a_word_is_found_in_prose_and_in_names() -> None:
    text = "A picture.\ndef drawn_pictures(kept): pass\nWhatever is there\nimages only\noptions.add(choices=names)\n"
    assert list(findings(text)) == [
        (1, "picture"),
        (2, "drawn"),
        (2, "pictures"),
        (2, "kept"),
        (3, "Whatever"),
    ]
