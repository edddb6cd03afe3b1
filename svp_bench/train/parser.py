"""Parse a composed config and its command line into a validated, resolved config with jsonargparse."""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Mapping
from copy import deepcopy
from datetime import timedelta
from enum import Enum
from functools import cache, lru_cache
from importlib import metadata
from typing import Any, Literal, Optional

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch import profilers as lightning_profilers

from svp_bench.config.compose import HYBRID, Composed
from svp_bench.config.keys import DERIVED
from svp_bench.config.resolved import ResolvedConfig as ResolvedConfig  # also of this module
from svp_bench.core.errors import ConfigError, UsageError, nearest, one_line, unknown_name
from svp_bench.core.registry import import_object, make_importable
from svp_bench.data.module import VisionDataModule
from svp_bench.methods import METHODS
from svp_bench.methods.build import input_size
from svp_bench.ops import BACKENDS
from svp_bench.records.code import class_paths, source_files
from svp_bench.records.defaults import clipped_warmup
from svp_bench.records.digests import cell_config, flat
from svp_bench.records.selection import context_of
from svp_bench.tasks.cards import load_protocol, load_suite, load_task
from svp_bench.train.logging import quiet
from svp_bench.train.module import AdaptationModule
from svp_bench.train.optim import warmup_notice

_CLASSES = {
    "trainer.callbacks": ("callback", lightning_callbacks),
    "trainer.logger": ("logger", lightning_loggers),
    "trainer.profiler": ("profiler", lightning_profilers),
}
_FRACTIONS = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "overfit_batches")
_CALL_ONLY = ("config", "ckpt_path", "weights_only", "verbose", "no_test", "resume")  # not part of the config
_SUMMARIES = {"fit": "Adapt a backbone to a task.", "validate": "Score a checkpoint on val.", "test": "Score on test."}
_JSONARGPARSE_4_49 = tuple(map(int, metadata.version("jsonargparse").split(".")[:2])) >= (4, 49)
_DUMPER: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)  # libyaml's are some ten times faster
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_CACHED = 64  # parsed and dumped configs
_PLAIN: dict[str, dict[str, Any]] = {}  # arguments as text, without the task → config
# null may override a value of a lower layer (no gradient clipping), so a saved config has it
_KEEP_NULLS = {"skip_unset" if _JSONARGPARSE_4_49 else "skip_none": False}

# for the arguments of Lightning's Timer
yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(value.name))
yaml.SafeDumper.add_representer(
    timedelta, lambda dumper, value: dumper.represent_dict({"seconds": value.total_seconds()})
)


@cache
def build_parser(subcommand: str) -> ArgumentParser:
    """Build the parser of fit, validate or test."""
    parser = ArgumentParser(
        prog=f"svp-bench {subcommand}", description=_SUMMARIES[subcommand], exit_on_error=False, default_env=False
    )
    parser.add_argument("-c", "--config", action="config", help="config file; --method NAME swaps the method")
    parser.add_argument("--seed_everything", type=int, default=0, help="seed of weights, order and augmentation")
    parser.add_argument("--results_root", type=str, default="results", help="folder of records and tables")
    parser.add_argument("--runs_root", type=str, default="runs", help="folder of logs and checkpoints")
    parser.add_argument(
        "--selected_on",
        type=Optional[Literal["val", "test"]],  # noqa: UP045  # the help shows it as written
        default=None,
        help="where the authors of a published recipe selected its values; recipe files set it, tables mark test",
    )
    parser.add_argument("--no_test", action="store_true", help="train only; the record is unscored")
    parser.add_argument(
        "--resume", action="store_true", help="continue the last unfinished run of this setting and seed"
    )
    added: dict[str, Any] = {"fail_untyped": False, "instantiate": False, "sub_configs": True}
    derived = {name: {key.partition(".")[2] for key in DERIVED if key.startswith(name)} for name in ("model", "data")}
    parser.add_class_arguments(AdaptationModule, "model", skip=derived["model"], **added)
    parser.add_class_arguments(VisionDataModule, "data", skip=derived["data"], **added)
    parser.add_class_arguments(Trainer, "trainer", skip=set(_FRACTIONS), **added)
    for name in _FRACTIONS:  # int first, so that 1 stays one batch; typing may have cached Union[float, int]
        default = inspect.signature(Trainer).parameters[name].default
        text = "number of batches, or share of them as a fraction"
        parser.add_argument(f"--trainer.{name}", type=int | float | None, default=default, help=text)
    loaders = {"model", "datamodule", "dataloaders", "train_dataloaders", "val_dataloaders"}
    parser.add_method_arguments(
        Trainer, subcommand, skip=loaders & {*inspect.signature(getattr(Trainer, subcommand)).parameters}
    )
    return parser


