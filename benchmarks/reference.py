"""Write the tables of the reference results into results/reference/README.md and README.md, from the committed records.

    make reference                                # runs everything anew (days on two cores), then prints this
    python benchmarks/reference.py                # print the tables of the committed records
    python benchmarks/reference.py --write        # put them between their marks in both files

Every number is computed from the records. A folder may hold several backbones: each has a section, and tables of its
own. Tables of incomplete results can be printed, with what is missing; they are not written.

The short table of README.md has ten rows: the controls (`full` and `linear` from pre-trained weights, `full` from
scratch, logistic regression on pixels), `svp`, and of all other methods those with the highest mean over the tasks on
the first backbone. Rows of further settings of a method, and the other controls of the plan, do not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from svp_bench.core.atomic import replacing
from svp_bench.methods.build import list_backbones
from svp_bench.records.selection import read_selected_config
from svp_bench.records.store import read_records
from svp_bench.stats.estimates import Estimate
from svp_bench.stats.inference import mean_of, paired
from svp_bench.tables.build import load_table
from svp_bench.tables.model import Row, Section, Table
from svp_bench.tables.plan import read_plan
from svp_bench.tables.planned import add_plan, is_argument, planned_grid, planned_notes
from svp_bench.tables.render_text import bullets, markdown_grid
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
MISSING = "–"
SHORT, CONTROLS = 10, ("full", "linear")  # rows of the short table, and its controls
WIDE = 2  # place of the wide table among the folders
OTHER_CONTROLS = ("last_blocks", "lp_ft")  # of the plan: in the long table only
COMPARISONS = FOLDER / "comparisons.yaml"

Seeds = Mapping[str, Mapping[int, float]]  # task → seed → top-1


def load(suite: SuiteCard, root: Path) -> Table:
    """Return the table of a folder's records: a section for each backbone.

    Raises:
        SystemExit: If a file is unreadable, a backbone has several sections, or a row has cells on other data.
    """
    records, problems = read_records(root)
    table = load_table(suite, records, problems)
    counts = Counter(section.first.backbone for section in table.sections)
    if problems or max(counts.values(), default=1) > 1:
        raise SystemExit(f"{root}: {len(problems)} unreadable records, sections by backbone: {dict(counts)}")
    for row in (row for section in table.sections for row in section.rows):
        if row.apart:
            raise SystemExit(f"{root}: {row.label} has further cells on other data or settings")
    return table


def lacks(root: Path, table: Table, tasks: Collection[str]) -> list[str]:
    """Return a phrase for each row that lacks tasks, or seeds that another row of its section has."""
    found = [] if table.sections else [f"{root.name}: no complete final run"]
    for section in table.sections:
        most = max(row.seeds[1] for row in section.rows)
        for row in section.rows:
            cells = sum(len(cell.seeds) == most for cell in row.cells.values())
            if cells < len(tasks):
                where = f"{row.label} on {section.first.backbone}"
                found.append(f"{root.name}: {where} has all {most} seeds on {cells} of {len(tasks)} tasks")
    return found


def by_seed(row: Row) -> Seeds:
    """Return task → seed → top-1 in percent."""
    return {
        task: {record.seed: record.metrics.top1 for record in cell.records if record.metrics is not None}
        for task, cell in row.cells.items()
    }


def plain_rows(part: Section) -> dict[str, Row]:
    """Return method → its row; of several that with the recipe's arguments, so that none is picked by its score."""
    found: dict[str, list[Row]] = {}
    for row in part.rows:
        found.setdefault(row.method, []).append(row)
    plain = {
        method: rows if len(rows) == 1 else [row for row in rows if not any(map(is_argument, row.overrides))]
        for method, rows in found.items()
    }
    return {method: rows[0] for method, rows in plain.items() if len(rows) == 1}


def by_mean(part: Section) -> list[Row]:
    """Return the rows of a section, the best mean first; rows without one last."""
    return sorted(part.rows, key=lambda row: -(row.task_mean or 0.0))


