from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_records import CONFIG, LIST, WEIGHTS, make_record, unscored

from svp_bench.core.errors import RecordError
from svp_bench.records import store as module
from svp_bench.records.bits import pack_bits, unpack_bits
from svp_bench.records.defaults import row_digest
from svp_bench.records.digests import (
    CELL_EXCLUDED,
    SETTING_EXCLUDED,
    cell_config,
    config_digest,
    setting_config,
    setting_digest,
)
from svp_bench.records.record import (
    Correct,
    Efficiency,
    Metrics,
    PerClass,
    Record,
    SearchSummary,
    new_run_id,
    timestamp,
)
from svp_bench.records.schema import parse_record
from svp_bench.records.store import (
    check_writable,
    read_record,
    read_records,
    replace_record,
    write_atomically,
    write_record,
)

HISTORIC = Path(__file__).parent / "historic_records"
NOON = datetime(2026, 1, 31, 12, tzinfo=timezone.utc)
KEYS = st.text("abcdef", min_size=1, max_size=3)
SCALARS = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)
CONFIGS = st.dictionaries(
    KEYS,
    st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3)),
    max_size=4,
)


def put(config: dict[str, Any], dotted: str, value: Any) -> dict[str, Any]:
    """Return a copy of `config` with the dotted key set; parts on the way that are no mappings give way."""
    config = json.loads(json.dumps(config))
    *folders, last = dotted.split(".")
    node = config
    for folder in folders:
        node[folder] = node[folder] if isinstance(node.get(folder), dict) else {}
        node = node[folder]
    node[last] = value
    return config


# ---- bits and ids


@settings(deadline=None)
@given(st.lists(st.booleans()))
def test_bits_come_back(bits: list[bool]) -> None:
    right = np.array(bits, dtype=np.bool_)
    assert unpack_bits(pack_bits(right), len(bits)).tolist() == bits


def test_first_bit_is_the_highest() -> None:
    assert pack_bits(np.array([True] + 8 * [False])) == "gAA="


