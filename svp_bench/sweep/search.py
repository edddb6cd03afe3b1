"""Searches: which settings of a method are tried on val, in which order, and which of them is taken.

A declaration (`configs/search/NAME.yaml`) gives a sampler, a budget K, the same for every method, and each method's
space. The first trial is always the method's default setting. Grids need nothing more; `random` and `tpe` are Optuna's
samplers (the extra `search`), seeded, so that a search that is taken up again asks for the same settings.

K counts settings. With folds each setting is a run for each fold (`Plan`), and a nested search is one search for each
seed of the final runs.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from svp_bench.core.errors import ConfigError, UnavailableError, plural, unknown_name
from svp_bench.core.resources import configs_dir
from svp_bench.core.yaml import Node, read_yaml
from svp_bench.records.digests import canonical_digest
from svp_bench.records.selection import AUTO_FOLDS, FALLBACK, FOLD_KEYS, RULE_VERSION
from svp_bench.records.selection_rule import RULES, grid_settings

__all__ = ["SAMPLERS", "Dimension", "Plan", "Sampler", "Search", "load_search", "make_sampler", "space_declaration"]

SAMPLERS = ("grid", "random", "tpe")
AUTO, LEAVE_ONE_OUT, NONE = "auto", "leave_one_out", "none"  # what `folds` may be other than a number
_SMALL_VAL = 100  # a difference of two settings on fewer images is mostly chance: its standard error is some 4 points
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
_KEY = re.compile(r"(?:model|data|trainer)(?:\.\w+)+")
_FIXED = ("data.task", "data.stage", "data.root", "data.protocol", "model.backbone", "model.checkpoint")


@dataclass(frozen=True)
class Dimension:
    """What one config key may be.

    Attributes:
        key: Dotted config key, as in a resolved config.
        values: Allowed values, or None for a range.
        low: Least value of a range.
        high: Largest value of a range.
        log: Is the range sampled in the logarithm?
        integer: Does the range hold whole numbers?
    """

    key: str
    values: tuple[Any, ...] | None = None
    low: float = 0.0
    high: float = 0.0
    log: bool = False
    integer: bool = False

    def declaration(self) -> Any:
        """Return plain values that say the same."""
        if self.values is not None:
            return list(self.values)
        return {"low": self.low, "high": self.high, "log": self.log, "integer": self.integer}


@dataclass(frozen=True)
class Plan:
    """Which runs make a trial of one search.

    Attributes:
        seeds: Training seeds.
        folds: Parts of the labelled images, each held out in turn; 0: the trial is scored on val.
        repeats: How often the images are divided anew; 0 without folds.
        fold_seed: Seed of the divisions.
    """

    seeds: tuple[int, ...] = (0,)
    folds: int = 0
    repeats: int = 0
    fold_seed: int = 0

    def runs(self) -> list[tuple[int, dict[str, int]]]:
        """Return (training seed, config values of the fold) of each run, in the order of the trial's run ids."""
        if not self.folds:
            return [(seed, {}) for seed in self.seeds]
        divided = [
            dict(zip(FOLD_KEYS, (self.folds, fold, self.fold_seed), strict=True))
            for fold in range(self.folds * self.repeats)
        ]
        return [(seed, dict(fold)) for seed in self.seeds for fold in divided]


