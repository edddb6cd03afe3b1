"""Several methods on one backbone at once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from svp_bench.core.errors import ConfigError
from svp_bench.methods import METHODS
from svp_bench.methods.base import Method, build_method
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES


class Hybrid(Method):
    """Train the parameters of several methods together, as the hybrids of Yoshimura et al., "MambaPEFT", ICLR 2025.

    Each method attaches in the given order, and its adapter is `adapter.{name}`. Methods that act at one hook point act
    in that order too.

    A hybrid merges if its methods do and none changes a weight that another one changes.

    Trained parameters without the head: the sum of those of the methods.

    Args:
        parts: Settings by method, e.g. {"lora": {"rank": 8}, "affix": {}}; those left out have their defaults.

    Raises:
        ConfigError: If there are fewer than two methods, one trains in stages, or two train the same tensor of the
            backbone.
    """

    identity_at_start: bool  # of these methods
    mergeable: bool

    def __init__(self, parts: Mapping[str, Mapping[str, Any] | None]) -> None:
        if len(parts) < 2:
            raise ConfigError(f"a hybrid needs at least two methods, not {', '.join(parts) or 'none'}")
        self.methods = {name: build_method(METHODS.get(name), name, dict(given or {})) for name, given in parts.items()}
        for name, method in self.methods.items():
            if method.stages > 1 or type(method).start_epoch is not Method.start_epoch:
                raise ConfigError(f"a hybrid cannot hold {name}, which trains in stages; leave it out")
        self.parts = {name: method.settings() for name, method in self.methods.items()}
        self.identity_at_start = all(method.identity_at_start for method in self.methods.values())
        self.mergeable = all(method.mergeable for method in self.methods.values())

    def attach(self, model: Backbone) -> None:
        """Attach each method; its adapter becomes `adapter.{name}`."""
        adapters, points = nn.ModuleDict(), model.points
        acts: dict[str, tuple[set[Any], set[Any]]] = {}  # method → (tensors, projections) that its hooks change
        before: tuple[Counter[Any], Counter[Any]] = Counter(), Counter()
        for name, method in self.methods.items():
            if (part := _attached(method, model)) is not None:
                adapters[name] = part
            now = _counts(points.tensor), _counts(points.linear)
            acts[name] = {*(now[0] - before[0])}, {*(now[1] - before[1])}
            before = now
        model.adapter = adapters if len(adapters) else None
        if self._overlap(acts):
            self.mergeable = False
        for tensor in model.own_parameters:
            owners = [name for name, method in self.methods.items() if method.trains(tensor)]
            if len(owners) > 1:
                raise ConfigError(f"the methods {' and '.join(owners)} both train {tensor}; leave out one")

    @staticmethod
    def _overlap(acts: Mapping[str, tuple[set[Any], set[Any]]]) -> bool:
        """Whether a method changes a weight that another one changes too, in its output or itself.

        Folding one after the other would then not give the same model.
        """
        for one, (tensors, _) in acts.items():
            weights = {(layer, name.rpartition(".")[0]) for layer, name in tensors if name.endswith(".weight")}
            for other, (changed, outputs) in acts.items():
                if other != one and (weights & outputs or tensors & changed):
                    return True
        return False

    def _of(self, parameter: str) -> tuple[Method | None, str]:
        """Return the method whose adapter holds a parameter, and the name that the method knows; else None."""
        first, _, rest = parameter.partition(".")
        if first != "adapter":
            return None, parameter
        name, _, inner = rest.partition(".")
        return self.methods[name], f"adapter.{inner}"

    def trains(self, name: str) -> bool:
        """Whether the method that holds this parameter, or for the backbone's any method, trains it."""
        method, inner = self._of(name)
        if method is not None:
            return method.trains(inner)
        return name.startswith(HEAD_PREFIXES) or any(one.trains(name) for one in self.methods.values())

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a parameter, by the method that trains it."""
        method, inner = self._of(name)
        if method is not None:
            return method.decays(inner)
        return all(one.decays(name) for one in self.methods.values() if one.trains(name))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the sum of the methods' counts."""
        return sum(method.adapter_parameters(model) for method in self.methods.values())

    def prepare(self, model: Backbone, images: Iterable[Tensor]) -> None:
        """Show the training images to each method."""
        for name, method in self.methods.items():
            with _part(model, name):
                method.prepare(model, images)

    def restore(self, model: Backbone, tensors: Mapping[str, Tensor]) -> None:
        """Restore each method, from its own tensors under the names that it knows."""
        for name, method in self.methods.items():
            start = f"adapter.{name}."
            own = {f"adapter.{key.removeprefix(start)}": v for key, v in tensors.items() if key.startswith(start)}
            with _part(model, name):
                method.restore(model, own)

    def fold(self, model: Backbone) -> None:
        """Fold the adapter of each method, the last attached first."""
        for name, method in reversed(self.methods.items()):
            with _part(model, name):
                method.fold(model)


@contextmanager
def _part(model: Backbone, name: str) -> Iterator[None]:
    """Let `model.adapter` be that of one method inside a `with` block."""
    adapters = model.adapter
    try:
        model.adapter = adapters[name] if isinstance(adapters, nn.ModuleDict) and name in adapters else None
        yield
    finally:
        model.adapter = adapters


def _counts(hooks: Mapping[Any, list[Any]]) -> Counter[Any]:
    return Counter({key: len(found) for key, found in hooks.items()})


def _attached(method: Method, model: Backbone) -> nn.Module | None:
    """Attach a method and return its adapter."""
    model.adapter = None
    method.attach(model)
    return model.adapter
