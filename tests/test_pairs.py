"""`svp-bench table --compare`, recomputed from the records with SciPy."""

from __future__ import annotations

import dataclasses
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_error, command, run
from numpy.typing import NDArray
from scipy import stats
from synthetic_records import LIST, OTHER_LIST, make_record

from svp_bench.records.bits import unpack_bits
from svp_bench.records.record import Correct, Metrics, Record, SearchSummary
from svp_bench.records.store import write_record
from svp_bench.tables.build import load_table
from svp_bench.tables.pairwise import Pair, compare_pair, middle_p, render_pairs
from svp_bench.tasks.cards import load_suite, load_task

TASKS = load_suite("vtab").tasks
IMAGES = 200
SHARE = "model.method.init_args.share_layers"


def scored(
    task: str, method: str, seed: int, right: NDArray[np.bool_], split_digest: str = LIST, **fields: Any
) -> Record:
    """Return a record with these bits."""
    record = make_record(task, method, seed, **fields)
    correct, count = int(right.sum()), int(right.size)
    metrics = Metrics(top1=100 * correct / count, loss=0.5, correct=correct, count=count)
    return dataclasses.replace(record, metrics=metrics, correct=Correct.of(right, "test", split_digest))


def draw(methods: dict[str, float], seeds: int, tasks: list[str] = TASKS) -> list[Record]:
    """Return records with bits; a method's number is the share of images that it has right."""
    generator = np.random.default_rng(0)
    return [
        scored(task, method, seed, generator.random(IMAGES) < share)
        for task in tasks
        for method, share in methods.items()
        for seed in range(seeds)
    ]


def bits(record: Record) -> NDArray[np.bool_]:
    assert record.correct is not None
    return unpack_bits(record.correct.bits, record.correct.count)


def compare(root: Path, records: list[Record], first: str = "svp", second: str = "linear", *more: str) -> str:
    for record in records:
        write_record(record, root)
    return run("table", "--results_root", str(root), "--compare", first, second, *more).out


def lines_of(text: str) -> dict[str, list[str]]:
    """Task → the columns of its line."""
    lines = [line.replace("[", "").replace("]", "").replace(",", "").split() for line in text.splitlines()]
    return {line[0]: line[1:] for line in lines if line and f"vtab/{line[0]}" in TASKS}


