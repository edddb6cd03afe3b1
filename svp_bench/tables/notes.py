"""Words, numbers and notes that all renderings of a table share."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from svp_bench.core.errors import plural, printable
from svp_bench.stats.estimates import FEWEST_PAIRS, FEWEST_SOURCES
from svp_bench.tables.comparison import sources_of
from svp_bench.tables.labels import short_value
from svp_bench.tables.model import CARD, IMAGES, PROVENANCE, Cell, Comparison, Contrast, Row, Section, Table, columns_of
from svp_bench.tasks.cards import SuiteCard

if TYPE_CHECKING:
    from svp_bench.stats.estimates import Estimate

MISSING = "–"
NOT_COMPARABLE = "not comparable"
"""Why a record is left out whose run had parts that no record describes."""
MAJORITY = "majority class"
"""Label of the line with the accuracy of always answering the most frequent class of the test split."""
QUOTED = "published, not measured here"
_SHOWN = 6  # overrides of a row that a note lists
DIGITS = 4
"""Decimals in CSV files; two means that agree in them share a rank."""
COST = (
    "Stored: the trained tensors, head included. Merges: the adapter can be folded into the backbone's weights. MACs: "
    "multiplications (with or without an addition) of one image, not merged, without elementwise operations; training "
    "is a forward and a backward pass."
)
RANDOM_WEIGHTS = "The backbone has random weights: these rows are a smoke test and are not ranked."


# ----------------------------------------------------------------------------------------------------------- columns


def columns(suite: SuiteCard) -> list[str]:
    """Return the names of the score columns: task ids in suite order, groups, both averages."""
    return [column.name for column in columns_of(suite)]


def shown_columns(suite: SuiteCard, tasks: bool = True) -> list[int]:
    """Return indices into `columns` of those that are shown: of a single group, the means over it say nothing new."""
    count, groups = len(suite.tasks), len(suite.groups)
    means = [count + groups] if groups == 1 else [*range(count, count + groups + 2)]
    return [*(range(count) if tasks else ()), *means]


def majority_scores(section: Section) -> list[float | None]:
    """Return the accuracy of the majority class in each of `columns`; of means where all of their tasks have one."""
    known = section.majorities

    def mean(weights: Mapping[str, float]) -> float | None:
        if not set(weights) <= set(known):
            return None
        return math.fsum(known[task] * weight for task, weight in weights.items()) / math.fsum(weights.values())

    return [mean(column.weights) for column in columns_of(section.suite)]


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


def decimals(value: float | None) -> str:
    """Return "71.50", or "–" without a value."""
    return MISSING if value is None else f"{value:.2f}"


def interval(estimate: Estimate | None) -> str:
    """Return "[71.08, 71.92]", or "–" without an interval."""
    if estimate is None or estimate.low is None or estimate.high is None:
        return MISSING
    return f"[{estimate.low:.2f}, {estimate.high:.2f}]".replace("-0.00", "0.00")


def signed(value: float | None) -> str:
    """Return "+1.25", "-0.50", "0.00", or "–" without a value."""
    text = MISSING if value is None else f"{value:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def p_value(p: float | None) -> str:
    """Return "0.031", "<0.001", or "–" without a value."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def size_span(low: int, high: int) -> str:
    """Return "75.6K", or "75.6K–4.76M"."""
    return _size(low) if _size(low) == _size(high) else f"{_size(low)}–{_size(high)}"


def _size(count: int) -> str:
    if count < 1000:
        return str(count)
    if count < 999_950:  # from here on, thousands would round up to 1000.0K
        return f"{count / 1e3:.1f}K"
    return f"{count / 1e6:.2f}M" if count < 999_995_000 else f"{count / 1e9:.2f}G"


def marks(cell: Cell) -> str:
    """Return the marks of a cell: of its data § or † and ‡ as they apply, and ‖ where its seeds differ in more."""
    data = "§" if cell.synthetic else ("†" if cell.different else "") + ("‡" if cell.variant != CARD else "")
    return data + ("‖" if cell.mixed else "")


def named(row: Row) -> str:
    """Return the label of a row, with ¶ if it overrides the shipped settings."""
    return f"{row.label} ¶" if row.overrides else row.label


def halves(text: str) -> tuple[str, str]:
    """Split a header in the middle: "mean of 19 tasks" into "mean of" and "19 tasks"; one word goes below."""
    words = text.split()
    half = len(words) // 2
    return " ".join(words[:half]), " ".join(words[half:])


def one_line(text: str) -> str:
    """Return `text` with its runs of blanks and line ends as single blanks, and control characters as escapes."""
    return printable(" ".join(text.split()))


def _few(labels: Sequence[str]) -> str:
    return ", ".join(labels) if len(labels) <= 3 else plural(len(labels), "row")


