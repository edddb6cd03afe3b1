"""Operators, launches and layouts that all kernels of the Triton backend share."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

from svp_bench.ops.types import Flags

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # supported by the kernels
_MODULES = ("svp_bench.ops.triton_kernels", "svp_bench.ops.triton_norm_kernels")


@cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels, by the environment when triton is imported."""
    import triton

    knobs = getattr(triton, "knobs", None)  # since 3.4
    return os.environ.get("TRITON_INTERPRET", "0") == "1" if knobs is None else bool(knobs.runtime.interpret)


@cache
def kernel(name: str) -> Any:
    """Return the kernel of that name; imports Triton."""
    for path in _MODULES:
        module = importlib.import_module(path)
        if name in module.__all__:
            return getattr(module, name)
    raise KeyError(name)


def capability(tensor: Tensor) -> int:
    """Return the major compute capability of a tensor's GPU; under the interpreter, that of an H100."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def launch(name: str, programs: int, arguments: dict[str, Any]) -> None:
    """Run a number of programs of a kernel on the device of its tensors."""
    some = next(value for value in arguments.values() if isinstance(value, Tensor))
    # Triton launches on the current device, not on that of the tensors
    with torch.cuda.device(some.device) if some.is_cuda else nullcontext():
        kernel(name)[(programs,)](**arguments)


def written(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a kernel writes a result: float32 in the interpreter, which truncates to bfloat16."""
    return torch.float32 if interpreted() else dtype


def operator(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register torch.ops.svp_bench.NAME from a schema "NAME(…) -> …", its function and its shape function."""
    name, bracket, rest = schema.partition("(")
    torch.library.custom_op(f"svp_bench::{name}", run, mutates_args=(), schema=bracket + rest).register_fake(fake)


def power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << max(count - 1, 0).bit_length()


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor with a last axis of stride 1, as the kernels require."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def spread(found: Sequence[Tensor], wanted: Flags) -> list[Tensor | None]:
    """Return the found gradients at the wanted places, None at the others."""
    rest = iter(found)
    return [next(rest) if want else None for want in wanted]
