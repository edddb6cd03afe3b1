"""`svp-bench power`: how many seeds a claim needs, from the records at hand."""

from __future__ import annotations

import dataclasses
import math
import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import assert_error, command, run
from scipy import stats
from synthetic_records import make_record

from svp_bench.records.record import Record
from svp_bench.records.store import write_record
from svp_bench.tables.power import Noise, design_of
from svp_bench.tasks.cards import load_suite

TASKS = load_suite("vtab").tasks
SHARE = "model.method.init_args.share_layers"


def draw(seeds: int = 3, tasks: list[str] = TASKS) -> list[Record]:
    rng = random.Random(0)
    return [
        make_record(task, method, seed, 600 + rng.randint(-20, 20), 1000)
        for method in ("svp", "linear")
        for task in tasks
        for seed in range(seeds)
    ]


def written(root: Path, records: list[Record]) -> str:
    for record in records:
        write_record(record, root)
    return str(root)


def frame(records: list[Record]) -> pd.DataFrame:
    return pd.DataFrame(
        [(r.method, r.task, r.seed, r.metrics.top1) for r in records if r.metrics],
        columns=["method", "task", "seed", "top1"],
    )


def simulated(variances: np.ndarray, n: int, effect: float, level: float = 0.95) -> float:
    """Share of experiments whose Satterthwaite interval of the mean difference excludes zero."""
    generator = np.random.default_rng(0)
    draws = generator.standard_normal((4000, len(variances), n)) * np.sqrt(variances)[:, None] + effect
    parts = draws.var(axis=2, ddof=1) / n / len(variances) ** 2
    total = parts.sum(axis=1)
    df = total**2 / (parts**2 / (n - 1)).sum(axis=1)
    mean = draws.mean(axis=(1, 2))
    return float((abs(mean) > stats.t.ppf((1 + level) / 2, df) * np.sqrt(total)).mean())


def table_of(text: str) -> dict[int, list[float]]:
    """Seeds → the other columns of the table of power."""
    found = re.findall(r"^ *(\d+) +([01]\.\d{3}) +([01]\.\d{3}) +(\d+\.\d\d) +(\d+\.\d\d)$", text, re.MULTILINE)
    return {int(line[0]): [float(x) for x in line[1:]] for line in found}


def test_power_from_paired_differences_agrees_with_simulation(tmp_path: Path) -> None:
    records = draw()
    root = written(tmp_path, records)
    text = run("power", "--results_root", root, "--effect", "0.8", "--method", "svp", "--control", "linear").out
    wide = frame(records).pivot_table(index=["task", "seed"], columns="method", values="top1")
    variances = (wide["svp"] - wide["linear"]).groupby(level="task").var()
    power = table_of(text)
    assert list(power) == [3, 5, 10, 20]
    for n, (plain, cautious, detectable, careful) in power.items():
        assert plain == pytest.approx(simulated(variances.to_numpy(), n, 0.8), abs=0.05)
        assert cautious <= plain
        assert detectable <= careful
        assert simulated(variances.to_numpy(), n, detectable) == pytest.approx(0.8, abs=0.06)
    (needed, cautious) = map(int, re.findall(r"both methods: (\d+) \(plug-in\), (\d+) \(cautious\)", text)[0])
    assert needed <= cautious
    assert simulated(variances.to_numpy(), needed, 0.8) > 0.75
    assert needed == 2 or simulated(variances.to_numpy(), needed - 1, 0.8) < 0.82
    flat = " ".join(text.split())
    assert "Claim: two methods differ by 0.8 points in the mean of 19 tasks." in flat
    assert "differences of svp and linear, runs with the same seed; 38 degrees of freedom." in flat
    lines = {line.split()[0]: line.split()[1:] for line in text.splitlines() if f"vtab/{line.split(' ')[0]}" in TASKS}
    assert list(lines) == [task.split("/")[1] for task in TASKS]
    for task in TASKS:
        assert lines[task.split("/")[1]] == [f"{math.sqrt(variances[task]):.2f}", "2"]


def test_without_a_method_all_rows_are_pooled(tmp_path: Path) -> None:
    records = [r for r in draw(4) if r.method == "svp" or r.seed < 2]
    root = written(tmp_path, records)
    text = run("power", "--results_root", root, "--effect", "1").out
    by_cell = frame(records).groupby(["task", "method"])["top1"].agg(["var", "count"]).reset_index()
    by_cell["free"] = by_cell["count"] - 1
    for task, cells in by_cell.groupby("task"):
        std = math.sqrt((cells["var"] * cells["free"]).sum() / cells["free"].sum())
        assert re.search(rf"^{str(task).split('/')[1]} +{std:.2f} +4$", text, re.MULTILINE)
    assert (
        "runs of 2 rows, pooled task by task; runs of two methods are taken as independent; 76 degrees of freedom."
        in " ".join(text.split())
    )
    alone = run("power", "--results_root", root, "--effect", "1", "--method", "svp").out
    assert "the other method is taken to be as noisy, and independent; 57 degrees of freedom." in " ".join(
        alone.split()
    )


def test_tasks_without_replicated_seeds_borrow_the_others_variance(tmp_path: Path) -> None:
    some = set(TASKS[:4])
    records = [r for r in draw(3) if r.seed == 0 or r.task in some]
    text = run("power", "--results_root", written(tmp_path, records), "--effect", "1").out
    assert "Replicated seeds on 4 of 19 tasks; the others are taken to be as noisy" in " ".join(text.split())
    assert re.search(r"^svhn +– +0$", text, re.MULTILINE)
    assert re.search(r"^cifar +\d", text, re.MULTILINE)


