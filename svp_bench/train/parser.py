"""From a command line and its composed config to one checked, resolved config, through LightningCLI's parser."""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, Optional, Union, get_args, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse._util import import_object  # the look-up that will instantiate the method
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import loggers as lightning_loggers
from lightning.pytorch import profilers as lightning_profilers
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from svp_bench.config.compose import Composed, Flags, compose
from svp_bench.core.errors import ConfigError, OutOfMemoryError, UsageError, one_line, unknown_name
from svp_bench.data.module import VisionDataModule
from svp_bench.methods import METHODS
from svp_bench.methods.build import input_size
from svp_bench.ops import BACKENDS
from svp_bench.records.code import class_paths, source_files
from svp_bench.records.defaults import clipped_warmup
from svp_bench.records.digests import card_digest, cell_config, config_digest, flat, setting_digest
from svp_bench.records.record import SearchSummary
from svp_bench.records.selection import context_of
from svp_bench.tasks.cards import ProtocolCard, load_protocol, load_suite, load_task
from svp_bench.train.logging import quiet
from svp_bench.train.module import AdaptationModule
from svp_bench.train.oom import is_out_of_memory
from svp_bench.train.optim import warmup_notice

__all__ = ["ConfigCLI", "Resolved", "make_importable", "resolve"]


def _whole_numbers_first() -> None:
    """Let `--trainer.limit_train_batches 1` be one batch, whatever was imported before.

    `typing` keeps one spelling of Optional[Union[int, float]] a process, that of whoever came first. scikit-learn's has
    float first; jsonargparse would then read 1 as 1.0, which means all batches.
    """
    hints = Trainer.__init__.__annotations__
    for name, hint in hints.items():
        kinds = list(get_args(hint))
        if int in kinds and float in kinds and kinds.index(float) < kinds.index(int):
            first, second = kinds.index(float), kinds.index(int)
            kinds[first], kinds[second] = int, float
            hints[name] = Union[tuple(kinds)]  # noqa: UP007  # made of a list


_whole_numbers_first()

_LINKED = {
    "model.num_classes": "it follows from the task's card",
    "model.image_size": "set --data.image_size",
    "model.seed": "set --seed_everything",
    "data.seed": "set --seed_everything",
}
# A null may stand over a number of a lower layer (no gradient clipping), so a saved config keeps it.
_RENAMED = tuple(map(int, metadata.version("jsonargparse").split(".")[:2])) >= (4, 49)
_KEEP_NULLS = {"skip_unset" if _RENAMED else "skip_none": False}
_NOT_SAVED = ("config", "ckpt_path", "weights_only", "verbose", "no_test", "resume")  # of one call, not of the run


@dataclass(frozen=True)
class Resolved:
    """A command line, resolved: what a record will hold of it.

    Attributes:
        config: The resolved config.
        method: The method's name.
        search: The search that selected some of its values, or None.
        seed: The run's seed.
        results_root: Where records go.
        runs_root: Where logs and checkpoints go.
        sources: Digests of the files behind classes that are not shipped, by name; see `source_files`.
        read: The cards and config files that it was made from.
        card_digests: `card_digest` of the "task" and the "protocol" card.
    """

    config: dict[str, Any]
    method: str
    search: SearchSummary | None
    seed: int
    results_root: Path
    runs_root: Path
    sources: Mapping[str, str] = field(default_factory=dict)
    read: tuple[Path, ...] = ()
    card_digests: Mapping[str, str] = field(default_factory=dict)

    @property
    def task(self) -> str:
        """The task's full name."""
        return str(self.config["data"]["task"])

    @property
    def config_digest(self) -> str:
        """Of the cell."""
        return config_digest(self.config)

    @property
    def setting_digest(self) -> str:
        """Of the table row."""
        return setting_digest(self.config, self.search)


def make_importable(flags: Flags) -> None:
    """Let a method's class come from the folder of its file, or from the working directory.

    Behind all else on the path: nothing that is installed is hidden by a file that happens to lie there.
    """
    given = [Path(name) for name in (flags.method, *flags.configs) if name]
    for folder in [*(path.parent for path in given if path.is_file()), Path()]:
        if (place := str(folder.resolve())) not in sys.path:
            sys.path.append(place)


