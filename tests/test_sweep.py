"""Sweeps without training: declarations, samplers, the rule, selected configs, and every order of events."""

from __future__ import annotations

import dataclasses
import io
import json
import queue
import random
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_error, command
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from svp_bench.core.errors import ConfigError, RecordError, UnavailableError, UsageError
from svp_bench.records.bits import pack_bits
from svp_bench.records.digests import canonical_digest, flat
from svp_bench.records.selection import (
    FOLD_KEYS,
    SelectedConfig,
    read_selected_config,
    selected_config_path,
    write_selected_config,
)
from svp_bench.records.selection_rule import Trial, choose, decide, edges
from svp_bench.stats.inference import one_standard_error
from svp_bench.sweep.jobs import Job, Outcome
from svp_bench.sweep.local_pool import Done, Event, Pool, WorkerProcess
from svp_bench.sweep.progress import ProgressView
from svp_bench.sweep.scheduler import CellJobs, Running, Sweep
from svp_bench.sweep.search import Plan, SearchSpace, load_search, make_sampler

LR = "model.learning_rate"
WD = "model.weight_decay"
WEIGHTS = "sha256:" + "ab" * 32


def declare(folder: Path, text: str = "", sampler: str = "grid", budget: int = 4, spaces: str | None = None) -> Path:
    spaces = spaces or f"{{default: {{{LR}: [1.0e-3, 1.0e-2], {WD}: [0.1]}}}}"
    path = folder / "search.yaml"
    head = f"name: small\nversion: 1\nsampler: {sampler}\nbudget: {budget}\nspaces: {spaces}\n"
    path.write_text(head + text, encoding="utf-8")
    return path


def trial(score: float | None, trainable: int = 10, **values: Any) -> Trial:
    scores = () if score is None else (score,)
    status = "complete" if score is not None else "the loss became nan"
    return Trial(values or {LR: 1e-3}, ("run",), scores, trainable if scores else None, status)


# ---- declarations


def test_the_shipped_search_is_one_that_every_method_can_use() -> None:
    from svp_bench.methods import METHODS
    from svp_bench.sweep.runner import Runner

    search = load_search("default")
    assert load_search("configs/search/default.yaml").digest == search.digest
    runner = Runner()
    for entry in METHODS:
        job = Job("vtab/dtd", entry.name, 0, "select", common=("--results_root", "r", "--runs_root", "u"))
        keys = [dimension.key for dimension in search.space(entry.name)]
        recipe = dict(flat(runner.resolved(job).config))
        settings_ = make_sampler(search, entry.name, {key: recipe[key] for key in keys}, "x")([])
        assert 1 < len(settings_) <= search.budget
        for values in settings_:  # every setting of the grid is one that the method takes
            config = runner.resolved(dataclasses.replace(job, values=values)).config
            assert config["model"]["method"]["class_path"].startswith("svp_bench.methods.")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"sampler": "gird"}, r"search.yaml:3: 'sampler' must be one of grid, random, tpe, not 'gird'"),
        ({"budget": 0}, r"search.yaml:4: 'budget' must be int >= 1, not 0"),
        ({"budget": 1}, r"the grid of default has 2 settings, more than the budget of 1"),
        ({"spaces": "{default: {learning_rate: [1.0]}}"}, r"learning_rate is not a config key; write it dotted"),
        ({"spaces": "{default: {data.task: [vtab/dtd]}}"}, r"data.task is not searched"),
        ({"spaces": f"{{default: {{{LR}: [1e-3]}}}}"}, r"1e-3 is a text in YAML; as a number write 0.001"),
        ({"spaces": f"{{default: {{{LR}: [1.0, 1.0]}}}}"}, r"has a value twice"),
        ({"spaces": f"{{default: {{{LR}: {{low: 1.0, high: 2.0}}}}}}"}, r"is a range, and a grid needs a list"),
        ({"spaces": f"{{default: {{{LR}: []}}}}"}, r"must be a list with at least one entry"),
        ({"spaces": f"{{default: {{{LR}: [[1.0]]}}}}"}, r"is a number, a text, true, false or null"),
        ({"text": "seeds: [0, 0]\n"}, r"a seed is given twice"),
        ({"text": "seeds: [-1]\n"}, r"'seeds\[0\]' must be a whole number of 0 to"),
        ({"text": "seeds: [0]\nnested: true\n"}, r"trains with the seed of the final run; leave seeds or nested out"),
        ({"text": "nested: 1\n"}, r"'nested' must be bool"),
        ({"text": "folds: 1\n"}, r"'folds' must be auto, none, leave_one_out or a whole number of at least 2, not 1"),
        ({"text": "folds: many\n"}, r"'folds' must be auto, none, leave_one_out or"),
        ({"text": "folds: 2.5\n"}, r"'folds' must be auto, none, leave_one_out or"),
        ({"text": "folds: leave_one_out\nrepeats: 2\n"}, r"leave_one_out has one division only"),
        ({"text": "repeats: 0\n"}, r"'repeats' must be int >= 1"),
        ({"spaces": "{default: {data.cross_validation.fold: [0, 1]}}"}, r"data.cross_validation.fold is not searched"),
        ({"text": "sedes: [1]\n"}, r"unknown search key 'sedes'; did you mean 'seeds'\?"),
    ],
)
def test_a_wrong_declaration_is_one_line(tmp_path: Path, text: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected) as caught:
        load_search(str(declare(tmp_path, **text)))
    assert "\n" not in str(caught.value)


