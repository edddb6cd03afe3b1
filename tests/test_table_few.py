"""Tables of few tasks and of incomplete rows: nothing is printed as a finding that the records cannot show."""

from __future__ import annotations

import csv
import dataclasses
import io
import re
import warnings
from pathlib import Path

import pytest
from helpers import run
from synthetic_records import LIST, OTHER_LIST, make_record

import svp_bench
from svp_bench.core.errors import RecordError, file_size, plural
from svp_bench.records.record import PerClass, Record
from svp_bench.records.store import write_record
from svp_bench.report.page import render
from svp_bench.report.view import report_view
from svp_bench.tables.build import load_table
from svp_bench.tables.model import Table
from svp_bench.tables.render_csv import long_csv, wide_csv
from svp_bench.tables.render_latex import render_latex
from svp_bench.tables.render_text import render_markdown, render_terminal
from svp_bench.tasks.cards import load_suite

BRACKETS = re.compile(r"\[(-?[\d.]+), (-?[\d.]+)\]")


def with_classes(record: Record, counts: tuple[int, ...]) -> Record:
    """Add counts by class to a record; which classes are right does not matter here."""
    assert record.metrics is not None
    right, correct = record.metrics.correct, []
    for count in counts:
        correct.append(min(count, right))
        right -= correct[-1]
    metrics = dataclasses.replace(record.metrics, per_class=PerClass(tuple(correct), counts))
    return dataclasses.replace(record, metrics=metrics)


def own(
    method: str, right: int, folder: str = "/home/me/flowers", digest: str = LIST, seeds: int = 1, count: int = 120
) -> list[Record]:
    """Return runs on a custom data set of three classes."""
    return [
        with_classes(
            make_record(
                "custom/images",
                method,
                seed,
                right + seed,
                count,
                {"data.root": folder, "model.num_classes": 3},
                protocol="custom-final",
                data_digest=digest,
                number=seed,
            ),
            (count // 2, count // 4, count - count // 2 - count // 4),
        )
        for seed in range(seeds)
    ]


def pages(table: Table) -> dict[str, str]:
    """Return every rendering on one line; of the HTML page without its scripts."""
    html = render(report_view([table], {}, {}))
    html = html[: html.index('<script type="application/json"')]
    texts = {
        "md": render_markdown(table),
        "tex": render_latex(table),
        "out": render_terminal(table),
        "csv": wide_csv(table) + long_csv(table),
        "html": re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL),
    }
    return {name: " ".join(text.split()) for name, text in texts.items()}


def written(root: Path, records: list[Record]) -> str:
    for record in records:
        write_record(record, root)
    return str(root)


# ---- one task, two tasks


@pytest.mark.parametrize("seeds", [1, 2])
def test_one_task_has_no_test_and_an_interval_over_test_images(seeds: int) -> None:
    table = load_table(load_suite("custom"), [*own("adapter", 100, seeds=seeds), *own("linear", 77, seeds=seeds)])
    (contrast,) = table.sections[0].comparison.contrasts  # type: ignore[union-attr]
    assert contrast.p is contrast.holm is None
    assert contrast.least == 1
    assert contrast.images is not None
    assert contrast.images.low is not None
    assert contrast.images.low > 0
    assert table.sections[0].ranks is None
    for name, text in pages(table).items():
        assert "1.000" not in text, name
        assert "adapter = linear" not in text, name
        assert "Mean ranks" not in text, name
        for low, high in BRACKETS.findall(text):
            assert float(low) >= -100, (name, low)
            assert float(high) <= 100, (name, high)
        if name in ("md", "out", "html"):
            assert "cannot be tested with 1 source of images; no outcome" in text, name
    assert re.search(r"\| adapter ¶? ?\| 83\.\d\d", pages(table)["md"])


