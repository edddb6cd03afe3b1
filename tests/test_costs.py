"""Costs that were measured on a machine: measurement, file, and what tables, report and frame show of it."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import BACKBONE, assert_error, command, register_backbone, run
from hypothesis import given
from hypothesis import strategies as st
from synthetic_records import make_record
from synthetic_report import write

from svp_bench import load_results
from svp_bench.core.errors import RecordError, SvpBenchError
from svp_bench.core.validate import convert
from svp_bench.records.costs import SCHEMA, CostFile, MeasuredCost, Setting, load_costs, setting_of
from svp_bench.records.record import Record
from svp_bench.report.figures import figures_of
from svp_bench.report.page import render
from svp_bench.report.view import report_view
from svp_bench.tables.build import load_table
from svp_bench.tables.measured import spans_of
from svp_bench.tables.render_csv import wide_csv
from svp_bench.tables.render_text import render_markdown, render_terminal
from svp_bench.tasks.cards import load_suite
from svp_bench.train.measure import measure, measure_all, record_jobs, throughput

VTAB = load_suite("vtab")
TIMES = {
    "latency_ms": 4.5,
    "merged_latency_ms": None,
    "images_per_second": 1800.0,
    "batch": 64,
    "peak_memory_mib": 900.5,
}


def row(task: str, method: str, right: int = 7, **args: Any) -> Record:
    changes = {"data.image_size": 224, "model.method.init_args": args}
    return make_record(task, method, right=right, changes=changes, method_args=args)


def rows(method: str, right: int = 7, **args: Any) -> list[Record]:
    return [row(task, method, right, **args) for task in VTAB.tasks]


def cost(record: Record, step_ms: float, **fields: Any) -> MeasuredCost:
    setting = setting_of(record)
    assert setting is not None
    values = {**TIMES, **fields}
    return MeasuredCost(name=record.method, setting=setting, setting_digest=setting.digest, step_ms=step_ms, **values)


def cost_file(*costs: MeasuredCost) -> CostFile:
    return CostFile(
        schema=SCHEMA,
        date="2026-01-31",
        package_version="0.1.0",
        commit="0123456789abcdef",
        dirty=False,
        libraries={"torch": "2.6.0"},
        device="NVIDIA H100 80GB HBM3",
        cpu="AMD EPYC, AVX512",
        scan_backends=("triton",),
        precision="32-true",
        classes=10,
        step_batch=32,
        load_before=0.5,
        rows=costs,
    )


# ---- the file


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    costs = cost_file(cost(row(VTAB.tasks[0], "svp", rank=4), 60.0))
    path = tmp_path / "costs.json"
    path.write_text(costs.text(), encoding="utf-8")
    assert load_costs(path) == costs


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(schema="svp-bench/costs-9"), "'schema' is 'svp-bench/costs-9'; svp-bench "),
        (lambda data: data.pop("schema"), "'schema' is None"),
        (lambda data: data["rows"][0]["setting"]["method_args"].update(rank=8), r"rows[0] (svp) was changed"),
        (lambda data: data["rows"].append(data["rows"][0]), r"rows[1] (svp) is there twice"),
        (lambda data: data["rows"][0].update(step_ms=0), "step_ms"),
        (lambda data: data["rows"][0].update(step_msec=1), "unknown file of costs key 'rows[0].step_msec'"),
        (lambda data: data.pop("device"), "device"),
    ],
)
def test_other_files_are_refused_in_one_line(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    data = json.loads(cost_file(cost(row(VTAB.tasks[0], "svp", rank=4), 60.0)).text())
    change(data)
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(data), encoding="utf-8")
    write(tmp_path / "results", [row(VTAB.tasks[0], "svp", rank=4)])
    for subcommand in ("table", "report"):
        line = assert_error(command(subcommand, "--results_root", str(tmp_path / "results"), "--costs", str(path)), 1)
        assert str(path) in line
        assert message in line
    assert not (tmp_path / "results" / "tables").exists()


def test_a_file_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match=r"cannot be read as JSON: .*`svp-bench measure`"):
        load_costs(tmp_path / "costs.json")


# ---- joined by what was measured


def test_rows_are_joined_by_their_setting_and_not_by_their_name() -> None:
    one, other = row(VTAB.tasks[0], "lora", rank=4), row(VTAB.tasks[0], "lora", rank=8)
    costs = cost_file(cost(one, 60.0))
    assert costs.of(one) is costs.rows[0]
    assert costs.of(dataclasses.replace(one, method="another_name")) is costs.rows[0]
    assert costs.of(dataclasses.replace(one, method_args={"rank": 4, "new": None})) is costs.rows[0]
    source = {"mine.py": "sha256:" + "1" * 64}
    changed = [other, dataclasses.replace(one, backbone="vim_tiny_patch16_224")]
    changed += [dataclasses.replace(one, method_source=source)]
    for key, value in (("data.image_size", 64), ("model.head_hidden", 16), ("model.input_attention", "simam")):
        config = json.loads(json.dumps(one.config))
        section, name = key.split(".")
        config[section][name] = value
        changed.append(dataclasses.replace(one, config=config))
    assert [costs.of(record) for record in changed] == [None] * 6


def test_a_row_that_trained_otherwise_than_measured_stays_blank() -> None:
    one = row(VTAB.tasks[0], "lora", rank=4)
    costs = cost_file(cost(one, 60.0))
    assert costs.of(dataclasses.replace(one, precision="bf16-mixed")) is None
    for key, value in {
        "grad_checkpointing": True,
        "compile": True,
        "drop_path": 0.3,
        "frozen_mode": "train",
        "optimizer": {"name": "sgd"},
    }.items():
        config = json.loads(json.dumps(one.config))
        config["model"][key] = value
        assert costs.of(dataclasses.replace(one, config=config)) is None, key


def test_tables_show_what_was_measured_and_leave_the_rest_blank() -> None:
    records = [*rows("svp", rank=4), *rows("lora", 6, rank=4), *rows("linear", 5)]
    searched = rows("adapter", 8, width=1)
    costs = cost_file(
        cost(records[0], 60.0), cost(rows("lora", rank=4)[0], 40.0, merged_latency_ms=3.5), cost(searched[0], 50.0)
    )
    searched[1] = dataclasses.replace(searched[1], method_args={"width": 2})  # one of its settings was not measured
    table = load_table(VTAB, [*records, *searched], costs=costs)
    (section,) = table.sections
    spans = {one.label: spans_of(costs, one) for one in section.rows}
    assert spans["linear"] == spans["adapter"] == {}
    assert spans["svp"]["step_ms"] == (60.0, 60.0)
    assert "merged_latency_ms" not in spans["svp"]
    for text in (render_markdown(table), render_terminal(table)):
        block = text.partition("Cost on NVIDIA H100 80GB HBM3")[2]
        lines = {line.strip("| ").split(" ")[0]: line.replace("|", " ").split() for line in block.splitlines() if line}
        assert lines["lora"][1:] == ["4.5", "3.5", "1800", "(64)", "40", "900.5"]
        assert lines["svp"][1:] == ["4.5", "–", "1800", "(64)", "60", "900.5"]
        assert lines["linear"][1:] == ["–"] * 5
        words = " ".join(block.split())
        assert all(fact in words for fact in ("2026-01-31", "commit 0123456789ab", "triton", "32 images"))
    lines = {line["row"]: line for line in csv.DictReader(io.StringIO(wide_csv(table)))}
    facts = lines["lora"]
    assert (facts["measured_step_ms_min"], facts["measured_step_ms_max"], facts["measured_batch_max"]) == (
        "40",
        "40",
        "64",
    )
    assert (facts["measured_device"], facts["measured_date"]) == ("NVIDIA H100 80GB HBM3", "2026-01-31")
    assert {value for key, value in lines["linear"].items() if key.startswith("measured_")} == {""}
    plain = load_table(VTAB, records)
    assert "measured_" not in wide_csv(plain)
    assert "Cost on" not in render_markdown(plain)


def test_a_row_of_several_settings_has_a_span() -> None:
    records = rows("svp", rank=4)
    records[3] = dataclasses.replace(records[3], method_args={"rank": 8})
    costs = cost_file(cost(records[0], 60.0), cost(records[3], 71.5))
    table = load_table(VTAB, records, costs=costs)
    assert spans_of(costs, table.sections[0].rows[0])["step_ms"] == (60.0, 71.5)
    assert "| 60–71.5 |" in render_markdown(table)


def test_the_report_plots_accuracy_over_measured_times(tmp_path: Path) -> None:
    records = [*rows("svp", rank=4), *rows("lora", 6, rank=4), *rows("linear", 5)]
    costs = cost_file(cost(rows("svp", rank=4)[0], 60.0), cost(rows("lora", rank=4)[0], 700.0))
    view = report_view([load_table(VTAB, records, costs=costs)], {}, {})
    (section,) = view.suites[0].sections
    step, latency = section.further
    assert {point.row.label: (point.x, point.front) for point in step.points} == {
        "svp": (60, True),
        "lora": (700, False),
    }
    assert step.missing == {"linear": "it was not measured"}
    figure = figures_of(view.suites[0], view.level)[step.id]
    assert figure["layout"]["xaxis"]["title"]["text"] == "time of a training step in milliseconds"
    page = render(view)
    table = page.partition("Cost on NVIDIA H100 80GB HBM3, 2026-01-31")[2].partition("</table>")[0]
    assert "60 ◆" in table
    assert "700<" in table
    write(tmp_path / "results", records)
    path = tmp_path / "costs.json"
    path.write_text(costs.text(), encoding="utf-8")
    run("report", "--results_root", str(tmp_path / "results"), "--costs", str(path))
    page = (tmp_path / "results" / "report" / "index.html").read_text(encoding="utf-8")
    assert latency.id in page
    assert "Not over time of a training step in milliseconds: linear: it was not measured." in page


def test_the_frame_has_measured_costs(tmp_path: Path) -> None:
    write(tmp_path, [row(VTAB.tasks[0], "svp", rank=4), row(VTAB.tasks[0], "linear")])
    path = tmp_path / "costs.json"
    path.write_text(cost_file(cost(row(VTAB.tasks[0], "svp", rank=4), 60.0)).text(), encoding="utf-8")
    frame = load_results(tmp_path, costs=path).set_index("method")
    assert frame.loc["svp", "measured_step_ms"] == 60
    assert frame.loc["svp", "measured_device"] == "NVIDIA H100 80GB HBM3"
    assert frame["measured_step_ms"].isna().to_dict() == {"linear": True, "svp": False}
    assert "measured_step_ms" not in load_results(tmp_path)


# ---- the measurement


def job(method: str, **args: Any) -> dict[str, Any]:
    register_backbone()
    given = {"class_path": method, "init_args": args}
    return {
        "name": "mine",
        "backbone": BACKBONE,
        "method": given,
        "image_size": [32, 32],
        "device": "cpu",
        "largest": 4,
    }


def test_a_setting_is_measured() -> None:
    found = measure({**job("svp_bench.methods.lora.LoRA", rank=2), "head_hidden": 8})
    assert (found["setting"]["method_args"]["rank"], found["setting"]["head_hidden"]) == (2, 8)
    assert found["scan_backend"]
    assert min(found[name] for name in ("latency_ms", "merged_latency_ms", "step_ms", "images_per_second")) > 0
    assert found["batch"] in (1, 2, 4)


def test_a_method_that_does_not_merge_has_no_merged_latency() -> None:
    assert measure(job("svp_bench.methods.offset.Offset"))["merged_latency_ms"] is None


def test_a_record_is_measured_with_its_own_setting_only() -> None:
    with pytest.raises(SvpBenchError, match="not those of the record"):
        measure({**job("svp_bench.methods.offset.Offset"), "digest": "sha256:" + "0" * 64})


def test_records_with_one_setting_are_one_job() -> None:
    records = [*rows("svp", rank=4), *rows("svp", rank=8), dataclasses.replace(rows("lora")[0], kind="selection")]
    jobs = record_jobs(records)
    assert [one["method"]["init_args"] for one in jobs] == [{"rank": 4}, {"rank": 8}]
    setting = setting_of(records[0])
    assert setting is not None
    assert jobs[0]["digest"] == setting.digest


def test_throughput_ends_with_the_memory() -> None:
    import torch

    sizes: list[int] = []

    def forward(count: int) -> None:
        sizes.append(count)
        if count > 4:
            raise torch.OutOfMemoryError

    batch, rate = throughput(forward, torch.device("cpu"))
    assert max(sizes) == 8
    assert batch <= 4
    assert rate > 0


def test_jobs_run_in_processes_and_failures_are_one_line(tmp_path: Path) -> None:
    given = {"class_path": "svp_bench.methods.linear.Linear"}
    good = {"name": "linear", "backbone": "vit_nano_patch8_64", "method": given, "image_size": [64, 64]}
    bad = {**good, "name": "changed", "digest": "sha256:" + "0" * 64}
    lines: list[str] = []
    costs, failed = measure_all([bad, good], "cpu", lines.append, largest=4)
    assert failed == [
        "changed on vit_nano_patch8_64: the code or the arguments of the method are not those of the record"
    ]
    assert [one.name for one in costs.rows] == ["linear"]
    assert (costs.rows[0].peak_memory_mib or 0) > 50
    assert len(lines) == 2
    assert costs.scan_backends == ()
    path = tmp_path / "costs.json"
    path.write_text(costs.text(), encoding="utf-8")
    assert load_costs(path) == costs


def test_an_interrupt_keeps_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cost(row(VTAB.tasks[0], "svp", rank=4), 60.0)
    answers = iter([json.dumps({**dataclasses.asdict(one), "scan_backend": "cpu"})])

    real = subprocess.run

    def answer(command: list[str], **options: Any) -> subprocess.CompletedProcess[Any]:
        if "svp_bench.train.measure" not in command:  # git
            return real(command, **options)
        try:
            return subprocess.CompletedProcess([], 0, next(answers), "")
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr("svp_bench.train.measure.subprocess.run", answer)
    jobs = record_jobs([*rows("svp", rank=4), *rows("svp", rank=8), *rows("svp", rank=16)])
    costs, failed = measure_all(jobs, "cpu", lambda _: None)
    assert costs.rows == (one,)
    assert costs.scan_backends == ("cpu",)
    assert ["interrupted" in line for line in failed] == [True]


_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(min_size=1, max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(args=st.dictionaries(st.text(min_size=1, max_size=4), _VALUES, max_size=4), name=st.text("xyz", min_size=5))
def test_a_setting_is_the_same_through_json_and_another_with_another_argument(args: dict[str, Any], name: str) -> None:
    setting = Setting("vim_small_patch16_224", "mine.Method", args, (224, 224))
    again = convert(json.loads(json.dumps(dataclasses.asdict(setting))), Setting, "here")
    assert again.digest == setting.digest
    assert dataclasses.replace(setting, method_args={**args, name: None}).digest == setting.digest
    assert dataclasses.replace(setting, method_args={**args, name: 0}).digest != setting.digest


def test_wrong_usage_of_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert "--backbone NAME" in assert_error(command("measure"), 2)
    assert "vim_nano_patch8_64" in assert_error(command("measure", "--backbone", "vim_nano_patch8_6"), 2)
    line = assert_error(command("measure", "--backbone", "vim_nano_patch8_64", "--method", "svpp"), 2)
    assert "did you mean 'svp'" in line
    assert "auto, cpu, cuda" in assert_error(command("measure", "--device", "gpu"), 2)
    assert not list(tmp_path.iterdir())
