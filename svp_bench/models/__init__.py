"""The backbones. Importing this package registers them with timm (`timm.create_model("vim_small_patch16_224")`)."""

import svp_bench.models.variants  # noqa: F401  registers the backbones
from svp_bench.core.registry import Registry
from svp_bench.models.backbone import Backbone
from svp_bench.models.hooks import HookPoints, TokenState
from svp_bench.models.mambar import MambaRegister
from svp_bench.models.vim import VisionMamba
from svp_bench.models.vit import as_backbone

# Backbones of other packages: callables (num_classes, **arguments) that return a `Backbone` or a VisionTransformer of
# timm. A model that is registered with timm needs no entry.
BACKBONES = Registry("backbone", listing="docs/backbones.md", entry_points="svp_bench.backbones")

__all__ = ["BACKBONES", "Backbone", "HookPoints", "MambaRegister", "TokenState", "VisionMamba", "as_backbone"]