def test_a_search_that_is_not_there() -> None:
    with pytest.raises(
        UsageError, match=r"unknown search 'configs/search/defualt.yaml'; did you mean 'configs/search/def"
    ):
        load_search("configs/search/defualt.yaml")


def test_a_range_needs_low_below_high(tmp_path: Path) -> None:
    for inside, expected in (
        ("low: 2.0, high: 1.0", "low < high"),
        ("low: 0, high: 1.0, log: true", "begins above 0"),
        ("low: a, high: 1.0", "needs numbers"),
        ("low: 1.0, high: 2.0, log: 3", "log must be true or false"),
    ):
        path = declare(tmp_path, sampler="tpe", spaces=f"{{default: {{{LR}: {{{inside}}}}}}}")
        with pytest.raises(ConfigError, match=expected):
            load_search(str(path))


def test_the_digest_is_that_of_the_declaration_not_of_its_layout(tmp_path: Path) -> None:
    one = load_search(str(declare(tmp_path)))
    path = declare(tmp_path)
    path.write_text("# a comment\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    assert load_search(str(path)).digest == one.digest
    assert load_search(str(declare(tmp_path, budget=5))).digest != one.digest


# ---- samplers


def test_a_grid_begins_with_the_recipes_own_setting(tmp_path: Path) -> None:
    search = load_search(str(declare(tmp_path)))
    sampler = make_sampler(search, "svp", {LR: 1e-2, WD: 0.1}, "")
    assert sampler([]) == [{LR: 1e-2, WD: 0.1}, {LR: 1e-3, WD: 0.1}]
    outside = make_sampler(search, "svp", {LR: 5.0, WD: 0.1}, "")
    assert [values[LR] for values in outside([])] == [5.0, 1e-3, 1e-2]


def test_a_default_outside_of_a_full_grid_is_refused(tmp_path: Path) -> None:
    search = load_search(str(declare(tmp_path, budget=2)))
    with pytest.raises(
        ConfigError, match=r"the grid of svp and its default setting are 3 settings, more than the budget"
    ):
        make_sampler(search, "svp", {LR: 5.0, WD: 0.1}, "")


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_a_sampled_search_resumes_anywhere(tmp_path: Path, sampler: str) -> None:
    pytest.importorskip("optuna")
    space = f"{{default: {{{LR}: {{low: 1.0e-5, high: 1.0e-1, log: true}}, {WD}: [0.1, 0.2]}}}}"
    search = load_search(str(declare(tmp_path, sampler=sampler, budget=9, spaces=space)))
    default = {LR: 1e-3, WD: 0.1}

    def whole(stop: int) -> list[dict[str, Any]]:
        finished: list[tuple[Mapping[str, Any], float | None]] = []
        one = make_sampler(search, "svp", default, "task")
        while settings_ := one(finished):
            if len(finished) >= stop:  # the process was killed: a new sampler gets the finished trials only
                one = make_sampler(search, "svp", default, "task")
                settings_ = one(finished)
            finished += [(values, None if values[LR] > 5e-2 else -abs(values[LR] - 1e-2)) for values in settings_]
        return [dict(values) for values, _ in finished]

    first = whole(99)
    assert len(first) == search.budget
    assert first[0] == default
    assert first == whole(3) == whole(1)
    assert len({values[LR] for values in first}) == search.budget
    other = make_sampler(search, "svp", default, "another task")([(default, 1.0)])
    assert other[0] != first[1]


def test_without_optuna_one_line_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    search = load_search(str(declare(tmp_path, sampler="tpe")))
    with pytest.raises(UnavailableError, match=r"pip install 'svp-bench\[search\]'"):
        make_sampler(search, "svp", {LR: 1e-3, WD: 0.1}, "")


# ---- the rule


def test_within_one_standard_error_the_default_wins() -> None:
    chosen, error, reason = choose([trial(70.0), trial(72.0), trial(60.0)], 200)
    assert chosen == 0
    assert error == pytest.approx(one_standard_error(72.0, 200))
    assert 3 < error < 3.5
    assert "the default setting, 70.00, wins" in reason


def test_beyond_it_the_cheapest_of_the_best_wins() -> None:
    trials = [trial(50.0), trial(72.0, trainable=100), trial(70.5, trainable=5), trial(71.0, trainable=5), trial(None)]
    chosen, _, reason = choose(trials, 200)
    assert chosen == 3
    assert "3 of 4 settings are within one standard error" in reason
    assert choose([trial(50.0), trial(72.0)], 200)[0] == 1


def test_best_on_val_follows_val_and_breaks_ties_by_the_order() -> None:
    chosen, error, reason = choose([trial(70.0), trial(72.0), trial(None), trial(72.0)], 200, "best_on_val")
    assert chosen == 1
    assert error == pytest.approx(one_standard_error(72.0, 200))
    assert reason == "72.00 on val, the best of 3 settings, the first of 2 that reach it"
    assert choose([trial(70.0), trial(69.5)], 200, "best_on_val")[::2] == (0, "70.00 on val, the best of 2 settings")


def test_a_rule_needs_a_score() -> None:
    with pytest.raises(UsageError, match="no setting of the search has a score"):
        choose([trial(None)], 200)


@given(
    scores=st.lists(st.one_of(st.none(), st.integers(0, 200)), min_size=1, max_size=12),
    sizes=st.lists(st.integers(1, 5), min_size=12, max_size=12),
)
@settings(max_examples=100, deadline=None)
def test_what_is_chosen_is_never_worse_than_one_standard_error(scores: list[int | None], sizes: list[int]) -> None:
    trials = [trial(None if s is None else s / 2, trainable=n) for s, n in zip(scores, sizes, strict=False)]
    if all(s is None for s in scores):
        return
    chosen, error, _ = choose(trials, 200)
    best = max(t.mean for t in trials if t.mean is not None)
    mean = trials[chosen].mean
    assert mean is not None
    assert mean >= best - error
    if chosen != 0:
        assert trials[0].mean is None or trials[0].mean < best - error
        cheaper = [t for t in trials if t.mean is not None and (t.trainable or 0) < (trials[chosen].trainable or 0)]
        assert all(t.mean is not None and t.mean < best - error for t in cheaper)


# ---- selected configs

DECLARED: dict[str, Any] = {
    "name": "small",
    "version": 1,
    "sampler": "grid",
    "budget": 4,
    "seeds": [0],
    "rule": "one_standard_error",
    "spaces": {"default": {LR: [1e-3, 1e-2]}},
}


def a_selected_config(**changes: Any) -> SelectedConfig:
    selected = SelectedConfig(
        task="vtab/dtd",
        method="svp",
        search=DECLARED,
        search_digest=canonical_digest(DECLARED),
        context={"trainer": {"max_epochs": 3}},
        checkpoint_digest=WEIGHTS,
        data_digest="sha256:" + "34" * 32,
        selected_on="val200",
        count=200,
        trials=(trial(50.0, **{LR: 1e-3}), trial(60.0, **{LR: 1e-2})),
        chosen=1,
        standard_error=one_standard_error(60.0, 200),
        reason=choose([trial(50.0), trial(60.0)], 200)[2],
        created="2026-01-31T12:00:00+00:00",
    )
    return dataclasses.replace(selected, **changes)


def test_a_selected_config_is_written_once(tmp_path: Path) -> None:
    path = write_selected_config(a_selected_config(), tmp_path)
    assert path == selected_config_path(tmp_path, "small", a_selected_config().search_digest, "vtab/dtd", "svp")
    assert read_selected_config(path) == a_selected_config()
    before = path.read_bytes()
    assert write_selected_config(a_selected_config(created="2026-02-01T12:00:00+00:00"), tmp_path) == path  # the same
    with pytest.raises(RecordError, match="holds another selected config already"):
        write_selected_config(a_selected_config(context={"trainer": {"max_epochs": 4}}), tmp_path)
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_record_summarizes_the_search() -> None:
    search = a_selected_config().summary()
    assert search.keys == (LR,)
    assert (search.budget, search.trials, search.selected_on) == (4, 2, "val200")
    assert search.selected_config == a_selected_config().digest


PLAIN: list[dict[str, Any]] = json.loads(a_selected_config().text())["trials"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"schema": "svp-bench/choice-9"}, "is not a selected config"),
        ({"schema": "svp-bench/choice-2"}, "'search': the key 'rule_version' is missing"),
        ({"search": {**DECLARED, "rule_version": 2}}, "unknown declaration key 'rule_version'"),
        ({"chosen": 2}, "'chosen' is 2, and there are 2 trials"),
        ({"chosen": None}, "'chosen' must be int"),
        ({"reasons": "x"}, r"unknown selected config key 'reasons'; did you mean 'reason'\?"),
        ({"trials": [{}]}, r"the key 'trials\[0\].values' is missing"),
        ({"trials": []}, "'chosen' is 1"),
        ({"search": {"name": "x", "version": 1, "sampler": "grid"}}, "'search': the key 'budget' is missing"),
        ({"search": {**DECLARED, "budget": 500}}, "'search_digest' is not that of the declaration"),
        (
            {"search": {**DECLARED, "spaces": {"default": {LR: [9.0]}}}},
            "'search_digest' is not that of the declaration",
        ),
        ({"chosen": 0, "reason": "mine"}, "'chosen' is trial 1, and by its rule trial 2 wins"),
        ({"reason": "mine"}, "'standard_error' or 'reason' is not what the trials give"),
        ({"trials": PLAIN[1:], "chosen": 0}, "not the default setting and then the declared grid"),
        (
            {"trials": [PLAIN[0], {**PLAIN[1], "values": {LR: 5.0}}]},
            "not the default setting and then the declared grid",
        ),
        ({"trials": [{**PLAIN[0], "run_ids": [], "scores": [], "status": "gone"}, PLAIN[1]]}, "trial 1 has 0 runs"),
        ({"trials": [{**PLAIN[0], "status": "gone"}, PLAIN[1]]}, "trial 1 is 'gone' and has 1 score"),
        ({"trials": [{**PLAIN[0], "scores": [50.2]}, PLAIN[1]]}, "not a whole number of images"),
        ({"checkpoint_digest": 3}, "'checkpoint_digest' must be str"),
    ],
)
def test_an_edited_selected_config_is_one_line(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = tmp_path / "selected config.json"
    path.write_text(json.dumps({**json.loads(a_selected_config().text()), **change}), encoding="utf-8")
    with pytest.raises(RecordError, match=expected) as caught:
        read_selected_config(path)
    assert "\n" not in str(caught.value)


# ---- selected configs of version 2: image by image


def votes(*right: str, loss: float = 1.0, trainable: int = 10, **values: Any) -> Trial:
    """A trial of runs whose images are right ("1") or not ("0")."""
    bits = [np.array([sign == "1" for sign in run]) for run in right]
    return Trial(
        values or {LR: 1e-3},
        tuple(f"run{number}" for number in range(len(right))),
        tuple(100 * int(one.sum()) / len(one) for one in bits),
        trainable,
        "complete",
        tuple(loss for _ in right),
        tuple(pack_bits(one) for one in bits),
        tuple(len(one) for one in bits),
    )


LOST = Trial({LR: 1e-3}, ("",), (), None, "rank is at most 64")


def test_ties_go_to_the_lower_loss_then_to_the_cheaper_then_to_the_earlier() -> None:
    """`vpt_deep` on digits-5shot: three settings with 7 of 10 right; the first, the worst on test, was taken."""
    seven, eight = "1111111000", "1111111100"
    tied = [votes(seven, loss=2.0), votes(seven, loss=0.9, trainable=99), votes(seven, loss=1.1), LOST]
    found = decide(tied, 10, "best_on_val")
    assert (found.chosen, found.best, found.ties) == (1, 1, 3)
    assert "reached by 3 settings, of which the lowest val loss decides: 0.9000" in found.reason
    cheaper = [votes(seven, trainable=5), votes(seven, trainable=4), votes(seven, trainable=4)]
    assert decide(cheaper, 10, "best_on_val").chosen == 1
    assert decide([*tied, votes(eight, loss=9.0)], 10, "best_on_val").chosen == 4


def test_one_standard_error_is_that_of_the_paired_difference() -> None:
    """Equal accuracies can differ on no image or on all: only the pairs say how far apart two settings are."""
    best = votes("1" * 30 + "0" * 10)
    near, far = votes("1" * 29 + "0" * 11), votes("1" * 20 + "0" * 20)
    assert decide([near, best], 40, "one_standard_error").chosen == 0
    assert decide([far, best], 40, "one_standard_error").chosen == 1  # 10 images, all to one side
    crossed = votes("0" * 10 + "1" * 18 + "0" * 2 + "1" * 10)  # 28 right, 22 images differ, 12 to one side: within
    assert decide([crossed, best], 40, "one_standard_error").chosen == 0
    found = decide([far, votes("1" * 29 + "0" * 11, trainable=5), best], 40, "one_standard_error")
    assert (found.chosen, found.best) == (1, 2)
    assert "the cheapest setting" in found.reason
    d = np.array([0] * 29 + [1] + [0] * 10)
    assert found.standard_error == pytest.approx(100 * d.std(ddof=1) / np.sqrt(40))


def test_folds_are_pooled_by_image_whatever_their_sizes() -> None:
    images = ((0, 3), (1, 2, 4))
    one, other = votes("11", "100"), votes("10", "110")
    assert one.mean == other.mean == 60
    assert decide([one, votes("11", "110")], 5, "best_on_val", images).chosen == 1
    twice = decide([votes("11", "100", "10", "111"), votes("10", "110", "11", "111")], 5, "best_on_val", images * 2)
    d = np.array([0, 0, 1, 0, 0])  # how much more often the second is right: times right are 2 2 2 1 1 and 2 2 1 1 1
    assert twice.chosen == 1
    assert twice.standard_error == pytest.approx(50 * d.std(ddof=1) / np.sqrt(5))


@pytest.mark.parametrize(
    ("tried", "chosen", "expected"),
    [
        ([1e-3, 1e-2, 1e-1], 2, ("model.learning_rate = 0.1 (largest tried)",)),
        ([1e-3, 1e-2, 1e-1], 0, ("model.learning_rate = 0.001 (smallest tried)",)),
        ([1e-3, 1e-2, 1e-1], 1, ()),
        ([1e-3, 1e-2], 1, ("model.learning_rate = 0.01 (largest tried)",)),
        ([1e-3], 0, ()),
    ],
)
def test_the_end_of_a_grid_is_reported(tried: list[float], chosen: int, expected: tuple[str, ...]) -> None:
    trials = [votes("11" if number == chosen else "10", **{LR: rate}) for number, rate in enumerate(tried)]
    assert edges(trials, decide(trials, 2, "best_on_val")) == expected


def test_a_larger_value_that_failed_was_tried_and_zero_is_no_end() -> None:
    trials = [votes("11", **{LR: 1e-1}), votes("10", **{LR: 1e-2}), dataclasses.replace(LOST, values={LR: 1.0})]
    assert edges(trials, decide(trials, 2, "best_on_val")) == ()
    trials = [votes("11", **{WD: 0.0}), votes("10", **{WD: 0.1}), votes("10", **{WD: 0.2})]
    assert edges(trials, decide(trials, 2, "best_on_val")) == ()
    trials = [votes("11", **{"model.method.init_args.position": name}) for name in ("prefix", "spread", "both")]
    assert edges(trials, decide(trials, 2, "best_on_val")) == ()


def searched(folder: Path, text: str, plan: Plan, seeds: tuple[int, ...] = (0,)) -> tuple[SearchSpace, list[Path]]:
    """Run a search in a pool with random results; return its declaration and its selected config files."""
    search = load_search(str(declare(folder, text=text)))
    sweep = Sweep(cells(1, plan)[:1], seeds, (), folder, search=search)
    sweep.run(RandomPool(random.Random(0), 2, 0, 0, 0))
    assert sweep.blocked == []
    return search, sorted((folder / "selected_configs").rglob("*.json"))


def test_a_nested_search_selects_for_each_seed(tmp_path: Path) -> None:
    _, paths = searched(tmp_path, "folds: 5\n", Plan(folds=5, repeats=1), (0, 7))
    assert [path.name for path in paths] == ["linear-seed0.json", "linear-seed7.json"]
    for path, seed in zip(paths, (0, 7), strict=True):
        selected = read_selected_config(path)
        assert (selected.search_seed, selected.seeds, selected.nested) == (seed, (seed,), True)
        assert (selected.folds, selected.repeats, selected.count) == (5, 1, LABELLED)
        assert [len(trial.run_ids) for trial in selected.trials] == [5, 5]
        assert selected.selected_on == "trainval (5 folds)"
        search = selected.summary()
        assert (search.nested, search.folds, search.trials, search.tried) == (True, 5, 2, 2)


def test_a_search_for_all_seeds_repeats_its_folds(tmp_path: Path) -> None:
    search, paths = searched(tmp_path, "nested: false\nfolds: 3\n", Plan(folds=3, repeats=2), (0, 7))
    selected = read_selected_config(*paths)
    assert (search.repeats, selected.search_seed, selected.repeats) == (2, None, 2)
    assert [len(trial.run_ids) for trial in selected.trials] == [6, 6]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"chosen": 1}, "by its rule trial"),
        ({"ties": 9}, "'ties' or 'at_edge' is not what the trials give"),
        ({"at_edge": []}, "'ties' or 'at_edge' is not what the trials give"),
        ({"images": [[0]]}, "'images' has not one entry for each fold and repeat"),
        ({"search_seed": None}, "'search_seed' is that of a nested search"),
        ({"search_seed": "x"}, "'search_seed' must be int"),
        ({"schema": "svp-bench/choice-1"}, "unknown declaration key"),
        ({"folds": 4}, "'images' has not one entry"),
    ],
)
def test_an_edited_selected_config_of_version_2(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    _, (path,) = searched(tmp_path, "folds: 5\n", Plan(folds=5, repeats=1))
    data = json.loads(path.read_text(encoding="utf-8"))
    if "chosen" in change:
        change = {"chosen": 1 - data["chosen"]}
    path.write_text(json.dumps({**data, **change}), encoding="utf-8")
    with pytest.raises(RecordError, match=expected) as caught:
        read_selected_config(path)
    assert "\n" not in str(caught.value)


def test_an_edited_trial_of_version_2_is_one_line(tmp_path: Path) -> None:
    _, (path,) = searched(tmp_path, "folds: 5\n", Plan(folds=5, repeats=1))
    data = json.loads(path.read_text(encoding="utf-8"))
    first = data["trials"][0]
    for change, expected in (
        ({"right": [pack_bits(np.ones(5, dtype=bool))] * 5}, "and the bits have 5 right|do not fit"),
        ({"losses": [-1.0] * 5}, "is not a cross entropy"),
        ({"counts": [5] * 5}, "'counts' that are not the images of its folds"),
        ({"right": first["right"][:4]}, "lacks 'right' or 'losses' of a run"),
        ({"right": 3}, "'trials\\[0\\].right' must be"),
    ):
        edited = {**data, "trials": [{**first, **change}, data["trials"][1]]}
        path.write_text(json.dumps(edited), encoding="utf-8")
        with pytest.raises(RecordError, match=expected):
            read_selected_config(path)


def test_an_impossible_setting_fails_its_trial_and_the_search_goes_on(tmp_path: Path) -> None:
    """It used to wait for somebody to take it out of the grid."""

    class Picky(RandomPool):
        def outcome(self, job: Job) -> Outcome:
            if job.stage == "select" and job.values[LR] == 1e-2:
                return Outcome("failed", reason="rank is at most 64", refused=True)
            return super().outcome(job)

    search = load_search(str(declare(tmp_path)))
    sweep = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search, retries=0)
    lines: list[str] = []
    sweep.run(Picky(random.Random(0), 1, 0, 0, 0), lines.append)
    assert sweep.blocked == []
    selected = read_selected_config(next((tmp_path / "selected_configs").rglob("*.json")))
    assert [trial.status for trial in selected.trials] == ["complete", "rank is at most 64"]
    assert (len(selected.trials), selected.completed) == (2, 1)
    assert [ended.job.stage for ended in sweep.done].count("final") == 1
    assert any("1 setting of 2 failed" in line for line in lines)