@pytest.mark.parametrize(
    ("text", "count", "message"),
    [
        ("gA!=", 8, "not base64"),
        ("é", 8, "not base64"),
        ("gA==", 9, "1 bytes; 9 bits need 2"),
        ("gAA=", 8, "2 bytes; 8 bits need 1"),
        ("wQ==", 7, "a one behind bit 7"),
    ],
)
def test_malformed_bits_are_refused(text: str, count: int, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        unpack_bits(text, count)


@pytest.mark.parametrize("bits", [np.ones(3), np.ones((2, 2), dtype=np.bool_)])
def test_only_a_row_of_booleans_is_packed(bits: Any) -> None:
    with pytest.raises(RecordError, match="booleans of one dimension"):
        pack_bits(bits)


def test_run_ids_sort_by_time_and_differ_within_a_second() -> None:
    times = [NOON + timedelta(seconds=seconds) for seconds in (0, 59, 3600, 86400)]
    ids = [new_run_id("svp", 12 - index, WEIGHTS, now, b"\x00") for index, now in enumerate(times)]
    assert ids == sorted(ids)
    assert ids[0] == "svp-20260131T120000Z-seed12-abababab-00"
    assert len({new_run_id("svp", 0, WEIGHTS, NOON) for _ in range(20)}) == 20


def test_run_ids_are_in_utc() -> None:
    east = NOON.astimezone(timezone(timedelta(hours=9)))
    assert new_run_id("svp", 0, WEIGHTS, east, b"") == new_run_id("svp", 0, WEIGHTS, NOON, b"")
    assert timestamp(east) == "2026-01-31T12:00:00+00:00"


def test_a_run_id_is_never_a_path() -> None:
    with pytest.raises(RecordError, match=r"'\.\./svp': lower case"):
        new_run_id("../svp", 0, WEIGHTS)


# ---- digests


@settings(deadline=None)
@given(CONFIGS, st.randoms(use_true_random=False))
def test_digest_ignores_the_order_of_keys(config: dict[str, Any], random: Any) -> None:
    def shuffled(value: Any) -> Any:
        if isinstance(value, list):
            return [shuffled(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = list(value)
        random.shuffle(keys)
        return {key: shuffled(value[key]) for key in keys}

    assert config_digest(shuffled(config)) == config_digest(config)


@settings(deadline=None)
@given(CONFIGS, CONFIGS)
def test_digests_differ_where_the_cell_differs(one: dict[str, Any], other: dict[str, Any]) -> None:
    same = json.dumps(cell_config(one), sort_keys=True) == json.dumps(cell_config(other), sort_keys=True)
    assert (config_digest(one) == config_digest(other)) == same


@settings(deadline=None)
@given(CONFIGS, st.sampled_from(sorted(CELL_EXCLUDED)), SCALARS)
def test_seed_path_device_and_logging_are_in_no_digest(config: dict[str, Any], key: str, value: Any) -> None:
    assert config_digest(put(CONFIG, key, value)) == config_digest(put(CONFIG, key, None))
    assert config_digest(put(config, key, value)) == config_digest(put(config, key, {"a": value}))


@pytest.mark.parametrize(
    "key", ["trainer.max_epochs", "model.learning_rate", "data.batch_size", "model.method.init_args.share_layers"]
)
def test_what_makes_the_number_is_in_both_digests(key: str) -> None:
    other = put(CONFIG, key, 12345)
    assert config_digest(other) != config_digest(CONFIG)
    assert setting_digest(other) != setting_digest(CONFIG)


@pytest.mark.parametrize("key", sorted(SETTING_EXCLUDED))
def test_the_task_is_in_the_cell_but_not_in_the_setting(key: str) -> None:
    other = put(CONFIG, key, "other")
    assert config_digest(other) != config_digest(CONFIG)
    assert setting_digest(other) == setting_digest(CONFIG)


def test_numbers_of_another_type_or_last_digit_differ() -> None:
    digests = {config_digest({"a": value}) for value in (1, 1.0, 0.1, 0.1 + 2**-56, True, "1")}
    assert len(digests) == 6


def test_null_and_empty_are_absent() -> None:
    assert config_digest({"a": None, "b": {"c": {}, "d": None}, "e": 1}) == config_digest({"e": 1})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), r"'config.a.b' is nan"),
        (float("inf"), r"'config.a.b' is inf"),
        (Path("x"), r"'config.a.b' is a \w+Path"),
        ([1, {2}], r"'config.a.b\[1\]' is a set"),
    ],
)
def test_what_json_cannot_hold_has_no_digest(value: Any, message: str) -> None:
    with pytest.raises(RecordError, match=message):
        config_digest({"a": {"b": value}})


def test_selected_values_are_not_in_the_setting() -> None:
    other = put(CONFIG, "model.learning_rate", 0.5)
    assert setting_digest(other, SEARCH) == setting_digest(CONFIG, SEARCH) != setting_digest(CONFIG)
    assert setting_digest(CONFIG, dataclasses.replace(SEARCH, declaration=WEIGHTS)) != setting_digest(CONFIG, SEARCH)
    assert setting_config(CONFIG, SEARCH)["search"] == LIST
    assert config_digest(other) != config_digest(CONFIG)


# ---- schema


def test_a_record_comes_back(tmp_path: Path) -> None:
    record = make_record(right=17, count=23, search=SEARCH)
    path = write_record(record, tmp_path)
    assert path == tmp_path / "records" / "vtab" / "caltech101" / f"{record.run_id}.json"
    again = read_record(path)
    assert again == record
    assert again.correct is not None
    assert unpack_bits(again.correct.bits, 23).tolist() == 17 * [True] + 6 * [False]
    assert read_records(tmp_path) == ([record], [])


