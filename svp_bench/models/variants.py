"""Register the variants of Vim and Mamba-Reg, and a small ViT, with timm."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from svp_bench.models.mambar import MambaRegister
from svp_bench.models.vim import VisionMamba

_IMAGENET = {
    "num_classes": 1000,
    "input_size": (3, 224, 224),
    "pool_size": None,
    "crop_pct": 0.875,
    "interpolation": "bicubic",
    "fixed_input_size": True,
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "paper_ids": "arXiv:2401.09417",
    "origin_url": "https://github.com/hustvl/Vim",
}
_NANO = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 8, "d_state": 8, "num_classes": 10}
_NANO_CFG = {"input_size": (3, 64, 64), "num_classes": 10, "origin_url": "", "paper_ids": ""}

# name: (arguments of VisionMamba, description, published file on the hub)
_VARIANTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "vim_tiny_patch16_224": (
        {"embed_dim": 192},
        "Vim-tiny: width 192, 6,955,008 parameters without head; 76.1 % on ImageNet-1K.",
        "hustvl/Vim-tiny-midclstok/vim_t_midclstok_76p1acc.pth",
    ),
    "vim_tiny_patch16_stride8_224": (
        {"embed_dim": 192, "stride": 8},
        "Vim-tiny with overlapping patches, 730 tokens; 78.3 % on ImageNet-1K.",
        "hustvl/Vim-tiny-midclstok/vim_t_midclstok_ft_78p3acc.pth",
    ),
    "vim_small_patch16_224": (
        {"embed_dim": 384},
        "Vim-small: width 384, 25,411,584 parameters without head; 80.5 % on ImageNet-1K. SVP's backbone.",
        "hustvl/Vim-small-midclstok/vim_s_midclstok_80p5acc.pth",
    ),
    "vim_small_patch16_stride8_224": (
        {"embed_dim": 384, "stride": 8},
        "Vim-small with overlapping patches, 730 tokens; 81.6 % on ImageNet-1K.",
        "hustvl/Vim-small-midclstok/vim_s_midclstok_ft_81p6acc.pth",
    ),
    "vim_base_patch16_224": (
        {"embed_dim": 768},
        "Vim-base: width 768, 96,829,440 parameters without head; 81.9 % on ImageNet-1K.",
        "hustvl/Vim-base-midclstok/vim_b_midclstok_81p9acc.pth",
    ),
    "vim_nano_patch8_64": (
        _NANO,
        "A small Vim for 64×64 images, demos and tests: width 64, depth 8, state size 8; 293,632 parameters.",
        "",
    ),
}


# name: (arguments of MambaRegister, description, published file on the hub)
_REGISTER_VARIANTS: dict[str, tuple[dict[str, Any], str, str]] = {
    f"mambar_{size}_patch16_224": (
        {"embed_dim": width, "reduction": reduction},
        f"Mamba-Reg-{size}: Vim's blocks of width {width} with 12 register tokens; {accuracy} % on ImageNet-1K.",
        f"Wangf3014/Mamba-Reg/mambar_{size}_patch16_224.pth",
    )
    for size, width, reduction, accuracy in (("small", 384, 2, "81.4"), ("base", 768, 4, "83.0"))
}
_REGISTER_CFG = {
    "crop_pct": 1.0,
    "paper_ids": "arXiv:2405.14858",
    "origin_url": "https://github.com/wangf3014/Mamba-Reg",
}
_VIT_NANO: dict[str, Any] = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 8, "num_classes": 10}
_VIT_NANO |= {"num_heads": 4, "mlp_ratio": 2.0}


def _cfg(file: str, changes: dict[str, Any]) -> dict[str, Any]:
    if not file:
        return {**_IMAGENET, **_NANO_CFG}
    repository, _, name = file.rpartition("/")
    return {**_IMAGENET, **changes, "hf_hub_id": repository, "hf_hub_filename": name, "custom_load": "hf"}


default_cfgs = generate_default_cfgs(
    {
        f"{name}.in1k" if file else name: _cfg(file, changes)
        for variants, changes in ((_VARIANTS, {}), (_REGISTER_VARIANTS, _REGISTER_CFG))
        for name, (_, _, file) in variants.items()
    }
    | {"vit_nano_patch8_64": _cfg("", {})}
)


def _register(kind: type[VisionMamba], name: str, defaults: dict[str, Any], description: str) -> None:
    def create(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        features = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}  # as timm's ViTs
        model: VisionMamba = build_model_with_cfg(
            kind, name, pretrained, feature_cfg=features, **{**defaults, **kwargs}
        )
        return model

    create.__name__ = create.__qualname__ = name
    create.__doc__ = description
    globals()[name] = register_model(create)


for _name, (_defaults, _description, _) in _VARIANTS.items():
    _register(VisionMamba, _name, _defaults, _description)
for _name, (_defaults, _description, _) in _REGISTER_VARIANTS.items():
    _register(MambaRegister, _name, _defaults, _description)


@register_model
def vit_nano_patch8_64(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """Build a small ViT for 64×64 images, the counterpart of `vim_nano_patch8_64`: 284,480 parameters without head."""
    model: VisionTransformer = build_model_with_cfg(
        VisionTransformer, "vit_nano_patch8_64", pretrained, **{**_VIT_NANO, **kwargs}
    )
    return model
