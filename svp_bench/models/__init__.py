"""The backbones. Importing this package registers them with timm (`timm.create_model("vim_small_patch16_224")`)."""

import svp_bench.models.variants  # noqa: F401  registers the backbones
from svp_bench.models.hooks import HookPoints, TokenState
from svp_bench.models.vim import VisionMamba

__all__ = ["HookPoints", "TokenState", "VisionMamba"]
