"""The selective scan and the causal convolution behind Vision Mamba: one front, several backends.

`selective_scan` and `causal_conv1d` follow mamba_ssm's and causal-conv1d's shapes. `bidirectional_scan` and
`bidirectional_conv` are what the backbone calls: channels last, both directions at once, nothing flipped by the caller.
Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from svp_bench.ops.backends import BACKENDS, BackendStatus, backend_statuses, list_backends, require

if TYPE_CHECKING:
    from svp_bench.ops.interface import Choice as Choice
    from svp_bench.ops.interface import Direction as Direction
    from svp_bench.ops.interface import Prompts as Prompts
    from svp_bench.ops.interface import Remake as Remake
    from svp_bench.ops.interface import add_norm as add_norm
    from svp_bench.ops.interface import add_prompts as add_prompts
    from svp_bench.ops.interface import bidirectional_conv as bidirectional_conv
    from svp_bench.ops.interface import bidirectional_scan as bidirectional_scan
    from svp_bench.ops.interface import causal_conv1d as causal_conv1d
    from svp_bench.ops.interface import choose as choose
    from svp_bench.ops.interface import is_tracing as is_tracing
    from svp_bench.ops.interface import selective_scan as selective_scan

_LAZY = (
    "Choice",
    "Direction",
    "Prompts",
    "Remake",
    "add_norm",
    "add_prompts",
    "bidirectional_conv",
    "bidirectional_scan",
    "causal_conv1d",
    "choose",
    "is_tracing",
    "selective_scan",
)

__all__ = [
    "BACKENDS",
    "BackendStatus",
    "Choice",
    "Direction",
    "Prompts",
    "Remake",
    "add_norm",
    "add_prompts",
    "backend_statuses",
    "bidirectional_conv",
    "bidirectional_scan",
    "causal_conv1d",
    "choose",
    "is_tracing",
    "list_backends",
    "require",
    "selective_scan",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        value = getattr(importlib.import_module("svp_bench.ops.interface"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
