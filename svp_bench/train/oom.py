"""Report in one line that memory ran out: the requested bytes, the memory of the device, and the flags that help."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from svp_bench.core.errors import OutOfMemoryError, file_size
from svp_bench.train.provenance import device_name

__all__ = ["TRAINING_FLAGS", "is_out_of_memory", "out_of_memory"]

TRAINING_FLAGS = (
    "--trainer.accumulate_grad_batches 2, 4, … (the same batch in parts), --model.grad_checkpointing true, a smaller "
    "--data.batch_size, or --trainer.precision bf16-mixed"
)
_HOST = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory")
_OUT_OF_MEMORY = re.compile(rf"out of memory|_STATUS_ALLOC_FAILED|{_HOST.pattern}", re.IGNORECASE)
_REQUESTED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means "out of memory": of CUDA's allocator, cuBLAS, the driver or the CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def out_of_memory(error: BaseException, where: str, device: torch.device, flags: str) -> OutOfMemoryError:
    """Return the line for an out-of-memory error.

    Args:
        error: The error.
        where: What ran, e.g. "train, vim_small_patch16_224, bf16-mixed".
        device: Where it ran.
        flags: The flags that help.
    """
    if device.type != "cpu" and (isinstance(error, MemoryError) or _HOST.search(str(error))):
        return OutOfMemoryError(f"out of memory ({where}): the machine's, not the GPU's; use fewer --data.num_workers")
    found = _REQUESTED.search(str(error))
    size = f"failed to allocate {file_size(float(found[1]) * _UNITS[found[2].lower()])}; " if found else ""
    return OutOfMemoryError(f"out of memory ({where}): {size}{_capacity(device)}; try {flags}")


def _capacity(device: torch.device) -> str:
    """Return "NVIDIA H100 has 79.2 GiB"."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
    else:
        try:
            found = re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text(encoding="ascii"))
        except OSError:  # not Linux
            found = None
        if found is None:
            return device_name(device)
        total = int(found[1]) * 2**10
    return f"{device_name(device)} has {file_size(total)}"
