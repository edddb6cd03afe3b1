"""Write the tables of the reference results into results/reference/README.md, from the committed records.

    make reference                                # runs everything anew (about a day on two cores), then prints this
    python benchmarks/reference.py                # print the tables of the committed records
    python benchmarks/reference.py --write        # put them between their marks in both files

Nothing here is typed in: every number is reckoned from the records.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from svp_bench.core.atomic import replacing
from svp_bench.records.selection import read_selected_config
from svp_bench.records.store import read_records
from svp_bench.stats.estimates import Estimate
from svp_bench.stats.inference import mean_of, paired
from svp_bench.tables.build import load_table
from svp_bench.tables.model import Row, Section
from svp_bench.tasks.cards import SuiteCard, load_suite

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "results" / "reference"
BEGIN, END = "<!-- begin: {} -->", "<!-- end: {} -->"
FLOORS = {"pixels": "logistic regression on pixels", "contrasts": "logistic regression on contrasts"}
RATE = "model.learning_rate"
POSE = ("location", "orientation", "size")  # what pre-training was asked for answers these
FEW = 50  # a tie on fewer images of val decided nothing: version 1 of the rule took the first setting that reached it
TIE = " †"
SCRATCH = {"full": "full, from scratch", "linear": "linear on random features"}

Seeds = Mapping[str, Mapping[int, float]]  # task → seed → top-1


def section(suite: SuiteCard, root: Path) -> Section:
    """Return the one section that a folder's records make: all tasks, one setting, searched.

    Raises:
        SystemExit: If they make something else.
    """
    records, problems = read_records(root)
    table = load_table(suite, records, problems)
    if problems or len(table.sections) != 1:
        raise SystemExit(f"{root}: {len(problems)} unreadable records, {len(table.sections)} sections instead of one")
    for row in table.sections[0].rows:
        if len(row.cells) != len(suite.tasks) or row.apart:
            raise SystemExit(f"{root}: {row.label} has {len(row.cells)} of {len(suite.tasks)} tasks")
    return table.sections[0]


def by_seed(row: Row) -> Seeds:
    """Return task → seed → top-1 in percent."""
    return {
        task: {record.seed: record.metrics.top1 for record in cell.records if record.metrics is not None}
        for task, cell in row.cells.items()
    }


def with_interval(estimate: Estimate, *, sign: bool = False) -> str:
    """Return "71.3 [70.9, 71.7]"."""
    form = "+.1f" if sign else ".1f"
    if estimate.low is None or estimate.high is None:
        return f"{estimate.value:{form}}"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table, its first column to the left."""
    lines = ["| " + " | ".join(head) + " |", "| :--- |" + " ---: |" * (len(head) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


class Reference:
    """The reference results, read once.

    Args:
        folder: Holds `demo` (embedded weights) and `demo-random`.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.roots = folder / "demo", folder / "demo-random"
        self.suite = load_suite("demo")
        self.tasks = list(self.suite.tasks)
        self.embedded = section(self.suite, self.roots[0])
        self.random = section(self.suite, self.roots[1])
        self.ties = {
            (number, selected.task, selected.method)
            for number, root in enumerate(self.roots)
            for selected in map(read_selected_config, sorted((root / "selected_configs").rglob("*.json")))
            if selected.count < FEW
            and sum(trial.mean == selected.trials[selected.chosen].mean for trial in selected.trials) > 1
        }
        self.floors, self.features = (
            json.loads((self.roots[0] / name).read_text(encoding="utf-8"))["tasks"]
            for name in ("raw_pixels.json", "features.json")
        )

    def row(self, method: str, part: Section | None = None) -> Row:
        """Return the row of a method."""
        return next(row for row in (part or self.embedded).rows if row.method == method)

    def main_table(self) -> str:
        """Methods × tasks, the best mean first; then the controls. † marks ties on fewer than 50 images."""
        sources = self.embedded.rows
        ordered = sorted(sources, key=lambda row: -(row.task_mean or 0.0))
        rows = [self._line(row, row.method, 0) for row in ordered]
        rows += [self._line(row, f"*{SCRATCH[row.method]}*", 1) for row in self.random.rows]
        for name, called in FLOORS.items():
            floor = [self.floors[task][name]["top1"] for task in self.tasks]
            rows.append([f"*{called}*", *(f"{one:.1f}" for one in floor), f"{sum(floor) / len(floor):.1f}", "–"])
        head = ["", *(task.split("/")[1] for task in self.tasks), "mean of 8 [95 %]", "trained, without head"]
        return markdown(head, rows)

    def _line(self, row: Row, name: str, part: int) -> list[str]:
        cells = [row.cells[task] for task in self.tasks]
        mean = mean_of({task: list(seeds.values()) for task, seeds in by_seed(row).items()})
        shown = [
            f"{cell.mean:.1f} ± {cell.std or 0.0:.1f}{TIE if (part, cell.task, row.method) in self.ties else ''}"
            for cell in cells
        ]
        low, high = row.adapter
        trained = f"{high:,}" if low == high else f"{low:,}–{high:,}"
        return [name, *shown, with_interval(mean), trained]

    def against_linear(self) -> str:
        """Each method minus linear: per group of tasks and over the suite, paired by task and seed."""
        base = by_seed(self.row("linear"))
        every = [task.split("/")[1] for task in self.tasks]
        groups = {
            **self.suite.groups,
            "all 8": every,
            f"the {len(every) - len(POSE)} that no pose answers": [name for name in every if name not in POSE],
        }
        rows = []
        for row in sorted(self.embedded.rows, key=lambda row: -(row.task_mean or 0.0)):
            if row.method == "linear":
                continue
            ours = by_seed(row)
            cells = [row.method]
            for names in groups.values():
                inside = [f"demo/{name}" for name in names]
                difference = paired(
                    {task: ours[task] for task in inside},
                    {task: base[task] for task in inside},
                    [[task] for task in inside],
                ).these_tasks
                cells.append(with_interval(difference, sign=True))
            rows.append(cells)
        return markdown(["minus linear", *groups], rows)

    def transfer(self) -> str:
        """What the weights are worth: against random ones and against raw pixels, per task."""
        rows = []
        probes, bases = by_seed(self.row("linear")), by_seed(self.row("linear", self.random))
        tuned, scratch = by_seed(self.row("full")), by_seed(self.row("full", self.random))
        for task in self.tasks:
            ours, theirs = (sum(one[task].values()) / len(one[task]) for one in (probes, bases))
            cut = 100 * (1 - (100 - ours) / (100 - theirs))
            differences = [
                paired({task: a[task]}, {task: b[task]}, [[task]]).these_tasks
                for a, b in ((probes, bases), (tuned, scratch))
            ]
            rows.append(
                [
                    task.split("/")[1],
                    with_interval(differences[0], sign=True),
                    f"{-cut:+.0f} %",
                    f"{ours - max(self.floors[task][name]['top1'] for name in FLOORS):+.1f}",
                    with_interval(differences[1], sign=True),
                ]
            )
        head = [
            "",
            "linear: embedded − random weights",
            "its error",
            "linear: embedded − the better of pixels and contrasts",
            "full: embedded − from scratch",
        ]
        return markdown(head, rows)

    def probes(self) -> str:
        """Logistic regressions that have converged: on pixels, contrasts, features of both kinds of weights."""
        rows = []
        for task in self.tasks:
            floors, probed = self.floors[task], self.features[task]
            if floors["data_digest"] != probed["data_digest"]:
                raise SystemExit(f"{task}: the floors and the features are of other data")
            plain = [floors[name]["top1"] for name in FLOORS]
            chances = [one["top1"] for one in probed["random"]]
            ours, chance = probed["embedded"]["top1"], statistics.mean(chances)
            rows.append(
                [
                    task.split("/")[1],
                    *(f"{one:.1f}" for one in plain),
                    f"{chance:.1f} ± {statistics.stdev(chances):.1f}",
                    f"{ours:.1f}",
                    f"{-100 * (ours - chance) / (100 - chance):+.0f} %",
                    f"{ours - max(plain):+.1f}",
                ]
            )
        head = [
            "",
            *FLOORS,
            "random features",
            "embedded features",
            "error, random → embedded",
            "embedded − the better of the first two",
        ]
        return markdown(head, rows)

    def chosen(self) -> str:
        """Return the settings that the searches chose, and how often by a tie or at an edge of the grid."""
        rows = []
        for root, names in zip(self.roots, ({}, SCRATCH), strict=True):
            counts: dict[str, Counter[str]] = {}
            ties: Counter[str] = Counter()
            edges: Counter[str] = Counter()
            for path in sorted((root / "selected_configs").rglob("*.json")):
                selected = read_selected_config(path)
                chosen, method = selected.trials[selected.chosen], selected.method
                text = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in chosen.values.items())
                counts.setdefault(method, Counter())[text] += 1
                ties[method] += sum(trial.mean == chosen.mean for trial in selected.trials) > 1
                rates = [trial.values[RATE] for trial in selected.trials]
                edges[method] += chosen.values[RATE] in (min(rates), max(rates))
            for method, of in counts.items():
                often = sorted(of.items(), key=lambda item: (-item[1], item[0]))
                settings = "; ".join(f"{text} ({count}×)" for text, count in often)
                rows.append([names.get(method, method), settings, str(ties[method]), str(edges[method])])
        return markdown(["method", "settings chosen on val", "of 8 by a tie", "of 8 at an edge"], rows)

    def device(self) -> str:
        """Say what made them."""
        records = [record for root in self.roots for record in read_records(root)[0]]
        finals = [record for record in records if record.kind == "final"]
        hours = sum(sum(v for k, v in record.times.items() if k.endswith("_seconds")) for record in records) / 3600
        devices, commits = {record.device for record in records}, {(record.commit or "")[:7] for record in records}
        return (
            f"{len(finals)} final runs and {len(records) - len(finals)} trials of searches; {hours:.1f} hours of one "
            f"core ({', '.join(sorted(devices))}); commit {', '.join(sorted(commits))}."
        )


def blocks(folder: Path = FOLDER) -> dict[Path, dict[str, str]]:
    """Return file → name of a block → its text."""
    reference = Reference(folder)
    return {
        FOLDER / "README.md": {
            "reference table": reference.main_table(),
            "minus linear": reference.against_linear(),
            "transfer": reference.transfer(),
            "probes": reference.probes(),
            "chosen": reference.chosen(),
            "made by": reference.device(),
        },
    }


def inserted(text: str, name: str, block: str) -> str:
    """Return a file's text with a block between its marks.

    Raises:
        SystemExit: If it has no such marks.
    """
    begin, end = BEGIN.format(name), END.format(name)
    head, found, rest = text.partition(begin)
    _, also, tail = rest.partition(end)
    if not (found and also):
        raise SystemExit(f"no marks {begin} … {end}")
    return f"{head}{begin}\n\n{block}\n\n{end}{tail}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables of the reference results, from their records.")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="of the records; those committed by default")
    parser.add_argument("--write", action="store_true", help="put them into results/reference/README.md")
    arguments = parser.parse_args()
    for path, named in blocks(arguments.folder).items():
        text = path.read_text(encoding="utf-8")
        for name, block in named.items():
            text = inserted(text, name, block)
            if not arguments.write:
                print(f"--- {name}\n\n{block}\n")
        if arguments.write:
            with replacing(path) as file:
                file.write(text.encode())
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
