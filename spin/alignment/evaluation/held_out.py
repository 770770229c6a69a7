"""Scores of one model on held-out prompts: exact match at several temperatures, NLL of the ground truth, lengths."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spin.alignment.core.errors import InputError
from spin.alignment.data.chat_encoder import template_arguments
from spin.alignment.data.rows import scorer_columns
from spin.alignment.data.turns import answer_text, question
from spin.alignment.generation.base import GenerationBackend, PromptRequest, Response, SamplingConfig
from spin.alignment.rewards.row_columns import score_response

if TYPE_CHECKING:
    from torch import Tensor

    from spin.alignment.data.chat_encoder import ChatEncoder
    from spin.alignment.rewards import Scorer

Tell = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """One held-out prompt: its request, its text for a scorer, the ground truth as text and ids (EOS included), and the other
    columns of its row for the scorer."""

    request: PromptRequest
    prompt: str
    ground_truth: str
    ground_truth_ids: tuple[int, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)


def encode_held_out(
    rows: Sequence[dict[str, Any]], encoder: ChatEncoder, context: int, max_new_tokens: int
) -> tuple[list[HeldOut], int]:
    """Encode held-out rows; return those that fit into ``context`` tokens with the ground truth and with a response, and
    how many do not.

    Raises:
        InputError: no row fits, or a row cannot be encoded (it is named).
    """
    held_out = []
    for row in rows:
        *prompt, answer = row["chosen"]
        try:
            ids = encoder.prompt_ids(prompt, **template_arguments(row))
            ground_truth_ids = encoder.response_ids(row["chosen"], ids, **template_arguments(row))
        except InputError as error:
            raise InputError(f"prompt {row['prompt_id']}: {error}") from error
        # Both the ground truth (for the NLL) and a response of full length must fit.
        if len(ids) + max(max_new_tokens, len(ground_truth_ids)) <= context:
            request = PromptRequest(row["prompt_id"], tuple(ids))
            columns = scorer_columns(row)
            held_out.append(HeldOut(request, question(prompt), answer_text(answer), tuple(ground_truth_ids), columns))
    if not held_out:
        raise InputError(
            f"no held-out prompt fits with {max_new_tokens} new tokens into the context of {context}: lower max_new_tokens"
        )
    return held_out, len(rows) - len(held_out)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (0 for a single value)."""
    count = len(values)
    mean = sum(values) / count
    if count == 1:
        return mean, 0.0
    variance = sum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def respond(
    backend: GenerationBackend, held_out: Sequence[HeldOut], sampling: SamplingConfig, chunk: int, tell: Tell
) -> list[Response]:
    """Return one response to each prompt, reporting progress after every ``chunk`` prompts."""
    # Long prompts first: once nothing is left to refill the batch, only short ones are running.
    order = sorted(range(len(held_out)), key=lambda index: -len(held_out[index].request.token_ids))
    responses: dict[int, Response] = {}
    for place, answer in backend.stream((held_out[index].request for index in order), sampling):
        responses[order[place]] = answer[0]
        if len(responses) % chunk == 0 or len(responses) == len(order):
            tell(f"temperature {sampling.temperature:g}: {len(responses)} of {len(order)} prompts")
    return [responses[index] for index in range(len(order))]


def score_responses(
    held_out: Sequence[HeldOut], responses: Sequence[Response], texts: Sequence[str], scorer: Scorer
) -> dict[str, float]:
    """Return ``exact``, ``exact_se``, ``identical_rate``, ``truncation_rate``, and ``mean_length`` in tokens, EOS included."""
    scores = [
        score_response(scorer, item.prompt, text, item.ground_truth, item.columns)
        for item, text in zip(held_out, texts, strict=True)
    ]
    exact, error = mean_and_error(scores)
    same = [text.strip() == item.ground_truth.strip() for item, text in zip(held_out, texts, strict=True)]
    count = len(responses)
    return {
        "exact": exact,
        "exact_se": error,
        "identical_rate": sum(same) / count,
        "truncation_rate": sum(response.finish_reason == "length" for response in responses) / count,
        "mean_length": sum(len(response.token_ids) for response in responses) / count,
    }


def evaluate_responses(
    backend: GenerationBackend,
    held_out: Sequence[HeldOut],
    encoder: ChatEncoder,
    scorer: Scorer,
    samplings: Sequence[SamplingConfig],
    num_samples_shown: int,
    chunk: int,
    tell: Tell,
) -> dict[str, Any]:
    """Return ``temperatures`` (scores by temperature, as text such as "0.5") and the first few responses in full."""
    by_temperature: dict[str, dict[str, float]] = {}
    shown: list[dict[str, Any]] = [
        {"prompt_id": item.request.prompt_id, "prompt": item.prompt, "truth": item.ground_truth, "responses": {}}
        for item in held_out[:num_samples_shown]
    ]
    for sampling in samplings:
        responses = respond(backend, held_out, sampling, chunk, tell)
        texts = [encoder.response_text(response.token_ids) for response in responses]
        by_temperature[f"{sampling.temperature:g}"] = score_responses(held_out, responses, texts, scorer)
        for item, text in zip(shown, texts, strict=False):
            item["responses"][f"{sampling.temperature:g}"] = text
    return {"temperatures": by_temperature, "samples": shown}


def ground_truth_nll(model: Any, held_out: Sequence[HeldOut], pad_id: int, batch_size: int) -> dict[str, float]:
    """Return the negative log-likelihood of the ground truth in nats, EOS included.

    ``nll`` is per token over all tokens, ``nll_sequence`` (with ``nll_sequence_se``) the mean of the sums.
    """
    import torch

    from spin.alignment.logprobs.forward import response_logps

    device = next(model.parameters()).device
    order = sorted(held_out, key=lambda item: -len(item.request.token_ids))
    sums: list[float] = []
    for start in range(0, len(order), batch_size):
        batch = stack_ground_truths(order[start : start + batch_size], pad_id)
        with torch.inference_mode():
            # (B, R), 0 on padding, so a row's sum is the log-likelihood of its ground truth.
            logps = response_logps(model, {name: value.to(device) for name, value in batch.items()})
        sums += (-logps.double().sum(dim=-1)).tolist()
    mean, error = mean_and_error(sums)
    tokens = sum(len(item.ground_truth_ids) for item in held_out)
    return {"nll": sum(sums) / tokens, "nll_sequence": mean, "nll_sequence_se": error}


def stack_ground_truths(items: Sequence[HeldOut], pad_id: int) -> dict[str, Tensor]:
    """Return the tensors of ``B`` prompts, each followed by its ground truth, in the layout of ``collators.py``."""
    from spin.alignment.logprobs.collators import PairCollator

    features = [
        {
            "prompt_ids": item.request.token_ids,
            "chosen_ids": item.ground_truth_ids,
            "rejected_ids": item.ground_truth_ids[:1],
        }
        for item in items
    ]
    # The collator returns (2B, ...) tensors, chosen rows first; the rejected half is only there to satisfy it.
    return {name: value[: len(items)] for name, value in PairCollator(pad_id)(features).items()}
