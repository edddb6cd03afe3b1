"""The CPU kernels compiled for other processors: they compile, and few vectors leave the registers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import count
from typing import Any

import pytest

pytestmark = pytest.mark.slow

AVX2 = "+avx2,+fma,+avx,+sse4.2,+sse4.1,+ssse3,+sse3,+sse2,+sse,+64bit,+cx8,+cmov,+popcnt,+bmi,+bmi2,+lzcnt"
X86, ARM = "x86_64-unknown-linux-gnu", "aarch64-unknown-linux-gnu"
KERNELS = ("scan_forward", "scan_backward", "conv_forward", "conv_backward", "norm_forward", "norm_backward")
SPILL = {X86: r"vmov[au]ps\s+%[yz]mm\d+, -?\d*\(%rsp\)", ARM: r"\bst[rp]\s+q\d+.*\[sp"}
FMA = {X86: r"vfn?m(?:add|sub)\w*ps", ARM: r"\bfml[as]\b"}
# numba's reference counts, which its passes for x86 write in this form
COUNTED = re.compile(
    r"(%[\w.]+) = (?:tail )?call i8 @llvm\.x86\.atomic\.sub\.cc\.i64\(ptr[^%]*(%[\w.]+), i64 1, i32 4\)"
)


def assembly(name: str, triple: str, cpu: str) -> str:
    """Return the assembly of a kernel for a processor."""
    import llvmlite.binding as llvm
    import numba

    from svp_bench.ops import cpu_kernels

    function: Any = numba.cfunc(cpu_kernels.KERNEL, error_model="numpy")(getattr(cpu_kernels, name))
    text = re.sub(r'target (triple|datalayout) = "[^"]*"', "", function.inspect_llvm())
    text = re.sub(r'"target-(cpu|features)"="[^"]*"', "", text)
    if triple == ARM:
        numbers = count()

        def portable(found: re.Match[str]) -> str:
            n = next(numbers)
            old = f"%counted{n} = atomicrmw sub ptr {found[2]}, i64 1 seq_cst\n"
            return f"{old}  %zero{n} = icmp eq i64 %counted{n}, 1\n  {found[1]} = zext i1 %zero{n} to i8"

        text = COUNTED.sub(portable, text)
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    module = llvm.parse_assembly(text)
    machine = llvm.Target.from_triple(triple).create_target_machine(cpu=cpu, opt=3)
    module.triple, module.data_layout = triple, str(machine.target_data)
    compiled: str = machine.emit_assembly(module)
    return compiled


def counts() -> dict[str, tuple[int, int, int]]:
    """Return kernel and processor → lanes, stores of vectors to the stack, and fused multiply-adds."""
    from svp_bench.ops.simd import LANES

    found = {}
    for name in KERNELS:
        for triple, cpu in ((X86, "znver3"), (ARM, "neoverse-n1")):
            text = assembly(name, triple, cpu)
            sizes = (len(re.findall(pattern[triple], text)) for pattern in (SPILL, FMA))
            found[f"{name} {cpu}"] = (LANES, *sizes)
    return found  # type: ignore[return-value]


def test_kernels_compile_for_avx2_and_neon_and_spill_little() -> None:
    code = "import json, test_cross_compile as t; print(json.dumps(t.counts()))"
    environment = {**os.environ, "NUMBA_CPU_NAME": "znver3", "NUMBA_CPU_FEATURES": AVX2}
    folder = os.path.dirname(__file__)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    assert len(found) == 2 * len(KERNELS)
    for name, (lanes, spills, multiplies) in found.items():
        assert lanes == 8, name
        assert multiplies > 0, name
        # with vectors of sixteen it was one for one and a half; scan_forward: 156 spills for 256 FMAs of half the width
        assert spills <= 0.55 * multiplies, (name, spills, multiplies)