def instantiate(resolved: ResolvedConfig) -> Namespace:
    """Return the arguments of a config with method, callbacks, loggers and plugins built from their class paths.

    Raises:
        ConfigError: If a class refuses its arguments.
    """
    parser = build_parser(resolved.subcommand)
    build = parser.instantiate if _JSONARGPARSE_4_49 else parser.instantiate_classes
    try:
        objects: Namespace = build(resolved.arguments)
    except (MisconfigurationException, ValueError) as error:  # jsonargparse raises ValueError for both
        if isinstance(error, ValueError) and "Does not validate against" not in str(error):
            raise
        text = re.sub(r".*Errors:(.*)Given value.*", r"\1", " ".join(str(error).split()))
        raise ConfigError(f"Lightning refuses these trainer settings: {one_line(text)}") from None
    return objects


@quiet()
def resolve(composed: Composed, subcommand: str = "fit") -> ResolvedConfig:
    """Parse and validate a composed config with its command line.

    Raises:
        UsageError: If a name or file is unknown.
        ConfigError: If a key or value is refused.
    """
    make_importable(composed.flags.method, *composed.flags.configs)
    _refuse_environment(subcommand)
    _check_method_keys(composed)
    data = composed.values.get("data") or {}
    shown = any(flag.startswith("--print_config") for flag in composed.flags.rest)
    anywhere = {**composed.values, "data": {**data, "task": ""}}  # one parse for all tasks of a sweep
    text = yaml.dump(composed.values if shown else anywhere, Dumper=_DUMPER, sort_keys=False)
    try:
        arguments = deepcopy(_parse(subcommand, text, composed.flags.rest))
    except ArgumentError as error:
        raise _explained(str(error), composed) from None
    arguments.data.task = composed.flags.values.get("data.task") or data["task"]
    _check_values(arguments, subcommand, composed)
    notices = _set_derived(arguments, composed)
    _resolve_precision(arguments.trainer)
    arguments.trainer.use_distributed_sampler = False  # the data module's samplers divide the work
    if arguments.model.scan_backend != "auto":
        BACKENDS.entry(arguments.model.scan_backend)
    config = _plain(arguments, subcommand)
    sources = source_files([*class_paths(config), *_hybrid_classes(config)])
    _check_selected_config(composed, config, sources)
    method = _method_name(config)
    roots = arguments.results_root, arguments.runs_root
    return ResolvedConfig.of(composed, subcommand, config, method, roots, sources, arguments, notices)


@lru_cache(maxsize=_CACHED)
def _parse(subcommand: str, config: str, flags: tuple[str, ...]) -> Namespace:
    """Parse the text of a config and the flags on top of it."""
    arguments: Namespace = build_parser(subcommand).parse_args(["--config", config, *flags])
    return arguments


