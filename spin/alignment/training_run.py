"""What every training program shares: its settings, whether its output is there already, where to resume, and saving."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.configs import DataConfig, ModelConfig, build, rename_keys, split_config
from spin.alignment.errors import InputError
from spin.alignment.model_utils import (
    add_adapters,
    check_model_path,
    is_complete_checkpoint,
    keep_master_weights,
    load_model,
    merge_adapters,
    save_checkpoint,
    weight_dtypes,
)
from spin.alignment.shards import read_json, write_json_atomic

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from spin.alignment.chat import ChatEncoder

# Settings that change neither the weights nor the numbers reported.
_WITHOUT_EFFECT = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "reference_dir",
    "score_cache",
    "max_tokens_per_batch",
    "log_level",
    "logging_steps",
    "report_to",
    "disable_tqdm",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "preprocessing_num_workers",
    "push_to_hub",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
    "hub_token",
)


@dataclass(frozen=True)
class Settings:
    """The settings of one training program, checked."""

    values: dict[str, Any]
    model: ModelConfig
    data: DataConfig
    arguments: Any
    overwrite: bool
    push: bool = False

    @property
    def output_dir(self) -> Path:
        return Path(self.arguments.output_dir)


def read_settings(values: Mapping[str, Any], source: str, arguments_class: type) -> Settings:
    """Distribute a flat mapping over ModelConfig, DataConfig and a TrainingArguments class.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, incompatible values, or a missing model.
    """
    values = rename_keys(values, source)
    rest = {key: value for key, value in values.items() if key != "overwrite_output_dir"}
    model_values, data_values, training_values = split_config(rest, (ModelConfig, DataConfig, arguments_class), source)
    if not values.get("output_dir"):
        raise InputError(f"{source} lacks the key 'output_dir': name the folder of the new checkpoint")
    model = build(ModelConfig, model_values, source)
    data = build(DataConfig, data_values, source)
    if not data.dataset_mixer:
        raise InputError(f"{source} lacks the key 'dataset_mixer': write at least one 'path: fraction' line under it")
    check_model_path(model.model_name_or_path, needs_weights=not model.init_from_config)
    skip_unused_deepspeed_build()
    try:
        arguments: Any = build(arguments_class, {"report_to": "none", **training_values}, source)
    except InputError:
        raise
    except (ValueError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the training settings in {source} do not fit together or this machine: {reason}") from error
    import huggingface_hub
    import torch

    if arguments.fp16 and not torch.cuda.is_available():
        raise InputError("fp16 is true, but there is no GPU here: set bf16 to true, or neither")
    if model.load_in_4bit and arguments.fsdp:
        raise InputError("load_in_4bit does not work with FSDP here: use DeepSpeed ZeRO-2 or a single process")
    push = arguments.push_to_hub
    if push and values.get("hub_strategy", "end") != "end":
        raise InputError(
            f"hub_strategy is {values['hub_strategy']}, but the finished model alone is pushed: set it to end"
        )
    if push and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError("push_to_hub is true, but HF_HUB_OFFLINE is set: unset one of them")
    arguments.push_to_hub = (
        False  # the Trainer would mix its checkpoints into output_dir; push_policy does it at the end
    )
    return Settings(values, model, data, arguments, bool(values.get("overwrite_output_dir", False)), push)


def skip_unused_deepspeed_build() -> None:
    """Keep DeepSpeed on a CPU from compiling its shared-memory all-reduce as the process group is made.

    Only its inference engine calls it. The build is guarded by a lock file in the user's cache that a killed process leaves
    behind, and every later start waits for that file to vanish, for ever.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_encoder(settings: Settings) -> ChatEncoder:
    """Return the encoder of the model to train.

    Raises:
        InputError: there is no tokenizer, or it has no usable chat template.
    """
    from spin.alignment.chat import ChatEncoder, load_tokenizer

    model = settings.model
    tokenizer = load_tokenizer(model.model_name_or_path, model.model_revision, model.trust_remote_code)
    return ChatEncoder(tokenizer, settings.data.system)


def inputs_record(settings: Settings, opponent: str, data: str) -> dict[str, Any]:
    """Return what decides the result of a training: weights, data and settings, by hash or value."""
    kept = {key: value for key, value in settings.values.items() if key not in _WITHOUT_EFFECT}
    processes = {"processes": settings.arguments.world_size} if settings.arguments.world_size > 1 else {}
    record = {"model": opponent, "data": data, **processes, **kept}
    return json.loads(json.dumps(record, default=str, sort_keys=True))


