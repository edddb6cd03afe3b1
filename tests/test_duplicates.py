"""Duplicates are found by behaviour, not by count: no two registered methods are the same family of functions.

The function of an adapted model maps images to the features that the head reads. The family of a method is the set of
functions that its trained parameters outside the head can make of one frozen backbone, whose weights are sampled.

- Method b contains method a if for each of several random values of a's parameters, at several distances from its
  start, parameters of b are found (Levenberg-Marquardt on FIT images, from several random starts) with which the
  features of other images differ from a's by at most TOLERANCE of the change that a makes to the frozen backbone.
- Two methods are duplicates if each contains the other.
- Families that are equal have tangent spaces of one dimension almost everywhere. So only pairs are fitted whose
  dimension, the numerical rank of the Jacobian of the features with respect to the parameters at a random point,
  agrees within 5 %.
- A fit says nothing where there are more dimensions than features. Only the methods that train whole blocks,
  WHOLE_BLOCKS, have so many; they are compared by the names of the tensors that they train. Others must have smaller
  settings here.

Everything is float64 on the reference backend; settings are the defaults, with the smallest ranks and widths.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from typing import Any

import pytest
import reference_vim
import timm
import torch
from torch import Tensor

from svp_bench.methods import METHODS, list_methods
from svp_bench.methods.base import Method, build_method
from svp_bench.methods.bias import Bias
from svp_bench.methods.build import adapt
from svp_bench.methods.checks import trained_parameters
from svp_bench.methods.lora import LoRA
from svp_bench.methods.offset import Offset
from svp_bench.methods.partial import Partial
from svp_bench.methods.state import InitialState, StateOffset
from svp_bench.models import Backbone, VisionMamba, as_backbone
from svp_bench.models.backbone import HEAD_PREFIXES

# pairs that are one family, with the reason; docs/methods.md has the same table
# (spt and e2vpt are vpt_deep by construction, with another start or training: the fit need not find that)
SAME = {frozenset(("full", "lp_ft")): "the same tensors; lp_ft trains the head alone first"}
TOLERANCE = 1e-4
IMAGES, FIT, SIDE = 60, 48, 8
SMALLEST = {"rank": 1, "hidden_dim": 2, "length": 1}
SETTINGS: dict[str, dict[str, Any]] = {
    "prodial": {"blocks": 4},
    "additional_scan": {"states": 1},
    "dam_vp": {"max_clusters": 2},
    "e2vpt": {"pieces": 2},
}
WHOLE_BLOCKS = {"full", "lp_ft", "last_blocks"}
DISTANCES = (0.05, 0.3)


def backbone(family: str) -> Backbone:
    """Return a frozen backbone of four patches, width 8, two blocks, with sampled weights."""
    sizes: dict[str, Any] = {"img_size": SIDE, "patch_size": 4, "embed_dim": 8, "depth": 2, "num_classes": 2}
    if family == "vim":
        model: Backbone = VisionMamba(**sizes, d_state=2, scan_backend="reference")
    else:
        model = as_backbone(timm.models.VisionTransformer(**sizes, num_heads=2))
    reference_vim.fill(model)
    with torch.no_grad():  # tokens of about 1, so that changes of them are not far from linear
        for name in ("patch_embed.proj.weight", "pos_embed", "cls_token"):
            model.get_parameter(name).mul_(30)
    return model.double().eval()


class Family:
    """The functions of a method on one backbone: parameters (p,) → features (images, width)."""

    def __init__(self, family: str, method: Method, seed: int = 0) -> None:
        frozen = backbone(family)
        images = reference_vim.make_images(IMAGES, 3, SIDE, SIDE).double()
        self.model, self.images = frozen, images
        self.frozen = self._run()
        torch.manual_seed(seed)
        adapt(frozen, method)
        method.prepare(frozen, [images])
        trained = {n: p for n, p in trained_parameters(frozen).items() if not n.startswith(HEAD_PREFIXES)}
        self.names, self.tensors = set(trained), list(trained.values())
        none = [torch.zeros(0, dtype=torch.float64)]
        self.start = torch.cat(none + [p.detach().flatten() for p in self.tensors])
        sizes = [p.detach().square().mean().sqrt().clamp_min(0.3).expand(p.numel()) for p in self.tensors]
        self.unit = torch.cat(none + sizes)  # what a distance of 1 is, for each number

    @torch.no_grad()
    def _run(self) -> Tensor:
        features = self.model.pooled(self.model.run_blocks(self.model.embed(self.images)))
        return features.flatten(1)

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        for tensor, part in zip(self.tensors, values.split([p.numel() for p in self.tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
        return self._run()

    def draw(self, seed: int, distance: float) -> Tensor:
        """Return parameters at a random place around the start."""
        noise = torch.randn(len(self.start), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return self.start + distance * self.unit * noise

    def jacobian(self, values: Tensor, directions: Tensor | None = None, step: float = 1e-7) -> Tensor:
        """Return the derivatives of all features in the given directions, or in all: (features, directions)."""
        vectors = torch.eye(len(values), dtype=torch.float64) if directions is None else directions
        here = self(values)
        columns = [(self(values + step * v) - here).flatten() / step for v in vectors]
        return torch.stack(columns, dim=1)

    @functools.cached_property
    def dimension(self) -> int:
        """Return the dimension of the tangent space at a random point."""
        if not len(self.start):
            return 0
        features = self.frozen.numel()
        directions = None
        if len(self.start) > features:  # more cannot be seen
            directions = torch.randn(features, len(self.start), generator=torch.Generator().manual_seed(5)).double()
            directions /= directions.norm(dim=1, keepdim=True)
        jacobian = self.jacobian(self.draw(1, 0.3), directions)
        return int(torch.linalg.matrix_rank(jacobian, rtol=1e-6))

    def reaches(self, target: Tensor, seed: int) -> bool:
        """Whether parameters are found that give `target`, also on the images that the fit does not see."""
        change = target - self.frozen
        values, damping = self.draw(seed, 0.1), 1e-3
        found = self(values)
        history: list[float] = []
        for _ in range(40):
            residual = (target - found)[:FIT].flatten()
            history.append(float(residual.norm() / change[:FIT].norm()))
            if history[-1] < TOLERANCE / 100 or (len(history) > 6 and history[-1] > 0.7 * history[-6]):
                break
            jacobian = self.jacobian(values).view(IMAGES, -1, len(values))[:FIT].flatten(0, 1)
            scale = jacobian.norm(dim=0).clamp_min(1e-8)
            u, s, v = torch.linalg.svd(jacobian / scale, full_matrices=False)
            for _ in range(8):
                filtered = s / (s.square() + damping**2 * s[0] ** 2)
                moved = values + (v.T @ (filtered * (u.T @ residual))) / scale
                then = self(moved)
                if (target - then)[:FIT].norm() < residual.norm():
                    values, found, damping = moved, then, max(damping / 5, 1e-10)
                    break
                damping *= 4
            else:
                break
        error = float((target - found)[FIT:].norm() / change[FIT:].norm())
        return error <= TOLERANCE


def contains(b: Family, a: Family) -> bool:
    """Whether b contains a, as the module says."""
    for seed, distance in enumerate(DISTANCES):
        target = a(a.draw(seed, distance))
        if not any(b.reaches(target, 10 + start) for start in range(2)):
            return False
    return True


def duplicates(a: Family, b: Family) -> bool:
    """Whether two methods are the same family of functions."""
    if a.model.adapter is None and b.model.adapter is None and (a.names == b.names or not a.names or not b.names):
        return a.names == b.names
    small, large = sorted((a.dimension, b.dimension))
    return large - small <= max(1, 0.05 * large) and contains(a, b) and contains(b, a)


@functools.cache
def registered(family: str) -> dict[str, Family]:
    """Return the families of all registered methods that fit, with small settings."""
    backbones = {"vim": "vim_tiny_patch16_224", "vit": "vit_tiny_patch16_224"}
    found = {}
    for name in list_methods(backbones[family]):
        known = inspect.signature(METHODS.get(name)).parameters
        settings = {key: value for key, value in SMALLEST.items() if key in known} | SETTINGS.get(name, {})
        found[name] = Family(family, build_method(METHODS.get(name), name, settings))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("family", ["vim", "vit"])
def test_no_two_methods_are_the_same_family(family: str) -> None:
    families = registered(family)
    features = next(iter(families.values())).frozen.numel()
    large = {name for name, made in families.items() if made.dimension >= 0.75 * features}
    assert large <= WHOLE_BLOCKS, f"too many parameters to compare; give these smaller settings: {large - WHOLE_BLOCKS}"
    pairs = itertools.combinations(families, 2)
    found = {
        frozenset((a, b))
        for a, b in pairs
        if (families[a].names == families[b].names if {a, b} <= WHOLE_BLOCKS else duplicates(families[a], families[b]))
    }
    expected = {pair for pair in SAME if pair <= set(families)}
    assert found == expected, f"the same functions under two names: {[sorted(pair) for pair in found ^ expected]}"


class OneVector(StateOffset):
    """The offset of the output in one direction alone: the sum of both is the same family."""

    def trains(self, name: str) -> bool:
        return super().trains(name) and not name.endswith(".y_b")

    def adapter_parameters(self, model: Backbone) -> int:
        return super().adapter_parameters(model) // 2


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Bias(["patch_embed"]), Offset(depths=[0])),
        (LoRA(["Z"], rank=1, scale=0.1), LoRA(["Z"], rank=1, scale=0.7)),
        (StateOffset("y"), OneVector("y")),
        (StateOffset("h"), StateOffset("h", rank=2)),
    ],
    ids=["a bias and an offset", "two scales", "one direction", "full rank"],
)
def test_two_spellings_of_one_method_are_found(first: Method, second: Method) -> None:
    assert duplicates(Family("vim", first), Family("vim", second, seed=1))


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (StateOffset("h"), Partial(["A_log"])),
        (StateOffset("h"), InitialState()),
        (StateOffset("y"), Partial(["D"])),
        (LoRA(["X"], rank=1), LoRA(["Z"], rank=1)),
        (Offset(), Offset(include_cls=True)),
    ],
    ids=repr,
)
def test_methods_of_one_count_are_told_apart(first: Method, second: Method) -> None:
    assert not duplicates(Family("vim", first), Family("vim", second, seed=1))
