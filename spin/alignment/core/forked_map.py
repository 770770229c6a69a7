"""Applying a function to a stream of items in forked processes, in order and with few items in memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, TypeVar

from spin.alignment.core.errors import InputError
from spin.alignment.core.program import end_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")
_AHEAD = 2  # items per process that wait or are computed

_function: Callable[[Any], Any] | None = None


def forked_map(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """Yield the results of ``function`` in the order of ``items``, computed by ``workers`` processes; by this one if it is one.

    ``function`` may be a closure: the processes are forked. Items and results are pickled. What ``function`` raises is raised.

    Raises:
        InputError: one of the processes was killed.
    """
    if workers == 1:
        yield from map(function, items)
        return
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, context, initializer=_begin, initargs=(function,)) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(_apply, item))
                if len(waiting) > _AHEAD * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise InputError(
                f"one of {workers} worker processes was killed, perhaps because the memory is full: free some, or use fewer "
                "processes, and run the same command again"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def in_lists(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield items in lists of ``size``; the last may be shorter."""
    stream = iter(items)
    while some := list(islice(stream, size)):
        yield some


def _begin(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # The threads of the tokenizers library do not survive a fork, and a worker would wait for them for ever.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()  # a worker that outlived a killed parent would keep the locks that it inherited
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # which that sends; the parent may handle it otherwise
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the workers


def _apply(item: Any) -> Any:
    assert _function is not None
    return _function(item)
