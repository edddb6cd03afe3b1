"""Write the board of `svp-bench demo` into README.md, from the records of a run of it.

svp-bench demo --results_root DIR/results --runs_root DIR/runs
python benchmarks/demo_board.py --results_root DIR/results            # print the board
python benchmarks/demo_board.py --results_root DIR/results --write    # put it between its marks in README.md
"""

from __future__ import annotations

import argparse
import io
from collections import defaultdict
from pathlib import Path

from rich.console import Console

from svp_bench.core.atomic import replacing
from svp_bench.records.record import Record
from svp_bench.records.store import read_records
from svp_bench.sweep.demo import METHODS, SUITE, leaderboard
from svp_bench.tasks.cards import load_suite

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- begin: demo board -->", "<!-- end: demo board -->"


def board(records: list[Record]) -> str:
    """Return the records of the demo: seed 0 with its settings, the newest of each cell."""
    tasks = load_suite(SUITE).tasks
    scores: dict[str, dict[str, tuple[float, int]]] = defaultdict(dict)
    for record in sorted(records, key=lambda record: record.created):
        rate = METHODS.get(record.method, {}).get("model.learning_rate")
        ours = record.task in tasks and record.seed == 0 and record.config["model"]["learning_rate"] == rate
        if ours and record.kind == "final" and record.status == "complete" and record.metrics is not None:
            scores[record.method][record.task] = record.metrics.top1, record.metrics.count
    text = io.StringIO()
    Console(file=text, width=100, color_system=None).print(leaderboard(scores, tasks))
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's board in README.md, from records.")
    parser.add_argument("--results_root", type=Path, default=Path("results"), help="of a run of svp-bench demo")
    parser.add_argument("--write", action="store_true", help="put it into README.md")
    arguments = parser.parse_args()
    found = board(read_records(arguments.results_root)[0])
    print(found)
    if arguments.write:
        head, _, rest = README.read_text(encoding="utf-8").partition(BEGIN)
        tail = rest.partition(END)[2]
        with replacing(README) as file:
            file.write(f"{head}{BEGIN}\n\n```\n{found}\n```\n\n{END}{tail}".encode())


if __name__ == "__main__":
    main()
