"""Bias tuning."""

from __future__ import annotations

from collections.abc import Sequence

from svp_bench.methods.base import check_names
from svp_bench.methods.partial import Partial, tensor_groups
from svp_bench.models import Backbone


class Bias(Partial):
    """Train biases of the backbone and the head.

    Ben Zaken et al., "BitFit", ACL 2022, arXiv:2106.10199; on Vim as in Yoshimura et al., "MambaPEFT", ICLR 2025,
    arXiv:2411.03855, where it is the bias of dt_proj alone, in both directions. See `Partial`.

    Trained parameters without the head, on Vim for width D, inner width E, depth L: 2 E L for dt_proj, 2 E L for
    conv1d, D for patch_embed.

    Args:
        which: Layers with trained biases: on Vim dt_proj, conv1d (both directions each) and patch_embed; on a ViT qkv,
            proj, fc1, fc2, norm1, norm2, norm and patch_embed. null: dt_proj on Vim, all on others.
    """

    def __init__(self, which: Sequence[str] | None = None) -> None:
        super().__init__(["bias"])
        self.which = which if which is None or isinstance(which, str) else list(which)

    def selected(self, model: Backbone) -> Sequence[str]:
        """Return the names of the biases to train."""
        groups = tensor_groups(model)
        if self.which is None:
            return ["dt_proj.bias"] if "dt_proj.bias" in groups else ["bias"]
        known = {name.removesuffix(".bias"): name for name in groups if name.endswith(".bias")}
        if "patch_embed.proj" in known:
            known["patch_embed"] = known.pop("patch_embed.proj")
        check_names("bias", "which", self.which, [*known], "layer with a bias", model.family)
        return [known[name] for name in self.which]
