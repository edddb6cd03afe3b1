"""What a method is: what it adds to the backbone, what trains, and what it promises."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.models import VisionMamba

__all__ = ["Method", "chosen_blocks"]


class Method:
    """A way to adapt a backbone. Subclass it, state the promises, build the adapter in `attach`.

    The constructor's arguments are the method's settings: give each a type, a default and a line in the docstring, and
    keep it as an attribute of the same name; configs, `--help` and records read them from there.

    Attributes:
        identity_at_start: The adapted model equals the frozen backbone before the first step. `adapt` checks it.
        mergeable: The trained part can be folded into the backbone's weights, at no cost when predicting: see `merge`.
    """

    identity_at_start: ClassVar[bool]
    mergeable: ClassVar[bool] = False

    def attach(self, model: VisionMamba) -> None:
        """Set `model.adapter` to a module with everything that the method adds, and register its points.

        A hook is best a method of that module (``model.points.on_tokens(adapter.add)``): copies of the model then get
        their own. A hook on tokens that only adds may change `state.hidden`, one summand of what the block reads; one
        that scales, mixes or projects acts on the sum: ``state.with_stream(scale * state.stream)``.

        Raises:
            ConfigError: If the settings do not fit the model; says why.
        """
        raise ConfigError(f"the method {type(self).__name__} must define attach(model)")

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name (in `model.named_parameters()`) is trained. Default: adapter and head."""
        return name.startswith(("adapter.", "head."))

    def adapter_parameters(self, model: VisionMamba) -> int:
        """Return the number of trained parameters without the head, by the closed formula of the class docstring."""
        raise ConfigError(f"the method {type(self).__name__} must define adapter_parameters(model)")

    def merge(self, model: VisionMamba) -> None:
        """Fold what was trained into the backbone's own weights, in place, and take the adapter and its points away.

        What is left is a plain backbone under the published names, at no cost when predicting, with the same logits up
        to rounding. What was frozen stays frozen; the model may get another method.

        Raises:
            ConfigError: If the method does not merge, or the model does not carry it.
        """
        name = type(self).__name__
        if not self.mergeable:
            raise ConfigError(f"the method {name} does not merge into the backbone's weights; predict with its adapter")
        if getattr(model, "method", None) is not self:
            raise ConfigError(f"this model does not carry this {name}; call model.method.merge(model)")
        with torch.no_grad():
            self.fold(model)
        if model.adapter is not None:
            model.points.remove(model.adapter)
        model.adapter = None
        model.method = None  # type: ignore[assignment]  # as `adapt` sets it

    def fold(self, model: VisionMamba) -> None:
        """Write into the backbone's weights, in place, what the adapter adds to them; `merge` does the rest.

        A mergeable method with an adapter defines this. Called without gradients.

        Raises:
            ConfigError: If it does not.
        """
        if model.adapter is not None:
            raise ConfigError(f"the method {type(self).__name__} is declared mergeable and must define fold(model)")

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments as they were given."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({arguments})"


def build_method(cls: type[Method], name: str, settings: dict[str, Any]) -> Method:
    """Make a method from its settings.

    Raises:
        ConfigError: If it has no such argument; names the nearest.
    """
    allowed = list(inspect.signature(cls).parameters)
    for key in settings:
        if key not in allowed:
            raise unknown_name(f"argument of the method {name}", key, allowed, error=ConfigError)
    return cls(**settings)


def chosen_blocks(method: str, depths: Sequence[int] | None, model: VisionMamba) -> list[int]:
    """Return the blocks that a method acts on, in order; all of the model's if `depths` is None.

    Raises:
        ConfigError: If they are not distinct blocks of the model, or none.
    """
    blocks = list(range(model.depth)) if depths is None else sorted(depths)
    if not blocks or len(set(blocks)) != len(blocks) or not set(blocks) <= set(range(model.depth)):
        raise ConfigError(f"{method}: depths must be distinct blocks of 0..{model.depth - 1}, not {depths}")
    return blocks
