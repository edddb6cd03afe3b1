"""Vim on CPUs against the floor of its matrix products, and the scan against its baselines: ratios of one run.

    python benchmarks/cpu.py [--quick] [--baselines PYTHON] [--output FOLDER]

Every ratio is of medians taken in turns, on the threads that PyTorch uses. Read benchmarks/README.md first.
"""

from __future__ import annotations

import argparse
import datetime as dt
import gc
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as `svp-bench` does; read when torch is imported

import torch
import torch.nn.functional as F
from torch import Tensor

import svp_bench
from svp_bench.ops import Direction, bidirectional_scan, selective_scan

SIZES = {"tiny": 192, "small": 384}
BATCH = 8
UNBIND_DEPTHS = (1, 4)


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def in_turns(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, measured A B C A B C … after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for count in range(rounds + 1):
        for name, work in works.items():
            spent = seconds(work)
            if count:
                times[name].append(spent)
    return {name: statistics.median(values) for name, values in times.items()}


class Floor:
    """The matrix products of one Vim with SVP and nothing else, with the operands of a batch of 224² images.

    Forward: patch embedding; in_proj, both x_proj and dt_proj, out_proj of each block. The step adds what a frozen
    backbone needs backward (gradients of inputs only) and both directions of SVP's generators.
    """

    def __init__(self, width: int, batch: int = BATCH, length: int = 197, hidden: int = 64, depth: int = 24) -> None:
        inner, rank, tokens = 2 * width, width // 16, batch * length

        def weights(rows: int, columns: int) -> list[Tensor]:
            return [torch.randn(rows, columns) * columns**-0.5 for _ in range(depth)]

        self.depth = depth
        self.w_in, self.w_out = weights(2 * inner, width), weights(width, inner)
        self.w_x = [weights(rank + 32, inner) for _ in range(2)]
        self.w_dt = [weights(inner, rank) for _ in range(2)]
        self.w_cross, self.w_down, self.w_up = weights(width, width), weights(hidden, width), weights(width, hidden)
        self.x, self.e, self.xz = torch.randn(tokens, width), torch.randn(tokens, inner), torch.randn(tokens, 2 * inner)
        self.dt, self.x_dbl = torch.randn(tokens, rank), torch.randn(tokens, rank + 32)
        self.hidden = torch.randn(tokens, hidden)
        self.images, self.patch = torch.randn(batch, 3, 224, 224), torch.randn(width, 3, 16, 16)

    def forward(self) -> None:
        F.conv2d(self.images, self.patch, stride=16)
        for i in range(self.depth):
            self.x @ self.w_in[i].T
            for k in range(2):
                self.e @ self.w_x[k][i].T
                self.dt @ self.w_dt[k][i].T
            self.e @ self.w_out[i].T

    def step(self) -> None:
        self.forward()
        for i in range(self.depth):
            self.x @ self.w_out[i]
            for k in range(2):
                self.e @ self.w_dt[k][i]
                self.x_dbl @ self.w_x[k][i]
            self.xz @ self.w_in[i]
            self.x @ self.w_down[i].T, self.hidden @ self.w_up[i].T, self.x @ self.w_cross[i].T
            self.x @ self.w_up[i], self.hidden @ self.w_down[i], self.x @ self.w_cross[i]
            self.x.T @ self.hidden, self.hidden.T @ self.x, self.x.T @ self.x


def model_of(size: str, method: str, backend: str = "auto", depth: int = 24) -> torch.nn.Module:
    model = svp_bench.create_model(f"vim_{size}_patch16_224", num_classes=100, method=method)
    if method == "svp":
        with torch.no_grad():  # away from zero, as after the first steps
            model.adapter.alpha.normal_()
            model.adapter.beta.normal_()
    model.set_scan_backend(backend)
    model.layers = model.layers[:depth]
    return model


def stepper(model: torch.nn.Module, batch: int = BATCH) -> Callable[[], None]:
    images, labels = torch.randn(batch, 3, 224, 224), torch.randint(0, 100, (batch,))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model(images), labels).backward()

    return step


