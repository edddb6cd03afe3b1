"""`svp-bench replicate` reads the test split after every epoch, to measure what that gains; nothing else can."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import random
import re
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
from svp_bench.records.replication import (
    SCHEMA,
    Curve,
    Replication,
    read_replications,
    write_replication,
)
from svp_bench.records.store import read_json, read_records
from svp_bench.tables.build import run_tax
from svp_bench.tables.test_peeking import tax_path
from svp_bench.tasks.cards import load_suite
from svp_bench.train.module import AdaptationModule
from svp_bench.train.replicate import _TestEachEpochData
from svp_bench.train.run import FitRun

EPOCHS = 4
LEARNS = ("--method", "full", "--model.learning_rate", "3e-3", "--model.warmup_epochs", "1")
SETTING = {"trainer__max_epochs": str(EPOCHS), "data__pixel_cache": "false"}  # so that each read is seen


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


def read_replication(path: Path) -> Replication:
    return Replication.from_json(read_json(path, str(path)), str(path))


# ---- one replication


def test_the_file_follows_its_schema_and_is_in_its_place(both: SimpleNamespace) -> None:
    one = read_replication(both.path)
    assert one.run.status == "unscored"
    scores = one.curve.test_top1
    assert len(scores) == EPOCHS
    assert one.curve.count == COUNTS["test"]
    assert (one.best_test, one.final) == (max(scores), scores[-1])
    assert scores[one.best_epoch - 1] == one.best_test
    data = json.loads(both.path.read_text())
    assert data["schema"] == SCHEMA
    assert data["status"] == "complete"
    assert not {"metrics", "correct", "kind"} & set(data)
    assert set(data["times"]) == {"train_seconds", "test_seconds"}
    assert one.text() == both.path.read_text()
    assert f"Replication (complete): results/replications/{TASK}/{both.path.name}" in both.peeking.out
    assert f"claims {one.tax:.2f} points more" in both.peeking.out
    assert any("tables refuse" in notice for notice in both.peeking.notices)


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
    assert curve == pytest.approx([value / 100 for value in one.curve.test_top1])
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
    lends = f"{_TestEachEpochData.__module__}.{_TestEachEpochData.__qualname__}"
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
    naming = {path.name for path in package.rglob("*.py") if "_TestEachEpochData" in path.read_text(encoding="utf-8")}
    assert naming == {"replicate.py"}
    callers = {path.name for path in package.rglob("*.py") if "train.replicate" in path.read_text(encoding="utf-8")}
    assert callers == {"reproduce.py"}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--data.stage", "select"), "replicate takes no --data.stage select"),
        (("--resume",), "replicate takes no --resume"),
        (("--no_test",), "replicate takes no --no_test"),
        (("--ckpt_path", "x.ckpt"), "replicate takes no --ckpt_path"),
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
        (("--trainer.check_val_every_n_epoch", "2"), "the test split was not read after each epoch"),
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
    assert f"truncated: {reason} ({one.run.run_id})" in table


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
    return Replication(dataclasses.replace(run_of, epochs=len(curve)), Curve(20, curve))


def test_a_replication_comes_back_and_is_never_overwritten(tmp_path: Path) -> None:
    one = drawn()
    path = write_replication(one, tmp_path)
    assert path == one.path(tmp_path)
    assert read_replication(path) == one
    assert (one.best_test, one.best_epoch, one.final, one.tax) == (60.0, 2, 55.0, 5.0)
    with pytest.raises(RecordError, match="exists already"):
        write_replication(one, tmp_path)
    with pytest.raises(RecordError, match="is not a replication"):
        Replication.from_json(make_record().to_json())


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("schema", 1, "is not a replication"),
        ("surprise", 1, "unknown record key 'surprise'"),
        ("metrics", {}, "'metrics' is {}, not None"),
        ("count", None, "the key 'count' is missing"),
        ("seed", None, "the key 'seed' is missing"),
        ("count", 0, "'count' must be"),
        ("count", True, "'count' must be"),
        ("test_top1", [], "'test_top1' must be"),
        ("test_top1", [50.0, 120.0, 55.0], "'test_top1"),
        ("test_top1", [50.0, "x", 55.0], "'test_top1[1]' must be"),
        ("test_top1", [50.0, 52.0, 55.0], "'best_epoch' is 2, not 3"),
        ("test_top1", [60.0, 52.0, 55.0], "'best_epoch' is 2, not 1"),
        ("test_top1", [52.0, 60.0, 55.0], "'test_top1' is not a share of 20 images"),
        ("test_top1", [50.0, 60.0], "'test_top1' has 2 scores of 3 epochs of 3"),
        ("best_test", 65.0, "'best_test' is 65.0, not 60.0"),
        ("best_epoch", 0, "'best_epoch' is 0, not 2"),
        ("final", 60.0, "'final' is 60.0, not 55.0"),
        ("status", "unscored", "'status' is 'unscored', not 'complete'"),
        ("epochs", 2, "'test_top1' has 3 scores of 2 epochs of 3"),
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
    with pytest.raises(RecordError, match=re.escape(expected)):
        read_replication(path)
    found, (problem,) = read_replications(tmp_path)
    assert found == []
    assert expected in problem.reason


# ---- the table of the tax


def rows(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def numbers_of(root: Path) -> str:
    return tax_path(load_suite("vtab"), root).read_text(encoding="utf-8")


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
    (text,) = run_tax(tmp_path)
    assert "No number here is a result, and none compares with a leaderboard" in " ".join(text.split())
    lines = {row["scope"]: row for row in rows(numbers_of(tmp_path))}
    assert {row["not_a_result"] for row in lines.values()} == {"picked on the test split"}
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
    assert float(lines["mean of 4/19 tasks"]["tax"]) == pytest.approx(statistics.fmean(means))
    shown = [line.split() for line in text.splitlines()]
    assert ["svp", "mean", "of", "4/19", "tasks", "1–2"] in [line[:6] for line in shown]
    assert ["svp", "caltech101", "2", "57.50", "65.00", "2,", "2", "+7.50"] in [line[:8] for line in shown]


def test_equal_files_give_equal_bytes_in_any_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = [*fill(tmp_path / "a"), *fill(tmp_path / "a", "linear", 20)]
    first = run_tax(tmp_path / "a")
    random.Random(1).shuffle(made)
    for one in made:
        write_replication(one, tmp_path / "b")
    second = run_tax(tmp_path / "b")
    assert numbers_of(tmp_path / "a") == numbers_of(tmp_path / "b")
    assert [text.replace("/a/", "/b/") for text in first] == second


def test_what_differs_is_kept_apart_and_the_newest_of_a_seed_counts(tmp_path: Path) -> None:
    write_replication(drawn(number=1), tmp_path)
    write_replication(drawn(curve=(80.0, 70.0, 60.0), number=2), tmp_path)  # the same cell and seed, newer
    write_replication(
        drawn(number=3, data_variant="synthetic", data_status="different", data_digest=OTHER_LIST), tmp_path
    )
    write_replication(drawn(number=4, changes={"model.learning_rate": 0.5}), tmp_path)  # another row
    write_replication(drawn(number=5, checkpoint="none", checkpoint_digest=None), tmp_path)  # another section
    write_replication(drawn(number=6, task_version=9), tmp_path)
    (text,) = run_tax(tmp_path, ["vtab"])
    page, numbers = " ".join(text.split()), numbers_of(tmp_path)
    assert page.index("hub (sha256:abab") < page.index("random weights")
    assert "svp (learning_rate=0.001)" in page
    assert "svp (learning_rate=0.5)" in page
    assert ": superseded: " in page
    assert "run on version 9 of the task card, which is now 1" in page
    assert "caltech101, svp (learning_rate=0.001): also 55.00 (1 seed) on synthetic data" in page
    by_variant = {
        row["data_variant"]: row
        for row in rows(numbers)
        if row["data_variant"] and row["row"] == "svp (learning_rate=0.001)"
    }
    assert float(by_variant["card"]["tax"]) == 20.0
    assert float(by_variant["synthetic"]["tax"]) == 5.0
    assert {row["tax"] for row in rows(numbers) if row["scope"].startswith("mean") and row["row"] != "svp"} >= {
        "20.0000"
    }


def test_nothing_to_show_and_broken_files(tmp_path: Path) -> None:
    assert run_tax(tmp_path) == []
    path = write_replication(drawn(), tmp_path)
    assert "svp" in run_tax(tmp_path)[0]
    path.rename(path.with_name("moved.json"))
    stray = tmp_path / "replications" / "other" / "x.json"
    stray.parent.mkdir(parents=True)
    stray.write_text("{}", encoding="utf-8")
    text, strays = run_tax(tmp_path)
    assert "moved.json: unreadable: is a copy of replications/vtab/caltech101/" in text
    assert "Belong to no suite:\n  replications/other/x.json: is not a replication" in strays
    assert len(numbers_of(tmp_path).splitlines()) == 1
