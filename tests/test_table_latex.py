"""The LaTeX of tables: its structure is checked here, for no TeX is needed to run the tests."""

from __future__ import annotations

import dataclasses
import itertools
import re
from pathlib import Path
from typing import Any

import pytest
from helpers import run
from synthetic_records import make_record, synthetic_record

from svp_bench.records.record import Record
from svp_bench.records.store import write_record
from svp_bench.tables.build import build_table, table_paths
from svp_bench.tables.render_latex import escape, render_latex
from svp_bench.tasks.cards import load_protocol, load_suite

SHARE = "model.method.init_args.share_layers"


def latex(records: list[Record], suite: str = "vtab") -> str:
    card = load_suite(suite)
    protocols = [load_protocol(card.protocol)]
    return render_latex(build_table(card, records, task_versions=dict.fromkeys(card.tasks, 1), protocols=protocols))


def whole(method: str, right: int, suite: str = "vtab", seeds: int = 3, **fields: Any) -> list[Record]:
    return [
        make_record(task, method, seed, right + seed + len(task) % 3, 1000, **fields)
        for task in load_suite(suite).tasks
        for seed in range(seeds)
    ]


def body(text: str) -> str:
    """The text without comments."""
    return "\n".join(line for line in text.splitlines() if not line.startswith("%"))


def tabulars(text: str) -> list[tuple[str, list[str]]]:
    """Column specification and lines of each tabular."""
    found = re.findall(r"\\begin\{tabular\}\{(\w+)\}\n(.*?)\\end\{tabular\}", text, re.DOTALL)
    return [(columns, inside.splitlines()) for columns, inside in found]


def width(line: str) -> int:
    """Columns that a line of a tabular fills."""
    assert line.endswith(r" \\"), line
    cells = re.split(r"(?<!\\)&", line)
    spans = [re.match(r"\s*\\multicolumn\{(\d+)\}", cell) for cell in cells]
    return sum(int(span[1]) if span else 1 for span in spans)


def check(text: str) -> None:
    """Environments, braces and dollars close; rows fill their columns; nothing special stands unescaped."""
    plain = body(text)
    stack: list[str] = []
    for kind, name in re.findall(r"\\(begin|end)\{(\w+)\}", plain):
        if kind == "begin":
            stack.append(name)
        else:
            assert stack.pop() == name
    assert stack == []
    bare = re.sub(r"\\[\\{}$_%&#]", "", plain.replace(r"$_{\pm", r"${\pm"))
    assert not re.search(r"[%#_]", re.sub(r"\\(label|begin|end)\{[^}]*\}", "", bare))
    assert bare.count("{") == bare.count("}")
    assert bare.count("$") % 2 == 0
    assert not set(plain) & set("†‡§–±×\t")
    for columns, lines in tabulars(plain):
        assert (lines[0], lines[-1]) == (r"\toprule", r"\bottomrule")
        assert lines.count(r"\midrule") == 1
        for line in lines:
            if not line.startswith((r"\toprule", r"\midrule", r"\bottomrule", r"\cmidrule")):
                assert width(line) == len(columns), (columns, line)
    allowed = {"begin", "end", "centering", "caption", "label", "scriptsize", "setlength", "tabcolsep", "smallskip"}
    allowed |= {
        "medskip",
        "parbox",
        "linewidth",
        "textbf",
        "underline",
        "multicolumn",
        "shortstack",
        "dagger",
        "ddagger",
    }
    allowed |= {"toprule", "midrule", "bottomrule", "cmidrule", "pm", "S", "P", "textbackslash", "textasciitilde"}
    assert set(re.findall(r"\\([A-Za-z]+)", plain)) <= allowed | {"textasciicircum", "times", "ldots"}


def test_structure_of_a_full_table() -> None:
    text = latex([*whole("svp", 900), *whole("linear", 500), *whole("full", 700)[3:]])
    check(text)
    found = tabulars(text)
    assert [len(columns) for columns, _ in found] == [8, 5, 9, 11]  # the tasks of three groups, then the means
    names = [line.split(" & ")[0] for line in found[0][1] if r" \\" in line][1:]
    assert names == ["method", r"svp $^{\P}$", "linear", r"full $^{\P}$"]
    assert r"method & cifar & caltech101 & dtd & \shortstack[r]{oxford \\ flowers102} & " in text
    assert "& -- &" in text  # a hole
    assert r"\multicolumn{8}{c}{structured}" in text


def test_the_caption_says_what_the_numbers_are() -> None:
    text = latex(whole("svp", 900) + whole("linear", 500, seeds=2))
    (caption,) = re.findall(r"\\caption\{(.*)\}\n", text)
    for part in (
        "VTAB-1k: top-1 accuracy in percent.",
        "Protocol vtab-final, version 1. Hyper-parameters are chosen on val200",
        "Track default: no search is recorded.",
        r"Backbone vim\_small\_patch16\_224, hub (sha256:abababababab).",
        "2--3 seeds a task.",
        r"In brackets: 95 \% interval for new tasks.",
    ):
        assert part in caption
    assert (
        r"$\pm$ behind a mean is half its 95 \% interval for these tasks and new seeds (Welch--Satterthwaite)." in text
    )


