"""Parts of the backbone that a user or a library replaced or hooked: modules, or an error with the reason."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import reference_vim
import torch
import torch.nn.functional as F
from tolerances import relative_error
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

from svp_bench.core.errors import ConfigError
from svp_bench.methods import METHODS
from svp_bench.methods.base import build_method
from svp_bench.methods.build import adapt
from svp_bench.models import VisionMamba
from svp_bench.models.layers import RMSNorm
from svp_bench.models.vim import DropPath, Mixer

LINEARS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
PARTS = (*LINEARS, "conv1d", "conv1d_b")


def backbone(**arguments: Any) -> VisionMamba:
    sizes: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
    model = VisionMamba(**{**sizes, **arguments}).eval()
    reference_vim.fill(model)
    return model


def images(count: int = 2) -> Tensor:
    return reference_vim.make_images(count, 3, 48, 64)


def expected(model: VisionMamba, changed: dict[str, Tensor]) -> Tensor:
    """Logits of the plain reference implementation with some tensors of the model replaced."""
    state = {name: value.double() for name, value in model.state_dict().items()} | changed
    return reference_vim.logits(state, images().double(), stride=16)


class Wrapper(nn.Module):
    """What a PEFT library puts in place of a projection: the old module and a low-rank update."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)
        with torch.no_grad():
            self.down.weight.copy_(reference_vim.sample("down", self.down.weight.shape))
            self.up.weight.copy_(0.3 * reference_vim.sample("up", self.up.weight.shape))

    @property
    def weight(self) -> Tensor:  # as peft's layers have one
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x) + self.up(self.down(x))
        return out


