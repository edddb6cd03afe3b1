"""The compiled kernels, executed: what the compiler made of them for three kinds of GPU, on the machine of ptx.py.

And that machine itself: that it computes as PTX specifies, and faults where a GPU would fail.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from ptx import Counts, Fault, Memory, Program

ROOT = Path(__file__).resolve().parent.parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not sys.platform.startswith("linux"), reason="triton is not here"
)


def run(arguments: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables}
    environment.pop("TRITON_INTERPRET", None)
    paths = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=environment, timeout=1800
    )


def table(capability: int, *options: str) -> subprocess.CompletedProcess[str]:
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_table.py", *options]
    return run(arguments, SVP_BENCH_PTX=str(capability))


# One of each kind.
SOME = "5-torch or test_states_and_channels or test_float16 or sizes_of_a_model or test_two or test_add_norm"


# Most of the time goes into compiling, and each other shape is another kernel: so it is slow, the whole table runs for
# one GPU, and the first case of test_a_wrong_kernel_fails, which changes nothing, stands for it in the fast tests.
@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(
    ("capability", "options", "least"), [(80, ["-k", SOME], 20), (90, [], 85), (100, ["-k", SOME], 20)]
)
def test_the_table_as_compiled(capability: int, options: list[str], least: int) -> None:
    """The comparisons of triton_table.py, and none of its kernels may fault."""
    arguments = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton_table.py", *options]
    done = run(arguments, SVP_BENCH_PTX=str(capability))
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    passed = re.search(r"^(\d+) passed\b", done.stdout, re.MULTILINE)
    assert passed is not None, done.stdout[-2000:]
    assert int(passed.group(1)) >= least


# A kernel with one thing wrong must not pass. Each change is to the PTX of a launch: a pattern, what stands in its
# place, and which of its places. The kernels are compiled once, for all changes.
CHANGES = {
    "none": (r"bar\.sync", "", 10**6),
    "barrier": (r"bar\.sync \t0;", "", 1),
    "shuffle": (r"(shfl\.sync\.bfly\.b32 [^;]*), 1, 31", r"\1, 2, 31", 0),
    "address": (r"(ld\.shared\S* [^;]*\[%r\d+)\]", r"\1+4]", 0),
    "mask": (r"@%p\d+ st\.global", "st.global", 0),
    "constant": (r"0f3FB8AA3B", "0f3FB8AC00", 0),
    "store": (r"@%p\d+ st\.global[^;]*;", "", 0),
}
EXPECTED = {
    "none": "passed",
    "barrier": "Fault.*race",
    "shuffle": "AssertionError|Fault.*race",
    "address": "Fault|AssertionError",
    "mask": "Fault",
    "constant": "AssertionError",
    "store": "AssertionError",
}
BROKEN = """
import json, re, sys
import ptx, ptx_driver, torch
ptx_driver.install(90)
from test_ops import assert_scan, draw

kernels, launcher, text = [], ptx_driver._launcher, ptx.Program.__init__
def remembered(kernel, driver):
    kernels.append(kernel)
    return launcher(kernel, driver)
ptx_driver._launcher = remembered

def changed(self, source, shared):
    old, new, place = change
    found = [m.start() for m in re.finditer(old, source)]
    if place < len(found):
        at = found[place]
        source = source[:at] + re.sub(old, new, source[at:], count=1)
    text(self, source, shared)
ptx.Program.__init__ = changed

for name, change in json.loads(sys.argv[1]).items():
    torch.manual_seed(0)
    for kernel in kernels:
        kernel._run = None  # its PTX is read again
    kernels.clear()
    try:
        assert_scan(draw(5, state=3, dtype=torch.float32, batch=2), "triton")
        result = "passed"
    except (AssertionError, ptx.Fault) as error:
        result = f"{type(error).__name__}: {error}".replace("\\n", " ")
    print(json.dumps({"change": name, "kernels": len(kernels), "result": result}))
"""


@needs_triton
def test_a_wrong_kernel_fails() -> None:
    done = run(["-c", BROKEN, json.dumps(CHANGES)])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = {row["change"]: row for row in map(json.loads, done.stdout.splitlines())}
    assert list(found) == list(CHANGES)
    assert found["none"]["kernels"] == 2, "forward and backward"
    for name, row in found.items():
        assert row["kernels"], row  # it ran with the change
        assert re.search(EXPECTED[name], row["result"]), row


COSTS = """
import json, sys
import ptx_driver, torch
from ptx_memory import Counts
sys.path.append("benchmarks")
import triton_aot
from svp_bench.ops import triton_launch

