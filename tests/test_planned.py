"""Planned comparisons: results, rule, missing records, and messages about the file."""

from __future__ import annotations

import csv
import dataclasses
import functools
import itertools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import assert_error, command, run
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from synthetic_records import LIST, OTHER_LIST, make_record, unscored

from svp_bench.core.errors import ConfigError, UsageError
from svp_bench.methods.build import list_backbones
from svp_bench.records.record import Record
from svp_bench.records.store import write_record
from svp_bench.stats.significance import holm
from svp_bench.tables.build import load_table
from svp_bench.tables.model import Table
from svp_bench.tables.plan import Outcome, Plan, Planned, read_plan
from svp_bench.tables.planned import add_plan, outcomes_of, planned_notes
from svp_bench.tasks.cards import load_suite, load_task

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "results" / "reference" / "comparisons.yaml"
DEMO = load_suite("demo")
VIM, VIT = "vim_nano_patch8_64", "vit_nano_patch8_64"
SEEDS = (0, 1, 2)
METHODS = ("svp", "adapter", "lora")
COMPARISONS = (
    Planned(("svp", "adapter"), (VIM,)),
    Planned(("svp", "lora"), (VIM,), "Is SVP better than LoRA?"),
    Planned(("svp", "lora"), (VIM, VIT)),
)
PLAN = Plan("demo", SEEDS, 1.0, COMPARISONS)
TARGETS = "model.method.init_args.targets"
SOURCE_SIZES = (3, 1, 1, 1, 1, 1)  # the three tasks of digits share their images


def record(task: str, method: str, backbone: str, seed: int, right: int, **more: Any) -> Record:
    changes = {"model.backbone": backbone, "model.method.init_args": {}, **more.pop("changes", {})}
    fields = {"backbone": backbone, "protocol": DEMO.protocol, "task_version": load_task(task).version, **more}
    return make_record(task, method, seed, right, 1000, changes, **fields)


def draw(lead: Callable[[str, str], int], number: int = 0) -> list[Record]:
    """Return records of all tasks and seeds on both backbones; `lead(method, backbone)` is in images of 1000."""
    generator = np.random.default_rng(number)
    found: list[Record] = []
    for task in DEMO.tasks:
        base = int(generator.integers(400, 800))
        for backbone in (VIM, VIT):
            for method in METHODS:
                shift = int(generator.integers(-5, 6))
                for seed in SEEDS:
                    right = base + lead(method, backbone) + shift + int(generator.integers(-3, 4))
                    found.append(record(task, method, backbone, seed, right))
    return found


@functools.cache
def clear_records() -> tuple[Record, ...]:
    return tuple(draw(clear))


