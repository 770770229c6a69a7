"""Folders in memory: nothing is left of them, however their process ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from spin.alignment.core import memory_folder
from spin.alignment.core.memory_folder import MemoryFolder
from tests.helpers import REPOSITORY

HOLD = """
import sys, time
from pathlib import Path
from spin.alignment.core import memory_folder
memory_folder.MEMORY = Path(sys.argv[1])
folder = memory_folder.MemoryFolder("policy-")
(folder.path / "model").mkdir()
(folder.path / "model" / "weights").write_bytes(b"0" * 1000)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(memory_folder, "MEMORY", tmp_path)
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_is_left_of_a_process_that_was_killed(memory, number):
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    owner = subprocess.Popen([sys.executable, "-c", HOLD, str(memory)], env=environment, stdout=subprocess.PIPE)
    assert owner.stdout.readline() == b"ready\n" and len(list(memory.glob("policy-*/model/weights"))) == 1
    owner.send_signal(number)
    owner.wait()
    owner.stdout.close()
    deadline = time.monotonic() + 20
    while list(memory.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_closing_removes_the_folder_and_ends_the_guard(memory):
    folder = MemoryFolder("policy-")
    (folder.path / "weights").touch()
    folder.close()
    folder.close()
    assert list(memory.iterdir()) == [] and folder._guard.returncode == 0


def test_what_a_killed_guard_has_left_is_removed_at_the_next_start(memory):
    living = MemoryFolder("policy-")
    for name, age in (("policy-dead", 1000), ("policy-new", 0), ("other-dead", 1000)):
        (memory / name).mkdir()
        os.utime(memory / name, (time.time() - age,) * 2)
    os.utime(living.path, (0, 0))
    later = MemoryFolder("policy-")
    kept = {"policy-new", "other-dead", living.path.name, later.path.name}
    assert {path.name for path in memory.iterdir()} == kept
    living.close()
    later.close()
