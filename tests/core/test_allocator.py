"""glibc keeps freed memory if it is told to, not if the user has configured the allocator, and not without limit."""

from __future__ import annotations

import ctypes
import sys

import pytest

from spin.alignment.core import allocator
from tests.helpers import run_command

# The faults of 20 blocks of 64 MiB, each written and freed.
PROGRAM = """
import resource, sys
from spin.alignment.core.allocator import keep_freed_memory
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = bytearray(2**26)
    block[:] = bytes(1) * len(block)
    del block
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
glibc = pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="this C library is not glibc")


def run(mode: str, **environment: str) -> tuple[str, int]:
    done = run_command([sys.executable, "-c", PROGRAM, mode], **environment)
    assert done.returncode == 0, done.stderr
    told, faults = done.stdout.split()
    return told, int(faults)


@glibc
def test_pages_of_freed_blocks_are_not_faulted_in_again():
    _, stock = run("stock")
    told, kept = run("keep")
    assert told == "True" and kept < stock / 3


@glibc
def test_an_allocator_that_the_user_configured_stays():
    told, _ = run("keep", MALLOC_TRIM_THRESHOLD_="1000000")
    assert told == "False"


# A process that grows by 600 MB, which it frees except for something small between the blocks.
GROWN = """
from spin.alignment.core.allocator import KeptMemory, _private_bytes, keep_freed_memory
assert keep_freed_memory()
memory, small, blocks = KeptMemory(), [], []
print(memory.end_phase(), _private_bytes())
for _ in range(60):
    blocks.append(bytearray(b"x") * 10_000_000)
    small.append(bytearray(2000))
del blocks
print(None, _private_bytes())
print(memory.end_phase(), _private_bytes())
"""


@glibc
def test_what_a_grown_process_keeps_in_vain_is_returned():
    done = run_command([sys.executable, "-c", GROWN])
    assert done.returncode == 0, done.stderr
    start, grown, returned = (line.split() for line in done.stdout.splitlines())
    assert returned[0] == "True"
    assert int(grown[1]) - int(start[1]) > 500_000_000 > 10 * (int(returned[1]) - int(start[1]))


def test_memory_is_returned_once_a_process_has_grown_by_a_quarter_over_what_a_phase_needs(monkeypatch):
    gib = 2**30
    sizes = iter([9 * gib, 4 * gib, 5 * gib, 4 * gib, 4 * gib, 6 * gib, 7 * gib, 5 * gib, 6 * gib, 7 * gib])
    monkeypatch.setattr(allocator, "_private_bytes", lambda: next(sizes))
    memory = allocator.KeptMemory()
    # What the first phase found (9) was not its own. After a return, the next limit is still that of 5.
    expected = [True, True, True, True, False, False, True, False, False, True]
    assert [memory.end_phase() for _ in range(10)] == expected


def test_the_limit_follows_a_need_that_grows(monkeypatch):
    gib = 2**30
    sizes = iter([4 * gib] * 5 + [8 * gib] * 3)
    monkeypatch.setattr(allocator, "_private_bytes", lambda: next(sizes))
    memory = allocator.KeptMemory()
    assert [memory.end_phase() for _ in range(8)] == [True] * 4 + [False, True, False, False]


def test_everything_is_returned_before_a_phase_of_another_kind(monkeypatch):
    gib = 2**30
    monkeypatch.setattr(allocator, "_private_bytes", lambda: 4 * gib)
    memory = allocator.KeptMemory()
    phases = [False] * 6 + [True, False]
    assert [memory.end_phase(is_last_of_kind=kind) for kind in phases] == [True] * 4 + [False, False, True, False]
