"""Words and numbers that all renderings of a table share: columns, short texts, and the notes under a section."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from svp_bench.core.errors import plural, printable
from svp_bench.records.published import mean_names
from svp_bench.stats.estimates import FEWEST_PAIRS as FEWEST
from svp_bench.stats.estimates import FEWEST_SOURCES
from svp_bench.tables.comparison import sources_of
from svp_bench.tables.labels import short_value
from svp_bench.tables.model import CARD, PROVENANCE, Cell, Comparison, Contrast, Row, Section, Table
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    from svp_bench.stats.estimates import Estimate

__all__ = [
    "DIGITS",
    "IMAGES",
    "MAJORITY",
    "MISSING",
    "NOT_COMPARABLE",
    "QUOTED",
    "RANDOM_WEIGHTS",
    "SYNTHETIC_NOTE",
    "Whisker",
    "above",
    "averaged_tasks",
    "column_estimates",
    "columns",
    "comparison_notes",
    "counts",
    "data_notes",
    "dirty_notes",
    "heading",
    "images_note",
    "interval",
    "interval_notes",
    "left_out_lines",
    "left_out_reasons",
    "majority_notes",
    "majority_scores",
    "mark_notes",
    "marks",
    "named",
    "new_tasks_note",
    "one_line",
    "override_notes",
    "p_value",
    "partial",
    "partial_notes",
    "percent",
    "plural",
    "provenance_notes",
    "ranks_notes",
    "scores",
    "section_notes",
    "selection_notes",
    "short_name",
    "shown_columns",
    "shown_scores",
    "signed",
    "size",
    "size_span",
    "sizes",
    "smallest",
    "span",
    "unknown_variance_notes",
    "untested_note",
    "verdict_marks",
    "weights",
    "whiskers",
]

MISSING = "–"
NOT_COMPARABLE = "not comparable"
"""Why a record is left out whose run did what no record describes."""
IMAGES = "*"
"""Behind ± that is over test images, because one seed shows no spread over seeds."""
MAJORITY = "majority class"
"""Label of the line with the accuracy of always answering the most frequent class of the test split."""
QUOTED = "published, not measured here"
_SHOWN = 6  # overrides of a row that a note lists
DIGITS = 4
"""Decimals in CSV files; two means that agree in them share a rank."""
RANDOM_WEIGHTS = "The backbone has random weights: these rows are a smoke test and are not ranked."
SYNTHETIC_NOTE = "§ Synthetic data: rows with such a cell are not ranked."


# ----------------------------------------------------------------------------------------------------------- columns


def columns(suite: SuiteCard) -> list[str]:
    """Return the names of the score columns: task ids in suite order, groups, both averages."""
    return [*(short_name(task) for task in suite.tasks), *suite.groups, *mean_names(suite)]


def scores(row: Row, suite: SuiteCard) -> list[float | None]:
    """Return the scores of `row`, in the order of `columns`."""
    tasks = [row.cells[task].mean if task in row.cells else None for task in suite.tasks]
    return [*tasks, *row.groups.values(), row.task_mean, row.group_mean]


class Whisker(NamedTuple):
    """What stands behind a mean: an interval, and whether it is over test images instead of seeds."""

    value: float
    low: float
    high: float
    images: bool

    @property
    def half(self) -> float | None:
        """Half the width; None where ± it would leave 0 to 100."""
        half = (self.high - self.low) / 2
        return half if self.value - half >= 0 and self.value + half <= 100 else None

    @property
    def text(self) -> str:
        """Return "± 1.25", or "[97.50, 100.00]" where ± would leave 0 to 100; with a star over test images."""
        shown = f"[{self.low:.2f}, {self.high:.2f}]" if self.half is None else f"± {self.half:.2f}"
        return f"{shown}{IMAGES if self.images else ''}"


def whiskers(row: Row, suite: SuiteCard) -> list[Whisker | None]:
    """Return what stands behind ± in each of `columns`: of the means only.

    It is over new seeds, where the variance over seeds is known, else over new test images. The mean of the tasks that
    an incomplete row has takes the place of the mean over all tasks.
    """
    known = row.intervals
    seeds = [*(known.groups[group] for group in suite.groups), known.present, known.group_mean]
    images = [*(known.group_images[group] for group in suite.groups), known.images, known.group_mean_images]
    return [*(None for _ in suite.tasks), *(_whisker(*pair) for pair in zip(seeds, images, strict=True))]


def _whisker(seeds: Estimate | None, images: Estimate | None) -> Whisker | None:
    for estimate, over_images in ((seeds, False), (images, True)):
        if estimate is not None and estimate.low is not None and estimate.high is not None:
            return Whisker(estimate.value, estimate.low, estimate.high, over_images)
    return None


def partial(row: Row, suite: SuiteCard) -> str:
    """Return "3/8" for a row with 3 of 8 tasks, or nothing for a complete one."""
    return "" if len(row.cells) == len(suite.tasks) else f"{len(row.cells)}/{len(suite.tasks)}"


def shown_scores(row: Row, suite: SuiteCard) -> list[float | None]:
    """As `scores`, but of an incomplete row the mean over the tasks that it has stands for the mean over all."""
    return [*scores(row, suite)[:-2], row.present_mean, row.group_mean]


def majority_scores(section: Section, suite: SuiteCard) -> list[float | None]:
    """Return the accuracy of the majority class in each of `columns`; of means where all of their tasks have one."""
    known = section.majorities
    means = [
        math.fsum(known[task] for task in tasks) / len(tasks) if tasks <= set(known) else None
        for tasks in averaged_tasks(suite)[:-1]
    ]
    groups = means[len(suite.tasks) : -1]
    of_groups = [mean for mean in groups if mean is not None]
    return [*means, math.fsum(of_groups) / len(groups) if len(of_groups) == len(groups) else None]


def column_estimates(row: Row, suite: SuiteCard) -> list[Estimate | None]:
    """Return the estimate (over new seeds) of each of `columns`; None for tasks and missing results."""
    known = row.intervals
    groups = [known.groups[group] for group in suite.groups]
    return [*(None for _ in suite.tasks), *groups, known.task_mean, known.group_mean]


def averaged_tasks(suite: SuiteCard) -> list[set[str]]:
    """Return, for each of `columns`, the tasks whose scores are in it."""
    groups = [{suite.full(task) for task in tasks} for tasks in suite.groups.values()]
    return [*({task} for task in suite.tasks), *groups, set(suite.tasks), set(suite.tasks)]


def shown_columns(suite: SuiteCard, tasks: bool = True) -> list[int]:
    """Return indices into `columns` of what a reader is shown: of a single group, the means over it say nothing new."""
    count, groups = len(suite.tasks), len(suite.groups)
    means = [count + groups] if groups == 1 else [*range(count, count + groups + 2)]
    return [*(range(count) if tasks else ()), *means]


# ----------------------------------------------------------------------------------------------------------- numbers


def short_name(task: str) -> str:
    """Return a task's name without its suite."""
    return task.split("/")[1]


