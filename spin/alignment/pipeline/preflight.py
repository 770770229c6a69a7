"""Everything that is checked before the first stage starts: settings, data, tokenizer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say_error
from spin.alignment.core.errors import InputError
from spin.alignment.core.paths import check_output_folder

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.pipeline.config import RunConfig


def check_before_start(config: RunConfig, source: str) -> None:
    """Check every setting of every program, the data and the tokenizer, before any process starts.

    Raises:
        InputError: naming the problem and its section or file.
    """
    from spin.alignment.models.folder import check_model_path, model_folder
    from spin.alignment.models.vocabulary import check_control_tokens
    from spin.alignment.models.weights_check import check_model
    from spin.alignment.pipeline.clusters import CLUSTERS
    from spin.alignment.pipeline.launch_config import check_launch_config

    check_launch_config(config.launch)
    CLUSTERS[config.launch.cluster].check(config.launch)
    needs_weights = not (config.sft or {}).get("init_from_config", False)
    check_model_path(config.model, needs_weights)
    check_settings(config, source)
    trusted = bool({**config.generate, **(config.online or {})}.get("trust_remote_code"))
    folder = model_folder(config.model, config.model_revision)
    model_config = check_model(folder, trust_remote_code=trusted, needs_weights=needs_weights)
    check_control_tokens(check_data(config), model_config, config.model)
    if remark := precision_remark(config, model_config):
        say_error(remark)


def precision_remark(config: RunConfig, model_config: Any) -> str:
    """Return what to say if the start is used in another precision than the models that are trained from it; else ''.

    With ``bf16: true`` those compute in bfloat16, in training and ever after (``generation_dtype``); a start that was saved in
    float32 computes in float32, so part of every difference between them would be rounding.
    """
    from spin.alignment.models.precision import TRAINED_IN

    trained = config.train if config.online is None else config.online
    saved = str(getattr(model_config, "dtype", None)).removeprefix("torch.")
    if (
        config.sft is not None
        or not trained.get("bf16")
        or saved != "float32"
        or getattr(model_config, TRAINED_IN, None)
    ):
        return ""
    sections = {"generate": config.generate, "evaluate": config.evaluate if config.data.test else None}
    left = [name for name, keys in sections.items() if keys is not None and keys.get("dtype", "auto") == "auto"]
    if config.online is not None:
        left = [name for name in left if name == "evaluate"]
    if not left:
        return ""
    return (
        f"{config.model} has float32 weights and is used in float32, but the models trained from it in bfloat16 (bf16: true): "
        f"set {' and '.join(f'{name}.dtype' for name in left)} to bfloat16 to compare them in the same precision"
    )


def check_settings(config: RunConfig, source: str) -> None:
    """Check the settings of every kind of stage as its program will; ``source`` is the file that contains them."""
    from spin.alignment.pipeline.stages import KINDS
    from spin.alignment.pipeline.tracked_run import run_trackers
    from spin.alignment.training.trackers import check_run_trackers

    check_run_trackers(run_trackers(config), source)
    for kind in KINDS.values():
        kind.check_settings(config, source)


def check_data(config: RunConfig) -> ChatEncoder:
    """Read the prompts and encode some of them, so that an unusable template is found before training; return the encoder.

    A ground truth is required only for SFT, evaluation, and pairings that compare with it.
    """
    from spin.alignment.data.chat_encoder import RowRefused, load_encoder, template_arguments
    from spin.alignment.data.rows import load_prompts
    from spin.alignment.data.turns import prompt_turns

    # The settings of the program that reads the prompts: run_online.py if it replaces generate.py.
    told: dict[str, Any] = {**config.generate, **(config.online or {})}
    encoder = load_encoder(
        config.model,
        config.model_revision,
        bool(told.get("trust_remote_code")),
        system=told.get("system", "keep"),
        chat_template_kwargs=config.chat_template_kwargs,
    )
    for (path, split), ground_truth_required in data_sources(config).items():
        prompts = load_prompts(path, split, ground_truth_required)
        check_scorer_columns(config, path, split, prompts)
        for row in prompts.select(range(min(100, len(prompts)))):
            try:
                encoder.prompt_ids(prompt_turns(row["chosen"]), **template_arguments(row))
            except RowRefused:  # left out and counted by the program that reads it
                continue
            except InputError as error:
                raise InputError(f"{path} [{split}], prompt {row['prompt_id']}: {error}") from error
    check_held_out(config, encoder)
    return encoder


def check_scorer_columns(config: RunConfig, path: str, split: str, prompts: Iterable[Mapping[str, Any]]) -> None:
    """Check that the prompts whose responses are scored have the columns that the scorer reads.

    Raises:
        InputError: a row lacks one, or its value cannot be used; the message names the row.
    """
    from spin.alignment.data.rows import scorer_columns
    from spin.alignment.rewards import check_columns

    played = {config.data.played(iteration) for iteration in config.self_play_iterations or (0,)}
    sections = (config.online or {}, config.convert, config.select or {})
    scorers = {str(section["scorer"]) for section in sections if section.get("scorer")}
    for scorer in scorers if (path, split) in played else ():
        for row in prompts:
            try:
                check_columns(scorer, scorer_columns(row))
            except InputError as error:
                raise InputError(
                    f"scorer {scorer} cannot score {path} [{split}], prompt {row['prompt_id']}: {error}"
                ) from error


def check_held_out(config: RunConfig, encoder: ChatEncoder) -> None:
    """Check that the evaluations have something to score; a single bad row is skipped and named by each of them.

    Raises:
        InputError: the held-out data cannot be read, or none of the first usable rows can be encoded.
    """
    from spin.alignment.data.chat_encoder import template_arguments
    from spin.alignment.data.held_out_rows import check_any_left, read_to_score
    from spin.alignment.data.rows import scorer_columns
    from spin.alignment.pipeline.program_settings import evaluate_config

    data, skipped, usable = config.data, [], []
    if not data.test:
        return
    evaluation = evaluate_config(config, "start", config.start_model)
    rows, _ = read_to_score(data.test, data.test_split, evaluation.compares)
    for row in rows[:100]:
        answered = row["chosen"][-1]["role"] == "assistant"
        try:
            evaluation.check_columns(scorer_columns(row))
            encode = encoder.response_ids if answered else encoder.prompt_ids
            usable.append(encode(row["chosen"], **template_arguments(row)))
        except InputError as error:
            skipped.append({"prompt_id": row["prompt_id"], "reason": str(error)})
    check_any_left(usable, skipped, f"{data.test}, split {data.test_split}")


def data_sources(config: RunConfig) -> dict[tuple[str, str], bool]:
    """Return every data set and split of a run, and whether its rows must have a ground truth."""
    from spin.alignment.pipeline.stages import KINDS

    sources: dict[tuple[str, str], bool] = {}
    for kind in KINDS.values():
        for key, required in kind.prompts(config).items():
            sources[key] = required or sources.get(key, False)
    return sources


def check_run_dir(run_dir: Path) -> None:
    """Refuse a folder with files that are not from a run; leftovers of a run that was killed at its start are allowed."""
    from spin.alignment.core.files import is_leftover
    from spin.alignment.core.lock import LOCK_NAME
    from spin.alignment.pipeline.config import is_run_yaml
    from spin.alignment.pipeline.manifest import MANIFEST_NAME

    check_output_folder(run_dir, "run_dir")
    own = (MANIFEST_NAME, "run.yaml")
    if run_dir.is_dir() and not os.path.lexists(run_dir / MANIFEST_NAME):
        if is_run_yaml(run_dir / "run.yaml"):
            return  # the manifest was removed: a new one is made
        present = [
            path.name for path in run_dir.iterdir() if not any(is_leftover(path, run_dir / name) for name in own)
        ]
        foreign = sorted({*present} - {LOCK_NAME})
        if foreign:
            raise InputError(
                f"run_dir {run_dir} contains {foreign[0]} but no run of this program: choose an empty folder"
            )
