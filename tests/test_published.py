from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from synthetic_records import make_record

from svp_bench.core.errors import RecordError
from svp_bench.core.resources import configs_dir, published_dir
from svp_bench.methods import METHODS
from svp_bench.records.published import COLUMNS, NO_METHOD, load_published, mean_names, read_published
from svp_bench.records.record import Record
from svp_bench.report.page import render
from svp_bench.report.view import report_view
from svp_bench.tables.build import load_table
from svp_bench.tables.quoted import MEASURED, measured, other_lines, quoted_grid
from svp_bench.tables.render_csv import wide_csv
from svp_bench.tables.render_text import render_terminal
from svp_bench.tasks.cards import load_suite

VTAB = load_suite("vtab")
HEAD = ",".join(COLUMNS)
GOOD = "Paper,ViT-B/16,ImageNet-21K,Full,dtd,top1,64.3,A 2024,last epoch,no,full"
FILES = sorted(published_dir().glob("*.csv"))


def write(folder: Path, *lines: str, name: str = "paper_vtab1k.csv") -> Path:
    path = folder / name
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_is_well_formed_and_cited(path: Path) -> None:
    rows = read_published(path)
    with open(path, encoding="utf-8", newline="") as file:
        assert len(rows) == sum(1 for _ in csv.reader(file)) - 1
    assert all(len(row.citation) > 10 for row in rows)
    assert path.name in (published_dir() / "README.md").read_text(encoding="utf-8")


def test_numbers_of_the_suite_are_found_by_the_name_of_its_tables() -> None:
    rows = load_published(VTAB)
    assert {row.file for row in rows} == {path.name for path in FILES if path.stem.endswith("_vtab1k")}
    assert len({row.file for row in rows}) == 9
    assert load_published(load_suite("demo")) == []


def test_values_stand_as_printed() -> None:
    values = {
        (row.source, row.backbone, row.method, row.task_or_group, row.metric): row.value for row in load_published(VTAB)
    }
    assert values["MambaPEFT_table", "Vim-S", "Full", "mean of 19 tasks", "top1"] == "47.08"  # its known error too
    assert values["MambaPEFT_table", "Vim-S", "Full", "natural", "top1"] == "59.35"
    assert values["V-PETL_Bench", "ViT-B/16", "Full fine-tuning", "caltech101", "top1"] == "87.7"
    assert not any("SVP" in key[2] and key[4] == "top1" for key in values)
    assert values["ProDiaL_note", "Vim-tiny", "ProDiaL", "other data: Caltech", "top1"] == "96.24"
    assert values["Memba_note", "Vim-S", "Memba (out proj)", "mean of 19 tasks", "top1"] == "72.33"