def _hold_enums_and_durations() -> None:
    """Let YAML hold the arguments of Lightning's Timer, as the parser reads them."""
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, value: dumper.represent_str(value.name))
    yaml.SafeDumper.add_representer(
        timedelta, lambda dumper, value: dumper.represent_dict({"seconds": value.total_seconds()})
    )


_hold_enums_and_durations()


class _Done(Exception):  # not an error: all that was asked for is known
    pass


def resolve(flags: Flags, subcommand: str = "fit") -> Resolved:
    """Parse and check a command line, and stop before anything is built: about a sixth of a second.

    Raises:
        UsageError: If a name or file is unknown.
        ConfigError: If a key or value does not fit.
    """

    make_importable(flags)

    class _Resolver(ConfigCLI):
        def before_instantiate_classes(self) -> None:
            raise _Done

    resolver = _Resolver.__new__(_Resolver)
    with quiet(), suppress(_Done):
        resolver.__init__(subcommand, flags)  # type: ignore[misc]  # LightningCLI does all its work there
    return resolver.resolved()


class _Parser(LightningArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(_explain(message)) from None


_WRONG_TYPE = re.compile(
    r"(?:Does not validate against any of the Union subtypes Subtypes: \[(?P<union>.*?)\] Errors: .* Given value: "
    r"|Expected a (?P<one>.*?)\. Got value: )(?P<value>.*)"
)


def _explain(message: str) -> str:
    """Say what jsonargparse says of a wrong value in fewer words: key, what is expected, what was given."""
    text = re.sub(r"^Parser key \"([^\"]+)\":", r"\1:", " ".join(message.split()))
    found = _WRONG_TYPE.search(text)
    if found is None:
        return one_line(text)
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found["union"] or found["one"])
    types = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"\1", types).replace("NoneType", "null")
    return f"{text[: found.start()]}expected {' or '.join(types.rsplit(', ', 1))}, not {found['value']!r}"


