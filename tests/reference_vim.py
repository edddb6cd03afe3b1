"""Vision Mamba, SVP and VPT written out a second time, to compare svp_bench with; slow, plain, in any float dtype.

Functions on a state dict with the published names. No class, no import of svp_bench, no fused operation: every flip,
token and step of time is explicit. Sources: Zhu et al., arXiv:2401.09417 (Vim); Yao et al., arXiv:2412.08947 (SVP); Jia
et al., arXiv:2203.12119 (VPT); the released switches of hustvl/Vim.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

State = Mapping[str, Tensor]
# (layer, hidden, residual, place of the class token) → the same three, before the block
BeforeBlock = Callable[[int, Tensor, Tensor | None, int], tuple[Tensor, Tensor | None, int]]


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.logaddexp(x, torch.zeros_like(x))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def patch_tokens(state: State, images: Tensor, stride: int) -> list[Tensor]:
    """Tokens (B, D) of the patches, row by row."""
    weight, bias = state["patch_embed.proj.weight"], state["patch_embed.proj.bias"]
    size = weight.shape[-1]
    tokens = []
    for top in range(0, images.shape[2] - size + 1, stride):
        for left in range(0, images.shape[3] - size + 1, stride):
            patch = images[:, :, top : top + size, left : left + size]
            tokens.append(patch.flatten(1) @ weight.flatten(1).T + bias)
    return tokens


def embed(state: State, images: Tensor, stride: int) -> tuple[Tensor, int]:
    """The sequence (B, P + 1, D) with the class token in the middle and positions added, and where that token is."""
    tokens = patch_tokens(state, images, stride)
    middle = len(tokens) // 2
    tokens.insert(middle, state["cls_token"][0].expand(len(images), -1))
    return torch.stack([token + state["pos_embed"][0, i] for i, token in enumerate(tokens)], dim=1), middle


def one_direction(state: State, mixer: str, suffix: str, x: Tensor, z: Tensor) -> Tensor:
    """Convolution, selective scan and gate over x, z (B, L, E), from the first token to the last."""

    def weight(name: str) -> Tensor:
        return state[f"{mixer}{name}"]

    length = x.shape[1]
    kernel, bias = weight(f"conv1d{suffix}.weight")[:, 0], weight(f"conv1d{suffix}.bias")
    width = kernel.shape[1]
    A = -torch.exp(weight(f"A{suffix}_log"))
    states = A.shape[1]
    x_proj, dt_proj = weight(f"x_proj{suffix}.weight"), weight(f"dt_proj{suffix}.weight")
    rank = dt_proj.shape[1]
    tokens = list(x.unbind(1))
    h = x.new_zeros(len(x), A.shape[0], states)
    out = []
    for t in range(length):
        u = bias.expand_as(tokens[t])
        for k in range(width):
            source = t - (width - 1) + k
            if source >= 0:
                u = u + kernel[:, k] * tokens[source]
        u = silu(u)
        projected = u @ x_proj.T
        dt, B, C = projected[:, :rank], projected[:, rank : rank + states], projected[:, rank + states :]
        delta = softplus(dt @ dt_proj.T + weight(f"dt_proj{suffix}.bias"))
        h = torch.exp(delta[:, :, None] * A) * h + (delta * u)[:, :, None] * B[:, None, :]
        y = (h * C[:, None, :]).sum(dim=-1) + weight(f"D{suffix}") * u
        out.append(y * silu(z[:, t]))
    return torch.stack(out, dim=1)


def mixer(state: State, prefix: str, hidden: Tensor) -> Tensor:
    xz = hidden @ state[f"{prefix}in_proj.weight"].T
    inner = xz.shape[-1] // 2
    x, z = xz[..., :inner], xz[..., inner:]
    forward = one_direction(state, prefix, "", x, z)
    backward = one_direction(state, prefix, "_b", x.flip(1), z.flip(1)).flip(1)
    return (forward + backward) / 2 @ state[f"{prefix}out_proj.weight"].T


def depth_of(state: State) -> int:
    return 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))


def features(
    state: State, images: Tensor, *, stride: int, eps: float = 1e-5, before_block: BeforeBlock | None = None
) -> Tensor:
    """(B, 3, H, W) → (B, D): the class token after the final norm."""
    hidden, cls = embed(state, images, stride)
    residual: Tensor | None = None
    for i in range(depth_of(state)):
        if before_block is not None:
            hidden, residual, cls = before_block(i, hidden, residual, cls)
        residual = hidden if residual is None else residual + hidden
        hidden = mixer(state, f"layers.{i}.mixer.", rms_norm(residual, state[f"layers.{i}.norm.weight"], eps))
    assert residual is not None
    return rms_norm(residual + hidden, state["norm_f.weight"], eps)[:, cls]


def logits(
    state: State, images: Tensor, *, stride: int, eps: float = 1e-5, before_block: BeforeBlock | None = None
) -> Tensor:
    """(B, 3, H, W) → (B, classes)."""
    return (
        features(state, images, stride=stride, eps=eps, before_block=before_block) @ state["head.weight"].T
        + state["head.bias"]
    )


def svp(
    state: State,
    *,
    share_layers: int,
    variant: str = "paper",
    include_cls: bool = False,
    depths: Sequence[int] | None = None,
) -> BeforeBlock:
    """SVP's prompts, one token at a time; which paths there are is read from the names in the state."""
    blocks = sorted({int(n.split(".")[2]) for n in state if n.startswith("adapter.inner.")})
    groups = sorted({int(n.split(".")[2]) for n in state if n.startswith("adapter.cross.")})

    def before_block(i: int, hidden: Tensor, residual: Tensor | None, cls: int) -> tuple[Tensor, Tensor | None, int]:
        if depths is not None and i not in depths:
            return hidden, residual, cls
        group = i // share_layers
        tokens = list(hidden.unbind(1))
        out = list(tokens)
        for t, x in enumerate(tokens):
            if t == cls and not include_cls:
                continue
            if group in groups:
                source = out[t - cls - 1] if variant == "released" and t > cls else x
                generator = f"adapter.cross.{group}."
                prompt = silu(source @ state[f"{generator}weight"].T + state[f"{generator}bias"])
                out[t] = out[t] + state["adapter.alpha"][groups.index(group)] * prompt
            if i in blocks:
                generator = f"adapter.inner.{i}."
                inner = x @ state[f"{generator}down.weight"].T + state[f"{generator}down.bias"]
                prompt = silu(inner @ state[f"{generator}up.weight"].T + state[f"{generator}up.bias"])
                out[t] = out[t] + state["adapter.beta"][blocks.index(i)] * prompt
        return torch.stack(out, dim=1), residual, cls

    return before_block


