"""Compose layers of YAML into one config before it is parsed; every key remembers the file and line that set it.

Lowest first: `configs/base.yaml`, the protocol card's transform and training budget, the task config (the first
`--config`), the method's file, the selected config of a search (`--selected_config`), further `--config` files. The
command line is parsed on top. Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from svp_bench.config.keys import check_keys
from svp_bench.core.errors import ConfigError, UsageError, nearest, unknown_name
from svp_bench.core.resources import configs_dir
from svp_bench.core.yaml import Node, check_value, read_yaml
from svp_bench.methods import METHODS
from svp_bench.records.record import SearchSummary
from svp_bench.records.selection import SelectedConfig, read_selected_config
from svp_bench.tasks.cards import TaskCard, list_tasks, load_protocol, load_suite, load_task

DEFAULT_METHOD = "svp"
HYBRID = "svp_bench.methods.hybrid.Hybrid"
_NO_TASKS = ("method", "recipes", "search")  # folders of configs/ that hold no task's config
_BACKBONE_KEYS = ("backbone", "checkpoint", "scan_backend")  # keys of `model` that stay when the method is swapped
# A group given as a whole would bypass the layers: a method without its recipe.
_GROUPS = {
    "--model": "--model.learning_rate 1e-4",
    "--data": "--data.batch_size 16",
    "--trainer": "--trainer.max_epochs 10",
}
_ONCE = {"--method": "NAME", "--selected_config": "FILE"}


@dataclass(frozen=True)
class Flags:
    """A command line, split into its layers and the rest.

    Attributes:
        configs: The `--config` files, in order.
        method: `--method`: a name, several (a hybrid: "lora,affix"), or the path of a method file.
        rest: All other arguments, unchanged.
        values: `--key value` pairs of the rest, as text.
        selected_config: `--selected_config`: the selected config of a search.
    """

    configs: tuple[str, ...]
    method: str | None
    rest: tuple[str, ...]
    values: Mapping[str, str]
    selected_config: str | None = None


class Layer(NamedTuple):
    """One YAML file: its nested values, and "file:line" by dotted key.

    `method` is the value of its key `method`, or of a `model.method` that is a name or a list of names.
    """

    path: Path
    values: dict[str, Any]
    origins: dict[str, str]
    method: str | None = None

    def get(self, key: str) -> Any:
        """Return the value at a dotted key, or None."""
        return _get(self.values, key)


@dataclass
class Composed:
    """A composed config.

    Attributes:
        values: The nested config.
        origins: "file:line" of the layer that set a leaf, by dotted key.
        method: Name of the method, or of its file.
        selected: The selected config of a search, or None.
        search: The search that selected some of the values, or None.
        notices: Lines for the user about values that another layer overrides.
        flags: The command line.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    method: str = ""
    search: SearchSummary | None = None
    selected: SelectedConfig | None = None
    notices: list[str] = field(default_factory=list)
    flags: Flags = Flags((), None, (), {})

    def get(self, key: str) -> Any:
        """Return the value at a dotted key, or None."""
        return _get(self.values, key)

    def origin(self, key: str) -> str | None:
        """Return "file:line" of the layer that set a key, or the first key below it; None if a flag or no layer did."""

        def full(name: str) -> str:  # init_args may be left out in a flag
            return f"{name.replace('.init_args.', '.')}."

        if any(full(given).startswith(full(key)) for given in self.flags.values):
            return None
        below = (where for name, where in self.origins.items() if name.startswith(f"{key}."))
        return self.origins.get(key) or next(below, None)

    def merge(self, layer: Mapping[str, Any], origins: Mapping[str, str]) -> None:
        """Merge a layer on top. A node with another `class_path` replaces the old one as a whole."""
        self._merge(self.values, layer, origins, "")

    def _merge(self, into: dict[str, Any], layer: Mapping[str, Any], origins: Mapping[str, str], prefix: str) -> None:
        for key, value in layer.items():
            dotted, old = f"{prefix}{key}", into.get(key)
            if isinstance(value, dict) and isinstance(old, dict) and _same_class(value, old):
                if value:
                    self.origins.pop(dotted, None)  # it was empty, and a leaf, until now
                self._merge(old, value, origins, f"{dotted}.")
                continue
            for gone in [k for k in self.origins if k == dotted or k.startswith(f"{dotted}.")]:
                del self.origins[gone]
            into[key] = {} if isinstance(value, dict) else value
            if isinstance(value, dict) and value:
                self._merge(into[key], value, origins, f"{dotted}.")
            else:
                self.origins[dotted] = origins.get(dotted, "")


