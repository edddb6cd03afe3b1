"""The kernels in processes of their own: memory from malloc, missing packages, the cache of compiled kernels."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_engine import LIMIT, digest, needs_cpu_kernels, workout

from svp_bench.ops import memory


class Ended(NamedTuple):
    """What a program that ended well wrote."""

    out: str
    err: str

    @property
    def answer(self) -> Any:
        """Its last line, as JSON."""
        return json.loads(self.out.splitlines()[-1])


def start(program: str, **environment: str) -> subprocess.Popen[str]:
    """Start a Python program that can import the package and these tests."""
    here = Path(__file__).parent
    path = [str(here), str(here.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
    )


def end(process: subprocess.Popen[str]) -> Ended:
    """Wait for a program, which must end well and in time."""
    try:
        out, err = process.communicate(timeout=LIMIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise
    assert process.returncode == 0, out + err
    return Ended(out, err)


glibc_only = pytest.mark.skipif(
    not (sys.platform == "linux" and os.confstr("CS_GNU_LIBC_VERSION")), reason="about glibc's allocator"
)

# glibc fills what malloc returns with the complement of MALLOC_PERTURB_, and what is freed with the byte itself.
WORKOUT = """
import json, torch
import test_engine
found = test_engine.workout()
words = torch.empty(100_000).view(torch.int32)
print(json.dumps([test_engine.digest(found), int(words[50_000]) & 0xFF]))
"""


@needs_cpu_kernels
@glibc_only
def test_scratch_memory_is_written_before_it_is_read_and_kept_until_the_end() -> None:
    """The scratch of a kernel comes from malloc, where no tensor reaches it; so does torch's own memory.

    Fresh memory reads as 3.4e38 or -1.7e38 there, freed memory as other numbers; in the last run, what is freed leaves
    the process at once, and whoever still uses it dies.
    """
    expected = digest(workout())
    no_small_caches = "glibc.malloc.tcache_count=0"  # what they hand out again would not be filled
    started = {
        128: start(WORKOUT, MALLOC_PERTURB_="128", GLIBC_TUNABLES=no_small_caches),
        1: start(WORKOUT, MALLOC_PERTURB_="1", GLIBC_TUNABLES=no_small_caches),
        None: start(WORKOUT, MALLOC_MMAP_THRESHOLD_="32768", **{memory.SWITCH: "0"}),
    }
    for byte, process in started.items():
        found, fresh = end(process).answer
        assert byte is None or fresh == 255 - byte  # the poison was there
        assert found == expected, f"results depend on freed or unwritten memory (MALLOC_PERTURB_={byte})"


# -------------------------------------------------------------------------------------- 4. missing packages

# A package is absent (nobody finds it: torch itself looks for triton) or broken (importing it raises).
WITHOUT = """
import importlib, json, sys
from importlib.machinery import PathFinder

absent, broken = %r, %r
find = PathFinder.find_spec

def blocked(name, path=None, target=None):
    if name.split(".")[0] in broken:
        raise ImportError(f"{name} is not here, says the test")
    return None if name.split(".")[0] in absent else find(name, path, target)

class Blocker:
    find_spec = staticmethod(lambda name, path=None, target=None: blocked(name) if name in broken else None)

PathFinder.find_spec = staticmethod(blocked)
sys.meta_path.insert(0, Blocker())
for name in absent + broken:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise SystemExit(f"{name} is not blocked")

import svp_bench, torch
model = svp_bench.create_model("vim_nano_patch8_64", num_classes=3, method="svp")
logits = model(torch.randn(2, 3, 64, 64))
logits.square().sum().backward()
trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
assert logits.isfinite().all()
assert len(trained) > 10
assert all(p.grad is not None and p.grad.isfinite().all() for p in trained.values())

