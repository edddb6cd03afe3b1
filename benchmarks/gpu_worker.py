"""The side of benchmarks/gpu.py that holds a model: a process for each set of packages, asked in lines of JSON.

A fork of mamba_ssm and the package of that name cannot live in one process, and memory of one baseline must not
count as another's. Its answers go to the standard output it was started with; output of libraries goes elsewhere.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import partial
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import svp_bench
from svp_bench.ops import Direction, backend_statuses, bidirectional_scan, choose


class Size(NamedTuple):
    """A backbone, and the shape of its scan: channels, states, tokens."""

    model: str
    side: int
    depth: int
    channels: int
    states: int
    length: int


SIZES = {
    "small": Size("vim_small_patch16_224", 224, 24, 768, 16, 197),
    "tiny": Size("vim_tiny_patch16_224", 224, 24, 384, 16, 197),
    "nano": Size("vim_nano_patch8_64", 64, 2, 128, 8, 65),  # of a dry run: two of its eight blocks
}
CLASSES = 100
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# Kernels by name, the first that fits. Ours: svp_bench/ops/triton_*.py; the packages' are of CUDA C++; on a CPU the
# names are those of autograd's functions and of operators.
GROUPS = {
    "scan forward": r"^scan_forward|selective_scan_fwd|^Scan$",
    "scan backward": r"^scan_backward|selective_scan_bwd|^ScanBackward",
    "convolution": r"^conv_(forward|backward)|causal_conv1d|^Conv(Backward)?$",
    "norms and prompts": r"^norm_|^prompts_|[lL]ayer_?[nN]orm|rms_?norm|^Norm(Backward)?$",
    # cuBLAS names: gemm, cutlass, nvjet or xmma; the patch embedding is one product as well
    "matrix products": r"gemm|gemv|cutlass|nvjet|xmma|splitK|convolve|^aten::(mm|addmm|bmm|mkldnn_convolution)$",
}
REST = "rest"
# Of ‖found - expected‖ / ‖expected‖. The same maths in float32 is off by some 1e-6; bfloat16 keeps 8 bits and adds up
# over the layers to some hundredths. A gate, a flip or a half left out is off by tenths and more.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
INTERFACE = "mamba_ssm.ops.selective_scan_interface"
FUSED = "mamba_inner_fn_no_out_proj"


def one_line(error: object) -> str:
    """One line, without the folders of this machine."""
    text = f"{type(error).__name__}: {error}" if isinstance(error, BaseException) else str(error)
    return re.sub(r"(?<![\w.~:/])/(?:[^\s/'\"():,]+/)+", "…/", " ".join(text.split()))[:500]


def group_of(kernel: str) -> str:
    return next((name for name, pattern in GROUPS.items() if re.search(pattern, kernel)), REST)


def kernel_times(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds of each group on the device, of a trace as the profiler exports it.

    (`key_averages` would build a Python object for each of the trace's events first, at a second for a few thousand.)
    """
    spent: dict[str, float] = defaultdict(float)
    for event in events:
        if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset"):
            spent[group_of(event["name"])] += event["dur"]
    return spent


