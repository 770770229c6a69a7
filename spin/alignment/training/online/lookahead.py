"""The batches of the training data with the next one known, also from one epoch to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any


class Lookahead:
    """Iterates over the batches of an epoch, one of them drawn ahead."""

    def __init__(self, epoch: Iterator[Any], first_of_next_epoch: Callable[[], Any | None]) -> None:
        self.epoch, self._first_of_next_epoch = epoch, first_of_next_epoch
        self._ahead = next(epoch, None)
        self.following: Any | None = None  # what comes after the batch that was returned last

    def __iter__(self) -> Lookahead:
        return self

    def __next__(self) -> Any:
        if self._ahead is None:
            raise StopIteration
        batch, self._ahead = self._ahead, next(self.epoch, None)
        self.following = self._first_of_next_epoch() if self._ahead is None else self._ahead
        return batch
