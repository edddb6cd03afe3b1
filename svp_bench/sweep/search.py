"""Declarations of searches (`configs/search/NAME.yaml`), and the order in which settings are tried on val.

A declaration has a sampler, a budget K, the same for every method, and the space of each method. The first trial is
always the method's default setting. Grids need nothing more; `random` and `tpe` are Optuna's samplers (the extra
`search`), seeded, so that a search that is resumed asks for the same settings.

K counts settings. With folds each setting is a run for each fold (`Plan`), and a nested search is one search for each
seed of the final runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from svp_bench.core.errors import ConfigError, UnavailableError, plural, unknown_name
from svp_bench.core.resources import configs_dir
from svp_bench.core.validate import Positive, convert
from svp_bench.core.yaml import Node, read_yaml
from svp_bench.records.digests import canonical_digest
from svp_bench.records.selection import AUTO_FOLDS, FALLBACK, FOLD_KEYS, RULE_VERSION
from svp_bench.records.selection_rule import grid_settings, is_number

_KEY = re.compile(r"(?:model|data|trainer)(?:\.\w+)+")
_FIXED = ("data.task", "data.stage", "data.root", "data.protocol", "model.backbone", "model.checkpoint", *FOLD_KEYS)

_Seed = Annotated[int, Meta(ge=0, lt=2**32, description=f"a whole number of 0 to {2**32 - 1}")]
_Folds = Annotated[
    Literal["auto", "none", "leave_one_out"] | Annotated[int, Meta(ge=2)] | None,
    Meta(description="auto, none, leave_one_out or a whole number of at least 2"),
]

# Settings in the order in which they were asked for, each with its mean score, or None if it failed.
Finished = Sequence[tuple[Mapping[str, Any], float | None]]
# Returns the settings that can be tried now: several at once where they do not depend on scores; [] at the end.
Sampler = Callable[[Finished], list[dict[str, Any]]]


@dataclass(frozen=True)
class Dimension:
    """Allowed values of one config key.

    Attributes:
        key: Dotted config key, as in a resolved config.
        values: Allowed values, or None for the range from `low` to `high`.
        log: Whether the range is sampled in the logarithm.
        integer: Whether it holds whole numbers.
    """

    key: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    def declaration(self) -> Any:
        """Return it as plain values."""
        if self.values is not None:
            return list(self.values)
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer}


@dataclass(frozen=True)
class Plan:
    """Runs of a trial.

    Attributes:
        folds: Parts of the labelled images, each held out in turn; 0: the trial is scored on val.
        repeats: How often the images are divided anew; 0 without folds.
    """

    folds: int = 0
    repeats: int = 0

    def runs(self, seeds: Sequence[int], fold_seed: int) -> list[tuple[int, dict[str, int]]]:
        """Return (training seed, config values of the fold) of each run, in the order of the trial's run ids."""
        parts = [
            dict(zip(FOLD_KEYS, (self.folds, fold, fold_seed), strict=True))
            for fold in range(self.folds * self.repeats)
        ]
        return [(seed, part) for seed in seeds for part in parts or [{}]]