def test_only_what_the_intervals_allow_is_bold() -> None:
    rows = {"svp": 900, "lora": 700, "linear": 500}
    clear = [
        make_record(t, m, s, right + n + 3 * s + s * len(m) % 5, 1000)
        for m, right in rows.items()
        for s in range(7)
        for n, t in enumerate(load_suite("vtab").tasks)
    ]
    text = latex(clear)
    check(text)
    assert len(re.findall(r"\\textbf", text)) == len(re.findall(r"\\underline", text)) == 19 + 5
    means = tabulars(text)[-1][1]
    assert re.fullmatch(r"1 & svp \$\^\{\\P\}\$ & (\\textbf\{\d\d\.\d\d\}\$_\{\\pm \d\.\d\d\}\$ & ){5}\[.*", means[3])
    assert re.fullmatch(r"2 & lora & (\\underline\{\d\d\.\d\d\}\$_\{\\pm \d\.\d\d\}\$ & ){5}\[.*", means[4])
    assert "Bold: better than every other row of the column by a sign flip over the shared seeds, from 6 on" in text
    single = latex([record for record in clear if record.seed == 0])
    check(single)
    assert "textbf" not in single
    assert "underline" not in single
    assert "Nothing is bold: differences between rows cannot be tested with fewer than 6 seeds." in single
    assert "the variance is unknown (svp, lora, linear)." in single


def test_marks_of_the_data_have_footnotes() -> None:
    records = whole("svp", 900)
    marked = [
        dataclasses.replace(r, data_status="different") if r.task == "vtab/dtd" else r
        for r in records
        if r.task != "vtab/kitti"
    ]
    marked += [make_record("vtab/kitti", seed=s, data_variant="zip") for s in range(3)]
    text = latex(marked)
    check(text)
    assert re.search(r"\d\$\^\{\\dagger\}\$ &", text)
    assert re.search(r"\d\$\^\{\\ddagger\}\$ &", text)
    assert r"\parbox{0.95\linewidth}{$^{\dagger}$ The files on disk differ from the task card" in text
    assert "that of the card: kitti (zip)." in text
    drawn = latex([synthetic_record(task) for task in load_suite("vtab").tasks])
    check(drawn)
    assert r"$^{\S}$ Synthetic data" in drawn
    assert drawn.count(r"$^{\S}$") == 19 + 5 + 1


def test_random_weights_are_a_smoke_test() -> None:
    text = latex(whole("svp", 900, checkpoint="none", checkpoint_digest=None))
    check(text)
    assert "these rows are a smoke test and are not ranked." in text
    assert r"\pm" not in text
    assert r"-- & svp $^{\P}$ &" in text


def test_one_group_has_one_tabular_of_tasks() -> None:
    text = latex(
        [*whole("svp", 900, "fgvc", protocol="fgvc-final"), *whole("linear", 500, "fgvc", protocol="fgvc-final")],
        "fgvc",
    )
    check(text)
    assert [len(columns) for columns, _ in tabulars(text)] == [
        6,
        6,
    ]  # of five sources there is no interval over new tasks
    assert "multicolumn" not in text


NASTY = r"a_b 50% & #1 {x} $y$ \z ~t ^u <v> |w| 'q' \"r\" – ± × † → 語 é"


def test_settings_with_special_characters_are_escaped() -> None:
    records = [
        make_record(task, right=3 + n, changes={SHARE: value})
        for task in load_suite("vtab").tasks
        for n, value in enumerate((NASTY, 1))
    ]
    text = latex(records)
    check(text)
    assert (
        r"a\_b 50\% \& \#1 \{x\} \$y\$ \textbackslash{}z \textasciitilde{}t \textasciicircum{}u $<$v$>$ $|$w$|$" in text
    )


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("plain", "plain"),
        ("a_b", r"a\_b"),
        ("100 %", r"100 \%"),
        ("a & b", r"a \& b"),
        ("#", r"\#"),
        ("a\nb  c", "a b c"),
        ("é", "é"),
        ("→", "(U+2192)"),
        ("1–2", "1--2"),
    ],
)
def test_escape(given: str, expected: str) -> None:
    assert escape(given) == expected


def test_sections_have_labels_of_their_own() -> None:
    text = latex([*whole("svp", 900), *whole("svp", 800, backbone="vim_tiny_patch16_224")])
    check(text)
    assert re.findall(r"\\label\{(.*?)\}", text) == ["tab:vtab1k-1", "tab:vtab1k-2"]


def test_without_records_there_are_only_comments(tmp_path: Path) -> None:
    text = latex([])
    assert body(text) == ""
    assert "There are no complete records" in text


def test_the_command_writes_the_file(tmp_path: Path) -> None:
    for record in itertools.chain(whole("svp", 900, seeds=2), whole("linear", 500, seeds=2)):
        write_record(record, tmp_path)
    out = run("table", "--results_root", str(tmp_path)).out
    path = table_paths(load_suite("vtab"), tmp_path)[3]
    assert str(path) in out
    check(path.read_text(encoding="utf-8"))