def _plain(arguments: Namespace, subcommand: str) -> dict[str, Any]:
    """Return arguments as the plain values of a config."""
    task, arguments.data.task = arguments.data.task, ""
    key = f"{subcommand} {arguments}"
    arguments.data.task = task
    if key not in _PLAIN:
        dumped = build_parser(subcommand).dump(arguments, skip_validation=True, format="yaml", **_KEEP_NULLS)
        _PLAIN[key] = yaml.load(dumped, Loader=_LOADER)
        while len(_PLAIN) > _CACHED:
            del _PLAIN[next(iter(_PLAIN))]
    config = {key: value for key, value in deepcopy(_PLAIN[key]).items() if key not in _CALL_ONLY}
    config["data"]["task"] = task
    return config


@cache
def _defaults(subcommand: str) -> dict[str, Any]:
    return dict(vars(build_parser(subcommand).get_defaults().as_flat()))


# --- keys -------------------------------------------------------------------------------------------------------------


def _refuse_environment(subcommand: str) -> None:
    """Refuse environment variables of LightningCLI, which svp-bench does not read."""
    prefix = f"PL_{subcommand.upper()}__"
    if found := next((name for name in sorted(os.environ) if name.startswith(prefix)), None):
        flag = found.removeprefix(prefix).lower().replace("__", ".")
        raise UsageError(f"{found} is set, but settings are not read from the environment; unset it, give --{flag}")


def _check_method_keys(composed: Composed) -> None:
    """Check the keys of the method against the arguments of its class.

    Raises:
        ConfigError: If one is unknown; names the nearest.
    """
    method_arguments = _method_arguments(composed)
    given = [(key, where) for key, where in composed.origins.items()] + [(key, None) for key in composed.flags.values]
    for key, where in given:
        if not key.startswith("model.method."):
            continue
        part, _, rest = key.removeprefix("model.method.").partition(".")
        name = rest.partition(".")[0] if part == "init_args" else part
        if part == "class_path" or name == "" or (name in method_arguments and (part == "init_args" or not where)):
            continue
        if name in method_arguments:
            raise ConfigError(f"{where}: model.method.{name} belongs below model.method.init_args")
        kind = f"argument of the method {composed.method}"
        raise unknown_name(kind, name, method_arguments, where=where, error=ConfigError)


def _method_arguments(composed: Composed) -> list[str]:
    """Return the names of the arguments of the method's class.

    Raises:
        ConfigError: If the class cannot be imported.
    """
    class_path = composed.get("model.method.class_path")
    origin = composed.origins.get("model.method.class_path", "the config")
    try:
        return list(inspect.signature(import_object(str(class_path))).parameters)
    except (ValueError, TypeError):  # it has no signature; the parser reports it
        return []
    except ImportError as error:
        raise ConfigError(
            f"{origin}: model.method: cannot import {class_path!r} ({error}); its module may lie next to the method "
            "file, in the working directory, or be installed"
        ) from None
    except Exception as error:  # the user's module may raise anything
        where = f"{error.filename}:{error.lineno}: " if isinstance(error, SyntaxError) else ""
        text = f"{where}{type(error).__name__}: {error.msg if isinstance(error, SyntaxError) else error}"
        raise ConfigError(f"{origin}: the module of the method {class_path!r} fails: {text}") from None


# --- values -----------------------------------------------------------------------------------------------------------

_WRONG_TYPE = re.compile(
    r"(?:Does not validate against any of the Union subtypes Subtypes: \[(?P<union>.*?)\] Errors: .* Given value: "
    r"|Expected a (?P<one>.*?)\. Got value: )(?P<value>.*)"
)