def shown(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def exact(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    wins, losses = int((a & ~b).sum()), int((~a & b).sum())
    return float(stats.binomtest(wins, wins + losses).pvalue)


def test_every_number_is_recomputed(tmp_path: Path) -> None:
    records = draw({"svp": 0.75, "linear": 0.7}, 3)
    random.Random(1).shuffle(records)
    text = compare(tmp_path, records)
    by_run = {(record.task, record.method, record.seed): bits(record) for record in records}
    printed = lines_of(text)
    assert list(printed) == [task.split("/")[1] for task in TASKS]
    tests, combined, means = {}, {}, {}
    for task in TASKS:
        a, b = ([by_run[task, method, seed] for seed in range(3)] for method in ("svp", "linear"))
        differences = [100 * (x.mean() - y.mean()) for x, y in zip(a, b, strict=True)]
        means[task] = float(np.mean(differences))
        interval = stats.t.interval(0.95, 2, means[task], stats.sem(differences))
        line = printed[task.split("/")[1]]
        assert float(line[0]) == pytest.approx(means[task], abs=0.00501)
        assert [float(x) for x in line[1:3]] == pytest.approx(list(interval), abs=0.00501)
        assert line[3:6] == ["3", "too", "few"]
        tests[task] = sorted(exact(x, y) for x, y in zip(a, b, strict=True))
        # the noise of the images: each counts its mean over the seeds
        each = np.mean([x.astype(float) - y for x, y in zip(a, b, strict=True)], axis=0)
        each = np.concatenate([each, [1, -1]])  # Bonett and Price
        half = stats.norm.ppf(0.975) * 100 * each.std() / math.sqrt(IMAGES + 2)
        middle = 100 * each.mean()
        assert [float(x) for x in line[6:8]] == pytest.approx([middle - half, middle + half], abs=0.00501)
        assert line[8] == f"{shown(tests[task][0])}–{shown(tests[task][2])}"
        combined[task] = min(1.0, 1.5 * tests[task][1])
        assert line[9] == shown(combined[task])
    highest = 0.0
    for rank, task in enumerate(sorted(combined, key=lambda task: combined[task])):
        highest = max(highest, min(1.0, combined[task] * (len(TASKS) - rank)))
        assert printed[task.split("/")[1]][10] == shown(highest)
    flat = " ".join(text.split())
    assert flat.startswith("VTAB-1k: svp minus linear, in points")
    overall = float(np.mean(list(means.values())))
    assert f"Mean of 19 tasks: {overall:+.2f}, new seeds [" in flat
    assert "sign flip over 16 independent sources of images: p " in flat
    assert "Holm over 19 tasks." in flat
    assert not (tmp_path / "tables").exists()


def test_six_seeds_give_a_verdict(tmp_path: Path) -> None:
    records = draw({"svp": 0.9, "linear": 0.6}, 6, TASKS[:2])
    text = compare(tmp_path, records)
    assert {line[4] for line in lines_of(text).values()} == {"better"}
    assert "2 of 19 tasks: those that both rows have on the same images" in " ".join(text.split())
    assert "Mean of these 2 tasks: +" in text


def test_the_other_way_round_is_the_mirror_image(tmp_path: Path) -> None:
    records = draw({"svp": 0.8, "linear": 0.7}, 2, TASKS[:1])
    one = lines_of(compare(tmp_path, records))["cifar"]
    other = lines_of(run("table", "--results_root", str(tmp_path), "--compare", "linear", "svp").out)["cifar"]
    assert float(one[0]) == -float(other[0])
    assert (one[1], one[2]) == (other[2].removeprefix("-"), other[1].removeprefix("-")) or float(one[1]) == -float(
        other[2]
    )
    assert one[8:] == other[8:]


def test_bits_of_other_lists_are_not_compared_image_by_image(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    records = [
        scored("vtab/dtd", method, seed, generator.random(IMAGES) < 0.7, LIST if method == "svp" else OTHER_LIST)
        for method in ("svp", "linear")
        for seed in range(2)
    ]
    text = compare(tmp_path, records)
    line = lines_of(text)["dtd"]
    assert line[5:] == ["few", "–"]  # no column of test images, and none of their tests
    assert "the bits of the two rows are not of one split" in " ".join(text.split())
    assert "McNemar" not in text


def test_one_shared_seed_has_images_and_no_interval_over_seeds(tmp_path: Path) -> None:
    text = compare(tmp_path, draw({"svp": 0.8, "linear": 0.7}, 1, TASKS[:1]))
    line = lines_of(text)["cifar"]
    assert line[1:5] == ["–", "1", "too", "few"]
    assert "one shared seed, or differences that are all the same: the variance is unknown" in " ".join(text.split())
    (p,) = {line[7], line[8], line[9]}  # one test: its own p, and nothing to adjust
    assert float(p.removeprefix("<")) < 1


def test_rows_without_a_task_in_common(tmp_path: Path) -> None:
    text = compare(tmp_path, [make_record(TASKS[0], "svp"), make_record(TASKS[1], "linear")])
    assert "They share no task on the same images with a seed in common: nothing can be compared." in text


def test_random_weights_are_called_a_smoke_test(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(record, checkpoint="none", checkpoint_digest=None)
        for record in draw({"svp": 0.8, "linear": 0.7}, 2, TASKS[:1])
    ]
    assert "are a smoke test" in compare(tmp_path, records)


def test_rows_compare_within_each_section(tmp_path: Path) -> None:
    records = draw({"svp": 0.8, "linear": 0.7}, 2, TASKS[:1])
    records += [
        dataclasses.replace(record, backbone="vim_tiny_patch16_224", run_id=f"{record.run_id}-t") for record in records
    ]
    text = compare(tmp_path, records)
    assert text.count("svp minus linear, in points") == 2
    assert "vim_tiny_patch16_224" in text


def test_rows_of_different_tracks_do_not_compare(tmp_path: Path) -> None:
    search = SearchSummary("default", "grid", 4, 4, "val200", LIST, LIST, ("model.learning_rate",))
    for record in (make_record(search=search), make_record(method="linear")):
        write_record(record, tmp_path)
    outcome = command("table", "--results_root", str(tmp_path), "--compare", "svp", "linear")
    assert "'svp' and 'linear' are not in one section; rows compare under one protocol" in assert_error(outcome, 2)


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (("svq", "linear"), "--compare: unknown method or row 'svq'; did you mean 'svp'?"),
        (("svp", "linear"), "'svp' has 2 rows; name one of them: 'svp (share_layers=1)'; 'svp (share_layers=4)'"),
        (("linear", "linear"), "--compare: 'linear' and 'linear' are one row, 'linear'; name two"),
    ],
)
def test_names_that_do_not_fit_are_one_line(tmp_path: Path, names: tuple[str, str], text: str) -> None:
    for record in (make_record(), make_record(changes={SHARE: 4}), make_record(method="linear")):
        write_record(record, tmp_path)
    assert text in assert_error(command("table", "--results_root", str(tmp_path), "--compare", *names), 2)


def test_rows_are_named_by_their_labels(tmp_path: Path) -> None:
    records = [make_record(right=8), make_record(right=6, changes={SHARE: 4})]
    text = compare(tmp_path, records, "svp (share_layers=1)", "svp (share_layers=4)")
    assert "svp (share_layers=1) minus svp (share_layers=4), in points" in text
    assert lines_of(text)["caltech101"][0] == "+20.00"


@pytest.mark.parametrize("extra", [("--published",), ("--control", "svp"), ()])
def test_what_does_not_go_with_compare(tmp_path: Path, extra: tuple[str, ...]) -> None:
    names = ("svp", "linear") if extra else ("svp",)
    outcome = command("table", "--results_root", str(tmp_path), "--compare", *names, *extra)
    assert "--compare" in assert_error(outcome, 2)


# ---- one p of several seeds


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.2], 0.2), ([0.1, 0.3], 0.2), ([0.5, 0.1, 0.2], 0.3), ([0.01, 0.02, 0.5, 0.9], 0.04), ([0.9, 0.8, 0.7], 1.0)],
)
def test_the_middle_p(values: list[float], expected: float) -> None:
    assert middle_p(values) == pytest.approx(expected)


