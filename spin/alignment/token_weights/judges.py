"""Opens the models that score tokens, without loading their weights, and checks that they are compatible."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spin.alignment.core.errors import InputError
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

    weighting = find_weighting(config.weighting)
    if not weighting.needs_models:
        return None, None, open_encoder(model(config.tokenizer, config.revision_tokenizer), config.system)
    plus = Judge.open(model(config.model_plus, config.revision_plus), config.system)
    minus = Judge.open(model(config.model_minus, config.revision_minus), config.system)
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


def check_teacher(config: WeightsConfig, student: str) -> None:
    """Check a teacher's folder and tokenizer against those of a student, whose weights need not exist yet.

    Raises:
        InputError: the model does not exist, or its tokenizer cannot be aligned.
    """
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.folder import check_model_path, model_folder
    from spin.alignment.models.weights_check import check_model
    from spin.alignment.token_weights.model_scores import check_offsets, open_encoder

    def encoder(name: str, revision: str | None) -> ChatEncoder:
        trusted = config.trust_remote_code
        return open_encoder(ModelConfig(name, revision, trust_remote_code=trusted), config.system)

    teacher = config.model_plus or ""
    check_model_path(teacher)
    check_model(model_folder(teacher, config.revision_plus), trust_remote_code=config.trust_remote_code)
    check_offsets(encoder(teacher, config.revision_plus), encoder(student, config.revision_minus))
