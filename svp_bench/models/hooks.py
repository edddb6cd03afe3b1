"""Hook points of a backbone, the state between its blocks, and checks for parts that a kernel may read.

Letters used for shapes: B batch, L length (tokens), D width (embed_dim), P patches.
"""

from __future__ import annotations

import copy
import functools
from collections import defaultdict
from collections.abc import Callable
from types import CellType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from svp_bench.core.errors import ConfigError
from svp_bench.ops import PromptTerms, add_prompts

LINEAR_POINTS = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")
TENSOR_POINTS = (
    *(f"{name}.weight" for name in (*LINEAR_POINTS, "conv1d", "conv1d_b")),
    *(f"{name}.bias" for name in ("conv1d", "conv1d_b", "dt_proj", "dt_proj_b")),
    *("A", "A_b", "D", "D_b"),
)


class TokenState(NamedTuple):
    """State between two blocks.

    Attributes:
        hidden: The block input, (B, L, D): the embedding before block 0, afterwards the previous mixer's output, not
            yet added to the residual stream.
        residual: The residual stream, (B, L, D), or None before block 0.
        cls_index: Index of the class token.
        prompts: Prompts that the block adds to `hidden`, in one pass with the residual stream. A hook may set them;
            they are added before the next hook is called.
    """

    hidden: Tensor
    residual: Tensor | None
    cls_index: int
    prompts: PromptTerms | None = None

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

    def with_stream(self, stream: Tensor) -> TokenState:
        """Return the state with the given `stream`, (B, L, D), by changing `hidden`."""
        hidden = stream if self.residual is None else stream - self.residual
        return self._replace(hidden=hidden.to(self.hidden.dtype), prompts=None)


TokenHook = Callable[[int, TokenState], TokenState]
LinearHook = Callable[[Tensor, Tensor], Tensor]
TensorHook = Callable[[Tensor], Tensor]


class HookPoints:
    """Hook points of the backbone, empty by default.

    A hook is a module of the adapter, a method of one, or a function. A deep copy of the model gets its own hooks:
    modules and methods follow their owner, and the closure of a function is copied. A hook must not read modules or
    trained tensors from global variables.

    Attributes:
        tokens: `f(layer, state) -> state`, called before each block in the order of registration. See
            `TokenState.stream`.
        patch_embed: `f(images, y) -> y`, called after the patch embedding of images (B, 3, H, W), before class token
            and positions: may change its output y (B, P, D).
        linear: `f(x, y) -> y` by (layer, name of `LINEAR_POINTS`): may change the output y of a projection of x, bias
            included, also in place.
        tensor: `f(w) -> w` by (layer, name of `TENSOR_POINTS`): may change a tensor that a projection, the convolution
            or the scan reads. Refused if the part with the tensor is not plain.
        first_tokens: The first block whose input a token hook may change; before it none is called.
        scan_backend: The model's scan backend, for operations of methods.
    """

    def __init__(self, depth: int = 1) -> None:
        self.depth = depth
        self.scan_backend = "auto"
        self.tokens: list[TokenHook] = []
        self.first_tokens = depth
        self.patch_embed: list[LinearHook] = []
        self.linear: dict[tuple[int, str], list[LinearHook]] = defaultdict(list)
        self.tensor: dict[tuple[int, str], list[TensorHook]] = defaultdict(list)

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
            ValueError: If there is no such projection.
        """
        self._check_layer(layer)
        if name not in LINEAR_POINTS:
            raise ValueError(f"no linear projection {name!r}; there are {', '.join(LINEAR_POINTS)}")
        self.linear[layer, name].append(hook)

    def on_tensor(self, layer: int, name: str, hook: TensorHook) -> None:
        """Pass the tensor `name` of block `layer` through `hook` before it is used.

        Raises:
            ValueError: If there is no such tensor.
        """
        self._check_layer(layer)
        if name not in TENSOR_POINTS:
            raise ValueError(f"no tensor {name!r}; there are {', '.join(TENSOR_POINTS)}")
        self.tensor[layer, name].append(hook)

    def remove(self, owner: nn.Module) -> None:
        """Remove the hooks that belong to `owner`: itself, its submodules, and methods of these."""
        parts = {id(module) for module in owner.modules()}
        for hooks in self.hook_lists():
            hooks[:] = [hook for hook in hooks if id(getattr(hook, "__self__", hook)) not in parts]
        if not self.tokens:
            self.first_tokens = self.depth

    def hook_lists(self) -> list[list[Any]]:
        """Return the lists of hooks, not copied."""
        return [self.tokens, self.patch_embed, *self.linear.values(), *self.tensor.values()]

    def __len__(self) -> int:
        return sum(map(len, self.hook_lists()))

    def __bool__(self) -> bool:  # true without hooks too
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> HookPoints:
        made = memo[id(self)] = type(self)(self.depth)
        made.scan_backend = self.scan_backend
        made.tokens, made.first_tokens = _copied(self.tokens, memo), self.first_tokens
        made.patch_embed = _copied(self.patch_embed, memo)
        for of, to in ((self.linear, made.linear), (self.tensor, made.tensor)):
            to.update({key: _copied(hooks, memo) for key, hooks in of.items()})
        return made

    def _check_layer(self, layer: int) -> None:
        if not 0 <= layer < self.depth:
            raise ValueError(f"no block {layer}; there are 0..{self.depth - 1}")


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


_KINDS = {nn.Linear, nn.Conv1d, nn.Conv2d}


def plain_parameter(root: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter `name` of a plain part of `root`, for methods that change or replace it.

    Raises:
        ConfigError: If the part was replaced or carries a hook, so it may not compute with that parameter.
    """
    owner, _, leaf = name.rpartition(".")
    part = root.get_submodule(owner)
    value = getattr(part, leaf, None)
    if type(part) not in _KINDS or not is_plain(part, type(part)) or not isinstance(value, nn.Parameter):
        raise not_plain(name, part)
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
