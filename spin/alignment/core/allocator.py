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
# A process may grow to this multiple of what a phase needs, and by this many bytes.
_GROWTH, _GROWTH_BYTES = 1.25, 2**28
# Phases at whose end everything is returned, to learn what one needs: two steps of sampling and updating.
_FIRST_PHASES = 4


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
    """Limits the growth of a process that keeps freed memory. A phase is a part of a step whose blocks differ from those before,
    such as sampling or an update.

    Blocks of ever new sizes (rows of other lengths, keys and values that grow) do not fit into the holes that earlier ones
    left: without a limit, online training of a model with 135 million parameters had 2 GiB in use and kept 6 more. Returning
    everything after every phase would cost the page faults that keeping it saves.
    """

    def __init__(self) -> None:
        self._phases = 0
        self._wanted = 0  # most bytes at the end of a phase that began without free memory
        self._has_returned = False  # at the end of the last phase

    def end_phase(self, is_last_of_kind: bool = False) -> bool:
        """Return the free memory to the system if the process has a quarter more than a phase needs, or if that is not known
        yet; return whether it was done.

        ``is_last_of_kind``: a phase of another kind follows, which cannot use what this one leaves: it is returned at once.
        """
        resident = _private_bytes()
        self._phases += 1
        if self._has_returned:
            self._wanted = max(self._wanted, resident)
        grown = resident > _GROWTH * self._wanted + _GROWTH_BYTES
        self._has_returned = is_last_of_kind or grown or self._phases <= _FIRST_PHASES
        libc = ctypes.CDLL(None)
        if self._has_returned and hasattr(libc, "malloc_trim"):  # only glibc has it
            libc.malloc_trim(0)
        return self._has_returned


def _private_bytes() -> int:
    """Resident memory of this process without files and shared memory; 0 where there is no /proc."""
    try:
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text(encoding="ascii").split())
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