def test_a_selected_config_for_another_run_is_refused(tmp_path: Path) -> None:
    path = str(write_selected_config(a_selected_config(), tmp_path))
    fit = ["fit", "--config", "configs/vtab/dtd.yaml", "--selected_config", path]
    for arguments, expected in (
        (
            ["fit", "--config", "configs/vtab/svhn.yaml", "--selected_config", path],
            "was selected for the task 'vtab/dtd', not for",
        ),
        ([*fit, "--method", "linear"], "was selected for the method 'svp', not for 'linear'"),
        ([*fit, "--model.learning_rate", "1"], "sets model.learning_rate"),
        ([*fit, "--trainer.max_epochs", "9"], "was selected with"),
        ([*fit, "--selected_config", path], "--selected_config was given twice"),
        (
            ["fit", "--config", "configs/vtab/dtd.yaml", "--selected_config", "nowhere.json"],
            "no file 'nowhere.json'",
        ),
    ):
        assert expected in assert_error(command(*arguments), 2)


# ---- the order of things


LABELLED = 23


class RandomPool(Pool):
    """A pool that ends jobs in any order, in any way."""

    def __init__(self, dice: random.Random, slots: int, dies: float, fails: float, claims: float) -> None:
        self.slots, self.what = slots, "random results"
        self.dice, self.dies, self.fails, self.claims = dice, dies, fails, claims
        self.running: list[Job] = []
        self.ran: list[Job] = []
        self.deaths: dict[str, int] = {}
        self.stopped = False

    def submit(self, job: Job, *, retry: bool) -> None:
        assert len(self.running) < self.slots
        self.running.append(job)

    def wait(self, seconds: float) -> list[Event]:
        if not self.running:
            return []
        job = self.running.pop(self.dice.randrange(len(self.running)))
        if self.stopped:
            return [Done(job, Outcome("stopped"))]
        chance = self.dice.random()
        if chance < self.dies and self.deaths.get(job.key, 0) < 2:
            self.deaths[job.key] = self.deaths.get(job.key, 0) + 1
            return [Done(job, Outcome("died", reason="killed"))]
        if chance < self.dies + self.claims:
            return [Done(job, Outcome("claimed"))]
        self.ran.append(job)
        return [Done(job, self.outcome(job))]

    def outcome(self, job: Job) -> Outcome:
        fixed = random.Random(dataclasses.replace(job, selected=None).key)  # what a run gives follows from it alone
        if fixed.random() < self.fails:
            return Outcome("failed", reason="the loss became nan", run_id="r")
        folds, fold, _ = (int(job.values.get(key, 0)) for key in FOLD_KEYS)
        images = tuple(range(fold % folds, LABELLED, folds)) if folds else None
        count = 200 if images is None else len(images)
        right = np.array([fixed.random() < 0.7 for _ in range(count)])
        return Outcome(
            "complete",
            top1=100 * int(right.sum()) / count,
            count=count,
            trainable=fixed.randrange(5),
            selected_on="val200",
            run_id="r",
            loss=fixed.random(),
            right=pack_bits(right),
            images=images,
            divided="trainval" if folds else None,
        )

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        pass