def clear(method: str, backbone: str) -> int:
    """SVP leads adapter by 8 points and LoRA by 5 on Vim; LoRA leads on the ViT."""
    return {"svp": 100, "adapter": 20, "lora": 50 if backbone == VIM else 140}[method]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a results folder with the records of `clear`."""
    folder = tmp_path_factory.mktemp("results")
    for one in clear_records():
        write_record(one, folder)
    return folder


def table_of(records: list[Record]) -> Table:
    return load_table(DEMO, records)


def outcomes(records: list[Record], plan: Plan = PLAN) -> tuple[Outcome, ...]:
    return outcomes_of(plan, table_of(records))


def values(records: list[Record], method: str, backbone: str) -> np.ndarray[Any, Any]:
    """Return top-1 in percent, shape (tasks, seeds)."""
    by_key = {(r.task, r.seed): r for r in records if (r.method, r.backbone) == (method, backbone)}
    return np.array([[m.top1 for s in SEEDS if (m := by_key[task, s].metrics)] for task in DEMO.tasks])


def clustered(by_task: np.ndarray[Any, Any]) -> tuple[float, float, float]:
    """Return mean, half of the 95 % interval and p: CR2 over the sources of the demo suite, by the closed form."""
    shares = np.array(SOURCE_SIZES) / 8
    ends = np.cumsum((0, *SOURCE_SIZES))
    sums = np.array([(by_task - by_task.mean())[a:b].sum() / 8 for a, b in itertools.pairwise(ends)])
    se = math.sqrt((sums**2 / (1 - shares)).sum())
    odds = shares**2 / (1 - shares)
    df = 1 / ((shares**2).sum() + odds.sum() ** 2 - (odds**2).sum())
    return by_task.mean(), stats.t.ppf(0.975, df) * se, 2 * stats.t.sf(abs(by_task.mean()) / se, df)


# ------------------------------------------------------------------------------------------------------------ results


def test_estimates_intervals_p_and_holm_by_brute_force() -> None:
    records = [*clear_records()]
    rng = np.random.default_rng(3)
    found = outcomes([records[i] for i in rng.permutation(len(records))])
    svp, adapter, lora = (values(records, method, VIM) for method in METHODS)
    svp_vit, lora_vit = (values(records, method, VIT) for method in ("svp", "lora"))
    expected = [svp - adapter, svp - lora, (svp - lora) - (svp_vit - lora_vit)]
    p = []
    for one, by_seed in zip(found, expected, strict=True):
        mean, half, p_one = clustered(by_seed.mean(1))
        assert one.new_tasks is not None
        assert one.new_seeds is not None
        assert (one.new_tasks.value, one.new_tasks.low, one.new_tasks.high) == pytest.approx(
            (mean, mean - half, mean + half)
        )
        assert one.p == pytest.approx(p_one)
        parts = by_seed.var(1, ddof=1) / 3 / 64
        assert one.new_seeds.se == pytest.approx(math.sqrt(parts.sum()))
        assert (one.missing, one.failed, one.seeds) == ((), (), (3, 3))
        p.append(p_one)
    order = np.argsort(p)
    adjusted = np.maximum.accumulate([(3 - i) * p[j] for i, j in enumerate(order)])
    assert [found[j].holm for j in order] == pytest.approx(list(np.minimum(adjusted, 1)))
    assert [one.verdict for one in found] == ["finding"] * 3
    assert [one.new_tasks.value > 0 for one in found if one.new_tasks] == [True, True, True]


@pytest.mark.parametrize(("lead", "verdict"), [(8, "undecided"), (-8, "undecided"), (12, "finding"), (-12, "finding")])
def test_a_finding_needs_the_smallest_difference_in_either_direction(lead: int, verdict: str) -> None:
    """0.8 and 1.2 points, with hardly any noise."""
    jitter = {task: number % 2 for number, task in enumerate(DEMO.tasks)}
    records = [
        record(task, method, VIM, seed, 500 + (lead + jitter[task] if method == "svp" else 0))
        for task in DEMO.tasks
        for method in ("svp", "adapter")
        for seed in SEEDS
    ]
    (one,) = outcomes(records, dataclasses.replace(PLAN, comparisons=COMPARISONS[:1]))
    assert one.holm is not None
    assert one.holm < 0.01
    assert one.verdict == verdict


def test_exactly_the_smallest_difference_is_enough() -> None:
    lead = dict.fromkeys(DEMO.tasks, 10) | {"demo/count": 11, "demo/size": 9}
    records = [
        record(task, method, VIM, seed, 500 + (lead[task] if method == "svp" else 0))
        for task in DEMO.tasks
        for method in ("svp", "adapter")
        for seed in SEEDS
    ]
    (one,) = outcomes(records, dataclasses.replace(PLAN, comparisons=COMPARISONS[:1]))
    assert one.new_tasks is not None
    assert one.new_tasks.value == pytest.approx(1.0)
    assert one.verdict == "finding"


def test_a_difference_without_a_spread_has_no_p_and_is_undecided() -> None:
    records = [
        record(task, method, VIM, seed, 700 if method == "svp" else 500)
        for task in DEMO.tasks
        for method in ("svp", "adapter")
        for seed in SEEDS
    ]
    (one,) = outcomes(records, dataclasses.replace(PLAN, comparisons=COMPARISONS[:1]))
    assert one.new_tasks is not None
    assert (one.new_tasks.value, one.new_tasks.low, one.p, one.holm, one.verdict) == (20, None, None, None, "undecided")


# ---------------------------------------------------------------------------------------------------- missing records


def without(records: list[Record], **facts: Any) -> list[Record]:
    return [r for r in records if any(getattr(r, key) != value for key, value in facts.items())]


def test_missing_records_are_listed_and_do_not_shrink_the_family() -> None:
    records = draw(lambda method, _: 4 if method == "svp" else 0, number=1)
    whole = outcomes(records)
    part = outcomes(without(records, backbone=VIT))
    assert [one.verdict == "records missing" for one in part] == [False, False, True]
    assert part[2].missing == (f"no complete final run on {VIT}",)
    assert (part[2].found, part[2].p, part[2].holm) == (None, None, None)
    for one, then in zip(part[:2], whole[:2], strict=True):
        assert one.p == then.p
        assert one.holm is not None
        assert then.holm is not None
        assert one.holm >= then.holm
    raw = sorted(one.p for one in part[:2] if one.p is not None)
    assert min(one.holm for one in part[:2] if one.holm is not None) == pytest.approx(min(1, 3 * raw[0]))


def test_what_is_missing_names_row_backbone_tasks_and_seeds() -> None:
    records = [*clear_records()]
    lacks = without(without(records, method="lora", task="demo/count"), method="svp", backbone=VIT, seed=2)
    found = outcomes(lacks)
    assert [one.verdict for one in found] == ["finding", "records missing", "records missing"]
    assert found[1].missing == (f"3 of 24 runs of lora on {VIM}: count",)
    vim, svp, lora = found[2].missing
    assert vim == f"3 of 24 runs of lora on {VIM}: count"
    assert svp.startswith(f"8 of 24 runs of svp on {VIT}: digits (seed 2), digits-10shot (seed 2)")
    assert lora == f"3 of 24 runs of lora on {VIT}: count"
    assert outcomes(without(records, method="lora"))[1].missing == (f"no run of lora on {VIM}",)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=6))
def test_what_is_missing_can_only_lower_the_p_of_the_others(cases: list[tuple[float, bool]]) -> None:
    """Holm with p = 1 for what is missing is an upper bound of Holm over all."""
    whole = holm(dict(enumerate(p for p, _ in cases)))
    part = holm({number: p if there else 1.0 for number, (p, there) in enumerate(cases)})
    assert all(part[number] >= whole[number] for number, (_, there) in enumerate(cases) if there)


def test_seeds_outside_of_the_plan_do_not_count() -> None:
    records = [*clear_records()]
    more = [record(task, "svp", VIM, 7, 990) for task in DEMO.tasks]
    more += [record(task, "adapter", VIM, 7, 10) for task in DEMO.tasks]
    assert outcomes([*records, *more]) == outcomes(records)


def test_a_failed_run_is_left_out_with_its_seed_and_listed() -> None:
    records = [*clear_records()]
    lost = [r for r in records if (r.task, r.method, r.backbone, r.seed) == ("demo/size", "lora", VIM, 1)]
    kept = [r for r in records if r not in lost]
    assert outcomes(kept)[1].missing == (f"1 of 24 runs of lora on {VIM}: size (seed 1)",)
    found = outcomes([*kept, *(unscored(r, "failed", "the loss is NaN") for r in lost)])
    assert [one.failed for one in found] == [(), *[(f"lora on {VIM}, size, seed 1",)] * 2]
    assert [one.seeds for one in found] == [(3, 3), (2, 3), (2, 3)]
    by_seed = values(records, "svp", VIM) - values(records, "lora", VIM)
    by_task = by_seed.mean(1)
    by_task[-1] = by_seed[-1, [0, 2]].mean()
    assert found[1].new_tasks is not None
    assert found[1].new_tasks.value == pytest.approx(by_task.mean())
    interrupted = outcomes([*kept, *(unscored(r, "interrupted", "stopped") for r in lost)])
    assert interrupted[1].verdict == "records missing"
    every = [r for r in records if (r.task, r.method, r.backbone) == ("demo/size", "lora", VIM)]
    none_left = [*(r for r in records if r not in every), *(unscored(r, "failed", "NaN") for r in every)]
    assert outcomes(none_left)[1].missing == ("no seed of size is left: a run of each failed",)


def test_a_failed_control_is_no_failed_run_of_the_method() -> None:
    records = [*clear_records()]
    kept = [r for r in records if (r.task, r.method, r.backbone, r.seed) != ("demo/size", "lora", VIM, 1)]
    control = record("demo/size", "lora", VIM, 1, 600, changes={TARGETS: ["in_proj", "out_proj"]})
    found = outcomes([*kept, unscored(control, "failed", "the loss is NaN")])
    assert found[1].missing == (f"1 of 24 runs of lora on {VIM}: size (seed 1)",)


def test_a_control_with_the_code_of_a_method_does_not_stand_for_it() -> None:
    records = [*clear_records()]
    wide = {TARGETS: ["in_proj", "out_proj"]}
    recipe = {TARGETS: None}
    shipped = [
        record(r.task, "lora", r.backbone, r.seed, r.metrics.correct, changes=recipe) if r.method == "lora" else r
        for r in records
        if r.metrics
    ]
    controls = [record(task, "lora", VIM, seed, 990, changes=wide) for task in DEMO.tasks for seed in SEEDS]
    assert [one.p for one in outcomes([*shipped, *controls])] == [one.p for one in outcomes(records)]
    alone = outcomes([*without(shipped, method="lora"), *controls])[1]
    assert alone.verdict == "records missing"
    assert re.search(r"no run of lora with its shipped arguments .*in_proj.* on vim_nano", alone.missing[0])
    (label,) = [
        row.label
        for row in table_of([*shipped, *controls]).sections[0].rows
        if row.method == "lora" and "in_proj" in row.label
    ]
    named = dataclasses.replace(PLAN, comparisons=(Planned(("svp", label), (VIM,)),))
    (one,) = outcomes([*shipped, *controls], named)
    assert one.new_tasks is not None
    assert one.new_tasks.value < -20


def test_rows_that_do_not_compare_are_named() -> None:
    records = [*clear_records()]

    def changed(change: dict[str, Any], **facts: Any) -> str:
        chosen = [r for r in records if all(getattr(r, key) == value for key, value in facts.items())]
        new = [dataclasses.replace(r, **change) if r in chosen else r for r in records]
        return "; ".join(outcomes(new)[2].missing)

    other = changed({"data_digest": OTHER_LIST}, task="demo/size", backbone=VIT)
    assert other == "the rows are on different images of size"
    assert "different protocols" in changed({"protocol_version": 9}, backbone=VIT)
    two = changed({"checkpoint_digest": LIST}, backbone=VIT, seed=2)
    assert f"{VIT} has 2 sections" in two
    assert "one protocol, checkpoint, track and data variant" in two
    assert f"no complete final run on {VIT}" in changed({"checkpoint_digest": None, "checkpoint": "none"}, backbone=VIT)
    assert changed({"data_variant": "hub"}) == ""  # all of one other variant compare
    synthetic = changed({"data_variant": "synthetic", "data_digest": OTHER_LIST}, task="demo/size")
    assert synthetic == "size has synthetic data"


# --------------------------------------------------------------------------------------------------------------- file


GOOD = f"""suite: demo
seeds: [0, 1, 2]
smallest_difference: 1
comparisons:
  - methods: [svp, adapter]
    backbones: [{VIM}]
  - question: Is SVP better than LoRA?
    methods: [svp, lora]
    backbones: [{VIM}]
  - methods: [svp, lora]
    backbones: [{VIM}, {VIT}]
