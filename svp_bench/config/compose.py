"""Layers of YAML → one config, before LightningCLI sees it; every key remembers where it came from.

Lowest first: `configs/base.yaml`, the protocol card's training budget, the task config (the first `--config`), the
method file, the selected config of a search (`--choice`), further `--config` files. The command
line itself is applied by jsonargparse on top. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svp_bench.core.errors import ConfigError, UsageError, nearest, unknown_name
from svp_bench.core.resources import configs_dir
from svp_bench.core.yaml import Node, check_value, read_yaml
from svp_bench.methods import METHODS
from svp_bench.records.record import SearchSummary
from svp_bench.records.selection import Choice, read_choice
from svp_bench.tasks.cards import list_tasks, load_protocol, load_suite, load_task

__all__ = ["Composed", "Flags", "compose", "split_flags"]

DEFAULT_METHOD = "svp"
_NO_TASKS = ("method", "recipes", "search")  # folders of configs/ that hold no task's config
_BACKBONE_KEYS = ("backbone", "checkpoint", "scan_backend")  # of a saved config's `model`, what is not its method's
# The groups of a config. As a whole they would come past the layers, with a method but without its recipe.
_GROUPS = {
    "--model": "--model.learning_rate 1e-4",
    "--data": "--data.batch_size 16",
    "--trainer": "--trainer.max_epochs 10",
}


@dataclass(frozen=True)
class Flags:
    """What the command line says about layers, and the rest of it.

    Attributes:
        configs: The `--config` files, in order.
        method: `--method`: a name, or the path of a method file.
        choice: `--choice`: the frozen choice of a search.
        rest: All other arguments, untouched.
        values: `--key value` pairs of the rest, as text.
    """

    configs: tuple[str, ...]
    method: str | None
    rest: tuple[str, ...]
    values: Mapping[str, str]
    choice: str | None = None

    @property
    def asks_help(self) -> bool:
        """Whether the command line asks for help, which needs no config."""
        return "--help" in self.rest or "-h" in self.rest


@dataclass
class Composed:
    """A composed config.

    Attributes:
        values: The nested config.
        origins: Dotted key of each leaf → "file:line" of the layer that set it.
        method: Name of the method, or of its file.
        choice: The selected config of a search, or None.
        search: The search that selected some of the values, or None.
        notices: Lines for the user: what was overridden by what.
    """

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    method: str = ""
    choice: Choice | None = None
    search: SearchSummary | None = None
    notices: list[str] = field(default_factory=list)

    def get(self, key: str) -> Any:
        """Return the value at a dotted key, or None."""
        node: Any = self.values
        for part in key.split("."):
            if not isinstance(node, Mapping) or part not in node:
                return None
            node = node[part]
        return node

    def merge(self, layer: Mapping[str, Any], origin: Mapping[str, str], name: str = "") -> None:
        """Lay `layer` over the config. A node with another `class_path` replaces the old one whole."""
        self._merge(self.values, layer, origin, "")
        if name:
            self.method = name

    def _merge(self, into: dict[str, Any], layer: Mapping[str, Any], origin: Mapping[str, str], prefix: str) -> None:
        for key, value in layer.items():
            dotted = f"{prefix}{key}"
            old = into.get(key)
            replaced = "class_path" in value and _class_of(value) != _class_of(old) if isinstance(value, dict) else True
            if isinstance(value, dict) and isinstance(old, dict) and not replaced:
                if value:
                    self.origins.pop(dotted, None)  # it was empty, and a leaf, until now
                self._merge(old, value, origin, f"{dotted}.")
                continue
            for gone in [k for k in self.origins if k == dotted or k.startswith(f"{dotted}.")]:
                del self.origins[gone]
            if isinstance(value, dict):
                into[key] = {}
                self._merge(into[key], value, origin, f"{dotted}.")
                if not value:
                    self.origins[dotted] = origin.get(dotted, "")
            else:
                into[key] = value
                self.origins[dotted] = origin.get(dotted, "")


def _class_of(node: Any) -> str | None:
    """The class that a node names; aliases of the package's own (`svp_bench.methods.SVP`) are left to jsonargparse."""
    return node.get("class_path") if isinstance(node, dict) else None