def cells(method_count: int = 2, plan: Plan | None = None) -> list[CellJobs]:
    names = ["linear", "full", "svp"][:method_count]
    return [
        CellJobs(task, name, name, {}, {LR: 1e-3, WD: 0.1}, {"a": 1}, WEIGHTS, "sha256:" + "34" * 32, plan or Plan())
        for task in ("vtab/dtd", "vtab/svhn")
        for name in names
    ]


@given(seed=st.integers(0, 2**32), slots=st.integers(1, 5))
@settings(max_examples=40, deadline=None)
def test_the_outcome_does_not_depend_on_the_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int, slots: int
) -> None:
    monkey = pytest.MonkeyPatch()
    monkey.setattr("svp_bench.sweep.scheduler._CLAIM_PAUSE", 0.0)
    folder = tmp_path_factory.mktemp("sweep")
    text = ("seeds: [0, 1]\n", "nested: true\n", "seeds: [3]\nrepeats: 2\n")[seed % 3]
    search = load_search(str(declare(folder, text=text)))
    plan = Plan(folds=5, repeats=search.repeats) if seed % 2 else Plan()
    ends = []
    for name, pool in (
        ("quiet", RandomPool(random.Random(0), 1, 0, 0.2, 0)),
        ("wild", RandomPool(random.Random(seed), slots, 0.2, 0.2, 0.2)),
    ):
        sweep = Sweep(cells(plan=plan), (0, 1, 2), ("--x",), folder / name, search=search)
        sweep.run(pool)
        assert len({job.key for job in pool.ran}) == len(pool.ran)  # nothing is run twice
        selected_configs = {}
        for path in sorted((folder / name).rglob("*.json")):
            selected = read_selected_config(path)
            selected_configs[path.relative_to(folder / name)] = dataclasses.replace(selected, created="")
        done = sorted(json.dumps({**ended.job.to_json(), "selected": None}) for ended in sweep.done)
        ends.append((selected_configs, done, sorted(cell.task + cell.label for cell in sweep.blocked)))
        finals = [job for job in pool.ran if job.stage == "final"]
        assert all(job.selected is not None and Path(job.selected).is_file() for job in finals)
        assert sweep.left == 0
    monkey.undo()
    assert ends[0] == ends[1]


