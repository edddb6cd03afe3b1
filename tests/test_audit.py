"""`svp-bench audit`: sound records pass, and edited ones fail."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import assert_error, command
from synthetic_records import LIST, OTHER_LIST, WEIGHTS, make_record, synthetic_record, unscored

from svp_bench.audit.record import audit, render
from svp_bench.records.digests import canonical_digest, cell_config, config_digest, setting_digest
from svp_bench.records.record import Metrics, Record, SearchSummary, new_run_id
from svp_bench.records.selection import SelectedConfig, context_of, selected_config_path
from svp_bench.records.selection_rule import Trial, choose
from svp_bench.records.store import write_atomically, write_record
from svp_bench.tasks.cards import load_task

TASK = "vtab/caltech101"
IMAGES = load_task(TASK).counts["test"]
SVP = {"model.method.class_path": "svp_bench.methods.svp.SVP"}
RECIPE = {"model.method.init_args.share_layers": 8, "model.learning_rate": 1e-3, "model.weight_decay": 1e-4}
RATE = "model.learning_rate"
DAY = "2025-01-31"
SPACE = {RATE: [1e-3, 3e-3, 1e-2]}
DECLARED = {
    "name": "rates",
    "version": 1,
    "sampler": "grid",
    "budget": 3,
    "seeds": [0],
    "rule": "one_standard_error",
    "spaces": {"svp": SPACE},
}
SHORT = canonical_digest(DECLARED).removeprefix("sha256:")[:8]


def record(right: int = 5000, changes: dict[str, Any] | None = None, clock: str = "12:00:00", **fields: Any) -> Record:
    """A record as the default recipe makes it, of a run that began at `clock`."""
    settings = {**SVP, **RECIPE, **(changes or {})}
    shares = settings["model.method.init_args.share_layers"]
    images = {"train800": 800}.get(fields.get("splits", {}).get("train"), 1000) * fields.get("epochs", 100)
    fields.setdefault("images_per_second", images / 12.5)
    made = make_record(
        TASK,
        right=right,
        count=fields.pop("count", IMAGES),
        changes=settings,
        **{"method_args": {"share_layers": shares, "hidden_dim": 64}, **fields},
    )
    if "run_id" in fields:
        return made
    run_id = new_run_id(made.method, made.seed, made.setting_digest, entropy=right.to_bytes(4, "big"))
    _, _, tail = run_id.partition("-seed")
    stamp = f"{DAY.replace('-', '')}T{clock.replace(':', '')}Z"
    created = fields.get("created", f"{DAY}T{clock}+00:00")
    return dataclasses.replace(made, run_id=f"{made.method}-{stamp}-seed{tail}", created=created)


def selection(rate: float, top1: float, seed: int = 0, **fields: Any) -> Record:
    """The record of a trial."""
    scored = Metrics(top1, 0.75, round(2 * top1), 200)
    facts: dict[str, Any] = {
        "kind": "selection",
        "stage": "select",
        "splits": {"train": "train800", "val": "val200"},
        "metrics": scored,
        "correct": None,
        "data_digest": OTHER_LIST,
    }
    changes = {"data.stage": "select", RATE: rate}
    return record(int(1e5 * rate) + seed, changes, "10:00:00", seed=seed, **{**facts, **fields}, count=10_000)


def searched(
    root: Path,
    trials: dict[float, float] | None = None,
    chosen: int = 1,
    created: str = f"{DAY}T11:00:00+00:00",
    twist: Callable[[SelectedConfig], SelectedConfig] = lambda selected: selected,
    final: dict[str, Any] | None = None,
    records: bool = True,
) -> Path:
    """A search on val among learning rates, its selected config, and the run with it; return that run's record."""
    tried = trials or {1e-3: 60.0, 3e-3: 75.0, 1e-2: 20.0}
    runs = [selection(rate, top1) for rate, top1 in tried.items()]
    for run in runs if records else ():
        write_record(run, root)
    spaces = {"svp": {RATE: list(tried)}}
    declared = {**DECLARED, "spaces": spaces}
    listed = tuple(
        Trial({RATE: rate}, (run.run_id,), (top1,), run.parameters.trainable, "complete")
        for run, (rate, top1) in zip(runs, tried.items(), strict=True)
    )
    _, error, reason = choose(listed, 200)
    selected = SelectedConfig(
        task=TASK,
        method="svp",
        search=declared,
        search_digest=canonical_digest(declared),
        context=context_of(cell_config(runs[0].config), [RATE]),
        checkpoint_digest=WEIGHTS,
        data_digest=OTHER_LIST,
        selected_on="val200",
        count=200,
        trials=listed,
        chosen=chosen,
        standard_error=error,
        reason=reason,
        created=created,
    )
    selected = twist(selected)
    path = selected_config_path(
        root, str(selected.search["name"]), selected.search_digest, selected.task, selected.method
    )
    write_atomically(path, selected.text())  # as it is, with what `write_selected_config` would refuse
    rate = list(tried)[chosen]
    return write_record(record(5100, {RATE: rate, **(final or {})}, search=selected.summary()), root)