def span(low: int, high: int) -> str:
    """Return "3", or "1–3"."""
    return str(low) if low == high else f"{low}–{high}"


def percent(level: float) -> str:
    """Return "95 %" for 0.95."""
    return f"{round(100 * level, 6):g} %"


def interval(estimate: Estimate | None) -> str:
    """Return "[71.08, 71.92]", or "–" without an interval."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return MISSING
    return f"[{_point(estimate.low)}, {_point(estimate.high)}]"


def signed(value: float | None) -> str:
    """Return "+1.25", "-0.50", "0.00", or "–" without a value."""
    if value is None:
        return MISSING
    text = f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def _point(value: float) -> str:
    text = f"{value:.2f}"
    return "0.00" if text == "-0.00" else text


def p_value(p: float | None) -> str:
    """Return "0.031", "<0.001", or "–" without a value."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def size(count: int) -> str:
    """Return "999", "75.6K", "4.76M"."""
    if count < 1000:
        return str(count)
    if count < 999_950:  # from here on, thousands would round up to 1000.0K
        return f"{count / 1e3:.1f}K"
    return f"{count / 1e6:.2f}M"


def sizes(row: Row) -> str:
    """Return the number of trainable parameters without the head, short."""
    return size_span(*row.adapter)


def size_span(low: int, high: int) -> str:
    """Return "75.6K", or "75.6K–4.76M"."""
    return size(low) if size(low) == size(high) else f"{size(low)}–{size(high)}"


