"""Scores one model on held-out prompts."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spin.alignment.core.console import say, say_error
from spin.alignment.core.errors import InputError
from spin.alignment.evaluation.config import EvaluateConfig

if TYPE_CHECKING:
    from pathlib import Path

    from spin.alignment.core.provenance import Provenance
    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.data.held_out_rows import Skipped
    from spin.alignment.evaluation.held_out import HeldOut
    from spin.alignment.generation.base import GenerationBackend

PROGRESS_PROMPTS = 256  # between two reports
SCORED_TOGETHER = 16  # ground truths in one forward pass, whose logits are all in memory


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Score a model on held-out prompts; return what is written to ``output_file``: the fields of ``evaluate_model.py``. Every
    response is written to ``eval.parquet`` next to it first.

    Raises:
        InputError: the model, every prompt or the metric cannot be used; if it can be known, before a model is loaded.
    """
    from spin.alignment.core.files import write_json_atomic
    from spin.alignment.data.chat_encoder import load_encoder
    from spin.alignment.data.held_out_rows import describe_skipped
    from spin.alignment.data.template_date import pinned_date
    from spin.alignment.evaluation.responses import responses_path, write_responses
    from spin.alignment.models.folder import check_model_path, context_length, model_folder
    from spin.alignment.models.vocabulary import check_control_tokens, check_ids, ids_without_token
    from spin.alignment.models.weights_check import check_model

    config.check_files()
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
    model_config = check_model(folder, trust_remote_code=config.trust_remote_code)
    check_control_tokens(encoder, model_config, config.model)
    held_out, skipped = load_held_out(config, encoder, context_length(model_config) or sys.maxsize)
    for item in held_out:
        where = f"prompt {item.request.prompt_id}"
        check_ids((*item.request.token_ids, *item.ground_truth_ids), model_config, config.model, where)
    masked_ids = ids_without_token(encoder.tokenizer, model_config)
    made = provenance(config, encoder, folder, len(held_out))  # refuses damaged weights
    rows = answer_and_score(config, held_out, encoder, skipped, masked_ids)
    result = {
        "model": config.model,
        "weights_hash": made.weights_hash,
        "metric": config.metric,
        "input_dir": config.input_dir,
        "split": config.split,
        **encoder.template_record,
        "n": len(held_out),
        "skipped": skipped,
        **averages(config, rows, len(held_out)),
    }
    write_responses(responses_path(config.output_file), rows, made)
    write_json_atomic(config.output_file, result)
    for line in describe_skipped(skipped):
        say_error(line)
    exact = ", ".join(f"T={name} {values['exact']:.3f}" for name, values in result["temperatures"].items())
    nll = f"; NLL of the ground truth {result['nll']:.4f} nats per token" if "nll" in result else ""
    say(f"{config.model}: {config.metric} {exact}{nll}")
    return result


def provenance(config: EvaluateConfig, encoder: ChatEncoder, folder: Path, count: int) -> Provenance:
    """Return the record of what the responses were made from."""
    from spin.alignment.core.provenance import Provenance, hash_weights, package_versions
    from spin.alignment.models.precision import machine_dtype

    chosen = machine_dtype(folder, config.dtype)
    return Provenance(
        kind="evaluation",
        model=config.model,
        model_revision=config.revision or "",
        weights_hash=hash_weights(folder),
        tokenizer_hash=encoder.tokenizer_hash,
        chat_template_hash=encoder.template_hash,
        backend=config.backend,
        sampling={f"{temperature:g}": config.sampling(temperature).as_dict() for temperature in config.temperatures},
        split=config.split,
        num_prompts=count,
        versions=package_versions(),
        extra={"metric": config.metric} | ({"computed_in": chosen} if chosen else {}),
    )


def load_held_out(config: EvaluateConfig, encoder: ChatEncoder, context: int) -> tuple[list[HeldOut], list[Skipped]]:
    """Return the held-out prompts to score, and the rows that are skipped, each with the reason.

    Raises:
        InputError: the data cannot be read, or no row of it can be used.
    """
    from spin.alignment.data.held_out_rows import check_any_left, read_to_score
    from spin.alignment.evaluation.held_out import encode_held_out
    from spin.alignment.rewards import needs_reference

    compares = needs_reference(config.metric)
    rows, unreadable = read_to_score(config.input_dir, config.split, compares, config.limit)
    rows, unscorable = scorable_rows(config, rows)
    held_out, unusable = encode_held_out(rows, encoder, context, config.max_new_tokens)
    unusable = unscorable + unusable
    check_any_left(held_out, unusable, f"{config.input_dir}, split {config.split}")
    return held_out, [*unreadable, *unusable]


def scorable_rows(config: EvaluateConfig, rows: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Skipped]]:
    """Return the rows that have the columns which the metric and ``group_by`` read, and those that are skipped."""
    from spin.alignment.data.rows import scorer_columns

    usable, skipped = [], []
    for row in rows:
        try:
            config.check_columns(scorer_columns(row))
        except InputError as error:
            skipped.append({"prompt_id": row["prompt_id"], "reason": str(error)})
        else:
            usable.append(row)
    return usable, skipped