def test_keys_have_the_order_of_the_schema(tmp_path: Path) -> None:
    one, other = make_record(), make_record()
    backwards = json.loads(json.dumps(other.config), object_pairs_hook=lambda pairs: dict(reversed(pairs)))
    other = dataclasses.replace(other, config=backwards, libraries=dict(reversed(other.libraries.items())))
    one = dataclasses.replace(one, run_id=other.run_id)
    assert list(other.config) != list(one.config)
    assert other.text() == one.text()
    assert list(json.loads(one.text())) == REQUIRED
    select = {"kind": "selection", "stage": "select", "correct": None, "val_correct": one.correct}
    full = dataclasses.replace(one, **OPTIONAL, **select)
    assert list(json.loads(full.text())) == [field.name for field in dataclasses.fields(Record)]
    assert parse_record(json.loads(full.text())) == full
    assert '\n  "schema": 2,\n' in one.text()


REQUIRED = [field.name for field in dataclasses.fields(Record) if field.default is dataclasses.MISSING]
OPTIONAL: dict[str, Any] = {
    "weights_digest": "sha256:" + "12" * 32,
    "checkpoint_load": {"dropped": ["head.weight"]},
    "method_source": {"mine.py": "sha256:" + "12" * 32},
    "package_digest": "sha256:" + "12" * 32,
    "cpu": "a processor, AVX2",
    "external_classes": ["mine.Callback"],
    "not_comparable": ["weights were averaged"],
    "image_notes": {"skipped: .svg": 1},
    "content_digests": {"test": "sha256:" + "12" * 32},
    "card_digests": {"task": "sha256:" + "34" * 32},
    "migrated_from": {"schema": "1"},
    "backbone_family": "vim",
    "efficiency": Efficiency(5, 7, 100, mergeable=True),
    "inactive_parameters": ["adapter.alpha"],
    "manifest_digest": "sha256:" + "56" * 32,
    "frozen_features": {"train": "pooled features of 5 images, 1 KiB"},
}


@settings(deadline=None)
@given(st.text())
def test_any_text_comes_back(note: str) -> None:
    record = make_record(data_notes=[note])
    text = record.text().encode("utf-8", errors="backslashreplace").decode("utf-8")
    assert parse_record(json.loads(text)).data_notes == [note]


def test_an_undecodable_file_name_comes_back_from_disk(tmp_path: Path) -> None:
    record = make_record(data_notes=["missing: \udce9t\udce9.jpg"])
    assert read_record(write_record(record, tmp_path)) == record


@pytest.mark.parametrize("path", sorted(HISTORIC.glob("*.json")), ids=lambda path: path.name)
def test_historic_records_load(path: Path) -> None:
    record = read_record(path)
    before, now = json.loads(path.read_text(encoding="utf-8")), record.to_json()
    renamed = {"lists": "splits", "tuned": "search"}
    assert [*(renamed.get(key, key) for key in before), "migrated_from"] == list(now)
    assert (now["run_id"], now["metrics"], now["config"]) == (before["run_id"], before["metrics"], before["config"])
    assert parse_record(now) == record


def test_the_historic_record_pins_what_a_digest_leaves_out() -> None:
    record = read_record(HISTORIC / "schema-1.json")
    later = {
        "model.grad_checkpointing",
        "model.compile",
        "model.cache_features",
        "data.pixel_cache",
    }  # no older record has them
    for key in CELL_EXCLUDED.keys() - later:
        node: Any = record.config
        for part in key.split("."):
            node = node[part]
    assert record.config_digest == "sha256:d78ed4a07fedf91566771744520f8afa28ba162546476fcc2139be94ef00a31c"
    assert record.setting_digest == "sha256:7f8459825d1d2ae1633646572fa453b5fe5d931f99d9543f5513785b99f470b7"


