"""Jobs: single runs of a sweep, as the command line that would make them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Job", "Outcome", "common_arguments"]

STATUSES = ("complete", "failed", "stopped", "claimed", "died")


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: Full name.
        method: `--method`: a name or a file.
        seed: Its seed.
        stage: "select" (a trial of a search) or "final".
        values: Dotted config key → value, of a trial.
        selected config: Path of the selected config, of a searched final run.
        common: Flags that all jobs of the sweep share.
    """

    task: str
    method: str
    seed: int
    stage: str
    values: Mapping[str, Any] = field(default_factory=dict)
    selected: str | None = None
    common: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What it is called in a message."""
        setting = ", ".join(f"{key.rsplit('.', 1)[-1]}={_text(value)}" for key, value in self.values.items())
        return f"{self.task}, {self.method}, seed {self.seed}" + (f", {setting}" if setting else "")

    @property
    def key(self) -> str:
        """What tells it from all other jobs of its sweep."""
        return json.dumps(self.to_json(), sort_keys=True)

    def arguments(self) -> list[str]:
        """Return the arguments of `svp-bench fit`."""
        given = ["--config", f"configs/{self.task}.yaml", *self.common, "--method", self.method]
        if self.selected is not None:
            given += ["--selected_config", self.selected]
        given += ["--seed_everything", str(self.seed), "--data.stage", self.stage]
        for key, value in self.values.items():
            given += [f"--{key}", _text(value)]
        return given

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "task": self.task,
            "method": self.method,
            "seed": self.seed,
            "stage": self.stage,
            "values": dict(self.values),
            "selected": self.selected,
            "common": list(self.common),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Job:
        """Undo `to_json`."""
        return cls(**{**data, "common": tuple(data["common"])})


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


@dataclass(frozen=True)
class Outcome:
    """How a job ended.

    Attributes:
        status: "complete"; "failed"; "stopped" (saved on the way, because it was asked to); "claimed" (another sweep is
            at it); "died" (its process did).
        found: Was its record there before?
        reason: One line, unless complete.
        record: Path of its record, or None.
        run_id: The run's name, or None.
        top1: On test, or on val of a trial.
        count: Images in that list.
        trainable: Trained parameters.
        selected_on: Name of the list that was scored.
        loss: Mean cross entropy on it.
        right: Of a trial: one packed bit an image of that list, classified rightly?
        images: Of a trial that holds out a fold: positions of these images in the list that is divided.
        divided: Of such a trial: that list's name.
        refused: Was the setting itself impossible, so that no run could begin? Then it is no matter of the machine.
        seconds: Wall time of the job.
        log: File with what the run printed, or None.
    """

    status: str
    found: bool = False
    reason: str | None = None
    record: str | None = None
    run_id: str | None = None
    top1: float | None = None
    count: int | None = None
    trainable: int | None = None
    selected_on: str | None = None
    loss: float | None = None
    right: str | None = None
    images: tuple[int, ...] | None = None
    divided: str | None = None
    refused: bool = False
    seconds: float = 0.0
    log: str | None = None


def common_arguments(configs: Sequence[str], rest: Sequence[str], results_root: str, runs_root: str) -> tuple[str, ...]:
    """Return the flags that all jobs of a sweep share.

    Args:
        configs: Further `--config` files, laid over the tasks' own.
        rest: Flags of `fit`, e.g. ("--data.root", "data").
        results_root: Where records go.
        runs_root: Where logs and checkpoints go.
    """
    layers = [part for config in configs for part in ("--config", config)]
    return (*layers, *rest, "--results_root", results_root, "--runs_root", runs_root)
