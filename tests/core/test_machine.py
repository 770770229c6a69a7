"""What is recorded of the machine, and the peak memory of a process."""

from __future__ import annotations

import subprocess
from types import SimpleNamespace

from spin.alignment.core import machine


def test_the_machine_is_described():
    found = machine.describe_machine()
    assert list(found) == ["processor", "cores", "memory", "GPUs", "system", "python"]
    assert int(found["cores"]) >= 1 and found["memory"].endswith(" GiB") and all(found.values())


def test_equal_gpus_are_counted(monkeypatch):
    listed = "H100, 81559 MiB\nH100, 81559 MiB\nL4, 23034 MiB\n"
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=listed))
    assert machine.describe_machine()["GPUs"] == "2 x H100, 81559 MiB; 1 x L4, 23034 MiB"


def test_peak_memory_grows_with_what_is_used():
    before = machine.peak_memory()["host"]
    used = bytearray(2**28)
    used[:: 2**12] = b"1" * 2**16  # every page
    after = machine.peak_memory()["host"]
    assert after > 0.25 and after >= before
