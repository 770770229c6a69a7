"""The progress of a generation: rates, and an estimate once there is something to say."""

from __future__ import annotations

import pytest

from spin.alignment.generation import progress as progress_module
from spin.alignment.generation.base import Response
from spin.alignment.generation.progress import GenerationProgress

RESPONSE = Response([1] * 20, "stop")


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    return now


def test_the_first_responses_of_a_batch_say_nothing_about_the_time_left(clock, capsys):
    progress = GenerationProgress("worker")
    progress.start(0, 640)
    clock[0] += 17  # the first of 128 in flight, which have taken as long
    progress.add([RESPONSE])
    assert progress.show(lambda: 0) and progress.seconds_left() == 0.0
    assert capsys.readouterr().err == "worker: 1/640 prompts, 0.1 rows/s, 1 tokens/s, 0.0% truncated\n"
    for _ in range(63):
        progress.add([RESPONSE])
    clock[0] += 15
    assert progress.show(lambda: 0) and progress.seconds_left() == pytest.approx(576 / 64 * 32)
    assert capsys.readouterr().err.endswith("0.0% truncated, 288 s left\n")


def test_after_a_minute_there_is_an_estimate_whatever_is_done(clock):
    progress = GenerationProgress("worker")
    progress.start(100, 1000)
    assert progress.seconds_left() == 0.0  # nothing made yet
    progress.add([RESPONSE])
    clock[0] += 61
    progress.show(lambda: 0)
    assert progress.seconds_left() == pytest.approx(899 * 61)