def operator_times(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Microseconds of each group in operators on a CPU, without those that they call."""
    spent: dict[str, float] = defaultdict(float)
    open_ones: dict[Any, list[tuple[float, str]]] = defaultdict(list)  # by thread: when each ends, and its group
    found = [event for event in events if event.get("cat") == "cpu_op"]
    for event in sorted(found, key=lambda e: (e["ts"], -e["dur"])):
        inside, group = open_ones[event["tid"]], group_of(event["name"])
        while inside and inside[-1][0] <= event["ts"]:
            inside.pop()
        if inside:
            spent[inside[-1][1]] -= event["dur"]
        spent[group] += event["dur"]
        inside.append((event["ts"] + event["dur"], group))
    return spent


def distance(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖; infinite if anything is not finite."""
    found, expected = found.double(), expected.double()
    value = float((found - expected).norm() / expected.norm())
    return value if math.isfinite(value) else math.inf


def fused_function(fork: Path) -> Callable[..., Tensor]:
    """The fused inner function of a fork, as Vim's released code calls it.

    The fork's `mamba_ssm/__init__.py` is not run: it imports language models, which want a `transformers` of then.

    Raises:
        Exception: Of any kind, from the imports of a fork.
    """
    if not (fork / "mamba_ssm" / "ops" / "selective_scan_interface.py").is_file():
        raise FileNotFoundError("there is no mamba_ssm/ops/selective_scan_interface.py in the folder of --fork")
    sys.path.insert(0, str(fork))
    for name in ("mamba_ssm", "mamba_ssm.ops"):
        package = ModuleType(name)
        package.__path__ = [str(fork.joinpath(*name.split(".")))]
        sys.modules[name] = package
    found: Callable[..., Tensor] | None = getattr(importlib.import_module(INTERFACE), FUSED, None)
    if found is None:
        raise AttributeError(f"its {INTERFACE} has no {FUSED}")
    return found


def fused_forward(mixer: Any, inner: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    """Mixer "v2" as Vim's released code computes it: the fused function both ways, flipped, channels first; halved."""
    batch, length, width = hidden.shape
    xz = mixer.in_proj.weight @ hidden.reshape(-1, width).mT
    xz = xz.view(-1, batch, length).transpose(0, 1)
    outs = []
    for suffix, tokens in (("", xz), ("_b", xz.flip([-1]))):
        conv, dt = mixer.get_submodule(f"conv1d{suffix}"), mixer.get_submodule(f"dt_proj{suffix}")
        outs.append(
            inner(
                tokens,
                conv.weight,
                conv.bias,
                mixer.get_submodule(f"x_proj{suffix}").weight,
                dt.weight,
                -torch.exp(mixer.get_parameter(f"A{suffix}_log").float()),
                None,  # B and C come from the tokens
                None,
                mixer.get_parameter(f"D{suffix}").float(),
                delta_bias=dt.bias.float(),
                delta_softplus=True,
            )
        )
    return F.linear((outs[0] + outs[1].flip([-1])).mT / 2, mixer.out_proj.weight)


class Bench:
    """What a worker can be asked; one cell is held at a time.

    Args:
        device: cuda or cpu.
        fork: Where the fused function is taken from, or None for no backend `fork`.
    """

    def __init__(self, device: str, fork: Path | None = None) -> None:
        self.device = torch.device(device)
        self.models: dict[str, Any] = {}
        self.expected: dict[str, tuple[Tensor, Tensor]] = {}
        self.inner: Callable[..., Tensor] | str = "no --fork was given"
        if fork is not None:
            try:
                self.inner = fused_function(fork)
            except Exception as error:  # imports of a fork raise any error
                self.inner = one_line(error)
        self.fork = fork
        self.cell: dict[str, Any] | None = None
        self.work: Callable[[str], object] | None = None
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False  # fp32 means float32

    def answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Execute a request; an answer has `ok`, or `error` and its `reason`."""
        asked = dict(request)
        try:
            return {"ok": getattr(self, f"do_{asked.pop('do')}")(**asked)}
        except torch.OutOfMemoryError as error:
            problem = {"error": "out of memory", "reason": one_line(error)}
        except Exception as error:  # baselines raise any error; continue with the other cells
            problem = {"error": "failed", "reason": one_line(error)}
        self.do_release()  # outside of the except: the traceback held the tensors
        return problem

    def healthy(self) -> bool:
        """Whether the device can still be used; after an illegal access nothing in this process can."""
        try:
            self._wait()
        except Exception:
            return False
        return True

    # ---- requests

    def do_hello(self) -> dict[str, Any]:
        """Which backends can run in this process, and the packages' versions."""
        reasons = {s.name: None if s.reason is None else one_line(s.reason) for s in backend_statuses()}
        if self.fork is not None:
            reasons["fork"] = self.inner if isinstance(self.inner, str) else None
        versions = {"torch": str(torch.__version__)}
        for name in ("triton",) if self.fork else ("triton", "mamba-ssm", "causal-conv1d"):
            with suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        found: dict[str, Any] = {"reasons": reasons, "versions": versions}
        if self.fork is not None:
            found["fork"] = self._about_fork(self.fork)
        return found

    def do_device(self) -> dict[str, Any]:
        """What the floors need to know: a measured copy, the SMs, their highest clock."""
        cuda = self.device.type == "cuda"
        source = torch.empty(2**30 if cuda else 2**24, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        times = [self._timed(partial(target.copy_, source), 4) for _ in range(5)]
        found: dict[str, Any] = {"copy_bytes_per_second": 2 * source.numel() / statistics.median(times)}
        if cuda:
            about = torch.cuda.get_device_properties(self.device)
            clock = getattr(about, "clock_rate", None)  # in kHz; not in old versions
            found |= {
                "sms": about.multi_processor_count,
                "clock_hz": None if clock is None else 1000 * clock,
                "capability": f"sm_{about.major}{about.minor}",
                "memory_mib": about.total_memory // 2**20,
            }
        del source, target, times
        self._clear()
        return found

    def do_check(self, size: str, precision: str, backend: str) -> dict[str, Any]:
        """How far logits and gradients are from those of our reference in float32, on two images."""
        self.do_release()
        expected = self.expected.get(size) or self._results(size, "fp32", "reference")
        self.expected[size] = expected
        began = time.perf_counter()
        found = self._results(size, precision, backend)
        spent = time.perf_counter() - began
        logits, gradients = (distance(a, b) for a, b in zip(found, expected, strict=True))
        self.do_release()
        right = max(logits, gradients) <= TOLERANCE[precision]
        return {
            "logits": logits if math.isfinite(logits) else "not finite",
            "gradients": gradients if math.isfinite(gradients) else "not finite",
            "tolerance": TOLERANCE[precision],
            "right": right,
            "seconds": spent,
        }

    def do_prepare(self, cell: dict[str, Any], backend: str) -> dict[str, Any]:
        """Warm up: the seconds of the first step, which compiles, those of the third, and the most memory it takes."""
        self._arrange(cell)
        self._use(backend)
        began = time.perf_counter()
        self._run(backend, 1)
        self._wait()
        first = time.perf_counter() - began
        self._run(backend, 1)
        self._clear()
        self._wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        step = self._timed(lambda: self._run(backend, 1), 1)
        peak = torch.cuda.max_memory_allocated() / 2**20 if self.device.type == "cuda" else None
        self._clear()
        return {"first_seconds": first, "step_seconds": step, "peak_mib": peak}

    def do_turn(self, cell: dict[str, Any], backend: str, steps: int) -> float:
        """Seconds of a step. One step before is not counted: it takes its memory anew, which others had meanwhile."""
        self._arrange(cell)
        self._use(backend)
        self._run(backend, 1)
        spent = self._timed(lambda: self._run(backend, 1), steps)
        self._clear()
        return spent

    def do_profile(self, cell: dict[str, Any], backend: str, steps: int) -> dict[str, Any]:
        """Seconds of a step in kernels (on a CPU: in operators), and how they divide."""
        cuda = self.device.type == "cuda"
        self._arrange(cell)
        self._use(backend)
        self._run(backend, 1)
        self._wait()
        with profile(activities=[ProfilerActivity.CUDA if cuda else ProfilerActivity.CPU]) as seen:
            self._run(backend, steps)
            self._wait()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            seen.export_chrome_trace(str(path))
            events = json.loads(path.read_bytes())["traceEvents"]
        self._clear()
        spent = kernel_times(events) if cuda else operator_times(events)
        total = sum(spent.values())
        if total <= 0:
            raise RuntimeError("the profiler saw no kernel")
        shares = {name: spent[name] / total for name in (*GROUPS, REST)}
        return {"kernel_seconds": total / 1e6 / steps, "kernel_share": shares}

    def do_release(self) -> None:
        """Free the memory of the cell."""
        self.cell = self.work = None
        for model in self.models.values():
            model.zero_grad(set_to_none=True)
            model.to("cpu")
        self._clear()

    # ---- how

    def _about_fork(self, fork: Path) -> dict[str, Any]:
        """Return the module used, and the package of its kernels."""
        about: dict[str, Any] = {"folder": fork.name}
        interface = fork / "mamba_ssm" / "ops" / "selective_scan_interface.py"
        if interface.is_file():
            about["interface_sha256"] = hashlib.sha256(interface.read_bytes()).hexdigest()
        for name in ("selective_scan_cuda", "causal_conv1d_cuda"):
            place = getattr(sys.modules.get(name), "__file__", None)
            if place is not None:
                inside = Path(place).resolve().is_relative_to(fork.resolve())
                about[name] = "the fork's" if inside else "the environment's"
        about["norms_and_prompts"] = choose("auto", self.device, torch.float32).name
        return about

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _clear(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _run(self, backend: str, steps: int) -> None:
        assert self.work is not None
        for _ in range(steps):
            self.work(backend)

    def _timed(self, work: Callable[[], object], steps: int) -> float:
        """Seconds of one of `steps` calls."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(steps):
                work()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1000 / steps
        began = time.perf_counter()
        for _ in range(steps):
            work()
        return (time.perf_counter() - began) / steps

    def _model(self, size: str) -> Any:
        """The SVP model of a size, on the device; made once, since drawing its weights takes a second."""
        if size not in self.models:
            torch.manual_seed(0)
            made: Any = svp_bench.create_model(SIZES[size].model, num_classes=CLASSES, method="svp")
            with torch.no_grad():  # away from zero, as after the first steps
                made.adapter.alpha.normal_(std=0.1)
                made.adapter.beta.normal_(std=0.1)
            made.layers = made.layers[: SIZES[size].depth]
            self.models[size] = made
        return self.models[size].to(self.device)

    def _use(self, backend: str) -> None:
        """Give the models this backend. The fork replaces the mixer alone: norms and prompts stay our fastest."""
        for model in self.models.values():
            for mixer in model.mixers:
                mixer.__dict__.pop("forward", None)
            model.set_scan_backend("auto" if backend == "fork" else backend)
            if backend == "fork":
                if isinstance(self.inner, str):
                    raise RuntimeError(self.inner)
                for mixer in model.mixers:
                    mixer.forward = partial(fused_forward, mixer, self.inner)

    def _loss(self, model: nn.Module, images: Tensor, labels: Tensor, precision: str) -> tuple[Tensor, Tensor]:
        """Logits and loss as a Trainer's `bf16-mixed` or `32-true` has them."""
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            logits = model(images)
            return logits, F.cross_entropy(logits, labels)

    def _images(self, size: str, batch: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator(self.device).manual_seed(0)
        side, here = SIZES[size].side, self.device
        images = torch.randn(batch, 3, side, side, generator=generator, device=here)
        return images, torch.randint(0, CLASSES, (batch,), generator=generator, device=here)

    def _results(self, size: str, precision: str, backend: str) -> tuple[Tensor, Tensor]:
        """Logits and all gradients of one training step, on the CPU."""
        model = self._model(size).train()
        self._use(backend)
        model.zero_grad(set_to_none=True)
        logits, loss = self._loss(model, *self._images(size, 2), precision)
        loss.backward()
        gradients = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        return logits.detach().float().cpu(), gradients.float().cpu()

    def _arrange(self, cell: dict[str, Any]) -> None:
        if cell == self.cell:  # it serves all backends of this process
            return
        self.do_release()
        make = self._scan if cell["what"].startswith("scan_") else self._whole_model
        self.work, self.cell = make(**cell), cell

    def _whole_model(self, what: str, size: str, precision: str, batch: int) -> Callable[[str], object]:
        model = self._model(size).train(what == "train")
        images, labels = self._images(size, batch)

        def forward(backend: str) -> None:
            with (
                torch.inference_mode(),
                torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=precision == "bf16"),
            ):
                model(images)

        if what == "forward":
            return forward
        trained = [p for p in model.parameters() if p.requires_grad]
        # As svp_bench/train/optim.py makes it, but at rate 0: it costs the same, and the next comparison with the
        # reference finds the weights of the first.
        optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=1e-4)

        def step(backend: str) -> None:
            optimizer.zero_grad(set_to_none=True)
            self._loss(model, images, labels, precision)[1].backward()
            optimizer.step()

        return step

    def _scan(self, what: str, size: str, precision: str, batch: int) -> Callable[[str], object]:
        """The two-way scan alone, its arguments strided as in the mixer; weights are frozen and float32."""
        shape, dtype = SIZES[size], DTYPES[precision]
        rank = math.ceil(shape.channels / 32)

        def tokens(width: int, shift: float = 0.0) -> Tensor:
            return (torch.randn(batch, shape.length, width, device=self.device) + shift).to(dtype)

        def direction() -> Direction:
            A = -torch.arange(1.0, shape.states + 1, device=self.device).repeat(shape.channels, 1)
            columns = tokens(rank + 2 * shape.states)
            B, C = columns[..., rank : rank + shape.states], columns[..., rank + shape.states :]
            skip, bias = torch.ones(shape.channels, device=self.device), torch.zeros(shape.channels, device=self.device)
            return Direction(tokens(shape.channels), tokens(shape.channels, -3.0), A, B, C, skip, bias)

        ahead, back = direction(), direction()
        z = tokens(2 * shape.channels)[..., shape.channels :]

        def forward(backend: str) -> None:
            with torch.no_grad():
                bidirectional_scan(ahead, back, z, backend=backend)

        if what == "scan_forward":
            return forward
        grad = tokens(shape.channels)
        leaves = [z, *(getattr(d, name) for d in (ahead, back) for name in ("u", "delta", "B", "C"))]
        for leaf in leaves:
            leaf.requires_grad_()

        def both(backend: str) -> None:
            torch.autograd.grad(bidirectional_scan(ahead, back, z, backend=backend), leaves, grad)

        return both


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], required=True)
    parser.add_argument("--fork", type=Path)
    given = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    bench = Bench(given.device, given.fork)
    for line in sys.stdin:
        answer = bench.answer(json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)
        if "error" in answer and not bench.healthy():
            sys.exit("the device cannot be used any more by this process")


if __name__ == "__main__":
    main()
