"""Compile the Triton kernels without a GPU and report registers, spills, shared memory and instructions.

    python benchmarks/triton_aot.py            # everything, into benchmarks/results/triton_aot.json
    python benchmarks/triton_aot.py --only sm_90 vim_small bfloat16 scan_forward

The arguments are those of svp_bench/ops/triton.py, for both directions and every gradient.
Must run without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from svp_bench.ops import triton as backend
from svp_bench.ops import triton_kernels, triton_launch, triton_norm, triton_norm_kernels

RESULT = Path(__file__).parent / "results" / "triton_aot.json"
TARGETS = (80, 90, 100)
WIDTHS = {"vim_tiny": 384, "vim_small": 768, "vim_base": 1536}  # channels; twice the width of the stream
DTYPES = (torch.bfloat16, torch.float32)
KERNELS: tuple[str, ...] = (
    "scan_forward",
    "scan_backward",
    "scan_backward_of_activations",
    "conv_forward",
    "conv_backward",
)
KERNELS += ("norm_forward", "norm_backward", "norm_backward_of_activations")
SOURCES = (triton_kernels.__file__, triton_norm_kernels.__file__)
BATCH, LENGTH, STATES, WIDTH = 64, 197, 16, 4
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}


Launch = tuple[str, dict[str, Any]]


@contextmanager
def caught(target: int) -> Iterator[list[Launch]]:
    """The launches inside, by the kernel's name and its arguments. Nothing runs: tensors may lie on `meta`."""
    launches: list[Launch] = []
    launch, capability = triton_launch.launch, triton_launch.capability
    triton_launch.capability = lambda tensor: target // 10
    triton_launch.launch = lambda name, programs, arguments: launches.append((name, arguments))
    try:
        yield launches
    finally:
        triton_launch.launch, triton_launch.capability = launch, capability


def rows(width: int, dtype: torch.dtype, step: int | None = None) -> Tensor:
    return torch.empty(BATCH, LENGTH, step or width, device="meta", dtype=dtype)[..., :width]


