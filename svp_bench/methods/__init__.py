"""The adaptation methods by name. Importing this package imports no torch; `METHODS.get(name)` loads one.

A custom method needs no entry here: name it as `class_path` in a method file and pass the file to `--method`, or
declare the entry point `svp_bench.methods` in your package.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from svp_bench.core.registry import Registry

if TYPE_CHECKING:
    from svp_bench.methods.base import Method as Method
    from svp_bench.methods.build import create_model as create_model

METHODS = Registry("method", listing="svp-bench methods", entry_points="svp_bench.methods")
SSM = ("vim", "mambar")  # families with a selective scan

METHODS.add("svp", "svp_bench.methods.svp:SVP", "Selective Visual Prompting: token-wise prompts before each block")
METHODS.add("vpt_shallow", "svp_bench.methods.vpt:VPTShallow", "visual prompt tokens inserted once, before block 0")
METHODS.add("vpt_deep", "svp_bench.methods.vpt:VPTDeep", "visual prompt tokens, new ones before each block")
METHODS.add("linear", "svp_bench.methods.linear:Linear", "linear probing: the head alone")
METHODS.add("full", "svp_bench.methods.full:Full", "full fine-tuning: everything")
METHODS.add("lora", "svp_bench.methods.lora:LoRA", "low-rank updates of projections or of rows of them; merges away")
METHODS.add("adapter", "svp_bench.methods.adapter:Adapter", "a bottleneck after each sublayer")
METHODS.add("offset", "svp_bench.methods.offset:Offset", "one trained vector for all patch tokens before each block")
METHODS.add("bias", "svp_bench.methods.bias:Bias", "biases of the backbone")
METHODS.add("partial", "svp_bench.methods.partial:Partial", "chosen tensors of the backbone: D, A_log, norm, pos_embed")
METHODS.add("last_blocks", "svp_bench.methods.partial:LastBlocks", "the last blocks of the backbone (partial-k)")
METHODS.add("vp", "svp_bench.methods.pixels:VP", "a trained frame of pixels, added to the image")
METHODS.add("auto_vp", "svp_bench.methods.pixels:AutoVP", "a smaller image, of trained size, in a trained border")
METHODS.add("dam_vp", "svp_bench.methods.dam_vp:DAMVP", "a trained frame of pixels for each cluster of images")
METHODS.add("spt", "svp_bench.methods.spt:SPT", "visual prompt tokens that start as tokens of training images")
METHODS.add("vapt", "svp_bench.methods.vapt:VAPT", "visual prompt tokens computed from the patches of the image")
METHODS.add(
    "affix",
    "svp_bench.methods.affix:Affix",
    "trained tokens in front of each scan, inside the mixer (MambaPEFT)",
    families=SSM,
)
METHODS.add(
    "parallel_adapter",
    "svp_bench.methods.adapter:ParallelAdapter",
    "a bottleneck parallel to the last projection of each sublayer (AdaptFormer, MambaPEFT)",
)
METHODS.add(
    "additional_scan",
    "svp_bench.methods.additional_scan:AdditionalScan",
    "further states in each selective scan (MambaPEFT)",
    families=SSM,
)
METHODS.add("state_offset", "svp_bench.methods.state:StateOffset", "a trained offset of the scan's state", SSM)
METHODS.add("initial_state", "svp_bench.methods.state:InitialState", "a trained state at which the scan starts", SSM)
METHODS.add("prodial", "svp_bench.methods.prodial:ProDiaL", "a block-diagonal and low-rank change of projections")
METHODS.add("memba", "svp_bench.methods.memba:Memba", "a leaky membrane on the gate, and LoRA around the scan", SSM)
METHODS.add("lp_ft", "svp_bench.methods.lp_ft:LPFT", "linear probing, then full fine-tuning")
METHODS.add("sdlora", "svp_bench.methods.sdlora:SDLoRA", "selected states of the scan, and LoRA on out_proj", SSM)
METHODS.add("e2vpt", "svp_bench.methods.e2vpt:E2VPT", "visual prompt tokens with masks, pruned and trained again")

_LAZY = {"Method": "svp_bench.methods.base", "create_model": "svp_bench.methods.build"}

__all__ = ["METHODS", "Method", "create_model", "list_methods"]


def list_methods(backbone: str | None = None) -> list[str]:
    """Return the names of all methods, in the order of registration, or of those that fit a backbone.

    Args:
        backbone: Name of a backbone, e.g. "vim_small_patch16_224"; None for all methods.

    Raises:
        UsageError: If there is no such backbone; names the nearest.
    """
    if backbone is None:
        return METHODS.names()
    from svp_bench.methods.build import family_of

    family = family_of(backbone)
    return [entry.name for entry in METHODS if not entry.families or family in entry.families]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