def lines(path: Path, root: Path | None = None) -> dict[str, list[tuple[str, str]]]:
    """Subject → (verdict, text) of one file."""
    (one,) = audit([path], root).audits
    found: dict[str, list[tuple[str, str]]] = {}
    for finding in one.findings:
        found.setdefault(finding.subject, []).append((finding.verdict, finding.text))
    return found


def failures(path: Path, root: Path | None = None) -> list[str]:
    (one,) = audit([path], root).audits
    return [f"{finding.subject}: {finding.text}" for finding in one.failures]


def edited(path: Path, **changes: Any) -> Path:
    """Change a record by hand, at dotted keys."""
    data = json.loads(path.read_text(encoding="utf-8"))
    for key, value in changes.items():
        *folders, last = key.split("__")
        node = data
        for folder in folders:
            node = node[folder]
        node[last] = value
    path.write_text(json.dumps(data), encoding="utf-8")
    return path


# ---- a good record


def test_a_good_record_passes(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    outcome = command("audit", str(path))
    assert outcome.status == 0, outcome.out
    assert "  → passes; notes: seeds\n\n1 record: 1 passed, 0 failed\n" in outcome.out
    assert "No record can prove that no run was deleted" in outcome.out.splitlines()[-1]
    assert "Traceback" not in outcome.err
    facts = {
        "splits": ("trained on train800val200", "scored on test with the weights of epoch 100"),
        "protocol": ("vtab-final version 1",),
        "images": (f"{IMAGES} images of test (sha256:cdcdcdcdcdcd), 102 classes",),
        "budget": ("100 epochs, as in vtab-final",),
        "track": ("default",),
        "settings": ("as protocol card, task and recipe",),
        "code": ("svp-bench 0.1.0", str(record().commit)),
    }
    found = lines(path)
    for subject, texts in facts.items():
        verdict, text = found[subject][0]
        assert verdict == "pass"
        assert all(one in text for one in texts), text
    assert found["seeds"] == [("note", "1 of this cell: 0; an interval needs at least two seeds")]


def test_an_audit_needs_no_torch(tmp_path: Path) -> None:
    import subprocess
    import sys

    path = write_record(record(), tmp_path)
    code = (
        "import sys; from svp_bench.cli.main import main; s = main(sys.argv[1:]); "
        "assert 'torch' not in sys.modules; exit(s)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "audit", str(path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_seeds_of_the_cell_are_counted_and_gaps_named(tmp_path: Path) -> None:
    paths = [write_record(record(5000 + seed, seed=seed), tmp_path) for seed in (0, 1, 4)]
    assert lines(paths[0])["seeds"] == [("note", "3 of this cell: 0, 1, 4; not here: 2, 3")]
    write_record(record(4900, {RATE: 1e-2}, seed=2), tmp_path)  # another cell
    assert lines(paths[2])["seeds"] == [("note", "3 of this cell: 0, 1, 4; not here: 2, 3")]
    for seed in (2, 3):
        write_record(record(5000 + seed, seed=seed), tmp_path)
    assert lines(paths[0])["seeds"] == [("pass", "5 of this cell: 0, 1, 2, 3, 4")]


def test_settings_off_the_recipe_and_several_tested_ones_are_notes(tmp_path: Path) -> None:
    write_record(record(), tmp_path)
    path = write_record(record(5001, {RATE: 5e-3, "data.batch_size": 64}), tmp_path)
    found = lines(path)
    assert found["settings"] == [
        ("note", f"overrides of the shipped settings: data.batch_size 64, not 32; {RATE} 0.005, not 0.001")
    ]
    (tested,) = found["tested"]
    assert tested[0] == "note"
    assert f"2 settings of svp were tested on {TASK}" in tested[1]
    assert f"data.batch_size, {RATE}" in tested[1]
    assert failures(path) == []


def test_a_lone_record_is_audited_without_its_folder(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    alone = tmp_path / "sent" / path.name
    alone.parent.mkdir()
    path.rename(alone)
    found = lines(alone)
    assert found["seeds"][0][0] == "note"
    assert "--results_root R" in found["seeds"][0][1]
    assert failures(alone) == []
    write_record(record(5100, seed=1), tmp_path)
    assert lines(alone, tmp_path)["seeds"] == [("pass", "2 of this cell: 0, 1")]


# ---- what fails


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"dirty": True}, "code: .*0123456789abcdef.* with changes"),
        ({"task_version": 7}, "protocol: .*version 7 of the task card, now 1"),
        ({"epochs": 40}, "status: .*40 epochs.* asks for 100"),
        ({"splits": {"train": "train800val200", "val": "val200"}}, "splits: a final record reads train and test"),
        ({"splits": {"train": "train800", "test": "test"}}, "splits: .*train on train800, test on test, and"),
        ({"times": {"train_seconds": 12.5, "val_seconds": 2.0}}, "splits: .*times.val_seconds"),
        ({"metrics": Metrics(500000 / IMAGES, 0.75, 5000, IMAGES, top5=99.0)}, "images: top5 99.0 % of"),
        ({"count": 6000}, f"images: test has 6000 images, .*{IMAGES}"),
        ({"data_variant": "mine"}, "images: .*variant 'mine'"),
        ({"backbone": "vim_tiny_patch16_224"}, "identity: backbone is 'vim_tiny_patch16_224'"),
        ({"method_args": {"share_layers": 2}}, "identity: method_args.share_layers is 2, .* 8"),
        ({"changes": {"trainer.max_epochs": 500}, "epochs": 500}, "budget: 500 epochs, more than the 100 of"),
        ({"changes": {"trainer.limit_train_batches": 0.1}}, "status: .*limit_train_batches 0.1"),
        ({"changes": {"model.method.class_path": "svp_bench.methods.full.Full"}}, "identity: the method is svp, but"),
    ],
)
def test_a_number_that_is_not_what_a_table_claims_fails(tmp_path: Path, fields: dict[str, Any], expected: str) -> None:
    path = write_record(record(**fields), tmp_path)
    found = failures(path)
    assert any(re.match(expected, text) for text in found), found
    assert command("audit", str(path)).status == 1


