"""Stop texts: does the text of a response hold one yet? Looked for in a short tail after every token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

# Characters at the start of a decoded tail that may differ from the whole text: half a character, a stripped space.
_UNSURE = 8


class StopTextWatcher:
    """Watches one response. Every token is shown in order; a tail of the ids is decoded, never the whole but to confirm."""

    def __init__(self, texts: Sequence[str], decode: Callable[[Sequence[int]], str]) -> None:
        self.texts, self.decode = texts, decode
        self._needed = max(map(len, texts)) + _UNSURE
        self._start = 0

    def completed(self, ids: Sequence[int]) -> bool:
        """Return whether the text of ``ids``, whose last token is new, holds a stop text."""
        tail = ids[self._start :]
        text = self.decode(tail)
        if any(stop in text for stop in self.texts):
            whole = self.decode(ids)
            return any(stop in whole for stop in self.texts)
        if len(tail) > 1 and len(text) > 4 * self._needed:
            self._advance(tail)
        return False

    def _advance(self, tail: Sequence[int]) -> None:
        """Drop the first half of the tail, as long as the rest has text enough before the next token."""
        half = len(tail) // 2
        if len(self.decode(tail[half:])) >= self._needed:
            self._start += half