def test_a_sweep_that_stops_leaves_the_rest_for_later(tmp_path: Path) -> None:
    pool = RandomPool(random.Random(0), 2, 0, 0, 0)
    sweep = Sweep(cells(), (0, 1), (), tmp_path)
    sweep.run(pool, asked_to_stop=lambda: len(pool.ran) >= 3)
    assert len(sweep.done) == 3
    assert sweep.stopping
    assert len(sweep.due) + len(sweep.stopped) == 8 - 3


def test_the_view_shows_counts_best_score_and_time_left(tmp_path: Path) -> None:
    class Timed(RandomPool):
        def outcome(self, job: Job) -> Outcome:
            if job.stage == "final" or job.values[WD] == 0.3:
                return Outcome("failed", reason="the loss became nan", run_id="r", seconds=99.0)
            scored = super().outcome(job)
            return dataclasses.replace(scored, top1=50.0 if job.values[LR] == 1e-3 else 62.5, seconds=10.0)

    space = f"{{default: {{{LR}: [1.0e-3, 1.0e-2], {WD}: [0.1, 0.3]}}}}"
    search = load_search(str(declare(tmp_path, spaces=space)))
    sweep = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search)
    shown = io.StringIO()
    with ProgressView(Console(file=shown, force_terminal=True, width=100), sweep, "2 workers") as view:

        def tick() -> None:
            view.tick()
            view._progress.refresh()

        sweep.run(Timed(random.Random(0), 1, 0, 0, 0), view.report, tick)
        assert not any("on val" in line for line in view._progress.lines)  # the search is over
    text = shown.getvalue()
    for fact in ("1 failed", "best on val so far: 62.50 % (vtab/dtd, linear, seed 0)", "left", "2 workers"):
        assert fact in text, fact