class LoRALinear(nn.Linear):
    """A subclass that adds to its own output."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.extra = nn.Parameter(reference_vim.sample("extra", (base.out_features,)))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.extra


@pytest.mark.parametrize("name", LINEARS)
@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_a_wrapped_projection_runs(name: str, grad_checkpointing: bool) -> None:
    model = backbone()
    old = model.mixers[1].get_submodule(name)
    assert isinstance(old, nn.Linear)
    wrapped = Wrapper(old)
    setattr(model.mixers[1], name, wrapped)
    model.set_grad_checkpointing(grad_checkpointing)
    given = model(images())
    given.sum().backward()
    assert wrapped.up.weight.grad is not None
    assert wrapped.down.weight.grad is not None
    assert wrapped.up.weight.grad.count_nonzero() > 0
    assert wrapped.down.weight.grad.count_nonzero() > 0
    with torch.no_grad():  # merged, on a plain model
        merged = backbone()
        merged.get_parameter(f"layers.1.mixer.{name}.weight").add_(wrapped.up.weight @ wrapped.down.weight)
        assert relative_error(given, merged(images())) <= 1e-5
        assert relative_error(given, backbone()(images())) > 1e-3


@pytest.mark.parametrize("grad_checkpointing", [False, True])
def test_gradients_are_the_same_whether_parts_are_plain_or_not(grad_checkpointing: bool) -> None:
    gradients = []
    for wrapped in (False, True):
        model = backbone()
        named = dict(model.named_parameters())
        for mixer in model.mixers if wrapped else []:
            for name in PARTS:
                setattr(mixer, name, nn.Sequential(mixer.get_submodule(name)))
        for block in model.layers if wrapped else []:
            block.norm.register_forward_hook(lambda *_: None)  # type: ignore[union-attr]
        model.set_grad_checkpointing(grad_checkpointing)
        (model(images()) * reference_vim.make_images(2, 5)).sum().backward()
        gradients.append({name: p.grad for name, p in named.items()})
    for name, gradient in gradients[0].items():
        assert gradient is not None
        assert relative_error(gradients[1][name], gradient) <= 1e-4, name


@pytest.mark.parametrize("name", LINEARS)
def test_a_subclass_of_linear_runs(name: str) -> None:
    model = backbone()
    new = LoRALinear(model.mixers[0].get_submodule(name))  # type: ignore[arg-type]
    setattr(model.mixers[0], name, new)
    given = model(images())
    (gradient,) = torch.autograd.grad(given.sum(), new.extra)
    assert gradient.count_nonzero() > 0
    assert relative_error(given, backbone()(images())) > 1e-4


@pytest.mark.parametrize("name", LINEARS)
def test_a_plain_linear_with_another_bias_is_read_whole(name: str) -> None:
    """A new nn.Linear with a bias where the backbone has none, and without one where it has one."""
    model = backbone()
    old = model.mixers[0].get_submodule(name)
    assert isinstance(old, nn.Linear)
    new = nn.Linear(old.in_features, old.out_features, bias=old.bias is None)
    bias = 0.3 * reference_vim.sample("b", (old.out_features,)) if old.bias is None else None
    with torch.no_grad():
        new.weight.copy_(old.weight)
        if bias is not None:
            new.bias.copy_(bias)
    setattr(model.mixers[0], name, new)
    reference = backbone()
    setattr(reference.mixers[0], name, nn.Sequential(new))
    assert relative_error(model(images()), reference(images())) <= 1e-5
    assert relative_error(model(images()), backbone()(images())) > 1e-4


@pytest.mark.parametrize("name", PARTS)
@pytest.mark.parametrize("how", ["prune", "parametrization", "weight_norm", "old weight_norm", "spectral_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_changed_weights_are_those_of_the_reference(name: str, how: str) -> None:
    model = backbone()
    part = model.mixers[1].get_submodule(name)
    if how == "prune":
        prune.l1_unstructured(part, "weight", 0.5)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            part.weight_orig.mul_(1.5)  # type: ignore[union-attr,operator]  # the pre-hook must see it
    elif how == "parametrization":

        class Double(nn.Module):
            def forward(self, weight: Tensor) -> Tensor:
                return 2 * weight

        nn.utils.parametrize.register_parametrization(part, "weight", Double())
    elif how == "weight_norm":
        parametrizations.weight_norm(part)
        with torch.no_grad():
            part.parametrizations.weight.original0.mul_(1.5)  # type: ignore[union-attr]
    elif how == "old weight_norm":
        nn.utils.weight_norm(part)
        with torch.no_grad():
            part.weight_g.mul_(1.5)  # type: ignore[union-attr,operator]
    else:
        parametrizations.spectral_norm(part)
    given = model(images())
    weight = part.weight
    assert isinstance(weight, Tensor)
    clean = backbone()
    assert relative_error(given, clean(images())) > 1e-4
    assert relative_error(given, expected(clean, {f"layers.1.mixer.{name}.weight": weight.double()})) <= 2e-5


def test_a_parametrized_state_matrix_is_read() -> None:
    class Half(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return 0.5 * value

    model = backbone()
    for name in ("A_log", "D_b"):
        nn.utils.parametrize.register_parametrization(model.mixers[1], name, Half())
    clean = backbone()
    halved = {f"layers.1.mixer.{n}": clean.get_parameter(f"layers.1.mixer.{n}").double() / 2 for n in ("A_log", "D_b")}
    assert relative_error(model(images()), expected(clean, halved)) <= 2e-5


HOOKED = (
    *(f"layers.1.mixer.{name}" for name in PARTS),
    *("layers.1.norm", "layers.1.mixer", "layers.1.drop_path", "layers.1", "norm_f", "drop_path", "head"),
    *("patch_embed", "patch_embed.proj", "head_drop"),
)


@pytest.mark.parametrize("name", HOOKED)
def test_hooks_of_every_part_fire(name: str) -> None:
    model = backbone()
    clean = model(images())
    part, fired = model.get_submodule(name), []
    part.register_forward_pre_hook(lambda *_: fired.append("pre"))  # type: ignore[func-returns-value]
    part.register_forward_hook(lambda *_: fired.append("forward"))  # type: ignore[func-returns-value]
    part.register_full_backward_pre_hook(lambda *_: fired.append("backward pre"))  # type: ignore[func-returns-value]
    part.register_full_backward_hook(lambda *_: fired.append("backward"))  # type: ignore[func-returns-value]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no input of some parts needs a gradient
        given = model(images())
        given.sum().backward()
    assert set(fired) == {"pre", "forward", "backward pre", "backward"}
    assert relative_error(given, clean) <= 1e-5


@pytest.mark.parametrize("name", [n for n in HOOKED if n != "layers.1"])
def test_a_hook_that_changes_an_output_changes_the_logits(name: str) -> None:
    model = backbone()
    clean = model(images())
    handle = model.get_submodule(name).register_forward_hook(lambda _module, _inputs, y: y * 1.5 + 0.1)
    assert relative_error(model(images()), clean) > 1e-4
    handle.remove()
    assert torch.equal(model(images()), clean)


def test_global_hooks_see_every_part() -> None:
    model, seen = backbone(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(module))  # type: ignore[arg-type]
    try:
        model(images(1))
    finally:
        handle.remove()
    idle = {model.layers[0].drop_path, model.points}  # block 0 has no branch before it
    leaves = {m for m in model.modules() if not list(m.children())}
    assert leaves - seen <= idle


@pytest.mark.parametrize("name", PARTS)
def test_a_forward_set_on_an_instance_runs(name: str) -> None:
    """As accelerate's hooks do."""
    model, called = backbone(), []
    part = model.mixers[0].get_submodule(name)
    old = part.forward
    part.forward = lambda x: called.append(1) or 2 * old(x)  # type: ignore[method-assign,func-returns-value]
    assert relative_error(model(images()), backbone()(images())) > 1e-4
    assert called


