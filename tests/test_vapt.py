"""VAPT: prompts computed from the patch tokens."""

from __future__ import annotations

from typing import Any

import pytest
import reference_vim
import torch
import torch.nn.functional as F
from tolerances import BACKBONE, relative_error
from torch import Tensor

from svp_bench.core.errors import ConfigError
from svp_bench.methods.build import adapt, create_backbone, create_model
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.vapt import VAPT
from svp_bench.models import Backbone, MambaRegister, VisionMamba

# (3, 48, 64) images: 3 × 4 patches, width 32
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}


def vapt(state: dict[str, Tensor], count: int, size: int) -> reference_vim.BeforeBlock:
    """`count` prompts in front, computed with loops over places and channels."""

    def adapted(row: int, patches: Tensor) -> Tensor:
        centred = patches - patches.mean(dim=-1, keepdim=True)
        normed = centred / (centred.pow(2).mean(dim=-1, keepdim=True) + 1e-5).sqrt()
        normed = normed * state[f"adapter.norms.{row}.weight"] + state[f"adapter.norms.{row}.bias"]
        kernel = state[f"adapter.kernels.{row}"]
        places = []
        for top in range(3 - size + 1):
            for left in range(4 - size + 1):
                window = [kernel[i, j] * normed[:, (top + i) * 4 + left + j] for i in range(size) for j in range(size)]
                places.append(sum(window))
        weight, bias = state[f"adapter.linears.{row}.weight"], state[f"adapter.linears.{row}.bias"]
        rows = []
        for p in range(count):
            y = bias[p] + sum(w * place for w, place in zip(weight[p], places, strict=True))
            inner = (y @ state["adapter.down.weight"].T).clamp(min=0)
            rows.append(y + inner @ state["adapter.up.weight"].T)
        return torch.stack(rows, dim=1)

    def before_block(i: int, hidden: Tensor, residual: Tensor | None, cls: int) -> tuple[Tensor, Tensor | None, int]:
        if i == 0:
            prompts = state["adapter.prompts"].expand(len(hidden), -1, -1)
            return torch.cat([prompts, hidden], dim=1), None, cls + count
        assert residual is not None
        tokens = (hidden + residual)[:, count:]
        patches = torch.cat([tokens[:, : cls - count], tokens[:, cls - count + 1 :]], dim=1)
        hidden = torch.cat([adapted(i - 1, patches), hidden[:, count:]], dim=1)
        return hidden, torch.cat([torch.zeros_like(residual[:, :count]), residual[:, count:]], dim=1), cls

    return before_block


@pytest.mark.parametrize(("count", "size"), [(1, 3), (4, 2)])
def test_vapt_is_its_formula(count: int, size: int) -> None:
    model = adapt(VisionMamba(**SIZES).eval(), VAPT(count, size, hidden_dim=3))
    reference_vim.fill(model)
    state = {name: p.detach().double() for name, p in model.named_parameters()}
    images, trained = reference_vim.make_images(2, 3, 48, 64), trained_parameters(model)
    leaves = [state[name].requires_grad_() for name in trained]
    expected = reference_vim.logits(state, images.double(), stride=16, before_block=vapt(state, count, size))
    found = model(images)
    assert relative_error(found, expected) <= BACKBONE.forward
    cotangent = reference_vim.make_images(*found.shape)
    gradients = torch.autograd.grad(found, list(trained.values()), cotangent)
    wanted = torch.autograd.grad(expected, leaves, cotangent.double())
    for name, a, b in zip(trained, gradients, wanted, strict=True):
        assert relative_error(a, b) <= BACKBONE.backward, name
    first_alone = reference_vim.logits(
        state, images.double(), stride=16, before_block=reference_vim.vpt(prompts_alone(state), position="prefix")
    )
    assert relative_error(first_alone, expected) > 1e-3


def prompts_alone(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**state, "adapter.prompts": state["adapter.prompts"][None]}


def test_the_published_count() -> None:
    with torch.device("meta"):
        vim = create_model("vim_small_patch16_224", num_classes=2, method="vapt")
        vit = create_model("vit_base_patch16_224", num_classes=2, method="vapt")
    assert vim.method.adapter_parameters(vim) == 66_840
    assert vit.method.adapter_parameters(vit) == 55_608


def backbone(family: str) -> Backbone:
    if family == "mambar":
        made: Backbone = MambaRegister(registers=2, reduction=2, **SIZES)
        reference_vim.fill(made)
        return made
    return create_backbone(f"{family}_nano_patch8_64", num_classes=5)


@pytest.mark.parametrize("family", ["vim", "mambar", "vit"])
def test_every_trained_tensor_gets_a_gradient_in_each_family(family: str) -> None:
    torch.manual_seed(0)
    model = adapt(backbone(family), VAPT(position="spread")).train()
    optimizer = torch.optim.SGD(trained_parameters(model).values(), lr=1e-2)
    images = reference_vim.make_images(3, 3, *model.image_size)
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(images), torch.tensor([0, 1, 2])).backward()
        optimizer.step()
    for name, parameter in trained_parameters(model).items():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_dropout_and_gradient_checkpointing() -> None:
    model = adapt(VisionMamba(**SIZES).eval(), VAPT(dropout=0.5))
    reference_vim.fill(model)
    images = reference_vim.make_images(2, 3, 48, 64)
    assert torch.equal(model(images), model(images))
    model.adapter.train()  # type: ignore[union-attr]
    assert relative_error(model(images), model(images)) > 1e-4

    def gradients(checkpointing: bool) -> list[Tensor]:
        model.set_grad_checkpointing(checkpointing)
        torch.manual_seed(0)
        return [*torch.autograd.grad(model(images).square().sum(), list(trained_parameters(model).values()))]

    for plain, again in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 9}, "vapt: kernel_size must fit into the 8x8 patches, not be 9"),
        ({"length": 0}, "vapt: length must be at least 1, not 0"),
        ({"dropout": 1.0}, r"vapt: dropout must be in \[0, 1\), not 1.0"),
        ({"position": "middle"}, "vapt: position must be one of prefix, suffix, both, around_cls, spread"),
    ],
    ids=str,
)
def test_bad_settings(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        create_model("vim_nano_patch8_64", num_classes=2, method="vapt", **arguments)