def test_the_time_left_weights_jobs_by_method_and_stage(tmp_path: Path) -> None:
    sweep = Sweep(cells(2)[:2], (0, 1, 2), (), tmp_path)
    view = ProgressView(Console(file=io.StringIO()), sweep, "")
    assert view.seconds_left() is None
    for seconds in (10.0, 1000.0, 5.0):  # linear, full, and one that was there already
        job = next(job for job in sweep.due if (job.method == "full") == (seconds == 1000.0))
        sweep.due.remove(job)
        sweep.done.append(Done(job, Outcome("complete", seconds=seconds, found=seconds == 5.0)))
    assert [job.method for job in sweep.due] == ["linear", "full", "full"]
    assert view.seconds_left() == 10 + 2 * 1000
    job = sweep.due.pop()
    sweep.running[job.key] = Running(job, time.monotonic() - 400)
    assert view.seconds_left() == pytest.approx(10 + 1000 + 600, abs=5)


def test_a_process_that_always_dies_is_given_up(tmp_path: Path) -> None:
    class Deadly(RandomPool):
        def wait(self, seconds: float) -> list[Event]:
            return [Done(self.running.pop(), Outcome("died", reason="its process ended by signal SIGKILL"))]

    sweep = Sweep(cells(1)[:1], (0,), (), tmp_path, retries=2)
    sweep.run(Deadly(random.Random(0), 1, 0, 0, 0))
    assert [ended.outcome.status for ended in sweep.failed] == ["died"]


