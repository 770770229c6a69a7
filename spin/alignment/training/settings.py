"""The settings of a training program: parsing, checks, and the record of those that determine the result."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.config import build, convert, split_config
from spin.alignment.core.errors import InputError, reason_of, shown
from spin.alignment.core.resolve import module_record
from spin.alignment.core.secrets import refuse_stored_secrets, without_secrets
from spin.alignment.core.settings import check_outputs, checked_value, declaration_of, hints_of, settings_of
from spin.alignment.data.config import DataConfig
from spin.alignment.data.split_names import is_held_out
from spin.alignment.models.config import ModelConfig
from spin.alignment.models.folder import check_model_path
from spin.alignment.training.argument_ranges import check_ranges
from spin.alignment.training.keys import OutputConfig
from spin.alignment.training.renamed_keys import rename_keys

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder

INPUTS_FILE = "inputs.json"
# Keys of transformers that affect neither the weights nor the metrics; the project's own keys declare this themselves.
_WITHOUT_EFFECT = (
    "log_level",
    "report_to",
    "run_name",
    "project",
    "disable_tqdm",
    "save_steps",
    "save_total_limit",
    "hub_model_id",
    "hub_private_repo",
    "hub_strategy",
)

_OWN: tuple[type, type, type] = (ModelConfig, DataConfig, OutputConfig)


@dataclass(frozen=True)
class Settings:
    """The validated settings of one training program."""

    values: dict[str, Any]
    model: ModelConfig
    data: DataConfig
    arguments: Any
    output: OutputConfig
    hub_token: str | None = dataclasses.field(default=None, repr=False)

    @property
    def output_dir(self) -> Path:
        return Path(self.output.output_dir)

    @property
    def overwrite(self) -> bool:
        return self.output.overwrite_output_dir

    @property
    def evaluates_at_the_end(self) -> bool:
        """Whether the trained policy is scored on the test split, if there is one; ``do_eval: false`` turns it off."""
        return self.values.get("do_eval") is not False

    @property
    def push(self) -> bool:
        return self.output.push_to_hub


def read_settings(values: Mapping[str, Any], source: str, arguments_class: type) -> Settings:
    """Distribute a flat mapping over ModelConfig, DataConfig and a TrainingArguments class.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, incompatible values, or a missing model.
    """
    values = rename_keys(values, source)
    refuse_stored_secrets(values, source)
    hub_token, values = values.get("hub_token"), without_secrets(values)
    *_, training_values = split_config(values, (*_OWN, arguments_class), source)
    model, data, output = _own_parts(values, source)
    training_values.pop("resume_from_checkpoint", None)  # handled by OutputConfig, which also allows false
    skip_unused_deepspeed_build()
    arguments = build_arguments(arguments_class, {"report_to": "none", **training_values}, source)
    check_outputs(arguments)
    import huggingface_hub
    import torch

    if arguments.fp16 and (arguments.use_cpu or not torch.cuda.is_available()):
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
    # The Trainer stores its arguments in every checkpoint, so the token is not one of them.
    return Settings(values, model, data, arguments, output, None if hub_token is None else str(hub_token))


def check_declared(values: Mapping[str, Any], source: str, *keys: type) -> None:
    """Check what takes no library: paths, and the values of the settings declared in this project.

    Programs call it before they import transformers, so that most mistakes are found within a second.

    Args:
        keys: the classes of keys of the program besides those of model, data and output.

    Raises:
        InputError: as :func:`read_settings`.
    """
    values = rename_keys(values, source)
    _own_parts(values, source)
    for config_class in keys:
        hints = hints_of(config_class)
        for name, field in settings_of(config_class).items():
            if name not in values:
                continue
            value = convert(values[name], hints[name], f"'{name}' in {source}")
            try:
                checked_value(field, hints[name], value, name)
            except InputError as error:
                raise InputError(f"{error} (in {source})") from error


def _own_parts(values: Mapping[str, Any], source: str) -> tuple[ModelConfig, DataConfig, OutputConfig]:
    """Return the settings of model, data and output, checked."""
    if not values.get("output_dir"):
        raise InputError(f"{source} lacks the key 'output_dir': set it to the folder for the trained model")
    model_values, data_values, output_values = (
        {key: value for key, value in values.items() if key in settings_of(part)} for part in _OWN
    )
    model = build(ModelConfig, model_values, source)
    data = build(DataConfig, data_values, source)
    output = build(OutputConfig, output_values, source)
    check_outputs(output)
    if not data.dataset_mixer:
        raise InputError(f"{source} lacks the key 'dataset_mixer': add it with at least one 'path: fraction' line")
    check_model_path(model.model_name_or_path, needs_weights=not model.init_from_config)
    return model, data, output


def build_arguments(arguments_class: type, values: Mapping[str, Any], source: str) -> Any:
    """Return the arguments of a Trainer; an error of transformers names the keys that cause it.

    Raises:
        InputError: a value of the wrong type or out of range, or values that do not fit together or this machine.
    """
    values = {key: numbers_read(value) if isinstance(value, dict) else value for key, value in values.items()}
    check_ranges(values, arguments_class, source)
    if _computes_on_cpu(values):
        values["use_cpu"] = True
    try:
        return build(arguments_class, values, source)
    except InputError:
        raise
    except Exception as error:
        causes = [
            key for key in values if key != "output_dir" and _builds_without(arguments_class, values, key, source)
        ]
        given = ", ".join(f"{key}: {shown(values[key])}" for key in causes)
        what = f"the setting{'s' if len(causes) > 1 else ''} {given}" if causes else "the values"
        how = "are incompatible with each other, or with this machine" if len(causes) > 1 else "cannot be used here"
        raise InputError(f"{what} of {source} {how} ({reason_of(error)}): correct or remove it") from error


def _computes_on_cpu(values: Mapping[str, Any]) -> bool:
    """Return whether bfloat16 is asked for where there is only a CPU, which transformers accepts only with ``use_cpu``."""
    import torch

    asked = bool(values.get("bf16") or values.get("bf16_full_eval"))
    return asked and "use_cpu" not in values and not torch.accelerator.is_available()


def _builds_without(arguments_class: type, values: Mapping[str, Any], key: str, source: str) -> bool:
    try:
        build(arguments_class, {name: value for name, value in values.items() if name != key}, source)
    except Exception:  # another of the values causes the error
        return False
    return True


def numbers_read(value: Any) -> Any:
    """Return nested values with texts such as ``1e-7``, which YAML does not read as numbers, as numbers."""
    if isinstance(value, Mapping):
        return {key: numbers_read(item) for key, item in value.items()}
    if isinstance(value, list):
        return [numbers_read(item) for item in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r"[-+]?\d+[eE][-+]?\d+", value) else value


def check_evaluation(settings: Settings, split: str) -> None:
    """Check that there are held-out rows if they are to be evaluated; ``split`` is how such a split is called.

    Raises:
        InputError: no split of the data is a test split.
    """
    strategy = settings.arguments.eval_strategy
    asked = f"eval_strategy is {strategy.value}" if strategy != "no" else ""
    asked = asked or ("eval_on_start is true" if settings.arguments.eval_on_start else "")
    if asked and not any(is_held_out(name) for name in settings.data.dataset_splits):
        raise InputError(f"{asked}, but dataset_splits names no test split: add {split} to it")


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
    return without_paths(json.loads(json.dumps(record, default=str, sort_keys=True)))


def without_paths(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record of inputs without the places of models and data, whose contents are in ``model`` and ``data``, and without
    what trackers call it.

    A run that was moved, or is given by another spelling of its path, then has the same record. Earlier versions wrote the paths.
    """
    kept = {
        key: value
        for key, value in record.items()
        if key not in ("model_name_or_path", "eval_prompts", "run_name", "project")
    }
    mixer = kept.get("dataset_mixer")
    return {**kept, "dataset_mixer": list(mixer.values())} if isinstance(mixer, Mapping) else kept
