"""Cost of a model: multiplications per image, stored bytes."""

from __future__ import annotations

import copy
import json
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from svp_bench.core.errors import one_line
from svp_bench.methods.checks import trained_parameters
from svp_bench.models import Backbone
from svp_bench.ops.macs import counting
from svp_bench.records.record import Efficiency

_CACHE: dict[str, tuple[int, int] | str] = {}  # by what decides the count; a sweep repeats settings


_DECISIVE = ("backbone", "method", "method_args", "num_classes", "image_size", "head_hidden")


def efficiency_of(model: Backbone, identity: dict[str, Any]) -> Efficiency:
    """Return the cost of an adapted model.

    Args:
        model: The model; it is not changed.
        identity: As of `AdaptationModule.identity`.
    """
    counted = model.method.adapter_parameters(model)  # may follow from the training images
    key = json.dumps([counted, *(identity[name] for name in _DECISIVE)], sort_keys=True, default=str)
    if key not in _CACHE:
        try:
            _CACHE[key] = count_macs(model)
        except Exception as error:  # a custom method may do anything that needs real numbers
            _CACHE[key] = f"{type(error).__name__}: {error}"
            rank_zero_warn(f"the multiplications are not counted, and null in the record: {one_line(_CACHE[key])}")
    found = _CACHE[key]
    inference, training = (None, None) if isinstance(found, str) else found
    stored = sum(parameter.numel() * parameter.element_size() for parameter in trained_parameters(model).values())
    return Efficiency(inference, training, stored, bool(getattr(model.method, "mergeable", False)))


def count_macs(model: Backbone) -> tuple[int, int]:
    """Return the MACs of one image: of inference, and of a training step (forward and backward pass).

    Matrix products, convolutions and attention are counted by PyTorch's formulas, scans and causal convolutions by
    those of `svp_bench.ops.macs`, on a copy of the model without values. Elementwise operations are left out.
    """
    shadow: Any = copy.deepcopy(model).to("meta").eval()
    shadow._compiled_call_impl = None
    with torch.device("meta"):
        image = torch.zeros(1, model.in_chans, *model.image_size, dtype=model.first_parameter.dtype)
        with torch.no_grad():
            inference = _macs(shadow, image)
        return inference, _macs(shadow, image, backward=True)


def _macs(model: nn.Module, image: Tensor, backward: bool = False) -> int:
    with counting() as counter, _Products() as products:
        logits: Tensor = model(image)
        if backward:
            logits.sum().backward()
    total: int = counter.macs + products.macs
    return total


class _Products(TorchDispatchMode):
    """Count the MACs of matrix products, convolutions and attention, by PyTorch's formulas.

    `FlopCounterMode` hooks every module, so that no part would be plain.
    """

    def __init__(self) -> None:
        super().__init__()
        self.macs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        packet = (
            torch.ops.aten.addmm if packet is torch.ops.aten.addmm_ else packet
        )  # in place, as LoRA adds its product
        if packet in flop_registry:
            self.macs += int(flop_registry[packet](*args, **(kwargs or {}), out_val=out)) // 2
        return out
