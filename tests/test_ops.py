"""Every scan backend against the recurrence of the docstring, one step at a time in float64: results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tolerances import OPS, relative_error
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import svp_bench
from svp_bench.core.errors import UnavailableError, UsageError
from svp_bench.ops import (
    Direction,
    Recompute,
    backend_statuses,
    bidirectional_conv,
    bidirectional_scan,
    causal_conv1d,
    choose,
    selective_scan,
)
from svp_bench.ops import reference as reference_backend

BACKENDS = [status.name for status in backend_statuses() if status.available]
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")

Inputs = dict[str, Tensor | None]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def needs(backend: str, dtype: torch.dtype) -> None:
    """Skip where a backend does not support this dtype."""
    try:
        choose(backend, torch.get_default_device(), dtype)
    except UnavailableError as reason:
        pytest.skip(str(reason))


def naive_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    h = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    out = []
    steps = zip(u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), strict=True)
    for u_t, step, B_t, C_t in steps:
        if delta_bias is not None:
            step = step + delta_bias
        if delta_softplus:  # linear above 20, as mamba_ssm's kernels and PyTorch have it
            large = step > 20
            step = torch.where(large, step, torch.log1p(torch.exp(step.masked_fill(large, 0))))
        h = torch.exp(step[:, :, None] * A) * h + step[:, :, None] * B_t[:, None, :] * u_t[:, :, None]
        y = (C_t[:, None, :] * h).sum(-1)
        out.append(y if D is None else y + D * u_t)
    result = torch.stack(out, dim=2)
    return result if z is None else result * z / (1 + torch.exp(-z))


def naive_conv(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    width = weight.shape[1]
    out = []
    for t in range(x.shape[2]):
        y = torch.zeros_like(x[:, :, 0]) if bias is None else bias.expand_as(x[:, :, 0])
        for k in range(width):
            if t - (width - 1) + k >= 0:
                y = y + weight[:, k] * x[:, :, t - (width - 1) + k]
        out.append(y / (1 + torch.exp(-y)) if silu else y)
    return torch.stack(out, dim=2)


def draw(
    length: int,
    state: int = 4,
    dim: int = 5,
    batch: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    wide: torch.dtype | None = None,
    without: tuple[str, ...] = (),
    delta: float = 0.5,
) -> Inputs:
    """Inputs of a scan; `wide` is the dtype of the weights (A, D, bias) where it differs from the activations'."""
    weights = wide or dtype
    inputs: Inputs = {
        "u": torch.randn(batch, dim, length).to(dtype),
        "delta": (delta * torch.randn(batch, dim, length)).to(dtype),
        "A": -(torch.rand(dim, state) * 2 + 0.1).to(weights),
        "B": torch.randn(batch, state, length).to(dtype),
        "C": torch.randn(batch, state, length).to(dtype),
        "D": torch.randn(dim).to(weights),
        "z": torch.randn(batch, dim, length).to(dtype),
        "delta_bias": (torch.randn(dim) - 1).to(weights),
    }
    return {name: None if name in without else value for name, value in inputs.items()}