def test_two_tasks_have_no_interval_outside_of_the_possible() -> None:
    records = [
        make_record(task, method, seed, right + 40 * seed, 500)
        for task, right in (("vtab/dtd", 100), ("vtab/svhn", 440))
        for method in ("svp", "linear")
        for seed in (0, 1)
    ]
    vtab = load_suite("vtab")
    two = dataclasses.replace(vtab, groups={"natural": ("dtd", "svhn")}, same_images=())
    table = load_table(two, records)
    for line in csv.DictReader(io.StringIO(wide_csv(table))):
        ends = [float(value) for key, value in line.items() if key.endswith((", low", ", high")) and value]
        assert ends
        assert all(0 <= end <= 100 for end in ends)
        assert line["mean of 2 tasks, new tasks, low"] == ""
    for name, text in pages(table).items():
        for low, high in BRACKETS.findall(text):
            assert -100 <= float(low) <= float(high) <= 100, name
    assert "No interval over new tasks: the suite has 2 independent sources" in pages(table)["md"]


def test_the_majority_class_stands_beside_the_accuracy() -> None:
    texts = pages(load_table(load_suite("custom"), own("adapter", 61)))
    assert "| – | majority class | 50.00 | 50.00 |" in texts["md"]
    assert re.search(r"– majority class 50\.00 50\.00", texts["out"])
    assert r"majority class & 50.00" in texts["tex"]
    assert "majority class" in texts["html"]
    lines = csv.DictReader(io.StringIO(wide_csv(load_table(load_suite("custom"), own("adapter", 61)))))
    (line,) = [line for line in lines if line["origin"] == "baseline"]
    assert (line["row"], line["images"], line["rank"]) == ("majority class", "50.0000", "")


def test_six_sources_and_eight_rows_cannot_be_tested() -> None:
    demo = load_suite("demo")
    methods = ("full", "lora", "adapter", "svp", "bias", "offset", "vpt_deep", "vpt_shallow", "linear")
    records = [
        make_record(task, method, 0, 900 - 10 * number, 1000, protocol="demo-final", task_version=2)
        for task in demo.tasks
        for number, method in enumerate(methods)
    ]
    from svp_bench.tasks.cards import load_task

    records = [dataclasses.replace(r, task_version=load_task(r.task).version) for r in records]
    table = load_table(demo, records)
    comparison = table.sections[0].comparison
    assert comparison is not None
    assert {(c.p, c.holm, c.sources, c.least) for c in comparison.contrasts} == {(None, None, 6, 0.25)}
    text = pages(table)["md"]
    assert (
        "cannot be tested with 6 sources of images; over 8 rows (Holm) no outcome could be significant at 5 %" in text
    )
    assert "the smallest possible p is 0.250" in text
    assert "Not separated" not in text
    assert "The order cannot be tested with 6 sources" in text
    three = [r for r in records if r.method in ("full", "linear")]
    alone = load_table(demo, three).sections[0].comparison
    assert alone is not None
    assert alone.contrasts[0].p == alone.contrasts[0].holm == 2**-5  # one row: six sources can just reject


# ---- custom data


def test_two_custom_data_sets_are_two_sections(tmp_path: Path) -> None:
    records = [
        *own("adapter", 100, "/home/me/flowers"),
        *own("linear", 90, "/home/me/flowers/"),
        *own("adapter", 30, r"C:\data\x-rays", OTHER_LIST),
        *own("linear", 40, r"C:\data\x-rays", OTHER_LIST),
    ]
    records = [dataclasses.replace(r, run_id=f"{r.run_id}-{n}") for n, r in enumerate(records)]
    table = load_table(load_suite("custom"), records)
    assert [section.data for section in table.sections] == [
        "flowers, 3 classes, data cdcdcdcdcdcd",
        "x-rays, 3 classes, data efefefefefef",
    ]
    assert [[(row.label, row.rank) for row in section.rows] for section in table.sections] == [
        [("adapter", 1), ("linear", 2)],
        [("linear", 1), ("adapter", 2)],
    ]
    assert all(not row.apart for section in table.sections for row in section.rows)
    for name, text in pages(table).items():
        for section in table.sections:
            assert section.data in text, name
    shown = run("table", "--results_root", written(tmp_path, records), "--compare", "adapter", "linear").out
    assert "flowers, 3 classes" in shown
    assert "x-rays, 3 classes" in shown
    # A benchmark keeps its rule: other data of a task are another cell of the same row
    benchmark = [make_record(), make_record(right=3, data_digest=OTHER_LIST, number=1)]
    (section,) = load_table(load_suite("vtab"), benchmark).sections
    assert len(section.rows[0].apart) == 1


