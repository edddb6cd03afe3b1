"""Costs that were measured on a machine, as tables show them: next to the accuracy, with device and date."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from svp_bench.core.errors import plural
from svp_bench.records.costs import CostFile, MeasuredCost
from svp_bench.tables.model import Row, Section
from svp_bench.tables.notes import MISSING

Span = tuple[float, float]
MEASURES: Mapping[str, Callable[[MeasuredCost], float | None]] = {
    "latency_ms": lambda cost: cost.latency_ms,
    "merged_latency_ms": lambda cost: cost.merged_latency_ms,
    "images_per_second": lambda cost: cost.images_per_second,
    "batch": lambda cost: cost.batch,
    "step_ms": lambda cost: cost.step_ms,
    "peak_memory_mib": lambda cost: cost.peak_memory_mib,
}
"""Name → value of a measured cost."""
MEASURED_COLUMNS = (
    *(f"measured_{name}_{end}" for name in MEASURES for end in ("min", "max")),
    *("measured_device", "measured_date"),
)
"""Columns that only a wide CSV with measured costs has."""


def spans_of(costs: CostFile | None, row: Row) -> dict[str, Span]:
    """Return measure → smallest and largest value of the settings of a row; empty unless all of them were measured.

    A measure that a setting lacks is left out: a method that does not merge has no merged latency.
    """
    found = [costs.of(run) if costs else None for run in row.records]
    known = [cost for cost in found if cost is not None]
    if len(known) < len(found):
        return {}
    values = {name: [value(cost) for cost in known] for name, value in MEASURES.items()}
    whole = {name: [one for one in many if one is not None] for name, many in values.items()}
    return {name: (min(many), max(many)) for name, many in whole.items() if many and len(many) == len(known)}


def caption(costs: CostFile) -> str:
    """Return a sentence on the machine, the date and the conditions of the measurement."""
    code = f"commit {costs.commit[:12]}{' with changes' if costs.dirty else ''}" if costs.commit else "no commit"
    backends = f", scan backend {' or '.join(costs.scan_backends)}" if costs.scan_backends else ""
    load = "" if costs.load_before is None else f", load {costs.load_before:.1f} at the start"
    return (
        f"Measured on {costs.device} ({costs.cpu}), {costs.date}, svp-bench {costs.package_version}, "
        f"{code}{backends}{load}: random weights, {costs.precision}, {plural(costs.classes, 'class')}, a process for "
        "each setting. Latency: one image. Images/s: at the best batch size that was found, in parentheses. Step: "
        f"forward, backward and optimizer of {plural(costs.step_batch, 'image')}. Peak memory: of a process that only "
        "trains. Medians of one process: small differences say nothing."
    )


def measured_grid(section: Section, costs: CostFile) -> list[list[str]]:
    """Return header and rows; a row that was not measured stays blank."""
    grid = [["method", "latency, ms", "merged, ms", "images/s", "step, ms", "peak memory, MiB"]]
    for row in section.rows:
        spans = spans_of(costs, row)
        texts = {name: value_span(spans.get(name)) for name in MEASURES}
        rate = f"{texts['images_per_second']} ({texts['batch']})" if spans else MISSING
        times = (texts["latency_ms"], texts["merged_latency_ms"], rate, texts["step_ms"], texts["peak_memory_mib"])
        grid.append([row.label, *times])
    return grid


def value_span(span: Span | None) -> str:
    """Return "4.85", "63.3–71.2" or "–"."""
    return MISSING if span is None else "–".join(dict.fromkeys(f"{value:.4g}" for value in span))


def measured_facts(costs: CostFile | None, row: Row) -> dict[str, object]:
    """Return the values of `MEASURED_COLUMNS`; empty for a row that was not measured."""
    spans = spans_of(costs, row)
    if costs is None or not spans:
        return {}
    ends = {
        f"measured_{name}_{end}": f"{value:g}"
        for name, span in spans.items()
        for end, value in zip(("min", "max"), span, strict=True)
    }
    return {**ends, "measured_device": costs.device, "measured_date": costs.date}