class OutputFolder:
    """The output folder of a training: ``inputs.json`` first, checkpoints on the way, the model and metrics.json last."""

    def __init__(self, settings: Settings, inputs: dict[str, Any]) -> None:
        self.path, self.inputs, self.overwrite = settings.output_dir, inputs, settings.overwrite
        self.resume = settings.arguments.resume_from_checkpoint
        self.weights_only = settings.arguments.save_only_model

    def is_complete(self) -> bool:
        """Return whether the training is done already.

        Raises:
            InputError: the folder holds the model or the checkpoints of another training.
        """
        record = self.path / "inputs.json"
        if self.overwrite:
            return False
        if not record.exists():
            if self.path.is_dir() and is_complete_checkpoint(self.path):
                raise InputError(
                    f"output_dir {self.path} holds a model of unknown origin: choose another, or set overwrite_output_dir"
                )
            return False
        found = read_json(record)
        changed = [key for key in {**found, **self.inputs} if found.get(key) != self.inputs.get(key)]
        if changed:
            raise InputError(
                f"output_dir {self.path} belongs to another training ({', '.join(sorted(changed))} differ): choose another, or "
                "set overwrite_output_dir: true"
            )
        return is_complete_checkpoint(self.path) and (self.path / "metrics.json").exists()

    def prepare(self, is_main: bool) -> None:
        """Record what is about to be trained; an overwritten folder loses its checkpoints."""
        if not is_main:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot make output_dir {self.path} ({error.strerror}): choose a folder you may write to"
            ) from error
        if self.overwrite:
            for folder in self.path.glob("checkpoint-*"):
                shutil.rmtree(folder)
            for name in ("metrics.json", "config.json"):  # without a config the old model counts as incomplete
                (self.path / name).unlink(missing_ok=True)
        for torn in self._checkpoints(complete=False):
            shutil.rmtree(torn)
        write_json_atomic(self.path / "inputs.json", self.inputs)

    def resume_point(self) -> str | None:
        """Return the checkpoint to go on from: the one asked for, else the last complete one, else none.

        Raises:
            InputError: the checkpoint asked for is not there or not complete.
        """
        wanted = self.resume
        if wanted not in (None, True, "true", "True", False, "false", "False"):
            if not (Path(wanted) / "trainer_state.json").is_file():
                raise InputError(
                    f"resume_from_checkpoint {wanted} is not a complete checkpoint: name a checkpoint-N folder"
                )
            return str(wanted)
        if wanted in (False, "false", "False"):
            return None
        found = self._checkpoints(complete=True)
        if found and self.weights_only:
            raise InputError(
                f"{found[-1]} was saved with save_only_model, so the training cannot go on exactly: set "
                "overwrite_output_dir: true to start again"
            )
        return str(found[-1]) if found else None

    def _checkpoints(self, complete: bool) -> list[Path]:
        # The Trainer writes trainer_state.json last: it proves that a checkpoint is whole.
        found = [path for path in self.path.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
        chosen = [path for path in found if _is_json(path / "trainer_state.json") == complete]
        return sorted(chosen, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def load_policy(settings: Settings) -> tuple[PreTrainedModel, dict[str, torch.dtype]]:
    """Load the model to train, with adapters when asked for; return it and the dtypes it is to be saved in.

    Under ``bf16`` or ``fp16`` the trained weights are kept in float32 (DeepSpeed does so itself, in shards).
    """
    from transformers import set_seed

    model = load_model(settings.model, settings.arguments.seed)
    dtypes = weight_dtypes(model)
    arguments = settings.arguments
    if settings.model.use_peft:
        set_seed(arguments.seed)  # the adapters' random start, the same in every process
        model = add_adapters(model, settings.model)
    if arguments.deepspeed_plugin is not None:
        return model, dtypes
    if arguments.bf16 or arguments.fp16:
        keep_master_weights(model)
    if any(parameter.dtype.itemsize < 4 for parameter in model.parameters() if parameter.requires_grad):
        report(
            settings,
            "warning: the trained weights have 16 bits and no float32 copy, so steps below about 0.4% of a weight are lost: "
            "set bf16: true (mixed precision) or dtype: float32",
        )
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
