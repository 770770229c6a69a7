"""The live step of a running training: a small file beside its output, read by `spin status`, `spin run` and `spin serve`."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, remove_leftovers, replace_text
from spin.alignment.core.machine import has_ended, process_record
from spin.alignment.core.text import duration

PROGRESS_FILE = "progress.json"


@dataclass(frozen=True)
class LiveStep:
    """Where a training is: ``step`` of ``steps``, with what it last logged. None: not known yet.

    ``loss`` and ``margin`` (nats) are the last logged averages, ``seconds_left`` the estimated time to the last step, and
    ``memory`` the peak of the main process in GiB, of the host and of its GPU. ``process`` is that of :func:`process_record`.
    """

    step: int
    steps: int
    loss: float | None = None
    margin: float | None = None
    tokens_per_second: float | None = None
    seconds_left: float | None = None
    memory: Mapping[str, float] = field(default_factory=dict)
    process: Mapping[str, str | int | None] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        """Whether the process that wrote it is known to have ended."""
        return has_ended(self.process)

    def describe(self) -> str:
        """Return it as one line: ``step 120 of 500, loss 0.412, margin 1.23, 3,410 tokens/s, 4.1 GiB``."""
        parts = [f"step {self.step:,} of {self.steps:,}"]
        parts += [f"loss {self.loss:.4g}"] if self.loss is not None else []
        parts += [f"margin {self.margin:.3g}"] if self.margin is not None else []
        parts += [f"{self.tokens_per_second:,.0f} tokens/s"] if self.tokens_per_second is not None else []
        used = self.memory.get("gpu", self.memory.get("host"))
        return ", ".join([*parts, *([f"{used:.1f} GiB"] if used is not None else [])])

    def describe_with_time(self) -> str:
        """Return :meth:`describe` and the time left."""
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        return self.describe() + left


def write_live_step(folder: Path, live: LiveStep) -> None:
    """Replace the report of this process; one that cannot be written (a full disk) is left out."""
    with contextlib.suppress(OSError):
        replace_text(folder / PROGRESS_FILE, json.dumps({**asdict(live), "process": process_record()}) + "\n")


def remove_live_step(folder: Path) -> None:
    """Remove the report of a training that is complete, and what a killed one left of it."""
    (folder / PROGRESS_FILE).unlink(missing_ok=True)
    remove_leftovers(folder / PROGRESS_FILE)


def read_live_step(folder: Path) -> LiveStep | None:
    """Return the last report of a training that is running or was interrupted; None if there is none, or it is damaged."""
    try:
        live = LiveStep(**read_json(folder / PROGRESS_FILE))
        numbers = (live.step, live.steps, live.loss, live.margin, live.tokens_per_second, live.seconds_left)
        is_sound = all(value is None or math.isfinite(value) for value in numbers) and "pid" in live.process
    except (InputError, TypeError):  # of another version, or not a report
        return None
    return live if is_sound else None