def test_the_bias_of_a_replaced_dt_proj_is_added_once() -> None:
    model = backbone()
    for name in ("dt_proj", "dt_proj_b"):
        setattr(model.mixers[0], name, nn.Sequential(model.mixers[0].get_submodule(name)))
    assert relative_error(model(images()), backbone()(images())) <= 1e-5


def test_a_linear_hook_of_dt_proj_gets_the_bias_whether_it_is_plain_or_not() -> None:
    outputs = []
    for wrapped in (False, True):
        model = backbone()
        if wrapped:
            model.mixers[0].dt_proj = nn.Sequential(model.mixers[0].dt_proj)  # type: ignore[assignment]
        model.points.on_linear(0, "dt_proj", lambda _, y: 1.5 * y)
        outputs.append(model(images()))
    assert relative_error(outputs[0], outputs[1]) <= 1e-5
    assert relative_error(outputs[0], backbone()(images())) > 1e-4


def test_what_a_hook_recorded_is_not_changed_in_place() -> None:
    model = adapt(backbone(), build_method(METHODS.get("lora"), "lora", {"targets": ["in_proj"], "dropout": 0.0}))
    seen: list[Tensor] = []
    part = model.mixers[0].in_proj
    part.register_forward_hook(lambda _module, inputs, y: seen.extend([inputs[0], y]))
    with torch.no_grad():
        for parameter in model.adapter.parameters():  # type: ignore[union-attr]
            parameter.fill_(0.1)
    model(images())
    assert torch.equal(seen[1], F.linear(seen[0], part.weight))


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"dilation": 2, "padding": 6}, False),
        ({"padding": "same"}, False),
        ({"padding_mode": "circular"}, False),
        ({"bias": False}, False),
        ({}, True),
    ],
    ids=str,
)
def test_a_convolution_of_another_kind_is_called(change: dict[str, Any], same: bool) -> None:
    model = backbone()
    old = model.mixers[1].conv1d
    settings: dict[str, Any] = {"groups": old.groups, "padding": 3, **change}
    new = nn.Conv1d(old.in_channels, old.out_channels, 4, **settings)
    with torch.no_grad():
        new.weight.copy_(old.weight)
        if new.bias is not None and old.bias is not None:
            new.bias.copy_(old.bias)
    model.mixers[1].conv1d = new
    reference = backbone()
    reference.mixers[1].conv1d = nn.Sequential(new)  # type: ignore[assignment]
    assert relative_error(model(images()), reference(images())) <= 1e-5
    assert (relative_error(model(images()), backbone()(images())) <= 1e-6) == same


def test_a_dense_convolution_and_another_width_run() -> None:
    model = backbone()
    inner = model.mixers[0].conv1d.in_channels
    model.mixers[0].conv1d = nn.Conv1d(inner, inner, 3, padding=2)
    model.mixers[1].conv1d_b = nn.Conv1d(inner, inner, 2, groups=inner, padding=1)
    assert model(images()).isfinite().all()


def test_a_convolution_that_gives_too_few_steps_is_refused() -> None:
    model = backbone()
    inner = model.mixers[0].conv1d.in_channels
    model.mixers[1].conv1d = nn.Conv1d(inner, inner, 4, groups=inner)
    with pytest.raises(ConfigError, match=r"layers\.1\.mixer\.conv1d.*10 steps for 13.*kernel_size - 1"):
        model(images())


