"""`svp-bench fit | validate | test`: LightningCLI over a composed config, and the record at the end."""

from __future__ import annotations

import dataclasses
import inspect
import logging
import math
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import metadata
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
import yaml
from jsonargparse import ArgumentError, Namespace
from jsonargparse._util import import_object  # the look-up that will instantiate the method
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from svp_bench import __version__
from svp_bench.config import Composed, Flags, compose
from svp_bench.data.locate import locate
from svp_bench.data.module import VisionDataModule
from svp_bench.errors import CheckpointError, ConfigError, RecordError, SvpBenchError, UsageError, unknown_name
from svp_bench.methods import METHODS
from svp_bench.methods.build import trained_parameters
from svp_bench.models.checkpoints import load_pickle_safely
from svp_bench.ops import BACKENDS, Choice
from svp_bench.results.digests import cell_config, config_digest, setting_digest
from svp_bench.results.files import (
    check_writable,
    continue_record,
    read_record,
    replace_record,
    write_atomically,
    write_record,
)
from svp_bench.results.record import Correct, Metrics, Parameters, Record, Tuned, new_run_id, timestamp
from svp_bench.train.callbacks import Meter, peak_memory_mib
from svp_bench.train.metrics import Evaluation, describe, write_tables
from svp_bench.train.module import SAVED_KEY, AdaptationModule
from svp_bench.train.provenance import commit_and_dirty, device_name, library_versions
from svp_bench.train.resume import (
    CHECKPOINT,
    AtomicCheckpointIO,
    Found,
    Preempted,
    StepSeeds,
    Stopper,
    find_run,
    locked,
)

__all__ = ["BenchCLI", "run"]

_LINKED = {
    "model.num_classes": "it follows from the task's card",
    "model.image_size": "set --data.image_size",
    "model.seed": "set --seed_everything",
    "data.seed": "set --seed_everything",
}
_RUN_ID = "SVP_BENCH_RUN_ID"
# A null may stand over a number of a lower layer (no gradient clipping), so a saved config keeps it.
_RENAMED = tuple(map(int, metadata.version("jsonargparse").split(".")[:2])) >= (4, 49)
_KEEP_NULLS = {"skip_unset" if _RENAMED else "skip_none": False}
_NOT_SAVED = ("config", "ckpt_path", "weights_only", "verbose", "no_test", "resume")  # of one call, not of the run


def run(verb: str, flags: Flags) -> None:
    """Run one verb.

    Raises:
        SvpBenchError: For everything that a user can mend.
    """
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addFilter(_no_chatter)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    _make_importable(flags)
    on_interrupt = signal.getsignal(signal.SIGINT)
    try:
        with _quiet():
            BenchCLI(verb, flags)
    except SystemExit as stop:
        if stop.code or type(stop) is not SystemExit:  # what Lightning makes of ctrl-C and of SIGTERM
            raise KeyboardInterrupt from None
        raise
    finally:
        logger.removeFilter(_no_chatter)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, on_interrupt)  # Lightning leaves ctrl-C ignored


def _make_importable(flags: Flags) -> None:
    """Let a method's class come from the folder of its file, or from the working directory.

    Behind all else on the path: nothing that is installed is hidden by a file that happens to lie there.
    """
    given = [Path(name) for name in (flags.method, *flags.configs) if name]
    for folder in [*(path.parent for path in given if path.is_file()), Path()]:
        if (place := str(folder.resolve())) not in sys.path:
            sys.path.append(place)