RANDOM = {"checkpoint": "none", "checkpoint_digest": None, "changes": {"model.checkpoint": "none"}}
OTHER_FILES = {"data_status": "different", "data_notes": ["test has 6000 images"], "count": 6000}


@pytest.mark.parametrize(
    ("fields", "subject", "expected"),
    [
        ({"commit": None, "dirty": None}, "code", "no commit is known"),
        ({"dirty": None}, "code", "whether anything was changed is not known"),
        ({"package_version": "0.0.1"}, "code", "audited by svp-bench"),
        ({"protocol_version": 9}, "protocol", "version 9; the card here is version 1"),
        ({"protocol": "vtab-old"}, "protocol", "there is no such card here"),
        (OTHER_FILES, "data", "differs from the card: test has 6000 images"),
        ({"data_variant": "zip", "count": 6085}, "data", "variant zip"),
        (RANDOM, "weights", "random"),
        ({"changes": {"trainer.max_epochs": 10}, "epochs": 10}, "budget", "10 epochs, fewer than the 100 of"),
        ({"changes": {"trainer.callbacks": [{"class_path": "mine.Stop"}]}}, "comparable", "mine.Stop"),
    ],
)
def test_a_fact_that_tables_mark_is_a_note(tmp_path: Path, fields: dict[str, Any], subject: str, expected: str) -> None:
    path = write_record(record(**fields), tmp_path)
    assert failures(path) == []
    assert any(verdict == "note" and expected in text for verdict, text in lines(path)[subject]), lines(path)