def flat_record(**changes: Any) -> dict[str, Any]:
    """Return the JSON of a record from before settings were grouped."""
    made = make_record().to_json()
    model = {**made["config"]["model"], "betas": [0.9, 0.999], "optimizer": None, "eps": None, "ema_decay": 0.5}
    data = {**made["config"]["data"], "resize": None, "flip": 1, "folds": None, "image_size": None}
    config = {**made["config"], "model": model, "data": data}
    digests = {"config_digest": config_digest(config), "setting_digest": setting_digest(config)}
    return {**made, "config": config, **digests, **changes}


def test_a_record_of_flat_settings_is_read_with_grouped_ones() -> None:
    record = parse_record(flat_record())
    model, data = record.config["model"], record.config["data"]
    assert model["optimizer"] == {"name": "adamw", "betas": [0.9, 0.999], "eps": 1e-8, "momentum": 0.9}
    assert (model["ema"], model["head"], data["allow_overlap"]) == ({"decay": 0.5, "evaluate": False}, "fresh", False)
    assert (data["image_size"], data["transform"]["resize"]) == (
        224,
        "squash",
    )  # of the protocol, which nulls stood for
    assert (data["augment"]["flip"], type(data["augment"]["flip"])) == (1.0, float)
    assert not {"betas", "eps", "ema_decay"} & {*model}
    assert record.migrated_from == {"schema": "2"}
    assert parse_record(record.to_json()) == record


def test_a_null_of_another_version_of_the_protocol_stays_unknown() -> None:
    data = parse_record(flat_record(protocol_version=99)).config["data"]
    assert (data["image_size"], data["transform"]["resize"]) == (None, None)


def test_an_edited_record_of_flat_settings_is_refused() -> None:
    edited = flat_record()
    edited["config"]["model"]["eps"] = 1e-3
    with pytest.raises(RecordError, match="'config_digest' does not belong to the config"):
        parse_record(edited)


# 7 of 10, by class: 4 of 6, 3 of 4 and none of none (balanced: 70.83), with all that is optional
SCORED = Metrics(
    top1=70.0,
    loss=0.75,
    correct=7,
    count=10,
    top5=90.0,
    balanced_accuracy=100 * (4 / 6 + 3 / 4) / 2,
    nll=0.75,
    ece=12.5,
    per_class=PerClass(correct=(4, 3, 0), count=(6, 4, 0)),
)
SEARCH = SearchSummary("default", "grid", 4, 4, "val200", LIST, LIST, ("model.learning_rate",))


def test_optional_scores_come_back_and_are_absent_where_they_are_not_known(tmp_path: Path) -> None:
    record = make_record(metrics=SCORED)
    assert read_record(write_record(record, tmp_path)) == record
    written = record.to_json()["metrics"]
    assert written["per_class"] == {"correct": [4, 3, 0], "count": [6, 4, 0]}
    assert list(written) == [field.name for field in dataclasses.fields(Metrics)]
    few = dataclasses.replace(SCORED, top5=None)
    assert "top5" not in make_record(metrics=few).to_json()["metrics"]
    assert parse_record(make_record(metrics=few).to_json()).metrics == few
    assert set(make_record().to_json()["metrics"]) == {"top1", "loss", "correct", "count"}


@pytest.mark.parametrize("key", ["top5", "balanced_accuracy", "nll", "ece"])
def test_a_score_that_is_no_number_is_not_written(tmp_path: Path, key: str) -> None:
    record = make_record(metrics=dataclasses.replace(SCORED, **{key: float("nan")}))
    with pytest.raises(RecordError, match=f"'metrics.{key}' is nan, which JSON cannot hold"):
        write_record(record, tmp_path)
    assert not list(tmp_path.rglob("*.json"))


