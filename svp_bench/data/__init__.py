"""Data: lists of images, readers, the transform, the data module, and synthetic images.

Importing this package is light. The names below are loaded when first asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from svp_bench.data.loading import Batch as Batch
    from svp_bench.data.locate import locate as locate
    from svp_bench.data.module import VisionDataModule as VisionDataModule
    from svp_bench.data.samplers import EvalBatchSampler as EvalBatchSampler
    from svp_bench.data.samplers import GlobalBatchSampler as GlobalBatchSampler
    from svp_bench.data.sources import READERS as READERS
    from svp_bench.data.sources import DataReport as DataReport
    from svp_bench.data.sources import Source as Source
    from svp_bench.data.sources import inspect as inspect
    from svp_bench.data.sources import open_source as open_source
    from svp_bench.data.split_files import ImageList as ImageList
    from svp_bench.data.split_files import read_list as read_list
    from svp_bench.data.synthetic import draw_task as draw_task
    from svp_bench.data.transforms import resize_squash as resize_squash

_PUBLIC = {
    "READERS": "svp_bench.data.sources",
    "Batch": "svp_bench.data.loading",
    "DataReport": "svp_bench.data.sources",
    "EvalBatchSampler": "svp_bench.data.samplers",
    "GlobalBatchSampler": "svp_bench.data.samplers",
    "ImageList": "svp_bench.data.split_files",
    "Source": "svp_bench.data.sources",
    "VisionDataModule": "svp_bench.data.module",
    "draw_task": "svp_bench.data.synthetic",
    "inspect": "svp_bench.data.sources",
    "locate": "svp_bench.data.locate",
    "open_source": "svp_bench.data.sources",
    "read_list": "svp_bench.data.split_files",
    "resize_squash": "svp_bench.data.transforms",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