def whole_model(size: str, rounds: int) -> dict[str, float]:
    floor, model, bare = Floor(SIZES[size]), model_of(size, "svp"), model_of(size, "linear")
    images = torch.randn(BATCH, 3, 224, 224)

    def forward(model: torch.nn.Module) -> None:
        with torch.no_grad():
            model(images)

    works = {
        "step": stepper(model),
        "floor_step": floor.step,
        "forward": lambda: forward(bare),
        "floor_forward": floor.forward,
        "forward_with_prompts": lambda: forward(model),
    }
    times = in_turns(works, rounds)
    return {
        **times,
        "step_ratio": times["step"] / times["floor_step"],
        "forward_ratio": times["forward"] / times["floor_forward"],
    }


def full_against_svp(size: str, rounds: int) -> dict[str, float]:
    """Time of full fine-tuning a matrix FLOP, over that of SVP."""
    width, tokens, depth = SIZES[size], BATCH * 197, 24
    inner, rank = 2 * width, width // 16
    per_token = depth * (3 * width * inner + 2 * inner * (2 * rank + 32))  # multiply-adds of the blocks' weights
    generators = depth * (width * width + 2 * 64 * width)
    flops = {"svp": tokens * (2 * per_token + 3 * generators), "full": tokens * 3 * per_token}
    times = in_turns({name: stepper(model_of(size, name)) for name in ("svp", "full")}, rounds)
    ratio = (times["full"] / flops["full"]) / (times["svp"] / flops["svp"])
    return {**times, "per_flop_ratio": ratio}


def unbind_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """The recurrence in plain PyTorch, step by step over unbound tensors, in mamba_ssm's layout."""
    decay = torch.exp(torch.einsum("bdl,dn->lbdn", delta, A))
    drive = torch.einsum("bdl,bnl,bdl->lbdn", delta, B, u)
    h = torch.zeros_like(decay[0])
    ys = []
    for a, x, c in zip(decay.unbind(), drive.unbind(), C.permute(2, 0, 1).unbind(), strict=True):
        h = a * h + x
        ys.append(torch.einsum("bdn,bn->bd", h, c))
    return torch.stack(ys, dim=-1) + D[:, None] * u


def scan_inputs(batch: int, width: int, length: int, states: int) -> list[Tensor]:
    shapes = [(batch, width, length)] * 2 + [(width, states)] + [(batch, states, length)] * 2 + [(width,)]
    values = [torch.randn(shape) for shape in shapes]
    values[1] = F.softplus(values[1] - 3)
    values[2] = -values[2].exp()
    return values