@dataclass(frozen=True)
class Search:
    """A declaration.

    Attributes:
        name: Its name.
        version: Raised when its meaning changes.
        sampler: grid, random or tpe.
        budget: K: settings that each method may try on each task, the default one among them.
        seeds: Each setting is trained once with each of them; empty if the search is nested.
        rule: How its trials are compared; see `svp_bench.records.selection.decide`.
        spaces: Method → its space; "default" serves methods without one.
        path: Its file.
        folds: A number; "leave_one_out"; "none": the protocol's val; or "auto": five where val is small, else none.
        repeats: How often the labelled images are divided anew.
        small_val: "auto" takes folds where val has fewer images than this.
        nested: Does each seed of the final runs have a search of its own, with that seed and its own folds?
    """

    name: str
    version: int
    sampler: str
    budget: int
    seeds: tuple[int, ...]
    rule: str
    spaces: Mapping[str, tuple[Dimension, ...]]
    path: Path
    folds: int | str = AUTO
    repeats: int = 1
    small_val: int = _SMALL_VAL
    nested: bool = True

    def plan(self, val: int, labelled: int, seed: int = 0) -> Plan:
        """Return which runs make a trial.

        Args:
            val: Images in the protocol's val split.
            labelled: Images in its refit split.
            seed: Of the final run that a nested search is for.

        Raises:
            ConfigError: If there are more folds than labelled images.
        """
        folds = self.folds
        if folds == AUTO:
            folds = min(AUTO_FOLDS, labelled) if val < self.small_val else 0
        elif folds == LEAVE_ONE_OUT:
            folds = labelled
        number = folds if isinstance(folds, int) else 0
        if number > labelled:
            raise ConfigError(f"{self.path}: {number} folds of {labelled} labelled images; at most one for each image")
        seeds = (seed,) if self.nested else self.seeds
        return Plan(seeds, number, self.repeats if number else 0, seed if self.nested else 0)

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
        """Return plain values: what is declared for all methods, before anything is run."""
        return {
            "name": self.name,
            "version": self.version,
            "sampler": self.sampler,
            "budget": self.budget,
            "seeds": list(self.seeds),
            "rule": self.rule,
            "rule_version": RULE_VERSION,
            "folds": self.folds,
            "repeats": self.repeats,
            "small_val": self.small_val,
            "nested": self.nested,
            "spaces": {method: space_declaration(space) for method, space in sorted(self.spaces.items())},
        }

    @property
    def digest(self) -> str:
        """Return "sha256:..." of the declaration."""
        return canonical_digest(self.declaration())


def space_declaration(space: Sequence[Dimension]) -> dict[str, Any]:
    """Return a space as plain values."""
    return {dimension.key: dimension.declaration() for dimension in space}


def load_search(name: str) -> Search:
    """Read a declaration: a path, or the name of a shipped one.

    Raises:
        UsageError: If there is none.
        ConfigError: If it is malformed; the text begins with `file:line:`.
    """
    path = Path(name)
    if not path.is_file():
        shipped = configs_dir() / "search"
        tail = Path(name).name
        path = shipped / (tail if tail.endswith(".yaml") else f"{tail}.yaml")
        if not path.is_file():
            known = [f"configs/search/{file.name}" for file in sorted(shipped.glob("*.yaml"))]
            raise unknown_name("search", name, known)
    node = read_yaml(path, error=ConfigError, label="the search")
    keys = node.keys(
        ["name", "version", "sampler", "budget", "spaces"],
        ["seeds", "rule", "notes", "folds", "repeats", "small_val", "nested"],
    )
    rule = keys["rule"].one_of(RULES, "rule") if "rule" in keys else RULES[0]
    sampler = keys["sampler"].one_of(SAMPLERS, "sampler")
    seeds = tuple(_seed(item) for item in keys["seeds"].sequence()) if "seeds" in keys else ()
    if len(set(seeds)) != len(seeds):
        raise keys["seeds"].error("a seed stands twice in seeds")
    nested = keys["nested"].value if "nested" in keys else not seeds
    if not isinstance(nested, bool):
        raise keys["nested"].error(f"nested must be true or false, not {keys['nested'].kind}")
    if nested and seeds:
        raise keys["seeds"].error("a nested search trains with the seed of the final run; leave seeds or nested out")
    folds = _folds(keys["folds"]) if "folds" in keys else AUTO
    repeats = keys["repeats"].positive() if "repeats" in keys else (1 if nested else 2)
    if folds == LEAVE_ONE_OUT and repeats > 1:
        if "repeats" in keys:
            raise keys["repeats"].error("leave_one_out has one division only; leave repeats out")
        repeats = 1
    spaces = {method: _space(entry, sampler) for method, entry in keys["spaces"].mapping().items()}
    search = Search(
        name=keys["name"].text(_NAME, "a name of a-z, 0-9, _ and -"),
        version=keys["version"].positive(),
        sampler=sampler,
        budget=keys["budget"].positive(),
        seeds=seeds or (() if nested else (0,)),
        rule=rule,
        spaces=spaces,
        path=path,
        folds=folds,
        repeats=repeats,
        small_val=keys["small_val"].positive() if "small_val" in keys else _SMALL_VAL,
        nested=nested,
    )
    for method, space in spaces.items():
        size = math.prod(len(dimension.values or ()) for dimension in space)
        if sampler == "grid" and size > search.budget:
            raise (
                keys["spaces"]
                .mapping()[method]
                .error(
                    f"the grid of {method} has {plural(size, 'setting')}, more than the budget of "
                    f"{search.budget} that every "
                    "method has; raise the budget for all, thin the grid, or use the sampler tpe"
                )
            )
    return search


