"""One turn of ``async_online.py``: an online training that records its clocks at the end of every step.

python -m benchmarks.async_online_steps CONFIG TIMES.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from spin.alignment.core.config import load_config
from spin.alignment.core.files import write_json_atomic
from spin.alignment.core.program import run_program
from spin.alignment.training.online.run import OnlineTraining
from spin.alignment.training.run import train


class Clocks(TrainerCallback):
    """Writes the clocks to a file when the training ends: wall, processor, and the time that sending the weights took so far."""

    def __init__(self, path: Path, sampler: Any) -> None:
        self.path = path
        self.ends: list[dict[str, float]] = []
        self.sending = 0.0
        self._refresh, sampler.refresh = sampler.refresh, self.refresh

    def refresh(self) -> None:
        started = time.monotonic()
        self._refresh()
        self.sending += time.monotonic() - started

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.ends.append({"wall": time.monotonic(), "processor": time.process_time(), "sending": self.sending})

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        write_json_atomic(self.path, self.ends)


class TimedTraining(OnlineTraining):
    """The program's own training, with clocks."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def make_trainer(self, job: Any, model: Any) -> Any:
        trainer = super().make_trainer(job, model)
        trainer.add_callback(Clocks(self.path, trainer.sampler))
        return trainer


def main(arguments: Sequence[str]) -> None:
    config, times = arguments
    train(TimedTraining(Path(times)), load_config(config, []), config)


if __name__ == "__main__":
    run_program(main, sys.argv[1:])
