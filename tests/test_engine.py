"""The kernels under load: every backend against the reference in float64, and what surrounds the kernels.

test_ops.py holds the backends to the recurrence written out; here are the sizes and values at the borders (of tiles,
chunks, float32), memory that nobody has written, threads and forks; test_engine_processes.py has the rest.
"""

from __future__ import annotations

import copy
import hashlib
import math
import multiprocessing
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import reference_vim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import BACKBONE, OPS, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset

from svp_bench.core.errors import UnavailableError
from svp_bench.methods.build import create_model
from svp_bench.methods.checks import trained_parameters
from svp_bench.models import TokenState, VisionMamba
from svp_bench.ops import (
    Direction,
    PromptTerms,
    add_norm,
    add_prompts,
    backend_statuses,
    bidirectional_conv,
    bidirectional_scan,
    causal_conv1d,
    choose,
    list_backends,
    memory,
    selective_scan,
    threads,
)

Inputs = dict[str, Tensor | None]
Results = dict[str, Tensor]

FIELDS = ("u", "delta", "A", "B", "C", "D", "bias")
DTYPES = [torch.float32, torch.bfloat16]
UNAVAILABLE = {status.name: status.reason for status in backend_statuses() if not status.available}
LIMIT = 600.0  # seconds after which something hangs

needs_cpu_kernels = pytest.mark.skipif("cpu" in UNAVAILABLE, reason=f"cpu: {UNAVAILABLE.get('cpu')}")
BACKENDS = [
    pytest.param(name, marks=[pytest.mark.skip(reason=f"{name}: {UNAVAILABLE[name]}")] if name in UNAVAILABLE else [])
    for name in list_backends()
]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch, and with it the kernels, use so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ------------------------------------------------------------------------- results and gradients of one call


def device_for(backend: str, dtype: torch.dtype) -> str:
    """A device where a backend takes this dtype: the CPU if it does."""
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        try:
            choose(backend, device, dtype)
        except UnavailableError:
            continue
        return device
    pytest.skip(f"{backend} takes no {dtype} on this machine")


