"""The settings of a training program: parsing, checks, and the record of those that determine the result."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.config import build, split_config
from spin.alignment.core.errors import InputError
from spin.alignment.core.resolve import module_record
from spin.alignment.core.settings import declaration_of, settings_of
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import check_model_path
from spin.alignment.training.keys import OutputConfig
from spin.alignment.training.renamed_keys import rename_keys

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

INPUTS_FILE = "inputs.json"
# Keys of transformers that affect neither the weights nor the metrics; the project's own keys declare this themselves.
_WITHOUT_EFFECT = (
    "log_level",
    "report_to",
    "disable_tqdm",
    "save_steps",
    "save_total_limit",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
    "hub_token",
)


@dataclass(frozen=True)
class Settings:
    """The validated settings of one training program."""

    values: dict[str, Any]
    model: ModelConfig
    data: DataConfig
    arguments: Any
    output: OutputConfig

    @property
    def output_dir(self) -> Path:
        return Path(self.output.output_dir)

    @property
    def overwrite(self) -> bool:
        return self.output.overwrite_output_dir

    @property
    def push(self) -> bool:
        return self.output.push_to_hub


def read_settings(values: Mapping[str, Any], source: str, arguments_class: type) -> Settings:
    """Distribute a flat mapping over ModelConfig, DataConfig and a TrainingArguments class.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, incompatible values, or a missing model.
    """
    values = rename_keys(values, source)
    classes = (ModelConfig, DataConfig, OutputConfig, arguments_class)
    model_values, data_values, output_values, training_values = split_config(values, classes, source)
    if not values.get("output_dir"):
        raise InputError(f"{source} lacks the key 'output_dir': set it to the folder for the trained model")
    model = build(ModelConfig, model_values, source)
    data = build(DataConfig, data_values, source)
    output = build(OutputConfig, output_values, source)
    training_values.pop("resume_from_checkpoint", None)  # handled by OutputConfig, which also allows false
    if not data.dataset_mixer:
        raise InputError(f"{source} lacks the key 'dataset_mixer': add it with at least one 'path: fraction' line")
    check_model_path(model.model_name_or_path, needs_weights=not model.init_from_config)
    skip_unused_deepspeed_build()
    try:
        arguments: Any = build(arguments_class, {"report_to": "none", **training_values}, source)
    except InputError:
        raise
    except (ValueError, ImportError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"the training settings in {source} are incompatible with each other or with this machine: {reason}"
        ) from error
    import huggingface_hub
    import torch

    if arguments.fp16 and not torch.cuda.is_available():
        raise InputError("fp16 is true, but no GPU is available: set bf16 to true instead, or neither")
    if model.load_in_4bit and arguments.fsdp:
        raise InputError("load_in_4bit does not work with FSDP here: use DeepSpeed ZeRO-2 or a single process")
    if output.push_to_hub and values.get("hub_strategy", "end") != "end":
        raise InputError(f"hub_strategy is {values['hub_strategy']}, but only the final model is pushed: set it to end")
    if output.push_to_hub and huggingface_hub.constants.HF_HUB_OFFLINE:
        raise InputError("push_to_hub is true, but HF_HUB_OFFLINE is set: unset one of them")
    arguments.push_to_hub = (
        False  # the Trainer would mix its checkpoints into output_dir; push_policy does it at the end
    )
    return Settings(values, model, data, arguments, output)


def skip_unused_deepspeed_build() -> None:
    """Stop DeepSpeed on a CPU from compiling its shared-memory all-reduce when the process group is created.

    Only its inference engine uses it. The build is guarded by a lock file in the user's cache; a killed process leaves the file
    behind, and every later start then waits for it forever.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") != "true":
        return
    from deepspeed import ops
    from deepspeed.accelerator import get_accelerator

    if get_accelerator().device_name() == "cpu":
        ops.__compatible_ops__["deepspeed_shm_comm"] = False


def make_encoder(settings: Settings) -> ChatEncoder:
    """Return the chat encoder of the model to train. A template with the date sees the day of the setting, else that of the
    pairs, else that of the training to continue, else today.

    Raises:
        InputError: the tokenizer is missing, it has no usable chat template, or the pairs were generated on different dates.
    """
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.data.template_date import pinned_date, recorded_in_json, recorded_in_rows

    model, data = settings.model, settings.data
    recorded: list[str | None] = []
    if data.template_date is None:
        folders = [Path(source) for source in data.dataset_mixer]
        recorded.append(recorded_in_rows(file for folder in folders for file in sorted(folder.glob("*.parquet"))))
        recorded.append(None if settings.overwrite else recorded_in_json(settings.output_dir / INPUTS_FILE))
    return load_encoder(
        model.model_name_or_path,
        model.model_revision,
        model.trust_remote_code,
        system=data.system,
        chat_template_kwargs=data.chat_template_kwargs,
        date=pinned_date(data.template_date, recorded) or _same_day(settings.arguments.world_size),
    )


def _same_day(processes: int) -> datetime.date:
    """Return today's date, that of the main process if there are several: they may start on both sides of midnight."""
    from spin.alignment.data.template_date import parse_date, today

    if processes == 1:
        return today()
    from accelerate.utils import broadcast_object_list

    return parse_date(str(broadcast_object_list([today().isoformat()])[0]))


def inputs_record(settings: Settings, opponent: str, data: str) -> dict[str, Any]:
    """Return everything that determines the result of a training run: weights, data and settings, by hash or value."""
    # Each declared setting says whether it is recorded; keys of transformers that are not declared here are.
    declared = {
        name: field
        for part in (settings.model, settings.data, settings.output, settings.arguments)
        for name, field in settings_of(type(part)).items()
    }
    aside = {*_WITHOUT_EFFECT} | {name for name, field in declared.items() if declaration_of(field).recorded is False}
    kept = {key: value for key, value in settings.values.items() if key not in aside}
    processes = {"processes": settings.arguments.world_size} if settings.arguments.world_size > 1 else {}
    own = {"loss": settings.values.get("loss_type", ""), "pairing": settings.values.get("pairing", "")}
    modules = {key: value for kind, name in own.items() for key, value in module_record(kind, name).items()}
    record = {"model": opponent, "data": data, **processes, **kept, **modules}
    return json.loads(json.dumps(record, default=str, sort_keys=True))
