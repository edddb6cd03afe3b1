from __future__ import annotations

import csv
import dataclasses
import io
import random
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_records import LIST, OTHER_LIST, WEIGHTS, make_record, synthetic_record, unscored

from svp_bench.core.errors import RecordError, UsageError
from svp_bench.records.published import PublishedRow, load_published
from svp_bench.records.record import Parameters, Record, SearchSummary
from svp_bench.records.store import Problem, write_record
from svp_bench.tables.build import build_table, run_table, table_paths, write_tables
from svp_bench.tables.model import Row, Table
from svp_bench.tables.notes import MISSING, size_span
from svp_bench.tables.render_text import render_markdown, render_terminal
from svp_bench.tasks.cards import ReaderSpec, SuiteCard, load_protocol, load_suite

VTAB = load_suite("vtab")
SMALL = SuiteCard(
    name="vtab",
    version=1,
    title="Small",
    table="small",
    folder="small",
    protocol="vtab-final",
    reader=ReaderSpec("split_files", {}),
    groups={"natural": ("caltech101", "dtd", "svhn"), "specialized": ("eurosat",), "structured": ("dmlab", "kitti")},
    same_images=(),
    citation="zhai2019vtab",
    notes="",
    path=Path("small.yaml"),
)
SHARE = "model.method.init_args.share_layers"


def build(records: list[Record], suite: SuiteCard = SMALL, **options: Any) -> Table:
    options.setdefault("task_versions", dict.fromkeys(suite.tasks, 1))
    return build_table(suite, records, **options)


def rows_of(table: Table) -> dict[str, Row]:
    return {row.label: row for section in table.sections for row in section.rows}


def files(table: Table, folder: Path) -> dict[str, str]:
    return {path.name: path.read_text(encoding="utf-8") for path in write_tables(table, folder)}