def run_scan(inputs: Mapping[str, Tensor | None], cotangent: Tensor, softplus: bool, backend: str) -> Results:
    """Result and all gradients of a scan, everything channels last: one way, or both if there is a second `u`."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}  # strides are kept
    one, two = (Direction(*(leaves.get(f"{name}{k}") for name in FIELDS)) for k in "12")  # type: ignore[arg-type]
    if "u2" in leaves:
        y = bidirectional_scan(one, two, leaves["z"], backend=backend)
    else:
        z = leaves["z"].mT if "z" in leaves else None
        u, delta, A, B, C, D, bias = one
        y = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, z, bias, softplus, backend=backend).mT
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent)
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **named}


def run_conv(inputs: Mapping[str, Tensor | None], cotangent: Tensor, silu: bool, backend: str) -> Results:
    """Result and all gradients of a convolution: one way, or both (with SiLU) if there is a second weight."""
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items() if t is not None}
    if "weight2" in leaves:
        pairs = [(leaves[f"weight{k}"], leaves.get(f"bias{k}")) for k in "12"]
        y = torch.stack(bidirectional_conv(leaves["x"], *pairs, backend=backend))
    else:
        activation = "silu" if silu else None
        y = causal_conv1d(
            leaves["x"].mT,
            leaves["weight1"],
            leaves.get("bias1"),
            activation,  # type: ignore[arg-type]
            backend=backend,
        ).mT
    gradients = torch.autograd.grad(y, list(leaves.values()), cotangent.expand_as(y))
    named = {f"gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return {"y": y.detach(), **named}


Run = Callable[[Mapping[str, Tensor | None], Tensor, bool, str], Results]


def exactly(run: Run, inputs: Mapping[str, Tensor | None], cotangent: Tensor, flag: bool) -> Results:
    """The same by the reference in float64, from the same values."""
    wide = {name: None if t is None else t.double() for name, t in inputs.items()}
    return run(wide, cotangent.double(), flag, "reference")


def assert_exact(
    run: Run, inputs: Inputs, cotangent: Tensor, flag: bool, backend: str, exact: Results | None = None
) -> None:
    """Compare result and all gradients of a backend with the reference in float64, by the table of tolerances."""
    dtype = cotangent.dtype
    device = device_for(backend, dtype)
    # to() would keep neither gaps nor expanded axes on another device; on the CPU it changes nothing
    there = {name: None if t is None else t.to(device) for name, t in inputs.items()}
    found = run(there, cotangent.to(device), flag, backend)
    exact = exactly(run, inputs, cotangent, flag) if exact is None else exact
    assert found.keys() == exact.keys()
    assert found["y"].dtype == dtype
    for name, value in found.items():
        error = relative_error(value.cpu(), exact[name])
        allowed = OPS[dtype].forward if name == "y" else OPS[dtype].backward
        assert error <= allowed, f"{name} of {backend} in {dtype}: {error:.1e}, more than {allowed:.1e}"


# ----------------------------------------------------------------------------------- 1. all sizes, one table


class Size(NamedTuple):
    """One row of the covering set, and which optional inputs it leaves out."""

    length: int
    state: int
    dim: int
    batch: int
    z: str
    skip: bool
    bias: bool
    softplus: bool


LENGTHS = (1, 2, 3, 17, 197, 730)
STATES = (1, 2, 3, 5, 8, 13, 16, 24)
DIMS = (1, 3, 16, 17, 40, 96)
SEED = 9_000_027  # such that no sum over the only channel cancels to nearly nothing


def sizes() -> list[Size]:
    """All pairs of length and state; the dims rotate, so that all other pairs of two sizes are there as well."""
    rows = []
    for i, length in enumerate(LENGTHS):
        for j, state in enumerate(STATES):
            dim = DIMS[(i + j) % len(DIMS)]
            batch = 1 if length * dim > 2000 else 2 if length > 17 else 3
            z = ("none", "plain", "strided")[(i + 2 * j) % 3]
            rows.append(
                Size(length, state, dim, batch, z, (i + j) % 4 != 0, (i + j // 2) % 3 != 0, (i + 3 * j) % 4 != 1)
            )
    return rows


def scan_inputs(size: Size, dtype: torch.dtype, both: bool) -> tuple[Inputs, Tensor]:
    """Inputs of a scan, channels last, and a cotangent, the same on every machine."""
    generator = torch.Generator().manual_seed(SEED + 10_000 * size.length + 100 * size.state + size.dim)
    softplus = size.softplus or both

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    inputs: Inputs = {}
    rows = (size.batch, size.length)
    for k in "12" if both else "1":
        delta = 0.5 * draw(*rows, size.dim)
        bias = draw(size.dim) - 1
        if not softplus:  # a step size is positive
            delta, bias = delta.abs(), bias.abs()
        inputs |= {
            f"u{k}": draw(*rows, size.dim).to(dtype),
            f"delta{k}": delta.to(dtype),
            f"A{k}": -(2 * torch.rand(size.dim, size.state, generator=generator) + 0.1),
            f"B{k}": draw(*rows, size.state).to(dtype),
            f"C{k}": draw(*rows, size.state).to(dtype),
            f"D{k}": draw(size.dim) if size.skip else None,
            f"bias{k}": bias if size.bias else None,
        }
    gate = draw(*rows, 2 * size.dim).to(dtype)[..., size.dim :]  # as the mixer passes it: half of its in_proj
    if size.z != "none" or both:
        inputs["z"] = gate if size.z == "strided" else gate.contiguous()
    return inputs, draw(*rows, size.dim).to(dtype)


@cache
def exact_scan(size: Size, dtype: torch.dtype, both: bool) -> Results:
    return exactly(run_scan, *scan_inputs(size, dtype, both), size.softplus)


def test_the_sizes_cover_all_pairs() -> None:
    rows = sizes()
    assert {(r.length, r.state) for r in rows} == {(a, b) for a in LENGTHS for b in STATES}
    assert {(r.length, r.dim) for r in rows} == {(a, b) for a in LENGTHS for b in DIMS}
    assert {(r.state, r.dim) for r in rows} == {(a, b) for a in STATES for b in DIMS}
    assert {(r.z, r.softplus) for r in rows} == {(z, s) for z in ("none", "plain", "strided") for s in (True, False)}
    assert {(r.skip, r.bias) for r in rows} == {(a, b) for a in (True, False) for b in (True, False)}


@pytest.mark.parametrize("size", sizes(), ids=lambda s: f"{s.length}-{s.state}-{s.dim}")
def test_scan_of_all_sizes(size: Size, backend: str) -> None:
    for dtype in DTYPES:
        for both in (False, True):
            if size.length > 100 and both != ((size.state + size.dim) % 2 == 0):
                continue  # the long ones are slow: one way or both ways
            inputs, cotangent = scan_inputs(size, dtype, both)
            exact = exact_scan(size, dtype, both)
            assert_exact(run_scan, inputs, cotangent, size.softplus, backend, exact)


WIDTHS = (1, 2, 3, 4)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("dim", DIMS)
def test_convolution_of_all_sizes(length: int, dim: int, backend: str) -> None:
    batch = 1 if length > 100 else 3
    for k, dtype in enumerate(DTYPES):
        number = LENGTHS.index(length) + DIMS.index(dim) + k
        width, with_bias, silu = WIDTHS[number % 4], number % 3 != 0, number % 5 != 0
        x = torch.randn(batch, length, 2 * dim).to(dtype)[..., :dim]  # strided, as the mixer passes it
        weights = [torch.randn(dim, width) for _ in range(2)]
        biases = [torch.randn(dim) if with_bias else None for _ in range(2)]
        cotangent = torch.randn(batch, length, dim).to(dtype)
        one: Inputs = {"x": x, "weight1": weights[0], "bias1": biases[0]}
        assert_exact(run_conv, one, cotangent, silu, backend)
        assert_exact(run_conv, {**one, "weight2": weights[1], "bias2": biases[1]}, cotangent, True, backend)


# Δ before the softplus (the softplus is linear from 20 on). exp(-87.34) is the smallest normal float32.
EXTREME_STEPS = {
    "no update": (-1e4, -500.0, -150.0, -104.0, -89.0, -87.0, -86.0),
    "threshold": (19.5, 19.99, 19.999998, 20.0, 20.000002, 20.01, 20.5),
    "no memory": (30.0, 86.0, 87.0, 87.33, 87.35, 88.0, 89.0, 104.0, 1e3, 1e4),
}


@pytest.mark.parametrize("both", [False, True], ids=["one way", "both ways"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", EXTREME_STEPS)
def test_extreme_steps_among_others(steps: str, dtype: torch.dtype, both: bool, backend: str) -> None:
    """In one chunk only (the middle one of 50 steps) and in few channels, so that vectors and chunks are mixed."""
    inputs, cotangent = scan_inputs(Size(50, 5, 40, 2, "strided", True, False, True), dtype, both)
    values = torch.tensor(EXTREME_STEPS[steps])
    for k in "12" if both else "1":
        delta, A = inputs[f"delta{k}"], inputs[f"A{k}"]
        assert delta is not None
        assert A is not None
        places = torch.rand(2, 14, 40) < 0.3
        places[..., 20:] = False  # the second tile and its neighbours stay as they are
        drawn = values[torch.randint(len(values), (2, 14, 40))].to(dtype)
        delta[:, 17:31] = torch.where(places, drawn, delta[:, 17:31])
        A.copy_(-torch.logspace(-3, 3, 200)[torch.randperm(200)].view(40, 5))  # down to -1e3
        A[:4] = -1.0  # where exp(Δ A) is at the border of float32
    assert_exact(run_scan, inputs, cotangent, True, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_states_that_grow_and_states_that_are_wiped_out(dtype: torch.dtype, backend: str) -> None:
    """Positive A and steps of both signs: exponents of two beyond -126 in some steps, moderate growth in others."""
    inputs, cotangent = scan_inputs(Size(50, 5, 40, 2, "plain", True, True, False), dtype, both=False)
    sign = torch.where(torch.arange(40) % 3 == 0, -1.0, 1.0)
    A = sign.unsqueeze(1) * torch.linspace(0.5, 30, 5)
    delta = 0.004 * torch.randn(2, 50, 40)
    wiped = torch.zeros(2, 50, 40, dtype=torch.bool)
    wiped[:, 18:30:5, ::7] = True
    wiped[0, 40, 39] = True
    delta = torch.where(wiped, -20 * sign, delta)
    inputs |= {"A1": A, "delta1": delta.to(dtype), "bias1": 0.001 * torch.randn(40)}
    exponents = delta.unsqueeze(-1) * A / math.log(2)
    assert (A > 0).any()
    assert (exponents < -126).any()
    assert (exponents > 0).any()
    assert not (exponents[:, :16].abs() > 126).any()  # the first chunk needs no care, the second does
    assert_exact(run_scan, inputs, cotangent, False, backend)


# ---------------------------------------------------------------------------- 2. any shape, any place in memory


def plain(t: Tensor) -> Tensor:
    return t


def turned(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def cut_out(t: Tensor) -> Tensor:
    """The middle of a larger tensor of NaN: one element on each side of each axis."""
    view = torch.full([side + 2 for side in t.shape], math.nan, dtype=t.dtype)[(slice(1, -1),) * t.ndim]
    return view.copy_(t)


def with_gaps(t: Tensor) -> Tensor:
    """Every second element of each axis of a larger tensor of NaN."""
    return torch.full([2 * side for side in t.shape], math.nan, dtype=t.dtype)[(slice(1, None, 2),) * t.ndim].copy_(t)


def repeated(t: Tensor) -> Tensor:
    """The first row again and again: a stride of zero."""
    return t[:1].expand_as(t)


def repeated_inside(t: Tensor) -> Tensor:
    return t[..., :1].expand_as(t)


LAYOUTS = [plain, turned, cut_out, with_gaps, repeated, repeated_inside]
some_layouts = st.lists(st.sampled_from(LAYOUTS), min_size=16, max_size=16)
flags = st.lists(st.booleans(), min_size=5, max_size=5)


def positive(generator: torch.Generator, *shape: int) -> Tensor:
    """From 0.5 to 1.5. Sums of such numbers lose nothing by cancellation, so that errors of a single number count."""
    return torch.rand(*shape, generator=generator) + 0.5


def laid_out(inputs: Inputs, layouts: Sequence[Callable[[Tensor], Tensor]]) -> Inputs:
    return {name: None if t is None else lay(t) for (name, t), lay in zip(inputs.items(), layouts, strict=False)}


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=60)  # a busy machine is no failure
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 35),
    dim=st.integers(1, 50),
    state=st.integers(1, 20),
    flags=flags,
    layouts=some_layouts,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_scan_of_any_layout(
    backend: str,
    batch: int,
    length: int,
    dim: int,
    state: int,
    flags: list[bool],
    layouts: list[Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    both, skip, bias, gate, softplus = flags
    inputs: Inputs = {}
    for k in "12" if both else "1":
        inputs |= {
            f"u{k}": positive(generator, batch, length, dim).to(dtype),
            f"delta{k}": (positive(generator, batch, length, dim) - 0.4).to(dtype),
            f"A{k}": -0.005 * positive(generator, dim, state),
            f"B{k}": positive(generator, batch, length, state).to(dtype),
            f"C{k}": positive(generator, batch, length, state).to(dtype),
            f"D{k}": positive(generator, dim) if skip else None,
            f"bias{k}": 0.1 * positive(generator, dim) if bias else None,
        }
    if both or gate:
        inputs["z"] = positive(generator, batch, length, dim).to(dtype)
    cotangent = layouts[15](positive(generator, batch, length, dim).to(dtype))
    assert_exact(run_scan, laid_out(inputs, layouts), cotangent, softplus or both, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(deadline=None, max_examples=40)  # a busy machine is no failure
@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 35),
    dim=st.integers(1, 50),
    width=st.integers(1, 9),
    flags=flags,
    layouts=some_layouts,
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_convolution_of_any_layout(
    backend: str,
    batch: int,
    length: int,
    dim: int,
    width: int,
    flags: list[bool],
    layouts: list[Callable[[Tensor], Tensor]],
    dtype: torch.dtype,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    both, bias, bias_back, silu, _ = flags
    inputs: Inputs = {"x": positive(generator, batch, length, dim).to(dtype)}
    for k, biased in (("1", bias), *([("2", bias_back)] if both else [])):
        inputs[f"weight{k}"] = positive(generator, dim, width)
        inputs[f"bias{k}"] = positive(generator, dim) if biased else None
    cotangent = layouts[15](positive(generator, batch, length, dim).to(dtype))
    assert_exact(run_conv, laid_out(inputs, layouts), cotangent, silu, backend)


# --------------------------------------------------------------------- 3. memory that nobody has written yet


class Poison(TorchDispatchMode):
    """Fills every tensor that torch leaves uninitialised."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value
        self.poisoned = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"):
            self.poisoned += 1
            out.fill_(self.value)
        return out