def _seed(node: Node) -> int:
    if not isinstance(node.value, int) or isinstance(node.value, bool) or not 0 <= node.value < 2**32:
        raise node.error(f"a seed is a whole number of 0 to {2**32 - 1}, not {node.kind}")
    return node.value


def _folds(node: Node) -> int | str:
    if node.value is None or node.value == NONE:
        return NONE
    if isinstance(node.value, str) and node.value in (AUTO, LEAVE_ONE_OUT):
        return node.value
    if not isinstance(node.value, int) or isinstance(node.value, bool) or node.value < 2:
        raise node.error(
            f"folds is {AUTO}, {NONE}, {LEAVE_ONE_OUT} or a whole number of at least 2, not {node.value!r}"
        )
    return node.value


def _space(node: Node, sampler: str) -> tuple[Dimension, ...]:
    return tuple(_dimension(key, child, sampler) for key, child in node.mapping().items())


def _dimension(key: str, node: Node, sampler: str) -> Dimension:
    if not _KEY.fullmatch(key):
        raise node.error(f"{key} is no config key; write it dotted, e.g. model.learning_rate or model.method.rank")
    if key in (*_FIXED, *FOLD_KEYS) or key.startswith("model.method.class_path"):
        raise node.error(f"{key} is not searched: it is what is compared")
    if key.startswith("model.method.") and not key.startswith("model.method.init_args."):
        key = f"model.method.init_args.{key.removeprefix('model.method.')}"
    if isinstance(node.children, list):
        values = tuple(_plain_scalar(item) for item in node.sequence())
        if len({repr(value) for value in values}) != len(values):
            raise node.error(f"{key} has a value twice")
        return Dimension(key, values)
    parts = node.keys(["low", "high"], ["log"])
    if sampler == "grid":
        raise node.error(f"{key} is a range, and a grid needs a list of values")
    low, high = parts["low"].value, parts["high"].value
    numbers = [isinstance(x, (int, float)) and not isinstance(x, bool) for x in (low, high)]
    if not all(numbers) or not low < high:
        raise node.error(f"{key} needs numbers low < high, not {parts['low'].kind} and {parts['high'].kind}")
    log = parts["log"].value if "log" in parts else False
    if not isinstance(log, bool):
        raise parts["log"].error("log must be true or false")
    if log and low <= 0:
        raise node.error(f"{key}: a logarithmic range begins above 0")
    integer = isinstance(low, int) and isinstance(high, int)
    return Dimension(key, None, float(low), float(high), log, integer)


def _plain_scalar(node: Node) -> Any:
    if isinstance(node.value, (dict, list)):
        raise node.error(f"a value of a search is a number, a text, true, false or null, not {node.kind}")
    if isinstance(node.value, str):
        try:
            float(node.value)
        except ValueError:
            return node.value
        raise node.error(f"{node.value} is a text in YAML; as a number write {float(node.value)!r}")
    return node.value


# ----------------------------------------------------------------------------------------------------------- samplers


