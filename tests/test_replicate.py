"""`svp-bench replicate` reads the test split after every epoch, to measure what that gains; nothing else can."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import random
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from helpers import CONFIG, COUNTS, TASK, assert_error, command, run, settle
from helpers import small as line
from synthetic_records import OTHER_LIST, WEIGHTS, make_record, unscored
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from svp_bench.audit.record import audit
from svp_bench.core.errors import RecordError
from svp_bench.data import sources
from svp_bench.data.module import VisionDataModule
from svp_bench.records.store import read_records
from svp_bench.tables.test_peeking import (
    SCHEMA,
    Replication,
    read_replication,
    read_replications,
    replication_path,
    run_tax_table,
    tax_paths,
    write_replication,
)
from svp_bench.tasks.cards import load_suite
from svp_bench.train.module import AdaptationModule
from svp_bench.train.replicate import _LendsTest
from svp_bench.train.run import FitRun

EPOCHS = 4
LEARNS = ("--method", "full", "--model.learning_rate", "3e-3", "--model.warmup_epochs", "1")
SETTING = {"trainer__max_epochs": str(EPOCHS)}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """The same setting and seed, once by `fit` and once by `replicate`, with the lists whose images were decoded."""
    with pytest.MonkeyPatch.context() as patch:
        place = settle(tmp_path_factory.mktemp("both"), patch)
        decoded: list[str] = []
        original = sources.FileImages.load

        def load(images: sources.FileImages, index: int) -> Any:
            decoded.append(images.name)
            return original(images, index)

        patch.setattr(sources.FileImages, "load", load)
        honest = run(*line(*LEARNS, **SETTING))
        of_fit, decoded[:] = list(decoded), []
        peeking = run(*line(*LEARNS, subcommand="replicate", **SETTING))
        (path,) = (place / "results" / "replications").rglob("*.json")
        folder = place / "runs" / "replications" / TASK / path.stem
        yield SimpleNamespace(place=place, honest=honest, peeking=peeking, path=path, folder=folder, of_fit=of_fit,
                              decoded=list(decoded))  # fmt: skip


# ---- one replication


def test_the_file_follows_its_schema_and_is_in_its_place(both: SimpleNamespace) -> None:
    one = read_replication(both.path)
    assert one.complete
    assert len(one.test_top1) == EPOCHS
    assert one.count == COUNTS["test"]
    assert (one.best_test, one.final) == (max(one.test_top1), one.test_top1[-1])
    assert one.test_top1[one.best_epoch - 1] == one.best_test
    data = json.loads(both.path.read_text())
    assert data["schema"] == SCHEMA
    assert data["status"] == "complete"
    assert not {"metrics", "correct", "kind"} & set(data)
    assert set(data["times"]) == {"train_seconds", "test_seconds"}
    assert one.text() == both.path.read_text()
    assert f"Replication (complete): results/replications/{TASK}/{both.path.name}" in both.peeking.out
    assert f"Test-peek tax: picking the epoch on the test list claims {one.tax:.2f} points more" in both.peeking.out
    assert "tables refuse it" in both.peeking.out


def test_reading_the_test_list_changes_no_weight(both: SimpleNamespace) -> None:
    one = read_replication(both.path)
    assert one.final == both.honest.record["metrics"]["top1"]
    assert one.run.config_digest == both.honest.record["config_digest"]
    assert one.run.setting_digest == both.honest.record["setting_digest"]
    states = [
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (both.place / both.honest.folder, both.folder)
    ]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_it_reads_the_test_list_after_each_epoch_and_fit_once(both: SimpleNamespace) -> None:
    assert both.of_fit.count("test") == COUNTS["test"]
    assert both.decoded.count("test") >= EPOCHS * COUNTS["test"]
    assert both.decoded.count("train800val200") == both.of_fit.count("train800val200")


def test_tensorboard_names_the_curve_what_it_is(both: SimpleNamespace) -> None:
    events = EventAccumulator(str(both.folder)).Reload()
    tags = events.Tags()
    one = read_replication(both.path)
    curve = [event.value for event in events.Scalars("test_each_epoch/top1")]
    assert curve == pytest.approx([value / 100 for value in one.test_top1])
    assert [event.value for event in events.Scalars("replication/best_test")] == pytest.approx([one.best_test])
    assert [event.value for event in events.Scalars("replication/final")] == pytest.approx([one.final])
    assert not [tag for tag in (*tags["scalars"], *tags["images"], *tags["tensors"]) if tag.startswith("val/")]


def test_it_is_no_record_and_no_table_counts_it(both: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(both.place)
    records, problems = read_records("results")
    assert [record.run_id for record in records] == [both.honest.record["run_id"]]
    assert problems == []
    copy = Path("results/records") / TASK / both.path.name
    copy.write_text(both.path.read_text(), encoding="utf-8")
    reason = "is not a record but a replication, with its best epoch chosen on test; tables refuse it"
    try:
        assert f"{copy.relative_to('results').as_posix()}: {reason}" in " ".join(run("table").out.split())
        (one,) = audit([copy]).audits
        assert [finding.text for finding in one.failures] == [reason]
        assert reason in assert_error(command("rerun", str(copy)), 1)
    finally:
        copy.unlink()


def test_its_checkpoint_is_not_tested_and_not_gone_on_with(
    both: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(both.place)
    checkpoint = both.folder / "checkpoints" / "last.ckpt"
    text = assert_error(command(*line(*LEARNS, "--ckpt_path", str(checkpoint), subcommand="test", **SETTING)), 2)
    assert "only recorded runs are tested" in text
    with monkeypatch.context() as patch:
        patch.chdir(both.place)
        again = run(*line(*LEARNS, "--resume", "--runs_root", "runs/replications", "--results_root", "o", **SETTING))
    assert any("no run of this setting and seed" in notice for notice in again.notices)
    assert again.folder != both.folder.relative_to(both.place)


# ---- nobody else can


@pytest.mark.filterwarnings("ignore:the data of vtab/cifar differ")
def test_fit_cannot_be_made_to_read_the_test_list_early(place: Path) -> None:
    lends = f"{_LendsTest.__module__}.{_LendsTest.__qualname__}"
    for flags in (("--data", lends), ("--data.class_path", lends), (f"--data={lends}",)):
        assert_error(command(*line(*flags)), 2)
    for text in (f"data: {lends}\n", f"data:\n  class_path: {lends}\n  init_args: {{}}\n", "data_type: test\n"):
        Path("peek.yaml").write_text(text, encoding="utf-8")
        assert_error(command(*line("--config", "peek.yaml")), 2)
    assert not Path("results").exists()
    assert FitRun.data_type is VisionDataModule
    data = VisionDataModule(TASK, root="data", stage="final", image_size=32)
    data.setup("fit")
    assert data.val_dataloader() == []
    with pytest.raises(Exception, match="there is no test loader yet"):
        data.test_dataloader()


def test_no_other_module_knows_the_class_that_lends_the_test_list() -> None:
    package = Path(sources.__file__).parents[1]
    naming = {path.name for path in package.rglob("*.py") if "_LendsTest" in path.read_text(encoding="utf-8")}
    assert naming == {"replicate.py"}
    callers = {path.name for path in package.rglob("*.py") if "train.replicate" in path.read_text(encoding="utf-8")}
    assert callers == {"reproduce.py"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data.stage", "select"), "replicate takes no --data.stage select"),
        (("--resume",), "replicate takes no --resume: a replication starts anew"),
        (("--no_test",), "replicate takes no --no_test: a replication is about nothing but the test list"),
        (("--ckpt_path", "x.ckpt"), "replicate trains from the start and takes no --ckpt_path"),
        (("--model.learning_rat", "1"), "unknown argument 'model.learning_rat'; did you mean"),
    ],
)
def test_wrong_use_is_one_line(place: Path, flags: tuple[str, ...], expected: str) -> None:
    assert expected in assert_error(command(*line(*flags, subcommand="replicate")), 2)
    assert not list(Path().rglob("*.json"))


def test_errors_come_before_torch_and_help_says_what_it_does(place: Path) -> None:
    assert "no task" in assert_error(command("replicate"), 2)
    outcome = command("replicate", "--help")
    assert outcome.status == 0
    assert "reads the test split after every epoch" in outcome.out


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--trainer.check_val_every_n_epoch", "2"), "the test list was not read after each epoch"),
        (("--trainer.limit_train_batches", "2"), "trainer.limit_train_batches 2"),
        (("--trainer.limit_val_batches", "1"), "trainer.limit_val_batches 1"),
    ],
)
def test_a_run_that_is_cut_short_is_truncated_and_left_out(place: Path, flags: tuple[str, ...], reason: str) -> None:
    run(*line(*flags, subcommand="replicate", trainer__max_epochs="2"))
    (one,), problems = read_replications("results")
    assert problems == []
    assert (one.run.status, one.run.status_reason) == ("truncated", reason)
    table = run("table").out
    assert f"Left out: {TASK} {one.run.run_id}: truncated ({reason})" in table


@pytest.mark.parametrize("subcommand", ["replicate", "rerun"])
def test_a_signal_ends_it_and_no_number_is_written(
    place: Path, monkeypatch: pytest.MonkeyPatch, subcommand: str
) -> None:
    path = str(run(*line(trainer__max_epochs="2")).record_path)
    real, seen = AdaptationModule.training_step, [0]

    def training_step(self: AdaptationModule, batch: Any, batch_idx: int) -> Any:
        seen[0] += 1
        if seen[0] == 7:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, batch, batch_idx)

    monkeypatch.setattr(AdaptationModule, "training_step", training_step)
    words = line(subcommand="replicate", trainer__max_epochs="2") if subcommand == "replicate" else ["rerun", path]
    before = signal.getsignal(signal.SIGTERM)
    try:
        outcome = command(*words)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert outcome.status == 130
    assert "--resume" not in outcome.out
    assert not list(Path("results/replications").rglob("*.json"))
    assert all('"interrupted"' in file.read_text() for file in Path("results/reruns").rglob("*.json"))


def test_missing_data_stop_it_before_it_leaves_a_trace(place: Path) -> None:
    text = assert_error(command("replicate", "--config", CONFIG, "--data.root", "nowhere"), 1)
    assert "no data of vtab/cifar" in text
    assert not Path("runs").exists()


# ---- the schema


def drawn(
    task: str = "vtab/caltech101",
    method: str = "svp",
    seed: int = 0,
    curve: tuple[float, ...] = (50.0, 60.0, 55.0),
    number: int = 0,
    changes: dict[str, Any] | None = None,
    **fields: Any,
) -> Replication:
    """A replication with made-up numbers, of 20 test images."""
    settings = {"trainer.max_epochs": len(curve), **(changes or {})}
    run_of = unscored(make_record(task, method, seed, changes=settings, number=number, **fields))
    return Replication(dataclasses.replace(run_of, epochs=len(curve)), 20, curve)


def test_a_replication_comes_back_and_is_never_overwritten(tmp_path: Path) -> None:
    one = drawn()
    path = write_replication(one, tmp_path)
    assert path == replication_path(one, tmp_path)
    assert read_replication(path) == one
    assert (one.best_test, one.best_epoch, one.final, one.tax) == (60.0, 2, 55.0, 5.0)
    with pytest.raises(RecordError, match="exists already"):
        write_replication(one, tmp_path)
    with pytest.raises(RecordError, match="is no replication"):
        Replication.from_json(make_record().to_json())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("schema", 1, "is no replication"),
        ("surprise", 1, "unknown key of a replication 'surprise'"),
        ("metrics", {}, "unknown key of a replication 'metrics'"),
        ("count", None, "the key 'count' is missing"),
        ("seed", None, "the key 'seed' is missing"),
        ("count", 0, "'count' must be a whole number"),
        ("count", True, "'count' must be a whole number"),
        ("test_top1", [], "'test_top1' must be a list with at least one number"),
        ("test_top1", [50.0, 120.0, 55.0], "'test_top1' of epoch 2 is no percentage: 120.0"),
        ("test_top1", [50.0, "x", 55.0], "'test_top1' of epoch 2 is no percentage: 'x'"),
        ("test_top1", [50.0, 52.0, 55.0], "'test_top1' of epoch 2 is 52.0, which 20 images cannot give"),
        ("test_top1", [50.0, 60.0], "a complete replication has a score for each epoch, this one has 2, of 3"),
        ("best_test", 65.0, "'best_test' is 65.0, and its epochs give 60.0"),
        ("best_epoch", 0, "'best_epoch' is 0, and its epochs give 2"),
        ("final", 60.0, "'final' is 60.0, and its epochs give 55.0"),
        ("status", "unscored", "'status' must be one of complete, truncated"),
        ("splits", {"train": "train800", "val": "val200"}, "'stage' and 'splits' are not those of a final run"),
        ("epochs", 2, "a complete replication has a score for each epoch"),
        ("seed", "zero", "'seed' must be int"),
        ("config_digest", WEIGHTS, "'config_digest' does not belong to the config"),
    ],
)
def test_reading_is_strict(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    path = write_replication(drawn(), tmp_path)
    data = json.loads(path.read_text())
    if value is None:
        del data[key]
    else:
        data[key] = value
    if key == "test_top1" and value and len(value) == 2:
        data["final"] = 60.0
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RecordError, match=expected.replace("(", r"\(")):
        read_replication(path)
    found, (problem,) = read_replications(tmp_path)
    assert found == []
    assert expected in problem.reason


# ---- the table of the tax


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def tables(root: Path, suite: str = "vtab") -> tuple[str, str]:
    page, numbers = tax_paths(load_suite(suite), root)
    return page.read_text(encoding="utf-8"), numbers.read_text(encoding="utf-8")


CURVES = {  # task → seed → curve; taxes: 5, 10 | 0, 5 | 20 | 10
    "vtab/caltech101": [(50.0, 60.0, 55.0), (40.0, 70.0, 60.0)],
    "vtab/clevr_count": [(10.0, 20.0, 30.0), (10.0, 35.0, 30.0)],
    "vtab/clevr_dist": [(30.0, 5.0, 10.0)],
    "vtab/dtd": [(55.0, 50.0, 45.0)],
}
TAXES = {"vtab/caltech101": [5.0, 10.0], "vtab/clevr_count": [0.0, 5.0], "vtab/clevr_dist": [20.0], "vtab/dtd": [10.0]}


def fill(root: Path, method: str = "svp", number: int = 0) -> list[Replication]:
    made = [
        drawn(task, method, seed, curve, number + 2 * place + seed)
        for place, (task, curves) in enumerate(CURVES.items())
        for seed, curve in enumerate(curves)
    ]
    for one in made:
        write_replication(one, root)
    return made


def test_the_tax_of_each_task_and_of_their_mean(tmp_path: Path) -> None:
    fill(tmp_path)
    text = run_tax_table(tmp_path)
    assert text is not None
    page, numbers = tables(tmp_path)
    for shown in (text, page):
        assert "No number here is a result, and none compares with a leaderboard" in shown
    lines = {row["scope"]: row for row in rows(numbers)}
    assert {row["not_a_result"] for row in lines.values()} == {"picked on the test list"}
    for task, taxes in TAXES.items():
        assert float(lines[task]["tax"]) == pytest.approx(statistics.fmean(taxes))
        assert int(lines[task]["n"]) == len(taxes)
        if len(taxes) == 1:
            assert lines[task]["tax_low"] == ""
    half = 12.7062047 * statistics.stdev([5.0, 10.0]) / math.sqrt(2)  # t of one degree of freedom
    assert float(lines["vtab/caltech101"]["tax_high"]) == pytest.approx(7.5 + half, abs=1e-4)
    assert lines["vtab/caltech101"]["picked_epochs"] == "2 2"
    assert float(lines["vtab/caltech101"]["last_epoch"]) == pytest.approx(57.5)
    assert float(lines["vtab/caltech101"]["best_epoch"]) == pytest.approx(65.0)
    means = [statistics.fmean(taxes) for taxes in TAXES.values()]
    assert float(lines["mean, these tasks"]["tax"]) == pytest.approx(statistics.fmean(means))
    assert (lines["mean, new tasks"]["tax_low"], lines["mean, new tasks"]["n"]) == ("", "3")  # three sources: too few
    assert "| svp | 4/19 | 1–2 |" in page
    assert "| caltech101 | svp | 2 | 57.50 | 65.00 | 2 of 3, 2 of 3 | +7.50 [" in page


def test_equal_files_give_equal_bytes_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [*fill(tmp_path / "a"), *fill(tmp_path / "a", "linear", 20)]
    first = run_tax_table(tmp_path / "a")
    random.Random(1).shuffle(made)
    for one in made:
        write_replication(one, tmp_path / "b")
    second = run_tax_table(tmp_path / "b")
    assert first is not None
    assert second is not None
    assert tables(tmp_path / "a") == tables(tmp_path / "b")
    assert first.replace("/a/", "/b/") == second


def test_what_differs_is_kept_apart_and_the_newest_of_a_seed_counts(tmp_path: Path) -> None:
    write_replication(drawn(number=1), tmp_path)
    write_replication(drawn(curve=(80.0, 70.0, 60.0), number=2), tmp_path)  # the same cell and seed, newer
    write_replication(
        drawn(number=3, data_variant="synthetic", data_status="different", data_digest=OTHER_LIST), tmp_path
    )
    write_replication(drawn(number=4, changes={"model.learning_rate": 0.5}), tmp_path)  # another row
    write_replication(drawn(number=5, checkpoint="none", checkpoint_digest=None), tmp_path)  # another section
    write_replication(drawn(number=6, task_version=9), tmp_path)
    text = run_tax_table(tmp_path, ["vtab"])
    assert text is not None
    page, numbers = tables(tmp_path)
    assert page.count("\n## ") == 2
    assert page.index("hub, sha256:abab") < page.index("random weights")
    assert "svp (learning_rate=0.001)" in page
    assert "svp (learning_rate=0.5)" in page
    assert "superseded by" in page
    assert "run on version 9 of the task card, now 1" in page
    assert "1 cell on other data than those shown: in the CSV file only, and in no mean." in page
    by_variant = {row["data_variant"]: row for row in rows(numbers) if row["row"] == "svp (learning_rate=0.001)"}
    assert float(by_variant["card"]["tax"]) == 20.0
    assert float(by_variant["synthetic"]["tax"]) == 5.0
    assert {row["tax"] for row in rows(numbers) if row["scope"].startswith("mean") and row["row"] != "svp"} >= {
        "20.0000"
    }


def test_nothing_to_show_and_broken_files(tmp_path: Path) -> None:
    assert run_tax_table(tmp_path) is None
    path = write_replication(drawn(), tmp_path)
    assert "svp" in str(run_tax_table(tmp_path))
    path.rename(path.with_name("moved.json"))
    stray = tmp_path / "replications" / "other" / "x.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("{}", encoding="utf-8")
    text = str(run_tax_table(tmp_path))
    assert "Left out: replications/vtab/caltech101/moved.json: is a copy of replications/vtab/caltech101/" in text
    assert "Belong to no suite:\n  replications/other/x.json: is no replication" in text
    page, numbers = tables(tmp_path)
    assert "There is no complete replication; `svp-bench replicate --config FILE` makes one." in page
    assert len(numbers.splitlines()) == 1
