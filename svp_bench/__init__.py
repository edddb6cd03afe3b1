"""svp-bench: honest, comparable numbers for adapting pre-trained Vision Mamba models.

Importing this package is light. The names below are loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from svp_bench._version import __version__

if TYPE_CHECKING:
    from svp_bench.methods import list_methods as list_methods
    from svp_bench.methods.build import create_model as create_model
    from svp_bench.models.checkpoints import load_checkpoint as load_checkpoint
    from svp_bench.ops import list_backends as list_backends
    from svp_bench.tables.frame import load_results as load_results
    from svp_bench.tasks.cards import list_tasks as list_tasks

_PUBLIC = {
    "create_model": "svp_bench.methods.build",
    "list_backends": "svp_bench.ops",
    "list_methods": "svp_bench.methods",
    "list_tasks": "svp_bench.tasks.cards",
    "load_checkpoint": "svp_bench.models.checkpoints",
    "load_results": "svp_bench.tables.frame",
}

__all__ = [
    "__version__",
    "create_model",
    "list_backends",
    "list_methods",
    "list_tasks",
    "load_checkpoint",
    "load_results",
]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
