"""The settings of token weights: which models score the tokens, and how their scores become weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say
from spin.alignment.core.errors import InputError
from spin.alignment.core.program import Parser

if TYPE_CHECKING:
    from accelerate import Accelerator

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.config import DataConfig
    from spin.alignment.token_weights.model_scores import Judge


def make_parser() -> Parser:
    parser = Parser(prog="estimate_weights.py", description="Weigh the response tokens of preference data.")
    add = parser.add_argument
    add("--input_dir", required=True, help="folder of {split}_prefs-*.parquet from convert_data.py")
    add("--output_dir", required=True, help="folder for the same files with weights")
    add("--weighting", required=True, help="reverse_dpo, teacher, drift or uniform, or module:function")
    add("--model_plus", default=None, help="the model that was trained on the pairs, or the teacher")
    add("--model_minus", default=None, help="the model that was trained on the reversed pairs, or the student")
    add("--revision_plus", default=None, help="revision of a Hub model")
    add("--revision_minus", default=None, help="revision of a Hub model")
    add("--tokenizer", default=None, help="model whose tokenizer made the data (drift and uniform)")
    add("--revision_tokenizer", default=None, help="revision of a Hub model")
    add("--transform", default=None, help="from gain to weight: exponential (the default), origin, binary, ...")
    add("--transform_params", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the transform")
    add("--seed", type=int, default=42, help="seed of the transform random")
    add("--system", default="keep", choices=("keep", "fold"), help="fold: join system turns into the first user turn")
    add("--max_length", type=int, default=1024, help="longest prompt with response that is scored, as in training")
    add("--max_prompt_length", type=int, default=512, help="what is kept of the prompt of a longer one")
    add("--batching", default="packed", choices=("packed", "padded"), help="padded: for any architecture, slower")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="precision of the weights")
    add("--trust_remote_code", action="store_true", help="run code that comes with the models")
    add("--page", default=None, help="HTML file to write: a few responses coloured by weight")
    add("--page_rows", type=int, default=8, help="pairs on the page")
    add("--overwrite", action="store_true", help="replace weights that were made from something else")
    return parser


def check_options(options: Any) -> tuple[str, dict[str, float]]:
    """Check every flag that needs no file; return the transform and its settings.

    Raises:
        InputError: naming the flag.
    """
    from spin.alignment.methods.weightings import DEFAULT_TRANSFORM, check_transform, find_weighting

    weighting = find_weighting(options.weighting)
    for name in ("model_plus", "model_minus"):
        if weighting.needs_models and not getattr(options, name):
            raise InputError(f"the weighting {options.weighting} compares two models: give --{name}")
    models = ("model_plus", "model_minus", "revision_plus", "revision_minus", "transform", "transform_params")
    for name in ("tokenizer", "revision_tokenizer") if weighting.needs_models else models:
        if getattr(options, name):
            raise InputError(f"the weighting {options.weighting} does not use --{name}: remove it")
    defaults = vars(make_parser().parse_args(["--input_dir", "", "--output_dir", "", "--weighting", ""]))
    for name in () if weighting.needs_models else ("max_length", "max_prompt_length", "batching", "dtype"):
        if getattr(options, name) != defaults[name]:
            raise InputError(f"the weighting {options.weighting} scores nothing and does not use --{name}: remove it")
    if not weighting.needs_models and not options.tokenizer:
        raise InputError(f"the weighting {options.weighting} needs the data's tokenizer: give --tokenizer")
    if options.page_rows < 1:
        raise InputError(f"page_rows is {options.page_rows}: set it to 1 or more")
    make_limits(options)
    if Path(options.input_dir).resolve() == Path(options.output_dir).resolve():
        raise InputError(f"output_dir is the input_dir {options.input_dir}: choose another folder")
    settings: dict[str, str] = {}
    for item in options.transform_params:
        key, equals, value = str(item).partition("=")
        if not equals or key in settings:
            raise InputError(f"transform_params holds '{item}': write each setting once as key=value, such as mu=1")
        settings[key] = value
    transform = options.transform or DEFAULT_TRANSFORM
    if "seed" in settings:
        raise InputError("transform_params names 'seed': each response has a seed of its own, give --seed")
    return transform, check_transform(transform, settings)


def make_limits(options: Any) -> DataConfig:
    """Return how sequences are cut; the checks are those of training."""
    from spin.alignment.data.config import DataConfig

    return DataConfig(max_length=options.max_length, max_prompt_length=options.max_prompt_length, system=options.system)


def open_judges(options: Any) -> tuple[Judge | None, Judge | None, ChatEncoder]:
    """Return both models (without their weights) and the encoder of the data's tokenizer.

    Raises:
        InputError: a model is not there, or the models do not go together.
    """
    from spin.alignment.methods.weightings import WEIGHTINGS, Compares, find_weighting
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.token_weights.model_scores import Judge, check_offsets, open_encoder

    def config(name: str, revision: str | None) -> ModelConfig:
        return ModelConfig(
            model_name_or_path=name,
            model_revision=revision,
            dtype=options.dtype,
            trust_remote_code=options.trust_remote_code,
        )

    weighting = find_weighting(options.weighting)
    if not weighting.needs_models:
        return None, None, open_encoder(config(options.tokenizer, options.revision_tokenizer), options.system)
    plus = Judge.open(config(options.model_plus, options.revision_plus), options.system)
    minus = Judge.open(config(options.model_minus, options.revision_minus), options.system)
    if plus.weights_hash == minus.weights_hash:
        raise InputError(
            f"model_plus {options.model_plus} and model_minus {options.model_minus} hold the same weights, so no token gains "
            "anything: give two models"
        )
    aligns = weighting.compares is Compares.TEACHER
    if aligns:
        check_offsets(plus.encoder, minus.encoder)
    elif plus.encoder.tokenizer_hash != minus.encoder.tokenizer_hash:
        aligning = ", ".join(name for name in WEIGHTINGS if find_weighting(name).compares is Compares.TEACHER)
        raise InputError(
            f"model_plus {options.model_plus} and model_minus {options.model_minus} have different tokenizers, which "
            f"{options.weighting} cannot align: give two models of one tokenizer, or --weighting {aligning}"
        )
    return plus, minus, minus.encoder


def check_teacher(options: Any, student: str) -> None:
    """Check a teacher's folder and its tokenizer against that of a student, whose weights need not be there yet.

    Raises:
        InputError: no such model, or a tokenizer that cannot be aligned.
    """
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.folder import check_model_path
    from spin.alignment.token_weights.model_scores import check_offsets, open_encoder

    def encoder(name: str, revision: str | None) -> ChatEncoder:
        trusted = options.trust_remote_code
        return open_encoder(ModelConfig(name, revision, trust_remote_code=trusted), options.system)

    check_model_path(options.model_plus)
    check_offsets(encoder(options.model_plus, options.revision_plus), encoder(student, options.revision_minus))


def make_accelerator() -> Accelerator:
    """Return how the processes of a launch find each other. Each holds a model whole, in the precision of its weights: what a
    launch configuration says of sharding and mixed precision is for training."""
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"):
        os.environ[name] = "false"
    import torch
    from accelerate import Accelerator

    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision="no")


def report(lines: Sequence[str], accelerator: Accelerator) -> None:
    """Let the main process say something."""
    for line in lines if accelerator.is_main_process else ():
        say(line)
