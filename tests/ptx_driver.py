"""A driver for Triton without a GPU: kernels are compiled for one as ever, and run on the machine of ptx.py.

`install()` makes it Triton's driver in this process, so that a launch runs all of Triton: arguments are
specialised, the compiler is called, and what it made is executed on the CPU's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from ptx import Counts, Memory, Program
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.backends.nvidia.compiler import CUDABackend
from triton.compiler import CompiledKernel


class Driver(DriverBase):  # type: ignore[misc]  # triton has no types
    """One GPU of the compute capability given (90: H100). `counts`, where set, takes what launches execute."""

    def __init__(self, capability: int = 90) -> None:
        super().__init__()
        self.target = GPUTarget("cuda", capability, 32)
        self.counts: Counts | None = None
        self.checked = True

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError  # no launcher is compiled

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Callable[..., Any]:
        raise NotImplementedError  # nothing is timed

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _memory(arguments: list[Any]) -> Memory:
    memory = Memory()
    for place, tensor in enumerate(arguments):
        if not isinstance(tensor, Tensor) or not tensor.numel():
            continue
        storage = tensor.untyped_storage()
        size = storage.nbytes() // 2 * 2
        offsets = torch.arange(size // 2).as_strided(
            (*tensor.shape, tensor.element_size() // 2),
            (*(stride * tensor.element_size() // 2 for stride in tensor.stride()), 1),
            tensor.storage_offset() * tensor.element_size() // 2,
        )
        memory.add(f"argument {place}", storage.data_ptr(), size, np.unique(offsets.numpy()))
    return memory


def _launcher(kernel: CompiledKernel, driver: Driver) -> Callable[..., None]:
    program = Program(kernel.asm["ptx"], kernel.metadata.shared)
    kinds = list(kernel.src.signature.values())

    def run(x: int, y: int, z: int, stream: int, function: Any, packed: Any, metadata: Any, *rest: Any) -> None:
        given = list(rest[2:])  # after the two hooks
        assert (y, z) == (1, 1)
        assert len(given) == len(kinds)
        passed = [value for value, kind in zip(given, kinds, strict=True) if kind != "constexpr"]
        plain = [value.data_ptr() if isinstance(value, Tensor) else value for value in passed]
        plain += [0] * (len(program.parameters) - len(plain))  # scratch, of which no kernel here asks for any
        program.run(x, plain, _memory(passed), driver.checked, driver.counts)

    return run


def install(capability: int = 90) -> Driver:
    """Make such a driver the one of this process, and let the backend's kernels take tensors of the CPU."""
    from svp_bench.ops import triton as backend
    from svp_bench.ops import triton_launch

    driver = Driver(capability)
    triton.runtime.driver.set_active(driver)

    def handles(kernel: CompiledKernel) -> None:
        if kernel._run is None:
            kernel._run = _launcher(kernel, driver)

    CompiledKernel._init_handles = handles
    # PTX is all that is needed: it is not assembled, and so stored apart from where kernels for a GPU are looked up
    triton.knobs.cache.dir = str(Path(triton.knobs.cache.dir) / "ptx")
    CUDABackend.make_cubin = lambda *given: b""
    triton_launch.capability = lambda tensor: capability // 10
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty makes with NaN
    backend.unavailable = lambda: None
    backend.unsupported = lambda device, dtype: None
    return driver