# ---- partial


def test_what_was_measured_is_shown(tmp_path: Path) -> None:
    root = written(
        tmp_path, [make_record("vtab/dtd", right=715, count=1000), make_record("vtab/svhn", right=285, count=1000)]
    )
    text = run("table", "--results_root", root).out
    assert "dtd" in text
    assert "71.50" in text
    assert re.search(r"50\.00 ± 1\.9\d\* \(2/19\)", text)
    assert "caltech101" not in text
    assert "specialized" not in text
    assert "partial, the mean over the n tasks" in " ".join(text.split())
    wide = run("table", "--results_root", root, "--all_columns").out
    assert "specialized" in wide
    page = run("report", "--results_root", root).out
    assert "Written" in page
    html = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    shown = html[: html.index('<script type="application/json"')]
    assert "partial 2/19" in shown
    assert "No plot" in shown
    assert 'data-figure="vtab-1-mean' not in shown  # no chart of nothing
    assert ">50.00<" in shown
    assert "caltech101" not in shown.split('id="vtab-1-matrix"', 1)[1].split("</table>", 1)[0]


def test_runs_that_are_not_comparable_are_listed_with_their_reason() -> None:
    odd = make_record("vtab/dtd", "lora", right=990, count=1000, not_comparable=["a callback changed the weights"])
    table = load_table(load_suite("vtab"), [odd, make_record("vtab/dtd", right=700, count=1000)])
    assert [row.label for section in table.sections for row in section.rows] == ["svp"]
    for name, text in pages(table).items():
        if name in ("md", "out", "html"):
            assert "a callback changed the weights" in text, name
        assert "99.00" not in text, name


# ---- text from outside


EVIL = 'a\x1b[31m|b\n=1+1 `*x*` [l](http://e) <i>&"$_{^}~#\\ \u202e'


def test_text_from_outside_is_escaped_in_every_format() -> None:
    records = [
        make_record(checkpoint=EVIL, changes={"model.method.init_args.share_layers": EVIL}),
        make_record(checkpoint=EVIL, changes={"model.method.init_args.share_layers": "=SUM(A1)"}),
        make_record(seed=3, status="failed", status_reason=EVIL, metrics=None, correct=None),
    ]
    table = load_table(load_suite("vtab"), records)
    card = dataclasses.replace(table.suite, title=EVIL)
    table = dataclasses.replace(table, suite=card)
    html = render(report_view([table], {}, {}))
    texts = {
        "md": render_markdown(table),
        "tex": render_latex(table),
        "out": render_terminal(table),
        "wide": wide_csv(table),
        "long": long_csv(table),
        "html": html[: html.index('<script type="application/json"')],
    }
    for name, text in texts.items():
        assert "\x1b" not in text, name
        assert "\u202e" not in text, name
    markdown = texts["md"]
    assert "<i>" not in markdown
    assert r"\`\*x\*\` [l\](http" in markdown
    assert not [line for line in markdown.splitlines() if line.startswith("=1+1")]
    assert r"\textbackslash{}" in texts["tex"]
    assert "&lt;i&gt;&amp;" in texts["html"]
    for name in ("wide", "long"):
        for line in csv.reader(io.StringIO(texts[name])):
            assert not [cell for cell in line if re.match(r"[=@\t\r]|[+-](?![\d.])", cell)], name


def test_csv_quotes_formulas_and_leaves_numbers() -> None:
    from svp_bench.tables.render_csv import csv_lines

    text = csv_lines([["=1+1", "+x", "-y", "@z", "\t=2", " =3", "-5.25", "+1e-3", -5, "plain", "a\nb"]])
    assert next(csv.reader(io.StringIO(text))) == [
        *("'=1+1", "'+x", "'-y", "'@z", "'=2", "'=3", "-5.25", "+1e-3", "-5", "plain", "a b"),
    ]


# ---- helpers, load_results