class Sampler(Protocol):
    """Asks for settings one after the other, or several at once where they do not depend on scores."""

    def ask(self, finished: Sequence[tuple[Mapping[str, Any], float | None]]) -> list[dict[str, Any]]:
        """Return the settings that can be tried now, given all settings so far with their scores; [] at the end.

        Args:
            finished: Settings in the order in which they were asked for, with their mean score, None if they failed.
        """
        ...


def make_sampler(search: Search, method: str, default: Mapping[str, Any], seed_text: str) -> Sampler:
    """Return the sampler of a method's search on one task.

    Args:
        search: The declaration.
        method: The method's name.
        default: Values of the space's keys in the method's own recipe: the first trial.
        seed_text: What seeds random samplers, e.g. task and method: two tasks do not try the same draws.

    Raises:
        ConfigError: If a grid does not hold the default setting and the budget cannot include it.
        UnavailableError: If Optuna is needed and not installed.
    """
    space = search.space(method)
    if search.sampler != "grid":
        return _Optuna(search, space, default, seed_text)
    settings = grid_settings(space_declaration(space), default)
    if len(settings) > search.budget:
        raise ConfigError(
            f"{search.path}: the grid of {method} and its default setting are "
            f"{plural(len(settings), 'setting')}, more than the "
            f"budget of {search.budget}; put the recipe's own values into the grid, or raise the budget for all"
        )
    return _Grid(settings)


class _Grid:
    def __init__(self, settings: list[dict[str, Any]]) -> None:
        self._settings = settings

    def ask(self, finished: Sequence[tuple[Mapping[str, Any], float | None]]) -> list[dict[str, Any]]:
        return self._settings[len(finished) :]


class _Optuna:
    """Random and TPE search; every call replays the finished trials, so it needs no storage."""

    def __init__(
        self, search: Search, space: tuple[Dimension, ...], default: Mapping[str, Any], seed_text: str
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
        self._search, self._space, self._default = search, space, dict(default)
        self._seed = int(canonical_digest([search.digest, seed_text]).removeprefix("sha256:")[:8], 16)

    def ask(self, finished: Sequence[tuple[Mapping[str, Any], float | None]]) -> list[dict[str, Any]]:
        if not finished:
            return [dict(self._default)]
        if len(finished) >= self._search.budget:
            return []
        if self._search.sampler == "random":  # draws do not depend on scores: all of them at once
            samples = [self._sample(number, []) for number in range(1, self._search.budget)]
            return samples[len(finished) - 1 :]
        return [self._sample(len(finished), finished)]

    def _sample(self, number: int, finished: Sequence[tuple[Mapping[str, Any], float | None]]) -> dict[str, Any]:
        optuna = self._optuna
        # a seed per sample: it depends on the finished trials, not on earlier calls
        seed = (self._seed + 7919 * number) % 2**32
        startup = max(4, self._search.budget // 3)
        sampler = (
            optuna.samplers.RandomSampler(seed=seed)
            if self._search.sampler == "random"
            else optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, multivariate=True)
        )
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {dimension.key: self._distribution(dimension) for dimension in self._space}
        for values, score in finished:
            state = optuna.trial.TrialState.FAIL if score is None else optuna.trial.TrialState.COMPLETE
            inside = {
                key: values[key]
                for key, distribution in distributions.items()
                if distribution._contains(distribution.to_internal_repr(values[key]))
            }
            if len(inside) == len(distributions):  # a default outside of the space teaches the sampler nothing
                study.add_trial(
                    optuna.trial.create_trial(params=inside, distributions=distributions, value=score, state=state)
                )
        trial = study.ask(distributions)
        return {dimension.key: trial.params[dimension.key] for dimension in self._space}

    def _distribution(self, dimension: Dimension) -> Any:
        if dimension.values is not None:
            return self._optuna.distributions.CategoricalDistribution(dimension.values)
        if dimension.integer:
            return self._optuna.distributions.IntDistribution(int(dimension.low), int(dimension.high), dimension.log)
        return self._optuna.distributions.FloatDistribution(dimension.low, dimension.high, dimension.log)