from svp_bench.ops import backend_statuses, choose
reasons = {s.name: s.reason for s in backend_statuses()}
print(json.dumps({"auto": list(choose("auto", "cpu", torch.float32)), "reasons": reasons}))
"""

DOCTOR = """
from svp_bench.cli.main import main
status = main(["doctor"])
assert status == 0, status
"""


def test_without_numba() -> None:
    ended = end(start(WITHOUT % ([], ["numba"]) + DOCTOR))
    told = next(line for line in ended.out.splitlines() if line.startswith("{"))
    name, reason = json.loads(told)["auto"]
    assert name == "reference"
    assert "cpu: numba cannot be imported (ImportError: numba is not here, says the test)" in reason
    doctor = ended.out.split(told)[1]
    assert re.search(r"^  cpu +not here", doctor, re.MULTILINE)
    assert "numba cannot be imported" in doctor
    assert "auto on cpu: reference" in doctor
    assert "Compiled" not in ended.err


@needs_cpu_kernels
@pytest.mark.parametrize(
    "absent", [["triton"], pytest.param(["mamba_ssm", "causal_conv1d"], marks=pytest.mark.slow)], ids="+".join
)
def test_without_the_packages_of_gpus(absent: list[str]) -> None:
    told = end(start(WITHOUT % (absent, []))).answer
    assert told["auto"][0] == "cpu"
    assert told["reasons"]["cpu"] is None
    assert told["reasons"]["reference"] is None
    if "mamba_ssm" in absent:
        assert "No module named 'mamba_ssm'" in told["reasons"]["mamba_ssm"]


# ------------------------------------------------------------------------------- 5. the cache of compiled kernels

# Imports no more than it needs: several such processes run one after the other.
ONE_SCAN = """
import torch
from svp_bench.ops import selective_scan
generator = torch.Generator().manual_seed(0)
u, delta, B, C = (torch.randn(1, n, 9, generator=generator) for n in (16, 16, 3, 3))
A = -torch.rand(16, 3, generator=generator)
y = selective_scan(u, delta, A, B, C, delta_softplus=True, backend="cpu")
"""
FIRST_CALL = f"{ONE_SCAN}import json; print(json.dumps(y.flatten().tolist()))"


def one_scan() -> list[float]:
    """The result of the same call in this process."""
    names: dict[str, Any] = {}
    exec(ONE_SCAN, names)
    values: list[float] = names["y"].flatten().tolist()
    return values


@pytest.mark.slow
@needs_cpu_kernels
def test_a_kernel_is_compiled_once_also_by_two_processes_at_once(tmp_path: Path) -> None:
    together = [start(FIRST_CALL, SVP_BENCH_CACHE=str(tmp_path / "cache")) for _ in range(2)]
    one, two = (end(process) for process in together)
    assert re.search(r"Compiled the CPU kernel scan_forward in [\d.]+ s \(cached in ", one.err + two.err)
    assert str(tmp_path / "cache") in one.err + two.err
    assert one.answer == two.answer == one_scan()
    after = end(start(FIRST_CALL, SVP_BENCH_CACHE=str(tmp_path / "cache")))
    assert "Compiled" not in after.err  # what they left behind is whole
    assert after.answer == one.answer


@needs_cpu_kernels
def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    """The folder would lie below a file: no rights of any user can make it."""
    (tmp_path / "file").write_text("")
    ended = end(start(FIRST_CALL, SVP_BENCH_CACHE=str(tmp_path / "file" / "below")))
    assert re.search(r"CPU kernel scan_forward in [\d.]+ s \(not cached: .+ cannot be written\)", ended.err)
    assert ended.answer == one_scan()


FAULTS = """
import json, resource, torch
from svp_bench.ops import selective_scan
u, delta = (torch.randn(64, 197, 768).mT for _ in range(2))
A, B = -torch.rand(768, 1), torch.randn(64, 1, 197)
faults = []
for _ in range(13):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    selective_scan(u, delta, A, B, B, delta_softplus=True, backend="cpu")
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(json.dumps(sum(faults[8:])))  # by then the heap has the size that a step needs
"""


@pytest.mark.slow
@needs_cpu_kernels
@glibc_only
def test_later_steps_ask_for_no_fresh_pages() -> None:
    kept, given_back = (end(process).answer for process in [start(FAULTS, **{memory.SWITCH: v}) for v in ("1", "0")])
    assert given_back > 0
    assert kept < given_back / 10