@pytest.mark.parametrize("shared", [0.0, 0.7, 1.0])
def test_the_middle_p_keeps_its_level_whatever_the_dependence(shared: float) -> None:
    generator = np.random.default_rng(0)
    common, own = generator.standard_normal((4000, 1)), generator.standard_normal((4000, 5))
    p = 2 * stats.norm.sf(abs(math.sqrt(shared) * common + math.sqrt(1 - shared) * own))
    assert np.mean([middle_p(list(row)) < 0.05 for row in p]) < 0.06


def test_no_p_where_no_outcome_over_the_tasks_could_reject() -> None:
    """Seven images divide the runs: p could be 1/64 on one task, and 19 times that after Holm's adjustment."""
    vtab = load_suite("vtab")

    def of(tasks: int) -> Pair:
        records = [
            make_record(task, method, 0, right, 100, task_version=load_task(task).version)
            for task in vtab.tasks[:tasks]
            for method, right in (("svp", 57), ("linear", 50))
        ]
        (pair,) = compare_pair([load_table(vtab, records)], "svp", "linear")
        return pair

    alone, first = of(1), vtab.tasks[0]
    assert alone.p == alone.holm == {first: pytest.approx(2 / 2**7)}
    assert of(3).holm == dict.fromkeys(vtab.tasks[:3], pytest.approx(3 * 2 / 2**7))
    for tasks in (4, 19):
        pair = of(tasks)
        assert not pair.p
        assert "McNemar p  " not in render_pairs([pair])
    records = [  # ten images divide the runs on the first task: it alone can be tested
        make_record(task, method, 0, right, 100, task_version=load_task(task).version)
        for number, task in enumerate(vtab.tasks)
        for method, right in (("svp", 57 if number else 60), ("linear", 50))
    ]
    (pair,) = compare_pair([load_table(vtab, records)], "svp", "linear")
    assert pair.holm == {vtab.tasks[0]: pytest.approx(2 / 2**10)}