def edit(data: dict[str, Any], dotted: str, value: Any) -> None:
    *folders, last = dotted.split(".")
    for folder in folders:
        data = data[folder]
    data[last] = value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("schema", 3, r"'schema' is 3; svp-bench \S+ reads the schemas 1 and 2"),
        ("sede", 1, "unknown record key 'sede'; did you mean 'seed'"),
        ("metrics.top2", 1, r"unknown record key 'metrics.top2'; did you mean 'top[15]'"),
        ("metrics.per_class.wrong", [], r"unknown record key 'metrics.per_class.wrong'; allowed: correct, count"),
        ("seed", "0", "'seed' must be int, not '0'"),
        ("seed", True, "'seed' must be int, not True"),
        ("task_version", 0, "'task_version' must be int >= 1, not 0"),
        ("task", "caltech101", "'task' must be '<suite>/<task>', not 'caltech101'"),
        ("suite", "demo", "'suite' is 'demo', but the task is 'vtab/caltech101'"),
        ("kind", "test", "'kind' must be one of final, selection, not 'test'"),
        ("status", "done", "'status' must be one of complete, unscored, truncated, failed, interrupted, not 'done'"),
        ("status", "failed", "'status_reason' is null; a run that is failed needs a reason"),
        ("status", "unscored", "'status' is unscored, but the record has scores"),
        ("created", "2026-01-31 12:00:00", "'created' must be UTC like 2026-01-31T12:00:00"),
        ("created", "2026-02-31T12:00:00+00:00", "'created' must be UTC like"),
        ("run_id", "../x", "'run_id' must be a name of letters"),
        ("dirty", 0, "'dirty' must be .*bool.* not 0"),
        ("data_status", "ok", "'data_status' must be one of as_card, different"),
        ("data_digest", None, "'data_digest' is null; a run that is complete has read its splits"),
        ("data_notes", "none", "'data_notes' must be a list, not 'none'"),
        ("splits", {"train": 1}, "'splits.train' must be str, not"),
        ("times.train_seconds", "12", "'times.train_seconds' must be float, not"),
        ("config", [], "'config' must be a mapping"),
        ("checkpoint_digest", "ab" * 32, "'checkpoint_digest' must be 'sha256:' and 64 hexadecimal digits"),
        ("checkpoint_digest", None, "'checkpoint_digest' is None for the checkpoint 'hub'"),
        ("checkpoint", "none", "'checkpoint_digest' is 'sha256:.*' for the checkpoint 'none'"),
        ("checkpoint_file", "/runs/last.ckpt", "'checkpoint_file' must be relative to the runs folder"),
        ("checkpoint_file", "C:\\runs\\last.ckpt", "'checkpoint_file' must be relative to the runs folder"),
        ("config.model.learning_rate", 0.5, "'config_digest' does not belong to the config"),
        ("config_digest", WEIGHTS, "'config_digest' does not belong to the config"),
        ("setting_digest", WEIGHTS, "'setting_digest' does not belong to the config: it should be sha256:"),
        ("search", {}, "the key 'search.name' is missing"),
        ("search", make_record(search=SEARCH).to_json()["search"], "'setting_digest' does not belong to the config"),
        ("parameters", {}, "the key 'parameters.trainable' is missing"),
        ("parameters", None, "'parameters' must be a mapping of keys, not None"),
        ("parameters.head", 1, "'parameters' do not add up: trainable 4760000, adapter 4757000, head 1"),
        ("parameters.total", 1, "'parameters' do not add up"),
        ("metrics", [], r"'metrics' must be a mapping.*, not \[\]"),
        ("metrics", {}, "'metrics' is empty; a complete record has its scores"),
        ("metrics.top1", 99.0, "'metrics.top1' is 99.0, but 7 of 10 are right"),
        ("metrics.loss", None, "'metrics.loss' must be float, not None"),
        ("metrics.correct", 11, "'metrics.correct' is 11 of only 10"),
        ("metrics.count", 0, "'metrics.count' must be int >= 1, not 0"),
        ("metrics.top5", 60.0, "'metrics.top5' is 60.0, less than top1 70.0"),
        ("metrics.top5", 101, "'metrics.top5' is 101.0, which is not a percentage"),
        ("metrics.top5", True, "'metrics.top5' must be float.*, not True"),
        ("metrics.balanced_accuracy", -1, "'metrics.balanced_accuracy' is -1.0, which is not a percentage"),
        ("metrics.balanced_accuracy", 71.0, "'metrics.balanced_accuracy' is 71.0, but metrics.per_class gives 70.83"),
        ("metrics.ece", "3", "'metrics.ece' must be float.*, not '3'"),
        ("metrics.ece", 100.5, "'metrics.ece' is 100.5, which is not a percentage"),
        ("metrics.nll", 0.5, "'metrics.nll' is 0.5, but metrics.loss, the same number, is 0.75"),
        ("metrics.per_class", [], r"'metrics.per_class' must be a mapping.*, not \[\]"),
        ("metrics.per_class", {"correct": []}, "the key 'metrics.per_class.count' is missing"),
        ("metrics.per_class.count", None, r"'metrics\.per_class\.count.*' must be "),
        ("metrics.per_class.count", [10, 0.0], r"'metrics\.per_class\.count.*' must be "),
        ("metrics.per_class.count", [11, -1], r"'metrics\.per_class\.count.*' must be "),
        ("metrics.per_class.count", [10, False], r"'metrics\.per_class\.count.*' must be "),
        ("metrics.per_class.count", [6, 4], "'metrics.per_class' has 3 classes in correct and 2 in count"),
        ("metrics.per_class.count", [6, 4, 1], "'metrics.per_class.count' adds up to 11, but metrics.count is 10"),
        ("metrics.per_class.correct", [5, 3, 0], "'metrics.per_class.correct' adds up to 8, but metrics.correct is 7"),
        ("metrics.per_class.correct", [2, 5, 0], "'metrics.per_class' has 5 of only 4 right in class 1"),
        ("correct", None, "'correct' is null; a complete final record has one bit for each test image"),
        ("correct.bits", "/wA=", "'correct.bits' has 8 ones, but metrics.correct is 7"),
        ("correct.bits", "/g==", "'correct.bits' does not fit: the packed bits are 1 bytes; 10 bits need 2"),
        ("correct.bits", "/gE=", "'correct.bits' does not fit: the packed bits have a one behind bit 10"),
        ("correct.count", 11, "'correct.count' is 11, but metrics.count is 10"),
        ("correct.encoding", "hex", "'correct.encoding' must be one of base64"),
    ],
)
def test_hand_edited_records_are_refused(tmp_path: Path, key: str, value: Any, message: str) -> None:
    path = write_record(make_record(metrics=SCORED), tmp_path)
    data = json.loads(path.read_text(encoding="utf-8"))
    edit(data, key, value)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(RecordError, match=message) as caught:
        read_record(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    records, problems = read_records(tmp_path)
    assert records == []
    assert [problem.path for problem in problems] == [path.relative_to(tmp_path).as_posix()]
    assert str(tmp_path) not in problems[0].reason


def test_a_load_report_and_a_method_source_make_another_cell_and_row() -> None:
    plain = make_record()
    loaded = dataclasses.replace(plain, checkpoint_load={"resized": ["pos_embed 14x14 -> 4x16"]})
    own = dataclasses.replace(plain, method_source={"mine.py": "sha256:" + "12" * 32})
    edited = dataclasses.replace(plain, method_source={"mine.py": "sha256:" + "13" * 32})
    assert plain.source_digest == ""
    assert len({record.source_digest for record in (plain, loaded, own, edited)}) == 4
    assert row_digest(plain) == plain.setting_digest
    assert len({row_digest(record) for record in (plain, loaded, own, edited)}) == 4


@pytest.mark.parametrize("key", REQUIRED)
def test_a_missing_key_is_named(key: str) -> None:
    data = make_record().to_json()
    del data[key]
    with pytest.raises(RecordError, match=f"here: (the key '{key}' is missing|'schema' is missing)"):
        parse_record(data, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON: Expecting value in line 1"),
        (b"\xff", "is not UTF-8 text"),
        (b"[]", r"the record must be a mapping of keys, not \[\]"),
        (b'{"schema": 1, "schema": 1}', "the key 'schema' is given twice"),
        (b'{"schema": NaN}', "is not JSON: NaN is not a number"),
        (b"[" * 100_000, "is nested too deeply"),
        (b"{}", "'schema' is missing"),
    ],
)
def test_files_that_are_no_records_are_problems(tmp_path: Path, content: bytes, message: str) -> None:
    good = make_record()
    path = write_record(good, tmp_path).with_name("bad.json")
    path.write_bytes(content)
    with pytest.raises(RecordError, match=message):
        read_record(path)
    records, problems = read_records(tmp_path)
    assert records == [good]
    assert [problem.path for problem in problems] == ["records/vtab/caltech101/bad.json"]


