"""What tables say with statistics, recomputed from the records with pandas and SciPy."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers import assert_error, command, run
from scipy import stats
from synthetic_records import LIST, OTHER_LIST, make_record, synthetic_record

from svp_bench.records.record import Record, SearchSummary
from svp_bench.records.store import write_record
from svp_bench.tables.build import build_table, write_tables
from svp_bench.tables.comparison import column_marks, sources_of
from svp_bench.tables.model import Row, Table, track_of
from svp_bench.tables.render_text import render_markdown, render_terminal
from svp_bench.tasks.cards import ReaderSpec, SuiteCard, load_suite

SMALL = SuiteCard(
    name="vtab",
    version=1,
    title="Small",
    table="small",
    folder="small",
    protocol="vtab-final",
    reader=ReaderSpec("split_files", {}),
    groups={
        "natural": ("caltech101", "dtd", "svhn"),
        "specialized": ("eurosat", "resisc45"),
        "structured": ("dmlab", "kitti", "clevr_count", "clevr_dist"),
    },
    same_images=(("clevr_count", "clevr_dist"),),
    citation="zhai2019vtab",
    notes="",
    path=Path("small.yaml"),
)
SOURCES = [[task] for task in SMALL.tasks[:-2]] + [SMALL.tasks[-2:]]
SHARE = "model.method.init_args.share_layers"
RATE = "model.learning_rate"
DECLARATION = "sha256:" + "12" * 32


def build(records: list[Record], suite: SuiteCard = SMALL, **options: Any) -> Table:
    return build_table(suite, records, task_versions=dict.fromkeys(suite.tasks, 1), **options)


def draw(methods: dict[str, int], seeds: int | dict[str, int] = 3, noise: int = 9, uneven: int = 20) -> list[Record]:
    """Return records of every task; a method's number is what it adds to each task, in images of 1000."""
    rng = random.Random(0)
    base = {task: rng.randint(400, 800) for task in SMALL.tasks}
    return [
        make_record(task, method, number, base[task] + lift + shift + rng.randint(-noise, noise), 1000)
        for method, lift in methods.items()
        for task in SMALL.tasks
        for shift in [rng.randint(-uneven, uneven)]
        for number in range(seeds if isinstance(seeds, int) else seeds[task])
    ]


def frame(records: list[Record]) -> pd.DataFrame:
    """Return one line a record."""
    return pd.DataFrame(
        [(r.method, r.task, r.seed, 100 * r.metrics.correct / r.metrics.count) for r in records if r.metrics],
        columns=["method", "task", "seed", "top1"],
    )


def row_of(table: Table, label: str) -> Row:
    (row,) = [row for section in table.sections for row in section.rows if row.label == label]
    return row


def statistics_of(page: str, title: str) -> dict[str, list[str]]:
    """Return first column → other columns of the first Markdown table below a heading."""
    lines = page[page.index(f"\n### {title}\n") :].splitlines()
    rows = list(itertools.takewhile(lambda line: line.startswith("|"), lines[lines.index("", 2) + 1 :]))
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in rows]
    return {line[0]: line[1:] for line in cells if not line[0].startswith(":")}


