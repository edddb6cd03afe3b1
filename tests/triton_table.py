"""The triton backend under Triton's interpreter, on small shapes; test_triton.py runs this file in its own process.

The comparisons are those of test_ops.py: with the recurrence of the docstring in float64. Where a tile of steps or a
block of channels ends, something may go wrong, so lengths lie around the tile.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_ops import (
    Inputs,
    assert_scan,
    draw,
    gradients,
    naive_conv,
    naive_scan,
    natural,
    test_extreme_step_sizes,
    test_gates_far_out,
    test_strided_inputs,
    with_grad,
)
from tolerances import BACKBONE, OPS, relative_error
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import svp_bench
from svp_bench.methods import METHODS
from svp_bench.methods.base import build_method
from svp_bench.methods.build import adapt
from svp_bench.models.vim import VisionMamba
from svp_bench.ops import (
    Direction,
    PromptTerms,
    Recompute,
    add_norm,
    add_prompts,
    bidirectional_conv,
    bidirectional_scan,
    causal_conv1d,
    choose,
    selective_scan,
    triton_launch,
    triton_norm,
)
from svp_bench.ops import triton as backend

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if COMPILED := os.environ.get("SVP_BENCH_PTX"):
    import ptx_driver

    ptx_driver.install(int(COMPILED))
assert INTERPRETED or COMPILED or torch.cuda.is_available(), "run tests/test_triton.py, which sets TRITON_INTERPRET"
# Of test_ops.py only what is called here is to run here.
extreme_step_sizes, gates_far_out, strided_inputs = test_extreme_step_sizes, test_gates_far_out, test_strided_inputs
del test_extreme_step_sizes, test_gates_far_out, test_strided_inputs

T = backend.SCAN_FORWARD["T"]
LENGTHS = sorted(
    {1, 2, 9, 23, *(sizes["T"] + i for sizes in (backend.SCAN_FORWARD, backend.SCAN_BACKWARD) for i in (-1, 0, 1))}
)
HALVES = [torch.float32, torch.bfloat16]
FIELDS = ("u", "delta", "A", "B", "C", "D", "delta_bias")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(length: int, dtype: torch.dtype) -> None:
    assert_scan(draw(length, state=3, dtype=dtype, batch=1 + length % 2), "triton")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("state", "dim"), [(1, 1), (3, 33), (16, 7), (40, 2)])
def test_states_and_channels(state: int, dim: int, dtype: torch.dtype) -> None:
    assert_scan(draw(9, state, dim, 1, dtype=dtype, wide=torch.float32), "triton")


def test_float16() -> None:
    inputs = draw(9, dtype=torch.float16)
    given, exact = with_grad(inputs), with_grad(inputs, torch.float64)
    y = selective_scan(**given, delta_softplus=True, backend="triton")  # type: ignore[arg-type]
    expected = naive_scan(**exact, delta_softplus=True)  # type: ignore[arg-type]
    assert y.dtype == torch.float16
    assert relative_error(y, expected) <= 2**-11
    cotangent = torch.randn(y.shape).half()
    found, wanted = gradients(y, given, cotangent), gradients(expected, exact, cotangent)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float16
        assert relative_error(gradient, wanted[name]) <= 2**-10, name


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize(
    "without", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias"), ("z", "delta_bias")], ids="+".join
)
def test_optional_inputs(without: tuple[str, ...], softplus: bool) -> None:
    inputs = draw(5, without=without, batch=1, dim=3)
    if not softplus:  # a step size is positive
        inputs["delta"] = torch.rand(1, 3, 5)
        inputs["delta_bias"] = None if "delta_bias" in without else torch.rand(3)
    assert_scan(inputs, "triton", softplus)


@pytest.mark.slow
def test_extremes() -> None:
    extreme_step_sizes(torch.float32, "triton")
    gates_far_out("triton")
    strided_inputs("triton")
    for scale in (1e-8, 1e4):  # a state that never fades, and one that is gone after a step
        inputs = draw(T + 2, state=3, dim=3, batch=1)
        A = inputs["A"]
        assert A is not None
        inputs["A"] = A * scale
        if scale > 1:  # its gradient underflows to zero
            given, exact = with_grad(inputs), with_grad(inputs, torch.float64)
            y = selective_scan(**given, delta_softplus=True, backend="triton")  # type: ignore[arg-type]
            expected = naive_scan(**exact, delta_softplus=True)  # type: ignore[arg-type]
            found = gradients(y, given, torch.ones_like(y))
            for name, wanted in gradients(expected, exact, torch.ones_like(expected)).items():
                if name != "A":
                    assert relative_error(found[name], wanted) <= OPS[torch.float32].backward, name
            assert found["A"].isfinite().all()
        else:
            assert_scan(inputs, "triton")


class Two:
    """Two directions and a gate, for our scan and for the naive one."""

    def __init__(
        self,
        length: int,
        dtype: torch.dtype,
        without: tuple[tuple[str, ...], ...] = ((), ()),
        state: int = 3,
        dim: int = 5,
    ) -> None:
        wide = torch.float32 if dim > 5 else None  # weights, as in a model
        self.sides = [draw(length, state, dim, 2, dtype=dtype, without=w, wide=wide) for w in without]
        gates = [side.pop("z") for side in self.sides]
        assert gates[0] is not None
        self.z = gates[0]

    def leaves(self, dtype: torch.dtype | None = None) -> tuple[list[Inputs], Tensor]:
        z = self.z.detach().to(dtype or self.z.dtype).requires_grad_()
        return [with_grad(side, dtype) for side in self.sides], z

    @staticmethod
    def naive(sides: list[Inputs], z: Tensor) -> Tensor:
        flipped = {n: v.flip(-1) if v is not None and v.ndim == 3 else v for n, v in sides[1].items()}
        ahead = naive_scan(**sides[0], z=z, delta_softplus=True)  # type: ignore[arg-type]
        back = naive_scan(**flipped, z=z.flip(-1), delta_softplus=True)  # type: ignore[arg-type]
        return (ahead + back.flip(-1)) / 2

    @staticmethod
    def ours(sides: list[Inputs], z: Tensor) -> Tensor:
        return bidirectional_scan(natural(sides[0]), natural(sides[1]), z.mT, backend="triton").mT

    @staticmethod
    def named(sides: list[Inputs], z: Tensor) -> Inputs:
        every = {"z": z, **{f"{i}.{n}": v for i, side in enumerate(sides) for n, v in side.items()}}
        return {n: v if v is not None and v.requires_grad else None for n, v in every.items()}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("length", "without"),
    [(1, ((), ())), (T + 3, ((), ())), (4, (("D", "delta_bias"), ("D", "delta_bias"))), (4, (("D",), ("delta_bias",)))],
)
def test_two_directions(length: int, without: tuple[tuple[str, ...], ...], dtype: torch.dtype) -> None:
    assert_two(Two(length, dtype, without))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("trained", [True, False])
def test_the_sizes_of_a_model(trained: bool, dtype: torch.dtype) -> None:
    """Programs as large as they are in a model, with gradients of the weights and without them."""
    assert_two(Two(2 * T + 1, dtype, state=16, dim=64), () if trained else ("A", "D", "delta_bias"))
    x, cotangent = torch.randn(2, 9, 136).to(dtype).requires_grad_(), torch.randn(2, 9, 136).to(dtype)
    weights = [torch.randn(136, *form).requires_grad_(trained) for form in ((4,), (4,), (), ())]
    outs = bidirectional_conv(x, (weights[0], weights[2]), (weights[1], weights[3]), backend="triton")
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, *weights)]
    ahead = naive_conv(exact[0].mT, exact[1], exact[3], silu=True).mT
    back = naive_conv(exact[0].mT.flip(-1), exact[2], exact[4], silu=True).flip(-1).mT
    for found, wanted in zip(outs, (ahead, back), strict=True):
        assert relative_error(found, wanted) <= OPS[dtype].forward
    asked = [t for t in (x, *weights) if t.requires_grad]
    found = torch.autograd.grad(outs, asked, [cotangent, cotangent])
    wanted = torch.autograd.grad([ahead, back], [t for t in exact if t.requires_grad], [cotangent.double()] * 2)
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) <= OPS[dtype if a.dtype == dtype else torch.float32].backward


def assert_two(both: Two, frozen: tuple[str, ...] = ()) -> None:
    dtype = both.z.dtype
    given, exact = both.leaves(), both.leaves(torch.float64)
    for sides, _ in (given, exact):
        for side in sides:
            for name in frozen:
                side[name] = side[name].detach()  # type: ignore[union-attr]
    y, expected = Two.ours(*given), Two.naive(*exact)
    assert y.dtype == dtype
    assert relative_error(y, expected) <= OPS[dtype].forward
    cotangent = torch.randn(y.shape).to(dtype)
    found = gradients(y, Two.named(*given), cotangent)
    for name, wanted in gradients(expected, Two.named(*exact), cotangent).items():
        assert relative_error(found[name], wanted) <= OPS[dtype].backward, name


ASKED = ["z", *(f"{i}.{name}" for i in range(2) for name in FIELDS)]


@pytest.mark.slow
def test_each_gradient_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the one that comes with all others, and the launch has a place for no other result."""
    both = Two(3, torch.float32)
    sides, z = both.leaves()
    all_of_them = gradients(Two.ours(sides, z), Two.named(sides, z), torch.ones(2, 5, 3))
    launches: list[dict[str, Any]] = []
    launch = triton_launch.launch

    def watched(name: str, programs: int, arguments: dict[str, Any]) -> None:
        launches.append(arguments)
        launch(name, programs, arguments)

    monkeypatch.setattr(triton_launch, "launch", watched)
    for only in ASKED:
        sides, z = both.leaves()
        leaves = Two.named(sides, z)
        for name, leaf in leaves.items():
            if leaf is not None:
                leaf.requires_grad_(name == only)
        Two.ours(sides, z).sum().backward()
        leaf = leaves[only]
        assert leaf is not None
        assert relative_error(leaf.grad, all_of_them[only]) <= OPS[torch.float32].backward, only  # type: ignore[arg-type]
        places = {f"d{n}{i}" for i in range(2) for n in ("u", "delta", "A", "B", "C", "D", "bias")} | {"dz"}
        written = {name for name in places if launches[-1][name] is not None}
        direction, _, field = only.rpartition(".")
        assert written == {f"d{field.removeprefix('delta_')}{direction}"}
        assert (launches[-1]["before"] is None) == (field not in ("delta", "A", "delta_bias"))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(
    ("length", "width", "bias", "activation"),
    [(1, 4, True, "silu"), (3, 4, False, None), (23, 3, True, "silu"), (9, 1, False, "silu")],
)
def test_convolution(length: int, width: int, bias: bool, activation: Any, dtype: torch.dtype) -> None:
    inputs: Inputs = {
        "x": torch.randn(2, 5, length).to(dtype),
        "weight": torch.randn(5, width).to(dtype),
        "bias": torch.randn(5).to(dtype) if bias else None,
    }
    given, exact = with_grad(inputs), with_grad(inputs, torch.float64)
    y = causal_conv1d(**given, activation=activation, backend="triton")  # type: ignore[arg-type]
    expected = naive_conv(**exact, silu=activation is not None)  # type: ignore[arg-type]
    assert relative_error(y, expected) <= OPS[dtype].forward
    cotangent = torch.randn(y.shape).to(dtype)
    found, wanted = gradients(y, given, cotangent), gradients(expected, exact, cotangent)
    for name, gradient in found.items():
        assert relative_error(gradient, wanted[name]) <= OPS[dtype].backward, name


