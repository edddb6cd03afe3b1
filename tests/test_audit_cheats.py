"""`svp-bench audit`: records that were edited, run again, copied, or made by other code than they state."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
from helpers import run
from synthetic_records import LIST, OTHER_LIST, unscored
from test_audit import RATE, TASK, edited, failures, lines, record, searched, selection

from svp_bench.audit import checks
from svp_bench.audit.checks import impossible_scores
from svp_bench.audit.record import audit
from svp_bench.records.digests import card_digest
from svp_bench.records.record import Metrics, Parameters, PerClass, Record
from svp_bench.records.selection import SelectedConfig
from svp_bench.records.selection_rule import choose
from svp_bench.records.store import write_record
from svp_bench.tasks.cards import load_protocol, load_task

SCORED = Metrics(
    top1=70.0,
    loss=0.9,
    correct=70,
    count=100,
    top5=95.0,
    balanced_accuracy=70.0,
    nll=0.9,
    ece=10.0,
    per_class=PerClass((7,) * 10, (10,) * 10),
)


# ---- impossible scores


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"loss": 0.2}, "30 of 100 images are wrong, each with a loss of ln 2 or more"),
        ({"loss": 0.2, "top5": None}, "the least possible is 0.207944"),
        ({"loss": 0.25}, "the least possible is 0.262875"),  # 5 of 100 are not among the first five: ln 6 each
        ({"loss": -0.1, "top5": None, "ece": None}, "the loss is -0.1"),
        ({"ece": 70.0}, "a calibration error of 70.0 % needs as much"),
        ({"ece": 94.0, "loss": 9.0}, "ece is 94.0, and top1 70.00 allows 0 to 93"),
        ({"top1": 5.0, "correct": 5, "ece": 1.0, "loss": 3.0}, "ece is 1.0, and top1 5.00 allows 5 to"),
        ({"top1": 100.0, "correct": 100, "loss": 2.5}, "at most ln 10 if every image is right"),
        ({"top1": 100.0, "correct": 100, "loss": 0.1}, "balanced_accuracy is 70.0, and 100 of 100 images are right"),
        ({"balanced_accuracy": 100.0}, "balanced_accuracy is 100.0, and 70 of 100 images are right"),
        ({"per_class": PerClass((35, 35), (50, 50))}, "top5 is 95.0, and all of 2 classes are among the first five"),
    ],
)
def test_scores_that_no_model_can_have_are_named(changes: dict[str, Any], expected: str) -> None:
    assert impossible_scores(SCORED) == []
    assert any(expected in problem for problem in impossible_scores(dataclasses.replace(SCORED, **changes)))


def test_a_loss_that_cannot_be_fails_the_record(tmp_path: Path) -> None:
    path = write_record(record(5000), tmp_path)
    assert lines(path)["scores"][0][0] == "pass"
    edited(path, metrics__loss=0.1)
    (text,) = failures(path)
    assert text.startswith("scores: the loss is 0.1, and the least possible is 0.12")


def test_a_card_tells_the_classes_where_the_record_does_not() -> None:
    few = dataclasses.replace(SCORED, per_class=None)
    assert impossible_scores(few) == []
    assert impossible_scores(few, 4) == ["top5 is 95.0, and all of 4 classes are among the first five"]


def test_an_unscored_run_has_the_epochs_of_its_config_too(tmp_path: Path) -> None:
    path = write_record(unscored(record(epochs=99)), tmp_path)
    assert any("unscored after 99 epochs, and its config asks for 100" in text for text in failures(path))


# ---- what all seeds of a cell share


def test_seeds_of_a_cell_have_the_same_parameters(tmp_path: Path) -> None:
    more = Parameters(trainable=4_760_001, head=3_000, adapter=4_757_001, total=30_000_001)
    paths = [write_record(record(), tmp_path), write_record(record(5001, seed=1, parameters=more), tmp_path)]
    for path, other in zip(paths, reversed(paths), strict=True):
        (text,) = failures(path)
        assert text.startswith(f"alike: {other.stem}, of the same cell, has other parameters: ")
        assert "4760001 of 30000001" in text
        assert "4760000 of 30000000" in text


def test_a_list_has_the_same_images_of_each_class_in_every_record(tmp_path: Path) -> None:
    classes = load_task(TASK).classes
    paths = []
    for seed, shift in ((0, 0), (1, 1)):
        made = record(5000 + seed, seed=seed)
        assert made.metrics is not None
        spread, rest = divmod(made.metrics.count, classes)
        count = [spread + (label < rest) for label in range(classes)]
        count[0], count[1] = count[0] + shift, count[1] - shift
        right, left = [], made.metrics.correct
        for one in count:
            right.append(min(one, left))
            left -= right[-1]
        metrics = dataclasses.replace(made.metrics, per_class=PerClass(tuple(right), tuple(count)))
        paths.append(write_record(dataclasses.replace(made, metrics=metrics), tmp_path))
    (text,) = failures(paths[0])
    assert text.startswith(f"alike: {paths[1].stem} scored the same split")


# ---- a seed run again


def test_one_seed_run_again_on_other_code_fails_while_others_count_from_the_old(tmp_path: Path) -> None:
    old = [write_record(record(5000 + seed, seed=seed), tmp_path) for seed in (0, 1)]
    again = write_record(record(5200, clock="13:00:00", commit="f" * 40), tmp_path)
    for path in (old[0], again):
        (text,) = failures(path)
        assert "on other code" in text
        assert "run again alone: seed 1 of this cell still count from other code" in text
    assert failures(old[1]) == []
    write_record(record(5201, clock="13:00:00", commit="f" * 40, seed=1), tmp_path)  # all of the cell anew
    assert failures(again) == []


def test_another_commit_with_the_same_files_is_the_same_code(tmp_path: Path) -> None:
    write_record(record(5000, package_digest=LIST, weights_digest=LIST), tmp_path)
    other = {"package_digest": LIST, "weights_digest": OTHER_LIST}
    again = write_record(record(5200, clock="13:00:00", commit="f" * 40, **other), tmp_path)
    (text,) = failures(again)
    assert "a second draw of one seed on the same code" in text


def test_all_runs_of_a_cell_and_seed_are_counted(tmp_path: Path) -> None:
    for number in range(3):
        path = write_record(record(5000 + number, clock=f"1{number}:00:00", commit=str(number) * 40), tmp_path)
    assert ("note", "3 complete runs of this cell and seed are here; the newest counts in tables") in lines(path)[
        "repeated"
    ]


# ---- run ids


def test_two_runs_of_one_name_are_seen_wherever_they_lie(tmp_path: Path) -> None:
    first = write_record(record(), tmp_path / "a" / "b")
    made = record(5100, created="2025-01-31T15:00:00+00:00", checkpoint_digest=OTHER_LIST)
    second = write_record(dataclasses.replace(made, run_id=first.stem), tmp_path / "c")
    (earlier, later) = sorted(audit([tmp_path / "a", tmp_path / "c"]).audits, key=lambda one: str(one.path))
    assert earlier.failures == ()
    assert ("note", "run id") in {(finding.verdict, finding.subject) for finding in earlier.findings}
    (failure,) = later.failures
    assert failure.subject == "run id"
    assert str(first) in failure.text
    assert "checkpoint_digest, created" in failure.text
    assert audit([tmp_path]).failed  # the folder above both
    assert not audit([second]).failed


def test_a_copy_of_a_record_is_a_note(tmp_path: Path) -> None:
    write_record(record(), tmp_path / "results")
    shutil.copytree(tmp_path / "results", tmp_path / "backup")
    report = audit([tmp_path / "results", tmp_path / "backup"])
    assert not report.failed
    assert {f.text for one in report.audits for f in one.findings if f.subject == "run id"} == {
        f"{tmp_path / folder / 'records' / TASK / record().run_id}.json is a copy of this record"
        for folder in ("results", "backup")
    }


def test_two_trials_are_not_one_run(tmp_path: Path) -> None:
    def twist(selected: SelectedConfig) -> SelectedConfig:
        trials = list(selected.trials)
        trials[2] = dataclasses.replace(trials[2], run_ids=trials[0].run_ids)
        return dataclasses.replace(selected, trials=tuple(trials))

    path = searched(tmp_path, twist=twist)
    assert any(text.startswith("trials: 2 trials are one run, svp-") for text in failures(path))


def test_a_method_that_was_edited_after_its_search_was_not_searched(tmp_path: Path) -> None:
    path = edited(searched(tmp_path), method_source={"mine.py": LIST})
    (text,) = (text for text in failures(path) if text.startswith("selection: "))
    assert "method_source.mine.py = None" in text
    assert LIST in text


# ---- trials that failed


def failing(selected: SelectedConfig) -> SelectedConfig:
    trials = (*selected.trials[:-1], dataclasses.replace(selected.trials[-1], status="failed: nan", scores=()))
    _, error, reason = choose(trials, selected.count)
    return dataclasses.replace(selected, trials=trials, standard_error=error, reason=reason)


def test_a_failed_trial_is_no_setting_that_was_tried(tmp_path: Path) -> None:
    for rate, top1 in ((1e-3, 60.0), (3e-3, 75.0)):
        write_record(selection(rate, top1), tmp_path)
    write_record(unscored(selection(1e-2, 20.0), "failed", "nan"), tmp_path)
    path = searched(tmp_path, twist=failing, records=False)
    found = lines(path)
    assert failures(path) == []
    assert "2 settings tried on val200" in found["track"][0][1]
    assert any(verdict == "note" and "1 of 3 trials failed: 2 settings" in text for verdict, text in found["trials"])
    assert record_of(path).to_json()["search"]["trials"] == 2
    edited(path, search__trials=3)
    assert any("the trials of the selected config is 2" in text for text in failures(path))


def record_of(path: Path) -> Record:
    (one,) = audit([path]).audits
    assert one.record is not None
    return one.record


# ---- code and cards


def test_equal_commits_ran_equal_files(tmp_path: Path) -> None:
    digests = [{"package_digest": digest, "weights_digest": digest} for digest in (LIST, OTHER_LIST)]
    first = write_record(record(**digests[0]), tmp_path)
    write_record(record(5001, seed=1, **digests[1]), tmp_path)
    (text,) = failures(first)
    assert text.startswith("code: svp-")
    assert f"states the same commit {record().commit}, and other files of the package" in text


def test_the_files_are_those_of_the_commit_where_git_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(record(package_digest=LIST, weights_digest=LIST), tmp_path)
    assert failures(path) == []
    monkeypatch.setattr(checks, "package_digest_at", lambda commit: OTHER_LIST)
    (text,) = failures(path)
    assert "code was changed without git showing it" in text
    monkeypatch.setattr(checks, "package_digest_at", lambda commit: LIST)
    assert failures(path) == []


def test_a_record_that_lost_the_digest_of_its_weights_fails(tmp_path: Path) -> None:
    path = write_record(record(package_digest=LIST, weights_digest=LIST), tmp_path)
    assert failures(path) == []
    text = path.read_text(encoding="utf-8").replace(f'  "weights_digest": "{LIST}",\n', "")
    path.write_text(text, encoding="utf-8")
    (line,) = failures(path)
    assert line.startswith("weights: weights_digest is missing")


@pytest.mark.parametrize("kind", ["task", "protocol"])
def test_a_card_edited_without_a_new_version_fails(tmp_path: Path, kind: str) -> None:
    cards = {"task": card_digest(load_task(TASK)), "protocol": card_digest(load_protocol("vtab-final"))}
    path = write_record(record(card_digests=cards), tmp_path)
    assert failures(path) == []
    edited(path, card_digests={**cards, kind: LIST})
    (text,) = failures(path)
    assert text.startswith(f"protocol: the {kind} card ")
    assert "changed without a new version" in text


def test_titles_and_notes_of_a_card_change_no_digest() -> None:
    card = load_task(TASK)
    other = dataclasses.replace(card, title="Other", notes="other", licence="other", path=Path("elsewhere"))
    assert card_digest(other) == card_digest(card)
    for change in ({"classes": 3}, {"counts": {"train": 1}}, {"version": 9}, {"digest": LIST}):
        assert card_digest(dataclasses.replace(card, **change)) != card_digest(card)
    protocol = load_protocol("vtab-final")
    assert card_digest(dataclasses.replace(protocol, image_size=7)) != card_digest(protocol)


def test_external_classes_and_conversions_are_notes(tmp_path: Path) -> None:
    stated: dict[str, Any] = {
        "external_classes": ["mine.Logger"],
        "checkpoint_load": {"resized": ["pos_embed 14x14 -> 4x16"]},
        "image_notes": {"skipped: .svg": 3},
    }
    path = write_record(record(**stated), tmp_path)
    assert failures(path) == []
    found = lines(path)
    assert found["comparable"][0][0] == "note"
    assert "mine.Logger" in found["comparable"][0][1]
    assert ("note", "resized while loading: pos_embed 14x14 -> 4x16") in found["weights"]
    assert ("note", "images that were skipped or converted: skipped: .svg (3)") in found["data"]
    edited(path, not_comparable=["weights were averaged"])
    assert failures(path) == ["comparable: weights were averaged; tables leave the run out"]


def test_a_table_explains_why_rows_of_one_setting_are_separate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, digest in enumerate((LIST, OTHER_LIST)):
        write_record(record(5000 + seed, seed=seed, method_source={"mine.py": digest}), tmp_path)
    monkeypatch.chdir(tmp_path)
    out = run("table", "--results_root", ".").out
    assert "1/19      1" in out
    page = " ".join(Path("tables/vtab1k.md").read_text(encoding="utf-8").split())
    assert "Rows of one method are apart because its source files differ: svp." in page


# ---- recipes chosen on test


def test_a_recipe_whose_values_were_chosen_on_test_is_marked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_record(record(changes={"selected_on": "test"}), tmp_path)
    write_record(record(5001, {RATE: 3e-3}), tmp_path)
    assert any("selected_on: test" in text for _, text in lines(path)["identity"])
    monkeypatch.chdir(tmp_path)
    run("table", "--results_root", ".")
    page = Path("tables/vtab1k.md").read_text(encoding="utf-8")
    (line,) = [line for line in page.splitlines() if "authors chose its values on test lists" in line]
    assert "svp" in line


def test_the_recipes_that_looked_at_test_say_so() -> None:
    from svp_bench.records.defaults import shipped_layer

    flags = {
        name: shipped_layer(f"recipes/{name}/common.yaml").get("selected_on")
        for name in ("svp-hta", "mambapeft-vtab", "vpt-fgvc")
    }
    assert flags == {"svp-hta": "test", "mambapeft-vtab": "test", "vpt-fgvc": None}


# ---- copies and labels


@pytest.mark.parametrize(("right", "seed"), [(5000, 2), (5300, 2)])
def test_the_weights_of_one_seed_are_not_those_of_another(tmp_path: Path, right: int, seed: int) -> None:
    """A copied record with other times, or with a better score, still names the weights of the run it came from."""
    first = write_record(record(5000, package_digest=LIST, weights_digest=OTHER_LIST), tmp_path)
    again = {"times": {"train_seconds": 12.4, "test_seconds": 1.2}, "images_per_second": 1e5 / 12.4}
    copy = record(right, seed=seed, package_digest=LIST, weights_digest=OTHER_LIST, **again)
    path = write_record(copy, tmp_path)
    for one, other in ((first, path), (path, first)):
        assert any(
            text.startswith(f"weights: the same weights as {other.stem} ({TASK}, seed ") for text in failures(one)
        )


def test_equal_weights_give_equal_bits_on_one_machine(tmp_path: Path) -> None:
    stated = {"package_digest": LIST, "weights_digest": OTHER_LIST}
    path = write_record(record(5000, **stated), tmp_path)
    write_record(record(5000, {"data.workers": 3}, "13:00:00", **stated), tmp_path)
    assert failures(path) == []
    write_record(record(5100, {RATE: 3e-3}, "14:00:00", **stated, device="NVIDIA H100"), tmp_path)  # rounds differently
    assert failures(path) == []
    better = write_record(record(5300, {RATE: 3e-3}, "15:00:00", **stated), tmp_path)
    assert any(f"test images as {better.stem}, with other images correct" in text for text in failures(path))


def test_a_shipped_method_under_another_name_is_seen(tmp_path: Path) -> None:
    made = record()
    name = made.run_id.replace("svp-", "better-", 1)
    path = write_record(dataclasses.replace(made, method="better", run_id=name), tmp_path)
    (text,) = failures(path)
    assert text.startswith("identity: the method is better, ")
    assert "svp_bench.methods.svp.SVP" in text