def test_a_record_in_another_place_is_a_problem(tmp_path: Path) -> None:
    path = write_record(make_record(), tmp_path)
    (path.parent / "copy.json").write_bytes(path.read_bytes())
    (path.parent / "notes.txt").write_text("mine", encoding="utf-8")
    records, problems = read_records(tmp_path)
    assert len(records) == 1
    assert problems[0].reason == f"is a copy of {path.relative_to(tmp_path).as_posix()} or was moved from there"
    assert problems[1].path == "records/vtab/caltech101/notes.txt"


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"x\.json: cannot be read: No such file"):
        read_record(tmp_path / "x.json")


def test_no_records_are_no_problem(tmp_path: Path) -> None:
    assert read_records(tmp_path / "nowhere") == ([], [])


@pytest.mark.parametrize("status", ["truncated", "failed", "interrupted"])
def test_runs_without_scores_can_be_written(tmp_path: Path, status: str) -> None:
    record = unscored(make_record(data_digest=None), status, "loss is NaN in step 12")
    assert read_record(write_record(record, tmp_path)) == record
    assert json.loads(record.text())["metrics"] == {}


def test_a_selection_record_needs_no_bits(tmp_path: Path) -> None:
    record = make_record(kind="selection", stage="select", correct=None)
    assert read_record(write_record(record, tmp_path)) == record


