"""Methods of a user's own: copies of the model are independent, promises are checked when the method is attached."""

from __future__ import annotations

import collections
import copy
import functools
import pickle
import re
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import reference_vim
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.utils import ModelEmaV3
from tolerances import relative_error
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from svp_bench.core.errors import ConfigError
from svp_bench.methods import METHODS
from svp_bench.methods.base import Method, build_method
from svp_bench.methods.build import adapt
from svp_bench.models import TokenState, VisionMamba

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")
COPIES: dict[str, Callable[[VisionMamba], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "AveragedModel": lambda model: AveragedModel(model),
    "ModelEmaV3": lambda model: ModelEmaV3(model),
}


def backbone(**arguments: Any) -> VisionMamba:
    sizes: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
    model = VisionMamba(**{**sizes, **arguments}).eval()
    reference_vim.fill(model)
    return model


def images() -> Tensor:
    return reference_vim.make_images(2, 3, 48, 64)


def readme_method() -> type[Method]:
    """The class of the README's `mine.py`, whose module can be imported (pickle needs that)."""
    (text,) = re.findall(r"```python\n(# mine\.py\n.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {"__name__": __name__}
    exec(text, names)
    for name in ("Shift", "ShiftAdapter"):
        globals()[name] = names[name]
    shift: type[Method] = names["Shift"]
    return shift


class Adding(Method):
    """A vector added before each block, registered by `how`."""

    identity_at_start = True

    def __init__(self, how: str = "lambda") -> None:
        self.how = how

    def attach(self, model: VisionMamba) -> None:
        adapter = model.adapter = nn.ParameterDict({"shift": nn.Parameter(torch.zeros(model.embed_dim))})

        def inner(state: TokenState) -> TokenState:
            return state._replace(hidden=state.hidden + adapter["shift"])

        def default(_: int, state: TokenState, adapter: nn.ParameterDict = adapter) -> TokenState:
            return state._replace(hidden=state.hidden + adapter["shift"])

        def parameters(layer: int, state: TokenState) -> TokenState:
            return state._replace(hidden=state.hidden + shifts[layer])

        shifts = [adapter["shift"]] * 3
        hooks: dict[str, Callable[[int, TokenState], TokenState]] = {
            "lambda": lambda _, state: state._replace(hidden=state.hidden + model.adapter["shift"]),  # type: ignore[index]
            "nested": lambda _, state: inner(state),
            "default": default,
            "partial": functools.partial(_add, adapter),
            "parameters": parameters,
            "method": self.add,
        }
        self.adapter = adapter
        model.points.on_tokens(hooks[self.how])

    def add(self, _: int, state: TokenState) -> TokenState:
        return state._replace(hidden=state.hidden + self.adapter["shift"])

    def adapter_parameters(self, model: VisionMamba) -> int:
        return model.embed_dim


def _add(adapter: nn.ParameterDict, _: int, state: TokenState) -> TokenState:
    return state._replace(hidden=state.hidden + adapter["shift"])


def assert_independent(model: VisionMamba, make: Callable[[VisionMamba], nn.Module]) -> None:
    """A copy computes what the original does; after a change of either, the other stays as it is."""
    with torch.no_grad():
        before = model(images())
        copied = make(model).eval()
        inside = {name.removeprefix("module."): p for name, p in copied.named_parameters()}
        assert torch.equal(copied(images()), before)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not name.startswith("head."):
                parameter.copy_(reference_vim.sample(name, parameter.shape) + 0.1)
        changed = model(images())
        assert relative_error(changed, before) > 1e-4
        assert torch.equal(copied(images()), before)
        for name, parameter in model.named_parameters():
            inside[name].copy_(parameter)
        assert torch.equal(copied(images()), changed)
    loss = copied(images()).sum()
    if loss.requires_grad:  # an EMA is frozen
        loss.backward()
        trained = [n for n, p in model.named_parameters() if p.requires_grad]
        assert all(inside[n].grad is not None for n in trained)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [n for n in METHODS.names() if n not in ("linear", "full")])
def test_copies_of_every_method_are_independent(name: str, how: str) -> None:
    assert_independent(adapt(backbone(), build_method(METHODS.get(name), name, {})), COPIES[how])


@pytest.mark.parametrize("how", COPIES)
def test_copies_of_the_readmes_method_are_independent(how: str) -> None:
    assert_independent(adapt(backbone(), readme_method()()), COPIES[how])


@pytest.mark.parametrize("hook", ["lambda", "nested", "default", "partial", "parameters", "method"])
@pytest.mark.parametrize("how", ["deepcopy", "AveragedModel", "ModelEmaV3"])
def test_copies_of_a_method_with_closures_are_independent(hook: str, how: str) -> None:
    assert_independent(adapt(backbone(), Adding(hook)), COPIES[how])


def test_a_copy_of_a_copy_and_a_recursive_hook() -> None:
    def countdown(layer: int, state: TokenState) -> TokenState:
        return state if layer < 0 else countdown(layer - 1, state._replace(hidden=state.hidden + model.cls_token))

    model = backbone()
    model.points.on_tokens(countdown)
    with torch.no_grad():
        twice = copy.deepcopy(copy.deepcopy(model))
        assert torch.equal(twice(images()), model(images()))
        model.cls_token.add_(1)
        assert not torch.equal(twice(images()), model(images()))


def test_what_a_hook_records_is_shared_with_nobody() -> None:
    """A closure over a list of graph tensors, which cannot be copied, does not stop a copy."""
    model, seen = backbone(), []
    model.points.on_tokens(lambda _, state: seen.append(state) or state)  # type: ignore[func-returns-value]
    model(images())
    copied = copy.deepcopy(model)
    copied(images())
    assert len(seen) == 3


class Holder:
    """Where hooks of `Elsewhere` find the adapter, which no deep copy follows."""

    held: ClassVar[dict[str, Any]] = {}


class Elsewhere(Adding):
    """As `Adding`, with hooks that reach the adapter by ways that no copy can change."""

    def attach(self, model: VisionMamba) -> None:
        how, self.how = self.how, "lambda"
        super().attach(model)
        model.points.tokens.clear()
        Holder.held = {"adapter": self.adapter}
        adapter = self.adapter

        def attribute(_: int, state: TokenState) -> TokenState:
            return _add(attribute.adapter, _, state)  # type: ignore[attr-defined]

        attribute.adapter = adapter  # type: ignore[attr-defined]
        reference = weakref.ref(adapter)
        cached = functools.cache(lambda: adapter)
        deep = collections.deque([lambda: adapter])

        def on_block(_: nn.Module, __: Any, state: TokenState) -> TokenState:
            return _add(adapter, 0, state)

        hooks: dict[str, Callable[[int, TokenState], TokenState]] = {
            "class": lambda _, state: _add(Holder.held["adapter"], _, state),
            "attribute": attribute,
            "weakref": lambda _, state: _add(reference(), _, state),  # type: ignore[arg-type]
            "cache": lambda _, state: _add(cached(), _, state),
            "deque": lambda _, state: _add(deep[0](), _, state),
        }
        if how == "block":
            model.layers[0].register_forward_hook(on_block)
        else:
            model.points.on_tokens(hooks[how])


@pytest.mark.parametrize("how", ["class", "attribute", "weakref", "cache", "deque", "block"])
def test_a_method_whose_copies_would_use_the_original_is_refused(how: str) -> None:
    with pytest.raises(ConfigError, match=r"deep copy of the model still uses adapter\.shift of the original"):
        adapt(backbone(), Elsewhere(how))


# ------------------------------------------------------------------------------------------ promises, at attach


class Scaling(Method):
    """The whole block input times a trained vector; `start` is its first value."""

    identity_at_start = True

    def __init__(self, start: float = 1.0, whole: bool = True) -> None:
        self.start = start
        self.whole = whole

    def attach(self, model: VisionMamba) -> None:
        model.adapter = ScalingAdapter(model.embed_dim, self.start, self.whole)
        model.points.on_tokens(model.adapter.scale)

    def adapter_parameters(self, model: VisionMamba) -> int:
        return model.embed_dim


class ScalingAdapter(nn.Module):
    def __init__(self, width: int, start: float, whole: bool) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.full((width,), start))
        self.whole = whole

    def scale(self, _: int, state: TokenState) -> TokenState:
        if self.whole:
            return state.with_stream(self.factor * state.stream)
        return state._replace(hidden=self.factor * state.hidden)


