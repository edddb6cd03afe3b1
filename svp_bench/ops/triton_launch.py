"""What all kernels of the Triton backend need of their launch."""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "capability", "interpreted", "launch", "power_of_two", "rows", "spread", "written"]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)  # that the kernels take
_MODULES = ("svp_bench.ops.triton_kernels", "svp_bench.ops.triton_norm_kernels")


@cache
def interpreted() -> bool:
    """Whether Triton interprets its kernels; decided by the environment when triton is imported."""
    import triton

    knobs = getattr(triton, "knobs", None)  # since 3.4
    return os.environ.get("TRITON_INTERPRET", "0") == "1" if knobs is None else bool(knobs.runtime.interpret)


@cache
def kernel(name: str) -> Any:
    """Return the kernel of that name. Triton is imported here and not before."""
    for path in _MODULES:
        module = importlib.import_module(path)
        if name in module.__all__:
            return getattr(module, name)
    raise KeyError(name)


def capability(tensor: Tensor) -> int:
    """The first number of the compute capability of a tensor's GPU; under the interpreter, that of an H100."""
    return torch.cuda.get_device_capability(tensor.device)[0] if tensor.is_cuda else 9


def launch(name: str, programs: int, arguments: dict[str, Any]) -> None:
    """Run that many programs of a kernel on the device of its tensors."""
    some = next(value for value in arguments.values() if isinstance(value, Tensor))
    # Triton launches on the current device, whatever the tensors'
    with torch.cuda.device(some.device) if some.is_cuda else nullcontext():
        kernel(name)[(programs,)](**arguments)


def written(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which a kernel writes a result of this dtype. GPUs round to bfloat16, the interpreter cuts off."""
    return torch.float32 if interpreted() else dtype


def power_of_two(count: int) -> int:
    """The first power of two that is not below `count`."""
    return 1 << max(count - 1, 0).bit_length()


def rows(tensor: Tensor) -> Tensor:
    """The tensor with neighbours side by side along the last axis, which is all that the kernels ask for."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def spread(found: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    """The inverse of leaving out what nobody wants."""
    rest = iter(found)
    return [next(rest) if want else None for want in wanted]