def _same_class(new: Mapping[str, Any], old: Mapping[str, Any]) -> bool:
    return "class_path" not in new or new["class_path"] == old.get("class_path")


def _get(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping):
            return None
        values = values.get(part)
    return values


def _nested(key: str, value: Any) -> Any:
    """Return {"a": {"b": value}} for the key "a.b"."""
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


def split_flags(argv: Sequence[str]) -> Flags:
    """Split a command line into its layers and the rest.

    Raises:
        UsageError: If a flag lacks its value, one is given twice, or `--model.method` tries to swap the method.
    """
    configs: list[str] = []
    once: dict[str, str] = {}
    rest: list[str] = []
    values: dict[str, str] = {}
    queue = list(argv)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c", *_ONCE):
            if not equals:
                if not queue or queue[0].startswith("--"):
                    raise UsageError(f"{name} needs a value: {name} {_ONCE.get(name, 'FILE')}")
                value = queue.pop(0)
            if name in once:
                raise UsageError(f"{name} was given twice: {once[name]}, {value}; a run takes one")
            if name in _ONCE:
                once[name] = value
            else:
                configs.append(value)
            continue
        if name in _GROUPS:
            raise UsageError(f"{name} is set key by key, e.g. {_GROUPS[name]}")
        if name in ("--model.method", "--model.method.class_path"):
            raise UsageError("the method is set with --method NAME (or FILE), which brings its recipe along")
        rest.append(argument)
        if name.startswith("--"):
            if not equals and queue and not queue[0].startswith("--"):
                value = queue.pop(0)
                rest.append(value)
            check_value(value, name, ConfigError)
            values[name[2:]] = value
    return Flags(tuple(configs), once.get("--method"), tuple(rest), values, once.get("--selected_config"))


def find_config(name: str) -> Path:
    """Return the file of a `--config`: a path, else a shipped config (`configs/vtab/dtd.yaml`, `vtab/dtd`).

    Raises:
        UsageError: If there is none; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped, tail = configs_dir(), name.removeprefix("./").removeprefix("configs/")
    for candidate in (shipped / tail, shipped / f"{tail}.yaml"):
        if tail and not Path(tail).is_absolute() and ".." not in Path(tail).parts and candidate.is_file():
            return candidate
    tasks = [file for file in sorted(shipped.glob("*/*.yaml")) if file.parent.name not in _NO_TASKS]
    known = [file.relative_to(shipped).as_posix() for file in tasks]
    raise unknown_name("config file", name, [f"configs/{k}" if path.suffix else k[:-5] for k in known])


def _config_layer(name: str) -> Layer:
    """Return the layer of a `--config`; a task of the user's own needs no file next to its card."""
    task = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    try:
        return _load(find_config(name))
    except UsageError as error:
        if isinstance(error, ConfigError) or task.count("/") != 1 or task not in list_tasks():
            raise
        card = load_task(task)
        return Layer(card.path, {"data": {"task": task}}, {"data.task": f"{card.path}:1"})


