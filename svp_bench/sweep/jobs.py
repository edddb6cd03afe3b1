"""Jobs: single runs of a sweep, as the command line that would run them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        task: Full name.
        method: `--method`: a name or a file.
        seed: Its seed.
        stage: "select" (a trial of a search) or "final".
        values: Dotted config key → value, of a trial.
        selected: Path of the selected config, of a searched final run.
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
        """Its name in messages."""
        setting = "".join(f", {key.rsplit('.', 1)[-1]}={_text(value)}" for key, value in self.values.items())
        return f"{self.task}, {self.method}, seed {self.seed}{setting}"

    @property
    def key(self) -> str:
        """Text that identifies it in its sweep."""
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
        return dataclasses.asdict(self) | {"common": list(self.common)}

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
        status: "complete"; "failed"; "stopped" (as it was asked to, after saving its state); "claimed" (another sweep
            runs it); "died" (its process did).
        found: Whether its record existed before.
        reason: One line, unless complete.
        run_id: The run's name, or None.
        top1: On test, or on val of a trial.
        count: Images in that split.
        trainable: Trained parameters.
        selected_on: Of a trial: name of the split that was scored.
        loss: Mean cross entropy on it.
        right: Of a trial: one packed bit an image of that split, classified correctly?
        images: Of a trial that holds out a fold: positions of these images in the split that is divided.
        divided: Of such a trial: that split's name.
        refused: Whether the setting is impossible, so that no run could begin; else a failure may lie in the machine.
        seconds: Wall time of the job.
        log: File with the output of the run, or None.
    """

    status: str
    found: bool = False
    reason: str | None = None
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

    def text(self, stage: str) -> str:
        """Return a line for the user; of a final run without its score on test."""
        if self.status != "complete":
            again = "; it failed earlier and is not run again without --retry_failed" if self.found else ""
            return f"FAILED: {self.reason}{again}{f' (log: {self.log})' if self.log else ''}"
        score = f", {self.top1:.2f} % on val" if stage == "select" and self.top1 is not None else ""
        return f"done in {duration(self.seconds)}{score}"


def duration(seconds: float) -> str:
    """Return a time in words: "42 s", "3 min", "5 h 10 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