class ConfigCLI(LightningCLI):
    """The parsing half of one subcommand: one composed config, every key of every layer checked.

    Args:
        subcommand: fit, validate or test.
        flags: The command line.
    """

    module_type: type[AdaptationModule] = AdaptationModule
    data_type: type[VisionDataModule] = VisionDataModule

    def __init__(self, subcommand: str, flags: Flags) -> None:
        self.command = subcommand
        self.flags = flags
        self.composed: Composed = compose(flags) if not flags.asks_help else Composed()
        text = yaml.safe_dump(self.composed.values, sort_keys=False)
        super().__init__(
            self.module_type,
            self.data_type,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=[subcommand, "--config", text, *flags.rest],
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose errors are ours."""
        parser = _Parser(**{**kwargs, "exit_on_error": False})
        parser.add_argument("-c", "--config", action="config", help="a config file; --method NAME swaps the method")
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there
        """Return the subcommand at hand alone: a parser of each would take most of the start."""
        return {self.command: LightningCLI.subcommands()[self.command]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run needs besides model, data and trainer, and state each fact once."""
        parser.add_argument("--results_root", type=str, default="results", help="where records and tables go")
        parser.add_argument("--runs_root", type=str, default="runs", help="where logs and checkpoints go")
        parser.add_argument(
            "--selected_on",
            type=Optional[Literal["val", "test"]],  # noqa: UP045  # jsonargparse shows it as it stands
            default=None,
            help="where the authors of a published recipe chose its values; recipe files set it, tables mark test",
        )
        parser.add_argument("--no_test", action="store_true", help="train only; the record is unscored")
        parser.add_argument(
            "--resume",
            action="store_true",
            help="go on with the last unfinished run of this setting and seed, from its last checkpoint",
        )
        parser.link_arguments("data.num_classes", "model.num_classes", apply_on="instantiate")
        parser.link_arguments("data.image_size", "model.image_size", apply_on="instantiate")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=_seed)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=_seed)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Check every key of every layer, then let jsonargparse check the values."""
        actions = self._subcommand_parsers[self.command]._actions
        known = {action.dest for action in actions} - {"help", "config"}  # --config is ours: layers do not nest
        for key in self._unknown(self.composed.values, known):
            self._refuse(key, known, self.composed.origins.get(key) or _origin_below(self.composed.origins, key))
        for key in self.flags.values if not self.flags.asks_help else ():
            if not self._fits(key, known):
                self._refuse(key, known, None)
        try:
            self.config = parser.parse_args(args)
        except (ArgumentError, ConfigError) as error:
            text = _explain(str(error))
            if "class_path" in text and "No module named" in text:
                text += " (its module may lie beside the method file, in the working directory, or be installed)"
            key = text.partition(":")[0]
            where = self._origin(key)
            self._check_classes(key, where)
            raise ConfigError(f"{where}: {text}" if where else text) from None
        self._check_values(self.config[self.command])
        self._settle(self.config[self.command])

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint, as Lightning would: ours hold none, and others are read with care."""

    def _origin(self, key: str) -> str | None:
        """Where a config file sets a key, if the command line does not."""
        if any(given == key or given.startswith(f"{key}.") for given in self.flags.values):
            return None
        return self.composed.origins.get(key) or _origin_below(self.composed.origins, key)

    def with_origin(self, text: str) -> str:
        """Put the config line that sets a value before what is said against it, if a file does."""
        found = re.match(r"(?:--)?((?:model|data|trainer)\.\w+) ", text)
        where = self._origin(found[1]) if found else None
        return f"{where}: {text}" if where else text

    def _check_values(self, config: Namespace) -> None:
        """Refuse what Lightning allows and a run here cannot have."""
        seed, epochs = config.seed_everything, config.trainer.max_epochs
        problem = self._null_where_none_fits(config)
        if problem is None and (isinstance(seed, bool) or not 0 <= seed < 2**32):
            problem = "seed_everything", f"is a whole number of 0 to {2**32 - 1}, not {seed}"
        elif problem is None and (epochs is None or epochs < 1):
            given = "null" if epochs is None else epochs
            problem = "trainer.max_epochs", f"is at least 1, not {given}: the schedule needs an end"
        elif problem is None:
            problem = _not_finite(config) or _odd_trainer_value(config.trainer)
        if problem:
            where = self._origin(problem[0])
            raise ConfigError(f"{f'{where}: ' if where else ''}{' '.join(problem)}")

    def _settle(self, config: Namespace) -> None:
        """Put numbers that follow from others into the config: the image size of a backbone, a clipped warm-up."""
        model, data, epochs = config.model, config.data, config.trainer.max_epochs
        self.settled: list[str] = []  # said in the header of a run
        if data.image_size is None and self._protocol(data).image_size is None:
            data.image_size = input_size(model.backbone)
            self.settled.append(
                f"data.image_size is {_size(data.image_size)}, the size that {model.backbone} was trained with; "
                "--data.image_size sets another"
            )
        if model.head == "fresh":
            model.head = None  # the default: one setting has one spelling in records
        warmup = clipped_warmup(model.warmup_epochs, epochs, inherited=self._warmup_is_inherited())
        if warmup < model.warmup_epochs:
            self.settled.append(warmup_notice(model.warmup_epochs, epochs, warmup))
            model.warmup_epochs = warmup

    def _warmup_is_inherited(self) -> bool:
        """Whether the warm-up was set for another number of epochs: neither by a flag nor by the file of the epochs."""
        warmup, epochs = self._origin("model.warmup_epochs"), self._origin("trainer.max_epochs")
        files = [origin and origin.rpartition(":")[0] for origin in (warmup, epochs)]
        return warmup is not None and files[0] != files[1]

    @staticmethod
    def _protocol(data: Namespace) -> ProtocolCard:
        return load_protocol(data.protocol or load_suite(load_task(data.task).suite).protocol)

    def _null_where_none_fits(self, config: Namespace) -> tuple[str, str] | None:
        """Find an argument that is null and may not be: jsonargparse lets it pass."""
        method = config.model.method
        nulls = [key for key in ("seed_everything", "results_root", "runs_root") if config[key] is None]
        for prefix, cls, values in (
            ("model", AdaptationModule, config.model),
            ("data", VisionDataModule, config.data),
            ("model.method.init_args", import_object(method.class_path), method.get("init_args") or Namespace()),
        ):
            for name, value in vars(values).items():
                if value is None and f"{prefix}.{name}" not in _LINKED and not _takes_null(cls, name):
                    nulls.append(f"{prefix}.{name}")
        return (nulls[0], "may not be null; leave it out for its default") if nulls else None

    def _check_classes(self, key: str, where: str | None) -> None:
        """Report what is wrong with a class of the trainer, where jsonargparse says no more than that something is.

        Raises:
            ConfigError: If a class or argument is unknown (names the nearest), or a needed one is missing.
        """
        modules = {"trainer.callbacks": lightning_callbacks, "trainer.logger": lightning_loggers}
        modules |= {"trainer.profiler": lightning_profilers}
        if key not in modules:
            return
        kind = key.removeprefix("trainer.").removesuffix("s")
        layers = self.composed.get(key)
        entries = [*layers] if isinstance(layers, list) else [layers]
        flags = self.flags.values
        if given := flags.get(key) or flags.get(f"{key}+"):
            prefix = f"{key}."
            values = {name.removeprefix(prefix): value for name, value in flags.items() if name.startswith(prefix)}
            with suppress(yaml.YAMLError):
                read = yaml.safe_load(given)
                read = {"class_path": read} if isinstance(read, str) else read
                for one in read if isinstance(read, list) else [read]:
                    entries.append(
                        {**one, "init_args": {**one.get("init_args", {}), **values}} if isinstance(one, dict) else one
                    )
        elif any(name.startswith(f"{key}.") for name in flags) and not any(entries):
            raise ConfigError(f"{key}: an argument without a class; name it first, e.g. --{key}+=CLASS")
        for entry in entries:
            self._check_class(kind, key, modules[key], entry, where)

    def _check_class(self, kind: str, key: str, module: Any, entry: Any, where: str | None) -> None:
        entry = {"class_path": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("class_path"), str):
            return
        path = str(entry["class_path"])
        named = {name: getattr(module, name) for name in module.__all__}
        if "." not in path and path not in named:
            raise unknown_name(kind, path, named, where=where or key, error=ConfigError)
        try:
            cls = named[path] if path in named else import_object(path)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{where or key}: cannot import the {kind} {path!r} ({error})") from None
        parameters = inspect.signature(cls).parameters
        given = entry.get("init_args") or {}
        if not any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
            for name in given:
                if name.partition(".")[0] not in parameters:
                    text = f"argument of the {kind} {path}"
                    raise unknown_name(text, name, parameters, where=where or key, error=ConfigError)
        for name, one in parameters.items():
            if one.default is one.empty and one.kind not in (one.VAR_KEYWORD, one.VAR_POSITIONAL) and name not in given:
                raise ConfigError(f"{where or key}: the {kind} {path} needs {name}; give --{key}.{name} VALUE")

    def instantiate_classes(self) -> None:
        """Build model, data and trainer; what a class of the trainer refuses is one line."""
        try:
            super().instantiate_classes()
        except (MisconfigurationException, ValueError) as error:  # jsonargparse makes the one the other
            if isinstance(error, ValueError) and "Does not validate against" not in str(error):
                raise
            text = re.sub(r".*Errors:(.*)Given value.*", r"\1", " ".join(str(error).split()))
            raise ConfigError(f"Lightning refuses these trainer settings: {one_line(text)}") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise OutOfMemoryError(
                f"the model does not fit into memory ({one_line(str(error))}); its size follows from model.backbone, "
                "data.image_size, model.head_hidden and the settings of the method"
            ) from None

    def _fits(self, key: str, known: set[str]) -> bool:
        """Whether a dotted key names an argument or something inside one (the method's own arguments apart)."""
        if key.endswith("+"):  # appends to a list
            return key[:-1] in ("trainer.callbacks", "trainer.logger", "trainer.plugins")
        if key in _LINKED:
            return False
        if key.startswith("model.method."):
            tail = key.removeprefix("model.method.").removeprefix("init_args.")
            return tail in ("class_path", "init_args") or tail.split(".")[0] in self._method_arguments()
        if key in known:
            return True
        return any(key.startswith(f"{name}.") for name in known if name.count(".") == 1 and name != "model.method")

    def _method_arguments(self) -> list[str]:
        class_path = self.composed.get("model.method.class_path")
        origin = self.composed.origins.get("model.method.class_path", "the config")
        try:
            return list(inspect.signature(import_object(str(class_path))).parameters)
        except (ImportError, AttributeError, ValueError, TypeError) as error:
            raise ConfigError(f"{origin}: cannot import the method {class_path!r} ({error})") from None
        except Exception as error:  # what somebody's module raises while it is imported, a SyntaxError for one
            where = f"{error.filename}:{error.lineno}: " if isinstance(error, SyntaxError) else ""
            text = error.msg if isinstance(error, SyntaxError) else error
            raise ConfigError(
                f"{origin}: the module of the method {class_path!r} fails: {where}{type(error).__name__}: {text}"
            ) from None

    def _unknown(self, values: Mapping[str, Any], known: set[str], prefix: str = "") -> Iterator[str]:
        for name, value in values.items():
            key = f"{prefix}{name}"
            group = any(k.startswith(f"{key}.") for k in known) and key not in ("model.method",)
            if key == "model.method" and isinstance(value, Mapping):
                for part, inner in value.items():
                    if part not in ("class_path", "init_args"):
                        yield f"{key}.{part}"
                    elif part == "init_args" and isinstance(inner, Mapping):
                        yield from (f"{key}.init_args.{k}" for k in inner if not self._fits(f"{key}.{k}", known))
            elif group and isinstance(value, Mapping):
                yield from self._unknown(value, known, f"{key}.")
            elif not self._fits(key, known):
                yield key

    def _refuse(self, key: str, known: set[str], where: str | None) -> None:
        if key in _LINKED:
            text = f"{key} is not set by hand: {_LINKED[key]}"
            raise ConfigError(f"{where}: {text}" if where else text)
        if key.startswith("model.method."):
            name = key.rsplit(".", 1)[-1]
            if where and name in self._method_arguments():
                raise ConfigError(f"{where}: model.method.{name} belongs below model.method.init_args")
            method = self.composed.method
            raise unknown_name(
                f"argument of the method {method}", name, self._method_arguments(), where=where, error=ConfigError
            )
        names = [k for k in known if k not in _LINKED]
        kind = "config key" if where else "argument"
        listing = f"svp-bench {self.command} --help"
        raise unknown_name(kind, key, names, where=where, listing=listing, error=ConfigError)

    # --- what is resolved ---------------------------------------------------------------------------------------------

    def resolved(self) -> Resolved:
        """Return the config as a record will hold it."""
        config = self.config[self.command]
        _resolve_precision(config.trainer)
        config.trainer.use_distributed_sampler = False  # the data module's samplers divide the work
        if config.model.scan_backend != "auto":
            BACKENDS.entry(config.model.scan_backend)
        plain = self._plain_config(config)
        sources = source_files(class_paths(plain))
        self._need_same_context(plain, sources)
        card = load_task(str(plain["data"]["task"]))
        suite = load_suite(card.suite)
        protocol = load_protocol(str(plain["data"].get("protocol") or suite.protocol))
        names = [card.path.parent / card.class_names] if card.class_names else []
        layers = {origin.rpartition(":")[0] for origin in self.composed.origins.values()} - {""}
        return Resolved(
            config=plain,
            method=_method_name(str(plain["model"]["method"]["class_path"])),
            search=self.composed.search,
            seed=int(config.seed_everything),
            results_root=Path(config.results_root),
            runs_root=Path(config.runs_root),
            sources=sources,
            read=(card.path, suite.path, protocol.path, *names, *map(Path, sorted(layers))),
            card_digests={"task": card_digest(card), "protocol": card_digest(protocol)},
        )

    def _need_same_context(self, plain: Mapping[str, Any], sources: Mapping[str, str]) -> None:
        """Refuse a frozen choice that was made for another setting: its values were not chosen for this one."""
        choice = self.composed.choice
        if choice is None:
            return
        seed = plain.get("seed_everything")
        if choice.search_seed not in (None, seed):
            raise UsageError(
                f"{self.flags.choice} was chosen for --seed_everything {choice.search_seed}, not {seed}: each seed of "
                "a nested search has a choice of its own"
            )
        ours, theirs = (
            dict(flat(config))
            for config in (context_of(cell_config(plain), list(choice.values), sources), choice.context)
        )
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if other:
            raise UsageError(
                f"{self.flags.choice} was chosen with {other[0]} = {theirs.get(other[0])}, not {ours.get(other[0])}; "
                "search again for this setting, or leave --choice out"
            )

    def _plain_config(self, config: Namespace) -> dict[str, Any]:
        parser = self._subcommand_parsers[self.command]
        text = parser.dump(
            config,
            skip_link_targets=False,
            skip_validation=True,
            format="yaml",
            **_KEEP_NULLS,
        )
        plain: dict[str, Any] = yaml.safe_load(text)
        for key in _NOT_SAVED:
            plain.pop(key, None)
        for key in _LINKED:  # facts of the card and of seed_everything, not settings
            group, name = key.split(".")
            plain.get(group, {}).pop(name, None)
        return plain


