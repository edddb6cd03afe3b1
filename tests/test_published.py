from __future__ import annotations

import csv
from pathlib import Path

import pytest

from svp_bench.core.errors import RecordError
from svp_bench.core.resources import published_dir
from svp_bench.records.published import COLUMNS, load_published, mean_names, read_published
from svp_bench.tasks.cards import load_suite

VTAB = load_suite("vtab")
HEAD = ",".join(COLUMNS)
GOOD = "Paper,ViT-B/16,ImageNet-21K,Full,dtd,top1,64.3,A 2024"
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
    assert len({row.file for row in rows}) == 6
    assert load_published(load_suite("demo")) == []


def test_values_stand_as_printed() -> None:
    values = {
        (row.source, row.backbone, row.method, row.task_or_group, row.metric): row.value for row in load_published(VTAB)
    }
    assert values["MambaPEFT_table", "Vim-S", "Full", "mean of 19 tasks", "top1"] == "47.08"  # its known error too
    assert values["MambaPEFT_table", "Vim-S", "Full", "natural", "top1"] == "59.35"
    assert values["V-PETL_Bench", "ViT-B/16", "Full fine-tuning", "caltech101", "top1"] == "87.7"
    assert not any("SVP" in key[2] for key in values)


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
    (row,) = read_published(write(tmp_path, HEAD, f"Paper,ViT-B/16,none,Full,all,params,{value},A 2024"))
    assert row.number == pytest.approx(number)
    assert (row.value, row.file, row.line) == (value, "paper_vtab1k.csv", 2)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Paper,ViT-B/16,none,Full,dtd,top1,64.3", ":3: has 7 fields instead of 8"),
        (GOOD.replace("A 2024", " "), ":3: 'citation' is empty; every number needs its source"),
        (GOOD.replace("64.3", "about 64"), ":3: 'value' must be a number, with K or M behind it if necessary, not"),
        (GOOD.replace("64.3", "nan"), ":3: 'value' must be a number"),
        (GOOD.replace("64.3", "164.3"), ":3: 'value' of a top1 must be a percentage, not '164.3'"),
        (GOOD.replace("64.3", "-1"), ":3: 'value' of a top1 must be a percentage, not '-1'"),
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
