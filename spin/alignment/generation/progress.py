"""Progress display during generation: a bar on a terminal, otherwise a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from spin.alignment.generation.base import Response

_LINE_SECONDS = 10.0
_SHOW_SECONDS = 0.5
# Before a minute has passed or a twentieth of the prompts is finished, a rate says little.
_EARLY_SECONDS, _EARLY_SHARE = 60.0, 0.05


class GenerationProgress:
    """Counts of one worker (prompts, rows, tokens, truncated responses) and the estimated time left for all workers."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.prompts = self.rows = self.tokens = self.cut = 0
        self.done = self.total = self._done_before = 0
        self.started = self._last_report = self._shown = time.monotonic()
        self._bar: Bar | None = None

    def start(self, done: int, total: int) -> None:
        """Start the clock once the model is loaded; ``done`` of ``total`` prompts are already complete."""
        self.done = self._done_before = done
        self.total = total
        self.started = self._last_report = time.monotonic()
        if sys.stderr.isatty():
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            from spin.alignment.core.console import plain_console

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=plain_console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=total, completed=done)

    def add(self, responses: Sequence[Response]) -> None:
        """Count the responses to one prompt that this worker has finished."""
        self.prompts += 1
        self.rows += len(responses)
        for response in responses:
            self.tokens += len(response.token_ids)
            self.cut += response.finish_reason == "length"

    def show(self, count_done: Callable[[], int]) -> bool:
        """Update the display, at most twice a second; return whether it was due.

        ``count_done()`` returns the number of prompts finished by all workers.
        """
        if time.monotonic() - self._shown < _SHOW_SECONDS:
            return False
        self._shown = time.monotonic()
        # Never less than this worker's own count, which includes rows that are not in a file yet.
        self.done = max(count_done(), self._done_before + self.prompts)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, description=self.summary())
        elif time.monotonic() - self._last_report > _LINE_SECONDS:
            self._last_report = time.monotonic()
            left = self.seconds_left()
            say_error(self.summary() + (f", {left:.0f} s left" if left else ""))
        return True

    def seconds_left(self) -> float:
        """Return the estimated time left at the rate of all workers so far; 0 while nothing can be said yet.

        The first responses of a large batch take as long as all of it.
        """
        made, left = self.done - self._done_before, self.total - self.done
        is_early = self.seconds < _EARLY_SECONDS and made < _EARLY_SHARE * (made + left)
        return left / made * self.seconds if made and not is_early else 0.0

    @property
    def seconds(self) -> float:
        return max(time.monotonic() - self.started, 1e-9)  # never 0, because rates are divided by it

    def summary(self) -> str:
        share = self.cut / max(self.rows, 1)
        own = "" if self.prompts == self.done - self._done_before else f" ({self.prompts} here)"
        return (
            f"{self.name}: {self.done}/{self.total} prompts{own}, {self.rows / self.seconds:.1f} rows/s, "
            f"{self.tokens / self.seconds:.0f} tokens/s, {share:.1%} truncated"
        )

    def facts(self) -> dict[str, Any]:
        """Return the counts for the heartbeat file, which ``spin status`` reads."""
        return {
            "prompts": self.prompts,
            "rows": self.rows,
            "tokens": self.tokens,
            "cut": self.cut,
            "seconds": round(self.seconds, 3),
            "seconds_left": round(self.seconds_left(), 1),
        }

    def close(self, done: int) -> None:
        """Stop the bar and print the final counts."""
        self.done = done
        if self._bar is not None:
            self._bar.stop()
        say_error(self.summary())
