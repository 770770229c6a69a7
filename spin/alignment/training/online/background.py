"""Work in a thread of its own, whose result or error the thread that needs it takes up."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

T = TypeVar("T")


class Background(Generic[T]):
    """Calls a function in a thread. The thread does not keep a program alive that ends without it."""

    def __init__(self, work: Callable[[], T], name: str) -> None:
        self._future: Future[T] = Future()
        self._thread = threading.Thread(target=self._run, args=(work,), name=name, daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._future.set_result(work())
        except BaseException as error:  # raised again in the thread that asks for the result
            self._future.set_exception(error)

    def result(self) -> T:
        """Wait for the function, and return what it returned or raise what it raised."""
        return self._future.result()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the function to end, at most so long, whatever comes of it."""
        self._thread.join(seconds)