def test_a_scaling_method_changes_what_the_block_reads() -> None:
    seen: list[Tensor] = []
    model = adapt(backbone(), Scaling())
    clean = model(images())
    assert relative_error(clean, backbone()(images())) <= 1e-5
    model.layers[1].mixer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(images())
        model.adapter.factor.copy_(torch.linspace(0.5, 2, 32))  # type: ignore[union-attr,operator]
        streams: list[Tensor] = []
        model.points.on_tokens(lambda layer, state: streams.append(state.stream) or state)  # type: ignore[func-returns-value]
        model(images())
    norm = model.layers[1].norm
    assert isinstance(norm, nn.Module)
    assert relative_error(seen[1], norm(streams[1])) <= 1e-5
    assert relative_error(seen[1], seen[0]) > 1e-2


@settings(max_examples=20, deadline=None)
@given(residual=st.booleans(), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]))
def test_with_stream_is_the_inverse_of_stream(residual: bool, dtype: torch.dtype) -> None:
    hidden = torch.linspace(-1, 1, 24).view(1, 3, 8).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    state = TokenState(hidden, 2 * hidden.to(wide) if residual else None, (1,))
    assert state.stream.dtype == wide
    again = state.with_stream(state.stream)
    assert again.hidden.dtype == dtype
    assert relative_error(again.hidden, hidden) <= 1e-6


