"""benchmarks/gpu.py without a GPU: its dry run from the command line, and what it does when things go wrong."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
PROGRAM = ROOT / "benchmarks" / "gpu.py"
sys.path.append(str(PROGRAM.parent))

import gpu  # noqa: E402
import gpu_report  # noqa: E402
import gpu_worker  # noqa: E402

# What a fork offers, written from its signature in plain PyTorch: convolution, projections, scan, gate; one direction.
FUSED = """
import torch
import torch.nn.functional as F


def mamba_inner_fn_no_out_proj(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B=None, C=None, D=None, delta_bias=None,
    B_proj_bias=None, C_proj_bias=None, delta_softplus=True,
):
    assert B is None and C is None and delta_softplus and conv1d_weight.ndim == 3
    length, rank, states = xz.shape[-1], delta_proj_weight.shape[1], A.shape[-1]
    x, z = xz.chunk(2, dim=1)
    padding = conv1d_weight.shape[-1] - 1
    u = F.silu(F.conv1d(x, conv1d_weight, conv1d_bias, padding=padding, groups=len(conv1d_weight))[..., :length])
    dt, B, C = (x_proj_weight @ u).split([rank, states, states], dim=1)
    delta = F.softplus((delta_proj_weight @ dt).float() + delta_bias[:, None])
    decay = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A)).unbind()
    drive = torch.einsum("bdl,bnl,bdl->lbdn", delta, B.float(), u.float()).unbind()
    h, ys = torch.zeros_like(drive[0]), []
    for a, b, c in zip(decay, drive, C.float().permute(2, 0, 1).unbind()):
        h = a * h + b
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    y = torch.stack(ys, dim=-1) + D[:, None] * u
    return (y * F.silu(z)).to(xz.dtype)
"""


def fork_of(folder: Path, text: str) -> Path:
    """A fork's folder; its `__init__` cannot be imported, as those of forks that want an old `transformers`."""
    ops = folder / "mamba_ssm" / "ops"
    ops.mkdir(parents=True)
    (folder / "mamba_ssm" / "__init__.py").write_text("from transformers import what_is_gone_by_now\n")
    (ops / "__init__.py").write_text("")
    (ops / "selective_scan_interface.py").write_text(text)
    return folder


def dry_run(output: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(PROGRAM), "--dry_run", "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=output.parent)
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(output.read_text())
    table = output.with_suffix(".txt").read_text()
    assert table.strip() in done.stdout
    for text in (table, output.read_text()):
        assert str(output.parent) not in text
        assert str(ROOT) not in text
    return result


def check_whole(result: dict[str, Any], fork: bool) -> None:
    """Every planned cell is there; no ratio without its baseline's name; a CPU has met no goal."""
    planned = gpu.plan("cpu", fork, sizes=("nano",), batches=(2, 1), scans=(2, 1))
    found = [(r["what"], r["size"], r["precision"], r["batch"], r["backend"]) for r in result["rows"]]
    assert found == [(*cell[:4], backend) for cell in planned for backend in cell.backends]
    assert all(ratio["of"] == "cpu" and ratio["against"] in result["backends"] for ratio in result["ratios"])
    assert len(result["goals"]) == 7
    assert all(goal["state"] == "not measured" and "CPU" in goal["reason"] for goal in result["goals"])


@pytest.mark.slow
def test_a_dry_run_measures_every_cell(tmp_path: Path) -> None:
    fork = fork_of(tmp_path / "a fork", FUSED)
    result = dry_run(tmp_path / "dry.json", "--fork", str(fork))
    check_whole(result, fork=True)
    assert result["schema"] == 1
    assert result["dry_run"] is True
    assert {"device", "date", "torch", "commit"} <= result["about"].keys()
    by: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        by.setdefault(row["backend"], []).append(row)
    assert {row["status"] for row in by["mamba_ssm"]} == {"missing"}
    assert "mamba_ssm" in result["backends"]["mamba_ssm"]["reason"]
    for backend in ("cpu", "reference", "fork"):
        assert {row["status"] for row in by[backend]} == {"measured"}, by[backend]
        checks = result["backends"][backend]["check"]
        assert set(checks) == {"bf16", "fp32"}
        assert all(check["right"] for check in checks.values()), checks
    assert result["backends"]["fork"]["fork"]["folder"] == "a fork"
    for row in by["cpu"] + by["fork"]:
        assert row["seconds_per_step"] > 0
        assert row["first_step_seconds"] > 0
        assert sum(row["kernel_share"].values()) == pytest.approx(1)
        if not row["what"].startswith("scan_"):
            assert row["images_per_second"] == pytest.approx(row["batch"] / row["seconds_per_step"])
    train = next(row for row in by["cpu"] if row["what"] == "train")
    assert all(train["kernel_share"][group] > 0 for group in gpu_worker.GROUPS)
    assert {(r["against"], r["quantity"]) for r in result["ratios"]} == {("reference", "speed"), ("fork", "speed")}


@pytest.mark.slow
def test_a_fork_that_computes_otherwise_is_refused(tmp_path: Path) -> None:
    wrong = FUSED.replace("y * F.silu(z)", "y")
    assert wrong != FUSED
    fork = fork_of(tmp_path / "fork", wrong)
    result = dry_run(tmp_path / "dry.json", "--fork", str(fork), "--only", "train", "fp32", "2")
    rows = {row["backend"]: row for row in result["rows"]}
    assert rows["cpu"]["status"] == "measured"
    assert rows["fork"]["status"] == "refused"
    assert "off from the reference" in rows["fork"]["reason"]
    assert "seconds_per_step" not in rows["fork"]
    assert result["ratios"] == []


def command(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *arguments])
    gpu.main()


