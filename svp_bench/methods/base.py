"""The base class of the methods, and checks of their settings."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES


class Method:
    """Base class of the methods. Subclass it, declare the promises, build the adapter in `attach`.

    The constructor's arguments are the settings. Give each a type, a default and a line in the docstring, and store it
    as an attribute of the same name; configs, `--help` and records read them.

    Attributes:
        identity_at_start: The adapted model equals the frozen backbone before the first step. `adapt` checks it.
        mergeable: `merge` can fold the adapter parameters into the backbone's weights.
        stages: Number of stages of a training. A method with several defines `stage` and `trains_in_stage`.
        dead_parameters: Patterns (of `fnmatch`) of trained parameters that never get a gradient; the class docstring
            gives the reasons.
    """

    identity_at_start: bool
    mergeable: bool = False
    stages: int = 1
    dead_parameters: tuple[str, ...] = ()

    def attach(self, model: Backbone) -> None:
        """Set `model.adapter` to a module with the adapter parameters, and register its hooks.

        Register methods of that module (``model.points.on_tokens(adapter.add)``), so that copies of the model get their
        own. A token hook that only adds may change `state.hidden`, one summand of the block's input; one that scales,
        mixes or projects acts on the sum: ``state.with_stream(scale * state.stream)``.

        Raises:
            ConfigError: If the settings do not fit the model.
        """
        raise ConfigError(f"the method {type(self).__name__} must define attach(model)")

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name (in `model.named_parameters()`) is trained. Default: adapter and head."""
        return name.startswith(("adapter.", *HEAD_PREFIXES))

    def decays(self, name: str) -> bool:
        """Whether weight decay applies to a trained parameter, in addition to the usual exclusions. Default: yes."""
        return True

    def stage(self, epoch: int, epochs: int) -> int:
        """Return the stage, 0 to `stages` - 1, of an epoch, counted from 0, of a training of `epochs`. Default: 0.

        Where it changes, the optimizer's moments and the average of the weights begin anew; the learning rate's
        schedule does not.
        """
        return 0

    def trains_in_stage(self, name: str, stage: int) -> bool:
        """Whether a trained parameter is trained in a stage; otherwise it keeps its value there. Default: yes."""
        return True

    def start_epoch(self, model: Backbone, epoch: int, epochs: int) -> None:
        """Prepare an epoch, counted from 0, of a training of `epochs`. Default: nothing.

        Called before its first step, not where a run is resumed in its middle, and on each process: choose masks, or
        reset tensors of the adapter, in place, by the weights alone. What a later epoch needs must be a parameter or a
        persistent buffer of the adapter.
        """

    def before_step(self, model: Backbone) -> None:
        """Look at the gradients before an optimizer step, unscaled and not yet clipped; do nothing by default.

        They are those of all processes, and None for tensors that do not train in the stage. What a method stores must
        be a persistent buffer of the adapter.
        """

    def prepare(self, model: Backbone, images: Iterable[Tensor]) -> None:
        """Look at the training images, once, before the optimizer exists; do nothing by default.

        It may set values of the adapter, or build other tensors in their place, under the names that `attach` gave.

        Args:
            model: The adapted model.
            images: Normalised batches (B, 3, H, W) of the training split without augmentation, in an order that follows
                from the seed. They are read again in each iteration.
        """

    def restore(self, model: Backbone, tensors: Mapping[str, Tensor]) -> None:
        """Build the tensors that `prepare` built, so that they can be loaded; do nothing by default.

        Args:
            model: The adapted model; its training images are not available.
            tensors: The trained tensors and the buffers of a checkpoint, by their names in the model.
        """

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the number of parameters that train (in the last stage) without the head.

        By the formula of the class docstring.
        """
        raise ConfigError(f"the method {type(self).__name__} must define adapter_parameters(model)")

    def merge(self, model: Backbone) -> None:
        """Fold the adapter parameters into the backbone's weights, in place, and remove the adapter and its hooks.

        The result is a plain backbone under the published names, with the same logits up to rounding. Frozen parameters
        stay frozen; the model may get another method.

        Raises:
            ConfigError: If the method does not merge, or the model does not carry it.
        """
        name = type(self).__name__
        if not self.mergeable:
            raise ConfigError(f"the method {name} does not merge into the backbone's weights; predict with its adapter")
        if model.method is not self:
            raise ConfigError(f"this model does not carry this {name}; call model.method.merge(model)")
        with torch.no_grad():
            self.fold(model)
        if model.adapter is not None:
            model.points.remove(model.adapter)
        model.adapter = model.method = None

    def fold(self, model: Backbone) -> None:
        """Add the adapter to the backbone's weights, in place; a mergeable method with an adapter defines this.

        `merge` calls it without gradients and removes the adapter.
        """
        if model.adapter is not None:
            raise ConfigError(f"the method {type(self).__name__} is declared mergeable and must define fold(model)")

    def settings(self) -> dict[str, Any]:
        """Return the constructor's arguments."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def __repr__(self) -> str:
        arguments = ", ".join(f"{name}={value!r}" for name, value in self.settings().items())
        return f"{type(self).__name__}({arguments})"