def marks(cell: Cell) -> str:
    """Return the marks of a cell: of its data § or † and ‡ as they apply, and ‖ where its seeds differ in more."""
    data = "§" if cell.synthetic else ("†" if cell.different else "") + ("‡" if cell.variant != CARD else "")
    return data + ("‖" if cell.mixed else "")


def one_line(text: str) -> str:
    """Return `text` with its runs of blanks and line ends as single blanks, and control characters as escapes."""
    return printable(" ".join(text.split()))


# ------------------------------------------------------------------------------------------------------------- notes


def weights(section: Section) -> str:
    """Return where the weights came from, with the first digits of their digest."""
    if section.checkpoint_digest is None:
        return "random weights"
    return f"{section.checkpoint} (sha256:{section.checkpoint_digest.removeprefix('sha256:')[:12]})"


def heading(section: Section) -> str:
    """Return the heading of a section: backbone, weights, protocol and track."""
    data = (section.data,) if section.data else ()
    parts = (*data, section.backbone, weights(section), f"{section.protocol} {section.protocol_version}")
    return f"{', '.join(parts)}, track {section.track.title}"


def above(section: Section) -> str:
    """Return the line above a section's rows: its track in words."""
    return f"Track {section.track.words}."


def section_notes(section: Section, suite: SuiteCard, level: float) -> list[str]:
    """Return what has to stand under the rows of a section."""
    cells = [cell for row in section.rows for cell in row.cells.values()]
    notes = [
        f"Protocol {section.protocol}, version {section.protocol_version}. "
        + (section.selection or "Its card is not available in this version, so its selection rule cannot be quoted."),
        f"Backbone {section.backbone}, {weights(section)}. Precision: {', '.join(section.precisions)}.",
        f"Cards: {_versions(cells)}.",
        "Accuracy in percent. ± behind a task is the standard deviation over its seeds.",
        *interval_notes(section, suite, level),
        *partial_notes(section, suite),
        *majority_notes(section),
        *selection_notes(section),
        *override_notes(section),
        *provenance_notes(section),
    ]
    return notes + mark_notes(section, suite)


def mark_notes(section: Section, suite: SuiteCard) -> list[str]:
    """Return the notes on marked cells, the data, uncommitted changes and shared images."""
    cells = [cell for row in section.rows for cell in row.cells.values()]
    notes = []
    if any("†" in marks(cell) for cell in cells):
        notes.append("† The files on disk differ from the task card in count or digest; the records state how.")
    variants = sorted({f"{short_name(cell.task)} ({cell.variant})" for cell in cells if "‡" in marks(cell)})
    if variants:
        notes.append(f"‡ Another variant of the data than that of the card: {', '.join(variants)}.")
    if any(cell.synthetic for cell in cells):
        notes.append(SYNTHETIC_NOTE)
    notes += [*data_notes(section, suite), *dirty_notes(section)]
    shared = "; ".join(", ".join(group) for group in suite.same_images)
    if shared:
        notes.append(f"Tasks that share their images, and are not independent: {shared}.")
    return notes


def interval_notes(section: Section, suite: SuiteCard, level: float) -> list[str]:
    """Say what ± behind a mean is, or why there is none; nothing for random weights, whose means stand without."""
    shown = [] if section.random else [w for row in section.rows for w in whiskers(row, suite) if w is not None]
    notes = []
    if any(not whisker.images for whisker in shown):
        notes.append(
            f"± behind a mean is half its {percent(level)} interval for these tasks and new seeds "
            "(Welch–Satterthwaite)."
        )
    if any(whisker.images for whisker in shown):
        notes.append(images_note(level))
    if any(whisker.half is None for whisker in shown):
        notes.append("In brackets: the same interval, where ± would leave 0 to 100.")
    return notes + unknown_variance_notes(section, suite)


def images_note(level: float) -> str:
    """Return the note on ± with a star."""
    return (
        f"± … {IMAGES} behind a mean is half its {percent(level)} interval over test images (Wilson), where the "
        "variance over seeds is unknown: about these runs and other test images, not about other seeds."
    )