# ------------------------------------------------------------------------------------------------------------- notes


def weights(section: Section) -> str:
    """Return where the weights came from, with the first digits of their digest."""
    digest = section.first.checkpoint_digest
    return "random weights" if digest is None else f"{section.checkpoint} (sha256:{short_value(digest)})"


def heading(section: Section) -> str:
    """Return the heading of a section: backbone, weights, protocol and track."""
    data = (section.data,) if section.data else ()
    run = section.first
    parts = (*data, run.backbone, weights(section), f"{run.protocol} {run.protocol_version}")
    return f"{', '.join(parts)}, track {section.track.title}"


def common_notes(section: Section) -> list[str]:
    """Return the notes under the rows of a section, except those on ± (`interval_notes`)."""
    return [
        *unknown_variance_notes(section),
        *_row_notes(section),
        *_selection_notes(section),
        *_override_notes(section),
        *_provenance_notes(section),
        *mark_notes(section),
    ]


def interval_notes(section: Section) -> list[str]:
    """Explain ± behind a mean; nothing for random weights, whose means stand without."""
    means = [] if section.random else [mean for row in section.rows for mean in row.shown_means]
    shown = {mean.behind for mean in means if mean is not None} - {""}
    level, notes = percent(section.level), []
    if any(not text.endswith(IMAGES) for text in shown):
        notes.append(
            f"± behind a mean is half its {level} interval for these tasks and new seeds (Welch–Satterthwaite)."
        )
    if any(text.endswith(IMAGES) for text in shown):
        notes.append(
            f"± … {IMAGES} behind a mean is half its {level} interval over test images (Wilson), where the "
            "variance over seeds is unknown: about these runs and other test images, not about other seeds."
        )
    if any(text.startswith("[") for text in shown):
        notes.append("In brackets: the same interval, where ± would leave 0 to 100.")
    return notes


def unknown_variance_notes(section: Section) -> list[str]:
    """Name the rows that have means without an interval over seeds, and say why."""
    if section.random:
        return []
    unknown: list[str] = []
    wide: list[str] = []
    for row in section.rows:
        if any(mean is not None and mean.seeds.low is None for mean in row.shown_means):
            known = row.seeds[0] > 1 and any(cell.std for cell in row.cells.values())
            (wide if known and row.present.seeds.low is None else unknown).append(row.label)
    notes = []
    if unknown:
        notes.append(
            "No interval over new seeds where a task behind the mean has one seed, or all seeds of all its tasks gave "
            f"the same number: the variance is unknown ({_few(unknown)})."
        )
    if wide:
        notes.append(f"No interval over new seeds where it would hold every accuracy from 0 to 100 ({_few(wide)}).")
    return notes


def _row_notes(section: Section) -> list[str]:
    """Explain the mean of an incomplete row, and the line of the majority class."""
    notes = []
    if any(row.partial for row in section.rows):
        notes.append(
            f"(n/{len(section.suite.tasks)}): partial, the mean over the n tasks that the row has; not ranked, and "
            "means over other tasks do not compare."
        )
    if section.majorities:
        notes.append(
            f"{MAJORITY.capitalize()}: accuracy of always answering the most frequent class of the test split."
        )
    return notes


def mark_notes(section: Section) -> list[str]:
    """Return the notes on marked cells, the data, uncommitted changes and shared images."""
    shown = {mark for cell in section.cells for mark in marks(cell)}
    notes = []
    if "†" in shown:
        notes.append("† The files on disk differ from the task card in count or digest; the records state how.")
    if "‡" in shown:
        variants = sorted({f"{short_name(cell.task)} ({cell.variant})" for cell in section.cells if "‡" in marks(cell)})
        notes.append(f"‡ Another variant of the data than that of the card: {', '.join(variants)}.")
    if "§" in shown:
        notes.append("§ Synthetic data: rows with such a cell are not ranked.")
    notes += _data_notes(section)
    if dirty := sum(record.dirty is True for record in section.members):
        was = "was" if dirty == 1 else "were"
        notes.append(f"{dirty} of {plural(len(section.members), 'record')} {was} made with uncommitted changes.")
    if section.suite.same_images:
        shared = "; ".join(", ".join(group) for group in section.suite.same_images)
        notes.append(f"Tasks that share their images, and are not independent: {shared}.")
    return notes


