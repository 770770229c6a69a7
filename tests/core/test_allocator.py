"""glibc keeps freed memory if it is told to, and not if the user has configured the allocator."""

from __future__ import annotations

import ctypes
import sys

import pytest

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