def vpt(state: State, *, position: str, mode: str | None = None) -> BeforeBlock:
    """VPT on (hidden, residual): shallow if `mode` is None, else deep with that mode."""
    prompts = state["adapter.prompts"]
    length = prompts.shape[1]
    front = -(-length // 2)  # the larger half
    places: list[int] = []

    def arrange(tokens: list[int], cls: int) -> list[int]:
        """The longer sequence: token numbers, and -1, -2, … for the first, second, … prompt."""
        new = [-1 - k for k in range(length)]
        if position == "prefix":
            return new + tokens
        if position == "suffix":
            return tokens + new
        if position == "both":
            return new[:front] + tokens + new[front:]
        if position == "around_cls":
            return tokens[:cls] + new[:front] + [cls] + new[front:] + tokens[cls + 1 :]
        assert position == "spread"
        sequence: list[int] = []
        for number in range(len(tokens) + 1):  # length + 1 stretches of tokens, as even as whole numbers allow
            sequence += [-1 - k for k in range(length) if (k + 1) * len(tokens) // (length + 1) == number]
            sequence += tokens[number : number + 1]
        return sequence

    def before_block(i: int, hidden: Tensor, residual: Tensor | None, cls: int) -> tuple[Tensor, Tensor | None, int]:
        batch = len(hidden)
        if i == 0:
            sequence = arrange(list(range(hidden.shape[1])), cls)
            places[:] = [k for k, what in enumerate(sequence) if what < 0]
            rows = [hidden[:, w] if w >= 0 else prompts[0, -1 - w].expand(batch, -1) for w in sequence]
            return torch.stack(rows, dim=1), None, sequence.index(cls)
        if mode is None:
            return hidden, residual, cls
        assert residual is not None
        rows, stream = list(hidden.unbind(1)), list(residual.unbind(1))
        for k, place in enumerate(places):
            rows[place] = prompts[i, k].expand(batch, -1)
            if mode == "replace":
                stream[place] = torch.zeros_like(stream[place])
        return torch.stack(rows, dim=1), torch.stack(stream, dim=1), cls

    return before_block


def sample(name: str, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """Values for the parameter of this name, the same on every machine; of trained rather than initial statistics.

    The embedding is small (0.02), so that an epsilon of the norm shows; scales that start at zero are not zero.
    """
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float64)
    if name.endswith("_log"):
        value = torch.arange(1, shape[-1] + 1, dtype=torch.float64).log() + 0.2 * noise
    elif name.endswith((".D", ".D_b", "norm.weight", "norm_f.weight")):
        value = 1 + 0.2 * noise
    elif ".dt_proj" in name and name.endswith(".bias"):
        value = noise - 3
    elif name in ("cls_token", "pos_embed", "patch_embed.proj.bias", "adapter.prompts"):
        value = 0.02 * noise
    elif name == "patch_embed.proj.weight":
        value = 0.02 * noise / noise[0].numel() ** 0.5
    elif name in ("adapter.alpha", "adapter.beta"):
        value = 0.3 * noise
    elif len(shape) > 1:
        value = noise / noise[0].numel() ** 0.5
    else:
        value = 0.1 * noise
    return value.float()


def fill(model: nn.Module) -> dict[str, Tensor]:
    """Write sampled values into every parameter, in place, and return them in float64, apart from the model."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(sample(name, parameter.shape))
    return {name: parameter.detach().double().clone() for name, parameter in model.named_parameters()}


def make_images(*shape: int) -> Tensor:
    """Normalised images, the same on every machine."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).float()