def _explained(message: str, composed: Composed) -> ConfigError:
    """Return the error of jsonargparse in one line: origin, key, allowed values, given value, nearest match."""
    text = re.sub(r"^Parser key \"([^\"]+)\":", r"\1:", " ".join(message.split()))
    nested = r"^model\.method: Problem with given class_path '[^']+': Parser key \"([^\"]+)\":"
    text = re.sub(nested, r"model.method.init_args.\1:", text)
    key = text.partition(":")[0]
    where = composed.origin(key)
    if key in _CLASSES and (error := _explained_class(key, text, where)):
        return error
    if found := _WRONG_TYPE.search(text):
        types = found["union"] or found["one"]
        literals = [
            word.strip(" '\"") for part in re.findall(r"Literal\[([^\]]*)\]", types) for word in part.split(",")
        ]
        others = re.sub(r"(?:typing\.)?Literal\[[^\]]*\](?:, )?", "", types)
        others = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", others).replace("NoneType", "null")
        allowed = [*dict.fromkeys(literals), *filter(None, others.split(", "))]
        value = found["value"]
        hit = nearest(value, literals)
        text = f"{text[: found.start()]}expected {', '.join(allowed[:-1])}{' or ' * (len(allowed) > 1)}{allowed[-1]}"
        text += f", not {value!r}{f'; did you mean {hit!r}?' if hit else ''}"
    return ConfigError(one_line(f"{where}: {text}" if where else text))


def _explained_class(key: str, text: str, where: str | None) -> ConfigError | None:
    """Return the error for a class that is unknown, or for its missing or unknown argument."""
    kind, module = _CLASSES[key]
    start = f"{where or key}: "
    if unknown := re.search(r"Expected a dot import path string: (\w+)", text):
        error = unknown_name(kind, unknown[1], module.__all__, where=where or key, error=ConfigError)
        return ConfigError(str(error))
    found = re.search(r"Problem with given class_path '([\w.]+)': (.*?)(?: - |$)", text)
    if found is None:
        return None
    path, problem = found[1], found[2]
    if missing := re.search(r"arguments are required: (\w+)", problem):
        return ConfigError(f"{start}the {kind} {path} needs {missing[1]}; give --{key}.{missing[1]} VALUE")
    if option := re.search(r"Option '([\w.]+)' is not accepted", problem):
        if path.rpartition(".")[2] in ("Callback", "Logger", "Profiler"):
            return ConfigError(f"{start}an argument without a class; name the class first, e.g. --{key}+=CLASS")
        allowed = inspect.signature(import_object(path)).parameters
        return ConfigError(str(unknown_name(f"argument of the {kind} {path}", option[1], allowed, where=where or key)))
    return ConfigError(one_line(f"{start}cannot use the {kind} {path!r} ({problem})"))


def _check_values(arguments: Namespace, subcommand: str, composed: Composed) -> None:
    """Refuse values that Lightning accepts but svp-bench does not.

    Raises:
        ConfigError: If there is one.
    """
    trainer = arguments.trainer
    defaults = {**_defaults(subcommand)}
    method = import_object(arguments.model.method.class_path)
    for name, parameter in inspect.signature(method).parameters.items():
        defaults[f"model.method.init_args.{name}"] = parameter.default
    problems: list[tuple[str, str]] = []
    for key, value in vars(arguments.as_flat()).items():
        if value is None and defaults.get(key) is not None and not key.startswith("trainer."):
            problems.append((key, "may not be null; leave it out for its default"))
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                problems.append((key, f"is a finite number, not {number}"))
    for name, least, note in (
        ("max_epochs", 1, " (the schedule needs an end)"),
        ("accumulate_grad_batches", 1, ""),
        ("gradient_clip_val", 0, ", or null for no clipping"),
        ("check_val_every_n_epoch", 1, ""),
    ):
        value = trainer[name]
        if (value is None and name == "max_epochs") or (value is not None and value < least):
            given = "null" if value is None else value
            problems.append((f"trainer.{name}", f"is at least {least}{note}, not {given}"))
    if trainer.max_steps != -1 and trainer.max_steps < 1:
        problems.append(("trainer.max_steps", f"is at least 1, or -1 for no limit, not {trainer.max_steps}"))
    if not 0 <= (arguments.seed_everything or 0) < 2**32:
        seed = arguments.seed_everything
        problems.append(("seed_everything", f"is a whole number of 0 to {2**32 - 1}, not {seed}"))
    for key, text in problems[:1]:
        where = composed.origin(key)
        raise ConfigError(f"{f'{where}: ' if where else ''}{key} {text}")