def welch(cells: pd.DataFrame, weights: dict[str, float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean, low and high of a weighted mean over tasks: these tasks, other seeds."""
    by_task = cells.groupby("task")["top1"].agg(["mean", "var", "count"])
    weight = pd.Series(weights) / sum(weights.values())
    mean = (by_task["mean"] * weight).sum()
    parts = weight**2 * by_task["var"] / by_task["count"]
    df = parts.sum() ** 2 / (parts**2 / (by_task["count"] - 1)).sum()
    half = stats.t.ppf((1 + level) / 2, df) * math.sqrt(parts.sum())
    return mean, mean - half, mean + half


def clustered(means: pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Low and high of the mean over tasks: new tasks; tasks of one source are one draw (CR2, Satterthwaite)."""
    sums = [sum((means[task] - means.mean()) / len(means) for task in source) for source in SOURCES]
    share = np.array([len(source) / len(means) for source in SOURCES])
    variance = sum(x**2 / (1 - w) for x, w in zip(sums, share, strict=True))
    # the covariance of the adjusted sums, if the tasks were independent and equally noisy
    gram = (np.diag(share) - np.outer(share, share)) / np.sqrt(np.outer(1 - share, 1 - share))
    half = stats.t.ppf((1 + level) / 2, np.trace(gram) ** 2 / (gram**2).sum()) * math.sqrt(variance)
    return means.mean() - half, means.mean() + half


def wilson(share: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Low and high of an accuracy over test images, in percent."""
    found = stats.binomtest(round(share * count), count).proportion_ci(level, method="wilson")
    return 100 * found.low, 100 * found.high


def over_images(cells: pd.DataFrame) -> tuple[float, float]:
    """Low and high of the mean over tasks, over test images; distances of tasks on shared images add up."""
    means = cells.groupby("task")["top1"].mean()
    z2 = stats.norm.ppf(0.975) ** 2
    down, up = [], []
    for source in SOURCES:
        below = above = 0.0
        for task in source:
            p = means[task] / 100
            centre = (p + z2 / 2000) / (1 + z2 / 1000)
            half = math.sqrt(z2 * (p * (1 - p) / 1000 + z2 / 4e6)) / (1 + z2 / 1000)
            below += 100 * (p - centre + half) / len(means)
            above += 100 * (centre + half - p) / len(means)
        down.append(below**2)
        up.append(above**2)
    return means.mean() - math.sqrt(sum(down)), means.mean() + math.sqrt(sum(up))


def flipped(differences: list[float]) -> float:
    """Two-sided sign-flip p, by going through all patterns."""
    sums = [abs(sum(s * x for s, x in zip(signs, differences, strict=True))) for signs in flips(len(differences))]
    return float(np.mean([x >= abs(sum(differences)) - 1e-9 for x in sums]))


def flips(n: int) -> list[tuple[int, ...]]:
    return list(itertools.product((1, -1), repeat=n))


def step_down(p: dict[str, float]) -> dict[str, float]:
    """Holm, as a loop."""
    highest, adjusted = 0.0, {}
    for rank, name in enumerate(sorted(p, key=lambda name: p[name])):
        highest = max(highest, min(1.0, p[name] * (len(p) - rank)))
        adjusted[name] = highest
    return adjusted


def shown(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# ---- intervals


def test_intervals_are_those_of_welch_and_satterthwaite(tmp_path: Path) -> None:
    counts = {task: 2 + number % 3 for number, task in enumerate(SMALL.tasks)}
    records = draw({"svp": 30, "linear": 0}, counts)
    table, data = build(records), frame(records)
    paths = write_tables(table, tmp_path)
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(paths[0].read_text(encoding="utf-8")))}
    page = render_markdown(table)
    printed = statistics_of(page, "Means with 95 % intervals")
    for method in ("svp", "linear"):
        cells = data[data["method"] == method]
        equal = dict.fromkeys(SMALL.tasks, 1.0)
        by_group = {f"vtab/{t}": 1 / len(tasks) for tasks in SMALL.groups.values() for t in tasks}
        expected = {"mean of 9 tasks": welch(cells, equal), "mean of 3 groups": welch(cells, by_group)}
        for group, tasks in SMALL.groups.items():
            inside = {f"vtab/{task}": 1.0 for task in tasks}
            expected[group] = welch(cells[cells["task"].isin(list(inside))], inside)
        for name, (mean, low, high) in expected.items():
            assert lines[method][name] == f"{mean:.4f}"
            assert lines[method][f"{name}, new seeds, low"] == f"{low:.4f}"
            assert lines[method][f"{name}, new seeds, high"] == f"{high:.4f}"
            assert f" {mean:.2f} ± {(high - low) / 2:.2f} |" in page
        low, high = clustered(cells.groupby("task")["top1"].mean())
        assert lines[method]["mean of 9 tasks, new tasks, low"] == f"{low:.4f}"
        assert lines[method]["mean of 9 tasks, new tasks, high"] == f"{high:.4f}"
        assert lines[method]["interval_level"] == "0.95"
        order = ("natural", "specialized", "structured", "mean of 9 tasks", "mean of 3 groups")
        written = [f"[{expected[name][1]:.2f}, {expected[name][2]:.2f}]" for name in order]
        images = over_images(cells)
        assert printed[method] == [*written, f"[{images[0]:.2f}, {images[1]:.2f}]", f"[{low:.2f}, {high:.2f}]"]
        assert lines[method]["mean of the tasks there are, test images, low"] == f"{images[0]:.4f}"
        text = render_terminal(table)
        mean, low, high = expected["mean of 9 tasks"]
        assert f"{mean:.2f} ± {(high - low) / 2:.2f}" in text
    assert "± behind a mean is half its 95 % interval for these tasks and new seeds" in page
    assert "the sample is the suite's 8 independent sources of images" in page


def test_the_level_is_asked_for() -> None:
    records = draw({"svp": 0})
    mean, low, high = welch(frame(records), dict.fromkeys(SMALL.tasks, 1.0), 0.9)
    estimate = row_of(build(records, level=0.9), "svp").present.seeds
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx((mean, low, high))
    assert "half its 90 % interval" in render_markdown(build(records, level=0.9))


def test_one_seed_somewhere_means_no_interval_over_seeds() -> None:
    records = [r for r in draw({"svp": 0, "linear": 0}) if r.method == "linear" or "dtd" not in r.task or r.seed == 0]
    table = build(records)
    known = row_of(table, "svp")
    # the groups, the mean of all tasks, and that of the groups
    assert [mean and mean.seeds.low is not None for mean in known.means] == [False, True, True, False, False]
    assert known.new_tasks is not None
    assert known.new_tasks.low is not None  # the tasks vary, whatever the seeds do
    words = (
        "where a task behind the mean has one seed, or all seeds of all its tasks gave the same number: the variance "
        "is unknown (svp)."
    )
    for text in (render_markdown(table), render_terminal(table)):
        assert words in " ".join(text.split())
    page = render_markdown(table)
    assert statistics_of(page, "Means with 95 % intervals")["svp"][3] == "–"
    assert statistics_of(page, "Differences to linear")["svp"][1] == "–"
    assert "No interval over new seeds where a task has one shared seed" in page


def test_seeds_that_agree_to_the_last_image_have_an_interval_without_width() -> None:
    records = [make_record(task, seed=seed, right=700, count=1000) for task in SMALL.tasks for seed in (0, 1)]
    assert "| 70.00 ± 0.00 |" in render_markdown(build(records))


def test_holes_have_no_interval() -> None:
    records = [record for record in draw({"svp": 0}) if "dtd" not in record.task]
    known = row_of(build(records), "svp")
    assert [mean is None for mean in known.means] == [True, False, False, True, True]
    assert known.new_tasks is None


def test_a_suite_of_one_source_has_no_interval_over_new_tasks() -> None:
    one = dataclasses.replace(SMALL, same_images=(tuple(task.split("/")[1] for task in SMALL.tasks),))
    page = render_markdown(build(draw({"svp": 0, "linear": 0}), one))
    assert "No interval over new tasks: the suite has 1 independent source of images, and 6 are the fewest." in page
    head, line = (statistics_of(page, "Differences to linear")[name] for name in ("method", "svp"))
    assert "new tasks" not in head
    assert "p" not in head
    assert len(head) == len(line)
    assert "cannot be tested with 1 source of images; no outcome" in page
    assert "Mean ranks" not in page


def test_sources_are_groups_of_shared_images_and_single_tasks() -> None:
    assert sources_of(SMALL) == SOURCES
    assert len(sources_of(load_suite("vtab"))) == 16
    assert sources_of(SMALL, ["vtab/clevr_dist", "vtab/dtd"]) == [["vtab/dtd"], ["vtab/clevr_dist"]]


def test_random_weights_have_no_statistics(tmp_path: Path) -> None:
    records = [
        dataclasses.replace(record, checkpoint="none", checkpoint_digest=None)
        for record in draw({"svp": 30, "linear": 0})
    ]
    table = build(records)
    for text in (render_markdown(table), render_terminal(table)):
        assert "Differences" not in text
        assert "Mean ranks" not in text
        assert "interval" not in text
    assert table.sections[0].comparison is None
    assert column_marks(table.sections[0]) == [None] * 14
    assert "pm " not in write_tables(table, tmp_path)[3].read_text(encoding="utf-8")


# ---- cells lead back to their records


def test_a_cell_knows_its_records() -> None:
    records = draw({"svp": 0})
    cell = row_of(build(records), "svp").cells["vtab/dtd"]
    ours = {record.seed: record for record in records if record.task == "vtab/dtd"}
    assert cell.seeds == tuple(cell.scores) == (0, 1, 2)
    assert cell.scores == {seed: record.metrics and record.metrics.top1 for seed, record in ours.items()}
    assert cell.records == tuple(ours[seed] for seed in cell.seeds)


# ---- differences


def expected_differences(records: list[Record], method: str, control: str) -> dict[str, list[float]]:
    data = frame(records).pivot_table(index=["task", "seed"], columns="method", values="top1")
    apart = (data[method] - data[control]).dropna()
    return {str(task): list(group) for task, group in apart.groupby(level="task")}


def test_differences_are_recomputed() -> None:
    records = draw({"svp": 30, "lora": 4, "full": -5, "linear": 0}, 4)
    page = render_markdown(build(records))
    printed = statistics_of(page, "Differences to linear")
    assert list(printed) == ["method", *[row.label for row in build(records).sections[0].rows if row.label != "linear"]]
    raw = {}
    for method in ("svp", "lora", "full"):
        apart = expected_differences(records, method, "linear")
        means = {task: float(np.mean(values)) for task, values in apart.items()}
        raw[method] = flipped([float(np.sum([means[task] for task in source])) for source in SOURCES])
    adjusted = step_down(raw)
    for method in raw:
        apart = expected_differences(records, method, "linear")
        long = pd.DataFrame([(task, x) for task, values in apart.items() for x in values], columns=["task", "top1"])
        mean, low, high = welch(long, dict.fromkeys(SMALL.tasks, 1.0))
        beyond = clustered(long.groupby("task")["top1"].mean())
        assert float(printed[method][0]) == pytest.approx(mean, abs=0.00501)
        assert printed[method][1:] == [
            f"[{low:.2f}, {high:.2f}]",
            printed[method][2],  # over test images: `test_pairs` recomputes them
            f"[{beyond[0]:.2f}, {beyond[1]:.2f}]",
            shown(raw[method]),
            shown(adjusted[method]),
            "9/9",
            "4",
        ]
    assert "sign flip over 8 independent sources of images; adjusted by Holm over 3 complete rows." in page
    assert "- No per-cell marks: n &lt; 6 paired seeds.\n" in page


def test_an_incomplete_row_is_compared_on_what_it_shares() -> None:
    records = draw({"svp": 30, "full": 10, "linear": 0})
    kept = [r for r in records if r.method != "full" or r.task.split("/")[1] in ("dtd", "svhn", "kitti")]
    page = render_markdown(build(kept))
    apart = expected_differences(kept, "full", "linear")
    mean = np.mean([np.mean(values) for values in apart.values()])
    line = statistics_of(page, "Differences to linear")["full"]
    assert (float(line[0]), line[6]) == (pytest.approx(mean, abs=0.00501), "3/9")
    assert line[3:6] == ["–", "–", "–"]  # three sources: neither an interval over new tasks nor a test
    assert "On fewer than 9 tasks, those that both rows have on the same images with a shared seed: full (3)." in page
    assert "cannot be tested with 3 sources of images; no outcome" in page
    assert "sign flip over 8 independent sources" in page


def test_only_runs_on_the_same_images_and_seeds_are_compared() -> None:
    records = draw({"svp": 30, "full": 10, "lora": 5, "linear": 0}, 2)
    moved = []
    for record in records:
        if record.method == "svp" and record.task == "vtab/dtd":
            record = dataclasses.replace(record, data_digest=OTHER_LIST)
        if record.method == "full" and record.task == "vtab/dtd":
            record = make_record(record.task, "full", record.seed + 100, 500, 1000)
        if record.method == "lora":
            record = make_record(record.task, "lora", record.seed + 100, 500, 1000)
        moved.append(record)
    table = build(moved)
    page = render_markdown(table)
    printed = statistics_of(page, "Differences to linear")
    assert (printed["svp"][-2], printed["full"][-2]) == ("8/9", "8/9")
    assert "lora" not in printed
    assert "- Not compared: lora shares no task with it on the same images and with a seed in common.\n" in page


def test_a_row_with_a_stand_in_is_not_compared() -> None:
    records = [*draw({"svp": 30, "linear": 0}), *(synthetic_record(task, "full", right=3) for task in SMALL.tasks)]
    page = render_markdown(build(records))
    assert "full" not in statistics_of(page, "Differences to linear")
    assert "- Not compared: full has synthetic data.\n" in page
    page = render_markdown(build(records, control="full"))
    assert "- No differences: full has synthetic data, and is not compared.\n" in page


def test_the_control_is_declared() -> None:
    without = draw({"svp": 30, "full": 10})
    page = render_markdown(build(without))
    assert (
        "### Differences to a control\n\n- No differences: no row linear here to compare with; name a control:" in page
    )
    assert "--control ROW, one of: svp; full." in page
    named = render_markdown(build(without, control="full"))
    assert list(statistics_of(named, "Differences to full")) == ["method", "svp"]
    assert "Differences to full" in render_terminal(build(without, control="full"))


def test_a_method_with_two_rows_is_no_control_until_one_is_named() -> None:
    two = [make_record(task, "linear", right=3, changes={SHARE: n}) for task in SMALL.tasks for n in (1, 4)]
    records = [*two, *draw({"svp": 0}, 1)]
    page = render_markdown(build(records))
    assert "linear has 2 rows here; name one as the control: --control ROW, one of: linear (share_layers=1);" in page
    page = render_markdown(build(records, control="linear (share_layers=4)"))
    assert set(statistics_of(page, "Differences to linear (share_layers=4)")) == {
        "method",
        "svp",
        "linear (share_layers=1)",
    }


def test_a_single_complete_row_is_not_compared() -> None:
    records = [record for record in draw({"svp": 30, "linear": 0}) if record.method == "svp" or "dtd" in record.task]
    table = build(records)
    assert table.sections[0].comparison is None
    assert "Differences" not in render_markdown(table)


# ---- marks of cells


def test_cells_are_marked_from_six_seeds_on() -> None:
    records = draw({"svp": 12, "linear": 0}, 6, noise=12)
    page = render_markdown(build(records))
    apart = expected_differences(records, "svp", "linear")
    line = next(line for line in page.splitlines() if "| svp ¶ |" in line)
    cells = dict(zip(SMALL.tasks, [cell.strip() for cell in line.strip("|").split(" | ")][2:], strict=False))
    kinds = set()
    for task, values in apart.items():
        p = flipped(values)
        mark = "" if p >= 0.05 else "▲" if np.mean(values) > 0 else "▼"
        assert re.fullmatch(rf"\d+\.\d\d ± \d+\.\d\d{mark}", cells[task]), (task, values, cells[task])
        kinds.add(mark)
    assert len(kinds) > 1  # the draw shows both
    assert "each cell by itself: of 9 cells without any difference, about 0 would get a mark." in page
    assert "No per-cell marks" not in page
    assert "▲" not in next(line for line in page.splitlines() if "| linear |" in line)


def test_marks_where_only_some_cells_have_six_seeds() -> None:
    counts = {task: 6 if number < 2 else 5 for number, task in enumerate(SMALL.tasks)}
    page = render_markdown(build(draw({"svp": 90, "linear": 0}, counts)))
    assert page.count("▲ |") == 2
    assert "- No mark on 7 cells: n &lt; 6 paired seeds.\n" in page


def test_the_terminal_says_where_the_marks_are() -> None:
    vtab = load_suite("vtab")
    records = [
        make_record(task, method, seed, 50 + 20 * (method == "svp") + seed, 100)
        for task in vtab.tasks
        for method in ("svp", "linear")
        for seed in range(6)
    ]
    text = render_terminal(build(records, vtab))
    assert "Per-cell marks are on the Markdown page." in text
    assert "▲" not in text


# ---- tracks


def searched(task: str, method: str, right: int, budget: int = 12, trials: int = 12, **fields: Any) -> Record:
    digest = fields.pop("digest", DECLARATION)
    search = SearchSummary("default", "grid", budget, trials, "val200", digest, LIST, (RATE,))
    rate = 0.001 * (1 + len(task))
    return make_record(task, method, right=right, count=1000, changes={RATE: rate}, search=search, **fields)


def test_tracks_are_never_in_one_ranking() -> None:
    records = [
        *(make_record(task, "svp", right=600, count=1000) for task in SMALL.tasks),
        *(make_record(task, "linear", right=500, count=1000) for task in SMALL.tasks),
        *(searched(task, "svp", 700) for task in SMALL.tasks),
        *(searched(task, "linear", 650) for task in SMALL.tasks),
        *(searched(task, "svp", 710, budget=24, digest=OTHER_LIST) for task in SMALL.tasks),
    ]
    random.Random(1).shuffle(records)
    table = build(records)
    ranks = {s.track.title: [(row.label, row.rank, row.task_mean) for row in s.rows] for s in table.sections}
    assert ranks == {
        "default": [("svp", 1, 60.0), ("linear", 2, 50.0)],
        "searched (default, K = 12)": [("svp", 1, 70.0), ("linear", 2, 65.0)],
        "searched (default, K = 24)": [("svp", 1, 71.0)],
    }
    page = render_markdown(table)
    for words in (
        "Track default: no search is recorded.",
        "Track searched: default, K = 12 settings per method and task (grid), chosen on val200.",
        "Track searched: default, K = 24 settings per method and task (grid), chosen on val200.",
    ):
        assert page.count(f"\n{words}\n") == 1
        assert words in " ".join(render_terminal(table).split())
    assert page.count("### Differences to linear\n") == 2


def test_searches_of_one_name_with_other_declarations_are_apart() -> None:
    records = [searched("vtab/dtd", "svp", 700), searched("vtab/dtd", "linear", 700, digest=OTHER_LIST)]
    assert len(build(records).sections) == 2
    assert track_of(records[0]) != track_of(records[1])


def test_a_choice_among_rows_of_one_method_is_warned_of() -> None:
    note = "choosing among them by these numbers would be choosing on the test list."
    two = [make_record(task, right=3 + n, changes={SHARE: n}) for task in SMALL.tasks for n in (1, 4)]
    for text in (render_markdown(build(two)), render_terminal(build(two))):
        assert f"Several settings of svp are in this ranking: {note}" in " ".join(text.split())
    one_incomplete = [record for record in two if record.config["model"]["method"]["init_args"]["share_layers"] == 1]
    one_incomplete += [record for record in two[1:] if record not in one_incomplete and "dtd" in record.task]
    assert note not in render_markdown(build(one_incomplete))
    assert note not in render_markdown(build(draw({"svp": 1, "linear": 0}, 1)))


def test_grids_smaller_than_the_budget_are_said() -> None:
    full = [searched(task, "svp", 700) for task in SMALL.tasks]
    small = [searched(task, "linear", 600, trials=4 + (task == "vtab/dtd")) for task in SMALL.tasks]
    page = render_markdown(build([*full, *small]))
    assert "- Settings tried per task, as the records state, of at most K = 12: svp 12, linear 4–5. Whether" in page
    assert "tried whole" not in page  # that was not checked
    assert "Settings tried" not in render_markdown(build(full))


# ---- ranks


def test_ranks_and_cliques_are_recomputed() -> None:
    records = draw({"svp": 40, "lora": 38, "full": 36, "linear": 0}, 2)
    page = render_markdown(build(records))
    means = frame(records).groupby(["task", "method"])["top1"].mean().unstack()
    ranks = means.rank(axis=1, ascending=False).mean()
    order = sorted(ranks.index, key=lambda name: (ranks[name], name))
    listed = ", ".join(f"{name} {ranks[name]:.2f}" for name in order)
    assert f"- Mean ranks (descriptive): {listed}.\n" in page
    by_source = pd.DataFrame([means.loc[source].mean() for source in SOURCES])
    raw = {
        f"{a} {b}": float(stats.wilcoxon(by_source[a] - by_source[b], method="exact").pvalue)
        for a, b in itertools.combinations(order, 2)
    }
    adjusted = step_down(raw)
    cliques: list[tuple[str, ...]] = []
    for size in range(len(order), 1, -1):
        for start in range(len(order) - size + 1):
            group = tuple(order[start : start + size])
            alike = all(adjusted[f"{a} {b}"] >= 0.05 for a, b in itertools.combinations(group, 2))
            if alike and not any(set(group) <= set(other) for other in cliques):
                cliques.append(group)
    cliques.sort(key=lambda group: order.index(group[0]))
    assert f"no proof of equality): {'; '.join(' = '.join(group) for group in cliques)}.\n" in page
    assert "Nemenyi" not in page


# ---- which rows a column may mark


def test_best_and_second_need_intervals_that_allow_it() -> None:
    clear = {"svp": 60, "lora": 30, "linear": 0}
    marks = column_marks(build(draw(clear, 7, noise=2, uneven=0)).sections[0])
    assert [(found.best, found.second) for found in marks if found] == [("svp", "lora")] * len(marks)
    near = column_marks(build(draw({"svp": 1, "linear": 0}, 3, noise=15)).sections[0])
    assert near[-2] is not None
    assert near[-2].best is None
    single = column_marks(build(draw(clear, 1)).sections[0])
    assert all(found is not None and found.best is None for found in single)


def test_a_mean_over_seeds_that_differ_by_task_marks_nobody() -> None:
    records = [r for r in draw({"svp": 60, "linear": 0}, 7, noise=2) if r.method == "svp" or r.seed or "dtd" in r.task]
    marks = column_marks(build(records).sections[0])
    bests = [found.best if found else None for found in marks]
    assert bests[: len(SMALL.tasks)] == ["svp"] * len(SMALL.tasks)
    assert bests[len(SMALL.tasks) :] == [None, "svp", "svp", None, None]  # natural holds dtd, as both means do


def test_columns_on_other_lists_mark_nobody() -> None:
    records = [
        dataclasses.replace(r, data_digest=OTHER_LIST) if r.method == "svp" and "dtd" in r.task else r
        for r in draw({"svp": 60, "linear": 0}, 4, noise=2)
    ]
    marks = column_marks(build(records).sections[0])
    assert [found is None for found in marks[:3]] == [False, True, False]
    assert marks[-1] is None


# ---- the same bytes


def test_statistics_do_not_depend_on_the_order_of_records(tmp_path: Path) -> None:
    records = draw({"svp": 20, "lora": 15, "linear": 0}, 6)
    records += [
        searched(task, method, 700, seed=seed)
        for task in SMALL.tasks
        for method in ("svp", "linear")
        for seed in (0, 1)
    ]
    texts = []
    for number in range(3):
        random.Random(number).shuffle(records)
        paths = write_tables(build(records), tmp_path / str(number))
        texts.append([path.read_bytes() for path in paths])
    assert texts[0] == texts[1] == texts[2]


# ---- through the command


def written(root: Path, records: list[Record]) -> Path:
    for record in records:
        write_record(record, root)
    return root


def full_suite(methods: dict[str, int], seeds: int = 2) -> list[Record]:
    rng = random.Random(5)
    return [
        make_record(task, method, seed, 50 + lift + rng.randint(-3, 3), 100)
        for task in load_suite("vtab").tasks
        for method, lift in methods.items()
        for seed in range(seeds)
    ]


def test_the_command_compares_with_the_control(tmp_path: Path) -> None:
    root = written(tmp_path, full_suite({"svp": 20, "linear": 0}))
    assert "Differences to linear" in run("table", "--results_root", str(root)).out
    assert "Differences to svp" in run("table", "--results_root", str(root), "--control", "svp").out
    assert "### Differences to svp\n" in (root / "tables" / "vtab1k.md").read_text(encoding="utf-8")


def test_an_unknown_control_is_one_line(tmp_path: Path) -> None:
    root = written(tmp_path, full_suite({"svp": 20, "linear": 0}, 1))
    outcome = command("table", "--results_root", str(root), "--control", "linera")
    assert "--control: unknown method or row 'linera'; did you mean 'linear'?" in assert_error(outcome, 2)
    assert not (root / "tables").exists()


def test_without_records_the_command_says_so(tmp_path: Path) -> None:
    for extra in ((), ("--control", "svp"), ("--compare", "svp", "linear")):
        outcome = run("table", "--results_root", str(tmp_path), *extra)
        assert outcome.out.startswith(f"There are no records in {tmp_path / 'records'} yet")


def test_the_help_names_every_option() -> None:
    text = " ".join(run("table", "--help").out.split())
    for part in ("--suite", "--results_root", "--published", "--control ROW", "--compare ROW_A ROW_B", "95 % interval"):
        assert part in text


def test_problems_and_older_runs_stay_listed(tmp_path: Path) -> None:
    old, new = (make_record("vtab/dtd", right=right, number=n) for n, right in enumerate((2, 8)))
    edited = write_record(make_record("vtab/svhn", seed=3), tmp_path)
    edited.write_text(edited.read_text(encoding="utf-8").replace('"top1": 70.0', '"top1": 71.0'), encoding="utf-8")
    schema = write_record(make_record("vtab/svhn", seed=4), tmp_path)
    schema.write_text(schema.read_text(encoding="utf-8").replace('"schema": 2', '"schema": 0'), encoding="utf-8")
    wrong = write_record(make_record("vtab/svhn", seed=5), tmp_path)
    wrong.write_text(
        wrong.read_text(encoding="utf-8").replace('"max_epochs": 100', '"max_epochs": 9'), encoding="utf-8"
    )
    failed = dataclasses.replace(
        make_record("vtab/kitti"), status="failed", status_reason="loss is NaN", metrics=None, correct=None
    )
    root = written(tmp_path, [old, new, failed])
    text = run("table", "--results_root", str(root)).out
    assert "Not in the table: 1 failed, 1 superseded, 3 unreadable." in text
    page = (root / "tables" / "vtab1k.md").read_text(encoding="utf-8")
    assert "| 80.00 |" in page
    for why in ("'metrics.top1' is 71.0", "'schema' is 0", "'config_digest' does not belong", "loss is NaN"):
        assert why in page
