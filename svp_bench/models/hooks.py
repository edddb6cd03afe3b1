"""Hook points of a backbone, the state between its blocks, and checks for parts that a kernel may read.

Letters used for shapes: B batch, L length (tokens), D width (embed_dim), P patches.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from svp_bench.core.errors import ConfigError
from svp_bench.ops import Direction, PromptTerms, add_prompts

_NOTHING: Mapping[object, tuple[int, ...]] = {}  # never changed
_NO_TENSORS: Mapping[str, Tensor] = {}  # never changed


class TokenState(NamedTuple):
    """State between two blocks.

    Attributes:
        hidden: The block input, (B, L, D). Vim: the embedding before block 0, afterwards the previous mixer's output,
            not yet added to the residual stream. ViT: the residual stream.
        residual: Vim's residual stream, (B, L, D), or None before block 0; None for a ViT.
        cls_positions: Positions of the backbone's tokens that are not patches: class, distillation, register tokens.
        prompts: Prompts that the block adds to `hidden`, in one pass with the residual stream. A hook may set them;
            they are added before the next hook is called.
        inserted: Positions of the tokens that each method inserted, by its module. They are left out of the pooling.
        carried: Tensors that the hooks of a block leave for the next block; see `HookPoints.carried`.
    """

    hidden: Tensor
    residual: Tensor | None
    cls_positions: tuple[int, ...]
    prompts: PromptTerms | None = None
    inserted: Mapping[object, tuple[int, ...]] = _NOTHING
    carried: Mapping[str, Tensor] = _NO_TENSORS

    @property
    def cls_index(self) -> int:
        """Return the position of the class token of a backbone with one.

        Raises:
            ValueError: If the backbone has several, or none.
        """
        (index,) = self.cls_positions
        return index

    @property
    def not_patches(self) -> tuple[int, ...]:
        """Return the positions of all tokens that are not patches, in ascending order."""
        return tuple(sorted((*self.cls_positions, *(at for found in self.inserted.values() for at in found))))

    def insert(self, owner: object, tokens: Tensor, positions: Sequence[int]) -> TokenState:
        """Return the state with tokens of a method inserted; later positions move.

        Args:
            owner: The module that inserts, the key of `inserted`.
            tokens: (B, T, D).
            positions: Of the new tokens in the longer sequence, ascending.
        """
        state = self.settled()
        length, count = int(state.hidden.shape[1]), len(positions)  # tracing gives tensors
        new = set(positions)
        old = [at for at in range(length + count) if at not in new]  # old[k]: where token k is now
        rows = dict(zip((*old, *positions), range(length + count), strict=True))
        order = torch.tensor([rows[at] for at in range(length + count)], device=tokens.device)

        def longer(stream: Tensor, added: Tensor) -> Tensor:
            return torch.cat([stream, added.to(stream.dtype)], dim=1).index_select(1, order)

        residual = state.residual
        if residual is not None:
            residual = longer(residual, torch.zeros_like(tokens))
        inserted = {key: tuple(old[at] for at in found) for key, found in state.inserted.items()}
        return TokenState(
            longer(state.hidden, tokens),
            residual,
            tuple(old[at] for at in state.cls_positions),
            None,
            {**inserted, owner: tuple(positions)},
            self.carried,
        )

    def without_inserted(self) -> TokenState:
        """Return the state without the tokens that methods inserted."""
        if not self.inserted:
            return self
        state = self.settled()
        gone = {at for found in self.inserted.values() for at in found}
        rest = [at for at in range(int(state.hidden.shape[1])) if at not in gone]
        index = torch.tensor(rest, device=state.hidden.device)
        residual = None if state.residual is None else state.residual.index_select(1, index)
        at = tuple(rest.index(place) for place in state.cls_positions)
        return TokenState(state.hidden.index_select(1, index), residual, at, carried=state.carried)

    def settled(self, scan_backend: str = "auto") -> TokenState:
        """Return the state with its prompts added to `hidden`."""
        if self.prompts is None:
            return self
        return self._replace(hidden=add_prompts(self.hidden, *self.prompts, backend=scan_backend), prompts=None)

    @property
    def stream(self) -> Tensor:
        """Return the input of the next block, `hidden` + `residual`, (B, L, D), in float32 or wider.

        A hook that only adds may change `hidden` alone; a hook that scales, mixes or projects tokens acts on the sum:
        ``state.with_stream(scale * state.stream)``.
        """
        state = self.settled()
        wide = torch.promote_types(state.hidden.dtype, torch.float32)
        return state.hidden.to(wide) if state.residual is None else state.residual + state.hidden

    @property
    def patch_stream(self) -> Tensor:
        """Return the patch tokens of `stream`, (B, P, D), without class tokens and tokens of methods."""
        others = {*self.not_patches}
        patches = [at for at in range(int(self.hidden.shape[1])) if at not in others]
        return self.stream.index_select(1, torch.tensor(patches, device=self.hidden.device))

    def with_stream(self, stream: Tensor) -> TokenState:
        """Return the state with the given `stream`, (B, L, D), by changing `hidden`."""
        hidden = stream if self.residual is None else stream - self.residual
        return self._replace(hidden=hidden.to(self.hidden.dtype), prompts=None)


class Projection(NamedTuple):
    """Rows of a linear projection, or of its copies, that a low-rank update may act on.

    Attributes:
        points: Linear hook points: one, or one for each scan direction.
        start: First row (output channel).
        stop: Row after the last.
        in_features: Columns (input channels).
        on_weight: Whether an update changes the weight; otherwise the output, where dropout is possible.
    """

    points: tuple[str, ...]
    start: int
    stop: int
    in_features: int
    on_weight: bool = False


class ScanInputs(NamedTuple):
    """What the bidirectional scan of a block reads: both directions, and the gate z (B, L, E) before its SiLU."""

    forward: Direction
    backward: Direction
    z: Tensor


ImageHook = Callable[[Tensor], Tensor]
TokenHook = Callable[[int, TokenState], TokenState]
LinearHook = Callable[[Tensor, Tensor], Tensor]
TensorHook = Callable[[Tensor], Tensor]
ScanHook = Callable[[ScanInputs, Tensor], Tensor]


_Hook = TypeVar("_Hook", bound=Callable[..., Tensor])


def changes_shape(hook: _Hook) -> _Hook:
    """Mark a hook that returns another shape than it gets: it runs after all others at its hook point."""
    hook.__dict__["changes_shape"] = True
    return hook


def _add(hooks: list[Any], hook: object) -> None:
    hooks.append(hook)
    hooks.sort(key=lambda one: getattr(one, "changes_shape", False))


class HookPoints:
    """Hook points of a backbone, empty by default.

    A hook is a module of the adapter, a method of one, or a function. A deep copy of the model gets its own hooks:
    modules and methods follow their owner, and the closure of a function is copied. A hook must not read modules or
    trained tensors from global variables.

    Args:
        depth: Number of blocks.
        linear_names: Linear projections of each block that hooks may act on.
        tensor_names: Tensors of each block that hooks may change.
        has_scan: Whether the blocks have a selective scan.

    Attributes:
        images: `f(images) -> images`, called on the normalised images (B, 3, H, W).
        tokens: `f(layer, state) -> state`, called before each block in the order of registration. See
            `TokenState.stream`.
        patch_embed: `f(images, y) -> y`, called after the patch embedding of images (B, 3, H, W), before class token
            and positions: may change its output y (B, P, D).
        linear: `f(x, y) -> y` by (layer, name of `linear_names`): may change the output y of a projection of x, bias
            included, also in place.
        tensor: `f(w) -> w` by (layer, name of `tensor_names`): may change a tensor that a projection, the convolution
            or the scan reads. Refused if the part with the tensor is not plain.
        scan: `f(inputs, y) -> y` by layer: may change the gated output y (B, L, E) of the scan.
        first_tokens: The first block whose input a token hook may change; before it none is called.
        not_patches: Positions of the tokens that are not patches, in the block that runs now: for linear hooks.
        carried: Tensors by name that hooks of the block that runs now may read, change, and leave for the next block.
            Empty before block 0; part of the state between blocks, so that gradient checkpointing finds them again.
        scan_backend: The model's scan backend, for operations of methods.
    """

    def __init__(
        self,
        depth: int = 1,
        linear_names: Sequence[str] = (),
        tensor_names: Sequence[str] = (),
        has_scan: bool = False,
    ) -> None:
        self.depth = depth
        self.linear_names, self.tensor_names, self.has_scan = tuple(linear_names), tuple(tensor_names), has_scan
        self.scan_backend = "auto"
        self.not_patches: tuple[int, ...] = ()
        self.carried: dict[str, Tensor] = {}
        self.images: list[ImageHook] = []
        self.tokens: list[TokenHook] = []
        self.first_tokens = depth
        self.patch_embed: list[LinearHook] = []
        self.linear: dict[tuple[int, str], list[LinearHook]] = defaultdict(list)
        self.tensor: dict[tuple[int, str], list[TensorHook]] = defaultdict(list)
        self.scan: dict[int, list[ScanHook]] = defaultdict(list)

    def on_images(self, hook: ImageHook) -> None:
        """Pass the normalised images through `hook` before the patch embedding."""
        self.images.append(hook)

    def on_tokens(self, hook: TokenHook, first: int = 0) -> None:
        """Call `hook` before each block from `first` on; the blocks before can be computed once for all epochs.

        Raises:
            ValueError: If there is no such block.
        """
        self._check_layer(first)
        self.tokens.append(hook)
        self.first_tokens = min(self.first_tokens, first)

    def on_patch_embed(self, hook: LinearHook) -> None:
        """Call `hook` after the patch embedding."""
        self.patch_embed.append(hook)

    def on_linear(self, layer: int, name: str, hook: LinearHook) -> None:
        """Call `hook` after the projection `name` of block `layer`.

        Raises:
            ValueError: If there is no such block.
            ConfigError: If there is no such projection.
        """
        self._check_layer(layer)
        self._check_name("linear projection", name, self.linear_names)
        _add(self.linear[layer, name], hook)

    def on_tensor(self, layer: int, name: str, hook: TensorHook) -> None:
        """Pass the tensor `name` of block `layer` through `hook` before it is used.

        Raises:
            ValueError: If there is no such block.
            ConfigError: If there is no such tensor.
        """
        self._check_layer(layer)
        self._check_name("tensor", name, self.tensor_names)
        _add(self.tensor[layer, name], hook)

    def on_scan(self, layer: int, hook: ScanHook) -> None:
        """Call `hook` after the selective scan of block `layer`.

        Raises:
            ValueError: If there is no such block.
            ConfigError: If the backbone has no selective scan.
        """
        self._check_layer(layer)
        if not self.has_scan:
            raise ConfigError("this backbone has no selective scan; its hook points are images, tokens and projections")
        _add(self.scan[layer], hook)

    def remove(self, owner: nn.Module) -> None:
        """Remove the hooks that belong to `owner`: itself, its submodules, and methods of these."""
        parts = {id(module) for module in owner.modules()}
        for hooks in self.hook_lists():
            hooks[:] = [hook for hook in hooks if id(getattr(hook, "__self__", hook)) not in parts]
        if not self.tokens:
            self.first_tokens = self.depth

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Call no hook inside a `with` block: the model is the backbone without a method."""
        stored = [(hooks, list(hooks)) for hooks in self.hook_lists()]
        try:
            for hooks, _ in stored:
                hooks.clear()
            yield
        finally:
            for hooks, before in stored:
                hooks[:] = before

    def hook_lists(self) -> list[list[Any]]:
        """Return the lists of hooks, not copied."""
        by_name: list[list[Any]] = [*self.linear.values(), *self.tensor.values(), *self.scan.values()]
        return [self.images, self.tokens, self.patch_embed, *by_name]

    def __len__(self) -> int:
        return sum(map(len, self.hook_lists()))

    def __bool__(self) -> bool:  # true without hooks too
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> HookPoints:
        made = memo[id(self)] = type(self)(self.depth, self.linear_names, self.tensor_names, self.has_scan)
        made.scan_backend, made.not_patches = self.scan_backend, self.not_patches
        made.images = _copied(self.images, memo)
        made.tokens, made.first_tokens = _copied(self.tokens, memo), self.first_tokens
        made.patch_embed = _copied(self.patch_embed, memo)
        mappings: Any = ((self.linear, made.linear), (self.tensor, made.tensor), (self.scan, made.scan))
        for of, to in mappings:
            to.update({key: _copied(hooks, memo) for key, hooks in of.items()})
        return made

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise ValueError(f"no block {layer}; there are 0..{self.depth - 1}")

    def _check_name(self, kind: str, name: str, allowed: Sequence[str]) -> None:
        if name not in allowed:
            raise ConfigError(f"this backbone has no {kind} {name!r}; there are {', '.join(allowed)}")