def _not_finite(config: Namespace) -> tuple[str, str] | None:
    """Find a number that is none: no record can hold it."""
    for key, value in vars(config.as_flat()).items():
        for number in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                return key, f"is a finite number, not {number}"
    return None


def _odd_trainer_value(trainer: Namespace) -> tuple[str, str] | None:
    """Find a number that Lightning divides by, or takes for none, without a word."""
    batches, norm = trainer.accumulate_grad_batches, trainer.gradient_clip_val
    if batches < 1:
        return "trainer.accumulate_grad_batches", f"is at least 1, not {batches}"
    if norm is not None and norm < 0:
        return "trainer.gradient_clip_val", f"is 0 or above, or null for no clipping, not {norm}"
    every, most = trainer.check_val_every_n_epoch, trainer.max_steps
    if every is not None and every < 1:
        return "trainer.check_val_every_n_epoch", f"is at least 1, not {every}"
    if most is not None and most != -1 and most < 1:
        return "trainer.max_steps", f"is at least 1, or -1 for no limit, not {most}"
    return None


def _resolve_precision(trainer: Namespace) -> None:
    on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
    if trainer.precision is None:
        trainer.precision = "bf16-mixed" if on_gpu else "32-true"
    if str(trainer.precision) in ("16", "16-mixed", "16-true") and not on_gpu:
        raise ConfigError(
            f"trainer.precision {trainer.precision} needs a GPU; on a CPU use 32-true (or bf16-mixed, slower)"
        )


def _size(size: int | tuple[int, int]) -> str:
    return str(size) if isinstance(size, int) else f"{size[0]}x{size[1]}"


def _method_name(class_path: str) -> str:
    """The registered name of the method's class, else the class's own in lower case."""
    by_target = {entry.target.replace(":", "."): entry.name for entry in METHODS}
    return by_target.get(class_path) or re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", class_path.split(".")[-1]).lower()


def _seed(value: Any) -> int:
    """The seed of data and model; what is no seed at all is refused once everything is parsed."""
    return int(value) if isinstance(value, int) else 0


def _takes_null(cls: type, name: str) -> bool:
    try:
        hint = get_type_hints(cls.__init__).get(name, Any)  # type: ignore[misc]  # a class, no instance
    except NameError:  # a hint of somebody's class that is there for type checkers alone
        return True
    return hint is Any or type(None) in get_args(hint)


def _origin_below(origins: Mapping[str, str], key: str) -> str | None:
    """Where a key that is no leaf came from: the place of its first leaf."""
    return next((where for name, where in origins.items() if name.startswith(f"{key}.")), None)
