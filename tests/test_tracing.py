"""torch.export and torch.jit.trace with the scan backend `auto`: a graph for any batch size, with the same logits."""

from __future__ import annotations

import io
from typing import Any

import pytest
import reference_vim
import torch
from tolerances import relative_error
from torch import Tensor

from svp_bench.core.errors import UnavailableError
from svp_bench.methods import METHODS
from svp_bench.methods.base import build_method
from svp_bench.methods.build import adapt, create_model
from svp_bench.models import VisionMamba
from svp_bench.ops import Direction, bidirectional_conv, bidirectional_scan, traceable

ANY_BATCH: Any = ({0: torch.export.Dim("batch", min=1, max=64)},)
CASES: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in METHODS.names()),
    ("svp", {"variant": "released", "share_layers": 2}),
    ("lora", {"targets": ["embed", "in_proj", "B", "dt_proj", "out_proj"]}),
    ("vpt_deep", {"position": "spread"}),
    ("vpt_shallow", {"position": "both", "projection": True}),
    ("affix", {"projection": True}),
]
pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")


def small(name: str, settings: dict[str, Any], backend: str = "auto") -> VisionMamba:
    """A trained-looking adapted Vim of two blocks."""
    model = VisionMamba(img_size=(32, 48), embed_dim=16, depth=2, d_state=4, num_classes=5, scan_backend=backend).eval()
    adapt(model, build_method(METHODS.get(name), name, settings))
    reference_vim.fill(model)
    return model


def images(count: int) -> Tensor:
    return reference_vim.make_images(count, 3, 32, 48)


def assert_records(recorded: Any, expected: Tensor) -> None:
    for count in (1, 2, 5):
        assert relative_error(recorded(images(5)[:count]), expected[:count]) <= 1e-5


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("name", "settings"), CASES, ids=str)
def test_every_method_is_traced(name: str, settings: dict[str, Any], merged: bool) -> None:
    model = small(name, settings)
    if merged and not model.method.mergeable:  # type: ignore[union-attr]
        pytest.skip(f"{name} does not merge")
    if merged:
        model.method.merge(model)  # type: ignore[union-attr]
    assert_records(torch.jit.trace(model, images(2), check_trace=False), model(images(5)))  # type: ignore[no-untyped-call]


EXPORTED_FAST = ("svp", "lora")  # an export takes seconds; `make test-all` exports every method


@pytest.mark.parametrize(
    ("name", "settings"),
    [case if case[0] in EXPORTED_FAST else pytest.param(*case, marks=pytest.mark.slow) for case in CASES],
    ids=str,
)
def test_every_method_is_exported(name: str, settings: dict[str, Any]) -> None:
    model = small(name, settings)
    program = torch.export.export(model, (images(2),), dynamic_shapes=ANY_BATCH)
    assert_records(program.module(), model(images(5)))


@pytest.mark.parametrize("how", ["trace", "export"])
def test_a_model_with_grad_checkpointing_is_recorded(how: str) -> None:
    model = small("svp", {})
    expected = model(images(5))
    model.set_grad_checkpointing()
    if how == "trace":
        assert_records(torch.jit.trace(model, images(2)), expected)  # type: ignore[no-untyped-call]
    else:
        assert_records(torch.export.export(model, (images(2),), dynamic_shapes=ANY_BATCH).module(), expected)


def test_a_merged_model_is_exported() -> None:
    model = small("lora", {"targets": ["X", "x_proj"]})
    model.method.merge(model)  # type: ignore[union-attr]
    program = torch.export.export(model, (images(2),), dynamic_shapes=ANY_BATCH)
    assert_records(program.module(), model(images(5)))


@pytest.mark.parametrize("backend", ["auto", pytest.param("reference", marks=pytest.mark.slow)])
def test_the_embedded_backbone(backend: str) -> None:
    model = create_model("vim_nano_patch8_64", num_classes=10, method="lora", checkpoint="embedded").eval()
    model.method.merge(model)  # type: ignore[union-attr]
    model.set_scan_backend(backend)
    given = reference_vim.make_images(5, 3, 64, 64)
    expected = model(given).detach()
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, given[:1], check_trace=False), file)  # type: ignore[no-untyped-call]
    file.seek(0)
    loaded = torch.jit.load(file)  # type: ignore[no-untyped-call]
    for count in (1, 5):
        assert relative_error(loaded(given[:count]), expected[:count]) <= 1e-5


def test_a_fixed_batch_and_saved_programs() -> None:
    model, file = small("svp", {}), io.BytesIO()
    torch.export.save(torch.export.export(model, (images(2),)), file)
    file.seek(0)
    assert relative_error(torch.export.load(file).module()(images(2)), model(images(2))) <= 1e-5


def test_a_kernel_that_cannot_be_recorded_is_refused() -> None:
    model = small("linear", {}, "cpu")
    with pytest.raises(UnavailableError, match=r"'cpu'.*cannot record it.*set_scan_backend\('auto'\)"):
        torch.jit.trace(model, images(1), check_trace=False)  # type: ignore[no-untyped-call]
    assert model(images(1)).isfinite().all()


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 13, 17, 66])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_recorded_form_is_the_reference(length: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(length)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    def direction() -> Direction:
        A = (-noise(6, 3).exp()).detach().requires_grad_()
        return Direction(
            noise(2, length, 6), noise(2, length, 6), A, noise(2, length, 3), noise(2, length, 3), noise(6), noise(6)
        )

    ahead, back, z = direction(), direction(), noise(2, length, 6)
    tensors = [t for t in (*ahead, *back, z) if t is not None]
    expected = bidirectional_scan(ahead, back, z, backend="reference")
    found = traceable.scan((ahead, back), (False, True), z, True)
    bound = 1e-10 if dtype == torch.float64 else 1e-5
    assert relative_error(found, expected) <= bound
    cotangent = torch.randn(expected.shape, generator=generator).to(dtype)
    for one, other in zip(
        torch.autograd.grad(found, tensors, cotangent), torch.autograd.grad(expected, tensors, cotangent), strict=True
    ):
        assert relative_error(one, other) <= 10 * bound
    weights = [(noise(6, 4), noise(6)), (noise(6, 4), noise(6))]
    found_conv = traceable.conv(z, [w for w, _ in weights], [b for _, b in weights], (False, True), True)
    for one, other in zip(found_conv, bidirectional_conv(z, *weights, backend="reference"), strict=True):
        assert relative_error(one, other) <= bound
