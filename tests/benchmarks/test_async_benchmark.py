"""The benchmark of sampling ahead: bad flags, and its arithmetic."""

from __future__ import annotations

import os

import pytest

from benchmarks import async_online
from tests.helpers import run_main


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--turns", "0"], "turns is 0: set it to 1 or more"),
        (["--samples", "1"], "samples is 1: set it to 2 or more"),
        (["--server_cores", "99999"], "server_cores names core 99999"),
        (["--server_cores", "0", "--training_cores", "0"], "core 0 is of both"),
    ],
)
def test_bad_flags_are_refused_in_one_sentence(tmp_path, monkeypatch, flags, words):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
    code, _, error = run_main(async_online.main, *flags, "--out", tmp_path / "out.json")
    assert code == 2 and words in error and not (tmp_path / "out.json").exists()


def test_a_turn_is_the_median_of_its_measured_steps():
    """Two steps of warm-up, three measured, the last: 100, 100, 1, 2, 6, 100 seconds."""
    ends = [
        {"wall": wall, "processor": wall / 2, "sending": wall / 4}
        for wall in (100.0, 200.0, 201.0, 203.0, 209.0, 309.0)
    ]
    logged = [
        {"staleness": 1, **{f"seconds/{part}": float(10 * step) for part in async_online.PARTS}} for step in range(6)
    ]
    found = async_online.medians_of(ends, logged, 3)
    assert found == {
        "step": 2.0,
        "processor": 1.0,
        "sending": 0.5,
        "staleness": 1,
        **dict.fromkeys(async_online.PARTS, 30.0),
    }


def test_ratios_are_of_neighbouring_turns_and_the_limit_of_synchronous_steps():
    turns = {
        "sync": [{"step": 4.0, "generate": 3.0, "sending": 1.0}, {"step": 6.0, "generate": 4.0, "sending": 1.0}],
        "async": [{"step": 2.0, "generate": 0.5, "sending": 0.5}, {"step": 4.0, "generate": 0.5, "sending": 0.5}],
    }
    found = async_online.summarize(turns)
    assert (found["ratio"], found["ratio_spread"]) == (1.75, [1.5, 2.0])
    assert found["limit"] == 5 / (1 + 2.5)  # of 3.5 s, 1 s is not overlapped
