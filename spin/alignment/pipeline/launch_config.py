"""Checks of ``launch.config_file``: that accelerate will take it, before the first program is started with it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spin.alignment.core.config import convert, read_mapping, unknown_key
from spin.alignment.core.errors import InputError, reason_of, shown
from spin.alignment.core.settings import hints_of
from spin.alignment.pipeline.config import LaunchConfig

_PRECISIONS = ("no", "fp16", "bf16", "fp8")
_FLAGS = ("yes", "no", "true", "false", "0", "1")  # as text too, which accelerate's own questionnaire writes
# What each kind of launch reads besides the keys that all of them have.
_SECTIONS = {"deepspeed_config": "DEEPSPEED", "fsdp_config": "FSDP", "megatron_lm_config": "MEGATRON_LM"}


def check_launch_config(launch: LaunchConfig) -> None:
    """Check the configuration of accelerate that the GPU programs are started with, if there is one.

    Raises:
        InputError: naming the file, the key and the fix.
    """
    if launch.config_file is None:
        return
    path = Path(launch.config_file)
    values = _read(path)
    where = f"launch.config_file {path}"
    _check_keys(values, where)
    _check_numbers(values, where)
    kind = str(values["distributed_type"])
    for section, wanted in _SECTIONS.items():
        if values.get(section) and kind != wanted:
            raise InputError(
                f"{where} has {section}, but its distributed_type is {kind}: set it to {wanted}, or remove {section}"
            )
        _check_section(values.get(section) or {}, section, path)
    if kind == "DEEPSPEED":
        _check_deepspeed(values.get("deepspeed_config") or {}, path)
    _build(values, where)


def _read(path: Path) -> dict[str, Any]:
    if path.suffix != ".json":
        return read_mapping(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"launch.config_file {path} is not JSON ({reason_of(error)}): correct the file") from error
    if not isinstance(values, dict):
        raise InputError(f"launch.config_file {path} is not a mapping: write it with accelerate config")
    return values


def _check_keys(values: Mapping[str, Any], where: str) -> None:
    from accelerate.commands.config.config_args import ClusterConfig

    # Two keys of older versions, which accelerate still converts.
    hints = {**hints_of(ClusterConfig), "fp16": bool, "dynamo_backend": str}
    for key, value in values.items():
        if key not in hints:
            raise unknown_key(key, f"{where}, which is to be a configuration of accelerate", hints)
        if value is None or key in ("compute_environment", "distributed_type", "mixed_precision"):
            continue
        if key == "gpu_ids" and not isinstance(value, str):
            raise InputError(f"'gpu_ids' in {where} is {shown(value)}: write it as text, such as '0,1'")
        if not (hints[key] is bool and str(value).lower() in _FLAGS):
            convert(value, hints[key], f"'{key}' in {where}")
    if values.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise InputError(
            f"'compute_environment' in {where} is {shown(values['compute_environment'])}: set it to LOCAL_MACHINE"
        )
    precision = values.get("mixed_precision")
    if precision not in (None, False, *_PRECISIONS):  # YAML reads a bare `no` as false
        raise InputError(f"'mixed_precision' in {where} is {shown(precision)}: choose one of {', '.join(_PRECISIONS)}")
    if "distributed_type" not in values:
        raise InputError(f"{where} lacks the key 'distributed_type': write the file with accelerate config")


def _check_numbers(values: Mapping[str, Any], where: str) -> None:
    for key, least in (("num_processes", 1), ("num_machines", 1), ("machine_rank", 0), ("main_process_port", 0)):
        number = values.get(key)
        if isinstance(number, int) and number < least and not (key == "num_processes" and number == -1):
            raise InputError(f"'{key}' in {where} is {number}: set it to {least} or more")
    if values["distributed_type"] == "MULTI_GPU" and str(values.get("gpu_ids") or "all").isdecimal():
        raise InputError(f"'gpu_ids' in {where} is one GPU, but distributed_type is MULTI_GPU: name several, or all")
    machines, rank = values.get("num_machines") or 1, values.get("machine_rank") or 0
    if rank >= machines:
        raise InputError(f"'machine_rank' in {where} is {rank}, but num_machines is {machines}: count machines from 0")


def _check_section(values: Mapping[str, Any], section: str, path: Path) -> None:
    """Check the keys of a section: accelerate takes its own flags there, and ignores anything else without a word."""
    from accelerate.commands.launch import launch_command_parser

    flags = set(vars(launch_command_parser().parse_args(["program.py"])))
    prefix = section.removesuffix("_config") + "_"
    for key in values:
        if key not in flags and f"{prefix}{key}" not in flags:
            known = [flag for flag in flags if flag.startswith(("zero", "offload", prefix))]
            raise unknown_key(key, f"{section} of {path}", known)


def _check_deepspeed(section: Mapping[str, Any], path: Path) -> None:
    where = f"deepspeed_config of {path}"
    name = section.get("deepspeed_config_file")
    if name is not None:
        file = Path(str(name))
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{where} names {file}, which cannot be read ({error.strerror}): correct the path"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file}, named in {where}, is not JSON ({reason_of(error)}): correct it") from error
        if not isinstance(content, dict) or "zero_optimization" not in content:
            raise InputError(f"{file}, named in {where}, lacks zero_optimization: give a configuration of DeepSpeed")
    stage = section.get("zero_stage", 2)
    if stage not in (0, 1, 2, 3) or isinstance(stage, bool):
        raise InputError(f"'zero_stage' in {where} is {shown(stage)}: choose one of 0, 1, 2, 3")


def _build(values: Mapping[str, Any], where: str) -> None:
    """Let accelerate make its own configuration of the values: it knows its launch types."""
    from accelerate.commands.config.config_args import ClusterConfig

    try:
        ClusterConfig(**ClusterConfig.process_config(dict(values)))
    except Exception as error:
        raise InputError(f"{where} is not a configuration of accelerate ({reason_of(error)}): correct it") from error
