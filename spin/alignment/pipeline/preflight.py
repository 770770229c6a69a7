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
        InputError: what is wrong, with the section or file it stands in.
    """
    from spin.alignment.evaluation import evaluate
    from spin.alignment.generation import generate
    from spin.alignment.methods.pairings import check_num_samples, find_pairing
    from spin.alignment.models.folder import check_model_path
    from spin.alignment.pairs import convert
    from spin.alignment.pipeline.config import flags

    managed = ["--model", config.model, "--input_dir", config.data.train, "--output_dir", config.run_dir]
    sampling = generate.make_parser().parse_args([*managed, *flags(config.generate)])
    generate.check_options(sampling)
    options = convert.make_parser().parse_args([*managed[2:], *flags(config.convert)])
    convert.check_flags(options)
    if config.online is None:
        check_num_samples(options.pairing, find_pairing(options.pairing), sampling.num_samples)
    evaluation = evaluate.make_parser().parse_args(
        [*managed[:4], "--output_file", config.run_dir, *flags(config.evaluate)]
    )
    evaluate.check_options(evaluation)
    check_model_path(config.model, needs_weights=not (config.sft or {}).get("init_from_config", False))
    check_training_settings(config, source, options.pairing)
    check_weighing(config)
    check_data(config, sampling)


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
        arguments = read_settings(config.train_values(iteration) | path, where, SPINConfig).arguments
        check_loss(pairing, arguments.loss_type)
        check_responses(config, arguments.loss_type)
        for name in SCORERS_OF_RUN.values() if config.trains_scorers else ():
            where = f"the section 'weigh.train' of {source} (iteration {iteration}, {name})"
            scorer = read_settings(config.scorer_values(iteration, name) | path, where, SPINConfig)
            check_loss(pairing, scorer.arguments.loss_type)


def check_responses(config: RunConfig, loss_type: str) -> None:
    """Check that the run can make every response that a loss reads.

    Raises:
        InputError: a response that nothing makes, one set of prompts for each iteration, or token weights, which only chosen and
            rejected have.
    """
    from spin.alignment.core.sides import INITIAL, SIDES
    from spin.alignment.methods.losses import find_loss

    further = [name for name in find_loss(loss_type).responses if name not in SIDES]
    unknown = [name for name in further if name != INITIAL]
    if unknown:
        raise InputError(
            f"loss_type {loss_type} reads a response '{unknown[0]}', which no stage of a run makes: use run_spin.py"
        )
    if further and isinstance(config.data.prompts, list):
        raise InputError(
            f"loss_type {loss_type} reads the initial model's responses, which are made once for all iterations: name a single "
            "data set as data.prompts"
        )
    if further and config.weigh is not None:
        raise InputError(
            f"loss_type {loss_type} reads the initial model's responses, which get no token weights: remove the section 'weigh'"
        )


def check_weighing(config: RunConfig) -> None:
    """Check the flags of the section ``weigh``, and the teacher as far as that goes without its weights."""
    if config.weigh is None:
        return
    from spin.alignment.methods.weightings import Compares, find_weighting
    from spin.alignment.pipeline.config import flags
    from spin.alignment.token_weights import options as weights

    options = weights.make_parser().parse_args(flags(config.weigh_values(0)))
    weights.check_options(options)
    if find_weighting(options.weighting).compares is Compares.TEACHER:
        weights.check_teacher(options, config.model)


def check_data(config: RunConfig, sampling: Any) -> None:
    """Read the prompts and encode some of them, so that an unusable template shows before hours of training.

    Only SFT, the evaluation and pairings that compare with the ground truth need one.
    """
    from spin.alignment.data.chat_encoder import ChatEncoder, load_tokenizer
    from spin.alignment.data.formats import prompt_turns
    from spin.alignment.data.rows import load_prompts

    # What the program that reads the prompts is told: run_online.py where it takes the place of generate.py.
    told = {"trust_remote_code": sampling.trust_remote_code, "system": sampling.system}
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
    from spin.alignment.methods.pairings import find_pairing
    from spin.alignment.rewards import needs_reference

    data = config.data
    if config.online is None:
        name, scorer = config.convert.get("pairing", "ground_truth"), config.convert.get("scorer")
    else:
        name, scorer = config.online.get("pairing", "best_vs_worst"), config.online.get("scorer")
    required = find_pairing(name).needs_ground_truth or (scorer is not None and needs_reference(scorer))
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
