"""What the numbers of benchmarks/gpu.py say: the scan's floors, ratios with named baselines, the goals, the table."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpu_worker import GROUPS, REST, SIZES

import svp_bench

COMPILED = Path(__file__).parent / "results" / "triton_aot.json"
MEASURED = "measured"
BUILD = {
    "mamba_ssm": "make baselines-gpu builds them, and make bench-gpu uses them then",
    "fork": "benchmarks/README.md lists the files of its folder",
}


# ---- the floors of the scan, see docs/gpu.md


class Work(NamedTuple):
    """What one element (image, token, channel; both directions) costs at least."""

    bytes: float
    special: float  # results of the special function unit: exp2 and reciprocal


def scan_work(kind: str, itemsize: int, states: int, tile: int, block: int) -> tuple[Work, Work]:
    """Cost of an element of the bidirectional scan: of our kernels, and the lower bound.

    `kind` is forward or backward (frozen weights). Softplus, SiLU and sigmoid are an exp2 and a reciprocal each. B, C
    and weights are left out: a fiftieth of the rest. Our kernels keep no state for the backward pass, but one every
    `tile` steps while it runs; partial sums of dB and dC are one a `block` of channels.
    """
    s, k = itemsize, 2  # directions
    if kind == "forward":
        special = k * states + 2 * k + 2  # states, softplus, gate
        unavoidable = 2 * k * s + 2 * s  # u, Δ; z, out
        return Work(unavoidable + 2 * 4, special), Work(unavoidable, special)  # y of one direction, written and read
    read, written = k * 4 * s, k * 2 * s + s  # u, Δ, dout, z a direction; du, dΔ a direction, dz
    saved_states = 2 * k * 4 * states / tile  # written and read
    partial = 2 * k * 2 * 4 * states / block  # dB and dC, written and read
    own = Work(
        2 * read + written + 2 * 4 + saved_states + partial,
        # two passes: states, softplus, gate; then the derivative of the softplus
        2 * k * (states + 2 + 2) + 2 * k,
    )
    # each read once; softplus and its derivative a direction, one sigmoid for the gate and its derivative
    return own, Work((2 * k + 2) * s + written, k * (states + 2 + 2) + 2)


def floors(kind: str, elements: int, device: Mapping[str, Any], works: tuple[Work, Work]) -> dict[str, float | None]:
    """Seconds: memory at the measured copy rate, exponentials at 16 a clock and SM, and the larger of both."""
    clocks = None if not device.get("clock_hz") else device["sms"] * device["clock_hz"]
    found: dict[str, float | None] = {}
    for name, work in zip(("", "unavoidable_"), works, strict=True):
        memory = elements * work.bytes / device["copy_bytes_per_second"]
        special = None if clocks is None else elements * work.special / (16 * clocks)
        found |= {f"{name}memory": memory, f"{name}special": special}
        found[f"{name}floor"] = None if special is None else max(memory, special)
    for name, rate in (("instructions", 128), ("shuffles", 32)):
        lanes = lanes_of(kind, name, str(device.get("capability")))
        found[name] = None if clocks is None or lanes is None else elements * lanes / (rate * clocks)
    return found


def lanes_of(kind: str, count: str, target: str) -> float | None:
    """Instructions or shuffles an element as compiled for Vim-S, bfloat16; None if the record is of other kernels."""
    record = json.loads(COMPILED.read_text(encoding="utf-8"))
    kernels = Path(svp_bench.__file__).parent / "ops" / "triton_kernels.py"
    digests = record["kernels_sha256"]  # by file
    if not isinstance(digests, dict) or digests.get(kernels.name) != hashlib.sha256(kernels.read_bytes()).hexdigest():
        return None
    name = {"forward": "scan_forward", "backward": "scan_backward_of_activations"}[kind]
    wanted = {"kernel": name, "model": "vim_small", "dtype": "bfloat16", "target": target}
    size = record["sizes"][f"scan_{kind}"]
    for row in record["rows"]:
        if wanted.items() <= row.items():
            return float(row[count] * 32 * row["warps"] / (size["T"] * size["BE"]))
    return None


def scan_time(row: Mapping[str, Any]) -> tuple[float, str]:
    """Return the seconds of a scan and their source: its kernels, or its calls if the profiler sees no kernels.

    A call takes Python about as long as the GPU; in a model that time is hidden.
    """
    return (row["kernel_seconds"], "kernels") if "kernel_seconds" in row else (row["seconds_per_step"], "calls")


def against_floor(cell: Mapping[str, Any], device: Mapping[str, Any]) -> dict[str, Any]:
    """The floors of a measured scan cell, and how many times each it took."""
    from svp_bench.ops.triton import SCAN_BACKWARD

    shape = SIZES[cell["size"]]
    elements = cell["batch"] * shape.length * shape.channels
    total: dict[str, float | None] = {}
    for kind in ("forward",) if cell["what"] == "scan_forward" else ("forward", "backward"):
        works = scan_work(kind, 2, shape.states, SCAN_BACKWARD["T"], SCAN_BACKWARD["BE"])
        for name, value in floors(kind, elements, device, works).items():
            before = total.get(name, 0.0)
            total[name] = None if value is None or before is None else before + value
    seconds, timed = scan_time(cell)
    of = {f"of_{name}": None if value is None else seconds / value for name, value in total.items() if "floor" in name}
    return {"timed": timed, "seconds": total, **of}


# ---- ratios and goals


def ratios(rows: Iterable[Mapping[str, Any]], ours: str) -> list[dict[str, Any]]:
    """Return the speed-up over each baseline in every cell where both were measured, with both names."""
    cells: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        if row["status"] == MEASURED:
            key = (row["what"], row["size"], row["precision"], row["batch"])
            cells.setdefault(key, {})[row["backend"]] = row
    found = []
    for key, measured in cells.items():
        for baseline, row in measured.items():
            mine = measured.get(ours)
            if baseline == ours or mine is None:
                continue
            label = dict(zip(("what", "size", "precision", "batch"), key, strict=True))
            label |= {"of": ours, "against": baseline}
            speed = row["seconds_per_step"] / mine["seconds_per_step"]
            if key[0].startswith("scan_"):
                (theirs, timed), (own, also) = scan_time(row), scan_time(mine)
                speed = theirs / own if timed == also else speed
            found.append({**label, "quantity": "speed", "value": speed})
            if mine["peak_mib"] and row["peak_mib"]:
                found.append({**label, "quantity": "peak_memory", "value": mine["peak_mib"] / row["peak_mib"]})
    return found


class Goal(NamedTuple):
    """What was promised for one H100, bfloat16, batch 128."""

    goal: str
    bound: float
    at_least: bool
    what: str
    baseline: str | None = None
    quantity: str = ""


_BOTH = "a training step of Vim-S with SVP"
GOALS = (
    Goal(f"images/s of {_BOTH}, times those of the fork (fused)", 1.5, True, "train", "fork", "speed"),
    Goal(f"images/s of {_BOTH}, times those of mamba_ssm (unfused)", 2.0, True, "train", "mamba_ssm", "speed"),
    Goal(f"peak memory of {_BOTH}, times that of the fork (fused)", 0.6, False, "train", "fork", "peak_memory"),
    Goal(f"peak memory of {_BOTH}, times that of mamba_ssm (unfused)", 0.6, False, "train", "mamba_ssm", "peak_memory"),
    Goal("kernels of the scan, forward, times their floor", 1.5, False, "scan_forward"),
    Goal("kernels of the scan, forward and backward, times their floor", 1.5, False, "scan_both"),
    Goal(f"images/s of {_BOTH}", 2500, True, "train"),
)


def judged(rows: Sequence[Mapping[str, Any]], device: str) -> list[dict[str, Any]]:
    """Each goal: met, not met, or not measured and why."""
    here = [r for r in rows if (r["size"], r["precision"], r["batch"]) == ("small", "bf16", 128)]
    found = []
    for goal in GOALS:
        value, why = _value(goal, here)
        if "H100" not in device:
            value, why = None, f"the goals are for one H100, and this is {device}"
        state = "not measured"
        if value is not None:
            state = "met" if (value >= goal.bound if goal.at_least else value <= goal.bound) else "not met"
        entry = {"goal": goal.goal, "bound": goal.bound, "sense": "at least" if goal.at_least else "at most"}
        found.append({**entry, "value": value, "state": state, **({} if value is not None else {"reason": why})})
    return found


def _value(goal: Goal, rows: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    by = {r["backend"]: r for r in rows if r["what"] == goal.what}
    for name in filter(None, ("triton", goal.baseline)):
        if name not in by:
            return None, "no --fork was given" if name == "fork" else f"{name} was not asked for"
        if by[name]["status"] != MEASURED:
            return None, f"{name}: {by[name]['status']}" + (f", {by[name]['reason']}" if "reason" in by[name] else "")
    if goal.baseline is not None:
        values = [r["value"] for r in ratios(by.values(), "triton") if r["against"] == goal.baseline]
        kinds = [r["quantity"] for r in ratios(by.values(), "triton") if r["against"] == goal.baseline]
        return values[kinds.index(goal.quantity)], ""
    if goal.what == "train":
        return by["triton"]["images_per_second"], ""
    value = by["triton"].get("floor", {}).get("of_floor")
    return value, "the clock of the device is not known"


# ---- the report


def report(result: Mapping[str, Any]) -> str:
    about = result["about"]
    lines = [", ".join(f"{k} {v}" for k, v in about.items() if not isinstance(v, dict) and v is not None)]
    if result["dry_run"]:
        lines.append("A dry run on a CPU: it shows that the program works, and measures no GPU.")
    lines += ["", "Backends"]
    for name, entry in result["backends"].items():
        versions = ", ".join(f"{k} {v}" for k, v in entry.get("versions", {}).items())
        lines.append(f"  {name}: {entry['what']}{f' ({versions})' if versions else ''}")
        if entry.get("reason"):
            lines.append(f"    missing: {entry['reason']}; {BUILD.get(name, 'see svp-bench doctor')}")
        for precision, check in entry["check"].items():
            if "error" in check:
                lines.append(f"    {precision}: refused, {check['reason']}")
                continue
            verdict = "equal" if check["right"] else "REFUSED"
            off = f"logits {check['logits']}, gradients {check['gradients']}, allowed {check['tolerance']}"
            off = re.sub(r"\d\.\d+(e-?\d+)?", lambda m: f"{float(m.group()):.1e}", off)
            lines.append(f"    {precision} against the reference: {verdict} ({off}; {check['seconds']:.1f} s)")
    lines += ["", f"{'SVP, frozen backbone; the forward has its prompts':<54}   images/s  ms/step  peak MiB   first s"]
    for row in result["rows"]:
        if not row["what"].startswith("scan_"):
            lines.append(f"  {_label(row):<52} {_numbers(row)}")
    lines += ["", f"{'The two-way scan alone, frozen weights':<54}  kernels     call  x floor  x unavoidable floor"]
    for row in result["rows"]:
        if row["what"].startswith("scan_"):
            lines.append(f"  {_label(row):<52} {_scan_numbers(row)}")
    for row in result["rows"]:
        if row["what"].startswith("scan_") and row["backend"] == result["ours"] and "floor" in row:
            limits = ", ".join(
                f"{k.replace('_', ' ')} {'unknown' if v is None else f'{1000 * v:.3f}'}"
                for k, v in row["floor"]["seconds"].items()
            )
            lines.append(f"  {_label(row)}, of its {row['floor']['timed']}; limits in ms: {limits}")
    lines += ["", f"{'Share of the time in kernels':<54}  " + "  ".join((*GROUPS, REST))]
    for row in result["rows"]:
        if row.get("kernel_share"):
            shares = "  ".join(f"{100 * v:{len(k) - 1}.0f}%" for k, v in row["kernel_share"].items())
            lines.append(f"  {_label(row):<54}{shares}")
    lines += ["", "Ratios; speed: more is better for the first, peak memory: less is"]
    for r in result["ratios"]:
        label = f"{r['what']} {r['size']} {r['precision']} batch {r['batch']}"
        quantity = r["quantity"].replace("_", " ")
        lines.append(f"  {label:<38} {quantity:<12} {r['of']} over {r['against']}: {r['value']:.2f}")
    lines += ["", "Goals (one H100, bf16, batch 128)"]
    for goal in result["goals"]:
        value = goal["reason"] if goal["value"] is None else f"{goal['value']:.2f}"
        lines.append(f"  {goal['state']}: {goal['goal']}, {goal['sense']} {goal['bound']:g}: {value}")
    return "\n".join(lines)


def _label(row: Mapping[str, Any]) -> str:
    return f"{row['what']} {row['size']} {row['precision']} batch {row['batch']}, {row['backend']}"


def _instead(row: Mapping[str, Any]) -> str:
    return f"failed: {row.get('reason')}" if row["status"] == "failed" else str(row["status"])


def _numbers(row: Mapping[str, Any]) -> str:
    if row["status"] != MEASURED:
        return _instead(row)
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    rate, step = row["images_per_second"], 1000 * row["seconds_per_step"]
    return f"{rate:11.1f} {step:8.1f} {peak:>9} {row['first_step_seconds']:9.2f}"


def _scan_numbers(row: Mapping[str, Any]) -> str:
    if row["status"] != MEASURED:
        return _instead(row)
    kernels, floor = row.get("kernel_seconds"), row.get("floor", {})
    found = [None if kernels is None else 1000 * kernels, 1000 * row["seconds_per_step"]]
    found += [floor.get("of_floor"), floor.get("of_unavoidable_floor")]
    return " ".join("       -" if v is None else f"{v:8.3f}" for v in found)
