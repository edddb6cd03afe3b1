"""Detect an out-of-memory error, and report a number of images that fits, found by halving it on real steps."""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from svp_bench.core.errors import ConfigError, OutOfMemoryError, file_size, one_line, plural
from svp_bench.data.module import VisionDataModule
from svp_bench.methods.checks import trained_parameters
from svp_bench.train.module import AdaptationModule
from svp_bench.train.provenance import device_name

_HOST = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory")
_OUT_OF_MEMORY = re.compile(rf"out of memory|_STATUS_ALLOC_FAILED|{_HOST.pattern}", re.IGNORECASE)
_REQUESTED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_Context = Callable[[], AbstractContextManager[Any]]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means "out of memory": of CUDA's allocator, cuBLAS, the driver or the CPU allocator."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


class AllocationFailure(NamedTuple):
    """The facts of an out-of-memory error: requested bytes, if known, and whether the memory of the host ran out."""

    requested: int | None
    on_host: bool

    @classmethod
    def from_error(cls, error: BaseException) -> AllocationFailure:
        """Read an error, and release the tensors of its frames, which are freed after the `except` clause."""
        found = _REQUESTED.search(str(error))
        requested = None if found is None else round(float(found[1]) * _UNITS[found[2].lower()])
        on_host = isinstance(error, MemoryError) or _HOST.search(str(error)) is not None
        current: BaseException | None = error
        while current is not None:
            traceback.clear_frames(current.__traceback__)
            current.__traceback__ = None  # closures hold tensors that a cleared frame does not
            current = current.__cause__ or current.__context__
        return cls(requested, on_host)

    def describe(self, module: AdaptationModule, images: int) -> str:
        """Return "64 images of 224x224 at a time; failed to allocate 2.0 GiB"."""
        height, width = module.model.image_size
        missing = "" if self.requested is None else f"; failed to allocate {file_size(self.requested)}"
        return f"{plural(images, 'image')} of {height}x{width} at a time{missing}"


def explain_run(
    failure: AllocationFailure,
    trainer: Trainer,
    module: AdaptationModule,
    data: VisionDataModule,
    role: str,
    resume: bool,
) -> OutOfMemoryError:
    """Return the error for a run that ran out of memory, with flags under which a step fits.

    Args:
        failure: The facts of the error.
        trainer: The trainer, after its teardown.
        module: The Lightning module; it is moved to the CPU.
        data: The data module.
        role: Split of the failed step: train, val or test.
        resume: Whether `--resume` continues the run.
    """
    device = trainer.strategy.root_device
    start = f"out of memory ({role}, {module.backbone_name}, {trainer.precision})"
    if failure.on_host and device.type != "cpu":
        return OutOfMemoryError(f"{start}: the machine's own memory, not the GPU's; use fewer --data.num_workers")
    try:
        asked = data.images_at_once(role)
        smaller = [one for one in _smaller_batches(data, trainer.accumulate_grad_batches, role) if one[0] < asked]
    except Exception:  # the data were not read yet
        return OutOfMemoryError(f"{start}; {_capacity(device)}")
    if trainer.world_size > 1:  # the other processes would wait
        flag = smaller[0][1] if smaller else "a smaller batch"
        found = f"{_capacity(device)}. Not measured with several processes; try {flag}"
    else:
        found = _measure(module, device, smaller, role == "train", trainer.precision_plugin.forward_context)
    more = "; --model.grad_checkpointing true and --trainer.precision bf16-mixed save memory too" * (role == "train")
    return OutOfMemoryError(
        f"{start}: {failure.describe(module, asked)}. {found}{more}{'; continue with --resume' * resume}"
    )


def explain_prediction(failure: AllocationFailure, module: AdaptationModule, images: int) -> OutOfMemoryError:
    """Return the error for a prediction that ran out of memory with `images` images at a time on the CPU."""
    smaller = [(images >> power, f"--batch_size {images >> power}") for power in range(1, images.bit_length())]
    found = _measure(module, torch.device("cpu"), smaller, False, nullcontext)
    return OutOfMemoryError(f"out of memory (predict): {failure.describe(module, images)}. {found}")


def _smaller_batches(data: VisionDataModule, accumulate: int, role: str) -> Iterator[tuple[int, str]]:
    """Yield (images at a time, flags): first with the same batch size, then with smaller ones."""
    batch = data.batch_size if role == "train" else data.eval_batch_size
    powers = range(1, batch.bit_length())
    options = [(f"--data.eval_batch_size {batch >> power}", {"batch_size": batch >> power}) for power in powers]
    if role == "train":
        cut = "--trainer.accumulate_grad_batches {} (--data.batch_size stays {})"
        options = [(cut.format(accumulate << power, batch), {"accumulate": accumulate << power}) for power in powers]
        options += [(f"--data.batch_size {batch >> power}", {"batch_size": batch >> power}) for power in powers]
    for flag, given in options:
        try:
            yield data.images_at_once(role, **given), flag
        except ConfigError:  # the batch, or the last one of an epoch, cannot be divided by it
            continue


def _measure(
    module: AdaptationModule, device: torch.device, smaller: Sequence[tuple[int, str]], trains: bool, context: _Context
) -> str:
    """Return the memory of the device, and the first flags of `smaller` with which a step fits."""
    for images, flag in [(0, ""), *smaller]:
        module.cpu().zero_grad(set_to_none=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        if not images:
            capacity = _capacity(device)
            continue
        try:
            with torch.compiler.set_stance("force_eager"):  # compiling takes minutes for each number of images
                _step(module.to(device), images, trains, context)
            return f"{capacity}. Measured: {plural(images, 'image')} at a time fit with {flag}"
        except Exception as error:
            if not is_out_of_memory(error):
                return f"{capacity}. Measuring failed ({one_line(f'{type(error).__name__}: {error}')}); try {flag}"
            AllocationFailure.from_error(error)
    return f"{capacity}. Not even 1 image fits; use a smaller --model.backbone or --data.image_size"


def _step(module: AdaptationModule, count: int, trains: bool, context: _Context) -> None:
    """Run one step of training with AdamW's state, or of evaluation, on blank images."""
    height, width = module.model.image_size
    images = torch.zeros(count, 3, height, width, dtype=torch.uint8, device=module.device)
    if not trains:
        with torch.inference_mode(), context():
            module.eval()(images)
        return
    optimizer = torch.optim.AdamW(trained_parameters(module.train().model).values(), lr=0.0)
    for part in (images[:1], images):
        with context():
            loss = module(part).float().logsumexp(-1).mean()
        loss.backward()
        optimizer.step()


def _capacity(device: torch.device) -> str:
    """Return "NVIDIA H100 has 79.2 GiB, 75.0 GiB available"."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
    else:
        try:
            text = Path("/proc/meminfo").read_text(encoding="ascii")
            total, free = (int(re.findall(rf"{key}: +(\d+)", text)[0]) * 2**10 for key in ("MemTotal", "MemAvailable"))
        except (OSError, IndexError):  # not Linux
            return device_name(device)
    return f"{device_name(device)} has {file_size(total)}, {file_size(free)} available"
