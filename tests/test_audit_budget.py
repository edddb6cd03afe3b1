"""The budget of a task whose shipped config sets its epochs: a short list may have more than its protocol's others."""

from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_records import make_record

from svp_bench.audit import checks
from svp_bench.audit.record import audit, render
from svp_bench.records import defaults as recipes
from svp_bench.records.store import write_record
from svp_bench.tables.build import load_table
from svp_bench.tasks.cards import load_suite


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "fail"), ({"trainer.max_epochs": 500}, "pass"), ({"trainer.max_epochs": 499}, "fail")],
)
def test_the_tasks_config_may_set_the_epochs(
    own: dict[str, int], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "shipped_layer", lambda name: own if name == "vtab/dtd.yaml" else {})
    changes = {"trainer.max_epochs": 500}
    path = write_record(make_record("vtab/dtd", changes=changes, epochs=500), tmp_path)
    text = render(audit([path], tmp_path))
    (line,) = [line for line in text.splitlines() if " budget " in line]
    assert line.split()[0] == expected, text


def test_epochs_of_the_tasks_own_config_split_no_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One task has 500 epochs of its own, the others the protocol's 100: one row. 100 for that task is another one."""
    monkeypatch.setattr(
        recipes, "shipped_layer", lambda name: {"trainer.max_epochs": 500} if name == "vtab/dtd.yaml" else {}
    )
    own = make_record("vtab/dtd", changes={"trainer.max_epochs": 500}, epochs=500)
    usual, short = make_record("vtab/caltech101"), make_record("vtab/dtd", seed=1)
    assert own.setting_digest != usual.setting_digest
    suite = load_suite("vtab")
    (section,) = load_table(suite, [own, usual], []).sections
    (row,) = section.rows
    assert (row.label, sorted(row.cells)) == (usual.method, ["vtab/caltech101", "vtab/dtd"])
    (section,) = load_table(suite, [own, usual, short], []).sections
    labels = sorted(row.label for row in section.rows)
    assert labels == [
        f"{usual.method} (max_epochs=100 for each task)",
        f"{usual.method} (max_epochs=100)",
    ]
