"""The benchmark of generation's bookkeeping: bad flags, and a small run through every stage."""

from __future__ import annotations

import json

from benchmarks import bookkeeping
from spin.alignment.generation import BACKENDS
from tests.helpers import run_main


def test_bad_flags_are_refused_in_one_sentence(tmp_path):
    for flags, words in ((["--rows", "0"], "rows is 0"), (["--model", "m"], "model and questions require each other")):
        code, _, error = run_main(bookkeeping.main, *flags, "--out", tmp_path / "out.json")
        assert code == 2 and words in error and not (tmp_path / "out.json").exists()


def test_every_stage_of_a_run_is_measured(tmp_path):
    flags = ["--rows", 1200, "--frac_len", 600, "--num_samples", 2, "--reps", 1, "--out", tmp_path / "out.json"]
    code, out, error = run_main(bookkeeping.main, *flags)
    assert code == 0, error
    result = json.loads((tmp_path / "out.json").read_text())
    assert len(result["stages"]) == 6 and result["start_seconds"] > 0
    assert all(facts["microseconds"] > 0 for name, facts in result["stages"].items() if name != bookkeeping.REST)
    assert result["all"]["rows_per_core_second"] > 0 and "decode" in out and "canned" not in BACKENDS
