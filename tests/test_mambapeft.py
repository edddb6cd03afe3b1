"""MambaPEFT's methods against written-out code in float64: affixes, parallel adapters, additional states, prompts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference_vim
import torch
from reference_vim import State, one_direction, rms_norm
from tolerances import BACKBONE, SAME_MATHS, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods import create_model
from svp_bench.methods.adapter import ParallelAdapter
from svp_bench.methods.additional_scan import AdditionalScan
from svp_bench.methods.affix import Affix
from svp_bench.methods.base import Method
from svp_bench.methods.build import adapt
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.vpt import VPTShallow
from svp_bench.models import MambaRegister, VisionMamba
from svp_bench.ops import backend_statuses

BACKENDS = [status.name for status in backend_statuses() if status.available]
# (3, 48, 64) images: 12 patches, width 32, inner width 64, rank 2 of Δ
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 2, "d_state": 16, "num_classes": 5}
METHODS: list[Method] = [
    Affix(),
    Affix(2, projection=True),
    ParallelAdapter(dropout=0.0),
    AdditionalScan(),
    AdditionalScan(8, "zero_c"),
    VPTShallow(8, "both", projection=True, init="normal"),
]

Mixer = Callable[[State, int, Tensor], Tensor]


def logits(state: State, images: Tensor, mixer: Mixer) -> Tensor:
    """Vim with another mixer: (state, block, normed tokens) → branch."""
    hidden, cls = reference_vim.embed(state, images, stride=16)
    residual = torch.zeros_like(hidden)
    for i in range(SIZES["depth"]):
        residual = residual + hidden
        hidden = mixer(state, i, rms_norm(residual, state[f"layers.{i}.norm.weight"], 1e-5))
    features = rms_norm(residual + hidden, state["norm_f.weight"], 1e-5)[:, cls]
    return features @ state["head.weight"].T + state["head.bias"]


def with_affixes(state: State, i: int, normed: Tensor) -> Tensor:
    """Two sequences, each with its own tokens in front; the outputs at their positions are dropped."""
    prefix = f"layers.{i}.mixer."
    xz = normed @ state[f"{prefix}in_proj.weight"].T
    if f"adapter.{i}.tokens" in state:
        ahead, back = state[f"adapter.{i}.tokens"]
    else:
        h = state["adapter.shared.tokens"] @ state["adapter.shared.hidden.weight"].T
        h = torch.tanh(h + state["adapter.shared.hidden.bias"])
        both = h @ state[f"adapter.{i}.up.weight"].T + state[f"adapter.{i}.up.bias"]
        ahead, back = both[:, : xz.shape[-1]], both[:, xz.shape[-1] :]
    outputs = []
    for suffix, tokens, sequence in (("", ahead, xz), ("_b", back, xz.flip(1))):
        x, z = torch.cat([tokens.expand(len(xz), -1, -1), sequence], dim=1).chunk(2, dim=-1)
        outputs.append(one_direction(state, prefix, suffix, x, z)[:, len(tokens) :])
    return (outputs[0] + outputs[1].flip(1)) / 2 @ state[f"{prefix}out_proj.weight"].T


def with_parallel_adapters(state: State, i: int, normed: Tensor) -> Tensor:
    prefix, adapter = f"layers.{i}.mixer.", f"adapter.{i}.out_proj."
    x, z = (normed @ state[f"{prefix}in_proj.weight"].T).chunk(2, dim=-1)
    back = one_direction(state, prefix, "_b", x.flip(1), z.flip(1)).flip(1)
    y = (one_direction(state, prefix, "", x, z) + back) / 2
    h = (y @ state[f"{adapter}down.weight"].T).clamp_min(0)
    return y @ state[f"{prefix}out_proj.weight"].T + 0.1 * h @ state[f"{adapter}up.weight"].T


def with_states(state: State, images: Tensor) -> Tensor:
    """A Vim whose tensors have the additional states in front of the old ones."""
    wide = dict(state)
    for i in range(SIZES["depth"]):
        for suffix, name in (("", "forward_scan"), ("_b", "backward_scan")):
            prefix, part = f"layers.{i}.mixer.", f"adapter.{i}.{name}."
            new, old = state[f"{part}A_log"], state[f"{prefix}A{suffix}_log"]
            wide[f"{prefix}A{suffix}_log"] = torch.cat([new, old], dim=1)
            rows, added = state[f"{prefix}x_proj{suffix}.weight"], state[f"{part}x_proj.weight"]
            n = new.shape[1]
            wide[f"{prefix}x_proj{suffix}.weight"] = torch.cat([rows[:2], added[:n], rows[2:18], added[n:], rows[18:]])
    return reference_vim.logits(wide, images, stride=16)


def with_prompts(state: State, images: Tensor) -> Tensor:
    h = torch.tanh(state["adapter.prompts"] @ state["adapter.project.0.weight"].T + state["adapter.project.0.bias"])
    prompts = h @ state["adapter.project.2.weight"].T + state["adapter.project.2.bias"]
    hook = reference_vim.vpt({"adapter.prompts": prompts}, position="both")
    return reference_vim.logits(state, images, stride=16, before_block=hook)


def written_out(method: Method, state: State, images: Tensor) -> Tensor:
    if isinstance(method, Affix):
        return logits(state, images, with_affixes)
    if isinstance(method, ParallelAdapter):
        return logits(state, images, with_parallel_adapters)
    return with_states(state, images) if isinstance(method, AdditionalScan) else with_prompts(state, images)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_it_is_the_written_out_code(method: Method, backend: str) -> None:
    model = adapt(VisionMamba(**SIZES, scan_backend=backend).eval(), method)
    state = reference_vim.fill(model)
    trained = trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    images = reference_vim.make_images(2, 3, 48, 64)
    expected, given = written_out(method, state, images.double()), model(images)
    assert relative_error(given, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(2, 5)
    found = torch.autograd.grad(given, list(trained.values()), cotangent)
    for name, ours, theirs in zip(
        trained, found, torch.autograd.grad(expected, leaves, cotangent.double()), strict=True
    ):
        assert relative_error(ours, theirs) <= BACKBONE.backward, name
        assert ours.any(), name


def test_the_gates_of_affixes_never_get_a_gradient() -> None:
    for method in (Affix(), Affix(projection=True)):
        model = adapt(VisionMamba(**SIZES), method)
        model(reference_vim.make_images(2, 3, 48, 64)).square().sum().backward()
        for name, parameter in trained_parameters(model).items():
            if name.endswith(("tokens", "up.weight", "up.bias")) and "shared" not in name:
                assert parameter.grad is not None
                width = -1 if name.endswith("tokens") else 0
                parts = parameter.grad.chunk(2 if width else 4, dim=width)
                assert [bool(part.any()) for part in parts] == [True, False] * (len(parts) // 2), name


def test_the_additional_states_start_as_documented() -> None:
    plain = VisionMamba(**SIZES).eval()
    reference_vim.fill(plain)
    images = reference_vim.make_images(2, 3, 48, 64)
    expected = plain(images)
    for init, column in (("copy_first", 0), ("zero_c", -1)):
        model = VisionMamba(**SIZES).eval()
        reference_vim.fill(model)
        method = AdditionalScan(6, init)  # type: ignore[arg-type]
        adapt(model, method)
        for i, mixer in enumerate(model.mixers):
            for scan, log in (("forward_scan", mixer.A_log), ("backward_scan", mixer.A_b_log)):
                assert isinstance(log, Tensor)
                new = model.get_parameter(f"adapter.{i}.{scan}.A_log")
                assert torch.equal(new, log[:, column, None].expand(-1, 6))
                rows = model.get_parameter(f"adapter.{i}.{scan}.x_proj.weight")
                assert rows[:6].all()
                assert bool(rows[6:].any()) == (init == "copy_first")
        assert method.identity_at_start == (init == "zero_c")
        assert (relative_error(model(images), expected) <= SAME_MATHS) == method.identity_at_start
    assert not AdditionalScan().decays("adapter.0.forward_scan.A_log")
    assert AdditionalScan().decays("adapter.0.forward_scan.x_proj.weight")


def test_prompts_of_mambapeft_start_as_an_embedding_does() -> None:
    prompts = adapt(VisionMamba(**SIZES), VPTShallow(50, init="normal")).get_parameter("adapter.prompts")
    assert 0.9 < prompts.std() < 1.1
    torch.manual_seed(0)
    old = adapt(VisionMamba(**SIZES), VPTShallow(50)).get_parameter("adapter.prompts")
    torch.manual_seed(0)
    new = adapt(VisionMamba(**SIZES), VPTShallow(50, init="uniform")).get_parameter("adapter.prompts")
    assert torch.equal(old, new)
    assert old.abs().max() < 0.1


def test_the_order_of_the_methods_of_a_hybrid_does_not_matter() -> None:
    """Rows of LoRA are those of the frozen weight, and its tokens those of the image, whichever attaches first."""
    settings: dict[str, Any] = {"lora": {"targets": ["in_proj", "X", "B", "C", "out_proj"], "rank": 3, "dropout": 0.0}}
    settings |= {"affix": {}, "additional_scan": {}, "parallel_adapter": {"dropout": 0.0}}
    found = []
    for names in (list(settings), list(reversed(settings))):
        model = create_model("vim_nano_patch8_64", num_classes=3, method=names, **settings).eval()
        reference_vim.fill(model)
        found.append(model(reference_vim.make_images(2, 3, 64, 64)))
    assert relative_error(*found) <= SAME_MATHS


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_gradient_checkpointing_changes_nothing(method: Method) -> None:
    model = adapt(VisionMamba(**SIZES, scan_backend="reference"), method)
    reference_vim.fill(model)
    images, grads = reference_vim.make_images(2, 3, 48, 64), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        grads.append(torch.autograd.grad(model(images).square().sum(), list(trained_parameters(model).values())))
    for plain, recomputed in zip(*grads, strict=True):
        assert relative_error(recomputed, plain) <= SAME_MATHS


@pytest.mark.parametrize("method", METHODS, ids=repr)
def test_it_trains_on_mamba_reg(method: Method) -> None:
    model = adapt(
        MambaRegister(registers=2, reduction=2, img_size=(48, 64), embed_dim=32, depth=2, num_classes=3), method
    )
    reference_vim.fill(model)
    model(reference_vim.make_images(2, 3, 48, 64)).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in trained_parameters(model).values())


def test_vision_transformers() -> None:
    images = reference_vim.make_images(2, 3, 64, 64)
    for name, arguments in (
        ("parallel_adapter", {"hidden_dim": 5, "dropout": 0.0}),
        ("vpt_shallow", {"projection": True, "init": "normal"}),
    ):
        model = create_model("vit_nano_patch8_64", num_classes=3, method=name, **arguments)  # type: ignore[arg-type]
        reference_vim.fill(model)
        model(images).square().sum().backward()
        assert all(p.grad is not None and p.grad.any() for p in trained_parameters(model).values())
    for name in ("affix", "additional_scan"):
        with pytest.raises(ConfigError, match=f"{name} works on the families vim, mambar, not on vit") as caught:
            create_model("vit_nano_patch8_64", num_classes=3, method=name)
        assert "\n" not in str(caught.value)


def test_a_parallel_adapter_reads_the_input_of_the_projection() -> None:
    """On a ViT too: the output of a sublayer gains s · U relu(D x) for the x that its last projection reads."""
    model = create_model("vit_nano_patch8_64", num_classes=3, method="parallel_adapter").eval()
    reference_vim.fill(model)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    part: Any = model.part(1, "fc2")
    part.register_forward_hook(lambda module, inputs, output: seen.update(fc2=(inputs[0], output)))
    model(reference_vim.make_images(2, 3, 64, 64))
    x, y = seen["fc2"]
    down, up = (model.get_parameter(f"adapter.1.fc2.{name}.weight") for name in ("down", "up"))
    expected = x @ part.weight.T + part.bias + 0.1 * torch.relu(x @ down.T) @ up.T
    assert relative_error(y, expected) <= SAME_MATHS


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("affix", {"length": 0}, "affix: length must be at least 1, not 0"),
        ("parallel_adapter", {"hidden_dim": 0}, "parallel_adapter: hidden_dim must be at least 1, not 0"),
        ("parallel_adapter", {"scale": 0.0}, "parallel_adapter: scale must be above 0"),
        ("parallel_adapter", {"dropout": 1.0}, "parallel_adapter: dropout must be in"),
        ("additional_scan", {"states": 0}, "additional_scan: states must be at least 1, not 0"),
        ("additional_scan", {"init": "zero"}, "additional_scan: init must be one of copy_first, zero_c, not 'zero'"),
        ("vpt_shallow", {"init": "gaussian"}, "vpt: init must be one of None, uniform, normal, not 'gaussian'"),
    ],
)
def test_bad_settings(name: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vim_nano_patch8_64", num_classes=2, method=name, **arguments)
