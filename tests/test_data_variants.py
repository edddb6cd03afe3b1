"""Data variants: the manifest of a folder states them, a record has them, and tables never mix them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from helpers import TASK as TINY
from helpers import run, settle, small
from PIL import Image, ImageOps
from synthetic_records import OTHER_LIST, make_record
from test_audit import IMAGES, failures, lines
from test_audit import record as audited
from test_cards import write_toy

from svp_bench.core.errors import CardError, DataError
from svp_bench.data.manifest import MANIFEST, read_manifest, write_manifest
from svp_bench.data.reading import SYNTHETIC_MARK
from svp_bench.data.sources import DataReport, inspect, open_source
from svp_bench.prepare.stage import describe
from svp_bench.records.store import read_record, write_record
from svp_bench.tables.build import load_table
from svp_bench.tables.render_text import render_markdown
from svp_bench.tasks.cards import OTHER_PIXELS, load_suite, load_task

CALTECH = load_task("vtab/caltech101")
MANIFEST_DIGEST = "sha256:" + "ab" * 32


def prepared(root: Path, task: str, variant: str, counts: Mapping[str, int] | None = None, of: str = "") -> Path:
    """Write split files with a manifest; the images are not looked at before a run."""
    card = load_task(task)
    folder = root / card.folder
    folder.mkdir(parents=True)
    for split, count in {**card.counts, **(counts or {})}.items():
        lines = [f"images/{split}/{number}.png {number % card.classes}\n" for number in range(count)]
        (folder / f"{split}.txt").write_text("".join(lines))
    manifest, sums = describe(
        folder, load_task(of or task), source="folder", variant=variant, origin={}, splits={}, content={}
    )
    write_manifest(folder, manifest, sums)
    return folder


def report_of(root: Path, task: str) -> DataReport:
    card = load_task(task)
    source = open_source(card, root)
    return inspect(card, source, sorted(source.splits))


# ---- reading


@pytest.mark.parametrize("variant", OTHER_PIXELS)
def test_the_manifest_states_the_variant(tmp_path: Path, variant: str) -> None:
    folder = prepared(tmp_path, "vtab/kitti", variant)
    report = report_of(tmp_path, "vtab/kitti")
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (report.variant, report.status, report.notes) == (variant, "as_card", ())
    assert report.manifest_digest == manifest.digest


def test_counts_of_a_variant_of_the_card_are_as_on_the_card(tmp_path: Path) -> None:
    prepared(tmp_path, "vtab/caltech101", "tfds", CALTECH.variants["zip"])
    report = report_of(tmp_path, "vtab/caltech101")
    assert (report.variant, report.status) == ("tfds", "as_card")


def test_other_counts_differ_but_stay_their_variant(tmp_path: Path) -> None:
    prepared(tmp_path, "vtab/kitti", "hub", {"test": 700})
    report = report_of(tmp_path, "vtab/kitti")
    assert (report.variant, report.status) == ("hub", "different")
    assert any("the card states 711" in note for note in report.notes)


def test_a_manifest_of_the_card_leaves_the_variant_to_the_counts(tmp_path: Path) -> None:
    prepared(tmp_path, "vtab/caltech101", "card", CALTECH.variants["zip"])
    report = report_of(tmp_path, "vtab/caltech101")
    assert (report.variant, report.status) == ("zip", "as_card")
    assert report.manifest_digest is not None


def test_a_folder_without_a_manifest_has_no_digest(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "vtab/kitti", "hub")
    (folder / MANIFEST).unlink()
    report = report_of(tmp_path, "vtab/kitti")
    assert (report.variant, report.manifest_digest) == ("card", None)


def test_a_manifest_of_another_task_is_refused(tmp_path: Path) -> None:
    prepared(tmp_path, "vtab/dsprites_loc", "tfds", of="vtab/dsprites_ori")
    with pytest.raises(DataError, match=r"states the task vtab/dsprites_ori, not vtab/dsprites_loc"):
        open_source(load_task("vtab/dsprites_loc"), tmp_path)


def test_an_unknown_task_or_variant_is_refused(tmp_path: Path) -> None:
    folder = prepared(tmp_path, "vtab/kitti", "hub")
    for key, value, message in (("task", "mine/flowers", "states the task mine/flowers"), ("variant", "hubb", "'hub'")):
        content = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**content, key: value}))
        with pytest.raises(DataError, match=message):
            open_source(load_task("vtab/kitti"), tmp_path)
        (folder / MANIFEST).write_text(json.dumps(content))


def test_suites_that_share_a_folder_share_its_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "CUB_200_2011"
    (folder / "images").mkdir(parents=True)
    for name in ("train", "val", "test"):
        (folder / f"{name}.json").write_text(json.dumps({f"001.Bird/{name}.jpg": "001"}))
    (folder / "images" / "001.Bird").mkdir()
    for name in ("train", "val", "test"):
        (folder / "images" / "001.Bird" / f"{name}.jpg").write_bytes(b"x")
    manifest, sums = describe(
        folder, load_task("fgvc/cub"), source="native", variant="card", origin={}, splits={}, content={}
    )
    write_manifest(folder, manifest, sums)
    for task in ("fgvc/cub", "hta/cub200"):
        source = open_source(load_task(task), tmp_path)
        assert (source.manifest_digest, source.variant) == (manifest.digest, "card")


def test_a_card_cannot_name_a_variant_of_its_own_like_that_of_a_source(tmp_path: Path) -> None:
    root = write_toy(tmp_path)
    path = root / "toy" / "one.yaml"
    path.write_text(path.read_text() + "variants: {hub: {counts: {test: 6}}}\n")
    with pytest.raises(CardError, match=r"one\.yaml:\d+: .*'hub'.*another name"):
        load_task("toy/one", root)


# ---- records


def test_a_run_records_variant_and_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    folder = Path("data") / load_task(TINY).folder
    (folder / SYNTHETIC_MARK).unlink()
    first = read_record(run(*small()).record_path)
    assert (first.data_variant, first.manifest_digest) == ("card", None)
    manifest, sums = describe(folder, load_task(TINY), source="hub", variant="hub", origin={}, splits={}, content={})
    write_manifest(folder, manifest, sums)
    second = read_record(run(*small()).record_path)
    assert (second.data_variant, second.manifest_digest) == ("hub", manifest.digest)
    contents = sorted(path.name for path in Path("results/content").rglob("*.json"))
    assert contents == [f"{TINY.partition('/')[2]}.hub.json", f"{TINY.partition('/')[2]}.json"]
    assert not any("first" in note for note in second.data_notes)


# ---- audit


@pytest.mark.parametrize(("variant", "count"), [("hub", IMAGES), ("tfds", 6085)])
def test_an_audit_accepts_the_variants_of_sources(tmp_path: Path, variant: str, count: int) -> None:
    path = write_record(audited(data_variant=variant, count=count, manifest_digest=MANIFEST_DIGEST), tmp_path)
    assert failures(path) == []
    assert any("abababab" in text and variant in text for verdict, text in lines(path)["data"] if verdict == "note")


def test_an_audit_compares_counts_where_the_forms_of_the_card_agree(tmp_path: Path) -> None:
    path = write_record(make_record("vtab/kitti", right=500, count=700, data_variant="hub"), tmp_path)
    assert any("test has 700 images, and in the card 711" in text for text in failures(path))


# ---- tables


def sweep(variant: str, right: int, number: int, digest: str = OTHER_LIST) -> list[Any]:
    return [
        make_record(task, method, right=right, number=number, data_variant=variant, data_digest=digest)
        for task in load_suite("vtab").tasks
        for method in ("svp", "linear")
    ]


def test_sweeps_on_two_sources_are_two_sections(tmp_path: Path) -> None:
    records = [*sweep("card", 7, 1), *sweep("hub", 5, 2), *sweep("tfds", 3, 3)]
    table = load_table(load_suite("vtab"), records)
    found = {section.data: {row.label: row for row in section.rows} for section in table.sections}
    assert {data: rows["svp"].task_mean for data, rows in found.items()} == {
        "": 70.0,
        "data from hub": 50.0,
        "data from tfds": 30.0,
    }
    assert all({*rows} == {"svp", "linear"} for rows in found.values())
    for rows in found.values():
        for row in rows.values():
            assert row.apart == ()
            assert len({cell.variant for cell in row.cells.values()}) == 1
    text = render_markdown(table)
    assert "data from hub" in text
    assert "30.00‡" in text
    assert "caltech101 (hub)" in text


def test_runs_on_other_pixels_of_the_same_split_files_are_cells_of_their_own() -> None:
    contents = [{"train800val200": "sha256:" + letter * 64, "test": "sha256:" + letter * 64} for letter in "ab"]
    records = [make_record(seed=seed, right=9, number=seed, content_digests=contents[0]) for seed in (0, 1)]
    records += [make_record(seed=seed, right=1, number=9 + seed, content_digests=contents[1]) for seed in (1, 2)]
    assert len({record.data_digest for record in records}) == 1
    (section,) = load_table(load_suite("vtab"), records).sections
    (row,) = section.rows
    cells = [*row.cells.values(), *row.apart]
    assert sorted(cell.mean for cell in cells) == [10.0, 90.0]
    assert all(len({tuple((run.content_digests or {}).values()) for run in cell.records}) == 1 for cell in cells)
    assert "other pixels" in render_markdown(load_table(load_suite("vtab"), records))


def test_a_run_on_changed_images_cites_no_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(tmp_path, monkeypatch)
    folder = Path("data") / load_task(TINY).folder
    (folder / SYNTHETIC_MARK).unlink()
    run("data", "verify", TINY, "--root", "data")
    first = read_record(run(*small()).record_path)
    assert first.manifest_digest is not None
    for path in (folder / "images/test").iterdir():
        with Image.open(path) as image:
            ImageOps.invert(image.convert("RGB")).save(path)
    second = read_record(run(*small("--seed_everything", "1")).record_path)
    assert (second.data_status, second.manifest_digest) == ("different", None)
    assert any("not those of the manifest" in note for note in second.data_notes)


def test_the_same_task_and_seed_on_two_sources_never_share_a_cell() -> None:
    # even where the split files are equal, and so their digest
    records = [
        make_record("vtab/dtd", right=9, number=1),
        make_record("vtab/dtd", right=1, number=2, data_variant="hub"),
    ]
    table = load_table(load_suite("vtab"), records)
    cells = [cell for section in table.sections for row in section.rows for cell in row.cells.values()]
    assert sorted((cell.variant, cell.mean) for cell in cells) == [("card", 90.0), ("hub", 10.0)]
    assert table.left_out == ()