@pytest.mark.parametrize("start", [0.99, 1.5, float("nan")])
def test_identity_at_start_is_checked(start: float) -> None:
    model = backbone()
    with pytest.raises(ConfigError, match=r"Scaling: identity_at_start is declared.*change by .*1e-06|0.0001"):
        adapt(model, Scaling(start, whole=False))
    assert model.adapter is None
    assert len(model.points) == 0
    assert all(p.requires_grad for p in model.parameters())
    adapt(model, Scaling(1.0, whole=False))


def test_a_method_that_claims_no_identity_is_free() -> None:
    class Free(Scaling):
        identity_at_start = False

    adapt(backbone(), Free(1.5))


def test_identity_must_be_declared() -> None:
    class Silent(Adding):
        identity_at_start = None  # type: ignore[assignment]

    with pytest.raises(ConfigError, match="Silent must declare identity_at_start"):
        adapt(backbone(), Silent())


def test_the_check_leaves_no_trace() -> None:
    model = backbone(drop_rate=0.5, drop_path_rate=0.5).train()
    model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    torch.manual_seed(7)
    adapt(model, Adding())
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
    assert {name: module.training for name, module in model.named_modules() if name in modes} == modes
    assert model.scan_backend == model.points.scan_backend == model.mixers[0].scan_backend == "auto"
    with torch.device("meta"):
        empty = VisionMamba(img_size=32, embed_dim=16, depth=2, num_classes=3)
    adapt(empty, Adding())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_check_in_other_precisions(dtype: torch.dtype) -> None:
    adapt(backbone().to(dtype), Adding())
    with pytest.raises(ConfigError, match="identity_at_start"):
        adapt(backbone().to(dtype), Scaling(1.5, whole=False))


def test_a_refused_count_leaves_the_model_free() -> None:
    class Wrong(Adding):
        def adapter_parameters(self, model: VisionMamba) -> int:
            return 1

    model = backbone()
    with pytest.raises(ConfigError, match=r"adapter_parameters\(\) returns 1, and 32"):
        adapt(model, Wrong())
    assert model.adapter is None
    assert len(model.points) == 0
    adapt(model, Adding())


def test_a_hook_of_a_module_outside_of_the_model_is_refused() -> None:
    class Lost(Scaling):
        def attach(self, model: VisionMamba) -> None:
            model.points.on_tokens(ScalingAdapter(model.embed_dim, 1.0, True).scale)

        def adapter_parameters(self, model: VisionMamba) -> int:
            return 0

    with pytest.raises(ConfigError, match=r"Lost: a hook belongs to a ScalingAdapter that is not in the model"):
        adapt(backbone(), Lost())