@pytest.mark.parametrize("make", [nn.LayerNorm, nn.RMSNorm, lambda width: nn.Sequential(RMSNorm(width))])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_norm_is_called(make: Callable[[int], nn.Module], dtype: torch.dtype) -> None:
    model = backbone()
    torch.manual_seed(0)
    for owner, name in ((model.layers[1], "norm"), (model, "norm_f")):
        setattr(owner, name, make(32))
    seen = []
    model.norm_f.register_forward_hook(lambda _module, inputs, y: seen.append((inputs[0], y)))
    logits = model.to(dtype)(images().to(dtype))
    assert logits.dtype == dtype
    assert relative_error(logits, model.head(seen[0][1][:, 6].to(dtype))) <= 1e-6


def test_another_drop_path_is_called() -> None:
    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    class Loud(DropPath):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    clean = backbone()(images())
    outputs = []
    for new in (Twice(), Loud(0.1)):
        model = backbone()
        model.layers[1].drop_path = new
        outputs.append(model(images()))
    assert torch.equal(outputs[0], outputs[1])
    assert relative_error(outputs[0], clean) > 1e-3


def test_wrapped_blocks_and_mixers_keep_their_place() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = backbone()
    mixers = model.mixers
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    model.layers[1].mixer = nn.Sequential(model.layers[1].mixer)
    assert model.mixers == mixers
    model.set_scan_backend("reference")
    assert {mixer.scan_backend for mixer in mixers} == {"reference"}
    assert relative_error(model(images()), backbone()(images())) <= 1e-5
    adapt(model, build_method(METHODS.get("lora"), "lora", {}))
    model(images()).sum().backward()
    assert all(p.grad is not None for p in model.adapter.parameters())  # type: ignore[union-attr]


def test_a_block_without_a_mixer_is_named() -> None:
    model = backbone()
    model.layers[1] = nn.Identity()
    with pytest.raises(ConfigError, match=r"layers\.1, a Identity, holds 0 Mixer"):
        adapt(model, build_method(METHODS.get("linear"), "linear", {}))


# --------------------------------------------------------------------------------- methods with replaced parts


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [
        ("lora", {"targets": ["x_proj"]}, "x_proj_b"),
        ("lora", {"targets": ["dt_proj"]}, "dt_proj"),
        ("bias", {"which": ["dt_proj"]}, "dt_proj_b"),
        ("bias", {"which": ["conv1d"]}, "conv1d"),
    ],
)
def test_a_hook_that_would_not_fire_is_refused(name: str, settings: dict[str, Any], part: str) -> None:
    for late in (False, True)[: 1 if name == "bias" else 2]:  # a bias that trains is read inside the wrapper too
        model, made = backbone(), build_method(METHODS.get(name), name, settings)
        if late:
            adapt(model, made)
        setattr(model.mixers[1], part, nn.Sequential(model.mixers[1].get_submodule(part)))
        with pytest.raises(ConfigError, match=rf"{part}.*was replaced by a Sequential.*merge_and_unload"):
            model(images()) if late else adapt(model, made)
        if not late:
            assert model.adapter is None
            assert len(model.points) == 0


@pytest.mark.parametrize("name", [name for name in METHODS.names() if name != "prodial"])  # it changes these weights
def test_every_method_runs_with_a_hooked_or_pruned_projection(name: str) -> None:
    """The same logits as without the hook; a mask is in what is computed; the trained part gets its gradient."""
    model = adapt(backbone(), build_method(METHODS.get(name), name, {})).train()
    torch.manual_seed(0)
    expected_logits = model.eval()(images())
    model.mixers[0].in_proj.register_forward_hook(lambda *_: None)
    assert relative_error(model(images()), expected_logits) <= 1e-5
    prune.l1_unstructured(model.mixers[1].out_proj, "weight", 0.5)  # type: ignore[no-untyped-call]
    given = model(images())
    assert relative_error(given, expected_logits) > 1e-4
    given.sum().backward()
    assert all(p.grad is not None for n, p in model.named_parameters() if p.requires_grad and "head" not in n)