@pytest.mark.parametrize("how", ["failed", "died"])
def test_a_setting_does_not_lose_for_what_is_not_its_doing(how: str, tmp_path: Path) -> None:
    """A trial that failed before it trained, or was killed, leaves no record: its cell waits, nothing is selected."""

    class Broken(RandomPool):
        def outcome(self, job: Job) -> Outcome:
            lost = len(self.ran) == 2
            return Outcome(how, reason="no configs folder") if lost else super().outcome(job)

    search = load_search(str(declare(tmp_path, text="nested: false\n")))
    sweep = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search, retries=0)
    sweep.run(Broken(random.Random(0), 1, 0, 0, 0))
    assert not list(tmp_path.rglob("linear.json"))
    assert [job for job in sweep.done if job.job.stage == "final"] == []
    reason = sweep.blocked[0].blocked or ""
    assert reason.startswith("nothing is selected, since the trial ")
    assert "left no record: no configs folder; fix that and run the same command again" in reason
    again = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search)
    again.run(RandomPool(random.Random(0), 1, 0, 0, 0))
    assert (again.blocked, len(list(tmp_path.rglob("linear.json")))) == ([], 1)


def test_a_selected_config_on_other_weights_blocks_its_cell(tmp_path: Path) -> None:
    search = load_search(str(declare(tmp_path, text="nested: false\n")))
    sweep = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search)
    sweep.run(RandomPool(random.Random(0), 1, 0, 0, 0))
    assert sweep.done
    again = dataclasses.replace(cells(1)[0], checkpoint_digest="sha256:" + "00" * 32)
    assert "was selected on other weights" in (
        Sweep([again], (0,), (), tmp_path, search=search).blocked[0].blocked or ""
    )