def test_plurals_and_sizes() -> None:
    assert [plural(n, "task") for n in (0, 1, 2)] == ["0 tasks", "1 task", "2 tasks"]
    assert [plural(2, noun) for noun in ("class", "batch", "process", "box", "epoch", "image")] == [
        *("2 classes", "2 batches", "2 processes", "2 boxes", "2 epochs", "2 images"),
    ]
    assert plural(2, "entry", "entries") == "2 entries"
    assert [file_size(n) for n in (0, 999, 1024, 1.5 * 2**20, 2**40)] == [
        "0 B",
        "999 B",
        "1.0 KiB",
        "1.5 MiB",
        "1.0 TiB",
    ]


def test_load_results(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="there is no such folder"):
        svp_bench.load_results(tmp_path / "nowhere")
    wanted = ["suite", "task", "method", "backbone", "seed", "kind", "status", "top1", "config_digest"]
    empty = svp_bench.load_results(tmp_path)
    assert list(empty.columns[: len(wanted)]) == wanted
    assert len(empty) == 0
    failed = make_record("vtab/svhn", status="failed", status_reason="NaN", metrics=None, correct=None)
    root = written(tmp_path, [make_record("vtab/dtd", right=7), failed])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = svp_bench.load_results(root)
    assert [tuple(row) for row in found[["task", "status", "seed"]].itertuples(index=False)] == [
        ("vtab/dtd", "complete", 0),
        ("vtab/svhn", "failed", 0),
    ]
    assert found["top1"].tolist()[0] == 70.0
    assert found["top1"].isna().tolist() == [False, True]
    assert found["config_digest"][0] == make_record("vtab/dtd", right=7).config_digest
    assert (tmp_path / found["path"][0]).is_file()
    for number in range(7):
        (tmp_path / "records" / "vtab" / "dtd" / f"broken{number}.json").write_text("{", encoding="utf-8")
    with pytest.warns(UserWarning, match=r"7 files .*broken0\.json .*and 2 more"):
        assert len(svp_bench.load_results(root)) == 2


def test_no_mean_is_printed_with_more_than_the_possible_around_it() -> None:
    """Four tasks near 100 %, of which one varies over its two seeds: ± would reach above 100."""
    rights = {"dtd": (500, 500), "svhn": (499, 500), "eurosat": (500, 499), "kitti": (470, 500)}
    records = [
        make_record(f"vtab/{task}", "svp", seed, right, 500)
        for task, by_seed in rights.items()
        for seed, right in enumerate(by_seed)
    ]
    near = dataclasses.replace(load_suite("vtab"), groups={"natural": tuple(rights)}, same_images=())
    table = load_table(near, records)
    texts = pages(table)
    assert re.search(r"99\.20 \[\d\d\.\d\d, 100\.00\]", texts["out"])
    assert "where ± would leave 0 to 100" in texts["out"]
    assert re.search(r"99\.20\$_\{\[\d\d\.\d\d, 100\.00\]\}\$", texts["tex"])
    for name in ("md", "out"):
        for mean, half in re.findall(r"([\d.]+) ± ([\d.]+)\\?\*", texts[name]):
            assert float(mean) + float(half) <= 100, name


def test_rows_on_other_images_are_not_ranked_against_each_other() -> None:
    """A card that pins no digest leaves the images open, as custom data do: two folders are two tasks."""
    small = load_suite("vtab")
    one = dataclasses.replace(small, groups={"natural": ("dtd",)}, same_images=())

    def ranks(*digests: str) -> dict[str, int | None]:
        records = [
            make_record("vtab/dtd", method, 0, 500 + number, 1000, data_digest=digest)
            for number, (method, digest) in enumerate(zip(("svp", "linear", "lora"), digests, strict=False))
        ]
        (section,) = load_table(one, records).sections
        notes = pages(load_table(one, records))["md"]
        assert ("not all on the same images of dtd" in notes) == (len(set(digests)) > 1)
        return {row.method: row.rank for row in section.rows}

    assert ranks(LIST, LIST) == {"linear": 1, "svp": 2}
    assert ranks(LIST, OTHER_LIST) == {"linear": None, "svp": None}
    assert ranks(LIST, OTHER_LIST, LIST) == {"lora": 1, "svp": 2, "linear": None}
