"""Checks of training settings before data or a model is loaded: what they name is constructed on a model of one weight.

A tracker, an optimiser, a schedule or an attention kernel can only be known to work here by making one. The adapters and the
attention are checked on the model's own layers, built from its ``config.json`` without memory for weights.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.config import unknown_key
from spin.alignment.core.errors import InputError, reason_of, shown, suggestion
from spin.alignment.core.upload import check_repository
from spin.alignment.models.config import ModelConfig
from spin.alignment.training.launch_check import check_accelerator_config, check_launch, check_launched_precision
from spin.alignment.training.output_dir import check_resume_point
from spin.alignment.training.program import TrainingProgram
from spin.alignment.training.settings import Settings, read_settings
from spin.alignment.training.trackers import TRACKERS, missing_package

if TYPE_CHECKING:
    import torch

# The packages of trackers that transformers does not list as available or not.
_TRACKER_PACKAGES = {"flyte": "flytekit"}
_STEPS = 200
_FLAGS = ("use_reentrant", "preserve_rng_state", "debug", "early_stop")
_CHECKPOINTING = (*_FLAGS, "determinism_check")


def checked_settings(
    program: TrainingProgram, values: Mapping[str, Any], source: str, processes: int | None = None
) -> Settings:
    """Return the settings of a training program, checked as far as possible without its data and its model.

    Args:
        values: the keys of its configuration; ``source`` is where they stand.
        processes: the number of processes that will train; None: those of this launch.

    Raises:
        InputError: a setting that cannot work; the message names the key and the fix.
    """
    if processes is None:
        check_launch()
    settings = read_settings({**program.defaults, **values}, source, program.arguments_class)
    program.check_settings(settings)
    arguments = settings.arguments
    if processes is None:
        check_launched_precision(arguments)
    check_accelerator_config(arguments.accelerator_config, source)
    check_trackers(arguments.report_to, source)
    check_optimisation(arguments, source)
    check_held_out(arguments, program.held_out_metrics(arguments), source)
    check_memory_saving(arguments, source)
    check_processes(arguments, arguments.world_size if processes is None else processes, source)
    check_upload(settings, source)
    check_folders(settings, source)
    return settings


def check_trackers(names: list[str], source: str) -> None:
    """Check that the trackers of ``report_to`` exist and that their packages are installed."""
    from transformers.integrations.integration_utils import (
        INTEGRATION_TO_CALLBACK,
        get_available_reporting_integrations,
    )

    available = get_available_reporting_integrations()
    for name in names:
        if not isinstance(name, str) or name not in INTEGRATION_TO_CALLBACK:
            raise InputError(
                f"'report_to' in {source} names {shown(name)}: choose none, or some of {', '.join(INTEGRATION_TO_CALLBACK)}"
            )
        package = _TRACKER_PACKAGES.get(name)
        is_there = name in available or (package is not None and importlib.util.find_spec(package) is not None)
        command = missing_package(name) if name in TRACKERS else "" if is_there else f"pip install {package or name}"
        if command:
            raise InputError(
                f"'report_to' in {source} names {name}, whose package is missing: {command}, or set it to none"
            )


def check_optimisation(arguments: Any, source: str) -> None:
    """Check the optimiser and the schedule by making both for one weight, and stepping the schedule through."""
    import torch

    from spin.alignment.training.optimizers import optimizer_class_and_kwargs, takes_target_modules

    layer = torch.nn.Linear(1, 1, bias=False)
    with _naming("optim", arguments.optim.value, source):
        if takes_target_modules(arguments.optim):
            if not arguments.optim_target_modules:
                raise InputError(
                    f"optim is {arguments.optim.value}, which needs optim_target_modules: name the layers, such as [attn, mlp]"
                )
            # It is made for layers of the real model: here, only its package is looked for.
            package = "galore_torch" if "galore" in arguments.optim.value else "apollo_torch"
            if importlib.util.find_spec(package) is None:
                raise InputError(
                    f"optim {arguments.optim.value} needs the package {package}: install it, or choose another"
                )
            optimizer: torch.optim.Optimizer = torch.optim.SGD(layer.parameters(), lr=arguments.learning_rate)
        elif arguments.optim_target_modules:
            raise InputError(
                f"optim_target_modules is set, but optim {arguments.optim.value} does not use it: remove it"
            )
        else:
            chosen, settings = optimizer_class_and_kwargs(arguments, layer)
            optimizer = chosen(layer.parameters(), **settings)
    key = "lr_scheduler_kwargs" if arguments.lr_scheduler_kwargs else "lr_scheduler_type"
    with _naming(key, getattr(arguments.lr_scheduler_type, "value", arguments.lr_scheduler_type), source):
        for rate in _learning_rates(arguments, optimizer):
            if not (math.isfinite(rate) and 0 <= rate <= 1.001 * arguments.learning_rate):
                raise InputError(
                    f"'{key}' in {source} leads to the learning rate {rate:g}, outside 0 to learning_rate "
                    f"({arguments.learning_rate:g}): correct its values"
                )


def _learning_rates(arguments: Any, optimizer: torch.optim.Optimizer) -> Iterator[float]:
    """Yield the learning rates of a short training with the schedule of the settings."""
    from transformers import get_scheduler

    steps = min(arguments.max_steps, _STEPS) if arguments.max_steps > 0 else _STEPS
    schedule = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=optimizer,
        num_warmup_steps=arguments.get_warmup_steps(steps),
        num_training_steps=steps,
        scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
    )
    # A schedule in closed form is asked for its factors; the others follow the held-out metric from step to step.
    for factor_of in getattr(schedule, "lr_lambdas", ()):
        yield from (arguments.learning_rate * factor_of(step) for step in range(steps))


def check_held_out(arguments: Any, metrics: list[str], source: str) -> None:
    """Check that a metric by which checkpoints or the schedule are chosen will be measured on held-out rows."""
    best = arguments.metric_for_best_model
    if arguments.save_strategy == "best" and best is None:
        raise InputError(
            f"'save_strategy' in {source} is best, which needs metric_for_best_model: set it to {_some(metrics)}"
        )
    if best is None:
        return
    if arguments.eval_strategy == "no":
        raise InputError(
            f"'metric_for_best_model' in {source} is {best}, but eval_strategy is no: set eval_strategy, or remove the keys that "
            "choose by a metric"
        )
    if best.removeprefix("eval_") not in metrics:
        fix = suggestion(best, metrics) or f": choose {_some(metrics)}"
        raise InputError(f"'metric_for_best_model' in {source} is {shown(best)}, which is not measured{fix}")


def _some(names: list[str]) -> str:
    return ", ".join(names[:6])


def check_memory_saving(arguments: Any, source: str) -> None:
    """Check gradient checkpointing, Liger kernels and compilation."""
    given = arguments.gradient_checkpointing_kwargs
    if given is not None:
        if not isinstance(given, Mapping):
            raise InputError(f"'gradient_checkpointing_kwargs' in {source} is {shown(given)}: give 'key: value' lines")
        for key in given:
            if key not in _CHECKPOINTING:
                raise unknown_key(str(key), f"gradient_checkpointing_kwargs of {source}", _CHECKPOINTING)
        if not arguments.gradient_checkpointing:
            raise InputError(
                f"'gradient_checkpointing_kwargs' in {source} is set, but gradient_checkpointing is false: set it to true"
            )
        flags = [key for key in given if key in _FLAGS and not isinstance(given[key], bool)]
        if flags:
            raise InputError(
                f"'{flags[0]}' in gradient_checkpointing_kwargs of {source} is {shown(given[flags[0]])}: set it to true or false"
            )
        with _naming("gradient_checkpointing_kwargs", given, source):
            _checkpoint_once(dict(given))
    if arguments.use_liger_kernel and importlib.util.find_spec("liger_kernel") is None:
        raise InputError(
            f"'use_liger_kernel' in {source} is true, but its package is missing: pip install liger-kernel"
        )
    if arguments.torch_compile:
        import torch

        backends = torch._dynamo.list_backends(exclude_tags=())
        if arguments.torch_compile_backend not in backends:
            raise InputError(
                f"'torch_compile_backend' in {source} is {shown(arguments.torch_compile_backend)}: choose one of "
                f"{', '.join(backends)}"
            )


def _checkpoint_once(settings: dict[str, Any]) -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Linear(1, 1)
    checkpoint(layer, torch.ones(1, requires_grad=True), **{"use_reentrant": True, **settings}).sum().backward()


def check_processes(arguments: Any, processes: int, source: str) -> None:
    """Check the keys that divide a training among processes."""
    if arguments.fsdp and arguments.deepspeed:
        raise InputError(f"'fsdp' and 'deepspeed' are both set in {source}: remove one")
    if arguments.fsdp_config and not arguments.fsdp:
        raise InputError(f"'fsdp_config' in {source} is set, but fsdp is not: set fsdp, or remove the key")
    if arguments.fsdp and processes == 1:
        raise InputError(
            f"'fsdp' in {source} is set, but a single process trains: start several with accelerate launch (in spin run: "
            "launch.num_processes), or remove the key"
        )


def check_upload(settings: Settings, source: str) -> None:
    """Check the name of the repository that the model will be pushed to."""
    if not settings.push:
        return
    check_repository(settings.arguments.hub_model_id or settings.output_dir.name, f"'hub_model_id' in {source}")


def check_folders(settings: Settings, source: str) -> None:
    """Check that the output would not replace the model or the data that it is made from."""
    check_resume_point(settings.output.resume_from_checkpoint)
    folder = settings.output_dir.resolve()
    inputs = {"model_name_or_path": settings.model.model_name_or_path}
    inputs |= {f"dataset_mixer ({path})": path for path in settings.data.dataset_mixer}
    for key, path in inputs.items():
        if path and Path(path).exists() and Path(path).resolve() == folder:
            raise InputError(f"'output_dir' in {source} is the folder of {key}, {path}: choose another folder")
        stored = getattr(settings.arguments, "reference_dir", None)
        # Its files would be read as rows, or belong to no part of a model.
        if stored and path and Path(path).is_dir() and Path(path).resolve() == Path(stored).resolve():
            raise InputError(f"'reference_dir' in {source} is the folder of {key}, {path}: choose another folder")


def check_model_settings(model: ModelConfig, source: str) -> None:
    """Check quantisation, attention and adapters on the layers of the model, without its weights.

    Raises:
        InputError: a package is missing, or the attention or a target of the adapters does not exist.
    """
    from spin.alignment.models.adapters import add_adapters
    from spin.alignment.models.loading import quantisation

    quantisation(model)
    if not (model.attn_implementation or model.use_peft):
        return
    layers = _layers(model, source)
    if model.use_peft and layers is not None:
        with _naming("lora_target_modules", model.lora_target_modules, source):
            adapted = add_adapters(layers, replace(model, load_in_4bit=False, load_in_8bit=False))
        names = model.lora_target_modules if isinstance(model.lora_target_modules, list) else []
        for name in names:
            if not any(found == name or found.endswith(f".{name}") for found in adapted.targeted_module_names):
                raise InputError(
                    f"'lora_target_modules' in {source} names {shown(name)}, which the model lacks: correct it"
                )


def _layers(model: ModelConfig, source: str) -> Any:
    """Return the model without memory for weights; None for code that ships with it, or a class that is not in transformers."""
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    with _naming("model_name_or_path", model.model_name_or_path, source):
        config = AutoConfig.from_pretrained(
            model.model_name_or_path, revision=model.model_revision, trust_remote_code=model.trust_remote_code
        )
    chosen = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if chosen is None or isinstance(chosen, tuple | list):
        return None
    config = copy.deepcopy(config)
    with _naming("attn_implementation", model.attn_implementation, source), torch.device("meta"):
        if model.attn_implementation:
            config._attn_implementation = model.attn_implementation
        return chosen(config)


@contextlib.contextmanager
def _naming(key: str, value: Any, source: str) -> Iterator[None]:
    """Turn any exception of another library into a sentence that names a key and its value."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"'{key}' in {source} ({shown(value)}) cannot be used ({reason_of(error)}): correct or remove it"
        ) from error