def weight(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")


def direction(channels: int, dtype: torch.dtype, states: int = STATES) -> list[Tensor | None]:
    """The seven fields of one direction; B and C are columns of the output of x_proj, as in the mixer."""
    B, C = (rows(states, dtype, channels // 32 + 2 * states) for _ in range(2))
    y = rows(channels, dtype)
    return [y, y, weight(channels, states), B, C, weight(channels), weight(channels)]


def launch_arguments(kernel: str, channels: int, dtype: torch.dtype, target: int) -> Launch:
    """Return the name of the kernel and its launch arguments.

    `…_of_activations` are the backward kernels as a frozen backbone asks for them: no gradients of weights, but those
    of both scales of SVP's prompts.
    """
    x, y = rows(channels, dtype, 2 * channels), rows(channels, dtype)
    with caught(target) as launches:
        parameters = [weight(channels, WIDTH), weight(channels, WIDTH), weight(channels), weight(channels)]
        if kernel == "conv_forward":
            backend._launch_conv([y, y], x, parameters, (False, True), True)
        elif kernel == "conv_backward":
            backend._launch_conv_backward([y, y], x, parameters, (False, True), True, [True] * 5)
        elif kernel.startswith("norm"):
            width = channels // 2
            branch, stream = rows(width, dtype), rows(width, torch.float32)
            terms = [weight(width), branch, weight(width), branch]
            if kernel == "norm_forward":
                triton_norm.forward(branch, stream, weight(width), 1e-5, terms, 98, [stream, branch])
            else:
                wanted = [True, True, kernel == "norm_backward", *4 * [True]]
                triton_norm.backward(stream, branch, stream, weight(width), 1e-5, terms, 98, dtype, wanted)
        else:
            tensors = [x, *direction(channels, dtype), *direction(channels, dtype)]
            problem = backend._Problem(tensors, (False, True), True)
            if kernel == "scan_forward":
                problem.forward(y)
            else:
                weights = kernel == "scan_backward"
                wanted = [True] + 2 * [True, True, weights, True, True, weights, weights]
                problem.backward(y, tensors, wanted)
    return launches[0]


def odd_launches() -> list[Launch]:
    """Return launches with one direction, without optional arguments, with single gradients and few states."""
    dtype, channels = torch.float16, 33
    y, few = rows(channels, dtype), direction(channels, dtype, states=3)
    few[5] = few[6] = None
    with caught(90) as launches:
        one = backend._Problem([None, *few], (True,), False)
        one.forward(y)
        one.backward(y, [None, *few], [False, *[f is not None for f in few]])
        tensors = [y, *direction(channels, dtype, states=3), *few]
        two = backend._Problem(tensors, (True, False), True)
        two.forward(y)
        for only in (0, 1, 3, 4, 5, 5 + 1, 7 + 2, 7 + 3):
            two.backward(y, tensors, [i == only for i in range(15)])
        backend._launch_conv([y], y, [weight(channels, 3), None], (True,), False)
        backend._launch_conv_backward([y], y, [weight(channels, 3), None], (True,), False, [False, True, False])
        parameters = [weight(channels, 2), weight(channels, 2), None, weight(channels)]
        backend._launch_conv_backward([y, y], y, parameters, (True, False), True, [True, False, False, False, False])
        stream, terms = rows(channels, torch.float32), [weight(channels), y]
        triton_norm.forward(y, None, weight(channels), 1e-5, [], None, [stream, y])
        triton_norm.forward(y, None, None, 0.0, terms, None, [y])
        triton_norm.backward(y, None, None, None, 0.0, terms, -1, dtype, [False, False, False, True, True])
        triton_norm.backward(None, y, stream, weight(channels), 1e-5, [], -1, dtype, [False, False, True])
    return launches


def compiled(name: str, arguments: dict[str, Any], target: int) -> dict[str, int]:
    """Compile as a launch would: None and constants are compiled in, 16-byte alignment is declared."""
    function = triton_launch.kernel(name)
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
        elif isinstance(value, float):
            signature[key] = "fp32"
        else:
            signature[key] = "i32"
            if value % 16 == 0 and key not in plain:
                attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(function, signature, constants, attributes)
    began = time.perf_counter()
    options = {key: arguments[key] for key in ("num_warps", "maxnreg", "enable_fp_fusion") if key in arguments}
    kernel = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {
        **usage(kernel.asm["cubin"]),
        "shared_bytes": kernel.metadata.shared,
        "warps": arguments["num_warps"],
        "compile_seconds": round(time.perf_counter() - began),
    }


def usage(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a thread, and how many instructions a step of the kernel's loops takes.

    Each loop is counted once, code outside of loops is not; a kernel without loops is counted as a whole.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage_text, listing = (disassembled(flag, file.name) for flag in ("-res-usage", "-sass"))
    found = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", usage_text)
    assert found is not None, usage_text
    registers, stack, local = map(int, found.groups())
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@\S+ )?(\w+)([^;]*)", listing, re.MULTILINE)
    code = [(int(place, 16), name, operands) for place, name, operands in lines]
    operations = [name for _, name, _ in code]
    if loops := list(jumps_back(code)):
        operations = [name for place, name, _ in code if any(first <= place <= last for first, last in loops)]
    counts = {"instructions": len(operations), "special": operations.count("MUFU")}  # the unit of exp, among others
    counts |= {"shuffles": operations.count("SHFL"), "barriers": operations.count("BAR")}
    return {"registers": registers, "spill_bytes": stack + local, **counts}


def jumps_back(code: list[tuple[int, str, str]]) -> Iterator[tuple[int, int]]:
    """The first and last place of each loop. The jump of the last instruction to itself is none."""
    for place, name, operands in code:
        target = re.search(r"\b0x([0-9a-f]+)", operands)
        if name == "BRA" and target is not None and int(target.group(1), 16) < place:
            yield int(target.group(1), 16), place


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
    found = []
    for kernel, model, dtype, target in cases(only):
        name, arguments = launch_arguments(kernel, WIDTHS[model], dtype, target)
        row: dict[str, Any] = {"kernel": kernel, "model": model, "dtype": str(dtype).removeprefix("torch.")}
        row |= {"target": f"sm_{target}", **compiled(name, arguments, target)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        found.append(row)
    return found


def sources() -> dict[str, str]:
    """Digests of the files that hold the kernels."""
    return {Path(path).name: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in SOURCES}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=[], help="labels that a case must have; nothing is written then")
    parser.add_argument("--odd", action="store_true", help="compile odd launches for sm_90 instead; nothing is written")
    given = parser.parse_args()
    if given.odd:
        for name, arguments in odd_launches():
            print(json.dumps({"kernel": name, **compiled(name, arguments, 90)}), file=sys.stderr, flush=True)
        return
    measured = record(given.only)
    if not given.only:
        result = {
            "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            "triton": triton.__version__,
            "kernels_sha256": sources(),
            "shape": {"batch": BATCH, "length": LENGTH, "states": STATES, "conv_width": WIDTH},
            "sizes": {
                "scan_forward": backend.SCAN_FORWARD,
                "scan_backward": backend.SCAN_BACKWARD,
                "scan_backward_wide": backend.SCAN_BACKWARD_WIDE,
                "conv": backend.CONV,
                "conv_of_weights": backend.CONV_OF_WEIGHTS,
                "norm": triton_norm.NORM,
            },
            "rows": measured,
        }
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
