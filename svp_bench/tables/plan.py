"""The file of planned comparisons, and the form of their results; `tables.planned` computes them.

Each comparison is a difference of two methods on one backbone, or of that difference between two backbones. Holm's
family is all comparisons of the file, whether their records exist or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from svp_bench.core.errors import ConfigError, unknown_name
from svp_bench.core.validate import Count, convert
from svp_bench.core.yaml import Node, read_yaml
from svp_bench.stats.estimates import Estimate, Paired
from svp_bench.stats.inference import within
from svp_bench.tasks.cards import list_parts, list_suites

Verdict = Literal["finding", "undecided", "records missing"]
_Pair = Annotated[
    tuple[str, ...], Meta(min_length=2, max_length=2, description="two names: the first minus the second")
]
_Backbones = Annotated[
    tuple[str, ...], Meta(min_length=1, max_length=2, description="one name, or two: on the first minus on the second")
]
_Seeds = Annotated[tuple[Count, ...], Meta(min_length=1, description="a list of at least one seed")]
_Points = Annotated[float, Meta(ge=0, le=100, description="a number of points from 0 to 100")]


@dataclass(frozen=True)
class Planned:
    """One comparison of the file.

    Attributes:
        methods: Names of two methods, each with its shipped recipe, or labels of rows; the first minus the second.
        backbones: One backbone; or two, for the difference on the first minus that on the second.
        question: What it answers, in words.
    """

    methods: _Pair
    backbones: _Backbones
    question: str = ""

    @property
    def words(self) -> str:
        """The difference in words, e.g. "svp − lora on vim_nano_patch8_64"."""
        first, second = self.methods
        if len(self.backbones) == 1:
            return f"{first} − {second} on {self.backbones[0]}"
        return f"({first} − {second}) on {self.backbones[0]} − on {self.backbones[1]}"


@dataclass(frozen=True)
class Plan:
    """The file.

    Attributes:
        suite: Name of the suite; the mean is over all of its tasks.
        seeds: The seeds of each cell; others do not count.
        smallest_difference: Points below which a difference is no finding, however small its p.
        comparisons: Holm's family.
    """

    suite: str
    seeds: _Seeds
    smallest_difference: _Points
    comparisons: Annotated[tuple[Planned, ...], Meta(min_length=1, description="a list of at least one comparison")]


@dataclass(frozen=True)
class Outcome:
    """A planned comparison and its result.

    Attributes:
        planned: The comparison.
        found: The estimate with its intervals; None while records are missing.
        p: Two-sided p of the t test that belongs to the interval over the sources of images; None without one.
        holm: p, adjusted over all comparisons of the plan; None where p is.
        verdict: By the rule of `planned.outcomes_of`.
        missing: What the comparison lacks, a phrase each; empty if `found` is not None.
        failed: Runs that failed and are left out with the others of their seed.
        overrides: Rows that were not trained by their shipped recipe, with what differs.
    """

    planned: Planned
    found: Paired | None
    p: float | None
    holm: float | None
    verdict: Verdict
    missing: tuple[str, ...]
    failed: tuple[str, ...]
    overrides: tuple[str, ...] = ()

    @property
    def new_tasks(self) -> Estimate | None:
        """The estimate with the interval over the sources of images."""
        return self._cut(self.found.new_tasks) if self.found else None

    @property
    def new_seeds(self) -> Estimate | None:
        """The estimate with the interval over new seeds on these tasks."""
        return self._cut(self.found.these_tasks) if self.found else None

    @property
    def seeds(self) -> tuple[int, int] | None:
        """Smallest and largest number of shared seeds of a task."""
        counts = [task.n for task in self.found.tasks.values()] if self.found else []
        return (min(counts), max(counts)) if counts else None

    def _cut(self, estimate: Estimate) -> Estimate:
        bound = 100.0 * len(self.planned.backbones)
        return within(estimate, -bound, bound)


@dataclass(frozen=True)
class PlanResult:
    """A plan and the result of each of its comparisons, in its order."""

    plan: Plan
    outcomes: tuple[Outcome, ...]


# --------------------------------------------------------------------------------------------------------------- file


@dataclass(frozen=True)
class PlanFile:
    """A plan and the file that it was read from, for messages."""

    plan: Plan
    node: Node


def read_plan(path: Path | str) -> PlanFile:
    """Read a file of planned comparisons.

    Raises:
        ConfigError: If the file cannot be read, is malformed, or names a suite that does not exist, a method or
            backbone twice in one comparison, or one comparison twice. The text begins with `file:line:`.
    """
    node = read_yaml(Path(path), error=ConfigError, label="the file of comparisons")
    plan = convert(node.value, Plan, node.where, ConfigError, "comparisons")
    suites = [*list_suites(), *list_parts()]
    if plan.suite not in suites:
        raise unknown_name("suite", plan.suite, suites, where=node.where(["suite"]), error=ConfigError)
    if len(set(plan.seeds)) < len(plan.seeds):
        raise node.error(f"seeds must differ, not {list(plan.seeds)}", "seeds")
    seen: dict[tuple[frozenset[str], frozenset[str]], int] = {}
    for number, one in enumerate(plan.comparisons):
        place = ("comparisons", number)
        for key in ("methods", "backbones"):
            names = getattr(one, key)
            if len(set(names)) < len(names):
                raise node.error(f"{key} must differ, not {list(names)}", *place, key)
        first = seen.setdefault((frozenset(one.methods), frozenset(one.backbones)), number)
        if first != number:
            raise node.error(f"{one.words} is comparison {first + 1} already; give each comparison once", *place)
    return PlanFile(plan, node)