driver = ptx_driver.install(90)
driver.checked = False
triton_aot.BATCH, triton_aot.LENGTH, channels = 1, 64, 64
launch = triton_launch.launch

def sample(value):
    if not isinstance(value, torch.Tensor):
        return value
    storage = torch.randn(value.untyped_storage().nbytes() // value.element_size()).to(value.dtype)
    return storage.as_strided(value.shape, value.stride(), value.storage_offset())

for kernel in ("scan_forward", "scan_backward_of_activations"):
    name, arguments = triton_aot.launch_arguments(kernel, channels, torch.bfloat16, 90)
    driver.counts = counts = Counts()
    launch(name, channels // arguments["BE"], {key: sample(value) for key, value in arguments.items()})
    elements = triton_aot.LENGTH * channels
    print(json.dumps({
        "kernel": kernel,
        "instructions": 32 * counts.instructions.total() / elements,
        "bytes": sum(counts.global_bytes.values()) / elements,
        "sectors": 32 * sum(counts.sectors.values()) / elements,
        "conflicts": counts.conflicts,
    }))
"""


@needs_triton
@pytest.mark.slow
def test_what_the_scan_costs() -> None:
    """Counted as executed, an element of both directions: what docs/gpu.md's floors are about. No reason to be slow
    unseen: a layout that loses coalescing, or an expression that the compiler no longer folds away, shows here."""
    done = run(["-c", COSTS])
    assert done.returncode == 0, done.stderr[-3000:]
    forward, backward = (json.loads(line) for line in done.stdout.splitlines() if line.startswith("{"))
    assert forward["instructions"] <= 340, forward
    assert backward["instructions"] <= 1210, backward
    assert forward["bytes"] <= 32, forward
    assert backward["bytes"] <= 145, backward
    for kernel in (forward, backward):
        assert kernel["sectors"] <= 1.3 * kernel["bytes"], kernel
        assert kernel["conflicts"] == 0, kernel


# ---- the machine

FRAME = """
.version 8.8
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 global_smem[];
.visible .entry kernel(
	.param .u64 .ptr .global .align 1 kernel_param_0,
	.param .u32 kernel_param_1
)
.reqntid {threads}
{{
	mov.u32 	%r1, %tid.x;
	ld.param.b64 	%rd1, [kernel_param_0];
	ld.param.b32 	%r2, [kernel_param_1];
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd3, %rd1, %rd2;
{body}
	ret;
}}
"""


def execute(
    body: str,
    memory: torch.Tensor,
    value: int = 0,
    *,
    threads: int = 64,
    programs: int = 1,
    given: torch.Tensor | None = None,
    counts: Counts | None = None,
) -> None:
    """Run a kernel whose %rd1 is the address of `memory`, %rd3 that of the thread's word there, %r2 `value`."""
    space = Memory()
    owned = memory if given is None else given
    first = owned.storage_offset() * owned.element_size() // 2
    offsets = first + np.arange(owned.numel() * owned.element_size() // 2)
    space.add("memory", memory.data_ptr(), memory.untyped_storage().nbytes(), offsets)
    Program(FRAME.format(body=body, threads=threads), 1024).run(
        programs, [memory.data_ptr(), value], space, counts=counts
    )


def computed(body: str, *words: int) -> int:
    """What one thread leaves in its word, where %r3, %r4, … hold the words given."""
    memory = torch.zeros(64, dtype=torch.int32)
    moves = "".join(f"mov.b32 %r{3 + i}, {word & 0xFFFFFFFF};\n" for i, word in enumerate(words))
    execute(moves + body + "\nst.global.b32 [%rd3], %r30;", memory)
    assert (memory == memory[0]).all()
    return int(memory[0]) & 0xFFFFFFFF


WORDS = st.integers(0, 2**32 - 1)


@settings(deadline=None)
@given(WORDS, WORDS)
def test_integers(a: int, b: int) -> None:
    assert computed("add.s32 %r30, %r3, %r4;", a, b) == (a + b) % 2**32
    assert computed("mul.lo.s32 %r30, %r3, %r4;", a, b) == a * b % 2**32
    assert computed("xor.b32 %r30, %r3, %r4;", a, b) == a ^ b
    assert computed("mov.pred %p1, -1; selp.b32 %r30, %r3, %r4, %p1;", a, b) == a
    amount = b % 40
    assert computed("shl.b32 %r30, %r3, %r4;", a, amount) == (a << amount) % 2**32
    assert computed("shr.u32 %r30, %r3, %r4;", a, amount) == a >> amount
    signed = a - 2**32 * (a >> 31)
    assert computed("shr.s32 %r30, %r3, %r4;", a, amount) == (signed >> amount) % 2**32
    divisor = b % 1000 + 1
    assert computed("div.s32 %r30, %r3, %r4;", a, divisor) == int(np.trunc(signed / divisor)) % 2**32
    assert computed("rem.s32 %r30, %r3, %r4;", a, divisor) == int(np.fmod(signed, divisor)) % 2**32


@settings(deadline=None)
@given(WORDS, st.integers(0, 31), st.integers(1, 31))
def test_fields(a: int, start: int, count: int) -> None:
    bits = (a >> start) & ((1 << count) - 1)
    assert computed("bfe.u32 %r30, %r3, %r4, %r5;", a, start, count) == bits
    width = min(count, 32 - start)  # past the register's end, its sign is repeated
    sign = bits >> (width - 1) & 1
    assert computed("bfe.s32 %r30, %r3, %r4, %r5;", a, start, count) == (bits - (sign << width)) % 2**32


@settings(deadline=None)
@given(WORDS, WORDS, st.lists(st.integers(0, 15), min_size=4, max_size=4))
def test_permutation_of_bytes(a: int, b: int, picks: list[int]) -> None:
    pool = [*a.to_bytes(4, "little"), *b.to_bytes(4, "little")]
    expected = [(0xFF if pool[p & 7] & 0x80 else 0) if p & 8 else pool[p & 7] for p in picks]
    selector = sum(p << 4 * i for i, p in enumerate(picks))
    assert computed("prmt.b32 %r30, %r3, %r4, %r5;", a, b, selector) == int.from_bytes(bytes(expected), "little")


@settings(deadline=None)
@given(st.floats(width=32), st.floats(width=32))
def test_rounding_to_bfloat16(low: float, high: float) -> None:
    words = [int(np.float32(x).view(np.uint32)) for x in (low, high)]
    found = computed("cvt.rn.bf16x2.f32 %r30, %r4, %r3;", *words)
    for part, x in ((found & 0xFFFF, low), (found >> 16, high)):
        value = torch.tensor([part - 2**16 * (part >> 15)], dtype=torch.int16).view(torch.bfloat16)
        expected = torch.tensor([x], dtype=torch.float32).bfloat16()
        assert torch.equal(value, expected) or (value.isnan() and expected.isnan())


@settings(deadline=None)
@example(-2.220446049250313e-16, 0.0)  # just below a power of two, where float64 rounds the bound itself
@given(st.floats(-100, 100, width=32), st.floats(-100, 100, width=32))
def test_floats(a: float, b: float) -> None:
    """Exact where PTX is exact; where it is not, off, but by no more than two units of the last place."""
    x, y = np.float32(a), np.float32(b)
    words = [int(v.view(np.uint32)) for v in (x, y)]

    def result(body: str) -> Any:
        return np.uint32(computed(body, *words)).view(np.float32)

    assert result("mul.f32 %r30, %r3, %r4;") == x * y
    fused = np.float32(np.float64(x) * np.float64(y) + np.float64(x))
    assert result("fma.rn.f32 %r30, %r3, %r4, %r3;") == fused
    for found, exact, ulps in (
        (result("ex2.approx.ftz.f32 %r30, %r3;"), np.exp2(np.float64(x)), 2),
        (result("rsqrt.approx.ftz.f32 %r30, %r3;"), 1 / np.sqrt(np.float64(x)) if x > 0 else None, 1),
        (result("div.full.f32 %r30, %r3, %r4;"), np.float64(x) / np.float64(y) if y else None, 2),
    ):
        if exact is not None and 1e-30 < abs(exact) < 1e30:
            step = 2.0 ** (np.frexp(abs(exact))[1] - 24)  # a unit of the last place; the difference is exact
            assert abs(np.float64(found) - exact) <= ulps * step


def test_an_underflow_is_zero() -> None:
    word = int(np.float32(-14427.0).view(np.uint32))
    for body in ("ex2.approx.f32 %r30, %r3;", "ex2.approx.ftz.f32 %r30, %r3;"):
        assert computed(body, word, 0) == 0


def test_shuffles_and_matrices() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    execute("shfl.sync.bfly.b32 %r3, %r1, 5, 31, -1; st.global.b32 [%rd3], %r3;", memory)
    assert memory.tolist() == [t ^ 5 for t in range(64)]
    execute("mov.b32 %r4, 9; shfl.sync.idx.b32 %r3, %r1, %r4, 31, -1; st.global.b32 [%rd3], %r3;", memory)
    assert memory.tolist() == [t // 32 * 32 + 9 for t in range(64)]
    # a matrix of one warp: each lane writes a row of two words (only the first eight lanes' addresses count)
    body = """
    mov.b32 %r5, global_smem; shl.b32 %r6, %r1, 4; add.s32 %r7, %r5, %r6;
    shl.b32 %r8, %r1, 2; add.s32 %r9, %r5, %r8; st.shared.b32 [%r9], %r1; bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1{trans}.shared.b16 {{%r10}}, [%r7]; st.global.b32 [%rd3], %r10;
    """
    halves = np.arange(32, dtype=np.uint32).view(np.uint16).reshape(8, 8)
    for trans, matrix in (("", halves), (".trans", halves.T)):
        memory = torch.zeros(32, dtype=torch.int32)
        execute(body.format(trans=trans), memory, threads=32)
        assert memory.tolist() == np.ascontiguousarray(matrix).view(np.uint32).reshape(-1).astype(int).tolist()


STORE = "mov.b32 %r5, global_smem; shl.b32 %r6, %r1, 2; add.s32 %r7, %r5, %r6; st.shared.b32 [%r7], %r1;"
NEIGHBOUR = "xor.b32 %r8, %r7, 128; ld.shared.b32 %r9, [%r8]; st.global.b32 [%rd3], %r9;"  # a thread of the other warp


def test_races() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    execute(STORE + "bar.sync 0;" + NEIGHBOUR, memory)
    assert memory.tolist() == [t ^ 32 for t in range(64)]
    with pytest.raises(Fault, match="race: shared memory is read by one thread and written by another"):
        execute(STORE + NEIGHBOUR, memory)
    with pytest.raises(Fault, match="race: shared memory is written while another thread uses it"):
        execute(STORE + "bar.sync 0;" + NEIGHBOUR + "st.shared.b32 [%r7], %r1;", memory)
    with pytest.raises(Fault, match="two threads write one address by one instruction, and not the same"):
        execute("st.global.b32 [%rd1], %r1;", memory)
    execute("st.global.b32 [%rd1], %r2;", memory, 7)  # the same of all
    assert memory[0] == 7
    with pytest.raises(Fault, match=r"race: two programs write|race: .* is written while"):
        execute("st.global.b32 [%rd3], %r1;", memory, programs=2)
    with pytest.raises(Fault, match=r"race: .* is read by one thread and written by another"):
        execute("st.global.b32 [%rd3], %r1; xor.b32 %r4, %r1, 1; mul.wide.u32 %rd4, %r4, 4; add.s64 %rd5, %rd1, %rd4;"
                "ld.global.b32 %r5, [%rd5]; st.global.b32 [%rd3], %r5;", memory)  # fmt: skip
    with pytest.raises(Fault, match=r"race: .* is written while another thread uses it"):
        execute("xor.b32 %r4, %r1, 1; mul.wide.u32 %rd4, %r4, 4; add.s64 %rd5, %rd1, %rd4;"
                "ld.global.b32 %r5, [%rd5]; st.global.b32 [%rd3], %r5;", memory)  # fmt: skip


def test_wrong_addresses() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    for body, message in (
        ("st.global.b32 [%rd3+4], %r1;", "an address outside all tensors"),
        ("st.global.b32 [%rd3+2], %r1;", "misaligned access of 4 bytes"),
        ("ld.global.v2.b32 {%r3, %r4}, [%rd3];", "misaligned access of 8 bytes"),
        ("mov.b32 %r5, global_smem; ld.shared.b32 %r6, [%r5];", "shared memory that was not written"),
        ("mov.b32 %r5, global_smem; ld.shared.b32 %r6, [%r5+1024];", "outside shared memory"),
        ("add.s32 %r5, %r9, 1;", "%r9 is read, and was never set"),
        ("setp.lt.u32 %p1, %r1, 32; @%p1 ld.global.b32 %r3, [%rd3];", "loaded by some threads only, and was never set"),
        ("setp.lt.u32 %p1, %r1, 8; @%p1 bra $out; mov.b32 %r3, 1; $out:", "threads of one program part"),
        ("wgmma.fence.sync.aligned;", "an instruction that this machine does not know: wgmma"),
        ("vote.sync.any.pred %p1, %p2, -1;", "does not know"),
    ):
        with pytest.raises(Fault, match=re.escape(message)):
            execute(body, memory)
    whole = torch.zeros(128, dtype=torch.int32)
    execute("st.global.b32 [%rd3], %r1;", whole, given=whole[:64])
    with pytest.raises(Fault, match="memory between a tensor's rows"):
        execute("st.global.b32 [%rd3], %r1;", whole, given=whole[:63])


def test_programs_may_part() -> None:
    memory = torch.zeros(4, dtype=torch.int32)
    body = """
    mov.u32 %r3, %ctaid.x; mov.b32 %r4, 0; mov.b32 %r5, 0;
    $again:
    add.s32 %r4, %r4, %r3; add.s32 %r5, %r5, 1; setp.le.s32 %p1, %r5, %r3; @%p1 bra $again;
    mul.wide.u32 %rd4, %r3, 4; add.s64 %rd5, %rd1, %rd4; setp.eq.u32 %p2, %r1, 0; @%p2 st.global.b32 [%rd5], %r4;
    """
    execute(body, memory, programs=4)
    assert memory.tolist() == [p * (p + 1) for p in range(4)]


def test_programs_that_part_keep_their_shared_memory() -> None:
    """The upper half goes around once more, through shared memory that it has written before."""
    memory = torch.zeros(4 * 64, dtype=torch.int32)
    body = f"""
    mov.u32 %r3, %ctaid.x; mad.lo.s32 %r4, %r3, 64, %r1; mul.wide.u32 %rd4, %r4, 4; add.s64 %rd5, %rd1, %rd4;
    {STORE} bar.sync 0; xor.b32 %r8, %r7, 128; ld.shared.b32 %r9, [%r8]; bar.sync 0;
    setp.lt.u32 %p1, %r3, 2; @%p1 bra $out;
    st.shared.b32 [%r7], %r4; bar.sync 0; ld.shared.b32 %r9, [%r8];
    $out:
    st.global.b32 [%rd5], %r9;
    """
    execute(body, memory, programs=4)
    expected = [[t ^ 32 for t in range(64)]] * 2 + [[64 * p + (t ^ 32) for t in range(64)] for p in (2, 3)]
    assert memory.reshape(4, 64).tolist() == expected


def test_what_a_guard_does() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    execute("setp.gt.u32 %p1, %r2, 5; @%p1 ret; st.global.b32 [%rd3], %r1;", memory, 9)
    assert not memory.any()
    execute("setp.gt.u32 %p1, %r2, 5; @%p1 ret; st.global.b32 [%rd3], %r1;", memory, 3)
    assert memory.tolist() == list(range(64))
    for body in ("@%p1 mov.u32 %r3, %laneid;", "@%p1 mov.b32 {%rs1, %rs2}, %r1;", "setp.neu.f32 %p1, %r1, %r1;"):
        with pytest.raises(Fault, match="does not"):
            execute(body, memory)
    nan = 0x7FC00000
    assert computed("setp.ne.f32 %p1, %r3, %r3; selp.b32 %r30, 1, 0, %p1;", nan) == 0


def test_what_is_counted() -> None:
    memory = torch.zeros(64, dtype=torch.int32)
    counts = Counts()
    execute("ld.global.b32 %r3, [%rd3]; st.global.b32 [%rd3], %r3;", memory, counts=counts)
    assert counts.instructions["ld.global.b32"] == 2, "warps"
    assert counts.global_bytes == {"ld": 256, "st": 256}
    assert counts.sectors == {"ld": 8, "st": 8}
    wide = torch.zeros(64 * 16, dtype=torch.int32)
    counts = Counts()
    execute("mul.wide.u32 %rd4, %r1, 64; add.s64 %rd5, %rd1, %rd4; ld.global.b32 %r3, [%rd5];", wide, counts=counts)
    assert counts.sectors["ld"] == 64, "one for each thread"
    for shift, conflicts in ((2, 0), (3, 2), (4, 6)):
        counts = Counts()
        execute(f"mov.b32 %r5, global_smem; shl.b32 %r6, %r1, {shift}; and.b32 %r6, %r6, 1020; add.s32 %r7, %r5, %r6;"
                "st.shared.b32 [%r7], %r2;", memory, counts=counts)  # fmt: skip
        assert counts.wavefronts - counts.conflicts == 2
        assert counts.conflicts == conflicts, shift


def test_what_is_only_near_is_off() -> None:
    word = int(np.float32(0.3).view(np.uint32))
    for body in ("ex2.approx.ftz.f32 %r30, %r3;", "div.full.f32 %r30, %r3, %r4;"):
        found = np.uint32(computed(body, word, int(np.float32(0.7).view(np.uint32)))).view(np.float32)
        exact = 2.0 ** np.float64(np.float32(0.3)) if "ex2" in body else np.float64(np.float32(0.3)) / np.float32(0.7)
        assert abs(np.float64(found) - exact) > np.spacing(np.float32(exact)), body
