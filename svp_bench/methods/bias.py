"""Bias tuning."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svp_bench.methods.base import Method, check_names
from svp_bench.models import VisionMamba
from svp_bench.models.hooks import plain_parameter

BIASES = ("dt_proj", "conv1d", "patch_embed")


class Bias(Method):
    """A trained difference on biases of the backbone: b + δ, with δ starting at zero.

    Ben Zaken et al., "BitFit", ACL 2022, arXiv:2106.10199; on Vim as in Yoshimura et al., "MambaPEFT", ICLR 2025,
    arXiv:2411.03855, where it is the bias of dt_proj alone, in both directions. The difference is trained, so that
    weight decay pulls to the pre-trained value. Vim has no other biases.

    Trained parameters without the head, for width D, inner width E, depth L: 2 E L for dt_proj, 2 E L for conv1d, D for
    patch_embed.

    Args:
        which: Layers with trained biases: dt_proj, conv1d (both directions each), patch_embed.
    """

    identity_at_start = True
    mergeable = True

    def __init__(
        self,
        which: Sequence[str] = ["dt_proj"],  # a list as in the method file; never modified
    ) -> None:
        check_names("bias", "which", which, BIASES, "layer with a bias")
        self.which = list(which)

    def _mixer_names(self) -> list[str]:
        return [f"{name}{suffix}" for name in self.which if name != "patch_embed" for suffix in ("", "_b")]

    def attach(self, model: VisionMamba) -> None:
        """Build `adapter.patch_embed.bias` and `adapter.{layer}.{name}.bias`."""
        adapter = nn.ModuleDict()
        if "patch_embed" in self.which:
            on_patches = adapter["patch_embed"] = _OnPatches(model.embed_dim)
            model.points.on_patch_embed(on_patches)
        names = self._mixer_names()
        for layer, mixer in enumerate(model.mixers if names else []):
            adapter[str(layer)] = parts = nn.ModuleDict()
            for name in names:
                part = parts[name] = _OnBias(len(plain_parameter(mixer, f"{name}.bias")))
                model.points.on_tensor(layer, f"{name}.bias", part)
        model.adapter = adapter

    def fold(self, model: VisionMamba) -> None:
        """Add each difference to its bias."""
        assert model.adapter is not None
        for name, delta in model.adapter.named_parameters():
            first, _, rest = name.partition(".")
            owner = model.patch_embed if first == "patch_embed" else model.mixers[int(first)]
            plain_parameter(owner, f"proj.{rest}" if first == "patch_embed" else rest).add_(delta)

    def adapter_parameters(self, model: VisionMamba) -> int:
        """Return 2 E L for each of dt_proj and conv1d, and D for patch_embed."""
        inner = model.mixers[0].A_log.shape[0]
        return len(self._mixer_names()) * inner * model.depth + ("patch_embed" in self.which) * model.embed_dim


class _Difference(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))


class _OnBias(_Difference):
    def forward(self, bias: Tensor) -> Tensor:
        return bias + self.bias


class _OnPatches(_Difference):
    """Adds the difference to the output of the patch embedding, which is equal to changing its bias."""

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        return tokens + self.bias.to(tokens.dtype)