def method_layer(name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Return the layer, the origins and the name of a `--method`: registered names, or the path of a method file.

    Several names, "lora+affix", "lora,affix" or "[lora, affix]", are a hybrid with the recipe of the first.

    Raises:
        UsageError: If there is no such method; names the nearest.
        ConfigError: If the file names no method.
    """
    names = [part.strip() for part in re.split("[,+]", name.strip().removeprefix("[").removesuffix("]"))]
    if name.endswith((".yaml", ".yml")):
        names = [name]
    if len(names) > 1:
        return _hybrid_layer(names)
    if names[0] != name:  # a list of one
        return method_layer(names[0])
    if name.endswith((".yaml", ".yml")):
        path, label = Path(name), Path(name).stem
        if not path.is_file() and name.startswith("configs/method/"):  # a shipped one, outside a checkout
            path = configs_dir() / name.removeprefix("configs/")
        if not path.is_file():
            raise UsageError(f"no method file {name!r}; --method takes a name (`svp-bench methods`) or a file")
    else:
        path, label = configs_dir() / "method" / f"{name}.yaml", name
        target = METHODS.entry(name).target.replace(":", ".")
        if not path.is_file():  # a method that another package registered, without a recipe of its own
            return _nested("model.method.class_path", target), {"model.method.class_path": f"method {name}"}, label
    layer = _load(path)
    if not layer.get("model.method.class_path"):
        raise ConfigError(f"{path}: a method file must set model.method.class_path")
    return layer.values, layer.origins, label


def _hybrid_layer(names: Sequence[str]) -> tuple[dict[str, Any], dict[str, str], str]:
    """Return the layer, the origins and the name of a hybrid."""
    for name in names:
        METHODS.entry(name)  # a method file in a hybrid is not supported
        if names.count(name) > 1:
            raise UsageError(f"--method {','.join(names)} names {name} twice")
    layers = [method_layer(name) for name in names]
    recipe, origins, _ = layers[0]
    values = {**recipe, "model": {key: value for key, value in recipe.get("model", {}).items() if key != "method"}}
    parts = {name: _get(one[0], "model.method.init_args") or {} for name, one in zip(names, layers, strict=True)}
    values["model"]["method"] = {"class_path": HYBRID, "init_args": {"parts": parts}}
    origins = {key: where for key, where in origins.items() if not key.startswith("model.method.")}
    for name, (_, own, _) in zip(names, layers, strict=True):
        start = "model.method.init_args."
        origins |= {
            key.replace(start, f"{start}parts.{name}."): where for key, where in own.items() if key.startswith(start)
        }
    return values, origins, "+".join(names)


def compose(flags: Flags, subcommand: str = "fit") -> Composed:
    """Compose all layers below the command line, and check their keys, but those of the method.

    Raises:
        UsageError: If a name or file is unknown.
        ConfigError: If a file is not a mapping, a key is unknown, or no task is named anywhere.
    """
    composed = Composed(flags=flags)
    base = _load(configs_dir() / "base.yaml")
    composed.merge(base.values, base.origins)
    files = [_config_layer(name) for name in flags.configs]
    wanted = next((layer.method for layer in reversed(files) if layer.method is not None), None)
    if flags.method is None and wanted is not None:
        flags = composed.flags = replace(flags, method=wanted)
    random_weights = False  # whether the method file is made for them
    card = load_task(_task_name(flags, files))
    protocol = load_protocol(str(_last(flags, files, "data.protocol") or load_suite(card.suite).protocol))
    composed.merge(protocol.layer, dict.fromkeys(_leaves(protocol.layer), str(protocol.path)))
    task, further = files[0] if files else None, files[1:]
    complete = task is not None and task.get("model.method.class_path") is not None  # a saved config
    if task is not None:
        values = task.values
        if complete and flags.method is not None:  # a saved config's recipe belongs to its method
            values = {**values, "model": {k: v for k, v in values["model"].items() if k in _BACKBONE_KEYS}}
            composed.notices.append(
                f"only task, trainer and backbone of {task.path} are used; --method brings its own recipe"
            )
        composed.merge(values, task.origins)
    if flags.method is None and complete:
        composed.method = "(as in the config)"
        if flags.selected_config is not None:
            raise UsageError(
                f"--selected_config needs a task's config and --method, not the saved config {flags.configs[0]}"
            )
    else:
        layer, origins, composed.method = method_layer(DEFAULT_METHOD if flags.method is None else flags.method)
        if task is not None:
            _notice_overrides(composed, layer, task)
        composed.merge(layer, origins)
        random_weights = _get(layer, "model.checkpoint") == "none"
        if flags.selected_config is not None:
            _merge_selected_config(composed, flags.selected_config, card)
    for one in further:
        if one.get("model.method.class_path"):
            raise UsageError(f"{one.path}: a second config names a method; use --method {one.path} instead")
        composed.merge(one.values, one.origins)
    weights = flags.values.get("model.checkpoint") or composed.get("model.checkpoint")
    if random_weights and weights != "none":
        raise UsageError(
            f"--method {flags.method} is a control with random weights; leave out model.checkpoint {weights}"
        )
    check_keys(composed.values, composed.origins, flags.values, subcommand)
    _refuse_changed_selection(composed)
    return composed


def _task_name(flags: Flags, files: Sequence[Layer]) -> str:
    if name := _last(flags, files, "data.task"):
        return str(name)
    for layer in files:
        for key in layer.values.get("data") or ():  # a mistyped key is the likelier reason
            if nearest(str(key), ["task"]):
                place = layer.origins.get(f"data.{key}", "the config")
                raise unknown_name("config key", f"data.{key}", ["data.task"], where=place, error=ConfigError)
    raise UsageError("no task: give a config, e.g. --config configs/vtab/caltech101.yaml (`svp-bench tasks`)")


def _last(flags: Flags, files: Sequence[Layer], key: str) -> Any:
    """Return the value of a key that counts: the flag's, else that of the last file that has it."""
    given = [value for layer in files if (value := layer.get(key)) is not None]
    return flags.values.get(key) or (given[-1] if given else None)


def _load(path: Path) -> Layer:
    node = read_yaml(path, error=ConfigError)
    if not isinstance(node.children, dict):
        raise ConfigError(f"{path}:1: a config is a mapping of keys, not {node.kind}")
    for name, child in node.children.items():
        if f"--{name}" in _GROUPS and not isinstance(child.children, dict):
            raise child.error(f"{name} is a mapping of keys, not {child.kind}; leave it out if nothing is set")
    values, origins = dict(node.value), dict(_node_origins(node, ""))
    model = node.children.get("model")
    found = {"method": node.children.get("method")}
    if model and isinstance(model.children, dict):
        found["model.method"] = model.children.get("method")
    wanted = None
    for key, method in found.items():
        if method is None or (key == "model.method" and isinstance(method.children, dict)):
            continue
        names = method.value if isinstance(method.value, list) else [method.value]
        if not names or not all(isinstance(name, str) for name in names):
            raise method.error(f"{key} is a method's name or a list of names, not {method.kind}")
        wanted = ",".join(names)
        origins.pop(key)
        if key == "method":
            del values["method"]
        else:
            values["model"] = {name: value for name, value in values["model"].items() if name != "method"}
    return Layer(path, values, origins, wanted)


def _node_origins(node: Node, prefix: str) -> Iterator[tuple[str, str]]:
    if isinstance(node.children, dict) and node.children:
        for key, child in node.children.items():
            yield from _node_origins(child, f"{prefix}.{key}" if prefix else key)
    else:
        yield prefix, f"{node.path}:{node.line}"


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def _notice_overrides(composed: Composed, recipe: Mapping[str, Any], task: Layer) -> None:
    """Note where the method's recipe, which lies above the task config, changes a value of it."""
    for key in _leaves(recipe):
        ours, theirs = _get(recipe, key), task.get(key)
        if key in task.origins and not key.startswith("model.method") and theirs != ours:
            composed.notices.append(
                f"{key} = {theirs} of {task.origins[key]} is replaced by the recipe of the method {composed.method} "
                f"({ours}); to set it, pass --{key} or a second --config"
            )


def _merge_selected_config(composed: Composed, file: str, card: TaskCard) -> None:
    """Merge the values of a selected config.

    Raises:
        UsageError: If there is no such file, or it is of another task or method.
        RecordError: If the file is malformed.
    """
    if not Path(file).is_file():
        raise UsageError(f"no file {file!r}; `svp-bench tune` and `svp-bench sweep --search` write selected configs")
    selected = read_selected_config(file)
    for kind, theirs, ours in (("task", selected.task, card.name), ("method", selected.method, composed.method)):
        if theirs != ours:
            raise UsageError(f"{file} was selected for the {kind} {theirs!r}, not for {ours!r}")
    for key, value in selected.values.items():
        composed.merge(_nested(key, value), {key: file})
    composed.search, composed.selected = selected.summary(), selected


def _refuse_changed_selection(composed: Composed) -> None:
    if composed.selected is None:
        return
    given = {key.replace("model.method.init_args.", "model.method.") for key in composed.flags.values}
    for key in sorted(composed.selected.values):
        if composed.origins.get(key) != composed.flags.selected_config or key.replace(".init_args.", ".") in given:
            raise UsageError(f"{composed.flags.selected_config} sets {key}, which may not be set again; leave out one")