def workout(backend: str = "cpu") -> list[Tensor]:
    """Results and gradients of the ops at sizes that fill neither tiles nor chunks, and at sizes that do."""
    results: list[Tensor] = []
    for size in (
        Size(17, 5, 17, 2, "strided", True, True, True),
        Size(1, 3, 40, 1, "plain", False, False, True),
        Size(32, 16, 32, 2, "plain", True, True, True),
        Size(730, 16, 17, 1, "plain", True, True, True),
    ):
        for both in (False, True):
            inputs, cotangent = scan_inputs(size, torch.float32, both)
            results += run_scan(inputs, cotangent, True, backend).values()
            frozen = list(Direction(*(inputs[f"{name}1"] for name in FIELDS)))  # type: ignore[arg-type]
            u = frozen[0].detach().requires_grad_()  # type: ignore[union-attr]
            one = Direction(u, *frozen[1:])  # type: ignore[arg-type]
            z = inputs["z"]
            assert z is not None
            y = bidirectional_scan(one, one, z, backend=backend)
            results += [y.detach(), *torch.autograd.grad(y, u, cotangent)]
        generator = torch.Generator().manual_seed(7)
        x = torch.randn(size.batch, size.length, size.dim, generator=generator)
        conv: Inputs = {"x": x}
        for k in "12":
            conv[f"weight{k}"] = torch.randn(size.dim, 4, generator=generator)
            conv[f"bias{k}"] = torch.randn(size.dim, generator=generator)
        results += run_conv(conv, torch.ones_like(x), True, backend).values()
        leaves = [x.clone().requires_grad_(), x.flip(1).clone().requires_grad_(), torch.ones(size.dim).requires_grad_()]
        total, normed = add_norm(leaves[0], leaves[1], leaves[2], 1e-5, backend=backend)
        results += [total.detach(), normed.detach(), *torch.autograd.grad((total.square() + normed).sum(), leaves)]
    return results


