"""Work and memory of tables are linear in the records: facts that hold on any machine."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from synthetic_records import write_many

from svp_bench.records import schema, store
from svp_bench.records.digests import canonical_digest
from svp_bench.tables.build import run_table


@pytest.mark.parametrize("packed", [False, True])
def test_each_record_is_read_once_and_each_config_is_digested_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    count = write_many(tmp_path, 5 * 40, suites=["fgvc"], packed=packed)
    read: Counter[str] = Counter()
    parsed: Counter[str] = Counter()
    digested: Counter[str] = Counter()
    real_read, real_convert, real_digest = store.read_regular, schema.convert, schema.cell_config

    def reading(path, limit):  # type: ignore[no-untyped-def]
        read[str(path)] += 1
        return real_read(path, limit)

    def converting(data, kind, where, *rest):  # type: ignore[no-untyped-def]
        parsed[where] += 1
        return real_convert(data, kind, where, *rest)

    def digesting(config):  # type: ignore[no-untyped-def]
        digested[canonical_digest(real_digest(config))] += 1
        return real_digest(config)

    monkeypatch.setattr(store, "read_regular", reading)
    monkeypatch.setattr(schema, "convert", converting)
    monkeypatch.setattr(schema, "cell_config", digesting)
    schema._without_seed.cache_clear()
    assert "linear" in run_table(tmp_path, ["fgvc"])
    files = [] if packed else sorted(map(str, (tmp_path / "records").rglob("*.json")))
    assert read == Counter(files)
    assert len(parsed) == count
    assert set(parsed.values()) == {1}
    assert len(digested) == 200
    assert set(digested.values()) == {1}


def test_seeds_of_a_cell_share_their_config_in_memory(tmp_path: Path) -> None:
    write_many(tmp_path, 5 * 130, suites=["fgvc"])
    records, problems = store.read_records(tmp_path)
    assert not problems
    cells: dict[str, set[int]] = {}
    for record in records:
        cells.setdefault(record.config_digest, set()).add(id(record.config["model"]))
    assert len(cells) == 5 * 120
    assert all(len(objects) == 1 for objects in cells.values())