def test_an_edited_selected_config_blocks_its_cell(tmp_path: Path) -> None:
    search = load_search(str(declare(tmp_path, text="nested: false\n")))
    Sweep(cells(1)[:1], (0,), (), tmp_path, search=search).run(RandomPool(random.Random(0), 1, 0, 0, 0))
    (path,) = tmp_path.rglob("linear.json")
    blocked = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search).blocked
    assert "contradicts the records of its trials: trial 1" in (blocked[0].blocked or "")  # the pool writes no records
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "chosen": 1 - data["chosen"]}), encoding="utf-8")
    blocked = Sweep(cells(1)[:1], (0,), (), tmp_path, search=search).blocked
    assert "by its rule trial" in (blocked[0].blocked or "")
    assert "a selected config is not edited" in (blocked[0].blocked or "")


def test_jobs_survive_json() -> None:
    job = Job("vtab/dtd", "svp", 3, "select", {LR: 0.1, "model.method.init_args.paths": "both"}, None, ("--a", "b c"))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    assert job.arguments()[-4:] == ["--model.learning_rate", "0.1", "--model.method.init_args.paths", "both"]


# ---- the command line


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--methods svp", "no tasks: give --suite vtab, or --tasks"),
        ("--suite vtba --methods svp", "did you mean 'vtab'?"),
        ("--suite vtab --methods svpp", "did you mean 'svp'?"),
        ("--suite vtab --methods svp,svp", "svp is given twice"),
        ("--suite vtab --methods svp, --seeds 0", "none of them empty"),
        ("--suite vtab --methods svp --seeds 0,x", "'x' is not a whole number"),
        ("--suite vtab --tasks dtt --methods svp", "did you mean 'vtab/dtd'?"),
        ("--tasks vtab/dtd --methods svp --workers 0", "'0' is not a whole number of at least 1"),
        ("--tasks vtab/dtd --methods svp --shard 2/2", "--shard: '2/2' is not i/n"),
        ("--tasks vtab/dtd --methods svp --gpu_fraction 2 --engine ray", "--gpu_fraction: '2' is not 0.01 to 1"),
        ("--tasks vtab/dtd --methods svp --gpu_fraction 0.5", "belong to --engine ray"),
        ("--tasks vtab/dtd --methods svp --method linear", "a sweep takes --methods"),
        ("--tasks vtab/dtd --methods svp --seed_everything 1", "use --seeds 0,1,2"),
        ("--tasks vtab/dtd --methods svp --data.stage select", "--data.stage is the sweep's own"),
        ("--tasks vtab/dtd --methods svp --trainer.limit_train_batches 2", "makes truncated runs"),
        ("--tasks vtab/dtd --methods svp --search nothing.yaml", "unknown search 'nothing.yaml'"),
        ("--tasks vtab/dtd --methods svp --model.learning_rat 1", "did you mean"),
    ],
)
def test_a_wrong_sweep_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: str, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in assert_error(command("sweep", *arguments.split()), 2)


def test_no_data_no_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = assert_error(command("sweep", "--tasks", "vtab/dtd", "--methods", "linear", "--model.checkpoint", "none"), 1)
    assert "none of the tasks can run" in line
    assert "svp-bench data draw" in line


def test_a_slurm_array_has_an_element_a_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = command("sweep", "--suite", "vtab", "--methods", "svp,linear", "--seeds", "0,1", "--emit", "slurm")
    assert done.status == 0, done.err
    script = (tmp_path / "runs" / "slurm" / "sweep.sbatch").read_text(encoding="utf-8")
    assert "#SBATCH --array=0-37" in script
    assert '--shard "$SLURM_ARRAY_TASK_ID/38"' in script
    assert "--emit" not in script
    import subprocess

    assert subprocess.run(["bash", "-n", "runs/slurm/sweep.sbatch"], check=False).returncode == 0


def test_a_worker_that_dies_at_its_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("raise ImportError('broken on purpose')\n")
    messages: queue.Queue[Mapping[str, Any]] = queue.Queue()
    worker = WorkerProcess(messages.put, tmp_path / "log", environment={"PYTHONPATH": str(tmp_path)})
    ended = messages.get(timeout=60)
    worker.wait(10)
    assert ended["event"] == "ended"
    assert "with status 1: ImportError: broken on purpose" in ended["how"]
