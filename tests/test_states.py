"""State-offset tuning, initial-state tuning, ProDiaL and Memba, against code that is written out in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import reference_vim
import torch
from reference_vim import silu, softplus
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods import create_model
from svp_bench.methods.base import Method
from svp_bench.methods.build import adapt
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.lora import LoRA
from svp_bench.methods.memba import Memba
from svp_bench.methods.prodial import ProDiaL
from svp_bench.methods.state import InitialState, StateOffset, _Decays, _sum_of_decays
from svp_bench.models import MambaRegister, VisionMamba

# 12 patches; width 32, inner width 64, 4 states
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
State = dict[str, Tensor]
Mixer = Callable[[State, str, Tensor], Tensor]
ALL = [
    *(StateOffset(), StateOffset("h", rank=2), StateOffset("y"), InitialState()),
    *(ProDiaL(), ProDiaL(blocks=5, rank=3, diagonal_start=0.1)),
    *(Memba(rank=3), Memba(rank=3, place="bypass", chunks=3, tau=0.5), Memba(rank=3, chunks=20, hand_over=False)),
]
each = pytest.mark.parametrize("method", ALL, ids=repr)


def adapted(method: Method) -> VisionMamba:
    """A small Vim with sampled values in every parameter."""
    model = adapt(VisionMamba(**SIZES), method).eval()
    reference_vim.fill(model)
    return model  # type: ignore[return-value]


def images(count: int = 2) -> Tensor:
    return reference_vim.make_images(count, 3, 48, 64)


def scan(state: State, mixer: str, suffix: str, x: Tensor, h: Tensor, offset: Tensor, bias: Tensor) -> Tensor:
    """The ungated output of one direction, (B, L, E): the scan starts at h, C reads an offset, and a bias is added."""
    kernel, conv_bias = state[f"{mixer}conv1d{suffix}.weight"][:, 0], state[f"{mixer}conv1d{suffix}.bias"]
    A = -torch.exp(state[f"{mixer}A{suffix}_log"])
    rank, states = state[f"{mixer}dt_proj{suffix}.weight"].shape[1], A.shape[1]
    h, out = h.expand(len(x), -1, -1), []
    for t in range(x.shape[1]):
        u = conv_bias + sum(kernel[:, k] * x[:, t - 3 + k] for k in range(4) if t - 3 + k >= 0)
        u = silu(u)
        dt, B, C = (u @ state[f"{mixer}x_proj{suffix}.weight"].T).split([rank, states, states], dim=-1)
        delta = softplus(dt @ state[f"{mixer}dt_proj{suffix}.weight"].T + state[f"{mixer}dt_proj{suffix}.bias"])
        h = torch.exp(delta[:, :, None] * A) * h + (delta * u)[:, :, None] * B[:, None, :]
        out.append(((h + offset) * C[:, None, :]).sum(-1) + state[f"{mixer}D{suffix}"] * u + bias)
    return torch.stack(out, dim=1)


def with_states(state: State, mixer: str, hidden: Tensor, name: str) -> Tensor:
    """A mixer with tensors of the adapter in the scan: `name` says where."""
    x, z = (hidden @ state[f"{mixer}in_proj.weight"].T).chunk(2, dim=-1)
    part = f"adapter.{mixer.split('.')[1]}."
    total = torch.zeros_like(x)
    for suffix in ("", "_b"):
        parts = {"initial": torch.zeros(64, 4).double(), "offset": torch.zeros(64, 4).double(), "y": torch.zeros(64)}
        if name == "low rank":
            parts["offset"] = state[f"{part}up{suffix}.weight"] @ state[f"{part}down{suffix}.weight"]
        else:
            parts[name] = state[f"{part}{'y' if name == 'y' else 'h'}{suffix}"]
        turn = [1] if suffix else []
        y = scan(state, mixer, suffix, x.flip(turn), parts["initial"], parts["offset"], parts["y"])
        total = total + y.flip(turn)
    return total * silu(z) / 2 @ state[f"{mixer}out_proj.weight"].T


def assert_as_written_out(model: VisionMamba, mixer: Mixer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and gradients, float32 against `mixer` in float64."""
    state = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    trained = trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    with torch.no_grad():
        bare = reference_vim.logits(state, images().double(), stride=16)
    monkeypatch.setattr(reference_vim, "mixer", mixer)
    expected = reference_vim.logits(state, images().double(), stride=16)
    assert relative_error(bare, expected) > 100 * BACKBONE.forward
    found = model(images())
    assert relative_error(found, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*found.shape)
    gradients = torch.autograd.grad(found, list(trained.values()), cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained, gradients, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name


@pytest.mark.parametrize(
    ("method", "name"),
    [
        (StateOffset("h"), "offset"),
        (StateOffset("h", rank=2), "low rank"),
        (StateOffset("y"), "y"),
        (InitialState(), "initial"),
    ],
    ids=repr,
)
def test_states_are_those_of_a_recurrence(method: Method, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(method)
    assert_as_written_out(model, lambda state, mixer, hidden: with_states(state, mixer, hidden, name), monkeypatch)


def test_the_decays_have_the_right_gradients() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3), (3, 4), (2, 5, 4), (3, 4))
    elapsed, A, C, h = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in shapes)
    leaves = [elapsed.abs().requires_grad_(), (-A.abs()).requires_grad_(), C.requires_grad_(), h.requires_grad_()]
    assert torch.autograd.gradcheck(_Decays.apply, leaves)
    assert torch.equal(_Decays.apply(*leaves), _sum_of_decays(*leaves))