def read_csv(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def all_tasks(method: str = "svp", right: int = 700, **options: Any) -> list[Record]:
    return [make_record(task, method, right=right, count=1000, **options) for task in SMALL.tasks]


# ---- means


CELLS = st.fixed_dictionaries(
    {
        (method, task): st.lists(st.integers(0, 1000), max_size=4)
        for method in ("svp", "linear", "full")
        for task in SMALL.tasks
    }
)


def near(value: float | None, expected: float | None) -> bool:
    return value is expected is None or (value is not None and value == pytest.approx(expected, abs=1e-9))


@settings(max_examples=40, deadline=None)
@given(CELLS, st.randoms(use_true_random=False))
def test_means_ranks_and_holes_by_brute_force(cells: dict[tuple[str, str], list[int]], rng: random.Random) -> None:
    records = [
        make_record(task, method, seed, right, 1000)
        for (method, task), scores in cells.items()
        for seed, right in enumerate(scores)
    ]
    rng.shuffle(records)
    table = build(records)
    rows = rows_of(table)
    assert set(rows) == {method for (method, _), scores in cells.items() if scores}
    complete: dict[str, float] = {}
    for method, row in rows.items():
        scores = {task: [right / 10 for right in cells[method, task]] for task in SMALL.tasks}
        for task, values in scores.items():
            if not values:
                assert task not in row.cells
                continue
            cell = row.cells[task]
            assert near(cell.mean, statistics.fmean(values))
            assert near(cell.std, statistics.stdev(values) if len(values) > 1 else None)
            assert cell.seeds == tuple(range(len(values)))
        groups = {
            group: statistics.fmean([statistics.fmean(scores[f"vtab/{task}"]) for task in tasks])
            if all(scores[f"vtab/{task}"] for task in tasks)
            else None
            for group, tasks in SMALL.groups.items()
        }
        *of_groups, task_mean, group_mean = row.scores[len(SMALL.tasks) :]
        assert all(map(near, of_groups, groups.values()))
        full = all(scores.values())
        assert near(task_mean, statistics.fmean(map(statistics.fmean, scores.values())) if full else None)
        assert near(group_mean, statistics.fmean([groups[group] or 0 for group in groups]) if full else None)
        assert (row.rank is None) == (not full)
        if full and row.task_mean is not None:
            complete[method] = round(row.task_mean, 4)
    for method, mean in complete.items():
        assert rows[method].rank == 1 + sum(other > mean for other in complete.values())


@settings(max_examples=15, deadline=None)
@given(st.randoms(use_true_random=False))
def test_files_do_not_depend_on_the_order_of_records(tmp_path_factory: pytest.TempPathFactory, rng: Any) -> None:
    records = [
        make_record(task, method, seed, 300 + 7 * seed + len(task), 1000, {SHARE: share}, number=seed, **fields)
        for task in SMALL.tasks[:5]
        for method, share, fields in (
            ("svp", 1, {}),
            ("svp", 4, {"data_status": "different", "checkpoint": "vim.pth"}),
            ("linear", 1, {"checkpoint": "none", "checkpoint_digest": None}),
            ("linear", 1, {"kind": "selection"}),
        )
        for seed in (0, 1, 2)
    ]
    records = [dataclasses.replace(r, run_id=f"{r.run_id}-{n}") for n, r in enumerate(records)]
    problems = [Problem(f"records/vtab/dtd/{name}.json", "is not JSON") for name in "abc"]
    first = files(build(records, problems=problems), tmp_path_factory.mktemp("first"))
    rng.shuffle(records)
    rng.shuffle(problems)
    assert files(build(records, problems=problems), tmp_path_factory.mktemp("second")) == first


def test_equal_means_share_a_rank() -> None:
    table = build([*all_tasks("svp", 700), *all_tasks("full", 800), *all_tasks("linear", 700), *all_tasks("lora", 600)])
    assert {name: row.rank for name, row in rows_of(table).items()} == {"full": 1, "linear": 2, "svp": 2, "lora": 4}
    assert [row.label for row in table.sections[0].rows] == ["full", "linear", "svp", "lora"]


def test_ranks_compare_equals_only() -> None:
    table = build(
        [
            *all_tasks("svp", 900),
            *all_tasks("linear", 800, checkpoint_digest=LIST),
            *all_tasks("linear", 700, backbone="vim_tiny_patch16_224"),
            *all_tasks("linear", 600, protocol_version=2),
        ]
    )
    assert len(table.sections) == 4
    assert [row.rank for section in table.sections for row in section.rows] == [1, 1, 1, 1]


def test_random_weights_stand_apart_and_are_not_ranked(tmp_path: Path) -> None:
    random_rows = all_tasks("full", 990, checkpoint="none", checkpoint_digest=None)
    table = build([*random_rows, *all_tasks("svp", 300)])
    assert [section.random for section in table.sections] == [False, True]
    assert [row.rank for section in table.sections for row in section.rows] == [1, None]
    texts = files(table, tmp_path)
    page = texts["small.md"]
    assert "are a smoke test and are not ranked" in page[page.index("random weights") :]
    assert page.index("| 1 | svp") < page.index("smoke test") < page.index("| – | full")
    assert [(line["weights"], line["rank"]) for line in read_csv(texts["small.csv"])] == [
        ("pretrained", "1"),
        ("random", ""),
    ]
    assert "smoke test" in render_terminal(table)
    assert "smoke test" not in render_markdown(build(all_tasks("svp")))


def test_a_hole_stays_a_hole(tmp_path: Path) -> None:
    texts = files(build(all_tasks()[1:]), tmp_path)
    (line,) = read_csv(texts["small.csv"])
    empty = {
        key
        for key, value in line.items()
        if value == "" and key not in ("data_different", "other_variants", "mixed_cells", "custom_data")
    }
    assert {key for key in empty if "new " not in key} == {
        *("caltech101", "natural", "mean of 6 tasks", "mean of 3 groups"),
        *("rank", "source", "citation"),
    }
    assert {key for key in line if "new " in key} <= empty  # one seed: no interval, where there is a mean and where not
    assert line["complete"] == "5/6"
    cells = re.search(r"\| – \| svp ¶ \|(.*)\|", texts["small.md"])
    assert cells is not None
    shown = [cell.strip() for cell in cells[1].split("|")]
    means = [MISSING, r"70.00 ± 2.84\*", r"70.00 ± 2.01\*", r"70.00 ± 1.27\* (5/6)", MISSING]
    assert shown == [MISSING, *5 * ["70.00"], *means, "5/6", "1", "4.76M"]
    assert line["mean of the tasks there are"] == "70.0000"
    assert "(n/6): partial, the mean over the n tasks that the row has; not ranked" in texts["small.md"]
    (missing,) = [line for line in read_csv(texts["small_long.csv"]) if line["status"] == "missing"]
    assert (missing["task"], missing["mean"], missing["n"]) == ("vtab/caltech101", "", "0")


def test_seeds_are_averaged_with_their_spread(tmp_path: Path) -> None:
    records = [
        make_record("vtab/eurosat", seed=seed, right=right, count=1000, number=number)
        for number, (seed, right) in enumerate(((5, 700), (2, 721)))
    ]
    texts = files(build([*records, make_record("vtab/dtd", seed=9)]), tmp_path)
    assert "71.05 ± 1.48" in texts["small.md"]
    lines = {line["task"]: line for line in read_csv(texts["small_long.csv"])}
    assert [lines["vtab/eurosat"][key] for key in ("mean", "std", "n", "seeds")] == ["71.0500", "1.4849", "2", "2 5"]
    assert [lines["vtab/dtd"][key] for key in ("mean", "std", "n", "seeds")] == ["70.0000", "", "1", "9"]
    (row,) = read_csv(texts["small.csv"])
    assert (row["seeds_min"], row["seeds_max"]) == ("1", "2")
    assert "| 1–2 |" in texts["small.md"]


def test_averages_are_named_from_the_suites_numbers() -> None:
    page = render_markdown(build_table(VTAB, [make_record()], task_versions={"vtab/caltech101": 1}))
    assert "| mean of 19 tasks | mean of 3 groups |" in page
    assert "| 1/19 |" in page


# ---- rows


def test_settings_of_one_method_are_never_merged() -> None:
    table = build([*all_tasks("svp", 700), *all_tasks("svp", 800, changes={SHARE: 4}), *all_tasks("linear", 600)])
    rows = rows_of(table)
    assert list(rows) == ["svp (share_layers=4)", "svp (share_layers=1)", "linear"]
    assert [row.task_mean for row in rows.values()] == [80.0, 70.0, 60.0]


@pytest.mark.parametrize(
    ("one", "other", "labels"),
    [
        ({}, {"model.dropout": 0.1}, {"svp", "svp (dropout=0.1)"}),
        ({SHARE: 4}, {SHARE: "x"}, {"svp (share_layers=4)", "svp (share_layers=x)"}),
        ({"model.decay": 1, "data.decay": 2}, {}, {"svp", "svp (data.decay=2, model.decay=1)"}),
        ({"model.x": [1, 2]}, {"model.x": [1, 3]}, {"svp (x=[1,2])", "svp (x=[1,3])"}),
        (
            {"model.method.class_path": "a.One"},
            {"model.method.class_path": "b.Two"},
            {"svp (method=a.One)", "svp (method=b.Two)"},
        ),
    ],
)
def test_rows_are_named_by_what_differs(one: dict[str, Any], other: dict[str, Any], labels: set[str]) -> None:
    table = build([make_record(changes=one), make_record(changes=other)])
    assert set(rows_of(table)) == labels


def test_labels_that_look_alike_carry_their_digest() -> None:
    records = [make_record(changes={SHARE: share}) for share in (4, "4")]
    assert set(rows_of(build(records))) == {f"svp (share_layers=4) [{r.setting_digest[7:19]}]" for r in records}


def test_selected_values_do_not_split_a_row() -> None:
    search = SearchSummary("default", "grid", 12, 12, "val200", LIST, LIST, ("model.learning_rate",))
    rates = (0.1, 0.01, 0.001, 0.3, 0.03, 0.003)
    records = [
        make_record(task, changes={"model.learning_rate": rate, "model.num_classes": 10 + n}, search=search)
        for n, (task, rate) in enumerate(zip(SMALL.tasks, rates, strict=True))
    ]
    table = build([*records, *all_tasks("svp")])
    assert [(section.track.title, row.label, len(row.cells)) for section in table.sections for row in section.rows] == [
        ("default", "svp", 6),
        ("searched (default, K = 12)", "svp", 6),
    ]


def test_configs_of_one_row_on_one_task_are_not_averaged() -> None:
    search = SearchSummary("default", "grid", 12, 12, "val200", LIST, LIST, ("model.learning_rate",))
    rates = ({"model.learning_rate": x} for x in (0.1, 0.2))
    table = build([make_record(changes=rate, search=search, seed=seed) for seed, rate in enumerate(rates)])
    (row,) = rows_of(table).values()
    assert [len(cell.seeds) for cell in (*row.cells.values(), *row.apart)] == [1, 1]


def test_trainable_parameters_leave_out_the_head() -> None:
    small = make_record("vtab/dtd", parameters=Parameters(1500, 600, 900, 2000))
    big = make_record("vtab/svhn", parameters=Parameters(25_412_184, 600, 25_411_584, 25_412_184))
    assert "| 900–25.41M |" in render_markdown(build([small, big]))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0K"), (75_648, "75.6K"), (999_949, "999.9K"), (999_950, "1.00M")],
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert size_span(count, count) == text


def test_data_that_differ_are_marked(tmp_path: Path) -> None:
    texts = files(build(all_tasks(data_status="different")[:1] + all_tasks()[1:]), tmp_path)
    assert texts["small.md"].count("70.00†") == 1
    assert "- † The files on disk differ from the task card" in texts["small.md"]
    assert read_csv(texts["small.csv"])[0]["data_different"] == "caltech101"
    assert "†" not in render_markdown(build(all_tasks()))
    mixed = [make_record(seed=0, data_status="different"), make_record(seed=1)]
    assert "70.00 ± 0.00†" in render_markdown(build(mixed))


def test_data_variants_are_never_averaged(tmp_path: Path) -> None:
    records = [
        make_record("vtab/dtd", right=5, data_variant="archive"),
        make_record("vtab/dtd", right=9),
        make_record("vtab/svhn", seed=0, right=3, data_variant="zip"),
    ]
    texts = files(build(records), tmp_path)
    (row,) = read_csv(texts["small.csv"])
    assert (row["dtd"], row["svhn"], row["other_variants"]) == ("90.0000", "30.0000", "svhn=zip")
    assert "30.00‡" in texts["small.md"]
    assert "- ‡ Another variant of the data than that of the card: svhn (zip)." in texts["small.md"]
    assert "- dtd, svp: also 50.00 (1 seed) on other data, variant archive (splits cdcd" in texts["small.md"]
    lines = [line for line in read_csv(texts["small_long.csv"]) if line["task"] == "vtab/dtd"]
    assert [(line["data_variant"], line["mean"], line["status"]) for line in lines] == [
        ("card", "90.0000", "complete"),
        ("archive", "50.0000", "not in the wide table"),
    ]


def test_runs_on_other_lists_are_neither_averaged_nor_superseded(tmp_path: Path) -> None:
    records = [
        make_record(seed=0, right=9, number=1),
        make_record(seed=0, right=5, number=2, data_digest=OTHER_LIST),  # the same seed, newer
        make_record(seed=1, right=7, number=0),
        make_record(seed=2, right=1, number=3, data_digest=OTHER_LIST),
        make_record(seed=3, right=2, number=4, data_digest=OTHER_LIST),
    ]
    first = build(records)
    assert first.left_out == ()
    (row,) = rows_of(first).values()
    (shown,), (apart,) = row.cells.values(), row.apart
    assert (shown.data[1], shown.seeds, round(shown.mean, 2)) == (OTHER_LIST, (0, 2, 3), 26.67)  # more seeds
    assert (apart.data[1], apart.seeds, apart.mean) == (LIST, (0, 1), 80.0)
    line = "caltech101, svp: also 80.00 (2 seeds) on other data, variant card (splits cdcdcdcdcdcd); not in the means."
    texts = files(first, tmp_path)
    assert f"\n- {line}\n" in texts["small.md"]
    assert line in " ".join(render_terminal(first).split())
    assert [
        (cell["data_digest"], cell["mean"], cell["status"])
        for cell in read_csv(texts["small_long.csv"])
        if cell["status"] != "missing"
    ] == [(OTHER_LIST, "26.6667", "complete"), (LIST, "80.0000", "not in the wide table")]
    assert files(build(records[::-1]), tmp_path) == texts


@pytest.mark.parametrize(
    ("shown", "apart"),
    [
        ({"number": 1}, {"number": 2, "data_status": "different"}),
        ({"number": 2}, {"number": 1}),
        ({"number": 1, "data_status": "different"}, {"number": 2, "data_status": "different", "data_variant": "zip"}),
        ({"number": 1, "data_variant": "zip"}, {"number": 2, "data_status": "different"}),
        (
            {"number": 1, "data_status": "different"},
            {"number": 2, "data_status": "different", "data_variant": "synthetic"},
        ),
    ],
    ids=["as-card", "newest", "card-before-variant", "status-before-variant", "stand-in-last"],
)
def test_which_data_are_shown(shown: dict[str, Any], apart: dict[str, Any]) -> None:
    records = [make_record(right=8, **shown), make_record(right=3, data_digest=OTHER_LIST, **apart)]
    for given_records in (records, records[::-1]):
        (row,) = rows_of(build(given_records)).values()
        assert [cell.mean for cell in row.cells.values()] == [80.0]
        assert [cell.mean for cell in row.apart] == [30.0]


def test_a_real_run_is_shown_before_newer_drawn_ones() -> None:
    real = make_record("vtab/dtd", right=6, number=1)
    table = build([real, *(synthetic_record("vtab/dtd", seed=seed, right=10, number=2 + seed) for seed in (0, 1))])
    (row,) = rows_of(table).values()
    assert (row.cells["vtab/dtd"].mean, row.synthetic, table.left_out) == (60.0, False, ())
    page = render_markdown(table)
    assert "- dtd, svp: also 100.00 (2 seeds) on synthetic data (splits efefefefefef); not in the means." in page
    assert "§" not in page


def test_a_row_with_a_drawn_cell_is_marked_and_never_ranked(tmp_path: Path) -> None:
    stand_in = [synthetic_record("vtab/dtd", "full", right=990, count=1000), *all_tasks("full", 990)]
    stand_in = [r for r in stand_in if r.task != "vtab/dtd" or r.data_variant == "synthetic"]
    table = build([*stand_in, *all_tasks("svp", 700), *all_tasks("linear", 600)])
    assert {name: row.rank for name, row in rows_of(table).items()} == {"svp": 1, "linear": 2, "full": None}
    assert [row.label for row in table.sections[0].rows] == ["svp", "linear", "full"]
    texts = files(table, tmp_path)
    # the task itself, its group and both means; the other groups are real
    (line,) = [line for line in texts["small.md"].splitlines() if line.startswith("| – | full ¶ |")]
    cells = [re.sub(r" ± [\d.]+\\\*", "", cell.strip()) for cell in line.strip("|").split(" | ")]
    assert cells[2:13] == [
        *("99.00", "99.00§", "99.00", "99.00", "99.00", "99.00"),
        *("99.00§", "99.00", "99.00", "99.00§", "99.00§"),
    ]
    assert "| 6/6 |" in line
    assert "- § Synthetic data: rows with such a cell are not ranked.\n" in texts["small.md"]
    assert "†" not in texts["small.md"]
    assert "‡" not in texts["small.md"]
    row = read_csv(texts["small.csv"])[-1]
    assert (row["rank"], row["data_different"], row["other_variants"]) == ("", "dtd", "dtd=synthetic")
    assert "\n§ Synthetic data" in render_terminal(table)
    wide = render_terminal(build([synthetic_record(task) for task in VTAB.tasks], VTAB))
    assert "caltech101" not in wide  # where the tasks do not fit, the means carry the mark
    assert "70.00§" in wide


def test_rows_on_other_lists_than_each_other_are_told_apart() -> None:
    note = "The rows are not all on the same images of dtd: only rows on the data that most rows have are ranked."
    mixed = [
        make_record("vtab/dtd"),
        make_record("vtab/dtd", "linear", data_digest=OTHER_LIST),
        make_record("vtab/svhn"),
    ]
    assert f"- {note}\n" in render_markdown(build(mixed))
    assert note in " ".join(render_terminal(build(mixed)).split())
    assert "not all on the same images" not in render_markdown(build([*all_tasks("svp"), *all_tasks("linear")]))


def test_records_made_with_uncommitted_changes_are_counted() -> None:
    records = [make_record(seed=seed, dirty=dirty) for seed, dirty in enumerate((True, False, None, True))]
    table = build([*records, make_record(seed=9, backbone="vim_tiny_patch16_224")])
    note = "2 of 4 records were made with uncommitted changes."
    assert render_markdown(table).count("uncommitted") == 1
    assert f"\n- {note}\n" in render_markdown(table)
    assert f"\n{note}\n" in render_terminal(table)


# ---- what does not enter


@pytest.mark.parametrize(
    ("record", "why", "detail"),
    [
        (make_record(kind="selection", right=10), "selection", "scored on the list that chooses"),
        (make_record(status="truncated", status_reason="limit_test_batches=1"), "truncated", "limit_test_batches=1"),
        (unscored(make_record(), "failed", "loss is NaN in step 3"), "failed", "loss is NaN in step 3"),
        (unscored(make_record(), "interrupted", "stopped by the user"), "interrupted", "stopped by the user"),
        (unscored(make_record()), "unscored", "trained, not tested"),
        (make_record("vtab/gone"), "unknown task", "the suite vtab (version 1) has no such task"),
        (make_record(task_version=2), "other card version", "run on version 2 of the task card, which is now 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_count_is_listed(tmp_path: Path, record: Record, why: str, detail: str) -> None:
    kept = make_record(seed=1, right=2, number=1)
    table = build([record, kept])
    (row,) = rows_of(table).values()
    assert row.cells["vtab/caltech101"].seeds == (1,)
    assert row.cells["vtab/caltech101"].mean == 20.0
    assert [(out.record, out.why) for out in table.left_out] == [(record, why)]
    page = render_markdown(table)
    assert f"\n1 {why}.\n" in page
    assert re.search(rf"\n- {record.task}, svp, seed 0: {why}: {re.escape(detail)}.*\({record.run_id}\)\n", page)
    assert f"Not in the table: 1 {why}." in render_terminal(table)
    assert record.run_id not in "".join(text for name, text in files(table, tmp_path).items() if name.endswith("csv"))


def test_the_newest_run_of_a_seed_counts() -> None:
    old, new = make_record(right=2, number=1), make_record(right=8, number=2)
    other_seed = make_record(right=4, seed=1, number=0)
    for records in ([old, new, other_seed], [new, other_seed, old]):
        table = build(records)
        assert rows_of(table)["svp"].cells["vtab/caltech101"].mean == 60.0
        assert [(out.record.run_id, out.why) for out in table.left_out] == [(old.run_id, "superseded")]
        assert f"{new.run_id} is a newer run of the same cell and seed" in render_markdown(table)


def test_a_failed_rerun_supersedes_nothing() -> None:
    table = build([make_record(right=8, number=1), unscored(make_record(number=2), "failed", "NaN")])
    assert rows_of(table)["svp"].cells["vtab/caltech101"].mean == 80.0


def test_problems_are_listed_under_their_suite() -> None:
    problems = [Problem("records/vtab/dtd/x.json", "is not JSON"), Problem("records/demo/digits/y.json", "is not JSON")]
    page = render_markdown(build([make_record()], problems=problems))
    assert "\n1 unreadable.\n" in page
    assert "- records/vtab/dtd/x.json: unreadable: is not JSON" in page
    assert "y.json" not in page


def test_records_of_other_suites_are_not_looked_at() -> None:
    table = build([make_record("demo/digits"), unscored(make_record("demo/digits"), "failed", "NaN")])
    assert (table.sections, table.left_out) == ((), ())


def test_a_reason_with_bars_and_line_ends_stays_one_line() -> None:
    record = unscored(make_record(), "failed", "a\nb | c")
    assert "failed: a b | c (" in render_markdown(build([record]))
    page = render_markdown(build([make_record(changes={SHARE: "a|b\nc"}), make_record()]))
    assert r"| svp (share_layers=a\|b c) ¶ |" in page


# ---- pages


def test_what_stands_under_a_table() -> None:
    page = render_markdown(build(all_tasks(), protocols=[load_protocol("vtab-final")]))
    assert "- Protocol vtab-final, version 1. Hyper-parameters are chosen on val200" in page
    assert "- Backbone vim_small_patch16_224, hub (sha256:abababababab). Precision: 32-true.\n" in page
    assert "- Cards: all tasks of version 1.\n" in page
    assert "- Accuracy in percent. ± behind a task is the standard deviation over its seeds.\n" in page
    assert (
        "- No interval over new seeds where a task behind the mean has one seed, or all seeds of all its "
        "tasks gave the same number: the variance is unknown (svp).\n" in page
    )
    assert "\nTrack default: no search is recorded.\n" in page


def test_a_rule_of_another_protocol_version_is_not_quoted() -> None:
    page = render_markdown(build(all_tasks(protocol_version=7), protocols=[load_protocol("vtab-final")]))
    assert "version 7. Its card is not available" in page
    assert "Hyper-parameters are chosen" not in page


def test_card_versions_and_shared_images_are_said() -> None:
    suite = dataclasses.replace(SMALL, same_images=(("dtd", "svhn"),))
    versions = {"vtab/dtd": 2, "vtab/svhn": 1}
    page = render_markdown(
        build([make_record("vtab/dtd", task_version=2), make_record("vtab/svhn")], suite, task_versions=versions)
    )
    assert "- Cards: version 1: svhn; version 2: dtd." in page
    assert "are not independent: dtd, svhn." in page


def test_a_small_suite_fits_the_terminal_task_by_task() -> None:
    demo = dataclasses.replace(load_suite("demo"), groups={"natural": ["digits", "digits-10shot", "digits-5shot"]})
    epochs = {"trainer.max_epochs": 7}  # for all of them, though some have epochs of their own
    records = [
        make_record(task, method, seed, 55 + seed, 100, checkpoint="none", checkpoint_digest=None, changes=epochs)
        for task in demo.tasks
        for method in ("svp", "vpt_shallow", "vpt_deep", "linear", "full")
        for seed in (0, 1, 2)
    ]
    text = render_terminal(build(records, demo))
    assert max(map(len, text.splitlines())) <= 100
    assert "digits-10shot" in text
    assert "3/3" in text
    assert "groups" not in text  # with one group, its mean is the mean of the tasks
    assert "56.00 ± 1.00" in text


def test_the_terminal_shows_groups_where_tasks_do_not_fit() -> None:
    records = [make_record(task, count=100, right=50) for task in VTAB.tasks]
    text = render_terminal(build(records, VTAB))
    assert max(map(len, text.splitlines())) <= 100
    assert "natural  specialized  structured" in text
    assert "caltech101" not in text
    numbers = r"50\.00 +50\.00 +50\.00 +50\.00 ± 2\.53\* +50\.00"
    assert re.search(rf"^1 +svp ¶ +{numbers} +19/19 +1 +4\.76M$", text, re.MULTILINE)


def test_long_names_are_wrapped_not_cut() -> None:
    records = [
        make_record(task, changes={SHARE: n, "model.learning_rate": n / 10}) for task in VTAB.tasks for n in (1, 2)
    ]
    text = render_terminal(build(records, VTAB))
    assert "learning_rate=0.1" in re.sub(r"\s", "", text)
    assert max(map(len, text.splitlines())) <= 115


# ---- files


def test_no_machine_path_and_no_date_reaches_a_file(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path)
    (tmp_path / "records" / "vtab" / "bad.json").write_text("x", encoding="utf-8")
    run_table(tmp_path)
    texts = [path.read_text(encoding="utf-8") for path in table_paths(VTAB, tmp_path)]
    assert all(str(tmp_path) not in text and "results" not in text for text in texts)
    assert "records/vtab/bad.json: unreadable: is not JSON" in texts[2]
    before = [path.read_bytes() for path in table_paths(VTAB, tmp_path)]
    run_table(tmp_path)
    assert [path.read_bytes() for path in table_paths(VTAB, tmp_path)] == before


def test_tables_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path)
    (tmp_path / "tables").write_text("a file where a folder is needed", encoding="utf-8")
    with pytest.raises(RecordError, match=r"cannot write results into .*tables: .*--results_root DIR"):
        run_table(tmp_path)


def test_without_records_there_is_no_table(tmp_path: Path) -> None:
    assert run_table(tmp_path).startswith(f"There are no records in {tmp_path / 'records'} yet")
    assert list(tmp_path.iterdir()) == []


def test_a_suite_asked_for_by_name_says_that_it_is_empty(tmp_path: Path) -> None:
    text = run_table(tmp_path, ["demo"])
    assert "There are no complete records of this suite yet." in text
    assert "There are no complete records" in table_paths(load_suite("demo"), tmp_path)[2].read_text(encoding="utf-8")
    assert read_csv(table_paths(load_suite("demo"), tmp_path)[0].read_text(encoding="utf-8")) == []


def test_only_suites_with_records_are_written(tmp_path: Path) -> None:
    path = write_record(make_record("demo/digits"), tmp_path)
    text = run_table(tmp_path)
    demo = table_paths(load_suite("demo"), tmp_path)
    assert [path.name for path in demo] == ["demo.csv", "demo_long.csv", "demo.md", "demo.tex"]
    assert f"Written: {', '.join(map(str, demo))}" in text
    assert not any(path.exists() for path in table_paths(VTAB, tmp_path))
    path.unlink()  # a table never outlives its records
    assert "There are no complete records" in run_table(tmp_path)
    assert read_csv(demo[0].read_text(encoding="utf-8")) == []


def test_files_of_no_suite_are_named(tmp_path: Path) -> None:
    record = make_record("mine/one")
    write_record(record, tmp_path)
    (tmp_path / "records" / "note.txt").write_text("x", encoding="utf-8")
    text = run_table(tmp_path)
    assert f"  records/mine/one/{record.run_id}.json: there is no suite 'mine'" in text
    assert "  records/note.txt: is not JSON" in text


def test_an_unknown_suite_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown suite 'vtba'; did you mean 'vtab'"):
        run_table(tmp_path, ["vtba"])


# ---- published numbers


def quote(method: str, task_or_group: str, value: str, metric: str = "top1", source: str = "Paper") -> PublishedRow:
    place = ("x.csv", 2, source, "ViT-B/16", "ImageNet-21K")
    return PublishedRow(*place, method, task_or_group, metric, value, "A 2024", "last epoch", False, "full")


def test_published_numbers_are_marked_and_unranked(tmp_path: Path) -> None:
    quotes = [
        quote("Full", "dtd", "99.9"),
        quote("Full", "mean of 6 tasks", "99.5"),
        quote("Full", "all", "85.8", "params_m"),
    ]
    table = build(all_tasks("svp", 700), published=quotes)
    texts = files(table, tmp_path)
    measured, quoted = read_csv(texts["small.csv"])
    assert (measured["origin"], measured["rank"], measured["row"]) == ("measured", "1", "svp")
    assert (quoted["origin"], quoted["rank"], quoted["citation"]) == ("published, not measured here", "", "A 2024")
    assert (quoted["backbone"], quoted["dtd"], quoted["svhn"], quoted["mean of 6 tasks"]) == (
        "ViT-B/16",
        "99.9",
        "",
        "99.5",
    )
    page = texts["small.md"]
    assert page.index("| 1 | svp") < page.index("## Quoted: published, not measured here") < page.index("| Paper |")
    scores = "– | 99.9 | – | – | – | – | – | – | – | 99.5 | –"
    assert f"| full | Paper | ViT-B/16 (not Vim) | ImageNet-21K | Full | {scores} | 85.8 M |" in page
    assert "- Paper: A 2024. Protocol: last epoch.\n" in page
    assert "Paper" not in texts["small_long.csv"]
    text = render_terminal(table)
    assert "Quoted: published, not measured here" in text
    assert "[1] Paper: A 2024" in text


def test_quoted_methods_without_a_shown_number_are_counted() -> None:
    quotes = [quote("Full", "natural", "60"), quote("LoRA", "average (of unstated tasks)", "70")]
    page = render_markdown(build([], published=quotes))
    assert "| LoRA |" not in page
    assert "- 1 quoted method without a number in these columns." in page


def test_published_numbers_are_shown_on_request_only(tmp_path: Path) -> None:
    write_record(make_record(), tmp_path)
    page = table_paths(VTAB, tmp_path)[2]
    assert "Quoted" not in run_table(tmp_path)
    assert "Quoted" not in page.read_text(encoding="utf-8")
    assert "Quoted: published, not measured here" in run_table(tmp_path, published=True)
    text = page.read_text(encoding="utf-8")
    for row in load_published(VTAB):
        if row.is_score and not row.task_or_group.startswith("average"):
            assert f" {row.value} |" in text
        assert row.citation.replace("&", "&amp;") in text
    assert text.index("| svp ¶ |") < text.index("## Quoted")
    assert WEIGHTS[7:19] in text
