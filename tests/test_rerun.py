"""`svp-bench rerun`: a run again from its record alone, and what may differ."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers import BACKBONE, TASK, Outcome, assert_error, command, draw, run, settle
from helpers import small as line
from safetensors.torch import save_file

from svp_bench.records.bits import pack_bits, unpack_bits
from svp_bench.records.digests import config_digest, setting_digest
from svp_bench.records.record import Record, SearchSummary
from svp_bench.records.store import read_record
from svp_bench.train import base as cli

COMMIT = "c" * 40


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The record of a run of two epochs, in a folder with its data; the checkout counts as clean."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "commit_and_dirty", lambda: (COMMIT, False))
        place = settle(tmp_path_factory.mktemp("original"), patch)
        outcome = run(*line(trainer__max_epochs="2", seed_everything="3"))
        yield place / outcome.record_path


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, original: Path) -> Path:
    """Another working directory, with a copy of the record and nothing else."""
    monkeypatch.setattr(cli, "commit_and_dirty", lambda: (COMMIT, False))
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "sent.json"
    copy.write_text(original.read_text(encoding="utf-8"), encoding="utf-8")
    return copy


@pytest.fixture
def data(original: Path) -> str:
    """Where the images of the run are."""
    return str(original.parents[4] / "data")


def changed(path: Path, change: Callable[[Record], Record]) -> Path:
    """Change a record by hand, keeping it valid."""
    path.write_text(change(read_record(path)).text(), encoding="utf-8")
    return path


def with_config(key: str, value: Any) -> Callable[[Record], Record]:
    """Set a dotted key of the config, with the digests that belong to it."""

    def change(record: Record) -> Record:
        config = json.loads(json.dumps(record.config))
        *folders, last = key.split(".")
        node = config
        for folder in folders:
            node = node[folder]
        node[last] = value
        digests = {"config_digest": config_digest(config), "setting_digest": setting_digest(config, record.search)}
        return dataclasses.replace(record, config=config, **digests)

    return change


def with_flipped(count: int, **fields: Any) -> Callable[[Record], Record]:
    """Call the first images of the test list right where they were wrong, and the other way round."""

    def change(record: Record) -> Record:
        assert record.correct is not None
        assert record.metrics is not None
        bits = unpack_bits(record.correct.bits, record.correct.count).copy()
        bits[:count] = ~bits[:count]
        return _with_bits(record, bits, fields)

    return change


def _with_bits(record: Record, bits: Any, fields: dict[str, Any]) -> Record:
    assert record.correct is not None
    assert record.metrics is not None
    right = int(np.sum(bits))
    scores: dict[str, Any] = {"top1": 100 * right / len(bits), "correct": right}
    scores |= dict.fromkeys(("top5", "balanced_accuracy", "ece", "per_class"))
    return dataclasses.replace(
        record,
        metrics=dataclasses.replace(record.metrics, **scores),
        correct=dataclasses.replace(record.correct, bits=pack_bits(bits)),
        **fields,
    )


def all_right(**fields: Any) -> Callable[[Record], Record]:
    """Call all images right: those that differ from the rerun are all on one side."""

    def change(record: Record) -> Record:
        assert record.correct is not None
        wrong = int(np.sum(~unpack_bits(record.correct.bits, record.correct.count)))
        assert wrong >= 6, "fewer than six on one side may be chance"
        return _with_bits(record, np.ones(record.correct.count, dtype=bool), fields)

    return change


def again(path: Path, data: str, *extra: str) -> Outcome:
    return command("rerun", str(path), "--data.root", data, *extra)


# ---- the same numbers


def test_a_record_alone_gives_the_same_bits_from_another_folder(elsewhere: Path, data: str, original: Path) -> None:
    outcome = again(elsewhere, data)
    assert outcome.status == 0, outcome.out + outcome.err
    assert outcome.out.endswith("Bit-equal: the same images are right, and the loss is the same to the last digit.\n")
    assert "differs" not in outcome.out
    assert "svp-bench table" not in outcome.out
    made = outcome.record
    was = json.loads(original.read_text(encoding="utf-8"))
    assert outcome.record_path.parts[:3] == ("results", "reruns", "records")
    assert outcome.folder.parts[:2] == ("runs", "reruns")
    for key in ("seed", "metrics", "correct", "config_digest", "setting_digest", "data_digest", "splits", "search"):
        assert made[key] == was[key], key
    assert made["seed"] == 3
    assert not (Path("results") / "records").exists()
    assert "no records in" in run("table").out


def test_a_selection_record_is_repeated_too(elsewhere: Path, data: str, original: Path) -> None:
    first = run(*line(data__root=data, data__stage="select"))
    outcome = again(first.record_path, data)
    assert outcome.status == 0, outcome.out + outcome.err
    assert "top-1" in outcome.out.split("  record ")[1]
    assert "on val200 (" in outcome.out
    assert "Bit-equal" in outcome.out
    assert outcome.record["kind"] == "selection"
    # as older selection records are: without bits
    worse = changed(first.record_path, lambda r: dataclasses.replace(r, metrics=_one_more(r), correct=None))
    outcome = again(worse, data)
    assert outcome.status == 1
    assert "Not bit-equal: 1 image more or fewer are right" in outcome.out


def _one_more(record: Record) -> Any:
    assert record.metrics is not None
    right, count = record.metrics.correct + 1, record.metrics.count
    nothing: dict[str, Any] = dict.fromkeys(("top5", "balanced_accuracy", "ece", "per_class"))
    return dataclasses.replace(record.metrics, correct=right, top1=100 * right / count, **nothing)


def test_the_rerun_of_a_searched_record_keeps_the_search(elsewhere: Path, data: str) -> None:
    digests = "sha256:" + "2" * 64, "sha256:" + "1" * 64
    search = SearchSummary("default", "grid", 12, 12, "val200", *digests, ("model.learning_rate",))

    def change(record: Record) -> Record:
        digest = setting_digest(record.config, search)
        run_id = record.run_id.replace(record.setting_digest[7:15], digest[7:15])
        return dataclasses.replace(record, search=search, setting_digest=digest, run_id=run_id)

    record = read_record(changed(elsewhere, change))
    outcome = again(elsewhere, data)
    assert outcome.status == 0, outcome.out + outcome.err
    assert read_record(outcome.record_path).search == search
    assert outcome.record["setting_digest"] == record.setting_digest


def test_flags_that_change_no_number_may_follow(elsewhere: Path, data: str) -> None:
    flags = ("--trainer.devices", "1", "--data.num_workers", "0", "--trainer.enable_model_summary", "false")
    outcome = again(elsewhere, data, *flags, "--results_root", "mine", "--runs_root", "logs")
    assert outcome.status == 0, outcome.out + outcome.err
    assert "differs" not in outcome.out
    assert outcome.record_path.parts[0] == "mine"
    assert outcome.folder.parts[0] == "logs"


# ---- other numbers


def test_other_bits_with_nothing_else_different_fail(elsewhere: Path, data: str) -> None:
    changed(elsewhere, with_flipped(2))
    outcome = again(elsewhere, data)
    assert outcome.status == 1
    assert "Not bit-equal: 2 of 9 images differ (" in outcome.out
    assert "Nothing that is recorded differs, so the numbers should be the same, and are not" in outcome.out


def test_other_bits_on_another_machine_agree_within_the_noise_of_the_test_list(elsewhere: Path, data: str) -> None:
    changed(elsewhere, with_flipped(1, device="CPU (riscv, 3 threads)", libraries={"torch": "0.1"}))
    outcome = again(elsewhere, data)
    assert outcome.status == 0, outcome.out
    assert "  differs    device: CPU (riscv, 3 threads) in the record, CPU (" in outcome.out
    assert "  differs    torch: 0.1 in the record, " in outcome.out
    assert "  differs    python: none in the record, " in outcome.out
    assert "1 of 9 images differ" in outcome.out
    assert "may well be chance (paired by image: exact McNemar p = 1)" in outcome.out
    assert "Agrees: " in outcome.out


def test_other_bits_beyond_that_noise_do_not_agree(elsewhere: Path, data: str) -> None:
    changed(elsewhere, all_right(package_version="0.0.1"))
    outcome = again(elsewhere, data)
    assert outcome.status == 1
    assert "note       svp-bench: 0.0.1 in the record, " in outcome.out
    assert "Does not agree: " in outcome.out
    assert "would hardly be chance (paired by image: exact McNemar p = 0.0" in outcome.out


def test_a_loss_alone_that_differs_is_not_bit_equal(elsewhere: Path, data: str) -> None:
    def change(record: Record) -> Record:
        assert record.metrics is not None
        loss = record.metrics.loss + 1e-9
        metrics = dataclasses.replace(record.metrics, loss=loss, nll=loss)
        return dataclasses.replace(record, metrics=metrics, commit="d" * 40)

    changed(elsewhere, change)
    outcome = again(elsewhere, data)
    assert outcome.status == 0
    assert "Not bit-equal: the same images are right, but the loss differs" in outcome.out
    assert f"note       commit: {'d' * 40} in the record, {COMMIT} here" in outcome.out


def with_loss(more: float, **fields: Any) -> Callable[[Record], Record]:
    """Another loss with the same bits."""

    def change(record: Record) -> Record:
        assert record.metrics is not None
        loss = record.metrics.loss + more
        return dataclasses.replace(record, metrics=dataclasses.replace(record.metrics, loss=loss, nll=loss), **fields)

    return change


def test_another_processor_explains_a_difference_of_rounding(elsewhere: Path, data: str) -> None:
    outcome = again(changed(elsewhere, with_loss(1e-6, cpu="Another processor, AVX2")), data)
    assert outcome.status == 0, outcome.out
    assert "differs    cpu: Another processor, AVX2 in the record, " in outcome.out
    assert f"{outcome.record['cpu']} here" in outcome.out
    assert "Agrees: both runs classify the same images correctly; the loss differs by 1e-06" in outcome.out


def test_another_number_of_threads_is_named_with_the_remedy(elsewhere: Path, data: str) -> None:
    outcome = again(changed(elsewhere, with_loss(1e-6, device="CPU (x86_64, 61 threads)")), data)
    assert outcome.status == 0, outcome.out
    assert "OMP_NUM_THREADS=61" in outcome.out


def test_a_loss_beyond_the_tolerance_does_not_agree_though_the_bits_do(elsewhere: Path, data: str) -> None:
    read = read_record(elsewhere)
    assert read.metrics is not None
    allowed = max(0.02, 0.1 * read.metrics.loss)
    outcome = again(changed(elsewhere, with_loss(1.3 * allowed, cpu="Another processor, AVX2")), data)
    assert outcome.status == 1
    assert "Does not agree: the loss differs by " in outcome.out
    assert "nats are allowed" in outcome.out


def test_other_files_of_the_package_are_said(elsewhere: Path, data: str) -> None:
    outcome = again(changed(elsewhere, with_loss(1e-6, package_digest="sha256:" + "1" * 64)), data)
    assert "note       the package's files: sha256:111111111111 in the record, sha256:" in outcome.out
    assert "differs    the package's files: sha256:111111111111" in outcome.out


def test_uncommitted_changes_count_as_other_code(elsewhere: Path, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "commit_and_dirty", lambda: (COMMIT, True))
    outcome = again(changed(elsewhere, with_flipped(1)), data)
    assert outcome.status == 0
    assert "differs    code: uncommitted changes" in outcome.out


# ---- what is not at hand stops it before the training


def untrained(outcome: Outcome, status: int) -> str:
    text = assert_error(outcome, status)
    assert not list(Path("results").rglob("*.json"))
    return text


def test_missing_or_other_data(elsewhere: Path, data: str, tmp_path: Path) -> None:
    assert "no data of vtab/cifar" in untrained(command("rerun", str(elsewhere)), 1)
    draw(tmp_path / "synthetic", seed=7)
    text = untrained(again(elsewhere, str(tmp_path / "synthetic")), 1)
    assert f"has other splits of {TASK} (sha256:" in text
    assert "than the run read (sha256:" in text
    assert "--data.root DIR" in text


def test_missing_or_other_weights(elsewhere: Path, data: str) -> None:
    torch.manual_seed(5)
    weights = {k: v.contiguous() for k, v in timm.create_model(BACKBONE, num_classes=10).state_dict().items()}
    save_file(weights, "w.safetensors")
    first = run(*line("--method", "linear", data__root=data, model__checkpoint="w.safetensors"))
    Path("w.safetensors").rename("moved.safetensors")
    path = first.record_path
    text = assert_error(again(path, data), 1)
    assert "the run began with the weights w.safetensors (sha256:" in text
    assert "--model.checkpoint PATH" in text
    outcome = again(path, data, "--model.checkpoint", "moved.safetensors")
    assert outcome.status == 0, outcome.err
    assert "Bit-equal" in outcome.out
    save_file({**weights, "norm_f.weight": weights["norm_f.weight"] + 1}, "other.safetensors")
    text = assert_error(again(path, data, "--model.checkpoint", "other.safetensors"), 1)
    assert "other.safetensors has other weights (sha256:" in text
    assert "than the run began with (sha256:" in text


@pytest.mark.parametrize(
    ("change", "status", "expected"),
    [
        (lambda r: dataclasses.replace(r, status="truncated", status_reason="x"), 1, "is truncated: it has no number"),
        (lambda r: dataclasses.replace(r, seed=4), 1, "has seed 4, but its config has 3: one of them was edited"),
        (
            with_config("model.method.class_path", "svp_bench.methods.nope.Nope"),
            2,
            "svp-bench 0.1.0 has no such method",
        ),
        (
            with_config("model.method.class_path", "mine.Shift"),
            2,
            "it is not part of svp-bench: run this in the folder",
        ),
        (with_config("model.surprise", 3), 2, "model.surprise"),
        (with_config("model", 3), 2, "the method None of svp-"),
        (with_config("trainer", []), 2, "trainer is a mapping of keys, not a list"),
        (with_config("data.task", "vtab/gone"), 2, "unknown task 'vtab/gone'"),
        (
            with_config("data.stage", "select"),
            2,
            "reads {'train': 'train800', 'val': 'val200'}, the record's (version 1)",
        ),
    ],
)
def test_a_record_that_cannot_be_repeated(
    elsewhere: Path, data: str, change: Callable[[Record], Record], status: int, expected: str
) -> None:
    text = untrained(again(changed(elsewhere, change), data), status)
    assert expected in text
    assert "/config.yaml" not in text


def test_a_version_that_resolves_the_config_otherwise_says_so(elsewhere: Path, data: str) -> None:
    def older(record: Record) -> Record:
        config = json.loads(json.dumps(record.config))
        del config["model"]["learning_rate"]  # as if the key had come later, with another default
        config["model"]["weight_decay"] = 0.5
        del config["model"]["label_smoothing"]
        config["model"]["method"]["init_args"].pop("hidden_dim")
        digest = config_digest(config)
        return dataclasses.replace(record, config=config, config_digest=digest, setting_digest=setting_digest(config))

    text = untrained(again(changed(elsewhere, older), data), 2)
    assert (
        "svp-bench 0.1.0 resolves the record's config to another setting (model.label_smoothing = 0.0, in the record"
        in text
    )
    assert f"rerun it with the version that wrote it, 0.1.0 (commit {COMMIT})" in text


def test_a_method_of_somebody_else_runs_where_its_module_is(elsewhere: Path, data: str) -> None:
    Path("there").mkdir()
    Path("there/mine_too.py").write_text(
        "from svp_bench.methods.linear import Linear\n\n\nclass Probe(Linear):\n    pass\n", encoding="utf-8"
    )
    method = Path("there/probe.yaml")
    method.write_text("model:\n  method:\n    class_path: mine_too.Probe\n    init_args: {}\n", encoding="utf-8")
    first = run(*line("--method", str(method), data__root=data))
    assert first.record["method"] == "probe"
    outcome = again(first.record_path, data)  # its folder is still on the path of this process
    assert outcome.status == 0, outcome.err
    assert "Bit-equal" in outcome.out


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (("--model.learning_rate", "1"), "rerun takes no --model.learning_rate: it would be another run"),
        (("--seed_everything", "1"), "rerun takes no --seed_everything"),
        (("--resume",), "rerun takes no --resume"),
        (("--no_test",), "rerun takes no --no_test"),
        (("--method", "full"), "rerun takes no --config, --method or --selected_config"),
        (("other.json",), "rerun takes one record"),
    ],
)
def test_wrong_use_is_one_line(elsewhere: Path, data: str, flags: tuple[str, ...], expected: str) -> None:
    assert expected in untrained(again(elsewhere, data, *flags), 2)


def test_the_rerun_never_lies_beside_the_record_itself(
    original: Path, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(original.parents[4])
    path = str(original.relative_to(Path.cwd()))
    text = assert_error(command("rerun", path, "--data.root", data, "--results_root", "results"), 2)
    assert "results holds the record itself, and tables would count its seed twice" in text
    assert len(list(Path("results/records").rglob("*.json"))) == 1


def test_a_record_that_cannot_be_read_is_one_line(elsewhere: Path) -> None:
    assert "cannot be read" in assert_error(command("rerun", "gone.json"), 1)
    elsewhere.write_text("{}", encoding="utf-8")
    assert "'schema' is missing" in assert_error(command("rerun", str(elsewhere)), 1)
