"""Partial fine-tuning: train some tensors, or the last blocks, of the backbone itself."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import nn

from svp_bench.methods.base import Method, check_names, check_setting
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES
from svp_bench.models.hooks import is_plain, not_plain

_DIRECTION = re.compile(r"_b(?=\.|_log|$)")  # Vim's backward copies: dt_proj_b.bias, A_b_log, D_b


def block_prefix(model: Backbone) -> str:
    """Return the prefix of the blocks' parameter names, e.g. "layers."."""
    return next(f"{name}." for name, part in model.named_modules() if part is model.blocks_in_order)


def tensor_groups(model: Backbone) -> dict[str, list[str]]:
    """Return the names of the backbone's parameters by short name, in all blocks and both directions.

    The short name in a block is that of the module and the parameter ("dt_proj.bias"), or of the parameter alone ("D");
    outside the blocks it is the whole name ("pos_embed"). In addition "bias" has all biases, and "norm" all parameters
    of norms.
    """
    blocks, groups = block_prefix(model), dict[str, list[str]]()
    norms = tuple(name for name, part in model.named_modules() if "norm" in type(part).__name__.lower())
    for name in model.own_parameters:
        parts = name.split(".")
        short = ".".join(parts[-2:]) if parts[-1] in ("weight", "bias") else parts[-1]
        found = [_DIRECTION.sub("", short) if name.startswith(blocks) else name]
        found += ["bias"] if parts[-1] == "bias" else []
        found += ["norm"] if name.rpartition(".")[0] in norms else []
        for group in found:
            groups.setdefault(group, []).append(name)
    return groups


class Partial(Method):
    """Train tensors of the backbone and the head; freeze the others.

    The partial tuning of Yoshimura et al., "MambaPEFT", ICLR 2025, arXiv:2411.03855: of the class token, the position
    embedding, biases, D, A, or the convolution. There a difference to the pre-trained tensor is trained, so that weight
    decay pulls to the pre-trained value; here the tensor itself, without weight decay.

    Trained parameters without the head: the sizes of the tensors. On Vim, for width D, inner width E, N states,
    convolution width W, depth L, P patches: D for cls_token, (P + 1) D for pos_embed, 2 E L for D, dt_proj.bias and
    conv1d.bias, 2 E N L for A_log, 2 E W L for conv1d.weight, (L + 1) D for norm.

    Args:
        tensors: Short names of `tensor_groups`: that of a parameter in all blocks and both directions, e.g. A_log, D,
            conv1d.weight, dt_proj.bias, qkv.bias; of one outside the blocks, e.g. cls_token, pos_embed; or bias (all
            biases) and norm (all norms). null: D on Vim, norm on other backbones.
    """

    identity_at_start = True
    mergeable = True

    def __init__(self, tensors: Sequence[str] | None = None) -> None:
        self.tensors = tensors if tensors is None or isinstance(tensors, str) else list(tensors)
        self._trained: frozenset[str] = frozenset()

    def selected(self, model: Backbone) -> Sequence[str]:
        """Return the short names of the tensors to train."""
        if self.tensors is None:
            return ["D"] if "D" in tensor_groups(model) else ["norm"]
        return self.tensors

    def _names(self, model: Backbone) -> frozenset[str]:
        groups, selected = tensor_groups(model), self.selected(model)
        check_names(_name(self), "tensors", selected, [*groups], "tensor", model.family)
        names = frozenset(name for group in selected for name in groups[group])
        for name in sorted(names):
            _check_plain(model, name)
        return names

    def attach(self, model: Backbone) -> None:
        """Add nothing; select the tensors."""
        self._trained = self._names(model)

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is one of the tensors or of the head."""
        return name in self._trained or name.startswith(HEAD_PREFIXES)

    def decays(self, name: str) -> bool:
        """Whether weight decay applies: to the head alone."""
        return name.startswith(HEAD_PREFIXES)

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the sizes of the tensors, summed."""
        return sum(model.get_parameter(name).numel() for name in self._names(model))


def _check_plain(model: Backbone, name: str) -> None:
    """Refuse a weight or bias of a part that was replaced or hooked: it may not compute with that parameter."""
    owner, _, leaf = name.rpartition(".")
    part: nn.Module = model
    for step in owner.split(".") if owner else ():
        part = getattr(part, step)
    if leaf in ("weight", "bias"):
        if not is_plain(part, type(part)) or not isinstance(getattr(part, leaf, None), nn.Parameter):
            raise not_plain(name, part)
    elif not isinstance(getattr(part, leaf, None), nn.Parameter):
        raise not_plain(name, part)


def _name(method: Method) -> str:
    return type(method).__name__.lower()


class LastBlocks(Method):
    """Train the last blocks, the norm after them and the head; freeze the others ("partial-k").

    A control: the number of trained parameters is that of whole blocks, without any method. Yosinski et al., "How
    transferable are features in deep neural networks?", NeurIPS 2014, arXiv:1411.1792, compare such splits.

    Trained parameters without the head: those of `count` blocks and of the modules after the last one.

    Args:
        count: Number of blocks.
    """

    identity_at_start = True
    mergeable = True

    def __init__(self, count: int = 1) -> None:
        check_setting("last_blocks", "count", count, 1)
        self.count = count
        self._prefixes: tuple[str, ...] = ()

    def _parts(self, model: Backbone) -> dict[str, nn.Module]:
        check_setting("last_blocks", "count", self.count, range(1, model.depth + 1))
        wanted = {id(part) for part in (*model.blocks_in_order[-self.count :], *model.final_parts)}
        return {f"{name}.": part for name, part in model.named_modules() if id(part) in wanted}

    def attach(self, model: Backbone) -> None:
        """Add nothing; select the blocks."""
        self._prefixes = tuple(self._parts(model))

    def trains(self, name: str) -> bool:
        """Whether the parameter of this name is in the last blocks, after them, or in the head."""
        return name.startswith((*self._prefixes, *HEAD_PREFIXES))

    def adapter_parameters(self, model: Backbone) -> int:
        """Return the number of parameters of the blocks and of the modules after them."""
        return sum(p.numel() for part in self._parts(model).values() for p in part.parameters())
