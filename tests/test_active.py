"""Nothing is silently inactive: every trained tensor of every method gets a gradient, or the method says why not."""

from __future__ import annotations

import inspect
from fnmatch import fnmatch
from typing import Any

import pytest
import reference_vim
import torch
from torch import nn

from svp_bench.methods import METHODS
from svp_bench.methods.base import build_method
from svp_bench.methods.build import adapt, create_backbone
from svp_bench.methods.checks import trained_parameters
from svp_bench.models import Backbone, MambaRegister, VisionMamba
from svp_bench.ops import backend_statuses

BACKENDS = [status.name for status in backend_statuses() if status.available and status.name in ("reference", "cpu")]
SIZES: dict[str, Any] = {"img_size": (48, 64), "embed_dim": 32, "depth": 3, "d_state": 4, "num_classes": 5}
VARIANTS: dict[str, dict[str, Any]] = {
    "prodial": {"blocks": "channel"},
    "affix": {"projection": True},
    "vpt_shallow": {"position": "spread"},
    "lora": {"dora": True},
    "svp": {"variant": "released"},
}
CASES = [
    (family, backend, entry.name, settings)
    for family, backends in (("vim", BACKENDS), ("mambar", BACKENDS), ("vit", [""]))
    for backend in backends
    for entry in METHODS
    for settings in ({}, VARIANTS.get(entry.name))
    if settings is not None and (not entry.families or family in entry.families)
    if family == "vim" or "variant" not in settings  # it needs one class token in the middle
]


def backbone(family: str, backend: str) -> Backbone:
    """A small backbone that looks trained."""
    if family == "vit":
        model = create_backbone("vit_nano_patch8_64", num_classes=5)
    elif family == "vim":
        model = VisionMamba(**SIZES, scan_backend=backend)
    else:
        model = MambaRegister(registers=2, reduction=2, **SIZES, scan_backend=backend)
    reference_vim.fill(model)
    return model


@pytest.mark.parametrize(("family", "backend", "name", "settings"), CASES, ids=str)
def test_every_trained_tensor_has_a_gradient_at_the_third_step(
    family: str, backend: str, name: str, settings: dict[str, Any]
) -> None:
    """Zero-initialised factors give others a zero gradient at first, so this is what a run checks, too."""
    torch.manual_seed(0)
    made = build_method(METHODS.get(name), name, settings)
    model = adapt(backbone(family, backend), made).train()
    trained = trained_parameters(model)
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-3)
    images = reference_vim.make_images(4, 3, *model.image_size)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3])).backward()
        optimizer.step()
    inactive = {key for key, p in trained.items() if p.grad is None or not p.grad.any()}
    documented = {key for key in trained if any(fnmatch(key, pattern) for pattern in made.dead_parameters)}
    assert inactive <= documented
    assert all(any(fnmatch(key, pattern) for key in inactive) for pattern in made.dead_parameters)


@pytest.mark.parametrize("name", METHODS.names())
def test_dead_parameters_are_explained(name: str) -> None:
    """The class docstring names the last part of each pattern."""
    kind = METHODS.get(name)
    documented = inspect.getdoc(kind) or ""
    assert all(pattern.rpartition(".")[2].strip("*") in documented for pattern in kind.dead_parameters)