def test_a_method_from_outside_is_a_note(tmp_path: Path) -> None:
    made = make_record(TASK, "shift", right=5, count=IMAGES, changes={"model.method.class_path": "mine.Shift"})
    found = lines(write_record(made, tmp_path))
    assert any(verdict == "note" and "mine.Shift" in text for verdict, text in found["identity"])
    assert ("note", "there is no recipe of the method shift here to compare with") in found["settings"]


@pytest.mark.parametrize("status", ["truncated", "failed", "interrupted", "unscored"])
def test_an_incomplete_run_fails(tmp_path: Path, status: str) -> None:
    reason = None if status == "unscored" else "why"
    path = write_record(unscored(record(), status, reason), tmp_path)
    assert f"status: {status}: {reason or 'trained, not tested'}; no table counts it" in failures(path)


def test_synthetic_images_fail(tmp_path: Path) -> None:
    path = write_record(synthetic_record(count=IMAGES, right=10), tmp_path)
    assert any(text.startswith("data: synthetic images") for text in failures(path))


def test_a_selection_record_passes(tmp_path: Path) -> None:
    path = write_record(selection(1e-3, 60.0), tmp_path)
    assert failures(path) == []
    assert "without a test split; tables never show it" in lines(path)["splits"][0][1]


# ---- records edited by hand


def test_an_edited_seed_is_seen_though_no_digest_holds_it(tmp_path: Path) -> None:
    path = edited(write_record(record(), tmp_path), seed=3)
    found = failures(path)
    assert any(text.startswith("identity: seed is 3, ") for text in found)
    assert any("the run is named" in text for text in found)


def test_a_copy_for_another_seed_is_seen_even_if_all_names_fit(tmp_path: Path) -> None:
    first = record()
    write_record(first, tmp_path)
    forged = record(seed=1)
    path = write_record(dataclasses.replace(forged, metrics=first.metrics, correct=first.correct), tmp_path)
    assert failures(path) == [f"seeds: the same score, bits, loss and times as seed 0 ({first.run_id}): a copy"]


def test_equal_bits_and_loss_of_two_seeds_are_a_note(tmp_path: Path) -> None:
    first = record()
    write_record(first, tmp_path)
    second = dataclasses.replace(record(seed=1), metrics=first.metrics, correct=first.correct)
    path = write_record(dataclasses.replace(second, times={"train_seconds": 13.5, "test_seconds": 1.25}), tmp_path)
    assert failures(path) == []
    assert any("to the last digit, the same loss as seed 0" in text for _, text in lines(path)["seeds"])