def test_without_time_every_cell_is_named_as_not_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "dry.json"
    command(monkeypatch, "--dry_run", "--minutes", "0", "--output", str(output))
    result = json.loads(output.read_text())
    check_whole(result, fork=False)
    assert {row["status"] for row in result["rows"]} == {"not reached"}
    assert result["ratios"] == []
    assert capsys.readouterr().out.count("not reached") == len(result["rows"])


def test_a_dry_run_is_not_written_among_the_results(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = set(gpu.RESULTS.iterdir())
    command(monkeypatch, "--dry_run", "--minutes", "0")
    assert "Nothing was written: no --output was given." in capsys.readouterr().out
    assert set(gpu.RESULTS.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--minutes", "1"], "sees no CUDA device; --dry_run goes through"),
        (["--dry_run", "--minutes", "-1"], "--minutes must be 0 or more, not -1"),
        (["--dry_run", "--minutes", "nan"], "--minutes must be 0 or more, not nan"),
        (["--dry_run", "--fork", "nowhere"], "--fork must be a folder, and nowhere is none"),
        (["--dry_run", "--baselines", "no_python"], "--baselines must be a Python, and no_python is none"),
        (["--dry_run", "--output", "a.txt"], "--output must end in .json, not a.txt"),
        (["--dry_run", "--only", "train", "huge"], "no cell has all of: train huge"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        command(monkeypatch, *arguments)
    text = str(stopped.value)
    assert expected in text
    assert text.startswith("gpu.py: ")
    assert "\n" not in text  # a text is printed to the standard error, and the exit status is 1


def test_the_plan_begins_with_the_goals_and_asks_the_reference_little() -> None:
    cells = gpu.plan("triton", True, sizes=("small", "tiny"), batches=gpu.BATCHES, scans=(128, 64))
    assert cells[0] == gpu.Cell("train", "small", "bf16", 128, ("triton", "mamba_ssm", "fork"))
    assert {c.what for c in cells[1:5]} == {"scan_forward", "scan_both"}
    asked = [c[:4] for c in cells]
    assert len(asked) == len(set(asked))
    models = {c[:4] for c in cells if not c.what.startswith("scan_")}
    assert len(models) == 2 * 2 * 2 * 6
    assert {c.batch for c in cells if c[:4] in models and "reference" in c.backends} == {8}


# ---- when things go wrong


class Local:
    """A worker in this process."""

    def __init__(self, bench: gpu_worker.Bench) -> None:
        self.bench = bench

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        return self.bench.answer(request)


def out_of_memory(**cell: Any) -> Any:
    def work(backend: str) -> None:
        if backend == "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.ones(1000, 1000).exp()

    return work


def test_a_cell_out_of_memory_is_named_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = gpu_worker.Bench("cpu")
    monkeypatch.setattr(bench, "_whole_model", out_of_memory)
    orders = (("cpu", "reference"), ("reference", "cpu"))  # one process serves both
    cells = [gpu.Cell("train", "nano", "fp32", batch, order) for batch, order in enumerate(orders, start=1)]
    saved: list[int] = []
    run = gpu.Run(
        cells,
        dict.fromkeys(("cpu", "reference"), Local(bench)),
        gpu.Clock(5),
        size="nano",
        turn=0.001,
        save=lambda: saved.append(1),
    )
    run.go()
    rows = list(run.rows.values())
    expected = {"cpu": "out of memory", "reference": "measured"}
    assert [row["status"] for row in rows] == [expected[name] for order in orders for name in order]
    assert "2.00 GiB" in rows[0]["reason"]
    assert gpu.ratios(rows, "cpu") == []
    assert len(saved) == 2


class Told:
    """A worker that answers what it was given."""

    def __init__(self, **answers: Any) -> None:
        self.answers = {
            "hello": {"ok": {"reasons": {"triton": None}, "versions": {}}},
            "device": {"ok": {}},
            "check": {"ok": {"logits": 0.0, "gradients": 0.0, "tolerance": 1.0, "right": True, "seconds": 1.0}},
            "prepare": {"ok": {"first_seconds": 9.0, "step_seconds": 0.1, "peak_mib": 5.0}},
            "turn": {"ok": 0.1},
            "profile": {"ok": {"kernel_seconds": 0.1, "kernel_share": {}}},
            "release": {"ok": None},
            **answers,
        }

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        answer: dict[str, Any] = self.answers[request["do"]]
        return answer


class Ticking:
    """A clock of which every look takes a second."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def left(self) -> float:
        self.seconds -= 1
        return self.seconds


def one_row(worker: Told, seconds: float = 1000) -> dict[str, Any]:
    cell = gpu.Cell("train", "small", "bf16", 128, ("triton",))
    run = gpu.Run([cell], {"triton": worker}, Ticking(seconds), size="small")  # type: ignore[arg-type]
    run.go()
    (row,) = run.rows.values()
    return row


def test_a_cell_that_would_take_too_long_is_not_begun() -> None:
    slow = {"ok": {"first_seconds": 9.0, "step_seconds": 300.0, "peak_mib": 5.0}}
    row = one_row(Told(prepare=slow), 500)
    assert row["status"] == "not reached"
    assert row["reason"] == "its turns would have taken 600 s"
    for seconds in range(12):  # wherever the time ends
        assert one_row(Told(), seconds)["status"] == "not reached"
    assert one_row(Told())["status"] == "measured"


def test_a_backend_that_cannot_be_compared_is_refused() -> None:
    row = one_row(Told(check={"error": "failed", "reason": "TypeError: too few arguments"}))
    assert (row["status"], row["reason"]) == (
        "refused",
        "the comparison with the reference failed: TypeError: too few arguments",
    )
    far = {"ok": {"logits": "not finite", "gradients": 0.5, "tolerance": 0.1, "right": False, "seconds": 1.0}}
    expected = "in bf16 it is off from the reference by logits not finite, gradients 5.0e-01, more than 0.1"
    assert one_row(Told(check=far))["reason"] == expected
    row = one_row(Told(hello={"error": "failed", "reason": "its process ended"}))
    assert (row["status"], row["reason"]) == ("missing", "its process ended")
    assert one_row(Told(turn={"error": "failed", "reason": "RuntimeError: x"}))["status"] == "failed"


def worker_of(code: str) -> gpu.Worker:
    worker = gpu.Worker(sys.executable, "cpu", None)
    worker.command = [sys.executable, "-c", code]
    return worker


def test_a_worker_that_hangs_is_ended() -> None:
    worker = worker_of("import time; time.sleep(600)")
    answer = worker.ask({"do": "hello"}, 0.2)
    assert answer["error"] == "not reached"
    assert worker.process is not None
    assert worker.process.poll() is not None


def test_a_worker_that_dies_is_started_three_times() -> None:
    worker = worker_of("raise SystemExit(3)")
    answers = [worker.ask({"do": "hello"}, 30) for _ in range(4)]
    assert [a["error"] for a in answers] == 4 * ["failed"]
    assert "exit status 3" in answers[0]["reason"]
    assert "three times" in answers[3]["reason"]
    assert worker.starts == 3


def test_a_fork_without_the_function_is_missing_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in ("mamba_ssm", "mamba_ssm.ops", gpu_worker.INTERFACE):
        monkeypatch.setitem(sys.modules, name, None)  # and gone after the test
        monkeypatch.delitem(sys.modules, name)
    bench = gpu_worker.Bench("cpu", tmp_path)
    assert "there is no mamba_ssm/ops/selective_scan_interface.py" in str(bench.inner)
    bench = gpu_worker.Bench("cpu", fork_of(tmp_path / "fork", "def mamba_inner_fn(): ..."))
    assert "has no mamba_inner_fn_no_out_proj" in str(bench.inner)


# ---- what numbers say


def test_the_floor_counts_what_the_page_on_gpus_counts() -> None:
    """docs/gpu.md: bytes and special functions an element, bfloat16, 16 states, tiles of 4 steps and 32 channels."""
    lines = (ROOT / "docs" / "gpu.md").read_text().splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("| kernel | bytes |"))
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[first : first + 7]]
    table = {row[0]: row for row in cells}
    for kind, name in (("forward", "scan, forward"), ("backward", "scan, backward, frozen weights")):
        own, unavoidable = gpu_report.scan_work(kind, 2, 16, 4, 32)
        assert own.bytes == float(table[name][1])
        assert own.special == float(table[name][3].split()[0])
        assert unavoidable.bytes < own.bytes
        assert unavoidable.special <= own.special


def test_a_scan_is_measured_against_the_larger_of_memory_and_exponentials() -> None:
    device = {"copy_bytes_per_second": 3e12, "sms": 132, "clock_hz": 1.7e9, "capability": "sm_90"}
    cell = {"what": "scan_both", "size": "small", "batch": 64, "seconds_per_step": 2e-3, "kernel_seconds": 1e-3}
    found = gpu_report.against_floor(cell, device)
    elements = 64 * 197 * 768
    forward, backward = 38 * elements / (16 * 132 * 1.7e9), 130 * elements / 3e12
    assert found["seconds"]["floor"] == pytest.approx(forward + backward)
    assert found["of_floor"] == pytest.approx(1e-3 / (forward + backward))
    assert found["of_unavoidable_floor"] > found["of_floor"]
    assert found["timed"] == "kernels"
    assert gpu_report.against_floor(cell, {**device, "clock_hz": None})["of_floor"] is None
    del cell["kernel_seconds"]  # where the profiler may not look
    found = gpu_report.against_floor(cell, device)
    assert found["timed"] == "calls"
    assert found["of_floor"] == pytest.approx(2e-3 / (forward + backward))


def test_instructions_are_those_of_the_compiled_kernel_or_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = json.loads(gpu_report.COMPILED.read_text())
    record["kernels_sha256"] = {"triton_kernels.py": "of other kernels"}
    path = tmp_path / "aot.json"
    path.write_text(json.dumps(record))
    monkeypatch.setattr(gpu_report, "COMPILED", path)
    assert gpu_report.lanes_of("forward", "instructions", "sm_90") is None
    kernels = ROOT / "svp_bench" / "ops" / "triton_kernels.py"
    record["kernels_sha256"] = {kernels.name: hashlib.sha256(kernels.read_bytes()).hexdigest()}
    path.write_text(json.dumps(record))
    row = next(
        r
        for r in record["rows"]
        if (r["kernel"], r["model"], r["dtype"], r["target"]) == ("scan_forward", "vim_small", "bfloat16", "sm_90")
    )
    size = record["sizes"]["scan_forward"]
    expected = row["instructions"] * 32 * row["warps"] / (size["T"] * size["BE"])
    assert gpu_report.lanes_of("forward", "instructions", "sm_90") == expected
    assert gpu_report.lanes_of("forward", "instructions", "sm_75") is None


@pytest.mark.parametrize(
    ("kernel", "group"),
    [
        ("scan_forward", "scan forward"),
        ("scan_backward", "scan backward"),
        ("conv_forward", "convolution"),
        ("norm_forward", "norms and prompts"),
        ("prompts_backward", "norms and prompts"),
        ("void selective_scan_fwd_kernel<Selective_Scan_fwd_kernel_traits<128, 4>>(SSMParamsBase)", "scan forward"),
        ("void selective_scan_bwd_kernel<Selective_Scan_bwd_kernel_traits<64, 4>>(SSMParamsBwd)", "scan backward"),
        ("void causal_conv1d_fwd_kernel<Causal_conv1d_fwd_kernel_traits<128, 4>>(ConvParamsBase)", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "matrix products"),
        (
            "void cutlass::Kernel2<cutlass_80_wmma_tensorop_bf16_s161616gemm_bf16_16x16_128x2_tn_align8>",
            "matrix products",
        ),
        ("sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc", "matrix products"),
        ("void at::native::vectorized_layer_norm_kernel<float, float, true>(int, float)", "norms and prompts"),
        ("void at::native::flip_kernel_impl<at::native::OpaqueType<2>>", "rest"),
        ("Memcpy DtoD (Device -> Device)", "rest"),
        ("ScanBackward", "scan backward"),
        ("aten::mm", "matrix products"),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, group: str) -> None:
    assert gpu_worker.group_of(kernel) == group


def test_times_are_read_from_a_trace() -> None:
    def event(cat: str, name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
        return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid}

    on_device = [
        event("kernel", "scan_forward", 0, 5),
        event("kernel", "conv_forward", 5, 2),
        event("gpu_memcpy", "Memcpy DtoD (Device -> Device)", 7, 1),
        event("gpu_user_annotation", "Optimizer.step#AdamW.step", 0, 100),
        event("cuda_runtime", "cudaLaunchKernel", 0, 100),
        {"ph": "M", "name": "process_name"},
    ]
    assert gpu_worker.kernel_times(on_device) == {"scan forward": 5, "convolution": 2, "rest": 1}
    nested = [
        event("cpu_op", "aten::linear", 0, 10),
        event("cpu_op", "aten::mm", 2, 6),
        event("cpu_op", "aten::add", 8, 1),
        event("cpu_op", "Scan", 10, 4),
        event("cpu_op", "aten::mm", 3, 20, tid=2),
    ]
    assert gpu_worker.operator_times(nested) == {"rest": 4, "matrix products": 26, "scan forward": 4}


def test_folders_of_the_machine_are_not_reported() -> None:
    expected = gpu_worker.one_line(
        ImportError("/home/someone/envs/x/lib/a.so: undefined symbol: f\nmore, see https://a.b/c/d")
    )
    assert expected == "ImportError: …/a.so: undefined symbol: f more, see https://a.b/c/d"


H100 = "NVIDIA H100 80GB HBM3"


def measured(backend: str, seconds: float, peak: float, **more: Any) -> dict[str, Any]:
    row = {"what": "train", "size": "small", "precision": "bf16", "batch": 128, "backend": backend}
    row |= {"status": "measured", "seconds_per_step": seconds, "peak_mib": peak, "images_per_second": 128 / seconds}
    return {**row, **more}


def test_goals_are_met_or_not_and_say_against_whom() -> None:
    scan = {"what": "scan_forward", "floor": {"of_floor": 1.5}}
    rows = [
        measured("triton", 0.05, 5000),
        measured("mamba_ssm", 0.11, 9000),
        measured("triton", 0.001, 5000, **scan),
    ]
    goals = gpu.judged(rows, H100)
    found = [(goal["state"], goal["value"]) for goal in goals]
    assert found == [
        ("not measured", None),
        ("met", pytest.approx(2.2)),
        ("not measured", None),
        ("met", pytest.approx(5 / 9)),
        ("met", 1.5),
        ("not measured", None),
        ("met", pytest.approx(2560)),
    ]
    assert "no --fork was given" in goals[0]["reason"]
    assert all(name in goal["goal"] for name, goal in zip(("fork", "mamba_ssm") * 2, goals, strict=False))
    rows[1] = measured("mamba_ssm", 0.09, 6000)
    assert [goal["state"] for goal in gpu.judged(rows, H100)[1:4:2]] == ["not met", "not met"]
    rows[1] = {**rows[1], "status": "out of memory", "reason": "Tried to allocate"}
    assert gpu.judged(rows, H100)[1]["reason"] == "mamba_ssm: out of memory, Tried to allocate"
    assert {goal["state"] for goal in gpu.judged(rows, "NVIDIA H200")} == {"not measured"}


def test_every_ratio_names_its_baseline() -> None:
    rows = [measured(backend, seconds, 1000.0) for backend, seconds in (("triton", 0.1), ("fork", 0.2))]
    rows.append({**measured("mamba_ssm", 0.3, 1000.0), "status": "failed"})
    found = gpu.ratios(rows, "triton")
    assert [(r["of"], r["against"], r["quantity"], r["value"]) for r in found] == [
        ("triton", "fork", "speed", 2.0),
        ("triton", "fork", "peak_memory", 1.0),
    ]
