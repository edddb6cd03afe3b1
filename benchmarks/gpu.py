"""SVP's training step and forward, and the scan against its floor, on one CUDA device next to named baselines.

    python benchmarks/gpu.py [--baselines PYTHON] [--fork FOLDER] [--minutes 8.5] [--output FILE.json]
    python benchmarks/gpu.py --only train small bf16 128      # these cells alone
    python benchmarks/gpu.py --dry_run                        # the same program on a CPU, tiny; measures no GPU

benchmarks/README.md describes the comparison.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import math
import os
import platform
import queue
import re
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from gpu_report import MEASURED, against_floor, judged, ratios, report
from gpu_worker import FUSED, one_line

import svp_bench
from svp_bench.core.atomic import replacing
from svp_bench.train.provenance import commit_and_dirty, device_name

RESULTS = Path(__file__).parent / "results"
BATCHES = (128, 8, 64, 256, 32, 16)  # in the order in which they are measured
NOT_REACHED = "not reached"
ANNOUNCED = {
    "triton": "ours, Triton kernels",
    "cpu": "ours, kernels for CPUs",
    "reference": "ours, plain PyTorch",
    "mamba_ssm": "mamba-ssm and causal-conv1d of the package index, unfused",
    "fork": f"fused {FUSED} of the fork given with --fork",
}
TURN_SECONDS = 0.15  # of one backend's turn, about
PROFILED = 1.0  # a step that takes longer gets one turn, and launches more kernels than the profiler takes in time


# ---- the plan


class Cell(NamedTuple):
    """One thing to measure with each of its backends, in turns."""

    what: str  # train, forward, scan_forward, scan_both
    size: str
    precision: str
    batch: int
    backends: tuple[str, ...]

    def request(self) -> dict[str, Any]:
        return {"what": self.what, "size": self.size, "precision": self.precision, "batch": self.batch}


def plan(ours: str, fork: bool, *, sizes: Sequence[str], batches: Sequence[int], scans: Sequence[int]) -> list[Cell]:
    """The cells, the most important first.

    The reference takes seconds a step on a GPU: it is asked at the smallest batch only. The fork's function holds
    projections and a convolution too, so that it has no scan to be asked for alone.
    """
    unfused = (ours, "mamba_ssm")
    baselines = (*unfused, "fork") if fork else unfused
    small = min(batches)
    assert batches[0] != small  # else the first cell would stand there twice
    cells = [Cell("train", sizes[0], "bf16", batches[0], baselines)]
    for batch in scans:
        backends = (*unfused, "reference") if batch == min(scans) else unfused
        cells += [Cell(what, sizes[0], "bf16", batch, backends) for what in ("scan_forward", "scan_both")]
    for batch in batches:
        backends = (*baselines, "reference") if batch == small else baselines
        for precision in ("bf16", "fp32"):
            cells += [Cell(what, size, precision, batch, backends) for size in sizes for what in ("train", "forward")]
    return list(dict.fromkeys(cells))  # the first is one of the last as well


# ---- workers


class Asked(Protocol):
    """Whom a run asks: a process, or in a test something else."""

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]: ...


class Worker:
    """A process of gpu_worker.py. One that dies is started anew, twice."""

    def __init__(self, python: str, device: str, fork: Path | None) -> None:
        self.command = [python, str(Path(__file__).with_name("gpu_worker.py")), "--device", device]
        self.command += [] if fork is None else ["--fork", str(fork)]
        self.process: subprocess.Popen[str] | None = None
        self.lines: queue.Queue[str | None] = queue.Queue()
        self.starts = 0

    def start(self) -> None:
        self.starts += 1
        lines: queue.Queue[str | None] = queue.Queue()
        self.lines = lines
        root = str(Path(svp_bench.__file__).parents[1])  # an environment of baselines has not installed us
        paths = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = process = subprocess.Popen(
            self.command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": paths},
        )

        def read() -> None:
            assert process.stdout is not None
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return its answer; `error` is `not reached` after the time limit, and the process is then ended."""
        if self.process is None or self.process.poll() is not None:
            if self.starts == 3:
                return {"error": "failed", "reason": "its process ended three times; see its output above"}
            self.start()
        assert self.process is not None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.lines.get(timeout=max(seconds, 0.0))
        except queue.Empty:
            self.stop()
            return {"error": NOT_REACHED, "reason": f"no answer in the {seconds:.0f} s that were left"}
        except BrokenPipeError:
            line = None
        if line is None:
            status = self.process.wait()
            return {"error": "failed", "reason": f"its process ended (exit status {status}); see its output above"}
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


class Clock:
    """How much of the time is left."""

    def __init__(self, minutes: float) -> None:
        self.end = time.monotonic() + 60 * minutes

    def left(self) -> float:
        return self.end - time.monotonic()


# ---- the measurements