def test_a_method_does_not_silently_freeze_what_was_put_in_before() -> None:
    model = backbone()
    model.mixers[0].in_proj = Wrapper(model.mixers[0].in_proj)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"Linear would freeze layers\.0\.mixer\.in_proj\..*attach the method first"):
        adapt(model, build_method(METHODS.get("linear"), "linear", {}))
    pruned = backbone()  # nothing new is trained there
    prune.l1_unstructured(pruned.mixers[0].in_proj, "weight", 0.5)  # type: ignore[no-untyped-call]
    parametrizations.weight_norm(pruned.mixers[1].out_proj)
    adapt(pruned, build_method(METHODS.get("linear"), "linear", {}))
    assert {n for n, p in pruned.named_parameters() if p.requires_grad} == {"head.weight", "head.bias"}


def test_merging_into_a_replaced_part_is_refused() -> None:
    model = adapt(backbone(), build_method(METHODS.get("lora"), "lora", {"targets": ["X"]}))
    module = model.mixers[0].in_proj
    module.register_forward_hook(lambda *_: None)
    with pytest.raises(ConfigError, match="with hooks"):
        model.method.merge(model)
    model.mixers[0].in_proj = nn.Sequential(module)  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="was replaced by a Sequential"):
        model.method.merge(model)
    assert model.adapter is not None


# ---------------------------------------------------------------------------------------- libraries


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", [None, "svp", "lora", "adapter"])
def test_dynamic_quantisation_runs(method: str | None) -> None:
    model = backbone(num_classes=5)
    if method is not None:
        settings: dict[str, Any] = {"targets": ["in_proj"], "dropout": 0.0} if method == "lora" else {}
        adapt(model, build_method(METHODS.get(method), method, settings))
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised kernels for this processor")
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with torch.no_grad():
        assert 1e-6 < relative_error(quantised(images()), model(images())) < 0.2


@pytest.mark.filterwarnings("ignore")
def test_weights_of_whole_numbers_are_frozen_or_refused() -> None:
    """As bitsandbytes has them: a subclass of nn.Linear with an int8 parameter."""

    class Int8(nn.Linear):
        def __init__(self, base: nn.Linear) -> None:
            super().__init__(base.in_features, base.out_features, bias=False)
            self.scale = base.weight.detach().abs().max() / 127
            self.weight = nn.Parameter((base.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * self.scale)

    for name in ("svp", "full"):
        model = backbone()
        model.mixers[1].in_proj = Int8(model.mixers[1].in_proj)  # type: ignore[arg-type]
        method = build_method(METHODS.get(name), name, {})
        if name == "full":
            with pytest.raises(ConfigError, match=r"trains layers\.1\.mixer\.in_proj\.weight, which is quantised"):
                adapt(model, method)
        else:
            assert relative_error(adapt(model, method)(images()), backbone()(images())) < 0.1


def test_a_lora_on_weights_cannot_be_quantised() -> None:
    if torch.backends.quantized.engine == "none":
        pytest.skip("this torch has no quantised kernels for this processor")
    model = adapt(backbone(), build_method(METHODS.get("lora"), "lora", {"targets": ["x_proj"]}))
    quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(ConfigError, match=r"x_proj.*was replaced by a Linear"), torch.no_grad():
        quantised(images())


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_peft(name: str) -> None:
    peft = pytest.importorskip("peft")
    model = backbone()
    clean = model(images())
    config = peft.LoraConfig(target_modules=[name], r=2, lora_alpha=4, init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    wrapped.eval()
    given = wrapped(images())
    assert relative_error(given, clean) > 1e-4
    given.sum().backward()
    trained = {n: p for n, p in wrapped.named_parameters() if p.requires_grad}
    assert trained
    assert all(p.grad is not None and p.grad.count_nonzero() for p in trained.values())
    with wrapped.disable_adapter():
        assert relative_error(wrapped(images()), clean) <= 1e-5
    merged = wrapped.merge_and_unload()
    assert relative_error(merged(images()), given) <= 1e-5
    assert isinstance(merged.layers[0].mixer, Mixer)


@pytest.mark.slow
def test_compiled_with_replaced_parts() -> None:
    model = backbone(scan_backend="reference")
    model.mixers[0].in_proj = Wrapper(model.mixers[0].in_proj)  # type: ignore[assignment]
    prune.l1_unstructured(model.mixers[1].x_proj, "weight", 0.5)  # type: ignore[no-untyped-call]
    model.layers[2].norm = nn.LayerNorm(32)
    with torch.no_grad():
        assert relative_error(torch.compile(model, backend="aot_eager")(images()), model(images())) <= 1e-5
