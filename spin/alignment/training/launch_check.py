"""Checks of accelerate's environment variables, which its launcher sets, before a model is loaded."""

from __future__ import annotations

import os
from typing import Any

from spin.alignment.core.errors import InputError
from spin.alignment.core.launcher import check_rendezvous

_FLAGS = ("USE_CPU", "USE_DEEPSPEED", "USE_FSDP", "USE_MEGATRON_LM", "USE_PARALLELISM_CONFIG", "DEBUG_MODE")
_TRUE, _FALSE = ("1", "true", "t", "yes", "y", "on"), ("", "0", "false", "f", "no", "n", "off")
_PRECISIONS = ("no", "bf16", "fp16")
_UNSUPPORTED = {"USE_MEGATRON_LM": "Megatron-LM", "USE_PARALLELISM_CONFIG": "a parallelism config"}
_FIX = "correct the launch configuration, or unset the variable"


def check_launch() -> None:
    """Check what accelerate will read when it is created, so that it cannot fail after data have been read.

    Raises:
        InputError: a variable has a value that accelerate or this project does not know, or one that this machine cannot have.
    """
    check_rendezvous()
    given = {name: _given(name).lower() for name in _FLAGS}
    for name, value in given.items():
        if value not in (*_TRUE, *_FALSE):
            raise InputError(f"the environment variable ACCELERATE_{name} is '{value}', not true or false: {_FIX}")
    for name, what in _UNSUPPORTED.items():
        if given[name] in _TRUE:
            raise InputError(
                f"ACCELERATE_{name} is set, but {what} is not supported: use DeepSpeed or FSDP2, or {_FIX}"
            )
    if given["USE_DEEPSPEED"] in _TRUE and "RANK" not in os.environ:
        raise InputError(
            "ACCELERATE_USE_DEEPSPEED is set, but no launcher has started this process: use accelerate launch, or unset it"
        )
    _check_backend()
    _check_device()


def check_launched_precision(arguments: Any) -> None:
    """Check the mixed precision of the launcher, which holds where the configuration sets none.

    Raises:
        InputError: it is unknown, or float16 without the handling of overflows that ``fp16: true`` brings.
    """
    precision = _given("MIXED_PRECISION").lower() or "no"
    if precision not in _PRECISIONS:
        raise InputError(
            f"ACCELERATE_MIXED_PRECISION is '{precision}': choose one of {', '.join(_PRECISIONS)} in the launch configuration"
        )
    if precision == "fp16" and not (arguments.fp16 or arguments.bf16):
        raise InputError(
            "the launcher sets mixed_precision to fp16 (ACCELERATE_MIXED_PRECISION), but fp16 is not set: set fp16 to true "
            "too, or mixed_precision to no"
        )


def check_accelerator_config(config: Any, source: str) -> None:
    """Check that ``accelerator_config`` leaves batches as they are: the trainers make them, and divide them among the processes.

    Raises:
        InputError: a value would change them, or accelerate could not handle them; it is named.
    """
    plain = type(config)()
    for name in ("dispatch_batches", "even_batches", "gradient_accumulation_kwargs"):
        value = getattr(config, name)
        if value not in (None, getattr(plain, name)) and not (name == "dispatch_batches" and value is False):
            raise InputError(
                f"'accelerator_config' in {source} sets {name} to {value}, but batches are made and divided here: remove it"
            )


def _given(name: str) -> str:
    return os.environ.get(f"ACCELERATE_{name}", "").strip()


def _check_backend() -> None:
    from accelerate.utils import DynamoBackend

    backend = _given("DYNAMO_BACKEND").upper()
    if backend and backend not in DynamoBackend.list():
        raise InputError(f"ACCELERATE_DYNAMO_BACKEND is '{backend.lower()}', which accelerate does not know: {_FIX}")


def _check_device() -> None:
    import torch

    device = _given("TORCH_DEVICE")
    if not device:
        return
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"ACCELERATE_TORCH_DEVICE is '{device}', which cannot be used here ({reason}): {_FIX}"
        ) from error