def _set_derived(arguments: Namespace, composed: Composed) -> list[str]:
    """Set derived values: transform, image size and warm-up. Return the notices."""
    model, data, epochs = arguments.model, arguments.data, arguments.trainer.max_epochs
    notices: list[str] = []
    protocol = load_protocol(data.protocol or load_suite(load_task(data.task).suite).protocol)
    data.transform.resize = data.transform.resize or protocol.resize
    data.transform.interpolation = data.transform.interpolation or protocol.interpolation
    if data.image_size is None and protocol.image_size is not None:
        data.image_size = protocol.image_size
    elif data.image_size is None:
        size = data.image_size = input_size(model.backbone)
        shown = size if isinstance(size, int) else f"{size[0]}x{size[1]}"
        notices.append(
            f"data.image_size is {shown}, the size that {model.backbone} was trained with; --data.image_size sets "
            "another"
        )
    origins = composed.origin("model.warmup_epochs"), composed.origin("trainer.max_epochs")
    files = [origin and origin.rpartition(":")[0] for origin in origins]
    # the warm-up is inherited if neither a flag nor the file that sets max_epochs sets it
    warmup = clipped_warmup(model.warmup_epochs, epochs, inherited=origins[0] is not None and files[0] != files[1])
    if warmup < model.warmup_epochs:
        notices.append(warmup_notice(model.warmup_epochs, epochs, warmup))
        model.warmup_epochs = warmup
    return notices


def _resolve_precision(trainer: Namespace) -> None:
    on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
    if trainer.precision is None:
        trainer.precision = "bf16-mixed" if on_gpu else "32-true"
    if str(trainer.precision) in ("16", "16-mixed", "16-true") and not on_gpu:
        raise ConfigError(
            f"trainer.precision {trainer.precision} needs a GPU; on a CPU use 32-true (or bf16-mixed, slower)"
        )


def _check_selected_config(composed: Composed, config: Mapping[str, Any], sources: Mapping[str, str]) -> None:
    """Refuse a selected config whose values were selected with other settings.

    Raises:
        UsageError: If the seed or another value differs.
    """
    selected, file = composed.selected, composed.flags.selected_config
    if selected is None:
        return
    seed = config.get("seed_everything")
    if selected.search_seed not in (None, seed):
        raise UsageError(
            f"{file} was selected for --seed_everything {selected.search_seed}, not {seed}: "
            "in a nested search each seed has its own"
        )
    ours = dict(flat(context_of(cell_config(config), list(selected.values), sources)))
    theirs = dict(flat(selected.todays_context))
    other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
    if other:
        raise UsageError(
            f"{file} was selected with {other[0]} = {theirs.get(other[0])}, not {ours.get(other[0])}; search again for "
            "this setting, or leave --selected_config out"
        )


def _hybrid_parts(config: Mapping[str, Any]) -> list[str]:
    """Return the names of the methods of a hybrid; [] for another method."""
    method = config["model"]["method"]
    return [*method["init_args"]["parts"]] if method["class_path"] == HYBRID else []


def _hybrid_classes(config: Mapping[str, Any]) -> list[str]:
    return [METHODS.entry(name).target.replace(":", ".") for name in _hybrid_parts(config)]


def _method_name(config: Mapping[str, Any]) -> str:
    """Return the registered name of the method's class, else the class's own in lower case; joined for a hybrid."""
    if parts := _hybrid_parts(config):
        return "+".join(parts)
    class_path = str(config["model"]["method"]["class_path"])
    by_target = {entry.target.replace(":", "."): entry.name for entry in METHODS}
    return by_target.get(class_path) or re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", class_path.split(".")[-1]).lower()