def test_other_weights_under_one_name_are_a_note(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    write_record(record(5001, seed=1, checkpoint_digest=LIST), tmp_path)
    assert ("note", "other runs state other weights from hub: sha256:cdcdcdcdcdcd") in lines(path)["weights"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"metrics__top1": 99.0}, "'metrics.top1' is 99.0, but 5000 of 6084 are right"),
        ({"config__model__learning_rate": 0.5}, "'config_digest' does not belong to the config"),
        ({"surprise": 1}, "unknown record key 'surprise'"),
        ({"schema": 3}, "'schema' is 3"),
    ],
)
def test_a_record_that_breaks_the_schema_fails_in_one_line(
    tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    path = edited(write_record(record(), tmp_path), **changes)
    (text,) = failures(path)
    assert text.startswith("schema: ")
    assert expected in text
    outcome = command("audit", str(path))
    assert outcome.status == 1
    assert outcome.out.count("\n") == 6


def test_two_digests_of_one_list_cannot_both_be_right(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    other = record(5001, seed=1)
    assert other.correct is not None
    correct = dataclasses.replace(other.correct, split_digest=OTHER_LIST)
    write_record(dataclasses.replace(other, correct=correct), tmp_path)
    (text,) = failures(path)
    assert text.startswith(f"images: {other.run_id} ")


def test_a_copy_below_records_fails(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    copy = path.with_name("best.json")
    copy.write_text(path.read_text(), encoding="utf-8")
    assert failures(copy) == [
        f"schema: the file is a copy of records/{TASK}/{path.name}, or was moved from there: tables do not count it"
    ]


@pytest.mark.parametrize("junk", [3, "x", [], [{}], {}, {"a": {"b": 1}}, None, True])
@pytest.mark.parametrize(
    "key",
    [
        *(
            "trainer",
            "model",
            "data",
            "seed_everything",
            "model.method",
            "model.method.class_path",
            "trainer.callbacks",
        ),
        *(
            "model.method.init_args",
            "trainer.max_epochs",
            "model.checkpoint",
            "data.protocol",
            "trainer.limit_val_batches",
        ),
    ],
)
def test_any_value_in_a_config_leaves_all_lines(tmp_path: Path, key: str, junk: Any) -> None:
    made = record()
    config = json.loads(json.dumps(made.config))
    *folders, last = key.split(".")
    node = config
    for folder in folders:
        node = node[folder]
    node[last] = junk
    digests = {"config_digest": config_digest(config), "setting_digest": setting_digest(config)}
    path = write_record(dataclasses.replace(made, config=config, **digests), tmp_path)
    found = lines(path)
    assert {"schema", "status", "identity", "splits", "data", "code"} <= set(found)


@pytest.mark.parametrize("name", ["../../up", "/abs", "a\x00b", ""])
def test_names_in_a_record_are_not_paths(tmp_path: Path, name: str) -> None:
    search = SearchSummary(name or " ", "grid", 3, 3, "val200", LIST, LIST, (RATE,))
    path = write_record(record(search=search), tmp_path)
    assert any("name of a selected config" in text for text in failures(path))


# ---- files and folders


def test_folders_and_files_go_on_after_a_bad_one(tmp_path: Path) -> None:
    good = write_record(record(), tmp_path)
    bad = good.with_name("bad.json")
    bad.write_text("{", encoding="utf-8")
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "other.json").write_text("{}", encoding="utf-8")
    outcome = command("audit", str(tmp_path), str(tmp_path / "gone.json"))
    assert outcome.status == 1
    assert "3 records: 1 passed, 2 failed" in outcome.out
    assert "is not JSON: Expecting property name" in outcome.out
    assert "cannot be read: No such file" in outcome.out
    assert "other.json" not in outcome.out
    assert command("audit", str(good)).status == 0


def test_json_that_is_no_record_is_left_out_of_a_folder_and_counted(tmp_path: Path) -> None:
    path = searched(tmp_path / "deep" / "results")
    (tmp_path / "package.json").write_text('{"name": "x", "schema": "y"}', encoding="utf-8")
    path.with_name("broken.json").write_text("{", encoding="utf-8")  # where a record belongs
    report = audit([tmp_path])
    assert len(report.audits) == 5
    assert report.skipped == 2
    assert "5 records: 4 passed, 1 failed\n2 JSON files skipped: not records\n" in render(report)
    assert "contains no record (other JSON files: 1)" in assert_error(
        command("audit", str(tmp_path / "deep" / "results" / "selected_configs")), 2
    )


def test_wrong_use_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "contains no record" in assert_error(command("audit", str(empty)), 2)
    path = write_record(record(), tmp_path)
    assert "is not a folder" in assert_error(command("audit", str(path), "--results_root", str(tmp_path / "no")), 2)
    assert "required: RECORD" in assert_error(command("audit"), 2)


def test_files_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    searched(tmp_path)
    (selected,) = (tmp_path / "selected_configs").rglob("*.json")
    (text,) = failures(selected)
    assert "not a record but the selected config of a search" in text


# ---- the same seed again


def test_a_seed_repeated_on_the_same_code_with_another_score_fails_on_both_sides(tmp_path: Path) -> None:
    old = write_record(record(5000, clock="12:00:00"), tmp_path)
    new = write_record(record(5200, clock="13:00:00"), tmp_path)
    for path, other, scores in ((old, new, "85.47 there, 82.18 here"), (new, old, "82.18 there, 85.47 here")):
        (text,) = failures(path)
        assert text.startswith("repeated: ")
        assert other.stem in text
        assert scores in text
    assert command("audit", str(tmp_path)).status == 1


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"commit": "f" * 40}, "on other code"),
        ({"commit": None, "dirty": None}, "on other code"),
        ({"right": 5000, "loss": 0.751}, "with the same score"),
    ],
)
def test_a_seed_repeated_on_other_code_or_alike_is_a_note(
    tmp_path: Path, fields: dict[str, Any], expected: str
) -> None:
    path = write_record(record(5000), tmp_path)
    again = record(fields.pop("right", 5200), clock="13:00:00")
    if "loss" in fields:
        assert again.metrics is not None
        again = dataclasses.replace(again, metrics=dataclasses.replace(again.metrics, loss=fields.pop("loss")))
        again = dataclasses.replace(again, run_id=again.run_id[:-8] + "00000001")
    write_record(dataclasses.replace(again, **fields), tmp_path)
    assert failures(path) == []
    ((verdict, text),) = lines(path)["repeated"]
    assert verdict == "note"
    assert expected in text


