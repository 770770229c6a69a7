"""``spin config``: every value of a configuration as a program will see it, and its origin."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spin.alignment.core.config import load_config, split_config
from spin.alignment.core.console import say
from spin.alignment.core.errors import lookup
from spin.alignment.core.origins import leaves, origins
from spin.alignment.core.secrets import is_secret
from spin.alignment.core.settings import (
    MISSING,
    checked_value,
    default_of,
    grouped,
    hints_of,
    set_by_run,
    settings_of,
)
from spin.alignment.data.config import DataConfig
from spin.alignment.models.config import ModelConfig
from spin.alignment.pipeline.config import SECTIONS, RunConfig, load_run_config
from spin.alignment.pipeline.program_settings import (
    convert_config,
    evaluate_config,
    generate_config,
    online_values,
    sample_config,
    select_config,
    sft_values,
    train_values,
    weights_config,
)
from spin.alignment.training.keys import OutputConfig, SPINKeys
from spin.alignment.training.online.keys import OnlineKeys
from spin.alignment.training.renamed_keys import RENAMED, rename_keys

DEFAULT, BY_THE_RUN = "default", "set by the run"
# Training programs, by the section of `spin run` that takes the same keys.
_PROGRAMS = {"run_spin": "train", "run_sft": "sft", "run_online": "online"}


@dataclass(frozen=True)
class Resolved:
    """A value and where it comes from; ``key`` has dots between its levels."""

    key: str
    value: Any
    origin: str


def program_of(values: Mapping[str, Any]) -> str:
    """Return the program that a configuration is for, inferred from its keys: run, run_spin, run_sft or run_online."""
    if {"run_dir", "data", *SECTIONS} & set(values):
        return "run"
    own = set(settings_of(OnlineKeys)) - set(settings_of(SPINKeys)) - set(settings_of(ModelConfig))
    if own & set(values):
        return "run_online"
    preference = {field.name for group in ("method", "batches") for field in grouped(SPINKeys)[group]}
    # SFT has these two as well, so they say nothing about the program.
    preference -= {"per_device_train_batch_size", "gradient_accumulation_steps"}
    splits = values.get("dataset_splits") or ["train_prefs"]
    if "init_from_config" in values or not (preference & set(values) or any("_prefs" in str(name) for name in splits)):
        return "run_sft"
    return "run_spin"


def arguments_class(program: str) -> type:
    """Return the class of a training program's keys, those of transformers included (a slow import)."""
    if program == "run_sft":
        from spin.alignment.training.sft import SFTArguments

        return SFTArguments
    if program == "run_online":
        from spin.alignment.training.online.config import OnlineConfig

        return OnlineConfig
    from spin.alignment.training.config import SPINConfig

    return SPINConfig


def resolve(path: str | Path, arguments: Sequence[str], program: str | None, every: bool) -> tuple[str, list[Resolved]]:
    """Return the program of a configuration and its resolved values.

    Args:
        program: run, run_spin, run_sft or run_online; None: inferred from the keys.
        every: include the keys of transformers that are not set.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, an unknown program.
    """
    values = load_config(path, arguments)
    program = lookup({name: name for name in ("run", *_PROGRAMS)}, program or program_of(values), "program")
    found = origins(path, arguments)
    if program == "run":
        return program, list(_of_run(load_run_config(path, arguments), found, every))
    return program, list(_of_training(program, values, found, str(path), every))


def _of_training(
    program: str, values: Mapping[str, Any], found: Mapping[str, str], source: str, every: bool
) -> Iterator[Resolved]:
    values, found = rename_keys(values, source), {RENAMED.get(key, key): origin for key, origin in found.items()}
    classes = (ModelConfig, DataConfig, OutputConfig, arguments_class(program))
    split_config(values, classes, source)  # refuses unknown keys
    seen: set[str] = set()
    for config_class in classes:
        hints, own = hints_of(config_class), settings_of(config_class)
        for field in dataclasses.fields(config_class):
            wanted = field.init and field.name not in seen and (every or field.name in own or field.name in values)
            if not wanted:
                continue
            seen.add(field.name)
            if field.name in values:
                value = checked_value(field, hints[field.name], values[field.name], f"'{field.name}' in {source}")
                yield Resolved(field.name, value, _origin(field.name, found) or BY_THE_RUN)
            else:
                default = default_of(field)
                yield Resolved(field.name, "(missing)" if default is MISSING else default, DEFAULT)