def digest(tensors: Sequence[Tensor]) -> str:
    """Of every bit of the values."""
    whole = hashlib.sha256()
    for tensor in tensors:
        assert tensor.isfinite().all()
        whole.update(tensor.detach().contiguous().numpy().tobytes())
    return whole.hexdigest()


@needs_cpu_kernels
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e30])
def test_tensors_are_written_before_they_are_read(value: float) -> None:
    clean = workout()
    with Poison(value) as poison:
        found = workout()
    assert poison.poisoned > len(clean) / 2  # it reached the buffers of the kernels
    for number, (a, b) in enumerate(zip(found, clean, strict=True)):
        assert b.isfinite().all()
        assert torch.equal(a, b), f"result {number} depends on what uninitialised memory held"


# ----------------------------------------------------------------------- 6. to 8. threads, forks, reruns


def nano(method: str, backend: str = "cpu", **arguments: Any) -> VisionMamba:
    """A small Vim with every parameter drawn: no scale is zero, so that every trained parameter has a gradient."""
    model = create_model("vim_nano_patch8_64", num_classes=10, method=method, **arguments).eval()
    reference_vim.fill(model)
    model.set_scan_backend(backend)
    return model


def one_step(model: VisionMamba, images: Tensor) -> list[Tensor]:
    """Logits and the gradients of all trained parameters."""
    logits = model(images)
    gradients = torch.autograd.grad(logits.square().sum(), list(trained_parameters(model).values()))
    return [logits.detach(), *gradients]


