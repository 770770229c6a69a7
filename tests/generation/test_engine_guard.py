"""An engine's processes end with the program that started them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spin.alignment.generation.vllm import engine_guard
from spin.alignment.generation.vllm.engine_guard import MARK, EngineGuard, marked_processes
from tests.helpers import program_environment

SLEEP = [sys.executable, "-c", "import time; time.sleep(120)"]
OWNER = (
    "import subprocess, sys, time\n"
    "from spin.alignment.generation.vllm.engine_guard import EngineGuard\n"
    "guard = EngineGuard()\n"
    f"subprocess.Popen({SLEEP!r}, start_new_session=True)\n"
    "print(guard.mark, flush=True)\n"
    "time.sleep(120)\n"
)


def test_processes_of_a_killed_program_are_ended():
    environment = program_environment(PYTHONPATH=str(Path(__file__).resolve().parents[2]))
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, env=environment)
    assert owner.stdout is not None
    mark = owner.stdout.readline().strip()
    deadline = time.monotonic() + 40
    while len(marked_processes(mark)) != 1:  # until the process has its own environment
        assert time.monotonic() < deadline
        time.sleep(0.02)
    owner.kill()
    owner.wait()
    while marked_processes(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_closing_ends_what_is_left_and_nothing_else(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(MARK, raising=False)
    before = subprocess.Popen(SLEEP)
    guard = EngineGuard()
    engine = subprocess.Popen(SLEEP)
    guard.close()
    assert engine.wait(20) == -9 and before.poll() is None
    before.kill()
    before.wait()
    assert MARK not in os.environ


def test_a_process_that_is_just_being_started_is_killed_too(monkeypatch: pytest.MonkeyPatch):
    """Its environment is empty at the first look, as in the middle of an exec; another one appears meanwhile."""
    looks = iter([[], [101], [102], [], []])
    killed = []
    monkeypatch.setattr(engine_guard, "marked_processes", lambda mark: next(looks))
    monkeypatch.setattr(engine_guard.os, "kill", lambda pid, number: killed.append((pid, number)))
    engine_guard.kill_marked("mark")
    assert killed == [(101, 9), (102, 9)] and next(looks, None) is None