@dataclass(frozen=True)
class SearchSpace:
    """The declaration of a search.

    Attributes:
        name: Its name.
        version: Raised when its meaning changes.
        sampler: grid, random or tpe.
        budget: K: settings that each method may try on each task, the default one among them.
        seeds: Each setting is trained once with each of them; empty if the search is nested.
        rule: How its trials are compared; see `svp_bench.records.selection_rule.decide`.
        spaces: Method → its space; "default" serves methods without one.
        path: Its file.
        folds: A number; "leave_one_out"; "none": the protocol's val; or "auto": five where val is small, else none.
        repeats: How often the labelled images are divided anew.
        small_val: "auto" takes folds where val has fewer images than this. (A difference of two settings on fewer than
            100 images is mostly chance: its standard error is some 4 points.)
        nested: Whether each seed of the final runs has a search of its own, with that seed and its own folds.
    """

    name: Annotated[str, Meta(pattern="^[a-z0-9][a-z0-9_-]*$", description="a name of a-z, 0-9, _ and -")]
    version: Positive
    sampler: Literal["grid", "random", "tpe"]
    budget: Positive
    spaces: Mapping[str, tuple[Dimension, ...]]
    seeds: tuple[_Seed, ...] = ()
    rule: Literal["one_standard_error", "best_on_val"] = "one_standard_error"
    folds: _Folds = "auto"
    repeats: Positive | None = None
    small_val: Positive = 100
    nested: bool | None = None
    notes: str = ""
    path: Path = Path()

    def plan(self, val: int, labelled: int) -> Plan:
        """Return the runs of a trial.

        Args:
            val: Images in the protocol's val split.
            labelled: Images in its refit split.

        Raises:
            ConfigError: If there are more folds than labelled images.
        """
        auto = min(AUTO_FOLDS, labelled) if val < self.small_val else 0
        names = {"auto": auto, "leave_one_out": labelled, "none": 0, None: 0}
        folds = self.folds if isinstance(self.folds, int) else names[self.folds]
        if folds > labelled:
            raise ConfigError(f"{self.path}: {folds} folds of {labelled} labelled images; at most one for each image")
        return Plan(folds, self.repeats or 1 if folds else 0)

    def space(self, method: str) -> tuple[Dimension, ...]:
        """Return the space of a method.

        Raises:
            ConfigError: If it has none and there is no default.
        """
        found = self.spaces.get(method, self.spaces.get(FALLBACK))
        if found is None:
            raise unknown_name("method", method, self.spaces, where=f"{self.path}: spaces", error=ConfigError)
        return found

    def declaration(self) -> dict[str, Any]:
        """Return it as plain values."""
        left_out = ("path", "notes")
        facts = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in left_out}
        spaces = {
            method: {dimension.key: dimension.declaration() for dimension in space}
            for method, space in sorted(self.spaces.items())
        }
        return {**facts, "rule_version": RULE_VERSION, "seeds": list(self.seeds), "spaces": spaces}

    @property
    def digest(self) -> str:
        """Return "sha256:..." of the declaration."""
        return canonical_digest(self.declaration())


def load_search(name: str) -> SearchSpace:
    """Read a declaration: a path, or the name of a shipped one.

    Raises:
        UsageError: If there is none.
        ConfigError: If it is malformed; the text begins with `file:line:`.
    """
    path = Path(name)
    if not path.is_file():
        shipped = configs_dir() / "search"
        path = shipped / f"{path.name.removesuffix('.yaml')}.yaml"
        if not path.is_file():
            known = [f"configs/search/{file.name}" for file in sorted(shipped.glob("*.yaml"))]
            raise unknown_name("search", name, known)
    node = read_yaml(path, error=ConfigError, label="the search")
    values = {**node.value, "spaces": {}, "path": path} if isinstance(node.value, dict) else node.value
    search = convert(values, SearchSpace, node.where, ConfigError, "search")
    if len(set(search.seeds)) != len(search.seeds):
        raise node.error("a seed is given twice in seeds", "seeds")
    nested = search.nested if search.nested is not None else not search.seeds
    if nested and search.seeds:
        raise node.error("a nested search trains with the seed of the final run; leave seeds or nested out", "seeds")
    one_division = search.folds == "leave_one_out"
    if one_division and (search.repeats or 1) > 1:
        raise node.error("leave_one_out has one division only; leave repeats out", "repeats")
    spaces = {}
    for method, entry in node.keys(["spaces"], node.value)["spaces"].mapping().items():
        spaces[method] = tuple(_dimension(key, child, search.sampler) for key, child in entry.mapping().items())
        size = math.prod(len(dimension.values or ()) for dimension in spaces[method])
        if search.sampler == "grid" and size > search.budget:
            raise entry.error(
                f"the grid of {method} has {plural(size, 'setting')}, more than the budget of {search.budget} that "
                "every method has; raise the budget for all, thin the grid, or use the sampler tpe"
            )
    return replace(
        search,
        seeds=search.seeds or (() if nested else (0,)),
        spaces=spaces,
        folds=search.folds or "none",
        repeats=search.repeats or (1 if nested or one_division else 2),
        nested=nested,
    )