def partial_notes(section: Section, suite: SuiteCard) -> list[str]:
    """Say what the mean of an incomplete row is."""
    if not any(partial(row, suite) for row in section.rows):
        return []
    return [
        f"(n/{len(suite.tasks)}): partial, the mean over the n tasks that the row has; not ranked, and means over "
        "other tasks do not compare."
    ]


def majority_notes(section: Section) -> list[str]:
    """Say what the line of the majority class is; nothing where no record has counts by class."""
    if not section.majorities:
        return []
    return [
        f"{MAJORITY[0].upper()}{MAJORITY[1:]}: accuracy of always answering the most frequent class of the test split."
    ]


def unknown_variance_notes(section: Section, suite: SuiteCard) -> list[str]:
    """Say which rows have means without an interval over seeds, and why."""
    if section.random:
        return []
    unknown: list[str] = []
    wide: list[str] = []
    for row in section.rows:
        estimates = [row.intervals.present, *(e for e in column_estimates(row, suite) if e is not None)]
        if any(estimate.half_width is None for estimate in estimates):
            known = row.seeds[0] > 1 and any(cell.std for cell in row.cells.values())
            (wide if known and row.intervals.present.half_width is None else unknown).append(row.label)
    notes = []
    if unknown:
        notes.append(
            "No interval over new seeds where a task behind the mean has one seed, or all seeds of all its tasks gave "
            f"the same number: the variance is unknown ({_named(unknown)})."
        )
    if wide:
        notes.append(f"No interval over new seeds where it would hold every accuracy from 0 to 100 ({_named(wide)}).")
    return notes


