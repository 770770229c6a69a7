"""The benchmark of the start of a training: what it measures of one tiny case, and its table."""

from __future__ import annotations

import json

from benchmarks import result_tables, start_of_training


def test_a_tiny_case_is_measured_and_added(tmp_path, monkeypatch):
    out = tmp_path / "start.json"
    out.write_text(json.dumps({"cases": {"earlier": {}}}))
    start_of_training.main(["--rows", "12", "--processes", "1", "--kinds", "cold", "--out", str(out)])
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["earlier", "12 rows, 1 processes, 1 workers"]
    facts = cases["12 rows, 1 processes, 1 workers"]["cold"]
    (memory,) = facts["memory_of_processes"]
    assert facts["seconds_to_first_step"] > 0 and 50 < memory["anonymous"] < memory["resident"]
    monkeypatch.setattr(result_tables, "RESULTS", tmp_path)
    assert "| 12 rows, 1 processes, 1 workers | cold | " in result_tables.start_table("start")