def _dimension(key: str, node: Node, sampler: str) -> Dimension:
    if not _KEY.fullmatch(key):
        raise node.error(f"{key} is not a config key; write it dotted, e.g. model.learning_rate or model.method.rank")
    if key in _FIXED or key.startswith("model.method.class_path"):
        raise node.error(f"{key} is not searched: it is what is compared")
    if key.startswith("model.method.") and not key.startswith("model.method.init_args."):
        key = f"model.method.init_args.{key.removeprefix('model.method.')}"
    if isinstance(node.children, list):
        values = tuple(_plain_scalar(item) for item in node.sequence())
        if len(set(map(repr, values))) != len(values):
            raise node.error(f"{key} has a value twice")
        return Dimension(key, values)
    parts = node.keys(["low", "high"], ["log"])
    if sampler == "grid":
        raise node.error(f"{key} is a range, and a grid needs a list of values")
    low, high = parts["low"].value, parts["high"].value
    if not (is_number(low) and is_number(high) and low < high):
        raise node.error(f"{key} needs numbers low < high, not {parts['low'].kind} and {parts['high'].kind}")
    log = parts["log"].value if "log" in parts else False
    if not isinstance(log, bool):
        raise parts["log"].error(f"log must be true or false, not {parts['log'].kind}")
    if log and low <= 0:
        raise node.error(f"{key}: a logarithmic range begins above 0")
    return Dimension(key, None, float(low), float(high), log, isinstance(low, int) and isinstance(high, int))


def _plain_scalar(node: Node) -> Any:
    if isinstance(node.value, (dict, list)):
        raise node.error(f"a value of a search is a number, a text, true, false or null, not {node.kind}")
    if isinstance(node.value, str):
        try:
            number = float(node.value)
        except ValueError:
            return node.value
        raise node.error(f"{node.value} is a text in YAML; as a number write {number!r}")
    return node.value


def make_sampler(search: SearchSpace, method: str, default: Mapping[str, Any], seed_text: str) -> Sampler:
    """Return the sampler of a method's search on one task.

    Args:
        search: The declaration.
        method: The method's name.
        default: Values of the space's keys in the method's own recipe: the first trial.
        seed_text: Seeds random samplers, e.g. task and method: two tasks do not try the same samples.

    Raises:
        ConfigError: If a grid does not hold the default setting and the budget cannot include it.
        UnavailableError: If Optuna is needed and not installed.
    """
    space = search.space(method)
    if search.sampler != "grid":
        return _Optuna(search, space, default, seed_text).ask
    settings = grid_settings({dimension.key: dimension.values for dimension in space}, default)
    if len(settings) > search.budget:
        raise ConfigError(
            f"{search.path}: the grid of {method} and its default setting are {plural(len(settings), 'setting')}, more "
            f"than the budget of {search.budget}; put the recipe's values into the grid, or raise the budget for all"
        )
    return lambda finished: settings[len(finished) :]


class _Optuna:
    """Random and TPE search; every call replays the finished trials, so it needs no storage."""

    def __init__(
        self, search: SearchSpace, space: tuple[Dimension, ...], default: Mapping[str, Any], seed_text: str
    ) -> None:
        try:
            import optuna
        except ImportError:
            raise UnavailableError(
                f"the sampler {search.sampler!r} needs Optuna, which is not installed: pip install "
                "'svp-bench[search]', or use a search with the sampler grid"
            ) from None
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self._optuna = optuna
        self._random, self._budget, self._default = search.sampler == "random", search.budget, dict(default)
        self._seed = int(canonical_digest([search.digest, seed_text]).removeprefix("sha256:")[:8], 16)
        self._distributions = {dimension.key: self._distribution(dimension) for dimension in space}

    def ask(self, finished: Finished) -> list[dict[str, Any]]:
        if not finished:
            return [dict(self._default)]
        if self._random:  # samples do not depend on scores: all of them at once
            return [self._sample(number, []) for number in range(len(finished), self._budget)]
        return [self._sample(len(finished), finished)] if len(finished) < self._budget else []

    def _sample(self, number: int, finished: Finished) -> dict[str, Any]:
        optuna, distributions = self._optuna, self._distributions
        seed = (self._seed + 7919 * number) % 2**32  # of each sample: it does not depend on earlier calls
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if self._random
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=max(4, self._budget // 3), multivariate=True)
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        for values, score in finished:
            if all(one._contains(one.to_internal_repr(values[key])) for key, one in distributions.items()):
                # a default outside of the space teaches the sampler nothing
                state = optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE
                params = {key: values[key] for key in distributions}
                study.add_trial(
                    optuna.trial.create_trial(params=params, distributions=distributions, value=score, state=state)
                )
        return dict(study.ask(distributions).params)

    def _distribution(self, dimension: Dimension) -> Any:
        kinds = self._optuna.distributions
        if dimension.values is not None:
            return kinds.CategoricalDistribution(dimension.values)
        if dimension.integer:
            return kinds.IntDistribution(int(dimension.low), int(dimension.high), dimension.log)
        return kinds.FloatDistribution(dimension.low, dimension.high, dimension.log)