@needs_cpu_kernels
@pytest.mark.parametrize("threads", [1, 2])
def test_two_models_in_two_threads(threads: int) -> None:
    models = [nano("svp"), nano("full")]
    images = [reference_vim.make_images(2, 3, 64, 64), reference_vim.make_images(3, 3, 64, 64)]
    repeats = 12
    outcome: list[list[bool]] = [[], []]
    problems: list[BaseException] = []
    gate = threading.Barrier(2)

    def work(which: int) -> None:
        try:
            gate.wait(LIMIT)
            for _ in range(repeats):
                assert torch.get_num_threads() == threads
                found = one_step(models[which], images[which])
                outcome[which].append(all(map(torch.equal, found, alone[which])))
        except BaseException as problem:  # an assertion in a thread fails no test by itself
            problems.append(problem)

    with torch_threads(threads):
        alone = [one_step(model, batch) for model, batch in zip(models, images, strict=True)]
        workers = [threading.Thread(target=work, args=(which,), daemon=True) for which in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(LIMIT)
    assert not problems, problems
    assert outcome == [[True] * repeats] * 2


def small_scan() -> list[Tensor]:
    """Some tiles, so that two threads would share the work; not so large that torch's own operators would.

    With gradients where autograd has no threads of its own: with a CUDA device it has, and refuses to work in a fork.
    """
    inputs, cotangent = scan_inputs(Size(17, 5, 40, 2, "plain", True, True, True), torch.float32, both=True)
    if torch.cuda.is_available():
        one, two = (Direction(*(inputs[f"{name}{k}"] for name in FIELDS)) for k in "12")  # type: ignore[arg-type]
        z = inputs["z"]
        assert z is not None
        return [bidirectional_scan(one, two, z, backend="cpu")]
    return list(run_scan(inputs, cotangent, True, "cpu").values())


def scan_for(answers: Any) -> None:
    """What a forked worker does. GNU OpenMP has no other threads after a fork, so the kernels must not wait for any."""
    answers.put(digest(small_scan()))


class Scans(Dataset[str]):
    """Items that are made by the kernels."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> str:
        return digest(small_scan())


needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)


@needs_cpu_kernels
@needs_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_a_forked_worker_scans(threads: int) -> None:
    with torch_threads(threads):
        expected = digest(small_scan())  # the kernels have run here, on all threads
        fork = multiprocessing.get_context("fork")
        answers = fork.Queue()
        worker = fork.Process(target=scan_for, args=(answers,), daemon=True)
        worker.start()
        try:
            assert answers.get(timeout=LIMIT) == expected
            worker.join(LIMIT)
            assert worker.exitcode == 0
        except queue.Empty:
            pytest.fail("the worker hangs or has died")
        finally:
            worker.kill()
            worker.join()
        assert digest(small_scan()) == expected  # and here they still run


@needs_cpu_kernels
@needs_fork
@pytest.mark.parametrize("threads", [1, 2])
def test_data_workers_scan(threads: int) -> None:
    with torch_threads(threads):
        expected = digest(small_scan())
        loader = DataLoader(Scans(), batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=LIMIT)
        assert list(loader) == [expected] * 4


def large_ops() -> list[Tensor]:
    """Large enough that torch's operators and the kernels use every thread, and a few that leave threads idle."""
    results: list[Tensor] = []
    for size in (
        Size(65, 16, 384, 6, "plain", True, True, True),
        Size(197, 5, 17, 12, "strided", True, True, True),
        Size(730, 8, 16, 1, "plain", True, True, True),
    ):
        for dtype in DTYPES:
            inputs, cotangent = scan_inputs(size, dtype, both=True)
            results += run_scan(inputs, cotangent, True, "cpu").values()
            conv = {"x": inputs["u1"], "bias1": inputs["D1"], "bias2": inputs["D2"]}
            conv |= {f"weight{k}": inputs[f"A{k}"][:, :4].contiguous() for k in "12"}  # type: ignore[index]
            results += run_conv(conv, cotangent, True, "cpu").values()
        rows = [inputs["u1"].float().requires_grad_(), inputs["u2"].float().requires_grad_()]  # type: ignore[union-attr]
        weight = torch.ones(size.dim, requires_grad=True)
        total, normed = add_norm(rows[0], rows[1], weight, 1e-5, backend="cpu")
        results += [normed.detach(), *torch.autograd.grad((total, normed), [*rows, weight], [rows[1], rows[0]])]
    return [t.float() for t in results]


@needs_cpu_kernels
def test_reruns_and_numbers_of_threads_change_no_bit() -> None:
    digests = []
    for count in (1, 1, 2, 2, 1):
        with torch_threads(count):
            digests.append([digest([t]) for t in large_ops()])
    assert all(found == digests[0] for found in digests)


# ----------------------------------------------------------------------------------------- 9. a whole model


@pytest.mark.parametrize("method", ["svp", "full"])
def test_a_whole_model_as_in_float64(method: str, backend: str) -> None:
    device_for(backend, torch.float32)
    model = nano(method, "reference")
    exact_model = copy.deepcopy(model).double()
    exact_model.load_state_dict({name: t.double() for name, t in model.state_dict().items()})
    device = device_for(backend, torch.float32)
    model.to(device).set_scan_backend(backend)
    images = reference_vim.make_images(2, 3, 64, 64)
    found, exact = one_step(model, images.to(device)), one_step(exact_model, images.double())
    assert len(found) > 20
    for name, a, b in zip(["logits", *trained_parameters(model)], found, exact, strict=True):
        allowed = BACKBONE.forward if name == "logits" else BACKBONE.backward
        error = relative_error(a.cpu(), b)
        assert error <= allowed, f"{name}: {error:.1e}, more than {allowed:.1e}"


# -------------------------------------------------------------------------------------- 10. the frozen prefix


class Watched(NamedTuple):
    """What enters each block (before any prompt), and how many tensors were saved up to there."""

    tokens: list[tuple[Tensor | None, ...]]
    saved: list[int]
    logits: Tensor


def watch(model: VisionMamba) -> Watched:
    tokens: list[tuple[Tensor | None, ...]] = []
    saved: list[int] = []
    count = 0

    def entering(layer: int, state: TokenState) -> TokenState:
        assert layer == len(tokens)
        tokens.append((state.hidden, state.residual))
        saved.append(count)
        return state

    def pack(tensor: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return tensor

    model.points.on_tokens(entering)
    model.points.tokens.insert(0, model.points.tokens.pop())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.train()(reference_vim.make_images(2, 3, 64, 64))
    return Watched(tokens, [*saved, count], logits)


def builds_graph(tensor: Tensor | None) -> bool:
    return tensor is not None and (tensor.requires_grad or tensor.grad_fn is not None)


@pytest.mark.parametrize("first", [0, 3, 7])
def test_blocks_before_the_first_prompt_build_no_graph(first: int, backend: str) -> None:
    if device_for(backend, torch.float32) != "cpu":
        pytest.skip(f"{backend} does not run on the CPU")
    model = nano("svp", backend, depths=list(range(first, 8)))
    watched = watch(model)
    assert len(watched.tokens) == 8
    for layer, tensors in enumerate(watched.tokens):
        assert builds_graph(tensors[0]) == (layer > first), f"block {layer}"
        assert not builds_graph(tensors[1]) or layer > first, f"residual of block {layer}"
    assert watched.saved[: first + 1] == [0] * (first + 1)
    assert watched.saved[first + 1] > 0  # else counting would prove nothing
    assert builds_graph(watched.logits)


def test_linear_probing_builds_no_graph_before_the_head(backend: str) -> None:
    if device_for(backend, torch.float32) != "cpu":
        pytest.skip(f"{backend} does not run on the CPU")
    model = nano("linear", backend)
    before_head: list[Tensor] = []
    model.head.register_forward_pre_hook(lambda module, arguments: before_head.append(arguments[0]))
    watched = watch(model)
    assert not any(builds_graph(t) for tensors in watched.tokens for t in tensors)
    assert [builds_graph(t) for t in before_head] == [False]
    assert watched.saved[:-1] == [0] * 8
    assert watched.saved[-1] <= 2  # of the head alone: its input (and weight)
    assert builds_graph(watched.logits)


# ------------------------------------------------------------------------------------- 11. freed memory is kept


@pytest.mark.parametrize("value", [None, "1", "0"])
def test_the_switch_leaves_the_allocator_alone(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, int]] = []

    class Library:
        gnu_get_libc_version = "2.36"

        def mallopt(self, option: int, setting: int) -> int:
            calls.append((option, setting))
            return 1

    monkeypatch.delenv(memory.SWITCH, raising=False)
    if value is not None:
        monkeypatch.setenv(memory.SWITCH, value)
    monkeypatch.setattr(memory, "ctypes", SimpleNamespace(CDLL=lambda name: Library()))
    monkeypatch.setattr(memory, "sys", SimpleNamespace(platform="linux"))
    told = memory.keep_freed_memory.__wrapped__()  # past the cache, which is of the process
    if value == "0":
        assert calls == []
        assert told == "returned to the system (SVP_BENCH_KEEP_MEMORY=0)"
    else:
        assert {option for option, _ in calls} == {-1, -3}  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        assert told.startswith("cached by the process")


# ------------------------------------------------------------------------------------- threads without GNU OpenMP


@needs_cpu_kernels
def test_without_gnu_openmp_the_kernels_run_on_other_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(2, 33, 48), torch.randn(48, 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = bidirectional_conv(x, (weight, None), (weight, None), backend="cpu")
        monkeypatch.setattr(threads, "_gomp", lambda: "libgomp.so.1 needs another libc")
        found = bidirectional_conv(x, (weight, None), (weight, None), backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))
    assert threads.pool_name() == "a thread pool of their own (libgomp.so.1 needs another libc)"


@pytest.mark.parametrize(
    ("files", "report", "reason"),
    [
        ([], "ATen parallel backend: native thread pool", "without OpenMP"),
        ([], "ATen parallel backend: OpenMP", "carries no GNU OpenMP"),
        (["libgomp-1.so.1"], "ATen parallel backend: OpenMP", "libgomp-1.so.1 of PyTorch cannot be used: "),
    ],
)
def test_the_reason_why_openmp_is_not_used(
    files: list[str], report: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "lib").mkdir()
    for name in files:
        (tmp_path / "lib" / name).write_bytes(b"not a library")
    fake = SimpleNamespace(
        __file__=str(tmp_path / "__init__.py"),
        __config__=SimpleNamespace(parallel_info=lambda: report),
    )
    monkeypatch.setattr(threads, "torch", fake)
    assert reason in str(threads._gomp.__wrapped__())


# Tensors of 39 MB: glibc maps each freshly from the system, whatever it has learned from others, unless told to keep.
# ---------------------------------------------------------------------------------- 12. what must not go unseen


@needs_cpu_kernels
@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("name", ["u1", "delta1", "A1", "B1", "C1", "D1", "bias1", "z"])
def test_a_nan_is_never_lost(name: str, softplus: bool) -> None:
    """Also one in the last state of A alone: a diverged weight must show in the loss."""
    inputs, _ = scan_inputs(Size(9, 16, 20, 2, "plain", True, True, True), torch.float32, both=False)
    poisoned = {key: None if t is None else t.clone() for key, t in inputs.items()}
    tensor = poisoned[name]
    assert tensor is not None
    tensor[(-1,) * tensor.ndim] = float("nan")
    one = Direction(*(poisoned[f"{field}1"] for field in FIELDS))  # type: ignore[arg-type]
    z = poisoned["z"]
    u, delta, A, B, C, D, bias = one
    y = selective_scan(u.mT, delta.mT, A, B.mT, C.mT, D, None if z is None else z.mT, bias, softplus, backend="cpu")
    assert y.isnan().any()


@needs_cpu_kernels
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_does_not_reach_the_kernels(dtype: torch.dtype) -> None:
    model = create_model("vim_nano_patch8_64", num_classes=3, method="svp")
    images = torch.randn(2, 3, 64, 64)

    def step() -> list[Tensor]:
        model.zero_grad(set_to_none=True)
        logits = model(images)
        logits.square().sum().backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    expected = step()
    torch.set_default_dtype(dtype)
    try:
        found = step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@needs_cpu_kernels
def test_tensors_elsewhere_and_of_other_shapes_are_refused() -> None:
    h, weight = torch.randn(2, 5, 32), torch.ones(32)
    with pytest.raises(ValueError, match="one on meta"):
        add_norm(h, torch.empty(2, 5, 32, device="meta"), weight, 1e-5, backend="cpu")
    for residual, scale, other in ((torch.randn(1, 5, 32), weight, h), (h, torch.ones(16), h), (h, weight, h[:1])):
        with pytest.raises(ValueError, match="must be"):
            add_norm(h, residual, weight, 1e-5, PromptTerms([(scale, other)], 2), backend="cpu")
    with pytest.raises(ValueError, match=r"excluded must be a token of 0\.\.4, not -1"):
        add_prompts(h, [(weight, h)], -1, backend="cpu")
    taps = torch.randn(32, 4), None
    for other in ((torch.randn(32, 2), None), (torch.randn(16, 4), None), (torch.randn(32, 4), torch.ones(1))):
        with pytest.raises(ValueError, match="must be"):
            bidirectional_conv(h, taps, other, backend="cpu")


@pytest.mark.parametrize("missing", ["D1", "D2", "bias1", "bias2"])
def test_one_direction_without_skip_or_bias(missing: str) -> None:
    """As if it had zeros there, on every backend."""
    inputs, cotangent = scan_inputs(Size(9, 4, 20, 2, "plain", True, True, True), torch.float32, both=True)
    there = inputs[missing]
    assert there is not None
    for backend in ("reference", "cpu"):
        without = run_scan({**inputs, missing: None}, cotangent, True, backend)["y"]
        zeros = run_scan({**inputs, missing: torch.zeros_like(there)}, cotangent, True, backend)["y"]
        assert relative_error(without, zeros) < 1e-6


def test_a_changed_convolution_is_noticed_in_the_backward_pass() -> None:
    model = create_model("vim_nano_patch8_64", num_classes=3, method="svp")
    loss = model(torch.randn(2, 3, 64, 64)).square().sum()
    with torch.no_grad():
        model.get_parameter("layers.1.mixer.conv1d.weight").mul_(3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
