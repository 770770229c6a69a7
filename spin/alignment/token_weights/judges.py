"""Opens the models that score tokens, without loading their weights, and checks that they are compatible."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.template_date import today
from spin.alignment.token_weights.config import WeightsConfig

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.token_weights.model_scores import Judge


def open_judges(config: WeightsConfig) -> tuple[Judge | None, Judge | None, ChatEncoder]:
    """Return both models (weights not loaded) and the encoder of the data's tokenizer.

    Raises:
        InputError: a model does not exist, or the models are incompatible.
    """
    from spin.alignment.methods.weightings import WEIGHTINGS, Compares, find_weighting
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.token_weights.model_scores import Judge, check_offsets, open_encoder

    def model(name: str | None, revision: str | None) -> ModelConfig:
        return ModelConfig(
            model_name_or_path=name or "",
            model_revision=revision,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
        )

    template = template_settings(config)
    weighting = find_weighting(config.weighting)
    if not weighting.needs_models:
        return None, None, open_encoder(model(config.tokenizer, config.revision_tokenizer), template)
    # A teacher of another family need not know the arguments of the data's template.
    plus_template = teacher_settings(config, template) if weighting.compares is Compares.TEACHER else template
    plus = Judge.open(model(config.model_plus, config.revision_plus), plus_template)
    minus = Judge.open(model(config.model_minus, config.revision_minus), template)
    if plus.weights_hash == minus.weights_hash:
        raise InputError(
            f"model_plus {config.model_plus} and model_minus {config.model_minus} have the same weights, so all gains are 0: "
            "pass two different models"
        )
    if weighting.compares is Compares.TEACHER:
        check_offsets(plus.encoder, minus.encoder)
    elif plus.encoder.tokenizer_hash != minus.encoder.tokenizer_hash:
        aligning = ", ".join(name for name in WEIGHTINGS if find_weighting(name).compares is Compares.TEACHER)
        raise InputError(
            f"model_plus {config.model_plus} and model_minus {config.model_minus} have different tokenizers, which "
            f"{config.weighting} cannot align: pass two models with the same tokenizer, or --weighting {aligning}"
        )
    return plus, minus, minus.encoder


def template_settings(config: WeightsConfig) -> dict[str, Any]:
    """Return how prompts are rendered: the keyword arguments of :func:`load_encoder`.

    Raises:
        InputError: the pairs were generated with different dates.
    """
    from spin.alignment.data.template_date import pinned_date, recorded_in_rows

    recorded = recorded_in_rows(sorted(Path(config.input_dir).glob("*.parquet"))) if not config.template_date else None
    date = pinned_date(config.template_date, [recorded])
    return {"system": config.system, "chat_template_kwargs": config.chat_template_kwargs, "date": date}


def teacher_settings(config: WeightsConfig, template: dict[str, Any]) -> dict[str, Any]:
    """Return ``template`` with those template arguments that the teacher's own template uses."""
    from spin.alignment.data.chat_encoder import load_tokenizer
    from spin.alignment.data.chat_template import ChatTemplate

    if not config.chat_template_kwargs:
        return template
    teacher = config.model_plus or ""
    tokenizer = load_tokenizer(teacher, config.revision_plus, config.trust_remote_code)
    known = ChatTemplate(tokenizer, teacher, {}, template["date"] or today())
    used = {name: value for name, value in config.chat_template_kwargs.items() if known.mentions(name)}
    return template | {"chat_template_kwargs": used}


def check_teacher(config: WeightsConfig, student: str) -> None:
    """Check a teacher's folder and tokenizer against those of a student, whose weights need not exist yet.

    Raises:
        InputError: the model does not exist, or its tokenizer cannot be aligned.
    """
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.folder import check_model_path, model_folder
    from spin.alignment.models.weights_check import check_model
    from spin.alignment.token_weights.model_scores import check_offsets, open_encoder

    def encoder(name: str, revision: str | None, template: dict[str, Any]) -> ChatEncoder:
        trusted = config.trust_remote_code
        return open_encoder(ModelConfig(name, revision, trust_remote_code=trusted), template)

    teacher = config.model_plus or ""
    check_model_path(teacher)
    check_model(model_folder(teacher, config.revision_plus), trust_remote_code=config.trust_remote_code)
    # The pairs need not exist yet: the date does not matter here.
    template = {"system": config.system, "chat_template_kwargs": config.chat_template_kwargs, "date": today()}
    check_offsets(
        encoder(teacher, config.revision_plus, teacher_settings(config, template)),
        encoder(student, config.revision_minus, template),
    )