def test_two_convolutions() -> None:
    x = torch.randn(2, 11, 10)[..., :5].requires_grad_()  # a strided view, as the mixer passes it
    weights = [torch.randn(5, 4, requires_grad=True) for _ in range(2)]
    biases = [torch.randn(5, requires_grad=True) for _ in range(2)]
    outs = bidirectional_conv(x, (weights[0], biases[0]), (weights[1], biases[1]), backend="triton")
    leaves = [t.detach().double().requires_grad_() for t in (x, *weights, *biases)]
    expected = naive_conv(leaves[0].mT, leaves[1], leaves[3], True).mT
    expected_b = naive_conv(leaves[0].mT.flip(2), leaves[2], leaves[4], True).flip(2).mT
    cotangents = torch.randn(2, 11, 5), torch.randn(2, 11, 5)
    found = torch.autograd.grad(outs, (x, *weights, *biases), cotangents)
    wanted = torch.autograd.grad((expected, expected_b), leaves, [c.double() for c in cotangents])
    for a, b in zip((*outs, *found), (expected, expected_b, *wanted), strict=True):
        assert relative_error(a, b) <= OPS[torch.float32].backward
    frozen, weight = torch.randn(3, 2), torch.randn(3, 2, requires_grad=True)
    ahead, back = bidirectional_conv(torch.randn(1, 4, 3), (weight, None), (frozen, None), backend="triton")
    assert ahead.requires_grad
    assert not back.requires_grad


