"""What a checkpoint must hold so that training goes on from it.

Lightning goes on without what is not there: with fresh moments of the optimizer, or from the first epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch import Tensor

from svp_bench.methods.build import trained_parameters
from svp_bench.train.checkpoint import Saved, check_tensors, wrong_part
from svp_bench.train.module import AdaptationModule

__all__ = ["REMEDY", "check_resumable"]

REMEDY = "delete it, and the run begins anew; or leave --resume out"


def check_resumable(saved: Saved, trainer: Trainer, model: AdaptationModule, callbacks: Sequence[Callback]) -> None:
    """Check that a checkpoint holds all that training goes on with.

    Args:
        saved: The checkpoint.
        trainer: The trainer that will go on.
        model: What is trained.
        callbacks: Those that must find their state in it.

    Raises:
        CheckpointError: If a part is missing or of another form; names it.
    """

    def need(part: str, value: Any, fits: bool, expected: str) -> Any:
        if not fits:
            raise wrong_part(str(saved.path), part, value, expected, REMEDY)
        return value

    def need_form(part: str, theirs: Any, ours: Any) -> None:
        odd = _difference(part, theirs, ours)
        if odd:
            raise wrong_part(str(saved.path), *odd, REMEDY)

    def need_mappings(part: str, count: int | None = None) -> list[dict[str, Any]]:
        value, expected = saved.content.get(part), f"a list of {count}" if count else "a list"
        right = isinstance(value, list) and len(value) == (count or len(value)) > 0
        parts: list[dict[str, Any]] = need(part, value, right, expected)
        return [need(f"{part}[{i}]", entry, isinstance(entry, dict), "a mapping") for i, entry in enumerate(parts)]

    (optimizer,) = need_mappings("optimizer_states", 1)
    (schedule,) = need_mappings("lr_schedulers", 1)
    need("lr_schedulers.last_epoch", last := schedule.get("last_epoch"), isinstance(last, int), "a whole number")
    parameters = [*trained_parameters(model.model).values()]
    groups, state = optimizer.get("param_groups"), optimizer.get("state")
    all_there = _numbers(groups) == list(range(len(parameters)))
    need("optimizer_states.param_groups", groups, all_there, f"all {len(parameters)} trained parameters")
    moments = need("optimizer_states.state", state, isinstance(state, dict), "a mapping")
    if saved.global_step and model.optimizer_name == "adamw":
        shapes = sorted(_shape_of_moments(moments.get(number)) for number in range(len(parameters)))
        fits = shapes == sorted(tuple(parameter.shape) for parameter in parameters)
        need("optimizer_states.state", moments, fits, "the moments of each trained parameter")
    for number, parts in moments.items():
        values = parts.items() if isinstance(parts, dict) else ()
        tensors = {f"{number}.{key}": value for key, value in values if isinstance(value, Tensor)}
        check_tensors(tensors, str(saved.path), "optimizer_states.state", REMEDY)
    for part, key, ours in (
        ("loops", "fit_loop", trainer.fit_loop.state_dict()),
        *(("callbacks", callback.state_key, callback.state_dict()) for callback in callbacks),
    ):
        states = need(part, value := saved.content.get(part), isinstance(value, dict), "a mapping")
        need_form(f"{part}.{key}", states.get(key), ours)


def _numbers(groups: Any) -> list[Any]:
    """Return the numbers of the parameters in an optimizer's groups, as far as they are such."""
    lists = [group.get("params") for group in groups if isinstance(group, dict)] if isinstance(groups, list) else []
    return [number for numbers in lists if isinstance(numbers, list) for number in numbers]


def _shape_of_moments(state: Any) -> tuple[int, ...]:
    """Return the shape of Adam's moments of a parameter; (-1,) if they are not all there."""
    parts = [state.get(key) for key in ("exp_avg", "exp_avg_sq")] if isinstance(state, dict) and "step" in state else []
    shapes = {tuple(part.shape) for part in parts if isinstance(part, Tensor)}
    return shapes.pop() if len(parts) == 2 and len(shapes) == 1 else (-1,)


def _difference(part: str, theirs: Any, ours: Any) -> tuple[str, Any, str] | None:
    """Return (part, what it is, what was expected) where a state has not the form of a fresh one; None if it has.

    More keys, and anything where a fresh one has nothing, are fine.
    """
    if isinstance(ours, Mapping):
        if not isinstance(theirs, Mapping):
            return part, theirs, "a mapping"
        for key, value in ours.items():
            if odd := _difference(f"{part}.{key}", theirs.get(key), value):
                return odd
    elif ours is not None and type(theirs) is not type(ours):
        kinds = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        return part, theirs, kinds.get(type(ours), "a value")
    return None