def split_flags(argv: Sequence[str]) -> Flags:
    """Take `--config` and `--method` out of a command line.

    Raises:
        UsageError: If a flag lacks its value, `--method` is given twice, or `--model.method` tries to swap the method.
    """
    configs: list[str] = []
    methods: list[str] = []
    choices: list[str] = []
    rest: list[str] = []
    values: dict[str, str] = {}
    queue = list(argv)
    while queue:
        argument = queue.pop(0)
        name, equals, value = argument.partition("=")
        if name in ("--config", "-c", "--method", "--choice"):
            if not equals:
                if not queue or queue[0].startswith("--"):
                    raise UsageError(f"{name} needs a value: {name} {'FILE' if name != '--method' else 'NAME'}")
                value = queue.pop(0)
            {"--method": methods, "--choice": choices}.get(name, configs).append(value)
            continue
        if name in _GROUPS:
            raise UsageError(f"{name} is set key by key, e.g. {_GROUPS[name]}")
        if name in ("--model.method", "--model.method.class_path"):
            raise UsageError("the method is chosen with --method NAME (or FILE), which brings its recipe along")
        rest.append(argument)
        if name.startswith("--"):
            if not equals and queue and not queue[0].startswith("--"):
                value = queue.pop(0)
                rest.append(value)
            check_value(value, name, ConfigError)
            values[name[2:]] = value
    if len(methods) > 1:
        raise UsageError(f"one run has one method, and --method was given {len(methods)} times: {', '.join(methods)}")
    if len(choices) > 1:
        raise UsageError(f"one run has one choice, and --choice was given {len(choices)} times: {', '.join(choices)}")
    choice = choices[0] if choices else None
    return Flags(tuple(configs), methods[0] if methods else None, tuple(rest), values, choice)


def find_config(name: str) -> Path:
    """Return the file of a `--config`: a path, else a shipped config (`configs/vtab/dtd.yaml`, `vtab/dtd`).

    Raises:
        UsageError: If there is none; names the nearest shipped one.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = configs_dir()
    tail = name.removeprefix("./").removeprefix("configs/")
    for candidate in (shipped / tail, shipped / f"{tail}.yaml"):
        if tail and not Path(tail).is_absolute() and ".." not in Path(tail).parts and candidate.is_file():
            return candidate
    tasks = [file for file in sorted(shipped.glob("*/*.yaml")) if file.parent.name not in _NO_TASKS]
    known = [file.relative_to(shipped).as_posix() for file in tasks]
    form = "configs/{}" if path.suffix else "{}"
    raise unknown_name("config file", name, [form.format(k if path.suffix else k[:-5]) for k in known])


def _config_layer(name: str) -> tuple[Path, dict[str, Any], dict[str, str]]:
    """Return path, values and origins of a `--config`; a task of the user's own needs no file next to its card."""
    task = name.removeprefix("./").removeprefix("configs/").removesuffix(".yaml")
    try:
        path = find_config(name)
    except UsageError:
        if task.count("/") != 1 or task not in list_tasks():
            raise
        card = load_task(task)
        return card.path, {"data": {"task": task}}, {"data.task": f"{card.path}:1"}
    return (path, *_load(path))