class HookedLinear(nn.Linear):
    """A linear layer of a block that calls the hooks of its weight, its bias and its output."""

    points: HookPoints
    layer: int
    name: str

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) → (…, out)."""
        y = F.linear(x, self._tensor("weight", self.weight), self.bias_or_none())
        for hook in self.points.linear.get((self.layer, self.name), ()):
            y = hook(x, y)
        return y

    def bias_or_none(self) -> Tensor | None:
        """Return the bias, changed by its hooks, or None."""
        bias: Tensor | None = self.bias
        return None if bias is None else self._tensor("bias", bias)

    def _tensor(self, leaf: str, value: Tensor) -> Tensor:
        for hook in self.points.tensor.get((self.layer, f"{self.name}.{leaf}"), ()):
            value = hook(value)
        return value


def _copied(value: Any, memo: dict[int, Any]) -> Any:
    """Return a deep copy, closures of functions included, which `copy.deepcopy` shares."""
    if id(value) in memo:
        return memo[id(value)]
    made: Any
    if isinstance(value, FunctionType):
        cells = tuple(CellType() for _ in value.__closure__ or ())
        made = FunctionType(value.__code__, value.__globals__, value.__name__, None, cells)
        memo[id(value)] = made  # before its cells: they may hold the function itself
        functools.update_wrapper(made, value)
        del made.__wrapped__
        made.__defaults__ = _copied(value.__defaults__, memo)
        made.__kwdefaults__ = _copied(value.__kwdefaults__, memo)
        for old, new in zip(value.__closure__ or (), cells, strict=True):
            if old != CellType():  # an empty cell equals an empty cell
                new.cell_contents = _copied(old.cell_contents, memo)
    elif isinstance(value, functools.partial):
        keywords = {key: _copied(part, memo) for key, part in value.keywords.items()}
        made = functools.partial(_copied(value.func, memo), *[_copied(part, memo) for part in value.args], **keywords)
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        made = type(value)(*(_copied(part, memo) for part in value))
    elif type(value) in (list, tuple, set):
        made = type(value)(_copied(part, memo) for part in value)
    elif type(value) is dict:
        made = {key: _copied(part, memo) for key, part in value.items()}
    elif isinstance(value, ModuleType) or (isinstance(value, Tensor) and not value.is_leaf):
        made = value  # not trained, and not copyable
    else:
        made = copy.deepcopy(value, memo)
    return made


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module only runs the forward of `kind`, so that a kernel may read its tensors instead.

    False for subclasses and wrappers (PEFT, quantisation, parametrizations), modules with hooks (pruning and the old
    weight_norm use forward pre-hooks), global module hooks, and a `forward` set on the instance.
    """
    return (
        type(module) is kind
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or module._compiled_call_impl
            or _has_any_global_hook()
        )
        and "forward" not in module.__dict__
    )


