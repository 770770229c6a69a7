"""Scores one model on held-out prompts."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.evaluation.held_out import HeldOut


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model on held-out prompts; return what is written to ``output_file``: the fields of ``evaluate_model.py``.

    Raises:
        InputError: the model, the prompts or the metric cannot be used; raised before a model is loaded.
    """
    from transformers import AutoConfig

    from spin.alignment.core.files import write_json_atomic
    from spin.alignment.core.provenance import hash_weights
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.data.template_date import pinned_date
    from spin.alignment.models.folder import check_model_path, context_length, model_folder

    config.check_metric()
    check_model_path(config.model)
    encoder = load_encoder(
        config.model,
        config.revision,
        config.trust_remote_code,
        system=config.system,
        chat_template_kwargs=config.chat_template_kwargs,
        date=pinned_date(config.template_date, ()),
    )
    for remark in encoder.remarks:
        say_error(remark)
    folder = model_folder(config.model, config.revision)
    context = context_length(AutoConfig.from_pretrained(folder, trust_remote_code=config.trust_remote_code))
    held_out, left_out = load_held_out(config, encoder, context or sys.maxsize)
    result = {
        "model": config.model,
        "weights_hash": hash_weights(folder),
        "metric": config.metric,
        "input_dir": config.input_dir,
        "split": config.split,
        **encoder.template_record,
        "n": len(held_out),
        "left_out": left_out,
        **score(config, held_out, encoder),
    }
    write_json_atomic(config.output_file, result)
    exact = ", ".join(f"T={name} {values['exact']:.3f}" for name, values in result["temperatures"].items())
    say(f"{config.model}: {config.metric} {exact}; NLL of the ground truth {result['nll']:.4f} nats per token")
    return result


def load_held_out(config: EvaluateConfig, encoder: ChatEncoder, context: int) -> tuple[list[HeldOut], int]:
    """Return the held-out prompts to score and how many were skipped because they do not fit the context."""
    from spin.alignment.data.fractions import fraction_rows
    from spin.alignment.data.rows import load_prompts
    from spin.alignment.evaluation.held_out import encode_held_out

    prompts = load_prompts(config.input_dir, config.split)
    if config.limit and config.limit < len(prompts):
        prompts = prompts.select(fraction_rows(len(prompts), 0, config.limit))
    return encode_held_out(prompts.to_list(), encoder, context, config.max_new_tokens)


def score(config: EvaluateConfig, held_out: list[HeldOut], encoder: ChatEncoder) -> dict[str, Any]:
    """Generate and score with one loaded model (an engine is closed before the model is loaded for the NLL)."""
    import torch

    from spin.alignment.evaluation.held_out import evaluate_responses, ground_truth_nll
    from spin.alignment.generation import find_backend, make_backend
    from spin.alignment.generation.base import BackendSettings
    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.loading import load_model
    from spin.alignment.rewards import find_scorer

    longest = max(len(item.request.token_ids) for item in held_out) + config.max_new_tokens
    settings = BackendSettings(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        batch_size=config.batch_size,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=longest,
        trust_remote_code=config.trust_remote_code,
        stop_ids=encoder.stop_ids,
        pad_id=encoder.pad_id,
    )
    # Only sets how often progress is shown, in prompts.
    chunk = config.batch_size * 16 if find_backend(config.backend).holds_batch else len(held_out)
    backend = make_backend(config.backend, settings)
    try:
        scores = evaluate_responses(
            backend,
            held_out,
            encoder,
            find_scorer(config.metric),
            [config.sampling(temperature) for temperature in config.temperatures],
            config.samples,
            chunk,
            say_error,
        )
        model = getattr(backend, "model", None)
        if model is not None:
            return scores | ground_truth_nll(model, held_out, encoder.pad_id, config.batch_size)
    finally:
        backend.close()
    loaded = ModelConfig(
        model_name_or_path=config.model,
        model_revision=config.revision,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    model = load_model(loaded).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return scores | ground_truth_nll(model, held_out, encoder.pad_id, config.batch_size)
