"""Everything that is checked before the first stage starts: settings, data, tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError

if TYPE_CHECKING:
    from spin.alignment.generation.config import GenerateConfig
    from spin.alignment.pipeline.config import RunConfig


def check_before_start(config: RunConfig, source: str) -> None:
    """Check every setting of every program, the data and the tokenizer, before any process starts.

    Raises:
        InputError: what is wrong, with the section or file it stands in.
    """
    from spin.alignment.methods.pairings import PAIRINGS, check_num_samples
    from spin.alignment.models.folder import check_model_path
    from spin.alignment.pairs.annotate import scorer_settings

    generation, conversion = config.generate_config(0), config.convert_config(0)
    generation.check_files()
    scorer_settings(conversion)
    if config.online is None:
        check_num_samples(conversion.pairing, PAIRINGS[conversion.pairing], generation.num_samples)
    config.evaluate_config("start", config.start_model).check_metric()
    check_model_path(config.model, needs_weights=not (config.sft or {}).get("init_from_config", False))
    check_training_settings(config, source, conversion.pairing)
    check_weighing(config)
    check_data(config, generation)


def check_training_settings(config: RunConfig, source: str, pairing: str = "ground_truth") -> None:
    """Build the settings of every training of the run, as its program will."""
    from spin.alignment.pairs.annotate import check_loss
    from spin.alignment.pipeline.config import SCORERS_OF_RUN
    from spin.alignment.training.settings import read_settings
    from spin.alignment.training.trainer import SPINConfig

    # The models of later stages do not exist yet, so their paths are not looked at here.
    path = {"model_name_or_path": "opponent"}
    for name in ("sft", "control"):
        if getattr(config, name) is not None:
            from spin.alignment.training.sft import SFTArguments

            read_settings(config.sft_values(name) | path, f"the section '{name}' of {source}", SFTArguments)
    if config.online is not None:
        from spin.alignment.training.online.config import OnlineConfig
        from spin.alignment.training.online.run import check_settings

        where = f"the section 'online' of {source}"
        check_settings(read_settings(config.online_values() | path, where, OnlineConfig))
        return
    for iteration in range(config.iterations):
        where = f"the section 'train' of {source} (iteration {iteration})"
        check_loss(pairing, read_settings(config.train_values(iteration) | path, where, SPINConfig).arguments.loss_type)
        for name in SCORERS_OF_RUN.values() if config.trains_scorers else ():
            where = f"the section 'weigh.train' of {source} (iteration {iteration}, {name})"
            scorer = read_settings(config.scorer_values(iteration, name) | path, where, SPINConfig)
            check_loss(pairing, scorer.arguments.loss_type)


def check_weighing(config: RunConfig) -> None:
    """Check the flags of the section ``weigh``, and the teacher as far as that goes without its weights."""
    if config.weigh is None:
        return
    from spin.alignment.token_weights.judges import check_teacher

    weights = config.weights_config(0)
    if weights.weighting == "teacher":
        check_teacher(weights, config.model)


def check_data(config: RunConfig, generation: GenerateConfig) -> None:
    """Read the prompts and encode some of them, so that an unusable template shows before hours of training.

    Only SFT, the evaluation and pairings that compare with the ground truth need one.
    """
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.data.formats import prompt_turns
    from spin.alignment.data.rows import load_prompts

    # What the program that reads the prompts is told: run_online.py where it takes the place of generate.py.
    told: dict[str, Any] = {"trust_remote_code": generation.trust_remote_code, "system": generation.system}
    told = {name: (config.online or {}).get(name, value) for name, value in told.items()}
    tokenizer = load_tokenizer(config.model, config.model_revision, told["trust_remote_code"])
    encoder = ChatEncoder(tokenizer, told["system"])
    for (path, split), truth_required in data_sources(config).items():
        prompts = load_prompts(path, split, truth_required)
        for row in prompts.select(range(min(100, len(prompts)))):
            try:
                encoder.prompt_ids(prompt_turns(row["chosen"]))
            except InputError as error:
                raise InputError(f"{path} [{split}], prompt {row['prompt_id']}: {error}") from error


def data_sources(config: RunConfig) -> dict[tuple[str, str], bool]:
    """Return every data set and split of a run, and whether its rows must have their ground truth."""
    from spin.alignment.methods.pairings import needs_truth
    from spin.alignment.rewards import needs_reference

    data = config.data
    if config.online is None:
        name, scorer = config.convert.get("pairing", "ground_truth"), config.convert.get("scorer")
    else:
        name, scorer = config.online.get("pairing", "best_vs_worst"), config.online.get("scorer")
    required = needs_truth(name) or (scorer is not None and needs_reference(scorer))
    sources = {data.played(iteration): required for iteration in range(config.iterations)}
    if config.sft is not None or config.control is not None:
        sources[data.train, data.train_split] = True
    if data.test:
        sources[data.test, data.test_split] = True
    return sources


def check_run_dir(run_dir: Path) -> None:
    """Refuse a folder that holds something else than a run."""
    from spin.alignment.pipeline.manifest import MANIFEST_NAME

    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"run_dir {run_dir} is a file: choose a folder")
    known = {MANIFEST_NAME, ".lock", "run.yaml"}
    if run_dir.is_dir() and not (run_dir / MANIFEST_NAME).exists():
        foreign = sorted(path.name for path in run_dir.iterdir() if path.name not in known)
        if foreign:
            raise InputError(f"run_dir {run_dir} holds {foreign[0]} but no run of this program: choose an empty folder")