def mean_over(row: Row, tasks: Sequence[str]) -> str:
    """Return the mean over tasks with its interval over new seeds; "–" if one is missing."""
    seeds = by_seed(row)
    if not set(tasks) <= set(seeds):
        return MISSING
    return with_interval(mean_of({task: list(seeds[task].values()) for task in tasks}))


def trained(row: Row) -> str:
    """Return the number of trained parameters without the head."""
    low, high = row.adapter
    return f"{high:,}" if low == high else f"{low:,}–{high:,}"


def difference(ours: Seeds, base: Seeds, tasks: Sequence[str]) -> str:
    """Return the mean difference over tasks with its interval over new seeds; "–" if a task is missing."""
    if any(not set(ours.get(task, ())) & set(base.get(task, ())) for task in tasks):
        return MISSING
    parts = ({task: side[task] for task in tasks} for side in (ours, base))
    return with_interval(paired(*parts, [[task] for task in tasks]).these_tasks, sign=True)


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
        folder: Holds `demo` (pre-trained weights), `demo-random`, and perhaps `demo-wide`.

    Attributes:
        sections: Backbone → its section, from pre-trained weights; the first is that of the controls.
        random: The section of random weights; None if there are no such results yet.
        wide: The sections of `demo-wide`, if there is that folder: all other methods on a few tasks.
        missing: What is not there yet; empty if the results are complete.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        self.roots = folder / "demo", folder / "demo-random"
        self.suite = load_suite("demo")
        self.tasks = list(self.suite.tasks)
        self.table, scratch = (load(self.suite, root) for root in self.roots)
        self.sections = {part.first.backbone: part for part in self.table.sections}
        self.random = next(iter(scratch.sections), None)
        self.missing = [*lacks(self.roots[0], self.table, self.tasks), *lacks(self.roots[1], scratch, self.tasks)]
        self.wide: tuple[Section, ...] = ()
        if (folder / "demo-wide").is_dir():
            wide = load(self.suite, folder / "demo-wide")
            self.wide = wide.sections
            self.missing += lacks(folder / "demo-wide", wide, self.wide_tasks)
        self.selected = [
            (number, selected)
            for number, root in enumerate(self.roots)
            for selected in map(read_selected_config, sorted((root / "selected_configs").rglob("*.json")))
        ]
        self.ties = {
            (number, selected.task, selected.method)
            for number, selected in self.selected
            if selected.version == 1  # later ones break ties by the val loss
            and selected.count < FEW
            and sum(trial.mean == selected.trials[selected.chosen].mean for trial in selected.trials) > 1
        }
        self.floors, self.features = map(self._measured, ("raw_pixels.json", "features.json"))

    def _measured(self, name: str) -> dict[str, Any]:
        path = self.roots[0] / name
        if not path.is_file():
            self.missing.append(f"demo: no {name}")
            return {}
        measured: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return measured

    @property
    def first(self) -> Section | None:
        """The section of the first backbone."""
        return next(iter(self.sections.values()), None)

    def seeds_of(self, method: str, part: Section | None) -> Seeds:
        """Return the results of the only row of a method; empty if there is none.

        Raises:
            SystemExit: If it has several rows.
        """
        rows = [row for row in (part.rows if part else ()) if row.label == method or row.method == method]
        if len(rows) > 1:
            raise SystemExit(f"{method} has several rows: {', '.join(row.label for row in rows)}")
        return by_seed(rows[0]) if rows else {}

    def for_each(self, draw: Callable[[Section], str]) -> str:
        """Return a table for each backbone; with its name above where there are several."""
        if len(self.sections) < 2:
            return "".join(map(draw, self.sections.values()))
        return "\n\n".join(f"**`{backbone}`**\n\n{draw(part)}" for backbone, part in self.sections.items())

    def main_table(self) -> str:
        """Methods × tasks, the best mean first; then the controls. † marks ties on fewer than 50 images."""
        return self.for_each(self._main_table)

    def _main_table(self, part: Section) -> str:
        rows = [self._line(row, row.label, 0) for row in by_mean(part)]
        if part is self.first:
            scratch = self.random.rows if self.random else ()
            rows += [self._line(row, f"*{SCRATCH[row.method]}*", 1) for row in scratch]
            rows += [[f"*{called}*", *self._floor(name), MISSING] for name, called in FLOORS.items() if self.floors]
        head = ["", *(task.split("/")[1] for task in self.tasks), "mean of 8 [95 %]", "trained, without head"]
        return markdown(head, rows)

    def _floor(self, name: str) -> list[str]:
        """Return the accuracy on each task, and their mean."""
        floor = [self.floors[task][name]["top1"] for task in self.tasks]
        return [*(f"{one:.1f}" for one in floor), f"{sum(floor) / len(floor):.1f}"]

    def _line(self, row: Row, name: str, part: int, tasks: Sequence[str] | None = None) -> list[str]:
        tasks, shown = tasks or self.tasks, []
        for task in tasks:
            cell, tie = row.cells.get(task), (part, task, row.method) in self.ties
            shown.append(
                f"{cell.mean:.1f} ± {cell.std or 0.0:.1f}{TIE if tie else ''}" if cell is not None else MISSING
            )
        return [name, *shown, mean_over(row, tasks), trained(row)]

    @property
    def wide_tasks(self) -> list[str]:
        """The tasks of the wide table."""
        return [task for task in self.tasks if any(task in row.cells for part in self.wide for row in part.rows)]

    def wide_table(self) -> str:
        """Return all rows of the wide table, on the tasks that it has, in the order of their mean."""
        tasks = self.wide_tasks
        head = ["", *(task.split("/")[1] for task in tasks), f"mean of {len(tasks)} [95 %]", "trained, without head"]

        def score(row: Row) -> float:
            return sum(row.cells[task].mean for task in tasks) if set(tasks) <= set(row.cells) else 0.0

        rows = sorted((row for part in self.wide for row in part.rows), key=lambda row: (-score(row), row.label))
        return markdown(head, [self._line(row, row.label, WIDE, tasks) for row in rows])

    def short_table(self) -> str:
        """Return ten rows, by the rule of this module, with the mean over the tasks on each backbone."""
        if self.first is None:
            return "No results yet."
        parts = [plain_rows(part) for part in self.sections.values()]
        ordered = [row for row in by_mean(self.first) if row in parts[0].values() and row.task_mean is not None]
        always = [row for row in ordered if row.method in (*CONTROLS, "svp")]
        others = [row for row in ordered if row not in always and row.method not in OTHER_CONTROLS]
        floors = bool(self.floors) + any(row.method == "full" for row in (self.random.rows if self.random else ()))
        chosen = [*always, *others[: SHORT - len(always) - floors]]
        rows = []
        for row in (row for row in ordered if row in chosen):
            others_of = (part.get(row.method) for part in parts[1:])
            elsewhere = [MISSING if other is None else mean_over(other, self.tasks) for other in others_of]
            name = f"*{row.method}*" if row.method in CONTROLS else row.method
            rows.append([name, mean_over(row, self.tasks), *elsewhere, trained(row)])
        blank = [MISSING] * (len(self.sections) - 1)
        for row in self.random.rows if self.random else ():
            if row.method == "full":
                rows.append([f"*{SCRATCH['full']}*", mean_over(row, self.tasks), *blank, trained(row)])
        if self.floors:
            rows.append([f"*{FLOORS['pixels']}*", self._floor("pixels")[-1], *blank, MISSING])
        head = ["", *(f"mean of 8 on `{backbone}` [95 %]" for backbone in self.sections), "trained, without head"]
        return markdown(head, rows)

    def against_linear(self) -> str:
        """Each method minus linear: per group of tasks and over the suite, paired by task and seed."""
        return self.for_each(self._against_linear)

    def _against_linear(self, part: Section) -> str:
        base = self.seeds_of("linear", part)
        every = [task.split("/")[1] for task in self.tasks]
        groups = {
            **self.suite.groups,
            "all 8": every,
            f"the {len(every) - len(POSE)} that no pose answers": [name for name in every if name not in POSE],
        }
        rows = []
        for row in by_mean(part):
            if row.method != "linear":
                inside = ([f"demo/{name}" for name in names] for names in groups.values())
                rows.append([row.label, *(difference(by_seed(row), base, tasks) for tasks in inside)])
        return markdown(["minus linear", *groups], rows)

    def transfer(self) -> str:
        """What the weights are worth: against random ones and against raw pixels, per task."""
        rows = []
        probes, bases = self.seeds_of("linear", self.first), self.seeds_of("linear", self.random)
        tuned, scratch = self.seeds_of("full", self.first), self.seeds_of("full", self.random)
        for task in self.tasks:
            cut, floor = MISSING, MISSING
            if task in probes:
                ours = statistics.fmean(probes[task].values())
                if task in bases:
                    cut = f"{100 * ((100 - ours) / (100 - statistics.fmean(bases[task].values())) - 1):+.0f} %"
                if self.floors:
                    floor = f"{ours - max(self.floors[task][name]['top1'] for name in FLOORS):+.1f}"
            differences = [difference(probes, bases, [task]), difference(tuned, scratch, [task])]
            rows.append([task.split("/")[1], differences[0], cut, floor, differences[1]])
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
        for task in self.tasks if self.floors and self.features else ():
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
        counts: dict[str, Counter[str]] = {}
        ties: Counter[str] = Counter()
        edges: Counter[str] = Counter()
        backbones = {selected.context["model"]["backbone"] for _, selected in self.selected}
        for number, selected in self.selected:
            chosen = selected.trials[selected.chosen]
            name = (SCRATCH if number else {}).get(selected.method, selected.method)
            name += f" on {selected.context['model']['backbone']}" if len(backbones) > 1 else ""
            text = ", ".join(f"{key.rsplit('.', 1)[-1]} {value}" for key, value in chosen.values.items())
            counts.setdefault(name, Counter())[text] += 1
            ties[name] += sum(trial.mean == chosen.mean for trial in selected.trials) > 1
            rates = [trial.values[RATE] for trial in selected.trials]
            edges[name] += chosen.values[RATE] in (min(rates), max(rates))
        rows = []
        totals = {name: of.total() for name, of in counts.items()}
        same = len(set(totals.values())) == 1
        for name, of in counts.items():
            often = sorted(of.items(), key=lambda item: (-item[1], item[0]))
            settings = "; ".join(f"{text} ({count}×)" for text, count in often)
            numbers = (f"{n}" if same else f"{n} of {totals[name]}" for n in (ties[name], edges[name]))
            rows.append([name, settings, *numbers])
        each = f"of {next(iter(totals.values()))} " if same else ""
        return markdown(["method", "settings chosen on val", f"{each}by a tie", f"{each}at an edge"], rows)

    def comparisons(self) -> str:
        """Return the planned comparisons; of records with a search for each seed, as the plan demands."""
        runs = [record for part in self.sections.values() for record in part.members]
        if not all(record.search is not None and record.search.nested for record in runs):
            return "These records are older than the plan: one search served all seeds. The comparisons need new ones."
        (table,) = add_plan([self.table], read_plan(COMPARISONS), list_backbones)
        assert table.planned is not None
        return "\n".join([*markdown_grid(planned_grid(table.planned), left=2), "", *bullets(planned_notes(table))])

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
    return blocks_of(Reference(folder))


def blocks_of(reference: Reference) -> dict[Path, dict[str, str]]:
    """Return file → name of a block → its text."""
    return {
        ROOT / "README.md": {"short reference table": reference.short_table()},
        FOLDER / "README.md": {
            "reference table": reference.main_table(),
            "minus linear": reference.against_linear(),
            "transfer": reference.transfer(),
            "probes": reference.probes(),
            "planned comparisons": reference.comparisons(),
            **({"wide table": reference.wide_table()} if reference.wide else {}),
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
    parser.add_argument("--write", action="store_true", help="put them into both files")
    arguments = parser.parse_args()
    reference = Reference(arguments.folder)
    if reference.missing:
        print("Not complete:", *reference.missing, "", sep="\n")
        if arguments.write:
            raise SystemExit("nothing is written before the results are complete")
    for path, named in blocks_of(reference).items():
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