# ------------------------------------------------------------------------------------------------------- ProDiaL


@pytest.mark.parametrize(
    ("settings", "blocks"), [({}, 2), ({"blocks": 5, "rank": 3, "alpha": 2.0}, 5), ({"blocks": 32}, 32)], ids=str
)
@pytest.mark.parametrize("start", [0.0, 0.2])
def test_prodial_is_its_formula(settings: dict[str, Any], blocks: int, start: float) -> None:
    method = ProDiaL(**settings, diagonal_start=start)
    model = adapted(method)
    assert method.identity_at_start == (start == 0)
    state = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    written = dict(state)
    for layer in range(3):
        for target in ("in_proj", "out_proj"):
            part, weight = f"adapter.{layer}.{target}.", f"layers.{layer}.mixer.{target}.weight"
            P, columns = state[f"{part}diagonal.p"], state[weight].shape[1]
            size = -(-columns // blocks)
            assert P.shape == (blocks, size, size)
            D = torch.zeros(columns, columns).double()
            for i in range(columns):
                for j in range(columns):
                    if i // size == j // size:
                        value = P[i // size, i % size, j % size]
                        D[i, j] = 1 - max(value.item(), 0.0) if i == j else value
            product = state[f"{part}low_rank.up.weight"] @ state[f"{part}low_rank.down.weight"]
            changed = torch.diag(state[f"{part}diagonal.scale"]) @ state[weight] @ D
            written[weight] = changed + method.alpha / method.rank * product
    expected = reference_vim.logits(written, images().double(), stride=16)
    with torch.no_grad():
        found = model(images())
        assert relative_error(found, expected) <= BACKBONE.forward
        method.merge(model)
        assert relative_error(model(images()), found) <= SAME_MATHS
    assert not model.points.hook_lists() or len(model.points) == 0
    for name, value in model.named_parameters():
        assert relative_error(value, written[name]) <= SAME_MATHS, name


@pytest.mark.parametrize("start", [0.0, 0.1])
def test_the_diagonal_of_prodial_trains_only_from_a_positive_start(start: float) -> None:
    """ReLU has the gradient 0 at 0: as published, a block per channel leaves P where it is."""
    for blocks in (64, 8):
        model = adapt(VisionMamba(**SIZES), ProDiaL(["out_proj"], blocks=blocks, diagonal_start=start))
        two_steps(model)
        gradient = model.get_parameter("adapter.0.out_proj.diagonal.p").grad
        assert gradient is not None
        on = torch.eye(64 // blocks, dtype=torch.bool)
        assert (gradient[:, on].count_nonzero() > 0) == (start > 0)
        assert (gradient[:, ~on].count_nonzero() > 0) == (blocks == 8)


def two_steps(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
        optimizer.step()


# --------------------------------------------------------------------------------------------------------- Memba


def membranes(tokens: Tensor, start: Tensor | None, memba: Memba) -> tuple[Tensor, Tensor]:
    """The membrane at every token, and its mean over the chunks, one token at a time."""
    length = tokens.shape[1]
    size = -(-length // memba.chunks)
    out = [torch.zeros_like(tokens[:, 0]) for _ in range(memba.chunks * size)]
    for place in range(memba.chunks * size):
        value = tokens[:, place] if place < length else torch.zeros_like(tokens[:, 0])
        if place >= size:
            value = value + memba.tau * out[place - size]
        elif start is not None:
            value = value + memba.tau * start[:, place]
        out[place] = torch.where(value > memba.threshold, torch.zeros_like(value), value)
    whole = torch.stack(out, dim=1)
    mean = sum(whole[:, i * size : (i + 1) * size] for i in range(memba.chunks)) / memba.chunks
    return whole[:, :length], mean  # type: ignore[return-value]


@pytest.mark.parametrize("place", ["gate", "bypass"])
@pytest.mark.parametrize("hand_over", [True, False])
@pytest.mark.parametrize("chunks", [1, 4, 20])
def test_memba_is_its_formula(place: Any, hand_over: bool, chunks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = Memba(3, 0.7, 0.5, place, chunks, tau=0.8, threshold=0.6, hand_over=hand_over)
    model = adapted(method)
    carried: list[Tensor | None] = [None]

    def mixer(state: State, prefix: str, hidden: Tensor) -> Tensor:
        part = f"adapter.{prefix.split('.')[1]}."
        down, up = state[f"{part}in_proj.down.weight"], state[f"{part}in_proj.up.weight"]
        x, z = (hidden @ state[f"{prefix}in_proj.weight"].T).chunk(2, dim=-1)
        h = hidden @ down.T
        start = carried[0] if hand_over and prefix != "layers.0.mixer." else None
        if place == "gate":
            x, z = x + 0.7 * h @ up[:64].T, z + 0.7 * h @ up[64:].T
            z, carried[0] = membranes(z, start, method)
        else:
            integrated, carried[0] = membranes(h, start, method)
            x, z = x + 0.7 * h @ up[:64].T, z + 0.7 * integrated @ up[64:].T
        zero, no_bias = torch.zeros(64, 4).double(), torch.zeros(64).double()
        y = scan(state, prefix, "", x, zero, zero, no_bias)
        y = y + scan(state, prefix, "_b", x.flip(1), zero, zero, no_bias).flip(1)
        y = y * silu(z) / 2
        low = state[f"{part}out_proj.up.weight"] @ state[f"{part}out_proj.down.weight"]
        return y @ (state[f"{prefix}out_proj.weight"] + 0.7 * low).T

    assert_as_written_out(model, mixer, monkeypatch)


def test_memba_without_reset_and_leak_is_lora() -> None:
    quiet = Memba(rank=3, chunks=1, threshold=1e9, hand_over=False)
    model, plain = adapted(quiet), adapted(LoRA(["in_proj", "out_proj"], rank=3))
    assert torch.equal(plain(images()), model(images()))


@pytest.mark.parametrize("place", ["gate", "bypass"])
def test_the_hand_over_of_memba_stays_in_its_forward_pass(place: Any) -> None:
    """With gradient checkpointing, two passes before one backward pass, copies, and other batch sizes."""
    model = adapted(Memba(rank=3, place=place))
    trained = list(trained_parameters(model).values())
    first, second = images(2), reference_vim.make_images(3, 3, 48, 64) * 0.5

    def loss() -> Tensor:
        return model(first).square().sum() + model(second).sum()

    value = loss()
    gradients = torch.autograd.grad(value, trained)
    model.set_grad_checkpointing()
    again = loss()
    copied = copy.deepcopy(model)
    assert torch.equal(again, value)
    for a, b in zip(torch.autograd.grad(again, trained), gradients, strict=True):
        assert torch.equal(a, b)
    model.set_grad_checkpointing(False)
    assert torch.equal(copied(first), model(first))
    assert copied.points is not model.points
    assert not model.points.carried
    alone = torch.cat([model(first[:1]), model(first[1:])])
    assert relative_error(alone, model(first)) <= SAME_MATHS


# ---------------------------------------------------------------------------------------------------- all of them


@pytest.mark.parametrize(
    ("name", "settings", "count"),
    [
        ("state_offset", {}, 589_824),
        ("state_offset", {"kind": "y"}, 36_864),
        ("state_offset", {"rank": 4}, 2 * 24 * 4 * (768 + 16)),
        ("initial_state", {}, 589_824),
        ("prodial", {"blocks": "channel"}, 663_552),
        ("prodial", {"blocks": 64}, 912_384),
        ("prodial", {"blocks": 32}, 1_188_864),
        ("prodial", {}, 1_188_864),
        ("memba", {}, 4_718_592),
        ("memba", {"place": "bypass"}, 4_718_592),
    ],
    ids=str,
)
def test_counts_on_vim_small(name: str, settings: dict[str, Any], count: int) -> None:
    with torch.device("meta"):
        model = create_model("vim_small_patch16_224", num_classes=10, method=name, **settings)
    assert sum(p.numel() for n, p in trained_parameters(model).items() if n.startswith("adapter.")) == count


@each
@pytest.mark.parametrize("family", ["vim", "mambar"])
def test_identity_and_gradients(method: Method, family: str) -> None:
    sizes = {**SIZES, "depth": 2}
    torch.manual_seed(0)
    model = VisionMamba(**sizes) if family == "vim" else MambaRegister(registers=2, reduction=2, **sizes)
    before = model.eval()(images())
    adapt(model, method)
    assert (relative_error(model(images()), before) <= 1e-6) == method.identity_at_start
    two_steps(model)
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_prodial_on_a_vit() -> None:
    model = create_model("vit_nano_patch8_64", num_classes=2, method="prodial").eval()
    names = {name.split(".")[2] for name in trained_parameters(model) if name.startswith("adapter.")}
    assert names == {"qkv", "proj", "fc1", "fc2"}
    pixels = reference_vim.make_images(2, 3, 64, 64)
    before = model(pixels)
    model(pixels).square().sum().backward()
    with torch.no_grad():
        reference_vim.fill(model)
        found = model(pixels)
        assert relative_error(found, before) > 1e-3
        model.method.merge(model)
        assert relative_error(model(pixels), found) <= 1e-5


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("state_offset", {"kind": "x"}, "state_offset: kind must be one of h, y, not 'x'"),
        ("state_offset", {"rank": 0}, "state_offset: rank must be at least 1, not 0"),
        ("state_offset", {"kind": "y", "rank": 2}, "rank is for kind h"),
        ("prodial", {"targets": ["x_proj"]}, "unknown target of prodial 'x_proj'.*in_proj, out_proj"),
        ("prodial", {"blocks": 65}, "blocks must be at most the 64 input channels of in_proj, not 65"),
        ("prodial", {"diagonal_start": -1.0}, r"prodial: diagonal_start must be in \[0, 1\), not -1"),
        ("memba", {"tau": 1.5}, r"memba: tau must be in \(0, 1\], not 1.5"),
        ("memba", {"place": "z"}, "memba: place must be one of gate, bypass, not 'z'"),
    ],
)
def test_bad_settings(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        create_model("vim_nano_patch8_64", num_classes=2, method=name, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["state_offset", "initial_state", "memba"])
def test_a_backbone_without_a_scan_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} works on the families vim, mambar, not on vit"):
        create_model("vit_nano_patch8_64", num_classes=2, method=name)
