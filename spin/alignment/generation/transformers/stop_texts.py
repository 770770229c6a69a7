"""Detecting stop texts in a response: after every token, only a short tail is decoded and searched."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Characters at the start of a decoded tail that may differ from the full text: a partial character, a stripped space.
_UNSURE = 8


class StopTextWatcher:
    """Watches one response, token by token. Only a tail of the ids is decoded; the full text only to confirm a match."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.texts, self.decode = texts, decode
        self._needed = max(map(len, texts)) + _UNSURE
        self._start = 0

    def completed(self, ids: Sequence[int]) -> bool:
        """Return whether the text of ``ids``, whose last token is new, contains a stop text."""
        tail = ids[self._start :]
        text = self.decode(tail)
        if any(stop in text for stop in self.texts):
            whole = self.decode(ids)
            return any(stop in whole for stop in self.texts)
        if len(tail) > 1 and len(text) > 4 * self._needed:
            self._advance(tail)
        return False

    def _advance(self, tail: Sequence[int]) -> None:
        """Drop the first half of the tail if the second half has enough text to contain any stop text."""
        half = len(tail) // 2
        if len(self.decode(tail[half:])) >= self._needed:
            self._start += half
