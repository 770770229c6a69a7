"""The ranges and choices of transformers' own training keys, which its argument classes do not check themselves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from spin.alignment.core.config import convert
from spin.alignment.core.errors import InputError, shown
from spin.alignment.core.settings import Declaration, hints_of, numbers_in, settings_of
from spin.alignment.training.sft_objectives import OBJECTIVES

_POSITIVE, _COUNT, _AMOUNT, _SHARE = (
    Declaration("", gt=0),
    Declaration("", ge=1),
    Declaration("", ge=0),
    Declaration("", ge=0, lt=1),
)
_SEED = Declaration("", ge=0, lt=2**32)  # numpy's generator takes no others

RANGES: dict[str, Declaration] = {
    **dict.fromkeys(("adam_beta1", "adam_beta2", "label_smoothing_factor"), _SHARE),
    **dict.fromkeys(("adam_epsilon", "max_grad_norm", "weight_decay", "warmup_steps", "eval_delay"), _AMOUNT),
    **dict.fromkeys(("dataloader_num_workers", "save_total_limit", "neftune_noise_alpha"), _AMOUNT),
    **dict.fromkeys(("learning_rate", "logging_steps", "save_steps", "eval_steps", "ddp_timeout"), _POSITIVE),
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), _COUNT
    ),
    **dict.fromkeys(("eval_accumulation_steps", "dataloader_prefetch_factor", "torch_empty_cache_steps"), _COUNT),
    **dict.fromkeys(("ddp_bucket_cap_mb", "pad_to_multiple_of", "dataset_num_proc"), _COUNT),
    **dict.fromkeys(("seed", "data_seed"), _SEED),
    "num_train_epochs": _AMOUNT,
    "max_steps": Declaration("", ge=-1),
}
# Where transformers and TRL take any text and fall back to a default, or fail after the model is loaded.
CHOICES: dict[str, tuple[str, ...]] = {
    "train_sampling_strategy": ("random", "sequential", "group_by_length"),
    "include_num_input_tokens_seen": ("all", "non_padding", "no"),
    "dataloader_multiprocessing_context": ("fork", "spawn", "forkserver"),
    "log_level": ("debug", "info", "warning", "error", "critical", "passive"),
    "log_level_replica": ("debug", "info", "warning", "error", "critical", "passive"),
    "loss_type": tuple(OBJECTIVES),  # of SFT: preference training declares its own
    "torch_compile_mode": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
}
# Values that ask for what the training programs do not do: nothing would be trained, or the key would be ignored.
_IDLE = {
    ("max_steps", 0): "no step would be trained: set it to a number of steps, or to -1 for num_train_epochs",
    ("do_train", False): "these programs train: remove the key, or use spin/evaluate_model.py to evaluate only",
    ("do_predict", True): "nothing is predicted here: remove the key, and use spin/evaluate_model.py",
}
# Keys that are not the user's to set.
REFUSED = {"local_rank": "the launcher sets it: remove the key"}


def check_ranges(values: Mapping[str, Any], arguments_class: type, source: str) -> None:
    """Check the numbers and choices of training keys before the arguments are built from them.

    Raises:
        InputError: a number out of range or not finite, or a text that is no choice; the message names key and source.
    """
    hints, declared = hints_of(arguments_class), settings_of(arguments_class)
    for key, value in values.items():
        where = f"'{key}' in {source}"
        if key in REFUSED:
            raise InputError(f"{where} is {shown(value)}, but {REFUSED[key]}")
        if isinstance(value, bool | int) and (key, value) in _IDLE:
            raise InputError(f"{where} is {shown(value)}, but {_IDLE[key, value]}")
        for number in _all_numbers(value):
            if isinstance(number, float) and not math.isfinite(number):
                raise InputError(f"{where} contains {shown(number)}: set it to a finite number")
        if key in declared:  # the settings of this project check themselves
            continue
        if value is not None and key in CHOICES and not isinstance(value, bool) and value not in CHOICES[key]:
            raise InputError(f"{where} is {shown(value)}: choose one of {', '.join(CHOICES[key])}")
        if key not in RANGES:
            continue
        for number in numbers_in(convert(value, hints[key], where)):
            if not RANGES[key].allows(number):
                raise InputError(f"{where} is {shown(number)}: set it to {RANGES[key].range()}")


def _all_numbers(value: Any) -> Iterator[Any]:
    """Yield the numbers in nested lists and mappings."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from _all_numbers(item)
    else:
        yield from numbers_in(value)
