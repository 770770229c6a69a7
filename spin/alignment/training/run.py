"""The steps every kind of training shares, from a configuration to a saved policy."""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.allocator import keep_freed_memory
from spin.alignment.core.console import marked, say
from spin.alignment.core.errors import InputError
from spin.alignment.core.files import is_disk_full, share_files, write_json_atomic
from spin.alignment.core.machine import peak_memory
from spin.alignment.core.upload import push
from spin.alignment.models.adapters import add_adapters
from spin.alignment.models.folder import model_folder, published_model
from spin.alignment.models.loading import load_model
from spin.alignment.models.precision import is_faster_in_bfloat16, training_dtype
from spin.alignment.models.vocabulary import check_control_tokens
from spin.alignment.models.weights_check import check_model
from spin.alignment.training.card import write_model_card
from spin.alignment.training.check_settings import check_model_settings, checked_settings
from spin.alignment.training.live_step import remove_live_step
from spin.alignment.training.output_dir import OutputFolder
from spin.alignment.training.program import TrainingJob, TrainingProgram
from spin.alignment.training.reporting import attach_trackers, tracked
from spin.alignment.training.select_best import selection
from spin.alignment.training.settings import Settings, make_encoder
from spin.alignment.training.step_reports import StepReports
from spin.alignment.training.trained_policy import MasterWeights, save_policy

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train(program: TrainingProgram, values: Mapping[str, Any], source: str) -> None:
    """Train with the ``values`` of a configuration file and save the policy; do nothing if the run is already complete.

    Writes to ``output_dir``: ``inputs.json`` first, then the Trainer's checkpoints, the model, its card, and
    ``metrics.json`` last.

    Raises:
        InputError: bad settings or data; the message names ``source``, the configuration file. No model was loaded.
    """
    # Encoding may fork worker processes, and the tokenizers' threads do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = checked_settings(program, values, source)
    check_model_settings(settings.model, source)
    setup_logging(settings.arguments.process_index == 0)
    if settings.arguments.device.type == "cpu":
        keep_freed_memory()
    folder = model_folder(settings.model.model_name_or_path, settings.model.model_revision)
    model_config = check_model(
        folder,
        trust_remote_code=settings.model.trust_remote_code,
        needs_weights=not settings.model.init_from_config,
    )
    encoder = make_encoder(settings)
    check_control_tokens(encoder, model_config, settings.model.model_name_or_path)
    for remark in (*encoder.remarks, *precision_remarks(settings, folder)):
        report(settings, remark)
    data = program.load_data(settings, encoder)
    for line in program.describe_data(data):
        report(settings, line)
    program.check_data(settings, data, folder)
    run_job(program, TrainingJob(settings, encoder, data, program.model_key(settings, folder)))


def precision_remarks(settings: Settings, folder: Path) -> list[str]:
    """Return what there is to say about training in float32 on a CPU that is faster in bfloat16: one sentence or none."""
    arguments = settings.arguments
    if arguments.bf16 or arguments.fp16 or settings.model.dtype == "bfloat16" or not is_faster_in_bfloat16(folder):
        return []
    return [
        "training computes in float32; this CPU is faster in bfloat16, with the weights still in float32 (bf16: true)"
    ]


@contextlib.contextmanager
def explain_full_disk(folder: OutputFolder) -> Iterator[None]:
    """Turn a write that failed for lack of space into one sentence, and remove the unfinished checkpoint.

    Raises:
        InputError: the disk is full; the checkpoints that were complete are unchanged.
    """
    try:
        yield
    except Exception as error:
        if not is_disk_full(error):
            raise
        kept = folder.after_full_disk()
        raise InputError(
            f"no space left on the disk while training in {folder.path}: free some and run the same command again, which "
            + (f"resumes from {kept}" if kept else "starts from the beginning")
        ) from error


def run_job(program: TrainingProgram, job: TrainingJob) -> None:
    """Load the policy, train it and save it, unless the run is already complete."""
    settings = job.settings
    # Checked before the weights are loaded, so that repeating a complete run is cheap.
    folder = OutputFolder(settings, program.inputs(job))
    if folder.is_complete():
        if settings.arguments.process_index == 0:
            folder.put_checkpoints_away()  # unless that is done: the process may have been killed before
        report(settings, f"{folder.path} is already complete")
        push_policy(settings)  # an earlier upload may have failed
        return
    folder.prepare(settings.arguments.process_index == 0)
    try:
        with explain_full_disk(folder), tracked(settings):
            program.open(settings)
            trainer = program.make_trainer(job, load_policy(settings))
            attach_trackers(trainer, settings)
            if settings.arguments.deepspeed_plugin is not None and not settings.model.init_from_config:
                start = model_folder(settings.model.model_name_or_path, settings.model.model_revision)
                trainer.add_callback(MasterWeights(trainer, start))
            train_policy(program, job, trainer, folder)
    finally:
        program.close()