class Run:
    """Asks the workers cell by cell and keeps the rows; each row is there from the start, as not reached.

    Args:
        cells: The plan.
        workers: Who has each backend.
        clock: When to stop.
        size: The backbone of the comparison with the reference that each backend must pass.
        turn: Seconds of a turn.
        save: Called after each cell.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        workers: Mapping[str, Asked],
        clock: Clock,
        *,
        size: str,
        turn: float = TURN_SECONDS,
        save: Callable[[], None] = lambda: None,
    ) -> None:
        self.cells, self.workers, self.clock = cells, workers, clock
        self.size, self.turn, self.save = size, turn, save
        self.rows = {
            (cell, backend): {**cell.request(), "backend": backend, "status": NOT_REACHED}
            for cell in cells
            for backend in cell.backends
        }
        backends = dict.fromkeys(backend for cell in cells for backend in cell.backends)
        self.backends: dict[str, dict[str, Any]] = {b: {"what": ANNOUNCED[b], "check": {}} for b in backends}
        self.device: dict[str, Any] = {}

    def go(self) -> None:
        for cell in self.cells:
            if self.clock.left() <= 0:
                break
            self._measure(cell)
            self.save()

    def _ask(self, whom: str, do: str, **arguments: Any) -> dict[str, Any]:
        if self.clock.left() <= 0:
            return {"error": NOT_REACHED}
        return self.workers[whom].ask({"do": do, **arguments}, self.clock.left())

    def _refusal(self, backend: str, precision: str) -> dict[str, Any] | None:
        """Why this backend is not timed in this precision, or None. Asked at its first cell, and remembered."""
        about = self.backends[backend]
        if "reason" not in about:
            hello = self._ask(backend, "hello")
            if hello.get("error") == NOT_REACHED:
                return hello
            found = hello.get("ok", {"reasons": {backend: hello.get("reason")}})
            about["reason"] = found["reasons"][backend]
            about |= {key: found[key] for key in ("versions", "fork") if found.get(key)}
            if "ok" in hello and not self.device:
                self.device = self._ask(backend, "device").get("ok", {})
        if about["reason"] is not None:
            return {"error": "missing", "reason": about["reason"]}
        if precision not in about["check"]:
            answer = self._ask(backend, "check", size=self.size, precision=precision, backend=backend)
            if "error" in answer and answer["error"] == NOT_REACHED:
                return answer
            about["check"][precision] = answer.get("ok", answer)
        check = about["check"][precision]
        if "error" in check:
            return {"error": "refused", "reason": f"the comparison with the reference failed: {check['reason']}"}
        if not check["right"]:
            off = ", ".join(f"{k} {v if isinstance(v, str) else format(v, '.1e')}" for k, v in list(check.items())[:2])
            reason = f"in {precision} it is off from the reference by {off}, more than {check['tolerance']:g}"
            return {"error": "refused", "reason": reason}
        return None

    def _measure(self, cell: Cell) -> None:
        live: dict[str, tuple[int, int]] = {}
        needed = 0.0
        for backend in cell.backends:
            answer = self._refusal(backend, cell.precision)
            if answer is None:
                answer = self._ask(backend, "prepare", cell=cell.request(), backend=backend)
            if "error" in answer:
                self._fail(cell, backend, answer)
                continue
            row = self.rows[cell, backend]
            row |= {"first_step_seconds": answer["ok"]["first_seconds"], "peak_mib": answer["ok"]["peak_mib"]}
            step = answer["ok"]["step_seconds"]
            steps = min(max(math.ceil(self.turn / max(step, 1e-6)), 1), 200)
            rounds = 3 if step < PROFILED else 1
            cost = rounds * (steps + 1) * step + (3 * step + 1 if step < PROFILED else 0)
            if needed + cost > self.clock.left():
                self._fail(cell, backend, {"error": NOT_REACHED, "reason": f"its turns would have taken {cost:.0f} s"})
                continue
            needed += cost
            live[backend] = (steps, rounds)
        times: dict[str, list[float]] = {backend: [] for backend in live}
        for turn in range(max((rounds for _, rounds in live.values()), default=0)):
            for backend, (steps, rounds) in list(live.items()):
                if turn < rounds:
                    answer = self._ask(backend, "turn", cell=cell.request(), backend=backend, steps=steps)
                    if "error" in answer:
                        self._fail(cell, backend, answer)
                        del live[backend]
                    else:
                        times[backend].append(answer["ok"])
        for backend in live:
            self._finish(cell, backend, times[backend])
        for backend in cell.backends:
            if backend in live:
                self._ask(backend, "release")

    def _fail(self, cell: Cell, backend: str, answer: Mapping[str, Any]) -> None:
        self.rows[cell, backend] |= {"status": answer["error"]}
        if answer.get("reason"):
            self.rows[cell, backend]["reason"] = answer["reason"]

    def _finish(self, cell: Cell, backend: str, times: Sequence[float]) -> None:
        seconds = statistics.median(times)
        row = self.rows[cell, backend]
        row |= {"status": MEASURED, "seconds_per_step": seconds, "turns": list(times)}
        scan = cell.what.startswith("scan_")
        if not scan:
            row["images_per_second"] = cell.batch / seconds
        if seconds < PROFILED:
            steps = min(max(round(0.05 / seconds), 2), 20)
            answer = self._ask(backend, "profile", cell=cell.request(), backend=backend, steps=steps)
            row |= answer.get("ok", {"kernel_share": None, "kernel_share_reason": answer.get("reason", NOT_REACHED)})
        else:
            why = f"a step of over {PROFILED:g} s launches more kernels than the profiler takes in time"
            row |= {"kernel_share": None, "kernel_share_reason": why}
        if scan and self.device:
            row["floor"] = against_floor(row, self.device)


# ---- the command


def stop(text: str) -> SystemExit:
    return SystemExit(f"gpu.py: {text}")


def slug(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--baselines", help="a Python that has mamba-ssm and causal-conv1d (`make baselines-gpu` makes one)"
    )
    parser.add_argument("--fork", type=Path, help=f"a folder with a mamba_ssm that has {FUSED}")
    parser.add_argument("--minutes", type=float, default=8.5, help="time limit; the rest is listed (8.5)")
    parser.add_argument("--only", nargs="+", default=[], help="words that a cell must have, as `train small bf16 128`")
    parser.add_argument("--output", type=Path, help="JSON file; the table goes next to it as .txt")
    parser.add_argument("--dry_run", action="store_true", help="on the CPU, tiny; written only if --output is given")
    given = parser.parse_args()
    clock = Clock(given.minutes)
    if not given.dry_run and not torch.cuda.is_available():
        raise stop("torch sees no CUDA device; --dry_run goes through the same program on a CPU")
    if not given.dry_run and os.environ.get("TRITON_INTERPRET", "0") == "1":
        raise stop("TRITON_INTERPRET=1 would time the interpreter; unset it")
    if given.minutes < 0 or not math.isfinite(given.minutes):
        raise stop(f"--minutes must be 0 or more, not {given.minutes:g}")
    if given.fork is not None and not given.fork.is_dir():
        raise stop(f"--fork must be a folder, and {given.fork} is none")
    if given.baselines is not None and shutil.which(given.baselines) is None:
        raise stop(f"--baselines must be a Python, and {given.baselines} is none")
    if given.output is not None and given.output.suffix != ".json":
        raise stop(f"--output must end in .json, not {given.output.name}")
    device = "cpu" if given.dry_run else "cuda"
    named = device_name(torch.device(device))
    output: Path | None = given.output
    if output is None and not given.dry_run and not given.only:
        output = RESULTS / f"gpu_{slug(named)}.json"
    ours = "cpu" if given.dry_run else "triton"
    fork = None if given.fork is None else given.fork.resolve()
    if given.dry_run:
        cells = plan(ours, fork is not None, sizes=("nano",), batches=(2, 1), scans=(2, 1))
    else:
        cells = plan(ours, fork is not None, sizes=("small", "tiny"), batches=BATCHES, scans=(128, 64))
    cells = [c for c in cells if set(given.only) <= {c.what, c.size, c.precision, str(c.batch)}]
    if not cells:
        raise stop(f"no cell has all of: {' '.join(given.only)}")
    own = Worker(sys.executable, device, None)
    packages = own if given.baselines is None else Worker(given.baselines, device, None)
    forked = Worker(given.baselines or sys.executable, device, fork)
    workers = {ours: own, "reference": own, "mamba_ssm": packages, "fork": forked}
    commit, dirty = commit_and_dirty()
    about = {
        "device": named,
        "date": dt.date.today().isoformat(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "svp_bench": svp_bench.__version__,
        "commit": commit,
        "changed_since": dirty,
    }

    def result() -> dict[str, Any]:
        rows = list(run.rows.values())
        return {
            "schema": 1,
            "dry_run": given.dry_run,
            "ours": ours,
            "about": about,
            "device": run.device,
            "backends": run.backends,
            "rows": rows,
            "ratios": ratios(rows, ours),
            "goals": judged(rows, named),
        }

    def save() -> None:
        if output is not None:
            found = result()
            for path, text in ((output, json.dumps(found, indent=1)), (output.with_suffix(".txt"), report(found))):
                with replacing(path) as file:
                    file.write(text.encode() + b"\n")

    run = Run(cells, workers, clock, size=cells[0].size, turn=0.02 if given.dry_run else TURN_SECONDS, save=save)
    started = dict.fromkeys(workers[backend] for backend in run.backends)
    interrupted = False
    try:
        save()
        if clock.left() > 0:
            for worker in started:  # they import side by side
                worker.start()
        run.go()
        save()
    except KeyboardInterrupt:
        interrupted = True
    except OSError as error:
        raise stop(one_line(error)) from None
    finally:
        for worker in started:
            worker.stop()
    print(report(result()))
    print(f"\nWritten: {output} and its .txt" if output else "\nNothing was written: no --output was given.")
    if interrupted:
        raise SystemExit(130)


if __name__ == "__main__":
    main()
