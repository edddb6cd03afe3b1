"""Check the promises of a method when it is attached: its hooks, its count, its identity, its copies."""

from __future__ import annotations

import copy
import re
from collections import Counter

import torch
from torch import Tensor, nn

from svp_bench.core.errors import ConfigError, plural
from svp_bench.methods.base import Method
from svp_bench.models import Backbone
from svp_bench.models.backbone import HEAD_PREFIXES

# the name of a parameter after pruning, weight_norm or parametrizations
_DERIVED = re.compile(r"(\.parametrizations)?\.(\w+?)(_orig|_g|_v|\.original[01]?)$")


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def counted_parameters(model: Backbone, method: Method | None = None) -> dict[str, nn.Parameter]:
    """Return the trained parameters that counts speak of, by name: those that train in the method's last stage."""
    method = model.method if method is None else method
    last = method.stages - 1
    return {name: p for name, p in trained_parameters(model).items() if method.trains_in_stage(name, last)}


def trained_shares(model: Backbone) -> list[str]:
    """Return the share of each tensor that trains (in the last stage): adapter, head, and backbone by short names.

    Tensors of several blocks are one entry, e.g. "24 × layers.mixer.D, 100 %".
    """
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        own = name in model.own_parameters
        short = re.sub(r"\.\d+(?=\.)", "", name) if own else name.partition(".")[0]
        groups.setdefault(short, []).append(parameter)
    lines, counted = [], {id(p) for p in counted_parameters(model).values()}
    for short, parameters in groups.items():
        trained = [p for p in parameters if id(p) in counted]
        if not trained:
            continue
        numbers = sum(p.numel() for p in trained)
        share = numbers / sum(p.numel() for p in parameters)
        lines.append(f"{short}: {numbers:,} ({share:.0%} in {len(trained)} of {plural(len(parameters), 'tensor')})")
    return lines


def declares_identity(method: Method) -> bool:
    """Return `identity_at_start` of a method; ConfigError if it is not declared."""
    declared = getattr(method, "identity_at_start", None)
    if not isinstance(declared, bool):
        raise ConfigError(f"the method {type(method).__name__} must declare identity_at_start = True or False")
    return declared


def check_parameters(model: Backbone, method: Method) -> None:
    """Refuse to freeze trained parameters that are not the backbone's own.

    The backbone's own are known by their names, or, inside a wrapper, by their shapes.

    Raises:
        ConfigError: If the method would freeze one; names it.
    """
    blocks = next(name for name, part in model.named_modules() if part is model.blocks_in_order)

    def place_of(name: str) -> str:
        """Return the block that a parameter is in, "" for none."""
        found = re.match(rf"{re.escape(blocks)}\.\d+", name)
        return found[0] if found else ""

    unclaimed = Counter((place_of(name), shape) for name, shape in model.own_parameters.items())
    others: list[tuple[str, nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        known = _DERIVED.sub(r".\2", name)
        if known in model.own_parameters:
            unclaimed[place_of(name), model.own_parameters[known]] -= 1
        elif not name.startswith(HEAD_PREFIXES):
            others.append((name, parameter))
    for name, parameter in others:
        key = place_of(name), tuple(parameter.shape)
        unclaimed[key] -= 1
        if unclaimed[key] < 0 and parameter.requires_grad and not method.trains(name):
            raise ConfigError(
                f"{type(method).__name__} would freeze {name}, which is not a parameter of the backbone; attach the "
                "method first and replace modules after, or accept the name in trains() of your method"
            )


def check_promises(model: Backbone, method: Method) -> None:
    """Check that the hooks of an attached method take effect, and its parameter count.

    Raises:
        ConfigError: If a hook is not read or belongs to a module outside the model, or the count differs.
    """
    name, inside = type(method).__name__, set(model.modules())
    model.check_hooks()
    for hook in (hook for hooks in model.points.hook_lists() for hook in hooks):
        owner = getattr(hook, "__self__", hook)
        if isinstance(owner, nn.Module) and owner not in inside and any(True for _ in owner.parameters()):
            raise ConfigError(
                f"{name}: a hook belongs to a {type(owner).__name__} that is not in the model, so it would be neither "
                "trained nor saved; put it into model.adapter"
            )
    parameters = counted_parameters(model, method)
    counted = sum(p.numel() for key, p in parameters.items() if not key.startswith(HEAD_PREFIXES))
    if (claimed := method.adapter_parameters(model)) != counted:
        raise ConfigError(
            f"{name}: adapter_parameters() returns {claimed}, and {counted} parameters train outside the head; correct "
            "the formula"
        )


def check_identity(model: Backbone, method: Method, before: Tensor | None) -> None:
    """Compare the features of a random image with those before the method was attached, if given.

    Raises:
        ConfigError: If they differ by more than 1e-4 of the largest (2e-2 below float32).
    """
    after = None if before is None else probe_features(model)
    if before is None or after is None:
        return
    change = float((after - before).abs().max() / before.abs().max()) if after.shape == before.shape else float("nan")
    bound = 1e-4 if torch.finfo(model.first_parameter.dtype).bits >= 32 else 2e-2
    if not change <= bound:
        raise ConfigError(
            f"{type(method).__name__}: identity_at_start is declared, and the features of a random image change by "
            f"{change:.2g} of the largest ({bound:g} is allowed); start at zero, or declare identity_at_start = False"
        )


def check_copies(model: Backbone, name: str) -> None:
    """Check that the forward pass of a deep copy reads no trained parameter of the model itself.

    Raises:
        ConfigError: If it does; averages of weights and other copies would silently be wrong.
    """
    own = {id(p): key for key, p in trained_parameters(model).items()}
    if torch.is_inference_mode_enabled() or model.first_parameter.is_meta or model.first_parameter.is_inference():
        return
    try:
        copied = copy.deepcopy(model)
    except Exception:  # whether the model can be copied is not checked here
        return
    with torch.enable_grad(), torch.random.fork_rng(devices=[]):  # a hook may use random numbers
        features = _features(copied)
    queue, seen = [features.grad_fn], set()
    while queue:
        node = queue.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if key := own.get(id(getattr(node, "variable", None))):
            raise ConfigError(
                f"{name}: a deep copy of the model still uses {key} of the original (hooks that read a class, a "
                "global, an attribute of a function …, or sit on modules of the backbone); keep all that hooks read in "
                "model.adapter and register a method of it: points.on_tokens(adapter.add)"
            )
        queue.extend(after for after, _ in node.next_functions)


@torch.no_grad()
def probe_features(model: Backbone) -> Tensor | None:
    """Return the features of one random image (1, D) in float64, without dropout; None on the meta device."""
    return None if model.first_parameter.is_meta else _features(model)


def _features(model: Backbone) -> Tensor:
    weight = model.first_parameter
    noise = torch.randn(1, model.in_chans, *model.image_size, generator=torch.Generator().manual_seed(0))
    modes = [(module, module.training) for module in model.modules()]
    backend = model.scan_backend
    try:
        model.eval()
        if weight.device.type == "cpu" and backend is not None:
            model.set_scan_backend("reference")  # compiles no kernel for a single image
        return model.pooled(model.run_blocks(model.embed(noise.to(weight)))).double()
    finally:
        if backend is not None:
            model.set_scan_backend(backend)
        for module, mode in modes:
            module.training = mode
