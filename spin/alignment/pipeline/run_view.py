"""What `spin run` shows while its stages run: a live display on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from spin.alignment.core.console import plain_console, say
from spin.alignment.core.text import duration

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live

    from spin.alignment.pipeline.manifest import RunManifest
    from spin.alignment.pipeline.stages import Stage

_REFRESH_SECONDS = 1.0
_LINE_SECONDS = 30.0


@dataclass
class RunningStage:
    """A stage that runs: when it started and was last told of (this process's clock, s), and what its output says it does."""

    stage: Stage
    started: float
    told: float
    activity: str = ""

    def progress(self) -> list[str]:
        """Return its progress as lines: from the files that it writes, else its last line of output."""
        return (self.stage.kind.progress(self.stage) or self.activity).splitlines()

    def seconds_left(self) -> float | None:
        return self.stage.kind.seconds_left(self.stage)


class RunView:
    """Context manager: shows the stages that run. Safe to use from several threads.

    Without a terminal (a pipe, a file, a terminal that cannot move its cursor) nothing is drawn: each running stage has a line
    every half minute, with the time.
    """

    def __init__(self, stages: Sequence[Stage], manifest: RunManifest) -> None:
        self.stages, self.manifest = stages, manifest
        self._running: dict[str, RunningStage] = {}
        self._started = self._drawn = time.monotonic()
        self._mutex = threading.RLock()
        self._live: Live | None = None

    def __enter__(self) -> RunView:
        console = plain_console()
        if sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal:
            from rich.live import Live

            self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stderr=sys.stderr.isatty())
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop_drawing()

    def tell(self, sentence: str) -> None:
        """Show a sentence of the run: with the time, unless someone is watching."""
        stamp = "" if self._live is not None else time.strftime("%H:%M:%S ")
        say(f"{stamp}==> {sentence}")

    @contextmanager
    def stage(self, stage: Stage, verb: str) -> Iterator[None]:
        """Show that a stage is ``verb`` (starting, resuming), and its progress until the block ends."""
        self.tell(f"{stage.name}: {verb} (stage {self.number(stage)} of {len(self.stages)})")
        with self._mutex:
            now = time.monotonic()
            self._running[stage.name] = RunningStage(stage, started=now, told=now)
        try:
            yield
        finally:
            with self._mutex:
                del self._running[stage.name]

    def look(self, name: str, activity: str) -> None:
        """Update the display, if it is due, with what a running stage does; called about once a second."""
        with self._mutex:
            now, running = time.monotonic(), self._running.get(name)
            if running is None:
                return
            running.activity = activity
            if self._live is not None:
                if now - self._drawn >= _REFRESH_SECONDS:
                    self._drawn = now
                    self._draw()
            elif now - running.told >= _LINE_SECONDS:
                running.told = now
                lines = ", ".join(running.progress())
                self.tell(
                    f"{name}: {lines or 'running'}; {duration(now - running.started)} so far; run: {self._run_left()}"
                )

    def number(self, stage: Stage) -> int:
        """Return the place of a stage among the stages of the run, from 1."""
        return [item.name for item in self.stages].index(stage.name) + 1

    def _run_left(self) -> str:
        left = {name: running.seconds_left() for name, running in self._running.items()}
        elapsed = {name: time.monotonic() - running.started for name, running in self._running.items()}
        seconds, is_complete = run_seconds_left(self.stages, self.manifest, left, elapsed)
        return (
            f"{'about' if is_complete else 'over'} {duration(seconds)} left" if seconds else "time left not known yet"
        )

    def _draw(self) -> None:
        assert self._live is not None
        try:
            self._live.update(self._picture(), refresh=True)
        except OSError:  # the terminal no longer exists
            self._stop_drawing()

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        shown: list[RenderableType] = []
        for running in self._running.values():
            elapsed, left = now - running.started, running.seconds_left()
            times = f"{duration(elapsed)} so far" + ("" if left is None else f", {duration(left)} left")
            row = Table.grid(padding=(0, 1))
            row.add_row(
                f"stage {self.number(running.stage)} of {len(self.stages)}",
                ProgressBar(width=20, total=None if left is None else elapsed + left, completed=elapsed),
                Text(f"{running.stage.name}: {times}", overflow="ellipsis", no_wrap=True),
            )
            shown.append(row)
            shown += [Text(f"  {line}", "dim", overflow="ellipsis", no_wrap=True) for line in running.progress()]
        shown.append(Text(f"run: {duration(now - self._started)} so far, {self._run_left()}"))
        return Group(*shown)

    def _stop_drawing(self) -> None:
        with self._mutex:
            live, self._live = self._live, None
            if live is None:
                return
            try:
                live.stop()
            except OSError:  # the terminal no longer exists
                return


def run_seconds_left(
    stages: Sequence[Stage],
    manifest: RunManifest,
    left: Mapping[str, float | None],
    elapsed: Mapping[str, float],
) -> tuple[float, bool]:
    """Return the estimated seconds that a run still takes, and whether every stage is part of the estimate.

    A stage takes as long as the last finished one of its kind and name (``iter0/train`` for ``iter1/train``); a running one what
    is ``left`` of it, if it tells, else the rest of that. Both mappings have the running stages: seconds by name.
    """
    known: dict[tuple[int, str], float] = {}
    seconds, is_complete = 0.0, True
    for stage in stages:
        key, record = (id(stage.kind), stage.name.rpartition("/")[2]), manifest.stages.get(stage.name)
        if record is not None and record.state == "done" and stage.name not in left:
            known[key] = record.seconds
    for stage in stages:
        key, record = (id(stage.kind), stage.name.rpartition("/")[2]), manifest.stages.get(stage.name)
        if record is not None and record.state == "done" and stage.name not in left:
            continue
        told = left.get(stage.name)
        if told is None and key not in known:
            is_complete = False
            continue
        seconds += told if told is not None else max(0.0, known[key] - elapsed.get(stage.name, 0.0))
    return seconds, is_complete