def with_grad(inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    return {
        name: None if value is None else value.detach().to(dtype or value.dtype).requires_grad_()
        for name, value in inputs.items()
    }


def gradients(y: Tensor, inputs: Inputs, cotangent: Tensor) -> dict[str, Tensor]:
    present = {name: value for name, value in inputs.items() if value is not None}
    found = torch.autograd.grad(y, list(present.values()), cotangent.to(y.dtype))
    return dict(zip(present, found, strict=True))


def assert_scan(inputs: Inputs, backend: str, softplus: bool = True) -> None:
    """Compare result and all gradients with the naive scan in float64 on the same values."""
    u = inputs["u"]
    assert u is not None
    given, exact = with_grad(inputs), with_grad(inputs, torch.float64)
    y = selective_scan(**given, delta_softplus=softplus, backend=backend)  # type: ignore[arg-type]
    expected = naive_scan(**exact, delta_softplus=softplus)  # type: ignore[arg-type]
    assert y.dtype == u.dtype
    assert relative_error(y, expected) <= OPS[u.dtype].forward
    cotangent = torch.randn(y.shape).to(y.dtype)
    found, wanted = gradients(y, given, cotangent), gradients(expected, exact, cotangent)
    for name, gradient in found.items():
        source = inputs[name]
        assert source is not None
        assert gradient.dtype == source.dtype
        error = relative_error(gradient, wanted[name])
        assert error <= OPS[u.dtype].backward, f"gradient of {name}: {error:.1e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [1, 2, 3, 17, 65])
def test_lengths(length: int, dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    assert_scan(draw(length, dtype=dtype), backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_backbones_length(dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    assert_scan(draw(197, state=16, dim=7, dtype=dtype, wide=torch.float32), backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("state", "dim", "batch"), [(1, 1, 1), (3, 5, 3), (8, 7, 2), (16, 33, 1)])
def test_sizes(state: int, dim: int, batch: int, dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    assert_scan(draw(9, state, dim, batch, dtype=dtype), backend)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias"), ("z", "delta_bias")], ids="+".join
)
def test_optional_inputs(without: tuple[str, ...], softplus: bool, backend: str) -> None:
    inputs = draw(11, without=without)
    if not softplus:  # a step size is positive
        inputs["delta"] = torch.rand(2, 5, 11)
        inputs["delta_bias"] = None if "delta_bias" in without else torch.rand(5)
    assert_scan(inputs, backend, softplus)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_extreme_step_sizes(dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    # softplus underflows to 0 (the state stands still), crosses its threshold of 20, makes exp(Δ A) underflow
    values = torch.tensor([-1e4, -200.0, -90.0, -20.0, 0.0, 19.99, 20.0, 20.01, 25.0, 88.0, 500.0])
    inputs = draw(len(values), state=3, dim=4, batch=1, dtype=dtype, without=("delta_bias",))
    inputs["delta"] = torch.stack([values.roll(k) for k in range(4)]).unsqueeze(0).to(dtype)
    assert_scan(inputs, backend)
    only_small = {**inputs, "delta": torch.full((1, 4, 11), -1e4, dtype=dtype), "D": None}
    y = selective_scan(**only_small, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    assert y.count_nonzero() == 0


def test_gates_far_out(backend: str) -> None:
    inputs = draw(6, batch=1, dim=2)
    inputs["z"] = torch.tensor([-200.0, -30.0, -1.0, 0.0, 30.0, 200.0]).expand(1, 2, 6)
    assert_scan(inputs, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_batch(dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    inputs = with_grad(draw(5, batch=0, dtype=dtype))
    y = selective_scan(**inputs, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    assert y.shape == (0, 5, 5)
    for name, gradient in gradients(y, inputs, torch.ones(0, 5, 5)).items():
        assert gradient.shape == inputs[name].shape  # type: ignore[union-attr]
        assert gradient.count_nonzero() == 0
    x = torch.randn(0, 5, 6, dtype=dtype, requires_grad=True)
    weight = torch.randn(5, 4, dtype=dtype, requires_grad=True)
    out = causal_conv1d(x, weight, None, "silu", backend=backend)
    assert out.shape == x.shape
    out.sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


def test_strided_inputs(backend: str) -> None:
    contiguous = draw(9, state=3, dim=6)
    strided: Inputs = {}
    for name, value in contiguous.items():
        assert value is not None
        holder = torch.full((*(2 * side for side in value.shape),), float("nan")).transpose(0, -1)
        view = holder[tuple(slice(1, None, 2) for _ in value.shape)].transpose(0, -1)
        strided[name] = view.copy_(value)
        assert value.ndim == 1 or not strided[name].is_contiguous()  # type: ignore[union-attr]
    first, second = with_grad(contiguous), {n: v.requires_grad_() for n, v in strided.items() if v is not None}
    y = selective_scan(**first, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    y_strided = selective_scan(**second, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    assert relative_error(y_strided, y) <= OPS[torch.float32].forward
    cotangent = torch.randn(2, 9, 6).mT  # strided too
    found, wanted = gradients(y_strided, dict(second), cotangent), gradients(y, first, cotangent)
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name]) <= OPS[torch.float32].backward, name


def test_an_expanded_cotangent(backend: str) -> None:
    inputs = with_grad(draw(5))
    selective_scan(**inputs, delta_softplus=True, backend=backend).sum().backward()  # type: ignore[arg-type]
    exact = with_grad(inputs, torch.float64)
    naive_scan(**exact, delta_softplus=True).sum().backward()  # type: ignore[arg-type]
    for name in NAMES:
        assert relative_error(inputs[name].grad, exact[name].grad) <= 5e-6  # type: ignore[union-attr, arg-type]


@pytest.mark.parametrize("only", NAMES)
def test_only_the_gradient_that_was_asked_for(only: str, backend: str) -> None:
    inputs = draw(7)
    everything = with_grad(inputs)
    y = selective_scan(**everything, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    wanted = gradients(y, everything, torch.ones_like(y))[only]
    alone = {**inputs, only: everything[only].detach().requires_grad_()}  # type: ignore[union-attr]
    selective_scan(**alone, delta_softplus=True, backend=backend).sum().backward()  # type: ignore[arg-type]
    assert relative_error(alone[only].grad, wanted) <= OPS[torch.float32].backward  # type: ignore[union-attr, arg-type]
    for name, value in alone.items():
        if name != only:
            assert value.grad is None  # type: ignore[union-attr]


class _CountElements(TorchDispatchMode):
    """How many elements the operations inside have written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.written += sum(t.numel() for t in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(t))
        return out


def test_the_reference_computes_no_other_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = ("u", "delta", "A", "B", "C", "D", "delta_bias")
    computed: list[set[str]] = []
    sweep = reference_backend._sweep_back

    def watched(*args: Any) -> Any:
        grads = sweep(*args)
        computed.append({name for name, g in zip(fields, grads, strict=True) if g is not None})
        return grads

    monkeypatch.setattr(reference_backend, "_sweep_back", watched)
    cost = {}
    for asked in ({"u"}, {"C"}, {"A", "D"}, {"delta_bias"}, {"u", "delta", "B", "C", "z"}, set(NAMES)):
        inputs = {name: value.requires_grad_(name in asked) for name, value in draw(7).items() if value is not None}
        y = selective_scan(**inputs, delta_softplus=True, backend="reference")
        with _CountElements() as count:
            y.sum().backward()
        cost[frozenset(asked)] = count.written
        assert computed.pop() == asked - {"z"}
    assert cost[frozenset(NAMES)] > cost[frozenset({"u", "delta", "B", "C", "z"})] > cost[frozenset({"u"})]

    x, weight, bias = torch.randn(2, 5, 6), torch.randn(5, 4), torch.randn(5)
    conv_cost = []
    for trained in (False, True):
        x.requires_grad_()
        out = causal_conv1d(x, weight.requires_grad_(trained), bias.requires_grad_(trained), backend="reference")
        with _CountElements() as count:
            out.sum().backward()
        conv_cost.append(count.written)
    assert conv_cost[0] < conv_cost[1]


def test_a_frozen_scan_keeps_nothing(backend: str) -> None:
    y = selective_scan(**draw(5), delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    assert not y.requires_grad
    assert y.grad_fn is None


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("D", "z", "delta_bias")], ids=["all", "few"])
def test_gradcheck_of_the_scan(without: tuple[str, ...], softplus: bool) -> None:
    inputs = with_grad(draw(4, state=2, dim=2, batch=2, dtype=torch.float64, without=without))
    tensors = tuple(inputs.values())
    assert torch.autograd.gradcheck(
        lambda *a: selective_scan(*a, delta_softplus=softplus, backend="reference"), tensors
    )


def test_gradcheck_of_the_others() -> None:
    x, z = torch.randn(2, 4, 3, dtype=torch.float64, requires_grad=True), torch.randn(2, 4, 3, dtype=torch.float64)
    weights = [torch.randn(3, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def conv(*a: Tensor) -> tuple[Tensor, Tensor]:
        return bidirectional_conv(a[0], (a[1], a[3]), (a[2], a[4]), backend="reference")

    assert torch.autograd.gradcheck(conv, (x, *weights, *biases))
    directions = [natural(draw(4, state=2, dim=3, dtype=torch.float64)) for _ in range(2)]
    flat = [tensor.requires_grad_() for d in directions for tensor in d if tensor is not None]

    def scan(z: Tensor, *a: Tensor) -> Tensor:
        return bidirectional_scan(Direction(*a[:7]), Direction(*a[7:]), z, backend="reference")

    assert torch.autograd.gradcheck(scan, (z.requires_grad_(), *flat))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = draw(65, state=3, dtype=torch.float64)

    def run() -> list[Tensor]:
        given = with_grad(inputs)
        y = selective_scan(**given, delta_softplus=True, backend="reference")  # type: ignore[arg-type]
        return [y, *gradients(y, given, torch.ones_like(y)).values()]

    whole = run()
    calls = []
    states = reference_backend._Inputs.states
    monkeypatch.setattr(reference_backend._Inputs, "states", lambda *a: calls.append(a[1]) or states(*a))
    monkeypatch.setattr(reference_backend, "_CHUNK_BYTES", 1)
    for a, b in zip(run(), whole, strict=True):
        assert relative_error(a, b) <= 1e-13
    assert len(calls) == 2 * 2 * 8  # two images, each in eight chunks there and eight back: the patch took effect


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reruns_are_equal_to_the_last_bit(dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    inputs = draw(33, state=8, dim=9, batch=3, dtype=dtype)

    def run() -> list[Tensor]:
        given = with_grad(inputs)
        y = selective_scan(**given, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
        conv = causal_conv1d(given["u"], given["A"][:, :4], given["D"], "silu", backend=backend)  # type: ignore[index, arg-type]
        total = y + conv
        return [total, *gradients(total, given, torch.ones_like(total)).values()]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def natural(inputs: Inputs) -> Direction:
    """The channels-last form of a scan's inputs."""
    fields = [inputs[name] for name in ("u", "delta", "A", "B", "C", "D", "delta_bias")]
    return Direction(*(t.mT if t is not None and t.ndim == 3 else t for t in fields))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_both_directions_at_once_are_two_scans(dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    one, two = draw(10, dtype=dtype), draw(10, dtype=dtype)
    z = one.pop("z")
    two.pop("z")
    assert z is not None
    given = [with_grad(one), with_grad(two), with_grad({"z": z})]
    y = bidirectional_scan(natural(given[0]), natural(given[1]), given[2]["z"].mT, backend=backend).mT  # type: ignore[union-attr]

    exact = [with_grad(one, torch.float64), with_grad(two, torch.float64), with_grad({"z": z}, torch.float64)]
    gate = exact[2]["z"]
    flipped = {n: v.flip(-1) if v is not None and v.ndim == 3 else v for n, v in exact[1].items()}
    ahead = naive_scan(**exact[0], z=gate, delta_softplus=True)  # type: ignore[arg-type]
    back = naive_scan(**flipped, z=gate.flip(-1), delta_softplus=True).flip(-1)  # type: ignore[arg-type, union-attr]
    expected = (ahead + back) / 2
    assert y.dtype == dtype
    assert relative_error(y, expected) <= OPS[dtype].forward
    cotangent = torch.randn(y.shape).to(dtype)
    flat = [{f"{i}.{n}": v for i, part in enumerate(side) for n, v in part.items()} for side in (given, exact)]
    found, wanted = gradients(y, flat[0], cotangent), gradients(expected, flat[1], cotangent)
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name]) <= OPS[dtype].backward, name


def test_directions_without_skip_and_bias(backend: str) -> None:
    one, two = draw(6, without=("D", "delta_bias")), draw(6, without=("D", "delta_bias"))
    z = one.pop("z")
    two.pop("z")
    assert z is not None
    y = bidirectional_scan(natural(one), natural(two), z.mT, backend=backend).mT
    flipped = {n: v.flip(-1) if v is not None and v.ndim == 3 else v for n, v in two.items()}
    scan = selective_scan(**one, z=z, delta_softplus=True, backend=backend)  # type: ignore[arg-type]
    scan_b = selective_scan(**flipped, z=z.flip(-1), delta_softplus=True, backend=backend).flip(-1)  # type: ignore[arg-type]
    assert relative_error(y, (scan + scan_b) / 2) <= OPS[torch.float32].forward


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
@pytest.mark.parametrize(
    ("length", "width", "bias"), [(1, 4, True), (2, 4, False), (3, 4, True), (17, 3, True), (65, 1, False)]
)
def test_convolution(length: int, width: int, bias: bool, activation: Any, dtype: torch.dtype, backend: str) -> None:
    needs(backend, dtype)
    inputs: Inputs = {
        "x": torch.randn(3, 5, length).to(dtype),
        "weight": torch.randn(5, width).to(dtype),
        "bias": torch.randn(5).to(dtype) if bias else None,
    }
    given, exact = with_grad(inputs), with_grad(inputs, torch.float64)
    y = causal_conv1d(**given, activation=activation, backend=backend)  # type: ignore[arg-type]
    expected = naive_conv(**exact, silu=activation is not None)  # type: ignore[arg-type]
    assert y.dtype == dtype
    assert relative_error(y, expected) <= OPS[dtype].forward
    cotangent = torch.randn(y.shape).to(dtype)
    found, wanted = gradients(y, given, cotangent), gradients(expected, exact, cotangent)
    for name, gradient in found.items():
        assert gradient.dtype == dtype
        assert relative_error(gradient, wanted[name]) <= OPS[dtype].backward, name


def test_convolution_in_both_directions(backend: str) -> None:
    xz = torch.randn(2, 9, 10)
    x = xz[..., :5].requires_grad_()  # a strided view, as the mixer passes it
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(5, requires_grad=True) for _ in range(2)]
    ahead, back = bidirectional_conv(x, (weights[0], biases[0]), (weights[1], biases[1]), backend=backend)
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights, *biases)]
    wide = leaves[0].mT
    expected = naive_conv(wide, leaves[1], leaves[3], True).mT
    expected_b = naive_conv(wide.flip(2), leaves[2], leaves[4], True).flip(2).mT
    assert relative_error(ahead, expected) <= OPS[torch.float32].forward
    assert relative_error(back, expected_b) <= OPS[torch.float32].forward
    cotangents = torch.randn(2, 9, 5), torch.randn(2, 9, 5)
    found = torch.autograd.grad((ahead, back), (x, *weights, *biases), cotangents)
    wanted = torch.autograd.grad((expected, expected_b), leaves, [c.double() for c in cotangents])
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) <= OPS[torch.float32].backward


def test_only_one_of_the_two_convolutions_is_trained(backend: str) -> None:
    x, weight, frozen = torch.randn(1, 4, 3), torch.randn(3, 2, requires_grad=True), torch.randn(3, 2)
    ahead, back = bidirectional_conv(x, (weight, None), (frozen, None), backend=backend)
    assert ahead.requires_grad
    assert not back.requires_grad


def test_convolution_agrees_with_pytorch(backend: str) -> None:
    x, weight, bias = torch.randn(2, 6, 19), torch.randn(6, 4), torch.randn(6)
    expected = F.silu(F.conv1d(F.pad(x, (3, 0)), weight.unsqueeze(1), bias, groups=6))
    assert relative_error(causal_conv1d(x, weight, bias, "silu", backend=backend), expected) <= 2e-6


def saved_bytes(call: Callable[[], object]) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward pass of `call`."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        saved = call()  # held while counting, so that no storage is freed and its address used again
    assert saved is not None
    return sum(storages.values())


def test_saved_tensors_are_of_the_size_of_the_inputs(backend: str) -> None:
    inputs = with_grad(draw(197, state=16, dim=64))
    size = sum(t.numel() * t.element_size() for t in inputs.values() if t is not None)
    states = 2 * 197 * 64 * 16 * 4
    assert states > 4 * size  # else the assertion below would prove nothing
    saved = saved_bytes(lambda: selective_scan(**inputs, delta_softplus=True, backend=backend))  # type: ignore[arg-type]
    assert size <= saved + inputs["u"].nbytes  # type: ignore[union-attr]
    assert saved < 1.5 * size
    x, weight, bias = (
        torch.randn(2, 64, 197, requires_grad=True),
        torch.randn(64, 4, requires_grad=True),
        torch.randn(64),
    )
    saved = saved_bytes(lambda: causal_conv1d(x, weight, bias, "silu", backend=backend))
    assert saved < 1.1 * x.nbytes


def test_a_long_scan_in_chunks_saves_one_state_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = with_grad(draw(197, state=16, dim=64))
    one_state = 64 * 16 * 4  # of an image

    def saved() -> int:
        return saved_bytes(lambda: selective_scan(**inputs, delta_softplus=True, backend="reference"))  # type: ignore[arg-type]

    whole = saved()
    monkeypatch.setattr(reference_backend, "_CHUNK_BYTES", 50 * one_state)
    assert saved() - whole == 2 * 3 * one_state  # two images, each in four chunks in place of one


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_slices_of_the_batch_change_nothing(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    one_state = 5 * 3 * 4
    monkeypatch.setattr(reference_backend, "_CHUNK_STEPS", 8)
    monkeypatch.setattr(reference_backend, "_CHUNK_BYTES", 2 * 8 * one_state)
    inputs = draw(19, state=3, batch=5, dtype=dtype)
    assert inputs["u"] is not None
    assert reference_backend._plan([inputs["u"].mT, None, inputs["A"], *[None] * 4]) == (2, 8)
    assert reference_backend._slices(5, 2) == [slice(0, 2), slice(2, 4), slice(4, 5)]
    assert_scan(inputs, "reference")
    assert_scan({**inputs, "z": None, "D": None}, "reference")


def test_second_derivatives_are_refused() -> None:
    inputs = with_grad(draw(3))
    y = selective_scan(**inputs, delta_softplus=True, backend="reference")  # type: ignore[arg-type]
    (gradient,) = torch.autograd.grad(y.square().sum(), inputs["u"], create_graph=True)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_backends_are_listed_with_a_reason() -> None:
    rows = backend_statuses()
    assert svp_bench.list_backends() == [row.name for row in rows]
    assert "reference" in [row.name for row in rows if row.available]
    for row in rows:
        assert row.summary
        assert row.available == (row.reason is None)
        if not row.available:
            with pytest.raises(
                UnavailableError, match=f"the scan backend '{row.name}' was asked for and cannot run here"
            ):
                choose(row.name, "cpu", torch.float32)


def test_auto_says_what_it_chose() -> None:
    name, reason = choose("auto", "cpu", torch.float32)
    assert name in BACKENDS
    assert reason.startswith("auto: the first that runs on cpu with float32")
    assert choose("reference", torch.device("cpu"), torch.float64) == ("reference", "asked for by name")


def test_auto_passes_over_what_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    from svp_bench.ops import interface

    interface._choose.cache_clear()
    monkeypatch.setattr(reference_backend, "unavailable", lambda: "it is out for lunch")
    monkeypatch.setattr(interface, "BACKENDS", [interface.BACKENDS.entry("reference")])
    try:
        with pytest.raises(UnavailableError, match=r"no scan backend can run here: reference: it is out for lunch"):
            choose("auto", "cpu", torch.float32)
    finally:
        interface._choose.cache_clear()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda i: selective_scan(**i, backend="refrence"),
            UsageError,
            r"unknown scan backend 'refrence'; did you mean 'reference'\?",
        ),
        (
            lambda i: selective_scan(**{**i, "u": i["u"][0]}),
            ValueError,
            r"u must be \(batch, dim, length\), not \(5, 7\)",
        ),
        (lambda i: selective_scan(**{**i, "A": i["A"][0]}), ValueError, r"A must be \(dim, state\), not \(4,\)"),
        (
            lambda i: selective_scan(**{**i, "delta": i["delta"].mT}),
            ValueError,
            r"delta must be \(batch, dim, length\) = \(2, 5, 7\), not \(2, 7, 5\)",
        ),
        (
            lambda i: selective_scan(**{**i, "A": i["A"][:3]}),
            ValueError,
            r"A must be \(dim, state\) = \(5, 4\), not \(3, 4\)",
        ),
        (
            lambda i: selective_scan(**{**i, "B": i["B"].mT}),
            ValueError,
            r"B must be \(batch, state, length\) = \(2, 4, 7\), not \(2, 7, 4\)",
        ),
        (
            lambda i: selective_scan(**{**i, "C": i["C"][:1]}),
            ValueError,
            r"C must be \(batch, state, length\) = \(2, 4, 7\), not \(1, 4, 7\)",
        ),
        (lambda i: selective_scan(**{**i, "D": torch.ones(1)}), ValueError, r"D must be \(dim,\) = \(5,\), not \(1,\)"),
        (
            lambda i: selective_scan(**{**i, "z": i["z"][:, :, :1]}),
            ValueError,
            r"z must be \(batch, dim, length\) = \(2, 5, 7\), not \(2, 5, 1\)",
        ),
        (
            lambda i: selective_scan(**{**i, "delta_bias": torch.ones(7)}),
            ValueError,
            r"delta_bias must be \(dim,\) = \(5,\), not \(7,\)",
        ),
        (
            lambda i: causal_conv1d(i["u"], torch.ones(4, 4)),
            ValueError,
            r"weight must be \(dim, width\) = \(5, 4\), not \(4, 4\)",
        ),
        (
            lambda i: causal_conv1d(i["u"][0], torch.ones(5, 4)),
            ValueError,
            r"x must be \(batch, dim, length\), not \(5, 7\)",
        ),
        (
            lambda i: causal_conv1d(i["u"], torch.ones(5, 4), torch.ones(4)),
            ValueError,
            r"bias must be \(dim,\) = \(5,\), not \(4,\)",
        ),
        (
            lambda i: causal_conv1d(i["u"], torch.ones(5, 4), None, "relu"),
            ValueError,
            r"activation must be None, 'silu' or 'swish', not 'relu'",
        ),
        (
            lambda i: causal_conv1d(i["u"].long(), torch.ones(5, 4), backend="reference"),
            UnavailableError,
            r"'reference' was asked for and cannot run here: it takes floating-point tensors, not torch.int64",
        ),
        (
            lambda i: choose("auto", "cpu", torch.int32),
            UnavailableError,
            r"no scan backend can run here: .*reference: it takes floating-point tensors, not torch.int32",
        ),
    ],
)
def test_messages(call: Callable[[Any], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        call(draw(7))
    assert "\n" not in str(caught.value)


def test_recomputed_inputs_are_not_saved(backend: str) -> None:
    x = torch.randn(2, 33, 16, requires_grad=True)
    weights = [(torch.randn(16, 4), torch.randn(16)) for _ in range(2)]
    others = [torch.randn(2, 33, n) for n in (16, 3, 3, 16, 3, 3, 16)]
    A, D, bias = -torch.rand(16, 3), torch.randn(16), torch.randn(16)
    calls = 0

    def convolve(x: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return bidirectional_conv(x, weights[0], weights[1], backend=backend)

    def run(recompute: bool) -> tuple[Tensor, Tensor, int]:
        saved: set[int] = set()
        u, u_b = convolve(x)
        ahead = Direction(u, others[0], A, others[1], others[2], D, bias)
        back = Direction(u_b, others[3], A, others[4], others[5], D, bias)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.data_ptr()) or t, lambda t: t):
            y = bidirectional_scan(
                ahead, back, others[6], recompute=Recompute(convolve, (x,)) if recompute else None, backend=backend
            )
        (gradient,) = torch.autograd.grad(y.square().sum(), x)
        return y, gradient, len(saved & {u.data_ptr(), u_b.data_ptr()})

    y, gradient, saved = run(recompute=False)
    assert (saved, calls) == (2, 1)
    again, gradient_again, saved_again = run(recompute=True)
    # the cpu backend saves them all the same; the others convolve once forward, once backward
    assert (saved_again, calls) == ((2, 2) if backend == "cpu" else (0, 3))
    assert torch.equal(y, again)
    assert torch.equal(gradient, gradient_again)


def test_autocast_does_not_reach_into_the_scan(backend: str) -> None:
    torch.manual_seed(0)
    x, z = torch.randn(2, 17, 16), torch.randn(2, 17, 16)
    rows = [torch.randn(2, 17, n) for n in (16, 3, 3, 16, 3, 3)]
    A, D, bias, weight = -torch.rand(16, 3), torch.randn(16), torch.randn(16), torch.randn(16, 4)

    def run() -> Tensor:
        u, u_b = bidirectional_conv(x, (weight, None), (weight, None), backend=backend)
        ahead, back = (
            Direction(u, rows[0], A, rows[1], rows[2], D, bias),
            Direction(u_b, rows[3], A, *rows[4:], D, bias),
        )
        return bidirectional_scan(ahead, back, z, backend=backend)

    plain = run()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert relative_error(run(), plain.double()) <= 1e-6
