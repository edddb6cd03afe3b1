"""The budget of a task whose shipped config sets its epochs: a short list may have more than its protocol's others."""

from __future__ import annotations

from pathlib import Path

import pytest
from drawn_records import make_record

from svp_bench.results import audit
from svp_bench.results.files import write_record


@pytest.mark.parametrize(
    ("own", "expected"),
    [({}, "fail"), ({"trainer.max_epochs": 500}, "pass"), ({"trainer.max_epochs": 499}, "fail")],
)
def test_the_tasks_config_may_set_the_epochs(
    own: dict[str, int], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "shipped_layer", lambda name: own if name == "vtab/dtd.yaml" else {})
    changes = {"trainer.max_epochs": 500}
    path = write_record(make_record("vtab/dtd", changes=changes, epochs=500), tmp_path)
    text = audit.render(audit.audit([path], tmp_path))
    (line,) = [line for line in text.splitlines() if " budget " in line]
    assert line.split()[0] == expected, text