"""


def test_the_file_gives_the_plan(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert read_plan(path).plan == PLAN


@pytest.mark.parametrize(
    ("old", "new", "line", "texts"),
    [
        ("suite: demo", "suite: demp", 1, ["demp", "did you mean 'demo'"]),
        ("seeds: [0, 1, 2]", "seeds: [0, 1, 1]", 2, ["seeds", "[0, 1, 1]"]),
        ("seeds: [0, 1, 2]", "seeds: []", 2, ["seeds", "at least one seed"]),
        ("seeds: [0, 1, 2]", "seeds: [zero]", 2, ["seeds[0]", "'zero'"]),
        ("seeds: [0, 1, 2]\n", "", 1, ["seeds", "missing"]),
        ("smallest_difference: 1", "smallest_difference: -1", 3, ["smallest_difference", "from 0 to 100"]),
        ("smallest_difference", "smalest_difference", 3, ["did you mean 'smallest_difference'"]),
        ("[svp, adapter]", "[svp]", 5, ["methods", "two names"]),
        ("[svp, adapter]", "[svp, svp]", 5, ["methods must differ"]),
        ("[svp, adapter]", "[lora, svp]", 7, ["comparison 1 already"]),
        (f"[{VIM}, {VIT}]", f"[{VIM}, {VIT}, {VIM}]", 11, ["backbones", "one name, or two"]),
        (f"[{VIM}, {VIT}]", "[]", 11, ["backbones", "one name, or two"]),
        (GOOD, "suite: [\n", 2, ["not YAML"]),
        (GOOD, "", 1, ["empty"]),
        (GOOD[GOOD.index("  - ") :], "  []\n", 4, ["comparisons", "at least one comparison"]),
        # names are checked with the records
        ("[svp, adapter]", "[svp, adaptor]", 5, ["unknown method 'adaptor'", "did you mean 'adapter'"]),
        (f"[{VIM}, {VIT}]", f"[{VIM}, vit_nano_patch8_46]", 11, ["unknown backbone", f"did you mean '{VIT}'"]),
    ],
)
def test_a_mistake_in_the_file_is_one_line(
    old: str, new: str, line: int, texts: list[str], tmp_path: Path, root: Path
) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(GOOD.replace(old, new, 1), encoding="utf-8")
    assert old in GOOD
    error = assert_error(command("table", "--results_root", str(root), "--comparisons", str(path)), 2)
    assert f"{path}:{line}: " in error
    assert all(text in error for text in texts), error


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([VIM, "svp"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=5,
)


@given(
    st.sampled_from(["suite", "seeds", "smallest_difference", "comparisons", "methods", "backbones", "question"]),
    VALUES,
)
def test_any_value_of_a_key_gives_a_plan_or_one_line(
    tmp_path_factory: pytest.TempPathFactory, key: str, value: Any
) -> None:
    data: dict[str, Any] = {
        "suite": "demo",
        "seeds": [0],
        "smallest_difference": 1,
        "comparisons": [{"methods": ["svp", "lora"], "backbones": [VIM]}],
    }
    (data if key in data else data["comparisons"][0])[key] = value
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_text(json.dumps(data), encoding="utf-8")
    try:
        plan = read_plan(path).plan
    except ConfigError as error:
        message = str(error)
    else:
        message = f"{path}:"
        assert all(len({*one.methods}) == 2 for one in plan.comparisons)
        assert 0 <= plan.smallest_difference <= 100
    assert message.startswith(f"{path}:")
    assert "\n" not in message


def test_a_missing_file_is_one_line(tmp_path: Path) -> None:
    error = assert_error(command("table", "--results_root", str(tmp_path), "--comparisons", "none.yaml"), 2)
    assert "none.yaml" in error


def test_names_without_records_are_checked_but_torch_is_loaded_for_them_only() -> None:
    def fail() -> list[str]:
        raise AssertionError("not needed")

    tables = [table_of([*clear_records()])]
    file = read_plan(COMMITTED)
    file = dataclasses.replace(file, plan=PLAN)
    (table,) = add_plan(tables, file, fail)
    assert table.planned is not None
    asked = []
    (table,) = add_plan([table_of([])], file, lambda: asked.append(1) or [VIM, VIT])
    assert asked == [1]
    assert table.planned is not None
    assert {one.verdict for one in table.planned.outcomes} == {"records missing"}
    with pytest.raises(ConfigError, match=f"unknown backbone '{VIM}'"):
        add_plan([table_of([])], file, lambda: [VIT])
    with pytest.raises(UsageError, match="--suite demo"):
        add_plan([], file, fail)


def test_the_committed_file_has_the_five_comparisons_of_the_plan() -> None:
    file = read_plan(COMMITTED)
    text = (COMMITTED.parent / "PLAN.md").read_text(encoding="utf-8")
    primary = text.split("## Primary comparisons")[1].split("**A finding**")[0]
    numbered = re.findall(r"^\d\. (.+)$", primary, re.MULTILINE)
    names = {"Vim": VIM, "the ViT": VIT}
    expected = []
    for line in numbered:
        methods = re.match(r"\(?`(\w+)` − `(\w+)`", line)
        assert methods is not None
        expected.append((methods.groups(), tuple(names[name] for name in re.findall(r" on (Vim|the ViT)", line))))
    assert [(one.methods, one.backbones) for one in file.plan.comparisons] == expected
    assert len(expected) == 5
    assert file.plan.seeds == (0, 1, 2, 3, 4)
    assert "at least 1 point" in text
    assert file.plan.smallest_difference == 1
    assert {VIM, VIT} <= set(list_backbones())
    add_plan([table_of([])], file, list_backbones)


# ------------------------------------------------------------------------------------------------------------- output


def test_all_tables_show_the_comparisons(tmp_path: Path, root: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(GOOD, encoding="utf-8")
    shown = run("table", "--results_root", str(root), "--comparisons", str(plan))
    found = outcomes([*clear_records()])
    markdown = (root / "tables" / "demo.md").read_text(encoding="utf-8")
    latex = (root / "tables" / "demo.tex").read_text(encoding="utf-8")
    for one in found:
        assert one.new_tasks is not None
        assert one.new_tasks.low is not None
        for text in (f"{one.new_tasks.value:+.2f}", f"[{one.new_tasks.low:.2f}, {one.new_tasks.high:.2f}]", "finding"):
            assert text in shown.out
            assert text in markdown
            assert text in latex
    assert f"svp − adapter on {VIM}" in markdown
    assert "Is SVP better than LoRA?" in markdown
    assert "3 planned comparisons" in markdown
    assert latex.count(r"\begin{table}") == latex.count(r"\end{table}") == 3
    assert str(tmp_path) not in markdown + latex
    first = markdown, latex
    run("table", "--results_root", str(root), "--comparisons", str(plan), "--suite", "demo")
    files = (root / "tables" / "demo.md", root / "tables" / "demo.tex")
    assert tuple(path.read_text(encoding="utf-8") for path in files) == first
    run("table", "--results_root", str(root))
    assert "Planned" not in files[0].read_text(encoding="utf-8")


def test_the_report_shows_the_comparisons(tmp_path: Path, root: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text(GOOD, encoding="utf-8")
    run("report", "--results_root", str(root), "--comparisons", str(plan))
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    (block,) = re.findall(r'<section id="demo-planned".*?</section>', page, re.DOTALL)
    assert re.findall(r'<th scope="row">(.*?)</th>', block) == [one.words for one in COMPARISONS]
    for one in outcomes([*clear_records()]):
        assert one.new_tasks is not None
        assert f"{one.new_tasks.value:+.2f}" in block
    assert "Is SVP better than LoRA?" in block
    run("report", "--results_root", str(root))
    assert 'id="demo-planned"' not in (root / "report" / "index.html").read_text(encoding="utf-8")


def test_a_plan_without_any_records_lists_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    shown = run("table", "--results_root", str(tmp_path), "--comparisons", str(COMMITTED)).out
    assert shown.count("records missing") == 5
    assert f"no complete final run on {VIT}" in " ".join(shown.split())
    run("report", "--results_root", str(tmp_path), "--comparisons", str(COMMITTED))
    assert "records missing" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_it_is_refused_where_it_cannot_apply(root: Path) -> None:
    given = ("--results_root", str(root), "--comparisons", str(COMMITTED))
    assert "--compare" in assert_error(command("table", *given, "--compare", "svp", "lora"), 2)
    for subcommand in ("table", "report"):
        error = assert_error(command(subcommand, *given, "--suite", "vtab"), 2)
        assert "comparisons.yaml:2: " in error
        assert "--suite demo" in error


def test_a_suite_of_few_sources_has_no_p() -> None:
    few = load_suite("demo-quick")
    records = [*clear_records()]
    table = load_table(few, records)
    found = outcomes_of(dataclasses.replace(PLAN, suite=few.name), table)
    assert {(one.p, one.verdict) for one in found} == {(None, "undecided")}
    file = dataclasses.replace(read_plan(COMMITTED), plan=dataclasses.replace(PLAN, suite=few.name))
    (planned,) = add_plan([table], file, tuple)
    assert any("fewer than 6 independent sources" in note for note in planned_notes(planned))


# ------------------------------------------------------------------------------------------- two backbones in one root


def test_two_backbones_in_one_folder_are_two_sections_everywhere(root: Path) -> None:
    records = [*clear_records()]
    shown = run("table", "--results_root", str(root)).out
    tables = root / "tables"
    wide = list(csv.DictReader((tables / "demo.csv").open(encoding="utf-8")))
    assert {(line["backbone"], line["row"]) for line in wide if line["row"] in METHODS} == {
        (backbone, method) for backbone in (VIM, VIT) for method in METHODS
    }
    ranked = {(line["backbone"], line["row"]): line["rank"] for line in wide}
    assert [ranked[VIM, method] for method in ("svp", "lora", "adapter")] == ["1", "2", "3"]
    assert [ranked[VIT, method] for method in ("lora", "svp", "adapter")] == ["1", "2", "3"]
    long = list(csv.DictReader((tables / "demo_long.csv").open(encoding="utf-8")))
    assert len(long) == len(records) / len(SEEDS)
    markdown = (tables / "demo.md").read_text(encoding="utf-8")
    latex = (tables / "demo.tex").read_text(encoding="utf-8")
    for backbone in (VIM, VIT):
        assert len(re.findall(rf"^## .*{backbone}", markdown, re.MULTILINE)) == 1
        assert backbone in shown
        assert latex.count(rf"Backbone {backbone.replace('_', chr(92) + '_')}") == 1
    assert len(set(re.findall(r"\\label\{(.*?)\}", latex))) == 2
    run("report", "--results_root", str(root))
    page = (root / "report" / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<section class="results" id="demo-\d"', page)) == 2
