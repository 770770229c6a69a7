"""Everything that is checked before the first stage starts: settings, data, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    from spin.alignment.pipeline.config import RunConfig


def check_before_start(config: RunConfig, source: str) -> None:
    """Check every setting of every program, the data and the tokenizer, before any process starts.

    Raises:
        InputError: naming the problem and its section or file.
    """
    from spin.alignment.models.folder import check_model_path

    check_model_path(config.model, needs_weights=not (config.sft or {}).get("init_from_config", False))
    check_settings(config, source)
    check_data(config)


def check_settings(config: RunConfig, source: str) -> None:
    """Check the settings of every kind of stage as its program will; ``source`` is the file that contains them."""
    from spin.alignment.pipeline.stages import KINDS

    for kind in KINDS.values():
        kind.check_settings(config, source)


def check_data(config: RunConfig) -> None:
    """Read the prompts and encode some of them, so that an unusable template is found before hours of training.

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
        for row in prompts.select(range(min(100, len(prompts)))):
            try:
                encoder.prompt_ids(prompt_turns(row["chosen"]), **template_arguments(row))
            except RowRefused:  # left out and counted by the program that reads it
                continue
            except InputError as error:
                raise InputError(f"{path} [{split}], prompt {row['prompt_id']}: {error}") from error


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
    from spin.alignment.pipeline.manifest import MANIFEST_NAME

    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir {run_dir} is a file: choose a folder")
    own = (MANIFEST_NAME, "run.yaml")
    if run_dir.is_dir() and not (run_dir / MANIFEST_NAME).exists():
        foreign = sorted(
            path.name
            for path in run_dir.iterdir()
            if path.name not in (*own, LOCK_NAME) and not any(is_leftover(path, run_dir / name) for name in own)
        )
        if foreign:
            raise InputError(
                f"run_dir {run_dir} contains {foreign[0]} but no run of this program: choose an empty folder"
            )
