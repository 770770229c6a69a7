"""The output folder of a training run: inputs first, the model and metrics.json last."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list

from spin.alignment.core.checked_json import read_checked_json, write_checked_json
from spin.alignment.core.console import say_error
from spin.alignment.core.content_hash import HASHES_FILE, damaged_file, lacks_hashes
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import read_json
from spin.alignment.models.folder import is_complete_checkpoint
from spin.alignment.models.weights_check import read_header
from spin.alignment.training.live_step import PROGRESS_FILE
from spin.alignment.training.settings import INPUTS_FILE, Settings, without_paths
from spin.alignment.training.trackers.base import RECORD_FILE
from spin.alignment.training.watched_steps import SUMS_FILE, are_sums

if TYPE_CHECKING:
    from accelerate import Accelerator

# Where the Trainer's checkpoints are once the model is complete, so that its folder contains the model and its records only.
KEPT_CHECKPOINTS = "checkpoints"


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
        found = self._recorded(record)
        changed = [key for key in {**found, **self.inputs} if found.get(key) != self.inputs.get(key)]
        if changed:
            raise InputError(
                f"output_dir {self.path} belongs to another training run ({', '.join(sorted(changed))} differ): choose another, "
                "or set overwrite_output_dir: true"
            )
        return is_complete_checkpoint(self.path) and (self.path / "metrics.json").exists()

    def _recorded(self, record: Path) -> dict[str, Any]:
        """Return the inputs of the run that the folder belongs to.

        Raises:
            InputError: the record is damaged, so that this is unknown.
        """
        return without_paths(
            read_checked_json(
                record,
                "it says which training run the folder belongs to, so restore it; or remove it if the checkpoints there are "
                "certainly of this run; or set overwrite_output_dir: true",
            )
        )

    def prepare(self, is_main: bool) -> None:
        """Record the inputs of the run and bring back checkpoints that were put away; with ``overwrite``, delete them all."""
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot create output_dir {self.path} ({error.strerror}): choose a folder you can write to"
            ) from error
        # A training whose model was damaged or removed goes on from them, and finds them where it wrote them.
        if KEPT_CHECKPOINTS not in Path(str(self.resume)).parts:  # else one of them is named as the one to resume from
            _move_checkpoints(self.path / KEPT_CHECKPOINTS, self.path)
        if self.overwrite:
            # Also those set aside as damaged.
            for pattern in ("checkpoint-*", f"{KEPT_CHECKPOINTS}/checkpoint-*", "failed-step-*"):
                for folder in self.path.glob(pattern):
                    shutil.rmtree(folder)
            # Without a config the old model counts as incomplete.
            for name in ("metrics.json", "config.json", PROGRESS_FILE, RECORD_FILE):
                (self.path / name).unlink(missing_ok=True)
        # The Trainer would take an incomplete checkpoint for its latest one.
        for torn in self._checkpoints(complete=False):
            shutil.rmtree(torn)
        write_checked_json(self.path / INPUTS_FILE, self.inputs)

    def put_checkpoints_away(self) -> None:
        """Move the Trainer's checkpoints to ``checkpoints/``, once the model and ``metrics.json`` are written. Only in the main
        process; repeating it does nothing."""
        _move_checkpoints(self.path, self.path / KEPT_CHECKPOINTS)

    def resume_point(self, accelerator: Accelerator) -> str | None:
        """Return the checkpoint to resume from: the requested one, else the last whole one, else None.

        Its content is compared with the hashes that were written with it; damaged checkpoints are set aside, which is said.
        The main process decides for all: every process must call it.

        Raises:
            InputError: the requested checkpoint is missing, incomplete or damaged.
        """
        found: list[Any] = [None, ""]
        if accelerator.is_main_process:
            try:
                found[0] = self._resume_point()
            except InputError as error:  # raised in every process, none of which may wait for the others
                found[1] = str(error)
        point, refusal = broadcast_object_list(found)
        if refusal:
            raise InputError(refusal)
        return point

    def _resume_point(self) -> str | None:
        wanted = self.resume
        if check_resume_point(wanted):
            if name := damaged_part(Path(str(wanted))):
                raise InputError(
                    f"resume_from_checkpoint {wanted} is damaged ({name}): restore it, or name another checkpoint"
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
        while found:
            name = damaged_part(found[-1])
            if name is None:
                return str(found[-1])
            damaged = found.pop()
            instead = f"resuming from {found[-1].name}" if found else "starting over"
            say_error(f"{damaged} is damaged ({name}) and set aside as {_set_aside(damaged).name}: {instead}")
        return None

    def after_full_disk(self) -> Path | None:
        """Remove checkpoints that were not finished, which would keep the disk full; return the last complete one."""
        for torn in self._checkpoints(complete=False):
            shutil.rmtree(torn, ignore_errors=True)
        found = self._checkpoints(complete=True)
        return found[-1] if found else None

    def _checkpoints(self, complete: bool) -> list[Path]:
        folders = (path for path in self.path.glob("checkpoint-*") if path.is_dir())
        found = [path for path in folders if path.name.removeprefix("checkpoint-").isdigit()]
        chosen = [path for path in found if _was_completed(path) == complete]
        return sorted(chosen, key=lambda path: int(path.name.removeprefix("checkpoint-")))  # 9 before 10


def _move_checkpoints(source: Path, target: Path) -> None:
    """Move the folders ``checkpoint-*``, also those set aside as damaged; ``checkpoints/`` exists only while it has any."""
    found = [path for path in sorted(source.glob("checkpoint-*")) if path.is_dir()]
    if found:
        target.mkdir(exist_ok=True)
    for path in found:
        if (target / path.name).exists():  # of an earlier training in this folder
            shutil.rmtree(target / path.name)
        path.replace(target / path.name)
    if source.name == KEPT_CHECKPOINTS and source.is_dir() and not any(source.iterdir()):
        source.rmdir()


def check_resume_point(wanted: str | bool | None) -> bool:
    """Return whether a certain checkpoint is to be resumed from.

    Raises:
        InputError: that checkpoint is missing or incomplete.
    """
    if wanted in (None, True, "true", "True", False, "false", "False"):
        return False
    if not (Path(str(wanted)) / "trainer_state.json").is_file():
        raise InputError(f"resume_from_checkpoint {wanted} is not a complete checkpoint: name a checkpoint-N folder")
    return True


def damaged_part(checkpoint: Path) -> str | None:
    """Return which file of a checkpoint is damaged; None if all are whole.

    A checkpoint without hashes (of an earlier version) is checked as far as its files allow: the headers and sizes of
    safetensors, the syntax of JSON, and the checksums in the files of torch.save.
    """
    if (checkpoint / HASHES_FILE).exists():
        return damaged_file(checkpoint)
    for path in sorted(checkpoint.rglob("*")):
        try:
            if path.suffix == ".safetensors":
                read_header(path)
            elif path.suffix == ".json":
                content = read_json(path)
                if not isinstance(content, dict) or (path.name == SUMS_FILE and not are_sums(content)):
                    return path.name
            elif path.suffix in (".pt", ".pth", ".bin") and path.name != "training_args.bin":
                with zipfile.ZipFile(path) as file:
                    if file.testzip() is not None:
                        return path.name
        except (InputError, OSError, zipfile.BadZipFile, RuntimeError, ValueError):
            return path.name
    return None


def _set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint, so that neither the Trainer nor a later run takes it for one; return its new path."""
    aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
    if aside.exists():
        shutil.rmtree(aside)
    return checkpoint.rename(aside)


def _was_completed(checkpoint: Path) -> bool:
    """Return whether all of a checkpoint was written, damaged since or not: the hashes come last."""
    if (checkpoint / HASHES_FILE).exists():
        return not lacks_hashes(checkpoint)
    try:
        read_json(checkpoint / "trainer_state.json")
    except InputError:
        return False
    return True
