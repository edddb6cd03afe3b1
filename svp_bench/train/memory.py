"""What a device has, and what a step needs of it, measured: for the sentence that ends a run out of memory."""

from __future__ import annotations

import ctypes
import gc
import re
import sys
import time
import traceback
import weakref
from bisect import bisect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from svp_bench.methods.build import trained_parameters
from svp_bench.train.module import AdaptationModule
from svp_bench.train.optim import make_optimizer
from svp_bench.train.provenance import device_name

__all__ = [
    "Counted",
    "CudaGauge",
    "Gauge",
    "HostGauge",
    "Need",
    "Room",
    "Shortage",
    "Steps",
    "gauge_of",
    "is_out_of_memory",
    "let_go",
    "stepping",
]

_HOST = re.compile(r"DefaultCPUAllocator|can't allocate memory|not enough memory")
_OUT = re.compile(rf"out of memory|_STATUS_ALLOC_FAILED|{_HOST.pattern}", re.IGNORECASE)
_REQUESTED = re.compile(r"tried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)", re.IGNORECASE)
_UNITS = {"bytes": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}


# --- the error -------------------------------------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the machine, has no more memory.

    CUDA's allocator has a class of its own for it; cuBLAS, the driver and the allocator of CPUs have their texts.
    """
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _OUT.search(str(error)) is not None


class Shortage(NamedTuple):
    """What an error says about the memory that was not there.

    Attributes:
        text: Its first line.
        requested: Bytes of the allocation that failed, or None if it does not say.
        of_the_host: Whether it is the machine's own memory, whatever the device.
    """

    text: str
    requested: int | None
    of_the_host: bool

    @classmethod
    def told_by(cls, error: BaseException) -> Shortage:
        """Read an error, and let it go."""
        text = str(error)
        found = _REQUESTED.search(text)
        asked = None if found is None else round(float(found[1]) * _UNITS[found[2].lower()])
        host = isinstance(error, MemoryError) or _HOST.search(text) is not None
        let_go(error)
        return cls((text.splitlines() or [type(error).__name__])[0][:200], asked, host)


def let_go(error: BaseException | None) -> None:
    """Drop what the frames of an error and of those before it hold: the tensors of the step that failed.

    All of it goes once the `except` clause has ended.
    """
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = None  # functions within functions hold tensors that a cleared frame does not
        error = error.__cause__ or error.__context__


# --- what a device has -----------------------------------------------------------------------------------------------


class Room(NamedTuple):
    """What a device has.

    Attributes:
        name: Its name.
        total: Bytes.
        free: Bytes that a run of this process can have, its weights included on a GPU; None where nobody knows.
    """

    name: str
    total: int
    free: int | None


class Gauge(Protocol):
    """Measures one device.

    Attributes:
        share: Of what is free, that may be planned with.
    """

    share: float

    def room(self) -> Room:
        """Return what it has."""

    def rest(self, module: AdaptationModule) -> None:
        """Take what lives now for what lives at rest: it is left out of all peaks."""

    def tidy(self) -> None:
        """Give back what nobody uses."""

    def peak(self, step: Callable[[], None]) -> int:
        """Do a step, and return the bytes at its peak."""


class CudaGauge:
    """Measures a GPU by PyTorch's allocator.

    Args:
        device: The GPU.
    """

    share = 0.95  # the allocator cuts memory into pieces

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rest = 0

    def room(self) -> Room:
        """Return what the card has. Free is what others leave and what this process may have of it."""
        free, total = torch.cuda.mem_get_info(self._device)
        free += torch.cuda.memory_reserved(self._device)  # by this process, whose run is over
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", None)  # torch >= 2.7
        if fraction is not None:
            free = min(free, int(total * fraction(self._device)))
        return Room(device_name(self._device), total, free)

    def rest(self, module: AdaptationModule) -> None:
        """Leave out what lives now: what the failed run could not let go. The weights are not there yet."""
        self.tidy()
        self._rest = torch.cuda.memory_allocated(self._device)

    def tidy(self) -> None:
        """Give back what nobody uses."""
        gc.collect()
        clear = getattr(torch._C, "_cuda_clearCublasWorkspaces", None)  # or they would not be counted as a run's
        if clear is not None:
            clear()
        torch.cuda.empty_cache()

    def peak(self, step: Callable[[], None]) -> int:
        """Do a step, and return the bytes of tensors at its peak."""
        torch.cuda.reset_peak_memory_stats(self._device)
        step()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_allocated(self._device) - self._rest


class Counted(TorchDispatchMode):
    """Counts the bytes of the tensors that are made while it lasts and still live: on CPUs PyTorch keeps no count.

    Attributes:
        live: Bytes now.
        peak: The most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def leave_out(self, tensor: Tensor) -> None:
        """Do not count a tensor that was there before."""
        self._known.add(tensor.untyped_storage()._cdata)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in tree_leaves(out):
            if isinstance(part, Tensor):
                self._count(part.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


class HostGauge:
    """Measures a CPU's memory: what the system says, and the tensors that a step makes.

    What is free is looked up at once, before a run: what it leaves behind stays with the process and would look taken.
    """

    share = 0.8  # so does the system's, and what libraries take for themselves is not counted

    def __init__(self) -> None:
        self._room = host_room()
        self._counted = Counted()

    def room(self) -> Room:
        """Return what the machine, or whoever limits this process, has."""
        return self._room

    def rest(self, module: AdaptationModule) -> None:
        """Leave the weights out: they were there when the room was looked up."""
        self.tidy()
        averages = () if module.ema is None else module.ema.weights.values()
        for tensor in (*module.parameters(), *module.buffers(), *averages):
            self._counted.leave_out(tensor)

    def tidy(self) -> None:
        """Give back what nobody uses, also what glibc keeps (`ops.memory`): a limit counts it."""
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
        if trim is not None:
            trim(0)

    def peak(self, step: Callable[[], None]) -> int:
        """Do a step, and return the bytes of tensors at its peak."""
        self._counted.peak = self._counted.live
        with self._counted:
            step()
        return self._counted.peak


def gauge_of(device: torch.device) -> Gauge | None:
    """Return what measures a device, or None if nothing does."""
    if device.type == "cuda":
        return CudaGauge(device)
    return HostGauge() if device.type == "cpu" else None


def host_room() -> Room:
    """Return the narrowest of what may be had here: of the machine, of the control group, by `ulimit -v`."""
    rooms = [room for room in (_machine(), _control_group(), _address_space()) if room is not None]
    if not rooms:
        return Room(device_name(torch.device("cpu")), 0, None)
    limit, total, free = min(rooms, key=lambda room: room.free or 0)
    name = device_name(torch.device("cpu"))
    return Room(f"{name} by {limit}" if limit else name, total, free)


def _numbers(file: str) -> dict[str, int]:
    """Read lines of a name and a number, as the kernel writes them; none where there is no such file."""
    try:
        rows = [line.replace(":", " ").split() for line in Path(file).read_text(encoding="ascii").splitlines()]
    except (OSError, ValueError):
        return {}
    return {row[0]: int(row[1]) for row in rows if len(row) > 1 and row[1].isdigit()}


def _machine() -> Room | None:
    found = _numbers("/proc/meminfo")  # in KiB
    if "MemAvailable" not in found:
        return None  # no Linux
    return Room("", found["MemTotal"] * 2**10, found["MemAvailable"] * 2**10)


def _control_group() -> Room | None:
    """What a container or a batch system grants, by either version of control groups."""
    for folder, most, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            limit, taken = (int((Path(folder) / name).read_text(encoding="ascii")) for name in (most, used))
        except (OSError, ValueError):  # no such version, or no limit ("max")
            continue
        cache = _numbers(f"{folder}/memory.stat").get("inactive_file", 0)
        if limit < 2**60:
            return Room("its control group", limit, max(0, limit - taken + cache))
    return None


def _address_space() -> Room | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    taken = _numbers("/proc/self/status").get("VmSize")
    if limit == resource.RLIM_INFINITY or taken is None:
        return None
    return Room("ulimit -v", limit, max(0, limit - taken * 2**10))


# --- what a step needs -----------------------------------------------------------------------------------------------


class Need:
    """What steps of some kind need, by their number of images: measured at 1, 2, 4 … as far as asked, and beyond and
    between on the line through the two nearest.

    Args:
        measure: Images → bytes at the peak of a step, or None if the memory did not suffice.
        budget: Bytes that a step may need.
        patience: Seconds after which no more is measured but the first two.
    """

    def __init__(self, measure: Callable[[int], int | None], budget: int, patience: float = 30) -> None:
        self._measure = measure
        self._budget = budget
        self._until = time.monotonic() + patience
        self._points: dict[int, int] = {}  # all fit, but the last perhaps
        self._top = 0  # the most images that were seen to fit
        self._over: int | None = None  # the fewest that were seen not to

    @property
    def measured(self) -> list[int]:
        """The numbers of images that were measured."""
        return sorted(self._points)

    def at(self, images: int) -> int | None:
        """Return the bytes for so many images; None where nothing says."""
        if images in self._points:
            return self._points[images]
        if len(self._points) < 2:
            return None
        known = self.measured
        place = min(max(1, bisect(known, images)), len(known) - 1)
        low, high = known[place - 1 : place + 1]
        each = max(0.0, (self._points[high] - self._points[low]) / (high - low))
        return round(self._points[low] + each * (images - low))

    def fits(self, images: int) -> bool:
        """Whether so many images fit: seen, unless patience is at its end. Goes there by doubling."""
        while True:
            if images <= self._top:
                return True
            if self._over is not None and images >= self._over:
                return False
            after = min(images, 2 * self._top or 1)
            needed = self.at(after)
            if needed is not None and needed > self._budget:
                return False
            if len(self._points) > 1 and time.monotonic() > self._until:
                needed = self.at(images)
                return needed is not None and needed <= self._budget
            self._try(after)

    def _try(self, images: int) -> None:
        needed = self._measure(images)
        if needed is not None:
            self._points[images] = needed
        if needed is not None and needed <= self._budget:
            self._top = images
        else:
            self._over = images

    def most(self, images: int) -> int:
        """Return about how many images fit, `images` at most; 0 if not even one does."""
        if self.fits(images):
            return images
        low, high = self._top, images if self._over is None else min(self._over, images)
        while high - low > 1:
            middle = (low + high) // 2
            needed = self.at(middle)
            low, high = (middle, high) if needed is not None and needed <= self._budget else (low, middle)
        return low


class Steps:
    """Steps of a module on made-up images, as a run does them.

    Args:
        module: What takes them, on its device.
        gauge: Measures that.
        around: Makes the surroundings of a forward pass, i.e. its precision.
    """

    def __init__(
        self, module: AdaptationModule, gauge: Gauge, around: Callable[[], AbstractContextManager[Any]] = nullcontext
    ) -> None:
        self._module = module
        self._gauge = gauge
        self._around = around
        self._trained = list(trained_parameters(module.model).values())
        self._optimizer: torch.optim.Optimizer | None = None

    def train(self, images: int, checkpointing: bool) -> int | None:
        """Return the peak bytes of a step of training that is not the first; None if the memory does not suffice.

        Gradients of the step before are there, as they are with accumulation.
        """
        self._module.model.set_grad_checkpointing(checkpointing)
        if self._optimizer is None and self._peak(lambda: self._train(1)) is None:  # after it the optimizer has a state
            return None
        return self._peak(lambda: self._train(images))

    def evaluate(self, images: int) -> int | None:
        """Return the peak bytes of a step of evaluation, beside the optimizer's state if there is one by now."""
        return self._peak(lambda: self._evaluate(images))

    def _peak(self, step: Callable[[], None]) -> int | None:
        try:
            peak: int | None = self._gauge.peak(step)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            let_go(error)
            peak = None
        if peak is None:
            self._gauge.tidy()
        return peak

    def _images(self, count: int) -> Tensor:
        height, width = self._module.model.patch_embed.img_size
        return torch.zeros(count, 3, height, width, dtype=torch.uint8, device=self._module.device)

    def _train(self, count: int) -> None:
        module = self._module.train()
        labels = torch.zeros(count, dtype=torch.int64, device=module.device)
        with self._around():
            logits = module(self._images(count))
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=module.label_smoothing)
        loss.backward()
        del logits, loss
        if self._optimizer is None:
            self._optimizer = make_optimizer(
                [{"params": self._trained, "weight_decay": 0.0}],
                module.optimizer_name,
                0.0,
                betas=module.betas,
                eps=module.eps,
                momentum=module.momentum,
            )
        for parameter in self._trained:
            if parameter.grad is not None:
                parameter.grad.zero_()  # the weights stay what they are, whatever the gradients were
        self._optimizer.step()

    def _evaluate(self, count: int) -> None:
        module = self._module.eval()
        with torch.inference_mode(), self._around():
            module(self._images(count))


@contextmanager
def stepping(
    module: AdaptationModule,
    gauge: Gauge,
    device: torch.device,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[Steps, Room]]:
    """Bring a module to its device for some steps, and yield these and what the device has.

    Random state, weights and modes are what they were, afterwards. What torch.compile made is left aside: it would be
    made anew, in minutes, for each number of images.
    """
    model = module.model
    checkpointing, training = model.grad_checkpointing, module.training
    compiled = getattr(model, "_compiled_call_impl", None) is not None
    module.cpu().zero_grad(set_to_none=True)
    _move_average(module, torch.device("cpu"))
    gauge.rest(module)
    room = gauge.room()
    try:
        with (
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
            torch.compiler.set_stance("force_eager") if compiled else nullcontext(),
        ):
            module.to(device)
            _move_average(module, device)
            yield Steps(module, gauge, around), room
    finally:
        module.zero_grad(set_to_none=True)
        module.cpu().train(training)
        _move_average(module, torch.device("cpu"))
        model.set_grad_checkpointing(checkpointing)
        gauge.tidy()


def _move_average(module: AdaptationModule, device: torch.device) -> None:
    if module.ema is not None:
        module.ema.weights = {name: weight.to(device) for name, weight in module.ema.weights.items()}