def _no_chatter(record: logging.LogRecord) -> bool:
    """Leave out Lightning's lines about devices that are not there, its advertisements, and what our header says."""
    text = record.getMessage()
    chatter = (
        *("GPU available", "TPU available", "HPU available", "Tip:", "to estimate number of stepping batches"),
        "`weights_only` was not set",  # our reader is strict anyway
    )
    return not any(part in text for part in chatter)


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out warnings of libraries about things that are meant to be so here."""
    shape = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.formatwarning = lambda message, *_, **__: f"Warning: {message}\n"
        for pattern in (
            r".*does not have many workers.*",  # training pictures are in memory
            r".*LightningCLI's args parameter.*",  # the config is composed first
            r".*`isinstance\(treespec, LeafSpec\)`.*",  # Lightning 2.6 with torch ≥ 2.9
            r".*The number of training batches .* is smaller than the logging interval.*",
            r".*Checkpoint directory .* exists and is not empty.*",
            r".*GPU available but not used.*",
            r".*in eval mode at the start of training.*",  # frozen parts are
            r".*`LambdaLR`.*lr_scheduler.step.*",
            r".*The dirpath has changed.*",
            r".*functools.lru_cache.*",  # torch.compile, of choices that do not change
        ):
            warnings.filterwarnings("ignore", pattern)
        try:
            yield
        finally:
            warnings.formatwarning = shape


class _Parser(LightningArgumentParser):
    """A parser whose errors are ours."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise ConfigError(_explain(message)) from None


def _one_line(message: str) -> str:
    text = " ".join(message.split())
    return text if len(text) <= 600 else f"{text[:600]} …"


_WRONG_TYPE = re.compile(
    r"(?:Does not validate against any of the Union subtypes Subtypes: \[(?P<union>.*?)\] Errors: .* Given value: "
    r"|Expected a (?P<one>.*?)\. Got value: )(?P<value>.*)"
)


def _explain(message: str) -> str:
    """Say what jsonargparse says of a wrong value in fewer words: key, what is expected, what was given."""
    text = re.sub(r"^Parser key \"([^\"]+)\":", r"\1:", " ".join(message.split()))
    found = _WRONG_TYPE.search(text)
    if found is None:
        return _one_line(text)
    types = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", found["union"] or found["one"])
    types = re.sub(r"(?:typing\.)?Literal\[([^\]]*)\]", r"\1", types).replace("NoneType", "null")
    return f"{text[: found.start()]}expected {' or '.join(types.rsplit(', ', 1))}, not {found['value']!r}"