def test_empty_batches() -> None:
    inputs = with_grad(draw(5, batch=0))
    y = selective_scan(**inputs, delta_softplus=True, backend="triton")  # type: ignore[arg-type]
    assert all(g.count_nonzero() == 0 for g in gradients(y, inputs, torch.ones(0, 5, 5)).values())
    weight = torch.randn(5, 4, requires_grad=True)
    causal_conv1d(torch.randn(0, 5, 6), weight, backend="triton").sum().backward()
    assert weight.grad is not None
    assert weight.grad.count_nonzero() == 0


# ---- prompts, residual addition and norm


class Rows(NamedTuple):
    """What `add_norm` takes: tensors by name, and the token without prompts."""

    tensors: dict[str, Tensor | None]
    excluded: int | None

    @staticmethod
    def sample(width: int, terms: int, residual: bool, excluded: int | None, dtype: torch.dtype) -> Rows:
        def row() -> Tensor:
            return torch.randn(2, 3, width).to(dtype)

        tensors: dict[str, Tensor | None] = {"hidden": row(), "weight": torch.randn(width)}
        tensors["residual"] = torch.randn(2, 3, width) if residual else None
        for k in range(terms):
            tensors |= {f"scale{k}": torch.randn(width), f"pre{k}": 3 * row()}
        return Rows(tensors, excluded)

    def leaves(self, dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
        return with_grad(self.tensors, dtype)

    def prompts(self, leaves: dict[str, Tensor | None]) -> PromptTerms | None:
        terms = [(leaves[f"scale{k}"], leaves[f"pre{k}"]) for k in range(8) if f"pre{k}" in leaves]
        return PromptTerms(terms, self.excluded) if terms else None  # type: ignore[arg-type]

    def ours(self, leaves: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        assert leaves["hidden"] is not None
        assert leaves["weight"] is not None
        prompts = self.prompts(leaves)
        return add_norm(leaves["hidden"], leaves["residual"], leaves["weight"], 1e-5, prompts, backend="triton")

    def naive(self, leaves: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        """The formulas of the docstrings, token by token where one is excluded."""
        total, weight = leaves["hidden"], leaves["weight"]
        assert total is not None
        assert weight is not None
        prompted = torch.tensor([float(token != self.excluded) for token in range(total.shape[1])])[:, None]
        for scale, pre in (self.prompts(leaves) or PromptTerms([], None)).terms:
            total = total + prompted * scale * pre / (1 + torch.exp(-pre))
        if leaves["residual"] is not None:
            total = total + leaves["residual"]
        return total, weight * total / (total.square().mean(-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("width", "terms", "residual", "excluded"),
    [(1, 0, True, None), (33, 1, False, 2), (64, 2, True, 1), (7, 2, True, None), (600, 3, False, 0)],
)
def test_add_norm(width: int, terms: int, residual: bool, excluded: int | None, dtype: torch.dtype) -> None:
    if terms == 3:  # PyTorch's operators then, which round each product
        dtype = torch.float32
    rows = Rows.sample(width, terms, residual, excluded, dtype)
    given, exact = rows.leaves(), rows.leaves(torch.float64)
    outs, expected = rows.ours(given), rows.naive(exact)
    assert [o.dtype for o in outs] == [torch.float32, dtype]
    allowed = OPS[dtype] if dtype in OPS else OPS[torch.bfloat16]
    for out, wanted in zip(outs, expected, strict=True):
        assert relative_error(out, wanted) <= allowed.forward
    cotangents = [torch.randn(2, 3, width), torch.randn(2, 3, width).to(dtype)]
    names = [name for name, leaf in given.items() if leaf is not None]
    found = torch.autograd.grad(outs, [given[name] for name in names], cotangents)  # type: ignore[misc]
    exactly = [c.double() for c in cotangents]
    rows_wanted = torch.autograd.grad(expected, [exact[name] for name in names], exactly)  # type: ignore[misc]
    for name, gradient, wanted in zip(names, found, rows_wanted, strict=True):
        leaf = given[name]
        assert leaf is not None
        assert gradient.dtype == leaf.dtype
        if width > 1 or name == "weight":  # the norm of one number has no slope but by eps
            assert relative_error(gradient, wanted) <= allowed.backward, name


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("terms", "excluded"), [(1, None), (2, 1), (3, 0)])
def test_add_prompts(terms: int, excluded: int | None, dtype: torch.dtype) -> None:
    if terms == 3:
        dtype = torch.float32
    rows = Rows.sample(33, terms, False, excluded, dtype)
    del rows.tensors["weight"]
    given = rows.leaves()
    exact = {**rows.leaves(torch.float64), "weight": torch.ones(33, dtype=torch.float64)}
    hidden, prompts = given["hidden"], rows.prompts(given)
    assert hidden is not None
    assert prompts is not None
    out, expected = add_prompts(hidden, *prompts, backend="triton"), rows.naive(exact)[0]
    assert relative_error(out, expected) <= OPS[dtype].forward
    names = [name for name, leaf in given.items() if leaf is not None]
    cotangent = torch.randn(out.shape).to(dtype)
    found = torch.autograd.grad(out, [given[n] for n in names], cotangent)  # type: ignore[misc]
    rows_wanted = torch.autograd.grad(expected, [exact[n] for n in names], cotangent.double())  # type: ignore[misc]
    for name, gradient, wanted in zip(names, found, rows_wanted, strict=True):
        assert relative_error(gradient, wanted) <= OPS[dtype].backward, name


def test_each_gradient_of_rows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from one output alone; and a pass of several rows a program adds up its sums."""
    rows = Rows.sample(9, 2, True, 1, torch.float32)
    launches: list[dict[str, Any]] = []
    launch = triton_launch.launch

    def watched(name: str, programs: int, arguments: dict[str, Any]) -> None:
        launches.append(arguments)
        launch(name, programs, arguments)

    monkeypatch.setattr(triton_launch, "launch", watched)
    for output in (0, 1, 2):
        every = rows.leaves()
        names = [n for n in every if output or n != "weight"]

        def loss(leaves: dict[str, Tensor | None], output: int = output) -> Tensor:
            total, normed = rows.ours(leaves)
            parts = [total.square().sum(), (normed * torch.arange(9.0)).sum()]
            return parts[output] if output < 2 else parts[0] + parts[1]

        together = torch.autograd.grad(loss(every), [every[n] for n in names])  # type: ignore[misc]
        monkeypatch.setitem(triton_norm.NORM, "programs", 4)
        for name, wanted in zip(names, together, strict=True):
            leaves = rows.leaves()
            for other, leaf in leaves.items():
                assert leaf is not None
                leaf.requires_grad_(other == name)
            (found,) = torch.autograd.grad(loss(leaves), [leaves[name]])  # type: ignore[list-item]
            assert relative_error(found, wanted) <= OPS[torch.float32].backward, name
            places = {"hidden", "residual", "weight", "scale0", "pre0", "scale1", "pre1"}
            assert {p for p in places if launches[-1][f"d{p}"] is not None} == {name}
        monkeypatch.undo()
        monkeypatch.setattr(triton_launch, "launch", watched)


def test_a_spared_token_takes_nothing_from_a_broken_prompt() -> None:
    rows = Rows.sample(4, 1, True, 1, torch.float32)
    pre = rows.tensors["pre0"]
    assert pre is not None
    pre[:, 1] = torch.nan
    total, _ = rows.ours(rows.leaves())
    assert total.isfinite().all()


def test_rows_that_kernels_do_not_take() -> None:
    """PyTorch's operators do: no tokens, and rows too wide for one program."""
    for shape in ((0, 3, 8), (1, 1, triton_norm._WIDEST + 1)):
        hidden, weight = torch.randn(shape, requires_grad=True), torch.randn(shape[-1])
        total, normed = add_norm(hidden, None, weight, 1e-5, backend="triton")
        assert torch.equal(total, hidden)
        assert normed.shape == hidden.shape
        normed.sum().backward()
        assert hidden.grad is not None


def test_rows_checkpointed_and_compiled() -> None:
    rows = Rows.sample(9, 2, True, 1, torch.float32)

    def run(call: Any) -> list[Tensor]:
        leaves = rows.leaves()
        outs = call(leaves)
        return [*outs, *torch.autograd.grad(sum(o.square().sum() for o in outs), list(leaves.values()))]

    def inner(leaves: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        hidden, weight, residual = leaves["hidden"], leaves["weight"], leaves["residual"]
        assert hidden is not None
        assert weight is not None
        total, normed = triton_norm.add_norm(hidden, residual, weight, 1e-5, rows.prompts(leaves))
        assert residual is not None
        scale, pre = leaves["scale0"], leaves["pre0"]
        assert scale is not None
        assert pre is not None
        return total, triton_norm.add_prompts(normed, [(scale, pre)], None)

    plain = run(inner)
    for kind, found in {
        "again": run(inner),
        "checkpointed": run(lambda leaves: checkpoint(inner, leaves, use_reentrant=False)),
        "compiled": run(torch.compile(inner, backend="aot_eager", fullgraph=True)),
    }.items():
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), kind


def mixed(x: Tensor, parts: list[Tensor], recompute: bool = False) -> Tensor:
    """Convolution and scan as the mixer chains them; `parts` are weights and rows of fixed inputs."""

    def convolve(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return bidirectional_conv(x, (weight, None), (weight, None), backend="triton")

    weight, A, D, bias, delta, B, C, z = parts
    u, u_b = convolve(x, weight)
    ahead, back = Direction(u, delta, A, B, C, D, bias), Direction(u_b, delta, A, C, B, D, bias)
    again = Recompute(torch.no_grad()(convolve), (x, weight)) if recompute else None
    return bidirectional_scan(ahead, back, z, recompute=again, backend="triton")


def mixer_parts() -> tuple[Tensor, list[Tensor]]:
    parts = [torch.randn(4, 2), -torch.rand(4, 3), torch.randn(4), torch.randn(4)]
    parts += [torch.randn(2, T + 1, n) for n in (4, 3, 3, 4)]
    return torch.randn(2, T + 1, 4, requires_grad=True), [p.requires_grad_() for p in parts]


@pytest.mark.slow
def test_made_again_checkpointed_compiled_and_under_autocast() -> None:
    x, parts = mixer_parts()

    def run(call: Any) -> list[Tensor]:
        y = call(x, parts)
        assert y.dtype == torch.float32
        return [y, *torch.autograd.grad(y.square().sum(), [x, *parts])]

    plain = run(mixed)
    assert all(torch.equal(a, b) for a, b in zip(plain, run(mixed), strict=True)), "not deterministic"
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        mixed(x, parts, recompute=True)
    assert {t.data_ptr() for t in saved} == {t.data_ptr() for t in (x, *parts)}, "the inputs and nothing else"
    kinds = {
        "made again": run(lambda x, p: mixed(x, p, recompute=True)),
        "checkpointed": run(lambda x, p: checkpoint(mixed, x, p, use_reentrant=False)),
        "compiled": run(torch.compile(mixed, backend="aot_eager")),
    }
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        kinds["under autocast"] = run(mixed)
    for kind, found in kinds.items():
        assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)), kind


@pytest.mark.slow
def test_compiled_without_a_graph_break() -> None:
    """The functions of the backend themselves; the front functions look up a module, where Dynamo breaks the graph."""

    def whole(x: Tensor, *parts: Tensor) -> Tensor:
        def convolve(x: Tensor, weight: Tensor, weight_b: Tensor) -> tuple[Tensor, ...]:
            return backend.conv(x, (weight, weight_b), (None, None), (False, True), True)

        weight, weight_b, *rest, z = parts
        u, u_b = convolve(x, weight, weight_b)
        directions = Direction(u, *rest[:4], None, None), Direction(u_b, *rest[4:], None, None)
        again = Recompute(torch.no_grad()(convolve), (x, weight, weight_b))
        return backend.scan(directions, (False, True), z, True, again)

    leaves = [torch.randn(2, 5, 4), torch.randn(4, 2), torch.randn(4, 2)]
    for _ in range(2):
        leaves += [torch.randn(2, 5, 4), -torch.rand(4, 3), torch.randn(2, 5, 3), torch.randn(2, 5, 3)]
    leaves = [leaf.requires_grad_() for leaf in (*leaves, torch.randn(2, 5, 4))]
    found = []
    for call in (whole, torch.compile(whole, backend="aot_eager", fullgraph=True)):
        y = call(*leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_a_model_is_one_graph() -> None:
    torch.manual_seed(0)
    model = VisionMamba(img_size=32, embed_dim=32, depth=2, d_state=2, num_classes=3, scan_backend="triton")
    model = adapt(model, build_method(METHODS.get("svp"), "svp", {}))
    images, trained = torch.randn(1, 3, 32, 32), [p for p in model.parameters() if p.requires_grad]
    found = []
    for call in (model, torch.compile(model, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(1)  # of what a method drops
        y = call(images)
        found.append([y, *torch.autograd.grad(y.square().sum(), trained, allow_unused=True)])
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        assert a is None or relative_error(a, b) <= BACKBONE.backward


def test_a_model_under_ddp(tmp_path: Path) -> None:
    """One process, with all hooks of many: its gradients are those of the model alone."""
    torch.manual_seed(0)
    model = VisionMamba(img_size=32, embed_dim=16, depth=1, d_state=2, num_classes=3, scan_backend="triton")
    images = torch.randn(1, 3, 32, 32)
    found = []
    distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        for call in (model, DistributedDataParallel(model)):
            model.zero_grad(set_to_none=True)
            call(images).square().sum().backward()
            found.append([p.grad for p in model.parameters()])
    finally:
        distributed.destroy_process_group()
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_operators_say_what_they_return() -> None:
    inputs = draw(3)
    flat = [inputs["z"], *natural(inputs)]
    flat = [t.contiguous() if t is not None else None for t in flat]
    ops, checks = torch.ops.svp_bench, ("test_schema", "test_faketensor")
    x, grad = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    flat[0] = torch.randn(2, 3, 5)
    parameters = [torch.randn(5, 2), None]
    torch.library.opcheck(ops.triton_scan, (flat, [True], True), test_utils=checks)
    wanted = [True, False, True, True, False, True, True, True]
    torch.library.opcheck(ops.triton_scan_backward, (grad, flat, [True], True, wanted), test_utils=checks)
    torch.library.opcheck(ops.triton_conv, (x, parameters, [True], True), test_utils=checks)
    wanted = [True, True, False]
    torch.library.opcheck(ops.triton_conv_backward, ([grad], x, parameters, [True], True, wanted), test_utils=checks)
    scale, terms = torch.randn(5), [torch.randn(5), torch.randn(2, 3, 5)]
    torch.library.opcheck(ops.triton_norm, (x, grad, scale, 1e-5, terms, 1), test_utils=checks)
    torch.library.opcheck(ops.triton_norm, (x.bfloat16(), None, None, 0.0, terms, None), test_utils=checks)
    wanted = [True, True, True, True, True]
    given = (grad, x.bfloat16(), x, scale, 1e-5, terms, 1, torch.bfloat16, wanted)
    torch.library.opcheck(ops.triton_norm_backward, given, test_utils=checks)
    given = (grad, None, None, None, 0.0, terms, -1, torch.float32, [False, False, False, True, True])
    torch.library.opcheck(ops.triton_norm_backward, given, test_utils=checks)


def test_a_block_of_vim_nano() -> None:
    torch.manual_seed(0)
    model = svp_bench.create_model("vim_nano_patch8_64", num_classes=3, method="full")
    mixer = model.layers[0].mixer
    hidden = torch.randn(1, 10, mixer.in_proj.in_features, requires_grad=True)
    parameters = dict(mixer.named_parameters())
    found = []
    for name in ("reference", "triton"):
        mixer.scan_backend = name
        y = mixer(hidden)
        grads = torch.autograd.grad(y.square().sum(), [hidden, *parameters.values()])
        found.append({"y": y, "hidden": grads[0], **dict(zip(parameters, grads[1:], strict=True))})
    for name, value in found[0].items():
        allowed = BACKBONE.forward if name == "y" else BACKBONE.backward
        assert relative_error(found[1][name], value) <= allowed, name


@pytest.mark.skipif(bool(COMPILED), reason="the driver of ptx_driver.py takes tensors of the CPU")
def test_auto_on_a_cpu_is_not_triton() -> None:
    assert choose("triton", "cpu", torch.float32).name == "triton"
    assert choose("auto", "cpu", torch.float32).name == "cpu"
    assert choose("auto", "cpu", torch.float64).name == "reference"