def _origin(key: str, found: Mapping[str, str]) -> str | None:
    """Return the origin of a value; for a mapping, that of its first item."""
    return found.get(key) or next((found[name] for name in found if name.startswith(f"{key}.")), None)


def _of_run(config: RunConfig, found: Mapping[str, str], every: bool) -> Iterator[Resolved]:
    for key, value in leaves(config.as_dict()).items():
        if key.partition(".")[0] not in SECTIONS:
            yield Resolved(key, value, _origin(key, found) or DEFAULT)
    for name in _stages(config):
        prefix = f"{name}."
        inside = {key.removeprefix(prefix): origin for key, origin in found.items() if key.startswith(prefix)}
        for item in _of_section(config, name, inside, every):
            yield dataclasses.replace(item, key=f"{prefix}{item.key}")


def _stages(config: RunConfig) -> list[str]:
    """Return the sections whose programs the run starts."""
    iterated = config.online is None
    started = {"generate": iterated, "convert": iterated, "train": iterated, "evaluate": bool(config.data.test)}
    return [name for name in SECTIONS if started.get(name, getattr(config, name) is not None)]


def _of_section(config: RunConfig, name: str, inside: dict[str, str], every: bool) -> Iterator[Resolved]:
    """Yield the values of a section, for the first iteration; ``inside`` has the origins of its keys."""
    decided = set_by_run(*SECTIONS[name])
    written = {key: origin for key, origin in inside.items() if key.partition(".")[0] not in decided}
    where = f"the section '{name}'"
    if name in ("sft", "control"):
        yield from _of_training("run_sft", sft_values(config, name), written, where, every)
    elif name == "online":
        yield from _of_training(
            "run_online",
            online_values(
                config,
            ),
            written,
            where,
            every,
        )
    elif name == "train":
        base = origins(str(config.train["config"])) if "config" in config.train else {}
        written = {key: origin for key, origin in base.items() if key not in decided} | written
        yield from _of_training("run_spin", train_values(config, 0), written, where, every)
    else:
        yield from _of_flags(_flags_of(config, name), written)
    if name == "select":
        sampled = {
            key.removeprefix("generate."): origin for key, origin in written.items() if key.startswith("generate.")
        }
        for item in _of_flags(sample_config(config), sampled):
            yield dataclasses.replace(item, key=f"generate.{item.key}")


def _flags_of(config: RunConfig, name: str) -> Any:
    if name == "select":
        return select_config(config)
    if name == "generate":
        return generate_config(config, 0)
    if name == "convert":
        return convert_config(config, 0)
    return weights_config(config, 0) if name == "weigh" else evaluate_config(config, "start", config.start_model)


def _of_flags(config: Any, written: Mapping[str, str]) -> Iterator[Resolved]:
    for key, field in settings_of(type(config)).items():
        value = getattr(config, key)
        yield Resolved(key, value, _origin(key, written) or (DEFAULT if value == default_of(field) else BY_THE_RUN))


def show_config(path: str | Path, arguments: Sequence[str], program: str | None = None, every: bool = False) -> None:
    """Print every resolved value of a configuration with its origin."""
    program, rows = resolve(path, arguments, program, every)
    say(f"{path}: {'spin run' if program == 'run' else f'spin/{program}.py'}")
    texts = [(row.key, _text(_shown(row)), row.origin) for row in rows]
    widths = [max(len(text[column]) for text in texts) for column in (0, 1)]
    for key, value, origin in texts:
        say(f"  {key.ljust(widths[0])}  {value.ljust(min(widths[1], 60))}  {origin}")


def _shown(row: Resolved) -> Any:
    return "(hidden)" if is_secret(row.key) and row.value is not None else row.value


def _text(value: Any) -> str:
    """Return a value as one line of YAML."""
    plain = list(value) if isinstance(value, tuple) else value
    dumped = yaml.dump(plain, Dumper=yaml.SafeDumper, default_flow_style=True, width=10_000, sort_keys=False)
    return dumped.removesuffix("...\n").strip()