def test_every_number_names_its_source_protocol_and_our_method() -> None:
    rows = [row for path in FILES for row in read_published(path)]
    names = {
        *METHODS.names(),
        NO_METHOD,
        *(f"mambapeft/{path.stem}" for path in configs_dir().glob("method/mambapeft/*.yaml")),
    }
    assert {row.ours for row in rows} <= names
    covered = {row.ours for suite in ("vtab", "fgvc", "hta") for row in load_published(load_suite(suite))}
    # Published for language only, a step of another recipe, ours, or without a number that could be read
    assert {*METHODS.names()} - covered == {
        *("offset", "last_blocks", "vp", "dam_vp", "state_offset", "initial_state", "lp_ft", "sdlora"),
    }
    text = (published_dir() / "README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in {*METHODS.names()} - covered)
    for row in rows:
        elsewhere = (
            "secondary source" in row.citation or "note on the paper" in row.citation or "mirror" in row.citation
        )
        assert row.secondary or not elsewhere, (row.file, row.line)
        assert "list" not in row.protocol, "the term is split"


def test_ours_and_theirs_are_side_by_side() -> None:
    quotes = load_published(VTAB)
    records = [make_record(task, "memba") for task in VTAB.tasks] + [make_record(task, "lora") for task in VTAB.tasks]
    table = load_table(VTAB, records, published=quotes)
    grid = quoted_grid(table)
    head, rows = grid[0], grid[1:]
    methods = [line[head.index("ours")] for line in rows]
    both = methods[: methods.count("memba") + methods.count("lora")]
    assert set(both) == {"memba", "lora"}, "methods with rows of ours come first"
    by_method = {name: [line for line in rows if line[0] == name] for name in ("memba", "lora")}
    for name, (ours, *theirs) in by_method.items():
        assert ours[:3] == [name, MEASURED, "vim_small_patch16_224"]
        assert ours[head.index("mean of 19 tasks")] == "70.00"
        assert theirs
        assert all(line[1] != MEASURED for line in theirs)
    assert {line[head.index("method")] for line in by_method["lora"][1:]} >= {"LoRA_p(X)", "LoRA"}
    assert "LoRA(x_proj)" not in {line[head.index("method")] for line in by_method["lora"]}, "is our lora_x_proj"
    (line,) = [line for line in rows if line[head.index("method")] == "LoRA_p(B)"]
    assert line[0] == "mambapeft/lora_b"
    memba = {line[head.index("method")]: line for line in by_method["memba"][1:]}
    assert memba["Memba (out proj)"][1] == "Memba_note (secondary)"
    vit = next(line for line in by_method["lora"] if line[1] == "V-PETL_Bench")
    assert vit[2] == "ViT-B/16 (not Vim)"
    assert "(not Vim)" not in by_method["memba"][1][2]
    text = render_terminal(table)
    assert text.index("here") < text.index("Memba (in+out proj)")
    (line,) = [line for line in other_lines(table) if line.startswith("ProDiaL,")]
    assert "Stanford Cars 85.38" in line
    assert "ours: prodial" in line
    assert "(secondary)" in line
    lines = {(line["source"], line["row"]): line for line in csv.DictReader(io.StringIO(wide_csv(table)))}
    quoted = lines["Memba_note", "Memba (out proj)"]
    assert (quoted["our_method"], quoted["secondary"]) == ("memba", "yes")
    page = render(report_view([table], {}, {}))
    assert ">memba 70.00<" in page
    assert "Stanford Cars 85.38" in page


def test_a_row_with_the_settings_of_a_method_file_stands_with_the_row_that_it_repeats() -> None:
    def with_settings(**changes: object) -> list[Record]:
        given = {
            "model.method.class_path": "svp_bench.methods.lora.LoRA",
            "model.method.init_args": {"targets": ["B"], "rank": 64, "scale": 0.1, "dropout": 0.1, "dora": None},
            "model.weight_decay": 1e-4,
        }
        return [make_record(task, "lora", changes={**given, **changes}) for task in VTAB.tasks]

    repeated, other = with_settings(), with_settings(**{"model.learning_rate": 3e-3})
    table = load_table(VTAB, [*repeated, *other], published=load_published(VTAB))
    assert sorted(name for name, _, _ in measured(table)) == ["lora", "mambapeft/lora_b"]
    grid = quoted_grid(table)
    places = [number for number, line in enumerate(grid) if line[0] == "mambapeft/lora_b"]
    assert [grid[place][1] for place in places] == [MEASURED, "MambaPEFT_table"]
    assert places[1] == places[0] + 1


def test_rows_on_random_weights_are_not_shown_next_to_quoted_ones() -> None:
    records = [make_record(task, "memba", checkpoint="none", checkpoint_digest=None) for task in VTAB.tasks]
    grid = quoted_grid(load_table(VTAB, records, published=load_published(VTAB)))
    assert all(line[1] != MEASURED for line in grid)


def test_known_errors_are_written_down_and_there_are_no_others() -> None:
    text = (published_dir() / "README.md").read_text(encoding="utf-8")
    scores: dict[tuple[str, ...], dict[str, float]] = {}
    for row in load_published(VTAB):
        if row.metric == "top1":
            scores.setdefault((row.source, row.backbone, row.pretrain, row.method), {})[row.task_or_group] = row.number
    tasks_mean, groups_mean = mean_names(VTAB)
    wrong = set()
    for (source, backbone, _, method), known in scores.items():
        groups = {group: [known.get(task) for task in tasks] for group, tasks in VTAB.groups.items()}
        means = {
            group: known[group] if group in known else sum(x or 0 for x in values) / len(values)
            for group, values in groups.items()
            if group in known or None not in values
        }
        if len(means) < len(groups):
            continue
        mean = sum(means[group] * len(tasks) for group, tasks in VTAB.groups.items()) / len(VTAB.tasks)
        if tasks_mean in known and abs(known[tasks_mean] - mean) > 0.06:
            wrong.add((source, backbone, method))
        # Convpass, NOAH: printed with one decimal, cut rather than rounded
        if groups_mean in known and abs(known[groups_mean] - sum(means.values()) / len(means)) > 0.11:
            wrong.add((source, backbone, method))
    assert wrong == {("MambaPEFT_table", "Vim-S", "Full"), ("NOAH_table1", "ViT-B/16", "Full")}
    assert "**MambaPEFT, Vim-S, Full**" in text
    assert "50.82" in text
    assert "**NOAH, Full, Flowers102**" in text
    assert "**SVP (arXiv:2412.08947)**" in text


@pytest.mark.parametrize(
    ("value", "number"), [("64.3", 64.3), ("0 M", 0.0), ("0.16M", 160_000.0), ("12K", 12_000.0), ("3.4E5", 340_000.0)]
)
def test_values_as_numbers(tmp_path: Path, value: str, number: float) -> None:
    (row,) = read_published(
        write(tmp_path, HEAD, f"Paper,ViT-B/16,none,Full,all,params,{value},A 2024,last epoch,yes,full")
    )
    assert row.number == pytest.approx(number)
    assert (row.value, row.file, row.line) == (value, "paper_vtab1k.csv", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD.replace("A 2024", " "), ":3: 'citation' is empty; every number needs its source"),
        (GOOD.replace("64.3", "about 64"), ":3: 'value' must be a number, with K or M behind it if necessary, not"),
        (GOOD.replace("64.3", "nan"), ":3: 'value' must be a number"),
        (GOOD.replace("64.3", "164.3"), ":3: 'value' of a top1 must be a percentage, not '164.3'"),
        (GOOD.replace("64.3", "-1"), ":3: 'value' of a top1 must be a percentage, not '-1'"),
        (GOOD.replace(",no,", ",maybe,"), ":3: 'secondary' must be yes or no, not 'maybe'"),
        (GOOD.replace("last epoch", ""), ":3: 'protocol' is empty"),
        (GOOD.replace(",dtd,", ",dtt,"), ":3: unknown task or group 'dtt'; did you mean 'dtd'"),
        (GOOD.replace("64.3", "64.5"), ":3: the top1 of 'Full' is on line 2 already"),
        ('"Paper', ":3: is not CSV"),
    ],
)
def test_malformed_rows_are_refused(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path, HEAD, GOOD, line)
    with pytest.raises(RecordError) as caught:
        load_published(VTAB, tmp_path)
    assert str(caught.value).startswith(f"{path}{message}")
    assert "\n" not in str(caught.value)


def test_malformed_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r":1: the columns must be source,.*, not source,method"):
        read_published(write(tmp_path, "source,method"))
    with pytest.raises(RecordError, match=r":1: holds no numbers"):
        read_published(write(tmp_path, HEAD))
    with pytest.raises(RecordError, match="cannot be read"):
        read_published(tmp_path / "none.csv")
