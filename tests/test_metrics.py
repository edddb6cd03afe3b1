"""The numbers beside top-1: against brute force, scikit-learn and torchmetrics, and through whole runs."""

from __future__ import annotations

import csv
import dataclasses
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from helpers import (
    BACKBONE,
    COUNTS,
    TASK,
    Outcome,
    assert_error,
    command,
    draw,
    read_json,
    register_backbone,
    run,
    settle,
    small,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, log_loss, top_k_accuracy_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

from svp_bench.audit.checks import impossible_scores
from svp_bench.methods.linear import Linear
from svp_bench.records.bits import unpack_bits
from svp_bench.records.record import Metrics, PerClass
from svp_bench.records.store import csv_text
from svp_bench.tasks.cards import displayed_class_names, load_task
from svp_bench.train.metrics import (
    Evaluation,
    ImageScores,
    balanced_accuracy,
    confusion_image,
    describe,
    evaluate,
    expected_calibration_error,
    in_order,
    per_class_accuracy,
    per_class_markdown,
    score_images,
    write_predictions,
    write_tables,
)
from svp_bench.train.module import AdaptationModule

CALLED = displayed_class_names(load_task(TASK))
ABSENT = 100 - COUNTS["test"]  # the drawn test list shows as many classes as it has images


def scores_of(logits: torch.Tensor, labels: torch.Tensor) -> ImageScores:
    return in_order([score_images(logits, labels, torch.arange(len(labels)))])


def drawn(count: int, classes: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Float32 logits without ties, and labels that they often hit."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = 2 * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1.5
    return logits, labels


@st.composite
def cases(draw: Any) -> tuple[torch.Tensor, torch.Tensor, list[list[int]]]:
    """Logits, many of them tied; labels; and the images shared out over batches in any order, some of them empty."""
    count, classes = draw(st.integers(1, 40)), draw(st.integers(1, 12))
    values = st.sampled_from([-2.0, 0.0, 0.5, 3.0, 60.0]) | st.floats(-20, 20, width=32)
    logits = draw(st.lists(st.lists(values, min_size=classes, max_size=classes), min_size=count, max_size=count))
    labels = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    order = draw(st.permutations(range(count)))
    cuts = sorted(draw(st.lists(st.integers(0, count), max_size=6)))
    parts = [order[start:stop] for start, stop in zip([0, *cuts], [*cuts, count], strict=True)]
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(labels), parts


# ---- the functions


@settings(deadline=None, max_examples=60)
@given(cases())
def test_the_numbers_are_those_of_brute_force(case: tuple[torch.Tensor, torch.Tensor, list[list[int]]]) -> None:
    logits, labels, _ = case
    classes = logits.shape[1]
    found = evaluate(scores_of(logits, labels), classes)
    confusion = [[0] * classes for _ in range(classes)]
    top5, losses, bins = 0, [], [[0.0, 0, 0] for _ in range(15)]
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        ranked = sorted(range(classes), key=lambda c: (-row[c], c))  # of equal logits the first class leads
        confusion[label][ranked[0]] += 1
        top5 += label in ranked[:5]
        peak = max(row)
        total = math.fsum(math.exp(value - peak) for value in row)
        losses.append(math.log(total) - (row[label] - peak))
        confidence = 1 / total
        number = next(m for m in range(15) if confidence <= (m + 1) / 15 + 1e-13)
        bins[number][0] += confidence
        bins[number][1] += ranked[0] == label
        bins[number][2] += 1
    assert found.confusion.tolist() == confusion
    right = sum(confusion[c][c] for c in range(classes))
    assert found.top1 == right / len(labels)
    assert int(found.right.sum()) == right
    assert found.top5 == (top5 / len(labels) if classes >= 6 else None)
    assert found.nll == pytest.approx(np.mean(losses), rel=1e-12, abs=1e-12)
    recalls = [confusion[c][c] / sum(confusion[c]) for c in range(classes) if sum(confusion[c])]
    assert found.balanced_accuracy == pytest.approx(np.mean(recalls), rel=1e-12)
    gaps = [n / len(labels) * abs(hits / n - total / n) for total, hits, n in bins if n]
    # a confidence within rounding of an edge, as those of ties are, may fall on either side of it
    edge = torch.tensor([m / 15 for m in range(1, 15)], dtype=torch.float64)
    if (found.scores.confidence[:, None] - edge).abs().min() > 1e-12:
        assert found.ece == pytest.approx(math.fsum(gaps), abs=1e-12)


@settings(deadline=None, max_examples=100)
@given(cases())
def test_batches_and_processes_change_no_bit(case: tuple[torch.Tensor, torch.Tensor, list[list[int]]]) -> None:
    logits, labels, parts = case
    index = torch.arange(len(labels))
    whole = evaluate(scores_of(logits, labels), logits.shape[1])
    shared = [torch.tensor(part, dtype=torch.int64) for part in parts]
    scored = [score_images(logits[part], labels[part], index[part]) for part in shared]
    again = evaluate(in_order(scored), logits.shape[1])
    assert again.scalars() == whole.scalars()
    assert again.for_record() == whole.for_record()
    assert torch.equal(again.scores.index, index)
    assert torch.equal(again.scores.label, labels)
    for column, other in zip(whole.scores, again.scores, strict=True):
        assert torch.equal(column, other)


@pytest.mark.parametrize("batch", [1, 7, 64, 1000])
def test_many_classes_and_images_change_no_bit_either(batch: int) -> None:
    """Sizes at which torch's vectorised kernels have whole vectors and a rest."""
    logits, labels = drawn(1000, 397)
    index = torch.arange(1000)
    parts = [score_images(logits[s : s + batch], labels[s : s + batch], index[s : s + batch]) for s in index[::batch]]
    whole = evaluate(scores_of(logits, labels), 397)
    assert evaluate(in_order(parts[::-1]), 397).for_record() == whole.for_record()


@pytest.mark.parametrize("classes", [2, 5, 6, 30])
def test_the_numbers_are_those_of_scikit_learn_and_torchmetrics(classes: int) -> None:
    logits, labels = drawn(500, classes)
    found = evaluate(scores_of(logits, labels), classes)
    p, y = logits.double().softmax(dim=1), labels.numpy()
    assert found.confusion.tolist() == confusion_matrix(y, p.argmax(dim=1).numpy(), labels=range(classes)).tolist()
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(y, p.argmax(dim=1).numpy()))
    assert found.nll == pytest.approx(log_loss(y, p.numpy(), labels=range(classes)))
    assert found.ece == pytest.approx(float(MulticlassCalibrationError(classes, n_bins=15)(p, labels)), abs=1e-6)
    per_class = MulticlassAccuracy(classes, average=None)(p, labels)
    assert per_class_accuracy(found.confusion) == pytest.approx(per_class.numpy(), abs=1e-6)
    if classes < 6:
        assert found.top5 is None
        assert "top5" not in found.scalars()
    else:
        assert found.top5 == pytest.approx(top_k_accuracy_score(y, p.numpy(), k=5, labels=range(classes)))
        micro = MulticlassAccuracy(classes, top_k=5, average="micro")
        assert found.top5 == pytest.approx(float(micro(p, labels)), abs=1e-6)


def test_of_equal_logits_the_first_class_leads() -> None:
    logits = torch.zeros(8, 8)
    scores = scores_of(logits, torch.arange(8))
    assert scores.prediction.tolist() == [0] * 8 == logits.argmax(dim=1).tolist()
    assert scores.top5.tolist() == [True] * 5 + [False] * 3


def test_a_confidence_on_an_edge_belongs_to_the_bin_below() -> None:
    """Guo et al.: bin m holds ((m - 1) / M, m / M]; a confidence of 1 is in the last."""
    edges = np.arange(1, 16) / 15
    right = np.zeros(15, dtype=np.bool_)
    assert expected_calibration_error(edges, right) == pytest.approx(edges.mean())
    # on the edge with 0.9/15 below: the hit of one makes up for the other only if they share a bin
    pair = np.array([1.9 / 15, 2 / 15])
    assert expected_calibration_error(pair, np.array([True, False])) == pytest.approx(abs(1 - 3.9 / 15) / 2)
    apart = np.array([2 / 15, 2.1 / 15])
    expected = ((1 - 2 / 15) + 2.1 / 15) / 2
    assert expected_calibration_error(apart, np.array([True, False])) == pytest.approx(expected)
    assert expected_calibration_error(np.array([1.0]), np.array([True])) == 0
    assert expected_calibration_error(np.array([1.0]), np.array([False])) == 1
    assert math.isnan(expected_calibration_error(np.zeros(0), np.zeros(0, dtype=np.bool_)))


def test_a_class_without_images_is_nan_and_left_out_of_the_mean() -> None:
    labels = torch.tensor([0, 0, 2, 2])
    logits = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    found = evaluate(scores_of(logits, labels), 3)
    assert per_class_accuracy(found.confusion).tolist() == pytest.approx([0.5, math.nan, 1.0], nan_ok=True)
    assert found.balanced_accuracy == 0.75 == balanced_accuracy(found.confusion)
    record = found.for_record()
    assert record.per_class == PerClass(correct=(1, 0, 2), count=(2, 0, 2))
    assert "balanced accuracy 75.00 % (without 1 class that test does not show)" in describe(record, "test")
    assert math.isnan(balanced_accuracy(np.zeros((3, 3), dtype=np.int64)))


def test_one_class_only() -> None:
    found = evaluate(scores_of(torch.tensor([[3.0], [-1.0]]), torch.zeros(2, dtype=torch.int64)), 1)
    assert found.scalars() == {"top1": 1, "balanced_accuracy": 1, "loss": 0, "nll": 0, "ece": 0}
    assert found.confusion.tolist() == [[2]]


def test_a_task_of_one_class_trains() -> None:
    register_backbone()
    adapted = AdaptationModule(Linear(), BACKBONE, "none", num_classes=1, image_size=32, scan_backend="reference")
    logits = adapted(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    assert logits.shape == (2, 1)
    assert adapted.train_top1(logits, torch.zeros(2, dtype=torch.int64)) == 1


@pytest.mark.parametrize("classes", [2, 3, 100])
def test_the_accuracy_of_training_is_that_of_the_first_of_the_largest_logits(classes: int) -> None:
    register_backbone()
    adapted = AdaptationModule(Linear(), BACKBONE, "none", num_classes=classes, image_size=32)
    logits, labels = drawn(50, classes)
    for start in (0, 30):
        adapted.train_top1(logits[start : start + 30], labels[start : start + 30])
    assert float(adapted.train_top1.compute()) == pytest.approx(evaluate(scores_of(logits, labels), classes).top1)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_logit_that_is_not_finite_shows_in_the_loss(bad: float) -> None:
    logits = torch.tensor([[bad, 0.0], [1.0, 0.0]])
    loss = scores_of(logits, torch.tensor([0, 0])).loss
    assert torch.isfinite(loss).tolist() == [False, True]


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="no images were scored"):
        in_order([])
    nothing = score_images(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(ValueError, match="no images were scored"):
        evaluate(nothing, 3)
    with pytest.raises(RuntimeError):  # labels were checked when they were read
        evaluate(scores_of(torch.zeros(2, 3), torch.tensor([0, 2])), 2)


# ---- for people


def test_the_line_says_what_the_record_holds() -> None:
    full = Metrics(70.0, 0.5, 7, 10, top5=90.0, balanced_accuracy=68.256, nll=0.5, ece=4.5)
    assert describe(full, "test") == (
        "top-1 70.00 % on test (7 of 10), top-5 90.00 %, balanced accuracy 68.26 %, ECE 4.50 %"
    )
    assert "top-5" not in describe(dataclasses.replace(full, top5=None), "test")
    assert describe(Metrics(70.0, 0.5, 7, 10), "val") == "top-1 70.00 % on val (7 of 10)"


@pytest.fixture
def three() -> Evaluation:
    labels = torch.tensor([0, 0, 0, 2])
    return evaluate(scores_of(torch.eye(3)[torch.tensor([0, 0, 1, 1])], labels), 3)


NAMES = ["cat", "grüße, 猫 | x", "ant"]


def test_the_csv_files_hold_the_counts_and_the_names(three: Evaluation, tmp_path: Path) -> None:
    confusion, per_class = write_tables(three, NAMES, tmp_path / "run", "test")
    assert (confusion.name, per_class.name) == ("test_confusion.csv", "test_per_class.csv")
    with open(confusion, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["true/predicted", *NAMES],
            [NAMES[0], "2", "1", "0"],
            [NAMES[1], "0", "0", "0"],
            [NAMES[2], "0", "1", "0"],
        ]
    with open(per_class, encoding="utf-8", newline="") as file:
        assert list(csv.reader(file)) == [
            ["class", "name", "count", "correct", "accuracy"],
            ["0", NAMES[0], "3", "2", "66.6667"],
            ["1", NAMES[1], "0", "0", "nan"],
            ["2", NAMES[2], "1", "0", "0.0000"],
        ]


def test_each_image_is_in_the_predictions(three: Evaluation, tmp_path: Path) -> None:
    names = ["=1+1", "grüße, 猫", "a\x1b[31m\nb"]
    path = write_predictions(three, ["x/1.jpg", "@SUM(A1)", "-2", "c\td"], names, tmp_path / "run", "test")
    assert path == tmp_path / "run" / "test_predictions.csv"
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == [
        *("index", "image", "label", "label_name", "prediction", "prediction_name", "confidence", "correct")
    ]
    assert [row["image"] for row in rows] == ["x/1.jpg", "'@SUM(A1)", "'-2", "c\\td"]
    assert [row["label_name"] for row in rows] == ["'=1+1"] * 3 + ["a\\x1b[31m\\nb"]
    assert [int(row["correct"]) for row in rows] == three.right.astype(int).tolist()
    assert [float(row["confidence"]) for row in rows] == pytest.approx(three.scores.confidence.tolist(), abs=1e-6)
    confusion, per_class = write_tables(three, names, tmp_path / "run", "test")
    assert "\n=1" not in confusion.read_text() + per_class.read_text().replace("0,", "\n")


@given(st.data())
def test_no_bound_of_an_audit_excludes_what_a_model_can_give(data: st.DataObject) -> None:
    classes, count = data.draw(st.integers(2, 9)), data.draw(st.integers(1, 12))
    logit = st.one_of(st.sampled_from([0.0, 1.0, -1.0, 40.0]), st.floats(-50, 50, width=32))
    rows = data.draw(st.lists(st.lists(logit, min_size=classes, max_size=classes), min_size=count, max_size=count))
    labels = data.draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    scores = score_images(torch.tensor(rows), torch.tensor(labels), torch.arange(count))
    assert impossible_scores(evaluate(scores, classes).for_record()) == []


@given(st.text(st.characters(codec="utf-8"), max_size=12))
def test_no_name_is_a_formula_or_a_second_row(name: str) -> None:
    cell = csv_text(name)
    assert not cell.lstrip().startswith(("=", "+", "-", "@"))
    (row,) = csv.reader([cell.replace('"', '""').join('""')])
    assert row == [cell]


@pytest.mark.parametrize(("stage", "role"), [("final", "test"), ("select", "val")])
def test_a_run_says_which_images_were_wrong(place: Path, stage: str, role: str) -> None:
    outcome = run(*small("--method", "linear", "--data.stage", stage))
    path = outcome.folder / f"{role}_predictions.csv"
    assert str(path) in outcome.out
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    record = outcome.record
    assert [int(row["index"]) for row in rows] == list(range(record["metrics"]["count"]))
    assert sum(int(row["correct"]) for row in rows) == record["metrics"]["correct"]
    assert all((Path("data/cifar") / row["image"]).is_file() for row in rows)
    if stage == "final":
        bits = unpack_bits(record["correct"]["bits"], len(rows)).astype(int).tolist()
        assert [int(row["correct"]) for row in rows] == bits


def test_the_text_names_each_class(three: Evaluation) -> None:
    assert per_class_markdown(three, NAMES).splitlines()[2:] == [
        "| 0 | cat | 3 | 2 | 66.67 % |",
        "| 1 | grüße, 猫 \\| x | 0 | 0 | no images |",
        "| 2 | ant | 1 | 0 | 0.00 % |",
    ]


def test_the_image_shows_shares_of_rows(three: Evaluation) -> None:
    image = confusion_image(three.confusion, NAMES)
    assert image.dtype == np.uint8
    cell = 48
    dark = np.argwhere((image == 0).all(axis=2))  # the frame: the only black line as long as the matrix
    rows, columns = np.bincount(dark[:, 0]), np.bincount(dark[:, 1])
    top, left = (int(np.argmax(lines > 3 * cell)) + 1 for lines in (rows, columns))
    shown = image[top + cell // 2 : top + 3 * cell : cell, left + cell // 2 : left + 3 * cell : cell].astype(int)
    white, blue, grey = np.array([255, 255, 255]), np.array([8, 48, 107]), np.array([224, 224, 224])
    expected = [[(white + 2 * blue) / 3, (2 * white + blue) / 3, white], [grey] * 3, [white, blue, white]]
    assert np.abs(shown - np.array(expected)).max() <= 1
    # names: ink left of the matrix beside each row, none without names
    for row in range(3):
        assert (image[top + row * cell : top + (row + 1) * cell, : left - 2] < 128).any()


@pytest.mark.parametrize("classes", [1, 2, 50, 51, 397])
def test_up_to_fifty_classes_are_labelled(classes: int) -> None:
    confusion = np.eye(classes, dtype=np.int64)
    named = confusion_image(confusion, [f"a class called {label}" for label in range(classes)])
    other = confusion_image(confusion, [f"another one named {label}" for label in range(classes)])
    assert (named.shape != other.shape or (named != other).any()) == (classes <= 50)
    assert max(named.shape) < 1100


@settings(deadline=None, max_examples=30)
@given(st.lists(st.text(min_size=1), min_size=2, max_size=3))
def test_any_name_can_be_drawn(names: list[str]) -> None:
    image = confusion_image(np.eye(len(names), dtype=np.int64), names)
    assert image.shape[2] == 3


# ---- whole runs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return settle(tmp_path, monkeypatch)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder)).Reload()


def check_run(outcome: Outcome, role: str, list_name: str, names: list[str]) -> None:
    """Check that line, record, TensorBoard and CSV files of a run say the same."""
    metrics = outcome.record["metrics"]
    keys = {"top1", "loss", "correct", "count", "top5", "balanced_accuracy", "nll", "ece", "per_class"}
    assert set(metrics) == keys
    (shown,) = (text for text in outcome.out.splitlines() if text.startswith("top-1 "))
    assert shown.startswith(f"top-1 {metrics['top1']:.2f} % on {list_name} (")
    assert f", top-5 {metrics['top5']:.2f} %, balanced accuracy {metrics['balanced_accuracy']:.2f} % (without " in shown
    assert shown.endswith(f", ECE {metrics['ece']:.2f} %")

    board = events(outcome.folder)
    for name, factor in (("top1", 100), ("top5", 100), ("balanced_accuracy", 100), ("ece", 100), ("nll", 1)):
        assert board.Scalars(f"{role}/{name}")[-1].value * factor == pytest.approx(metrics[name], rel=1e-5), name
    assert [len(board.Images(tag)) for tag in board.Tags()["images"]] == [1]
    assert board.Tags()["images"] == [f"{role}/confusion"]
    (text,) = board.Tensors(f"{role}/per_class/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert [name for name in names if name not in shown] == []

    with open(outcome.folder / f"{role}_per_class.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == names
    assert [int(row["correct"]) for row in rows] == metrics["per_class"]["correct"]
    assert [int(row["count"]) for row in rows] == metrics["per_class"]["count"]
    matrix = np.genfromtxt(outcome.folder / f"{role}_confusion.csv", delimiter=",", skip_header=1)[:, 1:]
    assert matrix.diagonal().tolist() == metrics["per_class"]["correct"]
    assert matrix.sum(axis=1).tolist() == metrics["per_class"]["count"]
    assert str(outcome.folder / f"{role}_confusion.csv") in outcome.out


def test_a_final_run_reports_the_test_list(place: Path) -> None:
    outcome = run(*small("--method", "linear"))
    check_run(outcome, "test", "test", CALLED)
    assert f"(without {ABSENT} classes that test does not show)" in outcome.out


def test_a_selection_reports_the_last_validation(place: Path) -> None:
    outcome = run(*small("--method", "linear", data__stage="select", trainer__max_epochs="2"))
    check_run(outcome, "val", "val200", CALLED)
    assert len(events(outcome.folder).Scalars("val/top5")) == 2


def test_a_task_of_few_classes_has_no_top5(place: Path) -> None:
    task = "vtab/patch_camelyon"
    draw(place / "data", task)
    outcome = run(*small("--method", "linear", config=f"configs/{task}.yaml"))
    metrics = outcome.record["metrics"]
    assert metrics["per_class"]["count"] == [5, 4]
    assert "top5" not in metrics
    assert "top-5" not in outcome.out
    assert "test/top5" not in events(outcome.folder).Tags()["scalars"]


def test_the_names_of_the_card_stand_everywhere(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"thing no. {label}" for label in range(100)]
    monkeypatch.setattr("svp_bench.tasks.cards.class_names", lambda card: names)
    outcome = run(*small("--method", "linear"))
    check_run(outcome, "test", "test", names)
    checkpoint = str(outcome.folder / "checkpoints/last.ckpt")
    image = str(next((place / "data/cifar/images/test").iterdir()))
    (row,) = csv.DictReader(run("predict", "--ckpt", checkpoint, "--images", image).out.splitlines())
    assert row["name1"] == f"thing no. {row['class1']}"


def test_predict_numbers_the_classes_of_a_card_without_names(place: Path) -> None:
    card = Path("cards/mine/eurosat.yaml")
    card.parent.mkdir(parents=True)
    Path("cards/mine.yaml").write_text(
        "name: mine\nversion: 1\ntitle: Mine\ntable: mine\nfolder: mine\nprotocol: vtab-final\n"
        "reader: {kind: split_files}\ngroups:\n  all: [eurosat]\ncitation: me2026\n"
    )
    text = load_task("vtab/eurosat").path.read_text().replace("vtab/eurosat", "mine/eurosat")
    text = text.replace("group: specialized", "group: all")
    card.write_text(re.sub(r"^class_names: .*\n", "", text, flags=re.M))
    draw(place / "data", "vtab/eurosat")
    outcome = run(*small("--method", "linear", "--data.task", str(card), config="configs/vtab/eurosat.yaml"))
    checkpoint = str(outcome.folder / "checkpoints/last.ckpt")
    image = str(next((place / "data/eurosat/images/test").iterdir()))
    (row,) = csv.DictReader(run("predict", "--ckpt", checkpoint, "--images", image).out.splitlines())
    assert row["name1"] == f"class {row['class1']}"


def test_a_run_tested_later_gets_its_tables_then(place: Path) -> None:
    outcome = run(*small("--method", "linear", "--no_test"))
    tables = [outcome.folder / f"test_{name}.csv" for name in ("confusion", "per_class", "predictions")]
    assert not any(path.exists() for path in tables)
    config, checkpoint = str(outcome.folder / "config.yaml"), str(outcome.folder / "checkpoints/last.ckpt")
    tested = run("test", "--config", config, "--ckpt_path", checkpoint)
    assert all(path.is_file() and str(path) in tested.out for path in tables)
    assert set(outcome.record["metrics"]) >= {"top5", "balanced_accuracy", "nll", "ece", "per_class"}
    assert ", top-5 " in tested.out


def test_a_run_that_goes_on_after_its_last_epoch_is_validated_then(place: Path) -> None:
    """Killed between its last checkpoint and its record, it has nothing left to train."""
    given = small("--method", "linear", data__stage="select")
    before = run(*given)
    metrics = before.record["metrics"]
    before.record_path.unlink()
    after = run(*given, "--resume")
    assert after.record["run_id"] == before.folder.name
    assert after.record["metrics"] == metrics


def test_the_batch_size_of_an_evaluation_changes_nothing(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a model whose logits do not depend on the batch: each image goes through it alone."""
    forward = AdaptationModule.forward
    one_by_one = lambda self, images: torch.cat([forward(self, image[None]) for image in images])  # noqa: E731
    monkeypatch.setattr(AdaptationModule, "forward", one_by_one)
    records = [run(*small("--method", "linear", data__eval_batch_size=size)).record for size in ("1", "4", "9")]
    assert records[0]["metrics"] == records[1]["metrics"] == records[2]["metrics"]
    assert records[0]["correct"] == records[1]["correct"] == records[2]["correct"]


def test_a_val_loss_that_is_not_finite_ends_the_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AdaptationModule, "forward", lambda self, images: torch.full((len(images), 100), math.nan))
    outcome = command(*small("--method", "linear", data__stage="select"))
    assert "the loss on the val list is not finite" in assert_error(outcome, 1)


def test_a_malformed_file_of_names_stops_a_run_before_training(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from svp_bench.core.errors import CardError

    def fail(card: Any) -> list[str]:
        raise CardError("names.txt:3: empty line; write one class name a line")

    monkeypatch.setattr("svp_bench.tasks.cards.class_names", fail)
    assert "names.txt:3: empty line" in assert_error(command(*small()), 1)
    assert not (place / "runs").exists()


def test_an_evaluation_without_images_logs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = AdaptationModule.__new__(AdaptationModule)
    torch.nn.Module.__init__(bare)
    bare._scored, bare.validated, bare.tested, bare.num_classes = [], None, None, 3
    monkeypatch.setattr(AdaptationModule, "trainer", SimpleNamespace(world_size=1, sanity_checking=False))
    monkeypatch.setattr(AdaptationModule, "log", None)
    bare.on_validation_epoch_end()
    bare.on_test_epoch_end()
    assert bare.validated is None
    assert bare.tested is None


DRIVER = """
import sys
from pathlib import Path
from helpers import register_backbone, small
from svp_bench.cli.main import main
if __name__ == "__main__":
    register_backbone()
    sys.exit(main(small(*sys.argv[1:])))
"""


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["final", "select"])
def test_two_processes_score_each_image_once(stage: str, place: Path) -> None:
    """Nine (or five) images on two processes: the parts are uneven."""
    (place / "driver.py").write_text(DRIVER)
    script = [sys.executable, "driver.py", "--method", "linear", "--data.stage", stage, "--data.batch_size", "6"]
    two = ["--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.strategy", "ddp"]
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    found: list[dict[str, Any]] = []
    for extra in ([], two):
        root = f"results{len(extra)}"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("SVP_BENCH")} | {"PYTHONPATH": here}
        done = subprocess.run(
            [*script, *extra, "--results_root", root], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("Confusion matrix: ") == 1
        assert "sync_dist" not in done.stderr
        (path,) = Path(root).rglob("*.json")
        found.append(read_json(path))
        role = "test" if stage == "final" else "val"
        (written,) = Path("runs").rglob(f"{found[-1]['run_id']}/{role}_predictions.csv")
        with open(written, encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        assert [int(row["index"]) for row in rows] == list(range(found[-1]["metrics"]["count"]))
        assert sum(int(row["correct"]) for row in rows) == found[-1]["metrics"]["correct"]
    one, both = found
    assert (one["device_count"], both["device_count"]) == (1, 2)
    assert both["metrics"]["per_class"] == one["metrics"]["per_class"]
    assert both["correct"] == one["correct"]
    for name in ("top1", "top5", "balanced_accuracy", "count"):
        assert both["metrics"][name] == one["metrics"][name], name
    for name in ("nll", "ece"):
        assert both["metrics"][name] == pytest.approx(one["metrics"][name], rel=1e-4), name
