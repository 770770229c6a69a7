"""The output folder of a training run: inputs first, the model and metrics.json last."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json, write_json_atomic
from spin.alignment.models.folder import is_complete_checkpoint
from spin.alignment.training.settings import INPUTS_FILE, Settings


class OutputFolder:
    """The output folder of a training run: ``inputs.json`` first, then checkpoints, the model, and ``metrics.json`` last."""

    def __init__(self, settings: Settings, inputs: dict[str, Any]) -> None:
        self.path, self.inputs, self.overwrite = settings.output_dir, inputs, settings.overwrite
        self.resume = settings.output.resume_from_checkpoint
        self.weights_only = settings.arguments.save_only_model

    def is_complete(self) -> bool:
        """Return whether the run is already complete.

        Raises:
            InputError: the folder contains the model or the checkpoints of a different run.
        """
        record = self.path / INPUTS_FILE
        if self.overwrite:
            return False
        if not record.exists():
            if self.path.is_dir() and is_complete_checkpoint(self.path):
                raise InputError(
                    f"output_dir {self.path} contains a model of unknown origin: choose another, or set overwrite_output_dir"
                )
            return False
        # Keys of both records: one that was added or removed is a change as well.
        found = read_json(record)
        changed = [key for key in {**found, **self.inputs} if found.get(key) != self.inputs.get(key)]
        if changed:
            raise InputError(
                f"output_dir {self.path} belongs to another training run ({', '.join(sorted(changed))} differ): choose another, "
                "or set overwrite_output_dir: true"
            )
        return is_complete_checkpoint(self.path) and (self.path / "metrics.json").exists()

    def prepare(self, is_main: bool) -> None:
        """Record the inputs of the run; with ``overwrite``, delete the old checkpoints."""
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot create output_dir {self.path} ({error.strerror}): choose a folder you can write to"
            ) from error
        if self.overwrite:
            for folder in self.path.glob("checkpoint-*"):
                shutil.rmtree(folder)
            for name in ("metrics.json", "config.json"):  # without a config the old model counts as incomplete
                (self.path / name).unlink(missing_ok=True)
        # The Trainer would take an incomplete checkpoint for its latest one.
        for torn in self._checkpoints(complete=False):
            shutil.rmtree(torn)
        write_json_atomic(self.path / INPUTS_FILE, self.inputs)

    def resume_point(self) -> str | None:
        """Return the checkpoint to resume from: the requested one, else the last complete one, else None.

        Raises:
            InputError: the requested checkpoint is missing or incomplete.
        """
        wanted = self.resume
        if wanted not in (None, True, "true", "True", False, "false", "False"):
            if not (Path(str(wanted)) / "trainer_state.json").is_file():
                raise InputError(
                    f"resume_from_checkpoint {wanted} is not a complete checkpoint: name a checkpoint-N folder"
                )
            return str(wanted)
        if wanted in (False, "false", "False"):
            return None
        found = self._checkpoints(complete=True)
        if found and self.weights_only:
            raise InputError(
                f"{found[-1]} was saved with save_only_model, so training cannot resume exactly: set "
                "overwrite_output_dir: true to start over"
            )
        return str(found[-1]) if found else None

    def _checkpoints(self, complete: bool) -> list[Path]:
        # The Trainer writes trainer_state.json last: it proves that a checkpoint is complete.
        found = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        chosen = [path for path in found if _is_json(path / "trainer_state.json") == complete]
        return sorted(chosen, key=lambda path: int(path.name.removeprefix("checkpoint-")))  # 9 before 10


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
