"""The steps every kind of training shares, from a configuration to a saved policy."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say
from spin.alignment.core.files import write_json_atomic
from spin.alignment.models.adapters import add_adapters, merge_adapters
from spin.alignment.models.folder import model_folder
from spin.alignment.models.loading import load_model
from spin.alignment.models.precision import weight_dtypes
from spin.alignment.models.saving import save_checkpoint
from spin.alignment.training.output_dir import OutputFolder
from spin.alignment.training.program import TrainingJob, TrainingProgram
from spin.alignment.training.settings import Settings, make_encoder, read_settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def train(program: TrainingProgram, values: Mapping[str, Any], source: str) -> None:
    """Train with the ``values`` of a configuration file and save the policy; do nothing if the run is already complete.

    Writes to ``output_dir``: ``inputs.json`` first, then the Trainer's checkpoints, the model, and ``metrics.json`` last.

    Raises:
        InputError: bad settings or data; the message names ``source``, the configuration file. No model was loaded.
    """
    # Encoding may fork worker processes, and the tokenizers' threads do not survive a fork.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    settings = read_settings({**program.defaults, **values}, source, program.arguments_class)
    program.check_settings(settings)
    setup_logging(settings.arguments.process_index == 0)
    encoder = make_encoder(settings)
    for remark in encoder.remarks:
        report(settings, remark)
    data = program.load_data(settings, encoder)
    for line in program.describe_data(data):
        report(settings, line)
    folder = model_folder(settings.model.model_name_or_path, settings.model.model_revision)
    program.check_data(settings, data, folder)
    run_job(program, TrainingJob(settings, encoder, data, program.model_key(settings, folder)))


def run_job(program: TrainingProgram, job: TrainingJob) -> None:
    """Load the policy, train it and save it, unless the run is already complete."""
    settings = job.settings
    # Checked before the weights are loaded, so that repeating a complete run is cheap.
    folder = OutputFolder(settings, program.inputs(job))
    if folder.is_complete():
        report(settings, f"{folder.path} is already complete")
        push_policy(settings)  # an earlier upload may have failed
        return
    folder.prepare(settings.arguments.process_index == 0)
    try:
        program.open(settings)
        model, dtypes = load_policy(settings)
        trainer = program.make_trainer(job, model)
        train_policy(program, job, trainer, folder, dtypes)
    finally:
        program.close()


def load_policy(settings: Settings) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load the model to train, with adapters if requested; return it and the dtypes to save it in."""
    from transformers import set_seed

    model = load_model(settings.model, settings.arguments.seed)
    dtypes = weight_dtypes(model)
    if settings.model.use_peft:
        set_seed(settings.arguments.seed)  # the adapters' random initialisation must be the same in every process
        model = add_adapters(model, settings.model)
    return model, dtypes


def save_policy(trainer: Any, settings: Settings, dtypes: dict[str, torch.dtype]) -> None:
    """Save the trained policy as a standalone model, in the precision it was loaded in.

    Sharded weights are gathered and adapters are merged.
    """
    accelerator = trainer.accelerator
    # Outside the condition below: gathering shards is a collective operation.
    state_dict = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model_wrapped)
        if settings.model.use_peft:
            model, state_dict, dtypes = merge_adapters(model, state_dict, settings.model), None, {}
        save_checkpoint(model, trainer.processing_class, settings.output_dir, state_dict, dtypes)
    accelerator.wait_for_everyone()


def push_policy(settings: Settings) -> None:
    """Upload the final model and its metrics to the Hub if ``push_to_hub`` is set; only in the main process."""
    arguments = settings.arguments
    if not settings.push or arguments.process_index != 0:
        return
    from huggingface_hub import HfApi

    api = HfApi(token=arguments.hub_token)
    name = arguments.hub_model_id or settings.output_dir.name
    repository = api.create_repo(name, private=arguments.hub_private_repo, exist_ok=True).repo_id
    api.upload_folder(
        repo_id=repository,
        folder_path=settings.output_dir,
        revision=arguments.hub_revision,
        ignore_patterns=["checkpoint-*", "reference/*", ".*"],  # only needed to resume
        commit_message="Trained by selfplay-spin",
    )
    report(settings, f"pushed {settings.output_dir} to {repository}")


def train_policy(
    program: TrainingProgram, job: TrainingJob, trainer: Any, folder: OutputFolder, dtypes: dict[str, Any]
) -> None:
    """Train from the last checkpoint, if any, save the policy, and write ``metrics.json`` last."""
    settings = job.settings
    started = time.monotonic()
    resume = folder.resume_point()
    if resume:
        report(settings, f"resuming from {resume}")
    result = trainer.train(resume_from_checkpoint=resume)
    final = trainer.evaluate() if trainer.eval_dataset is not None else {}
    seconds = time.monotonic() - started
    save_policy(trainer, settings, dtypes)
    if trainer.accelerator.is_main_process:
        history = trainer.state.log_history
        logged = [entry for entry in history if "loss" in entry]
        metrics = {
            "train_loss": result.training_loss,
            "steps": trainer.state.global_step,
            "seconds": round(seconds, 2),
            **program.metrics(job, trainer, result),
            "final": (logged[-1] if logged else {}) | final,
            "history": history,
        }
        write_json_atomic(folder.path / "metrics.json", metrics)
    report(settings, f"wrote {folder.path}")
    push_policy(settings)
    leave(trainer)


def leave(trainer: Any) -> None:
    """Wait for all processes and close the process group: threads of an open group can abort a process as it exits."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def setup_logging(is_main: bool) -> None:
    """Log one plain line per message, in the main process only, without progress bars for loading and saving."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    for name in ("datasets", "transformers", "accelerate", "httpx", "deepspeed", "DeepSpeed", "trl"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main else logging.ERROR)


def report(settings: Settings, sentence: str) -> None:
    """Print one sentence for the user, in the main process only."""
    if settings.arguments.process_index == 0:
        say(sentence)