def test_runs_that_did_not_end_are_counted(tmp_path: Path) -> None:
    path = write_record(record(), tmp_path)
    for number in range(2):
        broken = unscored(record(4000 + number), "interrupted", "stopped by the user")
        write_record(broken, tmp_path)
    assert lines(path)["repeated"] == [
        ("note", "further runs of this cell and seed that no table counts: 2 interrupted")
    ]


# ---- searches


def test_a_searched_run_passes_with_its_selected_config_and_trials(tmp_path: Path) -> None:
    path = searched(tmp_path)
    assert failures(path) == []
    facts = {
        "track": "searched (rates, K = 3), grid, 3 settings tried on val200",
        "selection": f"rates-{SHORT}/{TASK}/svp.json, selected {DAY}T11:00:00+00:00",
        "trials": "3 selection records have the stated scores, all on val200",
        "rule": "one_standard_error: trial 2 of 3; 75.00 on val",
        "settings": "except for the selected values",
    }
    for subject, fact in facts.items():
        assert fact in lines(path)[subject][0][1]
    assert command("audit", str(tmp_path)).status == 0


def replaced(**changes: Any) -> Callable[[SelectedConfig], SelectedConfig]:
    return lambda selected: dataclasses.replace(selected, **changes)


def with_trial(number: int, **changes: Any) -> Callable[[SelectedConfig], SelectedConfig]:
    def twist(selected: SelectedConfig) -> SelectedConfig:
        trials = list(selected.trials)
        trials[number] = dataclasses.replace(trials[number], **changes)
        return dataclasses.replace(selected, trials=tuple(trials))

    return twist


def with_search(**changes: Any) -> Callable[[SelectedConfig], SelectedConfig]:
    def twist(selected: SelectedConfig) -> SelectedConfig:
        search = {**selected.search, **changes}
        return dataclasses.replace(selected, search=search, search_digest=canonical_digest(search))

    return twist


def dropped(selected: SelectedConfig) -> SelectedConfig:
    """Without its last trial."""
    return dataclasses.replace(selected, trials=selected.trials[:-1])


def raised(selected: SelectedConfig) -> SelectedConfig:
    """Another score than the record of the trial has, with all that follows from it."""
    selected = with_trial(1, scores=(76.0,))(selected)
    _, error, reason = choose(selected.trials, selected.count)
    return dataclasses.replace(selected, standard_error=error, reason=reason)