def _named(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 3 else plural(len(labels), "row")


def new_tasks_note(section: Section, suite: SuiteCard) -> list[str]:
    """Say what the interval over new tasks is, or why there is none."""
    known = [row.intervals.new_tasks for row in section.rows if row.intervals.new_tasks is not None]
    count = len(sources_of(suite))
    sources = plural(count, "independent source") + " of images"
    if not known:
        return []
    if count < FEWEST_SOURCES:
        return [f"No interval over new tasks: the suite has {sources}, and {FEWEST_SOURCES} are the fewest."]
    if all(estimate.low is None for estimate in known):
        return ["No interval over new tasks: it would hold every accuracy, or the sources do not differ."]
    return [
        "New seeds: other seeds on these tasks. New tasks: other tasks like these; the"
        f" sample is the suite's {sources} (CR2, Satterthwaite), and one seed a task is enough for it. Each task weighs"
        " the same in the mean and in its intervals."
    ]


def comparison_notes(section: Section, suite: SuiteCard, level: float, cells: bool = True) -> list[str]:
    """Say what the differences to the control are, and which rows or marks are missing, and why.

    Args:
        section: The section.
        suite: Its suite.
        level: Of the intervals.
        cells: Are the tasks shown, with their marks?
    """
    comparison = section.comparison
    if comparison is None:
        return []
    if comparison.missing is not None:
        return [f"No differences: {comparison.missing}."]
    notes = []
    found = comparison.contrasts
    if found:
        notes.append(
            f"Row minus {comparison.control}, in points: mean over tasks, each weighing the same, of the differences "
            f"of runs with the same seed on the same images. Intervals ({percent(level)}) of this mean for other seeds "
            "on these tasks, for other test images (of these runs), and for other tasks."
        )
        notes += _test_notes(found, suite, level)
        fewer = [c for c in found if len(c.tasks) < len(suite.tasks)]
        if fewer:
            raw = " Their p is raw and not in Holm's family: it is about another mean."
            notes.append(
                f"On fewer than {plural(len(suite.tasks), 'task')}, those that both rows have on the same "
                "images with a shared "
                f"seed: {', '.join(f'{c.row} ({len(c.tasks)})' for c in fewer)}."
                + (raw if any(c.p is not None for c in fewer) else "")
            )
        if any(c.these_tasks.low is None for c in found):
            notes.append(
                "No interval over new seeds where a task has one shared seed, or the differences of all seeds are the "
                "same: the variance is unknown."
            )
        if any(c.sources < FEWEST_SOURCES for c in found):
            notes.append(f"No interval over new tasks with fewer than {FEWEST_SOURCES} independent sources of images.")
        notes += _verdict_notes(comparison, level, cells)
    notes += [f"Not compared: {label} {why}." for label, why in comparison.incomparable.items()]
    return notes


def _test_notes(found: Sequence[Contrast], suite: SuiteCard, level: float) -> list[str]:
    """Say what p is, and where there is none because no outcome could have rejected."""
    notes = []
    tested = [c for c in found if c.p is not None]
    if tested:
        whole = [c for c in tested if c.holm is not None]
        counts = [c.sources for c in tested]
        notes.append(
            f"p: two-sided sign flip over {span(min(counts), max(counts))} independent sources of images"
            + (f"; adjusted by Holm over {plural(len(whole), 'complete row')}." if whole else ".")
        )
    for complete in (True, False):
        open_ = [c for c in found if c.p is None and (len(c.tasks) == len(suite.tasks)) == complete]
        if open_:
            notes.append(untested_note(open_, level, len(open_) if complete else 1))
    return notes


def untested_note(untested: Sequence[Contrast], level: float, tests: int) -> str:
    """Say that differences cannot be tested, with how many sources."""
    counts = [c.sources for c in untested]
    over = f"over {plural(tests, 'row')} (Holm) " if tests > 1 else ""
    return (
        f"No p: the differences cannot be tested with {span(min(counts), max(counts))} "
        f"source{'' if max(counts) == 1 else 's'} of images; {over}no outcome could be significant at "
        f"{percent(1 - level)}{smallest(min(c.least for c in untested))}."
    )


def smallest(least: float) -> str:
    """Return ", the smallest possible p is 0.250" where that is informative."""
    return f": the smallest possible p is {p_value(least)}" if least < 1 else ""


def _verdict_notes(comparison: Comparison, level: float, cells: bool) -> list[str]:
    verdicts = [verdict for found in comparison.contrasts for verdict in found.verdicts.values()]
    few = verdicts.count("too few")
    if few == len(verdicts):
        return [f"No per-cell marks: n < {FEWEST} paired seeds."]
    if not cells:
        return ["Per-cell marks are on the Markdown page."]
    notes = [
        f"▲ ▼ behind a task: better, worse than {comparison.control} by a sign flip over the shared seeds, "
        f"{percent(level)}, from {FEWEST} on, each cell by itself: of {plural(len(verdicts) - few, 'cell')} "
        "without any "
        f"difference, about {(1 - level) * (len(verdicts) - few):.0f} would get a mark."
    ]
    return [*notes, f"No mark on {plural(few, 'cell')}: n < {FEWEST} paired seeds."] if few else notes


def verdict_marks(section: Section) -> dict[str, dict[str, str]]:
    """Return label → task → "▲" or "▼" where a cell differs from that of the control."""
    signs = {"better": "▲", "worse": "▼"}
    return {
        found.row: {task: signs[verdict] for task, verdict in found.verdicts.items() if verdict in signs}
        for found in (section.comparison.contrasts if section.comparison else ())
    }


def ranks_notes(section: Section, level: float) -> list[str]:
    """Return the mean ranks of the rows, and the rows that are not separated, where a test could separate any two."""
    ranks = section.ranks
    if ranks is None:
        return []
    listed = ", ".join(f"{label} {rank:.2f}" for label, rank in ranks.mean_ranks.items())
    notes = [f"Mean ranks (descriptive): {listed}."]
    if ranks.least >= 1 - level:
        pairs = plural(len(ranks.p), "pair")
        return [
            *notes,
            f"The order cannot be tested with {plural(ranks.n_sources, 'source')} of images: over {pairs} (Holm) no "
            f"outcome could be significant at {percent(1 - level)}{smallest(ranks.least)}.",
        ]
    groups = "; ".join(" = ".join(group) for group in ranks.cliques)
    return [
        *notes,
        f"Not separated (Wilcoxon signed-rank over the sources of images, Holm over all pairs, {percent(level)}; no "
        f"proof of equality): {groups or 'none'}.",
    ]


def selection_notes(section: Section) -> list[str]:
    """Say where numbers of this table must not be used to choose, and where budgets were not used up."""
    several = sorted(
        method
        for method, count in Counter(row.method for row in section.rows if row.rank is not None).items()
        if count > 1
    )
    notes = []
    if several:
        notes.append(
            f"Several settings of {', '.join(several)} are in this ranking: choosing among them by these numbers "
            "would be choosing on the test list."
        )
    tried = {row.label: row.trials for row in section.rows if row.trials is not None}
    if any(trials != (section.track.budget, section.track.budget) for trials in tried.values()):
        listed = ", ".join(f"{label} {span(*trials)}" for label, trials in tried.items())
        notes.append(
            f"Settings tried per task, as the records state, of at most K = {section.track.budget}: {listed}. Whether "
            "a declaration holds no more, `svp-bench audit` compares with the selected config; a table does not."
        )
    return [*notes, *_search_notes(section)]


def _search_notes(section: Section) -> list[str]:
    """Return notes on the noise of the selection, failed trials, and grids that end at the best setting."""
    runs = [run for row in section.rows for cell in row.cells.values() for run in cell.records]
    searches = [(run, run.search) for run in runs if run.search is not None]
    if not searches:
        return []
    notes = []
    if all(search.nested for _, search in searches):
        fixed = sorted({short_name(run.task) for run, search in searches if not search.folds})
        but = f"; of {', '.join(fixed)} only as far as it comes from training, since val is one split" if fixed else ""
        notes.append(
            f"Each seed has a search of its own: intervals for new seeds include the noise of the selection{but}."
        )
    else:
        notes.append("One search for all seeds: intervals for new seeds leave out the noise of the selection.")
    failed: dict[str, int] = defaultdict(int)
    at_edge: dict[str, set[str]] = defaultdict(set)
    for run, search in searches:
        if search.tried is not None and search.trials < search.tried:
            failed[run.method] = max(failed[run.method], search.tried - search.trials)
        for text in search.at_edge or ():
            at_edge[f"{run.method} {text.partition(' = ')[0].rsplit('.', 1)[-1]}"].add(run.task)
    if failed:
        most = ", ".join(f"{method} up to {count}" for method, count in sorted(failed.items()))
        notes.append(f"Trials of a task that failed: {most}; the other methods had more settings to choose from.")
    if at_edge:
        listed = ", ".join(f"{name} ({plural(len(tasks), 'task')})" for name, tasks in sorted(at_edge.items()))
        notes.append(f"The best setting lies at an end of the grid, so that a wider one might do better: {listed}.")
    return notes


def data_notes(section: Section, suite: SuiteCard) -> list[str]:
    """Say where the data of a task are not the same throughout: between rows, and within one."""
    digests: dict[str, set[str | None]] = defaultdict(set)
    for row in section.rows:
        for task, cell in row.cells.items():
            digests[task].add(cell.data_digest)
    mixed = [short_name(task) for task in suite.tasks if len(digests[task]) > 1]
    notes = (
        [
            f"The rows are not all on the same images of {', '.join(mixed)}: only rows on the data that most rows have "
            "are ranked."
        ]
        if mixed
        else []
    )
    for row in section.rows:
        for cell in row.apart:
            shown = row.cells[cell.task]
            same = (cell.variant, cell.data_digest) == (shown.variant, shown.data_digest)
            kind = "synthetic data" if cell.synthetic else f"other data, variant {cell.variant}"
            where = "with another config" if same else f"on {kind} (splits {short_value(cell.data_digest)})"
            notes.append(
                f"{short_name(cell.task)}, {row.label}: also {cell.mean:.2f} ({plural(len(cell.seeds), 'seed')}) "
                f"{where}; not in the means."
            )
    return notes


def named(row: Row) -> str:
    """Return the label of a row, with ¶ if it overrides the shipped settings."""
    return f"{row.label} ¶" if row.overrides else row.label


def override_notes(section: Section) -> list[str]:
    """Return which rows override shipped settings, and which have no shipped recipe."""
    notes = []
    for row in section.rows:
        if row.overrides:
            texts = [
                text if len(tasks) == len(row.cells) else f"{text} ({len(tasks)} of {plural(len(row.cells), 'task')})"
                for text, tasks in row.overrides.items()
            ]
            more = f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else ""
            notes.append(f"¶ {row.label} overrides the shipped settings: {'; '.join(texts[:_SHOWN])}{more}.")
    published = [
        row.label
        for row in section.rows
        if any(run.config.get("selected_on") == "test" for cell in row.cells.values() for run in cell.records)
    ]
    if notes:
        notes.append("¶ No record can prove when or why a value was chosen; a chosen one may have been chosen on test.")
    if published:
        notes.append(
            f"Published recipe whose authors chose its values on test lists: {', '.join(published)}. Such a row is no "
            "fair comparison with rows whose values were chosen on val."
        )
    sources: dict[str, set[str]] = defaultdict(set)
    for row in section.rows:
        runs = [run for cell in row.cells.values() for run in cell.records]
        sources[row.method].update(str(sorted(run.method_source.items())) for run in runs if run.method_source)
    edited = sorted(method for method, digests in sources.items() if len(digests) > 1)
    if edited:
        notes.append(f"Rows of one method are apart because its source files differ: {', '.join(edited)}.")
    unknown = sorted({row.method for row in section.rows if not row.shipped})
    if unknown:
        notes.append(f"There is no shipped recipe to compare with: {', '.join(unknown)}.")
    return notes


def provenance_notes(section: Section) -> list[str]:
    """Say in one line how many commits, devices ... the runs are from, and in another which cells average over them."""
    cells = [(row, cell) for row in section.rows for cell in row.cells.values()]
    runs = [run for _, cell in cells for run in cell.records]
    kinds = {name: len({fact(run) for run in runs}) for name, fact in PROVENANCE.items()}
    listed = ", ".join(
        f"{plural(count, 'set')} of libraries" if name == "libraries" else plural(count, name)
        for name, count in kinds.items()
    )
    notes = [f"The {plural(len(runs), 'run')} of these rows {'is' if len(runs) == 1 else 'are'} from {listed}."]
    mixed = [(row, cell) for row, cell in cells if cell.mixed]
    if mixed:
        what = [name for name in PROVENANCE if any(name in cell.mixed for _, cell in mixed)]
        by_row = [(row.label, sum(r is row for r, _ in mixed)) for row in section.rows]
        where = ", ".join(f"{label} {count}" for label, count in by_row if count)
        notes.append(
            f"‖ A cell whose seeds differ in more than the seed ({', '.join(what)}): its spread is not that of seeds "
            f"alone. Cells by row: {where}."
        )
    return notes


def dirty_notes(section: Section) -> list[str]:
    """Count the records that were made with uncommitted changes."""
    if not section.dirty:
        return []
    was = "was" if section.dirty == 1 else "were"
    return [f"{section.dirty} of {plural(section.records, 'record')} {was} made with uncommitted changes."]


def _versions(cells: Sequence[Cell]) -> str:
    by_version: dict[int, set[str]] = defaultdict(set)
    for cell in cells:
        by_version[cell.task_version].add(short_name(cell.task))
    if len(by_version) == 1:
        return f"all tasks of version {next(iter(by_version))}"
    return "; ".join(f"version {version}: {', '.join(sorted(by_version[version]))}" for version in sorted(by_version))


def counts(table: Table) -> str:
    """Return one line about what is not in the table, or nothing."""
    tally = Counter(out.why for out in table.left_out)
    parts = [f"{number} {why}" for why, number in sorted(tally.items())]
    if table.problems:
        parts.append(f"{len(table.problems)} unreadable")
    return f"{', '.join(parts)}." if parts else ""


def left_out_reasons(table: Table) -> list[str]:
    """Return a line for each reason that a reader should see at once: runs that are not comparable, and why."""
    reasons = Counter(out.detail for out in table.left_out if out.why == NOT_COMPARABLE)
    return [f"  Not comparable ({plural(count, 'run')}): {reason}" for reason, count in sorted(reasons.items())]


def left_out_lines(table: Table) -> list[str]:
    """Return one line for each record or file that is not in the table."""
    lines = [
        f"{out.record.task}, {out.record.method}, seed {out.record.seed}: {out.why}: {out.detail} ({out.record.run_id})"
        for out in table.left_out
    ]
    return lines + [f"{problem.path}: unreadable: {problem.reason}" for problem in table.problems]