def load_policy(settings: Settings) -> PreTrainedModel:
    """Load the model to train, with adapters if requested, in the precision in which its weights are trained."""
    from transformers import set_seed

    dtype = training_dtype(settings.model.dtype, settings.arguments, settings.model.use_peft)
    model = load_model(replace(settings.model, dtype=dtype), settings.arguments.seed)
    if settings.model.use_peft:
        set_seed(settings.arguments.seed)  # the adapters' random initialisation must be the same in every process
        model = add_adapters(model, settings.model)
    return model


def push_policy(settings: Settings) -> None:
    """Upload the final model and its metrics to the Hub if ``push_to_hub`` is set; only in the main process."""
    arguments = settings.arguments
    if not settings.push or arguments.process_index != 0:
        return
    repository = push(
        published_model(settings.output_dir),
        arguments.hub_model_id or settings.output_dir.name,
        arguments.hub_private_repo,
        settings.hub_token,
        arguments.hub_revision,
    )
    report(settings, f"pushed {settings.output_dir} to {repository}")


def train_policy(program: TrainingProgram, job: TrainingJob, trainer: Any, folder: OutputFolder) -> None:
    """Train from the last checkpoint, if any, save the policy, and write ``metrics.json`` last."""
    settings = job.settings
    started = time.monotonic()
    resume = folder.resume_point(trainer.accelerator)
    if resume:
        report(settings, f"resuming from {resume}")
    trainer.add_callback(shared_checkpoints())
    trainer.add_callback(StepReports(trainer, folder.path))  # after the callbacks that prepare the first step
    result = trainer.train(resume_from_checkpoint=resume)
    evaluates = trainer.eval_dataset is not None and settings.evaluates_at_the_end
    final = trainer.evaluate() if evaluates else {}
    seconds = time.monotonic() - started
    train_loss = trainer.mean_loss()  # result.training_loss leaves out the steps before a resume
    for found in selection(trainer).values():
        report(
            settings, f"saving the weights of step {found['step']}: {found['metric']} {found['value']:.4f} is the best"
        )
    saved = save_policy(trainer, settings)
    if trainer.accelerator.is_main_process:
        # The Trainer's own mean, in its last entry, leaves out the steps before a resume.
        history = [
            entry | {"train_loss": train_loss} if "train_loss" in entry else entry
            for entry in trainer.state.log_history
        ]
        logged = [entry for entry in history if "loss" in entry]
        metrics = {
            "train_loss": train_loss,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 2),
            "peak_memory": peak_memory(),
            **program.metrics(job, trainer, result),
            **saved,
            **selection(trainer),
            "final": (logged[-1] if logged else {}) | final,
            "history": history,
        }
        write_model_card(program, job, metrics)
        remove_live_step(folder.path)  # first: a complete training has none
        write_json_atomic(folder.path / "metrics.json", metrics)
        folder.put_checkpoints_away()
    report(settings, f"wrote {folder.path}")
    push_policy(settings)
    leave(trainer)


def shared_checkpoints() -> Any:
    """Return the callback that gives the files of the Trainer's checkpoints the mode that the umask says."""
    from transformers import TrainerCallback

    class SharedCheckpoints(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if args.should_save:
                share_files(Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return SharedCheckpoints()


def leave(trainer: Any) -> None:
    """Wait for all processes and close the process group: threads of an open group can abort a process as it exits."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def setup_logging(is_main: bool) -> None:
    """Log one plain line per message, in the main process only, without progress bars for loading and saving."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    handler = logging.StreamHandler()
    handler.setFormatter(PlainLines())
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, handlers=[handler])
    for name in ("datasets", "transformers", "accelerate", "httpx", "deepspeed", "DeepSpeed", "trl"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main else logging.ERROR)


class PlainLines(logging.Formatter):
    """Formats a message as it is; those of this project are marked as its own."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return marked(text) if record.name.partition(".")[0] == "spin" else text


def report(settings: Settings, sentence: str) -> None:
    """Print one sentence for the user, in the main process only."""
    if settings.arguments.process_index == 0:
        say(sentence)
