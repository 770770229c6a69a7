"""Memory of this process: glibc keeps what is freed, within limits, and the garbage collector looks only at what is new."""

from __future__ import annotations

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Parameters of glibc's mallopt (malloc.h).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_TOP_PAD_BYTES = 2**26
# Environment variables by which users choose for themselves.
_USER_CHOICES = ("GLIBC_TUNABLES", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "LD_PRELOAD")
# A process may grow to this multiple of what it had after its first step, and by this many bytes.
_GROWTH, _GROWTH_BYTES = 1.25, 2**28


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


@contextmanager
def frozen_objects() -> Iterator[None]:
    """Let Python's garbage collector leave alone, inside the context, what exists now.

    Libraries such as torch leave a million objects behind, and every full collection visits all of them, to find nothing: an
    eighth of the time, or more, of a program that makes many small objects.
    """
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


class KeptMemory:
    """Limits the growth of a process that keeps freed memory, from step to step.

    Blocks of ever new sizes (rows of other lengths, keys and values that grow) do not fit into the holes that earlier ones
    left: without a limit, online training doubles its memory within ten steps, and most of it is free. Returning everything after
    every step would cost the page faults that keeping it saves.
    """

    def __init__(self) -> None:
        self._wanted: int | None = None  # bytes after the first step, or after the first one since memory was returned

    def end_step(self) -> bool:
        """Return the free memory to the system if the process has grown by more than a quarter; return whether it has."""
        resident = _private_bytes()
        if self._wanted is None:
            self._wanted = resident
        if resident <= _GROWTH * self._wanted + _GROWTH_BYTES:
            return False
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # only glibc has it
            libc.malloc_trim(0)
        self._wanted = None
        return True


def _private_bytes() -> int:
    """Resident memory of this process without files and shared memory; 0 where there is no /proc."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split())
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
