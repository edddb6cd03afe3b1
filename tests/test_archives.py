"""Archives of records are read in place and unpacked to the byte; older records are migrated."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import pytest
from helpers import assert_error, command
from synthetic_records import make_record

import svp_bench
from svp_bench.core.errors import RecordError
from svp_bench.records.store import pack, read_record, read_records, record_files, unpack, write_record

HISTORIC = Path(__file__).parent / "historic_records" / "schema-1.json"
SUITE = "vtab"


def written(root: Path, count: int = 3) -> dict[Path, bytes]:
    """Write records of two tasks and return path → content."""
    paths = [
        write_record(make_record(task, seed=seed), root) for task in ("vtab/dtd", "vtab/svhn") for seed in range(count)
    ]
    return {path: path.read_bytes() for path in paths}


def test_packed_records_are_read_in_place(tmp_path: Path) -> None:
    files = written(tmp_path)
    before = read_records(tmp_path)
    table = command("table", "--results_root", str(tmp_path)).out
    frame = svp_bench.load_results(tmp_path)
    audited = command("audit", str(tmp_path)).out
    archive, count = pack(tmp_path, SUITE)
    assert (archive, count) == (tmp_path / "records" / "vtab.jsonl.gz", len(files))
    assert [path.name for path in (tmp_path / "records").rglob("*")] == ["vtab.jsonl.gz"]
    assert read_records(tmp_path) == before
    assert record_files(tmp_path / "records" / "vtab" / "dtd") == sorted(p for p in files if p.parent.name == "dtd")
    assert command("table", "--results_root", str(tmp_path)).out == table
    assert svp_bench.load_results(tmp_path).equals(frame)
    assert command("audit", str(tmp_path)).out == audited
    assert command("audit", str(archive)).out == audited
    one = next(iter(files))
    assert f"{one}\n" in command("audit", str(one)).out
    with pytest.raises(RecordError, match="never overwritten"):
        write_record(read_record(one), tmp_path)


def test_unpacking_restores_every_byte_and_packing_is_deterministic(tmp_path: Path) -> None:
    files = written(tmp_path)
    archive, _ = pack(tmp_path, SUITE)
    content = archive.read_bytes()
    assert unpack(tmp_path, SUITE) == len(files)
    assert {path: path.read_bytes() for path in (tmp_path / "records").rglob("*.json")} == files
    assert not archive.exists()
    pack(tmp_path, SUITE)
    assert archive.read_bytes() == content


def test_further_records_join_the_archive(tmp_path: Path) -> None:
    files = written(tmp_path, 1)
    pack(tmp_path, SUITE)
    new = write_record(make_record("vtab/dtd", seed=7), tmp_path)
    assert len(read_records(tmp_path)[0]) == len(files) + 1
    assert command("pack", SUITE, "--results_root", str(tmp_path)).status == 0
    assert not new.exists()
    assert len(read_records(tmp_path)[0]) == len(files) + 1
    assert command("pack", SUITE, "--results_root", str(tmp_path), "--unpack").status == 0
    assert new.is_file()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no gzip", "cannot be read"),
        (gzip.compress(b"{}")[:-4], "cannot be read"),
        (gzip.compress(b"{}\n"), "vtab.jsonl.gz:1: is not a record"),
        (gzip.compress(b'{"task": "demo/size", "run_id": "x"}\n'), "does not belong into the archive of vtab"),
        (gzip.compress(b'{"task": "vtab/dtd", "run_id": "../x"}\n'), "does not belong into the archive of vtab"),
        (gzip.compress(2 * b'{"task": "vtab/dtd", "run_id": "x"}\n'), "is there twice"),
    ],
    ids=["other bytes", "cut", "not a record", "another suite", "path", "twice"],  # compressed bytes hold the time
)
def test_a_broken_archive_is_one_problem(tmp_path: Path, content: bytes, reason: str) -> None:
    record = make_record("demo/size")
    write_record(record, tmp_path)
    (tmp_path / "records" / "vtab.jsonl.gz").write_bytes(content)
    records, (problem,) = read_records(tmp_path)
    assert records == [record]
    assert problem.path.startswith("records/vtab.jsonl.gz")
    assert reason in f"{problem.path}: {problem.reason}"


def test_an_edited_packed_record_is_a_problem(tmp_path: Path) -> None:
    written(tmp_path, 1)
    archive, _ = pack(tmp_path, SUITE)
    first, *rest = gzip.decompress(archive.read_bytes()).splitlines()
    edited = json.loads(first)
    edited["metrics"]["top1"] = 99.0
    archive.write_bytes(gzip.compress(b"\n".join([json.dumps(edited).encode(), *rest]) + b"\n"))
    records, (problem,) = read_records(tmp_path)
    assert len(records) == 1
    assert problem.path == f"records/vtab/dtd/{edited['run_id']}.json"
    assert "metrics.top1" in problem.reason


def test_a_file_that_contradicts_the_archive_is_a_problem(tmp_path: Path) -> None:
    path = next(iter(written(tmp_path, 1)))
    text = path.read_text(encoding="utf-8")
    pack(tmp_path, SUITE)
    path.parent.mkdir(parents=True)
    path.write_text(text.replace('"epochs": 100', '"epochs": 99'), encoding="utf-8")
    (problem,) = read_records(tmp_path)[1]
    assert "holds another record of this run" in problem.reason


def older(root: Path) -> Path:
    """Copy a record of schema 1 to its place below `root`."""
    data = json.loads(HISTORIC.read_text(encoding="utf-8"))
    path = root / "records" / data["task"] / f"{data['run_id']}.json"
    path.parent.mkdir(parents=True)
    shutil.copyfile(HISTORIC, path)
    return path


def test_migrate_rewrites_older_records_once(tmp_path: Path) -> None:
    path = older(tmp_path)
    (tmp_path / "choices").mkdir()
    record = read_record(path)
    before = path.read_bytes()
    dry = command("migrate", "--results_root", str(tmp_path), "--dry_run")
    assert "schema 1 → 2" in dry.out
    assert path.read_bytes() == before
    with pytest.raises(RecordError, match="migrate"):
        pack(tmp_path, record.suite)
    assert command("migrate", "--results_root", str(tmp_path)).status == 0
    assert path.read_text(encoding="utf-8") == record.text()
    assert read_record(path) == record
    assert (tmp_path / "selected_configs").is_dir()
    again = command("migrate", "--results_root", str(tmp_path))
    assert (again.status, "0 records rewritten" in again.out) == (0, True)


def test_an_edited_older_record_is_neither_read_nor_migrated(tmp_path: Path) -> None:
    path = older(tmp_path)
    path.write_text(path.read_text(encoding="utf-8").replace('"learning_rate": 0.001', '"learning_rate": 0.5'))
    before = path.read_bytes()
    with pytest.raises(RecordError, match="'config_digest' does not belong to the config"):
        read_record(path)
    done = command("migrate", "--results_root", str(tmp_path))
    assert (done.status, path.read_bytes()) == (1, before)


def test_migrate_needs_a_results_folder(tmp_path: Path) -> None:
    assert "is not a folder" in assert_error(command("migrate", "--results_root", str(tmp_path / "none")), 2)


def test_migrate_reports_two_folders_of_selected_configs(tmp_path: Path) -> None:
    for name in ("choices", "selected_configs"):
        (tmp_path / name).mkdir()
    done = command("migrate", "--results_root", str(tmp_path))
    assert done.status == 1
    assert "choices was left" in done.out


def test_a_suite_without_records_is_one_line(tmp_path: Path) -> None:
    assert "has no records" in assert_error(command("pack", SUITE, "--results_root", str(tmp_path)), 1)
    assert "no archive" in assert_error(command("pack", SUITE, "--results_root", str(tmp_path), "--unpack"), 1)
