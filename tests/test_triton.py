"""The triton backend on a machine without a GPU: its kernels under Triton's interpreter, and compiled for GPUs.

The interpreter is chosen by an environment variable when triton is imported, so both run in processes of their own.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from svp_bench.core.errors import UnavailableError
from svp_bench.ops import choose, list_backends, triton_norm
from svp_bench.ops import triton as backend

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "tests" / "triton_table.py"
RECORD = ROOT / "benchmarks" / "results" / "triton_aot.json"
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not sys.platform.startswith("linux"), reason="triton is not here"
)


def python(*arguments: str, interpret: bool, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        **variables,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    environment.pop("TRITON_INTERPRET", None)
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=600
    )


@needs_triton
@pytest.mark.parametrize(
    ("chosen", "least"),
    [
        (["-m", "not slow", "-k", "not (bfloat16 or rows_checkpointed or under_ddp or gradient_of_rows)"], 45),
        pytest.param([], 85, marks=pytest.mark.slow),
    ],
)
def test_the_kernels_under_the_interpreter(chosen: list[str], least: int) -> None:
    done = python("-m", "pytest", "-q", "-p", "no:cacheprovider", str(TABLE), *chosen, interpret=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed\b", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed.group(1)) >= least


WRONG = """
import sys
import pytest, triton.language as tl
from svp_bench.ops import triton_kernels
triton_kernels._LOG2E = tl.constexpr(1.4426950408889634 * 1.00005)
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {table!r}, "-k", "test_lengths and 9-torch.float32"]))
"""


@needs_triton
def test_a_wrong_kernel_fails() -> None:
    """Five parts in a hundred thousand in the exponent: just above what the table allows."""
    done = python("-c", WRONG.format(table=str(TABLE)), interpret=True)
    assert done.returncode == 1, done.stdout + done.stderr
    assert re.search(r"^[1-9]\d* failed", done.stdout, re.MULTILINE)


def test_it_comes_before_the_compiled_packages_and_after_the_cpu() -> None:
    names = list_backends()
    assert names.index("cpu") < names.index("triton") < names.index("mamba_ssm")


@pytest.mark.skipif(torch.cuda.is_available() or "TRITON_INTERPRET" in os.environ, reason="it can run here")
def test_it_says_why_it_cannot_run() -> None:
    reason = backend.unavailable()
    assert reason is not None
    assert "\n" not in reason
    assert "CUDA" in reason or "pip install triton" in reason
    with pytest.raises(UnavailableError, match="the scan backend 'triton' was asked for and cannot run here"):
        choose("triton", "cpu", torch.float32)


@needs_triton
@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter takes tensors of the CPU")
def test_what_it_does_not_take() -> None:
    assert backend.unsupported("cuda", torch.bfloat16) is None
    assert backend.unsupported("cuda", torch.float64) == "it takes float32, float16 and bfloat16, not float64"
    assert "TRITON_INTERPRET=1" in str(backend.unsupported("cpu", torch.float32))
    assert "not on mps" in str(backend.unsupported("mps", torch.float32))


# ---- compiled for GPUs, without one: slow, as is what test_ptx.py compiles, but for one scan


def rows(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]


@needs_triton
@pytest.mark.slow
def test_nothing_spills_on_an_h100(tmp_path: Path) -> None:
    asked = ("benchmarks/triton_aot.py", "--only", "vim_small", "bfloat16", "sm_90")
    done = python(*asked, interpret=False, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    found = rows(done.stderr)
    assert len(found) == 8
    for row in found:
        assert row["spill_bytes"] == 0, row
        assert 0 < row["registers"] <= 255
        assert row["shared_bytes"] <= 48 * 1024


@needs_triton
@pytest.mark.slow
def test_odd_launches_compile(tmp_path: Path) -> None:
    """One direction, what is optional left out, single gradients: the interpreter would not notice a wrong type."""
    done = python("benchmarks/triton_aot.py", "--odd", interpret=False, TRITON_CACHE_DIR=str(tmp_path))
    assert done.returncode == 0, done.stderr[-4000:]
    found = rows(done.stderr)
    assert len(found) == 18
    assert not any(row["spill_bytes"] for row in found)
    costs = [row["instructions"] for row in found if row["kernel"] == "scan_backward"]
    assert min(costs) < max(costs) / 2, "the gradient of D alone needs no states"


def test_the_record_of_all_targets() -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    sizes = {"scan_forward": backend.SCAN_FORWARD, "scan_backward": backend.SCAN_BACKWARD}
    sizes |= {"scan_backward_wide": backend.SCAN_BACKWARD_WIDE, "norm": triton_norm.NORM}
    sizes |= {"conv": backend.CONV, "conv_of_weights": backend.CONV_OF_WEIGHTS}
    again = "run benchmarks/triton_aot.py again"
    assert set(record["kernels_sha256"]) == {"triton_kernels.py", "triton_norm_kernels.py"}
    for name, digest in record["kernels_sha256"].items():
        kernels = Path(backend.__file__).with_name(name).read_bytes()
        assert digest == hashlib.sha256(kernels).hexdigest(), again
    assert record["sizes"] == sizes, again
    assert len(record["rows"]) == 8 * 3 * 2 * 3
    for key, values in {
        "model": {"vim_tiny", "vim_small", "vim_base"},
        "dtype": {"bfloat16", "float32"},
        "target": {"sm_80", "sm_90", "sm_100"},
    }.items():
        assert {row[key] for row in record["rows"]} == values
    assert [row for row in record["rows"] if row["spill_bytes"]] == []