def _data_notes(section: Section) -> list[str]:
    """Say where the data of a task are not the same throughout: between rows, and within one."""
    digests: dict[str, set[str | None]] = defaultdict(set)
    for cell in section.cells:
        digests[cell.task].add(cell.data[1])
    notes = []
    if mixed := [short_name(task) for task in section.suite.tasks if len(digests[task]) > 1]:
        notes.append(
            f"The rows are not all on the same images of {', '.join(mixed)}: only rows on the data that most rows have "
            "are ranked."
        )
    for row in section.rows:
        for cell in row.apart:
            kind = "synthetic data" if cell.synthetic else f"other data, variant {cell.variant}"
            same = cell.data == row.cells[cell.task].data
            shown = row.cells[cell.task]
            if cell.data[:3] == shown.data[:3]:
                kind = "other pixels of the same split files"
            where = "with another config" if same else f"on {kind} (splits {short_value(cell.data[1])})"
            notes.append(
                f"{short_name(cell.task)}, {row.label}: also {cell.mean:.2f} ({plural(len(cell.seeds), 'seed')}) "
                f"{where}; not in the means."
            )
    return notes


def _selection_notes(section: Section) -> list[str]:
    """Say where numbers of this table must not be used to choose, and how the search went."""
    methods = Counter(row.method for row in section.rows if row.rank is not None)
    notes = []
    if several := sorted(method for method, count in methods.items() if count > 1):
        notes.append(
            f"Several settings of {', '.join(several)} are in this ranking: choosing among them by these numbers "
            "would be choosing on the test list."
        )
    tried, budget = {row.label: row.trials for row in section.rows if row.trials is not None}, section.track.budget
    if any(trials != (budget, budget) for trials in tried.values()):
        listed = ", ".join(f"{label} {span(*trials)}" for label, trials in tried.items())
        notes.append(
            f"Settings tried per task, as the records state, of at most K = {budget}: {listed}. Whether a declaration "
            "holds no more, `svp-bench audit` compares with the selected config; a table does not."
        )
    searches = [(run, run.search) for row in section.rows for run in row.records if run.search is not None]
    if not searches:
        return notes
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


def _override_notes(section: Section) -> list[str]:
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
    if notes:
        notes.append("¶ No record can prove when or why a value was chosen; a chosen one may have been chosen on test.")
    rows = section.rows
    on_test = [row.label for row in rows if any(run.config.get("selected_on") == "test" for run in row.records)]
    if on_test:
        notes.append(
            f"Published recipe whose authors chose its values on test lists: {', '.join(on_test)}. Such a row is no "
            "fair comparison with rows whose values were chosen on val."
        )
    sources = {
        (row.method, str(sorted(run.method_source.items()))) for row in rows for run in row.records if run.method_source
    }
    edited = sorted(method for method, count in Counter(method for method, _ in sources).items() if count > 1)
    if edited:
        notes.append(f"Rows of one method are apart because its source files differ: {', '.join(edited)}.")
    if unknown := sorted({row.method for row in rows if not row.shipped}):
        notes.append(f"There is no shipped recipe to compare with: {', '.join(unknown)}.")
    return notes


def _provenance_notes(section: Section) -> list[str]:
    """Say in one line how many commits, devices ... the runs are from, and in another which cells average over them."""
    runs = [run for row in section.rows for run in row.records]
    kinds = {name: len({fact(run) for run in runs}) for name, fact in PROVENANCE.items()}
    listed = ", ".join(
        f"{plural(count, 'set')} of libraries" if name == "libraries" else plural(count, name)
        for name, count in kinds.items()
    )
    notes = [f"The {plural(len(runs), 'run')} of these rows {'is' if len(runs) == 1 else 'are'} from {listed}."]
    mixed = {row.label: sum(bool(cell.mixed) for cell in row.cells.values()) for row in section.rows}
    if any(mixed.values()):
        names = [name for name in PROVENANCE if any(name in cell.mixed for cell in section.cells)]
        where = ", ".join(f"{label} {count}" for label, count in mixed.items() if count)
        notes.append(
            f"‖ A cell whose seeds differ in more than the seed ({', '.join(names)}): its spread is not that of seeds "
            f"alone. Cells by row: {where}."
        )
    return notes


# ---------------------------------------------------------------------------------------------- statistics of the rows


def new_tasks_note(section: Section) -> list[str]:
    """Explain the interval over new tasks, or say why there is none."""
    known = [row.new_tasks for row in section.rows if row.new_tasks is not None]
    count = len(sources_of(section.suite))
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