def build_method(cls: type[Method], name: str, settings: dict[str, Any]) -> Method:
    """Build a method from its settings; ConfigError for an unknown one, with the nearest."""
    allowed = list(inspect.signature(cls).parameters)
    for key in settings:
        if key not in allowed:
            raise unknown_name(f"argument of the method {name}", key, allowed, error=ConfigError)
    return cls(**settings)


def check_setting(method: str, name: str, value: object, allowed: Sequence[object] | int | str) -> None:
    """Check a setting of a method.

    Args:
        method: The method, for the message.
        name: The setting.
        value: Its value.
        allowed: The allowed values; or an integer, the minimum; or "positive", or "fraction" for [0, 1).

    Raises:
        ConfigError: If the value is not allowed.
    """
    number = value if isinstance(value, (int, float)) else math.nan
    if isinstance(allowed, int):
        valid, rule = number >= allowed, f"be at least {allowed}"
    elif allowed == "positive":
        valid, rule = 0 < number < math.inf, "be above 0"
    elif allowed == "fraction":
        valid, rule = 0 <= number < 1, "be in [0, 1)"
    else:
        valid, rule = value in allowed, f"be one of {', '.join(map(str, allowed))}"
    if not valid:
        shown = repr(value) if isinstance(value, str) else value
        raise ConfigError(f"{method}: {name} must {rule}, not {shown}")


def stage_border(share: float, epochs: int) -> int:
    """Return the first epoch of the second of two stages, the first with a share of the epochs; each has at least 1."""
    return min(max(1, round(share * epochs)), epochs - 1)


def check_names(
    method: str, name: str, value: Sequence[str], allowed: Sequence[str], kind: str, family: str = ""
) -> None:
    """Check a setting that is a list of distinct names, at least one.

    Args:
        method: The method, for the message.
        name: The setting.
        value: Its value.
        allowed: The allowed names.
        kind: An entry of the list, for the message.
        family: The backbone's, if the allowed names depend on it.

    Raises:
        ConfigError: If it is not.
    """
    if isinstance(value, str):
        raise ConfigError(f"{method}: {name} must be a list such as [{', '.join(allowed[:2])}], not the text {value!r}")
    for entry in value:
        if entry not in allowed:
            text = str(unknown_name(kind, str(entry), allowed))
            listed = f"; {family or method} has {', '.join(allowed)}" if "allowed:" not in text else ""
            raise ConfigError(f"{text}{listed}")
    if not value or len(set(value)) != len(value):
        raise ConfigError(f"{method}: {name} must be distinct, and at least one of {', '.join(allowed)}")


def selected_blocks(method: str, depths: Sequence[int] | None, model: Backbone) -> list[int]:
    """Return the blocks of `depths` in order, all if None; ConfigError if they are not distinct blocks of the model."""
    blocks = list(range(model.depth)) if depths is None else sorted(depths)
    if not blocks or len(set(blocks)) != len(blocks) or not set(blocks) <= set(range(model.depth)):
        raise ConfigError(f"{method}: depths must be distinct blocks of 0..{model.depth - 1}, not {depths}")
    return blocks


def zero_at(tokens: Tensor, positions: Sequence[int]) -> Tensor:
    """Return tokens (B, L, D) with zeros at some positions."""
    if not positions:
        return tokens
    return tokens.index_fill(1, torch.tensor(positions, device=tokens.device), 0)


@contextmanager
def frozen_backbone(model: Backbone) -> Iterator[None]:
    """Let a model compute as its backbone without a method, in eval mode and without gradients."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), model.points.disabled():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
