"""A resolved config: what a run is, with the cards and files that it was read from."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from svp_bench.config.compose import Composed
from svp_bench.records.digests import card_digest, config_digest, setting_digest
from svp_bench.records.record import SearchSummary
from svp_bench.tasks.cards import load_protocol, load_suite, load_task


@dataclass(frozen=True)
class ResolvedConfig:
    """A command line, resolved.

    Attributes:
        subcommand: fit, validate or test.
        config: The resolved config, as in the record.
        method: The method's name.
        search: The search that selected values of the config, or None.
        seed: The run's seed.
        results_root: Folder of the records.
        runs_root: Folder of logs and checkpoints.
        sources: Digests of the files behind classes that are not shipped, by name; see `source_files`.
        read: The cards and config files that were read.
        card_digests: `card_digest` of the "task" and the "protocol" card.
        composed: The layers.
        arguments: The parsed arguments; None if the config was not parsed in this process.
        notices: Lines for the user about derived or changed values.
    """

    subcommand: str
    config: dict[str, Any]
    method: str
    search: SearchSummary | None
    seed: int
    results_root: Path
    runs_root: Path
    sources: Mapping[str, str]
    read: tuple[Path, ...]
    card_digests: Mapping[str, str]
    composed: Composed = field(compare=False)
    arguments: Any = field(compare=False)
    notices: tuple[str, ...] = field(compare=False)

    @classmethod
    def of(
        cls,
        composed: Composed,
        subcommand: str,
        config: dict[str, Any],
        method: str,
        roots: tuple[str, str],
        sources: Mapping[str, str],
        arguments: Any = None,
        notices: Sequence[str] = (),
    ) -> ResolvedConfig:
        """Return the resolved config of a composed one; `roots` are results_root and runs_root."""
        card = load_task(str(config["data"]["task"]))
        suite = load_suite(card.suite)
        protocol = load_protocol(str(config["data"].get("protocol") or suite.protocol))
        names = [card.path.parent / card.class_names] if card.class_names else []
        layers = {origin.rpartition(":")[0] for origin in composed.origins.values()} - {""}
        return cls(
            subcommand=subcommand,
            config=config,
            method=method,
            search=composed.search,
            seed=config["seed_everything"],
            results_root=Path(roots[0]),
            runs_root=Path(roots[1]),
            sources=sources,
            read=(card.path, suite.path, protocol.path, *names, *map(Path, sorted(layers))),
            card_digests={"task": card_digest(card), "protocol": card_digest(protocol)},
            composed=composed,
            arguments=arguments,
            notices=tuple(notices),
        )

    @property
    def task(self) -> str:
        """The task's full name."""
        return str(self.config["data"]["task"])

    @property
    def config_digest(self) -> str:
        """Digest of the cell."""
        return config_digest(self.config)

    @property
    def setting_digest(self) -> str:
        """Digest of the table row."""
        return setting_digest(self.config, self.search)

    def with_origin(self, text: str) -> str:
        """Put "file:line: " before a message about a config key that a file sets."""
        found = re.match(r"(?:--)?((?:model|data|trainer)\.[\w.]+) ", text)
        where = self.composed.origin(found[1]) if found else None
        return f"{where}: {text}" if where else text