def method_layer(name: str) -> tuple[dict[str, Any], dict[str, str], str]:
    """Return the layer, the origins and the name of a `--method`: a registered name, or the path of a method file.

    Raises:
        UsageError: If there is no such method; names the nearest.
        ConfigError: If the file names no method.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"no method file {name!r}; --method takes a name (`svp-bench methods`) or a file")
        label = path.stem
    else:
        entry = METHODS.entry(name)
        label = name
        path = configs_dir() / "method" / f"{name}.yaml"
        if not path.is_file():  # a method that another package registered, without a recipe of its own
            target = entry.target.replace(":", ".")
            return {"model": {"method": {"class_path": target}}}, {"model.method.class_path": f"method {name}"}, label
    values, origins = _load(path)
    if not _method_class(values):
        raise ConfigError(f"{path}: a method file must set model.method.class_path")
    return values, origins, label


def compose(flags: Flags) -> Composed:
    """Compose all layers below the command line.

    Raises:
        UsageError: If a name or file is unknown.
        ConfigError: If a file is not a mapping, or no task is named anywhere.
    """
    composed = Composed()
    composed.merge(*_load(configs_dir() / "base.yaml"))
    files = [_config_layer(name) for name in flags.configs]
    task_name = flags.values.get("data.task") or _last(files, ("data", "task"))
    if not task_name:
        for _, values, origins in files:
            for key in values.get("data") or ():  # a mistyped key is the likelier reason
                if nearest(str(key), ["task"]):
                    place = origins.get(f"data.{key}", "the config")
                    raise unknown_name("config key", f"data.{key}", ["data.task"], where=place, error=ConfigError)
        raise UsageError("no task: give a config, e.g. --config configs/vtab/caltech101.yaml (`svp-bench tasks`)")
    card = load_task(str(task_name))
    suite = load_suite(card.suite)
    protocol = load_protocol(
        str(flags.values.get("data.protocol") or _last(files, ("data", "protocol")) or suite.protocol)
    )
    where = f"{protocol.path}: training"
    composed.merge(dict(protocol.training), dict.fromkeys(_leaves(protocol.training), where))

    task, further = files[:1], files[1:]
    complete = bool(task and _method_class(task[0][1]))
    for path, values, origins in task:
        if complete and flags.method is not None:  # a saved config: its recipe is its method's
            values = {**values, "model": {k: v for k, v in values["model"].items() if k in _BACKBONE_KEYS}}
            composed.notices.append(
                f"of {path} only task, trainer and backbone are kept; --method brings its own recipe"
            )
        composed.merge(values, origins)
    if flags.method is None and complete:
        composed.method = "(as in the config)"
        if flags.choice is not None:
            raise UsageError(f"--choice goes with a task's config and --method, not with a saved config ({task[0][0]})")
    else:
        name = DEFAULT_METHOD if flags.method is None else flags.method
        layer, origins, label = method_layer(name)
        _notice_overrides(composed, layer, task, label)
        composed.merge(layer, origins, label)
        if flags.choice is not None:
            _apply_choice(composed, flags.choice, card.name, label)
    for path, values, origins in further:
        if _method_class(values):
            raise UsageError(f"{path}: a second config names a method; use --method {path} instead of --config")
        composed.merge(values, origins)
    if composed.choice and flags.choice is not None:
        given = {key.replace("model.method.init_args.", "model.method.") for key in flags.values}
        for key in sorted(composed.choice.values):
            if composed.origins.get(key) != flags.choice or key.replace(".init_args.", ".") in given:
                raise UsageError(f"{flags.choice} selected {key}; it cannot be set as well: leave out one of the two")
    return composed


def _load(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    node = read_yaml(path, error=ConfigError)
    if not isinstance(node.children, dict):
        raise ConfigError(f"{path}:1: a config is a mapping of keys, not {node.kind}")
    for name, child in node.children.items():
        if f"--{name}" in _GROUPS and not isinstance(child.children, dict):
            raise child.error(f"{name} is a mapping of keys, not {child.kind}; leave it out if nothing is set")
    model = node.children.get("model")
    method = model.children.get("method") if model and isinstance(model.children, dict) else None
    if method and not isinstance(method.children, dict):
        raise method.error(
            f"model.method is a mapping of class_path and init_args, not {method.kind}; a name goes to --method"
        )
    return node.value, dict(_node_origins(node, ""))


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


def _method_class(values: Mapping[str, Any]) -> str | None:
    model = values.get("model")
    method = model.get("method") if isinstance(model, Mapping) else None
    return _class_of(method)


def _last(files: Sequence[tuple[Path, dict[str, Any], dict[str, str]]], keys: tuple[str, ...]) -> Any:
    found = None
    for _, values, _ in files:
        node: Any = values
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        found = found if node is None else node
    return found


def _notice_overrides(
    composed: Composed,
    layer: Mapping[str, Any],
    task: Sequence[tuple[Path, dict[str, Any], dict[str, str]]],
    label: str,
) -> None:
    """The method's recipe stands above the task config: say so where that changes a value."""
    if not task:
        return
    _, values, origins = task[0]
    for key in _leaves(layer):
        ours = Composed(values=dict(layer)).get(key)
        theirs = Composed(values=values).get(key)
        if key in origins and not key.startswith("model.method") and theirs != ours:
            composed.notices.append(
                f"{key} = {theirs} of {origins[key]} gives way to the recipe of the method {label} ({ours}); "
                f"to keep it, pass --{key} or a second --config"
            )


def _apply_choice(composed: Composed, file: str, task: str, method: str) -> None:
    """Lay the values of a frozen choice over the config.

    Raises:
        UsageError: If there is no such file, or the choice is that of another task or method.
        RecordError: If the file is malformed.
    """
    if not Path(file).is_file():
        raise UsageError(f"no choice file {file!r}; `svp-bench tune` and `svp-bench sweep --search` write them")
    choice = read_choice(file)
    for what, theirs, ours in (("task", choice.task, task), ("method", choice.method, method)):
        if theirs != ours:
            raise UsageError(f"{file} was chosen for the {what} {theirs!r}, not for {ours!r}")
    for key, value in choice.values.items():
        layer: Any = value
        for part in reversed(key.split(".")):
            layer = {part: layer}
        composed.merge(layer, {key: file})
    composed.choice, composed.search = choice, choice.summary()
