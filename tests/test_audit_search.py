"""`svp-bench audit` of a nested search in folds: edited, dropped and repeated parts fail."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from synthetic_records import LIST, OTHER_LIST, WEIGHTS
from test_audit import DAY, RATE, TASK, edited, failures, record

from svp_bench.records.digests import canonical_digest, cell_config
from svp_bench.records.record import Correct, Metrics, Record
from svp_bench.records.selection import (
    FOLD_KEYS,
    SelectedConfig,
    context_of,
    selected_config_path,
)
from svp_bench.records.selection_rule import Trial, decide, edges
from svp_bench.records.store import record_path, write_atomically, write_record
from svp_bench.tasks.cards import load_protocol

FOLDS, PER_FOLD, SEED = 5, 200, 1
RATES = {1e-3: 0.6, 3e-3: 0.75, 1e-2: 0.4}  # learning rate → share of held-out images classified correctly
DECLARED: dict[str, Any] = {
    "name": "rates",
    "version": 1,
    "sampler": "grid",
    "budget": 3,
    "seeds": [],
    "rule": "best_on_val",
    "rule_version": 2,
    "folds": FOLDS,
    "repeats": 1,
    "small_val": 50,
    "nested": True,
    "spaces": {"svp": {RATE: list(RATES)}},
}


def fold_record(rate: float, fold: int, *, number: int = 0, fold_seed: int = SEED, seed: int = SEED) -> Record:
    """Return the record of one fold of a trial."""
    right = np.arange(PER_FOLD) < round(PER_FOLD * RATES[rate])
    splits = load_protocol("vtab-final").splits("select", FOLDS, fold, fold_seed)
    made = record(
        int(1e5 * rate) + 10_000 * fold + number,
        {"data.stage": "select", RATE: rate, **dict(zip(FOLD_KEYS, (FOLDS, fold, fold_seed), strict=True))},
        "10:00:00",
        seed=seed,
        count=100_000,
        kind="selection",
        stage="select",
        splits=splits,
        metrics=Metrics(100 * int(right.sum()) / PER_FOLD, 1.5 - RATES[rate], int(right.sum()), PER_FOLD),
        correct=None,
        data_digest=OTHER_LIST,
    )
    return dataclasses.replace(made, val_correct=Correct.of(right, splits["val"], LIST))


def trial_of(rate: float, runs: list[Record]) -> Trial:
    scores = [run.metrics for run in runs]
    assert all(scores)
    return Trial(
        {RATE: rate},
        tuple(run.run_id for run in runs),
        tuple(run.metrics.top1 for run in runs if run.metrics),
        runs[0].parameters.trainable,
        "complete",
        tuple(run.metrics.loss for run in runs if run.metrics),
        tuple(run.val_correct.bits for run in runs if run.val_correct),
        tuple(PER_FOLD for _ in runs),
    )


def decided(selected: SelectedConfig) -> SelectedConfig:
    """Return `selected config` with what its rule makes of its trials, as a careful cheater would write it."""
    found = decide(selected.trials, selected.count, selected.search["rule"], selected.images)
    return dataclasses.replace(
        selected,
        search_digest=canonical_digest(selected.search),
        chosen=found.chosen,
        standard_error=found.standard_error,
        reason=found.reason,
        ties=found.ties,
        at_edge=edges(selected.trials, found),
    )


def nested_search(
    root: Path,
    twist: Callable[[SelectedConfig], SelectedConfig] = lambda selected: selected,
    final_seed: int = SEED,
    **declared: Any,
) -> Path:
    """Write a search in folds for seed 1, its selected config and the final run; return the record of that run."""
    runs = {rate: [fold_record(rate, fold) for fold in range(FOLDS)] for rate in RATES}
    for one in (run for folds in runs.values() for run in folds):
        write_record(one, root)
    search = {**DECLARED, **declared}
    selected = twist(
        decided(
            SelectedConfig(
                task=TASK,
                method="svp",
                search=search,
                search_digest="",
                context=context_of(cell_config(runs[1e-3][0].config), [RATE]),
                checkpoint_digest=WEIGHTS,
                data_digest=OTHER_LIST,
                selected_on=f"train800val200 ({FOLDS} folds)",
                count=FOLDS * PER_FOLD,
                trials=tuple(trial_of(rate, folds) for rate, folds in runs.items()),
                chosen=0,
                standard_error=0.0,
                reason="",
                created=f"{DAY}T11:00:00+00:00",
                search_seed=SEED,
                folds=FOLDS,
                repeats=1,
                images=tuple(tuple(range(f * PER_FOLD, (f + 1) * PER_FOLD)) for f in range(FOLDS)),
            )
        )
    )
    path = selected_config_path(root, "rates", selected.search_digest, TASK, "svp", final_seed)
    write_atomically(path, selected.text())
    return write_record(record(5100, dict(selected.values), search=selected.summary(), seed=final_seed), root)


def of_trial(number: int, **changes: Any) -> Callable[[SelectedConfig], SelectedConfig]:
    """Return an edit of one trial, after which the rule is applied again."""

    def twist(selected: SelectedConfig) -> SelectedConfig:
        trials = list(selected.trials)
        trials[number] = dataclasses.replace(trials[number], **changes)
        return decided(dataclasses.replace(selected, trials=tuple(trials)))

    return twist


def test_a_sound_search_in_folds_passes(tmp_path: Path) -> None:
    path = nested_search(tmp_path)
    assert failures(path) == []


def record_path_of(final: Path, rate: float, fold: int = 0) -> Path:
    path = record_path(fold_record(rate, fold), final.parents[3])
    assert path.is_file()
    return path


def one_fold_less(selected: SelectedConfig) -> SelectedConfig:
    cut = tuple(
        dataclasses.replace(
            trial,
            run_ids=trial.run_ids[:-1],
            scores=trial.scores[:-1],
            losses=(trial.losses or ())[:-1],
            right=(trial.right or ())[:-1],
            counts=(trial.counts or ())[:-1],
        )
        for trial in selected.trials
    )
    parts = {"folds": FOLDS - 1, "images": selected.images[:-1], "count": selected.count - PER_FOLD}
    return decided(dataclasses.replace(selected, trials=cut, selected_on="train800val200 (4 folds)", **parts))


@pytest.mark.parametrize("declared", [FOLDS, "auto"])
def test_a_dropped_fold_is_seen(tmp_path: Path, declared: int | str) -> None:
    path = nested_search(tmp_path, one_fold_less, folds=declared, small_val=500)
    assert any("selected in 4 folds" in text for text in failures(path))


def test_folds_where_val_is_large_are_seen(tmp_path: Path) -> None:
    """`auto` takes folds only where val has fewer images than `small_val`: caltech101 has 200."""
    assert failures(nested_search(tmp_path / "small", folds="auto", small_val=500)) == []
    path = nested_search(tmp_path / "large", folds="auto", small_val=50)
    assert any("val has 200 images" in text for text in failures(path))


def test_a_dropped_trial_is_seen(tmp_path: Path) -> None:
    path = nested_search(tmp_path, lambda selected: decided(dataclasses.replace(selected, trials=selected.trials[:-1])))
    assert any("declared grid" in text for text in failures(path))


def test_a_trial_called_failed_is_seen(tmp_path: Path) -> None:
    lost: dict[str, Any] = {"status": "failed", "scores": (), "losses": None, "right": None, "counts": None}
    path = nested_search(tmp_path, of_trial(1, **lost))
    assert any("stated as failed" in text for text in failures(path))
    path = nested_search(tmp_path / "unnamed", of_trial(1, **lost, run_ids=("",) * FOLDS))
    assert any("selected config leaves out" in text for text in failures(path))


def test_a_trial_run_again_with_another_division_is_seen(tmp_path: Path) -> None:
    again = fold_record(3e-3, 0, fold_seed=7)
    write_record(again, tmp_path)
    first = fold_record(3e-3, 0).run_id
    names = (again.run_id, *(fold_record(3e-3, fold).run_id for fold in range(1, FOLDS)))
    assert first not in names
    found = failures(nested_search(tmp_path, of_trial(1, run_ids=names)))
    assert any(again.run_id in text for text in found)
    assert any(first in text and "leaves out" in text for text in found)


def test_a_second_draw_of_a_fold_is_seen(tmp_path: Path) -> None:
    again = fold_record(3e-3, 0, number=1)
    write_record(again, tmp_path)
    assert any(again.run_id in text and "leaves out" in text for text in failures(nested_search(tmp_path)))


def test_folds_in_another_order_are_seen(tmp_path: Path) -> None:
    names = tuple(fold_record(3e-3, fold).run_id for fold in (1, 0, 2, 3, 4))
    assert any("trial 2" in text for text in failures(nested_search(tmp_path, of_trial(1, run_ids=names))))


def test_edited_bits_losses_and_files_are_seen(tmp_path: Path) -> None:
    path = nested_search(tmp_path / "loss", of_trial(0, losses=(0.4,) * FOLDS))
    assert any(": loss is " in text for text in failures(path))
    path = nested_search(tmp_path / "file")
    (selected,) = (tmp_path / "file" / "selected_configs").rglob("*.json")
    selected.write_text(selected.read_text(encoding="utf-8").replace("11:00:00", "10:59:00"), encoding="utf-8")
    assert any("the selected_config of the" in text for text in failures(path))
    path = nested_search(tmp_path / "score")
    edited(record_path_of(path, 3e-3), metrics__loss=0.8)
    assert any(": loss is " in text for text in failures(path))


def test_the_selected_config_of_one_seed_is_not_that_of_another(tmp_path: Path) -> None:
    path = nested_search(tmp_path, final_seed=2)
    assert any("is that of seed 1, and the run has seed 2" in text for text in failures(path))