_KINDS = {nn.Linear, nn.Conv1d, nn.Conv2d, HookedLinear}


def plain_parameter(root: nn.Module, name: str, place: str = "") -> nn.Parameter:
    """Return the parameter `name` of a plain part of `root`, for methods that change or replace it.

    Args:
        root: A module.
        name: Of the parameter in it.
        place: Where `root` is, for the message, e.g. "layers.0.mixer.in_proj.".

    Raises:
        ConfigError: If the part was replaced or carries a hook, so it may not compute with that parameter.
    """
    owner, _, leaf = name.rpartition(".")
    part = root.get_submodule(owner)
    value = getattr(part, leaf, None)
    if type(part) not in _KINDS or not is_plain(part, type(part)) or not isinstance(value, nn.Parameter):
        raise not_plain(f"{place}{name}", part)
    return value


def not_plain(name: str, part: nn.Module) -> ConfigError:
    """Return the error for a method that changes a tensor of a part that is not plain."""
    what = type(part).__name__
    reason = f"is a {what} with hooks" if type(part) in _KINDS else f"was replaced by a {what}"
    owner, _, leaf = name.rpartition(".")
    return ConfigError(
        f"a method changes {name}, but {owner} {reason} and does not read its {leaf} as the backbone would; undo that "
        "(peft: merge_and_unload; pruning: prune.remove; parametrizations: remove_parametrizations), or use a method "
        "that acts on tokens or outputs"
    )
