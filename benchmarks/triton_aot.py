"""What the Triton kernels need of a GPU, without one: registers, spills, shared memory and instructions, as compiled.

    python benchmarks/triton_aot.py            # all of it, into benchmarks/results/triton_aot.json
    python benchmarks/triton_aot.py --only sm_90 vim_small bfloat16 scan_forward

The arguments are those that svp_bench/ops/triton.py would launch with, for both directions and every gradient.
Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svp_bench.ops import triton as backend
from svp_bench.ops import triton_kernels

RESULT = Path(__file__).parent / "results" / "triton_aot.json"
TARGETS = (80, 90, 100)
WIDTHS = {"vim_tiny": 384, "vim_small": 768, "vim_base": 1536}
DTYPES = (torch.bfloat16, torch.float32)
KERNELS = ("scan_forward", "scan_backward", "scan_backward_of_activations", "conv_forward", "conv_backward")
BATCH, LENGTH, STATES, WIDTH = 64, 197, 16, 4
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


def launch_arguments(kernel: str, channels: int, dtype: torch.dtype) -> tuple[str, dict[str, Any]]:
    """The name of the kernel and what it would be launched with: the launch is caught, the tensors have no memory.

    `scan_backward_of_activations` is the backward kernel as a frozen backbone asks for it: no gradients of weights.
    """

    def rows(width: int, step: int | None = None) -> Tensor:
        return torch.empty(BATCH, LENGTH, step or width, device="meta", dtype=dtype)[..., :width]

    def weight(*shape: int) -> Tensor:
        return torch.empty(*shape, device="meta")

    caught: list[tuple[str, dict[str, Any]]] = []
    launch = backend._launch
    backend._launch = lambda name, programs, arguments: caught.append((name, arguments))
    try:
        parameters = [weight(channels, WIDTH), weight(channels, WIDTH), weight(channels), weight(channels)]
        x, y = rows(channels, 2 * channels), rows(channels)
        rank = channels // 32
        if kernel == "conv_forward":
            backend._conv_forward([y, y], x, parameters, (False, True), True)
        elif kernel == "conv_backward":
            backend._conv_backward([y, y], x, parameters, (False, True), True, [True] * 5)
        else:
            directions: list[Tensor] = []
            for _ in range(2):
                B, C = (rows(STATES, rank + 2 * STATES) for _ in range(2))
                A, D, bias = weight(channels, STATES), weight(channels), weight(channels)
                directions += [y, y, A, B, C, D, bias]
            problem = backend._Problem([x, *directions], (False, True), True)
            if kernel == "scan_forward":
                problem.forward(y)
            else:
                weights = kernel == "scan_backward"
                wanted = [True] + 2 * [True, True, weights, True, True, weights, weights]
                problem.backward(y, [x, *directions], wanted)
    finally:
        backend._launch = launch
    return caught[0]


def compiled(name: str, arguments: dict[str, Any], target: int) -> dict[str, int]:
    """Compile as a launch would: None and constants are compiled in, 16-byte alignment is told."""
    function = getattr(triton_kernels, name)
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    fixed = {p.name for p in function.params if p.is_constexpr}
    plain = {p.name for p in function.params if p.do_not_specialize}
    for place, key in enumerate(function.arg_names):
        value = arguments[key]
        if value is None or key in fixed or (isinstance(value, int) and value == 1 and key not in plain):
            signature[key], constants[key] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[key] = TYPES[value.dtype]
            attributes[place,] = [["tt.divisibility", 16]]
        else:
            signature[key] = "i32"
            if value % 16 == 0:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    began = time.perf_counter()
    options = {key: arguments[key] for key in ("num_warps", "maxnreg") if key in arguments}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        **usage(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared,
        "warps": arguments["num_warps"],
        "compile_seconds": round(time.perf_counter() - began),
    }


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and how many instructions the kernel has, each loop counted once."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told, listing = (disassembled(flag, file.name) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", told)
    assert found is not None, told
    registers, stack, local = map(int, found.groups())
    operations = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+ )?(\w+)", listing, re.MULTILINE)
    counts = {"instructions": len(operations), "special": operations.count("MUFU")}  # the unit of exp, among others
    counts |= {"shuffles": operations.count("SHFL"), "barriers": operations.count("BAR")}
    return {"registers": registers, "spill_bytes": stack + local, **counts}


def disassembled(flag: str, path: str) -> str:
    tool = triton.knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


def cases(only: list[str]) -> Iterator[tuple[str, str, torch.dtype, int]]:
    for kernel in KERNELS:
        for model in WIDTHS:
            for dtype in DTYPES:
                for target in TARGETS:
                    labels = {kernel, model, str(dtype).removeprefix("torch."), f"sm_{target}"}
                    if set(only) <= labels:
                        yield kernel, model, dtype, target


def record(only: list[str]) -> list[dict[str, Any]]:
    rows = []
    for kernel, model, dtype, target in cases(only):
        name, arguments = launch_arguments(kernel, WIDTHS[model], dtype)
        row: dict[str, Any] = {"kernel": kernel, "model": model, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"target": f"sm_{target}", **compiled(name, arguments, target)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="labels that a case must have; nothing is written then")
    only = parser.parse_args().only
    rows = record(only)
    if not only:
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "triton": triton.__version__,
            "shape": {"batch": BATCH, "length": LENGTH, "states": STATES, "conv_width": WIDTH},
            "sizes": {
                "scan_forward": backend.SCAN_FORWARD,
                "scan_backward": backend.SCAN_BACKWARD,
                "conv": backend.CONV,
            },
            "rows": rows,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
