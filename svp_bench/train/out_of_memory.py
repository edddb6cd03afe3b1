"""The sentence that ends a run out of memory: what was asked, what the device has, what would fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from lightning.pytorch import Trainer

from svp_bench.core.errors import ConfigError, OutOfMemoryError, file_size, plural
from svp_bench.data.module import VisionDataModule
from svp_bench.train.memory import (
    Gauge,
    Need,
    Room,
    Shortage,
    Steps,
    is_out_of_memory,
    let_go,
    stepping,
)
from svp_bench.train.module import AdaptationModule
from svp_bench.train.parser import one_line

__all__ = ["Failed", "explain", "explain_prediction"]

_ACCUMULATE = "--trainer.accumulate_grad_batches"
_CHECKPOINTING = "--model.grad_checkpointing true"


@dataclass(frozen=True)
class Failed:
    """A run that has no memory left.

    Attributes:
        role: The list whose images were too many at a time: "train", "val" or "test".
        trains: Whether it is a run that trains, also where it validates at the moment.
        scores: The list that the run scores beside or after training, if any.
        method: Name of the method.
        model: The Lightning module.
        data: The data module, set up.
        trainer: The trainer, torn down.
        gauge: Measures its device; None if nothing does.
        resumes: Whether there is a checkpoint that `--resume` goes on from.
    """

    role: str
    trains: bool
    scores: str | None
    method: str
    model: AdaptationModule
    data: VisionDataModule
    trainer: Trainer
    gauge: Gauge | None
    resumes: bool

    @property
    def checkpointing(self) -> bool:
        """Whether layers are computed again already."""
        return self.model.model.grad_checkpointing

    @property
    def asked(self) -> int:
        """Images at a time, in this process."""
        return self.data.images_at_once(self.role)

    def measures(self, shortage: Shortage) -> bool:
        """Whether steps are measured to find out what would fit; other processes wait until this one ends."""
        of_the_device = self.trainer.strategy.root_device.type == "cpu" or not shortage.of_the_host
        return self.gauge is not None and of_the_device and self.trainer.world_size == 1


def explain(failed: Failed, shortage: Shortage) -> OutOfMemoryError:
    """Return what to tell the user: steps are measured for it, some seconds long.

    Args:
        failed: The run.
        shortage: What ended it.
    """
    try:
        asked = _asked(failed, shortage)
    except Exception:  # before the data were there
        asked = f"out of memory ({shortage.text})"
    try:
        advice = _advice(failed, shortage)
    except Exception as problem:  # the run's own failure is the one to be told
        advice = f"{_unmeasured(problem)}; try {_ACCUMULATE} or {_CHECKPOINTING}"
    return OutOfMemoryError(f"{asked}. {advice}")


def explain_prediction(
    module: AdaptationModule, gauge: Gauge, asked: int, flag: str, shortage: Shortage
) -> OutOfMemoryError:
    """Return what to tell the user of predictions on a CPU that ran out of memory.

    Args:
        module: Predicts.
        gauge: Made before the first prediction.
        asked: Images at a time.
        flag: What sets their number.
        shortage: What ended it.
    """
    height, width = module.model.patch_embed.img_size
    text = (
        f"out of memory while predicting with {module.backbone_name}: {_images(asked)} of "
        f"{height}×{width} at a time{_last(shortage)}"
    )
    device = torch.device("cpu")
    try:
        with stepping(module, gauge, device) as (steps, room):
            if room.free is None:
                return OutOfMemoryError(f"{text}. Try {flag} {max(1, asked // 2)}")
            budget = int(room.free * gauge.share)
            need = Need(steps.evaluate, budget)
            if need.fits(asked):
                found = f"{_measured(need, asked, [_enough(asked, asked)])} now; run it again"
            else:
                found = _fewer_at_a_time(need, asked, budget, f"Add {flag}")
            return OutOfMemoryError(f"{text}. {_has(room)}. {found}")
    except Exception as problem:  # the failure itself is the one to be told
        return OutOfMemoryError(f"{text}. {_unmeasured(problem)}; try {flag} {max(1, asked // 2)}")


def _asked(failed: Failed, shortage: Shortage) -> str:
    height, width = failed.model.model.patch_embed.img_size
    doing = {"train": "training", "val": "validating", "test": "testing"}[failed.role]
    again = ", gradient checkpointing" if failed.checkpointing and failed.role == "train" else ""
    return (
        f"out of memory while {doing} {failed.model.backbone_name} with {failed.method}: "
        f"{_images(failed.asked)} of {height}×{width} at a time in {failed.trainer.precision}{again}{_last(shortage)}"
    )


def _last(shortage: Shortage) -> str:
    return "" if shortage.requested is None else f"; {file_size(shortage.requested)} more could not be had"


def _advice(failed: Failed, shortage: Shortage) -> str:
    device = failed.trainer.strategy.root_device
    if shortage.of_the_host and device.type != "cpu":
        return (
            "It is the machine's own memory that is out, not that of the device: fewer --data.num_workers, or closing "
            "other programs, helps"
        )
    if failed.gauge is None:
        return f"Nothing measures the memory of {device.type}; {_untried(failed)}"
    if failed.trainer.world_size > 1:
        return f"{_has(failed.gauge.room())}. Nothing was measured: other processes wait for this; {_untried(failed)}"
    try:
        with stepping(failed.model, failed.gauge, device, failed.trainer.precision_plugin.forward_context) as at_hand:
            steps, room = at_hand
            if room.free is None:
                return f"This system does not say how much memory is free; {_untried(failed)}"
            budget = int(room.free * failed.gauge.share)
            text = (_of_training if failed.role == "train" else _of_evaluation)(failed, steps, budget)
            return f"{_has(room)}. {text}"
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        let_go(error)
        return f"{_has(failed.gauge.room())}. Not even the weights fit"


def _has(room: Room) -> str:
    free = "" if room.free is None else f", {file_size(room.free)} free for this run"
    return f"{room.name} has {file_size(room.total)}{free}"


def _of_training(failed: Failed, steps: Steps, budget: int) -> str:
    asked, batch = failed.asked, failed.data.batch_size
    need = Need(lambda images: steps.train(images, failed.checkpointing), budget)
    most = need.most(asked)
    if most == asked:
        return _fits_now(failed, need.at(asked))
    light: Need | None = None
    if not failed.checkpointing:
        light = Need(lambda images: steps.train(images, True), budget)
    most_lightly = light.most(asked) if light is not None else 0
    counts = [_enough(most)]
    if most_lightly > most:
        counts.append(f"with gradient checkpointing {_enough(most_lightly, asked)}")
    found = _measured(need, asked, counts)

    options = []
    if parts := _in_parts(failed, need):
        options.append(f"{_ACCUMULATE} {parts[0]} (the same batch of {batch}, {parts[1]} at a time)")
    if most_lightly == asked:
        options.append(f"{_CHECKPOINTING} (all {asked} at a time, for about a third more time)")
    elif light is not None and (larger := _in_parts(failed, light)) and (not parts or larger[1] > parts[1]):
        options.append(f"{_CHECKPOINTING} {_ACCUMULATE} {larger[0]} ({larger[1]} at a time)")
    if not options:
        for kind, flag in ((need, ""), (light, f" {_CHECKPOINTING}")):
            if kind is not None and (smaller := _smaller_batch(failed, kind)):
                return f"{found}. {batch} cannot be cut so: --data.batch_size {smaller}{flag} fits, another setting"
        return f"{found}; {_too_large(need if light is None else light, budget)}"
    return f"{found}. {_add(failed)}{', or '.join(options)}{_scoring_too(failed, steps, budget)}"


def _of_evaluation(failed: Failed, steps: Steps, budget: int) -> str:
    asked = failed.asked
    if failed.trains:
        steps.train(1, failed.checkpointing)  # the optimizer's state is there while val is scored
    need = Need(steps.evaluate, budget)
    if need.fits(asked):
        return _fits_now(failed, need.at(asked))
    return _fewer_at_a_time(need, asked, budget, f"{_add(failed)}--data.eval_batch_size")


def _fewer_at_a_time(need: Need, asked: int, budget: int, flag: str) -> str:
    most = need.most(asked)
    found = _measured(need, asked, [_enough(most)])
    if not most:
        return f"{found}; {_too_large(need, budget)}"
    return f"{found}. {flag} {_power_of_two(need, most)} (results do not depend on it, except for rounding)"


def _measured(need: Need, asked: int, counts: list[str]) -> str:
    needed = need.at(asked)
    first = "" if needed is None else f"{asked} would need {file_size(needed)}, "
    return f"Measured here: {first}{', '.join(counts)}"


def _enough(most: int, asked: int | None = None) -> str:
    if most == asked:
        return f"all {most} fit"
    return f"about {most} fit" if most > 1 else f"{most or 'not even 1'} fits"


def _fits_now(failed: Failed, needed: int | None) -> str:
    need = "" if needed is None else f" need {file_size(needed)}, which"
    text = (
        f"Measured here: {_images(failed.asked)}{need} would fit now. Others held the memory then, or it was in "
        f"pieces: {'go on with --resume' if failed.resumes else 'run it again'}"
    )
    if failed.trainer.strategy.root_device.type == "cuda":
        text += ", if need be with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True in the environment"
    return text


def _too_large(need: Need, budget: int) -> str:
    one = need.at(1)
    missing = "" if one is None or one <= budget else f" (1 image needs {file_size(one)})"
    return f"a smaller --model.backbone or --data.image_size, or a device with more free memory, is needed{missing}"


def _ways_to_cut(failed: Failed) -> Iterator[tuple[int, int]]:
    """Yield (batches to accumulate, images at a time) that keep the batch of a step, the fewest first."""
    given, batch = failed.trainer.accumulate_grad_batches, failed.data.batch_size
    asked = failed.asked
    for parts in range(given + 1, batch + 1):
        if batch % (parts * failed.trainer.world_size):
            continue
        try:
            images = failed.data.images_at_once("train", accumulate=parts)
        except ConfigError:  # the last batch of an epoch is too small for it
            continue
        if images < asked:
            yield parts, images


def _in_parts(failed: Failed, need: Need) -> tuple[int, int] | None:
    return next((way for way in _ways_to_cut(failed) if need.fits(way[1])), None)


def _smaller_batch(failed: Failed, need: Need) -> int | None:
    """Return the largest batch, a power of two of images at a time, that fits and can be shared out."""
    accumulate = failed.trainer.accumulate_grad_batches
    most = need.most(failed.asked)
    for power in reversed(range(most.bit_length())):
        try:
            images = failed.data.images_at_once("train", 2**power * accumulate, accumulate)
        except ConfigError:
            continue
        if need.fits(images):
            return int(2**power * accumulate)
    return None


def _power_of_two(need: Need, most: int) -> int:
    """Return the largest power of two that fits."""
    power = most.bit_length() - 1
    while power and not need.fits(2**power):
        power -= 1
    return 1 << power


def _scoring_too(failed: Failed, steps: Steps, budget: int) -> str:
    """Return what to add so that scoring, which does not follow the accumulation, fits as well."""
    if failed.scores is None:
        return ""
    need = Need(steps.evaluate, budget)
    images = failed.data.images_at_once(failed.scores)
    most = need.most(images)
    if most in (0, images):
        return ""
    return f", and --data.eval_batch_size {_power_of_two(need, most)} for scoring"


def _unmeasured(problem: Exception) -> str:
    let_go(problem)
    return f"What would fit could not be measured ({one_line(f'{type(problem).__name__}: {problem}')[:200]})"


def _add(failed: Failed) -> str:
    return "Go on with --resume and " if failed.resumes else "Add "


def _untried(failed: Failed) -> str:
    """Return what may help where nothing can be measured."""
    if failed.role != "train":
        half = max(1, failed.data.eval_batch_size // 2)
        return f"try {'--resume with ' if failed.resumes else ''}--data.eval_batch_size {half}"
    ways = [f"{_ACCUMULATE} {parts} ({images} at a time)" for parts, images in _ways_to_cut(failed)][:1]
    ways += [] if failed.checkpointing else [_CHECKPOINTING]
    if not ways:
        return "try a smaller --data.batch_size"
    return f"try {'--resume with ' if failed.resumes else ''}{' or '.join(ways)}"


def _images(count: int) -> str:
    return plural(count, "image")