def hidden(selected: SelectedConfig) -> SelectedConfig:
    """Return the selected config with its losing last trial stated as failed before it had a record."""
    last = dataclasses.replace(selected.trials[-1], status="failed: nan", scores=(), run_ids=("",), trainable=None)
    trials = (*selected.trials[:-1], last)
    _, error, reason = choose(trials, selected.count)
    return dataclasses.replace(selected, trials=trials, standard_error=error, reason=reason)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"created": f"{DAY}T12:00:01+00:00"}, f"selection: selected {DAY}T12:00:01.*after the run began"),
        ({"records": False}, "trials: trial 1: its record svp-"),
        ({"chosen": 0}, "'chosen' is trial 1, .*trial 2"),
        ({"trials": {1e-3: 74.0, 3e-3: 75.0}}, "'chosen' is trial 2, .*trial 1"),
        ({"twist": raised}, "trials: trial 2: svp-.*top1"),
        ({"twist": with_trial(0, status="failed: nan", scores=())}, "trials: trial 1 is stated as failed"),
        ({"twist": with_search(budget=2)}, "3 trials, more than the budget of 2"),
        ({"twist": with_search(rule="best")}, "rule 'best' is not known"),
        ({"twist": with_search(seeds=[0, 1])}, "trial 1 has 1 run, .*2 seeds"),
        ({"twist": with_search(seeds=[7])}, "trials: trial 1: svp-.*seed"),
        ({"twist": replaced(selected_on="test")}, "selection: selected on test, .*val200"),
        ({"twist": replaced(count=2000)}, "'standard_error' or 'reason'"),
        ({"twist": replaced(standard_error=1.0)}, "'standard_error' or 'reason'"),
        ({"twist": replaced(context={"model": {"backbone": "other"}})}, "selection: selected with data.batch_size"),
        ({"twist": replaced(checkpoint_digest=None)}, "selection: the checkpoint_digest .* None, .*sha256:abab"),
        ({"twist": replaced(data_digest=LIST)}, "trials: trial 1: svp-.*data"),
        ({"twist": with_trial(0, scores=(600.0,))}, "trial 1 has 600.0 % of 200 images"),
        ({"twist": with_trial(0, trainable=12345)}, "trials: trial 1: svp-.*trained parameters"),
        ({"twist": replaced(task="vtab/dtd")}, f"selection: .*rates-{SHORT}/vtab/caltech101/svp.json is missing"),
        ({"twist": dropped}, "not the default setting and then the declared grid"),
        ({"twist": hidden}, "trials: runs of settings and seeds of the search that the selected config leaves out"),
        ({"twist": replaced(search={**DECLARED, "budget": 12})}, "'search_digest'"),
        ({"twist": with_search(spaces={"svp": {RATE: [1e-3, 3e-3]}})}, "not the default setting"),
        ({"final": {RATE: 0.5}}, f"selection: {RATE} is 0.5, .*0.003"),
        ({"final": {"data.batch_size": 64}}, "selection: selected with data.batch_size = 32, .*64"),
    ],
)
def test_a_search_that_is_not_what_it_claims_fails(tmp_path: Path, options: dict[str, Any], expected: str) -> None:
    found = failures(searched(tmp_path, **options))
    assert any(re.search(expected, text) for text in found), found


def test_a_selected_config_that_was_removed_or_changed_afterwards_fails(tmp_path: Path) -> None:
    path = searched(tmp_path)
    (file,) = (tmp_path / "selected_configs").rglob("*.json")
    text = file.read_text(encoding="utf-8")
    file.write_text(text.replace("T11:00:00+", "T10:59:59+"), encoding="utf-8")
    assert any("the selected_config of the" in line for line in failures(path))
    file.write_text(text.replace('"schema"', '"scheme"'), encoding="utf-8")
    assert any(line.startswith("selection: ") and "svp.json" in line for line in failures(path))
    file.unlink()
    assert any("svp.json is missing" in line for line in failures(path))


def test_a_trial_that_read_the_test_list_fails(tmp_path: Path) -> None:
    path = searched(tmp_path)
    trial = next(file for file in (tmp_path / "records" / TASK).glob("*.json") if '"selection"' in file.read_text())
    edited(trial, splits={"train": "train800", "test": "test"})
    assert any("read test images" in line for line in failures(path))


def test_a_searched_record_alone_cannot_show_its_selected_config(tmp_path: Path) -> None:
    path = searched(tmp_path / "results")
    alone = tmp_path / path.name
    path.rename(alone)
    assert any(line.startswith("selection: the record lies in no results folder") for line in failures(alone))
    assert failures(alone, tmp_path / "results") == []


def test_what_was_tried_outside_of_the_search_is_a_note(tmp_path: Path) -> None:
    path = searched(tmp_path)
    write_record(selection(0.05, 70.0), tmp_path)
    write_record(record(5003, {RATE: 0.05}, "09:00:00"), tmp_path)
    other = next((tmp_path / "selected_configs").rglob("*.json"))
    elsewhere = tmp_path / "selected_configs" / "again-12345678" / TASK / "svp.json"
    elsewhere.parent.mkdir(parents=True)
    elsewhere.write_text(other.read_text(), encoding="utf-8")
    found = lines(path)
    notes = [text for verdict, text in found["trials"] if verdict == "note"]
    assert [text.partition(" (")[0] for text in notes] == [
        "further runs of this method, scored on val outside of the search: 1",
        "further runs of this method, tested before the search ended: 1",
    ]
    assert any(verdict == "note" and "again-12345678" in text for verdict, text in found["selection"])
    assert failures(path) == []
