"""Selective scan, causal convolution and norm of Vision Mamba, with several backends.

`selective_scan` and `causal_conv1d` follow mamba_ssm's and causal-conv1d's shapes. The backbone calls
`bidirectional_scan` and `bidirectional_conv`: channels last, both directions at once, no flips by the caller.
Importing this package imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from svp_bench.ops.backends import BACKENDS, BackendStatus, backend_statuses, list_backends, require

if TYPE_CHECKING:
    from svp_bench.ops.interface import (
        add_norm,
        add_prompts,
        bidirectional_conv,
        bidirectional_scan,
        causal_conv1d,
        choose,
        is_tracing,
        no_autocast,
        selective_scan,
    )
    from svp_bench.ops.types import BackendChoice, Direction, PromptTerms, Recompute

__all__ = [
    "BACKENDS",
    "BackendChoice",
    "BackendStatus",
    "Direction",
    "PromptTerms",
    "Recompute",
    "add_norm",
    "add_prompts",
    "backend_statuses",
    "bidirectional_conv",
    "bidirectional_scan",
    "causal_conv1d",
    "choose",
    "is_tracing",
    "list_backends",
    "no_autocast",
    "require",
    "selective_scan",
]


def __getattr__(name: str) -> Any:
    if name in __all__:
        value = getattr(importlib.import_module("svp_bench.ops.interface"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