def test_borrowed_variances_give_the_variance_of_the_whole_mean() -> None:
    variances = {"a": 1.0, "b": 4.0}
    tasks = ["a", "b", "c", "d", "e"]
    design = design_of(Noise(variances, dict.fromkeys(variances, 50), 1, ""), tasks, 0.95)
    assert design.variance == pytest.approx(5 * 2.5 / 25)  # five tasks of mean variance 2.5
    se = math.sqrt(design.variance / 20)  # n large enough for the normal law
    assert design.detectable(0.8, 20) == pytest.approx((1.96 + 0.8416) * se, rel=0.05)


def test_runs_of_one_method_have_half_the_variance_of_differences() -> None:
    variances = {"a": 1.0, "b": 4.0}
    design = design_of(Noise(variances, {"a": 2, "b": 2}, 2, ""), ["a", "b"], 0.95)
    assert design.parts == pytest.approx([2 * 1.0 / 4, 2 * 4.0 / 4])


def test_more_effect_needs_fewer_seeds_and_more_power_more(tmp_path: Path) -> None:
    root = written(tmp_path, draw(3, TASKS[:5]))

    def seeds(*more: str) -> int:
        text = run("power", "--results_root", root, *more).out
        return int(re.findall(r"both methods: (\d+) \(plug-in\)", text)[0])

    assert seeds("--effect", "2") <= seeds("--effect", "0.5") < seeds("--effect", "0.2")
    assert seeds("--effect", "0.5") < seeds("--effect", "0.5", "--power", "0.99")
    assert seeds("--effect", "0.5") < seeds("--effect", "0.5", "--level", "0.999")


def test_records_without_replicated_seeds_are_one_line(tmp_path: Path) -> None:
    root = written(tmp_path, draw(1, TASKS[:4]))
    for extra, whose in (
        ((), "no cell of any row"),
        (("--method", "svp"), "no cell of svp"),
        (("--method", "svp", "--control", "linear"), "no cell of svp and linear"),
    ):
        text = assert_error(command("power", "--results_root", root, "--effect", "1", *extra), 1)
        assert "no replicated seeds" in text
        assert whose in text
        assert "svp-bench sweep --seeds 0,1,2" in text


def test_no_records_at_all_are_one_line(tmp_path: Path) -> None:
    for extra in ((), ("--method", "svp"), ("--suite", "vtab")):
        outcome = command("power", "--results_root", str(tmp_path), "--effect", "1", *extra)
        assert "no replicated seeds" in assert_error(outcome, 1)


def test_replicated_runs_on_random_weights_do_not_count(tmp_path: Path) -> None:
    records = [dataclasses.replace(r, checkpoint="none", checkpoint_digest=None) for r in draw(3, TASKS[:4])]
    outcome = command("power", "--results_root", written(tmp_path, records), "--effect", "1")
    assert "on pre-trained weights" in assert_error(outcome, 1)


def test_other_seeds_on_both_sides_are_no_pairs(tmp_path: Path) -> None:
    records = [r for r in draw(4, TASKS[:4]) if (r.seed < 2) == (r.method == "svp")]
    root = written(tmp_path, records)
    outcome = command("power", "--results_root", root, "--effect", "1", "--method", "svp", "--control", "linear")
    assert "has two shared seeds" in assert_error(outcome, 1)
    assert "plug-in" in run("power", "--results_root", root, "--effect", "1").out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ((), "the following arguments are required: --effect"),
        (("--effect", "0"), "'0' is not a difference in points: above 0, at most 100"),
        (("--effect", "much"), "'much' is not a difference in points"),
        (("--effect", "nan"), "'nan' is not a difference in points"),
        (("--effect", "1", "--level", "95"), "'95' does not lie between 0 and 1; 95 % is 0.95"),
        (("--effect", "1", "--power", "0"), "'0' does not lie between 0 and 1"),
        (("--effect", "1", "--power", "0.05"), "--power 0.05 is no more than chance at --level 0.95"),
        (("--effect", "1", "--suite", "vtba"), "unknown suite 'vtba'; did you mean 'vtab'"),
        (("--effect", "1", "--method", "svq"), "--method: unknown method or row 'svq'; did you mean 'svp'?"),
        (("--effect", "1", "--method", "svp", "--control", "x"), "--control: unknown method or row 'x'"),
        (("--effect", "1", "--method", "svp", "--control", "svp"), "are both 'svp'; name two rows"),
        (("--effect", "1", "--control", "linear"), "--control NAME needs --method NAME"),
        (("--effect", "1", "--method", "lora"), "'lora' has 2 rows; name one of them: 'lora (share_layers=1)'"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path: Path, arguments: tuple[str, ...], text: str) -> None:
    records = [*draw(2, TASKS[:4])[:8], make_record(method="linear"), make_record(method="lora")]
    root = written(tmp_path, [*records, make_record(method="lora", changes={SHARE: 4})])
    assert text in assert_error(command("power", "--results_root", root, *arguments), 2)


def test_the_help_names_every_option() -> None:
    text = " ".join(run("power", "--help").out.split())
    for part in ("--effect POINTS", "--suite", "--method ROW", "--control ROW", "--level", "--power", "--results_root"):
        assert part in text


def test_the_subcommand_needs_no_torch(tmp_path: Path) -> None:
    root = written(tmp_path, draw(2, TASKS[:4])[:8])
    code = (
        "import sys; from svp_bench.cli.main import main; status = main(sys.argv[1:]);"
        "print([name for name in ('torch', 'lightning', 'timm', 'pandas') if name in sys.modules], status)"
    )
    for arguments in (["power", "--effect", "1"], ["table"], ["table", "--compare", "svp", "linear"]):
        if "--compare" in arguments:
            write_record(make_record(TASKS[0], "linear", 0), tmp_path)
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments, "--results_root", root],
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