class BenchCLI(LightningCLI):
    """One verb over one composed config.

    Args:
        verb: fit, validate or test.
        flags: The command line.
    """

    def __init__(self, verb: str, flags: Flags) -> None:
        self.verb = verb
        self.flags = flags
        self.composed: Composed = compose(flags) if not flags.asks_help else Composed()
        self.meter = Meter()
        self.stopper: Stopper | None = None
        self.run_id = ""
        self.run_dir = Path()
        self.resumed: Found | None = None
        self.saved_config: dict[str, Any] = {}
        text = yaml.safe_dump(self.composed.values, sort_keys=False)
        super().__init__(
            AdaptationModule,
            VisionDataModule,
            save_config_callback=None,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            args=[verb, "--config", text, *flags.rest],
        )

    # --- parsing -----------------------------------------------------------------------------------------------------

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser whose errors are ours."""
        parser = _Parser(**{**kwargs, "exit_on_error": False})
        parser.add_argument("-c", "--config", action="config", help="a config file; --method NAME swaps the method")
        return parser

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static there
        """Return the verb at hand alone: a parser of each would take most of the start."""
        return {self.verb: LightningCLI.subcommands()[self.verb]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what a run needs besides model, data and trainer, and state each fact once."""
        parser.add_argument("--results_root", type=str, default="results", help="where records and tables go")
        parser.add_argument("--runs_root", type=str, default="runs", help="where logs and checkpoints go")
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
        actions = self._subcommand_parsers[self.verb]._actions
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
            where = self._origin(text.partition(":")[0])
            raise ConfigError(f"{where}: {text}" if where else text) from None
        self._check_values(self.config[self.verb])

    def _parse_ckpt_path(self) -> None:
        """Take no settings from a checkpoint, as Lightning would: ours hold none, and others are read with care."""

    def _origin(self, key: str) -> str | None:
        """Where a config file sets a key, if the command line does not."""
        if any(given == key or given.startswith(f"{key}.") for given in self.flags.values):
            return None
        return self.composed.origins.get(key) or _origin_below(self.composed.origins, key)

    def _check_values(self, config: Namespace) -> None:
        """Refuse what Lightning allows and a run here cannot have."""
        seed, epochs = config.seed_everything, config.trainer.max_epochs
        problem = self._null_where_none_fits(config)
        if problem is None and (isinstance(seed, bool) or not 0 <= seed < 2**32):
            problem = "seed_everything", f"is a whole number of 0 to {2**32 - 1}, not {seed}"
        elif problem is None and (epochs is None or epochs < 1):
            given = "null" if epochs is None else epochs
            problem = "trainer.max_epochs", f"is at least 1, not {given}: the schedule needs an end"
        if problem:
            where = self._origin(problem[0])
            raise ConfigError(f"{f'{where}: ' if where else ''}{' '.join(problem)}")

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

    def _fits(self, key: str, known: set[str]) -> bool:
        """Whether a dotted key names an argument or something inside one (the method's own arguments apart)."""
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
        listing = f"svp-bench {self.verb} --help"
        raise unknown_name(kind, key, names, where=where, listing=listing, error=ConfigError)

    # --- before anything heavy ---------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Resolve the precision, name the run, and fail early: results folder, data, stage."""
        config = self.config[self.verb]
        for notice in self.composed.notices:
            rank_zero_info(f"Note: {notice}")
        self.commit, self.dirty = commit_and_dirty()  # of the code that is running, whatever happens to it meanwhile
        self._resolve_precision(config.trainer)
        config.trainer.use_distributed_sampler = False  # the data module's samplers divide the work
        if config.model.scan_backend != "auto":
            BACKENDS.entry(config.model.scan_backend)
        data = VisionDataModule(**config.data.as_dict())  # cheap: reads cards only
        if data.card.reader.kind == "lists":
            locate(data.card, data.suite, Path(config.data.root) if config.data.root else None)
        if self.verb == "validate":
            data.require_val()
        if self.verb == "test" and data.stage != "final":
            raise UsageError("stage 'select' has no test list: test a run of --data.stage final")
        self.saved_config = self._plain_config(config)
        self._name_run(config, data)
        if self.verb == "fit":
            _refuse_unwritable(Path(config.results_root) / "records" / data.card.name, "--results_root")
            _refuse_unwritable(self.run_dir, "--runs_root")

    def _resolve_precision(self, trainer: Namespace) -> None:
        on_gpu = torch.cuda.is_available() and trainer.accelerator in ("auto", "gpu", "cuda")
        if trainer.precision is None:
            trainer.precision = "bf16-mixed" if on_gpu else "32-true"
        if str(trainer.precision) in ("16", "16-mixed", "16-true") and not on_gpu:
            raise ConfigError(
                f"trainer.precision {trainer.precision} needs a GPU; on a CPU use 32-true (or bf16-mixed, slower)"
            )

    def _plain_config(self, config: Namespace) -> dict[str, Any]:
        parser = self._subcommand_parsers[self.verb]
        text = parser.dump(config, skip_link_targets=False, skip_validation=True, format="yaml", **_KEEP_NULLS)
        plain: dict[str, Any] = yaml.safe_load(text)
        for key in _NOT_SAVED:
            plain.pop(key, None)
        for key in _LINKED:  # facts of the card and of seed_everything, not settings
            group, name = key.split(".")
            plain.get(group, {}).pop(name, None)
        return plain

    def _name_run(self, config: Namespace, data: VisionDataModule) -> None:
        digest = setting_digest(self.saved_config, self._tuned())
        method = self._method_name()
        self.run_id = new_run_id(method, config.seed_everything, digest)
        runs, records = Path(config.runs_root) / data.card.name, Path(config.results_root) / "records" / data.card.name
        if "LOCAL_RANK" in os.environ:  # a process that Lightning launched: the first one has named the run
            self.run_id = os.environ.get(_RUN_ID, self.run_id)
        elif config.get("resume"):
            tuned = self._tuned()
            found = find_run(runs, records, config.seed_everything, lambda c: setting_digest(c, tuned) == digest)
            if found is None:
                rank_zero_info(f"Note: --resume: no run of this setting and seed in {runs}; this one begins.")
            else:
                self.run_id = found.folder.name
        os.environ[_RUN_ID] = self.run_id
        self.run_dir = runs / self.run_id
        if config.get("resume") and self.run_dir.is_dir():
            place, checkpoint = records / f"{self.run_id}.json", self.run_dir / CHECKPOINT
            self.resumed = Found(
                self.run_dir,
                checkpoint if checkpoint.is_file() else None,
                read_record(place) if place.is_file() else None,
            )

    def _method_name(self) -> str:
        """The registered name of the method's class, else the class's own in lower case."""
        class_path = str(self.saved_config["model"]["method"]["class_path"])
        by_target = {entry.target.replace(":", "."): entry.name for entry in METHODS}
        return by_target.get(class_path) or re.sub(r"(?<!^)(?=[A-Z][a-z])", "_", class_path.split(".")[-1]).lower()

    def _tuned(self) -> Tuned | None:
        return Tuned(*self.composed.tuned) if self.composed.tuned else None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Build the Trainer, with our callbacks, checkpoints and TensorBoard below the run's folder."""
        config = self.config_init[self.verb].trainer
        callbacks: list[Any] = [self.meter]
        dry = bool(config.fast_dev_run)
        if self.verb == "fit" and config.enable_checkpointing is not False and not dry:
            folder = self.run_dir / "checkpoints"
            self.stopper = Stopper(folder / CHECKPOINT.name)
            callbacks += [
                self.stopper,
                ModelCheckpoint(
                    folder,
                    filename=CHECKPOINT.stem,
                    save_top_k=1,
                    enable_version_counter=False,
                    save_on_train_epoch_end=True,  # after the epoch's validation, if there is one
                ),
            ]
        if self.verb == "fit":
            callbacks.append(StepSeeds(int(self.config_init[self.verb].seed_everything)))
            kwargs["plugins"] = [*(config.plugins or []), AtomicCheckpointIO()]
        if config.logger in (None, True) and self.verb == "fit" and not dry:
            # what was logged after the last checkpoint will be logged once more
            kwargs["logger"] = TensorBoardLogger(self.run_dir, name="", version="", purge_step=self._steps_done())
        elif self.verb != "fit":
            kwargs["logger"] = False
        trainer_config = {**config.as_dict(), **kwargs}
        trainer_config["callbacks"] = [*(trainer_config.get("callbacks") or []), *callbacks]
        try:
            return Trainer(**trainer_config)
        except (MisconfigurationException, ValueError, TypeError, ImportError) as error:
            raise ConfigError(f"Lightning refuses these trainer settings: {_one_line(str(error))}") from None

    def _steps_done(self) -> int | None:
        """Optimizer steps behind the checkpoint that this run goes on from."""
        if self.resumed is None:
            return None
        return int(load_pickle_safely(self.resumed.checkpoint)["global_step"]) if self.resumed.checkpoint else 0

    # --- the verbs ---------------------------------------------------------------------------------------------------

    def fit(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Train; in stage final test once with the final weights; write the record whatever happens."""
        config = self.config[self.verb]
        if kwargs.get("ckpt_path"):
            raise UsageError("fit trains from the start and takes no --ckpt_path; `svp-bench test` scores a checkpoint")
        if self.resumed is not None and self.resumed.finished:
            print(
                f"Nothing to go on with: {self.run_id} is complete; its record is in {config.results_root}", flush=True
            )
            return
        self._scan_choice()  # a backend asked for by name runs on this device, or the run ends here
        model.run_id = self.run_id
        datamodule.trainer = self.trainer  # the batch size is checked against devices and accumulation
        datamodule.setup("fit")  # data errors stop the run before it leaves a trace
        check_writable(config.results_root)
        if self.resumed is not None and self.resumed.checkpoint is not None:
            self._need_same_data(self.resumed.checkpoint)
            kwargs["ckpt_path"] = str(self.resumed.checkpoint)
        with self._alone(), self.stopper.listening() if self.stopper else nullcontext():
            self._announce()
            self._save_config()
            try:
                self._fit(model, datamodule, kwargs)
            except Preempted:
                self._say_how_to_go_on()

    def _fit(self, model: AdaptationModule, datamodule: VisionDataModule, kwargs: dict[str, Any]) -> None:
        """Train, test, and write the record, unless the run is to go on later."""
        status, reason = "failed", None
        tested = preempted = False
        try:
            self.trainer.fit(model, datamodule=datamodule, **kwargs)
            status, reason = self._outcome()
            if datamodule.stage == "select" and status == "complete" and model.validated is None:
                self.trainer.validate(model, datamodule=datamodule, verbose=False)  # resumed after the last epoch
            if datamodule.stage == "final" and status == "complete":
                if self.config[self.verb].no_test:
                    status, reason = "unscored", "--no_test"
                else:
                    datamodule.unlock_test()
                    self.trainer.test(model, datamodule=datamodule, verbose=False)
                    tested = True
        except Preempted:
            preempted = True
            raise
        except (KeyboardInterrupt, SystemExit):  # Lightning makes the one the other
            status, reason = "interrupted", "stopped by the user"
            raise
        except Exception as error:
            status, reason = "failed", _one_line(f"{type(error).__name__}: {error}")
            raise
        finally:
            if not preempted:
                self._finish(status, reason, tested)

    def _need_same_data(self, checkpoint: Path) -> None:
        """Refuse to go on with other pictures than those that the run began with."""
        theirs = load_pickle_safely(checkpoint).get(SAVED_KEY, {}).get("data_digest")
        if theirs != self.datamodule.report.digest:
            raise UsageError(
                f"{checkpoint}: the run began with other lists of {self.datamodule.card.name} than those found here; "
                "give their folder with --data.root, or begin anew without --resume"
            )

    def _alone(self) -> AbstractContextManager[None]:
        """No other process trains this run; the processes of one run are one."""
        dry = bool(self.config[self.verb].trainer.fast_dev_run)
        return nullcontext() if dry or not self.trainer.is_global_zero else locked(self.run_dir)

    @rank_zero_only
    def _say_how_to_go_on(self) -> None:
        saved = self.run_dir / CHECKPOINT
        what = f"saved: {saved}" if saved.is_file() else "nothing to save yet"
        name = self.stopper.asked.name if self.stopper and self.stopper.asked else "a signal"
        epoch, steps = self.trainer.current_epoch, self.trainer.global_step
        print(
            f"Stopped by {name} in epoch {epoch}, after {steps} steps; {what}\nGo on: the same command with --resume",
            flush=True,
        )

    def validate(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Validate a checkpoint on val (stage select)."""
        self._need_checkpoint(kwargs)
        self.trainer.validate(model, datamodule=datamodule, **kwargs)

    def test(self, model: AdaptationModule, datamodule: VisionDataModule, **kwargs: Any) -> None:
        """Test the final weights of a run made with `--no_test`, and complete its record.

        Weights without a record, of another stage, or of an earlier epoch are refused: the test list chooses nothing.
        A run that has a score is tested again for the eye only: its record stays.
        """
        about, epochs = self._need_checkpoint(kwargs)
        root = self.config[self.verb].results_root
        where = Path(root) / "records" / str(about["task"]) / f"{about['run_id']}.json"
        if about["stage"] != "final":
            raise UsageError(
                f"{kwargs['ckpt_path']}: weights of stage {about['stage']!r} are never tested; refit first"
            )
        if not where.is_file():
            raise UsageError(f"no record {where}: only recorded runs are tested; give the run's --results_root")
        old = read_record(where)
        if epochs != old.epochs:
            raise UsageError(
                f"{kwargs['ckpt_path']}: not the final weights of its run ({epochs} of {old.epochs} epochs)"
            )
        self._scan_choice()
        datamodule.setup("test")
        self._need_same_run(old, where)
        datamodule.unlock_test()
        self.trainer.test(model, datamodule=datamodule, **{**kwargs, "verbose": False})
        self._complete(old, where)

    @rank_zero_only
    def _complete(self, old: Record, where: Path) -> None:
        metrics, correct = self._scores()
        print(describe(metrics, old.lists["test"]))
        if old.status != "unscored":
            same = "the same" if old.metrics and old.metrics.correct == metrics.correct else "another number"
            print(f"The record {where} has its score already ({same}); it is not changed.")
            return
        times = {**old.times, **self.meter.seconds}
        done = dataclasses.replace(
            old, status="complete", status_reason=None, metrics=metrics, correct=correct, times=times
        )
        replace_record(done, self.config[self.verb].results_root)
        print(f"Completed {where}")
        self._write_tables("test", Path(self.config[self.verb].runs_root) / old.task / old.run_id)

    def _need_checkpoint(self, kwargs: Mapping[str, Any]) -> tuple[Mapping[str, Any], int]:
        """Return what a checkpoint says about its run, and the epochs it has seen."""
        path = kwargs.get("ckpt_path")
        if not path:
            raise UsageError(
                f"{self.verb} needs --ckpt_path runs/…/checkpoints/last.ckpt, and --config its config.yaml"
            )
        if not Path(path).is_file():
            raise UsageError(f"no checkpoint {str(path)!r}; runs keep theirs in runs/<task>/<run>/checkpoints/")
        content = load_pickle_safely(Path(path))  # Lightning's own way depends on its version
        if not isinstance(content, Mapping) or SAVED_KEY not in content:
            raise CheckpointError(
                f"{path}: no svp-bench checkpoint; weights of a backbone alone go to --model.checkpoint PATH"
            )
        return content[SAVED_KEY], int(content["epoch"]) + 1

    def _need_same_run(self, old: Record, where: Path) -> None:
        """Refuse to complete a record with a score that its settings or data did not give."""
        if old.status != "unscored":
            return
        ours, theirs = (dict(_flat(cell_config(config))) for config in (self.saved_config, old.config))
        other = sorted(key for key in {*ours, *theirs} if ours.get(key) != theirs.get(key))
        if other:
            raise UsageError(
                f"the run of {where} was made with another {other[0]} ({theirs.get(other[0])}, "
                f"here {ours.get(other[0])}); test it with its own config.yaml, unchanged"
            )
        if self.datamodule.report.digest != old.data_digest:
            raise UsageError(
                f"the run of {where} was trained with other lists of {old.task} than those found here; "
                "give their folder with --data.root"
            )

    # --- around a fit ------------------------------------------------------------------------------------------------

    def _scan_choice(self) -> Choice:
        choice: Choice = self.model.scan_choice(self.trainer.strategy.root_device, str(self.trainer.precision))
        return choice

    @rank_zero_only
    def _announce(self) -> None:
        model, data = self.model, self.datamodule
        counts = self._parameters()
        choice = self._scan_choice()
        weights = "random weights" if model.checkpoint == "none" else f"weights {model.checkpoint}"
        print(
            f"{self.run_id}\n"
            f"  task       {data.card.name} v{data.card.version}, stage {data.stage} "
            f"({', '.join(f'{role} on {name}' for role, name in data.lists.items())})\n"
            f"  backbone   {model.backbone_name}, {weights}, scan backend {choice.name} ({choice.reason})\n"
            f"  method     {self._method_name()}: {counts.adapter:,} parameters + {counts.head:,} of the head train, "
            f"of {counts.total:,}\n"
            f"  files      {self.run_dir}",
            flush=True,
        )
        if model.checkpoint == "none":
            print("  Random weights: this run shows plumbing, not transfer; tables keep such rows apart.", flush=True)

    @rank_zero_only
    def _save_config(self) -> None:
        try:
            write_atomically(self.run_dir / "config.yaml", yaml.safe_dump(self.saved_config, sort_keys=False))
        except RecordError as error:
            reason = str(error).partition("; ")[0]
            raise SvpBenchError(f"{reason}; choose another folder with --runs_root DIR") from None

    def _outcome(self) -> tuple[str, str | None]:
        """Whether the whole run was trained: `limit_*`, `fast_dev_run` and early ends make it truncated."""
        trainer = self.config[self.verb].trainer
        cut = [
            f"trainer.{name} {trainer[name]}"
            for name in ("limit_train_batches", "limit_test_batches", "limit_val_batches")
            if trainer[name] is not None and repr(trainer[name]) != "1.0"  # 1.0: all; 1: one batch
        ]
        if trainer.fast_dev_run:
            cut.append("trainer.fast_dev_run")
        if trainer.overfit_batches:
            cut.append(f"trainer.overfit_batches {trainer.overfit_batches}")
        planned = self.trainer.max_epochs
        if self.trainer.interrupted:
            return "interrupted", "stopped by the user"
        if not cut and planned is not None and planned > 0 and self.trainer.current_epoch < planned:
            cut.append(f"stopped after {self.trainer.current_epoch} of {planned} epochs")
        if not cut and planned is not None:
            steps = planned * math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
            if self.trainer.global_step < steps:
                cut.append(f"stopped after {self.trainer.global_step} of {steps} steps")
        if self.datamodule.stage == "select" and not cut and self.meter.validated_at != self.trainer.global_step:
            cut.append("val was not scored after the last epoch")
        return ("truncated", ", ".join(cut)) if cut else ("complete", None)

    def _parameters(self) -> Parameters:
        trained = trained_parameters(self.model.model)
        head = sum(p.numel() for name, p in trained.items() if name.startswith("head."))
        total = sum(p.numel() for p in self.model.model.parameters())
        trainable = sum(p.numel() for p in trained.values())
        return Parameters(trainable=trainable, head=head, adapter=trainable - head, total=total)

    def _scores(self) -> tuple[Metrics, Correct]:
        evaluation = self._of_the_whole_list("test", self.model.tested)
        digest = self.datamodule.test_list_digest
        assert digest is not None
        return evaluation.for_record(), Correct.of(evaluation.right, self.datamodule.lists["test"], digest)

    def _selection_scores(self) -> Metrics | None:
        """The scores on val after the last epoch."""
        if self.model.validated is None:
            return None
        return self._of_the_whole_list("val", self.model.validated).for_record()

    def _of_the_whole_list(self, role: str, evaluation: Evaluation | None) -> Evaluation:
        expected = self.datamodule.report.counts[self.datamodule.lists[role]]
        index = torch.empty(0) if evaluation is None else evaluation.scores.index
        if evaluation is None or not torch.equal(index, torch.arange(expected)):
            raise SvpBenchError(
                f"the {role} list gave {len(index)} pictures, not each of the {expected} once; please report this"
            )
        return evaluation

    def _write_tables(self, role: str, folder: Path) -> None:
        """Write the confusions and the accuracy of each class beside the run's checkpoint, and say where."""
        evaluation = self.model.tested if role == "test" else self.model.validated
        assert evaluation is not None
        try:
            confusion, per_class = write_tables(evaluation, self.datamodule.class_names, folder, role)
        except RecordError as error:
            reason = str(error).partition("; ")[0]
            raise SvpBenchError(f"{reason}; choose another folder with --runs_root DIR") from None
        print(f"Confusion matrix: {confusion}; accuracy of each class: {per_class}", flush=True)

    @rank_zero_only
    def _finish(self, status: str, reason: str | None, tested: bool) -> None:
        record = self._record(status, reason, tested)
        again = self.resumed is not None and self.resumed.record is not None  # of the part before an interruption
        path = (continue_record if again else write_record)(record, self.config[self.verb].results_root)
        role = "test" if record.kind == "final" else "val"
        if record.metrics is not None:
            print(describe(record.metrics, record.lists[role]), flush=True)
        print(f"Record ({status}): {path}", flush=True)
        if record.metrics is not None:
            self._write_tables(role, self.run_dir)
        checkpoint = self.run_dir / "checkpoints" / "last.ckpt"
        if record.kind == "final" and status == "complete":
            print("Next: svp-bench table", flush=True)
        elif status == "unscored":
            print(f"Next: svp-bench test --config {self.run_dir / 'config.yaml'} --ckpt_path {checkpoint}", flush=True)

    def _record(self, status: str, reason: str | None, tested: bool) -> Record:
        model, data = self.model, self.datamodule
        metrics: Metrics | None = None
        correct: Correct | None = None
        if tested:
            metrics, correct = self._scores()
        elif data.stage == "select" and status == "complete":
            metrics = self._selection_scores()
        looked = data._report is not None
        tuned = self._tuned()
        choice = self._scan_choice()
        saved = self.run_dir / "checkpoints" / "last.ckpt"
        source = str(model.checkpoint)
        return Record(
            schema=1,
            run_id=self.run_id,
            created=timestamp(),
            task=data.card.name,
            task_version=data.card.version,
            suite=data.card.suite,
            kind="final" if data.stage == "final" else "selection",
            status=status,
            status_reason=reason,
            method=self._method_name(),
            method_args=model.method.settings(),
            backbone=model.backbone_name,
            checkpoint=source if source in ("hub", "embedded", "none") else Path(source).name,
            checkpoint_digest=None if source == "none" else model.backbone_digest,
            protocol=data.protocol.name,
            protocol_version=data.protocol.version,
            stage=data.stage,
            lists=dict(data.lists),
            data_variant=data.report.variant if looked else "card",
            data_status=data.report.status if looked else "as_card",
            data_notes=list(data.report.notes) if looked else [],
            data_digest=data.report.digest if looked else None,
            seed=int(self.config[self.verb].seed_everything),
            config=self.saved_config,
            config_digest=config_digest(self.saved_config),
            setting_digest=setting_digest(self.saved_config, tuned),
            tuned=tuned,
            package_version=__version__,
            commit=self.commit,
            dirty=self.dirty,
            libraries=library_versions(),
            scan_backend=choice.name,
            scan_reason=choice.reason,
            device=device_name(self.trainer.strategy.root_device),
            device_count=self.trainer.world_size,
            precision=str(self.trainer.precision),
            metrics=metrics,
            correct=correct,
            parameters=self._parameters(),
            times={name: round(value, 3) for name, value in self.meter.seconds.items()},
            epochs=self.meter.epochs,
            images_per_second=self.meter.images_per_second,
            peak_memory_mib=peak_memory_mib(self.trainer.strategy.root_device),
            checkpoint_file=saved.relative_to(self.config[self.verb].runs_root).as_posix() if saved.is_file() else None,
        )


def _seed(value: Any) -> int:
    """The seed of data and model; what is no seed at all is refused once everything is parsed."""
    return int(value) if isinstance(value, int) else 0


def _takes_null(cls: type, name: str) -> bool:
    try:
        hint = get_type_hints(cls.__init__).get(name, Any)  # type: ignore[misc]  # a class, no instance
    except NameError:  # a hint of somebody's class that is there for type checkers alone
        return True
    return hint is Any or type(None) in get_args(hint)


def _refuse_unwritable(folder: Path, flag: str) -> None:
    """Say early, and without making it, that a folder cannot be written.

    Raises:
        RecordError: If a file stands in its way, or the folder above it cannot be written.
    """
    place = Path(os.path.abspath(folder))
    while not os.path.lexists(place):
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        why = "is not a folder" if not place.is_dir() else "is not writable"
        raise RecordError(f"cannot write into {folder}: {place} {why}; choose another folder with {flag} DIR")


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _origin_below(origins: Mapping[str, str], key: str) -> str | None:
    """Where a key that is no leaf came from: the place of its first leaf."""
    return next((where for name, where in origins.items() if name.startswith(f"{key}.")), None)
