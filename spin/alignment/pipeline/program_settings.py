"""The complete settings of each program in a run: its section, plus the values that the run decides itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from spin.alignment.core.config import build, load_config, merge
from spin.alignment.core.errors import InputError
from spin.alignment.core.settings import set_by_run
from spin.alignment.core.sides import INITIAL
from spin.alignment.evaluation.config import EvaluateConfig
from spin.alignment.generation.config import GenerateConfig
from spin.alignment.methods.losses import find_loss
from spin.alignment.methods.weightings import Compares
from spin.alignment.pairs.config import ConvertConfig, SelectConfig
from spin.alignment.pipeline.config import SCORERS_OF_RUN, SECTIONS, TOKENIZER_FLAGS, RunConfig
from spin.alignment.token_weights.config import WeightsConfig

C = TypeVar("C")


def reads_initial(config: RunConfig) -> bool:
    """Whether a loss of the run reads a response of the model that the first iteration starts from."""
    names = {str(train_values(config, step).get("loss_type", "sigmoid")) for step in config.self_play_iterations}
    return any(INITIAL in find_loss(name).responses for name in names)


def train_values(config: RunConfig, iteration: int) -> dict[str, Any]:
    """The complete settings of run_spin.py for an iteration."""
    values = {key: value for key, value in config.train.items() if key != "config"}
    if "config" in config.train:
        # A configuration for a single iteration: its model, data and output are dropped, since the pipeline sets them.
        alone = load_config(str(config.train["config"]))
        for key in ("chat_template_kwargs", "template_date"):
            if alone.get(key):
                raise InputError(
                    f"'{key}' in {config.train['config']} is the same in the whole run: set it at the top of its file"
                )
        values = merge(
            {key: value for key, value in alone.items() if key not in set_by_run(*SECTIONS["train"])}, values
        )
    values = merge(values, config.overrides.get(iteration, {}))
    splits = [config.data.played()[1], *([config.data.test_split] if config.data.test_pairs else [])]
    return (
        values
        | _owned(config, config.opponent(iteration), config.iteration_dir(iteration))
        | {
            "dataset_mixer": dict.fromkeys(config.train_folders(iteration), 1.0),
            "dataset_splits": [f"{split}_prefs" for split in splits],
        }
    )


def scorer_values(config: RunConfig, iteration: int, name: str) -> dict[str, Any]:
    """The complete settings of run_spin.py for a model behind the token weights: ``forward`` (plain SPIN) or ``reverse``."""
    # These models are what the weights are computed from, so they train on unweighted pairs and without alpha.
    values = {key: value for key, value in train_values(config, iteration).items() if key != "alpha"}
    values |= (config.weigh or {}).get("train") or {}
    values["dataset_mixer"] = dict.fromkeys(config.pair_folders(iteration), 1.0)
    values["output_dir"] = str(config.iteration_dir(iteration) / name / "checkpoint")
    return values | ({"reverse": True} if name == "reverse" else {})


def generate_config(config: RunConfig, iteration: int, held_out: bool = False) -> GenerateConfig:
    """The settings of generate.py for an iteration: for its training prompts, or for the held-out ones."""
    path, split = (config.data.test, config.data.test_split) if held_out else config.data.played(iteration)
    opponent = config.opponent(iteration)
    own = {
        "model": opponent,
        "revision": config.model_revision if opponent == config.model else None,
        "input_dir": path,
        "output_dir": str(config.iteration_dir(iteration) / "generated"),
        "split": split,
        "data_frac": "auto",
        "iteration": iteration,
        "seed": config.generation_seed(iteration),
        **config.template_settings,
    }
    # Held-out prompts are few: one fraction, whatever frac_len the training prompts have.
    section = config.generate | ({"frac_len": 0} if held_out else {})
    return section_config("generate", GenerateConfig, section | own)


def convert_config(config: RunConfig, iteration: int) -> ConvertConfig:
    """The settings of convert_data.py for an iteration."""
    folder = config.iteration_dir(iteration)
    own = {"input_dir": str(folder / "generated"), "output_dir": str(folder / "pairs")}
    if reads_initial(config):
        own["initial"] = str(config.initial_dir)
    return section_config("convert", ConvertConfig, config.convert | own)


def weights_config(config: RunConfig, iteration: int) -> WeightsConfig:
    """The settings of estimate_weights.py for an iteration."""
    return section_config("weigh", WeightsConfig, weights_values(config, iteration))


def evaluate_config(config: RunConfig, name: str, model: str, against: Sequence[str] = ()) -> EvaluateConfig:
    """The settings of evaluate_model.py for a model; ``name`` is the folder of its scores in the run, ``against`` those of the
    models that its responses are compared with if a scorer is named for that (``win_rate_by``).
    """
    own = {
        "model": model,
        "revision": config.model_revision if model == config.model else None,
        # Without held-out prompts no model is scored, but the other settings of the section are checked all the same.
        "input_dir": config.data.test or config.data.train,
        "split": config.data.test_split,
        "output_file": str(Path(config.run_dir) / name / "eval.json"),
        "against": [str(Path(config.run_dir) / other / "eval.json") for other in against],
        "seed": config.seed,
        **config.template_settings,
    }
    return section_config("evaluate", EvaluateConfig, config.evaluate | own)


def weights_values(config: RunConfig, iteration: int) -> dict[str, Any]:
    """The complete flags of estimate_weights.py for an iteration; sequences are truncated as in its training."""
    section = {key: value for key, value in (config.weigh or {}).items() if key != "train"}
    folder, trained, opponent = (
        config.iteration_dir(iteration),
        train_values(config, iteration),
        config.opponent(iteration),
    )
    params = section.get("transform_params") or {}
    if isinstance(params, Mapping):
        section["transform_params"] = [f"{key}={value}" for key, value in params.items()] or None
    models: dict[str, Any]
    if config.trains_scorers:
        models = {f"model_{sign}": str(folder / name / "checkpoint") for sign, name in SCORERS_OF_RUN.items()}
    else:
        with_teacher = config.weighting.compares is Compares.TEACHER
        role = ("model_minus", "revision_minus") if with_teacher else TOKENIZER_FLAGS
        revision = config.model_revision if opponent == config.model else None
        models = {role[0]: opponent, role[1]: revision}
    # A weighting that compares no models truncates nothing, so it takes no lengths.
    inherited = ("max_length", "max_prompt_length", "system") if config.weighting.needs_models else ("system",)
    shared: dict[str, Any] = {key: trained[key] for key in inherited if key in trained}
    output = {"output_dir": str(folder / "weights"), "page": str(folder / "weights.html"), "seed": config.seed}
    return {**shared, **section, **models, **config.template_settings, "input_dir": str(folder / "pairs"), **output}


def sft_values(config: RunConfig, name: str) -> dict[str, Any]:
    """The complete settings of run_sft.py for the start (``sft``) or the continued-SFT control (``control``)."""
    model = config.model if name == "sft" else config.start_model
    path, split = sft_data(config, name)
    return (
        dict(getattr(config, name))
        | _owned(config, model, Path(config.run_dir) / name)
        | {"dataset_mixer": {path: 1.0}, "dataset_splits": [split]}
    )


def sft_data(config: RunConfig, name: str) -> tuple[str, str]:
    """The data set and the split that a section trains on: the control, with ``select``, on the accepted responses."""
    if name == "control" and config.select is not None:
        return select_config(config).output_dir, config.data.played()[1]
    return config.data.train, config.data.train_split


def sample_config(config: RunConfig) -> GenerateConfig:
    """The settings of generate.py for the responses that the control is trained on if they are accepted."""
    path, split = config.data.played()
    own = {
        "model": config.start_model,
        "revision": config.model_revision if config.start_model == config.model else None,
        "input_dir": path,
        "output_dir": str(Path(config.run_dir) / "control" / "generated"),
        "split": split,
        "data_frac": "auto",
        "iteration": 0,
        "seed": config.sample_seed,
        **config.template_settings,
    }
    return section_config("select.generate", GenerateConfig, config.sample_section | own)


def select_config(config: RunConfig) -> SelectConfig:
    """The settings of select_responses.py for the control."""
    section = {key: value for key, value in (config.select or {}).items() if key != "generate"}
    folder = Path(config.run_dir) / "control"
    own = {"input_dir": str(folder / "generated"), "output_dir": str(folder / "accepted")}
    return section_config("select", SelectConfig, section | own)


def online_values(config: RunConfig) -> dict[str, Any]:
    """The complete settings of run_online.py."""
    section = dict(config.online or {})
    path, split = config.data.played()
    held_out = config.data.test and section.get("eval_strategy", "no") != "no"
    return (
        section
        | _owned(config, config.start_model, Path(config.run_dir) / "online")
        | {"dataset_mixer": {path: 1.0}, "dataset_splits": [split]}
        | ({"eval_prompts": config.data.test, "eval_split": config.data.test_split} if held_out else {})
    )


def _owned(config: RunConfig, model: str, folder: Path) -> dict[str, Any]:
    owned = {"model_name_or_path": model, "output_dir": str(folder / "checkpoint"), "seed": config.seed}
    return (
        config.template_settings
        | owned
        | ({"model_revision": config.model_revision} if model == config.model and config.model_revision else {})
    )


def section_config(name: str, config_class: type[C], values: Mapping[str, Any]) -> C:
    """Return the settings of a program from a section and what the run sets; a key without a value keeps its default.

    Raises:
        InputError: an unknown key, a value of the wrong type or out of range, with the section's name.
    """
    given = {key: value for key, value in values.items() if value is not None}
    return build(config_class, given, f"the section '{name}'")