def test_random_weights_have_no_digest(tmp_path: Path) -> None:
    record = make_record(checkpoint="none", checkpoint_digest=None)
    assert read_record(write_record(record, tmp_path)) == record


# ---- files


def test_nothing_that_breaks_the_schema_is_written(tmp_path: Path) -> None:
    record = make_record(metrics=Metrics(50.0, 0.5, 5, 10))
    with pytest.raises(RecordError, match=r"record of vtab/caltech101 \(svp-.*\): 'correct.bits' has 7 ones"):
        write_record(record, tmp_path)
    with pytest.raises(RecordError, match=r"'metrics\.loss' is nan"):
        write_record(make_record(metrics=Metrics(70.0, float("nan"), 7, 10)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_another_runs_record_is_never_overwritten(tmp_path: Path) -> None:
    first = make_record()
    path = write_record(first, tmp_path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match="exists already; the record of another run is never overwritten"):
        write_record(dataclasses.replace(make_record(right=3), run_id=first.run_id), tmp_path)
    assert path.read_bytes() == before


CRASH = """
import os, sys
from synthetic_records import make_record
from svp_bench.records import store as files
files.os.replace = lambda *_: os._exit(9)
files.write_record(make_record(), sys.argv[1])
"""


def test_a_crash_before_the_rename_leaves_no_record(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, check=False
    )
    assert done.returncode == 9
    assert [path.suffix for path in tmp_path.rglob("*") if path.is_file()] == [".tmp"]
    assert read_records(tmp_path) == ([], [])


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(RecordError, match=r"cannot write results into .*: No space left.*--results_root DIR"):
        write_atomically(path, "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert path.read_text(encoding="utf-8") == "old"


def test_folder_and_file_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[bool] = []
    real: Callable[[int], None] = os.fsync
    monkeypatch.setattr(
        module.os, "fsync", lambda handle: (synced.append(Path(f"/dev/fd/{handle}").is_dir()), real(handle))
    )
    write_atomically(tmp_path / "file", "text")
    assert synced == [False, True]


@pytest.mark.parametrize("blocked", ["results", "results/records"])
def test_an_unwritable_folder_is_one_line(tmp_path: Path, blocked: str) -> None:
    root = tmp_path / "results"
    (tmp_path / blocked).parent.mkdir(exist_ok=True)
    (tmp_path / blocked).write_text("a file where a folder is needed", encoding="utf-8")
    for attempt in (lambda: check_writable(root), lambda: write_record(make_record(), root)):
        with pytest.raises(RecordError, match=r"cannot write results into .*records.*--results_root DIR") as caught:
            attempt()
        assert "\n" not in str(caught.value)


def test_check_writable_leaves_only_the_folder(tmp_path: Path) -> None:
    check_writable(tmp_path / "new")
    check_writable(tmp_path / "new")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["new", "new/records"]


# ---- the one allowed change


def test_an_unscored_record_may_become_complete(tmp_path: Path) -> None:
    record = make_record()
    path = write_record(unscored(record), tmp_path)
    assert replace_record(record, tmp_path) == path
    assert read_records(tmp_path) == ([record], [])


def test_a_complete_record_is_never_replaced(tmp_path: Path) -> None:
    record = make_record()
    write_record(record, tmp_path)
    with pytest.raises(RecordError, match="only an unscored record may become complete, not complete → complete"):
        replace_record(record, tmp_path)


def test_an_unscored_record_stays_unless_it_becomes_complete(tmp_path: Path) -> None:
    record = unscored(make_record())
    path = write_record(record, tmp_path)
    failed = unscored(record, "failed", "test crashed")
    with pytest.raises(RecordError, match="not unscored → failed"):
        replace_record(failed, tmp_path)
    assert read_record(path) == record


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"seed": 1}, "seed"),
        ({"checkpoint_digest": LIST}, "checkpoint_digest"),
        ({"protocol_version": 2}, "protocol_version"),
        ({"data_digest": WEIGHTS}, "data_digest"),
        ({"created": "2026-02-01T12:00:00+00:00"}, "created"),
    ],
)
def test_only_the_same_run_completes_a_record(tmp_path: Path, changes: dict[str, Any], key: str) -> None:
    record = make_record()
    path = write_record(unscored(record), tmp_path)
    before = path.read_bytes()
    with pytest.raises(RecordError, match=f"'{key}' of the run is"):
        replace_record(dataclasses.replace(record, **changes), tmp_path)
    assert path.read_bytes() == before


def test_a_record_that_is_not_there_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read: No such file"):
        replace_record(make_record(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_correct_of_counts_and_packs() -> None:
    correct = Correct.of(np.array([True, False, True]), "test", LIST)
    assert (correct.count, correct.split, correct.encoding) == (3, "test", "base64+packbits")
    assert unpack_bits(correct.bits, 3).tolist() == [True, False, True]


def test_the_bits_of_val_belong_to_a_selection_record() -> None:
    final = make_record()
    data = dataclasses.replace(final, val_correct=final.correct).to_json()
    with pytest.raises(RecordError, match="'val_correct' belongs to a selection record"):
        parse_record(data)
    select = dataclasses.replace(final, kind="selection", stage="select", correct=None, val_correct=final.correct)
    data = select.to_json()
    assert parse_record(data) == select
    data["val_correct"]["bits"] = "!"
    with pytest.raises(RecordError, match=r"'val_correct.bits' does not fit"):
        parse_record(data)
