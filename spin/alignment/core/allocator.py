"""Tells glibc to keep freed memory: large tensors are otherwise returned to the system, and their pages faulted in again."""

from __future__ import annotations

import ctypes
import os

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 2**26
# Environment variables by which users choose for themselves.
_USER_CHOICES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Let this process reuse the memory of freed tensors, for training or generating on a CPU; return whether that was done.

    By default glibc maps every block above 32 MiB anew and unmaps it when it is freed. Nothing is changed for another C
    library, or if the environment configures the allocator.
    """
    libc = ctypes.CDLL(None)
    if any(name in os.environ for name in _USER_CHOICES) or not hasattr(libc, "mallopt"):
        return False
    # No block is mapped, and nothing is given back from the end of the heap, which grows in large pieces.
    values = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _TOP_PAD_BYTES}
    return all(libc.mallopt(name, value) == 1 for name, value in values.items())