def averages(config: EvaluateConfig, rows: list[dict[str, Any]], count: int) -> dict[str, Any]:
    """Return the averages over the rows of all temperatures, ``count`` of each, with ``group_by`` also those of each group, and
    the first few prompts with their responses.

    Raises:
        InputError: the metric failed on every response, or no log-likelihood is finite.
    """
    from spin.alignment.evaluation.responses import average_groups, average_nats, average_responses

    names = [f"{temperature:g}" for temperature in config.temperatures]
    parts = {name: rows[place * count : (place + 1) * count] for place, name in enumerate(names)}
    samples = [
        {
            "prompt_id": some[0]["prompt_id"],
            "prompt": some[0]["prompt"],
            "ground_truth": some[0]["ground_truth"],
            "responses": {name: row["response"] for name, row in zip(names, some, strict=True)},
        }
        for some in zip(*(part[: config.samples] for part in parts.values()), strict=True)
    ]
    return {
        "temperatures": {name: average_responses(part) for name, part in parts.items()},
        **({} if config.group_by is None else {"groups": average_groups(parts)}),
        **average_nats(rows[:count]),
        "samples": samples,
    }


def answer_and_score(
    config: EvaluateConfig,
    held_out: list[HeldOut],
    encoder: ChatEncoder,
    skipped: list[Skipped],
    masked_ids: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Generate and score with one loaded model (otherwise it is freed before the model for the log-likelihoods is loaded); return
    the rows of ``eval.parquet``. Responses that cannot be scored are added to ``skipped``; ``masked_ids`` are never sampled.
    """
    import torch

    from spin.alignment.models.config import ModelConfig
    from spin.alignment.models.folder import model_folder
    from spin.alignment.models.loading import load_model
    from spin.alignment.models.precision import generation_dtype, machine_dtype

    backend = open_backend(config, held_out, encoder, masked_ids)
    try:
        rows = respond_and_score(config, backend, held_out, encoder, skipped)
        model = getattr(backend, "model", None)
        # The log-likelihoods are those of the stored weights, even where responses are generated with rounded ones.
        if model is not None and machine_dtype(model_folder(config.model, config.revision), config.dtype) is None:
            return with_nats(config, rows, model, held_out, encoder, skipped)
    finally:
        backend.close()
    if all(item.ground_truth is None for item in held_out):
        return [row | {"nats": None} for row in rows]
    loaded = ModelConfig(
        model_name_or_path=config.model,
        model_revision=config.revision,
        dtype=generation_dtype(config.model, config.dtype),
        trust_remote_code=config.trust_remote_code,
    )
    model = load_model(loaded).to("cuda" if torch.cuda.is_available() else "cpu").eval()
    return with_nats(config, rows, model, held_out, encoder, skipped)


def open_backend(
    config: EvaluateConfig, held_out: list[HeldOut], encoder: ChatEncoder, masked_ids: tuple[int, ...]
) -> GenerationBackend:
    """Load the model for generation, with a context that fits the longest prompt and a response."""
    from spin.alignment.generation import make_backend
    from spin.alignment.generation.base import BackendSettings

    settings = BackendSettings(
        model=config.model,
        revision=config.revision,
        dtype=config.dtype,
        batch_size=config.batch_size,
        tensor_parallel_size=config.tensor_parallel_size,
        max_model_len=max(len(item.request.token_ids) for item in held_out) + config.max_new_tokens,
        trust_remote_code=config.trust_remote_code,
        stop_ids=encoder.stop_ids,
        masked_ids=masked_ids,
        pad_id=encoder.pad_id,
    )
    return make_backend(config.backend, settings)


def respond_and_score(
    config: EvaluateConfig,
    backend: GenerationBackend,
    held_out: list[HeldOut],
    encoder: ChatEncoder,
    skipped: list[Skipped],
) -> list[dict[str, Any]]:
    """Return the scored rows of every temperature in turn, in the order of the prompts."""
    from spin.alignment.evaluation.held_out import respond
    from spin.alignment.evaluation.responses import scored_rows
    from spin.alignment.rewards import find_scorer
    from spin.alignment.rewards.rules import RuleScorer

    scorer = RuleScorer(config.metric, find_scorer(config.metric))
    rows: list[dict[str, Any]] = []
    for temperature in config.temperatures:
        responses = respond(backend, held_out, config.sampling(temperature), say_error)
        texts = [
            encoder.response_text(response.token_ids, item.chat_template_kwargs)
            for item, response in zip(held_out, responses, strict=True)
        ]
        rows += scored_rows(config.model, temperature, held_out, responses, texts, scorer, skipped, config.group_by)
    return rows


def with_nats(
    config: EvaluateConfig,
    rows: list[dict[str, Any]],
    model: Any,
    held_out: list[HeldOut],
    encoder: ChatEncoder,
    skipped: list[Skipped],
) -> list[dict[str, Any]]:
    """Return the rows with the nats of their ground truth, None without one; a prompt for which the number is not finite is
    added to ``skipped``.
    """
    from spin.alignment.evaluation.held_out import ground_truth_nats

    nats = ground_truth_nats(model, held_out, encoder.pad_id, config.batch_size or SCORED_TOGETHER)
    known = {item.request.prompt_id: value for item, value in zip(held_out, nats, strict=True)}
    reason = "the log-likelihood of its ground truth is not finite"
    damaged = [
        item.request.prompt_id
        for item, value in zip(held_out, nats, strict=True)
        if item.ground_truth and value is None
    ]
    skipped += [{"prompt_id": name, "reason": reason} for name in damaged]
    return [row | {"nats": known[row["prompt_id"]]} for row in rows]
