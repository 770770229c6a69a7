"""What every training program shares: its settings, its model, where to resume, and saving."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spin.alignment.core.files import write_json_atomic
from spin.alignment.models.adapters import add_adapters, merge_adapters
from spin.alignment.models.loading import load_model
from spin.alignment.models.precision import weight_dtypes
from spin.alignment.models.saving import save_checkpoint
from spin.alignment.training.output_dir import OutputFolder
from spin.alignment.training.settings import Settings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_policy(settings: Settings) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load the model to train, with adapters when asked for; return it and the dtypes it is to be saved in."""
    from transformers import set_seed

    model = load_model(settings.model, settings.arguments.seed)
    dtypes = weight_dtypes(model)
    if settings.model.use_peft:
        set_seed(settings.arguments.seed)  # the adapters' random start, the same in every process
        model = add_adapters(model, settings.model)
    return model, dtypes


def save_policy(trainer: Any, settings: Settings, dtypes: dict[str, torch.dtype]) -> None:
    """Save the trained policy as a model that loads by itself, in the precision it was loaded in.

    Sharded weights are gathered, adapters merged.
    """
    accelerator = trainer.accelerator
    state_dict = accelerator.get_state_dict(trainer.model_wrapped)
    if accelerator.is_main_process:
        model = accelerator.unwrap_model(trainer.model_wrapped)
        if settings.model.use_peft:
            model, state_dict, dtypes = merge_adapters(model, state_dict, settings.model), None, {}
        save_checkpoint(model, trainer.processing_class, settings.output_dir, state_dict, dtypes)
    accelerator.wait_for_everyone()


def push_policy(settings: Settings) -> None:
    """Upload the finished model and its metrics to the Hub when ``push_to_hub`` asks for it; the main process alone."""
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
        ignore_patterns=["checkpoint-*", "reference/*", ".*"],
        commit_message="Trained by selfplay-spin",
    )
    report(settings, f"pushed {settings.output_dir} to {repository}")


def train_policy(
    trainer: Any,
    folder: OutputFolder,
    settings: Settings,
    dtypes: dict[str, Any],
    describe: Callable[[Any], dict[str, Any]],
) -> None:
    """Train from where the folder stands, save the policy, and write metrics.json last.

    ``describe(result)`` adds what only this program knows to the metrics; it is called in the main process.
    """
    started = time.monotonic()
    resume = folder.resume_point()
    if resume:
        report(settings, f"going on from {resume}")
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
            **describe(result),
            "final": (logged[-1] if logged else {}) | final,
            "history": history,
        }
        write_json_atomic(folder.path / "metrics.json", metrics)
    report(settings, f"wrote {folder.path}")
    push_policy(settings)
    leave(trainer)


def leave(trainer: Any) -> None:
    """Wait for all processes and close their group: threads of a group left open can abort a process at its exit."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def setup_logging(is_main: bool) -> None:
    """Let the main process alone talk, one plain line a message; the short bars of loading and saving stay off."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    logging.basicConfig(level=logging.INFO if is_main else logging.ERROR, format="%(message)s")
    for name in ("datasets", "transformers", "accelerate", "httpx", "deepspeed", "DeepSpeed", "trl"):
        logging.getLogger(name).setLevel(logging.WARNING if is_main else logging.ERROR)


def report(settings: Settings, sentence: str) -> None:
    """Let the main process say one sentence to the person who started the program."""
    if settings.arguments.process_index == 0:
        sys.stdout.write(f"{sentence}\n")
        sys.stdout.flush()
