"""A time limit for code that may never end, such as a template that comes with a model; works in any thread."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_POLL_SECONDS = 0.2


class TimeLimitReached(Exception):
    """The code inside :func:`time_limit` ran for too long."""


class _Watch:
    """One thread that interrupts every thread whose deadline has passed: starting one per call would cost more than a call."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.deadlines: dict[int, float] = {}
        self.interrupted: set[int] = set()
        self.thread: threading.Thread | None = None

    def enter(self, seconds: float) -> int:
        thread = threading.get_ident()
        with self.lock:
            self.deadlines[thread] = time.monotonic() + seconds
            if self.thread is None:
                self.thread = threading.Thread(target=self._run, name="time-limit", daemon=True)
                self.thread.start()
        return thread

    def leave(self, thread: int) -> None:
        with self.lock:
            self.deadlines.pop(thread, None)
            if thread in self.interrupted:
                # The code may have ended between the interrupt and its delivery, which must not hit what comes after it.
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), None)
                self.interrupted.discard(thread)

    def _run(self) -> None:
        while True:
            time.sleep(_POLL_SECONDS)
            with self.lock:
                now = time.monotonic()
                for thread, deadline in self.deadlines.items():
                    if now > deadline:
                        self.interrupted.add(thread)
                        exception = ctypes.py_object(TimeLimitReached)
                        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)


_watch = _Watch()


def _forget() -> None:
    """Start afresh in a forked child, which has neither the thread nor a lock that another thread may have held."""
    global _watch
    _watch = _Watch()


os.register_at_fork(after_in_child=_forget)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the code inside after ``seconds`` of wall-clock time, to about 0.2 s. Not reentrant. A single call into C, such
    as one huge string operation, is interrupted only when it returns.

    Raises:
        TimeLimitReached: the code ran longer.
    """
    thread = _watch.enter(seconds)
    try:
        yield
    finally:
        _watch.leave(thread)