def comparison_notes(section: Section, cells: bool = True) -> list[str]:
    """Explain the differences to the control, and which rows or marks are missing, and why.

    Args:
        section: The section.
        cells: Are the tasks shown, with their marks?
    """
    comparison, level, tasks = section.comparison, percent(section.level), section.suite.tasks
    if comparison is None:
        return []
    notes = []
    found = comparison.contrasts
    if found:
        notes.append(
            f"Row minus {comparison.control}, in points: mean over tasks, each weighing the same, of the differences "
            f"of runs with the same seed on the same images. Intervals ({level}) of this mean for other seeds "
            "on these tasks, for other test images (of these runs), and for other tasks."
        )
        notes += _test_notes(found, section)
        if fewer := [c for c in found if len(c.tasks) < len(tasks)]:
            raw = " Their p is raw and not in Holm's family: it is about another mean."
            notes.append(
                f"On fewer than {plural(len(tasks), 'task')}, those that both rows have on the same images with a "
                f"shared seed: {', '.join(f'{c.row} ({len(c.tasks)})' for c in fewer)}."
                + (raw if any(c.p is not None for c in fewer) else "")
            )
        if any(c.these_tasks.low is None for c in found):
            notes.append(
                "No interval over new seeds where a task has one shared seed, or the differences of all seeds are the "
                "same: the variance is unknown."
            )
        if any(c.sources < FEWEST_SOURCES for c in found):
            notes.append(f"No interval over new tasks with fewer than {FEWEST_SOURCES} independent sources of images.")
        notes += _verdict_notes(comparison, section.level, cells)
    return [*notes, *comparison.remarks]


def _test_notes(found: Sequence[Contrast], section: Section) -> list[str]:
    """Explain p, and say where there is none because no outcome could have rejected."""
    notes = []
    if tested := [c for c in found if c.p is not None]:
        whole = sum(c.holm is not None for c in tested)
        counts = [c.sources for c in tested]
        notes.append(
            f"p: two-sided sign flip over {span(min(counts), max(counts))} independent sources of images"
            + (f"; adjusted by Holm over {plural(whole, 'complete row')}." if whole else ".")
        )
    for complete in (True, False):
        untested = [c for c in found if c.p is None and (len(c.tasks) == len(section.suite.tasks)) == complete]
        if untested:
            low, high = min(c.sources for c in untested), max(c.sources for c in untested)
            over = f"over {plural(len(untested), 'row')} (Holm) " if complete and len(untested) > 1 else ""
            notes.append(
                f"No p: the differences cannot be tested with {span(low, high)} source{'' if high == 1 else 's'} of "
                f"images; {over}{no_outcome(section.level, min(c.least for c in untested))}"
            )
    return notes


def no_outcome(level: float, least: float) -> str:
    """Say that a test cannot reject, and its smallest possible p where that is informative."""
    smallest = f": the smallest possible p is {p_value(least)}" if least < 1 else ""
    return f"no outcome could be significant at {percent(1 - level)}{smallest}."


def _verdict_notes(comparison: Comparison, level: float, cells: bool) -> list[str]:
    verdicts = [cell.verdict for found in comparison.contrasts for cell in found.tasks.values()]
    few = verdicts.count("too few")
    tested = len(verdicts) - few
    if not tested:
        return [f"No per-cell marks: n < {FEWEST_PAIRS} paired seeds."]
    if not cells:
        return ["Per-cell marks are on the Markdown page."]
    notes = [
        f"▲ ▼ behind a task: better, worse than {comparison.control} by a sign flip over the shared seeds, "
        f"{percent(level)}, from {FEWEST_PAIRS} on, each cell by itself: of {plural(tested, 'cell')} without any "
        f"difference, about {(1 - level) * tested:.0f} would get a mark."
    ]
    return [*notes, f"No mark on {plural(few, 'cell')}: n < {FEWEST_PAIRS} paired seeds."] if few else notes


def verdict_marks(section: Section) -> dict[str, dict[str, str]]:
    """Return label → task → "▲" or "▼" where a cell differs from that of the control."""
    signs = {"better": "▲", "worse": "▼"}
    return {
        found.row: {task: signs[cell.verdict] for task, cell in found.tasks.items() if cell.verdict in signs}
        for found in (section.comparison.contrasts if section.comparison else ())
    }


def ranks_notes(section: Section) -> list[str]:
    """Return the mean ranks of the rows, and the rows that are not separated, where a test could separate any two."""
    ranks, level = section.ranks, section.level
    if ranks is None:
        return []
    listed = ", ".join(f"{label} {rank:.2f}" for label, rank in ranks.mean_ranks.items())
    if ranks.least >= 1 - level:
        result = (
            f"The order cannot be tested with {plural(ranks.n_sources, 'source')} of images: over "
            f"{plural(len(ranks.p), 'pair')} (Holm) {no_outcome(level, ranks.least)}"
        )
    else:
        groups = "; ".join(" = ".join(group) for group in ranks.cliques)
        result = (
            f"Not separated (Wilcoxon signed-rank over the sources of images, Holm over all pairs, {percent(level)}; "
            f"no proof of equality): {groups or 'none'}."
        )
    return [f"Mean ranks (descriptive): {listed}.", result]


# ----------------------------------------------------------------------------------------------------------- left out


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
