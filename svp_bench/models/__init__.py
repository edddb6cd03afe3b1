"""The backbones. Importing this package registers them with timm (`timm.create_model("vim_small_patch16_224")`)."""

from svp_bench.models.hooks import Points, TokenState
from svp_bench.models.vim import VisionMamba

__all__ = ["Points", "TokenState", "VisionMamba"]