def isolated_scan(rounds: int, baselines: str | None) -> dict[str, Any]:
    shape = (8, 768, 197, 16)
    inputs = [t.requires_grad_() for t in scan_inputs(*shape)]
    frozen = [t.detach() for t in inputs]

    def both(scan: Callable[..., Tensor]) -> Callable[[], object]:
        return lambda: torch.autograd.grad(scan(*inputs).sum(), inputs)

    ours = {name: (lambda *t, name=name: selective_scan(*t, backend=name)) for name in ("cpu", "reference")}
    scans = {**ours, "unbind": unbind_scan}
    rows = {
        "forward": in_turns({name: (lambda s=s: s(*frozen)) for name, s in scans.items()}, rounds),
        "forward_backward": in_turns({name: both(s) for name, s in scans.items()}, rounds),
    }
    if baselines:
        command = [baselines, __file__, "--as-baseline"]
        where = {
            **os.environ,
            "PYTHONPATH": str(Path(svp_bench.__file__).parents[1]),
        }  # that environment has not installed us
        answer = subprocess.run(command, capture_output=True, text=True, check=False, env=where)
        found = json.loads(answer.stdout.splitlines()[-1]) if answer.returncode == 0 else {}
        for name, times in found.items():
            rows["forward"][name], rows["forward_backward"][name] = times
        if not found:
            print(f"baselines left out: {answer.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
    return {"shape": dict(zip(("batch", "dim", "length", "state"), shape, strict=True)), **rows}


def baseline_times() -> dict[str, tuple[float, float]]:
    """Times of mamba.py's parallel scan, in an environment that has it."""
    from mambapy.pscan import pscan

    u, delta, A, B, C, D = (t.requires_grad_() for t in scan_inputs(8, 768, 197, 16))

    def scan() -> Tensor:
        steps, x = delta.mT, u.mT
        decay = torch.exp(steps.unsqueeze(-1) * A)
        drive = steps.unsqueeze(-1) * B.mT.unsqueeze(2) * x.unsqueeze(-1)
        return (pscan(decay, drive) @ C.mT.unsqueeze(-1)).squeeze(-1) + D * x

    def forward() -> None:
        with torch.no_grad():
            scan()

    leaves = [u, delta, A, B, C, D]
    times = in_turns({"f": forward, "fb": lambda: torch.autograd.grad(scan().sum(), leaves)}, 2)
    return {"mamba.py": (times["f"], times["fb"])}


def unbind_step(rounds: int, ours: float) -> dict[str, Any]:
    """SVP step of Vim-S with the unbind form both ways, extrapolated from two depths, next to our whole step."""
    import svp_bench.models.vim as vim

    def in_vim(forward: Direction, backward: Direction, z: Tensor, *, recompute: object, backend: str) -> Tensor:
        ys = []
        for d, back in ((forward, False), (backward, True)):
            u, delta, B, C = (
                (t.flip(1) if back else t).mT for t in (d.u, F.softplus(d.delta + d.delta_bias), d.B, d.C)
            )
            y = unbind_scan(u, delta, d.A, B, C, d.D).mT
            ys.append(y.flip(1) if back else y)
        return (ys[0] + ys[1]) / 2 * F.silu(z)

    times = {}
    for depth in UNBIND_DEPTHS:
        step = stepper(model_of("small", "svp", depth=depth))

        def unbind(step: Callable[[], None] = step) -> None:
            vim.bidirectional_scan = in_vim  # type: ignore[assignment]
            try:
                step()
            finally:
                vim.bidirectional_scan = bidirectional_scan

        times[depth] = in_turns({"unbind": unbind}, rounds)["unbind"]
    few, more = UNBIND_DEPTHS
    whole = times[few] + (24 - few) * (times[more] - times[few]) / (more - few)
    return {"extrapolated_from_depths": UNBIND_DEPTHS, "cpu": ours, "unbind": whole, "unbind_over_cpu": whole / ours}


def scaling(rounds: int) -> list[dict[str, Any]]:
    """Seconds of the two-way scan, forward and backward, a token, over length and batch: flat if it is linear."""
    rows = []
    for batch, length in ((8, 197), (8, 730), (2, 2917), (1, 197), (32, 197)):

        def direction(batch: int = batch, length: int = length) -> Direction:
            u, delta, A, B, C, D = scan_inputs(batch, 384, length, 16)
            tokens = [t.mT.contiguous().requires_grad_() for t in (u, delta, B, C)]
            return Direction(tokens[0], tokens[1], A, tokens[2], tokens[3], D, torch.zeros(384))

        one, two = direction(), direction()
        z = torch.randn(batch, length, 384, requires_grad=True)
        leaves = [one.u, one.delta, one.B, one.C, two.u, two.delta, two.B, two.C, z]

        def work(one: Direction = one, two: Direction = two, z: Tensor = z, leaves: list[Tensor] = leaves) -> object:
            return torch.autograd.grad(bidirectional_scan(one, two, z).sum(), leaves)

        spent = in_turns({"scan": work}, rounds)["scan"]
        rows.append({"batch": batch, "length": length, "seconds": spent, "per_token": spent / (batch * length)})
    return rows


def peak_gib() -> float:
    """Peak resident GiB of this program; `ru_maxrss` would count the program that started it as well."""
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes, where there is no /proc


def grad_checkpointing(size: str, rounds: int) -> dict[str, float]:
    """What gradient checkpointing costs and saves: the SVP step without and with it."""
    plain, again = model_of(size, "svp"), model_of(size, "svp")
    again.set_grad_checkpointing()
    times = in_turns({"plain": stepper(plain), "checkpointed": stepper(again)}, rounds)
    memory = {"plain_gib": peak_memory(size), "checkpointed_gib": peak_memory(size, "--checkpoint")}
    return {**times, **memory, "time_ratio": times["checkpointed"] / times["plain"]}


def peak_memory(size: str, *flags: str) -> float:
    """Peak resident GiB of a process that makes two SVP steps."""
    command = [sys.executable, __file__, "--memory", size, *flags]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(answer.stdout.splitlines()[-1])


def instruction_set() -> str:
    """Return the widest instructions of PyTorch's operators and the vectors of our kernels."""
    from svp_bench.ops.simd import LANES

    return f"{torch.backends.cpu.get_cpu_capability()}, vectors of {LANES} floats"


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        model = next(
            (x.split(":")[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), model
        )
    return {
        "cpu": model,
        "isa": instruction_set(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "svp_bench": svp_bench.__version__,
        "date": dt.date.today().isoformat(),
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def report(result: Mapping[str, Any]) -> str:
    """Return one table: each measurement of ours next to its floor or baseline, and ours divided by it."""
    machine = result["machine"]
    rows: list[tuple[str, float, str, float | None]] = []
    for size, row in result["model"].items():
        for what, label in (("step", "SVP step"), ("forward", "forward")):
            rows.append((f"Vim-{size}, {label}", row[what], "floor", row[f"floor_{what}"]))
        rows.append((f"Vim-{size}, forward with prompts", row["forward_with_prompts"], "", None))
    if "unbind_step" in result:
        row = result["unbind_step"]
        rows.append(("Vim-small, SVP step", row["cpu"], "unbind, extrapolated", row["unbind"]))
    if "full" in result:
        rows.append(("Vim-small, full fine-tuning step", result["full"]["full"], "SVP step", result["full"]["svp"]))
    if "grad_checkpointing" in result:
        row = result["grad_checkpointing"]
        rows.append(("Vim-small, checkpointed SVP step", row["checkpointed"], "without", row["plain"]))
    for key, what in (("forward", "forward"), ("forward_backward", "forward + backward")):
        times = result["scan"][key]
        rows += [(f"one-way scan, {what}", times["cpu"], name, times[name]) for name in times if name != "cpu"]
    for row in result["scaling"]:
        label = f"two-way scan, batch {row['batch']}, length {row['length']}"
        rows.append((f"{label}: {1e6 * row['per_token']:.2f} µs/token", row["seconds"], "", None))
    lines = [", ".join(f"{k} {v}" for k, v in machine.items()), "batch 8, 224², float32", ""]
    lines.append(f"{'':52}{'ours':>10}  {'baseline':<22}{'':>10}{'ours / baseline':>17}")
    for label, ours, name, baseline in rows:
        line = f"{label:<52}{_time(ours)}  {name:<22}"
        lines.append((line + f"{_time(baseline)}{_ratio(ours / baseline):>17}" if baseline else line).rstrip())
    if "full" in result:
        lines.append(f"full fine-tuning over SVP, time per matrix FLOP: {result['full']['per_flop_ratio']:.2f}")
    if "grad_checkpointing" in result:
        row = result["grad_checkpointing"]
        sizes = f"{row['plain_gib']:.2f} GiB, checkpointed {row['checkpointed_gib']:.2f} GiB"
        lines.append(f"peak memory of the Vim-small step: {sizes}")
    return "\n".join(lines)


def _time(seconds: float) -> str:
    return f"{seconds:8.3f} s" if seconds >= 0.1 else f"{1e3 * seconds:7.1f} ms"


def _ratio(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"1 / {1 / value:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Vim-tiny only, fewer rounds, no extrapolations")
    parser.add_argument("--baselines", help="a Python that has mambapy (`make bench` makes one)")
    parser.add_argument("--output", type=Path, help="folder of the JSON file, cpu_<instructions>.json")
    parser.add_argument("--as-baseline", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    if arguments.as_baseline:
        print(json.dumps(baseline_times()))
        return
    if arguments.memory:
        model = model_of(arguments.memory, "svp")
        model.set_grad_checkpointing(arguments.checkpoint)
        step = stepper(model)
        step(), step()
        print(peak_gib())
        return
    rounds = 3 if arguments.quick else 9
    result: dict[str, Any] = {"schema": 1, "machine": machine(), "model": {}}
    for size in ("tiny",) if arguments.quick else ("tiny", "small"):
        result["model"][size] = whole_model(size, rounds)
        gc.collect()
    if not arguments.quick:
        result["full"] = full_against_svp("small", 3)
        result["grad_checkpointing"] = grad_checkpointing("small", 3)
        result["unbind_step"] = unbind_step(3, result["model"]["small"]["step"])
    result["scan"] = isolated_scan(2 if arguments.quick else 3, arguments.baselines)
    result["scaling"] = scaling(rounds)
    print(report(result))
    if arguments.output:
        arguments.output.mkdir(parents=True, exist_ok=True)
        name = arguments.output / f"cpu_{torch.backends.cpu.get_cpu_capability().lower()}"
        name.with_suffix(".json").write_text(json.dumps(result, indent=2) + "\n")
        name.with_suffix(".txt").write_text(report(result) + "\n")
        print(f"\nWritten: {name}.json and .txt")


if __name__ == "__main__":
    main()
