"""The benchmark of program starts: bad flags, and one program in both ways."""

from __future__ import annotations

import pytest

from benchmarks import starts
from spin.alignment.pipeline import start_programs
from tests.helpers import run_main
from tests.helpers.starts import LIGHT_SERVER


def test_bad_flags_are_refused_in_one_sentence(tmp_path):
    for flags, words in ((["--turns", "0"], "turns is 0"), (["--programs", "train"], "unknown program 'train'")):
        code, _, error = run_main(starts.main, *flags, "--out", tmp_path / "out.json")
        assert code == 2 and words in error and not (tmp_path / "out.json").exists()


def test_both_kinds_of_start_are_measured(monkeypatch):
    monkeypatch.setattr(start_programs, "_SERVER", LIGHT_SERVER)
    result = starts.measure(1, ["reformat"])
    (name,) = result["programs"]
    plain, served = (result["programs"][name][kind] for kind in starts.KINDS)
    assert name == "reformat" and len(plain["turns"]) == len(served["turns"]) == 1
    assert 0 < served["asked"] <= served["seconds"] and plain["processor_seconds"] > 0
    assert result["sum"]["plain"]["seconds"] == pytest.approx(plain["seconds"], abs=0.01)


def test_a_job_that_fails_says_what_it_said(tmp_path):
    starter = start_programs.ProgramStarter({"SPIN_PLAIN_STARTS": "1"})
    command = [starts.sys.executable, "-c", "raise SystemExit('error: no such row')"]
    with pytest.raises(starts.InputError, match="ended with 1: error: no such row"):
        starts.take_turn(starter, command, tmp_path / "log")
